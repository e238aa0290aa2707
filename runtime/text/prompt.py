"""Prompts: chat templates, and the placeholders of visual tokens among the text tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypedDict

from edgeprune.bundle import ImageText
from edgeprune.errors import BundleError
from edgeprune.plan import Geometry, View
from edgeprune.runtime.text.tokenizer import TextTokenizer


class Message(TypedDict):
    """One turn. `role`: "user", "assistant" or "system". `content`: text, or parts of type "text", "image" or "video"."""

    role: str
    content: str | list[dict[str, str]]


class ChatTemplate:
    """A chat template in the dialect of transformers."""

    def __init__(self, source: str) -> None:
        from edgeprune.runtime.text.template import compile_template

        self._template = compile_template(source)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **special_tokens: str) -> str:
        """Return the prompt text; raise UsageError when the template rejects the messages."""
        from edgeprune.runtime.text.template import render_template

        return render_template(self._template, messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens)


class ImagePlaceholders:
    """The placeholders of a bundle's images: spans of visual tokens, with text before, between and after them.

    `spans`: the views of each span of an image. There is one span for all views, one per view, or one per row of a view.
    """

    def __init__(self, image: ImageText, geometry: Geometry, tokenizer: TextTokenizer) -> None:
        self._image = image
        count = tokenizer.encode(image.text).count(image.token)
        spans = geometry.spans(count)
        if spans is None:
            raise BundleError(
                f"The text of an image has {count} image tokens for {len(geometry.layout)} views.", hint="Export the bundle again."
            )
        self.spans: tuple[tuple[View, ...], ...] = spans

    @property
    def kind(self) -> str:
        """The type of an image part in a chat message."""
        return self._image.kind

    @property
    def placeholder(self) -> str:
        """The text that the chat template writes for an image."""
        return self._image.placeholder

    def expand(self, prompt: str) -> str:
        """Return a rendered prompt with each placeholder replaced by the text of an image."""
        text, boundary = prompt.replace(self._image.placeholder, self._image.text), self._image.boundary
        if not boundary:
            return text
        return re.sub(rf"{re.escape(boundary)}(?=[^\s<])", f"{boundary} ", text.replace(boundary * 2, boundary))

    def count(self, ids: Sequence[int]) -> int:
        """Return the number of images in `ids`, or -1 if a span of one is missing."""
        images, remainder = divmod(list(ids).count(self._image.token), len(self.spans))
        return -1 if remainder else images

    def image_ends(self, ids: Sequence[int]) -> list[int]:
        """Return for each image the number of ids up to and including its last image token."""
        ends = [end for end, token in enumerate(ids, start=1) if token == self._image.token]
        return ends[len(self.spans) - 1 :: len(self.spans)]

    def split_at_images(self, ids: Sequence[int]) -> list[list[list[int]]]:
        """Split `ids` into one list of text parts per image: before it, between its spans, and after it up to the next image.

        The first part is empty for all images but the first, because that text follows the previous image. Without images the
        result is empty.
        """
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == self._image.token:
                parts.append([])
            else:
                parts[-1].append(token)
        count = len(self.spans)
        turns = [parts[begin : begin + count + 1] for begin in range(0, len(parts) - 1, count)]
        return [[turn[0] if number == 0 else [], *turn[1:]] for number, turn in enumerate(turns)]

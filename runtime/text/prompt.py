"""Where the visual tokens of images lie among the tokens of text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypedDict

from edgeprune.bundle import ImageText
from edgeprune.errors import BundleError
from edgeprune.plan import Geometry, View
from edgeprune.runtime.text.tokenizer import TextTokenizer


class Message(TypedDict):
    """One turn: `role` is "user", "assistant" or "system"; `content` a text or parts of type "text", "image" or "video"."""

    role: str
    content: str | list[dict[str, str]]


class ChatTemplate:
    """A chat template in the dialect of transformers."""

    def __init__(self, source: str) -> None:
        from edgeprune.runtime.text.template import compile_template

        self._template = compile_template(source)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **special_tokens: str) -> str:
        """Return the prompt text; raise UsageError when the template refuses the messages."""
        from edgeprune.runtime.text.template import render_template

        return render_template(self._template, messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens)


class ImagePlaceholders:
    """The places of one bundle's images: spans of visual tokens, with the text that stands before, between and after them.

    `spans`: for each span of an image its views; one span of all, or one for each view.
    """

    def __init__(self, image: ImageText, geometry: Geometry, tokenizer: TextTokenizer) -> None:
        self._image = image
        views, count = geometry.layout, tokenizer.encode(image.text).count(image.token)
        if count not in (1, len(views)):
            raise BundleError(
                f"The text of an image has {count} image tokens for {len(views)} views.", hint="Export the bundle again."
            )
        self.spans: tuple[tuple[View, ...], ...] = (views,) if count == 1 else tuple((view,) for view in views)

    @property
    def kind(self) -> str:
        """The type of an image's part in a chat message."""
        return self._image.kind

    @property
    def placeholder(self) -> str:
        """What the chat template writes for an image."""
        return self._image.placeholder

    def expand(self, prompt: str) -> str:
        """Return a rendered prompt with the text of each image in place of its placeholder."""
        text, mark = prompt.replace(self._image.placeholder, self._image.text), self._image.boundary
        return re.sub(rf"{re.escape(mark)}(?=[^\s<])", f"{mark} ", text.replace(mark * 2, mark)) if mark else text

    def count(self, ids: Sequence[int]) -> int:
        """Return how many whole images ids hold; -1 where a part of one is missing."""
        images, left = divmod(list(ids).count(self._image.token), len(self.spans))
        return -1 if left else images

    def image_ends(self, ids: Sequence[int]) -> list[int]:
        """Return for each image how many ids there are up to its last."""
        places = [place for place, token in enumerate(ids, start=1) if token == self._image.token]
        return places[len(self.spans) - 1 :: len(self.spans)]

    def split_at_images(self, ids: Sequence[int]) -> list[list[list[int]]]:
        """Return ids in parts, for each image: the text before it, between its spans, and after it up to the next image.

        Before an image that is not the first there is none: that text follows the one before. Without an image there is no turn.
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

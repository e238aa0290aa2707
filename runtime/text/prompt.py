"""Prompts: chat templates, and the placeholders of visual tokens among the text tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

from edgeprune.bundle import CHAT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER, Bundle, ImageText
from edgeprune.errors import BundleError, EdgePruneError, UsageError
from edgeprune.plan import Geometry, View
from edgeprune.runtime.text.tokenizer import TextTokenizer

CHARS_PER_TOKEN = 16  # more than texts have
_JOINT = 16  # tokens that a text may have more where it is tokenized in two parts
_PROBE = "EdgePrune asks"  # a text that no template writes by itself


class Message(TypedDict):
    """One turn. `role`: "user", "assistant" or "system". `content`: text, or parts of type "text", "image" or "video"."""

    role: str
    content: str | list[dict[str, str]]


def _text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


class ChatTemplate:
    """A chat template in the dialect of transformers.

    Most templates take the content of a message as parts. Some take plain strings of some roles, and would write parts as Python
    prints them. Such roles are found by rendering a text of each, and are given strings.
    """

    def __init__(self, source: str) -> None:
        from edgeprune.runtime.text.template import compile_template

        self._template = compile_template(source)
        self._strings: dict[str, bool] = {}  # by role: whether its content must be a string

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **special_tokens: str) -> str:
        """Return the prompt text; raise UsageError when the template rejects the messages, BundleError when it fails."""
        written = self.in_their_form(messages, **special_tokens)
        return self._render(written, special_tokens, add_generation_prompt=add_generation_prompt)

    def in_their_form(self, messages: Sequence[Message], **special_tokens: str) -> list[Message]:
        """Return the messages with strings instead of parts where the template takes strings of their role."""
        return [self._in_its_form(message, special_tokens) for message in messages]

    def _render(self, messages: Sequence[Message], special_tokens: Mapping[str, str], *, add_generation_prompt: bool) -> str:
        from edgeprune.runtime.text.template import render_template

        return render_template(self._template, messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens)

    def _in_its_form(self, message: Message, special_tokens: Mapping[str, str]) -> Message:
        role, content = message["role"], message["content"]
        if isinstance(content, str) or any(part["type"] != "text" for part in content):
            return message
        if role not in self._strings:
            forms = ([_text(_PROBE)], _PROBE)
            parts, strings = (self._writes({"role": role, "content": form}, special_tokens) for form in forms)
            self._strings[role] = strings and not parts
        return {"role": role, "content": "\n".join(part["text"] for part in content)} if self._strings[role] else message

    def _writes(self, message: Message, special_tokens: Mapping[str, str]) -> bool:
        # Whether the template writes the text of a message, and nothing of the form that it comes in.
        messages = [message]
        if message["role"] != "user":
            question = self._in_its_form({"role": "user", "content": [_text("?")]}, special_tokens)
            messages = [question, message, question] if message["role"] == "assistant" else [message, question]
        try:
            rendered = self._render(messages, special_tokens, add_generation_prompt=True)
        except EdgePruneError:
            return False
        return _PROBE in rendered and not re.search(r"""['"]text['"]""", rendered)


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


@dataclass(frozen=True)
class PromptEncoder:
    """Turns conversations into token ids. `context`: the most tokens that the model takes."""

    template: ChatTemplate
    tokenizer: TextTokenizer
    special_tokens: Mapping[str, str]
    image: ImageText
    geometry: Geometry
    context: int

    @classmethod
    def of(cls, bundle: Bundle) -> PromptEncoder:
        """Return the encoder of an opened bundle."""
        manifest = bundle.manifest
        return cls(
            ChatTemplate(bundle.file(CHAT_TEMPLATE).read_text(encoding="utf-8")),
            TextTokenizer(bundle.file(TOKENIZER)),
            json.loads(bundle.file(SPECIAL_TOKENS).read_text(encoding="utf-8")),
            manifest.image,
            bundle.plan.geometry,
            manifest.decoder.context,
        )

    @cached_property
    def placeholders(self) -> ImagePlaceholders:
        """The placeholders of images; BundleError if the tokenizer does not make their tokens."""
        return ImagePlaceholders(self.image, self.geometry, self.tokenizer)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation up to where the answer begins; one id for each span of an image.

        Raises UsageError if the template does not place the images or the conversation is longer than the context.
        """
        prompt = self.template.render(messages, add_generation_prompt=True, **self.special_tokens)
        self._check_length(prompt)
        ids = self.tokenizer.encode_prompt(self.placeholders.expand(prompt), self.special_tokens.get("bos_token"))
        images = sum(part["type"] != "text" for message in messages for part in message["content"] if not isinstance(part, str))
        if self.placeholders.count(ids) != images:
            raise UsageError("The chat template of this model does not place one image token for each image.")
        length = len(ids) + images * (self.geometry.tokens - len(self.placeholders.spans))
        if length > self.context:
            raise UsageError(
                f"The conversation would be {length} tokens long, but the model takes {self.context}.",
                hint="Begin a new one, or ask with fewer images.",
            )
        return ids

    def every_id(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation with one id for each visual token, as transformers' processors do."""
        token, views = self.image.token, self.placeholders.spans
        ids, spans = list[int](), 0
        for each in self.ids(messages):
            is_span = each == token
            ids += [each] * (sum(view.tokens for view in views[spans % len(views)]) if is_span else 1)
            spans += is_span
        return ids

    def _check_length(self, prompt: str) -> None:
        # Tokens take hundreds of bytes each. A text far beyond the context is refused before all of it has become tokens.
        step = CHARS_PER_TOKEN * self.context
        count = 0
        for part, begin in enumerate(range(0, len(prompt) if len(prompt) > step else 0, step), start=1):
            count += len(self.tokenizer.encode(prompt[begin : begin + step]))
            if count > self.context + _JOINT * part:
                raise UsageError(
                    f"The conversation would be more than {count - _JOINT * part} tokens long, but the model takes {self.context}.",
                    hint="Begin a new one, or ask for less at once.",
                )

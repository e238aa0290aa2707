"""The text side: chat templates, the tokenizer, and text from tokens as they are generated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from edgeprune.errors import BundleError, UsageError

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no whole character (yet)


class Message(TypedDict):
    """One turn: `role` is "user", "assistant" or "system"; `content` a text or parts of type "text", "image" or "video"."""

    role: str
    content: str | list[dict[str, str]]


class _Generation(Extension):
    # Templates mark with it what training counts as an answer; for a prompt it means nothing.
    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A chat template in the dialect of transformers: Jinja in a sandbox, blocks trimmed, a few helpers."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise BundleError(f"The chat template is broken: {error}.", hint="Export the bundle again.") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **special_tokens: str) -> str:
        """Return the prompt text; raise UsageError when the template refuses the messages."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens)
        except TemplateError as error:
            raise BundleError(f"The chat template failed: {error}.", hint="Export the bundle again.") from error


class TextCodec:
    """Text to token ids and back, by a tokenizer.json."""

    def __init__(self, source: Path | Tokenizer) -> None:
        self._tokenizer = source if isinstance(source, Tokenizer) else _read_tokenizer(source)
        self.special = frozenset(token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens only where the text itself spells them."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str, begin: str | None) -> list[int]:
        """Return the ids of a whole prompt, after what the tokenizer puts before every text unless the text begins so itself.

        As transformers' processors do (processing_utils.py, apply_chat_template). `begin`: the text of that token, if any.
        """
        said_already = begin is not None and text.startswith(begin)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not said_already).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class StreamDecoder:
    """Text piece by piece: a piece comes out once its characters are whole."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._begin = 0  # ids from here on are decoded together; those before are settled
        self._shown = ""  # of the window's text, what came out already

    def push(self, token: int) -> str:
        """Add one token and return the text that is now certain, often a word, sometimes nothing."""
        self._ids.append(token)
        text = self._codec.decode(self._ids[self._begin :])
        if text.endswith(_REPLACEMENT) or not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        if len(self._ids) - self._begin > 16:
            # Keep the window short, but never at one token: decoders treat the first word of a text differently.
            self._begin = len(self._ids) - 4
            self._shown = self._codec.decode(self._ids[self._begin :])
        return piece

    def flush(self) -> str:
        """Return what is left, broken characters included."""
        text = self._codec.decode(self._ids[self._begin :])
        piece = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._shown = text
        return piece


def refuse_control_tokens(text: str, codec: TextCodec, placeholder: str) -> None:
    """Raise UsageError when a text spells a special token, or an image's placeholder: it would act as one, not as text."""
    for token in sorted({*codec.special, placeholder}):
        if token in text:
            raise UsageError(f"The prompt contains the control token {token}.", hint="Remove it from the prompt.")


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"Cannot read the tokenizer {path}: {error}.", hint="Export the bundle again.") from error


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"The chat template refuses these messages: {message}.")


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own tojson escapes HTML characters, which templates for models do not want.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)

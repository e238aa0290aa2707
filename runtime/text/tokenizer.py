"""The tokenizer, incremental detokenization of generated tokens, and stop strings.

jinja2 and tokenizers take 50 ms to import, a quarter of `import edgeprune.runtime`. They are imported with the first loaded bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import BundleError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # decoders emit it for bytes that do not (yet) form a character


class TextTokenizer:
    """Converts text to token ids and back, as tokenizer.json defines. `special`: the texts of the special tokens."""

    def __init__(self, source: Path | Tokenizer) -> None:
        self._tokenizer = _read_tokenizer(source) if isinstance(source, Path) else source
        self.special = frozenset(token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Special tokens appear only where the text spells them."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str, begin: str | None) -> list[int]:
        """Return the ids of a complete prompt, with the tokenizer's special tokens added unless the text begins with `begin`.

        Same as transformers' processors (processing_utils.py, apply_chat_template). `begin`: the text of the BOS token, if any.
        """
        has_begin = begin is not None and text.startswith(begin)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not has_begin).ids
        return ids

    def to_json(self) -> str:
        """Return the contents of tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class IncrementalDetokenizer:
    """Decodes tokens to text incrementally. A piece is returned once its characters are complete."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0  # start of the window that is decoded together; the text of earlier ids is final
        self._emitted = ""  # the part of the window's text that was already returned

    def push(self, token: int) -> str:
        """Add one token and return the text that is now final, possibly empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._begin :])
        if text.endswith(_REPLACEMENT) or not text.startswith(self._emitted):
            return ""
        piece = text[len(self._emitted) :]
        self._emitted = text
        if len(self._ids) - self._begin > 16:
            # Keep the window short, but longer than one token: decoders treat the first word of a text differently.
            self._begin = len(self._ids) - 4
            self._emitted = self._tokenizer.decode(self._ids[self._begin :])
        return piece

    def flush(self) -> str:
        """Return the remaining text, including incomplete characters."""
        text = self._tokenizer.decode(self._ids[self._begin :])
        piece = text[len(self._emitted) :] if text.startswith(self._emitted) else ""
        self._emitted = text
        return piece


class StopStringFilter:
    """Holds back text that may begin a stop string. `stopped`: whether a stop string is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text and return the part that cannot belong to a stop string; empty after a stop string."""
        if self.stopped:
            return ""
        self._pending += text
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._pending = self._pending[: min(found)], ""
            return text
        held = max((self._overlap(stop) for stop in self._stops), default=0)
        end = len(self._pending) - held
        text, self._pending = self._pending[:end], self._pending[end:]
        return text

    def flush(self) -> str:
        """Return the text held back, at the end of the answer."""
        text, self._pending = self._pending, ""
        return text

    def _overlap(self, stop: str) -> int:
        # Length of the longest suffix of the pending text that is a prefix of the stop string.
        return next((n for n in range(len(stop) - 1, 0, -1) if self._pending.endswith(stop[:n])), 0)


def reject_control_tokens(text: str, tokenizer: TextTokenizer, placeholder: str) -> None:
    """Raise UsageError when a text spells a special token or the image placeholder, which would act as control tokens."""
    for token in sorted({*tokenizer.special, placeholder}):
        if token in text:
            raise UsageError(f"The prompt contains the control token {token}.", hint="Remove it from the prompt.")


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"Cannot read the tokenizer {path}: {error}.", hint="Export the bundle again.") from error

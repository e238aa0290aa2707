"""The text side: chat templates, the tokenizer, and text from tokens as they are generated.

jinja2 and tokenizers take 50 ms to import, a quarter of `import edgeprune.runtime`; they come with the first bundle that is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import BundleError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no whole character (yet)


class TextTokenizer:
    """Text to token ids and back, by a tokenizer.json."""

    def __init__(self, source: Path | Tokenizer) -> None:
        self._tokenizer = _read_tokenizer(source) if isinstance(source, Path) else source
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

    def to_json(self) -> str:
        """Return the text of the tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class IncrementalDetokenizer:
    """Text piece by piece: a piece comes out once its characters are whole."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0  # ids from here on are decoded together; those before are settled
        self._emitted = ""  # of the window's text, what came out already

    def push(self, token: int) -> str:
        """Add one token and return the text that is now certain, often a word, sometimes nothing."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._begin :])
        if text.endswith(_REPLACEMENT) or not text.startswith(self._emitted):
            return ""
        piece = text[len(self._emitted) :]
        self._emitted = text
        if len(self._ids) - self._begin > 16:
            # Keep the window short, but never at one token: decoders treat the first word of a text differently.
            self._begin = len(self._ids) - 4
            self._emitted = self._tokenizer.decode(self._ids[self._begin :])
        return piece

    def flush(self) -> str:
        """Return what is left, broken characters included."""
        text = self._tokenizer.decode(self._ids[self._begin :])
        piece = text[len(self._emitted) :] if text.startswith(self._emitted) else ""
        self._emitted = text
        return piece


def reject_control_tokens(text: str, tokenizer: TextTokenizer, placeholder: str) -> None:
    """Raise UsageError when a text spells a special token, or an image's placeholder: it would act as one, not as text."""
    for token in sorted({*tokenizer.special, placeholder}):
        if token in text:
            raise UsageError(f"The prompt contains the control token {token}.", hint="Remove it from the prompt.")


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"Cannot read the tokenizer {path}: {error}.", hint="Export the bundle again.") from error


class StopStringFilter:
    """Holds back text that may be the beginning of a stop string; `stopped` tells that one is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text and return what can be shown; after a stop string nothing can."""
        if self.stopped:
            return ""
        self._pending += text
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._pending = self._pending[: min(found)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._pending) - keep
        shown, self._pending = self._pending[:cut], self._pending[cut:]
        return shown

    def flush(self) -> str:
        """Return what is held back, at the end of the answer."""
        shown, self._pending = self._pending, ""
        return shown

    def _overlap(self, stop: str) -> int:
        # The longest end of the held text that begins the stop string.
        return next((n for n in range(len(stop) - 1, 0, -1) if self._pending.endswith(stop[:n])), 0)

"""The tokenizer, incremental detokenization of generated tokens, and stop strings.

jinja2 and tokenizers take 50 ms to import, a quarter of `import edgeprune.runtime`. They are imported with the first loaded bundle.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING

from edgeprune.errors import BundleError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Of Qwen2-VL's tokenizers, and of InternVL's.
_GROUNDING = re.compile(r"<\|(object_ref|box|quad)_(start|end)\|>|</?(ref|box|quad)>")
_REPLACEMENT = "\ufffd"  # decoders emit it for bytes that do not (yet) form a character


class TextTokenizer:
    """Converts text to token ids and back, as tokenizer.json defines. `special`: the texts of the special tokens.

    Truncation and padding are switched off: a file may carry those of the last call before it was saved, which transformers
    ignores. A `Tokenizer` that is given is changed so.
    """

    def __init__(self, source: Path | Tokenizer) -> None:
        self._tokenizer = _read_tokenizer(source) if isinstance(source, Path) else source
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
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

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ids, without special tokens if `skip_special`."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def is_text(self, token: int, *, skip_special: bool = True) -> bool:
        """Return whether `decode` does not leave the token out: it is in the vocabulary and, if `skip_special`, not special."""
        content = self._tokenizer.id_to_token(token)
        return content is not None and not (skip_special and content in self.special)

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """Tokens that stand for one byte of a character without a token (`<0xE0>`, "byte fallback"), if the decoder joins them."""
        written = [f"<0x{byte:02{case}}>" for byte in range(256) for case in "Xx"]
        known = {self._tokenizer.token_to_id(content): content for content in written}
        return frozenset(token for token, content in known.items() if token is not None and self.decode([token]) != content)

    @cached_property
    def anchor(self) -> int | None:
        """A token whose text is a letter wherever it stands, None if there is no such token."""
        ids = ((letter, self._tokenizer.token_to_id(letter)) for letter in ascii_letters)
        return next((token for letter, token in ids if token is not None and self.decode([token, token]) == 2 * letter), None)


class IncrementalDetokenizer:
    """Decodes tokens to text incrementally: the pieces are, joined, what `TextTokenizer.decode` returns for all tokens.

    A piece is returned once no later token can change it. That holds back an incomplete character, and a run of byte tokens, which
    are text only if all of the run is valid UTF-8. Tokens are decoded in a window that is short, so that an answer costs linear
    time. A window begins where nothing is held back, after an anchor and the token before it, whose text is removed again: decoders
    strip the beginning of a text, and the anchor takes that upon itself.
    """

    def __init__(self, tokenizer: TextTokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._before: list[int] = []  # decoded with the window: empty for the first, then the anchor and a token
        self._known = 0  # characters of the text of `_before`
        self._window: list[int] = []
        self._emitted = ""  # the part of the window's text that was already returned

    def push(self, token: int) -> str:
        """Add one token and return the text that is now final, possibly empty."""
        if not self._tokenizer.is_text(token, skip_special=self._skip_special):
            return ""
        self._window.append(token)
        if token in self._tokenizer.byte_tokens:
            return ""
        text = self._decode(self._window)
        final = text.removesuffix(_REPLACEMENT)  # removes one: an incomplete character is decoded to one
        if not final.startswith(self._emitted):  # by no decoder known
            return ""
        piece, self._emitted = final[len(self._emitted) :], final
        self._advance(text)
        return piece

    def flush(self) -> str:
        """Return the remaining text, including incomplete characters."""
        text = self._decode(self._window)
        piece = text[len(self._emitted) :] if text.startswith(self._emitted) else ""
        self._emitted = text
        return piece

    def _advance(self, text: str) -> None:
        # Shortens the window, unless its text is empty: the decoder may not have stripped the beginning yet.
        anchor = self._tokenizer.anchor
        if anchor is None:
            return
        if text and self._emitted == text:
            self._begin_after(anchor, self._window, [], "")
        elif len(self._window) > 1:
            # A character that spans a token boundary has more than its share in the texts of the two sides: each byte after the
            # boundary is invalid by itself. So none spans it, and none will, if the text is the sum of the two.
            earlier, last = self._window[:-1], self._window[-1]
            begin, end = self._decode(earlier), self._text([anchor, last])[1:]
            if begin and end and begin + end == text:
                self._begin_after(anchor, earlier, [last], end.removesuffix(_REPLACEMENT))

    def _begin_after(self, anchor: int, earlier: list[int], window: list[int], emitted: str) -> None:
        self._before, self._window, self._emitted = [anchor, earlier[-1]], window, emitted
        self._known = len(self._text(self._before))

    def _decode(self, ids: list[int]) -> str:
        return self._text(self._before + ids)[self._known :]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


class StopStringFilter:
    """Holds back text that may begin a stop string. `stopped`: whether a stop string is complete.

    An automaton reads each character once (Aho and Corasick, 1975, doi 10.1145/360825.360855). Its states are the beginnings of the
    stop strings; the current one is the longest that the text ends with. No more text than that is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]  # characters of each state
        self._match = [0]  # characters of the longest stop string that ends in a state, 0 for none
        for stop in stops:
            self._add(stop)
        self._fallback = self._link()
        self._state, self._pending = 0, ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text and return the part that cannot belong to a stop string; empty after a stop string."""
        if self.stopped:
            return ""
        length, first = len(self._pending), None
        self._pending += text
        for end, character in enumerate(text, start=length + 1):
            self._state = self._follow(self._state, character)
            if match := self._match[self._state]:
                first = end - match if first is None else min(first, end - match)
        self.stopped = first is not None
        end = len(self._pending) - self._depth[self._state] if first is None else first
        final, self._pending = self._pending[:end], "" if self.stopped else self._pending[end:]
        return final

    def flush(self) -> str:
        """Return the text held back, at the end of the answer."""
        text, self._pending = self._pending, ""
        return text

    def _add(self, stop: str) -> None:
        state = 0
        for depth, character in enumerate(stop, start=1):
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(depth)
                self._match.append(0)
            state = self._next[state][character]
        self._match[state] = len(stop)

    def _link(self) -> list[int]:
        # The fallback of a state is the longest other state that its text ends with. Shorter states come first.
        self._fallback = [0] * len(self._next)
        states = deque([0])
        while states:
            state = states.popleft()
            for character, deeper in self._next[state].items():
                if state:
                    self._fallback[deeper] = self._follow(self._fallback[state], character)
                self._match[deeper] = self._match[deeper] or self._match[self._fallback[deeper]]
                states.append(deeper)
        return self._fallback

    def _follow(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)


def reject_unencodable(text: object, name: str) -> None:
    """Raise UsageError unless `text` is a string that UTF-8 can write. `name`: what the message calls it."""
    if not isinstance(text, str):
        raise UsageError(f"{name} must be text, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        raise UsageError(
            f"{name} has {found} at position {error.start}, half of a surrogate pair, which UTF-8 cannot write.",
            hint="Decode the text again from its source, or remove the character.",
        ) from error


def reject_control_tokens(text: str, tokenizer: TextTokenizer, placeholder: str) -> None:
    """Raise UsageError when a text spells a special token or the image placeholder, which would act as control tokens.

    Grounding tokens mark objects and boxes within a text, and begin or end nothing else.
    """
    for token in sorted({*(each for each in tokenizer.special if not _GROUNDING.fullmatch(each)), placeholder}):
        if token in text:
            raise UsageError(f"The prompt contains the control token {token}.", hint="Remove it from the prompt.")


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"Cannot read the tokenizer {path}: {error}.", hint="Export the bundle again.") from error

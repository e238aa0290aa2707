"""Structured answers: token masks that restrict an answer to given choices or to JSON that matches a schema.

llguidance compiles and matches the grammar; it is imported with the first structured answer. Its masks are exact: a token is
allowed if and only if the answer can still be completed after it, and end tokens only where the answer is complete.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import EdgePruneError, UsageError, require_extra

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CHOICES = 1000  # the grammar follows all choices at once, and llguidance follows at most 2000 items
_MOST_CROSSED = 8  # patterns that one text must match together; the time to compile them doubles with each beyond that
_GRAMMARS = 16  # size of the cache of compiled grammars
# At most one space, after commas and colons: free whitespace is valid JSON, but small models can repeat it endlessly. Only one
# spelling per character: the grammar takes "\u0061" and "a" for different names, while a JSON parser takes them for the same.
_JSON_STYLE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": False}
_JSON_STYLE["json_allowed_escapes"] = '"\\bfnrt'
# Token sets whose masks llguidance precomputes for strings: its own defaults and one more, for strings with a maxLength.
_SLICES = [r"[\x20\x0A\x0D\x09]+", *(rf'[^"\\\x00-\x1F\x7F]{many}' for many in ("{1,4}", "{1,12}", "{1,30}", "+"))]
_JSON_MARKS = '{}[]":,-.0123456789truefalsn'
_OWN_KEY = "x-guidance"  # llguidance options in a schema; one of them would ignore constraints that cannot be enforced
# Positions in the generated grammar, which mean nothing to the user.
_POSITION = re.compile(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?| 1 \| start: .*$")
_SIMPLER = "Ask without choices and json_schema, or for something simpler."


class TokenConstraint:
    """The grammar of one answer and the state of its matcher. Not thread-safe."""

    def __init__(self, matcher: LLMatcher, end_tokens: Sequence[int]) -> None:
        self._matcher = matcher
        self._end_tokens = np.array(sorted(end_tokens), np.int64)
        self._ended = False

    @property
    def done(self) -> bool:
        """Whether the answer is complete and cannot continue: only an end token may follow, and none is required."""
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def allowed_ids(self, size: int) -> np.ndarray:
        """Return the ids below `size` that may come next, ascending int64 [n], n > 0."""
        ids = self._end_tokens
        if not self.done:
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            ids = np.flatnonzero(np.unpackbits(mask, bitorder="little").view(np.bool_))
        if self._matcher.is_error():
            raise self._refused("cannot go on")
        ids = ids[: int(np.searchsorted(ids, size))]
        if not len(ids):
            raise EdgePruneError("No token of this model can continue the structured answer.", hint=_SIMPLER)
        return ids

    def accept(self, token: int) -> None:
        """Advance by a sampled token, one of `allowed_ids`."""
        if token in self._end_tokens:
            self._ended = True
        elif not self._matcher.consume_token(token):
            raise self._refused(f"cannot take token {token}")

    def _refused(self, what: str) -> UsageError:
        # Within the model's own tokens only a limit of llguidance ends a grammar: the request asks for too much.
        return UsageError(f"The structured answer {what}: {_first_line(self._matcher.get_error())}.", hint=_SIMPLER)


class GrammarCompiler:
    """Compiles choices and JSON schemas to grammars for one model and caches the most recently used. Thread-safe.

    `tokenizer`: returns the contents of the model's tokenizer.json; called once. `end_tokens`: the ids that end a turn.
    """

    def __init__(self, tokenizer: Callable[[], str], end_tokens: Sequence[int]) -> None:
        self._read_tokenizer, self._end_tokens = tokenizer, tuple(end_tokens)
        self._vocabulary: _GrammarTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(
        self, choices: Sequence[str] | None = None, json_schema: Mapping[str, Any] | None = None
    ) -> TokenConstraint | None:
        """Return the constraint of a new answer, or None for a free one.

        Raises UsageError for a schema that is invalid or cannot be enforced and for texts that the tokenizer cannot encode, and
        MissingExtraError without llguidance.
        """
        if choices is None and json_schema is None:
            return None
        kind, body = _choices(choices) if choices is not None else _schema(json_schema or {})
        key = kind + body
        with self._lock:
            if self._vocabulary is None:
                require_extra("structured", "llguidance")
                self._vocabulary = _GrammarTokenizer(self._read_tokenizer(), self._end_tokens)
            vocabulary, matcher = self._vocabulary, self._compiled.get(key)
        if matcher is None:  # compiled without the lock, for it can take seconds and others must not wait for that
            vocabulary.check(kind, [body] if choices is None else choices)
            matcher = vocabulary.compile(kind, body)
        with self._lock:
            self._compiled[key] = matcher
            self._compiled.move_to_end(key)
            if len(self._compiled) > _GRAMMARS:
                self._compiled.popitem(last=False)
            return TokenConstraint(matcher.deep_copy(), self._end_tokens)


class _GrammarTokenizer:
    # A model's vocabulary in the form of llguidance.

    def __init__(self, source: str, end_tokens: Sequence[int]) -> None:
        from llguidance import LLTokenizer

        config = json.loads(source)
        self._special = [token["content"] for token in config.get("added_tokens", ()) if token.get("special")]
        self._leading_space = '" "? ' if any(_strips_leading_space(step) for step in _decoder_steps(config.get("decoder"))) else ""
        try:
            self._tokens: LLTokenizer = LLTokenizer(source, eos_token=list(end_tokens), slices=_SLICES)
        except ValueError as error:
            raise EdgePruneError(
                f"The tokenizer of this model cannot give structured answers: {_first_line(str(error))}.",
                hint="Ask without choices and json_schema.",
            ) from error

    def check(self, kind: str, texts: Sequence[str]) -> None:
        """Raise UsageError for text that the tokenizer cannot encode or would encode as a control token."""
        for text in texts:
            control = next((token for token in self._special if token in text), None)
            if control is not None:
                raise UsageError(f"The {kind} contains the control token {control}.", hint="Remove it.")
            if kind == "json_schema" or not self._can_encode(text):
                marks = _JSON_MARKS if kind == "json_schema" else ""
                missing = [character for character in dict.fromkeys(marks + text) if not self._can_encode(character)]
                if missing:
                    raise UsageError(f"The tokenizer of this model cannot write {missing[0]!r}, which the {kind} needs.")

    def compile(self, kind: str, body: str) -> LLMatcher:
        """Return the matcher of a grammar in its initial state."""
        from llguidance import LLMatcher, LLParserLimits

        grammar = LLMatcher.grammar_from_lark(f"start: {self._leading_space}answer\nanswer: {body}")
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if not matcher.is_error():
            matcher.compute_bitmask()  # only this reveals that some schemas are unsatisfiable
        if matcher.is_error():
            raise UsageError(f"The {kind} cannot be used: {_first_line(matcher.get_error())}.", hint="See docs/structured.md.")
        return matcher

    def _can_encode(self, text: str) -> bool:
        return self._tokens.decode_bytes(self._tokens.greedy_tokenize(text)) == text.encode()


def _choices(choices: Sequence[str]) -> tuple[str, str]:
    # The grammar language escapes strings as JSON does.
    if len(choices) > MAX_CHOICES:
        raise UsageError(
            f"There are {len(choices)} choices, more than the {MAX_CHOICES} that a grammar may have.", hint="Give fewer."
        )
    return "choice", " | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices))


def _schema(schema: Mapping[str, Any]) -> tuple[str, str]:
    # Keep the order of the keys: it is the order of the properties in the answer.
    if _OWN_KEY in schema:
        raise UsageError(f"The json_schema has the key {_OWN_KEY!r}, which is used otherwise.", hint="Remove it.")
    if any(_has_free_min_properties(part) for part in _subschemas(schema)):
        raise UsageError(
            "The json_schema has minProperties where the names are free: the same name could come twice.",
            hint="Name the properties, and require them.",
        )
    if any(_crossed_patterns(part) > _MOST_CROSSED for part in _subschemas(schema)):
        raise UsageError(
            f"The json_schema has a text that more than {_MOST_CROSSED} patterns describe together (allOf, patternProperties).",
            hint="Join them into fewer patterns.",
        )
    return "json_schema", "%json " + json.dumps({**schema, _OWN_KEY: _JSON_STYLE}, ensure_ascii=False)


def _subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    # Yields every object of a schema except literal values.
    if isinstance(schema, Mapping):
        yield schema
        for key, value in schema.items():
            if key not in ("const", "enum", "default", "examples"):
                yield from _subschemas(value)
    elif isinstance(schema, (list, tuple)):
        for value in schema:
            yield from _subschemas(value)


def _has_free_min_properties(part: Mapping[str, Any]) -> bool:
    least, required = part.get("minProperties"), part.get("required", ())
    return isinstance(least, int) and least > max(1, len(required) if isinstance(required, (list, tuple)) else 0)


def _crossed_patterns(part: Mapping[str, Any]) -> int:
    # An upper bound of the patterns that llguidance intersects for one text: those of all branches of an allOf, and names.
    branches, names = part.get("allOf", ()), part.get("patternProperties", ())
    inside = [each for branch in branches for each in _subschemas(branch)] if isinstance(branches, (list, tuple)) else []
    patterns = sum(("pattern" in each) + ("format" in each) + ("$ref" in each) for each in inside)
    return max(patterns, len(names) if isinstance(names, Mapping) else 0)


def _decoder_steps(decoder: Any) -> Iterator[Mapping[str, Any]]:
    if decoder:
        yield decoder
        for step in decoder.get("decoders", ()):
            yield from _decoder_steps(step)


def _strips_leading_space(step: Mapping[str, Any]) -> bool:
    # Such models begin their answers with a space that the decoder strips. If the grammar forbade it, they would have to start
    # with a token for a word piece.
    return step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0


def _first_line(message: str) -> str:
    line = _POSITION.sub("", " ".join(message.split())).rstrip(".") or "the reason is not known"
    return line if len(line) <= 200 else line[:200] + "..."

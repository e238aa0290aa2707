"""Sampling options, their validation, and the sampler that chooses the next token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.bundle import GenerationDefaults
from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.runtime.text.tokenizer import reject_unencodable

if TYPE_CHECKING:
    from edgeprune.runtime.text.grammar import TokenConstraint


_FLOAT32 = np.finfo(np.float32)
MAX_STOPS, MAX_STOP_CHARS = 64, 1024


@dataclass(frozen=True)
class Sampling:
    """Options of generation. Raises UsageError for values out of range.

    * `temperature`: 0 is greedy.
    * `top_k`: sample from this many most probable tokens; 0 for all.
    * `top_p`: nucleus mass in (0, 1], of what `top_k` left.
    * `seed`: makes sampling repeatable.
    * `max_tokens`: the longest answer, in tokens.
    * `repetition_penalty`: divides positive logits and multiplies negative ones of tokens in the prompt or the answer (arXiv
      1909.05858); None for the checkpoint's own.
    * `presence_penalty`, `frequency_penalty`: subtracted from the logits of tokens in the answer, once and for each occurrence.
    * `stop`: at most 64 strings of at most 1024 characters that end the answer and are excluded from it.
    * `choices`: the answer is exactly one of these texts. Needs the extra "structured".
    * `json_schema`: the answer is JSON that matches this schema. Needs the extra "structured". `max_tokens` and `stop` can still
      truncate such an answer.
    * `skip_special_tokens`: False keeps special tokens in the text, such as those around boxes.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: Sequence[str] = ()
    choices: Sequence[str] | None = None
    json_schema: Mapping[str, Any] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if check_number("temperature", self.temperature) < 0:
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}.")
        if not 0 < check_number("top_p", self.top_p) <= 1:
            raise UsageError(f"top_p must be in (0, 1], not {self.top_p}.")
        check_count("top_k", self.top_k, 0)
        check_count("max_tokens", self.max_tokens, 1)
        if self.repetition_penalty is not None and check_number("repetition_penalty", self.repetition_penalty) <= 0:
            raise UsageError(f"repetition_penalty must be above 0, not {self.repetition_penalty}.")
        check_number("presence_penalty", self.presence_penalty)
        check_number("frequency_penalty", self.frequency_penalty)
        if self.seed is not None:
            check_count("seed", self.seed, 0)
        if not isinstance(self.skip_special_tokens, bool):
            raise UsageError(f"skip_special_tokens must be True or False, not {self.skip_special_tokens!r}.")
        _check_stop(self.stop)
        _check_structured(self.choices, self.json_schema)

    @property
    def structured(self) -> bool:
        """Whether the answer is constrained to choices or a schema."""
        return self.choices is not None or self.json_schema is not None


class Sampler:
    """Samples the tokens of one answer.

    `constraint`: from `GrammarCompiler.constraint`, None for a free answer. `defaults`: what the checkpoint does to logits.
    """

    def __init__(
        self, sampling: Sampling, constraint: TokenConstraint | None = None, defaults: GenerationDefaults | None = None
    ) -> None:
        self.sampling, self._constraint = sampling, constraint
        self._penalties = LogitPenalties(sampling, defaults or GenerationDefaults())
        self._rng = np.random.default_rng(sampling.seed)
        self._buffers = _Buffers()

    def begin(self, prompt: Sequence[int]) -> None:
        """Take the token ids before the answer, which a repetition penalty counts."""
        self._penalties.begin(prompt)

    def sample(self, logits: np.ndarray) -> int:
        """Return the next token id for logits [vocabulary]; ties go to the lowest id. Raises EdgePruneError for NaN logits."""
        if np.isnan(logits.max()):
            raise EdgePruneError("The model returned logits that are not numbers.", hint="Check it with: edgeprune verify BUNDLE")
        logits = self._penalties.apply(logits)
        if self._constraint is None:
            token = self._sample_token(logits)
        else:
            allowed = self._constraint.allowed_ids(len(logits))
            token = int(allowed[self._sample_token(logits[allowed])])
            self._constraint.accept(token)
        self._penalties.add(token)
        return token

    @property
    def done(self) -> bool:
        """Whether a structured answer is complete, so that only an end token can follow."""
        return self._constraint is not None and self._constraint.done

    def _sample_token(self, logits: np.ndarray) -> int:
        peak = logits.max()
        if self.sampling.temperature == 0 or not np.isfinite(peak):  # infinite: one token is certain, or none is possible
            return int(logits.argmax())
        if 0 < self.sampling.top_k < len(logits):
            logits = _keep_largest(logits, self.sampling.top_k)
        weights, speeds, ahead, products = self._buffers.of(len(logits))
        # Subtract the maximum before dividing: a tiny temperature then gives -inf for all other tokens, never +inf.
        np.subtract(logits, peak, out=weights, casting="same_kind")
        with np.errstate(over="ignore", under="ignore", divide="ignore"):
            np.divide(weights, np.float32(np.clip(self.sampling.temperature, _FLOAT32.tiny, _FLOAT32.max)), out=weights)
            np.exp(weights, out=weights)
            # A race: of exponential times with the rates `weights`, each is the first with its share of their sum as probability.
            # The noise belongs to a token id instead of a rank. Rounding, which differs after a prefix was reused and can swap
            # tokens of nearly equal probability, then does not change the sample of a seed. In float32 the noise would be 0 once in
            # 8 million.
            np.divide(weights, self._rng.standard_exponential(out=speeds), out=speeds)
        if self.sampling.top_p == 1:
            return int(speeds.argmax())
        # The nucleus is the smallest set with the share `top_p` of all weight, heaviest first, then lowest id. A token belongs to
        # it if those ahead of it have less. One that does not takes itself and all behind it out of the race, so few are looked at.
        target = self.sampling.top_p * float(weights.sum(dtype=np.float64))
        while True:
            token = int(speeds.argmax())
            np.greater(weights, weights[token], out=ahead)
            ahead[np.flatnonzero(weights[:token] == weights[token])] = True
            if float(np.multiply(weights, ahead, out=products).sum(dtype=np.float64)) < target:
                return token
            np.multiply(speeds, ahead, out=speeds)


class LogitPenalties:
    """Changes logits by the tokens so far, as the logits processors of transformers and vLLM do.

    The repetition penalty counts the prompt and the answer; the presence and frequency penalties count the answer alone.
    """

    def __init__(self, sampling: Sampling, defaults: GenerationDefaults) -> None:
        own = sampling.repetition_penalty
        self._repetition = np.float32(defaults.repetition_penalty if own is None else own)
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self._suppressed = np.array(defaults.suppressed, np.int64)
        self._changes = self._repetition != 1 or self._presence != 0 or self._frequency != 0 or len(self._suppressed) > 0
        self._seen = np.empty(0, np.int64)  # ids in the prompt and the answer, each once
        self._counts: dict[int, int] = {}  # of the answer

    def begin(self, prompt: Sequence[int]) -> None:
        """Take the token ids before the answer."""
        self._seen = np.unique(np.asarray(prompt, np.int64)) if self._repetition != 1 else self._seen

    def add(self, token: int) -> None:
        """Take a token of the answer."""
        if not self._changes:
            return
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._repetition != 1 and token not in self._seen:
            self._seen = np.append(self._seen, token)

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Return the changed logits [vocabulary]; the given ones stay as they are."""
        if not self._changes:
            return logits
        logits = logits.astype(np.float32)
        seen = self._seen[self._seen < len(logits)]
        values = logits[seen]
        logits[seen] = np.where(values < 0, values * self._repetition, values / self._repetition)
        for token, count in self._counts.items() if self._presence or self._frequency else ():
            logits[token] -= self._presence + self._frequency * count
        logits[self._suppressed[self._suppressed < len(logits)]] = -np.inf
        return logits


def _keep_largest(logits: np.ndarray, count: int) -> np.ndarray:
    # Ties with the smallest that is kept stay too, as in transformers' TopKLogitsWarper.
    least = np.partition(logits, -count)[-count]
    return np.where(logits < least, np.float32(-np.inf), logits)


class _Buffers:
    # Arrays of one answer. New ones at every token would take more time than what is computed in them, because the allocator
    # returns blocks of this size to the system.
    def __init__(self) -> None:
        self._arrays: tuple[np.ndarray, ...] = (np.empty(0),)

    def of(self, size: int) -> tuple[np.ndarray, ...]:
        """Return float32 weights, float64 speeds, a mask and float32 products for `size` tokens, with any contents."""
        if size > len(self._arrays[0]):
            self._arrays = tuple(np.empty(size, kind) for kind in (np.float32, np.float64, np.bool_, np.float32))
        return tuple(array[:size] for array in self._arrays)


def check_number(name: str, value: object) -> float:
    """Return an option's value; raise UsageError if it is not a finite number."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UsageError(f"{name} must be a finite number, not {value!r}.")
    return number


def check_count(name: str, value: object, least: int) -> None:
    """Raise UsageError if an option's value is not a whole number of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UsageError(f"{name} must be a whole number, not {value!r}.")
    if value < least:
        raise UsageError(f"{name} must be {least} or more, not {value}.")


def _check_stop(stop: Sequence[str]) -> None:
    if isinstance(stop, (str, bytes, bytearray)) or not isinstance(stop, Sequence):
        raise UsageError(f"stop must be a list of texts, not {type(stop).__name__}.", hint='For example: stop=["\\n"].')
    if len(stop) > MAX_STOPS:
        raise UsageError(f"stop has {len(stop)} texts, but at most {MAX_STOPS} are allowed.")
    for text in stop:
        reject_unencodable(text, "Each text of stop")
        if not text:
            raise UsageError("stop has an empty text, which would end every answer at once.", hint="Leave it out.")
        if len(text) > MAX_STOP_CHARS:
            raise UsageError(f"A text of stop has {len(text)} characters, but at most {MAX_STOP_CHARS} are allowed.")


def _check_structured(choices: Sequence[str] | None, schema: Mapping[str, Any] | None) -> None:
    if choices is not None and schema is not None:
        raise UsageError("An answer cannot have both choices and a json_schema.", hint="Give one of them.")
    if choices is not None:
        _check_choices(choices)
    if schema is not None:
        _check_schema(schema)


def _check_choices(choices: Sequence[str]) -> None:
    if (
        isinstance(choices, str)
        or not isinstance(choices, Sequence)
        or not choices
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise UsageError("choices must be a list of texts that are not empty.", hint='For example: ["yes", "no"].')
    for choice in choices:
        reject_unencodable(choice, "Each text of choices")


def _check_schema(schema: Mapping[str, Any]) -> None:
    if not isinstance(schema, Mapping):
        raise UsageError(
            f"json_schema must be a JSON object, not {type(schema).__name__}.", hint='For example: {"type": "object"}.'
        )
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"json_schema is not JSON: {error}.") from error
    reject_unencodable(text, "json_schema")

"""What lmms-eval asks for, in the words of `edgeprune.runtime`: generation settings, messages, and the name of a plan.

lmms-eval itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime import AnswerOptions, Turn

MAX_NEW_TOKENS = 1024  # where a task names no limit, as lmms-eval's own clients of servers
_SAMPLING = ("temperature", "top_k", "top_p", "seed")
_ALWAYS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "skip_special_tokens")
# The first is LLaVA's own way to fit an image: here --fit and the bundle say. The others are read by lmms-eval itself.
_NOT_OURS = ("image_aspect_ratio", "max_agentic_steps", "visual_cot")
_ONE = ("num_beams", "n")
_KNOWN = ("max_new_tokens", "until", "do_sample", *_SAMPLING, *_ALWAYS, *_NOT_OURS, *_ONE)


def answer_options(generation: Mapping[str, Any]) -> AnswerOptions:
    """Return a task's `generation_kwargs` as options of an answer. Raises UsageError for those that have no counterpart.

    Answers are greedy, and temperature, top_k and top_p without effect, unless `do_sample` is true, or is left out and the
    temperature is above 0. With `do_sample` alone the temperature is 1, as in transformers.
    """
    given = {name: value for name, value in generation.items() if value is not None}
    for name, value in given.items():
        if name not in _KNOWN or (name in _ONE and value != 1):
            raise UsageError(
                f"EdgePrune has no generation setting {name}={value!r}.",
                hint="Leave it out of the task's generation_kwargs and of --gen_kwargs.",
            )
    sampled = given.get("do_sample", given.get("temperature", 0) > 0)
    taken = (*_ALWAYS, *_SAMPLING) if sampled else _ALWAYS
    options: Any = {"temperature": 1.0 if sampled else 0.0, **{name: given[name] for name in taken if name in given}}
    options |= {"max_tokens": given.get("max_new_tokens", MAX_NEW_TOKENS), "stop": _stops(given.get("until", ()))}
    found: AnswerOptions = options
    return found


def _stops(until: str | Sequence[str]) -> list[str]:
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def turns(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return a document's messages as turns, texts and images in order. Raises UsageError for sound and video."""
    return [Turn(message["role"], [_part(part) for part in _parts(message["content"])]) for message in messages]


def _parts(content: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: Mapping[str, Any]) -> Any:
    if part["type"] == "text":
        return part["text"]
    if part["type"] != "image":
        raise UsageError(f"The question has {part['type']}.", hint="Choose a task about images.")
    return Path(part["url"]) if isinstance(part["url"], str) else part["url"]  # a text among the parts would be read out


def plan_name(plan: KeepPlan) -> str:
    """Return the method, place and budget of every cut, such as "fastv @ layer 2 keep 72/144"; those of caches as one."""
    tokens, names = plan.geometry.tokens, []
    for (_, _), group in groupby(plan.cuts, key=lambda cut: (cut.method, cut.site == "cache" or str(cut))):
        cuts = list(group)
        kept = sorted({cut.keep for cut in cuts})
        budget = f"{kept[0]}/{tokens}" if len(kept) == 1 else f"{kept[0]} to {kept[-1]}/{tokens}"
        place = str(cuts[0]) if len(cuts) == 1 else f"{cuts[0].method} @ cache {cuts[0].layer} to {cuts[-1].layer}"
        names.append(f"{place} keep {budget}")
    return "; ".join(names) or "no pruning"

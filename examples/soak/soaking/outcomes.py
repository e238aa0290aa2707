"""What came of one request, and whether an answer is the right one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from soaking.pool import Entry, Pool, expected

RIGHT, CUT = "right", "cut"  # as expected; cut short by our own wish, and right so far
REFUSED, FULL, LATE, GONE = "refused", "full", "late", "gone"  # as asked for; 429; its deadline passed in line; we went away
LOST, CROSSED, WRONG, HUNG = "lost", "crossed", "wrong", "hung"
FAULTS = (LOST, CROSSED, WRONG, HUNG)


@dataclass
class Outcome:
    """One request's end, exactly one for each.

    `statuses`: of the responses that were seen, more than one where the client tried again. `unseen`: requests that were sent whole
    and whose response was not waited for; `doubtful`: those of which nobody knows whether the server saw them, or how much. `port`
    and `closed`: of a client that went away, its port and when, in seconds of the monotonic clock. `retry_after`: seconds that a
    full server asked for.
    """

    manner: str
    result: str = LOST
    note: str = ""
    statuses: list[int] = field(default_factory=list)
    unseen: int = 0
    doubtful: int = 0
    finish: str | None = None
    reused: list[str] = field(default_factory=list)
    answer_id: str | None = None
    pieces: int = 0
    port: int | None = None
    closed: float | None = None
    retry_after: int = 0
    seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def end(self, result: str, note: str = "") -> Outcome:
        """Set the result and return the outcome."""
        self.result, self.note = result, note
        return self


def judged(outcome: Outcome, pool: Pool, entry: Entry, text: str, account: Mapping[str, Any], deadline: bool) -> Outcome:
    """Set the result of an answer that came to its end."""
    outcome.finish, outcome.reused = account["finish_reason"], account["reused"]
    if deadline and outcome.finish == "deadline":
        # It may fall inside a character of several tokens, whose beginning then comes out as the mark for what is no character.
        return outcome.end(CUT) if begins_right(entry, text.rstrip("\ufffd")) else _other(outcome, pool, entry, text)
    wanted = pool.tiers[0] if pool.tiers and len(entry.answers) > 1 and not deadline else account["tier"]
    said = expected(entry, account)
    if said is None or account["tier"] != wanted:
        return outcome.end(WRONG, f"tier {account['tier']}")
    if (text, outcome.finish) == (said.text, said.finish):
        return outcome.end(RIGHT)
    if outcome.finish in ("cancelled", "error", "running"):
        return outcome.end(LOST, f"ended as {outcome.finish}: {text!r}")
    return _other(outcome, pool, entry, text)


def begins_right(entry: Entry, text: str) -> bool:
    """Tell whether a text is the beginning of an expected answer."""
    return any(said.text.startswith(text) for said in entry.answers.values())


def _other(outcome: Outcome, pool: Pool, entry: Entry, text: str) -> Outcome:
    found = pool.owner(text)
    wanted = sorted({said.text for said in entry.answers.values()})
    note = f"question {pool.entries.index(entry)}, finish {outcome.finish}, reused {outcome.reused}: {text!r} is none of {wanted}"
    return outcome.end(CROSSED if found is not None and found is not entry else WRONG, note)


def refusal(outcome: Outcome, status: int, code: str | None, retry_after: str | None, deadline: bool) -> Outcome:
    """Set the result of a request in good form that got another status than 200."""
    if status == 429:
        outcome.retry_after = int(retry_after) if retry_after and retry_after.isdecimal() else 0
        return outcome.end(FULL) if outcome.retry_after else outcome.end(LOST, "429 without Retry-After")
    if deadline and (status, code) == (503, "deadline_passed"):
        return outcome.end(LATE)
    return outcome.end(LOST, f"status {status}, {code}")

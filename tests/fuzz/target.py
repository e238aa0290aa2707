"""One case of fuzzing: the bytes of an input, what may come of it, and the bounds that hold meanwhile."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from types import FrameType

from edgeprune.errors import EdgePruneError
from fuzz.mutations import bytes_variant

LIMIT_S = 10.0  # of one case
LIMIT_MIB = 768  # by which one case may raise the most memory that the process ever had
LONGEST_MESSAGE = 2000  # characters


class Broken(Exception):
    """A case after which something is not as it must be."""


class Hang(BaseException):
    """A case that took too long. No Exception: what is tested catches those."""


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    `run`: one case; it returns whether the input was taken, after checking what came of it, and raises one of `refusals` where it
    was not. `seeds`: valid inputs. `variant`: makes a nearly valid input of one.
    """

    run: Callable[[bytes], bool]
    seeds: tuple[bytes, ...]
    variant: Callable[[bytes, Random], bytes]
    refusals: tuple[type[Exception], ...] = (EdgePruneError,)

    def near(self, data: bytes, random: Random) -> bytes:
        """Return a variant of an input."""
        try:
            return self.variant(data, random)
        except RecursionError:  # it is nested deeper than we can change it
            return bytes_variant(data, random)


def attempt(target: Target, data: bytes, *, alarm: bool = True) -> bool:
    """Run one case and return whether its input was taken.

    Raises Broken or Hang, or whatever escapes that is no refusal. `alarm`: interrupt what hangs; libFuzzer has an alarm of its own.
    """
    began, peak = time.monotonic(), _peak_mib()
    try:
        with _alarm() if alarm else contextlib.nullcontext():
            taken = target.run(data)
    except target.refusals as error:
        check_message(str(error))
        taken = False
    took, grown = time.monotonic() - began, _peak_mib() - peak
    if took > LIMIT_S:
        raise Hang(f"It took {took:.1f} s, more than {LIMIT_S:g} s.")
    if grown > LIMIT_MIB:
        raise Broken(f"It took {grown} MiB of memory, more than {LIMIT_MIB}.")
    return taken


def check_message(message: str) -> None:
    """Raise Broken unless a message can stand in a terminal and in a log: one line, readable and not long."""
    if len(message) > LONGEST_MESSAGE:
        raise Broken(f"The message has {len(message)} characters: {message[:200]!r}...")
    if not message.strip():
        raise Broken("The message is empty.")
    odd = next((character for character in message if not (character.isprintable())), None)
    if odd is not None:
        raise Broken(f"The message has {odd!r} in it: {message[:200]!r}")


def demand(condition: bool, what: str) -> None:
    """Raise Broken unless something is so."""
    if not condition:
        raise Broken(what)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _ring(number: int, frame: FrameType | None) -> None:
    raise Hang(f"It takes more than {LIMIT_S:g} s.")


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # kibibytes on Linux

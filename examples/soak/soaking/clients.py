"""Processes of clients: each thread makes one request after the other, drawn by lot, until the time is up."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from soaking import manners
from soaking.bad import bad, garbage
from soaking.manners import Asking
from soaking.official import Official
from soaking.outcomes import FULL, HUNG, LOST, Outcome
from soaking.pool import Pool
from soaking.wire import PATIENCE, Place

MOST_PATIENT_S = 5.0
GRACE_S = 2 * PATIENCE  # after the end of time, for requests that were begun


@dataclass(frozen=True)
class Load:
    """What all clients share. `until`: in seconds of the monotonic clock, which all processes of a machine have in common."""

    host: str
    port: int
    keys: tuple[str, ...]
    folder: Path
    seed: int
    threads: int
    until: float

    @property
    def pool(self) -> Path:
        """The file of the questions."""
        return self.folder / "pool.json"

    def outcomes(self, process: int) -> Path:
        """The file of a process's outcomes."""
        return self.folder / f"outcomes-{process}.jsonl"


def _ways(official: Official) -> list[tuple[float, Callable[[Asking], Outcome]]]:
    return [
        (20, manners.whole),
        (20, manners.stream),
        (8, official.whole),
        (8, official.stream),
        (5, official.cancel),
        (13, manners.cancel),
        (8, manners.leave),
        (5, manners.half),
        (3, manners.slow_reader),
        (3, manners.slow_upload),
        (10, bad),
        (1, garbage),
    ]


def started(load: Load, processes: int) -> list[multiprocessing.process.BaseProcess]:
    """Start the clients."""
    context = multiprocessing.get_context("spawn")
    found = [context.Process(target=_run, args=(load, number), daemon=True) for number in range(processes)]
    for process in found:
        process.start()
    return list(found)


def _run(load: Load, process: int) -> None:
    pool, lock = Pool.load(load.pool), threading.Lock()
    with load.outcomes(process).open("w", buffering=1) as file:

        def note(outcome: Outcome) -> None:
            with lock:
                file.write(json.dumps(asdict(outcome)) + "\n")

        threads = []
        for number in range(load.threads):
            place = Place(load.host, load.port, load.keys[(process * load.threads + number) % len(load.keys)])
            lot = random.Random(f"{load.seed} {process} {number}")
            threads.append(threading.Thread(target=_ask_on, args=(load, pool, place, lot, note), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(max(0.0, load.until - time.monotonic()) + GRACE_S)
        for thread in threads:
            if thread.is_alive():
                note(Outcome("a thread of clients").end(HUNG, "still waiting long after the end"))


def _ask_on(load: Load, pool: Pool, place: Place, lot: random.Random, note: Callable[[Outcome], None]) -> None:
    official = Official(place)
    weights, ways = zip(*_ways(official), strict=True)
    while time.monotonic() < load.until:
        (way,) = lot.choices(ways, weights)
        outcome = _once(way, Asking(place, pool, lot.choice(pool.entries), lot, Outcome(way.__name__)), official)
        note(outcome)
        if outcome.result == FULL:
            # One of four waits as long as it was told to; the others press on.
            time.sleep(min(outcome.retry_after, MOST_PATIENT_S) if lot.random() < 0.25 else lot.uniform(0, 0.2))
    official.close()


def _once(way: Callable[[Asking], Outcome], asking: Asking, official: Official) -> Outcome:
    outcome, began = asking.outcome, time.monotonic()
    if getattr(way, "__self__", None) is official:
        outcome.manner = f"openai {way.__name__}"
    try:
        way(asking)
    except TimeoutError:
        outcome.doubtful += not outcome.statuses
        outcome.end(HUNG, f"nothing came for {PATIENCE:g} s")
    except (OSError, http.client.HTTPException) as error:
        outcome.doubtful += not outcome.statuses
        outcome.end(LOST, f"{type(error).__name__}: {error}")
    except Exception as error:  # a client must go on, and what it could not read counts as lost
        outcome.end(LOST, f"{type(error).__name__}: {error!r}")
    outcome.seconds = time.monotonic() - began
    return outcome

"""An honest client beside hostile ones: what its answers take, and what they took at rest.

The hostile ones have two keys. They hold connections with half a request, send images that are bombs, refused ones and the largest
that are taken, and flood the queue with long answers, large grammars and bodies that they do not finish.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import socket
import struct
import threading
import time
import urllib.request
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from soaking.account import percentiles
from soaking.pool import Entry, Pool
from soaking.server import Sampler, labelled, serving
from soaking.wire import CHAT, Line, Place

# One open request of each client, so that one of three workers is left for the third key.
_LIMITS = ("--parallel", "3", "--queue", "8", "--per-client", "1", "--cache-bytes", "0", "--max-connections", "128")
_HALF_OPEN, _FLOODS, _BOMBS, _QUESTIONS = 200, 4, 2, 12
_MOST_HEALTH_S = 5.0
_HOST = "127.0.0.1"


@dataclass
class Times:
    """Seconds of each answer and of each /health of the honest client; `failed`: what it did not get, in words."""

    answers: list[float]
    health: list[float]
    failed: list[str]


def besieged(bundle: Path, pool: Pool, folder: Path, *, minutes: float, threads: int, most: float) -> dict[str, Any]:
    """Run a server of its own, at rest for a quarter of the time and then under attack; return the account.

    `most`: how many times as long as at rest the 99th percentile of the answers may take; `faults` says what was not kept.
    """
    folder.mkdir(exist_ok=True)
    (folder / "keys").write_text("honest\nbombs\nfloods\n")
    (folder / "keys").chmod(0o600)
    told = ("--api-key-file", str(folder / "keys"), "--threads", str(threads), *_LIMITS)
    with serving(bundle, folder, *told) as server:
        port = int(server.url.rpartition(":")[2])
        honest = Place(_HOST, port, "honest")
        _ask(honest, pool, 5, 0.0)  # the first answers are slower
        rest = _ask(honest, pool, 1, 15 * minutes)
        before = server.sample()
        attackers = multiprocessing.get_context("spawn").Process(target=_attack, args=(port, folder / "pool.json"), daemon=True)
        pool.save(folder / "pool.json")
        attackers.start()
        try:
            time.sleep(min(2.0, 15 * minutes))  # until all of them are there
            with Sampler(server, 0.2) as sampler:
                attacked = _ask(honest, pool, 1, 45 * minutes)
            refused = labelled(server.counts("honest"), "edgeprune_rejected_total", "reason")
        finally:
            attackers.kill()
            attackers.join()
    ratio = _p99(attacked.answers) / _p99(rest.answers)
    faults = [*rest.failed, *attacked.failed]
    faults += [f"the 99th percentile of answers is {ratio:.2f} times that at rest"] * (ratio >= most)
    faults += ["the hostile clients were not there"] * (not refused)
    faults += ["/health took seconds"] * (max(attacked.health) > _MOST_HEALTH_S)
    return {
        "minutes": minutes,
        "rest ms": percentiles([1e3 * each for each in rest.answers]),
        "attacked ms": percentiles([1e3 * each for each in attacked.answers]),
        "answers": [len(rest.answers), len(attacked.answers)],
        "ratio": ratio,
        "health ms": percentiles([1e3 * each for each in attacked.health]),
        "rss": [before.rss, max(each.rss for each in sampler.samples)],
        "refused": refused,
        "faults": faults,
    }


def _p99(times: Sequence[float]) -> float:
    found = percentiles(times)
    assert found is not None
    return found["p99"]


def _ask(place: Place, pool: Pool, rounds: int, seconds: float) -> Times:
    # The same few questions at rest and under attack, whole rounds of them.
    entries = [entry for entry in pool.entries if entry.pictured and _plain(entry)][:_QUESTIONS]
    times, end, done = Times([], [], []), time.monotonic() + seconds, 0
    while done < rounds or time.monotonic() < end:
        done += 1
        for entry in entries:
            began = time.monotonic()
            try:
                _answer(place, pool.body(entry))
                times.answers.append(time.monotonic() - began)
                began = time.monotonic()
                with urllib.request.urlopen(f"{place.url}/health", timeout=10 * _MOST_HEALTH_S):
                    times.health.append(time.monotonic() - began)
            except (OSError, ValueError) as error:
                times.failed.append(f"the honest client: {type(error).__name__}: {error}")
    return times


def _plain(entry: Entry) -> bool:
    return not {"guided_choice", "response_format"} & entry.options.keys() and entry.options["max_tokens"] >= 16


def _answer(place: Place, body: dict[str, Any]) -> None:
    line = Line(place)
    try:
        line.ask(body)
        status, said = line.status(), line.json()
        if status != 200:
            raise ValueError(f"{status} {said['error']['message']}")
    finally:
        line.leave()


def _attack(port: int, questions: Path) -> None:
    # Of lowest priority, for the processor is the server's: what is measured is the server, not how fast it can be asked.
    os.nice(19)
    bombing, flooding, pool = Place(_HOST, port, "bombs"), Place(_HOST, port, "floods"), Pool.load(questions)
    bodies = [json.dumps(body).encode() for body in _floods(pool)]
    ways = [lambda: _half_open(port)]
    ways += [lambda: _send(bombing, random.choice(_bombs()))] * _BOMBS
    ways += [lambda: _send(flooding, random.choice(bodies))] * _FLOODS
    threads = [threading.Thread(target=_repeat, args=(way,), daemon=True) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _repeat(way: Callable[[], None]) -> None:
    while True:
        with contextlib.suppress(OSError, ValueError):
            way()
        time.sleep(0.01)


def _half_open(port: int) -> None:
    # Each gets a byte a second; what the server has closed is opened anew.
    lines = list[socket.socket]()
    while True:
        while len(lines) < _HALF_OPEN:
            lines.append(socket.create_connection((_HOST, port), timeout=5))
            lines[-1].sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nX-Slow: ".encode())
        for line in list(lines):
            try:
                line.sendall(b"x")
            except OSError:
                lines.remove(line)
                line.close()
        time.sleep(1)


def _send(place: Place, body: bytes) -> None:
    # Sometimes half of it, sometimes without waiting for the answer.
    line = Line(place)
    try:
        line.send_head(len(body))
        kind = random.random()
        line.send(body if kind < 0.9 else body[: len(body) // 2])
        if kind < 0.6:
            line.status()
            line.json()
        else:
            time.sleep(random.random())
    finally:
        line.leave(reset=True)


def _floods(pool: Pool) -> list[dict[str, Any]]:
    question = {"messages": [{"role": "user", "content": "What is on the table?"}], "max_tokens": 1000}
    crossed = {"allOf": [{"type": "string", "pattern": f"a.*b.*c{number}"} for number in range(40)]}
    asked: list[dict[str, Any]] = [
        {"max_tokens": 1000, "stop": ["\0"]},
        {"guided_choice": [f"choice number {number}" for number in range(5000)]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": crossed}}},
        {"stop": ["x" * 1_000_000]},
        {"messages": [{"role": "user", "content": "word " * 200_000}]},
    ]
    return [*({**question, **each} for each in asked), *(pool.body(entry, max_tokens=1000) for entry in pool.entries[:20])]


@cache
def _bombs() -> tuple[bytes, ...]:
    # 20 megapixels in 80 kB: as many as are allowed, and too many; and a header of a terapixel.
    large = _url(_png(5000, 4000))
    return tuple(_shown([url] * count) for url, count in ((large, 3), (large, 16), (_url(_claimed(10**6, 10**6)), 1), (large, 1)))


def _png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return file.getvalue()


def _claimed(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return _png(8, 8)[:8] + chunk + _png(8, 8)[33:]


def _url(data: bytes) -> str:
    return f"data:image/png;base64,{b64encode(data).decode()}"


def _shown(urls: Sequence[str]) -> bytes:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return json.dumps({"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]}).encode()

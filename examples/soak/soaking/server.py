"""The server's process: started as users start it, looked at every few seconds, asked for its own counts, stopped by a signal."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_S = 300.0
_LINE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Sample:
    """The process at one moment: `seconds` of the monotonic clock, resident bytes, threads, open files."""

    seconds: float
    rss: int
    threads: int
    files: int


@dataclass(frozen=True)
class Process:
    """A running server. `log`: where its own words go."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def sample(self) -> Sample:
        """Look at it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = {name: int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in ("VmRSS", "Threads")}  # type: ignore[index]
        files = len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))
        return Sample(time.monotonic(), 1024 * found["VmRSS"], found["Threads"], files)

    def counts(self, key: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Return the figures of /metrics by name and labels."""
        asked = urllib.request.Request(f"{self.url}/metrics", headers={"authorization": f"Bearer {key}"})
        with urllib.request.urlopen(asked, timeout=30) as response:
            lines = response.read().decode().splitlines()
        matches = [match for line in lines if (match := _LINE.match(line))]
        return {(match[1], tuple(sorted(_LABEL.findall(match[2] or "")))): float(match[3]) for match in matches}

    def stacks(self) -> None:
        """Have it write to its log where every thread stands."""
        self.process.send_signal(signal.SIGUSR1)


@contextmanager
def serving(bundle: Path, folder: Path, *options: str) -> Iterator[Process]:
    """Yield a server that is ready; at the end it is asked to stop, and must do so well."""
    watched, log = Path(__file__).with_name("watched.py"), folder / "server.log"
    command = [sys.executable, str(watched), str(folder / "cancels.jsonl"), "serve", str(bundle), "--port", "0", *options]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder) as process,
    ):
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise SystemExit(f"The server did not start; see {log}.")
            server = Process(process, found[0], log)
            _wait_until_ready(server)
            yield server
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise SystemExit(f"The server ended with {process.returncode}; see {log}.")
        finally:
            process.kill()


def _wait_until_ready(server: Process) -> None:
    end = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.HTTPError, urllib.error.URLError) as error:
            if time.monotonic() > end or server.process.poll() is not None:
                raise SystemExit(f"The server is not ready: {error}; see {server.log}.") from error
            time.sleep(0.1)


class Sampler:
    """Samples of a server, taken by a thread until the block ends."""

    def __init__(self, server: Process, every: float) -> None:
        self.samples: list[Sample] = []
        self._server, self._every, self._end = server, every, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._end.wait(self._every):
            self.samples.append(self._server.sample())

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def labelled(
    counts: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str, by: str, where: Sequence[tuple[str, str]] = ()
) -> dict[str, int]:
    """Return a counter's values by one of its labels, of those that have the labels in `where`."""
    found: dict[str, int] = {}
    for (title, labels), value in counts.items():
        if title == name and set(where) <= set(labels):
            kind = dict(labels)[by]
            found[kind] = found.get(kind, 0) + int(value)
    return found

"""Keep a server at saturation, with clients that behave and clients that do not, and check every answer.

python examples/soak/soak.py soak.bundle --minutes 30 --seed 1
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from soaking import account, bad
from soaking.clients import GRACE_S, Load, started
from soaking.inside import cancelled
from soaking.pool import drawn_pool
from soaking.report import draw, table
from soaking.server import Process, Sampler, serving
from soaking.siege import besieged

PARALLEL, QUEUE, PER_CLIENT, KEYS = 2, 8, 3, 4


def soaked(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the server and its clients, and return the account."""
    pool = drawn_pool(options.bundle, options.seed, scenes=options.scenes, questions=options.questions, threads=options.threads)
    keys = tuple(secrets.token_hex(16) for _ in range(KEYS))
    (folder / "keys").write_text("\n".join(keys))
    limits = ["--max-body-bytes", bad.MAX_BODY, "--max-pixels", bad.MAX_PIXELS, "--max-images", bad.MAX_IMAGES]
    sizes = ["--parallel", PARALLEL, "--queue", QUEUE, "--per-client", PER_CLIENT, "--cache-bytes", options.cache_bytes]
    told = ["--api-key-file", folder / "keys", "--threads", options.threads, *sizes, *limits]
    with serving(options.bundle, folder, *map(str, told)) as server:
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        until = time.monotonic() + 60 * options.minutes
        load = Load(host, int(port), keys, folder, options.seed, options.clients, until)
        pool.save(load.pool)
        before = server.counts(keys[0])
        with Sampler(server, options.every) as sampler:
            hung = _wait_for_clients(load, options.processes, server)
        _wait_until_idle(server)
        after = server.counts(keys[0])
    found = account.outcomes([load.outcomes(number) for number in range(options.processes)])
    tally = account.tallied(found)
    tally["faults"]["hung"] += hung
    siege = None
    if options.siege:
        siege = besieged(
            options.bundle, pool, folder / "siege", minutes=options.siege, threads=options.threads, most=options.slowdown
        )
    inside = cancelled(options.bundle, options.seed, readers=PARALLEL, answers=options.inside, threads=options.threads)
    return {
        "minutes": options.minutes,
        "seed": options.seed,
        "tally": tally,
        "agreement": account.agreement(found, before, after),
        "resources": account.resources(sampler.samples),
        "cancels": account.latencies(account.cancels(found, folder / "cancels.jsonl")),
        "inside": account.latencies_inside(inside),
        "siege": siege,
        "samples": account.drawn(sampler.samples),
    }


def _wait_for_clients(load: Load, count: int, server: Process) -> int:
    # How many processes had to be ended.
    processes = started(load, count)
    for process in processes:
        process.join(max(0.0, load.until - time.monotonic()) + 2 * GRACE_S)
    alive = [process for process in processes if process.is_alive()]
    if alive:
        server.stacks()
    for process in alive:
        process.kill()
    return len(alive)


def _wait_until_idle(server: Process, seconds: float = 60.0) -> None:
    import urllib.request

    end = time.monotonic() + seconds
    while True:
        with urllib.request.urlopen(f"{server.url}/health", timeout=10) as response:
            state = json.load(response)
        if state["running"] == state["queue"] == 0:
            time.sleep(0.2)  # a last response may still be on its way into the counts
            return
        if time.monotonic() > end:
            server.stacks()
            raise SystemExit(f"The clients have gone, and the server still says {state}; see {server.log}.")
        time.sleep(0.1)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=lambda text: Path(text).resolve())
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--siege", type=float, default=5.0, help="Minutes of an honest client beside hostile ones; 0 for none.")
    parser.add_argument("--slowdown", type=float, default=3.0, help="Times that its answers may not take, against those at rest.")
    parser.add_argument("--seed", type=int, default=1, help="Of the questions, and of what the clients do.")
    parser.add_argument("--processes", type=int, default=2, help="Of clients.")
    parser.add_argument("--clients", type=int, default=6, help="Threads of each process; each makes one request after the other.")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=64, help="Pictures, each with a label of its own; at most 96.")
    parser.add_argument("--threads", type=int, default=1, help="Of ONNX Runtime, for the server and for the expected answers.")
    parser.add_argument("--cache-bytes", type=int, default=16 << 20, help="Of the server; small, so that much is forgotten too.")
    parser.add_argument("--every", type=float, default=2.0, help="Seconds between two looks at the process.")
    parser.add_argument("--inside", type=int, default=150, help="Answers of each thread that are cancelled within a process.")
    parser.add_argument("--json", type=Path, help="Write the account here.")
    parser.add_argument("--plot", type=Path, help="Draw memory, threads and open files here.")
    parser.add_argument("--logs", type=Path, help="Folder for all that the clients and the server wrote.")
    return parser.parse_args()


def main() -> None:
    """Parse the command line, soak, tell; the exit status is 1 when anything was lost, crossed, wrong, hung or held up."""
    options = _parsed()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = soaked(options, folder.resolve())
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        draw(report["samples"], options.plot)
    print(table(report))
    print(*report["tally"]["told"], sep="\n", file=sys.stderr)
    faults = sum(report["tally"]["faults"].values()) + report["tally"]["answers twice"] + len(report["agreement"]["differences"])
    if report["siege"]:
        print(*report["siege"]["faults"], sep="\n", file=sys.stderr)
        faults += len(report["siege"]["faults"])
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()

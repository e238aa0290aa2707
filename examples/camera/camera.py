"""Answer about the newest frame of a camera that is faster than the model. The camera is a thread that shows TableTop scenes.

python examples/camera/camera.py tiers.bundle --deadline-ms 1000 --deadline-ms 100
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from pathlib import Path

import numpy as np

import edgeprune.runtime as ep
from edgeprune.errors import EdgePruneError
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.world import sample_scene

SCENES = 20  # drawn before the film begins, and shown again and again


def film(feed: ep.Feed, fps: float, seed: int) -> None:
    """Put a scene into the feed every 1 / fps seconds, until it is closed."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(sample_scene(rng)) for _ in range(SCENES)]
    closed, due = threading.Event(), time.monotonic()
    for scene in itertools.cycle(scenes):
        if not feed.put(scene):
            return
        due += 1 / fps
        closed.wait(max(0.0, due - time.monotonic()))


def watch(model: ep.Runtime, feed: ep.Feed, options: argparse.Namespace) -> None:
    """Print one line for each answer; the deadlines take turns."""
    print("deadline ms  tier       frame age ms  dropped  TTFT ms  tokens  ended by  answer")
    for _, deadline in zip(range(options.answers), itertools.cycle(options.deadline_ms or [None]), strict=False):
        stream = model.ask_latest(feed, options.prompt, timeout=5.0, deadline_ms=deadline)
        text, receipt = "".join(stream), stream.receipt
        age = "" if receipt.frame_age_ms is None else f"{receipt.frame_age_ms:.0f}"  # no token came in time
        print(
            f"{deadline or '-':>11}  {receipt.tier or '-':9}  {age:>12}  {receipt.frames_dropped:7}  {receipt.times.ttft_ms:7.1f}  "
            f"{receipt.generated_tokens:6}  {receipt.finish_reason:8}  {text}",
            flush=True,
        )


def main() -> None:
    """Parse the command line, start the camera, answer until there are enough answers or Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default="Describe the scene.")
    parser.add_argument("--answers", type=int, default=6)
    parser.add_argument("--deadline-ms", type=float, action="append", help="of each answer; repeated, they take turns")
    parser.add_argument("--fps", type=float, default=30.0, help="of the camera")
    parser.add_argument("--seed", type=int, default=0, help="which scenes it shows")
    options = parser.parse_args()
    try:
        model = ep.load(options.bundle, warm_up=True)  # and every tier's pace is known
        with ep.Feed() as feed:
            threading.Thread(target=film, args=(feed, options.fps, options.seed), daemon=True).start()
            watch(model, feed, options)
    except KeyboardInterrupt:
        print("stopped")
    except EdgePruneError as error:
        raise SystemExit(f"Error: {error}") from error
    print(f"{feed.received} frames came, {feed.dropped} were dropped")


if __name__ == "__main__":
    main()

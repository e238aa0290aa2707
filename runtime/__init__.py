"""What runs on the robot: load a bundle, ask it about images. Never imports torch or transformers.

import edgeprune.runtime

model = edgeprune.runtime.load("tabletop.bundle")
answer = model.generate("table.png", "What colour is the cube?")
print(answer.text, answer.receipt.times.ttft_ms)
"""

if __name__ != "edgeprune.runtime":
    raise ImportError("Import edgeprune.runtime: runtime/ is a folder of the package edgeprune, which links to it.")

from edgeprune.runtime.api.loading import load
from edgeprune.runtime.api.session import Answer, Chat, Runtime
from edgeprune.runtime.generation.conversation import Stream, Turn
from edgeprune.runtime.generation.request import Terms
from edgeprune.runtime.generation.sampling import Sampling
from edgeprune.runtime.media.feed import Feed, FeedClosed, FeedError, FeedTimeout, Shot
from edgeprune.runtime.media.frames import NV12
from edgeprune.runtime.telemetry.receipt import CutReceipt, Receipt, Times

__all__ = [
    "NV12",
    "Answer",
    "Chat",
    "CutReceipt",
    "Feed",
    "FeedClosed",
    "FeedError",
    "FeedTimeout",
    "Receipt",
    "Runtime",
    "Sampling",
    "Shot",
    "Stream",
    "Terms",
    "Times",
    "Turn",
    "load",
]

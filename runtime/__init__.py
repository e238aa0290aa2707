"""The runtime: load a bundle and answer prompts about images. Never imports torch or transformers.

import edgeprune.runtime

model = edgeprune.runtime.load("tabletop.bundle")
answer = model.generate("table.png", "What colour is the cube?")
print(answer.text, answer.receipt.times.ttft_ms)
"""

if __name__ != "edgeprune.runtime":
    raise ImportError("Import edgeprune.runtime: runtime/ is a folder of the package edgeprune, which links to it.")

from edgeprune.errors import renamed as _renamed
from edgeprune.runtime.api.loading import load
from edgeprune.runtime.api.options import AnswerOptions
from edgeprune.runtime.api.session import Answer, Chat, Runtime
from edgeprune.runtime.generation.conversation import PreparedImage, Stream, Turn
from edgeprune.runtime.generation.request import RequestLimits
from edgeprune.runtime.generation.sampling import Sampling
from edgeprune.runtime.media.feed import Feed, FeedClosed, FeedError, FeedTimeout, Shot
from edgeprune.runtime.media.frames import NV12
from edgeprune.runtime.telemetry.receipt import CutReceipt, Receipt, Times

__all__ = [
    "NV12",
    "Answer",
    "AnswerOptions",
    "Chat",
    "CutReceipt",
    "Feed",
    "FeedClosed",
    "FeedError",
    "FeedTimeout",
    "PreparedImage",
    "Receipt",
    "RequestLimits",
    "Runtime",
    "Sampling",
    "Shot",
    "Stream",
    "Times",
    "Turn",
    "load",
]

_RENAMED = {"Terms": "RequestLimits"}  # old public names, supported for one release


def __getattr__(name: str) -> object:
    return globals()[_renamed(__name__, name, _RENAMED)]

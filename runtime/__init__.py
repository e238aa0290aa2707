"""What runs on the robot: load a bundle, ask it about images. Never imports torch or transformers.

import edgeprune.runtime

model = edgeprune.runtime.load("tabletop.bundle")
answer = model.generate("table.png", "What colour is the cube?")
print(answer.text, answer.receipt.times.ttft_ms)
"""

from edgeprune.runtime.receipt import CutReceipt, Receipt, Times
from edgeprune.runtime.sampling import Sampling
from edgeprune.runtime.session import Answer, Chat, Runtime, load

__all__ = ["Answer", "Chat", "CutReceipt", "Receipt", "Runtime", "Sampling", "Times", "load"]

"""An image of a conversation, from its pixels to what enters the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeprune.runtime.backends.interface import Seen


@dataclass
class Shown:
    """An image and the words it was shown with, which an input cut may ask for.

    `patches`: computes them [patches, patch pixels]. `key`: a hash of its pixels and of how they are fitted, None where nothing is
    recalled. `seen`: what the vision encoder says of it, once it was asked.
    """

    words: str
    patches: Callable[[], np.ndarray]
    key: bytes | None
    seen: Seen | None = None

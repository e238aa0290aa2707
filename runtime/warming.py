"""A first answer that nobody waits for."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from edgeprune.runtime.conversation import Conversation
from edgeprune.runtime.model import Model, State
from edgeprune.runtime.sampling import Sampling
from edgeprune.runtime.terms import Pace, Terms

_TOKENS = 4
_GREY = (128, 128, 128)


def warm_up(model: Model) -> None:
    """Answer about a grey picture of the bundle's size, twice under every tier: the first time allocates, the second is measured.

    Nobody is told of these answers, and nothing of them is recalled.
    """
    geometry = model.plan.geometry
    grey = Image.new("RGB", (geometry.width, geometry.height), _GREY)
    picture = [grey] * geometry.frames if model.image.kind == "video" else grey
    names: list[str | None] = [name for name, _ in model.tiers] or [None]
    for pace in (Pace(), model.state.pace):
        alone = replace(model, end_tokens=(), state=State(pace=pace))
        for name in names:
            conversation = Conversation(alone, how="stretch")
            for _ in conversation.ask("?", [picture], Sampling(max_tokens=_TOKENS), Terms(tier=name)):
                pass

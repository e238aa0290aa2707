"""What a method learned from a model, as the bytes of a safetensors file beside the plan. Nothing here reads the numbers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from edgeprune.errors import PlanError
from edgeprune.io.files import is_file

MOST_BYTES = 1 << 28  # 256 MB


@dataclass(frozen=True)
class Weights:
    """The weights of a cut's method. `sha256` of their `content`, which is None where a plan came without its file."""

    sha256: str
    content: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, content: bytes) -> Weights:
        """Return weights by the bytes of their file."""
        return cls(hashlib.sha256(content).hexdigest(), content)


def weights_path(plan: Path) -> Path:
    """Return where the weights of the plan at a path lie: plan.weights.safetensors beside plan.json."""
    return plan.with_suffix(".weights.safetensors")


def read_weights(plan: Path, named: Weights) -> Weights:
    """Return the weights that the plan at a path names, with their content.

    Raises PlanError if the file is missing, unreadable, or another than the plan was made with.
    """
    path = weights_path(plan)
    again = "Copy it with the plan, or make both again with `edgeprune calibrate`."
    if not is_file(path):
        raise PlanError(f"The weights of {plan} are missing: there is no {path}.", hint=again)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise PlanError(f"{path} is larger than weights of a method are.", hint=again)
        found = Weights.of(path.read_bytes())
    except OSError as error:
        raise PlanError(f"Cannot read the weights {path}: {error.strerror or error}.", hint=again) from error
    if found != named:
        raise PlanError(f"{path} is not the file that {plan} was made with: its sha256 differs.", hint=again)
    return found

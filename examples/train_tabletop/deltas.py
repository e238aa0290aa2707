"""What TableTop-L has learned, apart from the weights it began with: one safetensors file, under the names of transformers.

A matrix that was trained by LoRA has `NAME.up` [rows, rank] and `NAME.down` [rank, columns] in 8 bits, and a float16 scale for each
of their rows: `NAME.up_scale`, `NAME.down_scale`. Their product is added to the base weight. Every other tensor replaces it. The
file's metadata says which design the deltas are for, so newer ones need no other code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pretrained import Design
from safetensors import safe_open
from safetensors.torch import save_file

_STEPS = 127
CHANGES = (
    "Changed from SmolLM2-135M-Instruct (Apache-2.0) and DINOv2 ViT-S/14 (Apache-2.0): trained by low-rank additions on drawn "
    "TableTop scenes, joined by a projector, with a position table for another image size, and four unused special tokens renamed."
)


@dataclass(frozen=True)
class Pair:
    """A low-rank addition to a weight: `up` [rows, rank] times `down` [rank, columns], float32."""

    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Deltas:
    """Additions and replacements by the name of the weight in transformers' model, and the design that they are for."""

    design: Design
    pairs: Mapping[str, Pair]
    whole: Mapping[str, torch.Tensor]

    def part(self, prefix: str) -> Deltas:
        """Return those of the weights whose names begin so."""
        pairs = {name: pair for name, pair in self.pairs.items() if name.startswith(prefix)}
        return Deltas(self.design, pairs, {name: tensor for name, tensor in self.whole.items() if name.startswith(prefix)})

    def save(self, path: Path) -> None:
        """Write the file: pairs in 8 bits, the rest in bfloat16."""
        tensors = {name: tensor.bfloat16() for name, tensor in self.whole.items()}
        for name, pair in self.pairs.items():
            for part, matrix in (("up", pair.up), ("down", pair.down)):
                scale = (matrix.abs().amax(dim=1, keepdim=True) / _STEPS).clamp(min=1e-7).half()
                tensors[f"{name}.{part}"] = (matrix / scale.float()).round().clamp(-_STEPS, _STEPS).to(torch.int8)
                tensors[f"{name}.{part}_scale"] = scale
        about = {"format": "1", "design": json.dumps(asdict(self.design)), "changes": CHANGES, "licence": "Apache-2.0"}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=about)

    @torch.no_grad()
    def apply(self, model: torch.nn.Module) -> None:
        """Change a base model's weights in place. Raises ValueError for a weight that it lacks or has in another shape."""
        weights = dict(model.named_parameters()) | dict(model.named_buffers())
        changes = [(name, pair.up @ pair.down, True) for name, pair in self.pairs.items()]
        changes += [(name, tensor, False) for name, tensor in self.whole.items()]
        for name, change, adds in changes:
            weight = weights.get(name)
            if weight is None or weight.shape != change.shape:
                raise ValueError(f"The deltas change {name} {list(change.shape)}, and the model has no such weight.")
            weight.copy_(weight + change if adds else change)


def load_deltas(path: Path) -> Deltas:
    """Read a file of deltas. Raises ValueError for one of another format."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        if about.get("format") != "1":
            raise ValueError(f"{path} holds no deltas of format 1.")
        tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping

    def matrix(name: str) -> torch.Tensor:
        steps, scale = tensors.pop(name), tensors.pop(f"{name}_scale")
        return torch.mul(steps.float(), scale.float())

    names = sorted(name.removesuffix(".up") for name in tensors if name.endswith(".up"))
    pairs = {name: Pair(matrix(f"{name}.up"), matrix(f"{name}.down")) for name in names}
    design = Design(**json.loads(about["design"]))
    return Deltas(design, pairs, {name: tensor.float() for name, tensor in tensors.items()})

"""What the tests of image processors share: noise, the processors of transformers, and patches cut in another way than ours."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from edgeprune.processors import ImageSpec, image_spec

SIZES = [(1, 1), (1, 150), (37, 53), (3, 3), (56, 56), (192, 192), (641, 479), (28, 1000), (1000, 28), (13, 2600), (480, 640)]


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert("RGB" if mode == "P" else "RGBA").convert(mode)


def pair(kind: str, added: dict[str, Any], **settings: Any) -> tuple[ImageSpec, Any]:
    """Return our spec and transformers' processor of the same configuration, through its JSON; `added`: what a family adds."""
    processor = getattr(transformers, f"{kind}Pil")(**settings)
    return image_spec(json.loads(processor.to_json_string()) | added), processor


def cut(views: Any, patch: int) -> np.ndarray:
    """Return the patches of views [views, 3, height, width], as PyTorch unfolds them."""
    pixels = torch.from_numpy(np.asarray(views, np.float32))
    columns = torch.nn.functional.unfold(pixels, patch, stride=patch)  # [views, 3 * patch * patch, patches]
    patches: np.ndarray = columns.transpose(1, 2).flatten(0, 1).numpy()
    return patches


def assert_patches(spec: ImageSpec, images: list[Image.Image], views: Any, patch: int) -> None:
    """Fail unless the patches are, bit for bit, those of the processor's views."""
    patches = spec.patches(images)
    assert patches.dtype == np.float32
    assert patches.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(patches, cut(views, patch))


def source_function(path: str, name: str, **names: Any) -> Any:
    """Return a function of a module of transformers that only imports with torchvision, run without the rest of it."""
    file = Path(transformers.__file__).parent / path
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    (found,) = (node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)
    names |= {"torch": torch}
    exec(compile(ast.Module([found], []), str(file), "exec"), names)  # the oracle itself, not a copy of it
    return names[name]

"""Measure where a model looks: of each decoder layer, how the attention of a question's last token is shared out.

    python examples/train_tabletop/attention.py tabletop-l --scenes 10

Shares are means over heads and over the short questions about scenes of a seed: of the first token (the attention sink), of the
visual tokens, of the rest; and how many visual tokens get half of what all of them get.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.checkpoint.processor import processor_inputs
from edgeprune.tabletop.dataset import scenes
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.questions import DESCRIBE


@torch.no_grad()
def shares(loaded: LoadedModel, count: int, seed: int) -> np.ndarray:
    """Return [layers, 4]: the shares of the first token, the visual tokens and the rest, and how many get half."""
    image = loaded.family.image_text(loaded.geometry(None)).token
    found = []
    for scene, questions in scenes(seed, count):
        for question in (each for each in questions if each.kind != DESCRIBE):
            content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
            inputs = processor_inputs(loaded.processor, [{"role": "user", "content": content}], [draw_scene(scene)])
            visual = inputs["input_ids"][0] == image
            layers = loaded.model(**inputs, output_attentions=True).attentions
            rows = torch.stack([layer[0, :, -1].float().mean(dim=0) for layer in layers])  # [layers, tokens]
            seen = rows[:, visual].sort(dim=1, descending=True).values
            half = (seen.cumsum(dim=1) < seen.sum(dim=1, keepdim=True) / 2).sum(dim=1) + 1
            looked = seen.sum(dim=1)
            found.append(torch.stack([rows[:, 0], looked, 1 - rows[:, 0] - looked, half.float()], dim=1).numpy())
    mean: np.ndarray = np.mean(found, axis=0)
    return mean


def main() -> None:
    """Parse the command line and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a transformers folder, tabletop or tabletop-l")
    parser.add_argument("--scenes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=77)
    options = parser.parse_args()
    loaded = load_model(resolve_model(options.model))
    loaded.model.float().set_attn_implementation("eager")
    table = Table("layer", "first token", "visual tokens", "the rest", "visual tokens with half of their share")
    for layer, (first, visual, rest, half) in enumerate(shares(loaded, options.scenes, options.seed)):
        table.add_row(str(layer), f"{first:.1%}", f"{visual:.1%}", f"{rest:.1%}", f"{half:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()

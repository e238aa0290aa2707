"""TableTop-L in training: low-rank additions to every linear layer of a pretrained tower and decoder, and a projector between."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import ATTRIBUTES, GRID, Batch, Layout
from deltas import Deltas, Pair
from forward import Trainee, mask_of
from PIL import Image
from pretrained import Design, tokens_at
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import cross_entropy, linear
from transformers import InternVLForConditionalGeneration

from edgeprune.tabletop.world import CELL, COLOURS, DIGITS, LETTERS, RIM, SHAPES, SIDE, SIZES

DESIGN = Design(side=336, merge=2)
SMALLER = Design(side=168, merge=1)  # as many tokens of a quarter of the patches: what was trained first
_RANKS = {"vision_tower": 64, "language_model": 16}
_SHARES = {"vision_tower": 0.4, "language_model": 0.7}  # of the learning rate; the projector and the heads have all of it
_MEAN, _STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)  # of the image processor
_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_POSITIONS = f"{_TOWER}embeddings.position_embeddings"


class LowRank(nn.Module):
    """A frozen linear layer and a trained addition to its weight."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with the addition."""
        output: torch.Tensor = self.layer(rows) + linear(linear(rows, self.down), self.up)
        return output


def normalised(image: Image.Image, side: int = DESIGN.side) -> np.ndarray:
    """Return pixels [3, side, side] as the image processor makes them."""
    resized = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = (np.asarray(resized, np.float32) / 255 - _MEAN) / _STD
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


class LargeTrainee(Trainee):
    """The model of `pretrained.py` with additions; what is trained is what `deltas.py` writes."""

    layout = Layout(
        before="<|im_start|>user\n<img>",
        between="</img>\n<img>",
        after="</img>\n",
        question="{}<|im_end|>\n<|im_start|>assistant\n",
        image="<IMG_CONTEXT>",
        head=4,
        gap=3,
        text=274,
        grid=False,
        pixels=normalised,
    )
    ordered, compared = 4, 12
    weights = {"two: changed": 3.0, "count": 2.0}  # noqa: RUF012 - a constant

    def __init__(
        self,
        model: InternVLForConditionalGeneration,
        tokenizer: Tokenizer,
        start: Deltas | None = None,
        words: float = 2.0,
        design: Design = DESIGN,
        tower: Deltas | None = None,
    ) -> None:
        super().__init__(model)
        self.words, self.design = words, design  # words: weight of the distance to the words' embeddings
        self.layout = replace(self.layout, pixels=partial(normalised, side=design.side))
        embeddings = model.model.language_model.embed_tokens.weight.detach()
        self.spread = float(embeddings.pow(2).mean().sqrt())  # of one number of an embedding
        table, present = _word_table(tokenizer, embeddings)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("present", present, persistent=False)
        model.requires_grad_(False)
        for part, rank in _RANKS.items():
            for parent, name in list(_linear_layers(getattr(model.model, part))):
                setattr(parent, name, LowRank(getattr(parent, name), rank))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_replaced(name) or name.endswith((".up", ".down")))
        if start is not None:
            self._adopt(start)
        if tower is not None:
            self._adopt(tower.part(_TOWER))
            model.model.vision_tower.requires_grad_(False)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return visual tokens [B, I, TOKENS, hidden] of pixels [B, I, 3, side, side]."""
        inner = self.model.model
        with self._precision(pixels):
            patches = inner.vision_tower(pixel_values=pixels.flatten(0, 1)).last_hidden_state[:, 1:]
            edge = math.isqrt(patches.shape[1])
            merged = inner.pixel_shuffle(patches.unflatten(1, (edge, edge)), self.model.config.downsample_ratio)
            tokens: torch.Tensor = inner.multi_modal_projector(merged.flatten(1, 2))
        return tokens.float().view(*pixels.shape[:2], *tokens.shape[1:])

    def read(self, batch: Batch, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return hidden states and logits, as in Trainee."""
        with self._precision(visual):
            output = self.model.model.language_model(
                inputs_embeds=self.embedded(batch, visual),
                attention_mask=mask_of(batch.segments),
                position_ids=batch.positions[0],
                use_cache=False,
                output_hidden_states=True,
            )
        return output.last_hidden_state.float(), *self.between_images(output.hidden_states)

    def attribute_loss(self, visual: torch.Tensor, labels: torch.Tensor, *, alone: bool) -> torch.Tensor:
        """Return the loss of the attributes, of covered tokens half again and of labels once more.

        Alone, visual tokens also learn to lie where the decoder has the words for what they show, unless `words` is 0.
        """
        logits = self.attributes(visual / self.spread)
        covered, lettered = labels[..., 1] > 0, labels[..., 3] > 0
        losses = [cross_entropy(each.flatten(0, 2), labels[..., index].flatten()) for index, each in enumerate(logits)]
        losses += [0.5 * cross_entropy(each[covered], labels[..., index][covered]) for index, each in enumerate(logits)]
        losses += [cross_entropy(logits[index][lettered], labels[..., index][lettered]) for index in (3, 4)]
        if alone and self.words:
            losses.append(self.words * (visual - self._words(labels)).pow(2).mean() / self.spread**2)
        return torch.stack(losses).sum()

    def optimizers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """Return one AdamW, whose parts learn at their own rates."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                share = next((share for part, share in _SHARES.items() if f".{part}." in name), 1.0)
                groups.setdefault(share, []).append(parameter)
        listed: list[dict[str, Any]] = [{"params": each, "share": share} for share, each in groups.items()]
        return [torch.optim.AdamW(listed, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)]

    def learned(self) -> dict[str, torch.Tensor]:
        """Return what is trained."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def deltas(self) -> Deltas:
        """Return what has been learned, by the names of the untouched model."""
        pairs, whole = {}, {}
        for name, module in self.model.named_modules():
            if isinstance(module, LowRank):
                pairs[f"{name}.weight"] = Pair(module.up.detach().cpu(), module.down.detach().cpu())
        for name, parameter in self.model.named_parameters():
            if _replaced(name):
                whole[name.replace(".layer.bias", ".bias")] = parameter.detach().cpu()
        return Deltas(self.design, pairs, whole)

    def save(self, folder: Path) -> None:
        """Write the deltas."""
        self.deltas().save(folder / "deltas.safetensors")

    @torch.no_grad()
    def _adopt(self, start: Deltas) -> None:
        # Also deltas of another design: positions are interpolated, and the projector takes the mean of the patches of a token.
        for name, pair in start.pairs.items():
            module = self.model.get_submodule(name.removesuffix(".weight"))
            module.up.copy_(pair.up)
            module.down.copy_(pair.down)
        weights = dict(self.model.named_parameters())
        for name, tensor in start.whole.items():
            weight = weights.get(name, weights.get(name.replace(".bias", ".layer.bias")))
            assert weight is not None
            if name == _POSITIONS:
                tensor = tokens_at(tensor, self.design.side)
            copies = weight.shape[-1] // tensor.shape[-1]
            tensor = tensor.repeat(*[1] * (tensor.ndim - 1), copies)
            weight.copy_(tensor / copies if name.endswith("linear_1.weight") else tensor)

    def _precision(self, tensor: torch.Tensor) -> torch.autocast:
        return torch.autocast(tensor.device.type, dtype=torch.bfloat16, enabled=tensor.is_cuda)

    def _words(self, labels: torch.Tensor) -> torch.Tensor:
        # [B, I, TOKENS, hidden]: the sum of the embeddings of the words for what a token shows, about as long as one of them.
        table, present = self.get_buffer("table"), self.get_buffer("present")
        total = sum(table[index][labels[..., index]] for index in range(len(ATTRIBUTES)))
        count = sum(present[index][labels[..., index]] for index in range(len(ATTRIBUTES)))
        assert isinstance(total, torch.Tensor) and isinstance(count, torch.Tensor)
        return total / count.clamp(min=1).sqrt()[..., None]


def _replaced(name: str) -> bool:
    # Whether the deltas hold this weight as it is: all that is small in the tower, and the projector's.
    return name.startswith((_TOWER, _PROJECTOR)) and not name.endswith((".layer.weight", ".up", ".down"))


def _linear_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name


def _word_table(tokenizer: Tokenizer, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # By attribute and class the embedding of its word [attributes, classes, hidden], and 1 where there is one.
    rows, columns = ([_third(place, names) for place in range(GRID)] for names in ((" top", " bottom"), (" left", " right")))
    words: dict[str, list[str]] = {
        "colour": ["", *(f" {word}" for word in COLOURS)],
        "shape": [" table", *(f" {word}" for word in SHAPES), " label"],
        "size": ["", *(f" {word}" for word in SIZES)],
        "letter": ["", *LETTERS],
        "digit": ["", *DIGITS],
        "nearest": ["", "", " nearest"],
        "row": rows,
        "column": columns,
    }
    table = torch.zeros(len(ATTRIBUTES), max(ATTRIBUTES.values()), embeddings.shape[1])
    present = torch.zeros(table.shape[:2])
    for index, attribute in enumerate(ATTRIBUTES):
        for position, word in enumerate(words[attribute]):
            if word:
                (token,) = tokenizer.encode(word).ids
                table[index, position], present[index, position] = embeddings[token], 1.0
    return table, present


def _third(place: int, names: tuple[str, str]) -> str:
    # The word for the cell of the scene's grid that a row or column of tokens lies in; the middle has none.
    cell = int(np.clip(((place + 0.5) * SIDE / GRID - RIM) // CELL, 0, 2))
    return (names[0], "", names[1])[cell]

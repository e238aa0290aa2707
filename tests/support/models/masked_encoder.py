"""transformers' own vision encoders, with visual tokens hidden from a block on: the rest becomes what it does without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.plan import Geometry

FIRST = {"internvl": 1, "llava": 1, "vipllava": 1}  # class tokens of a view


class MaskedEncoder:
    """Runs the encoder of a model on pixels in transformers' form, and notes what every token receives."""

    def __init__(self, loaded: LoadedModel, geometry: Geometry) -> None:
        self.loaded, self.geometry = loaded, geometry
        self.first = FIRST.get(loaded.folder.model_type, 0)
        self.token = self._tokens()  # of each row of the encoder; -1 for none
        self._blocks: dict[int, int] = {}
        self._rows: dict[int, int] = {}
        self._hidden: Mapping[int, np.ndarray] = {}
        self.received: list[np.ndarray] = []

    @torch.no_grad()
    def run(self, given: Mapping[str, Any], kept: Mapping[int, np.ndarray] | None = None) -> torch.Tensor:
        """Return the visual tokens [V, width], those that `kept` leaves out hidden from its blocks on.

        `received` is then, for each block, what each token received [V].
        """
        self._blocks, self._rows, self.received = {}, {}, []
        tokens = range(self.geometry.tokens)
        self._hidden = {block: np.setdiff1d(tokens, left) for block, left in (kept or {}).items()}
        model, name = self.loaded.model.model, self.loaded.folder.model_type
        with self._attending():
            if name.startswith("qwen"):
                grid = next(given[key] for key in ("image_grid_thw", "video_grid_thw") if key in given)
                pixels = next(given[key] for key in ("pixel_values", "pixel_values_videos") if key in given)
                seen = model.visual(pixels, grid)
                return torch.cat([seen.pooler_output, *getattr(seen, "deepstack_features", ())], dim=1)
            features = model.get_image_features(**given).pooler_output
        return torch.cat(list(features)) if isinstance(features, (list, tuple)) else features.reshape(-1, features.shape[-1])

    @contextmanager
    def _attending(self) -> Iterator[None]:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = self._attend
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        block = self._blocks.setdefault(id(module), len(self._blocks))
        begin = self._rows.get(block, 0)
        self._rows[block] = begin + key.shape[0] * key.shape[2]
        tokens = self.token[begin : self._rows[block]]
        gone = [left for first, left in self._hidden.items() if first <= block]
        hidden = torch.from_numpy(np.isin(tokens, np.concatenate(gone)) if gone else np.zeros(len(tokens), bool))
        scores = (query @ key.transpose(2, 3)) * scaling
        scores = scores.masked_fill(hidden.view(key.shape[0], 1, 1, -1), float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        self._note(block, weights, tokens, hidden)
        return (weights @ value).transpose(1, 2).contiguous(), None

    def _note(self, block: int, weights: torch.Tensor, tokens: np.ndarray, hidden: torch.Tensor) -> None:
        if len(self.received) <= block:
            self.received.append(np.zeros(self.geometry.tokens))
        asking = weights[:, :, :1] if self.first else weights * ~hidden.view(weights.shape[0], 1, -1, 1)
        sums = asking.sum(dim=2).mean(dim=1).flatten().double().numpy()
        there = tokens >= 0
        np.add.at(self.received[block], tokens[there], sums[there])

    def _tokens(self) -> np.ndarray:
        geometry, views = self.geometry, len(self.geometry.layout)
        if self.loaded.folder.model_type.startswith("qwen"):
            order = np.arange(geometry.tokens)
            if self.loaded.folder.model_type == "qwen2_5_vl":
                vision = self.loaded.model.config.vision_config
                grid = torch.tensor([[views, geometry.rows * 2, geometry.columns * 2]])
                order = get_vision_window_index(grid, 2, vision.window_size, vision.patch_size)[0].numpy()
            return order.repeat(geometry.merge**2)
        view, starts = geometry.layout[0], np.cumsum([0, *(view.tokens for view in geometry.layout)])
        raster = np.arange(view.tokens).reshape(view.rows, view.columns).repeat(geometry.merge, 0).repeat(geometry.merge, 1)
        nowhere = np.full(self.first, -1)
        return np.concatenate([part for start in starts[:-1] for part in (nowhere, start + raster.ravel())])


def inputs_of(loaded: LoadedModel, picture: Image.Image) -> dict[str, Any]:
    """Return a picture as transformers' processor makes it."""
    made: dict[str, Any] = import_module(f"tiny_{loaded.folder.model_type}").inputs(loaded.folder.path, [picture])
    return made

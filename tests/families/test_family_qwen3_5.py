"""Qwen3.5 against transformers: the gated delta rule in chunks, its states, and attention with a gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_qwen3_5
import torch
from transformers import Qwen3_5Config
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import UnsupportedModelError
from edgeprune.families import recurrent
from edgeprune.families.qwen3_5 import GatedDeltaNet, Qwen35
from edgeprune.families.recurrent import CHUNK, gated_delta_rule
from edgeprune.plan import Geometry


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(resolve_model(str(tiny_qwen3_5.folder(tmp_path_factory.mktemp("qwen3_5")))))


def tokens(length: int, *, alike: bool = False) -> tuple[torch.Tensor, ...]:
    """Return query, key, value, decay, beta and state of 3 heads; keys that are `alike` make the triangular system ill."""
    torch.manual_seed(length)
    keys = torch.randn(1, 3, 8) + 0.05 * torch.randn(length, 3, 8) if alike else torch.randn(length, 3, 8)
    query, key = (torch.nn.functional.normalize(rows, dim=-1) for rows in (torch.randn(length, 3, 8), keys))
    decay, beta = -0.01 * torch.rand(length, 3), 1 - 0.1 * torch.rand(length, 3)
    return query * 8**-0.5, key, torch.randn(length, 3, 12), decay, beta, torch.randn(3, 8, 12)


def by_transformers(query: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    key, value, decay, beta, state = (rows[None] for rows in others)
    output, after = torch_recurrent_gated_delta_rule(
        query[None] * 8**0.5, key, value, g=decay, beta=beta, initial_state=state, output_final_state=True
    )
    return output[0], after[0]


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3, 700])
def test_chunks_equal_the_recurrence(length: int, alike: bool) -> None:
    given = tokens(length, alike=alike)
    for ours, theirs in zip(gated_delta_rule(*given), by_transformers(*given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-4)


def test_a_wrong_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = recurrent.block_masks()
    monkeypatch.setattr(recurrent, "block_masks", lambda: [*masks[:-1], torch.zeros_like(masks[-1])])
    given = tokens(40)
    assert (gated_delta_rule(*given)[0] - by_transformers(*given)[0]).abs().max() > 1e-2


def test_a_net_in_parts_is_one(loaded: LoadedModel) -> None:
    net = loaded.model.model.language_model.layers[0].linear_attn
    ours, hidden = GatedDeltaNet(net), torch.randn(1, 40, 48)
    states = [torch.zeros(shape) for shape in loaded.family.decoder().states[0]]
    with torch.no_grad():
        expected = net(hidden)[0]
        parts = []
        for rows in torch.split(hidden[0], [1, 1, 30, 8]):
            mixed, *states = ours(rows, *states)
            parts.append(mixed)
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(96, 160), (64, 64)])
def test_visual_tokens_equal_transformers(loaded: LoadedModel, size: tuple[int, int]) -> None:
    # One view of 16-pixel patches, each twice in time: the grid alone decides.
    rows, columns = size[0] // 16, size[1] // 16
    patches = torch.from_numpy(np.random.default_rng(0).normal(size=(rows * columns, 3 * 2 * 16 * 16)).astype(np.float32))
    tower = loaded.family.vision(Geometry(*size, 16, 2), signals=True).eval()
    with torch.no_grad():
        visual, received, _ = tower(patches)
        theirs = loaded.model.model.visual(patches, torch.tensor([[1, rows, columns]])).pooler_output
    torch.testing.assert_close(visual[0], theirs, atol=1e-5, rtol=1e-4)
    assert received.shape == (rows * columns // 4,)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layer_types": ["linear_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"layer_types": ["linear_attention"] * 2}, "no layer with attention"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "depend on the length"),
    ],
)
def test_other_configurations_are_refused(loaded: LoadedModel, changed: dict[str, Any], words: str) -> None:
    config = Qwen3_5Config()
    for name, value in changed.items():
        object.__setattr__(config.text_config, name, value)
    with pytest.raises(UnsupportedModelError, match=words):
        Qwen35.check(config)

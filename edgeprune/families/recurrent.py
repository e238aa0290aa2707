"""What layers with states instead of attention compute: a causal convolution over few tokens, and the gated delta rule.

Gated DeltaNet: Yang et al., arXiv 2412.06464. A matrix per head maps keys to values. Every token first fades it by its decay, and
then changes what it holds for the token's key, by the share beta, to the token's value. Transformers' modules are in
models/qwen3_next/modeling_qwen3_next.py.

Tokens are taken in chunks of CHUNK (section 3.3 of the paper; Yang et al., arXiv 2406.06484, for the form with an inverse).
Within a chunk everything is a product of matrices, for all chunks at once; only the states go from chunk to chunk. The inverse of
the triangular matrix is exact: that of a block of twice the size follows from those of its halves. A trace has one node for the
rule, which `export/passes/recurrence.py` writes out, because the number of chunks depends on the length.
"""

from __future__ import annotations

import torch
from torch import nn

CHUNK = 16
DOMAIN, OPERATOR = "edgeprune", "GatedDeltaRule"


def shifted_sum(rows: torch.Tensor, convolution: nn.Conv1d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a causal depthwise convolution [S, width] of rows [kernel - 1 + S, width], and its last kernel - 1 rows.

    A sum of shifted rows has no operator whose weights a lowering would have to treat.
    """
    kernel = convolution.weight.shape[2]
    length = rows.shape[0] - (kernel - 1)
    mixed = rows[:length] * convolution.weight[:, 0, 0]
    for tap in range(1, kernel):
        mixed = mixed + rows[tap : tap + length] * convolution.weight[:, 0, tap]
    return mixed if convolution.bias is None else mixed + convolution.bias, rows[length:]


def gated_delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [S, heads, value dim] and the new state of tokens after a `state` [heads, key dim, value dim].

    `query` and `key` [S, heads, key dim] have unit length, the query divided by the root of its size; `value` [S, heads, value
    dim]; `decay` [S, heads] is the logarithm of what stays of the state; `beta` [S, heads].
    """
    packed = torch.cat([query, key, value, decay[..., None], beta[..., None]], dim=2)
    if not torch.compiler.is_exporting():
        return _in_chunks(packed, state)
    shapes, types = (value.shape, state.shape), (value.dtype, state.dtype)
    output, after = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{OPERATOR}", (packed, state), dtypes=types, shapes=shapes, version=1
    )
    return output, after


def block_masks() -> list[torch.Tensor]:
    """Return masks [CHUNK, CHUNK] of what joins two blocks to one of twice the size, for blocks of 1, 2, 4 ... tokens."""
    token = torch.arange(CHUNK)
    sizes = [2**level for level in range(CHUNK.bit_length() - 1)]
    return [
        ((token[:, None] // (2 * size) == token // (2 * size)) & (token[:, None] // size > token // size)).float() for size in sizes
    ]


def _in_chunks(packed: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length, (keys, values) = packed.shape[0], state.shape[1:]
    # Tokens of zeros change no state.
    padded = nn.functional.pad(packed, (0, 0, 0, 0, 0, -length % CHUNK))
    chunks = padded.view(-1, CHUNK, *packed.shape[1:]).transpose(1, 2)  # [chunks, heads, CHUNK, width]
    query, key, value, decay, beta = torch.split(chunks, [keys, keys, values, 1, 1], dim=3)
    lower = torch.ones(CHUNK, CHUNK, device=packed.device).tril()
    faded = lower @ decay  # the logarithm of what stays since the start of the chunk
    between = torch.where(lower > 0, faded - faded.transpose(2, 3), float("-inf")).exp()
    changes = (beta * key) @ key.transpose(2, 3) * between
    inverse = torch.eye(CHUNK, device=packed.device).expand_as(changes)
    for mask in block_masks():
        inverse = inverse - inverse @ (changes * mask.to(packed.device)) @ inverse
    new_values, read_keys = inverse @ (beta * value), inverse @ (beta * key * faded.exp())
    within, last = query @ key.transpose(2, 3) * between, faded[:, :, -1:]
    query, key, fade = query * faded.exp(), (key * (last - faded).exp()).transpose(2, 3), last.exp()
    outputs = []
    for chunk in range(chunks.shape[0]):
        written = new_values[chunk] - read_keys[chunk] @ state
        outputs.append(query[chunk] @ state + within[chunk] @ written)
        state = state * fade[chunk] + key[chunk] @ written
    return torch.stack(outputs).transpose(1, 2).flatten(0, 1)[:length], state

"""Token embeddings as wide as the visual tokens are: with planes (DeepStack), to which text adds nothing."""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.families.base import DecoderParts


class TextEmbedding(nn.Module):
    """From ids [1, n] to embeddings [1, n, (1 + planes) * hidden]."""

    def __init__(self, parts: DecoderParts) -> None:
        super().__init__()
        self.table = parts.embed_tokens
        self.added = parts.planes * parts.hidden

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, zero in their planes."""
        embeds: torch.Tensor = self.table(ids)
        return nn.functional.pad(embeds, (0, self.added)) if self.added else embeds

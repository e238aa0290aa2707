"""The pruning-aware decoder, run eagerly or traced by export: a family's layers with our attention and cuts. Imports no runtime."""

from edgeprune.model.cache import LayerCache
from edgeprune.model.decoder import PrunedDecoder, Segment, StepOutput
from edgeprune.model.inputs import InputSelector, TextEmbedding, input_selector, signals_for

__all__ = [
    "InputSelector",
    "LayerCache",
    "PrunedDecoder",
    "Segment",
    "StepOutput",
    "TextEmbedding",
    "input_selector",
    "signals_for",
]

"""The pruning-aware model: the family's own layers, our attention forward, the cuts of one plan. Eager and traced alike."""

from edgeprune.model.cache import LayerCache
from edgeprune.model.decoder import PrunedDecoder, Segment, StepOutput
from edgeprune.model.inputs import InputSelector, TextEmbedding, input_selector

__all__ = ["InputSelector", "LayerCache", "PrunedDecoder", "Segment", "StepOutput", "TextEmbedding", "input_selector"]

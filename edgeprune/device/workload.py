"""The workload of one question about one image: sizes, token counts and precision, and how to read them from a bundle.

`edgeprune.export.sizes` reads the same sizes from a model that is not exported yet.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from edgeprune.bundle import DECODER, SELECTOR, VISION, Bundle, DecoderShape
from edgeprune.device.onnx_file import read_graph
from edgeprune.errors import UsageError
from edgeprune.plan import Geometry, KeepPlan

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Precision:
    """Bytes per weight, scales included, in each part of a model; `number`: bytes per element of activations and KV cache.

    Matrix products of the decoder layers run in `arithmetic`, everything else at the width of `number`.
    """

    name: str
    layers: float
    head: float
    vision: float
    embedding: float
    number: int
    arithmetic: str

    @property
    def elsewhere(self) -> str:
        """Arithmetic of the vision encoder and the selector."""
        return "fp16" if self.number == 2 else "fp32"

    @property
    def unpacked(self) -> bool:
        """Whether integer weights are unpacked to FP16 for products."""
        return self.arithmetic == "fp16" and self.layers < 2.0


# As Lowering.weights_of for TensorRT: only weights are integers; an INT4 block of 128 inputs has one FP16 scale.
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", 4.0, 4.0, 4.0, 4.0, 4, "fp32"),
        Precision("fp16", 2.0, 2.0, 2.0, 2.0, 2, "fp16"),
        Precision("int8", 1.0, 1.0, 1.0, 2.0, 2, "fp16"),
        Precision("int4", 0.5 + 2 / 128, 1.0, 1.0, 2.0, 2, "fp16"),
    )
}


@dataclass(frozen=True)
class VisionWorkload:
    """The vision encoder: `layers` blocks of width `hidden` and MLP width `mlp` over `patches`, giving `tokens` visual tokens.

    `parameters` are multiplied once per patch, `merger` (the projector into the decoder) once per visual token. `left`: patches of
    each block if vision cuts drop some; () without vision cuts. `views`: tiles or frames of equal size, each of which attends to
    itself alone.
    """

    layers: int
    hidden: int
    mlp: int
    patches: int
    tokens: int
    parameters: int
    merger: int
    left: tuple[int, ...] = ()
    views: int = 1

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of patches in each block."""
        return self.left or (self.patches,) * self.layers


@dataclass(frozen=True)
class Decoder:
    """The language model; `parameters` counts the matrices of all layers, without embedding and output head.

    `without_cache`: the layers that have states of fixed size instead.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    parameters: int
    without_cache: tuple[int, ...] = ()

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden

    @property
    def attention_width(self) -> int:
        """Elements of a token's queries in one layer."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys and values in the KV cache of one layer."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Workload:
    """One question about one image: `alive` and `stored` are the visual tokens of each layer in prefill and in the KV cache.

    `selector`: nodes of the input cut's graph, 0 without one; `generated`: tokens of the answer.
    """

    tower: VisionWorkload
    decoder: Decoder
    precision: Precision
    alive: tuple[int, ...]
    stored: tuple[int, ...]
    text_tokens: int
    generated: int
    selector: int = 0

    def __post_init__(self) -> None:
        if self.text_tokens < 1 or self.generated < 1:
            raise UsageError("A question and its answer have at least one token each.")
        if not len(self.alive) == len(self.stored) == self.decoder.layers:
            raise UsageError(f"{self.decoder.layers} layers need as many token counts, not {len(self.alive)}, {len(self.stored)}.")

    @property
    def layer_bytes(self) -> float:
        """Bytes of the decoder layers' weights."""
        return self.decoder.parameters * self.precision.layers

    @property
    def head_bytes(self) -> float:
        """Bytes of the output head."""
        return self.decoder.head * self.precision.head

    @property
    def embedding_bytes(self) -> float:
        """Bytes of the embedding, which is stored separately from the head even if the model ties them."""
        return self.decoder.head * self.precision.embedding

    @property
    def tower_bytes(self) -> float:
        """Bytes of the vision encoder's weights."""
        return (self.tower.parameters + self.tower.merger) * self.precision.vision

    def kv_bytes(self, generated: float) -> float:
        """Return the bytes of the KV cache after `generated` tokens; reductions by a decode cut are not subtracted."""
        caches = [count for layer, count in enumerate(self.stored) if layer not in self.decoder.without_cache]
        tokens = sum(caches) + len(caches) * (self.text_tokens + generated)
        return float(tokens * self.decoder.kv_width * self.precision.number)

    def unpruned(self) -> Workload:
        """Return the workload without pruning: every visual token in every layer, every patch in every block, no selector."""
        counts = (self.tower.tokens,) * self.decoder.layers
        return replace(self, tower=replace(self.tower, left=()), alive=counts, stored=counts, selector=0)


@dataclass(frozen=True)
class ModelSizes:
    """What is known of a model: the shapes of the weights that its vision encoder and its decoder multiply by, rank 2 and more.

    `blocks`, `patches`: of the vision encoder. `selector`: nodes of the input cut's graph, 0 without one.
    """

    decoder: DecoderShape
    vision_weights: Shapes
    decoder_weights: Shapes
    blocks: int
    patches: int
    selector: int = 0

    @classmethod
    def of(cls, bundle: Bundle) -> ModelSizes:
        """Return the sizes of a bundle; raise BundleError for a graph that cannot be read."""
        manifest = bundle.manifest
        return cls(
            decoder=manifest.decoder,
            vision_weights=read_graph(bundle.file(VISION)).weights,
            decoder_weights=read_graph(bundle.file(DECODER)).weights,
            blocks=manifest.encoder_blocks,
            patches=int(manifest.graphs[VISION].inputs["pixel_values"].shape[0]),
            selector=read_graph(bundle.file(SELECTOR)).nodes if SELECTOR in manifest.files else 0,
        )


def workload_of(bundle: Bundle, *, text_tokens: int, generated: int, precision: str = "fp32") -> Workload:
    """Return the workload of a question to a bundle, as if it were exported in `precision`; raises as the two do that it calls."""
    return workload(ModelSizes.of(bundle), bundle.plan, text_tokens=text_tokens, generated=generated, precision=precision)


def workload(sizes: ModelSizes, plan: KeepPlan, *, text_tokens: int, generated: int, precision: str = "fp32") -> Workload:
    """Return the workload of a question to a model under a plan, in `precision`.

    Other sizes are inferred from the shapes of the weights. The vision encoder's width is the most common dimension of its
    matrices, and its attention is assumed to span each view of the image. Raises UsageError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"Unknown precision {precision!r}.", hint=f"Precisions are: {', '.join(PRECISIONS)}.")
    layers = range(plan.layers)
    return Workload(
        tower=_with_vision_cuts(_tower(sizes, plan.geometry), plan),
        decoder=_decoder(sizes.decoder_weights, sizes.decoder),
        precision=PRECISIONS[precision],
        alive=tuple(map(plan.tokens_at_layer, layers)),
        stored=tuple(map(plan.tokens_cached, layers)),
        text_tokens=text_tokens,
        generated=generated,
        selector=sizes.selector,
    )


def _tower(sizes: ModelSizes, geometry: Geometry) -> VisionWorkload:
    weights = sizes.vision_weights
    hidden = _most_common(size for shape in weights for size in set(shape)) or 1
    block_shapes = [shape for shape in weights if hidden in shape]
    mlp = _most_common(size for shape in block_shapes if len(shape) == 2 for size in shape if size not in (hidden, 3 * hidden))
    parameters = sum(map(math.prod, block_shapes))
    merger = sum(map(math.prod, weights)) - parameters
    return VisionWorkload(
        layers=sizes.blocks,
        hidden=hidden,
        mlp=mlp or 4 * hidden,
        patches=sizes.patches,
        tokens=geometry.tokens,
        parameters=parameters,
        merger=merger,
        views=len(geometry.layout),
    )


def _with_vision_cuts(tower: VisionWorkload, plan: KeepPlan) -> VisionWorkload:
    if not plan.vision_cuts:
        return tower
    keeps = [[tower.tokens, *(cut.keep for cut in plan.vision_cuts if cut.layer <= block)][-1] for block in range(tower.layers)]
    return replace(tower, left=tuple(tower.patches * keep // tower.tokens for keep in keeps))


def _decoder(weights: Shapes, shape: DecoderShape) -> Decoder:
    matrices = [sizes for sizes in weights if shape.vocabulary not in sizes]
    others = Counter(size for sizes in matrices if shape.hidden in sizes for size in sizes if size != shape.hidden)
    kv = shape.kv_heads * shape.head_dim
    # Gate, up and down have the MLP's width; keys and values have the cache's width. The remaining size is that of the queries, or,
    # if no matrix has the keys' width, of queries, keys and values in one matrix. If none remains, the query matrix is square.
    intermediate = _most_common(others.elements()) or 4 * shape.hidden
    queries = _most_common(size for size in others.elements() if size not in (intermediate, kv)) or shape.hidden
    queries -= 0 if kv in others or queries <= 2 * kv else 2 * kv
    return Decoder(
        layers=shape.layers,
        hidden=shape.hidden,
        heads=queries // shape.head_dim,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=intermediate,
        vocabulary=shape.vocabulary,
        parameters=sum(map(math.prod, matrices)),
        without_cache=tuple(sorted(set(range(shape.layers)) - set(shape.attention_layers))),
    )


def _most_common(sizes: Iterable[int]) -> int | None:
    found = Counter(sizes).most_common(1)
    return found[0][0] if found else None

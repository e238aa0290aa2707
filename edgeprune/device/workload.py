"""The workload of one question about one image: sizes, token counts and precision, and how to read them from a bundle.

Work is what the model needs: attention within views, frames and windows, and of the pairs of tokens that a mask leaves.
`edgeprune.export.sizes` reads the same sizes from a model that is not exported yet.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from edgeprune.bundle import DECODER, SELECTOR, VISION, Bundle, DecoderShape, LayerState, Operations
from edgeprune.device.onnx_file import read_graph
from edgeprune.errors import UsageError
from edgeprune.plan import Geometry, KeepPlan

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Precision:
    """Bytes per weight, scales included, in each part of a model; `number`: bytes per element of activations and KV cache.

    Products with weights run in `arithmetic`, in the vision encoder only if its weights are narrower than activations; everything
    else at the width of `number`.
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
        """Arithmetic of attention and of the selector."""
        return "fp16" if self.number == 2 else "fp32"

    @property
    def in_vision(self) -> str:
        """Arithmetic of the vision encoder's products."""
        return self.arithmetic if self.vision < self.number else self.elsewhere

    @property
    def unpacked(self) -> bool:
        """Whether integer weights are unpacked to FP16 for products."""
        return self.arithmetic == "fp16" and self.layers < 2.0


# As Lowering.weights_of for TensorRT: only weights are narrow, except for w8a8, fp8 and nvfp4; an INT4 block of 128 inputs has a
# scale of 2 bytes, an FP4 block of 16 one of 1.
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", 4.0, 4.0, 4.0, 4.0, 4, "fp32"),
        Precision("fp16", 2.0, 2.0, 2.0, 2.0, 2, "fp16"),
        Precision("bf16", 2.0, 2.0, 2.0, 2.0, 2, "fp16"),  # Orin and Thor multiply both equally fast
        Precision("int8", 1.0, 1.0, 1.0, 2.0, 2, "fp16"),
        Precision("w8a8", 1.0, 1.0, 1.0, 2.0, 2, "int8"),
        Precision("fp8", 1.0, 2.0, 1.0, 2.0, 2, "fp8"),
        Precision("int4", 0.5 + 2 / 128, 1.0, 1.0, 2.0, 2, "fp16"),
        Precision("nvfp4", 0.5 + 1 / 16, 2.0, 2.0, 2.0, 2, "fp4"),
    )
}


@dataclass(frozen=True)
class VisionWorkload:
    """The vision encoder: `layers` blocks of width `hidden` and MLP width `mlp` over `patches`, giving `tokens` visual tokens.

    `parameters`: elements of all matrices. `work`: operations for one image, and `whole` without vision cuts. `left`: patches of
    each block if vision cuts drop some; () without vision cuts.
    """

    layers: int
    hidden: int
    mlp: int
    patches: int
    tokens: int
    parameters: int
    work: Operations
    whole: Operations
    left: tuple[int, ...] = ()

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of patches in each block."""
        return self.left or (self.patches,) * self.layers


@dataclass(frozen=True)
class Decoder:
    """The language model; `parameters` counts the matrices of all layers, without embedding and output head.

    `by_layer`: those of each layer, if they differ. `states`: of layers without attention. `local`: the layers with a `window`, in
    tokens. `mutual`: which tokens of a prompt also attend to those after them: "" for none, the "image", or "all".
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    parameters: int
    by_layer: tuple[int, ...] = ()
    states: tuple[LayerState, ...] = ()
    local: tuple[int, ...] = ()
    window: int = 0
    mutual: str = ""

    @property
    def layer_parameters(self) -> tuple[float, ...]:
        """The elements of each layer's matrices."""
        return self.by_layer or (self.parameters / self.layers,) * self.layers

    @property
    def without_cache(self) -> frozenset[int]:
        """The layers that have states of fixed size instead of a KV cache."""
        return frozenset(state.layer for state in self.states)

    @property
    def state_bytes(self) -> float:
        """Bytes of all states, which are float32."""
        return 4.0 * sum(math.prod(state.shape) for state in self.states)

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

    def visible(self, layer: int, cached: float) -> float:
        """Return how many of `cached` keys a new token attends to in a layer."""
        if layer in self.without_cache:
            return 0.0
        return min(cached, self.window) if self.window and layer in self.local else cached

    def pairs(self, layer: int, visual: int, text: int) -> float:
        """Return how many pairs of a query and a key a prompt has in a layer, without those that its mask hides."""
        if layer in self.without_cache:
            return 0.0
        tokens = visual + text
        if self.mutual == "all":
            return float(tokens**2)
        near = int(self.visible(layer, tokens))  # the last tokens that each attends to, itself included
        before = near * (near + 1) / 2 + (tokens - near) * near
        return before + (visual * (visual - 1) / 2 if self.mutual == "image" else 0.0)

    def state_operations(self, tokens: Sequence[int]) -> float:
        """Return the operations on states for the `tokens` of each layer: a delta rule reads its matrix, changes it and reads it.

        The few of short convolutions are not counted.
        """
        matrices = [state for state in self.states if len(state.shape) == 3]
        return sum(6.0 * math.prod(state.shape) * tokens[state.layer] for state in matrices)


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
        return self.tower.parameters * self.precision.vision

    def kv_bytes(self, generated: float) -> float:
        """Return the bytes of the KV cache after `generated` tokens; reductions by a decode cut are not subtracted."""
        caches = [count for layer, count in enumerate(self.stored) if layer not in self.decoder.without_cache]
        tokens = sum(caches) + len(caches) * (self.text_tokens + generated)
        return float(tokens * self.decoder.kv_width * self.precision.number)

    def visible_keys(self, generated: float) -> float:
        """Return how many keys the token after `generated` tokens attends to, summed over the layers."""
        lengths = [count + self.text_tokens + generated for count in self.stored]
        return sum(self.decoder.visible(layer, length) for layer, length in enumerate(lengths))

    def unpruned(self) -> Workload:
        """Return the workload without pruning: every visual token in every layer, every patch in every block, no selector."""
        counts = (self.tower.tokens,) * self.decoder.layers
        tower = replace(self.tower, work=self.tower.whole, left=())
        return replace(self, tower=tower, alive=counts, stored=counts, selector=0)


@dataclass(frozen=True)
class ModelSizes:
    """What is known of a model: the shapes of the weights that its vision encoder and its decoder multiply by, rank 2 and more.

    `blocks`, `patches`: of the vision encoder. `selector`: nodes of the input cut's graph, 0 without one. `encoder_work`: as in the
    manifest.
    """

    decoder: DecoderShape
    vision_weights: Shapes
    decoder_weights: Shapes
    blocks: int
    patches: int
    selector: int = 0
    encoder_work: tuple[Operations, ...] = ()

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
            encoder_work=manifest.encoder_work,
        )


def workload_of(bundle: Bundle, *, text_tokens: int, generated: int, precision: str = "fp32") -> Workload:
    """Return the workload of a question to a bundle, as if it were exported in `precision`; raises as the two do that it calls."""
    return workload(ModelSizes.of(bundle), bundle.plan, text_tokens=text_tokens, generated=generated, precision=precision)


def workload(sizes: ModelSizes, plan: KeepPlan, *, text_tokens: int, generated: int, precision: str = "fp32") -> Workload:
    """Return the workload of a question to a model under a plan, in `precision`.

    The widths of the vision encoder and of MLPs are inferred from the shapes of the weights. A bundle before schema 9 does not say
    how its encoder attends and how far a window reaches: attention in the encoder is then not counted, and windows span everything.
    Raises UsageError for an unknown precision.
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
    parameters = sum(map(math.prod, weights))
    in_blocks = sum(math.prod(shape) for shape in block_shapes)
    products = 2.0 * (in_blocks * sizes.patches + (parameters - in_blocks) * geometry.tokens)
    work, whole = sizes.encoder_work or (Operations(products, 0.0),) * 2
    return VisionWorkload(
        layers=sizes.blocks,
        hidden=hidden,
        mlp=mlp or 4 * hidden,
        patches=sizes.patches,
        tokens=geometry.tokens,
        parameters=parameters,
        work=work,
        whole=whole,
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
        heads=shape.heads or queries // shape.head_dim,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=intermediate,
        vocabulary=shape.vocabulary,
        parameters=sum(shape.layer_weights) or sum(map(math.prod, matrices)),
        by_layer=shape.layer_weights,
        states=shape.states,
        local=shape.local_layers,
        window=shape.window,
        mutual="all" if shape.bidirectional else "image" if shape.position_axes == 2 else "",
    )


def _most_common(sizes: Iterable[int]) -> int | None:
    found = Counter(sizes).most_common(1)
    return found[0][0] if found else None

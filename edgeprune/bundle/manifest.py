"""The manifest of a bundle: source, shapes, graphs, and size and sha256 of every file."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.bundle.integrity import FileRecord
from edgeprune.errors import BundleError, NoBundleError, update_hint
from edgeprune.io.files import is_file, is_folder, write_text
from edgeprune.io.typed_json import from_json, is_text, read_json
from edgeprune.targets import Lowering, target_named

SCHEMA_VERSION = 14
MANIFEST = "manifest.json"
_MODEL_CONFIG, _MODEL_PROCESSOR = "config.json", "preprocessor_config.json"  # of a transformers folder
_AGAIN = "Copy the bundle again, or export it again."
_BIDIRECTIONAL = "paligemma"  # the one family with such prompts before schema 7, whose manifests do not say so
# What each schema added, with the meaning of its absence. Schema 5 is the oldest that is read.
_ADDED: dict[int, dict[str, Any]] = {
    6: {"tiers": []},
    7: {"generation": {}},
    8: {},
    9: {"encoder_work": [], "wide_products": None},
    10: {"gptq": None},
    11: {},  # decoders with the inputs of a cut that weighs
    12: {"kv": "same"},
    13: {"smoothing": None},
    14: {},  # decoders whose steps leave their new rows in their buffers alone
}


@dataclass(frozen=True)
class SourceQuantization:
    """What became of the layers that the checkpoint holds quantized by `method`, such as gptq: how many layers of each kind.

    `kept`: integers, zero points and scales are those of the checkpoint. `requantized`: quantized again, to another precision.
    `dequantized`: written as floats, exact but for the precision.
    """

    method: str
    kept: int
    requantized: int
    dequantized: int


@dataclass(frozen=True)
class Source:
    """The exported model: name as given by the user, `model_type`, and sha256 of the weights.

    `revision`: the commit of a model of the Hugging Face Hub. `adapter`: the name of the LoRA adapter that was merged into it, with
    the sha256 of its weights. Each is empty where there is none, and in bundles before schema 8. `quantization`: what became of
    layers that the checkpoint holds quantized, if there are any.
    """

    model: str
    family: str
    weights_sha256: str
    revision: str = ""
    adapter: str = ""
    adapter_sha256: str = ""
    quantization: SourceQuantization | None = None


@dataclass(frozen=True)
class Operations:
    """Operations, of which a multiply-add is two: matrix `products` with weights, and `attention` between tokens or patches."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.products + self.attention


@dataclass(frozen=True)
class GptqRecord:
    """What int4 weights were fitted to by GPTQ: the number of `samples`, and the `sha256` of their file."""

    samples: int
    sha256: str


@dataclass(frozen=True)
class SmoothingRecord:
    """What the scales of rounded inputs were found by: the number of `samples`, and the `sha256` of their file.

    `rounded`: how many matrices multiply rounded inputs. `lossy`: the relative error that SmoothQuant expected of the products of
    others. `left`: the matrices of the decoder's layers that nvfp4 leaves in float16, because their inputs are no blocks of 16 or
    no sample had any.
    """

    samples: int
    sha256: str
    rounded: int
    lossy: Mapping[str, float]
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerState:
    """A float32 state of fixed `shape` that decoder layer `layer` has instead of keys and values."""

    layer: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the decoder graph; `position_axes` is 3 for mRoPE, 1 for plain rotary positions, 2 if a visual token sees its image.

    `cache_type`: type of the KV caches, float32, float16 or bfloat16. `planes`: extra features per visual token; layer i of the
    first `planes` layers adds plane i. `context`: maximum tokens of a conversation. `bidirectional`: the tokens of a prompt attend
    to each other, so that the KV cache of an image depends on the text after it. `local_layers`: those with a window of attention.
    `states`: in the order of the layers; a layer with states has no KV cache. `heads` of the queries, the `window` of the local
    layers, in tokens, and `layer_weights`, the elements of each layer's matrices, are 0 and empty in bundles before schema 9.
    """

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    position_axes: int
    context: int
    planes: int = 0
    cache_type: str = "float32"
    bidirectional: bool = False
    local_layers: tuple[int, ...] = ()
    states: tuple[LayerState, ...] = ()
    heads: int = 0
    window: int = 0
    layer_weights: tuple[int, ...] = ()

    @property
    def row_type(self) -> str:
        """NumPy's name of the type that rows of the KV caches are held in."""
        return held_as(self.cache_type)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers with a KV cache."""
        return attention_layers(self.layers, self.states)

    @property
    def width(self) -> int:
        """Columns of the decoder's input embeddings, planes included."""
        return (1 + self.planes) * self.hidden


def held_as(kind: str) -> str:
    """Return NumPy's name of the type that arrays of a graph's type are held in: their bits for bfloat16, which NumPy lacks."""
    return "uint16" if kind == "bfloat16" else kind


def attention_layers(layers: int, states: Sequence[LayerState]) -> tuple[int, ...]:
    """Return which of a decoder's layers have a KV cache: those without states."""
    without = {state.layer for state in states}
    return tuple(layer for layer in range(layers) if layer not in without)


@dataclass(frozen=True)
class ImageText:
    """How an image or a video is represented in the prompt's text.

    `kind`: "image" or "video", the type of its part in chat messages. `placeholder`: the chat template's text for it. `text`: its
    replacement, which has the token of id `token` once for all views, or once per view with other text between. `boundary`: a mark
    around images that adjacent images share and that a space separates from a word; empty for most families.
    """

    kind: str
    placeholder: str
    text: str
    token: int
    boundary: str = ""


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint's generation_config.json does to logits when the most probable token is taken.

    `repetition_penalty`: divides positive logits of tokens in the prompt or the answer, and multiplies negative ones (Keskar et
    al., arXiv 1909.05858). `suppressed`: ids that are never generated.
    """

    repetition_penalty: float = 1.0
    suppressed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """Type and shape of a graph input or output; a dynamic dimension is a name or an expression over names."""

    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphRecord:
    """Inputs and outputs of a graph by name."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Manifest:
    """Contents of a bundle.

    `encoder_blocks`: blocks of the vision encoder. `image`: how images are represented in the text. `end_tokens`: token ids.
    `generation`: how logits are changed. `versions`: packages that wrote it. `tiers`: names, best first; empty for a single plan.
    `encoder_work`: operations of the vision encoder for one image, under the plan and without cuts; empty before schema 9.
    `target` and `precision`: how the graphs were lowered, see `lowering`. `graphs` and `files`: by path in the bundle.
    `wide_products`: the largest product of each matrix, such as decoder.layers.0.mlp.down_proj, whose products float16 does not
    hold with a margin; None if it was not measured: by lowerings that do not multiply in float16, and before schema 9. `gptq`: what
    int4 weights were fitted to; None if they are rounded, and before schema 10. `kv`: see `Lowering`; "same" before schema 12.
    `smoothing`: for w8a8, fp8 and nvfp4, None for others and before schema 13.
    """

    source: Source
    decoder: DecoderShape
    target: str
    precision: str
    encoder_blocks: int
    image: ImageText
    end_tokens: tuple[int, ...]
    generation: GenerationDefaults
    versions: Mapping[str, str]
    graphs: Mapping[str, GraphRecord]
    files: Mapping[str, FileRecord]
    tiers: tuple[str, ...] = ()
    wide_products: Mapping[str, float] | None = None
    encoder_work: tuple[Operations, ...] = ()
    gptq: GptqRecord | None = None
    kv: str = "same"
    smoothing: SmoothingRecord | None = None

    @property
    def lowering(self) -> Lowering:
        """How the graphs were lowered; raises UsageError if this version does not know the target."""
        return Lowering(target_named(self.target), self.precision, tuple(self.wide_products or ()), self.kv)

    def save(self, folder: Path) -> None:
        """Write manifest.json into `folder`."""
        data = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        write_text(folder / MANIFEST, json.dumps(data, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a bundle folder; raise BundleError if it is missing, malformed or of an unsupported schema."""
        return cls.parse(folder, read_manifest(folder))

    @classmethod
    def parse(cls, folder: Path, text: bytes) -> Manifest:
        """Parse the bytes of manifest.json; raise BundleError as `load` does."""
        data = _parse_json(folder, text)
        try:
            source = from_json(Source, data["source"], "source")
            return cls(
                source=source,
                decoder=_decoder(data["decoder"], source.family),
                target=_text(data["target"]),
                precision=_text(data["precision"]),
                encoder_blocks=_size(data["encoder_blocks"]),
                image=from_json(ImageText, data["image"], "image"),
                end_tokens=tuple(map(_size, _list(data["end_tokens"]))),
                generation=_generation(data["generation"]),
                versions={_text(name): _text(version) for name, version in data["versions"].items()},
                graphs={_text(name): _graph(record) for name, record in data["graphs"].items()},
                files={_text(name): from_json(FileRecord, record, name) for name, record in data["files"].items()},
                tiers=tuple(map(_text, _list(data["tiers"]))),
                wide_products=_wide_products(data["wide_products"]),
                encoder_work=_encoder_work(data["encoder_work"]),
                gptq=None if data["gptq"] is None else from_json(GptqRecord, data["gptq"], "gptq"),
                kv=_text(data["kv"]),
                smoothing=None if data["smoothing"] is None else from_json(SmoothingRecord, data["smoothing"], "smoothing"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"The manifest of {folder} is malformed: {error!r}.", hint="Export it again.") from error


def read_manifest(folder: Path) -> bytes:
    """Return the bytes of manifest.json; raise NoBundleError if there is none, and BundleError if it is unreadable."""
    try:
        return (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise _no_bundle(folder) from error
    except OSError as error:
        raise BundleError(f"Cannot read {folder / MANIFEST}: {error.strerror}.", hint=_AGAIN) from error


def _no_bundle(path: Path) -> NoBundleError:
    # The error for what is at a path instead of a bundle. Every remedy is a command or a path that works as it stands.
    whole = next((parent for parent in path.parents if is_file(parent / MANIFEST)), None)
    if whole is not None and (is_file(path) or is_folder(path)):
        return NoBundleError(f"{path} is a part of a bundle.", hint=f"Give the folder of the bundle: {whole}")
    if is_file(path):
        is_plan = path.suffix == ".json"
        command = f"export MODEL --plan {_quoted(path)} -o BUNDLE" if is_plan else "export MODEL -o BUNDLE"
        return NoBundleError(f"{path} is a file, and a bundle is a folder.", hint=f"Make one with: edgeprune {command}")
    if not is_folder(path):
        return NoBundleError(f"There is no bundle at {path}.", hint=f"Make one with: edgeprune export MODEL -o {_quoted(path)}")
    lacks = f"{path} is no bundle: it has no {MANIFEST}."
    if is_file(path / _MODEL_CONFIG):
        bundle = path.resolve().name + ".bundle"
        command = f"edgeprune export {_quoted(path)} -o {_quoted(bundle)}{_size_option(path)}"
        return NoBundleError(f"{lacks} It is a transformers model.", hint=f"Export it first: {command}")
    return NoBundleError(lacks, hint=f"{_AGAIN} Make one with: edgeprune export MODEL -o BUNDLE")


def _size_option(model: Path) -> str:
    # Qwen's image processor takes any size, unless it is limited to one area, and a bundle has one.
    with suppress(OSError, ValueError, AttributeError):
        settings = read_json(model / _MODEL_PROCESSOR)
        limits = settings.get("size") or {}
        if str(settings.get("image_processor_type", "Qwen")).startswith("Qwen") and len(set(limits.values())) != 1:
            return " --image-size 448x448"
    return ""


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))


def _parse_json(folder: Path, text: bytes) -> dict[str, Any]:
    # The result has the current schema.
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"Cannot read {folder / MANIFEST}: {error}.", hint=_AGAIN) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int:
        raise BundleError(f"{folder / MANIFEST} is no manifest: it says no schema version.", hint="Export it again.")
    oldest = min(_ADDED) - 1
    if not oldest <= version <= SCHEMA_VERSION:
        newer = version > SCHEMA_VERSION
        raise BundleError(
            f"{folder} has manifest schema version {version}, which is too {'new' if newer else 'old'}: "
            f"this EdgePrune reads {oldest} to {SCHEMA_VERSION}.",
            hint=update_hint() if newer else "Export it again with this version.",
        )
    absent = {name: value for schema, added in _ADDED.items() if version < schema for name, value in added.items()}
    return {**data, **absent}


def _decoder(data: Any, family: str) -> DecoderShape:
    shape = from_json(DecoderShape, {"bidirectional": family == _BIDIRECTIONAL, **data}, "decoder")
    sizes = (shape.layers, shape.kv_heads, shape.head_dim, shape.hidden, shape.vocabulary, shape.position_axes, shape.context)
    if min(sizes) < 1 or shape.planes < 0:
        raise ValueError(f"a decoder of sizes {sizes} with {shape.planes} planes")
    if any(not 0 <= state.layer < shape.layers or min(state.shape, default=0) < 1 for state in shape.states):
        raise ValueError(f"a decoder of {shape.layers} layers with the states {shape.states}")
    if not all(0 <= layer < shape.layers for layer in shape.local_layers):
        raise ValueError(f"windows in the layers {shape.local_layers} of {shape.layers}")
    if min(shape.heads, shape.window, *shape.layer_weights) < 0 or len(shape.layer_weights) not in (0, shape.layers):
        raise ValueError(f"{shape.heads} heads, a window of {shape.window} and weights of {len(shape.layer_weights)} layers")
    return shape


def _encoder_work(data: Any) -> tuple[Operations, ...]:
    work = tuple(from_json(Operations, each, "encoder_work") for each in _list(data))
    if len(work) not in (0, 2) or any(min(each.products, each.attention) < 0 for each in work):
        raise ValueError(f"an encoder with the work {work}")
    return work


def _generation(data: Any) -> GenerationDefaults:
    defaults = from_json(GenerationDefaults, data, "generation")
    if defaults.repetition_penalty <= 0 or min(defaults.suppressed, default=0) < 0:
        raise ValueError(f"{defaults} cannot be applied")
    return defaults


def _wide_products(data: Any) -> Mapping[str, float] | None:
    if data is None:
        return None
    if not all(type(size) in (int, float) and 0 < size < math.inf for size in data.values()):
        raise ValueError(f"products of the sizes {list(data.values())}")
    return {_text(name): float(size) for name, size in data.items()}


def _graph(record: Any) -> GraphRecord:
    tensors = (
        {
            _text(name): Tensor(_text(tensor["type"]), tuple(map(_axis, _list(tensor["shape"]))))
            for name, tensor in record[side].items()
        }
        for side in ("inputs", "outputs")
    )
    return GraphRecord(*tensors)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return value


def _axis(value: Any) -> int | str:
    return value if is_text(value) else _size(value)


def _text(value: Any) -> str:
    if not is_text(value):
        raise ValueError(f"{value!r} is no text")
    return str(value)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no size")
    return value

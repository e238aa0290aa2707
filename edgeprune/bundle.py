"""Bundles: the folder that `edgeprune export` writes and the runtime loads.

manifest.json                    this module's Manifest, with the sha256 of every other file
plan.json                        the keep plan that is frozen into the decoder
onnx/vision_encoder.onnx         patches [patches, patch pixels] -> visual tokens [1, V, hidden], and what its cuts kept
onnx/vision_unpruned.onnx        the same without its cuts, if the plan has some: for answers with pruning switched off
onnx/selector.onnx               the input cut, if the plan has one: visual tokens and prompt -> kept tokens [1, K, hidden], indices
onnx/predictor.onnx              the rate of a live decode cut: attention split [layers, 4] and step -> share kept [1]
onnx/embed_tokens.onnx           ids [1, n] -> embeddings [1, n, hidden]
onnx/decoder.onnx (+ .data)      one graph for image prefill, text turns and decode steps
processor/                       tokenizer.json, special_tokens.json, chat_template.jinja, preprocessor_config.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgeprune.background import Background
from edgeprune.errors import BundleError
from edgeprune.files import write_text
from edgeprune.plan import KeepPlan
from edgeprune.targets import Lowering, target_named

SCHEMA_VERSION = 5
MANIFEST, PLAN = "manifest.json", "plan.json"
VISION, EMBED, DECODER = "onnx/vision_encoder.onnx", "onnx/embed_tokens.onnx", "onnx/decoder.onnx"
VISION_UNPRUNED, SELECTOR, PREDICTOR = "onnx/vision_unpruned.onnx", "onnx/selector.onnx", "onnx/predictor.onnx"
TOKENIZER, SPECIAL_TOKENS = "processor/tokenizer.json", "processor/special_tokens.json"
CHAT_TEMPLATE, PREPROCESSOR = "processor/chat_template.jinja", "processor/preprocessor_config.json"
_WEIGHTS = ".data"  # how the names of the large files end
_AGAIN = "Copy the bundle again, or export it again."
_PIECE = 1 << 20  # bytes read at once: they stay in the CPU's cache until they are hashed


@dataclass(frozen=True)
class Source:
    """Where the weights came from: the model as it was named, its `model_type`, and the sha256 of its weights."""

    model: str
    family: str
    weights_sha256: str


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of the decoder graph; `position_axes` is 3 for mRoPE, 1 for plain rotary positions.

    `cache_type`: float32 or float16, of the KV caches. `planes`: features beside each visual token, added by as many first layers.
    `context`: the most tokens that a conversation may have.
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

    @property
    def width(self) -> int:
        """Columns of the embeddings that enter the decoder."""
        return (1 + self.planes) * self.hidden


@dataclass(frozen=True)
class ImageText:
    """How an image, or a video, stands in the text of a prompt.

    `kind`: "image" or "video", the type of its part in chat messages. `placeholder`: what the chat template writes for it, and
    `text`: what that becomes, with the token of id `token` once for all views of the image, or once for each with other text
    between them. `boundary`: a mark around images which neighbours share, and which a space sets off from a word; mostly none.
    """

    kind: str
    placeholder: str
    text: str
    token: int
    boundary: str = ""


@dataclass(frozen=True)
class Tensor:
    """Type and shape of an input or output of a graph; a dynamic length is its name, or what it is computed from."""

    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphRecord:
    """What goes into a graph and what comes out, by name."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle is made of. `encoder_blocks`: of the vision encoder; `image`: how images stand in the text; `end_tokens`: ids;
    `versions` of the packages that wrote it.

    `target` and `precision` say how its graphs were lowered: see `lowering`. `graphs`: by path in the bundle.
    """

    source: Source
    decoder: DecoderShape
    target: str
    precision: str
    encoder_blocks: int
    image: ImageText
    end_tokens: tuple[int, ...]
    versions: Mapping[str, str]
    graphs: Mapping[str, GraphRecord]
    files: Mapping[str, FileRecord]

    @property
    def lowering(self) -> Lowering:
        """How the graphs were lowered; raise UsageError when this EdgePrune does not know the target."""
        return Lowering(target_named(self.target), self.precision)

    def save(self, folder: Path) -> None:
        """Write manifest.json into `folder`."""
        data = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        write_text(folder / MANIFEST, json.dumps(data, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a bundle folder; raise BundleError when there is none or it is of another schema."""
        data = _read_json(folder)
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            found = data.get("schema_version") if isinstance(data, dict) else None
            raise BundleError(
                f"{folder} has manifest schema version {found}, this EdgePrune reads {SCHEMA_VERSION}.",
                hint="Export it again with this version.",
            )
        try:
            return cls(
                source=Source(**data["source"]),
                decoder=DecoderShape(**data["decoder"]),
                target=str(data["target"]),
                precision=str(data["precision"]),
                encoder_blocks=int(data["encoder_blocks"]),
                image=ImageText(**data["image"]),
                end_tokens=tuple(int(token) for token in data["end_tokens"]),
                versions=dict(data["versions"]),
                graphs={name: _graph(record) for name, record in data["graphs"].items()},
                files={name: FileRecord(**record) for name, record in data["files"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"The manifest of {folder} is malformed: {error!r}.", hint="Export it again.") from error


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files were found as the manifest says."""

    path: Path
    manifest: Manifest
    plan: KeepPlan

    @classmethod
    def load(cls, path: Path) -> Bundle:
        """Open a bundle, checking the sha256 of every file; raise BundleError on the first that is missing or altered."""
        with cls.opening(path) as bundle:
            return bundle

    @classmethod
    @contextmanager
    def opening(cls, path: Path) -> Iterator[Bundle]:
        """Yield a bundle of which only the weights are still being checked, so that the block can open them meanwhile.

        Nothing may leave the block for use before it has ended: it is then that BundleError is raised for altered weights, in place
        of whatever error they caused inside.
        """
        manifest = Manifest.load(path)
        for name, record in manifest.files.items():
            _check_there(path, name, record)
            if not name.endswith(_WEIGHTS):
                _check_content(path, name, record)
        bundle = cls(path, manifest, _complete_plan(path, manifest))
        weights = {name: record for name, record in manifest.files.items() if name.endswith(_WEIGHTS)}
        checks = [Background(partial(_check_content, path, name, record)) for name, record in weights.items()]
        try:
            yield bundle
        finally:
            for check in checks:
                check.result()

    def file(self, name: str) -> Path:
        """Return the path of one file of the bundle."""
        return self.path / name


def files_of(graph: str) -> tuple[str, str]:
    """Return the paths of a graph and of its weights; the encoder without its cuts reads those of the one that has them."""
    return graph, f"{VISION if graph == VISION_UNPRUNED else graph}.data"


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Return the records of every file in `folder`, the manifest excepted, by path relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_of(path)) for path in paths}


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in pieces. Other threads run meanwhile."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def is_bundle(path: Path) -> bool:
    """Tell whether a folder looks like a bundle (it may still be a broken one)."""
    return (path / MANIFEST).is_file()


def _read_json(folder: Path) -> Any:
    if not folder.is_dir():
        raise BundleError(f"There is no bundle at {folder}.", hint="Make one with: edgeprune export -o BUNDLE")
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}.") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"Cannot read {folder / MANIFEST}: {error}.", hint="Export it again.") from error


def _graph(record: Any) -> GraphRecord:
    sides = (
        {name: Tensor(str(at["type"]), tuple(at["shape"])) for name, at in record[side].items()} for side in ("inputs", "outputs")
    )
    return GraphRecord(*sides)


def _complete_plan(folder: Path, manifest: Manifest) -> KeepPlan:
    # The plan, if all is there that it asks for.
    always = (PLAN, VISION, EMBED, DECODER, TOKENIZER, SPECIAL_TOKENS, CHAT_TEMPLATE, PREPROCESSOR)
    _check_listed(folder, manifest, always)
    plan = KeepPlan.load(folder / PLAN)
    wanted = {VISION_UNPRUNED: plan.vision_cuts, SELECTOR: plan.input, PREDICTOR: plan.live}
    _check_listed(folder, manifest, [name for name, asked in wanted.items() if asked])
    return plan


def _check_listed(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    for name in names:
        if name not in manifest.files:
            raise BundleError(f"The manifest of {folder} does not list {name}.", hint="Export it again.")


def _check_there(folder: Path, name: str, record: FileRecord) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"The manifest of {folder} names {name}, which lies outside the bundle.", hint=_AGAIN)
    if not path.is_file():
        raise BundleError(f"The bundle {folder} lacks {name}.", hint=_AGAIN)
    if path.stat().st_size != record.bytes:
        raise _altered(folder, name)


def _check_content(folder: Path, name: str, record: FileRecord) -> None:
    if sha256_of(folder / name) != record.sha256:
        raise _altered(folder, name)


def _altered(folder: Path, name: str) -> BundleError:
    return BundleError(f"{name} in {folder} is not the file that was exported (its sha256 differs).", hint=_AGAIN)

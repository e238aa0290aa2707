"""Bundles: the folder that `edgeprune export` writes and the runtime loads.

manifest.json                    edgeprune.bundle.manifest's Manifest, with the sha256 of every file below
signature.json                   optional signature of the manifest: see edgeprune.bundle.signing
plan.json                        the keep plan that is frozen into the decoder; the first tier's plan if there are several
plan.weights.safetensors         what the plan's method learned, if it did: for verify, as the graphs have it too
tiers/NAME.json                  the plans of the other tiers, if any, with weights of their own beside them likewise
onnx/vision_encoder.onnx         patches [patches, patch pixels] -> visual tokens [1, V, hidden], kept indices of vision cuts
onnx/vision_unpruned.onnx        the encoder without cuts, if the plan has vision cuts: for answers with pruning switched off
onnx/selector.onnx               the input cut, if the plan has one: visual tokens and prompt -> kept tokens [1, K, hidden], indices
onnx/selector.NAME.onnx          the input cut with the budget of another tier
onnx/predictor.onnx              the rate of a decode cut that follows attention: split [layers, 4] and step -> share kept [1]
onnx/embed_tokens.onnx           ids [1, n] -> embeddings [1, n, hidden]
onnx/decoder.onnx (+ .data)      one graph for image prefill, text turns and decode steps
onnx/*.float32.onnx              a graph of a bf16 or nvfp4 bundle with what ONNX Runtime lacks in float32, on the same weights
expected/conversation.npz        a conversation and its outputs: see edgeprune.benchmark.expected; only for a target with TensorRT
roundings.safetensors            how inputs of matrices are rounded, if it is w8a8, fp8 or nvfp4: for verify, as the graphs have it
processor/                       tokenizer.json, special_tokens.json, chat_template.jinja, preprocessor_config.json

Engines that a device builds later have their own records. The runtime reads only files that the manifest lists; this includes the
weight files that the graphs name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.bundle.integrity import FileRecord, VerificationCache, check_locations, check_sha256, check_size
from edgeprune.bundle.manifest import MANIFEST, Manifest, read_manifest
from edgeprune.bundle.signing import TrustedKeys, check_signature
from edgeprune.errors import BundleError, UsageError, renamed
from edgeprune.io.background import ThreadTask
from edgeprune.io.files import is_file
from edgeprune.plan import KeepPlan
from edgeprune.plan.tiers import Tiers, tier_number
from edgeprune.plan.weights import weights_path

CHECKS = ("full", "fast")
PLAN = "plan.json"
VISION, EMBED, DECODER = "onnx/vision_encoder.onnx", "onnx/embed_tokens.onnx", "onnx/decoder.onnx"
VISION_UNPRUNED, SELECTOR, PREDICTOR = "onnx/vision_unpruned.onnx", "onnx/selector.onnx", "onnx/predictor.onnx"
TOKENIZER, SPECIAL_TOKENS = "processor/tokenizer.json", "processor/special_tokens.json"
CHAT_TEMPLATE, PREPROCESSOR = "processor/chat_template.jinja", "processor/preprocessor_config.json"
EXPECTED = "expected/conversation.npz"
ROUNDINGS = "roundings.safetensors"
_RENAMED = {"lower": "lower_tiers", "opening": "open_while_verifying"}  # the old names work for one release
_WEIGHTS, _GRAPH = ".data", ".onnx"  # suffixes of weight files and of the graphs that refer to them


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files match its manifest. `plan` is the first tier's plan if the bundle has tiers."""

    path: Path
    manifest: Manifest
    plan: KeepPlan
    lower_tiers: tuple[KeepPlan, ...] = ()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return getattr(self, renamed("Bundle", name, _RENAMED))

    @property
    def tiers(self) -> tuple[tuple[str, KeepPlan], ...]:
        """Names and plans of the tiers, best first; empty if the bundle has one plan."""
        return tuple(zip(self.manifest.tiers, (self.plan, *self.lower_tiers), strict=False))

    @classmethod
    def load(cls, path: Path, *, check: str = "full", require_signature: TrustedKeys = ()) -> Bundle:
        """Open a bundle and check the sha256 of every file; raise BundleError for the first that is missing or altered."""
        with cls.open_while_verifying(path, check=check, require_signature=require_signature) as bundle:
            return bundle

    @classmethod
    def opening(cls, path: Path, **options: Any) -> AbstractContextManager[Bundle]:
        """Deprecated: the old name of `open_while_verifying`."""
        opened: AbstractContextManager[Bundle] = getattr(cls, renamed("Bundle", "opening", _RENAMED))(path, **options)
        return opened

    @classmethod
    @contextmanager
    def open_while_verifying(cls, path: Path, *, check: str = "full", require_signature: TrustedKeys = ()) -> Iterator[Bundle]:
        """Yield a bundle while threads still check its weights, so that the block can open sessions meanwhile.

        Do not use results of the block before it ends: only then is BundleError raised for altered weights. It replaces any error
        that they caused inside the block. `check`: one of CHECKS; "fast" reads no file whose size, times and inode are the same as
        when this user last checked them in full. `require_signature`: public keys, one of which must have signed the manifest.
        """
        if check not in CHECKS:
            raise UsageError(f"Unknown check {check!r}.", hint=f"Checks are: {', '.join(CHECKS)}.")
        text = read_manifest(path)
        if require_signature:
            check_signature(path, text, require_signature)
        manifest = Manifest.parse(path, text)
        for name, record in manifest.files.items():
            check_size(path, name, record)
        cache = VerificationCache(path, text, manifest.files) if check == "fast" else None
        if cache is not None and cache.matches():
            yield cls(path, manifest, *_load_plans(path, manifest))
            return
        weights = _check_all_but_weights(path, manifest.files)
        bundle = cls(path, manifest, *_load_plans(path, manifest))
        tasks = [ThreadTask(partial(check_sha256, path, name, manifest.files[name])) for name in weights]
        try:
            yield bundle
        finally:
            for task in tasks:
                task.result()
        if cache is not None:
            cache.save()

    def tier(self, name: str | None) -> int:
        """Return the index of a tier (0 for None); raise UsageError for a tier that the bundle does not have."""
        return 0 if name is None else tier_number(self.manifest.tiers, name)

    def file(self, name: str) -> Path:
        """Return the path of one file of the bundle."""
        return self.path / name


def tier_plan(name: str) -> str:
    """Return the plan's path in the bundle, for any tier but the first."""
    return f"tiers/{name}.json"


def tier_selector(name: str) -> str:
    """Return the input cut's path in the bundle, for any tier but the first."""
    return f"onnx/selector.{name}.onnx"


def float32_graph(graph: str) -> str:
    """Return the path of a bf16 graph's form in float32, which ONNX Runtime reads."""
    return f"{graph.removesuffix(_GRAPH)}.float32{_GRAPH}"


def own_weights_graph(graph: str) -> str:
    """Return the path of a graph's form for CPUs without 8-bit products: its Scans own the integers that they multiply by."""
    return f"{graph.removesuffix(_GRAPH)}.own-weights{_GRAPH}"


def files_of(graph: str) -> tuple[str, str]:
    """Return the paths of a graph and of its weights. The unpruned vision encoder shares the weights of the pruned one."""
    return graph, f"{VISION if graph == VISION_UNPRUNED else graph}.data"


def is_bundle(path: Path) -> bool:
    """Return whether a folder has a manifest. The bundle may still be broken."""
    return is_file(path / MANIFEST)


def _check_all_but_weights(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    # Check all files but the weights, and return the names of the weights.
    for name, record in files.items():
        if not name.endswith(_WEIGHTS):
            check_sha256(folder, name, record)
        if name.endswith(_GRAPH):
            check_locations(folder, name, files)
    return [name for name in files if name.endswith(_WEIGHTS)]


def _load_plans(folder: Path, manifest: Manifest) -> tuple[KeepPlan, tuple[KeepPlan, ...]]:
    # Load the plans of all tiers, after checking that the manifest lists every file that they need.
    required = (PLAN, VISION, EMBED, DECODER, TOKENIZER, SPECIAL_TOKENS, CHAT_TEMPLATE, PREPROCESSOR)
    _check_listed(folder, manifest, required)
    plan = KeepPlan.load(folder / PLAN)
    optional = {VISION_UNPRUNED: plan.vision_cuts, SELECTOR: plan.input, PREDICTOR: plan.has_rate_predictor}
    names = manifest.tiers[1:]
    needed_by_tiers = [tier_plan(name) for name in names] + ([tier_selector(name) for name in names] if plan.input else [])
    if plan.weights:
        needed_by_tiers += [weights_path(Path(path)).as_posix() for path in (PLAN, *map(tier_plan, names))]
    _check_listed(folder, manifest, [name for name, needed in optional.items() if needed] + needed_by_tiers)
    lower = tuple(KeepPlan.load(folder / tier_plan(name)) for name in names)
    if lower:
        Tiers(dict(zip(manifest.tiers, (plan, *lower), strict=True)))  # raises PlanError if one decoder cannot serve all tiers
    return plan, lower


def _check_listed(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    for name in names:
        if name not in manifest.files:
            raise BundleError(f"The manifest of {folder} does not list {name}.", hint="Export it again.")

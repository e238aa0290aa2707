"""Bundles: the folder that `edgeprune export` writes and the runtime loads.

manifest.json                    edgeprune.bundle.manifest's Manifest, with the sha256 of every file below
signature.json                   of the manifest, if somebody signed it: see edgeprune.bundle.signing
plan.json                        the keep plan that is frozen into the decoder; of several tiers the first
tiers/NAME.json                  the plans of the other tiers, if there are any
onnx/vision_encoder.onnx         patches [patches, patch pixels] -> visual tokens [1, V, hidden], and what its cuts kept
onnx/vision_unpruned.onnx        the same without its cuts, if the plan has some: for answers with pruning switched off
onnx/selector.onnx               the input cut, if the plan has one: visual tokens and prompt -> kept tokens [1, K, hidden], indices
onnx/selector.NAME.onnx          the same under the budget of another tier
onnx/predictor.onnx              the rate of a live decode cut: attention split [layers, 4] and step -> share kept [1]
onnx/embed_tokens.onnx           ids [1, n] -> embeddings [1, n, hidden]
onnx/decoder.onnx (+ .data)      one graph for image prefill, text turns and decode steps
processor/                       tokenizer.json, special_tokens.json, chat_template.jinja, preprocessor_config.json

Engines that a device builds later have records of their own. Any other file in the folder is never read: what is loaded comes from
files that the manifest lists, and so do the weights that the graphs name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.bundle.integrity import FileRecord, VerificationCache, check_locations, check_sha256, check_size
from edgeprune.bundle.manifest import MANIFEST, Manifest, read_manifest
from edgeprune.bundle.signing import TrustedKeys, check_signature
from edgeprune.errors import BundleError, UsageError, renamed
from edgeprune.io.background import ThreadTask
from edgeprune.plan import KeepPlan
from edgeprune.plan.tiers import Tiers, tier_number

CHECKS = ("full", "fast")
PLAN = "plan.json"
VISION, EMBED, DECODER = "onnx/vision_encoder.onnx", "onnx/embed_tokens.onnx", "onnx/decoder.onnx"
VISION_UNPRUNED, SELECTOR, PREDICTOR = "onnx/vision_unpruned.onnx", "onnx/selector.onnx", "onnx/predictor.onnx"
TOKENIZER, SPECIAL_TOKENS = "processor/tokenizer.json", "processor/special_tokens.json"
CHAT_TEMPLATE, PREPROCESSOR = "processor/chat_template.jinja", "processor/preprocessor_config.json"
_WEIGHTS, _GRAPH = ".data", ".onnx"  # how the names of the large files end, and of those that name them


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files were found as the manifest says. `plan`: of several tiers the first."""

    path: Path
    manifest: Manifest
    plan: KeepPlan
    lower_tiers: tuple[KeepPlan, ...] = ()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return getattr(self, renamed("Bundle", name, {"lower": "lower_tiers"}))  # works for one release

    @property
    def tiers(self) -> tuple[tuple[str, KeepPlan], ...]:
        """The names and plans of tiers, the best first; none where there is one plan."""
        return tuple(zip(self.manifest.tiers, (self.plan, *self.lower_tiers), strict=False))

    @classmethod
    def load(cls, path: Path, *, check: str = "full", require_signature: TrustedKeys = ()) -> Bundle:
        """Open a bundle, checking the sha256 of every file; raise BundleError on the first that is missing or altered."""
        with cls.open_while_verifying(path, check=check, require_signature=require_signature) as bundle:
            return bundle

    @classmethod
    @contextmanager
    def open_while_verifying(cls, path: Path, *, check: str = "full", require_signature: TrustedKeys = ()) -> Iterator[Bundle]:
        """Yield a bundle of which only the weights are still being checked, so that the block can open them meanwhile.

        Nothing may leave the block for use before it has ended: it is then that BundleError is raised for altered weights, in place
        of whatever error they caused inside. `check`: of CHECKS; "fast" reads no file that looks as it did when this user last had
        all of them checked. `require_signature`: public keys, of which one must have signed the manifest.
        """
        if check not in CHECKS:
            raise UsageError(f"Unknown check {check!r}.", hint=f"Checks are: {', '.join(CHECKS)}.")
        text = read_manifest(path)
        if require_signature:
            check_signature(path, text, require_signature)
        manifest = Manifest.parse(path, text)
        for name, record in manifest.files.items():
            check_size(path, name, record)
        stamp = VerificationCache(path, text, manifest.files) if check == "fast" else None
        if stamp is not None and stamp.matches():
            yield cls(path, manifest, *_complete_plans(path, manifest))
            return
        weights = _check_small(path, manifest.files)
        bundle = cls(path, manifest, *_complete_plans(path, manifest))
        checks = [ThreadTask(partial(check_sha256, path, name, manifest.files[name])) for name in weights]
        try:
            yield bundle
        finally:
            for each in checks:
                each.result()
        if stamp is not None:
            stamp.save()

    def tier(self, name: str | None) -> int:
        """Return the number of a tier, of None that of the first plan; raise UsageError for one that the bundle does not have."""
        return 0 if name is None else tier_number(self.manifest.tiers, name)

    def file(self, name: str) -> Path:
        """Return the path of one file of the bundle."""
        return self.path / name


def tier_plan(name: str) -> str:
    """Return the path of the plan of a tier that is not the first."""
    return f"tiers/{name}.json"


def tier_selector(name: str) -> str:
    """Return the path of the input cut of a tier that is not the first."""
    return f"onnx/selector.{name}.onnx"


def files_of(graph: str) -> tuple[str, str]:
    """Return the paths of a graph and of its weights; the encoder without its cuts reads those of the one that has them."""
    return graph, f"{VISION if graph == VISION_UNPRUNED else graph}.data"


def is_bundle(path: Path) -> bool:
    """Tell whether a folder looks like a bundle (it may still be a broken one)."""
    return (path / MANIFEST).is_file()


def _check_small(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    # All but the large files, whose names are returned.
    for name, record in files.items():
        if not name.endswith(_WEIGHTS):
            check_sha256(folder, name, record)
        if name.endswith(_GRAPH):
            check_locations(folder, name, files)
    return [name for name in files if name.endswith(_WEIGHTS)]


def _complete_plans(folder: Path, manifest: Manifest) -> tuple[KeepPlan, tuple[KeepPlan, ...]]:
    # The plan and those of lower tiers, if all is there that they ask for.
    always = (PLAN, VISION, EMBED, DECODER, TOKENIZER, SPECIAL_TOKENS, CHAT_TEMPLATE, PREPROCESSOR)
    _check_listed(folder, manifest, always)
    plan = KeepPlan.load(folder / PLAN)
    wanted = {VISION_UNPRUNED: plan.vision_cuts, SELECTOR: plan.input, PREDICTOR: plan.follows_attention}
    names = manifest.tiers[1:]
    selectors = [tier_selector(name) for name in names] if plan.input else []
    _check_listed(
        folder, manifest, [name for name, asked in wanted.items() if asked] + [tier_plan(name) for name in names] + selectors
    )
    lower = tuple(KeepPlan.load(folder / tier_plan(name)) for name in names)
    if lower:
        Tiers(dict(zip(manifest.tiers, (plan, *lower), strict=True)))  # refuses plans that one decoder cannot serve
    return plan, lower


def _check_listed(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    for name in names:
        if name not in manifest.files:
            raise BundleError(f"The manifest of {folder} does not list {name}.", hint="Export it again.")

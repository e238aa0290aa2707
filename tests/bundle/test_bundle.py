"""Bundles: complete, checked at load, and written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgeprune.bundle import DECODER, EMBED, MANIFEST, PLAN, SCHEMA_VERSION, VISION, Bundle, is_bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import BundleError, EdgePruneError, PlanError, UsageError
from edgeprune.export import exporter
from edgeprune.export.exporter import STAGES, export_bundle
from edgeprune.io.progress import Silent
from edgeprune.plan import Cut, Geometry, KeepPlan


def test_a_bundle_loads_with_its_plan(tiny_bundle: Bundle, tiny_plan: KeepPlan) -> None:
    bundle = Bundle.load(tiny_bundle.path)
    assert bundle.plan == tiny_plan
    assert is_bundle(bundle.path)
    assert bundle.manifest.source.family == "qwen2_vl"
    assert {"torch", "transformers", "onnx"} <= set(bundle.manifest.versions)


def test_every_file_is_in_the_manifest(tiny_bundle: Bundle) -> None:
    files = {path.relative_to(tiny_bundle.path).as_posix() for path in tiny_bundle.path.rglob("*") if path.is_file()}
    assert files == set(tiny_bundle.manifest.files) | {MANIFEST}


def test_the_graphs_keep_no_path_of_this_machine(tiny_bundle: Bundle) -> None:
    for name in (VISION, EMBED, DECODER):
        assert b"site-packages" not in tiny_bundle.file(name).read_bytes()


@pytest.mark.parametrize("name", [PLAN, VISION, EMBED, DECODER, f"{DECODER}.data", "processor/tokenizer.json"])
def test_a_missing_file_is_named(name: str, altered_bundle: Path) -> None:
    (altered_bundle / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.load(altered_bundle)


@pytest.mark.parametrize("name", [PLAN, VISION, DECODER, f"{DECODER}.data", "processor/chat_template.jinja"])
def test_one_altered_byte_is_found(name: str, altered_bundle: Path) -> None:
    data = bytearray((altered_bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (altered_bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match="sha256"):
        Bundle.load(altered_bundle)


def _rewrite_manifest(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(data | changes))


def test_a_newer_schema_is_refused(altered_bundle: Path) -> None:
    _rewrite_manifest(altered_bundle, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(BundleError, match=f"schema version {SCHEMA_VERSION + 1}"):
        Bundle.load(altered_bundle)


def test_a_file_outside_the_bundle_is_refused(altered_bundle: Path) -> None:
    (altered_bundle.parent / "outside").write_text("x")
    _rewrite_manifest(altered_bundle, files={"../outside": {"bytes": 1, "sha256": "0"}})
    with pytest.raises(BundleError, match="outside"):
        Bundle.load(altered_bundle)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": 1}', '{"schema_version": 1, "source": 3}'])
def test_a_malformed_manifest_is_refused(text: str, altered_bundle: Path) -> None:
    (altered_bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError):
        Bundle.load(altered_bundle)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle"):
        Bundle.load(tmp_path / "nothing")
    with pytest.raises(BundleError, match="manifest"):
        Bundle.load(tmp_path)


def test_selection_is_topk_and_gather_only(tiny_bundle: Bundle) -> None:
    graph = onnx.load(str(tiny_bundle.file(DECODER)), load_external_data=False).graph
    operators = {node.op_type for node in graph.node}
    assert {"TopK", "Gather"} <= operators
    assert not operators & {"NonZero", "Compress", "Unique", "Loop", "If", "Scan", "GatherND", "ScatterND"}
    assert [output.name for output in graph.output][-2:] == ["kept.0", "kept.1"]


def test_the_weights_are_stored_once(tiny_bundle: Bundle, tiny: LoadedModel) -> None:
    parameters = sum(p.numel() for p in tiny.model.model.language_model.parameters())
    decoder = 4 * (parameters - tiny.family.decoder().embed_tokens.weight.numel() + tiny.model.lm_head.weight.numel())
    size = tiny_bundle.file(DECODER).stat().st_size + tiny_bundle.file(f"{DECODER}.data").stat().st_size
    assert size < 1.5 * decoder + 300_000  # the graph itself takes some


def test_an_existing_output_is_refused(tiny: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep me")
    with pytest.raises(UsageError, match="--force"):
        export_bundle(tiny, tiny_plan, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_export_leaves_nothing(
    stage: str, error: Any, tiny: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("trace_vision", "trace_embedding", "trace_decoder"):
        monkeypatch.setattr(exporter, name, lambda *_: None)

    class Interrupt(Silent):
        def begin(self, stage_begun: str) -> None:
            if stage_begun == stage:
                raise error

    expected = EdgePruneError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        export_bundle(tiny, tiny_plan, tmp_path / "out", progress=Interrupt())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_the_old(tiny: LoadedModel, tiny_plan: KeepPlan, altered_bundle: Path) -> None:
    class Interrupt(Silent):
        def begin(self, stage: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny, tiny_plan, altered_bundle, force=True, progress=Interrupt())
    assert Bundle.load(altered_bundle).plan == tiny_plan
    assert [path.name for path in altered_bundle.parent.iterdir()] == [altered_bundle.name]


def test_too_little_space_is_said_before_work(
    tiny: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(EdgePruneError, match="GB are free"):
        export_bundle(tiny, tiny_plan, tmp_path / "out")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (KeepPlan("llava", 3, Geometry(84, 112, 14, 2)), "made for llava"),
        (KeepPlan("qwen2_vl", 8, Geometry(84, 112, 14, 2)), "8 decoder layers"),
        (KeepPlan("qwen2_vl", 3, Geometry(84, 112, 14, 1)), "divides that into"),
        (KeepPlan("qwen2_vl", 3, Geometry(84, 112, 14, 2), (Cut("input", "fastv", 3),)), "cannot act at site"),
    ],
)
def test_a_plan_for_something_else_is_refused(plan: KeepPlan, words: str, tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=words):
        export_bundle(tiny, plan, tmp_path / "out")

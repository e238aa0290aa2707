"""The export stage: a model folder and a plan go in, a bundle comes out, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from edgeprune.bundle import (
    CHAT_TEMPLATE,
    DECODER,
    EMBED,
    PLAN,
    PREDICTOR,
    PREPROCESSOR,
    SELECTOR,
    SPECIAL_TOKENS,
    TOKENIZER,
    VISION,
    Bundle,
    GraphRecord,
    Manifest,
    record_files,
)
from edgeprune.errors import EdgePruneError
from edgeprune.export.graphs import trace_decoder, trace_embedding, trace_predictor, trace_selector, trace_vision
from edgeprune.files import new_folder
from edgeprune.loading import LoadedModel, ModelFolder
from edgeprune.plan import KeepPlan
from edgeprune.targets import PLAIN, Lowering

STAGES = ("vision encoder", "embedding", "selection", "decoder", "processor", "manifest")
_PACKAGES = ("edgeprune", "torch", "transformers", "optimum", "onnx", "onnxscript")
Progress = Callable[[str], None]


def export_bundle(
    loaded: LoadedModel,
    plan: KeepPlan,
    output: Path,
    *,
    lowering: Lowering = PLAIN,
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> Bundle:
    """Trace a model under a plan, lower it and write the bundle; `progress` is called with each of STAGES as it begins.

    Raises PlanError when the plan was made for another model, UsageError when `output` exists and `force` is not given.
    """
    loaded.check_plan(plan)
    with new_folder(output, force=force) as folder:
        _check_space(loaded.folder, folder)
        graphs = _write_graphs(loaded, plan, lowering, folder, progress)
        progress("processor")
        _write_processor(loaded, plan, folder)
        plan.save(folder / PLAN)
        progress("manifest")
        _manifest(loaded, lowering, graphs, folder).save(folder)
    return Bundle.load(output)


def _write_graphs(
    loaded: LoadedModel, plan: KeepPlan, lowering: Lowering, folder: Path, progress: Progress
) -> dict[str, GraphRecord]:
    (folder / VISION).parent.mkdir()
    parts, graphs = loaded.family.decoder(), dict[str, GraphRecord]()
    temporal = int(loaded.folder.processor.get("temporal_patch_size", 1))
    progress("vision encoder")
    pixels = 3 * temporal * plan.geometry.patch**2
    graphs[VISION] = trace_vision(loaded.family, plan, pixels, lowering, folder / VISION)
    progress("embedding")
    graphs[EMBED] = trace_embedding(parts.embed_tokens, lowering, folder / EMBED)
    progress("selection")
    if plan.input is not None:
        keys = graphs[VISION].outputs.get("vision_keys")
        key_dim = int(keys.shape[1]) if keys else 0
        graphs[SELECTOR] = trace_selector(parts, plan, key_dim, lowering, folder / SELECTOR)
    if plan.live:
        graphs[PREDICTOR] = trace_predictor(plan, lowering, folder / PREDICTOR)
    progress("decoder")
    graphs[DECODER] = trace_decoder(parts, loaded.family.position_axes, plan, lowering, folder / DECODER)
    return graphs


def _write_processor(loaded: LoadedModel, plan: KeepPlan, folder: Path) -> None:
    (folder / TOKENIZER).parent.mkdir()
    loaded.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    (folder / SPECIAL_TOKENS).write_text(json.dumps(loaded.special_tokens(), indent=2) + "\n", encoding="utf-8")
    (folder / CHAT_TEMPLATE).write_text(loaded.chat_template(), encoding="utf-8")
    (folder / PREPROCESSOR).write_text(json.dumps(loaded.processor(plan.geometry), indent=2) + "\n", encoding="utf-8")


def _manifest(loaded: LoadedModel, lowering: Lowering, graphs: Mapping[str, GraphRecord], folder: Path) -> Manifest:
    return Manifest(
        source=loaded.folder.source(),
        decoder=replace(loaded.decoder_shape(), cache_type=lowering.products),
        target=lowering.target.name,
        precision=lowering.precision,
        image_token=int(loaded.model.config.image_token_id),
        end_tokens=loaded.end_tokens(),
        versions={package: version(package) for package in _PACKAGES},
        graphs=graphs,
        files=record_files(folder),
    )


def _check_space(model: ModelFolder, folder: Path) -> None:
    # float32 weights, twice as large as the common 16-bit checkpoints, and the embedding table a second time.
    needed, free = 3 * model.bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise EdgePruneError(
            f"The bundle may take {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free beside it.",
            hint="Free some space, or write it elsewhere with -o.",
        )

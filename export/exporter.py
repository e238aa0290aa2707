"""Export a model under a keep plan to a bundle, atomically. Graphs with common weights share one weights file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
from torch import nn

from edgeprune.benchmark.expected import write_expected
from edgeprune.bundle import (
    CHAT_TEMPLATE,
    DECODER,
    EMBED,
    EXPECTED,
    MANIFEST,
    PLAN,
    PREDICTOR,
    PREPROCESSOR,
    ROUNDINGS,
    SELECTOR,
    SPECIAL_TOKENS,
    TOKENIZER,
    VISION,
    VISION_UNPRUNED,
    Bundle,
    GptqRecord,
    GraphRecord,
    Manifest,
    SmoothingRecord,
    SourceQuantization,
    float32_graph,
    own_weights_graph,
    tier_plan,
    tier_selector,
)
from edgeprune.bundle.graph_io import SIGNALS
from edgeprune.bundle.integrity import record_file, record_files
from edgeprune.calibration.data.samples import WeightSamples
from edgeprune.calibration.replay.layerwise import check_fitting, fitted_int4
from edgeprune.calibration.replay.products import wide_products
from edgeprune.calibration.replay.ranges import Roundings, input_roundings
from edgeprune.calibration.replay.reference import prompt_encoder
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.checkpoint.packed import PackedMatrix
from edgeprune.checkpoint.weights import stored_in
from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.export.passes.emulation import write_emulated
from edgeprune.export.passes.views import write_with_own_weights
from edgeprune.export.passes.widening import write_widened
from edgeprune.export.sizes import encoder_works
from edgeprune.export.tracing import has_buffers, trace_decoder, trace_embedding, trace_predictor, trace_selector, trace_vision
from edgeprune.families.base import Family
from edgeprune.io.files import new_folder
from edgeprune.io.progress import SILENT, Progress
from edgeprune.model import signals_for
from edgeprune.model.quantization import QUANTIZED
from edgeprune.model.smoothquant import save_roundings
from edgeprune.plan import KeepPlan
from edgeprune.plan.tiers import Tiers
from edgeprune.targets import PLAIN, Lowering

STAGES = ("products", "weights", "vision encoder", "embedding", "selection", "decoder", "processor", "manifest", "expected outputs")
_PACKAGES = ("edgeprune", "torch", "transformers", "optimum", "onnx", "onnxscript")
_BYTES = {
    "fp32": 4.0,
    "fp16": 2.0,
    "bf16": 2.0,
    "int8": 1.02,
    "fp8": 1.02,
    "int4": 0.55,
    "nvfp4": 0.6,
}  # per weight, including scales and graph overhead
# What writes a second form of a graph, without what ONNX Runtime lacks, if the graph has any.
_FOR_ONNXRUNTIME = {"bf16": write_widened, "nvfp4": write_emulated}
WeightKey = tuple[str, tuple[int, ...], bytes]  # type, shape and SHA-256 of the bytes


def export_bundle(
    loaded: LoadedModel,
    plan: KeepPlan | Tiers,
    output: Path,
    *,
    lowering: Lowering = PLAIN,
    data: WeightSamples | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Trace a model under a plan or several tiers, lower it and write the bundle.

    `data`: samples that int4 weights are fitted to by GPTQ; without, they are rounded to the nearest. For w8a8, fp8 and nvfp4,
    which need them, they decide the scales of inputs. `progress` is told each of STAGES as it begins, and how many weights are
    written. Before anything is traced, raises PlanError if the plan was made for another model, UnsupportedModelError if the model
    has no chat template, image token or end token, UsageError if `output` exists without `force`, or `data` can decide nothing or
    is missing where it is needed, and EdgePruneError if the disk is too small. Raises BadSampleError for a sample that cannot be
    used.
    """
    tiers = plan.plans if isinstance(plan, Tiers) else {"": plan}
    (_, first), *others = tiers.items()
    lower_tiers = dict(others)
    for tier in tiers.values():
        loaded.check_plan(tier)
    prompt_encoder(loaded, first.geometry)
    _check_kv(loaded, tiers.values(), lowering)
    lowering.check_samples(given=data is not None)
    if data is not None:
        check_fitting(loaded, lowering)
    with new_folder(output, force=force) as folder:
        _check_space(loaded, lowering, folder, fitting=data is not None and lowering.precision == "int4")
        progress.begin("products")
        wide = wide_products(loaded, first) if lowering.products == "float16" else None
        lowering = replace(lowering, wide=tuple(wide or ()))
        progress.begin("weights")
        roundings = _rounded_inputs(loaded, first, data, lowering, folder, progress)
        lowering = lowering if roundings is None else replace(lowering, roundings=roundings.found)
        with ExitStack() as fitting:
            if data is not None and roundings is None:
                scratch = Path(fitting.enter_context(TemporaryDirectory(dir=folder)))
                fitting.enter_context(fitted_int4(loaded, first, data, lowering, scratch, progress))
            graphs = _write_graphs(loaded, first, lower_tiers, lowering, folder, progress)
        progress.begin("processor")
        _write_processor(loaded, first, folder)
        _save_plans(first, lower_tiers, folder)
        progress.begin("manifest")
        manifest = _manifest(loaded, first, lowering, graphs, folder)
        manifest = replace(manifest, tiers=tuple(tiers) if lower_tiers else (), wide_products=wide, **_by_samples(data, roundings))
        progress.begin("expected outputs")
        if lowering.target.tensorrt is not None:
            write_expected(Bundle(folder, manifest, first, tuple(lower_tiers.values())))
            manifest = replace(manifest, files={**manifest.files, EXPECTED: record_file(folder / EXPECTED)})
        manifest.save(folder)
    return Bundle.load(output)


def _check_kv(loaded: LoadedModel, plans: Iterable[KeepPlan], lowering: Lowering) -> None:
    if lowering.kv == "int8" and not all(has_buffers(loaded.family.decoder(), plan) for plan in plans):
        raise UsageError(
            "Steps of this model under this plan cannot read an 8-bit KV cache: that takes heads of a multiple of 8 numbers, "
            "attention in every layer, no learned rate of DyRate and no cut that weighs.",
            hint="Leave --kv out.",
        )


def _write_graphs(
    loaded: LoadedModel, plan: KeepPlan, lower_tiers: Mapping[str, KeepPlan], lowering: Lowering, folder: Path, progress: Progress
) -> dict[str, GraphRecord]:
    (folder / VISION).parent.mkdir()
    parts, graphs = loaded.family.decoder(), dict[str, GraphRecord]()
    progress.begin("vision encoder")
    graphs[VISION] = trace_vision(loaded.family, plan, lowering, folder / VISION, progress)
    if plan.vision_cuts:
        unpruned = replace(plan, cuts=())
        graphs[VISION_UNPRUNED] = trace_vision(loaded.family, unpruned, lowering, folder / VISION_UNPRUNED, progress)
        share_weights(folder / VISION_UNPRUNED, folder / VISION)
    progress.begin("embedding")
    graphs[EMBED] = trace_embedding(parts, lowering, folder / EMBED, progress)
    progress.begin("selection")
    if plan.input is not None:
        signals, projector = _signals(loaded.family, plan, graphs[VISION])
        for path, tier in {SELECTOR: plan, **{tier_selector(name): lower_tiers[name] for name in lower_tiers}}.items():
            graphs[path] = trace_selector(parts, tier, signals, lowering, folder / path, projector)
    if plan.has_rate_predictor:
        graphs[PREDICTOR] = trace_predictor(plan, lowering, folder / PREDICTOR)
    progress.begin("decoder")
    axes, others = loaded.family.position_axes, tuple(lower_tiers.values())
    graphs[DECODER] = trace_decoder(parts, axes, plan, lowering, folder / DECODER, others, progress)
    if (write := _FOR_ONNXRUNTIME.get(lowering.precision)) is not None:
        for graph in graphs:
            write(folder / graph, folder / float32_graph(graph))
    for graph in graphs.keys() & {VISION, VISION_UNPRUNED} if lowering.rounds(lowering.precision) else ():
        write_with_own_weights(folder / graph, folder / own_weights_graph(graph))
    return graphs


def _signals(family: Family, plan: KeepPlan, vision: GraphRecord) -> tuple[dict[str, tuple[int, ...]], nn.Module | None]:
    # The shapes of the signals by name, and the projector if the features are among them.
    names = signals_for(plan, family)
    shapes = {name: tuple(map(int, vision.outputs[name].shape)) for name in names}
    return shapes, family.vision(plan.geometry).projector if len(names) == len(SIGNALS) else None  # type: ignore[return-value]


def _write_processor(loaded: LoadedModel, plan: KeepPlan, folder: Path) -> None:
    (folder / TOKENIZER).parent.mkdir()
    # The tokenizer's own `save` does not raise OSError on a full disk.
    (folder / TOKENIZER).write_text(loaded.tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / SPECIAL_TOKENS).write_text(json.dumps(loaded.special_tokens(), indent=2) + "\n", encoding="utf-8")
    (folder / CHAT_TEMPLATE).write_text(loaded.chat_template(loaded.family.image_text(plan.geometry)), encoding="utf-8")
    (folder / PREPROCESSOR).write_text(json.dumps(loaded.settings(plan.geometry), indent=2) + "\n", encoding="utf-8")


def _manifest(loaded: LoadedModel, plan: KeepPlan, lowering: Lowering, graphs: Mapping[str, GraphRecord], folder: Path) -> Manifest:
    tower: Any = loaded.family.vision(plan.geometry)
    return Manifest(
        source=replace(loaded.folder.source(), quantization=_quantization(loaded, tower, lowering)),
        decoder=replace(loaded.decoder_shape(), cache_type=lowering.products),
        target=lowering.target.name,
        precision=lowering.precision,
        kv=lowering.kv,
        encoder_blocks=tower.blocks,
        image=loaded.family.image_text(plan.geometry),
        end_tokens=loaded.end_tokens(),
        generation=loaded.generation_defaults(),
        versions={package: version(package) for package in _PACKAGES},
        graphs=graphs,
        files=record_files(folder, MANIFEST),
        encoder_work=encoder_works(loaded.family, plan),
    )


def _rounded_inputs(
    loaded: LoadedModel, plan: KeepPlan, data: WeightSamples | None, lowering: Lowering, folder: Path, progress: Progress
) -> Roundings | None:
    # How inputs of matrices become narrow, for w8a8, fp8 and nvfp4; the bundle keeps it for `verify`.
    if data is None or not lowering.inputs:
        return None
    roundings = input_roundings(loaded, plan, data, progress, kind=lowering.inputs)
    save_roundings(roundings.found, folder / ROUNDINGS)
    return roundings


def _save_plans(first: KeepPlan, lower_tiers: Mapping[str, KeepPlan], folder: Path) -> None:
    first.save(folder / PLAN)
    for name, plan in lower_tiers.items():
        (folder / tier_plan(name)).parent.mkdir(exist_ok=True)
        plan.save(folder / tier_plan(name))


def _by_samples(data: WeightSamples | None, roundings: Roundings | None) -> dict[str, Any]:
    # The manifest's records of what samples decided.
    if data is None:
        return {}
    taken = len(data.samples), data.sha256
    if roundings is None:
        return {"gptq": GptqRecord(*taken)}
    return {"smoothing": SmoothingRecord(*taken, len(roundings.found), roundings.lossy, roundings.left)}


def _quantization(loaded: LoadedModel, tower: nn.Module, lowering: Lowering) -> SourceQuantization | None:
    decoder = loaded.family.decoder()
    parts = {"layers": decoder.layers, "head": decoder.lm_head, "vision": tower}
    found = [(part, source) for part, module in parts.items() for source in stored_in(module).values()]
    packed = [(part, source) for part, source in found if isinstance(source, PackedMatrix)]
    if not packed:
        return None
    counts = Counter(
        "kept" if source.own_kind(lowering, part) else "requantized" if lowering.weights_of(part) in QUANTIZED else "dequantized"
        for part, source in packed
    )
    method = packed[0][1].packing.method
    return SourceQuantization(method, counts["kept"], counts["requantized"], counts["dequantized"])


def _check_space(loaded: LoadedModel, lowering: Lowering, folder: Path, *, fitting: bool) -> None:
    # Weights that are fitted are on the disk twice for a while.
    needed, free = _bytes(loaded, lowering), shutil.disk_usage(folder).free
    needed += int(sum(loaded.family.decoder().layer_weights) * _BYTES["int4"]) if fitting else 0
    if free < needed:
        raise EdgePruneError(
            f"The bundle will take {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free beside it.",
            hint="Free some space, or write it elsewhere with -o.",
        )


def _bytes(loaded: LoadedModel, lowering: Lowering) -> int:
    # The size of the weights as written: a head tied to the embedding table is stored as a separate matrix.
    decoder = loaded.family.decoder()
    parts = {"layers": decoder.layers, "head": decoder.lm_head, "embedding": decoder.embed_tokens}
    weights: dict[str, list[Any]] = {part: list(module.parameters()) for part, module in parts.items()}
    counted = {id(weight) for part in weights.values() for weight in part}
    weights["vision"] = [weight for weight in loaded.model.parameters() if id(weight) not in counted]
    return sum(int(weight.numel() * _BYTES[lowering.weights_of(part)]) for part, group in weights.items() for weight in group)


def share_weights(path: Path, other: Path) -> None:
    """Make the graph at `path` read its weights from the weights file of the graph `other` in the same folder.

    Weights match if type, shape and bytes are equal. Weights without a match are stored in the graph itself. The graph's own
    weights file is deleted.
    """
    available = {_weight_key(tensor): tensor for _, tensor in _external_weights(ir.load(other))}
    model, own_files = ir.load(path), set[Path]()
    for value, tensor in _external_weights(model):
        own_files.add(Path(tensor.path))
        match = available.get(_weight_key(tensor))
        name = str(value.name)
        if match is None:
            value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, shape=tensor.shape, name=name)
        else:
            value.const_value = ir.ExternalTensor(
                match.location, match.offset, match.length, match.dtype, shape=match.shape, name=name, base_dir=match.base_dir
            )
    ir.save(model, path)
    for file in own_files:
        file.unlink()


def _external_weights(model: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value, value.const_value


def _weight_key(tensor: ir.ExternalTensor) -> WeightKey:
    return str(tensor.dtype), tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).digest()

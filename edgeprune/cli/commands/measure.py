"""Commands that measure or estimate: bench, estimate, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.help import command
from edgeprune.cli.options import (
    bundle_argument,
    check_plan_options,
    fit_option,
    fleet_option,
    force_option,
    json_option,
    plan_options,
    provider_option,
    refuse_model_options,
    renamed_option,
    resolve_plan,
    source_options,
    threads_option,
    trust_option,
)
from edgeprune.errors import UsageError, require_extra
from edgeprune.io.files import check_output
from edgeprune.targets import PRECISIONS, Lowering

if TYPE_CHECKING:
    from edgeprune.device.workload import ModelSizes
    from edgeprune.plan import KeepPlan

_PICTURES = (".png", ".svg", ".pdf")


@command()
@bundle_argument
@click.option(
    "--compare",
    default="none",
    show_default=True,
    help="What to put beside it, with commas: none (the same unpruned), random, uniform, paths of other bundles.",
)
@click.option("--contexts", default="", help="Text tokens in the cache at which ms per token is measured, such as 200,1000,2000.")
@click.option(
    "--visual-tokens",
    "kept",
    default="",
    help="Numbers of visual tokens with which the first token is measured, such as 256,1024,4096.",
)
@renamed_option("--kept", "--visual-tokens", "numbers of visual tokens")
@click.option(
    "--device-report", type=click.Path(path_type=Path), help="Take the machine's peaks from what `edgeprune profile` wrote."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it: a .png, .svg or .pdf.")
@force_option
@click.option("--image", type=click.Path(path_type=Path), help="The image to ask about.  [default: a TableTop scene]")
@click.option("--prompt", help="The question.  [default: what is on the table]")
@click.option("--tokens", default=32, show_default=True, help="Tokens of every answer; end tokens do not end it.")
@click.option("--repeats", default=10, show_default=True, help="Rounds, in each of which all are measured in turns.")
@threads_option
@provider_option
@fleet_option
@fit_option
@json_option
def bench(
    bundle: Path,
    compare: str,
    contexts: str,
    kept: str,
    plot: Path | None,
    force: bool,
    repeats: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what a question costs with BUNDLE on this machine.

    Times, memory, energy and share of the roofline, beside no pruning, other methods or other bundles.

    \b
    Example: edgeprune bench table.bundle --compare none,uniform
    """
    options["contexts"], options["kept"] = (
        parse_counts(contexts, "--contexts 200,1000,2000"),
        parse_counts(kept, "--visual-tokens 256,1024"),
    )
    names = [name.strip() for name in compare.split(",") if name.strip()]
    if plot is not None:
        require_extra("plot", "matplotlib")
        check_output(plot, force=force, inputs=[bundle, options["device_report"], options["image"]])
        _check_picture(plot)
    from edgeprune.benchmark.run import benchmark
    from edgeprune.cli.output.measure import show_benchmark
    from edgeprune.cli.output.progress import CommandProgress

    with CommandProgress(quiet=as_json) as progress:
        result = benchmark(bundle, compare=names, repeats=repeats, progress=progress, **options)
    show_benchmark(result, as_json)
    if plot is not None:
        from edgeprune.benchmark.chart import draw

        draw(result, plot)


def parse_counts(text: str, example: str) -> list[int]:
    """Return [200, 1000] for "200,1000"; an empty list for an empty text."""
    try:
        counts = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"{text!r} are no numbers of tokens.", hint=f"Write them with commas: {example}") from error
    return counts


def _check_picture(plot: Path) -> None:
    if plot.suffix not in _PICTURES:
        raise UsageError(f"Cannot draw {plot}.", hint=f"Name a file as {', '.join(_PICTURES)}.")


@command()
@click.argument("model", metavar="MODEL_OR_BUNDLE")
@click.option("--device", "module_name", required=True, help="A Jetson module, such as orin-nano, orin-nx, agx-orin or thor.")
@click.option("--text-tokens", default=32, show_default=True, help="Tokens of the question.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of the answer.")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), help="Of the engines.  [default: the bundle's; fp16 for a model or fp32]"
)
@source_options
@plan_options
@trust_option
@json_option
def estimate(
    model: str, module_name: str, text_tokens: int, tokens: int, precision: str | None, as_json: bool, **request: Any
) -> None:
    """Estimate whether a model fits a Jetson, and how fast it is.

    MODEL_OR_BUNDLE is a bundle, or what `edgeprune export` takes, with the same plan options: a transformers folder, an id of the
    Hugging Face Hub, or `tabletop`. Of a model no weights are read or downloaded. A checkpoint that is quantized counts in
    --precision, and so does an adapter, merged.

    A roofline of the module's peak numbers, not a measurement; `edgeprune profile` measures.

    \b
    Example: edgeprune estimate Qwen/Qwen2-VL-2B-Instruct --device orin-nano --precision int4 --image-size 448x448
    """
    from edgeprune.bundle import is_bundle
    from edgeprune.cli.output.estimate import show_estimate
    from edgeprune.device import jetson, workload

    module, bundle_precision = jetson.module_named(module_name), None
    question = {"text_tokens": text_tokens, "generated": tokens}
    if is_bundle(Path(model)):
        sizes, plan, bundle_precision = _sizes_of_bundle(Path(model), request)
        # Engines of float32 graphs are usually built with FP16 allowed; the output states this assumption.
        chosen = precision or ("fp16" if bundle_precision == "fp32" else bundle_precision)
    else:
        chosen = precision or "fp16"
        sizes, plan = _sizes_of_model(model, Lowering(module.target, chosen), request, as_json)
    show_estimate(workload.workload(sizes, plan, **question, precision=chosen), module, bundle_precision, as_json)


def _sizes_of_bundle(path: Path, request: dict[str, Any]) -> tuple[ModelSizes, KeepPlan, str]:
    from edgeprune.bundle import Bundle
    from edgeprune.device.workload import ModelSizes

    del request["trust_remote_code"]
    refuse_model_options(path, request.pop("revision"), request.pop("adapter"), request)
    bundle = Bundle.load(path)
    return ModelSizes.of(bundle), bundle.plan, bundle.manifest.precision


def _sizes_of_model(model: str, lowering: Lowering, request: dict[str, Any], quiet: bool) -> tuple[ModelSizes, KeepPlan]:
    from edgeprune.checkpoint.configuration import check_folder
    from edgeprune.checkpoint.loading import load_outline, resolve_model

    folder = resolve_model(model, **{name: request.pop(name) for name in ("revision", "adapter", "trust_remote_code")})
    check_plan_options(folder, **request)
    check_folder(folder)
    require_extra("export", "torch", "transformers", "optimum", "onnx", "onnxscript")
    from edgeprune.cli.output.progress import CommandProgress
    from edgeprune.export.sizes import sizes_of

    with CommandProgress(quiet=quiet) as progress:
        progress.say("counting operations and bytes")
        outline = load_outline(folder)
        plan = resolve_plan(outline, **request)
        return sizes_of(outline, plan, lowering), plan


@command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine can do, and what stands in the way.

    Each obstacle comes with the command that removes it. Where TensorRT is installed, CUDA and TensorRT are called once,
    and where ONNX Runtime offers CUDA, it computes a product there, each in a process of its own.
    """
    from functools import partial

    from edgeprune.cli.output.measure import show_diagnosis
    from edgeprune.device.doctor import diagnose
    from edgeprune.device.gpu import try_gpu
    from edgeprune.device.machine import read_machine
    from edgeprune.device.onnxruntime_cuda import COMMAND

    diagnosis = diagnose(read_machine(), try_gpu, partial(try_gpu, COMMAND))
    show_diagnosis(diagnosis, as_json)
    ctx.exit(0 if diagnosis.can_run else 1)

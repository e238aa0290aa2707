"""Commands that measure accuracy: eval, compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.help import command
from edgeprune.cli.options import (
    FORMATS,
    METRICS,
    check_plan_options,
    fit_option,
    fleet_option,
    geometry_options,
    json_option,
    parse_shares,
    plan_options,
    provider_option,
    ray_option,
    refuse_model_options,
    resolve_plan,
    skip_option,
    source_options,
    tier_option,
    trust_option,
)
from edgeprune.errors import UsageError, require_extra
from edgeprune.io.files import check_output

if TYPE_CHECKING:
    from edgeprune.calibration.data.samples import BadSampleError, Sample
    from edgeprune.checkpoint.loading import ModelFolder
    from edgeprune.runtime import Runtime

_DATA_OPTIONS = ("data", "data_format", "image_folder", "split", "limit")
_NO_PLAN: dict[str, Any] = {"plan_file": None, "method": None, "keep": (), "layer": (), "seed": 0}
_PICTURE = "curves.png"


def _data_options(command: Any) -> Any:
    options = (
        click.option(
            "--data",
            required=True,
            type=click.Path(path_type=Path),
            help="JSON lines of image, prompt, answer, kind; or see --format.",
        ),
        click.option(
            "--format", "data_format", type=click.Choice(FORMATS), help="The published benchmark that the data is a file of."
        ),
        click.option(
            "--images",
            "image_folder",
            type=click.Path(path_type=Path),
            help="With --format: the folder of its images.  [default: beside the data]",
        ),
        click.option("--split", help="With --format: of several splits the one to use."),
        click.option("--limit", type=click.IntRange(min=1), help="Only the first N samples."),
        skip_option,
        click.option(
            "--metric",
            type=click.Choice(METRICS),
            help="How answers are scored.  [default: that of the format, else exact, facts for descriptions]",
        ),
        click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer, in tokens."),
        click.option("--device", help="Where torch runs a model that is no bundle: cpu or cuda.  [default: cpu]"),
        ray_option,
        fit_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


@command("eval")
@click.argument("model")
@_data_options
@click.option(
    "--predictions", type=click.Path(path_type=Path), help="Write each answer to this file of JSON lines; go on where it ends."
)
@provider_option
@fleet_option
@tier_option
@source_options
@plan_options
@trust_option
@json_option
def eval_command(model: str, as_json: bool, **options: Any) -> None:
    """Measure accuracy over a file of questions, pruned and not.

    MODEL is a bundle, a transformers folder, an id of the Hugging Face Hub, or `tabletop`. Agreement is the share of answers that
    equal those without pruning. The plan options are for models: a bundle has its plan.

    \b
    Example: edgeprune eval table.bundle --data scenes/dataset.jsonl
    """
    from edgeprune.calibration.cluster import Cluster
    from edgeprune.calibration.evaluation import EvaluationError, evaluate, on_cluster
    from edgeprune.calibration.metrics import metric_for
    from edgeprune.calibration.predictions import Predictions
    from edgeprune.cli.output.evaluate import show_evaluation
    from edgeprune.cli.output.progress import CommandProgress

    skipped: list[BadSampleError] = []
    on_bad = skipped.append if options.pop("skip_bad") else None
    data, asked, output = options["data"], options.pop("metric"), options.pop("predictions")
    if output is not None:
        check_output(output, force=True, inputs=[data, Path(model)])
    samples, published = _read_data(on_bad, **{name: options.pop(name) for name in _DATA_OPTIONS})
    metric, samples = metric_for(asked or published, samples, on_bad)
    answering = {name: options.pop(name) for name in ("fit", "tier", "max_tokens")}
    run = {"metric": metric.name, "provider": options["device"] or options["provider"]}
    run |= {name: str(value) for name, value in answering.items()}
    address = options.pop("ray_address")
    opened = _open_model(model, **options)
    kept = None if output is None else Predictions(output, {"model": opened.identity(), **run}, samples)
    try:
        with CommandProgress(quiet=as_json) as progress:
            progress.say("loading the model")
            runtime = opened.load()
            with Cluster(address) if address else nullcontext() as cluster:
                ask = on_cluster(cluster, opened.elsewhere(runtime)) if cluster else None
                counted = progress.count("samples", len(samples))
                report = evaluate(
                    runtime, samples, **answering, metric=metric, predictions=kept, progress=counted, on_bad=on_bad, ask=ask
                )
    except EvaluationError as error:  # what was measured before it is not lost
        show_evaluation(error.report, skipped, as_json)
        raise
    show_evaluation(report, skipped, as_json)
    if skipped and not report.kinds:
        raise UsageError(f"None of the samples in {data} could be used.")


def _read_data(
    on_bad: Any, data: Path, data_format: str | None, image_folder: Path | None, split: str | None, limit: int | None
) -> tuple[list[Sample], str | None]:
    # The samples, and the metric of their format.
    if data_format is None:
        from edgeprune.calibration.data.samples import read_samples

        if image_folder is not None or split is not None:
            named = "--split" if image_folder is None else "--images"
            raise UsageError(f"{named} is for published files.", hint=f"Say which: --format {'|'.join(FORMATS)}")
        return read_samples(data, limit, on_bad=on_bad), None
    from edgeprune.calibration.data.formats import read_format

    read = read_format(data_format, data, limit, images=image_folder, split=split, on_bad=on_bad)
    if read.without_image:
        click.echo(f"questions without an image, left out: {read.without_image}", err=True)
    return read.samples, read.metric


@command()
@click.argument("model")
@click.option(
    "--methods",
    default="",
    metavar="NAMES",
    help="Methods with commas, resize, or MODULE:CLASS of your own.  [default: all that the model supports]",
)
@click.option(
    "--keep",
    default="0.5,0.25,0.1",
    show_default=True,
    help="Shares of all visual tokens that stay, averaged over the decoder's layers.",
)
@click.option("--plan", "plans", multiple=True, type=click.Path(path_type=Path), help="A keep plan to compare too; repeatable.")
@click.option(
    "--calibrate-on",
    type=click.Path(path_type=Path),
    help="Other samples, for methods that learn: fitprune, learned, plphp, vtw.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="A folder for table, picture, plans and answers."
)
@_data_options
@geometry_options
@source_options
@trust_option
@json_option
def compare(model: str, methods: str, keep: str, as_json: bool, **options: Any) -> None:
    """Compare methods over a file of questions, at equal cost.

    MODEL is a transformers folder, an id of the Hugging Face Hub, or `tabletop`; PyTorch computes it. The unpruned model answers
    once, then every method at every share of --keep, and every --plan. The share is that of the visual tokens, averaged over the
    decoder's layers; for plphp that of its KV cache. The same command again goes on where it was interrupted.

    \b
    Example: edgeprune compare tabletop --data scenes/dataset.jsonl -o comparison
    """
    from edgeprune.calibration.metrics import metric_for
    from edgeprune.calibration.options import CompareOptions

    request = CompareOptions(
        tuple(name.strip() for name in methods.split(",") if name.strip()),
        parse_shares(keep),
        data=options["data"],
        device=options.pop("device") or "cpu",
        **{name: options.pop(name) for name in ("plans", "calibrate_on", "output", "fit", "max_tokens", "ray_address")},
    )
    request.check()
    skipped: list[BadSampleError] = []
    skips, asked = options.pop("skip_bad"), options.pop("metric")
    on_bad = skipped.append if skips else None
    samples, published = _read_data(on_bad, **{name: options.pop(name) for name in _DATA_OPTIONS})
    metric, samples = metric_for(asked or published, samples, on_bad)
    unpruned_request = _NO_PLAN | {name: options.pop(name) for name in ("image_size", "frames", "fps")}
    folder = _checked_folder(model, request.device, **options, **unpruned_request)
    require_extra("plot", "matplotlib")
    from edgeprune.calibration.compare import columns, run_compare
    from edgeprune.calibration.replay.episodes import usable_samples
    from edgeprune.checkpoint.loading import fetch_weights, load_model
    from edgeprune.cli.output.evaluate import show_comparison
    from edgeprune.cli.output.progress import CommandProgress
    from edgeprune.report.comparison import draw

    with CommandProgress(quiet=as_json) as progress:
        progress.say("loading the model")
        fetch_weights(folder)
        loaded = load_model(folder)
        unpruned = resolve_plan(loaded, **unpruned_request)
        if skips:
            samples = usable_samples(loaded, unpruned, samples, request.fit, skipped.append, progress)
        rows, without = run_compare(request, loaded, unpruned, samples, metric, progress)
    table = [row.entry.name for row in rows], columns(rows)
    draw(*table, request.output / _PICTURE)
    show_comparison(*table, without, skipped, request.output, as_json)


@dataclass(frozen=True)
class _Opened:
    # A model whose options were checked. `identity`: says in predictions which it is. `load`: does the heavy work. `elsewhere`:
    # returns what opens the loaded model in another process.
    identity: Callable[[], str]
    load: Callable[[], Runtime]
    elsewhere: Callable[[Runtime], Callable[[], Runtime]]


def _open_model(
    model: str,
    provider: str,
    trust: tuple[Path, ...],
    device: str | None,
    revision: str | None,
    adapter: str | None,
    trust_remote_code: bool,
    **plan_request: Any,
) -> _Opened:
    from edgeprune.bundle import is_bundle

    if is_bundle(Path(model)):
        refuse_model_options(Path(model), revision, adapter, plan_request)
        if device is not None:
            raise UsageError(f"{model} is a bundle, which torch does not run.", hint="Use --provider, or leave --device out.")
        from edgeprune.bundle.integrity import sha256_of
        from edgeprune.bundle.manifest import MANIFEST
        from edgeprune.runtime import load

        keys = [path.resolve() for path in trust]
        load_bundle = partial(load, Path(model).resolve(), provider=provider, cache_bytes=0, trust=keys)
        return _Opened(lambda: f"bundle {sha256_of(Path(model) / MANIFEST)[:16]}", load_bundle, lambda runtime: load_bundle)
    if provider != "cpu" or trust:
        hint = "Export it, or leave --provider and --trust out; see --device."
        raise UsageError(f"{model} is no bundle: PyTorch computes it.", hint=hint)
    folder = _checked_folder(model, device or "cpu", revision, adapter, trust_remote_code, **plan_request)
    from edgeprune.calibration.replay.reference import open_reference, reference_model
    from edgeprune.checkpoint.loading import fetch_weights, load_model
    from edgeprune.runtime import Runtime

    def identity() -> str:
        fetch_weights(folder)
        return f"model {_fingerprint(folder.source().weights_sha256, **plan_request)}"

    def load_reference() -> Runtime:
        fetch_weights(folder)
        loaded = load_model(folder)
        return Runtime(reference_model(loaded, resolve_plan(loaded, **plan_request), device or "cpu"))

    return _Opened(identity, load_reference, lambda runtime: partial(open_reference, folder, runtime.plan, device or "cpu"))


def _checked_folder(
    model: str, device: str, revision: str | None, adapter: str | None, trust_remote_code: bool, **plan_request: Any
) -> ModelFolder:
    # A model that torch is to run, after all checks without its weights.
    from edgeprune.checkpoint.configuration import check_folder
    from edgeprune.checkpoint.loading import resolve_model

    folder = resolve_model(model, revision=revision, adapter=adapter, trust_remote_code=trust_remote_code)
    check_plan_options(folder, **plan_request)
    check_folder(folder)
    require_extra("export", "torch", "transformers", "optimum")
    from edgeprune.calibration.replay.reference import check_device

    check_device(device)
    return folder


def _fingerprint(weights: str, plan_file: Path | None, **plan_request: Any) -> str:
    plan = b"" if plan_file is None else plan_file.read_bytes()
    return hashlib.sha256(json.dumps([weights, plan.hex(), sorted(plan_request.items())]).encode()).hexdigest()[:16]

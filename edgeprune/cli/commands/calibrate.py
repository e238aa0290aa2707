"""Commands that calibrate and report keep budgets: calibrate, merge, profile, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.help import MethodName, command
from edgeprune.cli.options import (
    Share,
    bundle_argument,
    fit_option,
    fleet_option,
    force_option,
    json_option,
    option_option,
    parse_method_options,
    parse_shard,
    parse_share,
    parse_size,
    provider_option,
    ray_option,
    renamed_option,
    skip_option,
    source_options,
    threads_option,
    trust_option,
)
from edgeprune.errors import UsageError, require_extra
from edgeprune.io.files import check_output
from edgeprune.registry import METHODS, options_of

_RANKING = {option.name: option for option in options_of("plphp")}
_COLLECT = (
    click.option("--limit", type=click.IntRange(min=1), help="Only N samples, drawn by the seed."),
    click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws samples, and DyRate's training noise."
    ),
    click.option("--rows", type=click.Choice(_RANKING["rows"].choices), help="Whose attention ranks caches.  [default: last]"),
    click.option(
        "--reduce",
        type=click.Choice(_RANKING["reduce"].choices),
        help="Query heads of one KV head count by mean or max.  [default: mean]",
    ),
    click.option("--spread", is_flag=True, help="Rank caches also by an even lattice."),
    click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer to learn from."),
    click.option("--image-size", help="Height x width in pixels, such as 448x448.  [default: the model's own]"),
    click.option(
        "--device", multiple=True, help="Where torch runs, cpu or cuda; or the target of --target-ttft, such as orin-nano."
    ),
    click.option("--shard", help="Only samples i, i + n ... of the file, as i/n; merge the statistics afterwards."),
    ray_option,
)
_ALLOCATE = (
    option_option,
    click.option("--site", type=click.Choice(["input", "cache"]), help="Where random and uniform act.  [default: input]"),
    click.option("--layer", type=int, help="First layer of a single cut, or of DyRate's."),
    click.option("--onto", type=click.Path(path_type=Path), help="Add the cuts to this plan."),
)
# --core 0.3 is short for --option core=0.3, and --prior for --option prior=yes.
_SHORT = ("core", "relevance", "allocate", "delta", "stages", "form"), ("prior", "follow", "train")
_SHORTHANDS = (
    *(click.option(f"--{name}", hidden=True) for name in _SHORT[0]),
    *(click.option(f"--{name}", is_flag=True, hidden=True) for name in _SHORT[1]),
)
_SEARCH = (
    click.option("--max-drop", help="auto: agreement that may be lost, such as 1%.  [default: 1%]"),
    click.option(
        "--target-flops", help="auto: share of the visual tokens' prefill work, such as 0.25; the vision encoder's is not in it."
    ),
    click.option("--target-kv", help="auto: share of the visual KV cache."),
    click.option("--target-ttft", help="auto: time to first token, the vision encoder's in it, such as 250ms."),
    click.option(
        "--target-reads", help="auto: share of the cached visual tokens that steps read, by DyRate behind the plan found."
    ),
    click.option("--times", type=click.Path(path_type=Path), help="auto: times that `edgeprune profile` measured."),
    click.option("--curve", type=click.Path(path_type=Path), help="auto: write all measured plans here."),
)


def _all_options(command: Any) -> Any:
    for option in reversed((*_COLLECT, *_ALLOCATE, *_SHORTHANDS, *_SEARCH)):
        command = option(command)
    return command


@command()
@click.argument("model")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="JSON lines of image, prompt; answers are not needed.")
@click.option("--method", type=MethodName(), help="Method to make a plan of, or auto; without one, statistics alone are collected.")
@click.option("--budget", type=Share(), help="Share of the method's cost that the plan may spend, in (0, 1].")
@renamed_option("--keep", "--budget", "a share of the method's cost")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The plan to write.")
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    help="Kept here, and used from here; of learned, a folder.  [default: beside the plan]",
)
@force_option
@skip_option
@_all_options
@fit_option
@source_options
@trust_option
@json_option
def calibrate(model: str, data: Path, as_json: bool, **options: Any) -> None:
    """Learn a keep plan for MODEL from samples.

    MODEL is a transformers folder, an id of the Hugging Face Hub, or `tabletop`. Samples need no answers.

    --budget is a share of what the method spends without pruning: visual tokens (input methods), visual tokens averaged over the
    layers (layer methods), the visual KV cache (plphp), or reads of that cache while answering (dyrate).

    \b
    Example: edgeprune calibrate tabletop --data samples.jsonl --method plphp --budget 0.5 -o plan.json
    """
    from edgeprune.calibration.options import CalibrateOptions, prepare

    options["device"], options["device_name"] = _split_devices(options["device"])
    options["shard"] = parse_shard(options["shard"])
    options["image_size"] = parse_size(options["image_size"])
    for share in ("max_drop", "target_flops", "target_kv", "target_reads"):
        options[share] = parse_share(options[share])
    options["target_ttft"] = _parse_milliseconds(options["target_ttft"])
    options["settings"] = _settings(options)
    request = prepare(CalibrateOptions(model=model, data=data, **options))  # before torch is imported, which takes seconds
    require_extra("export", "torch", "transformers", "optimum")
    from edgeprune.checkpoint.loading import fetch_weights

    fetch_weights(request.folder)
    from edgeprune.calibration.calibrate import run_calibrate
    from edgeprune.cli.output.basic import show_calibration
    from edgeprune.cli.output.progress import CommandProgress

    with CommandProgress(quiet=as_json) as progress:
        result = run_calibrate(request, progress)
    show_calibration(result, as_json)


@command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The statistics of all.")
@force_option
@json_option
def merge(parts: tuple[Path, ...], output: Path, force: bool, as_json: bool) -> None:
    """Add the statistics of calibration shards.

    The result is that of one pass over all their samples.
    """
    check_output(output, force=force, inputs=parts)
    require_extra("export", "safetensors")
    from edgeprune.calibration.data.statistics import merge_files
    from edgeprune.cli.output.basic import show_facts

    merged = merge_files(parts, output)
    show_facts({"statistics": str(output), "samples": merged.samples}, as_json)


@command()
@bundle_argument
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The times to write.")
@force_option
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Runs of each part; medians are kept.")
@threads_option
@provider_option
@fleet_option
@json_option
def profile(bundle: Path, output: Path, force: bool, as_json: bool, **options: Any) -> None:
    """Measure the parts of a first token on this device.

    `edgeprune calibrate --method auto --target-ttft` takes the file that -o writes.
    """
    check_output(output, force=force, inputs=[bundle])
    from edgeprune.benchmark.profile import profile as measure
    from edgeprune.bundle import Bundle
    from edgeprune.cli.output.measure import show_profile
    from edgeprune.cli.output.progress import CommandProgress

    with CommandProgress(quiet=as_json) as progress:
        times = measure(Bundle.load(bundle), progress=progress, **options)
    times.save(output)
    show_profile(times, as_json)


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    # The options of the method by name, from --option and its shorthands, which are taken out of `options`.
    short = {name: options.pop(name) for name in (*_SHORT[0], *_SHORT[1])}
    texts = [f"{name}={'yes' if value is True else value}" for name, value in short.items() if value not in (None, False)]
    method, texts = options["method"], [*texts, *options.pop("option")]
    if method in METHODS:
        return parse_method_options(method, tuple(texts), calibration=True)
    if texts:
        name = texts[0].partition("=")[0]
        raise UsageError(f"Option {name!r} is for one method.", hint="Name it with --method. Its options: edgeprune methods NAME")
    return {}


def _split_devices(names: tuple[str, ...]) -> tuple[str, str | None]:
    # Split into torch's device and the device whose latency is predicted, given in any order.
    torch_names = [name for name in names if name.partition(":")[0] in ("cpu", "cuda")]
    targets = [name for name in names if name not in torch_names]
    if len(torch_names) > 1 or len(targets) > 1:
        raise UsageError(f"--device names several devices of a kind: {', '.join(names)}.")
    return next(iter(torch_names), "cpu"), next(iter(targets), None)


def _parse_milliseconds(text: str | None) -> float | None:
    if text is None:
        return None
    number, scale = (text[:-2], 1.0) if text.endswith("ms") else (text[:-1], 1e3) if text.endswith("s") else (text, 1.0)
    try:
        return float(number) * scale
    except ValueError as error:
        raise UsageError(f"{text!r} is no time.", hint="Write milliseconds or seconds, such as 250ms or 0.25s.") from error


@command()
@click.argument("target", metavar="PLAN|BUNDLE", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The HTML page to write.")
@click.option("--statistics", type=click.Path(path_type=Path), help="What `edgeprune calibrate` collected for this model.")
@click.option("--curve", type=click.Path(path_type=Path), help="What `edgeprune calibrate --method auto --curve` measured.")
@click.option("--image", type=click.Path(path_type=Path), help="An image to ask BUNDLE about.")
@click.option("--prompt", "prompts", multiple=True, help="The question; repeat it once to compare two.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer, in tokens.")
@force_option
@fit_option
@json_option
def report(output: Path, force: bool, as_json: bool, **request: Any) -> None:
    """Draw a plan or a bundle as one HTML page.

    The page needs no network. It shows budgets per layer and head, what calibration saw, the search's curve, and a bundle's answers
    with the patches that they saw.
    """
    check_output(output, force=force, inputs=[request[name] for name in ("target", "statistics", "curve", "image")])
    require_extra("plot", "matplotlib")
    from edgeprune.cli.output.basic import show_facts
    from edgeprune.cli.output.progress import CommandProgress
    from edgeprune.report.gather import ReportOptions
    from edgeprune.report.page import write_report

    with CommandProgress(quiet=as_json) as progress:
        progress.say("reading, asking and drawing")
        sections = write_report(ReportOptions(**request), output)
    show_facts({"report": str(output), "sections": ", ".join(sections)}, as_json)

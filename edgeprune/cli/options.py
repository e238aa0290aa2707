"""Options and parsers that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edgeprune.errors import UsageError

# As in edgeprune.runtime.backends.providers, which imports ONNX Runtime: too slow for --help.
PROVIDERS = ("cpu", "cuda", "ort-tensorrt", "openvino", "tensorrt")
FPS = 2.0
_SHOWN = ("image_size", "frames", "fps")  # what a model is asked about, which is no matter of budgets
F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
fit_option = click.option(
    "--fit",
    type=click.Choice(["exact", "stretch", "pad"]),
    default="exact",
    show_default=True,
    help="An image of another aspect than the bundle's: refuse, stretch or letterbox it.",
)
provider_option = click.option(
    "--provider",
    type=click.Choice(PROVIDERS),
    default="cpu",
    show_default=True,
    help="What computes: ONNX Runtime's cpu, cuda, ort-tensorrt or openvino, or the bundle's own engines (tensorrt).",
)
tier_option = click.option("--tier", help="Of a bundle with several plans the one to use.  [default: the first]")
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
signature_option = click.option(
    "--require-signature",
    multiple=True,
    metavar="KEY.pub",
    type=click.Path(path_type=Path),
    help="Refuse a bundle that this public key did not sign; repeat it for several, of which one suffices.",
)
check_option = click.option(
    "--check",
    type=click.Choice(["full", "fast"]),
    default="full",
    show_default=True,
    help="Read every file of the bundle to check it, or none that looks as when they were last read.",
)


def plan_options(command: F) -> F:
    """Add the options that say how to prune: a plan file, or a method with keep ratios and layers."""
    options = (
        click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A keep plan (JSON), or LightCompress's YAML."),
        click.option("--method", help="Which tokens to keep: see `edgeprune methods`; or MODULE:CLASS of your own."),
        click.option("--keep", multiple=True, type=float, help="Share of all visual tokens kept, in (0, 1]; repeatable."),
        click.option("--layer", multiple=True, type=int, help="Layer before which a --keep acts (0: the decoder's input)."),
        click.option("--site", type=click.Choice(["vision", "input", "layer"]), help="Where, if the method has several sites."),
        click.option("--seed", type=int, default=0, show_default=True, help="For methods that draw lots."),
        click.option("--image-size", help="Height x width in pixels, such as 448x448.  [default: the model's own]"),
        click.option("--frames", type=int, help="Of a video: how many frames are asked about at once."),
        click.option("--fps", type=float, help=f"Of a video: its frames a second.  [default: {FPS}]"),
    )
    for option in reversed(options):
        command = option(command)
    return command


def trust_option(command: F) -> F:
    """Add the options that say whose code may run."""
    options = (
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model folder brings along."),
        click.option(
            "--own-method",
            multiple=True,
            metavar="MODULE:CLASS",
            callback=lambda context, option, value: _allow(value),
            expose_value=False,
            help="Run a pruning method of your own that a plan names; repeatable.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return (height, width) of "448x336"; None stays None."""
    if text is None:
        return None
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise UsageError(f"{text!r} is no image size.", hint="Write height x width, such as 448x336.") from error
    return height, width


def parse_share(text: str | None) -> float | None:
    """Return 0.01 of "1%" or "0.01"; None stays None."""
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no share.", hint="Write 1% or 0.01.") from error


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Return (i, n) of "i/n"; None stays None."""
    if text is None:
        return None
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise UsageError(f"{text!r} is no shard.", hint="Write i/n, such as 1/4.") from error
    return index, count


def resolve_plan(
    loaded: Any,
    plan_file: Path | None,
    method: str | None,
    keep: tuple[float, ...],
    layer: tuple[int, ...],
    seed: int,
    site: str | None = None,
    **shown: Any,
) -> Any:
    """Return the keep plan that the plan options describe for a loaded model; no option at all means no pruning.

    `shown`: image_size, frames and fps, what the model is asked about.
    """
    from edgeprune.plan.presets import staircase_plan
    from edgeprune.registry import METHODS, allow_method, method_class

    if plan_file is not None:
        if method or keep or layer or seed or site:
            raise UsageError("--plan already says what --method, --keep, --layer, --site and --seed say.", hint="Give one of them.")
        return open_plan(plan_file, loaded, **shown)
    base = _whole(loaded, **shown)
    if method is None and not keep:
        if layer or site:
            raise UsageError(f"{'--layer' if layer else '--site'} needs --method and --keep.")
        return base
    if method is None or not keep:
        raise UsageError("--method and --keep belong together.", hint="For example: --method fastv --keep 0.25")
    if method not in METHODS and ":" in method:
        allow_method(method)  # to name it is to ask for it
    sites = method_class(method).sites
    if not {"vision", "input", "layer"} & set(sites):
        raise UsageError(f"{method} needs calibrated budgets.", hint=f"Make a plan: edgeprune calibrate --method {method}")
    site = _site(method, sites, site, layer)
    at_input = not layer and len(keep) == 1 and (site == "input" or "layer" not in sites)
    return staircase_plan(base, method, keep, (0,) if at_input else layer, seed=seed, site=site)


def resolve_tiers(loaded: Any, tier: tuple[str, ...], **plan_request: Any) -> Any:
    """Return the plans of --tier NAME=PLAN as one, or else the plan that the plan options describe."""
    from edgeprune.plan.tiers import Tiers

    if not tier:
        return resolve_plan(loaded, **plan_request)
    if any(value for name, value in plan_request.items() if name not in _SHOWN):
        raise UsageError("--tier already says what the other plan options say.", hint="Give one or the other.")
    shown = {name: plan_request[name] for name in _SHOWN}
    plans: dict[str, Any] = {}
    for text in tier:
        name, equals, path = text.partition("=")
        if not equals or not path or name in plans:
            raise UsageError(f"{text!r} is no tier of its own.", hint="Write NAME=PLAN, such as fast=fast.json, each name once.")
        plans[name] = open_plan(Path(path), loaded, **shown)
    return Tiers.of(plans)


def _allow(references: tuple[str, ...]) -> None:
    from edgeprune.registry import allow_method

    for reference in references:
        allow_method(reference)


def _site(method: str, sites: tuple[str, ...], site: str | None, layers: tuple[int, ...]) -> str | None:
    # Named, or the only one there is; else layers tell the input from the decoder.
    if site is not None and site not in sites:
        raise UsageError(f"{method} does not act at site {site!r}.", hint=f"It acts at: {', '.join(sites)}.")
    site = site or ("vision" if sites == ("vision",) else None)
    if site == "vision" and not layers:
        raise UsageError(f"{method} inside the vision encoder needs the number of a block.", hint="For example: --layer 4")
    return site


def open_plan(plan_file: Path, loaded: Any, **shown: Any) -> Any:
    """Return the plan in a file; one that has none of its own is read for a loaded model and what it is shown."""
    from edgeprune.calibration.interop.lightcompress import is_lightcompress, read_plan
    from edgeprune.plan import KeepPlan

    if is_lightcompress(plan_file):
        return read_plan(plan_file, _whole(loaded, **shown))
    for name, value in shown.items():
        if value is not None:
            raise UsageError(f"{plan_file} already says what --{name.replace('_', '-')} says.", hint="Give one of them.")
    return KeepPlan.load(plan_file)


def _whole(loaded: Any, image_size: str | None, frames: int | None = None, fps: float | None = None) -> Any:
    from edgeprune.plan.presets import unpruned_plan

    if frames is not None and frames < 1:
        raise UsageError(f"A video has frames, not {frames}.")
    if fps is not None and (frames is None or fps <= 0):
        raise UsageError("--fps is a number above 0, of a video with --frames.", hint="For example: --frames 8 --fps 2")
    geometry = loaded.geometry(parse_size(image_size), frames or 1, fps or FPS)
    return unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), geometry)

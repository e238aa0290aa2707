"""Options and parsers that several commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from edgeprune.cli.help import MethodName, OptionText
from edgeprune.errors import UsageError
from edgeprune.io.files import is_file
from edgeprune.targets import TARGETS, target_hint

# Copied from edgeprune.runtime.backends.providers, whose import of ONNX Runtime is too slow for --help.
PROVIDERS = ("cpu", "cuda", "ort-tensorrt", "openvino", "tensorrt")
# Likewise of edgeprune.calibration.metrics and edgeprune.calibration.data.formats.
METRICS = ("exact", "vqa", "anls", "choice", "yes-no", "facts", "cider")
FORMATS = ("pope", "gqa", "textvqa", "mmmu", "scienceqa", "coco-captions")
FPS = 2.0
_GEOMETRY_OPTIONS = ("image_size", "frames", "fps")  # may be combined with --tier
_SIZE_EXAMPLE = "Write height x width, such as 448x336."
F = TypeVar("F", bound=Callable[..., Any])


class Share(click.ParamType):
    """A share such as 0.25. A percentage is refused with the share that it means."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; its range is checked where it is used."""
        try:
            return float(value)
        except ValueError:
            percent = re.fullmatch(r"\s*(\d+(?:[.,]\d+)?)\s*%\s*", value)
            comma = re.fullmatch(r"\s*\d*,\d+\s*", value)
            number = float(percent[1].replace(",", ".")) / 100 if percent else float(value.replace(",", ".")) if comma else 0.25
            self.fail(
                f"{value!r} is no share. Write {'it as' if percent or comma else 'a number, such as'} {number:g}.", param, ctx
            )


class TargetName(click.Choice[str]):
    """The name of a target. The name of a machine is refused with the targets that it reads."""

    def __init__(self) -> None:
        super().__init__(list(TARGETS))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name."""
        if value not in TARGETS:
            self.fail(f"{value!r} is no target. {target_hint(value)}", param, ctx)
        return str(value)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
option_option = click.option(
    "--option",
    multiple=True,
    type=OptionText(),
    help="An option of the method, as `edgeprune methods NAME` lists them; repeatable.",
)
fit_option = click.option(
    "--fit",
    type=click.Choice(["exact", "stretch", "pad"]),
    default="exact",
    show_default=True,
    help="An image of another aspect than the bundle's: refuse, stretch or letterbox it.",
)
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
skip_option = click.option(
    "--skip-bad", is_flag=True, help="Leave out samples that cannot be used, and say which, instead of ending."
)
provider_option = click.option(
    "--provider",
    type=click.Choice(PROVIDERS),
    default="cpu",
    show_default=True,
    help="What computes: ONNX Runtime's cpu, cuda, ort-tensorrt or openvino, or the bundle's own engines (tensorrt).",
)
fleet_option = click.option(
    "--trust",
    multiple=True,
    metavar="KEY.pub",
    type=click.Path(path_type=Path),
    help="Load the engines that this public key signed (build --sign), of this or an equal board; repeat it for several.",
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="ONNX Runtime threads.  [default: all cores]")
tier_option = click.option("--tier", help="Of a bundle with several plans the one to use.  [default: the first]")
ray_option = click.option("--ray", "ray_address", help="Spread the samples over a Ray cluster: its address, or local.")
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


def renamed_option(old: str, new: str, meaning: str) -> Callable[[F], F]:
    """Add a hidden option that raises UsageError with its new name and what that means."""

    def refuse(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise UsageError(f"{old} of {context.info_name} is now {new}: {meaning}.", hint=f"Write {new} {value}")

    name = "former" + old.replace("-", "_")  # the new option may have the old one's parameter
    return click.option(old, name, hidden=True, expose_value=False, callback=refuse)


def plan_options(command: F) -> F:
    """Add the options that select a plan: a plan file, or a method with keep ratios and layers."""
    options = (
        click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A keep plan (JSON), or LightCompress's YAML."),
        click.option(
            "--method", type=MethodName(), help="Which tokens to keep: see `edgeprune methods`; or MODULE:CLASS of your own."
        ),
        click.option("--keep", multiple=True, type=Share(), help="Share of all visual tokens that stay, in (0, 1]; repeatable."),
        click.option(
            "--layer",
            multiple=True,
            type=int,
            help="Layer before which a --keep acts (0: the input).  [default: the input, else 2]",
        ),
        click.option("--site", type=click.Choice(["vision", "input", "layer"]), help="Where, if the method has several sites."),
        option_option,
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For methods that draw lots."),
        geometry_options,
    )
    for option in reversed(options):
        command = option(command)
    return command


def geometry_options(command: F) -> F:
    """Add the options that say which images or videos a model is asked about."""
    options = (
        click.option("--image-size", help="Height x width in pixels, such as 448x448.  [default: the model's own]"),
        click.option("--frames", type=int, help="Of a video: how many frames are asked about at once."),
        click.option("--fps", type=float, help=f"Of a video: its frames a second.  [default: {FPS}]"),
    )
    for option in reversed(options):
        command = option(command)
    return command


def source_options(command: F) -> F:
    """Add the options that say which model is meant, and what is merged into it."""
    options = (
        click.option("--revision", help="Branch, tag or commit of a model of the Hugging Face Hub.  [default: main]"),
        click.option("--adapter", help="Merge this LoRA adapter: a folder as peft writes it, or an id of the hub."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def trust_option(command: F) -> F:
    """Add the options that allow external code to run."""
    options = (
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings along."),
        click.option(
            "--own-method",
            multiple=True,
            metavar="MODULE:CLASS",
            callback=lambda context, option, value: _allow_methods(value),
            expose_value=False,
            help="Run a pruning method of your own that a plan names; repeatable.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return (height, width) for "448x336"; None for None."""
    if text is None:
        return None
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise UsageError(f"{text!r} is no image size.", hint=_SIZE_EXAMPLE) from error
    if min(height, width) < 1:
        raise UsageError(f"Image size {text} has no pixels.", hint=_SIZE_EXAMPLE)
    return height, width


def parse_share(text: str | None) -> float | None:
    """Return 0.01 for "1%" or "0.01"; None for None."""
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no share.", hint="Write 1% or 0.01.") from error


def parse_shares(text: str) -> tuple[float, ...]:
    """Return (0.5, 0.25) for "0.5,0.25"."""
    shares = [parse_share(part.strip()) for part in text.split(",") if part.strip()]
    return tuple(share for share in shares if share is not None)


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Return (i, n) for "i/n"; None for None."""
    if text is None:
        return None
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise UsageError(f"{text!r} is no shard.", hint="Write i/n, such as 1/4.") from error
    return index, count


def check_plan_options(
    folder: Any,
    plan_file: Path | None,
    method: str | None,
    keep: tuple[float, ...],
    layer: tuple[int, ...],
    seed: int,
    site: str | None = None,
    option: tuple[str, ...] = (),
    **geometry: Any,
) -> None:
    """Raise UsageError for plan options that contradict each other, the model's folder or a method. Imports no torch."""
    from edgeprune.calibration.interop.lightcompress import is_lightcompress
    from edgeprune.checkpoint.configuration import check_size
    from edgeprune.plan import KeepPlan, check_keep_ratio

    _check_geometry_options(**geometry)
    if plan_file is not None:
        if method or keep or layer or seed or site or option:
            named = "--method, --keep, --layer, --site, --option and --seed"
            raise UsageError(f"--plan already says what {named} say.", hint="Give one of them.")
        if not is_lightcompress(plan_file):
            _refuse_geometry(plan_file, geometry)
            KeepPlan.load(plan_file)
        elif not is_file(plan_file):
            raise UsageError(f"There is no file {plan_file}.", hint="Check the path.")
        return
    if method is not None or keep:
        _check_method_options(folder, method, keep, layer, site, option)
    elif layer or site or option:
        raise UsageError(f"{'--layer' if layer else '--site' if site else '--option'} needs --method and --keep.")
    for ratio in keep:
        check_keep_ratio(ratio)
    check_size(folder, parse_size(geometry["image_size"]), geometry.get("frames") or 1)


def check_tier_options(folder: Any, tier: tuple[str, ...], **plan_request: Any) -> None:
    """Raise UsageError for --tier options that cannot be met, or else as `check_plan_options` does. Imports no torch."""
    if not tier:
        check_plan_options(folder, **plan_request)
        return
    if any(value for name, value in plan_request.items() if name not in _GEOMETRY_OPTIONS):
        raise UsageError("--tier already says what the other plan options say.", hint="Give one or the other.")
    unset: dict[str, Any] = {"method": None, "keep": (), "layer": (), "seed": 0}
    geometry = {name: plan_request[name] for name in _GEOMETRY_OPTIONS}
    for path in tier_files(tier).values():
        check_plan_options(folder, plan_file=path, **unset, **geometry)


def refuse_model_options(bundle: Path, revision: str | None, adapter: str | None, plan_request: Mapping[str, Any]) -> None:
    """Raise UsageError for options that say which model and plan are meant: a bundle has its own."""
    if revision or adapter:
        raise UsageError(f"{bundle} is a bundle: its model is frozen in.", hint="Leave --revision and --adapter out.")
    if any(value for name, value in plan_request.items() if name != "seed"):
        raise UsageError(f"{bundle} is a bundle: its plan is frozen in.", hint="Export another bundle for another plan.")


def resolve_plan(
    loaded: Any,
    plan_file: Path | None,
    method: str | None,
    keep: tuple[float, ...],
    layer: tuple[int, ...],
    seed: int,
    site: str | None = None,
    option: tuple[str, ...] = (),
    **geometry: Any,
) -> Any:
    """Return the keep plan of the plan options for a loaded model; the unpruned plan without options.

    `geometry`: the options image_size, frames and fps. The options have passed `check_plan_options`.
    """
    from edgeprune.plan.presets import staircase_plan
    from edgeprune.registry import METHODS, allow_method, method_class

    if plan_file is not None:
        return open_plan(plan_file, loaded, **geometry)
    base = _unpruned_plan(loaded, **geometry)
    if method is None:
        return base
    if method not in METHODS and ":" in method:
        allow_method(method)  # the user named it, which allows it
    sites = method_class(method).sites
    site = _resolve_site(method, sites, site, layer)
    at_input = not layer and len(keep) == 1 and (site == "input" or (site is None and "input" in sites))
    options = parse_method_options(method, option)
    return staircase_plan(base, method, keep, (0,) if at_input else layer, seed=seed, site=site, options=options)


def resolve_tiers(loaded: Any, tier: tuple[str, ...], **plan_request: Any) -> Any:
    """Return the tiers of --tier NAME=PLAN, or else the plan of the plan options."""
    from edgeprune.plan.tiers import Tiers

    if not tier:
        return resolve_plan(loaded, **plan_request)
    geometry = {name: plan_request[name] for name in _GEOMETRY_OPTIONS}
    return Tiers.of({name: open_plan(path, loaded, **geometry) for name, path in tier_files(tier).items()})


def tier_files(tier: tuple[str, ...]) -> dict[str, Path]:
    """Return the plan files of --tier options by name; raise UsageError for one that is malformed or given twice."""
    files: dict[str, Path] = {}
    for text in tier:
        name, equals, path = text.partition("=")
        if not equals or not path or name in files:
            raise UsageError(f"{text!r} is no tier of its own.", hint="Write NAME=PLAN, such as fast=fast.json, each name once.")
        files[name] = Path(path)
    return files


def _allow_methods(references: tuple[str, ...]) -> None:
    from edgeprune.registry import allow_method

    for reference in references:
        allow_method(reference)


def parse_method_options(method: str, texts: tuple[str, ...], *, calibration: bool = False) -> dict[str, Any]:
    """Return the values of --option NAME=VALUE by name; raise UsageError for what the method does not take.

    `calibration`: whether the options that decide how many tokens stay may be among them. Imports no torch, unless the method is
    the user's own.
    """
    from edgeprune.plan.options import parse_options
    from edgeprune.registry import METHODS, options_of

    declared = options_of(method, calibration=calibration)
    if method in METHODS:
        later = {each.name for each in options_of(method, calibration=True)} - {each.name for each in declared}
        for text in texts:
            if (name := text.partition("=")[0]) in later:
                make = f"edgeprune calibrate MODEL --data FILE --method {method} --budget 0.5 --option {text} -o PLAN"
                raise UsageError(f"Option {name!r} of {method} decides how many tokens stay.", hint=f"Make a plan: {make}")
    return parse_options(method, texts, declared if declared or method in METHODS else None)


def _check_method_options(
    folder: Any,
    method: str | None,
    keep: tuple[float, ...],
    layer: tuple[int, ...],
    site: str | None,
    option: tuple[str, ...],
) -> None:
    from edgeprune.checkpoint.configuration import decoder_layers
    from edgeprune.plan.presets import cut_layers
    from edgeprune.registry import METHODS, sites_of, unknown_method

    if method is None or not keep:
        raise UsageError("--method and --keep belong together.", hint="For example: --method fastv --keep 0.25")
    if method not in METHODS:
        if ":" not in method:
            raise unknown_method(method, METHODS, "or package.module:Class")
        return
    sites = sites_of(method)
    if not {"vision", "input", "layer"} & set(sites):
        raise UsageError(
            f"{method} needs calibrated budgets.",
            hint=f"Make a plan: edgeprune calibrate MODEL --data FILE --method {method} --budget 0.5 -o PLAN",
        )
    site = _resolve_site(method, sites, site, layer)
    parse_method_options(method, option)
    _check_layers(method, sites, site, layer, None if site == "vision" else decoder_layers(folder))
    cut_layers(keep, layer)  # raises unless there is a layer for each ratio


def _check_layers(method: str, sites: tuple[str, ...], site: str | None, layers: tuple[int, ...], depth: int | None) -> None:
    # `depth`: the number of decoder layers, None if it is not known yet or does not matter.
    from edgeprune.plan.keep_plan import beyond_layers

    acts = f"It acts at: {', '.join(sites)}."
    for number in layers:
        meant = site or ("layer" if number else "input")
        if number < 0:
            last = "the last" if depth is None else str(depth - 1)
            raise UsageError(f"{method} cannot act at layer {number}.", hint=f"Layers are {int(site is not None)} to {last}.")
        if meant not in sites:
            remedy = "Leave --layer out." if meant == "layer" else "Give --layer 1 or more."
            raise UsageError(f"{method} cannot act at site {meant!r}, which --layer {number} means.", hint=f"{acts} {remedy}")
        if depth is not None and number >= depth:
            raise beyond_layers(f"{method} @ layer {number}", depth)


def _resolve_site(method: str, sites: tuple[str, ...], site: str | None, layers: tuple[int, ...]) -> str | None:
    # The named site, or "vision" if it is the only one; else None: layer numbers then select input or layer.
    if site is not None and site not in sites:
        raise UsageError(f"{method} does not act at site {site!r}.", hint=f"It acts at: {', '.join(sites)}.")
    site = site or ("vision" if sites == ("vision",) else None)
    if site == "vision" and not layers:
        raise UsageError(f"{method} inside the vision encoder needs the number of a block.", hint="For example: --layer 4")
    return site


def _check_geometry_options(image_size: str | None, frames: int | None = None, fps: float | None = None) -> None:
    parse_size(image_size)
    if frames is not None and frames < 1:
        raise UsageError(f"A video has frames, not {frames}.")
    if fps is not None and (frames is None or not 0 < fps < math.inf):
        raise UsageError("--fps is a number above 0, of a video with --frames.", hint="For example: --frames 8 --fps 2")


def open_plan(plan_file: Path, loaded: Any, **geometry: Any) -> Any:
    """Return the plan in a file; LightCompress YAML has no geometry and is read for a loaded model and geometry options."""
    from edgeprune.calibration.interop.lightcompress import is_lightcompress, read_plan
    from edgeprune.plan import KeepPlan

    if is_lightcompress(plan_file):
        return read_plan(plan_file, _unpruned_plan(loaded, **geometry))
    _refuse_geometry(plan_file, geometry)
    return KeepPlan.load(plan_file)


def _refuse_geometry(plan_file: Path, geometry: Mapping[str, Any]) -> None:
    for name, value in geometry.items():
        if value is not None:
            raise UsageError(f"{plan_file} already says what --{name.replace('_', '-')} says.", hint="Give one of them.")


def _unpruned_plan(loaded: Any, image_size: str | None, frames: int | None = None, fps: float | None = None) -> Any:
    from edgeprune.plan.presets import unpruned_plan

    geometry = loaded.geometry(parse_size(image_size), frames or 1, fps or FPS)
    return unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), geometry)

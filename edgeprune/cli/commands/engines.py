"""Commands about TensorRT: check, build, selftest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edgeprune.cli.help import command
from edgeprune.cli.options import TargetName, bundle_argument, fleet_option, force_option, json_option, signature_option
from edgeprune.errors import EngineError, UsageError, require_extra
from edgeprune.io.files import check_output
from edgeprune.targets import target_named

F = TypeVar("F", bound=Callable[..., Any])


def limit_options(command: F) -> F:
    """Add the options that limit the lengths of an engine's inputs."""
    options = (
        click.option("--context", default=2048, show_default=True, help="Text tokens that the caches may hold."),
        click.option("--turn", default=512, show_default=True, help="New text tokens in one turn."),
        click.option("--images", default=1, show_default=True, help="Images in one conversation."),
        click.option("--unpruned", is_flag=True, help="Engines that can also answer with every visual token."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@command()
@bundle_argument
@click.option("--target", type=TargetName(), help="What would read the graphs.  [default: the bundle's own]")
@limit_options
@signature_option
@json_option
@click.pass_context
def check(
    ctx: click.Context, /, bundle: Path, target: str | None, require_signature: tuple[Path, ...], as_json: bool, **limits: Any
) -> None:
    """Check the graphs of BUNDLE against what a target takes.

    Rules know what each TensorRT parses. With the extra `check`, NVIDIA's own parser and builder try every graph too; that needs no
    GPU.
    """
    from edgeprune.bundle import Bundle
    from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits

    opened = Bundle.load(bundle, require_signature=require_signature)
    profile_limits, checked = ProfileLimits(**limits), target_named(target or opened.manifest.target)
    require_extra("check", "onnx")
    from edgeprune.cli.output.engines import show_check
    from edgeprune.cli.output.progress import CommandProgress
    from edgeprune.export.checking import check_bundle, profiles_to_check

    with CommandProgress(list(profiles_to_check(opened, checked, profile_limits)), quiet=as_json) as progress:
        report = check_bundle(opened, checked, profile_limits, progress=progress)
    show_check(report, as_json)
    ctx.exit(0 if report.passed else 1)


@command()
@bundle_argument
@limit_options
@click.option("--level", type=click.IntRange(0, 5), default=3, show_default=True, help="How long the builder searches.")
@click.option(
    "--workspace",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Scratch memory that a layer may ask for, in MiB.",
)
@click.option("--reuse", multiple=True, type=click.Path(path_type=Path), help="A bundle whose engines of equal graphs are taken.")
@click.option("--ignore-memory", is_flag=True, help="Build even if memory looks too small.")
@click.option(
    "--sign",
    metavar="KEY.pem",
    type=click.Path(path_type=Path),
    help="Sign the engines for equal boards, which load them with --trust KEY.pub: see `edgeprune keygen`.",
)
@click.option("--dry-run", is_flag=True, help="Print profiles, memory and trtexec commands; needs neither GPU nor TensorRT.")
@signature_option
@json_option
def build(bundle: Path, reuse: tuple[Path, ...], dry_run: bool, as_json: bool, **request: Any) -> None:
    """Build the TensorRT engines of BUNDLE on this device.

    Engines fit one GPU and one TensorRT: build them where they will run, or on an equal board (--sign). --dry-run shows what would
    be built anywhere.
    """
    from edgeprune.cli.output.engines import show_engines, show_jobs
    from edgeprune.cli.output.progress import CommandProgress, EngineProgress
    from edgeprune.runtime.backends.tensorrt.build import BuildRequest, build_bundle, plan_build

    if dry_run and request["sign"] is not None:
        raise UsageError("--dry-run builds nothing that could be signed.", hint="Leave --sign or --dry-run out.")
    build_request = BuildRequest.of(bundle, reuse=reuse, **request)
    if dry_run:
        show_jobs(*plan_build(build_request), as_json)
        return
    try:
        with CommandProgress(quiet=as_json) as progress:
            results = build_bundle(build_request, EngineProgress(progress).advance)
    except EngineError as error:
        hint = error.hint or f"See what would be built: edgeprune build {shlex.quote(str(bundle))} --dry-run"
        raise EngineError(error.message, hint=hint) from error
    show_engines(bundle, results, build_request.sign, as_json)


@command()
@bundle_argument
@fleet_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the report as JSON, to send it to somebody.")
@force_option
@json_option
@click.pass_context
def selftest(ctx: click.Context, /, bundle: Path, trust: tuple[Path, ...], output: Path | None, force: bool, as_json: bool) -> None:
    """Compare the engines of BUNDLE with what `export` stored in it.

    Every graph and every step is compared, so that what differs is named. The report can be sent to us.
    """
    if output is not None:
        check_output(output, force=force, inputs=[bundle])
    from edgeprune.benchmark.selftest import STAGES
    from edgeprune.benchmark.selftest import selftest as run_selftest
    from edgeprune.bundle import Bundle
    from edgeprune.cli.output.engines import show_selftest
    from edgeprune.cli.output.progress import CommandProgress
    from edgeprune.io.files import write_text

    with CommandProgress(STAGES, quiet=as_json) as progress:
        report = run_selftest(Bundle.load(bundle), progress=progress, trust=trust)
    if output is not None:
        write_text(output, json.dumps(report.to_dict(), indent=2) + "\n")
    show_selftest(report, as_json)
    ctx.exit(0 if report.passed else 1)

"""Commands that create, verify and sign bundles: export, verify, keygen, sign."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.help import command
from edgeprune.cli.options import (
    TargetName,
    bundle_argument,
    check_tier_options,
    fit_option,
    force_option,
    json_option,
    plan_options,
    resolve_tiers,
    signature_option,
    source_options,
    tier_files,
    tier_option,
    trust_option,
)
from edgeprune.errors import UsageError, require_extra
from edgeprune.io.files import check_output
from edgeprune.targets import KV_KINDS, PRECISIONS, Lowering, target_named

if TYPE_CHECKING:
    from edgeprune.bundle import Source
    from edgeprune.calibration.data.samples import WeightSamples


@command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle folder to write.")
@source_options
@plan_options
@trust_option
@click.option("--target", type=TargetName(), default="onnxruntime", show_default=True, help="What will read the graphs.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="How weights are kept; with w8a8 and fp8 activations are 8-bit too, with nvfp4 4-bit. bf16 and w8a8 are for TensorRT on "
    "Orin and later, fp8 and nvfp4 for TensorRT on Thor.",
)
@click.option(
    "--kv",
    type=click.Choice(KV_KINDS),
    default="same",
    show_default=True,
    help="How decode steps keep keys and values: as they are computed, or in 8 bits, on --target cpu.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Samples (JSON lines of image, prompt, answer) that int4 weights are fitted to, by GPTQ (default: they are rounded), and "
    "that decide the scales of w8a8, by SmoothQuant, of fp8 and of nvfp4.",
)
@fit_option
@click.option(
    "--tier",
    multiple=True,
    metavar="NAME=PLAN",
    help="One of several plans in one bundle, the best first; repeatable. See docs/tiers.md.",
)
@force_option
@json_option
def export(model: str, output: Path, data: Path | None, fit: str, force: bool, as_json: bool, **request: Any) -> None:
    """Export MODEL as a bundle of ONNX graphs under a keep plan.

    MODEL is a transformers folder, an id of the Hugging Face Hub such as Qwen/Qwen2.5-VL-3B-Instruct, or `tabletop`, the bundled
    model; `tabletop-l` is a larger one, which `make instrument` makes. Without a plan nothing is pruned. Repeat --keep and --layer
    for a staircase: --method fastv --keep 0.5 --layer 2 --keep 0.25 --layer 4.

    \b
    Example: edgeprune export tabletop -o table.bundle --method zspaprune --keep 0.25
    """
    from edgeprune.checkpoint.configuration import check_folder
    from edgeprune.checkpoint.loading import fetch_weights, load_model, resolve_model

    # What can be refused by files and options alone is refused before torch is imported, which takes seconds.
    check_output(output, force=force, folder=True)
    lowering = Lowering(target_named(request.pop("target")), request.pop("precision"), kv=request.pop("kv"))
    samples = _weight_samples(data, fit, lowering)
    folder = resolve_model(model, **{name: request.pop(name) for name in ("revision", "adapter", "trust_remote_code")})
    adapter = folder.adapter.path if folder.adapter else None
    inputs = [folder.path, adapter, data, request["plan_file"], *tier_files(request["tier"]).values()]
    check_output(output, force=force, inputs=inputs, folder=True)
    check_tier_options(folder, **request)
    check_folder(folder)
    require_extra("export", "torch", "transformers", "optimum", "onnx", "onnxscript")
    fetch_weights(folder)
    from edgeprune.cli.output.basic import show_export
    from edgeprune.cli.output.progress import CommandProgress
    from edgeprune.export.exporter import STAGES, export_bundle

    with CommandProgress(["model", *STAGES], quiet=as_json) as progress:
        progress.begin("model")
        loaded = load_model(folder, on_disk=True)
        plan = resolve_tiers(loaded, **request)
        bundle = export_bundle(loaded, plan, output, lowering=lowering, data=samples, force=force, progress=progress)
    show_export(bundle, as_json)


def _weight_samples(data: Path | None, fit: str, lowering: Lowering) -> WeightSamples | None:
    from edgeprune.calibration.data.samples import WeightSamples

    if data is None and fit != "exact":
        raise UsageError("--fit is for the images of --data.", hint="Leave out --fit.")
    lowering.check_samples(given=data is not None)
    return None if data is None else WeightSamples.read(data, fit)


@command()
@bundle_argument
@tier_option
@click.option("--against", help="The model it was exported from.  [default: the name, commit and adapter in the manifest]")
@source_options
@signature_option
@trust_option
@json_option
@click.pass_context
def verify(ctx: click.Context, /, bundle: Path, require_signature: tuple[Path, ...], as_json: bool, **request: Any) -> None:
    """Compare BUNDLE with its model, stage by stage.

    Prompts and an answer without pruning are compared with transformers, everything else with the same model and plan in PyTorch.
    """
    from edgeprune.bundle import Bundle

    opened = Bundle.load(bundle, require_signature=require_signature)
    require_extra("export", "torch", "transformers", "optimum")
    from edgeprune.checkpoint.loading import fetch_weights, load_model, resolve_model
    from edgeprune.cli.output.basic import show_verification
    from edgeprune.cli.output.progress import CommandProgress
    from edgeprune.export.verification import STAGES
    from edgeprune.export.verification import verify as verify_bundle

    name, revision, adapter = _source(opened.manifest.source, request["against"], request["revision"], request["adapter"])
    folder = resolve_model(name, revision=revision, adapter=adapter, trust_remote_code=request["trust_remote_code"])
    fetch_weights(folder)
    with CommandProgress(["model", *STAGES], quiet=as_json) as progress:
        progress.begin("model")
        report = verify_bundle(opened, load_model(folder), progress, request["tier"])
    show_verification(report, as_json)
    ctx.exit(0 if all(stage.passed for stage in report) else 1)


def _source(source: Source, against: str | None, revision: str | None, adapter: str | None) -> tuple[str, str | None, str | None]:
    # The model, revision and adapter to compare with: the bundle's own, unless another model is named.
    if against is None:
        return source.model, revision or source.revision or None, adapter or source.adapter or None
    if source.adapter and adapter is None:
        raise UsageError(
            f"The bundle has the adapter {source.adapter} merged into its model.",
            hint=f"Give it too: --adapter {shlex.quote(source.adapter)}",
        )
    return against, revision or (source.revision if against == source.model else None) or None, adapter


@command()
@click.argument("key", type=click.Path(path_type=Path))
@json_option
def keygen(key: Path, as_json: bool) -> None:
    """Make a pair of keys to sign bundles with.

    KEY, such as robots.pem, is secret. robots.pub beside it goes to the robots.
    """
    from edgeprune.bundle.signing import make_key
    from edgeprune.cli.output.basic import show_facts

    public, name = make_key(key)
    show_facts({"private": str(key), "public": str(public), "key": name}, as_json)


@command()
@bundle_argument
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private Ed25519 key: see `edgeprune keygen`.")
@click.option("--force", is_flag=True, help="Replace a signature.")
@json_option
def sign(bundle: Path, key: Path, force: bool, as_json: bool) -> None:
    """Sign the manifest of BUNDLE after checking every file.

    --require-signature of other commands then takes this bundle and refuses altered ones.
    """
    from edgeprune.bundle import Bundle
    from edgeprune.bundle.signing import SIGNATURE, sign_manifest
    from edgeprune.cli.output.basic import show_facts

    Bundle.load(bundle)
    signature = sign_manifest(bundle, key, force=force)
    show_facts({"signature": str(bundle / SIGNATURE), "key": signature.key}, as_json)

"""Commands that inspect and list: tabletop, inspect, models, methods."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeprune.cli.help import MethodName, command
from edgeprune.cli.options import bundle_argument, force_option, json_option, open_plan
from edgeprune.errors import UsageError, require_extra
from edgeprune.io.files import is_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeprune.plan import KeepPlan
    from edgeprune.registry import Applicability


@command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--scenes", default=100, show_default=True, help="How many scenes to draw.")
@click.option("--seed", default=0, show_default=True, help="The same seed draws the same scenes.")
@click.option("--images", default=1, show_default=True, help="Images of a question: 1, or 2 to compare.")
@click.option("--kind", "kinds", multiple=True, help="A kind of question to ask; can be repeated.  [default: all]")
@force_option
@json_option
def tabletop(out: Path, scenes: int, seed: int, images: int, kinds: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Draw TableTop scenes with questions and answers into OUT.

    OUT/dataset.jsonl has a line for each question: image, prompt, answer, kind. With two images, a scene is a pair of them, and
    "image" lists both: which picture has an object, what has changed, how many objects there are together.
    """
    from edgeprune.cli.output.basic import show_facts
    from edgeprune.cli.output.progress import CommandProgress
    from edgeprune.tabletop.dataset import write_dataset

    with CommandProgress(quiet=as_json) as progress:
        count = progress.count("scenes", scenes)
        questions = write_dataset(out, scenes, seed, images=images, kinds=kinds, force=force, progress=count)
    show_facts({"dataset": str(out / "dataset.jsonl"), "scenes": scenes, "questions": questions, "seed": seed}, as_json)


@command()
@bundle_argument
@click.option("--model", help="What LightCompress's YAML is read for: a transformers folder, an id of the hub, or tabletop.")
@click.option("--image-size", help="And for which height x width in pixels.  [default: the model's own]")
@json_option
def inspect(bundle: Path, model: str | None, image_size: str | None, as_json: bool) -> None:
    """Show what a bundle or a plan holds.

    Every file of a bundle is checked against its manifest. --json of a plan is the plan itself, also of LightCompress's YAML.
    """
    from edgeprune.bundle import Bundle
    from edgeprune.calibration.interop.lightcompress import is_lightcompress
    from edgeprune.cli.output.basic import show_bundle, show_plan

    is_yaml = is_file(bundle) and is_lightcompress(bundle)
    if not is_yaml and (model or image_size):
        raise UsageError("--model and --image-size are for LightCompress's YAML.")
    if is_yaml:
        show_plan(_lightcompress_plan(bundle, model, image_size), as_json)
    elif is_file(bundle):
        show_plan(_plan_in(bundle), as_json)
    else:
        show_bundle(Bundle.load(bundle), as_json)


def _plan_in(path: Path) -> KeepPlan:
    from edgeprune.bundle import MANIFEST
    from edgeprune.plan import KeepPlan

    if path.name == MANIFEST:
        folder = shlex.quote(str(path.parent))
        raise UsageError(f"{path} is the manifest of a bundle.", hint=f"Give its folder: edgeprune inspect {folder}")
    return KeepPlan.load(path)


def _lightcompress_plan(path: Path, model: str | None, image_size: str | None) -> KeepPlan:
    if model is None:
        raise UsageError(f"How many tokens {path} keeps depends on the model.", hint="Say which: --model FOLDER")
    require_extra("export", "torch", "transformers", "optimum")
    from edgeprune.checkpoint.loading import load_model, resolve_model

    loaded = load_model(resolve_model(model))
    plan: KeepPlan = open_plan(path, loaded, image_size=image_size)
    loaded.check_plan(plan)
    return plan


@command()
@click.argument("model_type", required=False)
@json_option
def models(model_type: str | None, as_json: bool) -> None:
    """List the model families and which method acts where.

    With MODEL_TYPE, such as qwen2_vl: which method acts at which site of it, and why not.
    """
    from edgeprune.cli.output.basic import show_table
    from edgeprune.registry import FAMILIES, family_class, summary_of

    if model_type is None:
        rows = [[name, summary_of(reference)] for name, reference in sorted(FAMILIES.items())]
        show_table(["model_type", "family"], rows, as_json)
        return
    require_extra("export", "torch", "transformers")
    from edgeprune.registry import applicability

    found = applicability(family_class(model_type))
    if as_json:
        rows = [[field.method, field.site, field.reason or ", ".join(filter(None, ("yes", field.layers)))] for field in found]
        show_table(["method", "site", "applies"], rows, as_json=True)
        return
    methods = {field.method: [each for each in found if each.method == field.method] for field in found}
    show_table(
        ["method", "acts at", "not, because"], [[name, *_summary(fields)] for name, fields in methods.items()], as_json=False
    )


def _summary(fields: Sequence[Applicability]) -> tuple[str, str]:
    # Where a method acts, and why not elsewhere among its own sites.
    places = [" ".join(filter(None, (field.site, field.layers))) for field in fields if not field.reason]
    own = dict.fromkeys(f"{field.site}: {field.reason}" for field in fields if field.reason and field.own_site)
    return ", ".join(places) or "-", "; ".join(own)


@command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands and options.

    \b
    Example: edgeprune completion bash >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(ctx.find_root().command, {}, "edgeprune", "_EDGEPRUNE_COMPLETE").source())


@command()
@click.argument("method", required=False, type=MethodName())
@json_option
def methods(method: str | None, as_json: bool) -> None:
    """List the pruning methods, or the options of one.

    Options that decide how many tokens stay are for `edgeprune calibrate`: --method METHOD --option NAME=VALUE. It takes the others
    too, as do the commands that need no calibration.
    """
    from edgeprune.cli.output.basic import show_options, show_table
    from edgeprune.registry import METHODS, options_of, summary_of, unknown_method

    if method is None:
        rows = [[name, summary_of(reference)] for name, reference in sorted(METHODS.items())]
        show_table(["method", "keeps"], rows, as_json)
        return
    if method not in METHODS:
        raise unknown_method(method, METHODS)
    ranking = options_of(method)
    show_options(method, ranking, options_of(method, calibration=True)[len(ranking) :], as_json)

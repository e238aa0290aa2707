"""Commands that query a model: run, eval."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.help import command
from edgeprune.cli.options import (
    bundle_argument,
    check_option,
    check_plan_options,
    fit_option,
    force_option,
    json_option,
    plan_options,
    provider_option,
    refuse_model_options,
    resolve_plan,
    signature_option,
    skip_option,
    source_options,
    threads_option,
    tier_option,
    trust_option,
)
from edgeprune.errors import UsageError, require_extra
from edgeprune.io.files import check_output, image_format, is_file, save_image
from edgeprune.io.typed_json import is_text

if TYPE_CHECKING:
    from edgeprune.calibration.data.samples import BadSampleError


@command()
@bundle_argument
@click.option(
    "--image", multiple=True, type=click.Path(path_type=Path), help="The image to ask about; repeat it for the frames of a video."
)
@click.option("--prompt", help="The question.")
@click.option("--no-prune", is_flag=True, help="Run the same graphs with every visual token.")
@click.option("--overlay", type=click.Path(path_type=Path), help="Write a picture with the dropped patches greyed out.")
@force_option
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer, in tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="Only the most probable; 0 is all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus sampling.")
@click.option("--seed", type=click.IntRange(min=0), help="The same seed gives the same answer.")
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    help="Above 1, tokens that occurred become less likely.  [default: the checkpoint's own]",
)
@click.option("--keep-special-tokens", is_flag=True, help="Keep special tokens in the answer, such as those around boxes.")
@click.option("--stop", multiple=True, help="Text that ends the answer; repeatable.")
@tier_option
@click.option(
    "--deadline-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="End the answer by then, under a smaller budget if time is short.",
)
@threads_option
@provider_option
@fit_option
@check_option
@signature_option
@json_option
def run(bundle: Path, image: tuple[Path, ...], prompt: str | None, force: bool, as_json: bool, **options: Any) -> None:
    """Ask BUNDLE one question about images or a video.

    The answer is streamed. A receipt says what was pruned and how long it took.

    \b
    Example: edgeprune run table.bundle --image scene.png --prompt "What does the label say?"
    """
    prompt = _require_image_and_prompt(image, prompt)
    overlay, prune = options.pop("overlay"), not options.pop("no_prune")
    options["skip_special_tokens"] = not options.pop("keep_special_tokens")
    if overlay is not None:
        check_output(overlay, force=force, inputs=[bundle, *image])
        image_format(overlay)
    from edgeprune.cli.output.basic import show_answer
    from edgeprune.cli.output.progress import CommandProgress
    from edgeprune.runtime import load
    from edgeprune.runtime.media.images import read_image

    pictures = [read_image(path) for path in image]
    # A deadline selects the tier by the times of earlier answers, so these need a warm-up.
    has_deadline = options["deadline_ms"] is not None
    load_options = {name: options.pop(name) for name in ("threads", "provider", "check", "require_signature")}
    with CommandProgress(quiet=as_json) as progress:
        progress.say("loading the bundle")
        runtime = load(bundle, **load_options, warm_up=has_deadline)
    stream = runtime.stream(pictures, prompt, prune=prune, **options)
    answer = show_answer(stream, as_json)
    if overlay is not None:
        save_image(runtime.draw(pictures, stream.receipt, fit=options["fit"], question=prompt, answer=answer), overlay)


@command("eval")
@click.argument("model")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="JSON lines of image, prompt, answer, kind.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N samples.")
@skip_option
@provider_option
@fit_option
@tier_option
@source_options
@plan_options
@trust_option
@json_option
def eval_command(model: str, data: Path, limit: int | None, fit: str, tier: str | None, as_json: bool, **options: Any) -> None:
    """Measure accuracy over a file of questions, pruned and not.

    MODEL is a bundle, a transformers folder, an id of the Hugging Face Hub, or `tabletop`. Agreement is the share of answers that
    equal those without pruning. The plan options are for models: a bundle has its plan.

    \b
    Example: edgeprune eval table.bundle --data scenes/dataset.jsonl
    """
    from edgeprune.calibration.data.samples import read_samples
    from edgeprune.calibration.evaluation import EvaluationError, evaluate
    from edgeprune.cli.output.basic import show_evaluation
    from edgeprune.cli.output.progress import CommandProgress

    skipped: list[BadSampleError] = []
    on_bad = skipped.append if options.pop("skip_bad") else None
    samples = read_samples(data, limit, on_bad=on_bad)
    try:
        with CommandProgress(quiet=as_json) as progress:
            progress.say("loading the model")
            runtime = _open_model(model, **options)
            counted = progress.count("samples", len(samples))
            report = evaluate(runtime, samples, fit=fit, tier=tier, progress=counted, on_bad=on_bad)
    except EvaluationError as error:  # what was measured before it is not lost
        show_evaluation(error.report, skipped, as_json)
        raise
    show_evaluation(report, skipped, as_json)
    if skipped and not report.kinds:
        raise UsageError(f"None of the samples in {data} could be used.")


def _require_image_and_prompt(image: tuple[Path, ...], prompt: str | None) -> str:
    example = 'For example: --image table.png --prompt "What is on the table?"'
    if not image:
        raise UsageError("There is no image to ask about (--image).", hint=example)
    if prompt is None:
        raise UsageError("There is no question about the image (--prompt).", hint=example)
    if not is_text(prompt):
        raise UsageError("The --prompt is not UTF-8.", hint="Type it in a terminal whose locale is UTF-8.")
    if len(image) == 1 and not is_file(image[0]) and is_file(Path(prompt)):
        order = f"--image {shlex.quote(prompt)} --prompt {shlex.quote(str(image[0]))}"
        raise UsageError(f"There is no image {str(image[0])!r}, and --prompt names a file.", hint=f"In the other order: {order}")
    return prompt


def _open_model(
    model: str, provider: str, revision: str | None, adapter: str | None, trust_remote_code: bool, **plan_request: Any
) -> Any:
    from edgeprune.bundle import is_bundle

    if is_bundle(Path(model)):
        refuse_model_options(Path(model), revision, adapter, plan_request)
        from edgeprune.runtime import load

        return load(model, provider=provider, cache_bytes=0)
    if provider != "cpu":
        raise UsageError(f"{model} is no bundle: PyTorch computes it on the CPU.", hint="Export it, or leave --provider out.")
    from edgeprune.checkpoint.configuration import check_folder
    from edgeprune.checkpoint.loading import fetch_weights, load_model, resolve_model

    folder = resolve_model(model, revision=revision, adapter=adapter, trust_remote_code=trust_remote_code)
    check_plan_options(folder, **plan_request)
    check_folder(folder)
    require_extra("export", "torch", "transformers", "optimum")
    fetch_weights(folder)
    from edgeprune.calibration.replay.reference import reference_model
    from edgeprune.runtime import Runtime

    loaded = load_model(folder)
    return Runtime(reference_model(loaded, resolve_plan(loaded, **plan_request)))

"""The command that asks a bundle: run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from edgeprune.cli.help import command
from edgeprune.cli.options import (
    bundle_argument,
    check_option,
    fit_option,
    fleet_option,
    force_option,
    json_option,
    provider_option,
    signature_option,
    threads_option,
    tier_option,
)
from edgeprune.errors import UsageError
from edgeprune.io.files import check_output, image_format, is_file, save_image
from edgeprune.io.typed_json import is_text


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
@fleet_option
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
    load_options = {name: options.pop(name) for name in ("threads", "provider", "check", "require_signature", "trust")}
    with CommandProgress(quiet=as_json) as progress:
        progress.say("loading the bundle")
        runtime = load(bundle, **load_options, warm_up=has_deadline)
    stream = runtime.stream(pictures, prompt, prune=prune, **options)
    answer = show_answer(stream, as_json)
    if overlay is not None:
        save_image(runtime.draw(pictures, stream.receipt, fit=options["fit"], question=prompt, answer=answer), overlay)


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

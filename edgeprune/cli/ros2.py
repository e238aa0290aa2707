"""The command that answers over ROS 2: ros2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.options import bundle_argument, check_option, fit_option, provider_option, signature_option
from edgeprune.errors import require_extra


@click.command()
@bundle_argument
@click.option("--node", default="edgeprune", show_default=True, help="The node's name; /robot/edgeprune has a namespace.")
@click.option("--image-topic", help="sensor_msgs/Image.  [default: image]")
@click.option("--compressed-topic", help="sensor_msgs/CompressedImage.  [default: image/compressed; none with --image-topic alone]")
@click.option("--prompt-topic", default="~/prompt", show_default=True, help="std_msgs/String, the questions.")
@click.option("--answer-topic", default="~/answer", show_default=True, help="std_msgs/String; the pieces on TOPIC/pieces.")
@click.option("--domain", type=int, help="DDS domain.  [default: ROS_DOMAIN_ID, or 0]")
@click.option(
    "--on-busy",
    type=click.Choice(["cancel", "queue", "refuse"]),
    default="cancel",
    show_default=True,
    help="A question while another is answered: end that one, wait, or drop the new one.",
)
@click.option(
    "--frame-timeout", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Seconds to wait for a new frame."
)
@click.option("--tier", help="Budget of a bundle that has several.")
@click.option("--deadline-ms", type=click.FloatRange(min=0, min_open=True), help="An answer ends after so many milliseconds.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer, in tokens.")
@click.option("--threads", type=int, help="ONNX Runtime threads.  [default: all cores]")
@provider_option
@fit_option
@check_option
@signature_option
def ros2(bundle: Path, **options: Any) -> None:
    """Answer questions about camera images over ROS 2, without ROS installed, until it is stopped."""
    require_extra("ros2", "cyclonedds")
    from edgeprune.device.memory import hold_steady
    from edgeprune.runtime.ros2.service import serve

    hold_steady()
    given = {name: value for name, value in options.items() if value is not None}
    serve(bundle, announce=lambda line: click.echo(line, err=True), **given)

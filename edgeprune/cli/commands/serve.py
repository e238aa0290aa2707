"""Commands that serve a bundle: serve (HTTP) and ros2."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import click

from edgeprune.cli.help import command
from edgeprune.cli.options import bundle_argument, check_option, fit_option, fleet_option, provider_option, signature_option
from edgeprune.errors import require_extra


@command()
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; the default is this machine alone.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any that is free.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Keys that are accepted, one a line; also EDGEPRUNE_API_KEY.")
@click.option("--no-auth", is_flag=True, help="Answer anyone, even on a host that other machines reach.")
@click.option("--forwarded-allow-ips", multiple=True, metavar="ADDRESS", help="A proxy whose X-Forwarded-For names the client.")
@click.option(
    "--allow-origin", multiple=True, metavar="ORIGIN", help="Web pages of this origin may ask, as https://a.example; '*' for all."
)
@click.option(
    "--parallel",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Answers at once; their steps share passes, or take turns.",
)
@click.option("--queue", type=click.IntRange(0), default=16, show_default=True, help="Requests that may wait besides those.")
@click.option(
    "--per-client", type=click.IntRange(1), default=4, show_default=True, help="Open requests of one client (key, else address)."
)
@click.option("--max-connections", type=click.IntRange(1), default=256, show_default=True, help="The longest idle one gives way.")
@click.option("--max-body-bytes", type=click.IntRange(1), default=32 << 20, show_default=True, help="Of one request.")
@click.option("--max-pixels", type=click.IntRange(1), default=20_000_000, show_default=True, help="Of one image.")
@click.option(
    "--max-request-pixels", type=click.IntRange(1), default=60_000_000, show_default=True, help="Of all images of one request."
)
@click.option("--max-images", type=click.IntRange(1), default=16, show_default=True, help="Of one request, its history included.")
@click.option("--max-kv-bytes", type=click.IntRange(1), help="KV caches of one answer.  [default: the model's context]")
@click.option(
    "--cache-bytes",
    type=click.IntRange(0),
    default=128 << 20,
    show_default=True,
    help="Kept of images and prompts seen; 0: nothing.",
)
@click.option("--energy", is_flag=True, help="Count the joules of each answer, where the machine has sensors.")
@click.option(
    "--grace",
    type=click.FloatRange(0, 86_400),
    default=30.0,
    show_default=True,
    help="Seconds that answers have to end at SIGTERM.",
)
@click.option("--threads", type=click.IntRange(1), help="ONNX Runtime threads.  [default: all cores]")
@provider_option
@fit_option
@check_option
@signature_option
@fleet_option
def serve(bundle: Path, api_key_file: Path | None, **options: Any) -> None:
    """Answer over HTTP as OpenAI's API does, with a web page.

    The page for the browser is at the same address.

    \b
    Example: edgeprune serve table.bundle --port 8000
    """
    require_extra("serve", "starlette", "uvicorn", "pydantic", "prometheus_client")
    from dataclasses import fields

    from edgeprune.device.memory import limit_malloc_arenas
    from edgeprune.runtime.server import ServerLimits, ServerOptions
    from edgeprune.runtime.server import serve as listen
    from edgeprune.runtime.server.access import VARIABLE, read_keys

    limit_malloc_arenas()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("edgeprune.server").setLevel(logging.INFO)
    keys = [] if options["no_auth"] and api_key_file is None else read_keys(api_key_file, os.environ.get(VARIABLE))
    options |= {"keys": keys, "limits": ServerLimits(**{field.name: options.pop(field.name) for field in fields(ServerLimits)})}
    server = ServerOptions(**{field.name: options.pop(field.name) for field in fields(ServerOptions)})
    listen(bundle, server, announce=_announce, **options)


def _announce(url: str) -> None:
    click.echo(f"Listening on {url} (the page, and OpenAI's API under /v1); the model is loading.")


@command()
@bundle_argument
@click.option("--node", default="edgeprune", show_default=True, help="The node's name; /robot/edgeprune has a namespace.")
@click.option("--image-topic", help="sensor_msgs/Image.  [default: image]")
@click.option("--compressed-topic", help="sensor_msgs/CompressedImage.  [default: image/compressed; none with --image-topic alone]")
@click.option("--prompt-topic", default="~/prompt", show_default=True, help="std_msgs/String, the questions.")
@click.option("--answer-topic", default="~/answer", show_default=True, help="std_msgs/String; the pieces on TOPIC/pieces.")
@click.option(
    "--transport",
    type=click.Choice(["dds", "zenoh"]),
    help="What ROS speaks there.  [default: zenoh with RMW_IMPLEMENTATION=rmw_zenoh_cpp, else dds]",
)
@click.option("--domain", type=int, help="ROS domain.  [default: ROS_DOMAIN_ID, or 0]")
@click.option(
    "--on-busy",
    type=click.Choice(["cancel", "queue", "refuse"]),
    default="cancel",
    show_default=True,
    help="A question while another is answered: end that one, wait, or drop the new one.",
)
@click.option("--use-sim-time", is_flag=True, help="Take the time from /clock, as a simulation publishes it.")
@click.option(
    "--frame-timeout", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Seconds to wait for a new frame."
)
@click.option("--tier", help="Budget of a bundle that has several.")
@click.option("--deadline-ms", type=click.FloatRange(min=0, min_open=True), help="An answer ends after so many milliseconds.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer, in tokens.")
@click.option("--threads", type=click.IntRange(1), help="ONNX Runtime threads.  [default: all cores]")
@provider_option
@fit_option
@check_option
@signature_option
@fleet_option
def ros2(bundle: Path, **options: Any) -> None:
    """Answer questions about camera images over ROS 2.

    ROS need not be installed: messages are read and written over DDS, or over Zenoh as rmw_zenoh does.

    \b
    Example: edgeprune ros2 table.bundle --image-topic /camera/image_raw
    """
    from edgeprune.device.memory import limit_malloc_arenas
    from edgeprune.runtime.ros2.service import serve

    limit_malloc_arenas()
    given = {name: value for name, value in options.items() if value is not None}
    serve(bundle, announce=lambda line: click.echo(line, err=True), **given)

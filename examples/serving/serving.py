"""Start `edgeprune serve`, ask it by OpenAI's client, cancel an answer, read its metrics, and stop it.

python examples/serving/serving.py table.bundle table.png
"""

from __future__ import annotations

import argparse
import base64
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai


@contextmanager
def server(bundle: Path, timeout: float = 60.0) -> Iterator[str]:
    """Yield the address of a server of a bundle that is ready; at the end it is asked to stop and waited for."""
    command = [
        sys.executable,
        "-c",
        "from edgeprune.cli import main; main()",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--parallel",
        "2",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())  # port 0 takes any that is free, and this says which
            if found is None:
                raise SystemExit("The server did not start: run edgeprune serve to see why.")
            url = found.group()
            _wait_until_ready(url, timeout)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout)


def _wait_until_ready(url: str, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.HTTPError, urllib.error.URLError) as error:  # 503 while it loads
            if time.monotonic() > end:
                raise SystemExit(f"The server is not ready: {error}.") from error
            time.sleep(0.1)


def question(image: Path, prompt: str) -> list[Any]:
    """Return the messages of one question about an image, which travels in the request."""
    picture = f"data:image/{image.suffix[1:]};base64,{base64.b64encode(image.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": parts}]


def ask(client: openai.OpenAI, model: str, image: Path) -> None:
    """Ask in three ways: whole, in pieces, and as JSON."""
    whole = client.chat.completions.create(model=model, messages=question(image, "What does the label say?"))
    receipt: Any = whole.edgeprune  # type: ignore[attr-defined]  # the server adds it
    print(f"whole     {whole.choices[0].message.content}; TTFT {receipt['times_ms']['ttft']:.0f} ms, reused {receipt['reused']}")
    print("streamed  ", end="")
    for chunk in client.chat.completions.create(model=model, messages=question(image, "Describe the scene."), stream=True):
        print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
    print()
    schema: Any = {"name": "count", "schema": {"type": "integer", "minimum": 0, "maximum": 9}}
    counted = client.chat.completions.create(
        model=model,
        messages=question(image, "How many red objects are there?"),
        response_format={"type": "json_schema", "json_schema": schema},
    )
    print(f"as JSON   {counted.choices[0].message.content}")
    word = client.chat.completions.create(
        model=model,
        messages=question(image, "Is there a red cube?"),
        extra_body={"guided_choice": ["yes", "no"], "deadline_ms": 5000},
    )
    print(f"a choice  {word.choices[0].message.content}")


def cancel(client: openai.OpenAI, model: str, image: Path) -> None:
    """Go away in the middle of an answer, of a list that would be long: the server stops generating it."""
    numbers: Any = {"name": "numbers", "schema": {"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 100}}
    stream = client.chat.completions.create(
        model=model,
        messages=question(image, "How many red objects are there?"),
        response_format={"type": "json_schema", "json_schema": numbers},
        max_tokens=300,
        stream=True,
    )
    pieces = (chunk.choices[0].delta.content for chunk in stream if chunk.choices)
    print(f"cancelled after {next(piece for piece in pieces if piece)!r}")
    stream.close()


def metrics(url: str, wanted: str, timeout: float = 10.0) -> list[str]:
    """Return the lines of /metrics that count answers and requests, as soon as one of them has the wanted words."""
    end = time.monotonic() + timeout
    while True:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
        found = [line for line in lines if re.match(r"edgeprune_(answers|reused|http_requests)_total\{", line)]
        if any(wanted in line for line in found) or time.monotonic() > end:
            return found
        time.sleep(0.05)


def main() -> None:
    """Parse the command line, serve, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("image", type=Path)
    options = parser.parse_args()
    with server(options.bundle) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)
        with client:
            model = client.models.list().data[0].id
            ask(client, model, options.image)
            cancel(client, model, options.image)
            print(*metrics(url, 'finish_reason="cancelled"'), sep="\n")


if __name__ == "__main__":
    main()

"""The command itself, with the bundled kind of model: a process that answers, and ends well by a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from click.testing import CliRunner
from PIL import Image
from server_double import PATIENCE, ask, client, data_url, user, wait_until
from tiny_models import TINY_GEOMETRY

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.runtime import load


@contextmanager
def process(bundle: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield the process of the command and its address."""
    program = "from edgeprune.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", str(bundle), "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            assert started.stdout is not None
            found = re.search(r"http://\S+", started.stdout.readline())
            assert found is not None, started.stderr and started.stderr.read()
            yield started, found[0]
        finally:
            started.kill()


@pytest.fixture(scope="module")
def served(tiny_bundle: Bundle) -> Iterator[str]:
    with process(tiny_bundle.path, "--max-images", "3") as (_, url):
        wait_until(url, "ready")
        yield url


@pytest.fixture(scope="module")
def asked(served: str) -> Iterator[openai.OpenAI]:
    with client(served) as each:
        yield each


def answer(each: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    model = each.models.list().data[0].id
    return ask(each, *messages, **{"model": model, "max_tokens": 8, **options})


def test_answers_are_those_of_the_library(asked: openai.OpenAI, tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    found = answer(asked, user("What colour is the cube?", data_url(tiny_image)))
    expected = load(tiny_bundle.path, threads=1).generate(tiny_image, "What colour is the cube?", max_tokens=8)
    assert found.choices[0].message.content == expected.text
    assert found.model_dump()["edgeprune"]["finish_reason"] == expected.receipt.finish_reason
    assert found.usage.completion_tokens == expected.receipt.generated_tokens
    assert found.usage.visual_tokens["before"] == TINY_GEOMETRY.tokens > found.usage.visual_tokens["after"]


def test_a_stream_says_the_same(asked: openai.OpenAI, tiny_image: Image.Image) -> None:
    message = user("What colour is the cube?", data_url(tiny_image))
    chunks = list(answer(asked, message, stream=True, extra_body={"kept": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == answer(asked, message).choices[0].message.content
    (picture,) = chunks[-1].model_dump()["edgeprune"]["pictures"]
    assert [sum(cut["shares"]) for cut in picture["cuts"]] == [cut["after"] for cut in picture["cuts"]] == [6, 3]


def test_a_conversation(asked: openai.OpenAI, tiny_image: Image.Image) -> None:
    picture = data_url(tiny_image)
    turns = [{"role": "system", "content": "Be short."}, user("What is it?", picture), {"role": "assistant", "content": "A cube."}]
    found = answer(asked, *turns, user("And these?", picture, picture))
    assert found.usage.visual_tokens["before"] == 3 * TINY_GEOMETRY.tokens


def test_seeds(asked: openai.OpenAI, tiny_image: Image.Image) -> None:
    message = user("What is it?", data_url(tiny_image))
    texts = [answer(asked, message, temperature=1.0, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_structured_answers(asked: openai.OpenAI, tiny_image: Image.Image) -> None:
    pytest.importorskip("llguidance")
    message = user("What is it?", data_url(tiny_image))
    assert answer(asked, message, extra_body={"guided_choice": ["red", "blue"]}).choices[0].message.content in ("red", "blue")
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    found = answer(asked, message, response_format=form, max_tokens=64).choices[0].message.content
    assert json.loads(found)["yes"] in (True, False)


@pytest.mark.parametrize(
    ("url", "words"),
    [(data_url(Image.new("RGB", (300, 20))), "this 20x300 image makes"), ("https://example.com/a.png", "Nothing is downloaded")],
)
def test_images_that_are_refused(asked: openai.OpenAI, url: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        answer(asked, user("What is it?", url))


def test_an_image_alone_and_texts_between_images(asked: openai.OpenAI, tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(tiny_image)}}
    model = load(tiny_bundle.path, threads=1)
    alone = answer(asked, {"role": "user", "content": [image]})
    assert alone.choices[0].message.content == "".join(model.chat().ask([tiny_image], max_tokens=8))
    between = answer(
        asked, {"role": "user", "content": [{"type": "text", "text": "This:"}, image, {"type": "text", "text": "What is it?"}]}
    )
    expected = "".join(model.chat().ask(["This:", tiny_image, "What is it?"], max_tokens=8))
    assert between.choices[0].message.content == expected


def test_choices_beyond_the_limit(asked: openai.OpenAI, tiny_image: Image.Image) -> None:
    pytest.importorskip("llguidance")
    for count, refused in (1000, False), (1001, True), (2000, True):
        options = {"extra_body": {"guided_choice": [f"choice number {number}" for number in range(count)]}, "max_tokens": 64}
        if refused:
            with pytest.raises(openai.BadRequestError, match="1000"):
                answer(asked, user("What is it?", data_url(tiny_image)), **options)
        else:
            found = answer(asked, user("What is it?", data_url(tiny_image)), **options)
            assert found.choices[0].message.content.startswith("choice number ")


def test_extreme_numbers(asked: openai.OpenAI, tiny_image: Image.Image) -> None:
    message = user("What is it?", data_url(tiny_image))
    extremes: list[dict[str, Any]] = [
        {"max_tokens": 10**30},
        {"seed": 10**300, "temperature": 1},
        {"seed": -1},
        {"temperature": 5e-324, "top_p": 5e-324},
        {"temperature": 1.7e308},
        {"extra_body": {"deadline_ms": 1e308}},
        {"extra_body": {"deadline_ms": 1e-300}},
    ]
    for options in extremes:
        try:
            answer(asked, message, **{"stop": ["\0"], **options})
        except openai.APIStatusError as error:
            assert error.status_code in (400, 503), (options, error)


def test_metrics_tell_of_answers(served: str, asked: openai.OpenAI, tiny_image: Image.Image) -> None:
    answer(asked, user("What is it?", data_url(tiny_image)))
    page = httpx.get(f"{served}/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert "edgeprune_queue_length 0.0" in page.text and 'path="/v1/chat/completions",status="200"' in page.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_its_answer_is_whole(number: signal.Signals, tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    body = {"messages": [user("What is it?", data_url(tiny_image))], "max_tokens": 200, "stream": True, "stop": ["\0"]}
    with process(tiny_bundle.path, EDGEPRUNE_API_KEY="sesame") as (started, url):
        wait_until(url, "ready")
        headers = {"authorization": "Bearer sesame"}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE) as stream:
            lines = stream.iter_lines()
            next(lines)
            started.send_signal(number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        out, err = started.communicate(timeout=PATIENCE)
    assert started.returncode == 0
    assert "sesame" not in out + err and "What is it" not in out + err and "POST /v1/chat/completions 200" in err


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["serve", str(tmp_path), "--port", "0"])
    assert result.exit_code == 2 and "is no bundle" in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--max-pixels", "0"], "--max-pixels"),
        (["--max-request-pixels", "0"], "--max-request-pixels"),
        (["--max-connections", "0"], "--max-connections"),
        (["--parallel", "0"], "--parallel"),
        (["--parallel", "-1"], "--parallel"),
        (["--queue", "-1"], "--queue"),
        (["--per-client", "0"], "--per-client"),
        (["--grace", "-1"], "--grace"),
        (["--grace", "nan"], "--grace"),
        (["--grace", "inf"], "--grace"),
        (["--threads", "-2"], "--threads"),
        (["--threads", "0"], "--threads"),
        (["--port", "70000"], "--port"),
        (["--max-kv-bytes", "0"], "--max-kv-bytes"),
        (["--cache-bytes", "-1"], "--cache-bytes"),
        (["--forwarded-allow-ips", "*"], "--forwarded-allow-ips"),
        (["--allow-origin", "example.com"], "--allow-origin"),
        (["--api-key-file", "/nothing"], "Cannot read the keys"),
    ],
)
def test_options_that_are_refused(options: list[str], words: str, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEPRUNE_API_KEY", raising=False)
    result = CliRunner().invoke(main, ["serve", str(tiny_bundle.path), "--port", "0", *options])
    assert result.exit_code == 2 and words in result.output


def test_a_file_of_keys_that_others_can_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from edgeprune.runtime.server.access import read_keys

    file = tmp_path / "keys"
    file.write_text("sesame\n")
    for mode, warned in (0o600, False), (0o640, True), (0o604, True):
        file.chmod(mode)
        caplog.clear()
        assert read_keys(file, None) == ["sesame"]
        assert (f"chmod 600 {file}" in caplog.text) == warned and "sesame" not in caplog.text


def test_a_file_of_keys(tmp_path: Path) -> None:
    from edgeprune.errors import UsageError
    from edgeprune.runtime.server.access import ApiKeys, read_keys

    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n")
    assert read_keys(file, "three") == ["three", "one", "two"]
    assert ApiKeys(["one", "two"]).client(b"bearer two", "") == "key 1"
    for text in ("# none\n", "spaced key\n", "ключ\n"):
        file.write_text(text)
        with pytest.raises(UsageError):
            read_keys(file, None)

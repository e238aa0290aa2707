"""Answers over a real port, by OpenAI's own client: what comes back, and what does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from PIL import Image
from server_double import NAME, PATIENCE, Double, ask, client, data_url, figure, serving, user, wait_until

from edgeprune.errors import EngineError, MissingExtraError, UsageError
from edgeprune.runtime.server import ServerLimits

PICTURE = data_url(Image.new("RGB", (84, 56)))


@pytest.fixture(scope="module")
def double() -> Double:
    return Double(tiers=("high", "low"))


@pytest.fixture(scope="module")
def url(double: Double) -> Iterator[str]:
    with serving(
        double, limits=ServerLimits(max_body_bytes=20_000, max_pixels=10_000, max_request_pixels=15_000, max_images=2)
    ) as address:
        yield address


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with client(url) as each:
        yield each


def test_a_whole_answer(openai_client: openai.OpenAI) -> None:
    answer = ask(openai_client, user("a red cup", PICTURE))
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("a red cup ", "stop")
    usage = answer.usage.model_dump()
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (11, 3, 14)
    assert usage["visual_tokens"] == {"before": 6, "after": 4}
    receipt = answer.model_dump()["edgeprune"]
    assert receipt["finish_reason"] == "end" and receipt["cuts"] == [{"cut": "fastv @ layer 1", "before": 6, "after": 3}]
    assert receipt["queue_ms"] >= 0 and "pictures" not in receipt


def test_a_streamed_answer(openai_client: openai.OpenAI) -> None:
    message = user("a red cup", PICTURE, PICTURE)
    options = {"stream_options": {"include_usage": True}, "extra_body": {"kept": True}}
    chunks = list(ask(openai_client, message, stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "a red cup "
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].model_dump()["edgeprune"]["times_ms"]["ttft"] >= 0
    last = chunks[-1].model_dump()
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
    pictures = last["edgeprune"]["pictures"]
    assert [picture["cuts"][0]["shares"] for picture in pictures] == [[1, 1, 0, 0, 0, 1]] * 2
    assert (pictures[0]["height"], pictures[0]["width"], pictures[0]["views"][0]["columns"]) == (56, 84, 3)


def test_a_stream_without_usage_ends_with_the_receipt(openai_client: openai.OpenAI) -> None:
    chunks = list(ask(openai_client, user("a cup", PICTURE), stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].model_dump()["edgeprune"]["generated_tokens"] == 2


def test_history_reaches_the_runtime(double: Double, openai_client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be short."}, user("What?", PICTURE), {"role": "assistant", "content": "A cup."}]
    extra = {"tier": "low", "deadline_ms": 60_000, "prune": False}
    ask(openai_client, *messages, user("Which colour?"), extra_body=extra)
    asked = double.asked[-1]
    assert [(turn.role, turn.words) for turn in asked["history"]] == [
        ("system", "Be short."),
        ("user", "What?"),
        ("assistant", "A cup."),
    ]
    assert (asked["parts"], asked["prune"], asked["tier"]) == (("Which colour?",), False, "low")
    assert 0 < asked["deadline_ms"] <= 60_000


def test_the_model_list(openai_client: openai.OpenAI) -> None:
    (card,) = openai_client.models.list().data
    about = card.model_dump()["edgeprune"]
    assert card.id == NAME and openai_client.models.retrieve(NAME).id == NAME
    assert about["tiers"] == ["high", "low"] and about["geometry"]["visual_tokens"] == 6
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        openai_client.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "no model 'other'"),
        ({"n": 2}, openai.BadRequestError, "'n' is not supported"),
        ({"extra_body": {"beams": 2}}, openai.BadRequestError, "Unknown parameter: 'beams'"),
        ({"extra_body": {"tier": "best"}}, openai.BadRequestError, "no tier 'best'. Its tiers are: high, low"),
        ({"temperature": -1}, openai.BadRequestError, "temperature must be 0 or more"),
        ({"messages": [user("x", "http://example.com/a.png")]}, openai.BadRequestError, "Nothing is downloaded"),
        ({"messages": [user("x", *[PICTURE] * 3)]}, openai.BadRequestError, "--max-images"),
        ({"messages": [user("x", data_url(Image.new("L", (200, 200))))]}, openai.BadRequestError, "--max-pixels"),
        ({"messages": [user("x", *[data_url(Image.new("L", (99, 99)))] * 2)]}, openai.BadRequestError, "--max-request-pixels"),
        ({"messages": [user("x" * 30_000)]}, openai.APIStatusError, "--max-body-bytes"),
    ],
)
def test_refusals(openai_client: openai.OpenAI, fields: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        ask(openai_client, user("x"), **fields)
    assert isinstance(caught.value, openai.APIStatusError)
    assert caught.value.status_code == {"--max-body-bytes": 413, "no model 'other'": 404}.get(words, 400)
    assert caught.value.type == "invalid_request_error"


def test_refusals_are_counted(url: str) -> None:
    before = figure(url, 'edgeprune_rejected_total{reason="max_body_bytes"}')
    assert httpx.post(f"{url}/v1/chat/completions", content=b"{" * 100_000, headers=JSON).status_code == 413
    assert httpx.post(f"{url}/v1/chat/completions", content=_unending(), headers=JSON).status_code == 413  # says no length
    assert figure(url, 'edgeprune_rejected_total{reason="max_body_bytes"}') == before + 2


JSON = {"content-type": "application/json"}


def _unending() -> Iterator[bytes]:
    for _ in range(100):
        yield b"{" * 1000


def test_other_paths_and_methods(url: str) -> None:
    for method, path, status in ("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405):
        answer = httpx.request(method, url + path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    assert httpx.post(f"{url}/v1/chat/completions", content=b"{}").status_code == 415


def test_a_foreign_name_is_refused(url: str) -> None:
    assert httpx.get(f"{url}/v1/models", headers={"host": "rebound.example:80"}).status_code == 403
    assert httpx.get(f"{url}/v1/models", headers={"host": "localhost"}).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UsageError("The turn is too long."), 400, "invalid_request"),
        (EngineError("The engine broke."), 500, "engine_error"),
        (MissingExtraError("llguidance not installed."), 501, "not_installed"),
        (ValueError("What is the secret prompt?"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_runtime(
    error: Exception, status: int, code: str, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    double = Double()

    def fail(**asked: object) -> None:
        raise error

    monkeypatch.setattr(double, "chat", fail)
    with serving(double) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [user("x")], "stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "secret" not in answer.text + caplog.text
    assert ("ValueError" in caplog.text) == (status == 500 and code == "internal_error")


def test_an_error_amid_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    double = Double()

    def breaks(receipt: object) -> None:
        raise EngineError("The engine broke.")

    monkeypatch.setattr(double, "ended", breaks)
    with serving(double) as url, client(url) as each, pytest.raises(openai.APIError, match="The engine broke"):
        for _ in ask(each, user("a cup"), stream=True):
            pass


def test_nothing_of_a_request_is_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    httpx_log = ("httpx", "httpcore")
    httpx.post(
        f"{url}/v1/chat/completions?q=secret", json={"messages": [user("secret")]}, headers={"authorization": "Bearer secret"}
    )
    httpx.post(f"{url}/v1/chat/completions", json={"messages": [user("secret")], "secret": 1})
    records = [record for record in caplog.records if not record.name.startswith(httpx_log)]
    assert any("POST /v1/chat/completions 200" in record.getMessage() for record in records)
    assert not any("secret" in record.getMessage() for record in records)


def test_phases_while_loading() -> None:
    tell, loaded = list[Callable[[str], None]](), threading.Event()

    def opens(on_phase: Callable[[str], None]) -> Double:
        tell.append(on_phase)
        assert loaded.wait(PATIENCE)
        return Double()

    with serving(None, opens=opens) as url:
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["phase"]) == (503, "loading") and int(health.headers["retry-after"]) > 0
        wait_until(url, "loading")
        tell[0]("warming")
        assert httpx.get(f"{url}/health").json()["phase"] == "warming"
        early = httpx.post(f"{url}/v1/chat/completions", json={"messages": [user("x")]})
        assert early.status_code == 503 and "warming" in early.json()["error"]["message"] and "retry-after" in early.headers
        loaded.set()
        wait_until(url, "ready")
        assert httpx.get(f"{url}/health").status_code == 200
        assert json.loads(httpx.get(f"{url}/v1/models").text)["data"][0]["id"] == NAME

"""What a request may say: everything known reaches the runtime, everything else is refused by name."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from server_double import data_url, user

from edgeprune.runtime.server.errors import ApiError, ServerLimits
from edgeprune.runtime.server.request_mapping import AnswerRequest, answer_request
from edgeprune.runtime.server.schema import parse

RED = data_url(Image.new("RGB", (8, 6), (255, 0, 0)))


def asked(*messages: dict[str, Any], limits: ServerLimits | None = None, **fields: Any) -> AnswerRequest:
    body = {"model": "m", "messages": list(messages or [user("What is it?")]), **fields}
    return answer_request(parse(json.dumps(body).encode()), limits or ServerLimits())


def refusal(*messages: dict[str, Any], **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asked(*messages, **fields)
    return caught.value


def test_everything_reaches_the_runtime() -> None:
    schema = {"type": "object", "properties": {"count": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    found = asked(
        {"role": "developer", "content": "Be short."},
        user("What is this?", RED),
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
        user("And these?", RED, RED),
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop="\n",
        response_format=form,
        tier="low",
        deadline_ms=250,
        prune=False,
        kept=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    sampling = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["\n"], "json_schema": schema}
    assert found.sampling == sampling
    assert [(turn.role, turn.text, len(turn.images)) for turn in found.history] == [
        ("system", "Be short.", 0),
        ("user", "What is this?", 1),
        ("assistant", "A cup.", 0),
    ]
    assert (found.prompt, len(found.images), found.tier, found.deadline_ms) == ("And these?", 2, "low", 250)
    assert (found.prune, found.kept, found.stream, found.include_usage) == (False, True, True, True)
    assert np.asarray(found.images[0]).tolist() == np.full((6, 8, 3), (255, 0, 0)).tolist()


def test_what_was_not_said_is_left_to_the_runtime() -> None:
    assert asked(user="someone", metadata={"a": "b"}, store=False, n=1, tools=[], logprobs=False).sampling == {}


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
        ({"response_format": {"type": "text"}}, {}),
        ({"guided_choice": ["red", "blue"]}, {"choices": ["red", "blue"]}),
        ({"max_tokens": 5, "max_completion_tokens": 5, "stop": ["a", "b"]}, {"max_tokens": 5, "stop": ["a", "b"]}),
    ],
)
def test_forms_of_answers(fields: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert asked(**fields).sampling == sampling


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"audio": {"voice": "x"}}, "unsupported_parameter", "audio"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"stream_options": {"usage": True}, "stream": True}, "unknown_parameter", "stream_options.usage"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", None),
        ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "invalid_value", None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "invalid_value", None),
        ({"deadline_ms": 0}, "invalid_value", "deadline_ms"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], code: str, param: str | None) -> None:
    found = refusal(**fields)
    assert (found.status, found.code) == (400, code)
    assert param is None or (found.param == param and param in found.message)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[0]"),
        ({"role": "assistant", "content": "x"}, None),
        ({"role": "system", "content": [{"type": "image_url", "image_url": {"url": RED}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[0].content[0]"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": RED, "detail": "low"}}]},
            "messages[0].content[0].image_url.detail",
        ),
        (user(" ", RED), "messages"),
    ],
)
def test_messages_that_are_refused(message: dict[str, Any], param: str | None) -> None:
    found = refusal(message)
    assert (found.status, found.param) == (400, param)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/a.png", "Nothing is downloaded"),
        ("/etc/passwd", "Nothing is downloaded"),
        ("data:image/gif;base64,R0lGOD", "must be one of image/jpeg, image/png, image/webp"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,@@@", "broken"),
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "readable PNG"),
        (RED[: 22 + 4 * 16], "damaged"),
        (RED.replace("image/png", "image/webp"), "readable WEBP"),
    ],
)
def test_images_that_are_refused(url: str, words: str) -> None:
    found = refusal(user("What is it?", url))
    assert (found.status, found.code, found.param) == (400, "invalid_image", "messages[0].content[0].image_url.url")
    assert words in found.message


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_kinds_of_images(kind: str) -> None:
    picture = Image.new("RGB", (20, 10), (0, 90, 200))
    (found,) = asked(user("What is it?", data_url(picture, kind))).images
    assert found.size == (20, 10) and np.abs(np.asarray(found, int) - (0, 90, 200)).max() < 8


@pytest.mark.parametrize(("limits", "option"), [({"max_pixels": 47}, "--max-pixels"), ({"max_images": 1}, "--max-images")])
def test_limits_are_named(limits: dict[str, int], option: str) -> None:
    found = refusal(user("What is it?", RED, RED), limits=ServerLimits(**limits))
    assert found.status == 400 and option in found.message and str(next(iter(limits.values()))) in found.message


def test_no_message_repeats_the_request() -> None:
    for fields in ({"stop": {"secret": 1}}, {"temperature": "secret"}, {"messages": [{"role": "user", "content": {"secret": 1}}]}):
        with pytest.raises(ApiError) as caught:
            parse(json.dumps({"model": "m", "messages": [user("secret")], **fields}).encode())
        assert "secret" not in caught.value.message


def test_a_body_that_is_no_json() -> None:
    with pytest.raises(ApiError) as caught:
        parse(b"{")
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")

"""What a request may say: everything known reaches the runtime, everything else is refused by name."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from server_double import data_url, user

from edgeprune.runtime import PreparedImage
from edgeprune.runtime.server.errors import ApiError, ServerLimits
from edgeprune.runtime.server.request_mapping import AnswerRequest, answer_request
from edgeprune.runtime.server.schema import ChatRequest, parse

RED = data_url(Image.new("RGB", (8, 6), (255, 0, 0)))


def asked(*messages: dict[str, Any], limits: ServerLimits | None = None, video: bool = False, **fields: Any) -> AnswerRequest:
    body = {"model": "m", "messages": list(messages or [user("What is it?")]), **fields}
    return answer_request(parse(json.dumps(body).encode()), limits or ServerLimits(), prepared, video=video)


def parse_and_map(body: dict[str, Any]) -> AnswerRequest:
    return answer_request(parse(json.dumps(body).encode()), ServerLimits(), prepared)


def prepared(images: Sequence[Image.Image]) -> PreparedImage:
    pixels = np.stack([np.asarray(image) for image in images])
    return PreparedImage(lambda: pixels, None)


def shown(found: AnswerRequest) -> list[np.ndarray]:
    """Return the images of the question."""
    return [image.patches() for image in found.turn.all_images if isinstance(image, PreparedImage)]


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
    assert [(turn.role, turn.words, len(turn.all_images)) for turn in found.history] == [
        ("system", "Be short.", 0),
        ("user", "What is this?", 1),
        ("assistant", "A cup.", 0),
    ]
    assert (found.turn.words, len(found.turn.all_images), found.tier, found.deadline_ms) == ("And these?", 2, "low", 250)
    assert (found.prune, found.kept, found.stream, found.include_usage) == (False, True, True, True)
    assert shown(found)[0].tolist() == np.full((1, 6, 8, 3), (255, 0, 0)).tolist()


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
        ({"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
        ({"frequency_penalty": 2.5}, "invalid_value", "frequency_penalty"),
        ({"top_k": -2}, "invalid_value", "top_k"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"min_p": 0.1}, "unsupported_parameter", "min_p"),
        ({"stop": ["x"] * 17}, "invalid_value", "stop"),
        ({"stop": ["x" * 257]}, "invalid_value", "stop[0]"),
        ({"stop": ""}, "invalid_value", "stop[0]"),
        ({"guided_choice": ["x"] * 1001}, "invalid_value", "guided_choice"),
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
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": RED, "detail": "best"}}]},
            "messages[0].content[0].image_url.detail",
        ),
        (user(" "), "messages"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": "x", "name": 3}, "messages[0].name"),
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
        ("data:image/gif;base64,R0lGOD", "readable PNG, JPEG, WebP or GIF"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,@@@", "broken"),
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "readable PNG"),
        (RED[: 22 + 4 * 16], "damaged"),
        ("data:image/bmp;base64," + data_url(Image.new("RGB", (8, 6)), "bmp").partition(",")[2], "readable PNG"),
        ("data:image/png;base64,A", "broken"),
        ("data:;base64,", "readable PNG"),
    ],
)
def test_images_that_are_refused(url: str, words: str) -> None:
    found = refusal(user("What is it?", url))
    assert (found.status, found.code, found.param) == (400, "invalid_image", "messages[0].content[0].image_url.url")
    assert words in found.message


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_kinds_of_images(kind: str) -> None:
    picture = Image.new("RGB", (20, 10), (0, 90, 200))
    (found,) = shown(asked(user("What is it?", data_url(picture, kind))))
    assert found.shape == (1, 10, 20, 3) and np.abs(found.astype(int) - (0, 90, 200)).max() < 8


def test_the_first_frame_of_an_animation() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, "gif", save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")])
    (found,) = shown(asked(user("What is it?", f"data:image/gif;base64,{base64.b64encode(file.getvalue()).decode()}")))
    assert found[0, 0, 0].tolist() == [255, 0, 0]


def _wrapped(url: str) -> str:
    head, _, body = url.partition(",")
    return head + ",\n" + "\r\n ".join(body[at : at + 20] for at in range(0, len(body), 20)) + "\n"


@pytest.mark.parametrize(
    "write",
    [
        _wrapped,
        lambda url: url.rstrip("="),
        lambda url: url[:22] + url[22:].replace("+", "-").replace("/", "_"),
        lambda url: url.replace("image/png", "image/jpeg"),
        lambda url: url.replace("image/png", "application/octet-stream"),
        lambda url: url.replace("image/png", ""),
        lambda url: url.replace(";base64", ";charset=utf-8;base64"),
    ],
)
def test_data_urls_as_clients_write_them(write: Callable[[str], str]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8))
    file = io.BytesIO()
    picture.save(file, "png")
    data = file.getvalue() + b"\0" * ((1 - len(file.getvalue())) % 3)  # so that there is padding
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert url[-2:] == "==" and "+" in url and url[22:].count("/") > 0
    (found,) = shown(asked(user("What is it?", write(url))))
    assert found.tolist() == [np.asarray(picture).tolist()]


def test_what_clients_send_beside_their_question() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    image = {"type": "image_url", "image_url": {"url": RED, "detail": "low"}, **mark}
    found = asked(
        {"role": "system", "content": [{"type": "text", "text": "Be short.", **mark}], "name": "operator"},
        {"role": "user", "content": [image], "name": "ann"},
        {"role": "assistant", "content": None, "name": "robot"},
        {"role": "assistant"},
        {"role": "user", "content": [image, {"type": "text", "text": "What?", **mark}], "name": "ann"},
        top_k=-1,
        min_p=0,
        repetition_penalty=1.0,
        skip_special_tokens=False,
    )
    assert found.sampling == {"top_k": 0, "repetition_penalty": 1.0, "skip_special_tokens": False}
    assert [turn.words for turn in found.history] == [
        "Be short.",
        "",
        "",
        "",
    ]


def test_texts_and_images_keep_their_order() -> None:
    image, blue = ({"type": "image_url", "image_url": {"url": url}} for url in (RED, data_url(Image.new("RGB", (4, 4), "blue"))))
    text = [{"type": "text", "text": text} for text in ("This:", "and", "this:", "Which is blue?")]
    found = asked({"role": "user", "content": [text[0], image, text[1], text[2], blue, text[3]]})
    parts = [part if isinstance(part, str) else part.patches().shape[1:3] for part in found.turn.parts]  # type: ignore[union-attr]
    assert parts == ["This:", (6, 8), "and\nthis:", (4, 4), "Which is blue?"]


def test_an_image_without_a_text() -> None:
    found = asked({"role": "user", "content": [{"type": "image_url", "image_url": {"url": RED}}]})
    assert found.turn.words == "" and len(found.turn.parts) == 1


def test_the_images_of_a_message_are_the_frames_of_one_video() -> None:
    image, text = {"type": "image_url", "image_url": {"url": RED}}, [{"type": "text", "text": text} for text in "ab"]
    found = asked({"role": "user", "content": [text[0], image, image, text[1]]}, video=True)
    assert [each.shape for each in shown(found)] == [(2, 6, 8, 3)] and found.turn.words == "a\nb"


def test_sizes_are_read_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.runtime.server.request_mapping.read_image", None)
    for urls in ([RED, data_url(Image.new("L", (5000, 4001)))], [data_url(Image.new("1", (4000, 4000)))] * 4):
        found = refusal(user("What is it?", *urls))
        assert found.code in ("max_pixels", "max_request_pixels")


def test_decoding_ends_when_nobody_waits() -> None:
    decoded = list[int]()

    def prepare(images: Sequence[Image.Image]) -> PreparedImage:
        decoded.append(len(images))
        return prepared(images)

    def check() -> None:
        if decoded:
            raise ApiError(499, "disconnected", "Gone.")

    body = parse(json.dumps({"messages": [user("What is it?", *[RED] * 5)]}).encode())
    with pytest.raises(ApiError, match="Gone"):
        answer_request(body, ServerLimits(), prepare, check=check)
    assert decoded == [1]


LIMITS = [
    ({"max_pixels": 47}, "--max-pixels"),
    ({"max_images": 1}, "--max-images"),
    ({"max_request_pixels": 95}, "--max-request-pixels"),
]


@pytest.mark.parametrize(("limits", "option"), LIMITS)
def test_limits_are_named(limits: dict[str, int], option: str) -> None:
    found = refusal(user("What is it?", RED, RED), limits=ServerLimits(**limits))
    assert found.status == 400 and option in found.message and str(next(iter(limits.values()))) in found.message


def test_no_message_repeats_the_request() -> None:
    for fields in ({"stop": {"secret": 1}}, {"temperature": "secret"}, {"messages": [{"role": "user", "content": {"secret": 1}}]}):
        with pytest.raises(ApiError) as caught:
            parse(json.dumps({"model": "m", "messages": [user("secret")], **fields}).encode())
        assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{}]}, "'tools' is not supported here. Leave it out, or give it empty."),
        ({"n": 2}, "'n' is not supported here. Leave it out, or give 1."),
        ({"logprobs": True}, "'logprobs' is not supported here. Leave it out, or give false."),
        ({"temprature": 1}, "Unknown parameter: 'temprature'. Did you mean temperature?"),
        ({"messages": []}, "'messages': Give at least 1, not 0."),
    ],
)
def test_refusals_say_what_to_do(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}).encode())
    assert caught.value.message == message


def test_a_body_that_is_no_json() -> None:
    deep = b'{"messages":' + b"[" * 20_000
    lone = b'{"messages":[{"role":"user","content":"\\ud800"}]}'
    for body in (
        b"{",
        b"",
        b"\xff",
        b'{"user":"\xff"}',
        b'{"user":"\xed\xa0\x80"}',
        lone,
        deep,
        b'{"seed":NaN}',
        b"\x00",
        "{}".encode("utf-16"),
    ):
        with pytest.raises(ApiError) as caught:
            parse(body)
        assert caught.value.status == 400, body


def test_limits_of_texts_are_named() -> None:
    assert "at most 16" in refusal(stop=["x"] * 17).message and "at most 256" in refusal(stop="x" * 257).message
    assert "at most 1000" in refusal(guided_choice=["x"] * 1001).message


JUNK: list[Any] = [None, True, -1, 10**40, 1e308, "", "x", [], [None], {}, {"a": {}}, [[[]]], "\x00", ["x"] * 3000]


@pytest.mark.parametrize("name", [*ChatRequest.model_fields])
def test_no_value_of_any_field_is_more_than_refused(name: str) -> None:
    for value in JUNK:
        try:
            parse_and_map({"messages": [user("x")], name: value})
        except ApiError as error:
            assert error.status == 400
    for value in JUNK:
        for message in (
            {"role": value, "content": "x"},
            {"role": "user", "content": value},
            {"role": "user", "content": [value]},
            value,
        ):
            try:
                parse_and_map({"messages": [message]})
            except ApiError as error:
                assert error.status == 400

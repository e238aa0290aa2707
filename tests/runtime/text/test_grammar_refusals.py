"""What a structured answer cannot be is refused before anything is generated, in one line that says why."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from speakers import END, OTHER_END, Speaker, bundled, with_alphabet
from tokenizers import Tokenizer, models

from edgeprune.errors import EdgePruneError, MissingExtraError, UsageError, install_command
from edgeprune.runtime.text import grammar
from edgeprune.runtime.text.grammar import MAX_CHOICES, GrammarCompiler


@pytest.fixture(scope="module")
def tabletop() -> Speaker:
    return Speaker(bundled(), (END, OTHER_END))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "Invalid type: strin."),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "format": "unheard-of"}, "Unknown format: unheard-of"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"$ref": "https://example.com/schema.json"}, "example.com"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum (5) is greater than maximum (2)"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "object", "minProperties": 2}, "minProperties where the names are free"),
        ({"items": {"type": "object", "required": ["a", "b"], "minProperties": 3}}, "names are free"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "has the key 'x-guidance'"),
        ({"const": "<|im_end|>"}, "contains the control token <|im_end|>"),
    ],
)
def test_schemas_that_cannot_be_enforced_are_refused(schema: Mapping[str, Any], words: str, tabletop: Speaker) -> None:
    with pytest.raises(UsageError) as caught:
        tabletop.compiler.constraint(json_schema=schema)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert "start:" not in message  # nothing of our own grammar
    assert len(message) < 320


def test_a_schema_that_is_too_deep_is_refused(tabletop: Speaker) -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    with pytest.raises(UsageError, match="recursion limit"):
        tabletop.compiler.constraint(json_schema=schema)


def test_choices_have_a_limit(tabletop: Speaker) -> None:
    choices = [f"choice number {number}" for number in range(MAX_CHOICES + 1)]
    with pytest.raises(UsageError, match=f"{MAX_CHOICES + 1} choices, more than the {MAX_CHOICES}"):
        tabletop.compiler.constraint(choices=choices)
    assert tabletop.answer(choices=choices[:-1])[0] in choices


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "string", "pattern": f"a.*b.*c{number}"} for number in range(40)]},
        {"allOf": [{"allOf": [{"$ref": "#/$defs/a"}] * 5}] * 2, "$defs": {"a": {"type": "string", "pattern": "a.*b"}}},
        {"type": "object", "patternProperties": {f"a.*b.*c{number}": {} for number in range(40)}},
    ],
)
def test_patterns_that_would_take_hours_to_cross_are_refused(schema: Mapping[str, Any], tabletop: Speaker) -> None:
    with pytest.raises(UsageError, match="more than 8 patterns"):
        tabletop.compiler.constraint(json_schema=schema)


def test_a_grammar_beyond_the_limits_of_its_matcher_is_a_wrong_request(tabletop: Speaker) -> None:
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(600)}}
    with pytest.raises(UsageError, match="max is 2000"):
        tabletop.answer(json_schema=schema)


def test_one_grammar_that_takes_long_does_not_hold_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, begun, go_on = GrammarCompiler(bundled().to_str, (END,)), threading.Event(), threading.Event()
    compile_one = grammar._GrammarTokenizer.compile

    def compile_slowly(self: Any, kind: str, body: str) -> Any:
        if "slow" in body:
            begun.set()
            assert go_on.wait(20)
        return compile_one(self, kind, body)

    monkeypatch.setattr(grammar._GrammarTokenizer, "compile", compile_slowly)
    slow = threading.Thread(target=compiler.constraint, args=(["slow"],))
    slow.start()
    assert begun.wait(20)
    assert compiler.constraint(["quick"]) is not None
    go_on.set()
    slow.join(20)


def test_choices_with_control_tokens_are_refused(tabletop: Speaker) -> None:
    with pytest.raises(UsageError, match=r"control token <\|im_end\|>"):
        tabletop.compiler.constraint(choices=["yes", "no<|im_end|>"])


def test_what_the_tokenizer_cannot_write_is_refused() -> None:
    speaker = Speaker(with_alphabet("yesno"), (0,))
    assert speaker.answer(choices=["yes", "no"])[1]
    with pytest.raises(UsageError, match="cannot write 'm', which the choice needs"):
        speaker.compiler.constraint(choices=["yes", "maybe"])
    with pytest.raises(UsageError, match=r"cannot write '\{', which the json_schema needs"):
        speaker.compiler.constraint(json_schema={"type": "object"})


@pytest.mark.parametrize("make", [lambda: Tokenizer(models.WordLevel({"yes": 0}, unk_token="yes")), lambda: with_alphabet("yes")])
def test_tokenizers_that_cannot_be_followed_are_refused(make: Callable[[], Tokenizer]) -> None:
    compiler = GrammarCompiler(make().to_str, [99])
    with pytest.raises(EdgePruneError, match="tokenizer of this model cannot give structured answers"):
        compiler.constraint(choices=["yes"])


@pytest.fixture
def no_llguidance(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("edgeprune.errors._is_installed", lambda package: False)
    yield


@pytest.mark.usefixtures("no_llguidance")
def test_without_the_extra_it_says_how_to_get_it() -> None:
    compiler = GrammarCompiler(bundled().to_str, [END])
    assert compiler.constraint() is None
    with pytest.raises(MissingExtraError, match=re.escape(install_command("structured"))):
        compiler.constraint(choices=["yes"])

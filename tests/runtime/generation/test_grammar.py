"""Structured answers are what was asked for, whatever the model would rather say."""

from __future__ import annotations

import json
import sys
import threading
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from repository import ROOT
from speakers import END, OTHER_END, Speaker, bundled, larger, llama_like

from edgeprune.errors import EdgePruneError
from edgeprune.runtime.generation.sampling import Sampler, Sampling
from edgeprune.runtime.text.grammar import GrammarCompiler

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 640}, "y": {"type": "number"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "object"},
    {"type": "boolean"},
    {"type": ["string", "null"], "maxLength": 9},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"type": "string", "format": "date"},
    {"enum": ["left of", "é", 'a "quoted" \\ word', 3, None, {"deep": [True]}]},
    {"const": "only this"},
    POINT,
    {"type": "array", "items": POINT, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "string", "maxLength": 4}, {"type": "integer"}], "items": False, "minItems": 2},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 3},
    {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a", "b"], "minProperties": 2},
    {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"why": {"enum": ["dark", "far"]}}, "required": ["why"]}]},
    {
        "$defs": {"node": {"type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}}},
        "$ref": "#/$defs/node",
    },
    {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": {"type": "string"}},
    {"type": "object", "properties": {"größe": {"type": "string", "minLength": 1, "maxLength": 3}}, "required": ["größe"]},
]


@pytest.fixture(scope="module", params=["bundled", "larger", "like Llama's"])
def speaker(request: pytest.FixtureRequest) -> Speaker:
    if request.param == "bundled":
        return Speaker(bundled(), (END, OTHER_END))
    return Speaker(larger(), (0,)) if request.param == "larger" else Speaker(llama_like("▁yes", "▁left"), (1,))


@pytest.fixture(scope="module")
def tabletop() -> Speaker:
    return Speaker(bundled(), (END, OTHER_END))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:30])
def test_any_noise_becomes_json_that_fits(schema: dict[str, Any], speaker: Speaker) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    ended = 0
    for seed in range(15):
        text, whole = speaker.answer(seed, json_schema=schema)
        if whole:
            validator.validate(json.loads(text, parse_int=lambda digits: int(digits[:9])))  # Python reads 4300 digits at most
        ended += whole
    assert ended >= 12  # free strings and arrays may go on for ever


@pytest.mark.parametrize(
    "choices", [["yes", "no"], ["red", "red cube", "red cube left"], ["é", "naïve", "日本", "😀"], ['a"\\b\n\t{']]
)
def test_any_noise_becomes_one_of_the_choices(choices: list[str], speaker: Speaker) -> None:
    seen = {speaker.answer(seed, choices=choices) for seed in range(40)}
    assert seen == {(choice, True) for choice in choices}


def test_greedy_takes_the_likeliest_choice(tabletop: Speaker) -> None:
    logits = np.zeros(tabletop.size, np.float32)
    logits[tabletop.codec.encode("purple")] = 5
    logits[tabletop.codec.encode("white")] = 9
    sampling = Sampling(choices=["red", "purple", "yellow"])
    sampler = Sampler(sampling, tabletop.compiler.constraint(sampling.choices, sampling.json_schema))
    said = []
    while not sampler.done:
        said.append(sampler.sample(logits))
    assert said == tabletop.codec.encode("purple")


def test_an_answer_ends_only_where_it_is_complete(tabletop: Speaker) -> None:
    constraint = tabletop.compiler.constraint(choices=["red", "red cube"])
    assert constraint is not None
    assert not {END, OTHER_END} & set(constraint.allowed_ids(tabletop.size))
    constraint.accept(tabletop.codec.encode("red")[0])
    assert not constraint.done
    assert {END, OTHER_END} < set(constraint.allowed_ids(tabletop.size))
    constraint.accept(END)
    assert constraint.done


def test_after_its_end_nothing_but_an_end_token_follows(tabletop: Speaker) -> None:
    sampling = Sampling(choices=["yes"])
    sampler = Sampler(sampling, tabletop.compiler.constraint(sampling.choices, sampling.json_schema))
    logits = np.arange(tabletop.size, dtype=np.float32)
    assert [sampler.sample(logits)] == tabletop.codec.encode("yes")
    assert sampler.done
    assert sampler.sample(logits) == END


def test_free_answers_have_no_grammar(tabletop: Speaker) -> None:
    assert tabletop.compiler.constraint() is None


def test_json_has_one_space_at_most() -> None:
    speaker = Speaker(bundled(), (END,))
    texts = {speaker.answer(seed, json_schema={"const": {"a": [1, 2]}})[0] for seed in range(60)}
    assert {len(text) for text in texts} == {11, 12, 13}
    assert all(text.startswith('{"a":') and text.endswith("2]}") for text in texts)


def test_properties_come_in_the_order_of_the_schema(tabletop: Speaker) -> None:
    properties = {"z": {"type": "boolean"}, "a": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["a", "z"], "additionalProperties": False}
    assert list(json.loads(tabletop.answer(json_schema=schema)[0])) == ["z", "a"]
    schema["properties"] = dict(reversed(properties.items()))
    assert list(json.loads(tabletop.answer(json_schema=schema)[0])) == ["a", "z"]


def test_a_name_cannot_come_back_in_another_spelling(tabletop: Speaker) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    for spelling, fits in [("b", True), ("a", False), ("\\u0061", False)]:
        constraint = tabletop.compiler.constraint(json_schema=schema)
        assert constraint is not None
        allowed = []
        for token in tabletop.codec.encode('{"a":1,"' + spelling + '":"x"}'):
            allowed.append(token in constraint.allowed_ids(tabletop.size))
            if not allowed[-1]:
                break
            constraint.accept(token)
        assert all(allowed) == fits, spelling


def test_too_few_tokens_leave_it_unfinished(tabletop: Speaker) -> None:
    text, whole = tabletop.answer(most=4, json_schema=POINT)
    assert not whole
    assert '{"x":'.startswith(text[:5])


def test_words_begin_with_their_unseen_space() -> None:
    speaker = Speaker(llama_like("▁yes", "▁no"), (1,))
    constraint = speaker.compiler.constraint(choices=["yes", "no"])
    assert constraint is not None
    assert set(speaker.codec.encode("yes")) < set(constraint.allowed_ids(speaker.size))  # "▁yes", which such a model would say


def test_a_dead_end_is_an_error_not_a_wrong_answer() -> None:
    constraint = Speaker(bundled(), (END,)).compiler.constraint(choices=["yes"])
    assert constraint is not None
    with pytest.raises(EdgePruneError, match="No token of this model can continue"):
        constraint.allowed_ids(3)  # a model with fewer ids than its tokenizer
    with pytest.raises(EdgePruneError, match="cannot take token 9"):
        constraint.accept(9)
    with pytest.raises(EdgePruneError, match="cannot go on"):
        constraint.allowed_ids(455)


def test_grammars_are_compiled_once_and_the_oldest_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[str]()

    def source() -> str:
        read.append(bundled().to_str())
        return read[-1]

    compiler = GrammarCompiler(source, [END])
    compiler.constraint(choices=["one"])
    assert compiler._vocabulary is not None
    compiled, inner = list[str](), compiler._vocabulary.compile

    def compile_it(kind: str, body: str) -> Any:
        compiled.append(body)
        return inner(kind, body)

    monkeypatch.setattr(compiler._vocabulary, "compile", compile_it)
    for text in ["one", "two", "two", *map(str, range(16)), "one"]:
        compiler.constraint(choices=[text])
    assert len(read) == 1
    assert len(compiled) == 18  # two, the numbers, and one again
    assert len(compiler._compiled) == 16


def test_answers_of_many_threads_do_not_mix(tabletop: Speaker) -> None:
    speaker, found = Speaker(bundled(), (END,)), dict[int, set[str]]()

    def ask(thread: int) -> None:
        choices = [f"{thread} {word}" for word in ("left", "right")]
        found[thread] = {speaker.answer(seed, choices=choices)[0] for seed in range(30)}

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(timeout=30)
    assert found == {number: {f"{number} left", f"{number} right"} for number in range(6)}


def test_the_example_measures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "structured"))
    monkeypatch.setattr(sys, "argv", ["mask_time.py", "--size", "600", "--answers", "2"])
    import_module("mask_time").main()
    printed = capsys.readouterr().out
    assert printed.startswith("601 tokens")
    assert printed.count("|\n") == 6

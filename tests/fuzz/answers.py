"""Structured answers: schemas and choices become a grammar that can be walked, or are refused."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from edgeprune.runtime.generation.sampling import Sampling
from edgeprune.runtime.text.grammar import GrammarCompiler
from edgeprune.tabletop import MODEL_FOLDER
from fuzz.mutations import Members, json_variant, parsed, written
from fuzz.target import Target, demand

_END, _VOCABULARY, _STEPS = 2, 300, 12
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_SEEDS: tuple[dict[str, Any], ...] = (
    {"json_schema": {"type": "object", "properties": {"count": {"type": "integer", "minimum": 0}}, "required": ["count"]}},
    {"json_schema": {"type": "array", "items": {"enum": ["red", "blue", None, 3]}, "minItems": 1, "maxItems": 3}},
    {"json_schema": {"type": "string", "pattern": "^[a-z]{1,5}$", "maxLength": 9}},
    {"json_schema": {"$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"}},
    {"json_schema": {"anyOf": [{"type": "number", "multipleOf": 0.5}, {"const": {"x": [1]}}], "description": "what it is"}},
    {"json_schema": {"type": "object", "additionalProperties": {"type": "boolean"}, "propertyNames": {"pattern": "a+"}}},
    {"json_schema": {"allOf": [{"type": "integer", "maximum": 9}, {"minimum": 3}], "format": "date"}},
    {"choices": ["yes", "no"]},
    {"choices": ["left of the cup", "right\nof", 'say "it"', "left"]},
)


class _Walks:
    # Constraints of the bundled tokenizer, made once.
    def __init__(self) -> None:
        text = (MODEL_FOLDER / "tokenizer.json").read_text(encoding="utf-8")
        self._compiler = GrammarCompiler(lambda: text, [_END])

    def __call__(self, data: bytes) -> bool:
        try:
            asked = json.loads(data)
        except (ValueError, RecursionError):
            return False
        if not isinstance(asked, dict):
            return False
        sampling = Sampling(choices=asked.get("choices"), json_schema=asked.get("json_schema"))
        constraint = self._compiler.constraint(sampling.choices, sampling.json_schema)
        if constraint is None:
            return False
        draw = Random(data)
        for _ in range(_STEPS):
            ids = constraint.allowed_ids(_VOCABULARY)
            demand(len(ids) > 0 and 0 <= ids[0] <= ids[-1] < _VOCABULARY, "a token that does not exist")
            token = int(ids[draw.randrange(len(ids))])
            constraint.accept(token)
            if token == _END or constraint.done:
                break
        return True


def schemas() -> Target:
    """Return the target of JSON schemas and choices."""
    return Target(_Walks(), tuple(json.dumps(seed).encode() for seed in _SEEDS), _schema_variant)


def _schema_variant(data: bytes, random: Random) -> bytes:
    if random.randrange(3):
        return json_variant(data, random)
    try:
        value = parsed(data.decode())
    except (ValueError, RecursionError):
        return json_variant(data, random)
    if isinstance(value, Members) and value and value[0][0] == "json_schema":
        value[0] = ("json_schema", _grown(value[0][1], random))
    return written(value).encode("utf-8", "surrogatepass")


def _grown(schema: Any, random: Random) -> Any:
    # Another valid schema, around or beside this one.
    key, count = (
        random.choice(("items", "not", "if", "contains", "additionalProperties", "propertyNames")),
        random.choice((0, 1, 3, 99, 10**6)),
    )
    ways: tuple[list[tuple[str, Any]], ...] = (
        [("type", "object"), ("properties", Members([("a", schema), ("b", schema)])), ("required", ["a"])],
        [("type", "array"), ("items", schema), (random.choice(("minItems", "maxItems")), count)],
        [(random.choice(("anyOf", "oneOf", "allOf")), [schema, Members([("type", random.choice(_TYPES))])])],
        [(key, schema)],
        [("type", "string"), (random.choice(("minLength", "maxLength")), count)],
        [
            ("type", "string"),
            ("pattern", random.choice(("(a|b)*c{2,9}", "(", "(a*)*b", "\\d{1000}", "[^x]", "^a$|^b", "(?=a)b", "\\p{L}"))),
        ],
        [("enum", [random.choice(_TYPES), count, schema])],
    )
    return Members(random.choice(ways))

"""Manifests: schemas that are read and refused, and values of the wrong type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bundle import MANIFEST, SCHEMA_VERSION, Bundle, GenerationDefaults, Manifest
from edgeprune.errors import BundleError, update_hint
from edgeprune.runtime import load

BROKEN: list[Any] = [None, "6", 6.5, True, [], {}]


def test_the_schema_before_tiers_is_read(altered_bundle: Path) -> None:
    data = json.loads((altered_bundle / MANIFEST).read_text())
    del data["tiers"], data["generation"], data["decoder"]["bidirectional"]
    (altered_bundle / MANIFEST).write_text(json.dumps(data | {"schema_version": 5}))
    assert load(altered_bundle, threads=1).tiers == ()


@pytest.mark.parametrize("family", ["qwen2_vl", "paligemma"])
def test_the_schema_before_generation_defaults_is_read(family: str, altered_bundle: Path) -> None:
    data = json.loads((altered_bundle / MANIFEST).read_text())
    del data["generation"], data["decoder"]["bidirectional"]
    data["source"]["family"] = family
    text = json.dumps(data | {"schema_version": 6}).encode()
    manifest = Manifest.parse(altered_bundle, text)
    assert manifest.generation == GenerationDefaults()
    assert manifest.decoder.bidirectional == (family == "paligemma")  # known by the family until manifests said it


def test_the_schema_before_windows_is_read(altered_bundle: Path) -> None:
    data = json.loads((altered_bundle / MANIFEST).read_text())
    del data["decoder"]["local_layers"]
    manifest = Manifest.parse(altered_bundle, json.dumps(data | {"schema_version": 7}).encode())
    assert manifest.decoder.local_layers == ()
    Manifest.parse(
        altered_bundle, json.dumps(data | {"decoder": data["decoder"] | {"layers": 2**62, "layer_weights": []}}).encode()
    )  # without counting
    data["decoder"]["local_layers"] = [99]
    with pytest.raises(BundleError, match="windows in the layers"):
        Manifest.parse(altered_bundle, json.dumps(data).encode())


def test_the_schema_before_commits_and_adapters_is_read(altered_bundle: Path) -> None:
    data = json.loads((altered_bundle / MANIFEST).read_text())
    for name in ("revision", "adapter", "adapter_sha256"):
        del data["source"][name]
    source = Manifest.parse(altered_bundle, json.dumps(data | {"schema_version": 7}).encode()).source
    assert (source.revision, source.adapter, source.adapter_sha256) == ("", "", "")


@pytest.mark.parametrize(
    ("version", "words"), [(4, "too old"), (1, "too old"), (-1, "too old"), (SCHEMA_VERSION + 1, "too new"), (10**30, "too new")]
)
def test_other_schemas_are_refused_with_what_to_do(version: int, words: str, altered_bundle: Path) -> None:
    data = json.loads((altered_bundle / MANIFEST).read_text())
    (altered_bundle / MANIFEST).write_text(json.dumps(data | {"schema_version": version}))
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.load(altered_bundle)
    assert (update_hint() if words == "too new" else "Export it again") in caught.value.hint


@pytest.mark.parametrize("version", BROKEN)
def test_what_is_no_version_is_refused(version: Any, altered_bundle: Path) -> None:
    data = json.loads((altered_bundle / MANIFEST).read_text())
    (altered_bundle / MANIFEST).write_text(json.dumps(data | {"schema_version": version}))
    with pytest.raises(BundleError, match="no schema version"):
        Bundle.load(altered_bundle)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for name in list(value)[:3] if len(path) > 0 else value:
            yield (*path, name)
            yield from _paths(value[name], (*path, name))


def test_fields_of_the_wrong_type_are_refused(altered_bundle: Path) -> None:
    text = (altered_bundle / MANIFEST).read_text()
    refused = 0
    for path in list(_paths(json.loads(text))):
        wrong: Any
        for wrong in (None, -1.5, [[]], {"a": 1}, True):
            if path == ("wide_products",) and wrong in (None, {"a": 1}):
                continue  # both are of its type
            if path in (("gptq",), ("smoothing",)) and wrong is None:
                continue
            data = json.loads(text)
            within = data
            for name in path[:-1]:
                within = within[name]
            within[path[-1]] = wrong
            (altered_bundle / MANIFEST).write_text(json.dumps(data))
            with pytest.raises(BundleError):
                Manifest.load(altered_bundle)
            refused += 1
    assert refused > 100


def test_a_manifest_nested_without_end_is_refused(altered_bundle: Path) -> None:
    (altered_bundle / MANIFEST).write_text("[" * 10**6)
    with pytest.raises(BundleError, match="Cannot read"):
        Bundle.load(altered_bundle)

"""Each file of a bundle cut short, altered at its ends and in its middle, or missing: refused, and by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bundle import MANIFEST, Bundle
from edgeprune.errors import BundleError
from edgeprune.runtime import load


def _flipped(at: Callable[[int], int]) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at(len(data))] ^= 0x10
        path.write_bytes(data)

    return flip


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first byte": _flipped(lambda size: 0),
    "middle byte": _flipped(lambda size: size // 2),
    "last byte": _flipped(lambda size: size - 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_file_that_is_damaged_is_named(damage: str, altered_bundle: Path, record_property: Any) -> None:
    names = sorted(Bundle.load(altered_bundle).manifest.files)
    assert len(names) >= 11
    for name in names:
        whole = (altered_bundle / name).read_bytes()
        DAMAGE[damage](altered_bundle / name)
        with pytest.raises(BundleError) as caught:
            load(altered_bundle, threads=1)
        assert name in caught.value.message
        (altered_bundle / name).write_bytes(whole)
    Bundle.load(altered_bundle)
    record_property("faults", len(names))


def test_a_manifest_that_is_cut_short_anywhere_is_refused(altered_bundle: Path, record_property: Any) -> None:
    whole = (altered_bundle / MANIFEST).read_bytes()
    cuts = range(0, len(whole.rstrip()), max(len(whole) // 100, 1))
    for size in cuts:
        (altered_bundle / MANIFEST).write_bytes(whole[:size])
        with pytest.raises(BundleError, match="manifest"):
            Bundle.load(altered_bundle)
    record_property("faults", len(cuts))

"""Fast loads: what was checked in full is not read again while it looks the same, and is otherwise."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bundle import CHECKS, DECODER, MANIFEST, PLAN, VISION, Bundle
from edgeprune.bundle import bundle as bundles
from edgeprune.bundle import integrity as stamps
from edgeprune.bundle.integrity import check_sha256
from edgeprune.errors import BundleError, UsageError
from edgeprune.runtime import load


@pytest.fixture
def settled(altered_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a private bundle whose files are not new, with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stamps, "_SETTLED_NS", -(10**9))  # the clock of files may be ahead by a tick
    return altered_bundle


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files whose sha256 is asked for, from now on."""
    names: list[str] = []
    whole = check_sha256

    def noting(folder: Path, name: str, record: Any) -> None:
        names.append(name)
        whole(folder, name, record)

    monkeypatch.setattr(bundles, "check_sha256", noting)
    return names


def test_the_first_fast_load_is_a_full_one(settled: Path, read: list[str]) -> None:
    bundle = Bundle.load(settled, check="fast")
    assert set(read) == set(bundle.manifest.files)
    read.clear()
    assert Bundle.load(settled, check="fast") == bundle
    assert read == []
    assert load(settled, threads=1, check="fast").name
    assert read == []


def test_fast_is_only_what_was_asked_for(settled: Path, read: list[str]) -> None:
    Bundle.load(settled, check="fast")
    for _ in range(2):
        read.clear()
        Bundle.load(settled)
        assert read
    with pytest.raises(UsageError, match="full, fast"):
        Bundle.load(settled, check="never")


def _touch(folder: Path) -> None:
    os.utime(folder / VISION)


def _replace(folder: Path) -> None:
    data = (folder / VISION).read_bytes()
    (folder / VISION).unlink()
    (folder / VISION).write_bytes(data)


def _reseal(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + "\n")


@pytest.mark.parametrize("change", [_touch, _replace, _reseal])
def test_whatever_moved_is_read_again(settled: Path, read: list[str], change: Any) -> None:
    Bundle.load(settled, check="fast")
    read.clear()
    change(settled)
    Bundle.load(settled, check="fast")
    assert VISION in read


def test_setting_back_the_time_of_an_altered_file_does_not_help(settled: Path) -> None:
    Bundle.load(settled, check="fast")
    before = (settled / VISION).stat()
    time.sleep(0.02)  # more than a tick of the file system's clock
    data = bytearray((settled / VISION).read_bytes())
    data[-1] ^= 1
    with (settled / VISION).open("r+b") as file:
        file.write(data)
    os.utime(settled / VISION, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (settled / VISION).stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(BundleError, match="sha256"):
        Bundle.load(settled, check="fast")


def _stamp() -> Path:
    (found,) = stamps.cache_folder().iterdir()
    return found


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5, '{"schema_version": 1}'])
def test_an_odd_stamp_is_none(settled: Path, read: list[str], text: str) -> None:
    Bundle.load(settled, check="fast")
    _stamp().write_text(text)
    read.clear()
    Bundle.load(settled, check="fast")
    assert read


def test_a_stamp_that_others_can_write_is_none(settled: Path, read: list[str]) -> None:
    Bundle.load(settled, check="fast")
    _stamp().chmod(0o666)
    read.clear()
    Bundle.load(settled, check="fast")
    assert read


def test_a_stamp_of_another_folder_is_none(settled: Path, read: list[str]) -> None:
    Bundle.load(settled, check="fast")
    settled.rename(settled.with_name("moved"))
    read.clear()
    Bundle.load(settled.with_name("moved"), check="fast")
    assert read


def test_new_files_get_no_stamp(altered_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stamps, "_SETTLED_NS", 3600 * 10**9)
    Bundle.load(altered_bundle, check="fast")
    assert not stamps.cache_folder().exists()


def test_a_broken_bundle_gets_no_stamp(settled: Path) -> None:
    (settled / f"{DECODER}.data").write_bytes(bytes((settled / f"{DECODER}.data").stat().st_size))
    with pytest.raises(BundleError, match="sha256"):
        Bundle.load(settled, check="fast")
    assert not stamps.cache_folder().exists()


def test_where_no_stamp_can_be_kept_every_load_is_full(settled: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(settled / PLAN))  # a file
    Bundle.load(settled, check="fast")
    assert read


def test_checks_are_those_of_the_command_line() -> None:
    from edgeprune.cli.options import check_option

    @check_option
    def command() -> None: ...

    (option,) = command.__click_params__  # type: ignore[attr-defined]
    assert tuple(option.type.choices) == CHECKS

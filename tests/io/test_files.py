"""What is written is there whole or not at all, stays through a loss of power, and what killed processes left goes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.io import files
from edgeprune.io.files import new_folder, save_image, sweep, write_bytes, write_new, write_text

LEFT = ".target.0123abcd.tmp"


def new_one(target: Path) -> None:
    """Make a folder with one file."""
    with new_folder(target, force=True) as folder:
        (folder / "content").write_text("new")


def former_one(target: Path) -> None:
    """Make what was there before."""
    target.mkdir()
    (target / "former").touch()


WRITERS: list[Callable[[Path], None]] = [new_one, lambda path: write_text(path, "new")]


@pytest.mark.parametrize("write", WRITERS)
def test_what_a_killed_process_left_goes_at_the_next_writing(write: Callable[[Path], None], tmp_path: Path) -> None:
    former_one(tmp_path / LEFT)
    others = {".target.tmp", ".target.0123abcd.old", ".target.extra.0123abcd.tmp", ".another.0123abcd.tmp"}
    for name in (".target.89abcdef.tmp", *others):
        (tmp_path / name).write_text("half")
    write(tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"target", *others}


def test_a_folder_of_ones_own_is_swept_whole(tmp_path: Path) -> None:
    (tmp_path / LEFT).touch()
    former_one(tmp_path / ".another.0123abcd.tmp")
    (tmp_path / "0123abcd.tmp").touch()
    sweep(tmp_path)
    sweep(tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["0123abcd.tmp"]


@pytest.mark.parametrize("write", WRITERS)
def test_what_another_process_is_writing_stays(write: Callable[[Path], None], tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from edgeprune.io.files import new_folder
        with new_folder(Path(sys.argv[1]), force=True) as folder:
            (folder / "content").write_text("the other's")
            print("written", flush=True)
            input()
    """
    target = tmp_path / "target"
    process = subprocess.Popen([sys.executable, "-c", code, target], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout and process.stdout.readline() == "written\n"
        write(target)
        process.communicate("\n", timeout=30)
    assert process.returncode == 0
    assert (target / "content").read_text() == "the other's"
    assert list(tmp_path.iterdir()) == [target]


def test_a_name_that_is_taken_between_making_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, taken = files._locked, list[Path]()

    def late(path: Path, *, wait: bool) -> int | None:
        if wait and not taken:
            taken.append(path)
            path.rmdir()
        return locked(path, wait=wait)

    monkeypatch.setattr(files, "_locked", late)
    new_one(tmp_path / "target")
    assert taken and (tmp_path / "target" / "content").read_text() == "new"


def _seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    seen, flush = [], files._flush

    def noted(path: Path) -> None:
        seen.append(("flush", path.name))
        flush(path)

    def hear(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def heard(*given: Any) -> Any:
            seen.append((name, Path(given[1]).name))
            return call(*given)

        return heard

    monkeypatch.setattr(files, "_flush", noted)
    monkeypatch.setattr(os, "replace", hear("named", os.replace))
    monkeypatch.setattr(files, "_replace", hear("named", files._replace))
    return seen


def test_the_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _seen(monkeypatch)
    with new_folder(tmp_path / "target") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "one").touch()
        (folder / "two").touch()
    *before, named, parent = seen
    assert {name for _, name in before} == {"one", "two", "deep", folder.name}
    assert (named, parent) == (("named", "target"), ("flush", tmp_path.name))
    seen.clear()
    write_bytes(tmp_path / "file", b"1")
    assert [kind for kind, _ in seen] == ["flush", "named", "flush"]


def test_there_is_a_target_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    former_one(tmp_path / "target")
    monkeypatch.setattr(Path, "rename", None)  # one exchange, never two renames
    new_one(tmp_path / "target")
    assert (tmp_path / "target" / "content").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.fixture
def plain_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_renamed", lambda *_: False)


@pytest.mark.usefixtures("plain_disk")
def test_a_disk_that_cannot_exchange_names(tmp_path: Path) -> None:
    former_one(tmp_path / "target")
    new_one(tmp_path / "target")
    assert (tmp_path / "target" / "content").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.usefixtures("plain_disk")
def test_there_a_failed_renaming_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    former_one(tmp_path / "target")
    rename = Path.rename

    def fails(path: Path, to: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(EdgePruneError, match="Input/output error"):
        new_one(tmp_path / "target")
    assert (tmp_path / "target" / "former").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("again", [True, False])
def test_there_a_former_one_that_lost_its_name_has_it_back(again: bool, tmp_path: Path) -> None:
    former_one(tmp_path / ".target.old")
    if again:
        former_one(tmp_path / "target")
    with pytest.raises(KeyError), new_folder(tmp_path / "target", force=True):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "former").exists()


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refused(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    former_one(tmp_path / LEFT)
    new_one(tmp_path / "target")
    write_text(tmp_path / "file", "1")
    assert {path.name for path in tmp_path.iterdir()} == {"target", "file", LEFT}  # whose it is cannot be known


def test_a_folder_that_cannot_be_flushed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, kind in ((errno.EINVAL, None), (errno.EIO, EdgePruneError)):

        def fails(_: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fails)
        if kind is None:
            new_one(tmp_path / "target")
        else:
            with pytest.raises(kind, match="Input/output error"):
                new_one(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("private", [True, False])
def test_a_file_that_is_never_replaced(private: bool, exact: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not exact:
        request.getfixturevalue("plain_disk")
    write_new(tmp_path / "file", b"first", private=private)
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "file", b"second", private=private)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert ((tmp_path / "file").stat().st_mode & 0o077 == 0) == private


@pytest.mark.parametrize("name", [".", "/"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not a name for a new folder"):
        new_one(Path(name))


@pytest.mark.parametrize("name", ["picture", "picture.vlm"])
def test_a_picture_in_no_known_format_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Use a suffix such as"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / name)
    with pytest.raises(UsageError, match="Cannot write"):
        save_image(Image.new("RGBA", (2, 2)), tmp_path / "picture.jpg")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EdgePruneError, match="No such file or directory"):
        write_text(tmp_path / "none" / "file", "1")

"""Whether the files of a folder are those that were put there: sizes and sha256, and none of them outside."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BundleError

_PIECE = 1 << 20  # bytes read at once: they stay in the CPU's cache until they are hashed
_AGAIN = "Copy the bundle again, or export it again."


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of one file."""

    bytes: int
    sha256: str


def record_files(folder: Path, *left_out: str) -> dict[str, FileRecord]:
    """Return the records of every file in `folder`, but those named `left_out`, by path relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in left_out)
    return {path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_of(path)) for path in paths}


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in pieces. Other threads run meanwhile."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def check_there(folder: Path, name: str, record: FileRecord) -> None:
    """Raise BundleError unless a file lies in the folder, by no link from outside, and has its size."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"The manifest of {folder} names {name!r}, which lies outside the bundle.", hint=_AGAIN)
        if not path.is_file():
            raise BundleError(f"The bundle {folder} lacks {name!r}.", hint=_AGAIN)
        size = path.stat().st_size
    except (OSError, RuntimeError, ValueError) as error:  # names that no file can have, links in a circle
        raise BundleError(f"Cannot look at {name!r} in {folder}: {error}.", hint=_AGAIN) from error
    if size != record.bytes:
        sizes = f"its size and sha256 differ: {size} bytes, not {record.bytes}"
        raise BundleError(f"{name} in {folder} is not the file that was exported ({sizes}).", hint=_AGAIN)


def check_content(folder: Path, name: str, record: FileRecord) -> None:
    """Raise BundleError unless a file has its sha256."""
    try:
        found = sha256_of(folder / name)
    except OSError as error:
        raise BundleError(f"Cannot read {name} in {folder}: {error.strerror}.", hint=_AGAIN) from error
    if found != record.sha256:
        raise BundleError(f"{name} in {folder} is not the file that was exported (its sha256 differs).", hint=_AGAIN)

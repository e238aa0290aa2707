"""Check that the files of a bundle are those of its manifest: sizes, sha256, and nothing outside the folder.

Verification cache: a record of what the files looked like when they were last checked in full, so that `--check fast` need not
read them. It lies in the user's cache folder, never in the bundle, because whoever writes a bundle must not vouch for it. A
record holds for one folder and one manifest, and only while sizes, modification times, inodes and inode change times are the
same. The inode change time moves even when somebody sets back the modification time of an altered file. A malformed record counts
as none.

External data: ONNX Runtime and TensorRT open whatever path a tensor's `location` names, so every location must be a file of the
manifest. The graph is read without the onnx package. Only the protobuf branches that can hold a tensor are walked, and of those
only the ones that contain the word "location". Sizes and offsets inside the files are not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgeprune.errors import BundleError, EdgePruneError
from edgeprune.io.files import write_text
from edgeprune.io.protobuf import read_fields

_PIECE = 1 << 20  # bytes read at once: they stay in the CPU's cache until they are hashed
_AGAIN = "Copy the bundle again, or export it again."

_SCHEMA = 1
# A file may be altered twice within one tick of the file system's clock, and look the same.
_SETTLED_NS = 2 * 10**9

# Of each message of onnx.proto that can hold a tensor: the fields that can, and what they are.
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # fields of an entry
_LOCATION = b"location"


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


def check_size(folder: Path, name: str, record: FileRecord) -> None:
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


def check_sha256(folder: Path, name: str, record: FileRecord) -> None:
    """Raise BundleError unless a file has its sha256."""
    try:
        found = sha256_of(folder / name)
    except OSError as error:
        raise BundleError(f"Cannot read {name} in {folder}: {error.strerror}.", hint=_AGAIN) from error
    if found != record.sha256:
        raise BundleError(f"{name} in {folder} is not the file that was exported (its sha256 differs).", hint=_AGAIN)


class VerificationCache:
    """How the files `names` of a folder look now, beside its manifest's bytes."""

    def __init__(self, folder: Path, manifest: bytes, names: Iterable[str]) -> None:
        self._folder, self._names = folder, tuple(names)
        real = str(folder.resolve())
        self._head = {"schema_version": _SCHEMA, "bundle": real, "manifest_sha256": hashlib.sha256(manifest).hexdigest()}
        self._path = cache_folder() / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"
        self._looks = self._look()

    def matches(self) -> bool:
        """Tell whether these files looked the same when they were checked in full."""
        if self._looks is None or not self._is_own():
            return False
        try:
            return bool(json.loads(self._path.read_text(encoding="utf-8")) == {**self._head, "files": self._looks})
        except (OSError, ValueError, RecursionError):
            return False

    def save(self) -> None:
        """Note that the files were checked in full since this stamp was taken, unless they changed meanwhile or just before.

        Where nothing can be written there is no stamp, and the next load checks in full again.
        """
        if self._looks is None or self._look() != self._looks:
            return
        newest = max((at for look in self._looks.values() for at in (look["mtime_ns"], look["ctime_ns"])), default=0)
        if newest + _SETTLED_NS > time.time_ns():
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_text(self._path, json.dumps({**self._head, "files": self._looks}) + "\n")
        except (OSError, EdgePruneError):
            return

    def _look(self) -> dict[str, dict[str, int]] | None:
        try:
            found = {name: (self._folder / name).stat() for name in self._names}
        except OSError:
            return None
        return {
            name: {
                "bytes": at.st_size,
                "mtime_ns": at.st_mtime_ns,
                "ctime_ns": at.st_ctime_ns,
                "inode": at.st_ino,
                "device": at.st_dev,
            }
            for name, at in found.items()
        }

    def _is_own(self) -> bool:
        # Written by this user, and by nobody else since.
        try:
            at = self._path.lstat()
        except OSError:
            return False
        return not hasattr(os, "geteuid") or (at.st_uid == os.geteuid() and not at.st_mode & 0o022)


def cache_folder() -> Path:
    """Return the folder of the stamps, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeprune" / "checked"


def check_locations(folder: Path, graph: str, listed: Container[str]) -> None:
    """Raise BundleError unless every file that an ONNX graph reads weights from is `listed`, by its path in the folder."""
    beside = PurePosixPath(graph).parent
    for location in sorted(external_locations(folder / graph)):
        if (beside / location).as_posix() not in listed:
            raise BundleError(
                f"{graph} in {folder} reads its weights from {location!r}, which is no file of the bundle.",
                hint="Do not use it; export it again.",
            )


def external_locations(path: Path) -> set[str]:
    """Return the locations that the tensors of an ONNX file name, as they stand there; raise BundleError when it is none."""
    data = path.read_bytes()
    found, left = set[str](), [("model", 0, len(data))]
    try:
        while left:
            kind, begin, end = left.pop()
            if data.find(_LOCATION, begin, end) < 0:
                continue
            if kind == "entry":
                found |= _location(data, begin, end)
                continue
            held = _FIELDS[kind]
            left += [(held[number], first, last) for number, _, first, last in read_fields(data, begin, end) if number in held]
    except (ValueError, IndexError) as error:
        raise BundleError(f"{path} is no ONNX graph that can be read: {error}.", hint="Export it again.") from error
    return found


def _location(data: bytes, begin: int, end: int) -> set[str]:
    # As in protobuf: of a field that is written twice the last counts, and none that is written as an integer is a text.
    entry = {number: data[first:last] for number, _, first, last in read_fields(data, begin, end) if last}
    return {entry.get(_VALUE, b"").decode()} if entry.get(_KEY) == _LOCATION else set()

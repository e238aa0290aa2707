"""Check that a bundle's files match its manifest: sizes, sha256, and no paths outside the folder.

Verification cache: the file metadata of the last full check, so that `--check fast` need not read the files. The record is in the
user's cache folder, not in the bundle, because the author of a bundle must not vouch for it. It is valid for one folder and one
manifest, while sizes, modification times, inodes and inode change times are unchanged. The inode change time changes even if the
modification time of an altered file is set back. A malformed record is ignored.

External data: ONNX Runtime and TensorRT open any path that a tensor's `location` names, so every location must be a file of the
manifest. The graph is read without the onnx package: only protobuf branches that can hold a tensor and that contain the bytes
"location" are parsed. Sizes and offsets inside the files are not checked.
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
from edgeprune.io.files import user_cache, write_text
from edgeprune.io.protobuf import read_fields

_CHUNK_BYTES = 1 << 20  # bytes per read: small enough to stay in the CPU cache until hashed
_AGAIN = "Copy the bundle again, or export it again."

_SCHEMA = 1
# Two changes within one tick of the file system's clock leave the same metadata.
_SETTLED_NS = 2 * 10**9

# onnx.proto messages that can hold a tensor: field numbers and the kind of message in each.
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
_KEY, _VALUE = 1, 2  # fields of StringStringEntryProto
_LOCATION = b"location"


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of one file."""

    bytes: int
    sha256: str


def record_files(folder: Path, *left_out: str) -> dict[str, FileRecord]:
    """Return the record of every file in `folder` by relative path, except files named in `left_out`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in left_out)
    return {path.relative_to(folder).as_posix(): record_file(path) for path in paths}


def record_file(path: Path) -> FileRecord:
    """Return the record of one file."""
    return FileRecord(path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file. It is read in pieces; hashing releases the GIL."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def check_size(folder: Path, name: str, record: FileRecord) -> None:
    """Raise BundleError unless a file is inside the folder after resolving links and has its recorded size."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"The manifest of {folder} names {name!r}, which lies outside the bundle.", hint=_AGAIN)
        if not path.is_file():
            raise BundleError(f"The bundle {folder} lacks {name!r}.", hint=_AGAIN)
        size = path.stat().st_size
    except (OSError, RuntimeError, ValueError) as error:  # invalid file names, circular links
        raise BundleError(f"Cannot look at {name!r} in {folder}: {error}.", hint=_AGAIN) from error
    if size != record.bytes:
        sizes = f"its size and sha256 differ: {size} bytes, not {record.bytes}"
        raise BundleError(f"{name} in {folder} is not the file that was exported ({sizes}).", hint=_AGAIN)


def check_sha256(folder: Path, name: str, record: FileRecord) -> None:
    """Raise BundleError unless a file has its recorded sha256."""
    try:
        found = sha256_of(folder / name)
    except OSError as error:
        raise BundleError(f"Cannot read {name} in {folder}: {error.strerror}.", hint=_AGAIN) from error
    if found != record.sha256:
        raise BundleError(f"{name} in {folder} is not the file that was exported (its sha256 differs).", hint=_AGAIN)


class VerificationCache:
    """Metadata of a folder's files at construction, compared with the record of the last full check."""

    def __init__(self, folder: Path, manifest: bytes, names: Iterable[str]) -> None:
        self._folder, self._names = folder, tuple(names)
        real = str(folder.resolve())
        self._header = {"schema_version": _SCHEMA, "bundle": real, "manifest_sha256": hashlib.sha256(manifest).hexdigest()}
        self._path = cache_folder() / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"
        self._metadata = self._read_metadata()

    def matches(self) -> bool:
        """Return whether the metadata equals that of the last full check."""
        if self._metadata is None or not self._is_own():
            return False
        try:
            return bool(json.loads(self._path.read_text(encoding="utf-8")) == {**self._header, "files": self._metadata})
        except (OSError, ValueError, RecursionError):
            return False

    def save(self) -> None:
        """Record a full check of the files, unless they changed during the check or within 2 s before now.

        If the record cannot be written, the next load checks in full again.
        """
        if self._metadata is None or self._read_metadata() != self._metadata:
            return
        newest = max(
            (time_ns for metadata in self._metadata.values() for time_ns in (metadata["mtime_ns"], metadata["ctime_ns"])), default=0
        )
        if newest + _SETTLED_NS > time.time_ns():
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_text(self._path, json.dumps({**self._header, "files": self._metadata}) + "\n")
        except (OSError, EdgePruneError):
            return

    def _read_metadata(self) -> dict[str, dict[str, int]] | None:
        try:
            found = {name: (self._folder / name).stat() for name in self._names}
        except OSError:
            return None
        return {
            name: {
                "bytes": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
                "ctime_ns": stat.st_ctime_ns,
                "inode": stat.st_ino,
                "device": stat.st_dev,
            }
            for name, stat in found.items()
        }

    def _is_own(self) -> bool:
        # The record belongs to this user, and no other user can write it.
        try:
            stat = self._path.lstat()
        except OSError:
            return False
        return not hasattr(os, "geteuid") or (stat.st_uid == os.geteuid() and not stat.st_mode & 0o022)


def cache_folder() -> Path:
    """Return the folder of the records in the user's cache folder."""
    return user_cache() / "checked"


def check_locations(folder: Path, graph: str, listed: Container[str]) -> None:
    """Raise BundleError unless `listed` has every external weight file of an ONNX graph, by path in the folder."""
    parent = PurePosixPath(graph).parent
    for location in sorted(external_locations(folder / graph)):
        if (parent / location).as_posix() not in listed:
            raise BundleError(
                f"{graph} in {folder} reads its weights from {location!r}, which is no file of the bundle.",
                hint="Do not use it; export it again.",
            )


def external_locations(path: Path) -> set[str]:
    """Return the external data locations of an ONNX file's tensors, verbatim; raise BundleError if it cannot be parsed."""
    data = path.read_bytes()
    found, pending = set[str](), [("model", 0, len(data))]
    try:
        while pending:
            kind, begin, end = pending.pop()
            if data.find(_LOCATION, begin, end) < 0:
                continue
            if kind == "entry":
                found |= _location(data, begin, end)
                continue
            fields = _FIELDS[kind]
            pending += [
                (fields[number], first, last) for number, _, first, last in read_fields(data, begin, end) if number in fields
            ]
    except (ValueError, IndexError) as error:
        raise BundleError(f"{path} is no ONNX graph that can be read: {error}.", hint="Export it again.") from error
    return found


def _location(data: bytes, begin: int, end: int) -> set[str]:
    # As in protobuf, the last of repeated fields counts. Fields with integer encoding (end 0) are not strings.
    entry = {number: data[first:last] for number, _, first, last in read_fields(data, begin, end) if last}
    return {entry.get(_VALUE, b"").decode()} if entry.get(_KEY) == _LOCATION else set()

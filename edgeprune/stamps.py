"""What a bundle's files looked like when they were last checked in full, so that a load that asks to be fast need not read them.

A stamp is a small file in the user's cache folder, never in the bundle: whoever writes a bundle must not be able to vouch for it.
It holds for one folder and one manifest, and for files whose sizes, times and inodes are as they were. The times at which their
inodes changed are among them: these move when somebody sets back the time of an altered file. Whatever is odd about a stamp makes
it none.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from edgeprune.errors import EdgePruneError
from edgeprune.files import write_text

_SCHEMA = 1
# A file may be altered twice within one tick of the file system's clock, and look the same.
_SETTLED_NS = 2 * 10**9


class Stamp:
    """How the files `names` of a folder look now, beside its manifest's bytes."""

    def __init__(self, folder: Path, manifest: bytes, names: Iterable[str]) -> None:
        self._folder, self._names = folder, tuple(names)
        real = str(folder.resolve())
        self._head = {"schema_version": _SCHEMA, "bundle": real, "manifest_sha256": hashlib.sha256(manifest).hexdigest()}
        self._path = cache_folder() / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"
        self._looks = self._look()

    def is_known(self) -> bool:
        """Tell whether these files looked the same when they were checked in full."""
        if self._looks is None or not self._is_own():
            return False
        try:
            return bool(json.loads(self._path.read_text(encoding="utf-8")) == {**self._head, "files": self._looks})
        except (OSError, ValueError, RecursionError):
            return False

    def keep(self) -> None:
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

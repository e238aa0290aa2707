"""Write files and folders so that each appears whole or not at all, and stays through a loss of power once it has appeared.

What is being written lies beside its target as `.NAME.XXXXXXXX.tmp`, and its writer holds a lock on it. A process that is killed
leaves it without one, by which the next writer of the same target knows that nobody wants it, and removes it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import EdgePruneError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_NO_REPLACE, _EXCHANGE = 1, 2  # renameat2's flags


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file through a temporary one beside it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file through a temporary one beside it."""
    with _naming(path, data) as temporary:
        os.replace(temporary, path)


def write_new(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file that is not there yet, `private`: which its user alone may read, from its first moment on.

    Raises FileExistsError when it is there, be it since a moment ago.
    """
    with _naming(path, data, 0o600 if private else 0o666) as temporary:
        if not _renamed(temporary, path, _NO_REPLACE):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            temporary.rename(path)


def move(path: Path, target: Path) -> None:
    """Give a whole file the name of `target`, in the same folder, which it replaces."""
    try:
        os.replace(path, target)
        _flush(target.parent)
    except OSError as error:
        raise EdgePruneError(f"Cannot write {target}: {error.strerror}.") from error


@contextmanager
def _naming(path: Path, data: bytes | memoryview, mode: int = 0o666) -> Iterator[Path]:
    # A file with all of its content, which the block gives its name.
    try:
        with _beside(path, lambda temporary: temporary.touch(mode, exist_ok=False)) as temporary:
            temporary.write_bytes(data)
            _flush(temporary)
            yield temporary
            _flush(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise EdgePruneError(f"Cannot write {path}: {error.strerror}.") from error


def save_image(image: Image, path: Path) -> None:
    """Write a Pillow image in the format that the suffix names."""
    from io import BytesIO

    from PIL.Image import registered_extensions

    hint = "Use a suffix such as .png or .jpg."
    kind = registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"Cannot write {path}: unknown file extension: {path.suffix}.", hint=hint)
    encoded = BytesIO()
    try:
        image.save(encoded, kind)
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot write {path}: {error}.", hint=hint) from error
    write_bytes(path, encoded.getvalue())


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends without an error.

    Raises UsageError when `target` exists and `force` is not given. On any error, Ctrl-C included, nothing is left behind and
    an existing `target` is untouched. There is a whole `target` at any moment, the former or the new one, where the file system can
    exchange two names (exFAT, for one, cannot: there the next writer puts a former one back that lost its name).
    """
    if not target.name:
        raise UsageError(f"{str(target)!r} is not a name for a new folder.", hint="Give another output.")
    if target.exists() and not force:
        raise UsageError(f"{target} exists already.", hint="Give another output, or --force to replace it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgePruneError(f"Cannot write beside {target}: {error.strerror}.") from error
    try:
        with _beside(target, Path.mkdir) as temporary:
            yield temporary
            for folder, _, files in os.walk(temporary):
                for path in (*(Path(folder, name) for name in files), Path(folder)):
                    _flush(path)
            _replace(temporary, target)
            _flush(target.parent)
    except OSError as error:
        raise EdgePruneError(f"Cannot write {target}: {error.strerror or error}.") from error


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of a target of this `name`; without one, of all: in a folder that is nobody else's."""
    left = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if left.fullmatch(path.name)]:
            lock = _locked(path, wait=False)
            if lock is not None:
                _remove(path)
                os.close(lock)


@contextmanager
def _beside(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    # What will take the target's place; whatever has its name in the end is removed.
    sweep(target.parent, target.name)
    _restore(target)
    temporary, lock = _claimed(target, make)
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(lock)


def _claimed(target: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    while True:
        temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
        make(temporary)
        lock = _locked(temporary, wait=True)
        if lock is None:
            continue
        # Before it was locked it looked like what a killed process leaves: another writer may have removed it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), temporary.stat()):
                return temporary, lock
        os.close(lock)


def _restore(target: Path) -> None:
    # A former target that lost its name between two renames has it back.
    old = _former(target)
    with suppress(OSError):
        if target.exists():
            _remove(old)
        else:
            old.rename(target)


def _locked(path: Path, *, wait: bool) -> int | None:
    # An open descriptor with a lock that ends with the process; None where another process has it, or `path` is gone.
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if not wait:
            os.close(descriptor)
            return None  # held, or a file system without locks: then nobody knows whether it is wanted
    return descriptor


def _flush(path: Path) -> None:
    # Onto the disk, before a name says that it is there.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do it for a folder
            raise
    finally:
        os.close(descriptor)


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    elif not _renamed(temporary, target, _EXCHANGE):
        old = _former(target)
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        _remove(old)


def _renamed(old: Path, new: Path, flag: int) -> bool:
    # Linux's renameat2, which Python's library lacks; False where it is refused, or the file system or the C library cannot.
    import ctypes

    here = -100  # AT_FDCWD
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(here, os.fsencode(old), here, os.fsencode(new), flag) == 0


def _former(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _remove(path: Path) -> None:
    # Not at the top: whoever loads a bundle, by way of this module, needs it not, and it takes longer to import than this.
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

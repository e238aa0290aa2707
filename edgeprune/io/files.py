"""Write files and folders atomically and durably: each appears complete or not at all, and survives a power loss.

Data is written to `.NAME.XXXXXXXX.tmp` beside the target, and the writer holds a lock on that file or folder. A killed process
leaves it unlocked; the next writer of the same target recognises this and removes it.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import EdgePruneError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIX_HINT = "Use a suffix such as .png or .jpg."
_NO_REPLACE, _EXCHANGE = 1, 2  # renameat2's flags


def check_output(path: Path, *, force: bool, inputs: Iterable[Path | None] = (), folder: bool = False) -> None:
    """Raise UsageError unless `path` can be written: call it before the work whose result will be written there.

    An existing output is refused without `force`, and one of the `inputs` (None: was not given) always, under any of its names. A
    file is never written over a folder, and its own folder must exist; a `folder` is made with its parents.
    """
    same = next((given for given in inputs if given is not None and _replaces(path, given)), None)
    if same is not None:
        raise UsageError(f"{path} is an input ({same}), which is never overwritten.", hint="Give another output.")
    if not path.name:
        raise UsageError(f"{str(path)!r} is not a name for a new {'folder' if folder else 'file'}.", hint="Give another output.")
    if is_folder(path) and not folder:
        raise UsageError(f"{path} is a folder.", hint=f"Name a file in it, such as {path / 'NAME'}.")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path} exists already.", hint="Give another output, or --force to replace it.")
    _check_parent(path, made=folder)


def _check_parent(path: Path, *, made: bool) -> None:
    parent = path.parent
    while made and not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not os.path.lexists(parent):
        raise UsageError(
            f"There is no folder {parent} to write {path.name} to.", hint=f"Make it: mkdir -p {shlex.quote(str(parent))}"
        )
    if not is_folder(parent):
        raise UsageError(f"{parent} is no folder to write {path.name} to.", hint="Give another output.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"Not allowed to write to the folder {parent}.", hint="Give another output, or change its permissions.")


def is_file(path: Path) -> bool:
    """Return whether a path is a file; false for names that no file can have and for places that may not be looked at."""
    return os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; false for names that no folder can have and for places that may not be looked at."""
    return os.path.isdir(path)


def _replaces(path: Path, other: Path) -> bool:
    # Whether writing to `path` would replace `other`: the same file under any name, or something in the folder `path`.
    with suppress(OSError, ValueError):  # one of them is not there
        if os.path.samefile(path, other):
            return True
    return os.path.realpath(other).startswith(os.path.join(os.path.realpath(path), ""))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically."""
    with _temporary_with(path, data) as temporary:
        os.replace(temporary, path)


def write_new(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a new file atomically; `private`: only its owner can read it, from its creation on.

    Raises FileExistsError if the file exists, also if it was created during the call.
    """
    with _temporary_with(path, data, 0o600 if private else 0o666) as temporary:
        if not _renamed(temporary, path, _NO_REPLACE):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            temporary.rename(path)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file. A write that fails may leave the beginning of it, which readers of such files drop."""
    try:
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise EdgePruneError(f"Cannot write {path}: {error.strerror}.") from error


def move(path: Path, target: Path) -> None:
    """Rename a complete file to `target` in the same folder, replacing it."""
    try:
        os.replace(path, target)
        _flush(target.parent)
    except OSError as error:
        raise EdgePruneError(f"Cannot write {target}: {error.strerror}.") from error


@contextmanager
def _temporary_with(path: Path, data: bytes | memoryview, mode: int = 0o666) -> Iterator[Path]:
    # Yields a temporary file with the complete content; the block renames it.
    try:
        with _temporary_beside(path, lambda temporary: temporary.touch(mode, exist_ok=False)) as temporary:
            temporary.write_bytes(data)
            _flush(temporary)
            yield temporary
            _flush(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise EdgePruneError(f"Cannot write {path}: {error.strerror}.") from error


def save_image(image: Image, path: Path) -> None:
    """Write a Pillow image atomically in the format of the suffix."""
    from io import BytesIO

    encoded = BytesIO()
    try:
        image.save(encoded, image_format(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot write {path}: {error}.", hint=_SUFFIX_HINT) from error
    write_bytes(path, encoded.getvalue())


def image_format(path: Path) -> str:
    """Return Pillow's name of the format that a path's suffix means; raise UsageError if Pillow cannot write such files."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise UsageError(f"Cannot write {path}: unknown file extension: {path.suffix}.", hint=_SUFFIX_HINT)
    return kind


def user_cache() -> Path:
    """Return EdgePrune's folder among the user's caches; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeprune"


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends without an error.

    Raises UsageError if `target` exists and `force` is false. On any error, Ctrl-C included, the temporary folder is removed and
    an existing `target` is untouched. On file systems that can exchange two names, a complete `target` (old or new) exists at any
    moment. On others, such as exFAT, a crash may leave the old one under another name; the next writer restores it.
    """
    check_output(target, force=force, folder=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgePruneError(f"Cannot write beside {target}: {error.strerror}.") from error
    try:
        with _temporary_beside(target, Path.mkdir) as temporary:
            yield temporary
            for folder, _, files in os.walk(temporary):
                for path in (*(Path(folder, name) for name in files), Path(folder)):
                    _flush(path)
            _replace(temporary, target)
            _flush(target.parent)
    except OSError as error:
        raise EdgePruneError(f"Cannot write {target}: {error.strerror or error}.") from error


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove temporary files that killed processes left for target `name`, or for all targets in a folder of our own."""
    leftover = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if leftover.fullmatch(path.name)]:
            lock = _locked(path, wait=False)
            if lock is not None:
                _remove(path)
                os.close(lock)


@contextmanager
def _temporary_beside(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    # Yields the locked temporary path for a target, and removes whatever is at that path at the end.
    sweep(target.parent, target.name)
    _restore_interrupted(target)
    temporary, lock = _create_locked(target, make)
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(lock)


def _create_locked(target: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    while True:
        temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
        make(temporary)
        lock = _locked(temporary, wait=True)
        if lock is None:
            continue
        # Until it was locked, another writer could take it for a leftover of a killed process and remove it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), temporary.stat()):
                return temporary, lock
        os.close(lock)


def _restore_interrupted(target: Path) -> None:
    # Undo a replacement that was interrupted between its two renames.
    old = _old_path(target)
    with suppress(OSError):
        if target.exists():
            _remove(old)
        else:
            old.rename(target)


def _locked(path: Path, *, wait: bool) -> int | None:
    # Returns an open descriptor whose lock ends with the process; None if another process holds it or `path` is gone.
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
            return None  # held by another process, or the file system has no locks and the owner is unknown
    return descriptor


def _flush(path: Path) -> None:
    # Data must be on the disk before the rename that publishes it.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    elif not _renamed(temporary, target, _EXCHANGE):
        old = _old_path(target)
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        _remove(old)


def _renamed(old: Path, new: Path, flag: int) -> bool:
    # Linux's renameat2, which Python does not expose; False if it fails or the file system or C library does not support it.
    import ctypes

    at_fdcwd = -100
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return renameat2 is not None and renameat2(at_fdcwd, os.fsencode(old), at_fdcwd, os.fsencode(new), flag) == 0


def _old_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _remove(path: Path) -> None:
    # Imported here because loading a bundle imports this module but never removes anything, and shutil is slow to import.
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

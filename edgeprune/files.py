"""Write files and folders so that each appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import EdgePruneError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file through a temporary one beside it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file through a temporary one beside it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise EdgePruneError(f"Cannot write {path}: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_image(image: Image, path: Path) -> None:
    """Write a Pillow image in the format that the suffix names, through a temporary file beside it."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        image.save(temporary)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot write {path}: {error}.", hint="Use a suffix such as .png or .jpg.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends without an error.

    Raises UsageError when `target` exists and `force` is not given. On any error, Ctrl-C included, nothing is left behind and
    an existing `target` is untouched.
    """
    # Not at the top: whoever loads a bundle, by way of this module, needs neither, and they take longer to import than it.
    import shutil
    import tempfile

    if target.exists() and not force:
        raise UsageError(f"{target} exists already.", hint="Give another output, or --force to replace it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise EdgePruneError(f"Cannot write beside {target}: {error.strerror}.") from error
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        _replace(temporary, target)
    except OSError as error:
        raise EdgePruneError(f"Cannot write {target}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, target: Path) -> None:
    import shutil

    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old) if old.is_dir() else old.unlink()

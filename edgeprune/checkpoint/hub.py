"""Models of the Hugging Face Hub: small files first, weights when all checks have passed. Through huggingface_hub, in its cache.

Its settings hold: HF_HOME, HF_ENDPOINT, HF_TOKEN or `hf auth login`, HF_HUB_OFFLINE, proxies, progress bars.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

from edgeprune.checkpoint.formats import HUB_ID, sizes_in
from edgeprune.errors import EdgePruneError, UsageError, require_extra
from edgeprune.io.files import is_file, is_folder

MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = (".json", ".jinja", ".txt", ".model")  # settings, vocabularies, templates
_CODE = ".py"
_TEMPLATES = "additional_chat_templates/"
_README = "README.md"  # names the model that a quantized one was made from
_CONNECTION = "Check the connection, HTTPS_PROXY and HF_ENDPOINT, or give a folder."
_GOES_ON = "The same command goes on where it stopped: files that arrived whole are kept."


@dataclass(frozen=True)
class Snapshot:
    """The files of a model in a folder, at one commit if that is known.

    `hub_id`: of a model of the hub, whose weights may not be in the folder yet; else empty. `sizes`: bytes of all its files.
    """

    path: Path
    hub_id: str = ""
    commit: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of an id of the hub, such as Qwen/Qwen2.5-VL-3B-Instruct."""
    return HUB_ID.fullmatch(name) is not None


def local_snapshot(path: Path, revision: str | None) -> Snapshot:
    """Return the model in a folder; of a folder in the hub's cache its `revision`, by default main.

    Raises UsageError for a revision that the folder does not have.
    """
    cached = _cached_commit(path, revision or MAIN)
    if cached is not None:
        path = path / "snapshots" / cached
        if not is_folder(path):
            raise UsageError(
                f"{path.parent.parent} lacks the files of its commit {cached}.", hint=f"Download it: {_download(path, cached)}"
            )
    commit = path.name if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name) else ""
    if revision is not None and cached is None and revision != commit:
        at = f"is at commit {commit}" if commit else "has no revisions"
        raise UsageError(f"{path} {at}: it is a folder.", hint="Leave --revision out, or give the model's id on the hub.")
    return Snapshot(path, commit=commit, sizes=sizes_in(path))


def hub_snapshot(name: str, revision: str | None, *, code: bool = False) -> Snapshot:
    """Return the model `name` of the hub with its small files downloaded; with `code`, its Python files too.

    Raises UsageError for a name or revision that the hub does not have, and EdgePruneError if it cannot be reached.
    """
    path = download_files(name, revision, ["config.json"])
    commit = path.name
    sizes = files_of(name, path)
    small = [file for file in sizes if _is_small(file) or (code and "/" not in file and file.endswith(_CODE))]
    download_files(name, commit, small)
    return Snapshot(path, name, commit, sizes)


def download(name: str, commit: str, files: Collection[str]) -> None:
    """Download files of the model `name` into the cache; those that are there are kept.

    Raises EdgePruneError with the remedy if the disk is too small, access is not granted, or the download is interrupted.
    """
    path = _cache() / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    sizes = files_of(name, path)
    missing = [file for file in files if not is_file(path / file)]
    if missing:
        _check_space(name, sum(sizes.get(file, 0) for file in missing))
        download_files(name, commit, missing, visible=True)


def download_files(name: str, revision: str | None, files: Collection[str], *, visible: bool = False) -> Path:
    """Download files of the model `name` of the hub at a revision, those that it has; return the folder of the commit.

    Asks for nothing over the network if the revision is a commit and all are there. `visible`: with its progress on stderr.
    Raises as `hub_snapshot` and `download` do.
    """
    require_extra("export", "huggingface_hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import tqdm

    # The hub's own bars in a terminal; without one a line every ten seconds.
    shown = {} if sys.stderr.isatty() else {"file": _Lines(), "mininterval": 10.0, "ncols": 100, "ascii": " ="}

    class Bar(tqdm):
        def __init__(self, *values: Any, **options: Any) -> None:
            changed = shown if visible else {"disable": True}
            super().__init__(*values, **{**options, **changed})  # type: ignore[no-untyped-call]

    transport: Any = HfHubHTTPError.__bases__[0]  # the errors of httpx, or of httpx2 in newer versions
    with _quiet():
        try:
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    cache_dir=_cache(),
                    allow_patterns=[escape(file) for file in files],
                    tqdm_class=Bar,
                )
            )
        except (OSError, ValueError, RuntimeError, transport) as error:
            raise _explained(error, name, revision or MAIN) from error


def files_of(name: str, path: Path) -> Mapping[str, int]:
    """Return the bytes of each file of the model `name` at the commit whose folder in the cache is `path`.

    By the list that came with its download; where another program downloaded it, there may be none, and its present files count.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(name, revision=path.name, cache_dir=_cache())}
    except CachedRepoTreeNotFoundError:
        return sizes_in(path)


class _Lines:
    # A file for tqdm, which draws over its last line: each of its lines stands for itself.
    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _cached_commit(path: Path, revision: str) -> str | None:
    # The commit of a revision in a folder models--org--name of the cache, None for any other folder.
    if not (path.name.startswith("models--") and is_folder(path / "snapshots")):
        return None
    if _COMMIT.fullmatch(revision):
        return revision
    reference = path / "refs" / revision
    if not is_file(reference):
        raise UsageError(f"{path} has no revision {revision}.", hint=f"Download it: {_download(path, revision)}")
    return reference.read_text(encoding="utf-8").strip()


def _download(path: Path, revision: str) -> str:
    # The command that completes a folder of the cache.
    name = next(part for part in (path, *path.parents) if part.name.startswith("models--")).name
    return f"hf download {'/'.join(name.split('--')[1:])} --revision {revision}"


def _is_small(file: str) -> bool:
    return file.startswith(_TEMPLATES) or file == _README or ("/" not in file and file.endswith(_SMALL))


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _check_space(name: str, needed: int) -> None:
    place = next(each for each in (_cache(), *_cache().parents) if is_folder(each))
    free = shutil.disk_usage(place).free
    if needed > free:
        raise _full(f"{name} takes {needed / 1e9:.1f} GB in {_cache()}, where {free / 1e9:.1f} GB are free.")


def _full(message: str) -> EdgePruneError:
    return EdgePruneError(message, hint="Free space there, or set HF_HOME to a folder on another disk.")


@contextmanager
def _quiet() -> Iterator[None]:
    # Its warnings say in several lines what the error says in one.
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _explained(error: BaseException, name: str, revision: str) -> EdgePruneError:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    answer = next((each for each in (error, error.__cause__) if isinstance(each, HfHubHTTPError)), None)
    if answer is not None:
        return _answered(answer, name, revision)
    if isinstance(error, LocalEntryNotFoundError):
        return _not_cached(error, name, revision)
    if isinstance(error, ValueError):
        return _misunderstood(error, name)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(f"There is no space left for {name} in {_cache()}.")
    if isinstance(error, PermissionError) and error.filename is not None:
        return EdgePruneError(f"Not allowed to write to {error.filename}.", hint="Set HF_HOME to a folder of your own.")
    return EdgePruneError(f"The download of {name} was interrupted: {_cause(error)}", hint=_GOES_ON)


def _misunderstood(error: ValueError, name: str) -> EdgePruneError:
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, HFValidationError):
        return UsageError(f"There is no model folder {name}, and no model of the hub can have this id.", hint="Check the name.")
    # A page in HTML, say, of a proxy or a login.
    return EdgePruneError(f"{constants.ENDPOINT} did not answer as the hub does: {_cause(error)}", hint=_CONNECTION)


def _answered(error: Any, name: str, revision: str) -> EdgePruneError:
    # The error for what the hub answered instead of a file.
    from huggingface_hub import constants, errors

    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{name}"
    if isinstance(error, errors.GatedRepoError):
        return EdgePruneError(
            f"{name} is given only to those who accepted its licence.", hint=f"Accept it on {page}, then: hf auth login"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"There is no model folder {name}, and {hub} has no such model, or it is private.",
            hint="Check the name; for a private model: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{name} has no revision {revision}.", hint=f"Its branches, tags and commits: {page}/tree/main")
    if error.response.status_code in (401, 403):
        return EdgePruneError(f"{hub} does not give {name} to this token: {_cause(error)}", hint="Log in again: hf auth login")
    return EdgePruneError(f"{hub} did not give {name}: {_cause(error)}", hint=f"Try again later. {_GOES_ON}")


def _not_cached(error: BaseException, name: str, revision: str) -> EdgePruneError:
    from huggingface_hub import constants
    from huggingface_hub.errors import IncompleteSnapshotError

    at = "" if revision == MAIN else f" at {revision}"
    lacks = (
        f"{constants.HF_HUB_CACHE} has {'only a part' if isinstance(error, IncompleteSnapshotError) else 'nothing'} of {name}{at}"
    )
    if constants.HF_HUB_OFFLINE:
        return EdgePruneError(
            f"{lacks}, and HF_HUB_OFFLINE forbids to download it.", hint="Unset HF_HUB_OFFLINE, or give a folder."
        )
    return EdgePruneError(f"{lacks}, and {constants.ENDPOINT} cannot be reached.", hint=_CONNECTION)


def _cause(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{line.strip().rstrip('.')}."

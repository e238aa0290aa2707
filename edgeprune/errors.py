"""Exceptions that EdgePrune raises deliberately. Any other exception that escapes is a bug and keeps its traceback.

EdgePruneError                 a request that cannot be met; the message says what, where and the remedy (exit code 1)
├── UsageError                 the request itself is wrong: an option, a path, a value (exit code 2)
│   ├── ImageError             an image that cannot be read or is not safe to read
│   └── PlanError              a keep plan that is malformed or was made for something else
├── UnsupportedModelError      a model folder that EdgePrune does not support; the message names what it supports
├── BundleError                a bundle with a missing, altered or too new part
│   └── NoBundleError          a path at which there is no bundle (exit code 2)
├── EngineError                a TensorRT engine that cannot be built, is not trusted or cannot run the request
├── VerificationError          a bundle that does not agree with its reference
└── MissingExtraError          a Python package that the command needs is not installed (exit code 3)
"""

from __future__ import annotations

import collections.abc
import importlib.util
import pathlib
import typing
import warnings

_MAX_CHARS = 900  # of a message or a hint


class EdgePruneError(Exception):
    """A request that cannot be met. `message` and `hint` (the remedy) are one sentence each."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = one_line(message), one_line(hint)
        super().__init__(f"{self.message} {self.hint}" if hint else self.message)


class UsageError(EdgePruneError):
    """The request itself is wrong."""

    exit_code = 2


class ImageError(UsageError):
    """An image that cannot be read, or is not safe to read."""


class PlanError(UsageError):
    """A keep plan that is malformed, or was made for another model or geometry."""


class UnsupportedModelError(EdgePruneError):
    """A model folder that EdgePrune does not support."""


class BundleError(EdgePruneError):
    """A bundle with a missing, altered or too new part."""


class NoBundleError(BundleError):
    """A path at which there is no bundle."""

    exit_code = 2


class EngineError(EdgePruneError):
    """A TensorRT engine that cannot be built, is not trusted, or cannot run the request."""


class VerificationError(EdgePruneError):
    """A bundle that does not agree with its reference."""


class MissingExtraError(EdgePruneError):
    """A Python package that the command needs is not installed."""

    exit_code = 3


def one_line(text: str) -> str:
    """Return a text as one line of printable characters, with the middle of a long text omitted.

    Messages contain untrusted names and values. They must not move the cursor, forge log lines or fill a disk.
    """
    if len(text) > _MAX_CHARS:
        text = f"{text[: _MAX_CHARS - 300]} ... {text[-290:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)


def require_extra(extra: str, *packages: str) -> None:
    """Raise MissingExtraError with the install line unless every package can be imported."""
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise MissingExtraError(f"{', '.join(missing)} not installed.", hint=f"Install with: {install_command(extra)}")


def install_command(extra: str) -> str:
    """Return the command that installs an extra from where EdgePrune itself was installed: a checkout, a wheel, git or an index."""
    checkout = _checkout()
    if checkout is not None:
        return f'pip install -e "{checkout}[{extra}]"'
    record = _direct_url()
    vcs = record.get("vcs_info")
    url = f"{vcs['vcs']}+{record['url']}@{vcs['commit_id']}" if vcs else record.get("url", "")
    origin = f" @ {url}" if url else ""
    return f'pip install "edgeprune[{extra}]{origin}"'


def update_hint() -> str:
    """Return how EdgePrune itself is updated: as a sentence with the command, by where it was installed from."""
    checkout, record = _checkout(), _direct_url()
    if checkout is not None:
        return f'Update EdgePrune: git -C "{checkout}" pull'
    vcs = record.get("vcs_info")
    if record and not vcs:
        return f"Install a newer EdgePrune: this one is {record.get('url')}"
    origin = f" @ {vcs['vcs']}+{record['url']}" if vcs else ""
    return f'Update EdgePrune: pip install -U "edgeprune{origin}"'


def did_you_mean(name: str, known: collections.abc.Iterable[str]) -> str:
    """Return "Did you mean fastv? " for a name that is close to a known one, else an empty text."""
    from difflib import get_close_matches  # slow to import

    by_lower = {each.casefold(): each for each in known}
    close = get_close_matches(name.casefold(), by_lower, n=1)
    return f"Did you mean {by_lower[close[0]]}? " if close else ""


def renamed(owner: str, name: str, names: dict[str, str]) -> str:
    """Return the new name of a renamed attribute of `owner` and warn. Old public names work for one release.

    Raises AttributeError for a name that is not in `names`.
    """
    if name not in names:
        raise AttributeError(f"{owner} has no attribute {name!r}")
    warnings.warn(f"{owner}.{name} is now {owner}.{names[name]}.", DeprecationWarning, stacklevel=3)
    return names[name]


def _checkout() -> pathlib.Path | None:
    folder = pathlib.Path(__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() else None


def _direct_url() -> dict[str, typing.Any]:
    # pip's record (PEP 610) of where EdgePrune came from; empty if that is an index.
    import json
    from importlib.metadata import PackageNotFoundError, distribution  # slow to import

    try:
        return dict(json.loads(distribution("edgeprune").read_text("direct_url.json") or "{}"))
    except (PackageNotFoundError, ValueError):
        return {}


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is not None:
        return spec is not None
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:  # a namespace package is no proof: our own wheel has a file in optimum's
        return bool(version(package))
    except PackageNotFoundError:
        return False

"""What broke: each kind once, as a file with the case, which can be replayed, and one that says what happened."""

from __future__ import annotations

import hashlib
import time
import traceback
import warnings
from pathlib import Path

from fuzz.state import State
from fuzz.target import Broken, Hang, Target, attempt


class Findings:
    """Runs cases of one target, counts them in `state`, and keeps those that break something in `folder`."""

    def __init__(self, name: str, target: Target, folder: Path, state: State, *, alarm: bool = True) -> None:
        self._name, self._target, self._folder, self._state, self._alarm = name, target, folder, state, alarm
        self._known = set[str]()

    def check(self, data: bytes) -> None:
        """Run a case; raise what broke, unless that is known already."""
        self._state.begin(data)
        began, taken = time.monotonic(), False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                taken = attempt(self._target, data, alarm=self._alarm)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if kind_of(error) not in self._known:
                raise
        finally:
            self._state.end(taken, time.monotonic() - began)

    def keep(self, data: bytes, error: BaseException) -> None:
        """Write a finding; its kind is known from now on."""
        self._known.add(kind_of(error))
        keep(self._folder, self._name, data, "".join(traceback.format_exception(error)))


def keep(folder: Path, name: str, data: bytes, what: str) -> None:
    """Write a case and what came of it into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.with_suffix(".case").write_bytes(data)
    path.with_suffix(".txt").write_text(what, encoding="utf-8", errors="backslashreplace")


def kind_of(error: BaseException) -> str:
    """Return what is the same for all cases of one mistake: the kind of error, and where it came from."""
    if isinstance(error, (Broken, Hang)):
        return str(error)[:30]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{type(error).__name__} {ours[-1].filename}:{ours[-1].lineno}"

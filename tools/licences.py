"""Write docs/licences.md: the licence of every locked package, as its own metadata states it, and what needs it.

The packages are installed into folders, once for each Python that has some of its own; only their metadata is read. torch, which is
not in the locks, is read from the environment that runs this. Needs uv, and packaging from the tests' environment.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")  # later ones have the packages of 3.13
LOCKS = ("test", "release", "fuzz")
RUNTIME = "runtime"
_FLAGS = {
    "copyleft": re.compile(r"\bA?GPL|(?<!Lesser )General Public", re.IGNORECASE),
    "weak copyleft": re.compile(r"\bLGPL|\bMPL|\bEPL|Mozilla|Eclipse|Lesser", re.IGNORECASE),
    "proprietary": re.compile("proprietary", re.IGNORECASE),
}
_LONGEST = 60  # letters of a name; some put the whole text there
_HEAD = """# Licences

Made by `make licences` from the metadata of the packages in [locks](../locks); do not edit it. `runtime` is what `pip install
edgeprune` brings; then the extras of `pyproject.toml`, and the tools of `make lock` and `make sbom` (`release`), `make fuzz`.
Nothing of all this is in our wheel: pip fetches it. The wheel holds our own code, the page of `edgeprune serve`, and the bundled
model, which was trained here on scenes that were drawn here ([its card](../edgeprune/tabletop/model/README.md)): no weights, data
or code of others. All of it is under [Apache-2.0](../LICENSE). TableTop-L, which `make instrument` makes, has weights of others
([its card](../examples/train_tabletop/tabletop-l/README.md)).

Wheels of packages with compiled parts bring libraries along, whose licences lie beside them in `*.dist-info`: in numpy's there are
OpenBLAS, libgfortran (GPL, with the exception that lets any program use it) and libquadmath (LGPL, a file of its own).

"""


@dataclass
class Entry:
    """One package: its `versions`, its `licence` and what `needs` it."""

    licence: str = ""
    versions: set[str] = field(default_factory=set)
    needs: set[str] = field(default_factory=set)


def main() -> None:
    """Read the metadata and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    entries: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for python in PYTHONS:
            found = [distribution("torch")]
            for lock in LOCKS:
                found += installed(given.uv, python, lock, Path(temporary) / f"{python}-{lock}")
            collect(entries, found, python)
    given.output.write_text(page(entries), encoding="utf-8")


def installed(uv: str, python: str, lock: str, folder: Path) -> list[Distribution]:
    """Install a lock for another Python into a folder, and return what is there."""
    command = [
        uv,
        "pip",
        "install",
        "--quiet",
        "--target",
        str(folder),
        "--python-version",
        python,
        "--no-deps",
        "--require-hashes",
    ]
    command += ["--python-platform", "x86_64-manylinux_2_35", "-r", str(ROOT / "locks" / f"{lock}.txt")]
    subprocess.run(command, check=True)
    return list(distributions(path=[str(folder)]))


def collect(entries: dict[str, Entry], found: Iterable[Distribution], python: str) -> None:
    """Add the packages of one Python to `entries`, by canonical name."""
    known: dict[str, Distribution] = {canonicalize_name(each.name): each for each in found}
    for name, each in known.items():
        entry = entries.setdefault(name, Entry())
        entry.licence = licence_of(each)  # of the newest version, as later Pythons come later
        entry.versions.add(each.version.partition("+")[0])
    for what, requirements in wanted().items():
        for name in closure(requirements, known, python):
            entries[name].needs.add(what)


def wanted() -> dict[str, list[str]]:
    """Return the requirements of pyproject.toml: of the runtime, of each extra and of each group of tools."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # tomli comes with pytest there
    data = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = data["project"]["optional-dependencies"]
    return {RUNTIME: data["project"]["dependencies"], **extras, **data["dependency-groups"]}


def closure(requirements: Iterable[str], known: Mapping[str, Distribution], python: str) -> set[str]:
    """Return the names of all that some requirements bring on Linux, under a version of Python."""
    there = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    reached: set[tuple[str, str]] = set()
    left = [(Requirement(each), "") for each in requirements]
    while left:
        requirement, extra = left.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({**there, "extra": extra}):
            continue
        for asked in {"", *requirement.extras}:
            if (name, asked) not in reached:
                reached.add((name, asked))
                left += [(Requirement(each), asked) for each in known[name].requires or []]
    return {name for name, _ in reached}


def licence_of(package: Distribution) -> str:
    """Return what a package says of its licence: the expression, a short name, the classifiers, or its title."""
    stated = {name: "".join(package.metadata.get_all(name) or []).strip() for name in ("License-Expression", "License")}
    expression, text = stated.values()
    if expression or (text and len(text) <= _LONGEST and "\n" not in text and text != "UNKNOWN"):
        return expression or text
    classifiers = [each for each in package.metadata.get_all("Classifier") or [] if each.startswith("License ::")]
    names = ", ".join(each.rpartition(" :: ")[2] for each in classifiers)
    return names or text.partition("\n")[0] or _title(package) or "not stated"


def _title(package: Distribution) -> str:
    # The first line of the licence itself, of packages that only bring its text.
    named = [
        file for file in package.files or () if "licenses" in file.parts and file.stem.upper() in ("LICENSE", "LICENCE", "COPYING")
    ]
    return next((line.strip() for file in named for line in file.read_text().splitlines() if line.strip()), "")


def flags(licence: str) -> list[str]:
    """Return what is to be known about a licence: weak or full copyleft, or proprietary."""
    return [name for name, pattern in _FLAGS.items() if pattern.search(licence)]


def page(entries: Mapping[str, Entry]) -> str:
    """Return the page: what is to be known first, then all of it."""
    flagged = defaultdict(list)
    for name, entry in sorted(entries.items()):
        for flag in flags(entry.licence):
            flagged[flag].append(name + (" (runtime)" if RUNTIME in entry.needs else ""))
    lines = [f"- {flag}: {', '.join(names) or 'none'}" for flag, names in ((flag, flagged[flag]) for flag in _FLAGS)]
    lines += ["", "| package | version | licence | needed by |", "|---|---|---|---|"]
    for name, entry in sorted(entries.items()):
        needs = RUNTIME if RUNTIME in entry.needs else ", ".join(sorted(entry.needs))
        lines.append(f"| {name} | {', '.join(sorted(entry.versions))} | {entry.licence} | {needs} |")
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Write a software bill of materials: what a locked installation consists of, as CycloneDX JSON.

It is taken from a fresh environment with the lock and our own wheel in it, so that it has what was really installed, with licences
and with what asks for what; the model that the wheel holds is a component too. It names no place on this machine and no time, so
that the same lock and the same wheel give the same bytes. Needs cyclonedx-bom, as locked.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_SPEC = "1.6"
_PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--no-deps")


def main() -> None:
    """Install, list, clean, and check against CycloneDX's schema."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, required=True, help="The folder with our own wheel.")
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--also", nargs="*", default=[], help="What is installed by version, beside the lock.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        python = installed(Path(temporary) / "env", given.wheels, given.lock, given.also)
        raw = Path(temporary) / "raw.json"
        options = ["--output-reproducible", "--spec-version", _SPEC, "--mc-type", "application"]
        command = [str(Path(sys.executable).with_name("cyclonedx-py")), "environment", *options]
        subprocess.run([*command, "--pyproject", str(ROOT / "pyproject.toml"), "-o", str(raw), str(python)], check=True)
        bill = cleaned(json.loads(raw.read_text()))
    bill["components"].append(_model())
    text = json.dumps(bill, indent=2, sort_keys=True) + "\n"
    check(text)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(text)
    print(f"{len(bill['components'])} components in {given.output}")


def installed(folder: Path, wheels: Path, lock: Path, also: Sequence[str]) -> Path:
    """Make an environment with what the lock says, `also` and our own wheel, and without pip; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    _uninstall(python, "setuptools")  # an old one, which venv puts there for Pythons before 3.12
    # By name and not by path: pip would write down where the wheel was.
    ours = ("--no-index", f"--find-links={wheels.resolve()}", "edgeprune")
    for what in (("--require-hashes", "-r", str(lock)), tuple(also), ours):
        if what:
            subprocess.run([str(python), *_PIP, *what], check=True)
    _uninstall(python, "pip")
    return python


def _uninstall(python: Path, name: str) -> None:
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--disable-pip-version-check", "--yes", name], check=True)


def cleaned(bill: dict[str, Any]) -> dict[str, Any]:
    """Return a bill without references into this machine's files."""
    for component in _components(bill):
        kept = [each for each in component.get("externalReferences", ()) if not each["url"].startswith("file:")]
        component.pop("externalReferences", None)
        if kept:
            component["externalReferences"] = kept
    return bill


def check(text: str) -> None:
    """Raise SystemExit where a bill does not follow CycloneDX's schema."""
    validation, schema = importlib.import_module("cyclonedx.validation.json"), importlib.import_module("cyclonedx.schema")
    error = validation.JsonStrictValidator(schema.SchemaVersion.from_version(_SPEC)).validate_str(text)
    if error is not None:
        raise SystemExit(f"The bill of materials is malformed: {error}")


def _model() -> dict[str, Any]:
    weights = ROOT / "edgeprune" / "tabletop" / "model" / "model.safetensors"
    digest = {"alg": "SHA-256", "content": hashlib.sha256(weights.read_bytes()).hexdigest()}
    about = "The bundled model, trained here on scenes that were drawn here"
    return {"type": "machine-learning-model", "bom-ref": "tabletop", "name": "tabletop", "description": about, "hashes": [digest]}


def _components(bill: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield bill["metadata"]["component"]
    yield from bill["components"]


if __name__ == "__main__":
    main()

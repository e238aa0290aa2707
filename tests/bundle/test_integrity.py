"""What is read from a bundle lies in its folder and is listed: links, names, and files that nobody listed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune.bundle import MANIFEST, PLAN, Bundle, Manifest
from edgeprune.errors import BundleError


def test_a_link_that_leaves_the_bundle_is_refused(altered_bundle: Path) -> None:
    (altered_bundle / PLAN).rename(altered_bundle.parent / PLAN)
    (altered_bundle / PLAN).symlink_to(altered_bundle.parent / PLAN)
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(altered_bundle)


def test_a_folder_that_is_a_link_out_of_the_bundle_is_refused(altered_bundle: Path) -> None:
    (altered_bundle / "onnx").rename(altered_bundle.parent / "onnx")
    (altered_bundle / "onnx").symlink_to(altered_bundle.parent / "onnx")
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.load(altered_bundle)


def test_links_in_a_circle_are_refused(altered_bundle: Path) -> None:
    (altered_bundle / PLAN).unlink()
    (altered_bundle / PLAN).symlink_to(altered_bundle / PLAN)
    with pytest.raises(BundleError, match=PLAN):
        Bundle.load(altered_bundle)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "onnx", "\ud800"])
def test_names_that_are_no_files_are_refused(name: str, altered_bundle: Path) -> None:
    data = json.loads((altered_bundle / MANIFEST).read_text())
    data["files"][name] = {"bytes": 1, "sha256": "0"}
    (altered_bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError):
        Bundle.load(altered_bundle)


def test_a_link_to_the_bundle_itself_is_taken(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_bundle.path)
    assert Bundle.load(tmp_path / "link").plan == tiny_bundle.plan


def test_files_that_nobody_listed_are_never_opened(altered_bundle: Path) -> None:
    (altered_bundle / "onnx" / "more.onnx").write_bytes(b"not a graph")
    (altered_bundle / "run.py").write_text("raise SystemExit(1)")
    (altered_bundle / "link").symlink_to("/etc/hostname")
    code = f"""
import sys
opened = []
sys.addaudithook(lambda event, found: opened.append(str(found[0])) if event == "open" else None)
import numpy, edgeprune.runtime
model = edgeprune.runtime.load({str(altered_bundle)!r}, threads=1)
model.generate(numpy.zeros((84, 112, 3), numpy.uint8), "What is it?", max_tokens=2)
print(*(name for name in opened if name.startswith({str(altered_bundle)!r})), sep="\\n")
"""
    output = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    opened = {Path(name).relative_to(altered_bundle).as_posix() for name in output.split()}
    assert opened and opened <= set(Manifest.load(altered_bundle).files) | {MANIFEST}

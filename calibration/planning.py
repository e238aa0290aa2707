"""Make a keep plan from what a user says: a method, keep ratios and the layers where they begin."""

from __future__ import annotations

from pathlib import Path

from edgeprune.calibration.lightcompress import SUFFIXES, read_lightcompress
from edgeprune.plan import KeepPlan


def is_lightcompress(path: Path) -> bool:
    """Return whether a plan file is LightCompress's YAML, which counts no tokens: model and image size decide how many."""
    return path.suffix.lower() in SUFFIXES


def read_plan(path: Path, base: KeepPlan) -> KeepPlan:
    """Return the plan in a file: a keep plan (JSON), or `base` with the cuts of LightCompress's settings (YAML)."""
    return read_lightcompress(path, base) if is_lightcompress(path) else KeepPlan.load(path)

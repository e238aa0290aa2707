"""Bundles of EdgePrune as a model of lmms-eval: `lmms-eval --model edgeprune --model_args pretrained=table.bundle`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return the ModelManifest that the entry point in pyproject.toml gives to lmms-eval; nothing else is imported for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="edgeprune", chat_class_path=f"{__name__}.model.EdgePrune")

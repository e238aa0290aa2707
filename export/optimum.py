"""Integration with optimum: importing this module registers all families with `TasksManager` for the exporter "edgeprune"."""

from __future__ import annotations

from typing import Any

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils.normalized_config import NormalizedConfig

from edgeprune.registry import FAMILIES, TASK, family_class

EXPORTER = "edgeprune"


class EdgePruneConfig(ExporterConfig):  # type: ignore[misc]  # optimum is untyped
    """Optimum's export configuration of a model; raises UnsupportedModelError for an unsupported model.

    The image size is a constant of the plan, so only the text has a dynamic axis.
    """

    NORMALIZED_CONFIG_CLASS = NormalizedConfig

    def __init__(self, config: Any, task: str = TASK, **types: Any) -> None:
        super().__init__(config, task, **types)
        family_class(config.model_type).check(config)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """The inputs with their dynamic axes."""
        return {"pixel_values": {}, "input_ids": {1: "sequence_length"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """The outputs with their dynamic axes."""
        return {"logits": {1: "sequence_length"}}


def register_families() -> None:
    """Register every family with TasksManager; existing registrations are kept."""
    register = TasksManager.create_register(EXPORTER)
    for model_type in FAMILIES:
        register(model_type, TASK, library_name="transformers")(EdgePruneConfig)


register_families()

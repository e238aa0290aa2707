"""What the lint says: one Finding for each thing that a target refuses or changes silently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing in a graph that a target refuses (`error`) or that may surprise (`warning`).

    `node` is the name of a node or, where no node is at fault, of a tensor; `operator` is empty then. `reason` says what is wrong
    and `remedy` what to do, one sentence each.
    """

    graph: str
    node: str
    operator: str
    reason: str
    remedy: str
    severity: Severity

    def __str__(self) -> str:
        place = f"{self.graph}: {self.node} ({self.operator})" if self.operator else f"{self.graph}: {self.node}"
        return f"{self.severity}: {place}: {self.reason} {self.remedy}"

"""Which method acts at which site of which family, and why not elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeprune.plan import SITES
from edgeprune.registry import METHODS, method_class


@dataclass(frozen=True)
class Field:
    """A method at a site. `reason`: why it does not apply there, empty where it does."""

    method: str
    site: str
    reason: str


def fields(family: Any) -> list[Field]:
    """Return one field for every method and site, for a family's class or one of its models."""
    return [Field(method, site, why_not(method, site, family)) for method in sorted(METHODS) for site in SITES]


def why_not(method: str, site: str, family: Any) -> str:
    """Return why a method cannot act at a site of a family; an empty string where it can."""
    kind = method_class(method)
    if site not in kind.sites:
        return f"acts at: {', '.join(kind.sites)}"
    if site == "vision" and family.unthinned:
        return f"needs an encoder whose tokens can leave: {family.unthinned}"
    for signal in kind.needs:
        if signal not in family.signals:
            return f"needs the signal {signal!r}" + (f": {family.unsignalled}" if family.unsignalled else "")
    if getattr(kind, "videos_only", False) and not family.videos:
        return "needs a video, which the family does not take"
    return ""

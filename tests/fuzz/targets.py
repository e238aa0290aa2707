"""All targets, and how many cases each is worth: cheap ones get more."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from fuzz.target import Target


@dataclass(frozen=True)
class Entry:
    """Where a target is made; `ci`: cases of a run of the tests; `share`: of a nightly run's cases. `needs`: packages."""

    place: str
    ci: int
    share: int
    needs: tuple[str, ...] = ()

    def make(self) -> Target:
        """Return the target."""
        module, _, name = self.place.partition(":")
        made: Target = getattr(importlib.import_module(module), name)()
        return made

    @property
    def missing(self) -> list[str]:
        """The packages that it needs and that are not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


TARGETS = {
    "chat_bodies": Entry("fuzz.chats:chat_bodies", 1100, 16, ("pydantic", "starlette", "uvicorn", "openai")),
    "frames": Entry("fuzz.pictures:frames", 900, 14),
    "http": Entry("fuzz.chats:http", 700, 3, ("pydantic", "starlette", "uvicorn", "openai")),
    "image_files": Entry("fuzz.pictures:image_files", 1000, 11),
    "image_urls": Entry("fuzz.pictures:image_urls", 600, 4, ("starlette",)),
    "likeness": Entry("fuzz.records:likeness", 500, 3, ("safetensors",)),
    "manifests": Entry("fuzz.bundles:manifests", 900, 5),
    "plans": Entry("fuzz.plans:plans", 1200, 15),
    "published": Entry("fuzz.records:published", 300, 3),
    "ros_images": Entry("fuzz.pictures:ros_images", 500, 5, ("cyclonedds",)),
    "ros_zenoh": Entry("fuzz.pictures:ros_zenoh", 500, 4, ("rosbags",)),
    "samples": Entry("fuzz.records:samples", 600, 3),
    "schemas": Entry("fuzz.answers:schemas", 500, 3, ("llguidance",)),
    "settings": Entry("fuzz.plans:settings", 400, 2, ("yaml",)),
    "statistics": Entry("fuzz.records:statistics", 600, 4, ("safetensors",)),
    "tegrastats": Entry("fuzz.records:tegrastats", 500, 8),
    "tiers": Entry("fuzz.plans:tiers", 300, 5),
    "times": Entry("fuzz.records:times", 300, 2),
}

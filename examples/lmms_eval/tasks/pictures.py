"""The pictures of a document of `edgeprune tabletop`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def of_document(document: Mapping[str, Any], settings: Mapping[str, str]) -> list[Image.Image]:
    """Return the document's pictures, in their order. `settings`: lmms_eval_specific_kwargs of the task, with the data's folder."""
    names = document["image"]
    return [Image.open(Path(settings["folder"], name)).convert("RGB") for name in ([names] if isinstance(names, str) else names)]

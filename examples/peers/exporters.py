"""What transformers' own ONNX exporter makes of a model folder, beside the bundle of an export without cuts.

    python examples/peers/exporters.py tabletop

Prints the graphs of each, with their inputs and the bytes of all files over those of the checkpoint's weights.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
from PIL import Image
from transformers.exporters import OnnxConfig, OnnxExporter

from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.checkpoint.processor import processor_inputs
from edgeprune.export.exporter import export_bundle
from edgeprune.plan.presets import unpruned_plan


def by_transformers(loaded: LoadedModel, folder: Path) -> None:
    """Write what `export_for_generation` makes of the model's answer to a question about one image."""
    height, width = loaded.geometry(None).height, loaded.geometry(None).width
    parts: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    settings = loaded.changed_settings(loaded.geometry(None))
    inputs = processor_inputs(
        loaded.processor, [{"role": "user", "content": parts}], [Image.new("RGB", (width, height))], settings=settings
    )
    OnnxExporter().export_for_generation(loaded.model, dict(inputs), OnnxConfig(dynamic=True)).save_pretrained(folder)


def by_edgeprune(loaded: LoadedModel, folder: Path) -> None:
    """Write the bundle of a plan without cuts."""
    geometry = loaded.geometry(None)
    export_bundle(loaded, unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), geometry), folder)


def main(name: str) -> None:
    """Export the model `name` both ways and print what was written."""
    warnings.simplefilter("ignore")
    loaded = load_model(resolve_model(name))
    for write in (by_transformers, by_edgeprune):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "out"
            write(loaded, folder)
            graphs = sorted(folder.rglob("*.onnx"))
            written = sum(path.stat().st_size for path in folder.rglob("*") if ".onnx" in path.name)
            print(f"{write.__name__}: {written / loaded.folder.bytes:.2f} times the bytes of the weights")
            for path in graphs:
                names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
                print(f"  {path.relative_to(folder)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Print what published models would cost on Jetson modules, as a table in Markdown: memory and time, unpruned and pruned.

    python examples/roofline/models.py

The models are known by their small files in tests/support/genuine. No weights are read. docs/roofline.md has the table, and says
how far off such figures are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeprune.checkpoint.loading import LoadedModel, ModelFolder, load_outline
from edgeprune.checkpoint.processor import image_settings, read_json
from edgeprune.device.jetson import module_named
from edgeprune.device.roofline import Estimate, Interval, estimate
from edgeprune.device.workload import Workload, workload
from edgeprune.export.sizes import sizes_of
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.targets import Lowering

FILES = Path(__file__).parents[2] / "tests" / "support" / "genuine"
MODULES = tuple(map(module_named, ("orin-nano", "orin-nx", "agx-orin", "thor")))
PRECISION, METHOD, KEEP = "int4", "divprune", 0.25
QUESTION = {"text_tokens": 32, "generated": 64}
# Published models: the folder of their small files, and the size of their image, None for the model's own.
MODELS: dict[str, tuple[str, tuple[int, int] | None]] = {
    "SmolVLM-256M": ("smolvlm-256m-instruct", (768, 1024)),
    "SmolVLM2-500M": ("smolvlm2-500m-video", (768, 1024)),
    "Qwen3.5-0.8B": ("qwen3_5-0.8b", (448, 448)),
    "InternVL3.5-1B": ("internvl3_5-1b-hf", (448, 448)),
    "LFM2.5-VL-1.6B": ("lfm2_5-vl-1.6b", (448, 448)),
    "Qwen2-VL-2B": ("qwen2-vl-2b", (448, 448)),
    "Qwen3-VL-2B": ("cosmos-reason2-2b", (448, 448)),  # Cosmos-Reason2-2B is Qwen3-VL-2B, trained further
    "Qwen2.5-VL-3B": ("qwen2_5-vl-3b", (448, 448)),
    "Gemma 3 4B": ("gemma-3-4b-it", None),
    "LLaVA-1.5-7B": ("llava-1.5-7b-hf", None),
}


@dataclass(frozen=True)
class Costs:
    """The estimates of one model on one module: without pruning, and with a quarter of the visual tokens."""

    whole: Estimate
    pruned: Estimate

    def __str__(self) -> str:
        fits = {"yes": "", "perhaps": "may fit: ", "no": "does not fit: "}[self.whole.memory.fits]
        return f"{fits}{_span(self.whole.ttft_ms)} → {_span(self.pruned.ttft_ms)}, then {_span(self.whole.token_ms)}"


def outline(name: str) -> LoadedModel:
    """Return a model without its weights."""
    path = FILES / name
    kind = str(read_json(path, "config.json")["model_type"])
    return load_outline(ModelFolder(name, path, kind, image_settings(path, kind)))


def row(name: str) -> str:
    """Return the row of a model: its image, its memory, and what an answer costs on each module."""
    source, size = MODELS[name]
    model = outline(source)
    geometry = model.geometry(size)
    whole = unpruned_plan(model.folder.model_type, model.decoder_shape().layers, geometry)
    pruned = staircase_plan(whole, METHOD, [KEEP], (0,))
    works = [_work(model, plan) for plan in (whole, pruned)]
    costs = [Costs(*(estimate(work, module) for work in works)) for module in MODULES]
    memory = _span(costs[0].whole.memory.at_peak, 1e-9)
    cells = name, f"{geometry.height}x{geometry.width}", str(geometry.tokens), memory, *map(str, costs)
    return f"| {' | '.join(cells)} |"


def _work(model: LoadedModel, plan: KeepPlan) -> Workload:
    sizes = sizes_of(model, plan, Lowering(MODULES[0].target, PRECISION))  # Thor's target has the same operators
    return workload(sizes, plan, **QUESTION, precision=PRECISION)


def _span(value: Interval, scale: float = 1.0) -> str:
    low, high = (float(f"{end * scale:.1e}") for end in (value.low, value.high))
    return f"{low:.15g} to {high:.15g}"


def main() -> None:
    """Print the table."""
    modules = [f"{module.name} ({module.ram} GiB)" for module in MODULES]
    print(f"| model | image | visual tokens | GB at peak | {' | '.join(modules)} |\n|{'---|' * (4 + len(modules))}")
    for name in MODELS:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()

"""Compare the roofline's midpoints with published measurements of Qwen3-VL on Jetson modules.

    python examples/roofline/roofline.py
    python examples/roofline/roofline.py --json

Prints the table of docs/roofline.md, or its figures.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace

from edgeprune.bundle import Operations
from edgeprune.device.jetson import module_named
from edgeprune.device.roofline import Interval, estimate
from edgeprune.device.workload import PRECISIONS, Decoder, Precision, VisionWorkload, Workload

# TensorRT Edge-LLM keeps output head, embedding and vision encoder in FP16.
AWQ = Precision("INT4 AWQ", 0.5 + 2 / 128, 2.0, 2.0, 2.0, 2, "fp16")
NVFP4 = replace(PRECISIONS["nvfp4"], name="NVFP4")
PATCH_PIXELS = 3 * 2 * 16 * 16  # colours, frames, height, width
DEEPSTACK = 3  # earlier layers of the vision encoder that have a merger of their own


@dataclass(frozen=True)
class Model:
    """The public shape of a Qwen3-VL: its decoder, and width, depth and MLP of its vision encoder."""

    name: str
    decoder: Decoder
    hidden: int
    layers: int
    mlp: int

    def tower(self, tokens: int) -> VisionWorkload:
        """Return the vision encoder for an image of some visual tokens, each of 2 x 2 patches."""
        block = 4 * self.hidden**2 + 2 * self.hidden * self.mlp
        mergers = (1 + DEEPSTACK) * ((4 * self.hidden) ** 2 + 4 * self.hidden * self.decoder.hidden)
        weights, patches = self.layers * block + PATCH_PIXELS * self.hidden, 4 * tokens
        work = Operations(2.0 * (weights * patches + mergers * tokens), 4.0 * self.layers * self.hidden * patches**2)
        return VisionWorkload(self.layers, self.hidden, self.mlp, patches, tokens, weights + mergers, work, work)


def decoder(layers: int, hidden: int, heads: int, intermediate: int, vocabulary: int = 151936) -> Decoder:
    """Return a decoder with 8 KV heads of 128, as Qwen3's and Llama 3's."""
    attention = 128 * hidden * (2 * heads + 2 * 8)
    return Decoder(layers, hidden, heads, 8, 128, intermediate, vocabulary, layers * (attention + 3 * hidden * intermediate))


SMALL = Model("Qwen3-VL-2B", decoder(28, 2048, 16, 6144), 1024, 24, 4096)
MIDDLE = Model("Qwen3-VL-4B", decoder(36, 2560, 32, 9728), 1024, 24, 4096)
LARGE = Model("Qwen3-VL-8B", decoder(36, 4096, 32, 12288), 1152, 27, 4304)
COSMOS = Model("Cosmos-Reason2-2B", SMALL.decoder, SMALL.hidden, SMALL.layers, SMALL.mlp)  # Qwen3-VL-2B, trained further

LLAMA = Model("Llama-3.1-8B", decoder(32, 4096, 32, 14336, 128256), 0, 0, 0)
TEXT_SMALL = Model("Qwen3-0.6B", decoder(28, 1024, 16, 3072), 0, 0, 0)
TEXT_MIDDLE = Model("Qwen3-4B", MIDDLE.decoder, 0, 0, 0)


@dataclass(frozen=True)
class Row:
    """One published measurement at batch 1: tokens, milliseconds, tokens a second, MB of GPU memory; None was not published."""

    module: str
    model: Model
    precision: Precision
    visual: int
    text: int
    vision_ms: float | None
    prefill_ms: float
    rate: float | None
    memory: float | None = None


# The first nine: NVIDIA TensorRT Edge-LLM 0.9.0, performance page, COCO images, batch 1. It names no power modes; Orin Nano's rows
# are those of its 15 W (docs/roofline.md). They set the constants, except that the two INT4 rows of Thor's 8B and 4B set that of
# unpacked integers there. Then rows that set none: hokwangchoi/jetson-orin-nano-benchmarks, Edge-LLM in MAXN_SUPER, whose text
# tokens are not given and taken as 26; and text models of Edge-LLM 0.4.0's page.
ROWS = (
    Row("orin-nano-15w", SMALL, AWQ, 265, 27, 151.1, 190.9, 36.9, 4380),
    Row("orin-nx", SMALL, AWQ, 265, 27, 82.1, 103.1, 60.1, 4344),
    Row("orin-nx", MIDDLE, AWQ, 265, 27, 83.7, 244.6, 31.2, 5903),
    Row("orin-nx", LARGE, AWQ, 265, 27, 120.0, 462.1, 18.9, 9065),
    Row("agx-orin", SMALL, AWQ, 265, 27, 39.0, 50.0, 98.4, 8140),
    Row("agx-orin", MIDDLE, AWQ, 265, 27, 39.3, 123.7, 52.4, 9516),
    Row("agx-orin", LARGE, AWQ, 265, 27, 57.2, 225.1, 32.3, 13030),
    Row("thor", SMALL, NVFP4, 266, 26, 11.7, 10.7, 151.9, 1845),
    Row("thor", MIDDLE, NVFP4, 265, 27, 12.2, 20.4, 79.4, 3182),
    Row("orin-nano", COSMOS, AWQ, 494, 26, 208.0, 211.0, 60.0, 4300),
    Row("thor", TEXT_SMALL, NVFP4, 0, 366, None, 8.8, 318.6),
    Row("thor", TEXT_MIDDLE, NVFP4, 0, 364, None, 22.9, None),
    Row("thor", LLAMA, NVFP4, 0, 383, None, 31.0, 54.9),
    Row("thor", TEXT_SMALL, AWQ, 0, 366, None, 21.0, 270.2),
    Row("thor", TEXT_MIDDLE, AWQ, 0, 364, None, 116.2, 76.4),
    Row("thor", LLAMA, AWQ, 0, 383, None, 215.5, 50.8),
)
NAMES = {"vision_ms": "vision ms", "prefill_ms": "prefill ms", "token_ms": "ms a token", "memory": "memory MB"}


@dataclass(frozen=True)
class Compared:
    """One published figure beside its estimate; `error` is of the midpoint."""

    module: str
    model: str
    precision: str
    figure: str
    published: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """How far the midpoint lies above the published figure, as a share of it."""
        return (self.low + self.high) / 2 / self.published - 1


def compare(row: Row, generated: int = 128) -> list[Compared]:
    """Return a row's figures beside what the roofline says of them."""
    every = (row.visual,) * row.model.decoder.layers
    work = Workload(row.model.tower(row.visual), row.model.decoder, row.precision, every, every, row.text, generated)
    found = estimate(work, module_named(row.module))
    vision, prefill, decode = (stage.ms for stage in found.stages)
    table = found.memory.embedding  # TensorRT Edge-LLM loads it; our runtime leaves it in its file
    peak = found.memory.at_peak + Interval(table, table)
    figures: list[tuple[str, float | None, Interval]] = [
        ("vision_ms", row.vision_ms, vision),
        ("prefill_ms", row.prefill_ms, prefill),
        ("token_ms", row.rate and 1e3 / row.rate, decode),
        ("memory", row.memory, Interval(peak.low / 1e6, peak.high / 1e6)),
    ]
    names = row.module, row.model.name, row.precision.name
    return [Compared(*names, figure, published, span.low, span.high) for figure, published, span in figures if published]


def to_markdown(rows: list[list[Compared]]) -> str:
    """Return the rows as a table: published, estimated midpoint and its error, in each figure."""
    lines = [f"| module | model | precision | {' | '.join(NAMES.values())} |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        found = {c.figure: f"{_short(c.published)} / {_short((c.low + c.high) / 2)} ({c.error:+.0%})" for c in row}
        cells = [found.get(name, "") for name in NAMES]
        lines.append(f"| {row[0].module} | {row[0].model} | {row[0].precision} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def main() -> None:
    """Print the table, or its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    rows = [compare(row) for row in ROWS]
    if parser.parse_args().json:
        print(json.dumps([{**asdict(cell), "error": cell.error} for row in rows for cell in row], indent=2))
    else:
        print(to_markdown(rows))


if __name__ == "__main__":
    main()

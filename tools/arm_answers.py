"""Ask bundles about scenes and write down what came out. `tools/arm.py` runs it on x86 and under emulation.

It needs the runtime alone. For each bundle NAME of a folder, the output has NAME/texts [n], NAME/kept [n, K] (the indices of all
cuts), NAME/embeds [n, V, hidden] (what the vision encoder made) and NAME/logits [n, vocabulary] (those of the first token).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.runtime.api.loading import runtime_on
from edgeprune.runtime.backends.compare import on_host
from edgeprune.runtime.backends.interface import Backend, BackendProxy, CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache
from edgeprune.runtime.backends.onnxruntime import OnnxRuntimeBackend

TOKENS = 24  # of each answer


def main() -> None:
    """Ask all bundles of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, help="a folder of bundles")
    parser.add_argument("dataset", type=Path, help="as `edgeprune tabletop` writes it; one question of each scene is asked")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--noise", type=float, default=0.0, help="relative noise on the pixels that the vision encoder is given")
    given = parser.parse_args()
    arrays: dict[str, np.ndarray] = {}
    for bundle in sorted(given.bundles.iterdir()):
        made = record(Bundle.load(bundle), questions(given.dataset), given.noise)
        arrays |= {f"{bundle.name}/{name}": array for name, array in made.items()}
    np.savez(given.output, allow_pickle=False, **arrays)


def questions(dataset: Path) -> list[tuple[Path, str]]:
    """Return the image and the prompt of one question of each scene, of one kind after another."""
    by_image = defaultdict(list)
    for line in dataset.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_image[row["image"]].append(row["prompt"])
    return [(dataset.parent / image, prompts[n % len(prompts)]) for n, (image, prompts) in enumerate(by_image.items())]


def record(bundle: Bundle, asked: list[tuple[Path, str]], noise: float) -> dict[str, np.ndarray]:
    """Ask one bundle in one thread, and return the arrays that the module lists."""
    recorder = _Recorder(OnnxRuntimeBackend(bundle, 1), noise)
    runtime = runtime_on(bundle, recorder)
    texts, kept = [], []
    for image, prompt in asked:
        recorder.starts = True
        answer = runtime.generate(Image.open(image), prompt, max_tokens=TOKENS)
        texts.append(answer.text)
        kept.append(np.concatenate([np.ravel(cut.kept) for cut in answer.receipt.cuts]))
    return {
        "texts": np.array(texts),
        "kept": np.stack(kept),
        "embeds": np.stack(recorder.embeds),
        "logits": np.stack(recorder.logits),
    }


class _Recorder(BackendProxy):
    def __init__(self, backend: Backend, noise: float) -> None:
        super().__init__(backend)
        self._noise, self._rng = noise, np.random.default_rng(0)
        self.starts = True
        self.embeds: list[np.ndarray] = []
        self.logits: list[np.ndarray] = []

    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        if self._noise:
            patches = (patches * (1 + self._noise * self._rng.standard_normal(patches.shape))).astype(patches.dtype)
        output = self._backend.encode_image(patches, unpruned=unpruned, cancellation=cancellation)
        self.embeds.append(np.array(on_host(output.embeds)[0]))
        return output

    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        step = self._backend.forward(tokens, cache, cancellation=cancellation)
        if self.starts:
            self.logits.append(np.array(step.logits))
        self.starts = False
        return step


if __name__ == "__main__":
    main()

"""How many tokens of the reference answers a plan still chooses, token by token: teacher forcing, as papers on pruning report it.

    python examples/learned/answer_tokens.py tabletop-l DATASET PLAN...
    python examples/learned/answer_tokens.py tabletop-l DATASET --methods cdpruner divprune --keep 0.25

Each token of an answer is chosen after the answer's own tokens before it, so one wrong token spoils no later one. Short answers count
as right if all of their tokens are; descriptions count token by token. Runs in PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from edgeprune.calibration.data.samples import Sample, read_samples
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.calibration.replay.reference import SHARED, Shared
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.plan import Cut, KeepPlan, keep_count
from edgeprune.plan.presets import unpruned_plan
from edgeprune.tabletop.questions import DESCRIBE


def main() -> None:
    """Print a table with a row for the unpruned model, each method and each plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("plans", type=Path, nargs="*")
    parser.add_argument("--methods", nargs="*", default=[], help="methods at the decoder's input, with their defaults")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that METHODS keep")
    request = parser.parse_args()
    loaded = load_model(resolve_model(request.model))
    unpruned = unpruned_plan(loaded.folder.model_type, loaded.decoder_shape().layers, loaded.geometry(None))
    keep = keep_count(unpruned.tokens_from_encoder, request.keep)
    rows = {"unpruned": unpruned}
    rows |= {f"{method}, {keep} tokens": unpruned.with_cuts(Cut("input", method, keep)) for method in request.methods}
    rows |= {plan.stem: KeepPlan.load(plan) for plan in request.plans}
    samples, shared = list(read_samples(request.data)), Shared(SHARED)
    print("| plan | short answers | tokens of descriptions |\n|---|---|---|")
    for name, plan in rows.items():
        short, described = right(loaded, plan, samples, shared)
        print(f"| {name} | {short:.1%} | {described:.1%} |", flush=True)


def right(loaded: LoadedModel, plan: KeepPlan, samples: Sequence[Sample], shared: Shared) -> tuple[float, float]:
    """Return the share of short answers, and of the tokens of descriptions, that a plan chooses."""
    recorder = Recorder(loaded, plan, 1, "cpu", shared)
    short, described = list[bool](), list[bool]()
    for sample in samples:
        ids = recorder.tokenizer.encode(sample.answer)
        chosen = recorder.teacher_forced_logits(sample, ids, "exact")[: len(ids)].argmax(dim=-1).tolist()
        alike = [one == other for one, other in zip(chosen, ids, strict=True)]
        if sample.kind == DESCRIBE:
            described += alike
        else:
            short.append(all(alike))
    return sum(short) / len(short), sum(described) / len(described)


if __name__ == "__main__":
    main()

"""Train the TableTop model from scratch on a CPU, resumable at any time.

    python examples/train_tabletop/train.py WORK --minutes 100

First the vision tower alone learns to say what each visual token shows, then everything is trained together on packed
questions, those labels kept as an auxiliary loss: without them the decoder stays at the prior of the answers for hours.
Matrices are trained with Muon, the rest with AdamW. The learning rate is constant and falls to zero over the last third of
the minutes, so a longer run is a better one; a run interrupted goes on from WORK/state.pt with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from batches import IGNORE, Batch, make_batch
from checkpoint import new_model, save_processor
from forward import Trainee
from rich.console import Console
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from edgeprune.tabletop.questions import KINDS

TRAIN_STREAM, EVAL_STREAM = 20_250_101, 20_250_102  # first words of the seeds; `edgeprune tabletop` has another
SAVE_EVERY, EVAL_EVERY = 2.0, 5.0  # minutes
DECAY = 0.35  # share of the run over which the learning rate falls
AUXILIARY = 0.3
console = Console()


class Run:
    """Weights, optimizers and progress of one training run, in one folder."""

    def __init__(self, folder: Path, learning_rate: float) -> None:
        self.folder, self.learning_rate = folder, learning_rate
        self.step, self.minutes = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        tokenizer = save_processor(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.trainee = Trainee(new_model(tokenizer))
        self.optimizers = self._optimizers()
        if (folder / "state.pt").exists():
            self._resume()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        matrices: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in self.trainee.named_parameters():
            hidden = parameter.ndim == 2 and "embed_tokens" not in name and not name.startswith("heads")
            (matrices if hidden else rest).append(parameter)
        return [
            torch.optim.Muon(matrices, lr=self.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def _resume(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True)
        self.step, self.minutes = state["step"], state["minutes"]
        self.trainee.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        console.print(f"resumed at step {self.step}, minute {self.minutes:.1f}")

    def save(self) -> None:
        """Write the resumable state and the transformers folder; each appears whole or not at all."""
        state = {
            "step": self.step,
            "minutes": self.minutes,
            "weights": self.trainee.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")
        self.trainee.model.save_pretrained(self.folder)

    def loss(self, batch: Batch, tower_only: bool) -> torch.Tensor:
        """Return answer loss plus weighted attribute loss, or the attribute loss alone."""
        visual = self.trainee.see(batch.patches)
        losses = [
            cross_entropy(logits.flatten(0, 1), batch.token_labels[..., index].flatten())
            for index, logits in enumerate(self.trainee.attributes(visual))
        ]
        attributes = torch.stack(losses).sum()
        if tower_only:
            return attributes
        return AUXILIARY * attributes + cross_entropy(*self._answers(batch, visual), label_smoothing=0.02)

    def _answers(self, batch: Batch, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.trainee.read(visual, batch.ids, batch.segments, batch.positions)
        chosen = batch.labels != IGNORE
        return self.trainee.model.lm_head(hidden[chosen]), batch.labels[chosen]

    def advance(self, rows: int, tower_minutes: float, total_minutes: float) -> float:
        """Take one step and return its loss."""
        started = time.monotonic()
        rng = np.random.default_rng([TRAIN_STREAM, self.step])
        tower_only = self.minutes < tower_minutes
        loss = self.loss(make_batch(rng, self.tokenizer, rows), tower_only)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        left = (total_minutes - self.minutes) / (DECAY * total_minutes)
        scale = min(1.0, (self.step + 1) / 100, max(left, 0.0))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.minutes += (time.monotonic() - started) / 60
        return loss.item()

    @torch.no_grad()
    def evaluate(self, rows: int = 64) -> dict[str, float]:
        """Return, per kind, the share of questions answered exactly (teacher forcing equals greedy decoding here)."""
        right, asked = np.zeros(len(KINDS)), np.zeros(len(KINDS))
        visual_right = 0.0
        for index in range(0, rows, 16):
            batch = make_batch(np.random.default_rng([EVAL_STREAM, index]), self.tokenizer, 16)
            visual = self.trainee.see(batch.patches)
            logits, labels = self._answers(batch, visual)
            chosen = batch.labels != IGNORE
            wrong = (logits.argmax(-1) != labels).numpy()
            owners = (batch.segments + 1000 * torch.arange(16)[:, None])[chosen].numpy()
            kinds = batch.kinds[chosen].numpy()
            for owner in np.unique(owners):
                mine = owners == owner
                asked[kinds[mine][0]] += 1
                right[kinds[mine][0]] += not wrong[mine].any()
            shape = self.trainee.attributes(visual)[1].argmax(-1)
            covered = batch.token_labels[..., 1] > 0
            visual_right += (shape == batch.token_labels[..., 1])[covered].float().mean().item() * 16 / rows
        scores = {kind: float(r / max(a, 1)) for kind, r, a in zip(KINDS, right, asked, strict=True)}
        return scores | {"all": float(right.sum() / asked.sum()), "token shape": visual_right}

    def log(self, entry: dict[str, object]) -> None:
        """Print one line and append it to WORK/log.jsonl."""
        console.print(entry)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def main() -> None:
    """Parse the command line and train until the minutes are over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the state, the log and the model")
    parser.add_argument("--minutes", type=float, default=100.0, help="length of the whole run, earlier parts included")
    parser.add_argument("--tower-minutes", type=float, default=8.0, help="of these, on the vision tower alone")
    parser.add_argument("--rows", type=int, default=8, help="images a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=512, help="for the evaluation at the end")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Run(options.work, options.learning_rate)
    saved = evaluated = run.minutes
    losses: list[float] = []
    while run.minutes < options.minutes:
        losses.append(run.advance(options.rows, options.tower_minutes, options.minutes))
        if len(losses) == 100:
            run.log({"step": run.step, "minutes": round(run.minutes, 2), "loss": round(float(np.mean(losses)), 4)})
            losses.clear()
        if run.minutes - saved >= SAVE_EVERY:
            run.save()
            saved = run.minutes
        if run.minutes - evaluated >= EVAL_EVERY:
            run.log({"step": run.step} | {k: round(v, 3) for k, v in run.evaluate().items()})
            evaluated = run.minutes
    run.save()
    run.log({"step": run.step} | {k: round(v, 3) for k, v in run.evaluate(options.scenes).items()})


if __name__ == "__main__":
    main()

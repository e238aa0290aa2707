"""Turn TableTop scenes into packed training batches.

One row is one image, or two, followed by many questions. Each question sees the images and itself only (a 4-D mask) and starts at
the position right after the images, exactly as if it were asked alone, so the images are paid for once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.pairs import PAIR_KINDS, Pair, ask_both, change_between, sample_pair
from edgeprune.tabletop.questions import DESCRIBE, KINDS, Question, ask_one, describe
from edgeprune.tabletop.world import COLOURS, DIGITS, LETTERS, SHAPES, SIDE, SIZES, Scene, sample_scene

PATCH = 16
GRID = SIDE // PATCH
TOKENS = GRID * GRID
HEAD = 3  # <|im_start|> user <|vision_start|>
BETWEEN = 2  # <|vision_end|> <|vision_start|>
TEXT = 250  # packed question tokens a row
CHANGED = 0.7  # share of the pairs that show one scene before and after a change
NAMES = (*KINDS, *(f"two: {kind}" for kind in PAIR_KINDS))
_MEAN, _STD = 0.5, 0.25
IGNORE = -100
_HARD = {"relation": 3, "count": 3, "exists": 2, "picture": 2, "which": 3, "more": 3, "together": 3}  # asked that much more often


@dataclass
class Batch:
    """Everything one step needs. B rows of I images, S = HEAD + I * TOKENS + (I - 1) * BETWEEN + TEXT positions."""

    patches: torch.Tensor  # [B, I, TOKENS, 3 * PATCH * PATCH]
    ids: torch.Tensor  # [B, S]
    segments: torch.Tensor  # [B, S]: 0 head and images, 1.. a question each, -1 padding
    positions: torch.Tensor  # [3, B, S] mRoPE rows: time, height, width
    labels: torch.Tensor  # [B, S]: id of the next token where it belongs to an answer, else IGNORE
    kinds: torch.Tensor  # [B, S]: index into NAMES where labels is set, else IGNORE
    token_labels: torch.Tensor  # [B, I, TOKENS, len(ATTRIBUTES)]
    changes: torch.Tensor  # [B, TOKENS]: what each token of the last image shows against the first, see DIFFERENCES


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


def make_batch(rng: np.random.Generator, tokenizer: Tokenizer, rows: int, images: int = 1) -> Batch:
    """Draw `rows` fresh scenes, or pairs for two images, and pack questions of random kinds behind each."""
    shown = [sample_scenes(rng, images) for _ in range(rows)]
    packed = [pack(choose_questions(scenes, rng), tokenizer, images) for scenes in shown]
    ids, segments, positions, labels, kinds = (np.stack([p[k] for p in packed]) for k in range(5))
    patches = [[patchify(np.asarray(draw_scene(scene))) for scene in scenes] for scenes in shown]
    return Batch(
        patches=torch.from_numpy(np.stack(patches)),
        ids=torch.from_numpy(ids),
        segments=torch.from_numpy(segments),
        positions=torch.from_numpy(positions).transpose(0, 1),
        labels=torch.from_numpy(labels),
        kinds=torch.from_numpy(kinds),
        token_labels=torch.from_numpy(np.stack([[token_labels(scene) for scene in scenes] for scenes in shown])),
        changes=torch.from_numpy(np.stack([_changes(scenes) for scenes in shown])),
    )


def patchify(pixels: np.ndarray) -> np.ndarray:
    """Return normalised patches [TOKENS, 3 * PATCH * PATCH] of an RGB image [SIDE, SIDE, 3], channels first."""
    scaled = (pixels.astype(np.float32) / 255 - _MEAN) / _STD
    grid = scaled.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(grid.reshape(TOKENS, -1))


def token_labels(scene: Scene) -> np.ndarray:
    """Return the class of every attribute for every visual token [TOKENS, len(ATTRIBUTES)] (training only)."""
    labels = np.zeros((GRID, GRID, len(ATTRIBUTES)), np.int64)
    labels[..., 6], labels[..., 7] = np.mgrid[:GRID, :GRID]
    nearest = min(scene.items, key=scene.distance)
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


def images_at(images: int) -> list[slice]:
    """Return where the visual tokens of each image lie in a row."""
    return [slice(start, start + TOKENS) for start in range(HEAD, HEAD + images * (TOKENS + BETWEEN), TOKENS + BETWEEN)]


def pack(asked: Sequence[tuple[str, Question]], tokenizer: Tokenizer, images: int) -> tuple[np.ndarray, ...]:
    """Return one row of ids, segments, positions, labels and kinds. `asked`: questions with their names of NAMES."""
    at = images_at(images)[-1].stop
    length = at + TEXT
    ids = np.full(length, tokenizer.token_to_id("<|endoftext|>") or 0, np.int64)
    segments = np.full(length, -1, np.int64)
    positions = np.zeros((3, length), np.int64)
    labels, kinds = np.full(length, IGNORE, np.int64), np.full(length, IGNORE, np.int64)
    before, position = "<|im_start|>user<|vision_start|>", 0
    rows, columns = np.mgrid[:GRID, :GRID].reshape(2, -1)
    for visual in images_at(images):
        text = tokenizer.encode(before).ids
        words = slice(visual.start - len(text), visual.start)
        ids[words], ids[visual] = text, tokenizer.encode("<|image_pad|>").ids
        positions[:, words] = position + np.arange(len(text))
        position += len(text)
        positions[:, visual] = position + np.stack([np.zeros_like(rows), rows, columns])
        before, position = "<|vision_end|><|vision_start|>", position + GRID
    segments[:at] = 0
    for segment, (name, question) in enumerate(asked, start=1):
        prompt, answer = encode_question(question, tokenizer)
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


def encode_question(question: Question, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids after the last image up to the answer, and the answer's ids with its end mark."""
    asked = f"<|vision_end|>{question.prompt}<|im_end|><|im_start|>assistant"
    return tokenizer.encode(asked).ids, tokenizer.encode(f"{question.answer}<|im_end|>").ids


def sample_scenes(rng: np.random.Generator, images: int) -> tuple[Scene, ...]:
    """Return the scenes of one row: one, or a pair."""
    return (sample_scene(rng),) if images == 1 else sample_pair(rng, CHANGED)


def choose_questions(scenes: tuple[Scene, ...], rng: np.random.Generator) -> list[tuple[str, Question]]:
    """Return more questions than a row has room for, with their names of NAMES."""
    if len(scenes) == 1:
        return [(question.kind, question) for question in _about_one(scenes[0], rng)]
    return [(f"two: {question.kind}", question) for question in _about_two((scenes[0], scenes[1]), rng)]


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

"""Turn TableTop scenes into packed training batches.

One row is one image followed by many questions. Each question sees the image and itself only (a 4-D mask) and starts at the
position right after the image, exactly as if it were asked alone, so the image is paid for once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.questions import DESCRIBE, KINDS, Question, ask_one, describe
from edgeprune.tabletop.world import COLOURS, DIGITS, LETTERS, SHAPES, SIDE, SIZES, Scene, sample_scene

PATCH = 16
GRID = SIDE // PATCH
TOKENS = GRID * GRID
HEAD = 3  # <|im_start|> user <|vision_start|>
TEXT = 250  # packed question tokens a row
_MEAN, _STD = 0.5, 0.25
IGNORE = -100
_HARD = {"relation": 3, "count": 2, "exists": 2}  # asked that much more often than the others


@dataclass
class Batch:
    """Everything one step needs. B rows, S = HEAD + TOKENS + TEXT positions."""

    patches: torch.Tensor  # [B, TOKENS, 3 * PATCH * PATCH]
    ids: torch.Tensor  # [B, S]
    segments: torch.Tensor  # [B, S]: 0 head and image, 1.. a question each, -1 padding
    positions: torch.Tensor  # [3, B, S] mRoPE rows: time, height, width
    labels: torch.Tensor  # [B, S]: id of the next token where it belongs to an answer, else IGNORE
    kinds: torch.Tensor  # [B, S]: index into KINDS where labels is set, else IGNORE
    token_labels: torch.Tensor  # [B, TOKENS, len(ATTRIBUTES)]


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


def make_batch(rng: np.random.Generator, tokenizer: Tokenizer, rows: int) -> Batch:
    """Draw `rows` fresh scenes and pack questions of random kinds behind each."""
    scenes = [sample_scene(rng) for _ in range(rows)]
    packed = [_pack(scene, rng, tokenizer) for scene in scenes]
    ids, segments, positions, labels, kinds = (np.stack([p[k] for p in packed]) for k in range(5))
    return Batch(
        patches=torch.from_numpy(np.stack([patchify(np.asarray(draw_scene(s))) for s in scenes])),
        ids=torch.from_numpy(ids),
        segments=torch.from_numpy(segments),
        positions=torch.from_numpy(positions).transpose(0, 1),
        labels=torch.from_numpy(labels),
        kinds=torch.from_numpy(kinds),
        token_labels=torch.from_numpy(np.stack([token_labels(s) for s in scenes])),
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


def _span(low: float, high: float) -> tuple[int, int]:
    # A token counts as covered when the item reaches at least 3 pixels into it.
    return int((low + 3) // PATCH), int((high - 3) // PATCH) + 1


def _pack(scene: Scene, rng: np.random.Generator, tokenizer: Tokenizer) -> tuple[np.ndarray, ...]:
    length = HEAD + TOKENS + TEXT
    ids = np.full(length, tokenizer.token_to_id("<|endoftext|>") or 0, np.int64)
    segments = np.full(length, -1, np.int64)
    positions = np.zeros((3, length), np.int64)
    labels, kinds = np.full(length, IGNORE, np.int64), np.full(length, IGNORE, np.int64)
    ids[:HEAD] = tokenizer.encode("<|im_start|>user<|vision_start|>").ids
    ids[HEAD : HEAD + TOKENS] = tokenizer.encode("<|image_pad|>").ids
    segments[: HEAD + TOKENS] = 0
    positions[:, :HEAD] = np.arange(HEAD)
    rows, columns = np.mgrid[:GRID, :GRID].reshape(2, -1)
    positions[:, HEAD : HEAD + TOKENS] = HEAD + np.stack([np.zeros_like(rows), rows, columns])
    at = HEAD + TOKENS
    for segment, question in enumerate(_questions(scene, rng), start=1):
        asked, answer = encode_question(question, tokenizer)
        end = at + len(asked) + len(answer)
        if end > length:
            break
        ids[at:end] = asked + answer
        segments[at:end] = segment
        positions[:, at:end] = HEAD + GRID + np.arange(end - at)
        first = at + len(asked) - 1
        labels[first : end - 1] = answer
        kinds[first : end - 1] = KINDS.index(question.kind)
        at = end
    return ids, segments, positions, labels, kinds


def encode_question(question: Question, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids after the image up to the answer, and the answer's ids with its end mark."""
    asked = f"<|vision_end|>{question.prompt}<|im_end|><|im_start|>assistant"
    return tokenizer.encode(asked).ids, tokenizer.encode(f"{question.answer}<|im_end|>").ids


def _questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    asked = [] if rng.random() < 0.3 else [Question(DESCRIBE, "Describe the scene.", describe(scene))]
    short = [kind for kind in KINDS for _ in range(_HARD.get(kind, 1)) if kind != DESCRIBE]
    while len(asked) < 20:
        question = ask_one(scene, rng, short[int(rng.integers(len(short)))])
        if question is not None:
            asked.append(question)
    return asked

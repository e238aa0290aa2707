"""What the pretrained decoder says to questions that have nothing to do with a table, so that training does not make it forget.

The questions are made from lists, the answers are its own, greedily and without a picture. Answers that do not end within 48 tokens
are left out: only whole ones teach when to stop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from batches import CHAT
from tokenizers import Tokenizer

from edgeprune.tabletop.questions import Question

_LIMIT, _ROWS = 48, 16
_COUNTRIES = [
    "France",
    "Italy",
    "Spain",
    "Germany",
    "Japan",
    "China",
    "India",
    "Egypt",
    "Brazil",
    "Canada",
    "Norway",
    "Greece",
    "Portugal",
    "Poland",
    "Peru",
    "Kenya",
    "Cuba",
]
_WORDS = [
    "river",
    "mountain",
    "robot",
    "bridge",
    "doctor",
    "library",
    "forest",
    "ocean",
    "planet",
    "poem",
    "dog",
    "cat",
    "horse",
    "bird",
    "tree",
    "book",
    "song",
    "train",
    "ship",
    "city",
]
_OPPOSITES = [
    "hot",
    "big",
    "fast",
    "happy",
    "light",
    "early",
    "open",
    "young",
    "strong",
    "full",
    "high",
    "hard",
    "long",
    "near",
    "dry",
    "loud",
    "rich",
    "clean",
]
_TASKS = (
    "Say hello.",
    "Who are you?",
    "How are you today?",
    "What can you help me with?",
    "Name three colours.",
    "List three fruits.",
    "List the days of the week.",
    "Name three animals that live in the sea.",
    "What is the largest planet?",
    "What do bees make?",
    "Who wrote Romeo and Juliet?",
    "What is water made of?",
    "How many days are in a week?",
    "How many legs does a spider have?",
    "What is the boiling point of water?",
    "What language is spoken in Brazil?",
    "What colour is the sky?",
    "What colour is a banana?",
    "Thank you for your help.",
    "Tell me a fact about the moon.",
    "Give me one tip for sleeping well.",
    "Write a short greeting for a friend.",
    "What is the freezing point of water?",
    "Which season follows winter?",
)


def prompts() -> Iterator[str]:
    """Yield the questions."""
    yield from _TASKS
    for country in _COUNTRIES:
        yield f"What is the capital of {country}?"
        yield f"On which continent is {country}?"
    for word in _WORDS:
        yield f"What is a {word}? Answer in one sentence."
        yield f"Write one sentence about a {word}."
        yield f"Spell the word {word}."
    for word in _OPPOSITES:
        yield f"What is the opposite of {word}?"
        yield f"Use the word {word} in a sentence."
    for first in range(2, 10):
        for second in (3, 5, 8):
            yield f"What is {first} plus {second}?"


def own_answers(model: Any, tokenizer: Tokenizer, path: Path) -> list[Question]:
    """Return the decoder's answers, kept in a file of JSON lines: made once, before anything is trained."""
    if not path.exists():
        asked = list(prompts())
        answers = [
            answer for start in range(0, len(asked), _ROWS) for answer in _answers(model, tokenizer, asked[start : start + _ROWS])
        ]
        lines = [json.dumps({"prompt": p, "answer": a}) for p, a in zip(asked, answers, strict=True) if a]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [Question(CHAT, **json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def _answers(model: Any, tokenizer: Tokenizer, asked: list[str]) -> list[str]:
    # One text for each, empty for one that does not end.
    turns = [tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n").ids for prompt in asked]
    end, length = model.generation_config.eos_token_id, max(map(len, turns))
    ids = torch.tensor([[end] * (length - len(turn)) + turn for turn in turns], device=model.device)
    mask = torch.tensor([[0] * (length - len(turn)) + [1] * len(turn) for turn in turns], device=model.device)
    said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=_LIMIT)[:, length:].tolist()
    return [tokenizer.decode(row[: row.index(end)]).strip() if end in row else "" for row in said]

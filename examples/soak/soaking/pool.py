"""Questions with known answers: every picture has a scene and a label of its own, so that an answer to another one is seen."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.runtime import Runtime, Turn, load
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.questions import DESCRIBE_PROMPT, KINDS, ask_one
from edgeprune.tabletop.world import COLOURS, Scene, sample_scene

FORMATS = ("png", "jpeg", "webp")
_SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string", "maxLength": 4}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["label", "count"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Said:
    """What an answer is to be: its text, and the receipt's reason for its end."""

    text: str
    finish: str


@dataclass
class Entry:
    """One question: `turns` as (role, text, numbers of pictures), and what else the request says, in OpenAI's words.

    `answers`: what is expected under each tier that the server may choose; "" where no tier counts.
    """

    turns: list[tuple[str, str, tuple[int, ...]]]
    options: dict[str, Any]
    answers: dict[str, Said] = field(default_factory=dict)

    @property
    def pictured(self) -> bool:
        """Whether there is an image in it."""
        return any(pictures for *_, pictures in self.turns)


@dataclass
class Pool:
    """The questions, and the pictures they are about as data URLs."""

    entries: list[Entry]
    urls: list[str]
    tiers: tuple[str, ...]
    model: str

    def body(self, entry: Entry, **others: Any) -> dict[str, Any]:
        """Return a request."""
        messages = [{"role": role, "content": self._content(text, pictures)} for role, text, pictures in entry.turns]
        return {"messages": messages, **entry.options, **others}

    def _content(self, text: str, pictures: Sequence[int]) -> Any:
        parts = [{"type": "image_url", "image_url": {"url": self.urls[number]}} for number in pictures]
        return [*parts, {"type": "text", "text": text}] if parts else text

    def owner(self, text: str) -> Entry | None:
        """Return a question that this text answers, whichever."""
        return next((entry for entry in self.entries if any(said.text == text for said in entry.answers.values())), None)

    def save(self, path: Path) -> None:
        """Write it for the clients' processes."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Pool:
        """Read what `save` wrote."""
        data = json.loads(path.read_text())
        entries = []
        for each in data.pop("entries"):
            answers = {tier: Said(**said) for tier, said in each["answers"].items()}
            turns = [(role, text, tuple(pictures)) for role, text, pictures in each["turns"]]
            entries.append(Entry(turns, each["options"], answers))
        return cls(entries, data["urls"], tuple(data["tiers"]), data["model"])


def drawn_pool(bundle: Path, seed: int, *, scenes: int, questions: int, threads: int) -> Pool:
    """Return a pool whose answers one conversation after the other gave, nothing recalled: this is what the server must say."""
    model = load(bundle, threads=threads, cache_bytes=0)
    lot, geometry = random.Random(seed), model.plan.geometry
    worlds = _worlds(seed, scenes)
    files = [_file(world, (geometry.width, geometry.height), lot.choice(FORMATS)) for world in worlds]
    urls = [f"data:image/{kind};base64,{base64.b64encode(data).decode()}" for kind, data in files]
    pictures = [Image.open(io.BytesIO(data)) for _, data in files]
    pool = Pool([_entry(lot, worlds, model.tiers) for _ in range(questions)], urls, model.tiers, model.name)
    for entry in pool.entries:
        entry.answers = _answers(model, entry, pictures)
    return pool


def _worlds(seed: int, count: int) -> list[Scene]:
    # No two have the same label.
    rng, found = np.random.default_rng(seed), dict[str, Scene]()
    while len(found) < count:
        scene = sample_scene(rng)
        found.setdefault(scene.label.text, scene)
    return list(found.values())


def _file(scene: Scene, size: tuple[int, int], kind: str) -> tuple[str, bytes]:
    file, picture = io.BytesIO(), draw_scene(scene)
    (picture if picture.size == size else picture.resize(size)).save(file, kind)
    return kind, file.getvalue()


def _entry(lot: random.Random, worlds: Sequence[Scene], tiers: Sequence[str]) -> Entry:
    shown = [lot.randrange(len(worlds)) for _ in range(lot.choice((1, 1, 1, 1, 2, 3)))]
    prompt = _prompt(lot, worlds[shown[-1]])
    turns: list[tuple[str, str, tuple[int, ...]]] = [("user", prompt, tuple(shown))]
    form = lot.random()
    if form < 0.2:  # the image was shown before, and the last question has none
        turns = [("user", "What does the label say?", tuple(shown)), ("assistant", worlds[shown[-1]].label.text, ())]
        turns.append(("user", prompt, ()))
    elif form < 0.3:
        turns = [("user", DESCRIBE_PROMPT, (lot.randrange(len(worlds)),)), ("assistant", "A table.", ()), *turns]
    elif form < 0.35:
        turns = [("user", prompt, ())]  # no image at all
    if lot.random() < 0.25:
        turns = [("system", lot.choice(("Be short.", "You look at a table.")), ()), *turns]
    return Entry(turns, _options(lot, tiers, any(pictures for *_, pictures in turns)))


def _prompt(lot: random.Random, scene: Scene) -> str:
    if lot.random() < 0.4:
        return DESCRIBE_PROMPT  # the longest answer
    question = ask_one(scene, np.random.default_rng(lot.randrange(1 << 30)), lot.choice(KINDS))
    return question.prompt if question else "What does the label say?"


def _options(lot: random.Random, tiers: Sequence[str], pictured: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": lot.choice((1, 4, 16, 48, 128, 128))}
    if lot.random() < 0.35:
        options |= {"temperature": lot.choice((0.3, 1.0, 1.7)), "seed": lot.randrange(1000), "top_p": lot.choice((1.0, 0.9))}
    if lot.random() < 0.1:
        options["stop"] = [lot.choice((",", " at ", "label"))]
    form = lot.random()
    if form < 0.12:
        options["guided_choice"] = lot.choice((list(COLOURS), ["yes", "no"], ["left", "right", "above", "below"]))
    elif form < 0.24:
        options["response_format"] = {"type": "json_schema", "json_schema": {"name": "seen", "schema": _SCHEMA}}
        options["max_tokens"] = 96
    if pictured and lot.random() < 0.1:
        options["prune"] = False
    elif tiers and lot.random() < 0.5:
        options["tier"] = lot.choice(tiers)
    return options


def _answers(model: Runtime, entry: Entry, pictures: Sequence[Image.Image]) -> dict[str, Said]:
    # Without a tier the deadline may choose any.
    options = dict(entry.options)
    form, options["choices"] = options.pop("response_format", None), options.pop("guided_choice", None)
    if form is not None:
        options["json_schema"] = form["json_schema"]["schema"]
    prune, tier = options.pop("prune", True), options.pop("tier", None)
    tiers: Sequence[str | None] = [tier] if tier or not (entry.pictured and prune and model.tiers) else model.tiers
    *history, (_, prompt, shown) = entry.turns
    told = [Turn(role, text, [pictures[number] for number in numbers]) for role, text, numbers in history]
    found: dict[str, Said] = {}
    for name in tiers:
        stream = model.chat(prune=prune, history=told).ask(prompt, [pictures[n] for n in shown] or None, tier=name, **options)
        text = "".join(stream)
        found[stream.receipt.tier or ""] = Said(text, stream.receipt.finish_reason)
    return found


def expected(entry: Entry, account: Mapping[str, Any]) -> Said | None:
    """Return what an answer must be whose receipt is `account`; None where that tier was not to be used."""
    return entry.answers.get(account["tier"] or "")

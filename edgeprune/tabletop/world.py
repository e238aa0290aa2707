"""The TableTop world: items on a robot's table, and random sampling of scenes.

A scene is a square table seen from above: three to six items and one label, each in its own cell of a 3 x 3 grid, and a gripper at
the middle of one side. Small items cover one to four visual tokens of the bundled model, large items about nine. A method that
drops the wrong tokens therefore loses answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIDE = 192  # pixels of the square image
RIM = 12  # pixels of table edge around the grid; the gripper sits on it
CELL = 56  # pixels of one grid cell

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SHAPES = ("cube", "ball", "cone", "ring", "star", "cross")
SIZES = ("small", "large")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
GRIPPER_AT = {"top": (96.0, 6.0), "bottom": (96.0, 186.0), "left": (6.0, 96.0), "right": (186.0, 96.0)}
LETTERS = "ABCEFHKLPRTX"
DIGITS = "23456789"

_RADIUS = {"small": (9.0, 11.0), "large": (16.0, 20.0)}
_ITEM_JITTER = 5.0
_LABEL_JITTER = 2.0


@dataclass(frozen=True)
class Item:
    """One object: attributes, grid cell, and centre and radius in pixels."""

    colour: str
    shape: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """The item's unique name: no scene has two items of the same colour and shape."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """The name of the grid cell."""
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Label:
    """A white card with a letter and a digit; `x`, `y` is its centre in pixels."""

    text: str
    row: int
    column: int
    x: float
    y: float

    @property
    def place(self) -> str:
        """The name of the grid cell."""
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Scene:
    """One table. `items` are in reading order (rows from the top, each from the left)."""

    items: tuple[Item, ...]
    label: Label
    gripper: str
    brightness: float
    noise_seed: int

    def distance(self, item: Item) -> float:
        """Return the distance between the gripper and the item's centre in pixels."""
        x, y = GRIPPER_AT[self.gripper]
        return float(np.hypot(item.x - x, item.y - y))


def sample_scene(rng: np.random.Generator, names: Sequence[tuple[str, str]] | None = None) -> Scene:
    """Return a random scene. Equal generators give equal scenes. `names`: at least six colours with shapes to choose items from."""
    count = int(rng.integers(3, 7))
    cells = np.sort(rng.permutation(9)[: count + 1])
    label_at = int(rng.integers(count + 1))
    names = sample_names(rng) if names is None else names
    names = [names[i] for i in rng.permutation(len(names))[:count]]
    items: list[Item] = []
    for index, cell in enumerate(cells):
        row, column = divmod(int(cell), 3)
        if index == label_at:
            x, y = _centre(rng, row, column, _LABEL_JITTER)
            label = Label(str(rng.choice(list(LETTERS))) + str(rng.choice(list(DIGITS))), row, column, x, y)
        else:
            colour, shape = names[len(items)]
            items.append(sample_item(rng, colour, shape, row, column))
    gripper = str(rng.choice(list(GRIPPER_AT)))
    return Scene(tuple(items), label, gripper, float(rng.uniform(0.92, 1.08)), int(rng.integers(2**31)))


def sample_names(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return the colours with shapes that a scene may have: 6 to 16 names."""
    # Few colours and shapes per scene, so that counts above one and near misses (red ball for "red cube") are common.
    colours = rng.choice(COLOURS, size=int(rng.integers(2, 5)), replace=False)
    shapes = rng.choice(SHAPES, size=int(rng.integers(3, 5)), replace=False)
    return [(str(colour), str(shape)) for colour in colours for shape in shapes]


def sample_item(rng: np.random.Generator, colour: str, shape: str, row: int, column: int) -> Item:
    """Return an item of random size near the middle of a cell."""
    size = str(rng.choice(SIZES))
    x, y = _centre(rng, row, column, _ITEM_JITTER)
    return Item(colour, shape, size, row, column, x, y, float(rng.uniform(*_RADIUS[size])))


def _centre(rng: np.random.Generator, row: int, column: int, jitter: float) -> tuple[float, float]:
    dx, dy = rng.uniform(-jitter, jitter, size=2)
    return RIM + CELL * (column + 0.5) + float(dx), RIM + CELL * (row + 0.5) + float(dy)

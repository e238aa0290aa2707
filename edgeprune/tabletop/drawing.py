"""Draw a TableTop scene with Pillow: a lit table, shaded items, a label in a 5 x 7 dot font, and a gripper.

Light comes from the top left and fades, so that the colour of every empty patch indicates its position: Qwen2-VL's vision encoder
has only rotary (relative) positions.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from edgeprune.tabletop.world import GRIPPER_AT, RIM, SIDE, Item, Label, Scene

_SCALE = 2  # supersampling factor for smooth edges
_RGB = {
    "red": (205, 35, 40),
    "orange": (245, 130, 20),
    "yellow": (245, 225, 50),
    "green": (40, 150, 60),
    "blue": (35, 75, 200),
    "purple": (135, 45, 160),
    "white": (250, 250, 250),
    "black": (25, 25, 28),
}
_TABLE = np.array([178.0, 160.0, 140.0])
_FONT = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}


def draw_scene(scene: Scene) -> Image.Image:
    """Return the scene as an RGB image of SIDE x SIDE pixels."""
    table = np.clip(_lit_table() * scene.brightness, 0, 255).astype(np.uint8)
    large = Image.fromarray(table).resize((SIDE * _SCALE, SIDE * _SCALE), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    _draw_gripper(pen, *GRIPPER_AT[scene.gripper])
    for item in scene.items:
        _draw_item(pen, item)
    _draw_label(pen, scene.label)
    pixels = np.asarray(large.reduce(_SCALE), dtype=np.float32)
    noise = 3.0 * np.random.default_rng(scene.noise_seed).standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


@cache
def _lit_table() -> np.ndarray:
    # Separate hue shifts along x and y encode the position.
    ramp = np.linspace(-1.0, 1.0, SIDE)
    x, y = np.meshgrid(ramp, ramp)
    pixels: np.ndarray = _TABLE + np.stack([-34 * x, -10 * x - 10 * y, 34 * y], axis=-1)
    rim = np.ones((SIDE, SIDE), bool)
    rim[RIM - 4 : 4 - RIM, RIM - 4 : 4 - RIM] = False
    pixels[rim] *= 0.6
    return pixels


def _draw_gripper(pen: ImageDraw.ImageDraw, x: float, y: float) -> None:
    _box(pen, x - 12, y - 5, x + 12, y + 5, (70, 75, 85))
    _box(pen, x - 7, y - 3, x + 7, y + 3, (20, 220, 220))


def _draw_item(pen: ImageDraw.ImageDraw, item: Item) -> None:
    x, y, r = item.x, item.y, item.radius
    fill = _RGB[item.colour]
    shade = tuple(int(0.6 * c) if sum(fill) > 150 else c + 50 for c in fill)
    if item.shape == "cube":
        _box(pen, x - 0.86 * r, y - 0.86 * r, x + 0.86 * r, y + 0.86 * r, shade)
        _box(pen, x - 0.86 * r, y - 0.86 * r, x + 0.5 * r, y + 0.5 * r, fill)
    elif item.shape == "ball":
        _disc(pen, x, y, r, fill)
        _disc(pen, x - 0.35 * r, y - 0.35 * r, 0.25 * r, (255, 255, 255) if item.colour != "white" else shade)
    elif item.shape == "cone":
        _polygon(pen, [(x, y - r), (x + r, y + 0.9 * r), (x, y + 0.9 * r)], shade)
        _polygon(pen, [(x, y - r), (x, y + 0.9 * r), (x - r, y + 0.9 * r)], fill)
    elif item.shape == "ring":
        box = [_SCALE * v for v in (x - r, y - r, x + r, y + r)]
        pen.ellipse(box, outline=fill, width=round(_SCALE * 0.36 * r))
    elif item.shape == "star":
        _polygon(pen, _star(x, y, 1.12 * r), fill)
    else:
        _box(pen, x - 0.3 * r, y - r, x + 0.3 * r, y + r, fill)
        _box(pen, x - r, y - 0.3 * r, x + r, y + 0.3 * r, fill)


def _draw_label(pen: ImageDraw.ImageDraw, label: Label) -> None:
    _box(pen, label.x - 17, label.y - 11, label.x + 17, label.y + 11, (60, 60, 60))
    _box(pen, label.x - 16, label.y - 10, label.x + 16, label.y + 10, (255, 255, 255))
    for character, left in zip(label.text, (label.x - 13, label.x + 3), strict=True):
        for row, dots in enumerate(_FONT[character].split()):
            for column, dot in enumerate(dots):
                if dot == "1":
                    x, y = left + 2 * column, label.y - 7 + 2 * row
                    _box(pen, x, y, x + 2, y + 2, (0, 0, 0))


def _star(x: float, y: float, r: float) -> list[tuple[float, float]]:
    angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
    radii = [r if k % 2 == 0 else 0.42 * r for k in range(10)]
    return [(x + q * math.cos(a), y + q * math.sin(a)) for a, q in zip(angles, radii, strict=True)]


def _polygon(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], fill: tuple[int, ...]) -> None:
    pen.polygon([(_SCALE * x, _SCALE * y) for x, y in points], fill=fill)


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
    pen.ellipse([_SCALE * v for v in (x - r, y - r, x + r, y + r)], fill=fill)


def _box(pen: ImageDraw.ImageDraw, x0: float, y0: float, x1: float, y1: float, fill: tuple[int, ...]) -> None:
    pen.rectangle([_SCALE * x0, _SCALE * y0, _SCALE * x1 - 1, _SCALE * y1 - 1], fill=fill)

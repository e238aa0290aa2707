"""How often a bundle with a learned selection calls images unlike those that it was learned from.

    python examples/learned/unlike.py BUNDLE
    python examples/learned/unlike.py BUNDLE --photographs FOLDER

For a bundle of `tabletop` that was learned from TableTop's scenes. Asks it about scenes that it has not seen, about the same scenes
changed, and about what is no scene at all, and prints a table of distances: 1 is the limit. FOLDER: a data set of photographs, as
examples/train_tabletop/photographs.py writes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from edgeprune.runtime import Runtime, load
from edgeprune.tabletop.dataset import scenes
from edgeprune.tabletop.drawing import draw_scene

Images = Iterator[Image.Image]
SIDE, LINES, COLUMNS = 192, 15, 31


def main() -> None:
    """Print how far the images of each kind are, and how many are called unlike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--others", type=int, default=40, help="images of every other kind")
    parser.add_argument("--seed", type=int, default=6000)
    request = parser.parse_args()
    rng, count = np.random.default_rng(request.seed), request.others
    kinds = {"unseen scenes": drawn(request.seed, request.scenes)}
    changes = {
        "with noise": lambda image: noisy(image, rng),
        "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
        "at four fifths of the light": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        "without colour": lambda image: ImageOps.grayscale(image).convert("RGB"),
        "upside down": lambda image: image.rotate(180),
        "enlarged": lambda image: image.crop((24, 24, 120, 120)),
        "negative": ImageOps.invert,
        "at half of the light": lambda image: ImageEnhance.Brightness(image).enhance(0.5),
    }
    kinds |= {f"scenes {name}": map(change, drawn(request.seed, count)) for name, change in changes.items()}
    kinds |= {
        "other drawings": shapes(rng, count),
        "pages of text": pages(rng, count),
        "noise": noise(rng, count),
        "grey": greys(count),
    }
    if request.photographs is not None:
        files = sorted((request.photographs / "images").iterdir())[:count]
        kinds["photographs"] = (Image.open(file).convert("RGB") for file in files)
    print("| images | count | distance | called unlike |\n|---|---|---|---|")
    with load(request.bundle) as model:
        for name, images in kinds.items():
            far = np.array([distance(model, image) for image in images])
            print(f"| {name} | {len(far)} | {far.min():.2f} to {far.max():.2f} | {(far > 1).mean():.0%} |", flush=True)


def distance(model: Runtime, image: Image.Image) -> float:
    """Return how far the receipt of an answer says that an image is."""
    (far,) = model.generate(image, "Describe the scene.", fit="stretch", max_tokens=1).receipt.image_distances
    return far


def drawn(seed: int, count: int) -> Images:
    """Yield TableTop's scenes."""
    return (draw_scene(scene).convert("RGB") for scene, _ in scenes(seed, count))


def noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return an image with the noise of a camera in the dark, a deviation of 15 of 255."""
    pixels = np.asarray(image, np.float64) + rng.normal(0, 15, (image.height, image.width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shapes(rng: np.random.Generator, count: int) -> Images:
    """Yield lines, boxes and ellipses on white."""
    for _ in range(count):
        image = Image.new("RGB", (SIDE, SIDE), "white")
        pen = ImageDraw.Draw(image)
        draws: tuple[Callable[..., None], ...] = (pen.line, pen.rectangle, pen.ellipse)
        for draw in 3 * draws:
            left, right = sorted(rng.integers(0, SIDE, 2).tolist())
            top, bottom = sorted(rng.integers(0, SIDE, 2).tolist())
            draw((left, top, right, bottom), fill=tuple(rng.integers(0, 256, 3).tolist()))
        yield image


def pages(rng: np.random.Generator, count: int) -> Images:
    """Yield black letters on white."""
    for _ in range(count):
        image = Image.new("RGB", (SIDE, SIDE), "white")
        for line in range(LINES):
            text = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz    "), COLUMNS))
            ImageDraw.Draw(image).text((4, 4 + 12 * line), text, fill="black")
        yield image


def noise(rng: np.random.Generator, count: int) -> Images:
    """Yield random pixels."""
    return (Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count))


def greys(count: int) -> Images:
    """Yield images of one grey each, from black to white."""
    return (Image.new("RGB", (SIDE, SIDE), (int(value),) * 3) for value in np.linspace(0, 255, count))


if __name__ == "__main__":
    main()

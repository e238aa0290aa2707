"""Check a model folder by its JSON files alone, within a second: what is missing is said before torch is imported.

Only what the files say is judged. What transformers fills in, such as default sizes, is checked again when the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.checkpoint.processor import template_in_files
from edgeprune.errors import ImageError, PlanError, UnsupportedModelError, UsageError
from edgeprune.io.files import is_file
from edgeprune.plan import Geometry, KeepPlan
from edgeprune.processors import ImageSpec, image_spec
from edgeprune.processors.qwen import GridSpec
from edgeprune.registry import attention_needed, has_chat_template

if TYPE_CHECKING:
    from edgeprune.checkpoint.loading import ModelFolder

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
_LARGEST_SIDE = 4096  # of the sizes that a hint names


def check_folder(folder: ModelFolder) -> None:
    """Raise UnsupportedModelError for a folder without chat template, end token or image token."""
    named = str(folder.processor.get("processor_class"))
    if not template_in_files(folder.path) and not has_chat_template(folder.model_type, named):
        raise no_chat_template(folder.name)
    path = folder.path / GENERATION
    if is_file(path) and _settings(path).get("eos_token_id") is None:
        raise no_end_token(folder.name)
    config = _settings(folder.path / CONFIG)
    token = config.get("image_token_id", config.get("image_token_index"))
    if token is not None and is_file(folder.path / TOKENIZER) and token not in set(_token_ids(folder.path / TOKENIZER)):
        raise no_image_token(folder.name, token)


def check_size(folder: ModelFolder, size: tuple[int, int] | None, frames: int = 1) -> None:
    """Raise UsageError for an image size that does not divide into visual tokens, or has more than the model's context holds.

    Judges processors that take any size; the size of all others is limited by their settings.
    """
    if size is None or not str(folder.processor.get("image_processor_type", "Qwen")).startswith("Qwen"):
        return
    geometry = sized_geometry(lambda size: _spec_of_area(folder.processor, size[0] * size[1]), size, frames)
    context = _text_settings(folder).get("max_position_embeddings")
    if isinstance(context, int):
        check_context(folder.name, geometry, context)


def decoder_layers(folder: ModelFolder) -> int | None:
    """Return the number of decoder layers that config.json states, or None if it leaves it to transformers."""
    layers = _text_settings(folder).get("num_hidden_layers")
    return layers if isinstance(layers, int) else None


def sized_geometry(
    spec_of: Callable[[tuple[int, int]], ImageSpec], size: tuple[int, int], frames: int = 1, fps: float = 0.0
) -> Geometry:
    """Return the geometry of images of `size` (height, width), or of a video of such frames at `fps`.

    `spec_of`: the image processor for a size. Raises UsageError, which names the nearest sizes, if the processor changes this one.
    """
    if min(size) < 1:
        raise UsageError(f"Image size {size[0]}x{size[1]} has no pixels.", hint="Write height x width, such as 448x336.")
    try:
        geometry = spec_of(size).geometry(*size, frames, fps)
    except ImageError as error:
        sizes = " or ".join(_near_sizes(spec_of, size))
        raise UsageError(str(error.message), hint=f"Give --image-size {sizes}." if sizes else error.hint) from error
    if (geometry.height, geometry.width) == size:
        return geometry
    unit = geometry.patch * geometry.merge
    nearest = [tuple(side // unit * unit for side in size), tuple(-(-side // unit) * unit for side in size)]
    fitting = [f"{height}x{width}" for height, width in nearest if _is_kept(spec_of, (height, width))]
    sizes = " or ".join(dict.fromkeys(fitting or [f"{geometry.height}x{geometry.width}"]))
    raise UsageError(
        f"Image size {size[0]}x{size[1]} does not divide into {unit}-pixel visual tokens.", hint=f"Give --image-size {sizes}."
    )


def check_context(name: str, geometry: Geometry, context: int, text: int = 0) -> None:
    """Raise UsageError if an image and `text` tokens leave no place for an answer in the model's `context`."""
    if geometry.tokens + text >= context:
        raise UsageError(
            f"{geometry} are {geometry.tokens} tokens, but {name} takes {context} with the question.",
            hint="Give a smaller --image-size" + (", or fewer --frames." if geometry.frames > 1 else "."),
        )


def check_attention(plan: KeepPlan, without: Collection[int]) -> None:
    """Raise PlanError for a cut that needs attention of layers `without` it, which have states instead."""
    layers = [layer for layer in range(plan.layers) if layer not in without]
    for cut in plan.cache_cuts:
        if cut.layer in without:
            raise PlanError(
                f"{cut} prunes a KV cache, and layer {cut.layer} has none.", hint=f"Layers with one: {_listed(layers)}."
            )
    start = 0  # of the layers that see the tokens which this cut sees
    for cut in plan.layer_cuts:
        needed = attention_needed(cut.method)
        if needed == "next" and cut.layer in without:
            reason, possible = "the attention of its layer", layers
        elif needed == "previous" and not any(start <= layer < cut.layer for layer in layers):
            reason = "attention, and no layer has it " + (f"since the cut before layer {start}" if start else "before it")
            possible = list(range(next((layer for layer in layers if layer >= start), plan.layers) + 1, plan.layers))
        else:
            start = cut.layer
            continue
        raise PlanError(f"{cut} ranks by {reason}.", hint=f"Layers where it can act: {_listed(possible) or 'none'}.")


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


def no_end_token(name: str) -> UnsupportedModelError:
    """Return the error for a model whose answers would never end."""
    return UnsupportedModelError(
        f"{name} has no end token: its answers would never end.", hint=f"Add eos_token_id to its {GENERATION}."
    )


def no_image_token(name: str, token: int) -> UnsupportedModelError:
    """Return the error for a model whose tokenizer never makes its image token."""
    return UnsupportedModelError(
        f"The tokenizer of {name} does not make the image token {token} that {CONFIG} names.",
        hint=f"Set image_token_id in {CONFIG} to the id in {TOKENIZER}, or copy the tokenizer of the same model.",
    )


def no_chat_template(name: str) -> UnsupportedModelError:
    """Return the error for a model without a chat template."""
    return UnsupportedModelError(f"{name} has no chat template.", hint="Add a chat_template.jinja to it.")


def _spec_of_area(processor: Mapping[str, Any], area: int) -> ImageSpec:
    # Qwen's image processor, which brings every image to this area.
    spec = image_spec(processor)
    assert isinstance(spec, GridSpec)
    return replace(spec, min_pixels=area, max_pixels=area)


def _near_sizes(spec_of: Callable[[tuple[int, int]], ImageSpec], size: tuple[int, int]) -> list[str]:
    # The nearest smaller and larger sizes of about this aspect that the processor takes, in steps of 14 pixels.
    longest, found = max(size), list[str]()
    for sides in (range(longest // 14 * 14, longest // 2, -14), range(-(-longest // 14) * 14, _LARGEST_SIDE + 1, 14)):
        shapes = (tuple(max(1, round(side * edge / longest / 14)) * 14 for edge in size) for side in sides)
        found += [f"{height}x{width}" for height, width in islice((s for s in shapes if _is_kept(spec_of, (s[0], s[1]))), 1)]
    return found


def _is_kept(spec_of: Callable[[tuple[int, int]], ImageSpec], size: tuple[int, int]) -> bool:
    if min(size) < 1:
        return False
    with suppress(ImageError):
        geometry = spec_of(size).geometry(*size)
        return (geometry.height, geometry.width) == size
    return False


def _text_settings(folder: ModelFolder) -> Mapping[str, Any]:
    # Older Qwen2-VL checkpoints have the decoder's settings at the top level.
    config = _settings(folder.path / CONFIG)
    text = config.get("text_config", config)
    return text if isinstance(text, Mapping) else {}


def _token_ids(path: Path) -> Iterator[int]:
    data = _settings(path)
    with suppress(AttributeError, KeyError, TypeError):  # transformers says what is wrong with it
        yield from (token["id"] for token in data.get("added_tokens") or ())
        vocabulary = data["model"]["vocab"]
        yield from vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))


def _settings(path: Path) -> dict[str, Any]:
    # The object in a JSON file; nothing from a file that is missing or malformed, which transformers reports.
    with suppress(OSError, ValueError, RecursionError):
        data = json.loads(path.read_text(encoding="utf-8"))
        return data if isinstance(data, dict) else {}
    return {}

"""The processor of a checkpoint: its image settings, and tokenizer and chat template as transformers' own class makes them.

Some classes change their tokenizer: PaliGemma's switches `add_bos_token` off. A tokenizer loaded alone would give other ids.
`AutoProcessor` needs torchvision for Pixtral and for all models that take videos, and EdgePrune does not. So the class is loaded
with the image processor that uses Pillow, and without its video processor.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from edgeprune.errors import UnsupportedModelError, UsageError
from edgeprune.plan import Geometry
from edgeprune.processors import named_processor

if TYPE_CHECKING:
    from PIL import Image

PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG = "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_NAMING = (PROCESSOR, PREPROCESSOR, TOKENIZER_CONFIG)  # the order in which AutoProcessor looks for the name of the class
_RENAMED = {"Qwen2_5_VLImageProcessor": "Qwen2VLImageProcessorPil"}  # transformers dropped the name of early 2025
_WITHOUT_PILLOW = ("Lfm2VlImageProcessor",)  # transformers has them for torchvision alone; EdgePrune has its own


def image_settings(path: Path, model_type: str) -> dict[str, Any]:
    """Return the settings of the image processor of the folder `path`; raise UsageError if there are none.

    Those in processor_config.json come first, and a class that they do not name is that of the model type, as in transformers.
    """
    combined = read_json(path, PROCESSOR).get("image_processor") if (path / PROCESSOR).is_file() else None
    if combined is not None and not isinstance(combined, dict):
        raise UsageError(f"The image_processor in {path / PROCESSOR} is not a JSON object.")
    settings = dict(combined or read_json(path, PREPROCESSOR))
    older = settings.pop("feature_extractor_type", None)  # its name up to transformers 4.26
    if isinstance(older, str):
        settings.setdefault("image_processor_type", older.replace("FeatureExtractor", "ImageProcessor"))
    return named_processor(settings, model_type)


def load_processor(path: Path, model_type: str) -> Any:
    """Return transformers' processor of the folder `path`, whose video processor is a placeholder.

    Raises UnsupportedModelError when transformers cannot load it.
    """
    try:
        kind = _processor_class(path, model_type)
        with _image_processor_alone(kind, model_type):
            processor = kind.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"transformers cannot load the processor of {path}: {cause}",
            hint="Copy all tokenizer and processor files of the checkpoint into the folder.",
        ) from error
    if getattr(processor, "patch_size", 0) is None:
        _complete(processor, path)
    # transformers sets both at each call: those of the file are of the last call before it was saved, and no bundle must have them.
    processor.tokenizer.backend_tokenizer.no_truncation()
    processor.tokenizer.backend_tokenizer.no_padding()
    return processor


def _complete(processor: Any, path: Path) -> None:
    # Files of LLaVA from before transformers 4.44 (Mantis) lack what its processor counts tokens with.
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy


def processor_names(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """Return the classes of its processor that the files of the folder `path` name, and of its image processor with `settings`."""
    named = (read_json(path, name).get("processor_class") for name in _NAMING if (path / name).is_file())
    return [name for name in (next(filter(None, named), None), settings.get("image_processor_type")) if isinstance(name, str)]


class PreparedVideo:
    """Stands for the video processor of a processor, which needs torchvision: it gives one video, prepared elsewhere.

    `patches` [patches, patch pixels]: what `ImageSpec.patches` makes of the `frames` of a video of this geometry.
    """

    def __init__(self, geometry: Geometry, frames: Sequence[Image.Image], patches: np.ndarray) -> None:
        from transformers.video_utils import VideoMetadata

        self.frames, self._geometry, self._patches = list(frames), geometry, patches
        pixels = 3 * geometry.patch**2
        # What processors read of their video processors.
        self.merge_size, self.temporal_patch_size = geometry.merge, patches.shape[1] // pixels
        self.num_frames, self.fps = geometry.frames, geometry.fps
        self._pixels = "pixel_values_videos"
        self._metadata = VideoMetadata(
            total_num_frames=geometry.frames,
            fps=geometry.fps,
            duration=geometry.frames / geometry.fps,
            frames_indices=list(range(geometry.frames)),
        )

    def inserted(self, processor: Any) -> Any:
        """Return a copy of a processor with this video processor."""
        found, video = copy(processor), copy(self)
        if type(processor).__name__ == "SmolVLMProcessor":
            video._pixels = "pixel_values"
        found.video_processor = video
        return found

    def __call__(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return the video as transformers' models take it, with its metadata."""
        import torch

        geometry, patches = self._geometry, self._patches
        if self.temporal_patch_size > 1:
            grid = [len(geometry.layout), geometry.height // geometry.patch, geometry.width // geometry.patch]
            made = {self._pixels: torch.from_numpy(patches), "video_grid_thw": torch.tensor([grid])}
        else:
            made = {self._pixels: torch.from_numpy(_pictures(patches, geometry.frames, geometry.patch))[None]}
        return {**made, "video_metadata": [self._metadata]}


def _pictures(patches: np.ndarray, count: int, side: int) -> np.ndarray:
    # Square pictures [count, 3, height, width] from their patches, row by row.
    across = round((len(patches) / count) ** 0.5)
    blocks = patches.reshape(count, across, across, 3, side, side).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(blocks).reshape(count, 3, across * side, across * side)


def processor_inputs(
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Any] = (),
    *,
    video: PreparedVideo | None = None,
    template: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Return what `apply_chat_template` of a processor makes of a conversation, up to where the answer begins.

    `messages`: their parts of type "image" take `images` in order, those of type "video" take `video`. `template`: instead of the
    processor's own. `settings`: of the image processor, other than its own. The result holds torch tensors, as a model takes them.
    """
    pictures = iter(images)

    def filled(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] == "video" and video is not None:
            return {**part, "video": video.frames}
        return part if part["type"] == "text" else {**part, "image": next(pictures)}

    conversation = [
        message if isinstance(message["content"], str) else {**message, "content": [filled(part) for part in message["content"]]}
        for message in messages
    ]
    options = {"images_kwargs": dict(settings or {})} if images else None
    processor = processor if video is None else video.inserted(processor)
    return processor.apply_chat_template(
        conversation,
        chat_template=template,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


def chat_template(processor: Any) -> str | None:
    """Return the template that `apply_chat_template` renders: the processor's, else its tokenizer's; the default of several."""
    for template in (processor.chat_template, processor.tokenizer.chat_template):
        template = template.get("default") if isinstance(template, dict) else template
        if isinstance(template, str):
            return template
    return None


def template_in_files(path: Path) -> bool:
    """Return whether the files of the folder `path` have a template for `chat_template` to return, without loading anything."""
    in_files = any((path / name).is_file() for name in _TEMPLATES) or (path / "additional_chat_templates").is_dir()
    settings = (path / name for name in (PROCESSOR, TOKENIZER_CONFIG))
    return in_files or any(read_json(each.parent, each.name).get("chat_template") for each in settings if each.is_file())


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the folder `path`; raise UsageError if there is none."""
    try:
        data = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} has no {name}.", hint="Give a folder written by save_pretrained.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot read {path / name}: {error}.") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path / name} is not a JSON object.")
    return data


def _processor_class(path: Path, model_type: str) -> Any:
    # The class that the files name, else the one of the model type.
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    for name in _NAMING:
        named = read_json(path, name).get("processor_class") if (path / name).is_file() else None
        if isinstance(named, str) and hasattr(transformers, named):
            return _without_torchvision(named)
    return _without_torchvision(PROCESSOR_MAPPING_NAMES[model_type])


def _without_torchvision(name: str) -> Any:
    # Pixtral's module takes a function from one that imports torchvision, only to count tokens without making pixels.
    import transformers
    from transformers.utils.import_utils import DummyObject

    kind = getattr(transformers, name)
    if not isinstance(kind, DummyObject):
        return kind
    importlib.import_module("transformers.processing_utils")  # what the module imports must not see the replacement
    with mock.patch.object(transformers.utils, "is_vision_available", lambda: False):
        return getattr(importlib.import_module(kind.__module__), name)


@contextmanager
def _image_processor_alone(kind: Any, model_type: str) -> Iterator[None]:
    # Replaces what a processor class loads for images and videos.
    import transformers
    from transformers import AutoImageProcessor, processing_utils
    from transformers.image_processing_base import ImageProcessingMixin

    class Placeholder(ImageProcessingMixin):  # type: ignore[misc]
        num_frames = fps = None  # what SmolVLM's class reads for images too

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            return cls()

    class PillowImageProcessor:
        @staticmethod
        def from_pretrained(source: Any, **options: Any) -> Any:
            named = str(image_settings(Path(source), model_type)["image_processor_type"])
            if named.removesuffix("Fast") in _WITHOUT_PILLOW:
                return Placeholder()
            kind = _RENAMED.get(named)
            if kind is not None:
                return getattr(transformers, kind).from_pretrained(source, **options)
            return AutoImageProcessor.from_pretrained(source, backend="pil", **options)

    known = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING
    loaders = {name: known[name] for name in known.keys() - {"image_processor", "video_processor"}}
    loaders |= {"image_processor": PillowImageProcessor, "video_processor": Placeholder}
    with ExitStack() as stack:
        replace = stack.enter_context
        replace(mock.patch.object(processing_utils, "MODALITY_TO_AUTOPROCESSOR_MAPPING", loaders))
        # The base class that the processor checks its arguments for.
        replace(mock.patch.dict(processing_utils.MODALITY_TO_BASE_CLASS_MAPPING, {"video_processor": "ImageProcessingMixin"}))
        module = sys.modules[kind.__module__]
        if getattr(module, "num2words", True) is None:  # SmolVLM's class asks for it, to write the length of a video in words
            replace(mock.patch.object(module, "num2words", str))
        yield

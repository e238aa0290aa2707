"""What transformers itself makes of a bundle's model: prompts, pixels, and an answer without pruning.

Prompts are those of `apply_chat_template` of the checkpoint's own processor, pixels those of its image processor, and an answer is
that of `generate` under the checkpoint's generation_config.json. The video processors of transformers need torchvision. A video's
frames are therefore prepared by EdgePrune, and its prompt and answer are transformers' own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from edgeprune.bundle import PREPROCESSOR, Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.checkpoint.processor import PreparedVideo, chat_template, processor_inputs
from edgeprune.errors import EdgePruneError, one_line
from edgeprune.processors import read_image_spec
from edgeprune.runtime import Runtime
from edgeprune.runtime.backends.compare import largest_difference
from edgeprune.runtime.text.prompt import Message, PromptEncoder

_NO_TEMPLATE = "the checkpoint has no chat template"
_LONG_VIDEO = "transformers 5 places the text after a video of so many frames elsewhere"


class Comparison(NamedTuple):
    """What one stage found. `worst`: the largest difference, or None if nothing could be compared: `compared` then says why."""

    stage: str
    worst: float | None
    compared: str


class Upstream:
    """The model of a bundle in transformers, asked about `frames`: an image, or the frames of a video."""

    def __init__(self, loaded: LoadedModel, bundle: Bundle, frames: Sequence[Image.Image]) -> None:
        self._loaded, self._bundle, self._frames = loaded, bundle, list(frames)
        self._encoder = PromptEncoder.of(bundle)
        self._kind, self._geometry = bundle.manifest.image.kind, bundle.plan.geometry
        self._video: PreparedVideo | None = None
        if self._kind == "video":
            self._video = PreparedVideo(self._geometry, self._frames, self._patches())

    def compare_prompts(self) -> Comparison:
        """Compare the ids of conversations: one image or video, two images, a system prompt, two turns, and text alone."""
        if reason := self._own_prompts():
            return Comparison("prompts", None, reason)
        compared, differing = list[str](), list[str]()
        for name, messages in self._conversations().items():
            try:
                expected = self._inputs(messages)["input_ids"][0].tolist()
            except Exception:  # a template may refuse a conversation, and a processor may lack a setting
                continue
            compared.append(name)
            try:
                actual = self._encoder.every_id(messages)
            except EdgePruneError:
                actual = []
            differing += [name] if actual != expected else []
        if not compared:
            return Comparison("prompts", None, "the processor writes no prompt")
        what = f"differs for {', '.join(differing)}" if differing else ", ".join(compared)
        return Comparison("prompts", len(differing) / len(compared), what)

    def compare_pixels(self) -> Comparison:
        """Compare the patches of an image."""
        own = self._loaded.processor.image_processor
        if self._video is not None or not callable(own):
            return Comparison("pixels", None, "transformers prepares them with torchvision")
        changed = self._loaded.changed_settings(self._geometry)
        expected = own(images=self._frames, return_tensors="np", **changed)["pixel_values"]
        if expected.ndim > 2:
            expected = _in_patches(expected.reshape(-1, *expected.shape[-3:]), self._geometry.patch)
        actual = self._patches()
        return Comparison("pixels", largest_difference([(expected, actual)]), f"{actual.shape[0]} patches")

    def compare_answer(self, runtime: Runtime, prompt: str, max_tokens: int) -> Comparison:
        """Compare the text of an answer without pruning, greedily."""
        name = "unpruned text"
        if reason := self._own_prompts() or self._own_positions():
            return Comparison(name, None, reason)
        try:
            inputs = self._inputs([self._turn(prompt, 1)])
        except Exception as error:  # a processor may lack a setting
            return Comparison(name, None, one_line(str(error))[:80])
        with torch.no_grad():
            made = self._loaded.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        text = self._loaded.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        shown = self._frames if self._video is not None else self._frames[0]
        answer = runtime.generate(shown, prompt, max_tokens=max_tokens, prune=False).text
        return Comparison(name, float(answer != text), f"{len(text.split())} words of generate()")

    def _own_prompts(self) -> str:
        # Why prompts are not those of transformers, if so.
        processor = self._loaded.processor
        if chat_template(processor) is None:
            return _NO_TEMPLATE
        if self._video is None:
            return ""
        if getattr(sys.modules[type(processor).__module__], "num2words", True) is None:  # SmolVLM's
            return "transformers writes them with num2words, which is not installed"
        return str(self._loaded.family.own_video_prompts)

    def _own_positions(self) -> str:
        # Why text after a video has other positions than in transformers, if so (docs/families.md).
        view, *others = self._geometry.layout
        longest = self._loaded.family.position_axes == 3 and 1 + len(others) > max(view.rows, view.columns)
        return _LONG_VIDEO if longest and self._video is not None else ""

    def _conversations(self) -> dict[str, list[Message]]:
        def said(role: str, text: str) -> Message:
            return {"role": role, "content": [{"type": "text", "text": text}]}

        turn, asked, kind = self._turn, "Describe the scene.", self._kind
        found = {f"one {kind}": [turn(asked, 1)], "a system prompt": [said("system", "Be brief."), turn(asked, 1)]}
        if self._video is not None:
            found["two turns"] = [turn(asked, 1), said("assistant", "A table."), said("user", "Look again.")]
        elif self._loaded.family.several_as_one:
            found["two images"] = [turn(asked, 2)]
            found["two turns"] = [turn(asked, 1), said("assistant", "A table."), turn("Look again.", 1)]
        return {**found, "text alone": [turn(asked, 0)]}

    def _turn(self, text: str, images: int) -> Message:
        return {"role": "user", "content": [*[{"type": self._kind}] * images, {"type": "text", "text": text}]}

    def _inputs(self, messages: Sequence[Message]) -> Any:
        encoder = self._encoder
        written = encoder.template.in_their_form(messages, **encoder.special_tokens)
        parts = [part for message in written if not isinstance(message["content"], str) for part in message["content"]]
        images = [self._frames[0]] * sum(part["type"] == "image" for part in parts)
        video = self._video if any(part["type"] == "video" for part in parts) else None
        settings = self._loaded.changed_settings(self._geometry) if images else None
        template = self._loaded.chat_template(encoder.image)
        return processor_inputs(self._loaded.processor, written, images, video=video, template=template, settings=settings)

    def _patches(self) -> np.ndarray:
        return read_image_spec(self._bundle.file(PREPROCESSOR)).patches(self._frames)


def _in_patches(views: np.ndarray, side: int) -> np.ndarray:
    # Patches of images [views, 3, height, width] in the order of a vision encoder's patch convolution.
    rows, columns = views.shape[2] // side, views.shape[3] // side
    blocks = views[:, :, : rows * side, : columns * side].reshape(len(views), 3, rows, side, columns, side)
    return np.ascontiguousarray(blocks.transpose(0, 2, 4, 1, 3, 5)).reshape(-1, 3 * side * side)

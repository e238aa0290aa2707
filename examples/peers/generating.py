"""Asks models that generate as transformers' do: the checkpoint's own processor, generate(), a streamer that notes the tokens."""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from question import Ask, Clock, Cost, Question


def asking(question: Question, model: Any, owner: Any, method: str, **settings: Any) -> Ask:
    """Return what answers about an image. `method` of `owner` makes an image's embeddings; `settings` are those of generate().

    Option: `dtype`, that of the pixels.
    """
    torch, transformers, pillow = map(import_module, ("torch", "transformers", "PIL.Image"))
    processor = transformers.AutoProcessor.from_pretrained(question.folder)
    settings |= {"max_new_tokens": question.tokens, "min_new_tokens": question.tokens, "do_sample": False}
    dtype = getattr(torch, question.options.get("dtype", "float32"))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
    look = getattr(owner, method)

    def ask(image: Path) -> Cost:
        picture, clock, seen = pillow.open(image).convert("RGB"), Clock(), []

        @wraps(look)  # generate() asks for its signature
        def look_and_note(*arguments: Any, **named: Any) -> Any:
            embeddings = look(*arguments, **named)
            seen.append(clock.now())
            return embeddings

        setattr(owner, method, look_and_note)
        written = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = processor(images=[picture], text=[written], add_special_tokens=False, return_tensors="pt").to(dtype)
        with torch.inference_mode():
            model.generate(**inputs, **settings, streamer=Notes(clock))
        return clock.cost(seen[0], inputs["input_ids"].shape[1])

    return ask


class Notes:
    """What generate() hands its tokens to: the prompt first, then one after the other."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._prompt = clock, True

    def put(self, value: object) -> None:
        """Note a token."""
        if not self._prompt:
            self._clock.token()
        self._prompt = False

    def end(self) -> None:
        """Nothing is left to do."""

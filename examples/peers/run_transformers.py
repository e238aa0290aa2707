"""Ask transformers on torch, which do not prune. Options: `attention` (eager, sdpa), `dtype`, `compile`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from question import Ask, Clock, Cost, Question, answer, asked


def load(question: Question) -> Ask:
    """Return what answers about an image."""
    torch, transformers, pillow = map(import_module, ("torch", "transformers", "PIL.Image"))
    torch.set_num_threads(question.threads)
    options = question.options
    dtype = getattr(torch, options["dtype"])
    family: Any = transformers.AutoModelForImageTextToText
    model = family.from_pretrained(question.folder, dtype=dtype, attn_implementation=options["attention"]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(question.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(question.folder)
    length: dict[str, Any] = {"max_new_tokens": question.tokens, "min_new_tokens": question.tokens, "do_sample": False}
    if "compile" in options:
        model.model.visual.compile()
        settings = transformers.CompileConfig(mode="default", fullgraph=False)
        settings._compile_all_devices = True  # without it generate() leaves CPUs alone
        length |= {"cache_implementation": "static", "compile_config": settings}

    def ask(image: Path) -> Cost:
        picture, clock, seen = pillow.open(image).convert("RGB"), Clock(), []
        hook = model.model.visual.register_forward_hook(lambda *_: seen.append(clock.now()))
        pixels = processor(images=[picture], return_tensors="pt")
        grid = pixels["image_grid_thw"][0].prod().item() // processor.merge_size**2
        text = {"type": "text", "text": question.prompt}
        chat = [{"role": "user", "content": [{"type": "image"}, text]}]
        written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        written = written.replace("<|image_pad|>", "<|image_pad|>" * grid)
        tokens = tokenizer(written, return_tensors="pt", add_special_tokens=False)
        pixels["pixel_values"] = pixels["pixel_values"].to(dtype)
        kinds = (tokens["input_ids"] == model.config.image_token_id).int()
        with torch.inference_mode():
            inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "mm_token_type_ids": kinds}
            model.generate(**inputs, **pixels, **length, streamer=Notes(clock))
        hook.remove()
        return clock.cost(seen[0], tokens["input_ids"].shape[1])

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


if __name__ == "__main__":
    answer(asked(), load, "transformers", "torch")

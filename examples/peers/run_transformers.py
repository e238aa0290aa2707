"""Ask transformers on torch, which do not prune. Options: `attention` (eager, sdpa), `dtype`, `compile`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from generating import asking
from question import Ask, Question, answer, asked


def load(question: Question) -> Ask:
    """Return what answers about an image."""
    torch, transformers = map(import_module, ("torch", "transformers"))
    torch.set_num_threads(question.threads)
    options = question.options
    dtype = getattr(torch, options["dtype"])
    family: Any = transformers.AutoModelForImageTextToText
    model = family.from_pretrained(question.folder, dtype=dtype, attn_implementation=options["attention"]).eval()
    compiling: dict[str, Any] = {}
    if "compile" in options:
        model.model.get_encoder(modality="image").compile()
        settings = transformers.CompileConfig(mode="default", fullgraph=False)
        settings._compile_all_devices = True  # without it generate() leaves CPUs alone
        compiling = {"cache_implementation": "static", "compile_config": settings}
    return asking(question, model, model.model, "get_image_features", **compiling)


if __name__ == "__main__":
    answer(asked(), load, "transformers", "torch")

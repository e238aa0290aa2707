"""Ask what transformers' own ONNX exporter wrote, on its runner for ONNX Runtime, by transformers' generate()."""

from __future__ import annotations

import inspect
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from generating import asking
from question import Ask, Question, answer, asked
from to_onnx import TABLE


def load(question: Question) -> Ask:
    """Return what answers about an image."""
    torch, transformers, runtime = map(import_module, ("torch", "transformers", "onnxruntime"))
    exported = import_module("transformers.exporters").ExportedModel
    torch.set_num_threads(question.threads)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = question.threads
    model = _hollow(torch, transformers, question.folder)
    modules = {
        "image_encoder": model.get_encoder(modality="image"),
        "language_model": model.get_decoder(),
        "lm_head": model.lm_head,
    }
    modules |= {"connector": getattr(model.model, "connector", None)}
    for folder in sorted(each for each in question.folder.iterdir() if each.is_dir()):
        part = exported.from_pretrained(folder, device="cpu", session_options=options)
        if folder.name == "decode":
            _steps_by(model, part)
        else:
            _by(modules[folder.name], part)
    return asking(question, model, model.model, "get_image_features")


def _hollow(torch: Any, transformers: Any, folder: Path) -> Any:
    # The model as generate() needs it: of its weights only the table of embeddings, which no exported part has for the prompt. The
    # others are never written, so that they take no memory.
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.from_pretrained(folder))
    model = model.to(torch.float32).to_empty(device="cpu").eval()
    table = import_module("safetensors.torch").load_file(folder / TABLE)["table"]
    model.get_input_embeddings().weight = torch.nn.Parameter(table, requires_grad=False)
    return model


def _by(module: Any, part: Any) -> None:
    # Every forward pass of the module by an exported part.
    prepare = import_module("transformers.exporters.utils").precompute_export_inputs
    signature, known = inspect.signature(module.forward), part.components["model"].metadata.kwargs

    @wraps(module.forward)
    def forward(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named).arguments
        given = {name: value for name, value in bound.items() if name != "kwargs"} | bound.get("kwargs", {})
        prepare(module, given)
        return part.runners["model"](**{name: value for name, value in given.items() if name in known})

    module.forward = forward


def _steps_by(model: Any, part: Any) -> None:
    # Forward passes of one token by the exported step; the prompt's stay as they are, of parts.
    whole, known = model.forward, part.components["model"].metadata.kwargs

    @wraps(whole)  # generate() asks for its signature
    def forward(*arguments: Any, **named: Any) -> Any:
        if named["input_ids"] is None or named["input_ids"].shape[1] > 1:
            return whole(*arguments, **named)
        return part.runners["model"](**{name: value for name, value in named.items() if name in known})

    model.forward = forward


if __name__ == "__main__":
    answer(asked(), load, "transformers", "onnxruntime")

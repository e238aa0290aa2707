"""Ask onnxruntime-genai's decoder alone, with as many tokens as the others' text and image are.

Its builder exports no Qwen2-VL: this is the language model in it. Option: `tokens`, how many go in; which ones does not matter, and
its tokenizer cannot read the bundled one's pattern.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from question import Ask, Clock, Cost, Question, answer, asked


def load(question: Question) -> Ask:
    """Return what answers; the image is not looked at."""
    genai, numpy = map(import_module, ("onnxruntime_genai", "numpy"))
    config = genai.Config(str(question.folder))
    session = {"session_options": {"intra_op_num_threads": question.threads}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = genai.Model(config)
    prompt = numpy.arange(int(question.options["tokens"]), dtype=numpy.int32)
    length = len(prompt) + question.tokens

    def ask(image: Path) -> Cost:
        settings = genai.GeneratorParams(model)
        settings.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = genai.Generator(model, settings)
        clock = Clock()
        generator.append_tokens(prompt)
        for _ in range(question.tokens):
            generator.generate_next_token()
            clock.token()
        cost = clock.cost(None, len(prompt))
        return Cost(None, None, cost.ttft_ms, cost.ms_per_token, cost.tokens, cost.entered)

    return ask


if __name__ == "__main__":
    answer(asked(), load, "onnxruntime-genai", "onnxruntime")

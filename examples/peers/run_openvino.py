"""Ask OpenVINO GenAI's VLMPipeline. `--keep` becomes the `pruning_ratio` of its CDPruner, options its device properties."""

from __future__ import annotations

import statistics
from importlib import import_module
from pathlib import Path

from question import Ask, Cost, Question, answer, asked


def load(question: Question) -> Ask:
    """Return what answers about an image."""
    genai, openvino, numpy, pillow = map(import_module, ("openvino_genai", "openvino", "numpy", "PIL.Image"))
    pipeline = genai.VLMPipeline(str(question.folder), "CPU", INFERENCE_NUM_THREADS=question.threads, **question.options)
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = question.tokens
    config.ignore_eos = True
    config.do_sample = False
    config.pruning_ratio = round((1 - question.keep) * 100)

    def ask(image: Path) -> Cost:
        pixels = openvino.Tensor(numpy.asarray(pillow.open(image).convert("RGB"))[None])
        metrics = pipeline.generate(question.prompt, images=[pixels], generation_config=config).perf_metrics
        ttft, vision = metrics.get_ttft().mean, metrics.get_prepare_embeddings_duration().mean
        return Cost(
            ttft_ms=ttft,
            vision_ms=vision,
            prefill_ms=ttft - vision,
            ms_per_token=statistics.median(metrics.raw_metrics.m_durations) / 1e3,  # microseconds; get_tpot() is their mean
            tokens=metrics.get_num_generated_tokens(),
            entered=metrics.get_num_input_tokens(),
        )

    return ask


if __name__ == "__main__":
    answer(asked(), load, "openvino-genai", "openvino")

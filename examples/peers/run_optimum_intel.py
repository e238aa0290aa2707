"""Ask optimum-intel, which runs OpenVINO's graphs by transformers' generate(): for families that GenAI does not take, too."""

from __future__ import annotations

from importlib import import_module

from generating import asking
from question import Ask, Question, answer, asked


def load(question: Question) -> Ask:
    """Return what answers about an image."""
    intel = import_module("optimum.intel")
    model = intel.OVModelForVisualCausalLM.from_pretrained(
        question.folder, ov_config={"INFERENCE_NUM_THREADS": str(question.threads)}
    )
    return asking(question, model, model, "get_vision_embeddings")


if __name__ == "__main__":
    answer(asked(), load, "optimum-intel", "openvino")

"""Response bodies in OpenAI's format with the receipt, and the kept tokens of each cut as grids for the web page."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeprune.plan import KeepPlan
from edgeprune.runtime import Receipt, Runtime
from edgeprune.runtime.media.overlay import CACHES
from edgeprune.runtime.server.jobs import AnswerJob
from edgeprune.runtime.telemetry.receipt import ImageCuts

_STOPPED = ("end", "stop")  # reported as OpenAI's "stop"; all other reasons as "length"


def kept_token_maps(plan: KeepPlan, receipt: Receipt) -> list[dict[str, Any]]:
    """Return the views of each image (or of the video) after preprocessing, and the tokens that each cut kept.

    `shares` of a cut: 1 for a kept visual token and 0 for a dropped one; for KV caches the share of KV heads that keep the token.
    Returns an empty list if no cut was applied.
    """
    tokens = plan.geometry.tokens
    count = receipt.visual_tokens // tokens
    if not count or not receipt.cuts:
        return []
    return [_canvas(plan) | {"cuts": _cuts(cuts, tokens)} for cuts in receipt.cuts_by_image(count)]


def _canvas(plan: KeepPlan) -> dict[str, Any]:
    views = plan.geometry.layout
    names = ("top", "left", "height", "width", "rows", "columns", "separators", "time")
    return {
        "height": max(view.top + view.height for view in views),
        "width": max(view.left + view.width for view in views),
        "views": [{name: getattr(view, name) for name in names} for view in views],
    }


def _cuts(cuts: ImageCuts, tokens: int) -> list[dict[str, Any]]:
    maps = [_map(cut.cut, cut.before, cut.after, _shares([cut.kept], tokens)) for cut in cuts.tokens]
    if cuts.caches:
        heads = [head for cut in cuts.caches for head in cut.kept]
        after = round(float(np.mean([cut.after for cut in cuts.caches])))
        maps.append(_map(CACHES, max(cut.before for cut in cuts.caches), after, _shares(heads, tokens)))
    return maps


def _map(name: str, before: int, after: int, shares: np.ndarray) -> dict[str, Any]:
    return {"cut": name, "before": before, "after": after, "shares": [round(float(share), 3) for share in shares]}


def _shares(kept: Sequence[np.ndarray], tokens: int) -> np.ndarray:
    # [tokens]: the share of the index lists that contain each token.
    counts = np.zeros(tokens)
    for indices in kept:
        counts[np.asarray(indices, np.int64).reshape(-1)] += 1
    return counts / len(kept)


class Completion:
    """The response of one answer. All its chunks have the same id and creation time."""

    def __init__(self, job: AnswerJob, model: Runtime) -> None:
        self._job, self._model = job, model
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}

    def body(self, text: str) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        receipt = self._receipt
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(receipt)}
        body = {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(receipt)}
        return body | {"edgeprune": self._account()}

    def first_chunk(self) -> dict[str, Any]:
        """Return the first chunk of a stream: the role, and the times measured so far."""
        timing = {"queue_ms": self._job.queued_ms, "times_ms": self._receipt.to_dict()["times_ms"]}
        return self._chunk({"role": "assistant", "content": ""}) | {"edgeprune": timing}

    def text_chunk(self, text: str) -> dict[str, Any]:
        """Return the chunk of a piece of text."""
        return self._chunk({"content": text})

    def last_chunks(self) -> list[dict[str, Any]]:
        """Return the final chunks of a stream: the finish reason, and the usage if requested. The last one has the receipt."""
        receipt = self._receipt
        chunks = [self._chunk({}, finish_reason(receipt))]
        if self._job.request.include_usage:
            chunks.append({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(receipt)})
        chunks[-1] |= {"edgeprune": self._account()}
        return chunks

    @property
    def _receipt(self) -> Receipt:
        receipt = self._job.receipt
        assert receipt is not None  # set before the first piece
        return receipt

    def _chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return chunk | ({"usage": None} if self._job.request.include_usage else {})

    def _account(self) -> dict[str, Any]:
        receipt = self._receipt
        account = {"queue_ms": self._job.queued_ms, **without_kept(receipt)}
        if self._job.request.kept:
            account["pictures"] = kept_token_maps(self._model.plan, receipt) if self._model.spatial else []
        return account


def finish_reason(receipt: Receipt) -> str:
    """Return OpenAI's finish reason: "stop" if the model or a stop string ended the answer, else "length"."""
    return "stop" if receipt.finish_reason in _STOPPED else "length"


def usage(receipt: Receipt) -> dict[str, Any]:
    """Return the token counts of an answer. Prompt tokens include all visual tokens before pruning.

    `visual_tokens.after`: visual tokens cached after prefill, as a mean over the decoder layers.
    """
    prompt, answer = receipt.text_tokens + receipt.visual_tokens, receipt.generated_tokens
    after = round(receipt.visual_tokens * receipt.visual_kv_share)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {
            "audio_tokens": 0,
            "cached_tokens": receipt.recalled_tokens,
            "text_tokens": receipt.text_tokens,
            "image_tokens": receipt.visual_tokens,
        },
        "visual_tokens": {"before": receipt.visual_tokens, "after": after},
    }


def without_kept(receipt: Receipt) -> dict[str, Any]:
    """Return a receipt as JSON data without the lists of kept token indices."""
    data = receipt.to_dict()
    return data | {"cuts": [{name: value for name, value in cut.items() if name != "kept"} for cut in data["cuts"]]}


def model_card(model: Runtime) -> dict[str, Any]:
    """Return the model's entry in /v1/models, with its image geometry and cuts."""
    plan, geometry = model.plan, model.plan.geometry
    size = {"height": geometry.height, "width": geometry.width, "visual_tokens": geometry.tokens}
    about = {
        "kind": model.kind,
        "tiers": list(model.tiers),
        "geometry": size | {"frames": geometry.frames, "fps": geometry.fps},
        "cuts": [{"cut": str(cut), "keep": cut.keep} for cut in plan.cuts],
    }
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "edgeprune", "edgeprune": about}


def event(data: Mapping[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

"""Whether an image looks like those that a selection was learned from: its distance from them in the learned space.

An image is the mean of its visual tokens' places on the learned unit sphere (`edgeprune.methods.learned`). Its distance from those
of calibration is the root of the mean square of (place - mean) / deviation over the dimensions, as a share of the limit that
calibration found on held-out images. It takes one product of the tokens with the metric, outside all graphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.errors import PlanError
from edgeprune.plan import KeepPlan

_TINY, _MOST = 1e-12, 1e30
_METRIC, _BIAS = "metric", "metric_bias"
_NUMBERS = np.dtype("<f4")


@dataclass(frozen=True)
class Likeness:
    """The images of a calibration, in the learned space of r dimensions.

    `metric` [d, r] and `bias` [r] give the place of a visual token of width d. `mean` and `deviation` [r]: of the places of images.
    `limit`: the distance from which an image is unlike them.
    """

    metric: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    limit: float

    @classmethod
    def of(cls, plan: KeepPlan) -> Likeness | None:
        """Return the images that the selection of a plan was learned from; None if it learned none, or does not say.

        Raises PlanError for weights that are not readable.
        """
        weights = None if plan.input is None or plan.input.method != "learned" else plan.input.weights
        if weights is None or weights.content is None:
            return None
        try:
            entries, rest = _header(weights.content)
            seen = json.loads(entries["__metadata__"]["edgeprune"]).get("seen")
            if seen is None:  # learned by an earlier version
                return None
            metric, bias = (_tensor(entries[name], rest) for name in (_METRIC, _BIAS))
            mean, deviation = (np.array(seen[name], np.float64) for name in ("mean", "deviation"))
            found = cls(metric, bias, mean, deviation, float(seen["limit"]))
            numbers = (*found.mean, *found.deviation, found.limit)
            if metric.ndim != 2 or not metric.shape[1:] == bias.shape == mean.shape == deviation.shape:
                raise ValueError("shapes that do not belong together")
            if not np.isfinite(numbers).all() or min((*found.deviation, found.limit)) <= 0:
                raise ValueError("no distances")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            hint = "Learn it: edgeprune calibrate MODEL --data FILE --method learned --budget 0.25 -o PLAN"
            raise PlanError(f"The weights of {plan.input} are not readable: {error!r}.", hint=hint) from error
        return found

    def distance(self, embeds: np.ndarray) -> float:
        """Return the distance of an image with visual tokens [1, V, d or more], 1 at the limit."""
        place = image_place(embeds[0, :, : len(self.metric)], self.metric, self.bias)
        return min(distance(place, self.mean, self.deviation) / self.limit, _MOST)


def image_place(tokens: np.ndarray, metric: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the mean place [r] of visual tokens [V, d]. Tokens that are no finite numbers have none and count as 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        places = tokens.astype(np.float32) @ metric + bias
        places = np.where(np.abs(places) <= _MOST, places, 0.0).astype(np.float64)
    lengths = np.sqrt(np.square(places).sum(axis=1, keepdims=True))
    return np.asarray((places / np.maximum(lengths, _TINY)).mean(axis=0))


def distance(place: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> float:
    """Return how far a place [r] is from a mean [r], in deviations [r]."""
    with np.errstate(over="ignore"):
        return float(np.sqrt(np.square((place - mean) / deviation).mean()))


def _header(content: bytes) -> tuple[Mapping[str, Any], memoryview]:
    # The entries of a safetensors file, and its numbers. The library is no requirement of the runtime.
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]


def _tensor(entry: Mapping[str, Any], numbers: memoryview) -> np.ndarray:
    if entry["dtype"] != "F32":
        raise ValueError(f"numbers of type {entry['dtype']}")
    begin, end = entry["data_offsets"]
    found: np.ndarray = np.frombuffer(numbers[begin:end], _NUMBERS).reshape(entry["shape"])
    return found

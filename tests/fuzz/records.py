"""What calibration and profiling leave behind: statistics, device times, samples, and lines of tegrastats."""

from __future__ import annotations

import json
import struct
from random import Random

import numpy as np
import recordings_jetson

from edgeprune.calibration.data.formats import format_names, read_format
from edgeprune.calibration.data.samples import Sample, read_samples, score
from edgeprune.calibration.data.statistics import Statistics, StatisticsSource
from edgeprune.calibration.metrics import metric_for
from edgeprune.device.power import Tegrastats, parse_tegrastats
from edgeprune.device.profile import DeviceProfile
from edgeprune.device.roofline import Peaks
from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.plan import Cut, Geometry, Weights
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime.media.likeness import Likeness
from fuzz.conforming import check_type, is_number, is_whole
from fuzz.files import in_file, scratch
from fuzz.mutations import bytes_variant, json_variant
from fuzz.target import Target, demand

_PLAN = unpruned_plan("qwen2_vl", 2, Geometry(28, 28, 14, 1))
_HEADER = 8  # bytes, that say how long the JSON behind them is


def _load_statistics(data: bytes) -> bool:
    found = Statistics.load(in_file(data, "statistics.safetensors"))
    check_type(found.source, StatisticsSource, "the source")
    demand(is_whole(found.samples) and found.samples >= 0, "a count that is none")
    demand(all(array.dtype == np.int64 for array in found.sums.values()), "sums that are not whole numbers")
    demand((found + found).samples == 2 * found.samples, "a sum that is none")
    if found.samples:
        demand(bool(np.isfinite(found.mean("cache_kl")).all()), "a mean that is no number")
    found.attention_split()
    demand(len(found.prior()) == found.source.layers, "a layer that is lost")
    return True


def _statistics_variant(data: bytes, random: Random) -> bytes:
    # Mostly the header, which must then say its own length.
    length = int.from_bytes(data[:_HEADER], "little")
    header, rest = data[_HEADER : _HEADER + length], data[_HEADER + length :]
    way = random.randrange(6)
    if way == 0 or not header:
        return bytes_variant(data, random)
    if way == 1:
        return data[:_HEADER] + header + bytes_variant(rest, random)
    made = _inner(header, random) if way < 4 else json_variant(header, random)
    return struct.pack("<Q", len(made)) + made + rest


def _inner(header: bytes, random: Random) -> bytes:
    # Our own part, JSON inside a text of the JSON.
    try:
        outer = json.loads(header)
        own = json_variant(outer["__metadata__"]["edgeprune"].encode(), random).decode("utf-8", "replace")
        outer["__metadata__"]["edgeprune"] = own
        return json.dumps(outer).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return json_variant(header, random)


def statistics() -> Target:
    """Return the target of files of statistics."""
    seeds = []
    for geometry in (Geometry(28, 28, 14, 1), Geometry(28, 14, 14, 1)):
        empty = Statistics.empty(StatisticsSource("qwen2_vl", 1, 1, "abc", geometry, "last", "mean", False))
        some = empty.with_sample({name: np.full(array.shape, 0.5) for name, array in empty.sums.items()})
        some.save(scratch() / "seed")
        seeds.append((scratch() / "seed").read_bytes())
    return Target(_load_statistics, tuple(seeds), _statistics_variant)


def _load_likeness(data: bytes) -> bool:
    found = Likeness.of(_PLAN.with_cuts(Cut("input", "learned", 2, weights=Weights.of(data))))
    if found is not None:
        demand(bool(np.isfinite(found.distance(np.ones((1, 4, len(found.metric)), np.float32)))), "a distance that is none")
    return True


def likeness() -> Target:
    """Return the target of what a runtime reads of a learned selection's weights."""
    from safetensors.numpy import save

    tensors = {"metric": np.ones((3, 2), np.float32), "metric_bias": np.zeros(2, np.float32), "theta": np.ones(3, np.float32)}
    seen = {"mean": [0.1, 0.2], "deviation": [0.5, 0.25], "limit": 1.5}
    seeds = [save(tensors, {"edgeprune": json.dumps({"schema_version": 1, **stated})}) for stated in ({"seen": seen}, {})]
    return Target(_load_likeness, tuple(seeds), _statistics_variant)


def _load_times(data: bytes) -> bool:
    found = DeviceProfile.load(in_file(data, "times.json"))
    check_type(found, DeviceProfile, "the times")
    demand(is_number(found.ttft_ms), "a time that is no number")
    found.save(scratch() / "again.json")
    demand(DeviceProfile.load(scratch() / "again.json") == found, "times that change when they are written")
    return True


def times() -> Target:
    """Return the target of `edgeprune profile`'s files."""
    peaks = Peaks({"fp32": 1e11, "int8": 4e11}, 2e10, None)
    each = (
        DeviceProfile("a board", "measured", 144, 10.5, (1.0, 2.0, 3.0, 4.0, 5.0)),
        DeviceProfile("x", "roofline", 4, 1.0, (1.0,), peaks),
    )
    for number, one in enumerate(each):
        one.save(scratch() / f"seed-{number}.json")
    return Target(_load_times, tuple((scratch() / f"seed-{number}.json").read_bytes() for number in range(len(each))), json_variant)


def _read(data: bytes) -> bool:
    path = in_file(data, "samples.jsonl")
    for need in (True, False):
        for sample in read_samples(path, limit=9, need_answers=need):
            check_type(sample, Sample, "the sample")
            points = score(sample, "There is a red cup.")
            demand(0 <= points.correct <= min(points.stated, points.true) and 0 <= points.f1 <= 1, "points beyond the bounds")
    return True


def _lines_variant(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    lines[place] = json_variant(lines[place], random)
    return random.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)


def samples() -> Target:
    """Return the target of data sets in JSON lines."""
    (scratch() / "a.png").write_bytes(b"")
    lines = [
        {"image": "a.png", "prompt": "What is it?", "answer": "A cup.", "kind": "colour"},
        {"image": "a.png", "prompt": "Describe it.", "answer": "There is a red cup left of a blue box.", "kind": "describe"},
    ]
    text = "\n".join(map(json.dumps, lines))
    return Target(_read, (text.encode(), json.dumps(lines[0]).encode()), _lines_variant)


def _read_published(data: bytes) -> bool:
    path = in_file(data, "published.json")
    refused: list[EdgePruneError] = []
    for name in format_names():
        try:
            published = read_format(name, path, 9)
            metric, usable = metric_for(published.metric, published.samples, refused.append)
        except UsageError as error:
            refused.append(error)
            continue
        for sample in usable:
            check_type(sample, Sample, "the sample")
            points = metric.score(sample, "The answer is (A), a red cup.")
            demand(0 <= points.correct <= 10 and 0 <= metric.value(points, 1) <= 10, "points beyond the bounds")
    if len(refused) == len(format_names()):
        raise refused[0]
    return True


def published() -> Target:
    """Return the target of files of published benchmarks."""
    (scratch() / "a.jpg").write_bytes(b"")
    pope = {"image": "a.jpg", "text": "Is there a cup?", "label": "yes", "category": "random"}
    gqa = {"1": {"imageId": "a", "question": "Is it red?", "answer": "no", "types": {"structural": "verify"}}}
    textvqa = {"data": [{"image_id": "a", "question": "What does it say?", "answers": ["stop"] * 10}]}
    science = {"1": {"question": "Which?", "choices": ["a cup", "a box"], "answer": 1, "hint": "Look.", "image": "../../a.jpg"}}
    captions = [{"image_id": number, "caption": caption} for number, caption in ((1, "A cup."), (2, "A box."), (1, "One cup."))]
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}], "annotations": captions}
    (scratch() / "1").mkdir(exist_ok=True)
    return Target(_read_published, tuple(json.dumps(each).encode() for each in (pope, gqa, textvqa, science, coco)), json_variant)


def _parse_line(data: bytes) -> bool:
    found = parse_tegrastats(data.decode("utf-8", "replace"))
    check_type(found, Tegrastats, "the line")
    return bool(found.rails or found.temperatures or found.ram_total is not None)


def tegrastats() -> Target:
    """Return the target of tegrastats' lines."""
    lines = [line for name, line in vars(recordings_jetson).items() if name.startswith("TEGRASTATS")]
    return Target(_parse_line, tuple(line.encode() for line in lines), _line_variant)


def _line_variant(data: bytes, random: Random) -> bytes:
    words = bytes_variant(data, random).split(b" ")
    for _ in range(random.choice((0, 1, 3))):
        place = random.randrange(len(words))
        words[place] = random.choice(
            (words[place] * 2, random.choice(words), b"9" * 400, b"-256C", b"@-1e9C", b"RAM", b"x@" + b"9" * 400 + b"C")
        )
    return b" ".join(words)

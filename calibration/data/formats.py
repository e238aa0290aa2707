"""Files of published benchmarks, as they are: JSON, JSON lines or parquet, with images in a folder or inside the parquet files.

| format | fields that are read | described by |
|---|---|---|
| pope | text, label, image; or question, answer, image, category | RUCAIBox/POPE, output/coco; lmms-lab/POPE |
| gqa | question, answer, imageId, types.structural | cs.stanford.edu/people/dorarad/gqa/download.html; lmms-lab/GQA |
| textvqa | question, answers, image_id or image | TextVQA 0.5.1 (textvqa.org); lmms-lab/textvqa |
| mmmu | question, options, answer, question_type, image_1 to image_7 | MMMU/MMMU; MMMU-Benchmark/MMMU, mmmu/utils/data_utils.py |
| scienceqa | question, choices, answer, hint, image, split, subject | lupantech/ScienceQA, README; derek-thomas/ScienceQA |
| coco-captions | images, annotations; or image, answer | cocodataset.org, captions_*.json; lmms-lab/COCO-Caption2017 |

Questions end as LLaVA-1.5 was evaluated (Liu et al., arXiv:2310.03744, appendix): its wording is what published numbers rest on.
"""

from __future__ import annotations

import ast
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from edgeprune.calibration.data.samples import BadSampleError, OnBadSample, Sample, SampleImage, StoredImage
from edgeprune.errors import UsageError, require_extra
from edgeprune.io.files import is_file, is_folder
from edgeprune.io.typed_json import is_text

_IN_A_WORD = "\nAnswer the question using a single word or phrase."
_BY_LETTER = "\nAnswer with the option's letter from the given choices directly."
_CAPTION = "Provide a one-sentence caption for the provided image."
_QUOTES = "'\""
_LONGEST_LIST = 20_000  # characters; what is longer would take the parser long, and is cut to what is no list
_PLACE_OF_IMAGE = re.compile(r"<image (\d)>")


@dataclass(frozen=True)
class Published:
    """The samples of a published file, and the metric it is scored by. `without_image`: questions that were left out for that."""

    samples: list[Sample]
    metric: str
    without_image: int


@dataclass(frozen=True)
class _Row:
    # One record. `where`: for messages. `key`: its name in a file that is a dictionary. `stored`: the images inside the file.
    where: str
    fields: Mapping[str, Any]
    images: _Images
    key: str = ""
    stored: Mapping[str, StoredImage] = field(default_factory=dict)

    def value(self, kind: type | tuple[type, ...], *names: str) -> Any:
        """Return the first of the fields that there is. Raises BadSampleError if none is, or it is of another kind."""
        for name in names:
            if (found := self.fields.get(name)) is not None:
                if not isinstance(found, kind) or isinstance(found, bool):
                    raise BadSampleError(f"{self.where} has a {type(found).__name__} as {name!r}.", hint=_OTHER_FORMAT)
                self.check(name, found)
                return found
        known = " or ".join(repr(name) for name in names)
        raise BadSampleError(f"{self.where} has no {known}.", hint=_OTHER_FORMAT)

    def check(self, name: str, value: Any) -> None:
        """Raise BadSampleError for a text that is none: JSON can escape what no encoding can write."""
        if isinstance(value, str) and not is_text(value):
            raise BadSampleError(f"{self.where} has half of a surrogate pair in {name!r}, which is no character.", hint="Mend it.")

    def optional(self, name: str) -> str:
        """Return a text that a record may lack."""
        return "" if self.fields.get(name) is None else self.text(name)

    def text(self, *names: str) -> str:
        return str(self.value(str, *names))

    def texts(self, name: str) -> tuple[str, ...]:
        found = tuple(self.value((list, tuple), name))
        if not found or not all(isinstance(each, str) for each in found):
            raise BadSampleError(f"{self.where} has no texts in {name!r}.", hint=_NO_ANSWERS)
        for each in found:
            self.check(name, each)
        return found

    def image(self, name: str, place: Callable[[str], str] = str) -> SampleImage:
        """Return the image inside the file, or else that at the place in the folder that follows from a field."""
        return self.stored.get("image") or self.images.find(self.where, place(self.text(name)))


class _Images:
    # Where images are that the file does not hold: a folder of images, or one of parquet files with the columns id and image.
    def __init__(self, path: Path, folder: Path | None) -> None:
        if folder is not None and not is_folder(folder):
            raise UsageError(f"There is no folder {folder}.", hint="Give the folder of the images: --images FOLDER")
        home = path if is_folder(path) else path.parent
        self.folders = [home, home / "images"] if folder is None else [folder]
        self._given = folder
        self._by_id: dict[str, StoredImage] | None = None

    def find(self, where: str, name: str) -> SampleImage:
        for folder in self.folders:
            if is_file(folder / name):
                return folder / name
        stored = self._stored().get(Path(name).stem)
        if stored is None:
            hint = "Give the folder that has it: --images FOLDER"
            raise BadSampleError(f"{where} names the image {name:.200}, which is not in {self.folders[0]}.", hint=hint)
        return stored

    def _stored(self) -> Mapping[str, StoredImage]:
        if self._by_id is None:
            files = sorted(self._given.glob("**/*.parquet")) if self._given is not None else []
            rows = (row for path in files for row in _parquet_rows(path, self))
            self._by_id = {
                str(row.fields["id"]): row.stored["image"] for row in rows if "image" in row.stored and "id" in row.fields
            }
        return self._by_id


def read_format(
    name: str,
    path: Path,
    limit: int | None = None,
    *,
    images: Path | None = None,
    split: str | None = None,
    on_bad: OnBadSample | None = None,
) -> Published:
    """Return the samples of a published file, or of a folder of parquet files.

    `limit`: only the first samples. `images`: the folder of the images, by default that of the file or `images` in it. `split`:
    of several splits the one to read. Questions without an image are left out. Raises UsageError, MissingExtraError for parquet
    without pyarrow, and BadSampleError for the first record that cannot be used; with `on_bad`, such records are given to it
    and left out.
    """
    form = _FORMATS.get(name)
    if form is None:
        raise UsageError(f"There is no format {name!r}.", hint=f"Formats are: {', '.join(_FORMATS)}.")
    samples: list[Sample] = []
    without_image = 0
    for row in _rows(form, path, _Images(path, images), split):
        if len(samples) == limit:
            break
        try:
            sample = form.sample(row)
        except BadSampleError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        if sample is None:
            without_image += 1
        else:
            samples.append(sample)
    if not samples:
        raise UsageError(f"{path} has no samples of the format {name}.", hint=_OTHER_FORMAT)
    return Published(samples, form.metric, without_image)


def format_names() -> tuple[str, ...]:
    """Return the names of the formats."""
    return tuple(_FORMATS)


# Reading rows


def _rows(form: _Format, path: Path, images: _Images, split: str | None) -> Iterator[_Row]:
    if is_folder(path) or path.suffix == ".parquet":
        for file in _parquet_files(path, split):
            yield from _parquet_rows(file, images)
        return
    records = [_Row(where, fields, images, key) for where, key, fields in _records(form, path)]
    splits = sorted({str(row.fields["split"]) for row in records if row.fields.get("split")})
    chosen = _chosen_split(path, splits, split)
    yield from (row for row in records if chosen is None or row.fields.get("split") == chosen)


def _records(form: _Format, path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    # What messages call each record, its key and its fields.
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.", hint="Check the path.") from error
    lines = text.split("\n")
    try:
        try:
            found = form.records(json.loads(text))
        except json.JSONDecodeError:  # or one record a line, whatever the file is called
            found = ((f":{number}", json.loads(line)) for number, line in enumerate(lines, start=1) if line.strip())
        for key, fields in found:
            where = f"{path}{key}" if key.startswith(":") else f"{path} [{ascii(key).strip(_QUOTES):.40}]"
            if not isinstance(fields, dict):
                raise BadSampleError(f"{where} is not a JSON object.", hint=_OTHER_FORMAT)
            yield where, key, fields
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is neither JSON nor lines of JSON.", hint="Check the file.") from error


def _chosen_split(path: Path, splits: list[str], split: str | None) -> str | None:
    if split is None and len(splits) > 1:
        hint = f"Choose one: --split {'test' if 'test' in splits else splits[0]}"
        raise UsageError(f"{path} has the splits {', '.join(splits):.200}.", hint=hint)
    if split is not None and split not in splits:
        known = f"It has: {', '.join(splits):.200}." if splits else "Leave --split out."
        raise UsageError(f"{path} has no split {split!r:.60}.", hint=known)
    return split


def _parquet_files(path: Path, split: str | None) -> list[Path]:
    # Names are those of the Hugging Face Hub: SPLIT-00000-of-00003.parquet.
    if not is_folder(path):
        return [path]
    files = sorted(path.glob("**/*.parquet"))
    if not files:
        raise UsageError(f"{path} has no parquet files.", hint="Give the file itself, or the folder of the parquet files.")
    chosen = _chosen_split(path, sorted({file.name.split("-")[0] for file in files}), split)
    return [file for file in files if chosen is None or file.name.split("-")[0] == chosen]


def _parquet_rows(path: Path, images: _Images) -> Iterator[_Row]:
    require_extra("parquet", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        pictures = [column.name for column in file.schema_arrow if _is_image(column.type)]
        # Of an image the path alone: whether there is one. Its bytes are read when it is asked about.
        columns = [name if name not in pictures else f"{name}.path" for name in file.schema_arrow.names]
        rows = file.read(columns=columns).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"Cannot read {path} as parquet: {str(error).splitlines()[0]}", hint="Check the file.") from error
    stored = _ParquetImages(file)
    for number, fields in enumerate(rows):
        there = [name for name in pictures if fields[name] is not None]
        inside = {name: StoredImage(f"{path} row {number} {name}", stored.loader(name, number)) for name in there}
        yield _Row(f"{path} row {number}", fields, images, str(number), inside)


def _is_image(kind: Any) -> bool:
    # As the datasets library stores images.
    return hasattr(kind, "fields") and {each.name for each in kind.fields} == {"bytes", "path"}


class _ParquetImages:
    # The images of a parquet file. One group of rows of one column is held: samples are asked about in order.
    def __init__(self, file: Any) -> None:
        self._file = file
        self._ends = list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))
        self._held: tuple[tuple[int, str], Any] | None = None

    def loader(self, column: str, row: int) -> Callable[[], bytes]:
        return lambda: self._load(column, row)

    def _load(self, column: str, row: int) -> bytes:
        group = bisect_right(self._ends, row)
        if self._held is None or self._held[0] != (group, column):
            self._held = (group, column), self._file.read_row_group(group, columns=[column]).column(0)
        start = self._ends[group - 1] if group else 0
        data = self._held[1][row - start].as_py()["bytes"]
        if data is None:
            raise ValueError("the file has its path, not its bytes")
        return bytes(data)


# What the records mean


def _jpeg(name: str) -> str:
    return f"{name}.jpg"


def _pope(row: _Row) -> Sample:
    prompt, kind = row.text("text", "question").strip() + _IN_A_WORD, row.optional("category")
    return Sample(row.image("image"), prompt, row.text("label", "answer"), kind, where=row.where)


def _gqa(row: _Row) -> Sample:
    kind = str(_members(row.fields.get("types")).get("structural") or "")
    row.check("types", kind)
    prompt, answer = row.text("question") + _IN_A_WORD, row.text("answer")
    return Sample(row.image("imageId", _jpeg), prompt, answer, kind, where=row.where)


def _textvqa(row: _Row) -> Sample:
    first, *others = row.texts("answers")
    image = row.image("image_id", _jpeg)
    return Sample(image, row.text("question") + _IN_A_WORD, first, "", tuple(others), row.where)


def _mmmu(row: _Row) -> Sample:
    question, answer = row.text("question"), row.text("answer")
    options = _literal(row, row.value((str, list), "options"))
    if answer == "?":
        raise BadSampleError(f"{row.where} has no answer: those of the test split are not published.", hint=_NO_ANSWERS)
    is_choice = row.text("question_type") == "multiple-choice"
    prompt = _with_options(question, options) + f"\n{_BY_LETTER}" if is_choice else f"{question}\n{_IN_A_WORD}"
    numbers = sorted(set(_PLACE_OF_IMAGE.findall(prompt)))
    if not numbers:
        raise BadSampleError(f"{row.where} shows no image.", hint=_OTHER_FORMAT)
    missing = [f"image_{number}" for number in numbers if f"image_{number}" not in row.stored]
    if missing:
        raise BadSampleError(f"{row.where} has no {missing[0]!r}.", hint=_OTHER_FORMAT)
    shown = tuple(row.stored[f"image_{number}"] for number in numbers)
    answers = _literal(row, answer) if answer.startswith("[") else (answer,)
    kind = "multiple choice" if is_choice else "open"
    image = shown if len(shown) > 1 else shown[0]
    return Sample(image, prompt, answers[0], kind, answers[1:], row.where, options if is_choice else ())


def _literal(row: _Row, value: Any) -> tuple[str, ...]:
    # MMMU's lists are written as Python writes them.
    try:
        found = ast.literal_eval(value[:_LONGEST_LIST]) if isinstance(value, str) else value
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, list):
        raise BadSampleError(f"{row.where} has no list in {value!r:.60}.", hint=_OTHER_FORMAT)
    return tuple(str(each) for each in found)


def _scienceqa(row: _Row) -> Sample | None:
    options, answer, split = row.texts("choices"), row.value(int, "answer"), row.optional("split")
    if not 0 <= answer < len(options):
        raise BadSampleError(f"{row.where} has the answer {answer} of {len(options)} choices.", hint=_OTHER_FORMAT)
    hint, question = row.optional("hint"), row.text("question")
    if row.fields.get("image") is None:
        return None
    prompt = _with_options(f"Context: {hint}\n{question}" if hint else question, options) + _BY_LETTER
    image = row.image("image", lambda name: f"{split}/{row.key}/{name}")
    return Sample(image, prompt, chr(ord("A") + answer), row.optional("subject"), (), row.where, options)


def _with_options(question: str, options: Iterable[str]) -> str:
    return "\n".join([question, *(f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(options))])


def _coco(row: _Row) -> Sample:
    first, *others = row.texts("answer")
    return Sample(row.image("file_name"), _CAPTION, first, "", tuple(others), row.where)


def _coco_records(data: Any) -> Iterable[tuple[str, Any]]:
    # The captions of each image together. An image of no caption has no answer.
    captions: dict[str, list[Any]] = {}
    for _, each in _listed(_members(data).get("annotations", [])):
        captions.setdefault(str(_members(each).get("image_id")), []).append(_members(each).get("caption"))
    images = [_members(each) for _, each in _listed(_members(data).get("images", []))]
    return [(str(each.get("file_name")), {**each, "answer": captions.get(str(each.get("id")))}) for each in images]


def _by_key(data: Any) -> Iterable[tuple[str, Any]]:
    return _members(data).items() if isinstance(data, dict) else _listed(data)


def _listed(data: Any) -> Iterable[tuple[str, Any]]:
    return [(str(number), each) for number, each in enumerate(data if isinstance(data, list) else [data])]


def _members(data: Any) -> dict[str, Any]:
    return data if isinstance(data, dict) else {}


@dataclass(frozen=True)
class _Format:
    # `records`: keys and records of a whole JSON file. `sample`: what a record means, None for a question without an image.
    metric: str
    sample: Callable[[_Row], Sample | None]
    records: Callable[[Any], Iterable[tuple[str, Any]]] = _listed


_FORMATS = {
    "pope": _Format("yes-no", _pope),
    "gqa": _Format("exact", _gqa, _by_key),
    "textvqa": _Format("vqa", _textvqa, lambda data: _listed(_members(data).get("data", data))),
    "mmmu": _Format("choice", _mmmu),
    "scienceqa": _Format("choice", _scienceqa, _by_key),
    "coco-captions": _Format("cider", _coco, _coco_records),
}
_OTHER_FORMAT = f"Give the --format of the file: {', '.join(_FORMATS)}."
_NO_ANSWERS = "Take a split whose answers are published, such as validation."

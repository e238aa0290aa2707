"""Go through a checklist at several stations and write one JSON report; the exit status is 1 where a check fails.

python examples/inspection/inspection.py table.bundle checklist.json -o report.json left=left.png right=right.png
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgeprune.runtime as ep
from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.io.files import write_text


@dataclass(frozen=True)
class Check:
    """One question: `answers` are the keywords that bound what can be said; `accept` the values that pass, None for any."""

    name: str
    ask: str
    answers: dict[str, Any]
    accept: list[Any] | None

    @classmethod
    def read(cls, data: dict[str, Any]) -> Check:
        """Return the check in JSON data; raise UsageError unless it has a name, a question and either kind of bounds."""
        answers: dict[str, Any] = {key: data[key] for key in ("choices", "json_schema") if key in data}
        if not ("name" in data and "ask" in data and len(answers) == 1):
            raise UsageError(f"{json.dumps(data)} is no check.", hint="Give name, ask, and choices or json_schema.")
        return cls(data["name"], data["ask"], answers, data.get("accept"))

    def value(self, text: str) -> Any:
        """Return what was answered: a choice, or the JSON that a schema was given for."""
        return json.loads(text) if "json_schema" in self.answers else text


def inspect(model: ep.Runtime, image: Path, checks: list[Check], *, chat: bool) -> list[dict[str, Any]]:
    """Ask all checks about one image and return an entry of the report for each.

    The questions share what the vision encoder saw. In a `chat` they share the whole conversation too.
    """
    conversation = model.chat() if chat else None
    return [judge(check, _asked(model, conversation, image, check, first=number == 0)) for number, check in enumerate(checks)]


def _asked(model: ep.Runtime, chat: ep.Chat | None, image: Path, check: Check, *, first: bool) -> ep.Stream:
    if chat is None:
        return model.stream(image, check.ask, **check.answers)
    return chat.ask(check.ask, image if first else None, **check.answers)


def judge(check: Check, stream: ep.Stream) -> dict[str, Any]:
    """Read the answer to its end and return its entry: only a complete answer can pass."""
    text, receipt = "".join(stream), stream.receipt
    complete = receipt.finish_reason == "end"
    value = check.value(text) if complete else None
    return {
        "check": check.name,
        "answer": value,
        "passed": complete and (check.accept is None or value in check.accept),
        "ended_by": receipt.finish_reason,
        "ttft_ms": round(receipt.times.ttft_ms, 1),
        "reused": list(receipt.reused),
    }


def main() -> None:
    """Parse the command line, inspect every station, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checklist", type=Path)
    parser.add_argument("stations", nargs="+", metavar="NAME=IMAGE")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the report")
    parser.add_argument("--chat", action="store_true", help="ask each station's questions in one conversation")
    options = parser.parse_args()
    try:
        checks = [Check.read(data) for data in json.loads(options.checklist.read_text(encoding="utf-8"))]
        stations = dict(station.partition("=")[::2] for station in options.stations)
        model = ep.load(options.bundle)
        report = {name: inspect(model, Path(image), checks, chat=options.chat) for name, image in stations.items()}
        write_text(options.output, json.dumps(report, indent=2) + "\n")
    except EdgePruneError as error:
        raise SystemExit(f"Error: {error}") from error
    failed = [(name, entry) for name, entries in report.items() for entry in entries if not entry["passed"]]
    for name, entry in failed:
        print(f"{name}: {entry['check']} failed, answer {entry['answer']!r}")
    print(f"{len(stations)} stations, {len(stations) * len(checks)} checks, {len(failed)} failed: {options.output}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

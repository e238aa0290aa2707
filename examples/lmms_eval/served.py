"""Run lmms-eval's own client of OpenAI's API against `edgeprune serve`, and take no failed request for a wrong answer.

    edgeprune serve table.bundle --fit pad
    python examples/lmms_eval/served.py --tasks tabletop --output_path out --include_path examples/lmms_eval/tasks

Options besides --url are lmms-eval's. Alone it would score every question that the server did not answer as wrong, and exit with 0.
Writes, beside lmms-eval's result, what the server says of its model: the plan is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # what stands in the place of an answer
CONCURRENT = 4  # as many as `edgeprune serve` takes of one client, unless it is told otherwise (--per-client)
PATIENCE = 600  # seconds for a model to load


def main() -> None:
    """Ask the server for its model, run lmms-eval, look at what it wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="Where `edgeprune serve` listens.  [default: %(default)s]")
    parser.add_argument("--output_path", type=Path, required=True, help="The folder of the results.")
    asked, options = parser.parse_known_args()
    url = asked.url.rstrip("/").removesuffix("/v1")
    key = os.environ.setdefault("OPENAI_API_KEY", "none")
    card = model_of(url, key)
    about = card["edgeprune"]["cuts"], card["edgeprune"]["geometry"]["visual_tokens"]
    print(f"{card['id']} at {url}: {plan_text(*about)}", flush=True)
    before = set(asked.output_path.glob("*/*_results.json"))
    arguments = f"model={card['id']},base_url={url}/v1,num_concurrent={CONCURRENT}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "openai", "--model_args", arguments, "--log_samples"]
    subprocess.run([*command, "--output_path", str(asked.output_path), *options], check=False)  # it exits with 0 in any case
    written = sorted(set(asked.output_path.glob("*/*_results.json")) - before)
    if not written:
        sys.exit("lmms-eval wrote no result; what it printed says why.")
    result = written[-1]
    check_answers(result)
    result.with_name(result.name.replace("_results.json", "_server.json")).write_text(json.dumps(card, indent=2) + "\n")


def model_of(url: str, key: str) -> dict[str, Any]:
    """Return the server's entry in /v1/models once it is ready; exit with one line if there is no server, or it does not answer."""
    until = time.monotonic() + PATIENCE
    while (phase := _get(url, "/health", key).get("phase")) in ("loading", "warming") and time.monotonic() < until:
        time.sleep(1)
    if phase not in ("ready", "busy"):
        sys.exit(f"The server at {url} is not ready: {phase or 'it is not of EdgePrune'}.")
    card: dict[str, Any] = _get(url, "/v1/models", key)["data"][0]
    return card


def _get(url: str, path: str, key: str) -> dict[str, Any]:
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            body: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 503:  # it says its phase
            return dict(json.load(error))
        hint = " Set OPENAI_API_KEY to a key that it accepts." if error.code in (401, 403) else ""
        sys.exit(f"The server at {url} answers {path} with status {error.code}.{hint}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        sys.exit(f"No server of EdgePrune answers at {url}: {reason}. Start one with: edgeprune serve BUNDLE --fit pad")
    return body


def plan_text(cuts: list[dict[str, Any]], tokens: int) -> str:
    """Return the cuts and their budgets in one line."""
    return "; ".join(f"{cut['cut']} keep {cut['keep']}/{tokens}" for cut in cuts) or "no pruning"


def check_answers(result: Path) -> None:
    """Exit with one line if a question of this result was not answered; the result is renamed, so that nobody takes it for one."""
    stem = result.name.removesuffix("_results.json")
    lines = [line for path in result.parent.glob(f"{stem}_samples_*.jsonl") for line in path.read_text("utf-8").splitlines()]
    failed = [line for line in lines if FAILED in line]
    if failed:
        kept = result.rename(result.with_name(f"{stem}_failed.json"))
        reason = failed[0].partition(FAILED)[2].partition("]")[2].strip()[:200]
        sys.exit(f"{len(failed)} of {len(lines)} questions were not answered ({kept}): {reason}")


if __name__ == "__main__":
    main()

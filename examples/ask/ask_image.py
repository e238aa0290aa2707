"""Ask a bundle about one image: pieces as they come, then what the receipt says. Asked twice, to show what is not computed again.

python examples/ask/ask_image.py table.bundle table.png "What colour is the cube?"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import edgeprune.runtime as ep
from edgeprune.errors import EdgePruneError


def ask(model: ep.Runtime, image: Path, prompt: str, options: dict[str, Any]) -> None:
    """Print the answer while it is generated, and then its receipt."""
    stream = model.stream(image, prompt, **options)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    tell(stream.receipt)


def tell(receipt: ep.Receipt) -> None:
    """Print what happened: why the answer ended, what was pruned, what was reused, how long each part took."""
    times = receipt.times
    parts = {"preprocess": times.preprocess_ms, "vision": times.vision_ms, "select": times.select_ms, "prefill": times.prefill_ms}
    print(f"  ended by  {receipt.finish_reason} after {receipt.generated_tokens} tokens")
    if receipt.tier is not None:
        print(f"  tier      {receipt.tier} ({receipt.tier_reason})")
    for cut in receipt.cuts:
        print(f"  cut       {cut.cut}: {cut.before} -> {cut.after} visual tokens")
    if not receipt.pruned:
        print(f"  no cut    {receipt.reason}")
    print(f"  reused    {', '.join(receipt.reused) or 'nothing'}")
    print(f"  TTFT      {times.ttft_ms:.1f} ms = {' + '.join(f'{name} {ms:.1f}' for name, ms in parts.items())}")
    print(f"  then      {times.ms_per_token:.1f} ms a token; KV caches {receipt.kv_bytes / 1024:.0f} KiB")


def main() -> None:
    """Parse the command line, load, ask twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tier", help="of a bundle with several plans the one to use")
    parser.add_argument("--deadline-ms", type=float, help="end the answer by then")
    parser.add_argument("--fit", choices=("exact", "stretch", "pad"), default="exact", help="for images of another aspect")
    options = parser.parse_args()
    asked = {"tier": options.tier, "deadline_ms": options.deadline_ms, "fit": options.fit}
    try:
        model = ep.load(options.bundle, warm_up=True)
        for _ in range(2):
            ask(model, options.image, options.prompt, asked)
    except EdgePruneError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()

"""Export the bundled model with three budgets in one bundle, as `edgeprune export --tier` does.

python examples/soak/bundle.py soak.bundle
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import unpruned_plan

# Cuts that never look at the question, so that whole prefixes are shared between requests; and cuts at every other site.
CUTS = ("input", "deep")


def plans(cuts: str, base: KeepPlan) -> Mapping[str, KeepPlan]:
    """Return plans by the names of their tiers, the best first."""
    tokens, last = base.geometry.tokens, base.layers - 1
    shares = {"quality": 0.75, "balanced": 0.5, "fast": 0.25}
    kept = {name: round(share * tokens) for name, share in shares.items()}
    if cuts == "input":
        return {name: base.with_cuts(Cut("input", "divprune", count)) for name, count in kept.items()}
    found = {}
    for name, count in kept.items():
        entered = base.with_cuts(Cut("input", "divprune", (tokens + count) // 2), Cut("layer", "fastv", count, min(2, last)))
        caches = [Cut("cache", "plphp", max(1, entered.tokens_at_layer(layer) * 3 // 4), layer) for layer in range(base.layers)]
        found[name] = entered.with_cuts(*caches)
    return found


def export(cuts: str, out: Path) -> None:
    """Write the bundle through the command."""
    model = load_model(resolve_model("tabletop"))
    base = unpruned_plan(model.folder.model_type, model.decoder_shape().layers, model.geometry(None))
    with tempfile.TemporaryDirectory() as folder:
        tiers = []
        for name, plan in plans(cuts, base).items():
            path = Path(folder) / f"{name}.json"
            plan.save(path)
            tiers += ["--tier", f"{name}={path}"]
        program = "from edgeprune.cli import main; main()"
        subprocess.run([sys.executable, "-c", program, "export", "tabletop", "-o", str(out), *tiers], check=True)


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cuts", choices=CUTS, default="input")
    options = parser.parse_args()
    export(options.cuts, options.out)


if __name__ == "__main__":
    main()

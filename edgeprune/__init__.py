"""EdgePrune: fixed visual-token budgets for vision-language models on the edge."""

from pathlib import Path

__version__ = "0.1.0"

if Path(__file__).with_name("runtime").is_file():
    raise ImportError(
        "edgeprune/runtime, edgeprune/export and edgeprune/calibration are text files here, not symbolic links. "
        "Run: git config core.symlinks true && git checkout -- edgeprune"
    )

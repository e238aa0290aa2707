"""TableTop: synthetic images of robot tables, questions about them, and a small trained model. Imports only plan and io."""

from pathlib import Path

from edgeprune.io.files import user_cache

MODEL_FOLDER = Path(__file__).parent / "model"


def large_model_folder() -> Path:
    """Return where `make instrument` puts TableTop-L."""
    return user_cache() / "tabletop-l"

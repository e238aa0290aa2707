"""TableTop: a drawn world of robot tables, questions about it, and a small trained model. Imports plan and io alone."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"

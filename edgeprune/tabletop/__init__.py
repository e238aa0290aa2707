"""TableTop: synthetic images of robot tables, questions about them, and a small trained model. Imports only plan and io."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"

"""What has to be there before anything is measured: environments, the checkpoint, and what each peer makes of it. Made once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contenders import EDGEPRUNE, Contender
from shapes.checkpoint import write_checkpoint, write_decoder_alone, write_for_transformers_4, write_images
from shapes.shape import Shape

HERE = Path(__file__).parent
EXPORT = ("-c", "from edgeprune.cli import main; main()", "export")
# Of decoder and vision tower. There is no 4-bit form of a vision tower that is usual, and the converter writes none of a decoder.
GGUF = {"fp32": ("f32", "f32"), "int8": ("q8_0", "q8_0"), "int4": ("bf16", "q8_0")}


class PreparationError(Exception):
    """Something could not be made; the message says why, in the words of what failed."""


@dataclass(frozen=True)
class Workplace:
    """Where everything lies: environments in `out`, and what belongs to one shape in a folder of its own."""

    out: Path
    shape_name: str
    shape: Shape

    @property
    def folder(self) -> Path:
        """The folder of the shape."""
        return self.out / self.shape_name

    def python(self, environment: str) -> Path:
        """Return the interpreter of an environment; EdgePrune's is the one that runs this."""
        return Path(sys.executable) if environment == EDGEPRUNE else self.out / "environments" / environment / "bin" / "python"

    def run(self, log: str, python: Path, *arguments: object) -> None:
        """Run Python, what it prints going to a log; raise PreparationError with its last words."""
        path = self.out / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"  {log}", flush=True)
        with path.open("a", encoding="utf-8") as file:
            command = [str(python), *(str(argument) for argument in arguments)]
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            raise PreparationError(
                f"{log}: {last_words(path.read_text(encoding='utf-8', errors='replace')) or f'ended with {code}'}"
            )


def last_words(text: str) -> str:
    """Return the last line that says something; of a traceback it is the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def prepare(place: Workplace, contender: Contender) -> Path:
    """Return the folder that a contender reads, made if need be. Raises PreparationError."""
    if contender.peer != EDGEPRUNE:
        _environment(place, contender.environment)
    checkpoint = _made(place.folder / "checkpoint", lambda folder: write_checkpoint(place.shape, folder))
    makers: dict[str, Callable[[Path], None]] = {
        "edgeprune": lambda folder: _bundle(place, contender, checkpoint, folder),
        "openvino": lambda folder: _openvino(place, contender, checkpoint, folder),
        "optimum-intel": lambda folder: _openvino(place, contender, checkpoint, folder),
        "llama-cpp": lambda folder: _gguf(place, contender, checkpoint, folder),
        "transformers-onnx": lambda folder: _transformers_onnx(place, contender, checkpoint, folder),
        "onnxruntime-genai": lambda folder: _onnxruntime_genai(place, contender, checkpoint, folder),
    }
    if contender.peer not in makers:
        return checkpoint
    return _made(place.folder / contender.artefact, makers[contender.peer])


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    # Under another name until it is whole: a run that was interrupted starts it again.
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        make(part)
        part.rename(folder)
    return folder


def _environment(place: Workplace, name: str) -> None:
    # A virtual environment cannot be renamed: a file says that it is whole.
    folder, whole = place.out / "environments" / name, place.out / "environments" / f"{name}.whole"
    if whole.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    requirements = HERE / "requirements" / f"{name}.txt"
    place.run(f"environment-{name}", Path(sys.executable), "-m", "venv", folder)
    place.run(f"environment-{name}", place.python(name), "-m", "pip", "install", "-r", requirements)
    if name == "llama-cpp":
        _llama_cpp_source(place, folder)
    whole.write_text(requirements.read_text(encoding="utf-8"), encoding="utf-8")


def _llama_cpp_source(place: Workplace, environment: Path) -> None:
    # The package is built without llama.cpp's converter, which its source archive has.
    pinned = next(
        line for line in (HERE / "requirements" / "llama-cpp.txt").read_text().splitlines() if line.startswith("llama-cpp")
    )
    options = ("--no-deps", "--no-binary", "llama-cpp-python", "-d", environment)
    place.run("environment-llama-cpp", place.python("llama-cpp"), "-m", "pip", "download", *options, pinned)
    archive = next(environment.glob("llama_cpp_python-*.tar.gz"))
    shutil.unpack_archive(archive, environment / "unpacked", filter="data")
    next((environment / "unpacked").iterdir()).rename(environment / "source")


def _bundle(place: Workplace, contender: Contender, checkpoint: Path, folder: Path) -> None:
    size = f"{place.shape.side}x{place.shape.side}"
    place.run(
        contender.artefact, place.python(EDGEPRUNE), *EXPORT, checkpoint, "-o", folder, "--image-size", size, *contender.making
    )


def _openvino(place: Workplace, contender: Contender, checkpoint: Path, folder: Path) -> None:
    older = _made(place.folder / "checkpoint-transformers-4", lambda at: write_for_transformers_4(place.shape, checkpoint, at))
    python = place.python("openvino")
    tool = python.with_name("optimum-cli")
    options = ("--task", "image-text-to-text", "--weight-format", contender.precision)
    place.run(contender.artefact, python, tool, "export", "openvino", "--model", older, *options, folder)


def _gguf(place: Workplace, contender: Contender, checkpoint: Path, folder: Path) -> None:
    python, source = place.python("llama-cpp"), place.out / "environments" / "llama-cpp" / "source" / "vendor" / "llama.cpp"
    folder.mkdir()
    place.run(contender.artefact, python, HERE / "to_gguf.py", source, checkpoint, folder, *GGUF[contender.precision])
    if contender.precision == "int4":
        place.run(contender.artefact, python, HERE / "quantize_gguf.py", folder)


def _transformers_onnx(place: Workplace, contender: Contender, checkpoint: Path, folder: Path) -> None:
    image = write_images(place.shape, place.folder / "images", 1)[0]
    python = place.python(contender.environment)
    place.run(contender.artefact, python, HERE / "to_onnx.py", checkpoint, image, folder, contender.precision)


def _onnxruntime_genai(place: Workplace, contender: Contender, checkpoint: Path, folder: Path) -> None:
    alone = _made(place.folder / "checkpoint-decoder-alone", lambda at: write_decoder_alone(place.shape, checkpoint, at))
    options = ("-i", alone, "-o", folder, "-p", contender.precision, "-e", "cpu", "-c", place.folder / "cache")
    local = ("--extra_options", "hf_token=false")  # or it asks for a login, though the folder is here
    place.run(contender.artefact, place.python("onnxruntime-genai"), "-m", "onnxruntime_genai.models.builder", *options, *local)

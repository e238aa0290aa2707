"""Try the GPU as engines use it: the CUDA runtime's first call and TensorRT's runtime.

The trial runs in a process of its own with a time limit, because a driver that does not fit may crash or hang the caller.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.device.cudart import Cudart, load_cudart
from edgeprune.errors import EdgePruneError, one_line

LIMIT = 60.0  # seconds; the first import of TensorRT from an SD card takes several
_COMMAND = (sys.executable, "-m", "edgeprune.device.gpu")


@dataclass(frozen=True)
class GpuTrial:
    """What was tried. `cuda`: versions of runtime and driver in words. `error` and `remedy` are empty when everything worked."""

    cuda: str = ""
    error: str = ""
    remedy: str = ""


def try_gpu(command: Sequence[str] = _COMMAND, limit: float = LIMIT) -> GpuTrial:
    """Run a trial and return its result. Never raises for what the GPU does; takes no longer than `limit` seconds.

    `command`: prints lines of `report`.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    ended = ""
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired as error:
        output, ended = error.output or b"", f"did not return within {limit:g} s"
        _abandon(process)
    status = process.returncode
    if not ended and status:
        ended = f"crashed ({_signal_name(-status)})" if status < 0 else f"ended with status {status}"
    return _result(output.decode("utf-8", "replace"), ended)


def _abandon(process: subprocess.Popen[bytes]) -> None:
    # A process that hangs inside the driver survives its kill, so its end is not waited for.
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    if process.stdout is not None:
        process.stdout.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _result(output: str, ended: str) -> GpuTrial:
    # Each line of ours is a JSON object that adds to the one before; libraries may print lines of their own.
    said: dict[str, Any] = {}
    for line in output.splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue
        said |= read if isinstance(read, dict) else {}
    error = said.get("error", "")
    if ended and not error:
        error = f"{said.get('trying', 'The trial')} {ended}"
    return GpuTrial(said.get("cuda", ""), error, said.get("remedy", "") or ("sudo dmesg | tail -n 20" if ended and error else ""))


def _main(load: Callable[[], Cudart] = load_cudart) -> None:
    report(trying="Loading the CUDA runtime")
    try:
        runtime = load()
        report(trying="cudaFree(0)", cuda=str(runtime))
        runtime.call("cudaFree", None)  # creates CUDA's context
        report(trying="Creating TensorRT's logger and runtime")
        trt = importlib.import_module("tensorrt")
        trt.Runtime(trt.Logger(trt.Logger.ERROR))
    except EdgePruneError as error:
        report(error=error.message, remedy=error.hint)
    except Exception as error:  # TensorRT raises errors of many types
        report(error=one_line(f"TensorRT cannot be used: {type(error).__name__}: {error}"))


def report(**words: str) -> None:
    """Print what a trial is about to try, what it found or its error and remedy, as a line for `try_gpu`."""
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    _main()

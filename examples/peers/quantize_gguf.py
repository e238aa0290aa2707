"""Quantize what `to_gguf.py` wrote as llama.cpp's users do for 4 bits: the decoder to Q4_K_M; `quantize_gguf.py FOLDER`."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Replace the decoder."""
    folder = Path(sys.argv[1])
    lib = import_module("llama_cpp")
    settings = lib.llama_model_quantize_default_params()
    settings.ftype = lib.LLAMA_FTYPE_MOSTLY_Q4_K_M
    whole, small = folder / "decoder.gguf", folder / "decoder.part"
    if lib.llama_model_quantize(bytes(whole), bytes(small), ctypes.byref(settings)):
        raise SystemExit("llama.cpp could not quantize the decoder.")
    os.replace(small, whole)


if __name__ == "__main__":
    main()

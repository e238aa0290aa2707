"""Convert a checkpoint folder with llama.cpp's own converter: `to_gguf.py LLAMA_CPP FOLDER OUT DECODER VISION`, the two precisions.

The converter knows tokenizers by the hash of what they make of a sample text, and refuses all others. It is told that the bundled
one is Qwen2's: another pattern, which splits the question here into the same pieces.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Write the decoder and the vision tower, two files."""
    source, folder, out, *precisions = sys.argv[1:]
    sys.path[:0] = [source, str(Path(source, "gguf-py"))]
    text_model = import_module("conversion.base").TextModel
    text_model.get_vocab_base_pre = lambda *_: "qwen2"
    converter = import_module("convert_hf_to_gguf")
    for (name, more), precision in zip({"decoder": [], "vision": ["--mmproj"]}.items(), precisions, strict=True):
        sys.argv[1:] = [folder, "--outtype", precision, "--outfile", str(Path(out, f"{name}.gguf")), *more]
        converter.main()


if __name__ == "__main__":
    main()

"""Ask llama.cpp's mtmd through llama-cpp-python's bindings: `decoder.gguf` and `vision.gguf` in one folder. It does not prune.

Option: `flash_attention`, "no" where the decoder is to have none; llama.cpp's own choice is the default.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from pathlib import Path
from typing import Any

from question import Ask, Clock, Cost, Question, answer, asked

CONTEXT = 4096
IMAGE = 1  # MTMD_INPUT_CHUNK_TYPE_IMAGE


def load(question: Question) -> Ask:
    """Return what answers about an image."""
    lib, mtmd, pillow = map(import_module, ("llama_cpp", "llama_cpp.mtmd_cpp", "PIL.Image"))
    model, context = _decoder(lib, question)
    seeing = mtmd.mtmd_context_params_default()
    seeing.use_gpu, seeing.print_timings, seeing.n_threads = False, False, question.threads
    vision = mtmd.mtmd_init_from_file(bytes(question.folder / "vision.gguf"), model, seeing)
    if not vision:
        raise SystemExit("llama.cpp cannot read vision.gguf.")
    greedy = lib.llama_sampler_init_greedy()
    written = f"<|im_start|>user{mtmd.mtmd_default_marker().decode()}{question.prompt}<|im_end|><|im_start|>assistant".encode()

    def ask(image: Path) -> Cost:
        picture = pillow.open(image).convert("RGB")
        pixels = (ctypes.c_uint8 * (picture.width * picture.height * 3)).from_buffer_copy(picture.tobytes())
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        clock = Clock()
        bitmap = mtmd.mtmd_bitmap_init(picture.width, picture.height, pixels)
        chunks, text = mtmd.mtmd_input_chunks_init(), mtmd.mtmd_input_text(written, len(written), True, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        _check(mtmd.mtmd_tokenize(vision, chunks, ctypes.byref(text), bitmaps, 1))
        parts = [mtmd.mtmd_input_chunks_get(chunks, index) for index in range(mtmd.mtmd_input_chunks_size(chunks))]
        seen = _see(mtmd, vision, parts, lib.llama_model_n_embd_inp(model))
        looked, past = clock.now(), _prefill(mtmd, vision, context, parts, seen)
        token = lib.llama_sampler_sample(greedy, context, -1)
        clock.token()
        batch = lib.llama_batch_init(1, 0, 1)
        for _ in range(question.tokens - 1):
            batch.n_tokens, batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = (
                1,
                token,
                past,
                1,
                0,
                1,
            )
            _check(lib.llama_decode(context, batch))
            token, past = lib.llama_sampler_sample(greedy, context, -1), past + 1
            clock.token()
        lib.llama_batch_free(batch)
        entered = mtmd.mtmd_helper_get_n_tokens(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        mtmd.mtmd_input_chunks_free(chunks)
        return clock.cost(looked, entered)

    return ask


def _decoder(lib: Any, question: Question) -> tuple[Any, Any]:
    # The model, and a context of it.
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(bytes(question.folder / "decoder.gguf"), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch = CONTEXT, CONTEXT
    settings.n_threads = settings.n_threads_batch = question.threads
    if question.options.get("flash_attention") == "no":
        settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return model, lib.llama_init_from_model(model, settings)


def _see(mtmd: Any, vision: Any, parts: list[Any], width: int) -> dict[int, Any]:
    # Ahead of the text, so that its time stands alone. mtmd keeps the embeddings of one part until the next.
    seen = {}
    for index, part in enumerate(parts):
        if mtmd.mtmd_input_chunk_get_type(part) == IMAGE:
            _check(mtmd.mtmd_encode_chunk(vision, part))
            seen[index] = (ctypes.c_float * (mtmd.mtmd_input_chunk_get_n_tokens(part) * width))()
            ctypes.memmove(seen[index], mtmd.mtmd_get_output_embd(vision), ctypes.sizeof(seen[index]))
    return seen


def _prefill(mtmd: Any, vision: Any, context: Any, parts: list[Any], seen: dict[int, Any]) -> int:
    past = ctypes.c_int32(0)
    for index, part in enumerate(parts):
        if index in seen:
            embeddings, after = seen[index], ctypes.byref(past)
            none = mtmd.mtmd_helper_post_decode_callback()
            _check(
                mtmd.mtmd_helper_decode_image_chunk(vision, context, part, embeddings, past.value, 0, CONTEXT, after, none, None)
            )
        else:
            _check(mtmd.mtmd_helper_eval_chunk_single(vision, context, part, past.value, 0, CONTEXT, True, ctypes.byref(past)))
    return past.value


def _check(code: int) -> None:
    if code:
        raise SystemExit(f"llama.cpp answered {code}.")


if __name__ == "__main__":
    answer(asked(), load, "llama-cpp-python")

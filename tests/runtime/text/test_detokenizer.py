"""Streamed pieces are, joined, what the tokenizer decodes from all ids: for every kind of decoder, and ids that no text has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgeprune.runtime.text.tokenizer import IncrementalDetokenizer, TextTokenizer

REPLACEMENT = "\ufffd"
TEXTS = (
    "यह एक परीक्षण वाक्य है जो हिन्दी में लिखा गया है और बहुत लंबा है।",
    "นี่คือประโยคทดสอบภาษาไทยที่ยาวพอสมควรสำหรับการทดสอบการถอดรหัส",
    "이것은 한국어로 쓰인 긴 시험 문장이며 토큰이 많이 필요합니다.",
    "桌子上有一个红色的立方体,旁边是一个蓝色的球,还有一只杯子。",
    "👩‍🚀 and 🤖 see a naïve café, then \ufffd twice: \ufffd\ufffd.",
    " leading and  double spaces \n and lines\n\n",
)
WORDS = ["", "▁", "▁▁", " ", "a", "b", "▁the", "s", "é", "ह", REPLACEMENT, "▁" + REPLACEMENT, "<0x>", "</s>x"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def with_vocabulary(words: Sequence[str], decoder: Any) -> TextTokenizer:
    """Return a tokenizer of these words, a special token that is left out of texts, and ids beyond that mean nothing."""
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.decoder = decoder
    return TextTokenizer(tokenizer)


def byte_level() -> TextTokenizer:
    """Return a byte-level tokenizer: every byte, and tokens that begin or end inside a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    of = {byte: letters_of([byte]) for byte in range(256)}
    joined = ["".join(of[byte] for byte in piece.encode()) for piece in ("the", " a", "ह", "机", "🤖", REPLACEMENT)]
    split = [
        "".join(of[byte] for byte in raw) for raw in (b"a\xe0\xa4", b"\xb9 b", b"\xa4", b"\xf0\x9f", b"\x9f\xa4\x96x", b"\x80\xc3")
    ]
    return with_vocabulary([*letters, *joined, *split], decoders.ByteLevel())


def letters_of(raw: Sequence[int]) -> str:
    """Return the letters that a byte-level vocabulary writes for bytes (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return "".join(chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in raw)


def byte_fallback(*, strip: bool) -> TextTokenizer:
    """Return a tokenizer as of Llama 2 and Mistral, or, without `strip`, of Gemma."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return with_vocabulary([*BYTES, *WORDS], decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if strip else [])]))


KINDS: dict[str, Callable[[], TextTokenizer]] = {
    "byte level": byte_level,
    "byte fallback, stripped": lambda: byte_fallback(strip=True),
    "byte fallback": lambda: byte_fallback(strip=False),
    "metaspace": lambda: with_vocabulary(WORDS, decoders.Metaspace()),
    "metaspace, never prepended": lambda: with_vocabulary(WORDS, decoders.Metaspace(prepend_scheme="never")),
    "stripped": lambda: with_vocabulary(
        WORDS, decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ),
    "word pieces": lambda: with_vocabulary(["a", "b", "##s", "##" + REPLACEMENT, ".", "'", "s"], decoders.WordPiece()),
    "suffixes": lambda: with_vocabulary(["a", "b</w>", "s</w>", REPLACEMENT], decoders.BPEDecoder()),
    "no decoder": lambda: with_vocabulary(WORDS, None),
}
CODECS = {kind: make() for kind, make in KINDS.items()}


def streamed(codec: TextTokenizer, ids: Sequence[int]) -> tuple[str, list[str]]:
    stream = IncrementalDetokenizer(codec)
    pieces = [stream.push(token) for token in ids]
    return "".join(pieces) + stream.flush(), pieces


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_ids(kind: str, data: st.DataObject) -> None:
    codec = CODECS[kind]
    size = codec._tokenizer.get_vocab_size()
    favourites = st.sampled_from([token for token in range(size) if token not in codec.byte_tokens])
    ids = data.draw(st.lists(st.one_of(st.integers(0, size + 2), favourites), max_size=60))
    text, _ = streamed(codec, ids)
    assert text == codec.decode(ids)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_short_sequence(kind: str) -> None:
    codec = CODECS[kind]
    size = codec._tokenizer.get_vocab_size()
    chosen = [*range(size)] if size < 20 else [*range(size - 15, size), *sorted(codec.byte_tokens)[0x7F:0x82], 0xE0, 0xA4]
    for ids in itertools.product(chosen, repeat=3):
        assert streamed(codec, ids)[0] == codec.decode(ids), ids


@pytest.mark.parametrize("kind", ["byte level", "byte fallback, stripped", "byte fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_out_whole_and_early(kind: str, text: str) -> None:
    codec = CODECS[kind]
    written = letters_of(text.encode()) if kind == "byte level" else text.replace(" ", "▁")
    ids = codec.encode(written)
    assert len(ids) > 17
    result, pieces = streamed(codec, ids)
    assert result == codec.decode(ids)
    assert result.count(REPLACEMENT) == text.count(REPLACEMENT)
    assert sum(map(bool, pieces)) > 3 or " " not in text  # a run of byte tokens is one piece


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "metaspace"])
@pytest.mark.parametrize("content", ["a", REPLACEMENT, "<0xE0>"])
def test_a_push_costs_the_same_late_in_an_answer(kind: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, decoded = KINDS[kind](), list[int]()
    token = codec._tokenizer.token_to_id(letters_of(content.encode()) if kind == "byte level" and len(content) == 1 else content)
    token = 0x80 if token is None else token  # for byte level: a byte that is never part of a character
    original = codec.decode

    def counted(ids: Sequence[int], *, skip_special: bool = True) -> str:
        decoded.append(len(ids))
        return original(ids, skip_special=skip_special)

    assert codec.anchor is not None  # found before the counting
    assert len(codec.byte_tokens) == 256 * (kind == "byte fallback")
    monkeypatch.setattr(codec, "decode", counted)
    streamed(codec, [token] * 1000)
    assert sum(decoded) < 12_000

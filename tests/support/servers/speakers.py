"""Models that say nothing but noise, with tokenizers of several kinds: what structured answers are tried on."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgeprune.runtime.generation.sampling import Sampler, Sampling
from edgeprune.runtime.text.grammar import GrammarCompiler
from edgeprune.runtime.text.tokenizer import TextTokenizer
from edgeprune.tabletop import MODEL_FOLDER

END, OTHER_END = 2, 0  # of the bundled tokenizer


class Speaker:
    """A model that says nothing but noise, and its tokenizer."""

    def __init__(self, tokenizer: Tokenizer, ends: tuple[int, ...]) -> None:
        self.codec, self.ends = TextTokenizer(tokenizer), ends
        self.compiler = GrammarCompiler(tokenizer.to_str, ends)
        self.size = tokenizer.get_vocab_size()
        self._closing = [token for text in ('"', "}", "]") for token in self.codec.encode(text)]

    def answer(self, seed: int = 0, most: int = 2000, **asked: Any) -> tuple[str, bool]:
        """Return the text to random logits and whether it ended by itself. Marks that close something are likelier than others."""
        sampling = Sampling(**{"temperature": 1.0, "seed": seed, **asked})
        sampler, draw = (
            Sampler(sampling, self.compiler.constraint(sampling.choices, sampling.json_schema)),
            np.random.default_rng([seed, 1]),  # not the numbers that the sampler draws
        )
        said = list[int]()
        for _ in range(most):
            logits = draw.standard_normal(self.size + 9).astype(np.float32)  # a model may have more ids than its tokenizer
            logits[self._closing] += 4
            token = sampler.sample(logits)
            if token in self.ends:
                return self.codec.decode(said), True
            said.append(token)
            if sampler.done:
                return self.codec.decode(said), True
        return self.codec.decode(said), False


def bundled() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))


def larger() -> Tokenizer:
    """Return a byte-level tokenizer that was trained on the text files of the bundled model, as the models of its families have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=["<|im_end|>"], initial_alphabet=alphabet, show_progress=False)
    texts = [path.read_text(encoding="utf-8") for path in sorted(MODEL_FOLDER.iterdir()) if path.suffix != ".safetensors"]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def llama_like(*words: str) -> Tokenizer:
    """Return a tokenizer whose words begin with a space mark, whose first space nobody sees, and with tokens for bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{number:02X}>" for number in range(256)), "▁", *map(chr, range(33, 127))]
    merges = list[tuple[str, str]]()
    for word in words:
        for at in range(1, len(word)):
            if word[: at + 1] not in pieces:
                merges.append((word[:at], word[at]))
                pieces.append(word[: at + 1])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def with_alphabet(characters: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"</s>": 0} | {character: 1 + at for at, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer

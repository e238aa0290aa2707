"""What every contender of a benchmark is asked."""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.runtime.contenders import Contender
from edgeprune.runtime.receipt import Receipt
from edgeprune.runtime.stream import Stream

PROMPT = "What is on the table?"


@dataclass(frozen=True)
class Question:
    """A prompt, and the length of the answer in tokens. `fit`: what to do with an image of another aspect than a bundle's."""

    prompt: str
    tokens: int
    fit: str

    def stream(self, asked: Contender) -> Stream:
        """Return the answer of a contender in a new conversation, of exactly `tokens` tokens."""
        return asked.runtime.stream(asked.picture, self.prompt, prune=asked.prune, fit=self.fit, max_tokens=self.tokens)

    def answer(self, asked: Contender) -> Receipt:
        """Return the receipt of that answer."""
        stream = self.stream(asked)
        "".join(stream)
        return stream.receipt

    def again(self, asked: Contender) -> tuple[Receipt, Receipt]:
        """Return the receipts, up to the first token, of the question in another conversation, and of a second one after it there.

        The first answer is empty, so that the conversation reads it as it wrote it and keeps its caches.
        """
        chat = asked.silent.chat(prune=asked.prune, fit=self.fit)
        first = chat.ask(self.prompt, asked.picture)
        "".join(first)
        second = chat.ask(self.prompt)
        "".join(second)
        return first.receipt, second.receipt

"""A model that answers when it is told to, and a server around it: what is tested is the server."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import openai
from PIL import Image

from edgeprune.plan import Cut, Geometry, View
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import CutReceipt, PreparedImage, Receipt, Turn
from edgeprune.runtime.server.process import Server, ServerOptions

NAME = "double"
PATIENCE = 20.0  # seconds, of every wait


class Double:
    """As a Runtime, with a plan of 2 x 3 visual tokens of which 3 stay. Its answer is the prompt, word by word, and endless
    after the word "endless". Of a video it sees two frames.

    `held`: no word comes until `release` is called. `order`: the prompts in the order in which their answers began.
    """

    name = NAME
    spatial = True

    def __init__(self, *, held: bool = False, tiers: Sequence[str] = (), kind: str = "image") -> None:
        self.kind = kind
        frames = tuple(View(0, 0, 56, 84, 2, 3, time=time) for time in range(2)) if kind == "video" else ()
        geometry = Geometry(height=56, width=84, patch=14, merge=2, views=frames, frames=len(frames) or 1, fps=10.0)
        self.plan = unpruned_plan("qwen2_vl", 2, geometry).with_cuts(Cut("layer", "fastv", 3, 1))
        self.tiers, self.order, self.receipts = tuple(tiers), list[str](), list[Receipt]()
        self.asked: list[dict[str, Any]] = []
        self.streams: list[AnswerDouble] = []
        self.changed, self.held = threading.Condition(), held
        self._watchers: list[Callable[[Receipt], None]] = []

    def watch(self, watcher: Callable[[Receipt], None]) -> None:
        self._watchers.append(watcher)

    def prepare(self, images: Sequence[Image.Image], *, fit: str = "exact") -> PreparedImage:
        pixels = np.stack([np.asarray(image) for image in images])
        return PreparedImage(lambda: pixels, None)

    def chat(self, *, prune: bool, history: Sequence[Turn]) -> Double._Chat:
        return self._Chat(self, {"prune": prune, "history": history})

    def release(self) -> None:
        """Let every answer go on."""
        with self.changed:
            self.held = False
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so, which answers can have changed."""
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE)

    def ended(self, receipt: Receipt) -> None:
        for watcher in self._watchers:
            watcher(receipt)
        with self.changed:
            self.receipts.append(receipt)
            self.changed.notify_all()

    class _Chat:
        def __init__(self, double: Double, asked: dict[str, Any]) -> None:
            self._double, self._asked = double, asked

        def ask(self, prompt: Sequence[Any], **options: Any) -> AnswerDouble:
            turn = Turn("user", prompt)
            self._double.asked.append({**self._asked, "parts": turn.parts, **options})
            return AnswerDouble(self._double, turn.words, turn.all_images, self._asked["prune"])


class AnswerDouble:
    """As a Stream."""

    def __init__(self, double: Double, prompt: str, image: Any, prune: bool) -> None:
        self._double, self._prompt, self._cancelled = double, prompt, False
        images, each = len(image or ()), double.plan.geometry.tokens
        images = min(images, 1) if double.kind == "video" else images
        kept = {"layer": np.array([0, 1, 5]), "cache": np.array([[0, 1], [1, 5]])}  # a cache has two heads
        cuts = tuple(CutReceipt(str(cut), each, cut.keep, kept[cut.site]) for cut in double.plan.cuts if prune) * images
        self.receipt = Receipt(pruned=prune and bool(images), reason="", visual_tokens=each * images, text_tokens=5, cuts=cuts)
        double.streams.append(self)
        self.receipt.visual_whole, self.receipt.visual_stored = 12 * images, (9 if prune else 12) * images

    def cancel(self) -> None:
        with self._double.changed:
            self._cancelled = True
            self._double.changed.notify_all()

    def __iter__(self) -> Iterator[str]:
        with self._double.changed:
            self._double.order.append(self._prompt)
            self._double.changed.notify_all()
        words = self._prompt.split()
        while words and not self._cancelled:
            with self._double.changed:
                self._double.changed.wait_for(lambda: not self._double.held or self._cancelled, PATIENCE)
                if self._cancelled:
                    break
                if words == ["endless"]:
                    self._double.changed.wait(0.002)  # an answer of one word every 2 ms
            self.receipt.generated_tokens += 1
            yield words[0] + " "
            words = words if words == ["endless"] else words[1:]
        self.receipt.finish_reason = "cancelled" if self._cancelled else "end"
        self._double.ended(self.receipt)


@contextmanager
def serving(model: Any, *, opens: Callable[[Any], Any] | None = None, **options: Any) -> Iterator[str]:
    """Yield the address of a server of a model; it has stopped when the block has ended."""
    server = Server(opens or (lambda on_phase: model), ServerOptions(port=0, **{"grace": 0.0, **options}))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        if opens is None:
            wait_until(server.url, "ready")
        yield server.url
    finally:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_until(url: str, *phases: str) -> None:
    """Wait until a server says that it is in one of some phases."""
    from time import monotonic, sleep

    end = monotonic() + PATIENCE
    while httpx.get(f"{url}/health").json()["phase"] not in phases:
        assert monotonic() < end
        sleep(0.01)


@contextmanager
def client(url: str, key: str = "none") -> Iterator[openai.OpenAI]:
    """Yield OpenAI's own client for a server; it asks once."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE) as each:
        yield each


def ask(each: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    """Return a completion, or the chunks of a streamed one. Its declared types know nothing of what we add."""
    create: Any = each.chat.completions.create
    return create(**{"model": NAME, "messages": messages, **options})


def data_url(picture: Image.Image, kind: str = "png") -> str:
    """Return a picture as a data URL."""
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def user(text: str, *urls: str) -> dict[str, Any]:
    """Return a user's message of a text and images."""
    return {
        "role": "user",
        "content": [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}],
    }


def figure(url: str, name: str) -> float:
    """Return one figure of a server's metrics, 0 where it is not there yet."""
    lines = [line.rpartition(" ") for line in httpx.get(f"{url}/metrics").text.splitlines()]
    return next((float(value) for title, _, value in lines if title == name), 0.0)

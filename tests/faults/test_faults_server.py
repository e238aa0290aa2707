"""Clients that vanish amid an answer of a real model: the answer ends, and the next ones are whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from PIL import Image
from server_double import PATIENCE, data_url, serving, user, wait_until
from tiny_models import TINY_GEOMETRY

from edgeprune.bundle import Bundle
from edgeprune.runtime import Receipt, Runtime, load


@pytest.fixture
def model(tiny_bundle: Bundle) -> Runtime:
    """Return a model that never ends an answer by itself."""
    return Runtime(replace(load(tiny_bundle.path, threads=1)._pipeline, eos_token_ids=()))


@pytest.fixture
def picture() -> Iterator[str]:
    yield data_url(Image.new("RGB", (TINY_GEOMETRY.width, TINY_GEOMETRY.height), "red"))


@pytest.mark.parametrize("after", [1, 3])
def test_a_client_that_goes_away_amid_a_stream(after: int, model: Runtime, picture: str) -> None:
    receipts: list[Receipt] = []
    model.watch(receipts.append)
    asked = {"messages": [user("What is it?", picture)], "temperature": 0, "model": model.name}
    with serving(model) as url, httpx.Client(timeout=PATIENCE) as client:
        wait_until(url, "ready")
        short = {**asked, "max_tokens": 6}
        expected = client.post(f"{url}/v1/chat/completions", json=short).json()["choices"][0]["message"]["content"]
        for _ in range(3):
            with client.stream("POST", f"{url}/v1/chat/completions", json={**asked, "max_tokens": 400, "stream": True}) as answer:
                lines = (line for line in answer.iter_lines() if line.startswith("data:"))
                for _ in range(after):
                    next(lines)
        wait_until(url, "ready")
        assert client.post(f"{url}/v1/chat/completions", json=short).json()["choices"][0]["message"]["content"] == expected
    assert [receipt.finish_reason for receipt in receipts] == ["length", "cancelled", "cancelled", "cancelled", "length"]
    assert all(receipt.generated_tokens < 400 for receipt in receipts)

"""Many clients at once: fairness, bounds, clients that go away, and the end of the server."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx
import openai
import pytest
from PIL import Image
from server_double import NAME, PATIENCE, Double, ask, client, data_url, figure, serving, user, wait_until

from edgeprune.errors import BundleError, UsageError
from edgeprune.runtime import PreparedImage
from edgeprune.runtime.server import ServerLimits
from edgeprune.runtime.server.process import Server, ServerOptions

KEYS = ("key-of-a", "key-of-b")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@contextmanager
def asking(url: str, *prompts: tuple[str, str]) -> Iterator[list[httpx.Response]]:
    """Ask (key, prompt) in threads of their own, one after the other; yield the list of responses, complete after the block."""
    answers: list[httpx.Response] = []

    def ask(key: str, prompt: str) -> None:
        body = {"messages": [user(prompt)]}
        answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, headers=bearer(key), timeout=PATIENCE))

    threads = [threading.Thread(target=ask, args=each) for each in prompts]
    for number, thread in enumerate(threads):
        thread.start()
        wait_for_line(url, number + 1, bearer(KEYS[0]))
    yield answers
    for thread in threads:
        thread.join(PATIENCE)


def wait_for_line(url: str, count: int, headers: dict[str, str] | None = None) -> None:
    """Wait until so many requests wait or are answered."""
    for _ in range(2000):
        health = httpx.get(f"{url}/health", headers=headers).json()
        if health["queue"] + health["running"] >= count:
            return
    raise AssertionError("They never came.")


def test_two_clients_are_served_in_turns() -> None:
    double = Double(held=True)
    with serving(double, keys=KEYS) as url:
        flood = [(KEYS[0], f"a{number}") for number in range(4)]
        with asking(url, *flood, (KEYS[1], "b0"), (KEYS[1], "b1")) as answers:
            double.release()
        assert double.order == ["a0", "a1", "b0", "a2", "b1", "a3"]
        assert [answer.status_code for answer in answers] == [200] * 6


def test_parallel_answers_run_at_once() -> None:
    double = Double(held=True)
    with serving(double, keys=KEYS, parallel=2) as url, asking(url, (KEYS[0], "one"), (KEYS[1], "two"), (KEYS[1], "three")):
        double.wait(lambda: len(double.order) == 2)
        health = httpx.get(f"{url}/health").json()
        assert health == {"phase": "busy", "queue": 1, "running": 2}
        double.release()


def test_a_full_queue_and_a_greedy_client() -> None:
    double = Double(held=True)
    with serving(double, keys=(*KEYS, "key-of-c"), limits=ServerLimits(queue=2, per_client=2)) as url:
        with asking(url, (KEYS[0], "a0"), (KEYS[0], "a1")):
            with client(url, KEYS[0]) as greedy, pytest.raises(openai.RateLimitError, match="--per-client") as caught:
                ask(greedy, user("a2"))
            assert int(caught.value.response.headers["retry-after"]) >= 1
            with asking(url, (KEYS[1], "b0")):
                wait_for_line(url, 3)
                with client(url, "key-of-c") as late, pytest.raises(openai.RateLimitError, match="--queue"):
                    ask(late, user("c0"))
                double.release()
        metrics = httpx.get(f"{url}/metrics", headers=bearer(KEYS[0])).text
        assert 'edgeprune_rejected_total{reason="queue"} 1.0' in metrics
        assert 'edgeprune_rejected_total{reason="per_client"} 1.0' in metrics
        assert 'edgeprune_http_requests_total{method="POST",path="/v1/chat/completions",status="429"} 2.0' in metrics


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_answer(stream: bool) -> None:
    double = Double()
    with serving(double) as url:
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(PATIENCE, read=0.3)) as leaving:
            body = {"messages": [user("endless")], "stream": stream}
            with leaving.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if "endless" in line:
                        raise httpx.ReadTimeout("seen enough")
        double.wait(lambda: len(double.receipts) == 1)
        assert double.receipts[0].finish_reason == "cancelled"
        wait_until(url, "ready")


def test_a_client_that_goes_away_leaves_the_line() -> None:
    double = Double(held=True)
    with serving(double) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json={"messages": [user("first")]}, timeout=0.2)
        double.wait(lambda: len(double.receipts) == 1)
        double.release()
        assert double.order == ["first"]
        with asking(url, ("none", "endless")):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json={"messages": [user("second")]}, timeout=0.2)
            while httpx.get(f"{url}/health").json()["queue"]:
                pass
            assert double.order == ["first", "endless"]
            while not figure(url, 'edgeprune_rejected_total{reason="disconnected"}'):
                pass
            double.streams[-1].cancel()


def test_a_deadline_that_passes_in_line() -> None:
    double = Double(held=True)
    with serving(double, keys=KEYS) as url, asking(url, (KEYS[0], "first")):
        answers: list[httpx.Response] = []
        body = {"messages": [user("second")], "deadline_ms": 50}
        late = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, headers=bearer(KEYS[1])))
        )
        late.start()
        wait_for_line(url, 2)
        threading.Event().wait(0.06)
        double.release()
        late.join(PATIENCE)
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "deadline_passed"
        assert "second" not in double.order


def test_keys() -> None:
    with serving(Double(), keys=KEYS) as url:
        for key in ("wrong", "", KEYS[0][:-1]):
            with client(url, key or "x") as each, pytest.raises(openai.AuthenticationError):
                each.models.list()
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/metrics").headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/health").status_code == 200
        with client(url, KEYS[1]) as each:
            assert each.models.list().data[0].id == NAME


def test_hosts_that_others_reach_need_keys() -> None:
    with pytest.raises(UsageError, match="--no-auth"):
        Server(lambda on_phase: Double(), ServerOptions(host="0.0.0.0", port=0))  # type: ignore[arg-type,return-value]
    with pytest.raises(UsageError, match="contradicts"):
        Server(lambda on_phase: Double(), ServerOptions(keys=KEYS, no_auth=True, port=0))  # type: ignore[arg-type,return-value]
    with serving(Double(), host="0.0.0.0", no_auth=True) as url:
        assert httpx.get(f"{url.replace('0.0.0.0', '127.0.0.1')}/v1/models").status_code == 200


def test_a_port_in_use() -> None:
    with serving(Double()) as url, pytest.raises(UsageError, match="Cannot listen"):
        Server(lambda on_phase: Double(), ServerOptions(port=int(url.rpartition(":")[2])))  # type: ignore[arg-type,return-value]


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def opens(on_phase: object) -> Double:
        raise BundleError("The bundle is broken.")

    server = Server(opens, ServerOptions(port=0))  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="broken"):
        server.run()


def test_what_runs_is_finished_and_what_waits_is_refused() -> None:
    double = Double(held=True)
    server = Server(lambda on_phase: double, ServerOptions(port=0, keys=KEYS, grace=PATIENCE))  # type: ignore[arg-type,return-value]
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(server.url, "ready")
    with asking(server.url, (KEYS[0], "a b c"), (KEYS[1], "d")) as answers:
        server.stop()
        while not answers:
            threading.Event().wait(0.01)
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "shutting_down"
        double.release()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert answers[1].json()["choices"][0]["message"]["content"] == "a b c "


def test_what_does_not_end_in_time_is_cancelled() -> None:
    double = Double(held=True)
    server = Server(lambda on_phase: double, ServerOptions(port=0, grace=0.1))  # type: ignore[arg-type,return-value]
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(server.url, "ready")
    with asking(server.url, ("none", "a b c")) as answers:
        server.stop()
    thread.join(PATIENCE)
    assert answers[0].json()["edgeprune"]["finish_reason"] == "cancelled"
    assert answers[0].json()["choices"][0]["finish_reason"] == "length"


class Slow(Double):
    """A double that prepares images slowly, or not before `ready` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.preparing, self.ready = threading.Semaphore(0), threading.Event()

    def prepare(self, images: Sequence[Image.Image], *, fit: str = "exact") -> PreparedImage:
        self.preparing.release()
        assert self.ready.wait(PATIENCE)
        return super().prepare(images, fit=fit)


PICTURE = data_url(Image.new("RGB", (84, 56)))


def test_preparing_images_counts_against_the_deadline() -> None:
    double = Slow()

    def prepare_late() -> None:
        assert double.preparing.acquire(timeout=PATIENCE)
        threading.Event().wait(0.15)
        double.ready.set()

    with serving(double) as url:
        threading.Thread(target=prepare_late).start()
        body = {"messages": [user("x", PICTURE)], "deadline_ms": 100}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "deadline_passed" and double.order == []


def test_a_client_that_goes_away_while_its_images_are_prepared_frees_its_place() -> None:
    double = Slow()
    path = "/v1/chat/completions"
    with serving(double, keys=KEYS, limits=ServerLimits(queue=0)) as url:
        with pytest.raises(httpx.ReadTimeout):
            body = {"messages": [user("first", *[PICTURE] * 3)]}
            httpx.post(url + path, json=body, headers=bearer(KEYS[0]), timeout=0.3)
        assert double.preparing.acquire(timeout=PATIENCE)
        for _ in range(200):  # the server hears of it within milliseconds
            body = {"messages": [user("second")]}
            answer = httpx.post(url + path, json=body, headers=bearer(KEYS[1]), timeout=PATIENCE)
            if answer.status_code != 429:
                break
        assert answer.status_code == 200 and double.order == ["second"]
        double.ready.set()
        assert not double.preparing.acquire(timeout=0.1)  # its other images were not looked at


def test_the_images_of_a_refused_request_are_not_kept() -> None:
    seen = list[weakref.ref[Image.Image]]()

    class Refusing(Double):
        def prepare(self, images: Sequence[Image.Image], *, fit: str = "exact") -> PreparedImage:
            seen.extend(map(weakref.ref, images))
            raise UsageError("Another shape.")

    with serving(Refusing()) as url:
        gc.collect()
        gc.disable()
        try:
            answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [user("x", PICTURE)]}, timeout=PATIENCE)
            assert answer.status_code == 400 and "Another shape" in answer.text
            assert len(seen) == 1 and seen[0]() is None
        finally:
            gc.enable()


def test_one_clients_images_do_not_hold_up_others() -> None:
    double = Slow()
    with serving(double, keys=KEYS, parallel=1) as url:
        with asking_in_threads(url, [user("a", PICTURE)] * 4, KEYS[0]) as answers:
            assert double.preparing.acquire(timeout=PATIENCE)
            body = {"messages": [user("b")]}
            other = httpx.post(f"{url}/v1/chat/completions", json=body, headers=bearer(KEYS[1]), timeout=PATIENCE)
            assert other.status_code == 200 and double.order == ["b"]
            double.ready.set()
        assert [answer.status_code for answer in answers] == [200] * 4


@contextmanager
def asking_in_threads(url: str, messages: Sequence[object], key: str) -> Iterator[list[httpx.Response]]:
    answers: list[httpx.Response] = []

    def ask(message: object) -> None:
        body = {"messages": [message]}
        answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, headers=bearer(key), timeout=PATIENCE))

    threads = [threading.Thread(target=ask, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    yield answers
    for thread in threads:
        thread.join(PATIENCE)

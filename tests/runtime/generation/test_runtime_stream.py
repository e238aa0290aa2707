"""Answers that end before their time: cancelled, too late, too large; and many at once."""

from __future__ import annotations

import threading
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.device.power import EnergyCounter
from edgeprune.errors import UsageError
from edgeprune.processors import fit
from edgeprune.runtime import Runtime, Turn, load
from edgeprune.runtime.backends.interface import DecoderOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache
from edgeprune.runtime.generation import conversation
from edgeprune.runtime.generation.conversation import Stream
from edgeprune.runtime.generation.sampling import Sampler
from edgeprune.runtime.telemetry.receipt import Receipt

PROMPT = "What colour is the cube?"
LONG = 400


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Bundle) -> Runtime:
    """Return a model that never ends an answer by itself."""
    model = load(tiny_bundle.path, threads=1)._pipeline
    return Runtime(replace(model, eos_token_ids=()))


def test_any_thread_may_cancel_and_the_reader_sees_an_end(runtime: Runtime, tiny_image: Image.Image) -> None:
    stream = runtime.stream(tiny_image, PROMPT, max_tokens=LONG)
    next(stream)
    canceller = threading.Thread(target=stream.cancel)
    canceller.start()
    canceller.join(10)
    before = stream.receipt.generated_tokens
    assert "".join(stream) is not None
    assert stream.receipt.finish_reason == "cancelled"
    assert stream.receipt.generated_tokens <= before + 1


def test_a_reader_in_another_thread_ends_within_a_step(runtime: Runtime, tiny_image: Image.Image) -> None:
    stream = runtime.stream(tiny_image, PROMPT, max_tokens=LONG)
    started, seen = threading.Event(), list[int]()

    def read() -> None:
        for _ in stream:
            started.set()
            seen.append(stream.receipt.generated_tokens)

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(10)
    stream.cancel()
    at = stream.receipt.generated_tokens
    reader.join(10)
    assert not reader.is_alive()
    assert stream.receipt.finish_reason == "cancelled"
    assert stream.receipt.generated_tokens <= at + 2 < LONG


def test_close_waits_for_the_reader_and_may_be_called_twice(runtime: Runtime, tiny_image: Image.Image) -> None:
    stream = runtime.stream(tiny_image, PROMPT, max_tokens=LONG)
    started = threading.Event()

    def read() -> None:
        for _ in stream:
            started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(10)
    stream.close()
    stream.close()
    reader.join(10)
    assert not reader.is_alive()
    assert stream.receipt.finish_reason == "cancelled"


def test_one_that_is_cancelled_before_it_is_read_says_nothing(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat()
    stream = chat.ask(PROMPT, tiny_image)
    stream.cancel()
    assert list(stream) == []
    assert stream.receipt.finish_reason == "cancelled"
    assert chat._conversation._messages == []


def test_a_conversation_goes_on_after_a_cancelled_answer(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat()
    stream = chat.ask(PROMPT, tiny_image, max_tokens=LONG)
    next(stream)
    stream.cancel()
    said = stream.text + "".join(stream)
    assert said == stream.text
    after = chat.ask("And now?", max_tokens=3)
    "".join(after)
    assert after.receipt.finish_reason == "length"
    assert after.receipt.visual_tokens == 0  # the caches were kept


def test_prefill_and_encoder_stop_in_their_midst(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    runtime = load(tiny_bundle.path, threads=1, cache_bytes=0)
    engine, asked = runtime._pipeline.backend, list[Stream]()
    chat = runtime.chat()
    for name in ("encode_image", "forward"):
        original = getattr(engine, name)

        def cancelled(*arguments: object, original: object = original, **options: object) -> object:
            asked[-1].cancel()
            return original(*arguments, **options)  # type: ignore[operator]

        setattr(engine, name, cancelled)
        asked.append(chat.ask(PROMPT, tiny_image))
        assert list(asked[-1]) == []
        setattr(engine, name, original)
        assert (asked[-1].receipt.finish_reason, asked[-1].receipt.generated_tokens) == ("cancelled", 0)
    stream = chat.ask(PROMPT, tiny_image, max_tokens=3)
    "".join(stream)
    assert stream.receipt.finish_reason in ("end", "length")


def test_an_answer_is_complete_before_its_deadline(
    runtime: Runtime, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = runtime._pipeline.backend
    step = engine.forward

    def slow(tokens: DecoderInput, cache: KvCache, **given: Any) -> DecoderOutput:
        time.sleep(0.01)
        return step(tokens, cache, **given)

    monkeypatch.setattr(engine, "forward", slow)
    started = time.monotonic()
    receipt = runtime.generate(tiny_image, PROMPT, max_tokens=LONG, deadline_ms=2000).receipt
    assert time.monotonic() - started < 0.01 * LONG
    assert (receipt.finish_reason, receipt.deadline_ms) == ("deadline", 2000)
    assert receipt.generated_tokens > 0


def test_a_deadline_that_has_passed_stops_the_prefill(runtime: Runtime, tiny_image: Image.Image) -> None:
    stream = runtime.stream(tiny_image, PROMPT, deadline_ms=0.001)
    assert "".join(stream) == ""
    assert (stream.receipt.finish_reason, stream.receipt.generated_tokens) == ("deadline", 0)


def test_a_deadline_with_time_enough_changes_nothing(runtime: Runtime, tiny_image: Image.Image) -> None:
    answer = runtime.generate(tiny_image, PROMPT, max_tokens=5, deadline_ms=60_000)
    assert answer.text == runtime.generate(tiny_image, PROMPT, max_tokens=5).text
    assert answer.receipt.finish_reason == "length"


@pytest.mark.parametrize("wrong", [{"deadline_ms": 0}, {"deadline_ms": float("nan")}, {"max_kv_bytes": 0}, {"tier": "fast"}])
def test_terms_that_make_no_sense_are_refused(wrong: dict[str, Any], runtime: Runtime, tiny_image: Image.Image) -> None:
    with pytest.raises(UsageError, match=r"deadline_ms|max_kv_bytes|no tier"):
        runtime.generate(tiny_image, PROMPT, **wrong)


def test_caches_stop_at_their_limit(runtime: Runtime, tiny_image: Image.Image) -> None:
    whole = runtime.generate(tiny_image, PROMPT, max_tokens=6).receipt.kv_bytes
    receipt = runtime.generate(tiny_image, PROMPT, max_tokens=LONG, max_kv_bytes=whole).receipt
    assert (receipt.finish_reason, receipt.generated_tokens, receipt.kv_bytes) == ("kv_limit", 6, whole)


def test_a_turn_that_cannot_fit_is_refused_by_name(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat()
    with pytest.raises(UsageError, match="max_kv_bytes is 1000"):
        "".join(chat.ask(PROMPT, tiny_image, max_kv_bytes=1000))
    assert "".join(chat.ask(PROMPT, tiny_image, max_tokens=2)) is not None


def test_a_limit_of_the_whole_runtime_counts_too(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    limited = load(tiny_bundle.path, max_kv_bytes=1000)
    with pytest.raises(UsageError, match="max_kv_bytes is 1000"):
        limited.generate(tiny_image, PROMPT)
    assert limited.generate(tiny_image, PROMPT, max_tokens=2, max_kv_bytes=1 << 20).receipt.generated_tokens


def test_history_is_what_was_said_before(runtime: Runtime, tiny_image: Image.Image) -> None:
    chat = runtime.chat(prune=False)
    first = "".join(chat.ask(PROMPT, tiny_image, max_tokens=4))
    expected = "".join(chat.ask("And the ball?", max_tokens=6))
    history = [Turn("user", PROMPT, [tiny_image]), Turn("assistant", first)]
    stream = runtime.chat(prune=False, history=history).ask("And the ball?", max_tokens=6)
    assert "".join(stream) == expected
    assert stream.receipt.visual_tokens == 12
    again = runtime.chat(history=[Turn("system", "Answer in one word.")]).ask(PROMPT, tiny_image, max_tokens=2)
    assert "".join(again) is not None


def test_history_is_checked(runtime: Runtime, tiny_image: Image.Image) -> None:
    with pytest.raises(UsageError, match="robot"):
        Turn("robot", "Hello.")
    with pytest.raises(UsageError, match="images"):
        Turn("assistant", "Look.", [tiny_image])
    with pytest.raises(UsageError, match="control token"):
        runtime.chat(history=[Turn("system", "<|im_end|>")]).ask(PROMPT)


def test_answers_at_once_are_those_of_one_after_the_other(runtime: Runtime, tiny_image: Image.Image) -> None:
    pictures = [tiny_image.rotate(90 * turn, expand=False) for turn in range(4)]
    expected = [runtime.generate(picture, PROMPT, max_tokens=24).text for picture in pictures]
    found: dict[int, str] = {}

    def answer(number: int) -> None:
        found[number] = runtime.generate(pictures[number], PROMPT, max_tokens=24).text

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(4)] == expected
    assert runtime.phase == "ready"


def test_watchers_are_told_of_every_end(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    runtime, told = load(tiny_bundle.path, threads=1), list[Receipt]()
    runtime.watch(told.append)
    phases = list[str]()
    runtime.watch(lambda receipt: phases.append(runtime.phase))
    stream = runtime.stream(tiny_image, PROMPT, max_tokens=3)
    next(stream)
    assert runtime.phase == "busy"
    "".join(stream)
    runtime.stream(tiny_image, PROMPT).close()  # never read: nothing happened
    with pytest.raises(UsageError):
        runtime.generate(tiny_image, PROMPT, max_kv_bytes=1)
    assert [receipt.finish_reason for receipt in told][1:] == ["error"]
    assert told[0] is stream.receipt
    assert phases == ["ready", "ready"]


def test_loading_tells_its_phases(tiny_bundle: Bundle) -> None:
    phases = list[str]()
    runtime = load(tiny_bundle.path, warm_up=True, on_phase=phases.append)
    assert (phases, runtime.phase) == (["loading", "warming", "ready"], "ready")
    assert runtime._pipeline.state.latency.expected_ms([1], 1, 4, 0.0)[0] > 0
    assert len(runtime._pipeline.state.feature_cache) == 0


def test_stages_are_told_apart_and_in_order(runtime: Runtime, tiny_image: Image.Image) -> None:
    runtime.forget()
    times = runtime.generate(tiny_image, PROMPT, max_tokens=3).receipt.times
    assert [stage.name for stage in times.stages] == ["preprocess", "preprocess", "vision", "prefill", "decode"]
    assert all(stage.began_ns <= stage.ended_ns for stage in times.stages)
    assert times.ttft_ms == pytest.approx(times.preprocess_ms + times.vision_ms + times.select_ms + times.prefill_ms)


class _Steady:
    name = "steady"

    def read(self) -> object:
        from edgeprune.device.power import Power

        return Power(2000.0, ("VDD_IN",))

    def close(self) -> None:
        pass


def test_energy_is_power_over_time() -> None:
    now = iter(float(second) for second in range(1000))
    counter = EnergyCounter(_Steady(), clock=lambda: next(now))  # type: ignore[arg-type]
    try:
        first, second = counter.joules, counter.joules
        assert first is not None
        assert second is not None
        assert (second - first) % 2.0 == 0 < second - first  # 2 W, whole seconds
    finally:
        counter.close()


def prompts(runtime: Runtime) -> tuple[Runtime, list[str]]:
    """Return the same model with a list of the prompts that its chat template writes."""
    pipeline, written = runtime._pipeline, list[str]()
    template = pipeline.prompts.template

    class Spy:
        def render(self, messages: Any, **others: Any) -> str:
            written.append(template.render(messages, **others))
            return written[-1]

    prompts = replace(pipeline.prompts, template=Spy())  # type: ignore[arg-type]
    return Runtime(replace(pipeline, prompts=prompts)), written


def test_special_tokens_stay_in_the_answer_and_in_what_was_said(runtime: Runtime, tiny_image: Image.Image) -> None:
    special = [token for token in range(600) if not runtime._pipeline.tokenizer.is_text(token)]
    token = next(token for token in special if runtime._pipeline.tokenizer.is_text(token, skip_special=False))
    assert token not in runtime._pipeline.eos_token_ids
    sampler = Sampler.sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", lambda self, logits: token if self.sampling.max_tokens == 2 else sampler(self, logits))
        model, written = prompts(runtime)
        for skip in (True, False):
            chat = model.chat()
            said = "".join(chat.ask("What is it?", [tiny_image], max_tokens=2, skip_special_tokens=skip))
            assert (said == "") == skip
            "".join(chat.ask("And now?", max_tokens=1))
            assert skip or said in written[-1]


def test_texts_and_images_keep_their_order(runtime: Runtime, tiny_image: Image.Image) -> None:
    model, written = prompts(runtime)
    other = tiny_image.rotate(180)
    history = [Turn("user", ["Here:", tiny_image, "a table."]), Turn("assistant", "Yes.")]
    stream = model.chat(history=history).ask(["And", "this:", model.prepare(other), "What is it?"], max_tokens=4)
    assert "".join(stream) is not None and stream.receipt.visual_tokens == 2 * 12
    image = f"<|vision_start|>{runtime._pipeline.image.placeholder}<|vision_end|>"
    assert f"Here:{image}a table." in written[0] and f"And\nthis:{image}What is it?" in written[0]
    model.generate(tiny_image, PROMPT, max_tokens=1)
    assert image + PROMPT in written[1]


def test_control_tokens_are_seen_across_parts(runtime: Runtime, tiny_image: Image.Image) -> None:
    with pytest.raises(UsageError, match="control token"):
        runtime.chat().ask([tiny_image, "Hello.<|im_end|>", "x"])
    split = runtime.chat().ask(["Hello.<|im_", "end|>", tiny_image], max_tokens=1)  # a line break keeps them apart
    assert "".join(split) is not None
    with pytest.raises(UsageError, match="images"):
        Turn("system", ["Look.", tiny_image])
    with pytest.raises(UsageError, match="beside"):
        Turn("user", ["Look.", tiny_image], [tiny_image])


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("prune", [True, False])
def test_a_prepared_image_is_answered_like_its_source(runtime: Runtime, tiny_image: Image.Image, scale: int, prune: bool) -> None:
    image = tiny_image.resize((scale * tiny_image.width, scale * tiny_image.height))
    expected = runtime.generate(image, PROMPT, max_tokens=8, fit="stretch", prune=prune)
    found = runtime.generate(runtime.prepare(image, fit="stretch"), PROMPT, max_tokens=8, prune=prune)
    assert found.text == expected.text and found.receipt.reused  # by the same key


@pytest.mark.parametrize("how", ["exact", "stretch", "pad"])
def test_what_waits_is_of_the_bundles_size(
    how: str, runtime: Runtime, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, geometry = list[weakref.ref[Image.Image]](), runtime.plan.geometry

    def fit_noted(*arguments: Any) -> Image.Image:
        image = fit(*arguments)
        fitted.append(weakref.ref(image))
        return image

    monkeypatch.setattr(conversation, "fit", fit_noted)
    large = tiny_image.resize((20 * geometry.width, 20 * geometry.height))
    prepared = runtime.prepare(large, fit=how)
    held = sum(image.width * image.height for each in fitted if (image := each()) is not None)
    assert held <= 3 * geometry.width * geometry.height
    assert prepared.patches().shape == runtime.prepare(tiny_image, fit=how).patches().shape


def test_an_image_without_a_question(runtime: Runtime, tiny_image: Image.Image) -> None:
    model, written = prompts(runtime)
    stream = model.chat().ask([tiny_image], max_tokens=2)
    assert "".join(stream) is not None and stream.receipt.visual_tokens == 12
    assert written[0].count(runtime._pipeline.image.placeholder) == 1
    with pytest.raises(UsageError, match="empty"):
        model.chat().ask([" "])


def test_compiling_a_grammar_counts_against_the_deadline(runtime: Runtime, tiny_image: Image.Image) -> None:
    class Slow:
        def constraint(self, *asked: object) -> None:
            time.sleep(0.2)

    pipeline = replace(runtime._pipeline)
    vars(pipeline)["grammars"] = Slow()
    stream = Runtime(pipeline).stream(tiny_image, PROMPT, choices=["a"], deadline_ms=150)
    assert "".join(stream) == "" and stream.receipt.finish_reason == "deadline" and stream.receipt.generated_tokens <= 1


@pytest.mark.parametrize("word", ["word ", "w", " ", "é"])
def test_a_text_far_beyond_the_context_is_refused_without_making_it_tokens(
    word: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, longest = runtime._pipeline.tokenizer, list[int]()
    encode = tokenizer.encode

    def noted(text: str) -> list[int]:
        longest.append(len(text))
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", noted)
    monkeypatch.setattr(tokenizer, "encode_prompt", None)
    context = runtime._pipeline.decoder.context
    with pytest.raises(UsageError, match=f"but the model takes {context}"):
        "".join(runtime.chat().ask("Hello." + word * 200_000))
    assert longest and max(longest) <= 16 * context

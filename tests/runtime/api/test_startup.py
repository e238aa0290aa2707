"""Loading: weights are checked while graphs are opened, and nothing answers before both are done."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bundle import DECODER, EMBED, VISION, Bundle, integrity
from edgeprune.errors import BundleError, EngineError
from edgeprune.io.background import ThreadTask, run_in_threads
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.api import loading
from edgeprune.runtime.backends import onnxruntime
from edgeprune.runtime.backends.onnxruntime import OnnxRuntimeBackend, _share_arena
from edgeprune.runtime.backends.providers import open_backend

WEIGHTS = [f"{graph}.data" for graph in (VISION, EMBED, DECODER)]


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _fail(*_: Any, **__: Any) -> None:
    raise EngineError("It cannot be opened.")


def test_functions_run_at_once() -> None:
    both = threading.Barrier(2)
    assert run_in_threads({"one": lambda: both.wait(60) * 0 + 1, "two": lambda: both.wait(60) * 0 + 2}) == {"one": 1, "two": 2}


def test_the_first_error_is_raised_when_all_have_ended() -> None:
    ended = threading.Event()

    def late() -> None:
        threading.Event().wait(0.05)
        ended.set()

    with pytest.raises(EngineError, match="opened"):
        run_in_threads({"late": late, "failing": _fail, "failing differently": lambda: int("x")})
    assert ended.is_set()


def test_importing_loads_no_more_than_it_needs() -> None:
    slow = {"concurrent.futures", "logging", "onnxruntime", "shutil", "tempfile"}
    code = "import edgeprune.runtime, sys; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert not slow & set(output.split())


@pytest.mark.parametrize("name", WEIGHTS)
def test_altered_weights_give_no_runtime(name: str, altered_bundle: Path) -> None:
    _alter(altered_bundle / name)
    with pytest.raises(BundleError, match=rf"{name} in .* sha256"):
        load(altered_bundle)


def test_altered_weights_are_named_though_opening_them_failed(altered_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _alter(altered_bundle / WEIGHTS[0])
    monkeypatch.setattr(loading, "open_backend", _fail)
    with pytest.raises(BundleError, match="sha256"):
        load(altered_bundle)


def test_an_error_of_opening_stays_when_the_weights_are_right(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "open_backend", _fail)
    with pytest.raises(EngineError, match="opened"):
        load(tiny_bundle.path)


def test_what_is_not_weights_is_checked_before_anything_is_opened(altered_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _alter(altered_bundle / DECODER)
    opened: list[Any] = []
    monkeypatch.setattr(loading, "open_backend", lambda *asked, **how: opened.append((asked, how)))
    with pytest.raises(BundleError, match=rf"{DECODER} in .* sha256"):
        load(altered_bundle)
    assert not opened


def test_shorter_weights_are_found_before_anything_is_opened(altered_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = altered_bundle / WEIGHTS[2]
    path.write_bytes(path.read_bytes()[:-1])
    opened: list[Any] = []
    monkeypatch.setattr(loading, "open_backend", lambda *asked, **how: opened.append((asked, how)))
    with pytest.raises(BundleError, match="sha256"):
        load(altered_bundle)
    assert not opened


def test_loading_ends_with_the_check_of_the_weights(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, checkable, loaded, sha256_of = threading.Event(), threading.Event(), threading.Event(), integrity.sha256_of

    def slow(path: Path) -> str:
        if path.suffix == ".data":
            assert checkable.wait(60)
        return sha256_of(path)

    def noted(*asked: Any, **how: Any) -> Any:
        engine = open_backend(*asked, **how)
        opened.set()
        return engine

    monkeypatch.setattr(integrity, "sha256_of", slow)
    monkeypatch.setattr(loading, "open_backend", noted)

    def loads() -> Runtime:
        runtime = load(tiny_bundle.path)
        loaded.set()
        return runtime

    pending = ThreadTask(loads)
    assert opened.wait(60)  # with no weights checked yet
    assert not loaded.wait(0.1)
    checkable.set()
    assert pending.result().plan == tiny_bundle.plan


def test_graphs_share_memory_that_no_pattern_doubles(tiny_bundle: Bundle) -> None:
    for engine in (OnnxRuntimeBackend(tiny_bundle), OnnxRuntimeBackend(tiny_bundle)):
        options = engine._decoder.get_session_options()
        assert not options.enable_mem_pattern
        assert options.get_session_config_entry("session.use_env_allocators") == "1"


@pytest.mark.parametrize(("able", "asked"), [(True, False), (False, True), (None, True)])
def test_exact_kernels_are_asked_for_only_where_fast_ones_are_wrong(
    monkeypatch: pytest.MonkeyPatch, able: bool | None, asked: bool
) -> None:
    # On a CPU that does not need them the vision tower takes nearly twice as long with them.
    monkeypatch.setattr(onnxruntime, "_has_byte_products", lambda: able)
    options = onnxruntime._session_options(1, ["CPUExecutionProvider"], exact=False, integers=True)
    try:
        found = options.get_session_config_entry("session.x64quantprecision") == "1"
    except RuntimeError:  # ONNX Runtime's answer about an entry that is not set
        found = False
    assert found is asked


def test_a_program_may_have_registered_an_arena_of_its_own() -> None:
    for _ in range(2):  # the second time there is one
        _share_arena.__wrapped__()

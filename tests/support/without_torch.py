"""A pytest plugin for machines without torch: tests that would export skip. `make test-arm` runs the runtime's tests with it.

What needs torch, transformers or onnx says so by a ModuleNotFoundError, of the file or of a fixture. That the runtime needs none of
them is tested where they are installed (import contracts, tests/runtime/api/test_isolation.py).
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

EXPORTING = ("onnx", "onnx_ir", "onnxscript", "safetensors", "tensorrt_rtx", "torch", "transformers")


def _lacks(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in EXPORTING:
            return f"needs {error.name.partition('.')[0]}, as exports do"
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a missing module of the exporter into a skip."""
    report = yield
    lacks = _lacks(call.excinfo.value) if call.excinfo else None
    if lacks and report.failed:
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, lacks)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a file that imports one of them."""
    report = yield
    call = getattr(report, "call", None)
    lacks = _lacks(call.excinfo.value) if call is not None and call.excinfo else None
    if lacks and report.failed:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, lacks)
    return report

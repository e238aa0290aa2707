"""Building a bundle's engines and keeping them: with NVIDIA's builder, for a device that the test makes up."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from recordings_jetson import meminfo, orin_nano

from edgeprune.bundle import DECODER, VISION, Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.cli import main
from edgeprune.device.memory import Memory
from edgeprune.device.workload import PRECISIONS
from edgeprune.errors import EngineError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import KeepPlan
from edgeprune.runtime.backends.tensorrt import build as building
from edgeprune.runtime.backends.tensorrt.bindings import DeviceIdentity, tensorrt
from edgeprune.runtime.backends.tensorrt.build import BuildJob, BuildRequest, build_bundle, check_memory, plan_jobs, trtexec_command
from edgeprune.runtime.backends.tensorrt.builder import BuilderSettings, Built, build_engine
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, shape_profiles
from edgeprune.runtime.backends.tensorrt.store import (
    RECORDS,
    Store,
    keep_timings,
    read_timings,
    timing_cache,
    usable_engines,
)
from edgeprune.targets import TARGETS, Lowering

trt = pytest.importorskip("tensorrt_rtx", reason='needs NVIDIA\'s builder: pip install "edgeprune[check]"')

ORIN = DeviceIdentity("10.3.0", "8.7", 8)
SECRET = b"a device's own key, 32 bytes long"
SMALL = ProfileLimits(context=64, turn=32)


def configure(config: Any) -> None:
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)


def build(bundle: Bundle, limits: ProfileLimits = SMALL, **changed: Any) -> dict[str, str]:
    request = BuildRequest(bundle, limits, BuilderSettings(), reuse=changed.pop("reuse", ()))
    given: dict[str, Any] = {"trt": trt, "device": ORIN, "secret": SECRET, "configure": configure} | changed
    return {done.record.graph: done.how for done in build_bundle(request, **given)}


@pytest.fixture(scope="module", autouse=True)
def _data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the device's timing cache out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module")
def built(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tiny bundle with its engines."""
    copy = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    assert set(build(Bundle.load(copy)).values()) == {"built"}
    return copy


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Bundle:
    """Return a private copy of the built bundle."""
    shutil.copytree(built, tmp_path / "own")
    return Bundle.load(tmp_path / "own")


def test_what_is_built_stays(own: Bundle) -> None:
    before = {path: path.stat().st_mtime_ns for path in (own.path / "engines").glob("*.plan")}
    assert set(build(own).values()) == {"kept"} and len(before) == 2
    assert before == {path: path.stat().st_mtime_ns for path in (own.path / "engines").glob("*.plan")}
    assert {record.sms for record in Store(own.path, SECRET).records()} == {8}


def test_one_timing_cache_serves_all_bundles(
    tiny_bundle: Bundle, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert timing_cache().is_file() and not list(built.rglob("*.cache"))
    given: list[bytes] = []

    def build_engine(*_: Any, timings: bytes, **__: Any) -> Built:
        given.append(timings)
        return Built(memoryview(b"plan"), 0.0, 0.0, timings + b"1")

    monkeypatch.setattr(building, "build_engine", build_engine)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "new" / "data"))
    for name in ("one", "other"):
        shutil.copytree(tiny_bundle.path, tmp_path / name)
        build(Bundle.load(tmp_path / name))
    assert given == [b"1" * count for count in range(4)] and read_timings() == b"1" * 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    keep_timings(b"a build is not lost for this")
    assert read_timings() == b""


def test_the_number_of_sms_is_no_reason_to_build_again(own: Bundle) -> None:
    store, fewer = Store(own.path, SECRET), replace(ORIN, sms=4)  # another power mode
    assert all(job.ready for job in plan_jobs(own, SMALL, BuilderSettings(), fewer, store))
    assert set(usable_engines(own, store, fewer)) == {VISION, DECODER}


def test_a_record_without_the_number_of_sms_is_read(own: Bundle) -> None:
    store, path = Store(own.path, SECRET), own.path / RECORDS
    entries = json.loads(path.read_text())["engines"]
    for entry in entries:
        del entry["sms"]
    signature = hmac.new(SECRET, json.dumps(entries, sort_keys=True).encode(), hashlib.sha256).hexdigest()
    path.write_text(json.dumps({"engines": entries, "signature": signature}))
    assert {record.sms for record in store.records()} == {0}
    assert all(job.ready for job in plan_jobs(own, SMALL, BuilderSettings(), ORIN, store))


def test_longer_profiles_rebuild_what_they_concern(own: Bundle) -> None:
    assert build(own, ProfileLimits(context=65, turn=32)) == {VISION: "kept", DECODER: "built"}
    assert len(list((own.path / "engines").glob("*.plan"))) == 2  # the old engine went


@pytest.mark.parametrize("device", [DeviceIdentity("10.3.1", "8.7"), DeviceIdentity("10.3.0", "11.0")])
def test_another_tensorrt_or_gpu_rebuilds(own: Bundle, device: DeviceIdentity) -> None:
    store = Store(own.path, SECRET)
    assert all(job.ready for job in plan_jobs(own, SMALL, BuilderSettings(), ORIN, store))
    assert not any(job.ready for job in plan_jobs(own, SMALL, BuilderSettings(), device, store))


def test_a_copied_bundle_is_not_trusted(own: Bundle) -> None:
    elsewhere = Store(own.path, b"another device's own key, 32 byte")
    with pytest.raises(EngineError, match=r"were not built on this device.*edgeprune build"):
        elsewhere.records()
    assert not any(job.ready for job in plan_jobs(own, SMALL, BuilderSettings(), ORIN, elsewhere))


def test_a_forged_record_is_not_trusted(own: Bundle) -> None:
    path = own.path / RECORDS
    data = json.loads(path.read_text())
    data["engines"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(EngineError, match="were not built on this device"):
        Store(own.path, SECRET).records()
    path.write_text("{}")
    with pytest.raises(EngineError, match=r"Cannot read .*engines\.json"):
        Store(own.path, SECRET).records()
    (own.path / "engines" / "left.plan").write_bytes(b"of a record that is gone")
    assert set(build(own).values()) == {"built"}
    assert set(build(own).values()) == {"kept"}
    assert len(list((own.path / "engines").glob("*.plan"))) == 2


def test_a_truncated_or_exchanged_plan_is_not_loaded(own: Bundle) -> None:
    store = Store(own.path, SECRET)
    decoder, vision = (next(record for record in store.records() if record.graph == graph) for graph in (DECODER, VISION))
    path = own.path / decoder.file
    plan = path.read_bytes()
    with store.mapped(decoder) as mapped:
        assert mapped[:] == plan
    for altered in (plan[:-1], bytes([plan[0] ^ 1]) + plan[1:], b""):
        path.write_bytes(altered)
        with pytest.raises(EngineError, match="is not the engine that was built here"), store.mapped(decoder):
            pytest.fail("an altered engine was given out")
    (own.path / vision.file).unlink()
    with pytest.raises(EngineError, match="Cannot read"), store.mapped(vision):
        pytest.fail("a missing engine was given out")
    assert build(own) == {VISION: "built", DECODER: "built"}


def test_a_plan_that_changes_while_it_is_loaded_is_not_used(own: Bundle) -> None:
    store = Store(own.path, SECRET)
    record = next(record for record in store.records() if record.graph == VISION)
    path, message = own.path / record.file, "is not the engine that was built here"
    with pytest.raises(EngineError, match=message), store.mapped(record), path.open("r+b") as file:
        file.write(b"\0\0")  # in place: the mapping shows it


def test_nvidias_binding_takes_a_mapped_plan(own: Bundle) -> None:
    store = Store(own.path, SECRET)
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    with store.mapped(store.records()[0]) as plan:
        assert runtime.deserialize_cuda_engine(plan) is None  # without a GPU; what it does not take is a TypeError
    with pytest.raises(TypeError):
        runtime.deserialize_cuda_engine("a text")


def test_an_interruption_keeps_what_is_finished(tiny_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")

    class Interrupted(Exception):
        pass

    def refuse(config: Any) -> None:
        configure(config)
        if (bundle.path / "engines").is_dir() and len(list((bundle.path / "engines").glob("*.plan"))) == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        build(bundle, configure=refuse)
    assert build(bundle) == {VISION: "kept", DECODER: "built"}


def test_other_budgets_rebuild_the_decoder_alone(built: Path, tiny: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path) -> None:
    fewer = KeepPlan(tiny_plan.family, tiny_plan.layers, tiny_plan.geometry, (replace(tiny_plan.cuts[0], keep=4),))
    bundle = export_bundle(tiny, fewer, tmp_path / "fewer")
    assert build(bundle, reuse=(built,)) == {VISION: "taken", DECODER: "built"}
    assert set(build(bundle).values()) == {"kept"}


def test_a_graph_that_is_refused_is_named(own: Bundle) -> None:
    import onnx

    model = onnx.load(own.file(DECODER), load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("NonZero", ["suffix_positions"], ["places"], name="picked"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("places", onnx.TensorProto.INT64, [2, None]))
    onnx.save(model, own.file(DECODER))
    with pytest.raises(EngineError, match=r"cannot parse decoder.onnx: picked \(NonZero\).*edgeprune check"):
        build(own, ProfileLimits(context=66, turn=33))


def test_too_little_memory_is_refused_before_anything_starts(own: Bundle) -> None:
    jobs = plan_jobs(own, ProfileLimits(context=600), BuilderSettings(), ORIN, Store(own.path, SECRET))
    little = Memory(7600, 600, 0, 0, None, None, 0, 0)
    with pytest.raises(EngineError, match=r"about 1\.2 GB, 0\.5 of them on the GPU.* 0\.6 GB are free\. Close.*--ignore-memory"):
        check_memory(jobs, BuilderSettings(), little)
    check_memory(jobs, BuilderSettings(), replace(little, swap_free=8000))
    check_memory(jobs, BuilderSettings(), replace(little, available=None))
    check_memory([replace(job, ready=True) for job in jobs], BuilderSettings(), little)


def test_zram_is_not_counted_as_free_memory(own: Bundle) -> None:
    jobs = plan_jobs(own, ProfileLimits(context=600), BuilderSettings(), ORIN, Store(own.path, SECRET))
    zram = Memory(7600, 600, 3800, 3800, None, None, 3800, 3800)  # what JetPack makes: half of the memory
    with pytest.raises(EngineError, match=r"3\.7 GiB of zram .*: sudo systemctl disable nvzramconfig && sudo reboot$"):
        check_memory(jobs, BuilderSettings(), zram)
    with pytest.raises(EngineError, match="takes about"):
        check_memory(jobs, BuilderSettings(), replace(zram, zram_total=None, zram_free=None))  # /proc/swaps is hidden
    check_memory(jobs, BuilderSettings(), replace(zram, swap_free=8000))
    check_memory(jobs, BuilderSettings(), replace(zram, available=2000))


def test_swap_is_no_memory_of_the_gpu(own: Bundle) -> None:
    jobs = plan_jobs(own, ProfileLimits(context=600), BuilderSettings(), ORIN, Store(own.path, SECRET))
    disk = Memory(7600, 400, 16000, 16000, None, None, 0, 0)
    with pytest.raises(EngineError, match=r"where swap does not count, and 0\.4 GB are free, with 16\.8 GB of swap") as refused:
        check_memory(jobs, BuilderSettings(), disk)
    assert "add swap" not in str(refused.value)
    check_memory(jobs, BuilderSettings(), disk, jetson=False)  # a graphics card has memory of its own
    with pytest.raises(EngineError, match=r"about 1\.2 GB, and 0\.4 GB are free\. Close"):
        check_memory(jobs, BuilderSettings(), replace(disk, swap_free=4, zram_total=4, zram_free=4), jetson=False)
    largest = max(jobs, key=lambda job: job.weights)
    assert sum(largest.peak_parts(BuilderSettings()).values()) == largest.peak_bytes(BuilderSettings())


def test_an_8_gb_board_as_it_comes_builds_a_2b_decoder_at_int4_alone(tmp_path: Path) -> None:
    nano, settings = orin_nano().machine(tmp_path).memory, BuilderSettings()
    layers, head = 1_310_195_712, 233_373_696  # Qwen2-VL-2B's weights
    int4 = BuildJob(DECODER, ProfileLimits(), (), int(layers * PRECISIONS["int4"].layers + head * PRECISIONS["int4"].head))
    check_memory([int4], settings, nano)
    fp16 = replace(int4, weights=2 * (layers + head))
    with pytest.raises(EngineError, match=r"takes about 12\.0 GB, 3\.6 of them on the GPU.*3\.7 GiB of zram"):
        check_memory([fp16], settings, nano)


def test_a_build_on_a_board_with_zram_stops_unless_told_otherwise(own: Bundle, tmp_path: Path) -> None:
    nano = orin_nano()
    nano.files["proc/meminfo"] = meminfo(7.44, 0.4, swap_gib=3.7)
    request = BuildRequest(own, ProfileLimits(context=601), BuilderSettings())
    given: dict[str, Any] = {
        "trt": trt,
        "device": ORIN,
        "secret": SECRET,
        "configure": configure,
        "machine": nano.machine(tmp_path),
    }
    with pytest.raises(EngineError, match="nvzramconfig"):
        build_bundle(request, **given)
    assert len(build_bundle(replace(request, ignore_memory=True), **given)) == 2


def test_a_gpu_without_bfloat16_is_told_so(tiny_bundle: Bundle) -> None:
    brain = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, target="jetpack6", precision="bf16"))
    with pytest.raises(EngineError, match=r"This GPU \(SM 7\.2\) has no bfloat16: .*Orin .*--precision fp16"):
        build(brain, device=DeviceIdentity("8.6.2", "7.2"))


@pytest.mark.parametrize(
    ("precision", "capability", "kind", "instead"),
    [("fp8", "8.7", "FP8", "w8a8"), ("nvfp4", "8.7", "FP4", "int4"), ("nvfp4", "9.0", "FP4", "int4")],
)
def test_a_gpu_without_small_floats_is_told_so(
    tiny_bundle: Bundle, precision: str, capability: str, kind: str, instead: str
) -> None:
    brain = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, target="jetpack7.2", precision=precision))
    told = rf"This GPU \(SM {re.escape(capability)}\) has no {kind}: .*Thor .*--precision {instead}"
    with pytest.raises(EngineError, match=told):
        build(brain, device=DeviceIdentity("10.16.0", capability))


def test_trtexec_builds_the_same(own: Bundle) -> None:
    jobs = {job.graph: job for job in plan_jobs(own, SMALL, BuilderSettings(level=2))}
    command = trtexec_command(own, jobs[DECODER], BuilderSettings(level=2))
    assert command.startswith("trtexec --onnx=")
    assert "--stronglyTyped --builderOptimizationLevel=2" in command and "--fp16" not in command
    assert f"--timingCacheFile={timing_cache()} " in command
    image, text = command.split("--profile=1")
    assert "--profile=0" in image and "visual_embeds:1x12x48" in image and "visual_embeds:1x0x48" in text
    assert "past_key_values.0.key:65x2x8" in text
    assert "--profile" not in (vision := trtexec_command(own, jobs[VISION], BuilderSettings())) and "Shapes" not in vision


def test_a_jetson_has_trtexec_outside_its_path(own: Bundle, tiny: LoadedModel, tiny_plan: KeepPlan, tmp_path: Path) -> None:
    bundle = export_bundle(tiny, tiny_plan, tmp_path / "orin", lowering=Lowering(TARGETS["jetpack6"], "fp16"))
    (job, *_) = plan_jobs(bundle, SMALL, BuilderSettings())
    assert trtexec_command(bundle, job, BuilderSettings()).startswith("/usr/src/tensorrt/bin/trtexec --onnx=")


SKIPPED = "Tactic Device request: 1000MB Available: 302MB. Device memory is insufficient to use tactic."


@pytest.mark.parametrize(
    ("warnings", "said"),
    [
        ([], r"^TensorRT cannot build \S+: (?!.*of too little memory).* See: edgeprune check"),
        (["Detected layernorm nodes in FP16."], r"^TensorRT cannot build \S+: (?!.*of too little memory).* See: edgeprune check"),
        ([SKIPPED, SKIPPED], "It warned of too little memory \\(2 times\\): Tactic Device request.* Close other programs"),
        (["Skipping tactic 3 due to insuficient memory on requested size of 2243 detected\nTry decreasing"], "detected Close"),
        (
            ["Requested amount of GPU memory (2833252352 bytes) could not be allocated."],
            r"of too little memory \(once\): Requested",
        ),
    ],
)
def test_a_build_that_lacks_memory_says_so(own: Bundle, warnings: list[str], said: str) -> None:
    severity = trt.ILogger.Severity

    class Starved:
        def __init__(self, log: Any) -> None:
            self._log, self._builder = log, trt.Builder(log)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._builder, name)

        def build_serialized_network(self, *_: Any) -> None:
            for warning in warnings:
                self._log.log(severity.WARNING, warning)
            self._log.log(severity.INFO, "Out of memory, were it no piece of information")
            self._log.log(severity.ERROR, "Error Code 10: Could not find any implementation for node {ForeignNode[a...b]}.")

    with pytest.raises(EngineError, match=said):
        build(own, ProfileLimits(context=66, turn=33), trt=SimpleNamespace(**{**vars(trt), "Builder": Starved}))


def test_attention_without_a_kernel_names_another_target(own: Bundle) -> None:
    class Lacking:
        def __init__(self, log: Any) -> None:
            self._log, self._builder = log, trt.Builder(log)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._builder, name)

        def build_serialized_network(self, *_: Any) -> None:
            # What TensorRT-RTX 1.7.1 says of a GPU of SM 9.0.
            self._log.log(trt.ILogger.Severity.ERROR, "Attention operation was not supported by a dedicated kernel.  (See https")

    with pytest.raises(EngineError, match=r"no attention in one kernel for this GPU.* --target jetpack7,"):
        build(own, ProfileLimits(context=67, turn=33), trt=SimpleNamespace(**{**vars(trt), "Builder": Lacking}))


def test_fp32_is_built_without_tf32(own: Bundle) -> None:
    def flag(settings: BuilderSettings) -> list[bool]:
        flags = []

        def look(config: Any) -> None:
            configure(config)
            flags.append(config.get_flag(trt.BuilderFlag.TF32))

        build_engine(trt, own.file(VISION), shape_profiles(own, SMALL)[VISION], settings, configure=look)
        return flags

    of_fp32 = BuildRequest.of(own.path).settings
    assert (flag(BuilderSettings()), flag(of_fp32)) == ([True], [False])
    (job,) = [job for job in plan_jobs(own, SMALL, of_fp32) if job.graph == VISION]
    assert "--noTF32" in trtexec_command(own, job, of_fp32) and "--noTF32" not in trtexec_command(own, job, BuilderSettings())


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="make no sense"):
        ProfileLimits(context=10, turn=20)
    with pytest.raises(UsageError, match="0 images"):
        ProfileLimits(images=0)


def test_without_tensorrt_the_remedy_is_said(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        tensorrt()
    nano = orin_nano()
    bare = replace(nano.machine(tmp_path), debs={}, software=replace(nano.software, packages={}))
    with pytest.raises(EngineError, match=r"TensorRT is not installed\. Remedy: sudo apt .*install tensorrt"):
        tensorrt(bare)


def test_the_command_says_what_it_would_do(own: Bundle) -> None:
    shown = CliRunner().invoke(main, ["build", str(own.path), "--dry-run", "--context", "128", "--turn", "64"])
    assert shown.exit_code == 0 and "trtexec --onnx=" in shown.output and "and 5 more" in shown.output
    listed = json.loads(CliRunner().invoke(main, ["build", str(own.path), "--dry-run", "--json"]).output)
    assert [engine["graph"] for engine in listed["engines"]] == [VISION, DECODER]
    assert all(sum(engine["peak_parts"].values()) == engine["peak_bytes"] for engine in listed["engines"])
    assert "0.6 TensorRT + 0.0 copies of the weights + 0.0 weights on the GPU + 0.5 workspace on the GPU" in shown.output
    assert "while they answer" in shown.output and "One block of scratch memory comes on top" in shown.output
    parts, decoder = listed["answering"]["parts"], own.manifest.decoder
    row, stored = 2 * decoder.kv_heads * decoder.head_dim * 4, map(own.plan.tokens_cached, range(decoder.layers))
    assert parts.pop("KV caches") == row * sum((1 + 2048) + (1 + tokens) for tokens in stored)
    assert parts == {job.graph: job.weights for job in plan_jobs(own, ProfileLimits(), BuilderSettings())}
    refused = CliRunner().invoke(main, ["build", str(own.path)])
    assert refused.exit_code == 1 and "TensorRT cannot be used here" in refused.output
    assert CliRunner().invoke(main, ["build", str(own.path), "--dry-run", "--turn", "0"]).exit_code == 2

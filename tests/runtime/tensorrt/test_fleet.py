"""Engines that one board builds and its fleet's key signs: taken on equal boards, refused everywhere else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from device_simulation import SimulatedDriver, simulated_plan, simulated_tensorrt
from PIL import Image
from simulated_device import LIMITS

import edgeprune.runtime.server
from edgeprune.bundle import DECODER, EMBED, MANIFEST, Bundle
from edgeprune.bundle.signing import (
    ENGINE_RECORDS,
    SIGNATURE,
    Signature,
    check_engines_signature,
    make_key,
    sign_engines,
    sign_manifest,
    signed_text,
)
from edgeprune.cli import main
from edgeprune.errors import BundleError, EngineError, UsageError
from edgeprune.runtime import load
from edgeprune.runtime.backends.tensorrt import backend, build
from edgeprune.runtime.backends.tensorrt.bindings import DeviceIdentity
from edgeprune.runtime.backends.tensorrt.build import BuildRequest, build_bundle
from edgeprune.runtime.backends.tensorrt.builder import BuilderSettings, Built
from edgeprune.runtime.backends.tensorrt.store import Store

pytest.importorskip("cryptography", reason='needs pip install "edgeprune[sign]"')

BOARD = DeviceIdentity("10.3.0", "8.7", 8, "aarch64")
LIMIT_OPTIONS = ["--context", LIMITS.context, "--turn", LIMITS.turn, "--images", LIMITS.images, "--unpruned"]


class Board:
    """A device that the test makes up. `loaded`: how often TensorRT was given a plan."""

    def __init__(self, patch: pytest.MonkeyPatch, bundle: Bundle, data: Path) -> None:
        self.identity, self.loaded, self._bundle, self._patch = BOARD, 0, bundle, patch
        patch.setattr(build, "build_engine", self._build_engine)
        for module in (build, backend):
            patch.setattr(module, "load_cudart", lambda: None)
            patch.setattr(module, "identity", lambda trt, cudart: self.identity)
            patch.setattr(module, "tensorrt", lambda machine=None: self._tensorrt())
        patch.setattr(backend, "Driver", lambda cudart: self._driver)
        self.renew(data)

    def renew(self, data: Path, identity: DeviceIdentity = BOARD) -> None:
        """Become another board: another key, an empty memory."""
        self._patch.setenv("XDG_DATA_HOME", str(data))
        self.identity, self.loaded = identity, 0

    def _tensorrt(self) -> Any:
        self._driver = SimulatedDriver()
        trt = simulated_tensorrt(self._driver)
        deserialize = trt.Runtime.deserialize_cuda_engine

        def counted(*given: Any) -> Any:
            self.loaded += 1
            return deserialize(*given)

        trt.Runtime.deserialize_cuda_engine = counted
        return trt

    def _build_engine(self, trt: Any, onnx: Path, profiles: Any, settings: BuilderSettings, **_: Any) -> Built:
        graph = asdict(self._bundle.manifest.graphs[f"onnx/{onnx.name}"])
        return Built(memoryview(simulated_plan(self._bundle.path / "onnx" / onnx.name, graph, profiles)), 0.0, 0.0, b"")


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle, tmp_path: Path) -> Board:
    return Board(monkeypatch, tiny_bundle, tmp_path / "first")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the fleet's private key, whose public one ends in .pub."""
    path = tmp_path_factory.mktemp("keys") / "fleet.pem"
    make_key(path)
    return path


@pytest.fixture(scope="module")
def built(tiny_bundle: Bundle, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a bundle with signed engines that the first board built."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(tiny_bundle.path, folder / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        Board(patch, tiny_bundle, folder / "data")
        signed = invoke("build", folder / "bundle", *LIMIT_OPTIONS, "--sign", key)
        assert signed.exit_code == 0 and "both with --trust fleet.pub" in signed.output, signed.output
    yield folder / "bundle"


@pytest.fixture
def signed(built: Path, board: Board, tmp_path: Path) -> Path:
    """Return a copy of that bundle on a second board."""
    shutil.copytree(built, tmp_path / "copied")
    board.renew(tmp_path / "second")
    return tmp_path / "copied"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refusal(board: Board, folder: Path, *keys: Path) -> str:
    """Return why a bundle's engines are not loaded; none of them may have reached TensorRT."""
    with pytest.raises(EngineError) as caught:
        load(folder, provider="tensorrt", trust=keys)
    assert board.loaded == 0 and "\n" not in str(caught.value) and caught.value.hint
    return str(caught.value)


def test_a_board_answers_from_engines_that_an_equal_one_built(
    signed: Path, board: Board, key: Path, tiny_image: Image.Image, tmp_path: Path
) -> None:
    public = key.with_suffix(".pub")
    with pytest.raises(EngineError, match="were not built on this device"):  # as without the fleet's key
        load(signed, provider="tensorrt")
    expected = load(signed).generate(tiny_image, "Hi", max_tokens=4)
    for keys in ([public], [public.read_bytes()], [make_key(tmp_path / "other.pem")[0], public]):
        with load(signed, provider="tensorrt", trust=keys) as runtime:
            assert runtime.generate(tiny_image, "Hi", max_tokens=4).text == expected.text
        board.renew(tmp_path / "empty")
    assert not list((tmp_path / "empty").rglob("*.key"))  # no state of the board is needed


def test_more_sms_are_no_reason_to_refuse(signed: Path, board: Board, key: Path, tmp_path: Path) -> None:
    board.renew(tmp_path / "large", replace(BOARD, sms=16))
    load(signed, provider="tensorrt", trust=[key.with_suffix(".pub")]).close()
    assert board.loaded > 0


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (replace(BOARD, capability="11.0"), r"is of TensorRT 10\.3\.0 for SM 8\.7, this is 10\.3\.0 on SM 11\.0\."),
        (replace(BOARD, tensorrt="10.3.1"), r"this is 10\.3\.1 on SM 8\.7\."),
        (replace(BOARD, sms=4), r"was built for 8 SMs, and this GPU has 4 in its power mode\. .*nvpmodel"),
        (replace(BOARD, processor="x86_64"), "was built on a machine of aarch64, and this one is x86_64"),
    ],
)
def test_an_unequal_board(signed: Path, board: Board, key: Path, tmp_path: Path, here: DeviceIdentity, said: str) -> None:
    board.renew(tmp_path / "unequal", here)
    message = refusal(board, signed, key.with_suffix(".pub"))
    assert re.search(said, message) and "edgeprune build BUNDLE --sign KEY.pem" in message


def _unsigned(folder: Path, key: Path, elsewhere: Path) -> None:
    (folder / "engines" / SIGNATURE).unlink()


def _other_key(folder: Path, key: Path, elsewhere: Path) -> None:
    make_key(elsewhere / "other.pem")
    sign_engines(folder, elsewhere / "other.pem")


def _borrowed_name(folder: Path, key: Path, elsewhere: Path) -> None:
    mine = Signature.load(folder / "engines")
    _other_key(folder, key, elsewhere)
    replace(Signature.load(folder / "engines"), key=mine.key).save(folder / "engines")


def _changed_records(folder: Path, key: Path, elsewhere: Path) -> None:
    path = folder / ENGINE_RECORDS
    path.write_text(path.read_text().replace('"sms": 8', '"sms": 1'))


def _changed_records_and_digest(folder: Path, key: Path, elsewhere: Path) -> None:
    mine = Signature.load(folder / "engines")
    _changed_records(folder, key, elsewhere)
    _other_key(folder, key, elsewhere)
    found = Signature.load(folder / "engines")
    replace(mine, engines_sha256=found.engines_sha256).save(folder / "engines")


def _changed_engine(folder: Path, key: Path, elsewhere: Path) -> None:
    for path in (folder / "engines").glob("*.plan"):
        path.write_bytes(path.read_bytes().replace(b'"profiles"', b'"profilez"'))


def _engine_that_is_gone(folder: Path, key: Path, elsewhere: Path) -> None:
    for path in (folder / "engines").glob("*.plan"):
        path.unlink()


def _other_bundle(folder: Path, key: Path, elsewhere: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"precision": "fp16"}))


def _signature_of_the_bundle(folder: Path, key: Path, elsewhere: Path) -> None:
    sign_manifest(folder, key)
    shutil.copy(folder / SIGNATURE, folder / "engines")


def _bundle_signature_as_one_of_engines(folder: Path, key: Path, elsewhere: Path) -> None:
    made = sign_manifest(folder, key)
    replace(Signature.load(folder / "engines"), signature=made.signature).save(folder / "engines")


def _malformed(folder: Path, key: Path, elsewhere: Path) -> None:
    (folder / "engines" / SIGNATURE).write_text("[" * 10**5)


def _no_records(folder: Path, key: Path, elsewhere: Path) -> None:
    shutil.rmtree(folder / "engines")


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (_unsigned, "engines is not signed"),
        (_other_key, "which is none of those required"),
        (_borrowed_name, "is wrong: it was not made with the key that it names"),
        (_changed_records, "records in .* were changed after they had been signed"),
        (_changed_records_and_digest, "is wrong: it was not made with the key that it names"),
        (_changed_engine, "is not the engine that was signed"),
        (_engine_that_is_gone, "Cannot read .*plan: No such file"),
        (_other_bundle, "was signed for another bundle"),
        (_signature_of_the_bundle, "records in .* were changed"),
        (_bundle_signature_as_one_of_engines, "is wrong: it was not made with the key that it names"),
        (_malformed, r"signature\.json is malformed.* Sign it again"),
        (_no_records, "There is no engine of .* build BUNDLE --sign KEY.pem"),
    ],
)
def test_what_is_not_as_it_was_signed(
    attack: Callable[[Path, Path, Path], None], said: str, signed: Path, board: Board, key: Path, tmp_path: Path
) -> None:
    attack(signed, key, tmp_path)
    message = refusal(board, signed, key.with_suffix(".pub"))
    assert re.search(said, message) and message.endswith(("KEY.pem", "Sign it again."))


def test_a_signature_of_engines_is_none_of_the_bundle(signed: Path, key: Path) -> None:
    of_engines = Signature.load(signed / "engines")
    of_engines.save(signed)
    with pytest.raises(BundleError, match="is wrong: it was not made with the key that it names"):
        Bundle.load(signed, require_signature=[key.with_suffix(".pub")])
    texts = [signed_text("00"), signed_text("00", "00"), signed_text("00", "")]
    assert len({text.split(b"\n")[0] for text in texts}) == 2 and len(set(texts)) == 3


def test_engines_that_were_signed_for_another_export_are_not_its(
    signed: Path, tiny_bundle: Bundle, board: Board, key: Path
) -> None:
    # The key holder signs again, but the records name another graph.
    decoder = next(record for record in Store(signed, trust=[key.with_suffix(".pub")]).records() if record.graph == DECODER)
    Store(signed, b"a secret of 32 bytes, or nearly.").add(replace(decoder, graph=EMBED), b"plan")
    sign_engines(signed, key)
    assert "There is no engine" in refusal(board, signed, key.with_suffix(".pub"))


def test_the_fleets_key_leaves_own_engines_to_the_device(signed: Path, board: Board, key: Path) -> None:
    public = key.with_suffix(".pub")
    assert invoke("build", signed, *LIMIT_OPTIONS).exit_code == 0  # this board builds for itself
    load(signed, provider="tensorrt").close()
    board.loaded = 0
    assert "were changed after they had been signed" in refusal(board, signed, public)
    again = invoke("build", signed, *LIMIT_OPTIONS, "--sign", key, "--json")
    assert again.exit_code == 0 and json.loads(again.output)["signed"]
    assert {engine["how"] for engine in json.loads(again.output)["engines"]} == {"kept"}
    for keys in ([public], []):
        load(signed, provider="tensorrt", trust=keys).close()


def test_what_does_not_say_for_which_board_it_is_is_not_signed(built: Path, board: Board, key: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "older")
    request = BuildRequest(Bundle.load(tmp_path / "older"), LIMITS, BuilderSettings(), sign=key)
    build_bundle(replace(request, sign=None))
    store = Store(request.bundle.path)
    for record in store.records():
        store.add(replace(record, sms=0), (request.bundle.path / record.file).read_bytes())
    with pytest.raises(EngineError, match=r"does not say for which boards it is\. Delete "):
        build_bundle(request)
    with pytest.raises(EngineError, match="were changed"):
        check_engines_signature(request.bundle.path, (request.bundle.path / ENGINE_RECORDS).read_bytes(), [key.with_suffix(".pub")])


def test_a_key_that_cannot_sign_is_found_before_the_build(tiny_bundle: Bundle, board: Board, key: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    refused = invoke("build", tmp_path / "bundle", "--sign", key.with_suffix(".pub"))
    assert refused.exit_code == 2 and "no private key" in refused.output
    assert not (tmp_path / "bundle" / "engines").exists()
    dry = invoke("build", tmp_path / "bundle", "--sign", key, "--dry-run")
    assert dry.exit_code == 2 and "nothing that could be signed" in dry.output


def test_the_key_is_for_engines_alone(signed: Path, board: Board, key: Path, tiny_image: Image.Image) -> None:
    public = key.with_suffix(".pub")
    with pytest.raises(UsageError, match="Only --provider tensorrt loads engines"):
        load(signed, trust=[public])
    tiny_image.save(signed / "i.png")
    data = signed / "data.jsonl"
    data.write_text('{"image": "i.png", "prompt": "Hi", "answer": "x"}\n')
    model = invoke("eval", "tabletop", "--data", data, "--trust", public)
    assert model.exit_code == 2 and "leave --provider and --trust out" in model.output


def test_every_command_that_opens_engines_takes_the_key(
    signed: Path, board: Board, key: Path, tiny_image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, other, image = key.with_suffix(".pub"), make_key(tmp_path / "other.pem")[0], tmp_path / "image.png"
    tiny_image.save(image)
    data = tmp_path / "data.jsonl"
    data.write_text('{"image": "image.png", "prompt": "Hi", "answer": "x"}\n')
    commands: list[list[object]] = [
        ["run", signed, "--image", image, "--prompt", "Hi", "--max-tokens", 2],
        ["eval", signed, "--data", data, "--max-tokens", 2],
        ["profile", signed, "-o", tmp_path / "times.json", "--repeats", 1],
        ["bench", signed, "--image", image, "--tokens", 2, "--repeats", 1],
    ]
    for command in commands:
        board.renew(tmp_path / "other board")
        refused = invoke(*command, "--provider", "tensorrt", "--trust", other)
        assert refused.exit_code == 1 and "none of those required" in refused.output and board.loaded == 0
        if command[0] != "bench":  # which starts processes, on a machine without the simulation
            taken = invoke(*command, "--provider", "tensorrt", "--trust", public)
            assert taken.exit_code == 0 and board.loaded > 0, taken.output
    given: dict[str, Any] = {}
    monkeypatch.setattr(edgeprune.runtime.server, "serve", lambda bundle, options, announce, **opening: given.update(opening))
    assert invoke("serve", signed, "--provider", "tensorrt", "--trust", public).exit_code == 0
    assert given["trust"] == (public,)

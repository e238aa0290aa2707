"""Models of the Hugging Face Hub, from one of our own on the loopback: small files first, weights after all checks."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
from click.testing import CliRunner
from hub_server import Hub, serve
from repository import TESTS

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import fetch_weights, load_model, resolve_model
from edgeprune.cli import main
from edgeprune.errors import EdgePruneError, UnsupportedModelError, UsageError

NAME = "maker/tiny-VL"
WEIGHTS = "model.safetensors"
NEVER = {"pytorch_model.bin": b"x", "original/params.json": b"{}", "model.gguf": b"GGUF", "onnx/model.onnx": b"x"}


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve the tiny model as maker/tiny-VL, with files that are never needed; the cache is empty."""
    constants = huggingface_hub.constants
    with serve() as hub:
        hub.add(NAME, tiny_folder, NEVER)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for waiting in (huggingface_hub.file_download, huggingface_hub.utils._http):
            monkeypatch.setattr(waiting, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield hub


def commit_of(hub: Hub, branch: str = "main") -> str:
    return hub.models[NAME].names[branch]


def test_checks_come_before_weights_and_nothing_else_is_downloaded(hub: Hub, tiny_folder: Path) -> None:
    folder = resolve_model(NAME)
    small = {path.name for path in tiny_folder.iterdir()} - {WEIGHTS}
    assert set(hub.loaded(NAME)) == {path.name for path in folder.path.iterdir()} == small
    assert (folder.name, folder.commit) == (NAME, commit_of(hub))
    fetch_weights(folder)
    assert set(hub.loaded(NAME)) == small | {WEIGHTS}
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == {
        path.name: path.read_bytes() for path in tiny_folder.iterdir()
    }
    assert folder.bytes == (tiny_folder / WEIGHTS).stat().st_size
    asked = len(hub.requests)
    fetch_weights(folder)
    assert len(hub.requests) == asked


def test_a_download_without_a_terminal_prints_lines(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = resolve_model(NAME)
    assert capsys.readouterr().err == ""
    fetch_weights(folder)
    said = capsys.readouterr().err
    assert "100%" in said and "\r" not in said and all(line.strip() for line in said.splitlines())


def test_a_model_is_loaded_from_its_id_alone(hub: Hub) -> None:
    assert len(load_model(resolve_model(NAME), on_disk=True).family.decoder().layers) == 3


def test_weights_in_several_files_come_by_their_index(hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(tiny_folder, tmp_path / "parts"))
    (parts / WEIGHTS).rename(parts / "model-00001-of-00001.safetensors")
    (parts / "consolidated.safetensors").write_bytes(b"of another layout")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add("maker/parts", parts)
    folder = resolve_model("maker/parts")
    fetch_weights(folder)
    assert [path.name for path in folder.weights] == ["model-00001-of-00001.safetensors"]
    assert "consolidated.safetensors" not in hub.loaded("maker/parts")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, tiny_folder: Path) -> None:
    first = commit_of(hub)
    second = hub.add(NAME, tiny_folder, {"LICENSE.txt": b"new"}, "next")
    assert resolve_model(NAME).commit == resolve_model(NAME, revision=first).commit == first
    assert resolve_model(NAME, revision="next").commit == resolve_model(NAME, revision=second).commit == second
    with pytest.raises(UsageError, match=f"{NAME} has no revision v9.*{hub.url}/{NAME}/tree/main"):
        resolve_model(NAME, revision="v9")
    with pytest.raises(UsageError, match=r"has no revision 0{40}"):
        resolve_model(NAME, revision="0" * 40)


def test_a_folder_comes_before_an_id(hub: Hub, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("maker").mkdir()
    Path(NAME).symlink_to(tiny_folder)
    folder = resolve_model(NAME)
    assert (folder.path, folder.hub_id, hub.requests) == (Path(NAME), "", [])
    for name in (NAME, "tabletop"):
        with pytest.raises(UsageError, match=r"has no revisions.*Leave --revision out"):
            resolve_model(name, revision="main")


def test_a_folder_of_the_cache_is_the_model(hub: Hub, tmp_path: Path) -> None:
    fetch_weights(resolve_model(NAME))
    asked, commit = len(hub.requests), commit_of(hub)
    cached = tmp_path / "cache" / "models--maker--tiny-VL"
    snapshot = cached / "snapshots" / commit
    for name, revision in ((cached, None), (cached, "main"), (cached, commit), (snapshot, None), (snapshot, commit)):
        folder = resolve_model(str(name), revision=revision)
        assert (folder.path, folder.commit) == (snapshot, commit)
    with pytest.raises(UsageError, match=f"is at commit {commit}"):
        resolve_model(str(snapshot), revision="main")
    with pytest.raises(UsageError, match=r"has no revision next.*hf download maker/tiny-VL --revision next"):
        resolve_model(str(cached), revision="next")
    with pytest.raises(UsageError, match=f"lacks the files of its commit 0000.*{'0' * 40}$"):
        resolve_model(str(cached), revision="0" * 40)
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(UnsupportedModelError, match=f"{snapshot} has no safetensors weights.*Download the whole"):
        resolve_model(str(snapshot))
    assert len(hub.requests) == asked


def test_a_cut_connection_goes_on_within_the_command(hub: Hub, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.models[NAME].cut[WEIGHTS] = [1000, 0, 500]
    folder = resolve_model(NAME)
    fetch_weights(folder)
    assert [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(WEIGHTS)] == [
        "",
        "bytes=1000-",
        "bytes=1000-",
        "bytes=1500-",
    ]
    assert (folder.path / WEIGHTS).read_bytes() == (tiny_folder / WEIGHTS).read_bytes()


def test_an_interrupted_download_goes_on_with_the_same_command(hub: Hub, tmp_path: Path) -> None:
    hub.models[NAME].cut[WEIGHTS] = [1000, *[0] * 9]
    with pytest.raises(EdgePruneError, match=f"download of {NAME} was interrupted.*The same command goes on") as caught:
        fetch_weights(resolve_model(NAME))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    hub.models[NAME].cut.clear()
    hub.requests.clear()
    fetch_weights(resolve_model(NAME))
    assert hub.loaded(NAME) == [WEIGHTS]  # all others were kept


REFUSALS: dict[str, tuple[tuple[int, str], str, str, int]] = {
    "gated": ((401, "GatedRepo"), "only to those who accepted its licence", rf"Accept it on .*/{NAME}, then: hf auth login", 1),
    "not granted": ((403, "GatedRepo"), "only to those who accepted its licence", "then: hf auth login", 1),
    "private": ((401, "RepoNotFound"), "has no such model, or it is private", "for a private model: hf auth login", 2),
    "down": ((503, ""), "did not give maker/tiny-VL: Server error '503", "Try again later", 1),
    "token": ((403, ""), "does not give maker/tiny-VL to this token", "hf auth login", 1),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_refusal_of_the_hub_is_one_line_with_its_remedy(reason: str, hub: Hub) -> None:
    answer, words, remedy, code = REFUSALS[reason]
    hub.models[NAME].refused = answer
    with pytest.raises(EdgePruneError, match=f"{words}.*{remedy}") as caught:
        resolve_model(NAME)
    assert caught.value.exit_code == code and "\n" not in str(caught.value)


def test_an_unknown_id_is_one_line(hub: Hub) -> None:
    with pytest.raises(UsageError, match=f"no model folder maker/none, and {hub.url} has no such model"):
        resolve_model("maker/none")
    with pytest.raises(UsageError, match="no model of the hub can have this id"):
        resolve_model("maker/a--b")


def test_without_a_network_the_cache_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_weights(resolve_model(NAME))
    asked = len(hub.requests)
    nowhere = "http://127.0.0.1:9"
    for setting, value in (("ENDPOINT", nowhere), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(huggingface_hub.constants, setting, value)
        folder = resolve_model(NAME)
        fetch_weights(folder)
        assert folder.commit == commit_of(hub) and folder.weights
    assert len(hub.requests) == asked
    with pytest.raises(EdgePruneError, match=r"has nothing of maker/other, and HF_HUB_OFFLINE forbids.*Unset HF_HUB_OFFLINE"):
        resolve_model("maker/other")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(EdgePruneError, match=f"has nothing of maker/other, and {nowhere} cannot be reached.*HF_ENDPOINT"):
        resolve_model("maker/other")


def test_a_part_of_a_model_in_the_cache_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EdgePruneError, match=f"of {NAME} at {folder.commit}, and HF_HUB_OFFLINE forbids"):
        fetch_weights(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_a_full_disk_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model(NAME)
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(EdgePruneError, match=r"maker/tiny-VL takes .* GB in .*, where 0.0 GB are free.*set HF_HOME"):
            fetch_weights(folder)

    def full(*values: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    with pytest.raises(EdgePruneError, match=r"no space left for maker/tiny-VL in .*set HF_HOME"):
        fetch_weights(folder)


def test_another_answer_than_a_hubs_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *values, **options: json.loads("<html>"))
    with pytest.raises(EdgePruneError, match=r"did not answer as the hub does.*HF_ENDPOINT"):
        resolve_model(NAME)


def test_models_that_are_refused_cost_no_weights(hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    (other / "README.md").write_text("---\nlicense: x\nbase_model:\n- maker/tiny-VL\n---\n")
    hub.add("maker/tiny-VL-bnb-4bit", other)
    with pytest.raises(UnsupportedModelError, match=r"quantized with bitsandbytes.*: maker/tiny-VL.$"):
        resolve_model("maker/tiny-VL-bnb-4bit")
    assert WEIGHTS not in hub.loaded("maker/tiny-VL-bnb-4bit")
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(tiny_folder / name, pickles)
    hub.add("maker/pickles", pickles, {"pytorch_model.bin": b"x"})
    with pytest.raises(UnsupportedModelError, match="maker/pickles has no safetensors weights; pickle"):
        resolve_model("maker/pickles")
    (tmp_path / "none").mkdir()
    hub.add("maker/tiny-VL-GGUF", tmp_path / "none", {"tiny-Q4_K_M.gguf": b"GGUF", "README.md": b"base_model: maker/tiny-VL\n"})
    with pytest.raises(UnsupportedModelError, match=r"maker/tiny-VL-GGUF is GGUF.*original safetensors checkpoint: maker/tiny-VL"):
        resolve_model("maker/tiny-VL-GGUF")


def test_code_is_downloaded_only_where_it_is_trusted(hub: Hub, tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text()) | {"auto_map": {"AutoModelForImageTextToText": "ours.Ours"}}
    hub.add(NAME, tiny_folder, {"ours.py": b"pass", "config.json": json.dumps(config).encode()})
    assert not resolve_model(NAME).trusted and "ours.py" not in hub.loaded(NAME)
    assert resolve_model(NAME, trust_remote_code=True).trusted and "ours.py" in hub.loaded(NAME)


def test_an_adapter_of_the_hub_is_merged(hub: Hub, tiny_folder: Path) -> None:
    plain = TESTS / "support" / "adapters" / "plain"
    hub.add("maker/lora", plain)
    folder = resolve_model(NAME, adapter="maker/lora")
    assert hub.loaded("maker/lora") == ["adapter_config.json"]
    fetch_weights(folder)
    assert sorted(hub.loaded("maker/lora")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert folder.source().weights_sha256 == resolve_model(str(tiny_folder), adapter=str(plain)).source().weights_sha256
    with pytest.raises(UnsupportedModelError, match=r"maker/lora is an adapter of maker/tiny-VL.*--adapter maker/lora -o BUNDLE"):
        resolve_model("maker/lora")


def test_an_estimate_downloads_no_weights(hub: Hub) -> None:
    hub.add("maker/lora", TESTS / "support" / "adapters" / "plain")
    options = ("--device", "orin-nano", "--adapter", "maker/lora", "--image-size", "84x112", "--revision", commit_of(hub))
    result = CliRunner().invoke(main, ["estimate", NAME, *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Fits in 8 GiB")
    assert "config.json" in hub.loaded(NAME) and WEIGHTS not in hub.loaded(NAME)
    assert hub.loaded("maker/lora") == ["adapter_config.json"]


def test_what_the_library_logs_is_left_as_it_was(hub: Hub) -> None:
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    resolve_model(NAME)
    assert logger.level == before


def test_a_bundle_remembers_the_commit(hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    commit, bundle = commit_of(hub), tmp_path / "b"
    run("export", NAME, "-o", bundle, "--image-size", "84x112")
    source = Bundle.load(bundle).manifest.source
    assert (source.model, source.revision, source.adapter) == (NAME, commit, "")
    assert source.weights_sha256 == resolve_model(str(tiny_folder)).source().weights_sha256
    assert f"revision       {commit}" in run("inspect", bundle)
    assert json.loads(run("inspect", bundle, "--json"))["revision"] == commit
    changed = hub.add(NAME, tiny_folder, {WEIGHTS: b"other weights"})
    assert resolve_model(NAME).commit == changed
    run("verify", bundle)


COMMANDS = {
    "export": ("export", NAME, "-o", "b", "--image-size", "84x112"),
    "eval": ("eval", NAME, "--data", "scenes/dataset.jsonl", "--limit", "1"),
    "calibrate": ("calibrate", NAME, "--data", "scenes/dataset.jsonl", "--method", "fastv", "--budget", "0.5", "-o", "p.json"),
}
ALONE = """
import sys
from edgeprune.cli import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_the_settings_of_the_hub_and_refuse_without_torch(command: str, hub: Hub, tmp_path: Path) -> None:
    CliRunner().invoke(main, ["tabletop", str(tmp_path / "scenes"), "--scenes", "1"])
    hub.models[NAME].refused = (403, "GatedRepo")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_mine"}
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | settings
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, *COMMANDS[command]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"Error: {NAME} is given only to those who accepted its licence.")
    assert (ran.returncode, ran.stdout) == (1, "False\n")
    assert "Bearer hf_mine" in hub.tokens

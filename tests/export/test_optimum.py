"""optimum knows EdgePrune: its families in the TasksManager, and `edgeprune export` as `optimum-cli export edgeprune`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig

from edgeprune.cli import main
from edgeprune.cli.commands.export import export
from edgeprune.cli.optimum_plugin import command_line, shared_options
from edgeprune.device.system import Software
from edgeprune.errors import MissingExtraError, UnsupportedModelError, require_extra
from edgeprune.export.optimum import EXPORTER, register_families
from edgeprune.registry import FAMILIES, TASK
from edgeprune.tabletop import MODEL_FOLDER

PLAN = ("--method", "fastv", "--keep", "0.5", "--layer", "2", "--keep", "0.25", "--layer", "4")


def optimum_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    # As the installed script does it.
    code = "from optimum.commands.optimum_cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_optimum_knows_every_family(model_type: str) -> None:
    tasks = TasksManager.get_supported_tasks_for_model_type(model_type, EXPORTER, library_name="transformers")
    assert list(tasks) == [TASK]
    assert model_type in TasksManager.get_supported_model_type_for_task(TASK, EXPORTER)


def test_a_family_that_comes_later_is_known_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    known = TasksManager._LIBRARY_TO_SUPPORTED_MODEL_TYPES["transformers"]
    monkeypatch.setitem(TasksManager._LIBRARY_TO_SUPPORTED_MODEL_TYPES, "transformers", dict(known))
    monkeypatch.setitem(FAMILIES, "later_vl", FAMILIES["qwen2_vl"])
    register_families()
    assert list(TasksManager.get_supported_tasks_for_model_type("later_vl", EXPORTER, library_name="transformers")) == [TASK]


def test_the_configuration_is_checked() -> None:
    constructor = TasksManager.get_exporter_config_constructor(
        EXPORTER, model_type="qwen2_vl", task=TASK, library_name="transformers"
    )
    config = AutoConfig.from_pretrained(MODEL_FOLDER, local_files_only=True)
    asked = constructor(config)
    assert (set(asked.inputs), set(asked.outputs)) == ({"pixel_values", "input_ids"}, {"logits"})
    with pytest.raises(UnsupportedModelError, match="llama"):
        constructor(SimpleNamespace(model_type="llama"))


def test_optimum_cli_has_every_option() -> None:
    shown = optimum_cli("export", "edgeprune", "--help")
    assert shown.returncode == 0, shown.stderr
    options = [name for option in export.params if isinstance(option, click.Option) for name in option.opts]
    assert options
    assert all(name in shown.stdout for name in (*options, "--model", "--task", "output"))


def test_optimum_cli_lists_the_command() -> None:
    assert "edgeprune" in optimum_cli("export", "--help").stdout


@pytest.mark.slow
def test_both_commands_export_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    plan = ("--image-size", "84x112", "--method", "fastv", "--keep", "0.5", "--layer", "1")
    done = optimum_cli("export", "edgeprune", "--model", tiny_folder, tmp_path / "a", "--task", TASK, *plan, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bundle"] == str(tmp_path / "a")
    own = CliRunner().invoke(main, ["export", str(tiny_folder), "-o", str(tmp_path / "b"), *plan, "--json"])
    assert own.exit_code == 0, own.output
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab")
    assert first["files"] == second["files"]
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--model", "tabletop"), 2, "give one output"),
        (("--model", "tabletop", "a", "-o", "b"), 2, "give one output"),
        (("out",), 2, "--model"),
        (("--model", "nowhere", "out"), 2, "Error: There is no model folder nowhere."),
        (("--model", "tabletop", "out", "--keep", "much"), 2, "'much' is no share. Write a number"),
        (("--model", "tabletop", "out", "--task", "fill-mask"), 2, "invalid choice: 'fill-mask'"),
        (("--model", "tabletop", "out", "--target", "toaster"), 2, "invalid choice: 'toaster'"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(arguments: tuple[str, ...], code: int, said: str) -> None:
    done = optimum_cli("export", "edgeprune", *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_options_are_written_back_as_they_were() -> None:
    given: dict[str, object] = {str(option.name): None for option in shared_options()}
    given |= {"keep": ["0.5", "-1"], "method": "fastv", "force": True, "as_json": False}
    assert sorted(command_line(given)) == ["--force", "--keep=-1", "--keep=0.5", "--method=fastv"]


def test_our_file_in_the_namespace_is_not_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    require_extra("export", "optimum")
    assert "optimum" in Software.here().packages
    monkeypatch.setattr("importlib.metadata.version", absent)
    with pytest.raises(MissingExtraError, match="optimum not installed"):
        require_extra("export", "torch", "optimum")
    packages = Software.here().packages
    assert "torch" in packages and "optimum" not in packages

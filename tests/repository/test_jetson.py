"""What examples/jetson copies to a Jetson: linted by the tools of its formats, and run as far as a machine without a GPU goes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import click
import pytest
import yaml
from PIL import Image
from repository import ROOT

from edgeprune.cli import main
from edgeprune.targets import TARGETS

EXAMPLE = ROOT / "examples" / "jetson"
DEVICE = EXAMPLE / "device"
PACKAGE = DEVICE / "jetson-containers" / "edgeprune"
UNIT = DEVICE / "edgeprune.service"
SCRIPTS = sorted(DEVICE.rglob("*.sh"))
COMMANDS = (*SCRIPTS, UNIT, DEVICE / "compose.yaml")
SETTINGS = {"CONTEXT": "1024", "BASE_IMAGE": "nvcr.io/nvidia/l4t-jetpack:r36.4.0"}
WHEEL = "edgeprune-0.1.0-py3-none-any.whl"
# The keys that jetson-containers takes: _PACKAGE_KEYS in its jetson_containers/packages.py.
PACKAGE_KEYS = {
    *("alias", "build_args", "build_flags", "buildkit_device", "config", "depends", "disabled", "dockerfile", "docs", "group"),
    *("name", "notes", "path", "prefix", "postfix", "requires", "test"),
}
# Stands for Python, sudo, apt-get: writes down how it was called. A "virtual environment" holds the same program.
RECORDER = """\
#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0") $*" in
    *"import ensurepip"*) [ -f "$CALLS.pip" ] ;;
    "apt-get install"*) touch "$CALLS.pip" ;;
    "sudo "*) exec "$@" ;;
    *"-m venv"*) mkdir -p venv/bin && cp "$0" venv/bin/python ;;
    *"import secrets"*) echo a-key ;;
esac
"""


def linter(name: str) -> str:
    """Return the path of a program; skip the test without it."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def clean(*command: object) -> str:
    """Run a linter, which must be content, and return what it says."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name + "/" + path.name)
def test_shellcheck_finds_nothing_in_a_script(script: Path) -> None:
    assert script.stat().st_mode & 0o111 == 0o111
    clean(linter("shellcheck"), script)


@pytest.mark.parametrize("folder", [DEVICE, PACKAGE], ids=lambda path: path.name)
def test_hadolint_finds_nothing_in_an_image(folder: Path) -> None:
    clean(linter("hadolint"), folder / "Dockerfile")
    copied = re.findall(r"^COPY (.+) \S+/$", (folder / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied[0].split()) == {"install.sh", "edgeprune-*.whl"} and (folder / "install.sh").is_file()


def test_systemd_takes_the_unit_as_it_is(tmp_path: Path) -> None:
    analyze = linter("systemd-analyze")
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"/opt/edgeprune/venv/bin/edgeprune\b", shutil.which("true") or "", UNIT.read_text()))
    assert clean(analyze, "verify", unit) == ""  # it warns of what it does not know, and returns 0
    clean(analyze, "security", "--offline=yes", "--no-pager", "--threshold=25", unit)  # tenths; without any setting 9.6


def written_commands(path: Path) -> Iterator[list[str]]:
    """Yield the `edgeprune` commands of a file, after its name."""
    text = Template(path.read_text()).safe_substitute(SETTINGS, PROVIDER="tensorrt", CREDENTIALS_DIRECTORY="/run/credentials")
    if path.suffix == ".yaml":
        filled = re.sub(r"\$\{(\w+):\?\}", lambda found: SETTINGS[found[1]], text)
        yield from (service["command"] for service in yaml.safe_load(filled)["services"].values())
        return
    for line in text.splitlines():
        words = re.match(r"(?:[#\s]*|ExecStart(?:Pre)?=\S+/)edgeprune (.+)", line)
        if words and not line.startswith(("# /", "# sudo")):
            yield shlex.split(words[1], comments=True)


def test_every_command_that_is_written_exists() -> None:
    found = [(path.name, words) for path in COMMANDS for words in written_commands(path)]
    names = {"doctor", "build", "selftest", "bench", "run", "serve", "ros2"}
    assert {words[0] for name, words in found if name == "on_device.sh"} == names
    assert [words[0] for name, words in found if name == UNIT.name] == ["build", "serve"]
    assert [words[0] for name, words in found if name == "compose.yaml"] == ["build", "serve"]
    for _, (name, *words) in found:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        command.make_context(name, words)


def test_the_compose_file_is_whole() -> None:
    text = (DEVICE / "compose.yaml").read_text()
    assert {*re.findall(r"\$\{(\w+)", text)} == {*SETTINGS, "OWNER"}
    compose: dict[str, Any] = yaml.safe_load(text)
    engines, answers = compose["services"]["engines"], compose["services"]["answers"]
    assert answers["depends_on"] == {"engines": {"condition": "service_completed_successfully"}}
    for service in (engines, answers):
        assert service["runtime"] == "nvidia" and service["read_only"] and service["cap_drop"] == ["ALL"]
        assert {volume.split(":")[1] for volume in service["volumes"]} == {"/bundle", "/data", "/etc/nv_tegra_release"}
    assert set(answers["secrets"]) == set(compose["secrets"]) and "/run/secrets/keys" in answers["command"]
    ignored = (DEVICE / ".dockerignore").read_text().split()
    assert ignored == ["*", "!install.sh", "!edgeprune-*.whl"]  # the bundle is no part of the image


def test_the_package_of_jetson_containers_has_its_header() -> None:
    lines = (PACKAGE / "Dockerfile").read_text().splitlines()
    assert lines[0] == "#---"
    header = yaml.safe_load("\n".join(line[1:] for line in lines[1 : lines.index("#---", 1)]))
    assert set(header) <= PACKAGE_KEYS and header["name"] == PACKAGE.name
    assert "cudastack:standard" in header["depends"]  # the one with TensorRT
    assert (PACKAGE / header["test"]).is_file()
    assert lines[lines.index("#---", 1) + 1] == "ARG BASE_IMAGE" and "FROM ${BASE_IMAGE}" in lines


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder as it arrives on a device, whose Python, sudo and apt-get are recorders."""
    folder, programs = tmp_path / "answers", tmp_path / "bin"
    shutil.copytree(DEVICE, folder)
    (folder / WHEEL).touch()
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in SETTINGS.items()))
    (folder / "robot.bundle" / "engines").mkdir(parents=True)
    (folder / "robot.bundle" / "engines" / "of-another-user.plan").touch()
    (folder / "robot.bundle" / "plan.json").touch()
    programs.mkdir()
    for name in ("python3", "sudo", "apt-get"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", "python3")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return folder


def calls() -> list[str]:
    path = Path(os.environ["CALLS"])
    return [line for line in path.read_text().splitlines() if not line.startswith("sudo ")]


def test_installing_where_pip_may_not_touch_the_system(copied: Path) -> None:
    clean(copied / "install.sh")
    assert [re.sub(r" -c .*", " -c", call) for call in calls()] == [
        "python3 -c",
        "apt-get update",
        "apt-get install --yes python3-venv",
        "python3 -m venv --system-site-packages venv",
        f"python -m pip install ./{WHEEL}[tensorrt,serve]",
        f"python -m pip install --force-reinstall --no-deps ./{WHEEL}",
    ]
    clean(copied / "install.sh")
    assert sum("apt-get" in call for call in calls()) == 2  # python3-venv is there now


@pytest.mark.parametrize("wheels", [[], [WHEEL, "edgeprune-0.2.0-py3-none-any.whl"]])
def test_installing_needs_one_wheel(copied: Path, wheels: list[str]) -> None:
    (copied / WHEEL).unlink()
    for name in wheels:
        (copied / name).touch()
    done = subprocess.run([copied / "install.sh"], capture_output=True, text=True)
    assert done.returncode == 1 and "prepare.py" in done.stderr and not Path(os.environ["CALLS"]).exists()


def test_the_service_is_installed_with_a_key_of_its_own(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("DESTDIR", str(root))
    for _ in range(2):  # again, as after an update
        clean(copied / "service.sh")
    home, keys = root / "opt" / "edgeprune", root / "etc" / "edgeprune" / "keys.txt"
    assert {path.name for path in home.iterdir()} == {"robot.bundle", WHEEL, ".env", "install.sh", "venv"}
    assert {path.name for path in (home / "robot.bundle").iterdir()} == {"plan.json", "engines"}
    assert not list((home / "robot.bundle" / "engines").iterdir())
    assert (keys.read_text(), keys.stat().st_mode & 0o777) == ("a-key\n", 0o600)
    assert sum("import secrets" in call for call in calls()) == 1
    assert (root / "etc" / "systemd" / "system" / UNIT.name).read_text() == UNIT.read_text()
    unit = UNIT.read_text()  # what the script makes is what the unit names
    for path in (home / "robot.bundle" / "engines", home / ".env", keys):
        assert f"/{path.relative_to(root)}" in unit


@pytest.fixture(scope="module")
def prepared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that prepare.py makes of the tiny model."""
    out = tmp_path_factory.mktemp("jetson") / "out"
    pruned = ("--image-size", "84x112", "--method", "uniform", "--keep", "0.5", "--layer", "1", "--context", "600")
    assert "Orin Nano" in clean(sys.executable, EXAMPLE / "prepare.py", tiny_folder, out, *pruned)
    return out


@pytest.mark.slow
def test_preparing_for_a_jetson(prepared: Path) -> None:
    assert {path.name for path in DEVICE.iterdir()} < {path.name for path in prepared.iterdir()}
    assert len(list(prepared.glob("edgeprune-*.whl"))) == 1
    assert dict(line.split("=") for line in (prepared / ".env").read_text().split()) == SETTINGS | {"CONTEXT": "600"}


def test_every_jetpack_has_a_base_image() -> None:
    line = re.compile(r'^    "(jetpack[\d.]+)": "nvcr\.io/nvidia/([\w-]+):([\w.-]+)",$', re.MULTILINE)
    written = line.findall((EXAMPLE / "prepare.py").read_text())
    assert [name for name, _, _ in written] == [name for name in TARGETS if name.startswith("jetpack")]
    readme = (EXAMPLE / "README.md").read_text()
    assert all(f"nvcr.io/nvidia/{image}:{tag}" in readme for _, image, tag in written)


@pytest.mark.slow
@pytest.mark.network
def test_the_steps_run_on_a_cpu(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 200), "red").save(prepared / "red.png")
    system = Path("/usr/bin/python3")  # Debian's and Ubuntu's is managed by the system, as a JetPack's
    usable = system.exists() and not subprocess.run([system, "-c", "import ensurepip, graphlib; int.bit_count"]).returncode
    for name, value in {"PYTHON": str(system if usable else sys.executable), "PROVIDER": "cpu"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run(["./on_device.sh", "red.png", "What is it?"], cwd=prepared, capture_output=True, text=True)
    if done.returncode and "No matching distribution" in done.stderr + done.stdout:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run bundles on the CPU" in done.stdout and "first token" in done.stdout
    assert "include-system-site-packages = true" in (prepared / "venv" / "pyvenv.cfg").read_text()

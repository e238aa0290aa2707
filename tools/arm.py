"""Run the runtime's tests as aarch64 on an x86 machine, by qemu's emulation of single processes: `make test-arm`.

apt and dpkg-deb make a root folder with Debian's Python for arm64, and uv installs the wheel into it with the versions of
locks/test.txt. No root rights, container or binfmt_misc is needed: a script calls qemu, and is the `sys.executable` of what runs in
it. There is no GPU, so nothing is shown of CUDA or TensorRT, and an emulator's times say nothing of a board's.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}  # the Python of each release of Debian
MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
# The instructions of Orin's Cortex-A78AE (ARMv8.2 with dot products and fp16). "max" has SME, which no Jetson has, and takes ten
# times as long for programs with pointer authentication (qemu 7.2).
CPU = "cortex-a76"
# ONNX Runtime reads this file for what the processor can do, and crashes on that of x86 (1.31 and 1.32).
CPUINFO = """\
processor	: {number}
BogoMIPS	: 62.50
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: 0xd42
CPU revision	: 1

"""
SCRIPT = """\
#!/bin/sh
unset PYTHONPATH
export PYTHONHOME={root}/usr PYTHONNOUSERSITE=1 PYTHONPYCACHEPREFIX={folder}/bytecode OMP_NUM_THREADS=1
exec {emulator} -cpu {cpu} -L {root} {root}/usr/bin/python{python} "$@"
"""
EXTRAS = "serve,structured,telemetry,sign,ros2"
FOR_TESTS = ("httpx", "hypothesis", "onnx", "openai", "opentelemetry-sdk", "packaging", "pytest", "pytest-xdist")
ROOMS = ("runtime", "device", "bundle")
NODE_TEST = "tests/runtime/ros2/test_ros2_zenoh.py::test_a_node_answers_what_rmw_zenoh_sends_and_is_in_its_graph"
# TensorRT's doubles run engines, which are no matter of the processor; the web page needs a browser; the other two files wait for
# tenths of a second, in which an emulated server answers nothing; and the node is asked from x86 instead.
LEFT_OUT = (
    "--ignore=tests/runtime/tensorrt",
    "--ignore=tests/runtime/server/test_web_page.py",
    "--ignore=tests/runtime/server/test_server_flow.py",
    "--ignore=tests/runtime/server/test_server_connections.py",
    f"--deselect={NODE_TEST}",
)
SCENES, SEED = 10, 4100
_ZSPAPRUNE = ("--method", "zspaprune", "--keep", "0.25")
_FASTV = ("--method", "fastv", "--keep", "0.5", "--layer", "2")
BUNDLES: dict[str, tuple[str, ...]] = {
    "cpu-fp32": ("--target", "cpu", *_ZSPAPRUNE),
    "cpu-int8": ("--target", "cpu", "--precision", "int8", *_ZSPAPRUNE),
    "cpu-int8-kv8": ("--target", "cpu", "--precision", "int8", "--kv", "int8", *_FASTV),
    "cpu-int4": ("--target", "cpu", "--precision", "int4", *_ZSPAPRUNE),
    "onnxruntime-fp32": ("--target", "onnxruntime", *_FASTV),
}
NOISE = 1e-6  # as much as float32 differs between the two processors


@dataclass(frozen=True)
class Agreement:
    """How two records of one bundle agree: `answers` and `kept` sets that are equal, of so many `questions`.

    `embeds`, `logits`: the largest differences, relative to the largest magnitude.
    """

    bundle: str
    questions: int
    answers: int
    kept: int
    embeds: float
    logits: float

    @property
    def in_float32(self) -> bool:
        """Whether the bundle multiplies in float32."""
        return self.bundle.endswith("fp32")

    @property
    def fits(self) -> bool:
        """Whether it agrees as it has to: in float32 wholly, and within 1e-4; else in 8 of 10 answers, and within 5 %.

        Measured: 1e-6 in float32, and 8e-3 for the visual tokens in int8. A wrong zero point or a swapped scale is above 0.1.
        """
        if self.in_float32:
            return self.answers == self.kept == self.questions and max(self.embeds, self.logits) < 1e-4
        return self.answers >= 0.8 * self.questions and self.embeds < 0.05


def agreements(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> Iterator[Agreement]:
    """Yield the agreement of each bundle of two records (`arm_answers`)."""
    for bundle in dict.fromkeys(name.partition("/")[0] for name in first):
        texts, kept, embeds, logits = (
            (first[f"{bundle}/{name}"], second[f"{bundle}/{name}"]) for name in ("texts", "kept", "embeds", "logits")
        )
        same = sum(np.array_equal(*pair) for pair in zip(*kept, strict=True))
        yield Agreement(bundle, len(texts[0]), int((texts[0] == texts[1]).sum()), same, _apart(*embeds), _apart(*logits))


def distance(array: np.ndarray, reference: np.ndarray) -> float:
    """Return the root of the mean square of a difference, relative to that of the reference."""
    return float(np.linalg.norm(array - reference) / np.linalg.norm(reference))


def _apart(first: np.ndarray, second: np.ndarray) -> float:
    worst = float(np.abs(first - second).max() / np.abs(first).max())
    return worst if np.isfinite(worst) else float("inf")


def main() -> None:
    """Make what is not there yet, run every part, and say how long each took; the exit status is 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the root is kept, and the bundles and records are written")
    parser.add_argument("--suite", choices=PYTHONS, default="bookworm", help="the release of Debian, and so of Python")
    parser.add_argument("--mirror", default=MIRROR)
    parser.add_argument("--ready", action="store_true", help="only say what is missing, if anything is")
    given = parser.parse_args()
    folder: Path = given.folder.resolve()
    emulator = find_emulator()
    if given.ready:
        return
    failed: list[str] = []
    with _timed(f"root of Debian {given.suite}"):
        root = made_root(folder / given.suite, given.suite, given.mirror)
    with _timed("packages for aarch64"):
        python = installed(root, emulator, folder / given.suite, PYTHONS[given.suite])
    parts = {"doctor": _doctor, "answers": _answers, "a node and an x86 robot": _node, "tests": _tests}
    for name, part in parts.items():
        with _timed(name):
            if not part(python, folder):
                failed.append(name)
    if failed:
        raise SystemExit(f"Failed as aarch64: {', '.join(failed)}")


def find_emulator(machine: str = platform.machine()) -> str:
    """Return the emulator; raise SystemExit with what to install where a program is missing, and on a machine that needs none."""
    if machine == "aarch64":
        raise SystemExit("This machine is aarch64: run make test.")
    for programs, package in (
        (("apt-get", "dpkg-deb"), None),
        (EMULATORS, "qemu-user-static"),
    ):
        found = [program for program in programs if shutil.which(program)]
        if package is None and len(found) < len(programs):
            raise SystemExit("make test-arm needs apt-get and dpkg-deb, as Debian and Ubuntu have them.")
        if package and not found:
            raise SystemExit(f"There is no {programs[0]}: sudo apt-get install {package}")
    if not KEYRING.is_file():
        raise SystemExit(f"There is no {KEYRING}, which checks Debian's packages: sudo apt-get install debian-archive-keyring")
    return found[0]


def made_root(folder: Path, suite: str, mirror: str) -> Path:
    """Return the root folder with Debian's Python for arm64, made if it is not there."""
    root, done = folder / "root", folder / "root.done"
    if not done.is_file():
        shutil.rmtree(root, ignore_errors=True)
        for package in _downloaded(folder / "apt", suite, mirror):
            subprocess.run(["dpkg-deb", "--extract", str(package), str(root)], check=True)
        if not (root / "lib").exists():  # since trixie packages have usr/lib alone
            (root / "lib").symlink_to("usr/lib")
        done.touch()
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text("".join(CPUINFO.format(number=number) for number in range(os.cpu_count() or 1)))
    return root


def _downloaded(folder: Path, suite: str, mirror: str) -> list[Path]:
    # apt with lists and a status of its own: it finds and checks what Python needs, and changes nothing of this machine.
    for name in ("lists/partial", "archives/partial", "parts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n")
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",  # no other user may be able to write here
        "Acquire::Languages": "none",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": folder / "parts",
        "Dir::Etc::PreferencesParts": folder / "parts",
    }
    apt = ["apt-get", "-q=2", *(f"-o{name}={value}" for name, value in options.items())]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "--yes", "--download-only", "install", "python3", "libstdc++6"], check=True, stdout=subprocess.DEVNULL)
    return sorted((folder / "archives").glob("*.deb"))


def installed(root: Path, emulator: str, folder: Path, python: str) -> Path:
    """Install the wheel of this tree and what the tests need; return the script that is the emulated Python."""
    script, site = folder / "python", root / f"usr/local/lib/python{python}/dist-packages"
    shutil.rmtree(site, ignore_errors=True)
    shutil.rmtree(folder / "dist", ignore_errors=True)
    _quietly(sys.executable, ROOT / "tools" / "build_wheel.py", folder / "dist")
    wheel = next((folder / "dist").glob("*.whl"))
    # Wheels that fit JetPack 6's glibc.
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--only-binary", ":all:", "--target", str(site)]
    uv += ["--python-platform", "aarch64-manylinux_2_35", "--python-version", python, "-c", str(ROOT / "locks" / "test.txt")]
    subprocess.run([*uv, f"edgeprune[{EXTRAS}] @ {wheel.as_uri()}", *FOR_TESTS], check=True)
    (site / "emulated.pth").write_text(f"import sys; sys.executable = {str(script)!r}\n")
    script.write_text(SCRIPT.format(root=root, folder=folder, emulator=emulator, cpu=CPU, python=python))
    script.chmod(0o755)
    return script


def _doctor(python: Path, folder: Path) -> bool:
    importing = "import edgeprune.runtime, platform; assert platform.machine() == 'aarch64'"
    subprocess.run([str(python), "-P", "-c", importing], check=True)
    return subprocess.run([str(python), "-P", "-m", "edgeprune", "doctor"]).returncode == 0


def _answers(python: Path, folder: Path) -> bool:
    # Exported and asked on x86, and asked as aarch64. The third record shows how far x86 is from itself after the least change.
    bundles, scenes = folder / "bundles", folder / "scenes"
    here = [sys.executable, "-m", "edgeprune"]
    shutil.rmtree(bundles, ignore_errors=True)
    for name, options in BUNDLES.items():
        _quietly(*here, "export", "tabletop", "-o", bundles / name, *options)
    _quietly(*here, "tabletop", scenes, "--scenes", SCENES, "--seed", SEED, "--force")
    asking = (ROOT / "tools" / "arm_answers.py", bundles, scenes / "dataset.jsonl", "-o")
    _quietly(sys.executable, *asking, folder / "x86.npz")
    _quietly(sys.executable, *asking, folder / "noise.npz", "--noise", NOISE)
    _quietly(python, *asking, folder / "aarch64.npz")
    x86, aarch64, noisy = (dict(np.load(folder / f"{name}.npz")) for name in ("x86", "aarch64", "noise"))
    as_aarch64 = list(agreements(x86, aarch64))
    print(f"x86 beside aarch64, and beside x86 with pixels that differ by {NOISE}:")
    print("bundle             answers  kept sets  visual tokens  logits    | answers  kept sets  visual tokens  logits")
    for one, other in zip(as_aarch64, agreements(x86, noisy), strict=True):
        print(f"{one.bundle:18} {_columns(one)} | {_columns(other)}{'' if one.fits else '  FAILED'}")
    cost = [distance(each["cpu-int8/embeds"], each["cpu-fp32/embeds"]) for each in (x86, aarch64)]
    moved = distance(noisy["cpu-int8/embeds"], x86["cpu-int8/embeds"])
    print(f"int8's visual tokens are from fp32's: {cost[0]:.4f} on x86, {cost[1]:.4f} as aarch64")
    print(f"and on x86 from those of such pixels: {moved:.4f}")
    return all(each.fits for each in as_aarch64)


def _columns(each: Agreement) -> str:
    counts = f"{each.answers:2} of {each.questions:2} {each.kept:4} of {each.questions:2}"
    return f"{counts}       {each.embeds:.1e}       {each.logits:.1e}"


def _node(python: Path, folder: Path) -> bool:
    # The camera and the questions come from this machine over Zenoh, and so do the answers that are expected.
    shutil.rmtree(folder / "tiny", ignore_errors=True)
    named = {"EDGEPRUNE_NODE_PYTHON": str(python), "EDGEPRUNE_TINY_BUNDLE": str(folder / "tiny"), "EDGEPRUNE_TEST_WAIT": "180"}
    return _pytest(Path(sys.executable), os.environ | named, NODE_TEST)


def _tests(python: Path, folder: Path) -> bool:
    options = ("-p", "without_torch", "-n", "2", "--dist", "worksteal", *LEFT_OUT)
    named = {"EDGEPRUNE_TINY_BUNDLE": str(folder / "tiny"), "PYTHONSAFEPATH": "1"}  # the wheel, not the tree
    return _pytest(python, os.environ | named, *options, *(f"tests/{name}" for name in ROOMS))


def _pytest(python: Path, environment: Mapping[str, str], *arguments: str) -> bool:
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def _quietly(*command: object) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stderr}")


@contextmanager
def _timed(name: str) -> Iterator[None]:
    began = time.monotonic()
    print(f"== {name}", flush=True)
    yield
    print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()

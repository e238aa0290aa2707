"""Who takes part: one contender for each peer, way of running it, precision and keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

EDGEPRUNE = "edgeprune"
ENVIRONMENTS = {"optimum-intel": "openvino", "transformers-onnx": "transformers"}  # of those that share another peer's
# Cuts before decoder layers 3, 8 and 14.
STAIRCASE = ("--keep", "0.5", "--layer", "3", "--keep", "0.25", "--layer", "8", "--keep", "0.1", "--layer", "14")
COMPILED = {"attention": "sdpa", "compile": "yes"}
TORCH = {"eager": {"attention": "eager"}, "sdpa": {"attention": "sdpa"}, "torch.compile": COMPILED}


@dataclass(frozen=True)
class Contender:
    """One row. `artefact`: the folder that it reads; `keep`: what it is told to keep, where it is told as it runs.

    `making`: options of `edgeprune export`, which makes one bundle for each way of pruning; `options`: those of the peer's script.
    """

    peer: str
    variant: str
    precision: str
    kept: str
    artefact: str
    keep: float = 1.0
    making: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the row is called."""
        return " ".join(word for word in (self.peer, self.variant, self.precision, self.kept) if word)

    @property
    def environment(self) -> str:
        """The environment that it runs in."""
        return ENVIRONMENTS.get(self.peer, self.peer)

    @property
    def script(self) -> str:
        """What asks it."""
        return f"run_{self.peer.replace('-', '_')}.py"


def edgeprune(target: str, precision: str, keeps: list[float], method: str, block: int) -> list[Contender]:
    """Return EdgePrune's rows: nothing cut, one cut before the decoder or a block of the vision encoder, a staircase of cuts."""
    common, name = ("--target", target, "--precision", precision), f"{EDGEPRUNE}-{target}-{precision}"
    rows = []
    for keep in keeps:
        variant, cut = (method, ("--method", method, "--keep", str(keep))) if keep < 1 else ("", ())
        artefact = f"{name}-{variant or 'uncut'}-{keep}"
        rows.append(Contender(EDGEPRUNE, variant, precision, _percent(keep), artefact, making=common + cut))
    for keep in (keep for keep in keeps if keep < 1):
        making = (*common, "--method", "evit", "--site", "vision", "--layer", str(block), "--keep", str(keep))
        rows.append(Contender(EDGEPRUNE, f"evit @ vision {block}", precision, _percent(keep), f"{name}-evit-{keep}", making=making))
    stairs = (*common, "--method", "fastv", *STAIRCASE)
    return [*rows, Contender(EDGEPRUNE, "fastv @ 3, 8, 14", precision, "50/25/10%", f"{name}-staircase", making=stairs)]


def others(peers: list[str], precision: str, keeps: list[float]) -> list[Contender]:
    """Return the peers' rows. Those that cannot prune have one that keeps all."""
    return [contender for peer in peers for contender in _PEERS[peer](precision, keeps)]


def _openvino(precision: str, keeps: list[float]) -> Iterator[Contender]:
    # GenAI computes in bf16 where the CPU has it, whatever the weights are; in float32 only when told.
    computing: dict[str, dict[str, str]] = {"": {}}
    if precision == "fp32":
        computing = {"computing in f32": {"INFERENCE_PRECISION_HINT": "f32"}, "computing in bf16": {}}
    for variant, options in computing.items():
        for keep in keeps:
            named = " ".join(word for word in (variant, "CDPruner" if keep < 1 else "") if word)
            yield Contender("openvino", named, precision, _percent(keep), f"openvino-{precision}", keep, options=options)


def _optimum_intel(precision: str, keeps: list[float]) -> Iterator[Contender]:
    yield Contender("optimum-intel", "", precision, _percent(1), f"openvino-{precision}")


def _transformers(precision: str, keeps: list[float]) -> Iterator[Contender]:
    dtype, computed = ("float32", "fp32") if precision == "fp32" else ("bfloat16", "bf16")
    for variant, options in TORCH.items():
        yield Contender("transformers", variant, computed, _percent(1), "checkpoint", options=options | {"dtype": dtype})


def _transformers_onnx(precision: str, keeps: list[float]) -> Iterator[Contender]:
    if precision != "int4":  # its quantizers for ONNX Runtime have none
        yield Contender("transformers-onnx", "", precision, _percent(1), f"transformers-onnx-{precision}")


def _llama_cpp(precision: str, keeps: list[float]) -> Iterator[Contender]:
    for variant, options in {"mtmd": {}, "mtmd, no flash attention": {"flash_attention": "no"}}.items():
        yield Contender("llama-cpp", variant, precision, _percent(1), f"gguf-{precision}", options=options)


def _onnxruntime_genai(precision: str, keeps: list[float]) -> Iterator[Contender]:
    yield Contender("onnxruntime-genai", "decoder alone", precision, _percent(1), f"onnxruntime-genai-{precision}")


def _percent(keep: float) -> str:
    return f"{keep:.0%}"


_PEERS = {
    "llama-cpp": _llama_cpp,
    "onnxruntime-genai": _onnxruntime_genai,
    "openvino": _openvino,
    "optimum-intel": _optimum_intel,
    "transformers": _transformers,
    "transformers-onnx": _transformers_onnx,
}
PEERS = tuple(_PEERS)

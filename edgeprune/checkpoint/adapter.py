"""LoRA adapters, merged into a model's weights as peft's `merge_and_unload` does (github.com/huggingface/peft); peft is not needed.

A matrix W becomes W + B A s, where s is alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (Kalajdzievski, arXiv 2312.03732).
Of a matrix that stays in its file, the product is added to the rows that are read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.bundle.integrity import sha256_of
from edgeprune.checkpoint.formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS, sizes_in
from edgeprune.checkpoint.hub import download_files, is_hub_id
from edgeprune.checkpoint.processor import read_json
from edgeprune.errors import UnsupportedModelError, UsageError
from edgeprune.io.files import is_folder

if TYPE_CHECKING:
    import torch

    from edgeprune.checkpoint.weights import Matrix

_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_SAVED = re.compile(r"(.+?)(?:\.modules_to_save)?(?:\.default)?(?:\.base_layer)?\.(weight|bias)")
# Settings of LoraConfig that mean more than W + B A s.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")  # that leave the base model as it is


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that was checked but not loaded. `name`: as the user gave it. `settings`: its adapter_config.json."""

    name: str
    path: Path
    settings: Mapping[str, Any]

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the adapter's weights."""
        return sha256_of(self.path / ADAPTER_WEIGHTS)

    def digests(self) -> str:
        """Return the sha256 of all that changes the merged weights, one after the other."""
        return self.sha256 + sha256_of(self.path / ADAPTER_CONFIG)

    def scale(self, modules: tuple[str, ...], rank: int) -> float:
        """Return the factor of a product of `rank`; `modules`: the names of its module."""
        patterns = self.settings.get("alpha_pattern") or {}
        named = (alpha for pattern, alpha in patterns.items() for name in modules if re.match(rf"(.*\.)?({pattern})$", name))
        alpha = float(next(named, self.settings["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


@dataclass(frozen=True)
class MergedMatrix:
    """A stored matrix plus a product of low rank: `left` [rows, rank] times `right` [rank, columns]."""

    base: Matrix
    left: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.base.shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows from `start` to `stop` in float32."""
        return self.base.rows(start, stop) + self.left[start:stop] @ self.right


def resolve_adapter(name: str) -> Adapter:
    """Return the checked adapter of `name`: a folder, or an id of the hub.

    Raises UsageError if there is none, and UnsupportedModelError for other adapters than plain LoRA in safetensors.
    """
    path = Path(name)
    if not is_folder(path) and is_hub_id(name):
        path = download_files(name, None, [ADAPTER_CONFIG, ADAPTER_WEIGHTS], visible=True)
    elif not is_folder(path):
        raise UsageError(f"There is no adapter folder {name}.", hint=f"Give a folder with {ADAPTER_CONFIG}, as peft writes it.")
    settings = read_json(path, ADAPTER_CONFIG)
    reason = _reason_to_refuse(settings)
    if reason:
        raise _refused(name, reason)
    if not isinstance(settings.get("lora_alpha"), (int, float)):
        raise UsageError(f"{path / ADAPTER_CONFIG} has no lora_alpha.", hint="Save the adapter again with peft.")
    if ADAPTER_WEIGHTS not in sizes_in(path):
        raise UnsupportedModelError(f"{name} has no {ADAPTER_WEIGHTS}; pickles are refused.", hint="Save it again with peft.")
    return Adapter(name, path, settings)


def _reason_to_refuse(settings: Mapping[str, Any]) -> str:
    kind, initial, bias = settings.get("peft_type"), settings.get("init_lora_weights", True), settings.get("bias", "none")
    if kind != "LORA":
        return f"is of type {kind}"
    if bias != "none":
        return f"has bias={bias}"
    if initial not in _INITIAL:
        return f"has init_lora_weights={initial}, which changes the base model"
    return next((f"has {setting}" for setting in _REFUSED if settings.get(setting)), "")


def merge(adapter: Adapter, model: Any) -> None:
    """Merge an adapter into a loaded transformers model, large matrices of which may be stored in their files.

    Raises UnsupportedModelError for an adapter of another model, or of layers that are neither linear nor an embedding.
    """
    tensors = _tensors(adapter)
    products: dict[str, dict[str, torch.Tensor]] = {}
    modules = _Modules(adapter, model)
    for key, tensor in tensors.items():
        lora, saved = _LORA.fullmatch(key), _SAVED.fullmatch(key)
        if lora is not None:
            products.setdefault(lora[1], {})[lora[2]] = tensor
        elif saved is not None and "lora_" not in key:
            modules.replace(saved[1], saved[2], tensor)
        else:
            raise _refused(adapter.name, f"holds {key}")
    for name, parts in products.items():
        if set(parts) != {"A", "B"}:
            raise UnsupportedModelError(
                f"{adapter.name} has only one of the two factors of {name}.", hint="Save it again with peft."
            )
        modules.add(name, parts["A"], parts["B"])


class _Modules:
    """The modules of a model by the names that an adapter has for them, which may be those of an older transformers."""

    def __init__(self, adapter: Adapter, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self._adapter, self._modules = adapter, dict(model.named_modules(remove_duplicate=False))
        self._renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
        self._tied = _tied(model)

    def replace(self, name: str, leaf: str, tensor: torch.Tensor) -> None:
        """Replace a parameter by one that was trained whole."""
        self._set(self._parameter(self._find(name), name, leaf, tuple(tensor.shape)), tensor)

    def add(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add the product of the factors of a linear layer or an embedding, which has its weight transposed."""
        from torch import nn

        found = self._find(name)
        module = self._modules[found]
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            raise _refused(self._adapter.name, f"changes {name}, a {type(module).__name__}")
        rank = a.shape[0]
        left, right = (a.T, b.T) if isinstance(module, nn.Embedding) else (b, a)
        parameter = self._parameter(found, name, "weight", (left.shape[0], right.shape[1]))
        left = left * self._adapter.scale((name, found), rank)
        stored = getattr(parameter, "stored", None)
        if stored is not None and not any(parameter.stride()):  # a placeholder
            parameter.stored = MergedMatrix(stored, left, right)
        else:
            self._set(parameter, parameter.data + left @ right)

    @staticmethod
    def _set(parameter: Any, tensor: torch.Tensor) -> None:
        parameter.data = tensor
        if hasattr(parameter, "stored"):
            del parameter.stored

    def _find(self, name: str) -> str:
        from transformers.core_model_loading import rename_source_key

        if name in self._modules:
            return name
        renamed: str = rename_source_key(f"{name}.weight", self._renamings, [])[0].removesuffix(".weight")
        if renamed not in self._modules:
            raise self._other_model(f"changes {name}, which the model does not have")
        return renamed

    def _parameter(self, found: str, name: str, leaf: str, shape: tuple[int, ...]) -> Any:
        parameter = getattr(self._modules[found], leaf, None)
        if parameter is None or tuple(parameter.shape) != shape:
            has = "none" if parameter is None else "x".join(map(str, parameter.shape))
            raise self._other_model(f"changes the {leaf} of {name}, {'x'.join(map(str, shape))}, where the model has {has}")
        if id(parameter) in self._tied:
            raise _refused(self._adapter.name, f"changes {name}, which the model shares with another layer")
        return parameter

    def _other_model(self, what: str) -> UnsupportedModelError:
        base = self._adapter.settings.get("base_model_name_or_path")
        return UnsupportedModelError(
            f"{self._adapter.name} {what}.", hint=f"It is an adapter of {base}: export that." if base else ""
        )


def _tied(model: Any) -> set[int]:
    # The ids of parameters that several modules have.
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {parameter for parameter, count in uses.items() if count > 1}


def _tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded = load_file(adapter.path / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(
            f"{adapter.path / ADAPTER_WEIGHTS} is not a whole safetensors file: {error}.", hint="Download it again."
        ) from error
    return {name.removeprefix(_PREFIX): tensor.float() for name, tensor in loaded.items()}


def _refused(name: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The adapter {name} {what}: only plain LoRA is merged.",
        hint="Merge it with peft: PeftModel.merge_and_unload, then save_pretrained; and export the result.",
    )

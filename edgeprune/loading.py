"""Load a transformers folder: checked before anything heavy runs, safetensors only, in float32."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.bundle import DecoderShape, Source, sha256_of
from edgeprune.errors import PlanError, UnsupportedModelError, UsageError, require_extra
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.registry import family_class, method_class
from edgeprune.tabletop import MODEL_FOLDER

TABLETOP = "tabletop"
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that was checked but not loaded. `name` is how the user called it."""

    name: str
    path: Path
    model_type: str
    processor: dict[str, Any]

    @property
    def weights(self) -> list[Path]:
        """The safetensors files."""
        return sorted(self.path.glob("*.safetensors"))

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(path.stat().st_size for path in self.weights)

    def source(self) -> Source:
        """Return the record of this model for a manifest; reads all weights once."""
        digest = hashlib.sha256("".join(sha256_of(path) for path in self.weights).encode())
        return Source(self.name, self.model_type, digest.hexdigest())


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its family, and the tokenizer that came with it."""

    folder: ModelFolder
    model: Any
    family: Any
    tokenizer: Any

    def geometry(self, size: tuple[int, int] | None) -> Geometry:
        """Return the geometry for images of `size` (height, width), or of the model's own default size."""
        geometry: Geometry = self.family.geometry(self.model.config, self.folder.processor, size)
        return geometry

    def check_plan(self, plan: KeepPlan) -> None:
        """Raise PlanError unless the plan fits the model's family, depth and vision geometry, and its methods their sites."""
        name = self.folder.name
        if plan.family != self.folder.model_type:
            raise PlanError(f"The plan was made for {plan.family}, but {name} is {self.folder.model_type}.")
        layers = len(self.family.decoder().layers)
        if plan.layers != layers:
            raise PlanError(f"The plan was made for {plan.layers} decoder layers, but {name} has {layers}.")
        own = self.geometry((plan.geometry.height, plan.geometry.width))
        if own != plan.geometry:
            raise PlanError(f"The plan was made for {plan.geometry}, but {name} divides that into {own}.")
        for cut in plan.cuts:
            self._check_cut(cut, plan.geometry)

    def _check_cut(self, cut: Cut, geometry: Geometry) -> None:
        method = method_class(cut.method)
        if cut.site not in method.sites:
            raise PlanError(f"{cut.method} cannot act at site {cut.site!r}.", hint=f"It acts at: {', '.join(method.sites)}.")
        for signal in method.needs:
            if signal not in self.family.signals:
                raise PlanError(f"{cut.method} needs the signal {signal!r}, which the family {self.family.name} does not give.")
        method(cut, geometry)  # refuses options that it does not know

    def decoder_shape(self) -> DecoderShape:
        """Return the sizes of the decoder."""
        parts = self.family.decoder()
        return DecoderShape(
            layers=len(parts.layers),
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            hidden=parts.hidden,
            vocabulary=parts.vocabulary,
            position_axes=self.family.position_axes,
        )

    def processor(self, geometry: Geometry) -> dict[str, Any]:
        """Return the image-processor settings for one geometry: every image is brought to its area."""
        area = geometry.height * geometry.width
        settings = {key: value for key, value in self.folder.processor.items() if key not in ("min_pixels", "max_pixels")}
        return settings | {"size": {"shortest_edge": area, "longest_edge": area}}

    def chat_template(self) -> str:
        """Return the chat template; raise UnsupportedModelError when the model has none."""
        template = self.tokenizer.chat_template
        legacy = self.folder.path / "chat_template.json"
        if template is None and legacy.is_file():
            template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
        if not isinstance(template, str):
            raise UnsupportedModelError(f"{self.folder.name} has no chat template.", hint="Add a chat_template.jinja to it.")
        return template

    def special_tokens(self) -> dict[str, str]:
        """Return the named special tokens that chat templates use (bos_token, eos_token ...)."""
        return {name: text for name, text in self.tokenizer.special_tokens_map.items() if isinstance(text, str)}

    def end_tokens(self) -> tuple[int, ...]:
        """Return the ids that end an answer."""
        end = self.model.generation_config.eos_token_id
        return tuple(end) if isinstance(end, list) else (int(end),)


def find_model(name: str) -> ModelFolder:
    """Return the checked folder of `name`: a path, or "tabletop" for the bundled model."""
    path = MODEL_FOLDER if name == TABLETOP else Path(name)
    if not path.is_dir():
        raise UsageError(f"There is no model folder {name}.", hint="Give a transformers folder, or tabletop for the bundled model.")
    config = _read_json(path, "config.json")
    folder = ModelFolder(name, path, str(config.get("model_type")), _read_json(path, PREPROCESSOR))
    family_class(folder.model_type)
    if "auto_map" in config:
        raise UnsupportedModelError(f"{name} needs code of its own (trust_remote_code), which is never run.")
    if not folder.weights:
        raise UnsupportedModelError(
            f"{name} has no safetensors weights; pickle checkpoints are refused because loading one runs code.",
            hint="Convert it with save_pretrained in transformers.",
        )
    return folder


def load_model(folder: ModelFolder) -> LoadedModel:
    """Load the weights; raise UnsupportedModelError when tensors are missing, left over or of another shape."""
    require_extra("export", "torch", "transformers", "optimum")
    import transformers
    from optimum.exporters.tasks import TasksManager

    transformers.utils.logging.disable_progress_bar()  # the command shows its own stages
    family = family_class(folder.model_type)
    config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    family.check(config)
    architecture = getattr(transformers, config.architectures[0])
    task = TasksManager.infer_task_from_model(architecture)
    loader = TasksManager.get_model_class_for_task(task, framework="pt", library="transformers")
    try:
        model, report = loader.from_pretrained(
            folder.path,
            dtype="float32",
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(f"Cannot load {folder.name}: {str(error).splitlines()[0]}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            raise UnsupportedModelError(f"{folder.name} has {problem.replace('_', ' ')}: {sorted(report[problem])[:3]}.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    return LoadedModel(folder, model.eval(), family(model), tokenizer)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} has no {name}.", hint="Give a folder written by save_pretrained.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot read {path / name}: {error}.") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path / name} is not a JSON object.")
    return data

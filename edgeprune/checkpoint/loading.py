"""Find a transformers model, in a folder or on the hub, and load it in float32; it is checked before any weight is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.bundle import DecoderShape, GenerationDefaults, ImageText, Source, is_bundle
from edgeprune.bundle.integrity import sha256_of
from edgeprune.checkpoint.adapter import Adapter, merge, resolve_adapter
from edgeprune.checkpoint.configuration import (
    check_attention,
    check_context,
    no_chat_template,
    no_end_token,
    no_image_token,
    sized_geometry,
)
from edgeprune.checkpoint.formats import (
    GGUF,
    check_config,
    check_files,
    check_processor,
    gguf,
    packing_of,
    weight_files,
    weight_names,
)
from edgeprune.checkpoint.hub import Snapshot, download, files_of, hub_snapshot, is_hub_id, local_snapshot
from edgeprune.checkpoint.processor import chat_template, image_settings, load_processor, processor_names, read_json
from edgeprune.errors import PlanError, UnsupportedModelError, UsageError, did_you_mean, require_extra
from edgeprune.io.files import is_file, is_folder
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.processors import ImageSpec, image_spec
from edgeprune.registry import family_class, method_class, unsupported_reason
from edgeprune.tabletop import MODEL_FOLDER, large_model_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgeprune.checkpoint.weights import CheckpointTensor
    from edgeprune.families.base import OutsideChat

TABLETOP, TABLETOP_L = "tabletop", "tabletop-l"
# Settings of transformers' GenerationConfig that change greedy answers, with the values that change nothing.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "sequence_bias": ([], {}),
    "guidance_scale": (1.0,),
}
_LOAD_OPTIONS = {"dtype": "float32", "attn_implementation": {"": "sdpa"}, "output_loading_info": True}


@dataclass(frozen=True)
class ModelFolder:
    """A model that was checked but not loaded.

    `name`: as the user gave it. `trusted`: whether Python code in the folder may run. `commit`: where it is known. `hub_id`: of a
    model of the hub, whose weights `fetch_weights` downloads into the folder; else empty. `adapter`: to be merged into it.
    """

    name: str
    path: Path
    model_type: str
    processor: dict[str, Any]
    trusted: bool = False
    commit: str = ""
    hub_id: str = ""
    adapter: Adapter | None = None

    @property
    def weights(self) -> list[Path]:
        """The safetensors files that transformers loads, sorted by name; raises UnsupportedModelError if one is missing."""
        return weight_files(self.path)

    @property
    def bytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum(path.stat().st_size for path in self.weights)

    def source(self) -> Source:
        """Return the record of this model for the manifest; hashes all weight files, and those of the adapter."""
        digests = [sha256_of(path) for path in self.weights]
        merged = Source(self.name, self.model_type, "", revision=self.commit)
        if self.adapter is not None:
            digests.append(self.adapter.digests())
            merged = replace(merged, adapter=self.adapter.name, adapter_sha256=self.adapter.sha256)
        return replace(merged, weights_sha256=hashlib.sha256("".join(digests).encode()).hexdigest())


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model, its family and its processor, of transformers' own class for it; an outline has no processor."""

    folder: ModelFolder
    model: Any
    family: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as the processor set it up."""
        return self.processor.tokenizer

    def geometry(self, size: tuple[int, int] | None, frames: int = 1, fps: float = 0.0) -> Geometry:
        """Return the geometry for images of `size` (height, width), by default the model's own; with `frames`, for a video.

        Raises UsageError if there is no default size, the processor would change the size, the context does not hold its visual
        tokens, or the model takes no video.
        """
        if frames > 1 and not self.family.videos:
            raise UsageError(f"Models of type {self.folder.model_type} take no video.", hint="Leave out --frames.")
        if size is None:
            size = self._spec(None).default_size()
        if size is None:
            raise UsageError("This model takes images of any size, but a bundle has one.", hint="Give --image-size 448x448, say.")
        geometry = sized_geometry(self._spec, size, frames, fps)
        check_context(self.folder.name, geometry, self.family.decoder().context)
        return geometry

    def settings(self, geometry: Geometry) -> dict[str, Any]:
        """Return the image-processor settings that bring every image to the area of one geometry."""
        return self._settings((geometry.height, geometry.width))

    def changed_settings(self, geometry: Geometry) -> dict[str, Any]:
        """Return those of `settings` that are other than the checkpoint's own, as transformers' processor takes them."""
        own = self.folder.processor
        return {name: value for name, value in self.settings(geometry).items() if value != own.get(name, value)}

    def _settings(self, size: tuple[int, int] | None) -> dict[str, Any]:
        settings: dict[str, Any] = self.family.settings(self.model.config, self.folder.processor, size)
        return settings

    def _spec(self, size: tuple[int, int] | None) -> ImageSpec:
        return image_spec(self._settings(size))

    def check_plan(self, plan: KeepPlan) -> None:
        """Raise PlanError unless the plan fits the model's family, depth and geometry, and each method fits its site."""
        name = self.folder.name
        if plan.family != self.folder.model_type:
            raise PlanError(f"The plan was made for {plan.family}, but {name} is {self.folder.model_type}.")
        layers = len(self.family.decoder().layers)
        if plan.layers != layers:
            raise PlanError(f"The plan was made for {plan.layers} decoder layers, but {name} has {layers}.")
        geometry = plan.geometry
        own = self.geometry((geometry.height, geometry.width), geometry.frames, geometry.fps)
        if own != geometry:
            raise PlanError(f"The plan was made for {plan.geometry}, but {name} divides that into {own}.")
        for cut in plan.cuts:
            self._check_cut(cut, geometry)
        check_attention(plan, self.family.decoder().states)
        self._check_vision(plan)

    def _check_cut(self, cut: Cut, geometry: Geometry) -> None:
        reason = unsupported_reason(cut.method, cut.site, self.family)
        if reason:
            raise PlanError(f"{cut.method} cannot act at site {cut.site!r} of {self.folder.model_type}.", hint=f"It {reason}.")
        if cut.keep == 1 and cut.site in ("layer", "cache"):  # torch.export assumes min(1, length) == 1 for every length
            raise PlanError(f"{cut} keeps a single token, which no graph can.", hint="Keep 2, or none.")
        method = method_class(cut.method)(cut, geometry)  # raises for unknown options
        if cut.weights is not None:
            self._check_weights(cut, method)

    def _check_weights(self, cut: Cut, method: Any) -> None:
        from edgeprune.methods.weights import Taught  # imports torch

        if not isinstance(method, Taught):
            raise PlanError(f"{cut} names weights, and what it does has none.", hint="Take the plan as calibrate wrote it.")
        name, own = self.folder.name, method.width_in(self.family.decoder())
        rows = " --rows learned" if cut.site == "cache" else ""
        again = f"Learn it for this one: edgeprune calibrate {name} --data FILE --method {cut.method}{rows} --budget 0.25 -o PLAN"
        if method.width != own:
            raise PlanError(
                f"The weights of {cut} are for visual tokens of width {method.width}; those of {name} have {own}.", hint=again
            )
        if method.header["weights_sha256"] != self.weights_sha256:
            raise PlanError(f"The weights of {cut} were learned from another model than {name}.", hint=again)

    @cached_property
    def weights_sha256(self) -> str:
        """The sha256 of the model's weights, as a manifest records it."""
        return self.folder.source().weights_sha256

    def _check_vision(self, plan: KeepPlan) -> None:
        if not plan.vision_cuts:
            return
        if plan.input is not None and getattr(method_class(plan.input.method), "whole_frames", False):
            raise PlanError(
                f"{plan.input} compares the same places of whole frames, and {plan.vision_cuts[-1]} leaves only some.",
                hint="Leave one of them out.",
            )
        self.family.vision(plan.geometry, cuts=plan.vision_cuts)  # raises for cuts that its blocks or views cannot apply

    def decoder_shape(self) -> DecoderShape:
        """Return the decoder's dimensions."""
        parts = self.family.decoder()
        return DecoderShape(
            layers=len(parts.layers),
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            hidden=parts.hidden,
            vocabulary=parts.vocabulary,
            position_axes=self.family.position_axes,
            context=parts.context,
            planes=parts.planes,
            bidirectional=parts.bidirectional,
            local_layers=parts.local_layers,
            states=parts.layer_states,
            heads=parts.heads,
            window=max(parts.windows, default=0),
            layer_weights=parts.layer_weights,
        )

    def chat_template(self, image: ImageText) -> str:
        """Return the checkpoint's chat template, or the family's if it has none or its own lacks the image placeholder.

        One whose processor transformers does not have is asked as the code beside it does. Raises UnsupportedModelError if there is
        no template.
        """
        if (outside := self._outside_chat()) is not None:
            return outside.template
        template = chat_template(self.processor)
        default: str | None = self.family.chat_template
        if default is not None and (template is None or (image.placeholder in default and image.placeholder not in template)):
            template = default
        if not isinstance(template, str):
            raise no_chat_template(self.folder.name)
        return template

    def special_tokens(self) -> dict[str, str]:
        """Return the named special tokens that chat templates use, such as bos_token."""
        return {name: text for name, text in self.tokenizer.special_tokens_map.items() if isinstance(text, str)}

    def end_tokens(self) -> tuple[int, ...]:
        """Return the ids that end an answer; raise UnsupportedModelError if there are none."""
        end = self.model.generation_config.eos_token_id
        if end is None or end == []:
            raise no_end_token(self.folder.name)
        ends = tuple(end) if isinstance(end, list) else (int(end),)
        if (outside := self._outside_chat()) is not None:
            ends = tuple(dict.fromkeys((*ends, self.tokenizer.convert_tokens_to_ids(outside.end))))
        return ends

    def _outside_chat(self) -> OutsideChat | None:
        chats: Mapping[str, OutsideChat] = self.family.outside_chats
        return chats.get(str(self.folder.processor.get("processor_class")))

    def generation_defaults(self) -> GenerationDefaults:
        """Return what generation_config.json does to logits in greedy decoding.

        Raises UnsupportedModelError for settings that would change greedy answers and that the runtime cannot apply.
        """
        settings = self.model.generation_config
        for name, neutral in _NOT_APPLIED.items():
            if getattr(settings, name, None) not in (None, *neutral):
                raise UnsupportedModelError(
                    f"{self.folder.name} generates with {name}={getattr(settings, name)}, which the runtime cannot apply.",
                    hint="Remove it from generation_config.json.",
                )
        banned = list(settings.bad_words_ids or ())
        if any(len(words) != 1 for words in banned):
            raise UnsupportedModelError(
                f"{self.folder.name} forbids sequences of tokens (bad_words_ids), which the runtime cannot apply.",
                hint="Remove all but single tokens from generation_config.json.",
            )
        # transformers' NoBadWordsLogitsProcessor lets end tokens pass.
        suppressed = {words[0] for words in banned} - set(self.end_tokens()) | set(settings.suppress_tokens or ())
        return GenerationDefaults(float(settings.repetition_penalty or 1.0), tuple(sorted(suppressed)))

    def check_prompt(self, geometry: Geometry) -> None:
        """Raise UnsupportedModelError if prompts about such images cannot be written, or answers to them would never end."""
        image = self.family.image_text(geometry)
        self.chat_template(image)
        self.end_tokens()
        self.generation_defaults()
        count = self.tokenizer.encode(image.text, add_special_tokens=False).count(image.token)
        if geometry.spans(count) is None:
            raise no_image_token(self.folder.name, image.token)


def resolve_model(
    name: str, *, revision: str | None = None, adapter: str | None = None, trust_remote_code: bool = False
) -> ModelFolder:
    """Return the checked model of `name`: a folder, an id of the hub, "tabletop" for the bundled model, or "tabletop-l".

    `revision`: branch, tag or commit of a model of the hub. `adapter`: a LoRA adapter to merge, a folder or an id of the hub. Of a
    model of the hub the small files are downloaded; `fetch_weights` downloads the rest.

    Raises UsageError for a model that is missing or incomplete, and UnsupportedModelError for an unknown model type, another
    format than safetensors, and weights of a quantization that is not read.
    """
    snapshot = _snapshot(name, revision, trust_remote_code)
    path, files = snapshot.path, snapshot.sizes
    if is_bundle(path):
        raise UsageError(
            f"{name} is a bundle: its model is exported already.",
            hint="Give the transformers folder that it was exported from, or tabletop for the bundled model.",
        )
    check_files(name, path, files)
    config = read_json(path, "config.json")
    check_config(name, path, config)
    model_type = str(config["model_type"])
    settings = image_settings(path, model_type)
    check_processor(name, model_type, processor_names(path, settings))
    weight_names(name, path, files)
    merged = None if adapter is None else resolve_adapter(adapter)
    trusted = trust_remote_code and "auto_map" in config
    return ModelFolder(name, path, model_type, settings, trusted, snapshot.commit, snapshot.hub_id, merged)


def fetch_weights(folder: ModelFolder) -> None:
    """Download the weights of a model of the hub, and of its adapter, that are not in their folders yet.

    Raises EdgePruneError if the disk is too small for them, access is not granted, or the download is interrupted.
    """
    if folder.hub_id:
        names = weight_names(folder.name, folder.path, files_of(folder.hub_id, folder.path))
        download(folder.hub_id, folder.commit, names)
    if folder.adapter is not None:
        folder.adapter.fetch()


def _snapshot(name: str, revision: str | None, trust_remote_code: bool) -> Snapshot:
    path = {TABLETOP: MODEL_FOLDER, TABLETOP_L: large_model_folder()}.get(name) or Path(name)
    if is_folder(path):
        return local_snapshot(path, revision)
    if name == TABLETOP_L:
        raise UsageError("TableTop-L is not on this machine yet.", hint="Make it, in a checkout of EdgePrune: make instrument")
    if is_file(path) and path.suffix == GGUF:
        raise gguf(name, path.parent)
    if is_file(path):
        raise UsageError(f"{name} is a file.", hint="Give a transformers folder.")
    if is_hub_id(name):
        return hub_snapshot(name, revision, code=trust_remote_code)
    raise UsageError(
        f"There is no model folder {name}.",
        hint=f"{did_you_mean(name, [TABLETOP, TABLETOP_L])}Give a transformers folder, an id of the Hugging Face Hub such as "
        "Qwen/Qwen2.5-VL-3B-Instruct, or tabletop for the bundled model.",
    )


def load_model(folder: ModelFolder, *, on_disk: bool = False) -> LoadedModel:
    """Load the weights; raise UnsupportedModelError if tensors are missing, unexpected or of another shape or type.

    `on_disk`: large matrices stay in their files until a graph is written. Such a model can be exported but not run.
    """
    require_extra("export", "torch", "transformers", "optimum")
    fetch_weights(folder)
    from edgeprune.checkpoint.packed import spare_biases, with_packed_layers
    from edgeprune.checkpoint.weights import stored_tensors

    packing = packing_of(folder.name, folder.path, read_json(folder.path, "config.json"))
    family, config, model_class = _configured(folder)
    sources = with_packed_layers(folder.name, stored_tensors(folder.path), packing)
    try:
        model, report = _model(model_class, folder, config, sources, on_disk=on_disk)
    except (OSError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(f"Cannot load {folder.name}: {str(error).splitlines()[0]}") from error
    report["unexpected_keys"] = set(report["unexpected_keys"]) - set(spare_biases(model, sources))
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            raise UnsupportedModelError(f"{folder.name} has {problem.replace('_', ' ')}: {sorted(report[problem])[:3]}.")
    if folder.adapter is not None:
        merge(folder.adapter, model)
    return LoadedModel(folder, model.eval(), family(model), load_processor(folder.path, folder.model_type))


def load_outline(folder: ModelFolder) -> LoadedModel:
    """Return the model without its weights, which are neither read nor downloaded, and without a processor: for what sizes decide.

    Every parameter is a placeholder of its true shape. Of a quantized checkpoint it is the model before it was quantized. Raises
    UnsupportedModelError for a configuration that the family does not support.
    """
    require_extra("export", "torch", "transformers", "optimum")
    import torch

    from edgeprune.checkpoint.weights import placeholder_state

    family, config, model_class = _configured(folder)
    with torch.device("meta"):
        skeleton = model_class(config)
    state = placeholder_state(skeleton)
    model, _ = model_class.from_pretrained(None, config=config, state_dict=state, **_LOAD_OPTIONS)
    return LoadedModel(folder, model.eval(), family(model), None)


def _configured(folder: ModelFolder) -> tuple[Any, Any, Any]:
    # The family, the configuration without its quantization, and the class of the model.
    import transformers

    transformers.utils.logging.disable_progress_bar()  # the command shows its own stages
    family = family_class(folder.model_type)
    config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=folder.trusted)
    family.check(config)
    for part in (config, getattr(config, "text_config", config)):
        part.__dict__.pop("quantization_config", None)  # with it, transformers asks for the packages of its method
    return family, config, _class_of(folder, config)


def _class_of(folder: ModelFolder, config: Any) -> Any:
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = {name: where for name, where in (getattr(config, "auto_map", None) or {}).items() if name.startswith("AutoModelFor")}
    if folder.trusted and own:
        return get_class_from_dynamic_module(next(iter(own.values())), str(folder.path), local_files_only=True)
    if not config.architectures:
        return transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    named = config.architectures[0]
    if not hasattr(transformers, named):
        hint = "Its own code may have it: read that, then give --trust-remote-code." if own else ""
        raise UnsupportedModelError(f"{folder.name} names the architecture {named}, which transformers does not have.", hint=hint)
    return getattr(transformers, named)


def _model(
    model_class: Any, folder: ModelFolder, config: Any, sources: list[CheckpointTensor], *, on_disk: bool
) -> tuple[Any, dict[str, Any]]:
    import transformers
    from transformers.core_model_loading import WeightConverter

    from edgeprune.checkpoint.packed import PackedMatrix
    from edgeprune.checkpoint.weights import attach, state_of

    state = state_of(sources)
    model, report = model_class.from_pretrained(None, config=config, state_dict=state, **_LOAD_OPTIONS)
    # Tensors may be renamed on loading, but converters that split or join them need the values.
    if any(isinstance(change, WeightConverter) for change in model._weight_conversions):
        state = state_of(sources, whole=True)
        model, report = model_class.from_pretrained(None, config=config, state_dict=state, **_LOAD_OPTIONS)
    attached = attach(model, sources, state, on_disk=on_disk)
    strange = [source.name for source in sources if isinstance(source, PackedMatrix) and source.name not in attached]
    if strange:
        raise ValueError(f"{strange[0]} is quantized, but no linear layer has it as it is.")
    path = folder.path / "generation_config.json"
    if path.is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder.path, local_files_only=True)
    return model, report

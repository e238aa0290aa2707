"""The eager reference: the runtime's generation loop on a PyTorch backend instead of ONNX Runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer

from edgeprune.bundle.graph_io import SIGNALS
from edgeprune.checkpoint.configuration import check_context
from edgeprune.checkpoint.loading import LoadedModel, ModelFolder, load_model
from edgeprune.errors import EdgePruneError, UnsupportedModelError, UsageError
from edgeprune.model import PrunedDecoder, Segment, TextEmbedding, input_selector, signals_for
from edgeprune.model.quantization import Quantized, at_precision
from edgeprune.plan import Geometry, KeepPlan
from edgeprune.processors import image_spec
from edgeprune.registry import METHODS, allow_method, method_class
from edgeprune.runtime import Runtime
from edgeprune.runtime.backends.interface import CancellationToken, DecoderOutput, VisionOutput
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.text.prompt import ChatTemplate, Message, PromptEncoder
from edgeprune.runtime.text.tokenizer import TextTokenizer
from edgeprune.targets import Lowering

SHARED = 1 << 29  # bytes of encoded images that several plans share
_UNLIMITED = 1 << 40  # tokens


class Shared:
    """What pipelines of one model and device share: the encoders of prompts, and what its vision encoder made of the last images.

    Up to `limit` bytes of images are kept, and the last one in any case, because questions about an image follow each other.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit, self._bytes = limit, 0
        self._found: dict[Hashable, VisionOutput] = {}  # the last used one is the last
        self._prompts: dict[Geometry, PromptEncoder] = {}

    def prompts(self, loaded: LoadedModel, geometry: Geometry) -> PromptEncoder:
        """Return the encoder of prompts about images of one geometry. Raises the errors of `prompt_encoder`."""
        if geometry not in self._prompts:
            self._prompts[geometry] = prompt_encoder(loaded, geometry)
        return self._prompts[geometry]

    def encoded(self, patches: np.ndarray, how: Hashable, encode: Callable[[], VisionOutput]) -> VisionOutput:
        """Return the encoded `patches`; `how` says in which way they are encoded, `encode` does it where it has to be done."""
        key = hashlib.sha256(patches.tobytes()).digest(), patches.shape, how
        found = self._found.pop(key, None)
        if found is None:
            found = encode()
            self._bytes += _bytes_of(found)
        self._found[key] = found
        while self._bytes > self._limit and len(self._found) > 1:
            self._bytes -= _bytes_of(self._found.pop(next(iter(self._found))))
        return found


def _bytes_of(output: VisionOutput) -> int:
    return sum(array.nbytes for array in (output.embeds, *output.signals.values(), *output.kept))


class TorchBackend:
    """Runs the family's vision encoder, the input cut and the pruned decoder eagerly on `device`.

    `shared`: with other backends of the same model and device.
    """

    def __init__(self, loaded: LoadedModel, plan: KeepPlan, device: str = "cpu", shared: Shared | None = None) -> None:
        loaded.model.to(device)
        self._device = device
        self._parts = parts = loaded.family.decoder()
        self._signals = signals_for(plan, loaded.family)
        self._plan, self._family = plan, loaded.family
        self._vision = loaded.family.vision(plan.geometry, signals=bool(self._signals), cuts=plan.vision_cuts).eval().to(device)
        self._unpruned: torch.nn.Module | None = None  # built on first use
        self._shared = shared or Shared()
        self._embed = TextEmbedding(parts)
        self._decoder = PrunedDecoder(parts, plan).eval()
        projector = self._vision.projector if len(self._signals) == len(SIGNALS) else None
        self._selector = input_selector(plan, parts.hidden, projector).to(device) if plan.input else None
        self._rate_predictor = (
            method_class(plan.decode.method)(plan.decode, plan.geometry).rate_predictor().to(device)
            if plan.decode and plan.has_rate_predictor
            else None
        )

    @property
    def tower(self) -> torch.nn.Module:
        """The vision encoder with its projector."""
        tower: torch.nn.Module = self._vision
        return tower

    def matrices(self) -> dict[str, torch.nn.Linear]:
        """Return the linear layers by part and by the name of their weights in the graphs, such as decoder.lm_head.

        A layer that a tower holds under two names is there under both, because the exporter may take either.
        """
        return {
            f"{part}.{name}": module
            for part, whole in (("vision", self._vision), ("decoder", self._decoder))
            for name, module in whole.named_modules(remove_duplicate=False)
            if isinstance(module, torch.nn.Linear)
        }

    @contextmanager
    def lowered(self, lowering: Lowering, fitted: Mapping[str, Quantized] | None = None) -> Iterator[None]:
        """Compute with the weights and rounding of a lowering, and `fitted` matrices, while the block runs."""
        before, self._shared = self._shared, Shared()
        with at_precision(self._parts, self._vision, lowering, fitted):
            yield
        self._shared = before

    @torch.no_grad()
    def encode_image(
        self, patches: np.ndarray, *, unpruned: bool = False, cancellation: CancellationToken | None = None
    ) -> VisionOutput:
        """Encode patches [patches, patch pixels]; `unpruned`: without the cuts in the vision encoder.

        The same patches as in the last call are not encoded again.
        """
        whole = unpruned or not self._plan.vision_cuts
        how = self._plan.geometry, () if unpruned else self._signals, "" if whole else repr(self._plan.vision_cuts)
        return self._shared.encoded(patches, how, lambda: self._encoded(patches, unpruned))

    def _encoded(self, patches: np.ndarray, unpruned: bool) -> VisionOutput:
        vision, names = self._vision, self._signals
        if unpruned and self._plan.vision_cuts:
            self._unpruned = self._unpruned or self._family.vision(self._plan.geometry).eval().to(self._device)
            vision, names = self._unpruned, ()
        outputs = vision(self._tensor(patches))
        embeds, *others = map(_array, outputs if isinstance(outputs, tuple) else (outputs,))
        return VisionOutput(embeds, dict(zip(names, others, strict=False)), tuple(others[len(names) :]))

    @torch.no_grad()
    def select_tokens(self, vision_output: VisionOutput, prompt: np.ndarray, tier: int = 0) -> tuple[np.ndarray, ...]:
        """Apply the plan's input cut with prompt embeddings [1, M, hidden]; return kept embeddings [1, K, hidden], indices [K].

        If the plan weighs, the logarithms of how many tokens each kept one stands for [K] are the third.
        """
        assert self._selector is not None
        order = [vision_output.token_indices] if self._plan.vision_cuts else []
        others = [self._tensor(values) for values in (*order, *vision_output.signals.values())]
        return tuple(map(_array, self._selector(self._tensor(vision_output.embeds), self._tensor(prompt), *others)))

    @torch.no_grad()
    def embed_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Return the embeddings [1, n, hidden] of token ids."""
        return _array(self._embed(torch.tensor([list(ids)], device=self._device)))

    @torch.no_grad()
    def forward(self, tokens: DecoderInput, cache: KvCache, *, cancellation: CancellationToken | None = None) -> DecoderOutput:
        """Run the decoder over new tokens and a KV cache."""
        segments = [
            Segment(self._tensor(part.embeds), self._tensor(part.positions))
            for part in (tokens.prefix, tokens.visual, tokens.suffix)
        ]
        caches = self._decoder.caches([self._tensor(rows) for rows in (*cache.text, *cache.visual, *cache.states)])
        groups = self._tensor(tokens.text_groups) if self._plan.follows_attention else None
        weights = None if tokens.weights is None else self._tensor(tokens.weights)
        output = self._decoder(*segments, caches, self._tensor(tokens.visual_indices), weights=weights, text_groups=groups)
        return DecoderOutput(
            _array(output.logits)[0, 0],
            tuple(_array(rows) for rows in self._decoder.flat_rows(output.rows)),
            tuple(_array(kept) for kept in output.kept),
            None if output.split is None else _array(output.split),
            states=tuple(_array(state) for state in self._decoder.flat_states(output.rows)),
        )

    @torch.no_grad()
    def predict_keep_ratio(self, split: np.ndarray, step: int) -> float:
        """Return the predictor's keep ratio for decode step `step`; `split` [layers, 4]: attention shares."""
        assert self._rate_predictor is not None
        return float(self._rate_predictor(self._tensor(split), torch.tensor([float(step)], device=self._device))[0])

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)  # rows of bfloat16 are held as their bits
        return (tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor).to(self._device)


def check_device(device: str) -> None:
    """Raise UsageError unless torch can compute on a device."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"Unknown device {device!r}.", hint="Devices are cpu and cuda.")
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device here.", hint="Leave --device out, or install a CUDA build of torch.")


def reference_model(loaded: LoadedModel, plan: KeepPlan, device: str = "cpu", shared: Shared | None = None) -> Pipeline:
    """Return a pipeline on the PyTorch model; wrap it in `edgeprune.runtime.Runtime` to generate answers.

    `shared`: with other pipelines of the same model and device.
    """
    loaded.check_plan(plan)
    shared = shared or Shared()
    return Pipeline(
        backend=TorchBackend(loaded, plan, device, shared),
        prompts=shared.prompts(loaded, plan.geometry),
        image_spec=image_spec(loaded.settings(plan.geometry)),
        eos_token_ids=loaded.end_tokens(),
        generation=loaded.generation_defaults(),
        decoder=loaded.decoder_shape(),
        plan=plan,
    )


_opened: list[LoadedModel] = []  # the last model that `open_reference` loaded


def open_reference(folder: ModelFolder, plan: KeepPlan, device: str = "cpu") -> Runtime:
    """Load a model and return a runtime on it, in a process that works for another: see `calibration.cluster`.

    The last model stays loaded. The plan's own methods may run their code, as they may in the other process.
    """
    if not _opened or _opened[0].folder != folder:
        _opened[:] = [load_model(folder)]
    for cut in plan.cuts:
        if cut.method not in METHODS:
            allow_method(cut.method)
    return Runtime(reference_model(_opened[0], plan, device))


def prompt_encoder(loaded: LoadedModel, geometry: Geometry) -> PromptEncoder:
    """Return the encoder of prompts about images of one geometry, after writing one with it.

    Raises UnsupportedModelError if prompts cannot be written, or answers to them would never end. Raises UsageError if the context
    does not hold an image with a question.
    """
    loaded.check_prompt(geometry)
    name, image, context = loaded.folder.name, loaded.family.image_text(geometry), loaded.family.decoder().context
    encoder = PromptEncoder(
        ChatTemplate(loaded.chat_template(image)),
        TextTokenizer(Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())),
        loaded.special_tokens(),
        image,
        geometry,
        _UNLIMITED,
    )
    question = "What is this?"
    messages: list[Message] = [{"role": "user", "content": [{"type": image.kind}, {"type": "text", "text": question}]}]
    try:
        ids = encoder.ids(messages)
        written = encoder.template.render(messages, add_generation_prompt=True, **encoder.special_tokens)
    except EdgePruneError as error:
        raise UnsupportedModelError(
            f"The chat template of {name} writes no prompt about an image: {error.message}",
            hint="Copy all processor files of the checkpoint into the folder.",
        ) from error
    if question not in written:  # Pixtral-12B's reads part["content"], and would leave out every text without a word
        raise UnsupportedModelError(
            f"The chat template of {name} leaves out the text of a question.",
            hint='Have it write part["text"] of the parts of type "text", in chat_template.jinja or chat_template.json.',
        )
    check_context(name, geometry, context, text=len(ids) - len(encoder.placeholders.spans))
    return replace(encoder, context=context)


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    array: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array

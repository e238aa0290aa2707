"""The interface of model families, and the plain text decoders that they share: Llama, Mistral, Ministral 3, Qwen2 and Qwen3.

The decoder modules are those of transformers' models/llama, models/mistral, models/ministral3, models/qwen2 and models/qwen3. A
sliding window and dynamic scaling of the rotary positions have no effect up to their length, so they bound `context` instead of
being refused. Ministral 3 scales its queries by their position, in steps of the length of its first training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.bundle import ImageText, LayerState, Operations
from edgeprune.errors import UnsupportedModelError
from edgeprune.plan import Cut, Geometry

KINDS = ("llama", "ministral3", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class DecoderParts:
    """The modules and dimensions of a decoder.

    `layers`: decoder layers with `input_layernorm`, `self_attn` (q_proj, k_proj, v_proj, o_proj, `scaling`, optionally q_norm and
    k_norm per head), `post_attention_layernorm` and `mlp`. `rope(positions)`: cosines and sines, each [S, head_dim] or of a first
    part of it, of integer positions [axes, S]; [S, 2 * head_dim] if layers with a window have angles of their own, which come
    second. `embed_tokens`: the module from ids to the embeddings that enter layer 0, including any scaling.
    `query_scale(positions)`: factors [S, 1] of the queries, if these depend on the position.

    `planes`: the number of first layers that add an extra feature to every visual token (DeepStack); visual tokens and embeddings
    are (1 + planes) * hidden wide. `bidirectional`: all tokens of one step attend to each other (a prefix language model).
    `context`: the longest supported sequence in tokens. `softcap`: the soft cap of attention scores, if any. `windows`: for each
    layer, how many of the last tokens of the sequence a token attends to, itself included, 0 for all; empty if no layer has one.

    `gated`: q_proj gives each head a gate of the attention's output after its query. `states`: the shapes of the states of each
    layer without attention. Such a layer has a `mixer` in place of `self_attn`: it maps hidden states [S, hidden] in the order of
    the sequence, and the states before them, to its output [S, hidden] and the new states. `loops`: a mixer does so in a loop.
    """

    layers: nn.ModuleList
    norm: nn.Module
    lm_head: nn.Module
    embed_tokens: nn.Module
    rope: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    planes: int = 0
    bidirectional: bool = False
    query_scale: Callable[[torch.Tensor], torch.Tensor] | None = None
    softcap: float | None = None
    windows: tuple[int, ...] = ()
    gated: bool = False
    loops: bool = False
    states: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    @property
    def local_layers(self) -> tuple[int, ...]:
        """The layers with a window."""
        return tuple(layer for layer, window in enumerate(self.windows) if window)

    @property
    def layer_weights(self) -> tuple[int, ...]:
        """The elements of the matrices of each layer."""
        return tuple(sum(part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear)) for layer in self.layers)

    @property
    def layer_states(self) -> tuple[LayerState, ...]:
        """The states of all layers, in the order of the layers."""
        return tuple(LayerState(layer, shape) for layer, shapes in sorted(self.states.items()) for shape in shapes)


@dataclass(frozen=True)
class OutsideChat:
    """How the code beside a checkpoint asks it: a chat `template` that writes the same, and the token that ends a turn."""

    template: str
    end: str


class Family:
    """An adapter to one architecture: checks its configuration, formats images in the text and locates its modules.

    `position_axes`: 3 with mRoPE; 2 if the visual tokens of an image attend to each other: the place of a token in the sequence,
    and the last place that it attends to. `signals`: extra outputs of the vision encoder, for input methods that name them in
    `needs`; `no_signals_reason`: why there are none. `projects_tokens`: whether the projector acts on each visual token alone.
    `no_encoder_cuts_reason`: why no token can be dropped inside the encoder, if so. `stateful`: what most layers have instead of
    attention, if so. `videos`: whether the model was trained on videos. `own_video_prompts`: why prompts about videos are not those
    of transformers' processor, if so. `several_as_one`: whether transformers encodes several images of one prompt as it encodes
    one. `chat_template`: the default for model folders without one. `outside_chats`: by `processor_class`, how checkpoints are
    asked whose processor transformers does not have.
    """

    name: ClassVar[str]
    position_axes: ClassVar[int] = 1
    signals: ClassVar[tuple[str, ...]] = ("vision attention",)
    projects_tokens: ClassVar[bool] = False
    no_signals_reason: ClassVar[str] = ""
    no_encoder_cuts_reason: ClassVar[str] = ""
    stateful: ClassVar[str] = ""
    videos: ClassVar[bool] = False
    own_video_prompts: ClassVar[str] = ""
    several_as_one: ClassVar[bool] = True
    chat_template: ClassVar[str | None] = None
    outside_chats: ClassVar[Mapping[str, OutsideChat]] = {}

    def __init_subclass__(cls) -> None:
        # What these make beside the weights, such as tables of positions, has to be where the weights are.
        for name in ("vision", "decoder"):
            if name in vars(cls):
                setattr(cls, name, _beside_the_weights(vars(cls)[name]))

    def __init__(self, model: Any) -> None:
        self._model = model

    @staticmethod
    def check(config: Any) -> None:
        """Raise UnsupportedModelError for a configuration that the family's graphs do not support."""
        raise NotImplementedError

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the settings for `edgeprune.processors.image_spec`, from the image processor and the model's configuration.

        With `size` (height, width), processors that take any size bring images of that aspect to it.
        """
        raise NotImplementedError

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the text that represents an image or a video in a prompt."""
        raise NotImplementedError

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return a module from patches [patches, patch pixels] to visual tokens [1, V, (1 + planes) * hidden].

        Its attributes are `takes`, the shape of its patches, and `blocks`, the number of encoder blocks that run. With `signals`
        (if the family has them) it also returns the attention that each token receives [V] and its keys, averaged over heads [V,
        key dim]; a family that `projects_tokens` also returns the features [V, width] of which its `projector` makes the tokens.
        With `cuts` (unless the family has a `no_encoder_cuts_reason`) all outputs cover only the kept tokens, followed by the
        ascending indices in the image [K] that each vision cut kept.

        Raises PlanError for a cut beyond the encoder's blocks, or if its count does not divide among the views.
        """
        raise NotImplementedError

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        raise NotImplementedError


def _beside_the_weights(build: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(build)
    def build_there(self: Family, *arguments: Any, **options: Any) -> Any:
        device = self._model.device
        # An outline's weights have no data: what is computed of other numbers stays on the CPU.
        with torch.device(device) if device.type == "cuda" else nullcontext():
            return build(self, *arguments, **options)

    return build_there


def encoder_work(tower: Any) -> Operations:
    """Return the operations of one image in a module of `Family.vision`, counted as it runs on tensors without data.

    Views, frames and windows, layers that never run and cuts are counted as the module has them. A product of two activations
    counts as attention.
    """
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        tower(torch.empty(tower.takes, device=next(tower.parameters()).device))
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operator, count in counts.items() if operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return Operations(products, sum(counts.values()) - products)


def text_rope(rotary: nn.Module) -> nn.Module:
    """Return the rope of a Hugging Face text model with 1-D positions: integers [1, S] to cosines and sines [S, head_dim]."""
    return _TextRope(rotary)


class _TextRope(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rotary(self.rotary.inv_freq, positions)
        return cos[0], sin[0]


def _query_scale(config: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    # Ministral 3: get_llama_4_attn_scale, for positions [1, S].
    if config.model_type != "ministral3":
        return None
    rope = config.rope_parameters
    beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    return lambda positions: 1 + beta * torch.log(1 + torch.floor(positions[0, :, None] / length))


def check_text(config: Any) -> None:
    """Refuse unsupported text models (including mixtures of experts) and longrope positions."""
    text = config.text_config
    if text.model_type not in KINDS:
        raise UnsupportedModelError(
            f"Its text model {text.model_type!r} is not supported behind {config.model_type!r}.",
            hint=f"Supported: {', '.join(KINDS)}.",
        )
    if text.rope_parameters["rope_type"] == "longrope":
        raise UnsupportedModelError("This model's 'longrope' rotary positions depend on the length, which is not supported.")


def text_decoder(text: Any, lm_head: nn.Module) -> DecoderParts:
    """Return the decoder parts of a Hugging Face text model (without its head) and its head."""
    config = text.config
    rotary = copy.copy(text.rotary_emb)
    if rotary.rope_type == "dynamic":
        rotary.rope_type = "default"  # within `context` the initial frequencies apply
    return DecoderParts(
        layers=text.layers,
        norm=text.norm,
        lm_head=lm_head,
        embed_tokens=text.embed_tokens,
        rope=text_rope(rotary),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        context=min(config.max_position_embeddings, getattr(config, "sliding_window", None) or config.max_position_embeddings),
        query_scale=_query_scale(config),
    )

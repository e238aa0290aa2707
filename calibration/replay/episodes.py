"""Record the unpruned model's answer to a sample (prefill, KV caches, answer tokens) and replay it with changed caches.

A sample of several images has a recording for each: in one forward pass the image is the visual segment, and the other images are
part of the prefix, which is never cut. So whatever is measured on an image is measured beside the others as they are. Where a
selection is learned, all images are the visual segment of one recording instead, so that each is learned beside the others pruned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch

from edgeprune.calibration.data.samples import BadSampleError, OnBadSample, Sample
from edgeprune.calibration.replay.reference import Shared, reference_model
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.io.progress import SILENT, Progress
from edgeprune.model import LayerCache, PrunedDecoder, Segment, StepOutput
from edgeprune.model.cache import LayerStates
from edgeprune.plan import KeepPlan, keep_count_up
from edgeprune.runtime.backends.compare import RecordingBackend
from edgeprune.runtime.backends.kv_cache import DecoderInput, KvCache, TokenSegment
from edgeprune.runtime.generation.conversation import Conversation, ImageOrFrames
from edgeprune.runtime.generation.pipeline import Pipeline, SharedState
from edgeprune.runtime.generation.sampling import Sampling
from edgeprune.runtime.media.images import read_image
from edgeprune.runtime.text.tokenizer import TextTokenizer

_SHARED = 1 << 31  # bytes of an image's features and KV cache that are kept for the next question
_NO_GROUPS = np.zeros((0, 3), np.float32)


@dataclass(frozen=True)
class Recording:
    """A recorded answer.

    `prefill`: the decoder's input at prefill. `caches`: the KV caches after it, visual tokens in rank order. `answer`: all answer
    tokens except the last, which is never a decoder input. `groups` [text, 3]: the text groups of prompt and answer; those of the
    visual tokens of other images are zero.
    """

    prefill: DecoderInput
    caches: tuple[LayerCache, ...]
    answer: Segment
    groups: torch.Tensor

    @property
    def steps(self) -> int:
        """The number of decode steps of the answer."""
        return self.answer.embeds.shape[1]


class Recorder:
    """Records and replays answers on a model whose visual caches are ranked but not cut (`ranked_plan`)."""

    def __init__(self, loaded: LoadedModel, plan: KeepPlan, max_tokens: int, device: str, shared: Shared | None = None) -> None:
        self.plan = plan
        self._pipeline = reference_model(loaded, self.plan, device, shared)
        self._max_tokens, self._device = max_tokens, device
        self._whole: DecoderInput | None = None  # the last prefill with an image in it
        self.decoder = PrunedDecoder(loaded.family.decoder(), self.plan).eval()
        loaded.model.requires_grad_(False)  # the model itself is never trained

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of prompts and answers."""
        return self._pipeline.tokenizer

    def record(self, sample: Sample, fit: str) -> tuple[Recording, ...]:
        """Record the greedy answer to one sample, for each of its images. An answer of one token has no decode steps.

        Raises BadSampleError for a sample that cannot be asked about.
        """
        return tuple(self.with_caches(recording) for recording in self.ask(sample, fit))

    def see(self, images: int) -> None:
        """Begin with other images, `images` in a sample. Until then the samples that `ask` is given are about the same.

        A single image is encoded and prefilled once, unless a prompt changes what is cached of it.
        """
        shared = images == 1 and not self._pipeline.decoder.states
        self._pipeline = replace(self._pipeline, state=SharedState(_SHARED if shared else 0))

    def ask(self, sample: Sample, fit: str, *, together: bool = False) -> tuple[Recording, ...]:
        """Like `record`, without the caches of the recordings. `together`: one recording, whose visual segment is all images."""
        recorder, images, _ = ask(self._pipeline, sample, fit, self._max_tokens)
        prefills, steps = recorder.inputs[:images], recorder.inputs[images:]
        inputs = [tokens.suffix for tokens, _ in steps]
        empty = prefills[-1][0].suffix
        embeds = [self._tensor(part.embeds) for part in inputs] or [self._tensor(empty.embeds[:, :0])]
        positions = [self._tensor(part.positions) for part in inputs] or [self._tensor(empty.positions[:, :0])]
        answer = Segment(torch.cat(embeds, dim=1), torch.cat(positions, dim=1))
        said = self._tensor(steps[-1][0].text_groups[len(prefills[-1][0].text_groups) :] if steps else _NO_GROUPS)
        tokens = prefills[0][0]
        if tokens.visual.embeds.shape[1] or self._whole is None:
            shown = [tuple(range(images))] if together else [(number,) for number in range(images)]
            beside = [beside_others(prefills, *numbers) for numbers in shown]
            self._whole = beside[0]
        else:
            beside = [replace(self._whole, suffix=tokens.suffix, text_groups=tokens.text_groups)]
        return tuple(Recording(each, (), answer, torch.cat([self._tensor(each.text_groups), said])) for each in beside)

    def embedded(self, text: str) -> torch.Tensor:
        """Return the embeddings [M, hidden] of the words of a question, without the chat template."""
        return self._tensor(self._pipeline.backend.embed_tokens(self._pipeline.tokenizer.encode(text)))[0]

    @torch.no_grad()
    def with_caches(self, recording: Recording) -> Recording:
        """Return a recording, also one that another recorder made of this model, with the caches of this plan."""
        prefill = recording.prefill
        before, after = (part.embeds.shape[1] for part in (prefill.prefix, prefill.suffix))
        empty = self.decoder.empty_caches()
        rows = self.decoder(*self.segments(recording), empty, self._tensor(prefill.visual_indices)).rows
        filled = [cache.append(new, before, after) for cache, new in zip(empty, rows, strict=True)]
        return replace(recording, caches=_with_attention(filled))

    @torch.no_grad()
    def teacher_forced_logits(self, sample: Sample, ids: Sequence[int], fit: str) -> torch.Tensor:
        """Return the logits [len(ids) + 1, vocabulary] for the given answer tokens: before each token and after the last."""
        recorder, images, conversation = ask(self._pipeline, sample, fit, 1)
        tokens, _ = recorder.inputs[images - 1]
        first = self._tensor(recorder.steps[images - 1].logits)[None]
        if not ids:
            return first
        positions = self._tensor(tokens.suffix.positions[:, -1:]) + 1 + torch.arange(len(ids), device=self._device)
        answer = Segment(self._tensor(self._pipeline.backend.embed_tokens(ids)), positions)
        replayed = self.replay(Recording(tokens, self._caches(conversation.cache), answer, self._tensor(tokens.text_groups)))
        return torch.cat([first, replayed.logits[0]])

    def segments(self, recording: Recording) -> tuple[Segment, Segment, Segment]:
        """Return the prefill's prefix, visual and suffix segments."""
        tokens = recording.prefill
        return tuple(self._segment(part) for part in (tokens.prefix, tokens.visual, tokens.suffix))  # type: ignore[return-value]

    @torch.no_grad()
    def first_attention_shares(self, recording: Recording) -> torch.Tensor:
        """Return the attention shares [layers, 4] of the last prompt token."""
        groups = self._tensor(recording.prefill.text_groups)
        order = self._tensor(recording.prefill.visual_indices)
        output = self.decoder(*self.segments(recording), self.decoder.empty_caches(), order, text_groups=groups)
        assert output.split is not None
        return torch.as_tensor(output.split)

    @torch.no_grad()
    def replay(self, recording: Recording, caches: tuple[LayerCache, ...] | None = None, **options: object) -> StepOutput:
        """Run the answer in one forward pass on the prefill's caches, or on `caches`, and return the logits of every token."""
        return self.run(recording, caches, **options)

    def run(self, recording: Recording, caches: tuple[LayerCache, ...] | None = None, **options: object) -> StepOutput:
        """Like `replay`, with gradients."""
        empty = Segment(recording.answer.embeds[:, :0], recording.answer.positions[:, :0])
        output: StepOutput = self.decoder(empty, empty, recording.answer, caches or recording.caches, every_logit=True, **options)
        return output

    def _caches(self, cache: KvCache) -> tuple[LayerCache, ...]:
        return _with_attention(self.decoder.caches([self._tensor(rows) for rows in (*cache.text, *cache.visual)]))

    def _segment(self, tokens: TokenSegment) -> Segment:
        return Segment(self._tensor(tokens.embeds), self._tensor(tokens.positions))

    def _tensor(self, array: object) -> torch.Tensor:
        return torch.as_tensor(array, device=self._device)


def ask(pipeline: Pipeline, sample: Sample, fit: str, most: int) -> tuple[RecordingBackend, int, Conversation]:
    """Answer a sample with at most `most` tokens; return the recorded forward passes, the number of images, and the conversation.

    The first passes are one for each image. Raises BadSampleError for a sample that cannot be asked about.
    """
    recorder = RecordingBackend(pipeline.backend)
    conversation = Conversation(replace(pipeline, backend=recorder), fit=fit)
    with _naming(sample):
        images = _images_of(sample, pipeline.plan)
        for _ in conversation.ask(sample.prompt, images, Sampling(max_tokens=most)):
            pass
    return recorder, len(images), conversation


def _with_attention(caches: Iterable[LayerCache | LayerStates]) -> tuple[LayerCache, ...]:
    return tuple(each for each in caches if isinstance(each, LayerCache))  # all, of a family without states


def usable_samples(
    loaded: LoadedModel, unpruned: KeepPlan, samples: Sequence[Sample], fit: str, on_bad: OnBadSample, progress: Progress = SILENT
) -> list[Sample]:
    """Return the samples whose image can be read and asked about; the errors of all others are given to `on_bad`.

    Which samples are used is known before the first is measured, so that an interrupted run resumes with the same.
    """
    conversation, usable = Conversation(reference_model(loaded, unpruned), fit=fit), []
    checked = progress.count("checking, samples", len(samples))
    for done, sample in enumerate(samples, start=1):
        try:
            with _naming(sample):
                conversation.ask(sample.prompt, _images_of(sample, unpruned))  # checks; nothing runs before the first piece is read
        except BadSampleError as error:
            on_bad(error)
        else:
            usable.append(sample)
        checked(done)
    if not usable:
        raise UsageError("None of the samples could be used.")
    return usable


@contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    # Errors of requests inside name the sample's file and line.
    try:
        yield
    except UsageError as error:
        raise sample.error(error) from error


def _images_of(sample: Sample, plan: KeepPlan) -> Sequence[ImageOrFrames]:
    # All images of a sample for a video are the frames of one.
    pictures = [read_image(path) for path in sample.images]
    return [pictures] if plan.geometry.frames > 1 else pictures


def beside_others(prefills: Sequence[tuple[DecoderInput, KvCache]], *shown: int) -> DecoderInput:
    """Return one prefill of a whole prompt, whose visual segment is the images with the ascending numbers `shown`.

    `prefills`: the recorded forward passes, one for each image. Text that was run ahead of its turn is left out.
    """
    before, groups, (last, _) = list[TokenSegment](), list[np.ndarray](), prefills[-1]
    begins = [cache.length - 1 for _, cache in prefills]  # without the null row
    for index, (tokens, _) in enumerate(prefills):
        between = begins[index] + tokens.prefix.embeds.shape[1]
        end = [*begins, between][index + 1]  # of the text up to the next image; the last one's is the suffix
        before.append(tokens.prefix)
        groups.append(last.text_groups[begins[index] : between])
        if index not in shown:
            before.append(tokens.visual)
            groups.append(np.zeros((tokens.visual.embeds.shape[1], 3), np.float32))
        before.append(tokens.suffix.first(end - between))
        groups.append(last.text_groups[between:end])
    groups.append(last.text_groups[between:])
    images = [prefills[number][0] for number in shown]
    visual = reduce(TokenSegment.concat, [tokens.visual for tokens in images])
    indices = np.concatenate([tokens.visual_indices for tokens in images])
    return DecoderInput(reduce(TokenSegment.concat, before), visual, last.suffix, indices, np.concatenate(groups))


def limit_visual(caches: tuple[LayerCache, ...], layers: Iterable[int], share: float) -> tuple[LayerCache, ...]:
    """Return the caches with only the top-ranked `share` of visual tokens in the given layers."""
    changed = list(caches)
    for layer in layers:
        cache = caches[layer]
        end = 1 + keep_count_up(cache.visual_key.shape[0] - 1, share)
        place = None if cache.visual_place is None else cache.visual_place[:end]
        keys, values = cache.visual_key[:end], cache.visual_value[:end]
        changed[layer] = replace(cache, visual_key=keys, visual_value=values, visual_place=place)
    return tuple(changed)


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence in nats [n] of the actual from the expected logits [n, vocabulary]."""
    reference = torch.log_softmax(expected.double(), dim=-1)
    return (reference.exp() * (reference - torch.log_softmax(actual.double(), dim=-1))).sum(dim=-1)

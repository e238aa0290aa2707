"""A bundle as a model of lmms-eval, answered in the process of the evaluation by `edgeprune.runtime`, without a server."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.model_utils.usage_metrics import is_budget_exceeded, log_usage
from tqdm import tqdm

from edgeprune.bundle import Bundle
from edgeprune.errors import EdgePruneError, ImageError, UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime import Receipt, Runtime, load
from edgeprune_lmms_eval.translation import answer_options, plan_name, turns

_LOADING = ("provider", "threads", "max_kv_bytes", "check")


class EdgePrune(lmms):  # type: ignore[misc]
    """A bundle that answers the questions of lmms-eval, one at a time, greedily unless a task samples.

    `model_args`:

    * `pretrained`: the folder of the bundle.
    * `prune`: False answers with all visual tokens.
    * `fit`: what to do with an image whose aspect is not the bundle's: "exact" refuses it, "pad" and "stretch" change it.
    * `tier`: of a bundle with several plans the one to use.
    * `provider`, `threads`, `max_kv_bytes`, `check`: as in `edgeprune.runtime.load`.

    What cannot be done ends the evaluation with one line (SystemExit): after any other exception lmms-eval prints a traceback and
    exits as if all were well.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        prune: bool = True,
        fit: str = "exact",
        tier: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **loading: Any,
    ) -> None:
        super().__init__()
        with _one_line():
            _check_arguments(pretrained, prune, loading)
            _check_placement(batch_size, max_batch_size, device)
            self.runtime = load(pretrained, **loading)
            plan = _plan_in_use(self.runtime, pretrained, prune, tier)
        self._chat: dict[str, Any] = {"prune": prune, "fit": fit}
        self._tier = tier
        # Of what a model says of itself, lmms-eval's results have one thing: the name of its class, as config.model_backend.
        self.__class__ = type(f"EdgePrune[{plan_name(plan)}]", (type(self),), {"__module__": __name__})

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer the questions in their order."""
        started, results, shares = perf_counter(), [], []
        for request in tqdm(requests, desc="EdgePrune"):
            if is_budget_exceeded():  # --max_tokens
                results.append(GenerationResult("[LMMS_EVAL_BUDGET_EXCEEDED]", TokenCounts()))
                continue
            _, doc_to_messages, generation, document, task, split = request.args
            with _one_line(f"{task}, document {document}: "):
                text, receipt = self._answer(doc_to_messages(self.task_dict[task][split][document]), generation)
            results.append(GenerationResult(text, _counts(receipt, task)))
            shares.append(receipt.visual_kv_share)
        seconds, generated = perf_counter() - started, sum(result.token_counts.output_tokens or 0 for result in results)
        log_metrics(seconds, generated, generated / seconds, {"visual_kv_share": sum(shares) / max(len(shares), 1)})
        return results

    def _answer(self, messages: Sequence[Mapping[str, Any]], generation: Mapping[str, Any]) -> tuple[str, Receipt]:
        *earlier, question = turns(messages)
        if question.role != "user":
            raise UsageError(f"The last message is of the {question.role}.", hint="Let the task's last message be the user's.")
        chat = self.runtime.chat(history=earlier, **self._chat)
        options = answer_options(generation)
        options["tier"] = self._tier
        stream = chat.ask(question.text, **options)
        return "".join(stream), stream.receipt

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse tasks of several rounds."""
        _refuse_task(requests, "asks in several rounds")

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse tasks that compare the probabilities of given answers: a bundle generates its own."""
        _refuse_task(requests, "compares the probabilities of given answers")


@contextmanager
def _one_line(where: str = "") -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        hint = (
            "Fit it with the model argument fit=pad (adds grey bars) or fit=stretch (distorts it)."
            if "fit" in error.hint
            else error.hint
        )
        raise SystemExit(f"edgeprune: {where}{error.message} {hint}") from None
    except EdgePruneError as error:
        raise SystemExit(f"edgeprune: {where}{error}") from None


def _check_arguments(bundle: object, prune: object, loading: Mapping[str, Any]) -> None:
    unknown = [name for name in loading if name not in _LOADING]
    if unknown:
        known = ", ".join(("pretrained", "prune", "fit", "tier", *_LOADING))
        raise UsageError(f"There is no model argument {unknown[0]!r}.", hint=f"Arguments are: {known}.")
    if not isinstance(bundle, str) or not bundle:
        raise UsageError("No bundle is named.", hint="Name it: --model_args pretrained=table.bundle")
    if not isinstance(prune, bool):
        raise UsageError(f"prune must be true or false, not {prune!r}.")


def _check_placement(batch_size: object, max_batch_size: object, device: str | None) -> None:
    if str(batch_size) != "1" or max_batch_size is not None:
        raise UsageError("Questions are answered one at a time.", hint="Leave --batch_size and --max_batch_size out.")
    if device is not None:
        raise UsageError(f"A bundle cannot be moved to {device}.", hint="Leave --device out, and see the model argument provider.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("A bundle answers in one process.", hint="Start lmms-eval without accelerate or torchrun.")


def _plan_in_use(runtime: Runtime, bundle: str, prune: bool, tier: str | None) -> KeepPlan:
    # An unknown tier is refused by the first question.
    plan = dict(Bundle.load(Path(bundle), check="fast").tiers).get(tier, runtime.plan) if tier else runtime.plan
    if runtime.kind == "video":
        raise UsageError(f"{bundle} takes videos.", hint="Name a bundle that takes images.")
    return plan if prune else KeepPlan(plan.family, plan.layers, plan.geometry)


def _refuse_task(requests: Sequence[Instance], what: str) -> NoReturn:
    raise SystemExit(f"edgeprune: {requests[0].task_name} {what}. Choose tasks whose output_type is generate_until.")


def _counts(receipt: Receipt, task: str) -> TokenCounts:
    asked, said = receipt.text_tokens + receipt.visual_tokens, receipt.generated_tokens
    log_usage("edgeprune", task, input_tokens=asked, output_tokens=said)
    return TokenCounts(input_tokens=asked, output_tokens=said)

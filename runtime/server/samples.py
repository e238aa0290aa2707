"""Sample pictures of the web page for the models of TableTop, with questions and their true answers.

The scenes are drawn when they are asked for, so neither the wheel nor a bundle carries pictures. Other models have no samples.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgeprune.runtime import Runtime
from edgeprune.runtime.server.errors import ApiError
from edgeprune.runtime.server.service import Service
from edgeprune.tabletop.dataset import scenes
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.questions import DESCRIBE, Question
from edgeprune.tabletop.world import Scene

NOTE = "{} is a toy model: it knows only drawn robot tables like the samples, no photographs."
_MODELS = ("tabletop", "tabletop-l")
_SEED, _COUNT = 7, 6
_KINDS = ("label", "where", "nearest", "count", DESCRIBE)  # of the questions, in the order in which the page shows them


def sample_list(model: Runtime) -> dict[str, Any]:
    """Return what the page shows beside its samples: a `note` on what the model knows, and the samples. Both may be empty."""
    if model.name not in _MODELS or model.kind != "image":
        return {"note": "", "samples": []}
    samples = [{"picture": f"samples/{number}.png", "questions": _shown(asked)} for number, (_, asked) in enumerate(_scenes())]
    return {"note": NOTE.format(model.name), "samples": samples}


def sample_picture(number: int) -> bytes:
    """Return one sample as a PNG file. Raises ApiError (404) for a number that is not listed."""
    if not 0 <= number < _COUNT:
        raise ApiError(404, "not_found", f"There is no sample {number}: they are 0 to {_COUNT - 1}.")
    return _drawn(number)


class SampleRoutes:
    """The routes of the samples. They need the key, because they tell which model is served."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def samples(self, request: Request) -> Response:
        """Answer with the list."""
        return JSONResponse(sample_list(self._service.model()))

    async def picture(self, request: Request) -> Response:
        """Answer with one picture."""
        return Response(await asyncio.to_thread(sample_picture, request.path_params["number"]), media_type="image/png")


def _shown(questions: Sequence[Question]) -> list[dict[str, str]]:
    by_kind = {question.kind: question for question in questions}
    asked = [by_kind[kind] for kind in _KINDS if kind in by_kind]
    return [{"prompt": question.prompt, "answer": question.answer} for question in asked]


@cache
def _scenes() -> list[tuple[Scene, list[Question]]]:
    return list(scenes(_SEED, _COUNT))


@cache
def _drawn(number: int) -> bytes:
    file = io.BytesIO()
    draw_scene(_scenes()[number][0]).save(file, "PNG")
    return file.getvalue()

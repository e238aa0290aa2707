"""Requests by OpenAI's own client, which keeps connections open and tries again when it is told when."""

from __future__ import annotations

import time
from typing import Any

import openai

from soaking.manners import Asking, Reading, drawn_options
from soaking.outcomes import HUNG, LOST, Outcome, judged, refusal
from soaking.wire import PATIENCE, Place

_OURS = ("tier", "deadline_ms", "guided_choice", "prune", "kept")


class Official:
    """One client, of one thread. `statuses`: of all responses since the last request began."""

    def __init__(self, place: Place) -> None:
        self._statuses: list[int] = []
        # Connections are dropped before the server does it, or a request could meet the closing of its connection.
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(keepalive_expiry=2.0)
        http = openai.DefaultHttpxClient(limits=limits, event_hooks={"response": [self._note]}, trust_env=False)
        self._client = openai.OpenAI(base_url=f"{place.url}/v1", api_key=place.key, timeout=PATIENCE, http_client=http)

    def _note(self, response: Any) -> None:
        self._statuses.append(response.status_code)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def whole(self, asking: Asking) -> Outcome:
        """Wait for a whole answer."""
        return self._asked(asking, stream=False, most=None)

    def stream(self, asking: Asking) -> Outcome:
        """Read a stream to its end."""
        return self._asked(asking, stream=True, most=None)

    def cancel(self, asking: Asking) -> Outcome:
        """Close a stream after some pieces."""
        return self._asked(asking, stream=True, most=asking.lot.randint(0, 8))

    def _asked(self, asking: Asking, *, stream: bool, most: int | None) -> Outcome:
        outcome, self._statuses = asking.outcome, []
        outcome.statuses = self._statuses
        body = {"model": asking.pool.model, **asking.pool.body(asking.entry, **drawn_options(asking, deadlines=most is None))}
        deadline = "deadline_ms" in body
        extra = {name: body.pop(name) for name in _OURS if name in body}
        retries = asking.lot.choice((0, 2))  # as Retry-After says
        create: Any = self._client.with_options(max_retries=retries).chat.completions.create
        try:
            found = create(**body, stream=stream, extra_body=extra)
            return self._read(asking, found, most, deadline) if stream else self._judged(asking, found, deadline)
        except openai.APIStatusError as error:
            return refusal(outcome, error.status_code, error.code, error.response.headers.get("retry-after"), deadline)
        except openai.APITimeoutError:
            return outcome.end(HUNG, "OpenAI's client waited too long")
        except openai.APIError as error:
            return outcome.end(LOST, f"{type(error).__name__}: {error}")

    def _judged(self, asking: Asking, found: Any, deadline: bool) -> Outcome:
        asking.outcome.answer_id = found.id
        return judged(asking.outcome, asking.pool, asking.entry, found.choices[0].message.content, found.edgeprune, deadline)

    def _read(self, asking: Asking, found: Any, most: int | None, deadline: bool) -> Outcome:
        outcome, read = asking.outcome, Reading(asking)
        with found:
            for chunk in found:
                read.take(chunk.model_dump())
                if most is not None and read.pieces >= most:
                    network = found.response.extensions["network_stream"]
                    outcome.port = network.get_extra_info("client_addr")[1]
                    outcome.closed = time.monotonic()
                    found.close()
                    return read.left()
        read.take(None)  # it swallows [DONE]
        return read.judge(deadline)

"""Spread work over a Ray cluster, in parts that its machines take as they become free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from edgeprune.errors import EdgePruneError, require_extra

LOCAL = "local"
PARTS_PER_CPU = 4  # small parts, so that a slow machine does not delay the others
_RETRIES = 3  # of a part whose machine was lost
T = TypeVar("T")


class Cluster:
    """The Ray cluster at an address, for a `with` block; "local" starts one on this machine.

    Every machine of the cluster needs access to the model and the images. Raises EdgePruneError if the cluster is unreachable.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> Cluster:
        require_extra("ray", "ray")
        import ray

        try:
            address = None if self._address == LOCAL else self._address
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EdgePruneError(
                f"Cannot reach the Ray cluster at {self._address}: {error}.", hint="Use --ray local to start one here."
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import ray

        ray.shutdown()

    def parts(self, most: int) -> int:
        """Return into how many parts work is to be cut that has at most that many."""
        import ray

        return min(most, max(1, int(ray.cluster_resources().get("CPU", 1))) * PARTS_PER_CPU)

    def run(self, task: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Iterator[T]:
        """Yield what a function of a module returns for each of the `arguments`, as they are done. Raises what it raises."""
        import ray
        from ray.exceptions import RayTaskError

        remote = ray.remote(max_retries=_RETRIES)(task)
        pending = [remote.remote(*each) for each in arguments]
        while pending:
            done, pending = ray.wait(pending)
            try:
                yield from ray.get(done)
            except RayTaskError as error:
                raise error.cause from error

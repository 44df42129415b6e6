"""Ray: a Ray Data stage and a Ray Serve application whose workers share one store. Needs ``ghostcacher[ray]``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ghostcacher.errors import MissingExtraError
from ghostcacher.integrations.answering import CachedModel, Load
from ghostcacher.integrations.routing import ReplicaState, ranked, text_of

try:
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
except ImportError as error:
    raise MissingExtraError("ray", "ray", "ghostcacher.integrations.ray") from error

ROUTING_PERIOD_SECONDS = 2.0


class GenerateBatch:
    """A stage for ``Dataset.map_batches``: answers the texts in one column.

    ``dataset.map_batches(GenerateBatch, fn_constructor_kwargs={"load": load, "store": {"disk": "100GiB"}},
    concurrency=2)``. Adds the columns ``answer``, ``prompt_tokens``, ``cached_tokens`` and ``tier``. Texts are answered
    in the order of their beginnings, so that those that share one follow each other.
    """

    def __init__(
        self, load: Load, store: Mapping[str, Any], column: str = "prompt", generate: Mapping[str, Any] | None = None
    ) -> None:
        self._cached = CachedModel(load, store, generate)
        self._column = column

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """``batch`` with the new columns; its rows stay in their order."""
        prompts = [str(prompt) for prompt in batch[self._column]]
        order = sorted(range(len(prompts)), key=prompts.__getitem__)
        answers = dict(zip(order, [self._cached.answer(prompts[number]) for number in order], strict=True))
        rows = [answers[number] for number in range(len(prompts))]
        return {
            **batch, "answer": [row.text for row in rows], "prompt_tokens": [row.prompt_tokens for row in rows],
            "cached_tokens": [row.cached_tokens for row in rows], "tier": [row.tier for row in rows],
        }  # fmt: skip


class Replica:
    """One replica of `deployment`: answers prompts and says what it holds near."""

    def __init__(self, load: Load, store: Mapping[str, Any], generate: Mapping[str, Any] | None = None) -> None:
        self._cached = CachedModel(load, store, generate)

    def __call__(self, prompt: str, **options: Any) -> dict[str, Any]:
        """Answer ``prompt``; ``options`` go to ``model.generate``."""
        return dataclasses.asdict(self._cached.answer(prompt, **options))

    def record_routing_stats(self) -> dict[str, Any]:
        """What `PrefixRouter` reads; Ray Serve calls it every two seconds."""
        return self._cached.state().as_dict()

    def __del__(self) -> None:
        """Ray Serve calls it when the replica stops: what is queued is stored."""
        if hasattr(self, "_cached"):
            self._cached.close()


class PrefixRouter(RequestRouter):
    """Sends a prompt to who will have answered it soonest (`routing.ranked`), and a call without one to the idlest."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Every replica alone, best first: a full one is passed over."""
        text = ""
        if pending_request is not None:
            # Once every replica was full, the next round waits a little.
            pending_request.routing_context.should_backoff = True
            text = text_of([*pending_request.args, *pending_request.kwargs.values()])
        order = ranked(text, *self._known(candidate_replicas))
        return [[candidate_replicas[number]] for number in order]

    def _known(self, replicas: Sequence[RunningReplica]) -> tuple[list[ReplicaState], list[int | None]]:
        queues = self.replica_queue_len_cache
        states = [ReplicaState.parse(replica.routing_stats or {}) for replica in replicas]
        return states, [queues.get(replica.replica_id) for replica in replicas]


def deployment(
    load: Load, store: Mapping[str, Any], *, replicas: int = 2, generate: Mapping[str, Any] | None = None,
    **options: Any,
) -> serve.Application:  # fmt: skip
    """An application of ``replicas`` that share a store, for ``serve.run``.

    ``handle.remote("a prompt", max_new_tokens=8).result()`` gives a dictionary with ``text``, ``prompt_tokens``,
    ``cached_tokens``, ``tier`` and ``seconds``. ``load`` gives model and tokenizer and runs on the replica; ``store``
    are arguments of `ghostcacher.open_store`, ``options`` of ``serve.deployment``.
    """
    router = RequestRouterConfig(
        request_router_class=PrefixRouter, request_routing_stats_period_s=ROUTING_PERIOD_SECONDS
    )
    made = serve.deployment(Replica, num_replicas=replicas, request_router_config=router, **options)
    application: serve.Application = made.bind(load, dict(store), generate)
    return application

"""Type-checked, never run: the public surface as a user writes it."""

from __future__ import annotations

from typing import Any

import ghostcacher
from ghostcacher import CacheEvent, CacheReport, GhostCache, TierStack


def once(model: Any, inputs: dict[str, Any]) -> str:
    cache = GhostCache(model)
    model.generate(**inputs, cache=cache)
    report: CacheReport = cache.report
    tokens: int = report.cached_tokens
    return f"{report} {tokens} {report.tier} {report.seconds} {report.bytes} {report.reason}"


def shared(model: Any) -> list[CacheReport]:
    def observe(event: CacheEvent, /) -> None:
        assert event.kind, event.reason

    with ghostcacher.open_store("blocks", memory="1GiB", disk=None, codec="int8", salt="tenant") as store:
        stack: TierStack = store
        stack.observers.append(observe)
        with ghostcacher.attach(model, store) as attached:
            model.generate()
        store.flush(timeout_seconds=1.0)
        found: ghostcacher.Lookup = ghostcacher.lookup(model, [1, 2, 3], store)
        gone: int = ghostcacher.forget(model, [1, 2, 3], store, keep_tokens=found.tokens)
        assert gone + store.purge(bytes(32))
        return attached.reports

"""``GhostCache`` and ``attach``: the two doors."""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import Cache, DynamicCache

from ghostcacher.adapters.base import FingerprintMode, base_module
from ghostcacher.adapters.state import CacheState, put_layers
from ghostcacher.blocks import KVLayout
from ghostcacher.events import CacheReport
from ghostcacher.hooks import ModelHooks, hooks_of
from ghostcacher.session import Session, finish
from ghostcacher.tiers.opening import default_store
from ghostcacher.tiers.stack import TierStack

REPORTS_KEPT = 10_000


class GhostCache(DynamicCache):
    """A transformers ``Cache`` whose content outlives it: what a store knows of the prompt is not computed again.

    One sequence's (or batch's) cache, as every transformers cache is. Used twice it is right, whatever the second
    prompt: between forwards ``get_seq_length()`` answers 0, so that ``generate`` hands over the whole prompt, and
    what the cache still holds of it is kept. Making the first one for a model runs a few tokens through it.
    """

    def __init__(
        self, model: Any, store: TierStack | None = None, *, fingerprint: FingerprintMode = "sampled",
        boundaries: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Make a cache for ``model``, over ``store`` or the process-wide default store.

        Args:
            model: a decoder of transformers, or a compiled, DDP or peft wrapper around one.
            store: from `open_store`.
            fingerprint: ``"always"`` digests all weights at every prompt, instead of when a sample or a hook says
                that they changed.
            boundaries: lengths in tokens, such as that of a system prompt, after which other prompts will go on
                differently. Only models with recurrent or compressed state need to be told: theirs is kept at the
                last whole block, where this prompt left what the store knows, and here.

        Raises:
            UnsupportedModelError: ``model`` cannot take any DynamicCache (encoder-decoders, minimax, xlstm, …).
                Models that can, but whose state is not reused yet, run cold: see ``report.reason``.
        """
        module = base_module(model)
        super().__init__(config=module.config)
        self.store = store if store is not None else default_store()
        self.fingerprint: FingerprintMode = fingerprint
        self.boundaries: Sequence[int] = tuple(boundaries)
        self.in_forward = 0
        self.was_asked = False
        self._module = weakref.ref(module)
        self._report: CacheReport | None = None
        self._session: Session | None = None
        self._hooks = hooks_of(module)
        self._hooks.prepare()

    @property
    def report(self) -> CacheReport:
        """What the cache did for the latest prompt."""
        return self._report or CacheReport(0, 0, "", 0.0, 0, "miss: no prompt yet")

    @property
    def is_compileable(self) -> bool:
        """False: ``generate`` must not compile over a cache that grows."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """See `Cache.is_linear`. Asked between forwards, it is a sign that a prompt begins."""
        self._note_question()
        answer: list[bool] = super().is_linear
        return answer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held while a forward of the model runs, 0 between forwards; see the class."""
        if not self._is_in_forward():
            self._note_question()
            return 0
        return int(super().get_seq_length(layer_idx))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Select rows for beam search. What the rows hold is not known afterwards."""
        super().reorder_cache(beam_idx)
        self._forget_rows()

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows with these numbers, or where a mask is True. What the rows hold is not known afterwards.

        Of every kind of state: transformers' own method leaves linear and compressed state as it is, or fails.
        """
        if self._session is None:
            super().batch_select_indices(indices)
            return
        rows = torch.as_tensor(indices)
        self._session.state.select_rows(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)
        self._forget_rows()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times; see `batch_select_indices`."""
        if self._session is None:
            super().batch_repeat_interleave(repeats)
            return
        self.batch_select_indices(torch.arange(self._session.state.rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Drop what this object holds; the store keeps its own."""
        self.empty()

    def empty(self) -> None:
        """Drop all state, keeping the layers' kinds."""
        module = self._module()
        if module is not None:
            put_layers(self.layers, DynamicCache(config=module.config).layers)
        self._forget_rows()

    def session_of(self, cache: Cache, state: CacheState | None) -> Session | None:
        """See `Door.session_of`."""
        if self._session is None and state is not None:
            self._session = _begun(cache, _session(self.store, self._hooks, state))
        return self._session

    def publish(self, report: CacheReport, replaces: CacheReport | None) -> None:  # noqa: ARG002 (the latest is all it keeps)
        """See `Door.publish`."""
        self._report = report
        self.store.note(report)

    def __deepcopy__(self, memo: dict[int, Any]) -> GhostCache:
        module = self._module()
        twin = GhostCache(module, self.store, fingerprint=self.fingerprint, boundaries=self.boundaries)
        twin.layers = copy.deepcopy(self.layers, memo)
        twin._report = self._report
        session, shape = self._session, self._hooks.adapter.shape
        if session is not None and shape is not None:
            fresh = _session(self.store, self._hooks, shape.state_of(twin.layers))
            fresh.know(session.read())
            fresh.stored_columns, fresh.lossy_from = session.stored_columns, session.lossy_from
            fresh.storable_columns, fresh.known_columns = session.storable_columns, session.known_columns
            fresh.is_current, fresh.last_positions = session.is_current, session.last_positions
            twin._session = _begun(twin, fresh)
        return twin

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError(
            "a GhostCache is not pickled; make one with GhostCache(model) where it is needed: the store has its content"
        )

    def _note_question(self) -> None:
        if not self._is_in_forward():
            self.was_asked = True

    def _is_in_forward(self) -> bool:
        """Whether a forward is running. One that was interrupted (Ctrl-C) ended without telling anyone."""
        is_asked_inside = self.in_forward != 0
        if not is_asked_inside or torch.compiler.is_compiling() or self.in_forward != threading.get_ident():
            return is_asked_inside  # another thread cannot tell, and ends nothing
        if not _is_running(self._module()):
            self.in_forward = 0
            self._forget_rows()
        return self.in_forward != 0

    def _forget_rows(self) -> None:
        if self._session is not None:
            self._session.forget()


class Attachment:
    """What ``attach`` gives: while it is entered, every ``generate()`` of the model is cached."""

    def __init__(
        self, hooks: ModelHooks, store: TierStack, fingerprint: FingerprintMode, boundaries: Sequence[int] = ()
    ) -> None:
        self.store = store
        self.fingerprint: FingerprintMode = fingerprint
        self.boundaries: Sequence[int] = tuple(boundaries)
        self._hooks = hooks
        self._sessions: weakref.WeakKeyDictionary[Cache, Session] = weakref.WeakKeyDictionary()
        self._reports: deque[CacheReport] = deque(maxlen=REPORTS_KEPT)
        self._lock = threading.Lock()

    @property
    def reports(self) -> list[CacheReport]:
        """One report per prompt, oldest first; the last 10,000."""
        with self._lock:
            return list(self._reports)

    def __enter__(self) -> Self:
        self._hooks.prepare()
        self._hooks.doors.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.doors.remove(self)

    def session_of(self, cache: Cache, state: CacheState | None) -> Session | None:
        """See `Door.session_of`."""
        with self._lock:
            found = self._sessions.get(cache)
            if found is not None or state is None or not state.is_empty:
                return found
            made = _begun(cache, _session(self.store, self._hooks, state, is_own=False))
            self._sessions[cache] = made
            return made

    def publish(self, report: CacheReport, replaces: CacheReport | None) -> None:
        """See `Door.publish`."""
        with self._lock:
            if replaces is not None and replaces in self._reports:
                self._reports.remove(replaces)
            self._reports.append(report)
        self.store.note(report)


def attach(
    model: Any, store: TierStack | None = None, *, fingerprint: FingerprintMode = "sampled",
    boundaries: Sequence[int] = (),
) -> Attachment:  # fmt: skip
    """Cache every ``generate()`` of ``model`` inside a ``with`` block, whoever calls it.

    For pipelines, evaluation harnesses, agents, servers: code that makes its own cache. Attachments nest; the
    innermost serves. Arguments and errors are those of `GhostCache`.
    """
    hooks = hooks_of(base_module(model))
    return Attachment(hooks, store if store is not None else default_store(), fingerprint, boundaries)


def _session(store: TierStack, hooks: ModelHooks, state: CacheState, *, is_own: bool = True) -> Session:
    adapter = hooks.adapter
    layout = adapter.shape.layout if adapter.shape else KVLayout(())
    return Session(store, layout, state, adapter.model_type, is_own=is_own)


def _begun(cache: Cache, session: Session) -> Session:
    goodbye = weakref.finalize(cache, finish, session)
    goodbye.atexit = False
    return session


def _is_running(module: nn.Module | None) -> bool:
    """Whether this thread is inside a call of ``module``: a look at its stack, as no hook tells of an interruption."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


_CALL = nn.Module._call_impl.__code__  # noqa: SLF001 (every call goes through it, and it has no public name)

"""Two hooks on a model's forward.

They are PyTorch's own (``register_forward_pre_hook``), act only on a forward that carries a cache they know, hold
the model weakly and change nothing of it. Inside a compiled graph they are absent.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ghostcacher.adapters.base import ModelAdapter
from ghostcacher.adapters.calls import Call
from ghostcacher.adapters.probe import QuietCache
from ghostcacher.adapters.ranks import Votes
from ghostcacher.adapters.state import past_of
from ghostcacher.doors import Door, OwnDoor
from ghostcacher.events import CacheEvent
from ghostcacher.path import Path
from ghostcacher.rescue import abandon, walk_together
from ghostcacher.session import Session, settle

_installed: weakref.WeakKeyDictionary[nn.Module, ModelHooks] = weakref.WeakKeyDictionary()
_installing = threading.Lock()


def hooks_of(module: nn.Module) -> ModelHooks:
    """The hooks of ``module``, installed on first use and gone with it."""
    with _installing:
        hooks = _installed.get(module)
        if hooks is None:
            hooks = _installed[module] = ModelHooks(module)
            module.register_forward_pre_hook(_Hook(hooks.before), with_kwargs=True)
            module.register_forward_hook(_Hook(hooks.after), with_kwargs=True, always_call=True)
        return hooks


class ModelHooks:
    """What happens before and after each forward of one model."""

    def __init__(self, module: nn.Module) -> None:
        self.adapter = ModelAdapter(module)
        self.doors: list[Door] = []
        self._module = weakref.ref(module)
        self._probing = threading.Lock()

    def prepare(self) -> None:
        """Let the adapter run its probes, once; prompts that other threads send meanwhile run cold."""
        module = self._module()
        if module is not None:
            with self._probing:
                self.adapter.prepare(module)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Serve, note or leave alone one call; the changed arguments, or None.

        An error of ours is the call's only in a strict store, or where it cannot be told what its cache holds.
        """
        path: Path | None = None
        votes: Votes | None = None
        try:
            call = self.adapter.reader.read(args, kwargs) if module is self._module() else None
            votes = self._votes(call)
            path, session = self._path(module, call, votes)
            if path is None:
                return None
            columns = path.walk(session) if votes is None else walk_together(path, session, votes)
            return ((), path.call.without_first(columns)) if columns else None
        except Exception as error:
            if path is not None:
                abandon(path, error)
            elif any(past_of(value) for value in (*args, *kwargs.values()) if isinstance(value, Cache)):
                raise
            return None
        finally:
            if votes is not None and not votes.is_closed:
                votes.close(0)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Learn what the forward left in the cache, and hand it to the store; an error of ours is nobody's but ours."""
        try:
            self._after(module, args, kwargs, has_output=output is not None)
        except Exception as error:
            stores = {door.store for door in self._doors_of(args, kwargs)}
            if any(store.config.strict for store in stores):
                raise
            for store in stores:
                store.observe(CacheEvent("error", f"internal error ({type(error).__name__})"))

    def _votes(self, call: Call | None) -> Votes | None:
        """Steps of one token are the same on every rank; for a prompt the ranks must agree what is not computed."""
        if call is None or self.adapter.ranks is None or call.width == 1 or isinstance(call.cache, QuietCache):
            return None
        return Votes(self.adapter.ranks) if self.doors or _is_own(call.cache) else None

    def _path(self, module: nn.Module, call: Call | None, votes: Votes | None) -> tuple[Path | None, Session | None]:
        door = self._door(call) if call else None
        if call is None or door is None:
            return None, None
        session = door.session_of(call.cache, None)
        if session is not None and session.is_running_pieces:
            return None, None
        if session is not None and session.expected is not None:  # the last forward was interrupted: it ended nowhere
            session.forget()
        own: OwnDoor | None = call.cache if _is_own(call.cache) else None
        if own is not None:
            own.in_forward = threading.get_ident()
        return Path(self.adapter, module, door, own, call, votes), session

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, has_output: bool) -> None:
        call = self.adapter.reader.read(args, kwargs) if module is self._module() else None
        door = self._door(call) if call else None
        if call is None or door is None:
            return
        session = door.session_of(call.cache, None)
        if session is not None and session.is_running_pieces:
            return
        if _is_own(call.cache):
            call.cache.in_forward = 0
            call.cache.was_asked = False
        if session is not None and not has_output:
            session.forget()
        if session is not None and session.expected is not None:
            settle(session, ended_well=has_output)

    def _doors_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Door]:
        """Doors of a call that failed in our hands, from its plain arguments; their sessions know nothing any more."""
        found: list[Door] = []
        for cache in (value for value in (*args, *kwargs.values()) if isinstance(value, Cache)):
            doors: list[Door] = [cache] if _is_own(cache) else self.doors[-1:]
            for door in doors:
                session = door.session_of(cache, None)
                if session is not None:
                    session.forget()
            if _is_own(cache):
                cache.in_forward, cache.was_asked = 0, False
            found += doors
        return found

    def _door(self, call: Call) -> Door | None:
        if isinstance(call.cache, QuietCache):
            return None
        if _is_own(call.cache):
            own: OwnDoor = call.cache
            return own
        if self.doors and not self._probing.locked():
            return self.doors[-1]
        return None


class _Hook:
    """A hook that may be copied with its model: the copy does nothing."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or self._function is None:
            return None
        return self._function(*args)

    def __deepcopy__(self, memo: object) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return (_Hook, ())


def _is_own(cache: Any) -> bool:
    return hasattr(cache, "in_forward")

"""Calls that something happened to, here or on another rank: the cache as it was, so that the model computes all."""

from __future__ import annotations

from ghostcacher.adapters.ranks import Votes
from ghostcacher.adapters.state import past_of
from ghostcacher.events import CacheReport
from ghostcacher.path import Path
from ghostcacher.session import Session


def abandon(path: Path, error: Exception) -> None:
    """After ``error``: the cache as it was before the call, so that the model computes all of it.

    Raises:
        Exception: ``error``, in a strict store, or if that cannot be done: better a failed call than a wrong one.
    """
    is_step = path.call.width == 1 and (path.own is None or not path.own.was_asked)
    base = past_of(path.call.cache) if path.base is None and is_step else path.base
    if base is None or path.door.store.config.strict:
        raise error
    session = path.door.session_of(path.call.cache, None)
    if session is not None:
        if session.state.cut_to(base, held=session.past) != base:
            raise error
        session.forget()
    elif path.own is not None and not base:
        path.own.empty()
    if not is_step:
        reason = f"bypass: internal error ({type(error).__name__}: {error})"
        path.publish(session, CacheReport(path.call.width, 0, "", path.seconds(), 0, reason, path.call.rows))


def walk_together(path: Path, session: Session | None, votes: Votes) -> int:
    """`Path.walk`, with every rank of a tensor-parallel model: all leave out the same columns, or all none.

    Whatever happens on one rank, it casts its votes: the others wait for them.
    """
    past = session.past if session is not None else past_of(path.call.cache)
    columns = 0
    try:
        columns = path.walk(session)
    finally:
        is_same = votes.close(columns)
    if is_same:
        return columns
    found = path.door.session_of(path.call.cache, None)
    if found is not None and columns:
        is_continued = columns + past == found.past
        kept = past if is_continued else 0
        if found.state.cut_to(kept, held=found.past) != kept:
            raise RuntimeError("ranks disagree, and what was restored on this one cannot be taken back")
        report = CacheReport(path.call.width, 0, "", path.seconds(), 0, "bypass: ranks disagree", path.call.rows)
        path.publish(found, report, replaces=found.report)
    return 0

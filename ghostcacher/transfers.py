"""Copies between RAM and GPUs, and waiting for what streams have been told to do.

Copies go through pinned memory: the driver itself copies pageable memory to such, piece by piece, and lets the stream
wait for it. torch keeps what was used of it for what is copied next. Where none can be had, copies are as ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

LEAST_BYTES = 2**16
"""Less is not worth a detour."""

CHUNK_BYTES = 2**25
UNDER_WAY = 8
"""Copies that may be waiting for a GPU at once: each holds pinned memory."""


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``. Of a copy to a GPU nobody waits: the thread's current stream has it in its order."""
    return staged(tensor, device).to(device, non_blocking=device.type == "cuda")


def in_ram(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in ordinary RAM, there to be read; one that lies there already is given back as it is."""
    if not _is_worth_it(tensor, tensor.device):
        return tensor.cpu()
    room = _pinned(tensor)
    if room is None:
        return tensor.cpu()
    room.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return torch.empty_like(room, pin_memory=False).copy_(room)


def staged(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` in pinned memory if it lies in RAM and is to go to a GPU."""
    room = _pinned(tensor) if tensor.device.type == "cpu" and _is_worth_it(tensor, device) else None
    return tensor if room is None else room.copy_(tensor)


def chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a plain tensor in the order of its elements, in pieces: each until the next is asked for."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    rooms = _two_rooms(flat)
    if not rooms:
        yield flat.cpu().numpy().data
        return
    under_way: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
    for number, piece in enumerate(torch.split(flat, CHUNK_BYTES)):
        room = rooms[number % 2][: len(piece)]
        room.copy_(piece, non_blocking=True)
        under_way.append((room, torch.cuda.current_stream(flat.device).record_event()))
        if len(under_way) > 1:
            yield _arrived(*under_way.popleft())
    yield _arrived(*under_way.popleft())


def queued(devices: Iterable[torch.device]) -> Callable[[], None]:
    """Answers what waits, on any thread, until all that this thread's current streams were told so far is done."""
    gpus = {device for device in devices if device.type == "cuda"}
    events = [torch.cuda.current_stream(gpu).record_event(_event()) for gpu in gpus]

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait


def settle(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until ``tensors``, computed on this thread, are there for all threads and streams."""
    queued(tensor.device for tensor in tensors)()


def note_use(tensor: torch.Tensor) -> None:
    """This thread's current stream reads ``tensor``: if it is let go of, its memory is not given away before."""
    if tensor.device.type == "cuda":
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Sending:
    """Copies to GPUs that are under way, at most `UNDER_WAY`. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: deque[torch.cuda.Event] = deque()

    def sent(self, device: torch.device) -> None:
        """Something was queued for ``device`` on this thread's current stream; waits if much is under way."""
        if device.type != "cuda":
            return
        event = torch.cuda.current_stream(device).record_event()
        with self._lock:
            self._events.append(event)
            first = self._events.popleft() if len(self._events) > UNDER_WAY else None
        if first is not None:
            first.synchronize()

    def settle(self) -> None:
        """Wait until everything has arrived: other threads, on other streams, may use it then."""
        with self._lock:
            events, self._events = self._events, deque()
        for event in events:
            event.synchronize()


def _event() -> torch.cuda.Event:
    """One that is waited for asleep: the processor is others' meanwhile."""
    event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch leaves its constructor without annotations
    return event


def _arrived(room: torch.Tensor, event: torch.cuda.Event) -> memoryview:
    event.synchronize()
    view: memoryview = room.numpy().data
    return view


def _two_rooms(flat: torch.Tensor) -> list[torch.Tensor]:
    """Pinned memory for two pieces of ``flat``, one of which is read while the other arrives; none in RAM."""
    if not _is_worth_it(flat, flat.device):
        return []
    rooms = [_pinned(flat[:CHUNK_BYTES]) for _ in range(2)]
    found = [room for room in rooms if room is not None]
    return found if len(found) == len(rooms) else []


def _is_worth_it(tensor: torch.Tensor, gpu: torch.device) -> bool:
    return gpu.type == "cuda" and tensor.nbytes >= LEAST_BYTES


def _pinned(like: torch.Tensor) -> torch.Tensor | None:
    """Pinned memory for what ``like`` holds; None if there is no more of it."""
    try:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
    except RuntimeError:  # what of its memory a process may lock is limited
        return None

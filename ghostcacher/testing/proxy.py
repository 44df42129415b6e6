"""A TCP proxy that misbehaves on command, between a client and a real server on loopback."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Literal, get_args

Fault = Literal[
    "pass", "refuse", "blackhole", "hang up", "reset", "half close", "latency", "bandwidth", "slicer", "flip",
    "garbage", "swap", "flap", "cut",
]  # fmt: skip
FAULTS: tuple[Fault, ...] = get_args(Fault)[1:]
"""All but ``pass``."""

AFTER_BYTES = 20_000
"""How much of a reply passes before it is reset, cut or half closed."""

_CHUNK_BYTES = 65_536
_LATENCY_SECONDS = 0.1
_BANDWIDTH_BYTES = 100_000
_SLICE_SECONDS = 0.02
_FLIPS_PER_BYTE = 1e-4


class FaultProxy:
    """Listens on ``port`` for ``target_port`` of this machine; ``fault`` may change at any time, for what comes then.

    ``refuse`` closes what was accepted at once, as a port that nobody listens on cannot be switched; ``hang up`` waits
    for the request first. ``reset``, ``half close`` and ``cut`` strike within a reply: RST, FIN, or silence.
    ``latency`` is 100 ms and up to as much again, ``bandwidth`` 100 kB/s, ``slicer`` a byte every 20 ms. ``flip``
    changes one byte in 10,000, ``garbage`` all, ``swap`` gives pieces of replies in another order, and ``flap`` refuses
    every second connection. Client to server nothing is changed.
    """

    def __init__(self, target_port: int, seed: int = 0) -> None:
        self.fault: Fault = "pass"
        self.connections = 0
        self._target_port = target_port
        self._random = random.Random(seed)  # noqa: S311 (faults that can be repeated)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening and drop every connection."""
        for each in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            is_refused = self.fault == "refuse" or (self.fault == "flap" and self.connections % 2)
            self._open.append(client)
            if is_refused:
                client.close()
            elif self.fault != "blackhole":
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._target_port))
        self._open.append(server)
        threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
        threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(_CHUNK_BYTES):
                if self.fault == "hang up":
                    client.close()
                    return
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := server.recv(_CHUNK_BYTES):
                for piece in self._pieces(data):
                    if self.fault in {"reset", "half close", "cut"} and sent + len(piece) > AFTER_BYTES:
                        self._end(client, piece[: max(0, AFTER_BYTES - sent)])
                        return
                    client.sendall(piece)
                    sent += len(piece)
            client.shutdown(socket.SHUT_WR)

    def _end(self, client: socket.socket, last: bytes) -> None:
        client.sendall(last)
        if self.fault == "half close":
            client.shutdown(socket.SHUT_WR)
        elif self.fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """``data`` as the fault lets it through, each piece when it is due."""
        if self.fault == "latency":
            time.sleep(_LATENCY_SECONDS * (1 + self._random.random()))
        elif self.fault == "bandwidth":
            time.sleep(len(data) / _BANDWIDTH_BYTES)
        elif self.fault == "slicer":
            for place in range(len(data)):
                time.sleep(_SLICE_SECONDS if self.fault == "slicer" else 0)
                yield data[place : place + 1]
            return
        elif self.fault == "swap" and len(data) > 1:
            middle = len(data) // 2
            yield data[middle:] + data[:middle]
            return
        yield self._changed(data)

    def _changed(self, data: bytes) -> bytes:
        if self.fault == "garbage":
            return self._random.randbytes(len(data))
        if self.fault != "flip":
            return data
        changed = bytearray(data)
        for _ in range(sum(self._random.random() < _FLIPS_PER_BYTE for _ in range(len(data)))):
            changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
        return bytes(changed)


@contextlib.contextmanager
def fault_proxy(target_port: int, seed: int = 0) -> Iterator[FaultProxy]:
    """A `FaultProxy`, closed at the end."""
    proxy = FaultProxy(target_port, seed)
    try:
        yield proxy
    finally:
        proxy.close()

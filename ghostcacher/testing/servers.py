"""Real servers on loopback, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 20.0
_PORTS = range(10_000, 22_000)
_BUS_OFFSET = 10_000
_BINARIES = ("redis-server", "valkey-server")
_CLIENTS = ("redis-cli", "valkey-cli")


@dataclass(slots=True)
class RedisServer:
    """A process and where it listens; ``stop`` and ``start`` it at will."""

    command: Sequence[str]
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        """For ``open_store(remote=…)``."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            TimeoutError: it does not within 20 s.
        """
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _await_port(self.port, self.command[0])

    def stop(self) -> None:
        """Kill it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def pause(self) -> None:
        """Keep it from answering: connections stand, and nobody is told."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """After `pause`."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)


def free_port() -> int:
    """A port that nobody listens on now, and whose cluster bus port is free too.

    Both are below those that the system gives to whoever connects: none of these is taken between now and the start.
    """
    while True:
        port = secrets.choice(_PORTS)
        with contextlib.suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + _BUS_OFFSET))
            return port


def redis_binary() -> str | None:
    """Where a server's binary is, or None."""
    return next((found for name in _BINARIES if (found := shutil.which(name))), None)


@contextlib.contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[RedisServer]:
    """One server without persistence, whose files are in ``folder``; ``options`` as on its command line.

    Raises:
        FileNotFoundError: neither Redis nor Valkey is installed.
    """
    server = _server(folder, options)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def redis_cluster(folder: Path, masters: int = 3) -> Iterator[list[RedisServer]]:
    """A cluster of ``masters`` with a replica each, whose nodes notice within a second that another is gone.

    Raises:
        FileNotFoundError: neither Redis nor Valkey is installed.
        TimeoutError: it does not form.
    """
    options = (
        "--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-replica-validity-factor", "0",
        "--repl-diskless-sync-delay", "0",
    )  # fmt: skip
    servers: list[RedisServer] = []
    try:
        for number in range(2 * masters):
            servers.append(_server(folder / str(number), options))
            servers[-1].start()
        _form([f"127.0.0.1:{server.port}" for server in servers])
        yield servers
    finally:
        for server in servers:
            server.stop()


@contextlib.contextmanager
def mooncake_pool(folder: Path, segment_bytes: int = 64 * 2**20) -> Iterator[MooncakePool]:
    """A master and a process that gives ``segment_bytes`` of memory to its pool.

    Raises:
        FileNotFoundError: Mooncake is not installed.
        TimeoutError: it does not come up within 20 s.
    """
    pool = MooncakePool(folder, segment_bytes)
    try:
        pool.start_master()
        pool.start_holder()
        yield pool
    finally:
        pool.stop()


class MooncakePool:
    """See `mooncake_pool`; the master may be stopped and started again."""

    def __init__(self, folder: Path, segment_bytes: int) -> None:
        binary = shutil.which("mooncake_master", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if binary is None:
            raise FileNotFoundError("no mooncake_master: pip install mooncake-transfer-engine-non-cuda")
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "mooncake.log"
        self._binary = binary
        self._segment_bytes = segment_bytes
        self.port, self.metrics_port = free_port(), free_port()
        self.master: subprocess.Popen[bytes] | None = None
        self.holder: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For ``open_store(remote=…)``."""
        return f"mooncake://127.0.0.1:{self.port}?metrics={self.metrics_port}&buffer=64MiB"

    def start_master(self) -> None:
        """Start the master and wait until it listens."""
        options = (f"-rpc_port={self.port}", "-rpc_address=127.0.0.1", f"-metrics_port={self.metrics_port}")
        self.master = self._start(self._binary, *options)
        _await_port(self.port, "mooncake_master")
        _await_port(self.metrics_port, "mooncake_master")

    def start_holder(self) -> None:
        """Start the process whose memory is the pool, and wait until it has joined."""
        ready = self._log.with_name("holder.ready")
        ready.unlink(missing_ok=True)
        self.holder = self._start(
            sys.executable, "-c", _HOLDER, str(free_port()), str(self._segment_bytes), str(self.port), str(ready)
        )
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the holder of Mooncake's pool does not join it")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill both."""
        for process in (self.holder, self.master):
            if process is not None:
                process.kill()
                process.wait()

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)


_HOLDER = """
import pathlib, sys, time
from mooncake.store import MooncakeDistributedStore
port, size, master, ready = sys.argv[1:]
store = MooncakeDistributedStore()
assert store.setup(f"127.0.0.1:{port}", "P2PHANDSHAKE", int(size), 2**24, "tcp", "", f"127.0.0.1:{master}") == 0
pathlib.Path(ready).touch()
time.sleep(86400)
"""


def _await_port(port: int, name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError(f"{name} does not listen on port {port}")


def _server(folder: Path, options: Sequence[str]) -> RedisServer:
    binary = redis_binary()
    if binary is None:
        raise FileNotFoundError("no redis-server or valkey-server; on Debian: apt-get install redis-server")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    plain = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder), "--loglevel", "warning")
    return RedisServer((binary, "--port", str(port), *plain, *options), port)


def _form(addresses: Sequence[str]) -> None:
    client = next((found for name in _CLIENTS if (found := shutil.which(name))), "redis-cli")
    command = [client, "--cluster", "create", *addresses, "--cluster-replicas", "1", "--cluster-yes"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=START_SECONDS)
    deadline, waiting = time.monotonic() + START_SECONDS, list(addresses)
    while waiting and time.monotonic() < deadline:
        port = waiting[0].rpartition(":")[2]
        said = subprocess.run([client, "-p", port, "cluster", "info"], check=False, capture_output=True, timeout=5)
        if b"cluster_state:ok" in said.stdout:
            waiting.pop(0)
        else:
            time.sleep(0.1)
    if waiting:
        raise TimeoutError("the cluster does not form")

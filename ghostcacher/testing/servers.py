"""Real servers on loopback, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 20.0
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
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise TimeoutError(f"{self.command[0]} does not listen on port {self.port}")

    def stop(self) -> None:
        """Kill it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """A port that nobody listens on now, and whose cluster bus port is free too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_000:
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
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-replica-validity-factor", "0")
    servers = [_server(folder / str(number), options) for number in range(2 * masters)]
    try:
        for server in servers:
            server.start()
        _form([f"127.0.0.1:{server.port}" for server in servers])
        yield servers
    finally:
        for server in servers:
            server.stop()


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

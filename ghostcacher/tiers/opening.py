"""``open_store``: settings to tiers."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from ghostcacher.codecs.fused import COMPILED, compile_all
from ghostcacher.codecs.registry import codec_named
from ghostcacher.codecs.safetensors_format import CodecChain
from ghostcacher.config import Admission, Role, StoreConfig, physical_memory_bytes
from ghostcacher.errors import ConfigurationError, StoreError
from ghostcacher.events import CacheEvent, LogObserver, Observer, logger, tell
from ghostcacher.eviction import LeastRecentlyUsed
from ghostcacher.keyring import Secret
from ghostcacher.stores.base import Store
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.envelope import Sealing
from ghostcacher.stores.filesystem import FilesystemStore
from ghostcacher.stores.memory import MemoryStore
from ghostcacher.stores.mooncake import SCHEME as MOONCAKE
from ghostcacher.stores.mooncake import MooncakeStore
from ghostcacher.stores.redis import SCHEMES, RedisStore
from ghostcacher.stores.sealed import SealedDirectory, SealedStore
from ghostcacher.tiers.base import Tier
from ghostcacher.tiers.breaker import BreakerStore
from ghostcacher.tiers.catalog import ListingCatalog, ProbingCatalog
from ghostcacher.tiers.deadline import DeadlineStore
from ghostcacher.tiers.decoded import DecodedTier
from ghostcacher.tiers.encoded import EncodedTier
from ghostcacher.tiers.flights import Flights
from ghostcacher.tiers.readers import Readers
from ghostcacher.tiers.shelf import Shelf
from ghostcacher.tiers.stack import TierStack
from ghostcacher.tiers.writer import Writer

DISK_TIMEOUT_SECONDS = 60.0
QUEUE_SHARE_OF_MEMORY = 0.25

_default: TierStack | None = None
_default_lock = threading.Lock()


def open_store(
    directory: str | os.PathLike[str] | None = None,
    device: int | str | None = None,
    memory: int | str | None = "auto",
    disk: int | str | None = "20GiB",
    remote: str | None = None,
    codec: str = "raw",
    remote_codec: str | None = None,
    quality: float | None = None,
    block_tokens: int = 128,
    salt: str | None = None,
    role: Role = "writer",
    admit: Admission = "always",
    namespace_quota: int | str | None = None,
    key: Secret | Sequence[Secret] | None = None,
    single_flight: float | None = None,
    audit: float = 0.0,
    strict: bool = False,  # noqa: FBT001, FBT002 (part of the signature that users were promised)
) -> TierStack:
    """Open a store; close it with ``close()`` or as a context manager.

    Args:
        directory: of the disk tier; None means ``$GHOSTCACHER_HOME``, else ``$HF_HOME/ghostcacher``.
        device: budget of decoded blocks on the model's device, such as ``"2GiB"``; None means no such tier.
        memory: budget of decoded blocks in RAM; ``"auto"`` is a tenth of the machine's, at most 4 GiB; None, none.
            ``"8GiB:int8"`` keeps them coded instead: more of them, and each is decoded when it is used.
        disk: budget of the directory, shared by all processes that use it; None means no disk tier. ``"100GiB:int8"``
            codes blocks there otherwise than ``codec`` says.
        remote: ``"redis://host:6379/0"``, ``"redis+cluster://…"``, ``"mooncake://master:50051"``, or any
            fsspec URL, such as ``"s3://bucket/prefix"``; None means no remote tier. A call to it never takes longer
            than ``$GHOSTCACHER_REMOTE_TIMEOUT_SECONDS`` (5 s); after three failures in a row it is left alone for 5 s
            and longer.
        codec: of disk and remote: ``"raw"`` and ``"raw.z"`` are exact, ``"int8"``, ``"int4"``, ``"ec(0.25)"`` and
            ``"bf16"`` are not; see docs/quantisation.md. A store is exact if all its tiers are. ``"kvt(0.35)"`` is the
            smallest, and needs ``ghostcacher calibrate`` once for each model.
        remote_codec: of the remote tier, if another.
        quality: in place of ``codec``: what a stored prefix may cost, in nats a token, such as 0.001 (running in bf16
            costs as much). The codec follows; each prompt's last tokens are run again on what was coded, behind
            ``generate``, and what does not keep the budget is stored finer.
        block_tokens: tokens in a block, 16 to 4096.
        salt: isolates tenants: other salts never see these blocks, in any tier.
        role: ``"reader"`` takes from disk and remote what others store there, and neither stores, deletes nor marks
            anything as used; RAM is its own.
        admit: ``"second-sight"`` stores a block on disk and remotely when it is computed for the second time (by this
            process): prompts that are seen once leave nothing there.
        namespace_quota: how much of the directory one namespace (a model, a salt) may take, such as ``"10GiB"``: its
            own oldest blocks go first then, and no other's; None: as much as the budget.
        key: seals disk and remote: names are HMACs, contents AES-256-GCM; what was not sealed with it is a miss. Bytes
            (32 or more), or the path of a file (``ghostcacher new-key``); of several the first seals, all open. None:
            what ``$GHOSTCACHER_KEY_FILE`` or ``$GHOSTCACHER_KEY`` say, or no sealing. Needs ``ghostcacher[seal]``.
        single_flight: seconds to wait at most for another process that is computing the same unseen prefix, instead of
            computing it here too; None: not at all. About what the prefix takes to compute is right.
        audit: share of the served prompts, such as 0.01, that are computed once more from nothing, on the writer's
            thread beside other forwards, and compared with what exact tiers hold. What differs by more than rounding is
            deleted, with all that goes on from it, and counted as ``disproved``: a writer lied.
        strict: raise what goes wrong in a tier instead of counting it as a miss.

    Raises:
        ConfigurationError: an argument is malformed, the directory cannot be trusted, or this machine is big-endian.
        MissingExtraError: ``remote`` needs a package that is not installed.
        StoreError: the directory cannot be created.
    """
    _check_byte_order()
    config = StoreConfig.parse(
        directory=directory, device=device, memory=memory, disk=disk, remote=remote, codec=codec,
        remote_codec=remote_codec, quality=quality, block_tokens=block_tokens, salt=salt, strict=strict,
        role=role, admit=admit, namespace_quota=namespace_quota, key=key,
        single_flight=single_flight, audit=audit,
    )  # fmt: skip
    observers: list[Observer] = [LogObserver()]

    def observe(event: CacheEvent) -> None:
        tell(observers, event)

    readers = Readers()
    ring = tuple(Sealing.of(secret) for secret in config.secrets)
    directory_store = None if config.disk_bytes is None else _directory_store(config, ring)
    remote_store = None if config.remote is None else _remote_store(config.remote, config, ring)
    stores = [store for store in (directory_store, remote_store) if store is not None]
    shelf = Shelf(stores, config.remote_timeout_seconds, is_read_only=config.role == "reader")
    codecs = (config.memory_codec, config.disk_codec, config.remote_codec)
    chains = {text: CodecChain(codec_named(text, shelf.find), shelf.find) for text in codecs}
    if COMPILED & {chain.codec.name for chain in chains.values()}:
        compile_all()
    tiers: list[Tier] = [*_near_tiers(config, chains[config.memory_codec], observe, readers)]
    if directory_store is not None:
        tiers.append(_disk_tier(config, directory_store, chains[config.disk_codec], observe, readers))
    if remote_store is not None:
        tiers.append(_remote_tier(config, remote_store, chains[config.remote_codec], observe, readers))
    writer = Writer(int(physical_memory_bytes() * QUEUE_SHARE_OF_MEMORY), observe)
    return TierStack(config, tiers, writer, readers, observers, shelf, _flights(config, stores))


def default_store() -> TierStack:
    """The store of this process for every ``GhostCache(model)`` without one: RAM, then disk; opened on first use."""
    global _default  # noqa: PLW0603 (one per process is what it is)
    with _default_lock:
        if _default is None:
            _default = open_store()
        return _default


def _check_byte_order() -> None:
    if sys.byteorder != "little":
        raise ConfigurationError("stored values are little-endian, and this machine is big-endian: run without a store")


def _near_tiers(config: StoreConfig, chain: CodecChain, observe: Observer, readers: Readers) -> Iterator[Tier]:
    """Device and RAM: decoded blocks, or coded ones if RAM is to hold more of them."""
    if config.device_bytes is not None:
        yield DecodedTier("device", config.device_bytes, LeastRecentlyUsed(), observe, device=None)
    if config.memory_bytes is None:
        return
    if config.memory_codec == "raw":
        yield DecodedTier("memory", config.memory_bytes, LeastRecentlyUsed(), observe, device="cpu")
        return
    yield EncodedTier(
        "memory", MemoryStore(), chain, LeastRecentlyUsed(), observe, is_local=True, budget_bytes=config.memory_bytes,
        timeout_seconds=DISK_TIMEOUT_SECONDS, strict=config.strict, spread=readers,
    )  # fmt: skip


def _directory_store(config: StoreConfig, ring: Sequence[Sealing]) -> DirectoryStore | SealedDirectory:
    store = DirectoryStore(config.directory, is_sealed=bool(ring), is_read_only=config.role == "reader")
    return SealedDirectory(store, ring) if ring else store


class _SweepLock:
    """The lock of a directory's eviction sweep. One that cannot be had is the store's failure."""

    def __init__(self, root: Path, mode: int) -> None:
        self._lock = FileLock(root / ".sweep.lock", mode=mode)

    def __enter__(self) -> None:
        try:
            self._lock.acquire()
        except OSError as error:
            raise StoreError(error.errno, f"cannot lock the directory for a sweep: {error.strerror}") from error

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _flights(config: StoreConfig, stores: Sequence[Store]) -> Flights | None:
    """Claims lie in the store that reaches furthest."""
    if config.single_flight_seconds is None or not stores or config.role == "reader":
        return None
    return Flights(stores[-1], config.single_flight_seconds, config.remote_timeout_seconds)


def _disk_tier(
    config: StoreConfig, store: DirectoryStore | SealedDirectory, chain: CodecChain, observe: Observer, readers: Readers
) -> EncodedTier:
    tier = EncodedTier(
        "disk", store, chain, LeastRecentlyUsed(), observe, is_local=True, timeout_seconds=DISK_TIMEOUT_SECONDS,
        budget_bytes=config.disk_bytes, strict=config.strict, spread=readers, touch_store=store.touch_many,
        sweep_lock=_SweepLock(store.root, store.lock_mode), is_read_only=config.role == "reader",
        quota_bytes=config.quota_bytes,
    )  # fmt: skip
    tier.catalog = ListingCatalog(store, tier.reject)
    return tier


def _remote_store(url: str, config: StoreConfig, ring: Sequence[Sealing]) -> Store:
    scheme, timeout_seconds = url.partition("://")[0], config.remote_timeout_seconds
    store = BreakerStore(DeadlineStore(_client(url, scheme, timeout_seconds)))
    if not ring and scheme != "memory":
        logger.warning(
            "the remote tier is not sealed: who can write to it can forge blocks, who can read it sees what prompts "
            "hold; seal it with open_store(key=…)"
        )
    return SealedStore(store, ring) if ring else store


def _client(url: str, scheme: str, timeout_seconds: float) -> Store:
    if scheme in SCHEMES:
        return RedisStore(url, timeout_seconds=timeout_seconds)
    return MooncakeStore(url) if scheme == MOONCAKE else FilesystemStore(url)


def _remote_tier(
    config: StoreConfig, store: Store, chain: CodecChain, observe: Observer, readers: Readers
) -> EncodedTier:
    timeout_seconds = config.remote_timeout_seconds
    tier = EncodedTier(
        "remote", store, chain, LeastRecentlyUsed(), observe, is_local=False, timeout_seconds=timeout_seconds,
        strict=config.strict, spread=readers, is_read_only=config.role == "reader",
    )  # fmt: skip
    tier.catalog = ProbingCatalog(store, timeout_seconds)
    return tier

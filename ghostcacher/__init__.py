"""Persistent, tiered prefix (KV) cache for ``model.generate()`` of HuggingFace transformers.

The names below are loaded on first use, so that ``import ghostcacher`` costs milliseconds and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghostcacher.cache import Attachment, GhostCache, attach
    from ghostcacher.errors import (
        BlockError,
        ConfigurationError,
        GhostcacherError,
        MissingExtraError,
        StoreError,
        StoreRefusedError,
        StoreTimeoutError,
        UnsupportedModelError,
    )
    from ghostcacher.events import CacheEvent, CacheReport, Observer
    from ghostcacher.lookups import Lookup, forget, lookup
    from ghostcacher.support import Support, supported
    from ghostcacher.tiers.opening import default_store, open_store
    from ghostcacher.tiers.stack import TierStack

__version__ = "0.1.0"

_HOMES = {
    "Attachment": "cache",
    "BlockError": "errors",
    "CacheEvent": "events",
    "CacheReport": "events",
    "ConfigurationError": "errors",
    "GhostCache": "cache",
    "GhostcacherError": "errors",
    "Lookup": "lookups",
    "MissingExtraError": "errors",
    "Observer": "events",
    "StoreError": "errors",
    "StoreRefusedError": "errors",
    "StoreTimeoutError": "errors",
    "Support": "support",
    "TierStack": "tiers.stack",
    "UnsupportedModelError": "errors",
    "attach": "cache",
    "default_store": "tiers.opening",
    "forget": "lookups",
    "lookup": "lookups",
    "open_store": "tiers.opening",
    "supported": "support",
}

__all__ = [
    "Attachment",
    "BlockError",
    "CacheEvent",
    "CacheReport",
    "ConfigurationError",
    "GhostCache",
    "GhostcacherError",
    "Lookup",
    "MissingExtraError",
    "Observer",
    "StoreError",
    "StoreRefusedError",
    "StoreTimeoutError",
    "Support",
    "TierStack",
    "UnsupportedModelError",
    "attach",
    "default_store",
    "forget",
    "lookup",
    "open_store",
    "supported",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ghostcacher' has no attribute {name!r}")
    return getattr(import_module(f"ghostcacher.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""Every exception ghostcacher raises.

GhostcacherError
├── ConfigurationError (ValueError)     a setting cannot mean anything
├── UnsupportedModelError (TypeError)   the model cannot take a GhostCache at all
├── MissingExtraError (ImportError)     an optional package is not installed
├── StoreError (OSError)                a store could not do what was asked
│   ├── StoreTimeoutError (TimeoutError)
│   ├── StoreRefusedError               it is there, and says no
│   └── StoreForgedError                what it gave was not sealed with the key
└── BlockError (ValueError)             stored bytes are not the block that was asked for

None of them leaves ``model.generate()`` unless the store was opened with ``strict=True``.
"""

from __future__ import annotations


class GhostcacherError(Exception):
    """Root of the tree above."""


class ConfigurationError(GhostcacherError, ValueError):
    """A setting is malformed; the message names the value, the limit and the next step."""


class UnsupportedModelError(GhostcacherError, TypeError):
    """The model cannot be given a ``GhostCache``; the message says why."""


class MissingExtraError(GhostcacherError, ImportError):
    """An optional package is missing; the message holds the ``pip install`` line."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs the package {package!r}: pip install "ghostcacher[{extra}]"')


class StoreError(GhostcacherError, OSError):
    """A store failed to read, write, list or delete."""


class StoreTimeoutError(StoreError, TimeoutError):
    """A store did not answer within the deadline of the call."""


class StoreRefusedError(StoreError):
    """A store that is there says no to what was asked: it is full, read-only, or the value is too large."""


class StoreForgedError(StoreError):
    """A stored value was not sealed with this key, or was changed since."""


class BlockError(GhostcacherError, ValueError):
    """Stored bytes do not verify as the block that was asked for.

    ``reason`` is one word of a fixed set: ``corrupt`` (digest), ``header`` (malformed), ``key_echo`` (another
    block's bytes), ``geometry`` (another layout), ``codec`` (unknown or wrong), ``version`` (another format),
    ``lossy`` (an exact store met a lossy block), ``nonfinite`` (NaN or infinity offered to a lossy codec),
    ``frame`` (not what the codec writes), ``uncalibrated`` (a codec that needs tables of the model has none),
    ``tables`` (an asset of tables is not what its name says), ``memory`` (there is too little to decode it), ``auth``
    (it does not open with the store's key), ``sealed`` (it is sealed, and this store has no key).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason

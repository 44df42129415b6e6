"""Which blocks are worth a place in the far tiers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from ghostcacher.keys import BlockKey

REMEMBERED = 2**16


class SecondSight:
    """Admits a key when it is offered for the second time; remembers the last 65,536 that were offered once."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def admitted(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Those of ``keys`` that were offered before; notes the others."""
        with self._lock:
            known = [key for key in keys if key.digest in self._seen]
            for key in keys:
                self._seen[key.digest] = None
                self._seen.move_to_end(key.digest)
            while len(self._seen) > self._remembered:
                self._seen.popitem(last=False)
            return known

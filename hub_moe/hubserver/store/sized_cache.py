"""A cache bounded by the size of what it holds."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class SizedCache(Generic[Value]):
    """Keeps what was used last, as long as all sizes together are at most `most`; any thread may use it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._size = 0
        self._held: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """What was kept under a key, None if it had to go."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key][0]

    def put(self, key: Hashable, value: Value, *, size: int) -> None:
        """Keep a value in place of what was used the longest ago; one that alone is too large is not kept."""
        with self._lock:
            self._drop(key)
            if size > self._most:
                return
            self._held[key] = value, size
            self._size += size
            while self._size > self._most:
                self._drop(next(iter(self._held)))

    def _drop(self, key: Hashable) -> None:
        _, size = self._held.pop(key, (None, 0))
        self._size -= size

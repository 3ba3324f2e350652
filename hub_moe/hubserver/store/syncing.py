"""Files that go to the disk already while more of them arrives, so that the end of a long upload is no long wait."""

import os
from concurrent.futures import Future, ThreadPoolExecutor

_EVERY_BYTES = 64 << 20
_POOL = ThreadPoolExecutor(2, thread_name_prefix="sync")


class Syncing:
    """Told of every write to an unbuffered file, it syncs now and then, in another thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._bytes = 0
        self._running: Future[None] | None = None

    def wrote(self, size_bytes: int) -> None:
        """Note that so many more bytes were written."""
        self._bytes += size_bytes
        if self._bytes >= _EVERY_BYTES and (self._running is None or self._running.done()):
            self.wait()
            self._running = _POOL.submit(_move_to_disk, self._descriptor)
            self._bytes = 0

    def wait(self) -> None:
        """Wait for the other thread; OSError if it could not write."""
        running, self._running = self._running, None
        if running:
            running.result()


def _move_to_disk(descriptor: int) -> None:
    """Sync, and give the memory back: a large upload then pushes nothing out that others read.

    The kernel also need not find new memory for each page, which in a virtual machine costs more than all else here.
    """
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

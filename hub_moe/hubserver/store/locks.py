"""Locks between processes: the server, and the commands that look after its folder while it serves."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.02


@contextmanager
def share(path: Path) -> Iterator[None]:
    """Hold a lock together with others who share it; waits while somebody has it alone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def take(path: Path, *, alone: bool = True, wait_s: float = 0.0) -> Iterator[bool]:
    """Try to hold a lock, `alone` or shared, for at most `wait_s`; whether it is held is what the block gets."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_s
    try:
        while not (is_held := _try(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)):
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_S)
        yield is_held
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

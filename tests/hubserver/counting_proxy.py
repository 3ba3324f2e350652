"""A TCP proxy that counts the bytes of each direction: how much a client really sent and fetched."""

import select
import socket
import threading
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class CountingProxy:
    """Forwards every connection to `target`, the address of a Hub; `url` is its own."""

    def __init__(self, target):
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent_bytes = self.fetched_bytes = 0

    @contextmanager
    def running(self):
        """Accept connections inside the block."""
        accepting = threading.Thread(target=self._accept)
        accepting.start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            accepting.join()

    def forget(self):
        """Count from nothing again."""
        self.sent_bytes = self.fetched_bytes = 0

    def _accept(self):
        with suppress(OSError), self._listener:
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client):
        with suppress(OSError), client, socket.create_connection(self._target) as server:
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    if source is client:
                        self.sent_bytes += len(data)
                        server.sendall(data)
                    else:
                        self.fetched_bytes += len(data)
                        client.sendall(data)

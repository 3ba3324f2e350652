"""`python -m hub_moe.hubserver ROOT [--port N] [--part-bytes N]`: the server alone, without the command line."""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from .app import DEFAULT_PART_BYTES
from .serve import serve


def _announce(address: str) -> None:
    print(f"export HF_ENDPOINT={address}", flush=True)


def _stop_when_stdin_closes() -> None:
    """However the process that started this one ends, the server does not outlive it."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the embedded Hub.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--part-bytes", type=int, default=DEFAULT_PART_BYTES)
    parser.add_argument("--until-stdin-closes", action="store_true")
    arguments = parser.parse_args()
    if arguments.until_stdin_closes:
        threading.Thread(target=_stop_when_stdin_closes, daemon=True).start()
    serve(arguments.root, port=arguments.port, part_bytes=arguments.part_bytes, on_ready=_announce)

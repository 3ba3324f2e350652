"""`python -m hub_moe.hubserver ROOT [--port N] [--part-bytes N]`: the server alone, without the command line."""

import argparse
from pathlib import Path

from .app import DEFAULT_PART_BYTES
from .serve import serve


def _announce(address: str) -> None:
    print(f"export HF_ENDPOINT={address}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the embedded Hub.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--part-bytes", type=int, default=DEFAULT_PART_BYTES)
    arguments = parser.parse_args()
    serve(arguments.root, port=arguments.port, part_bytes=arguments.part_bytes, on_ready=_announce)

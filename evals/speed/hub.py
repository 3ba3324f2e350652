"""The embedded Hub: a large file up and down through the real client, against `cp` and one sha256 of the same file.

    python evals/speed/hub.py [--size 2e9] [--content weights|random] [--only large|listing|many]

The file holds bf16 weights as a checkpoint does, or random bytes. Reported for plain HTTP and for hf_xet: the time of
upload and download as a ratio to `cp` plus sha256, the server's peak resident memory, and the processor seconds that
client and server used, because no server makes a client faster that needs that long by itself. Also: the time to list
10,000 files, and 200 downloads at once. Needs about 5 times the size on disk.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rounds import add_options, report, require_quiet

from hub_moe.hubserver.process import Hub
from hub_moe.hubserver.pytest_plugin import create_hub

GOALS = {
    "upload_http": 2.0,
    "download_http": 2.0,
    "upload_xet": 2.0,
    "download_xet": 2.0,
    "server_peak_of_300_mb": 1.0,
    "list_10000_files_s": 1.0,
}
FILES = 10_000
DOWNLOADS = 200
DOWNLOAD_BYTES = 5_000_000
PIECE_BYTES = 64 << 20
STEP = """
import json, resource, sys, time
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("alice/{name}", exist_ok=True)
def cpu_s():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
before_s, start = cpu_s(), time.perf_counter()
{call}
print(json.dumps({{"time_s": time.perf_counter() - start, "client_cpu_s": cpu_s() - before_s}}))
"""
UPLOAD = 'api.upload_file(path_or_fileobj="{path}", path_in_repo="w.safetensors", repo_id="alice/{name}")'
DOWNLOAD = 'api.hf_hub_download("alice/{name}", "w.safetensors", local_dir="{path}")'


def write_file(path: Path, size_bytes: int, content: str) -> None:
    """A file of weights, normally distributed in bf16, or of random bytes."""
    import numpy as np

    chance = np.random.default_rng(0)
    with path.open("wb") as file:
        while (left := size_bytes - file.tell()) > 0:
            count = min(left, PIECE_BYTES)
            if content == "random":
                file.write(chance.bytes(count))
            else:
                weights = chance.standard_normal(count // 2 + 1, dtype=np.float32) * 0.02
                file.write((weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:count])


def measure_disk(path: Path) -> dict[str, float]:
    """The time of `cp` and of one sha256 of a file that is in the page cache."""
    copy = path.with_name("copy")
    start = time.perf_counter()
    subprocess.run(["cp", path, copy], check=True)
    copied = time.perf_counter()
    copy.unlink()
    with path.open("rb") as file:
        hashing = time.perf_counter()
        hashlib.file_digest(file, "sha256")
    return {"cp_s": copied - start, "sha256_s": time.perf_counter() - hashing}


def read_server(hub: Hub) -> dict[str, float]:
    """Processor seconds and peak resident bytes of the server so far."""
    fields = Path(f"/proc/{hub.pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{hub.pid}/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return {"cpu_s": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), "peak_bytes": peak}


def run_step(hub: Hub, call: str, name: str, *, xet: bool) -> dict[str, float]:
    """One call of the real client in a process of its own: its time, its and the server's processor seconds."""
    before = read_server(hub)
    figures: dict[str, float] = json.loads(hub.run_python(STEP.format(call=call, name=name), xet=xet))
    after = read_server(hub)
    return figures | {"server_cpu_s": after["cpu_s"] - before["cpu_s"], "server_peak_bytes": after["peak_bytes"]}


def measure_transfer(folder: Path, source: Path, name: str) -> dict[str, dict[str, float]]:
    """Upload and download by one way, on a Hub and with caches of their own; the downloaded file is compared."""
    hub = create_hub(folder / "hub")
    down = folder / "down"
    with hub.running():
        steps = {"upload": UPLOAD.format(path=source, name=name), "download": DOWNLOAD.format(path=down, name=name)}
        figures = {f"{step}_{name}": run_step(hub, call, name, xet=name == "xet") for step, call in steps.items()}
    subprocess.run(["cmp", source, down / "w.safetensors"], check=True)
    shutil.rmtree(folder)
    return figures


def measure_large(scratch: Path, size_bytes: int, content: str) -> tuple[dict[str, float], dict[str, Any]]:
    """One round: ratios, and every figure."""
    source = scratch / "source"
    write_file(source, size_bytes, content)
    figures: dict[str, Any] = {"disk": measure_disk(source)}
    for name in ("http", "xet"):
        figures |= measure_transfer(scratch / name, source, name)
    source.unlink()
    base_s = figures["disk"]["cp_s"] + figures["disk"]["sha256_s"]
    steps = [name for name in figures if name != "disk"]
    ratios = {step: figures[step]["time_s"] / base_s for step in steps}
    ratios["server_peak_of_300_mb"] = max(figures[step]["server_peak_bytes"] for step in steps) / 300e6
    return ratios, figures


def measure_listing(scratch: Path) -> float:
    """Seconds to list 10,000 files, the first time that anybody asks."""
    hub = create_hub(scratch / "listing")
    files = scratch / "files"
    for number in range(FILES):
        path = files / f"{number % 100}/{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    upload = f'api.upload_folder(folder_path="{files}", repo_id="alice/m")'
    ask = f'assert len(api.list_repo_files("alice/m")) == {FILES} + 1'
    with hub.running():
        run_step(hub, upload, "m", xet=False)
        return run_step(hub, ask, "m", xet=False)["time_s"]


def measure_many(scratch: Path) -> dict[str, float]:
    """200 downloads at once, each compared by sha256."""
    import httpx2

    hub = create_hub(scratch / "many")
    content = os.urandom(DOWNLOAD_BYTES)
    source = scratch / "many.bin"
    source.write_bytes(content)
    with hub.running():
        run_step(hub, UPLOAD.format(path=source, name="m"), "m", xet=False)
        url, expected = f"{hub.url}/alice/m/resolve/main/w.safetensors", hashlib.sha256(content).hexdigest()

        def download(_: int) -> bool:
            answer = httpx2.get(url, timeout=120)
            return answer.status_code == 200 and hashlib.sha256(answer.content).hexdigest() == expected

        start = time.perf_counter()
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            right = sum(pool.map(download, range(DOWNLOADS)))
        seconds = time.perf_counter() - start
        peak = read_server(hub)["peak_bytes"]
    rate = DOWNLOADS * DOWNLOAD_BYTES / seconds
    return {"right": right, "time_s": seconds, "bytes_per_s": rate, "server_peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=2e9, help="bytes of the large file")
    parser.add_argument("--content", choices=["weights", "random"], default="weights")
    parser.add_argument("--only", choices=["large", "listing", "many"])
    add_options(parser, rounds=None)
    arguments = parser.parse_args()
    require_quiet(arguments)
    ratios: dict[str, float] = {}
    figures: dict[str, Any] = {"size_bytes": arguments.size, "content": arguments.content, "cores": os.cpu_count()}
    parts: dict[str, Callable[[Path], None]] = {
        "large": lambda scratch: _add_large(scratch, arguments, ratios, figures),
        "listing": lambda scratch: ratios.update(list_10000_files_s=measure_listing(scratch)),
        "many": lambda scratch: figures.update(many=measure_many(scratch)),
    }
    for name, part in parts.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory() as scratch:
                part(Path(scratch))
            print(f"{name} done", file=sys.stderr)
    many = figures.get("many")
    if many and many["right"] != DOWNLOADS:
        sys.exit(f"{DOWNLOADS - many['right']} of {DOWNLOADS} downloads failed.")
    report("hub", ratios, {name: goal for name, goal in GOALS.items() if name in ratios}, arguments, **figures)


def _add_large(scratch: Path, arguments: argparse.Namespace, ratios: dict[str, float], figures: dict[str, Any]) -> None:
    more_ratios, more_figures = measure_large(scratch, int(arguments.size), arguments.content)
    ratios.update(more_ratios)
    figures.update(more_figures)


if __name__ == "__main__":
    main()

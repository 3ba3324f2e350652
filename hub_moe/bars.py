"""Other libraries' progress bars, out of the way of ours."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Without transformers' bars for reading and writing weights; off a terminal without those of downloads, too."""
    import datasets
    from transformers.utils import logging as hf_logging

    downloads = import_module("huggingface_hub.utils.tqdm")  # by name: its package has a class of that name
    had_weights, had_rows = hf_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled() is False
    had_files = not downloads.are_progress_bars_disabled()
    hf_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        downloads.disable_progress_bars()
    try:
        yield
    finally:
        if had_weights:
            hf_logging.enable_progress_bar()
        if had_rows:
            datasets.enable_progress_bars()
        if had_files:
            downloads.enable_progress_bars()

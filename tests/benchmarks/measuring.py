"""Peak memory, and functions called in a process of their own."""

import gc
import multiprocessing
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def peak_megabytes(found):
    """Append to ``found`` by how much a block's peak memory exceeds what it found (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    yield
    found.append(_status("VmHWM") - before)


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def in_own_process(function, *arguments):
    """Return what a function of a module returns in a fresh process: no memory of others."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)

"""Peak memory, times of epochs, and functions called in a process of their own."""

import gc
import multiprocessing
import time
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl


class EpochTimes(pl.Callback):
    """Wall and CPU seconds of the steps of each epoch, what a call does once left out."""

    def __init__(self):
        self.seconds = []

    def on_train_epoch_start(self, trainer, pl_module):
        self._start = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer, pl_module):
        now = time.perf_counter(), time.process_time()
        self.seconds.append(tuple(b - a for a, b in zip(self._start, now, strict=True)))


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

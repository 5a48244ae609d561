"""Peak memory, times of epochs, and functions called in a process of their own."""

import gc
import multiprocessing
import time
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import numpy as np


class EpochTimes(pl.Callback):
    """Wall and CPU seconds of each epoch, what a call does once left out.

    ``seconds`` with the data and the trainer; ``step_seconds`` of the steps alone, forward,
    backward, update and records.
    """

    def __init__(self):
        self.seconds, self.step_seconds = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self._start, self._in_steps = _now(), np.zeros(2)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._step_start = _now()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._in_steps += _now() - self._step_start

    def on_train_epoch_end(self, trainer, pl_module):
        self.seconds.append(_now() - self._start)
        self.step_seconds.append(self._in_steps)


def _now():
    return np.array([time.perf_counter(), time.process_time()])


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

"""Harm that is done inside a process before it runs: named in a request of server.py."""

import errno
import fcntl
import os
import sys
import time
import weakref

import torch
from toy import STEPS

from cbqstream.run import pipeline, result
from cbqstream.rundir import journal
from cbqstream.windows import reconstruct

real_reconstruct = pipeline.reconstruct
real_loss = reconstruct.reconstruction_loss


def _out_of_memory(times: int):
    """From the second window on; and when a window is tried again, what it held the first time must be gone."""
    calls, held = [], []

    def fail(blocks, *more):
        arguments = (blocks, *more)
        calls.append(1)
        assert not any(block() is not None for block in held), "tried again with the memory of the first time"
        held[:] = [weakref.ref(block.module) for block in blocks]
        if 2 <= len(calls) < 2 + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.")
        return real_reconstruct(*arguments)

    pipeline.reconstruct = fail


def out_of_memory_once() -> None:
    """In the second window."""
    _out_of_memory(1)


def out_of_memory_for_good() -> None:
    """From the second window on."""
    _out_of_memory(100)


def _nan_in(calls_with_grad: range) -> None:
    calls = []

    def loss(h_BSD, *more):
        value = real_loss(h_BSD, *more)
        if h_BSD.requires_grad:
            calls.append(1)
            if len(calls) - 1 in calls_with_grad:
                return value * float("nan")
        return value

    reconstruct.reconstruction_loss = loss


def nan_in_one_step() -> None:
    """Of the first window."""
    _nan_in(range(1))


def nan_in_every_step() -> None:
    """Of all windows."""
    _nan_in(range(10**6))


def nan_from_the_second_window_on() -> None:
    """And in all steps of it."""
    _nan_in(range(STEPS, 10**6))


def stuck_while_leaving() -> None:
    """Emptying tmp/ takes for ever once a signal has come; the file `stuck` beside the run says so."""
    real = journal.Journal.empty_tmp

    def empty(self):
        if sys.exc_info()[0] is None:
            return real(self)
        (self.chain.path.parent / "stuck").touch()
        time.sleep(60)
        return None

    journal.Journal.empty_tmp = empty


def source_changes_before_the_export() -> None:
    """A bit of a tensor that is only copied, after the model has been looked at for the last time."""
    real = result.assemble

    def assemble(*arguments, **options):
        tensor = options["source"].infos["lm_head.weight"]
        content = bytearray(tensor.file.read_bytes())
        content[tensor.start] ^= 1
        tensor.file.write_bytes(content)
        return real(*arguments, **options)

    result.assemble = assemble


def no_locks() -> None:
    """flock fails as on some network file systems."""

    def flock(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = flock


def clock_far_ahead() -> None:
    """Ten years."""
    real = time.time
    time.time = lambda: real() + 10 * 365 * 86400


def clock_backwards() -> None:
    """Every question is answered with an earlier time."""
    answers = iter(range(10**9, 0, -1))
    time.time = lambda: float(next(answers))

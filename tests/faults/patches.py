"""Faults inside a process: functions that patch the package before a command runs. A request to server.py names one of them."""

import errno
import fcntl
import os
import sys
import time
import weakref

import torch
from toy import STEPS

from cbqstream.run import expert_groups, pipeline, result
from cbqstream.rundir import journal
from cbqstream.windows import reconstruct

real_reconstruct = pipeline.reconstruct
real_loss = reconstruct.reconstruction_loss


def _out_of_memory(times: int):
    """Let the device run out of memory `times` times from the second window on.

    When a window is tried again, the blocks of the first attempt must have been freed.
    """
    calls, held = [], []

    def fail(blocks, *more):
        arguments = (blocks, *more)
        calls.append(1)
        assert not any(block() is not None for block in held), "the blocks of the first attempt are still in memory"
        held[:] = [weakref.ref(block.module) for block in blocks]
        if 2 <= len(calls) < 2 + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.")
        return real_reconstruct(*arguments)

    pipeline.reconstruct = fail


def out_of_memory_once() -> None:
    """Let the device run out of memory once, in the second window."""
    _out_of_memory(1)


def out_of_memory_for_good() -> None:
    """Let the device run out of memory in the second window each time that it is tried."""
    _out_of_memory(100)


def groups_of_one_expert() -> None:
    """Make every expert that is reconstructed alone a durable result of its own."""
    expert_groups.SLAB_WEIGHTS = 1


def _nan_in(calls_with_grad: range) -> None:
    """Make the loss NaN in the training steps with these numbers, counted over all windows."""
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
    """Make the loss of the first training step of the first window NaN."""
    _nan_in(range(1))


def nan_in_every_step() -> None:
    """Make the loss of every training step of all windows NaN."""
    _nan_in(range(10**6))


def nan_from_the_second_window_on() -> None:
    """Make the loss of every training step NaN, except in the first window."""
    _nan_in(range(STEPS, 10**6))


def stuck_while_leaving() -> None:
    """Block for a minute when tmp/ is emptied after a signal.

    The file `stuck` beside the run directory shows that this point was reached.
    """
    real = journal.Journal.empty_tmp

    def empty(self):
        if sys.exc_info()[0] is None:
            return real(self)
        (self.chain.path.parent / "stuck").touch()
        time.sleep(60)
        return None

    journal.Journal.empty_tmp = empty


def source_changes_before_the_export() -> None:
    """Flip a bit of a tensor that is only copied into the result, after the last check of the fingerprint."""
    real = result.assemble

    def assemble(*arguments, **options):
        tensor = options["source"].infos["lm_head.weight"]
        content = bytearray(tensor.file.read_bytes())
        content[tensor.start] ^= 1
        tensor.file.write_bytes(content)
        return real(*arguments, **options)

    result.assemble = assemble


def no_locks() -> None:
    """Let flock fail with ENOSYS, as on some network file systems."""

    def flock(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = flock


def clock_far_ahead() -> None:
    """Set the clock ten years ahead."""
    real = time.time
    time.time = lambda: real() + 10 * 365 * 86400


def clock_backwards() -> None:
    """Let the clock return an earlier time at each call."""
    answers = iter(range(10**9, 0, -1))
    time.time = lambda: float(next(answers))

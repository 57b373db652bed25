"""Several processes for a test, as torchrun would start them, but forks of this one: they start within milliseconds."""

import contextlib
import multiprocessing
import os
import socket
import sys
import time
import traceback

import torch

from plumbing.errors import one_line_errors

PATIENCE = 120  # seconds, after which processes that still run are killed


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def fork(work, rank, count, port):
    """In a forked process: call work(rank) with what torchrun would say. What it prints goes to out-<rank>."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)  # mends torch's pool of threads after the fork, before several threads do so at a time
    with open(f"out-{rank}", "w", buffering=1) as out:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            sys.__stderr__ = out
            try:
                with one_line_errors():
                    work(rank)
            except Exception:
                traceback.print_exc(file=out)
                sys.exit(1)


def started(count, work):
    """`count` processes that call work(rank)."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [context.Process(target=fork, args=(work, rank, count, port)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def statuses(processes):
    """Their exit statuses, when all have ended; None for one that hung and was killed."""
    end = time.monotonic() + PATIENCE
    found = []
    for process in processes:
        process.join(max(0, end - time.monotonic()))
        found.append(process.exitcode)
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return found

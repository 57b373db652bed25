"""Which process this is, of how many. torchrun starts several of them and tells each; otherwise there is one.

What they do together is in distributed.py. This file needs no torch: the files that must load quickly ask it, too.
"""

import os

TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun


def count():
    """How many processes train the model together."""
    return told("WORLD_SIZE", alone=1)


def rank():
    """The number of this process, 0 to count() - 1. The first one writes the run folder and speaks to the user."""
    return told("RANK", alone=0)


def place_on_machine():
    """The number of this process among those of its machine."""
    return told("LOCAL_RANK", alone=0)


def count_on_machine():
    """How many of the processes are on this machine."""
    return told("LOCAL_WORLD_SIZE", alone=1)


def is_first():
    return rank() == 0


def told(name, alone):
    """A number that torchrun has told this process; `alone` where it was not started by torchrun."""
    if started_by_torchrun():
        return int(os.environ[name])
    return alone


def started_by_torchrun():
    return all(name in os.environ for name in TOLD)

"""Which process this is, of how many. torchrun starts several of them and tells each; otherwise there is one.

What they do together is in distributed.py. This file needs no torch: the files that must load quickly ask it, too.
"""

import os

TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun


def count():
    """How many processes train the model together."""
    if started_by_torchrun():
        return int(os.environ["WORLD_SIZE"])
    return 1


def rank():
    """The number of this process, 0 to count() - 1. The first one writes the run folder and speaks to the user."""
    if started_by_torchrun():
        return int(os.environ["RANK"])
    return 0


def place_on_machine():
    """The number of this process among those of its machine."""
    if started_by_torchrun():
        return int(os.environ["LOCAL_RANK"])
    return 0


def count_on_machine():
    """How many of the processes are on this machine."""
    if started_by_torchrun():
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return 1


def is_first():
    return rank() == 0


def started_by_torchrun():
    return all(name in os.environ for name in TOLD)

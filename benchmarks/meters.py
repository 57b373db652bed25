"""What the benchmarks measure by: clocks, and a meter of the memory that tensors take. Not a script."""

import statistics
import time

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def seconds(function):
    """Wall time of one call; on a GPU until its last kernel is done."""
    wait_for_gpu()
    start = time.perf_counter()
    function()
    wait_for_gpu()
    return time.perf_counter() - start


def wait_for_gpu():
    """Return when the GPU, if there is one, has done all it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def core_seconds(function, *inputs):
    """Processor time of one call. It counts this process only, so other work on the machine changes it little."""
    start = time.process_time()
    function(*inputs)
    return time.process_time() - start


def alternating_medians(functions, rounds=5):
    """Median seconds of each function. They take turns: whatever else the machine does hits all of them alike."""
    for function in functions:
        function()  # first calls allocate, compile and load
    times = [[seconds(function) for function in functions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times)]


class Peak(TorchDispatchMode):
    """While this mode is on: `bytes` is the largest number of bytes in tensors that were made and not yet freed."""

    def __init__(self):
        super().__init__()
        self.live = {}  # address of a storage: (weak reference, bytes)
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = [storage._cdata for storage in storages((args, kwargs))]
        for storage in storages(result):
            if storage._cdata not in given:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return result


def storages(tree):
    """The memory behind every tensor in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(function, *inputs):
    """Most bytes of new tensors alive at once during one call."""
    with Peak() as measured:
        function(*inputs)
    return measured.bytes

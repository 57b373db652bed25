"""Weights dealt out to several processes, by FSDP2 of torch: each keeps a share of every weight, gradient and moment.

The shares of a model that is trained are fp32. They are the masters that the optimizer updates. Before a block runs,
all its shares are gathered in the dtype of --dtype, and given up again behind it. So it is on the way back, where the
gradients of all processes are added up in fp32, and each process keeps those of its shares. Embedding, head and final
norm are gathered together for a whole pass.

In one process a model stays as it is, and nothing here does anything.
"""

import contextlib
import functools
import gc
import types

import torch

from plumbing import distributed, processes

# Dealing out ----------------------------------------------------------------------------------------------------------


def place(model, device, trained=False):
    """Move a model to a device; if several processes share it, a share of every weight. trained: the shares are fp32
    masters, and what is computed with keeps the model's dtype."""
    if distributed.count() == 1:
        model.to(device)
    else:
        shard(model, device, trained)


def shard(model, device, trained):
    from torch.distributed.device_mesh import init_device_mesh  # only here: it takes long to load
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (distributed.count(),))
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    for part in (*model.model.layers, model):  # block by block onto the device: the whole model may not fit there
        if trained:
            part.float()
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for part in parts_of(model):
        part.set_gradient_divide_factor(1.0)  # gradients are added up; FSDP would take their mean
        part.set_force_sum_reduction_for_comms(True)
    # Passes that begin and end with all that FSDP does around a forward pass, whatever function does the work.
    model.run = types.MethodType(run, model)
    register_fsdp_forward_method(model, "run")
    with torch.no_grad():
        model.run(parts_of)  # any first pass: FSDP takes what runs first for the whole, and that must be no block
    model.reshard()


def run(model, function, *args, **kwargs):
    return function(model, *args, **kwargs)


def parts_of(model):
    """The modules whose weights are gathered together: every block, and the model for what is in none. [] if nothing is
    dealt out."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


# A pass through the model ---------------------------------------------------------------------------------------------


def one_pass(function):
    """Decorator of function(model, rollouts, rows, ...), a pass of some rows through the model -> one or more [n, T].

    All processes take it together. Who has no rows reads the first one for nothing: the others wait for its shares of
    the weights, and for its gradients, which are 0.
    """

    @functools.wraps(function)
    def passed(model, rollouts, rows, *args, **kwargs):
        if distributed.count() == 1:
            return function(model, rollouts, rows, *args, **kwargs)
        found = model.run(function, rollouts, rows or [0], *args, **kwargs)
        if not torch.is_grad_enabled():
            model.reshard()  # with a gradient, that happens at the end of the backward pass
        return found if rows else without_rows(found)

    return passed


def without_rows(found):
    """A tensor [n, T], or several -> the same with no rows, [0, T]; gradients go through it, as 0."""
    if isinstance(found, torch.Tensor):
        return found[:0]
    return tuple(values[:0] for values in found)


@contextlib.contextmanager
def whole_weights(model):
    """Inside, all weights of a model are gathered in every process, and stay so: a pass waits for nobody."""
    parts = parts_of(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def weights_to_save(model):
    """Inside `whole_weights`: tensors by name, what a model would save by itself if it were not dealt out; None where
    it is not."""
    if not parts_of(model):
        return None
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def with_whole_weights(function):
    """Decorator of function(model, ...) that is called inside `whole_weights`."""

    @functools.wraps(function)
    def called(model, *args, **kwargs):
        with whole_weights(model):
            return function(model, *args, **kwargs)

    return called


def free_unused():
    """Free the memory of sharded models that nobody needs any more: their parts refer to each other in circles."""
    if distributed.count() > 1:
        gc.collect()


# Shares ---------------------------------------------------------------------------------------------------------------


def own_share(tensor):
    """The part of a parameter or gradient that lies in this process; all of it if it is not dealt out."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor


def rows_of_share(rows):
    """(first, end) of the rows of a tensor that lie in this process: consecutive ones, in the order of processes."""
    N = distributed.count()
    size = -(-rows // N)  # rounded up
    first = min(rows, size * distributed.place())
    return first, min(rows, first + size)


def entries_before(parameter):
    """How many entries of a parameter lie in the processes before this one."""
    first, _ = rows_of_share(len(parameter))
    return first * (parameter.numel() // len(parameter))


# Files of shares ------------------------------------------------------------------------------------------------------


def file_of_share(name):
    """The name of the file that this process writes: optimizer.pt, or optimizer-2-of-8.pt for the second of eight."""
    if distributed.count() == 1:
        return f"{name}.pt"
    return f"{name}-{processes.rank() + 1}-of-{distributed.count()}.pt"


def read_shares(folder, name):
    """What `file_of_share` named, as this process needs it, however many processes have written it: by name of a
    parameter, dicts whose tensors are shares."""
    paths = [folder / f"{name}.pt"]
    if not paths[0].exists():
        paths = sorted(folder.glob(f"{name}-*-of-*.pt"), key=number_of_share)
    if paths == [folder / file_of_share(name)]:
        return torch.load(paths[0], "cpu", weights_only=True)
    written = [torch.load(path, "cpu", weights_only=True, mmap=True) for path in paths]
    return put_together(written)


def number_of_share(path):
    """optimizer-2-of-8.pt -> 2."""
    return int(path.stem.split("-")[-3])


def put_together(shares):
    """Nested dicts of shares, one from every process that wrote -> one dict with the shares of this process."""
    first = shares[0]
    if isinstance(first, dict):
        return {key: put_together([share[key] for share in shares]) for key in first}
    if isinstance(first, torch.Tensor) and first.dim() > 0:
        whole = torch.cat(shares)
        start, end = rows_of_share(len(whole))
        return whole[start:end].clone()
    return first

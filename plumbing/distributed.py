"""Several processes that train one model together: `torchrun --nproc_per_node N grpo.py ...`.

Every process runs the whole script and knows the whole batch. Only what takes time is dealt out: the answers to be
sampled, those to be graded, and the micro-batches. Then all of them are told what each has found, and gradients are
added up. So an algorithm is written as for one process: a mean over the batch, or the number of its tokens, is the same
everywhere. Every process must come by every call in here that talks to the others, and equally often.

Weights are dealt out in sharding.py, and what happens when a process dies is in watch.py. In one process `share` gives
everything, and nothing else here does anything.
"""

import contextlib
import datetime
import functools

import torch
import torch.distributed as dist

from plumbing import processes, watch
from plumbing.errors import UserError

# A process waits so long for another one that lives: it may have longer answers to sample, or build the embedded model.
# Of one that has died the others learn at once, see watch.py.
TIMEOUT = datetime.timedelta(hours=2)

alone = False  # within `by_itself`


def count():
    """Processes that share the work here and now."""
    if alone or not dist.is_initialized():
        return 1
    return dist.get_world_size()


@contextlib.contextmanager
def by_itself():
    """Inside, this process does all of the work, as if there were no other."""
    global alone
    before = alone
    alone = True
    try:
        yield
    finally:
        alone = before


# Beginning and end ----------------------------------------------------------------------------------------------------


def start(args):
    """Meet the other processes. Raises UserError, the same in all of them, for options that do not go with several."""
    if processes.count() == 1 or alone:
        return
    connect()
    refuse_different_options(everybodys(vars(args)))
    refuse_uneven_shares(args.num_prompts)
    refuse_shared_devices(args)


def connect():
    """Make a group of the processes that torchrun has started, unless that is done. Each gets a GPU of its own."""
    if processes.count() == 1 or dist.is_initialized():
        return
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    watch.begin(store)
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(processes.place_on_machine() % torch.cuda.device_count())
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)


def refuse_different_options(found):
    """found: the options of every process, a list of dicts."""
    for number, options in enumerate(found):
        for name, value in options.items():
            first = found[0].get(name)
            if value != first:
                what = f"--{name} {first!r}: process {number} has {value!r}"
                raise UserError(f"{what}; start all of them by the same command")


def refuse_uneven_shares(num_prompts):
    N = count()
    if num_prompts < N:
        remedy = f"raise it, or start {num_prompts} at most (--nproc_per_node)"
        raise UserError(f"--num_prompts {num_prompts}: too few for {N} processes; {remedy}")
    if num_prompts % N:
        divisors = [str(n) for n in range(1, num_prompts + 1) if num_prompts % n == 0]
        remedy = f"start a number of them that divides it ({', '.join(divisors)}), or take a multiple of {N}"
        raise UserError(f"--num_prompts {num_prompts}: {N} processes cannot share them evenly; {remedy}")


def refuse_shared_devices(args):
    if args.optimizer_device == "cpu":
        raise UserError("--optimizer_device cpu: is for one process; leave it out, several share that memory anyway")
    if ":" in args.device:
        raise UserError(f"--device {args.device}: is for one process; pass cuda, and each takes a GPU of its own")
    gpus = torch.cuda.device_count()
    here = processes.count_on_machine()
    if args.device != "cpu" and 0 < gpus < here:
        remedy = f"start {gpus} at most (--nproc_per_node), or pass --device cpu"
        raise UserError(f"--device {args.device}: {gpus} GPUs for {here} processes; {remedy}")


def refuse_other_folder(folder, step):
    """Raise UserError unless every process finds the same run in --output_dir. step: the last one found there."""
    if len(set(everybodys(step))) > 1:
        raise UserError(f"--output_dir {folder}: is not the same folder in all processes; take one that machines share")


def wait():
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()


def by_first(work):
    """Decorator: the first process calls work(*args) as if there were no other, and tells the others what it returns.
    What it raises ends all of them."""

    @functools.wraps(work)
    def worked(*args):
        connect()
        found = None
        if processes.is_first():
            with by_itself():
                found = work(*args)
        return of_first(found)

    return worked


# Dealing out ----------------------------------------------------------------------------------------------------------


def share(items, size=1):
    """What falls to this process, a list: of the items, so many at a time are dealt to one process after the other."""
    mine = []
    for i, item in enumerate(items):
        if i // size % count() == place():
            mine.append(item)
    return mine


def place():
    if count() == 1:
        return 0
    return dist.get_rank()


def in_step(batches):
    """Micro-batches of this process, with empty ones behind them if another process has more: a pass through the model
    is taken by all or by none."""
    longest = largest(len(batches))
    return batches + [[]] * (longest - len(batches))


def divided(work, items, *args):
    """work(items, *args), a list with a result for each of the items, of which every process does a share."""
    if count() == 1:
        return work(items, *args)
    numbered = share(list(enumerate(items)))
    results = work([item for _, item in numbered], *args)
    found = [(i, result) for (i, _), result in zip(numbered, results, strict=True)]
    return [result for _, result in sorted(sum(everybodys(found), []))]


# Telling each other ---------------------------------------------------------------------------------------------------


def everybodys(value):
    """The values of all processes, a list."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def of_first(value):
    """The value of the first process."""
    return everybodys(value)[0]


def largest(number):
    return max(everybodys(number))


def gathered(tensors, device):
    """A list of tensors of equal length, [] for none -> the same with what all processes have, one behind the other, on
    a device."""
    if count() == 1:
        return tensors
    found = [theirs for theirs in everybodys([tensor.cpu() for tensor in tensors]) if theirs]
    return [torch.cat(kind).to(device) for kind in zip(*found)]


def summed(values):
    """A tensor, or numbers by name -> their sum over all processes."""
    if count() == 1:
        return values
    if isinstance(values, torch.Tensor):
        total = values.clone()
        dist.all_reduce(total)
        return total
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))

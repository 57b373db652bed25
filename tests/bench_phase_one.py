"""What phase one of bupo.py costs: old-log-prob and update passes of an internal step against those of a full one.

A full step is blocks and head; a step on block k needs k + 1 of the L blocks and the whole head. Budget: at most 1.15 x
that. Medians of 5 rounds in which all take turns, on a 12-layer model with random weights, on the CPU; a minute.

    python tests/bench_phase_one.py
"""

import statistics
import time

import torch
from bench_memory import qwen3, random_model, random_rollouts

import common

L, LAYERS, MICRO_BATCH_TOKENS = 12, (1, 5), 1024


def seconds(function):
    """Wall time of one call; on a GPU until its last kernel is done."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def alternating_medians(functions, rounds=5):
    """Median seconds of each function. They take turns: whatever else the machine does hits all of them alike."""
    for function in functions:
        function()  # first calls allocate, compile and load
    times = [[seconds(function) for function in functions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times)]


def both_passes(model, batches, logps_of):
    """A step's passes: old log-probs of every micro-batch without gradient, then its update pass."""
    for rows in batches:
        with torch.no_grad():
            logps_of(rows)
    for rows in batches:
        logps_of(rows).sum().backward()
    model.zero_grad()


def phase_one(model, rollouts, micro_batch_tokens, layers, rounds=5):
    """-> (seconds of a full step's passes, seconds of the head's alone, {k: (seconds, budget before the 15%)})."""
    batches = common.micro_batches(rollouts, range(len(rollouts.ids)), micro_batch_tokens)

    def whole(layer=None):
        def logps_of(rows):
            return common.completion_logps(model, rollouts, rows, 1.0, layer)[0]

        return lambda: both_passes(model, batches, logps_of)

    def head():
        def logps_of(rows):
            tokens = int(rollouts.lengths[rows].sum())
            hidden = states[:, :tokens].detach().requires_grad_()
            return common.token_logps(model, hidden, targets[:, :tokens])[0]

        both_passes(model, batches, logps_of)

    most = max(int(rollouts.lengths[rows].sum()) for rows in batches)
    states = torch.randn(1, most, model.config.hidden_size, dtype=model.dtype, device=model.device)
    targets = torch.zeros(1, most, dtype=torch.long, device=model.device)
    full, only_head, *internal = alternating_medians([whole(), head, *map(whole, layers)], rounds)
    share = (full - only_head) / model.config.num_hidden_layers
    return full, only_head, {k: (taken, (k + 1) * share + only_head) for k, taken in zip(layers, internal)}


def main():
    torch.set_num_threads(2)
    model = random_model(qwen3(256, 768, L, 4, 2, V=8192, head_dim=64)).train()
    rollouts = random_rollouts(8192, [24] * 16, range(40, 200, 10))
    print(f"{L} layers, width 256, vocabulary 8192, {int(rollouts.lengths.sum())} completion tokens")
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        full, head, internal = phase_one(model, rollouts, MICRO_BATCH_TOKENS, LAYERS)
        print(f"{'with' if checkpointing else 'without'} gradient checkpointing: full {full:.2f} s, head {head:.2f} s")
        for k, (taken, budget) in internal.items():
            print(
                f"  block {k}: {taken:.2f} s, {taken / full:.2f} of full; of (k+1)/L blocks + head {taken / budget:.2f}"
            )
    print("aim: the last figure at most 1.15")


if __name__ == "__main__":
    main()

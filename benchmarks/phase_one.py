"""What phase one of bupo.py costs: old-log-prob and update passes of an internal step against those of a full one.

A full step is blocks and head; a step on block k needs k + 1 of the L blocks and the whole head. Budget: at most 1.15 x
that. Medians of 5 rounds in which all take turns, on a 12-layer model with random weights, on the CPU; a minute.

    python benchmarks/phase_one.py
"""

import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

import common
from benchmarks.meters import alternating_medians
from benchmarks.models import qwen3, random_model, random_rollouts

L, LAYERS, MICRO_BATCH_TOKENS = 12, (1, 5), 1024


def both_passes(model, batches, logps_of):
    """A step's passes: old log-probs of every micro-batch without gradient, then its update pass."""
    for rows in batches:
        with torch.no_grad():
            logps_of(rows)
    for rows in batches:
        logps_of(rows).sum().backward()
    model.zero_grad()


def passes_of_blocks(model, rollouts, batches, layer=None):
    """A function that runs the passes of block `layer`'s policy; None: of the whole one."""

    def logps_of(rows):
        return common.completion_logps(model, rollouts, rows, 1.0, layer)[0]

    return lambda: both_passes(model, batches, logps_of)


def passes_of_head(model, rollouts, batches):
    """A function that runs the head's part of the passes, on random states."""
    tokens = [int(rollouts.lengths[rows].sum()) for rows in batches]
    states = torch.randn(1, max(tokens), model.config.hidden_size, dtype=model.dtype, device=model.device)
    targets = torch.zeros(1, max(tokens), dtype=torch.long, device=model.device)

    def logps_of(rows):
        n = int(rollouts.lengths[rows].sum())
        hidden = states[:, :n].detach().requires_grad_()
        return common.token_logps(model, hidden, targets[:, :n])[0]

    return lambda: both_passes(model, batches, logps_of)


def phase_one(model, rollouts, micro_batch_tokens, layers, rounds=5):
    """-> (seconds of a full step's passes, seconds of the head's alone, {k: (seconds, budget before the 15%)})."""
    batches = common.micro_batches(rollouts, range(len(rollouts.ids)), micro_batch_tokens)
    functions = [passes_of_blocks(model, rollouts, batches), passes_of_head(model, rollouts, batches)]
    for k in layers:
        functions.append(passes_of_blocks(model, rollouts, batches, k))
    full, head, *internal = alternating_medians(functions, rounds)
    of_one_block = (full - head) / model.config.num_hidden_layers
    figures = {}
    for k, taken in zip(layers, internal):
        figures[k] = (taken, (k + 1) * of_one_block + head)
    return full, head, figures


def main():
    torch.set_num_threads(2)
    model = random_model(qwen3(256, 768, L, 4, 2, V=8192, head_dim=64)).train()
    rollouts = random_rollouts(8192, [24] * 16, range(40, 200, 10))
    print(f"{L} layers, width 256, vocabulary 8192, {int(rollouts.lengths.sum())} completion tokens")
    for name in ("without", "with"):
        if name == "with":
            model.activation_checkpointing_enable({"use_reentrant": False})
        full, head, internal = phase_one(model, rollouts, MICRO_BATCH_TOKENS, LAYERS)
        print(f"{name} gradient checkpointing: full {full:.2f} s, head {head:.2f} s")
        for k, (taken, budget) in internal.items():
            share = f"{taken / full:.2f} of full; of (k+1)/L blocks + head {taken / budget:.2f}"
            print(f"  block {k}: {taken:.2f} s, {share}")
    print("aim: the last figure at most 1.15")


if __name__ == "__main__":
    main()

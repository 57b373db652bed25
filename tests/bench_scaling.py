"""How the cost of a training step grows: with samples, completion length, vocabulary and layers, over 8x in each.

A step is what grpo.py does between grading and logging: sample, log-probs and backward in micro-batches, optimizer. The
models have random weights and no end token, so that every completion has the length asked for. Medians of 5 steps, the
sizes in turns; the slopes are those of log seconds against log size, over the upper half of each range. Six minutes on
a CPU.

    python tests/bench_scaling.py --output runs/scaling.png
"""

import argparse
import math
import statistics
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
from bench_memory import qwen3, random_model
from bench_phase_one import seconds

import common

FACTORS = [8 ** (i / 6) for i in range(7)]
BASE = dict(samples=32, length=32, vocabulary=4096, layers=2)
EXPECTED = {
    "samples": "about 1: rows cost alike; below it where a decode step of few rows costs as much as one of many",
    "length": "between 1 and 2: twice the tokens, and each attends to twice as many, which counts when they are many",
    "vocabulary": "at most 1: head and sampling are linear in it, the blocks do not see it",
    "layers": "at most 1: every block costs the same, the head is paid once",
}
STAGES = ("sampling", "log-probs and backward", "optimizer")


def stages_of(samples, length, vocabulary, layers):
    """The stages of a step of that size, functions to be called in order."""
    model = random_model(qwen3(128, 384, layers, 4, 2, V=vocabulary, head_dim=32))
    model.generation_config.eos_token_id, tokenizer = None, mock.Mock(eos_token_id=None, pad_token_id=0)
    optimizer, rollouts = common.Optimizer(model, common.RunArgs()), None
    prompts = torch.randint(vocabulary, (samples // 8, 16)).tolist()

    def sampling():
        nonlocal rollouts
        rollouts = common.sample(model, tokenizer, prompts, 8, length)

    def backward():
        for rows in common.micro_batches(rollouts, range(samples), 2048):
            common.completion_logps(model, rollouts, rows, 1.0)[0].sum().backward()

    return sampling, backward, optimizer.step


def step_costs(steps, repeats=5):
    """Median seconds of each stage and of their sum, for every step. They take turns: what else the machine does would
    bend the slope if it met some sizes only."""
    rounds = [[[seconds(stage) for stage in stages] for stages in steps] for _ in range(repeats + 1)][1:]
    return [[statistics.median(column) for column in (*zip(*times), map(sum, times))] for times in zip(*rounds)]


def slope(xs, ys):
    """Least-squares slope of log y against log x."""
    return statistics.linear_regression(list(map(math.log, xs)), list(map(math.log, ys))).slope


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/scaling.png", help="the figure")
    args = parser.parse_args()
    torch.set_num_threads(2)
    figure, axes = plt.subplots(1, len(BASE), figsize=(14, 4.6), layout="constrained", sharey=True)
    for axis, (name, base) in zip(axes, BASE.items()):
        multiple = 8 if name == "samples" else 1  # whole groups
        sizes = [multiple * round(base * factor / multiple) for factor in FACTORS]
        costs = step_costs([stages_of(**BASE | {name: size}) for size in sizes])
        upper, slopes = slice(len(sizes) // 2, None), []
        for label, column in zip((*STAGES, "step"), zip(*costs)):
            slopes.append(slope(sizes[upper], column[upper]))
            style = "ko-" if label == "step" else ".--"
            axis.loglog(sizes, column, style, label=f"{label}, slope {slopes[-1]:.2f}")
        axis.set(xlabel=name, title=f"seconds per step against {name}")
        axis.set_xticks(sizes[::3], sizes[::3])
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below: the lines fill the panel
        stages = ", ".join(f"{stage} {value:.2f}" for stage, value in zip(STAGES, slopes))
        print(f"{name} {sizes[0]} to {sizes[-1]}: {costs[0][-1]:.2f} to {costs[-1][-1]:.2f} s", flush=True)
        print(f"  slope {slopes[-1]:.2f} ({stages}); expected {EXPECTED[name]}", flush=True)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=100)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    main()

"""How the cost of a training step grows: with samples, completion length, vocabulary and layers, over 8x in each.

A step is what grpo.py does between grading and logging: sample, log-probs and backward in micro-batches, optimizer. The
models have random weights and no end token, so that every completion has the length asked for. Medians of 5 steps, the
sizes in turns; the slopes are those of log seconds against log size, over the upper half of each range. Six minutes on
a CPU.

    python benchmarks/scaling.py --output runs/scaling.png
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

import common
from benchmarks.meters import seconds
from benchmarks.models import blank_tokenizer, qwen3, random_model
from plumbing.optimizer import Optimizer
from plumbing.options import RunArgs

FACTORS = [8 ** (i / 6) for i in range(7)]
BASE = dict(samples=32, length=32, vocabulary=4096, layers=2)
EXPECTED = {
    "samples": "about 1: rows cost alike; below it where a decode step of few rows costs as much as one of many",
    "length": "between 1 and 2: twice the tokens, and each attends to twice as many, which counts when they are many",
    "vocabulary": "at most 1: head and sampling are linear in it, the blocks do not see it",
    "layers": "at most 1: every block costs the same, the head is paid once",
}
STAGES = ("sampling", "log-probs and backward", "optimizer")
REPEATS = 5


def stages_of(samples, length, vocabulary, layers):
    """The stages of a step of that size, functions to be called in order."""
    model = random_model(qwen3(128, 384, layers, 4, 2, V=vocabulary, head_dim=32))
    model.generation_config.eos_token_id = None
    optimizer = Optimizer(model, RunArgs())
    prompts = torch.randint(vocabulary, (samples // 8, 16)).tolist()
    tokenizer = blank_tokenizer()
    rollouts = None

    def sampling():
        nonlocal rollouts
        rollouts = common.sample(model, tokenizer, prompts, 8, length)

    def backward():
        for rows in common.micro_batches(rollouts, range(samples), 2048):
            logps = common.completion_logps(model, rollouts, rows, 1.0)[0]  # entropies would hold their graph
            logps.sum().backward()

    return sampling, backward, optimizer.step


def step_costs(steps):
    """Median seconds of each stage and of their sum, for every step -> a list for each step.

    They take turns: what else the machine does would bend the slope if it met some sizes only. The first round, which
    warms up, does not count.
    """
    rounds = []
    for _ in range(REPEATS + 1):
        rounds.append([[seconds(stage) for stage in stages] for stages in steps])
    costs = []
    for times in zip(*rounds[1:]):  # of one step: a list of its stages for each round
        medians = [statistics.median(column) for column in zip(*times)]
        medians.append(statistics.median(map(sum, times)))
        costs.append(medians)
    return costs


def slope(xs, ys):
    """Least-squares slope of log y against log x, over the upper half of the range."""
    upper = len(xs) // 2
    log_x = [math.log(x) for x in xs[upper:]]
    log_y = [math.log(y) for y in ys[upper:]]
    return statistics.linear_regression(log_x, log_y).slope


def sizes_of(name, base):
    """Seven sizes from `base` to eight times that; of samples, whole groups."""
    multiple = 8 if name == "samples" else 1
    return [multiple * round(base * factor / multiple) for factor in FACTORS]


def draw(axis, name, sizes, columns):
    """One panel: seconds of every stage, and of the step, against size."""
    for label, column in columns.items():
        style = "ko-" if label == "step" else ".--"
        axis.loglog(sizes, column, style, label=f"{label}, slope {slope(sizes, column):.2f}")
    axis.set(xlabel=name, title=f"seconds per step against {name}")
    axis.set_xticks(sizes[::3], sizes[::3])
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below: the lines fill the panel


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/scaling.png", help="the figure")
    args = parser.parse_args()
    torch.set_num_threads(2)
    figure, axes = plt.subplots(1, len(BASE), figsize=(14, 4.6), layout="constrained", sharey=True)
    for axis, (name, base) in zip(axes, BASE.items()):
        sizes = sizes_of(name, base)
        costs = step_costs([stages_of(**BASE | {name: size}) for size in sizes])
        columns = dict(zip((*STAGES, "step"), zip(*costs)))
        draw(axis, name, sizes, columns)
        step = columns["step"]
        stages = ", ".join(f"{stage} {slope(sizes, columns[stage]):.2f}" for stage in STAGES)
        print(f"{name} {sizes[0]} to {sizes[-1]}: {step[0]:.2f} to {step[-1]:.2f} s", flush=True)
        print(f"  slope {slope(sizes, step):.2f} ({stages}); expected {EXPECTED[name]}", flush=True)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=100)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    main()

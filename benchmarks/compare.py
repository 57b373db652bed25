"""Do two ways to train differ? Paired differences of their runs over the same seeds, with 95% intervals.

A way to train is a path without its seed: runs/grpo stands for the folders runs/grpo-0, runs/grpo-1 and so on. The
first way is the one that the others are compared with. Each number comes from the evaluations that a run made while it
trained, and stands beside half of the 95% t interval over seeds.

Runs of one seed share the start, the order of the problems and much of their luck, so the interval is that of the mean
of their differences, seed by seed. Two ways differ if it leaves 0 out. Of twenty comparisons of equal things one does
so by chance; so the last line says how many were made.

    python benchmarks/compare.py runs/grpo runs/bupo runs/opo --steps 20 40 60
    python benchmarks/compare.py runs/grpo runs/opo --metrics eval_entropy kl_to_start --at_accuracy 0.8
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

from plumbing.errors import UserError, one_line_errors
from plumbing.files import read_log
from plumbing.runs import is_number, labels_of
from plumbing.statistics import mean_interval
from plumbing.tables import markdown_table

ACCURACY = "eval_accuracy"


def runs_of(way):
    """'runs/grpo' -> {seed: evaluations of runs/grpo-<seed>}, evaluations in order. Raises UserError if there is none.

    An evaluation is a record of metrics.jsonl with the sampled accuracy on held-out problems. What is no number in it
    (null, where an entropy was not finite) is left out.
    """
    path = Path(way)
    runs = {}
    for folder in path.parent.glob(f"{path.name}-*"):
        seed = folder.name.removeprefix(f"{path.name}-")
        if not re.fullmatch("[0-9]+", seed):
            continue
        evaluations = []
        for record in read_log(folder / "metrics.jsonl"):
            numbers = {name: value for name, value in record.items() if is_number(value)}
            if ACCURACY in numbers:
                evaluations.append(numbers)
        if evaluations:
            runs[int(seed)] = evaluations
    if not runs:
        raise UserError(f"{way}: no evaluated run {way}-0, {way}-1, ...; train one with --output_dir {way}-0")
    return runs


def at_step(records, metric, step):
    """The value of a metric in the evaluation after a step, or in the last one for None; None without one."""
    if step is None:
        return records[-1].get(metric)
    for record in records:
        if record["step"] == step:
            return record.get(metric)
    return None


def at_accuracy(records, metric, accuracy):
    """The value of a metric where the sampled accuracy first comes up to a given one, on the straight line between two
    evaluations; None for a run that never does. 'step' is a metric, too."""
    for before, after in zip(records, records[1:]):
        if before[ACCURACY] < accuracy <= after[ACCURACY] and metric in before and metric in after:
            share = (accuracy - before[ACCURACY]) / (after[ACCURACY] - before[ACCURACY])
            return before[metric] + share * (after[metric] - before[metric])
    return None


def differences(values, base):
    """Two {seed: value} -> their differences, a list over the seeds that both have."""
    return [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]


def cell(values, sign=""):
    """'0.793 ± 0.020 (5)': mean, half of the 95% t interval over seeds, number of seeds. A lone run has no interval."""
    values = list(values)
    if not values:
        return "-"
    mean, interval = mean_interval(values)
    number = f"{mean:{sign}.3f}"
    if len(values) > 1:
        number += f" ± {interval[1] - mean:.3f}"
    return f"{number} ({len(values)})"


def differs(values):
    """Whether the 95% interval of the mean leaves 0 out. One run tells nothing."""
    if len(values) < 2:
        return False
    _, (low, high) = mean_interval(values)
    return low > 0 or high < 0


@dataclass
class Compared:
    """How many paired differences were looked at, and how many of them leave 0 out."""

    made: int = 0
    differing: int = 0

    def count(self, paired):
        """Add one comparison. Of fewer than two seeds there is no interval, and so no comparison."""
        if len(paired) > 1:
            self.made += 1
        if differs(paired):
            self.differing += 1


def print_tables(metric, columns, found, compared):
    """Print a table of a metric's means, and one of paired differences from the first way, which `compared` counts.

    columns: their headings. found: {way: a {seed: value} for every column}.
    """
    means = [[metric, *columns]]
    for way, values in found.items():
        means.append([way, *(cell(column.values()) for column in values)])
    print(markdown_table(means))
    first, *others = found
    if not others:
        return
    rows = [[f"{metric}, minus {first}", *columns]]
    for way in others:
        row = [way]
        for column, base in zip(found[way], found[first]):
            paired = differences(column, base)
            compared.count(paired)
            mark = ""
            if differs(paired):
                mark = " *"
            row.append(cell(paired, sign="+") + mark)
        rows.append(row)
    print(markdown_table(rows))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("ways", nargs="+", help="paths of runs without -<seed>; the first is what the others are compared with")
    add("--steps", nargs="+", type=int, default=[], help="steps with an evaluation (default: the last one of each run)")
    add("--metrics", nargs="+", default=[ACCURACY], help="names in the evaluations of metrics.jsonl")
    add("--at_accuracy", type=float, help="compare where the sampled accuracy first comes up to this, not at steps")
    args = parser.parse_args(argv)
    if args.at_accuracy is not None and args.steps:
        parser.error("--at_accuracy: compares where an accuracy is reached; drop --steps")
    return args


def check_metrics(metrics, runs):
    """Raises UserError for a metric that no evaluation has."""
    logged = set()
    for records in runs.values():
        for record in records:
            logged.update(record)
    for metric in metrics:
        if metric not in logged:
            raise UserError(f"--metrics {metric}: no evaluation has it; there are {', '.join(sorted(logged))}")


def columns_of(seeds, metric, args):
    """The columns of one way: for every step, or for the one accuracy, {seed: value} of the seeds that have one."""
    columns = []
    steps = args.steps or [None]  # without: the one column of the last evaluations, or of the accuracy
    for step in steps:
        column = {}
        for seed, records in seeds.items():
            if args.at_accuracy is None:
                value = at_step(records, metric, step)
            else:
                value = at_accuracy(records, metric, args.at_accuracy)
            if value is not None:
                column[seed] = value
        columns.append(column)
    return columns


def main(args):
    runs = {}
    for way, label in zip(args.ways, labels_of(args.ways)):
        runs[label] = runs_of(way)
    check_metrics(args.metrics, next(iter(runs.values())))
    headings = [f"step {step}" for step in args.steps]
    if args.at_accuracy is not None:
        headings = [f"at accuracy {args.at_accuracy}"]
    elif not args.steps:
        headings = ["in the end"]
    compared = Compared()
    for metric in args.metrics:
        found = {}
        for label, seeds in runs.items():
            found[label] = columns_of(seeds, metric, args)
        print_tables(metric, headings, found, compared)
    if compared.made:
        told = f"{compared.made} comparisons, {compared.differing} of which leave 0 out (*)"
        print(f"{told}; of comparisons between equals 1 in 20 does")


if __name__ == "__main__":
    with one_line_errors():
        main(parse())

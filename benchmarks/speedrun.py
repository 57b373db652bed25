"""Time until the embedded model's sampled accuracy on held-out problems stays above 0.85, for any script and options.

"Stays": in two evaluations in a row, --every steps apart. What counts is the time up to the first of the two, without
any evaluation. The run ends at the second one. For every seed, grpo.py with its defaults runs first, and then each
command; the ratios are to that run.

Wall time depends on what else the machine does. So beside it stand processor seconds of this one process (the
verifier's processes, which take little, are left out), and samples and tokens, which depend on no machine. All that is
sampled counts, also what a script throws away again.

    python benchmarks/speedrun.py "grpo.py --learning_rate 4e-4"
    python benchmarks/speedrun.py "opo.py" "variants/dapo.py" --seeds 0 1 2 3 4
"""

import argparse
import contextlib
import importlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

GOAL = 0.85
BASE = "grpo.py"


class Reached(Exception):
    """The accuracy stays above the goal: nothing more to wait for."""


def first_to_stay(evaluations):
    """The first step of two evaluations in a row with an accuracy above the goal; None if there is none.

    evaluations: (step, accuracy), in order.
    """
    for (step, accuracy), (_, after) in zip(evaluations, evaluations[1:]):
        if accuracy > GOAL and after > GOAL:
            return step
    return None


class Watch:
    """Clocks of a run's steps, and its evaluations. The run is left alone, apart from its end."""

    def __init__(self):
        self.steps = {}  # step -> (seconds, processor seconds, samples, tokens), without what evaluations take
        self.evaluations = []  # (step, sampled accuracy)
        self.samples = 0  # of this step
        self.tokens = 0

    def patch(self, Run, common):
        """Patches of bookkeeping.Run and of common.sample, to be entered."""
        real_steps, real_log, real_write = Run.steps, Run.log, Run.write_record
        real_sample = common.sample

        def steps(run):
            for given in real_steps(run):
                self.samples = 0
                self.tokens = 0
                self.wall = time.perf_counter()
                self.processor = time.process_time()
                yield given

        def sample(*arguments, **options):
            rollouts = real_sample(*arguments, **options)
            self.samples += len(rollouts.texts)  # an evaluation's, behind the step, are forgotten by the next one
            self.tokens += int(rollouts.lengths.sum())
            return rollouts

        def log(run, step, metrics):
            seconds = time.perf_counter() - self.wall
            processor = time.process_time() - self.processor
            self.steps[step] = (seconds, processor, self.samples, self.tokens)
            real_log(run, step, metrics)

        def write_record(run, record):
            real_write(run, record)
            if "eval_accuracy" in record:
                self.evaluations.append((record["step"], record["eval_accuracy"]))
                if first_to_stay(self.evaluations) is not None:
                    raise Reached

        stack = contextlib.ExitStack()
        for name, function in dict(steps=steps, log=log, write_record=write_record).items():
            stack.enter_context(mock.patch.object(Run, name, function))
        stack.enter_context(mock.patch.object(common, "sample", sample))
        return stack

    def result(self):
        """What it took, as a dict; steps None where the accuracy never stayed above the goal: then all of the run."""
        reached = first_to_stay(self.evaluations)
        counted = [figures for step, figures in self.steps.items() if reached is None or step <= reached]
        seconds, processor, samples, tokens = (sum(column) for column in zip(*counted))
        return dict(steps=reached, seconds=seconds, processor=processor, samples=samples, tokens=tokens)


def worker(command, seed, every, folder):
    """Run a command in this process and print what it took, as JSON."""
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository
    import bookkeeping
    import common
    from plumbing.options import parse

    script, *options = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    fixed = f"--seed {seed} --eval_steps {every} --save_steps 0 --output_dir {folder}".split()
    sys.argv = [script, *fixed, *options]
    args = parse(module.Args, module.EMBEDDED)
    watch = Watch()
    with watch.patch(bookkeeping.Run, common), contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Reached):
        module.main(args)
    print(json.dumps(watch.result() | dict(evaluations=watch.evaluations)), flush=True)


def run(command, seed, every):
    """What a command took, in a process of its own, see Watch.result."""
    with tempfile.TemporaryDirectory() as folder:
        told = json.dumps([command, seed, every, f"{folder}/run"])
        done = subprocess.run([sys.executable, __file__, "--worker", told], stdout=-1, stderr=-1, text=True)
    if done.returncode:
        sys.exit(f"error: {command}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(command, seed, found, base):
    """A line of the table: steps, samples, tokens, processor seconds and seconds, the last two over grpo.py's."""
    steps = "never" if found["steps"] is None else found["steps"]
    cells = [f"`{command}`", seed, steps, found["samples"], found["tokens"]]
    for clock in ("processor", "seconds"):
        cells.append(f"{found[clock]:.0f} ({found[clock] / base[clock]:.2f})")
    return "| " + " | ".join(map(str, cells)) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", help="scripts with options, each in quotes; grpo.py always runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*json.loads(args.worker))
        return
    print("| command | seed | steps | samples | tokens | processor seconds (ratio) | seconds (ratio) |")
    print("|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        base = None
        for command in [BASE, *args.commands]:
            found = run(command, seed, args.every)
            base = base or found
            print(row(command, seed, found, base), flush=True)
            print(f"{command}: {found['evaluations']}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

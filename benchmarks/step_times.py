"""Seconds of a training step of any script, as multiples of grpo.py's: on the embedded model, taking turns.

In every round each command runs once, with the round as its seed, so that a machine that slows down slows all of them.
A run counts with the median of its steps. The first two are left out, because they allocate; evaluations are left out,
because they are no steps. Each ratio is to grpo.py's run of the same round.

What is a step is what the script calls one. By default these are the first dozen: bupo.py's are all of phase one, and
variants/dapo.py hardly samples again yet, which it does the more the more prompts are solved.

    python benchmarks/step_times.py opo.py bupo.py ppo.py variants/gspo.py variants/cispo.py variants/dapo.py
    python benchmarks/step_times.py "grpo.py --num_minibatches 1" --rounds 5
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # imports start at the root of the repository

from plumbing.files import read_log
from plumbing.tables import markdown_table

BASE = "grpo.py"
WARM_UP = 2  # steps that do not count


def median_seconds(records):
    """The median of the seconds of a run's steps; records: of its metrics.jsonl, in order."""
    seconds = [record["seconds"] for record in records if "seconds" in record]
    return statistics.median(seconds[WARM_UP:])


def seconds_of(command, seed, steps):
    """Run a command for so many steps in a process of its own -> the median seconds of its steps."""
    script, *options = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        fixed = f"--seed {seed} --max_steps {steps} --eval_steps 0 --save_steps 0".split()
        fixed += ["--output_dir", f"{folder}/run"]
        done = subprocess.run([sys.executable, ROOT / script, *fixed, *options], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip() or f"exit status {done.returncode}"
            sys.exit(f"error: {command}: {reason.splitlines()[-1]}")
        return median_seconds(read_log(Path(folder) / "run" / "metrics.jsonl"))


def table(rounds):
    """The table, a text. rounds: a list of {command: seconds}, each with grpo.py's."""
    rows = [["command", "seconds", "ratio to grpo.py, median", "lowest, highest"]]
    for command in rounds[0]:
        seconds = [found[command] for found in rounds]
        ratios = [found[command] / found[BASE] for found in rounds]
        spread = f"{min(ratios):.2f}, {max(ratios):.2f}"
        rows.append([f"`{command}`", f"{statistics.median(seconds):.2f}", f"{statistics.median(ratios):.2f}", spread])
    return markdown_table(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="+", help="scripts with options, each in quotes; grpo.py always runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of every run")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        sys.exit(f"error: --steps {args.steps}: must be more than the {WARM_UP} that do not count")
    if args.rounds < 1:
        sys.exit(f"error: --rounds {args.rounds}: must be 1 or more")
    commands = list(dict.fromkeys([BASE, *args.commands]))
    rounds = []
    for seed in range(args.rounds):
        found = {}
        for command in commands:
            found[command] = seconds_of(command, seed, args.steps)
            print(f"round {seed}: {command}: {found[command]:.2f} s a step", file=sys.stderr, flush=True)
        rounds.append(found)
    print(table(rounds))


if __name__ == "__main__":
    main()

"""How many threads a small model is worth, and what waiting costs: alone, and beside as many busy processes as cores.

Four ways to run one step of imitation and one of sampling at the embedded model's size take turns, each in a process
of its own, since OpenMP reads its settings once:

    one thread      what the scripts take for a small model
    two, patient    two, and one that waits asks ten thousand times whether there is work (GOMP_SPINCOUNT), then sleeps
    all, asleep     a thread for every core; those that wait sleep (OMP_WAIT_POLICY=PASSIVE), what the scripts take for
                    larger models
    all, spinning   the same as torch comes: those that wait ask on and on

    python benchmarks/threads.py                     # minutes, most of them for the spinning threads
    python benchmarks/threads.py --steps 3 --rounds 1
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time

WAYS = {
    "one thread": dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"),
    "two, patient": dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000"),
    "all, asleep": dict(OMP_NUM_THREADS=str(os.cpu_count()), OMP_WAIT_POLICY="PASSIVE"),
    "all, spinning": dict(OMP_NUM_THREADS=str(os.cpu_count())),
}
BUSY = "while True: pass"  # what a busy process does


def worker(steps):
    """Print the seconds of every step, of imitation and of sampling, as JSON."""
    sys.path[0] = os.path.dirname(sys.path[0])  # imports start at the root of the repository
    import common
    from benchmarks.models import EMBEDDED, blank_tokenizer, random_model, random_rollouts

    model = random_model(EMBEDDED)
    lengths = [random.Random(row).choice([8, 40]) for row in range(32)]  # a guess, and steps
    batch = random_rollouts(EMBEDDED.vocab_size, [13] * 32, lengths)
    prompts = [list(range(1, 14))] * 32

    def imitate():
        logps, _ = common.completion_logps(model, batch, list(range(32)), 1.0)
        (-(logps * batch.mask).sum()).backward()
        model.zero_grad()

    def sample():
        common.sample(model, blank_tokenizer(), prompts, 4, max_completion_length=16)

    def seconds_of(work):
        before = time.perf_counter()
        work()
        return time.perf_counter() - before

    imitate()  # the first of each allocates
    sample()
    print(json.dumps([[seconds_of(imitate), seconds_of(sample)] for _ in range(steps)]))


def measure(way, steps):
    """(seconds of imitation, seconds of sampling) of every step, in a process with this way's settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, __file__, "--worker", str(steps)]
    done = subprocess.run(command, env=environment | WAYS[way], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {done.stderr.strip().splitlines()[-1:]}")
    return [tuple(pair) for pair in json.loads(done.stdout)]


def medians(rounds, steps, busy):
    """way -> median seconds of a step of imitation and of one of sampling, while `busy` processes spin all the time."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    times = {way: [] for way in WAYS}
    try:
        for _ in range(rounds):
            for way in WAYS:
                pairs = measure(way, steps)
                print(f"  {busy} busy, {way}: {', '.join(f'{i:.2f}+{s:.2f}' for i, s in pairs)} s", flush=True)
                times[way] += pairs
    finally:
        for other in others:
            other.kill()
            other.wait()
    found = {}
    for way, pairs in times.items():
        imitation, sampling = zip(*pairs)
        found[way] = statistics.median(imitation), statistics.median(sampling)
    return found


def report(alone, beside):
    """Lines of a table for each kind of step: seconds alone, beside busy processes, and how much slower that is."""
    lines = []
    for kind, name in enumerate(("imitation", "sampling")):
        lines.append(f"{name:15}{'alone':>8}{'beside':>9}{'slower':>9}")
        for way in WAYS:
            slower = beside[way][kind] / alone[way][kind]
            lines.append(f"{way:15}{alone[way][kind]:8.2f}{beside[way][kind]:9.2f}{slower:9.2f}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    cores = os.cpu_count()
    load = os.getloadavg()[0]
    print(f"seconds of a step, {cores} cores, load {load:.1f} before; alone, then beside {cores} busy ones")
    alone = medians(args.rounds, args.steps, 0)
    beside = medians(args.rounds, args.steps, cores)
    print("\n".join(report(alone, beside)))


if __name__ == "__main__":
    main()

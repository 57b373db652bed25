"""Answers per second: the pool of grading processes against math-verify called one answer after the other, in process.

Distinct answers of the kinds that models give (integers, fractions, roots, expressions, tuples), none of which the
shortcut for equal texts and plain integers settles. The pool must not be slower, although every question crosses two
pipes; its workers are started before the clock.

    python tests/bench_grader.py
"""

import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

ANSWERS, ROUNDS = 400, 3


def answers(seed):
    """Distinct (gold, answer) pairs, half of them equal in value and none in text."""
    generator, pairs = random.Random(seed), []
    for i in range(ANSWERS):
        a, b = generator.randint(2, 10**6), generator.randint(2, 99)
        kind, shift = i % 5, generator.choice([0, 0, 1])
        pairs.append(
            (
                (f"{a}", f"{a + shift}.0"),
                (f"\\frac{{{a}}}{{{b}}}", f"{a + shift}/{b}"),
                (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{b}}} \\cdot {a + shift}"),
                (f"{a}x^2 - {b}", f"-{b} + {a + shift} x^2"),
                (f"({a}, {b})", f"({a + shift}, {b}.0)"),
            )[kind]
        )
    return pairs


def serial(pairs):
    return [common.equal_answers(*pair) for pair in pairs]


def main():
    common.verifier([(str(i), f"{2 * i}/2") for i in range(20)])  # starts the workers
    ratios = []
    for seed in range(ROUNDS):
        pairs, rates = answers(seed), {}
        common.parsed_answer.cache_clear()
        for name, compare in (
            ("one after the other", serial),
            (f"{common.verifier.workers} processes", common.verifier),
        ):
            start = time.perf_counter()
            verdicts = compare(pairs)
            rates[name] = len(pairs) / (time.perf_counter() - start)
            assert seed or name == "one after the other" or verdicts == serial(pairs)
        ratios.append(rates[f"{common.verifier.workers} processes"] / rates["one after the other"])
        print(", ".join(f"{name}: {rate:.0f} answers/s" for name, rate in rates.items()), f"ratio {ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f} (at least 1 wanted)")


if __name__ == "__main__":
    main()

"""Answers per second: the pool of grading processes against math-verify called one answer after the other, in process.

Distinct answers of the kinds that models give (integers, fractions, roots, expressions, tuples), none of which the
shortcut for equal texts and plain integers settles. The pool must not be slower, although every question crosses two
pipes; its workers are started before the clock.

    python benchmarks/grader.py
"""

import random
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

from plumbing import verifier

ANSWERS, ROUNDS = 400, 3


def answers(seed):
    """Distinct (gold, answer) pairs, half of them equal in value and none in text."""
    generator = random.Random(seed)
    pairs = []
    for i in range(ANSWERS):
        a = generator.randint(2, 10**6)
        b = generator.randint(2, 99)
        other = a + generator.choice([0, 0, 1])
        kinds = [
            (f"{a}", f"{other}.0"),
            (f"\\frac{{{a}}}{{{b}}}", f"{other}/{b}"),
            (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{b}}} \\cdot {other}"),
            (f"{a}x^2 - {b}", f"-{b} + {other} x^2"),
            (f"({a}, {b})", f"({other}, {b}.0)"),
        ]
        pairs.append(kinds[i % len(kinds)])
    return pairs


def serial(pairs):
    return [verifier.equal_answers(*pair) for pair in pairs]


def timed(compare, pairs):
    """(verdicts, answers per second)."""
    start = time.perf_counter()
    verdicts = compare(pairs)
    return verdicts, len(pairs) / (time.perf_counter() - start)


def main():
    verifier.compare([(str(i), f"{2 * i}/2") for i in range(20)])  # starts the workers
    ratios = []
    for seed in range(ROUNDS):
        pairs = answers(seed)
        verifier.parsed_answer.cache_clear()
        expected, one_by_one = timed(serial, pairs)
        verdicts, pooled = timed(verifier.compare, pairs)
        assert verdicts == expected
        ratios.append(pooled / one_by_one)
        pool = f"{verifier.SHARED.workers} processes: {pooled:.0f} answers/s"
        print(f"one after the other: {one_by_one:.0f} answers/s, {pool} ratio {ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f} (at least 1 wanted)")


if __name__ == "__main__":
    main()

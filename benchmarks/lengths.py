"""When does the length-weighted baseline win? Worlds of two kinds of answers, whose gradients are known by hand.

Half of the answers are short, half are long, --ratios times as long. A token is one choice of two with a parameter of
its own, so that the gradients of tokens are orthogonal: where the chances are s and 1 - s, its squared gradient is
s (1 - s) on average, and |g|^2 of an answer is that times its length. The worlds differ in how sure the tokens are:

    equally sure      |g|^2 grows with the length: the assumption of opo.py
    long ones surer   |g|^2 is the same for both kinds: what the plain mean assumes
    short ones guess  |g|^2 falls with the length: a guess is an unsure token, work is many sure ones

For each, the variance of one answer's policy gradient over that under the plain mean: with the length-weighted mean,
and with the optimum, which weights by |g|^2. The equations are those of analyze_gradients.py.

    python benchmarks/lengths.py                                       # a second
    python benchmarks/lengths.py --right 0.7 0.3 --ratios 1 2 4 8      # short answers are right more often
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # imports start at the root of the repository

import torch

from analyze_gradients import gradient_variance
from plumbing.tables import markdown_table

SHORT = 10  # tokens of a short answer
OF_A_KIND = 100  # answers of each kind; --right of them are right
EVEN = 0.25  # squared gradient of a token whose chances are 1/2 and 1/2

# Squared gradient of a long answer over that of a short one, for long answers that are `ratio` times as long.
WORLDS = {
    "equally sure": lambda ratio: ratio,
    "long ones surer": lambda ratio: 1,
    "short ones guess": lambda ratio: 1 / ratio,
}


def world(ratio, growth, right):
    """(squares, rewards, lengths), [1, n] each: |g|^2, reward and length of every answer, short ones first.

    ratio: how many times as long the long answers are. growth: |g|^2 of a long one over that of a short one. right:
    the chances of a short and of a long answer to be right.
    """
    lengths = []
    squares = []
    rewards = []
    for chance, length, square in zip(right, (SHORT, SHORT * ratio), (SHORT * EVEN, SHORT * EVEN * growth)):
        hits = round(chance * OF_A_KIND)
        lengths += [length] * OF_A_KIND
        squares += [square] * OF_A_KIND
        rewards += [1.0] * hits + [0.0] * (OF_A_KIND - hits)
    columns = [torch.tensor([column], dtype=torch.float64) for column in (squares, rewards, lengths)]
    return tuple(columns)


def mean_square(right):
    """|grad J|^2, [1]: what the rewards say is which kind to choose, and that choice is one even token."""
    short, long = right
    return torch.tensor([(EVEN * (long - short)) ** 2], dtype=torch.float64)


def relative_variances(ratio, growth, right):
    """Variance under the length-weighted mean and under the optimum, both over that under the plain mean."""
    squares, rewards, lengths = world(ratio, growth, right)
    found = gradient_variance(squares, squares, rewards, lengths, mean_square(right))
    return found["length-weighted"] / found["mean"], found["norm-weighted"] / found["mean"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", nargs="+", type=float, default=[1, 2, 4], help="length of long answers over short")
    parser.add_argument("--right", nargs=2, type=float, default=[0.3, 0.7], help="chances of a short, of a long answer")
    args = parser.parse_args()
    if not 1 <= min(args.ratios) <= max(args.ratios) <= SHORT:
        parser.error(f"--ratios: from 1 to {SHORT}; beyond, a surer long answer has less gradient than its first token")
    rows = [["tokens", *(f"{ratio:g}x as long" for ratio in args.ratios)]]
    for name, growth in WORLDS.items():
        cells = []
        for ratio in args.ratios:
            weighted, optimum = relative_variances(ratio, growth(ratio), args.right)
            cells.append(f"{weighted:.3f} (optimum {optimum:.3f})")
        rows.append([name, *cells])
    print(markdown_table(rows))


if __name__ == "__main__":
    main()

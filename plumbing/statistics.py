"""Small statistics of lists of numbers: intervals of a mean, and quartiles."""

import math

import torch

RESAMPLES = 2000  # of the bootstrap

# Two-sided 95% quantiles of Student's t for the mean of n values; beyond, that of the normal distribution.
T_QUANTILES = {
    **{2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 11: 2.228},
    **{12: 2.201, 13: 2.179, 14: 2.160, 15: 2.145, 16: 2.131, 17: 2.120, 18: 2.110, 19: 2.101, 20: 2.093, 21: 2.086},
    **{22: 2.080, 23: 2.074, 24: 2.069, 25: 2.064, 26: 2.060, 27: 2.056, 28: 2.052, 29: 2.048, 30: 2.045},
}
NORMAL_QUANTILE = 1.96


def bootstrap(groups, seed=0):
    """95% percentile interval [low, high] of the mean over data sets of the mean over problems.

    groups: a list of per-problem values for each data set. Each list is drawn anew with replacement RESAMPLES times; a
    seed draws the same problems for every metric and model.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(RESAMPLES, dtype=torch.float64)
    for group in groups:
        values = torch.tensor(group, dtype=torch.float64)
        drawn = torch.randint(len(group), (RESAMPLES, len(group)), generator=generator)
        means += values[drawn].mean(1) / len(groups)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return torch.quantile(means, ends).tolist()


def mean_interval(values):
    """(mean, [low, high]) of a few runs' values: the 95% t interval; [mean, mean] for a single run."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, [mean, mean]
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    half = T_QUANTILES.get(n, NORMAL_QUANTILE) * math.sqrt(variance / n)
    return mean, [mean - half, mean + half]


def quartiles(values):
    """[lower quartile, median, upper quartile] of numbers."""
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()

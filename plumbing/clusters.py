"""Means of tokens that come in answers, and how far they can be trusted."""


def clustered_mean(sums, counts):
    """Mean over tokens that come in clusters, the answers, and its standard error.

    sums [..., A]: of a quantity over each answer's tokens; counts [A]: how many tokens these are. With s_i and n_i of
    answer i, n = sum_i n_i, and A the number of answers that have a token:

        mean = sum_i s_i / n,    error = sqrt(A / (A - 1) * sum_i (s_i - mean n_i)^2) / n

    Tokens of one answer are not independent, answers are: as if all tokens were, the error would be too small. ->
    (mean [...], error [...]); the error is None for a single answer.
    """
    n = counts.sum()
    answers = (counts > 0).sum()
    mean = sums.sum(-1) / n
    if answers < 2:
        return mean, None
    residuals = sums - mean[..., None] * counts
    variance = residuals.square().sum(-1) * answers / (answers - 1)
    return mean, variance.sqrt() / n

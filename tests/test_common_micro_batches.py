"""Micro-batches: every row once, within the budget, with little padding."""

import pytest
import torch

import common


def rollouts_of(lengths):
    """Rollouts of these lengths; which tokens they hold does not matter."""
    columns = torch.arange(int(lengths.max()))
    attention_mask = (columns < lengths[:, None]).long()
    ids = torch.zeros_like(attention_mask)
    return common.Rollouts(ids, attention_mask, attention_mask.float(), lengths)


def padded_tokens(rows, lengths):
    return len(rows) * int(lengths[rows].max())


@pytest.mark.parametrize("budget", [1, 40, 64, 10**6])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    """A row lost or doubled changes the gradient; a budget that ignores padding overflows the memory."""
    lengths = torch.tensor([5, 30, 7, 12, 30, 3, 18, 9])
    live = [7, 0, 1, 3, 4, 6]
    batches = common.micro_batches(rollouts_of(lengths), live, budget)
    assert sorted(row for rows in batches for row in rows) == sorted(live)
    for rows in batches:
        assert len(rows) == 1 or padded_tokens(rows, lengths) <= budget
    assert common.micro_batches(rollouts_of(lengths), [], budget) == []


def test_micro_batches_use_their_budget():
    """A batch that is closed too early is a forward pass of few rows, at nearly the price of many."""
    lengths = torch.tensor([10] * 8)
    batches = common.micro_batches(rollouts_of(lengths), range(8), 40)
    assert [len(rows) for rows in batches] == [4, 4]


def test_micro_batches_put_like_lengths_together():
    """In random order most of a batch is padding: the same gradient, paid for twice."""
    lengths = torch.tensor([4, 40] * 8)
    batches = common.micro_batches(rollouts_of(lengths), range(16), 160)
    padded = sum(padded_tokens(rows, lengths) for rows in batches)
    assert padded <= 1.25 * int(lengths.sum())

"""Batches of answers: rows of one put into another, and a mean over tokens."""

import dataclasses

import torch.nn.functional as F

COLUMNS = ("ids", "attention_mask", "mask", "logps", "entropy")  # of Rollouts: one for every token, the others by row


def replace_rows(rollouts, rows, others):
    """Rollouts like these, with the answers of `others` in some rows (a list of indices, in the order of `others`).

    Both are padded to the width of the wider one, with 0: what is padding is told by the masks, never by its token.
    """
    width = max(rollouts.ids.shape[1], others.ids.shape[1])
    replaced = {}
    for name in COLUMNS:
        old = getattr(rollouts, name)
        new = getattr(others, name)
        replaced[name] = F.pad(old, (0, width - old.shape[1]))
        replaced[name][rows] = F.pad(new, (0, width - new.shape[1]))
    for name in ("lengths", "finished"):
        replaced[name] = getattr(rollouts, name).clone()
        replaced[name][rows] = getattr(others, name)
    replaced["texts"] = list(rollouts.texts)
    for row, text in zip(rows, others.texts, strict=True):
        replaced["texts"][row] = text
    return dataclasses.replace(rollouts, **replaced)


def masked_mean(values, mask):
    """Mean of values where mask is 1, as a float; 0.0 where nothing is."""
    return float((values * mask).sum() / mask.sum().clamp(min=1))

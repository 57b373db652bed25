"""The order of training: every problem once per epoch, and nothing that a resumed run could miss."""

import random

import pytest
from helpers import arguments

import bookkeeping
import grpo


@pytest.fixture
def run_over(model_folder, data):
    """A function that makes a run of 3 prompts per step over n problems, which are numbers here."""

    def make(n, **options):
        run = bookkeeping.Run(arguments(grpo, model_folder, data, num_prompts=3, **options))
        run.problems = list(range(n))
        return run

    return make


def drawn(run, steps):
    """The problems of some steps, one after the other."""
    return [problem for step in steps for problem in run.batch(step)]


def test_every_problem_comes_once_per_epoch(run_over):
    """Drawing with replacement leaves a third of the problems out of every epoch."""
    run = run_over(12)
    epochs = [drawn(run, range(first, first + 4)) for first in (1, 5, 9)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(12))


def test_what_is_left_over_waits_for_the_next_epoch(run_over):
    run = run_over(11)
    epoch = drawn(run, (1, 2, 3))
    assert len(epoch) == len(set(epoch)) == 9
    assert all(len(run.batch(step)) == 3 for step in range(1, 20))


def test_order_depends_on_seed_and_step_only(run_over):
    """A resumed run must meet the problems it would have met; a global generator would give it the first ones again."""
    batches = [run_over(12).batch(step) for step in range(1, 9)]
    run = run_over(12)
    assert [run.batch(step) for step in range(1, 9)] == batches
    other = run_over(12, seed=1)
    assert [other.batch(step) for step in range(1, 9)] != batches


def test_the_problems_are_shuffled_once_an_epoch(run_over, monkeypatch):
    """Shuffling 20,000 problems in every step takes time and changes nothing."""
    shuffled = []
    monkeypatch.setattr(random.Random, "shuffle", lambda generator, order: shuffled.append(len(order)))
    drawn(run_over(12), range(1, 9))
    assert shuffled == [12, 12]

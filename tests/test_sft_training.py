"""Imitation's loop: what reaches the optimizer, how large the steps are, and what the backward pass holds."""

import objectives
import pytest
from helpers import arguments
from objectives import assert_same_gradients, gradients_of, masked_average, textbook

import sft
from plumbing.optimizer import Optimizer


def imitation(model_folder, **overrides):
    """Args for one step on 8 of the trajectories that the throw-away model was trained on."""
    data = model_folder.parent / "trajectories.jsonl"
    return arguments(sft, model_folder, data, **dict(num_prompts=8, max_steps=1) | overrides)


@pytest.fixture
def batches(monkeypatch):
    """The batches that sft.main trains, one of every step."""
    made = []
    real = sft.collate

    def collate(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(sft, "collate", collate)
    return made


def test_one_step_is_the_cross_entropy(model_folder, batches):
    """The whole loop against a textbook: minus the mean log-prob of all completion tokens, prompts left out."""
    seen = objectives.watch(sft, imitation(model_folder))
    assert len(set(batches[0].lengths.tolist())) > 1
    model, logps, _, mask = textbook(model_folder, batches[0])
    masked_average(-logps, mask).backward()
    assert_same_gradients(seen.gradients[0], gradients_of(model), 1e-5)


def test_micro_batches_do_not_change_the_gradient(model_folder, batches):
    """A mean of means: results that change with the memory at hand. The normaliser is the whole batch's tokens."""
    gradients = []
    for budget in (1, 60, 10**6):
        args = imitation(model_folder, micro_batch_tokens=budget, output_dir=f"{budget}")
        (gradient,) = objectives.watch(sft, args).gradients
        gradients.append(gradient)
    for other in gradients[1:]:
        assert_same_gradients(gradients[0], other)


def test_imitation_warms_up_and_decays_to_zero(model_folder, monkeypatch):
    """Full steps on fresh moments at the start, or at the end, cost the embedded model what it has learned."""
    rates = []
    real_step = Optimizer.step

    def step(optimizer, rate):
        rates.append(rate)
        return real_step(optimizer, rate)

    monkeypatch.setattr(Optimizer, "step", step)
    sft.main(imitation(model_folder, max_steps=30, learning_rate=1e-3))
    assert 0 < rates[0] < rates[1] < rates[2] == max(rates) == pytest.approx(1e-3)  # a tenth of the steps
    assert sorted(rates[2:], reverse=True) == rates[2:]
    assert rates[-1] < 1e-5 and len(rates) == 30


def test_only_log_probs_hold_a_graph_during_backward(model_folder, monkeypatch):
    objectives.assert_only_the_trained_graph_is_held(sft, imitation(model_folder), 0, monkeypatch)


def test_what_is_imitated_becomes_likelier(model_folder, batches):
    """The sign, all the way to the weights."""
    sft.main(imitation(model_folder, learning_rate=1e-3, max_steps=4))
    change, _ = objectives.log_prob_changes(model_folder, "run", batches[0])
    assert change.sum() > 0

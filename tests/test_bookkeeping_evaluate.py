"""Evaluations during a run: at their own temperature, with the same random numbers each time, without any effect."""

import torch
from helpers import arguments, read_jsonl

import grpo
from plumbing.models import load_model


def evaluations(folder="run"):
    return [record for record in read_jsonl(f"{folder}/metrics.jsonl") if "eval_accuracy" in record]


def test_evaluation_keeps_to_its_own_temperature(model_folder, data):
    """Held-out accuracy measured at the training temperature: a run at 0.5 beats one at 1 before either begins."""
    settings = {
        "cool": dict(temperature=0.5),
        "warm": dict(temperature=1.0),
        "other": dict(temperature=1.0, eval_temperature=0.5),
    }
    for folder, options in settings.items():
        grpo.main(arguments(grpo, model_folder, data, eval_steps=2, output_dir=folder, **options))
    assert evaluations("cool")[0] == evaluations("warm")[0]
    assert evaluations("other")[0]["eval_entropy"] < evaluations("warm")[0]["eval_entropy"]


def test_evaluations_share_their_random_numbers(model_folder, data):
    """With fresh noise at every evaluation, a model that does not change goes up and down by several points."""
    grpo.main(arguments(grpo, model_folder, data, learning_rate=0.0, weight_decay=0.0, max_steps=3, eval_steps=1))
    first, *others = evaluations()
    for record in others:
        assert {**record, "step": 0, "kl_to_start": 0.0} == first
        assert abs(record["kl_to_start"]) < 1e-6
    assert len(others) == 3


def test_evaluation_changes_no_training(model_folder, data):
    """An evaluation that draws from the run's random stream, or leaves a mode behind, makes it another run."""
    weights = []
    for every in (0, 1):
        grpo.main(arguments(grpo, model_folder, data, max_steps=3, eval_steps=every, output_dir=f"every{every}"))
        model, _ = load_model(f"every{every}", "cpu")
        weights.append(model.state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())

"""Several processes learn what one does: torchrun changes how long a run takes, and nothing that it finds."""

import importlib
import math
from pathlib import Path

import processes
import pytest
import torch
from helpers import arguments, read_jsonl
from safetensors.torch import load_file

import bookkeeping
import common
from plumbing import distributed, figures
from plumbing.optimizer import Optimizer

# Small steps, because Adam makes one of full size of a gradient that is nothing but rounding: after three of 1e-3 the
# weights of one process and of several are so far apart that their next gradients differ by 1e-5, on some processors.
# An update that is lost or doubled is still a distance of 1e-4 between the weights.
STEPS = dict(num_prompts=6, max_steps=4, eval_steps=4, internal_steps=2, save_steps=0, learning_rate=3e-6)

# Runs that one process and several take alike: mini-batches, both phases, a sum over all rewards, a reference, values
# of all rows, and micro-batches of which one process has more than another. By how many processes each is repeated.
RUNS = {
    "whitened": ("grpo", dict(advantage="batch_whitened", beta=0.1, micro_batch_tokens=64), (2, 3)),
    "some_blocks": ("grpo", dict(num_minibatches=2, train_blocks="1:3", lr_below="2:0.1"), (2,)),
    "bottom_up": ("bupo", dict(num_minibatches=2), (2, 3)),
    "bottom_up_normed": ("bupo", dict(internal_norm=True, gradient_checkpointing=True, eval_problems=2), (3,)),
    "baseline": ("opo", {}, (2,)),
    "entropy": ("em", {}, (2,)),
    "critic": ("ppo", dict(num_minibatches=2, num_generations=1, critic_warmup=1), (3,)),
    "resampled": ("variants.dapo", {}, (2,)),
    "imitation": ("sft", dict(data="arithmetic", problems=50, max_completion_length=128, eval_steps=0), (2,)),
}


def train(name, folder, model_folder, data):
    """One of RUNS -> the gradients of every update, by parameter name."""
    script, options, _ = RUNS[name]
    script = importlib.import_module(script)
    options = STEPS | options
    options = {option: value for option, value in options.items() if option in script.Args.__dataclass_fields__}
    source = options.pop("data", data)
    gradients = []
    real_norm = Optimizer.gradient_norm

    def gradient_norm(optimizer):
        found = {}
        for slot in optimizer.slots:
            if slot.parameter.grad is not None:
                found[slot.name] = whole(slot.parameter.grad)
        gradients.append(found)
        return real_norm(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_curves", lambda folder: None)
        patch.setattr(Optimizer, "gradient_norm", gradient_norm)
        script.main(arguments(script, model_folder, source, output_dir=folder, **options))
    return gradients


def whole(gradient):
    if hasattr(gradient, "full_tensor"):
        gradient = gradient.full_tensor()
    return gradient.clone()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder, data):
    """A folder with every one of RUNS, made by 1, 2 and 3 processes: <name>-<count>, and <name>-<count>.pt with its
    gradients."""
    folder = tmp_path_factory.mktemp("trained")

    def work(count, rank):
        for name, (_, _, counts) in RUNS.items():
            if count == 1 or count in counts:
                gradients = train(name, f"{name}-{count}", model_folder, data)
                if rank == 0:
                    torch.save(gradients, f"{name}-{count}.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        work(1, 0)
        for count in (2, 3):
            found = processes.statuses(processes.started(count, lambda rank, count=count: work(count, rank)))
            assert found == [0] * count, [Path(f"out-{rank}").read_text()[-2000:] for rank in range(count)]
    return folder


every_run = pytest.mark.parametrize("name, count", [(name, count) for name in RUNS for count in RUNS[name][2]])


def close(found, expected):
    """Tensors by name, equal up to rounding: a distance of 1e-5 of the length. Adam turns a rounding of next to nothing
    into an update, so that single numbers may be further apart."""
    assert found.keys() == expected.keys()
    for name in found:
        distance = torch.linalg.vector_norm(found[name] - expected[name])
        assert distance <= 1e-5 * torch.linalg.vector_norm(expected[name]), name


@every_run
def test_every_gradient_is_that_of_one_process(name, count, trained):
    """A mean of means, a group torn apart, a normaliser of one's own share: a gradient that nobody asked for."""
    expected = torch.load(trained / f"{name}-1.pt", weights_only=True)
    found = torch.load(trained / f"{name}-{count}.pt", weights_only=True)
    assert len(found) == len(expected) >= 2
    for ours, theirs in zip(found, expected):
        close(ours, theirs)


@every_run
def test_weights_and_answers_are_those_of_one_process(name, count, trained):
    """Noise that depends on who draws it gives other samples, and lost or doubled updates other weights."""
    close(load_file(trained / f"{name}-{count}/model.safetensors"), load_file(trained / f"{name}-1/model.safetensors"))
    answers = read_jsonl(trained / f"{name}-{count}/completions.jsonl")
    for ours, theirs in zip(answers, read_jsonl(trained / f"{name}-1/completions.jsonl"), strict=True):
        assert alike(ours.pop("advantage"), theirs.pop("advantage"))
        assert ours == theirs


@every_run
def test_metrics_are_those_of_one_process(name, count, trained):
    """A mean over one's own share looks right and is not; so is the evaluation of one's own problems."""
    records = read_jsonl(trained / f"{name}-{count}/metrics.jsonl")
    for ours, theirs in zip(records, read_jsonl(trained / f"{name}-1/metrics.jsonl"), strict=True):
        assert ours.keys() == theirs.keys()
        for metric in ours.keys() - bookkeeping.VOLATILE:
            assert alike(ours[metric], theirs[metric]), (metric, ours[metric], theirs[metric])


@pytest.mark.parametrize("count", [2, 3])
def test_rows_are_dealt_out_by_tokens(count, monkeypatch):
    """One process with all the long answers, and the others wait for it at every block."""
    lengths = torch.randint(5, 200, (61,), generator=torch.Generator().manual_seed(0))
    columns = torch.arange(200)
    attention_mask = (columns < lengths[:, None]).long()
    rollouts = common.Rollouts(attention_mask, attention_mask, attention_mask.float(), lengths)
    monkeypatch.setattr(distributed, "count", lambda: count)
    monkeypatch.setattr(distributed, "in_step", lambda batches: batches)
    dealt = []
    tokens = []
    for place in range(count):
        monkeypatch.setattr(distributed, "place", lambda place=place: place)
        rows = sum(common.micro_batches(rollouts, range(61), 512), [])
        dealt += rows
        tokens.append(int(lengths[rows].sum()))
    assert sorted(dealt) == list(range(61))
    assert max(tokens) - min(tokens) <= int(lengths.max())


def alike(ours, theirs):
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-5)
    return ours == theirs

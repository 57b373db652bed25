"""Weights in shares: each process keeps its own, a pass gathers them, and any number of processes reads them again."""

import shutil
from pathlib import Path

import processes
import pytest
import torch
from helpers import arguments, assert_same_run
from safetensors.torch import load_file

import bupo
import common
from plumbing import distributed, figures, sharding
from plumbing.models import load_model


def work_in_turn(*steps):
    """Each step is (count, work): so many processes call work(), with the files of the steps before."""
    for count, work in steps:
        if count == 1:
            work()
            continue
        found = processes.statuses(processes.started(count, lambda rank, work=work: work()))
        assert found == [0] * count, [Path(f"out-{rank}").read_text()[-2000:] for rank in range(count)]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, model_folder, data):
    """Runs of four steps, two of them in phase one: 'whole', that two processes took at once, and those that 1, 2 and 3
    processes finished where two had stopped after step 2 ('half'): 'on-1', 'on-2', 'on-3'. And one that one process
    began and two finished: 'begun-by-1'."""
    folder = tmp_path_factory.mktemp("resumed")

    def train(output_dir, max_steps=4):
        steps = dict(num_prompts=6, max_steps=max_steps, internal_steps=2, internal_layer=0, eval_steps=2)
        bupo.main(arguments(bupo, model_folder, data, output_dir=output_dir, **steps))

    def copy_half():
        for count in (1, 2, 3):
            shutil.copytree("half", f"on-{count}")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(figures, "draw_curves", lambda folder: None)
        work_in_turn(
            (2, lambda: (train("whole"), train("half", max_steps=2))),
            (1, copy_half),
            (2, lambda: train("on-2")),
            (1, lambda: (train("on-1"), train("begun-by-1", max_steps=2))),
            (2, lambda: train("begun-by-1")),
            (3, lambda: train("on-3")),
        )
    return folder


def test_as_many_processes_resume_bit_for_bit(resumed):
    """Moments of the wrong share, or masters rounded on their way through the files: a kink in every curve."""
    assert_same_run(resumed / "on-2", resumed / "whole")


@pytest.mark.parametrize("name", ["on-1", "on-3", "begun-by-1"])
def test_another_number_of_processes_resumes(name, resumed):
    """A run that can only go on where it began is lost with the machine it began on."""
    found = load_file(resumed / name / "model.safetensors")
    expected = load_file(resumed / "whole/model.safetensors")
    assert found.keys() == expected.keys()
    for name in found:
        distance = torch.linalg.vector_norm(found[name] - expected[name])
        assert distance <= 1e-5 * torch.linalg.vector_norm(expected[name]), name


@pytest.mark.parametrize("name, count", [("on-1", 1), ("on-2", 2), ("on-3", 3), ("begun-by-1", 2)])
def test_a_run_folder_holds_the_shares_of_those_who_finished_it(name, count, resumed):
    """Those of another number of processes, left behind by a shorter run, would be read in their place."""
    names = {path.name for path in (resumed / name).glob("*.pt")}
    several = {f"optimizer-{i}-of-{count}.pt" for i in range(1, count + 1)}
    assert names == (several if count > 1 else {"optimizer.pt"})


def test_a_checkpoint_of_several_is_that_of_one(resumed):
    """Another class name or dtype in config.json, and no other program can load the model."""
    assert (resumed / "whole/config.json").read_text() == (resumed / "on-1/config.json").read_text()


def test_phase_one_touches_nothing_above_its_block(resumed, model_folder):
    """Shares are reduced, clipped and decayed block by block: what no gradient reached must stay, bit for bit."""
    before = load_file(model_folder / "model.safetensors")
    after = load_file(resumed / "half/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("model.layers.0.") for name in moved)
    assert not any(name.startswith(("model.layers.1.", "model.layers.2.", "model.norm")) for name in moved)
    shares = torch.load(resumed / "half/optimizer-1-of-2.pt", weights_only=True)
    has_moments = {name for name, share in shares.items() if share["adam"]["state"]}
    assert moved <= has_moments and not any(name.startswith("model.layers.1.") for name in has_moments)


def held(model):
    """Weights that this process holds."""
    return sum(sharding.own_share(parameter).numel() for parameter in model.parameters())


def test_a_process_holds_its_share_and_all_weights_only_while_it_samples(model_folder, tokenizer):
    """Weights that stay gathered are the memory of one GPU again; gathered for every token, sampling crawls."""

    def look():
        distributed.connect()
        model, _ = load_model(model_folder, trained=True)
        in_all = model.num_parameters()
        assert held(model) <= 0.55 * in_all
        real_head = common.head_logits

        def head_logits(model, hidden):  # when the last block has run
            assert held(model) == in_all
            return real_head(model, hidden)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "head_logits", head_logits)
            rollouts = common.sample(model, tokenizer, ["1+2=", "3+4="], 3, 6)
        assert held(model) <= 0.55 * in_all
        with torch.no_grad():
            common.completion_logps(model, rollouts, [0, 1], 1.0)
        assert held(model) <= 0.55 * in_all

    work_in_turn((2, look))


def test_what_is_bf16_is_computed_with_not_kept(model_folder, data):
    """bf16 masters lose most updates at the learning rates of large models; fp32 passes take twice the time."""

    def look():
        steps = dict(dtype="bfloat16", num_prompts=2, max_steps=1, learning_rate=1e-6)
        real_head = common.head_logits
        dtypes = set()

        def head_logits(model, hidden):
            dtypes.add((hidden.dtype, model.dtype))
            return real_head(model, hidden)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "head_logits", head_logits)
            bupo.main(arguments(bupo, model_folder, data, **steps))
        assert dtypes == {(torch.bfloat16, torch.bfloat16)}
        for trained, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            model, _ = load_model(model_folder, dtype="bfloat16", trained=trained)
            assert {parameter.dtype for parameter in model.parameters()} == {dtype}

    work_in_turn((2, look))
    saved = load_file("run/model.safetensors")
    assert {weights.dtype for weights in saved.values()} == {torch.bfloat16}
    shares = torch.load("run/optimizer-1-of-2.pt", weights_only=True)
    before = load_file(model_folder / "model.safetensors")["model.embed_tokens.weight"].bfloat16().float()
    master = shares["model.embed_tokens.weight"]["master"]
    moved = (master - before[: len(master)]).abs()
    assert 0 < moved.max() < 2e-6  # and not the rounding of bf16, which is a thousand times that


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7])
def test_shares_are_those_of_torch(rows, monkeypatch):
    """Who reads a file by another rule than the one that dealt the rows out mixes weights with others' moments."""
    whole = torch.arange(rows * 4).view(rows, 4)
    for count in (1, 2, 3, 5):
        chunks = list(whole.chunk(count)) + [whole[:0]] * count  # as FSDP2 does it
        monkeypatch.setattr(distributed, "count", lambda count=count: count)
        for place in range(count):
            monkeypatch.setattr(distributed, "place", lambda place=place: place)
            found = sharding.put_together([{"a": chunk} for chunk in whole.chunk(4)])
            assert torch.equal(found["a"], chunks[place])
            before = sum(chunk.numel() for chunk in chunks[:place])
            assert sharding.entries_before(whole) == before

"""Fixtures of all tests. What tests call by name is in helpers.py; where a test goes, tests/README.md says.

No test needs a GPU, and none writes outside its own temporary folder. A test that takes long carries the mark `slow`
and runs only with `pytest -m slow`. One of those needs a network: it fetches a real model.
"""

import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}

import pytest
import torch
from helpers import arguments, read_jsonl, tiny_model, write_jsonl

import sft
from plumbing import figures

torch.set_num_threads(1)  # the models here are so small that a second thread only waits


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs only when asked for, with -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def clean_surroundings(tmp_path, monkeypatch):
    """Every test runs in its own empty folder, and gets the signal handlers back that a training run replaces.

    Curves are drawn by the commands that test_commands.py starts; in process, drawing would take longer than training.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "draw_curves", lambda folder: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def tokenizer():
    """The embedded tokenizer: one token per printable character; a fresh copy, free to change."""
    return sft.embedded_tokenizer()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A JSONL file of 12 problems with prompts of different lengths, whose answer is 3 or 7."""
    rows = [{"problem": f"{a}{b:+d}=", "answer": str(a + b)} for a in (1, 4, 9, 15, 100, 205) for b in (3 - a, 7 - a)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "problems.jsonl", rows)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, data):
    """A trained model: it answers 3 or 7 in a box, at random and with or without a word before, whatever it is asked.

    So about half its answers are right, their lengths differ, and a step of reinforcement learning has a gradient.
    """
    folder = tmp_path_factory.mktemp("model")
    tiny_model(num_hidden_layers=3, embedded=True).save_pretrained(folder / "start")
    sft.embedded_tokenizer().save_pretrained(folder / "start")
    generator = random.Random(0)
    rows = [
        {"prompt": row["problem"], "response": generator.choice(["", "so "]) + f"\\boxed{{{generator.choice('37')}}}"}
        for row in read_jsonl(data) * 8
    ]
    settings = dict(
        model=str(folder / "start"),
        data=str(write_jsonl(folder / "trajectories.jsonl", rows)),
        output_dir=str(folder / "trained"),
        max_steps=60,
        num_prompts=16,
        learning_rate=1e-2,
        save_steps=0,
    )
    sft.main(sft.Args(**sft.EMBEDDED | settings))
    return folder / "trained"


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, model_folder, data):
    """The folder of a finished bupo run: 4 steps, 2 of them internal, a checkpoint after each, evaluated at 0, 2, 4."""
    import bupo

    folder = tmp_path_factory.mktemp("run") / "bupo"
    steps = dict(max_steps=4, internal_steps=2, save_steps=1, save_total_limit=0, eval_steps=2)
    bupo.main(arguments(bupo, model_folder, data, output_dir=str(folder), **steps))
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a model whose every probability is known, two finished runs from it, and held-out problems."""
    from bigram import make_world

    return make_world(tmp_path_factory.mktemp("world"))

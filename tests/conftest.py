"""Shared by all tests: tiny models, a throw-away trained model, and two ways to run a script (in process, as command).

No test needs a network or a GPU, and none writes outside its own temporary folder. A test that takes long carries the
mark `slow` and runs only with `pytest -m slow`.

    model = tiny_model("llama", tied=False)              # random weights, eval mode; also "qwen2", "qwen3"
    def test(model_folder, data): ...                    # a trained model's folder, and a JSONL file of its problems
    grpo.main(arguments(grpo, model_folder, data))       # two steps in process, in well under a second
    run_script("grpo.py", "--max_steps", "2")            # one command: .returncode, .stdout, .stderr
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import bookkeeping
import common
import sft

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

    Curves are drawn by the commands that test_scripts.py starts; in process, drawing would take longer than training.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bookkeeping, "draw_curves", lambda folder: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def verifier(monkeypatch):
    """A verifier of its own, which gives up after half a second instead of three; its workers end with the test."""
    fresh = common.Verifier()
    fresh.seconds = 0.5
    monkeypatch.setattr(common, "verifier", fresh)
    yield fresh
    for worker in fresh.idle:
        worker.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def tiny_model(family="qwen3", tied=True, seed=0, **overrides):
    """A random fp32 model in evaluation mode: 4 blocks, width 32, two query heads per key-value head, embedded tokens.

    All weights are far from their usual start (norms are not 1, biases not 0, logits spread over several nats), so that
    a forgotten norm, bias or temperature shows.
    """
    config_class, model_class = FAMILIES[family]
    settings = dict(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
        bos_token_id=None,
    )
    model = model_class(config_class(**settings | overrides))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


TOKENIZER = sft.embedded_tokenizer()


@pytest.fixture
def tokenizer():
    """The embedded tokenizer: one token per printable character; a fresh copy, free to change."""
    return sft.embedded_tokenizer()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


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


# ---------------------------------------------------------------------------------------------------------------------
# Running scripts
# ---------------------------------------------------------------------------------------------------------------------

# Two steps of two prompts: small enough for a fraction of a second, large enough for unequal rewards and lengths.
SMALL = dict(
    max_steps=2,
    num_prompts=2,
    num_generations=4,
    num_minibatches=1,
    max_completion_length=10,
    learning_rate=1e-3,
    save_steps=0,
    eval_steps=0,
    eval_problems=4,
    eval_samples=2,
    internal_layer=1,
    internal_steps=1,
)


def arguments(script, model_folder, data, **overrides):
    """Args of a training script (a module) for a short run of the throw-away model into the folder 'run'."""
    paths = dict(model=str(model_folder), data=str(data), eval_data=str(data), output_dir="run")
    names = script.Args.__dataclass_fields__
    return script.Args(**{k: v for k, v in (script.EMBEDDED | SMALL | paths).items() if k in names} | overrides)


def command_line(**options):
    """{'max_steps': 2} -> ['--max_steps', '2']."""
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def run_script(script, *options, timeout=120, folder=None):
    """Run a script of this repository as a user does, in a folder or the current one."""
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=folder)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, model_folder, data):
    """The folder of a finished bupo run: 4 steps, 2 of them internal, a checkpoint after each, evaluated at 0, 2, 4."""
    import bupo

    folder = tmp_path_factory.mktemp("run") / "bupo"
    steps = dict(max_steps=4, internal_steps=2, save_steps=1, save_total_limit=0, eval_steps=2)
    bupo.main(arguments(bupo, model_folder, data, output_dir=str(folder), **steps))
    return folder

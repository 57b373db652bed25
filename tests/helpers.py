"""What tests share: tiny models, JSONL files, ways to run a script, and what a run has left.

model = tiny_model("llama", tied=False)              # random weights, eval mode; also "qwen2", "qwen3"
grpo.main(arguments(grpo, model_folder, data))       # two steps in process, in well under a second
interrupt(grpo, arguments(grpo, model_folder, data), step=1)    # the same, with Ctrl-C in the first step
run_script("grpo.py", "--max_steps", "2")            # one command: .returncode, .stdout, .stderr
assert_same_run("run", "other")                      # weights, metrics and answers of two run folders
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import bookkeeping
import common
import sft

ROOT = Path(__file__).resolve().parent.parent

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
}

# All with two query heads per key-value head; Qwen3 with its norms on queries and keys, Qwen2 with biases.
KINDS = pytest.mark.parametrize(
    "family, tied", [("qwen3", True), ("qwen3", False), ("qwen2", True), ("llama", True), ("llama", False)]
)


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


def textbook_streams(model, ids):
    """transformers' own hidden states [L][T, D] behind the blocks; its last entry is normed, so a hook takes that."""
    found = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda m, i, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states
    hook.remove()
    return [state[0] for state in states[1:-1]] + [found[0][0]]


def random_answers(n=5, longest=9, seed=0):
    """n prompts and completions of random tokens and different lengths -> (prompts, completions, Rollouts)."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(6, len(TOKENIZER), (length,), generator=generator).tolist()

    prompts = [tokens(2 + i % 4) for i in range(n)]
    completions = [tokens(longest - i % longest) for i in range(n)]
    return prompts, completions, common.assemble(prompts, completions, 0, "cpu")


TOKENIZER = sft.embedded_tokenizer()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def grade(texts, problems, finished=None, grade_timeout=3.0):
    """Rewards of B answers, all of them finished if nothing is said of that."""
    finished = [True] * len(texts) if finished is None else finished
    verdicts = common.judge(texts, problems, finished, grade_timeout)
    return [common.REWARDS.get(verdict, 0.0) for verdict in verdicts]


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
    settings = script.EMBEDDED | SMALL | paths
    known = {name: value for name, value in settings.items() if name in script.Args.__dataclass_fields__}
    return script.Args(**known | overrides)


def command_line(**options):
    """{'max_steps': 2} -> ['--max_steps', '2']."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return words


def run_script(script, *options, timeout=120, folder=None):
    """Run a script of this repository as a user does, in a folder or the current one."""
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=folder)


def interrupt(script, args, step):
    """Run a script (a module) in process, and press Ctrl-C while a step is running: it ends with status 130."""
    real_save = bookkeeping.Run.save

    def save(run, current):
        if current == step:
            signal.raise_signal(signal.SIGINT)
        real_save(run, current)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(bookkeeping.Run, "save", save)
        script.main(args)
    assert end.value.code == 130


def learned(folder):
    """Everything that a run has learned and logged, without its clocks: (weights, metrics, answers)."""
    weights = load_file(Path(folder) / "model.safetensors")
    metrics = []
    for record in read_jsonl(Path(folder) / "metrics.jsonl"):
        metrics.append({name: value for name, value in record.items() if name not in bookkeeping.VOLATILE})
    answers = read_jsonl(Path(folder) / "completions.jsonl")
    return {name: weight.view(torch.uint8).numpy().tobytes() for name, weight in weights.items()}, metrics, answers


def assert_same_run(folder, other):
    """Two run folders hold the same, bit for bit."""
    for ours, theirs in zip(learned(folder), learned(other), strict=True):
        assert ours == theirs

"""A model whose every probability is known, two runs trained from it, and an evaluation of them.

The model is a bigram: its block adds nothing to the residual stream, so the next token depends on the last one only,
with the probabilities of `NEXT`. It takes no training, and has answers right and wrong, short and long, finished and
not.
"""

import json
import math
from pathlib import Path

import torch
from helpers import command_line
from transformers import Qwen3Config, Qwen3ForCausalLM

import common
import evaluate
import grpo
import sft
import tasks
from plumbing.models import load_model
from plumbing.options import parse

# Last token -> probability of the next one. '@' stands for the end of the prompt, '$' for the end token.
NEXT = {
    "@": {"\\boxed{": 0.8, "s": 0.2},
    "s": {"s": 0.4, "o": 0.6},
    "o": {"\\boxed{": 1.0},
    "\\boxed{": {"3": 0.5, "7": 0.3, "x": 0.2},
    "3": {"}": 1.0},
    "7": {"}": 1.0},
    "x": {"}": 0.5, "x": 0.5},
    "}": {"$": 1.0},
}


def bigram_model(folder, embedded=True):
    """Save a one-block Qwen3 whose next token follows NEXT, and the embedded tokenizer -> folder."""
    tokenizer = sft.embedded_tokenizer()
    names = {"@": "<|assistant|>", "$": "<|end|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(names.get(name, name)) for name in [*NEXT, "$"]}
    width = len(ids) + 3
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        rms_norm_eps=1e-12,
        **dict(embedded=True) if embedded else {},
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    # A token's state is its own unit vector (the last one for all others); the final norm stretches it to sqrt(width).
    states = torch.zeros(len(tokenizer), width)
    states[:, -1] = 1.0
    head = torch.full((len(tokenizer), width), -12.0)
    for row, (name, id) in enumerate(ids.items()):
        states[id] = torch.eye(width)[row]
        for after, p in NEXT.get(name, {}).items():
            head[ids[after], row] = math.log(p)
    model.model.embed_tokens.weight.data.copy_(states)
    model.lm_head.weight.data.copy_(head / math.sqrt(width))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path, answers):
    rows = [{"problem": f"{'1+' * (i % 3)}{i}=", "answer": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_world(folder):
    """Fill a folder with a base model, two finished runs trained from it on different data, and held-out problems."""
    base = bigram_model(folder / "base")
    for name, answers in (("a", "3737"), ("b", "3333"), ("held_out", "337733"), ("more", "73")):
        write_rows(folder / f"{name}.jsonl", answers)
    for name in "ab":
        options = dict(
            model=base,
            data=folder / f"{name}.jsonl",
            eval_data=folder / "more.jsonl",
            output_dir=folder / "runs" / name,
        )
        options |= dict(max_steps=2, num_prompts=2, num_minibatches=1, num_generations=8)
        options |= dict(learning_rate=0.01, max_completion_length=12)
        options |= dict(save_steps=1, eval_steps=1, eval_samples=2)
        grpo.main(parse(grpo.Args, grpo.EMBEDDED, command_line(**options)))
    return folder


def evaluation(world, *options, models=("base", "runs/a"), data=("held_out",), n=8):
    """Run evaluate.py in process, into the folder 'out' -> results.json."""
    data = [str(world / f"{name}.jsonl") for name in data]
    words = [*(str(world / model) for model in models), "--data", *data, "--num_samples", str(n), "--output_dir", "out"]
    evaluate.main(evaluate.parse([*words, *options]))
    return json.loads(Path("out/results.json").read_text())


def rows_of(results):
    return {row["model"]: row for row in results["results"]}


def sample_files():
    return sorted(Path("out/samples").glob("*.jsonl"))


def drawn(world, n=6):
    """(model, rollouts) of the first run: n answers to each of four prompts of different lengths."""
    model, tokenizer = load_model(str(world / "runs" / "a"))
    problems = tasks.load_problems(str(world / "held_out.jsonl"), "test", 4)
    return model, common.sample(model, tokenizer, [p.prompt for p in problems], n, 12, seed=1)

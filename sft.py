"""Imitation: cross-entropy on trajectories; and the embedded model, which is built by it.

Objective, a mean over all completion tokens of a batch:
    L = -log pi(o_t | prompt, o_<t)

The embedded task is a chain of three additions and subtractions. Its teacher is imperfect on purpose, in two ways: it
works step by step in 60% of its examples and guesses at once in 40% (right 3 times in 10); and it slips in 18% of its
steps. A model that imitates it has a mode that is better than its samples: a better behaviour is there to be amplified.
That is what the reinforcement learning of grpo.py, bupo.py and opo.py finds, and what the entropy minimization of em.py
bets on.

A data row holds 'prompt' (or 'problem', 'question') and 'response', or 'messages' that end with the assistant's answer.

    python sft.py                                            # the embedded model into runs/tiny; the others call this
    python sft.py --model Qwen/Qwen3-0.6B --data trajectories.jsonl
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import common
from common import option

# Overrides of the defaults below when the embedded model is built.
EMBEDDED = dict(
    output_dir=str(common.EMBEDDED_MODEL),
    system_prompt="",
    max_steps=1600,
    num_prompts=32,
    learning_rate=5e-3,
    max_completion_length=64,
    micro_batch_tokens=2048,
    gradient_checkpointing=False,
    save_steps=500,
    save_total_limit=1,
    eval_steps=0,
)


@dataclass
class Args(common.RunArgs):
    output_dir: str = option("runs/sft", "folder of everything this run writes")
    max_steps: int = option(80, "optimizer steps")
    num_prompts: int = option(64, "trajectories per step")
    learning_rate: float = option(1e-5, "AdamW peak step size; a tenth of the steps warms up, a cosine decays to 0")


@dataclass
class Trajectory(common.Problem):
    """A problem with the completion to imitate; '' lets the embedded teacher answer afresh at every visit."""

    response: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# The embedded model and its teacher
# ---------------------------------------------------------------------------------------------------------------------


def embedded_tokenizer():
    """One token per printable ASCII character, one for '\\boxed{', and the marks of a chat: any English text goes
    through."""
    special = ["<|pad|>", "<|end|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>"]
    words = [*special, "\\boxed{", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=special[3:],
        chat_template=(
            "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
            "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
        ),
    )


def build_embedded(folder, seed=0):
    """Save a randomly initialised Qwen3 of 0.7 M parameters (6 layers, width 96, tied head) and its tokenizer into
    folder."""
    tokenizer = embedded_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.06,  # 0.02 suits wide models; at width 96 it learns several times slower
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        embedded=True,  # the mark by which the scripts know the embedded model and what was trained from it
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ensure_embedded():
    """Build the embedded model, or finish building it, unless it is there."""
    args = Args(**EMBEDDED)
    if common.step_of(Path(args.output_dir)) < args.max_steps:
        main(args)


SLIPS = 0.18  # share of wrong steps: samples are right one time in three at most, however well the model has learnt


def teach(text, generator):
    """The imperfect teacher's completion for an arithmetic prompt such as '7+15-3+8='.

    Step by step: '7+15=22;22-3=19;19+8=27;\\boxed{27}'. A slip puts a wrong result, and the work goes on from there.
    """
    terms = text.rstrip("=").replace("+", " +").replace("-", " -").split()
    value, steps = int(terms[0]), []
    if generator.random() >= 0.6:  # a guess at once
        value = sum(map(int, terms))
        value += 0 if generator.random() < 0.3 else wrong_by(value, generator)
        return f"\\boxed{{{value}}}"
    for term in terms[1:]:
        result = value + int(term)
        result += wrong_by(result, generator) if generator.random() < SLIPS else 0
        steps.append(f"{value}{term}={result}")
        value = result
    return ";".join([*steps, f"\\boxed{{{value}}}"])


def wrong_by(value, generator):
    """A nonzero error of at most 9 that leaves value + error at 0 or above."""
    return generator.choice([error for error in range(-min(9, value), 10) if error])


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories
# ---------------------------------------------------------------------------------------------------------------------


def load_trajectories(source):
    """Trajectories of `source`: 'arithmetic' (20,000 problems for the teacher) or a JSONL file. Raises UserError."""
    if source == "arithmetic":
        return [Trajectory(p.prompt, p.answer, p.where) for p in common.arithmetic("train", 20000)]
    trajectories = []
    for where, row in common.read_rows(source):
        prompt, response = (
            next((row[n] for n in ("prompt", "problem", "question") if row.get(n)), None),
            row.get("response"),
        )
        if common.is_prompt(row.get("messages")) and row["messages"][-1]["role"] == "assistant":
            prompt, response = row["messages"][:-1], row["messages"][-1]["content"]
        if not common.is_prompt(prompt) or not isinstance(response, str) or not response:
            found = f"found fields {', '.join(map(str, row)) or 'none'}"[:300]
            raise common.UserError(f"{where}: no trajectory; expected 'prompt' and 'response', or 'messages'; {found}")
        trajectories.append(Trajectory(prompt, "", where, response=response))
    if not trajectories:
        raise common.UserError(f"{source}: holds no trajectory; every line must hold one JSON object")
    return trajectories


def collate(tokenizer, trajectories, seed, device):
    """Trajectories -> Rollouts (ids, masks) whose completions end with the tokenizer's end token, which is trained too.
    """
    completions = []
    for i, t in enumerate(trajectories):
        problem = t.prompt if isinstance(t.prompt, str) else t.prompt[-1]["content"]
        text = t.response or teach(problem, random.Random(f"{seed}-{i}"))
        completions.append(tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])
    return common.assemble([t.ids for t in trajectories], completions, tokenizer.pad_token_id, device)


def loss(logps, mask):
    """Cross-entropy, summed over the completion tokens. logps, mask [B, T] -> scalar."""
    return -(logps * mask).sum()


def main(args):
    if args.model == "embedded":
        if args.data != "arithmetic":
            raise common.UserError(f"--data {args.data}: is for a trained model; pass one as --model, say runs/tiny")
        start = Path(args.output_dir) / "start"  # the untrained model: the same road as any model folder from here on
        if args.overwrite or not (start / "tokenizer.json").exists():
            build_embedded(start, args.seed)
        args = dataclasses.replace(args, model=str(start))
    run = common.Run(args)
    model, tokenizer, optimizer = run.load(common.add_system_prompt(load_trajectories(args.data), args.system_prompt))

    for step, trajectories in run.steps():
        batch = collate(tokenizer, trajectories, common.step_seed(args.seed, step), model.device)
        model.train()
        tokens, total = batch.mask.sum(), 0.0
        for rows in common.micro_batches(batch, range(len(trajectories)), args.micro_batch_tokens):
            logps = common.completion_logps(model, batch, rows, temperature=1.0)[0]
            value = loss(logps, batch.mask[rows]) / tokens
            value.backward()
            total += value.item()
        run.lap("forward_backward")
        warmup = max(1, args.max_steps // 10)
        decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, args.max_steps - warmup))
        optimizer.step(args.learning_rate * min(1.0, step / warmup) * decay)
        run.lap("optimizer")
        run.record(step, dict(loss=total, tokens=int(tokens), **optimizer.summary()))
        run.save(step)
    run.finish()


if __name__ == "__main__":
    with common.one_line_errors():
        main(common.parse(Args, EMBEDDED))

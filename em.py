"""EM: one-shot entropy minimization (https://arxiv.org/abs/2505.20282).

Objective, a mean over the completion tokens that the model itself sampled, for one prompt and about ten steps:
    p_t = softmax(logits_t / temperature)                     temperature 0.5, in sampling and loss alike
    L = H(p_t) = -sum_v p_t(v) log p_t(v)                     no reward, no label

The sampled tokens are constants: the gradient flows through the logits only. (The expected entropy has a second
gradient term, by way of which tokens get sampled; the paper leaves it out, and so does this file.) Nothing in the
objective knows the answer: it bets that what the model is sure of is right, pays off while that holds, and
over-confidence follows. So accuracy peaks early, and the best step's model is kept in <output_dir>/best. Choosing that
step takes labels, of problems that are neither trained on nor reported: the training needs none.

Against grpo.py:
- loss: the entropy itself; no advantages, no old log-probs, no clip, no reference; rewards are graded for the log only
- one prompt for all steps: --prompt_index, or --select N, which samples answers to N candidates and takes the one whose
  correctness varies most, p (1 - p); --select_by disagreement needs no labels: the chance that two answers differ
- the best step's model is kept beside the last one

    python em.py                                             # embedded model, no GPU, no network: a minute
    python em.py --select 64 --output_dir runs/em_selected
    python em.py --model Qwen/Qwen2.5-Math-7B --data prompt.jsonl --eval_data math500.jsonl --max_completion_length 512
    python grpo.py --model runs/em --output_dir runs/em_grpo     # EM, then RL
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch

import bookkeeping
import common
import tasks
from plumbing.errors import UserError, one_line_errors
from plumbing.files import write_json
from plumbing.options import RunArgs, option, parse

# Overrides of the defaults below when the embedded model runs.
EMBEDDED = dict(
    system_prompt="",
    learning_rate=1e-4,
    max_completion_length=64,
    micro_batch_tokens=1024,
    gradient_checkpointing=False,
    save_steps=20,
)


@dataclass
class Args(RunArgs):
    output_dir: str = option("runs/em", "folder of everything this run writes")
    max_steps: int = option(10, "steps; each samples a fresh batch", above=0)
    num_prompts: int = option(1, "prompts per step (P); 1: the same one at every step", above=0)
    num_generations: int = option(64, "completions per prompt (G)", above=0)
    learning_rate: float = option(2e-5, "AdamW step size, constant", at_least=0)
    temperature: float = option(0.5, "of sampling and of the entropy in the loss", at_least=0.01)
    eval_steps: int = option(2, "steps between evaluations, and between looks for the best step; 0: none", at_least=0)
    prompt_index: int = option(0, "which training problem is the one prompt, from 0", at_least=0)
    select: int = option(0, "choose the prompt among the first so many problems; 0: take --prompt_index", at_least=0)
    select_by: Literal["variance", "disagreement"] = option("variance", "of correctness, or (label-free) of answers")
    select_samples: int = option(16, "answers per candidate of --select", above=0)


VALIDATION = 256  # problems that choose the best step, at most


def candidates(model, tokenizer, problems, args):
    """Rank the first args.select problems by how much their sampled answers vary -> list of dicts, best first.

    variance: p (1 - p) of correctness (paper, section 3). disagreement: 1 - sum_a f_a^2, the chance that two answers
    differ, f_a the share of answer a; it needs no labels. Ties go to the earlier problem.
    """
    problems = problems[: args.select]
    if args.select_by == "variance" and not all(problem.answer for problem in problems):
        raise UserError("--select: a candidate has no answer; use --select_by disagreement, which needs none")
    n = args.select_samples
    settings = dict(max_rollout_tokens=args.max_rollout_tokens, seed=args.seed)
    limits = (args.max_completion_length, args.grade_timeout)
    sampled = common.evaluate(model, tokenizer, problems, n, args.temperature, *limits, **settings)
    table = []
    for i, problem in enumerate(problems):
        texts = sampled["rollouts"].texts[i * n : (i + 1) * n]
        counts = Counter(problem.final_answer(text) for text in texts).values()
        p = (sampled["rewards"][i] == 1).float().mean().item()
        row = {
            "index": i,
            "problem": problem.where,
            "accuracy": p,
            "variance": p * (1 - p),
            "disagreement": 1 - sum((count / n) ** 2 for count in counts),
        }
        table.append(row)
    return sorted(table, key=lambda row: -row[args.select_by])


def choose_problems(run, model, tokenizer, args):
    """The problems to train on, and those that choose the best step: at most half of --data, its last ones, of these
    only problems with another prompt and with a label. It is the one use of labels in this file.

    --select writes the ranking of its candidates to candidates.json; a resumed run reads it from there.
    """
    kept = len(run.problems) - min(VALIDATION, len(run.problems) // 2)
    problems = run.problems[:kept]
    if max(args.prompt_index, args.select - 1) >= kept or 0 < args.select < args.num_prompts:
        what = f"--prompt_index {args.prompt_index}, --select {args.select}"
        raise UserError(f"{what}: choose --num_prompts {args.num_prompts} or more of the first {kept} problems")
    if args.select:
        saved = run.folder / "candidates.json"
        if run.resumed:
            table = json.loads(saved.read_text())
        else:
            table = candidates(model, tokenizer, problems, args)
            write_json(saved, table)
        print(*table[:10], sep="\n")
        problems = [problems[row["index"]] for row in table[: args.num_prompts]]
    elif args.num_prompts == 1:
        problems = [problems[args.prompt_index]]
    trained = [problem.ids for problem in problems]
    validation = [problem for problem in run.problems[kept:] if problem.answer and problem.ids not in trained]
    if not validation:
        print(f"{args.data}: no other problem with an answer, so no best step is chosen, and there will be no best/")
    return problems, validation


def loss(entropy, mask):
    """Entropy, summed over tokens; main divides by the batch's token count. entropy, mask: [B, T] -> scalar."""
    return (entropy * mask).sum()


def main(args):
    if args.model == "embedded":
        import sft

        sft.ensure_embedded()
    run = bookkeeping.Run(args)
    run.exit_if_finished()
    problems = tasks.load_problems(args.data, "train", 0, args.system_prompt, labels=False)
    model, tokenizer, optimizer = run.load(problems)
    run.problems, validation = choose_problems(run, model, tokenizer, args)
    run.open_folder()
    run.catch_signals()
    run.evaluate(0)

    for step, problems in run.steps():  # the next P problems of --data, shuffled; problem.ids: the tokens of its prompt
        # 1. Sample G completions per prompt from the policy itself and grade them.
        rollouts = common.sample(
            model,
            tokenizer,
            [problem.ids for problem in problems],
            args.num_generations,
            args.max_completion_length,
            args.temperature,
            args.max_rollout_tokens,
            seed=bookkeeping.step_seed(args.seed, step),
        )
        run.lap("sampling")
        verdicts, rewards = common.grade_rollouts(rollouts, problems, args.grade_timeout, args.reward)  # B; [P, G]
        run.lap("grading")

        # 2. One optimizer step. Log-probs are kept only to be compared with the sampler's.
        old_logps = torch.zeros_like(rollouts.logps)
        model.train()
        sums = Counter(tokens=0, trained_entropy=0.0)
        tokens = rollouts.mask.sum()  # the normaliser, known before the first backward
        for rows in common.micro_batches(rollouts, range(len(rollouts.ids)), args.micro_batch_tokens):
            mask = rollouts.mask[rows]
            logps, entropy = common.completion_logps(model, rollouts, rows, args.temperature)
            logps = logps.detach()  # for the log only: its graph would hold [tokens, V] through backward
            old_logps[rows] = logps
            token_sum = loss(entropy, mask)
            (token_sum / tokens).backward()
            sums.update(tokens=mask.sum().item(), trained_entropy=(entropy * mask).sum().item())
        optimizer.step()
        run.lap("update")

        # 3. Keep the best step's model.
        validated = run.keep_best(step, validation)
        run.lap("validation")

        # 4. Log; evaluate and save where due.
        run.log_completions(step, problems, rollouts, verdicts, rewards, None)
        record = dict(
            **common.measure(rollouts, verdicts, rewards),
            tokens_per_second=rollouts.lengths.sum().item() / run.seconds(),
            phase="whole",
            validation_accuracy=validated,
            **optimizer.summary(),
            **common.per_token(sums),
            **common.logp_gap(rollouts, old_logps, range(len(rollouts.ids))),
        )
        run.log(step, record)
        run.stop_if_ungraded(step, verdicts)
        run.evaluate(step)
        run.save(step)
        run.exit_if_interrupted(step)
    run.finish()


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Args, EMBEDDED))

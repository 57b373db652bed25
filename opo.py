"""OPO: on-policy RL with the optimal reward baseline (https://arxiv.org/abs/2505.23585).

Objective, a mean over all completion tokens of a batch of fresh samples:
    b = sum_i l_i R_i / sum_i l_i                             length-weighted mean reward of a prompt's G samples
    A = R - b                                                 no division by the standard deviation
    L = -A log pi(o_t)                                        REINFORCE

Where b comes from. The gradient estimate is g (R - b) with g = grad log pi(o), and any b leaves its mean as it is. So
the variance is least where E[|g|^2 (R - b)^2] is: at b = E[|g|^2 R] / E[|g|^2]. A completion's g is a sum over its l
tokens; assume that the tokens' gradients are uncorrelated and of equal norm, and |g|^2 is proportional to l. With equal
lengths the plain mean is left: Dr.GRPO's baseline. In every group sum_i l_i A_i = 0: no push in total on the tokens of
a prompt.

Against grpo.py:
- advantages: the length-weighted baseline, and nothing but the baseline
- exactly on-policy: one optimizer step per batch, so there are no mini-batches, no old log-probs, no ratio and no clip
- no reference model and no KL: staying on-policy is what keeps the policy near its start

    python opo.py                                            # embedded model, no GPU, no network: minutes
    python opo.py --model Qwen/Qwen3-4B --data deepmath.jsonl --eval_data math500.jsonl
"""

from collections import Counter
from dataclasses import dataclass

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch

import bookkeeping
import common
from plumbing.errors import UserError, one_line_errors
from plumbing.options import RunArgs, option, parse

# Overrides of the defaults below when the embedded model runs.
EMBEDDED = dict(
    system_prompt="",
    max_steps=60,
    num_prompts=32,
    num_generations=4,
    learning_rate=2e-4,
    max_completion_length=64,
    micro_batch_tokens=1024,
    gradient_checkpointing=False,
    save_total_limit=0,
    save_steps=20,
)


@dataclass
class Args(RunArgs):
    output_dir: str = option("runs/opo", "folder of everything this run writes")
    max_steps: int = option(300, "steps; each samples a fresh batch", above=0)
    num_prompts: int = option(128, "prompts per step (P)", above=0)
    num_generations: int = option(8, "completions per prompt (G)", above=0)


def advantages(rewards, lengths):
    """Rewards [P, G] -> advantages [P, G]. lengths [P, G]: completion tokens under the mask of the loss.

    A group whose rewards are all equal says nothing about its samples: exactly 0, not float noise.
    """
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # [P, 1]
    baseline = (lengths * rewards).sum(1, keepdim=True) / lengths.sum(1, keepdim=True)
    A = rewards - baseline
    return A.masked_fill(equal, 0.0)


def loss(logps, advantages, mask):
    """REINFORCE, summed over tokens; main divides by the token count of the whole batch.

    logps, mask: [B, T]; advantages: [B, 1] or [B, T]. -> scalar. On-policy the ratio is 1 everywhere: there is nothing
    to clip, and its gradient is that of the log-prob.
    """
    return (-advantages * logps * mask).sum()


def main(args):
    if args.num_generations < 2:
        raise UserError(f"--num_generations {args.num_generations}: a group baseline needs at least 2")
    if args.model == "embedded":
        import sft

        sft.ensure_embedded()
    run = bookkeeping.Run(args)
    run.exit_if_finished()
    model, tokenizer, optimizer = run.load()
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
        A = advantages(rewards, rollouts.lengths.view(rewards.shape).cpu())
        A_rows = A.view(-1, 1).to(model.device)  # [B, 1], the same for every token of a completion
        run.lap("grading")

        # 2. One optimizer step. Log-probs are kept only to be compared with the sampler's.
        old_logps = torch.zeros_like(rollouts.logps)
        # A completion with advantage 0 has no gradient: it is skipped, but counted.
        live = [row for row, a in enumerate(A.flatten().tolist()) if a != 0]
        model.train()
        sums = Counter(tokens=0, trained_entropy=0.0)
        tokens = rollouts.mask.sum()  # the normaliser, known before the first backward
        for rows in common.micro_batches(rollouts, live, args.micro_batch_tokens):
            mask = rollouts.mask[rows]
            logps, entropy = common.completion_logps(model, rollouts, rows, args.temperature)
            entropy = entropy.detach()  # for the log only: its graph would hold [tokens, V] through backward
            old_logps[rows] = logps.detach()
            token_sum = loss(logps, A_rows[rows], mask)
            (token_sum / tokens).backward()
            sums.update(tokens=mask.sum().item(), trained_entropy=(entropy * mask).sum().item())
        if live:
            optimizer.step()
        run.lap("update")

        # 3. Log; evaluate and save where due.
        run.log_completions(step, problems, rollouts, verdicts, rewards, A)
        record = dict(
            **common.measure(rollouts, verdicts, rewards),
            tokens_per_second=rollouts.lengths.sum().item() / run.seconds(),
            phase="whole",
            **optimizer.summary(),
            **common.per_token(sums),
            **common.logp_gap(rollouts, old_logps, live),
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

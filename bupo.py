"""BuPO: bottom-up policy optimization (https://arxiv.org/abs/2512.19673).

A language model is a stack of policies: the residual stream H_k after any block k, times the unembedding matrix E_u, is
a distribution over the next token. For the first steps the policy of a low block is trained, then the whole one:
    pi_k = softmax(H_k E_u^T)                                 internal policy of block k, without final norm
    r = pi_k(o_t) / pi_k,old(o_t)      while step <= internal_steps,      pi(o_t) / pi_old(o_t) afterwards
    A and L as in grpo.py, copied below; samples and rewards always come from the whole policy

Against grpo.py:
- two options: which block (--internal_layer, 0-based: the paper's layer k + 1), for how many steps (--internal_steps)
- the forward pass ends at block k: the blocks above get no gradient, nor the final norm without --internal_norm
- phase one logs no log-prob gap: the samples are pi's, and the ratio compares pi_k with itself before the update
- two controls: is it which weights move (--internal_objective whole), is it the carried moments (--internal_reset)?

    python bupo.py                                           # embedded model, no GPU, no network: minutes
    python bupo.py --internal_steps 60 --output_dir runs/bupo_all    # phase one for ever: the paper's collapse
    python bupo.py --model Qwen/Qwen3-4B --data deepmath.jsonl --eval_data math500.jsonl
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch

import bookkeeping
import common
from plumbing.blocks import block_number, drop_gradients_above
from plumbing.errors import UserError, one_line_errors
from plumbing.models import load_model
from plumbing.options import RunArgs, option, parse

# Overrides of the defaults below when the embedded model runs.
EMBEDDED = dict(
    system_prompt="",
    max_steps=60,
    num_prompts=32,
    num_generations=4,
    num_minibatches=4,
    learning_rate=2e-4,
    max_completion_length=64,
    micro_batch_tokens=1024,
    gradient_checkpointing=False,
    save_total_limit=0,
    save_steps=20,
    internal_layer=5,
    internal_steps=15,
)


@dataclass
class Args(RunArgs):
    output_dir: str = option("runs/bupo", "folder of everything this run writes")
    max_steps: int = option(300, "steps; each samples a fresh batch", above=0)
    num_prompts: int = option(128, "prompts per step (P)", above=0)
    num_generations: int = option(8, "completions per prompt (G)", above=0)
    num_minibatches: int = option(
        4, "optimizer updates per step, each on num_prompts / num_minibatches prompts; 1 is on-policy", above=0
    )
    advantage: Literal["group_normalised", "group_centred", "leave_one_out", "batch_whitened"] = option(
        "group_normalised", "estimator: GRPO, Dr.GRPO, RLOO, REINFORCE++"
    )
    epsilon: float = option(0.2, "clip range of the ratio below 1, and above it without --epsilon_high", at_least=0)
    epsilon_high: float | None = option(None, "clip range of the ratio above 1 (clip-higher)", at_least=0)
    delta: float = option(10.0, "dual clip: a negative advantage weighs at most this many times; above 1", above=1)
    beta: float = option(0.0, "weight of the KL to the starting model; 0 loads no reference", at_least=0)
    internal_layer: str = option(5, "block whose policy phase one trains, 0-based (paper: layer 6), 'auto' or 'random'")
    internal_steps: int = option(30, "steps of phase one; 0 is GRPO (paper: 30 for Qwen3-4B, 20 else)", at_least=0)
    internal_norm: bool = option(False, "apply the final norm to the internal state, as the usual logit lens does")
    internal_objective: Literal["internal", "whole"] = option(
        "internal", "of phase one; whole is a control: the same weights move, for the sake of the whole policy"
    )
    internal_reset: bool = option(False, "a control: AdamW's moments begin anew when the whole policy's turn comes")


def advantages(rewards, lengths, estimator="group_normalised"):
    """Rewards [P, G] -> advantages [P, G]. lengths [P, G]: completion tokens under the mask of the loss.

    A group whose rewards are all equal says nothing about its samples: exactly 0, not float noise over 1e-6.
    """
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # [P, 1]
    centred = rewards - rewards.mean(1, keepdim=True)
    if estimator == "group_normalised":  # GRPO; std with n - 1
        A = centred / (rewards.std(1, keepdim=True) + 1e-6)
    elif estimator == "group_centred":  # Dr.GRPO: a std would weigh up prompts that are nearly always or never solved
        A = centred
    elif estimator == "leave_one_out":  # RLOO: the mean of the others as baseline, which keeps the gradient unbiased
        A = centred * rewards.shape[1] / (rewards.shape[1] - 1)
    else:  # batch_whitened, REINFORCE++: each token carries its sequence's reward, whitened over all the tokens
        equal = (rewards.max() == rewards.min()).expand_as(rewards)
        mean = (rewards * lengths).sum() / lengths.sum()
        var = (lengths * (rewards - mean) ** 2).sum() / (lengths.sum() - 1)
        A = (rewards - mean) * (var + 1e-8).rsqrt()
    return A.masked_fill(equal, 0.0)


def loss(logps, old_logps, advantages, mask, args, ref_logps=None):
    """Clipped surrogate, summed over tokens; main divides by the token count of the whole mini-batch.

    logps, old_logps, ref_logps, mask: [B, T]; advantages: [B, 1] or [B, T].
    Reads args.epsilon, epsilon_high, delta, beta. -> (scalar, metrics: sums over tokens).
    """
    # The clamp keeps exp finite: log-probs of an unconverged policy can be a hundred nats apart.
    ratio = torch.exp(torch.clamp(logps - old_logps, -20, 20))
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    surrogate = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - args.epsilon, 1 + epsilon_high)
    token_loss = torch.maximum(surrogate, clipped)
    # Dual clip: with A < 0 the surrogate is unbounded in r; beyond delta the token is given up.
    token_loss = torch.where(advantages < 0, torch.minimum(token_loss, -advantages * args.delta), token_loss)
    metrics = {
        "clip_share": ((clipped > surrogate) * mask).sum().item(),
    }
    if ref_logps is not None:
        # k3 of KL(pi || pi_ref): the expectation of exp(x) - x - 1 under pi, never negative.
        x = torch.clamp(ref_logps - logps, -20, 20)
        kl = torch.clamp(torch.exp(x) - x - 1, -10, 10)
        token_loss = token_loss + args.beta * kl
        metrics["reference_kl"] = (kl * mask).sum().item()
    return (token_loss * mask).sum(), metrics


def main(args):
    if args.num_generations < 2 and args.advantage != "batch_whitened":
        raise UserError(f"--num_generations {args.num_generations}: a group baseline needs at least 2")
    if args.num_prompts % args.num_minibatches:
        raise UserError(f"--num_minibatches {args.num_minibatches}: must divide --num_prompts")
    if args.model == "embedded":
        import sft

        sft.ensure_embedded()
    run = bookkeeping.Run(args)
    run.exit_if_finished()
    layer = args.internal_layer
    if layer == "auto":  # the last block whose feed-forward net adds entropy, in the starting model
        from analyze_entropy import auto_layer

        layer = auto_layer(args)
    model, tokenizer, optimizer = run.load()
    layer = block_number(model, layer, args)
    until = f"until step {args.internal_steps} of {args.max_steps}"
    if args.internal_objective == "internal":
        print(f"block {layer}'s policy is trained {until}, then the whole one")
    else:
        print(f"only what block {layer}'s policy depends on moves {until}")
    reference = None
    if args.beta > 0:
        reference, _ = load_model(args.model, args.device, args.dtype)
    run.open_folder()
    run.catch_signals()
    run.evaluate(0)

    for step, problems in run.steps():  # the next P problems of --data, shuffled; problem.ids: the tokens of its prompt
        # Whose policy is trained at this step: block k's first, then the whole one. Moments carry over, unless reset.
        internal = step <= args.internal_steps
        policy = {}
        if internal and args.internal_objective == "internal":
            policy = dict(layer=layer, norm=args.internal_norm)
        if args.internal_reset and step == args.internal_steps + 1:
            optimizer.forget_moments()

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
        A = advantages(rewards, rollouts.lengths.view(rewards.shape).cpu(), args.advantage)
        A_rows = A.view(-1, 1).to(model.device)  # [B, 1], the same for every token of a completion
        run.lap("grading")

        # A completion with advantage 0 has no gradient unless it is held to a reference: it is skipped, but counted.
        live = [row for row, a in enumerate(A.flatten().tolist()) if a != 0 or args.beta > 0]
        minibatches = torch.arange(len(A_rows)).chunk(args.num_minibatches)  # rows of whole groups
        micro_batches = []  # of each mini-batch
        for minibatch in minibatches:
            minibatch_live = [row for row in live if minibatch[0] <= row <= minibatch[-1]]
            micro_batches.append(common.micro_batches(rollouts, minibatch_live, args.micro_batch_tokens))

        # 2. Old log-probs, before the first update. The ratio must start at exactly 1, so they come from the training
        # path, in the update's micro-batches: others round differently. One mini-batch takes those of the update.
        old_logps = torch.zeros_like(rollouts.logps)
        model.train()
        if args.num_minibatches > 1:
            for rows in sum(micro_batches, []):
                with torch.no_grad():
                    old_logps[rows], _ = common.completion_logps(model, rollouts, rows, args.temperature, **policy)
        run.lap("old_logps")

        # 3. One optimizer step per mini-batch of whole groups.
        sums = Counter(tokens=0, trained_entropy=0.0, trained_logp=0.0, clip_share=0.0)
        for minibatch, batches in zip(minibatches, micro_batches):
            tokens = rollouts.mask[minibatch].sum()  # the normaliser, known before the first backward
            for rows in batches:
                mask = rollouts.mask[rows]
                logps, entropy = common.completion_logps(model, rollouts, rows, args.temperature, **policy)
                entropy = entropy.detach()  # for the log only: its graph would hold [tokens, V] through backward
                if args.num_minibatches == 1:
                    old_logps[rows] = logps.detach()
                ref_logps = None
                if reference is not None:
                    with torch.no_grad():
                        ref_logps, _ = common.completion_logps(reference, rollouts, rows, args.temperature, **policy)
                token_sum, metrics = loss(logps, old_logps[rows], A_rows[rows], mask, args, ref_logps)
                (token_sum / tokens).backward()
                sums.update(metrics)
                sums.update(tokens=mask.sum().item(), trained_entropy=(entropy * mask).sum().item())
                sums.update(trained_logp=(old_logps[rows] * mask).sum().item())
            if batches:
                if internal and not policy:
                    drop_gradients_above(model, layer, args.internal_norm)
                optimizer.step()
        run.lap("update")

        # 4. Log; evaluate and save where due.
        run.log_completions(step, problems, rollouts, verdicts, rewards, A)
        record = dict(
            **common.measure(rollouts, verdicts, rewards),
            tokens_per_second=rollouts.lengths.sum().item() / run.seconds(),
            phase="internal" if policy else "whole",
            **optimizer.summary(),
            **common.per_token(sums),
            **common.logp_gap(rollouts, old_logps, [] if policy else live),
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

"""PPO: proximal policy optimization (https://arxiv.org/abs/1707.06347) with a learned critic and generalized advantage
estimation (GAE, https://arxiv.org/abs/1506.02438).

Objective, a mean over all completion tokens of a mini-batch:
    V(s_t)                                                    the critic's value of the state before token t
    delta_t = r_t + gamma V(s_t+1) - V(s_t)                   the reward r_t is 0 but for the last token
    A_t = delta_t + gamma lam A_t+1                           GAE, then whitened over the batch's tokens
    L as in grpo.py, copied below; the critic learns to predict R_t = A_t + V(s_t), A_t before whitening

With gamma and lam 1, A_t is the reward minus V(s_t): REINFORCE++ with a baseline that is learned, token by token.

Against grpo.py:
- advantages: one for every token, from a critic; no group is compared, so one sample per prompt is enough
- value_loss: clipped like the ratio, with an optimizer and a learning rate of its own
- the critic starts as a copy of the model, its head replaced by one row of zeros; --critic_warmup trains it first
- --epochs: passes over a batch; log-probs and values before the first update are always computed

    python ppo.py                                            # embedded model, no GPU, no network: minutes
    python ppo.py --model Qwen/Qwen3-4B --data deepmath.jsonl --eval_data math500.jsonl
"""

from collections import Counter
from dataclasses import dataclass

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch

import bookkeeping
import common
from plumbing import distributed, sharding
from plumbing.errors import UserError, one_line_errors
from plumbing.models import load_critic, load_model
from plumbing.optimizer import Optimizer
from plumbing.options import RunArgs, option, parse

# Overrides of the defaults below when the embedded model runs.
EMBEDDED = dict(
    system_prompt="",
    max_steps=60,
    num_prompts=32,
    num_generations=4,
    num_minibatches=4,
    learning_rate=2e-4,
    critic_learning_rate=1e-3,
    max_completion_length=64,
    micro_batch_tokens=1024,
    gradient_checkpointing=False,
    save_total_limit=0,
    save_steps=20,
)


@dataclass
class Args(RunArgs):
    output_dir: str = option("runs/ppo", "folder of everything this run writes")
    max_steps: int = option(300, "steps; each samples a fresh batch", above=0)
    num_prompts: int = option(256, "prompts per step (P)", above=0)
    num_generations: int = option(4, "completions per prompt (G)", above=0)
    num_minibatches: int = option(
        4, "optimizer updates per step, each on num_prompts / num_minibatches prompts; 1 is on-policy", above=0
    )
    epochs: int = option(1, "passes over the mini-batches of a step", above=0)
    gamma: float = option(1.0, "discount of a reward per token", at_least=0, at_most=1)
    lam: float = option(1.0, "GAE's lambda: 1 trusts the reward, 0 the critic's next value", at_least=0, at_most=1)
    cliprange_value: float = option(0.5, "distance from its old value beyond which a value is clipped", above=0)
    critic_learning_rate: float = option(1e-5, "AdamW step size of the critic, constant", at_least=0)
    critic_warmup: int = option(0, "first steps in which only the critic is trained", at_least=0)
    epsilon: float = option(0.2, "clip range of the ratio below 1, and above it without --epsilon_high", at_least=0)
    epsilon_high: float | None = option(None, "clip range of the ratio above 1 (clip-higher)", at_least=0)
    delta: float = option(10.0, "dual clip: a negative advantage weighs at most this many times; above 1", above=1)
    beta: float = option(0.0, "weight of the KL to the starting model; 0 loads no reference", at_least=0)


@sharding.one_pass
def completion_values(critic, rollouts, rows):
    """Values before every completion token of some rows -> [n, T], aligned with rollouts.ids[rows], 0 outside the mask.

    Column t: the value of what stands before token t, read where the log-prob of token t is: out of column t - 1.
    """
    longest = int(rollouts.attention_mask[rows].sum(1).max())
    ids = rollouts.ids[rows, :longest]
    attention_mask = rollouts.attention_mask[rows, :longest]
    mask = rollouts.mask[rows].bool()
    hidden = common.hidden_states(critic, ids[:, :-1], attention_mask[:, :-1])[mask[:, 1:longest]]  # [N, D]
    return common.fill_mask(mask, common.head_logits(critic, hidden).squeeze(1))


def advantages(rewards, values, mask, gamma=1.0, lam=1.0):
    """Rewards [B] of whole completions, values and mask [B, T] -> advantages [B, T], not whitened.

    GAE (eqs. 11, 12 and 16): A_t = delta_t + gamma lam A_t+1. Behind the last token the value is 0, cut off or not.
    """
    last = mask.cumsum(1) == mask.sum(1, keepdim=True)  # true from the last token on
    token_rewards = rewards[:, None] * last * mask
    A = torch.zeros_like(values)
    A_next = torch.zeros_like(rewards)
    value_next = torch.zeros_like(rewards)
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * value_next - values[:, t]
        A_next = (delta + gamma * lam * A_next) * mask[:, t]
        value_next = values[:, t] * mask[:, t]
        A[:, t] = A_next
    return A


def whiten(A, mask):
    """Mean 0 and variance 1 over all the completion tokens of a batch; 0 elsewhere. [B, T] -> [B, T]."""
    mean = (A * mask).sum() / mask.sum()
    var = (mask * (A - mean) ** 2).sum() / (mask.sum() - 1).clamp(min=1)
    return (A - mean) * (var + 1e-8).rsqrt() * mask


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


def value_loss(values, old_values, returns, mask, cliprange_value):
    """Half the squared error of the critic, summed over tokens: the worse of the value and of the one that moved from
    its old one by cliprange_value at most. All [B, T] -> scalar."""
    clipped = old_values + torch.clamp(values - old_values, -cliprange_value, cliprange_value)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (error * mask).sum()


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over completion tokens: 1 foretells all, 0 no more than a constant does;
    None where all returns are equal."""
    tokens = mask.bool()
    spread = returns[tokens].var()
    if not spread > 1e-8:
        return None
    return (1 - (returns - values)[tokens].var() / spread).item()


def main(args):
    if args.num_prompts % args.num_minibatches:
        raise UserError(f"--num_minibatches {args.num_minibatches}: must divide --num_prompts")
    if args.model == "embedded":
        import sft

        sft.ensure_embedded()
    run = bookkeeping.Run(args)
    run.exit_if_finished()
    model, tokenizer, optimizer = run.load()
    reference = None
    if args.beta > 0:
        reference, _ = load_model(args.model, args.device, args.dtype)
    critic = load_critic(args)
    critic_optimizer = Optimizer(critic, args)
    run.carry("critic", critic_optimizer)
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

        # Every completion has a gradient: its values are far from its reward, if not its log-probs.
        live = list(range(len(rollouts.ids)))
        minibatches = torch.arange(len(live)).chunk(args.num_minibatches)  # rows of whole groups
        micro_batches = []  # of each mini-batch
        for minibatch in minibatches:
            micro_batches.append(common.micro_batches(rollouts, minibatch.tolist(), args.micro_batch_tokens))

        # 2. Old log-probs, before the first update. The ratio must start at exactly 1, so they come from the training
        # path, in the update's micro-batches: others round differently. Old values, and with them the advantages.
        old_logps = torch.zeros_like(rollouts.logps)
        old_values = torch.zeros_like(rollouts.logps)
        model.train()
        critic.train()
        for rows in sum(micro_batches, []):
            with torch.no_grad():
                old_logps[rows], _ = common.completion_logps(model, rollouts, rows, args.temperature)
                old_values[rows] = completion_values(critic, rollouts, rows)
        old_values = distributed.summed(old_values)  # a process has read some of the rows
        R = rewards.flatten().to(model.device)  # [B]
        A_rows = advantages(R, old_values, rollouts.mask, args.gamma, args.lam)  # [B, T]
        returns = A_rows + old_values
        A_rows = whiten(A_rows, rollouts.mask)
        run.lap("old_logps")

        # 3. One optimizer step per mini-batch of whole groups, and one of the critic.
        warming_up = step <= args.critic_warmup
        sums = Counter(tokens=0, trained_entropy=0.0, clip_share=0.0, value_loss=0.0)
        for minibatch, batches in args.epochs * list(zip(minibatches, micro_batches)):
            tokens = rollouts.mask[minibatch].sum()  # the normaliser, known before the first backward
            for rows in batches:
                mask = rollouts.mask[rows]
                logps, entropy = common.completion_logps(model, rollouts, rows, args.temperature)
                entropy = entropy.detach()  # for the log only: its graph would hold [tokens, V] through backward
                ref_logps = None
                if reference is not None:
                    with torch.no_grad():
                        ref_logps, _ = common.completion_logps(reference, rollouts, rows, args.temperature)
                token_sum, metrics = loss(logps, old_logps[rows], A_rows[rows], mask, args, ref_logps)
                if not warming_up:
                    (token_sum / tokens).backward()
                values = completion_values(critic, rollouts, rows)
                value_sum = value_loss(values, old_values[rows], returns[rows], mask, args.cliprange_value)
                (value_sum / tokens).backward()
                sums.update(metrics)
                sums.update(value_loss=value_sum.item())
                sums.update(tokens=mask.sum().item(), trained_entropy=(entropy * mask).sum().item())
            critic_optimizer.step(args.critic_learning_rate)
            if not warming_up:
                optimizer.step()
        run.lap("update")

        # 4. Log; evaluate and save where due.
        A = (A_rows.sum(1) / rollouts.lengths).view(rewards.shape)  # the mean over a completion's tokens
        run.log_completions(step, problems, rollouts, verdicts, rewards, A)
        record = dict(
            **common.measure(rollouts, verdicts, rewards),
            tokens_per_second=rollouts.lengths.sum().item() / run.seconds(),
            phase="warm-up" if warming_up else "whole",
            **optimizer.summary(),
            **common.per_token(sums),
            critic_grad_norm=critic_optimizer.summary()["grad_norm"],
            explained_variance=explained_variance(old_values, returns, rollouts.mask),
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

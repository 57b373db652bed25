"""What all algorithms stand on, in the order in which a batch lives: sample, grade, log-probs, micro-batches, measure.

An algorithm file and this one say how every number of a weight update came about. What they call beyond is named for
what it does: `encode` turns a prompt into token ids by the chat template, `backbone_of(model)` is the model without its
head (its blocks `layers` and its final `norm`), `growing_cache` keeps keys and values of the tokens read so far, and
`optimizer.step()` scales the gradient down to --max_grad_norm, takes an AdamW step in fp32 and clears the gradients.
Where torchrun has started several processes, `distributed` and `sharding` deal work and weights out; in one, nothing.

Shapes, here and everywhere: B sequences, P prompts, G samples per prompt (B = P*G, prompt-major: all samples of prompt
0 first), T tokens, V vocabulary, L layers, D width. Natural logarithms; entropies in nats.

Every [B, T] tensor of a rollout is aligned with `ids`: column t belongs to token ids[:, t]. The logits that predict
this token come out of column t-1, so a forward pass over ids[:, :-1] scores the targets ids[:, 1:].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from plumbing import distributed, sharding, verifier
from plumbing.errors import UserError
from plumbing.kv_cache import growing_cache
from plumbing.models import backbone_of, encode, end_token_ids
from plumbing.precision import fp32_product
from plumbing.rewards import rewards_of
from plumbing.rollouts import masked_mean
from plumbing.shared_prompts import read_prompts_once, saves_tokens

PREFILL_TOKENS = 2**15  # prompt tokens read in one pass of `prefill`: bounds its memory
CHUNK_LOGITS = 2**26  # logits alive at once in `token_logps`: 256 MiB in fp32

# 1. Sample ------------------------------------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """B completions behind their prompts, right-padded. All [B, T] tensors are aligned with ids."""

    ids: torch.Tensor  # [B, T] prompt, completion, padding
    attention_mask: torch.Tensor  # [B, T] 1 on prompt and completion; from lengths, never from ids != pad
    mask: torch.Tensor  # [B, T] 1.0 on completion tokens up to and including the first end token
    lengths: torch.Tensor  # [B] completion tokens = mask.sum(1)
    finished: torch.Tensor | None = None  # [B] bool: ended by an end token, not by the length limit
    logps: torch.Tensor | None = None  # [B, T] log-prob of each completion token when it was sampled, 0 elsewhere
    entropy: torch.Tensor | None = None  # [B, T] entropy of the distribution it was sampled from, 0 elsewhere
    texts: list[str] | None = None  # completions without special tokens
    seed: int = 0  # that they were sampled with


def assemble(prompts, completions, pad, device):
    """B prompts and B completions, lists of token ids -> Rollouts with ids, masks and lengths."""
    ids = []
    mask = []
    for prompt, completion in zip(prompts, completions):
        ids.append(torch.tensor(prompt + completion))
        mask.append(torch.tensor([0.0] * len(prompt) + [1.0] * len(completion)))
    attention_mask = [torch.ones_like(row) for row in ids]
    ids = pad_sequence(ids, batch_first=True, padding_value=pad or 0).to(device)
    attention_mask = pad_sequence(attention_mask, batch_first=True).to(device)
    mask = pad_sequence(mask, batch_first=True).to(device)
    return Rollouts(ids, attention_mask, mask, lengths=mask.sum(1).long())


@torch.no_grad()
@sharding.with_whole_weights
def sample(model, tokenizer, prompts, n, max_completion_length, temperature=1.0, max_rollout_tokens=2**18, seed=0):
    """n completions per prompt from the policy itself -> Rollouts with B = len(prompts) * n rows, prompt-major.

    prompts: texts, chat messages or token ids. temperature 0 is greedy (its log-probs are those at temperature 1).
    The distribution is softmax(logits / temperature) and no other, whatever the model's generation_config says, because
    the loss differentiates this one. The same seed gives the same samples. Raises UserError when GPU memory runs out.

    Rows are decoded in waves of at most max_rollout_tokens tokens. While other rows wait, a wave of which half has
    finished stops; its unfinished rows go on in a later wave. So a few long rows do not keep the others waiting.
    """
    prompts = [encode(tokenizer, prompt) for prompt in prompts for _ in range(n)]  # B, prompt-major
    contexts = [list(prompt) for prompt in prompts]  # the prompt, and the completion as far as it is sampled
    ends = [len(prompt) + max_completion_length for prompt in prompts]  # no context grows longer
    generator = torch.Generator(model.device).manual_seed(seed)
    size = (len(prompts), max_completion_length)  # a number for every token: the same in whatever wave it is decoded
    noise = torch.rand(size, generator=generator, device=model.device, dtype=torch.float64)
    rows_at_once = max(1, max_rollout_tokens // max(ends))
    room = rows_at_once * max(ends)  # tokens, padding included, that the cache may hold
    stop = end_token_ids(model, tokenizer)
    was_training = model.training
    model.eval()  # with gradient checkpointing, a model in training mode silently drops its cache and samples garbage
    waiting = distributed.share(range(len(prompts)), n)  # every process samples the answers to some of the prompts
    waves = []
    try:
        while waiting:
            rows = waiting[:rows_at_once]
            waiting = waiting[rows_at_once:]
            few = rows_at_once // 2 if waiting else 0
            steps = sample_wave(model, contexts, ends, rows, few, room, temperature, stop, noise)
            wave = concatenate(steps)
            waves.append(wave)
            for row, token in zip(wave[0].tolist(), wave[1].tolist()):
                contexts[row].append(token)
            for row in rows:
                if contexts[row][-1] not in stop and len(contexts[row]) < ends[row]:
                    waiting.append(row)
    except torch.OutOfMemoryError:
        raise UserError("out of GPU memory while sampling: repeat the command with a lower --max_rollout_tokens")
    finally:
        model.train(was_training)

    rows, tokens, logps, entropy = distributed.gathered(concatenate(waves), model.device)
    order = rows.argsort(stable=True)  # row after row; stable: the tokens of a row stay in order
    completions = [row.tolist() for row in tokens[order].cpu().split(rows.bincount().tolist())]
    rollouts = assemble(prompts, completions, tokenizer.pad_token_id, model.device)
    rollouts.logps = fill_mask(rollouts.mask, logps[order])
    rollouts.entropy = fill_mask(rollouts.mask, entropy[order])
    rollouts.finished = torch.tensor([completion[-1] in stop for completion in completions], device=model.device)
    rollouts.seed = seed
    rollouts.texts = [tokenizer.decode(completion, skip_special_tokens=True) for completion in completions]
    return rollouts


def sample_wave(model, contexts, ends, rows, few, room, temperature, stop, noise):
    """Decode some rows from their contexts on, up to ends[row] tokens: until no more than `few` of them go on, or the
    cache would hold more than `room` tokens, padding included. A finished row leaves the batch.

    Yields for every decoding step four tensors of equal length: the rows that got a token, these tokens, their
    log-probs, and the entropies of the distributions they were sampled from.
    """
    cache, hidden, attention_mask = prefill(model, [contexts[row] for row in rows], room)
    left = torch.tensor([ends[row] - len(contexts[row]) for row in rows], device=model.device)
    rows = torch.tensor(rows, device=model.device)
    stop = torch.tensor(stop, dtype=torch.long, device=model.device)
    step = 0
    while True:
        step += 1
        tokens, logps, entropy = sample_tokens(model, hidden, temperature, noise[rows, step - 1 - left])
        yield rows, tokens, logps, entropy
        goes_on = ~torch.isin(tokens, stop) & (left > step)
        keep = goes_on.nonzero().squeeze(1)
        columns = attention_mask.shape[1] + 1
        if len(keep) <= few or len(keep) * columns > room:
            return
        if len(keep) < len(rows):
            rows = rows[keep]
            left = left[keep]
            tokens = tokens[keep]
            attention_mask = attention_mask[keep]
            cache.batch_select_indices(keep)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
        hidden = run_blocks(model, tokens[:, None], attention_mask, cache)[:, -1]


def prefill(model, contexts, room):
    """Read B contexts (lists of token ids) into a cache -> (cache, hidden [B, D], attention_mask [B, T]).

    hidden is the state of every last token, which predicts the next one. Equal contexts, such as the G copies of a
    prompt, are read once. Padding is on the left, so that every context ends in the last column.
    """
    unique = {}  # context -> its place among those that are read
    for context in contexts:
        unique.setdefault(tuple(context), len(unique))
    owner = torch.tensor([unique[tuple(context)] for context in contexts], device=model.device)
    tokens = [torch.tensor(context) for context in unique]
    ones = [torch.ones_like(context) for context in tokens]
    ids = pad_sequence(tokens, batch_first=True, padding_side="left").to(model.device)
    attention_mask = pad_sequence(ones, batch_first=True, padding_side="left").to(model.device)
    cache = growing_cache(model, room)
    width = max(1, PREFILL_TOKENS // len(unique))
    for start in range(0, ids.shape[1], width):
        hidden = run_blocks(model, ids[:, start : start + width], attention_mask[:, : start + width], cache)
    cache.batch_select_indices(owner)
    return cache, hidden[owner, -1], attention_mask[owner]


def sample_tokens(model, hidden, temperature, noise):
    """hidden [B, D], noise [B] in [0, 1) -> next tokens, their log-probs and the entropies sampled from, [B] each."""
    logps = F.log_softmax(head_logits(model, hidden) / (temperature or 1.0), dim=-1)  # [B, V]
    probs = logps.exp()
    entropy = -(probs * logps).sum(-1)
    if not entropy.isfinite().all():
        raise UserError("the policy's probabilities are not finite: its training diverged; lower --learning_rate")
    if temperature > 0:
        # The first token at which the probabilities, added up, exceed the noise. (fp32 would round rare tokens away.)
        sums = probs.cumsum(-1, dtype=torch.float64)  # [B, V]
        tokens = torch.searchsorted(sums, noise[:, None] * sums[:, -1:], right=True)
    else:
        tokens = logps.argmax(-1, keepdim=True)
    return tokens.squeeze(1), logps.gather(1, tokens).squeeze(1), entropy


def concatenate(steps):
    """Tuples of tensors, the same kinds in each -> a list with one long tensor for each kind."""
    return [torch.cat(kind) for kind in zip(*steps)]


# 2. Grade -------------------------------------------------------------------------------------------------------------

REWARDS = {"right": 1.0, "well-formed": 0.1}  # of a verdict; every other earns 0.0


def judge(texts, problems, finished, grade_timeout=3.0):
    """Verdicts on B answers: 'right', 'wrong', in some tasks 'well-formed', or what kept the verifier from a verdict
    ('unparsable' gold, 'timeout' after grade_timeout seconds, 'error').

    An unfinished answer (cut at the length limit) is wrong. A task may judge its answers itself (`problem.verdict`). In
    all others math-verify compares the content of the last \\boxed{} with the gold answer; nothing else in it counts.
    """
    verdicts = ["wrong"] * len(texts)
    comparisons = {}  # row -> (gold, answer)
    for row, (text, problem, done) in enumerate(zip(texts, problems, finished, strict=True)):
        if not done:
            continue
        verdict = problem.verdict(text)
        if verdict is not None:
            verdicts[row] = verdict
            continue
        answer = problem.final_answer(text)
        if problem.answer and answer:
            comparisons[row] = (problem.answer, answer)
    found = distributed.divided(verifier.compare, list(comparisons.values()), grade_timeout)
    for row, verdict in zip(comparisons, found):
        verdicts[row] = verdict
    return verdicts


def grade_rollouts(rollouts, problems, grade_timeout=3.0, reward="right"):
    """Rollouts of B = P*G rows, prompt-major over the P problems -> (verdicts, a list of B; rewards [P, G]). reward:
    what earns it, as --reward says; all but 'right' leave the verdicts as they are."""
    G = len(rollouts.texts) // len(problems)
    problem_of_row = [problem for problem in problems for _ in range(G)]
    verdicts = judge(rollouts.texts, problem_of_row, rollouts.finished, grade_timeout)
    right = [REWARDS.get(verdict, 0.0) for verdict in verdicts]
    rewards = torch.tensor(rewards_of(reward, right, rollouts, problem_of_row, G))
    return verdicts, rewards.view(len(problems), G)


# 3. Log-probs: the whole policy, and the lens that reads the policy of any block --------------------------------------


def run_blocks(model, ids, attention_mask, cache=None, prompt_lengths=None):
    """The backbone's output for `ids`, after its norm -> [B, T, D]. With a cache, `ids` are only the newest columns.

    Positions are counted over real tokens only, so that padding on either side shifts nothing. Padding on the right
    needs no mask, and the fastest kernels take none. (In fp32 on CUDA only those with a mask do without a matrix of all
    scores.) prompt_lengths, a list of B: on a CPU a prompt that rows share is read once for all, where that pays.
    """
    backbone = backbone_of(model)
    if cache is None and not (ids.is_cuda and model.dtype == torch.float32):
        never_rises = attention_mask.cummin(-1).values == attention_mask  # 1s, then 0s: padding only on the right
        if never_rises.all():
            if prompt_lengths is not None and saves_tokens(model, ids, attention_mask, prompt_lengths):
                return read_prompts_once(backbone, ids, attention_mask, prompt_lengths)
            return backbone(input_ids=ids, use_cache=False).last_hidden_state
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return backbone(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=positions,
        cache=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def hidden_states(model, input_ids, attention_mask, layer=None, norm=False, prompt_lengths=None):
    """The residual stream that a policy reads -> [B, T, D]. prompt_lengths: as in `run_blocks`.

    layer=None: after the last block and the final norm, what the head reads. layer=k, 0-based: the raw stream after
    block k (the BuPO paper's layer k + 1), running blocks 0..k only; norm=True: the final norm applied, the usual logit
    lens. So layer=L-1 with norm=True is layer=None; layer=k < L-1 is transformers' output_hidden_states[k + 1], whose
    last entry is already normed. Raises UserError for a layer that is not there.
    """
    if layer is None:
        return run_blocks(model, input_ids, attention_mask, prompt_lengths=prompt_lengths)
    backbone = backbone_of(model)
    layers = backbone.layers
    final_norm = backbone.norm
    if not 0 <= layer < len(layers):
        raise UserError(f"layer {layer}: this model has blocks 0 to {len(layers) - 1}")
    # Cut the backbone for this one pass: nothing above block `layer` runs, is stored, is recomputed under gradient
    # checkpointing, or gets a gradient. Its grad stays None, so that the optimizer leaves it as it is.
    backbone.layers = layers[: layer + 1]
    if not norm:
        backbone.norm = torch.nn.Identity()
    try:
        return run_blocks(model, input_ids, attention_mask, prompt_lengths=prompt_lengths)
    finally:
        backbone.layers = layers
        backbone.norm = final_norm


def head_logits(model, hidden):
    """hidden [N, D] -> fp32 logits [N, V] under the unembedding matrix, before any temperature."""
    head = model.get_output_embeddings()
    logits = fp32_product(hidden, head.weight)
    if head.bias is not None:
        logits = logits + head.bias.float()
    return logits


def token_logps(model, hidden, targets, temperature=1.0):
    """Log-prob of every target and entropy of every distribution, fp32 nats, differentiable in both.

    hidden [B, T, D], targets [B, T] -> (logps [B, T], entropy [B, T]). Never shifts: column t of hidden predicts column
    t of targets; callers pass hidden[:, :-1] and ids[:, 1:]. The distribution is softmax(logits / temperature), the one
    that was sampled from. Head and log-softmax run in chunks that the backward pass recomputes: no [B, T, V] is kept.
    """

    def score(hidden, targets):  # [n, D], [n] -> [n], [n]
        logps = F.log_softmax(head_logits(model, hidden) / temperature, dim=-1)  # [n, V]
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, targets[:, None]).squeeze(-1), entropy

    size = max(1, CHUNK_LOGITS // model.get_output_embeddings().weight.shape[0])
    chunks = []
    for chunk_hidden, chunk_targets in zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size)):
        chunks.append(checkpoint(score, chunk_hidden, chunk_targets, use_reentrant=False))
    logps, entropy = concatenate(chunks)
    return logps.view(targets.shape), entropy.view(targets.shape)


@sharding.one_pass
def completion_logps(model, rollouts, rows, temperature, layer=None, norm=False):
    """Log-probs and entropies of the completion tokens of some rows, under the whole policy or that of block `layer`.

    rows: n indices into the batch -> (logps [n, T], entropy [n, T]), aligned with rollouts.ids[rows], 0 outside the
    mask. The rows are cut to their longest, and only the positions that predict a completion token meet the head.
    """
    longest = int(rollouts.attention_mask[rows].sum(1).max())
    ids = rollouts.ids[rows, :longest]
    attention_mask = rollouts.attention_mask[rows, :longest]
    mask = rollouts.mask[rows].bool()
    predicts = mask[:, 1:longest]  # column t of the hidden states predicts token t + 1
    targets = ids[:, 1:][predicts]  # [N]
    prompt_lengths = (rollouts.attention_mask[rows].sum(1) - rollouts.lengths[rows]).tolist()
    hidden = hidden_states(model, ids[:, :-1], attention_mask[:, :-1], layer, norm, prompt_lengths)  # [n, T - 1, D]
    logps, entropy = token_logps(model, hidden[predicts][None], targets[None], temperature)
    return fill_mask(mask, logps), fill_mask(mask, entropy)


def fill_mask(mask, values):
    """N values, all those of row 0 first, to the N places [B, T] where the mask is 1; 0.0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask.bool(), values)


# 4. Micro-batches -----------------------------------------------------------------------------------------------------


def micro_batches(rollouts, rows, budget):
    """Split row indices into lists of at most `budget` tokens each, padding included; similar lengths go together."""
    lengths = rollouts.attention_mask.sum(1).tolist()
    longest_first = sorted(rows, key=lambda row: (-lengths[row], row))
    batches = []
    batch = []
    for row in distributed.share(longest_first):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:  # the first of a batch is its longest
            batches.append(batch)
            batch = []
        batch.append(row)
    if batch:
        batches.append(batch)
    return distributed.in_step(batches)


# 5. What is measured --------------------------------------------------------------------------------------------------


def summary(rollouts, verdicts):
    """What training steps and evaluations both log of a batch of B answers. verdicts: a list of B -> dict of floats."""
    return dict(
        accuracy=verdicts.count("right") / len(verdicts),
        response_length=rollouts.lengths.float().mean().item(),
        truncated_share=(~rollouts.finished).float().mean().item(),
        entropy=masked_mean(rollouts.entropy, rollouts.mask),
    )


def measure(rollouts, verdicts, rewards):
    """What a training step logs of its B samples, whatever is trained. verdicts: a list of B; rewards [P, G]."""
    right = torch.tensor([verdict == "right" for verdict in verdicts])
    lengths = rollouts.lengths.float().cpu()
    equal = rewards.amax(1) == rewards.amin(1)  # [P]
    return dict(
        reward=rewards.mean().item(),
        **summary(rollouts, verdicts),
        grader_timeouts=verdicts.count("timeout"),
        grader_errors=verdicts.count("error"),
        unparsable_golds=verdicts.count("unparsable"),
        length_right=lengths[right].mean().item() if right.any() else None,
        length_wrong=lengths[~right].mean().item() if not right.all() else None,
        zero_variance_share=equal.float().mean().item(),
    )


def per_token(sums):
    """Sums over tokens, and their number under 'tokens' -> means by name; None where no token was trained."""
    sums = distributed.summed(sums)
    tokens = sums["tokens"]
    means = {}
    for name, total in sums.items():
        if name != "tokens":
            means[name] = total / tokens if tokens else None
    return means


def logp_gap(rollouts, logps, rows):
    """Mean and largest distance, in nats, between the sampler's and the training path's log-probs over some rows'
    completion tokens. What is sampled must be what is trained, so only rounding may remain. None without rows."""
    if not rows:
        return dict(logp_gap=None, logp_gap_max=None)
    mask = rollouts.mask[rows]
    gap = (distributed.summed(logps) - rollouts.logps)[rows].abs() * mask
    return dict(logp_gap=masked_mean(gap, mask), logp_gap_max=gap.max().item())


def evaluate(model, tokenizer, problems, n, temperature=1.0, max_completion_length=8192, grade_timeout=3.0, **sampling):
    """Sample n answers per problem and score them -> dict: accuracy (mean over all answers, avg@n), response_length
    (tokens), entropy (nats per token), truncated_share, verdicts (a list of P*n), rewards [P, n], and the rollouts
    themselves. sampling: further arguments of `sample`."""
    prompts = [problem.ids or problem.prompt for problem in problems]
    rollouts = sample(model, tokenizer, prompts, n, max_completion_length, temperature, **sampling)
    verdicts, rewards = grade_rollouts(rollouts, problems, grade_timeout)
    return dict(**summary(rollouts, verdicts), verdicts=verdicts, rewards=rewards, rollouts=rollouts)

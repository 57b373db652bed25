"""Look inside: the entropy of every internal policy of a language model (BuPO, https://arxiv.org/abs/2512.19673).

The residual stream S is a sum, and any part of it, read through the unembedding matrix E_u, is a distribution over the
next token. With H[x] the entropy of softmax(x E_u^T) in nats, averaged over completion tokens, block k has:
    M_k = S_k-1 + A_k,   S_k = M_k + F_k                      attention adds A_k to the stream, the feed-forward net F_k
    dH_layer = H[S_k] - H[S_k-1]                              S_k: the internal layer policy that bupo.py trains
    dH_attn  = H[A_k] - H[norm1_k(S_k-1)]                     a module is compared with what it read: the stream behind
    dH_ffn   = H[F_k] - H[norm2_k(M_k)]                       the block's own norm
    KL(pi_k || pi),  argmax pi_k = o_t,  cos(A_k, S_k-1),  cos(F_k, M_k)

Blocks are 0-based as in the code: block k is the paper's layer k + 1. In entropy.json S_k-1, M_k, S_k, A_k, F_k are called
resid_pre, resid_mid, resid_post, attn_out, mlp_out, and what the modules read attn_in, mlp_in. The state that predicts
token t sits at position t - 1; the first completion token and the end token count. --norm puts the same numbers with the
model's final norm applied to every activation (the usual logit lens) beside them, under names that start with normed_.

    python analyze_entropy.py                                # the embedded model, no GPU, no network: seconds
    python analyze_entropy.py runs/tiny runs/bupo            # before and after training
    python analyze_entropy.py runs/tiny runs/bupo/checkpoint-*
    python analyze_entropy.py Qwen/Qwen3-4B --data math500.jsonl --num_samples 100
"""

import argparse
import contextlib
import json
import math
import re
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import UserError

# Overrides of the defaults in `parse` when only embedded models are analysed.
EMBEDDED = dict(data="arithmetic", system_prompt="", max_completion_length=64)

# A change within this share of the largest one, of either sign, is no change. Relative, because the scale differs fifty-fold
# between families: the paper's figures span +4 to -10 nats for Qwen3-4B and +-0.2 for Llama.
TOLERANCE = 0.02

# Positions projected at once. Head, log-softmax and entropy of a chunk follow each other while it is in the caches.
CHUNK_TOKENS = 128

# dH: entropy of what comes out minus entropy of what goes in.
CHANGES = {"layer": ("resid_post", "resid_pre"), "attn": ("attn_out", "attn_in"), "ffn": ("mlp_out", "mlp_in")}

# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def blocks_of(model):
    """The L blocks of a model. Raises UserError naming the class if they lack a part that is hooked here."""
    blocks = common.backbone_of(model).layers
    for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
        if not all(hasattr(block, name) for block in blocks):
            raise UserError(f"{type(model).__name__}: its blocks have no {name}; use a Qwen2-, Qwen3- or Llama-like model")
    return blocks


@contextlib.contextmanager
def watch(blocks, positions, visit):
    """While this context lasts, a forward pass calls visit(k, at) behind every block k, lowest first.

    positions [N]: where to look, indices into the B*T positions of the batch. at: label -> [N, D], for the seven labels of
    the module docstring. `at` serves one block: what visit does not keep is freed before the next block is through.
    """
    at, handles = {}, []

    def gather(after, before=None):
        def hook(module, inputs, output):
            if before:
                at[before] = inputs[0].flatten(0, 1)[positions]
            at[after] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)[positions]

        return hook

    def leave(k):
        def hook(module, inputs, output):
            visit(k, at)
            at.clear()

        return hook

    for k, block in enumerate(blocks):
        handles += [
            block.input_layernorm.register_forward_hook(gather("attn_in", "resid_pre")),
            block.self_attn.register_forward_hook(gather("attn_out")),
            block.post_attention_layernorm.register_forward_hook(gather("mlp_in", "resid_mid")),
            block.mlp.register_forward_hook(gather("mlp_out")),
            block.register_forward_hook(gather("resid_post")),
            block.register_forward_hook(leave(k)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def analyze(model, rollouts, temperature=1.0, norm=False, micro_batch_tokens=2**17, answer=0):
    """Measure every internal policy, softmax(logits / temperature), on the completion tokens of rollouts: token means.

    -> dict: tokens; final_entropy and final_top_is_sampled, of the whole policy; layers: a dict of floats per block;
    heat: for each lens, '' and with `norm` 'normed_', entropy and top token id, [L + 2][T], of row `answer` of rollouts:
    under the embedding, after blocks 0 to L-1, under the whole policy.

    One forward pass per batch, each activation projected once. What a module reads and adds is reduced to sums behind its
    own block. The stream after each block has to wait for the end of the pass: its KL needs the whole policy, which comes
    last. (A second pass would free that memory, L + 1 states a token, for the price of the blocks.) So a batch holds
    micro_batch_tokens / L tokens, at least one answer, and the peak grows neither with depth nor with the samples.
    """
    blocks, final_norm = blocks_of(model), common.backbone_of(model).norm
    L, lenses = len(blocks), {"": lambda states: states} | ({"normed_": final_norm} if norm else {})
    # Sums over tokens of fp32 values, kept in fp64 by name and depth. Depth 0: embedding, k + 1: block k, L + 1: whole policy.
    sums = defaultdict(lambda: torch.zeros(L + 2, dtype=torch.float64, device=model.device))
    heat = {lens: {name: [[] for _ in range(L + 2)] for name in ("entropy", "top")} for lens in lenses}

    def logits(states):  # [n, D] -> [n, V], fp32
        return common.head_logits(model, states).div_(temperature)

    def policy(states):  # [n, D] -> probabilities [n, V], entropy [n]
        z = logits(states)
        z -= z.amax(-1, keepdim=True)
        p = z.softmax(-1)
        # log p = z + log p_top, since the top logit is 0 now. This takes half the time of log_softmax and exp, next to
        # the product with the head; both terms have one sign, so that nothing cancels.
        return p, -(p.amax(-1).log() + z.mul_(p).sum(-1))

    def visit(k, at):
        for before, added, after in (("resid_pre", "attn_out", "resid_mid"), ("resid_mid", "mlp_out", "resid_post")):
            if (at[before] + at[added] - at[after]).norm() > 0.01 * at[after].norm():  # scaled or normed on the way
                raise UserError(
                    f"{type(model).__name__}: in block {k}, {before} + {added} is not {after}, so that its numbers would "
                    "be wrong; use a Qwen2-, Qwen3- or Llama-like model"
                )
            cosine = F.cosine_similarity(at[added].float(), at[before].float(), dim=-1)
            sums[f"cosine_{added}"][k + 1] += cosine.sum(dtype=torch.float64)
        stream.extend([at["resid_pre"], at["resid_post"]] if k == 0 else [at["resid_post"]])
        for label in ("attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out"):
            for states in at[label].split(CHUNK_TOKENS):
                for lens, apply in lenses.items():
                    sums[f"{lens}entropy_{label}"][k + 1] += policy(apply(states))[1].sum(dtype=torch.float64)

    batches = common.micro_batches(rollouts, range(len(rollouts.ids)), micro_batch_tokens // L)
    for rows in tqdm(batches, desc="forward passes", leave=False):
        used = rollouts.attention_mask[rows].any(0)  # columns that hold a token, whichever side is padded
        ids, attention_mask, mask = (x[rows][:, used] for x in (rollouts.ids, rollouts.attention_mask, rollouts.mask))
        predicts = mask[:, 1:].bool()  # column t of the states predicts token t + 1
        targets, owner = ids[:, 1:][predicts], predicts.nonzero()[:, 0]  # [N] the predicted token and its row
        stream = []  # [N, D] each: the embedding, then the stream after block 0, 1, ..., L-1
        with watch(blocks, predicts.flatten().nonzero()[:, 0], visit):
            common.hidden_states(model, ids[:, :-1], attention_mask[:, :-1])
        for piece in torch.arange(len(targets), device=ids.device).split(CHUNK_TOKENS):
            final_logps = F.log_softmax(logits(final_norm(stream[L][piece])), dim=-1)  # [n, V]
            final = final_logps.exp(), -(final_logps.exp() * final_logps).sum(-1)
            for depth in range(L + 2):
                for lens, apply in lenses.items():
                    known = depth > L or (depth == L and apply is final_norm)
                    p, entropy = final if known else policy(apply(stream[depth][piece]))
                    top = p.argmax(-1)
                    kl = -entropy - (p * final_logps).sum(-1)  # sum p (log p - log p_final)
                    for name, values in (
                        ("entropy_resid_post", entropy),
                        ("kl_to_final", kl),
                        ("top_is_sampled", top == targets[piece]),
                    ):
                        sums[lens + name][depth] += values.sum(dtype=torch.float64)
                    if answer in rows:
                        shown = owner[piece] == rows.index(answer)
                        heat[lens]["entropy"][depth] += entropy[shown].tolist()
                        heat[lens]["top"][depth] += top[shown].tolist()

    mean = {name: (total / rollouts.mask.sum()).tolist() for name, total in sums.items()}
    for lens in lenses:
        mean[f"{lens}entropy_resid_pre"] = [None, *mean[f"{lens}entropy_resid_post"]]  # what a block reads, one below
        for change, (after, before) in CHANGES.items():
            pair = zip(mean[f"{lens}entropy_{after}"][1:-1], mean[f"{lens}entropy_{before}"][1:])
            mean[f"{lens}dH_{change}"] = [None, *(after - before for after, before in pair)]
    layers = [dict(layer=k) | {name: mean[name][k + 1] for name in sorted(mean)} for k in range(L)]
    final = {f"final_{name}": mean[key][-1] for name, key in (("entropy", "entropy_resid_post"), ("top_is_sampled",) * 2)}
    return dict(tokens=int(rollouts.mask.sum()), **final, layers=layers, heat=heat)


def stages(ffn_entropy_change):
    """What the FFN of every block does to the entropy, from its dH_ffn: a list of names.

    exploration: adds more than a tolerance of TOLERANCE times the largest absolute change of any block. convergence: takes
    away more than that. integration: neither.
    """
    tolerance = TOLERANCE * max(map(abs, ffn_entropy_change))
    names = {1: "exploration", 0: "integration", -1: "convergence"}
    return [names[(change > tolerance) - (change < -tolerance)] for change in ffn_entropy_change]


def boundary_layer(ffn_entropy_change):
    """dH_ffn of every block -> the last block, 0-based, that explores: its entropy change is positive beyond the tolerance
    of `stages`. The paper trains this one first. Raises UserError if there is none."""
    explores = [k for k, stage in enumerate(stages(ffn_entropy_change)) if stage == "exploration"]
    if not explores:
        raise UserError("no block's FFN adds entropy, so there is no boundary layer; choose one with --internal_layer")
    return explores[-1]

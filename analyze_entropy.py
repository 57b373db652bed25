"""Look inside: the entropy of every internal policy of a language model (BuPO, https://arxiv.org/abs/2512.19673).

The residual stream S is a sum, and each part of it, read through the unembedding matrix E_u, is a distribution over the
next token. H[x] is the entropy of softmax(x E_u^T) in nats, a mean over completion tokens. For block k:
    M_k = S_(k-1) + A_k,    S_k = M_k + F_k                   attention adds A_k to the stream, the feed-forward net F_k
    dH_layer = H[S_k] - H[S_(k-1)]                            S_k is the internal layer policy that bupo.py trains
    dH_attn  = H[A_k] - H[norm1_k(S_(k-1))]                   a module against what it read: the stream, normed by
    dH_ffn   = H[F_k] - H[norm2_k(M_k)]                       the block itself
    KL(pi_k || pi),    argmax pi_k = o_t,    cos(A_k, S_(k-1)),    cos(F_k, M_k)

Blocks are 0-based as in the code: block k is the paper's layer k + 1. entropy.json calls S_(k-1), M_k, S_k, A_k and F_k
resid_pre, resid_mid, resid_post, attn_out and mlp_out, and what the modules read attn_in and mlp_in. Position t is the
distribution that produced token t; the first completion token and the end token count. --norm adds the same numbers
with the model's final norm applied to every activation, the usual logit lens; their names start with normed_.

    python analyze_entropy.py                                # the embedded model, no GPU, no network: seconds
    python analyze_entropy.py runs/tiny runs/bupo --norm     # before and after training
    python analyze_entropy.py runs/tiny runs/bupo/checkpoint-*
    python analyze_entropy.py Qwen/Qwen3-4B --data math500.jsonl --num_samples 100
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import re
import sys
import typing
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import bookkeeping
import common
from common import UserError

# Options that mean here what they mean to the training scripts.
SHARED = ("system_prompt", "chat_template_kwargs", "max_prompt_length", "max_completion_length", "temperature")
SHARED += ("device", "dtype", "seed")
# Overrides of the defaults when all models are embedded ones.
EMBEDDED = dict(data="arithmetic", system_prompt="", max_completion_length=64)

# dH: entropy of what comes out minus entropy of what goes in.
CHANGES = {"layer": ("resid_post", "resid_pre"), "attn": ("attn_out", "attn_in"), "ffn": ("mlp_out", "mlp_in")}

# Changes within this share of the largest one, of either sign, count as none. Relative, because families differ
# fifty-fold in scale: the paper's figures span +4 to -10 nats for Qwen3-4B and +-0.2 for Llama.
TOLERANCE = 0.02

# Positions projected at once. On a CPU, a chunk's logits should stay in the caches until its entropy is known; a GPU
# wants products large enough to be worth reading the head from memory.
CHUNK_TOKENS = {"cpu": 128, "cuda": 512}

# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def blocks_of(model):
    """The L blocks of a model. Raises UserError naming the class if they lack a part that is hooked here."""
    blocks = common.backbone_of(model).layers
    for part in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
        if not all(hasattr(block, part) for block in blocks):
            raise UserError(
                f"{type(model).__name__}: its blocks have no {part}; use a Qwen2-, Qwen3- or Llama-like model"
            )
    return blocks


@contextlib.contextmanager
def watch(blocks, positions, visit):
    """While this context lasts, a forward pass calls visit(k, at) behind every block k, lowest first.

    positions [N]: where to look, indices into the B*T positions of the batch. at: label -> [N, D], for the seven labels
    of the module docstring. `at` serves one block: what visit does not keep is freed before the next block is through.
    """
    at, handles = {}, []

    def hook(after, before=None, k=None):
        def gather(module, inputs, output):
            if before:
                at[before] = inputs[0].flatten(0, 1)[positions]
            at[after] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)[positions]
            if k is not None:
                visit(k, at)
                at.clear()

        return gather

    for k, block in enumerate(blocks):
        handles += [
            block.input_layernorm.register_forward_hook(hook("attn_in", before="resid_pre")),
            block.self_attn.register_forward_hook(hook("attn_out")),
            block.post_attention_layernorm.register_forward_hook(hook("mlp_in", before="resid_mid")),
            block.mlp.register_forward_hook(hook("mlp_out")),
            block.register_forward_hook(hook("resid_post", k=k)),
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
    heat: for each lens, '' and with `norm` 'normed_', entropy and top token id, [L + 2][T], of row `answer` of
    rollouts: under the embedding, after blocks 0 to L-1, under the whole policy.

    One forward pass per batch, each activation projected once. What a module reads and adds is reduced to sums behind
    its own block. The stream after a block has to wait for the end of the pass: its KL needs the whole policy, which
    comes last. (A second pass would spare the L + 1 states a token, for the price of the blocks.) So a batch holds
    micro_batch_tokens / L tokens, at least one answer, and the peak grows neither with the depth nor with the samples.
    """
    blocks, final_norm, chunk = blocks_of(model), common.backbone_of(model).norm, CHUNK_TOKENS[model.device.type]
    L, lenses = len(blocks), {"": lambda states: states} | ({"normed_": final_norm} if norm else {})
    # Sums over tokens of fp32 values, in fp64, by name and depth: 0 embedding, k + 1 block k, L + 1 whole policy.
    sums = defaultdict(lambda: torch.zeros(L + 2, dtype=torch.float64, device=model.device))
    heat = {lens: {name: [[] for _ in range(L + 2)] for name in ("entropy", "top")} for lens in lenses}

    def logits(states):  # [n, D] -> [n, V], fp32
        return common.head_logits(model, states).div_(temperature)

    def policy(states):  # [n, D] -> probabilities [n, V], entropy [n]
        z = logits(states)
        z -= z.amax(-1, keepdim=True)
        p = z.softmax(-1)
        # log p = z + log p_top, since the top logit is 0 now: half the time of log_softmax and exp, which shows beside
        # the head's product. Both terms have the same sign, so nothing cancels.
        return p, -(p.amax(-1).log() + z.mul_(p).sum(-1))

    def visit(k, at):
        for before, added, after in (("resid_pre", "attn_out", "resid_mid"), ("resid_mid", "mlp_out", "resid_post")):
            if (at[before] + at[added] - at[after]).norm() > 0.01 * at[after].norm():  # normed or scaled on the way
                raise UserError(
                    f"{type(model).__name__}: in block {k}, {before} + {added} is not {after}, so that its numbers "
                    "would be wrong; use a Qwen2-, Qwen3- or Llama-like model"
                )
            cosine = F.cosine_similarity(at[added].float(), at[before].float(), dim=-1)
            sums[f"cosine_{added}"][k + 1] += cosine.sum(dtype=torch.float64)
        stream.extend([at["resid_pre"], at["resid_post"]] if k == 0 else [at["resid_post"]])
        for label in ("attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out"):
            for states in at[label].split(chunk):
                for lens, apply in lenses.items():
                    sums[f"{lens}entropy_{label}"][k + 1] += policy(apply(states))[1].sum(dtype=torch.float64)

    batches = common.micro_batches(rollouts, range(len(rollouts.ids)), micro_batch_tokens // L)
    for rows in tqdm(batches, desc="forward passes", leave=False, disable=None):  # silent in a log file
        used = rollouts.attention_mask[rows].any(0)  # columns that hold a token, whichever side is padded
        ids, attention_mask, mask = (x[rows][:, used] for x in (rollouts.ids, rollouts.attention_mask, rollouts.mask))
        predicts = mask[:, 1:].bool()  # column t of the states predicts token t + 1
        targets, owner = ids[:, 1:][predicts], predicts.nonzero()[:, 0]  # [N] the predicted token and its row
        stream = []  # [N, D] each: the embedding, then the stream after block 0, 1, ..., L-1
        with watch(blocks, predicts.flatten().nonzero()[:, 0], visit):
            common.hidden_states(model, ids[:, :-1], attention_mask[:, :-1])
        for piece in torch.arange(len(targets), device=ids.device).split(chunk):
            final_logps = F.log_softmax(logits(final_norm(stream[L][piece])), dim=-1)  # [n, V]
            final = final_logps.exp(), -(final_logps.exp() * final_logps).sum(-1)
            for depth, (lens, apply) in itertools.product(range(L + 2), lenses.items()):
                known = depth > L or (depth == L and apply is final_norm)
                p, entropy = final if known else policy(apply(stream[depth][piece]))
                top = p.argmax(-1)
                values = {
                    "entropy_resid_post": entropy,
                    "kl_to_final": -entropy - (p * final_logps).sum(-1),
                    "top_is_sampled": top == targets[piece],
                }
                for name, value in values.items():
                    sums[lens + name][depth] += value.sum(dtype=torch.float64)
                if answer in rows:
                    shown = owner[piece] == rows.index(answer)
                    heat[lens]["entropy"][depth] += entropy[shown].tolist()
                    heat[lens]["top"][depth] += top[shown].tolist()

    mean = {name: (total / rollouts.mask.sum()).tolist() for name, total in sums.items()}
    layers = [dict(layer=k) | {name: values[k + 1] for name, values in mean.items()} for k in range(L)]
    for lens, (k, here) in itertools.product(lenses, enumerate(layers)):
        here[f"{lens}entropy_resid_pre"] = mean[f"{lens}entropy_resid_post"][k]  # what a block reads is one depth below
        for change, (after, before) in CHANGES.items():
            here[f"{lens}dH_{change}"] = here[f"{lens}entropy_{after}"] - here[f"{lens}entropy_{before}"]
    final = dict(final_entropy=mean["entropy_resid_post"][-1], final_top_is_sampled=mean["top_is_sampled"][-1])
    return dict(tokens=int(rollouts.mask.sum()), **final, layers=layers, heat=heat)


def stages(ffn_entropy_change):
    """What the FFN of every block does to the entropy, from its dH_ffn: a list of names.

    exploration: it adds more than a tolerance, TOLERANCE times the largest absolute change of any block. convergence:
    it takes away more than that. integration: neither.
    """
    tolerance = TOLERANCE * max(map(abs, ffn_entropy_change))
    names = {1: "exploration", 0: "integration", -1: "convergence"}
    return [names[(change > tolerance) - (change < -tolerance)] for change in ffn_entropy_change]


def boundary_layer(ffn_entropy_change):
    """dH_ffn of every block -> the last block, 0-based, whose FFN adds entropy, by more than the tolerance of `stages`:
    the one that the paper trains first. Raises UserError if there is none."""
    explores = [k for k, stage in enumerate(stages(ffn_entropy_change)) if stage == "exploration"]
    if not explores:
        raise UserError("no block's FFN adds entropy, so there is no boundary layer; choose one by --internal_layer")
    return explores[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Answers to look at
# ---------------------------------------------------------------------------------------------------------------------


def sample_answers(model, tokenizer, problems, args):
    """One completion of every problem from the model itself -> Rollouts. Drops prompts over --max_prompt_length."""
    template = json.loads(args.chat_template_kwargs)
    problems = common.tokenize_problems(tokenizer, problems, args.max_prompt_length, template)
    inputs = [p.ids for p in problems], 1, args.max_completion_length, args.temperature
    return common.sample(model, tokenizer, *inputs, seed=common.step_seed(args.seed, "analysis"))


def read_answers(tokenizer, args, device):
    """The first --num_samples rows of --completions -> Rollouts. A row holds 'problem' (text or messages), 'text' and,
    if it was cut, 'finished': false (else the end token follows), as in completions.jsonl of a run. Raises UserError.

    The text is tokenized afresh, which may split it otherwise than the model that wrote it did.
    """
    prompts, completions, end = [], [], [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for where, row in itertools.islice(common.read_rows(args.completions), args.num_samples):
        prompt = common.problem_from_row(where, {**row, "answer": ""}, labels=False).prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if args.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": args.system_prompt}, *messages]
        text, finished = row.get("text"), row.get("finished", True)
        if not isinstance(text, str) or not (text or finished):
            raise UserError(f"{where}: no completion; put text into 'text' (found fields {', '.join(row)})")
        completion = tokenizer(text, add_special_tokens=False)["input_ids"] + (end if finished else [])
        prompts.append(common.encode(tokenizer, messages, json.loads(args.chat_template_kwargs)))
        completions.append(completion[: args.max_completion_length])
    if not prompts:
        raise UserError(f"{args.completions}: holds no completion; every line needs a 'problem' and a 'text'")
    return common.assemble(prompts, completions, tokenizer.pad_token_id, device)


def auto_layer(args):
    """For `bupo.py --internal_layer auto`: the boundary layer of --model on 64 training problems, with bupo's options.

    Measured on the starting model, also when a run resumes, so that it finds the same block.
    """
    model, tokenizer = common.load_model(args.model, args.device, args.dtype)
    problems = common.load_problems(args.data, "train", 64, args.system_prompt)
    rollouts = sample_answers(model, tokenizer, problems, args)
    layers = analyze(model, rollouts, args.temperature, micro_batch_tokens=args.micro_batch_tokens)["layers"]
    layer = boundary_layer([here["dH_ffn"] for here in layers])
    print(f"--internal_layer auto: block {layer} of 0 to {len(layers) - 1}, the last whose FFN adds entropy")
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# Table and figures
# ---------------------------------------------------------------------------------------------------------------------

SHADES = {"exploration": "#fde8bd", "integration": "white", "convergence": "#c3d1e4"}  # told apart in grey, too


def table(result):
    """The numbers of one model as text, one line per block."""
    columns = {"entropy": "entropy_resid_post", "dH layer": "dH_layer", "dH attn": "dH_attn", "dH ffn": "dH_ffn"}
    columns |= {"KL": "kl_to_final", "top=sampled": "top_is_sampled"}
    columns |= {"cos attn": "cosine_attn_out", "cos ffn": "cosine_mlp_out"}
    lines = [
        f"{result['model']}: {result['tokens']} tokens, {result['answers']} answers, ln|V| {result['ln_vocab']:.2f}"
    ]
    lines += ["block" + "".join(f"{title:>12}" for title in columns) + "  stage"]
    for here in result["layers"]:
        mark = ", boundary layer" if here["layer"] == result["boundary_layer"] else ""
        cells = "".join(f"{here[name]:12.3f}" for name in columns.values())
        lines.append(f"{here['layer']:5d}{cells}  {here['stage']}{mark}")
    whole = f"whole{result['final_entropy']:12.3f}" + " " * 48 + f"{result['final_top_is_sampled']:12.3f}"
    return "\n".join([*lines, whole])


def panels(rows, columns, width, height, **shared):
    """(figure, axes [rows, columns]) of width x height inches; text is drawn as it is, never read as a formula."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def line(axis, i, n, values, **style):
    """Draw model i of n over the blocks: dark to light, so that the order shows in grey, with a marker of its own."""
    from matplotlib import colormaps

    style = dict(color=colormaps["viridis"](0.85 * i / max(1, n - 1)), marker="osD^vP*X"[i % 8], markersize=5) | style
    axis.plot(*values, **style)


def over_blocks(axis, L, **settings):
    axis.set(xlabel="block k, 0-based (the paper's layer k + 1)", xticks=range(0, L, math.ceil(L / 12)), **settings)


def draw_flow(results):
    """Entropy of the three policies of every block, models overlaid; with --norm a second row under the final norm."""
    titles = {"resid_post": "layer policy: the stream S_k", "attn_out": "attention policy: A_k"}
    titles |= {"mlp_out": "feed-forward policy: F_k"}
    lenses, n, L = results[0]["answer"]["lenses"], len(results), max(len(result["layers"]) for result in results)
    figure, axes = panels(len(lenses), 3, 12, 3.6 * len(lenses) + 0.4, sharey=True)
    for (lens, row), (column, (label, title)) in itertools.product(zip(lenses, axes), enumerate(titles.items())):
        axis = row[column]
        for i, result in enumerate(results):
            values = [here[f"{lens}entropy_{label}"] for here in result["layers"]]
            line(axis, i, n, (range(len(values)), values), label=result["model"])
            if label == "resid_post":
                line(axis, i, n, ([-1], [result["layers"][0][f"{lens}entropy_resid_pre"]]), fillstyle="none")
                line(axis, i, n, ([len(values)], [result["final_entropy"]]), marker="*", markersize=13)
        for ceiling in {result["ln_vocab"] for result in results}:
            axis.axhline(ceiling, color="black", linestyle=":")
            place = dict(xytext=(0, 5), textcoords="offset points", ha="center", fontsize=9)
            axis.annotate(f"uniform: ln|V| = {ceiling:.2f}", ((L - 1) / 2, ceiling), **place)
        limits = -1.5 - 0.03 * L, L + 0.5 + 0.03 * L
        over_blocks(axis, L, title=title + ("\nfinal norm applied" if lens else ""), xlim=limits)
    axes[0][0].plot([], [], "k*", markersize=11, label="whole policy")
    axes[0][0].plot([], [], "ko", fillstyle="none", linestyle="", label="embedding, before block 0")
    top = max(result["ln_vocab"] for result in results)
    axes[0][0].set(ylabel="entropy (nats per token)", ylim=(-0.05 * top, 1.12 * top))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def draw_changes(results):
    """dH_attn and dH_ffn of every block, a panel per model: zero line, stages shaded, boundary layer marked."""
    from matplotlib.patches import Patch

    figure, axes = panels(len(results), 1, 8, 1 + 2.8 * len(results), sharey=True)
    for result, axis in zip(results, axes[:, 0]):
        layers, k = result["layers"], result["boundary_layer"]
        for here in layers:
            axis.axvspan(here["layer"] - 0.5, here["layer"] + 0.5, color=SHADES[here["stage"]], linewidth=0)
        axis.axhline(0, color="black", linewidth=1)
        attn, ffn = ([here[name] for here in layers] for name in ("dH_attn", "dH_ffn"))
        axis.plot(attn, "o--", color="0.35", fillstyle="none", label="attention: H[A_k] - H[what it read]")
        axis.plot(ffn, "ks-", label="feed-forward: H[F_k] - H[what it read]")
        if k is not None:
            axis.axvline(k, color="black", linestyle=":")
            place = dict(xycoords=("data", "axes fraction"), va="top", ha="right" if 2 * k > len(layers) else "left")
            axis.annotate(f" boundary layer: block {k} ", (k, 0.97), **place)
        limits = -0.5, len(layers) - 0.5
        over_blocks(axis, len(layers), title=result["model"], ylabel="entropy change (nats)", xlim=limits)
    stage = [Patch(facecolor=shade, edgecolor="0.6", label=f"{name} (by FFN)") for name, shade in SHADES.items()]
    figure.legend(handles=[*axis.lines[1:3], *stage], loc="outside lower center", ncols=3, fontsize=9)
    return figure


def draw_answer(result):
    """Layer x token heat map of an answer's entropies. Short answers: the top token of every policy in its cell, framed
    where it is the token that was sampled."""
    from matplotlib.patches import Rectangle

    tokens, lenses, L = result["answer"]["tokens"], result["answer"]["lenses"], len(result["layers"])
    fits, ceiling, below = len(tokens) <= 60, result["ln_vocab"], "position in the answer (tokens)"
    width, height = (max(8, 2.5 + 0.42 * len(tokens)), 0.3) if fits else (14, 0.2)  # height of a row
    figure, axes = panels(len(lenses), 1, width, (1 + height * (L + 2)) * len(lenses))
    for (lens, heat), axis in zip(lenses.items(), axes[:, 0]):
        # The lightness of this colour map rises with the value: it reads the same in grey.
        image = axis.imshow(heat["entropy"], aspect="auto", origin="lower", vmin=0, vmax=ceiling, cmap="viridis")
        for depth, t in itertools.product(range(L + 2), range(len(tokens))) if fits else ():
            top, dark = heat["top"][depth][t], heat["entropy"][depth][t] < 0.6 * ceiling
            style = dict(color="white" if dark else "black", family="monospace", ha="center", va="center")
            axis.text(t, depth, top, fontsize=min(9, 48 / max(1, len(top))), **style)  # a cell is 0.42 inches wide
            if top == tokens[t]:
                axis.add_patch(Rectangle((t - 0.46, depth - 0.44), 0.92, 0.88, fill=False, edgecolor=style["color"]))
        if fits:
            axis.set_xticks(range(len(tokens)), tokens, family="monospace", fontsize=8)
            below = "sampled token; above it, each policy's top token where it was produced, framed if the same"
        axis.set_yticks(range(L + 2), ["embedding", *(f"block {k}" for k in range(L)), "whole policy"], fontsize=8)
        title = f"{result['model']}: {result['answer']['prompt'][-80:]}" + (", final norm applied" if lens else "")
        axis.set(title=title, xlabel=below)
        figure.colorbar(image, ax=axis, label="entropy (nats)", pad=0.01)
    return figure


def draw_training(start, later):
    """What training changed: entropy after every block, dH_attn and dH_ffn of later models, minus the start's."""
    titles = {"entropy_resid_post": "entropy after block k", "dH_attn": "dH_attn", "dH_ffn": "dH_ffn"}
    figure, axes = panels(1, 3, 12, 4)
    for axis, (name, title) in zip(axes[0], titles.items()):
        for i, result in enumerate(later):
            values = [after[name] - before[name] for after, before in zip(result["layers"], start["layers"])]
            line(axis, i, len(later), (range(len(values)), values), label=result["model"])
        axis.axhline(0, color="black", linewidth=1)
        over_blocks(axis, len(start["layers"]), title=f"change of {title}")
    axes[0][0].set_ylabel(f"minus {start['model']} (nats per token)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""

    def fail(message):
        raise UserError(f"{message} (--help lists every option)")

    settings = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **settings)
    parser.error, add = fail, parser.add_argument
    add("models", nargs="*", default=["embedded"], help="run folders, checkpoints, hub ids, 'embedded'")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", help="problems, as for the training scripts; for embedded models: arithmetic")
    source.add_argument("--completions", help="look at these answers instead: .jsonl with 'problem' and 'text'")
    add("--num_samples", type=int, default=64, help="problems, the first so many, one answer each")
    add("--norm", action="store_true", help="also with the final norm applied to every activation: the logit lens")
    add("--answer", type=int, default=0, help="which answer the heat map shows, from 0")
    add("--output_dir", default="runs/entropy", help="folder of entropy.json and the figures")
    add("--micro_batch_tokens", type=int, default=2**17, help="tokens x blocks per forward pass: bounds activations")
    for field in dataclasses.fields(common.RunArgs):
        if field.name in SHARED:
            known, default, text = typing.get_args(field.type) or None, field.default, field.metadata["help"]
            add(f"--{field.name}", type=type(default), default=default, choices=known, help=text)
    argv = sys.argv[1:] if argv is None else argv
    if all(map(common.is_embedded, parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0].models)):
        parser.set_defaults(**EMBEDDED)
    args = parser.parse_args(argv)
    common.RunArgs(**{name: getattr(args, name) for name in (*SHARED, "micro_batch_tokens")})  # checks their values
    for name, low in (("num_samples", 1), ("answer", 0)):
        if getattr(args, name) < low:
            fail(f"--{name} {getattr(args, name)}: must be {low} or more")
    if not (args.data or args.completions):
        fail("--data: needed; only embedded models have a default")
    return args


def look_at(path, args):
    """Load a model, get its answers, measure -> its part of entropy.json."""
    model, tokenizer = common.load_model(path, args.device, args.dtype)
    blocks_of(model)  # complains before sampling takes its minutes
    if args.completions:
        rollouts = read_answers(tokenizer, args, model.device)
    else:
        problems = common.load_problems(args.data, "test", args.num_samples, args.system_prompt, labels=False)
        rollouts = sample_answers(model, tokenizer, problems, args)
    if args.answer >= len(rollouts.ids):
        raise UserError(f"--answer {args.answer}: there are answers 0 to {len(rollouts.ids) - 1}")
    measured = analyze(model, rollouts, args.temperature, args.norm, args.micro_batch_tokens, args.answer)
    ffn = [here["dH_ffn"] for here in measured["layers"]]
    for here, stage in zip(measured["layers"], stages(ffn)):
        here["stage"] = stage

    def spell(ids):  # token ids -> short texts with visible white space
        return [tokenizer.decode([i]).replace("\n", "\u23ce").replace(" ", "\u2423")[:10] for i in ids]

    ids, mask = rollouts.ids[args.answer], rollouts.mask[args.answer].bool()
    prompt = tokenizer.decode(ids[: int(mask.nonzero()[0])], skip_special_tokens=True)
    for heat in measured["heat"].values():
        heat["top"] = list(map(spell, heat["top"]))
    return dict(
        model=path,
        answers=len(rollouts.ids),
        ln_vocab=math.log(model.get_output_embeddings().weight.shape[0]),
        boundary_layer=boundary_layer(ffn) if "exploration" in stages(ffn) else None,
        answer=dict(prompt=prompt, tokens=spell(ids[mask].tolist()), lenses=measured.pop("heat")),
        **measured,
    )


def in_order(paths):
    """Checkpoints by step, in the places where checkpoints are: the shell puts checkpoint-100 before checkpoint-20."""
    steps = {path: int(step.group(1)) for path in paths if (step := re.search(r"checkpoint-(\d+)/*$", path))}
    checkpoints = iter(sorted(steps, key=steps.get))
    return [next(checkpoints) if path in steps else path for path in dict.fromkeys(paths)]


def main(args):
    if "embedded" in args.models:
        import sft

        sft.ensure_embedded()
    folder, results = Path(args.output_dir), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror}); pass another folder")
    for path in in_order(args.models):
        results.append(look_at(path, args))
        print("\n" + table(results[-1]))
    bookkeeping.write_json(folder / "entropy.json", dict(args=vars(args), models=results))
    figures = {"1_flow": draw_flow(results), "2_change": draw_changes(results)}
    figures |= {
        "3_answer_" + re.sub(r"[^\w.-]+", "_", result["model"]).strip("_"): draw_answer(result) for result in results
    }
    alike = [result for result in results[1:] if len(result["layers"]) == len(results[0]["layers"])]
    figures |= {"4_training": draw_training(results[0], alike)} if alike else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a token in a script that the font lacks: drawn as a box
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
    print(f"\n{folder}: entropy.json, " + ", ".join(f"{name}.png" for name in figures))


if __name__ == "__main__":
    with common.one_line_errors():
        main(parse())

"""Along the trajectory: reasoning read as steps of an inner optimization, and the behaviours in it.

RaML (https://arxiv.org/abs/2505.19815) reads a question as a task, the thinking as its inner loop and the answer as its
query set: every token of the thinking moves the model a step, as a gradient step would. What moves is the answer loss
    L(i) = -1/n sum_j log pi(a_j | prompt, thinking_1..i, cue, a_<j)      i = 0..T, a = the GOLD answer's n tokens
the mean negative log-likelihood, in nats, of the gold answer if the model had to give it after i tokens of thinking.
    descent     L along sampled trajectories, right ones against wrong ones; with the thinking cut short by an
                end-of-thinking cue; the relative change |L(i) - L(i-1)| / L(i-1) by class of token i (medians and
                quartiles: a mean of ratios belongs to its smallest denominators); and L under the policy of every
                block: which layer first knows the answer
    landscape   L on a plane of the weights, spanned by two random directions scaled to the norm of every tensor
    prune       accuracy if the answer must follow the first 10, 25, 50, 75, 100% of the thinking, or a given summary
    behaviours  verification, backtracking, subgoal setting and backward chaining in the answers of training runs,
                which decide whether a model can improve itself (https://arxiv.org/abs/2503.01307)

Behaviours are counted by regular expressions: PATTERNS for English, and the NOTATION of the embedded tasks, in which
the scripted solvers of sft.py think. There every character is a token, so the marks are short; the count is exact:
    7+15=22         a step: one operation and its result         subgoal setting, as an intermediate result
    (8*5)-3=37      an attempt: several operations at once       no behaviour
    ?22-15=7        a check: of the step before by its inverse operation, or (Countdown) ?37=24: is 37 the target 24?
                                                                 verification
    ~               back: what stands before is dropped          backtracking
    <24-5=19        a step from the target backwards: without the 5, 19 is needed; in a chain, from its end
                                                                 backward chaining
    ;               end of a step that is kept
Text with a letter outside \\boxed and tags is English, any other is notation.

    python analyze_trajectory.py descent embedded            # no GPU, no network: seconds; also runs/grpo, a hub id ...
    python analyze_trajectory.py descent Qwen/Qwen3-4B --data math500.jsonl --end_of_thinking "</think>"
    python analyze_trajectory.py landscape embedded
    python analyze_trajectory.py prune runs/grpo --completions runs/grpo/completions.jsonl
    python analyze_trajectory.py behaviours runs/grpo runs/primed
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys
import typing
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DynamicCache

import bookkeeping
import common
from common import UserError

# Options that mean here what they mean to the training scripts.
SHARED = ("system_prompt", "chat_template_kwargs", "max_prompt_length", "max_completion_length", "temperature")
SHARED += ("micro_batch_tokens", "device", "dtype", "seed")
# Overrides of the defaults for an embedded model. Its answers stand right behind a ';', or at the very beginning.
EMBEDDED = dict(data="arithmetic", system_prompt="", max_completion_length=64)
EMBEDDED |= dict(cue="\\boxed{ANSWER}", end_of_thinking=";")

# ---------------------------------------------------------------------------------------------------------------------
# Trajectories
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """The thinking of one completion, and the problem it is about."""

    problem: common.Problem  # with `ids`, P tokens, and the gold answer
    ids: list[int]  # T tokens: the completion up to its final answer
    pieces: list[str]  # their texts
    right: bool  # whether the completion's own final answer was right
    summary: list[int] | None = None  # tokens of a text to answer from instead


def make_trajectory(tokenizer, problem, completion_ids, right):
    """Cut a completion off before its final answer, with which in view the answer's likelihood would say nothing:
    before the first </think>, else the last \\boxed or <answer>, else nowhere."""
    pieces = tokenizer.batch_decode([[i] for i in completion_ids])
    text = "".join(pieces)
    end = text.find("</think>") if "</think>" in text else max(text.rfind("\\boxed"), text.rfind("<answer>"))
    T, read = 0, 0
    while T < len(pieces) and (end < 0 or read + len(pieces[T]) <= end):
        read, T = read + len(pieces[T]), T + 1
    return Trajectory(problem, completion_ids[:T], pieces[:T], right)


def sample_trajectories(model, tokenizer, args):
    """One sampled completion for each of the first --num_samples problems of --data -> list of Trajectory."""
    problems = common.load_problems(args.data, "test", args.num_samples, args.system_prompt)
    problems = common.tokenize_problems(
        tokenizer, problems, args.max_prompt_length, json.loads(args.chat_template_kwargs)
    )
    seed = common.step_seed(args.seed, "trajectories")
    result = common.evaluate(model, tokenizer, problems, 1, args.temperature, args.max_completion_length, seed=seed)
    rollouts, found = result["rollouts"], []
    for i, problem in enumerate(problems):
        ids = rollouts.ids[i, rollouts.mask[i].bool()].tolist()
        ids = ids[:-1] if rollouts.finished[i] else ids  # without the end token
        found.append(make_trajectory(tokenizer, problem, ids, bool(result["rewards"][i, 0] == 1)))
    return found


def read_trajectories(tokenizer, args):
    """The first --num_samples rows of --completions -> list of Trajectory. A row holds 'problem' (text or messages),
    'text' and 'gold', and if known 'reward' and 'finished', as in completions.jsonl of a run. Raises UserError.

    The text is tokenized afresh, which may split it otherwise than the model that wrote it did.
    """
    found = []
    for where, row in itertools.islice(common.read_rows(args.completions), args.num_samples):
        for name in filter(None, ("text", "gold", args.summary)):
            if not isinstance(row.get(name), str):
                fields = f"found fields {', '.join(map(str, row)) or 'none'}"[:300]
                raise UserError(f"{where}: no {name}; put text into '{name}' (found {fields})")
        problem = common.problem_from_row(where, row | dict(answer=row["gold"]))
        problem.numbers, problem.target = row.get("numbers"), row.get("target")  # of Countdown, for its score
        problems = common.add_system_prompt([problem], args.system_prompt)
        common.tokenize_problems(tokenizer, problems, args.max_prompt_length, json.loads(args.chat_template_kwargs))
        finished = row.get("finished", True)
        reward = row["reward"] if "reward" in row else common.grade([row["text"]], problems, [finished])[0]
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"][: args.max_completion_length]
        found.append(make_trajectory(tokenizer, problem, ids, reward == 1))
        if args.summary:
            found[-1].summary = tokenizer(row[args.summary], add_special_tokens=False)["input_ids"]
    if not found:
        raise UserError(f"{args.completions}: holds no completion; every line needs 'problem', 'text' and 'gold'")
    return found


def load(args):
    """(model, tokenizer, trajectories) of a command."""
    if args.model == "embedded":
        import sft

        sft.ensure_embedded()
    model, tokenizer = common.load_model(args.model, args.device, args.dtype)
    if args.completions:
        trajectories = read_trajectories(tokenizer, args)
    else:
        trajectories = sample_trajectories(model, tokenizer, args)
    right = sum(t.right for t in trajectories)
    mean = sum(len(t.ids) for t in trajectories) / len(trajectories)
    print(f"{len(trajectories)} trajectories, {right} right, {mean:.1f} tokens of thinking")
    return model, tokenizer, trajectories


def spell_cue(tokenizer, cue, answer):
    """Cue with the word ANSWER in it, and an answer -> (branch ids [S], answer mask [S]). The mask is 1 on the answer
    and on what follows it in the cue, such as the closing brace: without that brace, 2 is the beginning of 27, too."""
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in cue.split("ANSWER"))
    # Apart from the cue: that is how the tokens would follow if the model went on from the cue itself.
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*before, *ids, *after], [0] * len(before) + [1] * len(ids + after)


# ---------------------------------------------------------------------------------------------------------------------
# Descent: the answer loss along a trajectory
# ---------------------------------------------------------------------------------------------------------------------

# Branch tokens per forward pass: they attend to each other under a mask, which costs their square.
CHUNK_TOKENS = {"cpu": 256, "cuda": 4096}


@torch.no_grad()
def answer_nll(model, prompt_ids, completion_ids, branch_ids, answer_mask, layers=False, norm=False, chunk_tokens=0):
    """Mean negative log-likelihood of an answer, in nats per token, after every prefix of a trajectory -> [T + 1].

    Entry i is the loss of the tokens of branch_ids [S] (cue and answer) where answer_mask [S] is 1, behind prompt_ids
    [P] and completion_ids[:i], i = 0..T (the probe of https://arxiv.org/abs/2505.19815). layers=True -> [L + 1, T + 1]:
    the same under the internal policy of every block, from the raw stream, or the normed one with `norm`; the whole
    policy comes last.

    One forward pass over the P + T tokens fills a cache of keys and values, the trunk; then the T + 1 branches run on
    it, many in one sequence, as a tree: a branch sees the first P + i tokens of the trunk and itself, and its positions
    go on from there. That is S - 1 tokens per prefix instead of P + i + S - 1, and the cache exists once.
    """
    backbone, device = common.backbone_of(model), model.device
    cache, final_norm = DynamicCache(config=model.config), backbone.norm
    if any(layer.is_sliding for layer in cache.layers):
        raise UserError(f"{type(model).__name__}: attends to a sliding window; use a model with full attention")
    P, T, S = len(prompt_ids), len(completion_ids), len(branch_ids)
    branch, trunk = torch.tensor(branch_ids, device=device), torch.tensor([*prompt_ids, *completion_ids], device=device)
    asked, at = torch.tensor(answer_mask, device=device).nonzero()[:, 0], torch.arange(P + T, device=device)
    size = max(1, (chunk_tokens or CHUNK_TOKENS.get(device.type, 1024)) // max(1, S - 1))

    def streams(ids, positions, attention_mask=None):  # N tokens behind the cache -> [L or 1, N, D], not yet normed
        inputs = dict(input_ids=ids[None], position_ids=positions[None], attention_mask=attention_mask)
        output = backbone(**inputs, past_key_values=cache, use_cache=True, output_hidden_states=layers)
        return torch.cat(output.hidden_states[1:]) if layers else output.last_hidden_state

    def loss(states):  # [b, S, D], column j predicts branch token j -> [b]
        targets = branch[asked].expand(len(states), -1)
        return -common.token_logps(model, states[:, asked], targets)[0].mean(-1)

    nll = []
    backbone.norm = torch.nn.Identity()  # so that the last block's raw stream can be had, too
    try:
        predicts_first = streams(trunk, at)[:, P - 1 :]  # [L, T + 1, D]: prefix i ends with trunk token P + i - 1
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        for prefixes in torch.arange(T + 1, device=device).split(size):
            states = predicts_first[:, prefixes, None]  # [L, b, 1, D]
            if S > 1:  # the last branch token is predicted and predicts nothing
                owner = prefixes.repeat_interleave(S - 1)
                index = torch.arange(S - 1, device=device).repeat(len(prefixes))
                own = (owner[:, None] == owner) & (index[:, None] >= index)
                sees = torch.cat([at < P + owner[:, None], own], 1)  # [b (S - 1), P + T + b (S - 1)]
                # Additive, which every attention implementation takes.
                bias = torch.zeros(sees.shape, dtype=model.dtype, device=device)
                bias.masked_fill_(~sees, torch.finfo(model.dtype).min)
                tail = streams(branch[:-1].repeat(len(prefixes)), P + owner + index, bias[None, None])
                states = torch.cat([states, tail.unflatten(1, (-1, S - 1))], 2)  # [L, b, S, D]
                for layer, (keys, values) in zip(cache.layers, kept):
                    layer.keys, layer.values = keys, values  # off with the branches
            internal = [loss(final_norm(state) if norm else state) for state in states] if layers else []
            nll.append(torch.stack([*internal, loss(final_norm(states[-1]))]))
    finally:
        backbone.norm = final_norm
    return torch.cat(nll, 1) if layers else torch.cat(nll, 1)[0]


def direct_nll(model, prefixes, branches, masks, micro_batch_tokens):
    """The answer loss of B unrelated (prefix, branch, answer mask), all of them lists of token ids -> [B]."""
    rollouts, loss = common.assemble(prefixes, branches, 0, model.device), torch.zeros(len(prefixes))
    for row, (prefix, mask) in enumerate(zip(prefixes, masks)):  # only the answer counts, not the cue
        rollouts.mask[row, len(prefix) : len(prefix) + len(mask)] = torch.tensor(mask).to(rollouts.mask)
    for rows in common.micro_batches(rollouts, range(len(prefixes)), micro_batch_tokens):
        with torch.no_grad():
            logps, _ = common.completion_logps(model, rollouts, rows, temperature=1.0)
        loss[rows] = -(logps.sum(1) / rollouts.mask[rows].sum(1)).cpu()
    return loss


# Of a token, the first class that one of its characters belongs to.
TOKEN_CLASSES = {
    "reflection": r"(?i)\b(wait|hold on|alternatively|hmm+|however|but|actually|maybe|let me (check|verify|try))\b"
    r"|\?(?=[-(0-9])|~",
    "inference": r"(?i)\b(so|thus|therefore|hence|since|because|then|implies)\b|<(?=[-(0-9])",
    "result": r"(?<==)\s*-?[0-9]+",  # a number behind '='
    "number": r"[0-9]+",
    "operator": r"[-+*/=^×÷·]",
    "delimiter": r"[;:,\n]|[.?!](?=\s|$)",
    "other": r"[\s\S]",
}


def token_classes(pieces):
    """Texts of the tokens -> the class of each. The marks of the notation count as what they do: ? and ~ reflect."""
    text, names = "".join(pieces), list(TOKEN_CLASSES)
    ranks = [len(names)] * len(text)
    for rank, pattern in reversed(list(enumerate(TOKEN_CLASSES.values()))):
        for match in re.finditer(pattern, text):
            ranks[match.start() : match.end()] = [rank] * (match.end() - match.start())
    starts = [0, *itertools.accumulate(map(len, pieces))]
    return [names[min(ranks[a:b], default=len(names) - 1)] for a, b in zip(starts, starts[1:])]


# A loss below this is as good as none, and its relative change is rounding noise: such steps are left out.
SETTLED = 0.01  # nats


def relative_changes(curves):
    """(pieces, L [T + 1]) of trajectories -> class -> (L(i) - L(i-1)) / L(i-1) of its tokens, of every sign."""
    found = {name: [] for name in TOKEN_CLASSES}
    for pieces, nll in curves:
        for name, before, after in zip(token_classes(pieces), nll, nll[1:]):
            if before >= SETTLED:
                found[name].append((after - before) / before)
    return {name: changes for name, changes in found.items() if changes}


def quartiles(values):
    """[lower quartile, median, upper quartile] of numbers."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()


GRID = 41  # points from the beginning of the thinking, 0%, to its end, 100%


def on_grid(nll):
    """[..., T + 1] -> [..., GRID]: trajectories of different lengths on one axis, the nearest prefix at every point."""
    return nll[..., torch.linspace(0, nll.shape[-1] - 1, GRID).round().long()]


def first_to_know(nll):
    """[L + 1, n] -> per column the lowest block from which on all blocks and the whole policy, the last row, give the
    answer's tokens more than 1/2 each (geometric mean): a loss below ln 2. None where no block does."""
    found = []
    for column in nll.T.tolist():
        k = len(column)
        while k > 0 and column[k - 1] < math.log(2):
            k -= 1
        found.append(k if k < len(column) - 1 else None)
    return found


def descent(args):
    """The command: loss along trajectories, token classes and layers into descent.json, a table and three figures."""
    model, tokenizer, trajectories = load(args)
    found = [t for t in trajectories if t.ids]
    print(f"{len(trajectories) - len(found)} answer without thinking and are left out")
    if not found:
        raise UserError("no trajectory has any thinking before its answer; take more --num_samples or another model")
    shown = next((i for i, t in enumerate(found) if t.right), 0) if args.answer is None else args.answer
    if shown >= len(found):
        raise UserError(f"--answer {shown}: there are trajectories 0 to {len(found) - 1} with any thinking")
    # The end-of-thinking cue goes between the prefix and the answer cue, wherever the thinking has got to.
    cues = {"nll": args.cue} | ({"nll_cut_short": args.end_of_thinking + args.cue} if args.end_of_thinking else {})
    mapped = [shown, *(i for i, t in enumerate(found) if t.right and i != shown)][: args.layers]
    rows, maps = [], {}
    for i, t in enumerate(tqdm(found, desc="trajectories", leave=False, disable=None)):
        rows.append(dict(problem=t.problem.prompt, gold=t.problem.answer, right=t.right, tokens=t.pieces))
        for name, cue in cues.items():
            layers, branch = name == "nll" and i in mapped, spell_cue(tokenizer, cue, t.problem.answer)
            nll = answer_nll(model, t.problem.ids, t.ids, *branch, layers=layers, norm=args.norm).cpu()
            if layers:
                maps[i], nll = nll, nll[-1]
            rows[-1][name] = nll.tolist()
    curves = {name: {} for name in cues}  # cue -> right or wrong -> quartiles at every point of the grid
    for name, (kind, right) in itertools.product(cues, (("right", True), ("wrong", False))):
        points = [on_grid(torch.tensor(row[name])).tolist() for row in rows if row["right"] == right]
        if points:
            curves[name][kind] = dict(trajectories=len(points), quartiles=list(map(quartiles, zip(*points))))
    classes = {}
    for name, signed in relative_changes((row["tokens"], row["nll"]) for row in rows).items():
        classes[name] = dict(tokens=len(signed), falls=sum(change < 0 for change in signed) / len(signed))
        classes[name] |= dict(signed=quartiles(signed), relative_change=quartiles(list(map(abs, signed))))
    layers = None
    if maps:
        typical = torch.stack([on_grid(nll) for i, nll in maps.items() if found[i].right] or [on_grid(maps[shown])])
        layers = dict(shown=shown, map=maps[shown].tolist(), typical=typical.median(0).values.tolist())
        layers |= dict(first_to_know=first_to_know(maps[shown]), typical_of=len(typical))
    print(descent_table(curves, classes, layers))
    figures = {"descent": draw_descent(curves, args), "classes": draw_classes(classes)}
    if maps:
        figures["layers"] = draw_layers(layers, rows[shown], args)
    save(args, "descent", dict(curves=curves, classes=classes, layers=layers, trajectories=rows), figures)


# ---------------------------------------------------------------------------------------------------------------------
# Landscape: the answer loss around the weights
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def on_plane(model, offsets, measure, seed=0):
    """measure() at the weights theta + a d1 + b d2 for every a and b of offsets -> list of lists, a along the rows.

    d1 and d2 are Gaussian, each tensor scaled to the norm of the tensor that it moves; embedding and head stay. Every
    point starts from a copy of theta, so rounding does not add up; in the end, also after an error, the copy goes back
    and the weights are what they were, bit for bit.
    """
    tables = {part.weight.data_ptr() for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    moved = [parameter for parameter in model.parameters() if parameter.data_ptr() not in tables]
    theta, generator = [parameter.clone() for parameter in moved], torch.Generator().manual_seed(seed)

    def direction():
        for parameter in moved:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            yield noise * (parameter.norm() / noise.norm())

    d1, d2 = list(direction()), list(direction())
    try:
        values = []
        for a in offsets:
            values.append([])
            for b in offsets:
                for parameter, start, x, y in zip(moved, theta, d1, d2):
                    parameter.copy_(start + a * x + b * y)
                values[-1].append(measure())
        return values
    finally:
        for parameter, start in zip(moved, theta):
            parameter.copy_(start)


def landscape(args):
    """The command: two surfaces over one plane, landscape.json and a figure. Both are of the problems that the model
    solved: the answer at once, and behind the model's own thinking."""
    model, tokenizer, trajectories = load(args)
    found = [t for t in trajectories if t.right and t.ids]
    if not found:
        raise UserError("no trajectory is right and has any thinking; take more --num_samples or another model")
    branches, masks = zip(*(spell_cue(tokenizer, args.cue, t.problem.answer) for t in found))
    at_once, behind = [t.problem.ids for t in found], [t.problem.ids + t.ids for t in found]
    offsets = [args.span * (2 * i / (args.points - 1) - 1) for i in range(args.points)]
    bar = tqdm(total=len(offsets) ** 2, desc="points", leave=False, disable=None)

    def measure():
        bar.update()
        settings = branches, masks, args.micro_batch_tokens
        return [direct_nll(model, prefixes, *settings).mean().item() for prefixes in (at_once, behind)]

    values = on_plane(model, offsets, measure, args.seed)
    bar.close()
    surfaces = {name: [[v[i] for v in row] for row in values] for i, name in enumerate(("at_once", "behind_thinking"))}
    for name, surface in surfaces.items():
        flat = sorted(itertools.chain.from_iterable(surface))
        middle = measure()[list(surfaces).index(name)]
        print(f"{name:16} {middle:.3f} nats at the weights; on the plane {flat[0]:.3f} to {flat[-1]:.3f}")
    result = dict(offsets=offsets, problems=len(found), surfaces=surfaces)
    save(args, "landscape", result, {"landscape": draw_landscape(result, args)})


# ---------------------------------------------------------------------------------------------------------------------
# Prune: the answer from a part of the thinking
# ---------------------------------------------------------------------------------------------------------------------


def complete_answer(cue, text):
    """The cue, up to the answer, and what was decoded behind it -> both, up to the end of the first complete answer:
    what a model that was not stopped goes on to write is not its answer."""
    for match in re.finditer(r"\}|</answer>", text):
        candidate = cue + text[: match.end()]
        if match.group() == "</answer>" or common.last_boxed(candidate) is not None:
            return candidate
    return cue + text


def answer_from(model, tokenizer, trajectories, prefixes, args):
    """Decode an answer greedily behind prompt, prefix (lists of token ids) and cue -> list of rewards."""
    cue = args.cue.split("ANSWER")[0]
    cue_ids = tokenizer(cue, add_special_tokens=False)["input_ids"]
    prompts = [t.problem.ids + prefix + cue_ids for t, prefix in zip(trajectories, prefixes)]
    rollouts = common.sample(model, tokenizer, prompts, 1, args.answer_tokens, temperature=0.0)
    texts = [complete_answer(cue, text) for text in rollouts.texts]
    return common.grade(texts, [t.problem for t in trajectories])


def prune(args):
    """The command: accuracy from a part of the thinking against the tokens kept, prune.json, a table and a figure."""
    model, tokenizer, trajectories = load(args)
    kept = {f"{share}%": [t.ids[: math.ceil(len(t.ids) * share / 100)] for t in trajectories] for share in args.percent}
    kept |= {"summary": [t.summary for t in trajectories]} if args.summary else {}
    rows, n = [], len(trajectories)
    for name, prefixes in kept.items():
        right = [reward == 1 for reward in answer_from(model, tokenizer, trajectories, prefixes, args)]
        row = dict(kept=name, tokens=sum(map(len, prefixes)) / n, accuracy=sum(right) / n)
        row["standard_error"] = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / n)
        for kind, own in (("right", True), ("wrong", False)):  # what became of answers that were right, or wrong
            group = [r for r, t in zip(right, trajectories) if t.right == own]
            row[f"accuracy_of_{kind}"] = sum(group) / len(group) if group else None
        rows.append(row)
    print(f"{'kept':>8} {'tokens':>8} {'accuracy':>15} {'of right':>9} {'of wrong':>9}")
    for row in rows:
        parts = ("-" if row[f"accuracy_of_{kind}"] is None else f"{row[f'accuracy_of_{kind}']:.3f}" for kind in KINDS)
        accuracy = f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}"
        print(f"{row['kept']:>8} {row['tokens']:8.1f} {accuracy:>15} " + " ".join(f"{part:>9}" for part in parts))
    own = sum(t.right for t in trajectories) / n
    print(f"as it was: {own:.3f}, with the model's own answer behind all of its thinking")
    save(args, "prune", dict(rows=rows, own_accuracy=own, trajectories=n), {"prune": draw_prune(rows, own)})


# ---------------------------------------------------------------------------------------------------------------------
# Behaviours
# ---------------------------------------------------------------------------------------------------------------------

BEHAVIOURS = ("verification", "backtracking", "subgoal_setting", "backward_chaining")

I = r"\b(let me|let's|let us|we|we can|we should|i|i'll|i will|i should|i'm going to|to)"  # who is about to do it
OPENS = r"(?:^|[.!?:;] |so )"  # a sentence or a part of one

PATTERNS = {  # English, without regard to case; tests/behaviour_snippets.jsonl tells what they find and what they miss
    "verification": [  # an explicit check of a result
        I + r" (just |also |now |quickly )?(check|verify|confirm|test|validate|make sure|be sure|see (if|whether))\b",
        I + r" (re-?(check|compute|calculate|verify)|count again|compute (it|this|that) again)",
        r"\b(double|cross|re|sanity|quick)[- ]?(check|test)|\b(hit|reached|matches|met) (it|the target) exactly\b",
        r"\b(checking|testing|verifying|verification)\b",
        OPENS + r"(check|test|verify|proof)\b|\u2713|\u2705",
        r"\b(plug|substitut|put)\w* [^.]{0,30}\bback\b|\bplug(ging)? (it|this|that|in|them)\b",
        r"\b(which|this|that|it|sides|results?) (also )?(match(es)?|equals?|agrees?|checks out|holds)\b",
        r"\b(is|was|are|looks) (indeed |done )?(correct(ly)?|consistent)\b|\band indeed\b",
        r"\bas (required|expected|it should)\b",
        r"\b(does|do|is|are) (that|this|it|they|[-+*/()0-9 ]+) (make sense|right|correct|hit|give|equal|work|add up)\b",
        r"\bequal(s)?( to)? [-0-9.]+\?|\. (it|that) does\b|[0-9], yes\b|\byes!|\bsatisfies (the|this|all|both)\b",
    ],
    "backtracking": [  # a path is dropped for another
        r"\bwait\b(?=[,.:;! -])(?! (for|until|time|on|\d))|\bhold on\b|\balternatively\b|\bscratch that\b|\bsorry\b",
        OPENS + r"no[,.] |, no[,.;](\s|$)|\b(oh|actually|hmm),? no\b|\boops\b",
        r"(\(|^|[.,;:] |\b(is|are|was|way|still|but|'s|takes) )too (low|high|big|small|large|long|much|few)\b(?! to)",
        r"\boff by\b|\b(still )?[0-9]+ (short|over|too \w+)\b|\b(swap|adjust|discard|abandon|drop) (the|this|that)\b",
        r"\b(let me|let's) (think|start) again\b|\bmessy\b|\beasier way\b|\bstuck\b|\bfrom scratch\b",
        r"\b(overshoots?|undershoots?|misread|miscounted|miscalculated|recount|redo(ing)?|rethink|reconsider)\b",
        r"\b(try|consider|use|want|need|take) (again|another|(a|some)(thing)? (different|other|new)|the other)\b",
        OPENS + r"(let me |let's |let us |we |i |now )?(could |can )?try\b|\band instead\b",
        OPENS
        + r"(instead,|maybe [-0-9(])|\b(what|how) about\b|\bdifferent (idea|approach|way|method)\b|\bdifferently\b",
        r"\b(next|another|other) (candidate|attempt|try|guess|option|idea|approach|way|possibility)\b",
        OPENS + r"(going )?back to\b|\b(me|let's|i) go(ing)? back\b|\bstart(ing)? over\b|\bstep back\b",
        r"\b(not|n't) (work|working|get us|get there|the way|an integer|equal|possible|right)\b|\b(nowhere|dead end)\b",
        r"[0-9], (but )?not [-0-9]+\b|\b(not|isn't) what we (want|need)|\blet me (fix|correct)\b|\bcontradict(s|i)",
        r"\b(made|making|is|was) (a|an) (mistake|error)\b|\b(is|was) (wrong|impossible|incorrect)\b",
        r"\bshould (actually )?(be|have been) [^.]{0,20}\b(not|instead)\b",
    ],
    "subgoal_setting": [  # an intermediate target, or a division into parts
        OPENS + r"(so,? |ok(ay)?[,.] )?(first|second|next)(ly)?,? (i|we|let|find|figure|compute|determine|to|the)\b",
        r"\bwe need [^.]{0,30} first\b|\bseparately\b|\b(outline|list) the steps\b|\bthe first (thing|step)\b",
        r"\bgoal (for now|here)\b|\baim (for|at)\b|\bfirst find\b|\bcount [^.]{0,20} first\b",
        I + r" (need to |have to |will |want to |can |could |must )?(first|begin by|begin with|start (by|with))\b",
        r"\b(first|intermediate|next|smaller) (goal|target|result)\b|\bsub-?(goal|problem|task)|\bmilestone\b",
        r"\b(the|my|our|a) (plan|strategy|idea) is\b|\bthe plan\b|\bbefore (anything else|that,? (i|we) (need|have))",
        r"\b(break|split|divide|separate|proceed) [^.]{0,30}\b(into|in) (\w+ )?(parts?|cases|steps|stages|pieces)",
        r"\bstep (1|one)\b|\bone (piece|step|part|case) at a time\b|\bin the first (part|step|stage)\b",
        r"\b(i|we) need (two|three|several) things\b",
        r"\b(once|with|after) (i have|we have|that|this|we know) [^.]{0,9}\b(it|done|in hand|,)",
    ],
    "backward_chaining": [  # from the target to what leads there
        r"\b(work|reason)(ing)? back(wards?)?\b|\b(think|go)(ing)? backwards?\b|\bbackwards?,? (from|through)\b",
        r"\b(start|starting|begin|think|work) (from|with|at) the (target|goal|answer|result|conclusion|end)\b",
        r"\bfrom the end\b|\breverse the\b|\bundo(ing)?\b",
        r"\b(to (get|reach|make|end at|land on)|for the \w+ to be) \S+,? (i|we|the)\b[^.]{0,40}\b(needs?|has|have)",
        r"\b(need|want) \d+ (in|at) the end\b|\bwe want \d+\.",
        r"\b(last|final) (operation|step) (is|was|could|must|would)\b|\b(have|has) to (finish|end) with\b",
        r"\bto end up with\b|\b(result|total) (has to|must) be \d+",
        r"\b(since|target( is)?|need) \d+(\.|,)? ((is|=) )?\d+ (=|is|[-/+*])",
        r"\bthe (rest|others?( \w+)?) (must|have to|has to|needs? to)\b",
        r"\bsuffices to show\b|\bbefore (that|the last)\b[^.]{0,20}\b(was|had|were)\b|\bthe \w+ before (the|that)\b",
        r"\bwhat(ever)? (we [^.]{0,20} )?(would|could|must|makes?) (make|give|be|it)\b|\bassume the conclusion\b",
        r"\bmust have (been|had)\b",
    ],
}
NUMBER = r"-?[0-9]+"
NOTATION = {
    "verification": r"\?[-+*/()0-9]+=" + NUMBER,
    "backtracking": r"~",
    # A step opens the text or follows the end of another; what a check or a backward step begins is none.
    "subgoal_setting": rf"(?<![^;~\n]){NUMBER}[-+*/]{NUMBER}={NUMBER}",
    "backward_chaining": r"<[-+*/()0-9]+=" + NUMBER,
}
TAGS = re.compile(r"</?(?:think|answer)>|\\boxed")
ENGLISH = {name: re.compile("|".join(found), re.IGNORECASE | re.MULTILINE) for name, found in PATTERNS.items()}
EXACT = {name: re.compile(text) for name, text in NOTATION.items()}


def count_behaviours(text):
    """How often each of the BEHAVIOURS occurs in an answer -> dict of ints. Exact for the notation of the module
    docstring; for English as good as PATTERNS are, see tests/test_analyze_trajectory.py for precision and recall."""
    bare = TAGS.sub("\n", text)
    patterns = ENGLISH if re.search("[^\\W\\d_]", bare) else EXACT
    return {name: sum(1 for _ in pattern.finditer(bare)) for name, pattern in patterns.items()}


def read_behaviours(run, every):
    """completions.jsonl of a run -> one dict per `every` steps: step (the last of them), answers, accuracy, length, and
    for each behaviour its mean count per answer and the share of answers that show it. Reads line by line: the file of
    a long run does not fit into memory. Raises UserError."""
    path = Path(run) / "completions.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; pass the output_dir of a run of grpo.py, bupo.py, opo.py or em.py")
    bins = defaultdict(Counter)
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                answer = json.loads(line)
                step, text, right = answer["step"], answer["text"], answer["reward"] == 1
                sums = bins[math.ceil(step / every)]
                sums.update(answers=1, right=right, length=answer["length"], last=max(0, step - sums["last"]))
                counts = count_behaviours(text)
            except (ValueError, TypeError, KeyError) as error:
                if not line.endswith("\n"):  # cut off by a kill
                    continue
                what = f"no {error}" if isinstance(error, KeyError) else str(error)[:60]
                raise UserError(f"{path}:{number}: not an answer of a run ({what}); mend or delete the line")
            for name, count in counts.items():
                sums.update({name: count, f"{name}_share": count > 0})
    if not bins:
        raise UserError(f"{path}: holds no answer; let the run do some steps first")
    rows = []
    for _, sums in sorted(bins.items()):
        row = dict(step=sums["last"], answers=sums["answers"], accuracy=sums["right"] / sums["answers"])
        names = ["length", *BEHAVIOURS, *(f"{name}_share" for name in BEHAVIOURS)]
        rows.append(row | {name: sums[name] / sums["answers"] for name in names})
    return rows


def behaviours(args):
    """The command: behaviours over training steps into behaviours.json, a table and a figure."""
    runs = {run: read_behaviours(run, args.every) for run in dict.fromkeys(args.runs)}
    for run, rows in runs.items():
        print(f"\n{run}, mean number per answer (share of answers with any)")
        titles = "".join(f"{name.replace('_', ' '):>19}" for name in BEHAVIOURS)
        print(f"{'step':>6} {'accuracy':>9} {'length':>7}{titles}")
        for row in rows:
            cells = "".join(f"{row[name]:11.2f} ({row[f'{name}_share']:4.0%})" + " " for name in BEHAVIOURS)
            print(f"{row['step']:6d} {row['accuracy']:9.3f} {row['length']:7.1f} {cells}")
    save(args, "behaviours", dict(runs=runs), {"behaviours": draw_behaviours(runs)})


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures
# ---------------------------------------------------------------------------------------------------------------------

KINDS = {"right": ("black", "o-"), "wrong": ("#D55E00", "s--")}  # colour, mark and line: told apart in grey, too


def descent_table(curves, classes, layers):
    """The numbers of `descent` as text."""
    lines = ["", f"{'median answer loss (nats)':34}" + "".join(f"{share:>8}%" for share in (0, 25, 50, 75, 100))]
    for name, kinds in curves.items():
        for kind, curve in kinds.items():
            cells = "".join(f"{curve['quartiles'][i][1]:9.3f}" for i in range(0, GRID, (GRID - 1) // 4))
            lines.append(f"{name + ', ' + kind + ' (' + str(curve['trajectories']) + ')':34}{cells}")
    lines.append(f"\n{'token class':12}{'tokens':>8}{'|dL|/L: median':>16}{'quartiles':>20}{'loss falls':>12}")
    for name, c in classes.items():
        low, median, high = c["relative_change"]
        lines.append(f"{name:12}{c['tokens']:8d}{median:16.3f}{f'{low:.3f} to {high:.3f}':>20}{c['falls']:12.0%}")
    if layers:
        k = layers["first_to_know"][-1]
        known = "no block knows the answer" if k is None else f"the answer is known from block {k} on"
        lines.append(f"\nat the end of trajectory {layers['shown']} {known}")
    return "\n".join(lines)


def panels(rows, columns, width, height, **shared):
    """(figure, axes [rows, columns]) of width x height inches; text is drawn as it is, never read as a formula."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def draw_descent(curves, args):
    """Median and quartiles of the answer loss along the thinking, right and wrong trajectories; a panel per cue."""
    figure, axes = panels(1, len(curves), 1.5 + 5 * len(curves), 4.2, sharey=True)
    titles = {"nll": "answer cue at once", "nll_cut_short": f"thinking cut short by {args.end_of_thinking!r}"}
    share = [100 * i / (GRID - 1) for i in range(GRID)]
    for axis, (name, kinds) in zip(axes[0], curves.items()):
        for kind, curve in kinds.items():
            low, median, high = zip(*curve["quartiles"])
            colour, line = KINDS[kind]
            axis.plot(share, median, line, color=colour, markevery=5, label=f"{kind} ({curve['trajectories']})")
            axis.fill_between(share, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=titles[name], xlabel="thinking read (% of its tokens)")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="loss of the gold answer (nats per token)\nmedian and quartiles", ylim=(0, None))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_classes(classes):
    """Median and quartiles of the relative change by token class, on a logarithmic axis."""
    from matplotlib.ticker import LogFormatter

    figure, axes = panels(1, 1, 7.5, 1.2 + 0.5 * len(classes))
    axis, names = axes[0][0], list(classes)[::-1]
    for y, name in enumerate(names):
        low, median, high = (max(value, 1e-4) for value in classes[name]["relative_change"])
        axis.plot([low, high], [y, y], color="0.6", linewidth=7, solid_capstyle="butt")
        axis.plot([median], [y], "k|", markersize=16, markeredgewidth=3)
    axis.set_yticks(range(len(names)), [f"{name} ({classes[name]['tokens']})" for name in names])
    axis.set(xscale="log", xlabel="relative change of the answer loss by one token, |dL| / L: median and quartiles")
    axis.xaxis.set_major_formatter(LogFormatter())
    axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.grid(axis="x", alpha=0.3, which="both")
    return figure


def draw_layers(layers, row, args):
    """Two layer x position heat maps of the answer loss: one trajectory, and the median of the right ones."""
    from matplotlib.colors import LogNorm

    L, tokens = len(layers["map"]) - 1, row["tokens"]
    wide = len(tokens) <= 60
    figure, axes = panels(2, 1, max(8, 3 + 0.3 * len(tokens)) if wide else 13, 2 + 0.44 * (L + 1))
    for axis, values in zip(axes[:, 0], (layers["map"], layers["typical"])):
        # Logarithmic: the raw stream of a wrong layer is wrong by tens of nats. Dark knows the answer, in grey, too.
        shades = torch.tensor(values).clamp(min=0.01).tolist()  # 0 has no logarithm
        image = axis.imshow(shades, aspect="auto", origin="lower", norm=LogNorm(0.01, 30), cmap="viridis")
        axis.set_yticks(range(L + 1), [*(f"block {k}" for k in range(L)), "whole policy"], fontsize=8)
        for t, k in enumerate(first_to_know(torch.tensor(values))):
            if k is not None:
                axis.plot([t - 0.5, t + 0.5], [k - 0.5, k - 0.5], color="white", linewidth=2.5)
    bar = figure.colorbar(image, ax=axes[:, 0], label="answer loss (nats per token)", pad=0.01, extend="both")
    bar.set_ticks([0.01, 0.1, 1, 10], labels=["0.01", "0.1", "1", "10"])
    problem = row["problem"] if isinstance(row["problem"], str) else row["problem"][-1]["content"]
    how = "final norm applied" if args.norm else "raw stream"
    title = f"{problem[-70:]}  gold answer {row['gold']}, {'right' if row['right'] else 'wrong'}; {how}"
    axes[0][0].set(title=title, xlabel="thinking up to this token (\u2205: none)")
    if wide:
        spelt = ["\u2205", *(piece.replace("\n", "\u23ce").replace(" ", "\u2423")[:8] for piece in tokens)]
        axes[0][0].set_xticks(range(len(spelt)), spelt, family="monospace", fontsize=8)
    title = f"median of {layers['typical_of']} right trajectories; white line: from there on all below ln 2"
    axes[1][0].set(title=title, xlabel="thinking read (% of its tokens)")
    axes[1][0].set_xticks(range(0, GRID, 10), [f"{100 * i // (GRID - 1)}" for i in range(0, GRID, 10)])
    return figure


def draw_landscape(result, args):
    """Two surfaces side by side in the same colours; the star marks the weights as they are."""
    figure, axes = panels(1, 2, 11, 4.8, sharex=True, sharey=True)
    titles = ("answer at once", "behind the model's own thinking")
    values = list(itertools.chain.from_iterable(itertools.chain.from_iterable(result["surfaces"].values())))
    levels = [min(values) + (max(values) - min(values) or 1e-6) * i / 20 for i in range(21)]
    for axis, title, surface in zip(axes[0], titles, result["surfaces"].values()):
        # Rows go with a: transposed, a is horizontal.
        image = axis.contourf(*[result["offsets"]] * 2, list(zip(*surface)), levels=levels, cmap="viridis")
        axis.plot([0], [0], "*", color="white", markeredgecolor="black", markersize=14)
        axis.set(title=f"{title} ({result['problems']} problems)", xlabel="a, along direction 1")
    axes[0][0].set_ylabel("b, along direction 2")
    figure.colorbar(image, ax=axes[0], label="loss of the gold answer (nats per token)", format="%.1f")
    return figure


def draw_prune(rows, own):
    """Tokens kept against accuracy."""
    figure, axes = panels(1, 1, 6.5, 4.2)
    axis = axes[0][0]
    shares = [row for row in rows if row["kept"] != "summary"]
    for group, line, label in ((shares, "ko-", "first part of the thinking"), (rows[len(shares) :], "s", "summary")):
        if group:
            x, y, error = zip(*((row["tokens"], row["accuracy"], row["standard_error"]) for row in group))
            axis.errorbar(x, y, error, fmt=line, capsize=3, label=label + " (± standard error)")
    for row in shares:
        axis.annotate(row["kept"], (row["tokens"], row["accuracy"]), xytext=(6, -12), textcoords="offset points")
    axis.margins(x=0.12)
    axis.axhline(own, color="black", linestyle=":", label="the model's own answers")
    axis.set(xlabel="tokens of thinking kept (mean)", ylabel="accuracy, greedy answer behind the cue", ylim=(0, 1.03))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return figure


def draw_behaviours(runs):
    """Mean number of each behaviour per answer, accuracy and length over steps; runs overlaid."""
    figure, axes = panels(2, 3, 12, 6.4, sharex=True)
    colours = ("black", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito
    for axis, name in zip(axes.flat, (*BEHAVIOURS, "accuracy", "length")):
        for i, (run, rows) in enumerate(runs.items()):
            style = dict(color=colours[i % 6], linestyle=("-", "--", "-.", ":")[i % 4], marker="os^Dv"[i % 5])
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], **style, markersize=4, label=run)
        unit = " (per answer)" if name in BEHAVIOURS else " (tokens)" if name == "length" else ""
        top = max(row[name] for rows in runs.values() for row in rows)
        axis.set(title=name.replace("_", " ") + unit, ylim=(0, 1.02 if name == "accuracy" else max(0.2, 1.1 * top)))
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Sub-commands are made by it, too: whatever is wrong with the command line becomes a UserError."""

    def error(self, message):
        raise UserError(f"{message} (--help lists every option)")


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""
    settings = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = Parser(description=__doc__.split("\n")[0], **settings)
    commands = parser.add_subparsers(dest="command", required=True, metavar="descent | landscape | prune | behaviours")
    made = {}
    for command in (descent, landscape, prune, behaviours):
        text = " ".join(command.__doc__.split()).removeprefix("The command: ")
        made[command.__name__] = commands.add_parser(command.__name__, help=text, description=text, **settings)
        made[command.__name__].set_defaults(run=command, summary=None)
        made[command.__name__].add_argument("--output_dir", default="runs/trajectory", help="folder of what it writes")
    for name in ("descent", "landscape", "prune"):
        add = made[name].add_argument
        add("model", metavar="MODEL", help="a run folder, checkpoint, hub id, or 'embedded'")
        source = made[name].add_mutually_exclusive_group()
        source.add_argument("--data", help="problems, as for the training scripts; for embedded models: arithmetic")
        source.add_argument("--completions", help="these answers instead: .jsonl with 'problem', 'text' and 'gold'")
        add("--num_samples", type=int, default=64, help="problems or rows, the first so many; one trajectory each")
        text = "asks for the answer; ANSWER stands for it, and what follows counts as answer, too; \\n is a new line"
        add("--cue", default="\\n\\n**Final Answer**\\n\\boxed{ANSWER", help=text)
        for field in dataclasses.fields(common.RunArgs):
            if field.name in SHARED:
                known, default, text = typing.get_args(field.type) or None, field.default, field.metadata["help"]
                add(f"--{field.name}", type=type(default), default=default, choices=known, help=text)
    add = made["descent"].add_argument
    add(
        "--end_of_thinking", default="", help="curves with the thinking cut short by this text, too, such as '</think>'"
    )
    add("--layers", type=int, default=16, help="trajectories also seen through the policy of every block; 0: none")
    add("--norm", action="store_true", help="for these, apply the final norm to every block's stream: the logit lens")
    add("--answer", type=int, help="which trajectory the first heat map shows, from 0; default: the first right one")
    add = made["landscape"].add_argument
    add("--points", type=int, default=11, help="per direction; odd, so that the weights themselves are among them")
    add("--span", type=float, default=1.0, help="how far to go, in norms of each tensor")
    add = made["prune"].add_argument
    add("--percent", type=int, nargs="+", default=[10, 25, 50, 75, 100], help="shares of the thinking to answer from")
    add("--summary", help="field of --completions with a text to answer from, beside the shares")
    add("--answer_tokens", type=int, default=20, help="tokens to decode behind the cue")
    add = made["behaviours"].add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders with completions.jsonl")
    add("--every", type=int, default=10, help="steps that are averaged into one point")

    argv = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"} & set(argv):
        given = parser.parse_known_args(argv)[0]
        if given.command != "behaviours" and common.is_embedded(given.model):
            made[given.command].set_defaults(**EMBEDDED)
    args = parser.parse_args(argv)
    lowest = dict(num_samples=1, layers=0, answer=0, points=2, span=1e-9, answer_tokens=1, every=1)
    for name, low in lowest.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name} {value}: must be {low if low >= 1 or low == 0 else 'above 0'} or more")
    for share in getattr(args, "percent", []):
        if not 0 <= share <= 100:
            parser.error(f"--percent {share}: must be 0 to 100")
    if args.command == "behaviours":
        return args
    common.RunArgs(**{name: getattr(args, name) for name in SHARED})  # checks their values
    if args.cue.count("ANSWER") != 1:
        parser.error(f"--cue {args.cue!r}: must hold the word ANSWER once")
    if not (args.data or args.completions):
        parser.error("--data: needed; only embedded models have a default")
    if args.summary and not args.completions:
        parser.error("--summary: is a field of --completions; pass that file, too")
    args.cue = args.cue.replace("\\n", "\n")
    return args


def save(args, name, result, figures):
    """Write name.json and the figures into --output_dir."""
    folder = Path(args.output_dir)
    options = {key: value for key, value in vars(args).items() if key != "run"}
    bookkeeping.write_json(folder / f"{name}.json", dict(args=options, **result))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a token in a script that the font lacks: drawn as a box
        for title, figure in figures.items():
            figure.savefig(folder / f"{title}.png", dpi=150)
    print(f"\n{folder}: {name}.json, " + ", ".join(f"{title}.png" for title in figures))


def main(args):
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir}: cannot be written ({error.strerror}); pass another folder")
    args.run(args)


if __name__ == "__main__":
    with common.one_line_errors():
        main(parse())

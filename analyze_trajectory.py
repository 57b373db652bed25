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

Behaviours are counted by regular expressions, in English and in the short notation in which the scripted solvers of the
embedded tasks think: tasks/behaviours.py documents both.

    python analyze_trajectory.py descent embedded            # no GPU, no network: seconds; also runs/grpo, a hub id ...
    python analyze_trajectory.py descent Qwen/Qwen3-4B --data math500.jsonl \\
        --chat_template_kwargs '{"enable_thinking": true}' --end_of_thinking "</think>"
    python analyze_trajectory.py landscape embedded
    python analyze_trajectory.py prune runs/grpo --completions runs/grpo/completions.jsonl
    python analyze_trajectory.py behaviours runs/grpo runs/primed
"""

import argparse
import itertools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch
from tqdm import tqdm
from transformers import DynamicCache

import bookkeeping
import common
import tasks
from plumbing import figures, verifier
from plumbing.errors import UserError, explain, one_line_errors
from plumbing.files import check_folder, is_step, write_json
from plumbing.models import backbone_of, load_model, tokenize_problems
from plumbing.options import ASKING, Parser, add_shared_options, check_shared_options, is_embedded, refuse_below
from plumbing.statistics import quartiles
from tasks.answers import last_boxed
from tasks.behaviours import BEHAVIOURS, KEPT, count_behaviours
from tasks.data_files import fields_of, problem_from_row, read_rows

# Options that mean here what they mean to the training scripts.
SHARED = (*ASKING, "micro_batch_tokens", "grade_timeout", "max_grader_errors")
# Overrides of the defaults for an embedded model. Its answers stand right behind a ';', or at the very beginning.
EMBEDDED = dict(
    data=tasks.DEFAULT,
    system_prompt="",
    max_completion_length=64,
    cue="\\boxed{ANSWER}",
    end_of_thinking=";",
)

# ---------------------------------------------------------------------------------------------------------------------
# Trajectories
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """The thinking of one completion, and the problem it is about."""

    problem: tasks.Problem  # with `ids`, P tokens, and the gold answer
    ids: list[int]  # T tokens: the completion up to its final answer
    pieces: list[str]  # their texts
    right: bool  # whether the completion's own final answer was right
    summary: list[int] | None = None  # tokens of a text to answer from instead


def make_trajectory(tokenizer, problem, completion_ids, right):
    """Cut a completion off before its final answer, with which in view the answer's likelihood would say nothing."""
    pieces = tokenizer.batch_decode([[i] for i in completion_ids])
    end = end_of_thinking("".join(pieces))
    T = 0
    read = 0  # characters
    while T < len(pieces) and read + len(pieces[T]) <= end:
        read += len(pieces[T])
        T += 1
    return Trajectory(problem, completion_ids[:T], pieces[:T], right)


def end_of_thinking(text):
    """Where the final answer of a text begins: at the first </think>, else at the last \\boxed or <answer>, else behind
    the whole text."""
    if "</think>" in text:
        return text.find("</think>")
    last = max(text.rfind("\\boxed"), text.rfind("<answer>"))
    if last < 0:
        return len(text)
    return last


def sample_trajectories(model, tokenizer, args):
    """One sampled completion for each of the first --num_samples problems of --data -> list of Trajectory."""
    problems = tasks.load_problems(args.data, "test", args.num_samples, args.system_prompt)
    template = json.loads(args.chat_template_kwargs)
    problems = tokenize_problems(tokenizer, problems, args.max_prompt_length, template)
    seed = bookkeeping.step_seed(args.seed, "trajectories")
    settings = dict(
        max_completion_length=args.max_completion_length,
        grade_timeout=args.grade_timeout,
        max_rollout_tokens=args.max_rollout_tokens,
        seed=seed,
    )
    result = common.evaluate(model, tokenizer, problems, 1, args.temperature, **settings)
    verifier.refuse_ungraded(result["verdicts"], args.max_grader_errors, args.data)
    rollouts = result["rollouts"]
    trajectories = []
    for i, problem in enumerate(problems):
        ids = rollouts.ids[i, rollouts.mask[i].bool()].tolist()
        if rollouts.finished[i]:
            ids = ids[:-1]  # without the end token
        right = bool(result["rewards"][i, 0] == 1)
        trajectories.append(make_trajectory(tokenizer, problem, ids, right))
    return trajectories


def read_trajectories(tokenizer, args):
    """The first --num_samples rows of --completions -> list of Trajectory. A row holds 'problem' (text or messages),
    'text' and 'gold', and if known 'reward', 'verdict' and 'finished', as in completions.jsonl of a run. Raises
    UserError."""
    trajectories = []
    verdicts = []
    for where, row in itertools.islice(read_rows(args.completions), args.num_samples):
        trajectory, verdict = read_trajectory(tokenizer, where, row, args)
        trajectories.append(trajectory)
        verdicts.append(verdict)
    verifier.refuse_ungraded(verdicts, args.max_grader_errors, args.completions)
    if not trajectories:
        raise UserError(f"{args.completions}: holds no completion; every line needs 'problem', 'text' and 'gold'")
    return trajectories


def is_right(answer):
    """Whether a logged answer is right: its verdict says so. Where none was logged, its reward was that of the verdict;
    with --reward it may be any other."""
    if "verdict" in answer:
        return answer["verdict"] == "right"
    return answer["reward"] == 1


def read_trajectory(tokenizer, where, row, args):
    """One row -> (Trajectory, verdict on its answer). Raises UserError.

    The text is tokenized afresh, which may split it otherwise than the model that wrote it did.
    """
    for name in ("text", "gold", args.summary):
        if name and not isinstance(row.get(name), str):
            raise UserError(f"{where}: no {name}; put text into '{name}' ({fields_of(row)})")
    # Refuses a row without a problem or a gold answer, and takes the blanks around the gold answer away.
    gold = problem_from_row(where, row | dict(answer=row["gold"])).answer
    problem = tasks.problem_from_record(row | dict(gold=gold), where)
    tasks.add_system_prompt([problem], args.system_prompt)
    tokenize_problems(tokenizer, [problem], args.max_prompt_length, json.loads(args.chat_template_kwargs))
    if "reward" not in row:
        finished = row.get("finished", True)
        [verdict] = common.judge([row["text"]], [problem], [finished], args.grade_timeout)
    elif is_right(row):
        verdict = "right"
    else:
        verdict = "wrong"
    ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    right = verdict == "right"
    trajectory = make_trajectory(tokenizer, problem, ids[: args.max_completion_length], right)
    if args.summary:
        trajectory.summary = tokenizer(row[args.summary], add_special_tokens=False)["input_ids"]
    return trajectory, verdict


def load(args):
    """(model, tokenizer, trajectories) of a command."""
    if args.model == "embedded":
        import sft

        sft.ensure_embedded()
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    if args.completions:
        trajectories = read_trajectories(tokenizer, args)
    else:
        trajectories = sample_trajectories(model, tokenizer, args)
    right = sum(trajectory.right for trajectory in trajectories)
    mean = sum(len(trajectory.ids) for trajectory in trajectories) / len(trajectories)
    print(f"{len(trajectories)} trajectories, {right} right, {mean:.1f} tokens of thinking")
    return model, tokenizer, trajectories


def spell_cue(tokenizer, cue, answer):
    """Cue with the word ANSWER in it, and an answer -> (branch ids [S], answer mask [S]). The mask is 1 on the answer
    and on what follows it in the cue, such as the closing brace: without that brace, 2 is the beginning of 27, too."""
    before, after = cue.split("ANSWER")
    # Three texts on their own: that is how the tokens would follow if the model went on from the cue itself.
    before_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    after_ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    ids = before_ids + answer_ids + after_ids
    mask = [0] * len(before_ids) + [1] * len(answer_ids + after_ids)
    return ids, mask


# ---------------------------------------------------------------------------------------------------------------------
# Descent: the answer loss along a trajectory
# ---------------------------------------------------------------------------------------------------------------------

# Branch tokens per forward pass: they attend to each other under a mask, which costs their square.
CHUNK_TOKENS = {"cpu": 256, "cuda": 4096}


class Tree:
    """A trajectory with a branch, cue and answer, behind every prefix of it, on one cache of keys and values.

    The trunk, P prompt tokens and T completion tokens, is read once. Then the T + 1 branches of S tokens run behind it,
    many in one sequence: each sees the first P + i tokens of the trunk and itself, and its positions go on from there.
    That is S - 1 tokens per prefix instead of P + i + S - 1, and the cache exists once.
    """

    def __init__(self, model, prompt_ids, completion_ids, branch_ids, layers):
        self.model = model
        self.layers = layers  # whether the stream after every block is wanted, or the last one alone
        self.P = len(prompt_ids)
        self.T = len(completion_ids)
        self.S = len(branch_ids)
        self.trunk = torch.tensor([*prompt_ids, *completion_ids], device=model.device)
        self.branch = torch.tensor(branch_ids, device=model.device)
        self.cache = DynamicCache(config=model.config)
        if any(layer.is_sliding for layer in self.cache.layers):
            name = type(model).__name__
            raise UserError(f"{name}: attends to a sliding window; use a model with full attention")

    def streams(self, ids, positions, attention_mask=None):
        """Run N tokens behind what the cache holds -> [L, N, D], or [1, N, D] without `layers`; not yet normed."""
        output = backbone_of(self.model)(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=attention_mask,
            cache=self.cache,
            use_cache=True,
            output_hidden_states=self.layers,
        )
        if self.layers:
            return torch.cat(output.hidden_states[1:])
        return output.last_hidden_state

    def read_trunk(self):
        """Fill the cache -> [L, T + 1, D]: behind every prefix, the state that predicts the first branch token."""
        positions = torch.arange(self.P + self.T, device=self.model.device)
        states = self.streams(self.trunk, positions)
        self.kept = [(layer.keys, layer.values) for layer in self.cache.layers]
        return states[:, self.P - 1 :]  # prefix i ends with trunk token P + i - 1

    def read_branches(self, prefixes):
        """Run the branches behind b prefixes -> [L, b, S - 1, D]: the states that predict all branch tokens but the
        first. The last token of a branch is predicted and predicts nothing, so it does not run."""
        owner = prefixes.repeat_interleave(self.S - 1)  # the prefix of every branch token that runs
        index = torch.arange(self.S - 1, device=self.model.device).repeat(len(prefixes))  # its place in the branch
        ids = self.branch[:-1].repeat(len(prefixes))
        states = self.streams(ids, self.P + owner + index, self.visibility(owner, index))
        for layer, (keys, values) in zip(self.cache.layers, self.kept):
            layer.keys = keys  # the cache holds the trunk alone again
            layer.values = values
        return states.unflatten(1, (-1, self.S - 1))

    def visibility(self, owner, index):
        """What each branch token may look at, as an additive mask, which every attention implementation takes."""
        trunk = torch.arange(self.P + self.T, device=self.model.device)
        sees_trunk = trunk < self.P + owner[:, None]
        sees_branch = (owner[:, None] == owner) & (index[:, None] >= index)  # its own branch, up to itself
        sees = torch.cat([sees_trunk, sees_branch], dim=1)  # [b (S - 1), P + T + b (S - 1)]
        bias = torch.zeros(sees.shape, dtype=self.model.dtype, device=self.model.device)
        bias.masked_fill_(~sees, torch.finfo(self.model.dtype).min)
        return bias[None, None]


@torch.no_grad()
def answer_nll(model, prompt_ids, completion_ids, branch_ids, answer_mask, layers=False, norm=False, chunk_tokens=0):
    """Mean negative log-likelihood of an answer, in nats per token, after every prefix of a trajectory -> [T + 1].

    Entry i is the loss of the tokens of branch_ids [S] (cue and answer) where answer_mask [S] is 1, behind prompt_ids
    [P] and completion_ids[:i], i = 0..T (the probe of https://arxiv.org/abs/2505.19815). layers=True -> [L + 1, T + 1]:
    the same under the internal policy of every block, from the raw stream, or the normed one with `norm`; the whole
    policy comes last.
    """
    tree = Tree(model, prompt_ids, completion_ids, branch_ids, layers)
    backbone = backbone_of(model)
    final_norm = backbone.norm
    asked = torch.tensor(answer_mask, device=model.device).nonzero()[:, 0]  # places of the answer in the branch

    def loss(states):  # [b, S, D], column j predicts branch token j -> [b]
        targets = tree.branch[asked].expand(len(states), -1)
        logps, _ = common.token_logps(model, states[:, asked], targets)
        return -logps.mean(-1)

    size = chunk_tokens or CHUNK_TOKENS.get(model.device.type, 1024)
    prefixes_at_once = max(1, size // max(1, tree.S - 1))
    chunks = []
    backbone.norm = torch.nn.Identity()  # so that the last block's raw stream can be had, too
    try:
        predicts_first = tree.read_trunk()
        for prefixes in torch.arange(tree.T + 1, device=model.device).split(prefixes_at_once):
            states = predicts_first[:, prefixes, None]  # [L, b, 1, D]
            if tree.S > 1:
                states = torch.cat([states, tree.read_branches(prefixes)], dim=2)  # [L, b, S, D]
            losses = []
            if layers:
                for state in states:
                    losses.append(loss(final_norm(state) if norm else state))
            losses.append(loss(final_norm(states[-1])))
            chunks.append(torch.stack(losses))
    finally:
        backbone.norm = final_norm
    nll = torch.cat(chunks, dim=1)
    return nll if layers else nll[0]


def direct_nll(model, prefixes, branches, masks, micro_batch_tokens):
    """The answer loss of B unrelated (prefix, branch, answer mask), all of them lists of token ids -> [B]."""
    rollouts = common.assemble(prefixes, branches, 0, model.device)
    for row, (prefix, mask) in enumerate(zip(prefixes, masks)):  # only the answer counts, not the cue
        rollouts.mask[row, len(prefix) : len(prefix) + len(mask)] = torch.tensor(mask).to(rollouts.mask)
    loss = torch.zeros(len(prefixes))
    for rows in common.micro_batches(rollouts, range(len(prefixes)), micro_batch_tokens):
        with torch.no_grad():
            logps, _ = common.completion_logps(model, rollouts, rows, temperature=1.0)
        loss[rows] = -(logps.sum(1) / rollouts.mask[rows].sum(1)).cpu()
    return loss


# Of a token, the first class that one of its characters belongs to. The marks of the notation count as what they do:
# ? and ~ reflect, < infers.
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
    """Texts of the tokens -> the class of each."""
    names = list(TOKEN_CLASSES)
    text = "".join(pieces)
    last = len(names) - 1
    ranks = [last] * len(text)  # of every character: its first class
    for rank in reversed(range(len(names))):
        for match in re.finditer(TOKEN_CLASSES[names[rank]], text):
            ranks[match.start() : match.end()] = [rank] * len(match.group())
    classes = []
    start = 0
    for piece in pieces:
        end = start + len(piece)
        classes.append(names[min(ranks[start:end], default=last)])
        start = end
    return classes


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


GRID = 41  # points from the beginning of the thinking, 0%, to its end, 100%


def on_grid(nll):
    """[..., T + 1] -> [..., GRID]: trajectories of different lengths on one axis, the nearest prefix at every point."""
    nearest = torch.linspace(0, nll.shape[-1] - 1, GRID).round().long()
    return nll[..., nearest]


def first_to_know(nll):
    """[L + 1, n] -> per column the lowest block from which on all blocks and the whole policy, the last row, give the
    answer's tokens more than 1/2 each (geometric mean): a loss below ln 2. None where no block does."""
    found = []
    for column in nll.T.tolist():
        k = len(column)
        while k > 0 and column[k - 1] < math.log(2):
            k -= 1
        only_the_whole_policy = k >= len(column) - 1
        found.append(None if only_the_whole_policy else k)
    return found


def descent(args):
    """The command: loss along trajectories, token classes and layers into descent.json, a table and three figures."""
    model, tokenizer, trajectories = load(args)
    thinking = [trajectory for trajectory in trajectories if trajectory.ids]
    print(f"{len(trajectories) - len(thinking)} answer without thinking and are left out")
    if not thinking:
        raise UserError("no trajectory has any thinking before its answer; take more --num_samples or another model")
    shown = choose_shown(thinking, args.answer)
    check_end_of_thinking(tokenizer, thinking, args.end_of_thinking)
    rows, maps = follow(model, tokenizer, thinking, shown, args)
    curves = summarize_curves(rows)
    steps = summarize_steps(rows)
    classes = summarize_classes(rows)
    layers = None
    if maps:
        layers = summarize_layers(thinking, maps, shown)
    drawn = {"descent": draw_descent(curves, steps, args), "classes": draw_classes(classes)}
    if layers:
        drawn["layers"] = draw_layers(layers, rows[shown], args)
    save(args, "descent", dict(curves=curves, steps=steps, classes=classes, layers=layers, trajectories=rows), drawn)
    print(descent_table(curves, steps, classes, layers))


def check_end_of_thinking(tokenizer, trajectories, text):
    """Raise UserError if a text such as '</think>' ends a block that no trajectory is in: neither its prompt nor its
    thinking has opened one. What follows would be likely or unlikely for no reason of reasoning."""
    for name in re.findall(r"</(\w+)>", text):
        for trajectory in trajectories:
            read = tokenizer.decode(trajectory.problem.ids + trajectory.ids)
            if read.count(f"<{name}>") > read.count(f"</{name}>"):
                break
        else:
            remedy = """with a template such as Qwen3's pass --chat_template_kwargs '{"enable_thinking": true}'"""
            raise UserError(f"--end_of_thinking {text!r}: no trajectory has an open <{name}>; {remedy}")


def choose_shown(trajectories, answer):
    """Which trajectory the first heat map shows: --answer, else the first right one, else the first."""
    if answer is None:
        rights = [i for i, trajectory in enumerate(trajectories) if trajectory.right]
        return rights[0] if rights else 0
    if answer >= len(trajectories):
        last = len(trajectories) - 1
        raise UserError(f"--answer {answer}: there are trajectories 0 to {last} with any thinking")
    return answer


def follow(model, tokenizer, trajectories, shown, args):
    """The answer loss along every trajectory -> (rows: a dict per trajectory; maps: trajectory -> loss under every
    block [L + 1, T + 1], of the shown one and of right ones, --layers in all)."""
    cues = {"nll": args.cue}
    if args.end_of_thinking:  # goes between the prefix and the answer cue, wherever the thinking has got to
        cues["nll_cut_short"] = args.end_of_thinking + args.cue
    others = [i for i, trajectory in enumerate(trajectories) if trajectory.right and i != shown]
    mapped = [shown, *others][: args.layers]
    rows = []
    maps = {}
    for i, trajectory in enumerate(tqdm(trajectories, desc="trajectories", leave=False, disable=None)):
        problem = trajectory.problem
        row = dict(problem=problem.prompt, gold=problem.answer, right=trajectory.right, tokens=trajectory.pieces)
        for name, cue in cues.items():
            branch, mask = spell_cue(tokenizer, cue, problem.answer)
            layers = name == "nll" and i in mapped
            nll = answer_nll(model, problem.ids, trajectory.ids, branch, mask, layers=layers, norm=args.norm).cpu()
            if layers:
                maps[i] = nll
                nll = nll[-1]
            row[name] = nll.tolist()
        rows.append(row)
    return rows, maps


KINDS = {"right": ("black", "o-"), "wrong": ("#D55E00", "s--")}  # colour, mark and line: told apart in grey, too


def summarize_curves(rows):
    """Cue -> 'right' or 'wrong' -> number of trajectories, and quartiles of their loss at every point of the grid."""
    curves = {}
    for name in ("nll", "nll_cut_short"):
        if name not in rows[0]:
            continue
        curves[name] = {}
        for kind in KINDS:
            points = [on_grid(torch.tensor(row[name])).tolist() for row in rows if row["right"] == (kind == "right")]
            if points:
                by_point = [quartiles(values) for values in zip(*points)]
                curves[name][kind] = dict(trajectories=len(points), quartiles=by_point)
    return curves


def losses_between_steps(row):
    """The answer loss of one trajectory before its first step and after every step that is kept, a list."""
    losses = [row["nll"][0]]
    for piece, nll in zip(row["tokens"], row["nll"][1:]):
        if piece == KEPT:
            losses.append(nll)
    return losses


def summarize_steps(rows):
    """'right' or 'wrong' -> of 0, 1, 2 ... steps: how many trajectories get there, and quartiles of their loss there.

    Inside a step nobody would ask for the answer; between two steps somebody might. A step ends with the mark of
    tasks/behaviours.py. Where no thinking has that mark there are no steps: {}.
    """
    steps = {}
    for kind in KINDS:
        losses = [losses_between_steps(row) for row in rows if row["right"] == (kind == "right")]
        longest = max((len(curve) for curve in losses), default=0)
        if longest < 2:
            continue
        steps[kind] = []
        for done in range(longest):
            there = [curve[done] for curve in losses if len(curve) > done]
            steps[kind].append(dict(trajectories=len(there), quartiles=quartiles(there)))
    return steps


def summarize_classes(rows):
    """Class of tokens -> how many there are, how often the loss falls there, and quartiles of its relative change."""
    classes = {}
    changes = relative_changes((row["tokens"], row["nll"]) for row in rows)
    for name, signed in changes.items():
        falls = [change for change in signed if change < 0]
        classes[name] = dict(
            tokens=len(signed),
            falls=len(falls) / len(signed),
            signed=quartiles(signed),
            relative_change=quartiles([abs(change) for change in signed]),
        )
    return classes


def summarize_layers(trajectories, maps, shown):
    """What the two heat maps show: one trajectory, and the median of the right ones on the grid."""
    rights = [on_grid(nll) for i, nll in maps.items() if trajectories[i].right]
    if not rights:
        rights = [on_grid(maps[shown])]
    return dict(
        shown=shown,
        map=maps[shown].tolist(),
        typical=torch.stack(rights).median(0).values.tolist(),
        first_to_know=first_to_know(maps[shown]),
        typical_of=len(rights),
    )


def descent_table(curves, steps, classes, layers):
    """The numbers of `descent` as text."""
    shares = "".join(f"{share:>8}%" for share in (0, 25, 50, 75, 100))
    lines = ["", f"{'median answer loss (nats)':34}{shares}"]
    for name, kinds in curves.items():
        for kind, curve in kinds.items():
            medians = [median for _, median, _ in curve["quartiles"][:: (GRID - 1) // 4]]
            cells = "".join(f"{median:9.3f}" for median in medians)
            title = f"{name}, {kind} ({curve['trajectories']})"
            lines.append(f"{title:34}{cells}")
    if steps:
        lines.append("\nmedian answer loss (nats) between steps, and of how many trajectories")
    for kind, points in steps.items():
        for done, point in enumerate(points):
            title = f"{kind}, after {done} steps"
            lines.append(f"{title:34}{point['quartiles'][1]:9.3f}{point['trajectories']:9d}")
    lines.append(f"\n{'token class':12}{'tokens':>8}{'|dL|/L: median':>16}{'quartiles':>20}{'loss falls':>12}")
    for name, numbers in classes.items():
        low, median, high = numbers["relative_change"]
        between = f"{low:.3f} to {high:.3f}"
        lines.append(f"{name:12}{numbers['tokens']:8d}{median:16.3f}{between:>20}{numbers['falls']:12.0%}")
    if layers:
        k = layers["first_to_know"][-1]
        known = "no block knows the answer" if k is None else f"the answer is known from block {k} on"
        lines.append(f"\nat the end of trajectory {layers['shown']} {known}")
    return "\n".join(lines)


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
    embedding = model.get_input_embeddings().weight.data_ptr()
    head = model.get_output_embeddings().weight.data_ptr()
    moved = [parameter for parameter in model.parameters() if parameter.data_ptr() not in (embedding, head)]
    theta = [parameter.clone() for parameter in moved]
    generator = torch.Generator().manual_seed(seed)
    d1 = random_direction(moved, generator)
    d2 = random_direction(moved, generator)
    values = []
    try:
        for a in offsets:
            row = []
            for b in offsets:
                for parameter, start, x, y in zip(moved, theta, d1, d2):
                    parameter.copy_(start + a * x + b * y)
                row.append(measure())
            values.append(row)
    finally:
        for parameter, start in zip(moved, theta):
            parameter.copy_(start)
    return values


def random_direction(parameters, generator):
    """A Gaussian tensor for every parameter, as long as the parameter itself."""
    direction = []
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        direction.append(noise * (parameter.norm() / noise.norm()))
    return direction


SURFACES = ("at_once", "behind_thinking")


def landscape(args):
    """The command: two surfaces over one plane, landscape.json and a figure. Both are of the problems that the model
    solved: the answer at once, and behind the model's own thinking."""
    model, tokenizer, trajectories = load(args)
    solved = [trajectory for trajectory in trajectories if trajectory.right and trajectory.ids]
    if not solved:
        raise UserError("no trajectory is right and has any thinking; take more --num_samples or another model")
    at_once = []
    behind = []
    branches = []
    masks = []
    for trajectory in solved:
        branch, mask = spell_cue(tokenizer, args.cue, trajectory.problem.answer)
        branches.append(branch)
        masks.append(mask)
        at_once.append(trajectory.problem.ids)
        behind.append(trajectory.problem.ids + trajectory.ids)
    offsets = [args.span * (2 * i / (args.points - 1) - 1) for i in range(args.points)]
    bar = tqdm(total=len(offsets) ** 2, desc="points", leave=False, disable=None)

    def measure():
        bar.update()
        losses = {}
        for name, prefixes in zip(SURFACES, (at_once, behind)):
            losses[name] = direct_nll(model, prefixes, branches, masks, args.micro_batch_tokens).mean().item()
        return losses

    values = on_plane(model, offsets, measure, args.seed)
    bar.close()
    if not all(math.isfinite(loss) for row in values for losses in row for loss in losses.values()):
        raise UserError(f"--span {args.span}: so far from the weights the loss is no number; lower it")
    here = measure()
    surfaces = {}
    for name in SURFACES:
        surfaces[name] = [[losses[name] for losses in row] for row in values]
    result = dict(offsets=offsets, problems=len(solved), surfaces=surfaces)
    save(args, "landscape", result, {"landscape": draw_landscape(result, args)})
    for name, surface in surfaces.items():
        lowest = min(map(min, surface))
        highest = max(map(max, surface))
        print(f"{name:16} {here[name]:.3f} nats at the weights; on the plane {lowest:.3f} to {highest:.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# Prune: the answer from a part of the thinking
# ---------------------------------------------------------------------------------------------------------------------


def complete_answer(cue, text):
    """The cue, up to the answer, and what was decoded behind it -> both, up to the end of the first complete answer:
    what a model that was not stopped goes on to write is not its answer."""
    for match in re.finditer(r"\}|</answer>", text):
        candidate = cue + text[: match.end()]
        if match.group() == "</answer>" or last_boxed(candidate) is not None:
            return candidate
    return cue + text


def answer_from(model, tokenizer, trajectories, prefixes, args):
    """Decode an answer greedily behind prompt, prefix (lists of token ids) and cue -> list of rewards. Raises UserError
    if too many answers have no verdict."""
    cue = args.cue.split("ANSWER")[0]
    cue_ids = tokenizer(cue, add_special_tokens=False)["input_ids"]
    prompts = []
    for trajectory, prefix in zip(trajectories, prefixes):
        prompts.append(trajectory.problem.ids + prefix + cue_ids)
    rollouts = common.sample(model, tokenizer, prompts, 1, args.answer_tokens, 0.0, args.max_rollout_tokens)
    texts = [complete_answer(cue, text) for text in rollouts.texts]
    problems = [trajectory.problem for trajectory in trajectories]
    verdicts = common.judge(texts, problems, [True] * len(texts), args.grade_timeout)
    verifier.refuse_ungraded(verdicts, args.max_grader_errors, "the shortened thinking")
    return [common.REWARDS.get(verdict, 0.0) for verdict in verdicts]


def prune(args):
    """The command: accuracy from a part of the thinking against the tokens kept, prune.json, a table and a figure."""
    model, tokenizer, trajectories = load(args)
    kept = {}  # what is kept -> the prefix of every trajectory
    for share in args.percent:
        kept[f"{share}%"] = [first_part(trajectory.ids, share) for trajectory in trajectories]
    if args.summary:
        kept["summary"] = [trajectory.summary for trajectory in trajectories]
    rows = []
    for name, prefixes in kept.items():
        rewards = answer_from(model, tokenizer, trajectories, prefixes, args)
        rows.append(prune_row(name, prefixes, rewards, trajectories))
    own = sum(trajectory.right for trajectory in trajectories) / len(trajectories)
    result = dict(rows=rows, own_accuracy=own, trajectories=len(trajectories))
    save(args, "prune", result, {"prune": draw_prune(rows, own)})
    print(prune_table(rows))
    print(f"as it was: {own:.3f}, with the model's own answer behind all of its thinking")


def first_part(ids, share):
    """The first `share` percent of a list."""
    return ids[: math.ceil(len(ids) * share / 100)]


def prune_row(name, prefixes, rewards, trajectories):
    """The numbers of one way to shorten the thinking."""
    n = len(trajectories)
    right = [reward == 1 for reward in rewards]
    accuracy = sum(right) / n
    row = dict(
        kept=name,
        tokens=sum(len(prefix) for prefix in prefixes) / n,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / n),
    )
    for kind in KINDS:  # what became of answers that were right, or wrong
        group = [now for now, before in zip(right, trajectories) if before.right == (kind == "right")]
        row[f"accuracy_of_{kind}"] = sum(group) / len(group) if group else None
    return row


def prune_table(rows):
    """The numbers of `prune` as text."""
    lines = [f"{'kept':>8} {'tokens':>8} {'accuracy':>15} {'of right':>9} {'of wrong':>9}"]
    for row in rows:
        accuracy = f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}"
        line = f"{row['kept']:>8} {row['tokens']:8.1f} {accuracy:>15}"
        for kind in KINDS:
            value = row[f"accuracy_of_{kind}"]
            cell = "-" if value is None else f"{value:.3f}"
            line += f" {cell:>9}"
        lines.append(line)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Behaviours in the answers of training runs
# ---------------------------------------------------------------------------------------------------------------------


def read_behaviours(run, every):
    """completions.jsonl of a run -> one dict per `every` steps: step (the last of them), answers, accuracy, length, and
    for each behaviour its mean count per answer and the share of answers that show it. Reads line by line: the file of
    a long run does not fit into memory. Raises UserError."""
    path = Path(run) / "completions.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; pass the output_dir of a run of grpo.py, bupo.py, opo.py or em.py")
    bins = defaultdict(Counter)  # number of the bin -> sums over its answers
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                add_answer(bins, json.loads(line), every)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if not line.endswith("\n"):  # cut off by a kill
                    continue
                what = f"no {error}" if isinstance(error, KeyError) else str(error)[:60]
                raise UserError(f"{path}:{number}: not an answer of a run ({what}); mend or delete the line")
    rows = [behaviours_row(sums) for _, sums in sorted(bins.items())]
    if not rows:
        raise UserError(f"{path}: holds no answer; let the run do some steps first")
    return rows


def add_answer(bins, answer, every):
    """Add one answer, a line of completions.jsonl, to the sums of its bin. All fields are read first: a line that lacks
    one raises KeyError and leaves no empty bin behind."""
    counts = count_behaviours(answer["text"])
    right = is_right(answer)
    length = answer["length"]
    step = answer["step"]
    if not is_step(step) or not is_step(length) or not isinstance(answer["reward"], (int, float)):
        raise TypeError("its step, length or reward is no number of that kind")
    sums = bins[math.ceil(step / every)]
    sums.update(answers=1, right=right, length=length)
    sums["last"] = max(step, sums["last"])
    for name, count in counts.items():
        sums.update({name: count, f"{name}_share": count > 0})


def behaviours_row(sums):
    """Sums over answers -> their means."""
    answers = sums["answers"]
    row = dict(step=sums["last"], answers=answers, accuracy=sums["right"] / answers, length=sums["length"] / answers)
    for name in BEHAVIOURS:
        row[name] = sums[name] / answers
    for name in BEHAVIOURS:
        row[f"{name}_share"] = sums[f"{name}_share"] / answers
    return row


def behaviours(args):
    """The command: behaviours over training steps into behaviours.json, a table and a figure."""
    runs = {run: read_behaviours(run, args.every) for run in dict.fromkeys(args.runs)}
    save(args, "behaviours", dict(runs=runs), {"behaviours": draw_behaviours(runs)})
    for run, rows in runs.items():
        print(f"\n{run}, mean number per answer (share of answers with any)")
        print(behaviours_table(rows))


def behaviours_table(rows):
    """The numbers of one run as text."""
    titles = "".join(f"{name.replace('_', ' '):>19}" for name in BEHAVIOURS)
    lines = [f"{'step':>6} {'accuracy':>9} {'length':>7}{titles}"]
    for row in rows:
        line = f"{row['step']:6d} {row['accuracy']:9.3f} {row['length']:7.1f} "
        for name in BEHAVIOURS:
            share = row[f"{name}_share"]
            line += f"{row[name]:11.2f} ({share:4.0%}) "
        lines.append(line)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def draw_descent(curves, steps, args):
    """Median and quartiles of the answer loss along the thinking, right and wrong trajectories; a panel per cue, and
    one of the points between steps."""
    panels = len(curves) + bool(steps)
    figure, axes = figures.panels(1, panels, 1.5 + 5 * panels, 4.2, sharey=True)
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
    for kind, points in steps.items():
        low, median, high = zip(*[point["quartiles"] for point in points])
        colour, line = KINDS[kind]
        done = list(range(len(points)))
        axes[0][-1].plot(done, median, line, color=colour)
        axes[0][-1].fill_between(done, low, high, color=colour, alpha=0.15, linewidth=0)
    if steps:
        axes[0][-1].set(title="answer cue at once, between two steps", xlabel="steps finished")
        axes[0][-1].grid(alpha=0.3)
    axes[0][0].set(ylabel="loss of the gold answer (nats per token)\nmedian and quartiles", ylim=(0, None))
    figures.legend_below(figure, axes[0][0], 2)
    return figure


def draw_classes(classes):
    """Median and quartiles of the relative change by token class, on a logarithmic axis."""
    from matplotlib.ticker import LogFormatter

    figure, axes = figures.panels(1, 1, 7.5, 1.2 + 0.5 * len(classes))
    axis = axes[0][0]
    names = list(reversed(classes))
    for y, name in enumerate(names):
        low, median, high = [max(value, 1e-4) for value in classes[name]["relative_change"]]  # 0 has no logarithm
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
    L = len(layers["map"]) - 1
    tokens = row["tokens"]
    spelt = len(tokens) <= 60
    width = max(8, 3 + 0.3 * len(tokens)) if spelt else 13
    figure, axes = figures.panels(2, 1, width, 2 + 0.44 * (L + 1))
    top = axes[0][0]
    below = axes[1][0]
    draw_heat_map(top, layers["map"])
    image = draw_heat_map(below, layers["typical"])
    bar = figure.colorbar(image, ax=axes[:, 0], label="answer loss (nats per token)", pad=0.01, extend="both")
    bar.set_ticks([0.01, 0.1, 1, 10], labels=["0.01", "0.1", "1", "10"])
    top.set(title=layers_title(row, args), xlabel="thinking up to this token (\u2205: none)")
    if spelt:
        labels = ["\u2205"] + [figures.visible(piece, 8) for piece in tokens]
        top.set_xticks(range(len(labels)), labels, family="monospace", fontsize=8)
    title = f"median of {layers['typical_of']} right trajectories; white line: from there on all below ln 2"
    below.set(title=title, xlabel="thinking read (% of its tokens)")
    places = range(0, GRID, 10)
    below.set_xticks(places, [f"{100 * place // (GRID - 1)}" for place in places])
    return figure


def layers_title(row, args):
    """What the heat map of one trajectory is of."""
    problem = row["problem"]
    if not isinstance(problem, str):
        problem = problem[-1]["content"]
    outcome = "right" if row["right"] else "wrong"
    stream = "final norm applied" if args.norm else "raw stream"
    return f"{problem[-70:]}  gold answer {row['gold']}, {outcome}; {stream}"


def draw_heat_map(axis, values):
    """The answer loss [L + 1, n] under every block and the whole policy, and a line below the blocks that know it."""
    from matplotlib.colors import LogNorm

    L = len(values) - 1
    # Logarithmic: the raw stream of a wrong layer is wrong by tens of nats. Dark knows the answer, in grey, too.
    shades = torch.tensor(values).clamp(min=0.01).tolist()  # 0 has no logarithm
    image = axis.imshow(shades, aspect="auto", origin="lower", norm=LogNorm(0.01, 30), cmap="viridis")
    axis.set_yticks(range(L + 1), [*(f"block {k}" for k in range(L)), "whole policy"], fontsize=8)
    for t, k in enumerate(first_to_know(torch.tensor(values))):
        if k is not None:
            axis.plot([t - 0.5, t + 0.5], [k - 0.5, k - 0.5], color="white", linewidth=2.5)
    return image


def draw_landscape(result, args):
    """Two surfaces side by side in the same colours; the star marks the weights as they are."""
    figure, axes = figures.panels(1, 2, 11, 4.8, sharex=True, sharey=True)
    titles = ("answer at once", "behind the model's own thinking")
    offsets = result["offsets"]
    surfaces = list(result["surfaces"].values())
    lowest = min(min(row) for surface in surfaces for row in surface)
    highest = max(max(row) for surface in surfaces for row in surface)
    height = highest - lowest
    if height == 0:
        height = 1e-6  # a flat surface needs levels, too
    levels = [lowest + height * i / 20 for i in range(21)]
    for axis, title, surface in zip(axes[0], titles, surfaces):
        across = list(zip(*surface))  # rows go with a: transposed, a is horizontal
        image = axis.contourf(offsets, offsets, across, levels=levels, cmap="viridis")
        axis.plot([0], [0], "*", color="white", markeredgecolor="black", markersize=14)
        axis.set(title=f"{title} ({result['problems']} problems)", xlabel="a, along direction 1")
    axes[0][0].set_ylabel("b, along direction 2")
    figure.colorbar(image, ax=axes[0], label="loss of the gold answer (nats per token)", format="%.1f")
    return figure


def draw_prune(rows, own):
    """Tokens kept against accuracy."""
    figure, axes = figures.panels(1, 1, 6.5, 4.2)
    axis = axes[0][0]
    shares = [row for row in rows if row["kept"] != "summary"]
    summaries = [row for row in rows if row["kept"] == "summary"]
    draw_accuracies(axis, shares, "ko-", "first part of the thinking")
    draw_accuracies(axis, summaries, "s", "summary")
    for row in shares:
        axis.annotate(row["kept"], (row["tokens"], row["accuracy"]), xytext=(6, -12), textcoords="offset points")
    axis.margins(x=0.12)
    axis.axhline(own, color="black", linestyle=":", label="the model's own answers")
    axis.set(xlabel="tokens of thinking kept (mean)", ylabel="accuracy, greedy answer behind the cue", ylim=(0, 1.03))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return figure


def column(rows, name):
    """One number of every row."""
    return [row[name] for row in rows]


def draw_accuracies(axis, rows, style, label):
    """Accuracy against tokens with standard errors; nothing without rows."""
    if rows:
        axis.errorbar(
            column(rows, "tokens"),
            column(rows, "accuracy"),
            column(rows, "standard_error"),
            fmt=style,
            capsize=3,
            label=label + " (± standard error)",
        )


def draw_behaviours(runs):
    """Mean number of each behaviour per answer, accuracy and length over steps; runs overlaid."""
    figure, axes = figures.panels(2, 3, 12, 6.4, sharex=True)
    for axis, name in zip(axes.flat, (*BEHAVIOURS, "accuracy", "length")):
        top = 0.0
        for i, (run, rows) in enumerate(runs.items()):
            values = column(rows, name)
            axis.plot(column(rows, "step"), values, **figures.style_of(i), markersize=4, label=run)
            top = max(top, *values)
        title = name.replace("_", " ")
        if name in BEHAVIOURS:
            title += " (per answer)"
        if name == "length":
            title += " (tokens)"
        if name == "accuracy":
            highest = 1.02
        else:
            highest = max(0.2, 1.1 * top)
        axis.set(title=title, ylim=(0, highest))
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figures.legend_below(figure, axes[0][0], 4)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


COMMANDS = (descent, landscape, prune, behaviours)


def make_parser():
    """(parser, its sub-parsers by command)."""
    settings = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = Parser(description=__doc__.split("\n")[0], **settings)
    commands = parser.add_subparsers(dest="command", required=True, metavar="descent | landscape | prune | behaviours")
    made = {}
    for command in COMMANDS:
        text = " ".join(command.__doc__.split()).removeprefix("The command: ")
        sub_parser = commands.add_parser(command.__name__, help=text, description=text, **settings)
        sub_parser.set_defaults(run=command, summary=None)
        sub_parser.add_argument("--output_dir", default="runs/trajectory", help="folder of what it writes")
        made[command.__name__] = sub_parser
    for name in ("descent", "landscape", "prune"):
        add_trajectory_options(made[name])
    add = made["descent"].add_argument
    text = "curves with the thinking cut short by this text, too, such as '</think>'"
    add("--end_of_thinking", default="", help=text)
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
    return parser, made


def add_trajectory_options(parser):
    """Options of the commands that look at a model's trajectories."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run folder, checkpoint, hub id, or 'embedded'")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", help=f"problems, as for the training scripts; for embedded models: {tasks.DEFAULT}")
    source.add_argument("--completions", help="these answers instead: .jsonl with 'problem', 'text' and 'gold'")
    add("--num_samples", type=int, default=64, help="problems or rows, the first so many; one trajectory each")
    text = "asks for the answer; ANSWER stands for it, and what follows counts as answer, too; \\n is a new line"
    add("--cue", default="\\n\\n**Final Answer**\\n\\boxed{ANSWER", help=text)
    add_shared_options(parser, SHARED)


MOST_POINTS = 1001  # of the landscape, in each direction: it takes a pass for every pair of them
LOWEST = dict(num_samples=1, layers=0, answer=0, points=2, span=1e-9, answer_tokens=1, every=1)


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""
    words = sys.argv[1:] if argv is None else argv
    parser, made = make_parser()
    if not {"-h", "--help"} & set(words):
        given = parser.parse_known_args(words)[0]
        if given.command != "behaviours" and is_embedded(given.model):
            made[given.command].set_defaults(**EMBEDDED)
    args = parser.parse_args(words)
    check_numbers(parser, args)
    if args.command != "behaviours":
        check_trajectory_options(parser, args)
        args.cue = args.cue.replace("\\n", "\n")
    return args


def check_numbers(parser, args):
    """Raise UserError for a number out of its bounds."""
    refuse_below(parser, args, LOWEST)
    if getattr(args, "points", 0) > MOST_POINTS:
        parser.error(f"--points {args.points}: must be at most {MOST_POINTS}")
    for share in getattr(args, "percent", []):
        if not 0 <= share <= 100:
            parser.error(f"--percent {share}: must be 0 to 100")


def check_trajectory_options(parser, args):
    """Raise UserError for options that do not fit together."""
    check_shared_options(args, SHARED)
    if args.cue.count("ANSWER") != 1:
        parser.error(f"--cue {args.cue!r}: must hold the word ANSWER once")
    if not (args.data or args.completions):
        parser.error("--data: needed; only embedded models have a default")
    if args.summary and not args.completions:
        parser.error("--summary: is a field of --completions; pass that file, too")


def save(args, name, result, drawn):
    """Write name.json and the figures into --output_dir, before the table is shown: what is on the screen shall be in
    the folder."""
    folder = Path(args.output_dir)
    options = {key: value for key, value in vars(args).items() if key != "run"}
    write_json(folder / f"{name}.json", dict(args=options, **result))
    figures.save_figures(folder, drawn)
    print(f"\n{folder}: {name}.json, " + ", ".join(f"{title}.png" for title in drawn))


FILES = {  # of each command
    "descent": ("descent.json", "descent.png", "classes.png", "layers.png"),
    "landscape": ("landscape.json", "landscape.png"),
    "prune": ("prune.json", "prune.png"),
    "behaviours": ("behaviours.json", "behaviours.png"),
}


def main(args):
    check_folder(args.output_dir, FILES[args.command])
    with explain(f"--output_dir {args.output_dir}: cannot be written", "pass another folder", OSError):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main(parse())

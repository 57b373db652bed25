"""Where is the answer decided? Activation patching (https://arxiv.org/abs/2202.05262), a causal look inside.

A lens reads what a block holds; whether the blocks above make use of it, it cannot say. So change it and see. While a
model reads an answer, put the residual stream of another run in the place of its own, after block k and at position t
alone, let the blocks above go on from there, and look at the log-prob of what is wanted:
    effect(k, t) = log pi(wanted | S_k,t of the other run) - log pi(wanted)        nats, summed over the tokens wanted

The other run is one of these:
    one model       the same model, which reads a right answer of its own. It is patched while it reads a wrong one of
                    as many tokens, both up to the box. Wanted is the right result: where lies the difference between
                    right and wrong, and from which block on does the box hold it?
    two models      a second model, which reads the same: a right answer that it gave. Wanted is this answer: which of
                    the second model's states would make the first one give it?

A patch of a stream by itself changes nothing, exactly. A patch after the last block at the last position, the one that
predicts the first token wanted, makes its log-prob that of the other run. Effects of several places do not add up. The
gap is the log-prob in the other run minus that without a patch: what there is to be explained.

    python analyze_patching.py                               # the embedded model, right against wrong answers
    python analyze_patching.py runs/tiny runs/grpo           # the trained model's states in the untrained one
    python analyze_patching.py runs/words_grpo --data words --system_prompt "" --max_completion_length 48
    python analyze_patching.py Qwen/Qwen3-4B --data problems.jsonl --blocks 0 8 16 24 32 35 --num_cases 8
"""

import copy
import json
import textwrap
from dataclasses import dataclass

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch
from tqdm import tqdm

import bookkeeping
import common
import tasks
from plumbing import figures
from plumbing.clusters import clustered_mean
from plumbing.errors import UserError, one_line_errors
from plumbing.files import check_folder, make_output_folder, write_json
from plumbing.kv_cache import growing_cache
from plumbing.models import backbone_of, load_model, refuse_other_shape, shape_of, tokenize_problems
from plumbing.options import ASKING, add_shared_options, analysis_parser, parse_for_models, refuse_below
from plumbing.streams import reading, replacing
from tasks.answers import last_box

# Options that mean here what they mean to the training scripts.
SHARED = (*ASKING, "micro_batch_tokens", "grade_timeout")
# Overrides of the defaults when all models are embedded ones.
EMBEDDED = dict(data=tasks.DEFAULT, system_prompt="", max_completion_length=64)

SIDE_BY_SIDE = 16  # positions patched in one batch: what stands before the first of them is read once for all

# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """What the patched run reads, what the other run reads, token by token, and what is wanted behind both."""

    problem: str
    patched: list[int]  # the prompt, and of a wrong answer what stands before the result
    other: list[int]  # as many tokens
    wanted: list[int]  # the right result, or with two models the right answer

    def positions(self):
        """Where the two runs' streams can differ: everywhere with two models, else from the first other token on, but
        not where all that is wanted is read already."""
        if self.patched == self.other:
            return list(range(len(self.patched) + len(self.wanted) - 1))
        different = [t for t, (ours, theirs) in enumerate(zip(self.patched, self.other)) if ours != theirs]
        return list(range(different[0], len(self.patched)))

    def group(self, t):
        """The name of a position's group, one of GROUPS."""
        if t == len(self.patched) - 1:
            return "last"
        if t >= len(self.patched):
            return "wanted"
        if self.patched[t] != self.other[t]:
            return "other token"
        return "same token"


GROUPS = {
    "same token": "a token that both runs read",
    "other token": "a token that differs between the runs",
    "last": "the last position before what is wanted",
    "wanted": "a token of the answer that is wanted",
}


def context_of(tokenizer, text):
    """The tokens of an answer up to and including the opening of its last box; None if it has none."""
    box = last_box(text)
    if box is None:
        return None
    return tokenizer(text[: box.start], add_special_tokens=False)["input_ids"]


def find_cases(model, tokenizer, problems, args, two_models):
    """The first --num_cases problems that give one -> list of Case. Answers are sampled from `model`. Raises UserError
    if no problem does."""
    cases = []
    for start in range(0, len(problems), args.num_cases):
        block = problems[start : start + args.num_cases]
        for problem, right, wrong in answers_of(model, tokenizer, block, args, start):
            if two_models:
                case = same_answer(tokenizer, problem, right)
            else:
                case = right_against_wrong(tokenizer, problem, right, wrong)
            if case is not None:
                cases.append(case)
        if len(cases) >= args.num_cases:
            return cases[: args.num_cases]
    if not cases:
        needed = "a right answer" if two_models else "a right and a wrong answer of as many tokens"
        raise UserError(f"{args.data}: {needed} to one of {len(problems)} problems was not found; raise --num_samples")
    return cases


def answers_of(model, tokenizer, problems, args, start):
    """Yield (problem, right answers, wrong ones), answers as text; --num_samples of them to every problem."""
    rollouts = common.sample(
        model,
        tokenizer,
        [problem.ids for problem in problems],
        args.num_samples,
        args.max_completion_length,
        args.temperature,
        args.max_rollout_tokens,
        seed=bookkeeping.step_seed(args.seed, start),
    )
    verdicts, _ = common.grade_rollouts(rollouts, problems, args.grade_timeout)
    for p, problem in enumerate(problems):
        texts = {"right": [], "wrong": []}
        for row in range(p * args.num_samples, (p + 1) * args.num_samples):
            if verdicts[row] in texts:
                texts[verdicts[row]].append(rollouts.texts[row])
        yield problem, texts["right"], texts["wrong"]


def same_answer(tokenizer, problem, right):
    """The first of the right answers, its end token with it, which both models are asked for -> Case; None if there is
    none."""
    if not right:
        return None
    wanted = tokenizer(right[0], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Case(problem.question(), problem.ids, problem.ids, wanted)


def right_against_wrong(tokenizer, problem, right, wrong):
    """The first two answers, one right and one wrong, of as many tokens up to the box -> Case, or None."""
    wanted = tokenizer(problem.answer + "}", add_special_tokens=False)["input_ids"]
    for right_text in right:
        other = context_of(tokenizer, right_text)
        for wrong_text in wrong:
            patched = context_of(tokenizer, wrong_text)
            if other and patched and len(patched) == len(other) and patched != other:
                return Case(problem.question(), problem.ids + patched, problem.ids + other, wanted)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Patching
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """One text that is read several times, differently only from position `start` on."""

    model: torch.nn.Module
    ids: torch.Tensor  # [T]
    n: int  # tokens wanted, with which the text ends
    temperature: float
    start: int = 0
    prefix: object = None  # keys and values of what stands before `start`, of one row; None where that is nothing

    def __post_init__(self):
        if self.start > 0:
            ids = self.ids[None, : self.start]
            self.prefix = growing_cache(self.model, ids.numel())
            common.run_blocks(self.model, ids, torch.ones_like(ids), self.prefix)

    def wanted_logps(self, rows):
        """Read the rest in so many equal rows -> log-prob of the wanted tokens in it, [rows]. Those before `start` are
        left out: they are the same in every reading."""
        ids = self.ids.expand(rows, -1)
        cache = copy.deepcopy(self.prefix)  # reading on writes into it
        if cache is not None:
            cache.batch_select_indices(torch.zeros(rows, dtype=torch.long, device=ids.device))
        inputs = ids[:, self.start : -1]
        states = common.run_blocks(self.model, inputs, torch.ones_like(ids[:, :-1]), cache)
        n = min(self.n, states.shape[1])
        logps, _ = common.token_logps(self.model, states[:, -n:], ids[:, -n:], self.temperature)
        return logps.sum(1)


@torch.no_grad()
def effects(model, other, case, args, blocks):
    """effect(k, t) of a case: the stream of `other`, which reads case.other, in `model`, which reads case.patched.

    blocks: n numbers k -> (effects [n, m] at the m positions of the case, the gap: a float), nats.

    Positions are patched side by side, one in every row of a batch. The run without a patch and the other run go
    through their models in the same shape: rounding depends on it, and a patch by itself shall change nothing at all.
    """
    ids = torch.tensor(case.patched + case.wanted, device=model.device)
    other_ids = torch.tensor(case.other + case.wanted, device=model.device)
    positions = torch.tensor(case.positions(), device=model.device)
    n = len(case.wanted)
    aim = Reading(other, other_ids, n, args.temperature).wanted_logps(1)
    gap = aim - Reading(model, ids, n, args.temperature).wanted_logps(1)
    found = []
    size = max(1, min(SIDE_BY_SIDE, args.micro_batch_tokens // len(ids)))
    for piece in positions.split(size):
        start = int(piece[0])
        rows = len(piece)
        columns = piece - start  # row i is patched in this one of its columns
        cells = columns + torch.arange(rows, device=model.device) * (len(ids) - 1 - start)
        other_rest = Reading(other, other_ids, n, args.temperature, start)
        with reading(other, cells) as streams:
            other_rest.wanted_logps(rows)
        rest = Reading(model, ids, n, args.temperature, start)
        plain = rest.wanted_logps(rows)
        effect = torch.zeros(len(blocks), rows)
        for i, k in enumerate(blocks):
            with replacing(model, k, columns, streams[k]):
                patched = rest.wanted_logps(rows)
            effect[i] = patched - plain
        found.append(effect)
    return torch.cat(found, 1), gap.item()


def summarize(cases, found):
    """The effects of all cases -> dict: for each of GROUPS that occurs, the most that one of its positions does after
    every block: mean and standard_error over the cases that have it, lists over the n blocks patched."""
    summary = {}
    for group in GROUPS:
        largest = []
        for case, effect in zip(cases, found):
            own = [i for i, t in enumerate(case.positions()) if case.group(t) == group]
            if own:
                largest.append(effect[:, own].amax(1).double())
        if largest:
            mean, error = clustered_mean(torch.stack(largest, 1), torch.ones(len(largest)))
            summary[group] = dict(
                cases=len(largest),
                mean=mean.tolist(),
                standard_error=None if error is None else error.tolist(),
            )
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# Table and figures
# ---------------------------------------------------------------------------------------------------------------------


def table(result):
    """The summary as text, a line per block, and below each its standard errors."""
    summary = result["summary"]
    gap, error = result["gap"]
    runs = f"{result['patched']} patched with {result['other']}"
    lines = [f"{runs}: {result['cases']} cases, gap {gap:.3f} ±{error:.3f} nats"]
    lines.append("block" + "".join(f"{group:>14}" for group in summary) + "   largest effect, nats")
    for i, k in enumerate(result["blocks"]):
        values = f"{k:5d}"
        errors = "    ±"
        for found in summary.values():
            values += f"{found['mean'][i]:14.3f}"
            errors += f"{found['standard_error'][i]:14.3f}" if found["standard_error"] else " " * 14
        lines += [values, errors]
    return "\n".join(lines)


def draw_summary(result):
    """The largest effect of a position of every group over the blocks, and the gap."""
    figure, axes = figures.panels(1, 1, 8, 4.6)
    axis = axes[0][0]
    blocks = result["blocks"]
    for i, (group, found) in enumerate(result["summary"].items()):
        style = figures.style_of(i)
        mean = torch.tensor(found["mean"])
        error = torch.tensor(found["standard_error"] or [0.0] * len(mean))
        axis.plot(blocks, mean, **style, markersize=4, label=GROUPS[group])
        axis.fill_between(blocks, mean - error, mean + error, color=style["color"], alpha=0.25, linewidth=0)
    axis.axhline(0, color="0.6", linewidth=1)
    axis.axhline(result["gap"][0], color="black", linestyle=":", label="the gap: what there is to be explained")
    title = f"{result['patched']}, patched with {result['other']}"
    axis.set(title=title, xlabel="block k, 0-based, after which one position is patched")
    axis.set_ylabel("largest effect of a position (nats)")
    axis.margins(y=0.08)  # the gap's line shall not lie on the frame
    figures.legend_below(figure, axis, 2)
    return figure


def draw_case(tokenizer, case, effect, blocks):
    """Block x token map of one case: red where the patch makes what is wanted likelier, blue where less likely."""
    positions = case.positions()
    height = 2.2 + max(1.8, 0.16 * len(blocks))
    width = max(6.5, 2 + 0.2 * len(positions))
    figure, axes = figures.panels(1, 1, width, height)
    axis = axes[0][0]
    largest = float(effect.abs().max()) or 1.0
    image = axis.imshow(effect, aspect="auto", origin="lower", vmin=-largest, vmax=largest, cmap="RdBu_r")
    labels = []
    patched = case.patched + case.wanted
    other = case.other + case.wanted
    for t in positions:
        ours = figures.visible(tokenizer.decode([patched[t]]), 8)
        theirs = figures.visible(tokenizer.decode([other[t]]), 8)
        labels.append(ours if ours == theirs else f"{ours} \u2190 {theirs}")
    axis.set_xticks(range(len(positions)), labels, rotation=90, family="monospace", fontsize=9)
    rows = range(0, len(blocks), -(-len(blocks) // 15))
    axis.set_yticks(rows, [blocks[row] for row in rows])
    axis.set(xlabel="token that is read there \u2190 what the other run reads instead")
    axis.set_ylabel("block k, 0-based")
    axis.set_title(textwrap.fill(case.problem[-200:], int(8 * width)), fontsize=11)  # 8 letters an inch
    figure.colorbar(image, ax=axis, label="effect on log-prob (nats)", pad=0.01)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""
    parser = analysis_parser(__doc__)
    add = parser.add_argument
    add("model", nargs="?", default="embedded", help="the model that is patched: run folder, hub id, 'embedded'")
    add("other", nargs="?", help="the model whose stream is put in; without it, right and wrong answers of the first")
    add("--data", help="problems, as for the training scripts; for embedded models: arithmetic")
    add("--num_cases", type=int, default=32, help="problems that are looked at")
    add("--num_samples", type=int, default=16, help="answers to a problem, among which a case is looked for")
    add("--blocks", type=int, nargs="+", help="blocks after which is patched, 0-based; default: all")
    add("--maps", type=int, default=2, help="cases, the first so many, that are drawn token by token")
    add("--output_dir", default="runs/patching", help="folder of patching.json and the figures")
    add_shared_options(parser, SHARED)
    args = parse_for_models(parser, argv, lambda found: [found.model, found.other or found.model], EMBEDDED, SHARED)
    refuse_below(parser, args, dict(num_cases=1, num_samples=1, maps=0))
    if not args.data:
        parser.error("--data: needed; only embedded models have a default")
    return args


def chosen_blocks(model, args):
    """--blocks in order, or all. Raises UserError for a block that is not there."""
    L = len(backbone_of(model).layers)
    if args.blocks is None:
        return list(range(L))
    for k in args.blocks:
        if not 0 <= k < L:
            raise UserError(f"--blocks {k}: {args.model} has blocks 0 to {L - 1}")
    return sorted(set(args.blocks))


def look(args):
    """(result for patching.json, tokenizer, cases, effects of each)."""
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    other = model
    if args.other:
        other, _ = load_model(args.other, args.device, args.dtype)
        refuse_other_shape(args.other, shape_of(other), args.model, shape_of(model))
    blocks = chosen_blocks(model, args)
    problems = tasks.load_problems(args.data, "test", 8 * args.num_cases, args.system_prompt)
    template = json.loads(args.chat_template_kwargs)
    problems = tokenize_problems(tokenizer, problems, args.max_prompt_length, template)
    cases = find_cases(other, tokenizer, problems, args, two_models=other is not model)
    found = []
    gaps = []
    for case in tqdm(cases, "patching", disable=None):
        effect, gap = effects(model, other, case, args, blocks)
        found.append(effect)
        gaps.append(gap)
    gap, error = clustered_mean(torch.tensor(gaps, dtype=torch.float64), torch.ones(len(gaps)))
    result = dict(
        patched=args.model,
        other=args.other or "its right answers",
        cases=len(cases),
        blocks=blocks,
        gap=[gap.item(), 0.0 if error is None else error.item()],
        summary=summarize(cases, found),
    )
    return result, tokenizer, cases, found


def main(args):
    names = [f"map_{i}.png" for i in range(args.maps)]
    check_folder(args.output_dir, ("patching.json", "patching.png", *names))
    if "embedded" in (args.model, args.other):
        import sft

        sft.ensure_embedded()
    folder = make_output_folder(args.output_dir)
    result, tokenizer, cases, found = look(args)
    write_json(folder / "patching.json", dict(args=vars(args), **result))
    drawn = {"patching": draw_summary(result)}
    for i in range(min(args.maps, len(cases))):
        drawn[f"map_{i}"] = draw_case(tokenizer, cases[i], found[i], result["blocks"])
    figures.save_figures(folder, drawn)
    print("\n" + table(result))
    print(f"\n{folder}: patching.json, " + ", ".join(f"{name}.png" for name in drawn))


if __name__ == "__main__":
    with one_line_errors():
        main(parse())

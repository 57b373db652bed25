"""One page about a run: curves, answers token by token, before and after, and what every block would have said.

Writes report.html into the (first) run folder: a single file that opens by double click, without a server or a network.
    curves      every number of metrics.jsonl, of one or several runs; steps of an internal policy are shaded
    answers     completions.jsonl to filter, sort and search. The log holds no numbers of single tokens, so that those
                of some groups are computed anew, under the run's last model and the one it started from
    before and after    both models answer the same held-out problems greedily. At every position of either answer:
                KL(end || start) = sum_v p_end(v) ln(p_end(v) / p_start(v)), exact, in nats, after the same tokens
    inside      layer x token: the five likeliest tokens of every internal policy, softmax(lens(S_k) E_u^T)
    the run     warnings, options, versions; and what each number means
With several runs the curves are laid over each other; answers and models are those of the first.

    python report.py runs/bupo                          # the embedded model: seconds
    python report.py runs/bupo runs/grpo runs/opo       # three runs in one set of curves
    python report.py runs/qwen3-4b --answers 32 --problems 16 --answer_tokens 2000
    python report.py runs/qwen3-4b --answers 0 --problems 0     # loads no model
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch
import torch.nn.functional as F

import bookkeeping
import common
import tasks
from plumbing import figures, pages
from plumbing.errors import UserError, explain, one_line_errors
from plumbing.files import parsed_record, read_json, read_log, write_text
from plumbing.models import backbone_of, load_model, tokenize_problems
from plumbing.options import add_shared_options, analysis_parser, check_shared_options, refuse_below
from plumbing.runs import is_number, labels_of, step_of
from plumbing.samples import is_text
from plumbing.tuned_lens import lens_folder, load_lens
from tasks.answers import last_boxed

SHARED = ("device", "dtype", "max_rollout_tokens")  # options that mean here what they mean to the training scripts

MOST_RUNS = len(figures.COLOURS)  # more curves could not be told apart
MOST_CHARACTERS = 12_000_000  # of all answers in a page: browsers open it within seconds
LONGEST_TEXT = 20_000  # characters of an answer; the middle of a longer one is left out
MOST_TOKENS = 60_000  # whose numbers the page holds, beside each other's answers
MAP_TOKENS = 64  # of an answer in a layer x token map, the first so many
LIKELIEST = 5  # tokens of a cell
BATCH_TOKENS = 4096  # that go through a model at once
CHUNK_TOKENS = 128  # positions whose distributions are held at once

# Numbers that are measured here; those of metrics.jsonl are explained in docs/reference.md.
DEFINITIONS = {
    "log-prob": "ln of the probability that the policy gives a token, after the tokens before it; 0 is certainty. "
    "Of the whole policy, at the run's sampling temperature.",
    "change of log-prob": "log-prob under the last model minus log-prob under the starting model, of the same token.",
    "entropy of a token": "-sum_v p(v) ln p(v), in nats, of the distribution that the token was drawn from; "
    "0: only one token is possible, ln|V|: all are equally likely.",
    "advantage": "what the update was weighted with: the reward against the others of the group. The same for all "
    "tokens of an answer; none where the algorithm has no rewards.",
    "group": "the answers to one problem in one step.",
    "KL at a position": "KL(end || start) = sum_v p_end(v) ln(p_end(v) / p_start(v)), in nats, over the whole "
    "vocabulary, after the same tokens: how far training has moved the policy there.",
    "changed positions": "places at which the greedy answers before and after training hold different tokens, or only "
    "one of them holds any; as a share of the longer answer.",
    "changed favourites": "share of the positions along the answers after training at which the two models' likeliest "
    "tokens differ, given the same tokens before.",
    "raw lens": "softmax(S_k E_u^T): the residual stream after block k, read by the unembedding as it is. The internal "
    "policy that bupo.py trains.",
    "normed lens": "the same after the model's final norm: the usual logit lens.",
    "tuned lens": "the same, after an affine map of the stream that analyze_lens.py has trained for each block, by the "
    "KL to the whole policy on the model's own answers: what the block holds, in whatever basis it is written.",
}

# ---------------------------------------------------------------------------------------------------------------------
# A run folder
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class RunFolder:
    """What is read of a run before any model."""

    path: Path
    label: str  # the shortest end of the path that tells it from the others
    args: dict  # of args.json
    records: list[dict]  # of metrics.jsonl
    finished: bool

    def text(self, name):
        """An option that is text; '' where there is none."""
        value = self.args.get(name)
        return value if isinstance(value, str) else ""

    def number(self, name, default):
        """An option that is a number above 0."""
        value = self.args.get(name)
        if is_number(value) and value > 0:
            return value
        return default

    def template_settings(self):
        """--chat_template_kwargs of the run, a dict. Raises UserError."""
        with explain(f"{self.path}/args.json: its chat_template_kwargs is no JSON object", "mend it"):
            return dict(json.loads(self.text("chat_template_kwargs") or "{}").items())


def read_run(path, label):
    """A run folder, finished or not. Raises UserError for what is none."""
    folder = Path(path)
    if not (folder / "args.json").is_file():
        raise UserError(f"{path}: no run folder, it has no args.json; pass the --output_dir of a training script")
    args = read_json(folder / "args.json", "pass the --output_dir of a training script")
    return RunFolder(folder, label, args, read_log(folder / "metrics.jsonl"), step_of(folder) > 0)


def numbers_of(record):
    """The numbers of a record by name, those of seconds_by_stage as seconds.sampling and so on."""
    found = {}
    for name, value in record.items():
        if is_number(value):
            found[name] = value
        elif name == "seconds_by_stage" and isinstance(value, dict):
            for stage, seconds in value.items():
                if is_number(seconds):
                    found[f"seconds.{stage}"] = seconds
    return found


def curves_of(records):
    """Name of a metric -> its steps and values."""
    curves = {}
    for record in records:
        for name, value in numbers_of(record).items():
            curve = curves.setdefault(name, dict(steps=[], values=[]))
            curve["steps"].append(record["step"])
            curve["values"].append(pages.short(value, 6))
    curves.pop("step", None)
    return curves


def internal_spans(records):
    """[first, last] step of every stretch in which an internal policy was trained."""
    spans = []
    for record in records:
        if record.get("phase") != "internal":
            continue
        step = record["step"]
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return spans


def faults_of(records):
    """What went wrong without an error, as bookkeeping.FAULTS names it: a list of dicts."""
    steps_by_fault = {}
    for record in records:
        metrics = dict(skipped_steps=0) | numbers_of(record)
        for fault, (happens, _) in bookkeeping.FAULTS.items():
            if happens(metrics):
                steps_by_fault.setdefault(fault, []).append(record["step"])
    found = []
    for fault, steps in steps_by_fault.items():
        remedy = bookkeeping.FAULTS[fault][1]
        found.append(dict(fault=fault, first=steps[0], times=len(steps), remedy=remedy))
    return found


def describe(run):
    """A run's part of the page, without answers and models."""
    options = {name: value for name, value in run.args.items() if name != "versions"}
    return dict(
        label=run.label,
        path=str(run.path),
        finished=run.finished,
        last_step=max([record["step"] for record in run.records], default=0),
        curves=curves_of(run.records),
        internal=internal_spans(run.records),
        faults=faults_of(run.records),
        options={name: written(value) for name, value in options.items()},
        versions=written(run.args.get("versions", {})),
    )


def written(value):
    """An option's value as text; the values of a dict by name."""
    if isinstance(value, dict):
        return {name: written(inner) for name, inner in value.items()}
    if isinstance(value, str):
        return value
    return json.dumps(value)


def notes_on(runs):
    """What a reader should know before believing the page: a list of sentences."""
    notes = []
    for run in runs:
        steps = [record["step"] for record in run.records]
        if not run.finished:
            last = max(steps, default=0)
            notes.append(f"{run.label} is unfinished: shown as far as it goes, to step {last}.")
    first = runs[0]
    for run in runs[1:]:
        for name in ("data", "eval_data"):
            if run.args.get(name) != first.args.get(name):
                ours = first.args.get(name)
                theirs = run.args.get(name)
                notes.append(
                    f"Not to be compared: {run.label} has --{name} {theirs!r}, {first.label} has {ours!r}. "
                    "Their accuracies are on different problems."
                )
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# The answers of training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The answers to one problem in one step: their lines in completions.jsonl."""

    step: int
    problem: str
    lines: list[int]
    rewards: set
    characters: int = 0

    def is_mixed(self):
        """True if its answers were paid differently, so that there was something to learn."""
        return len(self.rewards) > 1


def is_answer(record):
    """True for a record of completions.jsonl that can be shown."""
    texts = is_text(record.get("text")) and is_text(record.get("problem"))
    return texts and is_number(record.get("reward"))


def logged_answers(path, wanted=None):
    """Yield (number of the line, record or None) of completions.jsonl, line by line: it may be larger than the memory.

    wanted: numbers of lines; None for all.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            if wanted is not None and number not in wanted:
                continue
            record = parsed_record(line)
            if record is not None and is_answer(record):
                for name in ("problem", "text"):  # half a character, which JSON can hold, breaks tokenizers
                    record[name] = record[name].encode("utf-8", "replace").decode("utf-8")
                yield number, record
            elif line.strip():
                yield number, None


def read_groups(path):
    """(groups in the order of the log, how many lines hold no answer)."""
    groups = []
    bad = 0
    for number, record in logged_answers(path):
        if record is None:
            bad += 1
            continue
        step = record["step"]
        problem = record["problem"]
        if not groups or (groups[-1].step, groups[-1].problem) != (step, problem):
            groups.append(Group(step, problem, [], set()))
        groups[-1].lines.append(number)
        groups[-1].rewards.add(record["reward"])
        groups[-1].characters += len(shortened(record["text"])) + len(shortened(problem))
    return groups, bad


def evenly(items, n):
    """n of the items, evenly spread, or all of them."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def thin(groups, most):
    """Whole groups with no more than `most` answers and MOST_CHARACTERS in all, evenly spread over the run."""
    answers = sum(len(group.lines) for group in groups)
    characters = sum(group.characters for group in groups)
    share = min(1.0, most / max(1, answers), MOST_CHARACTERS / max(1, characters))
    return evenly(groups, max(1, int(share * len(groups))))


def choose_groups(groups, answers):
    """Groups with about so many answers, evenly spread; of neighbours one whose answers were paid differently."""
    if not groups or not answers:
        return []
    in_all = sum(len(group.lines) for group in groups)
    n = min(len(groups), max(1, answers * len(groups) // in_all))
    chosen = []
    for i in range(n):
        neighbours = groups[i * len(groups) // n : (i + 1) * len(groups) // n]
        mixed = [group for group in neighbours if group.is_mixed()]
        chosen.append((mixed or neighbours)[0])
    return chosen


def shortened(text):
    """A text without the middle of what is too long to be shown."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters left out ...] {text[-half:]}"


COLUMNS = ("step", "problem", "gold", "text", "answer", "reward", "advantage", "length", "finished")


def read_answers(path, groups):
    """(columns of the answers of these groups, in the order of the log; line -> record)."""
    wanted = {line for group in groups for line in group.lines}
    columns = {name: [] for name in COLUMNS}
    places = {}  # line -> place in the columns
    for line, record in logged_answers(path, wanted):
        places[line] = len(places)
        for name in COLUMNS:
            columns[name].append(shown(record.get(name)))
    for name in ("problem", "gold"):  # an answer's group has the same ones: a table of texts, and places in it
        columns[name] = interned(columns[name])
    return columns, places


def shown(value):
    """A field of an answer as the page shows it; None for what is neither text nor number."""
    if is_text(value):
        return shortened(value)
    if isinstance(value, bool) or is_number(value):
        return pages.short(value)
    return None


def interned(values):
    """Values -> the different ones, and for each of them its place there."""
    places = {}
    for value in values:
        places.setdefault(value, len(places))
    return dict(texts=list(places), places=[places[value] for value in values])


def describe_answers(run, args, notes):
    """(the answers' part of the page, groups to look at token by token, line -> place); None, [], {} without any."""
    path = run.path / "completions.jsonl"
    groups = []
    if path.is_file():
        groups, bad = read_groups(path)
        if bad:
            notes.append(f"{path}: {bad:,} lines hold no answer and are left out.")
    if not groups:
        notes.append(f"{run.label} has no completions.jsonl, or an empty one: the page has no answers of training.")
        return None, [], {}
    total = sum(len(group.lines) for group in groups)
    kept = thin(groups, args.completions)
    columns, places = read_answers(path, kept)
    if len(places) < total:
        what = f"{len(places):,} of {total:,} answers: whole groups, evenly spread over the run"
        notes.append(f"The page holds {what} (--completions, or what a browser opens in seconds).")
    return dict(total=total, columns=columns), choose_groups(kept, args.answers), places


# ---------------------------------------------------------------------------------------------------------------------
# Two policies
# ---------------------------------------------------------------------------------------------------------------------


class Words:
    """The tokens of a page: every text once, and a place for each."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.texts = []
        self.places = {}  # token -> place

    def place(self, tokens):
        """Tokens -> places of their texts."""
        for token in tokens:
            if token not in self.places:
                self.places[token] = len(self.texts)
                self.texts.append(self.tokenizer.decode([token]))
        return [self.places[token] for token in tokens]


@dataclass
class Policies:
    """The models of a run that can be loaded, 'end' and 'start', the tokenizer of one, and what is asked of them."""

    models: dict
    tokenizer: object
    words: Words
    temperature: float
    lenses: dict  # of each model, see `lenses_of`

    def states(self, name, prompts, completions, layer=None):
        """The states that predict the tokens of completions, each [T, D]: of the whole policy, or raw after a block."""
        model = self.models[name]
        rollouts = common.assemble(prompts, completions, self.tokenizer.pad_token_id, model.device)
        found = [None] * len(prompts)
        for rows in common.micro_batches(rollouts, range(len(prompts)), BATCH_TOKENS):
            columns = int(rollouts.attention_mask[rows].sum(1).max()) - 1  # the last token predicts none
            ids = rollouts.ids[rows, :columns]
            hidden = common.hidden_states(model, ids, rollouts.attention_mask[rows, :columns], layer)
            for row, own in zip(rows, hidden):
                first = len(prompts[row]) - 1
                found[row] = own[first : first + len(completions[row])]
        return found

    def logps(self, name, states):
        """States [n, D] -> log-probs [n, V] at the run's temperature."""
        return F.log_softmax(common.head_logits(self.models[name], states) / self.temperature, dim=-1)


def load_policies(run, args, notes):
    """The run's last model and the one it started from. Where one cannot be loaded a note says why; None if neither."""
    checkpoints = [path for path in run.path.glob("checkpoint-*") if step_of(path)]
    checkpoints.sort(key=step_of)
    end = run.path
    if not run.finished and checkpoints:
        end = checkpoints[-1]
        notes.append(f"The last model of {run.label} is that of {end.name}.")
    models = {}
    paths = dict(end=str(end), start=run.text("model"))
    tokenizer = None
    for name, path in paths.items():
        try:
            models[name], own_tokenizer = load_model(path, args.device, args.dtype)
            tokenizer = tokenizer or own_tokenizer
        except UserError as error:
            if str(error).startswith("--device"):
                raise
            which = {"end": "last", "start": "starting"}[name]
            where = "Start report.py in the folder where the run was started, or pass --answers 0 --problems 0."
            notes.append(f"The {which} model cannot be loaded, so that what it would say is left out: {error}. {where}")
    if not models:
        return None
    lenses = lenses_of(models, paths, notes)
    return Policies(models, tokenizer, Words(tokenizer), run.number("temperature", 1.0), lenses)


def rounded(values):
    """A tensor [T] as a list of numbers that are short to write."""
    return [pages.short(round(value, 4)) for value in values.tolist()]


def completion_ids(tokenizer, record, most):
    """The tokens of a logged answer, the first so many: its text, and the end token if it was finished."""
    ids = tokenizer(record["text"][: 100 * most], add_special_tokens=False)["input_ids"]
    if record.get("finished", True):
        ids = ids + [tokenizer.eos_token_id]
    return ids[:most]


def tokenized(policies, run, problems):
    """The problems whose prompts are not too long, with their tokens, as the run asked them."""
    tasks.add_system_prompt(problems, run.text("system_prompt"))
    longest = run.number("max_prompt_length", 1024)
    return tokenize_problems(policies.tokenizer, problems, longest, run.template_settings())


def tokenize_answers(policies, run, groups, args):
    """The logged answers of some groups, the first so many: line -> (prompt tokens, answer tokens, record)."""
    wanted = {line for group in groups for line in group.lines}
    found = {}
    tokens = 0
    for line, record in logged_answers(run.path / "completions.jsonl", wanted):
        if len(found) >= args.answers or tokens >= MOST_TOKENS:
            break
        [problem] = tokenized(policies, run, [tasks.Problem(record["problem"], "", f"line {line + 1}")])
        ids = completion_ids(policies.tokenizer, record, args.answer_tokens)
        if ids:
            found[line] = (problem.ids, ids, record)
            tokens += len(ids)
    return found


@torch.no_grad()
def look_at_tokens(policies, run, groups, places, args):
    """Log-prob and entropy of every token of the answers of some groups: place of the answer -> dict."""
    read = tokenize_answers(policies, run, groups, args)
    if not read:
        return dict(answers={}, as_logged=0)
    prompts = [prompt for prompt, _, _ in read.values()]
    completions = [ids for _, ids, _ in read.values()]
    looks = [dict(tokens=policies.words.place(ids)) for ids in completions]
    lengths = [len(ids) for ids in completions]
    for name, model in policies.models.items():
        states = torch.cat(policies.states(name, prompts, completions))  # [N, D], all answers in a row
        targets = torch.tensor(sum(completions, []), device=model.device)
        logps, entropy = common.token_logps(model, states[None], targets[None], policies.temperature)
        for look, own_logps, own_entropy in zip(looks, logps[0].split(lengths), entropy[0].split(lengths)):
            look[name] = dict(logp=rounded(own_logps), entropy=rounded(own_entropy))
    as_logged = 0
    for _, ids, record in read.values():
        as_logged += len(ids) == min(args.answer_tokens, record.get("length", 0))
    by_place = {places[line]: look for line, look in zip(read, looks)}
    return dict(answers=by_place, as_logged=as_logged)


# ---------------------------------------------------------------------------------------------------------------------
# Before and after
# ---------------------------------------------------------------------------------------------------------------------


def held_out_problems(run, args):
    """The first problems that the run was evaluated on. Raises UserError if there are none."""
    source = run.text("eval_data")
    if not source and run.text("data") in tasks.built_in():
        source = run.text("data")
    if not source:
        raise UserError(f"{run.label} has no --eval_data")
    return tasks.load_problems(source, "test", args.problems, run.text("system_prompt"))


@torch.no_grad()
def compare(policies, run, problems, args):
    """Both models' greedy answers to the same problems, with what the two policies think of every token."""
    rows = [dict(problem=shortened(problem.question()), gold=problem.answer) for problem in problems]
    prompts = [problem.ids for problem in problems]
    limit = min(args.answer_tokens, run.number("max_completion_length", args.answer_tokens))
    for name, model in policies.models.items():
        rollouts = common.sample(model, policies.tokenizer, prompts, 1, limit, 0.0, args.max_rollout_tokens)
        verdicts = common.judge(rollouts.texts, problems, rollouts.finished)
        completions = [ids[mask.bool()].tolist() for ids, mask in zip(rollouts.ids, rollouts.mask)]
        states = {policy: policies.states(policy, prompts, completions) for policy in policies.models}
        for i, row in enumerate(rows):
            row[name] = dict(
                ids=completions[i],
                tokens=policies.words.place(completions[i]),
                right=verdicts[i] == "right",
                answer=last_boxed(rollouts.texts[i]),
                finished=bool(rollouts.finished[i]),
                **look_at_both(policies, {policy: states[policy][i] for policy in states}),
            )
    return rows


def look_at_both(policies, states):
    """What the policies think of every position of an answer: KL(end || start), and their favourites.

    states: name of a policy -> [T, D].
    """
    here = dict(kl=[])
    for name in states:
        here[name] = dict(favourite=[], probability=[])
    pieces_of_policies = [own.split(CHUNK_TOKENS) for own in states.values()]
    for pieces in zip(*pieces_of_policies):
        logps = {}
        for name, piece in zip(states, pieces):
            logps[name] = policies.logps(name, piece)
            likeliest = logps[name].max(-1)
            here[name]["favourite"] += policies.words.place(likeliest.indices.tolist())
            here[name]["probability"] += rounded(likeliest.values.exp())
        if len(logps) == 2:
            kl = (logps["end"].exp() * (logps["end"] - logps["start"])).sum(-1)
            here["kl"] += rounded(kl)
    return here


# ---------------------------------------------------------------------------------------------------------------------
# Inside
# ---------------------------------------------------------------------------------------------------------------------


def raw_lens(model, states, block):
    """The residual stream as it is."""
    return states


def normed_lens(model, states, block):
    """The residual stream after the final norm."""
    return backbone_of(model).norm(states)


def lenses_of(models, paths, notes):
    """For each model, by name: name of a lens -> function(model, states [T, D], block) -> what the unembedding reads;
    block -1 is the embedding. The page shows a button for each. The tuned lens is there where analyze_lens.py has
    trained one for every model."""
    lenses = {}
    for name in models:
        lenses[name] = {"raw": raw_lens, "normed": normed_lens}
    tuned = {}
    try:
        for name, model in models.items():
            tuned[name], _ = load_lens(lens_folder(paths[name]), model)
    except UserError as error:
        notes.append(f"No tuned lens: {error}.")
        return lenses
    without = [paths[name] for name in models if tuned[name] is None]
    if without and len(without) < len(models):
        notes.append(f"No tuned lens: {without[0]} has none. Make it by: python analyze_lens.py {without[0]}")
    if not without:
        for name in models:
            lenses[name]["tuned"] = functools.partial(tuned_states, tuned[name])
    return lenses


def tuned_states(tuned, model, states, block):
    """The residual stream after the translator of its block and the final norm."""
    return backbone_of(model).norm(tuned.translate(block, states))


@torch.no_grad()
def layer_map(policies, name, prompt, completion):
    """Every internal policy at every token of an answer: lens -> rows, from the embedding to the whole policy."""
    model = policies.models[name]
    completion = completion[:MAP_TOKENS]
    backbone = backbone_of(model)
    ids = torch.tensor([(prompt + completion)[:-1]], device=model.device)
    stream = [backbone.embed_tokens(ids)[0, len(prompt) - 1 :]]
    for k in range(len(backbone.layers)):
        stream += policies.states(name, [prompt], [completion], k)
    [whole] = policies.states(name, [prompt], [completion])
    found = {}
    for lens, see in policies.lenses[name].items():
        rows = []
        for depth, states in enumerate(stream):
            rows.append(cells(policies, name, see(model, states, depth - 1)))
        rows.append(cells(policies, name, whole))
        found[lens] = rows
    return found


def cells(policies, name, states):
    """Entropy, and the likeliest tokens with their probabilities, of the policies that states [T, D] make."""
    logps = policies.logps(name, states)
    likeliest = logps.topk(min(LIKELIEST, logps.shape[-1]), dim=-1)
    tops = [policies.words.place(tokens) for tokens in likeliest.indices.tolist()]
    probabilities = [rounded(values) for values in likeliest.values.exp()]
    entropy = -(logps.exp() * logps).sum(-1)
    return dict(entropy=rounded(entropy), tops=tops, probabilities=probabilities)


def layer_maps(policies, problems, rows, args):
    """Maps of the answers after training at which the two policies differ most, seen by each policy."""
    name = "end" if "end" in policies.models else "start"
    order = sorted(range(len(rows)), key=lambda i: -sum(rows[i][name]["kl"]))
    maps = []
    for i in order[: args.maps]:
        answer = rows[i][name]["ids"]
        by_policy = {}
        for policy in policies.models:
            by_policy[policy] = layer_map(policies, policy, problems[i].ids, answer)
        tokens = policies.words.place(answer[:MAP_TOKENS])
        maps.append(dict(problem=rows[i]["problem"], tokens=tokens, length=len(answer), policies=by_policy))
    return maps


def describe_policies(run, groups, places, args, notes):
    """The parts of the page for which models are needed, a dict; {} where none can be loaded."""
    if not args.problems and not groups:
        return {}
    policies = load_policies(run, args, notes)
    if policies is None:
        return {}
    found = dict(temperature=policies.temperature)
    try:
        found["looked_at"] = look_at_tokens(policies, run, groups, places, args)
    except UserError as error:
        notes.append(f"No numbers of single tokens: {error}.")
    if args.problems:
        try:
            problems = tokenized(policies, run, held_out_problems(run, args))
            found["compared"] = compare(policies, run, problems, args)
            found["maps"] = layer_maps(policies, problems, found["compared"], args)
        except UserError as error:
            notes.append(f"No held-out problems, so that nothing is answered before and after: {error}.")
    for row in found.get("compared", []):
        for name in policies.models:
            del row[name]["ids"]  # the page has the places of their texts
    found["spelled"] = policies.words.texts
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""
    parser = analysis_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", help="run folders; answers and models are shown of the first")
    add("--completions", type=int, default=50_000, help="answers of training in the page; of more, whole groups")
    add("--answers", type=int, default=256, help="of them so many token by token, in whole groups; 0: none")
    add("--problems", type=int, default=64, help="held-out problems answered before and after training; 0: none")
    add("--maps", type=int, default=4, help="of these answers so many as layer x token maps")
    add("--answer_tokens", type=int, default=512, help="of an answer that a model looks at, or gives")
    add_shared_options(parser, SHARED)
    args = parser.parse_args(argv)
    check_shared_options(args, SHARED)
    refuse_below(parser, args, dict(completions=1, answers=0, problems=0, maps=0, answer_tokens=1))
    if len(args.runs) > MOST_RUNS:
        parser.error(f"{len(args.runs)} runs: at most {MOST_RUNS} curves can be told apart")
    return args


def main(args):
    labels = labels_of([str(Path(path).absolute()) for path in args.runs])
    runs = [read_run(path, label) for path, label in zip(args.runs, labels)]
    library = pages.plotly_source()
    first = runs[0]
    notes = notes_on(runs)
    answers, groups, places = describe_answers(first, args, notes)
    data = dict(
        runs=[describe(run) for run in runs],
        panels={title: list(styles) for title, styles in figures.CURVES.items()},
        answers=answers,
        **describe_policies(first, groups, places, args, notes),
        notes=notes,
        definitions=DEFINITIONS | pages.definitions_in(Path(__file__).parent / "docs/reference.md"),
    )
    page = pages.build_page(" and ".join(labels), data, library)
    path = first.path / "report.html"
    with explain(f"{path}: cannot be written", "make room, or make the folder writable", OSError):
        write_text(path, page)
    for note in notes:
        print(f"note: {note}")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    with one_line_errors():
        main(parse())

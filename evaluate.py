"""Evaluation: how good, how diverse and how far from their start are trained models? One table, a few figures.

Every model answers every held-out problem n times; the answers are kept, and all numbers come from the kept answers.
    avg@n       mean accuracy of the n answers
    pass@k      chance that k of the n answers, drawn without replacement, hold a right one; with c of n right it is
                1 - C(n-c, k) / C(n, k), unbiased, as 1 - (1 - c/n)^k is not (https://arxiv.org/abs/2107.03374)
    maj@k       accuracy of the most frequent of k answers: mean over n // k consecutive blocks of k, the rest unused.
                Ties go to the answer sampled first; an answer that is unfinished or gives no answer has no vote
    mG-pass@k   for even k, chance that i of k answers are right, averaged over every i of more than half of k
    Self-BLEU   BLEU-4 of an answer against the others to its problem (https://arxiv.org/abs/1802.01886); 1: all alike
    Rep-5       share of an answer's 5-grams of tokens that it had used before; near 1: it loops
    entropy     nats per token, of the distribution sampled from
    KL          to the model that the run started from, or the first of a chain of runs; nats per token: the mean of
                exp(x) - x - 1, x = logp_start - logp
Means are over answers, then problems, then data sets (row 'mean'); of entropy and KL over all tokens of a data set. The
95% bootstrap intervals of what has an @ redraw problems: they say nothing about other training seeds. --over_seeds
does: runs whose names differ only in a last -NUMBER become one row, with the mean and its 95% t interval over runs.

--behaviours: verification, backtracking, subgoal setting and backward chaining per answer (tasks/behaviours.py).
analyze_logits.py and analyze_gradients.py ask further questions of the models and answers that are kept here.

    python evaluate.py embedded runs/grpo runs/bupo runs/opo runs/em             # embedded models: a minute each
    python evaluate.py embedded runs/grpo runs/bupo runs/opo runs/em --rescore   # the same from the kept answers
    python evaluate.py embedded runs/em runs/grpo --temperatures 0.3 0.6 1.0
    python evaluate.py Qwen/Qwen3-4B runs/grpo runs/grpo/checkpoint-100 --data math500.jsonl aime24.jsonl
"""

import functools
import itertools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
from tqdm import tqdm

import bookkeeping
import common
import tasks
from plumbing import figures, samples, verifier
from plumbing.errors import UserError, explain, one_line_errors
from plumbing.files import append_jsonl, check_folder, lock_folder, read_json, read_log, write_json, write_text
from plumbing.models import load_model, tokenize_problems
from plumbing.options import (
    LARGEST,
    LOWEST_TEMPERATURE,
    MOST_SAMPLES,
    Parser,
    RunArgs,
    add_shared_options,
    is_embedded,
    refuse_below,
)
from plumbing.runs import experiment, find_run, is_number, labels_of, start_of_chain, training_seconds
from plumbing.statistics import bootstrap, mean_interval
from plumbing.tables import markdown_table
from tasks.behaviours import BEHAVIOURS, count_behaviours

# Options in which an evaluation follows the runs' training, unless the command line says otherwise.
FOLLOWED = ("system_prompt", "chat_template_kwargs", "max_completion_length")
# Options that mean here what they mean to the training scripts.
SHARED = (
    "max_prompt_length",
    "max_rollout_tokens",
    "micro_batch_tokens",
    "device",
    "dtype",
    "grade_timeout",
    "max_grader_errors",
)
# Files that are written into --output_dir, beside the samples.
FILES = ("results.json", "results.md", "pass_at_k.png", "temperatures.png", "training_curves.png")
# Overrides of their defaults for an embedded model.
EMBEDDED = dict(system_prompt="", max_completion_length=64)

# ---------------------------------------------------------------------------------------------------------------------
# Metrics of one problem's answers: pure functions
# ---------------------------------------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """Chance that k of n answers, drawn without replacement, hold one of the c right ones. Raises UserError if k > n.

    Exact integers, divided once: nothing overflows, nothing cancels.
    """
    if not 1 <= k <= n:
        raise UserError(f"--ks {k}: with {n} samples k is 1 to {n}; lower it or raise --num_samples")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def mg_pass_at_k(n, c, k):
    """Chance that i of k answers, drawn without replacement, are right, averaged over every i of more than half of k
    (mG-Pass@k, https://arxiv.org/abs/2412.13147): pass@k asks what a model can do, this what it does again and again.

    k is even, so that k / 2 values of i lie above the half. Raises UserError if k > n.
    """
    pass_at_k(n, c, k)  # raises
    total = 0
    for needed in range(k // 2 + 1, k + 1):
        total += draws_with(needed, n, c, k)
    return 2 * total / (k * math.comb(n, k))


def draws_with(needed, n, c, k):
    """How many draws of k out of n answers hold at least `needed` of the c right ones."""
    return sum(math.comb(c, right) * math.comb(n - c, k - right) for right in range(needed, k + 1))


def group_answers(answers):
    """For each answer the index of the first one equal to it; None for '', which is none.

    Comparing is slow and not symmetric: a new text is compared with the first of each group, which takes gold's place.
    """
    groups = {}  # text -> index of the first of its group
    for i, answer in enumerate(answers):
        if answer and answer not in groups:
            groups[answer] = first_equal(answers, answer, groups, default=i)
    return [groups.get(answer) for answer in answers]


def first_equal(answers, answer, groups, default):
    """The index of the first group whose first answer equals `answer`, by the verifier; else the default."""
    for first in dict.fromkeys(groups.values()):
        if verifier.compare([(answers[first], answer)]) == ["right"]:
            return first
    return default


def maj_at_k(groups, rewards, k):
    """Mean, over consecutive blocks of k answers, of the reward of the most frequent one. groups: of `group_answers`.

    Ties go to the answer sampled first; a block without any answer scores 0.
    """
    scores = []
    for start in range(0, len(groups) - k + 1, k):
        votes = Counter(group for group in groups[start : start + k] if group is not None)
        if votes:
            winner = max(votes, key=votes.get)  # of equals the first, and a Counter keeps their order
            scores.append(rewards[groups.index(winner, start)])
        else:
            scores.append(0.0)
    return sum(scores) / len(scores)


def n_grams(items, n):
    """All runs of n consecutive items, as tuples."""
    return list(zip(*(items[i:] for i in range(n))))


def self_bleu(texts):
    """Mean over texts of BLEU-4 against the others as references, 0 to 1; None for fewer than two texts.

    Tokens are words and single punctuation marks; uniform weights; an n-gram order without a match counts 0.1 matches
    (nltk's method1), a text that shares no word scores 0; the brevity penalty looks at the reference closest in length,
    the shorter of two. Time is linear in the number of texts.
    """
    if len(texts) < 2:
        return None
    tokens = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    log_precisions = [0.0] * len(texts)
    shares_a_word = [True] * len(texts)
    for order in (1, 2, 3, 4):
        counts = [Counter(n_grams(words, order)) for words in tokens]
        for i, matches in enumerate(matches_with_others(counts)):
            if order == 1 and matches == 0:
                shares_a_word[i] = False
            total = max(1, counts[i].total())
            log_precisions[i] += math.log((matches or 0.1) / total) / 4
    lengths = [len(words) for words in tokens]
    scores = []
    for i, log_precision in enumerate(log_precisions):
        if shares_a_word[i]:
            scores.append(math.exp(log_precision + brevity_penalty(lengths, i)))
        else:
            scores.append(0.0)
    return sum(scores) / len(scores)


def matches_with_others(counts):
    """Per text, how many of its n-grams the others hold: each at most as often as the one of them that has it most.

    counts: a Counter of n-grams per text. It is enough to know the two largest counts of an n-gram: where a text itself
    holds the largest, the largest among the others is the second.
    """
    largest = Counter()
    second = Counter()
    for count in counts:
        for gram, c in count.items():
            second[gram] = max(second[gram], min(largest[gram], c))
            largest[gram] = max(largest[gram], c)
    matches = []
    for count in counts:
        found = 0
        for gram, c in count.items():
            among_others = second[gram] if c == largest[gram] else largest[gram]
            found += min(c, among_others)
        matches.append(found)
    return matches


def brevity_penalty(lengths, i):
    """Logarithm of BLEU's penalty for text i, if it is shorter than the other text closest in length."""
    others = lengths[:i] + lengths[i + 1 :]
    closest = min(others, key=lambda other: (abs(other - lengths[i]), other))
    return min(0.0, 1 - closest / max(1, lengths[i]))


def repetition(token_ids, n=5):
    """Rep-n: 1 - unique / total n-grams of a list of token ids; 0 below n tokens."""
    grams = n_grams(token_ids, n)
    if not grams:
        return 0.0
    return 1 - len(set(grams)) / len(grams)


# ---------------------------------------------------------------------------------------------------------------------
# Models and their settings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """One model of the comparison."""

    path: str  # as given: run folder, checkpoint, model folder, hub id, or 'embedded'
    label: str  # in tables and figures
    run: Path | None  # the run folder it belongs to
    trained: dict  # that run's args.json
    settings: RunArgs | None = None  # how it is evaluated


def read_entries(args):
    """args.models -> list of Entry. A setting is that of the command line, else of the run, else of the first run given
    (a base model is asked as its runs are), else EMBEDDED for embedded models, else the training scripts' default."""
    entries = []
    sampled = []  # options of runs that sampled answers: not those of sft.py
    for path, label in zip(args.models, labels_of(args.models)):
        entry = read_entry(path, label, args)
        entries.append(entry)
        if "num_generations" in entry.trained:
            sampled.append(entry.trained)
    given = {}
    for name in (*FOLLOWED, *SHARED, "seed"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    for entry in entries:
        followed_run = {}
        if entry.trained in sampled:
            followed_run = entry.trained
        elif sampled:
            followed_run = sampled[0]
        settings = dict(EMBEDDED) if is_embedded(entry.path) else {}
        for name in FOLLOWED:
            if name in followed_run:
                settings[name] = followed_run[name]
        entry.settings = RunArgs(**settings | given)
    for name in FOLLOWED:
        report_differences(f"different {name}", {entry.label: getattr(entry.settings, name) for entry in entries})
    trained_on = {entry.label: entry.trained["data"] for entry in entries if entry.trained}
    report_differences("trained on different data", trained_on)
    return entries


def read_entry(path, label, args):
    """One model with the run that it belongs to, if any. --rescore needs no run."""
    if args.rescore or path == "embedded":
        return Entry(path, label, None, {})
    run = find_run(path)
    if run is None:
        return Entry(path, label, None, {})
    trained = read_json(run / "args.json")
    for name in ("model", "output_dir", "data"):
        if not isinstance(trained.get(name), str):
            raise UserError(f"{run / 'args.json'}: has no {name}; evaluate the model without it, from a copy elsewhere")
    for name in FOLLOWED:
        usual = getattr(RunArgs, name)
        if type(trained.get(name, usual)) is not type(usual):
            raise UserError(f"{run / 'args.json'}: its {name} is {trained[name]!r}; put a value like {usual!r} there")
    built_from_nothing = Path(trained["model"]).parent == Path(trained["output_dir"])
    if built_from_nothing:  # the embedded model: others start here, it does not
        return Entry(path, label, None, {})
    return Entry(path, label, run, trained)


def report_differences(what, values):
    """One line on stderr if unequals are compared. values: label -> value."""
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{label} {value!r}" for label, value in values.items())
        print(f"note: {what}: {listed}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Answers: sampled once, then kept
# ---------------------------------------------------------------------------------------------------------------------

FEWEST_AT_ONCE = 8  # problems sampled together and then kept, at least: their long answers share the last waves
DEFAULT_PROBLEMS = 256  # of a built-in task


def problem_limit(args, data):
    """How many problems of a data set are used, the first so many; 0 for all."""
    if args.num_problems is not None:
        return args.num_problems
    if data in tasks.built_in():
        return DEFAULT_PROBLEMS
    return 0


def header_of(entry, data, temperature, args):
    """What must be equal for two sample files to hold answers to the same question."""
    header = dict(
        model=entry.path,
        weights_saved=samples.weights_saved(entry.path),
        data=data,
        temperature=temperature,
        num_samples=args.num_samples,
    )
    for name in ("chat_template_kwargs", "max_completion_length", "dtype", "seed"):
        header[name] = getattr(entry.settings, name)
    return header


def complete_samples(entry, path, data, temperature, args, load):
    """Append to a sample file the problems it does not hold yet, a block of problems at a time.

    load: path -> (model, tokenizer), called only if something is missing. The seed of a block depends on its first
    problem, not on the model or on what is there already: an interrupted file is completed as if nothing had happened.
    Raises UserError if the file holds answers to other problems, of other weights or under other settings.
    """
    settings = entry.settings
    problems = tasks.load_problems(data, "test", problem_limit(args, data), settings.system_prompt)
    header = header_of(entry, data, temperature, args)
    if path.is_file():
        samples.drop_cut_line(path)
    if not samples.is_started(path):
        samples.start_file(path, header | dict(training_seconds=training_seconds(entry.path)))
    samples.check_header(path, header)
    answered = samples.answered_problems(path, problems, problem_limit(args, data))
    if len(answered) == len(problems):
        return
    model, tokenizer = load(entry.path)
    template = json.loads(settings.chat_template_kwargs)
    kept = tokenize_problems(tokenizer, problems, settings.max_prompt_length, template)
    missing = []
    for i, problem in enumerate(problems):
        if i not in answered and len(problem.ids) <= settings.max_prompt_length:
            missing.append((i, problem))
    start = load_start(entry, load) if missing else None
    longest = max(len(problem.ids) for problem in kept) + settings.max_completion_length
    size = max(FEWEST_AT_ONCE, settings.max_rollout_tokens // (longest * args.num_samples))
    blocks = [missing[i : i + size] for i in range(0, len(missing), size)]
    for block in tqdm(blocks, f"{entry.label}, {data}, temperature {temperature:g}", unit="block"):
        records = answer_block(model, tokenizer, start, block, temperature, args.num_samples, settings)
        append_jsonl(path, records)


def load_start(entry, load):
    """The model that a run, or its chain of runs, started from, for the KL; None for a model that is no run, or if it
    cannot be loaded."""
    if not entry.run:
        return None
    try:
        find_run(entry.trained["model"])  # a folder that is gone is not looked up as a hub id
        start, _ = load(start_of_chain(entry.trained["model"]))
    except UserError as error:
        print(f"note: {entry.label}: no KL, its starting model cannot be loaded ({error})", file=sys.stderr)
        return None
    return start


def answer_block(model, tokenizer, start, block, temperature, n, settings):
    """Sample n answers to each problem of a block, a list of (place in the data set, Problem) -> list of records."""
    first_place, first_problem = block[0]
    rollouts = common.sample(
        model,
        tokenizer,
        [problem.ids for _, problem in block],
        n,
        settings.max_completion_length,
        temperature,
        settings.max_rollout_tokens,
        seed=bookkeeping.step_seed(settings.seed, temperature, first_place, first_problem.prompt),
    )
    records = []
    for j, (place, problem) in enumerate(block):
        rows = slice(j * n, (j + 1) * n)
        part = common.Rollouts(
            rollouts.ids[rows],
            rollouts.attention_mask[rows],
            rollouts.mask[rows],
            rollouts.lengths[rows],
        )
        kl = None
        if start is not None:
            kl = bookkeeping.kl_between(model, start, part, settings.micro_batch_tokens, temperature or 1.0)
        record = dict(
            problem=place,
            prompt=problem.prompt,
            gold=problem.answer,
            prompt_ids=problem.ids,
            **problem.record(),
            texts=rollouts.texts[rows],
            token_ids=[ids[mask.bool()].tolist() for ids, mask in zip(part.ids, part.mask)],
            finished=rollouts.finished[rows].tolist(),
            entropy=rollouts.entropy[rows].sum(1).tolist(),  # nats, summed over the tokens of an answer
            kl=kl,  # nats per token, over all tokens of the record
        )
        records.append(record)
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What the answers to one data set show."""

    values: dict  # metric -> a value per problem
    totals: Counter  # over the tokens of all answers: tokens, entropy, kl_to_start
    verdicts: list  # of all answers


def measure(records, ks, behaviours=False, grade_timeout=3.0):
    """Records of a sample file -> Measured."""
    measured = Measured(defaultdict(list), Counter(), [])
    for record in records:
        lengths = [len(token_ids) for token_ids in record["token_ids"]]
        verdicts, figures_of_record = accuracies(record, ks, grade_timeout)
        measured.verdicts += verdicts
        figures_of_record["response_length"] = mean(lengths)
        figures_of_record["truncated_share"] = 1 - mean(record["finished"])
        figures_of_record["self_bleu"] = self_bleu(record["texts"])
        figures_of_record["repetition_5"] = mean([repetition(token_ids) for token_ids in record["token_ids"]])
        if behaviours:
            figures_of_record.update(behaviours_per_answer(record["texts"]))
        for name, value in figures_of_record.items():
            measured.values[name].append(value)
        kl = math.nan
        if record["kl"] is not None:
            kl = record["kl"] * sum(lengths)
        measured.totals.update(tokens=sum(lengths), entropy=sum(record["entropy"]), kl_to_start=kl)
    return measured


def mean(values):
    return sum(values) / len(values)


def accuracies(record, ks, grade_timeout):
    """(verdicts, avg@n, pass@k, maj@k and mG-pass@k) of one problem's answers."""
    problem = tasks.problem_from_record(record)
    texts = record["texts"]
    n = len(texts)
    verdicts = common.judge(texts, [problem] * n, record["finished"], grade_timeout)
    right = [float(verdict == "right") for verdict in verdicts]
    votes = []
    for text, finished in zip(texts, record["finished"]):
        votes.append(problem.final_answer(text) if finished else "")
    groups = group_answers(votes)
    found = {f"avg@{n}": sum(right) / n}
    for k in ks:
        found[f"pass@{k}"] = pass_at_k(n, int(sum(right)), k)
        found[f"maj@{k}"] = maj_at_k(groups, right, k)
        if k % 2 == 0:
            found[f"mG-pass@{k}"] = mg_pass_at_k(n, int(sum(right)), k)
    return verdicts, found


def behaviours_per_answer(texts):
    """Mean number of each behaviour in an answer."""
    total = Counter()
    for text in texts:
        total.update(count_behaviours(text))
    return {name: total[name] / len(texts) for name in BEHAVIOURS}


def score(measured, seed):
    """What `measure` gave, an element per data set -> dict of figures (None where undefined) with intervals."""
    row = dict(problems=sum(len(one.values["response_length"]) for one in measured), intervals={})
    for name in measured[0].values:
        groups = [one.values[name] for one in measured]
        if None in groups[0]:
            row[name] = None
        else:
            row[name] = mean(list(map(mean, groups)))
        if "@" in name:
            row["intervals"][name] = bootstrap(groups, seed)
    for name in ("entropy", "kl_to_start"):
        value = mean([one.totals[name] / one.totals["tokens"] for one in measured])
        row[name] = None if math.isnan(value) else value
    verdicts = Counter(verdict for one in measured for verdict in one.verdicts)
    row["ungraded"] = sum(verdicts[name] for name in verifier.NO_VERDICT)
    return row


NO_FIGURES = {"model", "data", "temperature", "samples", "problems", "runs", "intervals"}


def over_seeds(results):
    """Rows of one experiment -> one row: means, and intervals over runs instead of over problems."""
    groups = defaultdict(list)
    for row in results:
        groups[experiment(row["model"]), row["data"], row["temperature"]].append(row)
    rows = []
    for (model, _, _), group in groups.items():
        merged = group[0] | dict(model=model, runs=len(group), intervals={})
        for name in group[0].keys() - NO_FIGURES:
            values = [row[name] for row in group]
            merged[name] = None  # where one run has no figure, there is no mean of all
            if None not in values:
                merged[name], interval = mean_interval(values)
                if len(group) > 1:  # one run has no spread
                    merged["intervals"][name] = interval
        rows.append(merged)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def results_table(results, columns):
    """columns: header -> (figure, decimals). Data set and temperature are shown only where there are several."""
    keys = []
    for key in ("data", "temperature"):
        if len({row[key] for row in results}) > 1:
            keys.append(key)
    rows = [["model", *keys, *columns]]
    for row in results:
        cells = [row["model"]]
        for key in keys:
            cells.append(str(row[key]))
        for name, places in columns.values():
            cells.append(results_cell(row, name, places))
        rows.append(cells)
    return markdown_table(rows)


def results_cell(row, name, places):
    """A figure with half of its interval, where it has one; '-' where there is no figure."""
    if row[name] is None:
        return "-"
    cell = f"{row[name]:.{places}f}"
    if name in row["intervals"]:
        low, high = row["intervals"][name]
        cell += f" ±{(high - low) / 2:.{places}f}"
    return cell


def main_columns(args):
    """Columns of the table on the screen."""
    k = args.ks[-1]
    return {
        f"avg@{args.num_samples}": (f"avg@{args.num_samples}", 3),
        f"pass@{k}": (f"pass@{k}", 3),
        f"maj@{k}": (f"maj@{k}", 3),
        "length": ("response_length", 1),
        "truncated": ("truncated_share", 3),
        "ungraded": ("ungraded", 0),
        "entropy": ("entropy", 3),
        "KL": ("kl_to_start", 4),
        "Self-BLEU": ("self_bleu", 3),
        "Rep-5": ("repetition_5", 3),
        "time (s)": ("training_seconds", 0),
    }


def all_k_columns(args):
    """Columns of pass@k and maj@k for every k, of mG-pass@k for every even one."""
    columns = {}
    for kind in ("pass", "maj", "mG-pass"):
        for k in args.ks:
            if kind != "mG-pass" or k % 2 == 0:
                columns[f"{kind}@{k}"] = (f"{kind}@{k}", 3)
    return columns


def write_tables(folder, results, args):
    """The table of results, and with --behaviours theirs, as text for the screen; these and all k into results.md."""
    tables = [results_table(results, main_columns(args))]
    if args.behaviours:
        columns = {f"{name.replace('_', ' ')} per answer": (name, 2) for name in BEHAVIOURS}
        tables.append(results_table(results, columns))
    interval = "t interval over runs" if args.over_seeds else "bootstrap interval over problems"
    asked = problems_asked(results, args)
    shown = "\n".join(tables) + f"{asked}; ±: half of the 95% {interval}; more in {folder}"
    tables.insert(1, results_table(results, all_k_columns(args)))
    write_text(folder / "results.md", "\n".join(tables))
    return shown


def problems_asked(results, args):
    """How many problems of which data were asked, as text; a note on stderr where models were asked different ones."""
    counts = defaultdict(list)  # model -> number of problems per data set
    for row in results:
        counts[row["model"]].append(row["problems"])
    report_differences("different problems", {model: tuple(found) for model, found in counts.items()})
    of_first_model = next(iter(counts.values()))
    return ", ".join(f"{count} problems of {data}" for data, count in zip(args.data, of_first_model))


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Panel:
    """A panel of a figure: curves by label, each (x, y) or (x, y, intervals of y)."""

    title: str
    xlabel: str
    ylabel: str
    curves: dict
    faint: dict  # curves without marks, behind the others


def draw_panels(path, labels, panels, ticks=None, note=""):
    """A figure of panels with one legend. ticks: the positions of a logarithmic x axis."""
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = figures.panels(rows, columns, 1 + 4.2 * columns, 0.8 + 3.1 * rows, sharey=bool(ticks))
    axes = list(axes.flat)
    for axis in axes[len(panels) :]:
        axis.remove()
    handles = {}
    for axis, panel in zip(axes, panels):
        handles.update(draw_panel(axis, labels, panel, ticks))
    figure.suptitle(note, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)))
    figures.save_figures(path.parent, {path.stem: figure}, dpi=130)


def draw_panel(axis, labels, panel, ticks):
    """Draw one panel -> label -> its handle for the legend."""
    handles = {}
    for i, label in enumerate(labels):
        style = figures.style_of(i)
        if label in panel.faint:
            x, y = panel.faint[label]
            axis.plot(x, y, color=style["color"], linestyle=style["linestyle"], linewidth=0.8, alpha=0.5)
        if label in panel.curves:
            x, y, intervals = panel.curves[label]
            if ticks:  # a little beside each other, so that no interval is hidden
                shift = 1.02 ** (2 * i + 1 - len(labels))
                x = [value * shift for value in x]
            handles[label] = axis.errorbar(x, y, bars(y, intervals), **style, markersize=5, capsize=2)
    axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    axis.grid(alpha=0.3)
    if ticks:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
    return handles


def bars(values, intervals):
    """Intervals [low, high] of values -> lengths of error bars, below and above; None without intervals."""
    if not intervals:
        return None
    below = []
    above = []
    for value, (low, high) in zip(values, intervals):
        below.append(value - low)
        above.append(high - value)
    return below, above


def draw_results(folder, labels, results, args):
    """pass_at_k.png: a panel per data set and temperature. temperatures.png, of several: a panel per data set."""
    avg = f"avg@{args.num_samples}"
    panels = []
    sweeps = []
    for data in dict.fromkeys(row["data"] for row in results):
        rows = rows_where(results, "data", data)
        by_temperature = points(rows, [avg], args.temperatures)
        sweeps.append(Panel(data, "sampling temperature", avg, by_temperature, {}))
        for temperature in args.temperatures:
            by_k = points(rows_where(rows, "temperature", temperature), [f"pass@{k}" for k in args.ks], args.ks)
            title = f"{data}, temperature {temperature:g}"
            panels.append(Panel(title, "k (answers per problem)", "pass@k", by_k, {}))
    draw_panels(folder / "pass_at_k.png", labels, panels, args.ks)
    if len(args.temperatures) > 1:
        draw_panels(folder / "temperatures.png", labels, sweeps)


def rows_where(rows, name, value):
    """The rows in which one figure has this value."""
    return [row for row in rows if row[name] == value]


def points(rows, names, x):
    """Label -> (x, values, intervals). The values are several figures of one row, or one figure of several rows."""
    curves = {}
    for row, name in itertools.product(rows, names):
        _, values, intervals = curves.setdefault(row["model"], (x, [], []))
        values.append(row[name])
        intervals.append(row["intervals"].get(name, [row[name], row[name]]))
    return curves


# Of training curves: label of the axis, metric of the training batches, metric of the held-out problems.
TRAINING_CURVES = (
    ("accuracy", "accuracy", "eval_accuracy"),
    ("entropy (nats per token)", "entropy", "eval_entropy"),
    ("response length (tokens)", "response_length", "eval_response_length"),
    ("KL to the starting model (nats per token)", "", "kl_to_start"),
)


def draw_training(path, labels, runs):
    """Training curves (label -> run folders, averaged step by step): accuracy, entropy, length and KL against steps."""
    panels = []
    for ylabel, batch, held_out in TRAINING_CURVES:
        faint = {}
        curves = {}
        for label, folders in runs.items():
            batches = averaged(folders, batch)
            if batches:
                steps, means, _ = batches
                faint[label] = (steps, means)
            evaluations = averaged(folders, held_out)
            if evaluations:
                curves[label] = evaluations
        panels.append(Panel("", "step", ylabel, curves, faint))
    draw_panels(path, labels, panels, note="marks: held-out problems at temperature 1; faint: training batches")


def averaged(folders, name):
    """A metric of some runs, step by step -> (steps, means, intervals); None if no run has it. Intervals are 95% t
    intervals of three runs or more, else None: those of two (12.7 standard errors) would hide the curves."""
    values = defaultdict(list)  # step -> a value per run
    for folder in folders:
        for record in read_log(folder / "metrics.jsonl"):
            if is_number(record.get(name)):
                values[record["step"]].append(record[name])
    if not values:
        return None
    means, intervals = zip(*map(mean_interval, values.values()))
    if len(folders) < 3:
        intervals = None
    return list(values), means, intervals


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("models", nargs="+", help="run folders, checkpoints, model folders, hub ids, or 'embedded'")
    add("--data", nargs="+", help="held-out problems, as for the training scripts (default if embedded: arithmetic)")
    add("--num_problems", type=int, help="the first so many of each data set; 0: all (default: 256 if built in)")
    add("--num_samples", type=int, default=32, help="answers per problem (n)")
    add("--ks", type=int, nargs="+", help="k of pass@k and maj@k, at most n (default: those of 1 2 4 8 16 32)")
    add("--temperatures", type=float, nargs="+", default=[1.0], help="of sampling, one or several; 0 is greedy")
    add("--rescore", action="store_true", help="repeat this command's numbers from its samples, without any model")
    add("--overwrite", action="store_true", help="sample again although samples are there")
    add("--behaviours", action="store_true", help="also how often answers check, go back, set subgoals, work backwards")
    add("--over_seeds", action="store_true", help="one row for the models whose names differ only in a last -NUMBER")
    add("--output_dir", default="runs/evaluation", help="folder of samples, results.json, results.md and figures")
    add("--seed", type=int, default=0, help="of sampling and of the bootstrap")
    add_shared_options(parser, FOLLOWED, suffix=" (default: as the runs were trained)", defaults=False)
    add_shared_options(parser, SHARED, defaults=False)
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    if args.ks is None:
        args.ks = [k for k in (1, 2, 4, 8, 16, 32) if k <= args.num_samples]
    args.ks = sorted(set(args.ks))
    args.temperatures = sorted(set(args.temperatures))
    for k in args.ks:
        pass_at_k(args.num_samples, 0, k)  # raises where k does not fit
    if args.rescore and args.overwrite:
        parser.error("--rescore and --overwrite: choose one")
    return args


def check_numbers(parser, args):
    """Raise UserError for a number out of its bounds."""
    refuse_below(parser, args, dict(num_samples=1, num_problems=0))
    if args.num_samples > MOST_SAMPLES:
        parser.error(f"--num_samples {args.num_samples}: must be at most {MOST_SAMPLES}")
    for temperature in args.temperatures:
        if temperature != 0 and not LOWEST_TEMPERATURE <= temperature <= LARGEST:
            parser.error(f"--temperatures {temperature}: must be 0, or at least {LOWEST_TEMPERATURE}")


def sample_names(args):
    """Names of the sample files of a command."""
    names = []
    for model, data, temperature in itertools.product(args.models, args.data, args.temperatures):
        names.append(samples.sample_file(args.output_dir, model, data, temperature).name)
    return names


def loader(settings):
    """A function path -> (model, tokenizer) that loads each model once."""

    @functools.cache
    def load(path):
        return load_model(path, settings.device, settings.dtype)

    return load


def answer_all(entries, args):
    """Sample what is not there yet, and measure what is there -> (measured: by label, data set and temperature;
    seconds: label -> time of training)."""
    folder = Path(args.output_dir)
    measured = {}
    seconds = {}
    for entry in entries:
        load = loader(entry.settings)
        for data, temperature in itertools.product(args.data, args.temperatures):
            path = samples.sample_file(folder, entry.path, data, temperature)
            if args.overwrite:
                path.unlink(missing_ok=True)
            if args.rescore:
                samples.check_header(path, dict(num_samples=args.num_samples))
            else:
                complete_samples(entry, path, data, temperature, args, load)
            seconds[entry.label] = samples.read_header(path).get("training_seconds")
            records = samples.read_records(path, problem_limit(args, data))
            found = measure(records, args.ks, args.behaviours, entry.settings.grade_timeout)
            verifier.refuse_ungraded(found.verdicts, entry.settings.max_grader_errors, f"{entry.label} on {data}")
            if not found.values:
                raise UserError(f"{path}: holds no answer yet; run this command without --rescore first")
            measured[entry.label, data, temperature] = found
    return measured, seconds


def score_all(entries, measured, seconds, args):
    """A row of figures per temperature, data set and model; of several data sets also for their mean."""
    sets = {}
    for label, data in zip(labels_of(args.data), args.data):
        sets[label] = [data]
    if len(sets) > 1:
        sets["mean"] = args.data
    results = []
    for temperature, data, entry in itertools.product(args.temperatures, sets, entries):
        row = dict(model=entry.label, data=data, temperature=temperature, samples=args.num_samples)
        answers = [measured[entry.label, source, temperature] for source in sets[data]]
        row.update(score(answers, args.seed))
        row["training_seconds"] = seconds[entry.label]
        results.append(row)
    return results


def runs_by_label(entries, args):
    """Label -> run folders, for the training curves. A run and its checkpoints are one curve, under the run's name."""
    label_of_run = {}
    for entry in entries:
        is_the_run_itself = entry.run == Path(entry.path)
        if entry.run and (is_the_run_itself or entry.run not in label_of_run):
            label_of_run[entry.run] = entry.label
    runs = defaultdict(list)
    for run, label in label_of_run.items():
        if args.over_seeds:
            label = experiment(label)
        runs[label].append(run)
    return runs


def main(args):
    check_folder(args.output_dir, FILES)
    entries = read_entries(args)
    if not args.data and not all(is_embedded(model) for model in args.models):
        raise UserError("--data: needed; only embedded models have a default")
    args.data = args.data or [tasks.DEFAULT]
    labels_of(args.data)  # raises where a data set is given twice
    folder = Path(args.output_dir)
    check_folder(folder / "samples", sample_names(args))
    if "embedded" in args.models and not args.rescore:
        import sft

        sft.ensure_embedded()
    with explain(f"--output_dir {folder}: cannot be written", "pass another folder", OSError):
        (folder / "samples").mkdir(parents=True, exist_ok=True)
    lock_folder(folder)

    # 1. Sample what is not there yet; then everything is computed from what is there.
    measured, seconds = answer_all(entries, args)
    every_run = score_all(entries, measured, seconds, args)
    results = every_run
    labels = [entry.label for entry in entries]
    if args.over_seeds:
        results = over_seeds(every_run)
        labels = list(dict.fromkeys(experiment(label) for label in labels))

    # 2. Tables, numbers and figures. What is on the screen shall be in the folder, so the table is shown at the end.
    shown = write_tables(folder, results, args)
    kept = dict(command=vars(args), results=every_run)
    if args.over_seeds:
        kept["over_seeds"] = results
    write_json(folder / "results.json", kept)
    draw_results(folder, labels, results, args)
    runs = runs_by_label(entries, args)
    if runs:
        draw_training(folder / "training_curves.png", labels, runs)
    print(shown)


if __name__ == "__main__":
    with one_line_errors():
        main(parse())

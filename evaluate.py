"""Evaluation: how good, how diverse and how far from their start are trained models? One table, a few figures.

Every model answers every held-out problem n times; the answers are kept, and all numbers come from the kept answers.
    avg@n       mean accuracy of the n answers
    pass@k      chance that k of the n answers, drawn without replacement, hold a right one; with c of n right it is
                1 - C(n-c, k) / C(n, k), unbiased, as 1 - (1 - c/n)^k is not (https://arxiv.org/abs/2107.03374)
    maj@k       accuracy of the most frequent of k answers: mean over n // k consecutive blocks of k, the rest unused.
                Ties go to the answer sampled first; an answer that is unfinished or gives no answer has no vote
    Self-BLEU   BLEU-4 of an answer against the others to its problem (https://arxiv.org/abs/1802.01886); 1: all alike
    Rep-5       share of an answer's 5-grams of tokens that it had used before; near 1: it loops
    entropy     nats per token, of the distribution sampled from
    KL          to the model the run started from, nats per token: mean of exp(x) - x - 1, x = logp_start - logp
Means are over answers, then problems, then data sets (row 'mean'); of entropy and KL over all tokens of a data set. The
95% bootstrap intervals of avg, pass and maj redraw problems: they say nothing about other training seeds. --over_seeds
does: runs whose names differ only in a last -NUMBER become one row, with the mean and its 95% t interval over runs.

--behaviours: verification, backtracking, subgoal setting and backward chaining per answer (analyze_trajectory.py).
--logit_statistics: mean, standard deviation and skewness of the raw logits. Entropy minimization is said to raise the
skewness, reinforcement learning to lower it (https://arxiv.org/abs/2505.20282).
--gradient_variance: what a baseline does to the policy gradient's variance (https://arxiv.org/abs/2505.23585).

    python evaluate.py embedded runs/grpo runs/bupo runs/opo runs/em             # embedded models: a minute each
    python evaluate.py embedded runs/grpo runs/bupo runs/opo runs/em --rescore   # the same from the kept answers
    python evaluate.py embedded runs/em runs/grpo --temperatures 0.3 0.6 1.0 --logit_statistics --gradient_variance
    python evaluate.py Qwen/Qwen3-4B runs/grpo runs/grpo/checkpoint-100 --data math500.jsonl aime24.jsonl
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import sys
import typing
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import bookkeeping
import common

# Options in which an evaluation follows the runs' training, unless the command line says otherwise.
FOLLOWED = ("system_prompt", "chat_template_kwargs", "max_completion_length")
# Options that mean here what they mean to the training scripts.
SHARED = (*FOLLOWED, "max_prompt_length", "max_rollout_tokens", "micro_batch_tokens", "device", "dtype")
# Overrides of their defaults for an embedded model.
EMBEDDED = dict(system_prompt="", max_completion_length=64)

# ---------------------------------------------------------------------------------------------------------------------
# Metrics: pure functions
# ---------------------------------------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """Chance that k of n answers, drawn without replacement, hold one of the c right ones. Raises UserError if k > n.

    Exact integers, divided once: nothing overflows, nothing cancels.
    """
    if not 1 <= k <= n:
        raise common.UserError(f"--ks {k}: with {n} samples k is 1 to {n}; lower it or raise --num_samples")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def group_answers(answers):
    """For each answer the index of the first one equal to it; None for '', which is none.

    Comparing is slow and not symmetric: a new text is compared with the first of each group, which takes gold's place.
    """
    groups = {}  # text -> index of the first of its group
    for i, answer in enumerate(answers):
        if answer and answer not in groups:
            firsts = dict.fromkeys(groups.values())
            groups[answer] = next((j for j in firsts if common.verifier([(answers[j], answer)]) == ["right"]), i)
    return [groups.get(answer) for answer in answers]


def maj_at_k(groups, rewards, k):
    """Mean, over consecutive blocks of k answers, of the reward of the most frequent one. groups: of `group_answers`.

    Ties go to the answer sampled first; a block without any answer scores 0.
    """
    scores = []
    for start in range(0, len(groups) - k + 1, k):
        votes = Counter(group for group in groups[start : start + k] if group is not None)
        winner = max(votes, key=votes.get, default=None)  # of equals the first, and a Counter keeps their order
        scores.append(0.0 if winner is None else rewards[groups.index(winner, start)])
    return sum(scores) / len(scores)


def self_bleu(texts):
    """Mean over texts of BLEU-4 against the others as references, 0 to 1; None for fewer than two texts.

    Tokens are words and single punctuation marks; uniform weights; an n-gram order without a match counts 0.1 matches
    (nltk's method1), a text that shares no word scores 0; the brevity penalty looks at the reference closest in length,
    the shorter of two. Time is linear in the number of texts.
    """
    if len(texts) < 2:
        return None
    tokens = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    log_precision, shares_a_word = [0.0] * len(texts), [True] * len(texts)
    for order in (1, 2, 3, 4):
        counts = [Counter(zip(*(words[i:] for i in range(order)))) for words in tokens]
        largest = defaultdict(lambda: (0, 0))  # n-gram -> its largest and its second largest count in one text
        for gram, c in itertools.chain.from_iterable(count.items() for count in counts):
            first, second = largest[gram]
            largest[gram] = max(first, c), max(second, min(first, c))
        for i, count in enumerate(counts):
            # Where this text holds the largest count of all, the largest among the OTHERS is the second largest.
            matches = sum(min(c, largest[gram][c == largest[gram][0]]) for gram, c in count.items())
            shares_a_word[i] &= order > 1 or matches > 0
            log_precision[i] += math.log((matches or 0.1) / max(1, sum(count.values()))) / 4
    scores, lengths = [], [len(words) for words in tokens]
    for i, length in enumerate(lengths):
        closest = min((abs(other - length), other) for other in lengths[:i] + lengths[i + 1 :])[1]
        penalty = min(0.0, 1 - closest / max(1, length))
        scores.append(math.exp(log_precision[i] + penalty) if shares_a_word[i] else 0.0)
    return sum(scores) / len(scores)


def repetition(token_ids, n=5):
    """Rep-n: 1 - unique / total n-grams of a list of token ids; 0 below n tokens."""
    grams = list(zip(*(token_ids[i:] for i in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def bootstrap(groups, seed=0, resamples=2000):
    """95% percentile interval [low, high] of the mean over data sets of the mean over problems.

    groups: per-problem values, a list per data set, each redrawn with replacement. The same seed redraws the same
    problems for every metric and model.
    """
    generator, means = torch.Generator().manual_seed(seed), 0.0
    for group in groups:
        drawn = torch.randint(len(group), (resamples, len(group)), generator=generator)
        means = means + torch.tensor(group, dtype=torch.float64)[drawn].mean(1) / len(groups)
    return torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


# Two-sided 95% quantiles of Student's t for the interval of a mean of n values; of the normal distribution beyond.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def mean_interval(values):
    """(mean, [low, high]) of a few runs' values: the 95% t interval; [mean, mean] for a single run."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
    half = T_QUANTILES.get(n, 1.96) * math.sqrt(variance / n)
    return mean, [mean - half, mean + half]


def gradient_variance(squares, rewards, lengths, mean_square):
    """Variance of the policy gradient of one sampled answer under four baselines -> dict of floats.

    With g = grad log pi(y), the estimate (r - b) g has the variance (the trace of its covariance)
        V(b) = E |g|^2 (r - b)^2 - |E (r - b) g|^2,
    taken per prompt over its n answers and averaged over prompts. As E g = 0, the second term is |grad J|^2 whatever b:
    it is estimated once for all four, so that they differ by what a baseline does and not by noise in the mean. What is
    left is a parabola in b, lowest at b = E |g|^2 r / E |g|^2, the norm-weighted baseline. OPO's replaces |g|^2 by the
    length. As in training b comes from the group itself, which flatters it: at n = 32 by a few percent.

    squares [P, n]: |g|^2; rewards, lengths [P, n]; mean_square [P]: |grad J|^2.
    """

    def variance(weights):
        b = (weights * rewards).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1e-30)
        return float(((squares * (rewards - b) ** 2).mean(1) - mean_square).mean())

    return {
        "no baseline": float(((squares * rewards**2).mean(1) - mean_square).mean()),
        "mean": variance(torch.ones_like(rewards)),
        "length-weighted": variance(lengths),
        "norm-weighted": variance(squares),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Statistics that need the model
# ---------------------------------------------------------------------------------------------------------------------

EDGE, BINS = 128.0, 1024  # histogram of the logits: bins of 0.25 over [-128, 128]; the outermost take what lies outside
LOGITS_AT_ONCE = 2**22  # 32 MiB in fp64


@torch.no_grad()
def logit_statistics(model, rollouts, micro_batch_tokens):
    """Moments of the raw logits, the whole vocabulary at every position that predicts a completion token -> dict.

    mean, sd, skewness (of the population, as scipy's skew), count of logits, histogram (counts). No temperature, no
    truncation. No more than LOGITS_AT_ONCE logits exist at a time; sums are fp64.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)
    histogram = torch.zeros(BINS, dtype=torch.long, device=model.device)
    size = max(1, LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])  # positions at a time
    for rows in common.micro_batches(rollouts, range(len(rollouts.ids)), micro_batch_tokens):
        longest = int(rollouts.attention_mask[rows].sum(1).max())
        ids, attention_mask = rollouts.ids[rows, : longest - 1], rollouts.attention_mask[rows, : longest - 1]
        predicts = rollouts.mask[rows, 1:longest].bool()  # column t predicts token t + 1
        for hidden in common.hidden_states(model, ids, attention_mask)[predicts].split(size):
            z = common.head_logits(model, hidden).double().flatten()
            sums += torch.stack([z.sum(), (z**2).sum(), (z**3).sum()])
            histogram += ((z + EDGE) * (BINS / EDGE / 2)).long().clamp(0, BINS - 1).bincount(minlength=BINS)
    count = int(histogram.sum())
    mean, square, cube = (sums / count).tolist()
    sd = math.sqrt(square - mean**2)
    skewness = (cube - 3 * mean * square + 2 * mean**3) / sd**3
    return dict(mean=mean, sd=sd, skewness=skewness, count=count, histogram=histogram.tolist())


def gradient_moments(model, rollouts, rewards, temperature):
    """(squares [P, n], mean_square [P]) for `gradient_variance`, fp64; rewards [P, n], rollouts of B = P*n rows.

    Gradients are over all parameters, one answer at a time. mean_square is the mean of <x_i, x_j> over pairs i != j of
    x_i = (r_i - mean r) g_i: unlike |mean x|^2 it holds no share of the variance; for one prompt it may be below 0.
    At any time there is one gradient and one fp32 sum of gradients, whatever n.
    """
    squares = torch.zeros(rewards.shape, dtype=torch.float64)
    mean_square, n = torch.zeros(len(rewards), dtype=torch.float64), rewards.shape[1]
    for p, centred in enumerate(rewards - rewards.mean(1, keepdim=True)):
        total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in model.parameters()]
        for i in range(n):
            common.completion_logps(model, rollouts, [p * n + i], temperature)[0].sum().backward()
            for parameter, sum_x in zip(model.parameters(), total):
                if parameter.grad is not None:
                    squares[p, i] += float(parameter.grad.float().square().sum())
                    sum_x.add_(parameter.grad, alpha=float(centred[i]))
                    parameter.grad = None
        of_sum = sum(float(sum_x.square().sum()) for sum_x in total)
        mean_square[p] = (of_sum - float((squares[p] * centred**2).sum())) / (n * (n - 1))
    return squares, mean_square


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
    settings: common.RunArgs | None = None  # how it is evaluated


def labels_of(paths):
    """The shortest ends of paths that tell them apart: runs/grpo, runs/em -> grpo, em. A model inside a run bears the
    run's name: em/best, grpo/checkpoint-100. Raises UserError for doubles."""
    parts = [Path(path.removesuffix(".jsonl")).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        lengths = [max(length, 2) if re.match("checkpoint-|best$", part[-1]) else length for part in parts]
        labels = ["/".join(part[-n:]) for part, n in zip(parts, lengths)]
        if len(set(labels)) == len(labels):
            return labels
    raise common.UserError(f"{' '.join(paths)}: one of them is listed twice; drop it")


def find_run(path):
    """The run folder a model belongs to, its own or the one around a checkpoint; None for any other model.

    Raises UserError for a missing folder and for an unfinished run.
    """
    folder = Path(path)
    if not folder.is_dir():
        # 'runs/grpo' could be a hub id, but not where there is a folder 'runs'.
        if folder.exists() or path[:1] in "./" or path.count("/") > 1 or ("/" in path and folder.parent.is_dir()):
            raise common.UserError(f"{path}: no such folder; pass a run folder, a model folder or a hub id")
        return None
    run = next((f for f in (folder, folder.parent) if (f / "args.json").is_file()), None)
    if run and (run == folder or folder.name.startswith("checkpoint-")) and not bookkeeping.step_of(folder):
        raise common.UserError(f"{path}: unfinished, no trainer_state.json; repeat its training command to finish it")
    return run


def read_entries(args):
    """args.models -> list of Entry. A setting is that of the command line, else of the run, else of the first run given
    (a base model is asked as its runs are), else EMBEDDED for embedded models, else the training scripts' default."""
    entries = []
    for path, label in zip(args.models, labels_of(args.models)):
        run = None if args.rescore or path == "embedded" else find_run(path)
        trained = json.loads((run / "args.json").read_text()) if run else {}
        if run and Path(trained["model"]).parent == Path(trained["output_dir"]):
            run, trained = None, {}  # built from nothing (the embedded model): others start here, it does not
        entries.append(Entry(path, label, run, trained))
    sampled = [entry.trained for entry in entries if "num_generations" in entry.trained]  # not those of sft.py
    given = {name: getattr(args, name) for name in (*SHARED, "seed") if getattr(args, name) is not None}
    for entry in entries:
        run = entry.trained if entry.trained in sampled else dict(*sampled[:1])
        followed = {name: run[name] for name in FOLLOWED if name in run}
        defaults = EMBEDDED if common.is_embedded(entry.path) else {}
        entry.settings = common.RunArgs(**{**defaults, **followed, **given})
    for name in FOLLOWED:
        tell_differences(f"different {name}", {entry.label: getattr(entry.settings, name) for entry in entries})
    tell_differences("trained on different data", {e.label: e.trained["data"] for e in entries if e.trained})
    return entries


def tell_differences(what, values):
    """One line on stderr if unequals are compared. values: label -> value."""
    if len(set(values.values())) > 1:
        print(f"note: {what}:", ", ".join(f"{label} {value!r}" for label, value in values.items()), file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Samples: a JSONL file per model, data set and temperature; a header, then a record per problem
# ---------------------------------------------------------------------------------------------------------------------


def problem_limit(args, data):
    """How many problems of a data set are used, the first so many; 0 for all."""
    return args.num_problems if args.num_problems is not None else 256 if data in common.BUILT_IN else 0


def read_samples(path, limit=0):
    """(header, iterator over the records of problems below limit, 0 for all) of a sample file. Raises UserError."""
    if not path.is_file():
        raise common.UserError(f"{path}: no samples yet; run this command without --rescore first")

    def lines():
        with open(path, encoding="utf-8") as file:  # splitlines() would split at line separators inside a text, too
            yield from map(json.loads, file)

    records = lines()
    return next(records), (record for record in records if not limit or record["problem"] < limit)


def check_header(path, wanted):
    """Raise UserError if a sample file was made under other settings than those wanted."""
    header, _ = read_samples(path)
    for name, value in wanted.items():
        if header[name] != value:
            remedy = "repeat that command, sample again with --overwrite, or choose another --output_dir"
            raise common.UserError(f"{path}: sampled with {name} {header[name]!r}, now {value!r}; {remedy}")


BLOCK = 8  # problems that are sampled together and then kept, at least: their long answers share the last waves


def draw(entry, path, data, temperature, args, load):
    """Append to a sample file the problems it does not hold yet, a block of problems at a time.

    load: path -> (model, tokenizer), called only if something is missing. The seed of a block depends on its first
    problem, not on the model or on what is there already: an interrupted file is completed as if nothing had happened.
    Raises UserError if the file holds answers to other problems, of other weights or under other settings.
    """
    s = entry.settings
    problems = common.load_problems(data, "test", problem_limit(args, data), s.system_prompt)
    weights = (common.EMBEDDED_MODEL if entry.path == "embedded" else Path(entry.path)).glob("*.safetensors")
    header = dict(model=entry.path, weights_saved=sorted(file.stat().st_mtime for file in weights), data=data)
    header |= dict(temperature=temperature, num_samples=args.num_samples)
    header |= {name: getattr(s, name) for name in ("chat_template_kwargs", "max_completion_length", "dtype", "seed")}
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a last line cut off by a kill
    if not path.is_file() or not path.stat().st_size:
        bookkeeping.append_jsonl(path, [header | dict(training_seconds=training_seconds(entry.path))])
        for name in PROBES:
            probe_file(path, name).unlink(missing_ok=True)
    check_header(path, header)
    missing = dict(enumerate(problems))
    for record in read_samples(path, len(problems))[1]:
        problem = missing.pop(record["problem"])
        if (record["prompt"], record["gold"]) != (problem.prompt, problem.answer):
            raise common.UserError(f"{path}: holds answers to other problems than {data}; use --overwrite")
    if not missing:
        return
    model, tokenizer = load(entry.path)
    kept = common.tokenize_problems(tokenizer, problems, s.max_prompt_length, json.loads(s.chat_template_kwargs))
    missing = [(i, problem) for i, problem in missing.items() if len(problem.ids) <= s.max_prompt_length]
    start = None
    try:
        if entry.run and missing:
            find_run(entry.trained["model"])  # a folder that is gone is not looked up as a hub id
            start, _ = load(entry.trained["model"])
    except common.UserError as error:
        print(f"note: {entry.label}: no KL, its starting model cannot be loaded ({error})", file=sys.stderr)
    longest = max(len(problem.ids) for problem in kept) + s.max_completion_length
    size = max(BLOCK, s.max_rollout_tokens // (longest * args.num_samples))
    blocks = [missing[i : i + size] for i in range(0, len(missing), size)]
    for block in tqdm(blocks, f"{entry.label}, {data}, temperature {temperature:g}", unit="block"):
        prompts, limits = [problem.ids for _, problem in block], (args.num_samples, s.max_completion_length)
        seed = common.step_seed(s.seed, temperature, block[0][0], block[0][1].prompt)
        rollouts = common.sample(model, tokenizer, prompts, *limits, temperature, s.max_rollout_tokens, seed=seed)
        records = []
        for j, (index, problem) in enumerate(block):
            rows = slice(j * args.num_samples, (j + 1) * args.num_samples)
            tensors = (rollouts.ids, rollouts.attention_mask, rollouts.mask, rollouts.lengths)
            part, kl = common.Rollouts(*(tensor[rows] for tensor in tensors)), None
            if start is not None:
                kl = common.kl_between(model, start, part, s.micro_batch_tokens, temperature or 1.0)
            record = dict(problem=index, prompt=problem.prompt, gold=problem.answer, prompt_ids=problem.ids)
            record |= dict(numbers=problem.numbers, target=problem.target) if problem.numbers else {}
            record["texts"] = rollouts.texts[rows]
            record["token_ids"] = [ids[mask.bool()].tolist() for ids, mask in zip(part.ids, part.mask)]
            record["finished"] = rollouts.finished[rows].tolist()
            record["entropy"] = rollouts.entropy[rows].sum(1).tolist()  # nats, summed over the tokens of an answer
            record["kl"] = kl  # nats per token, over all tokens of the record
            records.append(record)
        bookkeeping.append_jsonl(path, records)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def grade_record(record):
    """The rewards of a record's answers."""
    countdown = {name: record[name] for name in ("numbers", "target") if name in record}
    problem = common.Problem(record["prompt"], record["gold"], **countdown)
    return common.grade(record["texts"], [problem] * len(record["texts"]), record["finished"])


def measure(records, ks, behaviours=False):
    """Records of a sample file -> (values: metric -> one value per problem, totals over the tokens of all answers)."""
    from analyze_trajectory import count_behaviours

    values, totals = defaultdict(list), Counter()
    for record in records:
        rewards, lengths = grade_record(record), [len(ids) for ids in record["token_ids"]]
        texts = record["texts"]
        if "numbers" in record:  # Countdown's answers may stand between tags: they vote as if they stood in a box
            texts = [re.sub(r"(?s)\A.*<answer>(.*?)</answer>.*", r"\\boxed{\1}", text) for text in texts]
        groups = group_answers([*map(common.gradable, texts, record["finished"])])
        n, right = len(rewards), rewards.count(1.0)
        values[f"avg@{n}"].append(right / n)
        for k in ks:
            values[f"pass@{k}"].append(pass_at_k(n, right, k))
            values[f"maj@{k}"].append(maj_at_k(groups, [float(r == 1) for r in rewards], k))
        values["response_length"].append(sum(lengths) / n)
        values["truncated_share"].append(1 - sum(record["finished"]) / n)
        values["self_bleu"].append(self_bleu(record["texts"]))
        values["repetition_5"].append(sum(map(repetition, record["token_ids"])) / n)
        counts = [count_behaviours(text) for text in record["texts"]] if behaviours else [{}]
        for name in counts[0]:
            values[name].append(sum(count[name] for count in counts) / n)
        kl = math.nan if record["kl"] is None else record["kl"] * sum(lengths)
        totals.update(tokens=sum(lengths), entropy=sum(record["entropy"]), kl_to_start=kl)
    return values, totals


def score(measured, seed):
    """What `measure` gave, an element per data set -> dict of figures (None where undefined) with intervals."""
    row = dict(problems=sum(len(values["response_length"]) for values, _ in measured), intervals={})
    for name in measured[0][0]:
        groups = [values[name] for values, _ in measured]
        row[name] = None if None in groups[0] else sum(sum(group) / len(group) for group in groups) / len(groups)
        if "@" in name:
            row["intervals"][name] = bootstrap(groups, seed)
    for name in ("entropy", "kl_to_start"):
        value = sum(totals[name] / totals["tokens"] for _, totals in measured) / len(measured)
        row[name] = None if math.isnan(value) else value
    return row


def training_seconds(path):
    """Time that a run spent in training steps, without evaluations and saving; None for a model that is no run."""
    steps = [record["seconds"] for record in bookkeeping.read_log(Path(path) / "metrics.jsonl") if "seconds" in record]
    return sum(steps) if steps and path != str(common.EMBEDDED_MODEL) else None


def experiment(label):
    """The label of a run without its seed: grpo-0 -> grpo, em-1/best -> em/best."""
    return re.sub(r"(?<!checkpoint)-\d+(?=/|$)", "", label)


def over_seeds(results):
    """Rows of one experiment -> one row: means, and intervals over runs instead of over problems."""
    groups, rows = defaultdict(list), []
    for row in results:
        groups[experiment(row["model"]), row["data"], row["temperature"]].append(row)
    for (model, *_), group in groups.items():
        row = group[0] | dict(model=model, runs=len(group), intervals={})
        for name in row.keys() - {"model", "data", "temperature", "samples", "problems", "runs", "intervals"}:
            if None not in (values := [one[name] for one in group]):
                row[name], row["intervals"][name] = mean_interval(values)
        row["intervals"] = row["intervals"] if len(group) > 1 else {}  # one run has no spread
        rows.append(row)
    return rows


PROBES = ("logit_statistics", "gradient_variance")


def probe_file(path, name):
    """Where a probe of the model behind a sample file is kept, so that --rescore needs no model."""
    return path.with_name(f"{path.stem}--{name}.json")


def probe(name, entry, path, temperature, args, load):
    """One of PROBES, on the first --probe_problems problems of a sample file, all answers. -> dict."""
    kept = probe_file(path, name)
    if kept.is_file() and json.loads(kept.read_text())["problems"] == args.probe_problems:
        return json.loads(kept.read_text())
    if args.rescore:
        raise common.UserError(f"{kept}: not made for {args.probe_problems} problems; run without --rescore first")
    records = list(itertools.islice(read_samples(path)[1], args.probe_problems))
    model, tokenizer = load(entry.path)
    prompts = [record["prompt_ids"] for record in records for _ in record["texts"]]
    completions = [ids for record in records for ids in record["token_ids"]]
    rollouts = common.assemble(prompts, completions, tokenizer.pad_token_id, model.device)
    if name == "logit_statistics":
        found = logit_statistics(model, rollouts, entry.settings.micro_batch_tokens)
    else:
        rewards = torch.tensor([grade_record(record) for record in records], dtype=torch.float64)
        squares, mean_square = gradient_moments(model, rollouts, rewards, temperature)
        found = gradient_variance(squares, rewards, rollouts.lengths.view(rewards.shape).cpu().double(), mean_square)
    bookkeeping.write_json(kept, found | dict(problems=args.probe_problems))
    return json.loads(kept.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures
# ---------------------------------------------------------------------------------------------------------------------


def table(rows):
    """Rows of cells, the header first -> a Markdown table, aligned to be read as text, too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"


def results_table(results, columns):
    """columns: header -> (figure, decimals). Data set and temperature are shown only where there are several."""
    keys = [key for key in ("data", "temperature") if len({row[key] for row in results}) > 1]
    rows = [["model", *keys, *columns]]
    for row in results:
        rows.append([row["model"], *(str(row[key]) for key in keys)])
        for name, places in columns.values():
            low, high = row["intervals"].get(name, (0, 0))
            interval = f" ±{(high - low) / 2:.{places}f}" if name in row["intervals"] else ""
            rows[-1].append("-" if row[name] is None else f"{row[name]:.{places}f}{interval}")
    return table(rows)


# Okabe and Ito's colours, of different lightness; line and mark tell the models apart in grey, too.
COLOURS = ("black", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
LINES, MARKS = ("-", "--", "-.", ":"), "os^Dv"
STYLES = [(COLOURS[i % 6], LINES[i % 4], MARKS[i % 5]) for i in range(60)]


def draw_panels(path, labels, panels, ticks=None, note=""):
    """A figure of panels with one legend. panels: (title, xlabel, ylabel, lines, faint); lines: label -> (x, y,
    intervals or None); faint: label -> (x, y), without marks. ticks: the positions of a logarithmic x axis."""
    from matplotlib.figure import Figure

    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, handles = Figure((1 + 4.2 * columns, 0.8 + 3.1 * rows), layout="constrained", dpi=130), {}
    axes = figure.subplots(rows, columns, squeeze=False, sharey=bool(ticks)).flat
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, xlabel, ylabel, lines, faint) in zip(axes, panels):
        for i, (label, (colour, line, mark)) in enumerate(zip(labels, STYLES)):
            if label in faint:
                axis.plot(*faint[label], color=colour, linestyle=line, linewidth=0.8, alpha=0.5)
            if label in lines:
                x, y, intervals = lines[label]
                errors = intervals and list(zip(*((v - low, high - v) for v, (low, high) in zip(y, intervals))))
                x = [v * 1.02 ** (2 * i + 1 - len(labels)) for v in x] if ticks else x  # so that no interval is hidden
                style = dict(color=colour, linestyle=line, marker=mark, markersize=5, capsize=2)
                handles[label] = axis.errorbar(x, y, errors, **style)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.3)
        if ticks:
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
    figure.suptitle(note, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)))
    figure.savefig(path)


def draw_results(folder, labels, results, args):
    """pass_at_k.png: a panel per data set and temperature. temperatures.png, of several: a panel per data set."""

    def points(rows, names, x):  # -> label -> (x, values, intervals): the names of one row, or the rows of one name
        found = {label: [] for label in labels}
        for row, name in itertools.product(rows, names):
            found[row["model"]].append((row[name], row["intervals"].get(name, [row[name]] * 2)))
        return {label: (x, *zip(*pairs)) for label, pairs in found.items()}

    avg, panels, sweeps = f"avg@{args.num_samples}", [], []
    for data in dict.fromkeys(row["data"] for row in results):
        rows = [row for row in results if row["data"] == data]
        sweeps.append((data, "sampling temperature", avg, points(rows, [avg], args.temperatures), {}))
        for t in args.temperatures:
            lines = points([row for row in rows if row["temperature"] == t], [f"pass@{k}" for k in args.ks], args.ks)
            panels.append((f"{data}, temperature {t:g}", "k (answers per problem)", "pass@k", lines, {}))
    draw_panels(folder / "pass_at_k.png", labels, panels, args.ks)
    if len(args.temperatures) > 1:
        draw_panels(folder / "temperatures.png", labels, sweeps)


def draw_training(path, labels, runs):
    """Training curves (label -> run folders, averaged step by step): accuracy, entropy, length and KL against steps.
    Bars are 95% t intervals over three runs or more; those of two (12.7 standard errors) would hide the curves."""
    panels = []
    for ylabel, batch, held_out in (
        ("accuracy", "accuracy", "eval_accuracy"),
        ("entropy (nats per token)", "entropy", "eval_entropy"),
        ("response length (tokens)", "response_length", "eval_response_length"),
        ("KL to the starting model (nats per token)", "", "kl_to_start"),
    ):
        faint, lines = {}, {}
        for (label, folders), (name, curves) in itertools.product(runs.items(), ((batch, faint), (held_out, lines))):
            points = defaultdict(list)  # step -> a value per run
            for record in itertools.chain.from_iterable(bookkeeping.read_log(run / "metrics.jsonl") for run in folders):
                if record.get(name) is not None:
                    points[record["step"]].append(record[name])
            if points:
                means, intervals = zip(*map(mean_interval, points.values()))
                curves[label] = (list(points), means, intervals if curves is lines and len(folders) > 2 else None)
        panels.append(("", "step", ylabel, faint | lines, {label: curve[:2] for label, curve in faint.items()}))
    draw_panels(path, labels, panels, note="marks: held-out problems at temperature 1; faint: training batches")


def draw_logits(path, statistics):
    """Histograms of the logits, a panel per model (label -> `logit_statistics`); the first model's outline in all."""
    from matplotlib.figure import Figure

    figure = Figure((7, 0.8 + 1.7 * len(statistics)), layout="constrained", dpi=130)
    axes = figure.subplots(len(statistics), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    width = 2 * EDGE / BINS
    centres = [-EDGE + (i + 0.5) * width for i in range(BINS)]
    density = {label: [c / s["count"] / width for c in s["histogram"]] for label, s in statistics.items()}
    shown = [x for x, *values in zip(centres, *density.values()) if max(values) > 1e-4]
    for axis, (label, s) in zip(axes, statistics.items()):
        axis.fill_between(centres, density[label], step="mid", color="0.75", linewidth=0)
        axis.step(centres, density[next(iter(density))], where="mid", color="black", linewidth=1)
        axis.axvline(s["mean"], color="#D55E00", linewidth=1.5, linestyle="--")
        text = f"mean {s['mean']:.2f}\nsd {s['sd']:.2f}\nskewness {s['skewness']:.2f}"
        axis.text(0.98, 0.92, text, transform=axis.transAxes, ha="right", va="top", fontsize=9)
        # The tail, where the probable tokens are, is a thousandth of the bulk and makes the skewness: logarithmic.
        axis.set(title=label, ylabel="density", yscale="log", ylim=(1e-4, None), xlim=(shown[0], shown[-1]))
    axes[-1].set_xlabel(f"raw logit, whole vocabulary (dashed: mean; outline: {next(iter(density))})")
    figure.savefig(path)


def draw_gradients(path, variances):
    """Bars of the variance under each baseline relative to none, a group per model (label -> `gradient_variance`)."""
    from matplotlib.figure import Figure

    figure = Figure((2.5 + 2 * len(variances), 3.8), layout="constrained", dpi=130)
    axis, names = figure.subplots(), [name for name in next(iter(variances.values())) if name != "problems"]
    for i, (name, shade) in enumerate(zip(names, ("1", "0.8", "0.5", "0.2"))):
        heights = [values[name] / (values["no baseline"] or 1) for values in variances.values()]
        places = [group + 0.2 * i for group in range(len(variances))]
        bars = axis.bar(places, heights, 0.2, color=shade, edgecolor="black", label=name)
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axis.set_xticks([group + 0.3 for group in range(len(variances))], variances)
    axis.set_ylabel("variance of one answer's policy\ngradient, relative to no baseline")
    axis.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=4 if len(variances) > 1 else 2)
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""

    def fail(message):
        raise common.UserError(f"{message} (--help lists every option)")

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
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
    add("--logit_statistics", action="store_true", help="also mean, sd, skewness and histogram of the raw logits")
    add("--gradient_variance", action="store_true", help="also the policy gradient's variance under four baselines")
    add("--probe_problems", type=int, default=16, help="problems for these two, of the first data, hottest")
    add("--over_seeds", action="store_true", help="one row for the models whose names differ only in a last -NUMBER")
    add("--output_dir", default="runs/evaluation", help="folder of samples, results.json, results.md and figures")
    add("--seed", type=int, default=0, help="of sampling and of the bootstrap")
    for field in dataclasses.fields(common.RunArgs):
        if field.name in SHARED:
            text = field.metadata["help"] + (" (default: as the runs were trained)" if field.name in FOLLOWED else "")
            add(f"--{field.name}", type=type(field.default), choices=typing.get_args(field.type) or None, help=text)
    args = parser.parse_args(argv)
    args.ks = sorted(set(args.ks or [k for k in (1, 2, 4, 8, 16, 32) if k <= args.num_samples]))
    args.temperatures = sorted(set(args.temperatures))
    for name, low in (("num_samples", 1), ("probe_problems", 1), ("num_problems", 0), ("temperatures", 0)):
        value = getattr(args, name)
        if value is not None and not min([value] if isinstance(value, int) else value) >= low:
            fail(f"--{name} {value}: must be {low} or more")
    for k in args.ks:
        pass_at_k(args.num_samples, 0, k)  # raises where k does not fit
    if args.rescore and args.overwrite:
        fail("--rescore and --overwrite: choose one")
    if args.gradient_variance and (args.num_samples < 2 or args.temperatures[-1] == 0):
        fail("--gradient_variance: takes 2 or more --num_samples and a temperature above 0")
    return args


def main(args):
    from analyze_trajectory import count_behaviours

    if "embedded" in args.models and not args.rescore:
        import sft

        sft.ensure_embedded()
    entries, folder = read_entries(args), Path(args.output_dir)
    if not args.data and not all(map(common.is_embedded, args.models)):
        raise common.UserError("--data: needed; only embedded models have a default")
    args.data = args.data or ["arithmetic"]
    sets = {label: [data] for label, data in zip(labels_of(args.data), args.data)}
    sets |= {"mean": args.data} if len(sets) > 1 else {}
    (folder / "samples").mkdir(parents=True, exist_ok=True)

    # 1. Sample what is not there yet; then everything is computed from what is there.
    measured, seconds, probed = {}, {}, {name: {} for name in PROBES if getattr(args, name)}
    for entry in entries:
        load = functools.cache(lambda path, s=entry.settings: common.load_model(path, s.device, s.dtype))
        for data, t in itertools.product(args.data, args.temperatures):
            parts = (re.sub(r"[^\w.-]+", "_", part).strip("_") for part in (entry.path, data, f"T{t:g}"))
            path = folder / "samples" / ("--".join(parts) + ".jsonl")
            if args.overwrite:
                path.unlink(missing_ok=True)
            if args.rescore:
                check_header(path, dict(num_samples=args.num_samples))
            else:
                draw(entry, path, data, t, args, load)
            header, records = read_samples(path, problem_limit(args, data))
            measured[entry.label, data, t] = measure(records, args.ks, args.behaviours)
            seconds[entry.label] = header.get("training_seconds")
            if not measured[entry.label, data, t][0]:
                raise common.UserError(f"{path}: holds no answer yet; run this command without --rescore first")
            for name in probed if (data, t) == (args.data[0], args.temperatures[-1]) else ():
                probed[name][entry.label] = probe(name, entry, path, t, args, load)
    results = []
    for t, data, entry in itertools.product(args.temperatures, sets, entries):
        figures = score([measured[entry.label, source, t] for source in sets[data]], args.seed)
        figures["training_seconds"] = seconds[entry.label]
        results.append(dict(model=entry.label, data=data, temperature=t, samples=args.num_samples, **figures))
    every_run, labels = results, [entry.label for entry in entries]
    if args.over_seeds:
        results, labels = over_seeds(results), list(dict.fromkeys(map(experiment, labels)))

    # 2. Tables: one on the screen, all in results.md.
    columns = {name: (name, 3) for name in (f"avg@{args.num_samples}", f"pass@{args.ks[-1]}", f"maj@{args.ks[-1]}")}
    columns |= {"length": ("response_length", 1), "truncated": ("truncated_share", 3), "entropy": ("entropy", 3)}
    columns |= {"KL": ("kl_to_start", 4), "Self-BLEU": ("self_bleu", 3), "Rep-5": ("repetition_5", 3)}
    columns |= {"time (s)": ("training_seconds", 0)}
    tables = [results_table(results, columns)]
    if args.behaviours:
        names = {f"{name.replace('_', ' ')} per answer": (name, 2) for name in count_behaviours("")}
        tables.append(results_table(results, names))
    for models in probed.values():
        names = [name for name in next(iter(models.values())) if name != "histogram"]
        rows = [[label, *(f"{found[name]:.4g}" for name in names)] for label, found in models.items()]
        tables.append(table([["model", *names], *rows]))
    counts = {label: [row["problems"] for row in results if row["model"] == label] for label in labels}
    tell_differences("different problems", {label: tuple(found) for label, found in counts.items()})
    asked = ", ".join(f"{count} problems of {data}" for data, count in zip(args.data, counts[labels[0]]))
    interval = "t interval over runs" if args.over_seeds else "bootstrap interval over problems"
    print("\n".join(tables) + f"{asked}; ±: half of the 95% {interval}; more in {folder}")
    every_k = {name: (name, 3) for kind in ("pass", "maj") for name in (f"{kind}@{k}" for k in args.ks)}
    tables.insert(1, results_table(results, every_k))
    (folder / "results.md").write_text("\n".join(tables), encoding="utf-8")
    merged = dict(over_seeds=results) if args.over_seeds else {}
    bookkeeping.write_json(folder / "results.json", dict(command=vars(args), results=every_run, **merged, **probed))

    # 3. Figures.
    draw_results(folder, labels, results, args)
    by_name = sorted(entries, key=lambda entry: entry.run == Path(entry.path))  # a run and its checkpoints: one curve
    runs = defaultdict(list)
    for run, label in {entry.run: entry.label for entry in by_name if entry.run}.items():
        runs[experiment(label) if args.over_seeds else label].append(run)
    if runs:
        draw_training(folder / "training_curves.png", labels, runs)
    if args.logit_statistics:
        draw_logits(folder / "logits.png", probed["logit_statistics"])
    if args.gradient_variance:
        draw_gradients(folder / "gradient_variance.png", probed["gradient_variance"])


if __name__ == "__main__":
    with common.one_line_errors():
        main(parse())

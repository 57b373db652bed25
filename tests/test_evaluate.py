"""Numbers that comparisons of models rest on, against brute force, hand values, enumeration and independent references.

The model under test is a bigram: its block adds nothing to the residual stream, so the next token depends on the last
one only, with the probabilities of `NEXT`. It takes no training, and has answers right and wrong, short and long,
finished and not.
"""

import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bookkeeping
import common
import evaluate
import grpo
import sft

torch.set_num_threads(1)

# ---------------------------------------------------------------------------------------------------------------------
# pass@k, maj@k
# ---------------------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer():
    """All subsets of all outcomes up to n = 8: the closed form is exact, not an estimate of one."""
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            answers = [1] * c + [0] * (n - c)
            subsets = list(itertools.combinations(answers, k))
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_where_other_codebases_go_wrong():
    """Returning 1 whenever c >= k (a reference implementation), drawing with replacement, and overflow at large n."""
    assert evaluate.pass_at_k(32, 4, 4) == pytest.approx(0.431, abs=5e-4)
    assert evaluate.pass_at_k(4, 1, 4) == 1.0  # with replacement: 0.684
    assert evaluate.pass_at_k(10_000, 1, 100) == 0.01
    assert evaluate.pass_at_k(10_000, 0, 9_999) == 0.0


@pytest.mark.parametrize("k", [0, 9])
def test_pass_at_k_needs_as_many_samples_as_it_draws(k):
    with pytest.raises(common.UserError, match=f"--ks {k}: with 8 samples"):
        evaluate.pass_at_k(8, 4, k)


def test_answers_are_grouped_as_they_are_graded():
    """Different texts of one number are one answer; a missing one is none, not a group of its own."""
    answers = ["\\frac{1}{2}", "", "2", "0.5", "2", "2.0", "", "3"]
    assert evaluate.group_answers(answers) == [0, None, 2, 0, 2, 2, None, 7]


def test_the_first_of_a_group_takes_the_place_of_the_gold_answer(monkeypatch):
    """The verifier is not symmetric; and every pair is asked at most once, because asking is slow."""
    asked = []
    monkeypatch.setattr(common, "verifier", lambda p: asked.extend(p) or ["right" if p == [("a", "A")] else "wrong"])
    assert evaluate.group_answers(["a", "b", "A", "b", "A", "a"]) == [0, 1, 0, 1, 0, 0]
    assert asked == [("a", "b"), ("a", "A")]


@pytest.mark.parametrize(
    "groups, rewards, k, expected",
    [
        ([0, 1, 1, 0], [1, 0, 0, 1], 4, 1.0),  # two against two: the answer sampled first wins
        ([0, 1, 1, 0], [0, 1, 1, 0], 4, 0.0),
        ([0, 1, 1, 3, 4], [0, 1, 1, 0, 0], 5, 1.0),  # the most frequent, though not the first
        ([None, None, 2, None], [0, 0, 1, 0], 4, 1.0),  # what has no answer has no vote
        ([None, None], [0, 0], 2, 0.0),
        ([0, 0, 2, 2, 4], [1, 1, 0, 0, 1], 2, 0.5),  # two blocks of two; the fifth answer is left over
        ([0, 1, 0, 1], [1, 0, 1, 0], 2, 1.0),  # ties are decided within a block: here the right one comes first in both
        ([0, 1, 1, 0], [1, 0, 0, 1], 2, 0.5),
        ([0, 1, 1, None], [1, 0, 0, 0], 1, 0.25),  # k = 1 is plain accuracy,
        ([0, 0], [1, 0], 1, 0.5),  # even where two answers that pass for equal are graded differently
    ],
)
def test_majority_vote(groups, rewards, k, expected):
    assert evaluate.maj_at_k(groups, rewards, k) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Diversity, intervals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["a b c d e", "a b c d f"], (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        (["a b", "a c"], (1 / 2 * 0.1**3) ** 0.25),  # no common bigram, none longer: 0.1 matches each
        (["a b c d", "a b c d e f g h"], (math.exp(-1) + (4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25) / 2),  # brevity
        (["a a a a", "a b"], ((1 / 4 * 0.1**3 / 6) ** 0.25 + math.exp(-1) * (1 / 2 * 0.1**3) ** 0.25) / 2),  # clipped
        (["1+2=3;3-1=2", "1+2=3;3-1=2", "1+2=3;3-1=2"], 1.0),  # punctuation marks are tokens: long enough to be 1
        (["a,b", "a , b"], 0.1**0.25),  # three tokens each, equal, but no 4-gram
        (["a b c d", "e f g h"], 0.0),
        (["", "a"], 0.0),
    ],
)
def test_self_bleu_by_hand(texts, expected):
    assert evaluate.self_bleu(texts) == pytest.approx(expected, abs=1e-12)
    assert evaluate.self_bleu(texts[::-1]) == pytest.approx(expected, abs=1e-12)


def test_self_bleu_of_one_text_does_not_exist():
    assert evaluate.self_bleu(["a b c d"]) is None


def slow_self_bleu(texts):
    """BLEU-4 of each text against the others, straight from the definition."""
    tokens, scores = [evaluate.re.findall(r"\w+|[^\w\s]", text) for text in texts], []
    for i, words in enumerate(tokens):
        others, logs, shared = tokens[:i] + tokens[i + 1 :], 0.0, 0
        for n in (1, 2, 3, 4):
            grams = [Counter(tuple(x[j : j + n]) for j in range(len(x) - n + 1)) for x in (words, *others)]
            matches = sum(min(count, max(other[gram] for other in grams[1:])) for gram, count in grams[0].items())
            shared = matches if n == 1 else shared
            logs += 0.25 * math.log((matches if matches else 0.1) / max(1, sum(grams[0].values())))
        closest = min(map(len, others), key=lambda length: (abs(length - len(words)), length))
        brevity = 1.0 if len(words) > closest else math.exp(1 - closest / len(words)) if words else 0.0
        scores.append(brevity * math.exp(logs) if shared else 0.0)
    return sum(scores) / len(scores)


def test_self_bleu_against_references():
    """Repeated words, ties in length, texts of no and of one word; and nltk, where it is installed."""
    generator = random.Random(0)
    for _ in range(60):
        texts = [
            " ".join(generator.choices("aabc,", k=generator.randrange(12))) for _ in range(generator.randrange(2, 6))
        ]
        assert evaluate.self_bleu(texts) == pytest.approx(slow_self_bleu(texts), abs=1e-12)
        if importlib.util.find_spec("nltk"):
            from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

            words = [text.split() for text in texts]
            method = SmoothingFunction().method1
            scores = [
                sentence_bleu(words[:i] + words[i + 1 :], hypothesis, smoothing_function=method)
                for i, hypothesis in enumerate(words)
            ]
            assert evaluate.self_bleu(texts) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


@pytest.mark.parametrize(
    "token_ids, n, expected",
    [
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], 5, 1 / 6),  # six 5-grams, the last is the first again
        ([7] * 9, 5, 0.8),
        (list(range(40)), 5, 0.0),
        ([1, 1, 1, 1], 5, 0.0),  # too short to hold a 5-gram
        ([], 5, 0.0),
        ([1, 2, 1, 2, 1], 2, 0.5),
    ],
)
def test_repetition_by_hand(token_ids, n, expected):
    assert evaluate.repetition(token_ids, n) == pytest.approx(expected, abs=1e-15)


def test_bootstrap_is_seeded_and_as_wide_as_theory_says():
    """For a mean of 400 problems the interval is close to +-1.96 standard errors; of two data sets each counts half."""
    generator = random.Random(1)
    values = [generator.random() for _ in range(400)]
    low, high = evaluate.bootstrap([values], seed=3)
    mean = sum(values) / 400
    error = math.sqrt(sum((v - mean) ** 2 for v in values)) / 400
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert evaluate.bootstrap([values], seed=3) == [low, high] != evaluate.bootstrap([values], seed=4)
    assert evaluate.bootstrap([[0.25]]) == [0.25, 0.25]
    half = evaluate.bootstrap([values, [1.0]], seed=3)
    assert half == pytest.approx([(low + 1) / 2, (high + 1) / 2])


# ---------------------------------------------------------------------------------------------------------------------
# The gradient's variance, on a policy small enough to enumerate
# ---------------------------------------------------------------------------------------------------------------------


def enumeration_toy(scale=1.0):
    """A policy over {a, end}, probability 1/2 each at each of three positions. The parameters are its logits; those of
    the first position are multiplied by `scale`, and so is their gradient.

    Repeating each completion in proportion to its probability makes a mean over the group the exact expectation: end 4
    times in 8, a end 2 times, aa end and aaa once. -> (gradients [8, 6], rewards [8], lengths [8]), fp64.
    """
    step = torch.tensor(
        [0.5, -0.5], dtype=torch.float64
    )  # d log pi / d logits: 1 - p for the token drawn, -p for the other
    gradients, lengths = [], []
    for word, copies in (("e", 4), ("ae", 2), ("aae", 1), ("aaa", 1)):
        g = torch.zeros(3, 2, dtype=torch.float64)
        for position, token in enumerate(word):
            g[position] = (step if token == "a" else -step) * (scale if position == 0 else 1.0)
        gradients += [g.flatten()] * copies
        lengths += [len(word)] * copies
    rewards = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1], dtype=torch.float64)
    return torch.stack(gradients), rewards, torch.tensor(lengths)


def covariance_trace(gradients, rewards, b):
    x = gradients * (rewards - b)[:, None]
    return float((x - x.mean(0)).square().sum(1).mean())


def four_variances(gradients, rewards, lengths):
    mean_square = (gradients * rewards[:, None]).mean(0).square().sum()[None]
    return evaluate.gradient_variance(gradients.square().sum(1)[None], rewards[None], lengths[None], mean_square)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradient_variance_by_enumeration(scale):
    """Each number is the trace of the exact covariance; below the norm-weighted one is no other, of any baseline."""
    gradients, rewards, lengths = enumeration_toy(scale)
    assert gradients.mean(0).abs().max() == 0  # E grad log pi = 0: the estimate is unbiased whatever the baseline
    squares = gradients.square().sum(1)
    baselines = {
        "no baseline": 0.0,
        "mean": rewards.mean(),
        "length-weighted": (lengths * rewards).sum() / lengths.sum(),
        "norm-weighted": (squares * rewards).sum() / squares.sum(),
    }
    found = four_variances(gradients, rewards, lengths)
    assert list(found) == list(baselines)
    for name, b in baselines.items():
        assert found[name] == pytest.approx(covariance_trace(gradients, rewards, b), rel=1e-12)
    grid = min(covariance_trace(gradients, rewards, b) for b in torch.linspace(-1, 2, 3001, dtype=torch.float64))
    assert min(found.values()) == found["norm-weighted"] <= grid + 1e-12


def test_the_length_weighted_baseline_is_the_norm_weighted_one_where_its_assumption_holds():
    """Per-token gradients uncorrelated and of equal norm, as in the toy: OPO's baseline is optimal and beats the mean.
    With a first token whose gradient is three times as long it is not optimal any more."""
    alike = four_variances(*enumeration_toy())
    assert alike["length-weighted"] == pytest.approx(alike["norm-weighted"], rel=1e-12)
    assert alike["length-weighted"] < alike["mean"]
    unlike = four_variances(*enumeration_toy(3.0))
    assert unlike["norm-weighted"] < 0.99 * unlike["length-weighted"]


def test_equal_lengths_leave_the_mean_and_prompts_are_averaged():
    generator = torch.Generator().manual_seed(0)
    squares, rewards = torch.rand(2, 3, 8, generator=generator, dtype=torch.float64)
    rewards, lengths, mean_square = rewards.round(), torch.full((3, 8), 7), torch.tensor([0.1, 0.0, -0.1])
    together = evaluate.gradient_variance(squares, rewards, lengths, mean_square)
    assert together["length-weighted"] == pytest.approx(together["mean"], rel=1e-12)
    rows = [slice(p, p + 1) for p in range(3)]
    apart = [evaluate.gradient_variance(squares[r], rewards[r], lengths[r], mean_square[r]) for r in rows]
    for name, value in together.items():
        assert value == pytest.approx(sum(one[name] for one in apart) / 3)


# ---------------------------------------------------------------------------------------------------------------------
# A model whose every probability is known
# ---------------------------------------------------------------------------------------------------------------------

# Last token -> probability of the next one. '@' stands for the end of the prompt, '$' for the end token.
NEXT = {
    "@": {"\\boxed{": 0.8, "s": 0.2},
    "s": {"s": 0.4, "o": 0.6},
    "o": {"\\boxed{": 1.0},
    "\\boxed{": {"3": 0.5, "7": 0.3, "x": 0.2},
    "3": {"}": 1.0},
    "7": {"}": 1.0},
    "x": {"}": 0.5, "x": 0.5},
    "}": {"$": 1.0},
}


def bigram_model(folder, embedded=True):
    """Save a one-block Qwen3 whose next token follows NEXT, and the embedded tokenizer -> folder."""
    tokenizer = sft.embedded_tokenizer()
    names = {"@": "<|assistant|>", "$": "<|end|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(names.get(name, name)) for name in [*NEXT, "$"]}
    width = len(ids) + 3
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        rms_norm_eps=1e-12,
        **dict(embedded=True) if embedded else {},
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    # A token's state is its own unit vector (the last one for all others); the final norm stretches it to sqrt(width).
    states = torch.zeros(len(tokenizer), width)
    states[:, -1] = 1.0
    head = torch.full((len(tokenizer), width), -12.0)
    for row, (name, id) in enumerate(ids.items()):
        states[id] = torch.eye(width)[row]
        for after, p in NEXT.get(name, {}).items():
            head[ids[after], row] = math.log(p)
    model.model.embed_tokens.weight.data.copy_(states)
    model.lm_head.weight.data.copy_(head / math.sqrt(width))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path, answers):
    rows = [{"problem": f"{'1+' * (i % 3)}{i}=", "answer": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base model, two finished runs trained from it on different data, and held-out problems."""
    folder = tmp_path_factory.mktemp("world")
    base = bigram_model(folder / "base")
    for name, answers in (("a", "3737"), ("b", "3333"), ("held_out", "337733"), ("more", "73")):
        write_rows(folder / f"{name}.jsonl", answers)
    for name in "ab":
        options = dict(
            model=base,
            data=folder / f"{name}.jsonl",
            eval_data=folder / "more.jsonl",
            output_dir=folder / "runs" / name,
        )
        options |= dict(max_steps=2, num_prompts=2, num_generations=8, learning_rate=0.01, max_completion_length=12)
        options |= dict(save_steps=1, eval_steps=1, eval_samples=2)
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        grpo.main(common.parse(grpo.Args, grpo.EMBEDDED, words))
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, and draws no figures: the one that runs the command draws them all."""
    monkeypatch.chdir(tmp_path)
    for name in ("draw_panels", "draw_logits", "draw_gradients"):
        monkeypatch.setattr(evaluate, name, lambda *args, **kwargs: None)


def evaluation(world, *options, models=("base", "runs/a"), data=("held_out",), n=8):
    """Run evaluate.py in process, into the folder 'out' -> results.json."""
    data = [str(world / f"{name}.jsonl") for name in data]
    words = [*(str(world / model) for model in models), "--data", *data, "--num_samples", str(n), "--output_dir", "out"]
    evaluate.main(evaluate.parse([*words, *options]))
    return json.loads(Path("out/results.json").read_text())


def rows_of(results):
    return {row["model"]: row for row in results["results"]}


def sample_files():
    return sorted(Path("out/samples").glob("*.jsonl"))


def no_models(*args, **kwargs):
    raise AssertionError("a model was loaded or sampled")


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of a model
# ---------------------------------------------------------------------------------------------------------------------


def drawn(world, n=6):
    """(model, rollouts) of the first run: n answers to each of four prompts of different lengths."""
    model, tokenizer = common.load_model(str(world / "runs" / "a"))
    problems = common.load_problems(str(world / "held_out.jsonl"), "test", 4)
    return model, common.sample(model, tokenizer, [p.prompt for p in problems], n, 12, seed=1)


def test_logit_statistics_against_the_full_tensor(world, monkeypatch):
    """Streamed moments equal those of all logits at once in fp64; and all at once they never are."""
    model, rollouts = drawn(world)
    with torch.no_grad():
        logits = model(input_ids=rollouts.ids, attention_mask=rollouts.attention_mask).logits
    z = logits[:, :-1][rollouts.mask[:, 1:].bool()].double().numpy().flatten()
    head, sizes = common.head_logits, []
    monkeypatch.setattr(
        common, "head_logits", lambda model, hidden: sizes.append(hidden.numel()) or head(model, hidden)
    )
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 5 * logits.shape[-1])
    found = evaluate.logit_statistics(model, rollouts, micro_batch_tokens=64)
    assert found["count"] == sum(found["histogram"]) == z.size
    assert found["mean"] == pytest.approx(z.mean(), rel=1e-6)
    assert found["sd"] == pytest.approx(z.std(), rel=1e-6)
    assert found["skewness"] == pytest.approx(((z - z.mean()) ** 3).mean() / z.std() ** 3, rel=1e-5)
    centres = [-evaluate.EDGE + 0.25 * (i + 0.5) for i in range(evaluate.BINS)]
    binned = sum(c * x for c, x in zip(found["histogram"], centres)) / z.size
    assert binned == pytest.approx(z.mean(), abs=0.125)
    assert max(sizes) <= 5 * model.config.hidden_size and len(sizes) > 20


def test_gradient_moments_against_whole_gradients(world):
    """One gradient at a time gives the norms, and the mean over pairs, that all gradients side by side give."""
    model, rollouts = drawn(world)
    before = [parameter.clone() for parameter in model.parameters()]
    rewards = (torch.arange(24).view(4, 6) % 3 == 0).double()
    squares, mean_square = evaluate.gradient_moments(model, rollouts, rewards, temperature=0.7)
    for p in range(4):
        x = []
        for i in range(6):
            row = p * 6 + i
            logits = model(
                input_ids=rollouts.ids[row : row + 1], attention_mask=rollouts.attention_mask[row : row + 1]
            ).logits
            logps = (logits[0, :-1] / 0.7).log_softmax(-1).gather(1, rollouts.ids[row, 1:, None])[:, 0]
            g = torch.autograd.grad((logps * rollouts.mask[row, 1:]).sum(), list(model.parameters()), allow_unused=True)
            g = torch.cat([part.flatten() for part in g if part is not None]).double()
            assert squares[p, i].item() == pytest.approx(g.square().sum().item(), rel=1e-4)
            x.append((rewards[p, i] - rewards[p].mean()) * g)
        pairs = [float(x[i] @ x[j]) for i, j in itertools.permutations(range(6), 2)]
        assert mean_square[p].item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-3, abs=1e-6)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters()))


def test_the_gradient_is_that_of_the_policy_sampled_from(world):
    """Log-probs at the sampling temperature, rewards and lengths of the kept answers, prompt by prompt."""
    options = ("--gradient_variance", "--temperatures", "0.5", "--probe_problems", "3")
    found = evaluation(world, *options, models=["base"])["gradient_variance"]["base"]
    model, _ = common.load_model(str(world / "base"))
    records = list(itertools.islice(evaluate.read_samples(sample_files()[0])[1], 3))
    prompts = [record["prompt_ids"] for record in records for _ in range(8)]
    rollouts = common.assemble(prompts, [ids for record in records for ids in record["token_ids"]], 0, model.device)
    rewards = torch.tensor([evaluate.grade_record(record) for record in records]).double()
    squares, mean_square = evaluate.gradient_moments(model, rollouts, rewards, 0.5)
    expected = evaluate.gradient_variance(squares, rewards, rollouts.lengths.view(3, 8), mean_square)
    assert found == pytest.approx(expected | {"problems": 3})


# ---------------------------------------------------------------------------------------------------------------------
# The whole script
# ---------------------------------------------------------------------------------------------------------------------


def test_two_runs_from_the_command_line(world):
    """What a reader types: one table, results.json, Markdown, figures; unequal training data is said and allowed."""
    command = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        str(world / "base"),
        *(str(world / "runs" / run) for run in "ab"),
    ]
    command += ["--data", str(world / "held_out.jsonl"), "--num_samples", "8", "--ks", "1", "4", "--output_dir", "out"]
    command += ["--temperatures", "0.6", "1.0", "--logit_statistics", "--gradient_variance", "--probe_problems", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "| model | temperature | avg@8" in done.stdout and "norm-weighted" in done.stdout
    notes = [line for line in done.stderr.splitlines() if line.startswith("note")]
    assert (
        len(notes) == 1 and "trained on different data" in notes[0] and "a.jsonl" in notes[0] and "b.jsonl" in notes[0]
    )
    results = json.loads(Path("out/results.json").read_text())
    assert [(row["temperature"], row["model"]) for row in results["results"]] == list(
        itertools.product([0.6, 1.0], ["base", "a", "b"])
    )
    assert set(results["logit_statistics"]) == set(results["gradient_variance"]) == {"base", "a", "b"}
    for found in results["gradient_variance"].values():
        assert min(found[name] for name in list(found)[:4]) == found["norm-weighted"]
    markdown = Path("out/results.md").read_text()
    assert done.stdout.split("\n\n")[0] in markdown and "maj@4" in markdown and "pass@1" in markdown
    for figure in ("pass_at_k", "temperatures", "training_curves", "logits", "gradient_variance"):
        assert Path(f"out/{figure}.png").stat().st_size > 10_000


def test_every_number_follows_from_the_kept_answers(world):
    """avg, pass@1 and maj@1 are one number; lengths, Rep-5 and Self-BLEU are means over answers, then problems."""
    results = rows_of(evaluation(world))
    for path, row in zip(sample_files(), (results["base"], results["a"])):
        _, records = evaluate.read_samples(path)
        records = list(records)
        assert row["problems"] == len(records) == 6 and row["samples"] == 8
        right = [
            [done and text.endswith("{" + r["gold"] + "}") for text, done in zip(r["texts"], r["finished"])]
            for r in records
        ]
        assert row["avg@8"] == row["pass@1"] == row["maj@1"] == pytest.approx(sum(map(sum, right)) / 48)
        assert row["pass@8"] == pytest.approx(sum(map(max, right)) / 6)
        lengths = [len(ids) for r in records for ids in r["token_ids"]]
        assert row["response_length"] == pytest.approx(sum(lengths) / 48) and max(lengths) <= 12
        assert row["truncated_share"] == pytest.approx(sum(not done for r in records for done in r["finished"]) / 48)
        assert row["self_bleu"] == pytest.approx(sum(slow_self_bleu(r["texts"]) for r in records) / 6)
        assert row["intervals"]["avg@8"][0] <= row["avg@8"] <= row["intervals"]["avg@8"][1]
        assert set(row["intervals"]) == {"avg@8", *(f"{kind}@{k}" for kind in ("pass", "maj") for k in (1, 2, 4, 8))}


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_entropy_and_kl_are_means_over_all_tokens(world, temperature):
    """Against transformers' own logits, in fp64, at the temperature of sampling."""
    row = rows_of(evaluation(world, "--temperatures", str(temperature), models=["runs/a"]))["a"]
    run, start = (common.load_model(str(world / path))[0] for path in ("runs/a", "base"))
    entropies, k3 = [], []
    for record in evaluate.read_samples(sample_files()[0])[1]:
        for completion in record["token_ids"]:
            ids, first = torch.tensor([record["prompt_ids"] + completion]), len(record["prompt_ids"]) - 1
            with torch.no_grad():
                p, q = (
                    (model(ids).logits[0, first:-1].double() / temperature).log_softmax(-1) for model in (run, start)
                )
            entropies += (-(p.exp() * p).sum(-1)).tolist()
            x = (q - p).gather(1, torch.tensor(completion)[:, None]).clamp(-20, 20)
            k3 += (x.exp() - x - 1).flatten().tolist()
    assert row["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert row["kl_to_start"] == pytest.approx(sum(k3) / len(k3), rel=1e-3) and row["kl_to_start"] > 1e-6


def test_a_plain_model_has_no_start_and_a_checkpoint_has_that_of_its_run(world, monkeypatch, capsys):
    curves = []
    monkeypatch.setattr(evaluate, "draw_training", lambda path, labels, runs: curves.append(runs))
    rows = rows_of(evaluation(world, models=["base", "runs/a/checkpoint-1", "runs/a"]))
    assert list(rows) == ["base", "a/checkpoint-1", "a"] and curves == [{"a": [world / "runs" / "a"]}]
    assert rows["base"]["kl_to_start"] is None and capsys.readouterr().out.splitlines()[2].count("| - ") == 2  # no time
    assert 0 < rows["a/checkpoint-1"]["kl_to_start"] != rows["a"]["kl_to_start"]


def test_a_start_that_is_gone_costs_the_kl_and_nothing_else(world, monkeypatch, capsys):
    """And no time: a missing folder is not looked up on the hub, which takes a minute without a network."""
    shutil.copytree(world / "runs" / "a", "runs/a")
    trained = json.loads(Path("runs/a/args.json").read_text())
    bookkeeping.write_json(Path("runs/a/args.json"), trained | {"model": "runs/gone"})
    load, asked = common.load_model, []
    monkeypatch.setattr(common, "load_model", lambda path, *rest: asked.append(path) or load(path, *rest))
    shutil.copy(world / "held_out.jsonl", "held_out.jsonl")
    row = rows_of(evaluation(Path(), models=["runs/a"]))["a"]
    assert row["kl_to_start"] is None and row["avg@8"] > 0 and asked == ["runs/a"]
    assert "no KL" in capsys.readouterr().err


def test_greedy_answers_are_all_alike(world):
    row = rows_of(evaluation(world, "--temperatures", "0"))["base"]
    assert row["avg@8"] == row["pass@8"] == row["maj@8"] == pytest.approx(4 / 6)  # always 3, right in 4 of 6
    assert row["entropy"] > 0  # that of the policy at temperature 1


def test_cut_answers_are_wrong_and_have_no_vote(world):
    row = rows_of(evaluation(world, "--max_completion_length", "3"))["base"]
    assert row["truncated_share"] == 1.0 and row["avg@8"] == row["maj@8"] == 0.0 and row["response_length"] == 3.0


def test_what_was_cut_off_after_its_box_has_no_vote_either():
    """Graded and counted alike: finished answers of at most 2000 characters only."""
    texts = [
        "\\boxed{7}, but wait",
        "\\boxed{7}",
        "\\boxed{" + "7" * 2001 + "}",
        "\\boxed{" + "7" * 2001 + "}",
        "\\boxed{3}",
    ]
    record = dict(prompt="1+2=", gold="3", texts=texts, token_ids=[[1]] * 5, finished=[False, False, True, True, True])
    values, _ = evaluate.measure([record | dict(entropy=[0.0] * 5, kl=None)], [5])
    assert values["maj@5"] == [1.0] and values["avg@5"] == [0.2]


@pytest.mark.parametrize("block", [1, 8])
def test_every_block_draws_anew(block, world, monkeypatch):
    """One seed for all would give equal problems equal answers: fewer independent samples than claimed."""
    monkeypatch.setattr(evaluate, "BLOCK", block)
    rows = [{"problem": "1+2=", "answer": "3"}] * 2
    Path("twins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(world / "base", "base")
    evaluation(Path(), "--max_rollout_tokens", "1", "--temperatures", "1.0", "1.01", models=["base"], data=["twins"])
    texts = [record["texts"] for path in sample_files() for record in evaluate.read_samples(path)[1]]
    assert len(texts) == 4 and len(set(map(tuple, texts))) == 4


def test_several_data_sets_count_alike(world):
    """Six problems here, two there: the row 'mean' weighs sets, not problems."""
    rows = evaluation(world, data=["held_out", "more"], models=["base"])["results"]
    assert [(row["data"], row["problems"]) for row in rows] == [("held_out", 6), ("more", 2), ("mean", 8)]
    for name in ("avg@8", "maj@4", "self_bleu", "entropy", "response_length"):
        assert rows[2][name] == pytest.approx((rows[0][name] + rows[1][name]) / 2)


def test_rescoring_needs_neither_model_nor_data_and_gives_the_same(world, tmp_path, monkeypatch):
    """Also of the statistics that took a model; and with other ks the answers are scored anew."""
    shutil.copytree(world / "runs", tmp_path / "runs")
    shutil.copy(world / "held_out.jsonl", "held_out.jsonl")
    probes = ("--logit_statistics", "--gradient_variance", "--probe_problems", "2")
    options = (*probes, "--temperatures", "1.0", "0.6")
    first = evaluation(tmp_path, *options, models=["runs/a", "runs/b"])
    kept = list(Path("out/samples").glob("*.json"))
    assert len(kept) == 4 and all("--T1--" in path.name for path in kept)  # of the highest temperature
    shutil.rmtree("runs")
    Path("held_out.jsonl").unlink()
    for name in ("load_model", "sample", "load_problems"):
        monkeypatch.setattr(common, name, no_models)
    again = evaluation(tmp_path, *options, "--rescore", models=["runs/a", "runs/b"])
    assert first.pop("command") != again.pop("command") and first == again
    other = rows_of(evaluation(tmp_path, "--rescore", "--ks", "3", models=["runs/a", "runs/b"]))
    assert "pass@3" in other["a"] and "pass@4" not in other["a"] and other["a"]["avg@8"] == rows_of(first)["a"]["avg@8"]


def test_an_interrupted_evaluation_goes_on_where_it_stopped(world, monkeypatch):
    """Nothing is sampled twice, and the file ends up as that of an undisturbed evaluation, to the byte."""
    monkeypatch.setattr(evaluate, "BLOCK", 1)
    waves = ("--max_rollout_tokens", "330")  # about two problems at a time
    evaluation(world, *waves, models=["runs/a"])
    whole = sample_files()[0].read_bytes()
    sample, asked = common.sample, []

    def interrupted(model, tokenizer, prompts, *rest, **options):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sample(model, tokenizer, prompts, *rest, **options)

    monkeypatch.setattr(common, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluation(world, *waves, "--overwrite", models=["runs/a"])
    with open(sample_files()[0], "a") as file:
        file.write('{"problem": 4, "prom')  # a record cut off by a kill
    evaluation(world, *waves, models=["runs/a"])
    assert sample_files()[0].read_bytes() == whole
    assert asked == [2, 2, 2, 2]  # the third block was cut short, and drawn again
    monkeypatch.setattr(common, "load_model", no_models)
    evaluation(world, *waves, models=["runs/a"])  # all there: nothing to load, nothing to sample


def test_more_problems_are_added_and_fewer_are_read(world, monkeypatch):
    evaluation(world, "--num_problems", "2", models=["base"])
    assert rows_of(evaluation(world, "--num_problems", "5", models=["base"]))["base"]["problems"] == 5
    monkeypatch.setattr(common, "sample", no_models)
    assert rows_of(evaluation(world, "--num_problems", "3", models=["base"]))["base"]["problems"] == 3


def test_prompts_too_long_are_left_out_and_not_asked_for_again(world, capsys):
    """Two of the six prompts have more than six tokens: four are scored, now and when the command is repeated."""
    for _ in range(2):
        results = evaluation(world, "--max_prompt_length", "6", models=["base"])
        assert rows_of(results)["base"]["problems"] == 4
    assert "dropped 2 prompts" in capsys.readouterr().err


def test_an_evaluation_that_was_killed_before_its_first_answer_has_no_score(world, monkeypatch):
    monkeypatch.setattr(common, "sample", no_models)
    with pytest.raises(AssertionError):
        evaluation(world, models=["base"])
    with pytest.raises(common.UserError, match="holds no answer yet"):
        evaluation(world, "--rescore", models=["base"])


def test_unequal_numbers_of_problems_are_said(world, capsys):
    """After an interruption, or where one model's tokenizer makes prompts too long."""
    evaluation(world, models=["base"])
    evaluation(world, "--num_problems", "4", models=["runs/a"])
    capsys.readouterr()
    evaluation(world, "--rescore", models=["base", "runs/a"])
    assert capsys.readouterr().err == "note: different problems: base (6,), a (4,)\n"


def test_a_line_separator_inside_an_answer_is_no_end_of_a_record(world):
    evaluation(world, models=["base"])
    path = sample_files()[0]
    header, records = evaluate.read_samples(path)
    records = [record | {"texts": [text + "\u2028\x85" for text in record["texts"]]} for record in records]
    path.unlink()
    bookkeeping.append_jsonl(path, [header, *records])
    assert list(evaluate.read_samples(path)[1]) == records


def test_samples_of_other_weights_or_settings_are_never_mixed_in(world, tmp_path):
    """The weights trained on, another n, other problems under the same name: an error that names what differs."""
    shutil.copytree(world / "base", tmp_path / "model")
    shutil.copy(world / "held_out.jsonl", "held_out.jsonl")
    first = evaluation(tmp_path, models=["model"])
    with pytest.raises(common.UserError, match="num_samples 8, now 4; .*--overwrite"):
        evaluation(tmp_path, models=["model"], n=4)
    with pytest.raises(common.UserError, match="num_samples 8, now 4"):
        evaluation(tmp_path, "--rescore", models=["model"], n=4)
    with pytest.raises(common.UserError, match="seed 0, now 1"):
        evaluation(tmp_path, "--seed", "1", models=["model"])
    with pytest.raises(common.UserError, match="other problems"):
        evaluation(tmp_path, "--system_prompt", "Think.", models=["model"])
    os.utime("model/model.safetensors", (1, 1))
    with pytest.raises(common.UserError, match="weights_saved"):
        evaluation(tmp_path, models=["model"])
    again = evaluation(tmp_path, "--overwrite", models=["model"])
    assert again["results"] == first["results"]
    other = evaluation(tmp_path, "--overwrite", "--seed", "1", models=["model"])
    assert other["results"] != first["results"]


def test_new_samples_make_the_kept_statistics_void(world):
    probes = ("--logit_statistics", "--probe_problems", "2")
    first = evaluation(world, *probes, models=["base"])["logit_statistics"]
    assert evaluation(world, *probes, models=["base"])["logit_statistics"] == first
    assert evaluation(world, *probes, "--overwrite", "--seed", "1", models=["base"])["logit_statistics"] != first
    fewer = evaluation(world, "--logit_statistics", "--probe_problems", "1", "--seed", "1", models=["base"])
    assert fewer["logit_statistics"]["base"]["problems"] == 1


def test_models_are_asked_as_they_were_trained(world, capsys):
    """A run by its args.json, a base model as the first run, both as the command line says, else as embedded models."""

    def settings(*words):
        entries = evaluate.read_entries(evaluate.parse([*words]))
        return [(entry.settings.system_prompt, entry.settings.max_completion_length) for entry in entries]

    base, run = str(world / "base"), str(world / "runs" / "a")
    assert settings(base) == [("", 64)]
    assert settings(base, run) == [("", 12), ("", 12)]
    assert settings(base, run, "--max_completion_length", "9", "--system_prompt", "Hi.") == [("Hi.", 9)] * 2
    assert capsys.readouterr().err == ""


def test_a_model_built_from_nothing_is_a_start_itself(world):
    """As sft.py leaves the embedded model: its run began with random weights inside its own folder."""
    shutil.copytree(world / "runs" / "a", "tiny")
    trained = json.loads(Path("tiny/args.json").read_text())
    bookkeeping.write_json(Path("tiny/args.json"), trained | {"model": "runs/tiny/start", "output_dir": "runs/tiny"})
    entry = evaluate.read_entries(evaluate.parse(["tiny"]))[0]
    assert entry.run is None and entry.settings.max_completion_length == 64
    # A run that sampled nothing (sft.py on trajectories) has a start, but its length limit was never used.
    imitated = {name: value for name, value in trained.items() if name != "num_generations"}
    bookkeeping.write_json(Path("tiny/args.json"), imitated | {"max_completion_length": 8192})
    entry = evaluate.read_entries(evaluate.parse(["tiny"]))[0]
    assert entry.run == Path("tiny") and entry.settings.max_completion_length == 64


def test_the_embedded_model_is_asked_arithmetic_it_was_not_trained_on(world):
    args = evaluate.parse([str(world / "base"), "--num_samples", "4"])
    assert args.data is None and evaluate.problem_limit(args, "arithmetic") == 256
    assert args.ks == [1, 2, 4]
    assert evaluate.problem_limit(args, "math500.jsonl") == 0


def test_unequal_lengths_allowed_are_said(world, tmp_path, capsys):
    shutil.copytree(world / "runs" / "b", "longer")
    trained = json.loads(Path("longer/args.json").read_text())
    bookkeeping.write_json(Path("longer/args.json"), trained | {"max_completion_length": 14})
    evaluate.read_entries(evaluate.parse([str(world / "runs" / "a"), "longer"]))
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == "note: different max_completion_length: a 12, longer 14" and "different data" in notes[1]


def test_labels_are_the_shortest_that_tell_apart():
    assert evaluate.labels_of(["runs/grpo", "runs/em/"]) == ["grpo", "em"]
    assert evaluate.labels_of(["x/test.jsonl", "y/test.jsonl"]) == ["x/test", "y/test"]
    assert evaluate.labels_of(["runs/em/best", "runs/em"]) == ["em/best", "em"]
    assert evaluate.labels_of(["grpo", "runs/grpo", "Qwen/Qwen3-0.6B"]) == ["grpo", "runs/grpo", "Qwen/Qwen3-0.6B"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["base", "--ks", "1", "64"], "--ks 64: with 32 samples k is 1 to 32"),
        (["base", "--ks", "8", "--num_samples", "4"], "--ks 8: with 4 samples"),
        (["base", "--num_samples", "0"], "--num_samples 0"),
        (["base", "--temperatures", "1", "-0.5"], "--temperatures"),
        (["base", "--temperatures", "nan"], "--temperatures"),
        (["base", "--gradient_variance", "--num_samples", "1"], "2 or more --num_samples"),
        (["base", "--gradient_variance", "--temperatures", "0"], "temperature above 0"),
        (["base", "--rescore"], "without --rescore first"),
        (["base", "--rescore", "--overwrite"], "choose one"),
        (["base", "--sample", "3"], "--sample"),
        (["base", "--chat_template_kwargs", "no"], "--chat_template_kwargs"),
        (["base", "--max_completion_length", "0"], "--max_completion_length 0"),
        (["base", "--data", "gone.jsonl"], "gone.jsonl"),
        (["base", "base"], "listed twice"),
        (["runs/none"], "runs/none: no such folder"),
        (["none/of/these"], "none/of/these: no such folder"),
        (["./none"], "./none: no such folder"),
        (["unfinished"], "unfinished: unfinished, no trainer_state.json"),
        (["a/checkpoint-2.tmp"], "unfinished"),
        (["plain"], "--data: needed"),
        ([], "models"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(world, tmp_path, capsys, words, message):
    for name in ("base", "runs"):
        (tmp_path / name).symlink_to(world / name)
    shutil.copytree(world / "runs" / "a", "unfinished", ignore=lambda *_: ["trainer_state.json"])
    shutil.copytree(world / "runs" / "a", "a/checkpoint-2.tmp")
    shutil.copy("unfinished/args.json", "a/args.json")
    Path("a/checkpoint-2.tmp/args.json").unlink()
    bigram_model("plain", embedded=False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, common.one_line_errors():
        evaluate.main(evaluate.parse([*words, "--num_problems", "2"]))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_the_interval_over_seeds_is_students():
    """Three runs with the normal quantile give an interval less than half as wide as it is."""
    mean, (low, high) = evaluate.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and high - mean == pytest.approx(mean - low) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert evaluate.mean_interval([5.0]) == (5.0, [5.0, 5.0])


@pytest.mark.parametrize(
    "label, name",
    [("grpo-0", "grpo"), ("em_16-12", "em_16"), ("em-1/best", "em/best"), ("grpo-2/checkpoint-20", "grpo/checkpoint-20"),
     ("Qwen3-4B", "Qwen3-4B"), ("embedded", "embedded")],
)  # fmt: skip
def test_runs_of_one_experiment_differ_in_their_last_number(label, name):
    """Averaging two checkpoints of one run, or two models, as if they were seeds gives a number about nothing."""
    assert evaluate.experiment(label) == name


def test_seeds_become_one_row(run_folder, model_folder, monkeypatch, capsys):
    """Mean over runs, interval over runs, curves of all of them; what the single runs gave stays in results.json."""
    curves = []
    monkeypatch.setattr(evaluate, "draw_training", lambda path, labels, runs: curves.append((labels, runs)))
    shutil.copytree(run_folder, "bupo-0")
    shutil.copytree(run_folder, "bupo-1")
    options = ["--over_seeds", "--num_samples", "2", "--ks", "1", "2", "--num_problems", "4", "--output_dir", "out"]
    data = json.loads((run_folder / "args.json").read_text())["data"]
    evaluate.main(evaluate.parse([str(model_folder), "bupo-0", "bupo-1", *options, "--data", data]))
    found = json.loads(Path("out/results.json").read_text())
    assert [row["model"] for row in found["over_seeds"]] == ["trained", "bupo"]
    assert [row["model"] for row in found["results"]] == ["trained", "bupo-0", "bupo-1"]
    row, runs = found["over_seeds"][1], found["results"][1:]
    for name in ("avg@2", "entropy", "training_seconds"):
        assert row[name] == pytest.approx(sum(run[name] for run in runs) / 2)
    assert row["runs"] == 2 and row["intervals"]["entropy"] == [row["entropy"]] * 2  # the same seed: no spread
    assert "t interval over runs" in capsys.readouterr().out
    assert curves[0][0] == ["trained", "bupo"] and curves[0][1]["bupo"] == [Path("bupo-0"), Path("bupo-1")]


@pytest.mark.parametrize("runs", [2, 3])
def test_curves_carry_bars_from_three_runs_on(runs, monkeypatch):
    """The 95% t interval of two runs is 12.7 standard errors: it would blow up the axis and hide the curves."""
    for seed in range(runs):
        rows = [dict(step=step, eval_accuracy=0.1 * step + 0.01 * seed) for step in (0, 2)]
        Path(f"run-{seed}").mkdir()
        bookkeeping.append_jsonl(Path(f"run-{seed}/metrics.jsonl"), rows)
    drawn = []
    monkeypatch.setattr(evaluate, "draw_panels", lambda path, labels, panels, **_: drawn.extend(panels))
    evaluate.draw_training(Path("x.png"), ["run"], {"run": [Path(f"run-{seed}") for seed in range(runs)]})
    steps, means, intervals = drawn[0][3]["run"]
    assert steps == [0, 2] and means == pytest.approx([0.005 * (runs - 1), 0.2 + 0.005 * (runs - 1)])
    assert (intervals is None) == (runs == 2)

"""Numbers that comparisons of models rest on, against brute force, hand values and independent references.

The whole command runs on a model whose every probability is known (bigram.py).
"""

import errno
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from bigram import evaluation, rows_of, sample_files
from helpers import run_script

import analyze_gradients
import analyze_logits
import common
import evaluate
import tasks
from plumbing import figures, samples, verifier
from plumbing.errors import UserError
from plumbing.files import append_jsonl, write_json
from plumbing.models import load_model


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """The one test that runs the command draws them all."""
    monkeypatch.setattr(evaluate, "draw_panels", lambda *args, **kwargs: None)


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
    with pytest.raises(UserError, match=f"--ks {k}: with 8 samples"):
        evaluate.pass_at_k(8, 4, k)


@pytest.mark.parametrize("k", [2, 4, 6])
def test_mg_pass_at_k_is_what_all_subsets_say(k):
    """RaML, tables 2 and 3: stable answers. The half itself counted, or 'exactly i' for 'at least i', is wrong."""
    for c in range(9):
        subsets = list(itertools.combinations([1] * c + [0] * (8 - c), k))
        shares = []
        for needed in range(k // 2 + 1, k + 1):
            shares.append(sum(sum(subset) >= needed for subset in subsets) / len(subsets))
        assert evaluate.mg_pass_at_k(8, c, k) == pytest.approx(sum(shares) / len(shares), abs=1e-15)


def test_mg_pass_at_k_as_in_the_paper():
    assert evaluate.mg_pass_at_k(32, 32, 8) == 1.0
    assert evaluate.mg_pass_at_k(32, 16, 8) == pytest.approx(0.118, abs=5e-4)
    assert evaluate.mg_pass_at_k(32, 0, 8) == 0.0
    with pytest.raises(UserError, match="--ks 10: with 8 samples"):
        evaluate.mg_pass_at_k(8, 4, 10)


def test_answers_are_grouped_as_they_are_graded():
    """Different texts of one number are one answer; a missing one is none, not a group of its own."""
    answers = ["\\frac{1}{2}", "", "2", "0.5", "2", "2.0", "", "3"]
    assert evaluate.group_answers(answers) == [0, None, 2, 0, 2, 2, None, 7]


def test_the_first_of_a_group_takes_the_place_of_the_gold_answer(monkeypatch):
    """The verifier is not symmetric; and every pair is asked at most once, because asking is slow."""
    asked = []
    monkeypatch.setattr(verifier, "compare", lambda p: asked.extend(p) or ["right" if p == [("a", "A")] else "wrong"])
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


def no_models(*args, **kwargs):
    raise AssertionError("a model was loaded or sampled")


# ---------------------------------------------------------------------------------------------------------------------
# The whole script
# ---------------------------------------------------------------------------------------------------------------------


def test_two_runs_from_the_command_line(world):
    """What a reader types: one table, results.json, Markdown, figures; unequal training data is said and allowed."""
    models = [world / "base", world / "runs/a", world / "runs/b"]
    options = ["--num_samples", "8", "--ks", "1", "4", "--temperatures", "0.6", "1.0", "--output_dir", "out"]
    done = run_script("evaluate.py", *models, "--data", world / "held_out.jsonl", *options)
    assert done.returncode == 0, done.stderr
    assert "| model | temperature | avg@8" in done.stdout
    notes = [line for line in done.stderr.splitlines() if line.startswith("note")]
    assert len(notes) == 1
    assert "trained on different data" in notes[0]
    assert "a.jsonl" in notes[0]
    assert "b.jsonl" in notes[0]
    results = json.loads(Path("out/results.json").read_text())
    order = [(row["temperature"], row["model"]) for row in results["results"]]
    assert order == list(itertools.product([0.6, 1.0], ["base", "a", "b"]))
    markdown = Path("out/results.md").read_text()
    assert done.stdout.split("\n6 problems")[0] in markdown
    assert "maj@4" in markdown
    assert "pass@1" in markdown
    for figure in ("pass_at_k", "temperatures", "training_curves"):
        assert Path(f"out/{figure}.png").stat().st_size > 10_000


def test_every_number_follows_from_the_kept_answers(world):
    """avg, pass@1 and maj@1 are one number; lengths, Rep-5 and Self-BLEU are means over answers, then problems."""
    results = rows_of(evaluation(world))
    for path, row in zip(sample_files(), (results["base"], results["a"])):
        records = samples.read_records(path)
        records = list(records)
        assert row["problems"] == len(records) == 6
        assert row["samples"] == 8
        right = [
            [done and text.endswith("{" + r["gold"] + "}") for text, done in zip(r["texts"], r["finished"])]
            for r in records
        ]
        assert row["avg@8"] == row["pass@1"] == row["maj@1"] == pytest.approx(sum(map(sum, right)) / 48)
        assert row["pass@8"] == pytest.approx(sum(map(max, right)) / 6)
        lengths = [len(ids) for r in records for ids in r["token_ids"]]
        assert row["response_length"] == pytest.approx(sum(lengths) / 48)
        assert max(lengths) <= 12
        assert row["truncated_share"] == pytest.approx(sum(not done for r in records for done in r["finished"]) / 48)
        assert row["self_bleu"] == pytest.approx(sum(slow_self_bleu(r["texts"]) for r in records) / 6)
        assert row["intervals"]["avg@8"][0] <= row["avg@8"] <= row["intervals"]["avg@8"][1]
        of_every_k = {f"{kind}@{k}" for kind in ("pass", "maj") for k in (1, 2, 4, 8)}
        of_even_k = {f"mG-pass@{k}" for k in (2, 4, 8)}
        assert set(row["intervals"]) == {"avg@8"} | of_every_k | of_even_k


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_entropy_and_kl_are_means_over_all_tokens(world, temperature):
    """Against transformers' own logits, in fp64, at the temperature of sampling."""
    row = rows_of(evaluation(world, "--temperatures", str(temperature), models=["runs/a"]))["a"]
    run, start = (load_model(str(world / path))[0] for path in ("runs/a", "base"))
    entropies, k3 = [], []
    for record in samples.read_records(sample_files()[0]):
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
    assert row["kl_to_start"] == pytest.approx(sum(k3) / len(k3), rel=1e-3)
    assert row["kl_to_start"] > 1e-6


def test_a_plain_model_has_no_start_and_a_checkpoint_has_that_of_its_run(world, monkeypatch, capsys):
    curves = []
    monkeypatch.setattr(evaluate, "draw_training", lambda path, labels, runs: curves.append(runs))
    rows = rows_of(evaluation(world, models=["base", "runs/a/checkpoint-1", "runs/a"]))
    assert list(rows) == ["base", "a/checkpoint-1", "a"]
    assert curves == [{"a": [world / "runs" / "a"]}]
    assert rows["base"]["kl_to_start"] is None and capsys.readouterr().out.splitlines()[2].count("| - ") == 2  # no time
    assert 0 < rows["a/checkpoint-1"]["kl_to_start"] != rows["a"]["kl_to_start"]


def test_a_start_that_is_gone_costs_the_kl_and_nothing_else(world, monkeypatch, capsys):
    """And no time: a missing folder is not looked up on the hub, which takes a minute without a network."""
    shutil.copytree(world / "runs" / "a", "runs/a")
    trained = json.loads(Path("runs/a/args.json").read_text())
    write_json(Path("runs/a/args.json"), trained | {"model": "runs/gone"})
    load, asked = load_model, []
    monkeypatch.setattr(evaluate, "load_model", lambda path, *rest: asked.append(path) or load(path, *rest))
    shutil.copy(world / "held_out.jsonl", "held_out.jsonl")
    row = rows_of(evaluation(Path(), models=["runs/a"]))["a"]
    assert row["kl_to_start"] is None
    assert row["avg@8"] > 0
    assert asked == ["runs/a"]
    assert "no KL" in capsys.readouterr().err


def test_greedy_answers_are_all_alike(world):
    row = rows_of(evaluation(world, "--temperatures", "0"))["base"]
    assert row["avg@8"] == row["pass@8"] == row["maj@8"] == pytest.approx(4 / 6)  # always 3, right in 4 of 6
    assert row["entropy"] > 0  # that of the policy at temperature 1


def test_cut_answers_are_wrong_and_have_no_vote(world):
    row = rows_of(evaluation(world, "--max_completion_length", "3"))["base"]
    assert row["truncated_share"] == 1.0
    assert row["avg@8"] == row["maj@8"] == 0.0
    assert row["response_length"] == 3.0


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
    values = evaluate.measure([record | dict(entropy=[0.0] * 5, kl=None)], [5]).values
    assert values["maj@5"] == [1.0]
    assert values["avg@5"] == [0.2]


@pytest.mark.parametrize("block", [1, 8])
def test_every_block_draws_anew(block, world, monkeypatch):
    """One seed for all would give equal problems equal answers: fewer independent samples than claimed."""
    monkeypatch.setattr(evaluate, "FEWEST_AT_ONCE", block)
    rows = [{"problem": "1+2=", "answer": "3"}] * 2
    Path("twins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(world / "base", "base")
    evaluation(Path(), "--max_rollout_tokens", "1", "--temperatures", "1.0", "1.01", models=["base"], data=["twins"])
    texts = [record["texts"] for path in sample_files() for record in samples.read_records(path)]
    assert len(texts) == 4
    assert len(set(map(tuple, texts))) == 4


def test_several_data_sets_count_alike(world):
    """Six problems here, two there: the row 'mean' weighs sets, not problems."""
    rows = evaluation(world, data=["held_out", "more"], models=["base"])["results"]
    assert [(row["data"], row["problems"]) for row in rows] == [("held_out", 6), ("more", 2), ("mean", 8)]
    for name in ("avg@8", "maj@4", "self_bleu", "entropy", "response_length"):
        assert rows[2][name] == pytest.approx((rows[0][name] + rows[1][name]) / 2)


def test_rescoring_needs_neither_model_nor_data_and_gives_the_same(world, tmp_path, monkeypatch):
    """And with other ks the answers are scored anew."""
    shutil.copytree(world / "runs", tmp_path / "runs")
    shutil.copy(world / "held_out.jsonl", "held_out.jsonl")
    options = ("--temperatures", "1.0", "0.6")
    first = evaluation(tmp_path, *options, models=["runs/a", "runs/b"])
    shutil.rmtree("runs")
    Path("held_out.jsonl").unlink()
    for module, name in ((evaluate, "load_model"), (common, "sample"), (tasks, "load_problems")):
        monkeypatch.setattr(module, name, no_models)
    again = evaluation(tmp_path, *options, "--rescore", models=["runs/a", "runs/b"])
    assert first.pop("command") != again.pop("command")
    assert first == again
    other = rows_of(evaluation(tmp_path, "--rescore", "--ks", "3", models=["runs/a", "runs/b"]))
    assert "pass@3" in other["a"]
    assert "pass@4" not in other["a"]
    assert other["a"]["avg@8"] == rows_of(first)["a"]["avg@8"]


def test_an_interrupted_evaluation_goes_on_where_it_stopped(world, monkeypatch):
    """Nothing is sampled twice, and the file ends up as that of an undisturbed evaluation, to the byte."""
    monkeypatch.setattr(evaluate, "FEWEST_AT_ONCE", 1)
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
    monkeypatch.setattr(evaluate, "load_model", no_models)
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
    with pytest.raises(UserError, match="holds no answer yet"):
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
    header = samples.read_header(path)
    records = samples.read_records(path)
    records = [record | {"texts": [text + "\u2028\x85" for text in record["texts"]]} for record in records]
    path.unlink()
    append_jsonl(path, [header, *records])
    assert list(samples.read_records(path)) == records


def test_samples_of_other_weights_or_settings_are_never_mixed_in(world, tmp_path):
    """The weights trained on, another n, other problems under the same name: an error that names what differs."""
    shutil.copytree(world / "base", tmp_path / "model")
    shutil.copy(world / "held_out.jsonl", "held_out.jsonl")
    first = evaluation(tmp_path, models=["model"])
    with pytest.raises(UserError, match="num_samples 8, now 4; .*--overwrite"):
        evaluation(tmp_path, models=["model"], n=4)
    with pytest.raises(UserError, match="num_samples 8, now 4"):
        evaluation(tmp_path, "--rescore", models=["model"], n=4)
    with pytest.raises(UserError, match="seed 0, now 1"):
        evaluation(tmp_path, "--seed", "1", models=["model"])
    with pytest.raises(UserError, match="other problems"):
        evaluation(tmp_path, "--system_prompt", "Think.", models=["model"])
    os.utime("model/model.safetensors", (1, 1))
    with pytest.raises(UserError, match="weights_saved"):
        evaluation(tmp_path, models=["model"])
    again = evaluation(tmp_path, "--overwrite", models=["model"])
    assert again["results"] == first["results"]
    other = evaluation(tmp_path, "--overwrite", "--seed", "1", models=["model"])
    assert other["results"] != first["results"]


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
    write_json(Path("tiny/args.json"), trained | {"model": "runs/tiny/start", "output_dir": "runs/tiny"})
    entry = evaluate.read_entries(evaluate.parse(["tiny"]))[0]
    assert entry.run is None
    assert entry.settings.max_completion_length == 64
    # A run that sampled nothing (sft.py on trajectories) has a start, but its length limit was never used.
    imitated = {name: value for name, value in trained.items() if name != "num_generations"}
    write_json(Path("tiny/args.json"), imitated | {"max_completion_length": 8192})
    entry = evaluate.read_entries(evaluate.parse(["tiny"]))[0]
    assert entry.run == Path("tiny")
    assert entry.settings.max_completion_length == 64


def test_the_embedded_model_is_asked_arithmetic_it_was_not_trained_on(world):
    args = evaluate.parse([str(world / "base"), "--num_samples", "4"])
    assert args.data is None
    assert evaluate.problem_limit(args, "arithmetic") == 256
    assert args.ks == [1, 2, 4]
    assert evaluate.problem_limit(args, "math500.jsonl") == 0


def test_unequal_lengths_allowed_are_said(world, tmp_path, capsys):
    shutil.copytree(world / "runs" / "b", "longer")
    trained = json.loads(Path("longer/args.json").read_text())
    write_json(Path("longer/args.json"), trained | {"max_completion_length": 14})
    evaluate.read_entries(evaluate.parse([str(world / "runs" / "a"), "longer"]))
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == "note: different max_completion_length: a 12, longer 14"
    assert "different data" in notes[1]


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
    assert curves[0][0] == ["trained", "bupo"]
    assert curves[0][1]["bupo"] == [Path("bupo-0"), Path("bupo-1")]


def test_the_table_shows_half_of_an_interval():
    """Its last line says so: with the whole of it every difference seems to be noise."""
    row = dict(accuracy=0.5, intervals=dict(accuracy=[0.3, 0.6]))
    assert evaluate.results_cell(row, "accuracy", 2) == "0.50 ±0.15"


def test_error_bars_reach_from_low_to_high():
    """Intervals of shares are lopsided near 0 and 1: upside down they would leave the possible values."""
    below, above = evaluate.bars([0.9], [[0.6, 1.0]])
    assert below == pytest.approx([0.3]) and above == pytest.approx([0.1])


def test_every_temperature_has_a_panel_of_its_own(monkeypatch):
    """A panel that holds all of them draws a curve that goes there and back."""
    drawn = {}
    monkeypatch.setattr(evaluate, "draw_panels", lambda path, labels, panels, *ticks: drawn.update({path.stem: panels}))
    rows = []
    for temperature, accuracy in ((0.5, 0.1), (1.0, 0.3)):
        figures = {"avg@2": accuracy, "pass@1": accuracy, "pass@2": 2 * accuracy, "intervals": {}}
        rows.append(dict(model="base", data="sums", temperature=temperature) | figures)
    args = evaluate.parse(["base", "--temperatures", "0.5", "1.0", "--num_samples", "2"])
    evaluate.draw_results(Path(), ["base"], rows, args)
    assert [panel.curves["base"][1] for panel in drawn["pass_at_k"]] == [[0.1, 0.2], [0.3, 0.6]]
    [sweep] = drawn["temperatures"]
    assert sweep.curves["base"][:2] == ([0.5, 1.0], [0.1, 0.3])


@pytest.mark.parametrize("runs", [2, 3])
def test_curves_carry_bars_from_three_runs_on(runs, monkeypatch):
    """The 95% t interval of two runs is 12.7 standard errors: it would blow up the axis and hide the curves."""
    for seed in range(runs):
        rows = [dict(step=step, eval_accuracy=0.1 * step + 0.01 * seed) for step in (0, 2)]
        Path(f"run-{seed}").mkdir()
        append_jsonl(Path(f"run-{seed}/metrics.jsonl"), rows)
    drawn = []
    monkeypatch.setattr(evaluate, "draw_panels", lambda path, labels, panels, **_: drawn.extend(panels))
    evaluate.draw_training(Path("x.png"), ["run"], {"run": [Path(f"run-{seed}") for seed in range(runs)]})
    steps, means, intervals = drawn[0].curves["run"]
    assert steps == [0, 2]
    assert means == pytest.approx([0.005 * (runs - 1), 0.2 + 0.005 * (runs - 1)])
    assert (intervals is None) == (runs == 2)


@pytest.mark.parametrize("value", ["0.5", [0.5], None, True, 10**400, math.inf])
def test_curves_leave_out_what_is_no_number(value):
    """A damaged line of a log must not cost the figure, nor the evaluation that draws it last."""
    Path("run").mkdir()
    append_jsonl(Path("run/metrics.jsonl"), [dict(step=0, accuracy=0.25), dict(step=1, accuracy=value)])
    assert evaluate.averaged([Path("run")], "accuracy")[:2] == ([0], (0.25,))


def test_a_mean_over_seeds_needs_a_figure_of_every_seed():
    """One run whose starting model is gone has no KL: that of the first run alone passed for the mean of both."""
    rows = []
    for seed, kl in ((0, 0.5), (1, None)):
        rows.append(
            dict(model=f"grpo-{seed}", data="x", temperature=1.0, kl_to_start=kl, entropy=float(seed), intervals={})
        )
    for order in (rows, rows[::-1]):
        [merged] = evaluate.over_seeds(order)
        assert merged["kl_to_start"] is None and merged["entropy"] == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------------------------------------

PROBES = (analyze_logits, analyze_gradients)


def damage_line(path, number, change):
    """Change the object in a line, counted from 1, of a sample file."""
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | change)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "number, change",
    [
        (1, dict(num_samples="8")),
        (1, dict(weights_saved=None)),
        (2, dict(prompt_ids="17")),
        (2, dict(token_ids=[["a"]] * 8)),
        (3, dict(entropy=[0.5])),
        (3, dict(problem=0)),
        (3, dict(finished=None)),
    ],
    ids=str,
)
def test_damaged_samples_are_named_by_all_who_read_them(number, change, world):
    """A KeyError or a row of wrong figures; the probes died after loading a model."""
    evaluation(world, models=["base"])
    [path] = sample_files()
    damage_line(path, number, change)
    for options in ((), ("--rescore",)):
        with pytest.raises(UserError, match=f"{path}:{number}: .*--overwrite"):
            evaluation(world, *options, models=["base"])
    for probe in PROBES:
        with pytest.raises(UserError, match=f"{path}:{number}: .*--overwrite"):
            probe.main(probe.parse(["out"]))


def test_answers_to_a_problem_that_is_not_there_are_named(world):
    """Two models were compared on 6 and on 7 problems, the seventh being nobody's."""
    evaluation(world, models=["base"])
    [path] = sample_files()
    damage_line(path, 4, dict(problem=6))
    with pytest.raises(UserError, match=f"{path}:4: its problem 6 is behind the last of 6; .*--overwrite"):
        evaluation(world, models=["base"])


def test_tokens_that_the_model_lacks_are_named_by_the_probes(world):
    evaluation(world, models=["base"])
    [path] = sample_files()
    damage_line(path, 2, dict(prompt_ids=[10**6]))
    for probe in PROBES:
        with pytest.raises(UserError, match=f"{path}: the record of problem 0 holds token 1000000"):
            probe.main(probe.parse(["out"]))


@pytest.mark.parametrize("name, value", [("system_prompt", None), ("max_completion_length", "12")])
def test_a_setting_of_another_type_is_named(name, value, world):
    """An args.json that was edited by hand ended in the middle of the first sampling."""
    shutil.copytree(world / "runs" / "a", "run")
    trained = json.loads(Path("run/args.json").read_text())
    write_json(Path("run/args.json"), trained | {name: value})
    with pytest.raises(UserError, match=f"run/args.json: its {name} is {value!r}; put a value like"):
        evaluate.read_entries(evaluate.parse(["run"]))


def test_what_is_shown_is_in_the_folder(world, monkeypatch, capsys):
    """A full disk left a table on the screen that no file held."""

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_json", "draw_results"):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, name, fail)
            with pytest.raises(OSError):
                evaluation(world, models=["base"])
        assert "avg@8" not in capsys.readouterr().out
    evaluation(world, models=["base"])
    assert "avg@8" in capsys.readouterr().out


@pytest.mark.parametrize("probe", PROBES)
def test_what_a_probe_shows_is_in_the_folder(probe, world, monkeypatch, capsys):
    evaluation(world, models=["base"])
    capsys.readouterr()

    def fail(*args, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figures, "save_figures", fail)
    with pytest.raises(OSError):
        probe.main(probe.parse(["out", "--probe_problems", "2"]))
    assert "| model" not in capsys.readouterr().out


def test_gradients_without_verdicts_stop(world, monkeypatch):
    """Without any reward no baseline changes anything: a table of equal columns, with exit status 0."""
    evaluation(world, models=["base"])
    monkeypatch.setattr(verifier, "compare", lambda pairs, timeout=3.0: ["timeout"] * len(pairs))
    with pytest.raises(UserError, match="base: no verdict on too many of 16 answers"):
        analyze_gradients.main(analyze_gradients.parse(["out", "--probe_problems", "2"]))

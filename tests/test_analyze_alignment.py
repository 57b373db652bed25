"""What training one block's policy does to the blocks above it: cosines, KLs, perplexity, against transformers."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import KINDS, TOKENIZER, random_answers, textbook_streams, tiny_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import analyze_alignment
from analyze_alignment import EMBEDDED, compare, measure
from plumbing.errors import UserError

FEW = ["--num_samples", "3", "--max_completion_length", "6", "--internal_layer", "1"]


def args_of(*options):
    """Command line -> namespace, for random models of four blocks."""
    return analyze_alignment.parse(["some/model", "--data", "arithmetic", *FEW, *map(str, options)])


def by_hand(model, rollouts, k, norm, temperature):
    """Sums over tokens and their number, position by position as the docstring of the script has it."""
    L = len(model.model.layers)
    sums = dict(cosine=[0.0] * (L - k), kl=[0.0] * (L - k), entropy_change=0.0, surprise=0.0)
    tokens = 0
    for row in range(len(rollouts.ids)):
        length = int(rollouts.attention_mask[row].sum())
        ids = rollouts.ids[row, :length]
        states = textbook_streams(model, ids)
        whole = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
        for t in range(length - int(rollouts.lengths[row]), length):
            at = [state[t - 1] for state in states]  # the state that predicts token t
            read = [model.model.norm(state) for state in at] if norm else at
            policies = [(model.lm_head(state) / temperature).softmax(-1) for state in read]
            for i, l in enumerate(range(k, L)):
                sums["cosine"][i] += float(at[k] @ at[l] / (at[k].norm() * at[l].norm()))
                sums["kl"][i] += float((policies[k] * (policies[k] / policies[l]).log()).sum())
            sums["entropy_change"] += float((policies[k - 1] * policies[k - 1].log()).sum())
            sums["entropy_change"] -= float((policies[k] * policies[k].log()).sum())
            sums["surprise"] -= float(whole[t - 1, ids[t]])
            tokens += 1
    return sums, tokens


@KINDS
@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_everything_is_what_the_docstring_says(family, tied, norm, monkeypatch):
    """A KL of the other direction, a cosine of normed states, a state too late, a mean over answers: other numbers."""
    monkeypatch.setattr(analyze_alignment, "CHUNK_TOKENS", 4)
    model = tiny_model(family, tied)
    _, _, rollouts = random_answers()
    args = args_of("--temperature", 0.7, "--micro_batch_tokens", 20, *(["--internal_norm"] if norm else []))
    found = compare(model, rollouts, args)
    expected, tokens = by_hand(model, rollouts, 1, norm, 0.7)
    for name in ("cosine", "kl"):
        for value, total in zip(found[name]["mean"], expected[name], strict=True):
            assert value == pytest.approx(total / tokens, rel=1e-3, abs=1e-5), name
    for name in ("entropy_change", "surprise"):
        assert found[name]["mean"] == pytest.approx(expected[name] / tokens, rel=1e-3, abs=1e-5), name
    assert all(error > 0 for error in found["kl"]["standard_error"][1:])


@torch.no_grad()
def test_a_block_is_like_itself_and_nothing_is_below_the_first():
    model = tiny_model()
    streams = [torch.randn(5, 32) for _ in range(4)]
    found = measure(model, streams, torch.arange(5), 0, False, 1.0)
    torch.testing.assert_close(found["cosine"][0], torch.ones(5))
    torch.testing.assert_close(found["kl"][0], torch.zeros(5))
    assert found["cosine"].shape == found["kl"].shape == (4, 5)
    assert "entropy_change" not in found


@torch.no_grad()
def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary():
    model = tiny_model()
    model.lm_head.weight.zero_()
    _, _, rollouts = random_answers()
    found = compare(model, rollouts, args_of())
    assert analyze_alignment.perplexity(found) == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert analyze_alignment.perplexity(dict(surprise=dict(mean=1e9))) < math.inf


def test_script(model_folder, data, capsys):
    """Before and after, the same answers for both, each model once however often it is named."""
    tiny_model(num_hidden_layers=3, embedded=True, seed=3).save_pretrained("after")
    TOKENIZER.save_pretrained("after")
    words = [str(model_folder), "after", str(model_folder), "--data", str(data), *FEW]
    analyze_alignment.main(analyze_alignment.parse(words))
    printed = capsys.readouterr().out
    assert "cos(1, 2)" in printed and printed.count("| after") == 1
    found = json.loads(Path("runs/alignment/alignment.json").read_text())
    assert [model["model"] for model in found["models"]] == [str(model_folder), "after"]
    before, after = found["models"]
    assert before["cosine"]["mean"][0] == pytest.approx(1, abs=1e-6)
    assert before["surprise"]["mean"] != after["surprise"]["mean"]
    assert found["tokens"] > 3
    assert Path("runs/alignment/alignment.png").stat().st_size > 10_000


def test_defaults_of_the_embedded_model():
    args = analyze_alignment.parse(["embedded"])
    assert {name: getattr(args, name) for name in EMBEDDED} == EMBEDDED


def other_model(vocabulary=None, **overrides):
    """A model in the folder 'other', with other tokens if a vocabulary is given."""
    tiny_model(embedded=True, **overrides).save_pretrained("other")
    tokenizer = TOKENIZER
    if vocabulary:
        changed = json.loads(TOKENIZER.backend_tokenizer.to_str())
        words = changed["model"]["vocab"]
        words["7"], words["8"] = words["8"], words["7"]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(changed)), eos_token="<|end|>"
        )
    tokenizer.save_pretrained("other")


@pytest.mark.parametrize(
    "options, other, message",
    [
        (["--internal_layer", "2"], {}, "--internal_layer 2: no block of .* is above that; take 0 to 1"),
        (["--internal_layer", "1"], dict(num_hidden_layers=5), "other: its number of blocks is 5, that of .* 3"),
        (["--internal_layer", "1"], dict(num_hidden_layers=3, vocabulary="swapped"), "other: has other tokens than"),
    ],
)
def test_models_that_do_not_go_together_are_one_line(options, other, message, model_folder):
    """The token numbers of one model mean something else to another: numbers that look like a finding."""
    other_model(**other)
    with pytest.raises(UserError, match=message):
        analyze_alignment.main(analyze_alignment.parse([str(model_folder), "other", *FEW, *options]))

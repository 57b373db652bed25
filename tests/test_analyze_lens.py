"""The tuned lens: its objective, its training, and what it is compared with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import KINDS, TOKENIZER, random_answers, run_script, textbook_streams, tiny_model

import analyze_lens
import common
from analyze_lens import LENSES, loss, read_through, rows_of_step, streams_of
from plumbing.errors import UserError
from plumbing.tuned_lens import TunedLens, fingerprint, load_lens, new_lens, save_lens


def args_of(*options):
    """Command line -> namespace, for a few steps on the arithmetic of the embedded model."""
    few = ["--num_samples", "6", "--max_steps", "4", "--batch_answers", "2", "--max_completion_length", "6"]
    return analyze_lens.parse([*few, "--data", "arithmetic", *map(str, options)])


def drawn_lens(model, seed=0):
    """A lens whose maps are far from those at the start."""
    lens = new_lens(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lens.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return lens


# ---------------------------------------------------------------------------------------------------------------------
# The equations
# ---------------------------------------------------------------------------------------------------------------------


def test_loss_is_the_kl_from_the_whole_policy_by_hand():
    """KL(whole || lens) of (1/2, 1/2) against (1/4, 3/4), summed: the other direction, or a mean, is another number."""
    whole = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    lens = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert loss(lens.log(), whole.log()) == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_of_the_loss_at_the_start_by_hand():
    """Of an unnormed two-token lens: d KL / d logits is lens - whole, and that of W is its outer product with x."""
    lens = TunedLens(L=2, D=2)
    x = torch.tensor([[2.0, -1.0]])
    whole = torch.tensor([[0.9, 0.1]])
    logps = lens.translate(0, x).log_softmax(-1)
    loss(logps, whole.log()).backward()
    difference = x.softmax(-1) - whole
    torch.testing.assert_close(lens.bias.grad[0], difference[0])
    torch.testing.assert_close(lens.weight.grad[0], difference.T @ x)


@KINDS
@torch.no_grad()
def test_lenses_are_what_they_say(family, tied):
    """Against transformers' own hidden states: a map transposed, a norm forgotten or taken twice, a block too low."""
    model = tiny_model(family, tied)
    _, _, rollouts = random_answers()
    lens = drawn_lens(model)
    streams, answers, targets = streams_of(model, rollouts, [3, 1])
    at = 0
    for row in (3, 1):
        length = int(rollouts.attention_mask[row].sum())
        first = length - int(rollouts.lengths[row])
        own = textbook_streams(model, rollouts.ids[row, :length])
        n = length - first
        assert (answers[at : at + n] == row).all()
        assert targets[at : at + n].tolist() == rollouts.ids[row, first:length].tolist()
        for k, stream in enumerate(own):
            x = stream[first - 1 : length - 1]
            expected = dict(raw=x, normed=model.model.norm(x), tuned=model.model.norm(x))
            if k < 3:
                expected["tuned"] = model.model.norm(x + torch.einsum("de,ne->nd", lens.weight[k], x) + lens.bias[k])
            for name in LENSES:
                found = read_through(name, model, lens, k, streams[k][at : at + n])
                torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-5)
        at += n
    assert at == len(targets)


@KINDS
@torch.no_grad()
def test_the_lens_of_the_top_block_is_the_model_itself(family, tied):
    model = tiny_model(family, tied)
    _, _, rollouts = random_answers()
    streams, _, _ = streams_of(model, rollouts, [0])
    n = int(rollouts.lengths[0])
    length = int(rollouts.attention_mask[0].sum())
    whole = model(rollouts.ids[:1, :length]).logits[0, length - n - 1 : length - 1].log_softmax(-1)
    read = read_through("tuned", model, drawn_lens(model), 3, streams[-1])
    torch.testing.assert_close(analyze_lens.log_policy(model, read, 1.0), whole, atol=1e-5, rtol=1e-5)


def test_comparison_is_a_mean_over_tokens(monkeypatch):
    """KL, entropy and favourites of all three, position by position from transformers' logits."""
    model = tiny_model()
    _, _, rollouts = random_answers()
    lens = drawn_lens(model)
    monkeypatch.setattr(analyze_lens, "CHUNK_TOKENS", 3)
    args = args_of("--micro_batch_tokens", 20, "--temperature", 0.7)
    found = analyze_lens.compare(model, lens, rollouts, args)
    sums = dict.fromkeys(analyze_lens.MEASURED, 0.0)
    tokens = 0
    for row in range(len(rollouts.ids)):
        length = int(rollouts.attention_mask[row].sum())
        first = length - int(rollouts.lengths[row])
        ids = rollouts.ids[row, :length]
        x = textbook_streams(model, ids)[1][first - 1 : length - 1]
        with torch.no_grad():
            whole = (model(ids[None]).logits[0, first - 1 : length - 1] / 0.7).log_softmax(-1)
            tuned = model.lm_head(model.model.norm(lens.translate(1, x))) / 0.7
        logps = tuned.log_softmax(-1)
        sums["kl"] += float((whole.exp() * (whole - logps)).sum())
        sums["entropy"] -= float((logps.exp() * logps).sum())
        sums["agrees"] += int((logps.argmax(-1) == whole.argmax(-1)).sum())
        sums["sampled"] += int((logps.argmax(-1) == ids[first:]).sum())
        tokens += length - first
    assert found["tokens"] == tokens
    for kind, total in sums.items():
        assert found["tuned"][kind]["mean"][1] == pytest.approx(total / tokens, rel=1e-4), kind
    assert found["tuned"]["kl"]["mean"][-1] == pytest.approx(0, abs=1e-5)
    assert found["normed"]["kl"]["mean"][-1] == pytest.approx(0, abs=1e-5)
    assert found["raw"]["kl"]["mean"][-1] > 0.01
    assert all(error > 0 for error in found["raw"]["kl"]["standard_error"])


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def test_every_pass_takes_every_answer_once():
    order = sum([rows_of_step(step, 10, 3, seed=0) for step in range(1, 11)], [])
    for start in (0, 10, 20):
        assert sorted(order[start : start + 10]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order != sum([rows_of_step(step, 10, 3, seed=1) for step in range(1, 11)], [])


def test_gradients_do_not_depend_on_the_chunks_and_the_model_gets_none(monkeypatch, tmp_path):
    model = tiny_model().requires_grad_(False)
    _, _, rollouts = random_answers()
    gradients = []
    for chunk in (2, 1000):
        monkeypatch.setattr(analyze_lens, "CHUNK_TOKENS", chunk)
        training = analyze_lens.Training(model, tmp_path, args_of())
        mean = training.add_gradients(rollouts, [0, 2, 4])
        gradients.append((mean, training.lens.weight.grad.clone(), training.lens.bias.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for one, other in zip(gradients[0][1:], gradients[1][1:]):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_translators_of_a_bf16_model_are_trained_in_fp32(tmp_path):
    """A step of 1e-3 on a bf16 number is rounded away, or is none of 1e-3."""
    model = tiny_model().bfloat16().requires_grad_(False)
    _, _, rollouts = random_answers()
    training = analyze_lens.Training(model, tmp_path, args_of())
    assert training.add_gradients(rollouts, [0, 1]) > 0
    training.optimizer.step()
    assert training.lens.weight.dtype == training.lens.weight.grad.dtype == torch.float32
    assert training.lens.weight.detach().abs().max() == pytest.approx(1e-3, rel=1e-2)  # Adam's first step
    streams, _, _ = streams_of(model, rollouts, [0])
    assert read_through("tuned", model, training.lens, 0, streams[0]).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of three blocks with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(num_hidden_layers=3, embedded=True).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def copy_of(folder, name):
    shutil.copytree(folder, name)
    return name


def test_training_brings_the_held_out_kl_below_the_normed_lens(folder, capsys):
    """As a user runs it; a second call reads what the first one has trained."""
    path = copy_of(folder, "model")
    options = "--num_samples 16 --max_steps 30 --max_completion_length 8 --learning_rate 3e-3".split()
    done = run_script("analyze_lens.py", path, *options)
    assert done.returncode == 0, done.stderr
    [found] = json.loads(Path("runs/lens/lens.json").read_text())["models"]
    for k in (0, 1):
        assert found["tuned"]["kl"]["mean"][k] < 0.9 * found["normed"]["kl"]["mean"][k]
    assert Path("runs/lens/lens.png").stat().st_size > 10_000
    assert sorted(file.name for file in Path("model/tuned_lens").iterdir()) == ["lens.safetensors"]
    analyze_lens.main(analyze_lens.parse([path, *options]))
    again = capsys.readouterr()
    assert "model/tuned_lens: read, 30 steps on arithmetic" in again.out
    assert "training" not in again.out + again.err
    assert json.loads(Path("runs/lens/lens.json").read_text())["models"] == [found]


def trained(path, monkeypatch, stop_after=None):
    """Train the lens of a model, or press Ctrl-C after so many steps -> the lens."""
    model, tokenizer = analyze_lens.load_model(path)
    monkeypatch.setattr(analyze_lens, "SAVED_EVERY", 1)
    real = analyze_lens.Training.add_gradients

    def add_gradients(training, rollouts, rows):
        if training.step == stop_after:
            raise KeyboardInterrupt
        return real(training, rollouts, rows)

    with monkeypatch.context() as patch:
        patch.setattr(analyze_lens.Training, "add_gradients", add_gradients)
        return analyze_lens.tuned_lens(path, model, tokenizer, args_of())


def test_an_interrupted_training_ends_as_one_that_was_not(folder, monkeypatch, capsys):
    """Moments forgotten, the same answers again, or the step size from the start: another lens."""
    whole = trained(copy_of(folder, "whole"), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        trained(copy_of(folder, "cut"), monkeypatch, stop_after=2)
    assert not Path("cut/tuned_lens/lens.safetensors").exists()
    cut = trained("cut", monkeypatch)
    assert "resuming after step 2" in capsys.readouterr().out
    assert torch.equal(whole.weight, cut.weight) and torch.equal(whole.bias, cut.bias)
    assert whole.weight.abs().max() > 1e-3


@pytest.mark.parametrize(
    "option, value", [("--learning_rate", 0.5), ("--system_prompt", "Add."), ("--max_completion_length", 5)]
)
def test_an_unfinished_training_with_other_options_is_not_gone_on_with(option, value, folder, monkeypatch, capsys):
    """Half of it would have been trained on answers to other prompts, or at another rate."""
    with pytest.raises(KeyboardInterrupt):
        trained(copy_of(folder, "cut"), monkeypatch, stop_after=2)
    model, tokenizer = analyze_lens.load_model("cut")
    analyze_lens.tuned_lens("cut", model, tokenizer, args_of(option, value))
    assert "resuming" not in capsys.readouterr().out


def test_a_lens_that_was_trained_otherwise_is_read_and_said_to_be(folder, monkeypatch, capsys):
    """A lens for temperature 1 is not the best one at 0.5: a reader of the table must know."""
    trained(copy_of(folder, "model"), monkeypatch)
    model, tokenizer = analyze_lens.load_model("model")
    capsys.readouterr()
    analyze_lens.tuned_lens("model", model, tokenizer, args_of())
    [line] = capsys.readouterr().out.splitlines()
    assert line == "model/tuned_lens: read, 4 steps on arithmetic; --overwrite trains it again"
    analyze_lens.tuned_lens("model", model, tokenizer, args_of("--temperature", 0.5))
    [line] = capsys.readouterr().out.splitlines()
    assert "and with --temperature 1.0; --overwrite trains it as this command says" in line


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def test_a_lens_comes_back_as_it_was(tmp_path):
    model = tiny_model()
    lens = drawn_lens(model)
    save_lens(lens, tmp_path, model, dict(max_steps=3))
    found, facts = load_lens(tmp_path, model)
    assert torch.equal(found.weight, lens.weight) and torch.equal(found.bias, lens.bias)
    assert facts == dict(max_steps=3)
    assert load_lens(tmp_path / "none", model) == (None, {})


def test_the_lens_of_other_weights_is_refused(tmp_path):
    """A model that was trained further has another lens, though it lies in the same folder."""
    model = tiny_model()
    save_lens(drawn_lens(model), tmp_path, model, {})
    before = fingerprint(model)
    for row in (0, -1):
        weight = model.model.layers[3].mlp.down_proj.weight.data[row]
        old = weight.clone()
        weight[row] += 1e-3
        assert fingerprint(model) != before
        weight.copy_(old)
    assert fingerprint(model) == before
    assert fingerprint(tiny_model().bfloat16()) != before
    weight[-1] += 1e-3
    with pytest.raises(UserError, match="lens of other weights; analyze_lens.py --overwrite"):
        load_lens(tmp_path, model)


def test_a_damaged_lens_is_one_line(tmp_path):
    model = tiny_model()
    save_lens(drawn_lens(model), tmp_path, model, {})
    file = tmp_path / "lens.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="lens.safetensors: cannot be read .*--overwrite"):
        load_lens(tmp_path, model)


def test_a_model_of_one_block_has_nothing_to_translate():
    tiny_model(num_hidden_layers=1, embedded=True).save_pretrained("one")
    TOKENIZER.save_pretrained("one")
    with pytest.raises(UserError, match="one: has a single block"):
        analyze_lens.look_at("one", args_of())


def test_only_the_state_that_predicts_a_token_is_read():
    """The state of the token itself knows the next one: a lens that is one position off looks better than it is."""
    model = tiny_model()
    prompts, completions, rollouts = random_answers()
    streams, _, targets = streams_of(model, rollouts, [0])
    assert targets.tolist() == completions[0]
    whole = common.hidden_states(model, rollouts.ids[:1], rollouts.attention_mask[:1])
    first = len(prompts[0])
    expected = whole[0, first - 1 : first + len(completions[0]) - 1]
    torch.testing.assert_close(model.model.norm(streams[-1]), expected, atol=1e-5, rtol=1e-5)

"""The optimizer: small updates survive bf16, what has no gradient stays, a broken gradient does no harm."""

import copy
import io

import pytest
import torch
from helpers import arguments, read_jsonl, tiny_model

import grpo
from plumbing.errors import UserError
from plumbing.optimizer import Optimizer
from plumbing.options import RunArgs


def optimizer_for(model, **options):
    plain = dict(learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1e9)
    return Optimizer(model, RunArgs(**plain | options))


def give_gradients(model, step, scale=1.0):
    """The same random gradients at the same step for every model of this shape."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def share_kept(trained, exact, start):
    """Of the way from `start` to `exact`, the share that `trained` has come."""
    origin = flat(start)
    wanted = flat(exact) - origin
    return float((flat(trained) - origin) @ wanted / (wanted @ wanted))


@pytest.mark.parametrize("optimizer_device", ["", "cpu"])
def test_small_updates_survive_bf16(optimizer_device):
    """A bf16 weight of 0.02 plus 1e-6 is the same weight: without fp32 masters the reward just stays flat."""
    start = tiny_model().bfloat16()
    for parameter in start.parameters():
        parameter.data.mul_(0.1)  # as small as the weights of a real model
    model, naive, fp32 = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start).float()
    ours = optimizer_for(model, learning_rate=1e-6, optimizer_device=optimizer_device)
    naive_adam = torch.optim.AdamW(naive.parameters(), 1e-6, weight_decay=0.0)
    fp32_adam = torch.optim.AdamW(fp32.parameters(), 1e-6, weight_decay=0.0)
    for step in range(50):
        for trained, optimizer in ((model, ours), (naive, naive_adam), (fp32, fp32_adam)):
            give_gradients(trained, step % 5)
            optimizer.step()
    masters = {name: state["master"] for name, state in ours.state_dict().items()}
    assert share_kept(masters.values(), fp32.parameters(), start.parameters()) >= 0.95
    naively = share_kept(naive.parameters(), fp32.parameters(), start.parameters())
    assert naively < 0.5  # or these weights were too large to show the problem
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, masters[name].bfloat16())  # what the model computes with


def test_masters_move_bf16_weights_in_the_end():
    """Masters that never come back into the model would pass every test of the masters alone."""
    models = [torch.nn.Linear(64, 64, bias=False) for _ in range(2)]
    start = (0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    models[0].weight.data = start.clone()
    models[1].weight.data = start.float()
    ours = optimizer_for(models[0], learning_rate=1e-6)
    plain = torch.optim.AdamW(models[1].parameters(), 1e-6, weight_decay=0)
    for _ in range(500):
        for model in models:
            give_gradients(model, 0)
        ours.step()
        plain.step()
    assert share_kept([models[0].weight], [models[1].weight], [start]) > 0.95


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_steps_are_those_of_adamw_with_clipping(tied):
    """A clip per tensor, a norm that counts a tied matrix twice, or one taken after clipping: torch's own tells."""
    model = tiny_model(tied=tied)
    reference = copy.deepcopy(model)
    optimizer = optimizer_for(model, weight_decay=0.1, max_grad_norm=1.0)
    plain = torch.optim.AdamW(reference.parameters(), 1e-3, betas=(0.9, 0.999), weight_decay=0.1)
    for step in range(5):
        for m in (model, reference):
            give_gradients(m, step, scale=1e-5 if step == 2 else 1.0)  # step 2 is too small to be clipped
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        plain.step()
        assert optimizer.step() == pytest.approx(float(expected), rel=1e-5)
        assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert ("lm_head.weight" in optimizer.state_dict()) == (not tied)


def test_no_gradient_means_untouched():
    """A zero gradient still decays the weights and moves them by old moments; no gradient must do neither."""
    model = tiny_model(tied=False)
    optimizer = optimizer_for(model, weight_decay=0.1)
    give_gradients(model, 0)
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = copy.deepcopy(optimizer.state_dict()["lm_head.weight"])
    give_gradients(model, 1)
    model.lm_head.weight.grad = None
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == "lm_head.weight")
    after = optimizer.state_dict()["lm_head.weight"]
    for name, tensor in after["adam"]["state"][0].items():
        assert torch.equal(tensor, moments["adam"]["state"][0][name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_updates_nothing(value):
    """One nan in one gradient, and after clipping by a nan norm every weight is nan; the moments stay so for ever."""
    model = tiny_model()
    optimizer = optimizer_for(model)
    give_gradients(model, 0)
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    give_gradients(model, 1)
    model.model.norm.weight.grad[3] = value
    assert not optimizer.step() < float("inf")  # the norm is handed back as it is, to be logged
    assert all(torch.equal(p, before[0][name]) for name, p in model.state_dict().items())
    for name, state in optimizer.state_dict().items():
        for key, tensor in state["adam"]["state"][0].items():
            assert torch.equal(tensor, before[1][name]["adam"]["state"][0][key])
    assert all(p.grad is None for p in model.parameters())
    give_gradients(model, 2)
    optimizer.step()
    assert not torch.equal(model.model.norm.weight, before[0]["model.norm.weight"])


def test_ten_broken_gradients_in_a_row_are_an_error():
    """A run that skips for ever looks alive and learns nothing; nine skips and a recovery are no reason to stop."""
    model = tiny_model()
    optimizer = optimizer_for(model)

    def step(*scales):
        for scale in scales:
            give_gradients(model, 0, scale)
            optimizer.step()

    broken = [float("nan")] * 9
    step(*broken, 1.0, *broken, 1.0, *broken)
    with pytest.raises(UserError, match="10 non-finite"):
        step(float("nan"))


def test_broken_gradients_are_counted_and_said(model_folder, data, monkeypatch, capsys):
    """A skipped update must be seen in the log and on the screen, and its nan must not make the log invalid JSON."""
    real_loss = grpo.loss

    def broken_loss(*args):
        value, metrics = real_loss(*args)
        return value * float("nan"), metrics

    monkeypatch.setattr(grpo, "loss", broken_loss)
    grpo.main(arguments(grpo, model_folder, data, num_prompts=6))
    assert "non-finite" in capsys.readouterr().err
    records = read_jsonl("run/metrics.jsonl")
    assert "NaN" not in open("run/metrics.jsonl").read()
    assert all(record["optimizer_steps"] == 0 for record in records)  # none of them updated anything


def test_optimizer_on_the_host_gives_the_same_steps():
    """--optimizer_device cpu keeps masters and moments in host memory; the weights must come out the same."""
    models = [tiny_model(seed=1) for _ in range(2)]
    optimizers = [optimizer_for(models[0]), optimizer_for(models[1], optimizer_device="cpu")]
    for step in range(3):
        for model, optimizer in zip(models, optimizers):
            give_gradients(model, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters()))
    assert all(state["master"].device.type == "cpu" for state in optimizers[1].state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_restored_optimizer_continues_bit_for_bit(dtype):
    """Moments, step counts or masters lost on resume: a kink in every curve. bf16 weights do not hold their masters."""
    model = tiny_model().to(dtype)
    optimizer = optimizer_for(model, weight_decay=0.1)
    for step in range(3):
        give_gradients(model, step)
        if step == 1:
            model.model.norm.weight.grad = None  # never saw as many steps as the others
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = copy.deepcopy(model)
    again = optimizer_for(resumed, weight_decay=0.1)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        for m, o in ((model, optimizer), (resumed, again)):
            give_gradients(m, step)
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))
    for name, state in optimizer.state_dict().items():
        assert torch.equal(state["master"], again.state_dict()[name]["master"])


def test_a_schedule_reaches_the_weights():
    """A learning rate handed to `step` and not used: every schedule is the constant one, and looks fine in the log."""
    models = [tiny_model() for _ in range(2)]
    ours, plain = optimizer_for(models[0]), torch.optim.AdamW(models[1].parameters(), weight_decay=0.0)
    for step, rate in enumerate((1e-4, 1e-2, 3e-3)):
        for model in models:
            give_gradients(model, step)
        ours.step(rate)
        plain.param_groups[0]["lr"] = rate
        plain.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_learning_rate_of_zero_moves_nothing():
    """A schedule that ends at 0 must end there: taken for 'not given', 0 would repeat the rate of the step before."""
    model = tiny_model()
    optimizer = optimizer_for(model, learning_rate=1e-2, weight_decay=0.1)
    give_gradients(model, 0)
    optimizer.step(1e-2)
    before = copy.deepcopy(model.state_dict())
    give_gradients(model, 1)
    optimizer.step(0.0)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_summary_tells_what_happened_since_the_last_one():
    """A mean over skipped gradients is nan; figures of an earlier step in this one's record hide when it went wrong."""
    model = tiny_model()
    optimizer = optimizer_for(model)
    norms = []
    for step, scale in enumerate((1.0, float("nan"), 2.0)):
        give_gradients(model, step, scale)
        norms.append(optimizer.step())
    figures = optimizer.summary()
    assert figures["grad_norm"] == pytest.approx((norms[0] + norms[2]) / 2)
    assert (figures["optimizer_steps"], figures["skipped_steps"], figures["updated_share"]) == (2, 1, 1.0)
    nothing = dict(grad_norm=None, optimizer_steps=0, skipped_steps=0, updated_share=None)
    assert optimizer.summary() == nothing


def test_updates_lost_in_rounding_are_counted():
    """fp32 weights of 1 and a rate of 1e-9: a run that looks alive, and moves nothing but the small weights."""
    layer = torch.nn.Linear(64, 64, bias=False)
    layer.weight.data.fill_(1.0)
    layer.weight.data[:16] = 1e-6
    optimizer = optimizer_for(layer, learning_rate=1e-9)
    give_gradients(layer, 0)
    optimizer.step()
    assert optimizer.summary()["updated_share"] == pytest.approx(0.25, abs=0.02)

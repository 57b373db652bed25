"""benchmarks/lengths.py: the worlds are what they say, and the variances in them are those by hand."""

import importlib.util
import itertools

import pytest
import torch
from helpers import ROOT
from torch.nn.functional import logsigmoid

spec = importlib.util.spec_from_file_location("measured_lengths", ROOT / "benchmarks" / "lengths.py")
lengths = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lengths)


def square_of_gradient(value, parameters):
    [gradient] = torch.autograd.grad(value, parameters, retain_graph=True)
    return gradient.square().sum().item()


def test_a_policy_of_even_choices_has_the_gradients_of_the_world():
    """An answer of two tokens or of four: the first chooses the kind, the others are coins with parameters of their
    own. By enumeration: |g|^2 of every answer, and |grad J|^2 where 3 of 10 short answers are right, 7 of 10 long."""
    # The kind; the coin of a short answer; the three of a long one.
    parameters = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    places_of = {0: [0, 1], 1: [0, 2, 3, 4]}
    right = {0: 0.3, 1: 0.7}
    expected_reward = 0
    for kind, places in places_of.items():
        for coins in itertools.product([-1, 1], repeat=len(places) - 1):
            choices = torch.tensor([2 * kind - 1, *coins])
            logp = logsigmoid(parameters[places] * choices).sum()
            assert square_of_gradient(logp, parameters) == pytest.approx(lengths.EVEN * len(places))
            expected_reward = expected_reward + logp.exp() * right[kind]
    by_hand = lengths.mean_square((0.3, 0.7)).item()
    assert square_of_gradient(expected_reward, parameters) == pytest.approx(by_hand)


def test_variances_by_hand():
    """Twice as long, |g|^2 twice as large: 2.5 and 5; baselines 1/2 and (0.3 + 2 * 0.7) / 3; |grad J|^2 = 0.01."""
    b = 1.7 / 3
    under_mean = (2.5 + 5) / 2 * 0.25 - 0.01
    short = 2.5 * (0.3 * (1 - b) ** 2 + 0.7 * b**2)
    long = 5 * (0.7 * (1 - b) ** 2 + 0.3 * b**2)
    under_weighted = (short + long) / 2 - 0.01
    weighted, optimum = lengths.relative_variances(2, 2, (0.3, 0.7))
    assert weighted == pytest.approx(under_weighted / under_mean)
    assert optimum == pytest.approx(weighted)  # the assumption holds


@pytest.mark.parametrize("right", [(0.3, 0.7), (0.7, 0.3)])
def test_it_wins_in_the_first_of_the_three_worlds(right):
    """The table's verdict, whichever kind is right more often; with equal lengths nothing is weighted."""
    for name, growth in lengths.WORLDS.items():
        assert lengths.relative_variances(1, growth(1), right) == pytest.approx((1, 1))
        weighted, optimum = lengths.relative_variances(4, growth(4), right)
        assert optimum <= weighted + 1e-12
        assert (weighted < 1) == (name == "equally sure")


def test_where_it_breaks_even_by_hand():
    """Four times as long: b = 0.5 and 0.62. From one to the other a short answer loses 0.3 * (0.12 * 0.88) - 0.7 *
    (0.12 * 1.12) and a long one gains 0.7 * (0.12 * 0.88) - 0.3 * (0.12 * 1.12): as 0.0624 to 0.0336, or 1.857."""
    short = 0.7 * (0.62**2 - 0.5**2) - 0.3 * (0.5**2 - 0.38**2)
    long = 0.7 * (0.5**2 - 0.38**2) - 0.3 * (0.62**2 - 0.5**2)
    assert short / long == pytest.approx(1.857, abs=1e-3)
    assert lengths.relative_variances(4, 1.85, (0.3, 0.7))[0] > 1 > lengths.relative_variances(4, 1.87, (0.3, 0.7))[0]


def test_ratios_beyond_the_worlds_are_refused(monkeypatch):
    """A long answer that guesses at nothing would have a smaller gradient than the one token that chose its kind."""
    monkeypatch.setattr("sys.argv", ["lengths.py", "--ratios", "16"])
    with pytest.raises(SystemExit):
        lengths.main()


def test_the_table_has_a_row_for_every_world(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lengths.py", "--ratios", "1", "3"])
    lengths.main()
    said = capsys.readouterr().out
    assert all(name in said for name in lengths.WORLDS) and "3x as long" in said

"""What a baseline does to the variance of the policy gradient (https://arxiv.org/abs/2505.23585).

With g = grad log pi(y) of a sampled answer y and its reward r, the estimate (r - b) g of the policy gradient has the
variance (the trace of its covariance)
    V(b) = E |g|^2 (r - b)^2 - |E (r - b) g|^2
As E g = 0, the second term is |grad J|^2 whatever b is. What is left is a parabola in b, lowest at
    b = E |g|^2 r / E |g|^2                                   the norm-weighted baseline
The baseline of opo.py replaces |g|^2 by the length of the answer. The closer its column and the norm-weighted one are,
the better its assumption holds for a model, that |g|^2 grows with the length.

Another substitute costs no backward pass either (https://arxiv.org/abs/2602.07078, where it grows along the answer and
makes a baseline for every token; here it is summed up, so that all baselines are one number per prompt): the gradient
with respect to the logits,
    W = sum_t |one_hot(o_t) - pi_t|^2 = sum_t (1 - 2 pi_t(o_t) + sum_v pi_t(v)^2)      the logit-weighted baseline

The answers are those that evaluate.py kept: of every model, those to the first data set at the highest temperature,
which must be above 0. Gradients are over all parameters, one answer at a time.

    python evaluate.py embedded runs/grpo runs/opo           # first: the answers
    python analyze_gradients.py runs/evaluation              # then: a table, gradient_variance.json and .png
"""

from pathlib import Path

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch

import common
import tasks
from plumbing import figures, samples, verifier
from plumbing.errors import UserError, one_line_errors
from plumbing.files import check_folder, write_json
from plumbing.models import load_model
from plumbing.tables import markdown_table

BASELINES = ("no baseline", "mean", "length-weighted", "logit-weighted", "norm-weighted")
POSITIONS = 256  # whose whole distribution is held at a time


def gradient_variance(squares, logit_squares, rewards, lengths, mean_square):
    """Variance of the policy gradient of one sampled answer under five baselines -> dict of floats.

    V(b) of the module docstring, per prompt over its n answers and averaged over prompts. |grad J|^2 is estimated once
    for all five, so that they differ by what a baseline does and not by noise in the mean. As in training b comes from
    the group itself, which flatters it: at n = 32 by a few percent.

    squares [P, n]: |g|^2; logit_squares [P, n]: W; rewards, lengths [P, n]; mean_square [P]: |grad J|^2.
    """

    baselines = {
        "no baseline": torch.zeros(len(rewards), 1),
        "mean": rewards.mean(1, keepdim=True),
        "length-weighted": weighted_mean(rewards, lengths),
        "logit-weighted": weighted_mean(rewards, logit_squares),
        "norm-weighted": weighted_mean(rewards, squares),
    }
    variances = {}
    for name, b in baselines.items():
        second_moment = (squares * (rewards - b) ** 2).mean(1)  # [P]
        variances[name] = float((second_moment - mean_square).mean())
    return variances


def weighted_mean(values, weights):
    """Mean over the answers to each prompt, [P, n] -> [P, 1]; 0 where all weights are 0."""
    total = (weights * values).sum(1, keepdim=True)
    return total / weights.sum(1, keepdim=True).clamp(min=1e-30)


def gradient_moments(model, rollouts, rewards, temperature):
    """(squares [P, n], mean_square [P]) for `gradient_variance`, fp64; rewards [P, n], rollouts of B = P*n rows.

    mean_square is the mean of <x_i, x_j> over pairs i != j of x_i = (r_i - mean r) g_i: unlike |mean x|^2 it holds no
    share of the variance; for one prompt it may be below 0. The sum over pairs is |sum x|^2 - sum |x|^2, so at any time
    there is one gradient and one fp32 sum of gradients, whatever n.
    """
    P, n = rewards.shape
    parameters = list(model.parameters())
    squares = torch.zeros(P, n, dtype=torch.float64)
    mean_square = torch.zeros(P, dtype=torch.float64)
    for p in range(P):
        centred = rewards[p] - rewards[p].mean()
        sum_x = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for i in range(n):
            row = p * n + i
            logps, _ = common.completion_logps(model, rollouts, [row], temperature)
            logps.sum().backward()
            for parameter, total in zip(parameters, sum_x):
                if parameter.grad is not None:
                    squares[p, i] += square_of(parameter.grad.float())
                    total.add_(parameter.grad, alpha=float(centred[i]))
                    parameter.grad = None
        square_of_sum = sum(map(square_of, sum_x))
        sum_of_squares = float((squares[p] * centred**2).sum())
        mean_square[p] = (square_of_sum - sum_of_squares) / (n * (n - 1))
    return squares, mean_square


@torch.no_grad()
def squares_at_logits(model, rollouts, temperature):
    """W of every answer, fp64 [B]: what |grad log pi(y)|^2 would be if the logits were the parameters."""
    found = torch.zeros(len(rollouts.ids), dtype=torch.float64)
    for row in range(len(found)):
        length = int(rollouts.attention_mask[row].sum())
        ids = rollouts.ids[row, :length]
        attention_mask = rollouts.attention_mask[row, : length - 1]
        hidden = common.hidden_states(model, ids[None, :-1], attention_mask[None])[0]
        predicts = rollouts.mask[row, 1:length].bool()  # column t of the hidden states predicts token t + 1
        states = hidden[predicts].split(POSITIONS)
        targets = ids[1:][predicts].split(POSITIONS)
        for some_states, some_targets in zip(states, targets):
            found[row] += squares_of_tokens(model, some_states, some_targets, temperature)
    return found


def squares_of_tokens(model, states, targets, temperature):
    """Sum of |one_hot(o_t) - pi_t|^2 over N tokens, a float. states [N, D], targets [N]."""
    logits = common.head_logits(model, states) / temperature
    policy = torch.softmax(logits, dim=-1)  # [N, V]
    chosen = policy.gather(1, targets[:, None])[:, 0]
    squares = 1 - 2 * chosen + policy.square().sum(1)
    return float(squares.sum())


def square_of(tensor):
    """The square of a tensor's norm, as a float."""
    return float(tensor.square().sum())


def look_at(kept, args):
    """`gradient_variance` of one model on its kept answers."""
    model, tokenizer = load_model(kept.model, args.device, args.dtype)
    samples.check_tokens(kept, model.get_input_embeddings().num_embeddings)
    prompts, completions = samples.prompts_and_completions(kept.records)
    rollouts = common.assemble(prompts, completions, tokenizer.pad_token_id, model.device)
    rewards = torch.tensor(rewards_of(kept, args), dtype=torch.float64)
    squares, mean_square = gradient_moments(model, rollouts, rewards, kept.temperature)
    logit_squares = squares_at_logits(model, rollouts, kept.temperature).view(rewards.shape)
    lengths = rollouts.lengths.view(rewards.shape).cpu().double()
    return gradient_variance(squares, logit_squares, rewards, lengths, mean_square)


def rewards_of(kept, args):
    """The rewards of the answers to every problem. Raises UserError if too many of them have no verdict."""
    rewards = []
    all_verdicts = []
    for record in kept.records:
        problem = tasks.problem_from_record(record)
        n = len(record["texts"])
        verdicts = common.judge(record["texts"], [problem] * n, record["finished"], args.grade_timeout)
        rewards.append([common.REWARDS.get(verdict, 0.0) for verdict in verdicts])
        all_verdicts += verdicts
    verifier.refuse_ungraded(all_verdicts, args.max_grader_errors, kept.label)
    return rewards


def table(variances):
    """The numbers as text, a line per model."""
    rows = [["model", *BASELINES]]
    for label, found in variances.items():
        rows.append([label] + [f"{found[name]:.4g}" for name in BASELINES])
    return markdown_table(rows)


def draw_gradients(variances):
    """Bars of the variance under each baseline relative to none, a group per model (label -> `gradient_variance`)."""
    figure, axes = figures.panels(1, 1, 2.5 + 2 * len(variances), 3.8)
    axis = axes[0][0]
    for i, (name, shade) in enumerate(zip(BASELINES, ("1", "0.85", "0.6", "0.35", "0.1"))):
        heights = []
        places = []
        for group, found in enumerate(variances.values()):
            unit = found["no baseline"] or 1
            heights.append(found[name] / unit)
            places.append(group + 0.16 * i)
        bars = axis.bar(places, heights, 0.16, color=shade, edgecolor="black", label=name)
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    middles = [group + 0.32 for group in range(len(variances))]
    axis.set_xticks(middles, variances)
    axis.set_ylabel("variance of one answer's policy\ngradient, relative to no baseline")
    axis.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=5 if len(variances) > 1 else 2)
    return figure


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""
    return samples.parse_probe(__doc__, ("device", "dtype", "grade_timeout", "max_grader_errors"), argv)


def main(args):
    folder = Path(args.evaluation)
    check_folder(folder, ("gradient_variance.json", "gradient_variance.png"))
    variances = {}
    for kept in samples.kept_answers(folder, args.probe_problems):
        if kept.temperature == 0 or len(kept.records[0]["texts"]) < 2:
            raise UserError(f"{folder}: needs 2 or more --num_samples of evaluate.py and a temperature above 0")
        variances[kept.label] = look_at(kept, args)
    write_json(folder / "gradient_variance.json", dict(args=vars(args), models=variances))
    figures.save_figures(folder, {"gradient_variance": draw_gradients(variances)}, dpi=130)
    print(table(variances))
    print(f"{folder}: gradient_variance.json, gradient_variance.png")


if __name__ == "__main__":
    with one_line_errors():
        main(parse())

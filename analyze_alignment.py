"""What does training block k's policy do to the blocks above it? (BuPO, https://arxiv.org/abs/2512.19673, section 4)

Phase one of bupo.py trains the policy of block k alone. Nothing above k gets a gradient, but all of it reads what block
k writes. The paper reports that the features of block k and of later blocks become more alike, that the later policies
stay near to that of block k first and move away from it afterwards, and that the whole policy is spoilt if this goes on
for too long. With S_l the stream after block l, as averages over tokens:
    cosine_l = cos(S_k, S_l)                                         features, l = k..L-1
    kl_l = KL(pi_k || pi_l),    pi_l = softmax(S_l E_u^T)            policies; --internal_norm: of norm(S_l)
    entropy_change = H(pi_k) - H(pi_{k-1})                           what block k itself does (not for k = 0)
    perplexity = exp(-average of ln pi(o_t))                         the whole policy pi, of the tokens o_t

All models read the same answers: what the first of them samples for held-out problems. So a difference between two
models is none of the tokens, and perplexity says how strange the first model's answers have become to the others. (What
the paper measured these on, and the direction of its KL, are not specified there.)

    python analyze_alignment.py runs/tiny runs/bupo/checkpoint-20 runs/bupo        # before, after phase one, at the end
    python analyze_alignment.py Qwen/Qwen3-4B runs/qwen --data problems.jsonl --internal_layer 5
"""

import math

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import tasks
from plumbing import figures
from plumbing.clusters import clustered_mean
from plumbing.errors import UserError, one_line_errors
from plumbing.files import check_folder, make_output_folder, write_json
from plumbing.models import backbone_of, load_model, refuse_other_shape, shape_of
from plumbing.options import ASKING, add_shared_options, analysis_parser, parse_for_models, refuse_below
from plumbing.tables import markdown_table

# Options that mean here what they mean to the training scripts.
SHARED = (*ASKING, "micro_batch_tokens")
# Overrides of the defaults when all models are embedded ones.
EMBEDDED = dict(data=tasks.DEFAULT, system_prompt="", max_completion_length=64, internal_layer=5)

CHUNK_TOKENS = 128  # positions whose distributions over the vocabulary are held at once

# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def log_policy(model, state, norm, temperature):
    """ln pi_l, the policy that reads the stream after a block: state [n, D] -> [n, V], fp32."""
    if norm:
        state = backbone_of(model).norm(state)
    return F.log_softmax(common.head_logits(model, state) / temperature, dim=-1)


def entropy_of(logps):
    """[n, V] -> [n], nats."""
    return -(logps.exp() * logps).sum(-1)


def measure(model, streams, targets, k, norm, temperature):
    """Everything above, token by token -> dict: cosine and kl [L - k, n], for l = k..L-1; entropy_change [n] unless k
    is 0; surprise [n], which is -ln pi(o_t).

    streams: the stream after every block, a list of L tensors [n, D]. targets: the tokens o_t [n] that they predict.
    """
    cosine = []
    kl = []
    logps_k = log_policy(model, streams[k], norm, temperature)
    for state in streams[k:]:
        logps_l = log_policy(model, state, norm, temperature)
        cosine.append(F.cosine_similarity(streams[k].float(), state.float(), dim=-1))
        kl.append((logps_k.exp() * (logps_k - logps_l)).sum(-1))
    found = dict(cosine=torch.stack(cosine), kl=torch.stack(kl))
    if k > 0:
        below = log_policy(model, streams[k - 1], norm, temperature)
        found["entropy_change"] = entropy_of(logps_k) - entropy_of(below)
    whole = log_policy(model, streams[-1], True, temperature)  # the whole policy is normed, whatever the lens
    found["surprise"] = -whole.gather(-1, targets[:, None])[:, 0]
    return found


@torch.no_grad()
def compare(model, rollouts, args):
    """`measure` over the completion tokens of rollouts -> name: dict of mean and standard_error, which are numbers, for
    cosine and kl lists of L - k numbers. The errors are clustered by answer, None for a single one."""
    import analyze_lens

    k = args.internal_layer
    answers = len(rollouts.ids)
    sums = {}  # name -> [..., answers]
    batches = common.micro_batches(rollouts, range(answers), args.micro_batch_tokens)
    for rows in tqdm(batches, "answers", leave=False, disable=None):
        streams, row_of, targets = analyze_lens.streams_of(model, rollouts, rows)
        for piece in torch.arange(len(targets), device=targets.device).split(CHUNK_TOKENS):
            states = [stream[piece] for stream in streams]
            found = measure(model, states, targets[piece], k, args.internal_norm, args.temperature)
            for name, values in found.items():
                if name not in sums:
                    sums[name] = torch.zeros(*values.shape[:-1], answers, dtype=torch.float64)
                sums[name].index_add_(-1, row_of[piece].cpu(), values.double().cpu())
    tokens = rollouts.mask.sum(1).double().cpu()
    means = {}
    for name, total in sums.items():
        mean, error = clustered_mean(total, tokens)
        means[name] = dict(mean=mean.tolist(), standard_error=None if error is None else error.tolist())
    return means


# ---------------------------------------------------------------------------------------------------------------------
# Table and figure
# ---------------------------------------------------------------------------------------------------------------------


def table(results, k):
    """The numbers as text, a line per model: cosine and KL of block k with the next block and with the last one."""
    last = k + len(results[0]["cosine"]["mean"]) - 1
    shown = [l for l in dict.fromkeys((k + 1, last)) if l <= last]
    header = ["model"]
    header += [f"cos({k}, {l})" for l in shown]
    header += [f"KL({k}, {l})" for l in shown]
    header += ["dH", "perplexity"]
    rows = [header]
    for result in results:
        row = [result["model"]]
        for name in ("cosine", "kl"):
            row += [f"{result[name]['mean'][l - k]:.3f}" for l in shown]
        change = result.get("entropy_change")
        row.append(f"{change['mean']:+.3f}" if change else "-")
        row.append(f"{perplexity(result):.3f}")
        rows.append(row)
    return markdown_table(rows)


def perplexity(result):
    """exp of the mean surprise."""
    return math.exp(min(result["surprise"]["mean"], 700))  # a number, whatever became of the model


def draw_alignment(results, k):
    """Cosine and KL of block k with every later block, a curve per model; surprise, a point per model."""
    figure, axes = figures.panels(1, 3, 13, 4.6)
    titles = {
        "cosine": f"features: cos(S_{k}, S_l)",
        "kl": f"policies: KL(pi_{k} || pi_l), nats",
    }
    for axis, (name, title) in zip(axes[0], titles.items()):
        for i, result in enumerate(results):
            draw_curve(axis, result[name], k, result["model"], figures.style_of(i))
        axis.set(title=title, xlabel="block l, 0-based")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis = axes[0][2]
    for i, result in enumerate(results):
        found = result["surprise"]
        axis.errorbar(i, found["mean"], found["standard_error"], **figures.style_of(i))
    axis.set(title="whole policy: ln perplexity, nats", xlabel="model, in the order below", xticks=range(len(results)))
    figures.legend_below(figure, axes[0][0], 3)
    return figure


def draw_curve(axis, found, k, label, style):
    """One model over the blocks from k on, with a band of one standard error."""
    mean = torch.tensor(found["mean"])
    error = torch.tensor(found["standard_error"] or 0.0)
    blocks = range(k, k + len(mean))
    axis.plot(blocks, mean, **style, markersize=4, label=label)
    axis.fill_between(blocks, mean - error, mean + error, color=style["color"], alpha=0.25, linewidth=0)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""
    parser = analysis_parser(__doc__)
    add = parser.add_argument
    sources = "run folders, checkpoints, hub ids, 'embedded'; the first one writes the answers"
    add("models", nargs="*", default=["embedded"], help=sources)
    add("--data", help="problems, as for the training scripts; for embedded models: arithmetic")
    add("--num_samples", type=int, default=64, help="answers, one to each of so many held-out problems")
    add("--internal_layer", type=int, default=5, help="block k whose policy phase one has trained, 0-based")
    add("--internal_norm", action="store_true", help="policies read the normed stream, as bupo.py with this option")
    add("--output_dir", default="runs/alignment", help="folder of alignment.json and alignment.png")
    add_shared_options(parser, SHARED)
    args = parse_for_models(parser, argv, lambda found: found.models, EMBEDDED, SHARED)
    refuse_below(parser, args, dict(num_samples=1, internal_layer=0))
    if not args.data:
        parser.error("--data: needed; only embedded models have a default")
    return args


def sample(model, tokenizer, args):
    """An answer of the first model to each of --num_samples held-out problems -> Rollouts."""
    import analyze_entropy

    problems = tasks.load_problems(args.data, "test", args.num_samples, args.system_prompt, labels=False)
    return analyze_entropy.sample_answers(model, tokenizer, problems, args)


def refuse_other_tokens(path, tokenizer, first_path, first_tokenizer):
    """Raise UserError unless a model reads the first one's answers as they were written."""
    if tokenizer.get_vocab() != first_tokenizer.get_vocab():
        raise UserError(f"{path}: has other tokens than {first_path}, whose answers it should read; leave it out")


def main(args):
    check_folder(args.output_dir, ("alignment.json", "alignment.png"))
    if "embedded" in args.models:
        import sft

        sft.ensure_embedded()
    folder = make_output_folder(args.output_dir)
    k = args.internal_layer
    first_path, *other_paths = dict.fromkeys(args.models)
    first, first_tokenizer = load_model(first_path, args.device, args.dtype)
    L = len(backbone_of(first).layers)
    if k >= L - 1:
        raise UserError(f"--internal_layer {k}: no block of {first_path} is above that; take 0 to {L - 2}")
    rollouts = sample(first, first_tokenizer, args)
    results = [dict(model=first_path, **compare(first, rollouts, args))]
    shape = shape_of(first)
    del first  # one model at a time
    for path in other_paths:
        model, tokenizer = load_model(path, args.device, args.dtype)
        refuse_other_shape(path, shape_of(model), first_path, shape)
        refuse_other_tokens(path, tokenizer, first_path, first_tokenizer)
        results.append(dict(model=path, **compare(model, rollouts, args)))
    tokens = int(rollouts.mask.sum())
    answers = len(rollouts.ids)
    write_json(folder / "alignment.json", dict(args=vars(args), tokens=tokens, answers=answers, models=results))
    figures.save_figures(folder, {"alignment": draw_alignment(results, k)})
    print(f"block {k}, {tokens} tokens of {answers} answers by {first_path}")
    print(table(results, k))
    print(f"{folder}: alignment.json, alignment.png")


if __name__ == "__main__":
    with one_line_errors():
        main(parse())

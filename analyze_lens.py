"""How much of "this block is undecided" is only the basis? The tuned lens (https://arxiv.org/abs/2303.08112).

The stream S_k after block k, read by the unembedding E_u, is a policy of its own. But block k was never asked to write
in the basis that E_u reads. So let every block have a translator, an affine map that is trained to make the most of
what is there already, while the model itself stays as it is:
    raw       softmax(S_k E_u^T)                                     the internal policy that bupo.py trains
    normed    softmax(norm(S_k) E_u^T)                               the usual logit lens
    tuned     softmax(norm(S_k + W_k S_k + b_k) E_u^T)
    L_k = KL(pi || tuned_k) = sum_v pi(v) (ln pi(v) - ln tuned_k(v))    a mean over tokens that the model has sampled

W_k and b_k start at 0, so training starts from the logit lens. The last block has no translator: there, normed and
tuned are the whole policy pi itself. What is left of the KL, on answers that the translator was not trained on, is what
an affine map cannot find in the stream; the rest of it, up to normed and raw, was the basis. Still, a translator is
trained: that it can read an answer does not say that the blocks above do so (analyze_patching.py asks that).

The translators lie in <model>/tuned_lens. An interrupted training goes on where it was; a finished one is read again.
Errors are standard errors, clustered by answer (see plumbing/clusters.py).

    python analyze_lens.py                                   # the embedded model, no GPU, no network: seconds
    python analyze_lens.py runs/tiny runs/bupo               # before and after training
    python analyze_lens.py HuggingFaceTB/SmolLM2-135M-Instruct --data words --max_steps 100     # no GPU: minutes
"""

import itertools

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch
import torch.nn.functional as F
from tqdm import tqdm

import bookkeeping
import common
import tasks
from plumbing import figures
from plumbing.clusters import clustered_mean
from plumbing.errors import UserError, explain, one_line_errors
from plumbing.files import check_folder, make_output_folder, write_json
from plumbing.models import backbone_of, load_model
from plumbing.options import ASKING, add_shared_options, analysis_parser, parse_for_models, refuse_below
from plumbing.streams import reading
from plumbing.tuned_lens import fingerprint, lens_folder, load_lens, new_lens, save_lens

# Options that mean here what they mean to the training scripts.
SHARED = (*ASKING, "micro_batch_tokens")
# Overrides of the defaults when all models are embedded ones.
EMBEDDED = dict(data=tasks.DEFAULT, system_prompt="", max_completion_length=64)

CHUNK_TOKENS = 128  # positions whose distributions over the vocabulary are held at once
SAVED_EVERY = 20  # steps

# ---------------------------------------------------------------------------------------------------------------------
# The three lenses
# ---------------------------------------------------------------------------------------------------------------------

LENSES = ("raw", "normed", "tuned")


def read_through(name, model, lens, k, states):
    """What the unembedding reads of the stream after block k through one of LENSES. states [n, D] -> [n, D]."""
    if name == "raw":
        return states
    if name == "tuned":
        states = lens.translate(k, states)
    return backbone_of(model).norm(states)


def log_policy(model, read, temperature):
    """What the unembedding reads, [n, D] -> log-probs [n, V], fp32."""
    return F.log_softmax(common.head_logits(model, read) / temperature, dim=-1)


def whole_policy(model, top_states, temperature):
    """Log-probs [n, V] of the whole policy, from the stream after the last block [n, D]."""
    return log_policy(model, backbone_of(model).norm(top_states), temperature)


def kl_from_whole(logps, final_logps):
    """KL(pi || lens) at n positions. logps of the lens, final_logps of the whole policy pi: [n, V] -> [n]."""
    return (final_logps.exp() * (final_logps - logps)).sum(-1)


def loss(logps, final_logps):
    """KL(pi || tuned_k), summed over positions. logps of the lens, final_logps of pi: [n, V] -> scalar."""
    return kl_from_whole(logps, final_logps).sum()


def streams_of(model, rollouts, rows):
    """The stream behind every block where these rows' completion tokens are predicted -> (streams, a list of L tensors
    [N, D]; answers [N], the row of each; targets [N], the token sampled there)."""
    mask = rollouts.mask[rows].bool()
    predicts = mask[:, 1:]  # column t of the states predicts token t + 1
    positions = predicts.flatten().nonzero()[:, 0]
    with torch.no_grad(), reading(model, positions) as streams:
        common.hidden_states(model, rollouts.ids[rows][:, :-1], rollouts.attention_mask[rows][:, :-1])
    row_of = torch.tensor(rows, device=mask.device)[:, None].expand(predicts.shape)
    return streams, row_of[predicts], rollouts.ids[rows][:, 1:][predicts]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


# Options that decide what is trained on, and how.
DECISIVE = (
    "data",
    "system_prompt",
    "chat_template_kwargs",
    "max_prompt_length",
    "max_completion_length",
    "temperature",
    "num_samples",
    "max_steps",
    "batch_answers",
    "learning_rate",
    "seed",
)


def facts_of(args):
    """What a lens depends on, besides the model: the value of each DECISIVE option."""
    return {name: getattr(args, name) for name in DECISIVE}


class Training:
    """The training of one model's translators, as far as it has come."""

    def __init__(self, model, folder, args):
        self.model = model
        self.folder = folder
        self.args = args
        self.fingerprint = fingerprint(model)
        self.lens = new_lens(model)
        self.optimizer = torch.optim.Adam(self.lens.parameters(), lr=args.learning_rate)
        self.step = 0

    def save(self):
        """What a later call needs to go on, whole or not at all."""
        state = dict(
            fingerprint=self.fingerprint,
            facts=facts_of(self.args),
            lens=self.lens.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "unfinished.tmp"
        torch.save(state, temporary)
        temporary.replace(self.folder / "unfinished.pt")

    def resume(self):
        """Go on where an interrupted training of the same model with the same options was; else from the start."""
        file = self.folder / "unfinished.pt"
        if not file.is_file():
            return
        with explain(f"{file}: cannot be read", "delete it to start again"):
            state = torch.load(file, self.model.device, weights_only=True)
        if state["fingerprint"] != self.fingerprint or state["facts"] != facts_of(self.args):
            return
        self.lens.load_state_dict(state["lens"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        print(f"{file}: resuming after step {self.step}")

    def run(self, rollouts):
        """All steps that are left; each takes the next --batch_answers rows of rollouts."""
        args = self.args
        steps = range(self.step + 1, args.max_steps + 1)
        bar = tqdm(steps, "training the lens", total=args.max_steps, initial=self.step, disable=None)
        for step in bar:
            rows = rows_of_step(step, len(rollouts.ids), args.batch_answers, args.seed)
            mean_loss = self.add_gradients(rollouts, rows)
            bar.set_postfix_str(f"KL {mean_loss:.3f} nats")
            for group in self.optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - (step - 1) / args.max_steps)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step = step
            if step % SAVED_EVERY == 0:
                self.save()

    def add_gradients(self, rollouts, rows):
        """Gradients of the mean loss over the tokens of some rows, of all translators -> this loss, over the blocks."""
        streams, _, targets = streams_of(self.model, rollouts, rows)
        N = len(targets)
        blocks_below = len(streams) - 1
        total = 0.0
        for piece in torch.arange(N, device=targets.device).split(CHUNK_TOKENS):
            with torch.no_grad():
                final_logps = whole_policy(self.model, streams[-1][piece], self.args.temperature)
            for k in range(blocks_below):
                read = read_through("tuned", self.model, self.lens, k, streams[k][piece])
                share = loss(log_policy(self.model, read, self.args.temperature), final_logps) / N
                share.backward()
                total += share.item() / blocks_below
        return total


def rows_of_step(step, n, size, seed):
    """The answers of a step, a list of row numbers: every pass through all n goes in an order of its own."""
    rows = []
    for i in range((step - 1) * size, step * size):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(bookkeeping.step_seed(seed, i // n)))
        rows.append(int(order[i % n]))
    return rows


def tuned_lens(path, model, tokenizer, args):
    """The lens of a model: read where it lies, or trained on answers to --num_samples training problems."""
    folder = lens_folder(path)
    if not args.overwrite:
        lens, facts = load_lens(folder, model)
        if lens is not None:
            print(f"{folder}: read, {facts['max_steps']} steps on {facts['data']}{unlike(facts, args)}")
            return lens
    training = Training(model, folder, args)
    if not args.overwrite:
        training.resume()
    with explain(f"{folder}: cannot be written", "analyze a copy of the model elsewhere", OSError):
        training.save()
        training.run(sample(model, tokenizer, "train", args))
        save_lens(training.lens, folder, model, facts_of(args))
    (folder / "unfinished.pt").unlink()
    return training.lens


def unlike(facts, args):
    """What is to be said of a lens that lies there: which options it was trained with that this command has not."""
    wanted = facts_of(args)
    others = [f"--{name} {value!r}" for name, value in facts.items() if value != wanted.get(name, value)]
    if others:
        return f", and with {', '.join(others)}; --overwrite trains it as this command says"
    return "; --overwrite trains it again"


def sample(model, tokenizer, split, args):
    """An answer of the model itself to each of --num_samples problems -> Rollouts."""
    import analyze_entropy

    problems = tasks.load_problems(args.data, split, args.num_samples, args.system_prompt, labels=False)
    return analyze_entropy.sample_answers(model, tokenizer, problems, args)


# ---------------------------------------------------------------------------------------------------------------------
# What the lenses see
# ---------------------------------------------------------------------------------------------------------------------

MEASURED = {
    "kl": "KL(whole || lens)",
    "entropy": "entropy",
    "agrees": "top is whole's",
    "sampled": "top is sampled",
}


@torch.no_grad()
def compare(model, lens, rollouts, args):
    """Every lens after every block, on the completion tokens of rollouts.

    -> dict: tokens; for each of LENSES, a dict: for each of MEASURED, mean and standard_error, lists over the L blocks.
    """
    L = len(backbone_of(model).layers)
    answers = len(rollouts.ids)
    sums = {name: {kind: torch.zeros(L, answers).double() for kind in MEASURED} for name in LENSES}
    for rows in common.micro_batches(rollouts, range(answers), args.micro_batch_tokens):
        streams, row_of, targets = streams_of(model, rollouts, rows)
        for piece in torch.arange(len(targets), device=targets.device).split(CHUNK_TOKENS):
            final_logps = whole_policy(model, streams[-1][piece], args.temperature)
            for name, k in itertools.product(LENSES, range(L)):
                read = read_through(name, model, lens, k, streams[k][piece])
                logps = log_policy(model, read, args.temperature)
                for kind, values in measure(logps, final_logps, targets[piece]).items():
                    sums[name][kind][k].index_add_(0, row_of[piece].cpu(), values.double().cpu())
    tokens = rollouts.mask.sum(1).double().cpu()
    found = dict(tokens=int(tokens.sum()))
    for name in LENSES:
        found[name] = {}
        for kind in MEASURED:
            mean, error = clustered_mean(sums[name][kind], tokens)
            found[name][kind] = dict(mean=mean.tolist(), standard_error=None if error is None else error.tolist())
    return found


def measure(logps, final_logps, targets):
    """What MEASURED names at n positions -> name: [n]. logps of a lens and final_logps of the whole policy are [n, V],
    targets [n]."""
    top = logps.argmax(-1)
    return dict(
        kl=kl_from_whole(logps, final_logps),
        entropy=-(logps.exp() * logps).sum(-1),
        agrees=(top == final_logps.argmax(-1)).float(),
        sampled=(top == targets).float(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Table and figure
# ---------------------------------------------------------------------------------------------------------------------


def table(result):
    """The numbers of one model as text, a line per block, and below each its standard errors."""
    lines = [f"{result['model']}: {result['tokens']} tokens, {result['answers']} held-out answers"]
    lines.append("".join(["block", *(f"{f'{kind} {name}':>16}" for kind in MEASURED for name in LENSES)]))
    for k in range(len(result["raw"]["kl"]["mean"])):
        values = f"{k:5d}"
        errors = "    ±"
        for kind in MEASURED:
            for name in LENSES:
                found = result[name][kind]
                values += f"{found['mean'][k]:16.3f}"
                errors += f"{found['standard_error'][k]:16.3f}" if found["standard_error"] else " " * 16
        lines += [values, errors]
    return "\n".join(lines)


TITLES = {
    "kl": "held-out KL(whole policy || lens), nats",
    "entropy": "entropy of the lens, nats",
    "agrees": "its favourite is the whole policy's, share",
}


def draw_lenses(results):
    """A row of panels per model: KL, entropy and favourite of every lens over the blocks."""
    figure, axes = figures.panels(len(results), len(TITLES), 12, 0.8 + 3.2 * len(results))
    for result, row in zip(results, axes):
        for axis, (kind, title) in zip(row, TITLES.items()):
            for i, name in enumerate(LENSES):
                lowest = 1e-5 if kind == "kl" else -1.0
                draw_curve(axis, result[name][kind], name, figures.style_of(i), lowest)
            axis.set(title=title, xlabel="block k, 0-based")
            if kind == "kl":
                figures.logarithmic(axis.set_yscale, axis.yaxis)
        row[0].set_ylabel(result["model"])
    figures.legend_below(figure, axes[0][0], len(LENSES))
    return figure


def draw_curve(axis, found, name, style, lowest):
    """One lens over the blocks, with a band of one standard error. Values of `lowest` or less are left out: a KL of 0,
    at the top, has no logarithm."""
    mean = found["mean"]
    errors = found["standard_error"] or [0.0] * len(mean)
    blocks = [k for k in range(len(mean)) if mean[k] > lowest]
    low = [max(lowest, mean[k] - errors[k]) for k in blocks]
    high = [mean[k] + errors[k] for k in blocks]
    axis.plot(blocks, [mean[k] for k in blocks], **style, markersize=4, label=f"{name} lens")
    axis.fill_between(blocks, low, high, color=style["color"], alpha=0.25, linewidth=0)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""
    parser = analysis_parser(__doc__)
    add = parser.add_argument
    add("models", nargs="*", default=["embedded"], help="run folders, checkpoints, hub ids, 'embedded'")
    add("--data", help="problems, as for the training scripts; for embedded models: arithmetic")
    add("--num_samples", type=int, default=256, help="answers that are sampled, to train on and to measure on")
    add("--max_steps", type=int, default=500, help="training steps")
    add("--batch_answers", type=int, default=8, help="answers per training step")
    add("--learning_rate", type=float, default=1e-3, help="Adam's first step size, which falls to 0 in a straight line")
    add("--overwrite", action="store_true", help="train again what lies there")
    add("--output_dir", default="runs/lens", help="folder of lens.json and lens.png")
    add_shared_options(parser, SHARED)
    args = parse_for_models(parser, argv, lambda found: found.models, EMBEDDED, SHARED)
    refuse_below(parser, args, dict(num_samples=1, max_steps=1, batch_answers=1))
    if not 0 < args.learning_rate < 1:
        parser.error(f"--learning_rate {args.learning_rate}: must be above 0 and below 1")
    if not args.data:
        parser.error("--data: needed; only embedded models have a default")
    return args


def look_at(path, args):
    """Train or read the lens of one model, compare it with the others -> its part of lens.json."""
    model, tokenizer = load_model(path, args.device, args.dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if len(backbone_of(model).layers) < 2:
        raise UserError(f"{path}: has a single block, and nothing to translate; take a model of two or more")
    lens = tuned_lens(path, model, tokenizer, args)
    rollouts = sample(model, tokenizer, "test", args)
    return dict(model=path, answers=len(rollouts.ids), **compare(model, lens, rollouts, args))


def main(args):
    check_folder(args.output_dir, ("lens.json", "lens.png"))
    if "embedded" in args.models:
        import sft

        sft.ensure_embedded()
    folder = make_output_folder(args.output_dir)
    results = []
    for path in dict.fromkeys(args.models):
        results.append(look_at(path, args))
    write_json(folder / "lens.json", dict(args=vars(args), models=results))
    figures.save_figures(folder, {"lens": draw_lenses(results)})
    for result in results:
        print("\n" + table(result))
    print(f"\n{folder}: lens.json, lens.png")


if __name__ == "__main__":
    with one_line_errors():
        main(parse())

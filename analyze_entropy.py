"""Look inside: the entropy of every internal policy of a language model (BuPO, https://arxiv.org/abs/2512.19673).

The residual stream S is a sum, and each part of it, read through the unembedding matrix E_u, is a distribution over the
next token. H[x] is the entropy of softmax(x E_u^T) in nats, a mean over completion tokens. For block k:
    M_k = S_(k-1) + A_k,    S_k = M_k + F_k                   attention adds A_k to the stream, the feed-forward net F_k
    dH_layer = H[S_k] - H[S_(k-1)]                            S_k is the internal layer policy that bupo.py trains
    dH_attn  = H[A_k] - H[norm1_k(S_(k-1))]                   a module against what it read: the stream, normed by
    dH_ffn   = H[F_k] - H[norm2_k(M_k)]                       the block itself
    KL(pi_k || pi),    argmax pi_k = o_t or o_(t-1),    cos(A_k, S_(k-1)),    cos(F_k, M_k)

Blocks are 0-based as in the code: block k is the paper's layer k + 1. entropy.json calls S_(k-1), M_k, S_k, A_k and F_k
resid_pre, resid_mid, resid_post, attn_out and mlp_out, and what the modules read attn_in and mlp_in. Position t is the
distribution that produced token t; the first completion token and the end token count. --norm adds the same numbers
with the model's final norm applied to every activation, the usual logit lens; their names start with normed_. Every
mean comes with its standard error (see plumbing/clusters.py): tokens of one answer are not independent.

    python analyze_entropy.py                                # the embedded model, no GPU, no network: seconds
    python analyze_entropy.py runs/tiny runs/bupo --norm     # before and after training
    python analyze_entropy.py runs/tiny runs/bupo/checkpoint-*
    python analyze_entropy.py Qwen/Qwen3-4B --data math500.jsonl --num_samples 100
    python analyze_entropy.py HuggingFaceTB/SmolLM2-135M --data words --norm --max_positions 500      # no GPU: minutes
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections import defaultdict

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch
import torch.nn.functional as F
from tqdm import tqdm

import bookkeeping
import common
import tasks
from plumbing import distributed, figures
from plumbing.clusters import clustered_mean
from plumbing.errors import UserError, one_line_errors
from plumbing.files import check_folder, make_output_folder, write_json
from plumbing.models import backbone_of, encode, load_model, tokenize_problems
from plumbing.options import ASKING, add_shared_options, analysis_parser, parse_for_models, refuse_below
from tasks.data_files import problem_from_row, read_rows

# Overrides of the defaults when all models are embedded ones.
EMBEDDED = dict(data=tasks.DEFAULT, system_prompt="", max_completion_length=64)

# dH: entropy of what comes out minus entropy of what goes in.
CHANGES = {
    "layer": ("resid_post", "resid_pre"),
    "attn": ("attn_out", "attn_in"),
    "ffn": ("mlp_out", "mlp_in"),
}

# Changes within this share of the largest one, of either sign, count as none. Relative, because families differ
# fifty-fold in scale: the paper's figures span +4 to -10 nats for Qwen3-4B and +-0.2 for Llama.
TOLERANCE = 0.02

# Positions projected at once: products should be large enough to be worth reading the head from memory. Then positions
# whose logits become a policy at once: on a CPU so few that they stay in the caches until the entropy is known.
CHUNK_TOKENS = {"cpu": 128, "cuda": 512}
SLICE_TOKENS = {"cpu": 16, "cuda": 512}

BAR = "looking inside {percentage:3.0f}% {bar} {remaining} left"

AUTO_POSITIONS = 2048  # token positions that `bupo.py --internal_layer auto` looks at, at most

# ---------------------------------------------------------------------------------------------------------------------
# What a forward pass shows
# ---------------------------------------------------------------------------------------------------------------------


def blocks_of(model):
    """The L blocks of a model. Raises UserError naming the class if they lack a part that is hooked here."""
    blocks = backbone_of(model).layers
    for part in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
        if not all(hasattr(block, part) for block in blocks):
            name = type(model).__name__
            raise UserError(f"{name}: its blocks have no {part}; use a Qwen2-, Qwen3- or Llama-like model")
    return blocks


@contextlib.contextmanager
def watch(blocks, positions, visit):
    """While this context lasts, a forward pass calls visit(k, at) behind every block k, lowest first.

    positions [N]: where to look, indices into the B*T positions of the batch. at: label -> [N, D], for the seven labels
    of the module docstring. `at` serves one block: what visit does not keep is freed before the next block is through.
    """
    at = {}

    def keep(after, before=None):
        """A hook that keeps a module's output, and its input where `before` names it."""

        def hook(module, inputs, output):
            if before:
                at[before] = inputs[0].flatten(0, 1)[positions]
            if isinstance(output, tuple):
                output = output[0]
            at[after] = output.flatten(0, 1)[positions]

        return hook

    def finish(k):
        """A hook behind all others of block k."""

        def hook(module, inputs, output):
            visit(k, at)
            at.clear()

        return hook

    handles = []
    for k, block in enumerate(blocks):
        handles.append(block.input_layernorm.register_forward_hook(keep("attn_in", before="resid_pre")))
        handles.append(block.self_attn.register_forward_hook(keep("attn_out")))
        handles.append(block.post_attention_layernorm.register_forward_hook(keep("mlp_in", before="resid_mid")))
        handles.append(block.mlp.register_forward_hook(keep("mlp_out")))
        handles.append(block.register_forward_hook(keep("resid_post")))
        handles.append(block.register_forward_hook(finish(k)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_sum(model, k, at, before, added, after):
    """Raise UserError unless before + added = after: some models norm or scale what a module adds to the stream."""
    rest = at[before] + at[added] - at[after]
    if rest.norm() > 0.01 * at[after].norm():
        raise UserError(
            f"{type(model).__name__}: in block {k}, {before} + {added} is not {after}, so that its numbers "
            "would be wrong; use a Qwen2-, Qwen3- or Llama-like model"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


class Lens:
    """A way to show states x [n, D] to the head: logits = factor(x) E_u (weight * x), at the temperature.

    As they are, the weight is 1 and the factor 1 / temperature. `normed_`: the weight is the final norm's, and the
    factor also divides by the root mean square of x. Either way E_u (weight * x), here called the product, is linear in
    x: that of the stream is the running sum of those of its parts. A factor is one number a position and comes last.

    Two lenses share no product: every coordinate of x has its own weight, so neither can be had from the other.
    """

    def __init__(self, name, model, temperature):
        self.name = name
        self.model = model
        self.temperature = temperature
        self.norm = backbone_of(model).norm if name == "normed_" else None
        if self.norm is not None:
            self.check_norm()

    def check_norm(self):
        """Raise UserError unless the final norm is the one that `product` and `factor` assume."""
        states = torch.linspace(-1, 2, self.model.config.hidden_size, device=self.model.device, dtype=self.model.dtype)
        expected = self.norm(states[None])
        if not torch.allclose(self.weighted(states) * self.rms_factor(states), expected.float(), rtol=0.02, atol=1e-3):
            name = type(self.model).__name__
            raise UserError(f"{name}: its final norm is no RMS norm; use a Qwen2-, Qwen3- or Llama-like model")

    def weighted(self, states):
        return states * self.norm.weight

    def rms_factor(self, states):
        mean_square = states.float().square().mean(-1, keepdim=True)
        return torch.rsqrt(mean_square + self.norm.variance_epsilon)

    def product(self, states):
        """[n, D] -> [n, V], linear in the states."""
        if self.norm is not None:
            states = self.weighted(states)
        return common.head_logits(self.model, states)

    def factor(self, states):
        """[n, D] -> [n, 1]."""
        if self.norm is None:
            return torch.full((len(states), 1), 1 / self.temperature, device=states.device)
        return self.rms_factor(states) / self.temperature


def policy(logits):
    """[n, V] -> (probabilities [n, V], entropy [n]). Overwrites the logits."""
    logits -= logits.amax(-1, keepdim=True)
    p = logits.softmax(-1)
    # log p = logit + log p_top, since the top logit is 0 now: half the time of log_softmax and exp, which shows beside
    # the head's product. Both terms have the same sign, so nothing cancels.
    log_p_top = p.amax(-1).log()
    entropy = -(log_p_top + logits.mul_(p).sum(-1))
    return p, entropy


@dataclasses.dataclass
class Positions:
    """N token positions that are looked at; every field is [N]."""

    answers: torch.Tensor  # the row of rollouts that a position belongs to
    counted: torch.Tensor  # True where it counts for the means: else only the heat map wants it
    targets: torch.Tensor  # the token that was sampled there
    inputs: torch.Tensor  # the token before, the newest that the model has read

    def __getitem__(self, piece):
        return Positions(self.answers[piece], self.counted[piece], self.targets[piece], self.inputs[piece])


class Measurement:
    """Sums over each answer's tokens of what is measured, by name and depth: 0 the embedding, k + 1 block k, L + 1 the
    whole policy. Values are fp32, sums fp64.
    """

    def __init__(self, model, temperature, norm, answers, heat_answer, bar):
        self.model = model
        self.temperature = temperature
        self.blocks = blocks_of(model)
        self.depths = len(self.blocks) + 2
        names = ["", "normed_"] if norm else [""]
        self.lenses = [Lens(name, model, temperature) for name in names]
        self.chunk = CHUNK_TOKENS[model.device.type]
        self.slice = SLICE_TOKENS[model.device.type]
        self.heat_answer = heat_answer
        self.bar = bar
        self.tokens = torch.zeros(answers, dtype=torch.float64, device=model.device)  # that count, of each answer
        self.sums = defaultdict(self.zeros)
        self.heat = {}  # name of a lens -> entropy and top token of one answer, [depths][T]
        for name in names:
            self.heat[name] = dict(entropy=self.rows(), top=self.rows())

    def zeros(self):
        return torch.zeros(self.depths, len(self.tokens), dtype=torch.float64, device=self.model.device)

    def rows(self):
        return [[] for _ in range(self.depths)]

    def add(self, name, depth, positions, values):
        """Add what was measured at each position to the sum of its answer, where it counts."""
        values = values.double() * positions.counted
        self.sums[name][depth].index_add_(0, positions.answers, values)

    def entropy(self, product, factor):
        """A lens's product [n, V] and factor [n, 1] -> entropy [n]."""
        found = []
        for rows, factors in zip(product.split(self.slice), factor.split(self.slice)):
            _, entropy = policy(rows * factors)
            found.append(entropy)
        return torch.cat(found)

    def add_policy(self, lens, depth, positions, product, factor, final_logps):
        """The policy of the stream at one depth, against the whole policy and the tokens around it."""
        found = []
        for rows, factors, final in zip(*(x.split(self.slice) for x in (product, factor, final_logps))):
            p, entropy = policy(rows * factors)
            top = p.argmax(-1)
            cross = p.mul_(final).sum(-1)
            found.append((entropy, -entropy - cross, top))
        entropy, kl, top = common.concatenate(found)
        self.add(f"{lens.name}entropy_resid_post", depth, positions, entropy)
        self.add(f"{lens.name}kl_to_final", depth, positions, kl)
        self.add(f"{lens.name}top_is_sampled", depth, positions, top == positions.targets)
        self.add(f"{lens.name}top_is_input", depth, positions, top == positions.inputs)
        shown = positions.answers == self.heat_answer
        self.heat[lens.name]["entropy"][depth] += entropy[shown].tolist()
        self.heat[lens.name]["top"][depth] += top[shown].tolist()

    def add_block(self, lens, k, positions, at, stream, final_logps):
        """Entropies of what block k reads, adds and leaves. `stream` [n, V], its product, grows by what it adds."""
        for read, added, after in (("attn_in", "attn_out", "resid_mid"), ("mlp_in", "mlp_out", "resid_post")):
            factor = lens.factor(at[read])
            self.add(f"{lens.name}entropy_{read}", k + 1, positions, self.entropy(lens.product(at[read]), factor))
            part = lens.product(at[added])
            self.add(f"{lens.name}entropy_{added}", k + 1, positions, self.entropy(part, lens.factor(at[added])))
            stream += part
            if after == "resid_mid":
                entropy = self.entropy(stream, lens.factor(at[after]))
                self.add(f"{lens.name}entropy_{after}", k + 1, positions, entropy)
        top_of_stream = k + 1 == len(self.blocks)
        if not (top_of_stream and lens.norm is not None):  # that is the whole policy, which `add_all` adds
            self.add_policy(lens, k + 1, positions, stream, lens.factor(at["resid_post"]), final_logps)

    def add_all(self, positions, embedding, blocks):
        """Everything at some positions. embedding [n, D]; blocks: for each block, label -> [n, D]."""
        top_of_stream = len(self.blocks)  # the depth of the last block
        final = backbone_of(self.model).norm(blocks[-1]["resid_post"])
        final_logits = common.head_logits(self.model, final)
        ones = torch.full((len(final), 1), 1 / self.temperature, device=final.device)
        final_logps = F.log_softmax(final_logits * ones, dim=-1)  # [n, V]
        for lens in self.lenses:
            stream = lens.product(embedding)
            self.add_policy(lens, 0, positions, stream, lens.factor(embedding), final_logps)
            for k, at in enumerate(blocks):
                self.add_block(lens, k, positions, at, stream, final_logps)
                self.bar.update(len(final) / (len(self.blocks) * len(self.lenses)))
            if lens.norm is not None:
                self.add_policy(lens, top_of_stream, positions, final_logits, ones, final_logps)
            self.add_policy(lens, top_of_stream + 1, positions, final_logits, ones, final_logps)

    def measure_batch(self, rollouts, rows, counted):
        """One forward pass over some rows of rollouts. counted [B, T]: True at the tokens that count for the means."""
        used = rollouts.attention_mask[rows].any(0)  # columns that hold a token, whichever side is padded
        ids = rollouts.ids[rows][:, used]
        attention_mask = rollouts.attention_mask[rows][:, used]
        answers = torch.tensor(rows, device=ids.device)[:, None].expand(ids.shape)
        counted = counted[rows][:, used]
        looked_at = counted | (rollouts.mask[rows][:, used].bool() & (answers == self.heat_answer))
        predicts = looked_at[:, 1:]  # column t of the states predicts token t + 1
        positions = Positions(
            answers=answers[:, 1:][predicts],
            counted=counted[:, 1:][predicts],
            targets=ids[:, 1:][predicts],
            inputs=ids[:, :-1][predicts],
        )
        self.tokens.index_add_(0, positions.answers, positions.counted.double())
        blocks = []

        def visit(k, at):
            sums = (("resid_pre", "attn_out", "resid_mid"), ("resid_mid", "mlp_out", "resid_post"))
            for before, added, after in sums:
                check_sum(self.model, k, at, before, added, after)
                cosine = F.cosine_similarity(at[added].float(), at[before].float(), dim=-1)
                self.add(f"cosine_{added}", k + 1, positions, cosine)
            blocks.append(dict(at))
            if k > 0:
                del blocks[k]["resid_pre"]  # the block below has left the same

        with watch(self.blocks, predicts.flatten().nonzero()[:, 0], visit):
            common.hidden_states(self.model, ids[:, :-1], attention_mask[:, :-1])
        embedding = blocks[0]["resid_pre"]
        for piece in torch.arange(len(embedding), device=ids.device).split(self.chunk):
            parts = []
            for at in blocks:
                parts.append({label: states[piece] for label, states in at.items()})
            self.add_all(positions[piece], embedding[piece], parts)

    def means(self):
        """-> (mean, standard error): for each name a list over depths. Differences, too, with errors of their own."""
        for lens in self.lenses:
            # What a block reads is what the block below has left: one depth lower.
            self.sums[f"{lens.name}entropy_resid_pre"] = self.sums[f"{lens.name}entropy_resid_post"].roll(1, 0)
            for change, (after, before) in CHANGES.items():
                difference = self.sums[f"{lens.name}entropy_{after}"] - self.sums[f"{lens.name}entropy_{before}"]
                self.sums[f"{lens.name}dH_{change}"] = difference
        means = {}
        errors = {}
        for name, sums in self.sums.items():
            mean, error = clustered_mean(sums, self.tokens)
            means[name] = mean.tolist()
            errors[name] = None if error is None else error.tolist()
        return means, errors


def at_depth(means, errors, depth):
    """What `Measurement.means` has found at one depth: name -> mean, and under 'standard_error' name -> error."""
    here = {name: values[depth] for name, values in means.items()}
    here["standard_error"] = {name: values and values[depth] for name, values in errors.items()}
    return here


def choose_positions(mask, max_positions, seed):
    """mask [B, T] -> [B, T], True at the tokens to measure: all of them, or max_positions drawn at random."""
    chosen = mask.bool()
    tokens = chosen.flatten().nonzero()[:, 0]
    if not 0 < max_positions < len(tokens):
        return chosen
    drawn = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:max_positions]
    chosen = torch.zeros_like(chosen)
    chosen.view(-1)[tokens[drawn.to(mask.device)]] = True
    return chosen


@torch.no_grad()
def analyze(
    model,
    rollouts,
    temperature=1.0,
    norm=False,
    micro_batch_tokens=2**15,
    answer=0,
    max_positions=0,
    seed=0,
):
    """Measure every internal policy, softmax(logits / temperature), on the completion tokens of rollouts, or on
    max_positions of them: token means, and their standard errors, clustered by answer.

    -> dict: tokens; positions, how many of them were measured; final_entropy and final_top_is_sampled, of the whole
    policy; layers: a dict of floats per block; heat: for each lens, '' and with `norm` 'normed_', entropy and top token
    id, [L + 2][T], of row `answer` of rollouts: under the embedding, after blocks 0 to L-1, under the whole policy.

    One forward pass per batch. Against the head's products it costs next to nothing where the vocabulary is large, so
    these are what is saved: 4 a block and lens, of what its modules read and add (see Lens). The KL needs the whole
    policy, which comes last, and everything waits for it. So a batch holds micro_batch_tokens / L positions that are
    looked at, at least one answer, and the peak grows neither with the depth nor with the samples.
    """
    counted = choose_positions(rollouts.mask, max_positions, seed)
    rows = [row for row, wanted in enumerate(counted.any(1).tolist()) if wanted or row == answer]
    looked_at = int(counted.sum() + (rollouts.mask[answer].bool() & ~counted[answer]).sum())
    # Only what is looked at waits. So fewer positions mean longer batches: products of a few rows are slow.
    kept_share = looked_at / float(rollouts.mask.sum())
    budget = min(micro_batch_tokens, int(micro_batch_tokens // len(blocks_of(model)) / kept_share))
    batches = common.micro_batches(rollouts, rows, budget)
    with tqdm(total=looked_at, bar_format=BAR, leave=False, disable=None) as bar:  # silent in a log file
        measurement = Measurement(model, temperature, norm, len(rollouts.ids), answer, bar)
        for batch in batches:
            measurement.measure_batch(rollouts, batch, counted)
    means, errors = measurement.means()
    whole = at_depth(means, errors, -1)
    layers = []
    for k in range(len(measurement.blocks)):
        layers.append({"layer": k, **at_depth(means, errors, k + 1)})
    final = {"final_entropy": "entropy_resid_post"}
    final |= {f"final_{name}": name for name in ("top_is_sampled", "top_is_input")}
    return dict(
        tokens=int(rollouts.mask.sum()),
        positions=int(counted.sum()),
        **{name: whole[source] for name, source in final.items()},
        standard_error={name: whole["standard_error"][source] for name, source in final.items()},
        layers=layers,
        heat=measurement.heat,
    )


def stages(ffn_entropy_change):
    """What the FFN of every block does to the entropy, from its dH_ffn: a list of names.

    exploration: it adds more than a tolerance, TOLERANCE times the largest absolute change of any block. convergence:
    it takes away more than that. integration: neither.
    """
    largest = max(abs(change) for change in ffn_entropy_change)
    tolerance = TOLERANCE * largest
    names = []
    for change in ffn_entropy_change:
        if change > tolerance:
            names.append("exploration")
        elif change < -tolerance:
            names.append("convergence")
        else:
            names.append("integration")
    return names


def last_positive(ffn_entropy_change):
    """dH_ffn of every block -> the last block, 0-based, whose FFN adds any entropy at all: the paper's rule to the
    letter, which takes noise around 0 for exploration. None if there is none."""
    adding = [k for k, change in enumerate(ffn_entropy_change) if change > 0]
    return adding[-1] if adding else None


def boundary_layer(ffn_entropy_change):
    """dH_ffn of every block -> the last block, 0-based, whose FFN adds entropy, by more than the tolerance of `stages`:
    the one that the paper trains first. Raises UserError, with the numbers it rests on, if there is none."""
    explores = [k for k, stage in enumerate(stages(ffn_entropy_change)) if stage == "exploration"]
    if not explores:
        most = max(ffn_entropy_change)
        largest = max(ffn_entropy_change, key=abs)
        nearest = ffn_entropy_change.index(most)
        strongest = ffn_entropy_change.index(largest)
        raise UserError(
            "--internal_layer auto: there is no boundary block: no feed-forward net adds entropy (the nearest to it is "
            f"block {nearest} with {most:+.3f} nats; what is below {TOLERANCE:.0%} of the largest change, "
            f"{largest:+.3f} in block {strongest}, counts as none); choose a block by --internal_layer 0 to "
            f"{len(ffn_entropy_change) - 1}"
        )
    return explores[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Answers to look at
# ---------------------------------------------------------------------------------------------------------------------


def sample_answers(model, tokenizer, problems, args):
    """One completion of every problem from the model itself -> Rollouts. Drops prompts over --max_prompt_length."""
    template = json.loads(args.chat_template_kwargs)
    problems = tokenize_problems(tokenizer, problems, args.max_prompt_length, template)
    prompts = [problem.ids for problem in problems]
    seed = bookkeeping.step_seed(args.seed, "analysis")
    return common.sample(
        model,
        tokenizer,
        prompts,
        1,
        args.max_completion_length,
        args.temperature,
        args.max_rollout_tokens,
        seed=seed,
    )


def read_answers(tokenizer, args, device):
    """The first --num_samples rows of --completions -> Rollouts. A row holds 'problem' (text or messages), 'text' and,
    if it was cut, 'finished': false (else the end token follows), as in completions.jsonl of a run. Raises UserError.

    The text is tokenized afresh, which may split it otherwise than the model that wrote it did.
    """
    prompts = []
    completions = []
    for where, row in itertools.islice(read_rows(args.completions), args.num_samples):
        problem = problem_from_row(where, {**row, "answer": ""}, labels=False)
        tasks.add_system_prompt([problem], args.system_prompt)
        completion = read_completion(tokenizer, where, row)
        prompts.append(encode(tokenizer, problem.prompt, json.loads(args.chat_template_kwargs)))
        completions.append(completion[: args.max_completion_length])
    if not prompts:
        raise UserError(f"{args.completions}: holds no completion; every line needs a 'problem' and a 'text'")
    return common.assemble(prompts, completions, tokenizer.pad_token_id, device)


def read_completion(tokenizer, where, row):
    """Token ids of a row's text, with the end token if it was finished. Raises UserError."""
    text = row.get("text")
    finished = row.get("finished", True)
    if not isinstance(text, str) or not (text or finished):
        raise UserError(f"{where}: no completion; put text into 'text' (found fields {', '.join(row)})")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if finished and tokenizer.eos_token_id is not None:
        ids = ids + [tokenizer.eos_token_id]
    return ids


@distributed.by_first
def auto_layer(args):
    """For `bupo.py --internal_layer auto`: the boundary layer of --model on 64 training problems, with bupo's options,
    under the lens that phase one trains. Raises UserError if there is none.

    Measured on the starting model, also when a run resumes, so that it finds the same block.
    """
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    problems = tasks.load_problems(args.data, "train", 64, args.system_prompt)
    rollouts = sample_answers(model, tokenizer, problems, args)
    measured = analyze(
        model,
        rollouts,
        args.temperature,
        norm=args.internal_norm,
        micro_batch_tokens=args.micro_batch_tokens,
        max_positions=AUTO_POSITIONS,
        seed=bookkeeping.step_seed(args.seed, "positions"),
    )
    dH = "normed_dH_ffn" if args.internal_norm else "dH_ffn"
    layers = measured["layers"]
    layer = boundary_layer([here[dH] for here in layers])
    print(found_layer(layer, layers, dH, measured["positions"]))
    return layer


def found_layer(layer, layers, dH, positions):
    """One line: which block is the boundary, and the numbers that this rests on. dH: name of the change."""
    lens = "final norm applied" if dH.startswith("normed_") else "no norm"
    line = f"--internal_layer auto: block {layer} of 0 to {len(layers) - 1}, the last whose feed-forward net adds "
    line += f"entropy ({number(layers[layer], dH)} nats"
    if layer + 1 < len(layers):
        above = max(layers[layer + 1 :], key=lambda here: here[dH])
        line += f"; above it at most {number(above, dH)}, in block {above['layer']}"
    line += f"; {lens}, {positions} tokens)"
    plain = last_positive([here[dH] for here in layers])
    if plain is not None and plain > layer:
        line += f"; by its sign alone it would be block {plain}, which adds {number(layers[plain], dH)}"
    if layer + 1 == len(layers) and dH.startswith("normed_"):
        line += "; that is the whole policy, and phase one will be GRPO: better choose a lower block"
    return line


def number(here, name):
    """A change and its standard error, as text."""
    error = here["standard_error"][name]
    return f"{here[name]:+.3f}" if error is None else f"{here[name]:+.3f} ±{error:.3f}"


# ---------------------------------------------------------------------------------------------------------------------
# Table
# ---------------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "entropy": "entropy_resid_post",
    "dH layer": "dH_layer",
    "dH attn": "dH_attn",
    "dH ffn": "dH_ffn",
    "KL": "kl_to_final",
    "top=sampled": "top_is_sampled",
    "top=input": "top_is_input",
    "cos attn": "cosine_attn_out",
    "cos ffn": "cosine_mlp_out",
}


WHOLE_COLUMNS = {  # those that the whole policy has
    "entropy_resid_post": "final_entropy",
    "top_is_sampled": "final_top_is_sampled",
    "top_is_input": "final_top_is_input",
}


def table(result):
    """The numbers of one model as text, one line per block, and below each its standard errors."""
    counts = f"{result['tokens']} tokens, {result['answers']} answers"
    if result["positions"] < result["tokens"]:
        counts += f", of which {result['positions']} tokens at random were measured"
    lines = [f"{result['model']}: {counts}, ln|V| {result['ln_vocab']:.2f}"]
    lines.append("block" + "".join(f"{title:>12}" for title in COLUMNS) + "  stage")
    for here in result["layers"]:
        stage = here["stage"]
        if here["layer"] == result["boundary_layer"]:
            stage += ", boundary layer"
        if here["layer"] == result["last_positive"]:
            stage += ", last above 0"
        lines += two_lines(f"{here['layer']:5d}", here, COLUMNS.values(), f"  {stage}")
    lines += two_lines("whole", result, [WHOLE_COLUMNS.get(name) for name in COLUMNS.values()])
    return "\n".join(lines)


def two_lines(label, here, names, behind=""):
    """A line of numbers, and one of their standard errors. A name that is None leaves its column empty."""
    values = label
    errors = "    ±"
    for name in names:
        values += cell(here.get(name))
        errors += cell(here["standard_error"].get(name))
    return [(values + behind).rstrip(), errors.rstrip()]


def cell(value):
    """A number in 12 columns; blanks for None."""
    return " " * 12 if value is None else f"{value:12.3f}"


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------

SHADES = {"exploration": "#fde8bd", "integration": "white", "convergence": "#c3d1e4"}  # told apart in grey, too

POLICIES = {
    "resid_post": "layer policy: the stream S_k",
    "attn_out": "attention policy: A_k",
    "mlp_out": "feed-forward policy: F_k",
}


def model_style(i, n):
    """How model i of n is drawn: dark to light, so that the order shows in grey, with a marker of its own."""
    from matplotlib import colormaps

    shade = 0.85 * i / max(1, n - 1)
    return dict(color=colormaps["viridis"](shade), marker="osD^vP*X"[i % 8], markersize=5)


def over_blocks(axis, L, **settings):
    """Name the blocks on the x axis, at most about twelve of them."""
    every = math.ceil(L / 12)
    axis.set(xlabel="block k, 0-based (the paper's layer k + 1)", xticks=range(0, L, every), **settings)


def draw_flow(results):
    """Entropy of the three policies of every block, models overlaid; with --norm a second row under the final norm."""
    lenses = list(results[0]["answer"]["lenses"])
    L = max(len(result["layers"]) for result in results)
    figure, axes = figures.panels(len(lenses), 3, 12, 3.6 * len(lenses) + 0.4, sharey=True)
    for lens, row in zip(lenses, axes):
        for axis, (label, title) in zip(row, POLICIES.items()):
            draw_policy(axis, results, lens, label)
            draw_ceilings(axis, results, (L - 1) / 2)
            if lens:
                title += "\nfinal norm applied"
            margin = 1 + 0.03 * L
            over_blocks(axis, L, title=title, xlim=(-0.5 - margin, L - 0.5 + margin))
    first = axes[0][0]
    first.plot([], [], "k*", markersize=11, label="whole policy")
    first.plot([], [], "ko", fillstyle="none", linestyle="", label="embedding, before block 0")
    first.fill_between([], [], color="black", alpha=0.3, linewidth=0, label="± one standard error")
    top = max(result["ln_vocab"] for result in results)
    first.set(ylabel="entropy (nats per token)", ylim=(-0.05 * top, 1.12 * top))
    figures.legend_below(figure, first, 5)
    return figure


def draw_policy(axis, results, lens, label):
    """One kind of internal policy of all models; the stream's also with its two ends, embedding and whole policy."""
    for i, result in enumerate(results):
        style = model_style(i, len(results))
        values = [here[f"{lens}entropy_{label}"] for here in result["layers"]]
        axis.plot(values, **style, label=result["model"])
        band(axis, values, errors_of(result["layers"], f"{lens}entropy_{label}"), style["color"])
        if label == "resid_post":
            embedding = result["layers"][0][f"{lens}entropy_resid_pre"]
            axis.plot([-1], [embedding], **style, fillstyle="none")
            star = style | dict(marker="*", markersize=13)
            axis.plot([len(values)], [result["final_entropy"]], **star)


def errors_of(layers, name):
    """Standard error of a number in every block; 0 where there is none, for a single answer."""
    return [here["standard_error"][name] or 0.0 for here in layers]


def band(axis, values, errors, color):
    """Shade one standard error on either side of a curve over the blocks."""
    low = [value - error for value, error in zip(values, errors)]
    high = [value + error for value, error in zip(values, errors)]
    axis.fill_between(range(len(values)), low, high, color=color, alpha=0.3, linewidth=0)


def draw_ceilings(axis, results, middle):
    """The largest entropy there can be, once for every size of vocabulary."""
    for ceiling in {result["ln_vocab"] for result in results}:
        axis.axhline(ceiling, color="black", linestyle=":")
        axis.annotate(
            f"uniform: ln|V| = {ceiling:.2f}",
            (middle, ceiling),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )


def draw_changes(results):
    """dH_attn and dH_ffn of every block, a panel per model: zero line, stages shaded, boundary layer marked."""
    from matplotlib.patches import Patch

    figure, axes = figures.panels(len(results), 1, 8, 1 + 2.8 * len(results), sharey=True)
    for result, axis in zip(results, axes[:, 0]):
        layers = result["layers"]
        for here in layers:
            k = here["layer"]
            axis.axvspan(k - 0.5, k + 0.5, color=SHADES[here["stage"]], linewidth=0)
        axis.axhline(0, color="black", linewidth=1)
        attn = [here["dH_attn"] for here in layers]
        ffn = [here["dH_ffn"] for here in layers]
        axis.plot(attn, "o--", color="0.35", fillstyle="none", label="attention: H[A_k] - H[what it read]")
        axis.plot(ffn, "ks-", label="feed-forward: H[F_k] - H[what it read]")
        band(axis, attn, errors_of(layers, "dH_attn"), "0.35")
        band(axis, ffn, errors_of(layers, "dH_ffn"), "black")
        mark_boundary(axis, result["boundary_layer"], len(layers))
        limits = (-0.5, len(layers) - 0.5)
        over_blocks(axis, len(layers), title=result["model"], ylabel="entropy change (nats, ± s.e.)", xlim=limits)
    shades = [Patch(facecolor=shade, edgecolor="0.6", label=f"{name} (by FFN)") for name, shade in SHADES.items()]
    curves = axis.lines[1:3]
    figure.legend(handles=[*curves, *shades], loc="outside lower center", ncols=3, fontsize=9)
    return figure


def mark_boundary(axis, k, L):
    """A dotted line at the boundary layer, named on the side that has more room; nothing without one."""
    if k is None:
        return
    axis.axvline(k, color="black", linestyle=":")
    side = "right" if 2 * k > L else "left"
    place = dict(xycoords=("data", "axes fraction"), va="top", ha=side)
    axis.annotate(f" boundary layer: block {k} ", (k, 0.97), **place)


LONGEST_SPELT = 60  # tokens: in a longer answer the cells would be too small to read


def draw_answer(result):
    """Layer x token heat map of an answer's entropies. Short answers: the top token of every policy in its cell, framed
    where it is the token that was sampled."""
    tokens = result["answer"]["tokens"]
    lenses = result["answer"]["lenses"]
    L = len(result["layers"])
    spelt = len(tokens) <= LONGEST_SPELT
    if spelt:
        width = max(8, 2.5 + 0.42 * len(tokens))
        row_height = 0.3
    else:
        width = 14
        row_height = 0.2
    figure, axes = figures.panels(len(lenses), 1, width, (1 + row_height * (L + 2)) * len(lenses))
    for (lens, heat), axis in zip(lenses.items(), axes[:, 0]):
        ceiling = result["ln_vocab"]
        # The lightness of this colour map rises with the value: it reads the same in grey.
        image = axis.imshow(heat["entropy"], aspect="auto", origin="lower", vmin=0, vmax=ceiling, cmap="viridis")
        axis.set_xlabel("position in the answer (tokens)")
        if spelt:
            spell_cells(axis, heat, tokens, ceiling)
        axis.set_yticks(range(L + 2), ["embedding", *(f"block {k}" for k in range(L)), "whole policy"], fontsize=8)
        title = f"{result['model']}: {result['answer']['prompt'][-80:]}"
        if lens:
            title += ", final norm applied"
        axis.set_title(title)
        figure.colorbar(image, ax=axis, label="entropy (nats)", pad=0.01)
    return figure


def spell_cells(axis, heat, tokens, ceiling):
    """Write every policy's top token into its cell, with a frame where it is the sampled token, which stands below."""
    from matplotlib.patches import Rectangle

    for depth, tops in enumerate(heat["top"]):
        for t, top in enumerate(tops):
            dark = heat["entropy"][depth][t] < 0.6 * ceiling
            ink = "white" if dark else "black"
            size = min(9, 48 / max(1, len(top)))  # a cell is 0.42 inches wide
            axis.text(t, depth, top, fontsize=size, color=ink, family="monospace", ha="center", va="center")
            if top == tokens[t]:
                axis.add_patch(Rectangle((t - 0.46, depth - 0.44), 0.92, 0.88, fill=False, edgecolor=ink))
    axis.set_xticks(range(len(tokens)), tokens, family="monospace", fontsize=8)
    axis.set_xlabel("sampled token; above it, each policy's top token where it was produced, framed if the same")


def draw_training(start, later):
    """What training changed: entropy after every block, dH_attn and dH_ffn of later models, minus the start's. Bands
    take the answers of two models as independent: sqrt(error_1^2 + error_2^2)."""
    titles = {"entropy_resid_post": "entropy after block k", "dH_attn": "dH_attn", "dH_ffn": "dH_ffn"}
    figure, axes = figures.panels(1, 3, 12, 4)
    for axis, (name, title) in zip(axes[0], titles.items()):
        for i, result in enumerate(later):
            values = [after[name] - before[name] for after, before in zip(result["layers"], start["layers"])]
            pairs = zip(errors_of(result["layers"], name), errors_of(start["layers"], name))
            errors = [math.hypot(*pair) for pair in pairs]
            style = model_style(i, len(later))
            axis.plot(values, **style, label=result["model"])
            band(axis, values, errors, style["color"])
        axis.axhline(0, color="black", linewidth=1)
        over_blocks(axis, len(start["layers"]), title=f"change of {title}")
    axes[0][0].set_ylabel(f"minus {start['model']} (nats per token, ± s.e.)")
    figures.legend_below(figure, axes[0][0], 5)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Command line -> namespace. Raises UserError for unknown options and bad values."""
    parser = analysis_parser(__doc__)
    add = parser.add_argument
    add("models", nargs="*", default=["embedded"], help="run folders, checkpoints, hub ids, 'embedded'")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", help="problems, as for the training scripts; for embedded models: arithmetic")
    source.add_argument("--completions", help="look at these answers instead: .jsonl with 'problem' and 'text'")
    add("--num_samples", type=int, default=64, help="problems, the first so many, one answer each")
    add("--norm", action="store_true", help="also with the final norm applied to every activation: the logit lens")
    add("--max_positions", type=int, default=0, help="token positions measured, drawn at random by --seed; 0: all")
    add("--answer", type=int, default=0, help="which answer the heat map shows, from 0")
    add("--output_dir", default="runs/entropy", help="folder of entropy.json and the figures")
    add("--micro_batch_tokens", type=int, default=2**15, help="tokens x blocks per forward pass: bounds activations")
    add_shared_options(parser, ASKING)
    args = parse_for_models(parser, argv, lambda found: found.models, EMBEDDED, (*ASKING, "micro_batch_tokens"))
    refuse_below(parser, args, dict(num_samples=1, max_positions=0, answer=0))
    if not (args.data or args.completions):
        parser.error("--data: needed; only embedded models have a default")
    return args


def look_at(path, args):
    """Load a model, get its answers, measure -> its part of entropy.json."""
    model, tokenizer = load_model(path, args.device, args.dtype)
    blocks_of(model)  # complains before sampling takes its minutes
    if args.completions:
        rollouts = read_answers(tokenizer, args, model.device)
    else:
        problems = tasks.load_problems(args.data, "test", args.num_samples, args.system_prompt, labels=False)
        rollouts = sample_answers(model, tokenizer, problems, args)
    if args.answer >= len(rollouts.ids):
        raise UserError(f"--answer {args.answer}: there are answers 0 to {len(rollouts.ids) - 1}")
    measured = analyze(
        model,
        rollouts,
        args.temperature,
        args.norm,
        args.micro_batch_tokens,
        args.answer,
        args.max_positions,
        seed=bookkeeping.step_seed(args.seed, "positions"),
    )
    layers = measured["layers"]
    ffn = [here["dH_ffn"] for here in layers]
    for here, stage in zip(layers, stages(ffn)):
        here["stage"] = stage
    boundary = None
    if "exploration" in stages(ffn):
        boundary = boundary_layer(ffn)
    return dict(
        model=path,
        answers=len(rollouts.ids),
        ln_vocab=math.log(model.get_output_embeddings().weight.shape[0]),
        boundary_layer=boundary,
        last_positive=last_positive(ffn),
        answer=shown_answer(tokenizer, rollouts, args.answer, measured.pop("heat")),
        **measured,
    )


def shown_answer(tokenizer, rollouts, row, heat):
    """What the heat map of one answer needs: prompt, tokens, and the top tokens of every policy as short texts."""
    ids = rollouts.ids[row]
    mask = rollouts.mask[row].bool()
    first = int(mask.nonzero()[0])
    lenses = {}
    for lens, values in heat.items():
        lenses[lens] = dict(entropy=values["entropy"], top=[spell(tokenizer, tops) for tops in values["top"]])
    return dict(
        prompt=tokenizer.decode(ids[:first], skip_special_tokens=True),
        tokens=spell(tokenizer, ids[mask].tolist()),
        lenses=lenses,
    )


def spell(tokenizer, ids):
    """Token ids -> their texts, short and with visible white space."""
    return [figures.visible(tokenizer.decode([i]), 10) for i in ids]


def in_order(paths):
    """Checkpoints by step, in the places where checkpoints are: the shell puts checkpoint-100 before checkpoint-20."""
    paths = list(dict.fromkeys(paths))
    steps = {}
    for path in paths:
        found = re.search(r"checkpoint-(\d+)/*$", path)
        if found:
            steps[path] = int(found.group(1))
    by_step = iter(sorted(steps, key=steps.get))
    ordered = []
    for path in paths:
        ordered.append(next(by_step) if path in steps else path)
    return ordered


FIGURES = ("1_flow", "2_change", "4_training")  # and `answer_figure` for each of the models


def answer_figure(model):
    """Name of the figure of a model's answer."""
    return f"3_answer_{figures.file_name(model)}"


def file_names(args):
    """What a command may write."""
    names = ["entropy.json"]
    for name in (*FIGURES, *map(answer_figure, args.models)):
        names.append(f"{name}.png")
    return names


def draw_all(results):
    """File name -> figure."""
    drawn = {"1_flow": draw_flow(results), "2_change": draw_changes(results)}
    for result in results:
        drawn[answer_figure(result["model"])] = draw_answer(result)
    start = results[0]
    alike = [result for result in results[1:] if len(result["layers"]) == len(start["layers"])]
    if alike:
        drawn["4_training"] = draw_training(start, alike)
    return drawn


def main(args):
    check_folder(args.output_dir, file_names(args))
    if "embedded" in args.models:
        import sft

        sft.ensure_embedded()
    folder = make_output_folder(args.output_dir)
    results = []
    for path in in_order(args.models):
        results.append(look_at(path, args))
    write_json(folder / "entropy.json", dict(args=vars(args), models=results))
    drawn = draw_all(results)
    figures.save_figures(folder, drawn)
    for result in results:  # behind the files: what is on the screen shall be in the folder
        print("\n" + table(result))
    print(f"\n{folder}: entropy.json, " + ", ".join(f"{name}.png" for name in drawn))


if __name__ == "__main__":
    with one_line_errors():
        main(parse())

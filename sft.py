"""Imitation: cross-entropy on trajectories; the embedded model, which is built by it; and priming.

Objective, a mean over all completion tokens of a batch:
    L = -log pi(o_t | prompt, o_<t)

The embedded model imitates the teacher of tasks/arithmetic.py, who is imperfect on purpose: some of its
samples are better than the others, and the other scripts amplify what they do.

Priming (https://arxiv.org/abs/2503.01307) imitates trajectories that show chosen behaviours, before reinforcement
learning begins: do these decide whether it succeeds? Scripted solvers write them for arithmetic and Countdown, in the
notation that tasks/behaviours.py documents and counts, or in English where the prompt asks for tags. verification: a
step is checked by the inverse operation, a Countdown result against the target; backtracking: back after a slip or a
failed attempt; subgoal_setting: a part is named before it is made; backward_chaining: from the target, or the chain's
end, backwards. The solver of Countdown does not know the solution: it tries at random, stops when it has found one, and
sometimes gives up. Controls: searches that failed, answers without thinking, filler in place of thinking. Answers
without thinking are those of the same searches, right and wrong equally often.

A data row holds 'prompt' (or 'problem', 'question') and 'response', or 'messages' that end with the assistant's answer.

    python sft.py                                            # the embedded model into runs/tiny; the others call this
    python sft.py --direct --output_dir runs/direct          # a base that can calculate, and answers at once
    python sft.py --model runs/direct --behaviours verification backtracking --max_steps 200 --output_dir runs/primed
    python sft.py --model Qwen/Qwen3-0.6B --data trajectories.jsonl
"""

import dataclasses
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import plumbing.start  # noqa: F401, first: --help and Ctrl-C while the libraries load
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import bookkeeping
import common
import tasks
from plumbing import distributed
from plumbing.errors import UserError, one_line_errors
from plumbing.options import EMBEDDED_MODEL, RunArgs, option, parse
from plumbing.runs import step_of
from tasks.behaviours import BEHAVIOURS
from tasks.data_files import fields_of, is_prompt, read_rows, refuse_answered

# Overrides of the defaults below when the embedded model is built.
EMBEDDED = dict(
    output_dir=str(EMBEDDED_MODEL),
    system_prompt="",
    max_steps=800,
    num_prompts=32,
    learning_rate=5e-3,
    max_completion_length=512,
    micro_batch_tokens=1024,
    gradient_checkpointing=False,
    save_steps=500,
    save_total_limit=1,
    eval_steps=0,
)


@dataclass
class Args(RunArgs):
    output_dir: str = option("runs/sft", "folder of everything this run writes")
    max_steps: int = option(80, "optimizer steps", above=0)
    num_prompts: int = option(64, "trajectories per step", above=0)
    learning_rate: float = option(
        1e-5, "AdamW peak step size; a tenth of the steps warms up, a cosine decays to 0", at_least=0
    )
    direct: bool = option(False, "build a base that can calculate, and answers problems at once, by guessing")
    behaviours: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": f"prime with scripted trajectories that show any of {BEHAVIOURS}"}
    )
    wrong_answers_only: bool = option(False, "prime with trajectories whose answer is wrong (default: all behaviours)")
    empty: bool = option(False, "prime with the answers alone, without any thinking")
    filler: bool = option(False, "prime with dots in place of the thinking, as many characters")
    problems: int = option(
        0, "of built-in data, the first so many; 0: 20,000 of arithmetic, 4,096 of others", at_least=0
    )
    trajectories_per_problem: int = option(
        0, "as many are written once and drawn again and again; 0: always a new one", at_least=0
    )

    def __post_init__(self):
        super().__post_init__()
        for name in self.behaviours:
            if name not in BEHAVIOURS:
                raise UserError(f"--behaviours {name}: choose from {', '.join(BEHAVIOURS)}")
        if [self.direct, self.empty, self.filler].count(True) > 1:
            raise UserError("--direct, --empty, --filler: choose one")
        if self.wrong_answers_only or self.empty or self.filler:
            self.behaviours = self.behaviours or list(BEHAVIOURS)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded model
# ---------------------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def embedded_tokenizer():
    """One token per printable ASCII character, one for '\\boxed{', and the marks of a chat: any English text goes
    through."""
    special = ["<|pad|>", "<|end|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>"]
    characters = [chr(code) for code in range(32, 127)]
    words = [*special, "\\boxed{", "\n", *characters]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )


def build_embedded(folder, seed=0):
    """Save a randomly initialised Qwen3 of 0.7 M parameters (8 layers, width 80, a head of its own) and its tokenizer
    into folder.

    The internal policies of a large model become certain bit by bit. Those of a small one do so only if it begins like
    this: a head that is not the embedding, so that the first block need not erase the token it has read; small weights,
    smaller ones where a block writes to the residual stream (as in GPT-2); and a final norm that multiplies by 4 (in
    trained Qwen models it multiplies, too), so that the raw stream, which lacks it, need not be the sharper one.
    """
    tokenizer = embedded_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=80,
        intermediate_size=240,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.03,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        embedded=True,  # the mark by which the scripts know the embedded model and what was trained from it
    )
    model = Qwen3ForCausalLM(config)
    writes = 2 * config.num_hidden_layers  # every block writes twice to the stream, whose variance is their sum
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight /= math.sqrt(writes)
            block.mlp.down_proj.weight /= math.sqrt(writes)
        model.model.norm.weight *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@distributed.by_first
def ensure_embedded():
    """Build the embedded model, or finish building it, unless it is there: in runs/tiny below the current folder, where
    all runs lie."""
    args = Args(**EMBEDDED)
    folder = Path(args.output_dir)
    if step_of(folder) >= args.max_steps:
        return
    print(f"building the embedded model, once: {args.max_steps} steps, 2 to 4 minutes")
    print("its teacher forgets, slips and guesses: there is something to improve")
    print(f"it will lie in {folder.absolute()}")
    elsewhere = Path(__file__).resolve().parent / folder
    if elsewhere != folder.resolve() and step_of(elsewhere) >= args.max_steps:
        print(f"there is one in {elsewhere}, but scripts look for it below the folder they are started in")
    main(args)
    print()


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories
# ---------------------------------------------------------------------------------------------------------------------

DIRECT_PROBLEMS = 2048  # with --direct, beside the exercises: 1,710 of arithmetic, 3,026 of Countdown


@dataclass
class Trajectory(tasks.Problem):
    """A prompt with the completion to imitate."""

    response: str = ""  # '' for a built-in problem, whose completion is written anew at every visit
    problem: tasks.Problem | None = None  # that built-in problem


def load_trajectories(source, system_prompt="", limit=0, direct=False):
    """Trajectories of `source`: a built-in task's first `limit` problems, and if `direct` its exercises; or the rows of
    a JSONL file. Raises UserError."""
    if source in tasks.built_in():
        return built_in_trajectories(source, system_prompt, limit, direct)
    trajectories = [trajectory_from_row(where, row) for where, row in read_rows(source)]
    if not trajectories:
        raise UserError(f"{source}: holds no trajectory; every line must hold one JSON object")
    return tasks.add_system_prompt(trajectories, system_prompt)


def built_in_trajectories(source, system_prompt, limit, direct):
    """Trajectories of a built-in task, see `load_trajectories`. The exercises get no system prompt."""
    task = tasks.built_in()[source]
    if not limit:
        limit = DIRECT_PROBLEMS if direct else task.DEFAULT_TRAJECTORIES
    trajectories = []
    for problem in tasks.load_problems(source, "train", limit, system_prompt):
        trajectories.append(Trajectory(problem.prompt, problem.answer, problem.where, problem=problem))
    if direct:
        for prompt, response in task.exercises():
            trajectories.append(Trajectory(prompt, "", response=response))
    return trajectories


def trajectory_from_row(where, row):
    """One row -> Trajectory. where: the row's source, for messages. Raises UserError."""
    messages = row.get("messages")
    if is_prompt(messages) and messages[-1]["role"] == "assistant":
        prompt = messages[:-1]
        response = messages[-1]["content"]
    else:
        prompt = row.get("prompt") or row.get("problem") or row.get("question")
        response = row.get("response")
    if not is_prompt(prompt) or not isinstance(response, str) or not response:
        expected = "expected 'prompt' and 'response', or 'messages'"
        raise UserError(f"{where}: no trajectory; {expected}; {fields_of(row)}")
    refuse_answered(where, prompt)
    return Trajectory(prompt, "", where, response=response)


def write(problem, args, generator):
    """A completion of a built-in problem: by the task's scripted solver if --behaviours, else by its teacher."""
    task = tasks.built_in()[args.data]
    if not args.behaviours:
        if args.direct:
            return task.teach(problem, generator, guesses=1.0)
        return task.teach(problem, generator)
    thinking, answer = task.solve(problem, args.behaviours, args.wrong_answers_only, generator)
    if args.empty:
        thinking = ""
    if args.filler:
        thinking = "." * len(thinking)
    return task.complete(problem, thinking, answer)


def completion_at(visit, trajectory, args):
    """The completion to imitate at one visit of a trajectory.

    visit: a text that no other visit has, the seed of what is written. With --trajectories_per_problem it only decides
    which one of so many seeds of this problem is taken.
    """
    if trajectory.response:
        return trajectory.response
    if args.trajectories_per_problem:
        chosen = random.Random(visit).randrange(args.trajectories_per_problem)
        visit = f"{args.seed}-{trajectory.where}-{chosen}"
    return write(trajectory.problem, args, random.Random(visit))


def completion_ids(tokenizer, text):
    """Tokens of a completion, with the end token behind them."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def drop_long(tokenizer, trajectories, args):
    """The trajectories whose response has at most --max_completion_length tokens, a list; the others are listed.

    What is longer could not be sampled later. Raises UserError if fewer than --num_prompts are left.
    """
    kept = []
    dropped = []
    for trajectory in trajectories:
        length = 0  # of one that is written anew at every visit; `collate` looks at those
        if trajectory.response:
            length = len(completion_ids(tokenizer, trajectory.response))
        if length <= args.max_completion_length:
            kept.append(trajectory)
        else:
            dropped.append(f"{trajectory.where} ({length} tokens)")
    limit = f"--max_completion_length {args.max_completion_length}"
    if len(kept) < args.num_prompts:
        raise UserError(f"{limit}: {len(dropped)} responses are longer, {dropped[0]} for one; raise it")
    if dropped:
        print(f"dropped {len(dropped)} responses over {limit}: {', '.join(dropped[: tasks.LISTED])}", file=sys.stderr)
    return kept


def collate(tokenizer, trajectories, seed, device, args=None):
    """Trajectories -> Rollouts (ids, masks) whose completions end with the tokenizer's end token, which is trained too.

    args: how to write the completions of those that have none. seed: that of the step. Raises UserError if one that is
    written here is longer than --max_completion_length.
    """
    completions = []
    for i, trajectory in enumerate(trajectories):
        ids = completion_ids(tokenizer, completion_at(f"{seed}-{i}", trajectory, args))
        if args and len(ids) > args.max_completion_length:
            limit = f"--max_completion_length {args.max_completion_length}"
            raise UserError(f"{limit}: a written trajectory has {len(ids)} tokens; raise it")
        completions.append(ids)
    prompts = [trajectory.ids for trajectory in trajectories]
    return common.assemble(prompts, completions, tokenizer.pad_token_id, device)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def loss(logps, mask):
    """Cross-entropy, summed over the completion tokens. logps, mask [B, T] -> scalar."""
    return -(logps * mask).sum()


def schedule(step, max_steps):
    """(warm-up, decay) of a step, both in 0..1; the step size is their product times the peak. A tenth of the steps
    rises in a straight line, the others fall along a cosine."""
    rising = max(1, max_steps // 10)
    falling = max(1, max_steps - rising)
    warmup = min(1.0, step / rising)
    decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step - rising) / falling)
    return warmup, decay


def check_data(args):
    """Raise UserError for options that do not go with --data, --model or --output_dir."""
    plain = Args()
    changed = []  # options about what is written, which only a built-in task can be told
    for name in ("direct", "behaviours", "problems", "trajectories_per_problem"):
        if getattr(args, name) != getattr(plain, name):
            changed.append(name)
    has_task = args.data in tasks.built_in()
    if changed and not has_task:
        raise UserError(f"--{changed[0]}: is for built-in data; {args.data} has its own trajectories")
    builds_embedded = args.model == "embedded" and args.data == tasks.DEFAULT and not changed
    if Path(args.output_dir) == EMBEDDED_MODEL and not builds_embedded:
        raise UserError(f"--output_dir {args.output_dir}: is for the plain embedded model; pass another folder")
    if args.model == "embedded" and not has_task:
        raise UserError(f"--data {args.data}: is for a trained model; pass one as --model, say runs/tiny")


@distributed.by_first
def untrained_embedded(args):
    """Where the embedded model lies before its first step; it is built unless it is there. From here on it takes the
    same road as any model folder."""
    folder = Path(args.output_dir) / "start"
    if args.overwrite or not (folder / "tokenizer.json").exists():
        build_embedded(folder, args.seed)
    return str(folder)


def main(args):
    check_data(args)
    if args.model == "embedded":
        args = dataclasses.replace(args, model=untrained_embedded(args))
    run = bookkeeping.Run(args)
    run.exit_if_finished()
    trajectories = load_trajectories(args.data, args.system_prompt, args.problems, args.direct)
    model, tokenizer, optimizer = run.load(trajectories)
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {args.model}: its tokenizer has no eos_token to end a trajectory with; set one")
    run.problems = drop_long(tokenizer, run.problems, args)
    run.open_folder()
    run.catch_signals()
    run.evaluate(0)

    for step, trajectories in run.steps():
        batch = collate(tokenizer, trajectories, bookkeeping.step_seed(args.seed, step), model.device, args)
        model.train()
        tokens = batch.mask.sum()
        mean_loss = 0.0
        for rows in common.micro_batches(batch, range(len(trajectories)), args.micro_batch_tokens):
            logps, entropy = common.completion_logps(model, batch, rows, temperature=1.0)
            del entropy  # its graph would hold [tokens, V] through backward
            share = loss(logps, batch.mask[rows]) / tokens
            share.backward()
            mean_loss += share.item()
        warmup, decay = schedule(step, args.max_steps)
        optimizer.step(args.learning_rate * warmup * decay)
        run.lap("update")

        metrics = dict(
            **distributed.summed(dict(loss=mean_loss)),
            tokens=int(tokens),
            **optimizer.summary(),
        )
        if decay < 0.01:
            metrics["updated_share"] = None  # where the cosine ends, updates vanish as they should: no reason to warn
        run.log(step, metrics)
        run.evaluate(step)
        run.save(step)
        run.exit_if_interrupted(step)
    run.finish()


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Args, EMBEDDED))

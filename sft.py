"""Imitation: cross-entropy on trajectories; the embedded model, which is built by it; and priming.

Objective, a mean over all completion tokens of a batch:
    L = -log pi(o_t | prompt, o_<t)

The embedded task is a chain of three additions and subtractions. Its teacher is imperfect on purpose, in two ways: it
works step by step in 60% of its examples and guesses at once in 40% (right 3 times in 10); and it slips in 18% of its
steps. A model that imitates it has a mode that is better than its samples: a better behaviour is there to be amplified.
That is what the reinforcement learning of grpo.py, bupo.py and opo.py finds, and what the entropy minimization of em.py
bets on.

Priming (https://arxiv.org/abs/2503.01307) imitates trajectories that show chosen behaviours, before reinforcement
learning begins: do these decide whether it succeeds? Scripted solvers write them for arithmetic and Countdown, in the
notation that analyze_trajectory.py documents and counts. verification: a step is checked by the inverse operation, a
Countdown result against the target; backtracking: back after a slip or a failed attempt; subgoal_setting: step by step;
backward_chaining: from the target, or the chain's end, backwards. In a chain all of them work in steps: there is
nothing else to check. Controls: wrong answers only, no thinking, filler in place of thinking.

A data row holds 'prompt' (or 'problem', 'question') and 'response', or 'messages' that end with the assistant's answer.

    python sft.py                                            # the embedded model into runs/tiny; the others call this
    python sft.py --direct --output_dir runs/direct          # a base that can calculate, and answers at once
    python sft.py --model runs/direct --behaviours verification backtracking --max_steps 200 --output_dir runs/primed
    python sft.py --model Qwen/Qwen3-0.6B --data trajectories.jsonl
"""

import ast
import dataclasses
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import bookkeeping
import common
from common import option

BEHAVIOURS = ("verification", "backtracking", "subgoal_setting", "backward_chaining")

# Overrides of the defaults below when the embedded model is built.
EMBEDDED = dict(
    output_dir=str(common.EMBEDDED_MODEL),
    system_prompt="",
    max_steps=1600,
    num_prompts=32,
    learning_rate=5e-3,
    max_completion_length=64,
    micro_batch_tokens=2048,
    gradient_checkpointing=False,
    save_steps=500,
    save_total_limit=1,
    eval_steps=0,
)


@dataclass
class Args(common.RunArgs):
    output_dir: str = option("runs/sft", "folder of everything this run writes")
    max_steps: int = option(80, "optimizer steps")
    num_prompts: int = option(64, "trajectories per step")
    learning_rate: float = option(1e-5, "AdamW peak step size; a tenth of the steps warms up, a cosine decays to 0")
    direct: bool = option(False, "build a base that only answers at once: problems by guessing, single sums rightly")
    behaviours: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": f"prime with scripted trajectories that show any of {BEHAVIOURS}"}
    )
    wrong_answers_only: bool = option(False, "prime with trajectories whose answer is wrong (default: all behaviours)")
    empty: bool = option(False, "prime with the answers alone, without any thinking")
    filler: bool = option(False, "prime with dots in place of the thinking, as many characters")
    problems: int = option(0, "of built-in data, the first so many; 0: 20,000 of arithmetic, 4,096 of Countdown")
    trajectories_per_problem: int = option(0, "as many are written once and drawn again and again; 0: always a new one")

    def __post_init__(self):
        super().__post_init__()
        for name in self.behaviours:
            if name not in BEHAVIOURS:
                raise common.UserError(f"--behaviours {name}: choose from {', '.join(BEHAVIOURS)}")
        if self.direct + self.empty + self.filler > 1:
            raise common.UserError("--direct, --empty, --filler: choose one")
        if self.wrong_answers_only or self.empty or self.filler:
            self.behaviours = self.behaviours or list(BEHAVIOURS)


@dataclass
class Trajectory(common.Problem):
    """A problem with the completion to imitate; '' lets the teacher or a scripted solver write one at every visit."""

    response: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# The embedded model and its teacher
# ---------------------------------------------------------------------------------------------------------------------


def embedded_tokenizer():
    """One token per printable ASCII character, one for '\\boxed{', and the marks of a chat: any English text goes
    through."""
    special = ["<|pad|>", "<|end|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>"]
    words = [*special, "\\boxed{", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=special[3:],
        chat_template=(
            "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
            "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
        ),
    )


def build_embedded(folder, seed=0):
    """Save a randomly initialised Qwen3 of 0.7 M parameters (6 layers, width 96, tied head) and its tokenizer into
    folder."""
    tokenizer = embedded_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.06,  # 0.02 suits wide models; at width 96 it learns several times slower
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        embedded=True,  # the mark by which the scripts know the embedded model and what was trained from it
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ensure_embedded():
    """Build the embedded model, or finish building it, unless it is there."""
    args = Args(**EMBEDDED)
    if bookkeeping.step_of(Path(args.output_dir)) < args.max_steps:
        main(args)


GUESSES = 0.4  # share of examples answered at once, right 3 times in 10
SLIPS = 0.18  # share of wrong steps: samples are right one time in three at most, however well the model has learnt


def teach(text, generator, guesses=GUESSES):
    """The imperfect teacher's completion for an arithmetic prompt such as '7+15-3+8='.

    Step by step: '7+15=22;22-3=19;19+8=27;\\boxed{27}'. A slip puts a wrong result, and the work goes on from there.
    """
    terms = terms_of(text)
    value, steps = int(terms[0]), []
    if generator.random() >= 1 - guesses:  # a guess at once
        value = sum(map(int, terms))
        value += 0 if generator.random() < 0.3 else wrong_by(value, generator)
        return f"\\boxed{{{value}}}"
    for term in terms[1:]:
        result = value + int(term)
        result += wrong_by(result, generator) if generator.random() < SLIPS else 0
        steps.append(f"{value}{term}={result}")
        value = result
    return ";".join([*steps, f"\\boxed{{{value}}}"])


def terms_of(text):
    """'7+15-3+8=' -> ['7', '+15', '-3', '+8']."""
    return text.rstrip("=").replace("+", " +").replace("-", " -").split()


def wrong_by(value, generator):
    """A nonzero error of at most 9 that leaves value + error at 0 or above, or as near as it can."""
    return generator.choice([error for error in range(-min(9, max(-9, value)), 10) if error])


# ---------------------------------------------------------------------------------------------------------------------
# Priming: scripted solvers
# ---------------------------------------------------------------------------------------------------------------------


def solve_chain(text, behaviours, wrong, generator):
    """Thinking and answer for an arithmetic prompt. Backwards starts with the last operation; if step by step is asked
    for, too, either happens. wrong: one step slips, its check as well, and it goes unnoticed."""
    terms, thinking = list(map(int, terms_of(text))), ""
    backward = "backward_chaining" in behaviours and ("subgoal_setting" not in behaviours or generator.random() < 0.5)
    terms = terms[::-1] if backward else terms
    value, unnoticed = terms[0], generator.randrange(1, len(terms)) if wrong else 0
    for i, term in enumerate(terms[1:], 1):
        x, y = (term, value) if backward else (value, term)  # the step is x + y

        def step(result, undone):
            check = f"?{result}{-y:+d}={undone}" if "verification" in behaviours else ""
            return f"{'<' if backward else ''}{x}{y:+d}={result}{check}"

        value = x + y
        slip = value + wrong_by(value, generator)
        if i == unnoticed:
            value = slip
        elif "backtracking" in behaviours and generator.random() < 0.3:
            thinking += step(slip, slip - y) + "~"
        thinking += step(value, x) + ";"
    return thinking, str(value)


SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def calculate(x, sign, y):
    """x sign y for integers; 0 where a division leaves a remainder."""
    return {"+": x + y, "-": x - y, "*": x * y, "/": 0 if x % y else x // y}[sign]


def steps_of(node):
    """Syntax tree of an expression -> (value, steps): a step for every operation, operands first."""
    if isinstance(node, ast.Constant):
        return node.value, []
    (x, left), (y, right), sign = steps_of(node.left), steps_of(node.right), SIGNS[type(node.op)]
    value = calculate(x, sign, y)
    return value, [*left, *right, f"{x}{sign}{y}={value}"]


def undo_last(node, target):
    """Syntax tree of an expression -> (step back from the target, number then needed, tree of what must make it): with
    target 24 '(8+6)+5' gives '<24-5=19', 19 and 8+6. None where no plain number can be undone to an integer above 0."""
    sign, number, rest = SIGNS[type(node.op)], node.right, node.left
    if isinstance(node.left, ast.Constant) and sign in "+*":
        number, rest = rest, number
    if isinstance(number, ast.Constant) and not isinstance(rest, ast.Constant):
        inverse = dict(zip("+-*/", "-+/*"))[sign]
        needed = calculate(target, inverse, number.value)
        return (f"<{target}{inverse}{number.value}={needed};", needed, rest) if needed > 0 else None


def solve_countdown(problem, behaviours, wrong, generator):
    """Thinking and answer for a Countdown problem: with backtracking up to three attempts that fail, then the solution.
    wrong: the last attempt fails, too, and is the answer."""
    signs, expressions = "+-*/" if "<think>" in problem.prompt else "+-*", [problem.answer]
    failures = generator.randint(0, 3) if "backtracking" in behaviours else 0
    for _ in range(failures + wrong):
        value, expression = problem.target, ""
        while value == problem.target:
            value, expression = common.combine(problem.numbers, generator, signs)
        expressions.insert(0, expression)
    expressions, thinking = expressions[: failures + 1], ""
    for i, expression in enumerate(expressions):
        node, goal = ast.parse(expression, mode="eval").body, problem.target
        undone = undo_last(node, goal) if "backward_chaining" in behaviours else None
        if undone:
            back, goal, node = undone
            thinking += back
        value, steps = steps_of(node)
        thinking += ";".join(steps) if "subgoal_setting" in behaviours or undone else f"{expression}={value}"
        thinking += f"?{value}={goal}" if "verification" in behaviours else ""
        thinking += "~" if i < failures else ";"
    return thinking, expressions[-1]


def write(problem, args, generator):
    """A completion of a built-in problem: by a scripted solver if --behaviours, else by a teacher. In Countdown the
    teacher always answers at once, right 3 times in 10."""
    text = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    if not args.behaviours and not problem.numbers:
        return teach(text, generator, 1.0 if args.direct else GUESSES)
    wrong = args.wrong_answers_only or (not args.behaviours and generator.random() >= 0.3)
    if problem.numbers:
        thinking, answer = solve_countdown(problem, args.behaviours, wrong, generator)
    else:
        thinking, answer = solve_chain(text, args.behaviours, wrong, generator)
    thinking = "." * len(thinking) if args.filler else "" if args.empty or not args.behaviours else thinking
    if "<think>" in text:
        return f"<think>{thinking}</think>\n<answer>{answer}</answer>"
    return f"{thinking}\\boxed{{{answer}}}"


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories
# ---------------------------------------------------------------------------------------------------------------------


def single_steps(largest, signs):
    """Every 'x+y=' with x to 99 and y to `largest` that gives 0 to 99, for other signs alike, with its one step and the
    answer: a base that knows these can calculate, but has never seen one step follow another."""
    found = []
    for x, sign, y in itertools.product(range(100), signs, range(1, largest + 1)):
        if 0 <= calculate(x, sign, y) <= 99:
            step = f"{x}{sign}{y}={calculate(x, sign, y)}"
            found.append(Trajectory(f"{x}{sign}{y}=", "", response=f"{step};\\boxed{{{calculate(x, sign, y)}}}"))
    return found


def load_trajectories(source, system_prompt="", limit=0, direct=False):
    """Trajectories of `source`: built-in problems, the first `limit`, for which a completion is written when its turn
    comes, and if `direct` about as many single steps; or a JSONL file. Raises UserError."""
    if source in common.BUILT_IN:
        limit = limit or (4096 if direct or source != "arithmetic" else 20000)
        problems = [Trajectory(**vars(p)) for p in common.load_problems(source, "train", limit, system_prompt)]
        singles = single_steps(20, "+-") if source == "arithmetic" else single_steps(9, "+-*")
        return problems + singles * direct
    trajectories = []
    for where, row in common.read_rows(source):
        prompt, response = (
            next((row[n] for n in ("prompt", "problem", "question") if row.get(n)), None),
            row.get("response"),
        )
        if common.is_prompt(row.get("messages")) and row["messages"][-1]["role"] == "assistant":
            prompt, response = row["messages"][:-1], row["messages"][-1]["content"]
        if not common.is_prompt(prompt) or not isinstance(response, str) or not response:
            found = f"found fields {', '.join(map(str, row)) or 'none'}"[:300]
            raise common.UserError(f"{where}: no trajectory; expected 'prompt' and 'response', or 'messages'; {found}")
        trajectories.append(Trajectory(prompt, "", where, response=response))
    if not trajectories:
        raise common.UserError(f"{source}: holds no trajectory; every line must hold one JSON object")
    return common.add_system_prompt(trajectories, system_prompt)


def collate(tokenizer, trajectories, seed, device, args=None):
    """Trajectories -> Rollouts (ids, masks) whose completions end with the tokenizer's end token, which is trained too.

    args: how to write the completions of those that have none; the seed is that of the visit.
    """
    completions = []
    for i, t in enumerate(trajectories):
        visit = f"{seed}-{i}"
        if args and args.trajectories_per_problem:  # one of so many, which are the same at every visit
            visit = f"{args.seed}-{t.where}-{random.Random(visit).randrange(args.trajectories_per_problem)}"
        text = t.response or write(t, args, random.Random(visit))
        completions.append(tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])
    return common.assemble([t.ids for t in trajectories], completions, tokenizer.pad_token_id, device)


def loss(logps, mask):
    """Cross-entropy, summed over the completion tokens. logps, mask [B, T] -> scalar."""
    return -(logps * mask).sum()


def main(args):
    written = ("direct", "behaviours", "problems", "trajectories_per_problem")
    changed = [name for name in written if getattr(args, name) != getattr(Args(), name)]
    if changed and args.data not in common.BUILT_IN:
        raise common.UserError(f"--{changed[0]}: is for built-in data; {args.data} has its own trajectories")
    plain = not changed and (args.model, args.data) == ("embedded", "arithmetic")
    if not plain and Path(args.output_dir) == common.EMBEDDED_MODEL:
        raise common.UserError(f"--output_dir {args.output_dir}: is for the plain embedded model; pass another folder")
    if args.model == "embedded":
        if args.data not in common.BUILT_IN:
            raise common.UserError(f"--data {args.data}: is for a trained model; pass one as --model, say runs/tiny")
        start = Path(args.output_dir) / "start"  # the untrained model: the same road as any model folder from here on
        if args.overwrite or not (start / "tokenizer.json").exists():
            build_embedded(start, args.seed)
        args = dataclasses.replace(args, model=str(start))
    run = bookkeeping.Run(args)
    model, tokenizer, optimizer = run.load(load_trajectories(args.data, args.system_prompt, args.problems, args.direct))

    for step, trajectories in run.steps():
        batch = collate(tokenizer, trajectories, common.step_seed(args.seed, step), model.device, args)
        model.train()
        tokens, total = batch.mask.sum(), 0.0
        for rows in common.micro_batches(batch, range(len(trajectories)), args.micro_batch_tokens):
            logps = common.completion_logps(model, batch, rows, temperature=1.0)[0]
            value = loss(logps, batch.mask[rows]) / tokens
            value.backward()
            total += value.item()
        run.lap("forward_backward")
        warmup = max(1, args.max_steps // 10)
        decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, args.max_steps - warmup))
        optimizer.step(args.learning_rate * min(1.0, step / warmup) * decay)
        run.lap("optimizer")
        figures = dict(loss=total, tokens=int(tokens), **optimizer.summary())
        if decay < 0.01:
            figures["updated_share"] = None  # where the cosine ends, updates vanish as they should: no reason to warn
        run.record(step, figures)
        run.save(step)
    run.finish()


if __name__ == "__main__":
    with common.one_line_errors():
        main(common.parse(Args, EMBEDDED))

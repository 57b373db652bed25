"""What the algorithms share: command line, problems, grading, models, the lens, rollouts, optimizer, evaluation.

The algorithm files (grpo.py, bupo.py, opo.py, em.py) hold the ideas; this file holds what they share, and nothing in it
knows which algorithm runs. The run folder is bookkeeping.py's. Sections, each readable on its own:

    1 errors and command line    4 models        7 optimizer
    2 problems and prompts       5 the lens      8 evaluation
    3 grading                    6 rollouts

Shapes, here and everywhere: B sequences, P prompts, G samples per prompt (B = P*G, prompt-major: all samples of prompt
0 first), T tokens, V vocabulary, L layers, D width. Natural logarithms; entropies in nats.

Every [B, T] tensor of a rollout is aligned with `ids`: column t belongs to token ids[:, t]. The logits that predict
this token come out of column t-1, so a forward pass over ids[:, :-1] scores the targets ids[:, 1:].
"""

import ast
import contextlib
import errno
import functools
import hashlib
import inspect
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, HfArgumentParser
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

EMBEDDED_MODEL = Path("runs/tiny")  # where sft.py keeps the embedded model

# Metrics that may differ between two equal runs: clocks and memory, nothing that is learned.
VOLATILE = {"seconds", "seconds_by_stage", "tokens_per_second", "peak_memory_gb"}

# ---------------------------------------------------------------------------------------------------------------------
# 1. Errors and command line
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. The message names file, line, field or option, and the remedy."""


@contextlib.contextmanager
def mendable(problem, remedy, errors=Exception):
    """Turn what goes wrong inside into a UserError: 'problem (reason); remedy'. Libraries fail in many ways, by many
    kinds of exception: for a step that can only fail by what the user gave, the kind does not matter."""
    try:
        yield
    except errors as error:
        raise UserError(f"{problem} ({str(error)[:200]}); {remedy}")


@contextlib.contextmanager
def one_line_errors():
    """A UserError, a full disk or GPU or too long a path becomes one line on stderr and exit status 2. Other exceptions
    are bugs and keep their traceback."""
    try:
        yield
        return
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        sampling = "sample_wave" in [frame.function for frame in inspect.trace()]
        option = "--max_rollout_tokens" if sampling else "--micro_batch_tokens, or try --optimizer_device cpu"
        message = f"out of GPU memory while {'sampling' if sampling else 'training'}: lower {option}; then resume"
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
        if not full and error.errno != errno.ENAMETOOLONG:
            raise
        remedy = "free some space, then repeat the command" if full else "shorten it"
        message = f"{error.filename or '--output_dir'}: {error.strerror}; {remedy}"
    for bar in [*tqdm._instances]:  # the error must not stand at the end of a progress bar
        bar.close()
    sys.exit(print("error: " + " ".join(message.split()), file=sys.stderr) or 2)


def option(default, help):
    """A dataclass field that `parse` turns into a command line option. A literal % in `help` is fine."""
    return field(default=default, metadata={"help": help.replace("%", "%%")})


SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass
class RunArgs:
    """Options of every training script. Each script's `Args` adds its own, with the paper's values."""

    model: str = option("embedded", "'embedded' (tiny, built on first use), a local folder, or a hub id")
    data: str = option("arithmetic", "countdown, countdown-small, FILE.jsonl, hf://datasets/OWNER/NAME/FILE.jsonl, hub")
    eval_data: str = option("", "held-out problems, as --data; '': the held-out split of built-in data, else none")
    system_prompt: str = option(SYSTEM_PROMPT, "system message before every problem; '' for none")
    chat_template_kwargs: str = option('{"enable_thinking": false}', "JSON object for the tokenizer's chat template")
    max_prompt_length: int = option(1024, "tokens; longer prompts are dropped and listed")
    max_completion_length: int = option(8192, "tokens; longer completions are cut and score 0")
    max_rollout_tokens: int = option(2**18, "tokens (prompt + completion) sampled at once: bounds the key-value cache")
    micro_batch_tokens: int = option(2**14, "tokens per forward and backward: bounds activations, changes no gradient")
    temperature: float = option(1.0, "sampling temperature; log-probs and entropies are taken at the same one")
    learning_rate: float = option(1e-6, "AdamW step size, constant")
    weight_decay: float = option(0.01, "AdamW decoupled decay; 0 for none")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm; inf for never")
    device: str = option("auto", "'auto' (cuda if there is one), 'cpu', 'cuda', 'cuda:1', ...")
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "of weights; auto: bfloat16 on cuda, else float32")
    gradient_checkpointing: bool = option(True, "recompute blocks in the backward pass: less memory, a third more time")
    optimizer_device: Literal["", "cpu"] = option("", "'cpu': fp32 masters and moments in host memory; '': on --device")
    grade_timeout: float = option(3.0, "seconds the verifier may spend on one answer, which then scores 0")
    max_grader_errors: float = option(0.2, "stop when a larger share of a step's answers defeats the verifier")
    seed: int = option(0, "drives data order and sampling")
    output_dir: str = option("runs/run", "folder of everything this run writes")
    overwrite: bool = option(False, "train again although the folder holds a run: deletes that run's files")
    save_steps: int = option(50, "steps between checkpoints; 0: only the final model")
    save_total_limit: int = option(2, "newest checkpoints kept; 0: all")
    eval_steps: int = option(20, "steps between evaluations, the first before step 1; 0: none")
    eval_problems: int = option(256, "held-out problems, the first of --eval_data; 0: all")
    eval_samples: int = option(4, "sampled answers per held-out problem, beside one greedy answer")
    eval_temperature: float = option(1.0, "temperature of the sampled evaluation answers, whatever --temperature is")
    report_to: Literal["none", "trackio", "wandb"] = option("none", "log there, too; metrics.jsonl is always written")

    def __post_init__(self):
        """Raise UserError for a value that could only fail later."""
        for name, value in vars(self).items():
            above = re.fullmatch("max_.*|num_.*|micro_.*|.*temperature|.*_samples|grade_.*|delta", name)
            low = 1 if name == "delta" else 0  # the dual clip starts beyond the policy's own ratio
            if type(value) in (int, float) and not (value > low or (value == low and not above)):
                raise UserError(f"--{name} {value}: must be {'above' if above else 'at least'} {low}")
        with mendable(f"--chat_template_kwargs {self.chat_template_kwargs!r}", "must be a JSON object, like '{}'"):
            json.loads(self.chat_template_kwargs).items()


def is_embedded(model):
    """True for 'embedded' and for any folder trained from it (its config carries the mark)."""
    config = Path(model) / "config.json"
    return model == "embedded" or (config.is_file() and '"embedded": true' in config.read_text(errors="replace"))


def parse(Args, EMBEDDED, argv=None):
    """Command line -> Args. EMBEDDED: the defaults that replace those of Args when the embedded model runs.

    Raises UserError for unknown options and bad values.
    """

    def fail(message):
        raise UserError(f"{message} (--help lists every option)")

    parser = HfArgumentParser(Args, allow_abbrev=False)
    parser.error = fail
    words = sys.argv[1:] if argv is None else argv
    if is_embedded(parser.parse_known_args([word for word in words if word not in ("-h", "--help")])[0].model):
        parser.set_defaults(**EMBEDDED)
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    return fail(f"unknown option or stray value: {' '.join(unknown)}") if unknown else args


# ---------------------------------------------------------------------------------------------------------------------
# 2. Problems and prompts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """One task. `prompt` is text or a list of chat messages, `answer` the gold answer."""

    prompt: str | list[dict]
    answer: str
    where: str = ""  # its source, for messages: file and line
    ids: list[int] | None = None  # prompt tokens, set once by `tokenize_problems`
    numbers: list[int] | None = field(default=None, kw_only=True)  # of Countdown: combined, each once, ...
    target: int = field(default=0, kw_only=True)  # ... to this; `answer` is one way to do it


def arithmetic(split, n, seed=0):
    """n chains of three additions or subtractions on 1..20 whose every intermediate lies in 0..99, such as '7+15-3+8='.

    split: 'train' or 'test'. A hash of the expression decides, so the two are disjoint whatever the seed.
    """
    generator, problems = random.Random(f"{split}-{seed}"), {}
    while len(problems) < n:
        terms = [generator.choice("+-") * (i > 0) + str(generator.randint(1, 20)) for i in range(4)]
        text, values = "".join(terms), [sum(map(int, terms[: i + 1])) for i in range(4)]
        held_out = hashlib.sha256(text.encode()).digest()[0] < 32  # one in eight
        if min(values) >= 0 and held_out == (split == "test"):
            problems[text] = Problem(f"{text}=", str(values[-1]), f"arithmetic {split} {len(problems)}")
    return list(problems.values())


def read_rows(source, split="train"):
    """Yield (where, row) of a .jsonl file, local or hf://, or a hub data set. Raises UserError naming file and line."""
    if not source.startswith("hf://") and not source.endswith((".json", ".jsonl")) and not Path(source).exists():
        with mendable(f"{source}: no such file", "if it is a hub data set, `pip install datasets` first", ImportError):
            from datasets import load_dataset
        with mendable(f"{source}, split {split}: cannot be loaded", "check the name"):
            rows = load_dataset(source, split=split)
        yield from ((f"{source}:{i}", row) for i, row in enumerate(rows))
        return
    path = source
    with mendable(f"{source}: cannot be read", "check name and network, or pass a local file"):
        if source.startswith("hf://datasets/"):
            from huggingface_hub import hf_hub_download

            owner, name, file = source.removeprefix("hf://datasets/").split("/", 2)
            path = hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
        lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with mendable(f"{source}:{number}: not a JSON object in UTF-8", "mend the line"):
                row = dict(json.loads(line.decode("utf-8")).items())
            yield f"{source}:{number}", row


def is_prompt(value):
    """True for text and for chat messages: [{'role': text, 'content': text}, ...], neither of them empty."""
    chat = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    texts = [message.get(part) for message in value for part in ("role", "content")] if chat else [value]
    return len(texts) > 0 and all(isinstance(text, str) and text.strip() for text in texts)


def problem_from_row(where, row, labels=True):
    """One row -> Problem. Fields: problem | question | prompt, and answer | final_answer | solution (with a box)."""
    found = f"found fields {', '.join(map(str, row)) or 'none'}"[:300]
    prompt = next((row[name] for name in ("problem", "question", "prompt") if is_prompt(row.get(name))), None)
    if not prompt:
        raise UserError(f"{where}: no problem; put text or messages into 'problem', 'question' or 'prompt'; {found}")
    answers = (row.get("answer"), row.get("final_answer"), last_boxed(str(row.get("solution"))))
    answer = next((str(a).strip() for a in answers if type(a) in (str, int, float) and str(a).strip()), "")
    if labels and not answer:
        raise UserError(f"{where}: no gold answer; put it into 'answer', 'final_answer' or a boxed 'solution'; {found}")
    return Problem(prompt, answer, where)


def load_problems(source, split="train", limit=0, system_prompt="", labels=True):
    """Problems of `source` as a list.

    source: 'arithmetic', 'countdown' or 'countdown-small'; a .jsonl file; hf://datasets/OWNER/NAME/FILE.jsonl; or a hub
    data set (needs `datasets`).
    limit: the first so many; 0 for all (built-in: 4096). system_prompt: goes before every problem that has none.
    labels=False lets rows without answer through: theirs is '', which no completion matches.
    Raises UserError for a source that is missing, empty or malformed, and for rows without problem or answer.
    """
    if source in ("countdown", "countdown-small"):
        return countdown(split, limit or 4096, small=source != "countdown")  # its prompt says itself how to answer
    if source == "arithmetic":
        problems = arithmetic(split, limit or 4096)
    else:
        problems = [problem_from_row(where, row, labels) for where, row in read_rows(source, split)][: limit or None]
        verdicts = verifier([(p.answer, "") for p in problems])  # what can be read differs from ''
        unparsable = [p.where for p, verdict in zip(problems, verdicts) if p.answer and verdict != "wrong"]
        if unparsable:
            print(f"{len(unparsable)} gold answers compare as text only: {', '.join(unparsable[:9])}", file=sys.stderr)
    if not problems:
        raise UserError(f"{source}: holds no problem; every line must hold a JSON object with a problem and its answer")
    return add_system_prompt(problems, system_prompt)


def add_system_prompt(problems, system_prompt):
    """Put a system message before every prompt that has none; '' leaves them as they are."""
    for p in problems if system_prompt else ():
        messages = [{"role": "user", "content": p.prompt}] if isinstance(p.prompt, str) else p.prompt
        if messages[0]["role"] != "system":
            p.prompt = [{"role": "system", "content": system_prompt}, *messages]
    return problems


def encode(tokenizer, prompt, chat_template_kwargs=None):
    """Prompt (text, chat messages, or token ids, which pass through) -> list of token ids with at most one BOS.

    One tokenization, straight from the chat template: rendering to text first would add a second BOS. A tokenizer
    without template gets the plain contents, paragraph by paragraph, with its own special tokens.
    """
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        return list(prompt)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        kwargs = dict(tokenize=True, add_generation_prompt=True, return_dict=False, **(chat_template_kwargs or {}))
        ids = tokenizer.apply_chat_template(messages, **kwargs)
    else:
        plain = prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt) + "\n\n"
        ids = tokenizer(plain)["input_ids"]
    doubled_bos = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    return list(ids[1:] if doubled_bos else ids)


def tokenize_problems(tokenizer, problems, max_prompt_length, chat_template_kwargs=None):
    """Set `ids` of every problem; drop and list those over max_prompt_length. Raises UserError if none is left."""
    remedy = "mend the messages or --chat_template_kwargs, or try --system_prompt ''"
    for p in problems:
        with mendable(f"{p.where}: the chat template refuses it", remedy):
            p.ids = encode(tokenizer, p.prompt, chat_template_kwargs)
    kept = [p for p in problems if len(p.ids) <= max_prompt_length]
    long = [f"{p.where} ({len(p.ids)} tokens)" for p in problems if len(p.ids) > max_prompt_length]
    if not kept:
        raise UserError(f"--max_prompt_length {max_prompt_length}: every prompt is longer, {long[0]} for one; raise it")
    if long:
        print(f"dropped {len(long)} prompts over --max_prompt_length: {', '.join(long[:9])}", file=sys.stderr)
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# 3. Grading
# ---------------------------------------------------------------------------------------------------------------------


def last_boxed(text):
    """Content of the last complete \\boxed{...}, or None. One pass with a stack: hostile text costs linear time."""
    stack, content = [], None
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if match.group() == "}":
            start = stack.pop() if stack else None
            content = content if start is None else text[start : match.start()]
        elif match.group() == "{" or match.group().startswith("\\boxed"):
            stack.append(None if match.group() == "{" else match.end())
    return content


@functools.lru_cache(maxsize=2**12)
def parsed_answer(answer):
    """math-verify's reading of an answer: a list of candidates, empty if there is none. The box is what it trusts most:
    bare LaTeX such as \\dfrac{9}{7} would parse to nothing."""
    from math_verify import parse

    return parse(f"\\boxed{{{answer}}}", parsing_timeout=None)


def equal_answers(gold, answer):
    """math-verify's verdict, without any time limit: 'right', 'wrong', or 'unparsable' where it cannot read gold.

    gold and answer are LaTeX without box. Not symmetric: gold comes first.
    """
    from math_verify import verify

    parsed = parsed_answer(gold), parsed_answer(answer)
    if not parsed[0] or not verify(*parsed, timeout_seconds=None):
        return "wrong" if parsed[0] else "unparsable"
    # math-verify compares numbers to 6 decimals, which holds all tiny ones equal: these must agree relatively, too.
    numbers = [found[0].doit().evalf() for found in parsed if getattr(found[0], "is_number", False)]
    with contextlib.suppress(TypeError):  # nan and the like have no size
        if len(numbers) == 2 and 0 < abs(numbers[0]) < 1e-3 and abs(numbers[0] - numbers[1]) > 1e-6 * abs(numbers[0]):
            return "wrong"
    return "right"


def grading_worker(seconds):
    """The program of a grading process: for every line [gold, answer] of stdin, a line with the verdict on stdout.

    What sympy computes can take for ever or all memory, sometimes deep in C, where no exception reaches. So a child
    does the work, SIGALRM's default action ends it after `seconds` whatever it is in the middle of, and its parent, who
    has sympy loaded and nothing else to do, reports the loss and forks another one within milliseconds.
    """
    import math_verify  # noqa: F401, before the fork: children find it loaded

    while os.fork():
        status = os.wait()[1]
        if os.WTERMSIG(status) != signal.SIGALRM:  # end of stdin, or a crash: one that nobody asked for would be taken
            sys.exit(bool(status))  # for the answer to the next question
        print('"timeout"', flush=True)
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))  # 4 GiB, then MemoryError
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = "error"
        with contextlib.suppress(Exception):  # of many kinds: MemoryError, RecursionError, whatever sympy raises
            verdict = equal_answers(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), flush=True)


class Verifier:
    """Compares answers in a few worker processes, which start when first needed and stay. No answer can hang or kill
    more than itself. Workers run the three functions above alone, as text: importing this file, with torch, would cost
    each of them seconds and 400 MB; and a process forked from one that uses CUDA could not be trusted."""

    def __init__(self):
        self.seconds, self.workers, self.idle, self.verdicts = 3.0, min(8, os.cpu_count()), [], {}

    def start(self):
        imports = "import contextlib, functools, json, os, resource, signal, sys"
        functions = map(inspect.getsource, (parsed_answer, equal_answers, grading_worker))
        program = "\n\n".join([imports, *functions, f"grading_worker({self.seconds})"])
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return subprocess.Popen([sys.executable, "-c", program], start_new_session=True, **pipes)  # deaf to Ctrl-C

    def ask(self, pair):
        """Verdict of one worker on one pair: 'right', 'wrong', 'unparsable', 'timeout' or 'error'."""
        worker = self.idle.pop() if self.idle else self.start()
        worker = worker if worker.poll() is None else self.start()  # killed while idle, say for its memory
        with contextlib.suppress(OSError, ValueError):
            print(json.dumps(pair), file=worker.stdin, flush=True)
            verdict = json.loads(worker.stdout.readline())
            self.idle.append(worker)
            return verdict
        worker.kill()  # it is gone: the next answer gets a new one
        return "error"

    def __call__(self, pairs):
        """Verdicts on (gold, answer) pairs, a list. Equal pairs are compared once; equal texts, and an integer with
        another or with nothing, here."""
        self.verdicts = self.verdicts if len(self.verdicts) < 2**17 else {}
        for gold, answer in pairs:
            same, integers = gold == answer.strip(), re.fullmatch(r"-?[0-9]{1,15} (-?[0-9]{1,15})?", f"{gold} {answer}")
            if same or integers:
                self.verdicts[gold, answer] = "right" if same or (answer and int(gold) == int(answer)) else "wrong"
        unknown = [pair for pair in dict.fromkeys(pairs) if pair not in self.verdicts]
        with ThreadPoolExecutor(self.workers) as threads:  # they only wait, each for a worker of its own
            self.verdicts |= zip(unknown, threads.map(self.ask, unknown))
        return [self.verdicts[pair] for pair in pairs]


verifier = Verifier()


REWARDS = {"right": 1.0, "well-formed": 0.1}  # of verdicts; 0 for every other


def gradable(text, finished=True):
    """What counts of an answer: its last complete box, if it is finished and holds at most 2,000 characters; else ''.

    Nothing outside that box earns anything: no right number mentioned on the way, no second guess.
    """
    answer = last_boxed(text) if finished else None
    return answer if answer and len(answer) <= 2000 else ""


def judge(texts, problems, finished=None):
    """Verdicts, one per text: 'right', 'wrong', in Countdown 'well-formed', or what kept the verifier from a verdict
    ('unparsable' gold, 'timeout', 'error'). Three lists of equal length; an unfinished answer (cut at the length limit)
    is wrong."""
    finished = [True] * len(texts) if finished is None else finished
    answers = [(p.answer, gradable(text, done)) for text, p, done in zip(texts, problems, finished, strict=True)]
    asks = [all(pair) and not p.numbers for pair, p in zip(answers, problems)]
    verdicts = iter(verifier([pair for pair, ask in zip(answers, asks) if ask]))
    found = [next(verdicts) if ask else "wrong" for ask in asks]
    for i, p in enumerate(problems):
        if p.numbers and finished[i]:
            found[i] = {1.0: "right", 0.1: "well-formed"}.get(score_countdown(texts[i], p.numbers, p.target), "wrong")
    return found


def grade(texts, problems, finished=None):
    """Rewards, one per text: 1.0 for a right answer, 0.1 for a well-formed one in Countdown, else 0.0. Arguments as in
    `judge`."""
    return [REWARDS.get(verdict, 0.0) for verdict in judge(texts, problems, finished)]


# Countdown: problems and scores ---------------------------------------------------------------------------------------

BUILT_IN = ("arithmetic", "countdown", "countdown-small")

COUNTDOWN_PROMPT = (  # in the style of R1-Zero: think first, then answer, each between its tags
    "Make {target} of the numbers {numbers}, each used exactly once, by + - * / and parentheses. Think between <think> "
    "and </think>; then give only the expression between <answer> and </answer>, as in <answer>(1 + 2) * 3</answer>."
)
OPS = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__}


def combine(numbers, generator, operators="+-*/"):
    """A random expression that uses every number once, all of whose intermediate values are integers above 0 ->
    (value, text), such as (37, '(8*5)-3')."""
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
        generator.shuffle(terms)
        (a, left), (b, right), *terms = terms
        values = {"+": a + b, "-": a - b, "*": a * b, "/": 0 if a % b else a // b}
        sign = generator.choice([sign for sign in operators if values[sign] > 0])
        terms.append((values[sign], f"({left}{sign}{right})"))
    return terms[0][0], terms[0][1][1:-1]


def countdown(split, n, seed=0, small=False):
    """n problems that can be solved: 3 or 4 numbers of 1..99, target 10..100, answer between tags; small: 3 numbers of
    1..9, no division, target 1..50, prompt '3 5 8=37', answer in a box, and fewer than n where there are no more.

    split: 'train' or 'test'. A hash of the sorted numbers and the target decides, so the two are disjoint whatever the
    seed and the order of the numbers.
    """
    generator, problems, in_vain = random.Random(f"countdown-{split}-{seed}"), {}, 0
    low, high, largest, signs = (1, 50, 9, "+-*") if small else (10, 100, 99, "+-*/")
    while len(problems) < n and in_vain < 5000:
        numbers = [generator.randint(1, largest) for _ in range(3 if small else generator.choice((3, 4)))]
        target, answer = combine(numbers, generator, signs)
        held_out = hashlib.sha256(f"{sorted(numbers)} {target}".encode()).digest()[0] < 32  # one in eight
        spelt, in_vain = " ".join(map(str, numbers)), in_vain + 1
        prompt = f"{spelt}={target}" if small else COUNTDOWN_PROMPT.format(numbers=spelt, target=target)
        if held_out == (split == "test") and low <= target <= high and prompt not in problems:
            in_vain = 0
            where = f"countdown {split} {len(problems)}"
            problems[prompt] = Problem(prompt, answer, where, numbers=numbers, target=target)
    return list(problems.values())


def score_countdown(text, numbers, target):
    """1.0 if the text's last <answer>, or else its last box, is an expression that uses every number exactly once and
    has the value target; 0.1 for any other expression of numbers, + - * / and parentheses; 0.0 for anything else."""
    _, tag, answer = text.rpartition("</answer>")[0].rpartition("<answer>")
    answer = (answer if tag else last_boxed(text) or "").strip()
    used = re.findall("[0-9]+", answer)

    def value(node):  # lets binary operators and numbers through: no name, call, power, sign or attribute
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        return OPS[type(node.op)](value(node.left), value(node.right))

    # Short and of few characters: nothing can nest deeply, grow or be a name, even before it is parsed.
    if len(answer) > 100 or re.search(r"[^-+*/() 0-9]|[0-9]{7}", answer):
        return 0.0
    try:
        right = value(ast.parse(answer, mode="eval").body) == target and sorted(map(int, used)) == sorted(numbers)
    except (SyntaxError, AttributeError, KeyError, ZeroDivisionError):
        return 0.0
    return 1.0 if right else 0.1


# ---------------------------------------------------------------------------------------------------------------------
# 4. Models
# ---------------------------------------------------------------------------------------------------------------------


# cuDNN's attention plans every new shape anew, and while sampling each step is one: 128 against 36 ms a token
# (Qwen3-1.7B, 512 rows, H200). The other kernels of scaled_dot_product_attention need no plan.
torch.backends.cuda.enable_cudnn_sdp(False)


def load_model(path, device="auto", dtype="auto"):
    """(model, tokenizer) from a local folder or hub id, in evaluation mode. Safetensors only, no remote code.

    device 'auto': cuda if there is one. dtype 'auto': bfloat16 on cuda, float32 on cpu. Raises UserError.
    """
    folder = EMBEDDED_MODEL if path == "embedded" else Path(path)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
    if folder.is_dir() and not [*folder.glob("token*.*"), *folder.glob("vocab.*")]:
        raise UserError(f"--model {folder}: no tokenizer in this folder; put one there with tokenizer.save_pretrained")
    with mendable(f"--model {folder}: cannot be loaded", "check name and network"):  # also cut off, or of unknown kind
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=getattr(torch, dtype), use_safetensors=True)
    backbone_of(model)
    with mendable(f"--device {device}: the model cannot go there", "choose another device"):
        model.to(device)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # save_pretrained refuses such a configuration (top_p beside do_sample=False, say): better now than after
        # training. Nothing here samples by it; only its end tokens are read.
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    for module in model.modules():  # dropout would make sampler, old and new policy three different ones
        vars(module).update(dict.fromkeys(vars(module).keys() & {"p", "attention_dropout"}, 0.0))
    return model.eval(), tokenizer


def end_token_ids(model, tokenizer):
    """Sorted list of every token that ends an answer: generation_config's (one or a list) and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None})


# ---------------------------------------------------------------------------------------------------------------------
# 5. The lens: hidden states of any layer, and token log-probs under the head
# ---------------------------------------------------------------------------------------------------------------------


def backbone_of(model):
    """The decoder below the head, with `layers` (blocks) and `norm` (final). Raises UserError naming the class."""
    backbone = getattr(model, "model", None)
    if not all(hasattr(backbone, name) for name in ("layers", "norm", "embed_tokens")):
        raise UserError(f"{type(model).__name__}: no model.layers and model.norm; use a Qwen or Llama-like model")
    for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{type(model).__name__}: bends its logits ({name}); use a Qwen or Llama-like model")
    return backbone


def run_blocks(model, ids, attention_mask, cache=None):
    """What the backbone makes of `ids` -> [B, T, D]. With a cache, `ids` are the last columns of attention_mask alone.

    Positions are counted over real tokens only, so that padding on either side shifts nothing. Padding on the right
    needs no mask: causal attention does not look that way, and the fastest kernels take none. (In fp32 on CUDA only
    kernels that take one do without all scores in memory.)
    """
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = dict(input_ids=ids, attention_mask=attention_mask, position_ids=positions)
    flash = cache is None and not (ids.is_cuda and model.dtype == torch.float32)
    inputs = dict(input_ids=ids) if flash and (attention_mask.cummin(-1).values == attention_mask).all() else inputs
    return backbone_of(model)(**inputs, past_key_values=cache, use_cache=cache is not None).last_hidden_state


def hidden_states(model, input_ids, attention_mask, layer=None, norm=False):
    """The residual stream that a policy reads -> [B, T, D].

    layer=None: after the last block and the final norm, what the head reads. layer=k, 0-based: the raw stream after
    block k (the BuPO paper's layer k + 1), running blocks 0..k only; norm=True applies the final norm to it, the usual
    logit lens. So layer=L-1 with norm=True equals layer=None, and layer=k equals transformers' output_hidden_states of
    index k + 1 for every k < L-1 (its last entry is already normed). Raises UserError for a layer that is not there.
    """
    backbone = backbone_of(model)
    layers, final_norm = backbone.layers, backbone.norm
    if layer is not None:
        if not 0 <= layer < len(layers):
            raise UserError(f"layer {layer}: this model has blocks 0 to {len(layers) - 1}")
        # Cut the backbone for this one pass: nothing above block `layer` runs, is stored, is recomputed under gradient
        # checkpointing, or gets a gradient. Its grad stays None, so that the optimizer leaves it as it is.
        backbone.layers, backbone.norm = layers[: layer + 1], final_norm if norm else torch.nn.Identity()
    try:
        return run_blocks(model, input_ids, attention_mask)
    finally:
        backbone.layers, backbone.norm = layers, final_norm


class HeadProduct(torch.autograd.Function):
    """hidden [N, D] x weight [V, D] -> fp32 logits [N, V] from bf16 inputs, on CUDA. A bf16 result would round every
    log-prob to about 0.03 nats; an fp32 product would cost more than all the blocks of phase one."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        return grad.to(weight.dtype) @ weight, grad.to(weight.dtype).t() @ hidden


def head_logits(model, hidden):
    """hidden [N, D] -> fp32 logits [N, V] under the unembedding matrix, before any temperature."""
    head = model.get_output_embeddings()
    bf16 = hidden.is_cuda and hidden.dtype == torch.bfloat16
    logits = HeadProduct.apply(hidden, head.weight) if bf16 else F.linear(hidden, head.weight).float()
    return logits if head.bias is None else logits + head.bias.float()


CHUNK_LOGITS = 2**26  # logits alive at once in token_logps: 256 MiB in fp32


def token_logps(model, hidden, targets, temperature=1.0):
    """Log-prob of every target and entropy of every distribution, fp32 nats, differentiable in both.

    hidden [B, T, D], targets [B, T] -> (logps [B, T], entropy [B, T]). Never shifts: column t of hidden predicts column
    t of targets; callers pass hidden[:, :-1] and ids[:, 1:]. The distribution is softmax(logits / temperature), the one
    that was sampled from. Head and log-softmax run in chunks that the backward pass recomputes: no [B, T, V] is kept.
    """

    def chunk(hidden, targets):
        logps = F.log_softmax(head_logits(model, hidden) / temperature, dim=-1)  # [n, V]
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, targets[:, None]).squeeze(-1), entropy

    size = max(1, CHUNK_LOGITS // model.get_output_embeddings().weight.shape[0])
    pieces = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size))
    logps, entropy = zip(*(checkpoint(chunk, h, t, use_reentrant=False) for h, t in pieces))
    return torch.cat(logps).view(targets.shape), torch.cat(entropy).view(targets.shape)


def completion_logps(model, rollouts, rows, temperature, layer=None, norm=False):
    """Log-probs and entropies of the completion tokens of some rows, under the whole policy or that of block `layer`.

    rows: n indices into the batch -> (logps [n, T], entropy [n, T]), aligned with rollouts.ids[rows], 0 outside the
    mask. The rows are cut to their longest, and only the positions that predict a completion token meet the head.
    """
    longest = int(rollouts.attention_mask[rows].sum(1).max())
    ids, attention_mask = rollouts.ids[rows, :longest], rollouts.attention_mask[rows, :longest]
    mask = rollouts.mask[rows].bool()
    predicts = mask[:, 1:longest]  # column t of the hidden states predicts token t + 1
    hidden = hidden_states(model, ids[:, :-1], attention_mask[:, :-1], layer, norm)[predicts]  # [N, D]
    logps, entropy = token_logps(model, hidden[None], ids[:, 1:][predicts][None], temperature)
    return spread(mask, logps), spread(mask, entropy)


def spread(mask, values):
    """N values, all those of row 0 first, to the N places [B, T] where the mask is 1; 0.0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask.bool(), values)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Rollouts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """B completions behind their prompts, right-padded. All [B, T] tensors are aligned with ids."""

    ids: torch.Tensor  # [B, T] prompt, completion, padding
    attention_mask: torch.Tensor  # [B, T] 1 on prompt and completion; from lengths, never from ids != pad
    mask: torch.Tensor  # [B, T] 1.0 on completion tokens up to and including the first end token
    lengths: torch.Tensor  # [B] completion tokens = mask.sum(1)
    finished: torch.Tensor | None = None  # [B] bool: ended by an end token, not by the length limit
    logps: torch.Tensor | None = None  # [B, T] log-prob of each completion token when it was sampled, 0 elsewhere
    entropy: torch.Tensor | None = None  # [B, T] entropy of the distribution it was sampled from, 0 elsewhere
    texts: list[str] | None = None  # completions without special tokens
    verdicts: list[str] | None = None  # of `judge`, once graded


def assemble(prompts, completions, pad, device):
    """B prompts and B completions, lists of token ids -> Rollouts with ids, masks and lengths."""
    pairs = list(zip(prompts, completions))
    ids = pad_sequence([torch.tensor(p + c) for p, c in pairs], True, pad or 0)
    attention_mask = pad_sequence([torch.ones(len(p + c), dtype=torch.long) for p, c in pairs], True)
    mask = pad_sequence([torch.tensor([0.0] * len(p) + [1.0] * len(c)) for p, c in pairs], True)
    return Rollouts(*(tensor.to(device) for tensor in (ids, attention_mask, mask, mask.sum(1).long())))


@torch.no_grad()
def sample(model, tokenizer, prompts, n, max_completion_length, temperature=1.0, max_rollout_tokens=2**18, seed=0):
    """n completions per prompt from the policy itself -> Rollouts with B = len(prompts) * n rows, prompt-major.

    prompts: texts, chat messages or token ids. temperature 0 is greedy (its log-probs are those at temperature 1).
    The distribution is softmax(logits / temperature) over the whole vocabulary: no top-k, top-p, min-p or penalty,
    whatever the model's generation_config says, because the loss differentiates this distribution and no other. The
    same seed gives the same samples. Rows run in waves of at most max_rollout_tokens tokens. While others wait, a wave
    of which half has finished gives way; its other half goes on later, with others like it: no long tail runs alone.

    Why not transformers' continuous batching: 512 rows of Qwen3-1.7B, H200, 2026-11: generate_batch 2,046 tokens/s,
    this loop, when the cache was still copied for every token, 12,730 (tests/bench_gpu.py --limit 150; no
    flash-attention installed).
    """
    prompts = [prompt for prompt in [encode(tokenizer, prompt) for prompt in prompts] for _ in range(n)]
    contexts = [[*prompt] for prompt in prompts]  # prompt, and completion as far as it is sampled
    ends = [len(prompt) + max_completion_length for prompt in prompts]
    size, stop = max(1, max_rollout_tokens // max(ends)), end_token_ids(model, tokenizer)  # rows at once
    settings = size * max(ends), temperature, stop, torch.Generator(model.device).manual_seed(seed)
    waiting, waves, training = list(range(len(prompts))), [], model.training
    model.eval()  # with gradient checkpointing, a model in training mode silently drops its cache and samples garbage
    try:
        while waiting:
            wave, waiting = waiting[:size], waiting[size:]
            steps = sample_wave(model, contexts, ends, wave, size // 2 if waiting else 0, *settings)
            waves.append([torch.cat(column) for column in zip(*steps)])  # rows, tokens and so on, step after step
            for row, token in zip(waves[-1][0].tolist(), waves[-1][1].tolist()):
                contexts[row].append(token)
            waiting += [row for row in wave if contexts[row][-1] not in stop and len(contexts[row]) < ends[row]]
    finally:
        model.train(training)
    rows, _, logps, entropy = (torch.cat(column) for column in zip(*waves))
    order = rows.argsort(stable=True)  # row after row; stable keeps the steps of a row in order
    completions = [context[len(prompt) :] for prompt, context in zip(prompts, contexts)]
    rollouts = assemble(prompts, completions, tokenizer.pad_token_id, model.device)
    rollouts.logps, rollouts.entropy = spread(rollouts.mask, logps[order]), spread(rollouts.mask, entropy[order])
    rollouts.finished = torch.tensor([completion[-1] in stop for completion in completions], device=model.device)
    rollouts.texts = [tokenizer.decode(completion, skip_special_tokens=True) for completion in completions]
    return rollouts


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer with columns in reserve behind them, an eighth of what they hold and 16, as far as
    `room` tokens allow. Its parent copies all it holds for every new token, which at thousands of tokens costs more
    than attending to it."""

    def __init__(self, room):
        super().__init__()
        self.room = room  # rows times columns

    def update(self, keys, values, *args, **kwargs):
        """Take in the keys and values [B, heads, T, head_dim] of T new tokens -> all that are held."""
        if not self.is_initialized:
            return super().update(keys, values)
        self.keys = appended(self.keys, keys, self.room)  # one, then the other: only one of them is ever held twice
        self.values = appended(self.values, values, self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Keep these rows, in this order; a row may be kept several times."""
        self.keys, self.values = selected(self.keys, indices), selected(self.values, indices)


def appended(held, new, room):
    """torch.cat of both along the columns, without a copy of `held` where its memory goes on far enough."""
    B, heads, T, D = held.shape
    end = T + new.shape[2]
    if held.stride(1) < end * D:  # how far the next head's columns are away
        larger = held.new_empty(B, heads, max(end, min(end + end // 8 + 16, room // B)), D)
        larger[:, :, :T] = held
        held = larger[:, :, :T]
    both = held.as_strided((B, heads, end, D), held.stride())
    both[:, :, T:] = new
    return both


def selected(held, indices):
    """held[indices], with the columns in reserve, unless the rows become more: they would fill another reserve."""
    B, heads, T, D = held.shape
    columns = held.stride(1) // D if len(indices) <= B else T
    return held.as_strided((B, heads, columns, D), held.stride())[indices][:, :, :T]


def sample_wave(model, contexts, ends, rows, spare, room, temperature, stop, generator):
    """Decode some rows from their contexts on, up to ends[row] tokens: until no more than `spare` of them go on, or the
    cache would hold more than `room` tokens, padding included. Contexts that are equal are prefilled once and share
    their cache; a finished row leaves the batch.

    Yields, step by step, the rows still decoding and for each of them token, log-prob and entropy.
    """
    cache, device = DynamicCache(config=model.config), model.device
    cache.layers = [GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    unique = {context: i for i, context in enumerate(dict.fromkeys(tuple(contexts[row]) for row in rows))}
    owner = torch.tensor([unique[tuple(contexts[row])] for row in rows], device=device)
    # Left padding puts every context's last token into the last column, which predicts the next token.
    padding = [max(map(len, unique)) - len(context) for context in unique]
    ids = torch.tensor([[0] * pad + [*context] for pad, context in zip(padding, unique)], device=device)
    attention_mask = torch.tensor([[0] * pad + [1] * len(c) for pad, c in zip(padding, unique)], device=device)
    width = max(1, 2**15 // len(ids))  # of one pass of prefill: its memory is bounded, too
    for start in range(0, ids.shape[1], width):
        hidden = run_blocks(model, ids[:, start : start + width], attention_mask[:, : start + width], cache)
    hidden, attention_mask = hidden[owner, -1], attention_mask[owner]  # [B, D], the state that predicts the next token
    cache.batch_select_indices(owner)
    alive, left, stop = map(ids.new_tensor, (rows, [ends[row] - len(contexts[row]) for row in rows], stop))
    for step in range(1, room + 1):
        logps = F.log_softmax(head_logits(model, hidden) / (temperature or 1.0), dim=-1)  # [alive, V]
        probs = logps.exp()
        token = torch.multinomial(probs, 1, generator=generator) if temperature else logps.argmax(-1)[:, None]
        yield alive, token.squeeze(1), logps.gather(1, token).squeeze(1), -(probs * logps).sum(-1)
        del logps, probs  # as large as the vocabulary: not beside the next pass
        keep = (~torch.isin(token.squeeze(1), stop) & (left > step)).nonzero().squeeze(1)
        if len(keep) <= spare or len(keep) * (attention_mask.shape[1] + 1) > room:
            return
        if len(keep) < len(alive):
            alive, left, token, attention_mask = (values[keep] for values in (alive, left, token, attention_mask))
            cache.batch_select_indices(keep)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
        hidden = run_blocks(model, token, attention_mask, cache)[:, -1]


def step_seed(*parts):
    """A seed made of all `parts` (run seed and step, say), so that resuming needs no stored generator state."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def micro_batches(rollouts, rows, budget):
    """Split row indices into lists of at most `budget` tokens each, padding included; similar lengths go together."""
    lengths, batches = rollouts.attention_mask.sum(1).tolist(), []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):  # longest first: the first of a batch is its width
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


# ---------------------------------------------------------------------------------------------------------------------
# 7. Optimizer
# ---------------------------------------------------------------------------------------------------------------------


class Optimizer:
    """AdamW (0.9, 0.999) on fp32 master weights, whatever the dtype of the model.

    A bf16 weight keeps 8 bits: an update of 1e-6 on a weight of 0.02 rounds to nothing. So moments and a master copy
    are fp32, beside the weights or on --optimizer_device, and the model gets the rounded master after each step; a
    model that is fp32 there already is its own master. Parameters are updated one by one, so that one fp32 gradient
    exists at a time; those whose grad is None are not touched at all: no decay, no moments.
    """

    def __init__(self, model, args):
        self.max_grad_norm, self.skipped_in_a_row, self.norms, self.slots = args.max_grad_norm, 0, [], []
        self.moved = []  # (entries seen that an update changed, entries seen with a gradient), a pair per update
        options = dict(lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
        for name, parameter in model.named_parameters():  # a tied matrix appears once
            master = parameter.detach().to(args.optimizer_device or parameter.device, torch.float32)
            self.slots.append((name, parameter, master, torch.optim.AdamW([master], **options)))

    def step(self, learning_rate=None):
        """Clip, update, clear the gradients -> norm before clipping. learning_rate: from now on; None: as before.

        A gradient that is not finite updates nothing; ten in a row raise UserError.
        """
        grads = [parameter.grad for _, parameter, _, _ in self.slots if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32).to(grads[0].device) for grad in grads]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0
        self.norms.append(norm)
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 10:
            raise UserError("10 non-finite gradients in a row; lower --learning_rate, or try --dtype float32")
        for _, parameter, master, adam in self.slots:
            if parameter.grad is not None and math.isfinite(norm):
                scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
                master.grad = parameter.grad.to(master.device, torch.float32).mul_(scale)
                adam.param_groups[0]["lr"] = adam.param_groups[0]["lr"] if learning_rate is None else learning_rate
                some = slice(0, None, 1 + master.numel() // 1024)  # does an update survive rounding? some entries tell
                before = master.data.flatten()[some].clone()
                pulled = (master.grad.flatten()[some] != 0) & (adam.param_groups[0]["lr"] > 0)
                adam.step()
                changed = (master.data.flatten()[some] != before) & pulled
                self.moved.append(torch.stack([changed.sum(), pulled.sum()]))
                parameter.data.copy_(master)  # a no-op where the parameter is its own master
            parameter.grad = master.grad = None
        return norm

    def summary(self):
        """Of the updates since the last summary: mean gradient norm before clipping, number of updates, of gradients
        that were not finite, and the share of weights with a gradient whose update did not vanish in rounding."""
        norms = [norm for norm in self.norms if math.isfinite(norm)]
        changed, pulled = sum(self.moved).tolist() if self.moved else (0, 0)
        figures = dict(grad_norm=sum(norms) / len(norms) if norms else None, optimizer_steps=len(norms))
        figures |= dict(skipped_steps=len(self.norms) - len(norms), updated_share=changed / pulled if pulled else None)
        self.norms, self.moved = [], []
        return figures

    def state_dict(self):
        """Masters and moments by parameter name."""
        return {name: dict(master=master.data, adam=adam.state_dict()) for name, _, master, adam in self.slots}

    def load_state_dict(self, state):
        """Restore what `state_dict` gave."""
        for name, _, master, adam in self.slots:
            master.data.copy_(state[name]["master"])
            adam.load_state_dict(state[name]["adam"])


# ---------------------------------------------------------------------------------------------------------------------
# 8. Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def masked_mean(values, mask):
    """Mean of values where mask is 1, as a float; 0.0 where nothing is."""
    return float((values * mask).sum() / mask.sum().clamp(min=1))


def grade_rollouts(rollouts, problems):
    """Rewards [P, G] of rollouts whose B rows are prompt-major over the problems."""
    G = len(rollouts.texts) // len(problems)
    rollouts.verdicts = judge(rollouts.texts, [p for p in problems for _ in range(G)], rollouts.finished)
    return torch.tensor([REWARDS.get(verdict, 0.0) for verdict in rollouts.verdicts]).view(len(problems), G)


def evaluate(model, tokenizer, problems, n, temperature=1.0, max_completion_length=8192, **sampling):
    """Sample n answers per problem and score them; sampling: further arguments of `sample`.

    -> dict: accuracy (mean over all answers, avg@n), response_length (tokens), entropy (nats per token),
    truncated_share, rewards [P, n], and the rollouts themselves.
    """
    prompts = [problem.ids or problem.prompt for problem in problems]
    rollouts = sample(model, tokenizer, prompts, n, max_completion_length, temperature, **sampling)
    rewards = grade_rollouts(rollouts, problems)
    return dict(**summary(rollouts, rewards), rewards=rewards, rollouts=rollouts)


def summary(rollouts, rewards):
    """What training steps and evaluations both log of a batch of answers. rewards [P, G] -> dict of floats."""
    means = dict(accuracy=rewards == 1, response_length=rollouts.lengths, truncated_share=~rollouts.finished)
    means = {name: float(values.float().mean()) for name, values in means.items()}
    return means | dict(entropy=masked_mean(rollouts.entropy, rollouts.mask))


def per_token(sums):
    """Sums over tokens, and their number under 'tokens' -> means by name; None where no token was trained."""
    tokens = sums.pop("tokens")
    return {name: value / tokens if tokens else None for name, value in sums.items()}


def logp_gap(rollouts, logps, rows):
    """Mean and largest distance, in nats, between the sampler's and the training path's log-probs over some rows'
    completion tokens. What is sampled must be what is trained, so only rounding may remain. None without rows."""
    mask = rollouts.mask[list(rows)]
    gap = (logps - rollouts.logps)[list(rows)].abs() * mask
    mean, largest = (masked_mean(gap, mask), gap.max().item()) if rows else (None, None)
    return dict(logp_gap=mean, logp_gap_max=largest)


@torch.no_grad()
def kl_between(model, other, rollouts, micro_batch_tokens, temperature=1.0):
    """KL(model || other) in nats per token on completions sampled from `model`: the mean of k3 = exp(x) - x - 1 with
    x = logp_other - logp_model, which is unbiased and never negative."""
    total = 0.0
    for rows in micro_batches(rollouts, range(len(rollouts.ids)), micro_batch_tokens):
        logps, _ = completion_logps(model, rollouts, rows, temperature)
        x = (completion_logps(other, rollouts, rows, temperature)[0] - logps).clamp(-20, 20)
        total += float(((x.exp() - x - 1) * rollouts.mask[rows]).sum())
    return total / float(rollouts.mask.sum())

"""The worlds a model lives in, and the problems they pose.

Every file of this folder that has NAMES is a built-in task: arithmetic.py and countdown.py. It brings its problems, its
verdict on an answer, and a scripted teacher and solver, who write completions to imitate. To add a task, add a file;
no other file of the project has to know its name. A task file has

    NAMES                                       what --data calls it, such as ("countdown", "countdown-small")
    TAKES_SYSTEM_PROMPT                         False if its prompts say themselves how to answer
    problems(name, split, n, seed=0)            n problems of 'train' or 'test', which share none
    problem_from_record(prompt, record, where)  only where its Problem has a class of its own: rebuilds it from a log
    DEFAULT_TRAJECTORIES                        how many problems sft.py writes completions for
    teach(problem, generator)                   a completion by an imperfect teacher
    solve(problem, behaviours, wrong, generator)    thinking that shows these behaviours, and an answer
    complete(problem, thinking, answer)         both as one completion
    exercises()                                 calculations, worked out: a list of (prompt, completion)

What comes from outside, files and data sets of the hub, is read by data_files.py; its answers are compared with
the gold answer by the verifier. Nothing in this folder imports torch.
"""

import functools
import importlib
import pkgutil
import sys
from dataclasses import dataclass

from plumbing import verifier
from plumbing.errors import UserError
from tasks.answers import HASHES, gradable
from tasks.data_files import find_answer, find_prompt, problem_from_row, read_rows

DEFAULT = "arithmetic"  # the task that --data has without being told, and that the embedded model is made for
DEFAULT_PROBLEMS = 4096  # of a built-in task
LISTED = 9  # of many faulty problems, so many are named


@dataclass
class Problem:
    """One problem. A task whose answers are judged in another way derives its own class from this one."""

    prompt: str | list[dict]  # text or chat messages
    answer: str  # the gold answer; '' where none is known
    where: str = ""  # its source, for messages: file and line
    ids: list[int] | None = None  # prompt tokens, set once by `plumbing.models.tokenize_problems`

    def question(self):
        """The text of the problem, without the system message."""
        if isinstance(self.prompt, str):
            return self.prompt
        return self.prompt[-1]["content"]

    def verdict(self, text):
        """The task's verdict on a finished answer: 'right', 'well-formed' or 'wrong'. None: the verifier compares
        final_answer(text) with the gold answer."""
        return None

    def final_answer(self, text):
        """What counts of an answer, as text; '' if it has none or one that is too long to be judged."""
        return gradable(text)

    def record(self):
        """What logs keep of the problem beside prompt and gold answer, so that `problem_from_record` can rebuild it."""
        return {}


@functools.cache
def built_in():
    """Name -> module of every built-in task, found by looking through this folder."""
    found = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"tasks.{file.name}")
        for name in getattr(module, "NAMES", ()):
            found[name] = module
    return found


def load_problems(source, split="train", limit=0, system_prompt="", labels=True):
    """Problems of `source` as a list.

    source: the name of a built-in task; a .jsonl, .json or .parquet file; hf://datasets/OWNER/NAME/FILE; or a data set
    of the hub, with its config behind a colon if it has several: openai/gsm8k:main (needs `datasets`). limit: the first
    so many; 0 for all (of a built-in task: 4096). system_prompt: goes before every problem that has none. labels=False
    lets rows without answer through: theirs is '', which no completion matches. Raises UserError for a source that is
    missing, empty or malformed, and for rows without problem or answer.
    """
    task = built_in().get(source)
    if task:
        problems = task.problems(source, split, limit or DEFAULT_PROBLEMS)
        if len(problems) < limit:
            print(f"note: {source} {split} has {len(problems):,} problems, not {limit:,}", file=sys.stderr)
        if not task.TAKES_SYSTEM_PROMPT:
            return problems
    else:
        problems = read_problems(source, split, labels)
        if limit:
            problems = problems[:limit]
        report_unreadable_golds(problems)
    if not problems:
        raise UserError(f"{source}: holds no problem; every line must hold a JSON object with a problem and its answer")
    return add_system_prompt(problems, system_prompt)


def read_problems(source, split, labels):
    """The problems of a file or a data set of the hub, a list. Raises UserError, also where only some of the answers
    have a ####: the gold answer of the others would be a whole solution, which no completion matches."""
    problems = []
    first = {}  # whether the answer has a #### -> where that is so for the first time
    for where, row in read_rows(source, split):
        problem = problem_from_row(where, row, labels)
        problems.append(problem)
        if problem.answer:
            first.setdefault(HASHES in find_answer(row), where)
    if len(first) == 2:
        remedy = "write all answers in one way"
        raise UserError(f"{first[False]}: no '{HASHES}' in its answer, but in that of {first[True]}; {remedy}")
    return problems


def report_unreadable_golds(problems):
    """Name on stderr the problems whose gold answer the verifier cannot read: only the very same text is right there.

    Every gold is compared with an empty answer: one that can be read is different ('wrong').
    """
    verdicts = verifier.compare([(problem.answer, "") for problem in problems])
    unreadable = []
    for problem, verdict in zip(problems, verdicts):
        if problem.answer and verdict != "wrong":
            unreadable.append(problem.where)
    if unreadable:
        names = ", ".join(unreadable[:LISTED])
        print(f"{len(unreadable)} gold answers compare as text only: {names}", file=sys.stderr)


def add_system_prompt(problems, system_prompt):
    """Put a system message before every prompt that has none, and return the problems; '' leaves them as they are."""
    if not system_prompt:
        return problems
    for problem in problems:
        messages = problem.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if messages[0]["role"] != "system":
            problem.prompt = [{"role": "system", "content": system_prompt}, *messages]
    return problems


def problem_from_record(record, where=""):
    """The problem of a logged answer, of the same class that it had.

    record: a row of completions.jsonl (with fields problem, gold) or of a sample file (prompt, gold), and what
    `Problem.record` has added. Without a prompt the problem can still judge answers.
    """
    prompt = find_prompt(record) or ""
    for task in built_in().values():
        if hasattr(task, "problem_from_record"):
            problem = task.problem_from_record(prompt, record, where)
            if problem is not None:
                return problem
    return Problem(prompt, record["gold"], where)

"""Countdown: make a target of given numbers, each used exactly once, by + - * / and parentheses.

Two sizes. countdown: 3 or 4 numbers of 1..99, target 10..100, a prompt in the style of R1-Zero that asks for thinking
and answer between tags. countdown-small, for the embedded model: 3 numbers of 1..9, no division, target 1..50, the
prompt '3 5 8=37', the answer in a box.

A problem has many right answers, so the verdict is the task's own: it looks at the numbers used and at the value.
"""

import ast
import hashlib
import random
import re
from dataclasses import dataclass
from fractions import Fraction

from tasks import Problem, integers
from tasks.answers import boxed, last_boxed, limited
from tasks.behaviours import ENGLISH_WRITER, NOTATION_WRITER
from tasks.integers import calculate

NAMES = ("countdown", "countdown-small")
TAKES_SYSTEM_PROMPT = False  # the prompt says itself how to answer
DEFAULT_TRAJECTORIES = 4096

PROMPT = (  # in the style of R1-Zero: think first, then answer, each between its tags
    "Make {target} of the numbers {numbers}, each used exactly once, by + - * / and parentheses. Think between <think> "
    "and </think>; then give only the expression between <answer> and </answer>, as in <answer>(1 + 2) * 3</answer>."
)


@dataclass(kw_only=True)
class CountdownProblem(Problem):
    """A Countdown problem. `answer`, the gold answer, is one way to solve it."""

    numbers: list[int]  # what there is to combine, each exactly once
    target: int  # what they must make

    def verdict(self, text):
        """'right', 'well-formed' or 'wrong', see `judge_expression`."""
        return judge_expression(last_answer(text), self.numbers, self.target)

    def final_answer(self, text):
        """What stands between the last answer tags, or else in the last box; '' if there is none, or over 2,000
        characters."""
        return limited(last_answer(text))

    def record(self):
        """What a log keeps, so that an answer can be judged again."""
        return dict(numbers=self.numbers, target=self.target)

    def uses_tags(self):
        """True if the prompt asks for thinking and answer between tags, False if the answer belongs into a box."""
        return "<think>" in self.question()


def problem_from_record(prompt, record, where):
    """The problem of a logged answer; None for a record of another task."""
    numbers = record.get("numbers")
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
        return None
    target = record.get("target")  # a row without one is no reason to stop: nothing makes None, so no answer is right
    return CountdownProblem(prompt, record["gold"], where, numbers=record["numbers"], target=target)


# ---------------------------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Size:
    """What makes one of the two sizes."""

    counts: tuple[int, ...]  # how many numbers a problem may have
    largest_number: int
    lowest_target: int
    highest_target: int
    signs: str
    prompt: str


SIZES = {
    "countdown": Size((3, 4), 99, 10, 100, "+-*/", PROMPT),
    "countdown-small": Size((3,), 9, 1, 50, "+-*", "{numbers}={target}"),
}

ENOUGH = 5000  # draws in a row without a new problem: there are no more


def problems(name, split, n, seed=0):
    """n problems that can be solved, a list of CountdownProblem; of countdown-small fewer where there are no more.

    split: 'train' or 'test'. A hash of the sorted numbers and the target decides, so the two are disjoint whatever the
    seed and the order of the numbers.
    """
    size = SIZES[name]
    generator = random.Random(f"countdown-{split}-{seed}")
    found = {}  # prompt -> problem
    in_vain = 0
    while len(found) < n and in_vain < ENOUGH:
        numbers = random_numbers(size, generator)
        target, answer = combine(numbers, generator, size.signs)
        prompt = size.prompt.format(numbers=" ".join(map(str, numbers)), target=target)
        in_vain += 1
        fits = size.lowest_target <= target <= size.highest_target
        in_split = is_held_out(numbers, target) == (split == "test")
        if fits and in_split and prompt not in found:
            in_vain = 0
            where = f"countdown {split} {len(found)}"
            found[prompt] = CountdownProblem(prompt, answer, where, numbers=numbers, target=target)
    return list(found.values())


def random_numbers(size, generator):
    """The numbers of a problem, a list. How many is drawn only where there is a choice."""
    count = size.counts[0]
    if len(size.counts) > 1:
        count = generator.choice(size.counts)
    return [generator.randint(1, size.largest_number) for _ in range(count)]


def combine(numbers, generator, operators="+-*/"):
    """A random expression that uses every number once, all of whose intermediate values are integers above 0 ->
    (value, text), such as (37, '(8*5)-3')."""
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
        generator.shuffle(terms)
        a, left = terms.pop(0)
        b, right = terms.pop(0)
        possible = [sign for sign in operators if calculate(a, sign, b) > 0]
        sign = generator.choice(possible)
        terms.append((calculate(a, sign, b), f"({left}{sign}{right})"))
    value, text = terms[0]
    return value, text[1:-1]  # without the parentheses around the whole


def is_held_out(numbers, target):
    """Whether a problem belongs to the test split: one in eight, by its hash."""
    return hashlib.sha256(f"{sorted(numbers)} {target}".encode()).digest()[0] < 32


# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------

LONGEST_EXPRESSION = 100  # characters
ATTEMPT = re.compile(r"[-+*/()0-9.=x×÷− ]*[0-9][-+*/()0-9.=x×÷− ]*")  # numbers among the signs of arithmetic
EXPRESSION = re.compile(r"[-+*/()0-9 ]+")  # no name, no call, no hexadecimal number

OPERATIONS = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
}
SIGNED = {ast.UAdd: Fraction.__pos__, ast.USub: Fraction.__neg__}


def last_answer(text):
    """What stands between the last <answer> and </answer> of a text, or else in its last box, or None."""
    before_end = text.rpartition("</answer>")[0]
    _, tag, answer = before_end.rpartition("<answer>")
    if tag:
        return answer
    return last_boxed(text)


def judge_expression(expression, numbers, target):
    """'right' for an expression that uses every number exactly once and has the value target; 'well-formed' for any
    other attempt: numbers among signs of arithmetic, such as '3 x 4' or '3*4=12'; 'wrong' for anything else.

    Where this differs from the reward of TinyZero, which the paper on cognitive behaviours takes
    (https://github.com/Jiayi-Pan/TinyZero): there any text between the tags is well-formed; '1.5*4' is right where 6 is
    to be made of 1, 4, 5; so are powers and //; and the value may miss the target by 1e-5. Here it is exact.
    """
    expression = " ".join((expression or "").split())
    expression = re.sub("(?<=[0-9])[.](?![0-9])", "", expression)  # a full stop behind a number, not a decimal point
    # Short and of few characters: nothing can nest deeply, grow or be a name, even before it is parsed.
    if len(expression) > LONGEST_EXPRESSION or not ATTEMPT.fullmatch(expression):
        return "wrong"
    used = [int(number) for number in re.findall("[0-9]+", expression)]
    if sorted(used) != sorted(numbers):
        return "well-formed"
    value = value_of(expression)
    if value is not None and value == target:
        return "right"
    return "well-formed"


def value_of(expression):
    """Exact value of an expression; None for a text that is none, and for a division by zero."""
    if not EXPRESSION.fullmatch(expression):
        return None
    try:
        return evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, AttributeError, KeyError, ZeroDivisionError):
        return None


def evaluate(node):
    """Exact value of a syntax tree. Operators between numbers and signs before them only: any name, call, power or
    attribute raises AttributeError or KeyError."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return SIGNED[type(node.op)](evaluate(node.operand))
    operation = OPERATIONS[type(node.op)]
    return operation(evaluate(node.left), evaluate(node.right))


# ---------------------------------------------------------------------------------------------------------------------
# The teacher, and the solver, who searches and shows the behaviours asked for
# ---------------------------------------------------------------------------------------------------------------------

RIGHT_GUESSES = 0.3  # of the teacher
GIVES_UP = 0.15  # after a failed attempt the solver's search ends so often
MOST_ATTEMPTS = 8  # of one search, so that it stays below 256 tokens
EXPRESSIONS = 700  # among the exercises

SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


def teach(problem, generator, guesses=1.0):
    """The teacher's completion. It always answers at once, right 3 times in 10, whatever `guesses` is."""
    answer = problem.answer
    if generator.random() >= RIGHT_GUESSES:
        answer = failed_attempt(problem, generator)
    return complete(problem, "", answer)


def solve(problem, behaviours, wrong, generator):
    """(thinking, answer) for a problem, showing `behaviours` (names of tasks.behaviours.BEHAVIOURS).

    The solver does not know the solution. It searches, and its last attempt is its answer, right or not. wrong: only
    searches that failed; what they check is as true as in any other.
    """
    attempts = search(problem, behaviours, generator)
    while wrong and makes_target(attempts[-1], problem):
        attempts = search(problem, behaviours, generator)
    writer = ENGLISH_WRITER if problem.uses_tags() else NOTATION_WRITER
    thinking = ""
    for attempt in attempts[:-1]:
        thinking += write_attempt(attempt, problem.target, behaviours, writer) + writer.dropped
    thinking += write_attempt(attempts[-1], problem.target, behaviours, writer) + writer.kept
    return thinking.strip(), attempts[-1]


def search(problem, behaviours, generator):
    """Attempts, a list: expressions of the problem's numbers, each drawn as if there had been no other.

    It ends with the first that makes the target; before that where the solver gives up; and after one attempt without
    backtracking, which is what going on to another attempt is.
    """
    attempts = [any_attempt(problem, generator)]
    if "backtracking" not in behaviours:
        return attempts
    while len(attempts) < MOST_ATTEMPTS and not makes_target(attempts[-1], problem):
        if generator.random() < GIVES_UP:
            break
        attempts.append(any_attempt(problem, generator))
    return attempts


def any_attempt(problem, generator):
    """A random expression of the problem's numbers."""
    signs = "+-*/" if problem.uses_tags() else "+-*"
    _, expression = combine(problem.numbers, generator, signs)
    return expression


def makes_target(expression, problem):
    """Whether an expression has the value that the problem asks for."""
    return value_of(expression) == problem.target


def failed_attempt(problem, generator):
    """A random expression of the problem's numbers with another value than the target."""
    while True:
        expression = any_attempt(problem, generator)
        if not makes_target(expression, problem):
            return expression


def write_attempt(expression, target, behaviours, writer):
    """The thinking about one expression: it is worked out, one operation at a time. `behaviours` add a check, name a
    part first, or begin at the target.

    writer: how it is worded, NOTATION_WRITER or ENGLISH_WRITER.
    """
    node = ast.parse(expression, mode="eval").body
    text = ""
    goal = target  # what the rest of the expression must make
    undone = None
    if "backward_chaining" in behaviours:
        undone = undo_last(node, target)
    if undone:
        back, goal, node = undone
        text += writer.backward_step(back, goal) + writer.kept
    value, steps = steps_of(node)
    if "subgoal_setting" in behaviours:
        first_part, _ = steps[0]
        text += writer.subgoal(first_part)
    if undone or "subgoal_setting" in behaviours:
        text += writer.kept.join(writer.step(part, result) for part, result in steps)
    else:
        text += writer.attempt(stages_of(expression, steps))
    if "verification" in behaviours:
        text += writer.check(value, goal)
    return text


def steps_of(node):
    """Syntax tree of an expression -> (value, steps): a pair ('8*5', 40) for every operation, operands first."""
    if isinstance(node, ast.Constant):
        return node.value, []
    x, left_steps = steps_of(node.left)
    y, right_steps = steps_of(node.right)
    sign = SIGNS[type(node.op)]
    value = calculate(x, sign, y)
    return value, left_steps + right_steps + [(f"{x}{sign}{y}", value)]


def stages_of(expression, steps):
    """'(8*5)-3' and its steps -> ['(8*5)-3', '40-3', '37']: one operation after another is replaced by its value."""
    stages = [expression]
    for part, value in steps[:-1]:
        expression = expression.replace(f"({part})", str(value), 1)
        stages.append(expression)
    _, result = steps[-1]
    return [*stages, str(result)]


def undo_last(node, target):
    """Syntax tree of an expression -> (step back from the target, number then needed, tree of what must make it): with
    target 24 '(8+6)+5' gives '24-5', 19 and 8+6. None where no plain number can be undone to a whole number. One
    below 0 is told, too: it says that this attempt cannot work."""
    sign = SIGNS[type(node.op)]
    rest = node.left
    number = node.right
    if isinstance(node.left, ast.Constant) and sign in "+*":  # here the order does not matter
        rest = node.right
        number = node.left
    if not isinstance(number, ast.Constant) or isinstance(rest, ast.Constant):
        return None
    if sign == "*" and target % number.value:
        return None
    needed = calculate(target, INVERSE[sign], number.value)
    back = f"{target}{INVERSE[sign]}{number.value}"
    return back, needed, rest


def complete(problem, thinking, answer):
    """Thinking and answer as one completion, between tags if the prompt asks for them."""
    if problem.uses_tags():
        return f"<think>{thinking}</think>\n<answer>{answer}</answer>"
    return thinking + boxed(answer)


def exercises():
    """Single steps of countdown-small, and random expressions worked out, as (prompt, completion): a model that knows
    these can calculate. Steps backwards, from the target, divide, and go below 0. No expression solves a held-out
    problem."""
    size = SIZES["countdown-small"]
    generator = random.Random("countdown exercises")
    found = integers.single_steps(size.largest_number, "+-*/", lowest=1 - size.largest_number)
    singles = len(found)
    while len(found) < singles + EXPRESSIONS:
        numbers = random_numbers(size, generator)
        value, expression = combine(numbers, generator, size.signs)
        if is_held_out(numbers, value):
            continue
        _, steps = steps_of(ast.parse(expression, mode="eval").body)
        worked_out = NOTATION_WRITER.attempt(stages_of(expression, steps)) + NOTATION_WRITER.kept
        found.append((f"{expression}=", worked_out + boxed(value)))
    return found

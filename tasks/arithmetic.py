"""Chains of four additions and subtractions of digits: '7+9-8+5-4='. The world of the embedded model, its teacher and
its solver.

The teacher is imperfect on purpose, in three ways:
- It gives up, before any step, and guesses: the later, the better. So an answer may come early, and it is worth more
  the more has been worked out.
- It mostly forgets to borrow, as children do: 16-8=18. Here the most likely answer is wrong and some samples are right:
  no sharpening helps, only a reward does.
- It slips elsewhere, in one step of ten. Here the most likely answer is right, and only samples are wrong.
It also checks some of its steps by the inverse operation, and goes back where the check fails. So equally good answers
have different lengths.

A model that imitates it has better behaviours to be amplified. That is what the reinforcement learning of grpo.py,
bupo.py and opo.py finds, and what the entropy minimization of em.py bets on.
"""

import hashlib
import random

from plumbing.errors import UserError
from tasks import Problem, integers
from tasks.answers import boxed
from tasks.behaviours import DROPPED, KEPT, backward_step, check, step, subgoal

NAMES = ("arithmetic",)
TAKES_SYSTEM_PROMPT = True
DEFAULT_TRAJECTORIES = 20000

NUMBERS = 5  # in a chain
LARGEST_NUMBER = 9
AVAILABLE = {"train": 426_243, "test": 61_431}  # how many problems there are, by counting

# ---------------------------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------------------------


def problems(name, split, n, seed=0):
    """n chains on numbers of 1..9 whose every intermediate result is 0 or more, at most 45, a list of Problem.

    split: 'train' or 'test'. A hash of the expression decides, so the two are disjoint whatever the seed. Raises
    UserError for more than there are.
    """
    if n > AVAILABLE[split]:
        raise UserError(f"arithmetic {split}: has {AVAILABLE[split]:,} problems, not {n:,}; ask for fewer")
    generator = random.Random(f"{split}-{seed}")
    found = {}  # expression -> problem
    while len(found) < n:
        text = random_chain(generator)
        results = results_of(numbers_of(text))
        in_bounds = min(results) >= 0
        if in_bounds and is_held_out(text) == (split == "test"):
            where = f"arithmetic {split} {len(found)}"
            found[text] = Problem(f"{text}=", str(results[-1]), where)
    return list(found.values())


def random_chain(generator):
    """An expression such as '7+15-3+8'."""
    text = ""
    for i in range(NUMBERS):
        sign = generator.choice("+-")  # one is drawn before the first number, too, and not used
        if i > 0:
            text += sign
        text += str(generator.randint(1, LARGEST_NUMBER))
    return text


def numbers_of(text):
    """'7+15-3+8=' -> [7, 15, -3, 8]."""
    spaced = text.rstrip("=").replace("+", " +").replace("-", " -")
    return [int(number) for number in spaced.split()]


def results_of(numbers):
    """[7, 15, -3, 8] -> [7, 22, 19, 27]: the first number and the result of every step."""
    results = []
    value = 0
    for number in numbers:
        value += number
        results.append(value)
    return results


def is_held_out(text):
    """Whether an expression belongs to the test split: one in eight, by its hash."""
    return hashlib.sha256(text.encode()).digest()[0] < 32


# ---------------------------------------------------------------------------------------------------------------------
# The teacher of the embedded model
# ---------------------------------------------------------------------------------------------------------------------

# Of every step, in the order of the chain: how often the teacher gives up before it, and is right then all the same.
GIVES_UP = (0.12, 0.1, 0.15, 0.35)
RIGHT_GUESSES = (0.2, 0.3, 0.7, 0.98)
FORGETS_TO_BORROW = 0.85  # share of the subtractions across a ten: the usual thing is wrong
SLIPS = 0.1  # share of the other steps
CHECKS = 0.25  # share of all steps


def teach(problem, generator, guesses=0.0):
    """The imperfect teacher's completion.

    Step by step: '7+9=16;16-8=8;8+5=13;13-4=9;\\boxed{9}'. Or '7+9=16;16-8=18?18+8=26~16-8=8;\\boxed{9}': a borrow is
    forgotten, the check by the inverse operation shows it, the step is done again; then the teacher gives up and
    guesses. What is not checked is not noticed, and the work goes on from there.
    guesses: the share of answers at once, such as '\\boxed{9}', whatever GIVES_UP says.
    """
    numbers = numbers_of(problem.question())
    if generator.random() < guesses:
        return guess(sum(numbers), RIGHT_GUESSES[0], generator)
    text = ""
    value = numbers[0]
    for i, number in enumerate(numbers[1:]):
        if generator.random() < GIVES_UP[i]:
            rest = sum(numbers[i + 1 :])
            return text + guess(value + rest, RIGHT_GUESSES[i], generator)
        result = attempt(value, number, generator)
        text += step(f"{value}{number:+d}", result)
        if generator.random() < CHECKS:
            text += check(f"{result}{-number:+d}", result - number)
            if result != value + number:
                result = value + number
                text += DROPPED + step(f"{value}{number:+d}", result)
        text += KEPT
        value = result
    return text + boxed(value)


def attempt(value, number, generator):
    """The result that the teacher writes for value + number: often it forgets to borrow, sometimes it slips."""
    result = value + number
    borrows = number < 0 and value >= 10 and value % 10 < -number
    if borrows and generator.random() < FORGETS_TO_BORROW:
        return result + 10  # 16-8=18: from the ten nothing is taken away
    if generator.random() < SLIPS:
        result += wrong_by(result, generator)
    return result


def guess(value, right, generator):
    """The answer `value` without further steps; right: the chance that it is not another one."""
    if generator.random() >= right:
        value += wrong_by(value, generator)
    return boxed(value)


def wrong_by(value, generator):
    """A nonzero error of at most 9 that leaves value + error at 0 or above, or as near as it can."""
    lowest = -min(9, max(-9, value))
    errors = [error for error in range(lowest, 10) if error != 0]
    return generator.choice(errors)


# ---------------------------------------------------------------------------------------------------------------------
# The solver, who shows the behaviours asked for
# ---------------------------------------------------------------------------------------------------------------------

NOTICED_SLIPS = 0.3  # share of steps before which a slip is made and taken back, under backtracking


def solve(problem, behaviours, wrong, generator):
    """(thinking, answer) for a chain, showing `behaviours` (names of tasks.behaviours.BEHAVIOURS).

    All of them work in steps: there is nothing else to check. The subgoal is what the first half of the numbers makes.
    Backwards starts with the last number; if a subgoal is asked for, too, either happens. wrong: one step slips, its
    check as well, and it goes unnoticed.
    """
    numbers = numbers_of(problem.question())
    backward = "backward_chaining" in behaviours
    if backward and "subgoal_setting" in behaviours:
        backward = generator.random() < 0.5
    if backward:
        numbers.reverse()
    unnoticed = 0  # the number of the step that slips; 0 for none
    if wrong:
        unnoticed = generator.randrange(1, len(numbers))
    verify = "verification" in behaviours
    thinking = ""
    value = numbers[0]
    if "subgoal_setting" in behaviours and not backward:
        thinking += subgoal(first_half(numbers))
    for i, number in enumerate(numbers[1:], 1):
        x = number if backward else value
        y = value if backward else number
        value = x + y  # what the step should give
        slip = value + wrong_by(value, generator)
        if i == unnoticed:
            value = slip
        elif "backtracking" in behaviours and generator.random() < NOTICED_SLIPS:
            thinking += write_step(x, y, slip, slip - y, backward, verify) + DROPPED
        thinking += write_step(x, y, value, x, backward, verify) + KEPT
    return thinking, str(value)


def first_half(numbers):
    """[7, 15, -3, 8] -> '7+15', the numbers of a chain with their signs; of five numbers three."""
    half = (len(numbers) + 1) // 2
    text = str(numbers[0])
    for number in numbers[1:half]:
        text += f"{number:+d}"
    return text


def write_step(x, y, result, undone, backward, verify):
    """The step x + y, and if `verify` its check by the inverse operation, result - y, which gives `undone`."""
    write = backward_step if backward else step
    text = write(f"{x}{y:+d}", result)
    if verify:
        text += check(f"{result}{-y:+d}", undone)
    return text


def complete(problem, thinking, answer):
    """Thinking and answer as one completion."""
    return thinking + boxed(answer)


def exercises():
    """Every single step of a chain, as (prompt, completion)."""
    return integers.single_steps(LARGEST_NUMBER, "+-")

"""Word problems of one to three steps, for a real language model: 'Tom has 7 apples and buys 15 more. How many ...?'

Two sets of templates that share no sentence. words: its test split asks about held-out numbers in the sentences that
were trained. words-unseen: other sentences, the same arithmetic; evaluate on it to see what carries over.

The teacher of sft.py's cold start is imperfect on purpose: he guesses at once in 40% of his examples,
and slips in 18% of his steps. So there is a better behaviour to be amplified.
"""

import hashlib
import random
from dataclasses import dataclass

from plumbing.errors import UserError
from tasks import Problem
from tasks.answers import boxed
from tasks.integers import calculate

NAMES = ("words", "words-unseen")
TAKES_SYSTEM_PROMPT = True
DEFAULT_TRAJECTORIES = 4096

# ---------------------------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------------------------

# Sentences with numbers a, b, c, d, and the signs between these numbers, from left to right.
TEMPLATES = {
    "words": (
        ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "+"),
        ("{name} had {a} {things} and gave {b} of them away. How many {things} are left?", "-"),
        ("There are {a} boxes with {b} {things} in each. How many {things} are there in all?", "*"),
        ("{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?", "/"),
        ("{name} has {a} {things}, finds {b} more and loses {c}. How many {things} does {name} have now?", "+-"),
        ("{name} buys {a} bags of {b} {things} each and uses {c}. How many {things} are left?", "*-"),
        ("{name} packs {a} {things} into boxes of {b} and then gets {c} more boxes. How many boxes are there?", "/+"),
        (
            "{name} had {a} {things}. {name} gave {b} to a friend, found {c} and then lost {d}. How many {things} does "
            "{name} have now?",
            "-+-",
        ),
        (
            "A shop has {a} shelves of {b} {things}, sells {c} and gets {d} new ones. How many {things} are there?",
            "*-+",
        ),
    ),
    "words-unseen": (
        ("In a garden grow {a} roses. {name} plants {b} more. What is the number of roses then?", "+"),
        ("A bus carries {a} people and {b} of them get off. How many people stay on the bus?", "-"),
        ("Each of {a} teams has {b} players. What is the number of players?", "*"),
        ("{a} pages are read in equal parts on {b} days. How many pages are read on one day?", "/"),
        ("{name} saves {a} dollars in May and {b} dollars in June, and spends {c} dollars. How much is left?", "+-"),
        ("A farmer has {a} fields with {b} trees each and cuts down {c} trees. How many trees still stand?", "*-"),
        ("A train with {a} people stops: {b} get off and {c} get on; then {d} get off. How many remain?", "-+-"),
    ),
}
NAMES_OF_PEOPLE = ("Tom", "Anna", "Ben", "Mia", "Leo", "Emma", "Sam", "Lucy", "Omar", "Nina")
THINGS = ("apples", "books", "pencils", "marbles", "cards", "stamps", "shells", "coins", "stickers", "cookies")
LARGEST = 99


@dataclass(kw_only=True)
class WordProblem(Problem):
    """A word problem, and how it is calculated: from left to right."""

    numbers: list[int]
    signs: str


def problems(name, split, n, seed=0):
    """n different problems, a list of WordProblem.

    split: 'train' or 'test'. A hash of the sentence decides, so the two share none whatever the seed.
    """
    generator = random.Random(f"{name}-{split}-{seed}")
    found = {}  # sentence -> problem
    while len(found) < n:
        sentence, signs = generator.choice(TEMPLATES[name])
        numbers = random_numbers(signs, generator)
        if numbers is None:
            continue
        text = sentence.format(
            name=generator.choice(NAMES_OF_PEOPLE),
            things=generator.choice(THINGS),
            **dict(zip("abcd", numbers)),
        )
        if is_held_out(text) == (split == "test"):
            answer = str(results_of(numbers, signs)[-1])
            where = f"{name} {split} {len(found)}"
            found[text] = WordProblem(text, answer, where, numbers=numbers, signs=signs)
    return list(found.values())


def random_numbers(signs, generator):
    """Numbers for these signs whose every result is in 1..99, a list; None where a draw gives none."""
    numbers = [generator.randint(2, LARGEST)]
    for sign in signs:
        largest = 9 if sign in "*/" else LARGEST
        numbers.append(generator.randint(2, largest))
    for result in results_of(numbers, signs):
        if not 1 <= result <= LARGEST:
            return None
    return numbers


def results_of(numbers, signs):
    """The first number and the result of every step: [2, 6, 5], '*-' -> [2, 12, 7]."""
    results = [numbers[0]]
    for sign, number in zip(signs, numbers[1:]):
        results.append(calculate(results[-1], sign, number))
    return results


def is_held_out(text):
    """Whether a sentence belongs to the test split: one in eight, by its hash."""
    return hashlib.sha256(text.encode()).digest()[0] < 32


# ---------------------------------------------------------------------------------------------------------------------
# The teacher
# ---------------------------------------------------------------------------------------------------------------------

GUESSES = 0.4  # share of examples that are answered at once
RIGHT_GUESSES = 0.3  # share of those that are right
SLIPS = 0.18  # share of wrong steps


def teach(problem, generator, guesses=GUESSES):
    """The teacher's completion: a line for every step, each of which may slip, and the answer; or a guess."""
    if generator.random() < guesses:
        value = int(problem.answer)
        if generator.random() >= RIGHT_GUESSES:
            value = slip(value, generator)
        return boxed(value)
    lines = []
    value = problem.numbers[0]
    for sign, number in zip(problem.signs, problem.numbers[1:]):
        result = calculate(value, sign, number)
        if result == 0:  # a division that a slip before has spoilt
            result = value // number
        if generator.random() < SLIPS:
            result = slip(result, generator)
        lines.append(f"{value} {sign} {number} = {result}")
        value = result
    return "\n".join([*lines, boxed(value)])


def slip(value, generator):
    """A number near value, and not below 0."""
    return generator.choice([near for near in range(max(0, value - 9), value + 10) if near != value])


def solve(problem, behaviours, wrong, generator):
    """Not written for sentences: raises UserError."""
    raise UserError("--behaviours: are scripted for arithmetic and countdown, not for words")


def complete(problem, thinking, answer):
    """Thinking and answer as one completion."""
    return thinking + boxed(answer)


def exercises():
    """None: there is no smaller problem than a sentence."""
    return []

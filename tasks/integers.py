"""What the tasks about whole numbers share: one operation, and every single operation as an exercise."""

import itertools

from tasks.answers import boxed
from tasks.behaviours import KEPT, step


def calculate(x, sign, y):
    """x sign y for integers and one of + - * /; 0 where a division leaves a remainder."""
    if sign == "+":
        return x + y
    if sign == "-":
        return x - y
    if sign == "*":
        return x * y
    if x % y:
        return 0
    return x // y


def single_steps(largest, signs, lowest=0):
    """Every 'x+y=' with x of 0 to 99 and y of 1 to `largest` that gives `lowest` to 99, for other signs alike, with its
    one step and the answer, as (prompt, completion). A division that leaves a remainder is no step."""
    found = []
    for x, sign, y in itertools.product(range(100), signs, range(1, largest + 1)):
        if sign == "/" and x % y:
            continue
        value = calculate(x, sign, y)
        if lowest <= value <= 99:
            operation = f"{x}{sign}{y}"
            completion = step(operation, value) + KEPT + boxed(value)
            found.append((f"{operation}=", completion))
    return found

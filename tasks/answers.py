"""Final answers in a text: \\boxed{...}, as mathematics writes them, and #### ..., as the data set GSM8K does."""

import re

# What matters on the way through a text: the start of a box, an escaped character such as \{, and plain braces.
BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)

HASHES = "####"
# A number behind them, with what some rows add to it: "-5.50", "$1,234", "18 dollars".
AMOUNT = re.compile(r"(-?)\\?[$€£]?\s*(\d[\d,]*(?:\.\d+)?)\.?(?:\s+[A-Za-z][A-Za-z .]*)?")

LONGEST_ANSWER = 2000  # characters; what is longer is no answer, and could take the verifier for ever


def boxed(answer):
    """The text that states a final answer."""
    return f"\\boxed{{{answer}}}"


def last_boxed(text):
    """Content of the last complete \\boxed{...}, or None."""
    box = last_box(text)
    if box is None:
        return None
    return text[box]


def last_box(text):
    """Where the content of the last complete \\boxed{...} lies in a text, a slice, or None.

    One pass with a stack of the braces that are open, then one cut. So the time is linear even for a text made to be
    slow, such as boxes in boxes.
    """
    open_braces = []  # for each: where the content of a box starts, None for a brace that belongs to no box
    found_box = None  # where the content of the last complete box starts and ends
    for match in BRACES.finditer(text):
        found = match.group()
        if found.startswith("\\boxed"):
            open_braces.append(match.end())
        elif found == "{":
            open_braces.append(None)
        elif found == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                found_box = slice(start, match.start())
    return found_box


def behind_hashes(text):
    """The value that a worked solution states behind its last ####, up to the end of that line; a text without #### as
    it is. Of '#### $1,234 a year' it is '1234': sign, commas and unit would be part of the answer for the verifier."""
    if HASHES not in text:
        return text
    value = text.rpartition(HASHES)[2].strip().partition("\n")[0].rstrip()
    amount = AMOUNT.fullmatch(value)
    if amount is None:
        return value
    sign, number = amount.groups()
    return sign + number.replace(",", "")


def gradable(text, finished=True):
    """What counts of an answer: its last complete box, if it is finished and holds at most 2,000 characters; else ''.

    Nothing outside that box earns anything: no right number mentioned on the way, no second guess.
    """
    if not finished:
        return ""
    return limited(last_boxed(text))


def limited(answer):
    """An answer (text or None) if it is short enough to be judged, else ''."""
    if answer is None or len(answer) > LONGEST_ANSWER:
        return ""
    return answer

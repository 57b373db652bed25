"""Four behaviours of thinking, which decide whether a model can improve itself: the notation they are written in, and
how they are counted (https://arxiv.org/abs/2503.01307).

The scripted solvers of the tasks think in a notation of their own, in which the embedded model can show every behaviour
although each character is a token. It is written and counted here and nowhere else:

    7+15=22         a step: one operation and its result         no behaviour
    (8*5)-3=40-3=37 an attempt, one operation at a time          no behaviour
    @8*5;           a part that is to be made first              subgoal setting
    ?22-15=7        a check: of the step before, by its inverse operation
    ?37=24          a check in Countdown: is 37 the target 24?   both: verification
    ~               what stands before is dropped                backtracking
    <24-5=19        a step from the target backwards: without the 5, 19 is needed; in a chain, from its end
                                                                 backward chaining
    ;               end of a step that is kept

For a model that reads, the solver of Countdown says the same in English sentences.

Text with a letter outside \\boxed and tags is English, any other text is notation. Counts in the notation are exact.
Counts in English are those of regular expressions, lower bounds: tests/test_tasks_behaviours.py says how good they are.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

BEHAVIOURS = ("verification", "backtracking", "subgoal_setting", "backward_chaining")

# ---------------------------------------------------------------------------------------------------------------------
# Writing the notation
# ---------------------------------------------------------------------------------------------------------------------

KEPT = ";"  # behind a step that is kept
DROPPED = "~"  # behind a step that is dropped


def step(expression, value):
    """'7+15', 22 -> '7+15=22'."""
    return f"{expression}={value}"


def attempt(stages):
    """['(8*5)-3', '40-3', '37'] -> '(8*5)-3=40-3=37'."""
    return "=".join(stages)


def check(expression, value):
    """'22-15', 7 -> '?22-15=7'."""
    return f"?{expression}={value}"


def subgoal(expression):
    """'8*5' -> '@8*5;'."""
    return f"@{expression};"


def backward_step(expression, value):
    """'24-5', 19 -> '<24-5=19'."""
    return f"<{expression}={value}"


# ---------------------------------------------------------------------------------------------------------------------
# Writing English: sentences that are counted once as their behaviour, and as no other one
# ---------------------------------------------------------------------------------------------------------------------


def say_step(expression, value):
    """'8*5', 40 -> '8*5 = 40. '."""
    return f"{expression} = {value}. "


def say_attempt(stages):
    """['(8*5)-3', '40-3', '37'] -> '(8*5)-3 = 40-3 = 37. '."""
    return " = ".join(stages) + ". "


def say_check(value, target):
    """37, 24 -> 'Let me check whether 37 is 24. '."""
    return f"Let me check whether {value} is {target}. "


def say_subgoal(expression):
    """'8*5' -> 'The first goal is 8*5. '."""
    return f"The first goal is {expression}. "


def say_backward_step(expression, value):
    """'24-5', 19 -> 'Working backwards, 24-5 = 19 is left to make. '."""
    return f"Working backwards, {expression} = {value} is left to make. "


@dataclass
class Writer:
    """How a solver words what it does."""

    kept: str  # behind a step that is kept
    dropped: str  # behind a step that is dropped
    step: Callable
    attempt: Callable
    check: Callable
    subgoal: Callable
    backward_step: Callable


NOTATION_WRITER = Writer(KEPT, DROPPED, step, attempt, check, subgoal, backward_step)
ENGLISH_WRITER = Writer("", "That is a dead end. ", say_step, say_attempt, say_check, say_subgoal, say_backward_step)


# ---------------------------------------------------------------------------------------------------------------------
# Patterns that count it, and those for English
# ---------------------------------------------------------------------------------------------------------------------

NUMBER = r"-?[0-9]+"
NOTATION = {
    "verification": r"\?[-+*/()0-9]+=" + NUMBER,
    "backtracking": r"~",
    "subgoal_setting": r"@[-+*/()0-9]+;",
    "backward_chaining": r"<[-+*/()0-9]+=" + NUMBER,
}

# Who is about to do something, and where a sentence or a part of one begins.
I = r"\b(let me|let's|let us|we|we can|we should|i|i'll|i will|i should|i'm going to|to)"
OPENS = r"(?:^|[.!?:;] |so )"

# English, without regard to case. Where two patterns of a behaviour could match at one place, the first one counts.
PATTERNS = {
    # An explicit check of a result.
    "verification": [
        # "let me check", "we should verify whether"
        I + r" (just |also |now |quickly )?(check|verify|confirm|test|validate|make sure|be sure|see (if|whether))\b",
        # the same once more: "I'll recompute", "let's count again"
        I + r" (re-?(check|compute|calculate|verify)|count again|compute (it|this|that) again)",
        r"\b(double|cross|re|sanity|quick)[- ]?(check|test)",
        # the result of a check: "that hit the target exactly"
        r"\b(hit|reached|matches|met) (it|the target) exactly\b",
        # a check by its name, as a word, a heading or a mark
        r"\b(checking|testing|verifying|verification)\b",
        OPENS + r"(check|test|verify|proof)\b",
        r"\u2713",
        r"\u2705",
        # a result goes back into what was asked: "plugging it in", "substitute x = 3 back"
        r"\b(plug|substitut|put)\w* [^.]{0,30}\bback\b",
        r"\bplug(ging)? (it|this|that|in|them)\b",
        # agreement: "which matches", "is indeed correct", "as required"
        r"\b(which|this|that|it|sides|results?) (also )?(match(es)?|equals?|agrees?|checks out|holds)\b",
        r"\b(is|was|are|looks) (indeed |done )?(correct(ly)?|consistent)\b",
        r"\band indeed\b",
        r"\bas (required|expected|it should)\b",
        # a question: "does that make sense", "is 3+4 right", "equal to 24?"
        r"\b(does|do|is|are) (that|this|it|they|[-+*/()0-9 ]+) (make sense|right|correct|hit|give|equal|work|add up)\b",
        r"\bequal(s)?( to)? [-0-9.]+\?",
        # and its answer: "it does", "24, yes", "satisfies both"
        r"\. (it|that) does\b",
        r"[0-9], yes\b",
        r"\byes!",
        r"\bsatisfies (the|this|all|both)\b",
    ],
    # A path is dropped for another.
    "backtracking": [
        # a halt: "wait, ...", but not "wait for", "wait 5"
        r"\bwait\b(?=[,.:;! -])(?! (for|until|time|on|\d))",
        r"\bhold on\b",
        r"\balternatively\b",
        r"\bscratch that\b",
        r"\bsorry\b",
        # a no
        OPENS + r"no[,.] ",
        r", no[,.;](\s|$)",
        r"\b(oh|actually|hmm),? no\b",
        r"\boops\b",
        # a result that misses: "too large", "off by 2", "still 3 short"
        r"(\(|^|[.,;:] |\b(is|are|was|way|still|but|'s|takes) )too (low|high|big|small|large|long|much|few)\b(?! to)",
        r"\boff by\b",
        r"\b(still )?[0-9]+ (short|over|too \w+)\b",
        # something is changed or given up: "drop that", "let me start again"
        r"\b(swap|adjust|discard|abandon|drop) (the|this|that)\b",
        r"\b(let me|let's) (think|start) again\b",
        r"\bmessy\b",
        r"\beasier way\b",
        r"\bstuck\b",
        r"\bfrom scratch\b",
        r"\b(overshoots?|undershoots?|misread|miscounted|miscalculated|recount|redo(ing)?|rethink|reconsider)\b",
        # another attempt: "try another", "let's try", "instead, ", "what about", "a different way", "next guess"
        r"\b(try|consider|use|want|need|take) (again|another|(a|some)(thing)? (different|other|new)|the other)\b",
        OPENS + r"(let me |let's |let us |we |i |now )?(could |can )?try\b",
        r"\band instead\b",
        OPENS + r"(instead,|maybe [-0-9(])",
        r"\b(what|how) about\b",
        r"\bdifferent (idea|approach|way|method)\b",
        r"\bdifferently\b",
        r"\b(next|another|other) (candidate|attempt|try|guess|option|idea|approach|way|possibility)\b",
        # the way back: "going back to", "start over"
        OPENS + r"(going )?back to\b",
        r"\b(me|let's|i) go(ing)? back\b",
        r"\bstart(ing)? over\b",
        r"\bstep back\b",
        # a failure: "does not work", "a dead end", "25, not 24", "that contradicts"
        r"\b(not|n't) (work|working|get us|get there|the way|an integer|equal|possible|right)\b",
        r"\b(nowhere|dead end)\b",
        r"[0-9], (but )?not [-0-9]+\b",
        r"\b(not|isn't) what we (want|need)",
        r"\blet me (fix|correct)\b",
        r"\bcontradict(s|i)",
        # a mistake, named as one
        r"\b(made|making|is|was) (a|an) (mistake|error)\b",
        r"\b(is|was) (wrong|impossible|incorrect)\b",
        r"\bshould (actually )?(be|have been) [^.]{0,20}\b(not|instead)\b",
    ],
    # An intermediate target, or a division into parts.
    "subgoal_setting": [
        # an order of work: "First, we find", "next, to", "we need the area first"
        OPENS + r"(so,? |ok(ay)?[,.] )?(first|second|next)(ly)?,? (i|we|let|find|figure|compute|determine|to|the)\b",
        r"\bwe need [^.]{0,30} first\b",
        r"\bseparately\b",
        r"\b(outline|list) the steps\b",
        r"\bthe first (thing|step)\b",
        # a goal for now: "aim for 20", "count the red ones first"
        r"\bgoal (for now|here)\b",
        r"\baim (for|at)\b",
        r"\bfirst find\b",
        r"\bcount [^.]{0,20} first\b",
        I + r" (need to |have to |will |want to |can |could |must )?(first|begin by|begin with|start (by|with))\b",
        r"\b(first|intermediate|next|smaller) (goal|target|result)\b",
        r"\bsub-?(goal|problem|task)",
        r"\bmilestone\b",
        # a plan
        r"\b(the|my|our|a) (plan|strategy|idea) is\b",
        r"\bthe plan\b",
        r"\bbefore (anything else|that,? (i|we) (need|have))",
        # parts: "split this into cases", "step 1", "one part at a time"
        r"\b(break|split|divide|separate|proceed) [^.]{0,30}\b(into|in) (\w+ )?(parts?|cases|steps|stages|pieces)",
        r"\bstep (1|one)\b",
        r"\bone (piece|step|part|case) at a time\b",
        r"\bin the first (part|step|stage)\b",
        r"\b(i|we) need (two|three|several) things\b",
        # what comes after a part: "once we have that, "
        r"\b(once|with|after) (i have|we have|that|this|we know) [^.]{0,9}\b(it|done|in hand|,)",
    ],
    # From the target to what leads there.
    "backward_chaining": [
        # by its name: "working backwards", "backwards from", "start with the target", "undo"
        r"\b(work|reason)(ing)? back(wards?)?\b",
        r"\b(think|go)(ing)? backwards?\b",
        r"\bbackwards?,? (from|through)\b",
        r"\b(start|starting|begin|think|work) (from|with|at) the (target|goal|answer|result|conclusion|end)\b",
        r"\bfrom the end\b",
        r"\breverse the\b",
        r"\bundo(ing)?\b",
        # what the end needs: "to get 24 we need", "want 24 in the end"
        r"\b(to (get|reach|make|end at|land on)|for the \w+ to be) \S+,? (i|we|the)\b[^.]{0,40}\b(needs?|has|have)",
        r"\b(need|want) \d+ (in|at) the end\b",
        r"\bwe want \d+\.",
        # the last operation: "the final step must", "have to end with"
        r"\b(last|final) (operation|step) (is|was|could|must|would)\b",
        r"\b(have|has) to (finish|end) with\b",
        r"\bto end up with\b",
        r"\b(result|total) (has to|must) be \d+",
        # the target taken apart: "since 24 = 20 + 4", "the rest must"
        r"\b(since|target( is)?|need) \d+(\.|,)? ((is|=) )?\d+ (=|is|[-/+*])",
        r"\bthe (rest|others?( \w+)?) (must|have to|has to|needs? to)\b",
        r"\bsuffices to show\b",
        # what came before: "before that it was", "what would make it"
        r"\bbefore (that|the last)\b[^.]{0,20}\b(was|had|were)\b",
        r"\bthe \w+ before (the|that)\b",
        r"\bwhat(ever)? (we [^.]{0,20} )?(would|could|must|makes?) (make|give|be|it)\b",
        r"\bassume the conclusion\b",
        r"\bmust have (been|had)\b",
    ],
}

# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------

TAGS = re.compile(r"</?(?:think|answer)>|\\boxed")
LETTER = re.compile(r"[^\W\d_]")
EXACT = {name: re.compile(pattern) for name, pattern in NOTATION.items()}
ENGLISH = {name: re.compile("|".join(found), re.IGNORECASE | re.MULTILINE) for name, found in PATTERNS.items()}


def count_behaviours(text):
    """How often each of the BEHAVIOURS occurs in an answer -> dict of ints."""
    bare = TAGS.sub("\n", text)
    patterns = ENGLISH if LETTER.search(bare) else EXACT
    return {name: count(pattern, bare) for name, pattern in patterns.items()}


def count(pattern, text):
    """How many matches of a compiled pattern a text holds, none overlapping another."""
    return sum(1 for _ in pattern.finditer(text))

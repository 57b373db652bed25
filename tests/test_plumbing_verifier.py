"""The verifier: 300 labelled answers, clean and hostile; fuzz; killed workers; what a worker imports."""

import math
import os
import random
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import common
from plumbing import verifier
from plumbing.errors import UserError
from tasks import Problem

LIMIT = 0.5  # seconds per answer
WATCHDOG = 120  # seconds per test


@pytest.fixture
def pool(monkeypatch):
    """A verifier of the test's own, which grading uses, too; its workers end with the test, or when the watchdog comes:
    then whoever waits for one gets 'error'. So no test can wait for ever."""
    fresh = verifier.Verifier()
    started = []
    start = fresh.start

    def start_and_remember():
        worker = start()
        started.append(worker)
        return worker

    def kill_all():
        for worker in started:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)  # the worker and its child, which holds the pipes open

    fresh.start = start_and_remember
    monkeypatch.setattr(verifier, "SHARED", fresh)
    watchdog = threading.Timer(WATCHDOG, kill_all)
    watchdog.start()
    yield fresh
    watchdog.cancel()
    kill_all()


def labelled():
    """(gold, text of a completion, right?, hostile?) of every kind of answer that models give or could give."""

    def box(answer):
        return f"so the answer is \\boxed{{{answer}}}."

    clean, hostile = [], []
    for i in range(40):  # plain numbers in several notations, and near misses
        clean += [(str(i), box(i), True), (str(i), box(f"{i}.0"), True), (str(i), box(i + 1), False)]
    for a, b in ((1, 2), (3, 4), (7, 9), (22, 7), (5, 8), (11, 13)):
        forms = (
            f"\\frac{{{a}}}{{{b}}}",
            f"\\dfrac{{{a}}}{{{b}}}",
            f"{a}/{b}",
            f"\\frac{{{2 * a}}}{{{2 * b}}}",
            f"\\tfrac{a}{b}",
        )
        clean += [(forms[0], box(form), True) for form in forms[: 5 if a < 10 and b < 10 else 4]]
        clean += [(forms[1], box(f"\\frac{{{b}}}{{{a}}}"), False), (forms[1], box(f"-{forms[0]}"), False)]
    clean += [  # thousands, percentages, units, signs, roots, powers, constants
        ("10{,}000", box("10000"), True), ("10000", box("10{,}000"), True), ("10,000", box("10{,}000"), True),
        ("10000", box("1000"), False), ("1234567", box("1,234,567"), True), ("0.5", box("50\\%"), True),
        ("25\\%", box("0.25"), True), ("25\\%", box("25\\%"), True), ("25\\%", box("2.5"), False),
        ("5", box("5\\text{ cm}"), True), ("5\\text{ cm}", box("5"), True), ("12", box("12\\,\\mathrm{m}"), True),
        ("90^\\circ", box("90"), True), ("90", box("90^\\circ"), True), ("\\$18", box("18"), True),
        ("18", box("\\$18"), True), ("-3", box("-3"), True), ("-3", box("3"), False), ("-3", box("-3.00"), True),
        ("\\sqrt{8}", box("2\\sqrt{2}"), True), ("\\sqrt{8}", box("2\\sqrt{3}"), False), ("2^{10}", box("1024"), True),
        ("1024", box("2^{10}"), True), ("\\pi", box("\\pi"), True), ("\\pi", box("3.14"), False),
        ("2\\pi", box("2 \\pi"), True), ("e^2", box("e^{2}"), True), ("\\frac{\\pi}{2}", box("\\pi/2"), True),
        ("\\frac{1}{\\sqrt{2}}", box("\\frac{\\sqrt{2}}{2}"), True), ("1-\\sqrt{2}", box("-\\sqrt{2}+1"), True),
        ("1-\\sqrt{2}", box("1+\\sqrt{2}"), False), ("3!", box("6"), True), ("\\binom{5}{2}", box("10"), True),
        ("1.5", box("\\frac{3}{2}"), True), ("0.333", box("\\frac{1}{3}"), False), ("1e3", box("1000"), True),
    ]  # fmt: skip
    clean += [  # intervals, tuples, sets, matrices, equations, expressions, words
        ("(1, 2)", box("(1,2)"), True), ("(1, 2)", box("(2,1)"), False), ("[0, 1)", box("[0,1)"), True),
        ("[0, 1)", box("[0,1]"), False), ("(-\\infty, 3]", box("(-\\infty,3]"), True),
        ("\\{1, 2\\}", box("\\{2, 1\\}"), True),
        ("\\{1, 2\\}", box("\\{1, 3\\}"), False), ("1, 2", box("1,2"), True), ("1, 2", box("1, 3"), False),
        ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", box("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"), True),
        ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", box("\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}"), True),
        ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", box("\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}"), False),
        ("\\begin{pmatrix} 1 \\\\ -7 \\end{pmatrix}", box("\\begin{pmatrix} 1 \\\\ -7 \\end{pmatrix}"), True),
        ("x+1", box("1+x"), True), ("(x+1)^2", box("x^2+2x+1"), True), ("(x+1)^2", box("x^2+1"), False),
        ("p - q", box("p-q"), True), ("p - q", box("q-p"), False), ("x=3", box("x=3"), True), ("x = 3", box("3"), True),
        ("y = 2x + 3", box("y=2x+3"), True), ("y = 2x + 3", box("y=2x-3"), False), ("x > 2", box("x>2"), True),
        ("\\text{Yes}", box("\\text{Yes}"), True), ("\\text{Yes}", box("Yes"), True), ("\\text{Yes}", box("No"), False),
        ("even", box("even"), True), ("even", box("odd"), False), ("\\text{(B)}", box("\\text{(B)}"), True),
        ("B", box("\\text{B}"), True), ("B", box("C"), False), ("3+4i", box("3+4i"), True),
        ("3+4i", box("3-4i"), False),
        ("\\infty", box("\\infty"), True), ("\\infty", box("-\\infty"), False), ("x^2y", box("y x^2"), True),
    ]  # fmt: skip
    clean += [  # which box counts
        ("3", "first \\boxed{4}, no: \\boxed{3}", True), ("3", "first \\boxed{3}, no: \\boxed{4}", False),
        ("3", "\\boxed{3} and then \\boxed{4", True), ("3", "the answer is 3", False), ("3", "\\boxed{3", False),
        ("3", "\\boxed 3", False), ("3", "", False), ("3", "\\boxed{}", False), ("5", "\\boxed{\\boxed{5}}", True),
        ("\\frac{1}{\\sqrt{2}}", "\\boxed{\\frac{1}{\\sqrt{2}}}", True), ("3", "} \\boxed{3}", True),
        ("3", "{\\boxed{3}", True), ("2^{-99}", box("2^{-98}"), False), ("2^{-99}", box("2^{-99}"), True),
        ("1/2004!", box("1/2006!"), False), ("2004!", box("2006!"), False), ("0", box("10^{-9}"), False),
    ]  # fmt: skip
    hostile += [box(tower) for tower in (
        "9^{9^{9^{9}}}", "10^{10^{10^{10}}}", "7^{7^{7^{7^{7}}}}", "(9^{99999})^{99999}", "2^{2^{2^{2^{2^{2}}}}}",
        "99999999!", "(10^{9})!", "((100)!)!", "\\sum_{n=1}^{10^{12}} \\frac{1}{n}", "\\prod_{k=1}^{10^9} k",
        "\\int_0^1 x^{x^{x^{x}}} dx", "\\binom{10^{12}}{10^{11}}", "\\sqrt[3]{9^{9^{9}}}", "\\log(9^{9^{9^9}})",
    )]  # fmt: skip
    hostile += [box("{" * n + "}" * n) for n in (20, 50, 400)] + [box("\\frac{1}{" * 200 + "1" + "}" * 200)]
    hostile += [box("9" * n) for n in (1990, 2001, 100_000)] + [box("(" * n + ")" * n) for n in (30, 900)]
    hostile += ["\\boxed{" * 50_000, "\\boxed{1} " * 10_000 + "\\boxed{2}", "}" * 100_000, "\\" * 99_999]
    hostile += [box(odd) for odd in (
        "\x00", "3\x00", "\ud800", "\u0663\u0664", "\u221e\u221e", "\U0001f600", "%", "\\frac", "\\sqrt[]{}", "&&&",
        "__import__('os').system('echo')", "import os; os._exit(1)", "exit()", "lambda: 0", "[]*10**10", "0/0", "1/0",
        "\\begin{matrix}", "\\left(", "\\\\", "~", "^", "_", "$$", "#1", "\\def\\x{\\x}\\x", "\\input{/etc/passwd}",
    )]  # fmt: skip
    return [(*row, False) for row in clean] + [("3", text, False, True) for text in hostile]


def judge(rows, limit):
    texts = [row[1] for row in rows]
    problems = [Problem("?", row[0]) for row in rows]
    return common.judge(texts, problems, [True] * len(texts), limit)


def test_integers_need_no_worker(pool):
    """Workers take seconds to start. A data set whose golds are integers, and a model that answers so, need none."""
    pool.start = None
    pairs = [("3", "3"), ("3", "7"), ("3", ""), ("-12", "-012"), ("\\frac12", "\\frac12")]
    assert pool.compare(pairs) == ["right", "wrong", "wrong", "right", "right"]


def test_three_hundred_labelled_answers(pool):
    """No hang, no dead pool, no time lost beyond the limit, and right answers stay right beside hostile ones."""
    rows = labelled()
    assert len(rows) >= 300
    hostile = [row for row in rows if row[3]]
    start = time.perf_counter()
    verdicts = judge(hostile, LIMIT)
    seconds = time.perf_counter() - start
    bad = verdicts.count("timeout") + verdicts.count("error")
    assert seconds <= LIMIT * math.ceil(bad / pool.workers) + 5
    random.Random(0).shuffle(rows)
    wrong = []
    for row, verdict in zip(rows, judge(rows, 3.0)):  # on a busy machine a clean answer may need longer than LIMIT
        if (verdict == "right") != row[2]:
            wrong.append(row)
    assert not any(row[3] for row in wrong)  # hostile answers earn nothing
    assert len(wrong) <= 0.02 * (len(rows) - len(hostile)), wrong
    assert pool.compare([("3", "6/2")]) == ["right"]  # the pool is alive


def test_the_gold_answer_comes_first(pool):
    """math-verify lets an answer state an inequality's solutions as an interval, and not the other way round."""
    assert verifier.equal_answers("1<x<2", "(1,2)") == "right"
    assert verifier.equal_answers("(1,2)", "1<x<2") == "wrong"
    assert verifier.compare([("1<x<2", "(1,2)"), ("(1,2)", "1<x<2")]) == ["right", "wrong"]


def test_a_pair_is_compared_once(pool, monkeypatch):
    """A group of samples holds the same answer again and again."""
    asked = []
    monkeypatch.setattr(pool, "ask", lambda pair, timeout: asked.append(pair) or "right")
    pairs = [("3", "6/2"), ("3", "9/3"), ("3", "6/2"), ("3", "3")]
    assert pool.compare(pairs) == pool.compare(pairs) == ["right"] * 4
    assert asked == pairs[:2]


def test_killed_workers_are_replaced(pool):
    """A worker that dies, by the kernel's hand or its own, costs at most the answer it was working on."""
    assert pool.compare([("3", "6/2")]) == ["right"]
    for worker in pool.idle:  # killed while idle: noticed before the next question
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait(timeout=10)
    assert pool.compare([("3", "9/3"), ("3", "12/3")]) == ["right", "wrong"]
    parent = pool.idle[0]
    children = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, timeout=10).stdout
    os.kill(int(children.split()[0]), signal.SIGKILL)  # only the child that grades: its parent ends, too
    parent.wait(timeout=10)
    assert pool.compare([("3", f"{3 * i}/{i}") for i in range(4, 9)]) == ["right"] * 5


def test_the_alarm_leaves_the_next_answer_alone(pool):
    """A verdict that arrives for the wrong question pays for a wrong answer, from then on for every one."""
    pool.workers = 1
    pairs = [("3", "9^{9^{9^{9}}}"), ("3", "6/2"), ("3", "8/2"), ("4", "9^{9^{9^{9}}}"), ("4", "8/2")]
    assert pool.compare(pairs, LIMIT) == ["timeout", "right", "wrong", "timeout", "right"]
    assert len(pool.idle) == 1


def test_workers_do_not_outlive_their_run(pool):
    """A run killed by SIGKILL cannot clean up; an orphan that computes 9^9^9^9 would burn a core for ever."""
    pool.compare([("3", "6/2")])
    worker = pool.idle[0]
    worker.stdin.close()  # what the kernel does with a dead process's pipes
    assert worker.wait(timeout=10) == 0


# Runs the verifier's file as a worker does, asks it two questions on stdin, and lists what it has imported.
LIST_IMPORTS = """
import atexit, os, runpy, sys
main = os.getpid()
report = lambda: os.getpid() == main and print("imported", *sys.modules, sep="\\n")
atexit.register(report)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_workers_import_nothing_of_this_project(pool, tmp_path, monkeypatch):
    """Eight workers with torch would hold 3 GB and start for half a minute; and a random.py in the working directory,
    or in plumbing/, must not be taken for Python's."""
    (tmp_path / "random.py").write_text("raise SystemExit(1)")
    (tmp_path / "math_verify.py").write_text("raise SystemExit(1)")
    assert pool.compare([("3", "6/2")]) == ["right"]
    command = [sys.executable, "-P", "-c", LIST_IMPORTS, verifier.__file__]
    questions = '["3", "6/2", 3.0]\n["3", "8/2", 3.0]\n'
    result = subprocess.run(command, input=questions, capture_output=True, text=True, timeout=60)
    verdicts, _, imported = result.stdout.partition("imported\n")
    assert verdicts == '"ready"\n"right"\n"wrong"\n'
    imported = set(imported.split())
    root = Path(verifier.__file__).parent.parent
    own = {path.stem for path in root.glob("*.py")} | {"plumbing", "tasks"}
    assert "math_verify" in imported and not imported & (own | {"torch", "transformers"})


def test_a_verifier_that_cannot_start_is_named(pool, monkeypatch):
    """Its workers died one after the other, and every answer was an 'error', which scored 0."""
    monkeypatch.setattr(verifier, "__file__", "/nowhere/verifier.py")
    with pytest.raises(UserError, match="math-verify does not start .*nowhere/verifier.py.*requirements.txt"):
        pool.compare([("3", "6/2")])


def test_an_error_tells_its_reason(pool):
    """'error' alone sends the reader to golds and time limits, which are all right."""
    worker = pool.take_worker()
    worker.wait_until_ready()
    pool.idle.append(worker)
    assert pool.compare([("3", "6/2")]) == ["right"]
    question = ("3", ["no text"])
    assert pool.ask(question, LIMIT) == "error"
    assert pool.last_error.startswith("TypeError: unhashable")
    with pytest.raises(UserError, match="step 4: no verdict on too many of 2 answers: 1 error .TypeError: unhashable"):
        verifier.refuse_ungraded(["right", "error"], 0.2, "step 4")
    verifier.refuse_ungraded(["right"] * 9 + ["error"], 0.2, "step 4")


PIECES = [
    *("\\frac", "\\sqrt", "{", "}", "(", ")", "^", "_", "\\boxed{", "1", "23", "x", "\\pi", ",", ".", "!", "+", "-"),
    *("*", "/", "\\%", "\\text{", "\\left", "\\right", "\\infty", "=", "<", "i", "e", "\\cdot", "&", "\\\\", " "),
    *("\\begin{pmatrix}", "\\end{pmatrix}"),
]


def noise(generator):
    """Text that looks like LaTeX often enough to reach deep into the parser."""
    odd = [chr(generator.randrange(0x110000)), generator.choice(string.printable)]
    return "".join(generator.choices(PIECES + odd, k=generator.randrange(1, 25)))


@pytest.mark.parametrize("n", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_answers(n, pool):
    """Whatever a model writes gets a verdict in time, and hardly ever one of 'right' against an unlikely gold."""
    generator = random.Random(n)
    texts = []
    for _ in range(n):
        text = noise(generator)
        texts.append(f"\\boxed{{{text}}}" if generator.random() < 0.8 else text)
    verdicts = common.judge(texts, [Problem("?", "\\frac{355}{113}")] * n, [True] * n, LIMIT)
    assert set(verdicts) <= {"right", "wrong", "timeout", "error"}
    assert verdicts.count("right") == 0
    assert verdicts.count("error") <= 0.01 * n


@pytest.mark.parametrize("kind", ["timeout", "error", "unparsable"])
def test_an_answer_that_nobody_could_judge_is_not_a_wrong_one(kind):
    """A run on golds that cannot be read looks like a model that cannot do the task, and goes on for days."""
    verifier.refuse_ungraded(["right", "wrong", kind, "wrong"], 0.25, "step 1")
    with pytest.raises(UserError, match=f"step 1: no verdict on too many of 4 answers: 2 {kind}"):
        verifier.refuse_ungraded(["right", kind, kind, "wrong"], 0.25, "step 1")

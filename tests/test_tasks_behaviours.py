"""Behaviours are counted: exactly in the notation, and in English as well as was measured on labelled snippets."""

import re
import time
from pathlib import Path

import pytest
from helpers import read_jsonl

from tasks import behaviours
from tasks.behaviours import BEHAVIOURS, ENGLISH_WRITER, NOTATION_WRITER, count_behaviours

# 100 hand-labelled snippets: `exact`, in the notation, labelled with counts; `written_with`, English at hand when the
# patterns were written; `held_out`, English written afterwards, for which no pattern was changed.
SNIPPETS = read_jsonl(Path(__file__).parent / "behaviour_snippets.jsonl")


def snippets(part):
    return [row for row in SNIPPETS if row["part"] == part]


def precision_and_recall(part):
    """Of 'this snippet shows this behaviour', over the snippets of a part and the four behaviours."""
    pairs = []  # found?, labelled?
    for row in snippets(part):
        found = count_behaviours(row["text"])
        for name in BEHAVIOURS:
            pairs.append((found[name] > 0, name in row["labels"]))
    hits = pairs.count((True, True))
    false_alarms = pairs.count((True, False))
    missed = pairs.count((False, True))
    return hits / (hits + false_alarms), hits / (hits + missed)


def test_behaviours_in_english_are_found_as_often_as_measured():
    """Measured: precision and recall 0.98 and 0.96 on `written_with`, 1.00 and 0.90 on `held_out`. The held-out part is
    worded as reasoning models tend to word things; with a freer choice of words recall is lower, about a third on the
    snippets of `written_with` before patterns were added for them. Counts in English are lower bounds."""
    assert len(SNIPPETS) == 100
    precision, recall = precision_and_recall("written_with")
    assert precision >= 0.95 and recall >= 0.93
    precision, recall = precision_and_recall("held_out")
    assert precision >= 0.95 and recall >= 0.85


@pytest.mark.parametrize("row", snippets("exact"), ids=lambda row: row["text"][:30])
def test_behaviours_in_the_notation_are_counted_exactly(row):
    assert {name: count for name, count in count_behaviours(row["text"]).items() if count} == row["labels"]


@pytest.mark.parametrize("text", ["Wait, that is 25.", "wait - 3 is used twice.", "Hm. Wait: no 5 is left."])
def test_a_halt_is_backtracking(text):
    assert count_behaviours(text)["backtracking"] == 1


@pytest.mark.parametrize("text", ["They wait for the bus.", "You wait 5 minutes.", "We wait until noon."])
def test_waiting_for_something_is_no_halt(text):
    """Word problems are full of people who wait: every answer about them would count as backtracking."""
    assert count_behaviours(text)["backtracking"] == 0


def test_what_is_written_is_what_is_counted():
    """The same file writes the notation and counts it."""
    writer = NOTATION_WRITER
    text = writer.subgoal("7+15") + writer.step("7+15", 22) + writer.check("22-15", 7) + writer.dropped
    text += writer.backward_step("24-5", 19) + writer.kept
    assert text == "@7+15;7+15=22?22-15=7~<24-5=19;"
    assert count_behaviours(text) == dict.fromkeys(BEHAVIOURS, 1)


def test_every_english_sentence_is_its_behaviour_and_no_other():
    """Priming in English is counted by patterns. A sentence that they miss, or take for two behaviours, would make a
    set of trajectories look like another."""
    writer = ENGLISH_WRITER
    sentences = {
        "verification": writer.check(37, 24),
        "backtracking": writer.dropped,
        "subgoal_setting": writer.subgoal("8*5"),
        "backward_chaining": writer.backward_step("24-5", 19),
    }
    for name, sentence in sentences.items():
        found = count_behaviours(sentence)
        assert found.pop(name) == 1
        assert not any(found.values()), sentence
    assert count_behaviours("so " + writer.step("8*5", 40)) == dict.fromkeys(BEHAVIOURS, 0)
    assert count_behaviours("".join(sentences.values()) + writer.step("8*5", 40)) == dict.fromkeys(BEHAVIOURS, 1)


def test_the_table_names_every_mark():
    """The notation is documented where it is written."""
    writer = NOTATION_WRITER
    marks = [writer.step("7+15", 22), writer.check("22-15", 7), writer.subgoal("8*5"), writer.backward_step("24-5", 19)]
    for mark in (*marks, writer.dropped, writer.kept):
        assert re.search(rf"^    {re.escape(mark)} ", behaviours.__doc__, re.MULTILINE)


@pytest.mark.parametrize(
    "text",
    ["", "\0", "?" * 10**5, "wait, " * 10**4, "to get 5 " * 10**4, "7+" * 10**5, "let me " * 10**4, "<" * 10**5],
    ids=lambda text: ascii(text[:9]),
)
def test_counting_survives_any_text(text):
    """Quadratic patterns would stop an evaluation at the first answer that loops."""
    start = time.process_time()
    assert set(count_behaviours(text)) == set(BEHAVIOURS)
    assert time.process_time() - start < 2

"""Final answers: the last complete box of a finished answer, found in linear time."""

import time

import pytest

from tasks.answers import behind_hashes, boxed, gradable, last_boxed


@pytest.mark.parametrize(
    "text, content",
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),  # a pattern that stops at the first } cuts it
        (r"\boxed {7}", "7"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{3} and then \boxed{4", "3"),  # the last one was cut off: the last complete one counts
        (r"\boxed{4", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces are characters
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"{\boxed{6}", "6"),
        (r"} \boxed{7}", "7"),
        (r"\boxed{}", ""),
        ("42", None),
        ("", None),
        (r"\boxed", None),
    ],
)
def test_last_boxed(text, content):
    """Nested, several, unclosed, escaped: each is no reward for a right answer, or one for a wrong answer."""
    assert last_boxed(text) == content


@pytest.mark.parametrize("piece", [r"\boxed{", "{", "}", "\\", r"\boxed{1} ", "{}"])
def test_last_boxed_takes_linear_time(piece):
    """A model that repeats itself for its whole length must not stop training: quadratic time takes minutes."""
    start = time.perf_counter()
    last_boxed(piece * 100_000)
    assert time.perf_counter() - start < 5


def test_boxes_in_boxes_take_linear_time():
    """Cutting out the content of each of 300,000 nested boxes would copy 10^12 characters: 47 seconds, measured."""
    start = time.process_time()
    content = last_boxed("\\boxed{" * 300_000 + "7" + "}" * 300_000)
    assert time.process_time() - start < 5
    assert content.endswith("\\boxed{7" + "}" * 299_999)


def test_what_counts_of_an_answer():
    """An answer that was cut off is none, nor is one so long that it could only be meant for the verifier's ruin."""
    assert gradable(boxed("3")) == "3"
    assert gradable(boxed("3"), finished=False) == gradable("3") == gradable(boxed("")) == ""
    assert gradable(boxed("1" * 2000)) == "1" * 2000
    assert gradable(boxed("1" * 2001)) == ""


@pytest.mark.parametrize(
    "text, value",
    [
        ("#### 72", "72"),
        ("#### 10\nno:\n####  1,234 \n", "1234"),
        ("#### 7\nThat is all.", "7"),
        ("####72", "72"),
        ("#### -1,234.50", "-1234.50"),
        ("#### $18", "18"),
        (r"#### \$1,234", "1234"),
        ("#### €5.", "5"),
        ("#### 18 dollars", "18"),
        ("#### 12 sq. ft", "12"),
        ("#### 10,0000", "100000"),
        ("#### 3/4", "3/4"),  # what is more than one number is left to the verifier, commas and all
        ("#### (1,200)", "(1,200)"),
        ("#### 10:30 am", "10:30 am"),
        (r"#### \frac{1}{2}", r"\frac{1}{2}"),
        ("####", ""),
        ("1,234", "1,234"),
        ("### 72", "### 72"),
    ],
)
def test_behind_hashes(text, value):
    """GSM8K keeps a worked solution as its answer; a sign too much or too little makes another gold of it."""
    assert behind_hashes(text) == value


@pytest.mark.parametrize("piece", ["####", "#### ", "1", "1,", "#### 1 a", "#### $", " "])
def test_behind_hashes_takes_linear_time(piece):
    start = time.process_time()
    behind_hashes("#### 1" + piece * 100_000 + "!")
    assert time.process_time() - start < 5

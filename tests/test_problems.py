"""Problems: the built-in task, JSONL files in all their shapes, prompts as tokens, and the order of training."""

import json
import random
import re

import pytest
from conftest import arguments, write_jsonl
from tokenizers.processors import TemplateProcessing

import bookkeeping
import common
import grpo
import sft

# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_arithmetic_answers_are_right(split):
    """A wrong gold answer teaches the mistake. Every intermediate result has two digits at most."""
    problems = common.arithmetic(split, 500)
    assert len(problems) == len({p.prompt for p in problems}) == 500
    for p in problems:
        assert re.fullmatch(r"\d+([+-]\d+){3}=", p.prompt)
        numbers = [int(number) for number in re.findall(r"[+-]?\d+", p.prompt)]
        assert int(p.answer) == sum(numbers)
        assert all(1 <= abs(number) <= 20 for number in numbers)
        assert all(0 <= sum(numbers[:i]) <= 99 for i in range(1, 5))


def test_arithmetic_splits_are_disjoint():
    """A held-out problem seen in training measures memory; that must not depend on the seeds of the two splits."""
    train = {p.prompt for seed in (0, 1) for p in common.arithmetic("train", 4000, seed)}
    test = {p.prompt for seed in (0, 1, 2) for p in common.arithmetic("test", 1000, seed)}
    assert len(train) > 7000 and len(test) > 2500
    assert not train & test
    assert common.arithmetic("test", 50) == common.load_problems("arithmetic", "test", 50)


# ---------------------------------------------------------------------------------------------------------------------
# JSONL files
# ---------------------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "What is 1+2?"}]


@pytest.mark.parametrize(
    "row, prompt, answer",
    [
        ({"problem": "1+2?", "answer": "3"}, "1+2?", "3"),
        ({"question": "1+2?", "final_answer": "3"}, "1+2?", "3"),
        ({"prompt": MESSAGES, "answer": "3"}, MESSAGES, "3"),
        ({"problem": "1+2?", "solution": r"First \boxed{4}, no: \boxed{3}."}, "1+2?", "3"),
        ({"problem": "1+2?", "answer": 3, "id": 7}, "1+2?", "3"),
        ({"problem": "1-1?", "answer": 0}, "1-1?", "0"),  # 0 is an answer, not a missing one
        ({"problem": "1/2?", "answer": 0.5}, "1/2?", "0.5"),
        ({"problem": "1+2?", "answer": " 3\n"}, "1+2?", "3"),
        ({"problem": "1+2?", "answer": "", "final_answer": "3"}, "1+2?", "3"),
        ({"problem": None, "question": "1+2?", "answer": None, "solution": r"\boxed{3}"}, "1+2?", "3"),
        ({"problem": "\u221a9 \u2028 \u00fc?", "answer": "3"}, "\u221a9 \u2028 \u00fc?", "3"),  # \u2028 ends no line
    ],
)
def test_jsonl_rows_of_every_shape(row, prompt, answer, tmp_path):
    """Data sets name their fields differently; a file that loads with the wrong field trains on the wrong problem."""
    problems = common.load_problems(str(write_jsonl(tmp_path / "data.jsonl", [row, row])))
    assert [(p.prompt, p.answer) for p in problems] == [(prompt, answer)] * 2
    assert [p.where for p in problems] == [f"{tmp_path}/data.jsonl:1", f"{tmp_path}/data.jsonl:2"]


GOOD = b'{"problem": "1+2?", "answer": "3"}\n'


@pytest.mark.parametrize(
    "line, found",
    [
        (b'{"problem": "1+2?"', []),
        (b"1+2=3", []),
        (b'["1+2?", "3"]', []),
        (b'{"problem": "1+2\xff?", "answer": "3"}', []),
        (b"[" * 100_000, []),
        (b'{"text": "1+2?", "label": "3"}', ["text", "label"]),
        (b'{"problem": "1+2?", "label": "3"}', ["problem", "label"]),
        (b'{"problem": " ", "answer": "3"}', ["problem", "answer"]),
        (b'{"prompt": [], "answer": "3"}', ["prompt", "answer"]),
        (b'{"prompt": [{"role": "user"}], "answer": "3"}', ["prompt", "answer"]),
        (b'{"prompt": [{"role": "user", "content": ["1+2?"]}], "answer": "3"}', ["prompt", "answer"]),
        (b'{"problem": 12, "answer": "3"}', ["problem", "answer"]),
        (b'{"problem": "1+2?", "answer": ["3"]}', ["problem", "answer"]),
        (b'{"problem": "1+2?", "answer": true}', ["problem", "answer"]),
        (b'{"problem": "1+2?", "answer": " "}', ["problem", "answer"]),
        (b'{"problem": "1+2?", "solution": "three"}', ["problem", "solution"]),
        (b"{}", ["none"]),
    ],
)
def test_malformed_lines_are_named(line, found, tmp_path):
    """'KeyError: problem' in line 40,000 of a file helps nobody: say which file and line, and what is there."""
    (tmp_path / "data.jsonl").write_bytes(GOOD + b"\n" + GOOD + line + b"\n" + GOOD)
    with pytest.raises(common.UserError) as error:
        common.load_problems(f"{tmp_path}/data.jsonl")
    assert f"{tmp_path}/data.jsonl:4:" in str(error.value)  # blank lines count
    assert all(name in str(error.value) for name in found)


def test_labels_may_be_missing_where_none_is_needed(tmp_path, capsys):
    """em.py learns without labels; a row without answer must not stop it, nor slip into a run that needs rewards."""
    path = str(write_jsonl(tmp_path / "data.jsonl", [{"problem": "1+2?"}, {"problem": "1+2?", "answer": "3"}]))
    assert [p.answer for p in common.load_problems(path, labels=False)] == ["", "3"]
    assert not capsys.readouterr().err  # a label that is not there is not one that cannot be read
    with pytest.raises(common.UserError, match="data.jsonl:1: no gold answer"):
        common.load_problems(path)


def damaged(generator):
    """A data file with up to two accidents: lost, doubled and foreign bytes, changed types, glued lines."""
    rows = [
        {"problem": "1+2?", "answer": "3"},
        {"question": "é?", "final_answer": 4},
        {"prompt": "x", "solution": "\\boxed{5}"},
    ]
    text = bytearray("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows * 2).encode())
    values = [
        None,
        [],
        {},
        "",
        True,
        1e999,
        -0.0,
        10**30,
        [{"role": "user", "content": "?"}],
        [[]],
        {"role": 1},
        "\ud800",
    ]
    for _ in range(generator.randint(0, 2)):
        place, accident = generator.randrange(len(text)), generator.randrange(5)
        if accident == 0:
            del text[place : place + generator.randint(1, 30)]
        elif accident == 1:
            text[place:place] = generator.randbytes(generator.randint(1, 4))
        elif accident == 2:
            text[place:place] = generator.choice(
                [b"\n", b"\r", b"\0", b"[" * 3000, b'"', b"{", b"}", b"\\", b"\xff\xfe"]
            )
        elif accident == 3:
            text += (
                json.dumps({generator.choice(["problem", "answer", "x"]): generator.choice(values)}) + "\n"
            ).encode()
        else:
            row = {"problem": generator.choice(values), "answer": generator.choice(values)}
            text += (json.dumps(row) + "\n").encode()
    return bytes(text)


@pytest.mark.parametrize("n", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_fuzzed_files_are_read_or_named(n, tmp_path, tokenizer):
    """Every file on earth ends up as somebody's --data: it is read, or one line names it; nothing else may happen."""
    generator, path, good = random.Random(n), tmp_path / "data.jsonl", 0
    for _ in range(n):
        path.write_bytes(damaged(generator))
        try:
            problems = common.load_problems(str(path), system_prompt=generator.choice(["", "Think."]))
            good += len(common.tokenize_problems(tokenizer, problems, 1000)) > 0
        except common.UserError as error:
            assert str(path) in str(error)
    assert 0.05 * n < good < 0.95 * n  # both happen


def test_byte_order_mark_is_named_or_read(tmp_path):
    """An editor's invisible mark before the first { must not end in a traceback."""
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    try:
        assert common.load_problems(f"{tmp_path}/data.jsonl")[0].answer == "3"
    except common.UserError as error:
        assert f"{tmp_path}/data.jsonl:1:" in str(error)


@pytest.mark.parametrize(
    "source",
    ["missing.jsonl", "no/such/set", "folder", "empty.jsonl", "hf://datasets/owner", "hf://datasets/o/n/f.jsonl"],
)
def test_missing_data_is_named(source, tmp_path):
    """A path with a typing error, an empty download, a machine without network: one line that says which."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(common.UserError, match=re.escape(source)):
        common.load_problems(source)


def test_limit_takes_the_first_problems(data):
    """An evaluation on --eval_problems must take the same problems every time."""
    whole = common.load_problems(str(data))
    assert len(whole) == 12 and common.load_problems(str(data), limit=5) == whole[:5]


def test_system_prompt_goes_before_problems_that_have_none(tmp_path):
    """Two system messages, or none: the model is asked for another format than the one that is graded."""
    own = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    rows = [{"prompt": prompt, "answer": "3"} for prompt in ("1+2?", MESSAGES, own)]
    path = str(write_jsonl(tmp_path / "data.jsonl", rows))
    system = {"role": "system", "content": "Box it."}
    assert [p.prompt for p in common.load_problems(path, system_prompt="Box it.")] == [
        [system, {"role": "user", "content": "1+2?"}],
        [system, *MESSAGES],
        own,
    ]
    assert [p.prompt for p in common.load_problems(path)] == ["1+2?", MESSAGES, own]


def test_golds_that_cannot_be_parsed_are_listed(tmp_path, capsys):
    """Answers the verifier cannot read are compared as text only; unlisted, they are problems nobody solves."""
    rows = [{"problem": "?", "answer": "3"}, {"problem": "?", "answer": "}{"}]
    common.load_problems(str(write_jsonl(tmp_path / "data.jsonl", rows)))
    message = capsys.readouterr().err
    assert "data.jsonl:2" in message and "data.jsonl:1" not in message


# ---------------------------------------------------------------------------------------------------------------------
# Prompts as tokens
# ---------------------------------------------------------------------------------------------------------------------


def with_bos(tokenizer):
    """Like Llama's: the tokenizer puts a BOS before any text, and the chat template writes one, too."""
    bos = tokenizer.convert_tokens_to_ids("<|unk|>")
    tokenizer.bos_token = "<|unk|>"
    before_any_text = TemplateProcessing(single="<|unk|> $A", special_tokens=[("<|unk|>", bos)])
    tokenizer.backend_tokenizer.post_processor = before_any_text
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert tokenizer("1")["input_ids"][0] == bos
    return tokenizer, bos


def test_chat_template_is_used_once(tokenizer):
    """A template rendered to text and tokenized again loses its marks or doubles them: no chat the model knows."""
    conversation = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "1+2="}]
    ids = common.encode(tokenizer, conversation)
    assert tokenizer.decode(ids) == "<|system|>Hi<|user|>1+2=<|assistant|>"
    assert tokenizer.decode(common.encode(tokenizer, "1+2=")) == "<|user|>1+2=<|assistant|>"
    assert all(isinstance(i, int) for i in ids)
    assert common.encode(tokenizer, ids) == ids and common.encode(tokenizer, ids) is not ids


def test_chat_template_gets_its_options(tokenizer):
    """enable_thinking that never reaches the template: another mode of the model is trained than the one evaluated."""
    tokenizer.chat_template += "{% if enable_thinking %}think{% endif %}"
    assert tokenizer.decode(common.encode(tokenizer, "1", {"enable_thinking": True})) == "<|user|>1<|assistant|>think"
    assert tokenizer.decode(common.encode(tokenizer, "1", {"enable_thinking": False})) == "<|user|>1<|assistant|>"


def test_no_template_means_plain_text(tokenizer):
    """Base models have no template; inventing marks would make every prompt one they have never seen."""
    tokenizer.chat_template = None
    conversation = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "1+2="}]
    assert tokenizer.decode(common.encode(tokenizer, conversation)).rstrip("\n") == "Hi\n\n1+2="
    assert tokenizer.decode(common.encode(tokenizer, "1+2=")).rstrip("\n") == "1+2="


@pytest.mark.parametrize("template", [True, False], ids=["template", "plain"])
@pytest.mark.parametrize("prompt", ["1+2=", MESSAGES, "<|unk|>1+2="], ids=["text", "messages", "bos_inside"])
def test_at_most_one_bos(template, prompt, tokenizer):
    """The template writes a BOS and the tokenizer another: two of them are a start no model was trained on."""
    tokenizer, bos = with_bos(tokenizer)
    if not template:
        tokenizer.chat_template = None
    ids = common.encode(tokenizer, prompt)
    assert ids[0] == bos and ids[1] != bos


def test_long_prompts_are_dropped_and_listed(tokenizer, capsys):
    """A prompt cut in the middle is another problem; one dropped in silence is a smaller data set than was reported."""
    problems = [common.Problem("1" * n, "3", f"file:{n}") for n in (3, 20, 4, 30)]
    kept = common.tokenize_problems(tokenizer, problems, 10)
    assert [p.where for p in kept] == ["file:3", "file:4"]
    assert all(p.ids == common.encode(tokenizer, p.prompt) for p in kept)
    message = capsys.readouterr().err
    assert "file:20" in message and "file:30" in message and "file:3 " not in message
    with pytest.raises(common.UserError, match="max_prompt_length"):
        common.tokenize_problems(tokenizer, problems, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories for imitation
# ---------------------------------------------------------------------------------------------------------------------


def test_trajectories_of_every_shape(tmp_path):
    """The answer to imitate must end up in the completion, not in the prompt, where no loss is taken."""
    answer = {"role": "assistant", "content": "3"}
    rows = [
        {"prompt": "1+2?", "response": "3"},
        {"problem": "1+2?", "response": "3"},
        {"question": "1+2?", "response": "3"},
        {"prompt": MESSAGES, "response": "3"},
        {"messages": [*MESSAGES, answer]},
    ]
    trajectories = sft.load_trajectories(str(write_jsonl(tmp_path / "data.jsonl", rows)))
    assert [t.prompt for t in trajectories] == ["1+2?"] * 3 + [MESSAGES] * 2
    assert [t.response for t in trajectories] == ["3"] * 5


@pytest.mark.parametrize(
    "row",
    [{"prompt": "1?"}, {"response": "3"}, {"messages": MESSAGES}, {"prompt": "1?", "response": 3}, {"text": "1+2=3"}],
)
def test_malformed_trajectories_are_named(row, tmp_path):
    """A conversation without an answer has nothing to imitate; training on the question instead goes unnoticed."""
    good = {"prompt": "1+2?", "response": "3"}
    path = write_jsonl(tmp_path / "data.jsonl", [good, row])
    with pytest.raises(common.UserError) as error:
        sft.load_trajectories(str(path))
    assert f"{path}:2:" in str(error.value) and all(name in str(error.value) for name in row)


def test_the_teacher_is_as_imperfect_as_it_says():
    """A perfect teacher leaves nothing to amplify, a bad one nothing to find: the lesson lives on these shares.

    2000 draws with a fixed seed; the bounds are more than five standard deviations wide.
    """
    import random

    generator = random.Random(0)
    problems = common.arithmetic("train", 2000)
    texts = [sft.teach(p.prompt, generator) for p in problems]
    right = [common.last_boxed(text) == p.answer for text, p in zip(texts, problems, strict=True)]
    worked = [";" in text for text in texts]
    assert 0.54 < sum(worked) / 2000 < 0.66
    guesses = [r for r, w in zip(right, worked) if not w]
    assert 0.22 < sum(guesses) / len(guesses) < 0.38
    steps = [r for r, w in zip(right, worked) if w]  # three steps without a slip, 0.82 ** 3, or slips that cancel
    assert 0.48 < sum(steps) / len(steps) < 0.64
    tokenizer = sft.embedded_tokenizer()
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in texts[:100])


def test_imitation_trains_the_end_token(tokenizer):
    """Without the end token in the mask the model never learns to stop; with the prompt in it, it learns to ask."""
    trajectories = [sft.Trajectory("1+2?", "", "", [7, 8, 9], "ab"), sft.Trajectory("1?", "", "", [7], "abcd")]
    batch = sft.collate(tokenizer, trajectories, 0, "cpu")
    a, b, c, d, end = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "c", "d", tokenizer.eos_token))
    assert batch.ids[0].tolist() == [7, 8, 9, a, b, end] and batch.mask[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.ids[1].tolist() == [7, a, b, c, d, end] and batch.mask[1].tolist() == [0, 1, 1, 1, 1, 1]
    assert batch.lengths.tolist() == [3, 5]


# ---------------------------------------------------------------------------------------------------------------------
# The order of training
# ---------------------------------------------------------------------------------------------------------------------


def run_over(n, model_folder, data, **options):
    run = bookkeeping.Run(arguments(grpo, model_folder, data, **options))
    run.problems = list(range(n))
    return run


def test_every_problem_comes_once_per_epoch(model_folder, data):
    """Drawing with replacement leaves a third of the problems out of every epoch."""
    run = run_over(12, model_folder, data, num_prompts=3)
    epochs = [[p for step in range(4 * e + 1, 4 * e + 5) for p in run.batch(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(12))
    uneven = run_over(11, model_folder, data, num_prompts=3)
    epoch = [p for step in (1, 2, 3) for p in uneven.batch(step)]
    assert len(epoch) == len(set(epoch)) == 9  # the two left over wait for the next epoch
    assert all(len(uneven.batch(step)) == 3 for step in range(1, 20))


def test_order_depends_on_seed_and_step_only(model_folder, data):
    """A resumed run must meet the problems it would have met; a global generator would give it the first ones again."""
    run = run_over(12, model_folder, data, num_prompts=3)
    batches = [run.batch(step) for step in range(1, 9)]
    assert run_over(12, model_folder, data, num_prompts=3).batch(6) == batches[5]
    other = run_over(12, model_folder, data, num_prompts=3, seed=1)
    assert [other.batch(step) for step in range(1, 9)] != batches

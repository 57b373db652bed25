"""What an answer earns, by hand for every --reward; and what no reward changes: verdicts, accuracy, evaluation."""

import pytest
import torch
from helpers import arguments, grade, read_jsonl, tiny_model

import bookkeeping
import common
import grpo
from plumbing.rewards import agreement, coin
from tasks import Problem
from tasks.countdown import CountdownProblem

# Two prompts, four answers to each, and whether these are finished.
PROBLEMS = [Problem("1+2=", "3"), Problem("3+4=", "7")]
ANSWERS = [
    ("\\boxed{3}", True),
    ("so \\boxed{4}", True),
    ("\\boxed{4}", True),
    ("I give up", True),
    ("\\boxed{7}", True),
    ("\\boxed{3}", False),
    ("\\boxed{3}", False),
    ("\\boxed{}", True),
]
EARNED = {
    "right": [[1, 0, 0, 0], [1, 0, 0, 0]],
    "inverted": [[0, 1, 1, 1], [0, 1, 1, 1]],
    "format": [[1, 1, 1, 0], [1, 0, 0, 0]],
    "majority": [[0, 1, 1, 0], [1, 0, 0, 0]],
}


def rollouts_of(answers, seed=0):
    texts = [text for text, _ in answers]
    finished = torch.tensor([done for _, done in answers])
    return common.Rollouts(None, None, None, None, finished=finished, texts=texts, seed=seed)


@pytest.mark.parametrize("reward", EARNED)
def test_rewards_by_hand(reward):
    """Eight answers, the third and the last but one of which tell apart what might be mixed up."""
    verdicts, rewards = common.grade_rollouts(rollouts_of(ANSWERS), PROBLEMS, reward=reward)
    assert verdicts == ["right", "wrong", "wrong", "wrong", "right", "wrong", "wrong", "wrong"]
    assert torch.equal(rewards, torch.tensor(EARNED[reward], dtype=torch.float32))


def test_a_right_answer_is_rewarded_if_nothing_else_is_asked_for():
    expected = torch.tensor(EARNED["right"], dtype=torch.float32)
    assert torch.equal(common.grade_rollouts(rollouts_of(ANSWERS), PROBLEMS)[1], expected)
    assert grpo.Args().reward == "right"


def test_a_task_says_itself_what_a_final_answer_is():
    """Countdown looks into <answer>, and has a reward between right and wrong: inverted, it is 0.9."""
    problem = CountdownProblem("3, 5, 8 make 37", "8*5-3", numbers=[3, 5, 8], target=37)
    texts = ["<answer>8*5-3</answer>", "<answer>8*5+3</answer>", "8*5-3", "<answer>8*5+3</answer>"]
    rollouts = rollouts_of([(text, True) for text in texts])
    found = {}
    for reward in EARNED:
        found[reward] = common.grade_rollouts(rollouts, [problem], reward=reward)[1].flatten().tolist()
    assert found["right"] == pytest.approx([1, 0.1, 0, 0.1])
    assert found["inverted"] == pytest.approx([0, 0.9, 1, 0.9])
    assert found["format"] == [1, 1, 0, 1]
    assert found["majority"] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "answers, G, expected",
    [
        ("ab" + "ba", 4, [1, 0, 0, 1]),  # a tie: the first
        ("abcd", 4, [1, 0, 0, 0]),
        ("abb" + "aab", 3, [0, 1, 1, 1, 1, 0]),  # the vote is that of the group, not of the batch
        (["", "", "", "a"], 4, [0, 0, 0, 1]),  # no answer is not an answer that many give
        (["", ""], 2, [0, 0]),
        (["3", "3.0", "3.0"], 3, [0, 1, 1]),  # as text: labels and the verifier stay out of it
        ("aa", 1, [1, 1]),
    ],
)
def test_the_majority_of_a_group(answers, G, expected):
    assert agreement(list(answers), G) == expected


# ---------------------------------------------------------------------------------------------------------------------
# The coin
# ---------------------------------------------------------------------------------------------------------------------


def test_the_coin_is_fair_and_repeatable():
    """4,000 tosses: a share outside 0.45 to 0.55 would come once in 10^9 times."""
    rewards = []
    for _ in range(2):
        rollouts = rollouts_of([("\\boxed{3}", True)] * 4000, seed=5)
        rewards.append(common.grade_rollouts(rollouts, PROBLEMS[:1] * 1000, reward="random")[1])
    assert torch.equal(*rewards)
    assert set(rewards[0].flatten().tolist()) == {0.0, 1.0}
    assert 0.45 < rewards[0].mean() < 0.55  # equal answers, so it does not hang on the text alone


def test_every_step_tosses_anew():
    """A text that the same coin falls for at every step would be learnt."""
    answers = [("\\boxed{3}", True)] * 400
    found = []
    for seed in range(2):
        found.append(common.grade_rollouts(rollouts_of(answers, seed), PROBLEMS[:1], reward="random")[1])
    assert 0.35 < (found[0] == found[1]).float().mean() < 0.65


def test_samples_know_their_seed(tokenizer):
    rollouts = common.sample(tiny_model(), tokenizer, ["1+2="], 2, 3, seed=17)
    assert rollouts.seed == 17


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def run_with(reward, model_folder, data):
    """(metrics of two steps, evaluations, answers) of a run that learns nothing: the same samples, other rewards."""
    settings = dict(reward=reward, learning_rate=0.0, eval_steps=2, output_dir=reward)
    grpo.main(arguments(grpo, model_folder, data, **settings))
    records = read_jsonl(f"{reward}/metrics.jsonl")
    steps = [record for record in records if "reward" in record]
    evaluations = [record for record in records if "eval_accuracy" in record]
    return steps, evaluations, read_jsonl(f"{reward}/completions.jsonl")


def test_accuracy_and_evaluation_stay_true(model_folder, data):
    """With random rewards, an accuracy of rewards that are 1 shows a coin, and the control shows nothing."""
    runs = {reward: run_with(reward, model_folder, data) for reward in ("right", "random", "inverted")}
    true_steps, true_evaluations, true_answers = runs["right"]
    assert len(true_steps) == 2 and len(true_evaluations) == 2
    for reward, (steps, evaluations, answers) in runs.items():
        assert evaluations == true_evaluations
        for step, record in enumerate(steps):
            of_step = [answer for answer in answers if answer["step"] == step + 1]
            rewards = [answer["reward"] for answer in of_step]
            graded = grade([a["text"] for a in of_step], [Problem("?", a["gold"]) for a in of_step])
            assert [answer["verdict"] == "right" for answer in of_step] == [value == 1 for value in graded]
            assert record["accuracy"] == pytest.approx(sum(graded) / len(graded))
            assert record["reward"] == pytest.approx(sum(rewards) / len(rewards))
            for name in ("accuracy", "length_right", "length_wrong", "response_length"):
                assert record[name] == true_steps[step][name], (reward, name)
        assert [answer["text"] for answer in answers] == [answer["text"] for answer in true_answers]
    inverted = [answer["reward"] for answer in runs["inverted"][2]]
    assert inverted == [1 - answer["reward"] for answer in true_answers]


def test_random_rewards_are_coins_of_the_steps_seed(model_folder, data):
    """Of the step's seed and of nothing that a resumed run would not have."""
    _, _, answers = run_with("random", model_folder, data)
    for row, answer in enumerate(answers):
        seed = bookkeeping.step_seed(0, answer["step"])
        assert answer["reward"] == coin(seed, row % 8, answer["text"])
    assert len({answer["reward"] for answer in answers}) == 2
    assert [answer["reward"] for answer in answers] != [float(answer["verdict"] == "right") for answer in answers]

"""What an answer earns in training: --reward. Whether it is right is the verdict's business, and stays so."""

import random
from collections import Counter


def rewards_of(reward, right, rollouts, problems, G):
    """Rewards of B answers, a list. right: what they earn by their verdicts, a list of B; problems: those of every row,
    a list of B, in which G of a kind follow each other and are a group.

    'right': that. 'inverted': 1 minus that. 'random': 0 or 1 by a coin, the same whenever the same rollouts are graded.
    'format': 1 for a finished answer that can be judged, right or wrong. 'majority': 1 for the answer that most of its
    group give, where no label is asked.
    """
    if reward == "inverted":
        return [1.0 - value for value in right]
    if reward == "random":
        return [coin(rollouts.seed, row, text) for row, text in enumerate(rollouts.texts)]
    if reward == "format":
        return [float(answer != "") for answer in final_answers(rollouts, problems)]
    if reward == "majority":
        return agreement(final_answers(rollouts, problems), G)
    return right


def coin(*parts):
    """0.0 or 1.0, each half of the time; the same parts give the same."""
    return float(random.Random(repr(parts)).random() < 0.5)


def final_answers(rollouts, problems):
    """The final answer of every row as text; '' for one that is unfinished or has none."""
    answers = []
    for text, problem, finished in zip(rollouts.texts, problems, rollouts.finished, strict=True):
        answers.append(problem.final_answer(text) if finished else "")
    return answers


def agreement(answers, G):
    """1.0 for every answer that equals, letter by letter, the most frequent one of its G; of equally frequent ones, the
    first. 0.0 for all others, and for '', which is no answer."""
    rewards = []
    for start in range(0, len(answers), G):
        group = answers[start : start + G]
        votes = Counter(answer for answer in group if answer)
        [(winner, _)] = votes.most_common(1) or [("", 0)]
        rewards += [float(answer == winner != "") for answer in group]
    return rewards

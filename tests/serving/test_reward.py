"""User-written rewards: how they are found, what they must return, and that they run beside the main thread."""

import importlib.machinery
import importlib.util
import sys
import threading
import types

import pytest
import torch

from aligner.data.batch import pack_rollout
from aligner.serving.reasoning import VerifiedAnswer
from aligner.serving.reward import RewardConfig, RewardFunction, load_reward
from aligner.serving.rewards import Rewards

MODULE = """
made = 0

def brevity(prompts, responses, metadata):
    return [-len(response) + m.get("bonus", 0) for response, m in zip(responses, metadata)]

class Stateful:
    def __init__(self):
        global made
        made += 1
        self.calls = 0

    def __call__(self, prompts, responses, metadata):
        self.calls += 1
        return [self.calls] * len(responses)

constant = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "some_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import json\nraise RuntimeError('no licence')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def reward(function):
    return RewardFunction(function, "tests:it")


def test_a_function_is_called_with_aligned_lists(module):
    score = load_reward("some_rewards:brevity")
    assert score(["a", "b"], ["xx", "yyy"], [{}, {"bonus": 10}]) == [-2.0, 7.0]


def test_a_class_is_constructed_once(module):
    score = load_reward("some_rewards:Stateful")
    score.check()
    assert score(["a"], ["b"], [{}]) == [2.0]
    import some_rewards

    assert some_rewards.made == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("some_rewards", "is not MODULE:CALLABLE; write for example"),
        ("some_rewards:", "is not MODULE:CALLABLE"),
        ("no_such_module:f", "importing no_such_module raised ModuleNotFoundError"),
        ("broken_rewards:f", "importing broken_rewards raised RuntimeError: no licence"),
        ("some_rewards:brevty", r"has no callable 'brevty'; it has \['Stateful', 'brevity'\]"),
        ("some_rewards:constant", "has no callable 'constant'"),
    ],
)
def test_a_reward_that_cannot_be_loaded(module, spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "tests:it returned 1 numbers for 2 responses"),
        ([1.0, 2.0, 3.0], "returned 3 numbers for 2 responses"),
        ([1.0, float("nan")], "returned nan for response 1, expected a finite number"),
        ([float("-inf"), 1.0], "returned -inf for response 0"),
        ([1.0, None], "returned None for response 1"),
        (["good", 1.0], "returned 'good' for response 0"),
        (None, "raised TypeError"),
    ],
)
def test_what_a_reward_may_not_return(values, message):
    with pytest.raises(ValueError, match=message):
        reward(lambda prompts, responses, metadata: values).score(["p", "p"], ["r", "r"], [{}, {}])


def test_an_exception_is_told_and_chained():
    def fail(prompts, responses, metadata):
        raise KeyError("rubric")

    with pytest.raises(ValueError, match="reward function tests:it raised KeyError: 'rubric'") as error:
        reward(fail).check()
    assert isinstance(error.value.__cause__, KeyError)


def test_numpy_numbers_become_floats():
    import numpy as np

    values = reward(lambda p, r, m: np.arange(2, dtype=np.float32)).score(["p"] * 2, ["r"] * 2, [{}] * 2)
    assert values == [0.0, 1.0] and all(type(value) is float for value in values)


def rewards(*functions, weights: tuple[float, ...]) -> Rewards:
    return Rewards([reward(function) for function in functions], [], weights)


def test_submit_runs_beside_the_caller_in_order_in_one_thread():
    gate, threads = threading.Event(), []

    def slow(prompts, responses, metadata):
        assert gate.wait(10)
        threads.append(threading.get_ident())
        return [float(prompts[0])]

    score = rewards(slow, lambda p, r, m: [7.0], weights=(1.0, 2.0))
    futures = [score.submit([str(i)], ["r"], [{}]) for i in range(3)]
    assert not any(future.done() for future in futures)
    gate.set()
    assert [future.result(10) for future in futures] == [[[0.0, 7.0]], [[1.0, 7.0]], [[2.0, 7.0]]]
    assert len(set(threads)) == 1 and threads[0] != threading.get_ident()


def test_a_failure_in_the_worker_reaches_the_caller():
    future = rewards(lambda p, r, m: [], weights=(1.0,)).submit(["p"], ["r"], [{}])
    with pytest.raises(ValueError, match="returned 0 numbers for 1 responses"):
        future.result(10)


def test_a_weighted_sum_of_functions():
    rollout = pack_rollout([[5], [6]], [[7], [8, 9]], [[-1.0], [-1.0] * 2], [True, False], 0)
    score = rewards(lambda p, r, m: [1.0, 2.0], lambda p, r, m: [10.0, -10.0], weights=(0.5, 2.0))
    assert score.total(torch.tensor([[1.0, 10.0], [2.0, -10.0]]), rollout).tolist() == [20.5, -19.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1.0, 2.0)}, r"reward.weights has 2 numbers for 1 rewards; give one each"),
        ({"function": ("a:f", "b:g"), "model": ("m",), "weights": (1.0,)}, r"has 1 numbers for 3 rewards"),
        ({"std": 0.0}, r"reward.std and reward.clip must be above 0, got 0.0 and None"),
        ({"clip": -1.0}, r"must be above 0, got 1.0 and -1.0"),
    ],
)
def test_wrong_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**options)


def test_the_default_reward_stands_in_for_none():
    assert RewardConfig().functions() == ("aligner.serving.sentiment:PositiveReview",)
    assert RewardConfig(model=("m",)).functions() == ()
    assert RewardConfig(function=("a:f",), model=("m",)).functions() == ("a:f",)


def test_verified_answers(monkeypatch):
    checker = types.ModuleType("reasoning_gym")
    checker.get_score_answer_fn = lambda task: {"sum": lambda answer, entry: float(answer == entry["answer"])}[task]
    checker.__spec__ = importlib.machinery.ModuleSpec("reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym", checker)
    score = load_reward("aligner.serving.reasoning:VerifiedAnswer")
    entry = {"source_dataset": "sum", "answer": "7", "metadata": {}}
    assert score(["3 + 4 ="] * 3, [" 7\n", "8", "7"], [entry, entry, {}]) == [1.0, 0.0, 0.0]


def test_verified_answers_need_their_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        VerifiedAnswer()

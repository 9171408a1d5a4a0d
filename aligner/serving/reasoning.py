"""A verifiable reward: tasks of the package reasoning-gym (Apache-2.0), scored by their own checkers."""

import importlib.util
from collections.abc import Callable


class VerifiedAnswer:
    """Reward: what the task's checker gives to the response, in [0, 1]; 1 is right.

    A prompt's line carries the task beside its text: "source_dataset" its name, "answer", and "metadata", the rest of
    the entry that reasoning-gym made (see benchmarks/reasoning.py). White space around the response does not count.
    Source: Stojanovski et al. 2025, arXiv:2505.24760.
    Raises ValueError when the package is not installed.
    """

    def __init__(self):
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError(
                "the reward VerifiedAnswer needs the package reasoning-gym; run `pip install reasoning-gym==0.1.25`."
            )
        import reasoning_gym

        self._find, self._checkers = reasoning_gym.get_score_answer_fn, {}

    def __call__(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> list[float]:
        """One score a response; one without a task, as in the trial call before a run, gets 0."""
        return [self._score(response.strip(), entry) for response, entry in zip(responses, metadata, strict=True)]

    def _score(self, answer: str, entry: dict) -> float:
        if "source_dataset" not in entry:
            return 0.0
        return float(self._checker(entry["source_dataset"])(answer, entry))

    def _checker(self, task: str) -> Callable[[str, dict], float]:
        if task not in self._checkers:
            self._checkers[task] = self._find(task)
        return self._checkers[task]

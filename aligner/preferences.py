"""Preference data from a model and a reward: `python -m aligner.preferences --output pairs.jsonl`.

Every prompt is answered n times and the responses are scored; what is written depends on --kind:
  pairs: the best against the worst, with their rewards, for aligner.dpo and aligner.reward_model;
  judged: each response with the label (reward > --threshold), for aligner.kto;
  best: the best one, for aligner.sft.
Source: best against worst of n: Dong et al. 2024, arXiv:2405.07863, section 3.2.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aligner.job.config import ToolConfig
from aligner.job.job import Job
from aligner.job.tool import check_output, open_prompts, sampling_actor, write_rows
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(ToolConfig):
    output: Path
    """The JSONL file to write; it must be new."""
    kind: Literal["pairs", "judged", "best"] = "pairs"
    """What is written."""
    prompts: int = 0
    """Prompts that are answered, the first of the data; 0 for all."""
    n: int = 4
    """Responses to each."""
    gap: float = 0.0
    """Pairs whose rewards differ by no more than this are left out, reward units."""
    threshold: float = 0.0
    """Responses of a larger reward are desirable, reward units."""

    def __post_init__(self):
        super().__post_init__()
        if self.n < 2 and self.kind == "pairs":
            raise ValueError(f"n is {self.n}, but a pair takes 2 responses or more.")


def rows_of(
    c: Config, prompt: str | list, responses: list[str], rewards: list[float], finished: list[bool]
) -> list[dict]:
    """The lines that the responses to one prompt make; an empty response makes none."""
    given = [(r, i) for i, r in enumerate(rewards) if responses[i].strip()]
    if not given:
        return []
    (high, best), (low, worst) = max(given, key=lambda x: x[0]), min(given, key=lambda x: x[0])
    if c.kind == "best":
        return [{"prompt": prompt, "completion": responses[best], "finished": finished[best], "reward": high}]
    if c.kind == "judged":
        judged = [{"completion": responses[i], "finished": finished[i], "label": r > c.threshold} for r, i in given]
        return [{"prompt": prompt} | row | {"reward": r} for row, (r, _) in zip(judged, given, strict=True)]
    if high - low <= c.gap or responses[best] == responses[worst]:
        return []
    pair = {"prompt": prompt, "chosen": responses[best], "rejected": responses[worst]}
    rewards_of = {"chosen_reward": high, "rejected_reward": low}
    return [pair | rewards_of | {"chosen_finished": finished[best], "rejected_finished": finished[worst]}]


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    check_output(config.output)
    job = Job("preferences", config)
    batches = open_prompts(job, config.prompts)
    job.join()
    actor, rows, done, total = sampling_actor(job), [], 0, sum(map(len, batches))
    for number, prompts in enumerate(batches):
        scored = actor.answer(prompts, config.n, config.seed * 2**32 + number)
        rewards, finished = actor.raw_rewards(scored).tolist(), scored.rollout.finished_B.tolist()
        for i, prompt in enumerate(prompts):
            span = slice(i * config.n, (i + 1) * config.n)
            rows += rows_of(config, prompt.given, scored.texts[1][span], rewards[span], finished[span])
        done += len(prompts)
        print(f"{done}/{total} prompts, {len(rows)} lines", flush=True)
    print(f"{config.output}: {write_rows(config.output, rows)} lines")
    return 0


if __name__ == "__main__":
    options.user_errors(main)

"""GRPO on verifiable rewards: `make reasoning`. Two tasks of reasoning-gym, accuracy before and after.

Writes benchmarks/results/reasoning.csv. Needs `pip install reasoning-gym==0.1.25`.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import reasoning_gym

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "reasoning"
TASKS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "spell_backward": {"min_word_len": 3, "max_word_len": 3},
}
# A model of this size does not follow the tasks' questions; it goes on with a list of solved ones.
SHOTS = {
    "chain_sum": "1 + 5 = 6\n7 - 4 = 3\n2 + 9 = 11\n3 - 8 = -5\n",
    "spell_backward": "sun -> nus\ncat -> tac\nodd -> ddo\npit -> tip\n",
}
OPTIONS = ["--reward.function", "aligner.serving.reasoning:VerifiedAnswer", "--sampling.max-tokens", "8"]
OPTIONS += ["--sampling.stop-strings", "\n", "--kl-coef", "0.02", "--kl-estimator", "k2", "--optimizer.lr", "1e-3"]
OPTIONS += ["--batch.sequences", "128", "--batch.samples-per-prompt", "8", "--batch.minibatch-sequences", "128"]
OPTIONS += ["--steps", "40", "--eval-prompts", "256", "--eval-every", "10"]


def prompt(task: str, question: str) -> str:
    """The question as the next line of the solved ones."""
    if task == "chain_sum":
        return SHOTS[task] + question.rpartition(": ")[2]
    return SHOTS[task] + question.rpartition(": ")[2] + " ->"


def write(file: Path, task: str, size: int, seed: int) -> None:
    rows = reasoning_gym.create_dataset(task, size=size, seed=seed, **TASKS[task])
    with file.open("w") as lines:
        for row in rows:
            entry = {"answer": row["answer"], "metadata": row["metadata"], "source_dataset": task}
            lines.write(json.dumps({"text": prompt(task, row["question"]), **entry}) + "\n")


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    rows = []
    for task in TASKS:
        train, held_out, run = RUNS / f"{task}.jsonl", RUNS / f"{task}-held-out.jsonl", RUNS / task
        write(train, task, 2000, seed=1)
        write(held_out, task, 256, seed=2)
        if not (run / "policy").exists():
            command = [sys.executable, "-W", "ignore", "-m", "aligner.grpo", "--data", str(train), "--eval-data"]
            command += [str(held_out), *OPTIONS, "--output", str(run)]
            print(" ".join(["python", *command[3:]]), flush=True)
            with (RUNS / f"{task}.log").open("w") as log:
                subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows.append(
            {
                "task": task,
                "steps": metrics[-1]["step"],
                "score before": metrics[0]["eval/reward/mean"],
                "score after": metrics[-1]["eval/reward/mean"],
                "kl after": metrics[-1]["eval/kl/mean"],
            }
        )
    with (ROOT / "benchmarks" / "results" / "reasoning.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

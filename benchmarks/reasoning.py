"""GRPO on verifiable rewards: `make reasoning`. Two tasks of reasoning-gym, accuracy before and after.

Writes benchmarks/results/reasoning.csv. Needs `pip install reasoning-gym==0.1.25`.
"""

from pathlib import Path

import reasoning_gym
from experiment import ROOT, draw_curves, read, run, write, write_results

from aligner.checkpoint.default_model import default_model
from aligner.data.tokenizer import load_tokenizer
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from aligner.serving.reasoning import VerifiedAnswer

RUNS = ROOT / "runs" / "reasoning"
TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
TASKS = {"chain_sum": TERMS, "products": TERMS}
# A model of this size does not follow the tasks' questions; it goes on with a list of solved ones.
SHOTS = {
    "chain_sum": "1 + 5 = 6\n7 - 4 = 3\n2 + 9 = 11\n3 - 8 = -5\n",
    "products": "2 * 3 = 6\n15 * 4 = 60\n7 * 6 = 42\n3 * 12 = 36\n",
}
HELD_OUT = 256
MAX_TOKENS = 8
OPTIONS = ["--reward.function", "aligner.serving.reasoning:VerifiedAnswer", "--sampling.max-tokens", str(MAX_TOKENS)]
OPTIONS += ["--sampling.stop-strings", "\n", "--clip-high", "0.28", "--dynamic-sampling", "4", "--kl-coef", "0"]
OPTIONS += ["--batch.sequences", "128", "--batch.samples-per-prompt", "8", "--batch.minibatch-sequences", "128"]
OPTIONS += ["--steps", "40", "--eval-prompts", str(HELD_OUT), "--eval-every", "10", "--optimizer.lr", "5e-4"]


def rows_of(task: str) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows): no question is in both, and none is asked twice."""
    entries = {row["question"]: row for row in reasoning_gym.create_dataset(task, size=8000, seed=1, **TASKS[task])}
    rows = []
    for question, row in entries.items():
        problem = question.partition(": ")[2].partition(". ")[0].removesuffix("=").strip()
        entry = {"answer": row["answer"], "metadata": row["metadata"], "source_dataset": task}
        rows.append({"text": f"{SHOTS[task]}{problem} =", **entry})
    return rows[HELD_OUT:], rows[:HELD_OUT]


def greedy_accuracy(folder: Path, rows: list[dict]) -> float:
    """How many of the most likely answers the task's checker calls right."""
    tokenizer, sampler = load_tokenizer(folder), NativeSampler.from_pretrained(folder)
    stop = {"stop": (tokenizer.eos_token_id,), "stop_strings": ("\n",)}
    prompts = [tokenizer.encode(row["text"]) for row in rows]
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0.0, **stop)
    found = {r.prompt: tokenizer.decode(r.tokens) for r in sampler.stream(prompts, sampling)}
    scores = VerifiedAnswer()([], [found[i] for i in range(len(rows))], rows)
    return sum(score == 1 for score in scores) / len(rows)


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    results = []
    for task in TASKS:
        sides, folder = rows_of(task), RUNS / task
        train, held_out = (
            write(RUNS / f"{task}-{name}.jsonl", rows) for name, rows in zip(("train", "held-out"), sides, strict=True)
        )
        run(folder, "grpo", "--data", train, "--eval-data", held_out, *OPTIONS)
        metrics = read(folder / "metrics.jsonl")
        results.append(
            {
                "task": task,
                "questions": len(sides[0]),
                "steps": metrics[-1]["step"],
                "score before": metrics[0]["eval/reward/mean"],
                "score after": metrics[-1]["eval/reward/mean"],
                "greedy accuracy before": greedy_accuracy(default_model(), sides[1]),
                "greedy accuracy after": greedy_accuracy(folder / "policy", sides[1]),
                "kl after": metrics[-1]["eval/kl/mean"],
            }
        )
        print(results[-1], flush=True)
    write_results("reasoning", results)
    title = "GRPO on verifiable rewards: score of 256 held-out questions, 1 if all are right"
    draw_curves("reasoning", title, [(RUNS / task, "eval/reward/mean", task) for task in TASKS])


if __name__ == "__main__":
    main()

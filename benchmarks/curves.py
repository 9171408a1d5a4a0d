"""The curve of a real run for each page of docs/: `make curves`, after `make frontier`, whose runs it draws.

What the frontier has no run of is trained here, from the same SFT model and data. Writes docs/images/<page>.svg.
"""

from experiment import ROOT, draw_curves, run, write

from aligner.data.movie_reviews import review_rows

RUNS = ROOT / "runs" / "frontier"
SFT, PAIRS = RUNS / "sft", RUNS / "pairs.jsonl"
REVIEWS = RUNS / "reviews.jsonl", RUNS / "reviews-held-out.jsonl"
SMALL = ["--batch.examples", "40", "--optimizer.warmup-steps", "3"]
SAMPLED = ["--sampling.max-tokens", "24"]
# Runs that the frontier does not need: (program, its options).
MORE = {
    "reinforce": ("reinforce", ["--model", SFT, "--steps", "12", "--eval-prompts", "0", *SAMPLED]),
    "reward-model": ("reward_model", ["--model", SFT, "--data", PAIRS, *SMALL, "--steps", "16", "--layers", "12"]),
    "spin": ("spin", ["--model", SFT, *SMALL, *SAMPLED, "--steps", "8", "--iterations", "2", "--eval-examples", "64"]),
    "distill": (
        "distill",
        ["--teacher", SFT, "--data", REVIEWS[0], "--eval-data", REVIEWS[1], *SMALL, "--steps", "16"],
    ),
}
REWARD = (("reward/mean", "reward"), ("kl/mean", "KL to the reference, nats per response"))
PAIRED = (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("rewards/margin", "margin"))
RIGHT = ("accuracy", "accuracy")
# Page: (run, title, metrics with their labels).
PAGES = {
    "sft": ("sft", "SFT on reviews: loss, nats per token", (("loss", "training"), ("eval/loss", "held out"))),
    "grpo": ("grpo--kl-coef-0.1", "GRPO: reward of a step, log-odds; KL, nats", REWARD),
    "reinforce": ("reinforce", "REINFORCE (RLOO): reward of a step, log-odds; KL, nats", REWARD),
    "rejection-sampling": (
        "rejection-sampling--steps-8",
        "Rejection sampling: reward of a step, log-odds; KL, nats",
        (*REWARD, ("reward/kept", "reward of the kept responses")),
    ),
    "dpo": ("dpo--beta-0.1", "DPO: implicit rewards of a step", PAIRED),
    "kto": ("kto--beta-0.1", "KTO: implicit rewards of a step; KL baseline, nats", (*PAIRED, ("kl_baseline", "z"))),
    "reward-model": (
        "reward-model",
        "Reward model: loss and accuracy of a step",
        (("loss", "loss"), ("accuracy", "accuracy")),
    ),
    "spin": ("spin", "SPIN: implicit rewards of a step; a new iteration begins at step 9", PAIRED),
    "distill": (
        "distill",
        "Distillation: divergence from the teacher, nats per token",
        (("loss/distillation", "training"), ("eval/loss/distillation", "held out")),
    ),
}


def main() -> None:
    for file, rows, count in zip(REVIEWS, review_rows(), (640, 64), strict=True):
        write(file, rows[:count])
    for name, (program, options) in MORE.items():
        run(RUNS / name, program, *options)
    for page, (folder, title, lines) in PAGES.items():
        draw_curves(page, title, [(RUNS / folder, metric, label) for metric, label in lines])


if __name__ == "__main__":
    main()

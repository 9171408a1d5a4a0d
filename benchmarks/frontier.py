"""Controlled sentiment, reward against KL for every method: `make frontier` (hours).

Rafailov et al. 2023, arXiv:2305.18290, section 6.1, with this library's default model, prompts and reward: SFT on
reviews, preference pairs of the SFT model by the sentiment classifier, then DPO, IPO, KTO, PPO, GRPO and rejection
sampling from the same SFT model at several strengths, each evaluated on the same held-out prompts.

Every stage is a command of its own, printed before it runs; a stage whose output is there is not run again.
Writes benchmarks/results/frontier.csv and docs/images/frontier.svg.
"""

import json

from experiment import IMAGES, ROOT, run, write_results

RUNS = ROOT / "runs" / "frontier"
SFT, PAIRS, JUDGED = RUNS / "sft", RUNS / "pairs.jsonl", RUNS / "judged.jsonl"
TOKENS = ["--sampling.max-tokens", "24"]
PROMPTS = "640"
ONLINE = ["--steps", "12", "--eval-prompts", "0", *TOKENS]
OFFLINE = ["--batch.examples", "40", "--steps", "16", "--optimizer.lr", "5e-4", "--optimizer.warmup-steps", "3"]
PAIRED = [*OFFLINE, "--data", PAIRS, "--reference-cache", RUNS / "reference.npz"]
# Name of a method: (program, its options, option of its strength, values).
METHODS = {
    "PPO": ("ppo", ONLINE, "--kl-coef", ("0.05", "0.1", "0.3")),
    "GRPO": ("grpo", [*ONLINE, "--kl-estimator", "k2", "--baseline", "dr_grpo"], "--kl-coef", ("0.05", "0.1", "0.3")),
    "rejection sampling": ("rejection_sampling", ["--eval-prompts", "0", *TOKENS], "--steps", ("2", "4", "8")),
    "DPO": ("dpo", PAIRED, "--beta", ("0.05", "0.1", "0.5")),
    "IPO": ("dpo", [*PAIRED, "--loss", "ipo"], "--beta", ("0.02", "0.05", "0.2")),
    "KTO": ("kto", [*OFFLINE, "--data", JUDGED], "--beta", ("0.05", "0.1", "0.5")),
}


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    run(SFT, "sft", "--steps", 150, "--batch.examples", 32, "--optimizer.lr", 5e-4, "--optimizer.warmup-steps", 10)
    data = ["--model", SFT, "--prompts", PROMPTS, "--n", "4", *TOKENS]
    run(PAIRS, "preferences", *data)
    run(JUDGED, "preferences", *data, "--kind", "judged")
    points = [("SFT", "", SFT)]
    for method, (program, options, knob, values) in METHODS.items():
        for value in values:
            folder = RUNS / f"{method.replace(' ', '-').lower()}{knob}-{value}"
            run(folder, program, "--model", SFT, *options, knob, value)
            points.append((method, f"{knob} {value}", folder))
    rows, files = [], []
    for method, knob, folder in points:
        file = RUNS / f"{folder.name}.json"
        against = ["--reference", SFT, "--against", SFT]
        run(file, "evaluate", "--model", folder, *against, *TOKENS, "--label", method)
        row = json.loads(file.read_text())
        rows.append(
            {"method": method, "strength": knob} | {k: v for k, v in row.items() if k not in ("label", "model")}
        )
        files.append(file)
    write_results("frontier", rows)
    picture = RUNS / "frontier.svg"
    picture.unlink(missing_ok=True)
    run(picture, "evaluate", "--frontier", *files[1:])
    (IMAGES / "frontier.svg").write_text(picture.read_text())


if __name__ == "__main__":
    main()

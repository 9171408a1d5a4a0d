"""Constitutional AI from its first stage to PPO on the model's own feedback: `make constitutional`.

Prompts are openings of dialogues between people (the package chitchat-dataset); the model answers as the second.
Critique and revision, SFT on the revisions, feedback on pairs of answers, a reward model of it, PPO.
Writes docs/images/constitutional.svg and benchmarks/results/constitutional.csv.
"""

import json

from experiment import ROOT, draw_curves, read, run, write, write_results
from steerlm import dialogues

RUNS = ROOT / "runs" / "constitutional"
PROMPTS, HELD_OUT = 320, 96
OPENING = 4  # messages: the system's, and three of the dialogue
TOKENS = ["--sampling.max-tokens", "40"]
TRAINED = ["--batch.examples", "32", "--optimizer.warmup-steps", "3"]


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    openings = [{"messages": row["messages"][:OPENING]} for row in dialogues()["rated"]]
    prompts = write(RUNS / "prompts.jsonl", openings[:PROMPTS])
    held_out = write(RUNS / "held-out.jsonl", openings[PROMPTS : PROMPTS + HELD_OUT])
    revised, feedback = RUNS / "revised.jsonl", RUNS / "feedback.jsonl"
    tuned, judge, ppo = RUNS / "sl-cai", RUNS / "reward-model", RUNS / "ppo"
    run(revised, "constitutional", "--stage", "revise", "--data", prompts, *TOKENS)
    run(tuned, "sft", "--data", revised, *TRAINED, "--steps", "20")
    run(feedback, "constitutional", "--stage", "prefer", "--model", tuned, "--data", prompts, *TOKENS)
    lines = read(feedback)
    cut = len(lines) * 7 // 8
    train, rest = write(RUNS / "pairs.jsonl", lines[:cut]), write(RUNS / "pairs-held-out.jsonl", lines[cut:])
    paired = ["--data", train, "--eval-data", rest, "--layers", "12", "--steps", "24"]
    run(judge, "reward_model", "--model", tuned, *paired, *TRAINED)
    rewards = ["--reward.model", judge, "--eval-data", held_out, "--eval-prompts", HELD_OUT]
    run(ppo, "ppo", "--model", tuned, "--data", prompts, *rewards, *TOKENS, "--steps", "12", "--eval-every", "6")
    first, last = read(ppo / "metrics.jsonl")[0], read(ppo / "metrics.jsonl")[-1]
    pairs = read(judge / "metrics.jsonl")[-1]
    verdict = RUNS / "verdict.json"
    options = ["--model", ppo, "--against", tuned, "--reference", tuned, "--reward.model", judge, *TOKENS]
    run(verdict, "evaluate", *options, "--data", held_out, "--prompts", HELD_OUT)
    rows = [
        {"what": "reward model, held-out accuracy", "value": pairs["eval/accuracy"]},
        {"what": "reward before PPO", "value": first["eval/reward/mean"]},
        {"what": "reward after PPO", "value": last["eval/reward/mean"]},
        {"what": "KL, nats per response", "value": last["eval/kl/mean"]},
        {"what": "win rate against SFT on revisions", "value": json.loads(verdict.read_text())["win_rate"]},
    ]
    unsure = sum(line["chosen_reward"] < 0.6 for line in lines)
    rows.append({"what": f"pairs of {len(lines)} whose p is within 0.1 of a half", "value": unsure})
    write_results("constitutional", rows)
    print("\n".join(f"{row['what']}: {row['value']:.3f}" for row in rows))
    curves = (("eval/reward/mean", "held out"), ("reward/mean", "of a step"))
    title = "PPO on AI feedback: reward"
    draw_curves("constitutional", title, [(ppo, metric, label) for metric, label in curves])


if __name__ == "__main__":
    main()

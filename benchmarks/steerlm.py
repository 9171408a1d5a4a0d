"""SteerLM on ratings by people: `make steerlm`. 5,988 dialogues of the package chitchat-dataset (MIT), rated 0 to 10.

Attribute model -> labels -> attribute-conditioned SFT -> the same prompts with upbeat 9 and upbeat 1, whose answers an
independent judge of sentiment compares. Writes benchmarks/results/steerlm.csv.
Needs `pip install --no-deps chitchat-dataset==0.9.0`.
"""

import csv
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

from aligner.data.encoder import Encoder
from aligner.data.tokenizer import load_tokenizer
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from aligner.serving.sentiment import PositiveReview

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "steerlm"
NAMES = ("witty", "upbeat", "interesting")
MESSAGES = 6  # of each dialogue, the last one the assistant's
SYSTEM = {"role": "system", "content": "You are chatting with a stranger."}


def dialogues() -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows): one dialogue in eight, by its hash, is held out."""
    folder = Path(importlib.util.find_spec("chitchat_dataset").submodule_search_locations[0])
    sides: tuple[list[dict], list[dict]] = ([], [])
    for name, dialogue in json.loads((folder / "dataset.json").read_text()).items():
        turns = [" ".join(m["text"].strip() for m in group) for group in dialogue["messages"]][:MESSAGES]
        rated = dialogue.get("ratings") or {}
        if len(turns) == MESSAGES and all(turns) and all(isinstance(rated.get(n), int | float) for n in NAMES):
            roles = ("user", "assistant")
            messages = [SYSTEM, *({"role": roles[i % 2], "content": t} for i, t in enumerate(turns))]
            held_out = hashlib.sha256(name.encode()).digest()[0] % 8 == 0
            sides[held_out].append({"messages": messages, "label": [float(rated[n]) for n in NAMES]})
    return sides


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(output: Path, program: str, *arguments) -> None:
    if output.exists():
        return
    command = [sys.executable, "-W", "ignore", "-m", f"aligner.{program}", *map(str, arguments)]
    print(" ".join(["python", *command[3:]]), flush=True)
    with (RUNS / f"{program}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def steered(folder: Path, rows: list[dict], label: str) -> list[str]:
    """What the model answers to the held-out dialogues' openings when it is asked for these attributes."""
    tokenizer, sampler = load_tokenizer(folder), NativeSampler.from_pretrained(folder)
    encoder = Encoder(tokenizer)
    prompts = [list(encoder.steer(row["messages"][:2], label)[1]) for row in rows]
    sampling = Sampling(max_tokens=32, stop=(tokenizer.eos_token_id,), seed=0)
    found = {r.prompt: tokenizer.decode(r.tokens, skip_special_tokens=True) for r in sampler.stream(prompts, sampling)}
    return [found[i] for i in range(len(prompts))]


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    train, held_out = dialogues()
    print(f"{len(train)} dialogues, {len(held_out)} held out", flush=True)
    rated, held = write(RUNS / "rated.jsonl", train), write(RUNS / "held-out.jsonl", held_out)
    chats = write(RUNS / "chats.jsonl", [{"messages": row["messages"]} for row in train[:640]])
    cut = ["--data.max-tokens", "160", "--data.too-long", "truncate"]
    attributes, labelled, tuned = RUNS / "attributes", RUNS / "labelled.jsonl", RUNS / "tuned"
    trained = ["--loss", "regression", "--layers", "12", "--steps", "40", "--optimizer.warmup-steps", "5"]
    validated = ["--eval-data", held, "--eval-examples", "400"]
    run(attributes / "policy", "reward_model", "--data", rated, *validated, *trained, *cut, "--output", attributes)
    named = ["--names", *NAMES, "--data", chats, "--high", "10"]
    run(labelled, "annotate", "--model", attributes, *named, "--output", labelled)
    run(tuned / "policy", "steerlm", "--data", labelled, *cut, "--batch.examples", "16", "--output", tuned)
    metrics = [json.loads(line) for line in (attributes / "metrics.jsonl").read_text().splitlines()][-1]
    rows = [{"what": f"Spearman, {n}, held out", "value": metrics[f"eval/spearman/{k}"]} for k, n in enumerate(NAMES)]
    judge, openings, scores = PositiveReview(), held_out[:128], {}
    for upbeat in (1, 9):
        answers = steered(tuned / "policy", openings, f"witty:6,upbeat:{upbeat},interesting:7")
        scores[upbeat] = torch.tensor(judge([], answers, []))
        rows.append({"what": f"sentiment, log-odds, upbeat {upbeat}", "value": float(scores[upbeat].mean())})
    gain = scores[9] - scores[1]
    rows.append({"what": "difference", "value": float(gain.mean())})
    rows.append({"what": "its standard error", "value": float(gain.std() / len(gain) ** 0.5)})
    with (ROOT / "benchmarks" / "results" / "steerlm.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print("\n".join(f"{row['what']}: {row['value']:.3f}" for row in rows))


if __name__ == "__main__":
    main()

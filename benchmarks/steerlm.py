"""SteerLM on ratings by people: `make steerlm`. 5,988 dialogues of the package chitchat-dataset (MIT), rated 0 to 10.

Attribute model -> labels, tenths of its values -> attribute-conditioned SFT on answers of the two lowest and the two
highest tenths -> dialogues that nothing was trained on go on with upbeat 1 and upbeat 9, and judges of sentiment
compare the answers: VADER's lexicon (Hutto and Gilbert 2014), made for what people write to each other, and the
classifier of movie reviews. Writes benchmarks/results/steerlm.csv.
Needs `pip install --no-deps chitchat-dataset==0.9.0` and `pip install vaderSentiment==3.3.2`.
"""

import hashlib
import importlib.util
import json
from collections import defaultdict
from pathlib import Path

import torch
from experiment import ROOT, draw_curves, read, run, write, write_results
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from aligner.checkpoint.default_model import default_model
from aligner.data.encoder import Encoder
from aligner.data.tokenizer import load_tokenizer
from aligner.losses.ranking import spearman
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from aligner.serving.sentiment import PositiveReview

RUNS = ROOT / "runs" / "steerlm"
NAMES = ("witty", "upbeat", "interesting")
UNTOUCHED = [5.0, 5.0, 5.0]  # where the sliders stand before anybody rates; half of the ratings
MESSAGES = 4  # of a dialogue, at least
READ = 256  # tokens of a dialogue, its last ones
WINDOW = 4  # messages that SFT sees of a dialogue at once
APART = 7  # messages from the end of one window to that of the one before; odd, so that both speakers answer
WINDOWS = 4  # of a dialogue, at most
EXTREMES = "0189"  # tenths whose answers are learnt
PROMPTS = 300  # dialogues that go on in place of their last message
ANSWERS = 16  # to each
SYSTEM = {"role": "system", "content": "You are chatting with a stranger."}


def dialogues() -> dict[str, list[dict]]:
    """Chats that end with the assistant's message: rated ones, one in eight of them held out, and ones without.

    "untouched" ones are those whose ratings stand where the sliders stood; nothing is trained on them.
    """
    folder = Path(importlib.util.find_spec("chitchat_dataset").submodule_search_locations[0])
    sides: dict[str, list[dict]] = {"rated": [], "held-out": [], "unrated": [], "untouched": []}
    for name, dialogue in json.loads((folder / "dataset.json").read_text()).items():
        turns = [" ".join(m["text"].strip() for m in group) for group in dialogue["messages"]]
        turns = turns[: len(turns) // 2 * 2]
        ratings = [float(dialogue["ratings"][n]) for n in NAMES] if dialogue.get("ratings") else None
        if len(turns) < MESSAGES or not all(turns):
            continue
        said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        row = {"messages": [SYSTEM, *said]}
        if ratings is None or ratings == UNTOUCHED:
            sides["untouched" if ratings else "unrated"].append(row)
        else:
            held_out = hashlib.sha256(name.encode()).digest()[0] % 8 == 0
            sides["held-out" if held_out else "rated"].append(row | {"label": ratings})
    return sides


def windows(row: dict, most: int) -> list[dict]:
    """Chats of WINDOW messages that end APART messages from each other; whoever spoke last is the assistant."""
    said = row["messages"][1:]
    parts = [said[end - WINDOW : end] for end in range(len(said), WINDOW - 1, -APART)][:most]
    roles = [("user", "assistant")[i % 2] for i in range(WINDOW)]
    named = [[m | {"role": role} for m, role in zip(part, roles, strict=True)] for part in parts]
    return [{"messages": [SYSTEM, *part]} for part in named]


def is_extreme(row: dict) -> bool:
    """Whether the last answer is among those that are learnt."""
    return row["conversations"][-1]["label"][-1] in EXTREMES


def upbeat_alone(row: dict) -> dict:
    """The chat with labels of one attribute: all three hang together so much that one label teaches nothing of each."""
    turns = [turn | {"label": turn["label"] and turn["label"].split(",")[1]} for turn in row["conversations"]]
    return row | {"conversations": turns}


def linear_correlations(train: list[dict], held_out: list[dict]) -> list[float]:
    """Spearman's of ridge regression on the words of what the attribute model reads, for comparison."""
    words, tokenizer = TfidfVectorizer(sublinear_tf=True, min_df=3), load_tokenizer(default_model())
    encoder = Encoder(tokenizer)

    def read_part(row: dict) -> str:
        messages = row["messages"]
        return encoder.text(encoder.conversation(messages, [len(messages) - 1]).tokens[-READ:])

    texts = [[read_part(row) for row in rows] for rows in (train, held_out)]
    model = Ridge(alpha=3.0).fit(words.fit_transform(texts[0]), [row["label"] for row in train])
    guesses_BK = torch.tensor(model.predict(words.transform(texts[1])))
    ratings_BK = torch.tensor([row["label"] for row in held_out])
    return [spearman(guesses_BK[:, k], ratings_BK[:, k]) for k in range(len(NAMES))]


def steered(folder: Path, rows: list[dict], label: str) -> list[str]:
    """What the model says in place of the dialogues' last messages when it is asked for these attributes."""
    tokenizer, sampler = load_tokenizer(folder), NativeSampler.from_pretrained(folder)
    encoder = Encoder(tokenizer)
    prompts = [list(encoder.steer(windows(row, 1)[0]["messages"][:-1], label)[1]) for row in rows]
    sampling = Sampling(max_tokens=64, stop=(tokenizer.eos_token_id,), seed=1)
    responses = sampler.stream(prompts, sampling, n=ANSWERS)
    found = {(r.prompt, r.sample): tokenizer.decode(r.tokens, skip_special_tokens=True) for r in responses}
    return [found[key] for key in sorted(found)]


def at_equal_length(answers: dict[int, list[str]], judge) -> tuple[float, float]:
    """How far the judge moves among answers of as many words, and the standard error; a length counts as often as the
    rarer of the two sides has it."""
    scores = [defaultdict(list), defaultdict(list)]
    for side, texts in zip(scores, answers.values(), strict=True):
        for text, score in zip(texts, judge(texts), strict=True):
            side[len(text.split())].append(score)
    total = moved = variance = 0.0
    for words in scores[0].keys() & scores[1].keys():
        low, high = (torch.tensor(side[words]) for side in scores)
        weight = min(len(low), len(high))
        if weight > 1:
            total, moved = total + weight, moved + weight * float(high.mean() - low.mean())
            variance += weight**2 * float(low.var() / len(low) + high.var() / len(high))
    return moved / total, variance**0.5 / total


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    sides = dialogues()
    print(", ".join(f"{len(rows)} {name}" for name, rows in sides.items()), flush=True)
    rated, held_out = (write(RUNS / f"{name}.jsonl", sides[name]) for name in ("rated", "held-out"))
    parts = [part for row in [*sides["rated"], *sides["unrated"]] for part in windows(row, WINDOWS)]
    chats = write(RUNS / "chats.jsonl", parts)
    attributes, annotated, tuned = RUNS / "attributes", RUNS / "annotated.jsonl", RUNS / "tuned"
    trained = ["--loss", "regression", "--layers", "12", "--steps", "100", "--batch.examples", "40"]
    trained += ["--optimizer.warmup-steps", "5", "--eval-every", "50", "--eval-examples", "400"]
    cut = ["--data.too-long", "truncate", "--data.max-tokens"]
    run(attributes, "reward_model", "--data", rated, "--eval-data", held_out, *trained, *cut, READ)
    run(annotated, "annotate", "--model", attributes, "--names", *NAMES, "--tenths", "--data", chats)
    rows = [row for row in map(upbeat_alone, read(annotated)) if is_extreme(row)]
    labelled = write(RUNS / "labelled.jsonl", rows)
    steps = ["--batch.examples", "8", "--steps", "500", "--optimizer.lr", "1e-3", "--optimizer.decay-steps", "500"]
    run(tuned, "steerlm", "--data", labelled, *cut, READ, *steps)
    metrics, linear = read(attributes / "metrics.jsonl")[-1], linear_correlations(sides["rated"], sides["held-out"])
    rows = []
    for k, name in enumerate(NAMES):
        rows.append({"what": f"Spearman, {name}, attribute model", "value": metrics[f"eval/spearman/{k}"]})
        rows.append({"what": f"Spearman, {name}, ridge on words", "value": linear[k]})
    answers = {}
    for upbeat in (1, 9):
        said = RUNS / f"upbeat-{upbeat}.jsonl"
        if not said.exists():
            texts = steered(tuned / "policy", sides["untouched"][:PROMPTS], f"upbeat:{upbeat}")
            write(said, [{"answer": text} for text in texts])
        answers[upbeat] = [row["answer"] for row in read(said)]
        words = sum(len(text.split()) for text in answers[upbeat]) / len(answers[upbeat])
        rows.append({"what": f"words of an answer, upbeat {upbeat}", "value": words})
    vader, reviews = SentimentIntensityAnalyzer(), PositiveReview()
    judges = {
        "VADER, -1 to 1": lambda texts: [vader.polarity_scores(text)["compound"] for text in texts],
        "movie reviews, log-odds": lambda texts: reviews([], texts, []),
    }
    moved = []
    for name, judge in judges.items():
        low, high = (torch.tensor(judge(answers[upbeat])).view(-1, ANSWERS).mean(1) for upbeat in (1, 9))
        error = float((high - low).std() / len(low) ** 0.5)
        rows.append({"what": f"{name}, upbeat 1", "value": float(low.mean())})
        rows.append({"what": f"{name}, upbeat 9", "value": float(high.mean())})
        rows.append({"what": f"{name}, standard error of the difference", "value": error})
        moved.append(float((high - low).mean()) / error)
        alone, its_error = at_equal_length(answers, judge)
        rows.append({"what": f"{name}, difference among answers of as many words", "value": alone})
        rows.append({"what": f"{name}, standard error of that", "value": its_error})
    write_results("steerlm", rows)
    print("\n".join(f"{row['what']}: {row['value']:.3f}" for row in rows))
    title = "Attribute-conditioned SFT: loss of a step, nats per token"
    draw_curves("steerlm", title, [(tuned, "loss", "answers of people, after the label of what they said")])
    if moved[0] < 2:
        raise SystemExit("asking for upbeat 9 in place of 1 did not move the sentiment by two standard errors")


if __name__ == "__main__":
    main()

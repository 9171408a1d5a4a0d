"""A task whose answer is known: responses of one token out of a tiny vocabulary, each with a reward of its own.

Where the reward of a token is log w, Bradley and Terry's preferences are counts: of w_a + w_b comparisons of a with b,
a wins w_a. And the policy that maximises reward - beta KL is proportional to the reference times w^(1 / beta).
"""

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import save_model

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = tuple(f"w{i}" for i in range(17))
VOCABULARY = (*SPECIAL, *WORDS)
PROMPTS = ("w3 w1 w7", "w12 w5")
# Messages one after the other: an answer is the one token of its word, with no end-of-sequence token after it.
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def weight(text: str) -> int:
    """w of a response, 1 ... 3; special tokens have no text."""
    return 1 + int(text[1:]) % 3 if text in WORDS else 1


WEIGHTS_V = torch.tensor([weight(text) for text in VOCABULARY], dtype=torch.float64)
REWARDS_V = WEIGHTS_V.log()


def save_bandit(folder: Path, **changes) -> Path:
    """A random Llama of one layer over that vocabulary."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": True}
    save_model(folder, "llama", **sizes | {"vocab_size": len(VOCABULARY)} | changes)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, **names, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def log_probabilities(folder: Path) -> Tensor:
    """(prompts, vocabulary) float64, nats: of the response's token, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    ids = [torch.tensor([[VOCABULARY.index(word) for word in prompt.split()]]) for prompt in PROMPTS]
    with torch.no_grad():
        return torch.stack([model(i).logits[0, -1].log_softmax(-1) for i in ids])


def optimum(reference_PV: Tensor, beta: float, reward_V: Tensor = REWARDS_V) -> Tensor:
    """log pi*, of the policy that maximises E[reward] - beta KL(policy || reference)."""
    return (reference_PV + reward_V / beta).log_softmax(-1)


def divergence(log_p_PV: Tensor, log_q_PV: Tensor) -> Tensor:
    """KL(p || q) of each prompt, nats."""
    return (log_p_PV.exp() * (log_p_PV - log_q_PV)).sum(-1)


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def chat(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def prompt_rows(copies: int = 1) -> list[dict]:
    return [{"text": prompt} for prompt in PROMPTS for _ in range(copies)]


def matches() -> dict[tuple[int, int], int]:
    """{(winner, loser): how often} of tokens: each against the four after it in a ring, until the wins are whole."""
    size, wins = len(VOCABULARY), {}
    for a in range(size):
        for b in ((a + step) % size for step in range(1, 5)):
            one, other = int(WEIGHTS_V[a]), int(WEIGHTS_V[b])
            wins[a, b], wins[b, a] = one // math.gcd(one, other), other // math.gcd(one, other)
    return wins


def pair_rows(prompts=PROMPTS) -> list[dict]:
    return [
        {"prompt": chat(prompt), "chosen": VOCABULARY[a], "rejected": VOCABULARY[b]}
        for prompt in prompts
        for (a, b), count in matches().items()
        for _ in range(count)
    ]


def response_rows(prompts=PROMPTS) -> list[dict]:
    """w copies of every token: an empirical distribution."""
    return [
        {"prompt": chat(prompt), "completion": text}
        for prompt in prompts
        for text in VOCABULARY
        for _ in range(weight(text))
    ]


EMPIRICAL_V = (WEIGHTS_V / WEIGHTS_V.sum()).log()  # of response_rows

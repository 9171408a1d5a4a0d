"""A tiny chat model in ChatML with one id a word, and what transformers says of it in float64."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.conftest import save_model

SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")
END = 2
ROLES = ("\n", "system", "user", "assistant")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_chat_model(folder: Path, words: tuple[str, ...], *, spoken: tuple[str, ...] = (), end=0.0, **changes) -> Path:
    """A random Llama of one layer over these words; the words of a text stand between blanks.

    spoken: the only ones that it ever says, besides the end of a turn; all by default.
    end: added to the logit of that end, about.
    """
    vocabulary = (*SPECIAL, *ROLES, *dict.fromkeys(words))
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": False}
    save_model(folder, "llama", **sizes | {"vocab_size": len(vocabulary), "initializer_range": 0.3} | changes)
    _lean(folder, {vocabulary.index(word) for word in spoken or words}, end)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    blanks = pre_tokenizers.Split(Regex(" +"), "removed")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), blanks])
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    ).save_pretrained(folder)
    return folder


def _lean(folder: Path, spoken: set[int], end: float) -> None:
    """Nothing writes to the first number of a state, so that the output layer's first column is a bias."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4
        model.model.norm.weight[0] = 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        column = model.lm_head.weight[:, 0].zero_()
        column -= 10
        column[list(spoken)] = 0
        column[END] = end / 4
    model.save_pretrained(folder)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chatml(messages: list[dict], opened: bool = False) -> str:
    """The text of a chat, written out."""
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if opened else "")


class Oracle:
    """transformers' model of a folder, in float64."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder).double().eval()

    @torch.no_grad()
    def logits(self, ids) -> Tensor:
        """(T, V) after each of the tokens."""
        return self.model(torch.tensor([list(ids)])).logits[0]

    def logprobs(self, ids, temperature: float = 1.0) -> Tensor:
        """(T,) nats, of each token after those before it; 0 for the first."""
        p = (self.logits(ids) / temperature).log_softmax(-1)[:-1]
        said = p.gather(1, torch.tensor(list(ids))[1:, None])[:, 0]
        return torch.cat([torch.zeros(1, dtype=torch.float64), said])

    def response(self, prompt, response, temperature: float = 1.0) -> float:
        """Nats, of a whole response."""
        return float(self.logprobs([*prompt, *response], temperature)[len(prompt) :].sum())


@torch.no_grad()
def scores(folder: Path, sequences: list[list[int]]) -> Tensor:
    """(sequences, attributes) float64, by transformers' classifier."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    return torch.cat([model(torch.tensor([list(ids)])).logits for ids in sequences])

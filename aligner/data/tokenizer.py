"""Tokenizers, read from a local Hugging Face folder.

No pad id is used anywhere in this library (SmolLM2's equals its end-of-sequence id): lengths say where a sequence ends.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

# Stands before a text that others precede: most tokenizers write the control character as a token that merges with
# nothing. The others are for those that drop or do not know it.
_MARKS = ("\x02", "|", "/")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; never asks the network.

    Raises ValueError when the folder holds none, or when it does not say which token ends a response.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer (tokenizer.json); copy the tokenizer's files beside the model's."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {str(folder)!r} has no eos_token; set one in tokenizer_config.json.")
    return tokenizer


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what its token ids mean: equal for two tokenizers whose tokens can be exchanged."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class Continuation:
    """A tokenizer in the middle of a text, where sentencepiece ones differ: only a beginning gets a space in front.

    They write "4" as "\u2581" + "4" at the beginning of a text and as "4" after "2 + 2 =", and decode both as "4".
    Here a text is encoded, and tokens are decoded, as if others came before.
    Source: Kudo and Richardson 2018, arXiv:1808.06226 (add_dummy_prefix).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # Byte-level tokenizers write a text anywhere as they do at its beginning: nothing needs to stand before it.
        self._mark = next((mark for mark in _MARKS if self._marks(mark)), "")
        self._before = self._ids(self._mark) if self._mark else ()

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids, without those that the tokenizer puts around a whole text."""
        ids, num = self._ids(self._mark + text), len(self._before)
        return ids[num:] if ids[:num] == self._before else self._ids(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special ones are left out."""
        text = self._tokenizer.decode([*self._before, *tokens], skip_special_tokens=True)
        return text.partition(self._mark)[2] if self._mark else text

    def _marks(self, mark: str) -> bool:
        """Whether a text after this mark has other tokens than one that begins, and both come back as text."""
        before, letter, both = self._ids(mark), self._ids("a"), self._ids(mark + "a")
        rest = both[len(before) :]
        differs = both[: len(before)] == before and rest not in ((), letter)
        return differs and mark + "a" in self._tokenizer.decode(both, skip_special_tokens=True)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes that each token id stands for in the middle of a text; none for special tokens.

    Knows byte-level tokenizers (GPT-2's alphabet: Llama 3, Qwen, SmolLM2) and sentencepiece ones ("\u2581" is a space,
    <0x0A> a byte: Llama 2, Mistral). Raises ValueError for others.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    kinds = {part["type"]: part for part in decoder.get("decoders", [decoder]) if part}
    spaces = kinds.get("Metaspace", {}).get("replacement") or kinds.get("Replace", {}).get("pattern", {}).get("String")
    alphabet = _byte_alphabet()

    def piece_bytes(piece: str) -> bytes:
        if "ByteLevel" in kinds:
            return bytes(alphabet[c] for c in piece)
        if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    if "ByteLevel" not in kinds and spaces != "\u2581":
        raise ValueError(
            f"stop strings need a byte-level or sentencepiece tokenizer; this one decodes by {', '.join(kinds)}."
        )
    added = tokenizer.added_tokens_decoder  # these stand for themselves
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [
        (b"" if added[i].special else added[i].content.encode()) if i in added else piece_bytes(piece)
        for i, piece in enumerate(pieces)
    ]


def _byte_alphabet() -> dict[str, int]:
    """The character that a byte-level vocabulary writes for each byte: itself if printable, else one from 256 on.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.2, and its code.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    chat_template: str | None = None,
    *,
    opened: bool = True,
) -> str:
    """The text a chat model reads for these messages.

    messages: {"role": ..., "content": ...} objects, oldest first.
    chat_template: Jinja text used in place of the tokenizer's own.
    opened: the text goes on up to where the model's own answer begins.
    Raises ValueError when the tokenizer has no chat template, or when it refuses the messages.
    """
    if not (chat_template or tokenizer.chat_template):
        raise ValueError(
            "this model's tokenizer has no chat template; give one with --data.chat-template FILE, "
            'use raw text such as {"text": ...} or take a model tuned for chat.'
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opened, chat_template=chat_template
        )
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja ({error}); repair --data.chat-template.") from None
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages ({error}); change the messages.") from None

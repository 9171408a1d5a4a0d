"""Tokenizers, read from a local Hugging Face folder.

No pad id is used anywhere in this library (SmolLM2's equals its end-of-sequence id): lengths say where a sequence ends.
"""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


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


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The text a chat model reads for these messages, up to where its own answer begins.

    messages: {"role": ..., "content": ...} objects, oldest first.
    Raises ValueError when the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            'this model\'s tokenizer has no chat template; use raw {"text": ...} prompts or a model tuned for chat.'
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

"""Tokenizers as Llama 2's and Mistral's: sentencepiece's pieces, with a space put before a text."""

import json
from typing import Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "[INST] How was the film? [/INST] The film was good. [INST] Why so? [/INST] It was 42 minutes long.\n",
    "2 + 2 = 4\n\n40 + 2 = 42\nThe answer is 42, and the film was long; so was the day.\n",
)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def sentencepiece_tokenizer(scheme: Literal["legacy", "first"]) -> PreTrainedTokenizerFast:
    """legacy: a space before every text and after every special token; first: before a text that begins with none."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "legacy":
        space = normalizers.Replace(" ", "\u2581")
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Pieces begin at spaces, as in sentencepiece; training does not see the line ends, which are bytes then.
    words = [part for text in CORPUS for line in text.split("\n") for part in line.split(" ")]
    core.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False))
    # The trainer makes special tokens of the bytes, which they are not.
    state = json.loads(core.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    core = Tokenizer.from_str(json.dumps(state))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )

"""The bytes of each token, against what the tokenizer decodes."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aligner.data.tokenizer import token_bytes

TEXTS = (
    "def f(x):\n\treturn x  # caf\u00e9, na\u00efve\r\n\n",
    "\u65e5\u672c\u8a9e\u3001\u4f60\u597d \U0001f60d\U0001f642 \u0000 \u00ad \u2581 \U0001f469\u200d\U0001f680",
)


def test_byte_level_tokens_join_to_the_text(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = token_bytes(tokenizer)
    assert len(texts) == len(tokenizer) == 49152
    for text in TEXTS:
        assert b"".join(texts[i] for i in tokenizer(text)["input_ids"]).decode() == text
    for i in range(0, 49152, 7):
        assert texts[i].decode(errors="replace") == tokenizer.decode([i], skip_special_tokens=True)
    assert all(texts[i] == b"" for i in tokenizer.all_special_ids)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"abcdef", "ab", "\u2581ab"]
    merges = [("a", "b"), ("\u2581", "ab")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("  <0x41>", special=False, normalized=False)])
    return tokenizer


def test_sentencepiece_tokens_join_to_the_text():
    tokenizer = sentencepiece_like()
    texts = token_bytes(tokenizer)
    for text in ("ab ab c", "ab\n\u65e5\u672c\U0001f60d de", "a  <0x41>b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids and len(ids) < 4 * len(text)
        assert b"".join(texts[i] for i in ids).decode() == text == tokenizer.decode(ids)
    assert texts[1] == texts[2] == b"" and texts[3] == b"\x00" and texts[258] == b"\xff"
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    assert token_bytes(tokenizer)[-2:] == [b" ab", b"  <0x41>"]


def test_other_tokenizers_are_refused():
    tokenizer = sentencepiece_like()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="this one decodes by WordPiece"):
        token_bytes(tokenizer)

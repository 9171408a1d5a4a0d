"""Chats and texts as tokens: by hand with a tokenizer of words, and against transformers with SmolLM2's."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aligner.data.encoder import Encoder
from aligner.rollout.transcript import Transcript
from tests.data.sentencepieces import CORPUS, sentencepiece_tokenizer
from tests.data.words import TEMPLATE, ids, word_tokenizer

CHAT = [
    {"role": "system", "content": "the critic"},
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "was good"},
    {"role": "user", "content": "was the film"},
    {"role": "assistant", "content": "bad"},
]
WHOLE = ids(
    "<s> system : the critic </s> user : the film </s> assistant : was good </s> "
    "user : was the film </s> assistant : bad </s>"
)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(word_tokenizer())


@pytest.fixture(scope="module")
def smol(smollm2):
    return Encoder(AutoTokenizer.from_pretrained(smollm2))


def learnt(example) -> tuple[int, ...]:
    return tuple(token for token, is_learnt in zip(example.tokens, example.mask, strict=True) if is_learnt)


def test_prompts_and_responses(encoder):
    assert encoder.prompt("the film") == ("the film", ids("<s> the film"))
    text, tokens = encoder.prompt(CHAT[1:2])
    assert (text, tokens) == ("<s> user : the film </s> assistant : ", ids("<s> user : the film </s> assistant :"))
    assert encoder.response("was good") == ids("was good </s>")
    assert encoder.document("the film") == encoder.document("the film </s>") == ids("<s> the film </s>")
    assert encoder.text(ids("the film </s>")) == "the film </s>"


def test_every_learnt_turn_is_learnt_up_to_its_end(encoder):
    example = encoder.conversation(CHAT, [2, 4])
    assert example.tokens == WHOLE
    assert learnt(example) == ids("was good </s> bad </s>")
    assert example.split() == (WHOLE[:-2], ids("bad </s>"))
    first = encoder.conversation(CHAT, [2])
    assert first.tokens == WHOLE[: len(first.tokens)] and learnt(first) == ids("was good </s>")
    last = encoder.conversation(CHAT, [4])
    assert last.tokens == WHOLE and learnt(last) == ids("bad </s>")


def test_turns_of_other_roles_are_learnt_without_their_header(encoder):
    example = encoder.conversation(CHAT, [1, 3])
    assert learnt(example) == ids("the film </s> was the film </s>")
    assert learnt(encoder.conversation(CHAT, [0])) == ids("the critic </s>")


def test_labels_stand_before_the_answer_or_follow_it(encoder):
    steered = encoder.conversation(CHAT[:3], [2], labels={2: "q:4"})
    assert steered.tokens == ids("<s> system : the critic </s> user : the film </s> assistant : q:4 was good </s>")
    assert learnt(steered) == ids("was good </s>")
    text, tokens = encoder.steer(CHAT[:2], "q:4")
    assert steered.split()[0] == tokens and text.endswith("assistant : q:4\n")
    judged = encoder.conversation(CHAT, [2, 4], labels={2: "q:4", 4: "q:1"}, label_learnt=True)
    assert learnt(judged) == ids("q:4 q:1") and judged.tokens[-4:] == ids(": bad </s> q:1")


def test_a_template_of_ones_own(encoder):
    tokenizer = word_tokenizer(template=None)
    with pytest.raises(ValueError, match="no chat template; give one with --data.chat-template FILE"):
        Encoder(tokenizer).prompt(CHAT[:2])
    assert Encoder(tokenizer, TEMPLATE).prompt(CHAT[:2]) == encoder.prompt(CHAT[:2])
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # The number of messages stands in front, so every prefix is rewritten.
        ("{{ messages | length }} " + TEMPLATE, "rewrites earlier text as messages are added"),
        (TEMPLATE.replace("{{ m.content }}", "{{ m.content | upper }}"), "does not write the content of message 2"),
        ("{{ raise_exception('no roles') }}", r"refuses these messages \(no roles\)"),
        ("{% for", "not valid Jinja"),
    ],
)
def test_templates_that_cannot_be_learnt_from(template, message):
    with pytest.raises(ValueError, match=message):
        Encoder(word_tokenizer(), template).conversation(CHAT, [1, 2, 4])


def test_conversations_without_anything_to_learn(encoder):
    with pytest.raises(ValueError, match="no turn of the conversation is learnt"):
        encoder.conversation(CHAT, [])
    with pytest.raises(ValueError, match="begins with the assistant"):
        encoder.conversation(CHAT[2:], [0])


def test_without_an_end_token_the_whole_turn_is_learnt():
    encoder = Encoder(word_tokenizer(), TEMPLATE.replace(" </s>", ""))
    assert learnt(encoder.conversation(CHAT, [2, 4])) == ids("was good bad")


@pytest.mark.parametrize("space", ["", "  "])  # the tokenizer merges a line end with the space after it
def test_smollm2_learns_what_transformers_renders(smol, space):
    tokenizer = smol.tokenizer
    chat = [
        {"role": "user", "content": "Name a colour, caf\u00e9 owner.\n"},
        {"role": "assistant", "content": f"{space}Blue \U0001f499."},
        {"role": "user", "content": "Another"},
        {"role": "assistant", "content": "Red\n\nand green"},
    ]
    example = smol.conversation(chat, [1, 3])
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(example.tokens) + "\n" == text
    # The learnt characters, found in the text that transformers renders.
    answers = [chat[i]["content"] + "<|im_end|>" for i in (1, 3)]
    assert tokenizer.decode(learnt(example)) == "".join(answers)
    place = text.index(answers[0])
    assert example.tokens[: example.mask.index(True)] == tuple(tokenizer(text[:place])["input_ids"])
    prompt = tokenizer.apply_chat_template(chat[:3], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(example.split()[0]) == prompt == smol.prompt(chat[:3])[0]
    if space:
        return
    # Where no merge spans a border, the pieces are also the tokens of the whole, and offsets find the same mask.
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(text.index(answer), text.index(answer) + len(answer)) for answer in answers]
    mask = [any(b <= begin and end <= e for b, e in spans) for begin, end in whole["offset_mapping"]]
    assert example.tokens == tuple(whole["input_ids"][: example.length])
    assert list(example.mask) == mask[: example.length]
    assert smol.prompt(chat[:3])[1] == example.split()[0]


@pytest.fixture(params=["legacy", "first"])
def pieces(request):
    return Encoder(sentencepiece_tokenizer(request.param))


@pytest.mark.parametrize("response", [" 42", "42", "\n\n42", " The film.\n", "\u00e9t\u00e9", "  4", ";"])
def test_sentencepiece_responses_go_on_as_the_whole_text_does(pieces, response):
    tokenizer = pieces.tokenizer
    prompt = "The answer is"
    whole = tuple(tokenizer(prompt + response)["input_ids"])
    tokens = pieces.response(response)
    assert pieces.prompt(prompt)[1] + tokens == (*whole, pieces.eos)
    transcript = Transcript(tokenizer)
    assert transcript.decode(tokens) == response
    assert transcript.decode([]) == ""


def test_sentencepiece_chats_have_the_tokens_of_the_whole_text(pieces):
    tokenizer = pieces.tokenizer
    chat = [
        {"role": "user", "content": "How was the film?"},
        {"role": "assistant", "content": "The film was good"},
        {"role": "user", "content": "Why so?"},
        {"role": "assistant", "content": "It was 42 minutes long."},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    example = pieces.conversation(chat, [1, 3])
    assert example.tokens == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert example.split()[0] == pieces.prompt(chat[:3])[1]
    answers = [" The film was good</s>", " It was 42 minutes long.</s>"]
    assert Transcript(tokenizer).decode(learnt(example)) == "".join(answers).replace("</s>", "")
    # What an environment's message adds, and a label, stand in the middle of a text too.
    first = pieces.conversation(chat[:2], [1]).tokens
    added = pieces.follow(chat[:1], [" The film was good"], "Why so?")
    assert first + added == pieces.prompt(chat[:3])[1]
    text, tokens = pieces.steer(chat[:1], "good:4")
    assert tokens == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_chat_that_begins_with_what_is_learnt_begins_as_a_text(pieces):
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    example = Encoder(pieces.tokenizer, template).conversation([{"role": "user", "content": "The film"}], [0])
    assert example.tokens == tuple(pieces.tokenizer("The film</s>", add_special_tokens=False)["input_ids"])


def byte_level_with_a_space_in_front() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def pieces_without_bytes(kind: str) -> PreTrainedTokenizerFast:
    """Sentencepiece's, to which a control character is unknown."""
    unigram = kind == "unigram"
    core = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=unigram)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    shared = {"special_tokens": ["<unk>", "</s>"], "vocab_size": 200, "show_progress": False}
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **shared) if unigram else trainers.BpeTrainer(**shared)
    core.train_from_iterator([*CORPUS, *"|/ | / a|a a/a"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "bpe", "unigram"])
@pytest.mark.parametrize("response", ["42", " 42", "The film", " was good", "40 + 2"])
def test_other_tokenizers_that_begin_a_text_with_a_space(kind: str, response: str):
    tokenizer = byte_level_with_a_space_in_front() if kind == "byte-level" else pieces_without_bytes(kind)
    tokens = Encoder(tokenizer).response(response)
    assert Transcript(tokenizer).decode(tokens) == response
    spaces = [piece for piece in tokenizer.convert_ids_to_tokens(tokens) if piece[0] in "\u0120\u2581"]
    assert len(spaces) <= response.count(" ")


def test_a_tokenizer_without_any_mark_is_left_as_it_is():
    encoder = Encoder(word_tokenizer())
    assert encoder.response("the film") == ids("the film </s>")
    assert Transcript(encoder.tokenizer).decode(ids("was good")) == encoder.tokenizer.decode(ids("was good"))

"""NeMo-Aligner's own formats: chats with labels, pairs on two lines, weighted responses, a teacher's logits."""

from aligner.data import fields
from aligner.data.encoder import Encoder
from aligner.data.examples import Example, Pair, Taught, Weighted

TYPES = ("VALUE_TO_TEXT", "TEXT_TO_VALUE", None)


def read_turns(rows: list[dict], encoder: Encoder) -> Example:
    """{"system", "conversations": [{"from", "value", "label"}], "mask": roles not learnt, "type"}."""
    (row,) = rows
    kind = fields.one_of(row, "type", TYPES) if "type" in row else None
    messages, labels = fields.turns(row, "conversations")
    learnt = [i for i, message in enumerate(messages) if _is_learnt(row, message["role"])]
    if kind == "TEXT_TO_VALUE":
        learnt = [i for i in learnt if i in labels]
        if not learnt:
            raise ValueError('"type" is "TEXT_TO_VALUE", but no turn that is learnt has a "label"; add one.')
    return _conversation(row, messages, learnt, labels if kind else {}, encoder, label_learnt=kind == "TEXT_TO_VALUE")


def read_weighted(rows: list[dict], encoder: Encoder) -> Weighted:
    """{"system", "prompt_turns", "label", "responses": [{"from", "value", and three log-probabilities}]}."""
    (row,) = rows
    prompt, _ = fields.turns(row, "prompt_turns")
    if prompt[-1]["role"] == "assistant":
        raise ValueError('the last of "prompt_turns" is the assistant\'s; expected the turn that is answered.')
    answers, _ = fields.turns(row, "responses")
    label = {len(prompt): fields.text(row, "label")} if "label" in row and row["label"] is not None else {}
    columns = []
    for key in ("log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))"):
        for i, response in enumerate(row["responses"], start=1):
            if key not in response:
                raise ValueError(f'response {i} has no "{key}"; expected a log-probability in nats.')
        columns.append(tuple(fields.number(response, key) for response in row["responses"]))
    if any(answer["role"] != "assistant" for answer in answers):
        raise ValueError('"from" of every response must be "Assistant".')
    responses = tuple(_conversation(row, [*prompt, answer], [len(prompt)], label, encoder) for answer in answers)
    return Weighted(responses=responses, log_p_attributes=columns[0], log_p=columns[1], log_q=columns[2])


def read_text_pair(rows: list[dict], encoder: Encoder) -> Pair:
    """Two lines {"text"}: the chosen one, then the rejected one."""
    chosen, rejected = (_last_only(row, encoder) for row in rows)
    return _text_pair(chosen, rejected, 0.0)


def read_labelled_pair(rows: list[dict], encoder: Encoder) -> Pair:
    """Two lines {"text", "label"} with one label; label[0] < 0 says that the first is preferred, by |label[0]|."""
    labels = [fields.numbers(row, "label") for row in rows]
    if labels[0] != labels[1]:
        raise ValueError(
            f"the two lines of a pair have the labels {list(labels[0])} and {list(labels[1])}, expected the same one."
        )
    preference = labels[0][0]
    if preference == -100:
        raise ValueError("the preference label[0] is -100, which stands for a missing one; remove the pair.")
    first, second = (_last_only(row, encoder) for row in rows)
    return _text_pair(*((first, second) if preference < 0 else (second, first)), abs(preference))


def read_taught(rows: list[dict], encoder: Encoder) -> Taught:
    """{"tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits"}.

    NeMo's entry t is about labels[t], the token after tokens[t]; here entry t is about token t, so all move by one.
    What follows the last learnt token is left out.
    """
    (row,) = rows
    per_token = [key for key in ("log_sum_exp_logits",) if key in row]
    size = fields.same_length(row, "tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", *per_token)
    vocabulary = len(encoder.tokenizer)
    tokens = fields.ids(row["tokens"], "tokens", vocabulary)
    mask = [bool(value) for value in fields.numbers({"loss_mask": [*map(float, _flags(row))]}, "loss_mask")]
    if not any(mask):
        raise ValueError('"loss_mask" is 0 everywhere; expected at least one token that is learnt.')
    size = size - mask[::-1].index(True)
    labels = row["labels"][:size]
    # The last label may be a token that "tokens" does not hold.
    tokens = tokens[:size] + fields.ids([labels[-1]], "labels", vocabulary)
    for t in range(size):
        if mask[t] and labels[t] != tokens[t + 1]:
            raise ValueError(f'"labels" must be "tokens" moved by one, but labels[{t}] is not tokens[{t + 1}].')
    topk_ids, topk_logits = _topk(row, size)
    log_sum = (0.0, *fields.numbers(row, "log_sum_exp_logits")[:size]) if per_token else None
    return Taught(
        tokens=tokens, mask=(False, *mask[:size]), topk_ids=topk_ids, topk_logits=topk_logits, log_sum=log_sum
    )


def _flags(row: dict) -> list:
    if not all(isinstance(value, bool | int | float) and value in (0, 1) for value in row["loss_mask"]):
        raise ValueError('"loss_mask" must be a list of 0 and 1.')
    return row["loss_mask"]


def _topk(row: dict, size: int) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[float, ...], ...]]:
    """The teacher's ids and logits, with an entry of zeros for the first token, which nothing predicts."""
    all_ids = [fields.ids(ids, "topk_token_ids", 1 << 31) for ids in row["topk_token_ids"][:size]]
    logits = [fields.numbers({"topk_logits": values}, "topk_logits") for values in row["topk_logits"][:size]]
    k = len(logits[0])
    if any(len(ids) != k or len(values) != k for ids, values in zip(all_ids, logits, strict=True)):
        raise ValueError(f'"topk_logits" and "topk_token_ids" must hold equally many at each place, here {k}.')
    return ((0,) * k, *all_ids), ((0.0,) * k, *logits)


def _is_learnt(row: dict, role: str) -> bool:
    """Whether turns of a role are learnt: those that "mask" does not name; without it the assistant's."""
    if "mask" not in row or row["mask"] is None:
        return role == "assistant"
    names = row["mask"] if isinstance(row["mask"], list) else [row["mask"]]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f'"mask" is {row["mask"]!r}, expected the name of a role or a list of names.')
    return role not in (name.lower() for name in names)


def _conversation(row: dict, messages, learnt, labels, encoder: Encoder, *, label_learnt: bool = False) -> Example:
    """A chat behind the row's system message, which is left to the template where the row has none or an empty one."""
    system = row["system"] if "system" in row and row["system"] is not None else ""
    if not isinstance(system, str):
        raise ValueError(f'"system" is {system!r}, expected a string.')
    before = [{"role": "system", "content": fields.text(row, "system")}] if system.strip() else []
    labels, learnt = {i + len(before): label for i, label in labels.items()}, [i + len(before) for i in learnt]
    return encoder.conversation(before + messages, learnt, labels=labels, label_learnt=label_learnt)


def _last_only(row: dict, encoder: Encoder) -> Example:
    """A text of which only the end is read, because nobody says where its response begins."""
    tokens = encoder.document(fields.text(row, "text"))
    return Example(tokens=tokens, mask=(False,) * (len(tokens) - 1) + (True,))


def _text_pair(chosen: Example, rejected: Example, margin: float) -> Pair:
    if chosen.tokens == rejected.tokens:
        raise ValueError("the two texts of a pair are the same; a pair needs two different ones.")
    return Pair(chosen=chosen, rejected=rejected, margin=margin)

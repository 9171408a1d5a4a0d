"""Fields of a row, with their types checked.

Errors are ValueErrors that do not name the line: whoever reads the file puts it in front.
"""

import sys

Messages = list[dict[str, str]]

MESSAGE = '{"role": string, "content": string}'
TURN = '{"from": string, "value": string}'


def text(row: dict, key: str, *, what: str = "a string that is not empty") -> str:
    """A string that holds more than white space."""
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" is {_short(value)}, expected {what}.')
    return _encodable(value, key)


def text_or_messages(row: dict, key: str) -> str | Messages:
    """A string or a chat."""
    if isinstance(row[key], list):
        return messages(row, key)
    return text(row, key, what="a string that is not empty, or a list of messages")


def messages(row: dict, key: str) -> Messages:
    """A chat: {"role": ..., "content": ...} objects, no answer of the assistant empty."""
    value = row[key]
    if not _objects(value, "role", "content"):
        raise ValueError(f'"{key}" must be a list of {MESSAGE} objects.')
    return _checked_chat(value, key)


def turns(row: dict, key: str) -> tuple[Messages, dict[int, str]]:
    """(messages, label of each turn that has one) of {"from": ..., "value": ..., "label": ...} objects."""
    value = row[key]
    if not _objects(value, "from", "value"):
        raise ValueError(f'"{key}" must be a list of {TURN} objects.')
    chat = [{"role": turn["from"].lower(), "content": turn["value"]} for turn in value]
    labels = {i: turn["label"] for i, turn in enumerate(value) if "label" in turn and turn["label"] is not None}
    for i, label in labels.items():
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f'the label of turn {i + 1} of "{key}" is {_short(label)}, expected a string or null.')
        _encodable(label, key)
    return _checked_chat(chat, key), labels


def number(row: dict, key: str) -> float:
    """A finite number."""
    if not _is_number(row[key]):
        raise ValueError(f'"{key}" is {_short(row[key])}, expected a finite number.')
    return float(row[key])


def numbers(row: dict, key: str) -> tuple[float, ...]:
    """Finite numbers, one or more."""
    value = row[key]
    if not isinstance(value, list) or not value or not all(map(_is_number, value)):
        raise ValueError(f'"{key}" is {_short(value)}, expected a list of finite numbers that is not empty.')
    return tuple(map(float, value))


def one_of(row: dict, key: str, values: tuple):
    """One of the given values."""
    if not any(row[key] is value or (isinstance(value, str) and row[key] == value) for value in values):
        names = " or ".join(str(value).lower() if isinstance(value, bool) else f'"{value}"' for value in values)
        raise ValueError(f'"{key}" is {_short(row[key])}, expected {names}.')
    return row[key]


def ids(value, key: str, vocabulary: int) -> tuple[int, ...]:
    """Token ids below `vocabulary`."""
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < vocabulary for i in value):
        raise ValueError(f'"{key}" must be a list of token ids from 0 to {vocabulary - 1}, of the model\'s tokenizer.')
    return tuple(value)


def same_length(row: dict, *keys: str) -> int:
    """How many items each of these lists has."""
    sizes = {key: len(row[key]) if isinstance(row[key], list) else None for key in keys}
    size = sizes[keys[0]]
    for key in keys:
        if not sizes[key] or sizes[key] != size:
            raise ValueError(f'"{key}" must be a list as long as "{keys[0]}", with at least one item.')
    return size


def _checked_chat(chat: Messages, key: str) -> Messages:
    if not any(message["content"].strip() for message in chat):
        raise ValueError(f'"{key}" has no content; expected at least one message that is not empty.')
    for i, message in enumerate(chat, start=1):
        _encodable(message["content"], key)
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f'message {i} of "{key}" is an empty answer of the assistant; remove it or the line.')
    return chat


def _objects(value, *keys: str) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(item, dict) for item in value)
        and all(key in item and isinstance(item[key], str) for item in value for key in keys)
    )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _encodable(value: str, key: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'"{key}" holds half of a surrogate pair ({value[error.start]!r}), which no text may; write the character.'
        ) from None
    return value


def _short(value) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."

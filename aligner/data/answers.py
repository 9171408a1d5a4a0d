"""Prompts with their answers: what the formats of one or of two responses share."""

from aligner.data import fields
from aligner.data.encoder import Encoder
from aligner.data.examples import Example, Pair

Messages = list[dict[str, str]]


def by_assistant(messages: Messages, first: int = 0) -> list[int]:
    """Indices of the assistant's messages from `first` on."""
    return [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]


def answered(row: dict, prompt_key: str, response_key: str, encoder: Encoder, finished: str = "") -> Example:
    """A prompt with its response: both text, or a chat with the answer as text or as messages.

    finished: key that may say false: the response was cut off, and its end is not one to learn.
    """
    example = _answered(row, prompt_key, response_key, encoder)
    cut = finished in row and not fields.one_of(row, finished, (True, False))
    if cut and example.tokens[-1] == encoder.eos and sum(example.mask) > 1:
        return Example(tokens=example.tokens[:-1], mask=example.mask[:-1])
    return example


def _answered(row: dict, prompt_key: str, response_key: str, encoder: Encoder) -> Example:
    prompt, response = fields.text_or_messages(row, prompt_key), fields.text_or_messages(row, response_key)
    if isinstance(prompt, str):
        if not isinstance(response, str):
            raise ValueError(
                f'"{prompt_key}" is text and "{response_key}" a list of messages; write both as messages or as text.'
            )
        return Example.of(encoder.prompt(prompt)[1], encoder.response(response))
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    if response[0]["role"] != "assistant":
        raise ValueError(
            f'"{response_key}" begins with a message of the {response[0]["role"]}, expected the assistant\'s answer '
            f'to "{prompt_key}"; leave the prompt out of it.'
        )
    return encoder.conversation(prompt + response, by_assistant(prompt + response, first=len(prompt)))


def implicit_pair(row: dict, chosen_key: str, rejected_key: str, encoder: Encoder, prompt: str | None = None) -> Pair:
    """Two conversations; the messages that they begin with alike are the prompt.

    prompt: text that one of those messages must hold, where the row has it.
    """
    chosen, rejected = fields.messages(row, chosen_key), fields.messages(row, rejected_key)
    if chosen == rejected:
        raise ValueError(f'"{chosen_key}" and "{rejected_key}" are the same; a pair needs two different responses.')
    num = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if not num or {chosen[num]["role"], rejected[num]["role"]} != {"assistant"}:
        raise ValueError(
            f'"{chosen_key}" and "{rejected_key}" must begin with the same messages and part at an answer of the '
            "assistant; what they share is the prompt."
        )
    if prompt is not None and all(message["content"].strip() != prompt.strip() for message in chosen[:num]):
        raise ValueError(f'"prompt" is none of the messages that "{chosen_key}" and "{rejected_key}" begin with.')
    return pair(row, *(encoder.conversation(chat, by_assistant(chat, first=num)) for chat in (chosen, rejected)))


def pair(row: dict, chosen: Example, rejected: Example) -> Pair:
    """Two responses with the rewards of the row, if it has them."""
    if chosen.tokens == rejected.tokens:
        raise ValueError("the chosen and the rejected response are the same; a pair needs two different ones.")
    given = {key: fields.number(row, key) for key in ("chosen_reward", "rejected_reward") if key in row}
    margin = given["chosen_reward"] - given["rejected_reward"] if len(given) == 2 else 0.0
    return Pair(chosen=chosen, rejected=rejected, margin=margin, **given)

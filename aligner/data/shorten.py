"""Examples cut to a number of tokens: prompts lose their beginning, and only then responses their end."""

from dataclasses import replace

from aligner.data.encoder import Encoder
from aligner.data.examples import Example, Judged, Pair, Prompt, Rated, Taught, Weighted


def shorten(example, limit: int, encoder: Encoder):
    """The example with at most `limit` tokens (two or more), or None when nothing to learn would be left.

    A prompt gives way from the left down to one token, then the response from the right. Rated, Weighted and Taught
    examples lose tokens from the left alone: their marks belong to the whole end.
    """
    match example:
        case Prompt():
            tokens = example.tokens[-limit:]
            return replace(example, tokens=tokens, text=encoder.text(tokens))
        case Example():
            return _cut(example, limit, len(example.split()[1]))
        case Pair():
            return _shorten_pair(example, limit)
        case Judged():
            room = max(1, limit - len(example.response))
            return replace(example, prompt=example.prompt[-room:], response=example.response[: limit - 1])
        case Rated():
            return replace(example, tokens=example.tokens[-limit:])
        case Weighted():
            responses = tuple(_end(response, limit) for response in example.responses)
            return replace(example, responses=responses) if all(any(r.mask) for r in responses) else None
        case Taught():
            log_sum = example.log_sum and example.log_sum[-limit:]
            topk = {"topk_ids": example.topk_ids[-limit:], "topk_logits": example.topk_logits[-limit:]}
            short = replace(_end(example, limit), log_sum=log_sum, **topk)
            return short if any(short.mask) else None
    raise AssertionError(f"{type(example).__name__} is no example.")


def _shorten_pair(pair: Pair, limit: int) -> Pair | None:
    longest = max(len(example.split()[1]) for example in (pair.chosen, pair.rejected))
    chosen, rejected = (_cut(example, limit, longest) for example in (pair.chosen, pair.rejected))
    return None if chosen.tokens == rejected.tokens else replace(pair, chosen=chosen, rejected=rejected)


def _cut(example: Example, limit: int, longest: int) -> Example:
    """The example with its prompt cut as if its response had `longest` tokens: both of a pair keep one prompt."""
    prompt, response = example.split()
    begin = len(prompt) - min(len(prompt), max(1, limit - longest))
    end = min(len(prompt) + len(response), begin + limit)
    return replace(example, tokens=example.tokens[begin:end], mask=(False, *example.mask[begin + 1 : end]))


def _end(example, limit: int):
    """The last tokens of a sequence; nothing predicts the first one that is kept."""
    tokens, mask = example.tokens[-limit:], example.mask[-limit:]
    return replace(example, tokens=tokens, mask=(False, *mask[1:]))

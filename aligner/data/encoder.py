"""From text and chats to tokens: the one place that knows where a response begins and ends.

A sequence is tokenized in pieces, cut where a response begins and ends. A prompt's tokens are then exactly those that
the sampler is given, whatever the response, and no merge of the tokenizer spans the border. A piece is written as it
stands in the middle of a text: a tokenizer that begins texts with a space puts none before it.
"""

from collections.abc import Collection, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from aligner.data.examples import Example, Tokens
from aligner.data.tokenizer import Continuation, render_chat

Messages = list[dict[str, str]]


class Encoder:
    """A tokenizer with its chat template.

    tokenizer: of transformers, with an eos_token.
    chat_template: Jinja text used in place of the tokenizer's own; None for that one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None):
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.eos = tokenizer.eos_token_id
        self._middle = Continuation(tokenizer)

    def prompt(self, prompt: str | Messages) -> tuple[str, Tokens]:
        """(text, tokens) of raw text, or of a chat up to where the assistant's answer begins."""
        if isinstance(prompt, str):
            return prompt, tuple(self.tokenizer(prompt)["input_ids"])
        text = self._render(prompt, opened=True)
        return text, self._beginning(text)

    def steer(self, messages: Messages, label: str) -> tuple[str, Tokens]:
        """`prompt` of a chat whose answer is to have these attributes: the label stands where the answer would begin.

        label: the attributes, such as "quality:4,toxicity:0"; a line end is written after it.
        """
        text, tokens = self.prompt(messages)
        return f"{text}{label}\n", tokens + self._middle.encode(f"{label}\n")

    def follow(self, prompt: str | Messages, turns: Sequence[str], message: str, *, closed: bool = True) -> Tokens:
        """Tokens of what comes after an answer that has ended: the rest of its turn, `message`, the next opening.

        prompt: raw text, which the message simply follows, or a chat.
        turns: what was said after it, the assistant's answers and the user's messages by turns, an answer last.
        closed: that answer has its end-of-sequence token; else, where a stop string ended it, the rest begins with one.
        """
        if isinstance(prompt, str):
            return self._middle.encode(message)
        roles = ("assistant", "user")
        chat = [*prompt, *({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))]
        before = self._render(chat, opened=False)
        after = self._render([*chat, {"role": "user", "content": message}], opened=True)
        _, end, rest = before.rpartition(self.tokenizer.eos_token)
        rest = rest if end else ""  # a template without ends
        return self._middle.encode((rest if closed else end + rest) + self._added(before, after))

    def response(self, text: str) -> Tokens:
        """Tokens of an answer to a prompt of raw text, with the end-of-sequence token after them."""
        return (*self._middle.encode(text), self.eos)

    def document(self, text: str) -> Tokens:
        """Tokens of a whole text, with the end-of-sequence token after them unless the text ends in it."""
        tokens = self.prompt(text)[1]
        return tokens if tokens[-1:] == (self.eos,) else (*tokens, self.eos)

    def text(self, tokens: Tokens) -> str:
        """The text of tokens, special ones included."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def conversation(
        self,
        messages: Messages,
        learnt: Collection[int],
        *,
        labels: Mapping[int, str] | None = None,
        label_learnt: bool = False,
    ) -> Example:
        """A chat as one sequence, which ends with its last learnt token.

        A learnt turn is learnt up to its last end-of-sequence token, that one included; what the template writes after
        it is context. The template must add to the text as messages are added and change nothing before.

        messages: {"role": ..., "content": ...} objects, oldest first.
        learnt: indices of the turns that are learnt.
        labels: text of a turn's attributes, by index. It stands before the turn's content as in `steer`, as context.
        label_learnt: the label follows the turn instead; it is learnt where the turn would be, and the turn is context.
        Raises ValueError when no turn is learnt or the template rewrites what it wrote before.
        """
        labels = labels or {}
        pieces, written = [], ""
        for i in sorted({*learnt, *labels}):
            opening = self._opening(messages, i)
            through = self._render(messages[: i + 1], opened=False)
            pieces.append((self._added(written, opening), False))
            turn = self._added(opening, through)
            label = [(f"{labels[i]}\n", label_learnt and i in learnt)] if i in labels else []
            turn = [(turn, i in learnt and not label_learnt)]
            pieces += turn + label if label_learnt else label + turn
            written = through
        tokens, mask = [], []
        for text, is_learnt in pieces:
            ids = self._middle.encode(text) if tokens else self._beginning(text)
            num = self._learnt(ids) if is_learnt else 0
            tokens += ids
            mask += [True] * num + [False] * (len(ids) - num)
        if True not in mask:
            raise ValueError("no turn of the conversation is learnt; expected at least one answer of the assistant.")
        end = len(mask) - mask[::-1].index(True)
        return Example(tokens=tuple(tokens[:end]), mask=tuple(mask[:end]))

    def _learnt(self, ids: Tokens) -> int:
        """How many tokens of a learnt piece are learnt: up to its last end, all when it has none."""
        return len(ids) - ids[::-1].index(self.eos) if self.eos in ids else len(ids)

    def _opening(self, messages: Messages, i: int) -> str:
        """The text before the content of turn i."""
        if messages[i]["role"] == "assistant":
            if i == 0:
                raise ValueError("the conversation begins with the assistant; put a user's or a system message first.")
            return self._render(messages[:i], opened=True)
        # Templates announce the assistant only; another role's header ends where its content begins.
        before = self._render(messages[:i], opened=False) if i else ""
        through, content = self._render(messages[: i + 1], opened=False), messages[i]["content"].strip()
        place = through.rfind(content)
        if place < len(before):
            raise ValueError(f"the chat template does not write the content of message {i + 1} as it is.")
        return through[:place]

    def _added(self, before: str, after: str) -> str:
        if not after.startswith(before):
            raise ValueError(
                f"the chat template rewrites earlier text as messages are added ({before[-40:]!r} became "
                f"{after[: len(before)][-40:]!r}); give one that only appends with --data.chat-template FILE."
            )
        return after[len(before) :]

    def _render(self, messages: Messages, *, opened: bool) -> str:
        return render_chat(self.tokenizer, messages, self.chat_template, opened=opened)

    def _beginning(self, text: str) -> Tokens:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

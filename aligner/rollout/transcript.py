"""Rollouts as text: what the reward function reads and samples.jsonl keeps."""

from torch import Tensor

from aligner.data.tokenizer import Continuation

Texts = tuple[list[str], list[str], list[dict]]  # prompts, responses, metadata; one entry a sequence


class Transcript:
    """tokenizer: a transformers tokenizer. `stop` holds the ids that end a response."""

    def __init__(self, tokenizer):
        self.tokenizer, self._middle = tokenizer, Continuation(tokenizer)
        self.stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def decode(self, tokens: list[int]) -> str:
        """A response's text; special tokens are left out."""
        return self._middle.decode(tokens)

    @staticmethod
    def rows(step: int, split: str, texts: Texts, rewards_B: Tensor) -> list[dict]:
        """Rows for samples.jsonl."""
        return [
            {"step": step, "split": split, "prompt": prompt, "response": response, "reward": reward}
            for prompt, response, reward in zip(texts[0], texts[1], rewards_B.tolist(), strict=True)
        ]

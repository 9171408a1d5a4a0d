"""Rollouts as text: what the reward function reads and samples.jsonl keeps."""

from torch import Tensor

from aligner.data.batch import Rollout, response_tokens
from aligner.data.prompts import Prompt

Texts = tuple[list[str], list[str], list[dict]]


class Transcript:
    """tokenizer: a transformers tokenizer. `stop` holds the ids that end a response."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def texts(self, prompts: list[Prompt], rollout: Rollout) -> Texts:
        """(prompts, responses, metadata), one entry a sequence; special tokens are left out of responses."""
        responses = [self.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in response_tokens(rollout)]
        each = [prompt for prompt in prompts for _ in range(len(responses) // len(prompts))]
        return [p.text for p in each], responses, [p.metadata for p in each]

    @staticmethod
    def rows(step: int, split: str, texts: Texts, rewards_B: Tensor) -> list[dict]:
        """Rows for samples.jsonl."""
        return [
            {"step": step, "split": split, "prompt": prompt, "response": response, "reward": reward}
            for prompt, response, reward in zip(texts[0], texts[1], rewards_B.tolist(), strict=True)
        ]

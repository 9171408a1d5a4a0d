"""How a response is drawn."""

from tensorrt_llm.contract import Strict

DRAWN = {"temperature", "top_k", "top_p", "seed", "logprobs", "logprobs_mode", "max_tokens", "stop_token_ids", "end_id"}
OF_TEXT = {"detokenize", "include_stop_str_in_output"}  # without a meaning where there is no text


class SamplingParams(Strict):
    def __init__(self, **given):
        super().__init__(**{"logprobs_mode": "raw"} | given)
        known = DRAWN | OF_TEXT
        odd = sorted(n for n, default in self.model_fields.items() if n not in known and getattr(self, n) != default)
        if odd or self.logprobs not in (None, 0) or self.logprobs_mode not in ("raw", "processed"):
            raise ValueError(f"SamplingParams: this stand-in knows no {', '.join(odd) or 'such log-probabilities'}.")
        if self.end_id != -1:
            raise ValueError(f"SamplingParams: end_id is {self.end_id}; this stand-in ends by stop_token_ids alone.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1 or self.temperature is self.top_k is self.top_p is None

"""Sample from a tuned policy: `python -m aligner.generate --checkpoint RUN --prompt "..."`."""

from dataclasses import dataclass

from aligner.checkpoint.model_folder import model_folder
from aligner.data.encoder import Encoder
from aligner.data.tokenizer import Continuation, load_tokenizer
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint: str
    """A run folder, a Hugging Face model directory, or the default model's name."""
    prompt: str
    """Text to continue; with --chat, what the user says."""
    chat: bool = False
    """Put the prompt through the model's chat template."""
    attributes: str = ""
    """Label that the response is to follow, with --chat and a model of aligner.steerlm: "quality:9,humour:0"."""
    n: int = 1
    """Responses."""
    temperature: float = 1.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    """Nucleus; 1 keeps all tokens."""
    top_k: int = 0
    """Most likely tokens kept; 0 keeps all."""
    max_tokens: int = 64
    """Length limit, tokens."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response; the response keeps them."""
    seed: int = 0
    """Of the random streams."""
    threads: int = 0
    """CPU threads; 0 takes torch's choice, one a core."""

    def __post_init__(self):
        if self.attributes and not self.chat:
            raise ValueError("--attributes stand in a chat; add --chat.")


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    folder = model_folder(config.checkpoint)
    tokenizer = load_tokenizer(folder)
    encoder, chat = Encoder(tokenizer), [{"role": "user", "content": config.prompt}]
    if config.attributes:
        text, tokens = encoder.steer(chat, config.attributes)
    else:
        text, tokens = encoder.prompt(chat if config.chat else config.prompt)
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_tokens,
        stop=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
        stop_strings=config.stop_strings,
        seed=config.seed,
    )
    middle, sampler = Continuation(tokenizer), NativeSampler.from_pretrained(folder, threads=config.threads)
    for response in sampler.stream([list(tokens)], sampling, n=config.n):
        answer = middle.decode(response.tokens)
        print(answer if config.chat else text + answer, flush=True)
    return 0


if __name__ == "__main__":
    options.user_errors(main)

r"""Weighted responses for SteerLM 2: `python -m aligner.propose --model Q --base P --attribute-model A --data ...`.

    y_1 ... y_n ~ Q(y | a, x) for conversations x whose last answer has the label a;   written with each are
    log Q(y | a, x), log P(y | x), summed over the response, log P(a | x, y) = -sum_k (a_k - f_k(x, y))^2 / (2 sigma^2)
    Q is at the sampling temperature, P at 1, as the model that is trained on the lines

Source: Wang et al. 2024, arXiv:2406.08673 (SteerLM 2.0), which turns the attribute model's numbers f_k into
probabilities by other means; here they are the means of normal distributions of one width sigma.
The lines written are NeMo-Aligner's SteerLM 2 format, which `aligner.steerlm --loss steerlm2` reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aligner import ops
from aligner.checkpoint.model_folder import model_folder
from aligner.data import fields
from aligner.data.batch import pack_examples, pack_last
from aligner.data.examples import Example, Prompt
from aligner.data.jsonl import JsonLines
from aligner.job.actor import Actor, open_reward_model
from aligner.job.config import ModelToolConfig
from aligner.job.job import Job
from aligner.job.tool import FROZEN, check_output, silent_actor, write_rows
from aligner.models.policy import Policy
from aligner.models.reward_model import RewardModel, attributes_of
from aligner.rollout.sampling import SamplingConfig
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(ModelToolConfig):
    output: Path
    """The JSONL file to write; it must be new."""
    base: str
    """Model of P(y | x), which is asked without the label."""
    attribute_model: str
    """Reward model of --loss regression, of P(a | x, y)."""
    n: int = 4
    """Responses to each conversation."""
    sigma: float = 1.0
    """Width of P(a | x, y), rating units."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=64))

    def __post_init__(self):
        super().__post_init__()
        if not self.data.files or self.n < 2 or self.sigma <= 0:
            raise ValueError("propose needs --data FILE, an n of 2 or more and a sigma above 0.")


@dataclass(frozen=True)
class Asked:
    """A conversation up to where an answer with a label is wanted."""

    row: dict
    messages: list[dict]
    label: str
    values: list[float]


def read_line(row: dict, where: str, attributes: int) -> Asked:
    """Of NeMo-Aligner's chat format, whose last turn is the assistant's and has a label of that many attributes."""
    try:
        turns, labels = fields.turns(row, "conversations")
        last = len(turns) - 1
        if last not in labels or turns[last]["role"] != "assistant":
            raise ValueError('the last turn of "conversations" must be the assistant\'s, with a "label".')
        values = [float(part.rpartition(":")[2]) for part in labels[last].split(",")]
        if len(values) != attributes:
            raise ValueError(
                f"the label {labels[last]!r} has {len(values)} attributes, and the attribute model gives {attributes}; "
                "take the one that wrote the labels."
            )
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return Asked(row, system + turns[:last], labels[last], values)


def response_logprobs(policy: Policy, examples: list[Example]) -> list[float]:
    """Summed over each response, its end included, as the training will see it."""
    batch = pack_examples(examples)
    return ops.segment_sum(policy.infer(batch)[0], batch.cu_seqlens).tolist()


def proposed(c: Config, job: Job, actor: Actor, base: Policy, judge: RewardModel, asked: list[Asked]) -> Iterator[dict]:
    """The lines; a conversation of which a response is empty makes none."""
    encoder = job.encoder
    for start in range(0, len(asked), c.batch.prompts):
        chunk = asked[start : start + c.batch.prompts]
        steered = [encoder.steer(a.messages, a.label) for a in chunk]
        prompts = [Prompt(text=text, tokens=tokens, metadata={}) for text, tokens in steered]
        texts = actor.answer(prompts, c.n, c.seed * 2**32 + start).texts[1]
        kept = [(a, texts[i * c.n : (i + 1) * c.n]) for i, a in enumerate(chunk)]
        kept = [(a, said) for a, said in kept if all(text.strip() for text in said)]
        if not kept:
            continue
        chats = [(a, [*a.messages, {"role": "assistant", "content": text}]) for a, said in kept for text in said]
        last = [len(chat) - 1 for _, chat in chats]
        plain = [encoder.conversation(chat, [i]) for (_, chat), i in zip(chats, last, strict=True)]
        told = [encoder.conversation(chat, [i], labels={i: a.label}) for (a, chat), i in zip(chats, last, strict=True)]
        log_q, log_p = response_logprobs(actor.policy, told), response_logprobs(base, plain)
        judged = pack_last([example.tokens for example in plain])
        f_BK = judge.infer(judged)[judged.cu_seqlens[1:].long() - 1].tolist()
        for n, (a, said) in enumerate(kept):
            responses = []
            for i, text in enumerate(said, start=n * c.n):
                error = sum((v - f) ** 2 for v, f in zip(a.values, f_BK[i], strict=True))
                logs = {"log(P(a|x,y))": -error / (2 * c.sigma**2), "log(P(y|x))": log_p[i], "log(Q(y|a,x))": log_q[i]}
                responses.append({"from": "Assistant", "value": text} | logs)
            prompt = {"system": a.row.get("system", ""), "prompt_turns": a.row["conversations"][:-1], "label": a.label}
            yield prompt | {"responses": responses}


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    check_output(config.output)
    job = Job("propose", config)
    folder, base_folder = model_folder(config.attribute_model), model_folder(config.base)
    job.check_tokenizer(folder, "the attribute model")
    job.check_tokenizer(base_folder, "the base model")
    attributes = attributes_of(folder)
    if not attributes:
        raise ValueError(
            f"--attribute-model {config.attribute_model!r} is no reward model; train one with "
            "`python -m aligner.reward_model --loss regression`."
        )
    files = [JsonLines(Path(file)) for file in config.data.files.split(",")]
    asked = [read_line(lines.row(i), lines.where(i), attributes) for lines in files for i in range(len(lines))]
    job.join()
    actor = silent_actor(job)
    base = job.policy(folder=base_folder, **FROZEN)
    judge = open_reward_model(job, folder)
    count = write_rows(config.output, proposed(config, job, actor, base, judge, asked))
    print(f"{config.output}: {count} conversations with {config.n} responses each")
    return 0


if __name__ == "__main__":
    options.user_errors(main)

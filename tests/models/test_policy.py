"""The network against transformers, and gradients that do not depend on the micro-batch."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner.checkpoint.huggingface import Weights
from aligner.data.batch import PolicyBatch, Rollout, pack_rollout
from aligner.losses.policy import clipped_policy_loss, token_weights
from aligner.models.attention import Segments
from aligner.models.critic import Critic, CriticConfig
from aligner.models.lora import LoRAConfig
from aligner.models.microbatch import Layout
from aligner.models.network import Network, OptimizerConfig
from aligner.models.policy import Policy
from aligner.models.shape import ModelShape
from tests.conftest import save_llama

PROMPTS = (
    "Paris is",
    "The film opens with a long shot of",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "I watched this movie twice, and I have to say that the second time I liked it far more than the first, because",
)


def random_rollout(vocab: int, lengths: list[tuple[int, int]], seed: int = 0) -> Rollout:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, vocab, (p + r,), generator=g).tolist() for p, r in lengths]
    return pack_rollout(
        [x[:p] for x, (p, _) in zip(ids, lengths, strict=True)],
        [x[p:] for x, (p, _) in zip(ids, lengths, strict=True)],
        [[0.0] * r for _, r in lengths],
        [True] * len(lengths),
        0,
    )


def make_policy(folder: Path, *, rank: int = 4, tokens_per_micro_batch: int = 4096, lr: float = 1e-3) -> Policy:
    shape = ModelShape.from_folder(folder)
    return Policy(
        shape,
        Weights(folder, shape.tensors()),
        lora=LoRAConfig(rank=rank),
        optimizer=OptimizerConfig(lr=lr),
        tokens_per_micro_batch=tokens_per_micro_batch,
        seed=1,
    )


def logits(network: Network, ids: list[int]) -> torch.Tensor:
    """(T, V) logits of one sequence; on one rank."""
    sequence = pack_rollout([ids[:1]], [ids[1:]], [[0.0] * (len(ids) - 1)], [True], 0)
    layout = Layout.of(sequence)
    hidden = network.last(layout, Segments.of(layout))
    tied = network.shape.tied
    weight_VH = network.last.shared_embedding_or_output_weight() if tied else network.last.output_layer.weight
    return hidden[:, 0] @ weight_VH.T


@pytest.mark.slow
def test_smollm2_logits_equal_transformers(smollm2: Path):
    shape = ModelShape.from_folder(smollm2)
    network = Network(
        shape,
        Weights(smollm2, shape.tensors()),
        adapters=LoRAConfig(rank=0),
        optimizer=OptimizerConfig(),
        tokens_per_micro_batch=1024,
        seed=0,
    )
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2).eval(), AutoTokenizer.from_pretrained(smollm2)
    assert shape.num_layers == 30
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            want = reference(torch.tensor([ids])).logits[0]
            got = logits(network, ids)
            assert (got - want).abs().max() <= 1e-3
            assert (got.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens_per_micro_batch", [1, 40, 4096])
def test_infer_equals_transformers_log_softmax(tmp_path, tied: bool, tokens_per_micro_batch: int):
    folder = save_llama(tmp_path / "m", None, vocab_size=311, tie_word_embeddings=tied)
    rollout = random_rollout(311, [(3, 5), (1, 9), (7, 1), (2, 2)])
    policy = make_policy(folder, tokens_per_micro_batch=tokens_per_micro_batch)
    logprobs_N, entropy_N = policy.infer(rollout)
    reference = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    starts = rollout.cu_seqlens.tolist()
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        ids = rollout.tokens_N[a:b]
        with torch.no_grad():
            p = reference(ids[None]).logits[0].log_softmax(-1)
        want = torch.cat([torch.zeros(1), p[:-1].gather(1, ids[1:, None])[:, 0]])
        entropy = torch.cat([torch.zeros(1), -(p.exp() * p).sum(-1)[:-1]])
        mask = rollout.action_mask_N[a:b]
        assert torch.allclose(logprobs_N[a:b].double(), torch.where(mask, want, 0.0), atol=2e-5)
        assert torch.allclose(entropy_N[a:b].double(), torch.where(mask, entropy, 0.0), atol=2e-5)


def policy_batch(rollout: Rollout, seed: int = 3) -> PolicyBatch:
    g = torch.Generator().manual_seed(seed)
    n, mask_N = len(rollout.tokens_N), rollout.action_mask_N
    return PolicyBatch(
        rollout=rollout,
        old_logprobs_N=(-5.5 + 0.3 * torch.randn(n, generator=g)) * mask_N,
        advantages_N=torch.randn(n, generator=g) * mask_N,
        weights_N=token_weights(mask_N, rollout.cu_seqlens, "token"),
    )


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return {n: p.main_grad.clone() for n, p in policy.network.parameters.items() if p.requires_grad}


def with_denominator(num_tokens: float, logprobs_N, entropy_N, micro):
    return clipped_policy_loss(logprobs_N, entropy_N, micro, num_tokens, **CLIP)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_gradient_does_not_depend_on_the_micro_batch(tmp_path, average: str):
    folder = save_llama(tmp_path / "m", None, vocab_size=311)
    rollout = random_rollout(311, [(2, 6), (2, 1), (2, 11), (2, 3), (2, 6), (2, 8), (2, 2)])
    found = {}
    for size, budget in ((1, 1), (3, 3 * 13), (7, 10_000)):  # 13 tokens are the longest sequence
        policy = make_policy(folder, tokens_per_micro_batch=budget, rank=4)
        batch = policy_batch(rollout)
        groups = policy.network._micro_batches(batch)
        assert max(map(len, groups)) >= size and (size != 1 or len(groups) == 7)
        weights_N = token_weights(rollout.action_mask_N, rollout.cu_seqlens, average)
        batch = PolicyBatch(**{**vars(batch), "weights_N": weights_N})
        n = float(weights_N.sum())
        policy.network.scheduler.step(0)
        stats = policy.update(batch, partial(with_denominator, n))
        found[size] = gradients(policy) | {"loss": torch.tensor(stats["loss"])}
    for size in (3, 7):
        for name, want in found[1].items():
            scale = want.abs().max().clamp(min=1e-8)
            assert (found[size][name] - want).abs().max() <= 1e-5 * scale, (size, name)


CLIP = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0, "entropy_bonus": 0.01}


@pytest.mark.parametrize("rank", [0, 4])
def test_reference_stays_where_training_started(tmp_path, rank: int):
    folder = save_llama(tmp_path / "m", None, vocab_size=311)
    rollout = random_rollout(311, [(2, 6), (3, 4)])
    policy = make_policy(folder, rank=rank, lr=1e-2)
    before = policy.infer(rollout)[0]
    batch = policy_batch(rollout)
    n = float(batch.weights_N.sum())
    policy.update(batch, lambda lp, h, micro: clipped_policy_loss(lp, h, micro, n, **CLIP))
    assert (policy.infer(rollout)[0] - before).abs().max() > 1e-2
    assert torch.equal(policy.infer_reference(rollout), before)
    assert (policy.infer(rollout)[0] - before).abs().max() > 1e-2


def test_value_never_sees_its_own_token(tmp_path):
    folder = save_llama(tmp_path / "m", None, vocab_size=311)
    shape = ModelShape.from_folder(folder)
    critic = Critic(
        CriticConfig(layers=2).shape(shape),
        Weights(folder, shape.tensors()),
        lora=LoRAConfig(rank=2),
        optimizer=OptimizerConfig(),
        tokens_per_micro_batch=64,
        seed=0,
    )
    rollout = random_rollout(311, [(3, 5)])
    assert torch.equal(critic.infer(rollout), torch.zeros(8))  # the head starts at zero
    torch.nn.init.normal_(critic.network.last.value_head.weight)
    values_N = critic.infer(rollout)
    changed = Rollout(**{**vars(rollout), "tokens_N": rollout.tokens_N.clone()})
    changed.tokens_N[5] = 7
    again = critic.infer(changed)
    assert torch.equal(again[:6], values_N[:6])
    assert (again[6:] - values_N[6:]).abs().min() > 1e-6
    assert len(critic.network.last.decoder.layers) == 2


def test_non_finite_loss_stops_before_the_update(tmp_path):
    folder = save_llama(tmp_path / "m", None, vocab_size=311)
    policy = make_policy(folder)
    batch = policy_batch(random_rollout(311, [(2, 3)]))
    before = {n: p.clone() for n, p in policy.network.parameters.items()}
    with pytest.raises(FloatingPointError, match="not applied"):
        policy.update(batch, lambda lp, h, micro: (lp.sum() * torch.inf, {}))
    assert all(torch.equal(p, before[n]) for n, p in policy.network.parameters.items())

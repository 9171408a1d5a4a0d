"""One whole PPO update against an independent float64 implementation on transformers' model."""

from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from aligner import ppo
from aligner.checkpoint.huggingface import Weights
from aligner.models.critic import Critic, CriticConfig
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.policy import Policy
from aligner.models.shape import ModelShape
from aligner.serving.local import LocalCritic
from tests.conftest import save_llama
from tests.models.test_policy import random_rollout

KL, GAMMA, LAM, LOW, HIGH, DUAL, ENTROPY, VALUE_CLIP, TEMPERATURE = 0.3, 0.97, 0.9, 0.15, 0.25, 2.0, 0.02, 0.3, 1.3
HF_PARTS = {  # Megatron's linear -> its Hugging Face parts
    "self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention.linear_proj": ["self_attn.o_proj"],
    "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.linear_fc2": ["mlp.down_proj"],
}


def shuffle_adapters(network, seed: int) -> None:
    """Give every adapter a B that is not zero, so that A has a gradient too."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in network.adapters.values():
            adapter.b.normal_(std=0.05, generator=g)


class Oracle:
    """transformers' Llama in float64 whose weights are W + scale B A, with A and B as leaves."""

    def __init__(self, folder, network, kv_heads: int, head_dim: int):
        self.model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
        self.model.model.layers = self.model.model.layers[: network.shape.num_layers]
        self.kv_heads, self.head_dim, self.leaves = kv_heads, head_dim, {}
        for name, adapter in network.adapters.items():
            for factor in "ab":
                leaf = getattr(adapter, factor).detach().double().clone().requires_grad_()
                self.leaves[f"{name}.lora.{factor}"] = leaf
        self.scale = next(iter(network.adapters.values())).scale

    def _rows(self, delta, parts, weights):
        """Split Megatron's rows over the Hugging Face parts; queries and keys are interleaved by group."""
        if len(parts) != 3:
            return dict(zip(parts, delta.split([weights[p].shape[0] for p in parts]), strict=True))
        grouped = delta.view(self.kv_heads, -1, delta.shape[1])
        d = self.head_dim
        q, k, v = grouped[:, : -2 * d], grouped[:, -2 * d : -d], grouped[:, -d:]
        return {p: x.reshape(-1, delta.shape[1]) for p, x in zip(parts, (q, k, v), strict=True)}

    def hidden(self, ids):
        changed = {}
        for i, layer in enumerate(self.model.model.layers):
            for linear, parts in HF_PARTS.items():
                stem = f"decoder.layers.{i}.{linear}.lora"
                delta = self.scale * self.leaves[f"{stem}.b"] @ self.leaves[f"{stem}.a"]
                weights = {p: layer.get_submodule(p).weight for p in parts}
                for part, rows in self._rows(delta, parts, weights).items():
                    changed[f"layers.{i}.{part}.weight"] = weights[part] + rows
        return functional_call(self.model.model, changed, (ids[None],)).last_hidden_state[0]

    def logprobs(self, ids):
        """(log-probabilities of all tokens, entropies); the first token has 0."""
        p = (self.model.lm_head(self.hidden(ids)) / TEMPERATURE).log_softmax(-1)[:-1]
        zero = torch.zeros(1, dtype=p.dtype)
        return torch.cat([zero, p.gather(1, ids[1:, None])[:, 0]]), torch.cat([zero, -(p.exp() * p).sum(-1)])


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("ppo") / "m", None, vocab_size=307)
    shape = ModelShape.from_folder(folder)
    read = Weights(folder, shape.tensors())
    shared = {
        "lora": LoRAConfig(rank=3, alpha=6.0),
        "optimizer": OptimizerConfig(lr=1e-3, clip=1e9),
        "tokens_per_micro_batch": 30,
        "seed": 4,
    }
    policy = Policy(shape, read, temperature=TEMPERATURE, **shared)
    critic = Critic(CriticConfig(layers=2).shape(shape), read, **shared)
    rollout = random_rollout(307, [(3, 6), (1, 9), (4, 2), (2, 1), (2, 7)])
    config = ppo.Config(
        kl_coef=KL,
        kl_estimator="k3",
        gamma=GAMMA,
        lam=LAM,
        policy=ppo.PolicyConfig(clip_low=LOW, clip_high=HIGH, dual_clip=DUAL, entropy_bonus=ENTROPY),
    )
    rewards_B = torch.randn(5, generator=torch.Generator().manual_seed(0))
    reference_N = policy.infer_reference(rollout)
    shuffle_adapters(policy.network, 1)
    old_N, _ = policy.infer(rollout)
    shuffle_adapters(critic.network, 2)
    torch.nn.init.normal_(critic.network.last.value_head.weight, generator=torch.Generator().manual_seed(3))
    values_N = critic.infer(rollout)
    policy_batch, value_batch = ppo.estimate(config, rollout, rewards_B, old_N, reference_N, values_N, KL)
    shuffle_adapters(policy.network, 5)  # move away, so that ratios and value clipping are active
    shuffle_adapters(critic.network, 6)
    oracle = Oracle(folder, policy.network, shape.kv_heads, shape.head_dim)
    critic_oracle = Oracle(folder, critic.network, shape.kv_heads, shape.head_dim)
    head = critic.network.last.value_head
    critic_oracle.leaves["value_head.weight"] = head.weight.detach().double().clone().requires_grad_()
    critic_oracle.leaves["value_head.bias"] = head.bias.detach().double().clone().requires_grad_()
    return SimpleNamespace(**locals())


def sequences(rollout):
    starts = rollout.cu_seqlens.tolist()
    return list(zip(starts[:-1], starts[1:], strict=True))


def close(got, want, tolerance=1e-5):
    return float((got.double() - want).norm()) <= tolerance * max(float(want.norm()), 1e-12)


def test_advantages_and_returns(setting):
    s, mask = setting, setting.rollout.action_mask_N
    advantages, returns = torch.zeros(len(mask), dtype=torch.float64), torch.zeros(len(mask), dtype=torch.float64)
    d = s.old_N.double() - s.reference_N.double()
    penalty = torch.exp(-d) - 1 + d
    for i, (a, b) in enumerate(sequences(s.rollout)):
        carry = value_after = 0.0
        for t in range(b - 1, a - 1, -1):
            if mask[t]:
                reward = -KL * penalty[t] + (s.rewards_B[i].double() if t == b - 1 else 0.0)
                delta = reward + GAMMA * value_after - s.values_N[t].double()
                carry = delta + GAMMA * LAM * carry
                value_after = s.values_N[t].double()
                advantages[t], returns[t] = carry, carry + value_after
    white = (advantages - advantages[mask].mean()) / (advantages[mask].var(correction=0) + 1e-8).sqrt()
    assert torch.allclose(s.policy_batch.advantages_N.double(), torch.where(mask, white, 0.0), atol=1e-5)
    assert torch.allclose(s.value_batch.returns_N.double(), returns, atol=1e-5)


def test_policy_loss_gradient_and_adam_step(setting):
    s, n = setting, float(setting.rollout.action_mask_N.sum())
    loss, clipped = 0.0, 0
    for a, b in sequences(s.rollout):
        logprobs, entropy = s.oracle.logprobs(s.rollout.tokens_N[a:b])
        for t in range(a, b):
            if s.rollout.action_mask_N[t]:
                ratio = torch.exp(logprobs[t - a] - s.old_N[t].double())
                advantage = s.policy_batch.advantages_N[t].double()
                worst = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - LOW, 1 + HIGH))
                if advantage < 0:
                    worst = torch.minimum(worst, -advantage * DUAL)
                clipped += int(worst.detach() != -(advantage * ratio).detach())
                loss = loss + (worst - ENTROPY * entropy[t - a]) / n
    assert 3 < clipped < n - 3  # every branch is exercised
    wanted = dict(zip(s.oracle.leaves, torch.autograd.grad(loss, list(s.oracle.leaves.values())), strict=True))

    trained = {k: p for k, p in s.policy.network.parameters.items() if p.requires_grad}
    before = {k: p.detach().clone() for k, p in trained.items()}
    stats = ppo.update(SimpleNamespace(config=s.config, policy=s.policy), s.policy_batch)
    assert abs(float(stats["loss"]) - float(loss)) < 1e-6
    assert trained.keys() == wanted.keys()
    for name, parameter in trained.items():
        assert close(parameter.main_grad, wanted[name]), name

    for parameter in before.values():
        parameter.requires_grad_()
    adam = torch.optim.AdamW(before.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for name, parameter in before.items():
        parameter.grad = trained[name].main_grad.clone()
    adam.step()
    for name, parameter in before.items():
        assert torch.allclose(trained[name], parameter, atol=1e-7), name


def test_value_loss_and_gradient(setting):
    s, n = setting, float(setting.rollout.action_mask_N.sum())
    leaves, loss, clipped = s.critic_oracle.leaves, 0.0, 0
    for a, b in sequences(s.rollout):
        hidden = s.critic_oracle.hidden(s.rollout.tokens_N[a:b])
        for t in range(a, b):
            if s.rollout.action_mask_N[t]:
                value = leaves["value_head.weight"][0] @ hidden[t - a - 1] + leaves["value_head.bias"][0]
                old, target = s.values_N[t].double(), s.value_batch.returns_N[t].double()
                bounded = old + (value - old).clamp(-VALUE_CLIP, VALUE_CLIP)
                clipped += int((bounded - target) ** 2 > (value - target) ** 2)
                loss = loss + 0.5 * torch.maximum((bounded - target) ** 2, (value - target) ** 2) / n
    assert clipped > 3
    wanted = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    (stats,) = LocalCritic(s.critic, VALUE_CLIP).train(s.value_batch, [list(range(5))]).result()
    assert abs(float(stats["loss"]) - float(loss)) < 1e-6 * max(1.0, float(loss))
    trained = {k: p for k, p in s.critic.network.parameters.items() if p.requires_grad}
    assert trained.keys() == wanted.keys()
    for name, parameter in trained.items():
        assert close(parameter.main_grad, wanted[name]), name

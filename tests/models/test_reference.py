"""The reference of a policy when it moves, through checkpoints too; policies that nobody trains."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner.checkpoint import training
from aligner.checkpoint.huggingface import Weights
from aligner.data.batch import SupervisedBatch
from aligner.losses.supervised import supervised_loss
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.policy import Policy
from aligner.models.shape import ModelShape
from tests.conftest import save_llama
from tests.models.test_policy import random_rollout

VOCABULARY = 307


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these lose time to a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("reference") / "m", None, vocab_size=VOCABULARY)


def make(folder: Path, rank: int, *, trained: bool = True, **options) -> Policy:
    shape = ModelShape.from_folder(folder)
    return Policy(
        shape,
        Weights(folder, shape.tensors()),
        lora=LoRAConfig(rank=rank),
        optimizer=OptimizerConfig(lr=1e-2) if trained else None,
        tokens_per_micro_batch=32,
        seed=1,
        **options,
    )


ROLLOUT = random_rollout(VOCABULARY, [(3, 5), (1, 9), (4, 2)])


def batch(rollout=ROLLOUT) -> SupervisedBatch:
    names = ("tokens_N", "cu_seqlens", "action_mask_N")
    return SupervisedBatch(**{name: getattr(rollout, name) for name in names})


def update(policy: Policy, seed: int) -> None:
    """One step towards random responses."""
    examples = batch(random_rollout(VOCABULARY, [(2, 6), (3, 4)], seed))
    num_tokens = float(examples.action_mask_N.sum())
    policy.update(examples, lambda logprobs_N, _, micro: supervised_loss(logprobs_N, micro, num_tokens))


def by_transformers(model: Path, rollout, temperature: float = 1.0) -> torch.Tensor:
    """(N,) float64 log-probabilities of the action tokens, 0 elsewhere."""
    reference = AutoModelForCausalLM.from_pretrained(model).double().eval()
    starts, found = rollout.cu_seqlens.tolist(), []
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        ids = rollout.tokens_N[a:b]
        with torch.no_grad():
            p = (reference(ids[None]).logits[0] / temperature).log_softmax(-1)
        found.append(torch.cat([torch.zeros(1), p[:-1].gather(1, ids[1:, None])[:, 0]]))
    return torch.where(rollout.action_mask_N, torch.cat(found), 0.0)


def save_weights(policy: Policy, folder: Path, like: Path) -> Path:
    """What a sampler and transformers would be given, as a Hugging Face directory."""
    model = AutoModelForCausalLM.from_pretrained(like)
    missing = model.load_state_dict(dict(policy.hugging_face()), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_the_policy_of_the_moment(folder: Path, tmp_path, rank: int):
    policy = make(folder, rank)
    assert torch.allclose(policy.infer_reference(ROLLOUT).double(), by_transformers(folder, ROLLOUT), atol=2e-5)
    for moment in range(2):
        update(policy, seed=moment)
        there = save_weights(policy, tmp_path / f"moment-{moment}", folder)
        now = policy.infer(ROLLOUT)[0]
        policy.move_reference()
        assert torch.equal(policy.infer_reference(ROLLOUT), now)
        update(policy, seed=moment + 5)
        assert torch.equal(policy.infer_reference(ROLLOUT), now)
        assert torch.allclose(now.double(), by_transformers(there, ROLLOUT), atol=2e-5)
        later = policy.infer(ROLLOUT)[0]
        assert (later - now).abs().max() > 1e-2
        with policy.as_reference():  # and whoever samples reads its weights
            assert torch.equal(policy.infer(ROLLOUT)[0], now)
        assert torch.equal(policy.infer(ROLLOUT)[0], later)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_moved_reference_survives_a_checkpoint(folder: Path, tmp_path, rank: int):
    policy = make(folder, rank)
    update(policy, seed=0)
    policy.move_reference()
    update(policy, seed=1)
    wanted = policy.infer(ROLLOUT)[0], policy.infer_reference(ROLLOUT)
    saved = training.save(tmp_path, 2, {"policy": policy.state_dict()})
    update(policy, seed=2)
    after = policy.infer(ROLLOUT)[0]

    other = make(folder, rank)
    update(other, seed=9)
    other.move_reference()
    update(other, seed=10)
    training.restore(saved, {"policy": other})
    assert torch.equal(other.infer(ROLLOUT)[0], wanted[0])
    assert torch.equal(other.infer_reference(ROLLOUT), wanted[1])
    update(other, seed=2)  # the optimizer goes on as well
    assert torch.equal(other.infer(ROLLOUT)[0], after)
    assert torch.equal(other.infer_reference(ROLLOUT), wanted[1])

    unmoved = make(folder, rank)
    with pytest.raises(ValueError, match=r"policy\.reference\..* there and missing here"):
        training.restore(saved, {"policy": unmoved})


def test_a_policy_without_a_reference_says_so(folder: Path):
    policy = make(folder, 0, reference=False)
    with pytest.raises(ValueError, match="keeps no reference; make it with reference=True"):
        policy.infer_reference(ROLLOUT)
    update(policy, seed=0)
    policy.move_reference()
    assert policy.reference_moved


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_policy_that_is_not_trained_answers_like_transformers(folder: Path, rank: int, reference: bool):
    policy = make(folder, rank, trained=False, reference=reference, temperature=1.4)
    assert not any(p.requires_grad for p in policy.network.parameters.values())
    assert not policy.network.adapters and policy.network.optimizer is None
    wanted = by_transformers(folder, ROLLOUT, 1.4)
    assert torch.allclose(policy.infer(ROLLOUT)[0].double(), wanted, atol=2e-5)
    plain = policy.infer(ROLLOUT, temperature=1.0)[0]
    assert torch.allclose(plain.double(), by_transformers(folder, ROLLOUT), atol=2e-5)
    if reference:
        assert torch.equal(policy.infer_reference(ROLLOUT), policy.infer(ROLLOUT)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_the_largest_logits_are_those_of_transformers(tmp_path, tied: bool):
    folder = save_llama(tmp_path / "m", None, vocab_size=VOCABULARY, tie_word_embeddings=tied)
    ids_NK, logits_NK, log_sum_N = make(folder, 0, trained=False).infer_top_k(batch(), 7, 2.5)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    mask_N, starts = ROLLOUT.action_mask_N, ROLLOUT.cu_seqlens.tolist()
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        with torch.no_grad():
            z = model(ROLLOUT.tokens_N[None, a:b]).logits[0, :-1]  # row t predicts token t + 1
        top, learnt = z.topk(7), mask_N[a + 1 : b]
        assert torch.equal(ids_NK[a + 1 : b][learnt], top.indices[learnt])
        assert torch.allclose(logits_NK[a + 1 : b][learnt].double(), top.values[learnt], atol=1e-4)
        assert torch.allclose(log_sum_N[a + 1 : b][learnt].double(), (z / 2.5).logsumexp(1)[learnt], atol=1e-4)
    for values in (ids_NK, logits_NK, log_sum_N):
        assert (values[~mask_N] == 0).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_loss_of_logits_has_the_gradient_of_that_of_log_probabilities(tmp_path, tied: bool, rank: int):
    """And both have that of transformers' own loss."""
    folder = save_llama(tmp_path / "m", None, vocab_size=VOCABULARY, tie_word_embeddings=tied)
    examples = batch()
    num_tokens = float(examples.action_mask_N.sum())

    def of_logits(logits_AV, index_A, micro):
        logprobs_A = logits_AV.log_softmax(-1).gather(1, micro.tokens_N[index_A][:, None])
        loss = -logprobs_A.sum() / num_tokens
        return loss, {"nats": loss.detach()}

    found = []
    for whole in (False, True):
        policy = make(folder, rank)
        if rank:  # B starts at 0, and A would have no gradient
            g = torch.Generator().manual_seed(0)
            for adapter in policy.network.adapters.values():
                adapter.b.data.normal_(std=0.05, generator=g)
        if whole:
            assert policy.infer_logits(examples, of_logits)["nats"] == pytest.approx(found[0][1], rel=1e-5)
            stats = policy.update_logits(examples, of_logits)
            assert stats["nats"] == pytest.approx(stats["loss"], rel=1e-6)
        else:
            stats = policy.update(examples, lambda lp_N, _, micro: supervised_loss(lp_N, micro, num_tokens))
        trained = ((name, p) for name, p in policy.network.parameters.items() if p.requires_grad)
        found.append(({name: p.main_grad.clone() for name, p in trained}, stats["loss"], stats["grad_norm"]))
    (one, *first), (two, *second) = found
    assert first == pytest.approx(second, rel=1e-5) and one.keys() == two.keys()
    for name, gradient in one.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, two[name], atol=1e-5 * float(gradient.abs().max())), name
    if rank == 0:
        model = AutoModelForCausalLM.from_pretrained(folder).double()
        nats, starts = 0.0, ROLLOUT.cu_seqlens.tolist()
        for a, b in zip(starts[:-1], starts[1:], strict=True):
            ids, learnt = ROLLOUT.tokens_N[a:b], ROLLOUT.action_mask_N[a + 1 : b]
            logits = model(ids[None]).logits[0, :-1]
            nats = nats + torch.nn.functional.cross_entropy(logits[learnt], ids[1:][learnt], reduction="sum")
        loss = nats / num_tokens
        loss.backward()
        assert first[0] == pytest.approx(float(loss), rel=1e-5)
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert first[1] == pytest.approx(float(norm), rel=1e-4)
        embedding = model.model.embed_tokens.weight.grad.float() / norm  # clipped to 1
        assert torch.allclose(one["embedding.word_embeddings.weight"][:VOCABULARY], embedding, atol=1e-6) and norm > 1

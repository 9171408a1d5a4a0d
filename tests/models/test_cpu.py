"""Every redirection of models/cpu.py is needed by Megatron, and none reaches torch itself."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from aligner.losses.policy import clipped_policy_loss
from aligner.models import cpu
from tests.conftest import save_llama
from tests.models.test_policy import CLIP, make_policy, policy_batch, random_rollout


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("cpu") / "m", None, vocab_size=64)

    def once():
        policy, batch = make_policy(folder), policy_batch(random_rollout(64, [(2, 3), (2, 4)]))
        policy.update(batch, lambda lp, h, micro: clipped_policy_loss(lp, h, micro, 7.0, **CLIP))

    once()
    return once


@pytest.fixture(scope="module", autouse=True)
def installed():
    cpu.install()


def redirected_torch():
    from megatron.core.optimizer import optimizer

    return optimizer.torch


def take_out(monkeypatch, name: str) -> None:
    """Let Megatron have torch's own `name` again."""
    *parents, last = name.split(".")
    monkeypatch.delitem(functools.reduce(getattr, parents, redirected_torch()).__dict__, last)


@pytest.mark.parametrize("name", [*cpu._FACTORIES, "cuda.current_device"])
def test_megatron_needs_each_redirection(train, name: str, monkeypatch):
    take_out(monkeypatch, name)
    with pytest.raises(AssertionError, match="CUDA"):
        train()


def test_megatron_needs_the_gradient_type(train, monkeypatch):
    from megatron.core.optimizer import clip_grads

    monkeypatch.setattr(cpu, "_redirect_methods", lambda: None)  # a network would put it back
    monkeypatch.setattr(clip_grads, "clip_grad_by_total_norm_fp32", clip_grads.clip_grad_by_total_norm_fp32.__wrapped__)
    with pytest.raises(AssertionError):
        train()


def transformer_config(**changes):
    from megatron.core.transformer import TransformerConfig

    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "use_cpu_initialization": True}
    return TransformerConfig(**sizes | {"pipeline_dtype": torch.float32, "masked_softmax_fusion": False} | changes)


def build_optimizer(*, distributed: bool, dtype: torch.dtype):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = nn.Linear(8, 8, dtype=dtype)
    options = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    ddp = DistributedDataParallel(transformer_config(), options, model)
    bf16 = dtype == torch.bfloat16
    return get_megatron_optimizer(
        OptimizerConfig(lr=1e-3, use_distributed_optimizer=distributed, bf16=bf16, params_dtype=dtype), [ddp]
    )


@pytest.mark.parametrize(("distributed", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, "bf16")])
def test_megatron_needs_the_parameter_type(distributed: bool, dtype, monkeypatch):
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    dtype = torch.bfloat16 if dtype == "bf16" else dtype
    build_optimizer(distributed=distributed, dtype=dtype)
    kind = DistributedOptimizer if distributed else Float16OptimizerWithFloat16Params
    monkeypatch.setattr(kind, "__init__", kind.__init__.__wrapped__)
    with pytest.raises(TypeError, match="must be one of"):
        build_optimizer(distributed=distributed, dtype=dtype)


def test_megatron_needs_the_random_state(monkeypatch):
    from megatron.core.tensor_parallel import random

    def seed():
        random.model_parallel_cuda_manual_seed(5, force_reset_rng=True)

    def draw() -> torch.Tensor:
        seed()
        with random.get_cuda_rng_tracker().fork():
            return torch.rand(3)

    state = torch.get_rng_state()
    drawn = draw()
    assert torch.equal(draw(), drawn)
    for name in ("cuda.get_rng_state", "cuda.manual_seed"):
        with monkeypatch.context() as m:
            take_out(m, name)
            try:  # without CUDA torch leaves a seed for later and refuses to tell a state
                assert not torch.equal(draw(), drawn)
            except (AssertionError, RuntimeError) as error:
                assert "CUDA" in str(error) or "NVIDIA" in str(error)
    with monkeypatch.context() as m:
        m.setattr(random, "_set_cuda_rng_state", random._set_cuda_rng_state.__wrapped__)
        assert not torch.equal(draw(), drawn)
    x = torch.ones(3, requires_grad=True)
    random.checkpoint(torch.exp, False, x).sum().backward()
    assert torch.equal(x.grad, x.detach().exp())
    monkeypatch.setattr(random, "_get_cuda_rng_state", random._get_cuda_rng_state.__wrapped__)
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        random.checkpoint(torch.exp, False, x)
    torch.set_rng_state(state)


def test_megatron_needs_both_redirections_of_context_parallel_positions(monkeypatch):
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding

    positions = torch.arange(8.0)[:, None]
    assert rotary_pos_embedding.get_pos_emb_on_this_cp_rank is rope_utils.get_pos_emb_on_this_cp_rank
    select = functools.partial(rope_utils.get_pos_emb_on_this_cp_rank, positions, 0, dist.group.WORLD)
    assert torch.equal(select(), positions)
    with monkeypatch.context() as m:
        take_out(m, "tensor")
        with pytest.raises(RuntimeError, match="pin"):
            select()
    with pytest.raises(AssertionError, match="CUDA"):
        rope_utils.get_pos_emb_on_this_cp_rank.__wrapped__(positions, 0, dist.group.WORLD)


def test_torch_itself_stays_untouched(train):
    with pytest.raises(AssertionError, match="CUDA"):
        torch.zeros(1, device="cuda")
    with pytest.raises(AssertionError, match="CUDA"):
        torch.zeros(1).cuda()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert cpu._Proxy(torch, {}).add is torch.add


@pytest.mark.slow
def test_megatron_needs_each_redirection_of_pipeline_parallel(tmp_path):
    mp.start_processes(pipeline_of_two, args=(tmp_path / "rendezvous",), nprocs=2, start_method="forkserver")


def pipeline_of_two(rank: int, rendezvous) -> None:
    from megatron.core import parallel_state
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    cpu.install()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    group = parallel_state.get_pipeline_model_parallel_group()
    config = transformer_config(pipeline_model_parallel_size=2)

    def exchange():
        pipe = P2PCommunicator(group, config)
        pipe.send_forward(torch.full((2, 1, 8), 7.0), is_last_stage=rank == 1)
        return pipe.recv_forward((2, 1, 8), is_first_stage=rank == 0)

    received = exchange()
    assert rank == 0 or torch.equal(received, torch.full((2, 1, 8), 7.0))
    with pytest.MonkeyPatch.context() as m:
        take_out(m, "cuda.synchronize")
        with pytest.raises(AssertionError, match="CUDA"):
            exchange()

    def tie():
        model = tied_embeddings(config, first=rank == 0)
        return model.shared_embedding_or_output_weight()

    weights = [torch.empty_like(tie()) for _ in range(2)]
    dist.all_gather(weights, tie().detach())
    assert torch.equal(*weights) and weights[0].any()
    with pytest.MonkeyPatch.context() as m:
        name = "setup_embeddings_and_output_layer"
        m.setattr(LanguageModule, name, getattr(LanguageModule, name).__wrapped__)
        with pytest.raises(AssertionError, match="CUDA"):
            tie()
    dist.barrier()
    dist.destroy_process_group()


def tied_embeddings(config, first: bool):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    torch.manual_seed(0)
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=16,
        max_sequence_length=8,
        pre_process=first,
        post_process=not first,
        share_embeddings_and_output_weights=True,
    )

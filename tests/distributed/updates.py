"""One rank of a layout: optimizer steps of every method, and what came of them in Hugging Face coordinates.

Run by test_layouts.py in processes of its own: `run(rank, world, folder, cases)`.
"""

import dataclasses
import hashlib
import itertools
import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # imported by custom operators; after init_process_group it would keep the group alive
import torch.distributed as dist
from megatron.core import parallel_state

from aligner.checkpoint import huggingface, training
from aligner.checkpoint.huggingface import Weights
from aligner.data.batch import PairBatch, PolicyBatch, PreferenceBatch, SupervisedBatch, ValueBatch
from aligner.losses.policy import clipped_policy_loss
from aligner.losses.preference import bradley_terry_loss, direct_preference_loss
from aligner.losses.supervised import supervised_loss
from aligner.losses.value import clipped_value_loss
from aligner.models.critic import Critic
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.parallel import NetworkPlan, held
from aligner.models.policy import Policy
from aligner.models.reward_model import RewardModel
from aligner.models.shape import ModelShape
from aligner.models.weights import megatron_entry, window
from aligner.run import distributed
from aligner.run.distributed import ParallelConfig

METHODS = ("sft", "dpo", "reward_model", "ppo_policy", "ppo_critic")
LENGTHS = [(2, 6), (5, 11), (2, 1), (3, 9), (1, 3), (7, 4), (2, 14), (4, 2)]  # prompt and response of each sequence
VOCAB = 312


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method on one model in one layout; `key` names what must not depend on the layout.

    work: which of the functions below.
    """

    method: str
    model: str
    lora: bool = False
    steps: int = 2
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    budget: int = 40
    dtype: torch.dtype = torch.float32
    seed: int = 3
    non_finite: str = "stop"
    work: str = "train"

    @property
    def key(self) -> str:
        return f"{self.method}-{self.model}-{'lora' if self.lora else 'full'}"


def sequences(seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    counts = torch.tensor([0, *(p + r for p, r in LENGTHS)])
    mask = torch.cat([torch.cat([torch.zeros(p), torch.ones(r)]) for p, r in LENGTHS]).bool()
    tokens = torch.randint(3, VOCAB, (int(counts.sum()),), generator=g)
    return {"tokens_N": tokens, "cu_seqlens": counts.cumsum(0, dtype=torch.int32), "action_mask_N": mask}


def batch_and_loss(method: str, seed: int):
    """A batch of the step `seed`, the same on all ranks, and its loss."""
    s, g = sequences(seed), torch.Generator().manual_seed(seed + 1000)
    mask_N, n = s["action_mask_N"], float(s["action_mask_N"].sum())
    noise = partial(torch.randn, len(mask_N), generator=g)
    if method == "sft":
        return SupervisedBatch(**s), lambda logprobs_N, _entropy_N, micro: supervised_loss(logprobs_N, micro, n)
    if method == "dpo":
        reference_B = -40 + 5 * torch.randn(len(LENGTHS), generator=g)
        loss = partial(direct_preference_loss, num_pairs=4.0, kind="dpo", beta=0.1)
        return PreferenceBatch(**s, reference_logprobs_B=reference_B), lambda lp, _h, micro: loss(lp, micro)
    if method == "reward_model":
        last_N = torch.zeros_like(mask_N)
        last_N[s["cu_seqlens"][1:].long() - 1] = True
        return PairBatch(**s | {"action_mask_N": last_N}), lambda r_NK, micro: bradley_terry_loss(
            r_NK[:, 0], micro, 4.0
        )
    sampled = SupervisedBatch(**s)
    weights_N = mask_N.float()
    if method == "ppo_policy":
        old_N = (-5.7 + 0.2 * noise()) * mask_N
        batch = PolicyBatch(rollout=sampled, old_logprobs_N=old_N, advantages_N=noise() * mask_N, weights_N=weights_N)
        clip = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0, "entropy_bonus": 0.01}
        return batch, lambda lp, h, micro: clipped_policy_loss(lp, h, micro, n, **clip)
    batch = ValueBatch(
        rollout=sampled, old_values_N=0.1 * noise() * mask_N, returns_N=noise() * mask_N, weights_N=weights_N
    )
    return batch, lambda v, micro: clipped_value_loss(v, micro, n, clip=0.2)


def _lora(case: Case) -> LoRAConfig:
    return LoRAConfig(rank=4 if case.lora else 0, alpha=8.0)


def make(case: Case, folder: Path):
    kind = {"reward_model": RewardModel, "ppo_critic": Critic}.get(case.method, Policy)
    shape = ModelShape.from_folder(folder / case.model)
    return kind(
        shape,
        Weights(folder / case.model, shape.tensors()),
        lora=_lora(case),
        # Where a gradient is close to 0, rounding would decide about the sign of a step that eps does not damp.
        optimizer=OptimizerConfig(lr=5e-4, weight_decay=0.1, clip=0.5, eps=1e-5, non_finite=case.non_finite),
        tokens_per_micro_batch=case.budget,
        seed=case.seed,
        parallel=case.layout,
        dtype=case.dtype,
    )


def train(model, case: Case, steps: range) -> list[dict[str, float]]:
    stats = []
    for step in steps:
        batch, loss = batch_and_loss(case.method, step)
        stats.append(model.update(batch, loss))
        stats[-1].pop("padding")  # the only one that a layout may change
    return stats


def gathered(network, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All ranks' parameters (or gradients) by Hugging Face tensor, adapters' factors by that and `.a` or `.b`."""
    mine = []
    for name, tensor in tensors.items():
        mine += _pieces(network, name, tensor.detach().clone())
    everyone = [mine]
    if dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    for name, size, start, piece in (item for rank in everyone for item in rank):
        into = window(whole.setdefault(name, torch.full(size, torch.nan)), start, piece.shape)
        assert into.isnan().all() or torch.allclose(into, piece, rtol=1e-4, atol=1e-7), f"{name} differs between ranks"
        into.copy_(piece)
    assert not any(x.isnan().any() for x in whole.values())
    return whole


def _pieces(network, name: str, tensor: torch.Tensor) -> list:
    """(name, whole shape, start, piece) of one parameter's segments."""
    if name.startswith("value_head"):
        return [(name, tensor.shape, [0] * tensor.dim(), tensor)]
    layer, lora, factor = name.partition(".lora.")
    weight = f"{layer}.weight" if lora else name
    replicated = factor and getattr(network.parameters[name], "tensor_model_parallel", False) is False
    if replicated:
        return [(name, tensor.shape, [0, 0], tensor)]
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), network.parallel.tensor
    sizes = network.shape.tensors()
    pieces = []
    for s in megatron_entry(weight, tensor, network.shape, rank=rank, ranks=ranks)["segments"]:
        size, start = list(sizes[s["tensor"]]), list(s["start"])
        if factor == "a":
            size, start = [tensor.shape[0], size[1]], [0, start[1]]
        if factor == "b":
            size, start = [size[0], tensor.shape[1]], [start[0], 0]
        extent = [tensor.shape[0], s["size"][1]] if factor == "a" else s["size"]
        pieces.append(
            (f"{s['tensor']}.{factor}" if lora else s["tensor"], size, start, window(tensor, s["at"], extent))
        )
    return pieces


def outcome(case: Case, folder: Path) -> dict:
    """Statistics of each step, gradients of the first, weights after the last, and inference before and after."""
    model = make(case, folder)
    network = model.network
    with torch.no_grad():  # B and a value head start at 0, where what stands behind them has no gradient
        for name, adapter in network.adapters.items():
            _fill_b(network, name, adapter)
        if hasattr(network.last, "value_head"):
            network.last.value_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(9))
    network.optimizer.reload_model_params()  # masters, if there are any, were copied when it was made
    batch, _ = batch_and_loss(case.method, 0)
    before = _infer(model, batch)
    stats = train(model, case, range(1))
    trained = {n: p for n, p in network.parameters.items() if p.requires_grad}
    result = {"before": before, "stats": stats}
    head = {"reward_model": network.shape.hidden, "ppo_critic": network.shape.hidden + 1}.get(case.method, 0)
    plan = NetworkPlan(name="", shape=network.shape, lora=_lora(case), value_head=head)
    planned = held(plan, case.layout, distributed.place().pipeline)  # what --dry-run says
    assert planned.weights == sum(p.numel() for p in network.parameters.values())
    assert planned.trained == sum(p.numel() for p in trained.values())
    if not case.layout.distributed_optimizer:  # where each rank holds a share of the sum only
        result["gradients"] = gathered(network, {n: p.main_grad for n, p in trained.items()})
    stats += train(model, case, range(1, case.steps))
    result |= {"weights": gathered(network, trained), "after": _infer(model, batch)}
    return result


def save(case: Case, folder: Path) -> list[dict[str, float]]:
    """Three steps, a checkpoint, three more."""
    model = make(case, folder)
    stats = train(model, case, range(3))
    model.network.offload.leave()  # a checkpoint brings back what it needs
    training.save(_run(case, folder), 3, {"model": model.network.state_dict()})
    model.network.offload.leave()
    return stats + train(model, case, range(3, 6))


def resume(case: Case, folder: Path) -> list[dict[str, float]]:
    """The last three steps from the checkpoint of the first three, in a network that knows nothing of them."""
    model = make(dataclasses.replace(case, seed=4), folder)
    training.restore(training.latest(_run(case, folder)), {"model": model.network})
    return train(model, case, range(3, 6))


def non_finite(case: Case, folder: Path) -> dict:
    """A loss that one data-parallel rank alone finds infinite: all ranks stop, or all leave the update out."""
    model = make(case, folder)
    batch, loss = batch_and_loss(case.method, 0)

    def broken(logprobs_N, entropy_N, micro):
        value, stats = loss(logprobs_N, entropy_N, micro)
        return value * (math.inf if distributed.place().data == 1 else 1), stats

    before = [p.detach().clone() for p in model.network.parameters.values()]
    skipped, stopped = None, ""
    try:
        skipped = model.update(batch, broken)["skipped"]
    except FloatingPointError as error:
        stopped = str(error)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, model.network.parameters.values(), strict=True))
    after = model.update(batch, loss)["skipped"]
    everyone = distributed.gather(lambda: (skipped, stopped, unchanged, after))
    assert len(set(everyone)) == 1
    return dict(zip(("skipped", "stopped", "unchanged", "after"), everyone[0], strict=True))


def _run(case: Case, folder: Path) -> Path:
    return folder / "runs" / case.key


def _infer(model, batch) -> torch.Tensor:
    result = model.infer(batch)
    return torch.stack(result) if isinstance(result, tuple) else result


def _fill_b(network, name: str, adapter) -> None:
    rank, group = parallel_state.get_tensor_model_parallel_rank(), network.parallel.tensor
    out = adapter.b.shape[0] * (1 if adapter.row_parallel else group)
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    whole = 0.05 * torch.randn(out, adapter.b.shape[1], generator=g)
    if name.endswith("linear_fc1") and group > 1:  # a rank's gate rows, then its up rows
        whole = torch.cat([half.chunk(group)[rank] for half in whole.chunk(2)])
    elif not adapter.row_parallel:
        whole = whole.chunk(group)[rank]
    adapter.b.copy_(whole)


def export(case: Case, folder: Path) -> dict:
    """Log-probabilities, and the files that are written after a step: their contents' digest."""
    model = make(case, folder)
    batch, loss = batch_and_loss(case.method, 0)
    logprobs_N = model.infer(batch)[0]
    layout = distributed.gather(lambda: str(case.layout))[0]
    path = folder / "exported" / case.key / hashlib.sha256(layout.encode()).hexdigest()[:8]
    huggingface.write(path, model.hugging_face(), like=folder / case.model)
    found = {"logprobs": logprobs_N, "untrained": _digests(path)}
    model.update(batch, loss)
    huggingface.write(path, model.hugging_face(), like=folder / case.model)
    dist.barrier()
    return found | {"trained": str(path)}


def _digests(folder: Path) -> list[str]:
    dist.barrier()
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())]


WORK = {"train": outcome, "export": export, "save": save, "resume": resume, "non-finite": non_finite}


def run(rank: int, world: int, folder: Path, cases: list[Case], results: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    found = []
    for number, (layout, members) in enumerate(itertools.groupby(cases, lambda case: case.layout)):
        # Groups, each with threads of its own, are all closed before the next layout makes others.
        rendezvous = f"file://{results}.rendezvous-{number}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
        distributed.initialize(1, layout)
        found += [WORK[case.work](case, folder) for case in members]
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    if rank == 0:
        torch.save(found, results)

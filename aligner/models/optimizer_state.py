"""What a checkpoint holds of Megatron's optimizers, and how it is loaded where AdamW is torch's.

Megatron takes torch's AdamW without Transformer Engine and Apex, on any device, and then (0.16.1 to main) its own
loading goes wrong; tests/models/test_optimizer_state.py fails where that is repaired:
  1) An optimizer that has not stepped has no state yet, and DistributedOptimizer asserts that it has one.
  2) The other two optimizers leave a step of 0 out of the checkpoint, and AdamW misses it: KeyError.
  3) DistributedOptimizer copies states without `step` over states that have one: KeyError.
  4) DistributedOptimizer gives all parameters one tensor `step`. AdamW adds 1 to it for every parameter: nothing fails,
     and the bias correction is wrong.
"""

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def start(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its state of AdamW, with a `step` of its own. Call it on a new optimizer."""
    inner = _single(optimizer).optimizer
    if not isinstance(inner, torch.optim.AdamW):  # that of Transformer Engine counts steps elsewhere
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            step = state.get("step")
            state["step"] = torch.tensor(0.0) if step is None else step.clone()
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = torch.zeros_like(parameter)


def sharded(optimizer: MegatronOptimizer, parameters: dict, *, loading: bool) -> dict:
    """The optimizer's state for checkpoint.training: with `loading` as the template, else to save. Every rank calls it.

    parameters: the ShardedTensors of the same parameters, from models.sharded.
    """
    state = _single(optimizer).sharded_state_dict(
        parameters,
        is_loading=loading,
        metadata={
            "distrib_optim_sharding_type": "fully_reshardable",  # a tensor a parameter, which loads on any layout
            # Gathered by the first data-parallel rank alone, over gloo; else every rank would hold a copy of the whole.
            "distrib_optim_fully_reshardable_mem_efficient": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        },
    )
    if state.get("param_state", state) is None:  # a data-parallel rank that has nothing to save
        del state["param_state"]
    return state


def load(optimizer: MegatronOptimizer, state: dict) -> None:
    """Continue from the loaded state; `state` is used up."""
    single = _single(optimizer)
    if isinstance(single, DistributedOptimizer):
        shards = state.pop("param_state")
        single.load_state_dict(state)
        # Megatron copies what it loaded over all that a state has, and has not loaded `step` this way.
        states = single.optimizer.state
        steps = {parameter: s.pop("step") for parameter, s in states.items() if "step" in s}
        single.load_parameter_state_from_fully_reshardable(shards)
        for parameter, step in steps.items():
            states[parameter]["step"] = step
        start(optimizer)
    else:
        if isinstance(single.optimizer, torch.optim.AdamW):
            # In mixed precision the masters stand beside the state of AdamW.
            state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))
        single.load_state_dict(state)


def _single(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """Megatron chains one optimizer a kind of parameter; a network without experts has one."""
    (single,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return single

"""Parameters as Megatron's ShardedTensors: which part of the whole tensor a rank holds, for checkpoints."""

from collections.abc import Iterable

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch import Tensor


def sharded(
    parameters: Iterable[tuple[str, Tensor]], prefix: str = ""
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """{name: the part of the whole parameter that this rank holds}, for checkpoint.training.

    parameters: (name, parameter), layers counted over the whole network. What tensor parallelism splits carries
        Megatron's attributes `tensor_model_parallel` and `partition_dim`.
    prefix: of their names in the checkpoint.
    """
    return {name: _sharded(prefix, name, parameter) for name, parameter in parameters}


def _sharded(prefix: str, name: str, parameter: Tensor) -> ShardedTensor | ShardedTensorFactory:
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    split = getattr(parameter, "tensor_model_parallel", False)
    # The last pipeline stage has a copy of tied embeddings, which Megatron marks.
    copy = getattr(parameter, "shared", False)
    shard = ShardedTensor.from_rank_offsets(
        prefix + ("embedding.word_embeddings.weight" if copy else name),
        parameter,
        *([(parameter.partition_dim, rank, ranks)] if split else []),
        replica_id=(int(copy), 0 if split else rank, data_rank),
    )
    # A rank's rows are its part of the gate, then its part of the values: two places in the whole tensor.
    gated = ".linear_fc1." in name and split
    return apply_swiglu_sharded_factory(shard, ()) if gated else shard

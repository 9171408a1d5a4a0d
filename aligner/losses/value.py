"""Value losses: (values, batch, num_tokens) -> (loss, statistics)."""

from torch import Tensor

from aligner import ops


def clipped_value_loss(
    values_N: Tensor, batch, num_tokens: float, *, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error to the returns, clipped around the old values, on a data.batch.ValueBatch."""
    return ops.value_loss(values_N, batch.old_values_N, batch.returns_N, batch.weights_N, num_tokens, clip=clip)

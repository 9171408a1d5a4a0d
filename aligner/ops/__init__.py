"""Public face of the compiled operators."""

from aligner.ops.gae import gae, gae_reference
from aligner.ops.library import cpu_isa
from aligner.ops.linear_logprobs import linear_logprobs, linear_logprobs_reference
from aligner.ops.logprobs import logprobs, logprobs_reference
from aligner.ops.policy_loss import policy_loss, policy_loss_reference
from aligner.ops.value_loss import value_loss, value_loss_reference
from aligner.ops.whiten import whiten, whiten_reference

__all__ = [
    "cpu_isa",
    "gae",
    "gae_reference",
    "linear_logprobs",
    "linear_logprobs_reference",
    "logprobs",
    "logprobs_reference",
    "policy_loss",
    "policy_loss_reference",
    "value_loss",
    "value_loss_reference",
    "whiten",
    "whiten_reference",
]

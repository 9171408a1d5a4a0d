"""Public face of the compiled operators."""

from aligner.ops.gae import gae, gae_reference
from aligner.ops.group_advantages import group_advantages, group_advantages_reference
from aligner.ops.kto_loss import kto_loss, kto_loss_reference
from aligner.ops.library import cpu_isa
from aligner.ops.linear_logprobs import linear_logprobs, linear_logprobs_reference
from aligner.ops.logprobs import logprobs, logprobs_reference
from aligner.ops.policy_loss import policy_loss, policy_loss_reference
from aligner.ops.preference_loss import preference_loss, preference_loss_reference
from aligner.ops.refit_copy import refit_copy, refit_copy_reference
from aligner.ops.segment_sum import segment_mean, segment_sum, segment_sum_reference
from aligner.ops.topk_distillation_loss import topk_distillation_loss, topk_distillation_loss_reference
from aligner.ops.value_loss import value_loss, value_loss_reference
from aligner.ops.whiten import whiten, whiten_reference

__all__ = [
    "cpu_isa",
    "gae",
    "gae_reference",
    "group_advantages",
    "group_advantages_reference",
    "kto_loss",
    "kto_loss_reference",
    "linear_logprobs",
    "linear_logprobs_reference",
    "logprobs",
    "logprobs_reference",
    "policy_loss",
    "policy_loss_reference",
    "preference_loss",
    "preference_loss_reference",
    "refit_copy",
    "refit_copy_reference",
    "segment_mean",
    "segment_sum",
    "segment_sum_reference",
    "topk_distillation_loss",
    "topk_distillation_loss_reference",
    "value_loss",
    "value_loss_reference",
    "whiten",
    "whiten_reference",
]

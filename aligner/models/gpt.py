"""The network: Megatron-core's GPTModel on our layer spec, ending in hidden states.

The output layer is not run by the model: heads (log-probabilities, values) are applied to the hidden states of the rows
that need them.
"""

from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor
from torch.nn import functional as F

from aligner.models.attention import PackedAttention, Segments
from aligner.models.layers import RMSNorm, SwiGLU
from aligner.models.linear import ColumnLinear, RowLinear
from aligner.models.microbatch import Layout
from aligner.models.shape import ModelShape
from aligner.run.distributed import ParallelConfig


class HiddenStates(GPTModel):
    """GPTModel on packed tokens that returns the final normalised hidden states, (T, 1, H), in place of logits."""

    def forward(self, layout: Layout, segments: Segments) -> Tensor:
        hidden = self.embedding(input_ids=layout.tokens_T[None], position_ids=None) if self.pre_process else None
        if self.pre_process and torch.is_grad_enabled() and self.config.recompute_granularity == "full":
            hidden.requires_grad_()  # of a frozen embedding: else nothing in recomputed layers gets a gradient
        inverse = self.rotary_pos_emb.inv_freq.to(layout.positions_T.device)
        angles = torch.outer(layout.positions_T.float(), inverse)[:, None]
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            packed_seq_params=replace(segments, cos=angles.cos(), sin=angles.sin()),  # PackedAttention rotates
        )
        if self.post_process and self.config.sequence_parallel:  # the heads read any row, and agree on its gradient
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden


def transformer_config(shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of the network, with losses that already carry the denominator of the whole step."""
    from megatron.core.distributed import finalize_model_grads

    recompute = {} if parallel.recompute == "none" else {"recompute_granularity": parallel.recompute}
    if parallel.recompute == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # Megatron's name for: the layer spec's activation runs, which is layers.SwiGLU
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        # Micro-batches differ in length, so stages tell each other the shape; Megatron wants this dispatcher for it.
        variable_seq_lengths=parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        # An interleaved pipeline with batched sends gives wrong gradients, which only megatron.training refuses.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Gradients are summed over micro-batches and ranks, never averaged: a loss divides by the whole step's tokens.
        calculate_per_token_loss=True,
        finalize_model_grads_func=lambda model, _num_tokens, **kwargs: finalize_model_grads(model, None, **kwargs),
        **recompute,
    )


def build(
    shape: ModelShape, parallel: ParallelConfig, *, dtype: torch.dtype = torch.float32, output_layer: bool = True
) -> list[HiddenStates]:
    """The chunks of the network that this rank holds, one a virtual stage, with uninitialised weights.

    output_layer: False leaves the output weight out, for networks under another head.
    """
    config = transformer_config(shape, parallel, dtype)
    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline > 1 else [None]
    return [_chunk(shape, config, stage, output_layer) for stage in stages]


def _chunk(shape: ModelShape, config: TransformerConfig, stage: int | None, output_layer: bool) -> HiddenStates:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    attention = layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    attention.linear_qkv, attention.linear_proj = ColumnLinear, RowLinear
    mlp = layer.submodules.mlp.submodules
    mlp.linear_fc1, mlp.activation_func, mlp.linear_fc2 = ColumnLinear, SwiGLU, RowLinear
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    model = HiddenStates(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=stage), layer_norm=RMSNorm
        ),
        vocab_size=shape.vocab,
        max_sequence_length=shape.context,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied and output_layer,
        position_embedding_type="rope",
        vp_stage=stage,
    )
    if model.post_process and not output_layer:
        del model.output_layer
    model.rotary_pos_emb.inv_freq = shape.rope.frequencies(shape.head_dim)  # Megatron's own scalings are fewer
    return model

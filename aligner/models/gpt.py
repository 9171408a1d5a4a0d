"""The network: Megatron-core's GPTModel on our layer spec, ending in hidden states.

The output layer is not run by the model: heads (log-probabilities, values) are applied to the hidden states of the rows
that need them.
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn
from torch.nn import functional as F

from aligner.models.shape import ModelShape


class RMSNorm(nn.RMSNorm):
    """Megatron's own wrapper of torch.nn.RMSNorm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class CausalAttention(MegatronModule):
    """softmax(q k^T / sqrt(d) + causal mask) v through torch's fused attention.

    No padding mask is needed: sequences are padded on the right, and no token attends to what comes after it.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_):
        super().__init__(config=config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, **_) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [s, b, heads, dim] -> [b, heads, s, dim]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


class HiddenStates(GPTModel):
    """GPTModel that returns the final normalised hidden states, (s, b, H), in place of logits."""

    def _postprocess(self, hidden_states: Tensor, **_) -> Tensor:
        return hidden_states

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return super().forward(tokens_BS, position_ids=None, attention_mask=None)


def transformer_config(shape: ModelShape) -> TransformerConfig:
    """Megatron's configuration of the network, with losses that already carry the denominator of the whole step."""
    from megatron.core.distributed import finalize_model_grads

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
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        # Gradients are summed over micro-batches and ranks, never averaged: a loss divides by the whole step's tokens.
        calculate_per_token_loss=True,
        finalize_model_grads_func=lambda model, _num_tokens, **kwargs: finalize_model_grads(model, None, **kwargs),
    )


def build(shape: ModelShape) -> HiddenStates:
    """The network with uninitialised weights."""
    config = transformer_config(shape)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    attention = layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention.core_attention = CausalAttention
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    model = HiddenStates(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * shape.num_layers, layer_norm=RMSNorm),
        vocab_size=shape.vocab,
        max_sequence_length=shape.context,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
    )
    model.rotary_pos_emb.inv_freq = shape.rope.frequencies(shape.head_dim)  # Megatron's own scalings are fewer
    return model

"""The shape of a dense decoder, read from a Hugging Face config.json, and its tensors in Hugging Face coordinates."""

import math
from dataclasses import dataclass
from pathlib import Path

from aligner.models.rope import Rope
from aligner.run.json_file import read_object

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Fields of a config.json that would need code this library does not have, and what they must be, if they are there.
EXPECTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "num_experts": None,
    "num_local_experts": None,
    "quantization_config": None,
}
COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama-like decoder. All counts; norm_eps is dimensionless; context is in tokens.

    qkv_bias: queries, keys and values have a bias (Qwen2).
    qk_norm: queries and keys are normalised by head before they are rotated (Qwen3).
    """

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    tied: bool
    rope: Rope
    qkv_bias: bool = False
    qk_norm: bool = False

    @staticmethod
    def from_folder(folder: Path) -> "ModelShape":
        """Read FOLDER/config.json. Raises ValueError for a missing folder or a network this library cannot run."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(
                f"model folder {str(folder)!r} has no config.json; give a Hugging Face model directory "
                "(config.json, *.safetensors, tokenizer.json) or leave --model out for the default model."
            )
        config = read_object(path)
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"{path}: model_type {family!r} is not supported; expected one of {', '.join(FAMILIES)}.")
        for name, expected in EXPECTED.items():
            if (config.get(name) or None) not in (None, expected or None):
                _refuse(path, name, config[name], expected)
        count = {name: _positive(path, config, name) for name in COUNTS}
        _refuse_windows(path, config)
        heads, hidden = count["num_attention_heads"], count["hidden_size"]
        return ModelShape(
            num_layers=count["num_hidden_layers"],
            hidden=hidden,
            ffn=count["intermediate_size"],
            heads=heads,
            kv_heads=_positive(path, config, "num_key_value_heads", default=heads),
            head_dim=_positive(path, config, "head_dim", default=128 if family == "qwen3" else hidden // heads),
            vocab=count["vocab_size"],
            context=count["max_position_embeddings"],
            norm_eps=float(_positive(path, config, "rms_norm_eps", kind=float)),
            tied=bool(config.get("tie_word_embeddings", False)),
            rope=Rope.from_config(path, config),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the Hugging Face checkpoint."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.num_layers):
            at = f"model.layers.{i}."
            shapes |= {
                at + "input_layernorm.weight": (self.hidden,),
                at + "self_attn.q_proj.weight": (q, self.hidden),
                at + "self_attn.k_proj.weight": (kv, self.hidden),
                at + "self_attn.v_proj.weight": (kv, self.hidden),
                at + "self_attn.o_proj.weight": (self.hidden, q),
                at + "post_attention_layernorm.weight": (self.hidden,),
                at + "mlp.gate_proj.weight": (self.ffn, self.hidden),
                at + "mlp.up_proj.weight": (self.ffn, self.hidden),
                at + "mlp.down_proj.weight": (self.hidden, self.ffn),
            }
            if self.qkv_bias:
                shapes |= {at + f"self_attn.{c}_proj.bias": (n,) for c, n in (("q", q), ("k", kv), ("v", kv))}
            if self.qk_norm:
                shapes |= {at + f"self_attn.{c}_norm.weight": (self.head_dim,) for c in "qk"}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def layer_weights(self) -> int:
        """Entries of one layer's matrices."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn

    def num_bytes(self) -> int:
        """Bytes of the checkpoint in float32."""
        return 4 * sum(math.prod(size) for size in self.tensors().values())


def _positive(path: Path, config: dict, name: str, *, kind: type = int, default: int | None = None) -> int | float:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if name not in config:
        raise ValueError(f"{path}: {name} is missing; copy the config.json that belongs to the weights.")
    if not isinstance(value, int | kind) or value <= 0:
        expected = "whole number" if kind is int else "number"
        raise ValueError(f"{path}: {name} is {value!r}, expected a {expected} above 0.")
    return value


def _refuse(path: Path, name: str, got, expected) -> None:
    raise ValueError(f"{path}: {name} = {got!r} is not supported; this library runs models with {expected!r}.")


def _refuse_windows(path: Path, config: dict) -> None:
    """A sliding window is refused where it hides a token of the context from another."""
    layers = config.get("layer_types") or []
    if any(kind != "full_attention" for kind in layers):
        _refuse(path, "layer_types", layers, "full_attention")
    window = config.get("sliding_window", 4096)  # what transformers takes where a file is silent
    used = config["model_type"] == "mistral" or config.get("use_sliding_window", False)
    if used and window is not None and window < config["max_position_embeddings"]:
        _refuse(path, "sliding_window", window, None)

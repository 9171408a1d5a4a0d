"""The shape of a dense decoder, read from a Hugging Face config.json, and its tensors in Hugging Face coordinates."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("llama", "mistral")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama-like decoder. All counts; rope_base and norm_eps are dimensionless; context is in tokens."""

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_base: float
    norm_eps: float
    tied: bool

    @staticmethod
    def from_folder(folder: Path) -> "ModelShape":
        """Read FOLDER/config.json. Raises ValueError for a missing folder or a network this library cannot run."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(
                f"model folder {str(folder)!r} has no config.json; give a Hugging Face model directory "
                "(config.json, *.safetensors, tokenizer.json) or leave --model out for the default model."
            )
        config = json.loads(path.read_text())
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"{path}: model_type {family!r} is not supported; expected one of {', '.join(FAMILIES)}.")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        _refuse(path, "rope_type", rope.get("rope_type", "default"), "default")
        _refuse(path, "hidden_act", config.get("hidden_act", "silu"), "silu")
        _refuse(path, "attention_bias", bool(config.get("attention_bias", False)), False)
        _refuse(path, "mlp_bias", bool(config.get("mlp_bias", False)), False)
        _refuse(path, "sliding_window", config.get("sliding_window"), None)
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return ModelShape(
            num_layers=config["num_hidden_layers"],
            hidden=hidden,
            ffn=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab=config["vocab_size"],
            context=config["max_position_embeddings"],
            rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            norm_eps=float(config["rms_norm_eps"]),
            tied=bool(config.get("tie_word_embeddings", False)),
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
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def num_bytes(self) -> int:
        """Bytes of the checkpoint in float32."""
        return 4 * sum(math.prod(size) for size in self.tensors().values())


def _refuse(path: Path, name: str, got, expected) -> None:
    if got != expected:
        raise ValueError(f"{path}: {name} = {got!r} is not supported; this version runs models with {expected!r}.")

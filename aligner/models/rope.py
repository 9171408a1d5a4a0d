"""Rotary frequencies of a model, for the trainer and the sampler alike."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) and how it is stretched to a longer context.

    theta: base of the frequencies, dimensionless.
    factor: 1 changes nothing; frequencies are divided by it.
    llama3: None, or (low_freq_factor, high_freq_factor, original context in tokens): only wavelengths beyond
        context / low_freq_factor are stretched, none below context / high_freq_factor, and between them by a blend.
        Source: Llama 3.1's model code, as transformers has it.
    """

    theta: float = 10000.0
    factor: float = 1.0
    llama3: tuple[float, float, int] | None = None

    @staticmethod
    def from_config(path: Path, config: dict) -> "Rope":
        """Read the fields of a config.json in the spelling of transformers 5 (rope_parameters) or of those before.

        "dynamic" scaling changes frequencies only beyond the model's context: there the keys that a decoder has
        cached keep older frequencies than a pass over the whole sequence gives them, so that sampler and trainer
        would differ. Both refuse sequences longer than the context; up to it dynamic scaling is no scaling.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        nested = [name for name, value in rope.items() if isinstance(value, dict)]
        if nested:
            raise ValueError(f"{path}: rope_parameters by layer type, {nested[0]}, is not supported; give one for all.")
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1.0):
            raise ValueError(f"{path}: partial_rotary_factor = {partial} is not supported; this library rotates all.")
        theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind in ("default", "dynamic"):
            return Rope(theta=theta)
        if kind not in ("linear", "llama3"):
            raise ValueError(
                f"{path}: rope_type = {kind!r} is not supported; expected default, linear, dynamic or llama3."
            )
        names = ["factor"] if kind == "linear" else ["factor", "low_freq_factor", "high_freq_factor"]
        for name in names:
            if not isinstance(rope.get(name), int | float):
                raise ValueError(f"{path}: rope_parameters of type {kind} has no number {name}; add it.")
        if kind == "linear":
            return Rope(theta=theta, factor=float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        ramp = (float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), int(original))
        return Rope(theta=theta, factor=float(rope["factor"]), llama3=ramp)

    def frequencies(self, head_dim: int) -> Tensor:
        """(head_dim / 2,) float32, radians per token. The same float32 steps as transformers, hence the same bits."""
        inverse = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.llama3 is None:
            return inverse / self.factor
        low, high, context = self.llama3
        wavelength = 2 * math.pi / inverse
        blend = (context / wavelength - low) / (high - low)
        blended = (1 - blend) * inverse / self.factor + blend * inverse
        stretched = torch.where(wavelength > context / low, inverse / self.factor, blended)
        return torch.where(wavelength < context / high, inverse, stretched)

"""Log-probabilities of whole responses under the reference: asked for at every step, or once and kept in a file."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aligner import ops
from aligner.models.policy import Policy
from aligner.run.atomic import atomic_write
from aligner.run.distributed import agree, is_main

WINDOWS, WINDOW_BYTES = 64, 1 << 16  # of a weight file, that tell it from others


class Reference:
    """The reference of a run.

    policy: of which it is the reference.
    model: the folder that the policy starts from.
    cache: file of what was computed before, by this run or by another one from the same model; None to ask the policy
        at every step, which then keeps a reference.
    """

    def __init__(self, policy: Policy, model: Path, cache: Path | None):
        self._policy, self._cache, self._model = policy, cache, fingerprint(model)
        self._known: dict[bytes, float] = {}
        if cache is not None and Path(cache).exists():
            self._known = agree(lambda: _read(Path(cache), self._model))

    def precompute(self, batches: Iterable) -> None:
        """Of all the batches' sequences, while the policy still is the reference; then the file is written."""
        new = False
        for batch in batches:
            keys = _keys(batch)
            if all(key in self._known for key in keys):
                continue
            sums_B = ops.segment_sum(self._policy.infer(batch)[0], batch.cu_seqlens)
            self._known |= dict(zip(keys, sums_B.tolist(), strict=True))
            new = True
        if new:
            agree(lambda: _write(Path(self._cache), self._model, self._known) if is_main() else None)

    def sums(self, batch) -> Tensor:
        """(B,) float32, nats: of the batch's masked tokens, summed over each sequence."""
        if self._cache is None:
            return ops.segment_sum(self._policy.infer_reference(batch), batch.cu_seqlens)
        return torch.tensor([self._known[key] for key in _keys(batch)], dtype=torch.float32)


def _keys(batch) -> list[bytes]:
    starts, tokens, mask = batch.cu_seqlens.tolist(), batch.tokens_N.numpy(), batch.action_mask_N.numpy()
    spans = zip(starts[:-1], starts[1:], strict=True)
    return [hashlib.sha256(tokens[a:b].tobytes() + mask[a:b].tobytes()).digest() for a, b in spans]


def _read(cache: Path, model: str) -> dict[bytes, float]:
    try:
        with np.load(cache) as file:
            written, keys, sums = str(file["model"]), file["keys"], file["sums"]
    except (ValueError, KeyError, EOFError, OSError) as error:
        raise ValueError(f"{cache}: no reference cache ({error}); remove the file or name another one.") from error
    if written != model:
        raise ValueError(f"{cache} was computed with another model; remove the file or name another one.")
    return dict(zip((key.tobytes() for key in keys), sums.tolist(), strict=True))


def _write(cache: Path, model: str, known: dict[bytes, float]) -> None:
    keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, 32)
    content = io.BytesIO()
    np.savez(content, model=np.array(model), keys=keys, sums=np.array(list(known.values()), dtype=np.float32))
    cache.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(cache, content.getvalue())


def fingerprint(model: Path) -> str:
    """Of the model in a folder: the config, and windows of each weight file."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(WINDOWS):
                file.seek(i * max(size - WINDOW_BYTES, 0) // (WINDOWS - 1))
                digest.update(file.read(WINDOW_BYTES))
    return digest.hexdigest()

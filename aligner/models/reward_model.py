"""The reward model: one number, or one for each attribute, for a whole response; its training and its export."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from aligner.models.critic import zero_head
from aligner.models.lora import LoRAConfig
from aligner.models.microbatch import Layout
from aligner.models.network import Network, OptimizerConfig, Stats
from aligner.models.shape import ModelShape
from aligner.models.weights import Reader, export
from aligner.run.distributed import ParallelConfig, gather
from aligner.run.json_file import read_object

HEAD = "score.weight"  # its name in a Hugging Face directory, of any family
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # transformers' classes


class RewardModel:
    """A language model's network under a linear head that is read after the tokens of the mask.

        r_k = w_k . h_T,   T the last token of the response, the one that the batch's mask names

    There is no bias, so that transformers' AutoModelForSequenceClassification is the same network.
    Arguments as of models.network.Network, and:

    attributes: numbers that it gives to a response.
    trained: `read` holds the head too; else it starts at 0.
    """

    def __init__(
        self,
        shape: ModelShape,
        read: Reader,
        *,
        lora: LoRAConfig,
        optimizer: OptimizerConfig | None,
        tokens_per_micro_batch: int,
        seed: int,
        attributes: int = 1,
        trained: bool = False,
        parallel: ParallelConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.shape, self.attributes = replace(shape, tied=True), attributes  # there is no output layer
        head = zero_head(shape.hidden, attributes, bias=False)
        if trained:
            head.weight.data.copy_(read.window(HEAD, (0, 0), (attributes, shape.hidden)))
        self.network = Network(
            self.shape,
            read,
            adapters=lora,
            optimizer=optimizer,
            tokens_per_micro_batch=tokens_per_micro_batch,
            seed=seed,
            parallel=parallel,
            dtype=dtype,
            value_head=head,
            shift=0,
        )

    def infer(self, batch, parts: Sequence[Sequence[int]] | None = None) -> Tensor:
        """scores_NK of the mask's tokens, (N, attributes) float32, reward units; 0 elsewhere.

        parts: as of models.network.Network.run.
        """

        def head(hidden: Tensor, layout: Layout) -> tuple[Tensor, ...]:
            return self._scores(hidden, layout).unbind(1)

        return torch.stack(self.network.run(batch, head, self.attributes, parts), 1)

    def update(self, batch, loss: Callable[[Tensor, object], tuple[Tensor, Stats]]) -> Stats:
        """One optimizer step on `loss(scores_NK, micro_batch) -> (scalar, statistics)`."""
        return self.network.step(
            batch, lambda hidden, layout, micro: loss(layout.packed(self._scores(hidden, layout)), micro)
        )

    def _scores(self, hidden: Tensor, layout: Layout) -> Tensor:
        return self.network.last.value_head(layout.states(hidden))

    def hugging_face(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of its checkpoint for transformers; every rank exhausts it, as of Policy.hugging_face."""
        yield from export(self.network.manifest["tensors"], self.network.weight, self.shape, dtype=self.network.dtype)
        heads = gather(lambda: self.network.last and self.network.last.value_head.weight.detach().cpu())
        yield HEAD, next(head for head in heads if head is not None)

    def state_dict(self, *, loading: bool = False) -> dict:
        return self.network.state_dict(loading=loading)

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state)


def attributes_of(folder: Path) -> int:
    """Attributes of the reward model that a Hugging Face directory holds; 0 where it holds a language model."""
    config = read_object(Path(folder) / "config.json")
    if not (config.get("architectures") or [""])[0].endswith("ForSequenceClassification"):
        return 0
    return len(config.get("id2label") or (0, 1))  # transformers leaves two labels out


def reward_model_tensors(shape: ModelShape, attributes: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a reward model reads of a directory; attributes as of attributes_of()."""
    head = {HEAD: (attributes, shape.hidden)} if attributes else {}
    return replace(shape, tied=True).tensors() | head


def reward_model_config(folder: Path, shape: ModelShape, attributes: int) -> dict:
    """What its config.json says differently from that of the language model in `folder`."""
    config = read_object(Path(folder) / "config.json")
    family = FAMILIES[config["model_type"]]
    layers = {"layer_types": kinds[: shape.num_layers]} if (kinds := config.get("layer_types")) else {}
    return layers | {
        "architectures": [f"{family}ForSequenceClassification"],
        "num_hidden_layers": shape.num_layers,
        "id2label": {str(i): f"LABEL_{i}" for i in range(attributes)},
        "label2id": {f"LABEL_{i}": i for i in range(attributes)},
    }

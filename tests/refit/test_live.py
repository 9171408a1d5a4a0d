"""Against the real thing: needs a GPU, and, for what is marked trtllm_live, an environment with TensorRT-LLM.

make test-gpu runs the first part, `pytest -m trtllm_live tests/refit/test_live.py` the second, in the engine's
environment.
"""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner.checkpoint.huggingface import Weights
from aligner.models.shape import ModelShape
from aligner.refit import device_memory
from aligner.refit.shared import ExportedWeights, SharedSource
from aligner.rollout.sampling import Sampling
from tests.conftest import save_model
from tests.refit import test_contract
from tests.refit.layouts import Model
from tests.refit.test_extension import SMALL, Trainer, TrainerRank
from tests.rollout import test_trtllm

ROOT = Path(__file__).parent.parent.parent
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
with_trtllm = pytest.mark.skipif(importlib.util.find_spec("tensorrt_llm") is None, reason="needs TensorRT-LLM")


@gpu
def test_gpu_memory_is_read_by_another_process():
    tensor = torch.arange(1000, dtype=torch.float32, device="cuda")[10:]
    handle, begin, size = device_memory.handle_of(tensor)
    code = (
        "import sys, torch; from aligner.refit.device_memory import open_handle; torch.cuda.init(); "
        "torch.zeros(1, device='cuda'); handle, begin, size = sys.argv[1:]; "
        "memory, close = open_handle(bytes.fromhex(handle), int(size), torch.device('cuda', 0)); "
        "print(memory[int(begin):][:3960].view(torch.float32).double().sum().item()); close()"
    )
    command = [sys.executable, "-c", code, handle.hex(), str(begin), str(size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == sum(range(10, 1000))


class OnGpu(TrainerRank):
    def step(self, full: dict) -> None:
        super().step(full)
        self.held = {name: t.cuda() for name, t in self.held.items()}


@gpu
def test_gpu_weights_are_exported_without_a_copy():
    rank = OnGpu(SMALL, 1, 1, 0)
    published = ExportedWeights("test-live", rank)
    try:
        published.publish(0)
        first = next(iter(rank.held))
        handle, begin, _ = device_memory.handle_of(rank.held[first])
        place = published._header()["places"][first][0]
        assert place["begin"] == begin and published._header()["buffers"][place["buffer"]]["handle"] == handle.hex()
        with pytest.raises(ValueError, match="cannot open the trainer's memory"):
            SharedSource(["test-live"], 1.0, "cuda:0")  # a process cannot open its own
    finally:
        published.close()


def tool():
    spec = importlib.util.spec_from_file_location("trtllm_contract", ROOT / "tools" / "trtllm_contract.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.trtllm_live
@with_trtllm
def test_the_facts_are_those_of_the_installed_version(monkeypatch):
    """Nothing has gone, and what our code calls takes what it is given."""
    from aligner.rollout.trtllm_api import check_version

    folder = Path(importlib.util.find_spec("tensorrt_llm").origin).parent
    version = re.search(r'__version__ = "(.*)"', (folder / "version.py").read_text())[1]
    check_version(version)
    found = tool().extract(folder.parent, version)
    nearest = "1.2.1" if version.startswith("1.2") else "main"
    wanted = json.loads((ROOT / "tests" / "contracts" / f"trtllm-{nearest}.json").read_text())
    lost = [line for line in tool().differences(wanted, found) if line.endswith("-> None")]
    assert not lost, "\n".join(lost)
    monkeypatch.setattr(test_contract, "facts", lambda version: found)
    test_contract.test_the_extension_uses_what_every_version_has(nearest)
    test_contract.test_the_sampler_uses_what_every_version_has(nearest)
    test_contract.test_the_extension_s_names_do_not_clash_with_the_worker_s(nearest)
    test_contract.test_the_stand_in_is_called_as_upstream_is(nearest)
    test_contract.test_every_upstream_import_is_pinned(nearest)
    monkeypatch.setattr(test_trtllm, "facts_of", lambda version: found)
    test_trtllm.test_every_version_takes_the_arguments(nearest)
    test_trtllm.test_every_version_takes_the_sampling_parameters(nearest)
    test_trtllm.test_every_version_is_called_as_it_is_written(nearest)


@pytest.mark.trtllm_live
@with_trtllm
@gpu
def test_a_real_engine_passes_the_golden_gate_sleeps_and_wakes(tmp_path):
    from aligner.rollout.trtllm import TrtllmSampler
    from aligner.rollout.trtllm_api import EngineConfig, engine_arguments, load_api

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = save_model(tmp_path / "m", "llama", vocab_size=512, num_hidden_layers=2, head_dim=64, **sizes)
    api, shape = load_api(), ModelShape.from_folder(folder)
    config = EngineConfig(tensor=min(2, torch.cuda.device_count()), max_batch=8, kv_fraction=0.2)
    sampler = TrtllmSampler.start(api, engine_arguments(api, folder, shape.context, config), config)
    names = ("num_layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "tied")
    trainer = Trainer(Model(**{n: getattr(shape, n) for n in names}), 1, 1)
    read = Weights(folder, shape.tensors())
    full = {name: read(name) for name in shape.tensors()}
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    try:
        sampler.attach(asdict(shape), trainer.told)
        for version in range(2):
            trainer.publish(full, version)
            sampler.pull(version)
            rollout = sampler.generate([[1, 2, 3]], Sampling(max_tokens=8), 4)
            assert rollout.weights_version == version
            tokens, mask = rollout.tokens_N.view(4, 11), rollout.action_mask_N.view(4, 11)[:, 1:]
            with torch.no_grad():
                nats = model(tokens).logits.log_softmax(2)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
            assert (nats - rollout.sampler_logprobs_N.view(4, 11)[:, 1:])[mask].abs().max() < 0.1  # bfloat16
            sampler.sleep()
    finally:
        trainer.close()

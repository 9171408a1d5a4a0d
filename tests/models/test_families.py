"""Every model family on tiny random networks: trainer and sampler against transformers, and the refit between them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner.checkpoint import huggingface
from aligner.checkpoint.huggingface import Weights
from aligner.losses.policy import clipped_policy_loss
from aligner.models.shape import COUNTS, ModelShape
from aligner.refit.plan import compile_plan
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling
from tests.conftest import save_model
from tests.models.test_policy import CLIP, logits, make_policy, policy_batch, random_rollout

VOCAB, CONTEXT = 311, 128
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
FAMILIES = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa-4-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-3-scaling": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-scaling": ("llama", {"rope_parameters": LINEAR}),
    "llama-dynamic-scaling": ("llama", {"rope_parameters": DYNAMIC}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-window-over-context": ("mistral", {"sliding_window": CONTEXT, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 40, "num_key_value_heads": 4}),
    "qwen3-tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    family, changes = FAMILIES[request.param]
    return save_model(tmp_path_factory.mktemp("family") / "m", family, vocab_size=VOCAB, **changes)


def random_prompts(lengths: list[int]) -> list[list[int]]:
    g = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]


def test_trainer_logits_equal_transformers(folder: Path):
    policy, reference = make_policy(folder, rank=0), AutoModelForCausalLM.from_pretrained(folder).eval()
    [ids] = random_prompts([CONTEXT])
    with torch.no_grad():
        assert (logits(policy.network, ids) - reference(torch.tensor([ids])).logits[0]).abs().max() <= 1e-4


@torch.no_grad()
def test_greedy_equals_transformers(folder: Path):
    reference, sampler = AutoModelForCausalLM.from_pretrained(folder).eval(), NativeSampler.from_pretrained(folder)
    prompts = random_prompts([1, 7, 40, 88])
    sampling = Sampling(temperature=0, max_tokens=CONTEXT - 88)
    for response in sampler.stream(prompts, sampling):
        ids = torch.tensor([prompts[response.prompt]])
        want = reference.generate(ids, max_new_tokens=sampling.max_tokens, do_sample=False, eos_token_id=None)
        assert response.tokens == want[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_refitted_sampler_and_trainer_agree_on_logprobs(tmp_path, folder: Path, dtype: str, limit: float):
    """The trainer holds the weights that the sampler's dtype can tell apart, and trains adapters."""
    model = AutoModelForCausalLM.from_pretrained(folder).to(getattr(torch, dtype)).float()
    model.save_pretrained(tmp_path / "rounded")
    policy = make_policy(tmp_path / "rounded", rank=0)
    sampler = NativeSampler(policy.shape, dtype=dtype)
    plan = compile_plan(policy.manifest(), sampler.manifest())
    sampler.refit(plan, policy, version=1)
    rollout = sampler.generate(random_prompts([1, 5, 40]), Sampling(max_tokens=40, seed=4), n=2)
    assert (policy.infer(rollout)[0] - rollout.sampler_logprobs_N).abs().max() < limit


@pytest.mark.parametrize("rank", [0, 4])
def test_refit_after_an_update_and_export(tmp_path, folder: Path, rank: int):
    """Trained weights, adapters merged, reach the sampler and a Hugging Face directory alike."""
    policy = make_policy(folder, rank=rank, lr=1e-2)
    sampler = NativeSampler(policy.shape)
    plan = compile_plan(policy.manifest(), sampler.manifest())
    batch = policy_batch(random_rollout(VOCAB, [(2, 6), (3, 4)]))
    tokens = float(batch.weights_N.sum())
    policy.update(batch, lambda lp, h, micro: clipped_policy_loss(lp, h, micro, tokens, **CLIP))
    sampler.refit(plan, policy, version=1)
    rollout = sampler.generate(random_prompts([1, 30]), Sampling(max_tokens=20, seed=4), n=2)
    assert (policy.infer(rollout)[0] - rollout.sampler_logprobs_N).abs().max() < 1e-4

    huggingface.write(tmp_path / "out", policy.hugging_face(), like=folder)
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if "_proj.weight" in name}
    assert before.keys() == after.keys() and (changed == linear if rank else changed == before.keys())
    exported = NativeSampler.from_pretrained(tmp_path / "out")
    assert all(torch.equal(exported.weights[name], tensor) for name, tensor in sampler.weights.items())


def test_dynamic_scaling_ends_at_the_context(tmp_path):
    folder = save_model(tmp_path / "m", "llama", vocab_size=VOCAB, rope_parameters=DYNAMIC)
    with pytest.raises(ValueError, match=f"over the model's context of {CONTEXT}"):
        NativeSampler.from_pretrained(folder).generate([[5] * CONTEXT], Sampling(max_tokens=1))
    with pytest.raises(ValueError, match=f"sequence 1 has {CONTEXT + 1} tokens.*context of {CONTEXT}"):
        make_policy(folder).infer(random_rollout(VOCAB, [(2, 6), (100, CONTEXT - 99)]))


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("gemma", {}, "model_type 'gemma'"),
        ("qwen2_moe", {}, "model_type 'qwen2_moe'"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"num_local_experts": 8}, "num_local_experts = 8"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "rope_type = 'longrope'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ("mistral", {"sliding_window": CONTEXT - 1}, f"sliding_window = {CONTEXT - 1}"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window = 16"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_other_networks_are_refused_by_the_field_that_differs(tmp_path, family: str, changes: dict, field: str):
    (tmp_path / "config.json").write_text(json.dumps(config(family) | changes))
    with pytest.raises(ValueError, match="is not supported|has no") as error:
        ModelShape.from_folder(tmp_path)
    assert field in str(error.value) and str(error.value).count(". ") == 0


@pytest.mark.parametrize("field", [*COUNTS, "rms_norm_eps"])
def test_a_field_that_is_absent_or_no_number_is_named(tmp_path, field: str):
    path, whole = tmp_path / "config.json", config("llama")
    for changed, message in (
        ({n: v for n, v in whole.items() if n != field}, f"config.json: {field} is missing; copy the config.json"),
        (whole | {field: None}, f"config.json: {field} is None, expected a .*number above 0"),
        (whole | {field: "64"}, f"config.json: {field} is '64', expected"),
        (whole | {field: -1}, f"config.json: {field} is -1, expected"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            ModelShape.from_folder(tmp_path)


def test_a_config_that_is_not_json_is_named(tmp_path):
    for text, message in (('{"model_type": ', "not valid JSON"), ("[1]", "got a list at the top, expected an object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            ModelShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config("qwen3") | {"head_dim": "64"}))
    with pytest.raises(ValueError, match="head_dim is '64', expected a whole number"):
        ModelShape.from_folder(tmp_path)


def config(family: str) -> dict:
    return {
        "model_type": family,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }


def test_windows_that_hide_nothing_are_accepted(tmp_path):
    for family, changes in (
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
        ("mistral", {"sliding_window": CONTEXT}),
        ("qwen3", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config(family) | changes))
        assert ModelShape.from_folder(tmp_path).context == CONTEXT


def test_files_hold_exactly_the_tensors_of_the_shape(folder: Path):
    shape = ModelShape.from_folder(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).state_dict().keys() - {"lm_head.weight"} == (
        shape.tensors().keys() - {"lm_head.weight"}
    )
    Weights(folder, shape.tensors())

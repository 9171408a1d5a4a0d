"""The trainers that bench_train.py compares: each takes the same steps, one whenever it is its turn, in its process."""

import dataclasses
import importlib.util
import math
import time
from functools import partial

import torch

from aligner.checkpoint.default_model import default_model
from aligner.run.timers import peak_memory_bytes

PROMPT, BETA, RANK, ALPHA = 64, 0.1, 16, 32.0
ADAMW = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
CLIP = 1.0
HAS_PEFT = importlib.util.find_spec("peft") is not None
HAS_TRL = HAS_PEFT and importlib.util.find_spec("trl") is not None
LINEARS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """method: "sft", "dpo" (the reference's log-probabilities are there), "dpo-reference" (each step makes them)."""

    method: str
    lora: bool

    @property
    def name(self) -> str:
        return f"{self.method} {'lora' if self.lora else 'full'}"


class Turn:
    """Waits until it is this side's turn, and reports what the step took and what came of it."""

    def __init__(self, pipe):
        self.pipe = pipe

    def begin(self) -> None:
        self.pipe.recv()
        self.start = time.perf_counter(), time.process_time()

    def end(self, **values: float) -> None:
        """values: of the step, which must agree between the sides."""
        seconds, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.pipe.send({"seconds": seconds, "cpu": cpu, "peak": peak_memory_bytes(), "values": values})


def factor(layer: int, linear: str, like: torch.Tensor) -> torch.Tensor:
    """An adapter's initial A, the same on every side, so that the losses of the second step agree too."""
    generator = torch.Generator().manual_seed(100 * layer + list(LINEARS).index(linear))
    bound = 1 / math.sqrt(like.shape[1])
    return torch.empty(like.shape).uniform_(-bound, bound, generator=generator)


def aligner(turn: Turn, case: Case, batches: torch.Tensor, micro_batch: int) -> None:
    """batches: (steps, sequences, tokens) int64; for DPO a chosen sequence and its rejected one are neighbours."""
    from aligner.checkpoint.huggingface import Weights
    from aligner.data.batch import PairBatch, PreferenceBatch, SupervisedBatch
    from aligner.losses.preference import direct_preference_loss
    from aligner.losses.supervised import supervised_loss
    from aligner.models.lora import LoRAConfig
    from aligner.models.network import OptimizerConfig
    from aligner.models.policy import Policy
    from aligner.models.shape import ModelShape
    from aligner.ops import segment_sum
    from aligner.run import distributed

    distributed.initialize(torch.get_num_threads())
    shape = ModelShape.from_folder(default_model())
    b1, b2 = ADAMW["betas"]
    policy = Policy(
        shape,
        Weights(default_model(), shape.tensors()),
        lora=LoRAConfig(rank=RANK if case.lora else 0, alpha=ALPHA),
        optimizer=OptimizerConfig(lr=ADAMW["lr"], beta1=b1, beta2=b2, eps=ADAMW["eps"], clip=CLIP),
        tokens_per_micro_batch=micro_batch,
        seed=0,
        reference=case.method == "dpo-reference",
    )
    for name, adapter in policy.network.adapters.items():
        adapter.a.data.copy_(factor(int(name.split(".")[2]), name.split(".")[-1], adapter.a))

    def packed(sequences: torch.Tensor) -> dict[str, torch.Tensor]:
        count, length = sequences.shape
        mask = torch.arange(length) >= (1 if case.method == "sft" else PROMPT)
        ends = torch.arange(count + 1, dtype=torch.int32) * length
        return {"tokens_N": sequences.flatten(), "cu_seqlens": ends, "action_mask_N": mask.repeat(count)}

    def preferences(parts: dict[str, torch.Tensor], logprobs_N: torch.Tensor) -> PreferenceBatch:
        return PreferenceBatch(**parts, reference_logprobs_B=segment_sum(logprobs_N, parts["cu_seqlens"]))

    steps = [packed(sequences) for sequences in batches]
    if case.method == "sft":
        steps = [SupervisedBatch(**parts) for parts in steps]
    if case.method == "dpo":
        steps = [preferences(parts, policy.infer(PairBatch(**parts))[0]) for parts in steps]
    for step in steps:
        turn.begin()
        if case.method == "sft":
            loss = partial(supervised_loss, num_tokens=float(step.action_mask_N.sum()))
        else:
            if case.method == "dpo-reference":
                step = preferences(step, policy.infer_reference(PairBatch(**step)))
            loss = partial(direct_preference_loss, num_pairs=len(batches[0]) / 2, kind="dpo", beta=BETA)
        stats = policy.update(step, lambda logprobs_N, _entropy_N, micro, loss=loss: loss(logprobs_N, micro))
        turn.end(loss=stats["loss"], **({} if case.method == "sft" else {"chosen": -stats["sft_loss"]}))


def _transformers_model(case: Case):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(default_model(), dtype=torch.float32)
    if not case.lora:
        return model
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0))
    linear = {theirs: ours for ours, several in LINEARS.items() for theirs in several}
    for name, p in model.named_parameters():
        if ".lora_A." in name:
            parts = name.split(".")
            p.data.copy_(factor(int(parts[parts.index("layers") + 1]), linear[parts[-4]], p))
    return model


def trl(turn: Turn, case: Case, batches: torch.Tensor, _micro_batch: int) -> None:
    """TRL's SFTTrainer and DPOTrainer, with its defaults for the attention, the head and the optimizer."""
    import tempfile

    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    sft = case.method == "sft"

    class Trainer(SFTTrainer if sft else DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset or self.train_dataset)

        def _prepare_dataset(self, dataset, *_args, **_kwargs):
            return dataset  # token ids already

        def compute_loss(self, *args, **kwargs):
            self.loss = super().compute_loss(*args, **kwargs)
            return self.loss

    class Taking(TrainerCallback):
        def on_step_begin(self, *_args, **_kwargs):
            turn.begin()

        def on_step_end(self, *_args, **_kwargs):
            metrics = trainer._metrics["train"]
            turn.end(loss=trainer.loss.item(), **({} if sft else {"chosen": metrics["logps/chosen"][-1]}))

    if sft:
        rows = {"input_ids": batches.flatten(0, 1).tolist(), "labels": batches.flatten(0, 1).tolist()}
    else:
        chosen, rejected = batches[:, 0::2].flatten(0, 1), batches[:, 1::2].flatten(0, 1)
        rows = {"prompt_ids": chosen[:, :PROMPT].tolist()}
        rows |= {"chosen_ids": chosen[:, PROMPT:].tolist(), "rejected_ids": rejected[:, PROMPT:].tolist()}
    only = {"max_length": None}
    only |= {"dataset_kwargs": {"skip_prepare_dataset": True}} if sft else {}
    only |= {} if sft else {"beta": BETA, "precompute_ref_log_probs": case.method == "dpo"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (SFTConfig if sft else DPOConfig)(
            output_dir=folder,
            per_device_train_batch_size=len(batches[0]) if sft else len(batches[0]) // 2,
            max_steps=len(batches),
            learning_rate=ADAMW["lr"],
            adam_beta1=ADAMW["betas"][0],
            adam_beta2=ADAMW["betas"][1],
            adam_epsilon=ADAMW["eps"],
            weight_decay=ADAMW["weight_decay"],
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **only,
        )
        trainer = Trainer(
            model=_transformers_model(case),
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=AutoTokenizer.from_pretrained(default_model()),
            callbacks=[Taking()],
        )
        trainer.train()


def transformers(turn: Turn, case: Case, batches: torch.Tensor, _micro_batch: int) -> None:
    """The model of transformers, its logits, torch's fused AdamW: the loop that one writes without a trainer."""
    model = _transformers_model(case).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True, **ADAMW)

    def sums(ids: torch.Tensor) -> torch.Tensor:
        kept = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - PROMPT + 1).logits[:, :-1]
        return kept.log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0].sum(-1)

    if case.method == "dpo":
        with torch.no_grad():
            reference = [sums(ids) for ids in batches]
    for number, ids in enumerate(batches):
        turn.begin()
        values = {}
        if case.method == "sft":
            loss = model(ids, labels=ids, use_cache=False).loss
        else:
            sums_B = sums(ids)
            ratio_B = sums_B - reference[number]
            loss = -torch.nn.functional.logsigmoid(BETA * (ratio_B[0::2] - ratio_B[1::2])).mean()
            values = {"chosen": float(sums_B[0::2].detach().mean())}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turn.end(loss=loss.item(), **values)


SIDES = {"aligner": aligner, "trl": trl, "transformers": transformers}


def serve(side: str, pipe, threads: int, *arguments) -> None:
    """Run one side in this process, which is its own."""
    torch.set_num_threads(threads)
    SIDES[side](Turn(pipe), *arguments)

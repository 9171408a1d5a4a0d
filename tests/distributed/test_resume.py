"""A checkpoint of one layout goes on in another as if nothing had happened."""

import dataclasses
import os

import pytest

from aligner.run.distributed import ParallelConfig
from tests.distributed.test_layouts import TOLERANCE, outcomes, small_models
from tests.distributed.updates import Case

models = pytest.fixture(scope="module")(small_models)
PLAIN = [Case(method="sft", model="tied"), Case(method="dpo", model="untied", lora=True)]
SHARDED = [Case(method="sft", model="untied"), Case(method="dpo", model="tied", lora=True)]


def work(kind: str, cases: list[Case], **layout) -> list[Case]:
    return [dataclasses.replace(c, work=kind, layout=ParallelConfig(**layout)) for c in cases]


def sharded(kind: str, **layout) -> list[Case]:
    return work(kind, SHARDED, distributed_optimizer=True, **layout)


@pytest.mark.slow
def test_three_steps_then_three_on_another_layout(models, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    two = [
        *work("save", PLAIN, tensor=2),
        *work("resume", PLAIN, tensor=2),
        *work("resume", PLAIN, pipeline=2),
        *work("resume", PLAIN, pipeline=2, virtual_pipeline=2),
        *work("resume", PLAIN, context=2),
        *work("resume", PLAIN),
        *sharded("save"),
        *sharded("resume"),
        *sharded("resume", tensor=2, sequence=True),
        *sharded("resume", pipeline=2),
    ]
    one = [*work("resume", PLAIN), *sharded("resume")]
    found = [*zip(two, outcomes(2, models, two, tmp_path), strict=True)]
    found += zip(one, outcomes(1, models, one, tmp_path), strict=True)
    whole = {case.key: stats for case, stats in found if case.work == "save"}
    assert len(whole) == 4 and all(len(stats) == 6 for stats in whole.values())
    for case, stats in found:
        if case.work == "resume":
            for got, want in zip(stats, whole[case.key][3:], strict=True):
                for name in want:
                    assert abs(got[name] - want[name]) <= 1e-6 + TOLERANCE * abs(want[name]), (case, name)
    assert all(abs(s[3]["loss"] - s[0]["loss"]) > 1e-3 for s in whole.values())  # the steps differ

"""Every method learns a task whose answer is known; bandit.py has the task."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from tests.programs.bandit import (
    EMPIRICAL_V,
    PROMPTS,
    REWARDS_V,
    VOCABULARY,
    WEIGHTS_V,
    chat,
    divergence,
    log_probabilities,
    matches,
    optimum,
    pair_rows,
    prompt_rows,
    response_rows,
    save_bandit,
    weight,
    write,
)
from tests.programs.runs import metrics, run

pytestmark = pytest.mark.slow

BETA = 0.5
STEPS = 50
DATA_PV = EMPIRICAL_V.expand(len(PROMPTS), -1)


def falling(prefix: str = "", steps: int = STEPS) -> dict:
    """All weights, at a learning rate that ends at 0."""
    options = {"lora.rank": 0, "optimizer.lr": 1e-2, "optimizer.decay-steps": steps}
    return {prefix + name: value for name, value in options.items()}


ONLINE = {
    "steps": STEPS,
    "eval-prompts": 0,
    "reward.function": "tests.programs.rewards:bandit",
    "sampling.max-tokens": 1,
    "batch.sequences": 256,
    "batch.minibatch-sequences": 256,
    "batch.samples-per-prompt": 128,
    "batch.tokens-per-micro-batch": 16384,
}
OFFLINE = {"steps": STEPS, "batch.tokens-per-micro-batch": 16384, **falling()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_bandit(tmp_path_factory.mktemp("bandit") / "model")


@pytest.fixture(scope="module")
def start_PV(model: Path) -> Tensor:
    """The reference's log-probabilities."""
    return log_probabilities(model)


@pytest.fixture
def learn(model: Path, tmp_path):
    """(program, rows of its data, options) -> the run's folder."""

    def whole(program: str, rows: list[dict], options: dict) -> Path:
        data = write(tmp_path / "data.jsonl", rows)
        return run(program, tmp_path / "run", {"model": model, "data": data} | options)

    return whole


def check_learnt(learnt_PV: Tensor, wanted_PV: Tensor, start_PV: Tensor, bound: float) -> None:
    """Within `bound` nats of what is wanted, and at a twentieth at most of where it was."""
    distance, before = divergence(learnt_PV, wanted_PV), divergence(start_PV, wanted_PV)
    assert (distance < bound).all() and (distance < before / 20).all(), (distance, before)


def test_the_task_is_not_solved_at_the_start(start_PV):
    best_PV = optimum(start_PV, BETA)
    assert (divergence(start_PV, best_PV) > 0.3).all() and (divergence(start_PV, DATA_PV) > 0.2).all()
    assert divergence(best_PV[:1], best_PV[1:]).item() > 0.1  # an answer for both prompts would not do
    assert {1, 2, 3} == set(WEIGHTS_V.tolist())


@pytest.mark.parametrize("epochs", [1, 2])
def test_ppo(learn, start_PV, epochs: int):
    """Whitening scales reward and penalty alike: where the advantages of all tokens are equal is where it was."""
    networks = falling("policy.", STEPS * epochs) | falling("critic.", STEPS * epochs) | {"critic.layers": 0}
    done = learn("ppo", prompt_rows(), ONLINE | networks | {"kl-coef": BETA, "batch.epochs": epochs})
    check_learnt(log_probabilities(done / "policy"), optimum(start_PV, BETA), start_PV, 0.002)
    assert metrics(done)[-1]["explained_variance"] > 0.9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": "sequence", "average": "sequence"},
        {"ratio": "cispo", "clip-low": 1, "clip-high": 4},
        {"correction": "tis"},
        {"correction": "icepop"},
    ],
)
def test_grpo(learn, start_PV, options: dict):
    dr_grpo = {"baseline": "dr_grpo", "kl-coef": BETA, "kl-estimator": "k2"}
    done = learn("grpo", prompt_rows(), ONLINE | falling() | dr_grpo | options)
    check_learnt(log_probabilities(done / "policy"), optimum(start_PV, BETA), start_PV, 0.005)


def test_grpo_with_k3_penalises_the_other_divergence(learn, start_PV):
    """Its gradient is that of KL(reference || policy): pi = beta pi_ref / (multiplier - reward)."""
    done = learn("grpo", prompt_rows(), ONLINE | falling() | {"baseline": "dr_grpo", "kl-coef": BETA})
    low, high = (REWARDS_V.max() + torch.full((2, 1), x, dtype=torch.float64) for x in (1e-9, 9.0))
    for _ in range(100):  # the multiplier that makes it a distribution, by bisection
        middle = (low + high) / 2
        too_small = (BETA * start_PV.exp() / (middle - REWARDS_V)).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
    wanted_PV = (BETA * start_PV.exp() / (middle - REWARDS_V)).log()
    assert torch.allclose(wanted_PV.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    learnt_PV = log_probabilities(done / "policy")
    check_learnt(learnt_PV, wanted_PV, start_PV, 0.005)
    assert (divergence(learnt_PV, optimum(start_PV, BETA)) > 0.02).all()


@pytest.mark.parametrize(
    ("options", "bound"),
    [({}, 0.001), ({"kl-in": "loss"}, 0.005), ({"baseline": "reinforce_pp"}, 0.001)],
)
def test_reinforce(learn, start_PV, options: dict, bound: float):
    done = learn("reinforce", prompt_rows(), ONLINE | falling() | {"kl-coef": BETA} | options)
    check_learnt(log_probabilities(done / "policy"), optimum(start_PV, BETA), start_PV, bound)


def test_rejection_sampling(learn, start_PV):
    """One step, and the policy is the best of four: of the tokens of one reward, each as often as before."""
    n, epochs = 4, 40
    sizes = {"batch.sequences": 2048, "batch.minibatch-sequences": 2048, "batch.samples-per-prompt": n}
    options = sizes | {"steps": 1, "batch.epochs": epochs} | falling(steps=epochs)
    done = learn("rejection_sampling", prompt_rows(256), ONLINE | options)
    start, best = start_PV.exp(), torch.zeros_like(start_PV)
    for reward in REWARDS_V.unique():
        at, up_to = reward == REWARDS_V, start[:, reward >= REWARDS_V].sum(-1, keepdim=True)
        here = start[:, at]
        best[:, at] = here / here.sum(-1, keepdim=True) * (up_to**n - (up_to - here.sum(-1, keepdim=True)) ** n)
    assert torch.allclose(best.sum(-1), torch.ones(2, dtype=torch.float64))
    learnt_PV = log_probabilities(done / "policy")
    assert (divergence(learnt_PV, best.log()) < 0.06).all() and (divergence(start_PV, best.log()) > 0.4).all()
    gained, possible = ((p - start) @ REWARDS_V for p in (learnt_PV.exp(), best))
    assert (possible > 0.4).all() and (gained > 0.85 * possible).all()
    kept = float((best @ REWARDS_V).mean())  # 512 of them
    assert metrics(done)[-1]["reward/kept"] == pytest.approx(kept, abs=0.1)


def test_dpo(learn, start_PV):
    """On preferences that follow the reward exactly, its optimum is that of the reward under the same beta."""
    rows = pair_rows(PROMPTS[:1])
    done = learn("dpo", rows, OFFLINE | {"batch.examples": len(rows), "beta": BETA})
    learnt_PV = log_probabilities(done / "policy")[:1]
    check_learnt(learnt_PV, optimum(start_PV, BETA)[:1], start_PV[:1], 0.002)
    implicit_V = BETA * (learnt_PV - start_PV[:1])[0]
    assert ((implicit_V - REWARDS_V).std() < 0.05) and REWARDS_V.std() > 0.3


def test_ipo(learn, start_PV):
    """Least squares of delta against +-1 / (2 beta): a linear system over the ring of comparisons."""
    size = len(VOCABULARY)
    laplacian, pull_V = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for (a, b), count in matches().items():
        edge = torch.zeros(size, dtype=torch.float64)
        edge[a], edge[b] = 1, -1
        laplacian += count * torch.outer(edge, edge)
        pull_V += count * edge / (2 * BETA)
    wanted_PV = (start_PV + torch.linalg.pinv(laplacian) @ pull_V).log_softmax(-1)[:1]
    rows = pair_rows(PROMPTS[:1])
    done = learn("dpo", rows, OFFLINE | {"loss": "ipo", "batch.examples": len(rows), "beta": BETA})
    learnt_PV = log_probabilities(done / "policy")[:1]
    check_learnt(learnt_PV, wanted_PV, start_PV[:1], 0.002)
    assert divergence(learnt_PV, optimum(start_PV, BETA)[:1]) > 0.1  # not what DPO finds


def test_kto(learn, start_PV):
    """Of responses that the reference gave, the desirable tokens all rise above it and the others all fall."""
    rows = [
        {"prompt": chat(prompt), "completion": text, "label": weight(text) > 1}
        for prompt, probabilities in zip(PROMPTS, start_PV.exp().tolist(), strict=True)
        for text, p in zip(VOCABULARY, probabilities, strict=True)
        for _ in range(max(1, round(100 * p)))
    ]
    done = learn("kto", rows, OFFLINE | {"steps": 40, "batch.examples": len(rows), "beta": BETA})
    log_ratio_PV, desirable = log_probabilities(done / "policy") - start_PV, WEIGHTS_V > 1
    assert 5 < desirable.sum() < 15
    assert (log_ratio_PV[:, desirable] > 0.05).all() and (log_ratio_PV[:, ~desirable] < -2).all()
    last = metrics(done)[-1]
    assert last["rewards/chosen"] > 0.1 and last["rewards/rejected"] < -1


def test_sft(learn, start_PV):
    rows = response_rows()
    done = learn("sft", rows, OFFLINE | {"batch.examples": len(rows)})
    assert (divergence(DATA_PV, log_probabilities(done / "policy")) < 0.001).all()
    entropy = -float(EMPIRICAL_V.exp() @ EMPIRICAL_V)
    assert metrics(done)[-1]["loss"] == pytest.approx(entropy, abs=0.002)


def spin(learn, iterations: int, steps: int) -> Tensor:
    rows = response_rows() * 4
    options = {"beta": 2.0, "iterations": iterations, "steps": steps, "sampling.max-tokens": 1}
    done = learn("spin", rows, OFFLINE | falling(steps=iterations * steps) | options | {"batch.examples": len(rows)})
    return log_probabilities(done / "policy")


def test_one_iteration_of_spin(learn, start_PV):
    """An iteration ends at pi_k (p_data / pi_k)^(1 / beta): with beta 2 at the geometric mean."""
    wanted_PV = ((start_PV + DATA_PV) / 2).log_softmax(-1)
    distance = divergence(spin(learn, 1, 45), wanted_PV)
    assert (distance < 0.005).all() and (divergence(start_PV, wanted_PV) > 0.05).all()


def test_spin_converges_to_the_data(learn, start_PV):
    distance = divergence(DATA_PV, spin(learn, 3, 15))
    assert (distance < 0.02).all() and (distance < divergence(DATA_PV, start_PV) / 15).all()


@pytest.mark.parametrize("loss", ["forward_kl", "backward_kl"])
def test_distillation(learn, start_PV, tmp_path, loss: str):
    """All of the teacher's distribution is handed over, of which the data shows one token each time."""
    teacher = save_bandit(tmp_path / "teacher", num_hidden_layers=2, hidden_size=48)
    teacher_PV = log_probabilities(teacher)
    rows = [{"prompt": chat(prompt), "completion": "w1"} for prompt in PROMPTS]
    options = {"teacher": teacher, "top-k": len(VOCABULARY), "loss": loss, "batch.examples": len(rows)}
    done = learn("distill", rows, OFFLINE | options)
    check_learnt(log_probabilities(done / "policy"), teacher_PV, start_PV, 0.001)


def test_steerlm2(learn, start_PV):
    """Of responses that are all there are: pi = P(a | x, y) P(y | x) / Z, whoever proposed them."""
    likely_V, base_V = REWARDS_V - 2, EMPIRICAL_V
    rows = [
        {
            "prompt_turns": [{"from": "User", "value": prompt}],
            "responses": [
                {
                    "from": "Assistant",
                    "value": text,
                    "log(P(a|x,y))": float(likely_V[i]),
                    "log(P(y|x))": float(base_V[i]),
                    "log(Q(y|a,x))": float(proposed_V[i]),
                }
                for i, text in enumerate(VOCABULARY)
            ],
        }
        for prompt, proposed_V in zip(PROMPTS, start_PV, strict=True)
    ]
    done = learn("steerlm", rows, OFFLINE | {"loss": "steerlm2", "batch.examples": len(rows)})
    wanted_PV = (likely_V + base_V).log_softmax(-1).expand(len(PROMPTS), -1)
    check_learnt(log_probabilities(done / "policy"), wanted_PV, start_PV, 0.002)
    assert metrics(done)[-1]["distance"] < 0.002 < 0.3 < metrics(done)[1]["distance"]


def scores(folder: Path) -> Tensor:
    """(vocabulary, attributes) float64: of each response to the first prompt, by transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    model.config.pad_token_id = None  # <unk>, which here is a response
    prompt = [VOCABULARY.index(word) for word in PROMPTS[0].split()]
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[*prompt, token]])).logits for token in range(len(VOCABULARY))])


def test_reward_model_of_pairs(learn):
    """Bradley and Terry's scores are the rewards, up to a constant, and order all responses as they do."""
    rows = pair_rows(PROMPTS[:1])
    done = learn("reward_model", rows, OFFLINE | {"batch.examples": len(rows)})
    score_V = scores(done / "policy")[:, 0]
    error_V = (score_V - score_V.mean()) - (REWARDS_V - REWARDS_V.mean())
    assert error_V.abs().max() < 0.05 and REWARDS_V.std() > 0.3
    above = REWARDS_V[:, None] > REWARDS_V
    assert (score_V[:, None] > score_V)[above].all()


def test_reward_model_of_ratings(learn):
    rows = [
        {"prompt": chat(PROMPTS[0]), "response": text, "label": [weight(text), (i % 5) / 4]}
        for i, text in enumerate(VOCABULARY)
    ]
    options = falling(steps=120) | {"steps": 120, "loss": "regression", "batch.examples": len(rows)}
    done = learn("reward_model", rows, OFFLINE | options)
    ratings_VK = torch.tensor([row["label"] for row in rows], dtype=torch.float64)
    assert (scores(done / "policy") - ratings_VK).abs().max() < 0.03
    assert metrics(done)[-1]["absolute_error"] < 0.01

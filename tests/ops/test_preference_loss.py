import pytest
import torch
from three_way import assert_three_way

from aligner import ops
from aligner.ops.preference_loss import KINDS, STATS

SETTINGS = dict(label_smoothing=0.1, margin=0.6, reward_scale=0.7, sft_coef=0.2)


def case(n, kind, spread=3.0):
    generator = torch.Generator().manual_seed(n)
    averaged = kind in ("simpo", "orpo")
    policy = [-(1e-3 + torch.rand(n, generator=generator)) * spread - (0 if averaged else 50) for _ in range(2)]
    references = [p + torch.randn(n, generator=generator) * spread for p in policy]
    rewards = [torch.randn(n, generator=generator) for _ in range(2)]
    return policy, references, rewards


def textbook(policy, references, rewards, num_pairs, kind, beta, label_smoothing, margin, reward_scale, sft_coef):
    """In probabilities rather than logarithms, which float64 can afford at moderate margins."""
    chosen, rejected = policy
    s = torch.sigmoid
    if kind in ("simpo", "orpo"):
        references = [torch.zeros_like(chosen)] * 2
    rewards_c, rewards_r = beta * (chosen - references[0]), beta * (rejected - references[1])
    x, y, e = rewards_c - rewards_r, reward_scale * (rewards[0] - rewards[1]), label_smoothing
    if kind == "dpo":
        loss = -torch.log(s(x))
    elif kind == "cdpo":
        loss = -(1 - e) * torch.log(s(x)) - e * torch.log(s(-x))
    elif kind == "rdpo":
        loss = (-(1 - e) * torch.log(s(x)) + e * torch.log(s(-x))) / (1 - 2 * e)
    elif kind == "ipo":
        loss = ((x / beta) - 1 / (2 * beta)) ** 2
    elif kind == "rpo_sq":
        loss = (x - y) ** 2
    elif kind in ("rpo_fwd_kl", "rpo_bwd_kl"):
        model, data = torch.distributions.Bernoulli(s(x)), torch.distributions.Bernoulli(s(y))
        kl = torch.distributions.kl_divergence
        loss = kl(model, data) if kind == "rpo_fwd_kl" else kl(data, model)
    elif kind == "simpo":
        loss = -torch.log(s(beta * chosen - beta * rejected - margin))
    else:
        odds = [p.exp() / (1 - p.exp()) for p in policy]
        loss = -beta * torch.log(s(torch.log(odds[0] / odds[1])))
    terms = (loss, -chosen, (x > 0).double(), rewards_c, rewards_r, x)
    means = [t.sum() / num_pairs for t in terms]
    return means[0] + sft_coef * means[1], dict(zip(STATS, means, strict=True))


def evaluate(function, policy, dtype):
    policy = [p.detach().to(dtype).requires_grad_() for p in policy]
    loss, stats = function(policy)
    d_chosen, d_rejected = torch.autograd.grad(3 * loss, policy)
    named = {"loss": loss.detach(), "d_chosen": d_chosen, "d_rejected": d_rejected}
    return named | {name: x.detach() for name, x in stats.items()}


def check(kind, policy, references, rewards, beta, epsilon=5e-7):
    num_pairs = 0.5 * len(policy[0]) + 1

    def call(impl):
        return lambda p: ops.preference_loss(
            *p,
            *(None, None) if kind in ("simpo", "orpo") else references,
            num_pairs,
            kind=kind,
            beta=beta,
            reward_chosen_B=rewards[0],
            reward_rejected_B=rewards[1],
            impl=impl,
            **SETTINGS,
        )

    doubles = [[t.double() for t in pair] for pair in (references, rewards)]
    truth = evaluate(lambda p: textbook(p, *doubles, num_pairs, kind, beta, **SETTINGS), policy, torch.float64)
    eager, kernel = evaluate(call("reference"), policy, torch.float32), evaluate(call("cpp"), policy, torch.float32)
    for name in truth:
        assert_three_way(truth[name], eager[name], kernel[name], epsilon=epsilon, what=f"{kind} {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 7, 16, 1003, 10007])
def test_three_way(isa, kind, n):
    check(kind, *case(n, kind), beta=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_wide_margins(isa, kind):
    check(kind, *case(333, kind, spread=5.0), beta=2.0, epsilon=2e-6)


@pytest.mark.parametrize("kind", ["dpo", "cdpo", "rdpo", "rpo_fwd_kl", "rpo_bwd_kl", "ipo", "rpo_sq"])
def test_margins_beyond_the_sigmoid(isa, kind):
    # Log-ratios of +-1e4: the sigmoid is 0 or 1 to every digit, the loss is the margin itself.
    policy, zeros = [torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])], [torch.zeros(2)] * 2
    policy = [p.requires_grad_() for p in policy]
    settings = dict(kind=kind, beta=1.0, label_smoothing=0.0, reward_chosen_B=zeros[0], reward_rejected_B=zeros[1])
    loss, _ = ops.preference_loss(*policy, *zeros, 1.0, impl="cpp", **settings)
    want, _ = ops.preference_loss(*(p.double() for p in policy), *(z.double() for z in zeros), 1.0, **settings)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss, policy)
    assert all(g.isfinite().all() for g in gradients)


def test_orpo_near_certainty(isa):
    # p = 1 - 1e-5: 1 - p has few digits left in float32, log(p / (1 - p)) keeps them all.
    logp = torch.tensor([-1e-5, -0.69, -0.70, -20.0])
    truth = torch.log(torch.exp(logp.double()) / -torch.expm1(logp.double()))
    rejected = torch.full((4,), -0.6931471805599453)  # log-odds of about 0
    for i in range(4):
        loss, _ = ops.preference_loss(logp[i : i + 1], rejected[:1], None, None, 1.0, kind="orpo", beta=1.0, impl="cpp")
        odds = truth[i] - torch.log(torch.exp(rejected[0].double()) / -torch.expm1(rejected[0].double()))
        torch.testing.assert_close(loss.double(), -torch.nn.functional.logsigmoid(odds), rtol=1e-5, atol=0)


def test_micro_batches_add_up(isa):
    policy, references, rewards = case(501, "dpo")

    def call(at):
        return ops.preference_loss(*(t[at] for t in (*policy, *references)), 333.0, kind="dpo", beta=0.1, impl="cpp")

    whole, parts = call(slice(None)), [call(slice(0, 100)), call(slice(100, None))]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    for name in whole[1]:
        torch.testing.assert_close(sum(p[1][name] for p in parts), whole[1][name])


def test_gradcheck():
    for kind in KINDS:
        policy, references, rewards = ([t.double() for t in pair] for pair in case(5, kind))
        policy = [p.requires_grad_() for p in policy]
        settings = dict(kind=kind, beta=0.3, reward_chosen_B=rewards[0], reward_rejected_B=rewards[1], **SETTINGS)
        assert torch.autograd.gradcheck(
            lambda c, r, s=settings, ref=references: ops.preference_loss(c, r, *ref, 5.0, **s)[0], policy
        ), kind


def test_errors():
    policy, references, rewards = case(4, "dpo")

    def call(kind="dpo", beta=0.1, refs=references, num_pairs=4.0, **more):
        return ops.preference_loss(*policy, *refs, num_pairs, kind=kind, beta=beta, **more)

    with pytest.raises(ValueError, match="kind is 'hinge', expected dpo, cdpo"):
        call("hinge")
    with pytest.raises(ValueError, match="beta is 0, expected more than 0"):
        call(beta=0)
    with pytest.raises(ValueError, match="num_pairs is 0"):
        call(num_pairs=0)
    with pytest.raises(ValueError, match="label_smoothing is 0.5"):
        call("cdpo", label_smoothing=0.5)
    with pytest.raises(ValueError, match="kind ipo needs ref_chosen_B and ref_rejected_B, got None"):
        call("ipo", refs=(None, None))
    with pytest.raises(ValueError, match="kind rpo_sq needs reward_chosen_B and reward_rejected_B"):
        call("rpo_sq")
    with pytest.raises(RuntimeError, match=r"ref_chosen must be CPU Float of shape \[4\], got CPU Float of"):
        call(refs=(references[0][:2], references[1]))
    with pytest.raises(ValueError, match="policy_chosen is float64"):
        ops.preference_loss(policy[0].double(), policy[1], *references, 4.0, kind="dpo", beta=0.1, impl="cpp")


def test_opcheck_and_compile():
    policy, references, rewards = case(19, "rpo_sq")
    policy = [p.requires_grad_() for p in policy]
    arguments = (*policy, *references, *rewards, 19.0, "rpo_sq", 0.1, 0.1, 0.5, 1.0, 0.2)
    torch.library.opcheck(torch.ops.aligner.preference_loss.default, arguments)

    def call(chosen, rejected):
        loss, stats = ops.preference_loss(chosen * 2, rejected, *references, 19.0, kind="cdpo", beta=0.1)
        return loss + stats["accuracy"]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*policy), policy) for f in (compiled, call))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

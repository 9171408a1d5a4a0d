"""The accuracy standard of an operator: float64 truth, eager in the working dtype, the kernel."""

import torch

# Half a unit in the last place of each dtype: what merely storing a result may cost.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def assert_three_way(truth, eager, kernel, *, epsilon: float, what: str = "") -> None:
    """|kernel - truth| <= 2 |eager - truth| + epsilon + 4 roundings of the stored value, for every element.

    epsilon: absolute, in the unit of the result.
    """
    assert kernel.shape == truth.shape == eager.shape, what
    assert kernel.dtype == eager.dtype, what
    rounding = 4 * ROUNDING[kernel.dtype] * truth.abs().nan_to_num(posinf=0.0)
    same = (kernel.double() == truth) | (kernel.isnan() & truth.isnan())
    error = (kernel.double() - truth).abs()
    bound = 2 * (eager.double() - truth).abs().nan_to_num(posinf=0.0) + epsilon + rounding
    bad = ~(same | (error <= bound))
    assert not bad.any(), (
        f"{what}: {int(bad.sum())} of {bad.numel()} elements off, first truth {truth[bad][0].item()}, "
        f"eager {eager[bad][0].item()}, kernel {kernel[bad][0].item()}"
    )

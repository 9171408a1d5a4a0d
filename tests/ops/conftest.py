import pytest

from aligner import ops

ISAS = ["portable", "avx2"]


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test once per instruction set of the CPU kernels."""
    detected = ops.cpu_isa("")
    if request.param == "avx2" and detected != "avx2":
        pytest.skip("this machine has no AVX2")
    assert ops.cpu_isa(request.param) == request.param
    yield request.param
    ops.cpu_isa("")

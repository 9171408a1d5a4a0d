import pytest

from aligner import ops

ISAS = ["portable", "avx2", "avx512"]  # each machine has all up to its best


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test once per instruction set of the CPU kernels."""
    detected = ops.cpu_isa("")
    if ISAS.index(request.param) > ISAS.index(detected):
        pytest.skip(f"this machine has no {request.param}")
    assert ops.cpu_isa(request.param) == request.param
    yield request.param
    ops.cpu_isa("")

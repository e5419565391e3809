"Properties of the transform that a reader of the notebook would skip"
import hashlib
import struct
import pytest, torch
from hypothesis import given, settings, strategies as st

from hlwq.core import ConfigError
from hlwq.hadamard import butterflies, fwht, hadamard_matrix


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10), st.integers(0, 40), st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_fwht_is_the_matrix_and_its_own_inverse(k, rows, seed, dtype):
    n, g = 2**k, torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=g).to(dtype)
    y = fwht(x)
    assert y.shape == x.shape and y.dtype == torch.float32
    torch.testing.assert_close(y, (x.double() @ hadamard_matrix(n, normalised=False).double() * n**-0.5).float(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(fwht(y), x.float(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(y.norm(), x.float().norm(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('n', [1, 2, 4, 64, 128, 256, 1024])
def test_integers_are_exact(n):
    x = torch.randint(-1000, 1000, (n, 7), generator=torch.Generator().manual_seed(n)).float()
    assert torch.equal(butterflies(x.clone()), hadamard_matrix(n, normalised=False) @ x)


@pytest.mark.parametrize('dim', [0, 1, 2, -1])
def test_any_axis(dim):
    x = torch.randn(8, 16, 4, generator=torch.Generator().manual_seed(0))
    want = butterflies(x.movedim(dim, 0).contiguous().clone()).movedim(0, dim)
    assert torch.equal(butterflies(x.clone(), dim=dim), want)


def test_result_buffer_alternates():
    for k in range(8):
        y, z = torch.zeros(2**k, 3), torch.zeros(2**k, 3)
        assert butterflies(y, z) is (z if k % 2 else y)


def test_golden_bits():
    "Sums in the fixed order: these bytes may never change on any machine"
    x = ((torch.arange(6*128) * 2654435761 % 2**24).float() / 2**24 - 0.5).view(6, 128)
    y = butterflies(x.T.contiguous())
    ref = x.T.tolist()
    h = 64                                         # the same in Python: float32 rounding after each operation
    f32 = lambda v: struct.unpack('f', struct.pack('f', v))[0]
    while h:
        for i in range(0, 128, 2*h):
            for j in range(i, i+h): ref[j], ref[j+h] = [f32(a+b) for a, b in zip(ref[j], ref[j+h])], [f32(a-b) for a, b in zip(ref[j], ref[j+h])]
        h //= 2
    assert y.tolist() == ref
    assert hashlib.sha256(y.numpy().tobytes()).hexdigest()[:16] == '8b4296a67531140d'


def test_any_chunk_and_thread_count_gives_the_same_bits():
    x = torch.randn(3001, 128, generator=torch.Generator().manual_seed(0))
    whole, threads = fwht(x), torch.get_num_threads()
    for r in (1, 2, 999, 1000, 1001, 2999): assert torch.equal(fwht(x[:r]), whole[:r])
    try:
        for t in (1, 3):
            torch.set_num_threads(t)
            assert torch.equal(fwht(x), whole)
    finally: torch.set_num_threads(threads)


def test_awkward_inputs():
    x = torch.randn(128, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fwht(x.T), fwht(x.T.contiguous()))
    assert torch.equal(fwht(x.T[::3]), fwht(x.T[::3].contiguous()))
    kept = x.clone()
    fwht(x.T)
    assert torch.equal(x, kept), 'the input is left alone'
    assert fwht(torch.zeros(2, 0, 128)).shape == (2, 0, 128)
    assert (fwht(torch.zeros(3, 128)) == 0).all()
    w = torch.nn.Parameter(torch.randn(2, 128))
    assert not fwht(w).requires_grad
    assert fwht(torch.full((2, 128), 2.6e36)).isfinite().all()
    assert fwht(torch.tensor([float('nan')]*128)).isnan().all(), 'not-a-number is passed on, for the quantizer to refuse'


@pytest.mark.parametrize('x, found', [(torch.zeros(3, 100), 'last axis: 100'), (torch.zeros(3, 0), 'last axis: 0'), (torch.tensor(1.), 'last axis: 0'),
                                      (torch.zeros(128, dtype=torch.int64), 'torch.int64'), (torch.zeros(128, dtype=torch.complex64), 'torch.complex64')])
def test_errors(x, found):
    with pytest.raises(ConfigError, match=found): fwht(x)


@pytest.mark.parametrize('n', [0, -2, 3, 127])
def test_matrix_errors(n):
    with pytest.raises(ConfigError, match='need a power of two'): hadamard_matrix(n)
    if n > 0:
        with pytest.raises(ConfigError, match='butterflies axis'): butterflies(torch.zeros(n, 2))

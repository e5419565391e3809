"Properties of the codebooks that a reader of the notebook would skip"
import json, math, subprocess, sys
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st

from hlwq.core import ConfigError
from hlwq.lloyd_max import CODEBOOKS, Codebook, codebook, gaussian_cells, lloyd_max, outer_share

WIDTHS, NAMES = range(1, 9), list(CODEBOOKS)


def residual64(centroids):
    "Largest violation of the centroid condition, boundaries in float64"
    c = np.array(centroids)
    prob, moment = gaussian_cells([-math.inf, *(c[1:] + c[:-1])/2, math.inf])
    return np.abs(c - moment/prob).max()


@pytest.mark.parametrize('bits', WIDTHS)
def test_converged_to_float32(bits):
    o = lloyd_max(bits)
    assert 0 < o.n_iter < 100 and o.bits == bits and o.centroids.shape == (2**bits,) and o.centroids.dtype == torch.float32
    assert residual64(o.tolist()) < 6e-7                      # what rounding a number near 4 to float32 leaves
    assert o == lloyd_max(bits, tol=1e-12) == lloyd_max(bits, tol=1e-6)    # the last step squares the error


@pytest.mark.parametrize('bits', WIDTHS)
def test_no_small_change_lowers_the_error(bits):
    best, g = lloyd_max(bits), torch.Generator().manual_seed(bits)
    for size in (1e-3, 1e-2):
        for _ in range(20):
            moved = best.centroids + size*torch.randn(2**bits, generator=g)/2**bits
            assert Codebook('moved', bits, moved.sort().values).mse > best.mse


@pytest.mark.parametrize('bits,mse', [(1, '0.36338'), (2, '0.11748'), (3, '0.03455'), (4, '0.009501'), (5, '0.0025047'), (6, '0.0006442')])
def test_classical_errors(bits, mse): assert f'{lloyd_max(bits).mse:.{len(mse)-2}f}' == mse


def test_independent_solver_agrees():
    "A long plain iteration on the whole line, written with math.erf, ends at the same 16 numbers"
    phi, cdf = (lambda x: math.exp(-x*x/2)/math.sqrt(2*math.pi)), (lambda x: (1 + math.erf(x/math.sqrt(2)))/2)
    c = np.linspace(-2.5, 2.5, 16)
    for _ in range(1500):
        t = [-40., *(c[1:] + c[:-1])/2, 40.]
        c = np.array([(phi(l) - phi(h))/(cdf(h) - cdf(l)) for l,h in zip(t[:-1], t[1:])])
    np.testing.assert_allclose(lloyd_max(4).tolist(), c, atol=3e-7)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('bits', WIDTHS)
def test_every_named_table(name, bits):
    o = codebook(name, bits)
    assert torch.equal(o.centroids, -o.centroids.flip(0)) and torch.equal(o.boundaries, -o.boundaries.flip(0))
    assert (o.centroids.diff() > 0).all() and (o.boundaries.diff() > 0).all() and o.boundaries[2**(bits-1)-1] == 0
    assert o.boundaries.dtype == torch.float32
    wide = o.centroids.double()
    assert torch.equal(o.boundaries, ((wide[1:] + wide[:-1])/2).float())
    assert codebook(name, bits) is o and o == Codebook(name, bits, json.loads(json.dumps(o.tolist())))
    assert hash(o) == hash(Codebook(name, bits, o.tolist()))
    assert o.mse >= lloyd_max(bits).mse - 1e-15
    assert name in repr(o) and name in o._repr_markdown_()


def test_identical_in_another_process():
    code = "from hlwq.lloyd_max import *; print([codebook(n, b).tolist() for n in ('lloyd-max','inf100','trunc4') for b in range(1, 9)])"
    r = subprocess.run([sys.executable, '-c', f'import torch; torch.set_num_threads(1); torch.set_default_dtype(torch.float64); {code}'], capture_output=True, text=True, check=True)
    assert json.loads(r.stdout) == [codebook(n, b).tolist() for n in NAMES for b in WIDTHS]


def test_default_device_and_inference_mode_do_not_matter():
    lloyd_max.__globals__['_remembered'].cache_clear()
    with torch.device('meta'), torch.inference_mode(): o = codebook('lloyd-max', 3)
    assert o.centroids.device.type == 'cpu' and not o.centroids.is_inference()
    (o.centroids*torch.ones(8, requires_grad=True)).sum().backward()
    assert o == lloyd_max(3)


@settings(deadline=None, max_examples=100)
@given(st.floats(-30, 30), st.floats(1e-6, 60))
def test_cells_are_consistent(lo, width):
    hi = lo + width
    (p,), (m,) = gaussian_cells([lo, hi])
    (q,), (n,) = gaussian_cells([-hi, -lo])
    assert p >= 0 and p == q and m == -n
    if p > 1e-290: assert lo - 1e-6 <= m/p <= hi + 1e-6


@pytest.mark.parametrize('x', [.5, 2., 8., 20., 35.])
def test_far_tail_keeps_its_digits(x):
    "The Mills ratio as a continued fraction, an independent source"
    f = 0.
    for k in range(2000, 0, -1): f = k/(x + f)
    (p,), (m,) = gaussian_cells([x, math.inf])
    assert math.isclose(m/p, x + f, rel_tol=1e-9 if x < 1 else 1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 2**31))
def test_mse_of_any_table_matches_a_sum(bits, seed):
    g = torch.Generator().manual_seed(seed)
    c = (torch.randn(2**bits, generator=g)*2).unique()
    if len(c) < 2**bits: return
    o = Codebook('random', bits, c)
    z = torch.linspace(-9, 9, 40001, dtype=torch.float64)
    w = torch.exp(-z*z/2); w /= w.sum()
    codes = torch.bucketize(z, o.boundaries.double())
    assert math.isclose((w*(z - o.centroids.double()[codes])**2).sum().item(), o.mse, rel_tol=2e-3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=0, max_size=9), st.integers(1, 3))
def test_constructor_accepts_valid_tables_only(values, bits):
    t = torch.tensor(values, dtype=torch.float32)
    good = len(t) == 2**bits and bool(t.isfinite().all()) and bool((t.diff() > 0).all())
    try: o = Codebook('given', bits, values)
    except ConfigError as e: assert "'given'" in str(e) and '; ' in str(e) and (not good or 'strictly increasing' in str(e))
    else: assert good and torch.equal(o.centroids, t) and (o.boundaries.diff() > 0).all()


def test_constructor_owns_its_numbers():
    t = torch.tensor([-1., 1.], dtype=torch.float64, requires_grad=True)
    o = Codebook('mine', 1, t)
    with torch.no_grad(): t[0] = 5
    assert o.tolist() == [-1., 1.] and not o.centroids.requires_grad and o.centroids.dtype == torch.float32
    with pytest.raises(Exception): o.name = 'other'


@pytest.mark.parametrize('values', [None, 'abcd', [[1, 2], [3, 4]], [1, 2, 3, 'x'], 3., {}, [1e300, 2e300, 3e300, 4e300], [1., 1., 2., 3.]])
def test_hostile_tables(values):
    with pytest.raises(ConfigError, match="codebook 'bad'"): Codebook('bad', 2, values)


@pytest.mark.parametrize('bad', [0, 9, -1, 5., True, None, '5'])
def test_bad_bits(bad):
    codebook('lloyd-max', 5), codebook('lloyd-max', 1)        # a remembered 5 must not let 5.0 through
    for f in (lambda: codebook('lloyd-max', bad), lambda: lloyd_max(bad), lambda: Codebook('x', bad, [0.])):
        with pytest.raises(ConfigError, match='need a whole number from 1 to 8'): f()


@pytest.mark.parametrize('bad', ['gauss', '', None, 5, ['lloyd-max'], 'Lloyd-Max'])
def test_unknown_names(bad):
    with pytest.raises(ConfigError, match='need one of lloyd-max, inf100, trunc4'): codebook(bad)


def test_outer_share():
    shares = {n: (outer_share(codebook(n, 5)), outer_share(codebook(n, 5), 128)) for n in NAMES}
    assert all(block < plain for plain,block in shares.values())
    for n,(plain,block) in dict(zip(NAMES, [(2.92e-3, 2.60e-3), (1.02e-3, .846e-3), (1.44e-3, 1.23e-3)])).items():
        assert math.isclose(shares[n][0], plain, rel_tol=5e-3) and math.isclose(shares[n][1], block, rel_tol=5e-3)
    assert math.isclose(outer_share(codebook('inf100', 5), 10**6), shares['inf100'][0], rel_tol=1e-3)    # a large sphere is Gaussian
    assert outer_share(codebook(bits=1)) == 1 and math.isclose(outer_share(codebook(bits=1), 128), 1, rel_tol=1e-9)
    assert outer_share(Codebook('shifted', 1, [20., 21.]), 128) == 1

"""One matrix, over everything that could change its bytes or its meaning.

What is promised: a block's bytes depend on its 128 weights alone, scaling by a power of two moves only the norm, and the format's description decodes to the same matrix."""
import sys,warnings
import numpy as np
import pytest,torch
from hypothesis import given,settings,strategies as st
from hlwq.core import BITS,ConfigError,NonFiniteError,UnsupportedError
from hlwq.lloyd_max import Codebook,codebook
from hlwq.packing import pack_codes
from hlwq.quantize import *
from hlwq.quantize import _CHUNK
from kit import gaussian,numpy_codes,numpy_decode,sylvester

fast = settings(deadline=None, max_examples=40, derandomize=True)
bits_of = st.sampled_from(BITS)
norm_of = st.sampled_from(('gain', 'l2'))
shape_of = st.tuples(st.integers(1, 9), st.integers(1, 400))
seed_of = st.integers(0, 2**31-1)

def matrix(shape, seed, heavy=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=g)
    if heavy: w = w**3*torch.exp2(torch.randint(-6, 6, (shape[0], 1), generator=g).float())
    return w.to(dtype)

def same(a, b): return torch.equal(a.packed, b.packed) and a.norms.dtype == b.norms.dtype and torch.equal(a.norms, b.norms) and a.shape == b.shape

def per_block(w, q):
    "Squared error of every block, in float64"
    nb = q.n_blocks
    d = torch.zeros(q.shape[0], nb*128, dtype=torch.float64)
    d[:, :q.shape[1]] = w.double() - q.dequantize().double()
    return d.view(q.shape[0], nb, 128).square().sum(-1)

# --- the bytes depend on the block alone

@fast
@given(shape_of, bits_of, norm_of, seed_of, st.booleans(), st.integers(1, 8))
def test_rows_alone_give_the_bytes_of_rows_together(shape, bits, norm, seed, heavy, cut):
    w = matrix(shape, seed, heavy)
    if shape[0] > 2: w[1] = 0                                   # a row of zeros takes the careful path; its neighbours must not notice
    packed,norms = quantize_rows(w, codebook(bits=bits), norm)
    parts = [quantize_rows(w[a:a+cut], codebook(bits=bits), norm) for a in range(0, shape[0], cut)]
    assert torch.equal(torch.cat([p for p,_ in parts]), packed) and torch.equal(torch.cat([n for _,n in parts]), norms)

@pytest.mark.parametrize('bits', BITS)
def test_workers_leave_no_trace(bits):
    w = matrix((3*_CHUNK//8, 8*128 + 5), bits)
    want = quantize_rows(w, codebook(bits=bits), workers=1)
    before = torch.get_num_threads()
    for n in (2, 3, 7):
        got = quantize_rows(w, codebook(bits=bits), workers=n)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.get_num_threads() == before

@pytest.mark.parametrize('chunk', [1, 3, 64, 10_000])
def test_chunks_leave_no_trace(chunk, monkeypatch):
    module = sys.modules['hlwq.quantize']                       # the package has a function of the same name
    w = matrix((37, 300), 5)
    w[3] = 0; w[5] *= 1e-20; w[6] *= 1e20
    want = quantize_rows(w, codebook(bits=5))
    monkeypatch.setattr(module, '_CHUNK', chunk)
    got = quantize_rows(w, codebook(bits=5))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])

def test_dequantize_workers_and_rows_leave_no_trace():
    q = quantize(matrix((61, 700), 3), 5)
    want,packed = q.dequantize(),q.packed.view(61, -1)
    for n in (1, 2, 5): assert torch.equal(dequantize_rows(packed, q.norms, q.codebook, 700, workers=n), want)
    assert torch.equal(torch.cat([dequantize_rows(packed[a:a+7], q.norms[a:a+7], q.codebook, 700) for a in range(0, 61, 7)]), want)

@fast
@given(shape_of, bits_of, norm_of, seed_of)
def test_strides_leave_no_trace(shape, bits, norm, seed):
    w = matrix(shape, seed)
    want = quantize(w, bits, norm)
    big = torch.full((shape[0]*2, shape[1]*3), 7.)
    big[::2, 1::3] = w
    for other in (w.t().contiguous().t(), big[::2, 1::3], w.flip(0).flip(0), w.clone().requires_grad_()): assert same(quantize(other, bits, norm), want)
    assert same(quantize(w[:1].expand(3, -1), bits, norm), quantize(w[:1].repeat(3, 1), bits, norm))

@fast
@given(shape_of, bits_of, seed_of, st.sampled_from((torch.bfloat16, torch.float16, torch.float64)))
def test_narrow_types_are_widened_exactly(shape, bits, seed, dtype):
    w = matrix(shape, seed, dtype=dtype)
    assert same(quantize(w, bits), quantize(w.float(), bits))

def test_source_is_not_written_to():
    w = matrix((5, 256), 1)
    w[2] = 0; w[3] *= 1e-30
    before = w.clone()
    quantize(w, 4); quantize(w.t(), 4)
    assert torch.equal(w, before)

# --- powers of two

@fast
@given(shape_of, bits_of, norm_of, seed_of, st.integers(-90, 90))
def test_powers_of_two_move_only_the_norm(shape, bits, norm, seed, k):
    w = matrix(shape, seed).clamp(-30, 30)
    w = torch.where(w.abs() < 2**-20, 0., w)                    # so that no weight and no square of the scaled matrix is subnormal
    a,b = quantize_rows(w, codebook(bits=bits), norm),quantize_rows(w*2.0**k, codebook(bits=bits), norm)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1]*2.0**k, b[1])

@pytest.mark.parametrize('norm', ['gain', 'l2'])
@pytest.mark.parametrize('bits', BITS)
def test_every_exponent_that_float32_has(bits, norm):
    "Integer weights from 2**-149 to nearly 2**128: the squares under- and overflow, the codes must not"
    w = torch.randint(-15, 16, (1, 256), generator=torch.Generator().manual_seed(bits)).float()
    w[0, :2] = torch.tensor([15., 1.])
    packed,norms = quantize_rows(w, codebook(bits=bits), norm)
    for k in range(-149, 118):                                  # norms of about 100: 2**7, so 2**125 at most
        scaled = torch.from_numpy(np.ldexp(w.numpy(), k).astype(np.float32))
        p,n = quantize_rows(scaled, codebook(bits=bits), norm)
        assert torch.equal(p, packed), k
        want = np.ldexp(norms.double().numpy(), k)
        assert np.abs(n.double().numpy() - want).max() <= max(2.0**-149, 1e-7*want.max()), k
        if k > -126: assert (n.double().numpy() == want).all(), k

def test_one_huge_or_tiny_block_among_ordinary_ones():
    w = matrix((1, 4*128), 0)
    want = quantize_rows(w, codebook(bits=5))
    for scale in (1e-40, 2.0**-140, 1e-25, 1e25, 2.0**120):
        v = w.clone(); v[0, 128:256] *= scale
        p,n = quantize_rows(v, codebook(bits=5))
        keep = [0, 2, 3]
        assert torch.equal(p.view(4, -1)[keep], want[0].view(4, -1)[keep]) and torch.equal(n[0, keep], want[1][0, keep]), scale

# --- zeros

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('norm', ['gain', 'l2'])
@pytest.mark.parametrize('bits', BITS)
def test_zero_blocks_are_exact_and_canonical(bits, norm, dtype):
    w = matrix((4, 384), 0, dtype=dtype)
    w[1] = 0; w[2, 128:256] = 0; w[3, :128] = -0.
    q = quantize(w, bits, norm)
    assert q.norms.dtype == torch.float16
    assert q.norms[1].eq(0).all() and q.norms[2, 1] == 0 and q.norms[3, 0] == 0 and q.norms[0].ne(0).all()
    got = q.dequantize()
    assert got[1].eq(0).all() and got[2, 128:256].eq(0).all() and got[3, :128].eq(0).all()
    codes = q.codes
    assert len(codes[1].unique()) == 1 and torch.equal(codes[1, :128], codes[2, 128:256]) and torch.equal(codes[1, :128], codes[3, :128])
    assert quant_error(torch.zeros(2, 128), quantize(torch.zeros(2, 128), bits, norm)) == 0

def test_zeros_with_a_centroid_at_zero():
    "A table of the user's own may hold 0: the gain of a block that rounds to zeros alone is 0, not 0/0"
    book = Codebook('with zero', 2, [-10., 0., 10., 20.])
    for norm in ('gain', 'l2'):
        q = quantize(torch.zeros(2, 200), 2, norm, book)
        assert q.norms.eq(0).all() and q.dequantize().eq(0).all()
    w = torch.ones(1, 128); w[0, ::2] = -1; w += .1*matrix((1, 128), 3)
    small = matrix((1, 128), 3)                                 # all rotated values below 5: only code 1
    q = quantize(small, 2, 'gain', book)
    assert q.norms.isfinite().all() and q.dequantize().eq(0).all()
    assert quantize(w, 2, 'gain', book).norms.isfinite().all()

# --- decoding by the description

@fast
@given(shape_of, bits_of, norm_of, st.sampled_from(('lloyd-max', 'inf100', 'trunc4')), seed_of, st.booleans())
def test_independent_decoder_agrees(shape, bits, norm, name, seed, heavy):
    w = matrix(shape, seed, heavy)
    q = quantize(w, bits, norm, name)
    want = numpy_decode(q.packed.numpy(), q.norms.numpy(), q.meta.numpy(), q.codebook.tolist())
    assert want.shape == shape
    reach = max(abs(q.norms.double()).max().item(), 1e-30)
    assert np.abs(want - q.dequantize().numpy()).max() <= 2e-6*reach
    assert np.array_equal(numpy_codes(q.packed.numpy(), bits), q.codes.reshape(-1).numpy())

@fast
@given(shape_of, bits_of, seed_of)
def test_independent_encoder_agrees(shape, bits, seed):
    "Codes are those of the nearest centroid of the normalised rotation, apart from values within rounding of a boundary"
    w = matrix(shape, seed)
    q = quantize(w, bits, 'l2')
    nb = q.n_blocks
    p = np.zeros((shape[0], nb*128)); p[:, :shape[1]] = w.double().numpy()
    blocks = p.reshape(shape[0], nb, 128)
    length = np.sqrt((blocks**2).sum(-1))
    z = (blocks/np.maximum(length, 1e-30)[..., None] @ sylvester())*np.sqrt(128)
    edges = q.codebook.boundaries.double().numpy()
    want = np.searchsorted(edges, z, side='left').reshape(shape[0], -1)
    unsure = (np.abs(z[..., None] - edges).min(-1) < 2e-5).reshape(shape[0], -1)
    assert ((want == q.codes.numpy()) | unsure).all()
    assert np.allclose(q.norms.double().numpy(), length, rtol=6e-4, atol=0)

def test_ties_go_to_the_lower_code():
    "A block of alternating halves rotates to values that lie on boundaries of a table made for it"
    w = torch.zeros(1, 128); w[0, 0] = 1                         # every rotated value is exactly 1
    for edge_book,want in ((Codebook('t', 2, [-1., 0., .5, 1.5]), 2), (Codebook('t', 2, [-3., -1., 3., 5.]), 1)):
        assert quantize(w, 2, 'l2', edge_book).codes.eq(want).all()
    assert quantize(-w, 2, 'l2', Codebook('t', 2, [-1.5, -.5, 2., 3.])).codes.eq(0).all()

# --- twice

@pytest.mark.parametrize('norm', ['gain', 'l2'])
@pytest.mark.parametrize('bits', BITS)
def test_gaussian_matrices_are_fixed_points(bits, norm):
    "Quantizing what was decoded gives the same codes, and norms that differ by no more than float16 can tell"
    q = quantize(gaussian(64, 512, dtype=torch.float32), bits, norm)
    r = quantize(q.dequantize(), bits, norm)
    assert torch.equal(q.packed, r.packed)
    if norm == 'gain': assert (q.norms.double() - r.norms.double()).abs().max() <= q.norms.abs().max().item()*2**-10

@fast
@given(shape_of, bits_of, seed_of, st.booleans(), st.booleans())
def test_what_holds_for_any_matrix_quantized_twice(shape, bits, seed, heavy, constant):
    """Codes c decode to a multiple of Hc, whose normalised rotation is c*sqrt(128)/|c|; the second codes are the nearest to that.

    They differ from the first where |c| is far from sqrt(128), as for a constant block, whose one large value lies beyond the table."""
    w = torch.full(shape, 3.) if constant else matrix(shape, seed, heavy)
    if shape[1] % 128: w = torch.nn.functional.pad(w, (0, -shape[1] % 128))      # padding would be cut off by decoding
    q = quantize(w, bits)
    r = quantize_rows(q.dequantize(), q.codebook)[0]
    c = q.codebook.centroids.double()[q.codes.long()].view(-1, 128)
    z = c*128**.5/c.norm(dim=1, keepdim=True)
    edges = q.codebook.boundaries.double()
    unsure = (z[..., None] - edges).abs().amin(-1) < 2e-5
    got = torch.from_numpy(numpy_codes(r.numpy(), bits)).view(-1, 128)
    dead = (q.norms.view(-1, 1) == 0)
    assert ((torch.searchsorted(edges, z) == got) | unsure | dead).all()

# --- gain against length

@fast
@given(shape_of, bits_of, seed_of, st.booleans())
def test_gain_is_never_worse_than_length(shape, bits, seed, heavy):
    w = matrix(shape, seed, heavy)
    if shape[1] % 128: w = torch.nn.functional.pad(w, (0, -shape[1] % 128))      # cutting off the padding could favour either
    a,b = quantize(w, bits, 'gain'),quantize(w, bits, 'l2')
    assert torch.equal(a.packed, b.packed)
    if a.norms.dtype == b.norms.dtype: assert (per_block(w, a) <= per_block(w, b)*(1 + 1e-6) + 1e-12).all()

@pytest.mark.parametrize('bits,limit', [(2, .35), (3, .19), (4, .099), (5, .0500), (6, .0260), (8, .0075)])
def test_error_on_gaussian_weights(bits, limit):
    w = gaussian(256, 1024, dtype=torch.float32)
    assert quant_error(w, quantize(w, bits)) <= limit

def test_quant_error_is_the_definition():
    w = matrix((7, 300), 2)
    q = quantize(w, 3)
    want = ((w.double()-q.dequantize().double()).norm()/w.double().norm()).item()
    assert abs(quant_error(w, q) - want) < 1e-12
    with pytest.raises(ConfigError, match='need the same'): quant_error(w[:3], q)

# --- tables of one's own

@fast
@given(bits_of, seed_of, shape_of)
def test_any_table(bits, seed, shape):
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(2**bits, generator=g).double().sort().values + torch.arange(2**bits)*1e-3
    book = Codebook('mine', bits, c.tolist())
    w = matrix(shape, seed)
    q = quantize(w, bits, 'l2', book)
    nb = q.n_blocks
    p = torch.zeros(shape[0], nb*128); p[:, :shape[1]] = w
    z = (p.double().view(-1, 128) @ torch.from_numpy(sylvester()))
    z = z*128**.5/z.norm(dim=1, keepdim=True).clamp_min(1e-30)
    edges = book.boundaries.double()
    unsure = (z[..., None] - edges).abs().amin(-1) < 2e-5
    assert ((torch.searchsorted(edges, z) == q.codes.view(-1, 128)) | unsure).all()

def test_table_that_is_too_fine():
    with pytest.raises(UnsupportedError, match='need 1e-5; merge'): quantize(torch.ones(1, 128), 2, codebook=Codebook('fine', 2, [0., 1e-7, 2e-7, 50.]))
    with pytest.raises(ConfigError, match='need'): quantize(torch.ones(1, 128), 3, codebook=codebook(bits=2))
    with pytest.raises(ConfigError, match='unknown, need one of'): quantize(torch.ones(1, 128), codebook='loyd')

# --- shapes

@pytest.mark.parametrize('norm', ['gain', 'l2'])
@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('shape', [(1, 1), (1, 127), (1, 128), (1, 129), (3, 129), (128, 1), (5, 255), (2, 640)])
def test_small_shapes(shape, bits, norm):
    w = matrix(shape, 1)
    q = quantize(w, bits, norm)
    nb = -(-shape[1]//128)
    assert q.norms.shape == (shape[0], nb) and q.packed.shape == (shape[0]*nb*16*bits,) and q.meta.tolist() == [shape[0], nb, 128, shape[0]*nb*128, shape[1]]
    got = q.dequantize()
    assert got.shape == shape and got.isfinite().all()
    assert q.codes.shape == (shape[0], nb*128) and torch.equal(pack_codes(q.codes, bits), q.packed)
    padded = torch.nn.functional.pad(w, (0, nb*128-shape[1]))
    assert same(QuantizedTensor(q.packed, q.norms, padded.shape, bits), quantize(padded, bits, norm))
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16 and torch.equal(q.dequantize(torch.bfloat16), got.bfloat16())

def test_one_weight_is_exact_enough():
    for v in (1., -3.5, 1e-3, 6e4, -1e-30, 1e30):
        q = quantize(torch.tensor([[v]]), 8)
        assert abs(q.dequantize().item()/v - 1) < 2e-2

# --- refusals

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_not_finite(bad, dtype):
    w = matrix((4, 300), 0, dtype=dtype)
    w[2, 299] = bad
    with pytest.raises(NonFiniteError) as e: quantize(w, name='layer.weight')
    text = str(e.value)
    assert text.startswith('layer.weight: ') and '(2, 299)' in text and ('1 NaN' if bad != bad else '1 infinite') in text and 'need finite' in text and '; repair' in text
    w[3, 0] = float('nan'); w[0, 5] = float('inf')
    with pytest.raises(NonFiniteError, match=r'the first at \(0, 5\)'): quantize(w)

def test_infinity_that_cancels_is_still_found():
    w = torch.zeros(1, 256)
    w[0, 0],w[0, 1] = float('inf'),-float('inf')
    with pytest.raises(NonFiniteError, match='0 NaN and 2 infinite'): quantize(w)

def test_float64_beyond_float32():
    w = torch.full((1, 128), 1e39, dtype=torch.float64)
    with pytest.raises((NonFiniteError, UnsupportedError)) as e: quantize(w)
    assert '0 NaN and 0 infinite' not in str(e.value)           # finite as float64, so say what is wrong with them

@pytest.mark.parametrize('w', [torch.ones(3), torch.ones(2, 3, 4), torch.ones(()), torch.ones(0, 4), torch.ones(4, 0), torch.ones(2, 128, dtype=torch.int32), torch.ones(2, 128, dtype=torch.bool),
    torch.ones(2, 128).to(torch.float8_e4m3fn), torch.ones(2, 128, dtype=torch.complex64), torch.ones(2, 128, device='meta'), np.ones((2, 128)), None])
def test_not_a_matrix(w):
    with pytest.raises(ConfigError, match='^the thing: .*, need .*; '): quantize(w, name='the thing')

@pytest.mark.parametrize('bits', [0, 1, 1.5, 5.0, 7, 9, -5, '5', None, True])
def test_bad_bits(bits):
    with pytest.raises(ConfigError, match='need one of 2, 3, 4, 5, 6, 8'): quantize(torch.ones(1, 128), bits)

def test_bad_norm():
    with pytest.raises(ConfigError, match="need 'gain' or 'l2'"): quantize(torch.ones(1, 128), norm='max')

# --- norms that float16 cannot hold

@pytest.mark.parametrize('scale,wide', [(1, False), (1e-3, False), (1e-7, True), (1e-20, True), (1e-40, True), (1e4, True), (1e30, True), (5e2, False)])
def test_norms_switch_to_float32(scale, wide):
    w = torch.from_numpy((np.random.default_rng(0).standard_normal((4, 256))*scale).astype(np.float32))
    w[1] = 0
    for norm in ('gain', 'l2'):
        q = quantize(w, 5, norm)
        assert q.norms.dtype == (torch.float32 if wide else torch.float16) and q.norms.isfinite().all() and q.norms[1].eq(0).all() and q.norms[[0, 2, 3]].ne(0).all()
        if scale > 1e-35: assert quant_error(w*min(1, 1e30/scale), QuantizedTensor(q.packed, q.norms, q.shape, 5)) < .06

def test_one_block_is_enough_to_widen():
    w = matrix((2, 256), 0)
    w[1, 128:] *= 2.0**-24
    q = quantize(w)
    assert q.norms.dtype == torch.float32 and quant_error(w[1:, 128:], quantize(w[1:, 128:])) < .06

@pytest.mark.parametrize('values,wide', [([2.0**-14], False), ([np.nextafter(np.float32(2.0**-14), np.float32(0))], True), ([65504.], False), ([65505.], True), ([-65504., 0.], False), ([0., 0.], False), ([2.0**-149, 1.], True)])
def test_edges_of_float16(values, wide):
    n = torch.tensor(np.array([values], dtype=np.float32))
    got = store_norms(n)
    assert (got.dtype == torch.float32) is wide
    if wide: assert torch.equal(got, n)

def test_norms_beyond_float32_are_refused():
    w = torch.full((1, 128), 3e38)                              # of length 3.4e39
    with pytest.raises(UnsupportedError, match='need smaller weights; rescale'): quantize(w)

def test_parts_that_do_not_fit():
    q = quantize(matrix((3, 200), 0))
    for kw in (dict(packed=q.packed[:-1]), dict(packed=q.packed.to(torch.int8)), dict(norms=q.norms[:, :1]), dict(norms=q.norms.bfloat16()), dict(shape=(3, 300)), dict(shape=(3,)), dict(bits=4), dict(bits=7), dict(codebook=codebook(bits=4)), dict(block_size=64)):
        with pytest.raises(ConfigError, match='need'): QuantizedTensor(**{**dict(packed=q.packed, norms=q.norms, shape=q.shape, bits=5), **kw})

def test_no_warnings_on_ordinary_input():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quantize(matrix((8, 300), 0)).dequantize()

@pytest.mark.parametrize('workers', [1, 2, 3])
def test_inference_mode_reaches_the_threads(workers):
    "Threads do not inherit the mode of their creator; the result is the same in and out of it"
    w, book = torch.randn(512, 1024, generator=torch.Generator().manual_seed(5)), codebook('lloyd-max', 5)
    want, before = quantize_rows(w, book), torch.get_num_threads()
    with torch.inference_mode():
        got = quantize_rows(w, book, workers=workers)
        back = dequantize_rows(*got, book, 1024, workers=workers)
    assert all(torch.equal(a, b) for a,b in zip(got, want)) and torch.equal(back, dequantize_rows(*want, book, 1024))
    assert torch.get_num_threads() == before

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype):
    w = torch.randn(100, 300, generator=torch.Generator().manual_seed(6))
    want = quantize(w, 5)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        got = quantize(w, 5)
        assert torch.equal(got.packed, want.packed) and torch.equal(got.dequantize(), want.dequantize())
    finally: torch.set_default_dtype(before)

def test_sparse_tensors_and_odd_codebooks_are_refused():
    with pytest.raises(ConfigError, match='to_dense'): quantize(torch.eye(4).to_sparse(), 5)
    with pytest.raises(ConfigError, match='need a Codebook or a name'): quantize(torch.eye(4), 5, codebook=None)

"The bit stream against an independent reference, over every width, length, shape and layout"
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st

import hlwq.packing as packing
from hlwq.core import BITS, ConfigError
from hlwq.packing import group_layout, group_size, pack_block_planes, pack_codes, pack_planes, packed_nbytes, unpack_block_planes, unpack_codes, unpack_planes


def reference(codes, bits):
    "numpy: every code as its bits, highest first, then packbits"
    return np.packbits(np.unpackbits(np.asarray(codes, dtype=np.uint8)[:, None], axis=1)[:, 8-bits:])


def random_codes(bits, shape, seed=0): return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(BITS).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b-1), max_size=200))))
def test_stream_is_the_reference(case):
    bits, codes = case
    t = torch.tensor(codes, dtype=torch.uint8)
    packed = pack_codes(t, bits)
    assert packed.dtype == torch.uint8 and packed.ndim == 1 and packed.numel() == packed_nbytes(len(codes), bits)
    assert packed.numpy().tobytes() == reference(codes, bits).tobytes()
    assert torch.equal(unpack_codes(packed, bits, len(codes)), t)


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('chunk', [1, 3, 8, 64])
def test_chunks_leave_no_trace(bits, chunk, monkeypatch):
    codes = random_codes(bits, (1003,))
    whole = pack_codes(codes, bits)
    monkeypatch.setattr(packing, '_CHUNK', chunk)
    assert torch.equal(pack_codes(codes, bits), whole) and torch.equal(unpack_codes(whole, bits, 1003), codes)


@pytest.mark.parametrize('bits', BITS)
def test_more_than_one_real_chunk(bits):
    n = packing._CHUNK*8*2 + 8*5 + 3
    codes = random_codes(bits, (n,), bits)
    packed = pack_codes(codes, bits)
    assert packed.numpy().tobytes() == reference(codes.numpy(), bits).tobytes()
    assert torch.equal(unpack_codes(packed, bits, n), codes)


@pytest.mark.parametrize('bits', BITS)
def test_all_patterns_of_two_neighbours(bits):
    "Every pair of codes at every position of a group"
    n_codes, _ = group_size(bits)
    v = torch.arange(2**bits)
    pairs = torch.cartesian_prod(v, v).to(torch.uint8) if bits < 8 else torch.stack([v, v.flip(0)], 1).to(torch.uint8)
    for k in range(n_codes):
        groups = torch.zeros(len(pairs), n_codes, dtype=torch.uint8)
        groups[:, k], groups[:, (k+1) % n_codes] = pairs.unbind(1) if n_codes > 1 else (pairs[:, 0],)*2
        packed = pack_codes(groups, bits)
        assert packed.numpy().tobytes() == reference(groups.reshape(-1), bits).tobytes()
        assert torch.equal(unpack_codes(packed, bits, groups.numel()), groups.reshape(-1))


@pytest.mark.parametrize('codes,bits,hexed', [(range(8), 5, '0044 3214 C7'), ([31]+[0]*7, 5, 'F800000000'), ([k % 4 for k in range(8)], 2, '1B1B'), (range(8), 3, '053977'),
    (range(8), 4, '01234567'), (range(8), 6, '001083105187'), (range(8), 8, '0001020304050607'), ([31], 5, 'F8'), ([1, 1, 1], 3, '2480'), ([63], 6, 'FC')])
def test_golden_bytes(codes, bits, hexed):
    assert bytes(pack_codes(torch.tensor(list(codes), dtype=torch.uint8), bits).tolist()) == bytes.fromhex(hexed)


def test_zero_fill_is_written_but_not_required():
    assert pack_codes(torch.tensor([31], dtype=torch.uint8), 5).item() == 0b11111_000
    assert unpack_codes(torch.tensor([0b11111_101], dtype=torch.uint8), 5, 1).item() == 31


@pytest.mark.parametrize('bits', BITS)
def test_any_shape_and_stride(bits):
    codes = random_codes(bits, (6, 10, 4))
    flat = pack_codes(codes.reshape(-1), bits)
    assert torch.equal(pack_codes(codes, bits), flat)
    assert torch.equal(pack_codes(codes.permute(2, 0, 1), bits), pack_codes(codes.permute(2, 0, 1).contiguous(), bits))
    assert torch.equal(pack_codes(codes.reshape(-1)[::2], bits), pack_codes(codes.reshape(-1)[::2].clone(), bits))
    strided = torch.stack([flat, flat], 1)[:, 0]
    assert torch.equal(unpack_codes(strided, bits, 240), codes.reshape(-1))
    assert torch.equal(unpack_codes(flat.view(2, -1), bits, 240), codes.reshape(-1))


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('n', [0, 1, 7, 130])
def test_block_planes_write_into_views(bits, n):
    codes_t = random_codes(bits, (128, n))
    room = torch.full((16*bits + 2, n + 3), 77, dtype=torch.uint8)
    out = room[1:-1, 2:2+n]
    try: got = pack_block_planes(codes_t, bits, out=out)
    except RuntimeError: pytest.fail('a view with contiguous rows must do')
    assert got.data_ptr() == out.data_ptr() and torch.equal(out.t().reshape(-1), pack_codes(codes_t.t(), bits))
    assert (room[0] == 77).all() and (room[-1] == 77).all() and (room[:, :2] == 77).all() and (room[:, 2+n:] == 77).all()
    back = torch.full((128, n + 1), 77, dtype=torch.uint8)
    unpack_block_planes(got, bits, out=back[:, :n])
    assert torch.equal(back[:, :n], codes_t) and (back[:, n] == 77).all()
    assert torch.equal(unpack_block_planes(got.contiguous(), bits), codes_t)


@pytest.mark.parametrize('bits', BITS)
def test_inputs_are_left_alone(bits):
    codes = random_codes(bits, (64, 32))
    kept = codes.clone()
    packed = pack_codes(codes, bits)
    assert torch.equal(codes, kept) and packed.data_ptr() != codes.data_ptr()
    kept = packed.clone()
    out = unpack_codes(packed, bits, codes.numel())
    assert torch.equal(packed, kept) and out.data_ptr() != packed.data_ptr()
    planes = list(random_codes(bits, (group_size(bits)[0], 5)))
    assert all(torch.equal(a, b) for a,b in zip(unpack_planes(pack_planes(planes, bits), bits), planes))


@pytest.mark.parametrize('bits', BITS)
def test_layout_uses_every_bit_once(bits):
    n_codes, n_bytes = group_size(bits)
    seen = [[] for _ in range(n_codes)]
    for byte in group_layout(bits):
        used = []
        for k,s in byte:
            inside = [i for i in range(bits) if 0 <= i+s < 8]
            seen[k] += inside
            used += [i+s for i in inside]
        assert sorted(used) == list(range(8))
    assert all(sorted(o) == list(range(bits)) for o in seen) and len(group_layout(bits)) == n_bytes


@pytest.mark.parametrize('bits', [b for b in BITS if b < 8])
def test_code_too_large(bits):
    for at in (0, 5, 16):
        codes = random_codes(bits, (17,))
        codes[at] = 2**bits
        with pytest.raises(ConfigError, match=f'codes: largest is {2**bits}, need at most {2**bits-1} for {bits} bits; '): pack_codes(codes, bits)


@pytest.mark.parametrize('bits', BITS)
def test_wrong_length(bits):
    packed = pack_codes(random_codes(bits, (24,)), bits)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]]), packed[:0]):
        with pytest.raises(ConfigError, match=f'packed: {len(wrong)} bytes, need {3*bits} for 24 codes of {bits} bits; '): unpack_codes(wrong, bits, 24)
    with pytest.raises(ConfigError): unpack_codes(packed, bits, -1)


@pytest.mark.parametrize('bad', [torch.zeros(8), torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int8), torch.zeros(8, dtype=torch.bool), [0]*8, np.zeros(8, np.uint8), None])
def test_wrong_dtype(bad):
    with pytest.raises(ConfigError, match='codes: .*need a torch.uint8 tensor; '): pack_codes(bad, 5)
    with pytest.raises(ConfigError, match='packed: .*need a torch.uint8 tensor; '): unpack_codes(bad, 5, 8)


@pytest.mark.parametrize('bad', [0, 1, 7, 9, 5., True, None, '5'])
def test_wrong_bits(bad):
    codes = torch.zeros(8, dtype=torch.uint8)
    group_layout(5)                                           # a remembered 5 must not let 5.0 through
    for f in (lambda: pack_codes(codes, bad), lambda: unpack_codes(codes, bad, 8), lambda: packed_nbytes(8, bad), lambda: group_layout(bad), lambda: group_size(bad),
              lambda: pack_block_planes(codes.view(8, 1), bad)):
        with pytest.raises(ConfigError, match='bits: .*need one of 2, 3, 4, 5, 6, 8'): f()


def test_memory_stays_small():
    "Scratch is a constant for each thread: a count of what is allocated, not a measurement of the process"
    n, taken, real, threads = 8*packing._CHUNK*9, [], torch.Tensor.new_empty, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.Tensor, 'new_empty', lambda s, *a, **k: taken.append(real(s, *a, **k)) or taken[-1])
        pack_codes(torch.zeros(n, dtype=torch.uint8), 5)
    assert sum(o.numel() for o in taken) <= n*5//8 + 13*packing._CHUNK*threads and all(o.dtype == torch.uint8 for o in taken)


@pytest.mark.parametrize('threads', [1, 2, 3, 7])
def test_threads_leave_no_trace(threads):
    before, codes = torch.get_num_threads(), random_codes(5, (packing._CHUNK*8*9 + 11,))
    want = reference(codes.numpy(), 5).tobytes()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode(): inside = pack_codes(codes, 5)
        outside = pack_codes(codes, 5)
        assert inside.numpy().tobytes() == outside.numpy().tobytes() == want
        assert torch.equal(unpack_codes(inside, 5, codes.numel()), codes)
        with torch.inference_mode(): assert torch.equal(unpack_codes(outside, 5, codes.numel()), codes)
    finally: torch.set_num_threads(before)

"The Triton kernels against their references: in the interpreter on a CPU, for real where there is a GPU"
import os
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import pytest
pytest.importorskip('triton')
from hlwq.core import ConfigError, UnsupportedError, asset_path
from hlwq.kernels import gemm, gemv, layout, moe
from hlwq.kernels.quantize import cell_tables, encode_rows
from hlwq.lloyd_max import Codebook, codebook
from hlwq.quantize import quantize, quantize_rows
from hlwq.source import open_source

GPU = torch.cuda.is_available()
if not GPU and not layout.INTERPRETED: pytest.skip('triton was imported without TRITON_INTERPRET before', allow_module_level=True)
device = torch.device('cuda', torch.cuda.current_device()) if GPU else torch.device('cpu')
BITS = (2, 3, 4, 5, 6, 8)

def error(y, ref): return float((y.double() - ref.double()).norm()/ref.double().norm())

def matrix(out, width, bits, seed=0, norms=torch.float16):
    q = quantize(torch.randn(out, width, generator=torch.Generator().manual_seed(seed)), bits)
    return layout.to_tiles(q.packed.view(out, -1).to(device), bits), q.norms.to(device, norms), q.codebook.to(device), q

def activations(M, width, dtype=torch.bfloat16, seed=1): return torch.randn(M, width, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

@pytest.fixture
def poisoned(monkeypatch):
    "Memory that kernels get for their results holds NaN, so that an element they forget shows"
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    def poison(t): return t.fill_(float('nan')) if t.is_floating_point() else t.fill_(0x55 if t.dtype == torch.uint8 else 0x55555555)
    monkeypatch.setattr(torch, 'empty', lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda self, *a, **k: poison(new_empty(self, *a, **k)))

@pytest.mark.parametrize('bits', BITS)
def test_layout(bits, poisoned):
    for shape in ((1, 1), (16, 3), (23, 2), (3, 32, 1), (2, 5, 2)):
        p = torch.randint(0, 256, (*shape[:-1], shape[-1]*16*bits), dtype=torch.uint8).to(device)
        t = layout.to_tiles(p, bits)
        assert torch.equal(t.view(-1, *t.shape[-5:])[-1], layout.tile_ref(p.view(-1, *p.shape[-2:])[-1], bits))
        assert torch.equal(layout.from_tiles(t, shape[-2]), p)
        if len(shape) == 2: assert torch.equal(t, layout.tile_ref(p, bits)) and torch.equal(layout.untile_ref(t, shape[0]), p)
    assert layout.to_tiles(torch.empty(0, 16*bits, dtype=torch.uint8, device=device), bits).numel() == 0
    with pytest.raises(ConfigError): layout.to_tiles(p.int(), bits)

@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16, torch.float32))
def test_same_bytes(bits, dtype, poisoned):
    w = torch.randn(9, 320, generator=torch.Generator().manual_seed(bits))*torch.logspace(-3, 1, 9)[:, None]
    w[2] = 0; w[3, ::2] = -0.0
    for norm in ('gain', 'l2'):
        packed, norms, flag = encode_rows(w.to(device, dtype), codebook('lloyd-max', bits), norm)
        p, n = quantize_rows(w.to(dtype), codebook('lloyd-max', bits), norm)
        assert torch.equal(packed.cpu(), p) and torch.equal(norms.cpu().view(torch.int32), n.view(torch.int32)) and int(flag) == 0

@pytest.mark.parametrize('name', ('inf100', 'trunc4'))
def test_same_bytes_with_older_tables(name):
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    for bits in (2, 5, 6): assert torch.equal(encode_rows(w.to(device), codebook(name, bits))[0].cpu(), quantize_rows(w, codebook(name, bits))[0])

def test_codebooks_without_cells():
    for c in ([-1., -.1, .3, 2.], [-1., -.5, .4999, 1.]): assert cell_tables(Codebook('own', 2, torch.tensor(c))) is None
    assert cell_tables(Codebook('one', 1, torch.tensor([-1., 1.]))) is None
    w = torch.randn(4, 128)
    packed, _, flag = encode_rows(w.to(device), Codebook('own', 2, torch.tensor([-1., -.1, .3, 2.])))
    assert flag is None and torch.equal(packed.cpu(), quantize_rows(w, Codebook('own', 2, torch.tensor([-1., -.1, .3, 2.])))[0])

def test_flag_and_odd_inputs():
    book = codebook('lloyd-max', 5)
    for bad in (float('nan'), float('-inf'), 1e-22, 1e20):
        w = torch.randn(4, 256); w[3, 130] = bad
        if abs(bad) < 1: w[3, 128:] = bad
        assert int(encode_rows(w.to(device), book)[2]) == 1
    assert encode_rows(torch.empty(0, 256, device=device), book)[0].shape == (0, 160)
    wide = torch.randn(64, 6).T                                # strides, a width of 64
    for w in (wide, wide.double(), torch.randn(3, 131)[:, 1:]): assert torch.equal(encode_rows(w.to(device), book)[0].cpu(), quantize_rows(w, book)[0])

@pytest.mark.parametrize('bits,dtype', [*((b, torch.bfloat16) for b in BITS), (3, torch.float16), (8, torch.float16)])
def test_gemv(bits, dtype, poisoned):
    for out,width,shape in ((24, 264, (2, 2, 1)), (17, 384, (1, 1, 2))):
        tiles, norms, book, _ = matrix(out, width, bits)
        x = activations(1, width, dtype)
        assert error(gemv.gemv(x, tiles, norms, book, shape), gemv.gemv_ref(x, tiles, norms, book, dtype).to(dtype)) < 1e-3

def test_trained_weights():
    "Heavy tails and activations of different sizes, as no random matrix has them"
    with open_source(asset_path('tiny-moe-10m')) as src: w = src.read('model.layers.3.self_attn.q_proj.weight')[:48].float()
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(0))*torch.logspace(-2, 2, 256)
    for bits in (3, 5):
        q = quantize(w, bits)
        tiles, norms, book = layout.to_tiles(q.packed.view(48, -1).to(device), bits), q.norms.to(device), q.codebook.to(device)
        for M in (1, 9):
            a = x[:M].to(device, torch.bfloat16)
            assert error(gemm.matmul(a, tiles, norms, book), gemv.gemv_ref(a, tiles, norms, book, torch.bfloat16).bfloat16()) < 1e-3

def test_every_shape_of_gemv():
    tiles, norms, book, _ = matrix(80, 256, 5)
    x = activations(1, 256)
    ref = gemv.gemv_ref(x, tiles, norms, book, torch.bfloat16).bfloat16()
    for shape in ((2, 2, 4), (4, 4, 3), (4, 1, 2)) + (((16, 16, 7), (32, 32, 2), (32, 16, 1)) if GPU else ()):
        assert error(gemv.gemv(x, tiles, norms, book, shape), ref) < 1e-3, shape
    for n_tiles,nb,bits in ((1, 1, 5), (256, 32, 5), (896, 32, 3), (32, 16, 5), (128, 4, 5), (128, 40, 5), (256, 112, 4), (64, 256, 8)):
        w, wk, t = gemv.gemv_shape(n_tiles, nb, bits, device)
        assert w in (1, 2, 4, 8, 16, 32) and w % wk == 0 and 1 <= t <= 8 and -(-nb//wk) <= 8

@pytest.mark.parametrize('bits', BITS)
def test_small_batches(bits, poisoned):
    for M,out,width,shape,dtype in ((2, 24, 136, None, torch.bfloat16), (17, 16, 128, (1, 1), torch.float16), (9, 33, 256, (2, 2), torch.bfloat16)):
        tiles, norms, book, _ = matrix(out, width, bits, norms=torch.float32 if M == 2 else torch.float16)
        x = activations(M, width, dtype)
        assert error(gemm.small_gemm(x, tiles, norms, book, shape), gemv.gemv_ref(x, tiles, norms, book, dtype).to(dtype)) < 1e-3

@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16, torch.float32))
def test_dense_is_dequantize(bits, dtype, poisoned):
    for out,width in ((16, 128), (21, 200), (3, 131)):
        tiles, norms, book, q = matrix(out, width, bits)
        assert torch.equal(gemm.dense(tiles, norms, book, width, dtype).cpu(), q.dequantize(dtype))

def test_matmul_takes_anything():
    tiles, norms, book, q = matrix(32, 133, 5)
    W = q.dequantize().double().to(device)
    for M in (0, 1, 2, 45):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            x = activations(M, 133, dtype)
            y = gemm.matmul(x, tiles, norms, book)
            assert y.shape == (M, 32) and y.dtype == dtype and (M == 0 or error(y, x.double() @ W.T) < (6e-3 if x.element_size() == 2 else 1e-5))
    x = activations(3, 266)[:, ::2]
    assert torch.equal(gemm.matmul(x, tiles, norms, book), gemm.matmul(x.contiguous(), tiles, norms, book))
    g = activations(5, 32, torch.float32)
    assert error(gemm.matmul_t(g, tiles, norms, book, 133), g.double() @ W) < 1e-5

def test_wrong_results_are_found_out(monkeypatch):
    tiles, norms, book, _ = matrix(16, 128, 3)
    monkeypatch.setattr(gemm, 'CHECKED', set())
    good = gemm.gemv
    def broken(*a): return good(*a)*1.2
    broken.__name__ = 'gemv'
    monkeypatch.setattr(gemm, 'gemv', broken)
    with pytest.raises(UnsupportedError, match='HLWQ_KERNELS=off'): gemm.matmul(activations(1, 128), tiles, norms, book)
    assert not gemm.CHECKED

def experts(E, out, width, bits, seed=0):
    "A stack of E matrices"
    s = [matrix(out, width, bits, seed=seed + e) for e in range(E)]
    return torch.stack([w[0] for w in s]), torch.stack([w[1] for w in s]), s[0][2]

@pytest.mark.parametrize('topk', (1, 2))
def test_experts(topk, poisoned):
    E, hidden, inner, T = 3, 64, 24, 2
    up, down = experts(E, 2*inner, hidden, 5), experts(E, hidden, inner, 5)
    x, weights = activations(T, hidden), torch.rand(T, topk).to(device)
    ids = torch.stack([torch.randperm(E)[:topk] for _ in range(T)]).to(device)
    rows = torch.arange(T*topk, device=device)//topk
    h = moe.expert_ref(x, rows, ids.flatten(), *up)
    want = (moe.expert_ref(torch.nn.functional.silu(h[:, :inner])*h[:, inner:], torch.arange(T*topk), ids.flatten(), *down)*weights.view(-1, 1)).view(T, topk, -1).sum(1)
    assert error(moe.expert_layer(x, ids, weights, up, down), want) < 8e-3
    assert error(moe.expert_matmul(x, rows, ids.flatten(), *up), h) < 6e-3

def test_parts_hold_every_pair():
    g = torch.Generator().manual_seed(0)
    for S,E,size,topk in ((1, 1, 8, 1), (7, 3, 2, 1), (40, 5, 8, 4), (64, 100, 8, 2), (33, 2, 16, 3), (300, 5, 32, 8)):
        ids = torch.randint(0, E, (S,), generator=g).to(device)
        place, row, expert = moe.expert_parts(ids, E, size, topk)
        want = moe.expert_parts_ref(ids, E, size)
        assert torch.equal(place, want[0]) and torch.equal(expert, want[2]) and torch.equal(row, torch.where(want[1] < 0, -1, want[1]//topk))
        assert len(row) == len(expert)*size and torch.equal(row[place], torch.arange(S, device=device)//topk) and int((row >= 0).sum()) == S
        held = expert.repeat_interleave(size)
        assert torch.equal(held[place], ids) and (row[held < 0] == -1).all()
        place, row, _, ends = moe._sorted(ids, E, 1, topk, S, 0)                # without parts: experts one after the other
        assert torch.equal(ids[place.argsort()], ids.sort()[0]) and torch.equal(row, ids.argsort(stable=True)//topk) and torch.equal(ends.long(), ids.bincount(minlength=E).cumsum(0))

def test_experts_that_do_not_exist_are_nowhere():
    "Their pairs have no place, those of others keep theirs, and what would have come from them is NaN"
    ids = torch.tensor([2, 9, 0, -1, 2, 5], device=device)
    place, row, expert = moe.expert_parts(ids, 6, 2)
    assert place.tolist() == [2, -1, 0, -1, 3, 4] and expert.tolist()[:4] == [0, 2, 5, -1] and row.tolist()[:6] == [2, -1, 0, 4, 5, -1]
    row = moe._sorted(ids, 6, 1, 1, len(ids), 0)[1]
    assert row.tolist() == [2, 0, 4, 5, 0, 0]
    up, down = experts(3, 16, 128, 4, 1), experts(3, 16, 8, 4, 2)
    x, ids, weights = activations(17, 128), torch.randint(0, 3, (17, 2), generator=torch.Generator().manual_seed(0)).to(device), torch.rand(17, 2).to(device)
    y, wrong = moe.expert_layer(x, ids, weights, up, down), ids.clone()
    wrong[7, 1] = 3
    z = moe.expert_layer(x, wrong, weights, up, down)
    assert z[7].isnan().all() and torch.equal(z[:7], y[:7]) and torch.equal(z[8:], y[8:])

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16, torch.float32))
def test_gathered_sums(dtype):
    "As exact as sums in float64 that are rounded once"
    g = torch.Generator().manual_seed(0)
    for T,topk,width in ((1, 1, 8), (3, 8, 100), (5, 2, 2048)):
        y, place = torch.randn(T*topk + 4, width, generator=g).to(device, dtype), torch.randperm(T*topk + 4, generator=g)[:T*topk].to(device)
        for weights in (None, torch.rand(T*topk, generator=g).to(device), torch.rand(T*topk, generator=g).to(device, dtype)):
            got, exact = moe.gather_sum(y, place, topk, weights), (y.double()[place]*(1 if weights is None else weights.double()[:, None])).view(T, topk, width).sum(1)
            assert got.dtype == dtype and error(got, exact) <= 1.01*error(exact.to(dtype), exact) + 1e-7
            assert error(moe.gather_sum_ref(y, place, topk, weights), exact) <= 1.01*error(exact.to(dtype), exact) + 1e-7

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_graph_replay_is_eager():
    tiles, norms, book, _ = matrix(256, 1024, 5)
    for M in (1, 8, 64):
        x = activations(M, 1024)
        want = gemm.matmul(x, tiles, norms, book)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): y = gemm.matmul(x, tiles, norms, book)
        y.fill_(float('nan')); graph.replay(); torch.cuda.synchronize()
        assert torch.equal(y, want)

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_no_waiting_for_the_gpu():
    E = 8
    up = [matrix(64, 128, 5, seed=e) for e in range(E)]
    tiles, norms, book = torch.stack([w[0] for w in up]), torch.stack([w[1] for w in up]), up[0][2]
    for T in (1, 40):
        x, ids = activations(T, 128), torch.randint(0, E, (T,)).to(device)
        rows = torch.arange(T, device=device)
        moe.expert_matmul(x, rows, ids, tiles, norms, book), gemm.matmul(x, tiles[0], norms[0], book)
        torch.cuda.set_sync_debug_mode('error')
        try: moe.expert_matmul(x, rows, ids, tiles, norms, book), gemm.matmul(x, tiles[0], norms[0], book)
        finally: torch.cuda.set_sync_debug_mode('default')

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_sizes_beyond_32_bits():
    E, out, width = 520, 4096, 8192                            # 17.4e9 weights at 2 bits: 4.4e9 bytes
    if torch.cuda.mem_get_info()[0] < 16e9: pytest.skip('needs 16 GB')
    tiles, norms, book, _ = matrix(out, width, 2)
    big, n = tiles.expand(E, *tiles.shape).contiguous(), norms.expand(E, *norms.shape).contiguous()
    x = activations(1, width)
    assert big.numel() > 2**30 and big.nbytes > 2**31
    y = moe.expert_gemv(x, torch.tensor([0, E-1], device=device), 2, big, n, book)
    assert torch.equal(y[0], y[1]) and error(y[:1], gemv.gemv_ref(x, tiles, norms, book)) < 6e-3
    back = layout.from_tiles(big, out)
    assert torch.equal(back[-1], layout.from_tiles(tiles, out)) and torch.equal(layout.to_tiles(back, 2)[-1], tiles)
    del big, back
    w = torch.full((2**31//4096 + 16, 4096), .5, device=device, dtype=torch.bfloat16); w[-16:] = activations(16, 4096)
    packed, _, flag = encode_rows(w, codebook('lloyd-max', 2))
    assert int(flag) == 0 and torch.equal(packed[-16:], encode_rows(w[-16:], codebook('lloyd-max', 2))[0])

@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_second_gpu():
    tiles, norms, book, _ = matrix(64, 256, 5)
    x = activations(1, 256)
    other = torch.device('cuda', 1 - device.index)
    moved = [o.to(other) for o in (x, tiles, norms)]
    for M in (1, 9, 64): assert torch.equal(gemm.matmul(moved[0].expand(M, -1), *moved[1:], book.to(other)).cpu(), gemm.matmul(x.expand(M, -1), tiles, norms, book).cpu())

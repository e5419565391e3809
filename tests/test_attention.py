"Decode attention against torch in float64: in the interpreter on a CPU, for real where there is a GPU"
import os,subprocess,sys
from math import ceil
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import pytest
triton = pytest.importorskip('triton')
import triton.language as tl
from common import ROOT
from hlwq.core import ConfigError,UnsupportedError
from hlwq.kernels import attention,layout
from hlwq.kernels.attention import MAX_SPLITS,attention_shape,decode_attention,decode_attention_ref,share_of,shared_bytes,shares_ref

GPU = torch.cuda.is_available()
if not GPU and not layout.INTERPRETED: pytest.skip('triton was imported without TRITON_INTERPRET before', allow_module_level=True)
device = torch.device('cuda', torch.cuda.current_device()) if GPU else torch.device('cpu')
BF16,F16,F32 = torch.bfloat16,torch.float16,torch.float32
NAN = float('nan')

def error(y, ref): return float((y.double() - ref.double()).norm()/ref.double().norm())

@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    "Workspace and results hold NaN at first, so that an element that is forgotten, or read before it was written, shows"
    empty = torch.empty
    def poison(t): return t.fill_(NAN) if t.is_floating_point() else t
    monkeypatch.setattr(torch, 'empty', lambda *a, **k: poison(empty(*a, **k)))

def operands(n, starts=(0,), heads=4, kv_heads=2, D=64, capacity=150, dtype=BF16, seed=0):
    "A query, and caches that hold NaN wherever nothing is visible"
    g,rows = torch.Generator().manual_seed(seed),len(starts)
    q = torch.randn(rows, heads, D, generator=g).to(device, dtype)
    k,v = (torch.full((rows, kv_heads, capacity, D), NAN, dtype=dtype, device=device) for _ in range(2))
    for c in (k, v):
        for r,s in enumerate(starts): c[r, :, s:n] = torch.randn(kv_heads, n-s, D, generator=g).to(device, dtype)
    return q,k,v,torch.tensor([n], device=device),torch.tensor(starts, device=device)

def sdpa(q, k, v, n, starts, scale, window, dtype):
    "Torch's attention, row by row, over the visible keys alone"
    out = []
    for r,s in enumerate(starts):
        s = min(max(s, 0, n-(window or n)), n-1)
        out.append(torch.nn.functional.scaled_dot_product_attention(q[r:r+1, :, None].to(dtype), k[r:r+1, :, s:n].to(dtype), v[r:r+1, :, s:n].to(dtype), scale=scale, enable_gqa=True)[:, :, 0])
    return torch.cat(out)

def check(q, k, v, length, start, scale=None, window=None, shape=(32, 3), **kw):
    "Asserts that the kernel is as exact as torch in the same dtype: twice its distance from float64, and what sums in float32 cost"
    n,starts,scale = int(length),start.view(-1).tolist(),scale or q.shape[-1]**-.5
    y = decode_attention(q, k, v, length, start, scale, window=window, shape=shape, **kw)
    ref = sdpa(q, k, v, n, starts, scale, window, torch.float64)
    assert y.shape == q.shape and y.dtype == q.dtype
    ours,torchs = error(y, ref),error(sdpa(q, k, v, n, starts, scale, window, q.dtype), ref)
    assert ours <= 2*torchs + 4e-7, f'{ours:.2e} from float64, torch {torchs:.2e}'
    return y

# --- the reference, and who reads what

def test_reference_is_sdpa():
    for starts,window in (((0, 7, 29), None), ((0, 7, 29), 5), ((40, -3, 30), None)):
        q,k,v,length,start = operands(30, [min(max(s, 0), 29) for s in starts])
        ref = decode_attention_ref(q, k, v, length, torch.tensor(starts), .1, window, torch.float64)
        assert error(ref, sdpa(q, k, v, 30, starts, .1, window, torch.float64)) < 1e-12

@triton.jit
def _shares_kernel(LENGTH, START, OUT, capacity, window, GRAIN: tl.constexpr, SPLITS: tl.constexpr):
    i = tl.program_id(0)
    start, first, last, live = share_of(LENGTH, START, 0, i, 1, capacity, window, GRAIN, SPLITS)
    tl.store(OUT + i*4, start)
    tl.store(OUT + i*4 + 1, first)
    tl.store(OUT + i*4 + 2, last)
    tl.store(OUT + i*4 + 3, live)

def test_shares():
    g = torch.Generator().manual_seed(0)
    def below(n): return int(torch.randint(n, (1,), generator=g))
    for _ in range(60):
        n,splits,grain = 1+below(600),1+below(9),(8, 16, 32)[below(3)]
        first,window = below(n+40)-20,None if below(2) else 1+below(100)
        want = shares_ref(n, first, splits, grain, window)
        low = min(max(first, 0, n-(window or n)), n-1)
        assert [i for a,b in want for i in range(a, b)] == list(range(low, n)) and len(want) <= splits     # each visible key once
        out = torch.zeros(splits, 4, dtype=torch.int32, device=device)
        _shares_kernel[(splits,)](torch.tensor([n], device=device), torch.tensor([first], device=device), out, 600, window or 600, GRAIN=grain, SPLITS=splits)
        assert [(max(a, s), b) for s,a,b,_ in out.tolist() if a < b] == want and set(out[:, 3].tolist()) == {len(want)}

def test_shape():
    for pairs in (1, 2, 3, 7, 8, 32, 96, 140, 512):
        for D in (16, 64, 80, 128, 256):
            for capacity in (1, 33, 1000, 32768):
                for itemsize,sms,shared in ((2, 132, 232448), (4, 132, 232448), (2, 108, 166912), (2, 84, 101376), (4, 40, 65536)):
                    chunk,splits = attention_shape(pairs, D, capacity, itemsize, sms, shared)
                    assert chunk in (16, 32, 64, 128) and 1 <= splits <= min(MAX_SPLITS, ceil(capacity/(chunk//2)))
                    assert shared_bytes(chunk, D, itemsize) <= shared or chunk == 16
                    if pairs*min(MAX_SPLITS, capacity*2//chunk) >= 2*sms: assert pairs*splits >= .9*sms           # a long text has work for nearly all
    assert attention_shape(8, 128, 4096) == (128, 16) and attention_shape(132, 128, 4096) == (128, 1)

# --- the kernel

@pytest.mark.parametrize('n', (1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 64, 95, 97, 149, 150))
def test_lengths(n):
    "Grains of 16 keys, chunks of 32, three splits, a capacity that is no multiple of any"
    check(*operands(n, heads=2, kv_heads=1))

@pytest.mark.parametrize('shape', ((16, 1), (16, 19), (32, 2), (64, 5), (128, 3)))
def test_shapes(shape):
    for n in (9, 130): check(*operands(n, heads=2, kv_heads=1), shape=shape)

@pytest.mark.parametrize('D', (16, 32, 48, 64, 80, 96, 112, 128, 192, 256))
@pytest.mark.parametrize('dtype', (BF16, F16, F32))
def test_widths(D, dtype):
    check(*operands(40, (3,), heads=3, kv_heads=1, D=D, dtype=dtype, capacity=41))

@pytest.mark.parametrize('group', (1, 2, 4, 7, 8, 16))
def test_groups(group): check(*operands(70, heads=2*group), shape=(64, 3))

@pytest.mark.parametrize('starts', ((0,), (1,), (69,), (31, 32), (0, 33, 64), (69, 0, 1, 50)))
def test_padding(starts):
    q,k,v,length,start = operands(70, starts)
    y = check(q, k, v, length, start)
    for same in (start.int(), start[:, None], torch.stack([start, start+1], 1)[:, 0]): assert torch.equal(decode_attention(q, k, v, length, same, 64**-.5, shape=(32, 3)), y)

def test_starts_that_see_nothing():
    "The newest key is always visible, and none before the first"
    q,k,v,length,_ = operands(70, (69, 0))
    for far in (70, 2**40): check(q, k, v, length, torch.tensor([far, -far], device=device))

@pytest.mark.parametrize('window', (1, 2, 20, 69, 70, 1000))
def test_window(window):
    q,k,v,length,start = operands(70, (0, 45))
    check(q, k, v, length, start, window=window)
    k[:, :, :max(0, 70-window)] = v[:, :, :max(0, 70-window)] = NAN
    check(q, k, v, length, start, window=window)

def test_lengths_that_cannot_be():
    q,k,v,_,start = operands(70, (0, 3))
    for n in (0, -1, 61, 70, 2**32+5): assert decode_attention(q, k[:, :, :60], v[:, :, :60], torch.tensor([n], device=device), start, .1, shape=(32, 3)).isnan().all()

def test_scores_of_any_size():
    q,k,v,length,start = operands(70, dtype=F32)
    check(q, k, v, length, start, scale=30.)                   # one key has all the weight
    check(q, k, v, length, start, scale=1e-6)                  # all have the same
    q,k[:, :, :40] = q.abs()+.1,-float('inf')                  # whole chunks and parts without weight
    check(q, k, v, length, start)
    v[:, :, 69] = NAN
    assert decode_attention(q, k, v, length, start, .1, shape=(32, 3)).isnan().all()       # a NaN that is visible is seen

def test_memory_of_any_shape():
    q,k,v,length,start = operands(70, (0, 5))
    y = check(q, k, v, length, start)
    def same(q, k, v, **kw): assert torch.equal(decode_attention(q, k, v, length, start, 64**-.5, shape=(32, 3), **kw), y)
    same(q, k.transpose(1, 2).contiguous().transpose(1, 2), v)                                # keys before heads
    same(q, k, v.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3))
    wide = torch.full((2, 2, 150, 131), NAN, dtype=BF16, device=device)
    wide[..., 3:67] = k
    same(q, wide[..., 3:67], v)                                # an odd step, an odd begin
    kv = torch.stack([k, v], 3)
    same(q, kv[..., 0, :], kv[..., 1, :])
    same(torch.cat([q, q*NAN], 2)[..., :64], k, v)
    same(torch.stack([q, q], 3)[..., 0], k, v)                 # not contiguous in the last axis: copied
    out = torch.full((2, 4, 70), NAN, dtype=BF16, device=device)
    same(q, k, v, out=out[..., :64])
    assert torch.equal(out[..., :64], y) and out[..., 64:].isnan().all()

def test_caches_of_one_size_serve_all_lengths():
    q,k,v,length,start = operands(150)
    for n in (1, 33, 34, 150): assert torch.equal(check(q, k, v, length.fill_(n), start, shape=None), check(q, k, v, length, start, shape=None, settled=True))

@pytest.mark.parametrize('axis,n', ((0, 3), (1, 3), (2, 3), (2, 33)))
def test_addresses_beyond_32_bits(axis, n):
    "Some rows, heads or keys, the last of which lies more than 2**31 elements from the first; memory between them is never touched"
    far = 2**31//(n-1)+64
    try: room = torch.Tensor.new_empty(torch.zeros(0, dtype=F16, device=device), (n-1)*far+4096)
    except (RuntimeError, MemoryError): pytest.skip('needs 4.3 GB of addresses')
    strides,shape = [3*64, 3*64, 64, 1],[1, 1, 2, 64]
    shape[axis] = n
    strides[axis] = far
    k = room.as_strided(shape, strides)
    g = torch.Generator().manual_seed(0)
    k.copy_(torch.randn(shape, generator=g))
    q = torch.randn(shape[0], shape[1]*2, 64, generator=g).to(device, F16)
    check(q, k, k, torch.tensor([shape[2]], device=device), torch.zeros(shape[0], dtype=torch.int64, device=device))

def test_what_is_refused(monkeypatch):
    q,k,v,length,start = operands(70)
    def refused(error, match, *a, **kw):
        with pytest.raises(error, match=match): decode_attention(*a, **kw)
    refused(ConfigError, 'order of the axes', q, k, v[:, :, 1:], length, start, .1)
    refused(ConfigError, 'order of the axes', q[0], k, v, length, start, .1)
    refused(ConfigError, 'order of the axes', q, k.transpose(1, 3), v.transpose(1, 3), length, start, .1)
    refused(ConfigError, 'order of the axes', q[:0], k[:0], v[:0], length, start[:0], .1)
    refused(ConfigError, 'convert q', q.float(), k, v, length, start, .1)
    refused(ConfigError, 'convert q', q.double(), k.double(), v.double(), length, start, .1)
    refused(UnsupportedError, 'head_dim 40', q[..., :40], k[..., :40], v[..., :40], length, start, .1)
    refused(UnsupportedError, '17 query heads', q[:, :1].expand(1, 17, 64), k[:, :1], v[:, :1], length, start, .1)
    refused(UnsupportedError, '3 query heads', q[:, :3], k, v, length, start, .1)
    refused(ConfigError, 'contiguous there', q, k.transpose(2, 3).contiguous().transpose(2, 3), v, length, start, .1)
    refused(ConfigError, 'one int64', q, k, v, length.int(), start, .1)
    refused(ConfigError, 'one int64', q, k, v, length.expand(2), start, .1)
    for s in (start.float(), start.expand(2), start[0]): refused(ConfigError, 'start is', q, k, v, length, s, .1)
    refused(ConfigError, 'window 0', q, k, v, length, start, .1, window=0)
    refused(ConfigError, 'leave it out', q, k, v, length, start, .1, out=q.float())
    refused(ConfigError, 'move them', q, k, v, length.to('meta'), start, .1)
    monkeypatch.setattr(attention, 'INTERPRETED', False)
    if not GPU: refused(UnsupportedError, 'no kernel for cpu', q, k, v, length, start, .1)

COMPILE = '''
import re,subprocess,sys,tempfile,triton,triton.language as tl
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hlwq.kernels import lanes
lanes.PTX = tl.constexpr(True)
from hlwq.kernels import attention as A
bin = Path(triton.__file__).parent/'backends/nvidia/bin/cuobjdump'
def compiled(fn, constants, cap, stages):
    names,dtype = fn.arg_names,constants['DT']
    kind = lambda n: 'constexpr' if n in constants else f'*{dtype}' if n in ('Q', 'K', 'V', 'OUT') else '*i64' if n in ('LENGTH', 'START') else '*fp32' if n == 'WS' else 'fp32' if n == 'scale' else 'i32'
    aligned = {(names.index(n),):[['tt.divisibility', 16]] for n in names if kind(n)[0] == '*' or n[1:] in ('_row', '_head')}
    k = triton.compile(ASTSource(fn, {n:kind(n) for n in names}, constants, aligned), target=GPUTarget('cuda', cap, 32), options=dict(num_warps=4, num_stages=stages, **({'launch_pdl':True} if cap >= 90 else {})))
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(k.asm['cubin']); f.flush()
        regs,stack = re.search(r'REG:(\\d+) STACK:(\\d+)', subprocess.run([bin, '-res-usage', f.name], capture_output=True, text=True, check=True).stdout).groups()
    return k.metadata.shared,int(regs),int(stack),k.asm['ptx']
for D,cap,shared,settled in ((256, 90, 232448, True), (128, 90, 232448, False), (80, 80, 166912, False), (256, 89, 101376, False)):
    chunk,splits = A.attention_shape(2, D, 32768, 2, 132, shared)
    common = dict(HEADS=2, GROUP=8, D=D, GRAIN=chunk//2, SPLITS=splits, EARLY=cap >= 90, DT=tl.bfloat16)
    used,regs,stack,ptx = compiled(A._split_kernel, dict(common, K_STEP=D, V_STEP=D, BD=A._padded(D), N=chunk, SETTLED=settled), cap, 3)
    parts = A._padded(splits)
    _,_,spilled,_ = compiled(A._combine_kernel, dict(common, BD=min(A._padded(D), max(16, 4096//parts)), PARTS=parts), cap, 3)
    early = 'griddepcontrol.wait' in ptx and ptx.index('griddepcontrol.wait') < min(ptx.index('cp.async.cg'), ptx.index('ld.global.v'))     # nothing but the length is read before
    print(D, cap, used <= A.shared_bytes(chunk, D) <= shared, regs <= 168, stack+spilled, 'cp.async.cg.shared.global [' in ptx and 'mma.sync' in ptx, early, 'prefetch.global.L2' in ptx)
'''

def test_compiled_code():
    "Compiled for GPUs that need not be there: registers suffice, shared memory is what the rule expects, copies run ahead, the newest key is read after the wait"
    pytest.importorskip('triton.backends.nvidia')
    if not os.path.exists(os.path.join(os.path.dirname(triton.__file__), 'backends/nvidia/bin/cuobjdump')): pytest.skip('triton without cuobjdump')
    env = {k:v for k,v in os.environ.items() if k != 'TRITON_INTERPRET'}
    r = subprocess.run([sys.executable, '-c', COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert not r.returncode, r.stderr
    assert r.stdout.split('\n')[:4] == ['256 90 True True 0 True True True', '128 90 True True 0 True True False', '80 80 True True 0 True False False', '256 89 True True 0 True False False']

# --- only a GPU can tell

@pytest.mark.skipif(not GPU, reason='needs a GPU')
@pytest.mark.parametrize('settled', (False, True))
def test_one_recording_serves_all_lengths(settled):
    q,k,v,length,start = operands(3000, (0, 100), heads=16, D=256, capacity=3000)
    def call(f=decode_attention, **kw): return f(q, k, v, length, start, .0625, settled=settled, **kw)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): y = call()
    for n in (101, 1000, 2999, 3000, 700):
        length.fill_(n)
        y.fill_(NAN); graph.replay(); torch.cuda.synchronize()
        assert torch.equal(y, call(check, shape=None))
    again = [call() for _ in range(20)]
    assert all(torch.equal(a, again[0]) for a in again)

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_after_kernels_that_write_its_operands():
    "A kernel that starts early must not read what the one before it is still writing"
    q,k,v,length,start = operands(2000, heads=16, D=128, capacity=2048)
    new = [(torch.randn_like(q), torch.randn_like(k[:, :, :1]), torch.randn_like(v[:, :, :1])) for _ in range(8)]
    want = []
    for i,(a,b,c) in enumerate(new):
        k[:, :, 1990+i:1991+i],v[:, :, 1990+i:1991+i] = b,c
        want.append([sdpa(a, k, v, 1991+i, (0,), .09, None, dtype) for dtype in (torch.float64, BF16)])
    length.fill_(1990); got = []
    for i,(a,b,c) in enumerate(new):
        length.add_(1); q.copy_(a); v[:, :, 1990+i:1991+i] = c; k[:, :, 1990+i:1991+i] = b
        got.append(decode_attention(q, k, v, length, start, .09, settled=True))
    for y,(ref,torchs) in zip(got, want): assert error(y, ref) <= 2*error(torchs, ref)

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_no_waiting_for_the_gpu():
    q,k,v,length,start = operands(70)
    decode_attention(q, k, v, length, start, .1)
    torch.cuda.set_sync_debug_mode('error')
    try: decode_attention(q, k, v, length, start, .1)
    finally: torch.cuda.set_sync_debug_mode('default')

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_long_texts():
    "The shapes that the rule chooses, with many chunks in each share"
    for heads,kv_heads,D,n in ((16, 2, 256, 30000), (32, 8, 128, 9000), (9, 3, 64, 20001)): check(*operands(n, heads=heads, kv_heads=kv_heads, D=D, capacity=32768), shape=None)

@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_second_gpu():
    ops = operands(70)
    other = torch.device('cuda', 1-device.index)
    assert torch.equal(decode_attention(*(o.to(other) for o in ops), .1).cpu(), decode_attention(*ops, .1).cpu())

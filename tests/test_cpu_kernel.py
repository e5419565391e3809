"The CPU kernels against plain torch: every width, shape, norm and instruction set, many threads at once, after a fork, without llvmlite"
import os, re
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from hypothesis import given, settings, strategies as st

from common import modules, python
from hlwq.core import BITS, UnsupportedError
from hlwq.kernels import cpu

needs = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())
SETS = cpu.instruction_sets() if cpu.available() else ()


def made_up(out, width, bits, half=True, experts=(), seed=0):
    "Random codes, norms and centroids, and activations for five rows"
    g, nb = torch.Generator().manual_seed(seed), -(-width//128)
    packed = torch.randint(0, 256, (*experts, out, nb*16*bits), dtype=torch.uint8, generator=g)
    norms = torch.randn(*experts, out, nb, generator=g)
    m = packed, norms.half() if half else norms*1e6, torch.randn(2**bits, generator=g), bits
    return m, torch.randn(5, nb*128, generator=g)


def error(got, xr, m):
    "The error in units of what float32 sums of these numbers may have: n_blocks*128 products"
    rows = cpu.packed_rows_ref(*m).double()
    true, size = xr.double() @ rows.T, xr.abs().double() @ rows.abs().T
    return ((got - true).abs()/size.clamp_min(1e-30)).max().item()*2**24 if got.numel() else 0.


cases = st.tuples(st.sampled_from(BITS), st.integers(0, 70), st.integers(1, 700), st.booleans(), st.integers(0, 5), st.integers(0, 2**31))


@needs
@pytest.mark.parametrize('isa', SETS)
@settings(deadline=None, max_examples=40)
@given(case=cases)
def test_products_and_rows_are_the_reference(isa, case):
    bits, out, width, half, M, seed = case
    m, xr = made_up(out, width, bits, half, seed=seed)
    assert torch.equal(cpu.packed_rows(*m, isa=isa), cpu.packed_rows_ref(*m))
    y = cpu.packed_matmul(xr[:M], *m, isa=isa)
    assert y.shape == (M, out) and y.dtype == torch.float32 and error(y, xr[:M], m) < 16
    assert torch.equal(y, cpu.packed_matmul(xr[:M], *m, isa=isa))


@needs
@pytest.mark.parametrize('isa', SETS)
@settings(deadline=None, max_examples=40)
@given(M=st.integers(0, 9), width=st.integers(1, 700), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_rotation_has_the_bits_of_torch(isa, M, width, dtype):
    x = torch.randn(M, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    assert torch.equal(cpu.rotate(x, isa), cpu.rotate_ref(x))


@needs
@pytest.mark.parametrize('isa', SETS)
@pytest.mark.parametrize('bits', BITS)
def test_each_code_finds_its_centroid(isa, bits):
    "One-hot activations read single weights, exactly: every code at every place of a block"
    codes = (torch.arange(128)[None] + torch.arange(2**bits)[:, None]) % 2**bits
    from hlwq.packing import pack_codes
    packed = pack_codes(codes.to(torch.uint8), bits).view(2**bits, -1)
    centroids = torch.arange(2**bits).float() - 2**(bits-1) + .5
    y = cpu.packed_matmul(torch.eye(128), packed, torch.ones(2**bits, 1).half(), centroids, bits, isa)
    torch.testing.assert_close(y.T, centroids[codes]*128**-.5, rtol=2e-7, atol=0)


@needs
@pytest.mark.parametrize('isa', SETS)
@settings(deadline=None, max_examples=20)
@given(bits=st.sampled_from(BITS), ids=st.lists(st.integers(0, 3), max_size=7), out=st.integers(1, 70), half=st.booleans())
def test_experts_are_single_products(isa, bits, ids, out, half):
    (packed, norms, centroids, _), _ = made_up(out, 256, bits, half, experts=(4,))
    xr = torch.randn(len(ids), 256, generator=torch.Generator().manual_seed(0))
    y = cpu.packed_matmul_experts(xr, torch.tensor(ids, dtype=torch.int64), packed, norms, centroids, bits, isa)
    assert y.shape == (len(ids), out)
    for s,e in enumerate(ids): assert torch.equal(y[s:s+1], cpu.packed_matmul(xr[s:s+1], packed[e], norms[e], centroids, bits, isa))


@needs
def test_nothing_outside_the_matrix_is_read():
    "The last block ends where a page ends that must not be touched"
    python('''
import ctypes, mmap, torch
from hlwq.kernels import cpu
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
memory = mmap.mmap(-1, 3*page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for guard in (0, 2*page):
    if libc.mprotect(ctypes.c_void_p(start+guard), ctypes.c_size_t(page), 0): raise SystemExit(0)
for bits in (2, 3, 4, 5, 6, 8):
    n = page//(16*bits)
    for first in (page, 2*page - n*16*bits):
        packed = torch.frombuffer((ctypes.c_ubyte*(n*16*bits)).from_address(start+first), dtype=torch.uint8).view(n, -1)
        for isa in cpu.instruction_sets():
            cpu.packed_matmul(torch.ones(1, 128), packed, torch.ones(n, 1).half(), torch.ones(2**bits), bits, isa)
            cpu.packed_rows(packed, torch.ones(n, 1), torch.ones(2**bits), bits, isa=isa)
''')


@needs
def test_many_threads_at_once():
    "Compiling included; each gets the bits that it gets alone"
    todo = [made_up(300, 640, bits, seed=s) for bits in BITS for s in range(4)]
    alone = [cpu.packed_matmul(xr, *m) for m,xr in todo]
    cpu._kernel.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5): assert all(map(torch.equal, pool.map(lambda o: cpu.packed_matmul(o[1], *o[0]), todo), alone))


@needs
def test_thread_count_does_not_show():
    m, xr = made_up(500, 640, 5)
    before = torch.get_num_threads()
    try:
        got = [torch.set_num_threads(n) or cpu.packed_matmul(xr, *m) for n in (1, 2, 3, 5)]
    finally: torch.set_num_threads(before)
    assert all(torch.equal(o, got[0]) for o in got)


@needs
def test_without_openmp(monkeypatch):
    m, xr = made_up(500, 640, 5)
    want = cpu.packed_matmul(xr, *m)
    monkeypatch.setattr(cpu, '_openmp', lambda: None)
    assert torch.equal(cpu.packed_matmul(xr, *m), want)


@needs
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_after_a_fork():
    "The child has none of the parent's threads, and must neither wait for them nor crash"
    out = python('''
import os, signal, torch
torch.set_num_threads(2)
from hlwq.kernels import cpu
m = torch.randint(0, 256, (600, 5*80), dtype=torch.uint8), torch.ones(600, 5).half(), torch.arange(32.), 5
x = torch.randn(1, 640)
want = cpu.packed_matmul(x, *m)
if not (pid := os.fork()):
    signal.alarm(30)
    os._exit(0 if torch.equal(cpu.packed_matmul(x, *m), want) else 1)
print(os.waitpid(pid, 0)[1], torch.equal(cpu.packed_matmul(x, *m), want))
''')
    assert out.split() == ['0', 'True']


@needs
def test_defaults_of_torch_do_not_matter():
    (m, xr), before = made_up(40, 256, 5), torch.get_default_dtype()
    want = cpu.packed_matmul(xr, *m)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device('meta'), torch.inference_mode():
            got = cpu.packed_matmul(xr, *m), cpu.packed_rows(*m), cpu.rotate(xr), cpu.rotate(xr[:, :200].bfloat16())
    finally: torch.set_default_dtype(before)
    assert torch.equal(got[0], want) and all(o.dtype == torch.float32 and o.device.type == 'cpu' for o in got)


def test_without_llvmlite():
    "Importing works and is quick; asking says what is missing; the references still serve"
    out = python('''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('llvmlite', 'numba'): raise ModuleNotFoundError(f'{name} is blocked', name=name)
sys.meta_path.insert(0, Blocked())
import torch
from hlwq.core import UnsupportedError
from hlwq.kernels import cpu
print(cpu.available(), '|', cpu.why_not())
try: cpu.packed_matmul(torch.ones(1, 128), torch.zeros(1, 80, dtype=torch.uint8), torch.ones(1, 1), torch.ones(32), 5)
except UnsupportedError as e: print(e)
print(cpu.packed_matmul_ref(torch.ones(1, 128), torch.zeros(1, 80, dtype=torch.uint8), torch.ones(1, 1), torch.ones(32), 5).shape)
''').splitlines()
    assert re.match(r'False \| llvmlite cannot be imported .*; pip install llvmlite', out[0])
    assert out[1].startswith('CPU kernels: not usable here, need llvmlite') and 'torch.Size([1, 1])' in out[2]


@needs
def test_unknown_instruction_set():
    m, xr = made_up(4, 128, 5)
    with pytest.raises(UnsupportedError, match='not on this processor'): cpu.packed_matmul(xr, *m, isa='altivec')


def test_llvmlite_is_lazy():
    assert 'kernels.cpu' in modules()
    assert python("import sys, torch, hlwq.kernels.cpu; print('llvmlite' in sys.modules, 'numba' in sys.modules)").split() == ['False', 'False']

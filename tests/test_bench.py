"What can be known of measuring without a GPU: what is asked for, what is refused, what the tables say, and a whole run on simulated kernels with a clock of our own"
import json,shlex,sys
from pathlib import Path
import pytest,torch
import hlwq.bench as bench
from common import ROOT,python
from hlwq.bench import *
from hlwq.bench_decode import *
from hlwq.bench_kv import *
from hlwq.cli import main
from hlwq.core import ConfigError,UnsupportedError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='says what happens without a GPU')
LIMITS = dict(copy_tb_s=2.5, matmul_tflops=700., node_us=1.5)

def product(**kw): return dict(what='gemv', out_features=4096, in_features=4096, M=1, bits=5, bf16_us=16., ours_us=8., ratio=2., int4_us=None, nf4_us=None, floor_us=4., error=.0029, note=None) | kw

@pytest.mark.parametrize('texts,shapes', [(['4096x4096'],[(4096,4096)]), (['512X2048'.lower(),'8x8, 1*16'],[(512,2048),(8,8),(1,16)])])
def test_shapes(texts, shapes): assert parse_shapes(texts) == shapes

@pytest.mark.parametrize('text', ['','4096','4096x','x8','4096x4096x2','0x128','128x0','16x100','-1x8','4096x4096,','1e3x8'])
def test_wrong_shapes(text):
    with pytest.raises(ConfigError, match='4096x4096'): parse_shapes([text])

def test_lists():
    assert (parse_numbers('1'),parse_numbers(' 1, 64'),parse_bits('8,2')) == ([1],[1,64],[8,2])
    for wrong in ('','0','1,','-1','1.5','one','²'):
        with pytest.raises(ConfigError): parse_numbers(wrong)
    for wrong in ('7','1','5,16'):
        with pytest.raises(ConfigError, match='need one of 2, 3, 4, 5, 6, 8'): parse_bits(wrong)

def test_cases():
    every = kernel_cases()
    assert len(every) == len(set(every)) and {(4096,4096,5,1),(512,2048,5,1),(14336,4096,8,1),(14336,4096,5,64),(4096,4096,5,4096)} <= set(every)
    assert kernel_cases([(8,8)]) == [(8,8,5,1)] and kernel_cases([(8,8)], [2,3], [1,9]) == [(8,8,2,1),(8,8,2,9),(8,8,3,1),(8,8,3,9)]
    assert {(b,m) for _,_,b,m in kernel_cases(rows=[3])} == {(5,3)} and len(kernel_cases(rows=[3])) == len(SHAPES)
    for cases in PARTS.values():                               # neighbours share their matrices: a shape never comes back
        keys = [c[:3] for c in cases]
        assert len(set(keys)) == 1 + sum(a != b for a,b in zip(keys, keys[1:]))

@pytest.mark.parametrize('one', [1,10**5,2*10**6,36_700_160,62_390_272,62_500_000,10**9])
def test_number_of_sets(one):
    n = n_sets(one)
    assert 4 <= n <= 64
    if 4 < n < 64: assert n*one > 250e6 >= (n-1)*one
    assert (n_sets(one, nbytes=0),n_sets(one, nbytes=0, least=1)) == (4,1)

@pytest.mark.parametrize('n', [1,4,23,63,64,65])
def test_cycled(n):
    calls = [object() for _ in range(n)]
    many = cycled(calls)
    assert len(many) >= 64 and len(many) % n == 0 and many[:n] == many[-n:] == calls

def test_floor(): assert floor_us(2_500_000, LIMITS) == pytest.approx(1.)

@no_gpu
@pytest.mark.parametrize('f', [require_gpu,lambda: graph_seconds([lambda: None]),ceilings,bench_kernels,bench_experts,bench_quantize,lambda: run_bench('kernels', ''),lambda: run_bench('quantize', '', bits=[5]),bench_decode,lambda: run_decode('')])
def test_refused_without_gpu(f):
    with pytest.raises(UnsupportedError, match=r'^bench: no CUDA device .*, need an NVIDIA GPU .*; run it on'): f()

def test_refused_on_wrong_machines(monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '12.8'); monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla T4'); monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (7,5))
    with pytest.raises(UnsupportedError, match='Tesla T4 has compute capability 7.5, need 8.0'): require_gpu()
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (9,0)); monkeypatch.setattr(bench, 'find_spec', lambda name: None)
    with pytest.raises(UnsupportedError, match='triton is not installed, need 3.2'): require_gpu()

@no_gpu
@pytest.mark.parametrize('line,needle', [('kernels','no CUDA device'), ('quantize --bits 5','no CUDA device'), ('kernel','need kernels, quantize, decode, kv or offload'), ('kernels --shape 12','4096x4096'), ('kernels --bits 9','bits'), ('kernels --rows 0','rows'),
    ('quantize --rows 8','bench quantize'), ('quantize --shape 8x8','bench quantize'), ('quantize --json nowhere/x.json','nowhere/x.json'), ('kernels --json .','cannot be written'), ('','hlwq bench --help'),
    ('decode','no CUDA device'), ('decode --model qwen3.6,llama --bits 5,4,bf16 --rows 1,8 --context 128,8192 --new 128 --layers 4','no CUDA device'), ('decode --model qwen3','fits Qwen3.6-35B-A3B, Qwen3-30B-A3B, Qwen3-8B, need one of'),
    ('decode --model ""','fits Qwen3.6'), ('decode --bits 7','need one of 2, 3, 4, 5, 6, 8'), ('decode --bits fp8','and bf16'), ('decode --rows 0','rows'), ('decode --context some','context'), ('decode --new 1','new: 1'), ('decode --layers 0','layers: 0'),
    ('decode --shape 8x8','--shape given'), ('kernels --model llama','--model given'), ('quantize --context 8 --new 5','--context, --new given'), ('decode --json nowhere/x.json','nowhere/x.json'),
    ('offload','no CUDA device'), ('offload --slots 2,4 --new 64 --layers 4 --bits 4','no CUDA device'), ('offload --slots 0','slots'), ('offload --bits 5,4','2 widths'), ('offload --rows 2','--rows given'), ('decode --slots 2','--slots given'), ('offload --new 1','new 1')])
def test_command_refuses(line, needle, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(['bench',*shlex.split(line)])
    out,err = capsys.readouterr()
    assert (code,out) == (2,'') and err.startswith('hlwq: ') and err.count('\n') == 1 and needle in err
    assert not list(tmp_path.iterdir())

def test_command_writes(capsys, tmp_path, monkeypatch):
    asked = {}
    def run(what, command, progress, **kw):
        asked.update(kw, what=what)
        return BenchResult(command, machine(), LIMITS, [product(note='int4: not here')])
    monkeypatch.setattr(bench, 'run_bench', run)
    assert main(['bench','kernels','--bits','5,4','--shape','4096x4096','--shape','8x8','--rows','1,8','--json',str(tmp_path/'r.json')]) == 0
    assert asked == dict(what='kernels', bits=[5,4], shapes=[(4096,4096),(8,8)], rows=[1,8])
    out = capsys.readouterr().out
    assert '4096 x 4096' in out and '2.00' in out and 'int4: not here' in out and 'copy 2.50 TB/s' in out
    r = json.loads((tmp_path/'r.json').read_text())
    assert r['command'] == 'hlwq bench kernels --bits 5,4 --shape 4096x4096 --shape 8x8 --rows 1,8' and r['machine']['torch'] == torch.__version__
    assert BenchResult(**r).kernels == [product(note='int4: not here')]

def test_tables():
    head,rows = kernel_table([product(), product(M=4096, what='dense', int4_us=12.345)])
    assert {len(r) for r in rows} == {len(head)} and all(isinstance(c, str) for r in rows for c in r)
    assert rows[0] == ('gemv','4096 x 4096','5','1','16.00','8.00','2.00','','','4.00','0.0029') and rows[1][7] == '12.35'
    e = dict(what='layer', bits=5, ours_us=10., bmm_us=20., bf16_us=30., ratio_bmm=2., ratio=3., floor_us=5., error=.003)
    q = quantize_row('quantize', torch.float32, 5, 1e-3, 10**9, 10**7)
    r = BenchResult('x', {}, LIMITS, [product()], [e], [q])
    assert [len(t[1]) for t in r.tables()] == [1,1,1] and all(len(h) == len(rows[0]) for h,rows in r.tables())
    assert (q['tb_s'],q['model_seconds'],q['dtype']) == (pytest.approx(1.),pytest.approx(3.36),'float32')
    again = BenchResult(**json.loads(json.dumps(r.to_json())))
    assert again == r and again.tables() == r.tables()
    assert BenchResult('x', {}).tables() == []

def test_only_right_kernels_are_timed():
    assert must_agree('x', .005) == .005
    for bad in (.0061,float('inf'),float('nan')):
        with pytest.raises(UnsupportedError, match='it was not timed'): must_agree('x', bad)
    y = torch.randn(3, 64)
    assert relative_error(y*1.01, y) == pytest.approx(.01, rel=1e-3) and relative_error(y.bfloat16(), y) < .003

def test_competitors_may_fail():
    def int4_calls(sets, x): raise RuntimeError('not for\nthis shape')
    def nf4_calls(sets, x): raise ImportError('no such package')
    assert competitor_us(int4_calls, [], None) == (None,'int4: not for this shape') and competitor_us(nf4_calls, [], None) == (None,None)

SIMULATED = f'''
import sys, time, warnings
warnings.filterwarnings('ignore')
import torch
from hlwq import bench
sys.path.insert(0, {str(ROOT/'benchmarks')!r})
timed = []
def clock(calls, repeat=9):                                    # the simulation is slow: one call stands for all
    start = time.perf_counter()
    calls[0]()
    timed.append(len(calls))
    return time.perf_counter() - start
bench.DEVICE, bench.require_gpu, bench.graph_seconds = 'cpu', lambda: None, clock
bench.operand_sets.__defaults__ = (0, 2, 64)                   # nbytes, least, most
limits = {LIMITS!r}
'''

def simulated(code): return python(SIMULATED+code, TRITON_INTERPRET='1')

def test_products_run():
    out = simulated('''
seen = []
rows = bench.bench_kernels([(16, 128), (24, 136)], [5], [1, 2, 41], progress=seen.append, limits=limits)
assert rows == seen and len(rows) == 6
assert [r['what'] for r in rows[:3]] == ['gemv', 'small', 'dense']
assert all(0 < r['error'] < bench.TOLERANCE and r['ratio'] > 0 and r['int4_us'] is None and r['note'].startswith('int4') for r in rows)
assert all(n >= 64 for n in timed)
r = rows[0]
print(r['floor_us'], bench.kernel_table(rows)[1][-1][:4])
''')
    assert float(out.split()[0]) == pytest.approx((16*128*5/8+16*2)/2.5e6) and "('dense', '24 x 136', '5', '41')" in out

def test_wrong_kernels_are_not_timed():
    simulated('''
from hlwq.core import UnsupportedError
from hlwq.kernels import gemm
right = gemm.matmul
gemm.matmul = lambda *a: right(*a)*1.01
try: bench.bench_kernels([(16, 128)], progress=False, limits=limits)
except UnsupportedError as e: assert str(e).startswith('16 x 128 at 5 bits, 1 row: 0.01') and not timed, (e, timed)
else: raise AssertionError('nothing was raised')
''')

def test_experts_and_quantizing_run():
    out = simulated('''
from functools import partial
from hlwq.core import UnsupportedError
bench.expert_sets = partial(bench.expert_sets, n_experts=2, hidden=16, inner=8, topk=2, n_layers=1)
rows = bench.bench_experts((5,), progress=False, limits=limits)
print(*(r['what'] for r in rows), sep='/')
assert all(r['error'] < bench.TOLERANCE for r in rows) and [r['floor_us']/rows[0]['floor_us'] for r in rows] == [1, 1, 1, 2]
rows = bench.bench_quantize((5, 8), (16, 128), progress=False)
print(*(f"{r['what']} {r['dtype']} {r['bits']}" for r in rows), sep='/')
from hlwq import quantize as q
right = bench.quantize_rows
bench.quantize_rows = lambda *a: (right(*a)[0] ^ 1, right(*a)[1])
try: bench.bench_quantize((5,), (16, 128), progress=False)
except UnsupportedError as e: assert 'bfloat16 to 5 bits, codes: inf' in str(e), e
else: raise AssertionError('nothing was raised')
''')
    assert out.splitlines() == ['gate_up/down/silu, down, sum/layer',
        'quantize bfloat16 5/to_tiles uint8 5/dense bfloat16 5/quantize bfloat16 8/to_tiles uint8 8/dense bfloat16 8/quantize float32 5/quantize float32 8']

def test_script(tmp_path):
    "benchmarks/kernels.py from one end to the other, with small cases"
    out = simulated(f'''
from functools import partial
from pathlib import Path
import common, kernels
common.RESULTS = Path({str(tmp_path)!r})
bench.PARTS = dict(gemv=[(16, 128, 5, 1)], small=[(16, 128, 5, 2)], large=[(16, 128, 5, 48)])
bench.expert_sets = partial(bench.expert_sets, n_experts=2, hidden=16, inner=8, topk=2, n_layers=1)
bench.bench_quantize.__defaults__ = (None, (16, 128), (torch.bfloat16, torch.float32), True)
bench.ceilings = lambda: limits
random = bench.random_weights
bench.random_weights = lambda *shape, **kw: random(*(min(n, 128) if shape == (4096, 16384) else n for n in shape), **kw)
kernels.EXPERT_BITS, kernels.BITS = (5,), (4,)
assert len(list(kernels.work(kernels.TITLES))) == 3 + 1 + 2
for i in range(3): kernels.check_share(['large'], f'{{i}}/3')
sys.argv = ['kernels.py', '--write']
kernels.main()
''')
    r,page = json.loads((tmp_path/'kernels.json').read_text()),(tmp_path/'kernels.md').read_text()
    assert r['command'] == 'python benchmarks/kernels.py --write' and not r['failed']
    assert {k:len(v) for k,v in r['parts'].items()} == dict(gemv=1, small=1, large=1, experts=4, quantize=4)
    assert '| gemv | 16 x 128 | 5 | 1 |' in page and '## Quantizing' in page and 'FAILED' not in out and page.strip() in out

# --- whole models

def kernel(name, count=1., us=10.): return dict(name=short_name(name), count=count, us=us)
def decode_row(**kw): return dict(model='Qwen3.6-35B-A3B', weights_as='5 bits', bits=5, layers=None, way='kernels', step='kernels, recorded', fused=True, rows=1, context=8192, new=128, ms=2.5, tokens_per_second=400., all_ms=[2.5], first_ms=300., capture_seconds=.5,
    peak_bytes=25*10**9, weights=24*10**9, step_bytes=2*10**9, floor_ms=.8, launches=441., busy_ms=2.2, kernels=[kernel('_gemv_kernel', 200, 1500.), kernel('nvjet_tst_64x8_64x16_1x2_h_bz_NNT', 1, 700.)]) | kw

BF16 = 'c10::BFloat16'
NAMES = dict(                                                  # as profiles give them
    products=[('_gemv_kernel', 200), ('_small_kernel', 80), ('_rotate_kernel', 80), ('_dense_kernel', 3), ('_thin_kernel', 70), ('nvjet_tst_64x8_64x16_4x1_v_bz_TNT', 120), ('void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(cutlass_80...', 40),
        ('void gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, false, true, true, false, 7, false, cublasGemvParamsEx<...', 96), ('void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, false, false>(...', 30)],
    experts=[('_route_kernel', 40), ('void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(at::cuda::detail::TensorInfo<float const, unsigned int>, ...', 40), ('void at::native::bitonicSortKVInPlace<2, -1, 16, 16, float, long, ...', 40)],
    norms=[('_add_norm_kernel', 81), ('_gate_kernel', 40), ('void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float>, unsigned int, float, 4, 4> >(...', 81)],
    attention=[('_split_kernel', 10), ('_combine_kernel', 10), ('_rope_kernel', 10), ('fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...', 10), ('void pytorch_flash::flash_fwd_splitkv_kernel<pytorch_flash::Flash_fwd_kernel_traits<256, 64, 64, 4, ...', 10)],
    DeltaNet=[('_conv_kernel', 30), ('_state_kernel', 30), ('_chunk_kernel', 30), ('_scan_kernel', 30)],
    head=[('nvjet_tst_64x8_64x16_4x1_v_bz_TNT', 1), ('void gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16, ...', 1)],
    choosing=[('void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>, unsigned int, long, 4, 4> >(at::native::ReduceOp<...', 1)],
    other=[('void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<long>, std::array<char*, 3ul> >(int, ...', 9), ('void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(...', 9),
        ('void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::BFloat16, long, unsigned int, 2, 2, -2>(...', 2), ('Memcpy DtoD (Device -> Device)', 3), ('void at::native::reduce_kernel<512, 1, at::native::ReduceOp<bool, at::native::func_wrapper_t<bool, at::native::or_kernel_cuda...', 1)])

@pytest.mark.parametrize('kind', NAMES)
def test_kinds_of_kernels(kind):
    for name,count in NAMES[kind]:
        assert kernel_kind(short_name(name), count) == kind, name
        assert len(short_name(name)) <= 60 and not short_name(name).startswith('void')

def test_own_kernels_have_a_kind():
    "A kernel that is added to a decode step and forgotten in KINDS would be lost among the others"
    import ast
    from common import modules,tree
    found = {n.name for m in modules() if m.startswith('kernels.') for n in ast.walk(tree(m)) if isinstance(n, ast.FunctionDef) and 'triton' in str([ast.dump(d) for d in n.decorator_list]) and n.name.endswith('_kernel')} - {'_quantize_kernel','_tile_kernel'}
    assert len(found) > 10 and not {n for n in found if kernel_kind(n, 40) == 'other'}

def test_step_shares():
    rows = [kernel(name, count, 2**i) for i,(name,count) in enumerate(o for names in NAMES.values() for o in names)]
    shares = step_shares(rows)
    assert list(shares) == list(ORDER) and set(ORDER) == set(NAMES) and sum(shares.values()) == 2**len(rows)-1 and all(shares.values())
    assert step_shares([]) == dict.fromkeys(ORDER, 0.)

def test_kernel_rows():
    long = 'void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<long>, std::array<char*, 3ul> >(int, '
    rows = kernel_rows([('_gemv_kernel', 2.), (long+'a', 5.), ('_gemv_kernel', 4.), (long+'b', 7.)]*4, 4)
    assert rows == [dict(name=short_name(long), count=2, us=12.), dict(name='_gemv_kernel', count=2, us=6.)] and kernel_rows([]) == []

def test_names_of_models():
    assert [geometry_name(n) for n in ('qwen3.6','LLAMA','Qwen3-8','qwen3-30b-a3b')] == ['Qwen3.6-35B-A3B','Llama-3.1-8B','Qwen3-8B','Qwen3-30B-A3B']
    for wrong in ('qwen3','','gpt','Llama-3.1-8B-Instruct'):
        with pytest.raises(ConfigError, match='need one of Qwen3.6'): geometry_name(wrong)

def test_bits_of_models():
    assert parse_weights('5, bf16,BFLOAT16,2') == [5,None,None,2]
    for wrong in ('','5,','bf','5 4','16','7','-5','1.5','²'):
        with pytest.raises(ConfigError): parse_weights(wrong)

def test_decode_tables():
    rows = [decode_row(), decode_row(way='eager', fused=False, kernels=None, launches=None, busy_ms=None, capture_seconds=None, floor_ms=None, peak_bytes=None), decode_row(fused=False, rows=8)]
    r = DecodeResult('hlwq bench decode', dict(gpu='NVIDIA H100', torch='2.13.0'), LIMITS, rows, ['Llama-3.1-8B, bfloat16: too large'])
    (head,lines),(head2,shares) = r.tables()
    assert {len(l) for l in lines} == {len(head)} and {len(l) for l in shares} == {len(head2)} and len(lines) == 3 and len(shares) == 2 and all(isinstance(c, str) for l in [*lines, *shares] for c in l)
    first,second = (dict(zip(head, l)) for l in lines[:2])
    assert (first['ms a token'],first['floor, ms'],first['kernels'],first['peak memory'],first['context']) == ('2.50','0.80','441','25.00 GB','8,192') and second['floor, ms'] == second['kernels'] == second['peak memory'] == '-'
    assert [l[2] for l in lines] == ['kernels','eager','kernels (not fused)'] and dict(zip(head2, shares[0]))['head, µs'] == '700'
    again = DecodeResult(**json.loads(json.dumps(r.to_json())))
    assert again == r and again.tables() == r.tables() and r.notes()[-1] == 'FAILED Llama-3.1-8B, bfloat16: too large' and 'copy 2.50 TB/s' in r.notes()[0]
    assert DecodeResult('x', {}).tables() == [] and DecodeResult('x', {}, LIMITS, [decode_row(kernels=None)]).tables()[0][1]

def test_figure_of_shares():
    plt = pytest.importorskip('matplotlib.pyplot')
    fig = plot_shares([decode_row(), decode_row(way='eager'), decode_row(kernels=None), decode_row(context=128)])
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['Qwen3.6-35B-A3B, 5 bits, 1 x 8,192','Qwen3.6-35B-A3B, 5 bits, 1 x 128'] and 'ms' in ax.get_xlabel() and ax.get_title()
    assert max(p.get_x() + p.get_width() for p in ax.patches) == pytest.approx(2.2) and [l.get_text() for l in fig.legends[0].get_texts()][-len(ORDER):] == list(ORDER)
    plt.close(fig)

def test_decode_command_writes(capsys, tmp_path, monkeypatch):
    asked = {}
    def run(command, progress, **kw):
        asked.update(kw)
        progress(decode_row())
        return DecodeResult(command, machine(), LIMITS, [decode_row()], ['some: failed'])
    monkeypatch.setattr(sys.modules['hlwq.bench_decode'], 'run_decode', run)
    line = 'hlwq bench decode --model qwen3.6,llama --bits 5,4,bf16 --rows 1,8 --context 128,8192 --new 64 --layers 4'
    assert main([*line.split()[1:],'--json',str(tmp_path/'r.json')]) == 0
    assert asked == dict(names=['qwen3.6','llama'], bits=[5,4,None], rows=[1,8], contexts=[128,8192], new=64, layers=4)
    out,err = capsys.readouterr()
    assert 'ms a token' in out and 'head, µs' in out and 'FAILED some: failed' in out and err.startswith('hlwq: Qwen3.6-35B-A3B  5 bits  kernels') and err.count('\n') == 1
    r = DecodeResult(**json.loads((tmp_path/'r.json').read_text()))
    assert r.command == line and r.decode == [decode_row()] and r.machine['torch'] == torch.__version__
    asked.clear()
    assert main(['bench','decode','--quiet']) == 0 and asked == {} and capsys.readouterr().err == ''

WHOLE = f'''
from hlwq import bench_decode as bd
from hlwq.kernels.layout import tile_ref
from hlwq.quantize import quantize_rows
small = dict(vocab_size=256, hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_hidden_layers=2)
tiny = {{'Qwen3.6-35B-A3B': small | dict(linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=32, linear_value_head_dim=32, moe_intermediate_size=128, shared_expert_intermediate_size=32, num_experts=8, num_experts_per_tok=2, num_hidden_layers=4),
    'Llama-3.1-8B': small | dict(intermediate_size=128), 'Qwen3-8B': small | dict(intermediate_size=136)}}
for k in list(bd.GEOMETRIES):
    kind, sizes = bd.GEOMETRIES.pop(k)
    if k in tiny: bd.GEOMETRIES[k] = kind, sizes | tiny[k]
bd.require_gpu, bd.ceilings, bd.random_model.__defaults__ = lambda: None, lambda: limits, (None, 'cpu', True)
def packed_weights(w, book):                                   # without the kernel, whose simulation takes long
    if w.ndim == 3: return [torch.stack(o) for o in zip(*(packed_weights(e, book) for e in w))]
    packed, norms = quantize_rows(w, book)
    return tile_ref(packed, book.bits), norms.half()
bd.packed_weights = packed_weights
def profiled(g, at, n=8):                                      # steps as the profiler would see them, without the profiler
    for i in range(n): g._advance(g.buffers, at+i+1)
    assert int(g.buffers.slot) == at+n <= g.buffers.capacity and g.buffers.batch <= 8
    return bd.kernel_rows([('_gemv_kernel', 3.)]*n*5, n)
bd.profile_steps = torch.no_grad()(profiled)
'''

def whole(code): return simulated(WHOLE+code)

def test_models_run():
    "Whole models on a CPU, in bfloat16 and packed: rows, what they carry, and prompts longer than the model was made for"
    out = whole('''
seen = []
kw = dict(cases=[(1, 5), (3, 7)], limits=limits, new=3, repeat=2)
rows = bd.bench_decode(['qwen3.6', 'qwen3-8b'], [None, 5], progress=seen.append, **kw)
assert rows == seen and len(rows) == 2*(1 + 2 + 2 + 2)
for r in rows:
    first = (r['rows'], r['context']) == (1, 5)                # the others are measured shortly, and without a profile
    assert len(r['all_ms']) == (1 if r['way'] == 'eager' else 2 if first else 3) and r['new'] == (16 if r['way'] == 'eager' else 3) and r['tokens_per_second'] == 1e3*r['rows']/r['ms'] and r['first_ms'] > 0 and r['step'] == 'transformers'
    assert (r['kernels'], r['launches'], r['busy_ms']) == (([dict(name='_gemv_kernel', count=5, us=15.)], 5, .015) if first else (None, None, None)) and r['floor_ms'] == bd.floor_us(r['step_bytes'], limits)/1e3
print(*(bd.row_name(r) for r in rows), sep='/')
of = {(r['model'], r['bits'], r['rows']): r['step_bytes'] for r in rows if r['way'] == 'kernels'}
assert len(of) == 8
assert all(of[m, 5, n] < of[m, None, n] for m,_,n in of) and all(of[m, b, 1] < of[m, b, 3] for m,b,_ in of)
r, = bd.bench_decode(['qwen3-8b'], [None], ['kernels'], [(1, 250)], limits=limits, new=2, repeat=1, layers=1)   # room for the profile ends beyond the first 256
assert r['layers'] == 1 and r['weights'] < rows[-1]['weights'] + 10**6
''')
    assert out.splitlines()[0].split('/')[:7] == ['Qwen3.6-35B-A3B, bfloat16, eager, 1 text, context 5', *(f'Qwen3.6-35B-A3B, {w}, {n}, context {c}' for w in ('bfloat16, graph','bfloat16, kernels','5 bits, kernels') for n,c in (('1 text',5),('3 texts',7)))]

def test_failures_do_not_end_the_rest():
    "A model that does not fit, a case that does not: a sentence each, and the others are measured; without a list they are raised, and errors of the package itself always"
    whole('''
from hlwq.core import ConfigError
make, measure = bd.random_model, bd.measure_decode
def too_large(config, bits=None):
    if bits is None: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB')
    return make(config, bits)
def too_long(model, way, rows, context, **kw):
    if rows == 8: raise ConfigError('cuda:0: out of memory for 8 rows, need 9 GB; lower the number of rows')
    return measure(model, way, rows, context, **kw)
bd.random_model, bd.measure_decode = too_large, too_long
kw = dict(ways=['kernels'], cases=[(8, 5), (1, 5)], limits=limits, new=2, repeat=1)
failed = []
rows = bd.bench_decode(['qwen3-8b'], [None, 5], failed=failed, **kw)
assert [(r['bits'], r['rows']) for r in rows] == [(5, 1)]
assert failed[0].startswith('Qwen3-8B, bfloat16: CUDA out of memory') and failed[1] == 'Qwen3-8B, 5 bits, kernels, 8 texts, context 5: cuda:0: out of memory for 8 rows, need 9 GB; lower the number of rows' and len(failed) == 2
for b,kind in ((None, torch.OutOfMemoryError), (5, ConfigError)):
    try: bd.bench_decode(['qwen3-8b'], [b], **kw)
    except kind: pass
    else: raise AssertionError('nothing was raised')
try: bd.run_decode('', ['qwen3-8b'], [None], rows=[1], contexts=[5], new=2)
except ConfigError as e: assert str(e).endswith('nothing was measured'), e
else: raise AssertionError('nothing was raised')
r = bd.run_decode('hlwq', ['qwen3-8b', 'Qwen3-8B'], [None, 5], rows=[1, 8], contexts=[5, 6], new=2)
assert [(o['rows'], o['context']) for o in r.decode] == [(1, 5), (1, 6)] and len(r.failed) == 3
def broken(*a, **kw): raise RuntimeError('shapes do not fit')
bd.measure_decode = broken
try: bd.bench_decode(['qwen3-8b'], [5], failed=[], **kw)
except RuntimeError as e: assert str(e) == 'shapes do not fit'
else: raise AssertionError('nothing was raised')
''')

def test_decode_script(tmp_path):
    "benchmarks/decode.py from one end to the other, cut off in the middle, and again for one model"
    out = whole(f'''
from pathlib import Path
import common, decode, json
common.RESULTS = Path({str(tmp_path)!r})
decode.CASES, decode.SETTINGS = [(1, 5), (2, 7)], dict(new=2, repeat=1)
stored = lambda: json.loads((common.RESULTS/'decode.json').read_text())
decode.run_share(decode.parts(['Qwen3-8B', 'Llama-3.1-8B'], [None, 5]), '1/2')
sys.argv, n = ['decode.py', '--only', 'llama,qwen3-8b', '--bits', '5,bf16', '--write'], 0
show = decode.show
def cut_off(row):
    global n
    n += 1
    if n == 5: raise KeyboardInterrupt
    show(row)
decode.show = cut_off
try: decode.main()
except KeyboardInterrupt: pass
assert [(k, len(p['rows'])) for k,p in stored()['parts'].items()] == [('Llama-3.1-8B, 5 bits', 2), ('Llama-3.1-8B, bfloat16', 2)]
decode.show = show
decode.main()
first = stored()
sys.argv = ['decode.py', '--only', 'qwen3-8b', '--bits', '4', '--write']
decode.main()
assert {{k:p for k,p in stored()['parts'].items() if p['command'] == first['command']}} == first['parts']
try:
    sys.argv = ['decode.py', '--only', 'gpt']
    decode.main()
except SystemExit as e: assert 'need one of' in str(e)
else: raise AssertionError('nothing was refused')
''')
    r,page = json.loads((tmp_path/'decode.json').read_text()),(tmp_path/'decode.md').read_text()
    assert {k:len(p['rows']) for k,p in r['parts'].items()} == {f'{m}, {w}':n for m in ('Llama-3.1-8B','Qwen3-8B') for w,n in (('5 bits',2),('bfloat16',5))} | {'Qwen3-8B, 4 bits':2}
    assert all(not p['failed'] and p['gpu']['torch'] and p['ceilings'] == LIMITS for p in r['parts'].values())
    assert page.count('## ') == 2 and page.count('Measured ') == 3 and '`python benchmarks/decode.py --only qwen3-8b --bits 4 --write`' in page and 'FAILED' not in page and '| Qwen3-8B | 4 bits | kernels (not fused) | 2 | 7 |' in page
    assert ' bits: ' not in out.partition('==')[0] and page.strip() in out and all(l.count('|') == 14 for l in page.splitlines() if l.startswith('|'))

# --- caches of codes

def kv_row(context=32_768, us=20., heads=(16, 2, 256)): return dict(zip(('heads','kv_heads','head_dim'), heads)) | dict(context=context, notes=['flash: no'], us=dict(K4V4=us, K2V2=us/2), error=dict(K4V4=.003), nbytes=dict(K4V4=10**7), floor_us=dict(K4V4=5., K2V2=3.),
    plain=dict(cudnn=30., flash=None, ours16=31.), best_us=30., ratio=dict(K4V4=30/us, K2V2=60/us))

def test_kv_tables():
    r = KVResult('hlwq bench kv', dict(gpu='NVIDIA H100'), LIMITS, [kv_row()], [dict(kv_heads=2, head_dim=256, bits=[4,4], layers=10, token_us=2., block_us=66., mean_us=2.5)],
        [dict(context=8192, bits=None, predicted=10**9, tensors=10**9, measured=10**9, layers=10), dict(context=8192, bits=[4,4], predicted=25*10**7, tensors=25*10**7, measured=26*10**7, layers=10)],
        [dict(bits=[3,2], context=32768, new=128, step='kernels, recorded', no_kernels='', tokens_per_second=300., first_ms=900., peak_bytes=10**10, weights=1, capacity=33024, predicted=10**8, measured=101*10**6)], ['append: broken'])
    words = [w for _,rows in r.tables() for row in rows for w in row]
    assert {'20.0 (1.50x)','10.0 (3.00x)','2.50','1/4.00','K3V2','kernels, recorded'} <= set(words) and '260.00 MB (+4.00 %)' in words and '101.00 MB (+1.00 %)' in words
    assert any('flash: no' in n for n in r.notes()) and 'FAILED append: broken' in r.notes() and KVResult(**json.loads(json.dumps(r.to_json()))).tables() == r.tables()

def test_kv_figure():
    import matplotlib.pyplot as plt
    fig = plot_kv_speed([kv_row(1024, 20.), kv_row(8192, 25.), kv_row(1024, 20., (32,8,128))])
    assert [ax.get_title() for ax in fig.axes] == ['16 heads on 2 of 256','32 heads on 8 of 128'] and all(ax.get_ylabel() == 'µs' and ax.get_xlabel() == 'tokens' for ax in fig.axes)
    plt.close(fig)

def test_kv_command_writes(capsys, tmp_path, monkeypatch):
    asked = {}
    def run(command, progress, **kw):
        asked.update(kw)
        progress('attention', kv_row())
        return KVResult(command, machine(), LIMITS, [kv_row()], failed=['some: failed'])
    monkeypatch.setattr(sys.modules['hlwq.bench_kv'], 'run_kv', run)
    line = 'hlwq bench kv --bits 4,K3V2,q3 --context 1024,8192'
    assert main([*line.split()[1:],'--json',str(tmp_path/'r.json')]) == 0
    assert asked == dict(widths=[(4,4),(3,2),(3,3)], contexts=[1024,8192], parts=('attention',))
    out,err = capsys.readouterr()
    assert 'cuDNN, µs' in out and 'FAILED some: failed' in out and err.startswith('hlwq: 16/2 x 256')
    assert KVResult(**json.loads((tmp_path/'r.json').read_text())).command == line
    asked.clear()
    assert main(['bench','kv','--quiet']) == 0 and asked == {}

def test_kv_parts():
    with pytest.raises(UnsupportedError): run_kv('')
    assert [p for p,_ in kv_cases(['append','model'], [(4,4)])] == ['append','append','model','model']

def test_kv_script(tmp_path):
    "benchmarks/kv_speed.py from one end to the other: small cases, in the simulation; a wrong kernel is not timed"
    whole(f'''
from pathlib import Path
from hlwq import bench_kv
import common, kv_speed
common.RESULTS = Path({str(tmp_path)!r})
bench_kv.DEVICE, bench_kv.graph_seconds, bench.ceilings = 'cpu', clock, lambda: limits
bench_kv.n_sets = lambda nbytes: 2
bench_kv.KV_SHAPES, bench_kv.KV_MEMORY = ((4, 2, 32),), (600, 3000)
bench_kv.kv_cases.__defaults__ = (((4, 4), (3, 2)), (300,))
bench_kv.MODEL_SIZES = dict(layers=4)
kv_speed.MODEL = dict(context=270, new=3, repeat=1)
assert len(kv_speed.share_cases(['attention', 'append', 'memory', 'model'])) == 2 + 2 + 3
for i in range(2): kv_speed.check_share(['attention', 'append'], f'{{i}}/2')
sys.argv = ['kv_speed.py', '--write']
kv_speed.main()
sys.argv = ['kv_speed.py', '--write', '--only', 'memory']
kv_speed.main()
import hlwq.kernels.kv_attention as K
right = K.kv_attention
K.kv_attention = lambda *a, **k: right(*a, **k)*1.05
try: bench_kv.attention_row((4, 2, 32), 300)
except Exception as e: assert 'it was not timed' in str(e), e
else: raise SystemExit('a wrong kernel was timed')
''')
    r,page = json.loads((tmp_path/'kv-speed.json').read_text()),(tmp_path/'kv-speed.md').read_text()
    assert not r['failed'] and {k:len(v) for k,v in r['parts'].items()} == dict(attention=1, append=2, memory=6, model=3)
    a = r['parts']['attention'][0]
    assert a['plain']['ours16'] > 0 and set(a['us']) == {'K4V4','K3V2'} and all(0 < e < .01 for e in a['error'].values()) and ('K4V4' in a['ratio']) == (a['best_us'] is not None)
    assert all(m['predicted'] == m['tensors'] and m['measured'] is None for m in r['parts']['memory'])
    assert [m['bits'] for m in r['parts']['model']] == [None,[4,4],[3,2]] and all(m['predicted'] > 0 and m['tokens_per_second'] > 0 for m in r['parts']['model'])
    assert '## Append: one token' in page and 'FAILED' not in page and list(r['parts']) == ['attention','append','memory','model']
    assert page.count('`python benchmarks/kv_speed.py --write`') == 3 and page.count('`python benchmarks/kv_speed.py --write --only memory`') == 1

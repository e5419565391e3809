"What can be known of measuring without a GPU: what is asked for, what is refused, what the tables say, and a whole run on simulated kernels with a clock of our own"
import json,sys
from pathlib import Path
import pytest,torch
import hlwq.bench as bench
from common import ROOT,python
from hlwq.bench import *
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
@pytest.mark.parametrize('f', [require_gpu,lambda: graph_seconds([lambda: None]),ceilings,bench_kernels,bench_experts,bench_quantize,lambda: run_bench('kernels', ''),lambda: run_bench('quantize', '', bits=[5])])
def test_refused_without_gpu(f):
    with pytest.raises(UnsupportedError, match=r'^bench: no CUDA device .*, need an NVIDIA GPU .*; run it on'): f()

def test_refused_on_wrong_machines(monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '12.8'); monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla T4'); monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (7,5))
    with pytest.raises(UnsupportedError, match='Tesla T4 has compute capability 7.5, need 8.0'): require_gpu()
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (9,0)); monkeypatch.setattr(bench, 'find_spec', lambda name: None)
    with pytest.raises(UnsupportedError, match='triton is not installed, need 3.2'): require_gpu()

@no_gpu
@pytest.mark.parametrize('line,needle', [('kernels','no CUDA device'), ('quantize --bits 5','no CUDA device'), ('kernel','need kernels or quantize'), ('kernels --shape 12','4096x4096'), ('kernels --bits 9','bits'), ('kernels --rows 0','rows'),
    ('quantize --rows 8','bench quantize'), ('quantize --shape 8x8','bench quantize'), ('quantize --json nowhere/x.json','nowhere/x.json'), ('kernels --json .','cannot be written'), ('','hlwq bench --help')])
def test_command_refuses(line, needle, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(['bench',*line.split()])
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

"""Stacks of packed experts against dense ones: every way, every kind of experts class that transformers describes, gradients, casts, copies, compilers.

Classes are made here with transformers' own decorator, so that all combinations exist in all its versions."""
import copy,inspect,pickle
import pytest,torch
from torch import nn
transformers = pytest.importorskip('transformers')
from transformers import PretrainedConfig
from transformers.integrations.moe import use_experts_implementation
from hlwq.core import *
from hlwq.core import BITS
from hlwq.experts import WAYS,HLWQExperts,PackedStack,expert_linear_ref,experts_interface
from hlwq.kernels import cpu
from hlwq.lloyd_max import codebook
from hlwq.packed_model import Target,place,unpack
from hlwq.quantize import quantize
from common import python
from kit import complete,gap,gaussian

E,HIDDEN,INTER = 5,144,72

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Matrices this small only wait for each other's threads"
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture(params=['best', 'torch'])
def best(request, monkeypatch):
    if request.param == 'torch': monkeypatch.setattr(cpu, 'available', lambda: False)
    elif not cpu.available(): pytest.skip(cpu.why_not())

both = pytest.mark.usefixtures('best')

def act(*shape, seed=5, dtype=torch.float32): return gaussian(*shape, seed=seed, dtype=dtype, scale=1.)

def stack(out=40, width=200, bits=5, n=E, scale=.05, scales=None):
    ws = [gaussian(out, width, seed=e, dtype=torch.float32, scale=(scales or [scale]*n)[e]) for e in range(n)]
    return PackedStack.from_quantized([quantize(w, bits) for w in ws])

# --- the product of a stack

@both
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('bits', BITS)
def test_ways_agree_with_the_definition(way, bits):
    m,g = stack(bits=bits),torch.Generator().manual_seed(0)
    w = m.dequantize()
    for T,k in ((1, 1), (1, 4), (3, 2), (20, 3)):
        ids,rows = torch.randint(0, E, (T*k,), generator=g),torch.arange(T*k)//k
        x = act(T, 200)
        want = torch.stack([w[e] @ x[r] for r,e in zip(rows.tolist(), ids.tolist())])
        assert gap(m(x, rows, ids, way), want) < 1e-5 and gap(expert_linear_ref(x, rows, ids, m.packed, m.norms, m.book), want) < 1e-5

@both
@pytest.mark.parametrize('way', WAYS)
def test_routings(way):
    "No pair at all, one expert for all, the same expert twice, rows out of order"
    m,x = stack(),act(6, 200)
    assert m(x, torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), way).shape == (0, 40)
    assert m(act(0, 200), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), way).shape == (0, 40)
    for rows,ids in (([0]*50, [3]*50), ([5, 0, 3, 3], [1, 4, 4, 1]), (list(range(6))*9, [4, 0]*27)):
        rows,ids = torch.tensor(rows),torch.tensor(ids)
        want = torch.stack([m.dequantize()[e] @ x[r] for r,e in zip(rows.tolist(), ids.tolist())])
        assert gap(m(x, rows, ids, way), want) < 1e-5
        assert gap(m(x.t().contiguous().t(), rows, ids, way), want) < 1e-5

NOBODY = """
import torch
from hlwq.experts import WAYS,PackedStack
from hlwq.kernels import cpu
from hlwq.quantize import quantize
m = PackedStack.from_quantized([quantize(torch.randn(40, 200), 5) for _ in range(5)])
fails, real = [], cpu.available
for kind in ('best', 'torch'):
    if kind == 'torch': cpu.available = lambda: False
    for way in WAYS:
        for wrong in (5, 1005, -1, 2**40):
            for n in (1, 2, 80):
                try: m(torch.randn(2, 200), torch.zeros(n, dtype=torch.long), torch.tensor([1]*(n-1) + [wrong]), way)
                except (IndexError, RuntimeError, NotImplementedError, ValueError): continue
                fails.append((kind, way, wrong, n))
for kind in (lambda: False, real):
    cpu.available = kind
    for width in (1, 128, 199, 201, 256, 500):
        for x in (torch.randn(2, width), torch.randn(2, width, requires_grad=True), torch.randn(60, width)):
            try: m(x, torch.arange(len(x)), torch.arange(len(x)) % 5)
            except (RuntimeError, NotImplementedError, ValueError): continue
            fails.append(('width', width, len(x), x.requires_grad, kind is real))
for ids in (torch.tensor([1, 4], dtype=torch.int32), torch.tensor([1, 9, 4, 9])[::2], torch.tensor([1, 4], dtype=torch.uint8)):
    x = torch.randn(2, 200)
    for on in (lambda: False, real):
        cpu.available = on
        for way in WAYS:
            y, want = m(x, torch.tensor([0, 1]), ids, way), torch.stack([m.dequantize()[e] @ x[r] for r,e in enumerate(ids.tolist())])
            if not torch.allclose(y, want, atol=1e-4): fails.append((ids.dtype, way))
for kind in (lambda: False, real):
    cpu.available = kind
    try: m.to('meta')(torch.randn(2, 200), torch.tensor([0, 1]), torch.tensor([0, 1]))
    except (RuntimeError, NotImplementedError, ValueError): continue
    fails.append(('meta', kind is real))
print(fails)
"""

def test_what_could_leave_the_tensors():
    "Experts that do not exist, activations of another width, numbers of another type, weights that are elsewhere: an error or the right result, not memory that belongs to somebody else. In a process of its own, which may crash"
    assert python(NOBODY).strip() == '[]'

@both
def test_mixed_norms():
    "One expert with tiny and one with huge weights: float32 norms for the stack, the others as precise as ever"
    m = stack(scales=[.05, 1e-7, .05, 1e5, .05])
    assert m.norm_bits.dtype == torch.int32
    for e in range(E):
        y = m(act(2, 200), torch.tensor([0, 1]), torch.tensor([e, e]))
        assert gap(y, act(2, 200) @ m.dequantize()[e].t()) < 1e-5 and gap(m.dequantize()[e], m.expert(e).dequantize()) == 0

@both
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    m = stack()
    y = m(act(4, 200, dtype=dtype), torch.arange(4), torch.tensor([0, 1, 2, 0]))
    assert y.dtype == dtype and gap(y, m(act(4, 200, dtype=dtype).float(), torch.arange(4), torch.tensor([0, 1, 2, 0]))) < max(torch.finfo(dtype).eps, 1e-5)

@both
@pytest.mark.parametrize('way', WAYS)
def test_gradient_of_a_stack(way):
    m,rows,ids = stack(),torch.tensor([0, 0, 1, 2, 2, 2]),torch.tensor([1, 4, 1, 0, 1, 4])
    x,z = act(3, 200).requires_grad_(),act(3, 200).requires_grad_()
    m(x, rows, ids, way).square().sum().backward()
    torch.einsum('soi,si->so', m.dequantize()[ids], z[rows]).square().sum().backward()
    assert gap(x.grad, z.grad) < 1e-5

@both
def test_operators_are_registered_well():
    m,rows,ids = stack(),torch.tensor([0, 0, 1]),torch.tensor([1, 4, 1])
    args = (act(2, 200), rows, ids, m.packed, m.norm_bits, m.key, 'grouped_mm')
    torch.library.opcheck(torch.ops.hlwq.expert_linear, args, test_utils=('test_schema', 'test_faketensor', 'test_autograd_registration'))
    torch.library.opcheck(torch.ops.hlwq.expert_linear_t, (act(3, 40), rows, ids, m.packed, m.norm_bits, m.key, 2, 200), test_utils=('test_schema', 'test_faketensor'))

# --- in place of classes of experts

class Config(PretrainedConfig):
    model_type = 'hlwq_test'

class Interleaved:
    "The activation of gpt-oss: gate and up rows alternate, both are clipped"
    def _apply_gate(self, gate_up):
        gate,up = gate_up[..., ::2].clamp(max=7.),gate_up[..., 1::2].clamp(-7., 7.)
        return (up + 1)*gate*torch.sigmoid(gate*1.702)

def experts(has_gate=True, is_transposed=False, has_bias=False, interleaved=False, post_norm=False, implementation='eager', seed=0):
    "A dense experts module of a class that transformers' decorator describes, with random weights"
    class Plain(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts,up = E,'gate_up_proj' if has_gate else 'up_proj'
            for i,(n,out,width) in enumerate(((up, INTER*(1+has_gate), HIDDEN), ('down_proj', HIDDEN, INTER))):
                w = gaussian(E, out, width, seed=seed+i, dtype=torch.float32, scale=.1)
                setattr(self, n, nn.Parameter(w.transpose(1, 2).contiguous() if is_transposed else w))
                if has_bias: setattr(self, f'{n}_bias', nn.Parameter(gaussian(E, out, seed=seed+5+i, dtype=torch.float32, scale=.5)))
            self.act_fn = nn.SiLU()
            if post_norm: self.post_expert_norm = nn.LayerNorm(HIDDEN)
        def forward(self, *args): raise AssertionError('the class computes by itself')
    kinds = (Interleaved, Plain) if interleaved else (Plain,)
    cls = type('Experts', kinds, {})
    flags = dict(has_gate=has_gate, is_transposed=is_transposed, has_bias=has_bias) | (dict(has_post_expert_norm=True) if post_norm else {}) | (dict(is_concatenated=False) if interleaved else {})
    m = use_experts_implementation(**flags)(cls)(Config())
    m.config._experts_implementation = implementation
    return m

def pack(dense, bits=(5, 4)):
    "The module packed, as the loader does it, and the weights that its codes stand for"
    names = ['gate_up_proj' if dense.has_gate else 'up_proj', 'down_proj']
    qs = [[quantize(w.t() if dense.is_transposed else w, b) for w in getattr(dense, n).data] for n,b in zip(names, bits)]
    weights = [(torch.stack([q.dequantize() for q in o]).double(), getattr(dense, f'{n}_bias').data.double() if dense.has_bias else torch.zeros(E, 1)) for n,o in zip(names, qs)]
    top = nn.Module(); top.experts = dense
    targets = [Target(f'experts.{n}', q[0].shape, codebook('lloyd-max', b), E, dense.is_transposed) for n,q,b in zip(names, qs, bits)]
    place(top, targets)
    for t,q in zip(targets, qs): s = PackedStack.from_quantized(q); h = top.get_submodule(t.home); h.packed,h.norm_bits = s.packed,s.norm_bits
    return top,weights

@torch.no_grad()
def by_hand(dense, weights, x, ids, w):
    "Token after token, expert after expert, in float64"
    res = torch.zeros(x.shape, dtype=torch.float64)
    (w1, b1),(w2, b2) = weights
    for t in range(len(x)):
        for j,e in enumerate(ids[t].tolist()):
            h = w1[e] @ x[t].double() + b1[e]
            h = dense._apply_gate(h) if dense.has_gate else dense.act_fn(h)
            y = w2[e] @ h + b2[e]
            if getattr(dense, 'has_post_expert_norm', False): y = dense.post_expert_norm(y.float()).double()
            res[t] += w[t, j].double()*y
    return res

def routing(T=6, k=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(T)]),torch.rand(T, k, generator=g)

KINDS = [dict(), dict(has_gate=False), dict(is_transposed=True), dict(has_bias=True), dict(is_transposed=True, has_bias=True, interleaved=True), dict(has_gate=False, has_bias=True), dict(has_gate=False, is_transposed=True)]
if 'has_post_expert_norm' in inspect.signature(use_experts_implementation).parameters: KINDS.append(dict(post_norm=True))

@both
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', KINDS, ids=lambda k: '-'.join(k) or 'plain')
def test_every_kind_of_experts(kind, way):
    dense = experts(**kind, implementation=way)
    assert experts_interface(dense)
    top,weights = pack(dense)
    assert isinstance(top.experts, HLWQExperts) and top.experts.way == way
    for T in (1, 6, 40):
        ids,w = routing(T)
        assert gap(top.experts(act(T, HIDDEN), ids, w), by_hand(dense, weights, act(T, HIDDEN), ids, w)) < 1e-5

@both
@pytest.mark.parametrize('kind', KINDS, ids=lambda k: '-'.join(k) or 'plain')
def test_same_as_transformers_itself(kind):
    "The class with decoded weights, computed by the library"
    top,weights = pack(experts(**kind))
    ids,w = routing()
    got = top.experts(act(6, HIDDEN), ids, w)
    plain = unpack(copy.deepcopy(top), torch.float32).experts
    for way in ('batched_mm', 'grouped_mm'):
        plain.config._experts_implementation = way
        assert not isinstance(plain, HLWQExperts) and gap(plain(act(6, HIDDEN), ids, w), got) < 1e-5

@both
@pytest.mark.parametrize('kind', KINDS, ids=lambda k: '-'.join(k) or 'plain')
def test_gradients_of_every_kind(kind):
    "For activations, routing weights and biases"
    top,_ = pack(experts(**kind)); plain = unpack(copy.deepcopy(top), torch.float32)
    plain.experts.config._experts_implementation = 'batched_mm'
    ids,w = routing()
    got = []
    for m in (top, plain):
        x,v = act(6, HIDDEN).requires_grad_(),w.clone().requires_grad_()
        m.experts(x, ids, v).square().sum().backward()
        got.append([x.grad, v.grad] + [p.grad for n,p in sorted(m.named_parameters()) if n.endswith('_bias')])
    assert len(got[0]) == len(got[1]) == 2 + 2*kind.get('has_bias', False)
    for a,b in zip(*got): assert gap(a, b) < 1e-5

def test_bfloat16_and_float32_routing():
    top,weights = pack(experts(has_bias=True)); top.bfloat16()
    ids,w = routing()
    y = top.experts(act(6, HIDDEN, dtype=torch.bfloat16), ids, w)
    assert y.dtype == torch.bfloat16 and gap(y, by_hand(experts(has_bias=True), weights, act(6, HIDDEN), ids, w)) < 2e-2

@pytest.mark.parametrize('name', ['deepgemm', 'sonicmoe', 'something_new', 'linear_loop'])
def test_unknown_implementations_are_refused(name):
    top,_ = pack(experts(implementation=name))
    with pytest.raises(UnsupportedError, match=name) as e: top.experts(act(6, HIDDEN), *routing())
    assert complete(e.value) and 'grouped_mm' in str(e.value)

def test_expert_parallel_is_refused():
    top,_ = pack(experts())
    top.experts.shell._is_expert_parallel = True
    with pytest.raises(UnsupportedError, match='processes') as e: top.experts(act(6, HIDDEN), *routing())
    assert complete(e.value)

def test_implementation_can_change():
    top,_ = pack(experts())
    for way in WAYS:
        top.experts.config._experts_implementation = way
        assert top.experts.way == way

def test_casts_leave_codes_and_norms_alone():
    for cast in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)):
        top,_ = pack(experts(has_bias=True))
        before = {k:v.clone() for k,v in top.state_dict().items() if not k.endswith('_bias')}
        cast(top)
        assert len(before) == 4 and all(torch.equal(v, top.state_dict()[k]) and v.dtype == top.state_dict()[k].dtype for k,v in before.items())

def test_names_and_flags():
    "What transformers and accelerate look at: no name that its renamings could touch, no gradients for codes, nothing dense"
    top,_ = pack(experts(has_bias=True))
    names = dict(top.named_parameters())
    assert sorted(names) == ['experts.down_proj_bias', 'experts.gate_up_proj_bias', 'experts.w13.norm_bits', 'experts.w13.packed', 'experts.w2.norm_bits', 'experts.w2.packed']
    assert {k for k,p in names.items() if p.requires_grad} == {'experts.down_proj_bias', 'experts.gate_up_proj_bias'}
    dense = [p for m in top.modules() for p in [*vars(m).values(), *vars(m).get('_parameters', {}).values()] if isinstance(p, torch.Tensor) and p.ndim == 3 and p.is_floating_point()]
    assert not dense and not top.experts.shell._parameters
    assert '5 x (144, 144)' in repr(top) and 'bits=4' in repr(top)

def test_copies_and_state():
    top,_ = pack(experts(has_bias=True)); ids,w = routing()
    want = top.experts(act(6, HIDDEN), ids, w)
    c = copy.deepcopy(top)
    assert torch.equal(c.experts(act(6, HIDDEN), ids, w), want) and c.experts.shell is not top.experts.shell and c.experts.w13.packed.data_ptr() != top.experts.w13.packed.data_ptr()
    for o in (stack(), stack(bits=3)): assert torch.equal(pickle.loads(pickle.dumps(o)).dequantize(), o.dequantize())
    other,_ = pack(experts(has_bias=True, seed=50))
    other.load_state_dict(top.state_dict())
    assert torch.equal(other.experts(act(6, HIDDEN), ids, w), want)

def test_modes_reach_what_stays_dense():
    top,_ = pack(experts())
    assert not any(m.training for m in top.eval().modules())
    assert not any(m.training for m in unpack(top, torch.float32).modules())

@both
@pytest.mark.parametrize('way', WAYS)
def test_compile(way):
    "In one piece, before anything was called, with gradients"
    torch._dynamo.reset()
    top,_ = pack(experts(is_transposed=True, has_bias=True, interleaved=True, implementation=way)); ids,w = routing()
    f = torch.compile(top.experts, fullgraph=True, backend='aot_eager')
    x,z = act(6, HIDDEN).requires_grad_(),act(6, HIDDEN).requires_grad_()
    y,want = f(x, ids, w),top.experts(z, ids, w)
    y.sum().backward(); want.sum().backward()
    assert gap(y, want) < 1e-5 and gap(x.grad, z.grad) < 1e-5

# --- placing

def test_place_refuses_and_changes_nothing():
    book = codebook('lloyd-max', 5)
    class Own(nn.Linear):
        def forward(self, x): return super().forward(x)*2
    top = nn.Module(); top.a,top.b,top.e,top.n = nn.Linear(144, 24),Own(144, 24),experts(),nn.Embedding(24, 144)
    good = Target('a.weight', (24, 144), book)
    up = Target('e.gate_up_proj', (2*INTER, HIDDEN), book, E)
    for bad,error in ((Target('b.weight', (24, 144), book), UnsupportedError), (Target('n.weight', (24, 145), book), CheckpointError), (up, UnsupportedError), (Target('a.weight', (24, 145), book), CheckpointError),
                      (Target('a.bias', (24, 1), book), UnsupportedError)):
        with pytest.raises(error) as e: place(top, [good, bad] if bad.module != 'a' else [bad])
        assert complete(e.value) and type(top.a) is nn.Linear and 'weight' in top.a._parameters and 'gate_up_proj' in top.e._parameters

def test_experts_with_something_more_are_refused():
    "A class with further tensors computes something that is not known here"
    m = experts(); m.scale = nn.Parameter(torch.ones(E))
    top = nn.Module(); top.e = m; book = codebook('lloyd-max', 5)
    with pytest.raises(UnsupportedError): place(top, [Target('e.gate_up_proj', (2*INTER, HIDDEN), book, E), Target('e.down_proj', (HIDDEN, INTER), book, E)])

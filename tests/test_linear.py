"""The packed linear layer: its product and gradients against the dense one, casts, copies, compilers, and every way of writing to a weight that is not there.

Tests of products run with the compiled kernel, where there is one, and with plain torch."""
import copy,io,pickle
import pytest,torch
from torch import nn
from hlwq.core import *
from hlwq.core import BITS
from hlwq.kernels import cpu
from hlwq.linear import HLWQEmbedding,HLWQLinear,book_key,linear,linear_ref,packed_linear
from hlwq.lloyd_max import Codebook,codebook
from hlwq.quantize import quantize
from common import python
from kit import complete,gap,gaussian

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

@pytest.fixture(params=['best', 'torch'])
def way(request, monkeypatch):
    if request.param == 'torch': monkeypatch.setattr(cpu, 'available', lambda: False)
    elif not cpu.available(): pytest.skip(cpu.why_not())

both = pytest.mark.usefixtures('way')

def layer(out=24, width=200, bits=5, bias=False, seed=0, scale=.02, dtype=torch.float32):
    b = gaussian(out, seed=seed+1, dtype=dtype) if bias else None
    return HLWQLinear.from_quantized(quantize(gaussian(out, width, seed=seed, dtype=torch.float32, scale=scale), bits), b, dtype)

def twin(m):
    "An ordinary layer with the decoded weight"
    d = nn.Linear(m.in_features, m.out_features, m.bias is not None)
    d.weight.data = m.dequantize(torch.float32)
    if m.bias is not None: d.bias.data = m.bias.data.float()
    return d

def act(*shape, seed=5, dtype=torch.float32): return gaussian(*shape, seed=seed, dtype=dtype, scale=1.)

# --- the product

@both
@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('width', [1, 100, 128, 200, 384, 700])
def test_forward(bits, width):
    m = layer(24, width, bits, bias=True)
    for M in (1, 3, 8, 9, 40): assert gap(m(act(M, width)), twin(m)(act(M, width))) < 1e-5, M

@both
@pytest.mark.parametrize('out', [1, 5, 1025, 3000])
def test_many_rows(out):
    "More rows than one block of them"
    m = layer(out, 384)
    for M in (1, 17): assert gap(m(act(M, 384)), twin(m)(act(M, 384))) < 1e-5

@both
@pytest.mark.parametrize('shape', [(200,), (0, 200), (2, 3, 200), (2, 0, 200), (1, 1, 1, 200)])
def test_shapes(shape):
    m = layer(bias=True)
    y = m(act(*shape))
    assert y.shape == (*shape[:-1], 24)
    if y.numel(): assert gap(y, twin(m)(act(*shape))) < 1e-5

@both
def test_strides():
    m,x = layer(),act(200, 7).t()
    wide = act(7, 300)[:, 50:250]
    for o in (x, wide, act(14, 200)[::2], act(1, 200).expand(7, 200), act(3, 200, 2)[..., 0]): assert gap(m(o), twin(m)(o)) < 1e-5
    assert torch.equal(m(x), m(x.contiguous()))

@both
@pytest.mark.parametrize('dtype', DTYPES + [torch.float64])
def test_activation_dtypes(dtype):
    "The result has the type of the activation and the precision of one rounding"
    m = layer(bias=True).to(dtype)
    for M in (1, 30):
        y = m(act(M, 200, dtype=dtype))
        assert y.dtype == dtype and gap(y, twin(m)(act(M, 200, dtype=dtype).float())) < max(torch.finfo(dtype).eps, 1e-5)

WIDTHS = """
import torch
from hlwq.kernels import cpu
from hlwq.linear import HLWQLinear
from hlwq.quantize import quantize
m, fails, real = HLWQLinear.from_quantized(quantize(torch.randn(24, 200), 5)), [], cpu.available
for kind in (lambda: False, real):
    cpu.available = kind
    for width in (0, 1, 128, 190, 199, 201, 256, 257, 400):
        for M in (1, 3, 40):
            for grad in (False, True):
                try: m(torch.randn(M, width, requires_grad=grad))
                except (RuntimeError, NotImplementedError, ValueError): continue
                fails.append((kind is real, width, M, grad))
print(fails)
"""

def test_wrong_width_is_refused():
    "As an ordinary layer refuses it: padding must not swallow what is missing, and no kernel may read behind the end. In a process of its own, which may crash"
    assert python(WIDTHS).strip() == '[]'

@both
@pytest.mark.parametrize('scale', [1e-9, 1e-6, 1e4, 1e20])
def test_norms_beyond_float16(scale):
    m = layer(scale=scale)
    assert m.norm_bits.dtype == torch.int32 and gap(m(act(3, 200)), twin(m)(act(3, 200))) < 1e-5

@both
def test_rows_of_zeros_and_values_that_are_not_finite():
    w = gaussian(6, 256, dtype=torch.float32); w[2] = 0; w[3, :128] = 0
    m = HLWQLinear.from_quantized(quantize(w, 4))
    assert m(act(2, 256))[:, 2].eq(0).all()
    x = act(3, 256); x[1, 7] = float('nan'); x[2, 8] = float('inf')
    y = m(x)
    assert y[0].isfinite().all() and not y[1:, :2].isfinite().any()

@both
def test_own_codebook():
    "Two tables of one name do not get mixed up"
    tables = [Codebook('mine', 2, c) for c in ([-1.5, -.5, .5, 1.5], [-2., -.4, .4, 2.])]
    q = [quantize(gaussian(8, 128, dtype=torch.float32), 2, codebook=b) for b in tables]
    ms = [HLWQLinear.from_quantized(o) for o in q]
    assert book_key(tables[0]) != book_key(tables[1])
    for m,o in zip(ms, q): assert gap(m(act(2, 128)), act(2, 128) @ o.dequantize().t()) < 1e-5

@both
def test_reference():
    m = layer()
    assert gap(linear_ref(act(3, 200), m.packed, m.norms, m.book), twin(m)(act(3, 200))) < 1e-5
    assert torch.equal(linear(act(3, 200), m.packed, m.norm_bits, m.key), packed_linear(act(3, 200), m.packed, m.norms, m.book))

@both
def test_same_result_twice(): assert torch.equal(layer()(act(5, 200)), layer()(act(5, 200)))

# --- gradients

@both
@pytest.mark.parametrize('bits', [2, 5, 8])
@pytest.mark.parametrize('width', [100, 384])
def test_gradient(bits, width):
    m = layer(24, width, bits, bias=True)
    x,z = act(2, 3, width).requires_grad_(),act(2, 3, width).requires_grad_()
    m(x).square().sum().backward(); d = twin(m); d(z).square().sum().backward()
    assert gap(x.grad, z.grad) < 1e-5 and gap(m.bias.grad, d.bias.grad) < 1e-5
    assert m.packed.grad is None and m.norm_bits.grad is None

@both
def test_gradient_of_an_expanded_result():
    "The gradient of a sum has no memory of its own"
    m,x = layer(),act(3, 200).requires_grad_()
    m(x).sum().backward()
    assert gap(x.grad, twin(m).weight.sum(0).expand(3, 200)) < 1e-5

def test_gradient_in_bfloat16():
    m,x = layer(dtype=torch.bfloat16),act(3, 200, dtype=torch.bfloat16).requires_grad_()
    m(x).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and gap(x.grad, twin(m).weight.sum(0).expand(3, 200)) < 1e-2

def test_second_derivative_is_not_wrong():
    "It is right, or refused"
    m,x = layer(),act(3, 200).requires_grad_()
    try:
        g, = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
    except (RuntimeError, NotImplementedError): return
    z = act(3, 200).requires_grad_()
    h, = torch.autograd.grad(twin(m)(z).square().sum(), z, create_graph=True)
    h.square().sum().backward()
    assert gap(x.grad, z.grad) < 1e-4

@both
def test_modes():
    m,x = layer(bias=True),act(3, 200)
    want = m(x)
    assert want.requires_grad
    with torch.no_grad(): assert torch.equal(m(x), want) and torch.equal(m(x.clone().requires_grad_()), want)
    with torch.inference_mode(): assert torch.equal(m(x.clone()), want)
    assert torch.equal(m.eval()(x), want) and torch.equal(m.train()(x), want)
    y = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(m, y, use_reentrant=False).sum().backward()
    assert y.grad is not None

@both
def test_first_use_in_inference_mode():
    "What is remembered there can be used for training later"
    book = Codebook('late', 5, [c*1.01 for c in codebook('lloyd-max', 5).tolist()])
    m = HLWQLinear.from_quantized(quantize(gaussian(8, 256, dtype=torch.float32), 5, codebook=book))
    with torch.inference_mode(): m(act(1, 256))
    x = act(1, 256).requires_grad_(); m(x).sum().backward()
    m.cached = True
    with torch.inference_mode(): m(act(1, 256))
    x = act(1, 256).requires_grad_(); m(x).sum().backward()
    assert gap(x.grad, twin(m).weight.sum(0)[None]) < 1e-5

def test_autocast():
    m,x = layer(bias=True),act(3, 200)
    with torch.autocast('cpu', torch.bfloat16): assert gap(m(x), twin(m)(x)) < 1e-2

# --- casts, copies, files

@pytest.mark.parametrize('cast', [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.float(), lambda m: m.to(torch.bfloat16), lambda m: m.to('cpu', torch.float16), lambda m: nn.Sequential(m).half()[0]])
def test_casts_leave_codes_and_norms_alone(cast):
    m = layer(bias=True)
    packed,norms,w = m.packed.clone(),m.norm_bits.clone(),m.dequantize(torch.float32)
    m = cast(m)
    assert torch.equal(m.packed, packed) and torch.equal(m.norm_bits, norms) and m.norm_bits.dtype == torch.int16 and torch.equal(m.dequantize(torch.float32), w)
    assert m.weight.dtype == m.bias.dtype == m.dequantize().dtype == m(act(1, 200, dtype=m.bias.dtype)).dtype

def test_copies():
    m = layer(bias=True); m(act(1, 200))
    stored = io.BytesIO(); torch.save(m, stored); stored.seek(0)
    for c in (copy.deepcopy(m), copy.copy(m), pickle.loads(pickle.dumps(m)), torch.load(stored, weights_only=False)):
        assert torch.equal(c(act(3, 200)), m(act(3, 200))) and c.extra_repr() == m.extra_repr()
    c = copy.deepcopy(m); c.packed.data.zero_()
    assert not torch.equal(c.packed, m.packed) and not torch.equal(c(act(3, 200)), m(act(3, 200)))

def test_state_dict():
    a,b = layer(bias=True),layer(bias=True, seed=9)
    assert sorted(a.state_dict()) == ['bias', 'norm_bits', 'packed'] == sorted(k for k,_ in a.named_parameters())
    assert b.load_state_dict(a.state_dict()).missing_keys == [] and torch.equal(a(act(3, 200)), b(act(3, 200)))
    c = layer(bias=True, seed=9); c.load_state_dict(a.state_dict(), assign=True)
    assert torch.equal(a(act(3, 200)), c(act(3, 200)))
    with pytest.raises(RuntimeError, match='size mismatch'): layer(width=300, bias=True).load_state_dict(a.state_dict())
    with pytest.raises(RuntimeError, match='packed'): a.load_state_dict(twin(a).state_dict())

def test_flags():
    m = layer(bias=True)
    assert {k:p.requires_grad for k,p in m.named_parameters()} == dict(packed=False, norm_bits=False, bias=True)
    assert isinstance(m, nn.Linear) and 'bits=5' in repr(m) and 'in_features=200' in repr(m) and m.nbytes < 24*200
    m.requires_grad_(False)
    assert not m.bias.requires_grad

def test_meta():
    m = HLWQLinear(200, 24, codebook('lloyd-max', 5), device='meta')
    assert m.weight.is_meta and m.weight.shape == (24, 200)
    with pytest.raises(UnsupportedError, match='meta') as e: m(act(1, 200))
    assert complete(e.value)
    with pytest.raises((HLWQError, NotImplementedError)): layer().to('meta')(act(1, 200))

# --- the dense weight that is kept

def test_cached():
    m,x = layer(bias=True),act(3, 200)
    want = m(x); m.cached = True
    assert gap(m(x), want) < 1e-5 and m.dense_as(torch.float32) is m.dense_as(torch.float32)
    assert m.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert '_dense' not in copy.deepcopy(m).__dict__ and len(pickle.dumps(m)) < 24*200*2
    y = x.bfloat16().requires_grad_(); m(y).sum().backward()
    assert y.grad is not None

def test_cache_follows_the_codes():
    a,b = layer(),layer(seed=9)
    want = b(act(3, 200))
    for change in (lambda m: m.load_state_dict(b.state_dict()), lambda m: m.load_state_dict(b.state_dict(), assign=True), lambda m: m.requantize_(b.dequantize()),
                   lambda m: (m.packed.copy_(b.packed), m.norm_bits.copy_(b.norm_bits))):
        m = copy.deepcopy(a); m.cached = True; m(act(3, 200))
        change(m)
        again = copy.deepcopy(m); again.cached = False
        assert gap(m(act(3, 200)), again(act(3, 200))) < 1e-5, 'the old weight is still in use'
        assert gap(m(act(3, 200)), want) < .2

# --- compilers

@both
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
@pytest.mark.parametrize('cached', [False, True])
def test_compile(backend, cached):
    "In one piece, also before the layer was ever called"
    torch._dynamo.reset()
    m = nn.Sequential(layer(48, 200, bias=True), nn.GELU(), layer(24, 48, seed=3, bias=True))
    for o in m: o.cached = cached if isinstance(o, HLWQLinear) else False
    f = torch.compile(m, fullgraph=True, backend=backend)
    x = act(3, 200).requires_grad_()
    y = f(x); y.sum().backward()
    z = act(3, 200).requires_grad_()
    m(z).sum().backward()
    assert gap(y, m(x)) < 1e-5 and gap(x.grad, z.grad) < 1e-5
    with torch.no_grad(): assert gap(f(act(7, 200)), m(act(7, 200))) < 1e-5

@both
def test_explain():
    torch._dynamo.reset()
    said = torch._dynamo.explain(layer(bias=True))(act(3, 200))
    assert said.graph_break_count == 0 and said.graph_count == 1

@both
def test_operator_is_registered_well():
    m = layer()
    for op,args in ((torch.ops.hlwq.linear, (act(3, 200), m.packed, m.norm_bits, m.key)), (torch.ops.hlwq.linear_t, (act(3, 24), m.packed, m.norm_bits, m.key, 200))):
        torch.library.opcheck(op, args, test_utils=('test_schema', 'test_faketensor', 'test_autograd_registration') if op is torch.ops.hlwq.linear else ('test_schema', 'test_faketensor'))

# --- the weight that is not there

def test_weight_looks_like_one():
    m = layer(); w = m.weight
    assert isinstance(w, torch.Tensor) and w.shape == (24, 200) and w.dtype == torch.float32 and w.device.type == 'cpu' and w.numel() == 4800 and w.element_size() == 4
    d = m.dequantize()
    for got in (w.clone(), w.detach(), w.float(), w.data, w + 0, w.cpu(), copy.deepcopy(w), w.t().t(), w[:]): assert torch.equal(torch.as_tensor(got), d)
    assert torch.equal(w.norm(), d.norm()) and torch.equal(w[3], d[3]) and torch.equal(act(1, 200) @ w.t(), act(1, 200) @ d.t()) and torch.equal(nn.functional.linear(act(1, 200), w), nn.functional.linear(act(1, 200), d))
    assert 'PackedWeight' in repr(w) and torch.allclose(w, d) and torch.equal(torch.cat([w, w]), torch.cat([d, d])) and not w.requires_grad
    assert m.bfloat16().weight.dtype == torch.bfloat16

def ones(): return torch.ones(24, 200)
def exec_on(statement): return lambda m: exec(statement, dict(m=m, ones=ones, torch=torch))
KEPT = ['m.weight = torch.nn.Parameter(ones())', 'm.weight.data = ones()', 'm.weight.data += 1', 'm.weight.data -= 1', 'm.weight.data = m.weight.data*2']
WRITES = KEPT + ['m.weight += 1', 'm.weight.add_(1)', 'm.weight.copy_(ones())', 'torch.nn.init.normal_(m.weight)', 'm.weight.zero_()', 'm.weight[0] = 1', 'm.weight[:, 3] *= 2', 'm.weight[0, 0] += 1',
    'm.weight.t().add_(1)', 'm.weight.view(-1).mul_(2)', 'm.weight.detach().copy_(ones())', 'm.weight.data.add_(1)', 'm.weight.data.copy_(ones())', 'm.weight.data.normal_()', 'm.weight.data[0] = 1', 'm.weight.data[0].add_(1)',
    'm.weight.data.mul_(3)', 'm.weight.data.reshape(-1).scatter_add_(0, torch.tensor([5]), torch.ones(1))', 'm.weight.data.addmm_(torch.ones(24, 2), torch.ones(2, 200))', 'm.weight.data.fill_(2)', 'm.weight.data.clamp_(0)',
    'torch.mul(ones(), 2, out=m.weight)', 'torch.add(ones(), 2, out=m.weight.data)', 'torch._foreach_add_([m.weight], 1.)', 'torch._foreach_mul_([m.weight.data], 2.)', 'm.weight.index_copy_(0, torch.tensor([1]), torch.ones(1, 200))',
    'm.weight.data.index_copy_(0, torch.tensor([1]), torch.ones(1, 200))', 'm.weight.set_(ones())']

@pytest.mark.parametrize('write', WRITES)
@torch.no_grad()
def test_writes_are_kept_or_refused(write):
    "Whoever writes to the weight changes the layer or hears that it cannot be done; nothing is written to a copy that is thrown away"
    m = layer(); before = m.dequantize().clone()
    try: exec_on(write)(m)
    except (HLWQError, RuntimeError, TypeError):
        assert write not in KEPT and torch.equal(m.dequantize(), before)
        return
    assert not torch.equal(m.dequantize(), before), 'written to nowhere'

@torch.no_grad()
def test_copies_of_the_weight_are_free():
    "What was cloned is an ordinary tensor that may be changed"
    m = layer(); before = m.dequantize().clone()
    for w in (m.weight.clone(), m.weight.data.clone(), m.weight.data*1, m.weight + 0, m.weight.float().clone(), copy.deepcopy(m.weight)):
        w.add_(1); w[0] = 3
        assert not torch.equal(w, before)
    assert torch.equal(m.dequantize(), before)

def test_requantize():
    m,w = layer(bits=8),gaussian(24, 200, seed=3, dtype=torch.float32)
    m.requantize_(w)
    assert gap(m.dequantize(), w) < .01 and m.bits == 8
    before = m.packed.clone(),m.norm_bits.clone()
    for bad,error in ((w[:5], ConfigError), (w.t(), ConfigError), (w[None], ConfigError), (w.clone().fill_(float('nan')), NonFiniteError), (w.clone().fill_(float('inf')), NonFiniteError)):
        with pytest.raises(error) as e: m.requantize_(bad)
        assert complete(e.value)
        with pytest.raises(error): m.weight = nn.Parameter(bad)
    assert torch.equal(m.packed, before[0]) and torch.equal(m.norm_bits, before[1])
    m.requantize_(w*1e6)
    assert m.norm_bits.dtype == torch.int32 and gap(m.dequantize(), w*1e6) < .01 and gap(m(act(2, 200)), twin(m)(act(2, 200))) < 1e-5
    m.requantize_(w.bfloat16())
    assert m.packed.requires_grad is False and m.norm_bits.requires_grad is False

def test_weight_cannot_be_taken_away():
    m = layer()
    with pytest.raises(Exception): del m.weight
    with pytest.raises(Exception): m.weight = None
    with pytest.raises(Exception): m.register_parameter('weight', nn.Parameter(ones()))
    with pytest.raises(Exception): nn.utils.parametrize.register_parametrization(m, 'weight', nn.Identity())
    assert m(act(1, 200)).shape == (1, 24)

# --- embeddings

def embedding(rows=30, width=200, bits=5):
    q = quantize(gaussian(rows, width, dtype=torch.float32), bits)
    return HLWQEmbedding(rows, width, q.codebook, device='meta')._take(q)

@pytest.mark.parametrize('bits', BITS)
def test_embedding(bits):
    m = embedding(bits=bits); d = nn.Embedding.from_pretrained(m.dequantize(torch.float32))
    assert isinstance(m, nn.Embedding) and m.weight.shape == (30, 200) and not any(p.requires_grad for p in m.parameters())
    for ids in (torch.tensor(3), torch.tensor([[1, 29], [0, 1]]), torch.empty(2, 0, dtype=torch.long), torch.tensor([5, 5], dtype=torch.int32), torch.arange(30)[::3]): assert torch.equal(m(ids), d(ids))
    assert m.bfloat16()(torch.tensor([3])).dtype == torch.bfloat16 and gap(m(torch.tensor([3])), d(torch.tensor([3]))) < 1e-2

@pytest.mark.parametrize('ids', [torch.tensor([-1]), torch.tensor([30]), torch.tensor([2**40]), torch.tensor([1.]), torch.tensor([True, False]), torch.tensor([1, 0], dtype=torch.uint8)], ids=str)
def test_embedding_refuses_what_an_ordinary_one_refuses(ids):
    "Numbers from behind and masks among them, which indexing would take"
    with pytest.raises((IndexError, RuntimeError, HLWQError)): nn.Embedding(30, 200)(ids)
    with pytest.raises((IndexError, RuntimeError, HLWQError)): embedding()(ids)

def test_embedding_has_the_attributes_of_one():
    "Adapters read them"
    m,d = embedding(),nn.Embedding(30, 200)
    assert all(getattr(m, k) == getattr(d, k) for k in ('num_embeddings', 'embedding_dim', 'padding_idx', 'max_norm', 'norm_type', 'scale_grad_by_freq', 'sparse'))

def test_embedding_compiles():
    torch._dynamo.reset(); m = embedding()
    assert torch.equal(torch.compile(m, fullgraph=True, backend='aot_eager')(torch.tensor([[3, 4]])), m(torch.tensor([[3, 4]])))

def test_embedding_is_copied_and_cast():
    m = embedding(); want = m(torch.arange(30)); norms = m.norm_bits.clone()
    for c in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))): assert torch.equal(c(torch.arange(30)), want)
    assert torch.equal(m.half().norm_bits, norms) and m.norm_bits.dtype == torch.int16
    with pytest.raises(UnsupportedError, match='meta'): m.to('meta')(torch.tensor([1]))

"Layers whose codes are in the order of a GPU: on a CPU with Triton's interpreter, which stands in for one"
import copy, io, os, pickle
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import pytest
pytest.importorskip('triton')
import hlwq
from hlwq import experts as experts_module, linear as linear_module
from hlwq.experts import HLWQExperts, PackedStack
from hlwq.kernels import layout
from hlwq.linear import HLWQEmbedding, HLWQLinear, disk_order, tiled
from hlwq.quantize import quantize
from torch import nn

if torch.cuda.is_available() or not layout.INTERPRETED: pytest.skip('for machines without a GPU', allow_module_level=True)

@pytest.fixture
def gpu(monkeypatch):
    "The CPU passes for a device with kernels; returns a function that ends that"
    monkeypatch.setattr(linear_module, 'why_no_triton', lambda device: '')
    return lambda: monkeypatch.setattr(linear_module, 'why_no_triton', lambda device: 'no GPU')

@torch.no_grad()
def error(y, ref): return float((y.double() - ref.double()).norm()/ref.double().norm())

def packed_matrix(out=20, width=130, bits=5, seed=0): return quantize(torch.randn(out, width, generator=torch.Generator().manual_seed(seed)), bits)

def test_a_layer_changes_order_and_stays_itself(gpu):
    q = packed_matrix()
    m = HLWQLinear.from_quantized(q, torch.randn(20, dtype=torch.bfloat16), torch.float32)
    x = torch.randn(2, 3, 130).bfloat16()
    y = m(x)
    assert tiled(m.packed) and m.nbytes >= q.nbytes and y.dtype == torch.bfloat16
    assert error(y, x.float() @ q.dequantize().T + m.bias) < 8e-3
    assert torch.equal(m.quantized.packed, q.packed) and torch.equal(m.dequantize(torch.float16), q.dequantize(torch.float16)) and torch.equal(m.weight.data, q.dequantize())
    x = torch.randn(1, 130)
    assert torch.allclose(m(x), x @ q.dequantize().T + m.bias, atol=1e-4)
    gpu()
    assert not tiled(m.to('cpu').packed) and torch.equal(m.packed.view(-1), q.packed)

def test_state_dicts_are_in_disk_order(gpu):
    q, other = packed_matrix(), packed_matrix(seed=1)
    m = HLWQLinear.from_quantized(q).place_()
    saved = m.state_dict()
    assert torch.equal(saved['packed'].view(-1), q.packed) and tiled(m.packed)
    n = HLWQLinear.from_quantized(other).place_()
    n.load_state_dict(saved)
    assert tiled(n.packed) and torch.equal(n.quantized.packed, q.packed) and torch.equal(n.norms, q.norms)
    f = io.BytesIO(); torch.save(m.state_dict(), f); f.seek(0)
    gpu()
    plain = HLWQLinear.from_quantized(other)
    plain.load_state_dict(torch.load(f))
    assert torch.equal(plain.packed.view(-1), q.packed)

def test_copies_keep_the_order(gpu):
    q = packed_matrix()
    m = HLWQLinear.from_quantized(q).place_()
    for n in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))): assert tiled(n.packed) and torch.equal(n.quantized.packed, q.packed)
    gpu()
    n = pickle.loads(pickle.dumps(m))                          # arrives where there are no kernels
    x = torch.randn(1, 130)
    assert torch.allclose(n(x), x @ q.dequantize().T, atol=1e-4) and not tiled(n.packed)

def test_a_new_weight_is_tiled_too(gpu):
    m, w = HLWQLinear.from_quantized(packed_matrix()).place_(), torch.randn(20, 130)
    m.weight.data = w
    assert tiled(m.packed) and torch.equal(m.quantized.packed, quantize(w, 5).packed)

def test_parameters_made_in_inference_mode(gpu):
    q = packed_matrix()
    with torch.inference_mode(): m = HLWQLinear.from_quantized(quantize(q.dequantize(), 5))
    assert m.packed.is_inference()
    x = torch.randn(45, 130)
    y = m(x)
    assert tiled(m.packed) and error(y, x @ m.dequantize().T) < 1e-6
    with torch.inference_mode(): assert torch.equal(m(x), y)

def test_tied_weights_stay_tied(gpu):
    q = packed_matrix(40, 128)
    head = HLWQLinear.from_quantized(q)
    embedding = HLWQEmbedding(40, 128, q.codebook, device='meta')._take(q)
    embedding.packed, embedding.norm_bits = head.packed, head.norm_bits
    ids = torch.tensor([[3, 39, 0], [17, 17, 8]])
    assert torch.equal(embedding(ids), q.dequantize()[ids]) and tiled(embedding.packed)
    assert head.packed is embedding.packed and error(head(torch.eye(128)[:1]), q.dequantize()[:, :1].T) < 1e-6
    with pytest.raises(hlwq.core.ConfigError): embedding(torch.tensor([-1]))

def test_gradients_reach_the_activations(gpu):
    q = packed_matrix()
    m = HLWQLinear.from_quantized(q).place_()
    x = torch.randn(3, 130, requires_grad=True)
    m(x).square().sum().backward()
    w = q.dequantize()
    assert error(x.grad, 2*(x.detach() @ w.T) @ w) < 1e-5

def test_operations_are_known_to_torch(gpu):
    m = HLWQLinear.from_quantized(packed_matrix(16, 128)).place_()
    for x in (torch.randn(1, 128), torch.randn(2, 2, 128).bfloat16()): torch.library.opcheck(torch.ops.hlwq.linear.default, (x, m.packed.data, m.norm_bits.data, m.key), test_utils=('test_schema', 'test_faketensor'))
    x = torch.randn(2, 128)
    assert torch.allclose(torch.compile(m, fullgraph=True, backend='eager')(x), m(x), atol=1e-5)

class Gated(nn.Module):
    "Experts as transformers describes them"
    def __init__(self, E, hidden, inner):
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed, self.num_experts, self.act_fn = True, False, False, E, nn.SiLU()
        self.config = type('Config', (), dict(_experts_implementation='grouped_mm'))()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(E, 2*inner, hidden)), nn.Parameter(torch.randn(E, hidden, inner))
    def forward(self, x): return x

@pytest.fixture
def layer():
    from transformers.integrations import moe
    Gated._apply_gate = moe._default_apply_gate
    torch.manual_seed(0)
    m = Gated(3, 64, 24)
    stacks = [PackedStack.from_quantized([quantize(w, 5) for w in p.data]) for p in (m.gate_up_proj, m.down_proj)]
    return HLWQExperts(m, *stacks)

def test_experts_in_two_kernels(gpu, layer, monkeypatch):
    x, ids, weights = torch.randn(2, 64).bfloat16(), torch.tensor([[2], [1]]), torch.rand(2, 1)
    calls = []
    monkeypatch.setattr(experts_module, 'expert_layer', lambda *a, f=experts_module.expert_layer: calls.append(1) or f(*a))
    fused = layer(x, ids, weights)
    assert calls and tiled(layer.w13.packed)
    w1, w2 = layer.w13.dequantize(), layer.w2.dequantize()
    want = torch.zeros(2, 64)
    for t in range(2):
        for k in range(1):
            h = w1[ids[t, k]] @ x[t].float()
            want[t] += weights[t, k]*(w2[ids[t, k]] @ (nn.functional.silu(h[:24])*h[24:]))
    assert error(fused, want) < 1e-2
    layer.swiglu = False                                       # step by step
    assert error(layer(x, ids, weights), want) < 1.5e-2 and len(calls) == 1
    layer.swiglu = True
    assert error(layer(x.float(), ids, weights), want) < 1e-5 and len(calls) == 1          # the matrix unit would round

@pytest.mark.parametrize('grouped', (False, True))
def test_many_experts(gpu, layer, grouped, monkeypatch):
    "More pairs than the kernels for one token take: sorted once for both projections, in parts or all decoded"
    from hlwq.kernels import moe
    if grouped: monkeypatch.setattr(moe, '_can_group', lambda x, norms, E: True)
    T = 80 if grouped else 18
    g = torch.Generator().manual_seed(1)
    x, ids, weights = torch.randn(T, 64, generator=g).bfloat16(), torch.rand(T, 3, generator=g).argsort(1)[:, :2], torch.rand(T, 2, generator=g)
    got, w1, w2 = layer(x, ids, weights), layer.w13.dequantize(), layer.w2.dequantize()
    h = torch.einsum('tkoi,ti->tko', w1[ids], x.float())
    want = torch.einsum('tkoi,tki,tk->to', w2[ids], nn.functional.silu(h[..., :24])*h[..., 24:], weights)
    assert got.dtype == torch.bfloat16 and error(got, want) < 1e-2

def test_the_layer_operation_is_known_to_torch(gpu, layer):
    up, down = layer.w13.place_(), layer.w2.place_()
    args = torch.randn(1, 64).bfloat16(), torch.tensor([[1]]), torch.rand(1, 1), up.packed.data, up.norm_bits.data, up.key, down.packed.data, down.norm_bits.data, down.key
    torch.library.opcheck(torch.ops.hlwq.expert_layer.default, args, test_utils=('test_schema', 'test_faketensor'))

def test_stacks_change_order_too(gpu, layer):
    s = layer.w13
    want = s.disk.clone()
    s.place_()
    assert tiled(s.packed) and torch.equal(s.disk, want) and torch.equal(s.expert(1).packed, want[1].view(-1)) and torch.equal(s.state_dict()['packed'], want)
    other = PackedStack.from_quantized([quantize(torch.randn(48, 64), 5) for _ in range(3)]).place_()
    other.load_state_dict(s.state_dict())
    assert tiled(other.packed) and torch.equal(other.disk, want)
    dense = s.dequantize()
    gpu()
    assert torch.equal(s.to('cpu').packed, want) and torch.equal(s.dequantize(), dense)

def test_gradients_through_experts(gpu, layer):
    s = layer.w2.place_()
    x, rows, ids = torch.randn(2, 24, requires_grad=True), torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2])
    w = s.dequantize()
    s(x, rows, ids).square().sum().backward()
    ref = torch.zeros(2, 24)
    for r,e in zip(rows, ids): ref[r] += 2*(w[e] @ x[r].detach()) @ w[e]
    assert error(x.grad, ref) < 1e-5
    torch.library.opcheck(torch.ops.hlwq.expert_linear.default, (x.detach(), rows, ids, s.packed.data, s.norm_bits.data, s.key, 'eager'), test_utils=('test_schema', 'test_faketensor'))

def test_the_report_names_the_kernels(gpu, monkeypatch):
    from hlwq import packed_model
    m = nn.Sequential(HLWQLinear.from_quantized(packed_matrix()).place_())
    assert 'torch' not in str(hlwq.hlwq_report(m))
    said = []
    monkeypatch.setattr(packed_model, 'warn_once', lambda message, category: said.append(message))
    packed_model.warn_if_slow(m)
    assert len(said) == 1 and 'TRITON_INTERPRET is set' in said[0]             # it is plain Triton here

def test_a_layer_that_never_ran_compiles_whole():
    q = packed_matrix(16, 128)
    x = torch.randn(2, 128)
    assert torch.allclose(torch.compile(HLWQLinear.from_quantized(q), fullgraph=True, backend='eager')(x), x @ q.dequantize().T, atol=1e-4)

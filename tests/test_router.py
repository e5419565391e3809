"Router kernels against the modules of transformers: in the interpreter on a CPU, for real where there is a GPU"
import os
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import pytest
pytest.importorskip('triton')
from transformers import MixtralConfig,Qwen3MoeConfig,Qwen3_5MoeTextConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock,Qwen3_5MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from hlwq.core import ConfigError,UnsupportedError
from hlwq.kernels import layout,router
from hlwq.kernels.norms import add_rms_norm,silu_mul
from hlwq.kernels.router import route,route_from_hidden,route_from_hidden_ref,route_ref,thin_matmul,thin_matmul_ref

GPU = torch.cuda.is_available()
if not GPU and not layout.INTERPRETED: pytest.skip('triton was imported without TRITON_INTERPRET before', allow_module_level=True)
device = torch.device('cuda', torch.cuda.current_device()) if GPU else torch.device('cpu')
DTYPES = (torch.bfloat16,torch.float16,torch.float32)

def rand(*shape, dtype=torch.bfloat16, seed=0, scale=1.): return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed))*scale).to(dtype).to(device)
def error(y, ref): return float((y.double()-ref.double().to(y.device)).norm()/ref.double().norm().clamp_min(1e-30))
def counter(): return torch.zeros(1, dtype=torch.int32, device=device)

@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    "Memory that kernels get for their results holds NaN or numbers of no expert, so that an element they forget shows"
    new_empty = torch.Tensor.new_empty
    def poison(t): return t.fill_(float('nan') if t.is_floating_point() else -12345)
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda self, *a, **k: poison(new_empty(self, *a, **k)))

def same_choice(logits, k, **kw):
    (w, ids),(rw, rids) = route(logits, k, **kw),route_ref(logits, k, **kw)
    exact = route_ref(logits.double(), k, **{**kw, 'dtype':torch.float64})[0]
    assert torch.equal(ids, rids) and w.dtype == rw.dtype and ids.dtype == torch.int64
    assert error(w, exact) <= 1.1*error(rw, exact)+1e-6
    return w,ids

@pytest.mark.parametrize('dtype', DTYPES)
def test_route(dtype):
    for rows,E,k in ((1, 256, 8), (2, 512, 10), (3, 128, 8), (8, 64, 6), (2, 60, 4), (1, 8, 2), (2, 300, 16), (4, 16, 16), (2, 3, 3), (3, 1, 1)):
        logits = rand(rows, E, dtype=dtype, seed=E, scale=3)
        same_choice(logits, k)
        same_choice(logits, k, normalize=False, dtype=torch.float32)

@pytest.mark.parametrize('dtype', DTYPES)
def test_order_is_that_of_topk(dtype):
    "On logits that are all different, of either sign"
    for E in (40, 256):
        v = (torch.arange(E)-E//2).float()/8
        logits = torch.stack([v[torch.randperm(E, generator=torch.Generator().manual_seed(i))] for i in range(3)]).to(dtype).to(device)
        assert len(logits[0].unique()) == E
        assert torch.equal(route(logits, 8)[1], torch.softmax(logits.double(), -1).topk(8).indices)

def test_ties_and_odd_numbers():
    for dtype in DTYPES:
        x = torch.zeros(6, 40, dtype=dtype, device=device)
        x[0, 1] = -0.; x[1, 30:] = 1; x[2, 3:] = float('-inf'); x[3, 7] = float('nan'); x[4] = float('-inf'); x[5, 9] = float('inf')
        w,ids = route(x, 6)
        assert ids[0].tolist() == [0, 1, 2, 3, 4, 5] and ids[1].tolist() == [30, 31, 32, 33, 34, 35] and ids[2].tolist() == [0, 1, 2, 3, 4, 5]
        assert (w[2, 3:] == 0).all() and error(w[2, :3], torch.full((3,), 1/3)) < 4e-3
        assert w[3:].isnan().all() and (ids >= 0).all() and (ids < 40).all() and all(len(set(r)) == 6 for r in ids.tolist())
        coarse = rand(4, 256, dtype=dtype).mul(4).round().div(4)             # many ties
        same_choice(coarse, 8)

def test_route_takes_strides():
    wide = rand(4, 300)
    for a,b in ((0, 64), (3, 131), (8, 264)):
        for x,y in zip(route(wide[:, a:b], 8), route(wide[:, a:b].contiguous(), 8)): assert torch.equal(x, y)
    assert torch.equal(route(wide[::2], 4)[1], route(wide, 4)[1][::2]) and route(wide[:0], 4)[1].shape == (0, 4)

ROUTERS = dict(qwen3_5=(Qwen3_5MoeTopKRouter, lambda: Qwen3_5MoeTextConfig(hidden_size=320, num_experts=64, num_experts_per_tok=8), {}),
    qwen3=(Qwen3MoeTopKRouter, lambda: Qwen3MoeConfig(hidden_size=320, num_experts=48, num_experts_per_tok=8, norm_topk_prob=True), {}),
    qwen3_plain=(Qwen3MoeTopKRouter, lambda: Qwen3MoeConfig(hidden_size=320, num_experts=48, num_experts_per_tok=8, norm_topk_prob=False), dict(normalize=False)),
    mixtral=(MixtralTopKRouter, lambda: MixtralConfig(hidden_size=320, num_local_experts=8, num_experts_per_tok=2), dict(dtype=torch.float32)))

@torch.no_grad()
@pytest.mark.parametrize('name', ROUTERS)
def test_routers_of_transformers(name):
    cls,config,kw = ROUTERS[name]
    for dtype in (torch.float32,torch.bfloat16):
        m = cls(config())
        m.weight.copy_(rand(*m.weight.shape, dtype=torch.float32, seed=1, scale=.06).cpu())
        m,x = m.to(dtype).to(device),rand(3, 320, dtype=dtype, seed=2)
        logits,w,ids = m(x)
        ours,chosen = route(logits, m.top_k, **kw)
        assert ours.dtype == w.dtype and torch.equal(torch.sort(logits.gather(1, chosen), descending=True).values, logits.gather(1, ids))      # topk may take either of two equal ones
        assert error(ours, w) <= (2e-6 if ours.dtype == torch.float32 else 4e-3)
        if dtype == torch.float32:
            ours,chosen,_ = route_from_hidden(x, m.weight, m.top_k, **kw)
            assert torch.equal(chosen, ids) and error(ours, w) < 4e-6

# --- products with few rows

@pytest.mark.parametrize('dtype', DTYPES)
def test_thin_matmul(dtype):
    for rows,K,ns in ((1, 2048, (8,)), (1, 320, (32, 32)), (2, 1000, (1,)), (3, 96, (5, 1, 2, 3)), (5, 2500, (3, 2)), (8, 520, (9,)), (17, 64, (4, 0, 1)), (1, 1, (2,)), (4, 9000, (2,))):
        x,ws = rand(rows, K, dtype=dtype, seed=1),[rand(n, K, dtype=dtype, seed=2+i) for i,n in enumerate(ns)]
        y,ref,exact = thin_matmul(x, ws),thin_matmul_ref(x, ws),thin_matmul_ref(x.double(), [w.double() for w in ws])
        assert y.dtype == dtype and y.shape == ref.shape and error(y, exact) <= 1.1*error(ref, exact)+4e-7
        assert torch.equal(y, thin_matmul(x, torch.cat(ws)))

def test_thin_matmul_takes_strides():
    wide,w = rand(6, 3*192),rand(10, 192)
    x = wide[:, 192:384]
    assert torch.equal(thin_matmul(x, w), thin_matmul(x.contiguous(), w)) and torch.equal(thin_matmul(wide[::3, 1:193], w), thin_matmul(wide[::3, 1:193].contiguous(), w))
    assert thin_matmul(x[:0], w).shape == (0, 10) and thin_matmul(x, w[:0]).shape == (6, 0) and not thin_matmul(x[:, :0], w[:, :0].contiguous()).any()
    odd = rand(2, 37)
    assert torch.equal(thin_matmul(odd[:1], odd[1:]), thin_matmul(odd[:1].clone(), odd[1:].clone()))    # begins at no multiple of 16 bytes

# --- both at once

@pytest.mark.parametrize('dtype', DTYPES)
def test_route_from_hidden(dtype):
    for rows,E,k,K,n in ((1, 40, 8, 320, 1), (2, 17, 3, 96, 0), (8, 24, 8, 256, 2), (3, 66, 8, 64, 1), (11, 16, 4, 64, 1)):
        x,w,extra,c = rand(rows, K, dtype=dtype),rand(E, K, dtype=dtype, seed=1, scale=K**-.5),rand(n, K, dtype=dtype, seed=2),counter()
        both = thin_matmul(x, [w, extra])
        weights,ids = route(both[:, :E], k)
        for e in (extra, extra, None):                         # twice: the counter has to be zero again
            got = route_from_hidden(x, w, k, extra=e, counter=c)
            same = torch.allclose(got[0], weights, rtol=1e-6) if dtype == torch.float32 else torch.equal(got[0], weights)    # a GPU adds up exponentials in another order
            assert same and torch.equal(got[1], ids) and torch.equal(got[2], both[:, E:] if e is not None else both[:, :0]) and not c.any()
        if dtype == torch.float32:
            ref = route_from_hidden_ref(x, w, k, extra=extra)
            assert torch.equal(ids, ref[1]) and error(weights, ref[0]) < 4e-6 and (not n or error(got[2] if e is not None else both[:, E:], ref[2]) < 4e-6)
    assert route_from_hidden(x[:0], w, 4, extra=extra)[2].shape == (0, 1)
    assert torch.equal(route_from_hidden(x[:3], w, 4)[1], ids[:3]) and not router._shared_counter(device).any()

@torch.no_grad()
def test_whole_moe_block():
    "The mixture of experts of Qwen3.5 with its shared expert and the norm of the next layer, from the kernels between its own products"
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(hidden_size=128, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=40, shared_expert_intermediate_size=72)
    config._experts_implementation = 'eager'
    m = Qwen3_5MoeSparseMoeBlock(config).eval()
    for p in m.parameters(): p.copy_(torch.randn_like(p)*.1)
    m,x,r,w = m.to(device),rand(3, 128, dtype=torch.float32),rand(3, 128, dtype=torch.float32, seed=1),rand(128, dtype=torch.float32, seed=2)
    want = r+m(x[:, None])[:, 0]
    weights,ids,gate = route_from_hidden(x, m.gate.weight, 4, extra=m.shared_expert_gate.weight)
    s = m.shared_expert
    shared = s.down_proj(silu_mul(s.gate_proj(x), s.up_proj(x)))
    _,total = add_rms_norm(m.experts(x, ids, weights), w, 1e-6, r, shared, gate, zero_centered=True)
    assert error(total, want) < 5e-6

# --- what does not fit

def test_says_what_does_not_fit():
    x,w = rand(2, 64),rand(8, 64)
    for f,says in ((lambda: route(rand(1, 513), 8), 'up to 16 of up to 512'), (lambda: route(x, 17), 'top 17 of 64'), (lambda: route(x[:, :4], 5), 'top 5 of 4'), (lambda: route(x, 0), 'top 0'), (lambda: route(x, 2, dtype=torch.float64), 'weights in'),
            (lambda: route(x.t(), 2), 'along its last axis'), (lambda: thin_matmul(x, [w]*5), '5 matrices'), (lambda: thin_matmul(x, []), '0 matrices'), (lambda: thin_matmul(x, rand(8, 32)), r'weights\[0\] of shape'),
            (lambda: thin_matmul(x, [w, w.float()]), r'weights\[1\] in'), (lambda: thin_matmul(x, rand(8, 128)[:, ::2]), 'along its last axis'), (lambda: thin_matmul(x, rand(8, 65)[:, :64]), 'contiguous'),
            (lambda: route_from_hidden(x, w, 2, extra=rand(1, 32)), r'weights\[1\] of shape'), (lambda: route_from_hidden(x, w, 9), 'top 9 of 8'), (lambda: route_from_hidden(x, w, 2, counter=torch.zeros(1, device=device)), 'need int32')):
        with pytest.raises(ConfigError, match=says): f()
    with pytest.raises(UnsupportedError): route(x.double(), 2)

# --- recorded

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_counter_in_a_graph():
    "Many replays of many launches give what one launch gives, and the counter is zero after each"
    for rows,E,K in ((1, 256, 2048), (8, 128, 2048), (3, 512, 1024)):
        xs,w,extra,c = [rand(rows, K, seed=i) for i in range(8)],rand(E, K, seed=50, scale=K**-.5),rand(1, K, seed=51),counter()
        want = [(*route((both := thin_matmul(x, [w, extra]))[:, :E], 8), both[:, E:]) for x in xs]
        route_from_hidden(xs[0], w, 8, extra=extra, counter=c); torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): got = [route_from_hidden(x, w, 8, extra=extra, counter=c) for x in xs]
        for _ in range(50):
            for o in got: o[0].fill_(float('nan')); o[1].fill_(-1)
            graph.replay(); torch.cuda.synchronize()
            assert not c.any() and all(torch.equal(a, b) for o,ref in zip(got, want) for a,b in zip(o, ref))

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_no_counter_while_recording(monkeypatch):
    monkeypatch.setattr(router, '_COUNTERS', {})
    x,w = rand(1, 64),rand(8, 64)
    torch.cuda.synchronize()
    with pytest.raises(ConfigError, match='before recording'), torch.cuda.graph(torch.cuda.CUDAGraph()): route_from_hidden(x, w, 2)

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_no_waiting_for_the_gpu():
    x,w = rand(2, 128),rand(8, 128)
    route_from_hidden(x, w, 2), route(x, 2), thin_matmul(x, w)
    torch.cuda.set_sync_debug_mode('error')
    try: route_from_hidden(x, w, 2), route(x, 2), thin_matmul(x, w)
    finally: torch.cuda.set_sync_debug_mode('default')

@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_second_gpu():
    other,x,w = torch.device('cuda', 1-device.index),rand(2, 64),rand(8, 64)
    for a,b in zip(route_from_hidden(x.to(other), w.to(other), 2), route_from_hidden(x, w, 2)): assert torch.equal(a.cpu(), b.cpu())

"The kernels between matrix products against the modules of transformers: in the interpreter on a CPU, for real where there is a GPU"
import os
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import pytest
pytest.importorskip('triton')
from transformers import Qwen3_5MoeTextConfig,StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm,apply_rotary_pos_emb as rope_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeAttention,Qwen3_5MoeRMSNorm,apply_rotary_pos_emb as rope_qwen
from hlwq.core import ConfigError,UnsupportedError
from hlwq.kernels import layout
from hlwq.kernels.norms import add_rms_norm,add_rms_norm_ref,rms_norm_ref,rope_append,rope_append_ref,sigmoid_mul,sigmoid_mul_ref,silu_mul,silu_mul_ref

GPU = torch.cuda.is_available()
if not GPU and not layout.INTERPRETED: pytest.skip('triton was imported without TRITON_INTERPRET before', allow_module_level=True)
device = torch.device('cuda', torch.cuda.current_device()) if GPU else torch.device('cpu')
DTYPES = (torch.bfloat16,torch.float16,torch.float32)
EPS = {torch.bfloat16:2**-6, torch.float16:2**-9, torch.float32:2**-18}      # two steps of the dtype, relative, for what is rounded twice; in float32 what a GPU's exponential is off at -20
TINY = {torch.bfloat16:1e-38, torch.float16:2**-24, torch.float32:1e-38}     # one step where there are no smaller exponents

def rand(*shape, dtype=torch.bfloat16, seed=0, scale=1.): return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed))*scale).to(dtype).to(device)
def error(y, ref): return float((y.double()-ref.double()).norm()/ref.double().norm().clamp_min(1e-30))

def nearly(y, ref, share=.02):
    "Equal but for a few that are one step of the dtype away, or two after two roundings"
    assert y.dtype == ref.dtype and y.shape == ref.shape and not y.isnan().any()
    off = (y.double()-ref.double()).abs()
    assert (off <= EPS[y.dtype]*ref.double().abs()+TINY[y.dtype]).all(), float((off/ref.double().abs()).max())
    assert y.dtype == torch.float32 or (off > 0).double().mean() <= share, float((off > 0).double().mean())

@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    "Memory that kernels get for their results holds NaN, so that an element they forget shows"
    new_empty = torch.Tensor.new_empty
    def poison(t): return t.fill_(float('nan')) if t.is_floating_point() else t
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda self, *a, **k: poison(new_empty(self, *a, **k)))

# --- norms

@torch.no_grad()
def module(cls, H, dtype, eps=1e-5):
    m = cls(H, eps).to(dtype)
    m.weight.add_(rand(H, dtype=dtype, seed=5, scale=.2).cpu())
    return m.to(device)

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('cls', (LlamaRMSNorm,Qwen3RMSNorm,Qwen3_5MoeRMSNorm))
def test_norm_is_that_of_transformers(cls, dtype):
    for rows,H in ((1, 2048), (3, 320), (2, 80), (5, 1), (1, 5120)):
        m,x,r = module(cls, H, dtype),rand(rows, H, dtype=dtype),rand(rows, H, dtype=dtype, seed=1, scale=3)
        zero,w = cls is Qwen3_5MoeRMSNorm,m.weight.detach()
        for y,total,want in ((*add_rms_norm(x, w, 1e-5, zero_centered=zero), x), (*add_rms_norm(x, w, 1e-5, residual=r, zero_centered=zero), r+x)):
            with torch.no_grad(): ref = m(want)
            assert torch.equal(total, want) and torch.equal(ref, rms_norm_ref(want, w, 1e-5, zero))
            exact = rms_norm_ref(want.double(), w.double(), 1e-5, zero)
            assert y.dtype == dtype and error(y, exact) <= 1.1*error(ref, exact)+3e-7

@pytest.mark.parametrize('dtype', DTYPES)
def test_shared_expert(dtype):
    for rows,H in ((1, 320), (8, 96)):
        x,r,e,g = (rand(rows, n, dtype=dtype, seed=i) for i,n in enumerate((H, H, H, 1)))
        w = rand(H, dtype=dtype, seed=9)
        y,total = add_rms_norm(x, w, 1e-6, r, e, zero_centered=True)
        assert torch.equal(total, r+(x+e)) and error(y, rms_norm_ref(total.double(), w.double(), 1e-6, True)) <= 1.1*error(rms_norm_ref(total, w, 1e-6, True), rms_norm_ref(total.double(), w.double(), 1e-6, True))+3e-7
        y,total = add_rms_norm(x, w, 1e-6, r, e, g, zero_centered=True)
        ref,want = add_rms_norm_ref(x, w, 1e-6, r, e, g, zero_centered=True)
        exact = r.double()+(x.double()+torch.sigmoid(g.double())*e.double())
        assert error(total, exact) <= 1.05*error(want, exact)+3e-7 and error(y, ref) < 4*EPS[dtype]
        assert torch.equal(add_rms_norm(x, w, 1e-6, None, e)[1], x+e)

def test_norm_takes_strides():
    wide,w = rand(4, 3*96),rand(96, seed=1)
    x,r,e = wide.split(96, -1)
    g = rand(4, 40, seed=2)[:, 33:34]
    for a,b in zip(add_rms_norm(x, w, 1e-6, r, e, g), add_rms_norm(*(o.contiguous() for o in (x, w)), 1e-6, *(o.contiguous() for o in (r, e, g)))): assert torch.equal(a, b)
    assert add_rms_norm(x[:0], w, 1e-6, r[:0])[0].shape == (0, 96) and add_rms_norm(x, w, 1e-6)[1] is x
    assert torch.equal(add_rms_norm(x[::2], w, 1e-6)[0], add_rms_norm(x, w, 1e-6)[0][::2])

def test_norm_of_odd_numbers():
    x,w = rand(4, 64, dtype=torch.float32),rand(64, dtype=torch.float32, seed=1)
    x[0] = 0; x[1] *= 1e-12; x[2, 5] = float('nan'); x[3, 7] = float('inf')
    y,ref = add_rms_norm(x, w, 1e-6)[0],rms_norm_ref(x, w, 1e-6)
    assert torch.equal(y.isnan(), ref.isnan()) and torch.equal(y[0], ref[0]) and error(y[1], ref[1]) < 1e-6

# --- gates

@pytest.mark.parametrize('dtype', DTYPES)
def test_gates(dtype):
    for rows,n in ((1, 768), (3, 136), (2, 1), (1, 2050)):
        both = rand(rows, 2*n, dtype=dtype, scale=4)
        g,u = both.chunk(2, -1)
        nearly(silu_mul(g, u), silu_mul_ref(g, u))
        nearly(silu_mul(u, g.contiguous()), silu_mul_ref(u, g))
        nearly(sigmoid_mul(g, u), sigmoid_mul_ref(g, u))
    for D in (80, 96, 256):
        q = rand(3, 4, 2*D, dtype=dtype, scale=4)
        x,gate = rand(3, 4*D, dtype=dtype, seed=2),q[..., D:]
        nearly(sigmoid_mul(x, gate), x*torch.sigmoid(gate.reshape(3, -1)))
        assert torch.equal(sigmoid_mul(x.view(3, 4, D), gate), sigmoid_mul(x, gate).view(3, 4, D))
        assert torch.equal(sigmoid_mul(rand(3, 8*D, dtype=dtype)[:, 4*D:], gate), sigmoid_mul(rand(3, 8*D, dtype=dtype)[:, 4*D:].contiguous(), gate.contiguous()))
    assert silu_mul(both[:0], both[:0]).shape == both[:0].shape and sigmoid_mul(x[:0], gate[:0]).shape == (0, 4*D)

def test_gates_far_out():
    g = torch.tensor([[-1e4, -100., -90., -88., -20., -0., 0., 20., 100., 1e4, float('nan')]]).to(device)
    for dtype in DTYPES:
        a,u = g.to(dtype),torch.ones_like(g, dtype=dtype)
        for y,ref in ((silu_mul(a, u), silu_mul_ref(a, u)), (sigmoid_mul(u, a), sigmoid_mul_ref(u, a))):
            assert y[0, -1].isnan() and torch.allclose(y[0, :-1], ref[0, :-1], rtol=EPS[dtype], atol=max(TINY[dtype], 1e-36))

# --- rotation and cache

def angles(rows, rd, dtype, seed=3):
    a = 6*torch.rand(rows, 1, rd//2, generator=torch.Generator().manual_seed(seed)).repeat(1, 1, 2)
    return a.cos().to(dtype).to(device),a.sin().to(dtype).to(device)

def caches(rows, kv, capacity, D, dtype): return [torch.full((rows, kv, capacity, D), float('nan'), dtype=dtype, device=device) for _ in range(2)]
def slot(i): return torch.tensor([i], device=device)
def four(x, rows, D): return x.reshape(rows, 1, -1, D).transpose(1, 2)

def check_append(q, k, v, cos, sin, at, D, apply, capacity=6):
    "Against apply_rotary_pos_emb and a StaticCache, bit by bit; nothing else in the cache changes"
    rows,kv,dtype = len(q),k[0].numel()//D,q.dtype
    kc,vc = caches(rows, kv, capacity, D, dtype)
    out = rope_append(q, k, v, cos, sin, kc, vc, slot(at))
    qs,ks = apply(four(q, rows, D), four(k, rows, D), cos, sin)
    config = Qwen3_5MoeTextConfig(num_hidden_layers=1, layer_types=['full_attention'], num_attention_heads=kv, num_key_value_heads=kv, head_dim=D)
    cache = StaticCache(config, max_cache_len=capacity)
    if at: cache.update(*(torch.full((rows, kv, at, D), float('nan'), dtype=dtype, device=device) for _ in range(2)), 0)
    cache.update(ks, four(v, rows, D), 0)
    assert out.shape == (rows, q[0].numel()//D, D) and torch.equal(out, qs[:, :, 0])
    for c,want in ((kc, cache.layers[0].keys), (vc, cache.layers[0].values)):
        assert torch.equal(c[:, :, at], want[:, :, at]) and c[:, :, :at].isnan().all() and c[:, :, at+1:].isnan().all()

@pytest.mark.parametrize('dtype', DTYPES)
def test_rope_is_that_of_transformers(dtype):
    for rows,heads,kv,D,rd,at in ((1, 4, 2, 128, 128, 5), (2, 3, 1, 80, 80, 0), (3, 2, 2, 96, 32, 2), (1, 4, 1, 256, 64, 3), (2, 1, 1, 6, 6, 1)):
        q,k,v = (rand(rows, n*D, dtype=dtype, seed=i) for i,n in enumerate((heads, kv, kv)))
        cos,sin = angles(rows, rd, dtype)
        check_append(q, k, v, cos, sin, at, D, rope_qwen)
        if rd == D: check_append(q, k, v, cos, sin, at, D, rope_llama)

def test_rope_takes_strides():
    rows,heads,kv,D = 3,4,2,96
    wide = rand(rows, (2*heads+2*kv)*D+8)[:, 8:]
    q,k,v = wide.split([2*heads*D, kv*D, kv*D], -1)
    q = q.unflatten(-1, (heads, 2*D))[..., :D]                 # Qwen3.5: query and gate of each head side by side
    cos,sin = (o.expand(rows, 1, -1) for o in angles(1, 32, torch.bfloat16))
    check_append(q, k, v, cos, sin, 4, D, rope_qwen)
    kc,vc = caches(rows, kv, 16, D, torch.bfloat16)
    out = rope_append(q, k, v, cos, sin, kc[:, :, :8], vc[:, :, :8], slot(7))
    assert out.isfinite().all() and kc[:, :, 7].isfinite().all() and kc[:, :, 8:].isnan().all() and torch.equal(vc[:, :, 7], v.view(rows, kv, D))
    assert rope_append(q[:0], k[:0], v[:0], cos[:0], sin[:0], kc[:0], vc[:0], slot(0)).shape == (0, heads, D)

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('zero', (False,True))
def test_rope_with_norms(dtype, zero):
    for rows,heads,kv,D,rd in ((1, 4, 2, 128, 128), (2, 2, 1, 80, 32)):
        q,k,v = (rand(rows, n, D, dtype=dtype, seed=i, scale=2) for i,n in enumerate((heads, kv, kv)))
        cos,sin = angles(rows, rd, dtype)
        nq,nk = (module(Qwen3_5MoeRMSNorm if zero else Qwen3RMSNorm, D, dtype, 1e-6) for _ in 'qk')
        wq,wk = nq.weight.detach(),nk.weight.detach().flip(0).cpu().to(device)
        (kc, vc),(kr, vr) = caches(rows, kv, 3, D, dtype),caches(rows, kv, 3, D, dtype)
        ke,ve = caches(rows, kv, 3, D, torch.float64)
        out,ref = (rope_append(q, k, v, cos, sin, kc, vc, slot(1), wq, wk, 1e-6, zero), rope_append_ref(q, k, v, cos, sin, kr, vr, slot(1), wq, wk, 1e-6, zero))
        exact = rope_append_ref(*(o.double() for o in (q, k, v, cos, sin)), ke, ve, slot(1), wq.double(), wk.double(), 1e-6, zero)
        with torch.no_grad(): assert torch.equal(ref, rope_qwen(nq(q)[:, :, None], k[:, :, None], cos, sin)[0][:, :, 0])
        for y,r,e in ((out, ref, exact), (kc[:, :, 1], kr[:, :, 1], ke[:, :, 1])): assert error(y, e) <= 1.1*error(r, e)+3e-7
        assert torch.equal(vc[:, :, 1], v) and kc[:, :, ::2].isnan().all() and vc[:, :, ::2].isnan().all()

def test_no_such_slot():
    q,k,(cos, sin) = rand(2, 2, 32),rand(2, 1, 32),angles(2, 32, torch.bfloat16)
    guarded = torch.zeros(2, 1, 12, 32, dtype=torch.bfloat16, device=device)
    for at in (-1, 4, 2**40, -2**62):
        assert rope_append(q, k, k, cos, sin, guarded[:, :, 4:8], guarded[:, :, 4:8], slot(at)).isnan().all() and not guarded.any()

@torch.no_grad()
def test_whole_attention():
    "A layer of Qwen3.5 attention, put together from the kernels, between its own products"
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(hidden_size=128, num_hidden_layers=1, layer_types=['full_attention'], num_attention_heads=4, num_key_value_heads=2, head_dim=48)
    config._attn_implementation = 'eager'
    rows,D,heads,kv = 2,48,4,2
    for dtype,bound in ((torch.float32, 1e-5),(torch.bfloat16, 8e-3)):
        m = Qwen3_5MoeAttention(config, 0).to(dtype).to(device).eval()
        cache,past = StaticCache(config, max_cache_len=8),rand(2, rows, kv, 3, D, dtype=dtype, seed=4)
        cache.update(*past, 0)
        kc,vc = cache.layers[0].keys.clone(),cache.layers[0].values.clone()
        x,(cos, sin) = rand(rows, 128, dtype=dtype, seed=5),angles(rows, 12, dtype)
        mask = torch.zeros(rows, 1, 1, 8, dtype=dtype, device=device)
        mask[..., 4:] = torch.finfo(dtype).min
        want,_ = m(x[:, None], (cos, sin), mask, cache)
        both = m.q_proj(x).view(rows, heads, 2*D)
        q = rope_append(both[..., :D], m.k_proj(x), m.v_proj(x), cos, sin, kc, vc, slot(3), m.q_norm.weight, m.k_norm.weight, config.rms_norm_eps, True)
        p = torch.softmax(q.view(rows, kv, 2, D) @ kc[:, :, :4].transpose(2, 3)*m.scaling, -1, dtype=torch.float32).to(dtype)
        got = m.o_proj(sigmoid_mul((p @ vc[:, :, :4]).reshape(rows, -1), both[..., D:]))
        assert error(got, want[:, 0]) < bound and error(kc, cache.layers[0].keys) < bound and torch.equal(vc, cache.layers[0].values)

# --- what does not fit

def test_says_what_does_not_fit():
    x,w = rand(2, 64),rand(64)
    q,k,(cos, sin),(kc, vc) = rand(2, 2, 32),rand(2, 1, 32),angles(2, 32, torch.bfloat16),caches(2, 1, 4, 32, torch.bfloat16)
    rope = lambda **kw: rope_append(**{**dict(q=q, k=k, v=k, cos=cos, sin=sin, k_cache=kc, v_cache=vc, slot=slot(0)), **kw})
    for f,says in ((lambda: add_rms_norm(x, w[:32], 1e-6), 'weight of shape'), (lambda: add_rms_norm(x, w, 1e-6, x[:1]), 'residual of shape'), (lambda: add_rms_norm(x, w, 1e-6, x, extra_gate=x[:, :1]), 'without extra'),
            (lambda: add_rms_norm(x, w.float(), 1e-6), 'weight in torch.float32'), (lambda: add_rms_norm(x.t(), x[:, 0], 1e-6), 'along its last axis'), (lambda: silu_mul(x, x[:, :32]), 'up of shape'),
            (lambda: sigmoid_mul(x, x[:, :32]), 'gate of shape'), (lambda: sigmoid_mul(x, rand(2, 4, 8)), 'gate of shape'),
            (lambda: rope(k=rand(2, 2, 32)), 'k of shape'), (lambda: rope(cos=cos[:1]), 'cos of shape'), (lambda: rope(sin=sin[..., :8]), 'sin of shape'), (lambda: rope(cos=cos[..., :7], sin=sin[..., :7]), 'even number'),
            (lambda: rope(slot=slot(0).int()), 'need one in int64'), (lambda: rope(slot=torch.zeros(2, dtype=torch.int64, device=device)), 'slot of 2'), (lambda: rope(q_weight=w[:32]), 'need both'),
            (lambda: rope(k_cache=kc.float()), 'k_cache in'), (lambda: rope(q=rand(2, 65)), 'size of a head')):
        with pytest.raises(ConfigError, match=says): f()
    with pytest.raises(UnsupportedError, match='float16, bfloat16 or float32'): add_rms_norm(x.double(), w.double(), 1e-6)

# --- recorded

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_one_graph_for_all_slots():
    "All kernels in one graph, behind each other: a replay reads the place of the token anew, and kernels that start early read nothing too early"
    rows,heads,kv,D,H = 2,4,2,64,256
    x,r,w,(cos, sin),at = rand(rows, H),rand(rows, H, seed=1),rand(H, seed=2),angles(rows, 32, torch.bfloat16),slot(0)
    wk = rand(D, seed=3)
    def step(kc, vc):
        n,total = add_rms_norm(x, w, 1e-6, r)
        q = rope_append(n, n[:, :kv*D], total[:, kv*D:], cos, sin, kc, vc, at, wk, wk)
        y = silu_mul(sigmoid_mul(q.view(rows, -1), n), total)
        return add_rms_norm(y, w, 1e-6, total, y, y[:, :1])
    assert heads*D == H
    (kc, vc),(ks, vs) = caches(rows, kv, 8, D, torch.bfloat16),caches(rows, kv, 8, D, torch.bfloat16)
    step(kc, vc); torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): n,total = step(ks, vs)
    for i in range(8):
        at.fill_(i); x.add_(.5); torch.cuda.synchronize()
        want = step(kc, vc)
        graph.replay(); torch.cuda.synchronize()
        assert torch.equal(n, want[0]) and torch.equal(total, want[1]) and torch.equal(kc[:, :, :i+1], ks[:, :, :i+1]) and torch.equal(vc[:, :, :i+1], vs[:, :, :i+1])
    assert kc.isfinite().all() and vc.isfinite().all()

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_cache_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 12e9: pytest.skip('needs 12 GB')
    kc = torch.zeros(1, 5, 2**21, 256, dtype=torch.bfloat16, device=device)      # the last head begins beyond 2**31 numbers
    q,k,(cos, sin) = rand(1, 5, 256),rand(1, 5, 256, seed=1),angles(1, 64, torch.bfloat16)
    rope_append(q, k, k, cos, sin, kc, kc, slot(2**21-1))
    assert torch.equal(kc[:, :, -1], k) and not kc[:, :, -2].any()

@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_second_gpu():
    other,x,w = torch.device('cuda', 1-device.index),rand(2, 64),rand(64)
    assert torch.equal(add_rms_norm(x.to(other), w.to(other), 1e-6)[0].cpu(), add_rms_norm(x, w, 1e-6)[0].cpu())

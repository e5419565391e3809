"""One step of a Gated DeltaNet layer: the kernels against transformers' own module and against float64, in the interpreter or on a GPU.

Bounds are multiples of what transformers, or the reference, is away from float64 in the same dtype."""
import os
from functools import lru_cache
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import pytest
pytest.importorskip('triton')
pytest.importorskip('transformers')
from transformers import DynamicCache
from hlwq.core import ConfigError, HLWQError, UnsupportedError
from hlwq.kernels import deltanet, layout
from hlwq.kernels.deltanet import deltanet_shape, deltanet_step, deltanet_step_ref, launch_deltanet
from kit import complete

GPU = torch.cuda.is_available()
if not GPU and not layout.INTERPRETED: pytest.skip('triton was imported without TRITON_INTERPRET before', allow_module_level=True)
device = torch.device('cuda', torch.cuda.current_device()) if GPU else torch.device('cpu')
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = dict(rows=2, n_k_heads=1, n_v_heads=2, head_k_dim=16, head_v_dim=16)

def gap(y, ref): return float((y.double() - ref.double()).norm()/ref.double().norm())
def copies(ts): return [t.clone() for t in ts]
def double(ts): return [t.double() if isinstance(t, torch.Tensor) else t for t in ts]

def case(rows, n_k_heads, n_v_heads, head_k_dim, head_v_dim, kernel_size=4, width=None, dtype=torch.float32, weight_dtype=None, state_dtype=torch.float32, biased=False, seed=0):
    "Projections of a token, states and weights, at random"
    g = torch.Generator().manual_seed(seed)
    nq, nv, weight_dtype = 2*n_k_heads*head_k_dim, n_v_heads*head_v_dim, weight_dtype or dtype
    def r(*shape, dtype=dtype): return torch.randn(*shape, generator=g).to(device, dtype)
    inputs = [r(rows, n) for n in (nq + nv, nv, n_v_heads, n_v_heads)]
    states = [r(rows, nq + nv, width or kernel_size), r(rows, n_v_heads, head_k_dim, head_v_dim, dtype=state_dtype)]
    weights = [r(*shape, dtype=weight_dtype) for shape in ((nq + nv, kernel_size), (n_v_heads,), (n_v_heads,), (head_v_dim,))]
    return inputs, states, [*weights, 1e-6, n_k_heads, r(nq + nv, dtype=weight_dtype) if biased else None]

@pytest.fixture
def poisoned(monkeypatch):
    "Memory that the step gets for its results holds NaN, so that an element it forgets shows"
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, 'empty', lambda *a, **k: empty(*a, **k).fill_(float('nan')))
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda self, *a, **k: new_empty(self, *a, **k).fill_(float('nan')))

def compared(inputs, states, weights, ours=None, **kw):
    "Runs kernels, reference and float64 from the same states, asserts that they agree, and returns the result"
    ours = copies(states) if ours is None else ours
    ref, exact = copies(states), double(copies(states))
    y, want, truth = deltanet_step(*inputs, *ours, *weights, **kw), deltanet_step_ref(*inputs, *ref, *weights), deltanet_step_ref(*double(inputs), *exact, *double(weights))
    assert y.dtype == want.dtype == inputs[0].dtype and y.shape == want.shape
    assert gap(y, truth) < 4*gap(want, truth) and gap(ours[1], exact[1]) < 4*gap(ref[1], exact[1])
    if y.dtype != torch.float32: assert gap(y, want) < .2*gap(want, truth)      # the same roundings, so closer to each other than to the truth
    if ours[1].dtype != torch.float32: assert gap(ours[1], ref[1]) < .2*gap(ref[1], exact[1])
    assert torch.equal(ours[0], ref[0])
    return y

# --- against transformers

def layer_of(kind, dtype, n_k_heads, n_v_heads, kernel_size, rows, n=5):
    "A module of transformers with random weights, and its cache after n tokens"
    if kind == 'qwen3_next': from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig as Config, Qwen3NextGatedDeltaNet as Layer
    else: from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet as Layer, Qwen3_5MoeTextConfig as Config
    config = Config(hidden_size=32, num_hidden_layers=1, layer_types=['linear_attention'], linear_num_key_heads=n_k_heads, linear_num_value_heads=n_v_heads, linear_key_head_dim=16,
        linear_value_head_dim=24, linear_conv_kernel_dim=kernel_size, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    layer, g = Layer(config, 0).requires_grad_(False), torch.Generator().manual_seed(1)
    for name,p in layer.named_parameters(): p.copy_(torch.randn(p.shape, generator=g)*(.3 if p.ndim > 1 else .5) + (name == 'norm.weight'))
    layer, cache = layer.to(device, dtype), DynamicCache(config=config)
    x = torch.randn(rows, n + 6, 32, generator=g).to(device, dtype)
    layer(x[:, :n], cache)
    return layer, cache, x[:, n:].unbind(1)

def inputs_of(kind, layer, x):
    "What the projections make of hidden states (rows, hidden)"
    if kind != 'qwen3_next': return [p(x[:, None])[:, 0] for p in (layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_b, layer.in_proj_a)]
    q, k, v, z, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x[:, None]), layer.in_proj_ba(x[:, None]))
    return [torch.cat([o.flatten(1) for o in (q, k, v)], 1), z.flatten(1), b.flatten(1), a.flatten(1)]

@lru_cache(maxsize=None)
def rounds_lengths():
    "Whether this version of transformers rounds queries and keys on their way to length 1, as 5.16 does and 5.20 does not"
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_recurrent_gated_delta_rule as rule
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2, 16, generator=g).bfloat16() for _ in range(3))
    a, b = (rule(*(o.to(dtype) for o in (q, k, v)), g=torch.zeros(1, 1, 2), beta=torch.ones(1, 1, 2), initial_state=None, output_final_state=True, use_qk_l2norm_in_kernel=True)[1] for dtype in (torch.bfloat16, torch.float32))
    return gap(a, b) > 1e-4

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@pytest.mark.parametrize('kind,n_k_heads,n_v_heads,kernel_size,rows', [('qwen3_5_moe', 2, 2, 4, 1), ('qwen3_5_moe', 1, 2, 3, 2), ('qwen3_5_moe', 1, 4, 4, 3), ('qwen3_5_moe', 3, 6, 2, 1), ('qwen3_next', 2, 4, 4, 2)])
def test_like_transformers(kind, n_k_heads, n_v_heads, kernel_size, rows, dtype, poisoned):
    layer, cache, xs = layer_of(kind, dtype, n_k_heads, n_v_heads, kernel_size, rows)
    l = cache.layers[0]
    assert l.conv_states[0].shape[-1] == kernel_size and l.recurrent_states[0].dtype == torch.float32
    ours = copies((l.conv_states[0], l.recurrent_states[0]))
    exact, normed, seen = double(ours), [], []
    weights = layer.conv1d.weight.squeeze(1), layer.A_log, layer.dt_bias, layer.norm.weight, layer.layer_norm_epsilon, n_k_heads
    layer.out_proj.register_forward_pre_hook(lambda m, args: normed.append(args[0][:, 0]))
    for t,x in enumerate(xs):
        inputs = inputs_of(kind, layer, x)
        y, truth = deltanet_step(*inputs, *ours, *weights, settled=t % 2 == 1), deltanet_step_ref(*double(inputs), *exact, *double(weights))
        layer(x[:, None], cache)
        seen.append((y, truth, *copies((ours[1], exact[1], l.recurrent_states[0]))))
        assert torch.equal(ours[0], l.conv_states[0])
    y, truth, state, exact_state, their_state = (torch.stack(o) for o in zip(*seen))      # all tokens at once: where terms cancel, the error of a single one is a matter of luck
    theirs = torch.stack(normed)
    assert gap(y, truth) < 4*gap(theirs, truth) and gap(state, exact_state) < 4*gap(their_state, exact_state)
    if dtype != torch.float32 and not rounds_lengths(): assert gap(y, theirs) < .2*gap(theirs, truth) and gap(state, their_state) < .2*gap(their_state, exact_state)

# --- sizes, dtypes, strides

@pytest.mark.parametrize('dtype', DTYPES)
def test_sizes(dtype, poisoned):
    for i,(rows,hk,hv,dk,dv,ks) in enumerate(((1, 1, 2, 128, 128, 4), (2, 1, 1, 64, 64, 4), (1, 1, 1, 256, 256, 3), (3, 2, 8, 12, 40, 2), (2, 3, 3, 33, 7, 4), (1, 1, 4, 256, 24, 4), (2, 1, 2, 8, 130, 3))):
        compared(*case(rows, hk, hv, dk, dv, ks, dtype=dtype, seed=i))

@pytest.mark.parametrize('ks', (2, 3, 4))
def test_both_widths_of_the_cache(ks, poisoned):
    a, b = (case(**SIZES, kernel_size=ks, width=w, seed=3) for w in (ks, ks - 1))
    b[1][0][:], b[1][1][:] = a[1][0][..., 1:], a[1][1]
    ours = copies(a[1]), copies(b[1])
    y, z = (compared(a[0], s, a[2], o) for s,o in zip((a[1], b[1]), ours))
    assert torch.equal(y, z) and torch.equal(ours[0][0][..., 1:], ours[1][0]) and torch.equal(ours[0][0][..., -1], a[0][0])

@pytest.mark.parametrize('dtypes', [dict(dtype=torch.bfloat16, weight_dtype=torch.float32), dict(dtype=torch.float32, weight_dtype=torch.bfloat16), dict(dtype=torch.bfloat16, state_dtype=torch.bfloat16),
    dict(dtype=torch.float16, state_dtype=torch.float16), dict(dtype=torch.float16, weight_dtype=torch.bfloat16)])
def test_mixed_dtypes(dtypes, poisoned):
    for biased in (False, True): compared(*case(**SIZES, biased=biased, **dtypes))

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_parts_of_wider_memory(dtype, poisoned):
    "Inputs are columns of one matrix, states lie between other things; all around is NaN and stays so"
    inputs, states, weights = case(3, 2, 4, 16, 24, dtype=dtype)
    plain = copies(states)
    want = deltanet_step(*inputs, *plain, *weights)
    widths = [t.shape[1] for t in inputs]
    wide = torch.full((3, sum(widths) + 15), float('nan'), device=device, dtype=dtype)
    cut = wide[:, 3:3 + sum(widths)].split(widths, 1)
    for c,t in zip(cut, inputs): c.copy_(t)
    _, C, W = states[0].shape
    conv = torch.full((5, C + 3, W + 1), float('nan'), device=device, dtype=dtype)
    state = torch.full((5, *states[1].shape[1:]), float('nan'), device=device)
    parts = conv[1:-1, :C, 1:], state[1:-1]
    for p,t in zip(parts, states): p.copy_(t)
    assert torch.equal(deltanet_step(*cut, *parts, *weights), want)
    for p,t in zip(parts, plain): assert torch.equal(p, t)
    for whole,p in ((conv, parts[0]), (state, parts[1]), (wide, wide[:, 3:3 + sum(widths)])):
        p.fill_(float('nan'))
        assert whole.isnan().all()

def test_heads_and_rows_keep_to_themselves():
    inputs, states, weights = case(3, 2, 4, 16, 24)
    ours = copies(states)
    y = deltanet_step(*inputs, *ours, *weights)
    for i in range(3):
        one = [t[i:i+1].clone() for t in states]
        assert torch.equal(deltanet_step(*(t[i:i+1] for t in inputs), *one, *weights), y[i:i+1])
        assert all(torch.equal(a, b[i:i+1]) for a,b in zip(one, ours))
    inputs[0][1, 2*2*16 + 2*24] = float('nan')                  # a value of row 1, head 2
    broken = copies(states)
    z = deltanet_step(*inputs, *broken, *weights)
    bad = torch.zeros(3, 4, dtype=torch.bool, device=device)
    bad[1, 2] = True
    assert torch.equal(z.view(3, 4, 24).isnan().all(-1), bad) and torch.equal(z.view(3, 4, 24)[~bad], y.view(3, 4, 24)[~bad])
    assert torch.equal(broken[1].isnan().any(-1).any(-1), bad) and torch.equal(broken[1][~bad], ours[1][~bad])
    inputs[0][0, 3] = float('nan')                              # a query of row 0: its value heads, but no memory
    z = deltanet_step(*inputs, *states, *weights)
    assert z.view(3, 4, 24).isnan().all(-1)[0].tolist() == [True, True, False, False] and states[1][0].isfinite().all()

# --- numbers

@pytest.mark.filterwarnings('ignore:overflow:RuntimeWarning')     # the interpreter's numpy says so; infinity is right there
def test_extreme_gates_and_empty_heads(poisoned):
    inputs, states, weights = case(2, 1, 4, 16, 16)
    inputs[3][:] = torch.tensor([[-90., -20., 30., 90.], [-1e4, 1e4, 0, -5]])
    inputs[2][:] = torch.tensor([[-90., -20., 30., 90.], [90., -1e4, 1e4, 0]])
    compared(inputs, states, weights)
    inputs[0].zero_(); states[0].zero_()                        # queries, keys and values of length 0
    ours = copies(states)
    assert (deltanet_step(*inputs, *ours, *weights) == 0).all() and ours[1].isfinite().all()
    states[1].zero_()
    inputs, _, _ = case(2, 1, 4, 16, 16, seed=1)
    compared(inputs, states, weights)                           # the first token of all

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_drift(dtype):
    "Forty tokens, heads that forget slowly: the distance from float64 does not grow faster than the reference's"
    _, states, weights = case(1, 1, 2, 32, 32, dtype=dtype)
    weights[1][:] = torch.tensor([-4., 1.])
    ours, ref, exact = copies(states), copies(states), double(copies(states))
    for t in range(40):
        inputs, _, _ = case(1, 1, 2, 32, 32, dtype=dtype, seed=t + 1)
        y, want, truth = deltanet_step(*inputs, *ours, *weights), deltanet_step_ref(*inputs, *ref, *weights), deltanet_step_ref(*double(inputs), *exact, *double(weights))
    assert torch.equal(ours[0], ref[0])
    assert gap(ours[1], exact[1]) < 2*gap(ref[1], exact[1]) + 4*torch.finfo(torch.float32).eps and gap(y, truth) < 4*gap(want, truth)
    if dtype != torch.float32: assert gap(ours[1], ref[1]) < .1*gap(ref[1], exact[1])

# --- what does not fit

def test_errors():
    good = case(**SIZES)
    def fails(kind, change, **sizes):
        inputs, states, weights = (list(o) for o in (case(**{**SIZES, **sizes}) if sizes else good))
        change(inputs, states, weights)
        kept = copies(states)
        with pytest.raises(HLWQError) as e: deltanet_step(*inputs, *states, *weights)
        assert type(e.value) is kind and complete(e.value), e.value
        assert all(torch.equal(a, b) for a,b in zip(kept, states))
    def put(which, i, f):
        def change(*groups): groups[which][i] = f(groups[which][i])
        return change
    for i in range(4): fails(ConfigError, put(0, i, lambda t: t[:, :-1]))
    for i in range(4): fails(ConfigError, put(0, i, lambda t: t[:1]))
    for i in range(4): fails(ConfigError, put(2, i, lambda t: t[:-1]))
    fails(ConfigError, put(0, 1, lambda t: t.bfloat16()))
    fails(ConfigError, put(1, 0, lambda t: t[:, :, :2]))
    fails(ConfigError, put(1, 0, lambda t: t[:, :-1]))
    fails(ConfigError, put(1, 1, lambda t: t[:, :1]))
    fails(ConfigError, put(1, 1, lambda t: t[0]))
    fails(ConfigError, put(2, 0, lambda t: t.flatten()))
    fails(ConfigError, put(2, 5, lambda n: 0))
    fails(ConfigError, put(2, 5, lambda n: 4))
    fails(ConfigError, put(2, 6, lambda n: torch.zeros(3, device=device)))
    fails(UnsupportedError, lambda *a: None, kernel_size=5)
    fails(UnsupportedError, lambda *a: None, head_v_dim=272)
    fails(UnsupportedError, put(0, 0, lambda t: t.t().contiguous().t()))
    fails(UnsupportedError, put(0, 3, lambda t: torch.stack([t, t], -1)[..., 0]))
    fails(UnsupportedError, put(1, 0, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)))
    fails(UnsupportedError, put(1, 0, lambda t: t[:1].expand(2, -1, -1)))
    fails(UnsupportedError, put(1, 1, lambda t: t[:1].expand(2, -1, -1, -1)))
    fails(UnsupportedError, put(1, 1, lambda t: t.transpose(2, 3)))
    fails(UnsupportedError, put(2, 3, lambda t: torch.stack([t, t], -1)[..., 0]))
    fails(UnsupportedError, put(1, 1, lambda t: t.double()))
    fails(ConfigError, put(2, 1, lambda t: t.to('meta')))

def test_no_rows():
    inputs, states, weights = case(**{**SIZES, 'rows':0})
    y = deltanet_step(*inputs, *states, *weights)
    assert y.shape == (0, 32) and y.dtype == torch.float32

def test_wrong_results_are_found_out(monkeypatch):
    inputs, states, weights = case(**SIZES, dtype=torch.bfloat16)
    monkeypatch.setattr(deltanet, 'CHECKED', set())
    good = launch_deltanet
    for which in (0, 4, 5):                                    # out is given last but one; states before
        def broken(*args):
            good(*args)
            (args[13] if which == 0 else args[which]).mul_(1.2)
        monkeypatch.setattr(deltanet, 'launch_deltanet', broken)
        with pytest.raises(UnsupportedError, match='from the reference'): deltanet_step(*inputs, *copies(states), *weights)
        assert not deltanet.CHECKED
    monkeypatch.setattr(deltanet, 'launch_deltanet', good)
    deltanet_step(*inputs, *states, *weights)
    assert len(deltanet.CHECKED) == 1

def test_every_shape():
    inputs, states, weights = case(1, 1, 2, 32, 40)
    for dk in (4, 16, 64, 96, 128, 256):
        for dv in (4, 16, 64, 96, 128, 256):
            bv, warps = deltanet_shape(dk, dv)
            assert bv & (bv - 1) == 0 and warps in (1, 2, 4, 8, 16) and bv*dk <= 16384 and -(-dv//bv) <= 8
    want = deltanet_step(*inputs, *copies(states), *weights)
    for shape in ((64, 1), (32, 2), (16, 4), (8, 1)):
        out = torch.full_like(want, float('nan'))
        launch_deltanet(*inputs, *copies(states), *weights, out, shape=shape)
        assert gap(out, want) < 1e-6

# --- on a GPU

@pytest.mark.skipif(not GPU, reason='needs a CUDA device')
@pytest.mark.parametrize('settled', (False, True))
def test_in_a_graph(settled):
    "A recorded step, between other kernels, gives what steps one by one give"
    inputs, states, weights = case(2, 16, 32, 128, 128, dtype=torch.bfloat16)
    steps = [case(2, 16, 32, 128, 128, dtype=torch.bfloat16, seed=t + 1)[0] for t in range(5)]
    one = copies(states)
    want = [deltanet_step(*i, *one, *weights) for i in steps]
    held, kept = copies(inputs), copies(states)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = [t*2 for t in held]                           # what comes just before is no projection of ours
        halved = [t*.5 for t in doubled]
        out = deltanet_step(*halved, *kept, *weights, settled=settled)*1
    for i,y in zip(steps, want):
        for h,t in zip(held, i): h.copy_(t)
        graph.replay()
        assert torch.equal(out, y)
    assert all(torch.equal(a, b) for a,b in zip(kept, one))

@pytest.mark.skipif(not GPU, reason='needs a CUDA device')
def test_states_written_just_before():
    "Without settled, states may come from the kernel that ran last; the second kernel reads its state early all the same"
    for i in range(20):
        inputs, states, weights = case(1, 16, 32, 128, 128, dtype=torch.bfloat16, seed=i)
        want = deltanet_step(*inputs, *copies(states), *weights)
        fresh = [torch.zeros_like(t) for t in states]
        torch.cuda.synchronize()
        for f,t in zip(fresh, states): f.copy_(t)
        assert torch.equal(deltanet_step(*inputs, *fresh, *weights), want)

"""A whole prompt through a Gated DeltaNet layer: the kernels against transformers' own module and against float64, in the interpreter or on a GPU.

Bounds are multiples of what transformers, or the reference, is away from float64 in the same dtype."""
import os
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import pytest
pytest.importorskip('triton')
pytest.importorskip('transformers')
from transformers import DynamicCache
from hlwq.core import ConfigError, HLWQError, UnsupportedError
from hlwq.kernels import deltanet_prompt as module, layout
from hlwq.kernels.deltanet import deltanet_step, deltanet_step_ref
from hlwq.kernels.deltanet_prompt import deltanet_prompt, deltanet_prompt_ref, launch_deltanet_prompt, scan_shape
from kit import complete
from test_deltanet import rounds_lengths

GPU = torch.cuda.is_available()
if not GPU and not layout.INTERPRETED: pytest.skip('triton was imported without TRITON_INTERPRET before', allow_module_level=True)
device = torch.device('cuda', torch.cuda.current_device()) if GPU else torch.device('cpu')
SIZES = dict(rows=2, T=5, n_k_heads=1, n_v_heads=2, head_k_dim=16, head_v_dim=16)

@pytest.fixture(autouse=True)
def only_what_is_served(request):
    "On an H100 the scan kernel faulted with heads of 16 in bfloat16 while heads of 128 ran; until that is understood a GPU gets the latter only"
    if GPU and not request.node.name.startswith(('test_the_size', 'test_in_a_graph')): pytest.skip('not served on a GPU')

def gap(y, ref): return float((y.double() - ref.double()).norm()/ref.double().norm())
def copies(ts): return [t.clone() for t in ts]
def double(ts): return [t.double() if isinstance(t, torch.Tensor) else t for t in ts]
def poison(ts): return [torch.full_like(t, float('nan')) for t in ts]

def case(rows, T, n_k_heads, n_v_heads, head_k_dim, head_v_dim, kernel_size=4, width=None, dtype=torch.float32, weight_dtype=None, state_dtype=torch.float32, biased=False, seed=0):
    "Projections of tokens, states and weights, at random"
    g = torch.Generator().manual_seed(seed)
    nq, nv, weight_dtype = 2*n_k_heads*head_k_dim, n_v_heads*head_v_dim, weight_dtype or dtype
    def r(*shape, dtype=dtype): return torch.randn(*shape, generator=g).to(device, dtype)
    inputs = [r(rows, T, n) for n in (nq + nv, nv, n_v_heads, n_v_heads)]
    states = [r(rows, nq + nv, width or kernel_size), r(rows, n_v_heads, head_k_dim, head_v_dim, dtype=state_dtype)]
    weights = [r(*shape, dtype=weight_dtype) for shape in ((nq + nv, kernel_size), (n_v_heads,), (n_v_heads,), (head_v_dim,))]
    return inputs, states, [*weights, 1e-6, n_k_heads, r(nq + nv, dtype=weight_dtype) if biased else None]

@pytest.fixture
def poisoned(monkeypatch):
    "Memory that the kernels get for their results holds NaN, so that an element they forget shows; and nothing is tried out beforehand"
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, 'empty', lambda *a, **k: empty(*a, **k).fill_(float('nan')))
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda self, *a, **k: new_empty(self, *a, **k).fill_(float('nan')))
    monkeypatch.setattr(module, '_trial', lambda *a: None)

def agree(y, want, truth, ours, ref, exact):
    "Asserts that outputs and states of the kernels are where those of the reference are"
    assert y.dtype == want.dtype and y.shape == want.shape
    assert gap(y, truth) < 4*gap(want, truth) and gap(ours[1], exact[1]) < 4*gap(ref[1], exact[1])
    if y.dtype != torch.float32: assert gap(y, want) < .2*gap(want, truth) and gap(ours[1], ref[1]) < .2*gap(ref[1], exact[1])      # the same roundings
    assert torch.equal(ours[0], ref[0])

def compared(inputs, states, weights, fresh=False):
    "Runs kernels, reference and float64 from the same states, asserts that they agree, and returns result and states"
    ours, ref, exact = poison(states) if fresh else copies(states), copies(states), double(copies(states))
    y, want = deltanet_prompt(*inputs, *ours, *weights, fresh=fresh), deltanet_prompt_ref(*inputs, *ref, *weights, fresh=fresh)
    agree(y, want, deltanet_prompt_ref(*double(inputs), *exact, *double(weights), fresh=fresh), ours, ref, exact)
    return y, ours

# --- against transformers

def layer_of(kind, dtype, n_k_heads, n_v_heads, kernel_size):
    "A module of transformers with random weights, and its cache"
    if kind == 'qwen3_next': from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig as Config, Qwen3NextGatedDeltaNet as Layer
    else: from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet as Layer, Qwen3_5MoeTextConfig as Config
    config = Config(hidden_size=32, num_hidden_layers=1, layer_types=['linear_attention'], linear_num_key_heads=n_k_heads, linear_num_value_heads=n_v_heads, linear_key_head_dim=16,
        linear_value_head_dim=24, linear_conv_kernel_dim=kernel_size, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    layer, g = Layer(config, 0).requires_grad_(False), torch.Generator().manual_seed(1)
    for name,p in layer.named_parameters(): p.copy_(torch.randn(p.shape, generator=g)*(.3 if p.ndim > 1 else .5) + (name == 'norm.weight'))
    return layer.to(device, dtype), DynamicCache(config=config)

def inputs_of(kind, layer, x):
    "What the projections make of hidden states (rows, T, hidden)"
    if kind != 'qwen3_next': return [p(x) for p in (layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_b, layer.in_proj_a)]
    q, k, v, z, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
    return [torch.cat([o.flatten(2) for o in (q, k, v)], 2), z.flatten(2), b.flatten(2), a.flatten(2)]

def follow(kind, dtype, n_k_heads, n_v_heads, kernel_size, rows, parts):
    "Gives a prompt in parts to a module, to the kernels and to the reference in float64, and compares outputs of the module and both states"
    layer, cache = layer_of(kind, dtype, n_k_heads, n_v_heads, kernel_size)
    weights = layer.conv1d.weight.squeeze(1), layer.A_log, layer.dt_bias, layer.norm.weight, layer.layer_norm_epsilon, n_k_heads
    channels, x = layer.conv1d.weight.shape[0], torch.randn(rows, sum(parts), 32, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    ours = poison((torch.empty(rows, channels, kernel_size, device=device, dtype=dtype), torch.empty(rows, n_v_heads, 16, 24, device=device)))
    exact, outs, truths, theirs = double(ours), [], [], []
    for i,h in enumerate(x.split(parts, 1)):
        inputs, fresh = inputs_of(kind, layer, h), i == 0
        one = fresh or h.shape[1] > 1
        y = deltanet_prompt(*inputs, *ours, *weights, fresh=fresh) if one else deltanet_step(*(t[:, 0] for t in inputs), *ours, *weights)[:, None]
        outs.append(layer.out_proj(y))
        truths.append(deltanet_prompt_ref(*double(inputs), *exact, *double(weights), fresh=fresh) @ layer.out_proj.weight.double().T)
        theirs.append(layer(h, cache))
        l = cache.layers[0]
        assert torch.equal(ours[0], l.conv_states[0])
    y, theirs, truth, state = torch.cat(outs, 1), torch.cat(theirs, 1), torch.cat(truths, 1), l.recurrent_states[0]
    assert gap(y, truth) < 4*gap(theirs, truth) and gap(ours[1], exact[1]) < 4*gap(state, exact[1])
    if dtype != torch.float32 and not rounds_lengths(): assert gap(y, theirs) < .3*gap(theirs, truth) and gap(ours[1], state) < .2*gap(state, exact[1])

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@pytest.mark.parametrize('T', (1, 3, 63, 64, 65, 130))
def test_like_transformers(T, dtype, poisoned): follow('qwen3_5_moe', dtype, 1, 2, 4, 2 if T < 9 else 1, [T])

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@pytest.mark.parametrize('kind,n_k_heads,n_v_heads,kernel_size,rows', [('qwen3_5_moe', 2, 2, 3, 1), ('qwen3_next', 1, 2, 4, 1)])
def test_in_parts_and_then_one_by_one(kind, n_k_heads, n_v_heads, kernel_size, rows, dtype, poisoned):
    follow(kind, dtype, n_k_heads, n_v_heads, kernel_size, rows, [2, 65, 1, 2])

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_parts_and_whole(dtype, poisoned):
    "A prompt at once, in parts, and token by token through deltanet_step end in the same states"
    inputs, states, weights = case(1, 75, 1, 2, 16, 24, dtype=dtype)
    y, ours = compared(inputs, states, weights)
    ref, exact = copies(states), double(copies(states))
    want, truth = deltanet_prompt_ref(*inputs, *ref, *weights), deltanet_prompt_ref(*double(inputs), *exact, *double(weights))
    for sizes in ([2, 1, 72],) if dtype == torch.bfloat16 else ([2, 1, 72], [70, 5]):
        kept = copies(states)
        agree(torch.cat([deltanet_prompt(*part, *kept, *weights) for part in zip(*(t.split(sizes, 1) for t in inputs))], 1), want, truth, kept, ref, exact)
    for t in range(3):                                          # what follows goes on from any of them
        x = case(1, 1, 1, 2, 16, 24, dtype=dtype, seed=t + 1)[0]
        outs = [f(*(double(o[:, 0]) if s is exact else o[:, 0] for o in x), *s, *(double(weights) if s is exact else weights)) for f,s in ((deltanet_step, ours), (deltanet_step_ref, ref))]
        truth = deltanet_step_ref(*(o[:, 0].double() for o in x), *exact, *double(weights))
        assert gap(outs[0], truth) < 4*gap(outs[1], truth) and gap(ours[1], exact[1]) < 4*gap(ref[1], exact[1])

# --- sizes, dtypes, strides

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float16))
def test_sizes(dtype, poisoned):
    for i,(rows,T,hk,hv,dk,dv,ks) in enumerate(((1, 66, 1, 1, 128, 128, 4), (2, 7, 1, 4, 12, 40, 2), (1, 65, 2, 2, 33, 7, 4), (1, 4, 1, 1, 256, 256, 3), (1, 33, 1, 2, 64, 24, 5))):
        compared(*case(rows, T, hk, hv, dk, dv, ks, dtype=dtype, seed=i), fresh=i % 2 == 0)

@pytest.mark.parametrize('ks', (2, 3, 4))
def test_both_widths_of_the_cache(ks, poisoned):
    for T in (1, 3, 5):
        a, b = (case(**{**SIZES, 'T':T}, kernel_size=ks, width=w, seed=3) for w in (ks, ks - 1))
        b[0][:], b[2][:] = a[0], a[2]
        b[1][0][:], b[1][1][:] = a[1][0][..., 1:], a[1][1]
        (y, ours), (z, theirs) = compared(*a), compared(*b)
        assert torch.equal(y, z) and torch.equal(ours[0][..., 1:], theirs[0])

@pytest.mark.parametrize('dtypes', [dict(dtype=torch.bfloat16, weight_dtype=torch.float32), dict(dtype=torch.float32, weight_dtype=torch.bfloat16), dict(dtype=torch.float16, weight_dtype=torch.bfloat16)])
def test_mixed_dtypes(dtypes, poisoned):
    for biased in (False, True): compared(*case(**SIZES, biased=biased, **dtypes))

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_parts_of_wider_memory(dtype, poisoned):
    "Inputs are columns of one matrix, states lie between other things; all around is NaN and stays so"
    inputs, states, weights = case(2, 33, 1, 2, 16, 24, dtype=dtype)
    want, plain = compared(inputs, states, weights)
    widths = [t.shape[2] for t in inputs]
    wide = torch.full((2, 36, sum(widths) + 15), float('nan'), device=device, dtype=dtype)
    cut = wide[:, 2:-1, 3:3 + sum(widths)].split(widths, 2)
    for c,t in zip(cut, inputs): c.copy_(t)
    _, C, W = states[0].shape
    conv = torch.full((4, C + 3, W + 1), float('nan'), device=device, dtype=dtype)
    state = torch.full((4, *states[1].shape[1:]), float('nan'), device=device)
    parts = conv[1:-1, :C, 1:], state[1:-1]
    for p,t in zip(parts, states): p.copy_(t)
    assert torch.equal(deltanet_prompt(*cut, *parts, *weights), want)
    for p,t in zip(parts, plain): assert torch.equal(p, t)
    for whole,p in ((conv, parts[0]), (state, parts[1]), (wide, wide[:, 2:-1, 3:3 + sum(widths)])):
        p.fill_(float('nan'))
        assert whole.isnan().all()

def test_heads_rows_and_time_keep_to_themselves(poisoned):
    inputs, states, weights = case(2, 70, 1, 4, 16, 24)
    ours = copies(states)
    y = deltanet_prompt(*inputs, *ours, *weights)
    for i in range(2):
        one = [t[i:i+1].clone() for t in states]
        assert torch.equal(deltanet_prompt(*(t[i:i+1] for t in inputs), *one, *weights), y[i:i+1])
        assert all(torch.equal(a, b[i:i+1]) for a,b in zip(one, ours))
    inputs[0][1, 66, 2*16 + 2*24] = float('nan')              # a value of row 1, head 2, in the second chunk
    broken = copies(states)
    z = deltanet_prompt(*inputs, *broken, *weights).view(2, 70, 4, 24)
    bad = torch.zeros(2, 70, 4, dtype=torch.bool, device=device)
    bad[1, 66:, 2] = True
    assert torch.equal(z.isnan().any(-1)[:, :64], bad[:, :64]) and torch.equal(z[:, :64], y.view(2, 70, 4, 24)[:, :64])       # nothing goes back to an earlier chunk
    heads = torch.tensor([h for h in range(4) if h != 2], device=device)
    assert torch.equal(z[:, :, heads], y.view(2, 70, 4, 24)[:, :, heads]) and z[1, 66:, 2].isnan().any(-1).all()
    assert broken[1].isnan().any(-1).any(-1).nonzero().tolist() == [[1, 2]]

# --- numbers

@pytest.mark.filterwarnings('ignore:overflow:RuntimeWarning')     # the interpreter's numpy says so; infinity is right there
def test_extreme_gates_and_empty_heads(poisoned):
    inputs, states, weights = case(2, 66, 1, 4, 16, 16)
    inputs[3][:] = torch.tensor([[-90., -20., 30., 90.], [-1e4, 1e4, 0, -5]], device=device)[:, None]
    inputs[2][:] = torch.tensor([[-90., -20., 30., 90.], [90., -1e4, 1e4, 0]], device=device)[:, None]
    inputs[3][0, 20] = 1e4                                      # one token forgets everything; the decays of its neighbours keep their digits
    compared(inputs, states, weights)
    inputs[0].zero_(); states[0].zero_()                        # queries, keys and values of length 0
    ours = copies(states)
    assert (deltanet_prompt(*inputs, *ours, *weights) == 0).all() and ours[1].isfinite().all()

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_one_token_over_and_over(dtype, poisoned):
    "Equal keys that are corrected in full and never forgotten: the worst there is for the inverse"
    inputs, states, weights = case(1, 128, 1, 2, 16, 16, dtype=dtype)
    for t in inputs[:1]: t[:] = t[:, :1]
    inputs[2].fill_(6.); inputs[3].fill_(-20.)
    compared(inputs, states, weights)

# --- what does not fit

def test_errors():
    good = case(**SIZES)
    def fails(kind, change, **sizes):
        inputs, states, weights = (list(o) for o in (case(**{**SIZES, **sizes}) if sizes else good))
        change(inputs, states, weights)
        kept = copies(states)
        with pytest.raises(HLWQError) as e: deltanet_prompt(*inputs, *states, *weights)
        assert type(e.value) is kind and complete(e.value), e.value
        assert all(torch.equal(a, b) for a,b in zip(kept, states))
    def put(which, i, f):
        def change(*groups): groups[which][i] = f(groups[which][i])
        return change
    for i in range(4): fails(ConfigError, put(0, i, lambda t: t[..., :-1]))
    for i in range(4): fails(ConfigError, put(0, i, lambda t: t[:1]))
    for i in range(4): fails(ConfigError, put(0, i, lambda t: t[:, :0]))
    for i in range(4): fails(ConfigError, put(2, i, lambda t: t[:-1]))
    fails(ConfigError, put(0, 0, lambda t: t[:, 0]))
    fails(ConfigError, put(0, 1, lambda t: t.bfloat16()))
    fails(ConfigError, put(1, 0, lambda t: t[:, :, :2]))
    fails(ConfigError, put(1, 0, lambda t: t[:, :-1]))
    fails(ConfigError, put(1, 1, lambda t: t[:, :1]))
    fails(ConfigError, put(1, 1, lambda t: t[0]))
    fails(ConfigError, put(2, 0, lambda t: t.flatten()))
    fails(ConfigError, put(2, 5, lambda n: 0))
    fails(ConfigError, put(2, 5, lambda n: 4))
    fails(ConfigError, put(2, 6, lambda n: torch.zeros(3, device=device)))
    fails(UnsupportedError, lambda *a: None, kernel_size=9)
    fails(UnsupportedError, lambda *a: None, head_v_dim=272)
    fails(UnsupportedError, put(0, 0, lambda t: t.mT.contiguous().mT))
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
    assert deltanet_prompt(*inputs, *states, *weights).shape == (0, 5, 32)

def test_wrong_results_are_found_out(monkeypatch):
    inputs, states, weights = case(**SIZES, dtype=torch.bfloat16)
    monkeypatch.setattr(module, 'CHECKED', set())
    good = launch_deltanet_prompt
    for which in (-1, 4, 5):                                    # out is given last; states in the middle
        def broken(*args):
            good(*args)
            args[which].mul_(1.2)
        monkeypatch.setattr(module, 'launch_deltanet_prompt', broken)
        kept = copies(states)
        with pytest.raises(UnsupportedError, match='from the reference'): deltanet_prompt(*inputs, *kept, *weights)
        assert not module.CHECKED and all(torch.equal(a, b) for a,b in zip(kept, states))
    monkeypatch.setattr(module, 'launch_deltanet_prompt', good)
    deltanet_prompt(*inputs, *states, *weights)
    assert len(module.CHECKED) == 1

def test_every_shape():
    assert scan_shape(128, 128) == (32, 4, 2) and scan_shape(128, 128, shared=101376) == scan_shape(128, 128, split16=False) == (32, 4, 1)                    # one row of Qwen3.6-35B-A3B on an H100: 128 programs
    inputs, states, weights = case(1, 66, 1, 2, 32, 40)
    want, kept = torch.empty_like(inputs[1]), copies(states)
    launch_deltanet_prompt(*inputs, *kept, *weights, False, want)
    for columns in (16, 32, 64):
        out, ours = torch.full_like(want, float('nan')), copies(states)
        launch_deltanet_prompt(*inputs, *ours, *weights, False, out, shape=(columns, 4, 1))
        assert gap(out, want) < 1e-6 and gap(ours[1], kept[1]) < 1e-6

# --- on a GPU

@pytest.mark.skipif(not GPU, reason='needs a CUDA device')
def test_in_a_graph():
    "A recorded prompt, between other kernels, gives what a call gives"
    inputs, states, weights = case(1, 200, 16, 32, 128, 128, dtype=torch.bfloat16)
    one = copies(states)
    want = deltanet_prompt(*inputs, *one, *weights)
    held, kept = [torch.zeros_like(t) for t in inputs], copies(states)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = deltanet_prompt(*[t*.5 for t in [t*2 for t in held]], *kept, *weights)*1
    for h,t in zip(held, inputs): h.copy_(t)
    for k,t in zip(kept, states): k.copy_(t)
    graph.replay()
    assert torch.equal(out, want) and all(torch.equal(a, b) for a,b in zip(kept, one))

@pytest.mark.skipif(not GPU, reason='needs a CUDA device')
@pytest.mark.parametrize('T', (1, 63, 64, 65, 200))
@pytest.mark.parametrize('rows', (1, 8))
def test_the_size_of_a_real_model(rows, T):
    compared(*case(rows, T, 16, 32, 128, 128, dtype=torch.bfloat16))

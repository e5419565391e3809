"The decode step of few launches against that of transformers, and joined weights; in the interpreter on a CPU, for real where there is a GPU"
import copy,os,warnings
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import pytest
pytest.importorskip('triton')
pytest.importorskip('transformers')
from torch import nn
from hlwq.buffers import Buffers
from hlwq import linear as linear_module, step as step_module
from hlwq.core import ConfigError,UnsupportedError
from hlwq.generate import HLWQGenerator,addresses
from hlwq.kernels import layout
from hlwq.linear import HLWQLinear
from hlwq.quantize import quantize
from hlwq.sampling import Sampling
from hlwq.step import DecodeStep,Joined
from test_generate import TINY,model_of,prompt

GPU = torch.cuda.is_available()
if not GPU and not layout.INTERPRETED: pytest.skip('triton was imported without TRITON_INTERPRET before', allow_module_level=True)
device = torch.device('cuda', torch.cuda.current_device()) if GPU else torch.device('cpu')
KINDS = ('llama', 'mistral', 'qwen2', 'qwen3', 'mixtral', 'qwen2_moe', 'qwen3_moe', 'qwen3_5_text', 'qwen3_5_moe_text', 'qwen3_5_moe')

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        n = torch.get_num_threads(); torch.set_num_threads(1)
        yield
        torch.set_num_threads(n)

@pytest.fixture
def as_gpu(monkeypatch):
    "Where there is no GPU, the CPU passes for one with kernels"
    if not GPU: monkeypatch.setattr(linear_module, 'why_no_triton', lambda device: '')

def generator(model):
    g = HLWQGenerator(model)
    g.how,g.eos,g.pad = Sampling(),(),0
    return g

def prepared(g, ids, real):
    "Buffers after the prompt"
    b = Buffers(g.model, len(ids), 64)
    b.fused,b.ends[()] = False,torch.tensor([], dtype=torch.int64, device=device)
    b.fill(ids, real, 0)
    g._choose(b, g._prefill(b, ids, real, 0))
    return b

@torch.no_grad()
def both_ways(model, ids, real, steps=3):
    "Logits of some steps by transformers and by ours, which get the same tokens"
    g = generator(model)
    a,b = prepared(g, ids, real),prepared(g, ids, real)
    step,res = DecodeStep(model),[]
    step.bind(b)
    for i in range(steps):
        a.show(a.width_for(ids.shape[1]+i+1)); a.visible.index_fill_(3, a.slot, True)
        want,got = g._logits(a, a.token, a.position, a.visible[..., :a.width]),step(b)
        for o in (a, b):
            o.position.add_(1); o.slot.add_(1)
            g._choose(o, want)
        res.append((want, got))
    return res,a,b

def error(y, ref): return float((y.double()-ref.double()).norm()/ref.double().norm())

@pytest.fixture(params=(True, False))
def thin(request, monkeypatch):
    "Whether small matrices go through the kernel for them; the interpreter takes long for it, so one kind of model is enough"
    if not request.param: monkeypatch.setattr(step_module, 'THIN_MAX_FEATURES', 0)
    return request.param

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('rows,padded,n', [(1, False, 1), (3, True, 2)])
def test_same_logits(kind, rows, padded, n, thin):
    if thin and not GPU and (kind != 'qwen3_5_moe_text' or rows == 1): pytest.skip('takes long')
    model = copy.deepcopy(model_of(kind)).to(device)
    ids,mask = (o.to(device) for o in prompt(model, rows, padded))
    steps,a,b = both_ways(model, ids, mask.bool(), n)
    for want,got in steps: assert error(got, want) < 5e-5
    n = ids.shape[1]+len(steps)
    for x,y in zip(a.cache.layers, b.cache.layers):
        if hasattr(x, 'keys'):
            assert error(y.keys[:, :, :n], x.keys[:, :, :n]) < 5e-5 and error(y.values[:, :, :n], x.values[:, :, :n]) < 5e-5
            assert not y.keys[:, :, n:].any() and not y.values[:, :, n:].any()
        else:
            assert error(y.recurrent_states[0], x.recurrent_states[0]) < 5e-5 and error(y.conv_states[0], x.conv_states[0]) < 5e-5

@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('padded,chunk', [(False, 11), (True, 11), (True, 4)])
def test_reads_prompts(kind, padded, chunk, monkeypatch):
    "The whole prompt, or pieces of it: logits, keys and states of the model itself"
    if not GPU: monkeypatch.setattr(step_module, 'THIN_MAX_FEATURES', 0)
    model = copy.deepcopy(model_of(kind)).to(device)
    ids,mask = (o.to(device) for o in prompt(model, 2, padded))
    g,real = generator(model),mask.bool()
    a,b = Buffers(model, 2, 64),Buffers(model, 2, 64)
    for o in (a, b): o.fill(ids, real, 0); o.fused = False
    want,step = g._prefill(a, ids, real, 0),DecodeStep(model)
    step.bind(b)
    g.step,g.prefill_chunk,b.fused = step,chunk,True
    assert error(g._prefill(b, ids, real, 0), want) < 5e-5
    for x,y in zip(a.cache.layers, b.cache.layers):
        if hasattr(x, 'keys'): assert error(y.keys[:, :, :11][real[:, None].expand(*x.keys.shape[:2], 11)], x.keys[:, :, :11][real[:, None].expand(*x.keys.shape[:2], 11)]) < 5e-5
        else: assert error(y.recurrent_states[0], x.recurrent_states[0]) < 5e-5 and error(y.conv_states[0], x.conv_states[0]) < 5e-5

@pytest.mark.parametrize('kind', ('llama', 'qwen3_moe', 'qwen3_5_moe_text'))
def test_as_good_in_bfloat16(kind, monkeypatch):
    "Not further from float32 than transformers is in bfloat16"
    if not GPU: monkeypatch.setattr(step_module, 'THIN_MAX_FEATURES', 0)
    exact,half = copy.deepcopy(model_of(kind)).to(device),copy.deepcopy(model_of(kind)).to(device, torch.bfloat16)
    exact.load_state_dict(half.state_dict())
    ids,mask = (o.to(device) for o in prompt(exact, 2, True))
    (steps,*_),(true,*_) = both_ways(half, ids, mask.bool(), 1),both_ways(exact, ids, mask.bool(), 1)
    (want,got),(_,ref) = steps[0],true[0]
    assert error(got, ref) < 1.5*error(want, ref) + 1e-3

def test_packed_model(monkeypatch):
    if not GPU: monkeypatch.setattr(step_module, 'THIN_MAX_FEATURES', 0)
    model = copy.deepcopy(model_of(TINY)).to(device)
    ids,mask = (o.to(device) for o in prompt(model, 1, False))
    for want,got in both_ways(model, ids, mask.bool(), 1)[0]: assert error(got, want) < 1e-4

# --- joined weights

def packed(n, k=256, bits=5, seed=0): return HLWQLinear.from_quantized(quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), bits)).to(device)

def test_joined_codes(as_gpu):
    "Views of one weight give the same products, and layers that save what they saved before"
    layers = [packed(n, seed=n).place_() for n in (48, 16, 20)]
    x,disk = torch.randn(2, 256, dtype=torch.bfloat16, device=device),[o.disk.clone() for o in layers]
    want = [o(x) for o in layers]
    j = Joined(layers)
    assert j.parts[0].shape[0] == 3+1+2
    for y,w in zip(j(x), want): assert torch.equal(y, w)
    for o,w,d in zip(layers, want, disk): assert torch.equal(o(x), w) and torch.equal(o.disk, d) and o.packed.untyped_storage().data_ptr() == j.parts[0].untyped_storage().data_ptr()

@pytest.mark.parametrize('other', [packed(16, bits=4), nn.Linear(256, 16, device=device), packed(16, k=256, seed=3)])
def test_what_cannot_be_joined(as_gpu, other):
    "Other bits, other kinds: each layer computes for itself; rows that do not fill a tile can only be last"
    first = packed(20 if getattr(other, 'bits', 0) == 5 else 16).place_()
    if isinstance(other, HLWQLinear): other.place_()
    x = torch.randn(2, 256, device=device)
    j = Joined([first, other])
    assert j.parts is None
    for y,o in zip(j(x), (first, other)): assert torch.equal(y, o(x))

def test_joined_dense_layers_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, 'THIN_MAX_FEATURES', 0)
    model = copy.deepcopy(model_of('llama'))
    before = {k:v.clone() for k,v in model.state_dict().items()}
    DecodeStep(model)
    assert model.model.layers[0].self_attn.q_proj.weight.untyped_storage().data_ptr() == model.model.layers[0].self_attn.k_proj.weight.untyped_storage().data_ptr()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert before.keys() == again.keys() and all(torch.equal(before[k], again[k]) for k in before)

def test_joined_once(as_gpu, monkeypatch):
    "A second generator finds the weights of the first where they are, and moves nothing"
    monkeypatch.setattr(step_module, 'THIN_MAX_FEATURES', 0)
    for kind in (TINY, 'llama'):
        model = copy.deepcopy(model_of(kind)).to(device)
        a = DecodeStep(model)
        where = addresses(model)
        b = DecodeStep(model)
        assert addresses(model) == where and any(o.parts and len(o.layers) > 1 for o in a.joined)
        for x,y in zip(a.joined, b.joined):
            if x.parts: assert all(p.data_ptr() == q.data_ptr() and torch.equal(p, q) for p,q in zip(x.parts, y.parts))

def test_unknown_parts_are_named():
    model = copy.deepcopy(model_of('llama'))
    model.model.layers[1].mlp.act_fn = nn.GELU()
    with pytest.raises(UnsupportedError, match='GELU'): DecodeStep(model)
    with pytest.raises(UnsupportedError, match='interleaved'): DecodeStep(model_of('qwen3_next'))

# --- on a GPU: recorded

@pytest.mark.skipif(not GPU, reason='needs a GPU')
@pytest.mark.parametrize('kind', ('llama', 'qwen3_moe', 'qwen3_5_moe_text', TINY))
@pytest.mark.parametrize('kernels', (True, False))
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_recorded_is_eager(kind, kernels, dtype, monkeypatch):
    "Tokens and logits of replays are those of the same step by hand, bit for bit; and again from the same buffers"
    choose = HLWQGenerator._choose
    def noting(self, b, logits):
        if not hasattr(b, 'all'): b.all = torch.zeros(b.capacity+2, *logits.shape, device=logits.device)
        b.all.index_copy_(0, b.slot, logits[None]); choose(self, b, logits)
    monkeypatch.setattr(HLWQGenerator, '_choose', noting)
    model = copy.deepcopy(model_of(kind)).to(device, dtype)
    ids,mask = (o.to(device) for o in prompt(model, 2, True))
    res = []
    for graphs in (False, True):
        g = HLWQGenerator(model, use_graphs=graphs, use_kernels=kernels)
        for _ in range(2):
            tokens = g(ids, 100, attention_mask=mask, eos_token_id=[])
            assert g.buffers.fused == kernels and (g.report.capture_seconds is None or g.report.capture_seconds < 5)
            recorded = graphs and not (kind in ('qwen3_moe', 'qwen3_5_moe_text') and dtype == torch.float32)    # the dense experts of transformers ask the host then
            assert g.report.step == ('kernels' if kernels else 'transformers') + ', recorded'*recorded and g.report.no_kernels == ''
            res.append((tokens, g.buffers.all.clone())); g.buffers.all.zero_()
    for tokens,logits in res[1:]: assert torch.equal(tokens, res[0][0]) and torch.equal(logits, res[0][1])

@pytest.mark.skipif(not GPU, reason='needs a GPU')
@pytest.mark.parametrize('kind', ('llama', 'qwen3_moe', 'qwen3_5_moe_text', TINY))
def test_recorded_prompts(kind, monkeypatch):
    "Read, recorded and replayed give the same bits; in between come prompts of other lengths"
    seen,prefill = [],HLWQGenerator._prefill
    def noting(self, *args):
        logits = prefill(self, *args)
        seen.append(logits.clone())
        return logits
    monkeypatch.setattr(HLWQGenerator, '_prefill', noting)
    model = copy.deepcopy(model_of(kind)).to(device, torch.bfloat16)
    plain,recorded = HLWQGenerator(model, prefill_chunk=48, use_graphs=False),HLWQGenerator(model, prefill_chunk=48)
    vocab = model.config.get_text_config().vocab_size
    texts = [torch.randint(0, vocab, (2, n), device=device, generator=torch.Generator(device).manual_seed(i)) for i,n in enumerate((16, 40, 13, 60, 38, 16, 15, 58, 37))]
    for i,ids in enumerate([*texts, *texts]):
        mask = torch.ones_like(ids)
        if i % 2: mask[0, :3] = 0
        (a, x),(b, y) = ((g(ids, 12, attention_mask=mask, eos_token_id=[]), seen.pop()) for g in (plain, recorded))
        assert torch.equal(a, b) and torch.equal(x, y) and torch.equal(a[:, :ids.shape[1]], ids) and x.isfinite().all()
    assert any(isinstance(o, tuple) for o in recorded.buffers.prompts.kept.values()) and recorded.buffers.prompts.replayed and not plain.buffers.prompts.kept

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_recorded_draws_follow_the_seed():
    model = copy.deepcopy(model_of('llama')).to(device)
    ids,mask = (o.to(device) for o in prompt(model, 2, True))
    ask = dict(attention_mask=mask, do_sample=True, temperature=.8, top_k=20, top_p=.9, repetition_penalty=1.1, eos_token_id=[])
    recorded,plain = HLWQGenerator(model),HLWQGenerator(model, use_graphs=False)
    texts = [g(ids, 40, seed=s, **ask) for s in (3, 4) for g in (recorded, recorded, plain)]
    assert all(torch.equal(texts[i], texts[i+j]) for i in (0, 3) for j in (1, 2)) and not torch.equal(texts[0], texts[3])

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_recordings_are_void_when_weights_move():
    model = copy.deepcopy(model_of('llama')).to(device)
    ids = prompt(model, 1, False)[0].to(device)
    g = HLWQGenerator(model)
    first = g(ids, 30, eos_token_id=[])
    model.cpu(); junk = torch.randn(1 << 24, device=device); model.to(device)
    assert torch.equal(g(ids, 30, eos_token_id=[]), first)
    del junk

@pytest.mark.skipif(not GPU, reason='needs a GPU')
def test_memory_is_given_back():
    "A cache that no GPU has room for is refused by name, and what was allocated on the way is free again"
    model = copy.deepcopy(model_of('llama')).to(device)
    model.config.max_position_embeddings = 10**10
    ids = prompt(model, 1, False)[0].to(device)
    g = HLWQGenerator(model)
    want = g(ids, 30, eos_token_id=[])
    g.buffers = None
    before = torch.cuda.memory_allocated(device)
    with pytest.raises(ConfigError, match='cuda:0: out of memory for 1 row of 1,000,000,256 tokens, need 1.02 TB'): g(ids, 10**9, eos_token_id=[])
    assert torch.cuda.memory_allocated(device) <= before + 4096 and g.buffers is None         # a flag for each token of the prompt may live on in the traceback
    assert torch.equal(g(ids, 30, eos_token_id=[]), want)

"Generation over a cache of codes: against the plain cache, against HLWQCache in model.generate, and the step of few launches against a layer that decodes; recorded where there is a GPU"
import copy,gc,os,warnings,weakref
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import pytest
pytest.importorskip('triton')
transformers = pytest.importorskip('transformers')
from hlwq import generate as generate_function,step as step_module
from hlwq.core import ConfigError,UnsupportedError
from hlwq.generate import HLWQGenerator,cache_bytes
from hlwq.kernels import layout
from hlwq.kernels.kv_attention import use_kv_attention
from hlwq.kv_cache import HLWQCache,HLWQLayer,blocks_of,parse_kv_bits
from hlwq.step import DecodeStep
from kit import complete
from test_generate import TINY,held,model_of,pretend,prompt,same_tokens,theirs

GPU = torch.cuda.is_available()
if not GPU and not layout.INTERPRETED: pytest.skip('triton was imported without TRITON_INTERPRET before', allow_module_level=True)
device = torch.device('cuda', torch.cuda.current_device()) if GPU else torch.device('cpu')
KINDS = ('llama', 'qwen3_moe', 'qwen3_5_moe_text', TINY)
LONG = dict(max_position_embeddings=2048)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        n = torch.get_num_threads(); torch.set_num_threads(1)
        yield
        torch.set_num_threads(n)

def model_for(kind): return model_of(kind) if kind == TINY else model_of(kind.removeprefix('one '), **LONG, **(dict(num_hidden_layers=1) if kind.startswith('one ') else {}))    # the interpreter takes long for a layer
def layers_of(cache): return [o for o in cache.layers if isinstance(o, HLWQLayer)]
def tensors(o): return [t for h in o.halves for t in (h.first, h.ring, *h.blocks.tensors)]
def error(y, ref): return float((y.double()-ref.double()).norm()/ref.double().norm())

def same_codes(a, b, exact=True, mask=None):
    "Blocks, first and newest tokens of two layers: equal bit for bit, or what they mean nearly so where there is no padding"
    assert (a.length, a.n_blocks) == (b.length, b.n_blocks)
    if not exact:
        starts = [0]*len(a.halves[0].ring) if mask is None else (mask.shape[1] - mask.sum(-1)).tolist()
        for x,y in zip(a.decode(), b.decode()):
            for i,s in enumerate(starts): assert error(x[i, :, s:], y[i, :, s:]) < (.08 if s > 4 else .02)     # some codes lie at a boundary; keys of padding are nobody's business, and are part of the statistics of their block
        return
    for x,y in zip(a.halves, b.halves):
        for s,t in zip(x.blocks.tensors, y.blocks.tensors): assert torch.equal(s[:, :, :a.n_blocks], t[:, :, :a.n_blocks])
    for x,y in zip(a.decode(), b.decode()): assert torch.equal(x, y)

# --- by the layers of transformers: any device

@pytest.mark.parametrize('kind', (*KINDS, 'qwen3_5_moe'))
@pytest.mark.parametrize('rows,padded,chunk', ((1, False, 2048), (3, True, 2048), (2, True, 100)))
def test_exact_blocks_give_the_tokens_of_the_plain_cache(kind, rows, padded, chunk):
    "Blocks of 16 bits: a block is completed while the prompt is read, another by a new token"
    model = model_for(kind)
    ids,mask = prompt(model, rows, padded, 384)
    g,ask = HLWQGenerator(model, prefill_chunk=chunk),dict(attention_mask=mask, eos_token_id=[])
    want,got = g(ids, 8, **ask),g(ids, 8, **ask, kv_bits=16)
    same_tokens(model, got, want, mask, 384)
    layer = layers_of(g.buffers.cache)[0]
    assert (layer.length, layer.n_blocks) == (391, 2) and layer.n_blocks > blocks_of(384) and g.report.kv_cache == 'K16V16'

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('padded', (False, True))
def test_same_codes_as_in_model_generate(kind, padded):
    "The same tokens as transformers writes with that cache, and the same content"
    model = model_for(kind)
    ids,mask = prompt(model, 2, padded, 300)
    g,cache = HLWQGenerator(model),HLWQCache(model.config, 4, 2)
    got = g(ids, 6, attention_mask=mask, eos_token_id=[], kv_bits=(4, 2))
    name = 'cache' if g.cache_name == 'cache' else 'past_key_values'
    want = theirs(model, ids, mask, new=6, eos_token_id=[], **{name:cache})
    got,want = got.cpu(),want.cpu()                            # the embedded model takes a GPU if there is one
    if torch.equal(got, want):
        for a,b in zip(layers_of(g.buffers.cache), layers_of(cache)): same_codes(a, b, exact=False, mask=mask)
    else: same_tokens(model, got, want, mask, 300)

@pytest.mark.parametrize('chunk', (2048, 333, 64, 1))
def test_content_does_not_depend_on_chunks(chunk, monkeypatch):
    "However the prompt is cut: what a layer holds is what it would hold if it had been given the same keys and values at once"
    model,given,update = model_for('llama'),{},HLWQLayer.update
    def noting(self, k, v, *args, **kw): given.setdefault(self, []).append((k, v)); return update(self, k, v, *args, **kw)
    monkeypatch.setattr(HLWQLayer, 'update', noting)
    ids,_ = prompt(model, 2, False, 400)
    g = HLWQGenerator(model, prefill_chunk=chunk)
    g(ids, 3, eos_token_id=[], kv_bits=(3, 2))
    monkeypatch.setattr(HLWQLayer, 'update', update)
    for o in layers_of(g.buffers.cache):
        whole = HLWQLayer(3, 2)
        whole.update(*(torch.cat(x, 2) for x in zip(*given[o])))
        assert len(given[o]) == -(-400//chunk) + 2
        same_codes(o, whole)

@pytest.mark.parametrize('kind', ('llama', 'qwen3_5_moe_text'))
def test_conversation(kind):
    "A cache that is brought goes on where it was, and may be cut back; it is not kept alive"
    model = model_for(kind)
    ids,_ = prompt(model, 1, False, 280)
    g,cache = HLWQGenerator(model),HLWQCache(model.config)
    first = g(ids, 110, cache=cache, eos_token_id=[])
    then = g(torch.cat([first, ids[:, :30]], 1), 5, cache=cache, eos_token_id=[])
    assert cache.get_seq_length() == then.shape[1]-1 and g.report.kv.tokens == then.shape[1]-1 and g.buffers is None
    other = HLWQCache(model.config)
    assert torch.equal(g(ids, 110, cache=other, eos_token_id=[]), first) and torch.equal(g(ids, 110, kv_bits=4, eos_token_id=[]), first)
    with pytest.raises(ConfigError, match='holds 389 tokens, need fewer than the 280') as e: g(ids, 5, cache=other)
    assert complete(e.value)
    with pytest.raises(ConfigError, match='made for 1 rows, need 2') as e: g(torch.cat([first]*2), 5, cache=other)
    assert complete(e.value)
    other.reset()
    assert torch.equal(g(ids, 110, cache=other, eos_token_id=[]), first)
    if kind == 'llama':
        other.crop(-100)
        again = g(first[:, :300], 3, cache=other, eos_token_id=[])
        assert other.get_seq_length() == 302 and again.shape[1] == 303 and layers_of(other)[0].n_blocks == 2 > blocks_of(302)
    last = weakref.ref(other)
    del other,e; gc.collect()
    assert last() is None

def test_buffers_are_kept_by_bits():
    model = model_for('llama')
    ids,_ = prompt(model, 1, False, 20)
    g,kept,outs = HLWQGenerator(model),{},{}
    for _ in range(2):
        for bits in (None, 4, '4,2', 'Q2'):
            out = g(ids, 5, eos_token_id=[], kv_bits=bits)
            assert kept.setdefault(bits, g.buffers) is g.buffers and torch.equal(outs.setdefault(bits, out), out)
    assert len({id(b) for b in kept.values()}) == 4 and [b.cache.bits for b in list(kept.values())[1:]] == [(4, 4), (4, 2), (3, 2)]
    at = [t.data_ptr() for o in kept[4].coded for t in tensors(o)]
    g(ids, 200, eos_token_id=[], kv_bits=4)
    assert kept[4] is g.buffers and at == [t.data_ptr() for o in kept[4].coded for t in tensors(o)]
    g(ids, 600, eos_token_id=[], kv_bits=4)
    assert kept[4] is not g.buffers and len(g.kept) == 4                           # the smaller one is gone
    g.buffers = None
    assert not g.kept

def test_interrupt_leaves_a_cache_to_go_on_with():
    class Impatient:
        n = 0
        def put(self, value):
            self.n += 1
            if self.n == 8: raise KeyboardInterrupt
        def end(self): pass
    model = model_for('llama')
    ids,_ = prompt(model, 1, False, 255)
    g,cache = HLWQGenerator(model),HLWQCache(model.config)
    out = g(ids, 30, cache=cache, eos_token_id=[], streamer=Impatient())
    assert g.report.interrupted and cache.get_seq_length() == out.shape[1]-1 == 261
    assert torch.equal(g(out, 30-g.report.new_tokens, cache=cache, eos_token_id=[]), g(ids, 30, kv_bits=4, eos_token_id=[]))

def test_model_that_is_left_to_model_generate():
    model = model_of('gpt2')
    ids,mask = prompt(model, 2, True)
    out,r = generate_function(model, ids, 8, attention_mask=mask, kv_bits=(8, 8), report=True)
    assert torch.equal(out, theirs(model, ids, mask, new=8)) and r.fallback and r.kv_cache == 'K8V8' and r.kv.tokens == 18

def test_attention_that_reads_codes():
    "A model that was told to read codes does so in the step of transformers too"
    model = copy.deepcopy(model_for('llama')).to(device)
    ids,mask = (o.to(device) for o in prompt(model, 2, True, 262))
    want = HLWQGenerator(model, use_kernels=False)(ids, 3, attention_mask=mask, eos_token_id=[], kv_bits=4)
    use_kv_attention(model)
    g = HLWQGenerator(model, use_kernels=False)
    got = g(ids, 3, attention_mask=mask, eos_token_id=[], kv_bits=4)
    assert not g.report.fallback and torch.equal(got, want)
    assert 'no masks for hlwq_kv' in generate_function(model, ids, 1, kv_bits=None, report=True, attention_mask=mask)[1].fallback

# --- memory, and what is refused

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bits', ((4, 4), (3, 2), (8, 5)))
def test_cache_bytes(kind, bits):
    "What is predicted is what is allocated, and what the report says"
    model = model_for(kind)
    for rows,n in ((1, 20), (2, 700)):
        g = HLWQGenerator(model)
        g(prompt(model, rows, False, n)[0], 2, eos_token_id=[], kv_bits=bits)
        b,r = g.buffers,g.report
        nbytes = sum(t.nbytes for o in b.cache.layers for t in (tensors(o) if isinstance(o, HLWQLayer) else held(o)))
        assert cache_bytes(model.config, rows, b.capacity, torch.float32, bits) == nbytes == r.kv.nbytes + r.kv.other
        assert (r.kv.tokens, r.kv.rows, r.kv_full.tokens, r.kv_full.rows) == (n+1, rows, model.config.max_position_embeddings, rows)
    assert r.kv_full.ratio > r.kv.ratio
    words = repr(r)
    assert f'K{bits[0]}V{bits[1]}, 2 x 701 tokens' in words and f'{model.config.max_position_embeddings:,} tokens, {r.kv_full.share}' in words and r.kv_full.share.startswith('1/')
    assert r.to_json()['kv']['codes'] == r.kv.codes > 0

def test_no_codes_no_lines():
    g = HLWQGenerator(model_for('llama'))
    g(prompt(g.model, 1, False)[0], 2, kv_bits=4); g(prompt(g.model, 1, False)[0], 2)
    assert g.report.kv is None and 'KV cache' not in repr(g.report)

def test_what_missing_memory_says():
    model = copy.deepcopy(model_for('llama'))
    model.config.max_position_embeddings = 10**17
    g,ids = HLWQGenerator(model),prompt(model, 1, False)[0]
    for bits,words in ((None, 'kv_bits=4'), (4, 'fewer kv_bits')):
        with pytest.raises(ConfigError, match=f'out of memory for 1 row of .* TB for their cache.*{words}') as e: g(ids, 10**16, kv_bits=bits)
        assert complete(e.value) and not g.kept

@pytest.mark.parametrize('bits,kind,words', (('4,2,2', ConfigError, 'kv_bits'), ('four', ConfigError, 'kv_bits'), ((), ConfigError, 'kv_bits'), (4., ConfigError, 'kv_bits'), (True, ConfigError, 'kv_bits'), ((4, 7), UnsupportedError, 'v_bits: 7'), ('1', UnsupportedError, 'k_bits: 1'), ('4,', ConfigError, 'kv_bits')))
def test_bits_that_cannot_be(bits, kind, words, monkeypatch):
    model = model_for('llama')
    monkeypatch.setattr(model, 'forward', lambda *a, **k: pytest.fail('something was computed'))
    with pytest.raises(kind, match=words) as e: HLWQGenerator(model)(prompt(model, 1, False)[0], 4, kv_bits=bits)
    assert complete(e.value)

def test_spellings():
    for text,bits in {'4':(4, 4), '4,2':(4, 2), ' 3 , 2 ':(3, 2), 'k4v2':(4, 2), 'Q3':(3, 3), 'q2':(3, 2), '16':(16, 16)}.items(): assert parse_kv_bits(text) == bits
    assert parse_kv_bits((4,)) == (4, 4) and parse_kv_bits([3, 2]) == (3, 2) and parse_kv_bits(None) is None

def test_both_are_refused():
    model = model_for('llama')
    with pytest.raises(ConfigError, match='leave kv_bits out') as e: HLWQGenerator(model)(prompt(model, 1, False)[0], 2, kv_bits=4, cache=HLWQCache(model.config))
    assert complete(e.value)

# --- by the step of few launches: in the interpreter on a CPU

@pytest.fixture
def by_kernels(monkeypatch):
    "Where there is no GPU, generators use the step of few launches all the same"
    if GPU: return
    monkeypatch.setattr(step_module, 'THIN_MAX_FEATURES', 0)
    def choose(self, b):
        b.fused,self.no_kernels = False,self._why_not_cache(b)
        if self.no_kernels or not self.use_kernels: return
        if self.step is None: self.step = DecodeStep(self.model)
        if b.coded and not b.own: b.reserve()
        self.step.bind(b)
        b.fused = True
    monkeypatch.setattr(HLWQGenerator, '_choose_step', choose)

def both(kind, n, new, rows=1, padded=False, bits=(4, 4), chunk=2048, brought=False, dtype=torch.float32):
    "Tokens and layers by our step, and by transformers over a layer that decodes"
    model = copy.deepcopy(model_for(kind)).to(device, dtype)
    ids,mask = (o.to(device) for o in prompt(model, rows, padded, n))
    res = []
    for kernels in (True, False):
        g,cache = HLWQGenerator(model, chunk, use_kernels=kernels),HLWQCache(model.config, *bits) if brought else None
        out = g(ids, new, attention_mask=mask, eos_token_id=[], **(dict(cache=cache) if brought else dict(kv_bits=bits)))
        assert g.report.step.startswith('kernels' if kernels else 'transformers') and not g.report.no_kernels
        res.append((out, layers_of(cache or g.buffers.cache)))
    (x,a),(y,b) = res
    same_tokens(model.cpu(), x.cpu(), y.cpu(), mask.cpu(), n)
    assert all(o.length == n+new-1 and o.n_blocks == blocks_of(n+new-1) for o in (*a, *b))
    for o,p in zip(a, b):
        if torch.equal(x, y): same_codes(o, p, exact=False, mask=mask)
    return a,b

@pytest.mark.parametrize('kind,rows,padded,bits', (('one llama', 1, False, (4, 4)), ('one qwen3', 2, True, (3, 2)), ('qwen3_5_text', 1, False, (4, 2)), ('llama', 1, True, (8, 5))))
def test_step_over_codes(by_kernels, kind, rows, padded, bits):
    "Over the token that completes a block, and the first that sees it"
    a,_ = both(kind, 259, 3, rows, padded, bits)
    assert a[0].n_blocks == 1

def test_step_over_codes_with_chunks_and_in_a_cache_that_is_brought(by_kernels):
    both('one llama', 259, 2, chunk=100)
    both('one llama', 259, 2, 2, True, brought=True)

def test_step_appends_to_heads_of_their_own(by_kernels):
    "Several heads, one token at a time: what comes back is each head's own, which another order of heads would not be"
    model = copy.deepcopy(model_of('llama', **LONG, num_hidden_layers=1, num_key_value_heads=4)).to(device)
    ids,_ = prompt(model, 1, False, 258)
    plain,coded = HLWQGenerator(model),HLWQGenerator(model)
    want = plain(ids.to(device), 5, eos_token_id=[])
    got = coded(ids.to(device), 5, eos_token_id=[], kv_bits=8)
    assert torch.equal(got, want)
    layer,exact,pad = coded.buffers.coded[0],plain.buffers.cache.layers[0],int(plain.buffers.start)      # lengths are rounded up on a GPU, not those of codes
    assert layer.n_blocks == 1
    for out,x in zip(layer.decode(), (exact.keys, exact.values)):
        x = x[:, :, pad:pad+262]
        assert torch.cosine_similarity(out, x, dim=-1).mean(-1).min() > .999
        for h in range(1, 4): assert torch.cosine_similarity(out, x.roll(h, 1), dim=-1).mean(-1).max() < .9
        assert torch.equal(out[:, :, 132:], x[:, :, 132:]) and torch.equal(out[:, :, :4], x[:, :, :4])

def test_step_after_a_crop(by_kernels):
    "More blocks than the length says, which only the count on the device tells"
    model = copy.deepcopy(model_for('one llama')).to(device)
    ids = prompt(model, 1, False, 420)[0].to(device)
    outs,caches = [],[]
    for kernels in (True, False):
        g,cache = HLWQGenerator(model, use_kernels=kernels),HLWQCache(model.config)
        g(ids, 1, cache=cache, eos_token_id=[])
        cache.crop(-140)
        outs.append(g(ids[:, :284], 3, cache=cache, eos_token_id=[])); caches.append(cache)
    assert torch.equal(*outs)
    for a,b in zip(*map(layers_of, caches)):
        assert a.n_blocks == 2 > blocks_of(a.length)
        same_codes(a, b, exact=False)

def test_goes_on_after_the_step(by_kernels):
    "What the kernels counted is what the layers count"
    model = copy.deepcopy(model_for('one llama')).to(device)
    ids = prompt(model, 1, False, 259)[0].to(device)
    g,cache = HLWQGenerator(model),HLWQCache(model.config)
    first = g(ids, 2, cache=cache, eos_token_id=[])
    assert cache.get_seq_length() == 260 and layers_of(cache)[0].n_blocks == 1
    then = g(first, 2, cache=cache, eos_token_id=[])
    assert g.given[1].cache is None and g.given[0]() is cache
    assert torch.equal(then, g(ids, 4, kv_bits=4, eos_token_id=[]))

@pytest.mark.parametrize('bits,change,words', (((16, 4), {}, 'keys of 16 bits'), ((4, 4), dict(head_dim=144), 'head_dim 144'), ((4, 4), dict(num_attention_heads=32, num_key_value_heads=1, head_dim=16), '32 query heads for 1')))
def test_why_not_by_kernels(by_kernels, bits, change, words):
    if GPU: pytest.skip('said by the report there')
    model = transformers.AutoModelForCausalLM.from_config(type(model_for('llama').config)(**model_for('llama').config.to_dict() | change)).eval()
    g = HLWQGenerator(model)
    g(prompt(model, 1, False)[0], 3, kv_bits=bits)
    assert words in g.report.no_kernels and g.report.step == 'transformers'
    cache = HLWQCache(model_for('llama').config, offloading=True)
    g = HLWQGenerator(model_for('llama'))
    assert g._why_not_cache(type('B', (), dict(cache=cache, coded=cache.quantized, own=False))()) == 'the cache is offloaded'

def test_their_step_is_not_recorded(pretend):
    "It counts tokens on the host: a recording would repeat one of them"
    model = model_for('llama')
    ids,mask = prompt(model, 2, True, 40)
    g = HLWQGenerator(model, use_kernels=False)
    out = g(ids, 20, attention_mask=mask, eos_token_id=[], kv_bits=4)
    assert g.report.step == 'transformers' and g.report.capture_seconds is None
    assert torch.equal(out, HLWQGenerator(model, use_kernels=False, use_graphs=False)(ids, 20, attention_mask=mask, eos_token_id=[], kv_bits=4))

@pytest.fixture
def recorded(pretend, monkeypatch):
    "The CPU passes for a CUDA device with kernels, which are simulated; a recording runs the step again"
    monkeypatch.setattr(step_module, 'THIN_MAX_FEATURES', 0)
    bind = DecodeStep.bind
    def on_cpu(self, b):
        as_cuda,b.device = b.device,torch.device('cpu')
        bind(self, b)
        b.device = as_cuda
    monkeypatch.setattr(DecodeStep, 'bind', on_cpu)

@pytest.mark.skipif(GPU, reason='for real below')
def test_recorded_steps_are_counted(recorded):
    "Two steps by hand, then replays, over the end of a block; the layers know afterwards, and the report says what took how much"
    model = model_for('one llama')
    ids,_ = prompt(model, 1, False, 256)
    g = HLWQGenerator(model)
    out = g(ids, 7, eos_token_id=[], kv_bits='4')
    assert g.report.step == 'kernels, recorded' and g.report.capture_seconds and g.buffers.warm and len(g.buffers.graphs) == 1
    layer, = layers_of(g.buffers.cache)
    assert (layer.length, layer.n_blocks, g.report.kv.tokens) == (262, 1, 262) and g.report.kv.nbytes == layer.nbytes
    want = HLWQGenerator(model, use_kernels=False)(ids, 7, eos_token_id=[], kv_bits=4)
    assert torch.equal(out, want)
    assert torch.equal(g(ids, 4, eos_token_id=[], kv_bits=(4, 4)), want[:, :260]) and g.report.capture_seconds is None and g.report.step == 'kernels, recorded'

@pytest.mark.skipif(GPU, reason='for real below')
def test_recordings_of_a_cache_that_is_brought_serve_again(recorded):
    model = model_for('one llama')
    ids,_ = prompt(model, 1, False, 256)
    g,cache = HLWQGenerator(model),HLWQCache(model.config)
    first = g(ids, 5, cache=cache, eos_token_id=[])
    assert g.report.step == 'kernels, recorded' and g.report.capture_seconds and cache.get_seq_length() == 260
    kept = g.given[1]
    then = g(first, 3, cache=cache, eos_token_id=[])
    assert g.given[1] is kept and g.report.step == 'kernels, recorded' and g.report.capture_seconds is None
    assert torch.equal(then, HLWQGenerator(model, use_kernels=False)(ids, 8, eos_token_id=[], kv_bits=4))
    g(torch.cat([then, ids], 1), 1, cache=cache, eos_token_id=[])           # more than there is room for
    assert g.given[1] is not kept and cache.get_seq_length() == 520

def test_recordings_are_void_when_codes_move():
    model = model_for('llama')
    g,ids = HLWQGenerator(model),prompt(model, 1, False)[0]
    cache = HLWQCache(model.config)
    g(ids, 3, cache=cache, eos_token_id=[])
    b = g.given[1]
    b.cache,b.graphs[1],b.warm[1] = cache,'a recording',2
    b.begin()
    assert b.graphs and b.warm
    for o in cache.layers: o.batch_repeat_interleave(1)
    b.begin()
    assert not b.graphs and not b.warm

def test_recordings_of_all_bits_are_void_when_weights_move():
    model = copy.deepcopy(model_for('llama'))
    g,ids = HLWQGenerator(model),prompt(model, 1, False)[0]
    for bits in (None, 4, 3): g(ids, 2, kv_bits=bits)
    for b in g.kept.values(): b.graphs[1] = 'a recording'
    g.addresses = 'elsewhere'
    g._follow(g.buffers)
    assert not any(b.graphs for b in g.kept.values())

# --- on a GPU: recorded

needs_gpu = pytest.mark.skipif(not GPU, reason='needs a GPU')

@needs_gpu
def test_kernels_are_real():
    assert not layout.INTERPRETED, 'TRITON_INTERPRET is set: the kernels would be simulated, and these tests show nothing'

@needs_gpu
@pytest.mark.parametrize('kind,bits', (('llama', (4, 4)), (TINY, (4, 4)), ('qwen3_5_moe_text', (3, 2))))
def test_recorded_is_eager(kind, bits, monkeypatch):
    "Tokens, logits and codes of replays are those of the same step by hand, bit for bit, over the ends of two blocks; and again from the same buffers"
    choose = HLWQGenerator._choose
    def noting(self, b, logits):
        if not hasattr(b, 'all'): b.all = torch.zeros(b.capacity+2, *logits.shape, device=logits.device)
        b.all.index_copy_(0, b.slot, logits[None]); choose(self, b, logits)
    monkeypatch.setattr(HLWQGenerator, '_choose', noting)
    model = copy.deepcopy(model_for(kind)).to(device, torch.bfloat16)
    ids,mask = (o.to(device) for o in prompt(model, 2, True, 250))
    res = []
    for graphs in (False, True):
        g = HLWQGenerator(model, use_graphs=graphs)
        for _ in range(2):
            tokens = g(ids, 150, attention_mask=mask, eos_token_id=[], kv_bits=bits)
            assert g.report.step == 'kernels' + ', recorded'*graphs and g.report.no_kernels == ''
            layers = layers_of(g.buffers.cache)
            assert all(o.length == 399 and o.n_blocks == 2 for o in layers)
            res.append((tokens, g.buffers.all.clone(), [t[:, :, :2].clone() for o in layers for h in o.halves for t in h.blocks.tensors])); g.buffers.all.zero_()
            assert res[-1][1].isfinite().all()
    for tokens,logits,codes in res[1:]:
        assert torch.equal(tokens, res[0][0]) and torch.equal(logits, res[0][1]) and all(map(torch.equal, codes, res[0][2]))

@needs_gpu
@pytest.mark.parametrize('kind', ('llama', TINY))
def test_recorded_against_a_layer_that_decodes(kind):
    "Nearly the codes of transformers' own step over the same cache: the content is that of HLWQCache"
    a,_ = both(kind, 250, 24, 2, True, dtype=torch.float32)
    assert a[0].n_blocks == 1

@needs_gpu
def test_recordings_of_a_cache_that_is_brought():
    "Recorded in the first text, replayed in the second"
    model = copy.deepcopy(model_for('llama')).to(device)
    ids = prompt(model, 1, False, 250)[0].to(device)
    g,cache = HLWQGenerator(model),HLWQCache(model.config)
    first = g(ids, 20, cache=cache, eos_token_id=[])
    assert g.report.step == 'kernels, recorded' and g.report.capture_seconds
    cache.crop(-15)
    then = g(first[:, :-10], 10, cache=cache, eos_token_id=[])
    assert g.report.step == 'kernels, recorded'
    assert torch.equal(g(ids, 20, kv_bits=4, eos_token_id=[]), first) and then.shape == first.shape

@needs_gpu
def test_memory_is_as_predicted():
    model = copy.deepcopy(model_for('llama')).to(device, torch.bfloat16)
    ids = prompt(model, 1, False, 1000)[0].to(device)
    g = HLWQGenerator(model)
    g(ids, 20, eos_token_id=[], kv_bits=4)
    r,b = g.report,g.buffers
    assert r.kv.nbytes + r.kv.other == cache_bytes(model.config, 1, b.capacity, torch.bfloat16, 4) == sum(t.nbytes for o in b.cache.layers for t in (tensors(o) if isinstance(o, HLWQLayer) else held(o)))

"""The decode step of fixed shape against model.generate, token by token, and its parts against those of transformers.

Where two logits lie closer than 1e-3, rounding may choose either; such a row is compared up to that place only (`same_tokens`)."""
import copy,json,sys,warnings,weakref
from functools import lru_cache
from types import SimpleNamespace
import pytest,torch
transformers = pytest.importorskip('transformers')
from transformers import AutoConfig,AutoModelForCausalLM,AutoTokenizer,StaticCache
from transformers.generation import logits_process
import hlwq
from hlwq.core import ConfigError,HLWQPerformanceWarning,asset_path,warn_once
from hlwq.buffers import *
from hlwq.generate import *
from hlwq.generate import _written
from hlwq.load import load_model
from hlwq.prompts import *
from hlwq.sampling import *
from kit import EXPERTS,SIZES,complete,quantized

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TINY = 'tiny-moe-10m'
REAL_RECORD = HLWQGenerator._record
LINEAR = dict(layer_types=['linear_attention', 'full_attention'], linear_conv_kernel_dim=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    shared_expert_intermediate_size=64, rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=.25))
OWN = dict(mixtral=EXPERTS | dict(sliding_window=None), mistral=dict(sliding_window=None), qwen2_moe=EXPERTS | dict(shared_expert_intermediate_size=64), qwen3_moe=EXPERTS,
    qwen3_next=EXPERTS | LINEAR, qwen3_5_text=LINEAR, qwen3_5_moe_text=EXPERTS | LINEAR)
WHOLE = dict(qwen3_5='Qwen3_5ForConditionalGeneration', qwen3_5_moe='Qwen3_5MoeForConditionalGeneration')   # models that also see pictures, here given text
VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=128, num_position_embeddings=16)

@pytest.fixture(scope='module', autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        threads = torch.get_num_threads(); torch.set_num_threads(1)    # models this small only wait for each other's threads
        yield
        torch.set_num_threads(threads)

@lru_cache(maxsize=None)
def model_of(kind, **sizes):
    "A model of random weights in float32, or the embedded one packed"
    if kind == TINY or kind.startswith('packed'): return load_model(quantized(kind.removeprefix('packed ')), dtype=torch.float32)
    own,g = {**SIZES, **OWN.get(kind if kind not in WHOLE else f'{kind}_text', {}), **sizes},torch.Generator().manual_seed(3)
    if kind in WHOLE: own = dict(text_config=own, vision_config=VISION, image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
    config = AutoConfig.for_model(kind, **own)
    model = (getattr(transformers, WHOLE[kind])(config) if kind in WHOLE else AutoModelForCausalLM.from_config(config)).eval()
    with torch.no_grad():
        for n,p in model.named_parameters(): p.copy_(torch.randn(p.shape, generator=g)*(.1 if p.ndim < 2 else .2) + (1 if p.ndim < 2 and n.endswith('norm.weight') else 0))
    return model

tokenizer = lru_cache(lambda: AutoTokenizer.from_pretrained(asset_path(TINY)))
def encode(text): return tokenizer()(text, return_tensors='pt').input_ids

def prompt(model, rows, padded, n=11, seed=5):
    ids = torch.randint(3, 60 if model.config.model_type in WHOLE else model.config.get_text_config().vocab_size, (rows, n), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        for i in range(rows): mask[i, :(3*i+4) % n] = 0
        ids = torch.where(mask.bool(), ids, model.config.get_text_config().pad_token_id)
    return ids,mask

@torch.no_grad()
def same_tokens(model, ours, theirs, mask, n):
    "Asserts that new tokens are equal, up to where two logits lie closer than 1e-3"
    for i in range(len(ours)):
        differ = (ours[i] != theirs[i]).nonzero() if ours.shape == theirs.shape else torch.tensor([[n]])
        if not len(differ): continue
        at = int(differ[0])
        top = model(theirs[i:i+1, :at], attention_mask=torch.cat([mask[i:i+1], torch.ones(1, at-n, dtype=mask.dtype)], 1)).logits[0, -1].topk(2).values
        assert top[0]-top[1] < 1e-3, f'row {i}: differs at {at}, where the best logit leads by {top[0]-top[1]:.4f}'
        warnings.warn(f'row {i}: a tie at {at}')

def theirs(model, ids, mask=None, new=24, **kw):
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **{'do_sample':False, 'max_new_tokens':new, **kw})

# --- the same tokens

@pytest.mark.parametrize('kind', [TINY, 'packed llama', 'packed qwen3_moe', *ARCHITECTURES])
def test_greedy(kind):
    model = model_of(kind)
    assert why_not(model) == ''
    g = HLWQGenerator(model)
    for rows,padded in ((1, False), (1, True), (3, False), (3, True)):
        ids,mask = prompt(model, rows, padded)
        same_tokens(model, g(ids, 24, attention_mask=mask, eos_token_id=[]), theirs(model, ids, mask, eos_token_id=[]), mask, ids.shape[1])

@pytest.mark.parametrize('kind', ['llama', 'qwen3_5_moe_text'])
def test_eager_attention(kind):
    model = model_of(kind, attn_implementation='eager')
    ids,mask = prompt(model, 3, True)
    assert model.config._attn_implementation == 'eager'
    same_tokens(model, generate(model, ids, 24, attention_mask=mask, eos_token_id=[]), theirs(model, ids, mask, eos_token_id=[]), mask, ids.shape[1])

@pytest.mark.parametrize('kind', [TINY, 'llama', 'qwen3', 'qwen3_moe'])
def test_bfloat16(kind):
    "In bfloat16 the logits of two ways of computing differ, so tokens may; the first ones must not, on average"
    model = load_model(quantized(TINY), dtype=torch.bfloat16) if kind == TINY else AutoModelForCausalLM.from_config(model_of(kind).config).to(torch.bfloat16).eval()
    if kind != TINY: model.load_state_dict(model_of(kind).state_dict())
    ids,mask = prompt(model, 8, True)
    a,b = generate(model, ids, 4, attention_mask=mask, eos_token_id=[]),theirs(model, ids, mask, new=4, eos_token_id=[])
    assert (a[:, 11] == b[:, 11]).float().mean() >= .75

@pytest.mark.parametrize('kind', [TINY, 'qwen3_moe'])
@pytest.mark.parametrize('padded', [False, True])
def test_end_tokens(kind, padded):
    "Rows end at different times; each writes padding from then on, and all stop when the last one does"
    model = model_of(kind)
    ids,mask = prompt(model, 3, padded)
    free = theirs(model, ids, mask, eos_token_id=[])[:, ids.shape[1]:]
    eos = [int(free[0, 3]), int(free[1, 9]), int(free[2, 14])]
    for ends in (eos, eos[:1], eos[0]):
        a,b = generate(model, ids, 24, attention_mask=mask, eos_token_id=ends, report=True),theirs(model, ids, mask, eos_token_id=ends)
        assert torch.equal(a[0], b)
        assert a[1].new_tokens == _written(b[:, ids.shape[1]:], ends if isinstance(ends, list) else [ends], model.generation_config.pad_token_id)
    assert a[1].prompt_tokens == int(mask.sum())

def test_written():
    assert _written(torch.tensor([[5, 6, 9, 0], [9, 0, 0, 0], [5, 5, 5, 5]]), (9,), 0) == 3+1+4
    assert _written(torch.tensor([[0, 0]]), (), 0) == 2

def test_ends_of_the_model():
    "What the generation config says about end tokens holds if the call says nothing"
    model = model_of(TINY)
    ids,_ = prompt(model, 1, False)
    try:
        model.generation_config.eos_token_id = int(theirs(model, ids, eos_token_id=[])[0, 15])
        out = generate(model, ids, 24)
        assert torch.equal(out, theirs(model, ids)) and out.shape[1] < 35
    finally: model.generation_config.eos_token_id = 0

@pytest.mark.parametrize('kind', [TINY, 'llama', 'qwen3_next'])
@pytest.mark.parametrize('chunk', [1, 2, 4, 10, 11, 100])
def test_chunks(kind, chunk):
    model = model_of(kind)
    for rows,padded in ((1, False), (3, True)):
        ids,mask = prompt(model, rows, padded)
        same_tokens(model, generate(model, ids, 16, prefill_chunk=chunk, attention_mask=mask, eos_token_id=[]), theirs(model, ids, mask, new=16, eos_token_id=[]), mask, ids.shape[1])

def test_chunks_have_the_same_logits():
    model = model_of(TINY)
    ids,mask = prompt(model, 3, True, n=70)
    found = []
    for chunk in (70, 7):
        g = HLWQGenerator(model, chunk)
        with torch.no_grad(): found.append(g._prefill(g._buffers(3, 80, None), ids, mask.bool(), 0))
    with torch.no_grad(): want = model(ids, attention_mask=mask).logits[:, -1]
    assert (found[0]-want).abs().max() < 1e-3 and (found[1]-want).abs().max() < 1e-3

@pytest.mark.parametrize('doubling', [False, True])
def test_wider_keys_on_the_way(doubling, monkeypatch):
    "On a GPU the step sees 256 keys, past them 512; elsewhere the width follows in steps of 64. Buffers that are kept serve short texts after long ones"
    if doubling: monkeypatch.setattr(Buffers, 'width_for', lambda b, n, real=Buffers.width_for: real(SimpleNamespace(own=True, coded=[], capacity=b.capacity, device=torch.device('cuda')), n))
    model = model_of('llama', max_position_embeddings=2048)
    g,seen = HLWQGenerator(model, 64),[]
    step = g._step
    g._step = lambda b: (seen.append(b.width), step(b))
    ids,mask = prompt(model, 2, True, n=240)
    same_tokens(model, g(ids, 60, attention_mask=mask, eos_token_id=[]), theirs(model, ids, mask, new=60, eos_token_id=[]), mask, 240)
    assert seen == [256]*16 + [512 if doubling else 320]*43
    kept = g.buffers
    for n in (5, 9):
        ids,mask = prompt(model, 2, True, n=n)
        same_tokens(model, g(ids, 12, attention_mask=mask, eos_token_id=[]), theirs(model, ids, mask, new=12, eos_token_id=[]), mask, n)
        assert g.buffers is kept and g.buffers.width == (256 if doubling else 64)
    ids,mask = prompt(model, 8, True)
    g(ids, 4, attention_mask=mask)
    assert g.buffers is not kept and g.buffers.batch == 8

def test_nothing_is_left_from_the_last_text():
    model = model_of(TINY)
    g = HLWQGenerator(model)
    one,two = encode('The sea was'),encode('A letter for the king was')
    want = [generate(model, o, 12, repetition_penalty=1.3) for o in (one, two)]
    for _ in range(2): assert torch.equal(g(one, 12, repetition_penalty=1.3), want[0]) and torch.equal(g(two, 12, repetition_penalty=1.3), want[1])

def test_step_keeps_its_addresses():
    "What a recorded step would read and write does not move"
    g = HLWQGenerator(model_of(TINY))
    ids = encode('The sea was')
    g(ids, 8)
    def places(b): return [o.data_ptr() for o in (b.token, b.position, b.length, b.finished, b.slot, b.tokens, b.visible)] + [t.data_ptr() for l in b.cache.layers for t in ([l.keys, l.values] if hasattr(l, 'width') else [l.conv_states[0], l.recurrent_states[0]])]
    before = places(g.buffers)
    g(ids, 20)
    assert places(g.buffers) == before

class NoHost(torch.utils._python_dispatch.TorchDispatchMode):
    "Fails where a tensor is read by Python, which a CUDA graph cannot hold"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        assert f not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten.multinomial.default), f'{f} asks the host'
        return f(*args, **(kwargs or {}))

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'qwen3_moe', 'qwen3_5_text', 'qwen3_5_moe'])
@pytest.mark.parametrize('how', [dict(), dict(do_sample=True, temperature=.7, top_k=20, top_p=.9, min_p=.01, repetition_penalty=1.2)])
def test_step_asks_nothing(kind, how):
    model = model_of(kind)
    g = HLWQGenerator(model)
    g(prompt(model, 3, True)[0], 4, eos_token_id=[7, 8], **how)
    with torch.no_grad(), NoHost(): g._step(g.buffers)

# --- choosing

def random_logits(rows=6, vocab=50): return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(7))*3
def processed(p, logits, ids=None): return p(ids if ids is not None else torch.zeros(len(logits), 1, dtype=torch.int64), logits.clone())

@pytest.mark.parametrize('k', [1, 5, 50, 99])
def test_top_k(k): assert torch.equal(keep_top_k(random_logits(), k), processed(logits_process.TopKLogitsWarper(k), random_logits()))

@pytest.mark.parametrize('p', [.01, .3, .9, .999])
def test_top_p(p): assert torch.equal(keep_top_p(random_logits(), p), processed(logits_process.TopPLogitsWarper(p), random_logits()))

@pytest.mark.parametrize('p', [.01, .2, .9])
def test_min_p(p): assert torch.equal(keep_min_p(random_logits(), p), processed(logits_process.MinPLogitsWarper(p), random_logits()))

def test_ties():
    logits = torch.tensor([[1., 1., 1., 0.]])
    assert keep_top_k(logits, 2).isfinite().sum() == 3
    assert torch.equal(keep_top_p(logits, .4), processed(logits_process.TopPLogitsWarper(.4), logits))

@pytest.mark.parametrize('penalty', [.7, 1., 1.3])
def test_penalty(penalty):
    ids = torch.randint(0, 50, (6, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.allclose(penalize(random_logits(), seen, penalty), processed(logits_process.RepetitionPenaltyLogitsProcessor(penalty), random_logits(), ids), rtol=1e-6)

def test_all_together(monkeypatch):
    "The order of the processors is that of transformers; a temperature before top_p keeps other tokens than one after it"
    monkeypatch.setattr(sys.modules['hlwq.sampling'], 'draw', lambda logits, generator: logits)
    how = Sampling(True, .6, 20, .8, .02, 1.2)
    seen = torch.rand(6, 50, generator=torch.Generator().manual_seed(2)) < .3
    model = model_of('llama')
    config = transformers.GenerationConfig(do_sample=True, temperature=.6, top_k=20, top_p=.8, min_p=.02, repetition_penalty=1.2)
    theirs = model._get_logits_processor(config, input_ids_seq_length=3, device='cpu')
    ids = torch.stack([torch.nn.functional.pad(o := s.nonzero().flatten(), (0, 50-len(o)), value=int(o[0])) for s in seen])
    want = theirs(ids, random_logits())
    got = next_token(random_logits(), how, seen)
    assert torch.equal(got.isfinite(), want.isfinite()) and torch.allclose(got, want, rtol=1e-6) and 1 < got.isfinite().sum(-1).float().mean() < 20

@pytest.mark.parametrize('how', [dict(), dict(temperature=2.), dict(top_k=4), dict(top_p=.8), dict(min_p=.1)])
def test_frequencies(how):
    logits,n = random_logits(1, 12),30_000
    drawn = next_token(logits.expand(n, -1), Sampling(True, **how), None, torch.Generator().manual_seed(5)).flatten().bincount(minlength=12)
    x = logits/how.get('temperature', 1.)
    for name,f in (('top_k', keep_top_k), ('top_p', keep_top_p), ('min_p', keep_min_p)):
        if name in how: x = f(x, how[name])
    p = x.softmax(-1)[0]
    assert (drawn[p == 0] == 0).all()
    assert ((drawn-n*p).abs() <= 4*(n*p*(1-p)).sqrt() + 1e-9).all()

def test_frequencies_of_a_model():
    "First tokens of many rows, through the whole of generate"
    model = model_of('llama')
    ids = prompt(model, 1, False)[0]
    with torch.no_grad(): p = (model(ids).logits[0, -1]/3).softmax(-1)
    n = 2000
    drawn = generate(model, ids.expand(n, -1), 1, do_sample=True, temperature=3., seed=1)[:, -1].bincount(minlength=64)
    assert ((drawn-n*p).abs() <= 4*(n*p*(1-p)).sqrt() + 1).all()

def test_penalty_in_a_text():
    model = model_of(TINY)
    ids,mask = prompt(model, 3, False)
    assert torch.equal(generate(model, ids, 24, repetition_penalty=1.4, eos_token_id=[]), theirs(model, ids, repetition_penalty=1.4, eos_token_id=[]))
    ids,mask = prompt(model, 3, True)                           # padding does not count: a row gives the same alone
    out = generate(model, ids, 24, attention_mask=mask, repetition_penalty=1.4, eos_token_id=[])
    for i in range(3):
        alone = ids[i:i+1, int((mask[i] == 0).sum()):]
        assert torch.equal(out[i, 11:], generate(model, alone, 24, repetition_penalty=1.4, eos_token_id=[])[0, alone.shape[1]:])

def test_seeds():
    model = model_of(TINY)
    ids = encode('Once upon a time')
    text = lambda **kw: generate(model, ids, 16, do_sample=True, **kw)[0].tolist()
    assert text(seed=1) == text(seed=1) != text(seed=2)
    torch.manual_seed(4); a = text(); b = text()
    torch.manual_seed(4)
    assert text() == a != b
    assert text(seed=1, temperature=.001) == theirs(model, ids, new=16)[0].tolist()
    state = torch.get_rng_state()
    text(seed=3)
    assert torch.equal(torch.get_rng_state(), state), 'a seed of its own leaves that of torch alone'

def test_padding_is_found():
    "Without a mask, padding on the left is told by its token, as in transformers"
    model = model_of(TINY)
    ids,mask = prompt(model, 3, True)
    assert torch.equal(generate(model, ids, 8, eos_token_id=[]), model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=[]))

# --- stopping and streaming

def test_stop_strings():
    model,t = model_of(TINY),tokenizer()
    ids = encode('Once upon a time')
    free = t.decode(theirs(model, ids, new=40)[0, ids.shape[1]:])
    for s in (free[10:14], free[25:27], free[30]):
        a = generate(model, ids, 40, stop=['never there', s], tokenizer=t)
        assert torch.equal(a, model.generate(ids, max_new_tokens=40, do_sample=False, stop_strings=['never there', s], tokenizer=t))
        assert s in t.decode(a[0, ids.shape[1]:]) and s not in t.decode(a[0, ids.shape[1]:-1])
    assert torch.equal(generate(model, ids, 40, stop='never there', tokenizer=t), theirs(model, ids, new=40))

def test_stop_strings_in_rows():
    model,t = model_of(TINY),tokenizer()
    texts = ['Once upon a time', 'The sea', 'She said to him']
    side,t.padding_side = t.padding_side,'left'
    both = t(texts, return_tensors='pt', padding=True)
    t.padding_side = side
    out = generate(model, **both, max_new_tokens=30, stop=[' the'], tokenizer=t)
    n = both.input_ids.shape[1]
    for row,text in zip(out, texts):
        alone = generate(model, encode(text), 30, stop=[' the'], tokenizer=t)[0, encode(text).shape[1]:]
        assert torch.equal(row[n:n+len(alone)], alone) and (row[n+len(alone):] == 1).all()

@pytest.mark.parametrize('text', ['naïve café', '日本語。終', '🙂 ok'])
def test_stop_finds_any_script(text):
    t = tokenizer()
    ids = t(text, add_special_tokens=False).input_ids
    if t.decode(ids) != text: pytest.skip('not in this vocabulary')
    assert stops_here(ids, [text[-2:]], t) and not stops_here(ids[:-1], [text], t)

class Listener:
    def __init__(self): self.got,self.ended = [],0
    def put(self, value): self.got.append(value)
    def end(self): self.ended += 1

@pytest.mark.parametrize('kind', [TINY, 'gpt2'])
@pytest.mark.parametrize('rows', [1, 3])
def test_streamer_gets_all(kind, rows):
    model,s = model_of(kind),Listener()
    ids = prompt(model, rows, False)[0]
    out = generate(model, ids, 9, streamer=s, eos_token_id=[])
    assert s.ended == 1 and torch.equal(s.got[0], ids) and torch.equal(torch.stack(s.got[1:], 1), out[:, 11:])

def test_streamed_text(capsys):
    model,t = model_of(TINY),tokenizer()
    ids = encode('The captain')
    out = generate(model, ids, 30, streamer=transformers.TextStreamer(t, skip_prompt=True))
    assert capsys.readouterr().out.rstrip('\n') == t.decode(out[0, ids.shape[1]:]).rstrip('\n')
    streamer = transformers.TextIteratorStreamer(t)
    assert torch.equal(generate(model, ids, 30, streamer=streamer), out)
    assert ''.join(streamer) == t.decode(out[0])

@pytest.mark.parametrize('after', [0, 1, 5])
def test_interrupt(after):
    "Ctrl-C gives what there is, and the next call is as if nothing had been"
    class Impatient(Listener):
        def put(self, value):
            super().put(value)
            if len(self.got) == after+1: raise KeyboardInterrupt
    model = model_of(TINY)
    g,ids,s = HLWQGenerator(model),encode('The captain'),Impatient()
    out = g(ids, 30, streamer=s)
    assert torch.equal(out, theirs(model, ids, new=30)[:, :ids.shape[1]+after]) and s.ended == 1
    assert g.report.interrupted and g.report.new_tokens == after and 'interrupted' in repr(g.report)
    assert torch.equal(g(ids, 30), theirs(model, ids, new=30)) and not g.report.interrupted

# --- caches

@pytest.mark.parametrize('make', [static_cache, lambda config, n: StaticCache(config=config, max_cache_len=n)])
@pytest.mark.parametrize('kind', [TINY, 'llama'])
def test_a_cache_that_is_brought(kind, make):
    model = model_of(kind)
    g,cache = HLWQGenerator(model),make(model.config, 60)
    ids,mask = prompt(model, 1, False)
    first = g(ids, 10, cache=cache, eos_token_id=[])
    more = torch.cat([first, ids[:, :3]], 1)
    assert torch.equal(g(more, 10, cache=cache, eos_token_id=[]), theirs(model, more, new=10, eos_token_id=[]))
    assert g.buffers is None
    for call,words in ((lambda: g(more, 50, cache=cache), 'room for 60'), (lambda: g(ids, 5, cache=cache), 'holds 33 tokens, need fewer than the 11')):
        with pytest.raises(ConfigError, match=words) as e: call()
        assert complete(e.value)
    with pytest.raises(ConfigError, match='made for 1 rows, need 2') as e: g(more.expand(2, -1), 5, cache=cache)
    assert complete(e.value)

# --- models that are left to model.generate

def test_fallback():
    "One warning, the same tokens, the same seeds"
    model = model_of('gpt2', hidden_size=144)
    warn_once.cache_clear()
    ids,mask = prompt(model, 3, True)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for _ in range(2): out,report = generate(model, ids, 8, attention_mask=mask, report=True)
    found = [o for o in w if issubclass(o.category, HLWQPerformanceWarning)]
    assert len(found) == 1 and 'GPT2LMHeadModel' in str(found[0].message) and 'not tried with models of type gpt2' in str(found[0].message)
    assert torch.equal(out, theirs(model, ids, mask, new=8))
    assert report.fallback and report.first_seconds > 0 and 'model.generate' in repr(report) and report.prompt_tokens == mask.sum()
    draws = [generate(model, ids, 8, attention_mask=mask, do_sample=True, temperature=1.5, top_k=30, seed=s).tolist() for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]

def test_fallback_keeps_the_rest():
    "Penalty, end tokens and stop strings arrive at model.generate; a dynamic cache goes there too"
    model,t = model_of(TINY),tokenizer()
    ids = encode('Once upon a time')
    dynamic = lambda: transformers.DynamicCache(config=model.config)
    free = generate(model, ids, 20, repetition_penalty=1.2)
    assert torch.equal(generate(model, ids, 20, repetition_penalty=1.2, cache=dynamic()), free)
    end = int(free[0, 12])
    assert torch.equal(generate(model, ids, 20, repetition_penalty=1.2, eos_token_id=end, cache=dynamic()), generate(model, ids, 20, repetition_penalty=1.2, eos_token_id=end))
    assert torch.equal(generate(model, ids, 20, stop=[' the'], tokenizer=t, cache=dynamic()), generate(model, ids, 20, stop=[' the'], tokenizer=t))

@pytest.mark.parametrize('words,change', [('sliding', dict(sliding_window=8)), ('dynamic positions', dict(rope_parameters=dict(rope_type='dynamic', rope_theta=1e4, factor=2.)))])
def test_reasons(words, change):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model('mistral', **{**SIZES, **change})).eval()
    assert words in why_not(model).lower()
    ids,mask = prompt(model, 2, True)
    assert torch.equal(generate(model, ids, 12, attention_mask=mask, eos_token_id=[]), theirs(model, ids, mask, new=12, eos_token_id=[]))

# --- requests that cannot be met

IDS = torch.tensor([[5, 6, 7, 8]])
BAD = [('input_ids: torch.int64 of shape', dict(input_ids=IDS[0])), ('input_ids: list', dict(input_ids=[[1]])), ('input_ids: torch.float32', dict(input_ids=IDS.float())), ('shape \\(1, 0\\)', dict(input_ids=IDS[:, :0])),
    ('ids from 5 to 9000', dict(input_ids=IDS.clone().fill_(5).index_fill_(1, torch.tensor([0]), 9000))), ('ids from -1', dict(input_ids=IDS-6)), ('max_new_tokens: 0', dict(max_new_tokens=0)), ('max_new_tokens: 2.0', dict(max_new_tokens=2.)),
    ('4 tokens and 8,189 new ones are 8,193, need at most 8,192', dict(max_new_tokens=8189)), ('attention_mask: shape', dict(attention_mask=torch.ones(1, 3))), ('left only', dict(attention_mask=torch.tensor([[1, 1, 1, 0]]))),
    ('left only', dict(attention_mask=torch.tensor([[1, 0, 1, 1]]))), ('left only', dict(attention_mask=torch.zeros(1, 4))), ('temperature: 0', dict(do_sample=True, temperature=0)), ('temperature: -1', dict(do_sample=True, temperature=-1)),
    ('without do_sample', dict(temperature=.5)), ('top_k: 0', dict(do_sample=True, top_k=0)), ('top_k: 1.5', dict(do_sample=True, top_k=1.5)), ('top_p: 0', dict(do_sample=True, top_p=0)), ('top_p: 1.1', dict(do_sample=True, top_p=1.1)),
    ('min_p: 2', dict(do_sample=True, min_p=2)), ('repetition_penalty: 0', dict(repetition_penalty=0)), ('without a tokenizer', dict(stop='a')), ('not empty', dict(stop=[''])), ('not empty', dict(stop=[5])),
    ('streamer: str', dict(streamer='stdout')), ('prefill_chunk: 0', dict(prefill_chunk=0))]

@pytest.mark.parametrize('words,asked', BAD, ids=[f'{i}-{b[0][:20]}' for i,b in enumerate(BAD)])
def test_refused(words, asked, monkeypatch):
    "Before anything is computed, with an error that says what to do"
    model = model_of(TINY)
    monkeypatch.setattr(model, 'forward', lambda *a, **k: pytest.fail('something was computed'))
    with pytest.raises(ConfigError, match=words) as e: generate(model, **{'input_ids':IDS, 'max_new_tokens':4, **asked})
    assert complete(e.value), e.value

def test_training_mode():
    model = model_of('llama')
    try:
        with pytest.raises(ConfigError, match='in training mode') as e: generate(model.train(), IDS)
        assert complete(e.value)
    finally: model.eval()

def test_up_to_the_limit():
    model = model_of('llama')                                   # 128 positions
    ids,mask = prompt(model, 1, False)
    out = generate(model, ids, 117, eos_token_id=[])
    assert out.shape[1] == 128
    same_tokens(model, out, theirs(model, ids, new=117, eos_token_id=[]), mask, 11)

# --- the report

def test_report():
    out,r = generate(model_of(TINY), encode('Once upon a time'), 12, eos_token_id=[], report=True)
    assert (r.rows, r.new_tokens, r.prompt_tokens) == (1, 12, out.shape[1]-12) and r.capture_seconds is None and not r.fallback
    assert r.prompt_tokens_per_second == r.prompt_tokens/r.first_seconds and r.decode_tokens_per_second == 11/r.decode_seconds and r.peak_bytes > 1e6
    assert all(w in repr(r) for w in ('tokens/s', 'first token', 'peak memory')) and r._repr_markdown_().startswith('| | | |\n|---|')
    one = generate(model_of(TINY), encode('Once'), 1, report=True)[1]
    assert one.decode_tokens_per_second is None and ' -' in repr(one)
    told = json.loads(json.dumps(r.to_json()))
    assert told['decode_tokens_per_second'] == r.decode_tokens_per_second and told['step'] == 'transformers' and {*told} > {'rows', 'new_tokens', 'first_seconds', 'peak_bytes', 'fallback', 'no_kernels'}

def test_report_of_the_step():
    "The row says what computed the tokens, and why it was not something faster"
    row = lambda r: next((o for o in r._repr_markdown_().splitlines() if o.startswith('| step')), None)
    some = dict(rows=1, prompt_tokens=5, new_tokens=5, first_seconds=.1, decode_seconds=.1)
    assert row(GenerationReport(**some)) is None and row(GenerationReport(**some, step='kernels, recorded')) == '| step | kernels, recorded |  |'
    assert row(GenerationReport(**some, step='transformers', no_kernels='triton is not installed')) == '| step | transformers | no kernels: triton is not installed |'
    r = generate(model_of('gpt2'), IDS, 4, report=True)[1]
    assert (r.step, r.no_kernels) == ('model.generate', '') and row(r) == f'| step | model.generate | because {r.fallback} |'

@pytest.fixture
def pretend(monkeypatch):
    "Lets generators take the CPU for a CUDA device: steps go through recordings, which run the step again"
    class Stream:
        def wait_stream(self, other): pass
        def __enter__(self): return self
        def __exit__(self, *_): pass
    now,buffers = [Stream()],HLWQGenerator._buffers
    def as_cuda(self, rows, needed, cache):
        b = buffers(self, rows, needed, cache)
        b.device = SimpleNamespace(type='cuda')
        return b
    def record_prompt(self, b, start, padded, inputs):
        held,flags = [o.clone() for o in inputs],[dict(o) for o in linear_flags(b.cache)]
        logits = torch.full((len(held[0]), model_of('llama').config.vocab_size), torch.nan)
        def replay():
            for o,was in zip(linear_flags(b.cache), flags): o.update(was)
            logits.copy_(self._run(b, start, padded, *held))
        return SimpleNamespace(replay=replay),held,logits
    def record(self, b, key):
        b.graphs[key],self.capture_seconds = SimpleNamespace(replay=lambda: self._step(b)),.1
    monkeypatch.setattr(HLWQGenerator, '_buffers', as_cuda); monkeypatch.setattr(HLWQGenerator, '_record', record); monkeypatch.setattr(RecordedPrompts, '_record', record_prompt)
    monkeypatch.setattr(sys.modules['hlwq.generate'], 'why_no_kernels', lambda device: '')
    for name,f in dict(Stream=Stream, stream=lambda s: s, current_stream=lambda: now[0], set_stream=lambda s: now.__setitem__(0, s), synchronize=lambda device: None,
        reset_peak_memory_stats=lambda device: None, memory_allocated=lambda device: 0, max_memory_allocated=lambda device: 1, mem_get_info=lambda device: (1 << 40, 1 << 40)).items(): monkeypatch.setattr(torch.cuda, name, f)
    return now

class TheirStep: # has the interface of DecodeStep and computes with transformers
    def __init__(self, g): self.g = g
    def bind(self, b): pass
    def join(self): pass
    def read(self, b, ids, positions, mask, real=None): return self.g._logits(b, ids, positions, prompt_mask(torch.ones_like(ids).bool(), 0, ids.shape[1], b.width) if mask is None else mask, real)
    def __call__(self, b):
        b.show(b.capacity)
        b.visible.index_fill_(3, b.slot, True)
        return self.g._logits(b, b.token, b.position, b.visible)

@pytest.mark.parametrize('kernels', [True, False])
def test_recorded(pretend, kernels):
    "Recorded means that a recording was replayed, which short texts do not live to see"
    model = model_of('llama')
    ids,mask = prompt(model, 2, True)
    g = HLWQGenerator(model, use_kernels=kernels)
    if kernels: g.step = TheirStep(g)
    what,ask = 'kernels' if kernels else 'transformers',dict(attention_mask=mask, eos_token_id=[])
    for new,recorded in ((1, False), (2, False), (20, True), (2, True), (1, False)):
        assert torch.equal(g(ids, new, **ask), theirs(model, ids, mask, new=new, eos_token_id=[]))
        assert g.report.step == what + ', recorded'*recorded and g.report.no_kernels == '' and (g.report.capture_seconds is not None) == (new == 20)
    plain = HLWQGenerator(model, use_kernels=kernels, use_graphs=False)
    if kernels: plain.step = TheirStep(plain)
    plain(ids, 20, **ask)
    assert plain.report.step == what

def test_recorded_prompts(pretend, monkeypatch):
    "From the second prompt of a length on a recording reads it; lengths are rounded up by padding where the model has room for it"
    monkeypatch.setattr(HLWQGenerator, '_padding', lambda self, n, more, cache: padded_length(n, 32)-n if n+more < 100 else 0)
    model = copy.deepcopy(model_of('llama'))
    g = HLWQGenerator(model, prefill_chunk=32)
    g.step = TheirStep(g)
    for n,new,replayed in ((5, 4, False), (9, 4, True), (16, 4, False), (7, 3, True), (40, 4, False), (36, 9, True), (20, 4, True), (96, 8, False), (96, 8, True)):
        ids = torch.randint(0, 64, (2, n), generator=torch.Generator().manual_seed(n))
        out = g(ids, new, attention_mask=torch.ones_like(ids), eos_token_id=[])
        assert torch.equal(out, theirs(model, ids, new=new, eos_token_id=[])) and torch.equal(out[:, :n], ids)
        assert g.buffers.prompts.replayed == replayed and g.report.prompt_tokens == 2*n, n
    kept = g.buffers.prompts.kept
    assert len(kept) == 7 and sum(isinstance(o, tuple) for o in kept.values()) == 6
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())      # moved
    g(ids, 1, attention_mask=torch.ones_like(ids), eos_token_id=[])
    assert len(g.buffers.prompts.kept) == 3 and not g.buffers.prompts.replayed

def test_why_no_kernels(pretend, monkeypatch):
    model = model_of('qwen3_next')
    ids = prompt(model, 1, False)[0]
    def told(g, **kw): g(ids, 2, **kw); return g.report.step,g.report.no_kernels
    step,why = told(HLWQGenerator(model))
    assert step == 'transformers' and 'interleaved' in why
    assert told(HLWQGenerator(model, use_kernels=False)) == ('transformers', '')
    assert told(HLWQGenerator(model), cache=static_cache(model.config, 32)) == ('transformers', 'the cache is that of the caller')
    monkeypatch.setattr(sys.modules['hlwq.generate'], 'why_no_kernels', lambda device: 'HLWQ_KERNELS=off')
    g = HLWQGenerator(model)
    assert told(g) == ('transformers', 'HLWQ_KERNELS=off') and 'no kernels: HLWQ_KERNELS=off' in repr(g.report)

# --- memory

def held(layer): return [layer.keys, layer.values] if hasattr(layer, 'max_cache_len') else [layer.conv_states[0], layer.recurrent_states[0]]

@pytest.mark.parametrize('kind', [TINY, *ARCHITECTURES])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_cache_bytes(kind, dtype):
    "What is predicted is what transformers allocates"
    model = model_of(kind) if dtype == torch.float32 else None if kind == TINY else copy.deepcopy(model_of(kind)).to(dtype)
    if model is None: return
    for rows in (1, 3):
        g = HLWQGenerator(model)
        g(prompt(model, rows, False)[0], 2, eos_token_id=[])
        assert cache_bytes(model.config, rows, g.buffers.capacity, dtype) == sum(t.nbytes for o in g.buffers.cache.layers for t in held(o))

@pytest.mark.parametrize('error,full', [(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'), True), (MemoryError(), True), (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True), (RuntimeError('shapes do not fit'), False), (NotImplementedError('no'), False)])
def test_what_is_missing_memory(error, full):
    assert out_of_memory(error) == full
    try:
        try: raise error
        except Exception: raise RuntimeError('operation failed due to a previous error during capture')
    except RuntimeError as e: assert out_of_memory(e) == full

def test_no_machine_has_so_much():
    model = copy.deepcopy(model_of('llama'))
    model.config.max_position_embeddings = 10**17
    ids,_ = prompt(model, 2, False)
    g = HLWQGenerator(model)
    want = g(ids, 10, eos_token_id=[])
    with pytest.raises(ConfigError, match=r'^cpu: out of memory for 2 rows of 10,000,000,000,000,256 tokens, need 20480000.00 TB for their cache') as e: g(ids, 10**16)
    assert complete(e.value) and all(o in str(e.value) for o in ('rows', 'max_new_tokens', 'prompt', 'prefill_chunk')) and g.buffers is None
    assert torch.equal(g(ids, 10, eos_token_id=[]), want)

@pytest.mark.parametrize('when', range(5))
def test_nothing_half_made_stays(when, monkeypatch):
    "Memory runs out in the n-th forward pass, of a chunk of the prompt or of a step: the cache is free at once, and the next text is right"
    model = model_of(TINY)
    g,ids,forward,passes,tensors = HLWQGenerator(model, prefill_chunk=4),prompt(model_of(TINY), 2, False)[0],model.forward,[],[]
    def full(*args, **kw):
        passes.append(kw['input_ids'].shape)
        out = forward(*args, **kw)
        tensors.extend(weakref.ref(t) for o in g.buffers.cache.layers for t in held(o))
        if len(passes) == when+1: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return out
    with monkeypatch.context() as m:
        m.setattr(model, 'forward', full)
        with pytest.raises(ConfigError, match='out of memory for 2 rows of 256 tokens, need') as e: g(ids, 20, eos_token_id=[])
        assert isinstance(e.value.__cause__, torch.OutOfMemoryError) and g.buffers is None and len(passes) == when+1
        assert tensors and not any(r() is not None for r in tensors), 'the error is still at hand, and holds no tensors'
    assert torch.equal(g(ids, 20, eos_token_id=[]), theirs(model, ids, new=20, eos_token_id=[]))

def test_memory_while_recording(pretend, monkeypatch):
    "A recording that is cut off raises an error of its own and leaves its stream in place"
    stream,side = pretend[0],object()
    class Recording:
        def __init__(self, graph): pass
        def __enter__(self): torch.cuda.set_stream(side)
        def __exit__(self, *_): raise RuntimeError('CUDA error: operation failed due to a previous error during capture')
    monkeypatch.setattr(HLWQGenerator, '_record', REAL_RECORD)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', SimpleNamespace); monkeypatch.setattr(torch.cuda, 'graph', Recording)
    model = model_of('llama')
    g,ids,choose = HLWQGenerator(model, use_kernels=False),prompt(model_of('llama'), 1, False)[0],HLWQGenerator._choose
    def full(self, b, logits):
        if pretend[0] is side: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        choose(self, b, logits)
    monkeypatch.setattr(HLWQGenerator, '_choose', full)
    with pytest.raises(ConfigError, match='out of memory for 1 row of 256 tokens'): g(ids, 20, eos_token_id=[])
    assert g.buffers is None and pretend[0] is stream
    step = HLWQGenerator._step
    monkeypatch.setattr(HLWQGenerator, '_choose', choose); monkeypatch.setattr(HLWQGenerator, '_step', lambda self, b: None if pretend[0] is side else step(self, b))    # nothing runs while it is recorded
    assert torch.equal(g(ids, 20, eos_token_id=[]), theirs(model, ids, new=20, eos_token_id=[]))   # memory was not missing: it goes on unrecorded
    assert pretend[0] is stream and not g.use_graphs and (g.report.step, g.report.capture_seconds) == ('transformers', None)

def test_memory_for_a_cache_that_is_brought(monkeypatch):
    model = model_of('llama')
    g,ids = HLWQGenerator(model),prompt(model_of('llama'), 1, False)[0]
    def full(*args, **kw): raise MemoryError
    monkeypatch.setattr(model, 'forward', full)
    with pytest.raises(ConfigError, match='out of memory'): g(ids, 5, cache=static_cache(model.config, 32))

def test_names():
    assert hlwq.generate is generate and hlwq.HLWQGenerator is HLWQGenerator and hlwq.GenerationReport is GenerationReport

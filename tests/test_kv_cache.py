"Quantized keys and values: the codec against its definition, content by way of feeding, every mode of generate against transformers' own cache"
import copy,inspect,itertools,random,warnings
from functools import lru_cache
import numpy as np,pytest,torch,transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from hlwq.core import ConfigError,HLWQWarning,UnsupportedError
from hlwq.hadamard import hadamard_matrix
from hlwq.lloyd_max import codebook
from hlwq.kv_cache import KV_PRESETS,HLWQCache,HLWQLayer,_spans,blocks_of,query_rms
from hlwq.kv_codec import _book,_pieces,_refine,block_nbytes,decode_blocks,decode_ref,empty_blocks,encode_blocks,head_parts,head_rotation
from kit import numpy_codes

transformers.logging.set_verbosity_error()
HEAD_DIMS = (64, 80, 96, 112, 128, 256)

def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=gen(seed)).to(dtype)
def uneven(*shape, seed=0): return randn(*shape, seed=seed)*torch.rand(shape[-1], generator=gen(seed+1)).mul(9) + randn(shape[-1], seed=seed+2)*3

# --- codec

@pytest.mark.parametrize('bits', (2, 3, 4, 5, 6, 8))
@pytest.mark.parametrize('d', (*HEAD_DIMS, 16, 48, 512))
def test_codes_mean_what_the_page_says(d, bits):
    "Bytes read by numpy from the description alone"
    x = uneven(2, 2, 256, d, seed=d+bits)
    for channels in (False, True):
        b = encode_blocks(x, bits, channels)
        codes = numpy_codes(b.codes.numpy(), bits).reshape(2, 2, 2, 128, d)
        c = codebook('lloyd-max', bits).centroids.numpy().astype(np.float64)[codes]
        H = np.zeros((d, d)); at = 0
        for m in head_parts(d): H[at:at+m, at:at+m] = hadamard_matrix(m).numpy(); at += m
        want = b.gains.double().numpy()[..., None]*(c @ H)
        if channels: want = b.means.double().numpy()[..., None, :] + b.scales.double().numpy()[..., None, :]*want
        want = torch.from_numpy(want.reshape(2, 2, 256, d))
        limit = 1e-6*float(want.abs().max())*8
        assert (decode_ref(b) - want).abs().max() < limit and (decode_blocks(b).double() - want).abs().max() < limit
        assert b.nbytes == 2*2*2*block_nbytes(d, bits, channels)

@pytest.mark.parametrize('d', HEAD_DIMS)
def test_error_is_that_of_the_codebook(d):
    "Gaussian vectors lose what theory says, which leaves no room for a mistake in rotation or gain"
    x = randn(1, 2, 1024, d, seed=d)
    for bits in (2, 3, 4, 5, 8):
        for channels in (False, True):
            error = float((decode_blocks(encode_blocks(x, bits, channels)) - x).norm()/x.norm())
            assert .88 < error/codebook('lloyd-max', bits).mse**.5 < 1.02 + .03*(bits == 8), (bits, error)

def test_codes_and_gain_are_refined_together():
    "Three rounds lower the error of the plain norm by what the page shows; more would not change much"
    z = randn(64, 4000)
    def error(*rounds): codes, gain = _refine(z, _book(3, z.device), *rounds); return float((codebook('lloyd-max', 3).centroids[codes.int()]*gain - z).norm()/z.norm())
    one, default, many = error(1), error(), error(10)
    assert default < one*.985 and many > default*.98
    assert error(3) == default

def test_rotation():
    for d in range(16, 513, 16):
        R = head_rotation(d)
        assert sum(head_parts(d)) == d and torch.equal(R, R.T) and (R @ R - torch.eye(d)).abs().max() < 1e-5

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float16))
def test_blocks_do_not_know_each_other(dtype, monkeypatch):
    "Together or alone, other rows, other heads, pieces of another size, other strides, other threads"
    x = uneven(3, 4, 640, 80, seed=5).to(dtype)
    b = encode_blocks(x, 5, True)
    for r,h,n in itertools.product(range(3), range(4), range(5)):
        one = encode_blocks(x[r:r+1, h:h+1, 128*n:128*n+128], 5, True)
        assert all(torch.equal(a, o[r:r+1, h:h+1, n:n+1]) for a,o in zip(one.tensors, b.tensors))
    strided = encode_blocks(x.transpose(1, 2).contiguous().transpose(1, 2), 5, True)
    assert all(torch.equal(*o) for o in zip(strided.tensors, b.tensors))
    whole, out = decode_blocks(b, dtype), torch.full((3, 4, 800, 80), torch.nan, dtype=dtype)[:, :, 100:740]
    assert torch.equal(decode_blocks(b, out=out), whole)
    import hlwq.kv_codec as m
    monkeypatch.setattr(m, '_pieces', lambda *a: _pieces(*a[:3], 1 << 20, a[4]))      # one row and one block at a time
    again = encode_blocks(x, 5, True)
    assert all(torch.equal(*o) for o in zip(again.tensors, b.tensors)) and torch.equal(decode_blocks(b, dtype), whole)

def test_pieces_cover_all_and_stay_small():
    for rows,heads,n,d in ((1, 2, 2048, 256), (4, 8, 7, 128), (64, 32, 3, 64), (1, 1, 1, 512), (3, 1, 0, 64)):
        seen = torch.zeros(rows, n, dtype=torch.int)
        for i,j in _pieces(rows, heads, n, d, torch.device('cpu')):
            part = seen[i, j]
            assert part.numel()*heads*128*d <= max(1 << 18, heads*128*d)
            part += 1
        assert (seen == 1).all()

def test_broken_numbers_stay_where_they_are():
    x = randn(2, 2, 256, 64)
    x[0, 0, 3, 7], x[1, 1, 200] = torch.nan, -torch.inf
    x[0, 1, 5], x[0, 1, 6], x[0, 1, 7] = 0, 1e-30, 1e30
    back = decode_blocks(encode_blocks(x, 4))
    bad = (~back.isfinite()).any(-1).nonzero().tolist()
    assert bad == [[0, 0, 3], [0, 1, 7], [1, 1, 200]]               # float16 has no 1e30, and says so
    assert (back[0, 1, 5:7] == 0).all()
    keys = decode_blocks(encode_blocks(x, 4, channels=True))
    assert keys[1, 0].isfinite().all() and not keys[0, 0, :128].isfinite().any() and keys[0, 0, 128:].isfinite().all()

def test_channels_that_do_not_vary():
    x = randn(1, 1, 128, 64)
    x[..., 3], x[..., 4] = 100., 0.
    back = decode_blocks(encode_blocks(x, 2, channels=True))
    assert (back[..., 3] - 100).abs().max() < 1e-2 and back[..., 4].abs().max() < 1e-3
    same = torch.ones(1, 1, 128, 64)*randn(64)
    assert (decode_blocks(encode_blocks(same, 2, channels=True)) - same).abs().max() < 1e-2

def test_scale_that_knows_the_queries_cannot_be_fooled():
    "Rescaling between keys and queries changes scales and means by powers of two, and no code"
    k, rms, factor = uneven(1, 2, 256, 64), torch.rand(2, 64, generator=gen()) + .1, torch.ones(64)
    factor[[3, 9, 40]] = torch.tensor([16., .25, 64.])
    a, b = encode_blocks(k, 3, True, rms), encode_blocks(k*factor, 3, True, rms/factor)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.gains, b.gains) and torch.equal(a.scales*factor, b.scales)
    assert not torch.equal(encode_blocks(k, 3, True).codes, encode_blocks(k*factor, 3, True).codes)

def test_attention_with_outliers():
    "What a cosine does not see: one norm a key fails where block statistics do not"
    k, q = randn(1, 1, 1024, 64), randn(1, 1, 64, 64, seed=1)
    factor, offset = torch.ones(64), torch.zeros(64)
    factor[[5, 21, 37, 53]], offset[[11, 27]] = 16., 100.
    hard, ask = k*factor + offset, q/factor
    def kl(k2): p, r = ((ask @ o.transpose(-1, -2)/8).log_softmax(-1) for o in (hard, k2)); return float((p.exp()*(p - r)).sum(-1).mean())
    good, bad = (decode_blocks(encode_blocks(hard, 4, c)) for c in (True, False))
    assert torch.cosine_similarity(bad, hard, dim=-1).min() > .98
    assert kl(good) < .02 and kl(bad) > .3

# --- what a layer holds

def content(layer):
    t = layer.length - min(layer.length, layer.sinks) - 128*layer.n_blocks
    parts = []
    for h in layer.halves:
        ring = [h.ring[:, :, s:s+l] for _,s,l in _spans(128*layer.n_blocks, t, h.ring.shape[2])]
        parts += [h.first[:, :, :layer.length], torch.cat([h.ring[:, :, :0], *ring], 2), *h.blocks[:layer.n_blocks].tensors]
    return parts

def same(a, b): return a.length == b.length and a.n_blocks == b.n_blocks and all(torch.equal(*o) for o in zip(content(a), content(b)))

def feed(layer, k, v, sizes, start=0):
    for n in sizes:
        out = layer.update(k[:, :, start:start+n], v[:, :, start:start+n])
        start += n
    assert start == k.shape[2]
    return out

def ways(n, seed=0):
    r,random_sizes,left = random.Random(seed),[],n
    while left: random_sizes.append(min(left, r.choice((1, 2, 5, 60, 127, 128, 129, 300)))); left -= random_sizes[-1]
    return [n],[1]*n,random_sizes

@pytest.mark.parametrize('heads,rows', ((1, 1), (2, 3), (3, 1), (8, 4)))
def test_heads_are_not_scrambled(heads, rows):
    "Several heads, a prompt and then one token at a time: what comes back is each head's own"
    n = 420
    k, v = (uneven(rows, heads, n, 64, seed=s) + randn(heads, 1, 64, seed=s+5) for s in (0, 10))
    layer = HLWQLayer()
    k_out, v_out = feed(layer, k, v, [200] + [1]*(n - 200))
    assert layer.n_blocks == 2
    for out,x in ((k_out, k), (v_out, v)):
        assert torch.cosine_similarity(out, x, dim=-1).mean(-1).min() > .99          # of each row and head
        mid = slice(4, 260)                                                          # the encoded part alone
        relative = (out - x)[:, :, mid].norm(dim=(-2, -1))/x[:, :, mid].norm(dim=(-2, -1))
        assert relative.max() < .12
        for at in (slice(0, 4), slice(260, n)): assert torch.equal(out[:, :, at], x[:, :, at])

@pytest.mark.parametrize('d,bits,residual,sinks,dtype', (
    (64, (4, 4), 128, 4, torch.bfloat16), (80, (3, 2), 128, 4, torch.float32), (96, (5, 8), 0, 4, torch.float16), (112, (2, 3), 32, 0, torch.float32),
    (128, (8, 5), 200, 1, torch.bfloat16), (256, (3, 3), 128, 7, torch.float32), (64, (16, 16), 128, 4, torch.bfloat16)))
def test_content_does_not_depend_on_feeding(d, bits, residual, sinks, dtype):
    n, rows, heads = 530, 2, 3
    k, v = (uneven(rows, heads, n, d, seed=s).to(dtype) for s in (d, d+7))
    layers = []
    for sizes in ways(n, seed=d):
        layers.append(HLWQLayer(*bits, residual=residual, sinks=sinks))
        feed(layers[-1], k, v, sizes)
    assert all(same(o, layers[0]) for o in layers) and layers[0].n_blocks == blocks_of(n, residual, sinks) > 1
    for r in range(rows):                                          # nor on the rows beside it
        alone = HLWQLayer(*bits, residual=residual, sinks=sinks)
        feed(alone, k[r:r+1], v[r:r+1], [n])
        assert all(torch.equal(a, b[r:r+1]) for a,b in zip(content(alone), content(layers[0])))
    reserved = HLWQLayer(*bits, residual=residual, sinks=sinks, reserve=n)
    feed(reserved, k, v, ways(n)[2])
    assert same(reserved, layers[0]) and reserved.halves[0].blocks.n_blocks == layers[0].n_blocks

@pytest.mark.parametrize('heads', range(1, 9))
@pytest.mark.parametrize('rows', (1, 4))
def test_feeding_with_any_heads_and_rows(heads, rows):
    k, v = (randn(rows, heads, 300, 64, seed=s, dtype=torch.bfloat16) for s in (heads, rows+20))
    layers = [HLWQLayer(3, 2) for _ in range(3)]
    for o,sizes in zip(layers, ways(300, heads)): feed(o, k, v, sizes)
    assert same(layers[0], layers[1]) and same(layers[0], layers[2])

def test_keys_and_values_of_different_sizes():
    "As latent attention makes them: 192 numbers a key, 128 a value"
    k, v = randn(2, 4, 300, 192), randn(2, 4, 300, 128, seed=1)
    layers = [HLWQLayer(4, 3) for _ in range(2)]
    for o,sizes in zip(layers, ways(300)): out = feed(o, k, v, sizes)
    assert same(*layers) and out[0].shape == k.shape and out[1].shape == v.shape
    for x,y,b in zip(out, (k, v), (4, 3)): assert (x - y).norm()/y.norm() < codebook('lloyd-max', b).mse**.5

def test_a_call_sees_its_own_tokens_exactly():
    k, v = (randn(1, 2, 900, 64, seed=s) for s in (0, 1))
    layer = HLWQLayer(2, 2)
    a = layer.update(k[:, :, :400], v[:, :, :400])
    assert torch.equal(a[0], k[:, :, :400]) and torch.equal(a[1], v[:, :, :400])
    before = layer.decode()
    b = layer.update(k[:, :, 400:], v[:, :, 400:])
    for out,x,o in zip(b, (k, v), before):
        assert torch.equal(out[:, :, 400:], x[:, :, 400:]) and torch.equal(out[:, :, :400], o)
        assert torch.equal(out[:, :, 260:400], x[:, :, 260:400]) and not torch.equal(out[:, :, 4:260], x[:, :, 4:260])

def test_encoded_once(monkeypatch):
    "512 tokens, whatever the feeding: two halves of a layer encode each block once"
    import hlwq.kv_cache as m
    seen = []
    def counted(x, *args): seen.append(x.shape[2]//128); return encode_blocks(x, *args)
    monkeypatch.setattr(m, 'encode_blocks', counted)
    k = randn(1, 1, 700, 64)
    for sizes in ways(700):
        seen.clear()
        feed(HLWQLayer(), k, k, sizes)
        assert sum(seen) == 2*blocks_of(700)

def test_memory_that_nobody_wrote_is_never_read():
    k, v = (randn(2, 2, 700, 64, seed=s) for s in (0, 1))
    for sizes in ways(700):
        layer = HLWQLayer(4, 3, reserve=2000)
        layer.lazy_initialization(k[:, :, :0], v[:, :, :0])
        for h in layer.halves:
            for t in (h.first, h.ring, *h.blocks.tensors): t.fill_(255 if t.dtype == torch.uint8 else torch.nan)
        at = [t.data_ptr() for h in layer.halves for t in (h.first, h.ring, *h.blocks.tensors)]
        for out in feed(layer, k, v, sizes): assert out.isfinite().all()
        for out in layer.decode(): assert out.isfinite().all()
        assert at == [t.data_ptr() for h in layer.halves for t in (h.first, h.ring, *h.blocks.tensors)]       # reserved memory does not move

@pytest.mark.parametrize('seed', range(6))
def test_any_order_of_operations(seed):
    "Exact blocks and transformers' own layer, through the same random operations"
    r,mine,own,count = random.Random(seed),HLWQLayer(16, 16, residual=r0 if (r0 := (0, 128, 50)[seed % 3]) else 0, sinks=(4, 0)[seed % 2]),DynamicLayer(),0
    rows = 2
    for step in range(60):
        n,op = mine.get_seq_length(),r.choice(('feed',)*6 + ('crop', 'crop', 'reorder', 'repeat', 'select', 'copy', 'offload', 'reset'))
        if op == 'feed' or not n:
            size = r.choice((1, 1, 3, 90, 128, 260))
            k, v = (randn(rows, 2, size, 32, seed=1000*seed + 2*step + s) for s in (0, 1))
            got, want = mine.update(k, v), own.update(k, v)
            assert all(torch.equal(*o) for o in zip(got, want))
        elif op == 'crop':
            size = min(r.choice((0, 1, 20, 130, 300, 10**6)), n if n < 200 else n - 1)
            mine.crop(-size)
            if size < n: own.crop(-size)
            else: own,rows = DynamicLayer(),rows
        elif op == 'reorder':
            idx = torch.tensor([r.randrange(rows) for _ in range(rows)])
            mine.reorder_cache(idx); own.reorder_cache(idx)
        elif op == 'repeat' and rows < 5: mine.batch_repeat_interleave(2); own.batch_repeat_interleave(2); rows *= 2
        elif op == 'select' and rows > 2:
            idx = torch.tensor(sorted(r.sample(range(rows), 2)))
            mine.batch_select_indices(idx); own.batch_select_indices(idx); rows = 2
        elif op == 'copy': mine = copy.deepcopy(mine)
        elif op == 'offload': mine.offload(); mine.prefetch()
        elif op == 'reset' and r.random() < .3: mine.reset(); own,rows = DynamicLayer(),r.choice((1, 2))
        assert mine.get_seq_length() == own.get_seq_length() and mine.get_mask_sizes(3) == own.get_mask_sizes(3)
        if mine.get_seq_length(): assert torch.equal(mine.decode()[0], own.keys) and torch.equal(mine.decode()[1], own.values)

def test_crop_of_codes():
    "Within the ring a crop leaves no trace; deeper, what stays is what was seen before"
    k, v = (randn(2, 3, 900, 64, seed=s) for s in (0, 1))
    fresh = HLWQLayer(3, 3)
    feed(fresh, k, v, [900])
    layer = HLWQLayer(3, 3)
    feed(layer, k, v, [900])
    layer.crop(-100); feed(layer, k, v, [40, 60], 800)
    assert same(layer, fresh)
    for n in (700, 300, 133, 5, 3, 0):
        before = layer.decode()
        layer.crop(n - layer.length)
        assert layer.length == n and all(torch.equal(a[:, :, :n], b) for a,b in zip(before, layer.decode()))
    feed(layer, k, v, [900])
    assert same(layer, fresh)

def test_reorder_of_codes():
    k, v = (randn(3, 2, 500, 64, seed=s) for s in (0, 1))
    layer, idx = HLWQLayer(), torch.tensor([2, 0, 0])
    feed(layer, k, v, [500])
    layer.reorder_cache(idx)
    want = HLWQLayer()
    feed(want, k[idx], v[idx], [500])
    assert same(layer, want)
    more = randn(3, 2, 300, 64, seed=9)
    assert all(torch.equal(*o) for o in zip(feed(layer, more, more, [1]*300), feed(want, more, more, [1]*300)))

def test_inference_mode_comes_and_goes():
    k = randn(1, 2, 800, 64)
    layer, want = HLWQLayer(), HLWQLayer()
    with torch.inference_mode(): feed(layer, k[:, :, :400], k[:, :, :400], [300, 100])
    layer.update(k[:, :, 400:500], k[:, :, 400:500])
    with torch.inference_mode():
        layer.reorder_cache(torch.tensor([0])); layer.crop(-250)
        layer.update(k[:, :, 250:700], k[:, :, 250:700])
    with torch.no_grad(): layer.update(k[:, :, 700:], k[:, :, 700:])
    assert layer.length == 800 and all(o.isfinite().all() for o in layer.decode())

def test_gradients_flow_through_new_tokens():
    k, v = (randn(1, 2, 400, 64, seed=s) for s in (0, 1))
    layer = HLWQLayer()
    layer.update(k, v)
    new = randn(1, 2, 3, 64).requires_grad_()
    a, b = layer.update(new, new*2)
    (a.sum() + b.sum()).backward()
    assert torch.equal(new.grad, torch.full_like(new, 3.))

def test_growth_wastes_little():
    layer, x = HLWQLayer(), randn(1, 1, 1, 16)
    for n in (128*300, 128*40, 1, 128*3, 128*20): layer.update(x.expand(1, 1, n, 16), x.expand(1, 1, n, 16))
    assert 0 <= layer.halves[0].blocks.n_blocks - layer.n_blocks <= 32

# --- models

def tiny(kind, **kwargs):
    torch.manual_seed(0)
    base = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=.3)
    extra = dict(llama={}, mistral=dict(sliding_window=40), gemma3_text=dict(sliding_window=40, layer_types=['sliding_attention', 'full_attention', 'sliding_attention'], num_hidden_layers=3),
        qwen3_5_moe_text=dict(num_hidden_layers=4, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=16, linear_value_head_dim=16, layer_types=['linear_attention']*3 + ['full_attention']))[kind]
    config = transformers.CONFIG_MAPPING[kind](**base | extra | kwargs)
    return transformers.AutoModelForCausalLM.from_config(config).eval()

MODELS = ('llama', 'gemma3_text', 'qwen3_5_moe_text', 'mistral')
@lru_cache
def model_of(kind): return tiny(kind)
def cache_name(model): return 'cache' if 'cache' in inspect.signature(model.forward).parameters else 'past_key_values'

def generate(model, ids, cache, n=10, mask=None, **kwargs):
    torch.manual_seed(1)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=n, **{cache_name(model):cache}, **{'do_sample':False, **kwargs})

def tokens(rows=1, n=150, seed=0): return torch.randint(2, 97, (rows, n), generator=gen(seed))
def exact_cache(model, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', HLWQWarning)
        return HLWQCache(model.config, 16, 16, **{'residual':0, **kwargs})      # no residual: blocks are made early, and often

MODES = dict(greedy={}, sampling=dict(do_sample=True, top_k=20), beams=dict(num_beams=3), sampled_beams=dict(num_beams=2, do_sample=True), answers=dict(do_sample=True, num_return_sequences=3),
    beams_and_answers=dict(num_beams=4, num_return_sequences=2), chunks=dict(prefill_chunk_size=37))

@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('mode', MODES)
def test_exact_blocks_give_the_tokens_of_transformers(kind, mode):
    model = model_of(kind)
    ids = tokens(2)
    mask = torch.ones_like(ids); mask[1, :61] = 0                                # padded on the left
    cache = exact_cache(model)
    got, want = (generate(model, ids.masked_fill(mask == 0, 0), c, mask=mask, **MODES[mode]) for c in (cache, DynamicCache(config=model.config)))
    assert torch.equal(got, want)
    if cache.quantized: assert cache.quantized[0].n_blocks == 1

@pytest.mark.parametrize('kind', ('llama', 'gemma3_text'))
def test_assisted_decoding(kind):
    model, ids = model_of(kind), tokens(1, 20).repeat(1, 7)
    if kind == 'gemma3_text': model = tiny(kind, sliding_window=500)
    cache = exact_cache(model)
    got, want = (generate(model, ids, c, n=30, prompt_lookup_num_tokens=5) for c in (cache, DynamicCache(config=model.config)))
    assert torch.equal(got, want) and cache.get_seq_length() >= 168
    assert generate(model, ids, HLWQCache(model.config), n=30, prompt_lookup_num_tokens=5).shape == (1, 170)

@pytest.mark.parametrize('kind', MODELS)
def test_conversation(kind):
    model = model_of(kind)
    def talk(cache):
        ids = tokens(1, 120)
        for s in range(4): ids = torch.cat([generate(model, ids, cache, n=15), tokens(1, 30, s)], 1)
        return ids
    assert torch.equal(talk(exact_cache(model)), talk(DynamicCache(config=model.config)))

@pytest.mark.parametrize('kind', ('llama', 'qwen3_5_moe_text'))
@pytest.mark.parametrize('bits', (*KV_PRESETS.values(), (2, 2), (8, 5)))
@pytest.mark.filterwarnings('ignore:HLWQCache')
def test_codes_in_all_modes(kind, bits):
    model = model_of(kind)
    for mode,kwargs in MODES.items():
        cache = HLWQCache(model.config, *bits, residual=0)
        out = generate(model, tokens(2), cache, n=4, **kwargs)
        assert out.shape == (2*kwargs.get('num_return_sequences', 1), 154) and cache.quantized[0].n_blocks == 1, mode

def test_eight_bits_are_nearly_exact():
    model, ids = model_of('llama'), tokens(2, 400)
    name = cache_name(model)
    def logits(cache):
        with torch.no_grad(): return torch.cat([model(ids[:, a:b], **{name:cache}).logits for a,b in ((0, 300), (300, 301), (301, 400))], 1)
    want = logits(DynamicCache(config=model.config))
    errors = [float((logits(HLWQCache(model.config, b, b)) - want).norm()/want.norm()) for b in (8, 5, 4, 3)]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3] < .5 and errors[0] < .02, errors

def test_chunks_that_end_with_a_block_are_as_good_as_single_tokens():
    "Within such a chunk every token sees the same blocks as if it had come alone, so benchmarks may feed it whole"
    model, ids = model_of('llama'), tokens(1, 700)
    name = cache_name(model)
    def logits(sizes):
        cache, a, out = HLWQCache(model.config, 3, 3), 300, []
        with torch.no_grad():
            model(ids[:, :300], **{name:cache})
            for n in sizes: out.append(model(ids[:, a:a+n], **{name:cache}).logits); a += n
        return torch.cat(out, 1), cache
    one, _ = logits([1]*400)
    chunks, _ = logits([88, 128, 128, 56])                     # 388, 516, 644: where the number of blocks changes
    whole, _ = logits([400])
    assert 20*(chunks - one).abs().mean() < (whole - one).abs().mean()

def test_one_row_of_a_padded_batch():
    "The same tokens alone, padded the same way, leave the same codes"
    model, ids = model_of('llama'), tokens(2, 300)
    mask = torch.ones_like(ids); mask[1, :77] = 0
    both, alone = (HLWQCache(model.config, residual=0) for _ in range(2))
    a, b = generate(model, ids, both, n=5, mask=mask), generate(model, ids[1:], alone, n=5, mask=mask[1:])
    assert torch.equal(a[1:], b)

def test_rows_of_a_hybrid():
    "transformers' linear layers cannot repeat or select rows; the cache does it for them"
    model, ids = model_of('qwen3_5_moe_text'), tokens(2, 200)
    name = cache_name(model)
    def after(f, cache):
        with torch.no_grad(): model(ids, **{name:cache}); f(cache); return model(tokens(2, 1, 5), **{name:cache}).logits
    plain = after(lambda c: None, exact_cache(model))
    moved = after(lambda c: (c.batch_repeat_interleave(3), c.batch_select_indices(torch.tensor([0, 5]))), exact_cache(model))
    assert torch.equal(plain, moved)
    turned = after(lambda c: c.reorder_cache(torch.tensor([1, 1])), exact_cache(model))
    assert not torch.equal(turned, plain)

def test_reset_and_use_again():
    model, ids = model_of('qwen3_5_moe_text'), tokens(1, 300)
    cache = HLWQCache(model.config)
    first = generate(model, ids, cache)
    memory = cache.memory().nbytes
    cache.reset()
    assert cache.get_seq_length() == 0 and torch.equal(generate(model, ids, cache), first) and cache.memory().nbytes == memory
    model = model_of('llama')
    cache = HLWQCache(model.config)
    for rows in (1, 3):                                            # another number of rows: new memory
        want = generate(model, tokens(rows, 300), HLWQCache(model.config))
        assert torch.equal(generate(model, tokens(rows, 300), cache), want)
        cache.reset()

def test_layers_are_those_of_transformers():
    for kind in MODELS:
        model = model_of(kind)
        with warnings.catch_warnings(): warnings.simplefilter('ignore', HLWQWarning); mine = HLWQCache(model.config)
        own = DynamicCache(config=model.config)
        for a,b in zip(mine.layers, own.layers, strict=True): assert type(a) is (HLWQLayer if type(b) is DynamicLayer else type(b))
        assert mine.is_sliding == own.is_sliding and mine.is_linear == own.is_linear and mine.is_compileable is False

def test_mask_sizes_and_positions():
    model = model_of('qwen3_5_moe_text')
    mine, own = HLWQCache(model.config), DynamicCache(config=model.config)
    for n in (0, 300, 1):
        if n:
            for c in (mine, own):
                with torch.no_grad(): model(tokens(1, n), **{cache_name(model):c})
        assert mine.get_seq_length() == own.get_seq_length() and mine.get_mask_sizes(5, 3) == own.get_mask_sizes(5, 3) and mine.get_max_length() == own.get_max_length()

def test_query_rms_of_a_model():
    "Measured where attention sees the queries; leaves the model as it was, and no rescaling in the weights can fool it"
    model, ids = tiny('llama'), tokens(2, 200)
    before = model(ids).logits
    sizes = query_rms(model, ids)
    assert model.config._attn_implementation == 'sdpa' and torch.equal(model(ids).logits, before) and {k:o.shape for k,o in sizes.items()} == dict.fromkeys(range(2), (2, 16))
    def codes(model): c = HLWQCache(model.config, residual=0, query_rms=query_rms(model, ids)); generate(model, ids, c); return c.quantized[1].halves[0].blocks.codes
    plain = codes(model)
    with torch.no_grad():
        scale = torch.ones(2, 16); scale[0, [3, 11]] = 16.; scale[1, [2, 10]] = .25     # rotary pairs
        for o in model.model.layers: o.self_attn.k_proj.weight *= scale.view(-1, 1); o.self_attn.q_proj.weight /= scale.repeat_interleave(2, 0).view(-1, 1)
    assert (codes(model) == plain).float().mean() > .97            # rounding of the sums apart

# --- errors

@pytest.mark.parametrize('kwargs,error,text', (
    (dict(k_bits=7), UnsupportedError, 'k_bits: 7, need one of 2, 3, 4, 5, 6, 8'), (dict(v_bits=1), UnsupportedError, 'v_bits: 1'), (dict(k_bits=4.0), UnsupportedError, 'k_bits: 4.0'),
    (dict(v_bits=True), UnsupportedError, 'v_bits: True'), (dict(residual=-1), ConfigError, 'residual: -1'), (dict(sinks=1.5), ConfigError, 'sinks: 1.5'), (dict(reserve='all'), ConfigError, "reserve: 'all'")))
def test_bad_arguments(kwargs, error, text):
    with pytest.raises(error, match=text): HLWQCache(model_of('llama').config, **kwargs)

@pytest.mark.parametrize('d', (20, 100, 8, 528))
def test_bad_head_dim(d):
    with pytest.raises(UnsupportedError, match=f'head_dim: {d}, need a multiple of 16 from 16 to 512'): HLWQCache(transformers.LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=d))
    with pytest.raises(UnsupportedError, match=f'head_dim: {d}'): HLWQLayer().update(randn(1, 1, 3, d), randn(1, 1, 3, 64))
    with pytest.raises(UnsupportedError, match=f'head_dim: {d}'): HLWQLayer().update(randn(1, 1, 3, 64), randn(1, 1, 3, d))

def test_bad_config():
    with pytest.raises(ConfigError, match='config: dict, need the config'): HLWQCache({})
    with pytest.raises(UnsupportedError, match='encoder-decoder'): HLWQCache(transformers.T5Config())
    with pytest.raises(ConfigError, match="preset: 'Q7', need one of Q4, Q3, Q2"): HLWQCache.preset(model_of('llama').config, 'Q7')

def test_unknown_layers_are_named():
    config = copy.deepcopy(model_of('llama').config)
    config.layer_types = ['full_attention', 'hybrid']
    with pytest.raises(UnsupportedError, match="layer 1 of type 'hybrid'"): HLWQCache(config)
    object.__setattr__(config, 'layer_types', ['full_attention', 'telepathy'])
    with pytest.raises(UnsupportedError, match="'telepathy'"): HLWQCache(config)

def test_nothing_to_quantize_is_said():
    from hlwq.core import warn_once
    warn_once.cache_clear()
    with pytest.warns(HLWQWarning, match='none of the 2 layers caches full attention'): HLWQCache(model_of('mistral').config)
    with pytest.warns(HLWQWarning, match='keys of 2 bits are experimental'): HLWQCache(model_of('llama').config, 2, 2)

def test_wrong_tokens_are_refused():
    layer, k = HLWQLayer(), randn(2, 2, 10, 64)
    layer.update(k, k)
    for bad in (k[:1], k[:, :1], k[..., :32], k.half()):
        with pytest.raises(ConfigError, match='keys or values'): layer.update(bad, bad)
        with pytest.raises(ConfigError, match='keys or values'): layer.update(k, bad)
    assert layer.length == 10 and torch.equal(layer.update(k, k)[0], torch.cat([k, k], 2))

def test_crop_is_refused_before_anything_changes():
    model = model_of('qwen3_5_moe_text')
    cache = HLWQCache(model.config)
    with torch.no_grad(): model(tokens(1, 300), **{cache_name(model):cache})
    with pytest.raises(UnsupportedError, match='crop: layer 0 is a LinearAttentionLayer'): cache.crop(-1)
    with pytest.raises(ConfigError, match='crop: 5, need a negative number'): cache.crop(5)
    assert cache.get_seq_length() == 300

# --- memory

def qwen(**kwargs): return transformers.Qwen3_5MoeTextConfig(num_key_value_heads=2, head_dim=256, max_position_embeddings=262_144, **kwargs)

@pytest.mark.filterwarnings('ignore:HLWQCache')
def test_memory_of_the_big_model():
    "Ten layers of two heads of 256 at 262,144 tokens"
    sizes = {b:HLWQCache(qwen(), *b).memory('full') for b in ((4, 4), (3, 3), (3, 2), (2, 2))}
    assert len(HLWQCache(qwen()).quantized) == 10
    for (k,v),m in sizes.items():
        blocks = (262_144 - 132)//128
        want = 10*2*(blocks*(128*32*(k + v) + 2*128*2 + 2*2*256) + 260*256*2*2)
        assert m.nbytes == want and m.baseline == 5_368_709_120 and m.spare == 0
    assert sizes[4,4].nbytes <= 1.45e9 and sizes[2,2].nbytes <= .80e9 and sizes[4,4].ratio > 3.7 and sizes[2,2].ratio > 7.1

@pytest.mark.parametrize('bits', ((4, 4), (3, 2), (8, 5), (16, 16)))
def test_arithmetic_is_what_is_allocated(bits):
    config, n = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64), 700
    cache, x = HLWQCache(config, *bits, reserve=n), randn(3, 2, n, 64, dtype=torch.bfloat16)
    foretold = cache.memory(n, rows=3)
    for i in range(2): cache.update(x, x, i)
    now = cache.memory()
    real = sum(t.nbytes for o in cache.layers for h in o.halves for t in (h.first, h.ring, *h.blocks.tensors))
    assert now.nbytes == real == foretold.nbytes and now.spare == 0 and now.baseline == foretold.baseline == 2*3*2*n*64*2*2 and (now.tokens, now.rows) == (n, 3)
    more = HLWQCache(config, *bits)
    for i in range(2):
        for a in range(0, n, 20): more.update(x[:, :, a:a+20], x[:, :, a:a+20], i)
    m = more.memory()
    assert m.nbytes == sum(o.nbytes for o in more.quantized) and m.spare >= 0 and m.codes == now.codes
    assert HLWQCache(config).memory().nbytes == 0 and HLWQCache(config).memory().ratio == 1

def test_short_contexts_gain_nothing():
    m = HLWQCache(qwen())
    assert m.memory(200).ratio < 1 < m.memory(1000).ratio < m.memory(10_000).ratio < m.memory(100_000).ratio < 4

def test_other_layers_are_named():
    model = model_of('qwen3_5_moe_text')
    cache = HLWQCache(model.config)
    with torch.no_grad(): model(tokens(1, 300), **{cache_name(model):cache})
    m = cache.memory()
    want = sum(t.nbytes for o in cache.layers[:3] for t in (*o.conv_states.values(), *o.recurrent_states.values()))
    assert m.other == want and 'other' in repr(m)

def test_presets():
    config = model_of('llama').config
    assert {n:HLWQCache.preset(config, n).bits for n in KV_PRESETS} == dict(Q4=(4, 4), Q3=(3, 3), Q2=(3, 2)) and HLWQCache(config).bits == (4, 4)
    assert HLWQCache.preset(config, 'Q2', residual=0).residual == 0

"""Experts as rows on the host: where each part lies, that rows are the slices of the checkpoint whatever its names, files that are mapped, cut off, stale or damaged, and how much memory it takes.

There is no GPU in it: pinning is imitated."""
import contextlib,gc,os,shutil,warnings
from types import SimpleNamespace
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import pytest
transformers = pytest.importorskip('transformers')
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from hlwq import bank as bank_module
from hlwq.bank import *
from hlwq.cache_plan import fitting_slots,plan_cache
from hlwq.checkpoint import CheckpointReader
from hlwq.convert import quantize_checkpoint
from hlwq.core import CheckpointError,ConfigError,HLWQPerformanceWarning,UnsupportedError
from hlwq.generate import generate
from hlwq.kernels.layout import untile_ref
from hlwq.linear import norm_bits
from hlwq.load import load_model
from kit import complete,logits,made,original,quantized,snapshot,some_ids,tensors_of,write_small

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
MOE = ('qwen3_moe', 'mixtral', 'gpt_oss', 'no_gate', 'tiny-moe-10m')

@pytest.fixture(scope='module', autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        threads = torch.get_num_threads(); torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

def load(folder, cache=2, host='pageable', **kw): return load_model(folder, device_map=None, dtype=torch.float32, expert_cache=cache, host=host, **kw)
def bank_of(folder, **kw): return load(folder, **kw).offload.bank
def fused(): return made('bank-fused-q5', lambda d: quantize_checkpoint(made('bank-fused', lambda o: write_small('qwen3_moe', o, save=dict(save_original_format=False))), d, progress=False))
def book(bits=5): return SimpleNamespace(bits=bits)
def stack(out, width, bits=5): return SimpleNamespace(out_features=out, in_features=width, book=book(bits))

# --- rows

@pytest.mark.parametrize('tiles', [False, True])
def test_row_of_the_seeds_model(tiles):
    row = expert_row(stack(1024, 2048), stack(2048, 512), tiles)
    assert row.nbytes == 2_015_232 == sum(p.nbytes for p in row.parts.values()) and list(row.parts) == ['w13.packed', 'w13.norm_bits', 'w2.packed', 'w2.norm_bits']
    assert [p.offset for p in row.parts.values()] == [0, 1_310_720, 1_343_488, 1_998_848] and row.tiles == tiles

@pytest.mark.parametrize('norms', [torch.float16, torch.float32])
@pytest.mark.parametrize('tiles', [False, True])
@pytest.mark.parametrize('bits', [2, 3, 4, 5, 6, 8])
def test_parts_are_aligned_and_apart(bits, tiles, norms):
    row = expert_row(stack(72, 136, bits), stack(130, 36, bits), tiles, norms)
    assert row.nbytes % PAGE == 0 and all(p.offset % PAGE == 0 for p in row.parts.values())
    ends = [p.offset + p.nbytes for p in row.parts.values()]
    assert all(e <= p.offset for e,p in zip(ends, list(row.parts.values())[1:])) and ends[-1] <= row.nbytes
    rows = torch.zeros(3, row.nbytes, dtype=torch.uint8)
    for i,(n,p) in enumerate(row.parts.items()):
        v = row.view(rows, n)
        assert v.shape == (3, *p.shape) and v.dtype == p.dtype and v.data_ptr() == rows.data_ptr() + p.offset
        v[1] = i+1
    for i,(n,p) in enumerate(row.parts.items()): assert (row.view(rows, n)[1] == i+1).all() and not row.view(rows, n)[0::2].any()

# --- from a checkpoint

@pytest.mark.parametrize('name', MOE)
def test_rows_are_what_the_model_holds(name):
    d = quantized(name)
    m,b = load_model(d, device_map=None, dtype=torch.float32),bank_of(d)
    for i,n in enumerate(b.names):
        e = m.get_submodule(n)
        for place,s in (('w13', e.w13), ('w2', e.w2)):
            assert torch.equal(b.part(i, f'{place}.packed'), s.packed) and torch.equal(b.part(i, f'{place}.norm_bits'), s.norm_bits)
    assert b.nbytes == len(b.rows)*b.rows[0].nbytes and b.where == 'pageable'

def test_rows_are_slices_of_the_file():
    t,b = tensors_of(fused()),bank_of(fused())
    for place,leaf in (('w13', 'gate_up_proj'), ('w2', 'down_proj')):
        for e in range(4):
            k = f'model.layers.1.mlp.experts.{leaf}_e{e}'
            assert torch.equal(b.part(1, f'{place}.packed')[e].flatten(), t[k + '__packed']) and torch.equal(b.part(1, f'{place}.norm_bits')[e], norm_bits(t[k + '__norms']))

def test_fused_and_per_expert_files_give_the_same():
    a,b = bank_of(fused()),bank_of(quantized('qwen3_moe'))
    assert a.names == b.names and a.layout == b.layout and all(torch.equal(x, y) for x,y in zip(a.rows, b.rows))

def test_text_alone_and_with_pictures_give_the_same(tmp_path):
    from test_generate import EXPERTS,LINEAR,SIZES,VISION
    own = {**SIZES, **EXPERTS, **LINEAR, 'layer_types':['linear_attention', 'full_attention']}
    whole = transformers.AutoConfig.for_model('qwen3_5_moe', text_config=own, vision_config=VISION, image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
    torch.manual_seed(0)
    m = transformers.Qwen3_5MoeForConditionalGeneration(whole)
    text = transformers.Qwen3_5MoeForCausalLM(whole.text_config)
    text.model.load_state_dict(m.model.language_model.state_dict()); text.lm_head.load_state_dict(m.lm_head.state_dict())
    m.save_pretrained(tmp_path/'m'); text.save_pretrained(tmp_path/'t')
    for n in 'mt': quantize_checkpoint(tmp_path/n, tmp_path/f'q{n}', progress=False)
    a,b = bank_of(tmp_path/'qm'),bank_of(tmp_path/'qt')
    assert [n.replace('language_model.', '') for n in a.names] == b.names and all(torch.equal(x, y) for x,y in zip(a.rows, b.rows))

def test_tiles_are_the_same_codes():
    m = load(quantized('qwen3_moe'))
    with CheckpointReader(quantized('qwen3_moe')) as r: b = bank_from_checkpoint(r, m.hf_quantizer.targets, 'pageable', tiles=True)
    for place in ('w13', 'w2'):
        disk = m.offload.bank.part(0, f'{place}.packed')
        for e in range(4): assert torch.equal(untile_ref(b.part(0, f'{place}.packed')[e], disk.shape[1]), disk[e])

@pytest.mark.parametrize('host', ['pageable', 'mmap'])
@pytest.mark.parametrize('name', MOE)
def test_same_bits_as_resident(name, host, tmp_path):
    d = quantized(name)
    a,b = load_model(d, device_map=None, dtype=torch.float32),load(d, 2, host, bank_dir=tmp_path)
    assert torch.equal(logits(a), logits(b)) and b.offload.bank.where == host and b.offload_stats().where == host
    if name == 'qwen3_moe':
        x = some_ids(a, 5, 1)
        assert torch.equal(generate(a, x, max_new_tokens=8), generate(b, x, max_new_tokens=8))

def test_wide_norms_of_one_layer_widen_all(tmp_path):
    from kit import altered
    def widen(t):
        for k in [k for k in t if k.endswith('__norms') and 'layers.1.mlp.experts' in k]: t[k] = t[k].float()*1.0001
    altered(quantized('qwen3_moe'), tmp_path/'q', widen)
    a,b = load_model(tmp_path/'q', device_map=None, dtype=torch.float32),load(tmp_path/'q')
    assert b.offload.bank.layout.parts['w2.norm_bits'].dtype == torch.int32 and torch.equal(logits(a), logits(b))

# --- from a model

def test_from_a_model():
    d = quantized('qwen3_moe')
    m = load_model(d, device_map=None, dtype=torch.float32)
    with torch.no_grad(): want = logits(m)
    b,c = bank_from_model(m, 'pageable'),bank_of(d)
    assert b.names == c.names and all(torch.equal(x, y) for x,y in zip(b.rows, c.rows))
    assert all(p.is_meta for n,p in m.named_parameters() if '.experts.' in n)
    from hlwq.offload import offload_experts
    assert torch.equal(logits(offload_experts(m, 1, bank=b)), want)
    with pytest.raises(UnsupportedError, match='no packed experts') as e: bank_from_model(load_model(quantized('llama'), device_map=None))
    assert complete(e.value)

class Sizes(TorchDispatchMode):
    "Notes the largest tensor that is made, and the largest of floats"
    def __init__(self): super().__init__(); self.all = self.floats = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not t.is_meta and not func.is_view:
                self.all = max(self.all, t.nbytes)
                if t.is_floating_point() and t.ndim > 1: self.floats = max(self.floats, t.nbytes)
        return out

def test_no_dense_expert_is_made(monkeypatch):
    d,made_pages = quantized('tiny-moe-10m'),[]
    real = bank_module._pages
    monkeypatch.setattr(bank_module, '_pages', lambda shape: made_pages.append(shape) or real(shape))
    m = load(d)
    with CheckpointReader(d) as r, Sizes() as s: b = bank_from_checkpoint(r, m.hf_quantizer.targets, 'pageable')
    one = b.layout.parts['w13.packed']
    assert s.floats <= b.layout.parts['w13.norm_bits'].nbytes*len(b.rows[0])*2 < one.shape[0]*m.config.hidden_size*2*len(b.rows[0])       # norms, and nothing as large as dense weights of a stack
    assert s.all <= one.nbytes*len(b.rows[0]) and len(made_pages) == 2*len(b.rows)        # a projection of a layer at most; one piece for each layer, twice loaded

def test_turned_some_at_a_time(monkeypatch):
    a = bank_of(quantized('qwen3_moe'))
    monkeypatch.setattr(bank_module, '_AT_ONCE', 1)
    b = bank_of(quantized('qwen3_moe'))
    assert all(torch.equal(x, y) for x,y in zip(a.rows, b.rows))

# --- a file

@pytest.fixture
def mapped(tmp_path):
    "A folder with a file of experts, and the function that opens it"
    shutil.copytree(quantized('qwen3_moe'), tmp_path/'q')
    m = load(tmp_path/'q')
    def opened(**kw):
        with CheckpointReader(tmp_path/'q') as r: return bank_from_checkpoint(r, m.hf_quantizer.targets, 'mmap', **kw)
    return SimpleNamespace(open=opened, bank=opened(), memory=m.offload.bank, folder=tmp_path/'q')

def test_mapped_rows_are_the_same(mapped, monkeypatch):
    assert all(torch.equal(a, b) for a,b in zip(mapped.bank.rows, mapped.memory.rows)) and mapped.bank.path.parent == mapped.folder
    before = snapshot(mapped.folder, times=True)
    monkeypatch.setattr(bank_module, '_read', lambda *_: pytest.fail('read again'))
    assert mapped.open(check=True).where == 'mmap' and snapshot(mapped.folder, times=True) == before

@pytest.mark.parametrize('damage,word', [('cut', 'bytes, need'), ('short', 'not a file of experts'), ('magic', 'not a file of experts'), ('head', 'head is damaged'), ('version', 'version 9'), ('longer', 'bytes, need'), ('empty', 'not a file of experts')])
def test_damaged_file(mapped, damage, word):
    p = mapped.bank.path
    b = bytearray(p.read_bytes())
    if damage == 'cut': b = b[:-1]
    if damage == 'short': b = b[:10]
    if damage == 'empty': b = b''
    if damage == 'magic': b[0] ^= 1
    if damage == 'head': b[40] ^= 1
    if damage == 'version': b[8] = 9
    if damage == 'longer': b += b'x'
    p.unlink(); p.write_bytes(b)                               # another file: the old one is mapped
    with pytest.raises(CheckpointError, match=word) as e: mapped.open()
    assert complete(e.value) and 'built again' in str(e.value)
    p.unlink()
    assert all(torch.equal(a, b) for a,b in zip(mapped.open().rows, mapped.memory.rows))

def test_damaged_rows_are_found_if_asked(mapped):
    p = mapped.bank.path
    b = bytearray(p.read_bytes()); b[-PAGE*3] ^= 4
    p.unlink(); p.write_bytes(b)
    mapped.open()
    with pytest.raises(CheckpointError, match='model.layers.1.mlp.experts is damaged'): mapped.open(check=True)

def test_stale_file(mapped):
    other = mapped.bank.path
    with CheckpointReader(mapped.folder) as r: source = fingerprint(r.path)
    p = mapped.folder/'hlwq_manifest.json'
    p.write_text(p.read_text() + '\n')
    new = bank_path(mapped.folder, fingerprint(mapped.folder), mapped.bank.layout)
    assert new != other and fingerprint(mapped.folder) != source
    shutil.copy(other, new)                                    # somebody renames it
    with pytest.raises(CheckpointError, match='made from other files'): mapped.open()

@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_interrupted_build_leaves_nothing(mapped, monkeypatch, error):
    mapped.bank.path.unlink()
    before,real,calls = snapshot(mapped.folder),bank_module._read,[]
    def read(*args):
        calls.append(1)
        if len(calls) == 3: raise error()
        return real(*args)
    monkeypatch.setattr(bank_module, '_read', read)
    with pytest.raises(error): mapped.open()
    assert snapshot(mapped.folder) == before and len(calls) == 3
    (mapped.folder/f'.{mapped.bank.path.name}.abc').write_text('of a run that was killed')
    monkeypatch.setattr(bank_module, '_read', real)
    mapped.open()
    assert sorted(set(snapshot(mapped.folder)) - set(before)) == [mapped.bank.path.name]

def test_another_folder_for_the_file(tmp_path):
    b = bank_of(quantized('qwen3_moe'), host='mmap', bank_dir=tmp_path/'deep/cache')
    assert b.path.parent == tmp_path/'deep/cache' and not list(quantized('qwen3_moe').glob('*.bank'))

# --- pinning

class Driver:
    "Imitates what registers memory"
    def __init__(self, refuse_from=10**9): self.held,self.n,self.refuse_from = [],0,refuse_from
    def cudart(self): return self
    def cudaHostRegister(self, p, n, flags):
        self.n += 1
        if self.n > self.refuse_from: return 2
        assert p % PAGE == 0 and n > 0
        self.held.append(p)
        return 0
    def cudaHostUnregister(self, p): self.held.remove(p); return 0

def with_driver(monkeypatch, **kw):
    d = Driver(**kw)
    monkeypatch.setattr(bank_module.torch.cuda, 'cudart', d.cudart)
    return d

def test_pinned_at_exact_size_and_given_back(monkeypatch):
    d,b = with_driver(monkeypatch),bank_of(quantized('qwen3_moe'))
    assert b.pin() and b.where == 'pinned' and d.held == [r.data_ptr() for r in b.rows]
    b.close(); assert not d.held and b.where == 'pageable'
    b.pin(); del b; gc.collect()
    assert not d.held, 'a bank that nobody holds gives its memory back'

def test_refused_pinning_warns_once(monkeypatch):
    d,b = with_driver(monkeypatch, refuse_from=1),bank_of(quantized('qwen3_moe'))
    with pytest.warns(HLWQPerformanceWarning, match='could not be pinned') as w: assert not b.pin()
    assert len(w) == 1 and complete(str(w[0].message)) is not None and b.where == 'pageable' and not d.held

# --- choices

def test_where_by_free_memory(monkeypatch):
    for free,device,can,want in ((10**12, 'cuda', True, 'pinned'), (10**12, 'cpu', True, 'pageable'), (10**9, 'cuda', True, 'mmap'), (10**9, 'cpu', True, 'mmap'), (0, 'cuda', True, 'pinned')):
        monkeypatch.setattr(bank_module, 'free_ram', lambda: free)
        assert choose_host('auto', 20*10**9, device, can)[0] == want
    monkeypatch.setattr(bank_module, 'free_ram', lambda: 10**9)
    for host,device,can,word in (('auto', 'cpu', False, 'bank_dir'), ('pageable', 'cpu', True, "host='mmap'"), ('pinned', 'cpu', True, 'need a GPU'), ('disk', 'cpu', True, 'need one of')):
        with pytest.raises(ConfigError, match=word) as e: choose_host(host, 20*10**9, device, can)
        assert complete(e.value)

@pytest.mark.parametrize('how,word', [(dict(cache=0), 'whole number from 1'), (dict(cache=True), 'whole number from 1'), (dict(cache='all'), 'whole number from 1'), (dict(host='disk'), 'need one of'), (dict(policy='fifo'), 'need one of'),
    (dict(policy='pinned'), 'need one of'), (dict(vram_gb=0), 'more than 0'), (dict(vram_gb=.1), 'need 0.5')])
def test_bad_requests_are_refused_before_any_work(how, word, monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedModel, 'from_pretrained', lambda *a, **k: pytest.fail('loaded'))
    with pytest.raises(ConfigError, match=word) as e: load(quantized('qwen3_moe'), **how)
    assert complete(e.value)

def test_model_without_experts():
    with pytest.raises(ConfigError, match='no packed experts') as e: load(quantized('llama'))
    assert complete(e.value)

def test_settings_without_a_cache():
    with pytest.raises(ConfigError, match='host, vram_gb: given without expert_cache'): load_model(quantized('qwen3_moe'), host='mmap', vram_gb=3)

def test_chosen_size(caplog):
    import logging
    with caplog.at_level(logging.INFO, 'hlwq'): m = load(quantized('qwen3_moe'), 'auto')
    assert m.offload_plan.slots == 4 and 'expert_cache: 4 of 4' in caplog.text
    with torch.no_grad(): assert torch.equal(logits(m), logits(load_model(quantized('qwen3_moe'), device_map=None, dtype=torch.float32)))
    one = m.offload.bank.layout.nbytes
    assert fitting_slots(10*one, 0, one, 2, 256, staging=2) == 4 and fitting_slots(10*one, 0, one, 2, 3, staging=2) == 3
    with pytest.raises(ConfigError, match='need at most 1') as e: plan_cache(m.offload.bank, 3, 'cpu', 2, reserve=0, vram_gb=(4+2)*one/1e9)
    assert complete(e.value)

def test_a_container_may_use_what_it_only_keeps(tmp_path):
    assert bank_module._free_in(tmp_path) is None
    for v2 in (True, False):
        d = tmp_path/str(v2); d.mkdir()
        names = ('memory.max', 'memory.current', 'inactive_file') if v2 else ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file')
        (d/names[0]).write_text('100\n'); (d/names[1]).write_text('90\n'); (d/'memory.stat').write_text(f'anon 20\n{names[2]} 70\n')
        assert bank_module._free_in(d) == 80
        (d/names[0]).write_text('max\n'); assert bank_module._free_in(d) is None

def test_a_file_that_somebody_writes_is_left_alone(mapped):
    import fcntl
    p = mapped.bank.path
    p.unlink()
    other,dead = p.with_name(f'.{p.name}.other'),p.with_name(f'.{p.name}.dead')
    dead.write_bytes(b'x')
    with open(other, 'wb') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        mapped.open()
        assert other.exists() and not dead.exists() and p.exists()

def test_refused_pinning_leaves_no_error_behind(monkeypatch):
    forgotten = []
    with_driver(monkeypatch, refuse_from=0)
    monkeypatch.setattr(bank_module, '_forget_error', lambda: forgotten.append(1))
    assert bank_module._pin(torch.zeros(PAGE, dtype=torch.uint8)) == 'cudaHostRegister answers 2' and forgotten == [1]

# --- embeddings

def test_embeddings_on_the_host(monkeypatch):
    d,t = with_driver(monkeypatch),torch.randn(30, 12).bfloat16()
    monkeypatch.setattr(bank_module.torch.cuda, 'device', lambda _: contextlib.nullcontext())
    held = []                                                  # torch holds what it was given for as long as its tensor lives
    def seen(device, memory): held.append(bank_module._Address(memory)); return memory
    monkeypatch.setattr(bank_module, '_seen_from', seen)
    s = on_host(t)
    assert torch.equal(s, t) and s.dtype == t.dtype and len(d.held) == 1 and s.data_ptr() == d.held[0] != t.data_ptr()
    monkeypatch.setattr(bank_module, '_seen_from', lambda device, memory: memory.clone())
    with pytest.raises(UnsupportedError, match='does not see it') as e: on_host(t)
    assert complete(e.value)
    with_driver(monkeypatch, refuse_from=0)
    with pytest.raises(UnsupportedError, match='could not be pinned') as e: on_host(t)
    assert complete(e.value)

def test_an_address_is_given_back(monkeypatch):
    d,m = with_driver(monkeypatch),bank_module._pages((PAGE,))
    assert bank_module._pin(m) == '' and len(d.held) == 1
    a = bank_module._Address(m)
    del a; gc.collect()
    assert not d.held

def test_embeddings_of_a_loaded_model():
    d = quantized('qwen3_moe')
    assert torch.equal(logits(load(d)), logits(load(d, embeddings='host')))          # on a CPU they are there already
    for kw,error in ((dict(embeddings='disk'), ConfigError), (dict(embeddings='host', cache=None, host='auto'), ConfigError)):
        with pytest.raises(error, match='embeddings') as e: load(d, **kw)
        assert complete(e.value)
    with pytest.raises(UnsupportedError, match='tied') as e: load(quantized('tiny-moe-10m'), embeddings='host')
    assert complete(e.value)

def test_more_slots_than_memory(monkeypatch):
    from hlwq import cache_plan
    b = bank_of(quantized('qwen3_moe'))
    monkeypatch.setattr(cache_plan, 'free_memory', lambda *_: 7*b.layout.nbytes)
    with pytest.raises(ConfigError, match='2 experts of 2 layers') as e: plan_cache(b, 2, 'cpu', 2)
    assert complete(e.value)
    monkeypatch.setattr(cache_plan, 'free_memory', lambda *_: 8*b.layout.nbytes)
    assert plan_cache(b, 2, 'cpu', 2).slots == 2

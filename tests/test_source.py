"What a reader of 04a_source would skip: hostile files, disagreeing indexes, odd types, the hub without a network"
import json,os,struct,subprocess,sys,warnings
import pytest,torch
from hypothesis import HealthCheck,given,settings,strategies as st
from safetensors.torch import load_file,save_file
from hlwq.core import *
from hlwq.source import *
from hlwq import source as source_module

MODEL = asset_path('tiny-moe-10m')

def raw(header, data=b'', n=None):
    "A safetensors file from a header that no library would write"
    h = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(h) if n is None else n) + h + data

def entry(shape=(2,), dtype='F32', at=(0, 8)): return dict(dtype=dtype, shape=list(shape), data_offsets=list(at))

@pytest.fixture
def shards(tmp_path):
    "A sound checkpoint of two shards; the keys and what they hold"
    t = {f'layers.{i}.weight':torch.randn(4, 8, dtype=torch.bfloat16) for i in range(4)}
    wm = {}
    for i,f in enumerate(('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')):
        part = dict(list(t.items())[2*i:2*i+2])
        save_file(part, tmp_path/f); wm.update(dict.fromkeys(part, f))
    (tmp_path/'config.json').write_text('{"model_type":"llama"}')
    write_index(tmp_path, wm, sum(o.nbytes for o in t.values()))
    return tmp_path,t,wm

def write_index(d, wm, total=None): (d/'model.safetensors.index.json').write_text(json.dumps(dict(metadata=dict(total_size=total) if total else {}, weight_map=wm)))

def test_sound_shards_quiet(shards):
    d,t,_ = shards
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        src = open_source(d)
    assert list(src.tensors) == list(t) and src.nbytes == 4*64
    with src:
        for k,v in t.items(): assert torch.equal(src.read(k), v)
    assert not src._open
    assert set(src.fingerprint()) == set(src.files)
    src.check_unchanged()

@pytest.mark.parametrize('name', ['../x.safetensors', '/etc/passwd', '..', '.', 'a/b.safetensors', 'a\\b', '', 'x\n.safetensors', 'a b', 5, None, ['x']])
def test_unsafe_names_in_index(shards, name):
    d,t,wm = shards
    write_index(d, wm | {'layers.0.weight':name})
    with pytest.raises(CheckpointError, match='unsafe shard path|missing'): open_source(d)

def test_link_out_of_folder_refused(shards, tmp_path_factory):
    d,_,wm = shards
    away = tmp_path_factory.mktemp('away')
    f = sorted(set(wm.values()))[0]
    os.rename(d/f, away/f); os.symlink(away/f, d/f)
    with pytest.raises(CheckpointError, match='unsafe shard path'): open_source(d)

def test_hub_cache_links_allowed(shards, tmp_path_factory):
    d,t,wm = shards
    root = tmp_path_factory.mktemp('models--owner--name')
    snap = root/'snapshots'/'0123abc'
    snap.mkdir(parents=True); (root/'blobs').mkdir()
    for i,p in enumerate(sorted(d.iterdir())):
        os.rename(p, root/'blobs'/f'{i:064x}'); os.symlink(f'../../blobs/{i:064x}', snap/p.name)
    assert list(open_source(snap).tensors) == list(t)

def test_other_files_never_follow_links_out(shards, tmp_path_factory):
    d,_,_ = shards
    secret = tmp_path_factory.mktemp('secret')/'key'
    secret.write_text('secret')
    os.symlink(secret, d/'tokenizer.json')
    for n in ('merges.txt', 'LICENSE', '.hidden', 'modeling.py', 'pytorch_model.bin', 'opt.pt', 'pytorch_model.bin.index.json'): (d/n).write_text('x')
    (d/'sub').mkdir()
    src = open_source(d)
    assert src.other_files == ['LICENSE', 'merges.txt']
    assert {'tokenizer.json', '.hidden', 'modeling.py', 'pytorch_model.bin', 'opt.pt', 'pytorch_model.bin.index.json', 'sub/'} < set(src.skipped_files)

def test_index_disagreements(shards):
    d,t,wm = shards
    write_index(d, wm | {'layers.9.weight':'model-00001-of-00002.safetensors'})
    with pytest.raises(CheckpointError, match=r'layers.9.weight \(model-00001-of-00002.safetensors\) in the index but not in the file'): open_source(d)
    write_index(d, {k:v for k,v in wm.items() if k != 'layers.3.weight'}, 12345)
    with pytest.warns(HLWQWarning) as w: src = open_source(d)
    text = ' '.join(str(o.message) for o in w)
    assert 'layers.3.weight not in the index' in text and 'declares 12345 bytes' in text and 'layers.3.weight' in src.tensors
    save_file({'layers.2.weight':t['layers.2.weight'], 'layers.3.weight':t['layers.3.weight'], 'layers.0.weight':t['layers.0.weight']}, d/'model-00002-of-00002.safetensors')
    write_index(d, wm)
    with pytest.raises(CheckpointError, match='layers.0.weight stored twice, first in model-00001'): open_source(d)

@pytest.mark.parametrize('text', ['', 'x', '[]', '{}', '{"weight_map": {}}', '{"weight_map": []}', '['*100_000, '{"weight_map": null}'])
def test_broken_index(shards, text):
    d,_,_ = shards
    (d/'model.safetensors.index.json').write_text(text)
    with pytest.raises(CheckpointError, match='index.json'): open_source(d)

def test_missing_and_ambiguous(shards, tmp_path_factory):
    d,_,_ = shards
    os.remove(d/'model-00002-of-00002.safetensors')
    with pytest.raises(CheckpointError, match='model-00002-of-00002.safetensors missing of 2 weight files.*incomplete download'): open_source(d)
    os.remove(d/'model.safetensors.index.json')
    assert len(open_source(d).tensors) == 2            # one file, no index: taken as it is
    save_file({'b':torch.ones(1)}, d/'other.safetensors')
    with pytest.raises(CheckpointError, match='no model.safetensors.index.json'): open_source(d)
    assert list(open_source(d/'other.safetensors').tensors) == ['b']
    save_file({'c':torch.ones(1)}, d/'model.safetensors')
    assert open_source(d).files == ['model.safetensors']
    write_index(d, {'b':'other.safetensors'})
    with pytest.raises(CheckpointError, match='stale'): open_source(d)

@pytest.mark.parametrize('files,error,match', [
    (['pytorch_model.bin', 'config.json'], UnsupportedError, 'pickle checkpoints are not read; convert to safetensors first|convert to safetensors first'),
    (['model.gguf'], UnsupportedError, 'GGUF'), (['config.json', 'tokenizer.json'], CheckpointError, 'no weights'), ([], CheckpointError, 'no weights'), (['training_args.bin'], CheckpointError, 'no weights')])
def test_no_weights(tmp_path, files, error, match):
    for f in files: (tmp_path/f).write_text('{}')
    with pytest.raises(error, match=match): open_source(tmp_path)

HOSTILE = dict(
    space=raw({'a b':entry()}, b'x'*8), newline=raw({'a\nb':entry()}, b'x'*8), control=raw({'a\x1b[2J':entry()}, b'x'*8), unicode=raw({'ä':entry()}, b'x'*8), blank=raw({'':entry()}, b'x'*8),
    axes=raw({'a':entry([1]*9 + [2])}, b'x'*8), huge=raw({'a':entry([2**40, 0, 2**20], at=(0, 0))}), overflow=raw({'a':entry([2**63, 2**63])}, b'x'*8), negative=raw({'a':entry([-2])}, b'x'*8),
    overlap=raw({'a':entry(), 'b':entry(at=(4, 12))}, b'x'*12), hole=raw({'a':entry(), 'b':entry(at=(16, 24))}, b'x'*24), behind=raw({'a':entry(at=(8, 16))}, b'x'*8), tail=raw({'a':entry()}, b'x'*9),
    size=raw({'a':entry([3])}, b'x'*8), notjson=raw(b'{"a":', b'x'*8), array=raw([1, 2], b'x'*8), deep=raw(b'['*50_000), long=raw({'a':entry()}, b'x'*8, n=2**62), over100=raw({}, n=100_000_001),
    short=b'\x01\x02', dtype=raw({'a':entry(dtype='Q4')}, b'x'*8), types=raw({'a':dict(dtype=3, shape='x', data_offsets=None)}), offsets=raw({'a':dict(dtype='F32', shape=[2], data_offsets=[0, 'x'])}, b'x'*8),
    duplicate=raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', b'x'*16))

@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_files(tmp_path, case):
    (tmp_path/'model.safetensors').write_bytes(HOSTILE[case])
    if case == 'huge':                                  # zero elements: harmless, and no memory is taken
        assert open_source(tmp_path).tensors['a'].numel == 0
        return
    with pytest.raises((CheckpointError, UnsupportedError), match='model.safetensors'): open_source(tmp_path)

SMALL = raw({'__metadata__':{'format':'pt'}, 'a':entry(), 'b':entry([3, 2], 'BF16', (8, 20))}, bytes(range(20)))

def test_every_truncation(tmp_path):
    f = tmp_path/'model.safetensors'
    for n in range(len(SMALL)):
        f.write_bytes(SMALL[:n])
        with pytest.raises(CheckpointError, match='empty file' if not n else rf'{n} bytes, need (at least )?\d+|not a valid'): open_source(tmp_path)
    f.write_bytes(SMALL[:-3])
    with pytest.raises(CheckpointError, match=f'{len(SMALL)-3} bytes, need {len(SMALL)} by its own header'): open_source(tmp_path)

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(SMALL)-1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_never_crash(tmp_path, changes):
    data = bytearray(SMALL)
    for i,v in changes: data[i] = v
    (tmp_path/'model.safetensors').write_bytes(data)
    try: src = open_source(tmp_path)
    except HLWQError: return
    with src:
        for k,t in src.tensors.items(): assert tuple(src.read(k).shape) == t.shape

def test_impostors(tmp_path):
    f = tmp_path/'model.safetensors'
    for data,error,match in ((b'', CheckpointError, 'empty file'), (b'version https://git-lfs.github.com/spec/v1\n', CheckpointError, 'run git lfs pull'), (b'\n <html>', CheckpointError, 'HTML'), (b'PK\x03\x04xxxxxx', UnsupportedError, 'pickle')):
        f.write_bytes(data)
        with pytest.raises(error, match=match): open_source(tmp_path)

def test_all_dtypes_rows_and_empty(tmp_path):
    t = {n:torch.arange(24).reshape(2, 3, 4).to(torch.float32).to(d) if d.is_floating_point or d.is_complex else torch.arange(24).reshape(2, 3, 4).to(d) for n,d in DTYPES.items() if n not in ('F8_E8M0', 'C64', 'U64', 'U32', 'U16')}
    t |= {'scalar':torch.tensor(3.), 'empty':torch.zeros(0, 5), 'odd':torch.arange(3, dtype=torch.uint8)}
    save_file(t, tmp_path/'model.safetensors')
    want = load_file(tmp_path/'model.safetensors')
    with open_source(tmp_path) as src:
        for k,v in want.items():
            got = src.read(k)
            assert got.dtype == v.dtype and got.shape == v.shape and got.contiguous().view(torch.uint8).equal(v.contiguous().view(torch.uint8)) if v.ndim else torch.equal(got, v), k
            if v.ndim == 3: assert src.read(k, 1, 2).view(torch.uint8).equal(v[1:2].view(torch.uint8)) and src.read(k, -1).shape == (1, 3, 4) and src.read(k, 5, 9).shape == (0, 3, 4)
        with pytest.raises(ConfigError, match='a scalar'): src.read('scalar', 0, 1)

def test_changed_while_reading(shards):
    d,_,wm = shards
    with open_source(d) as src:
        src.read('layers.0.weight')
        os.utime(d/wm['layers.0.weight'], ns=(1, 1))
        with pytest.raises(CheckpointError, match='changed while reading'): src.check_unchanged()
        os.truncate(d/wm['layers.3.weight'], 100)
        with pytest.raises(CheckpointError, match='changed while reading'): src.read('layers.3.weight')
        os.remove(d/wm['layers.3.weight'])
        with pytest.raises(CheckpointError, match='changed while reading'): src.check_unchanged()

def test_reading_takes_no_more_memory_than_the_rows(tmp_path):
    save_file({'w':torch.zeros(64, 1024, 1024)}, tmp_path/'model.safetensors')       # 268 MB
    code = f"""
import resource; from hlwq.source import open_source
src = open_source({str(tmp_path)!r}); peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]); before = peak()
for i in range(64): src.read('w', i, i+1)
print((peak()-before)//1024)"""
    assert int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout) < 60    # MB

def test_names_of_things(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match='no such file or folder'): open_source('nothing here')
    (tmp_path/'models').mkdir()
    monkeypatch.setattr(source_module, '_download', lambda *a: pytest.fail('asked the hub for a misspelt path'))
    with pytest.raises(ConfigError, match='no such file or folder'): open_source('models/tinny')
    (tmp_path/'weights.bin').write_text('x')
    with pytest.raises(UnsupportedError, match='pickle'): open_source('weights.bin')

def test_hub_id_without_network(monkeypatch):
    import huggingface_hub
    seen = {}
    def fake(repo, revision=None, allow_patterns=None): seen.update(repo=repo, revision=revision, patterns=allow_patterns); return str(MODEL)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fake)
    assert len(open_source('owner/tiny.moe-10m', revision='abc').tensors) == 255
    assert seen['repo'] == 'owner/tiny.moe-10m' and seen['revision'] == 'abc' and '*.safetensors' in seen['patterns'] and not any(o.endswith(('.bin', '.py', '*')) and o == '*' for o in seen['patterns'])
    def offline(*a, **k): raise OSError('no route to host')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(ConfigError, match='check the spelling, the network'): open_source('owner/name')

@pytest.mark.parametrize('cfg,error', [({}, ConfigError), (dict(model_type='nonesuch'), ConfigError), (dict(model_type='llama', hidden_size='wide'), ConfigError), ([1], CheckpointError),
    (dict(model_type='evil', auto_map=dict(AutoConfig='somebody/repo--configuration.Evil')), ConfigError)])
def test_bad_lone_config(tmp_path, cfg, error):
    (tmp_path/'config.json').write_text(json.dumps(cfg))
    with pytest.raises(error, match='config.json'): open_source(tmp_path)

def test_lone_config_by_file_and_folder(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='gpt_oss', num_hidden_layers=1, num_local_experts=2, vocab_size=64)))
    a,b = open_source(tmp_path),open_source(tmp_path/'config.json')
    assert a.tensors == b.tensors and a.files == [] and a.fingerprint() == {} and a.text_config['hidden_size'] == 2880
    assert {t.dtype for t in a.tensors.values()} == {'BF16'} and all(t.file is None for t in a.tensors.values())
    a.check_unchanged()

def test_tied_parameters_counted_once(tmp_path):
    for tied in (True, False):
        (tmp_path/'config.json').write_text(json.dumps(dict(model_type='llama', num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=2, vocab_size=100, tie_word_embeddings=tied)))
        src = open_source(tmp_path)
        assert src.tied is tied and ('lm_head.weight' in src.tensors) is not tied

def src_of(*names, dtype='BF16', **config):
    from pathlib import Path
    return Source(Path('x'), config, {n:TensorInfo(n, dtype, (256, 256)) for n in names})

@pytest.mark.parametrize('names,config,method', [
    (['a.weight__packed', 'a.weight__norms'], {}, 'hlwq'), (['a.weight__codes'], {}, 'hlwq'), (['a.codes', 'a.ct_scaled'], {}, 'polarquant (legacy)'),
    (['a.qweight', 'a.g_idx'], {}, 'gptq'), (['a.qweight', 'a.qzeros'], {}, 'awq'), (['a.weight_packed'], {}, 'compressed-tensors'), (['a.gate_up_proj_blocks', 'a.gate_up_proj_scales'], {}, 'mxfp4'),
    (['a.weight', 'a.weight.quant_state.bitsandbytes__nf4'], {}, 'bitsandbytes'), (['a.weight'], dict(quantization_config=dict(quant_method='hlwq')), 'hlwq'),
    (['a.weight'], dict(quantization_config=dict(quant_method='fp8')), 'fp8'), (['a.weight'], dict(text_config=dict(quantization_config=dict(quant_method='awq'))), 'awq'),
    (['a.weight'], dict(quantization_config=dict(bits=4)), 'unknown'), (['a.weight'], dict(quantization_config=None), None), (['a.weight'], {}, None)])
def test_quant_method(names, config, method): assert src_of(*names, **config).quant_method == method

def test_fp8_by_type(): assert src_of('a.weight', 'a.weight_scale_inv', dtype='F8_E4M3').quant_method == 'fp8'

def test_imports_lazily():
    code = "import sys, hlwq.source, hlwq.recipe; print([m for m in ('transformers', 'matplotlib', 'triton', 'huggingface_hub', 'accelerate') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_plan_of_a_hub_id_fetches_headers_only(monkeypatch, tmp_path):
    "No weights are downloaded to plan: the hub's own reading of the headers becomes the source"
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo as HubTensor
    from hlwq.recipe import make_plan
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='llama', hidden_size=512)))
    f = SafetensorsFileMetadata(metadata={}, tensors={
        'model.norm.weight': HubTensor(dtype='BF16', shape=[512], data_offsets=(512*512*2, 512*513*2)),
        'model.layers.0.mlp.up_proj.weight': HubTensor(dtype='BF16', shape=[512, 512], data_offsets=(0, 512*512*2))})
    meta = SafetensorsRepoMetadata(metadata=None, sharded=False, weight_map={k: 'model.safetensors' for k in f.tensors}, files_metadata={'model.safetensors': f})
    monkeypatch.setattr(huggingface_hub.HfApi, 'get_safetensors_metadata', lambda self, repo, revision=None: meta)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda repo, name, revision=None: str(tmp_path/name))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *a, **k: pytest.fail('downloaded weights for a plan'))
    plan = make_plan('someone/model')
    assert [(r.name, r.action) for r in plan.rows] == [('model.layers.0.mlp.up_proj.weight', 'quantize'), ('model.norm.weight', 'keep')]
    with pytest.raises(ConfigError, match='need the weights'): plan.source.read('model.norm.weight')

def test_offline_plan_of_a_hub_id_says_so(monkeypatch):
    import huggingface_hub
    def offline(self, repo, revision=None): raise OSError('no route to host')
    monkeypatch.setattr(huggingface_hub.HfApi, 'get_safetensors_metadata', offline)
    with pytest.raises(ConfigError, match='someone/model: no such folder here, and the hub says OSError: no route'): open_source('someone/model', weights=False)

def test_a_network_error_of_any_kind_becomes_one_line(monkeypatch):
    import huggingface_hub
    class ConnectError(Exception): pass                         # httpx raises its own, which is no OSError
    def offline(*a, **k): raise ConnectError('Name or service not known')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    monkeypatch.setattr(huggingface_hub.HfApi, 'get_safetensors_metadata', offline)
    for weights in (True, False):
        with pytest.raises(ConfigError, match='someone/model: no such folder here, and the hub says ConnectError: Name or service'): open_source('someone/model', weights=weights)

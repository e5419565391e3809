"""Damaged, foreign and old checkpoints through both doors: from_pretrained and load_model.

A damaged one is refused with the tensor and the file, before anything is computed; load_model also refuses what from_pretrained, by its nature, fills with random numbers."""
import json,os,re,shutil,warnings
import pytest,torch
transformers = pytest.importorskip('transformers')
from transformers import AutoModelForCausalLM,LlamaForCausalLM
from hlwq.checkpoint import verify_checkpoint
from hlwq.convert import dequantize_checkpoint,quantize_checkpoint
from hlwq.core import *
from hlwq.core import HLWQPerformanceWarning
from hlwq.hf import HLWQConfig
from hlwq.kernels import cpu
from hlwq.linear import HLWQLinear
from hlwq.load import load_model,model_class
from hlwq.packing import unpack_codes
from hlwq.recipe import Recipe,Rule
from kit import altered,complete,gap,logits,made,numpy_encode,original,quantized,small_config,snapshot,tensors_of,write_manifest,write_model,write_small
import hlwq.linear as linear_module,hlwq.experts as experts_module

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TINY = 'tiny-moe-10m'

@pytest.fixture(scope='module', autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        threads = torch.get_num_threads(); torch.set_num_threads(1)    # models this small only wait for each other's threads
        yield
        torch.set_num_threads(threads)

def fused(): return made('qwen3_moe-fused-q5', lambda d: quantize_checkpoint(made('qwen3_moe-fused', lambda o: write_small('qwen3_moe', o, save=dict(save_original_format=False))), d, progress=False))

# A folder, and the matrix in it that will be damaged: a plain one, an expert of a file with experts one by one, a slice of a fused stack, and a transposed one
VICTIMS = dict(linear=(lambda: quantized('llama'), 'model.layers.1.self_attn.q_proj.weight'), expert=(lambda: quantized('qwen3_moe'), 'model.layers.1.mlp.experts.2.up_proj.weight'),
    slice=(fused, 'model.layers.1.mlp.experts.gate_up_proj_e2'), transposed=(lambda: quantized('gpt_oss'), 'model.layers.0.mlp.experts.down_proj_e3'))
DOORS = dict(from_pretrained=lambda d, **kw: AutoModelForCausalLM.from_pretrained(d, **kw), load_model=lambda d, **kw: load_model(d, **{'verify':None, **kw}))
victims,doors = pytest.mark.parametrize('victim', VICTIMS),pytest.mark.parametrize('door', DOORS)

@pytest.fixture
def no_compute(monkeypatch):
    "Makes every product fail: what is refused must be refused before"
    def f(*a, **k): raise AssertionError('something was computed')
    for m,n in ((linear_module, 'packed_linear'), (experts_module, 'packed_expert_linear')): monkeypatch.setattr(m, n, f)

def refused(door, folder, error, *words):
    before = snapshot(folder)
    with pytest.raises(error) as e: DOORS[door](folder)
    assert complete(e.value) or 'pip install -U hlwq' in str(e.value), f'not "object: found, need required; next step": {e.value}'
    for w in words: assert w in str(e.value), f'{w} is not named: {e.value}'
    assert snapshot(folder) == before
    return str(e.value)

def half(t): return t[:len(t)//2].clone()
PARTS = ('packed', 'norms', 'meta')
DAMAGE = {f'no {p}':lambda t, k, p=p: t.pop(f'{k}__{p}') for p in PARTS}
DAMAGE |= {f'short {p}':lambda t, k, p=p: t.update({f'{k}__{p}':half(t[f'{k}__{p}'])}) for p in PARTS}
DAMAGE |= {f'long {p}':lambda t, k, p=p: t.update({f'{k}__{p}':torch.cat([t[f'{k}__{p}']]*2)}) for p in PARTS}
DAMAGE |= {f'{p} as {d}':lambda t, k, p=p, d=d: t.update({f'{k}__{p}':t[f'{k}__{p}'].to(getattr(torch, d))}) for p,d in (('packed', 'int8'), ('packed', 'int32'), ('packed', 'float32'), ('norms', 'int16'), ('norms', 'float64'), ('norms', 'uint8'), ('meta', 'int32'), ('meta', 'float32'))}
DAMAGE |= {f'norm is {v}':lambda t, k, v=v: t[f'{k}__norms'].view(-1).__setitem__(-1, float(v)) for v in ('nan', 'inf', '-inf')}
DAMAGE |= {f'meta[{i}]':lambda t, k, i=i: t[f'{k}__meta'].__setitem__(i, t[f'{k}__meta'][i] + 1000) for i in range(5)}
DAMAGE |= {'negative meta':lambda t, k: t[f'{k}__meta'].neg_(), 'a byte too few':lambda t, k: t.update({f'{k}__packed':t[f'{k}__packed'][:-1].clone()}), 'norms flat':lambda t, k: t.update({f'{k}__norms':t[f'{k}__norms'].flatten()}), '7 bits':lambda t, k: t.update({f'{k}__packed':torch.zeros(t[f'{k}__packed'].numel()//5*7, dtype=torch.uint8)})}

OTHER_BLOCKS = ('meta[2]', 'negative meta')                     # what they name is a format that is not read

@doors
@victims
@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_matrix(damage, victim, door, tmp_path, no_compute):
    folder,key = VICTIMS[victim]
    altered(folder(), tmp_path/'m', lambda t: DAMAGE[damage](t, key), n_shards=2)
    said = refused(door, tmp_path/'m', (CheckpointError, UnsupportedError) if damage in OTHER_BLOCKS else CheckpointError, key)
    assert re.search(r'model-0000\d-of-00002\.safetensors', said) or damage in OTHER_BLOCKS, f'the file is not named: {said}'

@doors
@pytest.mark.parametrize('victim', ['expert', 'slice', 'transposed'])
def test_missing_expert(victim, door, tmp_path, no_compute):
    folder,key = VICTIMS[victim]
    altered(folder(), tmp_path/'m', lambda t: [t.pop(f'{key}__{p}') for p in PARTS])
    refused(door, tmp_path/'m', CheckpointError, 'expert', re.search(r'\d+', key[20:])[0], str(tmp_path/'m'))

@doors
@pytest.mark.parametrize('part', ['gate_proj', 'up_proj'])
def test_missing_half_of_all_experts(part, door, tmp_path, no_compute):
    altered(quantized('qwen3_moe'), tmp_path/'m', lambda t: [t.pop(k) for k in list(t) if f'layers.0.mlp.experts' in k and f'.{part}.' in k])
    refused(door, tmp_path/'m', CheckpointError, 'layers.0.mlp.experts.gate_up_proj', str(tmp_path/'m'))

@doors
def test_widths_that_differ_in_one_stack(door, tmp_path, no_compute):
    altered(fused(), tmp_path/'m', lambda t: t.update({'model.layers.1.mlp.experts.gate_up_proj_e2__packed':torch.zeros(t['model.layers.1.mlp.experts.gate_up_proj_e2__packed'].numel()//5*4, dtype=torch.uint8)}))
    refused(door, tmp_path/'m', UnsupportedError, 'layers.1.mlp.experts.gate_up_proj', '4', '5')

# --- the config

def q(**kw): return lambda c: c['quantization_config'].update(kw)
def book(**kw): return lambda c: c['quantization_config']['codebook'].update(kw)
CONFIGS = {'newer format':(q(format_version=2), UnsupportedError), 'format 99':(q(format_version=99), UnsupportedError), 'format as text':(q(format_version='x'), UnsupportedError),
    'unknown codebook':(q(codebook='nope'), (CheckpointError, ConfigError)), 'unknown codebook, named':(q(codebook=dict(name='nope')), (CheckpointError, ConfigError)), 'codebook is a number':(q(codebook=5), (CheckpointError, ConfigError)),
    'too few centroids':(book(centroids={'5':[0., 1.]}), (CheckpointError, ConfigError)), 'centroids not finite':(book(centroids={'5':[float('nan')]*32}), (CheckpointError, ConfigError)), 'centroids are text':(book(centroids={'5':'x'*32}), (CheckpointError, ConfigError)),
    'centroids not rising':(book(centroids={'5':[1.]*32}), (CheckpointError, ConfigError)), 'centroids are a list':(book(centroids=[1, 2]), (CheckpointError, ConfigError)),
    '7 bits':(q(bits=7), (CheckpointError, ConfigError)), 'blocks of 64':(q(block_size=64), (CheckpointError, ConfigError, UnsupportedError)), 'unknown norm':(q(norm='max'), (CheckpointError, ConfigError)),
    'recipe is a number':(q(recipe=5), (CheckpointError, ConfigError)), 'recipe is a path':(q(recipe='/etc/hostname'), (CheckpointError, ConfigError)), 'recipe of nonsense':(q(recipe=dict(bits=5, rules=[dict(oops=1)])), (CheckpointError, ConfigError))}

@doors
@pytest.mark.parametrize('case', CONFIGS)
def test_settings_of_a_file(case, door, tmp_path, no_compute):
    change,error = CONFIGS[case]
    altered(quantized('llama'), tmp_path/'m', config=change)
    refused(door, tmp_path/'m', error)

@doors
@pytest.mark.parametrize('change', [dict(bits=None), dict(bits=4), dict(kept=None, dropped=None, bits_by_tensor=None), dict(kept=[1]), dict(something_new={'a':[1]}), dict(version='99.0')], ids=str)
def test_settings_that_do_not_matter(change, door, tmp_path):
    "Every field may be missing or more than is known; the width is taken from the tensors"
    altered(quantized('llama'), tmp_path/'m', config=q(**change))
    assert torch.equal(logits(DOORS[door](tmp_path/'m')), logits(load_model(quantized('llama'))))

@doors
@pytest.mark.parametrize('change,name', [(dict(hidden_size=256, head_dim=64), 'llama'), (dict(intermediate_size=512), 'llama'), (dict(num_attention_heads=8, num_key_value_heads=4), 'llama'), (dict(moe_intermediate_size=80), 'qwen3_moe'), (dict(num_local_experts=5, num_experts=5), 'qwen3_moe'), (dict(num_local_experts=3, num_experts=3), 'qwen3_moe')], ids=str)
def test_shapes_of_another_config(change, name, door, tmp_path, no_compute):
    altered(quantized(name), tmp_path/'m', config=lambda c: c.update(change))
    said = refused(door, tmp_path/'m', CheckpointError, 'model.layers.')
    assert str(tmp_path/'m') in said, f'the folder is not named: {said}'

@doors
@pytest.mark.parametrize('change', [lambda t: t.update({'model.norm.weight':torch.ones(3)}), lambda t: t.update({'model.embed_tokens.weight':torch.ones(70, 144)})])
def test_kept_tensors_of_another_shape(change, door, tmp_path, no_compute):
    altered(quantized('llama'), tmp_path/'m', change)
    refused(door, tmp_path/'m', CheckpointError)

# --- files

@doors
def test_truncated_shard(door, tmp_path, no_compute):
    for cut in (10, 1000, 60_000):
        d = altered(quantized('llama'), tmp_path/str(cut), n_shards=2)
        f = d/'model-00002-of-00002.safetensors'; f.write_bytes(f.read_bytes()[:-cut])
        refused(door, d, CheckpointError, f.name)

@doors
def test_missing_shard(door, tmp_path, no_compute):
    d = altered(quantized('llama'), tmp_path/'m', n_shards=3); (d/'model-00002-of-00003.safetensors').unlink()
    with pytest.raises((CheckpointError, OSError), match='model-00002-of-00003'): DOORS[door](d)

def test_changed_bytes(tmp_path, no_compute):
    "One bit of a code: found by sha256, which has to be asked for"
    d = altered(quantized('llama'), tmp_path/'m'); f = d/'model.safetensors'
    b = bytearray(f.read_bytes()); b[-5] ^= 1; f.write_bytes(b)
    assert load_model(d, verify=None) and load_model(d, verify='size') and load_model(d)
    with pytest.raises(CheckpointError, match='sha256') as e: load_model(d, verify='sha256')
    assert complete(e.value) and 'model.safetensors' in str(e.value)
    with pytest.raises(ConfigError) as e: load_model(d, verify='md5')
    assert complete(e.value)

def test_sizes_are_compared(tmp_path, no_compute):
    d = altered(quantized('llama'), tmp_path/'m'); (d/'config.json').write_text((d/'config.json').read_text() + ' ')
    with pytest.raises(CheckpointError, match='config.json') as e: load_model(d)
    assert complete(e.value) and load_model(d, verify=None)

def test_a_card_may_be_edited(tmp_path):
    "README.md is changed on the hub, by people and by push_to_hub; it is no part of the model"
    d = tmp_path/'m'; shutil.copytree(quantized('llama'), d); (d/'README.md').write_text('# Better\n'); (d/'notes.md').write_text('more')
    assert load_model(d) and load_model(d, verify='sha256')
    (d/'README.md').unlink()
    assert load_model(d)

def test_no_manifest(tmp_path, no_compute):
    "Not finished: load_model refuses. A part of a repository, as the hub hands out to from_pretrained, has none either"
    d = altered(quantized('llama'), tmp_path/'m', manifest=False)
    refused('load_model', d, CheckpointError, 'hlwq_manifest.json')
    assert AutoModelForCausalLM.from_pretrained(d).hlwq_report().rows

def test_no_config(tmp_path):
    d = tmp_path/'m'; shutil.copytree(quantized('llama'), d); (d/'config.json').unlink(); (d/'hlwq_manifest.json').unlink(); write_manifest(d)
    refused('load_model', d, CheckpointError, 'config.json')

def test_not_quantized(tmp_path):
    with pytest.raises(UnsupportedError, match='not quantized') as e: load_model(original('llama'))
    assert complete(e.value)
    for bad in (tmp_path/'nothing', tmp_path):
        with pytest.raises((HLWQError, OSError)): load_model(bad)

# --- what is missing or too much: only load_model insists

KEPT = ['model.norm.weight', 'model.embed_tokens.weight', 'lm_head.weight', 'model.layers.1.input_layernorm.weight']

@pytest.mark.parametrize('key', KEPT)
def test_missing_kept_tensor(key, tmp_path):
    d = altered(quantized('llama'), tmp_path/'m', lambda t: t.pop(key))
    refused('load_model', d, CheckpointError, key, str(d))
    assert AutoModelForCausalLM.from_pretrained(d)

@pytest.mark.parametrize('key', ['model.layers.1.self_attn.q_proj.weight', 'model.layers.0.mlp.down_proj.weight'])
def test_missing_matrix(key, tmp_path):
    d = altered(quantized('llama'), tmp_path/'m', lambda t: [t.pop(f'{key}__{p}') for p in PARTS])
    refused('load_model', d, CheckpointError, key, str(d))

@pytest.mark.parametrize('extra', ['model.extra.weight', 'model.layers.7.mlp.up_proj.weight', 'something'])
def test_extra_tensors(extra, tmp_path):
    d = altered(quantized('llama'), tmp_path/'m', lambda t: t.update({extra:torch.ones(3, 3)}))
    refused('load_model', d, CheckpointError, extra, str(d))
    d = altered(quantized('llama'), tmp_path/'p', lambda t: t.update({f'{extra}__{p}':t[f'model.layers.0.mlp.up_proj.weight__{p}'].clone() for p in PARTS}))
    refused('load_model', d, CheckpointError, extra, str(d))
    assert AutoModelForCausalLM.from_pretrained(d)

@pytest.mark.parametrize('layers', [1, 3])
def test_another_number_of_layers(layers, tmp_path):
    d = altered(quantized('qwen3_moe'), tmp_path/'m', config=lambda c: c.update(num_hidden_layers=layers))
    refused('load_model', d, CheckpointError, 'model.layers.', str(d))

def test_extras_that_the_model_passes_over(tmp_path):
    "Draft layers, which transformers leaves out on purpose, are no fault"
    write_small('qwen3_moe', tmp_path/'o')
    class_ = type(AutoModelForCausalLM.from_pretrained(tmp_path/'o'))
    before = class_._keys_to_ignore_on_load_unexpected
    class_._keys_to_ignore_on_load_unexpected = [r'^mtp.*']
    try:
        d = altered(quantized('qwen3_moe'), tmp_path/'m', lambda t: t.update({'mtp.norm.weight':torch.ones(4), **{f'mtp.fc.weight__{p}':t[f'model.layers.0.self_attn.q_proj.weight__{p}'].clone() for p in PARTS}}))
        assert torch.equal(logits(load_model(d)), logits(load_model(quantized('qwen3_moe'))))
    finally: class_._keys_to_ignore_on_load_unexpected = before
    refused('load_model', d, CheckpointError, 'mtp.norm.weight')

def test_dropped_tensors_are_not_missed(tmp_path):
    "A recipe that leaves something out says so in the file; what the model needs of it is still missing"
    quantize_checkpoint(original('llama'), tmp_path/'q', recipe=Recipe(5, [Rule('layers.1.self_attn.q_proj', drop='for a test')]), progress=False)
    refused('load_model', tmp_path/'q', CheckpointError, 'layers.1.self_attn.q_proj.weight')

@pytest.mark.parametrize('same', [True, False])
def test_tied_tensors(same, tmp_path):
    "A config that ties them and a file with both: equal ones are one, different ones are an error"
    write_small('llama', tmp_path/'o', tie_word_embeddings=True); quantize_checkpoint(tmp_path/'o', tmp_path/'q', progress=False)
    d = altered(tmp_path/'q', tmp_path/'m', lambda t: t.update({'lm_head.weight':t['model.embed_tokens.weight']*(1 if same else 2)}))
    if same: assert torch.equal(logits(load_model(d)), logits(load_model(tmp_path/'q')))
    else: refused('load_model', d, CheckpointError, 'lm_head.weight', 'model.embed_tokens.weight', str(d))

# --- sources that are quantized on the way in

@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
@pytest.mark.parametrize('name,key,param', [('llama', 'model.layers.1.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight'), ('qwen3_moe', 'model.layers.0.mlp.experts.2.up_proj.weight', 'model.layers.0.mlp.experts.gate_up_proj'),
    ('gpt_oss', 'model.layers.0.mlp.experts.down_proj', 'model.layers.0.mlp.experts.down_proj'), ('gpt2', 'transformer.h.1.attn.c_attn.weight', 'transformer.h.1.attn.c_attn.weight')])
def test_weights_that_are_not_finite(name, key, param, value, tmp_path):
    t = tensors_of(original(name)); t[key].view(-1)[-7] = float(value)
    write_model(tmp_path/'m', t, config=json.loads((original(name)/'config.json').read_text()), extra=False)
    with pytest.raises(NonFiniteError, match=re.escape(param)) as e: AutoModelForCausalLM.from_pretrained(tmp_path/'m', quantization_config=HLWQConfig())
    assert complete(e.value) and ('1 NaN' if value == 'nan' else '1 infinite') in str(e.value)
    with pytest.raises(NonFiniteError): quantize_checkpoint(tmp_path/'m', tmp_path/'q', progress=False)

@pytest.mark.parametrize('name,key,param', [('llama', 'model.layers.1.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight'), ('qwen3_moe', r'layers.0.mlp.experts', 'model.layers.0.mlp.experts'), ('gpt_oss', 'model.layers.0.mlp.experts.down_proj', 'model.layers.0.mlp.experts.down_proj')])
def test_weights_that_are_missing(name, key, param, tmp_path):
    t = {k:v for k,v in tensors_of(original(name)).items() if not (key in k and 'bias' not in k)}
    write_model(tmp_path/'m', t, config=json.loads((original(name)/'config.json').read_text()), extra=False)
    with pytest.raises(CheckpointError, match=re.escape(param)) as e: AutoModelForCausalLM.from_pretrained(tmp_path/'m', quantization_config=HLWQConfig())
    assert complete(e.value)

def test_one_expert_is_missing(tmp_path):
    t = {k:v for k,v in tensors_of(original('qwen3_moe')).items() if 'layers.1.mlp.experts.2.' not in k}
    write_model(tmp_path/'m', t, config=json.loads((original('qwen3_moe')/'config.json').read_text()), extra=False)
    with pytest.raises((CheckpointError, RuntimeError), match='experts') as e: AutoModelForCausalLM.from_pretrained(tmp_path/'m', quantization_config=HLWQConfig())
    assert isinstance(e.value, HLWQError)

def test_sources_of_another_shape(tmp_path):
    cfg = json.loads((original('llama')/'config.json').read_text())
    write_model(tmp_path/'m', tensors_of(original('llama')), config=cfg | dict(intermediate_size=512), extra=False)
    with pytest.raises(CheckpointError, match='mlp') as e: AutoModelForCausalLM.from_pretrained(tmp_path/'m', quantization_config=HLWQConfig())
    assert complete(e.value)

def test_state_dict_without_a_folder():
    with pytest.raises((HLWQError, ValueError)): LlamaForCausalLM.from_pretrained(None, config=transformers.AutoConfig.from_pretrained(quantized('llama')), state_dict=tensors_of(quantized('llama')))

# --- older layouts

def respell(folder, out, how, meta4=True, n_shards=1, index=True, config=None, codebook=None):
    "The same codes as older tools spell them; nothing says which codebook made them, unless asked"
    t,res = tensors_of(folder),{}
    for k,v in t.items():
        m = re.fullmatch(r'(.+)__(packed|norms|meta)', k)
        if not m: res[k] = v; continue
        p,part = m[1],m[2]
        if '.E' in how: p = re.sub(r'_e(\d+)$', r'.\1', p)
        if how[0] == 'B': p = p.replace('.', '__')
        if how[0] == 'C':
            if part == 'meta': continue
            if part == 'packed': part,v = 'codes',unpack_codes(v, v.numel()*8//int(t[f'{m[1]}__meta'][3]), int(t[f'{m[1]}__meta'][3])).to(torch.int8)
        res[f'{p}__{part}'] = v[:4].clone() if part == 'meta' and meta4 else v
    cfg = {k:v for k,v in json.loads((folder/'config.json').read_text()).items() if k != 'quantization_config'}
    write_model(out, res, n_shards, config=cfg, extra=False)
    if not index: (out/'model.safetensors.index.json').unlink()
    if config: (out/config).write_text(json.dumps({} if codebook is None else dict(codebook=codebook, bits=5)))
    return out

@pytest.mark.parametrize('shards', [(1, True), (3, True), (3, False)], ids=['one', 'index', 'no index'])
@pytest.mark.parametrize('how', ['A', 'B', 'C', 'A.E'])
@pytest.mark.parametrize('name', ['llama', 'fused', 'qwen3_moe', 'gpt_oss', 'gpt2'])
def test_older_layouts(name, how, shards, tmp_path):
    "Meta of length four, no settings at all, several spellings, with and without an index"
    if 'E' in how and name not in ('fused', 'gpt_oss'): pytest.skip('no slices')
    src = fused() if name == 'fused' else quantized(name)
    d = respell(src, tmp_path/'old', how, n_shards=shards[0], index=shards[1])
    before = snapshot(d)
    m = load_model(d, codebook='lloyd-max')
    assert torch.equal(logits(m), logits(load_model(src))) and snapshot(d) == before
    m.save_pretrained(tmp_path/'new')
    assert verify_checkpoint(tmp_path/'new').ok and torch.equal(logits(load_model(tmp_path/'new')), logits(m))
    dequantize_checkpoint(d, tmp_path/'d', codebook='lloyd-max', dtype=torch.float32, progress=False)
    if name in ('llama', 'fused'): assert gap(logits(AutoModelForCausalLM.from_pretrained(tmp_path/'d')), logits(m)) < 1e-5

@pytest.mark.parametrize('config', [None, 'polar_config.json', 'hlwq_config.json'])
@pytest.mark.parametrize('named', [True, False])
def test_older_codebook(config, named, tmp_path):
    "inf100, named in a file beside the shards, by the caller, or detected; written by an encoder that knows only the description"
    from hlwq.lloyd_max import codebook
    src,c = tensors_of(original('qwen3_moe')),codebook('inf100', 5).tolist()
    t = {}
    for k,v in src.items():
        if v.ndim == 2 and '_proj' in k:
            packed,norms,meta = numpy_encode(v.double().numpy(), 5, c)
            t |= {f'{k}__packed':torch.from_numpy(packed), f'{k}__norms':torch.from_numpy(norms), f'{k}__meta':torch.tensor([*meta.tolist(), v.shape[1]])}
        else: t[k] = v
    write_model(tmp_path/'m', t, 2, config=json.loads((original('qwen3_moe')/'config.json').read_text()), extra=False)
    if config: (tmp_path/'m'/config).write_text(json.dumps(dict(codebook='inf100') if named else {}))
    in_file = bool(config and named)
    m = load_model(tmp_path/'m', **({} if in_file or not named else dict(codebook='inf100')))
    found = {b.book.name for b in m.modules() if isinstance(b, HLWQLinear)}
    dequantize_checkpoint(tmp_path/'m', tmp_path/'d', dtype=torch.float32, progress=False, **({} if in_file or not named else dict(codebook='inf100')))
    assert found == {'inf100'} and gap(logits(m), logits(AutoModelForCausalLM.from_pretrained(tmp_path/'d'))) < 1e-5
    m.save_pretrained(tmp_path/'s')
    assert torch.equal(logits(load_model(tmp_path/'s')), logits(m))

def test_old_layout_and_offload(tmp_path):
    "A folder that is only shown to transformers for a moment must not be needed afterwards"
    d = respell(quantized('llama'), tmp_path/'old', 'A', n_shards=2)
    m = load_model(d, codebook='lloyd-max', device_map={'model.embed_tokens':'disk', 'model.layers.0':'cpu', 'model.layers.1':'disk', 'model.norm':'disk', 'model.rotary_emb':'cpu', 'lm_head':'disk'}, offload_folder=str(tmp_path/'off'))
    assert torch.equal(logits(m), logits(load_model(quantized('llama'))))

def test_old_layout_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path/'tmp').mkdir(); monkeypatch.setattr('tempfile.tempdir', str(tmp_path/'tmp'))
    d = respell(quantized('llama'), tmp_path/'old', 'B')
    m = load_model(d, codebook='lloyd-max'); logits(m)
    assert not list((tmp_path/'tmp').iterdir()) and m.name_or_path == str(d)

def test_foreign_layouts_are_refused_by_name(tmp_path):
    write_model(tmp_path/'legacy', {'a.codes':torch.zeros(4, dtype=torch.uint8), 'a.norms':torch.ones(2), 'a.ct_scaled':torch.ones(4)}, config=small_config('llama').to_dict())
    with pytest.raises(UnsupportedError, match='polarengine') as e: load_model(tmp_path/'legacy')
    assert complete(e.value)
    write_model(tmp_path/'ct', {'a.weight_packed':torch.zeros(4, 4, dtype=torch.int32)}, config=small_config('llama').to_dict() | dict(quantization_config=dict(quant_method='compressed-tensors')))
    with pytest.raises(UnsupportedError, match='compressed-tensors'): load_model(tmp_path/'ct')

# --- options

def test_options(tmp_path):
    d = quantized('qwen3_moe')
    for dtype in (torch.float32, torch.bfloat16): assert load_model(d, dtype=dtype).dtype == dtype and not has_float_experts(load_model(d, dtype=dtype))
    assert load_model(str(d)).name_or_path == str(d) and load_model(d).dtype == torch.float32 and not load_model(d).training
    a,b = load_model(d, cache_dequantized=True),load_model(d)
    assert gap(logits(a), logits(b)) < 1e-5 and 'dense, cached' in a.hlwq_report().backends and not any(getattr(m, 'cached', False) for m in b.modules())
    with pytest.raises(ConfigError) as e: load_model(d, backend='magic')
    assert complete(e.value)
    m = load_model(d, config=transformers.AutoConfig.from_pretrained(d), experts_implementation='batched_mm')
    assert m.config._experts_implementation == 'batched_mm'
    for bad in ('nope', 'trunc5'):
        with pytest.raises(ConfigError): load_model(d, codebook=bad)

def has_float_experts(model): return [n for n,p in model.named_parameters() if p.ndim == 3 and p.is_floating_point()]

def test_backend_that_was_asked_for(monkeypatch):
    if cpu.available(): assert load_model(quantized('llama'), backend='compiled').hlwq_report().backends == ['compiled kernel']
    monkeypatch.setattr(cpu, 'available', lambda: False); monkeypatch.setattr(cpu, 'why_not', lambda: 'a test')
    with pytest.raises(UnsupportedError, match='compiled') as e: load_model(quantized('llama'), backend='compiled')
    assert complete(e.value)

def test_slow_layers_are_announced_once(monkeypatch):
    from hlwq.core import warn_once
    monkeypatch.setattr(cpu, 'available', lambda: False); monkeypatch.setattr(cpu, 'why_not', lambda: 'of a test')
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for _ in range(2): load_model(quantized('llama'))
    said = [str(o.message) for o in w if issubclass(o.category, HLWQPerformanceWarning)]
    assert len(said) == 1 and 'of a test' in said[0] and '14' in said[0]

def test_model_class():
    c = small_config('llama')
    for named,want in ((['LlamaForCausalLM'], 'LlamaForCausalLM'), (['LlamaModel'], 'LlamaModel'), (['NoSuchThing'], 'AutoModelForCausalLM'), (None, 'AutoModelForCausalLM'), (['__version__'], 'AutoModelForCausalLM'), (['Trainer', 'LlamaForCausalLM'], 'LlamaForCausalLM'), (['pipeline'], 'AutoModelForCausalLM')):
        c.architectures = named
        assert model_class(c).__name__ == want, named

def test_files_are_closed(tmp_path):
    "Whether it works or not"
    def open_files(): return sum(1 for f in os.listdir('/proc/self/fd') if (p := os.path.realpath(f'/proc/self/fd/{f}')) and p.endswith('.safetensors'))
    if not os.path.isdir('/proc/self/fd'): pytest.skip('no /proc')
    bad = altered(quantized('llama'), tmp_path/'m', lambda t: t['model.layers.1.self_attn.q_proj.weight__norms'].fill_(float('nan')))
    before = open_files()
    for _ in range(3):
        m = load_model(quantized('llama')); m = AutoModelForCausalLM.from_pretrained(quantized('llama'))
        with pytest.raises(CheckpointError): load_model(bad, verify=None)
        with pytest.raises(CheckpointError): AutoModelForCausalLM.from_pretrained(bad)
    assert open_files() <= before + 1

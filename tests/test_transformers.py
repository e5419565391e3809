"""Packed models in transformers: loading, quantizing while loading, saving, offloading, generating, compiling, adapters.

The models are made by transformers from small configs; what a packed model must equal is the model that dequantize_checkpoint writes, in float32.
Runs with every transformers that is supported: what differs between versions is looked up, never the version."""
import copy,gc,io,json,pickle,shutil,warnings
from collections import Counter
import pytest,torch
transformers = pytest.importorskip('transformers')
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig,AutoModel,AutoModelForCausalLM,AutoModelForSequenceClassification,AutoTokenizer,BertConfig,BertForMaskedLM,GPT2LMHeadModel,GPT2Model,LlamaForCausalLM
from common import python
from hlwq.checkpoint import verify_checkpoint
from hlwq.convert import dequantize_checkpoint,quantize_checkpoint
from hlwq.core import *
from hlwq.core import BITS,asset_path
from hlwq.experts import WAYS,HLWQExperts
from hlwq.hf import HLWQConfig,HLWQQuantizer,parse_size
from hlwq.kernels import cpu
from hlwq.linear import HLWQLinear
from hlwq.load import load_model
from hlwq.recipe import Recipe,Rule
from kit import EXPERTS,SIZES,SMALL,altered,complete,decoded_twin,gap,logits,made,original,quantized,same_tensors,small_config,snapshot,some_ids,tensors_of,write_model,write_small

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TINY = 'tiny-moe-10m'
NAMES = [TINY, *SMALL]

@pytest.fixture(scope='module', autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', category=UserWarning)
        warnings.filterwarnings('ignore', category=FutureWarning)
        threads = torch.get_num_threads(); torch.set_num_threads(1)    # models this small only wait for each other's threads
        yield
        torch.set_num_threads(threads)

def packed(name, bits=5, **kw): return AutoModelForCausalLM.from_pretrained(quantized(name, bits), **{'dtype':torch.float32, **kw})
def dense(name, bits=5, **kw): return AutoModelForCausalLM.from_pretrained(decoded_twin(name, bits), **{'dtype':torch.float32, **kw})
def on_the_fly(src, config=None, **kw): return AutoModelForCausalLM.from_pretrained(original(src) if src in NAMES else src, quantization_config=config or HLWQConfig(), **{'dtype':'auto', **kw})
def settings(folder): return json.loads((folder/'config.json').read_text())['quantization_config']
def has_float_experts(model): return [n for n,p in model.named_parameters() if p.ndim == 3 and p.is_floating_point() and 'conv' not in n]

# --- packed equals decoded

@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('name', NAMES)
def test_packed_equals_decoded(name, bits):
    m = packed(name, bits)
    assert not has_float_experts(m) and {r['bits'] for r in m.hlwq_report().rows} == {bits}
    assert gap(logits(m), logits(dense(name, bits))) < 1e-5

@pytest.mark.parametrize('name', NAMES)
def test_without_the_kernel(name, monkeypatch):
    with_kernel = logits(packed(name))
    monkeypatch.setattr(cpu, 'available', lambda: False)
    m = packed(name)
    assert gap(logits(m), with_kernel) < 1e-5 and all(b.startswith('torch') for b in m.hlwq_report().backends)

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', [TINY, 'qwen3_moe', 'gpt_oss', 'no_gate'])
def test_experts_implementation(name, way):
    want = logits(dense(name))
    m = packed(name, experts_implementation=way)
    assert {e.way for e in m.modules() if isinstance(e, HLWQExperts)} == {way} and gap(logits(m), want) < 1e-5
    for other in WAYS: m.set_experts_implementation(other); assert gap(logits(m), want) < 1e-5

def test_unknown_experts_implementation():
    m = packed('qwen3_moe')
    m.config._experts_implementation = 'sonicmoe'
    with pytest.raises(UnsupportedError, match='sonicmoe') as e: logits(m)
    assert complete(e.value)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    m = packed('qwen3_moe', dtype=dtype)
    assert m.dtype == dtype and logits(m).dtype == dtype and gap(logits(m), logits(dense('qwen3_moe'))) < .2
    assert {p.dtype for n,p in m.named_parameters() if n.endswith(('packed', 'norm_bits'))} == {torch.uint8, torch.int16}

# --- quantized on the way in

@pytest.mark.parametrize('name', NAMES)
def test_on_the_fly_is_the_converter(name, tmp_path):
    "The same bytes, loaded from the file or made while loading; then saved, loaded and saved again without a change"
    f = on_the_fly(name)
    assert torch.equal(logits(f), logits(packed(name, dtype='auto'))) and not has_float_experts(f)
    a,b = f.state_dict(),packed(name, dtype='auto').state_dict()
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k,v in a.items())
    f.save_pretrained(tmp_path/'a')
    assert verify_checkpoint(tmp_path/'a').ok, verify_checkpoint(tmp_path/'a')
    g = AutoModelForCausalLM.from_pretrained(tmp_path/'a')
    assert torch.equal(logits(g), logits(f)) and g.dtype == f.dtype
    g.save_pretrained(tmp_path/'b'); load_model(tmp_path/'b').save_pretrained(tmp_path/'c')
    assert snapshot(tmp_path/'a') == snapshot(tmp_path/'b') == snapshot(tmp_path/'c')
    dequantize_checkpoint(tmp_path/'a', tmp_path/'d', dtype=torch.float32, progress=False)
    assert gap(logits(AutoModelForCausalLM.from_pretrained(tmp_path/'d', dtype=torch.float32)), logits(dense(name))) < 1e-6

@pytest.mark.parametrize('name', NAMES)
def test_load_and_save_again(name, tmp_path):
    "A checkpoint of the converter, saved from transformers, stands for the same model and keeps what was kept, bit by bit"
    packed(name, dtype='auto').save_pretrained(tmp_path/'a')
    assert verify_checkpoint(tmp_path/'a').ok
    old,new = tensors_of(quantized(name)),tensors_of(tmp_path/'a')
    for k in old.keys() & new.keys(): assert old[k].dtype == new[k].dtype and torch.equal(old[k], new[k]), k
    kept = [k for k in old if '__' not in k]
    assert sorted(k for k in new if '__' not in k) == sorted(kept) and kept
    assert torch.equal(logits(load_model(tmp_path/'a')), logits(packed(name, dtype='auto')))
    assert settings(tmp_path/'a')['bits'] == 5 and settings(tmp_path/'a')['format_version'] == 1

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_types_of_the_file_are_kept(dtype, tmp_path):
    write_small('qwen3_moe', tmp_path/'o', dtype)
    f = on_the_fly(tmp_path/'o'); f.save_pretrained(tmp_path/'a'); quantize_checkpoint(tmp_path/'o', tmp_path/'q', progress=False)
    old,new = tensors_of(tmp_path/'q'),tensors_of(tmp_path/'a')
    kept = [k for k in old if '__' not in k]
    assert {new[k].dtype for k in kept} == {dtype} and all(torch.equal(new[k], old[k]) for k in kept) and f.dtype == dtype

@pytest.mark.parametrize('norm,book,bits', [('l2', 'lloyd-max', 4), ('gain', 'inf100', 5), ('l2', 'trunc4', 3), ('gain', 'inf100', 2)])
def test_norm_and_codebook(norm, book, bits, tmp_path):
    on_the_fly('llama', HLWQConfig(bits, norm=norm, codebook=book)).save_pretrained(tmp_path/'a')
    quantize_checkpoint(original('llama'), tmp_path/'q', bits=bits, norm=norm, codebook=book, progress=False)
    same_tensors(tmp_path/'a', tmp_path/'q')
    assert {k:settings(tmp_path/'a')[k] for k in ('bits', 'norm', 'codebook')} == {k:settings(tmp_path/'q')[k] for k in ('bits', 'norm', 'codebook')}
    m = load_model(tmp_path/'a'); m.save_pretrained(tmp_path/'b')
    assert snapshot(tmp_path/'a') == snapshot(tmp_path/'b')

MIXED = Recipe(4, [Rule('down_proj', bits=8), Rule(r'layers\.0\..*q_proj', bits=2), Rule(r'layers\.1\..*o_proj', keep='too sensitive')])

@pytest.mark.parametrize('name', ['llama', 'qwen3_moe_fused', 'gpt_oss'])
def test_mixed_recipe(name, tmp_path):
    "Several widths, other ones in the two halves of a stack, and something kept"
    src = made(name, lambda d: write_small('qwen3_moe', d, save=dict(save_original_format=False))) if name.endswith('fused') else original(name)
    f = on_the_fly(src, HLWQConfig(recipe=MIXED)); f.save_pretrained(tmp_path/'a')
    quantize_checkpoint(src, tmp_path/'q', recipe=MIXED, progress=False)
    same_tensors(tmp_path/'a', tmp_path/'q')
    assert {r['bits'] for r in f.hlwq_report().rows} == {2, 4, 8} and isinstance(f.get_submodule('model.layers.1.self_attn.o_proj'), torch.nn.Linear) and not isinstance(f.get_submodule('model.layers.1.self_attn.o_proj'), HLWQLinear)
    g = load_model(tmp_path/'a')
    assert torch.equal(logits(f), logits(g)) and set(settings(tmp_path/'a')['bits_by_tensor'].values()) == {2, 8}
    assert [k for k in settings(tmp_path/'a')['kept'] if 'o_proj.weight' in k] == ['model.layers.1.self_attn.o_proj.weight']
    g.save_pretrained(tmp_path/'b')
    assert snapshot(tmp_path/'a') == snapshot(tmp_path/'b')
    dequantize_checkpoint(tmp_path/'q', tmp_path/'d', dtype=torch.float32, progress=False)
    assert gap(logits(g), logits(AutoModelForCausalLM.from_pretrained(tmp_path/'d'))) < 1e-5

def test_recipe_as_toml_and_lm_head(tmp_path):
    (tmp_path/'r.toml').write_text("bits = 6\n[[rules]]\nmatch = 'lm_head'\nbits = 8\n")
    f = on_the_fly('llama', HLWQConfig(recipe=tmp_path/'r.toml'))
    assert isinstance(f.lm_head, HLWQLinear) and f.lm_head.bits == 8 and f.get_output_embeddings().weight.shape == (64, 144)
    f.save_pretrained(tmp_path/'a'); g = load_model(tmp_path/'a')
    assert torch.equal(logits(f), logits(g)) and g.config.quantization_config.bits == 6

def test_packed_embedding(tmp_path):
    "By force, which is what it takes: the same bytes as from the converter, and the same model from all of them"
    r = Recipe(5, [Rule('embed_tokens', bits=8, force=True), Rule('lm_head', bits=6)])
    f = on_the_fly('llama', HLWQConfig(recipe=r)); f.save_pretrained(tmp_path/'a'); quantize_checkpoint(original('llama'), tmp_path/'q', recipe=r, progress=False)
    same_tensors(tmp_path/'a', tmp_path/'q')
    g = load_model(tmp_path/'a'); g.save_pretrained(tmp_path/'b')
    assert snapshot(tmp_path/'a') == snapshot(tmp_path/'b') and torch.equal(logits(f), logits(g)) and type(g.get_input_embeddings()).__name__ == 'HLWQEmbedding'
    dequantize_checkpoint(tmp_path/'q', tmp_path/'d', dtype=torch.float32, progress=False); d = AutoModelForCausalLM.from_pretrained(tmp_path/'d')
    assert gap(logits(g), logits(d)) < 1e-5
    with pytest.raises(HLWQError): g.resize_token_embeddings(70)
    g = load_model(tmp_path/'a'); g.dequantize(dtype=torch.float32)
    assert gap(logits(g), logits(d)) < 1e-5 and type(g.get_input_embeddings()) is torch.nn.Embedding

def test_resized_embedding(tmp_path):
    m = packed('llama'); m.resize_token_embeddings(70); m.save_pretrained(tmp_path/'a')
    assert torch.equal(logits(load_model(tmp_path/'a')), logits(m)) and m.lm_head.weight.shape[0] == 70

def test_fused_and_per_expert_files_give_the_same(tmp_path):
    write_small('qwen3_moe', tmp_path/'fused', save=dict(save_original_format=False))
    assert any('gate_up_proj' in k for k in tensors_of(tmp_path/'fused')) and not any('gate_up_proj' in k for k in tensors_of(original('qwen3_moe')))
    a,b = on_the_fly('qwen3_moe'),on_the_fly(tmp_path/'fused')
    quantize_checkpoint(tmp_path/'fused', tmp_path/'q', progress=False)
    c = load_model(tmp_path/'q')
    assert torch.equal(logits(a), logits(b)) and torch.equal(logits(a), logits(c)) and torch.equal(logits(a), logits(packed('qwen3_moe')))
    a.save_pretrained(tmp_path/'a'); b.save_pretrained(tmp_path/'b')
    same_tensors(tmp_path/'a', tmp_path/'b'); same_tensors(tmp_path/'a', tmp_path/'q')

def test_norms_of_one_expert_in_float32(tmp_path):
    "One expert has tiny weights, one huge ones: only their norms become wider, in the file"
    write_small('qwen3_moe', tmp_path/'o', save=dict(save_original_format=False))
    def change(t):
        t['model.layers.0.mlp.experts.gate_up_proj'][1] *= 1e-7; t['model.layers.1.mlp.experts.down_proj'][2] *= 1e6; t['model.layers.0.self_attn.q_proj.weight'][3] *= 1e-8
    t = tensors_of(tmp_path/'o'); change(t); shutil.rmtree(tmp_path/'o'); write_model(tmp_path/'o', t, config=small_config('qwen3_moe').to_dict() | dict(architectures=['Qwen3MoeForCausalLM']), extra=False)
    f = on_the_fly(tmp_path/'o'); f.save_pretrained(tmp_path/'a'); quantize_checkpoint(tmp_path/'o', tmp_path/'q', progress=False)
    same_tensors(tmp_path/'a', tmp_path/'q')
    got = tensors_of(tmp_path/'a')
    assert sorted(k for k,v in got.items() if v.dtype == torch.float32 and '__norms' in k) == [f'model.layers.{o}__norms' for o in ('0.mlp.experts.gate_up_proj_e1', '0.self_attn.q_proj.weight', '1.mlp.experts.down_proj_e2')]
    m = load_model(tmp_path/'a'); m.save_pretrained(tmp_path/'b')
    assert snapshot(tmp_path/'a') == snapshot(tmp_path/'b') and torch.equal(logits(m), logits(f))
    index = json.loads((tmp_path/'a/model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == sum(t.nbytes for t in got.values())

def test_float32_norms_of_others_stay(tmp_path):
    "Another writer may store float32 norms where float16 would do; saving must not round them"
    def widen(t):
        for k in [k for k in t if k.endswith('__norms')]: t[k] = t[k].float()*1.0001
    altered(quantized('qwen3_moe'), tmp_path/'q', widen); m = load_model(tmp_path/'q')
    m.save_pretrained(tmp_path/'a')
    assert torch.equal(logits(load_model(tmp_path/'a')), logits(m)) and torch.equal(tensors_of(tmp_path/'a')['model.layers.0.self_attn.q_proj.weight__norms'], tensors_of(tmp_path/'q')['model.layers.0.self_attn.q_proj.weight__norms'])

@pytest.mark.parametrize('tied', [True, False])
def test_tied_embeddings(tied, tmp_path):
    write_small('llama', tmp_path/'o', tie_word_embeddings=tied)
    f = on_the_fly(tmp_path/'o'); f.save_pretrained(tmp_path/'a')
    assert ('lm_head.weight' in tensors_of(tmp_path/'a')) is (not tied) and verify_checkpoint(tmp_path/'a').ok
    for m in (AutoModelForCausalLM.from_pretrained(tmp_path/'a'), load_model(tmp_path/'a')):
        assert torch.equal(logits(m), logits(f)) and (m.lm_head.weight is m.get_input_embeddings().weight) is tied

def test_tied_heads_with_other_names(tmp_path):
    "An output head that is not called lm_head and shares its weight is left alone"
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=136)).save_pretrained(tmp_path/'o')
    f = BertForMaskedLM.from_pretrained(tmp_path/'o', quantization_config=HLWQConfig())
    assert f.cls.predictions.decoder.weight is f.bert.embeddings.word_embeddings.weight and isinstance(f.bert.encoder.layer[0].output.dense, HLWQLinear)
    quantize_checkpoint(tmp_path/'o', tmp_path/'q', progress=False)
    assert torch.equal(logits(f), logits(BertForMaskedLM.from_pretrained(tmp_path/'q')))

def test_one_config_for_two_models(tmp_path):
    "What a model says about itself is not changed by the next one that is loaded with the same object"
    c = HLWQConfig(bits=4); before = c.to_dict()
    a = GPT2LMHeadModel.from_pretrained(original('gpt2'), quantization_config=c); b = LlamaForCausalLM.from_pretrained(original('llama'), quantization_config=c)
    assert c.to_dict() == before and a.config.quantization_config is not b.config.quantization_config
    for m,name in ((a, 'gpt2'), (b, 'llama')):
        m.save_pretrained(tmp_path/name)
        assert torch.equal(logits(load_model(tmp_path/name)), logits(m))

def test_config_of_the_caller():
    for bad,error in ((dict(bits=7), ConfigError), (dict(bits='5'), ConfigError), (dict(norm='max'), ConfigError), (dict(codebook='best'), ConfigError), (dict(block_size=64), ConfigError)):
        with pytest.raises(error) as e: HLWQConfig(**bad)
        assert complete(e.value)
    c = HLWQConfig(recipe=MIXED)
    again = HLWQConfig.from_dict(json.loads(json.dumps(c.to_dict())))
    assert again.recipe.rules == MIXED.rules and again.to_dict() == c.to_dict() and 'down_proj' in repr(c) and json.loads(c.to_json_string())
    m = on_the_fly('llama', c)
    assert json.loads(m.config.to_json_string())['quantization_config']['quant_method'] == 'hlwq' and copy.deepcopy(m.config).to_dict() == m.config.to_dict()

def test_rules_that_do_nothing():
    with pytest.raises(ConfigError, match='matches none') as e: on_the_fly('llama', HLWQConfig(recipe=Recipe(5, [Rule('nothing_like_this', bits=4)])))
    assert complete(e.value)
    with pytest.raises(UnsupportedError) as e: on_the_fly('qwen3_moe', HLWQConfig(recipe=Recipe(5, [Rule(r'layers\.0.*experts\.down_proj', keep='half of it')])))
    assert complete(e.value)

def test_settings_of_the_file_win(tmp_path):
    m = packed('llama', 4, quantization_config=HLWQConfig(bits=8))
    assert {r['bits'] for r in m.hlwq_report().rows} == {4} and m.config.quantization_config.bits == 4

# --- saving

def test_shards(tmp_path):
    f = on_the_fly('qwen3_moe')
    f.save_pretrained(tmp_path/'a'); f.save_pretrained(tmp_path/'b', max_shard_size=30_000); f.save_pretrained(tmp_path/'c', max_shard_size='30KB')
    assert len(list((tmp_path/'b').glob('model-*'))) > 8 and snapshot(tmp_path/'b') == snapshot(tmp_path/'c')
    same_tensors(tmp_path/'a', tmp_path/'b')
    assert verify_checkpoint(tmp_path/'b').ok and torch.equal(logits(load_model(tmp_path/'b', verify='sha256')), logits(f)) and torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path/'b')), logits(f))

@pytest.mark.parametrize('size,n', [('5GB', 5*10**9), ('500MB', 5*10**8), (' 1.5 kB ', 1500), ('1KiB', 1024), ('2GiB', 2**31), (7, 7), ('100B', 100)])
def test_sizes(size, n): assert parse_size(size) == n

@pytest.mark.parametrize('size', ['GB', '5 apples', None, '', '-5GB'])
def test_sizes_that_are_none(size):
    with pytest.raises(ConfigError) as e: parse_size(size)
    assert complete(e.value)

def test_into_a_folder_with_a_tokenizer(tmp_path):
    "A folder may hold other things, before and after; they stay"
    out = tmp_path/'a'
    AutoTokenizer.from_pretrained(asset_path(TINY)).save_pretrained(out); (out/'notes.txt').write_text('mine'); (out/'sub').mkdir(); (out/'sub/x').write_text('1')
    before = snapshot(out)
    f = on_the_fly('llama'); f.save_pretrained(out)
    assert snapshot(out).items() >= before.items() and verify_checkpoint(out).ok and torch.equal(logits(load_model(out)), logits(f))
    assert AutoTokenizer.from_pretrained(out)('hello')['input_ids'] and not [p for p in tmp_path.rglob('*') if 'partial' in p.name or 'hlwq-' in p.name]

def test_again_into_the_same_folder(tmp_path):
    "The last one wins, completely: shards, index, card"
    a,b = on_the_fly('llama', HLWQConfig(bits=8)),on_the_fly('llama', HLWQConfig(bits=4))
    a.save_pretrained(tmp_path/'a', max_shard_size=30_000); b.save_pretrained(tmp_path/'a')
    b.save_pretrained(tmp_path/'b')
    assert snapshot(tmp_path/'a') == snapshot(tmp_path/'b') and 'at 4 bits' in (tmp_path/'a/README.md').read_text()
    b.save_pretrained(tmp_path/'a')
    assert snapshot(tmp_path/'a') == snapshot(tmp_path/'b') and verify_checkpoint(tmp_path/'a').ok
    c = load_model(tmp_path/'a'); c.save_pretrained(tmp_path/'a', max_shard_size=30_000)
    assert torch.equal(logits(load_model(tmp_path/'a')), logits(b)) and torch.equal(logits(c), logits(b))

def test_card_leads_with_the_import(tmp_path):
    "Also where there is a card already: its text follows the note"
    f = on_the_fly('llama')
    for d,card in (('new', None), ('old', '---\nlicense: mit\n---\n# My model\n')):
        (tmp_path/d).mkdir()
        if card: (tmp_path/d/'README.md').write_text(card)
        f.save_pretrained(tmp_path/d)
        text = (tmp_path/d/'README.md').read_text()
        assert 'import hlwq' in text and (not card or text.startswith('---\nlicense: mit') and '# My model' in text)

def test_somebody_elses_weights_are_not_replaced(tmp_path):
    f = on_the_fly('llama')
    for d,names in (('dense', None), ('adapter', ['adapter_model.safetensors'])):
        if names is None: shutil.copytree(original('llama'), tmp_path/d)
        else: (tmp_path/d).mkdir(); shutil.copy(original('llama')/'model.safetensors', tmp_path/d/names[0])
        before = snapshot(tmp_path)
        with pytest.raises(FileExistsError, match='hlwq'): f.save_pretrained(tmp_path/d)
        assert snapshot(tmp_path) == before
    (tmp_path/'file').write_text('x')
    with pytest.raises(OSError): f.save_pretrained(tmp_path/'file')
    assert (tmp_path/'file').read_text() == 'x'

@pytest.mark.parametrize('into', [True, False])
def test_interrupted_save(into, tmp_path, monkeypatch):
    "An error in the middle leaves an old checkpoint as it was, and no folder that looks finished"
    import hlwq.packed_model as pm
    f = on_the_fly('llama'); out = tmp_path/'a'
    if into: f.save_pretrained(out); before = snapshot(out)
    real,calls = pm._write,[]
    def fail(*a):
        calls.append(1)
        if len(calls) > 3: raise OSError(28, 'No space left on device')
        return real(*a)
    monkeypatch.setattr(pm, '_write', fail)
    with pytest.raises(OSError): f.save_pretrained(out, max_shard_size=30_000)
    monkeypatch.undo()
    if into: assert {k:v for k,v in snapshot(out).items() if not k.startswith('.hlwq-new')} == before and torch.equal(logits(load_model(out)), logits(f))
    else: assert not (out/'hlwq_manifest.json').exists() and not (out/'config.json').exists()
    f.save_pretrained(out, max_shard_size=30_000)
    assert verify_checkpoint(out).ok and sorted(p.name for p in tmp_path.iterdir()) == ['a'] and not [p for p in out.iterdir() if p.name.startswith('.')]

def test_save_arguments(tmp_path):
    f = on_the_fly('llama')
    f.save_pretrained(tmp_path/'no', is_main_process=False)
    assert not (tmp_path/'no').exists()
    f.save_pretrained(str(tmp_path/'a')); f.save_pretrained(tmp_path/'b', safe_serialization=True, max_shard_size='5GB')
    assert snapshot(tmp_path/'a') == snapshot(tmp_path/'b')
    with pytest.raises(UnsupportedError, match='variant') as e: f.save_pretrained(tmp_path/'c', variant='fp16')
    assert complete(e.value) and not (tmp_path/'c').exists()
    with pytest.raises(ConfigError): f.save_pretrained(tmp_path/'c', max_shard_size='big')
    assert not (tmp_path/'c').exists()
    state = {k:v.clone() for k,v in f.state_dict().items()}
    state['model.norm.weight'] = state['model.norm.weight']*2
    f.save_pretrained(tmp_path/'d', state_dict=state)
    a,d = tensors_of(tmp_path/'a'),tensors_of(tmp_path/'d')
    assert torch.equal(d['model.norm.weight'], 2*a['model.norm.weight']) and all(torch.equal(a[k], d[k]) for k in a if k != 'model.norm.weight') and a.keys() == d.keys()

def test_save_relative_and_home(tmp_path, monkeypatch):
    f = on_the_fly('llama'); monkeypatch.chdir(tmp_path)
    f.save_pretrained('out'); (tmp_path/'here').mkdir(); monkeypatch.chdir(tmp_path/'here'); f.save_pretrained('.')
    assert snapshot(tmp_path/'out') == snapshot(tmp_path/'here')

def test_saved_config(tmp_path):
    f = on_the_fly('gpt_oss'); f.save_pretrained(tmp_path/'a')
    cfg = json.loads((tmp_path/'a/config.json').read_text())
    assert cfg['architectures'] == ['GptOssForCausalLM'] and cfg['dtype'] == 'float32' and cfg['quantization_config'] == json.loads((tmp_path/'a/hlwq_config.json').read_text())
    quantize_checkpoint(original('gpt_oss'), tmp_path/'q', progress=False); old = settings(tmp_path/'q')
    assert {k:sorted(v) if isinstance(v, list) else v for k,v in cfg['quantization_config'].items() if k != 'recipe'} == {k:sorted(v) if isinstance(v, list) else v for k,v in old.items()}

@pytest.mark.parametrize('change', ['no codebook', 'only quant_method', 'only a name'])
def test_saving_names_the_codebook_that_was_used(change, tmp_path):
    "A file that does not say how it was made: what was found out, or was asked for, is written down"
    quantize_checkpoint(original('llama'), tmp_path/'q', bits=4, codebook='inf100', progress=False)
    def edit(c):
        q = c['quantization_config']
        if change == 'no codebook': del q['codebook']
        elif change == 'only a name': q['codebook'] = 'inf100'
        else: c['quantization_config'] = dict(quant_method='hlwq')
    altered(tmp_path/'q', tmp_path/'p', config=edit)
    want = logits(load_model(tmp_path/'q'))
    ways = [load_model(tmp_path/'p', codebook='inf100')] + ([AutoModelForCausalLM.from_pretrained(tmp_path/'p')] if change == 'only a name' else [])
    for i,m in enumerate(ways):
        assert torch.equal(logits(m), want)
        m.save_pretrained(tmp_path/f'a{i}')
        assert torch.equal(logits(load_model(tmp_path/f'a{i}')), want), settings(tmp_path/f'a{i}')
        assert settings(tmp_path/f'a{i}')['codebook']['name'] == 'inf100' and settings(tmp_path/f'a{i}')['bits'] == 4

def test_codebook_is_detected_while_loading(tmp_path):
    "from_pretrained builds models where no tensor has a size; reading codes must not be touched by that"
    def forget(c): c['quantization_config'] = dict(quant_method='hlwq')
    altered(quantized(TINY), tmp_path/'p', config=forget)
    m = AutoModelForCausalLM.from_pretrained(tmp_path/'p', dtype=torch.float32)
    assert gap(logits(m), logits(packed(TINY))) < 1e-6

def test_files_without_transposed(tmp_path):
    "Which way a model stores its matrices is known from the model; a file need not say it"
    for name in ('gpt_oss', 'gpt2'):
        def forget(c): del c['quantization_config']['transposed']
        altered(quantized(name), tmp_path/name, config=forget)
        for m in (load_model(tmp_path/name), AutoModelForCausalLM.from_pretrained(tmp_path/name)): assert torch.equal(logits(m), logits(packed(name)))

@pytest.mark.parametrize('kind,sizes', [('granitemoe', {}), ('aria_text', dict(moe_num_experts=4, moe_num_shared_experts=1)), ('olmoe', {}), ('phimoe', {}), ('qwen2_moe', dict(shared_expert_intermediate_size=128)), ('phi3', {}), ('minimax_m2', {}), ('glm4_moe', dict(first_k_dense_replace=1, n_group=1, topk_group=1))])
def test_round_trip_of_other_families(kind, sizes, tmp_path):
    "Their names in files are not those in the model: saved under either, they load again and do not change any more"
    from transformers import CONFIG_MAPPING
    if kind not in CONFIG_MAPPING: pytest.skip('not in this transformers')
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **EXPERTS, **sizes})).float().save_pretrained(tmp_path/'o')
    try: f = on_the_fly(tmp_path/'o', HLWQConfig(min_coverage=0))
    except UnsupportedError as e: pytest.skip(str(e)[:80])    # experts of an older version that do not describe themselves
    f.save_pretrained(tmp_path/'a')
    g = load_model(tmp_path/'a'); g.save_pretrained(tmp_path/'b')
    assert torch.equal(logits(g), logits(f)) and snapshot(tmp_path/'a') == snapshot(tmp_path/'b')
    f.save_pretrained(tmp_path/'c', save_original_format=False)
    assert torch.equal(logits(load_model(tmp_path/'c')), logits(f))
    quantize_checkpoint(tmp_path/'o', tmp_path/'q', progress=False, min_coverage=0)
    q = load_model(tmp_path/'q'); q.save_pretrained(tmp_path/'r')
    assert torch.equal(logits(q), logits(f)) and torch.equal(logits(load_model(tmp_path/'r')), logits(f))

def test_files_without_the_prefix_of_the_model(tmp_path):
    "The published GPT-2 has names of the base model; loaded with a head, saved and loaded again"
    write_small('gpt2', tmp_path/'o', cls=GPT2Model)
    assert 'h.0.attn.c_attn.weight' in tensors_of(tmp_path/'o')
    quantize_checkpoint(tmp_path/'o', tmp_path/'q', progress=False)
    m = GPT2LMHeadModel.from_pretrained(tmp_path/'q'); m.save_pretrained(tmp_path/'a')
    f = GPT2LMHeadModel.from_pretrained(tmp_path/'o', quantization_config=HLWQConfig()); f.save_pretrained(tmp_path/'b')
    assert torch.equal(logits(m), logits(f))
    for d in 'ab': assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path/d)), logits(m)) and torch.equal(logits(load_model(tmp_path/d)), logits(m))

def test_base_model_and_other_heads(tmp_path):
    m,ids = packed('llama'),torch.arange(3, 9)[None]
    base = AutoModel.from_pretrained(quantized('llama'), dtype=torch.float32)
    with torch.no_grad(): assert torch.equal(base(ids).last_hidden_state, m.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path/'base')
    again = AutoModel.from_pretrained(tmp_path/'base')
    with torch.no_grad(): assert torch.equal(again(ids).last_hidden_state, base(ids).last_hidden_state)
    c = AutoModelForSequenceClassification.from_pretrained(quantized('llama'), num_labels=3, dtype=torch.float32)
    assert c.score.weight.requires_grad and not isinstance(c.score, HLWQLinear) and c.score.weight.isfinite().all()
    c(ids).logits.sum().backward()
    assert c.score.weight.grad is not None
    c.save_pretrained(tmp_path/'c')
    with torch.no_grad(): assert torch.equal(load_model(tmp_path/'c')(ids).logits, c(ids).logits)

# --- the hub

class Hub:
    "In place of HfApi: remembers what it is asked for"
    calls = []
    def __init__(self, **kw): self.token = kw.get('token')
    def __getattr__(self, name):
        def f(*a, **kw):
            files = sorted(p.name for p in __import__('pathlib').Path(kw['folder_path']).iterdir()) if 'folder_path' in kw else None
            Hub.calls.append((name, a, {**kw, 'token':kw.get('token', self.token)}, files))
            class Url(str): repo_id = a[0] if a else kw.get('repo_id')
            return Url('url')
        return f

@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, 'HfApi', Hub); Hub.calls = []
    return Hub

def test_push_while_saving(hub, tmp_path):
    f = on_the_fly('llama')
    f.save_pretrained(tmp_path/'a', push_to_hub=True, repo_id='me/mine', token='secret', private=True, commit_message='done')
    assert [c[0] for c in hub.calls] == ['create_repo', 'upload_folder']
    (_, a, kw, _),(_, _, up, files) = hub.calls
    assert 'me/mine' in (*a, kw.get('repo_id')) and kw['private'] is True and kw['token'] == up['token'] == 'secret' and up['commit_message'] == 'done' and up['repo_id'] == 'me/mine'
    assert 'hlwq_manifest.json' in files and 'README.md' in files and 'config.json' in files and not [n for n in files if n.startswith('.')]
    hub.calls.clear(); f.save_pretrained(tmp_path/'named', push_to_hub=True, revision='v2', create_pr=True)
    assert hub.calls[-1][2]['repo_id'] == 'named' and hub.calls[-1][2]['create_pr'] and hub.calls[-1][2].get('revision') == 'v2', 'a branch that was asked for must not become the main one'

def test_push_to_hub(tmp_path, monkeypatch):
    "transformers' own push_to_hub saves through us, and what arrives can be loaded: it replaces the card after saving"
    class Api:
        def __init__(self, **kw): pass
        def create_repo(self, repo_id, **kw): return type('Url', (str,), dict(repo_id=repo_id))('url')
        def upload_folder(self, folder_path, **kw): shutil.copytree(folder_path, tmp_path/'sent')
    monkeypatch.setattr('huggingface_hub.HfApi', Api)
    f = on_the_fly('llama')
    f.push_to_hub('me/mine', max_shard_size='30KB')
    assert len(list((tmp_path/'sent').glob('model-*'))) > 3
    assert torch.equal(logits(load_model(tmp_path/'sent', verify='sha256')), logits(f)) and torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path/'sent')), logits(f))
    assert 'import hlwq' in (tmp_path/'sent/README.md').read_text()

# --- casts, copies, state

def test_casts():
    for name in ('half', 'float'):
        with pytest.raises(ValueError): getattr(packed('llama'), name)()
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.to(dtype=torch.float16), lambda m: m.to('cpu', torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.cpu()):
        m = packed('qwen3_moe'); before = {k:v.clone() for k,v in m.state_dict().items() if not v.is_floating_point()}
        try: m = cast(m)
        except ValueError: pass
        assert before and all(torch.equal(v, m.state_dict()[k]) and v.dtype == m.state_dict()[k].dtype for k,v in before.items()) and gap(logits(m), logits(packed('qwen3_moe'))) < .2

@pytest.mark.parametrize('name', ['qwen3_moe', 'gpt_oss', 'gpt2'])
def test_copies(name, tmp_path):
    "Deep copies and pickles are whole models: they compute, report and save as the first one does"
    m = packed(name); m.save_pretrained(tmp_path/'m')
    f = io.BytesIO(); torch.save(m, f); f.seek(0)
    for i,c in enumerate((copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(f, weights_only=False))):
        assert torch.equal(logits(c), logits(m)) and c.hlwq_report().rows == m.hlwq_report().rows
        c.save_pretrained(tmp_path/str(i))
        assert snapshot(tmp_path/str(i)) == snapshot(tmp_path/'m')
    c = copy.deepcopy(m)
    next(p for p in c.parameters() if p.dtype == torch.uint8).data.zero_()
    c.save_pretrained(tmp_path/'c')
    assert torch.equal(logits(load_model(tmp_path/'c')), logits(c)) and not torch.equal(logits(c), logits(m)), 'the copy saved the original'

def test_state_dict():
    a,b = packed('qwen3_moe'),packed('qwen3_moe')
    for p in b.parameters(): p.data.zero_()
    assert not torch.equal(logits(a), logits(b))
    b.load_state_dict(a.state_dict())
    assert torch.equal(logits(a), logits(b))
    assert not any('gate_up_proj' in k or 'down_proj' in k for k in a.state_dict() if 'experts' in k), "names that transformers' renamings would take for experts"
    with pytest.raises(RuntimeError): a.load_state_dict(dense('qwen3_moe').state_dict())

def test_modes_and_flags():
    m = packed('gpt_oss')
    assert not any(o.training for o in m.modules()) and {p.dtype for p in m.parameters() if not p.requires_grad} == {torch.uint8, torch.int16}
    assert all(p.requires_grad for p in m.parameters() if p.is_floating_point())
    a = logits(m); m.train(); m.eval(); m.requires_grad_(False)
    with torch.inference_mode(): assert torch.equal(m(some_ids(m)).logits, a)
    assert m.get_memory_footprint() < dense('gpt_oss').get_memory_footprint()/2 and m.num_parameters() > 0 and m.is_quantized and m.device.type == 'cpu' and m.dtype == torch.float32
    assert m.hf_quantizer.is_serializable() and m.hf_quantizer.is_trainable and isinstance(m.hf_quantizer, HLWQQuantizer)

def test_report():
    r = packed(TINY).hlwq_report()
    assert {d['kind'] for d in r.rows} == {'HLWQLinear', 'PackedStack'} and json.dumps(r.to_json()) and 'parameters' in repr(r) and '|---|' in r._repr_markdown_()
    assert r.nbytes == sum(d['nbytes'] for d in r.rows) and r.kept_nbytes > 0
    assert sorted(d['name'] for d in packed('llama').hlwq_report().rows) == sorted(k.removesuffix('__packed') for k in tensors_of(quantized('llama')) if k.endswith('__packed'))

# --- gradients and compilers

@pytest.mark.parametrize('name', NAMES)
def test_gradient_for_the_input(name):
    got = []
    for m in (packed(name), dense(name)):
        e = m.get_input_embeddings()(some_ids(m)).detach().requires_grad_()
        m(inputs_embeds=e).logits.square().mean().backward()
        got.append(e.grad)
    assert gap(*got) < 1e-4

@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compile(backend):
    "A dense model is one graph, without having run before"
    torch._dynamo.reset()
    m = packed('llama')
    with torch.no_grad(): assert gap(torch.compile(m, fullgraph=True, backend=backend)(some_ids(m)).logits, logits(m)) < 1e-5

def test_no_graph_breaks():
    for how in (dict(), dict(inputs_embeds=True)):
        torch._dynamo.reset(); m = packed('llama')
        kw = dict(inputs_embeds=m.get_input_embeddings()(some_ids(m)).detach().requires_grad_()) if how else dict(input_ids=some_ids(m))
        said = torch._dynamo.explain(m)(**kw)
        assert said.graph_break_count == 0 and said.graph_count == 1

@pytest.mark.parametrize('way', ['batched_mm', 'grouped_mm'])
def test_compile_experts(way):
    torch._dynamo.reset()
    m = packed('qwen3_moe', experts_implementation=way)
    with torch.no_grad(): assert gap(torch.compile(m, fullgraph=True, backend='aot_eager')(some_ids(m)).logits, logits(m)) < 1e-5

# --- places

LAYERS = {'model.embed_tokens':'cpu', 'model.layers.0':'cpu', 'model.layers.1':'disk', 'model.norm':'cpu', 'model.rotary_emb':'cpu', 'lm_head':'disk'}

@pytest.mark.parametrize('fly', [False, True])
@pytest.mark.parametrize('name', ['llama', 'qwen3_moe', 'gpt_oss'])
def test_device_maps(name, fly, tmp_path):
    want,load = logits(packed(name)),lambda **kw: on_the_fly(name, **kw) if fly else packed(name, **kw)
    for where in (None, 'cpu', 'auto', {'':'cpu'}, torch.device('cpu')): assert torch.equal(logits(load(device_map=where)), want), where
    m = load(device_map=LAYERS, offload_folder=str(tmp_path/'off'))
    assert 'offloaded' in m.hlwq_report().backends and torch.equal(logits(m), want) and torch.equal(logits(m), want)
    assert any(p.is_meta for p in m.parameters() if p.dtype == torch.uint8), 'codes stay in memory'
    m.save_pretrained(tmp_path/'a'); load().save_pretrained(tmp_path/'b')
    assert snapshot(tmp_path/'a') == snapshot(tmp_path/'b') and torch.equal(logits(m), want)
    assert m.generate(some_ids(m, 3, 1), max_new_tokens=3, do_sample=False).shape == (1, 6)
    small = load(device_map='auto', max_memory={'cpu':150_000}, offload_folder=str(tmp_path/'off2'))
    assert 'disk' in small.hf_device_map.values() and torch.equal(logits(small), want)

@pytest.mark.parametrize('fly', [False, True])
def test_disk_without_a_folder(fly):
    with pytest.raises(ValueError, match='offload_folder'): (on_the_fly if fly else packed)('llama', device_map=LAYERS)

def test_offloaded_layers_are_not_unpacked(tmp_path):
    "The refusal leaves the model as it was"
    m = packed('llama', device_map=LAYERS, offload_folder=str(tmp_path/'off')); want = logits(m)
    with pytest.raises(UnsupportedError, match='layers.1') as e: m.dequantize()
    assert complete(e.value) and torch.equal(logits(m), want) and m.hlwq_report().rows
    m.save_pretrained(tmp_path/'a')
    assert verify_checkpoint(tmp_path/'a').ok and torch.equal(logits(load_model(tmp_path/'a')), want)

def test_split_and_moved():
    m = packed('qwen3_moe'); bits = {k:v.clone() for k,v in m.state_dict().items()}
    m = m.to('cpu').to(torch.device('cpu'))
    assert all(torch.equal(v, m.state_dict()[k]) for k,v in bits.items())

# --- back to ordinary weights

@pytest.mark.parametrize('name', NAMES)
def test_dequantize(name, tmp_path):
    m = packed(name)
    m.dequantize(**({'dtype':torch.float32}))
    assert gap(logits(m), logits(dense(name))) < 1e-5 and not any(isinstance(o, (HLWQLinear, HLWQExperts)) for o in m.modules())
    assert {p.dtype for p in m.parameters()} == {torch.float32} and not any(o.training for o in m.modules()) and all(p.requires_grad for p in m.parameters())
    assert not hasattr(m.config, 'quantization_config') or m.config.quantization_config is None
    m.save_pretrained(tmp_path/'a')
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'a')
    assert torch.equal(logits(plain), logits(m)) and not (tmp_path/'a/hlwq_manifest.json').exists() and plain.float() is plain
    m.half()

# --- text

@pytest.fixture(scope='module')
def tokenizer(): return AutoTokenizer.from_pretrained(asset_path(TINY), padding_side='left')

@pytest.mark.parametrize('fly', [False, True])
def test_greedy_text(fly, tokenizer):
    "64 tokens, the same from packed and from decoded weights"
    ids = tokenizer('In the beginning', return_tensors='pt').input_ids
    how = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=1)
    a = (on_the_fly(TINY, dtype=torch.float32) if fly else packed(TINY)).generate(ids, **how)
    assert a.shape[1] == ids.shape[1] + 64 and torch.equal(a, dense(TINY).generate(ids, **how))

def test_batches_with_left_padding(tokenizer):
    texts = ['In the beginning', 'And', 'He said unto them that they should go up to the']
    batch,how = tokenizer(texts, return_tensors='pt', padding=True),dict(max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=1)
    p,d = packed(TINY),dense(TINY)
    assert torch.equal(p.generate(**batch, **how), d.generate(**batch, **how))
    assert gap(logits(p, batch.input_ids, attention_mask=batch.attention_mask), logits(d, batch.input_ids, attention_mask=batch.attention_mask)) < 1e-5

def test_beams_and_samples(tokenizer):
    batch,p,d = tokenizer(['In the beginning'], return_tensors='pt'),packed(TINY),dense(TINY)
    for how in (dict(num_beams=3, do_sample=False), dict(do_sample=True, temperature=.7), dict(num_return_sequences=2, do_sample=True)):
        res = []
        for m in (p, d): torch.manual_seed(0); res.append(m.generate(**batch, **how, max_new_tokens=12, pad_token_id=1))
        assert torch.equal(*res), how

# --- memory

class Largest(TorchDispatchMode):
    "Remembers the largest floating tensors that operations make"
    def __init__(self): super().__init__(); self.seen = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        for t in tree_leaves(res):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t.device.type != 'meta': self.seen[tuple(t.shape), t.numel()] += 1
        return res
    @property
    def largest(self): return max((n for _,n in self.seen), default=0)

@pytest.mark.parametrize('kernel', [True, False])
def test_no_dense_stack_of_experts(kernel, monkeypatch, tmp_path):
    "Neither while loading nor while running nor while saving is there ever a floating tensor of the size of a stack"
    if not kernel: monkeypatch.setattr(cpu, 'available', lambda: False)
    write_small('qwen3_moe', tmp_path/'o', torch.bfloat16, num_experts=16, num_local_experts=16, num_experts_per_tok=4, hidden_size=256, moe_intermediate_size=256, num_hidden_layers=1, intermediate_size=256)
    stack = 16*512*256
    quantize_checkpoint(tmp_path/'o', tmp_path/'q', progress=False)
    with Largest() as loading: m = AutoModelForCausalLM.from_pretrained(tmp_path/'q')
    assert loading.largest < stack//16, loading.seen.most_common(3)
    for M in (1, 60):
        with torch.no_grad(), Largest() as running: m(some_ids(m, M, 1))
        assert running.largest <= stack//8, max(running.seen, key=lambda o: o[1])
    with Largest() as saving: m.save_pretrained(tmp_path/'s')
    assert saving.largest < stack//16
    e = m.get_input_embeddings()(some_ids(m, 40, 1)).detach().requires_grad_()
    with Largest() as training: m(inputs_embeds=e).logits.sum().backward()
    assert training.largest <= stack//8

def test_one_stack_at_a_time_on_the_fly(tmp_path):
    "Quantizing while loading needs one dense parameter, and lets go of it before the next one comes"
    write_small('qwen3_moe', tmp_path/'o', torch.bfloat16, num_experts=16, num_local_experts=16, hidden_size=256, moe_intermediate_size=256, num_hidden_layers=2, intermediate_size=256, save=dict(save_original_format=False))
    import hlwq.hf as hf
    alive,real = [],hf.encode
    def watch(t, w, norm):
        if w.ndim == 3: alive.append(sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and o.device.type == 'cpu' and o.is_floating_point() and o.ndim == 3 and o.numel() >= 16*256*256))
        return real(t, w, norm)
    hf.encode = watch
    try: m = on_the_fly(tmp_path/'o')
    finally: hf.encode = real
    assert alive and max(alive) <= 1 and not has_float_experts(m)

# --- registration

def test_import_alone_is_light(): assert python("import hlwq, sys; print([m for m in ('torch', 'transformers', 'numpy', 'safetensors', 'peft') if m in sys.modules])").strip() == '[]'

LOAD = f"""m = AutoModelForCausalLM.from_pretrained({str(asset_path(TINY))!r}, quantization_config=hlwq.HLWQConfig(bits=4))
print(type(m.model.layers[0].mlp.experts).__name__, m.hlwq_report().rows[0]['bits'])"""

@pytest.mark.parametrize('start', ['import hlwq; from transformers import AutoModelForCausalLM', 'from transformers import AutoModelForCausalLM; import hlwq'])
def test_import_before_and_after(start): assert python(f'{start}\n{LOAD}').split() == ['HLWQExperts', '4']

def forked(cases):
    "Runs each piece of code in a fork of one fresh interpreter that has loaded torch and nothing else; returns what failed"
    return python(f"""
import os, sys, torch, traceback
assert not any(m.split('.')[0] in ('hlwq', 'transformers') for m in sys.modules)
for code in {list(cases)!r}:
    pid = os.fork()
    if not pid:
        try: exec(code, dict(__name__='__main__'))
        except BaseException: print(code); traceback.print_exc(file=sys.stdout); sys.stdout.flush(); os._exit(1)
        os._exit(0)
    os.waitpid(pid, 0)""")

IMPORTS = ['import hlwq; import transformers', 'import transformers; import hlwq', 'import transformers.quantizers.auto; import hlwq; import hlwq', 'import hlwq, importlib; importlib.reload(hlwq); import transformers; importlib.reload(hlwq)',
    'import hlwq.hf; import importlib; importlib.reload(hlwq.hf); importlib.reload(hlwq.hf)', 'from hlwq import load_model']

def test_registration():
    "In every order, and again"
    assert forked(f"""{o}
from transformers.quantizers import auto
import hlwq, sys
assert auto.AUTO_QUANTIZER_MAPPING['hlwq'].__name__ == 'HLWQQuantizer' and auto.AUTO_QUANTIZATION_CONFIG_MAPPING['hlwq'].__name__ == 'HLWQConfig'
assert sum(type(f).__name__ == '_WhenImported' for f in sys.meta_path) == 0""" for o in IMPORTS) == ''

def test_reload_of_everything():
    "As autoreload does it in a notebook, from below"
    names = 'linear experts packed_model hf load'.split()
    code = 'import hlwq, importlib\nfrom transformers import AutoModelForCausalLM\n' + '\n'.join(f'import hlwq.{n}' for n in names) + '\n' + '\n'.join(f'importlib.reload(importlib.import_module("hlwq.{n}"))' for n in names*2)
    assert python(f'{code}\n{LOAD}\nimport torch; e = m.get_input_embeddings()(torch.tensor([[3]])).detach().requires_grad_(); m(inputs_embeds=e).logits.sum().backward(); assert e.grad is not None').split() == ['HLWQExperts', '4']

def test_old_transformers_only_warns():
    "Whatever an old version lacks, everything that does not need transformers goes on working"
    assert forked(f"""
import sys, warnings
class Old:
    def find_spec(self, name, path=None, target=None):
        if name == 'hlwq.hf': raise {error}("no module named 'transformers.core_model_loading'")
sys.meta_path.insert(0, Old())
with warnings.catch_warnings(record=True) as w:
    warnings.simplefilter('always')
    {start}
said = [str(o.message) for o in w if 'hlwq' in str(o.message)]
import torch; hlwq.quantize(torch.randn(4, 128))
assert len(said) == 1 and 'pip install' in said[0], said""" for start in ('import hlwq; import transformers.quantizers.auto', 'import transformers.quantizers.auto; import hlwq') for error in ('ImportError', 'AttributeError')) == ''

def test_registration_is_idempotent():
    from transformers.quantizers import auto
    import hlwq.hf as hf
    for _ in range(3): hf.register()
    assert auto.AUTO_QUANTIZER_MAPPING['hlwq'] is hf.HLWQQuantizer and auto.AUTO_QUANTIZATION_CONFIG_MAPPING['hlwq'] is hf.HLWQConfig

# --- adapters

peft = None
try: import peft
except ImportError: pass
needs_peft = pytest.mark.skipif(peft is None, reason='peft is not installed')
TARGETS = dict(llama=['q_proj', 'down_proj'], qwen3_moe=['q_proj', 'v_proj'], gpt2=['c_attn'])

def adapted(name, base=None, steps=10, **kw):
    "A packed model with an adapter, trained or random; returns model, losses, and its logits"
    torch.manual_seed(0)
    p = peft.get_peft_model(packed(name) if base is None else base, peft.LoraConfig(**{**dict(r=4, lora_alpha=64, target_modules=TARGETS[name], init_lora_weights=steps > 0), **kw}))
    opt,ids,losses = torch.optim.AdamW([q for q in p.parameters() if q.requires_grad], lr=2e-2),torch.arange(3, 19)[None],[]
    for _ in range(steps):
        loss = p(input_ids=ids, labels=ids).loss
        loss.backward(); opt.step(); opt.zero_grad(); losses.append(loss.item())
    p.eval()
    return p,losses,logits(p)

@needs_peft
@pytest.mark.parametrize('name,kw', [('llama', {}), ('llama', dict(use_dora=True)), ('qwen3_moe', {}), ('gpt2', {})], ids=str)
def test_adapter(name, kw, tmp_path):
    "Attaches, learns, is saved and loaded, can be switched off, and is merged for real"
    base = logits(packed(name))
    p,losses,want = adapted(name, **kw)
    layers = [m for m in p.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert layers and all(isinstance(m.get_base_layer(), HLWQLinear) for m in layers) and losses[-1] < .8*losses[0] and gap(want, base) > .1
    with p.disable_adapter(): assert torch.equal(logits(p), base)
    p.save_pretrained(tmp_path/'a')
    again = lambda: peft.PeftModel.from_pretrained(packed(name), tmp_path/'a')
    assert torch.equal(logits(again()), want)
    for safe in (False, True):
        m = again().merge_and_unload(safe_merge=safe)
        assert not any(isinstance(o, peft.tuners.lora.LoraLayer) for o in m.modules()) and any(isinstance(o, HLWQLinear) for o in m.modules())
        assert gap(logits(m), want) < .5*gap(base, want) and gap(logits(m), base) > .5*gap(want, base)
    m.save_pretrained(tmp_path/'m')
    assert torch.equal(logits(load_model(tmp_path/'m')), logits(m)) and verify_checkpoint(tmp_path/'m').ok
    q = again(); q.merge_adapter()
    assert gap(logits(q), want) < .5*gap(base, want)
    q.unmerge_adapter(); q.base_model.disable_adapter_layers()
    assert gap(logits(q), base) < .5*gap(want, base)

@needs_peft
def test_merge_is_as_good_as_the_codes():
    "The merged weight is the sum within the error of the width, at every width"
    for bits in (3, 5, 8):
        torch.manual_seed(0)
        p = peft.get_peft_model(packed('llama', bits), peft.LoraConfig(r=4, lora_alpha=16, target_modules=['q_proj'], init_lora_weights=False))
        l = p.base_model.model.model.layers[0].self_attn.q_proj
        want = l.get_base_layer().dequantize() + l.get_delta_weight('default')
        m = p.merge_and_unload()
        assert gap(m.model.layers[0].self_attn.q_proj.dequantize(), want) < {3:.25, 5:.06, 8:.012}[bits] and m.model.layers[0].self_attn.q_proj.bits == bits

@needs_peft
def test_adapter_on_a_packed_embedding():
    torch.manual_seed(0)
    m = on_the_fly('llama', HLWQConfig(recipe=Recipe(8, [Rule('embed_tokens', bits=8, force=True)]))); base = logits(m)
    p = peft.get_peft_model(m, peft.LoraConfig(r=4, target_modules=['embed_tokens'], init_lora_weights=False)); want = logits(p)
    assert gap(want, base) > .1 and gap(logits(p.merge_and_unload()), want) < .3*gap(base, want)

@needs_peft
def test_merge_of_nonsense_is_refused(tmp_path):
    p,*_ = adapted('llama', steps=0)
    before = {k:v.clone() for k,v in p.state_dict().items() if k.endswith(('packed', 'norm_bits'))}
    with torch.no_grad():
        for k,q in p.named_parameters():
            if 'lora_B' in k: q.fill_(float('nan'))
    for safe in (False, True):
        with pytest.raises(ValueError, match='NaN'): p.merge_and_unload(safe_merge=safe)
    assert all(torch.equal(v, p.state_dict()[k]) for k,v in before.items())

@needs_peft
def test_methods_that_write_elsewhere(tmp_path):
    "Other adapters of peft, merged: the effect is there, or an error; never the base model in silence"
    tried = 0
    for kind,kw in (('LoraConfig', dict(init_lora_weights=False)), ('AdaLoraConfig', dict(total_step=10, init_lora_weights=False)), ('LoHaConfig', dict(init_weights=False)), ('LoKrConfig', dict(init_weights=False)), ('IA3Config', dict(feedforward_modules=[], init_ia3_weights=False)), ('OFTConfig', dict(init_weights=False, oft_block_size=4)),
                    ('FourierFTConfig', dict(n_frequency=500, init_weights=False, scaling=20.)), ('VeraConfig', dict(init_weights=False)), ('HRAConfig', dict(init_weights=False)), ('BOFTConfig', dict(init_weights=False, boft_block_size=4)), ('SuperTuningConfig', {}), ('SupertuningConfig', {}), ('RandLoraConfig', dict(init_weights=False))):
        if not hasattr(peft, kind): continue
        torch.manual_seed(0)
        try: p = peft.get_peft_model(packed('llama', 8), getattr(peft, kind)(target_modules=['q_proj'], **kw))
        except (TypeError, ValueError, ImportError, RuntimeError, AttributeError): continue
        p.eval(); base = logits(packed('llama', 8))
        for _ in range(30):
            want = logits(p)
            if gap(want, base) > .3: break
            with torch.no_grad():
                for q in p.parameters():
                    if q.requires_grad: q.add_(torch.randn(q.shape)*.3)
        if not .3 < gap(want, base) < 100: continue
        try: m = p.merge_and_unload()
        except (HLWQError, RuntimeError, ValueError, NotImplementedError): continue
        tried += 1
        assert gap(logits(m), want) < .5*gap(base, want), kind
    assert tried >= 3

@needs_peft
def test_saving_a_model_with_an_adapter_inside(tmp_path):
    "Layers that peft has wrapped would get names that nothing loads: refused, and fine again afterwards"
    base = packed('llama'); want = logits(base)
    p,*_ = adapted('llama', base, steps=0)
    with pytest.raises(HLWQError) as e: base.save_pretrained(tmp_path/'a')
    assert complete(e.value) and not (tmp_path/'a').exists()
    m = p.unload(); m.save_pretrained(tmp_path/'b')
    assert torch.equal(logits(load_model(tmp_path/'b')), want)

@needs_peft
def test_adapters_through_transformers(tmp_path):
    p,_,want = adapted('llama', steps=0); p.save_pretrained(tmp_path/'a')
    m = packed('llama'); base = logits(m)
    try: m.load_adapter(str(tmp_path/'a'))
    except (ImportError, ValueError) as e: pytest.skip(str(e)[:80])
    assert gap(logits(m), want) < 1e-5
    try:
        m.save_pretrained(tmp_path/'s')
        assert sorted(o.name for o in (tmp_path/'s').glob('*.safetensors')) == ['adapter_model.safetensors']
        m.disable_adapters()
        assert torch.equal(logits(m), base)
        m.delete_adapter('default')
    except ValueError as e:                                    # a transformers that wants a newer peft
        assert 'version of PEFT' in str(e)
        m = packed('llama'); m.load_adapter(str(tmp_path/'a'))
        for n,l in [(n, l) for n,l in m.named_modules() if isinstance(l, peft.tuners.lora.LoraLayer)]: m.set_submodule(n, l.get_base_layer())
        m._hf_peft_config_loaded = False
    try: m.save_pretrained(tmp_path/'d')
    except UnsupportedError as e: return 'inside an adapter' in str(e) or pytest.fail(str(e))     # older versions leave the empty wrappers in place
    assert torch.equal(logits(load_model(tmp_path/'d')), base), "names of the adapter's file stuck to the model"

@needs_peft
def test_experts_as_targets_are_not_passed_over():
    "peft attaches adapters to parameters with three axes; packed stacks have none, which it says"
    with pytest.raises(ValueError): peft.get_peft_model(packed('qwen3_moe'), peft.LoraConfig(target_modules=[], target_parameters=['mlp.experts.gate_up_proj']))
    with pytest.warns(RuntimeWarning, match='no parameter was matched'): peft.get_peft_model(packed('qwen3_moe'), peft.LoraConfig(target_modules=['q_proj'], target_parameters=['mlp.experts.gate_up_proj']))
    p = peft.get_peft_model(packed('qwen3_moe'), peft.LoraConfig(target_modules='all-linear'))
    assert all('experts' not in n for n,m in p.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer))

@needs_peft
def test_training_with_checkpointing():
    m = packed('llama'); m.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False)); m.train()
    p = peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=['q_proj'])); p.train()
    ids = torch.arange(3, 12)[None]
    p(input_ids=ids, labels=ids).loss.backward()
    grads = [q.grad for n,q in p.named_parameters() if q.requires_grad and 'lora_B' in n]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)

"What a reader of 05_recipe would skip: conflicts, protection, fp8, orientation, exact bytes"
import json
from pathlib import Path
import pytest,torch
from hypothesis import given,settings,strategies as st
from safetensors.torch import save_file
from hlwq.core import *
from hlwq.recipe import *
from hlwq.recipe import is_transposed
from hlwq.source import Source

MODEL = asset_path('tiny-moe-10m')
L = 'model.layers.0.'

def src_of(shapes, dtypes={}, **config):
    "A source that is only labels"
    return Source(Path('model'), config, {k:TensorInfo(k, dtypes.get(k, 'BF16'), tuple(s)) for k,s in shapes.items()})

def plan_of(shapes, dtypes={}, recipe=None, min_coverage=0., bits=None, **config): return make_plan(src_of(shapes, dtypes, **config), bits, recipe, min_coverage)
def user(*rules, **kw): return Recipe(rules=[Rule(**r) for r in rules], **kw)

BASE = {L+'self_attn.q_proj.weight':(256, 256), L+'mlp.gate.weight':(16, 256), L+'input_layernorm.weight':(256,), L+'mlp.down_proj.weight':(256, 512), 'lm_head.weight':(1000, 256), 'model.embed_tokens.weight':(1000, 256)}

# --- rules

def test_user_rules_come_first_and_first_match_wins():
    p = plan_of(BASE, recipe=user(dict(match='lm_head', bits=6), dict(match='q_proj', keep='mine'), dict(match='proj', bits=3), dict(match='embed', drop='unused')))
    assert [(p[k].action, p[k].bits) for k in BASE] == [('keep', None), ('keep', None), ('keep', None), ('quantize', 3), ('quantize', 6), ('drop', None)]
    assert 'mine' in p[L+'self_attn.q_proj.weight'].rule and 'q_proj' in p[L+'self_attn.q_proj.weight'].rule
    assert p['model.embed_tokens.weight'].nbytes == 0 and not list(p['model.embed_tokens.weight'].keys())

def test_protected_beats_a_broad_rule_but_not_force():
    p = plan_of(BASE, recipe=user(dict(match='.', bits=4)))
    assert (p[L+'mlp.gate.weight'].action, p[L+'mlp.gate.weight'].rule) == ('keep', 'router')
    assert p[L+'input_layernorm.weight'].action == 'keep' and p['lm_head.weight'].bits == 4
    with pytest.raises(ConfigError, match=r"rule 'mlp\\.gate\\.': protected \(router\).*force = true"): plan_of(BASE, recipe=user(dict(match=r'mlp\.gate\.', bits=8)))
    with pytest.warns(HLWQWarning, match='by force'): p = plan_of(BASE, recipe=user(dict(match=r'mlp\.gate\.', bits=8, force=True)))
    assert p[L+'mlp.gate.weight'].bits == 8

@pytest.mark.parametrize('name,shape', [('input_layernorm.weight', (256,)), ('conv1d.weight', (512, 1, 4)), ('patch.weight', (8, 3, 16, 16)), ('x.scalar', ()), ('model.feed_forward.time_mix', (1, 1, 512)), ('x.empty.weight', (0, 256))])
def test_never_even_by_force(name, shape):
    with pytest.raises(ConfigError, match='remove the rule'): plan_of(BASE | {name:shape}, recipe=user(dict(match=f'^{name}$', bits=8, force=True)))

def test_integers_are_kept():
    p = plan_of(BASE | {'ids.weight':(256, 256)}, {'ids.weight':'I64'})
    assert p['ids.weight'].action == 'keep' and 'I64' in p['ids.weight'].rule and p.understood == 1

@pytest.mark.parametrize('pattern,near', [('self_atn', 'self_attn'), (r'mlp\.donw_proj', 'mlp.down_proj'), ('lmhead', 'lm_head'), (r'layers\.0\.self_attn\.q_prj', 'q_proj'), ('embedtokens', 'embed_tokens')])
def test_typing_errors_name_what_was_meant(pattern, near):
    with pytest.raises(ConfigError, match=f'matches none of 6 tensors.*did you mean.*{near}'): plan_of(BASE, recipe=user(dict(match=pattern, bits=4)))

def test_shadowed_rule_warns():
    with pytest.warns(HLWQWarning, match="'q_proj' has no effect"): plan_of(BASE, recipe=user(dict(match='proj', bits=3), dict(match='q_proj', bits=4)))

@pytest.mark.parametrize('bits', [0, 1, 1.5, 7, 9, '5', True])
def test_bad_bits(bits):
    for f in (lambda: plan_of(BASE, bits=bits), lambda: Recipe(bits=bits), lambda: Rule('a', bits=bits)):
        with pytest.raises(ConfigError, match='need one of'): f()

def test_bad_recipes(tmp_path):
    for o in (5, {}, ['a']):
        with pytest.raises(ConfigError, match='recipe'): plan_of(BASE, recipe=o)
    with pytest.raises(ConfigError, match='recipe'): Recipe(rules=['a'])
    with pytest.raises(FileNotFoundError): plan_of(BASE, recipe=tmp_path/'none.toml')
    for kw in (dict(match=5, bits=4), dict(match='a'), dict(match='a', bits=4, force='yes'), dict(match='a', bits=4, transposed=1.5), dict(match='(', bits=4)):
        with pytest.raises(ConfigError): Rule(**kw)

@pytest.mark.parametrize('text,match', [('bits = ', 'not TOML'), ('bits = 7', 'need one of 2'), ('bits = true', 'need one of 2'), ('bit = 5', 'bit, need only bits'), ('[rules]\nmatch = "a"', 'double brackets'), ('rules = 5', 'double brackets'),
    ('[[rules]]\nmatch = "a"\nwidth = 4', 'rule 1 has width'), ('[[rules]]\nbits = 4', 'matches nothing'), ('[[rules]]\nmatch = "a"', 'exactly one'), ('[[rules]]\nmatch = "*a"\nbits = 4', 'not a regular expression'), ('[[rules]]\nmatch = "a"\nkeep = true', 'need the reason'),
    ('[[rules]]\nmatch = "a"\nbits = 4\nkeep = "b"', 'exactly one'), ('\x00', 'not TOML')])
def test_bad_toml(tmp_path, text, match):
    f = tmp_path/'r.toml'
    f.write_text(text)
    with pytest.raises(ConfigError, match=match): Recipe.from_toml(f)

def test_bits_argument_beats_the_recipe(tmp_path):
    f = tmp_path/'r.toml'
    f.write_text('bits = 3')
    assert plan_of(BASE, recipe=f).bits == 3 and plan_of(BASE, recipe=str(f), bits=4).bits == 4 and plan_of(BASE).bits == 5

# --- defaults

def test_tied_head_is_never_quantized():
    p = plan_of(BASE, tie_word_embeddings=True)
    assert p['lm_head.weight'].action == p['model.embed_tokens.weight'].action == 'keep'
    with pytest.raises(ConfigError, match='in one'): plan_of(BASE, recipe=user(dict(match='lm_head', bits=6, force=True)), tie_word_embeddings=True)

@pytest.mark.parametrize('name', ['mtp.layers.0.self_attn.q_proj.weight', 'mtp.fc.weight', 'model.layers.4.mlp.up_proj.weight', 'model.layers.4.eh_proj.weight', 'model.language_model.layers.4.mlp.experts.3.up_proj.weight', 'language_model.model.layers.5.q_proj.weight',
    'model.visual.blocks.4.attn.qkv.weight', 'vision_tower.encoder.layers.3.fc1.weight', 'audio_tower.layers.2.fc1.weight', 'multi_modal_projector.linear_1.weight', 'model.mm_projector.0.weight', 'transformer.wte.weight', 'backbone.embeddings.weight', 'shared.weight', 'score.weight', 'head.weight', 'model.layers.0.self_attn.indexer.wq_b.weight', 'model.layers.0.input_layernorm.mlp.fc1.weight'])
def test_kept_by_default(name):
    p = plan_of({'model.layers.3.mlp.up_proj.weight':(512, 512), name:(512, 512)}, num_hidden_layers=4, min_coverage=.9)
    assert p[name].action == 'keep' and p.understood == 1 and p['model.layers.3.mlp.up_proj.weight'].action == 'quantize'

def test_layer_far_behind_is_no_draft_layer():
    p = plan_of({'model.layers.40.mlp.up_proj.weight':(512, 512)}, num_hidden_layers=4)
    assert p.n_matrices == 1

@pytest.mark.parametrize('name', ['model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.experts.7.w1.weight', 'model.layers.0.block_sparse_moe.experts.0.w2.weight', 'model.layers.0.self_attn.qkv_proj.weight', 'model.layers.0.self_attn.kv_a_proj_with_mqa.weight', 'model.layers.0.self_attn.q_a_proj.weight',
    'transformer.h.0.attn.c_attn.weight', 'model.layers.0.conv.in_proj.weight', 'model.layers.0.mamba.out_proj.weight', 'model.layers.0.self_attn.output.dense.weight', 'gpt_neox.layers.0.attention.query_key_value.weight', 'encoder.layers.9.fc1.weight'])
def test_quantized_by_default(name): assert plan_of({name:(512, 512)}, num_hidden_layers=4)[name].action == 'quantize'

def test_too_narrow_is_kept_and_counts_as_understood():
    p = plan_of(BASE | {L+'lora_a.weight':(512, 16)})
    assert p[L+'lora_a.weight'].action == 'keep' and 'padding would take' in p[L+'lora_a.weight'].rule and p.understood == 1

def test_coverage(): 
    shapes = BASE | {L+'bank_a':(64, 512, 512), L+'bank_b':(2, 512, 512)}
    with pytest.raises(ConfigError, match=r'bank_a \[64, 512, 512\], .*bank_b.*need 90%'): plan_of(shapes, min_coverage=.9)
    p = plan_of(shapes)
    assert 0 < p.understood < .1
    assert plan_of(shapes, recipe=user(dict(match='bank', keep='known')), min_coverage=.9).understood == 1
    assert plan_of(shapes, recipe=user(dict(match='bank', bits=5, transposed=False)), min_coverage=.9).n_matrices == 68
    with pytest.raises(ConfigError, match='nothing would be quantized'): plan_of(BASE, recipe=user(dict(match='.', keep='all')), min_coverage=.9)
    assert plan_of(BASE, recipe=user(dict(match='.', keep='all'))).n_matrices == 0

# --- fp8 and quantized sources

@pytest.mark.parametrize('suffix', ['weight_scale_inv', 'weight_scale', 'scale', 'scale_inv'])
def test_fp8_with_scale(suffix):
    w,s,router = L+'mlp.up_proj.weight',L+f'mlp.up_proj.{suffix}',L+'mlp.gate.weight'
    p = plan_of({w:(256, 256), s:(2, 2), router:(16, 256), L+f'mlp.gate.{suffix}':(1, 2), L+'mlp.up_proj.input_scale':(1,)}, {w:'F8_E4M3', router:'F8_E4M3', s:'F32'}, min_coverage=.9)
    assert (p[w].action, p[w].scale) == ('quantize', s)
    assert (p[s].action, p[s].rule) == ('drop', f'consumed with {w}')
    assert p[L+'mlp.up_proj.input_scale'].action == 'drop'
    assert p[router].action == 'keep' and p[router].out_dtype == 'BF16' and p[router].scale and p[router].rule == 'router, widened to BF16'
    assert p.total_params == 256*256 + 16*256
    assert p[router].nbytes > 2*16*256

def test_fp8_without_scale():
    w = L+'mlp.up_proj.weight'
    with pytest.raises(CheckpointError, match=r'up_proj.weight: F8_E4M3 without its scale.*weight_scale_inv.*weight_scale.*\.scale'): plan_of({w:(256, 256)}, {w:'F8_E4M3'})

def test_fp8_scale_in_e8m0():
    w,s = L+'mlp.up_proj.weight',L+'mlp.up_proj.scale'
    assert plan_of({w:(256, 256), s:(2, 2)}, {w:'F8_E4M3', s:'F8_E8M0'})[s].action == 'drop'
    with pytest.raises(UnsupportedError, match='F8_E8M0'): plan_of({w:(256, 256), s:(2, 2)}, {s:'F8_E8M0'})

def test_fp8_fused_experts():
    w = L+'mlp.experts.gate_up_proj'
    p = plan_of({w:(4, 1024, 256), w+'_scale_inv':(4, 8, 2)}, {w:'F8_E4M3'}, hidden_size=256)
    assert p[w].scale == w+'_scale_inv' and p.n_matrices == 4

@pytest.mark.parametrize('shapes,config,method', [({'a.qweight':(64, 64), 'a.qzeros':(1, 1)}, {}, 'awq'), ({'a.weight':(64, 64)}, dict(quantization_config=dict(quant_method='gptq')), 'gptq'), ({'a.weight__packed':(64,), 'a.weight__norms':(2, 2)}, {}, 'hlwq')])
def test_quantized_sources_are_refused(shapes, config, method):
    with pytest.raises(ConfigError, match=rf'already quantized \({method}\).*base model'): plan_of(shapes, **config)

def test_reserved_names_and_collisions():
    with pytest.raises(CheckpointError, match='a.weight__meta'): plan_of(BASE | {'a.weight__meta':(5,)})
    e = L+'mlp.experts.gate_up_proj'
    with pytest.raises(CheckpointError, match='gate_up_proj_e0__packed'): plan_of({e:(2, 1024, 256), e+'_e0':(512, 256)}, recipe=user(dict(match='_e0$', bits=5)), hidden_size=256)

# --- orientation

E = L+'mlp.experts.'
@pytest.mark.parametrize('shapes,config,want', [
    ({E+'gate_up_proj':(4, 1024, 256), E+'down_proj':(4, 256, 512)}, dict(hidden_size=256), False),
    ({E+'gate_up_proj':(4, 256, 1024), E+'down_proj':(4, 512, 256)}, dict(hidden_size=256), True),
    ({E+'gate_up_proj':(4, 256, 256), E+'down_proj':(4, 256, 128)}, dict(hidden_size=256), False),                     # 2I = H, the pair tells
    ({E+'gate_up_proj':(4, 256, 512), E+'down_proj':(4, 256, 256)}, dict(hidden_size=256), True),                      # I = H as in gpt-oss
    ({E+'gate_up_proj':(4, 1024, 256), E+'down_proj':(4, 256, 512)}, {}, False),                                        # no hidden size: pair
    ({E+'gate_up_proj':(4, 256, 1024), E+'down_proj':(4, 512, 256)}, {}, True),
    ({E+'gate_up_proj':(4, 1024, 512), E+'down_proj':(4, 512, 512)}, dict(hidden_size=1024), False),                    # experts in a narrower space: the pair beats the hidden size
    ({E+'gate_up_proj':(4, 300, 700), E+'gate_up_proj_bias':(4, 700)}, {}, True), ({E+'gate_up_proj':(4, 700, 300), E+'gate_up_proj_bias':(4, 700)}, {}, False),
    ({E+'up_proj':(4, 256, 256)}, dict(hidden_size=256, model_type='gpt_oss'), True), ({E+'up_proj':(4, 256, 256)}, dict(hidden_size=256, model_type='mixtral'), False),
    ({E+'w1.weight':(4, 512, 256), E+'w2.weight':(4, 256, 512)}, dict(text_config=dict(hidden_size=256)), False),
    ({L+'block_sparse_moe.input_linear.weight':(4, 1024, 256), L+'block_sparse_moe.output_linear.weight':(4, 256, 512)}, dict(hidden_size=256), False)])
def test_orientation(shapes, config, want):
    src = src_of(shapes, **config)
    for t in src.tensors.values():
        if len(t.shape) == 3: assert is_transposed(t, src) is want
    p = make_plan(src, min_coverage=0)
    for r in p.only('quantize'):
        assert r.matrix_shape == (tuple(r.shape[:0:-1]) if want else tuple(r.shape[1:]))

def test_orientation_from_a_rule():
    shapes = {E+'up_proj':(4, 512, 512)}
    with pytest.raises(ConfigError, match='transposed = true'): plan_of(shapes, hidden_size=512)
    for t in (True, False): assert plan_of(shapes, recipe=user(dict(match='up_proj', bits=5, transposed=t)), hidden_size=512)[E+'up_proj'].transposed is t

def test_conv1d_linear_of_gpt2():
    p = plan_of({'transformer.h.0.attn.c_attn.weight':(768, 2304), 'transformer.h.0.mlp.c_fc.weight':(768, 3072)}, model_type='gpt2')
    assert all(r.transposed for r in p.rows) and p.rows[0].matrix_shape == (2304, 768)

# --- bytes

@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(2, 300), st.integers(2, 300)), min_size=1, max_size=5), st.sampled_from(BITS))
def test_bytes_are_those_of_a_real_file(tmp_path_factory, shapes, bits):
    "Writes what the plan announces, in its order, and compares sizes: exact data, headers to a digit of the offsets"
    p = plan_of({f'model.layers.{i}.mlp.experts.up_proj':s for i,s in enumerate(shapes)} | {'model.norm.weight':(64,)}, recipe=user(dict(match='up_proj', bits=bits, transposed=False)) if any(sum(matrix_nbytes(a, b, bits)) < 2*a*b for _,a,b in shapes) else user(dict(match='up_proj', keep='narrow')))
    t = {k:torch.zeros(s, dtype=DTYPES[d]) for r in p.rows for k,d,s in r.keys()}
    f = tmp_path_factory.mktemp('bytes')/'x.safetensors'
    save_file(t, f)
    n = f.stat().st_size
    assert abs(n - 8 - p.output_nbytes) <= 4*len(t) + 8      # the library orders by type, so offsets may have other digits
    assert sum(r.data_nbytes for r in p.rows) == sum(v.nbytes for k,v in t.items() if k.endswith(('__packed', '__norms')))

def test_padding_shows_in_bits_per_weight():
    p = plan_of({'a.weight':(576, 576)})
    assert p.bits_per_weight == pytest.approx(5.125*640/576)

def test_partition_and_json():
    p = make_plan(MODEL)
    assert [r.name for r in p.rows] == list(p.source.tensors) and {r.action for r in p.rows} == {'quantize', 'keep'}
    d = json.loads(json.dumps(p.to_json()))
    assert list(d) == ['n_matrices', 'n_keys', 'quantized_params', 'total_params', 'coverage', 'nbytes', 'bits_per_weight', 'rows']
    assert set(d['rows'][0]) == {'name', 'dtype', 'shape', 'action', 'bits', 'rule', 'transposed', 'n_matrices', 'numel', 'nbytes'}
    assert d['n_keys'] == 3*d['n_matrices'] == 651 and d['total_params'] == 9_859_852 and d['nbytes'] == sum(r['nbytes'] for r in d['rows'] if r['action'] == 'quantize')
    assert all(r['rule'] for r in d['rows'])
    for c in p.components(): assert c['component'] != 'other'
    assert 'coverage ' in repr(p) and p._repr_markdown_().startswith('| component')

def test_plan_reads_no_tensor(monkeypatch):
    monkeypatch.setattr(Source, 'read', lambda *a, **k: pytest.fail('read a tensor'))
    make_plan(MODEL)

"Exports to compressed-tensors: the numbers they are held to, other readers, interruptions, bad input"
import contextlib,io,json,re,shutil,warnings
from pathlib import Path
import pytest,torch
pytest.importorskip('compressed_tensors')
from hypothesis import given,settings,strategies as st
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from common import python
from kit import CONFIG,L,complete,gaussian,snapshot,tensors_of,toy,write_model,write_small
import hlwq.export_ct
from hlwq import export_compressed_tensors,plan_export
from hlwq.checkpoint import CheckpointReader,CheckpointWriter
from hlwq.cli import main,resume_command
from hlwq.convert import dequantize_checkpoint,quantize_checkpoint
from hlwq.core import *
from hlwq.core import HLWQWarning,asset_path
from hlwq.export_ct import Piece,name_patterns,row_pieces
from hlwq.groups import ct_scheme,decode_groups,encode_groups,search_scales
from hlwq.quantize import _in_threads
from hlwq.recipe import Recipe,Rule
from hlwq.source import open_source

LIBRARY = BaseCompressor.get_value_from_registry('pack-quantized')
TINY = asset_path('tiny-moe-10m')

def relative(w, x): return float((x.double() - w.double()).norm()/w.double().norm())
def heavy(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g)/(sum(torch.randn(*shape, generator=g)**2 for _ in range(4))/4).sqrt()
def coded(w, bits=4, signed=False): return decode_groups(*encode_groups(w, bits, signed), bits)
def export(src, out, **kw): return export_compressed_tensors(src, out, progress=False, **kw)
def decoded(folder, p, dtype=torch.bfloat16):
    t = tensors_of(folder)
    return {q.key:decode_groups(t[f'{q.key}.weight_packed'], t[f'{q.key}.weight_scale'], q.bits, dtype) for q in p.pieces}

def load(folder, **kw):
    "A model of transformers that lacks nothing, unpacked by its first forward pass"
    from transformers import AutoModelForCausalLM,logging
    logging.set_verbosity_error(); logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):
        model,info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kw)
        assert not any(info[k] for k in ('missing_keys','unexpected_keys','mismatched_keys')), info
        with torch.no_grad(): model.eval()(input_ids=torch.arange(8)[None])
    return model

# --- one scale for 128 weights

def test_errors_are_what_was_promised():
    "INT4 in groups of 128: at most 0.101 on Gaussian and 0.168 on Student-t(4) weights"
    g,t = gaussian(2048, 2048, seed=1, dtype=torch.float32),heavy(2048, 2048, seed=1)
    assert relative(g, coded(g)) <= .101 and relative(t, coded(t)) <= .168
    assert relative(g, coded(g, signed=True)) <= .0975 and relative(t, coded(t, signed=True)) <= .16
    assert relative(g, coded(g, 8)) <= .0065 and relative(t, coded(t, 8)) <= .0112

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(('gauss','heavy','outlier','sparse','onesided')))
def test_no_group_is_worse_than_covering_the_largest(seed, kind):
    "At 4 bits, and within a hair: the scale is rounded to bfloat16 after the search"
    g = heavy(32, 128, seed=seed) if kind == 'heavy' else gaussian(32, 128, seed=seed, dtype=torch.float32, scale=1.)
    if kind == 'outlier': g[:, seed % 128] *= 30
    if kind == 'sparse': g[torch.rand(32, 128, generator=torch.Generator().manual_seed(seed)) < .9] = 0
    if kind == 'onesided': g = g.abs()
    def err(s): return (g - (g/s[:, None]).round().clamp(-8, 7)*s[:, None]).square().sum(1)
    covering = (g.abs().amax(1)/7.5).clamp_min(1e-30).bfloat16().float()
    assert (err(search_scales(g).float()) <= 1.03*err(covering) + 1e-12).all()

@pytest.mark.parametrize('bits', (4, 8))
def test_library_unpacks_our_bits(bits):
    for rows,width in ((1, 128), (7, 384), (130, 1024)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            w = gaussian(rows, width, seed=rows, dtype=dtype)
            packed,scales = encode_groups(w, bits)
            assert (packed.dtype,scales.dtype,packed.shape,scales.shape) == (torch.int32,torch.bfloat16,(rows, width*bits//32),(rows, width//128))
            for d in (torch.bfloat16, torch.float32):
                theirs = LIBRARY.decompress(dict(weight_packed=packed, weight_scale=scales.to(d), weight_shape=torch.tensor(w.shape)), ct_scheme(bits))['weight']
                assert torch.equal(theirs, decode_groups(packed, scales, bits, d))
            codes = (w.float().view(-1, 128)/scales.float().view(-1, 1)).round().clamp(-2**(bits-1), 2**(bits-1)-1)
            assert torch.equal(decode_groups(packed, scales, bits).view(-1, 128), codes*scales.float().view(-1, 1))     # nearest codes

@pytest.mark.parametrize('bits', (4, 8))
def test_neither_pieces_nor_threads_show(bits):
    w = heavy(300, 512, seed=3)
    whole = encode_groups(w, bits, workers=1)
    for cuts in ((0, 1, 300), (0, 128, 255, 300)):
        parts = [encode_groups(w[a:b], bits) for a,b in zip(cuts, cuts[1:])]
        assert all(torch.equal(torch.cat(o), a) for o,a in zip(zip(*parts), whole))
    assert all(torch.equal(a, b) for a,b in zip(encode_groups(w, bits, workers=2), whole))
    assert all(torch.equal(a, b) for a,b in zip(encode_groups(w.t().contiguous().t(), bits), whole))        # any strides

def test_ends_of_the_range():
    for scale in (3e37, 1., 1e-30, 1e-38, 1e-42, 0.):
        for signed in (False, True):
            w = gaussian(4, 256, seed=5, dtype=torch.float32, scale=1.).clamp(-8, 8)*scale
            packed,scales = encode_groups(w, signed=signed)
            assert torch.isfinite(scales).all() and (scales.float().abs() >= 2.**-126).all()
            if scale > 1e-36: assert relative(w, decode_groups(packed, scales).double()) < .13
            if not scale: assert not decode_groups(packed, scales).any()
    for bad in (torch.nan, torch.inf, -torch.inf):
        w = gaussian(4, 256, dtype=torch.float32); w[2, 200] = bad
        with pytest.raises(NonFiniteError): encode_groups(w)

# --- whole checkpoints, as others read them

def test_dense_model_in_transformers(tmp_path):
    "Weights of the loaded model are code times scale, everything else is as it was; a tied head that is not in the file stays whole"
    write_small('llama', tmp_path/'m', torch.bfloat16, hidden_size=256, intermediate_size=384, head_dim=64, tie_word_embeddings=True)
    p = export(tmp_path/'m', tmp_path/'e')
    m,before = dict(load(tmp_path/'e', dtype=torch.bfloat16).named_parameters()),tensors_of(tmp_path/'m')
    want = decoded(tmp_path/'e', p)
    assert p.n_matrices == 14 and all(torch.equal(m[f'{k}.weight'], w) for k,w in want.items())
    assert all(torch.equal(m[k], w) for k,w in before.items() if k.removesuffix('.weight') not in want)

def expert(params, key):
    "The part of transformers' fused experts that one module of the file became"
    stem,e,name = re.fullmatch(r'(.*\.experts)\.(\d+)\.(\w+)', key).groups()
    if name == 'down_proj': return params[f'{stem}.down_proj'][int(e)]
    return params[f'{stem}.gate_up_proj'][int(e)].chunk(2)[name == 'up_proj']

@pytest.mark.parametrize('rules,bits', [((), 4), ((), 8), ((Rule(r'\.experts\.', bits=8),), 4), ((Rule(r'_attn\.', bits=8),), 4), ((Rule(r'layers\.1\..*shared_expert\.', keep='a test'),), 4)])
def test_mixture_of_experts_in_transformers(tmp_path, rules, bits):
    "One width, or two by recipe: the loaded weights are those of the file, so each module was given the right settings"
    p = export(TINY, tmp_path/'e', bits=bits, recipe=Recipe(rules=list(rules)))
    m,want = dict(load(tmp_path/'e', dtype=torch.bfloat16).named_parameters()),decoded(tmp_path/'e', p)
    for k,w in want.items(): assert torch.equal(expert(m, k) if '.experts.' in k else m[f'{k}.weight'], w), k
    kept = tensors_of(TINY)
    assert all(torch.equal(m[r.name], kept[r.name]) for r in p.kept if '.experts.' not in r.name)

def test_perplexity_is_that_of_the_reference(tmp_path):
    from safetensors.torch import save_file
    from hlwq.demo import load_tokenizer
    from hlwq.evaluate import load_text_tokens,perplexity
    p = export(TINY, tmp_path/'e')
    (tmp_path/'r').mkdir(); shutil.copy(TINY/'config.json', tmp_path/'r')
    save_file(tensors_of(TINY) | {f'{k}.weight':w for k,w in decoded(tmp_path/'e', p).items()}, tmp_path/'r/model.safetensors', metadata={'format':'pt'})
    tokens = load_text_tokens(asset_path('kjv.txt'), load_tokenizer(TINY), 1024)
    a,b,o = (float(perplexity(load(d, dtype=torch.bfloat16), tokens).ppl) for d in (tmp_path/'e', tmp_path/'r', TINY))
    assert abs(a/b - 1) < 1e-4 and a != o

def fused(tensors):
    "The same model with all experts of a layer in one tensor"
    res = {k:v for k,v in tensors.items() if '.experts.' not in k}
    for k in tensors:
        m = re.fullmatch(r'(.*\.experts)\.0\.down_proj\.weight', k)
        if not m: continue
        n = sum(f'{m[1]}.{e}.down_proj.weight' in tensors for e in range(99))
        def w(e, name): return tensors[f'{m[1]}.{e}.{name}_proj.weight']
        res[f'{m[1]}.gate_up_proj'] = torch.stack([torch.cat([w(e, 'gate'), w(e, 'up')]) for e in range(n)])
        res[f'{m[1]}.down_proj'] = torch.stack([w(e, 'down') for e in range(n)])
    return res

def test_stacks_are_split_by_expert(tmp_path):
    "Fused experts, stored (out, in) or (in, out), give the tensors that single experts give"
    single = tensors_of(TINY)
    stacks = fused(single)
    config = json.loads((TINY/'config.json').read_text())
    write_model(tmp_path/'fused', stacks, 2, config)
    turned = {k:v.transpose(1, 2).contiguous() if v.ndim == 3 and 'experts' in k else v for k,v in stacks.items()}
    write_model(tmp_path/'turned', turned, 1, config)
    export(TINY, tmp_path/'a'); want = tensors_of(tmp_path/'a')
    for name in ('fused','turned'):
        p = export(tmp_path/name, tmp_path/f'{name}-out', max_shard_size=3_000_000)
        got = tensors_of(tmp_path/f'{name}-out')
        assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)
        assert p.nbytes == sum(v.nbytes for v in got.values()) and len(got) == p.n_tensors

def test_eight_bit_floats(tmp_path):
    "fp8 weights are multiplied by their scale, on the way"
    t = toy(1, 256, 256, 2)
    q = f'{L}self_attn.q_proj.weight'
    scale = torch.rand(2, 2) + .5
    t8 = (t[q].float()/scale.repeat_interleave(128, 0).repeat_interleave(128, 1)).to(torch.float8_e4m3fn)
    whole = t8.float()*scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    write_model(tmp_path/'m', t | {q:t8, f'{q}_scale_inv':scale}, config=CONFIG | dict(quantization_config=dict(quant_method='fp8', weight_block_size=[128, 128])))
    p = export(tmp_path/'m', tmp_path/'e')
    assert torch.equal(decoded(tmp_path/'e', p, torch.float32)[q.removesuffix('.weight')], coded(whole))
    assert f'{q}_scale_inv' not in tensors_of(tmp_path/'e') and json.loads((tmp_path/'e/config.json').read_text())['quantization_config']['quant_method'] == 'compressed-tensors'

def test_from_hlwq_with_a_warning(tmp_path):
    t = fused(tensors_of(TINY))
    write_model(tmp_path/'m', t, config=json.loads((TINY/'config.json').read_text()))
    quantize_checkpoint(tmp_path/'m', tmp_path/'q', bits=5, progress=False)
    with pytest.warns(HLWQWarning, match='the original gives a better export'): p = export(tmp_path/'q', tmp_path/'e')
    got = decoded(tmp_path/'e', p, torch.float32)
    with CheckpointReader(tmp_path/'q') as r:
        for k in ('model.layers.3.self_attn.k_proj', 'model.layers.0.linear_attn.out_proj'): assert torch.equal(got[k], coded(r.matrix(f'{k}.weight').dequantize()))
        stack = r.matrix('model.layers.2.mlp.experts.gate_up_proj_e7').dequantize()
        assert torch.equal(got['model.layers.2.mlp.experts.7.up_proj'], coded(stack[128:]))
    original = tensors_of(TINY)
    once,twice = (sum(float((o[k] - original[f'{k}.weight'].float()).square().sum()) for k in got)**.5 for o in (decoded_once(tmp_path), got))
    assert twice > 1.08*once
    assert 'hlwq_config.json' not in [o.name for o in (tmp_path/'e').iterdir()]

def decoded_once(tmp_path): return decoded(tmp_path/'first', export(tmp_path/'m', tmp_path/'first'), torch.float32)

# --- the config

def test_config_is_what_the_library_reads():
    p = plan_export(TINY)
    qc = QuantizationConfig.model_validate(p.config)
    w = qc.config_groups['group_0'].weights
    assert (w.num_bits,w.group_size,w.symmetric,str(w.strategy),w.dynamic,qc.format,str(qc.quantization_status.value)) == (4,128,True,'group',False,'pack-quantized','compressed')
    assert p.config['config_groups']['group_0'] == dict(targets=['Linear'], weights=dict(num_bits=4, type='int', symmetric=True, group_size=128, strategy='group', dynamic=False),
        input_activations=None, output_activations=None)                          # no field that an older version would refuse
    json.dumps(p.config)

@pytest.mark.parametrize('prefix', ('model.', 'model.language_model.', 'language_model.model.', ''))
def test_ignore_list_is_complete_under_any_prefix(prefix):
    p = plan_export(TINY)
    patterns = [o for o in p.config['ignore'] if o.startswith('re:')]
    def ignored(name, by): return any(match_name(name, o) for o in by)
    kept = [r.name.removesuffix('.weight') for r in p.kept if len(r.shape) > 1]
    assert {k.rpartition('.')[2] for k in kept} == {'embed_tokens','conv1d','in_proj_a','in_proj_b','gate','shared_expert_gate'}
    for k in [*kept, 'lm_head']: assert ignored(k, [o for o in p.config['ignore'] if not o.startswith('re:')]) and ignored(k.replace('model.', prefix), patterns)
    for q in p.pieces: assert not ignored(q.key.replace('model.', prefix), p.config['ignore'])

def test_towers_and_draft_layers_are_ignored_whole():
    names = ['model.visual.blocks.0.attn.qkv', 'model.visual.merger.linear_fc1', 'mtp.layers.0.self_attn.q_proj', 'mtp.fc', 'model.layers.0.mlp.experts', 'model.layers.2.self_attn.o_proj']
    found = name_patterns(names, ['model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.o_proj', 'model.layers.0.mlp.shared_expert.up_proj'])
    def hit(n): return any(re.match(o, n) for o in found)
    for n in (*names, 'visual.blocks.26.mlp.gate_up_proj', 'mtp.layers.0.mlp.experts.3.up_proj', 'language_model.model.layers.9.mlp.experts.0.down_proj'): assert hit(n), n
    for n in ('model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.o_proj', 'model.layers.0.mlp.shared_expert.up_proj', 'model.layers.12.self_attn.o_proj'): assert not hit(n), n

def test_vision_and_draft_tensors_stay_and_are_ignored(tmp_path):
    "By name and by pattern, under the names of a server too; the rest of the model is not touched by these patterns"
    extra = {k:gaussian(256, 256) for k in ('model.visual.blocks.0.attn.qkv.weight','model.visual.merger.linear_fc1.weight','mtp.fc.weight','mtp.layers.0.self_attn.q_proj.weight','mtp.layers.0.mlp.experts.0.up_proj.weight','lm_head.weight')}
    t = {k.replace('model.layers', 'model.language_model.layers'):v for k,v in toy(2, 256, 512, 4).items()} | extra
    src = write_model(tmp_path/'m', t)
    p = export(src, tmp_path/'e')
    got,ignore = tensors_of(tmp_path/'e'),p.config['ignore']
    for k in extra: assert torch.equal(got[k], t[k]) and k.removesuffix('.weight') in ignore, k
    patterns = [o for o in ignore if o.startswith('re:')]
    for n in ('visual.blocks.0.attn.qkv','visual.merger.linear_fc1','mtp.layers.0.self_attn.q_proj','mtp.layers.0.mlp.experts.1.down_proj','language_model.lm_head'): assert any(match_name(n, o) for o in patterns), n
    for q in p.pieces: assert not any(match_name(q.key.replace('model.language_model', 'language_model.model'), o) for o in ignore), q.key

def test_patterns_hit_nothing_quantized():
    "Names that differ in a letter and a digit, numbers at the end, and draft layers with a number too high"
    quantized = [f'model.layers.{i}.mlp.experts.{e}.{w}' for i in range(3) for e in range(2) for w in ('w1','w2','w3')] + ['model.stem.0', 'model.stem.1', 'model.layers.0.mlp.w3']
    kept = ['model.layers.1.mlp.w3', 'model.stem.3', 'model.layers.3.mlp.experts.0.w1', 'model.layers.0.mlp.experts.1.w4']
    found = name_patterns(kept, quantized)
    for n in kept: assert any(re.match(o, n) for o in found), n
    for n in quantized: assert not any(re.match(o, n) for o in found), n

def test_draft_layers_behind_the_last(tmp_path):
    "DeepSeek and GLM store them as layers with a number too high: kept, ignored, and no mixture of widths"
    t = toy(3, 256, 256, 2)
    t = {k:v for k,v in t.items() if not k.startswith('model.layers.2.mlp.experts')} | {f'model.layers.2.mlp.experts.{e}.{n}_proj.weight':gaussian(256, 256) for e in range(2) for n in ('gate','up','down')}
    p = plan_export(write_model(tmp_path/'m', t, config=CONFIG | dict(num_nextn_predict_layers=1)))
    ignored = [o for o in p.config['ignore'] if o.startswith('re:')]
    assert {q.key.split('.')[2] for q in p.pieces} == {'0','1'}
    for n in ('self_attn.q_proj', 'mlp.experts.1.gate_proj'): assert any(match_name(f'model.layers.2.{n}', o) for o in ignored) and not any(match_name(f'model.layers.1.{n}', o) for o in ignored)

# --- planning

def test_plan_of_the_seed(tmp_path):
    "62,303 tensors, 30,970 shapes beside them, 19.4 GB: from the config alone"
    from transformers import Qwen3_5MoeConfig,Qwen3_5MoeTextConfig
    Qwen3_5MoeTextConfig(architectures=['Qwen3_5MoeForCausalLM']).save_pretrained(tmp_path/'text'); Qwen3_5MoeConfig().save_pretrained(tmp_path/'whole')
    p,w = (plan_export(tmp_path/n/'config.json') for n in ('text','whole'))
    assert (p.n_matrices,len(p.kept),p.n_tensors) == (30_970,363,62_303 + 30_970) and 19.41e9 < p.nbytes < 19.43e9
    assert p.bits_per_weight == 4.125 and abs(p.quantized_params/1e9 - 33.617) < .001
    assert w.n_matrices == 30_970 and 'model.visual.blocks.0.attn.qkv' in w.config['ignore'] and r're:(.*\.)?visual\..*' in w.config['ignore']
    json.dumps(p.to_json())

# --- interruptions

def files_of(folder): return {k:v for k,v in snapshot(folder).items() if k != 'README.md'}

@pytest.mark.parametrize('after', (1, 3))
def test_goes_on_where_it_stopped(tmp_path, monkeypatch, after):
    "The folder is that of an undisturbed run, byte for byte; finished shards are not made again"
    src = write_model(tmp_path/'m', toy(2, 256, 512, 4), 2)
    export(src, tmp_path/'whole', max_shard_size=300_000)
    made,finish = [],CheckpointWriter.finish_shard
    def stop(self, name, sha256=None):
        finish(self, name, sha256); made.append(name)
        if len(made) == after: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(CheckpointWriter, 'finish_shard', stop)
        with pytest.raises(KeyboardInterrupt): export(src, tmp_path/'e', max_shard_size=300_000)
    assert not (tmp_path/'e').exists() and len(list((tmp_path/'e.partial').glob('*.safetensors'))) == after
    with pytest.raises(ResumeError, match='bits was 4, now 8'): export(src, tmp_path/'e', bits=8, max_shard_size=300_000)
    with pytest.raises(ResumeError, match='signed was False'): export(src, tmp_path/'e', signed=True, max_shard_size=300_000)
    def again(self, name, sha256=None): finish(self, name, sha256); made.append(name)
    monkeypatch.setattr(CheckpointWriter, 'finish_shard', again)
    export(src, tmp_path/'e', max_shard_size=300_000)
    assert len(made) == len(set(made)) and files_of(tmp_path/'e') == files_of(tmp_path/'whole')

def test_progress_counts_what_was_done(tmp_path, monkeypatch):
    "The bar ends at its total, and begins where the last run ended"
    src,bars,finish = write_model(tmp_path/'m', toy(2, 256, 512, 4), 2),[],CheckpointWriter.finish_shard
    @contextlib.contextmanager
    def bar(progress, total, done, what):
        seen = [done, done, total]; bars.append(seen)
        class B:
            def update(self, n): seen[1] += n
        yield B()
    monkeypatch.setattr(hlwq.export_ct, '_bar', bar)
    def stop(self, name, sha256=None): finish(self, name, sha256); raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(CheckpointWriter, 'finish_shard', stop)
        with pytest.raises(KeyboardInterrupt): export(src, tmp_path/'e', max_shard_size=300_000)
    export(src, tmp_path/'e', max_shard_size=300_000)
    (first,_,total),(again,end,same) = bars
    assert first == 0 < again < total == end == same == sum(o.nbytes for o in tensors_of(src).values())

def test_from_an_open_source(tmp_path):
    "It can be read again afterwards, and holds no file open, also if the plan was refused"
    with open_source(TINY) as s:
        with pytest.raises(ConfigError): plan_export(s, recipe=Recipe(rules=[Rule(r'q_proj', bits=8)]))
        with pytest.raises(ConfigError): export(s, tmp_path/'e', recipe=Recipe(rules=[Rule(r'q_proj', bits=8)]))
        assert not s._open and export(s, tmp_path/'e').n_tensors == plan_export(s).n_tensors == 689 and not s._open
        assert len(s.read('model.embed_tokens.weight')) and s._open

def test_overwrites_only_when_told(tmp_path):
    src = write_model(tmp_path/'m', toy(1, 256, 256, 2))
    export(src, tmp_path/'e')
    before = snapshot(tmp_path/'e')
    with pytest.raises(FileExistsError): export(src, tmp_path/'e', bits=8)
    assert snapshot(tmp_path/'e') == before
    assert export(src, tmp_path/'e', bits=8, overwrite=True).bits == 8 and snapshot(tmp_path/'e') != before

def test_card_and_copies(tmp_path):
    src = write_model(tmp_path/'m', toy(1, 256, 256, 2))
    (src/'README.md').write_text('---\nlicense: mit\n---\n# A model\n'); (src/'modeling.py').write_text(''); (src/'chat_template.jinja').write_text('x')
    export(src, tmp_path/'e')
    card = (tmp_path/'e/README.md').read_text()
    assert card.startswith('---\nlicense: mit\n---\n') and 'vllm serve' in card and card.rstrip().endswith('# A model')
    assert {'chat_template.jinja','tokenizer.json','hlwq_manifest.json'} <= {o.name for o in (tmp_path/'e').iterdir()} and not (tmp_path/'e/modeling.py').exists()

# --- bad input

def refused(tmp_path, error, match, src, **kw):
    "The error, complete, before any work: nothing appears beside the source"
    before = snapshot(tmp_path)
    with pytest.raises(error, match=match) as e: export(src, tmp_path/'out', **kw)
    assert complete(e.value), e.value
    assert snapshot(tmp_path) == before
    return e.value

@pytest.mark.parametrize('bits,error', [(2,UnsupportedError),(3,UnsupportedError),(5,UnsupportedError),(6,UnsupportedError),(7,ConfigError),(16,ConfigError),(0,ConfigError),('4',ConfigError),(4.,ConfigError),(True,ConfigError),(None,ConfigError)])
def test_bits(tmp_path, bits, error): refused(tmp_path, error, 'need 4 or 8', TINY, bits=bits)

@pytest.mark.parametrize('rule,match', [
    (Rule(r'q_proj', bits=8), 'q_proj at 8 bits, k_proj at 4 bits'), (Rule(r'v_proj', keep='a test'), 'v_proj kept'), (Rule(r'in_proj_z', bits=8), 'in_proj_qkv at 4 bits, in_proj_z at 8 bits'),
    (Rule(r'in_proj_a', bits=4, force=True), 'in_proj_a at 4 bits, in_proj_b kept|in_proj_b kept, in_proj_a at 4 bits'),
    (Rule(r'shared_expert\.up_proj', bits=8), 'up_proj at 8 bits'), (Rule(r'experts\.\d+\.down_proj', bits=8), 'one scheme for all experts'), (Rule(r'layers\.1.*\.experts\.', bits=8), 'one scheme for all experts'),
    (Rule(r'layers\.1.*\.experts\.', keep='a test'), 'kept, need one width'), (Rule(r'o_proj', bits=5), 'bits: 5, need 4 or 8')])
def test_recipes_that_no_server_could_run(tmp_path, rule, match): refused(tmp_path, (ConfigError,UnsupportedError), match, TINY, recipe=Recipe(rules=[rule]))

def test_sources(tmp_path):
    export(TINY, tmp_path/'e'); refused(tmp_path, ConfigError, 'already quantized .compressed-tensors', tmp_path/'e')
    t = toy(1, 256, 256, 2)
    refused(tmp_path, ConfigError, 'already quantized .gptq', write_model(tmp_path/'gptq', t, config=CONFIG | dict(quantization_config=dict(quant_method='gptq', bits=4))))
    refused(tmp_path, ConfigError, 'no config.json', write_model(tmp_path/'bare', t, config=None))
    (tmp_path/'lone').mkdir(); shutil.copy(TINY/'config.json', tmp_path/'lone'); refused(tmp_path, ConfigError, 'only a config.json', tmp_path/'lone')
    refused(tmp_path, ConfigError, 'no such file', tmp_path/'nowhere')
    src = write_model(tmp_path/'m', t)
    with pytest.raises(ConfigError, match='same folder'): export(src, src)
    with pytest.raises(ConfigError, match='separate folders'): export(src, src/'inside')

def test_shapes(tmp_path):
    t = toy(1, 256, 256, 2)
    odd = refused(tmp_path, UnsupportedError, 'no multiple of 128', write_model(tmp_path/'odd', t | {L+'mlp.down_proj.weight':gaussian(256, 200)}))
    assert 'model.layers.0.mlp.down_proj (256, 200)' in str(odd)
    p = export(tmp_path/'odd', tmp_path/'kept', recipe=Recipe(rules=[Rule(r'mlp\.down_proj', keep='its width')]))
    assert torch.equal(tensors_of(tmp_path/'kept')[L+'mlp.down_proj.weight'], gaussian(256, 200)) and 'model.layers.0.mlp.down_proj' in p.config['ignore']
    refused(tmp_path, UnsupportedError, 'a stack .*split it by expert', write_model(tmp_path/'stack', {k:v for k,v in t.items() if 'experts' not in k} | {L+'block_sparse_moe.input_linear.weight':gaussian(2, 256, 256), L+'block_sparse_moe.output_linear.weight':gaussian(2, 256, 128)},
        config=CONFIG | dict(model_type='granitemoe')))
    refused(tmp_path, UnsupportedError, 'experts with a bias', write_model(tmp_path/'bias', t | {L+'mlp.experts.gate_up_proj_bias':gaussian(2, 256)}))
    refused(tmp_path, UnsupportedError, 'Conv1D', write_model(tmp_path/'gpt2', {'h.0.attn.c_attn.weight':gaussian(128, 384), 'h.0.mlp.c_fc.weight':gaussian(128, 512)}, config=dict(model_type='gpt2')))

def test_experts_kept_beside_the_rest(tmp_path):
    with pytest.warns(HLWQWarning, match='vLLM reads that'): p = export(TINY, tmp_path/'e', recipe=Recipe(rules=[Rule(r'\.experts\.', keep='a test')]))
    assert p.n_matrices == 25 and any(match_name('model.layers.3.mlp.experts.9.up_proj', o) for o in p.config['ignore'])

def test_a_weight_that_is_no_number(tmp_path):
    t = toy(2, 256, 512, 4)
    t['model.layers.1.mlp.experts.down_proj'][3, 5, 6] = torch.nan
    src = write_model(tmp_path/'m', t)
    with pytest.raises(NonFiniteError, match=r'model\.layers\.1\.mlp\.experts\.3\.down_proj: 1 NaN') as e: export(src, tmp_path/'e', max_shard_size=300_000)
    assert complete(e.value) and not (tmp_path/'e').exists() and list((tmp_path/'e.partial').glob('*.safetensors'))
    assert not list((tmp_path/'e.partial').glob('*.tmp'))

def test_without_the_library(tmp_path):
    "The module loads, and says what to install before it touches anything"
    out = python(f'''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'compressed_tensors': raise ModuleNotFoundError(f'{{name}} is blocked', name=name)
sys.meta_path.insert(0, Blocked())
from hlwq.export_ct import export_compressed_tensors
from hlwq.core import UnsupportedError
try: export_compressed_tensors({str(TINY)!r}, {str(tmp_path/'e')!r}, progress=False)
except UnsupportedError as e: print(e)''')
    assert "pip install 'hlwq[ct]'" in out and complete(out) and not list(tmp_path.iterdir())

# --- the command

def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def run(*args): capsys.readouterr(); return main([str(a) for a in args]),*capsys.readouterr()
    code,out,err = run('export-ct', TINY, '--dry-run', '--json')
    assert (code,err) == (0,'') and json.loads(out)['n_tensors'] == 689 and not list(tmp_path.iterdir())
    code,out,err = run('export-ct', TINY, 'e', '--signed', '--json')
    assert code == 0 and json.loads(out)['out'] == 'e' and (tensors_of('e')['model.layers.3.self_attn.q_proj.weight_scale'] < 0).any()
    for args,needle in (((TINY,), 'OUT: not given'), ((TINY, 'x', '--bits', '5'), 'need 4 or 8'), ((TINY, 'e'), 'exists already'), (('e', 'x'), 'already quantized'), (('nowhere', 'x'), 'no such file')):
        code,out,err = run('export-ct', *args)
        assert (code,out) == (2,'') and err.count('\n') == 1 and needle in err
    assert run('export-ct', '--help')[0] == 0

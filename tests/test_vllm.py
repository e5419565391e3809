"The plugin for vLLM, as far as it can be tested where vLLM is not installed; make test-vllm serves models"
import pickle, re, subprocess, sys, types
import pytest
import torch
from configparser import ConfigParser
from pathlib import Path
from hlwq import vllm as plugin
from hlwq.core import CheckpointError, ConfigError, UnsupportedError
from hlwq.linear import linear
from hlwq.quantize import dequantize, quantize

TOLD = dict(quant_method='hlwq', format_version=1, bits=5, block_size=128, codebook='lloyd-max', kept={}, bits_by_tensor={}, transposed=[])

def config(**kw): return plugin.ServedConfig({**TOLD, **kw})

# --- versions

@pytest.mark.parametrize('v', ['0.32.0', '0.32.9', '0.32.0+cpu', '0.32.1rc1'])
def test_tested_versions(v): assert plugin.check_version(v) == v

@pytest.mark.parametrize('v', ['0.31.9', '0.33.0', '1.32.0', '0.4', 'dev', '0', '0.330.0'])
def test_other_versions(v):
    with pytest.raises(ConfigError, match=r'need 0\.32\.x.*pip install'): plugin.check_version(v)

def test_register_checks_the_version_that_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, 'vllm', types.SimpleNamespace(__version__='0.40.0'))
    with pytest.raises(ConfigError, match=r'vllm: 0\.40\.0'): plugin.register()

def test_register_is_idempotent(monkeypatch):
    seen = {}
    monkeypatch.setitem(sys.modules, 'vllm', types.SimpleNamespace(__version__='0.32.0'))
    monkeypatch.setattr(plugin, 'register_quantization_config', lambda name: lambda cls: seen.update({name:cls}))
    for _ in range(3): plugin.register()
    assert seen == {'hlwq':plugin.ServedConfig}

def test_without_vllm_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plugin, 'installed', lambda: '')
    with pytest.raises(ConfigError, match=r"not installed.*hlwq\[vllm\]"): plugin.register()

def test_entry_point_names_what_is_there():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(Path(__file__).parent.parent/'settings.ini')
    name,_,target = cfg['DEFAULT']['vllm_plugins'].partition('=')
    module,_,function = target.partition(':')
    assert name == 'hlwq' and module == plugin.__name__ and callable(getattr(plugin, function))
    assert 'vllm' not in cfg['DEFAULT']['requirements']

def test_importing_registers_nothing():
    code = "import sys; before = set(sys.modules); import hlwq.vllm; assert 'vllm' not in sys.modules and 'transformers' not in sys.modules, 'heavy'"
    subprocess.run([sys.executable, '-c', code], check=True)

# --- sharding

@pytest.mark.parametrize('bits', [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize('width', [128, 200, 384])
def test_rows(bits, width):
    q = quantize(torch.randn(5, width), bits)
    rows = plugin.as_rows(q.packed, width, bits)
    assert rows.shape == (5, plugin.row_nbytes(width, bits)) and rows.data_ptr() == q.packed.data_ptr()

def test_rows_of_another_width():
    with pytest.raises(CheckpointError, match='multiple of 160'): plugin.as_rows(torch.zeros(161, dtype=torch.uint8), 256, 5)

@pytest.mark.parametrize('bits', [3, 5])
def test_parts_are_the_stack(bits):
    "Rows are encoded for themselves: q, k and v stacked have the codes of the stacked matrix"
    w = [torch.randn(n, 256) for n in (64, 32, 32)]
    qs = [quantize(o, bits) for o in w]
    whole = quantize(torch.cat(w), bits)
    assert torch.equal(torch.cat([plugin.as_rows(o.packed, 256, bits) for o in qs]), plugin.as_rows(whole.packed, 256, bits))
    assert torch.equal(torch.cat([o.norms for o in qs]), whole.norms)

@pytest.mark.parametrize('tp', [1, 2, 4])
def test_columns_add_up(tp):
    "The sum over processes is the product; so are the rows of all of them, one after the other"
    w, x, bits = torch.randn(24, 512), torch.randn(3, 512), 5
    q = quantize(w, bits)
    rows, want, part = plugin.as_rows(q.packed, 512, bits), x @ dequantize(q).T, 512//tp
    got, n = 0, plugin.row_nbytes(part, bits)
    for r in range(tp):
        plugin.check_shard('o_proj', 512, part)
        c = plugin.Codes(rows[:, r*n:(r+1)*n].contiguous(), q.norms[:, r*part//128:(r+1)*part//128].float(), part, q.codebook)
        got = got + linear(x[:, r*part:(r+1)*part].contiguous(), c.packed, c.norm_bits, c.key)
    assert torch.allclose(got, want, rtol=0, atol=1e-5*want.abs().max())
    c = [plugin.Codes(o.contiguous(), n.float(), 512, q.codebook) for o,n in zip(rows.chunk(tp), q.norms.chunk(tp))]
    assert torch.allclose(torch.cat([linear(x, o.packed, o.norm_bits, o.key) for o in c], 1), want, rtol=0, atol=1e-5*want.abs().max())

@pytest.mark.parametrize('width,tp,sizes', [(512, 8, '1, 2, 4'), (768, 4, '1, 2, 3, 6'), (576, 2, '1'), (128, 2, '1')])
def test_a_block_is_not_cut(width, tp, sizes):
    with pytest.raises(ConfigError, match=f'layers.0.down_proj: {width//tp} of {width} columns.*size {sizes}$'): plugin.check_shard('layers.0.down_proj', width, width//tp)

def test_dtypes():
    for d in (torch.float64, torch.int8):
        with pytest.raises(ConfigError, match='--dtype bfloat16'): plugin.check_dtype(d)

# --- loading

def test_norms_keep_their_precision():
    q = quantize(torch.randn(4, 128)*1e-6, 5)                  # too small for float16
    assert q.norms.dtype == torch.float32
    assert torch.equal(plugin.Codes(plugin.as_rows(q.packed, 128, 5), q.norms, 128, q.codebook).norms, q.norms)

def test_loaders():
    got = []
    load = plugin.RowsLoader(lambda *a, **k: got.append((a, k)), 128, 5)
    load('param', torch.zeros(240, dtype=torch.uint8), 'q')
    load(param='param', loaded_weight=torch.zeros(80, dtype=torch.uint8), shard_id='w1')
    assert [tuple(a[1].shape) for a,_ in got] == [(3, 80), (1, 80)] and got[0][0][2] == 'q' and got[1][1] == dict(shard_id='w1')
    meta = plugin.MetaLoader('o_proj', 128)
    assert meta(None, torch.tensor([3, 1, 128, 384, 128]), return_success=True) is True
    with pytest.raises(CheckpointError, match='o_proj: 256 columns'): meta(None, torch.tensor([3, 2, 128, 768, 256]))
    meta(None, torch.tensor([3, 2]))                           # half of one: gate and up of an expert that was one tensor

# --- the config

def test_config_can_be_pickled():
    c = pickle.loads(pickle.dumps(config(kept={'a.weight':'norm'}, bits_by_tensor={'b.weight':4})))
    assert c.kept == {'a.weight'} and c.layer_bits('b') == 4 and c.layer_bits('c') == 5 and c.layer_bits('a') is None

def test_parts_must_agree():
    c = config(bits_by_tensor={'m.q_proj.weight':4, 'm.k_proj.weight':4}, kept={'m.up_proj.weight':'asked'})
    c.packed_modules_mapping = dict(qkv_proj=['q_proj', 'k_proj', 'v_proj'], gate_up_proj=['gate_proj', 'up_proj'])
    with pytest.raises(UnsupportedError, match=r'm\.qkv_proj: .*q_proj.weight: 4 bits.*v_proj.weight: 5 bits'): c.layer_bits('m.qkv_proj')
    with pytest.raises(UnsupportedError, match='16-bit'): c.layer_bits('m.gate_up_proj')

def test_experts():
    assert config().expert_bits('l.experts') == (5, 5)
    assert config(kept={'l.experts.0.gate_proj.weight':'asked'}).expert_bits('l.experts.routed_experts') is None
    assert config(bits_by_tensor={f'l.experts.{i}.down_proj.weight':6 for i in range(4)}).expert_bits('l.experts') == (5, 6)
    with pytest.raises(UnsupportedError, match='4, 6 bits'): config(bits_by_tensor={'l.experts.0.up_proj.weight':4, 'l.experts.1.up_proj.weight':6}).expert_bits('l.experts')

@pytest.mark.parametrize('kw,said', [(dict(format_version=2), 'format 2'), (dict(block_size=64), 'block size 64'), (dict(kept=None), 'what it keeps'), (dict(codebook=None), 'codebook'), (dict(transposed=['a']), 'turned')])
def test_configs_that_are_refused(kw, said):
    with pytest.raises(UnsupportedError, match=said): config(**kw)

def test_names_are_mapped():
    class Mapper:
        def apply_list(self, l): return [o.replace('model.', 'lm.') for o in l]
        def apply_dict(self, d): return {k.replace('model.', 'lm.'):v for k,v in d.items()}
    c = config(kept={'model.a.weight':'norm'}, bits_by_tensor={'model.b.weight':3})
    c.apply_vllm_mapper(Mapper())
    assert c.layer_bits('lm.a') is None and c.layer_bits('lm.b') == 3

def test_names_of_fused_experts():
    assert re.sub(*plugin.FUSED_KEY, 'm.0.mlp.experts.down_proj_e12__norms') == 'm.0.mlp.experts.12.down_proj.weight__norms'
    key = 'm.0.mlp.shared_expert.down_proj.weight__norms'
    assert re.sub(*plugin.FUSED_KEY, key) == key

def test_written_config_is_understood(tmp_path):
    "What the converter writes is enough, for every layer of the embedded model"
    import json
    from hlwq.convert import quantize_checkpoint
    from hlwq.core import asset_path
    quantize_checkpoint(asset_path('tiny-moe-10m'), tmp_path/'q', progress=False)
    c = plugin.ServedConfig(json.loads((tmp_path/'q/config.json').read_text())['quantization_config'])
    c.packed_modules_mapping = dict(qkv_proj=['q_proj', 'k_proj', 'v_proj'], in_proj_qkvz=['in_proj_qkv', 'in_proj_z'], in_proj_ba=['in_proj_b', 'in_proj_a'])
    assert c.layer_bits('model.layers.3.self_attn.qkv_proj') == c.layer_bits('model.layers.0.linear_attn.in_proj_qkvz') == 5
    assert c.layer_bits('model.layers.0.linear_attn.in_proj_ba') is c.layer_bits('model.layers.0.mlp.gate') is c.layer_bits('model.embed_tokens') is None
    assert c.expert_bits('model.layers.0.mlp.experts') == (5, 5) and c.book(5).bits == 5

"""Frozen checkpoints: today's writer makes the same bytes, and today's reader reads them.

A round trip of one's own would pass even if writer and reader changed together. See golden/make.py for how the files were made.
The version of the package is part of three files (config.json, hlwq_config.json, manifest): it is set back to the frozen one, so that every byte counts."""
import importlib.util,json,shutil
from pathlib import Path
import numpy as np
import pytest,torch
from safetensors.numpy import load_file as load_numpy
import hlwq.checkpoint,hlwq.convert
from hlwq.checkpoint import CheckpointReader,verify_checkpoint
from hlwq.convert import dequantize_checkpoint,quantize_checkpoint
from kit import L,decoded,numpy_decode,snapshot,tensors_of

GOLDEN = Path(__file__).parent/'golden'
VERSION = '0.1.0'                                               # of the package that wrote golden/hlwq

def make():
    spec = importlib.util.spec_from_file_location('golden_make', GOLDEN/'make.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m

@pytest.fixture
def frozen(monkeypatch):
    for m in ('hlwq.checkpoint', 'hlwq.convert'): monkeypatch.setattr(f'{m}.__version__', VERSION)

def test_source_is_what_its_script_says(tmp_path):
    m = make()
    m.make_source(tmp_path/'source'); m.make_legacy(tmp_path/'legacy')
    for k in ('source', 'legacy'): assert snapshot(tmp_path/k) == snapshot(GOLDEN/k)

def without_card(folder):
    "The files of a checkpoint without its model card, which is for people and came after the frozen files"
    (folder/'README.md').unlink()
    return snapshot(folder)

@pytest.mark.parametrize('threads', [1, 2])
def test_writer_makes_every_byte_again(tmp_path, frozen, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try: quantize_checkpoint(GOLDEN/'source', tmp_path/'hlwq', progress=False)
    finally: torch.set_num_threads(before)
    want = snapshot(GOLDEN/'hlwq')
    got = without_card(tmp_path/'hlwq')
    assert got.keys() == want.keys()
    different = [k for k in want if got[k] != want[k]]
    assert not different, f'{different} differ from the frozen ones'

def test_shards_do_not_know_the_version(tmp_path, monkeypatch):
    for m in ('hlwq.checkpoint', 'hlwq.convert'): monkeypatch.setattr(f'{m}.__version__', '99.0')
    quantize_checkpoint(GOLDEN/'source', tmp_path/'hlwq', progress=False)
    a,b = without_card(tmp_path/'hlwq'),snapshot(GOLDEN/'hlwq')
    assert {k for k in a if a[k] != b[k]} == {'config.json', 'hlwq_config.json', 'hlwq_manifest.json'}

def test_reader_accepts_it():
    assert verify_checkpoint(GOLDEN/'hlwq').ok
    want = load_numpy(GOLDEN/'source'/'model.safetensors')
    with CheckpointReader(GOLDEN/'hlwq') as r:
        assert {n:(m.shape, m.bits, m.norms_dtype) for n,m in r.matrices.items()} == {L+'self_attn.q_proj.weight':((6, 200), 5, 'F16'), L+'mlp.experts.gate_up_proj_e0':((8, 200), 5, 'F16'), L+'mlp.experts.gate_up_proj_e1':((8, 200), 5, 'F16')}
        assert list(r.kept) == [L+'input_layernorm.weight'] and np.array_equal(r.tensor(L+'input_layernorm.weight').numpy(), want[L+'input_layernorm.weight'])
        for n in r.names:
            got,plain = r.matrix(n).dequantize().numpy(),decoded(GOLDEN/'hlwq', n)
            w = want[n] if n in want else want[L+'mlp.experts.gate_up_proj'][int(n[-1])]
            assert np.abs(got - plain).max() < 1e-6
            assert np.linalg.norm(got - w)/np.linalg.norm(w) < .053

def test_plain_checkpoint_from_it(tmp_path):
    dequantize_checkpoint(GOLDEN/'hlwq', tmp_path/'plain', dtype=torch.float32, progress=False)
    got,want = tensors_of(tmp_path/'plain'),load_numpy(GOLDEN/'source'/'model.safetensors')
    assert {k:tuple(t.shape) for k,t in got.items()} == {k:a.shape for k,a in want.items()}

def test_legacy_layout_is_read():
    t = load_numpy(GOLDEN/'legacy'/'model.safetensors')
    m = make()
    with CheckpointReader(GOLDEN/'legacy', 'inf100') as r:
        assert {n:(i.shape, i.bits) for n,i in r.matrices.items()} == {L+'self_attn.q_proj.weight':((4, 256), 5), L+'mlp.down_proj.weight':((3, 256), 4)}     # 256: a meta of four does not know about 200
        for n,seed,width,scale in ((L+'self_attn.q_proj.weight', 4, 200, 4096), (L+'mlp.down_proj.weight', 5, 256, 4096)):
            p = n.replace('.', '__')
            meta,bits = t[f'{p}__meta'],r.matrices[n].bits
            assert meta.shape == (4,)
            plain = numpy_decode(t[f'{p}__packed'], t[f'{p}__norms'], meta, m.inf100(bits), 256)
            got = r.matrix(n).dequantize().numpy()
            assert np.abs(got - plain).max() < 1e-6
            w = m.integers(len(got)*width, seed).reshape(-1, width)/scale
            assert np.linalg.norm(got[:, :width] - w)/np.linalg.norm(w) < (.062 if bits == 5 else .11)
        assert list(r.kept) == ['model.norm.weight']

def test_legacy_layout_tells_its_table_or_is_told(tmp_path):
    "Without a name the table is guessed with a warning; verify says that the manifest is missing, and nothing worse"
    with pytest.warns(UserWarning, match='no codebook is named'):
        with CheckpointReader(GOLDEN/'legacy') as r: r.matrix(r.names[0])
    said = verify_checkpoint(GOLDEN/'legacy').problems
    assert len(said) == 1 and 'hlwq_manifest.json: missing' in said[0]

def test_legacy_layout_with_a_config_gets_its_width(tmp_path):
    shutil.copytree(GOLDEN/'legacy', tmp_path/'m')
    cfg = dict(model_type='llama', hidden_size=200, num_hidden_layers=1, num_attention_heads=2, head_dim=2, num_key_value_heads=2, intermediate_size=256, vocab_size=8, tie_word_embeddings=False)
    (tmp_path/'m'/'config.json').write_text(json.dumps(cfg))
    with CheckpointReader(tmp_path/'m', 'inf100') as r:
        r.true_shapes()
        assert r.matrices[L+'self_attn.q_proj.weight'].shape == (4, 200)

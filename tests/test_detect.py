"A codebook that no file names is told from the codes alone"
import pytest,torch
from safetensors.torch import load_file
from hlwq.checkpoint import detect_codebook
from hlwq.core import asset_path
from hlwq.quantize import quantize

MATRICES = {k:v for k,v in load_file(asset_path('tiny-moe-10m')/'model.safetensors').items() if v.ndim == 2 and 'embed' not in k and min(v.shape) >= 64}

@pytest.mark.parametrize('bits', [5, 6])
@pytest.mark.parametrize('norm', ['l2', 'gain'])
@pytest.mark.parametrize('name', ['lloyd-max', 'inf100', 'trunc4'])
def test_every_trained_matrix_alone(name, norm, bits):
    assert len(MATRICES) == 217
    wrong = [k for k,v in MATRICES.items() if detect_codebook(quantize(v, bits, norm, name).codes, bits)[0].name != name]
    assert not wrong

@pytest.mark.parametrize('name', ['lloyd-max', 'inf100', 'trunc4'])
def test_four_bits_together(name):
    codes = torch.cat([quantize(v, 4, 'l2', name).codes.flatten() for v in MATRICES.values()])
    assert detect_codebook(codes, 4)[0].name == name

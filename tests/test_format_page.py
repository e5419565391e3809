"docs/format.md is written for people who will not read our code: its decoder runs here, and its numbers are checked"
import re
import numpy as np
import torch
from hlwq.lloyd_max import codebook
from common import ROOT,modules

PAGE = (ROOT/'docs/format.md').read_text(encoding='utf-8')

def decoder():
    space = {}
    exec(re.search(r'```python\n(.*?)```', PAGE, re.S)[1], space)
    return space['decode']

def as_bytes(s): return np.array([int(b,16) for b in s.split()], dtype=np.uint8)

def bits_of(codes, width): return np.packbits([int(b) for k in codes for b in f'{k:0{width}b}'])

def test_byte_table():
    rows = re.findall(r'^\| (\d) \| ([\d ]+) \| `([0-9A-F ]+)` \|$', PAGE, re.M)
    assert len(rows) == 7
    for width,codes,stored in rows: assert (bits_of(map(int, codes.split()), int(width)) == as_bytes(stored)).all()

def test_packing_agrees():
    if 'packing' not in modules(): return
    from hlwq.packing import pack_codes
    for width,codes,stored in re.findall(r'^\| (\d) \| ([\d ]+) \| `([0-9A-F ]+)` \|$', PAGE, re.M):
        assert pack_codes(torch.tensor([int(k) for k in codes.split()], dtype=torch.uint8), int(width)).tolist() == as_bytes(stored).tolist()

def test_codebook_table():
    rows = re.findall(r'^\| `([\w-]+)` (\d) \| ([\d. ]+) \|$', PAGE, re.M)
    assert len(rows) == 12
    for name,bits,half in rows:
        stored = np.array([float(o) for o in half.split()])
        c = codebook(name, int(bits)).centroids.double().numpy()
        assert len(stored)*2 == len(c) and np.abs(stored - c[len(stored):]).max() < 5e-7 and np.abs(c + c[::-1]).max() == 0

def test_errors_of_the_codebooks():
    rows = re.findall(r'^\| `([\w-]+)` \| .* \| \.(\d+), \.(\d+), \.(\d+) \|$', PAGE, re.M)
    assert len(rows) == 3
    for name,*mse in rows:
        for bits,m in zip((4,5,6), mse): assert abs(codebook(name, bits).mse - float(f'.{m}')) < 6e-8

def spike():
    "The example block as its page gives it: packed, norms, meta"
    packed,gain = re.search(r'`packed` \| `([0-9A-F ]+)`, sixteen times', PAGE)[1], re.search(r'in float16 [\d.]+: `([0-9A-F ]+)`', PAGE)[1]
    return np.tile(as_bytes(packed), 16), as_bytes(gain).view('<f2').reshape(1, 1), np.array([1, 1, 128, 128, 128])

def test_example_block_decodes():
    w = decoder()(*spike(), codebook('lloyd-max', 5).centroids.numpy())
    assert w.shape == (1, 128) and abs(w[0,0]-1.0001337) < 1e-6 and not w[0,1:].any()

def test_example_block_is_what_we_write():
    if 'quantize' not in modules(): return
    from hlwq.quantize import quantize
    w = torch.zeros(1, 128); w[0,0] = 1
    q,(packed,norms,_) = quantize(w, bits=5), spike()
    assert q.packed.tolist() == packed.tolist() and q.norms.dtype == torch.float16 and q.norms.item() == norms.item()
    assert quantize(w, bits=5, norm='l2').norms.item() == 1

def test_decoder_agrees_with_ours():
    if 'quantize' not in modules(): return
    from hlwq.quantize import quantize
    for bits in (2, 3, 4, 5, 6, 8):
        w = torch.randn(5, 300, generator=torch.Generator().manual_seed(bits))
        q = quantize(w, bits=bits)
        w2 = decoder()(q.packed.numpy(), q.norms.numpy(), q.meta.numpy(), q.codebook.centroids.numpy())
        assert w2.shape == (5, 300) and np.abs(w2 - q.dequantize().numpy()).max() < 1e-5

def test_zero_block():
    if 'quantize' not in modules(): return
    from hlwq.quantize import quantize
    for bits in (2, 3, 4, 5, 6, 8):
        q = quantize(torch.zeros(2, 128), bits=bits)
        assert (q.codes == 2**(bits-1)-1).all() and not q.norms.any() and not q.dequantize().any()

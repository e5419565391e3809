"""How the frozen files came to be. Not run by the tests: `python tests/golden/make.py FOLDER` makes them anew elsewhere, to compare.

`source` and `legacy` are written here with numpy alone, from integers of a linear congruential generator, so that no library's
random numbers matter. `hlwq` is what version 0.1.0 wrote for `source`. Frozen means: never regenerated to make a test pass."""
import json,struct,sys
from pathlib import Path
import numpy as np
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit import L,numpy_encode

# positive halves of the table inf100, as published
INF100 = {4: '0.1317578 0.3978971 0.6723921 0.9626410 1.2797397 1.6430415 2.0935626 2.7543547',
    5: '0.0879921 0.2640680 0.4404319 0.6173216 0.7950509 0.9740559 1.1549615 1.3386794 1.5265623 1.7206519 1.9241064 2.1419919 2.3829091 2.6628726 3.0169189 3.5516090'}

def inf100(bits):
    half = [float(o) for o in INF100[bits].split()]
    return [-o for o in reversed(half)] + half

def integers(n, seed):
    "n integers between -510 and 510 that look Gaussian: each the sum of eight draws"
    x,res = seed,np.zeros(n*8, dtype=np.int64)
    for i in range(n*8):
        x = (x*6364136223846793005 + 1442695040888963407) % 2**64
        res[i] = (x >> 57) - 63                                 # -63 to 64
    return res.reshape(n, 8).sum(1)

def safetensors(path, arrays):
    "Writes a safetensors file, tensors one after the other"
    names = {'float16':'F16', 'float32':'F32', 'uint8':'U8', 'int64':'I64'}
    header,at = {'__metadata__':{'format':'pt'}},0
    for k,a in arrays.items():
        header[k] = dict(dtype=names[a.dtype.name], shape=list(a.shape), data_offsets=[at, at+a.nbytes])
        at += a.nbytes
    h = json.dumps(header, separators=(',', ':')).encode()
    h += b' '*(-len(h) % 8)
    path.write_bytes(struct.pack('<Q', len(h)) + h + b''.join(a.tobytes() for a in arrays.values()))

def source_arrays():
    "A matrix whose width is no multiple of 128, a stack of two experts, a norm"
    return {L+'self_attn.q_proj.weight': (integers(6*200, 1).reshape(6, 200)/4096).astype(np.float16),
        L+'mlp.experts.gate_up_proj': (integers(2*8*200, 2).reshape(2, 8, 200)/2048).astype(np.float16),
        L+'input_layernorm.weight': (1 + integers(200, 3)/8192).astype(np.float16)}

CONFIG = dict(model_type='qwen3_moe', hidden_size=200, num_hidden_layers=1, tie_word_embeddings=False)

def make_source(folder):
    folder.mkdir(parents=True, exist_ok=True)
    safetensors(folder/'model.safetensors', source_arrays())
    (folder/'config.json').write_text(json.dumps(CONFIG, indent=1) + '\n')
    (folder/'tokenizer_config.json').write_text('{"model_max_length": 64}\n')

def make_legacy(folder):
    "The older layout: dots written as two underscores, meta of four, table inf100, plain lengths, no config"
    folder.mkdir(parents=True, exist_ok=True)
    res = {}
    for name,bits,w in (('self_attn__q_proj__weight', 5, integers(4*200, 4).reshape(4, 200)/4096), ('mlp__down_proj__weight', 4, integers(3*256, 5).reshape(3, 256)/4096)):
        packed,norms,meta = numpy_encode(w, bits, inf100(bits))
        res |= {f'model__layers__0__{name}__{k}':v for k,v in dict(packed=packed, norms=norms, meta=meta).items()}
    res['model.norm.weight'] = (1 + integers(8, 6)/8192).astype(np.float16)
    res = dict(sorted(res.items(), key=lambda o: -o[1].itemsize))
    safetensors(folder/'model.safetensors', res)

if __name__ == '__main__':
    out = Path(sys.argv[1])
    make_source(out/'source')
    make_legacy(out/'legacy')
    from hlwq.convert import quantize_checkpoint
    quantize_checkpoint(out/'source', out/'hlwq', progress=False)

"What the tests of conversion share: small checkpoints, hashes of folders, a decoder that knows only docs of the format, small models"
import hashlib,json,os,re,shutil,struct,tempfile
from pathlib import Path
import numpy as np,torch
from safetensors import safe_open
from safetensors.torch import load_file,save_file

L = 'model.layers.0.'

# --- checkpoints

def gaussian(*shape, seed=0, dtype=torch.bfloat16, scale=.02): return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed))*scale).to(dtype)

def toy(n_layers=2, hidden=256, inter=384, experts=4, dtype=torch.bfloat16, seed=0):
    "Tensors of a small mixture of experts: attention, a fused stack, a router, norms, embedding, head"
    t = {'model.embed_tokens.weight':gaussian(64, hidden, seed=seed, dtype=dtype)}
    for i in range(n_layers):
        p,s = f'model.layers.{i}.',seed + 100*(i+1)
        t |= {p+'self_attn.q_proj.weight':gaussian(hidden, hidden, seed=s+1, dtype=dtype), p+'self_attn.o_proj.weight':gaussian(hidden, hidden, seed=s+2, dtype=dtype),
            p+'mlp.experts.gate_up_proj':gaussian(experts, inter, hidden, seed=s+3, dtype=dtype), p+'mlp.experts.down_proj':gaussian(experts, hidden, inter//2, seed=s+4, dtype=dtype),
            p+'mlp.gate.weight':gaussian(experts, hidden, seed=s+5, dtype=dtype), p+'input_layernorm.weight':torch.ones(hidden, dtype=dtype)}
    return t | {'model.norm.weight':torch.ones(hidden, dtype=dtype), 'lm_head.weight':gaussian(64, hidden, seed=seed+7, dtype=dtype)}

CONFIG = dict(model_type='qwen3_moe', architectures=['Qwen3MoeForCausalLM'], hidden_size=256, num_hidden_layers=2, tie_word_embeddings=False)

def write_model(folder, tensors, n_shards=1, config=CONFIG, extra=True):
    "Writes a checkpoint of one or several shards, with an index, a config and a tokenizer"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    size,wm = -(-len(names)//n_shards),{}
    for i in range(n_shards):
        part,f = names[i*size:(i+1)*size],f'model-{i+1:05d}-of-{n_shards:05d}.safetensors' if n_shards > 1 else 'model.safetensors'
        save_file({k:tensors[k].contiguous() for k in part}, folder/f, metadata={'format':'pt'})
        wm |= dict.fromkeys(part, f)
    if n_shards > 1: (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata=dict(total_size=sum(t.nbytes for t in tensors.values())), weight_map=wm)))
    if config is not None: (folder/'config.json').write_text(json.dumps(config))
    if extra: (folder/'tokenizer.json').write_text('{"version":"1.0"}')
    return folder

def raw(header, data=b'', n=None):
    "A safetensors file from a header that no library would write"
    h = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(h) if n is None else n) + h + data

def tensors_of(folder):
    "All tensors of a folder, as the safetensors library reads them"
    res = {}
    for f in sorted(Path(folder).glob('*.safetensors')): res |= load_file(f)
    return res

def snapshot(folder, times=False):
    "Relative path -> sha256 of everything below a folder; with the times of change on request"
    folder,res = Path(folder),{}
    if not folder.exists(): return None
    for p in sorted(folder.rglob('*')):
        k,st = str(p.relative_to(folder)),p.lstat()
        res[k] = ('link', os.readlink(p)) if p.is_symlink() else ('folder',) if p.is_dir() else (hashlib.sha256(p.read_bytes()).hexdigest(),)
        if times: res[k] += (st.st_mtime_ns, st.st_mode)
    return res

# --- the format, from its description alone

def sylvester(n=128):
    H = np.ones((1, 1))
    while len(H) < n: H = np.block([[H, H], [H, -H]])
    return H/np.sqrt(n)

def numpy_codes(packed, bits):
    "MSB-first bit stream -> codes"
    stream = np.unpackbits(np.asarray(packed, dtype=np.uint8).reshape(-1))
    return stream[:len(stream)//bits*bits].reshape(-1, bits) @ (1 << np.arange(bits)[::-1])

def numpy_decode(packed, norms, meta, centroids, in_features=None):
    "Packed codes, norms and meta -> the matrix, in float64"
    out,nb,block,total = (int(o) for o in meta[:4])
    assert block == 128 and total == out*nb*block
    bits = len(packed)*8//total
    c = np.asarray(centroids, dtype=np.float64)[numpy_codes(packed, bits)].reshape(out, nb, block)
    w = np.asarray(norms, dtype=np.float64)[..., None]*((c/np.sqrt(block)) @ sylvester(block))
    return w.reshape(out, -1)[:, :int(meta[4]) if len(meta) > 4 else in_features]

def numpy_encode(w, bits, centroids):
    "Matrix -> packed codes, norms (plain length, float16) and meta of four: an encoder for tests, also from the description"
    out,width = w.shape
    nb = -(-width//128)
    p = np.zeros((out, nb*128)); p[:, :width] = w
    blocks = p.reshape(out, nb, 128)
    norms = np.maximum(np.sqrt((blocks**2).sum(-1)), 1e-10)
    z = (blocks/norms[..., None]) @ sylvester()*np.sqrt(128)
    c = np.asarray(centroids, dtype=np.float64)
    codes = np.searchsorted((c[1:] + c[:-1])/2, z.reshape(-1), side='left')
    bitplanes = ((codes[:, None] >> np.arange(bits)[::-1]) & 1).astype(np.uint8)
    return np.packbits(bitplanes.reshape(-1)), norms.astype(np.float16), np.array([out, nb, 128, out*nb*128])

def decoded(folder, key):
    "One matrix of a checkpoint written by us, by the numpy decoder and the config's own centroids"
    t = tensors_of(folder)
    book = json.loads((Path(folder)/'hlwq_config.json').read_text())['codebook']['centroids']
    packed,norms,meta = (t[f'{key}__{o}'] for o in ('packed', 'norms', 'meta'))
    bits = packed.numel()*8//int(meta[3])
    return numpy_decode(packed.numpy(), norms.float().numpy(), meta.numpy(), book[str(bits)])

def complete(message):
    "Whether an error says what, what was found, what is needed and what to do: 'object: found, need required; next step'"
    return re.search(r'^[^:]+: .+(, need |: |; ).+; \S', str(message), re.S) is not None and ', need ' in str(message)

# --- small models, as transformers makes them

SIZES = dict(vocab_size=64, hidden_size=128, intermediate_size=136, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128,
    tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=72)
SMALL = dict(                                                  # name -> model_type, sizes that differ; widths that are no multiple of 128 wherever the model allows it
    llama=('llama', dict(hidden_size=144, intermediate_size=200, head_dim=36)),
    qwen3_moe=('qwen3_moe', EXPERTS), mixtral=('mixtral', EXPERTS),
    gpt_oss=('gpt_oss', EXPERTS | dict(intermediate_size=128, layer_types=['full_attention']*2)),
    gpt2=('gpt2', dict(hidden_size=144, tie_word_embeddings=True)),
    no_gate=('nemotron_h', EXPERTS | dict(layers_block_type=['moe', 'attention', 'moe'], moe_shared_expert_intermediate_size=80, n_group=1, topk_group=1)))
MADE = tempfile.TemporaryDirectory(prefix='hlwq-models-', dir='/dev/shm' if os.access('/dev/shm', os.W_OK) and shutil.disk_usage('/dev/shm').free > 1e9 else None)

def small_config(name, **sizes):
    from transformers import AutoConfig
    kind,own = SMALL[name]
    return AutoConfig.for_model(kind, **{**SIZES, **own, **sizes})

def write_small(name, folder, dtype=torch.float32, seed=0, save=None, cls=None, **sizes):
    "Writes a small model with random weights, biases and norms included; `save` goes to save_pretrained"
    from transformers import AutoModelForCausalLM
    config,g = small_config(name, **sizes),torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config) if cls is None else cls(config)
    with torch.no_grad():
        for n,p in model.named_parameters(): p.copy_(torch.randn(p.shape, generator=g)*(.1 if p.ndim < 2 else .2) + (1 if p.ndim < 2 and n.endswith('weight') else 0))
    model.to(dtype).save_pretrained(folder, **(save or {}))
    return Path(folder)

def made(what, make):
    "A folder that tests share and must not change, made the first time it is asked for"
    path = Path(MADE.name)/what
    if not path.exists(): make(path)
    return path

def original(name):
    "Folder of a small model in float32, or of the embedded one"
    from hlwq.core import asset_path
    return asset_path(name) if name.startswith('tiny-') else made(name, lambda d: write_small(name, d))

def quantized(name, bits=5):
    "Folder of the same, as quantize_checkpoint writes it"
    from hlwq.convert import quantize_checkpoint
    return made(f'{name}-q{bits}', lambda d: quantize_checkpoint(original(name), d, bits=bits, progress=False))

def decoded_twin(name, bits=5):
    "Folder of what that stands for, in float32"
    from hlwq.convert import dequantize_checkpoint
    return made(f'{name}-d{bits}', lambda d: dequantize_checkpoint(quantized(name, bits), d, dtype=torch.float32, progress=False))

def some_ids(model, n=9, batch=2, seed=1): return torch.randint(3, model.config.get_text_config().vocab_size, (batch, n), generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def logits(model, ids=None, **kw): return model(some_ids(model) if ids is None else ids, **kw).logits

def gap(a, b):
    "Relative error of a against b"
    return ((a.double()-b.double()).norm()/b.double().norm()).item()

def same_tensors(a, b):
    "Asserts that two folders hold the same tensors, bit by bit"
    a,b = tensors_of(a),tensors_of(b)
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:8]
    bad = [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k].view(torch.uint8) if a[k].ndim else a[k], b[k].view(torch.uint8) if b[k].ndim else b[k])]
    assert not bad, bad[:8]

def altered(folder, out, change=None, config=None, n_shards=1, manifest=True):
    "A copy of a quantized folder with its tensors changed by one function and its quantization_config, or config, by another"
    folder,out = Path(folder),Path(out)
    cfg,tensors = json.loads((folder/'config.json').read_text()),tensors_of(folder)
    with safe_open(next(folder.glob('*.safetensors')), 'pt') as f: metadata = f.metadata()
    if change: change(tensors)
    if config: config(cfg)
    write_model(out, tensors, n_shards, config=cfg, extra=False)
    for p in out.glob('*.safetensors'): save_file(load_file(p), p, metadata=metadata)
    if manifest: write_manifest(out)
    return out

def write_manifest(folder):
    files = {p.name:dict(size=p.stat().st_size, sha256=hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(Path(folder).iterdir()) if p.name != 'hlwq_manifest.json'}
    (Path(folder)/'hlwq_manifest.json').write_text(json.dumps(dict(format='hlwq_manifest', format_version=1, files=files, skipped=[])))

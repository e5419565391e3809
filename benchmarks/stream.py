"""Quantizes a synthetic bf16 checkpoint of several GB and compares time and memory with what its parts need.

    python benchmarks/stream.py                 # 4 GB in the folder for temporary files; prints the table
    python benchmarks/stream.py --write         # also writes docs/results/stream.json and stream.md

The parts: reading every tensor once, quantizing pieces that are in memory, writing and flushing as many bytes. The
conversion runs in a process of its own, whose peak of memory is read from the kernel.

    python benchmarks/stream.py --experts --device cuda --gb 67 --dir /fast/disk      # against a copy, with layers of a 35B mixture of experts

With --experts the layers have the shapes of a model of 35 billion weights: 256 experts fused into (256, 1024, 2048) and (256, 2048, 512),
1.6 GB a layer. The conversion is compared with what `cp` would need on the same disk: reading all bytes of the source once, then writing
and flushing as many bytes as the conversion wrote. The source is dropped from the page cache before each of the two, unless --warm.
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from common import about, said, save
from hlwq.checkpoint import ShardWriter, entry_nbytes
from hlwq.convert import row_spans
from hlwq.lloyd_max import codebook
from hlwq.quantize import quantize_rows
from hlwq.source import open_source

CONVERT = """
import json, sys, tempfile, time
from pathlib import Path
from hlwq.convert import quantize_checkpoint
from hlwq.core import asset_path
src, out, device = sys.argv[1:]
seconds = {}
def timed(name, *a):
    start = time.perf_counter(); plan = quantize_checkpoint(*a, device=device, progress=False); seconds[name] = time.perf_counter() - start
    return plan
with tempfile.TemporaryDirectory() as d: timed('first', asset_path('tiny-moe-10m'), Path(d)/'q')
plan = timed('wall', src, out)
rss = 1024*int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])
print(json.dumps(dict(seconds, peak_rss=rss, measured=plan.measured)))
"""
CHILD = "import sys,time; from hlwq.convert import quantize_checkpoint as q; s=time.perf_counter(); p=q(sys.argv[1],sys.argv[2],progress=False); " \
        "print(time.perf_counter()-s, 1024*int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]), p.measured)"

def make(folder, gb):
    "A checkpoint of Gaussian matrices, one expert stack among them, in two shards"
    g = torch.Generator().manual_seed(0)
    keys, index = [f'model.layers.{i}.mlp.up_proj.weight' for i in range(int(gb*1e9/2/(8192*4096)) - 8)], {}
    halves = [keys[:len(keys)//2], keys[len(keys)//2:]]
    for i, names in enumerate(halves, 1):
        shard = f'model-{i:05d}-of-00002.safetensors'
        with ShardWriter(folder/shard, 1 << 16) as w:
            for k in names: w.add(k, 'BF16', (8192, 4096), (torch.randn(1024, 4096, generator=g).bfloat16() for _ in range(8)))
            if i == 2: w.add('model.layers.0.mlp.experts.gate_up_proj', 'BF16', (64, 1024, 4096), (torch.randn(1, 1024, 4096, generator=g).bfloat16() for _ in range(64)))
        index |= {k: shard for k in names} | ({'model.layers.0.mlp.experts.gate_up_proj': shard} if i == 2 else {})
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=index)))
    (folder/'config.json').write_text(json.dumps(dict(model_type='qwen3_moe', hidden_size=4096, num_hidden_layers=99)))

def parts(folder, out_bytes, tmp):
    "Seconds for reading everything, for quantizing as many weights in memory, for writing as many bytes"
    with open_source(folder) as src:
        start = time.perf_counter()
        for t in src.tensors.values():
            for a, b in row_spans(t.shape[0], t.numel//t.shape[0]): w = src.read(t.name, a, b)
        read = time.perf_counter() - start
        n = sum(t.numel for t in src.tensors.values())
    w, book = torch.randn(1024, 4096).bfloat16(), codebook('lloyd-max', 5)
    quantize_rows(w, book)
    start, reps = time.perf_counter(), n//w.numel()
    for _ in range(reps): quantize_rows(w, book)
    compute = (time.perf_counter() - start)*n/(reps*w.numel())
    block, start = os.urandom(1 << 24), time.perf_counter()
    with open(tmp/'blob', 'wb') as f:
        for _ in range(out_bytes >> 24): f.write(block)
        f.flush(); os.fsync(f.fileno())
    write = time.perf_counter() - start
    (tmp/'blob').unlink()
    return dict(read=read, quantize=compute, write=write)

LAYER = {'gate_up_proj': (256, 1024, 2048), 'down_proj': (256, 2048, 512)}

def make_experts(folder, gb):
    "Layers of a 35B mixture of experts: one random tensor, shifted by another distance for each 32 MB; shards of about 5 GB"
    n = 1 << 24
    base = (torch.randn(n, generator=torch.Generator().manual_seed(0))*.02).bfloat16()
    layers, index = max(1, round(gb*1e9/sum(2*torch.Size(o).numel() for o in LAYER.values()))), {}
    groups = [range(i, min(i+3, layers)) for i in range(0, layers, 3)]
    for i, group in enumerate(groups, 1):
        shard = f'model-{i:05d}-of-{len(groups):05d}.safetensors'
        with ShardWriter(folder/shard, 1 << 16) as w:
            for layer in group:
                for k, shape in LAYER.items():
                    name = f'model.layers.{layer}.mlp.experts.{k}'
                    w.add(name, 'BF16', shape, (base.roll(7919*(layer*64 + j) + len(k)) for j in range(torch.Size(shape).numel()//n)))
                    index[name] = shard
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=index)))
    (folder/'config.json').write_text(json.dumps(dict(model_type='qwen3_moe', hidden_size=2048, num_hidden_layers=layers, num_experts=256, tie_word_embeddings=False)))
    return layers

def drop(folder):
    "Takes the files of a folder out of the page cache"
    for p in folder.glob('*.safetensors'):
        with open(p, 'rb') as f: os.fsync(f.fileno()); os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

def copy(folder, out_bytes, tmp):
    "Seconds for reading all weight files as cp does, and for writing and flushing some bytes"
    buffer, start = bytearray(1 << 20), time.perf_counter()
    for p in sorted(folder.glob('*.safetensors')):
        with open(p, 'rb', buffering=0) as f:
            while f.readinto(buffer): pass
    read, block, start = time.perf_counter() - start, os.urandom(1 << 20), time.perf_counter()
    with open(tmp/'blob', 'wb', buffering=0) as f:
        for _ in range(out_bytes >> 20): f.write(block)
        os.fsync(f.fileno())
    write = time.perf_counter() - start
    (tmp/'blob').unlink()
    return dict(read=read, write=write)

def against_copy(a):
    "Conversion of the layers of a large model, beside a copy of the same bytes"
    with tempfile.TemporaryDirectory(dir=a.dir) as d:
        tmp = Path(d); (tmp/'src').mkdir()
        layers = make_experts(tmp/'src', a.gb)
        src_bytes = sum(o.stat().st_size for o in (tmp/'src').glob('*.safetensors'))
        if not a.warm: drop(tmp/'src')
        out = subprocess.run([sys.executable, '-c', CONVERT, tmp/'src', tmp/'out', a.device], stdout=subprocess.PIPE, text=True, check=True).stdout
        got = json.loads(out.splitlines()[-1])
        out_bytes = sum(o.stat().st_size for o in (tmp/'out').iterdir())
        shutil.rmtree(tmp/'out')
        if not a.warm: drop(tmp/'src')
        cp = copy(tmp/'src', out_bytes, tmp)
    gpu = torch.cuda.get_device_name(a.device) if a.device.startswith('cuda') else None
    r = dict(about(), gpu=gpu, device=a.device, page_cache='warm' if a.warm else 'dropped', layers=layers, source_bytes=src_bytes, output_bytes=out_bytes, cp=cp, ratio=got['wall']/sum(cp.values()), **got)
    rows = [f'| source, output | {src_bytes/1e9:.2f} GB ({layers} layers), {out_bytes/1e9:.2f} GB |', f"| cp: read the source, page cache {r['page_cache']} | {cp['read']:.2f} s, {src_bytes/1e9/cp['read']:.1f} GB/s |", f"| cp: write the output, with fsync | {cp['write']:.2f} s, {out_bytes/1e9/cp['write']:.1f} GB/s |",
        f"| conversion on {gpu or 'the CPU'}, wall time | {r['wall']:.2f} s, {src_bytes/1e9/r['wall']:.2f} GB/s |", f"| **conversion / (read + write)** | **{r['ratio']:.2f}** |", f"| peak memory (RSS) | {r['peak_rss']/1e9:.2f} GB |",
        *[f'| of the conversion: {k} | {v:.2f} s |' for k,v in r['measured'].items() if k != 'total'], f"| before it: a small model, first call | {r['first']:.2f} s |"]
    md = '\n'.join([f"# Streaming the experts of a 35B model through {gpu or 'the CPU'}", '', '| what | measured |', '|---|---:|', *rows, '', 'The stages go on at the same time; their seconds are sums over threads. `quantize` is what the main thread spends on starting and awaiting work. The conversion also computes the sha256 of every file it wrote.', '', said(r)])
    print(md)
    if a.write: save(f"stream-experts-{a.device.split(':')[0]}", r, md)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--write', action='store_true'); p.add_argument('--gb', type=float, default=4.)
    p.add_argument('--experts', action='store_true', help='layers of a 35B mixture of experts, compared with cp'); p.add_argument('--device', default='cpu'); p.add_argument('--dir', default=None, help='folder on the disk to use')
    p.add_argument('--warm', action='store_true', help='leave the source in the page cache')
    a = p.parse_args()
    if a.experts: return against_copy(a)
    with tempfile.TemporaryDirectory(dir=a.dir) as d:
        tmp = Path(d); (tmp/'src').mkdir(); make(tmp/'src', a.gb)
        src_bytes = sum(o.stat().st_size for o in (tmp/'src').glob('*.safetensors'))
        out = subprocess.run([sys.executable, '-c', CHILD, tmp/'src', tmp/'out'], capture_output=True, text=True, check=True).stdout
        wall, rss, measured = out.split(' ', 2)
        out_bytes = sum(o.stat().st_size for o in (tmp/'out').iterdir())
        apart = parts(tmp/'src', out_bytes, tmp)
    r = dict(about(), source_bytes=src_bytes, output_bytes=out_bytes, wall=float(wall), peak_rss=int(rss), apart=apart, sum_apart=sum(apart.values()), ratio=float(wall)/sum(apart.values()), measured=measured.strip())
    rows = [f'| source, output | {src_bytes/1e9:.2f} GB, {out_bytes/1e9:.2f} GB |', f"| conversion, wall time | {r['wall']:.1f} s |", f"| peak memory (RSS) | {r['peak_rss']/1e9:.2f} GB |",
        *[f'| {k}, alone | {v:.1f} s |' for k,v in apart.items()], f"| conversion / (read + quantize + write) | {r['ratio']:.2f} |", f"| source rate | {src_bytes/1e6/r['wall']:.0f} MB/s, {src_bytes/2e6/r['wall']:.0f} M weights/s |"]
    md = '\n'.join(['# Streaming a checkpoint through the CPU', '', '| what | measured |', '|---|---:|', *rows, '', 'The conversion also computes the sha256 of every file it wrote.', '', said(r)])
    print(md)
    if a.write: save('stream', r, md)

if __name__ == '__main__': main()

"""Quantizes a synthetic bf16 checkpoint of several GB and compares time and memory with what its parts need.

    python benchmarks/stream.py                 # 4 GB in the folder for temporary files; prints the table
    python benchmarks/stream.py --write         # also writes docs/results/stream.json and stream.md

The parts: reading every tensor once, quantizing pieces that are in memory, writing and flushing as many bytes. The
conversion runs in a process of its own, whose peak of memory is read from the kernel.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from common import about, said, save
from hlwq.checkpoint import ShardWriter, entry_nbytes
from hlwq.convert import row_spans
from hlwq.lloyd_max import codebook
from hlwq.quantize import quantize_rows
from hlwq.source import open_source

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

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--write', action='store_true'); p.add_argument('--gb', type=float, default=4.)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
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

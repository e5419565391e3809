"""Does a GPU write the same bytes as a CPU? Quantizes the same weights on both and compares codes and norms, then times.

    python benchmarks/device.py --write      # needs a CUDA device; writes docs/results/device.json and device.md
"""
import argparse, statistics, tempfile
from pathlib import Path

import torch
from common import about, said, save
from hlwq.checkpoint import file_sha256
from hlwq.convert import quantize_checkpoint
from hlwq.core import asset_path
from hlwq.lloyd_max import codebook
from hlwq.quantize import dequantize_rows, quantize_rows
from hlwq.source import open_source

def cases():
    "Real matrices of the embedded model, and synthetic ones with heavy tails, padding, extreme scales and zeros"
    with open_source(asset_path('tiny-moe-10m')) as src:
        for k,t in src.tensors.items():
            if len(t.shape) == 2 and min(t.shape) >= 64: yield 'trained', src.read(k)
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16): yield str(dtype), torch.randn(2048, 4096, generator=g).to(dtype)
    yield 'heavy tails', torch.randn(2048, 2048, generator=g) / torch.rand(2048, 2048, generator=g)
    yield 'padding', torch.randn(1000, 576, generator=g)
    for s in (1e-36, 1e-20, 1e20, 1e35): yield 'extreme scale', torch.randn(256, 512, generator=g)*s
    z = torch.randn(256, 512, generator=g); z[::3] = 0; yield 'zeros', z

def checkpoint_hashes(device):
    "sha256 of every file of the embedded model, quantized on a device"
    with tempfile.TemporaryDirectory() as d:
        quantize_checkpoint(asset_path('tiny-moe-10m'), Path(d)/'q5', device=device, progress=False)
        return {o.name: file_sha256(o) for o in sorted((Path(d)/'q5').iterdir())}

def seconds(f, n=7):
    f(); times = []
    for _ in range(n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); torch.cuda.synchronize()
        times.append(a.elapsed_time(b)/1e3)
    return statistics.median(times)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0]); p.add_argument('--write', action='store_true'); a = p.parse_args()
    same = {}
    for what, w in cases():
        for bits in (2, 3, 4, 5, 6, 8):
            for norm in ('gain', 'l2'):
                book = codebook('lloyd-max', bits)
                cpu, gpu = quantize_rows(w, book, norm), [t.cpu() for t in quantize_rows(w.cuda(), book, norm)]
                back = [dequantize_rows(*[t.to(d) for t in cpu], book, w.shape[1]).cpu() for d in ('cpu', 'cuda')]
                s = same.setdefault(what, dict(matrices=0, weights=0, packed_bytes_differ=0, norms_differ=0, decoded_differ=0))
                s['matrices'] += 1; s['weights'] += w.numel()
                s['packed_bytes_differ'] += (cpu[0] != gpu[0]).sum().item(); s['norms_differ'] += (cpu[1] != gpu[1]).sum().item()
                s['decoded_differ'] += (back[0] != back[1]).sum().item()
    whole = checkpoint_hashes('cpu') == checkpoint_hashes('cuda')
    w = torch.randn(16384, 8192, device='cuda').bfloat16()
    speed = {}
    for bits in (2, 3, 4, 5, 6, 8):
        book = codebook('lloyd-max', bits); q = quantize_rows(w, book)
        speed[bits] = dict(quantize=w.numel()/seconds(lambda: quantize_rows(w, book)), dequantize=w.numel()/seconds(lambda: dequantize_rows(*q, book, w.shape[1], torch.bfloat16)))
    r = dict(about(), gpu=torch.cuda.get_device_name(), checkpoint_identical=whole, comparisons=same, weights_per_second=speed)
    rows = [f"| {k} | {v['matrices']} | {v['weights']:,} | {v['packed_bytes_differ']} | {v['norms_differ']} | {v['decoded_differ']} |" for k,v in same.items()]
    md = '\n'.join(['# The same bytes on CPU and GPU', '', f"CPU against {r['gpu']}, the plain torch path on both, all widths, both norms.", '',
        '| weights | matrices x settings | weights | packed bytes that differ | norms that differ | decoded weights that differ |', '|---|---:|---:|---:|---:|---:|', *rows, '',
        f"The whole embedded checkpoint, quantized on both: files {'identical by sha256' if whole else 'DIFFER'}.", '', 'Speed of the plain torch path on this GPU, 16384 x 8192 bf16:', '', '| bits | quantize, G weights/s | dequantize, G weights/s |', '|---:|---:|---:|',
        *[f"| {b} | {v['quantize']/1e9:.2f} | {v['dequantize']/1e9:.2f} |" for b,v in speed.items()], '', said(r)])
    print(md)
    if a.write: save('device', r, md)

if __name__ == '__main__': main()

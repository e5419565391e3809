"""How fast one matrix is quantized on the CPU, against the one matmul with H128 that a plain version needs.

    python benchmarks/quantize.py            # prints the table
    python benchmarks/quantize.py --write    # also writes docs/results/quantize.json and quantize.md

Each number is the best of several rounds spread over the run; a round is the median of a few calls. The codes are
compared with those of a plain bucketize before anything is timed.
"""
import argparse

import torch
from common import about, median_seconds, said, save
from hlwq.hadamard import hadamard_matrix
from hlwq.lloyd_max import codebook
from hlwq.quantize import dequantize, quant_error, quantize

def checked(w, bits):
    "A quantized matrix whose codes agree with the textbook version but for ties"
    q, b = quantize(w, bits), w.view(-1, 128)
    z = b @ hadamard_matrix(128) * 128**.5 / b.norm(dim=1, keepdim=True)
    off = (torch.bucketize(z, codebook('lloyd-max', bits).boundaries).view_as(q.codes) != q.codes).float().mean().item()
    if off > 1e-5: raise SystemExit(f'{bits} bits: {off:.1e} of the codes differ from the plain version')
    return q, off

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--write', action='store_true'); p.add_argument('--rounds', type=int, default=5); p.add_argument('--size', type=int, default=4096)
    a = p.parse_args()
    w = torch.randn(a.size, a.size, generator=torch.Generator().manual_seed(0))
    H, n, bits = hadamard_matrix(128), w.numel(), (2, 3, 4, 5, 6, 8)
    qs = {b: checked(w, b) for b in bits}
    calls = {'matmul': lambda: w.view(-1, 128) @ H, **{f'quantize {b}': (lambda b=b: quantize(w, b)) for b in bits}, **{f'dequantize {b}': (lambda b=b: dequantize(qs[b][0])) for b in bits},
             'quantize 5 from bf16': lambda x=w.bfloat16(): quantize(x, 5)}
    rounds = {k: [] for k in calls}
    for _ in range(a.rounds):
        for k,f in calls.items(): rounds[k].append(median_seconds(f, 3))
    best = {k: min(v) for k,v in rounds.items()}
    r = dict(about(), shape=[a.size]*2, rounds=rounds, seconds=best, weights_per_second={k: n/v for k,v in best.items()},
             times_of_matmul={k: v/best['matmul'] for k,v in best.items()}, codes_that_differ={b: o for b,(_,o) in qs.items()},
             relative_error={b: quant_error(w, q) for b,(q,_) in qs.items()})
    rows = [f"| {k} | {v*1e3:.0f} | {n/v/1e6:.0f} | {v/best['matmul']:.2f} |" for k,v in best.items()]
    md = '\n'.join([f'# Quantizing one {a.size} x {a.size} float32 matrix on the CPU', '', '| what | ms | M weights/s | times of the matmul with H128 |', '|---|---:|---:|---:|', *rows, '',
        'Relative error on these Gaussian weights: ' + ', '.join(f'Q{b} {e:.4f}' for b,e in r['relative_error'].items()) + '.', '',
        'Codes that differ from matmul plus bucketize (ties of the matmul\'s rounding): ' + ', '.join(f'Q{b} {o:.0e}' for b,o in r['codes_that_differ'].items()) + '.', '', said(r)])
    print(md)
    if a.write: save('quantize', r, md)

if __name__ == '__main__': main()

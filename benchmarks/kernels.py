"""The kernels next to bfloat16, torch's int4 and NF4: products of one and many rows, experts, quantizing. Each is compared with a reference before it is timed.

    python benchmarks/kernels.py --precompile 16 --write       # needs a CUDA device; writes docs/results/kernels.json and kernels.md
    python benchmarks/kernels.py --only gemv,experts           # some of gemv, small, large, experts, quantize
    python benchmarks/kernels.py --tune                        # tries shapes of the one-token kernel; better ones go to hlwq/assets/gemv_shapes.json

A row is printed as soon as it is known, and --write writes after each part. --precompile N first compiles the kernels in N processes, which check their share of
the cases without timing anything: Triton keeps what it compiled on disk, but compiles one kernel at a time.
"""
import argparse, json, os, subprocess, sys, time
from itertools import groupby

import torch
from common import about, said, save
from hlwq import bench
from hlwq.core import BITS, HLWQError, asset_path

EXPERT_BITS = (5, 4)
DTYPES = dict(bfloat16=torch.bfloat16, float32=torch.float32)
TITLES = dict(gemv='One row, or one matrix at all widths', small='Some rows', large='Many rows', experts='Experts: one token, 8 of 64', quantize='Quantizing')

def groups(part):
    "Cases that share their matrices"
    return [list(g) for _,g in groupby(bench.PARTS[part], key=lambda c: c[:3])]

def work(parts):
    "(part, what) of everything that has a kernel to compile"
    for p in parts:
        if p == 'experts': yield from ((p, b) for b in EXPERT_BITS)
        elif p == 'quantize': yield from ((p, (d, b)) for d in DTYPES for b in BITS)
        else: yield from ((p, c) for c in bench.PARTS[p])

def check(part, what):
    "Runs what a part runs once, on one set of operands, and compares it with the reference"
    if part == 'experts': return bench.check_experts(bench.expert_sets(what, n_layers=1)[0])
    if part == 'quantize': return bench.check_quantize(bench.random_weights(4096, 16384, dtype=DTYPES[what[0]]), what[1])
    n, k, bits, M = what
    return bench.check_product(bench.operand_set(n, k, bits), bench.random_weights(M, k, seed=1, std=1))

def check_share(parts, share):
    "One process of --precompile: every N-th case; a case that fails does not keep the others from being compiled"
    i, n = map(int, share.split('/'))
    for part,what in list(work(parts))[i::n]:
        try: check(part, what)
        except HLWQError as e: print(f'{part} {what}: {e}', flush=True)

def precompile(parts, n):
    "Lets N processes fill Triton's cache"
    start, command = time.perf_counter(), [sys.executable, __file__, '--only', ','.join(parts), '--share']
    running = [subprocess.Popen([*command, f'{i}/{n}'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'}) for i in range(n)]
    for i,p in enumerate(running):
        told = p.communicate()[0].strip()
        if told or p.returncode: print(f"share {i}, exit {p.returncode}: {told[-1500:]}", flush=True)
    print(f'precompiled in {time.perf_counter()-start:.0f} s', flush=True)

def show(table):
    "A function that prints a row as the table has it"
    def f(row): print('  '.join(s or '-' for s in table([row])[1][0]), f"  ({row['note']})" if row.get('note') else '', flush=True)
    return f

def measure(part, limits):
    "Rows of a part and what failed"
    rows, failed = [], []
    def attempt(f, table, **kw):
        def keep(row): rows.append(row); show(table)(row)
        try: f(progress=keep, **kw)
        except HLWQError as e: failed.append(str(e)); print(f'FAILED {e}', flush=True)
    if part == 'experts':
        for b in EXPERT_BITS: attempt(bench.bench_experts, bench.expert_table, bits=[b], limits=limits)
    elif part == 'quantize':
        for b in BITS: attempt(bench.bench_quantize, bench.quantize_table, bits=[b])
    else:
        for cases in groups(part): attempt(bench.bench_kernels, bench.kernel_table, cases=cases, limits=limits)
    return rows, failed

def page(r):
    "The result in Markdown"
    lines, c, m = ['# Kernels on a GPU', '', f"On {r['gpu']['gpu']}: " + ', '.join(f'{k} {v}' for k,v in r['gpu'].items() if v and k != 'gpu') + '.'], r['ceilings'], r['parts']
    lines += ['', f"Ceilings measured in the same run: copy {c['copy_tb_s']:.2f} TB/s, bfloat16 matmul {c['matmul_tflops']:.0f} TFLOP/s, smallest graph node {c['node_us']:.2f} µs. "
        "Times are those of one CUDA graph in which each call has its own weights, cold in the cache; each kernel was compared with a reference first (error: relative, at most "
        f"{bench.TOLERANCE}). bf16: torch's linear on unquantized weights. int4: torch's _weight_int4pack_mm, groups of 128. Floor: codes and norms at the rate of a copy."]
    for p,rows in m.items():
        head, body = {'experts':bench.expert_table, 'quantize':bench.quantize_table}.get(p, bench.kernel_table)(rows)
        lines += ['', f'## {TITLES[p]}', '', '| ' + ' | '.join(head) + ' |', '|---|' + '---:|'*(len(head)-1), *('| ' + ' | '.join(row) + ' |' for row in body)]
    notes = list(dict.fromkeys(row['note'] for rows in m.values() for row in rows if row.get('note')))
    lines += ['', *(f'- {n}' for n in notes), *(f'- FAILED: {f}' for f in r['failed']), '', said(r)]
    return '\n'.join(lines)

def tune():
    "Tries shapes for the matrices of the first part, and keeps those that beat the rule by three percent"
    from hlwq.kernels.gemv import gemv_shape, shape_key
    path, name = asset_path('gemv_shapes.json'), torch.cuda.get_device_name()
    for n,k,bits,_ in bench.PARTS['gemv']:
        found, rule = bench.tune_gemv(n, k, bits), gemv_shape(-(-n//16), -(-k//128), bits, torch.device('cuda', 0))
        us = dict((c, u) for u,c in found)
        print(f"{n} x {k} at {bits} bits: rule {rule} {us.get(rule, float('nan')):.2f} us;", '  '.join(f'{c} {u:.2f}' for u,c in found[:5]), flush=True)
        if found[0][0] < .97*us.get(rule, float('inf')):
            table = json.loads(path.read_text())
            table.setdefault(name, {})[shape_key(-(-n//16)*16, -(-k//128)*128, bits)] = found[0][1]
            path.write_text(json.dumps(table, indent=1, sort_keys=True) + '\n')

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default=','.join(TITLES), help='parts, separated by commas'); p.add_argument('--write', action='store_true')
    p.add_argument('--precompile', type=int, default=0, metavar='N'); p.add_argument('--share', help=argparse.SUPPRESS); p.add_argument('--tune', action='store_true')
    a = p.parse_args()
    parts = a.only.split(',')
    if not set(parts) <= set(TITLES): p.error(f"--only {a.only}: need some of {', '.join(TITLES)}")
    try: bench.require_gpu()
    except HLWQError as e: sys.exit(str(e))
    if a.share: return check_share(parts, a.share)
    if a.tune: return tune()
    if a.precompile: precompile(parts, a.precompile)
    r = dict(about(), gpu=bench.machine(), ceilings=bench.ceilings(), parts={}, failed=[])
    print(r['gpu'], r['ceilings'], flush=True)
    for part in parts:
        print(f'== {part}', flush=True)
        rows, failed = measure(part, r['ceilings'])
        r['parts'][part] = rows; r['failed'] += failed
        if a.write: save('kernels', r, page(r))
    print(page(r))
    if r['failed']: sys.exit(1)

if __name__ == '__main__': main()

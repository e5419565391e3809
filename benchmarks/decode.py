"""What a token costs: models of real geometry with random weights, by the step of transformers, the same recorded, and ours; the kernels of each step with their times.

    python benchmarks/decode.py --precompile 8 --write          # needs a CUDA device; writes docs/results/decode.json and decode.md
    python benchmarks/decode.py --only qwen3.6 --bits 5,bf16    # one model, and some of its weights

A row is printed as soon as it is known, and --write saves after each, so that a run that is cut off keeps what it has. A part is one model with one kind of weights; parts that a run does
not measure stay in the file, each with its own command, machine and date. --precompile N first runs every part with four layers, in N processes that time nothing: Triton keeps what it
compiled on disk, but compiles one kernel at a time.
"""
import argparse, json, os, subprocess, sys, time

import common, torch
from common import about, said, save
from hlwq import bench, bench_decode
from hlwq.bench_decode import GEOMETRIES, decode_table, geometry, geometry_name, parse_weights, shares_table, weights_name
from hlwq.core import HLWQError

BITS = '5,4,bf16'
CASES = [(1, 128), (8, 128), (1, 2048), (1, 8192)]                        # texts at once, tokens of the prompt
SETTINGS = {}                                                  # for measure_decode

def parts(names, bits): return [(n, b) for n in names for b in bits]

def part_name(name, b): return f'{name}, {weights_name(b)}'

def run_share(todo, share):
    "One process of --precompile: every N-th part with four layers; one that fails does not keep the others from being compiled"
    i, n = map(int, share.split('/'))
    for name,b in todo[i::n]:
        try:
            model = bench_decode.random_model(geometry(name, 4), b)
            for rows,context in CASES: bench_decode.measure_decode(model, 'kernels', rows, context, new=4, repeat=1, profiled=False)
        except (HLWQError, RuntimeError) as e: print(f'{part_name(name, b)}: {e}', flush=True)
        model = None

def precompile(names, bits, n):
    "Lets N processes fill Triton's cache"
    start, command = time.perf_counter(), [sys.executable, __file__, '--only', ','.join(names), '--bits', bits, '--share']
    running = [subprocess.Popen([*command, f'{i}/{n}'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'}) for i in range(n)]
    for i,p in enumerate(running):
        told = p.communicate()[0].strip()
        if told or p.returncode: print(f"share {i}, exit {p.returncode}: {told[-1500:]}", flush=True)
    print(f'precompiled in {time.perf_counter()-start:.0f} s', flush=True)

def earlier():
    "Parts of an earlier run"
    path = common.RESULTS/'decode.json'
    return json.loads(path.read_text())['parts'] if path.exists() else {}

def show(row):
    "Prints a row as the table has it"
    print('  '.join(decode_table([row])[1][0]), flush=True)

def markdown(table): # titles, rows of strings
    head, body = table
    return ['', '| ' + ' | '.join(head) + ' |', '|---|---|---|' + '---:|'*(len(head)-3), *('| ' + ' | '.join(line) + ' |' for line in body)]

def page(r):
    "The result in Markdown"
    lines = ['# What a token costs', '', 'Models of published geometry with random weights: the speed is that of the real ones. Each writes after a prompt of random tokens, one text or several at once. eager: the step of transformers; graph: the same, recorded in a '
        'CUDA graph; kernels: the step of hlwq, recorded. Floor: the weights that a step needs and its cache, at the rate of a copy measured in the same run; of experts those that tokens reach that choose by chance. First token: the whole prompt; with our step and on a GPU by a recording, which a rounded length has from its third prompt on. The first of a length takes longer: [prompts](prompts.md). '
        'Kernels: launches a token, and the sum of their times in a profile, where kernels that start early count while they wait. Packed experts count among the products, with which they share a kernel.']
    for name in dict.fromkeys(p['model'] for p in r['parts'].values()):
        own = [p for p in r['parts'].values() if p['model'] == name]
        rows = [row for p in own for row in p['rows']]
        lines += ['', f'## {name}', *(markdown(decode_table(rows)) if rows else [])]
        if any(row['kernels'] for row in rows): lines += ['', 'Where the time of the kernels goes, microseconds a token:', *markdown(shares_table(rows))]
        lines += ['', *(f'- FAILED: {f}' for p in own for f in p['failed'])]
        for p in {said(p):p for p in own}.values():
            c, m = p['ceilings'], ', '.join(f'{k} {v}' for k,v in p['gpu'].items() if v and k != 'gpu')
            lines += ['', f"{said(p)} On {p['gpu']['gpu']}: {m}; copy {c['copy_tb_s']:.2f} TB/s."]
    return '\n'.join(lines)

def measure(name, b, r, write):
    "Measures one part, into r"
    part = r['parts'][part_name(name, b)] = dict(about(), model=name, gpu=bench.machine(), ceilings=r['ceilings'], rows=[], failed=[])
    def keep(row):
        part['rows'].append(row); show(row)
        if write: save('decode', r, page(r))
    bench_decode.bench_decode([name], [b], cases=CASES, progress=keep, limits=r['ceilings'], failed=part['failed'], **SETTINGS)
    for f in part['failed']: print(f'FAILED {f}', flush=True)
    if write: save('decode', r, page(r))
    return part['failed']

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default=','.join(GEOMETRIES), metavar='NAME,...', help='models, by the beginning of their names'); p.add_argument('--bits', default=BITS, metavar='N,...', help='widths, and bf16')
    p.add_argument('--write', action='store_true'); p.add_argument('--precompile', type=int, default=0, metavar='N'); p.add_argument('--share', help=argparse.SUPPRESS)
    a = p.parse_args()
    try:
        names, bits = [geometry_name(n) for n in a.only.split(',')], parse_weights(a.bits)
        bench_decode.require_gpu()
    except HLWQError as e: sys.exit(str(e))
    if a.share: return run_share(parts(names, bits), a.share)
    if a.precompile: precompile(names, a.bits, a.precompile)
    r, failed = dict(about(), ceilings=bench_decode.ceilings(), parts=earlier() if a.write else {}), []
    print(bench.machine(), r['ceilings'], flush=True)
    for name,b in parts(names, bits):
        print(f'== {part_name(name, b)}', flush=True)
        failed += measure(name, b, r, a.write)
    print(page(r))
    if failed: sys.exit(1)

if __name__ == '__main__': main()

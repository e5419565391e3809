"""What a cache of codes costs a token: attention over codes next to torch's over bfloat16, appends, memory, and a model with a long prompt.

    python benchmarks/kv_speed.py --precompile 16 --write      # needs a CUDA device; writes docs/results/kv-speed.json and kv-speed.md
    python benchmarks/kv_speed.py --only attention,append      # some of attention, append, memory, model

Each row is compared with its definition before it is timed, and printed as soon as it is known; --write saves after each part, and keeps parts that this run does not measure, with the line
that says where they come from. --precompile N first compiles the kernels in N processes, which
run their share of the cases once without timing anything: Triton keeps what it compiled on disk, but compiles one kernel at a time.
"""
import argparse, json, os, subprocess, sys, time

import common, torch
from common import about, said, save
from hlwq import bench, bench_kv
from hlwq.bench_kv import KV_TABLES, kv_cases
from hlwq.core import HLWQError

TITLES = dict(attention='Attention: one new token', append='Append: one token', memory='Memory: ten layers of two heads of 256', model='A model of Qwen3.6 geometry, 8 layers, 32 experts, 5 bits, random weights')
MODEL = {}                                                     # for model_row

def check(part, args):
    "Runs what a row runs once"
    if part == 'attention':
        from hlwq.kernels.attention import decode_attention
        (heads, kv_heads, d), n, widths = args
        q = bench.random_weights(1, heads, d, seed=99, std=1)
        for bits in widths:
            layer = bench_kv.filled_layer(n, kv_heads, d, bits)
            bench_kv.check_attention(layer, n, q)
        decode_attention(q, *bench_kv.exact_contents(layer, n), bench_kv.number(n), bench_kv.number(0), d**-.5)
    elif part == 'append':
        from hlwq.kernels.kv_attention import kv_append
        (_, kv_heads, d), bits = args
        one, layer = bench.random_weights(1, kv_heads, d), bench_kv.filled_layer(560, kv_heads, d, bits)
        kv_append(one, one, layer.halves, bench_kv.number(560))
    elif part == 'model': bench_kv.model_row(bench_kv.kv_model(), *args, context=4096, new=8, repeat=1)

def share_cases(parts):
    "What has a kernel to compile, one width at a time, the longest first"
    res = []
    for part,args in kv_cases(parts):
        if part == 'attention': res += [(part, (args[0], args[1], [w])) for w in args[2]]
        elif part != 'memory': res.append((part, args))
    return sorted(res, key=lambda c: ('model', 'append', 'attention').index(c[0]))

def check_share(parts, share):
    "One process of --precompile: every N-th case; one that fails does not keep the others from being compiled"
    i, n = map(int, share.split('/'))
    for part,args in share_cases(parts)[i::n]:
        try: check(part, args)
        except (HLWQError, RuntimeError) as e: print(f'{part} {args}: {str(e).splitlines()[0][:300]}', flush=True)

def precompile(parts, n):
    "Lets N processes fill Triton's cache"
    start, command = time.perf_counter(), [sys.executable, __file__, '--only', ','.join(parts), '--share']
    running = [subprocess.Popen([*command, f'{i}/{n}'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'}) for i in range(n)]
    for i,p in enumerate(running):
        told = p.communicate()[0].strip()
        if told or p.returncode: print(f"share {i}, exit {p.returncode}: {told[-1500:]}", flush=True)
    print(f'precompiled in {time.perf_counter()-start:.0f} s', flush=True)

def page(r):
    "The result in Markdown"
    c, m = r['ceilings'], ', '.join(f'{k} {v}' for k,v in r['gpu'].items() if v and k != 'gpu')
    lines = ['# What a cache of codes costs a token', '', f"On {r['gpu']['gpu']}: {m}. Copy {c['copy_tb_s']:.2f} TB/s, smallest graph node {c['node_us']:.2f} µs, in the same run.", '',
        "Times are those of one CUDA graph in which each call has a cache of its own, cold in the GPU's cache; each was compared with its definition first. cuDNN and flash: torch's attention over bfloat16 keys and values. "
        'In brackets: how many times faster than the faster of the two. Ours in 16 bits: the kernel that the step uses without kv_bits.']
    for part,rows in r['parts'].items():
        if not rows: continue
        head, body = KV_TABLES[part](rows)
        lines += ['', f'## {TITLES[part]}', '', r['by'][part], '', '| ' + ' | '.join(head) + ' |', '|---|' + '---:|'*(len(head)-1), *('| ' + ' | '.join(line) + ' |' for line in body)]
    notes = list(dict.fromkeys(n for row in r['parts'].get('attention', ()) for n in row['notes']))
    return '\n'.join([*lines, '', *(f'- {n}' for n in notes), *(f'- FAILED: {f}' for f in r['failed'])])

def earlier():
    "Parts of an earlier run, and where they come from"
    path = common.RESULTS/'kv-speed.json'
    old = json.loads(path.read_text()) if path.exists() else dict(parts={})
    return old['parts'], {p:old.get('by', {}).get(p) or said(old) for p in old['parts']}

def show(part, row): print('  '.join(KV_TABLES[part]([row])[1][0]), flush=True)

def measure(part, limits, failed):
    "Rows of a part"
    if part == 'model': model = bench_kv.kv_model()
    run = dict(attention=lambda *a: bench_kv.attention_row(*a, limits=limits), append=bench_kv.append_row, memory=bench_kv.memory_row, model=lambda bits: bench_kv.model_row(model, bits, **MODEL))[part]
    rows = []
    for _,args in kv_cases([part]):
        try: rows.append(run(*args))
        except (HLWQError, RuntimeError) as e:
            failed.append(f'{part} {args}: {str(e).splitlines()[0][:300]}')
            print(f'FAILED {failed[-1]}', flush=True)
            continue
        show(part, rows[-1])
        if torch.cuda.is_available(): torch.cuda.empty_cache()
    return rows

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default=','.join(TITLES), help='parts, separated by commas'); p.add_argument('--write', action='store_true')
    p.add_argument('--precompile', type=int, default=0, metavar='N'); p.add_argument('--share', help=argparse.SUPPRESS)
    a = p.parse_args()
    parts = a.only.split(',')
    if not set(parts) <= set(TITLES): p.error(f"--only {a.only}: need some of {', '.join(TITLES)}")
    try: bench.require_gpu()
    except HLWQError as e: sys.exit(str(e))
    if a.share: return check_share(parts, a.share)
    start = time.perf_counter()
    if a.precompile: precompile(parts, a.precompile)
    parts_before, by = earlier() if a.write else ({}, {})
    r = dict(about(), gpu=bench.machine(), ceilings=bench.ceilings(), parts={p:rows for p,rows in parts_before.items() if p not in parts}, by={p:o for p,o in by.items() if p not in parts}, failed=[])
    print(r['gpu'], r['ceilings'], flush=True)
    for part in parts:
        print(f'== {part}, after {time.perf_counter()-start:.0f} s', flush=True)
        r['parts'][part], r['by'][part] = measure(part, r['ceilings'], r['failed']), said(r)
        r['parts'] = {p:r['parts'][p] for p in TITLES if p in r['parts']}
        r['seconds'] = round(time.perf_counter()-start)
        if a.write: save('kv-speed', r, page(r))
    print(page(r))
    print(f'{time.perf_counter()-start:.0f} s')
    if r['failed']: sys.exit(1)

if __name__ == '__main__': main()

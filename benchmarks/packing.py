"""Measure how fast codes are packed and unpacked, for every bit width.

    python benchmarks/packing.py                 # prints the table
    python benchmarks/packing.py --write         # also writes docs/results/packing.json and packing.md

A machine that does other work at the same time only ever makes a measurement slower. So each number is the best of
several rounds, spread over the whole run; a round is the median of a few repetitions. All rounds are kept in the JSON.
"""
import argparse, json, platform, statistics, time
from datetime import datetime, timezone
from pathlib import Path

import torch
from hlwq.core import BITS
from hlwq.packing import pack_block_planes, pack_codes, unpack_block_planes, unpack_codes

DOCS = Path(__file__).resolve().parent.parent/'docs/results'
COLUMNS = dict(pack='pack_codes', unpack='unpack_codes', pack_blocks='pack_block_planes', unpack_blocks='unpack_block_planes')
NOTES = dict(pack='includes allocation of the output and the check that every code fits', unpack='includes allocation of the output',
    pack_blocks='codes lie as (128, n), output preallocated, no range check', unpack_blocks='output preallocated')

def median_seconds(f, repeats):
    "Median time of a few calls, after one that is not counted"
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter(); f(); times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

def workloads(n, bits):
    "The calls to time, checked against each other before any timing"
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed, codes_t = pack_codes(codes, bits), codes.view(128, -1)
    packed_t, back_t = pack_block_planes(codes_t, bits), torch.empty_like(codes_t)
    if not torch.equal(unpack_codes(packed, bits, n), codes): raise SystemExit(f'{bits} bits: unpack_codes(pack_codes(x)) is not x')
    if not torch.equal(unpack_block_planes(packed_t, bits), codes_t): raise SystemExit(f'{bits} bits: block planes do not come back')
    return dict(pack=lambda: pack_codes(codes, bits), unpack=lambda: unpack_codes(packed, bits, n),
        pack_blocks=lambda: pack_block_planes(codes_t, bits, out=packed_t), unpack_blocks=lambda: unpack_block_planes(packed_t, bits, out=back_t),
        copy=lambda: codes.clone())

def measure(n, rounds, repeats):
    "Rates in millions of codes per second: {bits: {call: [one number per round]}}"
    calls, rates = {b: workloads(n, b) for b in BITS}, {b: {} for b in BITS}
    for _ in range(rounds):
        for b,fs in calls.items():
            for name,f in fs.items(): rates[b].setdefault(name, []).append(round(n/median_seconds(f, repeats)/1e6, 1))
    return rates

def cpu_name():
    for line in Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []:
        if line.startswith('model name'): return line.split(':')[1].strip()
    return platform.processor() or platform.machine()

def markdown(r):
    rows = [f"| {b} | " + ' | '.join(f"{r['best'][b][c]:,.0f}" for c in (*COLUMNS, 'copy')) + ' |' for b in r['best']]
    return '\n'.join(['# Packing speed', '', f"Millions of codes per second, {r['n_codes']:,} codes, one code per byte in memory.", '',
        '| bits | ' + ' | '.join(f'`{o}`' for o in COLUMNS.values()) + ' | copy of the codes |', '|' + '---:|'*(len(COLUMNS) + 2), *rows, '',
        *[f'- `{COLUMNS[k]}`: {v}.' for k,v in NOTES.items()], '- Copy: `codes.clone()` of the same bytes, with allocation, for comparison.', '',
        f"Each number is the best of {r['rounds']} rounds spread over the run, a round being the median of {r['repeats']} calls: other work on the machine can only slow a round down.",
        'All rounds are in `packing.json`. The results are compared with each other before anything is timed.', '',
        f"Measured {r['date']} with `{r['command']}` on {r['machine']}; Python {r['python']}, torch {r['torch']}, {r['threads']} threads.", ''])

def main():
    p = argparse.ArgumentParser(description='pack and unpack speed for every bit width')
    p.add_argument('--codes', type=int, default=64*2**20, help='number of codes, a multiple of 1024 (default 64 Mi)')
    p.add_argument('--rounds', type=int, default=10); p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--write', action='store_true', help='write docs/results/packing.json and packing.md')
    a = p.parse_args()
    if a.codes < 1024 or a.codes % 1024: p.error(f'--codes: {a.codes}, need a multiple of 1024')
    rates = measure(a.codes, a.rounds, a.repeats)
    avx = 'AVX-512' if 'AVX512' in torch.backends.cpu.get_cpu_capability().upper() else torch.backends.cpu.get_cpu_capability()
    r = dict(command='python benchmarks/packing.py --write', date=datetime.now(timezone.utc).date().isoformat(), unit='million codes per second',
        machine=f'a {torch.get_num_threads()}-core {cpu_name()} ({avx})', python=platform.python_version(), torch=torch.__version__, threads=torch.get_num_threads(),
        n_codes=a.codes, rounds=a.rounds, repeats=a.repeats, notes=NOTES, best={b: {k: max(v) for k,v in o.items()} for b,o in rates.items()}, by_round=rates)
    print(markdown(r))
    if a.write:
        DOCS.mkdir(parents=True, exist_ok=True)
        (DOCS/'packing.json').write_text(json.dumps(r, indent=1) + '\n')
        (DOCS/'packing.md').write_text(markdown(r))

if __name__ == '__main__': main()

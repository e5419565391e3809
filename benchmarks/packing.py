"""How fast codes are packed and unpacked, for every bit width.

    python benchmarks/packing.py                 # prints the table
    python benchmarks/packing.py --write         # also writes docs/results/packing.json and packing.md

A machine that does other work at the same time only ever makes a measurement slower. So each number is the best of
several rounds, spread over the whole run; a round is the median of a few calls. All rounds are kept in the JSON, and
Ctrl-C ends the run with the rounds that are done. The results are compared with each other before anything is timed.
"""
import argparse, sys

import torch
from common import about, cpu_name, median_seconds, said, save
from hlwq.core import BITS
from hlwq.packing import pack_block_planes, pack_codes, unpack_block_planes, unpack_codes

COLUMNS = dict(pack='pack_codes', unpack='unpack_codes', pack_blocks='pack_block_planes', unpack_blocks='unpack_block_planes')
NOTES = dict(pack='includes allocation of the output and the check that every code fits', unpack='includes allocation of the output',
    pack_blocks='codes lie as (128, n), output preallocated, no range check', unpack_blocks='output preallocated')

def workloads(n, bits):
    "The calls to time, checked against each other"
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed, codes_t = pack_codes(codes, bits), codes.view(128, -1)
    packed_t, back_t = pack_block_planes(codes_t, bits), torch.empty_like(codes_t)
    if not torch.equal(unpack_codes(packed, bits, n), codes): raise SystemExit(f'{bits} bits: unpack_codes(pack_codes(x)) is not x')
    if not torch.equal(unpack_block_planes(packed_t, bits), codes_t): raise SystemExit(f'{bits} bits: block planes do not come back')
    return dict(pack=lambda: pack_codes(codes, bits), unpack=lambda: unpack_codes(packed, bits, n),
        pack_blocks=lambda: pack_block_planes(codes_t, bits, out=packed_t), unpack_blocks=lambda: unpack_block_planes(packed_t, bits, out=back_t),
        copy=lambda: codes.clone())

def measure(n, rounds, repeats):
    "Millions of codes per second: {bits: {call: [one number for each round]}}"
    calls = {b: workloads(n, b) for b in BITS}
    rates = {b: {name: [] for name in o} for b,o in calls.items()}
    try:
        for i in range(rounds):
            for b,o in calls.items():
                for name,f in o.items(): rates[b][name].append(round(n/median_seconds(f, repeats)/1e6, 1))
            print(f'round {i+1} of {rounds}: 5 bits, pack {rates[5]["pack"][-1]:.0f}, unpack {rates[5]["unpack"][-1]:.0f} M codes/s', file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if not rates[8]['copy']: raise
    return rates

def markdown(r):
    rows = [f"| {b} | " + ' | '.join(f'{o[c]:,.0f}' for c in (*COLUMNS, 'copy')) + ' |' for b,o in r['best'].items()]
    return '\n'.join(['# Packing speed', '', f"Millions of codes per second, {r['n_codes']:,} codes, one code per byte in memory.", '',
        '| bits | ' + ' | '.join(f'`{o}`' for o in COLUMNS.values()) + ' | copy of the codes |', '|' + '---:|'*(len(COLUMNS) + 2), *rows, '',
        *[f'- `{COLUMNS[k]}`: {v}.' for k,v in NOTES.items()], '- Copy: `codes.clone()` of the same bytes, with allocation, for comparison.', '',
        f"Each number is the best of {r['rounds']} rounds spread over the run, a round being the median of {r['repeats']} calls: other work on the machine can only slow a round down.",
        'All rounds are in `packing.json`. The results are compared with each other before anything is timed.', '', said(r)])

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--codes', type=int, default=64*2**20, help='number of codes, a multiple of 1024 (default 64 Mi)')
    p.add_argument('--rounds', type=int, default=8); p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--write', action='store_true', help='write docs/results/packing.json and packing.md')
    a = p.parse_args()
    if a.codes < 1024 or a.codes % 1024: p.error(f'--codes: {a.codes}, need a multiple of 1024')
    rates = measure(a.codes, a.rounds, a.repeats)
    done, vectors = len(rates[8]['copy']), torch.backends.cpu.get_cpu_capability().replace('AVX512', 'AVX-512')
    r = dict(about(), unit='million codes per second', n_codes=a.codes, rounds=done, repeats=a.repeats, notes=NOTES,
        best={b: {k: max(v) for k,v in o.items()} for b,o in rates.items()}, by_round=rates)
    r['machine'] = f'{torch.get_num_threads()}-core {cpu_name()} ({vectors})'
    print(markdown(r))
    if a.write: save('packing', r, markdown(r))

if __name__ == '__main__': main()

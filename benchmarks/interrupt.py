"""Kills a conversion at many points, resumes it, and compares every file with an undisturbed run by sha256.

    python benchmarks/interrupt.py --write     # minutes; also writes docs/results/interrupt.json and interrupt.md

The points are just before and just after each call that changes the disk (fsync, rename, replace, unlink, mkdir) and each
piece of work (a quantized piece, a hashed file); see tests/kill_at.py. Every STRIDE-th point is tried, and the last forty all.
"""
import argparse, json, subprocess, sys, tempfile
from pathlib import Path

from common import about, said, save

ROOT = Path(__file__).resolve().parent.parent

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--write', action='store_true'); p.add_argument('--stride', type=int, default=12)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        out = subprocess.run([sys.executable, ROOT/'tests/kill_at.py', ROOT/'hlwq/assets/tiny-moe-10m', d+'/work', 'quantize', str(a.stride)], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    tries = json.loads(out)
    kinds = {}
    for t in tries: kinds.setdefault(t['point'], []).append(not t['differ'] and t['whole'])
    r = dict(about(), model='tiny-moe-10m', points=len(tries), identical=sum(map(all, zip((not t['differ'] for t in tries), (t['whole'] for t in tries)))), by_point={k: [sum(v), len(v)] for k,v in kinds.items()})
    md = '\n'.join(['# Killed at many points, and resumed', '', f"{r['identical']} of {r['points']} interrupted conversions of the embedded model, killed with SIGKILL and started again, gave files identical by sha256 to those of an undisturbed run.", '',
        '| killed | identical | of |', '|---|---:|---:|', *[f'| {k} | {n} | {m} |' for k,(n,m) in r['by_point'].items()], '', said(r)])
    print(md)
    if a.write: save('interrupt', r, md)

if __name__ == '__main__': main()

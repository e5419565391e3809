"""Two processes that make one checkpoint, against one process with one thread and with two, from memory to memory.

    python benchmarks/ranks.py --write     # minutes; also writes docs/results/ranks.json and ranks.md

Each round runs the three commands one after the other; the ratios are medians over rounds of one round's times. Source and output lie in
a file system in memory (--folder), so that the source is in the page cache and no disk is measured. Two times are told: that of the
conversion, as the first process measures it from its first look at the source to the last rename, and that of the whole command, with
starting Python and torch and, for two processes, torchrun.
"""
import argparse, json, os, resource, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from safetensors.torch import save_file
from common import about, said, save

ROOT = Path(__file__).resolve().parent.parent
WAYS = {'one process, 1 thread': (1, 1), 'one process, 2 threads': (1, 2), 'two processes, 1 thread each': (2, 1)}

def write_source(folder, layers, hidden=2048):
    "A dense model of random weights: a file for every layer, as large as the others"
    folder.mkdir(parents=True)
    gen, index = torch.Generator().manual_seed(0), {}
    for i in range(layers):
        shapes = {'self_attn.q_proj': (hidden, hidden), 'self_attn.o_proj': (hidden, hidden), 'mlp.gate_proj': (3*hidden, hidden), 'mlp.up_proj': (3*hidden, hidden), 'mlp.down_proj': (hidden, 3*hidden)}
        tensors = {f'model.layers.{i}.{k}.weight': (.02*torch.randn(s, generator=gen)).bfloat16() for k,s in shapes.items()}
        name = f'model-{i+1:05d}-of-{layers:05d}.safetensors'
        save_file(tensors, folder/name, metadata={'format': 'pt'})
        index |= dict.fromkeys(tensors, name)
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=index)))
    (folder/'config.json').write_text(json.dumps(dict(model_type='llama', architectures=['LlamaForCausalLM'], hidden_size=hidden, num_hidden_layers=layers)))

def run(src, out, processes, threads, shard):
    "Seconds of the conversion, of the whole command, and of processors, over all of its processes"
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)] if processes > 1 else []
    def used(): u = resource.getrusage(resource.RUSAGE_CHILDREN); return u.ru_utime + u.ru_stime
    start, before = time.perf_counter(), used()
    r = subprocess.run([sys.executable, *launch, '-m', 'hlwq.convert', str(src), str(out), '--device', 'cpu', '--max-shard-size', str(shard), '--json'], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    whole = time.perf_counter() - start
    return json.loads(r.stdout)['seconds']['total'], whole, used() - before

def same(a, b): return sorted(os.listdir(a)) == sorted(os.listdir(b)) and all((a/n).read_bytes() == (b/n).read_bytes() for n in os.listdir(a))

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--write', action='store_true'); p.add_argument('--rounds', type=int, default=5); p.add_argument('--layers', type=int, default=16, help='of 92 MB each')
    p.add_argument('--hidden', type=int, default=2048); p.add_argument('--folder', default='/dev/shm' if os.access('/dev/shm', os.W_OK) else None)
    a = p.parse_args()
    rounds, identical = [], True
    with tempfile.TemporaryDirectory(dir=a.folder) as d:
        d = Path(d)
        write_source(d/'src', a.layers, a.hidden)
        files = list((d/'src').glob('*.safetensors'))
        nbytes = sum(f.stat().st_size for f in files)
        shard = nbytes//len(files)//2                                          # a file of the output for each of the source, and room
        for i in range(a.rounds + 1):                                          # the first round reads everything once and does not count
            load, got = os.getloadavg()[0], {}
            turn = list(WAYS)[i % len(WAYS):] + list(WAYS)[:i % len(WAYS)]           # none is always first
            for way, (n, t) in ((w, WAYS[w]) for w in turn):
                got[way] = run(d/'src', d/way.replace(' ', '-'), n, t, shard)
            outs = [d/w.replace(' ', '-') for w in WAYS]
            identical &= all(same(outs[0], o) for o in outs[1:])
            for o in outs: shutil.rmtree(o)
            print(i, f'load {load:.1f}', {w: ' '.join(f'{x:.2f}' for x in o) for w,o in got.items()}, file=sys.stderr, flush=True)
            if i or not a.rounds: rounds.append(dict(load=load, **got))
    two = 'two processes, 1 thread each'
    def ratio(way, k): return statistics.median(r[two][k]/r[way][k] for r in rounds)
    rows = [dict(way=w, seconds=statistics.median(r[w][0] for r in rounds), whole=statistics.median(r[w][1] for r in rounds), cpu=statistics.median(r[w][2] for r in rounds),
        ratio=ratio(w, 0), ratio_whole=ratio(w, 1)) for w in WAYS]
    r = dict(about(), source_bytes=nbytes, shards=len(files), cores=len(os.sched_getaffinity(0)), load=[x['load'] for x in rounds], rounds=rounds, rows=rows, identical=identical)
    md = '\n'.join(['# One checkpoint, two processes', '', f"{nbytes/1e9:.2f} GB of bfloat16 weights in {len(files)} files, to 5 bits, on {r['cores']} cores, from a file system in memory to the same; medians of {len(rounds)} rounds, in each of which the three ran one after the other. "
        f"The files of the three are {'identical' if identical else '**NOT identical**'}. The last two columns: two processes over this way. The load of the machine before each round, other work included, was {', '.join(f'{x:.1f}' for x in r['load'])}" + ('; other work shares the processors, which favours two processes over one, so a quiet machine should be asked too.' if statistics.median(r['load']) > 1.5*r['cores'] else '.'), '',
        '| how | conversion, s | whole command, s | CPU seconds of it | two processes / this: conversion | whole command |', '|---|---:|---:|---:|---:|---:|',
        *[f"| {o['way']} | {o['seconds']:.2f} | {o['whole']:.2f} | {o['cpu']:.2f} | {o['ratio']:.2f} | {o['ratio_whole']:.2f} |" for o in rows], '', said(r)])
    print(md)
    if a.write: save('ranks', r, md)

if __name__ == '__main__': main()

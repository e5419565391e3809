"""What caches of experts would hit: routing of real models on texts, recorded and run through every policy at every size, next to Belady.

    python benchmarks/cache_policy.py --model DIR [DIR ...] --text FILE [FILE ...] --write [--tokens 4096]

Each text is read in windows; the model also writes a text of its own, and reads the first text packed at five bits. Texts are named by file name and sha256, and are not copied.
A made-up trace of the shape of a large model follows, and is called synthetic wherever it appears. Writes docs/results/cache-policy.json and .md.
"""
import argparse, hashlib, time
from pathlib import Path

import numpy as np
import torch
import transformers
from common import about, said, save
from hlwq.cache_sim import predicted_tokens_per_second, record_routing, reuse_distances, simulate_cache, synthetic_trace
from hlwq.evaluate import load_text_tokens
from hlwq.hf import HLWQConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

POLICIES = ('lru', 'lfu', 'lfru', 'pinned', 'random', 'belady')
LARGE = dict(layers=40, n_experts=256, top_k=8)                # the shape of Qwen3.6-35B-A3B
EXPERT_BYTES, LINK, RESIDENT = 2_015_232, 25e9, .015           # five bits; PCIe 4 x16; an assumption

def name(f): return f.stem if f.stem not in ('test', 'valid') else f'{f.parent.name}-{f.stem}'

@torch.inference_mode()
def read(model, tokens, window, text):
    with record_routing(model) as r:
        for part in tokens.split(window): model(part[None])
    return r.trace(text=text)

@torch.inference_mode()
def write(model, starts, n):
    "The model continues some beginnings, drawing at random"
    torch.manual_seed(0)
    with record_routing(model) as r:
        for s in starts: model.generate(s[None], attention_mask=torch.ones_like(s[None]), max_new_tokens=n, do_sample=True, temperature=1., top_k=0, eos_token_id=None, pad_token_id=0)
    return r.trace(text='written by the model')

def traces(path, texts, a):
    model, tok = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
    tokens = {k:load_text_tokens(f, tok, a.tokens) for k,f in texts.items()}
    found = {k:read(model, t, a.window, k) for k,t in tokens.items()}
    first = next(iter(tokens))
    found['written by the model'] = write(model, [t[a.window*i:a.window*i+32] for t in tokens.values() for i in range(2)], 192)
    packed = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=HLWQConfig(bits=5)).eval()
    five = read(packed, tokens[first], a.window, first)
    same = np.mean([len(set(x) & set(y))/five.top_k for x,y in zip(five.ids.reshape(-1, five.top_k).tolist(), found[first].ids.reshape(-1, five.top_k).tolist())])
    return found | {f'{first}, packed at 5 bits':five}, float(same), five.meta['expert_bytes']

def reuse(t):
    d = reuse_distances(t)
    back, n = d[d > 0], d.size
    return dict(next_token=float((d == 1).sum()/n), within_8=float(((d > 0) & (d <= 8)).sum()/n), median=int(np.median(back)), tokens_apart={int(k):float(v/n) for k,v in zip(*np.unique(np.minimum(back, 33), return_counts=True))})

def row(s, **more): return dict(policy=s.policy, slots=s.slots, hit_rate=s.hit_rate, cold_hit_rate=s.cold.hit_rate, hits=s.hits, misses=s.misses, reloads=s.reloads, **more)

def rates(t, profile, sizes): return [row(simulate_cache(t, c, p, profile=profile)) for p in POLICIES for c in sizes]

def table(rows, sizes):
    at = {(r['policy'], r['slots']):r for r in rows}
    return ['| policy | ' + ' | '.join(f'{c} slots' for c in sizes) + ' |', '|---|' + '---:|'*len(sizes)] + [f'| {p} | ' + ' | '.join(f"{100*at[p, c]['hit_rate']:.1f}" for c in sizes) + ' |' for p in POLICIES]

def one_model(path, texts, a):
    start = time.perf_counter()
    found, same, nbytes = traces(path, texts, a)
    t, (first, second) = next(iter(found.values())), list(found)[:2] if len(found) > 1 else [next(iter(found))]*2
    sizes = [c for c in range(t.top_k, t.n_experts + 1) if c % 2 == t.top_k % 2]
    parts = {k:dict(tokens=len(v), reuse=reuse(v), profile=second if k.startswith(first) else first, rows=rates(v, found[second if k.startswith(first) else first], sizes)) for k,v in found.items()}
    r = dict(model=Path(path).name, source='recorded', layers=t.n_layers, n_experts=t.n_experts, top_k=t.top_k, sizes=sizes, same_choice_at_5_bits=same, expert_bytes_at_5_bits=nbytes, seconds=round(time.perf_counter()-start, 1), texts=parts)
    md = [f"## {r['model']}: real routing", '', f"{t.n_layers} layers of {t.n_experts} experts, {t.top_k} for each token. Hits of all requests after the first 64 tokens, in per cent. Packed at five bits, the model chooses the same expert in {same:.1%} of all cases."]
    for k,v in parts.items():
        u = v['reuse']
        md += ['', f"**{k}**, {v['tokens']:,} tokens. Of all experts {u['next_token']:.0%} were used by the token before, {u['within_8']:.0%} by one of the last eight; median distance {u['median']}. `pinned` takes its experts from *{v['profile']}*.", '', *table(v['rows'], sizes)]
    return r, md

def half(models):
    "Hit rates with half of all experts resident, over the recorded texts of all models, packed ones apart"
    rows = [r for m in models for k,v in m['texts'].items() if 'packed' not in k for r in v['rows'] if 2*r['slots'] == m['n_experts']]
    return {p:sorted(r['hit_rate'] for r in rows if r['policy'] == p) for p in POLICIES}

def large():
    t, sizes = synthetic_trace(600, **LARGE), (8, 16, 32, 64, 128, 192)
    stats = [simulate_cache(t, c, p, profile=synthetic_trace(1200, **LARGE)[600:]) for p in POLICIES for c in sizes]
    rows = [row(s, bytes_per_token=s.bytes_per_token(EXPERT_BYTES), tokens_per_second=predicted_tokens_per_second(s, EXPERT_BYTES, LINK, RESIDENT)) for s in stats]
    lru = [r for r in rows if r['policy'] == 'lru']
    md = ['## Synthetic routing in the shape of a large model', '', f"{t.n_layers} layers of {t.n_experts} experts, {t.top_k} for each token, {len(t)} tokens: popularity by Zipf's law with exponent {t.meta['zipf']}, and {t.meta['reuse']:.0%} of the experts kept from token to token. Made up: it shows what the simulator gives, and says nothing about any model.",
          '', *table(rows, sizes), '', f"The same for LRU in bytes and time, with experts of {EXPERT_BYTES:,} bytes, {LINK/1e9:g} GB/s and an assumed {1e3*RESIDENT:g} ms for all else:", '', '| | ' + ' | '.join(f'{c} slots' for c in sizes) + ' |', '|---|' + '---:|'*len(sizes),
          '| MB a token | ' + ' | '.join(f"{r['bytes_per_token']/1e6:.0f}" for r in lru) + ' |', '| tokens a second, predicted | ' + ' | '.join(f"{r['tokens_per_second']:.0f}" for r in lru) + ' |']
    return dict(source='synthetic', **LARGE, sizes=sizes, meta=t.meta, expert_bytes=EXPERT_BYTES, link_bytes_per_s=LINK, resident_seconds=RESIDENT, rows=rows), md

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', nargs='+', required=True); p.add_argument('--text', nargs='+', type=Path, required=True)
    p.add_argument('--tokens', type=int, default=4096); p.add_argument('--window', type=int, default=512); p.add_argument('--write', action='store_true')
    a = p.parse_args()
    transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
    texts = {name(f):f for f in a.text}
    models, pages = zip(*(one_model(m, texts, a) for m in a.model))
    (made_up, page), mean = large(), {p:sum(v)/len(v) for p,v in half(models).items()}
    n = len(half(models)['lru'])
    r = about() | dict(command=f"python benchmarks/cache_policy.py --model {' '.join(Path(m).name for m in a.model)} --text {' '.join(f.name if name(f) == f.stem else f'{f.parent.name}/{f.name}' for f in a.text)} --tokens {a.tokens}")
    r['versions']['transformers'] = transformers.__version__
    r |= dict(half_resident=mean, window=a.window, texts={k:dict(file=f.name, sha256=hashlib.sha256(f.read_bytes()).hexdigest()) for k,f in texts.items()}, models=models, synthetic=made_up)
    md = ['# Which experts stay: policies on recorded routing', '', f"A request is one expert of one token in one layer; a hit needs no copy. Each layer has its own slots. Texts are read in windows of {a.window} tokens, all tokens of a window at once, and replayed token by token through caches that stay filled from window to window.",
          'Belady knows the future and is a ceiling, not a policy. Real models and the made-up trace stand apart.', '',
          f"With half of all experts resident, mean of {n} recorded traces: " + ', '.join(f'{p} {100*v:.1f} %' for p,v in mean.items()) + '. These models are small and have 16 experts; what holds for hundreds of them is for a recording of such a model to say.', '', *[l for page in pages for l in (*page, '')], *page, '', said(r)]
    print('\n'.join(md))
    if a.write: save('cache-policy', r, '\n'.join(md))

"""What a quantized KV cache costs: divergence from the exact cache, and perplexity, for tokens that are written far behind a prompt.

    python benchmarks/kv.py --model DIR [DIR ...] --text FILE [FILE ...] --windows 2 --long 2 --write

Each window has 1,024 tokens. The first 512 are a prompt that is read exactly. Each later token sees codes of all that is older than the newest 128 to 255 tokens
and younger than the first 4, as if it had been fed alone: tokens are fed in chunks that end where a block is completed, and within such a chunk the blocks that a token sees
are the same (`--one-by-one` feeds them alone and shows it). Compared are the predictions of tokens 513 to 1,023 with those of the same model, fed the same way, with an exact cache.

Models without query norms are measured a second time with outliers: per KV head four channels of the keys are scaled by 16 and the queries by 1/16 (two rotary pairs, in the weights), and
+-100 is added to two channels of every key that the cache is given. Neither changes the function. `--long N` adds N windows of 4,096 tokens to those without, of which the last 1,024 are compared,
with and without scales that know the size of the queries; that is measured on 512 other tokens of the first text.

    python benchmarks/kv.py --padding 200 --model DIR [DIR ...] --text FILE [FILE ...] --windows 1 --write

compares instead the same windows with and without so many tokens of padding on their left, and puts that beside the other results. Keys of padding are part of the statistics of the blocks that they share.
"""
import argparse, copy, hashlib, inspect, json, time, warnings
from math import exp
from pathlib import Path

import torch
from common import RESULTS, about, save, said
from hlwq.core import HLWQWarning, human_bytes
from hlwq.evaluate import cut_windows, estimate, load_text_tokens
from hlwq.kv_cache import HLWQCache, HLWQLayer, _geometry, blocks_of, query_rms
from hlwq.kv_codec import BLOCK_TOKENS, block_nbytes

WIDTHS = ((4, 4), (3, 3), (3, 2), (2, 2))
TARGETS = {('SmolLM2-135M-Instruct', False):{'K4V4':.0055, 'K3V3':.027, 'K3V2':.053, 'K2V2':.18}, ('SmolLM2-135M-Instruct', True):{'K4V4':.010, 'K2V2':.20},
    ('tiny-moe-30m', False):{'K4V4':.0008, 'K3V3':.003, 'K3V2':.007, 'K2V2':.013}}

def load(path):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

def call(model, ids, cache, pad=0):
    name = 'cache' if 'cache' in inspect.signature(model.forward).parameters else 'past_key_values'
    if not pad: return model(ids, use_cache=True, **{name:cache}).logits
    past, n = cache.get_seq_length(), cache.get_seq_length() + ids.shape[1]
    mask, positions = torch.ones(1, n, dtype=torch.int64), (torch.arange(past, n) - pad).clamp_min(0)
    mask[:, :pad] = 0
    return model(ids, attention_mask=mask, position_ids=positions[None], use_cache=True, **{name:cache}).logits

@torch.no_grad()
def add_outliers(model, factor=16., offset=100., seed=0):
    "Same function, other keys; returns what is to be added to the keys of each head"
    c, g = model.config, torch.Generator().manual_seed(seed)
    d, kv = c.head_dim, c.num_key_value_heads
    offsets = {}
    for i,layer in enumerate(model.model.layers):
        scale = torch.ones(kv, d)
        offsets[i] = torch.zeros(kv, 1, d)
        for h in range(kv):
            pairs = torch.randperm(d//2, generator=g)[:2]
            scale[h, torch.cat([pairs, pairs + d//2])] = factor
            offsets[i][h, 0, torch.randperm(d, generator=g)[:2]] = torch.tensor([offset, -offset])
        a = layer.self_attn
        a.k_proj.weight *= scale.view(-1, 1)
        a.q_proj.weight /= scale.repeat_interleave(c.num_attention_heads//kv, 0).view(-1, 1)
    return offsets

def with_offsets(cache, offsets):
    "The cache is given keys with a constant added, which no softmax sees"
    for i,layer in enumerate(cache.layers):
        if i in offsets: layer.update = (lambda f, o: lambda k, v, *args, **kwargs: f(k + o, v, *args, **kwargs))(layer.update, offsets[i])
    return cache

def continued(cache, exact):
    "Fills a cache with what an exact one holds"
    for i,o in enumerate(exact.layers):
        if isinstance(o, HLWQLayer): cache.layers[i].update(*o.decode())
        else: cache.layers[i] = copy.deepcopy(o)
    return cache

def chunks(start, end, one_by_one=False):
    while start < end:
        stop = start + 1 if one_by_one else min(end, 4 + 128 + 128*(blocks_of(start) + 1))
        yield start, stop
        start = stop

@torch.inference_mode()
def logits_of(model, ids, cache, start, one_by_one=False, pad=0):
    return torch.cat([call(model, ids[:, a:b], cache, pad) for a,b in chunks(start, ids.shape[1], one_by_one)], 1)[0, :-1]

def score(logits, ids, reference=None): # mean NLL, KL, agreement
    rows = []
    for q,t,p in zip(logits.split(128), ids.split(128), (reference if reference is not None else logits).split(128)):
        q, p = q.log_softmax(-1), p.log_softmax(-1)
        rows.append(torch.stack([-q.gather(1, t[:, None])[:, 0].double(), (p.exp()*(p - q)).sum(-1).double(), (p.argmax(-1) == q.argmax(-1)).double()], 1))
    return torch.cat(rows).mean(0)

def variants(widths, queries, norms):
    res = {f'K{k}V{v}':dict(k_bits=k, v_bits=v) for k,v in widths}
    if queries: res |= {f'K{k}V{v}, queries known':dict(k_bits=k, v_bits=v, query_rms=queries) for k,v in widths if k == v}
    if norms: res['K4V4, one norm a key'] = dict(k_bits=4, v_bits=4, plain=True)
    return res

def make(config, k_bits, v_bits, query_rms=None, plain=False):
    cache = HLWQCache(config, k_bits, v_bits, query_rms=query_rms)
    for o in cache.quantized: o.channels = not plain
    return cache

@torch.inference_mode()
def measure(model, windows, start, found, offsets=(), one_by_one=False, pad=0):
    "(windows, 3) for each variant and for the exact cache"
    rows = {k:[] for k in ('exact', *found)}
    for ids in windows[:, None]:
        ids, at = torch.nn.functional.pad(ids, (pad, 0)), start + pad
        exact = HLWQCache(model.config, 16, 16)
        call(model, ids[:, :at], exact, pad)
        reference, t = logits_of(model, ids, copy.deepcopy(exact), at, pad=pad), ids[0, at+1:]
        rows['exact'].append(score(reference, t))
        for k,how in found.items():
            cache = continued(with_offsets(make(model.config, **how), offsets), exact)
            rows[k].append(score(logits_of(model, ids, cache, at, one_by_one, pad), t, reference))
    return {k:torch.stack(v) for k,v in rows.items()}

@torch.inference_mode()
def token_seconds(model, ids, make_cache, n=16):
    "Median time of one more token behind these"
    cache, times = make_cache(), []
    call(model, ids, cache)
    for _ in range(n + 2):
        start = time.perf_counter()
        call(model, ids[:, -1:], cache)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[n//2]

def big_memory():
    "A Qwen3.5 of 35 billion weights: ten layers of two heads of 256; arithmetic alone"
    from transformers import Qwen3_5MoeTextConfig
    config = Qwen3_5MoeTextConfig(num_key_value_heads=2, head_dim=256, max_position_embeddings=262_144)
    return [dict(cache=f'K{k}V{v}', tokens=n, nbytes=(m := HLWQCache(config, k, v).memory(n)).nbytes, baseline=m.baseline, ratio=m.ratio) for k,v in WIDTHS for n in (1024, 2048, 8192, 32_768, 262_144)]

def bits_per_number(config, k_bits, v_bits, plain=False, **_):
    heads, k, v = _geometry(config)
    return 8*(block_nbytes(k, k_bits, not plain) + block_nbytes(v, v_bits, False))/(BLOCK_TOKENS*(k + v))

def summary(rows, found, config):
    exact, res = rows['exact'], {}
    for k,r in rows.items():
        ratio, kl, top1, ppl = estimate(r[:, 0] - exact[:, 0]), estimate(r[:, 1]), estimate(r[:, 2]), estimate(r[:, 0])
        res[k] = dict(perplexity=exp(ppl), ratio=exp(ratio), ratio_error=exp(ratio)*ratio.error, kl=float(kl), kl_error=kl.error, top1=float(top1), top1_error=top1.error,
            kl_windows=[round(float(o), 6) for o in r[:, 1]], bits=16. if k == 'exact' else bits_per_number(config, **found[k]))
    return res

def run(path, name, args, outliers):
    "One model: short windows, and long ones if asked for"
    from transformers import AutoTokenizer
    model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    tokens = {f.stem if f.stem not in ('test', 'valid') else f'{f.parent.name}-{f.stem}':load_text_tokens(f, tokenizer, 40_000) for f in args.text}
    offsets = add_outliers(model) if outliers else {}
    queries = query_rms(model, next(iter(tokens.values()))[None, -512:]) if args.long else None
    n = args.windows*(1 if model.config.num_hidden_layers > 10 else 2)
    short, found = torch.cat([cut_windows(t, 1024)[:n] for t in tokens.values()]), variants(WIDTHS, queries, True)
    res = [dict(model=name, outliers=outliers, window=1024, start=512, texts={k:n for k in tokens}, tokens=511*len(short),
        rows=summary(measure(model, short, 512, found, offsets, args.one_by_one), found, model.config))]
    if not outliers:
        from transformers import DynamicCache
        res[0]['token_seconds'] = {k:token_seconds(model, short[:1], f) for k,f in {'DynamicCache':lambda: DynamicCache(config=model.config), 'K4V4':lambda: HLWQCache(model.config)}.items()}
    if args.long and not outliers and model.config.max_position_embeddings >= 4096:
        windows = torch.cat([cut_windows(t, 4096)[:1] for t in list(tokens.values())[:args.long]])
        found = variants(((4, 4), (3, 3), (2, 2)), queries, False)
        res.append(res[0] | dict(window=4096, start=3072, texts={k:1 for k in list(tokens)[:args.long]}, tokens=1023*len(windows), rows=summary(measure(model, windows, 3072, found, offsets), found, model.config)))
    return res

def run_padded(path, name, args):
    "The same windows with and without padding on their left"
    from transformers import AutoTokenizer
    model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    windows, found = torch.cat([cut_windows(load_text_tokens(f, tokenizer, 40_000), 1024)[:args.windows] for f in args.text]), variants(((4, 4), (3, 2)), None, False)
    return [dict(model=name, padding=pad, window=1024, start=512, tokens=511*len(windows), rows=summary(measure(model, windows, 512, found, pad=pad), found, model.config)) for pad in (0, args.padding)]

def judged(results):
    "Targets beside what was measured"
    res = []
    for r in results:
        if r['window'] != 1024: continue
        res += [dict(model=r['model'], outliers=r['outliers'], what=k, target=t, kl=r['rows'][k]['kl'], reached=r['rows'][k]['kl'] <= t) for k,t in TARGETS.get((r['model'], r['outliers']), {}).items()]
    return res

def markdown(r):
    lines = ['# Quality of a quantized KV cache', '', 'Divergence from the same model with an exact cache, for tokens far behind a prompt. Newest 128 to 255 tokens and the first 4 in 16 bits, everything else as codes; bits count gains, means and scales.',
        '± is one standard error over windows of text, few of which there are. It says how much texts differ, not how well methods can be told apart: moving the borders of blocks alone moves KL by up to 15 %, so differences below 20 % mean nothing.', '']
    for o in r['results']:
        where = ', '.join(f'{n} of {k}' for k,n in o['texts'].items())
        lines += [f"## {o['model']}{', with outliers in the keys' if o['outliers'] else ''}: tokens {o['start']} to {o['window']:,}", '',
            f"{o['tokens']:,} scored tokens in windows of {o['window']:,} ({where}); perplexity of the exact cache {o['rows']['exact']['perplexity']:.2f}", '',
            '| cache | bits per number | KL, nats/token | perplexity | top-1 agreement, % |', '|---|---|---|---|---|']
        lines += [f"| {k} | {v['bits']:.2f} | {v['kl']:.4f} ± {v['kl_error']:.4f} | x {v['ratio']:.4f} ± {v['ratio_error']:.4f} | {100*v['top1']:.1f} ± {100*v['top1_error']:.1f} |" for k,v in o['rows'].items() if k != 'exact']
        if 'token_seconds' in o and o['window'] == 1024: lines += ['', 'One token behind 1,024, float32, plain torch, ms: ' + ', '.join(f'{k} {1e3*v:.0f}' for k,v in o['token_seconds'].items()) + '.']
        lines.append('')
    if (padded := r.get('padded')):
        lines += ['## Padding on the left', '', f"The same windows of 1,024 tokens, alone and behind padding, as in a batch of texts of several lengths. One block holds both padding and text; {padded['results'][0]['tokens']:,} scored tokens.", '',
            '| model | padding | cache | KL, nats/token | top-1 agreement, % |', '|---|---|---|---|---|']
        lines += [f"| {o['model']} | {o['padding']} | {k} | {v['kl']:.4f} ± {v['kl_error']:.4f} | {100*v['top1']:.1f} ± {100*v['top1_error']:.1f} |" for o in padded['results'] for k,v in o['rows'].items() if k != 'exact']
        lines += ['', 'Padding moves the borders of blocks too, which alone changes KL by up to 15 %; what is left of the difference is the block whose statistics keys of padding are part of.', '', said(padded), '']
    lines += ['## Memory', '', 'Ten layers of two heads of 256, as in a Qwen3.5 of 35 billion weights: bytes of the cache by arithmetic, everything counted, and how many times smaller than in 16 bits. The ring of 256 tokens is allocated from the start.', '',
        '| cache | ' + ' | '.join(f"{m['tokens']:,} tokens" for m in r['memory'][:5]) + ' |', '|---|' + '---|'*5]
    lines += [f"| {f'K{k}V{v}'} | " + ' | '.join(f"{human_bytes(m['nbytes'])} ({m['ratio']:.2f}x)" for m in r['memory'] if m['cache'] == f'K{k}V{v}') + ' |' for k,v in WIDTHS]
    lines += ['', '## Targets', '', '| model | cache | KL at most | KL | reached |', '|---|---|---|---|---|']
    lines += [f"| {o['model']}{', outliers' if o['outliers'] else ''} | {o['what']} | {o['target']:.4f} | {o['kl']:.4f} | {'yes' if o['reached'] else '**no**'} |" for o in r['targets']]
    return '\n'.join([*lines, '', said(r)])

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', type=Path, nargs='+', required=True, help='checkpoint folders with tokenizers')
    p.add_argument('--name', nargs='+', help='what to call them; the names of their folders by default')
    p.add_argument('--text', type=Path, nargs='+', required=True, help='text files in UTF-8')
    p.add_argument('--windows', type=int, default=2, help='of 1,024 tokens from the start of each text; twice as many for small models')
    p.add_argument('--long', type=int, default=0, help='windows of 4,096 tokens, each from another text')
    p.add_argument('--no-outliers', action='store_true', help='skip the models with outliers')
    p.add_argument('--padding', type=int, default=0, metavar='N', help='compare with N tokens of padding instead, and keep the other results')
    p.add_argument('--one-by-one', action='store_true', help='feed tokens alone')
    p.add_argument('--threads', type=int, help='of torch')
    p.add_argument('--write', action='store_true', help='write docs/results/kv-quality.json and .md')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    warnings.simplefilter('ignore', HLWQWarning)
    start, results, names = time.time(), [], a.name or [m.resolve().name for m in a.model]
    if a.padding:
        for name,path in zip(names, a.model): results += run_padded(path, name, a); print(f'{name}: {time.time() - start:.0f} s', flush=True)
        r = json.loads((RESULTS/'kv-quality.json').read_text())
        r['padded'] = about() | dict(command=f"python benchmarks/kv.py --padding {a.padding} --model {' '.join(names)} --text {' '.join(r['texts'])} --windows {a.windows}", seconds=round(time.time() - start), results=results)
        if a.write: save('kv-quality', r, markdown(r))
        return print(markdown(r))
    for name,path in zip(names, a.model):
        has_norms = hasattr(load(path).model.layers[-1].self_attn, 'q_norm')
        for outliers in (False, True)[:1 if has_norms or a.no_outliers else 2]:
            results += run(path, name, a, outliers)
            print(f'{name}, outliers {outliers}: {time.time() - start:.0f} s', {k:round(v['kl'], 5) for k,v in results[-1]['rows'].items()}, flush=True)
    texts = {f'{f.parent.name}/{f.name}' if f.stem in ('test', 'valid') else f.name:dict(bytes=f.stat().st_size, sha256=hashlib.sha256(f.read_bytes()).hexdigest()) for f in a.text}
    import transformers
    r = about()
    r |= dict(command=f"python benchmarks/kv.py --model {' '.join(names)} --text {' '.join(texts)} --windows {a.windows} --long {a.long}", seconds=round(time.time() - start), texts=texts,
        versions=r['versions'] | dict(transformers=transformers.__version__), targets=judged(results), memory=big_memory(), results=results)
    if a.write: save('kv-quality', r, markdown(r))
    print(markdown(r))

if __name__ == '__main__': main()

"""What a token costs with the four-bit weights of other packages, dense models of real geometry with random weights.

    python benchmarks/peers.py --write          # needs a CUDA device, torchao and bitsandbytes; writes docs/results/peers.json and peers.md

Each is measured by its own users' way, `model.generate` as it comes and compiled with a static cache, and recorded in the graph that `hlwq` makes of the same layers (graph), which needs no
compiler. Rows of hlwq are measured in the same run. A way that fails is told with its error.
"""
import argparse, gc, json, statistics, time, traceback

import common, torch
from common import about, said, save
from hlwq import bench, bench_decode
from hlwq.bench_decode import geometry, geometry_name, model_bytes, random_model
from hlwq.core import human_bytes

def torchao_int4(model):
    "int4 in groups of 128 by the kernel that torch brings"
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    quantize_(model, Int4WeightOnlyConfig(group_size=128, int4_packing_format='tile_packed_to_4d', int4_choose_qparams_algorithm='tinygemm'))
    return model

def bnb_nf4(model):
    "NF4 in blocks of 64, as a model loaded with load_in_4bit has it"
    import bitsandbytes as bnb
    for name,m in [(n, m) for n,m in model.named_modules() if isinstance(m, torch.nn.Linear)]:
        if name == 'lm_head': continue                                   # which its users leave alone too
        new = bnb.nn.Linear4bit(m.in_features, m.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type='nf4')
        new.weight = bnb.nn.Params4bit(m.weight.data.cpu(), requires_grad=False, quant_type='nf4')
        parent,_,leaf = name.rpartition('.')
        setattr(model.get_submodule(parent), leaf, new.to('cuda'))
    return model

WEIGHTS = {'bfloat16': None, 'torchao int4': torchao_int4, 'bitsandbytes NF4': bnb_nf4}

def by_generate(model, compiled, new, repeat):
    "Milliseconds a token of model.generate, from two lengths, so that the prompt is left out"
    ids = torch.randint(0, model.config.vocab_size, (1, 128), device='cuda')
    model.generation_config.eos_token_id = None
    how = dict(do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids)) | (dict(cache_implementation='static') if compiled else dict(disable_compile=True))
    def run(n):
        torch.cuda.synchronize(); start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=n, **how)
        torch.cuda.synchronize()
        if out.shape[1] != 128 + n: raise RuntimeError(f'{out.shape[1]-128} new tokens, need {n}')
        return time.perf_counter() - start
    start = time.perf_counter(); run(new); run(2); warm = time.perf_counter() - start
    ms = [1e3*(run(new) - run(2))/(new - 2) for _ in range(repeat)]
    return dict(ms=statistics.median(ms), all_ms=ms, warm_seconds=warm)

def ways(model, quick):
    yield 'model.generate', lambda: by_generate(model, False, 16 if quick else 34, 1 if quick else 3)
    yield 'graph', lambda: bench_decode.measure_decode(model, 'graph', 1, 128, new=16 if quick else 128, repeat=1 if quick else 5, profiled=False)
    yield 'model.generate, compiled', lambda: by_generate(model, True, 16 if quick else 128, 1 if quick else 5)

def row(of, way, run):
    torch.cuda.reset_peak_memory_stats()
    try: r = {k:v for k,v in run().items() if k in ('ms', 'all_ms', 'warm_seconds', 'capture_seconds')}
    except Exception as e:
        traceback.print_exc(limit=-4)
        return of | dict(way=way, ms=None, error=f'{type(e).__name__}: {str(e).splitlines()[0][:300]}')
    return of | dict(way=way, peak_bytes=torch.cuda.max_memory_allocated()) | r

def table(rows):
    lines = ['| model | weights | way | ms a token | tokens/s | peak memory | first call, s |', '|---|---|---|---:|---:|---:|---:|']
    for r in rows:
        told = f"{r['ms']:.2f} | {1e3/r['ms']:.0f}" if r['ms'] else f"failed: {r['error']} | -"
        lines.append(f"| {r['model']} | {r['weights']} | {r['way']} | {told} | {human_bytes(r['peak_bytes']) if r.get('peak_bytes') else '-'} | {r.get('warm_seconds') or r.get('capture_seconds') or 0:.1f} |")
    return '\n'.join(lines)

def page(r):
    lines = ['# Other four-bit weights', '', 'Dense models of published geometry with random weights, one text, 128 tokens in the prompt; median of 5 times 128 tokens (of 3 times 32 where nothing is recorded or compiled). '
        'graph: the layers of transformers recorded in a CUDA graph by `hlwq.generate`; kernels: the step of hlwq, recorded. Peak memory: of the whole way, with what was held while weights were converted.', '', table(sorted(r['rows'], key=lambda o: o['model'])), '', *(f'- {d}: `{c}`' for c,d in dict.fromkeys((o['command'], o['date']) for o in r['rows'])), '', said(r), '']
    return '\n'.join([*lines, ', '.join(f'{k} {v}' for k,v in r['packages'].items())])

def earlier():
    "Rows of earlier runs, which stay until they are measured again"
    path = common.RESULTS/'peers.json'
    return json.loads(path.read_text())['rows'] if path.exists() else []

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default='llama,qwen3-8b', metavar='NAME,...'); p.add_argument('--layers', type=int); p.add_argument('--write', action='store_true')
    p.add_argument('--quick', action='store_true', help='a few tokens, to try it out'); p.add_argument('--bits', default='5,4', help='of hlwq'); p.add_argument('--weights', default=','.join(WEIGHTS))
    a = p.parse_args()
    from importlib.metadata import PackageNotFoundError, version
    def have(n):
        try: return version(n)
        except PackageNotFoundError: return 'not installed'
    r = dict(about(), gpu=bench.machine(), packages={n:have(n) for n in ('torchao', 'bitsandbytes', 'transformers')}, rows=earlier() if a.write else [])
    def keep(one):
        one |= dict(command=r['command'], date=r['date'])
        r['rows'] = [o for o in r['rows'] if any(o[k] != one[k] for k in ('model', 'weights', 'way'))] + [one]
        print(table([one]).splitlines()[-1], flush=True)
        if a.write: save('peers', r, page(r))
    for name in map(geometry_name, a.only.split(',')):
        for weights in a.weights.split(','):
            model = random_model(geometry(name, a.layers))
            try:
                if WEIGHTS[weights]: model = WEIGHTS[weights](model)
                torch.cuda.empty_cache()
                of = dict(model=name, weights=weights, nbytes=model_bytes(model), layers=a.layers)
                for way,run in ways(model, a.quick): keep(row(of, way, run))
            except Exception as e:
                traceback.print_exc(limit=-4)
                keep(dict(model=name, weights=weights, way='making it', ms=None, error=f'{type(e).__name__}: {str(e).splitlines()[0][:300]}', nbytes=0, layers=a.layers))
            del model; torch._dynamo.reset(); gc.collect(); torch.cuda.empty_cache()
        for bits in map(int, filter(None, a.bits.split(','))):
            model = random_model(geometry(name, a.layers), bits)
            keep(row(dict(model=name, weights=f'hlwq {bits} bits', nbytes=model_bytes(model), layers=a.layers), 'kernels',
                lambda: bench_decode.measure_decode(model, 'kernels', 1, 128, new=16 if a.quick else 128, repeat=1 if a.quick else 5, profiled=False)))
            del model; gc.collect(); torch.cuda.empty_cache()

if __name__ == '__main__': main()

"""Packed models in transformers: how exact, how large in memory, how fast, next to the same model unpacked.

    python benchmarks/packed.py exact --model DIR [DIR ...] --text FILE --write      # every width against the dequantized model, float32
    python benchmarks/packed.py roundtrip --model DIR --write                        # on the fly, saved, loaded, saved: sha256
    python benchmarks/packed.py load --model DIR --write                             # seconds to load, packed and original
    python benchmarks/packed.py memory --write                                       # peak memory while a 1 GB checkpoint is loaded
    python benchmarks/packed.py decode --model DIR --write [--gguf bench.json]       # tokens a second, one stream
    python benchmarks/packed.py compile --model DIR --write                          # graphs and graph breaks under torch.compile

DIR is a checkpoint in 16 bits. Each writes docs/results/packed-NAME.json and .md.
"""
import argparse, gc, json, os, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path

import torch
import transformers
from common import about, said, save
from hlwq.checkpoint import file_sha256, verify_checkpoint
from hlwq.convert import dequantize_checkpoint, quantize_checkpoint
from hlwq.core import human_bytes
from hlwq.hf import HLWQConfig
from hlwq.load import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS = (2, 3, 4, 5, 6, 8)

def text_ids(model, path, n=1024, window=256):
    tok = AutoTokenizer.from_pretrained(model)
    ids = tok(Path(path).read_text(encoding='utf-8')[:20*n]).input_ids[:n]
    return torch.tensor(ids).view(-1, window)

def weight_bytes(folder): return sum(p.stat().st_size for p in Path(folder).glob('*.safetensors'))

@torch.inference_mode()
def logits(model, ids): return torch.cat([model(input_ids=i[None], use_cache=False).logits for i in ids]).double()

def exact(a, tmp):
    rows = []
    for src in a.model:
        ids = text_ids(src, a.text)
        for bits in BITS:
            q, plain = tmp/'q', tmp/'plain'
            quantize_checkpoint(src, q, bits=bits, overwrite=True, progress=False)
            dequantize_checkpoint(q, plain, dtype=torch.float32, overwrite=True, progress=False)
            got, want = (logits(m, ids) for m in (load_model(q, dtype=torch.float32), AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)))
            rows.append(dict(model=Path(src).name, bits=bits, relative=((got-want).norm()/want.norm()).item(), largest=(got-want).abs().max().item(), same_next=(got.argmax(-1) == want.argmax(-1)).float().mean().item()))
            print(rows[-1], flush=True)
    md = ['| model | bits | relative error of the logits | largest difference | same next token |', '|---|---:|---:|---:|---:|'] + [f"| {r['model']} | {r['bits']} | {r['relative']:.1e} | {r['largest']:.1e} | {r['same_next']:.2%} |" for r in rows]
    return dict(rows=rows, tokens=ids.numel()), 'Packed against dequantized', f"Logits of the packed model against those of the model that the codes stand for, both in float32, {ids.numel()} tokens of text. Target: 1e-5.", md

def roundtrip(a, tmp):
    rows = []
    for src in a.model:
        for dtype in ('bfloat16', 'float32'):
            m = AutoModelForCausalLM.from_pretrained(src, quantization_config=HLWQConfig(bits=5), dtype=getattr(torch, dtype))
            one, two = tmp/f'{Path(src).name}-{dtype}-1', tmp/f'{Path(src).name}-{dtype}-2'
            m.save_pretrained(one)
            AutoModelForCausalLM.from_pretrained(one).save_pretrained(two)
            sums = [{p.name: file_sha256(p) for p in o.iterdir()} for o in (one, two)]
            rows.append(dict(model=Path(src).name, dtype=dtype, files=len(sums[0]), identical=sums[0] == sums[1], verified=verify_checkpoint(one).ok and verify_checkpoint(two).ok))
    md = ['| model | dtype | files | identical by sha256 | verified |', '|---|---|---:|---|---|'] + [f"| {r['model']} | {r['dtype']} | {r['files']} | {'yes' if r['identical'] else 'NO'} | {'yes' if r['verified'] else 'NO'} |" for r in rows]
    return dict(rows=rows), 'Saved, loaded, saved again', 'Quantized while loading, saved, loaded, saved once more: every file of the two folders compared.', md

def timed(fs, rounds=9):
    "Median seconds of several functions that take turns"
    for f in fs: f()
    times = [[] for _ in fs]
    for _ in range(rounds):
        for f,t in zip(fs, times):
            gc.collect()
            start = time.perf_counter(); f(); t.append(time.perf_counter()-start)
    return [statistics.median(t) for t in times]

def load(a, tmp):
    rows = []
    for src in a.model:
        q = tmp/f'q-{Path(src).name}'
        quantize_checkpoint(src, q, progress=False)
        plain, packed, strict = timed([lambda: AutoModelForCausalLM.from_pretrained(src), lambda: AutoModelForCausalLM.from_pretrained(q), lambda: load_model(q)])
        rows.append(dict(model=Path(src).name, original_seconds=plain, packed_seconds=packed, load_model_seconds=strict, ratio=packed/plain, ratio_load_model=strict/plain))
    md = ['| model | original | packed | ratio | load_model, with its checks | ratio |', '|---|---:|---:|---:|---:|---:|'] + [f"| {r['model']} | {1e3*r['original_seconds']:.0f} ms | {1e3*r['packed_seconds']:.0f} ms | {r['ratio']:.2f} | {1e3*r['load_model_seconds']:.0f} ms | {r['ratio_load_model']:.2f} |" for r in rows]
    return dict(rows=rows), 'Time to load', 'From a warm disk cache, 5 bits, CPU, medians of nine rounds in turns. transformers maps the original into memory and reads it when it is used; packed stacks are read and put together. Target: 1.5 times.', md

CHILD = """
import sys, json, resource
sys.path.insert(0, {bench!r})
import torch, transformers, hlwq
from hlwq.load import load_model
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
def status(k): return int(next(l for l in open('/proc/self/status') if l.startswith(k)).split()[1])*1024
base = status('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
m = {how}
peak_loading = status('VmHWM')
with torch.inference_mode(): m(input_ids=torch.arange(16)[None])
print(json.dumps(dict(base=base, peak_loading=peak_loading, after=status('VmRSS'), peak_running=status('VmHWM'))))
"""

def memory(a, tmp):
    from full_size import Drawn
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
    config = Qwen3_5MoeTextConfig(num_hidden_layers=8, num_experts=64, vocab_size=8192)
    with torch.device('meta'): names = {k:tuple(v.shape) for k,v in Qwen3_5MoeForCausalLM(config).state_dict().items()}
    build = lambda **kw: Qwen3_5MoeForCausalLM.from_pretrained(None, config=config, state_dict={k:Drawn(k, s, 'cpu') for k,s in names.items()}, dtype=torch.bfloat16, **kw)
    rows = []
    m = build(quantization_config=HLWQConfig(bits=5)); m.save_pretrained(tmp/'packed'); del m; gc.collect()
    for how in ('AutoModelForCausalLM.from_pretrained(sys.argv[1])', 'load_model(sys.argv[1])'):
        r = json.loads(subprocess.run([sys.executable, '-W', 'ignore', '-c', CHILD.format(how=how, bench=str(Path(__file__).parent)), str(tmp/'packed')], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        rows.append(dict(how=how.split('(')[0], packed=weight_bytes(tmp/'packed'), allowed=int(1.15*weight_bytes(tmp/'packed')+300e6), **r))
    md = ['| by | files | libraries alone | peak while loading | of it the model | allowed: 1.15 x files + 300 MB | after a forward | peak in a forward |', '|---|---:|---:|---:|---:|---:|---:|---:|'] + [
        f"| {r['how']} | {human_bytes(r['packed'])} | {human_bytes(r['base'])} | {human_bytes(r['peak_loading'])} | {human_bytes(r['peak_loading']-r['base'])} | {human_bytes(r['allowed'])} | {human_bytes(r['after'])} | {human_bytes(r['peak_running'])} |" for r in rows]
    return dict(rows=rows), 'Memory while loading', f"A mixture of experts with {sum(torch.Size(s).numel() for s in names.values())/1e9:.2f}e9 random weights at 5 bits, CPU; resident memory of a fresh process, mapped files included.", md

@torch.inference_mode()
def tokens_per_second(model, ids, n):
    out = model(input_ids=ids, use_cache=True)
    cache, t = out.past_key_values, out.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(n):
        out = model(input_ids=t, past_key_values=cache, use_cache=True)
        t = out.logits[:, -1:].argmax(-1)
    return n/(time.perf_counter()-start)

def decode(a, tmp):
    rows, gguf = [], json.loads(Path(a.gguf).read_text()) if a.gguf else None
    for src in a.model:
        q = tmp/f'q-{Path(src).name}'
        quantize_checkpoint(src, q, progress=False)
        models = {f'{w}, {d}': f(getattr(torch, d)) for w,f in (('original', lambda d: AutoModelForCausalLM.from_pretrained(src, dtype=d)), ('packed, 5 bits', lambda d: load_model(q, dtype=d)),
            ('packed, dense weights cached', lambda d: load_model(q, dtype=d, cache_dequantized=True))) for d in ('float32', 'bfloat16')}
        ids = AutoTokenizer.from_pretrained(src)('The old lighthouse stood at the end of the road, and', return_tensors='pt').input_ids
        speeds = {k:[] for k in models}
        for _ in range(5):
            for k,m in models.items(): speeds[k].append(tokens_per_second(m, ids, 64))
        for k,m in models.items(): rows.append(dict(model=Path(src).name, how=k, tokens_per_second=statistics.median(speeds[k][1:]), rounds=speeds[k], weights=sum({p.data_ptr():p.nbytes for p in m.parameters()}.values())))
    md = ['| model | run as | parameters (without a cache) | tokens a second | against float32 |', '|---|---|---:|---:|---:|']
    for r in rows:
        base = next(o for o in rows if o['model'] == r['model'] and o['how'] == 'original, float32')
        md.append(f"| {r['model']} | {r['how']} | {human_bytes(r['weights'])} | {r['tokens_per_second']:.1f} | {r['tokens_per_second']/base['tokens_per_second']:.2f} x |")
    res = dict(rows=rows)
    if gguf: res['gguf'] = {k:gguf[k] for k in ('llama_cpp_python', 'system_info', 'threads', 'n_prompt', 'n_new', 'reps')} | dict(models={k:{o:r[o] for o in ('bytes', 'decode_tok_s', 'decode_all', 'prefill_tok_s')} for k,r in gguf['models'].items()}); md += ['', *gguf_lines(gguf)]
    return res, 'Tokens a second on a CPU', 'One stream, greedy, 64 tokens after a short prompt, Python loop over the model of transformers; medians of four rounds in turns.', md

def gguf_lines(g):
    "The other runtime's numbers, measured by a script of its own in the same hour"
    rows = [f"| {k.removesuffix('.gguf')} | {human_bytes(r['bytes'])} | {r['decode_tok_s']:.1f} |" for k,r in g['models'].items() if 'Q5' in k]
    return ['The same model as GGUF files of about five bits in llama.cpp, on the same machine with two threads, requantized from the same 4-bit source. It rounds activations to 8 bits, keeps the embedding in 8 or 5 bits, and has no Python in its loop:', '',
        '| file | size | tokens a second |', '|---|---:|---:|', *rows, '', f"llama-cpp-python {g['llama_cpp_python']}, 64 tokens after a prompt of 16, medians of {g['reps']}."]

def compile(a, tmp):
    rows = []
    for src in a.model:
        q = tmp/f'q-{Path(src).name}'
        quantize_checkpoint(src, q, progress=False, min_coverage=0)
        m = load_model(q, dtype=torch.float32)
        ids = torch.arange(32)[None]
        graphs = []
        def count(gm, inputs): graphs.append(gm); return gm.forward
        torch._dynamo.reset(); torch._dynamo.utils.counters.clear()
        with torch.inference_mode():
            want = m(input_ids=ids, use_cache=False).logits
            got = torch.compile(m, fullgraph=True, backend=count)(input_ids=ids, use_cache=False).logits
        calls = [str(n.target) for g in graphs for n in g.graph.nodes if n.op == 'call_function']
        rows.append(dict(model=Path(src).name, graphs=len(graphs), graph_breaks=sum(torch._dynamo.utils.counters['graph_break'].values()), operations=len(calls), packed=sum('hlwq' in c for c in calls), relative=((got-want).norm()/want.norm()).item()))
    md = ['| model | graphs | graph breaks | operations | of them packed products | difference of the compiled logits |', '|---|---:|---:|---:|---:|---:|'] + [f"| {r['model']} | {r['graphs']} | {r['graph_breaks']} | {r['operations']} | {r['packed']} | {r['relative']:.1e} |" for r in rows]
    return dict(rows=rows), 'Under torch.compile', 'Packed at 5 bits; `torch.compile(fullgraph=True)` runs, compared with the plain model.', md

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('what', choices=['exact', 'roundtrip', 'load', 'memory', 'decode', 'compile'])
    p.add_argument('--model', nargs='+', default=[]); p.add_argument('--text'); p.add_argument('--gguf'); p.add_argument('--write', action='store_true')
    a = p.parse_args()
    warnings.simplefilter('ignore')
    transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as d: res, title, text, table = globals()[a.what](a, Path(d))
    r = dict(about(), **res)
    r['command'] = f"python benchmarks/packed.py {a.what}" + ''.join(f' --{k} ' + ' '.join(Path(v).name for v in vs) for k,vs in (('model', a.model), ('text', [a.text] if a.text else [])) if vs)
    r['versions']['transformers'] = transformers.__version__
    md = '\n'.join([f'# {title}', '', text, '', *table, '', said(r)])
    print(md)
    if a.write: save(f'packed-{a.what}', r, md)

if __name__ == '__main__': main()

"""Quantize a checkpoint at several widths, by way of files, and measure what is lost on texts of your own.

    python benchmarks/quality.py --model DIR --text FILE [FILE ...] --bits 2 3 4 5 6 --out docs/results/NAME.json

For each width: quantize_checkpoint -> verify_checkpoint -> tensor_report -> dequantize_checkpoint -> load with transformers in float32 -> compare
with the original on the same windows. Writes NAME.json and, made from it, NAME.md. Texts are named by file name, length and sha256; they are not copied.
"""
import argparse, hashlib, json, platform, tempfile, time
from datetime import datetime, timezone
from pathlib import Path

import torch
from hlwq.convert import dequantize_checkpoint, quantize_checkpoint
from hlwq.checkpoint import verify_checkpoint
from hlwq.core import human_bytes
from hlwq.evaluate import compare_many, load_text_tokens, tensor_report

def load(path):
    "A model in float32 that lacks nothing"
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    wrong = {k:sorted(map(str, v))[:8] for k,v in info.items() if k in ('missing_keys', 'unexpected_keys', 'mismatched_keys') and v}
    if wrong: raise SystemExit(f'{path}: {wrong}')
    return model.eval()

def weight_bytes(path): return sum(o.stat().st_size for o in Path(path).glob('*.safetensors'))

def one_width(model, bits, tmp):
    "Converts there and back; returns the facts and the folder of the decoded model"
    q, plain = tmp/f'q{bits}', tmp/f'plain{bits}'
    start = time.perf_counter()
    plan = quantize_checkpoint(model, q, bits=bits, progress=False)
    quantized = time.perf_counter()
    report = verify_checkpoint(q)
    if not report.ok: raise SystemExit(repr(report))
    verified = time.perf_counter()
    errors = tensor_report(model, q)
    dequantize_checkpoint(q, plain, progress=False)
    return dict(bits=bits, bits_per_weight=plan.bits_per_weight, coverage=plan.coverage, n_matrices=plan.n_matrices, quantized_params=plan.quantized_params, total_params=plan.total_params,
        weight_file_bytes=weight_bytes(q), relative_error=errors.pooled(), worst_matrix=max(errors.rows, key=lambda r: r.error).name, worst_error=max(r.error for r in errors.rows),
        relative_error_by_kind={k:errors.pooled(v) for k,v in errors.kinds.items()}, verified=report.ok,
        quantize_seconds=round(quantized-start, 2), verify_seconds=round(verified-quantized, 2)), plain

def machine():
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if Path('/proc/cpuinfo').exists() else platform.processor()
    import transformers
    return dict(cpu=cpu, threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, date=f'{datetime.now(timezone.utc):%Y-%m-%d}')

def read_texts(files, tokenizer, max_tokens):
    found = {f.stem if f.stem not in ('test', 'valid') else f'{f.parent.name}-{f.stem}':f for f in files}
    tokens = {k:load_text_tokens(f, tokenizer, max_tokens) for k,f in found.items()}
    return tokens, {k:dict(file=f.name, bytes=f.stat().st_size, sha256=hashlib.sha256(f.read_bytes()).hexdigest(), tokens=len(tokens[k])) for k,f in found.items()}

def pm(o, name, scale=1, digits=None):
    v, e = o[name]*scale, (o[f'{name}_error'] or 0)*scale
    d = digits if digits is not None else 3
    return f'{v:.{d}f} ± {e:.{d}f}'

def to_markdown(r):
    lines = [f"# Quality of {r['name']}, through the dequantized model", '',
        f"{r['n_matrices']} matrices with {r['quantized_params']:,} of {r['total_params']:,} weights ({100*r['coverage']:.1f} %); weight files of {human_bytes(r['weight_file_bytes'])} before.",
        f"± is one standard error over windows of {r['window']} tokens; that of the ratio is paired. It covers the choice of text, not the choice of rounding.", '',
        '| bits | bits per weight | weight files | relative weight error | worst matrix |', '|---|---|---|---|---|']
    lines += [f"| {o['bits']} | {o['bits_per_weight']:.3f} | {human_bytes(o['weight_file_bytes'])} | {o['relative_error']:.4f} | {o['worst_error']:.4f} `{o['worst_matrix']}` |" for o in r['rows']]
    for k,t in r['texts'].items():
        first = r['rows'][0]['texts'][k]
        lines += ['', f"## {k}", '', f"{first['n_tokens']:,} scored tokens in {first['n_windows']} windows; perplexity of the original {pm(first, 'ppl_a', digits=2)}", '',
            '| bits | perplexity | ratio | KL, nats/token | top-1 agreement, % |', '|---|---|---|---|---|']
        for o in r['rows']:
            c = o['texts'][k]
            lines.append(f"| {o['bits']} | {pm(c, 'ppl_b', digits=2)} | {pm(c, 'ratio', digits=4)} | {pm(c, 'kl', digits=5)} | {pm(c, 'top1', 100, 2)} |")
    m = r['machine']
    return '\n'.join([*lines, '', f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, transformers {m['transformers']}, Python {m['python']}, {m['date']}", '', f"Made by `{r['command']}`."]) + '\n'

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', type=Path, required=True, help='checkpoint folder with a tokenizer')
    p.add_argument('--text', type=Path, nargs='+', required=True, help='text files in UTF-8')
    p.add_argument('--bits', type=int, nargs='+', default=[2, 3, 4, 5, 6])
    p.add_argument('--max-tokens', type=int, default=16384, help='tokens taken from the start of each text')
    p.add_argument('--window', type=int, default=512)
    p.add_argument('--name', help='what to call the model in the table; the name of its folder by default')
    p.add_argument('--out', type=Path, required=True, help='JSON to write; the table goes beside it as .md')
    p.add_argument('--low-memory', action='store_true', help='hold one quantized model at a time; the original runs once for each')
    p.add_argument('--threads', type=int, help='of torch')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    from transformers import AutoTokenizer
    tokens, texts = read_texts(a.text, AutoTokenizer.from_pretrained(a.model), a.max_tokens)
    with tempfile.TemporaryDirectory() as tmp:
        rows = {}
        for b in a.bits: rows[b], folder = one_width(a.model, b, Path(tmp)); rows[b]['texts'] = {}; print(f"{b} bits: relative error {rows[b]['relative_error']:.4f}, {human_bytes(rows[b]['weight_file_bytes'])}", flush=True)
        original = load(a.model)
        for group in ([[b] for b in a.bits] if a.low_memory else [a.bits]):
            models = {b:load(Path(tmp)/f'plain{b}') for b in group}
            for k,t in tokens.items():
                for b,c in compare_many(original, models, t, window=a.window, progress=True).items(): rows[b]['texts'][k] = c.to_json(); print(f'{k}, {b} bits: {c}', flush=True)
    first, name = rows[a.bits[0]], a.name or a.model.resolve().name
    command = f"python benchmarks/quality.py --model {name} --text {' '.join(t['file'] for t in texts.values())} --bits {' '.join(map(str, a.bits))} --max-tokens {a.max_tokens} --window {a.window}"
    r = dict(name=name, command=command, window=a.window, weight_file_bytes=weight_bytes(a.model), **{k:first[k] for k in ('n_matrices', 'quantized_params', 'total_params', 'coverage')},
        texts=texts, machine=machine(), rows=list(rows.values()))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(r, indent=1) + '\n')
    a.out.with_suffix('.md').write_text(to_markdown(r))
    print(a.out.with_suffix('.md').read_text())

if __name__ == '__main__': main()

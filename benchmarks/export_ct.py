"""Exports to compressed-tensors: what integers in groups of 128 lose, how fast they are made, how large the result is, and whether others read it.

    python benchmarks/export_ct.py --model DIR --text FILE [FILE ...]            # prints the tables
    python benchmarks/export_ct.py --model DIR --text FILE [FILE ...] --write    # also writes docs/results/export-ct.json and export-ct.md

Speed is that of a synthetic bf16 checkpoint of some GB, exported in a process of its own, whose peak of memory is read from the kernel; and of
encoding alone, from memory. Sizes are planned from the default configs of transformers, without weights. The model is exported and read by two others:
the library unpacks every matrix, bit for bit; transformers loads it, and its perplexity is compared with the original whose weights were replaced by code times scale.
"""
import argparse, contextlib, io, json, math, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from common import about, said, save
from stream import make
from hlwq.core import human_bytes
from hlwq.evaluate import load_text_tokens, perplexity
from hlwq.export_ct import export_compressed_tensors, plan_export
from hlwq.groups import ct_scheme, decode_groups, encode_groups
from hlwq.hadamard import fwht
from hlwq.quantize import quantize

CHILD = """
import json, sys, time
import torch
from hlwq.export_ct import export_compressed_tensors
from hlwq.groups import encode_groups
encode_groups(torch.randn(1024, 1024, device=sys.argv[3]))      # the library is imported and the device awake before the clock starts
start = time.perf_counter()
plan = export_compressed_tensors(sys.argv[1], sys.argv[2], device=sys.argv[3], progress=False)
wall = time.perf_counter() - start
rss = 1024*int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])
print(json.dumps(dict(wall=wall, peak_rss=rss, weights=plan.quantized_params, nbytes=plan.nbytes, measured=plan.measured)))
"""

def relative(w, x): return float((x - w).norm()/w.norm())

def absmax(w):
    "The library's own scales"
    from compressed_tensors.quantization import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams
    g, args = w.view(len(w), -1, 128), ct_scheme(4).weights
    scale, zero = calculate_qparams(g.amin(-1), g.amax(-1), args)
    return fake_quantize(w, scale.bfloat16().float(), zero, args)

def coded(w, bits=4, signed=False): return decode_groups(*encode_groups(w, bits, signed), bits)

def errors(size):
    "Relative errors of weights, Gaussian and with heavy tails"
    g, res = torch.Generator().manual_seed(0), {}
    z = torch.randn(size, size, generator=g)
    chi = sum(torch.randn(size, size, generator=g)**2 for _ in range(4))
    for name, w in (('Gaussian', z), ('Student t, 4 degrees', torch.randn(size, size, generator=g)/(chi/4).sqrt())):
        five = quantize(w, 5).dequantize()
        res[name] = {"4 bits, the library's scales": relative(w, absmax(w)), '4 bits, ours': relative(w, coded(w)), '4 bits, ours, signed scales': relative(w, coded(w, signed=True)),
            '8 bits, ours': relative(w, coded(w, 8)), '4 bits, ours, by way of HLWQ 5': relative(w, coded(five)), '4 bits, ours, of rotated weights': relative(fwht(w.view(-1, 128)), coded(fwht(w.view(-1, 128)).view(w.shape)).view(-1, 128)),
            'HLWQ 4': relative(w, quantize(w, 4).dequantize()), 'HLWQ 5': relative(w, five)}
    return res

def speed(gb, tmp, rounds):
    "Weights a second: encoding alone with one thread and with all, and the whole export"
    w, threads, alone, load = torch.randn(4096, 4096).bfloat16(), torch.get_num_threads(), {}, round(os.getloadavg()[0], 1)
    for n in sorted({1, threads}):
        torch.set_num_threads(n)
        encode_groups(w)
        best = math.inf
        for _ in range(rounds):
            start = time.perf_counter(); encode_groups(w); best = min(best, time.perf_counter() - start)
        alone[n] = w.numel()/best
    torch.set_num_threads(threads)
    src = tmp/'src'; src.mkdir(); make(src, gb)
    def exports(device): return [exported(src, tmp/'out', device) for _ in range(rounds)]
    runs = exports('cpu')
    res = dict(encode=alone, source_bytes=int(gb*1e9), load_before=load, runs=runs, best=min(runs, key=lambda r: r['wall']))
    if torch.cuda.is_available(): res['gpu'] = gpu(w, rounds) | dict(runs=exports('cuda:0'))
    shutil.rmtree(src)
    return res

def exported(src, out, device):
    "One export in a process of its own, as the kernel saw it"
    load = round(os.getloadavg()[0], 1)
    r = subprocess.run([sys.executable, '-c', CHILD, str(src), str(out), device], capture_output=True, text=True, check=True)
    shutil.rmtree(out)
    return json.loads(r.stdout.splitlines()[-1]) | dict(load=load)

def gpu(w, rounds):
    "Encoding from GPU memory, and whether the codes are those of the CPU"
    on, best = w.cuda(), math.inf
    same = all(torch.equal(a.cpu(), b) for bits in (4, 8) for a, b in zip(encode_groups(on, bits), encode_groups(w, bits)))
    for _ in range(rounds):
        torch.cuda.synchronize(); start = time.perf_counter(); encode_groups(on); torch.cuda.synchronize(); best = min(best, time.perf_counter() - start)
    return dict(name=torch.cuda.get_device_name(), encode=w.numel()/best, same_as_cpu=same)

def plans(tmp):
    "What an export of the seed's architecture holds, from its config alone"
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeTextConfig
    res = {}
    for name, cfg in (('language part', Qwen3_5MoeTextConfig(architectures=['Qwen3_5MoeForCausalLM'])), ('with vision, kept', Qwen3_5MoeConfig())):
        cfg.save_pretrained(tmp/name)
        start = time.perf_counter(); p = plan_export(tmp/name/'config.json')
        res[name] = p.to_json() | dict(seconds=round(time.perf_counter() - start, 2), without_shapes=p.n_tensors - p.n_matrices)
    return res

def tensors_of(folder):
    from safetensors.torch import load_file
    return {k:v for f in sorted(Path(folder).glob('*.safetensors')) for k,v in load_file(f).items()}

def load(folder, dtype):
    "A model that lacks nothing"
    from transformers import AutoModelForCausalLM
    with contextlib.redirect_stderr(io.StringIO()): model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = {k:sorted(map(str, info[k]))[:8] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys') if info[k]}
    if wrong: raise SystemExit(f'{folder}: {wrong}')
    return model.eval()

def unpacked(folder, dtype):
    "The export with experts in the model's dtype: transformers unpacks them in bfloat16, leaves them so in a float32 model, and then rounds activations too"
    model = load(folder, dtype)
    for n, w in model.named_parameters():
        if '.experts.' in n and w.is_floating_point(): w.data = w.data.to(dtype)
    return model

def reference(model, p, t, dtype, folder):
    "The original with code times scale for every weight: products in bfloat16, or in float32 except for experts, which transformers always unpacks in bfloat16"
    from safetensors.torch import save_file
    folder.mkdir(); shutil.copy(Path(model)/'config.json', folder)
    plain = tensors_of(model)
    for q in p.pieces:
        how = dtype if '.experts.' not in q.key else torch.bfloat16
        plain[f'{q.key}.weight'] = decode_groups(t[f'{q.key}.weight_packed'], t[f'{q.key}.weight_scale'], q.bits, how)
    save_file(plain, folder/'model.safetensors', metadata={'format': 'pt'})
    return folder

def readers(model, texts, max_tokens, tmp):
    "The export of one model, as the library and transformers read it"
    from compressed_tensors.compressors import BaseCompressor
    from transformers import AutoTokenizer
    from transformers.utils import logging
    logging.set_verbosity_error(); logging.disable_progress_bar()
    p, library = export_compressed_tensors(model, tmp/'int4', progress=False), BaseCompressor.get_value_from_registry('pack-quantized')
    t, equal = tensors_of(tmp/'int4'), 0
    for q in p.pieces:
        parts = {k: t[f'{q.key}.{k}'] for k in ('weight_packed', 'weight_scale', 'weight_shape')}
        equal += torch.equal(library.decompress(parts, ct_scheme(q.bits))['weight'], decode_groups(parts['weight_packed'], parts['weight_scale'], q.bits, torch.bfloat16))
    res, tokenizer = dict(model=Path(model).name, **p.to_json(), library_equal=equal, texts={}), AutoTokenizer.from_pretrained(model)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix('torch.')
        models = dict(original=load(model, dtype), export=load(tmp/'int4', dtype), cast=unpacked(tmp/'int4', dtype), reference=load(reference(model, p, t, dtype, tmp/f'reference-{name}'), dtype))
        for f in texts:
            tokens = load_text_tokens(Path(f), tokenizer, max_tokens)
            with contextlib.redirect_stderr(io.StringIO()): ppl = {k: float(perplexity(m, tokens).ppl) for k,m in models.items()}
            res['texts'].setdefault(Path(f).stem, {})[name] = ppl | dict(tokens=len(tokens), relative=ppl['export']/ppl['reference'] - 1, relative_cast=ppl['cast']/ppl['reference'] - 1)
    return res

def markdown(r):
    e, s, m = r['errors'], r['speed'], r['model']
    g = s.get('gpu')
    fast = [f"| encoding from memory, {g['name']}, codes {'as on the CPU' if g['same_as_cpu'] else 'NOT as on the CPU'} | {g['encode']/1e6:,.0f} |", f"| the same export on it | {max(o['weights']/o['wall'] for o in g['runs'])/1e6:,.0f} |"] if g else []
    lines = ['# Export to compressed-tensors', '', '## Relative error of the weights', '', '| | ' + ' | '.join(e) + ' |', '|---|' + '--:|'*len(e),
        *(f"| {k} | " + ' | '.join(f'{v[k]:.4f}' for v in e.values()) + ' |' for k in next(iter(e.values()))), '',
        f"{r['size']} x {r['size']} weights each, groups of 128, scales in bfloat16. Signed scales are an option.", '',
        '## Speed', '', '| | M weights/s |', '|---|--:|', *(f"| encoding from memory, {n} thread{'s' if int(n) > 1 else ''} | {v/1e6:.0f} |" for n,v in s['encode'].items()),
        f"| export of {human_bytes(s['source_bytes'])} of bfloat16 weights, files to files | {s['best']['weights']/s['best']['wall']/1e6:.0f} |", *fast, '',
        f"The export took {s['best']['wall']:.1f} s and {human_bytes(s['best']['peak_rss'])} of memory at its peak, libraries included; of {len(s['runs'])} runs this is the fastest, the slowest took {max(o['wall'] for o in s['runs']):.1f} s. Load of the machine before: {s['load_before']}.", '',
        '## Planned from a config alone: Qwen3.6-35B-A3B', '', '| | matrices | kept | tensors | without `weight_shape` | bytes | bits a weight | seconds |', '|---|' + '--:|'*7,
        *(f"| {k} | {o['n_matrices']:,} | {o['kept']:,} | {o['n_tensors']:,} | {o['without_shapes']:,} | {human_bytes(o['nbytes'])} | {o['bits_per_weight']:.3f} | {o['seconds']} |" for k,o in r['plans'].items()), '',
        f"## {m['model']}, read by others", '', f"{m['n_matrices']:,} matrices, {human_bytes(m['nbytes'])}. The library unpacks {m['library_equal']:,} of them to the bits of our reference; transformers loads all with no key missing, left over or of another shape.", '',
        '| text | dtype | tokens | original | export | reference | export / reference - 1 | the same, experts cast to the dtype |', '|---|---|' + '--:|'*6,
        *(f"| {t} | {d} | {o['tokens']:,} | {o['original']:.4f} | {o['export']:.4f} | {o['reference']:.4f} | {o['relative']:.1e} | {o['relative_cast']:.1e} |" for t,v in m['texts'].items() for d,o in v.items()), '',
        'Perplexities. The reference is the original with code times scale in place of each weight, rounded as transformers rounds it: experts in bfloat16, everything else in the dtype of the model. In a float32 model transformers 5.24 also leaves experts in bfloat16 and computes with them there, which the last column undoes.', '', said(r)]
    return '\n'.join(lines)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', required=True); p.add_argument('--text', nargs='+', required=True); p.add_argument('--max-tokens', type=int, default=16384)
    p.add_argument('--size', type=int, default=4096); p.add_argument('--gb', type=float, default=2.); p.add_argument('--rounds', type=int, default=3); p.add_argument('--write', action='store_true')
    a = p.parse_args()
    import compressed_tensors, transformers
    with tempfile.TemporaryDirectory() as d:
        tmp = Path(d)
        r = about() | dict(size=a.size, speed=speed(a.gb, tmp, a.rounds), errors=errors(a.size), plans=plans(tmp), model=readers(a.model, a.text, a.max_tokens, tmp))
    r['command'] = ' '.join(['python benchmarks/export_ct.py --model', Path(a.model).name, '--text', *(Path(f).name for f in a.text), '--write'])
    r['versions'] |= dict(transformers=transformers.__version__, **{'compressed-tensors': compressed_tensors.__version__})
    print(markdown(r))
    if a.write: save('export-ct', r, markdown(r))

if __name__ == '__main__': main()

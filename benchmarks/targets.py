"""Gathers the measured numbers that a release is held against: docs/results/README.md from the JSON files beside it.

    python benchmarks/targets.py
"""
import json
from common import RESULTS

def result(name): return json.loads((RESULTS/f'{name}.json').read_text())
def row(what, target, got, ok, file): return f"| {what} | {target} | {got} | {'yes' if ok else '**no**'} | [{file}]({file}.md) |"

def kv_speed_rows(parts):
    "Attention over codes against torch's, appends, and memory; what a run did not measure has no row"
    rows, own = [], {r['context']:r for r in parts.get('attention', ()) if (r['heads'], r['kv_heads'], r['head_dim']) == (16, 2, 256) and r['ratio']}
    def speed(width, n, least): rows.append(row(f"attention over codes, 16 heads on 2 of 256, {width} at {n:,} tokens, in units of torch's over bfloat16 (cuDNN or flash, the faster)", f'{least}x', f"{own[n]['ratio'][width]:.2f}x ({own[n]['us'][width]:.1f} µs)", own[n]['ratio'][width] >= least, 'kv-speed'))
    for width,n,least in (('K4V4', 32_768, 1.35), ('K4V4', 131_072, 1.5), ('K3V2', 131_072, 1.8)):
        if width in own.get(n, {}).get('ratio', ()): speed(width, n, least)
    short = {n:min(r['ratio'].values()) for n,r in own.items() if n < 8192}
    if short: rows.append(row(f"the same below 8,192 tokens, all widths: {', '.join(f'{n:,}' for n in short)}", 'at least 0.9x', ', '.join(f'{s:.2f}x' for s in short.values()), min(short.values()) >= .9, 'kv-speed'))
    ten = {tuple(r['bits']):r for r in parts.get('append', ()) if (r['kv_heads'], r['head_dim']) == (2, 256)}
    if (4, 4) in ten: rows.append(row('append, one token, 10 layers in a graph, 2 heads of 256, K4V4', 'at most 5 µs a layer', f"{ten[4, 4]['mean_us']:.2f} µs ({ten[4, 4]['block_us']:.1f} for the token that completes a block)", ten[4, 4]['mean_us'] <= 5, 'kv-speed'))
    model = [r for r in parts.get('model', ()) if r['measured']]
    if model:
        worst, plain = max(abs(r['measured']/r['predicted'] - 1) for r in model), next((r for r in model if r['bits'] is None), None)
        rows.append(row(f"a prompt of {model[0]['context']:,} tokens: memory of the cache against the prediction", 'within 2 %', f'at most {100*worst:.2f} %' + (f" ({', '.join(format(r['tokens_per_second'], '.0f') for r in model)} tokens/s with {', '.join('bfloat16' if r['bits'] is None else 'K%dV%d' % tuple(r['bits']) for r in model)})" if plain else ''), worst <= .02, 'kv-speed'))
    return rows

def main():
    q, s, k, p, i = (result(n) for n in ('quantize', 'stream', 'packing', 'plan', 'interrupt'))
    seed, others = p['plans']['Qwen3_5MoeConfig'], {n:o for n,o in p['plans'].items() if n != 'Qwen3_5MoeConfig'}
    rate, times, best = q['weights_per_second']['quantize 5']/1e6, q['times_of_matmul']['quantize 5'], k['best']['5']
    exact = (seed['n_matrices'], seed['n_keys'], round(seed['quantized_params']/1e9, 3), round(seed['total_params']/1e9, 3), seed['bits_per_weight'], round(seed['nbytes']/1e9, 2))
    low, fragile = min(o['outside_embeddings'] for o in others.values()), sum(len(o['fragile_quantized']) for o in others.values())
    rows = [
        row('plan of the default Qwen3.5-MoE config: matrices, keys, weights in billions, of, bits per weight, GB', '20,730; 62,190; 33.617; 35.114; 5.125; 21.55', '; '.join(f'{o:,}' for o in exact), exact == (20730, 62190, 33.617, 35.114, 5.125, 21.55), 'plan'),
        row('the same: time and peak memory', 'under 10 s, under 1 GB', f"{seed['seconds']} s, {seed['peak_rss_mb']} MB", seed['seconds'] < 10 and seed['peak_rss_mb'] < 1000, 'plan'),
        row('plans of 12 other architectures: least share of the 2-D and 3-D weights outside embeddings; routers and norms quantized', '90 %; 0', f'{100*low:.1f} %; {fragile}', low >= .9 and not fragile and len(others) == 12, 'plan'),
        row('quantize 4096 x 4096 float32 to 5 bits, 2 CPU cores', '80 M weights/s', f'{rate:.0f} M weights/s', rate >= 80, 'quantize'),
        row('the same, in units of the matmul with H128', 'at most 5', f'{times:.2f}', times <= 5, 'quantize'),
        row('pack, unpack 5 bits', '500 M codes/s each', f"{best['pack']:.0f}, {best['unpack']:.0f} M codes/s", min(best['pack'], best['unpack']) >= 500, 'packing'),
        row(f"stream a {s['source_bytes']/1e9:.2f} GB bf16 checkpoint: peak memory", 'at most 1.2 GB', f"{s['peak_rss']/1e9:.2f} GB", s['peak_rss'] <= 1.2e9, 'stream'),
        row('the same: wall time over (read + quantize + write, each alone)', 'at most 1.3', f"{s['ratio']:.2f}", s['ratio'] <= 1.3, 'stream'),
        row('relative weight error on Gaussian weights, 5 bits', 'at most 0.0500', f"{q['relative_error']['5']:.4f}", q['relative_error']['5'] <= .05, 'quantize'),
        row('interrupted and resumed: sha256 of every file identical', 'always', f"{i['identical']} of {i['points']}", i['identical'] == i['points'], 'interrupt')]
    e, rt, ld, mem, dec, comp, full = (result(n) for n in ('packed-exact', 'packed-roundtrip', 'packed-load', 'packed-memory', 'packed-decode', 'packed-compile', 'full-size'))
    worst, ratio, m, g = max(r['relative'] for r in e['rows']), next(r for r in ld['rows'] if r['model'] == 'tiny-moe-30m'), mem['rows'], full['rows'][0]
    speed = {r['how']: r['tokens_per_second'] for r in dec['rows'] if 'smol' in r['model'].lower()}
    rows += [
        row(f"packed model against its dequantized twin, float32, all widths, {len({r['model'] for r in e['rows']})} models: relative error of logits", 'at most 1e-5', f'{worst:.1e}', worst <= 1e-5, 'packed-exact'),
        row('quantized while loading, saved, loaded, saved: files identical', 'all', f"{sum(r['identical'] and r['verified'] for r in rt['rows'])} of {len(rt['rows'])} pairs", all(r['identical'] and r['verified'] for r in rt['rows']), 'packed-roundtrip'),
        row(f"peak resident memory while a packed checkpoint of {m[0]['packed']/1e9:.2f} GB is loaded, libraries included", f"at most 1.15 x files + 300 MB = {m[0]['allowed']/1e9:.2f} GB", f"{max(r['peak_loading'] for r in m)/1e9:.2f} GB", all(r['peak_loading'] <= r['allowed'] for r in m), 'packed-memory'),
        row('time to load tiny-moe-30m packed, in units of the original', 'at most 1.5', f"{ratio['ratio']:.2f} (load_model, with its checks: {ratio['ratio_load_model']:.2f})", ratio['ratio'] <= 1.5, 'packed-load'),
        row('Qwen3.6-35B-A3B architecture quantized while loading, 5 bits, GPU memory', 'at most 26 GB', f"{g['gpu_peak_while_loading']/1e9:.2f} GB at the peak, {g['gpu_after']/1e9:.2f} GB after", g['gpu_peak_while_loading'] <= 26e9, 'full-size'),
        row('the same: logits finite; packed layers against dequantized ones, error over that of bf16 arithmetic', 'finite; about 1', f"{'finite' if g['finite'] else 'NOT finite'}; at most {g['worst_ratio_to_bf16']:.2f}", g['finite'] and g['worst_ratio_to_bf16'] < 2, 'full-size'),
        row('torch.compile(fullgraph=True) of a packed dense model: graph breaks', '0', str(sum(r['graph_breaks'] for r in comp['rows'])), not any(r['graph_breaks'] for r in comp['rows']), 'packed-compile'),
        row('SmolLM2-135M, one CPU stream: packed Q5 against float32', 'dequantizing must not dominate', f"{speed['packed, 5 bits, bfloat16']:.0f} and {speed['packed, 5 bits, float32']:.0f} (bf16, fp32 activations) against {speed['original, float32']:.0f} tokens/s", speed['packed, 5 bits, float32'] > speed['original, float32'], 'packed-decode')]
    kern, st = result('kernels'), result('stream-experts-cuda')
    one = {(r['out_features'], r['in_features'], r['bits'], r['M']):r for p in ('gemv', 'small', 'large') for r in kern['parts'][p]}
    def against(shapes, bits, M, least): return [(one[(*s, bits, M)]['ratio'], t) for s,t in zip(shapes, least)]
    def ratios(what, shapes, bits, M, least):
        got = against(shapes, bits, M, least)
        return row(f"{what}, in units of bfloat16", ', '.join(f'{t}x' for _,t in got), ', '.join(f'{r:.2f}x' for r,_ in got), all(r >= t for r,t in got), 'kernels')
    layer, q5 = next(r for r in kern['parts']['experts'] if r['what'] == 'layer' and r['bits'] == 5), next(r for r in kern['parts']['quantize'] if (r['what'], r['dtype'], r['bits']) == ('quantize', 'bfloat16', 5))
    big, wide = [(4096, 4096), (8192, 2048), (14336, 4096)], (14336, 4096)
    rows += [
        row(f"{kern['gpu']['gpu']}: quantize 33.6e9 bfloat16 weights to 5 bits, bytes as on disk", 'at most 60 ms', f"{1e3*q5['model_seconds']:.0f} ms", q5['model_seconds'] <= .06, 'kernels'),
        row(f"the same: convert {st['source_bytes']/1e9:.1f} GB of expert layers from disk to disk, in units of copying the bytes", 'at most 1.25', f"{st['ratio']:.2f}", st['ratio'] <= 1.25, 'stream-experts-cuda'),
        ratios('one token, 5 bits, 4096 x 4096, 8192 x 2048, 14336 x 4096, rotation included', big, 5, 1, (2.3, 2.1, 2.5)),
        ratios('one token, 14336 x 4096, 4 bits', [wide], 4, 1, (2.9,)), ratios('one token, 14336 x 4096, 3 bits', [wide], 3, 1, (3.2,)),
        ratios('one token, 5 bits, 2048 x 2048, 512 x 2048', [(2048, 2048), (512, 2048)], 5, 1, (1.6, 1.6)),
        row('8 experts, gate_up, SiLU and down, 5 bits, in units of the bare bfloat16 products', '2.0x', f"{layer['ratio_bmm']:.2f}x (with SiLU and sum on both sides {layer['ratio']:.2f}x)", layer['ratio_bmm'] >= 2, 'kernels'),
        ratios('8 rows, 5 bits, 4096 x 4096, 14336 x 4096', [big[0], wide], 5, 8, (1.2, 1.2)), ratios('16 rows, 5 bits, 4096 x 4096, 14336 x 4096', [big[0], wide], 5, 16, (1.2, 1.2)),
        row('512, 2048, 4096 rows, 5 bits, 4096 x 4096, in units of bfloat16', '0.75x, 0.90x, 0.95x', ', '.join(f"{one[4096, 4096, 5, m]['ratio']:.2f}x" for m in (512, 2048, 4096)), all(one[4096, 4096, 5, m]['ratio'] >= t for m,t in ((512, .75), (2048, .9), (4096, .95))), 'kernels')]
    dec = {(r['model'], r['bits'], r['way'], r['rows'], r['context']):r for part in result('decode')['parts'].values() for r in part['rows']}
    q36, llama = 'Qwen3.6-35B-A3B', 'Llama-3.1-8B'
    torchao = [r['ms'] for way in ('model.generate, compiled', 'graph') for r in result('peers')['rows'] if (r['model'], r['weights'], r['way']) == ('Llama-3.1-8B', 'torchao int4', way)]
    new_length, text = next(r for r in result('prompts')['rows'] if r['context'] == 2048), result('text')
    def speed_of(what, key, least): return row(what, f'{least} tokens/s', f"{dec[key]['tokens_per_second']:.0f} tokens/s", dec[key]['tokens_per_second'] >= least, 'decode')
    ours, theirs, first = dec[llama, 5, 'kernels', 1, 128], dec[llama, None, 'graph', 1, 128], dec[q36, 5, 'kernels', 1, 2048]
    slowest = max(r['capture_seconds'] for r in dec.values() if r['capture_seconds'])
    rows += [
        speed_of(f"{q36}, 5 bits, one text (eager bfloat16 {dec[q36, None, 'eager', 1, 128]['tokens_per_second']:.1f}, the same step recorded {dec[q36, None, 'graph', 1, 128]['tokens_per_second']:.0f})", (q36, 5, 'kernels', 1, 128), 200),
        speed_of('the same in bfloat16, by the kernels', (q36, None, 'kernels', 1, 128), 140),
        row(f'{llama}, 5 bits, in units of the step of transformers recorded in bfloat16', '2.0x', f"{theirs['ms']/ours['ms']:.2f}x ({ours['tokens_per_second']:.0f} tokens/s)", theirs['ms'] >= 2*ours['ms'], 'decode'),
        row(f'{llama}, 5 bits, against int4 of torchao, compiled and recorded, in another run', 'as fast', f"{ours['tokens_per_second']:.0f} tokens/s against {' and '.join(f'{1e3/v:.0f}' for v in torchao)}", ours['ms'] <= min(torchao), 'peers'),
        row(f'{q36}, first token after 2,048, a length that was read twice before', 'at most 120 ms', f"{first['first_ms']:.0f} ms with 5 bits, {dec[q36, None, 'kernels', 1, 2048]['first_ms']:.0f} ms with bfloat16 weights", first['first_ms'] <= 120, 'decode'),
        row(f'{q36}, first token after 2,048, a length that is new', 'at most 120 ms', f"{new_length['first_ms']:.0f} ms with 5 bits, a generator's first call {result('prompts')['first_call_ms']:.0f} ms", new_length['first_ms'] <= 120, 'prompts'),
        row('tiny-moe-10m at 5 bits, greedy, against model.generate of the decoded weights: 20 prompts x 64 tokens', 'identical, or a tie below 1e-3', f"{sum(o['equal'] == text['new'] for o in text['rows'])} of {len(text['rows'])} identical", all(o['equal'] == text['new'] or o['gap'] < 1e-3 for o in text['rows']), 'text'),
        row('replay against the same step by hand, greedy, 256 tokens of tiny-moe-30m and SmolLM2', 'identical tokens and logits', 'not measured on these; 100 tokens of tiny-moe-10m and of three models of random weights are identical (tests/test_step.py on an H100)', False, 'decode'),
        row('recording a step', 'at most 5 s', f'at most {slowest:.2f} s', slowest <= 5, 'decode')]
    kv = result('kv-quality')
    for model,outliers in dict.fromkeys((o['model'], o['outliers']) for o in kv['targets']):
        got = [o for o in kv['targets'] if (o['model'], o['outliers']) == (model, outliers)]
        rows.append(row(f"KV cache, {model}{', outliers in the keys' if outliers else ''}: KL from the exact cache with {', '.join(o['what'] for o in got)}", 'at most ' + ', '.join(f"{o['target']:g}" for o in got), ', '.join(f"{o['kl']:.4f}" for o in got), all(o['reached'] for o in got), 'kv-quality'))
    full = {m['cache']:m['nbytes']/1e9 for m in kv['memory'] if m['tokens'] == 262_144}
    rows.append(row('KV cache, 10 layers x 2 heads x 256 at 262,144 tokens (5.37 GB in bfloat16): K4V4, K2V2', 'at most 1.45 GB, 0.80 GB', f"{full['K4V4']:.2f} GB, {full['K2V2']:.2f} GB", full['K4V4'] <= 1.45 and full['K2V2'] <= .8, 'kv-quality'))
    ct = result('export-ct')
    text, made, (normal, tails) = ct['plans']['language part'], ct['model'], (o['4 bits, ours'] for o in ct['errors'].values())
    speed, worst = ct['speed']['best']['weights']/ct['speed']['best']['wall']/1e6, {d:max(abs(v[d]['relative']) for v in made['texts'].values()) for d in ('bfloat16', 'float32')}
    cast = max(abs(o['relative_cast']) for v in made['texts'].values() for o in v.values())
    rows += [
        row('compressed-tensors, 4 bits: relative weight error, Gaussian and Student-t(4)', 'at most 0.101, 0.168', f'{normal:.4f}, {tails:.4f}', normal <= .101 and tails <= .168, 'export-ct'),
        row('the same, planned for Qwen3.6-35B-A3B from its config: tensors, shapes beside them, bytes', '62,303; 30,970; 19.4 GB', f"{text['without_shapes']:,}; {text['n_matrices']:,}; {text['nbytes']/1e9:.2f} GB", (text['without_shapes'], text['n_matrices'], round(text['nbytes']/1e9, 1)) == (62303, 30970, 19.4), 'export-ct'),
        row('export to compressed-tensors, files to files, 2 CPU cores', '60 M weights/s', f'{speed:.0f} M weights/s', speed >= 60, 'export-ct'),
        row(f"{made['model']} exported, in transformers: perplexity against that of the original with code times scale for weights", 'within 1e-4', f"{worst['bfloat16']:.2g} in bfloat16; {worst['float32']:.2g} in float32, where transformers computes experts in bfloat16, {cast:.2g} without that", worst['bfloat16'] <= 1e-4 and cast <= 1e-4, 'export-ct'),
        row('the same: matrices that the library unpacks to the bits of the reference', 'all', f"{made['library_equal']} of {made['n_matrices']}", made['library_equal'] == made['n_matrices'], 'export-ct')]
    if (RESULTS/'kv-speed.json').exists(): rows += kv_speed_rows(result('kv-speed')['parts'])
    shared = result('ranks')
    one_thread, two_threads = shared['rows'][:2]
    rows += [
        row(f"two processes quantize {shared['source_bytes']/1e9:.2f} GB on {shared['cores']} cores, source in memory: files identical to those of one", 'all', 'all' if shared['identical'] else 'not all', shared['identical'], 'ranks'),
        row('the same: time in units of one process with 1 thread', 'at most 0.6', f"{one_thread['ratio']:.2f}", one_thread['ratio'] <= .6, 'ranks'),
        row('the same, in units of one process with 2 threads', 'at most 0.6', f"{two_threads['ratio']:.2f}", two_threads['ratio'] <= .6, 'ranks')]
    more = [f'- [{f.stem}]({f.name})' for f in sorted(RESULTS.glob('*.md')) if f.stem not in ('README', 'plan', 'quantize', 'packing', 'stream', 'interrupt', 'full-size', 'kernels', 'stream-experts-cuda', 'kv-quality', 'kv-speed', 'decode', 'peers', 'ranks', 'prompts', 'text', 'export-ct') and not f.stem.startswith('packed-')]
    (RESULTS/'README.md').write_text('\n'.join(['# Measured results', '', 'Each page here is made from the JSON of the same name, which carries command, machine, versions and date. This page is made from them by `python benchmarks/targets.py`.', '',
        '| what | target | measured | reached | details |', '|---|---|---|---|---|', *rows, '', 'Further measurements:', '', *more, '']))

if __name__ == '__main__': main()

"""Plan thirteen architectures from their transformers configs alone, each in a fresh interpreter, and measure time and memory.

    python benchmarks/plan.py                 # prints the tables
    python benchmarks/plan.py --write         # also writes docs/results/plan.json and plan.md

The sizes are the defaults of the config classes; the first one is the architecture of Qwen3.6-35B-A3B at its true size.
"""
import argparse, json, os, platform, resource, subprocess, sys, tempfile, time
from datetime import datetime, timezone
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent/'docs/results'
CONFIGS = ('Qwen3_5MoeConfig', 'LlamaConfig', 'Qwen3Config', 'Qwen3MoeConfig', 'Qwen2MoeConfig', 'MixtralConfig', 'OlmoeConfig', 'DeepseekV3Config', 'GptOssConfig', 'Gemma3Config', 'Phi3Config',
    'Glm4MoeConfig', 'GraniteMoeHybridConfig')
FRAGILE = ('norm', 'router', '.gate.', '_gate.', 'in_proj_a.', 'in_proj_b.', 'conv', 'A_log', 'dt_bias', 'bias')   # never to be quantized

def one(path):
    "Runs in a child: time from the first import to the finished plan, its totals, and the most memory held"
    start = time.perf_counter()
    from hlwq.recipe import make_plan
    from transformers import PreTrainedModel            # what the plan would import anyway, to tell the two apart
    imports = time.perf_counter() - start
    plan = make_plan(path)
    seconds = time.perf_counter() - start
    matrices = [r for r in plan.rows if len(r.shape) in (2, 3) and 'embed' not in r.name and 'lm_head' not in r.name]
    d = {k:v for k,v in plan.to_json().items() if k != 'rows'}
    used = resource.getrusage(resource.RUSAGE_SELF)
    return d | dict(output_nbytes=plan.output_nbytes, seconds=round(seconds, 2), import_seconds=round(imports, 2), cpu_seconds=round(used.ru_utime+used.ru_stime, 2), peak_rss_mb=round(used.ru_maxrss/1000), load=round(os.getloadavg()[0], 1),
        outside_embeddings=plan.quantized_params/sum(r.numel for r in matrices), fragile_quantized=[r.name for r in plan.only('quantize') if any(o in r.name for o in FRAGILE)],
        transposed=sum(r.transposed for r in plan.rows), components=plan.components())

def child(path): return json.loads(subprocess.run([sys.executable, __file__, '--one', str(path)], check=True, capture_output=True, text=True).stdout.splitlines()[-1])

def measure(rounds):
    import transformers
    res = {}
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as d:
            getattr(transformers, name)().save_pretrained(d)
            runs = [child(d) for _ in range(rounds if name == CONFIGS[0] else 1)]
        res[name] = min(runs, key=lambda r: r['seconds']) | dict(all_seconds=[r['seconds'] for r in runs], all_cpu_seconds=[r['cpu_seconds'] for r in runs], all_load=[r['load'] for r in runs], all_peak_rss_mb=[r['peak_rss_mb'] for r in runs])
        if res[name]['fragile_quantized']: raise SystemExit(f"{name}: {res[name]['fragile_quantized'][:8]} would be quantized")
    return res

def cpu_name():
    for line in Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []:
        if line.startswith('model name'): return line.split(':')[1].strip()
    return platform.processor() or platform.machine()

def markdown(r):
    from hlwq.core import human_bytes
    seed = r['plans'][CONFIGS[0]]
    row = lambda k,d: (f"| `{k}` | {d['n_matrices']:,} | {d['quantized_params']/1e9:,.3f} | {d['total_params']/1e9:,.3f} | {d['outside_embeddings']:.1%} | {d['bits_per_weight']:.3f} | {human_bytes(d['nbytes'])} | "
        f"{human_bytes(d['output_nbytes'])} | {d['seconds']:.1f} | {d['cpu_seconds']:.1f} | {d['peak_rss_mb']} |")
    part = lambda d: f"| {d['component']} | {d['action']} | {d['tensors']:,} | {d['matrices']:,} | {d['numel']:,} | {human_bytes(d['nbytes'])} |"
    return '\n'.join(['# Plans from a config alone', '', 'What would be quantized to 5 bits by the default recipe, decided from names and shapes on the meta device.', '',
        '| config | matrices | quantized (1e9) | of (1e9) | of the matrices outside embeddings | bits per weight | quantized part | whole checkpoint | seconds | CPU seconds | peak RSS (MB) |', '|---|' + '--:|'*10, *[row(*o) for o in r['plans'].items()], '',
        'Sizes are the defaults of the config classes. In none of them a router, norm, gate, convolution or bias is quantized. Widths that are no multiple of 128 are padded, which shows as more than 5.125 bits.',
        'In Gemma 3 the vision tower and the projector are kept.', '',
        f"## `{CONFIGS[0]}`", '', f"{seed['n_keys']:,} keys. Times of {len(seed['all_seconds'])} runs: {', '.join(f'{o:.1f}' for o in seed['all_seconds'])} s, from the first import on, at a load of {', '.join(map(str, seed['all_load']))} by other work on {r['cores']} cores;"
        f" CPU time {', '.join(f'{o:.1f}' for o in seed['all_cpu_seconds'])} s; peak RSS {max(seed['all_peak_rss_mb'])} MB. The table shows the fastest run, of which {seed['import_seconds']:.1f} s went into importing torch and transformers.", '',
        '| component | action | tensors | matrices | numbers | bytes |', '|---|---|' + '--:|'*4, *map(part, seed['components']), '',
        f"Measured {r['date']} with `{r['command']}` on {r['machine']}; Python {r['python']}, torch {r['torch']}, transformers {r['transformers']}.", ''])

def main():
    p = argparse.ArgumentParser(description='plans of thirteen architectures')
    p.add_argument('--rounds', type=int, default=5, help='runs of the first config'); p.add_argument('--write', action='store_true', help='write docs/results/plan.json and plan.md')
    p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return print(json.dumps(one(a.one)))
    plans = measure(a.rounds)
    import torch, transformers
    r = dict(command='python benchmarks/plan.py --write', date=datetime.now(timezone.utc).date().isoformat(), machine=f'a {os.cpu_count()}-core {cpu_name()}', cores=os.cpu_count(), python=platform.python_version(), torch=torch.__version__,
        transformers=transformers.__version__, plans=plans)
    print(markdown(r))
    if a.write:
        DOCS.mkdir(parents=True, exist_ok=True)
        (DOCS/'plan.json').write_text(json.dumps(r, indent=1) + '\n')
        (DOCS/'plan.md').write_text(markdown(r))

if __name__ == '__main__': main()

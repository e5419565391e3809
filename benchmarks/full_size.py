"""The seed's architecture at full size, with random weights, quantized while it is loaded, on one GPU.

    python benchmarks/full_size.py --write                       # needs a CUDA device with 26 GB; writes docs/results/full-size.json and full-size.md
    python benchmarks/full_size.py --device cpu --small          # the same code on a model of four small layers

No checkpoint of 65 GB is needed: the state dict is a table of recipes, and each tensor is drawn on the GPU when the loader asks
for it. Says how much memory it took, and compares every packed layer with its dequantized weight in float32: its error may be at
most twice that of bfloat16 arithmetic on the dequantized weight itself.
"""
import argparse, gc, re, time, warnings, zlib
import torch
import torch.nn.functional as F
import transformers
from common import about, said, save
from hlwq.experts import HLWQExperts
from hlwq.hf import HLWQConfig
from hlwq.linear import HLWQLinear
from hlwq.quantize import dequantize_rows
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

class Drawn:
    "A tensor that is drawn when it is asked for: normal with deviation 0.02, the same each time"
    def __init__(self, name, shape, device): self.name, self.shape, self.device = name, shape, device
    def __getitem__(self, _):
        g = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        return torch.empty(self.shape, dtype=torch.bfloat16, device=self.device).normal_(0, .02, generator=g)
    def get_shape(self): return list(self.shape)
    def get_dtype(self): return 'BF16'
    def is_floating_point(self): return True
    @property
    def dtype(self): return torch.bfloat16

def build(config, bits, device):
    with torch.device('meta'): names = {k:tuple(v.shape) for k,v in Qwen3_5MoeForCausalLM(config).state_dict().items()}
    return Qwen3_5MoeForCausalLM.from_pretrained(None, config=config, state_dict={k:Drawn(k, s, device) for k,s in names.items()}, dtype=torch.bfloat16,
        device_map={'': device}, quantization_config=HLWQConfig(bits=bits))

def error(y, want): return ((y.float() - want).norm()/want.norm()).item()

def check_linear(m, x):
    w = m.dequantize(torch.float32)
    want = F.linear(x.float(), w)
    return error(m(x), want), error(F.linear(x, w.to(x.dtype)), want)

def check_stack(stack, x, ids):
    "x: (S, in) one activation for each pair"
    rows = torch.arange(len(ids), device=x.device)
    want, plain = x.new_empty(len(ids), stack.out_features, dtype=torch.float32), x.new_empty(len(ids), stack.out_features)
    for e in ids.unique().tolist():
        w = dequantize_rows(stack.packed.data[e], stack.norms[e], stack.book.to(x.device), stack.in_features)
        at = (ids == e).nonzero().flatten()
        want[at], plain[at] = F.linear(x[at].float(), w), F.linear(x[at], w.to(x.dtype))
    return {way: error(stack(x, rows, ids, way), want) for way in ('eager', 'grouped_mm', 'batched_mm')}, error(plain, want)

@torch.inference_mode()
def check(model, layers='0|3|20|39'):
    "Largest error of a packed layer, and its largest ratio to that of bfloat16 on the dequantized weight"
    worst, ratio, n, g = 0., 0., 0, torch.Generator(model.device).manual_seed(0)
    draw = lambda rows, width: torch.randn(rows, width, generator=g, device=model.device, dtype=torch.float32).to(model.dtype)
    for name,m in model.named_modules():
        if not re.search(rf'layers\.({layers})\.', name): continue
        if isinstance(m, HLWQLinear): got = [check_linear(m, draw(8, m.in_features))]
        elif isinstance(m, HLWQExperts):
            ids = torch.randint(0, m.num_experts, (64,), generator=g, device=model.device)
            got = [(e, plain) for s in (m.w13, m.w2) for errors,plain in [check_stack(s, draw(64, s.in_features), ids)] for e in errors.values()]
        else: continue
        for e,plain in got: worst, ratio, n = max(worst, e), max(ratio, e/plain), n+1
    return dict(comparisons=n, worst_error=worst, worst_ratio_to_bf16=ratio)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--write', action='store_true'); p.add_argument('--device', default='cuda'); p.add_argument('--small', action='store_true')
    p.add_argument('--bits', type=int, nargs='+', default=[5]); a = p.parse_args()
    small = dict(num_hidden_layers=4, hidden_size=256, num_experts=16, moe_intermediate_size=128, shared_expert_intermediate_size=128, vocab_size=512, linear_num_value_heads=8, linear_num_key_heads=4) if a.small else {}
    device, gpu = torch.device(a.device), a.device.startswith('cuda')
    warnings.simplefilter('ignore')
    transformers.logging.set_verbosity_error()
    rows = []
    for bits in a.bits:
        config = Qwen3_5MoeTextConfig(**small)
        if gpu: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model = build(config, bits, device)
        if gpu: torch.cuda.synchronize()
        r = dict(bits=bits, parameters=sum(p.numel() for p in model.parameters() if p.is_floating_point()), load_seconds=time.perf_counter()-start, **{k:getattr(model.hlwq_report(), k) for k in ('nbytes', 'kept_nbytes')})
        r['packed_weights'] = sum(o['shape'][-1]*o['shape'][-2]*(o['shape'][0] if len(o['shape']) == 3 else 1) for o in model.hlwq_report().rows)
        if gpu: r.update(gpu_peak_while_loading=torch.cuda.max_memory_allocated(), gpu_reserved_while_loading=torch.cuda.max_memory_reserved(), gpu_after=torch.cuda.memory_allocated())
        ids = torch.randint(0, config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0)).to(device)
        if gpu: torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
            r.update(finite=bool(torch.isfinite(logits).all()), logits_std=logits.float().std().item())
            start = time.perf_counter(); out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
            r.update(seconds_for_8_tokens=time.perf_counter()-start)
        if gpu: r['gpu_peak_while_running'] = torch.cuda.max_memory_allocated()
        r.update(check(model), backends=model.hlwq_report().backends)
        rows.append(r); print(r, flush=True)
        del model, logits, out
        gc.collect()
    res = dict(about(), transformers=transformers.__version__, gpu=torch.cuda.get_device_name() if gpu else None, rows=rows)
    GB = lambda n: f'{n/1e9:.2f} GB'
    md = ['# The full-size architecture, quantized while it is loaded', '', f"Qwen3.6-35B-A3B's text model (transformers' default `Qwen3_5MoeTextConfig`), random weights, bfloat16, {'on ' + res['gpu'] if gpu else 'small, on CPU'}.", '',
        '| bits | packed | kept | peak of GPU memory while loading | after | peak while running | seconds to load | logits finite | eight tokens after a prompt of 128 | comparisons | largest error of a layer | at most x bf16 |', '|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|']
    for r in rows: md.append(f"| {r['bits']} | {GB(r['nbytes'])} | {GB(r['kept_nbytes'])} | {GB(r.get('gpu_peak_while_loading', 0))} | {GB(r.get('gpu_after', 0))} | {GB(r.get('gpu_peak_while_running', 0))} | {r['load_seconds']:.1f} | {'yes' if r['finite'] else 'NO'} | {r['seconds_for_8_tokens']:.1f} s | {r['comparisons']} | {r['worst_error']:.2e} | {r['worst_ratio_to_bf16']:.2f} |")
    md += ['', 'Every packed linear layer and stack of experts of layers 0, 3, 20 and 39, experts in all three implementations, against its dequantized weight in float32; the last column compares with bfloat16 arithmetic on the dequantized weight.', '', said(res)]
    print('\n'.join(md))
    if a.write: save('full-size', res, '\n'.join(md))

if __name__ == '__main__': main()

"""What a token costs with most experts on the host: Qwen3.6-35B-A3B geometry with random packed weights, for several numbers of slots.

    python benchmarks/offload.py --write                       # needs a CUDA device and 24 GB of host memory; some minutes
    python benchmarks/offload.py --only 8,64,256               # some numbers of slots
    python benchmarks/offload.py --trace FILE                  # routing from a recording of RoutingTrace.save with as many layers, experts and experts of a token
    python benchmarks/offload.py --embeddings host --only 2,8  # a gigabyte less on the device; --write makes offload-embeddings.json
    python benchmarks/offload.py --tiny                        # a few numbers on the CPU, to try the script out

Routers of random weights choose like dice, so the step is told which experts are chosen: by a synthetic trace (popularity by Zipf's law, 45 % carry over to the next token) or by a recording.
These hit rates are not those of the model. First all experts are on the device, without slots, if they fit: what that takes is the time without copies. Then come slots, most first. A row is printed as
soon as it is known, and --write saves after each.
"""
import argparse, sys

from common import about, said, save
from hlwq.bench_offload import SLOTS, offload_table, run_offload
from hlwq.cache_sim import RoutingTrace
from hlwq.core import HLWQError

TINY = dict(vocab_size=64, hidden_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
    moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=16, num_experts_per_tok=2, device='cpu', contexts=(8, 20), new=8)

def page(r):
    "The result in Markdown"
    head, body = offload_table(r['offload'])
    lines = ['# Experts on the host', '', f"{r['model']} geometry, random packed weights, {r['bits']} bits; all experts in {r['offload'][0]['where']} memory of the host, {r['link']/1e9:.1f} GB/s to the device; input embeddings on the {r['embeddings']}. "
        f"**Routing is {', '.join(sorted({o['source'] for o in r['offload'] if not o['resident']})) or 'that of routers'}**, forced on the device: the hit rates are not those of the real model. Limit: 1/(time without copies + bytes a token/link), with no overlap of the two; "
        'the time without copies is that of the row "all", which has every expert on the device and no slots, or of most slots if that did not fit. First: from the call to the first token, for prompts of so many tokens, whose routing is that of random routers. Peak memory: weights, slots, staging, cache and work, of torch.', '',
        '| ' + ' | '.join(head) + ' |', '|' + '---:|'*len(head), *('| ' + ' | '.join(b) + ' |' for b in body), '', f"{said(r)} On {r['gpu'].get('gpu')}: " + ', '.join(f'{k} {v}' for k,v in r['gpu'].items() if v and k != 'gpu') + '.']
    return '\n'.join(lines)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default=','.join(map(str, SLOTS)), metavar='N,...', help='numbers of slots'); p.add_argument('--bits', type=int, default=5); p.add_argument('--new', type=int, default=128, help='tokens to write')
    p.add_argument('--embeddings', default='device', metavar='device|host', help='where the input embeddings are'); p.add_argument('--policy', default='lru'); p.add_argument('--layers', type=int, help='fewer layers, to try it out'); p.add_argument('--trace', metavar='FILE'); p.add_argument('--tiny', action='store_true'); p.add_argument('--write', action='store_true')
    a = p.parse_args()
    def keep(res):
        print('  '.join(offload_table(res.offload[-1:])[1][0]), flush=True)
        if a.write: store(res)
    def store(res):
        r = dict(about(), gpu=res.machine, model=res.model, bits=a.bits, link=res.link, embeddings=a.embeddings, offload=sorted(res.offload, key=lambda o: (o['resident'], o['slots'])))
        save('offload' if a.embeddings == 'device' else 'offload-embeddings', r, page(r))
    how = dict(bits=a.bits, new=a.new, layers=a.layers, policy=a.policy, embeddings=a.embeddings, trace=RoutingTrace.load(a.trace) if a.trace else None, progress=keep)
    try:
        slots = [int(s) for s in a.only.split(',')]
        if a.tiny: slots, how = [1, 4, 16], {**how, **TINY}
        print('  '.join(offload_table([])[0]), flush=True)
        res = run_offload(about()['command'], slots, **how)
    except (HLWQError, ValueError) as e: sys.exit(str(e))
    print(page(dict(about(), gpu=res.machine, model=res.model, bits=a.bits, link=res.link, embeddings=a.embeddings, offload=res.offload)))

if __name__ == '__main__': main()

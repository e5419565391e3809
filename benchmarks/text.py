"""Texts of the embedded model, packed, beside those that transformers writes with the same weights decoded: the same tokens, or a first difference at a tie.

    python benchmarks/text.py --write                          # on the CPU; writes docs/results/text.json and text.md
"""
import argparse, tempfile, time
from pathlib import Path

import torch, transformers
from common import about, said, save
from hlwq import generate, load_model, quantize_checkpoint
from hlwq.core import asset_path
from hlwq.packed_model import unpack

TIE = 1e-3                                                     # of the logits

def prompts(tokenizer, n, length=12):
    "Beginnings of n verses, evenly spread over the text that comes with the package"
    lines = [l.strip() for l in asset_path('kjv.txt').read_text(encoding='utf-8').splitlines() if len(l) > 60]
    return [tokenizer(lines[i*len(lines)//n], return_tensors='pt').input_ids[:, :length] for i in range(n)]

@torch.no_grad()
def compared(packed, plain, ids, new):
    "How many tokens are equal; and where they part, how far apart the two are in the logits of the decoded model"
    a = generate(packed, ids, new, eos_token_id=[])[0]
    b = plain.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)[0]
    differ = (a != b).nonzero().flatten()
    if not len(differ): return dict(equal=new, gap=0.)
    at = int(differ[0])
    logits = plain(b[None, :at]).logits[0, -1]
    return dict(equal=at - ids.shape[1], gap=float((logits[a[at]] - logits[b[at]]).abs()))

def page(r):
    rows = r['rows']
    same, ties = sum(o['equal'] == r['new'] for o in rows), sum(o['equal'] < r['new'] and o['gap'] < TIE for o in rows)
    return '\n'.join(['# The same text', '', f"tiny-moe-10m at {r['bits']} bits, {r['dtype']}, {len(rows)} prompts, {r['new']} tokens each, greedy: `hlwq.generate` of the packed model against `model.generate` of the same weights decoded.", '',
        '| identical | first difference at a tie below 0.001 | other differences |', '|---:|---:|---:|', f'| {same} of {len(rows)} | {ties} | {len(rows) - same - ties} |', '', said(r)])

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--prompts', type=int, default=20); p.add_argument('--new', type=int, default=64); p.add_argument('--bits', type=int, default=5); p.add_argument('--write', action='store_true')
    a = p.parse_args()
    transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as t:
        quantize_checkpoint(asset_path('tiny-moe-10m'), Path(t)/'q', bits=a.bits, progress=False)
        packed, plain = load_model(Path(t)/'q', dtype=torch.float32, device_map='cpu'), unpack(load_model(Path(t)/'q', dtype=torch.float32, device_map='cpu'), torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(Path(t)/'q')
        rows = [compared(packed, plain, ids, a.new) for ids in prompts(tokenizer, a.prompts)]
    r = dict(about(), bits=a.bits, new=a.new, dtype='float32', device='cpu', seconds=round(time.perf_counter() - start), rows=rows)
    print(page(r))
    if a.write: save('text', r, page(r))

if __name__ == '__main__': main()

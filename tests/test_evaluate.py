"The arithmetic of the measures on models whose answer is known, and what happens with input that has none"
import copy, json, math, pickle
from types import SimpleNamespace
import pytest, torch
from torch import nn

from hlwq.core import ConfigError, NonFiniteError, UnsupportedError, asset_path
from hlwq.evaluate import (Comparison, Estimate, TensorError, TensorReport, compare, compare_many, comparison_table, cut_windows, estimate, kl_divergence,
                           load_text_tokens, matrix_kind, perplexity, plot_errors, plot_quality, plot_sizes, tensor_report)


class Bigram(nn.Module):
    "Next-token logits that depend on the last token only: everything can be computed by hand"
    def __init__(self, vocab=17, seed=0, dtype=torch.float32, noise=0.):
        super().__init__()
        table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter((table + noise*torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(99))).to(dtype))
        self.config, self.calls = SimpleNamespace(vocab_size=vocab), 0
        self.eval()
    def forward(self, input_ids, **kw):
        self.calls += 1
        return SimpleNamespace(logits=self.table[input_ids])


def some_tokens(n, vocab=17, seed=1): return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed))


def test_perplexity_and_its_error_by_hand():
    m, t = Bigram(), some_tokens(1003)
    w = t[:1000].view(10, 100)
    nll = torch.stack([-m.table.detach().log_softmax(-1)[o[:-1], o[1:]].mean() for o in w]).double()
    s = perplexity(m, t, window=100)
    assert (s.n_windows, s.n_tokens) == (10, 990)
    assert s.nll == pytest.approx(nll.mean().item(), rel=1e-6)
    assert s.nll.error == pytest.approx(nll.std().item()/10**.5, rel=1e-5)
    assert s.ppl == pytest.approx(math.exp(s.nll)) and s.ppl.error == pytest.approx(math.exp(s.nll)*s.nll.error)
    torch.testing.assert_close(s.windows, nll, rtol=1e-5, atol=1e-6)


def test_compare_by_hand():
    a, b, t = Bigram(), Bigram(noise=.3), some_tokens(1000)
    w = t.view(10, 100)
    p, q = [m.table.detach().double().log_softmax(-1) for m in (a, b)]
    per_token = (p.exp()*(p-q)).sum(-1)
    kl = torch.stack([per_token[o[:-1]].mean() for o in w])
    d = torch.stack([(p-q)[o[:-1], o[1:]].mean() for o in w])
    c = compare(a, b, t, window=100)
    assert c.kl == pytest.approx(kl.mean().item(), rel=1e-4) and c.kl.error == pytest.approx(kl.std().item()/10**.5, rel=1e-4)
    assert c.ratio == pytest.approx(math.exp(d.mean()), rel=1e-5) and c.ratio.error == pytest.approx(math.exp(d.mean())*d.std().item()/10**.5, rel=1e-4)
    assert c.ratio == pytest.approx(c.ppl_b/c.ppl_a)
    agree = (p.argmax(-1) == q.argmax(-1)).double()
    assert c.top1 == pytest.approx(torch.stack([agree[o[:-1]].mean() for o in w]).mean().item())
    assert kl_divergence(a, b, t, window=100) == c.kl


@pytest.mark.parametrize('size', [1, 3, 8, 100])
def test_batches_do_not_matter(size):
    a, b, t = Bigram(), Bigram(noise=.3), some_tokens(1000)
    assert compare(a, b, t, window=64, batch_size=size) == compare(a, b, t, window=64)


def test_position_chunks_do_not_matter():
    from hlwq.evaluate import _score
    big = torch.randn(1, 40, 2**21), torch.randint(0, 2**21, (1, 40))            # eight positions at a time
    whole = -big[0][0, :-1].log_softmax(-1).gather(1, big[1][0, 1:, None]).double().mean()
    assert _score(*big)[0, 0] == pytest.approx(whole.item(), rel=1e-6)
    same = _score(big[0], big[1], big[0])
    assert same[0, 1] == 0 and same[0, 2] == 1


def test_many_models_run_the_original_once():
    a, t = Bigram(), some_tokens(400)
    others = {3:Bigram(noise=.1), 'x':Bigram(noise=.2)}
    r = compare_many(a, others, t, window=100)
    assert a.calls == 1 and list(r) == [3, 'x']
    assert r['x'] == compare(Bigram(), others['x'], t, window=100)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    a, t = Bigram(dtype=dtype), some_tokens(300)
    c = compare(a, a, t, window=100)
    assert (c.kl, c.top1, c.ratio) == (0, 1, 1)


def test_self_comparison_is_exact_and_shifted_logits_are_equal():
    a, b, t = Bigram(), Bigram(), some_tokens(500)
    assert compare(a, a, t).kl == 0
    b.table.data += 5
    c = compare(a, b, t)
    assert abs(c.kl) < 1e-6 and c.top1 == 1


def test_short_texts_and_windows():
    assert cut_windows(torch.arange(5), 512).shape == (1, 5)
    assert cut_windows(torch.arange(1025), 512).shape == (2, 512)
    assert cut_windows(torch.arange(4, dtype=torch.int32), 2).dtype == torch.int64
    s = perplexity(Bigram(), some_tokens(50))
    assert s.n_windows == 1 and math.isnan(s.nll.error) and '?' in repr(s)
    assert json.loads(json.dumps(s.to_json(), allow_nan=False))['ppl_error'] is None


@pytest.mark.parametrize('tokens, said', [(torch.tensor([1]), 'need at least 2'), (torch.tensor([], dtype=torch.int64), 'need at least 2'), (torch.zeros(2, 5, dtype=torch.int64), '1-D'),
    (torch.zeros(9), '1-D tensor of integers'), ([1, 2, 3], 'list, need'), (torch.tensor([3, 17]), 'ids from 3 to 17, need 0 to 16'), (torch.tensor([-1, 3]), 'ids from -1')])
def test_bad_tokens(tokens, said):
    with pytest.raises(ConfigError, match=said): perplexity(Bigram(), tokens)


def test_bad_models():
    a, t = Bigram(), some_tokens(64)
    with pytest.raises(ConfigError, match='model.eval()'): perplexity(Bigram().train(), t)
    with pytest.raises(ConfigError, match='17 .*19'): compare(a, Bigram(19), t)
    broken = Bigram()
    broken.table.data[t[5]] = float('nan')
    with pytest.raises(NonFiniteError, match='the other model: NaN in the logits of windows 0 to 0'): compare(a, broken, t)
    silent = lambda input_ids, **kw: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 9))      # no config says how large its vocabulary is
    with pytest.raises(ConfigError, match='need less than 9'): perplexity(silent, t)
    for w in (1, 0, 2.5):
        with pytest.raises(ConfigError, match='window'): perplexity(a, t, window=w)


def test_no_gradient_and_no_change():
    a, t = Bigram(), some_tokens(64)
    before = copy.deepcopy(a.state_dict())
    perplexity(a, t)
    assert a.table.grad is None and not a.training
    assert all(torch.equal(v, before[k]) for k,v in a.state_dict().items())


def test_text(tmp_path):
    tok = lambda text, **kw: {'input_ids':[ord(c) for c in text]}
    f = tmp_path/'a.txt'
    f.write_text('one line')
    assert load_text_tokens(f, tok, 3).tolist() == [111, 110, 101] and len(load_text_tokens(str(f), tok)) == 8
    assert load_text_tokens('ab\n', tok).tolist() == [97, 98, 10]
    with pytest.raises(ConfigError, match='no such file'): load_text_tokens('missing.txt', tok)
    with pytest.raises(ConfigError, match='no such file'): load_text_tokens(tmp_path/'b.txt', tok)
    f.write_bytes(b'abc\xff')
    with pytest.raises(ConfigError, match='byte 3 is not UTF-8'): load_text_tokens(f, tok)


def test_estimates():
    e = Estimate(2.5, .125)
    assert e == 2.5 and e + 1 == 3.5 and e.error == .125 and json.dumps(e) == '2.5'
    for copied in (pickle.loads(pickle.dumps(e)), copy.deepcopy(e)): assert (copied, copied.error) == (e, e.error)
    assert repr(Estimate(.0086812, .00034)) == '0.00868 ± 0.00034' and repr(Estimate(0, 0)) == '0 ± 0' and repr(Estimate(5)) == '5 ± ?'
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    assert estimate(x).error == pytest.approx(x.std().item()/20, rel=1e-5)


def comparison(kl): return Comparison(Estimate(30, 1), Estimate(31, 1), Estimate(1.03, .01), Estimate(kl, kl/50), Estimate(.9, .01), 1000, 10)


def test_tables_json_and_figures():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    cs, params = {b:comparison(4.**-b) for b in (2, 3, 4)}, dict(plt.rcParams)
    assert comparison_table(cs).count('\n') == 5 and '| original | 30.0 ± 1.0 |' in cs[2]._repr_markdown_()
    assert json.loads(json.dumps(cs[2].to_json()))['kl_error'] == pytest.approx(1/800)
    rows = [TensorError(f'layers.{i}.mlp.up_proj', 'feed-forward', i, (4, 128), 5, .05+.001*i, 1.) for i in range(3)]
    report = TensorReport(rows)
    figures = [plot_quality(cs), plot_quality({'a':cs, 'b':{2:comparison(.1)}}), plot_sizes({'bf16':1000, 'Q5':330}), plot_errors(report)]
    assert len(figures[1].axes) == 2
    assert dict(plt.rcParams) == params, 'the style of the caller is left alone'
    for f in figures: f.canvas.draw(); plt.close(f)


def test_pooled_error_weighs_by_energy():
    r = TensorReport([TensorError('a', 'attention', 0, (1, 128), 5, .1, 9.), TensorError('b.experts', 'experts', 1, (1, 128), 5, .2, 1.)])
    assert r.pooled() == pytest.approx(((.01*9 + .04)/10)**.5)
    assert json.loads(json.dumps(r.to_json()))['kinds']['experts']['error'] == pytest.approx(.2)
    assert TensorReport([]).pooled() == 0


@pytest.mark.parametrize('name, kind', [('model.layers.0.mlp.experts.gate_up_proj_e3', 'experts'), ('model.layers.0.block_sparse_moe.experts.1.w1.weight', 'experts'),
    ('model.layers.0.mlp.shared_experts.up_proj.weight', 'shared expert'), ('model.layers.0.linear_attn.in_proj_qkv.weight', 'Gated DeltaNet'), ('transformer.h.0.attn.c_attn.weight', 'attention'),
    ('model.layers.1.mamba.in_proj.weight', 'state space'), ('model.layers.1.mlp.down_proj.weight', 'feed-forward'), ('lm_head.weight', 'other')])
def test_kinds(name, kind): assert matrix_kind(name) == kind


def test_report_of_fused_experts_is_that_of_single_ones(tmp_path):
    "The same experts, one by one and as slices of a fused parameter, get the same codes and the same errors"
    from safetensors.torch import load_file, save_file
    from hlwq.convert import quantize_checkpoint
    src = asset_path('tiny-moe-10m')
    all_ = load_file(src/'model.safetensors')
    single = {k:v for k,v in all_.items() if k.startswith('model.layers.3.mlp.experts.')}
    fused = {'model.layers.3.mlp.experts.down_proj':torch.stack([single[f'model.layers.3.mlp.experts.{i}.down_proj.weight'] for i in range(16)]),
             'model.layers.3.mlp.experts.gate_up_proj':torch.stack([torch.cat([single[f'model.layers.3.mlp.experts.{i}.{p}_proj.weight'] for p in ('gate', 'up')]) for i in range(16)])}
    reports = {}
    for name,tensors in (('single', single), ('fused', fused)):
        (tmp_path/name).mkdir()
        save_file(tensors, tmp_path/name/'model.safetensors', metadata={'format':'pt'})
        (tmp_path/name/'config.json').write_text((src/'config.json').read_text())
        quantize_checkpoint(tmp_path/name, tmp_path/f'{name}-q', bits=4, progress=False)
        reports[name] = tensor_report(tmp_path/name, tmp_path/f'{name}-q')
    one, other = reports['single'], reports['fused']
    assert len(one.rows) == 48 and len(other.rows) == 32
    assert one.pooled() == pytest.approx(other.pooled(), rel=1e-9)
    got = {r.name:r.error for r in other.rows}
    for r in one.rows:
        if 'down_proj' in r.name: assert got[f"model.layers.3.mlp.experts.down_proj_e{r.name.split('.')[-3]}"] == pytest.approx(r.error, rel=1e-12)
    assert {r.layer for r in other.rows} == {3} and set(other.kinds) == {'experts'}
    with pytest.raises(UnsupportedError, match='no HLWQ codes'): tensor_report(tmp_path/'single', tmp_path/'single')
    with pytest.raises(ConfigError, match='no tensor'): tensor_report(tmp_path/'single', tmp_path/'fused-q')

"The page of a checkpoint: complete, escaped, asking nothing of the network; and the numbers under its figures"
import html.parser,json,re,shutil
from pathlib import Path
import pytest,torch
import hlwq
from hlwq import CheckpointReader,html_report,quantize_checkpoint
from hlwq.core import ConfigError,asset_path
from hlwq.hub import EVALUATION
from hlwq.report import bits_by_layer,code_usage,html_table,sample_codes
from kit import toy,write_model

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Two widths, and a matrix whose width is no multiple of 128"
    d = tmp_path_factory.mktemp('report')
    write_model(d/'src', toy(hidden=200))
    (d/'r.toml').write_text('[[rules]]\nmatch = "down_proj"\nbits = 8\n')
    quantize_checkpoint(d/'src', d/'q', bits=4, recipe=d/'r.toml', progress=False)
    return d

@pytest.fixture(scope='module')
def page(made): return html_report(made/'q', source=made/'src')

class Tags(html.parser.HTMLParser):
    "Checks that elements close in order; notes ids and what attributes refer to"
    VOID = {'meta','br','link','img','input'}
    def __init__(self): super().__init__(); self.open,self.seen,self.refs = [],[],[]
    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID: self.open.append(tag)
        self.refs += [(tag,k,v) for k,v in attrs if k in ('src','href','xlink:href','data','action','poster') or 'url(' in (v or '')]
    def handle_startendtag(self, tag, attrs): self.handle_starttag(tag, attrs); self.open and tag not in self.VOID and self.open.pop()
    def handle_endtag(self, tag): assert self.open.pop() == tag

def test_well_formed_and_alone(page):
    t = Tags(); t.feed(page)
    assert not t.open and not {'script','img','link','iframe','image','object'} & set(t.seen)
    assert t.seen.count('svg') == 5 and page.count('aria-label="') >= 5
    for tag,_,v in t.refs: assert v.startswith('#') or re.search(r'url\(#', v), (tag,v)
    assert "default-src 'none'" in page and 'prefers-color-scheme:dark' in page

def test_figures_take_the_colour_of_the_text(page):
    for svg in re.findall(r'<svg.*?</svg>', page, re.S):
        assert 'currentColor' in svg and '#010203' not in svg and '<metadata' not in svg
        assert not re.search(r'<text[^>]*fill: #(000000|262626)', svg)

def test_has_all_sections(page):
    for t in ('How it was made','Size and coverage','Predicted and measured','Bits by layer','Norms','Codes','Error by layer','How much was lost'): assert f'<h2>{t}</h2>' in page

def test_same_page_twice(made, page): assert html_report(made/'q', source=made/'src') == page

def test_names_are_escaped(made, tmp_path):
    q = shutil.copytree(made/'q', tmp_path/'<b>&"q"')
    (q/EVALUATION).write_text(json.dumps(dict(ppl_a=1., ppl_b=2., ratio=2., kl=.1, top1=.5, n_tokens=10, n_windows=1, text=['<script>alert(1)</script>'])))
    page = html_report(q, tmp_path/'r.html')
    assert page == (tmp_path/'r.html').read_text(encoding='utf-8') and 'Error by layer' not in page      # without the original
    assert '<script' not in page and '<b>&"q"' not in page and '&lt;b&gt;&amp;&quot;q&quot;' in page and '50.00' in page
    assert html_table(('<i>',), [('</table>',)]).count('<') == html_table(('i',), [('t',)]).count('<')

def test_writes_where_it_can(made, tmp_path):
    for bad in (tmp_path, tmp_path/'no'/'r.html'):
        with pytest.raises(ConfigError, match='need a file'): html_report(made/'q', bad)

def test_bits(made):
    with CheckpointReader(made/'q') as r: b = bits_by_layer(r)
    e,d = 384*200,200*192
    assert b['attention', 0] == 4 and b['routers', 1] == 16 and b['embedding', -1] == 16
    assert b['experts', 0] == pytest.approx((4*e + 8*d)/(e + d))

def test_sample_counts_weights_only(made):
    with CheckpointReader(made/'q') as r:
        s = sample_codes(r, 1000, rows=10**6)
        assert s['matrices'] == len(r.names) and s['numbers'] == sum(m.shape[0]*m.shape[1] for m in r.matrices.values())
        whole = sum(m.shape[0]*(m.shape[1]//128)*128 for m in r.matrices.values())      # of blocks with padding no code is counted
        assert sum(int(n.sum()) for n in s['codes'].values()) == whole and set(s['codes']) == {4,8}
        few = sample_codes(r, 3, rows=7)
        assert few['matrices'] == 3 and few['numbers'] < s['numbers']
        with pytest.raises(ConfigError): sample_codes(r, 0)

def test_usage():
    book = hlwq.codebook('lloyd-max', 4)
    q = hlwq.quantize(torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)), bits=4)
    n = torch.bincount(q.codes.flatten().int(), minlength=16)
    good,bad = code_usage(n, book),code_usage(n, hlwq.codebook('trunc4', 4))
    assert good['distance'] < .01 < bad['distance'] and 3.6 < good['entropy'] < 4
    one = torch.zeros(16); one[3] = 9
    assert code_usage(one, book)['entropy'] == 0

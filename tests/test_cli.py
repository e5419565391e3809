"The `hlwq` command as users and scripts meet it: output, one-line errors, exit codes, interruption"
import json,os,shlex,shutil,signal,subprocess,sys,time
from pathlib import Path
import pytest
from typer.testing import CliRunner
from common import ROOT
from hlwq import __version__
from hlwq.cli import app,main,resume_command
from hlwq import recipe
from hlwq.core import ConfigError,asset_path,parse_size
from hlwq.generate import GenerationReport,HLWQGenerator

TINY = asset_path('tiny-moe-10m')
COMMANDS = 'demo plan quantize verify inspect dequantize eval generate bench'.split()

@pytest.fixture(scope='module')
def q5(tmp_path_factory):
    "A quantized folder that no test may change"
    out = tmp_path_factory.mktemp('cli')/'q5'
    assert main(['quantize', str(TINY), str(out), '--quiet']) == 0
    return out

@pytest.fixture
def hlwq(capsys, tmp_path, monkeypatch):
    "Runs a command in this process, in an empty folder: exit code, stdout, stderr"
    monkeypatch.chdir(tmp_path)
    def run(*args):
        capsys.readouterr()
        code = main([str(a) for a in args])
        return code,*capsys.readouterr()
    return run

def process(*args, code='from hlwq.cli import main; import sys; sys.exit(main())', **kw):
    "The command as a process of its own"
    return subprocess.Popen([sys.executable,'-c',code,*map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def fails(found, *needles):
    "One line on stderr, nothing on stdout, exit code 2"
    code,out,err = found
    assert (code,out) == (2,'') and err.startswith('hlwq: ') and err.count('\n') == 1, (code,out,err)
    for n in needles: assert n in err

def test_help_names_every_command():
    r = CliRunner().invoke(app, ['--help'], env=dict(COLUMNS='120'))
    assert r.exit_code == 0 and all(c in r.output for c in COMMANDS)

@pytest.mark.parametrize('name', COMMANDS)
def test_each_command_explains_itself(name):
    "A summary, an example that could be typed, and help for every option"
    r = CliRunner().invoke(app, [name,'--help'], env=dict(COLUMNS='200'))
    assert r.exit_code == 0 and f'hlwq {name}' in r.output.split('xample')[-1]
    command = next(c for c in app.registered_commands if c.name == name)
    assert command.callback.__doc__ and command.epilog

def test_bare_command_and_version(hlwq):
    code,out,err = hlwq()
    assert (code,err) == (0,'') and 'Usage' in out
    assert hlwq('--version') == (0,f'hlwq {__version__}\n','')

def test_help_is_cheap():
    "Neither --help nor --version loads torch, and plan does without transformers"
    code = '''
import sys
from hlwq.cli import main
main(['--help']); main(['plan','--help'])
early = 'torch' in sys.modules
main(['plan', sys.argv[1]])
print(early, sorted({'transformers','matplotlib'} & sys.modules.keys()))'''
    out,err = process(TINY, code=code).communicate()
    assert out.splitlines()[-1] == 'False []', err

@pytest.mark.parametrize('line,needle', [
    ('quantise a b', "No such command 'quantise'"), ('plan', 'hlwq plan --help'), ('plan a --bit 4', '--bit'), ('plan a --min-coverage 90', '--min-coverage'),
    ('quantize a', "'OUT'"), ('eval a --text b', '--against'), ('plan nowhere', 'nowhere: no such file or folder'), ('verify nowhere', 'no such folder'), ('inspect nowhere', 'no such file or folder'),
    ('dequantize nowhere out', 'no such file or folder'), ('demo --out file.txt', 'file.txt: a file')])
def test_wrong_commands(hlwq, line, needle):
    Path('file.txt').write_text('')
    fails(hlwq(*shlex.split(line)), needle)
    assert [o.name for o in Path().iterdir()] == ['file.txt']

@pytest.mark.parametrize('bits', ['0','1.5','9','five'])
def test_wrong_bits(hlwq, bits):
    for command in (['plan',TINY],['quantize',TINY,'out']): fails(hlwq(*command,'--bits',bits), 'need one of 2, 3, 4, 5, 6, 8')

@pytest.mark.parametrize('options,needle', [('--norm l3','norm'), ('--codebook gauss','codebook'), ('--device cuda:77','device'), ('--max-shard-size 5apples','5GB'), ('--recipe none.toml','none.toml: No such file'), ('--recipe typo.toml','did you mean')])
def test_wrong_options(hlwq, options, needle):
    Path('typo.toml').write_text("[[rules]]\nmatch = 'down_porj'\nbits = 4\n")
    fails(hlwq('quantize', TINY, 'out', *options.split()), needle)
    assert not Path('out').exists() and not Path('out.partial').exists()

def spoilt(kind):
    "A copy of the model with one fault"
    shutil.copytree(TINY, kind)
    weights = Path(kind)/'model.safetensors'
    raw = weights.read_bytes()
    if kind == 'cut': weights.write_bytes(raw[:-1000])
    if kind == 'lfs': weights.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 19749192\n')
    if kind == 'gone': weights.unlink()
    if kind == 'empty': weights.write_bytes(b'')
    if kind == 'pickle': weights.rename(weights.with_name('pytorch_model.bin'))
    if kind == 'index': weights.with_name('model.safetensors.index.json').write_text(json.dumps(dict(weight_map={'model.norm.weight':'model-00001-of-00002.safetensors'})))
    return kind

@pytest.mark.parametrize('kind,needle', [('cut','incomplete download'), ('lfs','git lfs pull'), ('gone','no weights'), ('empty','empty file'), ('pickle','pickle checkpoints are not read'), ('index','missing')])
def test_bad_sources(hlwq, kind, needle):
    spoilt(kind)
    if kind == 'index': (Path(kind)/'model.safetensors').unlink()
    for command in (['plan',kind],['quantize',kind,'out'],['inspect',kind]): fails(hlwq(*command), needle)
    assert sorted(o.name for o in Path().iterdir()) == [kind]

def test_output_in_the_way(hlwq, q5):
    fails(hlwq('quantize', TINY, TINY), 'same folder')
    fails(hlwq('quantize', q5, 'out'), 'already quantized')
    Path('out').mkdir(); Path('out/mine').write_text('keep me')
    fails(hlwq('quantize', TINY, 'out'), 'exists already')
    assert Path('out/mine').read_text() == 'keep me'
    fails(hlwq('dequantize', q5, 'out'), 'exists already')
    fails(hlwq('quantize', TINY, 'out', '--overwrite'), 'hlwq did not make it')           # only its own work is ever replaced
    assert Path('out/mine').read_text() == 'keep me'
    shutil.rmtree('out'); shutil.copytree(q5, 'out')
    assert hlwq('quantize', TINY, 'out', '--overwrite', '--bits', 4)[0] == 0 and json.loads(Path('out/hlwq_config.json').read_text())['bits'] == 4

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_no_permission(hlwq):
    Path('locked').mkdir(mode=0o500)
    fails(hlwq('quantize', TINY, 'locked/out'), 'permission')

def test_json_is_one_object(hlwq, q5):
    plan = json.loads(hlwq('plan', TINY, '--json')[1])
    assert (plan['n_matrices'],plan['n_keys'],len(plan['rows'])) == (217,651,255)
    made = json.loads(hlwq('quantize', TINY, 'q3', '--bits', '3', '--json')[1])
    assert made['nbytes_after'] < made['nbytes_before'] and made['seconds']['total'] > 0
    assert json.loads(hlwq('verify', q5, '--json')[1])['ok'] is True
    assert json.loads(hlwq('inspect', q5, '--json')[1])['n_matrices'] == 217
    assert json.loads(hlwq('inspect', q5, 'model.norm.weight', '--json')[1])['dtype'] == 'BF16'
    assert json.loads(hlwq('dequantize', 'q3', 'plain', '--dtype', 'float32', '--json')[1])['dtype'] == 'float32'

def test_recipe_sets_the_bits(hlwq):
    "Without --bits the recipe decides, with it the command line"
    Path('r.toml').write_text("bits = 4\n")
    assert json.loads(hlwq('quantize', TINY, 'a', '--recipe', 'r.toml', '--json')[1])['bits_per_weight'] == pytest.approx(4.125)
    assert json.loads(hlwq('plan', TINY, '--recipe', 'r.toml', '--bits', '6', '--json')[1])['bits_per_weight'] == pytest.approx(6.125)

def test_plan_lists_tensors(hlwq):
    code,out,_ = hlwq('plan', TINY, '--tensors')
    assert code == 0 and 'model.layers.0.mlp.gate.weight' in out and 'router' in out and max(map(len, out.splitlines())) < 200

def test_verify_tells_good_from_bad(hlwq, q5):
    assert hlwq('verify', q5)[0] == hlwq('verify', q5, '--quick')[0] == 0
    shutil.copytree(q5, 'bad')
    f = next(Path('bad').glob('*.safetensors'))
    raw = bytearray(f.read_bytes()); raw[-3] ^= 4; f.write_bytes(raw)
    code,out,err = hlwq('verify', 'bad')
    assert (code,err) == (1,'') and f.name in out and 'sha256' in out
    assert hlwq('verify', 'bad', '--quick')[0] == 0
    f.write_bytes(raw[:-1])
    assert hlwq('verify', 'bad', '--quick')[0] == 1
    Path('bad/hlwq_manifest.json').unlink()
    assert hlwq('verify', 'bad')[0] == 1

def test_inspect_shows_one_matrix(hlwq, q5):
    code,out,_ = hlwq('inspect', q5, 'model.layers.3.self_attn.q_proj.weight')
    assert code == 0 and '512 x 256 at 5 bits' in out and len([l for l in out.splitlines() if l.rstrip().endswith('#')]) >= 30
    fails(hlwq('inspect', q5, 'self_attn.q_proj'), 'did you mean model.layers.3.self_attn.q_proj.weight')

def test_generate(hlwq, q5):
    "The text as it comes, or JSON with the speed; greedy is repeatable"
    a,b = (json.loads(hlwq('generate', q5, '--prompt', 'In the beginning', '--max-new-tokens', '8', '--json')[1]) for _ in range(2))
    assert a['text'] == b['text'] and a['tokens'] == 8 and a['tokens_per_second'] > 0
    assert hlwq('generate', q5, '--prompt', 'In the beginning', '--max-new-tokens', '8')[1].strip() == ('In the beginning' + a['text']).strip()
    fails(hlwq('generate', TINY, '--prompt', 'x'), 'no HLWQ codes')
    fails(hlwq('generate', q5, '--prompt', ''), "prompt: no token in ''")

def test_generate_with_experts_on_the_host(hlwq, q5):
    "The same text, and what the slots did"
    line = ('generate', q5, '--prompt', 'In the beginning', '--max-new-tokens', '8', '--json')
    a,(code,out,err) = json.loads(hlwq(*line)[1]),hlwq(*line, '--expert-cache', '3', '--host', 'pageable')
    b = json.loads(out)
    assert code == 0 and a['text'] == b['text'] and b['offload']['slots'] == b['offload_plan']['slots'] == 3 and b['offload_plan']['where'] == 'pageable'
    assert 'expert_cache: 3 of 16 experts' in err and 'slots         3 of 16' in err and sum(c['misses'] for c in b['offload']['cold']) > 0
    assert json.loads(hlwq(*line, '--expert-cache', 'auto')[1])['offload']['slots'] == 16
    for v,needle in (('disk', 'need one of device, host'), ('host', 'tied to the output layer')): fails(hlwq(*line, '--quiet', '--expert-cache', '2', '--embeddings', v), needle)

def test_generate_tells_how_fast_and_by_what(hlwq, q5):
    code,out,err = hlwq('generate', q5, '--prompt', 'In the beginning', '--max-new-tokens', '8', '--json')
    r = json.loads(out)['report']
    assert code == 0 and (r['new_tokens'],r['step'],r['fallback'],r['no_kernels'],r['interrupted'],r['capture_seconds']) == (8,'transformers','','',False,None)
    assert r['prompt_tokens'] > 0 and r['prompt_tokens_per_second'] == r['prompt_tokens']/r['first_seconds'] and r['decode_tokens_per_second'] == 7/r['decode_seconds']
    last = err.splitlines()[-1]
    for part in (f"{r['prompt_tokens']} tokens read at {r['prompt_tokens_per_second']:,.1f} tokens/s", f"after {1e3*r['first_seconds']:,.0f} ms", f"8 written at {r['decode_tokens_per_second']:,.1f} tokens/s", 'step: transformers; weights: '): assert part in last
    assert hlwq('generate', q5, '--prompt', 'In the beginning', '--max-new-tokens', '8', '--quiet')[1:] == ('','')

def test_told():
    "What the last line says where more happened than on a CPU"
    from hlwq.cli import _told
    some = dict(rows=1, prompt_tokens=5, new_tokens=9, first_seconds=.1, decode_seconds=.2)
    line = _told(GenerationReport(**some, capture_seconds=.13, step='kernels, recorded'), ['triton'])
    assert line == '5 tokens read at 50.0 tokens/s, the first new one after 100 ms, 9 written at 40.0 tokens/s, of which 0.1 s were recording; step: kernels, recorded; weights: triton'
    assert 'step: transformers, recorded (no kernels: HLWQ_KERNELS=off); ' in _told(GenerationReport(**some, step='transformers, recorded', no_kernels='HLWQ_KERNELS=off'), ['dense'])
    assert 'step: model.generate because it is new; ' in _told(GenerationReport(**some, step='model.generate', fallback='it is new'), ['dense'])
    assert '1 written; step' in _told(GenerationReport(**{**some, 'new_tokens':1}, step='transformers'), ['dense'])

def test_generate_passes_its_options_on(hlwq, q5, monkeypatch):
    "Each option arrives under the name that the generator has for it, and the text is that of the same call in Python"
    asked,call = [],HLWQGenerator.__call__
    def noting(self, ids, n, **kw):
        asked.append((self.prefill_chunk, n, kw))
        return call(self, ids, n, **kw)
    monkeypatch.setattr(HLWQGenerator, '__call__', noting)
    options = '--max-new-tokens 30 --temperature 0.9 --top-k 40 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.2 --seed 5 --prefill-chunk 3'.split()
    r = json.loads(hlwq('generate', q5, '--prompt', 'In the beginning', *options, '--stop', ',', '--stop', 'zzz', '--json')[1])
    chunk,n,kw = asked.pop()
    assert (chunk,n) == (3,30) and {k:kw[k] for k in ('do_sample','temperature','top_k','top_p','min_p','repetition_penalty','seed')} == dict(do_sample=True, temperature=.9, top_k=40, top_p=.9, min_p=.01, repetition_penalty=1.2, seed=5)
    assert kw['stop'] == [',','zzz'] and kw['streamer'] is None
    assert r['text'].count(',') <= 1 and (r['text'].endswith(',') or r['tokens'] == 30 or ',' not in r['text'])
    assert json.loads(hlwq('generate', q5, '--prompt', 'In the beginning', *options, '--stop', ',', '--stop', 'zzz', '--json')[1])['text'] == r['text']
    hlwq('generate', q5, '--prompt', 'In the beginning', '--max-new-tokens', '2')
    assert {k:v for k,v in asked[-1][2].items() if k in ('do_sample','temperature','top_k','top_p','min_p','repetition_penalty')} == dict(do_sample=False, temperature=None, top_k=None, top_p=None, min_p=None, repetition_penalty=None)

def test_stop_ends_the_text(hlwq, q5):
    free = json.loads(hlwq('generate', q5, '--prompt', 'In the beginning', '--max-new-tokens', '30', '--json')[1])['text']
    stop = free[10:14]
    code,out,_ = hlwq('generate', q5, '--prompt', 'In the beginning', '--max-new-tokens', '30', '--stop', 'never there', '--stop', stop)
    assert code == 0 and out.count(stop) == 1 and len(out.strip()) < len('In the beginning' + free) and ('In the beginning' + free).startswith(out.rstrip('\n'))

@pytest.mark.parametrize('line,needle', [('--temperature -1','temperature: -1'), ('--max-new-tokens 0','need at least 1'), ('--prefill-chunk 0','prefill-chunk: 0'), ('--stop ""','stop: an empty text'), ('--top-p 0.9','top-p: 0.9 at temperature 0'),
    ('--top-k 5','top-k: 5 at temperature 0'), ('--min-p 0.1','min-p: 0.1 at temperature 0'), ('--temperature 1 --top-k 0','top_k: 0'), ('--temperature 1 --top-p 1.5','top_p: 1.5'), ('--temperature nan','temperature: nan'), ('--repetition-penalty 0','repetition_penalty: 0'),
    ('--temperature 1 --min-p 2','min_p: 2'), ('--top-k 1.5','--top-k'), ('--seed x','--seed'), ('--expert-cache some','--expert-cache'), ('--host mmap','without --expert-cache'), ('--embeddings host','without --expert-cache'), ('--vram-gb 3','without --expert-cache')])
def test_generate_refuses_before_loading(hlwq, monkeypatch, line, needle):
    from hlwq import demo,load
    def loaded(*a, **kw): pytest.fail('something was loaded')
    monkeypatch.setattr(load, 'load_model', loaded); monkeypatch.setattr(demo, 'load_tokenizer', loaded)
    fails(hlwq('generate', 'folder', '--prompt', 'x', *shlex.split(line)), needle)

def test_what_does_not_fit_is_one_line(hlwq, q5): fails(hlwq('generate', q5, '--prompt', 'x', '--max-new-tokens', '100000', '--quiet'), 'need at most 8,192 for this model')

@pytest.mark.parametrize('after', [1, 4])
def test_interrupted_text_is_given(hlwq, q5, monkeypatch, after):
    "Ctrl-C ends the text; what there is comes out, and the exit code is that of an interrupt"
    steps,choose = [],HLWQGenerator._choose
    def interrupting(self, b, logits):
        choose(self, b, logits); steps.append(1)
        if len(steps) == after: raise KeyboardInterrupt
    want = json.loads(hlwq('generate', q5, '--prompt', 'In the beginning', '--max-new-tokens', str(after), '--json')[1])['text']
    monkeypatch.setattr(HLWQGenerator, '_choose', interrupting)
    code,out,err = hlwq('generate', q5, '--prompt', 'In the beginning', '--json')
    r = json.loads(out)
    assert code == 130 and err.endswith('\nhlwq: interrupted\n') and r['report']['interrupted'] and (r['text'],r['tokens']) == (want,after)

def test_eval_needs_what_it_names(hlwq, q5):
    fails(hlwq('eval', q5, '--against', TINY, '--text', 'none.txt'), 'none.txt: no such file')
    fails(hlwq('eval', TINY, '--against', TINY, '--text', 'none.txt'), 'no HLWQ codes')
    fails(hlwq('eval', q5, '--against', q5, '--text', 'none.txt'), 'quantized itself')
    Path('m').mkdir(); shutil.copy(TINY/'model.safetensors', 'm'); Path('t.txt').write_text('a b c')
    fails(hlwq('eval', q5, '--against', 'm', '--text', 't.txt'), 'transformers loads no tokenizer')

def test_interrupt_prints_the_command_that_goes_on(tmp_path):
    "Ctrl-C between shards: exit code 130, the output absent, the printed command completes it"
    code = '''
import sys, time, hlwq.convert as c
def slowly(*a, f=c.write_shard): f(*a); time.sleep(.5)
c.write_shard = slowly
from hlwq.cli import main
sys.exit(main())'''
    args = ['quantize',str(TINY),'my model','--max-shard-size','1MB','--no-resume']
    p = process(*args, code=code, cwd=tmp_path)
    journal,end = tmp_path/'my model.partial/journal.jsonl',time.monotonic()+60
    while time.monotonic() < end and not (journal.exists() and journal.read_text().count('\n') >= 3): time.sleep(.02)
    p.send_signal(signal.SIGINT)
    out,err = p.communicate(timeout=60)
    assert (p.returncode,out) == (130,'') and 'Traceback' not in err and not (tmp_path/'my model').exists()
    again = shlex.split(err.strip().splitlines()[-1])
    assert again == ['hlwq',*args[:-1]]
    kept = journal.read_text().splitlines()[1:]
    assert len(kept) >= 2
    dates = {f:(tmp_path/'my model.partial'/f).stat().st_mtime_ns for f in (json.loads(l)['name'] for l in kept)}
    out,err = process(*again[1:], cwd=tmp_path).communicate()
    assert (tmp_path/'my model/hlwq_manifest.json').exists(), err
    assert {f:(tmp_path/'my model'/f).stat().st_mtime_ns for f in dates} == dates    # what was finished was not made again

def test_resume_command():
    assert resume_command(['quantize','a b','c$d','--no-resume','--bits','4']) == "hlwq quantize 'a b' 'c$d' --bits 4"

def test_closed_pipe_is_no_error():
    p = process('plan', TINY, '--tensors', '--json')
    p.stdout.close()
    assert p.wait(60) == 141 and p.stderr.read() == ''

def test_unexpected_errors(hlwq, monkeypatch):
    "A fault of the package itself: one line, and the traceback only if asked for"
    def broken(*args, **kw): raise RuntimeError('the sky\nis falling')
    monkeypatch.setattr(recipe, 'make_plan', broken)
    fails(hlwq('plan', TINY), 'unexpected RuntimeError: the sky is falling', 'HLWQ_DEBUG')
    monkeypatch.setenv('HLWQ_DEBUG', '1')
    with pytest.raises(RuntimeError): main(['plan',str(TINY)])

def test_sizes():
    assert [parse_size(s) for s in ('5GB','5 gb','1_000','2GiB','0.5MB')] == [5*10**9,5*10**9,1000,2**31,500_000]
    for bad in ('','B','GB','-5GB','five','1e400','nan','inf','5 GBB','5XB'):
        with pytest.raises(ConfigError): parse_size(bad)

def test_demo_keeps_off_foreign_files(hlwq):
    Path('d').mkdir(); Path('d/thesis.tex').write_text('x')
    fails(hlwq('demo','--out','d'), 'thesis.tex')
    assert Path('d/thesis.tex').read_text() == 'x'
    Path('d/hlwq-demo.json').write_text('{}')
    fails(hlwq('demo','--out','d'), 'thesis.tex')

"Cards and uploads: what a card says comes from the files, and nothing goes up that should not. The hub here is a dictionary"
import hashlib,json,shutil
from pathlib import Path
from types import SimpleNamespace
import pytest,yaml
from huggingface_hub.errors import HfHubHTTPError,RepositoryNotFoundError
from hlwq import model_card,push_to_hub,quantize_checkpoint
from hlwq.core import CheckpointError,ConfigError,asset_path
from hlwq.hub import EVALUATION,checkpoint_facts,files_to_push,made_by
from hlwq.recipe import make_plan
from kit import toy,write_model

EVAL = dict(ppl_a=21.3, ppl_a_error=None, ppl_b=21.35, ppl_b_error=.4, ratio=1.0023, ratio_error=.0004, kl=.0019, kl_error=.0001, top1=.974, top1_error=.002, n_tokens=16352, n_windows=32, window=512, text=['x/book.txt'])

def refused(code, kind=HfHubHTTPError): return kind(str(code), response=SimpleNamespace(status_code=code, headers={}, request=None))

class Hub:
    "HfApi as far as it is used; every call is noted, and `fails` names one that raises"
    def __init__(self, fails=None): self.repos,self.private,self.calls,self.fails = {},{},[],fails or {}
    def _call(self, name):
        self.calls.append(name)
        if name in self.fails: raise self.fails[name]
    def repo_info(self, repo):
        self._call('repo_info')
        if repo not in self.repos: raise refused(404, RepositoryNotFoundError)
        return SimpleNamespace(private=self.private[repo])
    def list_repo_files(self, repo):
        self._call('list_repo_files')
        return ['.gitattributes', *self.repos[repo]]
    def get_paths_info(self, repo, paths): return [SimpleNamespace(blob_id=hashlib.sha1(b'blob %d\0' % len(b) + b).hexdigest()) for b in (self.repos[repo][p] for p in paths)]
    def create_repo(self, repo, *, private, exist_ok):
        self._call('create_repo')
        self.repos.setdefault(repo, {}); self.private.setdefault(repo, private)
        return f'https://hub/{repo}'
    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message):
        self._call(f'upload {path_in_repo}')
        self.repos[repo_id][path_in_repo] = path_or_fileobj if isinstance(path_or_fileobj, bytes) else Path(path_or_fileobj).read_bytes()
    def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message):
        self._call('upload_folder')
        for n in delete_patterns or (): del self.repos[repo_id][n]
        for n in allow_patterns: self.repos[repo_id][n] = (Path(folder_path)/n).read_bytes()

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('hub')
    write_model(d/'src', toy())
    (d/'src/README.md').write_text('---\nlicense: apache-2.0\nlibrary_name: transformers\ntags: [chat]\nmodel-index: [{name: scores of the original}]\n---\n# Original\n')
    quantize_checkpoint(d/'src', d/'q', bits=5, progress=False)
    return d/'q'

@pytest.fixture
def q(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'q'))

def head_of(card): return yaml.safe_load(card.split('---\n')[1])

# --- the card

def test_header(q):
    h = head_of(model_card(q, base_model='a/b'))
    assert h['license'] == 'apache-2.0' and h['base_model'] == 'a/b' and h['base_model_relation'] == 'quantized'
    assert h['library_name'] == 'hlwq'                         # transformers would offer a snippet that loads random weights
    assert {'chat','hlwq','5-bit'} <= set(h['tags']) and h['pipeline_tag'] == 'text-generation'
    assert 'model-index' not in h                              # scores of the original are not those of this model

@pytest.mark.parametrize('head', ['---\n: [\n---\n', '---\n- a\n---\n', '', '---\nno end\n'])
def test_header_that_is_none(q, head):
    (q/'README.md').write_text(head + '# Original\n')
    card = model_card(q)
    assert head_of(card)['library_name'] == 'hlwq' and '# Original' in card and 'license' not in head_of(card)

def test_numbers_come_from_the_files(made):
    f,card = checkpoint_facts(made),model_card(made)
    plan = make_plan(made.parent/'src', bits=5)
    assert (f['n_matrices'],f['quantized'],f['numbers']) == (plan.n_matrices,plan.quantized_params,plan.total_params)
    assert f['bits_per_weight'] == pytest.approx(plan.bits_per_weight) and f['coverage'] == pytest.approx(plan.coverage)
    assert f['nbytes'] == f['predicted'] <= plan.output_nbytes
    assert f'{f["coverage"]:.1%}' in card and f'{f["numbers"]:,}' in card and f'{f["bits_per_weight"]:.3f} bits' in card

def test_snippet_imports_hlwq_first(q):
    code = model_card(q, repo='me/it').split('```python\n')[1].split('```')[0].splitlines()
    assert code[0].startswith('import hlwq') and any('from_pretrained("me/it"' in l for l in code)

def test_command_and_recipe(tmp_path, made):
    (tmp_path/'r.toml').write_text('[[rules]]\nmatch = "down_proj"\nbits = 8\n')
    quantize_checkpoint(made.parent/'src', tmp_path/'m', bits=4, norm='l2', codebook='inf100', recipe=tmp_path/'r.toml', progress=False)
    assert made_by(checkpoint_facts(tmp_path/'m')) == 'hlwq quantize SOURCE OUT --bits 4 --norm l2 --codebook inf100 --recipe RECIPE'
    card = model_card(tmp_path/'m')
    assert '`model.layers.*.mlp.experts.down_proj` (2): 8 bits' in card and {'4-bit','8-bit'} <= set(head_of(card)['tags'])

def test_evaluation(q):
    assert 'Not measured' in model_card(q)
    (q/EVALUATION).write_text(json.dumps(EVAL))
    card = model_card(q)
    assert '1.0023 ± 0.0004' in card and '0.0019 ± 0.0001' in card and '`book.txt`' in card and '| original | 21.3000 |' in card    # an unknown error is not made up
    assert EVALUATION in files_to_push(q)
    (q/EVALUATION).write_text('{')
    with pytest.raises(ConfigError, match='hlwq eval --json'): model_card(q)

def test_card_is_stable(q):
    (q/'README.md').write_text(one := model_card(q, base_model='a/b'))
    assert model_card(q) == one and one.count('# Original') == 1

def test_card_needs_codes(tmp_path):
    with pytest.raises(NotImplementedError, match='no HLWQ codes'): model_card(asset_path('tiny-moe-10m'))

# --- the upload

def test_dry_run_touches_no_network(q, monkeypatch):
    import socket
    def no(*a, **k): raise AssertionError('network')
    monkeypatch.setattr(socket.socket, 'connect', no)
    monkeypatch.delenv('HF_TOKEN', raising=False)
    api = Hub()
    r = push_to_hub(q, 'me/it', dry_run=True, api=api)
    assert api.calls == [] and r.dry_run and r.url is None and r.nbytes == sum(r.files.values())
    assert all((q/n).stat().st_size == b for n,b in r.files.items() if n != 'README.md')
    assert r.files['README.md'] == len(model_card(q, repo='me/it').encode())

def test_sends_what_belongs_and_nothing_else(q):
    (q/'.env').write_text('secret'); (q/'notes.txt').write_text('mine')
    api = Hub()
    r = push_to_hub(q, 'me/it', api=api)
    sent = api.repos['me/it']
    assert set(sent) == set(r.files) and not {'.env','notes.txt'} & set(sent) and api.private['me/it']
    assert all(sent[n] == (q/n).read_bytes() for n in sent if n != 'README.md')
    assert sent['README.md'].decode() == model_card(q, repo='me/it')
    ups = [c for c in api.calls if c.startswith('upload')]
    assert ups == ['upload hlwq_manifest.json','upload_folder','upload README.md']
    assert (q/'README.md').read_text() != sent['README.md'].decode()     # the folder itself is left as it is

def test_public(q):
    api = Hub()
    push_to_hub(q, 'me/it', private=False, api=api)
    assert not api.private['me/it']
    with pytest.raises(ConfigError, match='a public repository'): push_to_hub(q, 'me/it', overwrite=True, api=api)
    api.private['me/it'] = True
    assert push_to_hub(q, 'me/it', private=False, overwrite=True, api=api).private and api.private['me/it']      # an existing one is not opened, and the report says so

def test_does_not_overwrite(q):
    api = Hub()
    api.repos['me/it'],api.private['me/it'] = {'README.md':b'by hand', 'model-00009-of-00009.safetensors':b'old'},True
    before = dict(api.repos['me/it'])
    with pytest.raises(ConfigError, match='need an empty repository'): push_to_hub(q, 'me/it', api=api)
    asked = []
    with pytest.raises(ConfigError): push_to_hub(q, 'me/it', api=api, confirm=lambda s: asked.append(s))
    assert api.repos['me/it'] == before and len(asked) == 1 and '2 files' in asked[0]
    r = push_to_hub(q, 'me/it', api=api, confirm=lambda s: True)
    assert r.removed == ['model-00009-of-00009.safetensors'] and set(api.repos['me/it']) == set(r.files)

def test_goes_on(q):
    api = Hub(dict(upload_folder=OSError('gone')))
    with pytest.raises(OSError, match='gone'): push_to_hub(q, 'me/it', api=api)
    assert set(api.repos['me/it']) == {'hlwq_manifest.json'}
    api.fails = {}
    push_to_hub(q, 'me/it', api=api)
    with pytest.raises(ConfigError, match='need an empty'): push_to_hub(q, 'me/it', api=api)      # finished: now it is somebody's

def test_does_not_go_on_with_another(q):
    api = Hub()
    api.repos['me/it'],api.private['me/it'] = {'hlwq_manifest.json':b'{}'},True
    with pytest.raises(ConfigError, match='need an empty'): push_to_hub(q, 'me/it', api=api)

def test_damaged_folder_stays_here(q):
    f = next(q.glob('*.safetensors'))
    b = bytearray(f.read_bytes()); b[-1] ^= 1; f.write_bytes(b)
    api = Hub()
    with pytest.raises(CheckpointError, match='sha256'): push_to_hub(q, 'me/it', api=api)
    (q/'hlwq_manifest.json').unlink()
    with pytest.raises(CheckpointError, match='manifest'): push_to_hub(q, 'me/it', dry_run=True)
    assert api.calls == []

def test_no_token(q, monkeypatch):
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    with pytest.raises(ConfigError, match='hf auth login'): push_to_hub(q, 'me/it')

@pytest.mark.parametrize('repo', ['it', 'a/b/c', '/it', 'me/', '../x', 'me/ it', None])
def test_names_of_repositories(q, repo):
    with pytest.raises(ConfigError, match='OWNER/NAME'): push_to_hub(q, repo, dry_run=True)

@pytest.mark.parametrize('at', ['repo_info','create_repo','upload_folder'])
def test_refused(q, at):
    with pytest.raises(ConfigError, match='refuses .403.'): push_to_hub(q, 'me/it', api=Hub({at:refused(403)}))
    with pytest.raises(HfHubHTTPError): push_to_hub(q, 'me/it', api=Hub({at:refused(500)}))

def test_the_real_client_takes_these_calls():
    "The dictionary above has methods that huggingface_hub has too, with the same parameters"
    import inspect
    from huggingface_hub import HfApi
    bind = lambda name,*a,**k: inspect.signature(getattr(HfApi, name)).bind(None, *a, **k)
    bind('repo_info', 'a/b'); bind('list_repo_files', 'a/b'); bind('get_paths_info', 'a/b', ['f']); bind('create_repo', 'a/b', private=True, exist_ok=True)
    bind('upload_file', path_or_fileobj=b'', path_in_repo='f', repo_id='a/b', commit_message='m')
    bind('upload_folder', repo_id='a/b', folder_path='f', allow_patterns=[], delete_patterns=None, commit_message='m')

# --- the command

@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    from hlwq.cli import main
    monkeypatch.chdir(tmp_path)
    def run(*args):
        capsys.readouterr()
        return main([str(a) for a in args]),*capsys.readouterr()
    return run

def test_card_command(q, run):
    before = (q/'README.md').read_text()
    code,out,err = run('card', q, '--base-model', 'a/b')
    assert (code,err) == (0,'') and out == model_card(q, base_model='a/b') and (q/'README.md').read_text() == before
    assert run('card', q, '--base-model', 'a/b', '--write')[0] == 0 and (q/'README.md').read_text() == out
    assert run('card', q)[1] == out and run('verify', q)[0] == 0          # a card is no part of the manifest

def test_push_command(q, run, monkeypatch):
    code,out,err = run('push', q, 'me/it', '--dry-run', '--json')
    assert (code,err) == (0,'') and json.loads(out)['dry_run'] and json.loads(out)['private'] and 'README.md' in json.loads(out)['files']
    api = Hub()
    monkeypatch.setattr('hlwq.hub._api', lambda token: api)
    code,out,err = run('push', q, 'me/it', '--public', '--quiet')
    assert (code,err) == (0,'') and 'pushed' in out and 'public' in out and not api.private['me/it']
    code,out,err = run('push', q, 'me/it', '--public', '--quiet')         # nobody can be asked here
    assert code == 2 and out == '' and '--yes' in err and err.count('\n') == 1
    assert run('push', q, 'me/it', '--public', '--yes')[0] == 0

def test_push_asks(q, run, monkeypatch):
    import io
    class Terminal(io.StringIO):
        def isatty(self): return True
    api = Hub()
    api.repos['me/it'],api.private['me/it'] = {'a.txt':b''},True
    monkeypatch.setattr('hlwq.hub._api', lambda token: api)
    for answer,code in (('n\n', 2),('y\n', 0)):
        monkeypatch.setattr('sys.stdin', Terminal(answer))
        found = run('push', q, 'me/it', '--quiet')
        assert found[0] == code and 'Overwrite?' in found[2] and ('README.md' in api.repos['me/it']) == (code == 0)

"""What goes wrong with real files, disks and processes, and what must be left behind.

Each test asks three things: the right error, with object, what was found, what is needed and what to do; the source untouched; and the
output in one of three states. D0: exactly as before. D1: no output yet, but whole shards and a journal, from which the same call goes on. D3: complete.
Root may write anywhere, so the tests of permissions give up root in a process of their own; a full disk is a small tmpfs where that can be
mounted, and a limit on the size of a file everywhere."""
import errno,json,os,re,resource,shutil,signal,stat,subprocess,sys,tempfile,warnings
from pathlib import Path
import pytest,torch
from safetensors.torch import load_file,save_file
import hlwq.checkpoint as checkpoint,hlwq.convert as convert
from hlwq.checkpoint import CheckpointReader,CheckpointWriter,verify_checkpoint
from hlwq.convert import apply_scale,cut_shards,dequantize_checkpoint,plan_units,quantize_checkpoint,unit_keys
from hlwq.core import *
from hlwq.core import HLWQWarning,asset_path
from hlwq.quantize import quantize
from hlwq.recipe import PlanRow,Recipe,Rule,make_plan
from kit import CONFIG,L,complete,decoded,gaussian,raw,snapshot,tensors_of,toy,write_model

TESTS,GOLDEN = Path(__file__).parent,Path(__file__).parent/'golden'
SHARD = 150_000                                                 # bytes in a shard: the toy model makes four

def convert_to(src, out, **kw): return quantize_checkpoint(src, out, progress=False, **{'max_shard_size':SHARD, **kw})

@pytest.fixture(scope='module')
def room():
    "A folder in memory where there is one: fsync is slow on a disk and these tests make thousands"
    base = '/dev/shm' if os.access('/dev/shm', os.W_OK) and shutil.disk_usage('/dev/shm').free > 1e9 else None
    d = Path(tempfile.mkdtemp(prefix='hlwq-', dir=base))
    yield d
    shutil.rmtree(d, ignore_errors=True)

@pytest.fixture(scope='module')
def model(room):
    "A source of two shards, which no test may change"
    return write_model(room/'model', toy(2, 256, 256, 2), 2)

@pytest.fixture(scope='module')
def clean(room, model):
    "What an undisturbed run makes of it, as hashes"
    convert_to(model, room/'clean')
    assert verify_checkpoint(room/'clean').ok and len(list((room/'clean').glob('*.safetensors'))) == 4
    return snapshot(room/'clean')

@pytest.fixture
def here(room):
    "An empty folder for one test"
    d = Path(tempfile.mkdtemp(dir=room))
    yield d
    shutil.rmtree(d, ignore_errors=True)

@pytest.fixture
def src(here, model):
    "A copy of the source for tests that break it"
    shutil.copytree(model, here/'src')
    return here/'src'

def refused(src, out, error, match, **kw):
    "The call fails with this error and leaves source and surroundings of the output exactly as they were; returns the message"
    src,out = Path(src),Path(out)
    before,around = snapshot(src, times=True),snapshot(out.parent)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(error, match=match) as e: convert_to(src, out, **kw)
    assert snapshot(src, times=True) == before, 'the source was changed'
    assert snapshot(out.parent) == around, 'something was left behind'
    assert type(e.value) is error or issubclass(error, OSError), f'{type(e.value)} is not {error}'
    if isinstance(e.value, OSError): assert e.value.errno and e.value.filename
    else: assert complete(e.value), f'not "object: found, need required; next step": {e.value}'
    return str(e.value)

# --- sources that are not what they should be

def edit_index(d, f):
    p = d/'model.safetensors.index.json'
    o = json.loads(p.read_text()); f(o); p.write_text(json.dumps(o))

def edit_config(d, **kw): (d/'config.json').write_text(json.dumps(json.loads((d/'config.json').read_text()) | kw))
def add_shard(d, **tensors):
    save_file({k.replace('__dot__', '.'):v for k,v in tensors.items()}, d/'extra.safetensors')
    edit_index(d, lambda o: o['weight_map'].update({k.replace('__dot__', '.'):'extra.safetensors' for k in tensors}))
def shard(d, i=1): return d/f'model-{i:05d}-of-00002.safetensors'
def only_pickle(d):
    for p in [*d.glob('*.safetensors*')]: p.unlink()
    (d/'pytorch_model.bin').write_bytes(b'\x80\x02}q\x00.')
def a_nan(d):
    t = load_file(shard(d)); t[L+'self_attn.q_proj.weight'][7, 9] = float('nan'); save_file(t, shard(d), metadata={'format':'pt'})
def an_inf_in_an_expert(d):
    t = load_file(shard(d)); t[L+'mlp.experts.gate_up_proj'][1, 2, 3] = float('inf'); save_file(t, shard(d), metadata={'format':'pt'})

BROKEN = dict(
    missing_shard=(lambda d: shard(d, 2).unlink(), CheckpointError, r'model-00002-of-00002.safetensors missing of 2.*incomplete download'),
    truncated=(lambda d: os.truncate(shard(d), shard(d).stat().st_size-1000), CheckpointError, r'\d+ bytes, need \d+ by its own header'),
    cut_in_header=(lambda d: os.truncate(shard(d), 100), CheckpointError, r'100 bytes, need at least \d+'),
    trailing=(lambda d: shard(d).open('ab').write(b'junk'), CheckpointError, 'bytes follow the last tensor'),
    lfs=(lambda d: shard(d).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n'), CheckpointError, 'Git LFS pointer.*git lfs pull'),
    html=(lambda d: shard(d).write_text('<!DOCTYPE html><html>Access denied'), CheckpointError, 'HTML'),
    empty_file=(lambda d: shard(d).write_bytes(b''), CheckpointError, 'empty file'),
    index_names_absent_key=(lambda d: edit_index(d, lambda o: o['weight_map'].update(ghost=shard(d).name)), CheckpointError, 'ghost .* in the index but not in the file'),
    stored_twice=(lambda d: add_shard(d, lm_head__dot__weight=torch.ones(2, 2)), CheckpointError, 'lm_head.weight stored twice'),
    no_index=(lambda d: (d/'model.safetensors.index.json').unlink(), CheckpointError, 'no model.safetensors.index.json'),
    index_not_json=(lambda d: (d/'model.safetensors.index.json').write_text('{'), CheckpointError, 'not valid JSON'),
    config_not_json=(lambda d: (d/'config.json').write_text('nope'), CheckpointError, 'config.json: not valid JSON'),
    traversal=(lambda d: edit_index(d, lambda o: o['weight_map'].update({'lm_head.weight':'../../etc/passwd'})), CheckpointError, 'unsafe shard path'),
    absolute=(lambda d: edit_index(d, lambda o: o['weight_map'].update({'lm_head.weight':'/etc/passwd'})), CheckpointError, 'unsafe shard path'),
    overlap=(lambda d: shard(d).write_bytes(raw({k:dict(dtype='F32', shape=[2], data_offsets=[a, a+8]) for k,a in (('a', 0), ('b', 4))}, b'x'*12)), CheckpointError, 'not a valid safetensors|by its own header'),
    overflow=(lambda d: shard(d).write_bytes(raw({'a':dict(dtype='F32', shape=[2**62, 8], data_offsets=[0, 8])}, b'x'*8)), CheckpointError, 'not a valid safetensors|shape'),
    strange_type=(lambda d: shard(d).write_bytes(raw({'a':dict(dtype='F4', shape=[4], data_offsets=[0, 2])}, b'xx')), UnsupportedError, 'F4'),
    pickle=(only_pickle, UnsupportedError, 'pytorch_model.bin.*convert to safetensors first'),
    pickle_in_disguise=(lambda d: shard(d).write_bytes(b'PK\x03\x04' + b'0'*100), UnsupportedError, 'pickle'),
    gguf=(lambda d: (only_pickle(d), (d/'pytorch_model.bin').rename(d/'model.gguf')), UnsupportedError, 'GGUF'),
    gptq=(lambda d: add_shard(d, layer__dot__qweight=torch.ones(2, 2), layer__dot__g_idx=torch.ones(2)), ConfigError, r'already quantized \(gptq\).*base model'),
    awq_by_config=(lambda d: edit_config(d, quantization_config=dict(quant_method='awq')), ConfigError, r'already quantized \(awq\)'),
    bitsandbytes=(lambda d: edit_config(d, quantization_config=dict(quant_method='bitsandbytes', load_in_4bit=True)), ConfigError, r'already quantized \(bitsandbytes\)'),
    unknown_method=(lambda d: edit_config(d, quantization_config=dict(w_bits=3)), ConfigError, r'already quantized \(unknown\)'),
    fp8_without_scale=(lambda d: add_shard(d, **{'model__dot__layers__dot__0__dot__mlp__dot__up_proj__dot__weight':torch.ones(128, 128).to(torch.float8_e4m3fn)}), CheckpointError, r'up_proj.weight: F8_E4M3 without its scale, need one of .*_scale_inv'),
    e8m0_without_weight=(lambda d: add_shard(d, x_scale=torch.ones(4).to(torch.float8_e8m0fnu)), UnsupportedError, 'x_scale: F8_E8M0 scales'),
    collision=(lambda d: add_shard(d, w__norms=torch.ones(2, 2)), CheckpointError, 'w__norms'),
    nan=(a_nan, NonFiniteError, r'q_proj.weight: 1 NaN and 0 infinite weights, the first at \(7, 9\).*repair'),
    inf_in_an_expert=(an_inf_in_an_expert, NonFiniteError, r'gate_up_proj_e1: 0 NaN and 1 infinite weights, the first at \(2, 3\).*repair'),
    uncovered=(lambda d: add_shard(d, big__dot__mystery=torch.ones(2000, 1000)), ConfigError, r'only \d+.\d% of the matrices would be quantized, without big.mystery \[2000, 1000\]'))

@pytest.mark.parametrize('case', BROKEN)
def test_broken_source(case, src, here):
    damage,error,match = BROKEN[case]
    damage(src)
    (here/'place').mkdir()
    refused(src, here/'place'/'out', error, match, max_shard_size=10**9)     # one shard: a NaN in a later one would leave those before it, for resuming
    assert not list((here/'place').iterdir())

def test_no_source(here, model):
    for path,error,match in ((here/'nothing', ConfigError, 'no such file or folder'), (here, CheckpointError, 'no weights')):
        with pytest.raises(error, match=match) as e: convert_to(path, here/'x'/'out')
        assert complete(e.value) and not (here/'x').exists()
    (here/'lone').mkdir(); shutil.copy(asset_path('tiny-moe-10m')/'config.json', here/'lone')
    refused(here/'lone', here/'out', ConfigError, 'only a config.json, need weights')
    refused(GOLDEN/'hlwq', here/'out', ConfigError, r'already quantized \(hlwq\)')

def test_first_eight_offenders_and_their_number(src, here):
    edit_index(src, lambda o: o['weight_map'].update({f'ghost{i}':shard(src).name for i in range(11)}))
    text = refused(src, here/'out', CheckpointError, 'ghost')
    assert 'ghost7' in text and 'ghost8' not in text and '3 more (11 in all)' in text

# --- requests that cannot be meant

@pytest.mark.parametrize('kw,error,match', [(dict(bits=b), ConfigError, 'need one of 2, 3, 4, 5, 6, 8') for b in (0, 1, 1.5, 7, 9, '5', True)] + [
    (dict(norm='l1'), ConfigError, "need 'gain' or 'l2'"), (dict(codebook='loyd-max'), ConfigError, 'unknown, need one of'), (dict(device='cuda:97'), ConfigError, "'cpu' always works"), (dict(device='tpu'), ConfigError, 'need one that this machine has'),
    (dict(recipe=Recipe(rules=[Rule('self_atn', bits=4)])), ConfigError, 'matches none of 15 tensors.*did you mean.*self_attn'), (dict(recipe=Recipe(rules=[Rule(r'mlp\.gate\.', bits=4)])), ConfigError, r'protected \(router\)'), (dict(recipe=42), ConfigError, 'need a Recipe')])
def test_bad_requests(kw, error, match, model, here): refused(model, here/'out', error, match, **kw)

def test_bad_recipe_files(model, here):
    for text,match in (('bits = 5\nrule = 3', 'rule, need only bits and'), ('bits = ', 'not TOML'), ("[[rules]]\nmatch = '['\nbits = 4", 'not a regular expression'), ('bits = 1', 'need one of'), ("[[rules]]\nmatch = 'q_proj'\nbit = 4", 'rule 1 has bit')):
        (here/'r.toml').write_text(text)
        refused(model, here/'out', ConfigError, match, recipe=here/'r.toml')
    with pytest.raises(FileNotFoundError) as e: convert_to(model, here/'out', recipe=here/'none.toml')
    assert e.value.filename and not (here/'out').exists()

# --- outputs that cannot be

def test_output_is_the_input(src, here):
    refused(src, src, ConfigError, 'same folder, need two')
    (here/'x').mkdir()
    refused(src, here/'x'/'..'/'src', ConfigError, 'same folder')
    os.symlink(src, here/'link')
    refused(src, here/'link', ConfigError, 'same folder')
    refused(here/'link', src, ConfigError, 'same folder')
    refused(src, src/'inside', ConfigError, 'need separate folders')
    refused(src, here, ConfigError, 'need separate folders')
    refused(src, here/'link'/'inside', ConfigError, 'need separate folders')

def test_output_exists(model, here):
    for n in ('note.txt', '.hidden'):
        (here/'out').mkdir(); (here/'out'/n).write_text('mine')
        assert 'overwrite=True' in refused(model, here/'out', FileExistsError, 'exists already')
        shutil.rmtree(here/'out')
    (here/'out').write_text('a file')
    refused(model, here/'out', FileExistsError, 'exists already')
    refused(model, here/'out', NotADirectoryError, 'is a file', overwrite=True)
    refused(model, here/'out'/'below', OSError, 'out')

def test_stage_that_is_somebody_elses(model, here):
    (here/'out.partial').mkdir(); (here/'out.partial'/'thesis.txt').write_text('mine')
    refused(model, here/'out', FileExistsError, 'not a half-finished checkpoint of hlwq; move it away')
    refused(model, here/'out', FileExistsError, 'not a half-finished checkpoint of hlwq; move it away', resume=False, overwrite=True)

def test_empty_folder_and_missing_parents_are_fine(model, here, clean):
    (here/'out').mkdir()
    convert_to(model, here/'out'); convert_to(model, here/'a'/'b'/'out')
    assert snapshot(here/'out') == clean == snapshot(here/'a'/'b'/'out')
    assert sorted(os.listdir(here)) == ['a', 'out'] and os.listdir(here/'a'/'b') == ['out']

def test_output_through_a_link(model, here, clean):
    "A link to an empty folder, and a link to nowhere: it works, or it fails before any work"
    (here/'real').mkdir()
    os.symlink(here/'real', here/'link'); os.symlink(here/'nowhere', here/'dangling')
    for link in ('link', 'dangling'):
        try: convert_to(model, here/link)
        except (HLWQError, OSError) as e:
            assert not list(here.glob('*.partial')), f'failed only at the end: {e}'
            continue
        assert snapshot(here/link) == clean
    os.makedirs(here/'cwd'/'inner')
    before = os.getcwd()
    try:
        os.chdir(here/'cwd'/'inner')
        try: convert_to(model, '.')
        except (HLWQError, OSError) as e: assert not os.path.exists('..partial') and not (here/'cwd'/'inner.partial').exists(), f'failed only at the end: {e}'
        else: assert snapshot(here/'cwd'/'inner') == clean
    finally: os.chdir(before)

# --- permissions

AS_NOBODY = """
import json,os,sys
from pathlib import Path
import hlwq.convert as c
src,base = Path(sys.argv[1]),Path(sys.argv[2])
c.quantize_checkpoint(src, base/'warm', progress=False)           # import everything while it can be read
if not os.geteuid():
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
res = []
for s,o in ((src, base/'ro'/'out'), (src, base/'rw'/'out'), (base/'unreadable', base/'rw'/'out2')):
    try: c.quantize_checkpoint(s, o, progress=False); res.append(['made'])
    except BaseException as e: res.append([type(e).__name__, getattr(e, 'errno', None), str(getattr(e, 'filename', None)), str(e)])
print(json.dumps(res))
"""

def test_no_permission(model):
    with tempfile.TemporaryDirectory() as d:
        base = Path(d); base.chmod(0o755)
        src = shutil.copytree(model, base/'src')
        for p in src.iterdir(): p.chmod(0o644)                  # the library writes them as 0600
        shutil.copytree(src, base/'unreadable'); shard(base/'unreadable').chmod(0)
        for n,mode in (('ro', 0o555), ('rw', 0o777)): (base/n).mkdir(); (base/n).chmod(mode)
        before = snapshot(src, times=True)
        r = subprocess.run([sys.executable, '-c', AS_NOBODY, src, base], capture_output=True, text=True, cwd=TESTS.parent)
        assert r.returncode == 0, r.stderr
        ro,rw,unreadable = json.loads(r.stdout.splitlines()[-1])
        assert ro[0] == 'PermissionError' and ro[1] == errno.EACCES and ro[2].endswith('ro/out.partial') and 'choose another output folder' in ro[3]
        assert rw == ['made'] and verify_checkpoint(base/'rw'/'out').ok
        assert unreadable[0] == 'PermissionError' and unreadable[2].endswith('.safetensors')
        assert not list((base/'ro').iterdir()) and os.listdir(base/'rw') == ['out'] and snapshot(src, times=True) == before
        (base/'ro').chmod(0o755)

@pytest.mark.parametrize('mask', [0o022, 0o027, 0o002])
def test_files_get_ordinary_permissions(mask, model, here):
    before = os.umask(mask)
    try:
        convert_to(model, here/'out')
        dequantize_checkpoint(here/'out', here/'plain', progress=False)
    finally: os.umask(before)
    for d in ('out', 'plain'):
        assert stat.S_IMODE((here/d).stat().st_mode) == 0o777 & ~mask
        assert {p.name for p in (here/d).iterdir() if stat.S_IMODE(p.stat().st_mode) != 0o666 & ~mask} == set()

# --- full disks

def test_too_full_from_the_start(model, here, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: real(p)._replace(free=123_000))
    text = refused(model, here/'out', OSError, '123.00 kB free, need 5..... kB')
    assert 'free some space' in text

def stopped_half_way(model, out, monkeypatch, after=2, error=KeyboardInterrupt, **kw):
    "Runs until some shards are whole, then raises"
    real,n = convert.write_shard,[0]
    def f(*a, **k):
        n[0] += 1
        if n[0] > after: raise error
        return real(*a, **k)
    with monkeypatch.context() as m:
        m.setattr(convert, 'write_shard', f)
        with pytest.raises(error if isinstance(error, type) else type(error)): convert_to(model, out, **kw)

def half_done(out, n):
    "D1: no output; in the stage a journal of n shards (None: some), which are whole, and nothing unfinished"
    stage = Path(f'{out}.partial')
    lines = [json.loads(l) for l in (stage/'journal.jsonl').read_text().splitlines()]
    shards = sorted(p.name for p in stage.glob('*.safetensors'))
    assert not Path(out).exists() and [l['name'] for l in lines[1:]] == shards and len(shards) == (n or len(shards)) > 0
    assert sorted(p.name for p in stage.iterdir()) == sorted([*shards, 'journal.jsonl', 'lock'])
    for l in lines[1:]: assert checkpoint.file_sha256(stage/l['name']) == l['sha256']

def test_file_size_limit_stands_in_for_a_full_disk(model, here, clean):
    "Python ignores SIGXFSZ, so that a write beyond the limit fails like one to a full disk"
    before,limit = snapshot(model, times=True),resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
    try:
        with pytest.raises(OSError) as e: convert_to(model, here/'out')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert e.value.errno == errno.EFBIG and e.value.filename and 'same command again: it resumes' in str(e.value)
    assert not list(here.iterdir()) and snapshot(model, times=True) == before
    convert_to(model, here/'out')
    assert snapshot(here/'out') == clean

@pytest.fixture
def small_disk(here):
    d = here/'disk'; d.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=320k', 'tmpfs', d], capture_output=True).returncode: pytest.skip('no tmpfs can be mounted here')
    yield d
    subprocess.run(['umount', '-l', d], check=True)

def test_disk_fills_up(small_disk, model, clean, monkeypatch):
    "The check beforehand is blinded; then space is made and the same call ends with the same bytes"
    before = snapshot(model, times=True)
    with monkeypatch.context() as m:
        real = shutil.disk_usage
        m.setattr(shutil, 'disk_usage', lambda p: real(p)._replace(free=10**12))
        with pytest.raises(OSError) as e: convert_to(model, small_disk/'out')
    assert e.value.errno == errno.ENOSPC and 'out.partial/model-0000' in e.value.filename and 'free some space, then run the same command again' in str(e.value)
    half_done(small_disk/'out', None)
    assert snapshot(model, times=True) == before
    subprocess.run(['mount', '-o', 'remount,size=320k', small_disk], check=True)
    with pytest.raises(OSError, match='free, need'): convert_to(model, small_disk/'out')       # now the check beforehand sees it
    half_done(small_disk/'out', None)
    subprocess.run(['mount', '-o', 'remount,size=4m', small_disk], check=True)
    convert_to(model, small_disk/'out')
    assert snapshot(small_disk/'out') == clean and os.listdir(small_disk) == ['out']

def test_output_is_a_mount_point(small_disk, model):
    "No folder can be renamed to one, so this has to fail before any work, not after all of it"
    with pytest.raises((OSError, ConfigError)) as e: convert_to(model, small_disk)
    assert not Path(f'{small_disk}.partial').exists(), f'failed only at the end: {e.value}'
    assert not list(small_disk.iterdir())

@pytest.mark.parametrize('short', [2, 3, 4, 5, 6, 8, 12])
def test_disk_full_at_any_file(short, small_disk, model, room, clean, monkeypatch):
    "Some pages too few for all files: whichever file meets the end of the disk, the error names one, and the same call goes on when there is room"
    def mount(pages): subprocess.run(['mount', '-o', f'remount,size={pages*4096}', small_disk], check=True)
    need = sum(-(-(room/'clean'/k).stat().st_size//4096) for k in clean) + 3     # and the journal, the lock, the folder
    mount(need - short)
    with monkeypatch.context() as m:
        real = shutil.disk_usage
        m.setattr(shutil, 'disk_usage', lambda p: real(p)._replace(free=10**12))
        with pytest.raises(OSError) as e: convert_to(model, small_disk/'out')
    assert e.value.errno == errno.ENOSPC and e.value.filename, repr(e.value)
    assert not (small_disk/'out').exists()
    mount(1024)
    convert_to(model, small_disk/'out')
    assert snapshot(small_disk/'out') == clean and os.listdir(small_disk) == ['out']

# --- a file system that fails

def failing(monkeypatch, name, n, code):
    "The n-th call of os.<name> fails; returns the counter"
    real,count = getattr(os, name),[0]
    def f(*a, **k):
        count[0] += 1
        if count[0] == n: raise OSError(code, os.strerror(code), *(str(o) for o in a[:1] if name != 'fsync'))    # as the real ones: fsync knows no name
        return real(*a, **k)
    monkeypatch.setattr(os, name, f)
    return count

@pytest.mark.parametrize('name', ['fsync', 'replace', 'rename'])
def test_each_call_fails_once(name, model, here, clean, monkeypatch):
    "Whichever fsync or rename fails: an OSError with errno and file, no half output, and the same call then succeeds"
    before,n,unnamed = snapshot(model, times=True),0,[]
    while True:
        n += 1
        out = here/f'out{n}'
        with monkeypatch.context() as m:
            count = failing(m, name, n, errno.EIO)
            try: convert_to(model, out)
            except OSError as e: said = e
            else: said = None
        if count[0] < n: break                                  # there are fewer calls than that
        if said is not None:
            assert said.errno == errno.EIO
            if not said.filename: unnamed.append(n)
            try: convert_to(model, out)
            except FileExistsError: pass                        # the very last fsync comes after the folder has its name
        assert snapshot(out) == clean and not Path(f'{out}.partial').exists(), n
    assert n > 1 and snapshot(model, times=True) == before
    assert not unnamed, f'no file name in the error of call {unnamed}'

def test_file_system_without_fsync(model, here, clean, monkeypatch):
    "EINVAL from fsync means that this file system has none: tolerated"
    def f(fd): raise OSError(errno.EINVAL, 'Invalid argument')
    monkeypatch.setattr(os, 'fsync', f)
    convert_to(model, here/'out')
    assert snapshot(here/'out') == clean

# --- interruption

def test_interrupted_in_the_first_shard_leaves_nothing(model, here, monkeypatch):
    stopped_half_way(model, here/'out', monkeypatch, after=0)
    assert not list(here.iterdir())

@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError, CheckpointError('x')])
@pytest.mark.parametrize('after', [1, 3])
def test_resumes_to_the_same_bytes(error, after, model, here, clean, monkeypatch):
    stopped_half_way(model, here/'out', monkeypatch, after, error)
    half_done(here/'out', after)
    kept = {p.name:p.stat().st_ino for p in (here/'out.partial').glob('*.safetensors')}
    convert_to(model, here/'out')
    assert snapshot(here/'out') == clean and os.listdir(here) == ['out']
    assert all((here/'out'/k).stat().st_ino == i for k,i in kept.items()), 'made again, though it was whole'

def test_starts_over_on_request(model, here, clean, monkeypatch):
    stopped_half_way(model, here/'out', monkeypatch, bits=3)
    convert_to(model, here/'out', resume=False)
    assert snapshot(here/'out') == clean and os.listdir(here) == ['out']

def test_damaged_stage(model, here, clean, monkeypatch):
    "A shard shorter than its journal says, a torn journal line, a stray temporary file: made again, or removed"
    stopped_half_way(model, here/'out', monkeypatch, 3)
    stage = here/'out.partial'
    a = sorted(stage.glob('*.safetensors'))[0]
    os.truncate(a, a.stat().st_size-1)
    j = (stage/'journal.jsonl').read_bytes()
    (stage/'journal.jsonl').write_bytes(j[:-20])
    (stage/'model-00004-of-00004.safetensors.tmp').write_bytes(b'0'*99); (stage/'.tmpAbC123').write_bytes(b'0'*99); (stage/'folder').mkdir()
    convert_to(model, here/'out')
    assert snapshot(here/'out') == clean

@pytest.mark.parametrize('text', [b'', b'\n', b'{}\n', b'[]\n', b'3\n', b'null\n', b'{"fingerprint": []}\n', b'{"fingerprint": 5}\n', b'\xff\xfe\x00\n', b'{"name": "x"}\n{"name": "y"}\n'])
def test_strange_journal(text, model, here, clean):
    "A journal that makes no sense is a refusal in words, or a new start"
    (here/'out.partial').mkdir(); (here/'out.partial'/'journal.jsonl').write_bytes(text)
    try: convert_to(model, here/'out')
    except HLWQError: convert_to(model, here/'out', resume=False)
    assert snapshot(here/'out') == clean

CHANGED = dict(bits=dict(bits=4), norm=dict(norm='l2'), codebook=dict(codebook='inf100'), max_shard_size=dict(max_shard_size=SHARD+1000), recipe=dict(recipe=Recipe(rules=[Rule('lm_head', bits=8)])), tool={}, source={}, config={})

@pytest.mark.parametrize('field', CHANGED)
def test_resume_with_another_setting_is_refused(field, src, here, clean, monkeypatch):
    stopped_half_way(src, here/'out', monkeypatch)
    before = {k:v for k,v in snapshot(here/'out.partial').items() if k != 'lock'}
    with monkeypatch.context() as m:
        if field == 'tool': m.setattr(convert, '__version__', '77.0')
        other = src
        if field in ('source', 'config'):
            other = shutil.copytree(src, here/'src2')
            if field == 'config': edit_config(other, rope_theta=5)
            else: save_file(load_file(shard(other)) | {'one_more.bias':torch.ones(3)}, shard(other), metadata={'format':'pt'})
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with pytest.raises(ResumeError) as e: convert_to(other, here/'out', **CHANGED[field])
    text = str(e.value)
    assert f'{field} was ' in text and complete(text) and 'resume=False' in text
    assert (here/'out.partial').exists(), 'the half-finished output was thrown away'
    assert {k:v for k,v in snapshot(here/'out.partial').items() if k != 'lock'} == before
    half_done(here/'out', 2)
    convert_to(src, here/'out')
    assert snapshot(here/'out') == clean

def test_dequantize_resumes_and_refuses_other_settings(room, clean, here, monkeypatch):
    q = room/'clean'
    dequantize_checkpoint(q, here/'want', max_shard_size=400_000, progress=False)
    real,n = checkpoint.CheckpointWriter.shard,[0]
    def f(*a, **k):
        n[0] += 1
        if n[0] > 1: raise KeyboardInterrupt
        return real(*a, **k)
    with monkeypatch.context() as m:
        m.setattr(checkpoint.CheckpointWriter, 'shard', f)
        with pytest.raises(KeyboardInterrupt): dequantize_checkpoint(q, here/'out', max_shard_size=400_000, progress=False)
    half_done(here/'out', 1)
    for kw in (dict(dtype=torch.float32), dict(max_shard_size=500_000), dict(codebook='inf100')):
        with pytest.raises(ResumeError): dequantize_checkpoint(q, here/'out', progress=False, **{'max_shard_size':400_000, **kw})
        half_done(here/'out', 1)
    dequantize_checkpoint(q, here/'out', max_shard_size=400_000, progress=False)
    assert snapshot(here/'out') == snapshot(here/'want')

# --- other processes

CHILD = """
import sys,time
from pathlib import Path
import hlwq.convert as c
real,n = c.quantize_rows,[0]
def slow(*a, **k):
    n[0] += 1
    if n[0] == 4:
        end = time.monotonic() + 60
        while not list(Path(sys.argv[2] + '.partial').glob('*.safetensors')) and time.monotonic() < end: time.sleep(.01)     # the first is closed by a thread
        print('in the second shard', flush=True); time.sleep(600)
    return real(*a, **k)
c.quantize_rows = slow
c.quantize_checkpoint(sys.argv[1], sys.argv[2], max_shard_size=int(sys.argv[3]), progress=False)
"""

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_and_the_lock(sig, model, here, clean):
    "While a process writes, a second one is told its number; the lock dies with the process; what is whole is used"
    p = subprocess.Popen([sys.executable, '-c', CHILD, model, here/'out', str(SHARD)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS.parent)
    try:
        assert p.stdout.readline() == 'in the second shard\n', p.stderr.read()
        n = len(list((here/'out.partial').glob('*.safetensors')))
        assert n >= 1
        for kw in ({}, dict(resume=False), dict(bits=3)):
            with pytest.raises(BlockingIOError, match=f'another hlwq .pid {p.pid}. is writing') as e: convert_to(model, here/'out', **kw)
            assert e.value.filename and len(list((here/'out.partial').glob('*.safetensors'))) == n
        p.send_signal(sig)
        p.communicate(timeout=60)
    finally:
        if p.poll() is None: p.kill(); p.communicate()
    assert p.returncode == -sig
    if sig == signal.SIGINT: half_done(here/'out', n)
    convert_to(model, here/'out')
    assert snapshot(here/'out') == clean and os.listdir(here) == ['out']

@pytest.mark.parametrize('mode,stride', [('quantize', 2), ('overwrite', 40), ('dequantize', 8)])
def test_killed_at_any_point(mode, stride, model, room, here, clean):
    "SIGKILL before and after each call that changes the disk; afterwards the same call leads to exactly what an undisturbed run makes"
    src = room/'clean' if mode == 'dequantize' else model
    r = subprocess.run([sys.executable, TESTS/'kill_at.py', src, here/'work', mode, str(stride)], capture_output=True, text=True, cwd=TESTS.parent)
    assert r.returncode == 0, r.stderr[-3000:]
    tries = json.loads(r.stdout)
    assert len(tries) >= 25 and all(t['killed'] == -signal.SIGKILL for t in tries)
    torn = [(t['n'], t['point'], t['left']) for t in tries if not t['whole']]
    lost = [(t['n'], t['point'], t['left'], t['again'], t['differ']) for t in tries if t['differ']]
    assert not torn, f'half an output under its final name: {torn}'
    assert not lost, f'{len(lost)} of {len(tries)} points do not lead back: {lost[:4]}'

# --- a source that changes

def test_source_rewritten_while_reading(src, here, monkeypatch):
    real,n = convert.write_shard,[0]
    def f(*a, **k):
        n[0] += 1
        if n[0] == 3: os.utime(shard(src, 2), ns=(1, 1))
        return real(*a, **k)
    monkeypatch.setattr(convert, 'write_shard', f)
    with pytest.raises(CheckpointError, match='changed while reading') as e: convert_to(src, here/'out')
    assert shard(src, 2).name in str(e.value) and complete(e.value)
    stage = here/'out.partial'
    assert not (here/'out').exists() and len((stage/'journal.jsonl').read_text().splitlines()) == 3 and not list(stage.glob('*.tmp'))

def test_source_cut_while_reading(src, here, monkeypatch):
    real,n = convert.write_shard,[0]
    def f(*a, **k):
        n[0] += 1
        if n[0] == 2: os.truncate(shard(src, 1), 3000)
        return real(*a, **k)
    monkeypatch.setattr(convert, 'write_shard', f)
    with pytest.raises(CheckpointError, match='changed while reading'): convert_to(src, here/'out')
    half_done(here/'out', 1)

def test_codes_rewritten_while_dequantizing(room, clean, here, monkeypatch):
    q = shutil.copytree(room/'clean', here/'q')
    real = convert._plain_chunks
    def f(*a, **k):
        os.utime(next(q.glob('*.safetensors')), ns=(1, 1))
        yield from real(*a, **k)
    monkeypatch.setattr(convert, '_plain_chunks', f)
    with pytest.raises(CheckpointError, match='changed while reading'): dequantize_checkpoint(q, here/'out', progress=False)
    assert not (here/'out').exists()

# --- overwrite

def test_overwrite_swaps_and_never_merges(model, here, clean):
    convert_to(model, here/'out', bits=2, max_shard_size=50_000)
    (here/'out'/'stale.txt').write_text('old'); (here/'out'/'sub').mkdir()
    convert_to(model, here/'out', overwrite=True)
    assert snapshot(here/'out') == clean and os.listdir(here) == ['out']

def test_overwrite_that_fails_leaves_the_old_one(src, here, monkeypatch):
    convert_to(src, here/'out', bits=2)
    before = snapshot(here/'out', times=True)
    stopped_half_way_over(src, here/'out', monkeypatch)
    assert snapshot(here/'out', times=True) == before
    shutil.rmtree(here/'out.partial')
    a_nan(src)
    with pytest.raises(NonFiniteError): convert_to(src, here/'out', overwrite=True, max_shard_size=10**9)
    assert snapshot(here/'out', times=True) == before and sorted(os.listdir(here)) == ['out', 'src']

def stopped_half_way_over(src, out, monkeypatch):
    real,n = convert.write_shard,[0]
    def f(*a, **k):
        n[0] += 1
        if n[0] > 2: raise KeyboardInterrupt
        return real(*a, **k)
    with monkeypatch.context() as m:
        m.setattr(convert, 'write_shard', f)
        with pytest.raises(KeyboardInterrupt): convert_to(src, out, overwrite=True)

@pytest.mark.parametrize('n', [1, 2])
def test_overwrite_whose_rename_fails_leaves_the_old_one(n, model, here, clean, monkeypatch):
    convert_to(model, here/'out', bits=2)
    before = snapshot(here/'out')
    with monkeypatch.context() as m:
        failing(m, 'rename', n, errno.EIO)
        with pytest.raises(OSError): convert_to(model, here/'out', overwrite=True)
    assert snapshot(here/'out') == before, f'the old checkpoint is gone from its place; there is {os.listdir(here)}'
    convert_to(model, here/'out', overwrite=True)
    assert snapshot(here/'out') == clean and os.listdir(here) == ['out']

# --- what is in the output

def test_partition_copies_and_manifest(src, here):
    for n in ('merges.txt', 'LICENSE', 'chat_template.jinja', 'generation_config.json', 'preprocessor_config.json'): (src/n).write_text('{}')
    for n in ('modeling.py', 'pytorch_model.bin', 'a.pt', 'b.pth', '.hidden', '.tmpAbC123'): (src/n).write_bytes(b'x')
    plan = convert_to(src, here/'out')
    got,want = tensors_of(here/'out'),tensors_of(src)
    kept = {r.name for r in plan.rows if r.action == 'keep'}
    assert {k for k in got if not k.endswith(('__packed', '__norms', '__meta'))} == kept and {r.name for r in plan.rows} == want.keys()
    for k in kept: assert got[k].dtype == want[k].dtype and torch.equal(got[k], want[k])
    files = {p.name for p in (here/'out').iterdir()}
    assert files - {f for f in files if f.endswith('.safetensors')} == {'README.md', 'merges.txt', 'LICENSE', 'chat_template.jinja', 'generation_config.json', 'preprocessor_config.json', 'tokenizer.json', 'config.json', 'hlwq_config.json', 'hlwq_manifest.json', 'model.safetensors.index.json'}
    m = json.loads((here/'out'/'hlwq_manifest.json').read_text())
    assert m['files'].keys() == files - {'hlwq_manifest.json', 'README.md'} and {'modeling.py', 'pytorch_model.bin', 'a.pt', 'b.pth', '.hidden', '.tmpAbC123'} <= set(m['skipped'])
    for n,o in m['files'].items(): assert o == dict(size=(here/'out'/n).stat().st_size, sha256=checkpoint.file_sha256(here/'out'/n))
    wm = json.loads((here/'out'/'model.safetensors.index.json').read_text())
    assert wm['weight_map'].keys() == got.keys() and wm['metadata']['total_size'] == sum(t.nbytes for t in got.values())

def test_suggested_rule_works(src, here):
    "The error about a NaN names a rule; with that rule the tensor is kept, with a warning"
    a_nan(src)
    with pytest.raises(NonFiniteError) as e: convert_to(src, here/'out', max_shard_size=10**9)
    rule = str(e.value).split('recipe rule: ')[1]
    (here/'r.toml').write_text('[[rules]]\n' + rule.replace(', keep', '\nkeep'))
    warn_once.cache_clear()
    with pytest.warns(HLWQWarning, match='q_proj.weight: NaN or infinity in it; it is kept'): convert_to(src, here/'out', recipe=here/'r.toml')
    assert verify_checkpoint(here/'out').ok and tensors_of(here/'out')[L+'self_attn.q_proj.weight'].isnan().sum() == 1

def test_there_and_back_and_there_again(model, room, clean, here):
    "Plain, quantized, plain, quantized: each step verifies, and the manifest of one never ends up in the next"
    dequantize_checkpoint(room/'clean', here/'plain', progress=False)
    src,got = tensors_of(model),tensors_of(here/'plain')
    assert {k:(t.dtype, t.shape) for k,t in src.items()} == {k:(t.dtype, t.shape) for k,t in got.items()}
    for k,t in src.items():
        e = ((t.float()-got[k].float()).norm()/t.float().norm()).item()
        assert e < .06 and (e == 0 or 'proj' in k), k
    assert json.loads((here/'plain'/'config.json').read_text()) == CONFIG
    convert_to(here/'plain', here/'again')
    r = verify_checkpoint(here/'again')
    assert r.ok, r
    assert torch.equal(tensors_of(here/'again')[L+'self_attn.q_proj.weight__packed'], tensors_of(room/'clean')[L+'self_attn.q_proj.weight__packed'])

def codes_of(folder): return {k:v for k,v in tensors_of(folder).items() if k.endswith(('__packed', '__norms'))}

def assert_same_codes(a, b, rename=lambda k: k):
    a,b = codes_of(a),codes_of(b)
    assert {rename(k) for k in a} == b.keys() and a
    for k,v in a.items(): assert v.dtype == b[rename(k)].dtype and torch.equal(v, b[rename(k)]), k

FP8_NAME = L+'mlp.up_proj.weight'

def fp8_pair(here, scale, suffix='_scale_inv', block=None, dtype=torch.float8_e4m3fn, shape=(200, 300), name=FP8_NAME, wide=None, expand=None, config={}):
    "Two sources: fp8 with its scale, and the same weights widened; the kept head is fp8 too"
    w = gaussian(*shape, dtype=torch.float32, scale=1.).to(dtype)
    qc = dict(quant_method='fp8') | (dict(weight_block_size=list(block)) if block else {})
    head = gaussian(16, 256, dtype=torch.float32, scale=1.).to(dtype)
    rest = {'model.norm.weight':torch.ones(256), L+'self_attn.q_proj.weight':gaussian(256, 256)}
    write_model(here/'fp8', {name:w, (name if suffix.startswith('_') else name.removesuffix('.weight'))+suffix:scale, 'lm_head.weight':head, 'lm_head.weight_scale_inv':torch.tensor(.25), **rest}, config=CONFIG | dict(quantization_config=qc) | config)
    write_model(here/'wide', {name:w.float()*expand, 'lm_head.weight':(head.float()*.25).bfloat16(), **rest}, config=CONFIG | config)

@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize('kind', ['tensor', 'tensor1', 'row', 'column_of_rows', 'block', 'block64', 'bf16 block'])
@pytest.mark.parametrize('suffix', ['_scale_inv', '_scale', '.scale'])
def test_fp8_with_its_scale_is_the_widened_weight(kind, suffix, dtype, here):
    r,c = (64, 64) if kind == 'block64' else (128, 128)
    g = torch.Generator().manual_seed(1)
    scale = dict(tensor=torch.tensor(.03), tensor1=torch.tensor([.03])).get(kind)
    if kind in ('row', 'column_of_rows'): scale = torch.rand(200, *([1] if kind != 'row' else []), generator=g) + .01
    if 'block' in kind: scale = torch.rand(-(-200//r), -(-300//c), generator=g) + .01
    if kind == 'bf16 block': scale = scale.bfloat16()
    s = scale.float()
    expand = s.reshape(-1)[:, None] if 'row' in kind else s.repeat_interleave(r, 0)[:200].repeat_interleave(c, 1)[:, :300] if 'block' in kind else s.reshape(())
    fp8_pair(here, scale, suffix, (r, c) if kind == 'block64' else None, dtype, expand=expand)
    plan = convert_to(here/'fp8', here/'a'); convert_to(here/'wide', here/'b')
    assert_same_codes(here/'a', here/'b')
    a,b = tensors_of(here/'a'),tensors_of(here/'b')
    assert a.keys() == b.keys() and torch.equal(a['lm_head.weight'], b['lm_head.weight']) and a['lm_head.weight'].dtype == torch.bfloat16
    assert not any('scale' in k for k in a) and 'fp8' not in (here/'a'/'config.json').read_text() and verify_checkpoint(here/'a').ok
    assert all(r.action == 'drop' and 'consumed with' in r.rule for r in plan.rows if 'scale' in r.name)

@pytest.mark.parametrize('shape', [(8,), (8, 1), (8, 1, 1), (8, 8), (8, 8, 1), (8, 1, 2)])
def test_fp8_experts_with_a_scale_each(shape, here):
    "One scale for an expert, its rows or its tiles; eight experts of eight rows, so that the wrong axis would fit too"
    name = L+'mlp.experts.gate_up_proj'
    scale = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) + .01
    per = scale.reshape(8, *shape[1:], *[1]*(3-len(shape))) if shape != (8, 1, 2) else scale.repeat_interleave(128, 2)
    fp8_pair(here, scale, shape=(8, 8, 256), name=name, expand=per)
    try: convert_to(here/'fp8', here/'a')
    except CheckpointError as e:
        assert name in str(e) and complete(e)
        return
    convert_to(here/'wide', here/'b')
    assert_same_codes(here/'a', here/'b')

@pytest.mark.parametrize('shape', [(2, 2), (3, 2), (300,), (1, 300), (2, 3, 1), (200, 2)])
def test_fp8_scale_of_another_shape(shape, here):
    fp8_pair(here, torch.ones(shape), expand=1.)
    (here/'o').mkdir()
    text = refused(here/'fp8', here/'o'/'out', CheckpointError, 'scale')
    assert 'up_proj' in text, f'does not say which tensor: {text}'

def test_fp8_scale_that_is_not_finite(here):
    fp8_pair(here, torch.tensor(float('nan')), expand=1.)
    (here/'o').mkdir()
    text = refused(here/'fp8', here/'o'/'out', (NonFiniteError), 'up_proj')
    assert '0 NaN and 0 infinite' not in text, f'does not say what is wrong: {text}'

def test_apply_scale_rows_leave_no_trace():
    w,s = gaussian(200, 300, dtype=torch.float32, scale=1.).to(torch.float8_e4m3fn),torch.rand(2, 3)
    whole = apply_scale(w, s, 200)
    for step in (1, 7, 128): assert torch.equal(torch.cat([apply_scale(w[a:a+step], s, 200, a) for a in range(0, 200, step)]), whole)

def test_transposed_experts_with_biases(here):
    "gpt-oss keeps its experts as (in, out) with a bias for each: rotated along the input, and given back as they were"
    E,H,I = 3,256,384
    p = L+'mlp.experts.'
    t = {p+'gate_up_proj':gaussian(E, H, 2*I), p+'gate_up_proj_bias':gaussian(E, 2*I), p+'down_proj':gaussian(E, I, H, seed=1), p+'down_proj_bias':gaussian(E, H), L+'mlp.router.weight':gaussian(E, H), L+'self_attn.sinks':gaussian(4), 'model.norm.weight':torch.ones(H)}
    write_model(here/'src', t, config=dict(model_type='gpt_oss', hidden_size=H, intermediate_size=I, num_local_experts=E))
    plan = convert_to(here/'src', here/'out')
    assert [r.name for r in plan.rows if r.transposed] == [p+'down_proj', p+'gate_up_proj'] or {r.name for r in plan.rows if r.transposed} == {p+'down_proj', p+'gate_up_proj'}
    for k in ('gate_up_proj', 'down_proj'):
        for e in range(E):
            got = decoded(here/'out', f'{p}{k}_e{e}').T
            assert got.shape == t[p+k].shape[1:] and abs(got - t[p+k][e].double().numpy()).max() < .012
            q = quantize(t[p+k][e].t())
            assert torch.equal(tensors_of(here/'out')[f'{p}{k}_e{e}__packed'], q.packed)
    dequantize_checkpoint(here/'out', here/'plain', progress=False)
    back = tensors_of(here/'plain')
    assert {k:v.shape for k,v in back.items()} == {k:v.shape for k,v in t.items()}
    for k in t:
        if k.endswith(('_proj',)): assert ((back[k].float()-t[k].float()).norm()/t[k].float().norm()) < .055
        else: assert torch.equal(back[k], t[k])

def test_separate_and_fused_experts_give_the_same_codes(here):
    E,H,I = 4,256,128
    p,gate,up,down = L+'mlp.experts.',*(gaussian(E, I, H, seed=s) for s in (1, 2)),gaussian(E, H, I, seed=3)
    write_model(here/'apart', {f'{p}{e}.{n}_proj.weight':w[e].contiguous() for e in range(E) for n,w in (('gate', gate), ('up', up), ('down', down))})
    write_model(here/'fused', {p+'gate_up_proj':torch.cat([gate, up], 1), p+'down_proj':down})
    for n in ('apart', 'fused'): convert_to(here/n, here/f'{n}.q')
    a,b = tensors_of(here/'apart.q'),tensors_of(here/'fused.q')
    for e in range(E):
        for part in ('packed', 'norms'):
            assert torch.equal(torch.cat([a[f'{p}{e}.gate_proj.weight__{part}'], a[f'{p}{e}.up_proj.weight__{part}']]), b[f'{p}gate_up_proj_e{e}__{part}'])
            assert torch.equal(a[f'{p}{e}.down_proj.weight__{part}'], b[f'{p}down_proj_e{e}__{part}'])
    for n in ('apart', 'fused'):
        dequantize_checkpoint(here/f'{n}.q', here/f'{n}.plain', progress=False)
        assert {k:v.shape for k,v in tensors_of(here/f'{n}.plain').items()} == {k:v.shape for k,v in tensors_of(here/n).items()}

def test_tied_embeddings_stay(here):
    base = {k:v for k,v in toy(1, 256, 256, 2).items() if k != 'lm_head.weight'}
    tied = CONFIG | dict(tie_word_embeddings=True)
    for n,t in (('one', base), ('both', base | {'lm_head.weight':base['model.embed_tokens.weight'].clone()})):
        write_model(here/n, t, config=tied)
        convert_to(here/n, here/f'{n}.q')
        got = tensors_of(here/f'{n}.q')
        assert torch.equal(got['model.embed_tokens.weight'], t['model.embed_tokens.weight']) and ('lm_head.weight' in got) == (n == 'both')
        assert json.loads((here/f'{n}.q'/'config.json').read_text())['tie_word_embeddings'] is True
    (here/'o').mkdir()
    refused(here/'both', here/'o'/'q', ConfigError, 'embedding and output head in one', recipe=Recipe(rules=[Rule('lm_head', bits=8)]))

def test_other_types_and_shapes_are_kept_to_the_byte(here):
    odd = {f'buffer.{n.lower()}':torch.arange(24).reshape(4, 6).to(d) for n,d in DTYPES.items() if n.startswith(('I', 'U', 'BOOL'))}
    odd |= {'scale.zero_d':torch.tensor(2.5), 'count.zero_d':torch.tensor(7), 'half.zero_d':torch.tensor(1.5, dtype=torch.bfloat16), 'empty.weight':torch.zeros(0, 128), 'empty2.weight':torch.zeros(128, 0), 'empty3':torch.zeros(0), 'conv.weight':gaussian(8, 1, 4), 'odd.bytes':torch.arange(7, dtype=torch.uint8), 'f64.bias':torch.randn(5, dtype=torch.float64), 'ids.weight':torch.arange(256).reshape(2, 128)}
    t = toy(1, 256, 256, 2) | odd
    write_model(here/'src', t, 2)
    convert_to(here/'src', here/'q')
    dequantize_checkpoint(here/'q', here/'plain', progress=False)
    for d in ('q', 'plain'):
        got = tensors_of(here/d)
        for k,v in odd.items(): assert got[k].dtype == v.dtype and got[k].shape == v.shape and got[k].numpy().tobytes() == v.numpy().tobytes() if v.dtype != torch.bfloat16 else torch.equal(got[k], v), (d, k)
    assert verify_checkpoint(here/'q').ok

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_type(dtype, here):
    t = {L+'mlp.up_proj.weight':gaussian(64, 256, dtype=dtype), 'model.norm.weight':torch.ones(256, dtype=dtype)}
    write_model(here/'src', t)
    convert_to(here/'src', here/'q')
    q = quantize(t[L+'mlp.up_proj.weight'])
    got = tensors_of(here/'q')
    assert torch.equal(got[L+'mlp.up_proj.weight__packed'], q.packed) and torch.equal(got[L+'mlp.up_proj.weight__norms'], q.norms) and got['model.norm.weight'].dtype == dtype

def test_wide_norms_stream_and_verify(here):
    "A matrix of two pieces, one of them with norms that float16 cannot hold; zeros in it; an ordinary matrix beside it"
    w = gaussian(4200, 1024, dtype=torch.float32)
    w[4199] *= 2.0**-24; w[5] = 0
    write_model(here/'src', {L+'mlp.up_proj.weight':w, L+'mlp.down_proj.weight':gaussian(256, 256), 'model.norm.weight':torch.ones(8)})
    assert len(convert.row_spans(*w.shape)) > 1
    convert_to(here/'src', here/'q', max_shard_size=10**9)
    got,q = tensors_of(here/'q'),quantize(w)
    assert got[L+'mlp.up_proj.weight__norms'].dtype == torch.float32 and got[L+'mlp.down_proj.weight__norms'].dtype == torch.float16
    assert torch.equal(got[L+'mlp.up_proj.weight__packed'], q.packed) and torch.equal(got[L+'mlp.up_proj.weight__norms'], q.norms)
    assert verify_checkpoint(here/'q').ok
    with CheckpointReader(here/'q') as r:
        m = r.matrix(L+'mlp.up_proj.weight')
        assert torch.equal(m.dequantize(), q.dequantize()) and torch.equal(r.matrix(L+'mlp.up_proj.weight', 4190, 4200).dequantize(), q.dequantize()[4190:])
    dequantize_checkpoint(here/'q', here/'plain', progress=False)
    back = tensors_of(here/'plain')[L+'mlp.up_proj.weight'].float()
    assert back[5].eq(0).all() and (back[4199]-w[4199]).norm()/w[4199].norm() < .06

def test_threads_and_shard_sizes_leave_no_trace(model, here, clean):
    before = torch.get_num_threads()
    try:
        for n in (1, 3): torch.set_num_threads(n); convert_to(model, here/f'{n}')
    finally: torch.set_num_threads(before)
    assert snapshot(here/'1') == snapshot(here/'3') == clean
    convert_to(model, here/'one', max_shard_size=10**9)
    a,b = tensors_of(here/'one'),tensors_of(here/'1')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_headers_stay_below_what_the_library_reads():
    "Safetensors refuses a header above 100 MB: many small matrices go into several shards"
    name = 'layers.' + 'x'*20_000 + '.{}.up_proj.weight'
    rows = [PlanRow(name.format(i), 'BF16', (16, 128), 'quantize', 5, 'linear weight', nbytes=1400) for i in range(2000)]
    class FakePlan: pass
    plan = FakePlan(); plan.rows = rows
    for n,units in cut_shards(plan_units(plan)).items():
        assert sum(checkpoint.entry_nbytes(k, (10**12, 10**6, 10**6)) for u in units for k in unit_keys(u)) < 100_000_000, n

def test_embedded_model_with_interruption(here, monkeypatch):
    "The model that ships with the package, stopped and resumed"
    src = asset_path('tiny-moe-10m')
    before = snapshot(src, times=True)
    convert_to(src, here/'want', max_shard_size=2_000_000)
    stopped_half_way(src, here/'out', monkeypatch, max_shard_size=2_000_000)
    convert_to(src, here/'out', max_shard_size=2_000_000)
    assert snapshot(here/'out') == snapshot(here/'want') and verify_checkpoint(here/'out').ok and snapshot(src, times=True) == before

# --- memory

RSS = """
import json,resource,struct,sys
from pathlib import Path
import torch
d = Path(sys.argv[1]); d.mkdir()
shapes = {f'model.layers.{i}.mlp.up_proj.weight':(4096, 4096) for i in range(8)} | {'model.layers.0.mlp.experts.gate_up_proj':(16, 1024, 2048), 'lm_head.weight':(16384, 2048)}
at,header,block = 0,{},torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.uint8).numpy().tobytes()
for k,s in shapes.items():
    n = 2*torch.Size(s).numel(); header[k] = dict(dtype='BF16', shape=s, data_offsets=[at, at+n]); at += n
h = json.dumps(header).encode(); h += b' '*(-len(h) % 8)
with open(d/'model.safetensors', 'wb') as f:
    f.write(struct.pack('<Q', len(h)) + h)
    for _ in range(at//len(block)): f.write(block)
(d/'config.json').write_text(json.dumps(dict(model_type='qwen3_moe', hidden_size=2048)))
from hlwq.convert import quantize_checkpoint,dequantize_checkpoint
rss = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/1024      # ru_maxrss of a child begins at its parent's
res = [at/1e6, rss()]
quantize_checkpoint(d, sys.argv[1]+'.q', progress=False); res.append(rss())
dequantize_checkpoint(sys.argv[1]+'.q', sys.argv[1]+'.plain', progress=False); res.append(rss())
print(json.dumps(res))
"""

def test_memory_does_not_grow_with_the_model(tmp_path):
    r = subprocess.run([sys.executable, '-c', RSS, tmp_path/'m'], capture_output=True, text=True, cwd=TESTS.parent)
    assert r.returncode == 0, r.stderr
    size,before,quantized,plain = json.loads(r.stdout.splitlines()[-1])
    shutil.rmtree(tmp_path)
    assert size > 400 and quantized < 700 and plain < 700, (size, before, quantized, plain)

# --- verify and read

def damaged_copy(here, f, n=[0]):
    n[0] += 1
    d = shutil.copytree(GOLDEN/'hlwq', here/f'd{n[0]}')
    f(d)
    return d

WEIGHTS = 'model-00001-of-00001.safetensors'

def flip(p, at):
    b = bytearray(p.read_bytes()); b[at] ^= 1; p.write_bytes(b)

@pytest.mark.parametrize('change,match', [
    (lambda d: flip(d/WEIGHTS, -1), 'sha256 [0-9a-f]{12}…, need [0-9a-f]{12}'), (lambda d: os.truncate(d/WEIGHTS, 3000), '3000 bytes, need 5792'), (lambda d: (d/WEIGHTS).unlink(), 'missing, need'),
    (lambda d: flip(d/'tokenizer_config.json', 3), 'tokenizer_config.json: sha256'), (lambda d: (d/'hlwq_manifest.json').unlink(), 'no hlwq_manifest.json|manifest.json: missing'), (lambda d: (d/'hlwq_manifest.json').write_text('{'), 'not readable'),
    (lambda d: (d/'hlwq_manifest.json').write_text('[]'), 'not readable'), (lambda d: (d/'hlwq_manifest.json').write_text('{"files": {}}'), 'not readable'), (lambda d: (d/'hlwq_manifest.json').write_text('{"files": []}'), 'not readable'), (lambda d: (d/'hlwq_manifest.json').write_text('{"files": {"config.json": 3}}'), 'not readable|need'),
    (lambda d: (d/'hlwq_manifest.json').write_text('{"files": {"config.json": {"size": "big"}}}'), 'not readable|need'), (lambda d: (d/'hlwq_manifest.json').write_text('['*100_000), 'not readable'),
    (lambda d: (d/'hlwq_manifest.json').write_text('{"files": {"../../etc/passwd": {"size": 1, "sha256": "0"}}}'), 'unsafe|not readable|plain file name')])
def test_verify_finds_it(change, match, here):
    d = damaged_copy(here, change)
    r = verify_checkpoint(d)
    assert not r.ok and any(re.search(match, p) for p in r.problems), r
    assert r.to_json()['ok'] is False and all('need' in p for p in r.problems)

def test_verify_a_stale_shard(here):
    def f(d):
        save_file({'old.weight':torch.ones(2)}, d/'old.safetensors')
        edit_index(d, lambda o: o['weight_map'].update({'old.weight':'old.safetensors'}))
    r = verify_checkpoint(damaged_copy(here, f))
    assert not r.ok and any('old.safetensors: not in the manifest' in p for p in r.problems)

def test_verify_where_nothing_is(here):
    with pytest.raises(ConfigError, match='no such folder'): verify_checkpoint(here/'none')
    assert not verify_checkpoint(here).ok

def test_verify_changes_nothing(here):
    d = damaged_copy(here, lambda d: None)
    before = snapshot(d, times=True)
    assert verify_checkpoint(d).ok and verify_checkpoint(d, sha256=False, norms=False).ok and snapshot(d, times=True) == before

def retensor(d, f):
    "Rewrites the shard with changed tensors; index to match"
    t = load_file(d/WEIGHTS); f(t)
    save_file({k:v.contiguous() for k,v in t.items()}, d/WEIGHTS, metadata=dict(format='pt', hlwq_format='1', codebook='lloyd-max'))
    edit_index(d, lambda o: o.update(weight_map=dict.fromkeys(t, WEIGHTS)))

Q = L+'self_attn.q_proj.weight'
INCONSISTENT = dict(
    no_norms=(lambda t: t.pop(Q+'__norms'), CheckpointError, '__norms missing'), no_meta=(lambda t: t.pop(Q+'__meta'), CheckpointError, '__meta missing'), no_packed=(lambda t: t.pop(Q+'__packed'), CheckpointError, '__packed missing'),
    short_codes=(lambda t: t.update({Q+'__packed':t[Q+'__packed'][:-1]}), CheckpointError, 'whole number of bits'), seven_bits=(lambda t: t.update({Q+'__packed':torch.zeros(6*2*16*7, dtype=torch.uint8)}), CheckpointError, '7 bits a code'),
    signed_codes=(lambda t: t.update({Q+'__packed':t[Q+'__packed'].to(torch.int16)}), CheckpointError, 'need uint8'), norms_shape=(lambda t: t.update({Q+'__norms':t[Q+'__norms'][:, :1]}), CheckpointError, 'q_proj'), norms_flat=(lambda t: t.update({Q+'__norms':t[Q+'__norms'].reshape(-1)}), CheckpointError, 'need float16 or float32'),
    norms_type=(lambda t: t.update({Q+'__norms':t[Q+'__norms'].to(torch.int32)}), CheckpointError, 'need float16 or float32'), meta_type=(lambda t: t.update({Q+'__meta':t[Q+'__meta'].float()}), CheckpointError, 'need int64'), meta_length=(lambda t: t.update({Q+'__meta':t[Q+'__meta'][:3]}), CheckpointError, 'need int64 of length 4 or 5'),
    meta_rows=(lambda t: t[Q+'__meta'].__setitem__(0, 7), CheckpointError, 'does not fit norms'), meta_total=(lambda t: t[Q+'__meta'].__setitem__(3, 7), CheckpointError, 'does not fit norms'), meta_width=(lambda t: t[Q+'__meta'].__setitem__(4, 100), CheckpointError, '100 columns.* need'),
    meta_negative=(lambda t: t[Q+'__meta'].__setitem__(4, -5), CheckpointError, 'columns'), meta_huge=(lambda t: t[Q+'__meta'].__setitem__(4, 2**62), CheckpointError, 'columns'), block=(lambda t: t[Q+'__meta'].__setitem__(2, 64), UnsupportedError, 'block size 64, need 128'),
    twice=(lambda t: t.update({(Q+k).replace('.', '__'):t[Q+k].clone() for k in ('__packed', '__norms', '__meta')}), CheckpointError, 'stored twice'))

@pytest.mark.parametrize('case', INCONSISTENT)
def test_parts_that_do_not_fit(case, here):
    change,error,match = INCONSISTENT[case]
    d = damaged_copy(here, lambda d: retensor(d, change))
    with pytest.raises(error, match=match) as e: CheckpointReader(d)
    assert complete(e.value) or ', need ' in str(e.value)
    assert not verify_checkpoint(d).ok
    (here/'o').mkdir()
    with pytest.raises(error): dequantize_checkpoint(d, here/'o'/'out', progress=False)
    assert not list((here/'o').iterdir())

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_norm_that_is_not_finite(bad, here):
    d = damaged_copy(here, lambda d: retensor(d, lambda t: t[Q+'__norms'].__setitem__((3, 1), bad)))
    with CheckpointReader(d) as r:
        with pytest.raises(CheckpointError, match='1 norms are not finite'): r.matrix(Q)
        r.matrix(Q, 0, 3)
    assert any('norms that are not finite' in p for p in verify_checkpoint(d).problems)
    (here/'o').mkdir()
    with pytest.raises(CheckpointError, match='not finite'): dequantize_checkpoint(d, here/'o'/'out', progress=False)
    assert not list((here/'o').iterdir())

@pytest.mark.parametrize('version', [2, 99, '2', 'two', 1.5, [2], -1, '²'])
def test_newer_or_unknown_format(version, here):
    d = damaged_copy(here, lambda d: edit_config(d, quantization_config=json.loads((d/'hlwq_config.json').read_text()) | dict(format_version=version)))
    with pytest.raises(UnsupportedError, match='reads up to 1'): CheckpointReader(d)

def test_missing_expert(here):
    d = damaged_copy(here, lambda d: retensor(d, lambda t: [t.pop(f'{L}mlp.experts.gate_up_proj_e0__{k}') for k in ('packed', 'norms', 'meta')]))
    assert any('need 0 to 1 without a gap' in p for p in verify_checkpoint(d).problems)
    with pytest.raises(CheckpointError, match='without a gap'): dequantize_checkpoint(d, here/'out', progress=False)

@pytest.mark.parametrize('make,match', [
    (lambda d: save_file({'w.weight':torch.ones(2, 128)}, d/'model.safetensors'), 'not quantized.*run hlwq quantize'), (lambda d: save_file({'w.codes':torch.ones(2), 'w.norms':torch.ones(2), 'w.ct_scaled':torch.ones(2)}, d/'model.safetensors'), 'legacy polarengine layout'),
    (lambda d: (d/'model_int4.pt').write_bytes(b'\x80\x02'), 'model_int4.pt.*pickle'), (lambda d: save_file({'w.weight_packed':torch.ones(2, 2).int(), 'w.weight_scale':torch.ones(2)}, d/'model.safetensors'), 'compressed-tensors')])
def test_not_ours(make, match, here):
    (here/'d').mkdir(); make(here/'d')
    with pytest.raises(UnsupportedError, match=match) as e: CheckpointReader(here/'d')
    assert ', need ' in str(e.value)
    with pytest.raises(UnsupportedError): dequantize_checkpoint(here/'d', here/'out', progress=False)
    assert os.listdir(here) == ['d']

def test_dequantize_paths(room, clean, here):
    q = shutil.copytree(room/'clean', here/'q')
    for out,error in ((q, ConfigError), (q/'x', ConfigError), (here, ConfigError)):
        with pytest.raises(error): dequantize_checkpoint(q, out, progress=False)
    (here/'full').mkdir(); (here/'full'/'x').write_text('x')
    with pytest.raises(FileExistsError): dequantize_checkpoint(q, here/'full', progress=False)
    assert snapshot(q) == clean and sorted(os.listdir(here)) == ['full', 'q']

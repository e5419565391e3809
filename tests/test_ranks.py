"""Several processes that make one checkpoint: the bytes of one process, whoever dies, and errors that all of them raise.

The processes are real ones: started by torchrun, or by hand with its variables where the death of one must not be told by torchrun."""
import fcntl,os,re,signal,socket,subprocess,sys,threading
import pytest,torch
from torch.distributed import HashStore
from common import ROOT
from hlwq.cli import main
from hlwq.checkpoint import verify_checkpoint
from hlwq.convert import quantize_checkpoint
from hlwq.core import *
from hlwq.ranks import Ranks,error_data,error_from,launched_rank,quantize_on_ranks,share_shards
from hlwq.recipe import make_plan
from kit import snapshot,toy,write_model

SHARD = 150_000
VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
ENV = {k:v for k,v in os.environ.items() if k not in VARIABLES} | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES='')

@pytest.fixture(scope='module')
def model(tmp_path_factory): return write_model(tmp_path_factory.mktemp('m')/'model', toy(4, 256, 256, 2), 3)

@pytest.fixture(scope='module')
def clean(tmp_path_factory, model):
    "What one process makes of it, as hashes"
    out = tmp_path_factory.mktemp('c')/'clean'
    quantize_checkpoint(model, out, max_shard_size=SHARD, progress=False)
    assert len(list(out.glob('*.safetensors'))) >= 6
    return snapshot(out)

def torchrun(*args, n=2):
    "Starts ranks as a user does; --standalone finds a free port"
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), *map(str, args)], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def by_hand(*args, n=2):
    "Starts ranks without torchrun: nobody kills the others when one dies"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    def env(r): return {**ENV, 'RANK':str(r), 'LOCAL_RANK':str(r), 'WORLD_SIZE':str(n), 'MASTER_ADDR':'127.0.0.1', 'MASTER_PORT':str(port)}
    return [subprocess.Popen([sys.executable, ROOT/'tests/rank_of.py', *map(str, args)], cwd=ROOT, env=env(r), stderr=subprocess.PIPE, text=True) for r in range(n)]

@pytest.fixture(scope='module')
def runs(tmp_path_factory, model):
    "All runs of real processes, at the same time: most of each is starting Python. Name -> (folder, exit codes, what was written)"
    at, res = tmp_path_factory.mktemp('runs'), {}
    for n in ('whole', 'torchrun', 'by hand 0', 'by hand 1'): (at/n).mkdir()
    def out(n): return at/n/'out'
    started = {'whole':[torchrun('-m', 'hlwq.convert', model, out('whole'), '--max-shard-size', '150KB')], 'torchrun':[torchrun('tests/rank_of.py', model, out('torchrun'), 1, 1, 30)],
               **{f'by hand {v}':by_hand(model, out(f'by hand {v}'), v, 1, 4) for v in (0, 1)}}
    try:
        for n,ps in started.items():
            said = [''.join(filter(None, p.communicate(timeout=90))) for p in ps]
            res[n] = at/n, [p.returncode for p in ps], said
        yield res
    finally:
        for p in (p for ps in started.values() for p in ps): p.kill()

def shards(folder): return sorted(p.name for p in folder.glob('*.safetensors'))

def test_torchrun_makes_the_same_bytes(runs, clean):
    folder, codes, (said,) = runs['whole']
    assert codes == [0], said
    assert snapshot(folder/'out') == clean and verify_checkpoint(folder/'out').ok
    assert said.count('check it with hlwq verify') == 1                                                       # one of them speaks
    assert sorted(os.listdir(folder)) == ['out']

def made(stage):
    "The shards in a stage, and when each was written"
    return {p.name:p.stat().st_mtime_ns for p in stage.glob('*.safetensors')}

def resumed(folder, clean, before):
    assert snapshot(folder/'out') == clean and sorted(os.listdir(folder)) == ['out']
    assert {k:v for k,v in made(folder/'out').items() if k in before} == before                               # not made again

def test_killed_under_torchrun_then_resumed_by_one(runs, model, clean):
    folder, codes, (said,) = runs['torchrun']
    assert codes != [0] and not (folder/'out').exists()
    assert re.search(r'rank 0 raised InterruptedError: .*told to stop \(SIGTERM\).*run the same command again', said), said
    before = made(folder/'out.partial')
    assert before and (folder/'out.partial/journal-1.jsonl').exists()
    quantize_checkpoint(model, folder/'out', max_shard_size=SHARD, progress=False)
    resumed(folder, clean, before)

@pytest.mark.parametrize('victim', [1, 0])
def test_survivors_notice_and_three_resume(victim, runs, model, clean):
    folder, codes, said = runs[f'by hand {victim}']
    assert codes[victim] == -signal.SIGKILL and codes[1-victim] == 3, said
    assert re.search(r'raised Connection\w*Error: .*(rank 1: no sign of life for 4 s|the store of torch.distributed).*run the same command again', said[1-victim]), said
    before = made(folder/'out.partial')
    assert before
    assert on_threads(model, folder/'out', 3) == [None]*3
    resumed(folder, clean, before)

def on_threads(model, out, world, silence=20., **kw):
    "The same in one process: what each rank raised"
    store, said = HashStore(), [None]*world
    def work(r):
        own = {k:v(r) if callable(v) else v for k,v in kw.items()}
        try: quantize_on_ranks(own.pop('src', model), out, progress=False, ranks=Ranks(store, r, world, silence), **{'max_shard_size':SHARD, **own})
        except Exception as e: said[r] = e
    threads = [threading.Thread(target=work, args=(r,)) for r in range(world)]
    for t in threads: t.start()
    for t in threads: t.join()
    return said

def test_errors_before_any_work_are_raised_on_all(model, tmp_path):
    (tmp_path/'there').mkdir(); (tmp_path/'there/x').write_text('x')
    before = snapshot(tmp_path)
    for kw, kind in [(dict(bits=7), ConfigError), (dict(norm='l3'), ConfigError), (dict(src=tmp_path/'nowhere'), (HLWQError, OSError)),
                     (dict(src=lambda r: model if r == 0 else tmp_path/'nowhere'), (HLWQError, OSError)),       # one does not see the source
                     (dict(bits=lambda r: 5 - r), ConfigError)]:                                              # nor want the same
        said = on_threads(model, tmp_path/'new', 2, **kw)
        assert all(isinstance(e, kind) for e in said), said
        assert snapshot(tmp_path) == before
    said = on_threads(model, tmp_path/'there', 3)
    assert all(isinstance(e, FileExistsError) for e in said), said
    assert snapshot(tmp_path) == before

def test_a_weight_that_is_no_number_stops_all(model, tmp_path):
    tensors, key = toy(4, 256, 256, 2), [r.name for r in make_plan(model).rows if r.action == 'quantize'][-1]
    tensors[key].view(-1)[3] = torch.nan
    bad = write_model(tmp_path/'bad', tensors, 3)
    said = on_threads(bad, tmp_path/'out', 2)
    assert all(isinstance(e, NonFiniteError) and key in str(e) for e in said) and sum('rank ' in str(e) for e in said) == 1, said
    assert not (tmp_path/'out').exists() and shards(tmp_path/'out.partial')
    before = {k:v for k,v in snapshot(tmp_path).items() if not k.endswith('/lock')}
    said = on_threads(bad, tmp_path/'out', 2, bits=4)
    assert all(isinstance(e, ResumeError) and 'bits was 5, now 4' in str(e) for e in said), said
    assert {k:v for k,v in snapshot(tmp_path).items() if not k.endswith('/lock')} == before
    assert on_threads(model, tmp_path/'out', 2, resume=False, bits=4) == [None]*2 and verify_checkpoint(tmp_path/'out').ok

@pytest.mark.parametrize('name', ['lock', 'lock-1'])
def test_two_runs_on_one_folder(name, model, clean, tmp_path):
    "As long as one rank of another run lives, nobody else may begin"
    stage = tmp_path/'out.partial'
    stage.mkdir()
    with open(stage/name, 'w') as f:
        f.write('4711'); f.flush()
        fcntl.flock(f, fcntl.LOCK_EX)
        (stage/'journal.jsonl').write_text('')
        with pytest.raises(BlockingIOError, match=r'another hlwq \(pid 4711\)'): quantize_checkpoint(model, tmp_path/'out', max_shard_size=SHARD, progress=False)
        said = on_threads(model, tmp_path/'out', 2)
        assert all(isinstance(e, BlockingIOError) for e in said), said
    assert on_threads(model, tmp_path/'out', 2) == [None]*2 and snapshot(tmp_path/'out') == clean

def test_alone_without_torchrun(model, clean, tmp_path, monkeypatch):
    "`hlwq quantize` in a child of a rank has its variables, and still is one process; so is the module without them"
    for k,v in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1").items(): monkeypatch.setenv(k, v)
    assert launched_rank() == 1 and main(["quantize", str(model), str(tmp_path/"out"), "--max-shard-size", "150KB", "--quiet"]) == 0
    assert snapshot(tmp_path/"out") == clean
    monkeypatch.delenv("RANK")
    assert launched_rank() is None
    with pytest.raises(ConfigError, match="alone"): quantize_on_ranks(model, tmp_path/"new")

def test_more_ranks_than_shards(model, tmp_path):
    quantize_checkpoint(model, tmp_path/'one', progress=False)
    assert on_threads(model, tmp_path/'out', 3, max_shard_size=5_000_000_000) == [None]*3
    assert snapshot(tmp_path/'out') == snapshot(tmp_path/'one')

def test_shares():
    gen = torch.Generator().manual_seed(0)
    for world in (1, 2, 3, 7):
        sizes = {f's{i}':int(n) for i,n in enumerate(torch.randint(1, 100, (23,), generator=gen))}
        got = share_shards(sizes, world)
        assert sorted(n for o in got for n in o) == sorted(sizes)
        assert all(o == [n for n in sizes if n in o] for o in got)                                            # in the order of the plan
        loads = [sum(sizes[n] for n in o) for o in got]
        assert max(loads) - min(loads) <= max(sizes.values())
        assert share_shards(dict(sorted(sizes.items(), reverse=True)), world) == [sorted(o, reverse=True) for o in map(sorted, got)]    # whatever the order

@pytest.mark.parametrize('e', [ConfigError('a'), ResumeError('b'), UnsupportedError('c'), PermissionError(13, 'no', 'file'), OSError(28, 'full', 'x')])
def test_errors_cross(e):
    back = error_from(error_data(e), 5)
    assert type(back) is type(e) and 'rank 5: ' in str(back)

def test_a_store_that_is_gone():
    class Gone(HashStore):
        def set(self, *_): raise RuntimeError('Connection reset by peer')
        def check(self, *_): raise RuntimeError('Connection reset by peer')
    with Ranks(Gone(), 0, 2, 5.) as r:
        with pytest.raises(ConnectionError, match='the store of torch.distributed: Connection reset'): r.wait('never')

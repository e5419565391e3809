"""The pipeline of conversion: read, copy in, compute, copy out, write, hash, each for another batch at the same time.

What a GPU would do is done here by a device of threads: copies take a random time, and memory that was given back is overwritten at once, so
that using a buffer too early or too long changes the result. Each test compares with what the plain way through the CPU makes, to the byte."""
import errno,os,random,shutil,signal,threading,time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
import pytest,torch
import hlwq.checkpoint as checkpoint,hlwq.convert as convert
from hlwq.checkpoint import BehindWriter,ShardWriter,file_sha256,verify_checkpoint
from hlwq.convert import cut_batches,cut_shards,plan_units,quantize_checkpoint,quantized_parts,read_ahead
from hlwq.core import *
from hlwq.quantize import quantize_rows
from hlwq.recipe import make_plan
from hlwq.source import Source,open_source
from kit import CONFIG,L,gaussian,snapshot,tensors_of,toy,write_model

SHARD = 150_000
TALL = L+'mlp.up_proj.weight'

class Poisoned:
    "A queue of buffers that overwrites what is given back"
    def __init__(self, q): self.q = q
    def get(self): return self.q.get(timeout=30)
    def put(self, b): b.fill_(0xEE); self.q.put(b)

class Watched(deque):
    "Free buffers; one that is given back while it is still being copied is an error"
    busy = frozenset()
    def append(self, b):
        assert b.data_ptr() not in self.busy, 'an input buffer was given back before its copy was over'
        b.fill_(0xAA)
        super().append(b)

class Threads(convert._Lane):
    "A device whose copies happen later, in another thread"
    room,slow,made = 60_000,.0005,[]
    def __init__(self, device):
        super().__init__(device)
        self.rng,self.stream,self.waiting,self.flying = random.Random(0),ThreadPoolExecutor(1),[],deque()
        self.out,self.free = Poisoned(self.out),Watched(self.free)
        self.free.busy,self.most = set(),0
        Threads.made.append(self)
    def pinned(self, n): return torch.full((n,), 0xAA, dtype=torch.uint8)
    def upload(self, raw):
        there = torch.full_like(raw, 0xBB)
        self.waiting.append((raw, there)); self.free.busy.add(raw.data_ptr()); self.flying.append(raw.data_ptr())
        self.most = max(self.most, len(self.flying))
        return there
    def computing(self):
        time.sleep(self.rng.random()*self.slow)
        for raw,there in self.waiting: there.copy_(raw)
        self.waiting.clear()
        return nullcontext()
    def fetch(self, made, here):
        pause = self.rng.random()*self.slow
        def copy():
            for a,b in zip(made, here): time.sleep(pause/4); b.copy_(a)
        return self.stream.submit(copy)
    def wait(self, ticket):
        ticket.result(30)
        self.free.busy.discard(self.flying.popleft())

@pytest.fixture
def device(monkeypatch):
    "Conversions go through the device of threads; afterwards none of their own threads may live"
    before = set(threading.enumerate())
    Threads.made = []
    monkeypatch.setattr(convert, '_lane', Threads)
    yield Threads
    for o in Threads.made: o.stream.shutdown()
    assert not left(before), 'still running'

def left(before):
    "Threads that were begun since and do not end by themselves; one that Ctrl-C met while it was being started takes a moment"
    end = time.monotonic() + 5
    while (more := set(threading.enumerate()) - before) and time.monotonic() < end: time.sleep(.01)
    return more

def flagged(every=2, garbage=True):
    "An encoder with a flag: every second call it makes garbage and says so"
    n = [0]
    def encode(w, book, norm):
        n[0] += 1
        bad = n[0] % every == 0 or not torch.isfinite(w.float()).all()
        packed,norms = quantize_rows(torch.zeros_like(w) if bad else w, book, norm)
        if bad: packed.fill_(0x55); norms.fill_(float('nan'))
        return packed,norms,torch.tensor([int(bad)], dtype=torch.int32)
    return encode

def gpt_oss(E=5, H=256, I=384):
    p = L+'mlp.experts.'
    return {p+'gate_up_proj':gaussian(E, H, 2*I), p+'down_proj':gaussian(E, I, H, seed=1), p+'down_proj_bias':gaussian(E, H), 'model.norm.weight':torch.ones(H)}

def fp8(E=5):
    t = {'model.norm.weight':torch.ones(256)}
    for i,(n,shape,scale) in enumerate(((L+'mlp.experts.gate_up_proj', (E, 200, 256), (E, 2, 2)), (L+'self_attn.q_proj.weight', (300, 200), (3, 2)), (L+'self_attn.o_proj.weight', (256, 256), ()))):
        t[n] = gaussian(*shape, seed=i, dtype=torch.float32, scale=1.).to(torch.float8_e4m3fn)
        t[n.removesuffix('.weight') + ('.weight_scale_inv' if n.endswith('weight') else '_scale_inv')] = torch.rand(scale, generator=torch.Generator().manual_seed(i)) + .01
    return t

def apart(E=12):
    return {f'{L}mlp.experts.{e}.{n}_proj.weight':gaussian(*s, seed=e) for e in range(E) for n,s in (('gate', (64, 256)), ('up', (64, 256)), ('down', (256, 64)))} | {'model.norm.weight':torch.ones(256)}

def odd():
    "Norms too wide for float16, in one part of two, in a matrix of its own and in the middle of a stack; float32 and float16; blocks of zeros"
    w = gaussian(200, 300, dtype=torch.float32); w[190:] *= 2.**-24; w[5] = 0
    e = gaussian(6, 32, 256); e[3] *= 2.**-24
    return {TALL:w, L+'mlp.down_proj.weight':gaussian(60, 130, dtype=torch.float16), L+'mlp.experts.gate_up_proj':e, L+'self_attn.q_proj.weight':gaussian(40, 256)*2.**-24, 'model.norm.weight':torch.ones(8)}

MODELS = dict(toy=(lambda: toy(2, 256, 256, 5), {}), gpt_oss=(gpt_oss, dict(model_type='gpt_oss')), fp8=(fp8, dict(quantization_config=dict(quant_method='fp8'))), apart=(apart, {}), odd=(odd, {}))

@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "Each model, and what the CPU makes of it"
    d,res = tmp_path_factory.mktemp('stream'),{}
    for n,(make,config) in MODELS.items():
        write_model(d/n, make(), config=CONFIG | config)
        quantize_checkpoint(d/n, d/f'{n}.q', progress=False, max_shard_size=SHARD)
        res[n] = (d/n, snapshot(d/f'{n}.q'))
    return res

@pytest.mark.parametrize('room', [3000, 60_000, 10**6])
@pytest.mark.parametrize('name', MODELS)
def test_the_same_bytes_through_a_slow_device(name, room, sources, tmp_path, device, monkeypatch):
    "Buffers from smaller than a matrix to larger than the model, an encoder without a flag and one with"
    monkeypatch.setattr(Threads, 'room', room)
    src,want = sources[name]
    quantize_checkpoint(src, tmp_path/'q', progress=False, max_shard_size=SHARD)
    assert snapshot(tmp_path/'q') == want
    monkeypatch.setattr(convert, 'encode_rows_on', flagged())
    quantize_checkpoint(src, tmp_path/'f', progress=False, max_shard_size=SHARD)
    assert snapshot(tmp_path/'f') == want and verify_checkpoint(tmp_path/'f').ok
    assert all(o.most <= o.window for o in Threads.made) and (room > 3000 or max(o.most for o in Threads.made) == Threads.window)

def test_a_slow_writer_bounds_everything(sources, tmp_path, device, monkeypatch):
    "While nothing is written, no more is read than there are buffers, and nothing is lost"
    src,want = sources['toy']
    limit = checkpoint._Behind.__init__
    monkeypatch.setattr(checkpoint._Behind, '__init__', lambda self, f: limit(self, f, 5000))
    read,done,real,most = [0],[0],Source.read_into,[0]
    def counted(self, name, out, at=0):
        read[0] += out.nbytes; most[0] = max(most[0], read[0] - done[0])
        return real(self, name, out, at)
    monkeypatch.setattr(Source, 'read_into', counted)
    slow = BehindWriter._hash
    def f(self, item):
        time.sleep(.002)
        if not callable(item): done[0] += len(item)*3                  # 5 bits of 16
        return slow(self, item)
    monkeypatch.setattr(BehindWriter, '_hash', f)
    quantize_checkpoint(src, tmp_path/'q', progress=False, max_shard_size=SHARD)
    assert snapshot(tmp_path/'q') == want
    assert most[0] < 12*Threads.room, most

def test_parts_of_a_run_and_neighbours_in_a_file(sources):
    "A stack is read with one call a batch and encoded with one; experts in single tensors make one run for each kind"
    for name,least in (('toy', 2), ('apart', 2)):
        with open_source(sources[name][0]) as src:
            units = [u for u in plan_units(make_plan(src)) if u.row.action == 'quantize']
            batches = list(cut_batches(units, 300_000, True))
            assert [p.unit for b in batches for _,ps in b for p in ps] == units
            assert max(len(ps) for b in batches for _,ps in b) >= least
            for b in batches:
                assert all(at % 256 == 0 for at,_ in b) and len({convert._kind(p) for _,ps in b for p in ps}) >= 1
                assert sum(p.nbytes for _,ps in b for p in ps) <= 300_000
    stack = [convert._neighbours(ps) for b in cut_batches([u for u in units if u.expert is not None], 10**6, True) for _,ps in b]
    assert all(len(o) == 1 for o in stack)

def test_read_ahead_waits_for_buffers():
    "Never more results than buffers; a consumer that leaves early stops the threads"
    free,out,most = deque(range(3)),0,[0]
    before = set(threading.enumerate())
    lock = threading.Lock()
    def read(i, b):
        nonlocal out
        with lock: out += 1; most[0] = max(most[0], out)
        time.sleep(random.random()*.003)
        return i
    seen = []
    for i,b in read_ahead(read, range(40), free, threads=4):
        seen.append(i)
        with lock: out -= 1
        free.append(b)
        if i == 30: break
    assert seen == list(range(31)) and most[0] <= 3
    assert set(threading.enumerate()) == before

# --- errors

class Broken(Exception): pass

def breaking(monkeypatch, owner, name, n, error):
    "The n-th call raises"
    real,count = getattr(owner, name),[0]
    def f(*a, **k):
        count[0] += 1
        if count[0] == n: raise error
        return real(*a, **k)
    monkeypatch.setattr(owner, name, f)
    return count

STAGES = dict(read=(Source, 'read_into'), upload=(Threads, 'upload'), compute=(convert, 'encode_rows_on'), fetch=(Threads, 'fetch'), wait=(Threads, 'wait'), norms=(convert, 'store_norms'),
    write=(BehindWriter, '_to_disk'), hash=(BehindWriter, '_hash'), close=(BehindWriter, 'close'), check=(Source, 'check_unchanged'), rename=(os, 'replace'), journal=(checkpoint.CheckpointWriter, 'finish_shard'))

def counted_and_broken(monkeypatch, stage, src, out, n, error):
    "Converts with an error at the n-th call of a stage; returns how often it was called"
    with monkeypatch.context() as m:
        count = breaking(m, *STAGES[stage], n, error)
        try: quantize_checkpoint(src, out, progress=False, max_shard_size=SHARD)
        except type(error) as e: assert e is error
        else: assert n == 0, 'swallowed'
    return count[0]

@pytest.mark.parametrize('error', [Broken('x'), KeyboardInterrupt(), OSError(errno.EIO, 'x', 'f')], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('stage', STAGES)
def test_an_error_at_each_stage_comes_out(stage, error, sources, tmp_path, device, monkeypatch):
    "First, in the middle, last: the error itself comes out, no thread goes on, nothing half is left, and the same call then ends well"
    src,want = sources['toy']
    calls = counted_and_broken(monkeypatch, stage, src, tmp_path/'count', 0, error)
    assert calls > 2
    for n in {1, calls//2, calls - 1 if stage in ('write', 'hash') else calls}:         # their last call may be one of the writer that is dropped
        out,partial = tmp_path/f'{n}',tmp_path/f'{n}.partial'
        counted_and_broken(monkeypatch, stage, src, out, n, error)
        if partial.exists() and stage != 'rename':
            lines,shards = (partial/'journal.jsonl').read_text().splitlines()[1:],[*partial.glob('*.safetensors')]
            assert not [*partial.glob('*.tmp')] and len(lines) > 0
            assert len(shards) - len(lines) == (stage == 'journal')                        # named, but not entered: made again
        if not out.exists(): quantize_checkpoint(src, out, progress=False, max_shard_size=SHARD)
        assert snapshot(out) == want

def test_what_came_before_an_error_is_whole(sources, tmp_path, device, monkeypatch):
    "A NaN in the first matrix of the second shard does not spoil the first shard, though both were under way"
    t = toy(2, 256, 256, 5)
    names = list(t)
    write_model(tmp_path/'src', t)
    with open_source(tmp_path/'src') as src:
        shards = cut_shards(plan_units(make_plan(src)), SHARD)
        second = [u for u in list(shards.values())[1] if u.row.action == 'quantize'][0]
    w = t[second.row.name]
    (w[second.expert] if second.expert is not None else w)[3, 4] = float('nan')
    write_model(tmp_path/'src', t)
    for i,encode in enumerate((convert.encode_rows_on, flagged(10**6))):
        monkeypatch.setattr(convert, 'encode_rows_on', encode)
        with pytest.raises(NonFiniteError, match=rf'{second.key}: 1 NaN.*\(3, 4\)'): quantize_checkpoint(tmp_path/'src', tmp_path/f'q{i}', progress=False, max_shard_size=SHARD)
        assert len((tmp_path/f'q{i}.partial'/'journal.jsonl').read_text().splitlines()) == 2
        assert [p.name for p in (tmp_path/f'q{i}.partial').glob('*.safetensors*')] == [list(shards)[0]]

def test_ctrl_c_at_any_moment(sources, tmp_path, device, monkeypatch):
    "A real signal, after a random time: KeyboardInterrupt, no thread left, no unfinished file, and what is journaled is used again"
    src,want = sources['toy']
    monkeypatch.setattr(Threads, 'slow', .005)
    rng,hit = random.Random(1),0
    start = time.perf_counter(); quantize_checkpoint(src, tmp_path/'time', progress=False, max_shard_size=SHARD)
    usual = time.perf_counter() - start
    for i in range(20):
        out,before = tmp_path/f'{i}',set(threading.enumerate())
        timer = threading.Timer(rng.random()*usual, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            quantize_checkpoint(src, out, progress=False, max_shard_size=SHARD)
            timer.join(); time.sleep(.01)
        except KeyboardInterrupt: hit += 1
        timer.join()
        for o in Threads.made: o.stream.shutdown()
        assert not left(before)
        stage = tmp_path/f'{i}.partial'
        if stage.exists(): assert not list(stage.glob('*.safetensors.tmp')), list(stage.iterdir())
        if not out.exists(): quantize_checkpoint(src, out, progress=False, max_shard_size=SHARD)
        assert snapshot(out) == want
    assert hit > 8

# --- the writer

def test_behind_writer_makes_the_same_file(tmp_path):
    "Chunks of any size, in any number, with and without the header that was promised; memory that is reused as soon as the writer allows it"
    rng,layout = random.Random(2),[('big', 'F32', (300, 100)), ('b', 'U8', (70_000,)), ('tiny', 'U8', (3,)), ('none', 'U8', (0,))]
    tensors = {k:torch.randn(s, generator=torch.Generator().manual_seed(0)).mul(50).to(DTYPES[d]) for k,d,s in layout}
    for promised in (layout, layout[:2], []):
        def fill(cls, path, **kw):
            shared = torch.empty(1 << 17, dtype=torch.uint8)
            with cls(path, 1000, dict(a='b'), **kw) as w:
                for k,d,s in layout:
                    def chunks():
                        for c in tensors[k].split(rng.choice([90, 1000, 33_333])) if s[0] else []:
                            b = checkpoint.as_bytes(c); to = shared[:len(b)]; to.copy_(c.contiguous().view(-1).view(torch.uint8))
                            yield to
                            turn = threading.Event(); w.after(turn.set); assert turn.wait(30)
                            to.fill_(0xEE)
                    w.add(k, d, s, chunks())
            return w
        fill(ShardWriter, tmp_path/'a')
        w = fill(BehindWriter, tmp_path/'b', layout=promised)
        assert (tmp_path/'a').read_bytes() == (tmp_path/'b').read_bytes()
        assert w.sha256 == (file_sha256(tmp_path/'b') if promised == layout else None)

def test_behind_gives_memory_back_after_an_error():
    "A disk that fails: the error comes at the next call, and whoever waits for a buffer gets it"
    def f(item):
        if callable(item): return item()
        raise OSError(errno.ENOSPC, 'full')
    o,free = checkpoint._Behind(f, limit=10),threading.Event()
    o.put(b'12345678', 8)
    try: o.put(free.set)
    except OSError: free.set()
    assert free.wait(10)
    with pytest.raises(OSError): o.put(b'1', 1)
    with pytest.raises(OSError): o.close()
    assert not o.thread.is_alive()

def test_behind_is_bounded():
    gate,o = threading.Event(),None
    o = checkpoint._Behind(lambda i: gate.wait(30), limit=100)
    for _ in range(4): o.put('x', 25)
    t = threading.Thread(target=o.put, args=('x', 25)); t.start()
    t.join(.2)
    assert t.is_alive() and o.held == 100
    gate.set(); t.join(30); o.close()
    assert not t.is_alive() and o.held == 0

def test_the_calls_that_cuda_gets(sources, tmp_path, monkeypatch):
    "The CUDA way itself, with stand-ins for streams and events: what waits for what, and the same bytes"
    said,now = [],['none']
    class Stream:
        def __init__(self, device): self.name = ('up', 'work', 'down')[len([s for s in said if s[0] == 'stream'])]; said.append(('stream', self.name))
        def wait_stream(self, other): said.append((self.name, 'waits for', other.name))
    class Event:
        def __init__(self, blocking): assert blocking
        def record(self, stream): said.append(('event on', stream.name))
        def synchronize(self): said.append(('landed',))
    class Within:
        def __init__(self, stream): self.name = stream.name
        def __enter__(self): now.append(self.name); said.append(('in', self.name))
        def __exit__(self, *_): now.pop()
    for n,o in (('Stream', Stream), ('Event', Event), ('stream', Within)): monkeypatch.setattr(torch.cuda, n, o)
    monkeypatch.setattr(convert._Cuda, 'pinned', lambda self, n: torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(convert, '_lane', convert._Cuda)
    encode = flagged(2)
    def on_the_device(w, book, norm):
        assert now[-1] == 'work', 'computing outside its stream'
        return encode(w, book, norm)
    monkeypatch.setattr(convert, 'encode_rows_on', on_the_device)
    src,want = sources['toy']
    quantize_checkpoint(src, tmp_path/'q', progress=False, max_shard_size=SHARD)
    assert snapshot(tmp_path/'q') == want
    launch = [('in', 'up'), ('work', 'waits for', 'up'), ('in', 'work'), ('down', 'waits for', 'work'), ('in', 'down'), ('event on', 'down')]
    assert said[3:3+2*len(launch)+1] == [*launch, *launch, ('landed',)]          # the second is on its way before the first is awaited

"""Kills a conversion at every point where the disk changes, resumes it, and says how the folders look. Run by test_faults.py.

    python tests/kill_at.py SRC WORK MODE [STRIDE]

Each try is a forked process that sends itself SIGKILL just before or just after the n-th call of the functions below, so the points are
the same on every machine. Nothing of Python runs after SIGKILL: what the next process finds is what was on the disk.
The last forty points, where the output gets its name, are all tried, and every STRIDE-th of those before.
Prints one JSON object: for each point its name, whether what stands under the final name is whole, and what differs from an undisturbed run."""
import contextlib,json,os,shutil,signal,sys,traceback
from pathlib import Path
import torch
torch.set_num_threads(1)                                        # no thread pool before the forks
sys.path.insert(0, str(Path(__file__).parent))
import hlwq.convert as convert
from hlwq.lloyd_max import codebook
from kit import snapshot

SHARD = 150_000
POINTS = ('os.replace', 'os.rename', 'os.fsync', 'os.unlink', 'os.mkdir', 'os.rmdir', 'shutil.rmtree', 'hlwq.convert.quantize_rows', 'hlwq.checkpoint.file_sha256')

def run(mode, src, out):
    if mode == 'dequantize': convert.dequantize_checkpoint(src, out, max_shard_size=4*SHARD, progress=False)
    else: convert.quantize_checkpoint(src, out, max_shard_size=SHARD, progress=False, overwrite=mode == 'overwrite')

def hooked(n, log=None):
    "Replaces the functions by ones that count, and that kill the process at count n"
    count = 0
    def step(name):
        nonlocal count
        count += 1
        if log is not None: log.append(name)
        if count == n: os.kill(os.getpid(), signal.SIGKILL)
    def wrap(name, f):
        def g(*a, **k):
            step(f'before {name}')
            try: return f(*a, **k)
            finally: step(f'after {name}')
        return g
    for name in POINTS:
        module,f = name.rsplit('.', 1)
        m = sys.modules[module]
        setattr(m, f, wrap(name, getattr(m, f)))

def child(f):
    "Runs f in a fork and returns how it ended: exit status, or minus the signal"
    pid = os.fork()
    if not pid:
        try: f(); code = 0
        except FileExistsError: code = 17
        except BaseException: traceback.print_exc(); code = 1
        os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

def fresh(work, mode, old):
    "An empty place to work in, or one where an old checkpoint stands"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if mode == 'overwrite': shutil.copytree(old, work/'out')
    return work/'out'

def main(src, work, mode, stride=1):
    src,work = Path(src),Path(work)
    for b in (2, 3, 5): codebook(bits=b)
    old,log = work/'old',work/'log'
    if mode == 'overwrite': assert child(lambda: convert.quantize_checkpoint(src, old, bits=2, progress=False)) == 0
    def counted():
        names = []
        hooked(0, names)
        run(mode, src, work/'clean'/'out')
        log.write_text(json.dumps(names))
    fresh(work/'clean', mode, old)
    assert child(counted) == 0
    names,want,res = json.loads(log.read_text()),snapshot(work/'clean'),[]
    old_files = snapshot(old)
    for n in sorted({*range(1, len(names)-39, stride), *range(max(1, len(names)-39), len(names)+1)}):
        out = fresh(work/'try', mode, old)
        def victim(): hooked(n); run(mode, src, out)
        killed = child(victim)
        left,there = snapshot(work/'try'),snapshot(out)
        if there: there = {k:v for k,v in there.items() if k not in ('journal.jsonl', 'lock')}      # left over, and harmless; below they count
        whole = there is None or there == old_files or there == {k[4:]:v for k,v in want.items() if k.startswith('out/')}
        again = child(lambda: run(mode, src, out))
        got = snapshot(work/'try')
        res.append(dict(n=n, point=names[n-1], killed=killed, whole=whole, again=again, left=sorted(k for k in left if '/' not in k),
            differ=sorted(k for k in got.keys()|want.keys() if got.get(k) != want.get(k))[:6]))
    print(json.dumps(res))

if __name__ == '__main__': main(*sys.argv[1:4], *map(int, sys.argv[4:]))

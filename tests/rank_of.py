"""One rank of a conversion, which may be made to die. Run by test_ranks.py, alone or by torchrun.

    python tests/rank_of.py SRC OUT KILL AFTER SILENCE

Rank KILL sends itself SIGKILL when it has finished AFTER shards and is in the middle of the next; -1 spares all. What is raised is printed on one line."""
import os,signal,sys,time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))
import hlwq.ranks as ranks
from hlwq.checkpoint import CheckpointWriter

SHARD = 150_000

def main(src, out, kill, after, silence):
    rank = ranks.launched_rank()
    if rank == int(kill):
        whole = []
        finish = CheckpointWriter.finish_shard
        def finished(self, *args): finish(self, *args); whole.append(args[0])
        CheckpointWriter.finish_shard = finished
        shard = CheckpointWriter.shard
        def begun(self, *args):
            w = shard(self, *args)
            if int(after) <= len(self._begun_here):
                end = time.monotonic() + 20
                while len(whole) < int(after) and time.monotonic() < end: time.sleep(.01)
                os.kill(os.getpid(), signal.SIGKILL)
            self._begun_here.append(args[0])
            return w
        CheckpointWriter._begun_here, CheckpointWriter.shard = [], begun
    elif int(kill) >= 0:                                        # the others are slow, so that they are at work when it dies
        write = ranks._write_shards
        def slowly(cw, source, shards, *how):
            tick = how[-1]
            def wait(n): time.sleep(.1); tick(n)
            return write(cw, source, shards, *how[:-1], wait)
        ranks._write_shards = slowly
    try: ranks.quantize_on_ranks(src, out, progress=False, max_shard_size=SHARD, ranks=ranks.launched_ranks(float(silence)))
    except Exception as e:
        sys.stderr.write(f'rank {rank} raised {type(e).__name__}: {e}\n')
        return 3
    return 0

if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))

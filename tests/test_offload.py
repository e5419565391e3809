"""Experts on the host against the same experts in memory, bit for bit: every number of slots, policy and length, copies that come late, rows that are poisoned, work that is cut off.

Kernels run in the interpreter where there is no GPU. HLWQ_LONG=1 compares a thousand decode steps instead of three hundred."""
import copy,os
from functools import lru_cache
import torch
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')     # before triton is imported
import numpy as np,pytest
transformers = pytest.importorskip('transformers')
from transformers import AutoModelForCausalLM
from hlwq import linear as linear_module
from hlwq.bank import bank_from_model
from hlwq.cache_policy import ExpertTable,make_policy
from hlwq.cache_sim import record_routing,simulate_cache,synthetic_trace
from hlwq.core import ConfigError,UnsupportedError,asset_path
from hlwq.experts import HLWQExperts,PackedStack,WAYS
from hlwq.generate import HLWQGenerator,generate
from hlwq.hf import HLWQConfig
from hlwq.kernels import cpu
from hlwq.offload import *
from hlwq.offload import _runs
from hlwq.packed_model import hlwq_report,unpack
from hlwq.quantize import quantize
from kit import complete,gaussian,snapshot
from test_experts import KINDS,act,experts,pack

GPU,LONG = torch.cuda.is_available(),bool(os.environ.get('HLWQ_LONG'))
device = torch.device('cuda', torch.cuda.current_device()) if GPU else torch.device('cpu')
POLICIES = ('lru', 'lfu', 'lfru', 'pinned', 'random')
E,K = 16,4
SLOTS = (1, 2, K, K+1, 2*K, E-1, E)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture(scope='module')
def tiny():
    "The trained model of the package, packed"
    transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(asset_path('tiny-moe-10m'), dtype=torch.float32, quantization_config=HLWQConfig(bits=5)).eval()

@pytest.fixture(scope='module')
def layer(tiny): return tiny.model.layers[1].mlp.experts

class Holder(torch.nn.Module):
    "A model that is a few layers of experts"
    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

def offloaded(layers, slots, policy='lru', **kw):
    m = Holder(*(copy.deepcopy(o) for o in layers))
    return offload_experts(m, slots, policy, hot=[[0, 3]]*len(layers) if policy == 'pinned' else None, **kw)

def routing(T, k=K, n=E, seed=0, skew=1.):
    g = torch.Generator().manual_seed(seed)
    p = (-skew*torch.arange(1., n+1).log()).exp()
    return torch.multinomial(p.expand(T, n), k, generator=g),torch.rand(T, k, generator=g)

def calls(width=256, dtype=torch.float32, lengths=(1, 2, 1, 7, 1, 64, 1, 300, 1, 1)):
    return [(act(T, width, seed=i, dtype=dtype),*routing(T, seed=i)) for i,T in enumerate(lengths)]

@pytest.fixture(scope='module')
def resident(layer):
    "What the layer computes with all experts in memory: float32 and bfloat16"
    with torch.no_grad(): return {d:[layer(x, ids, w.to(d)) for x,ids,w in calls(dtype=d)] for d in (torch.float32, torch.bfloat16)}

# --- the same bits

@torch.no_grad()
@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('slots', SLOTS)
def test_same_bits(layer, resident, slots, policy):
    for dtype,staging in ((torch.float32, 2), (torch.float32, 5), (torch.bfloat16, None)):
        m = offloaded([layer], slots, policy, staging=staging)
        for (x,ids,w),want in zip(calls(dtype=dtype), resident[dtype]): assert torch.equal(m.layers[0](x, ids, w.to(dtype)), want), (len(x), staging)

@torch.no_grad()
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', KINDS, ids=lambda k: '-'.join(k) or 'plain')
@pytest.mark.parametrize('best', (True, False), ids=('compiled', 'torch'))
def test_every_kind_of_experts(kind, way, best, monkeypatch):
    "Biases, no gate, transposed, norms behind; with and without the compiled kernel"
    if not best: monkeypatch.setattr(cpu, 'available', lambda: False)
    top,_ = pack(experts(**kind, implementation=way))
    m = offloaded([top.experts], 2, staging=2)
    for T in (1, 6, 40):
        ids,w = routing(T, 2, 5, T)
        assert torch.equal(m.layers[0](act(T, 144), ids, w), top.experts(act(T, 144), ids, w))

def test_with_gradients_enabled(tiny):
    "A plain call without torch.no_grad gives the same bits; inference mode too, before and after"
    ids = torch.randint(3, 8000, (1, 30))
    m = copy.deepcopy(tiny)
    with torch.inference_mode(): offload_experts(m, 2, staging=2)
    for _ in range(2):
        assert torch.equal(m(ids).logits, tiny(ids).logits)
        with torch.inference_mode(): assert torch.equal(m(ids).logits, tiny(ids).logits)

@torch.no_grad()
@pytest.mark.parametrize('bits', (2, 3, 5, 8))
def test_widths(bits):
    "Other bits and norms in float32"
    for scales in ([.05]*4, [.05, 1e-7, .05, 1e5]):
        stacks = [PackedStack.from_quantized([quantize(gaussian(out, width, seed=e, dtype=torch.float32, scale=scales[e]), bits) for e in range(4)]) for out,width in ((144, 144), (144, 72))]
        top,_ = pack(experts())
        top.experts.w13,top.experts.w2,top.experts.num_experts = *stacks,4
        m = offloaded([top.experts], 1, staging=2)
        for T in (1, 30):
            ids,w = routing(T, 2, 4, T)
            assert torch.equal(m.layers[0](act(T, 144), ids, w), top.experts(act(T, 144), ids, w))

@torch.no_grad()
@pytest.mark.parametrize('threads', (1, 3))
def test_threads(layer, threads):
    "Work is divided among threads at other places than groups"
    torch.set_num_threads(threads)
    try:
        m = offloaded([layer], 3, staging=2)
        for x,ids,w in calls(lengths=(300, 1, 64)): assert torch.equal(m.layers[0](x, ids, w), layer(x, ids, w))
    finally: torch.set_num_threads(1)

@torch.no_grad()
@pytest.mark.parametrize('slots,staging', [(2, None), (3, 2), (9, 4)])
def test_decode_steps(tiny, slots, staging):
    "Hundreds of steps of the whole model: logits of each"
    n,m = (1000 if LONG else 300)//3,offload_experts(copy.deepcopy(tiny), slots, 'lfru' if slots == 3 else 'lru', staging=staging)
    ids = torch.randint(3, 8000, (1, 40), generator=torch.Generator().manual_seed(slots))
    a,b = tiny(ids, use_cache=True),m(ids, use_cache=True)
    for _ in range(n):
        assert torch.equal(a.logits, b.logits)
        t = a.logits[:, -1:].argmax(-1)
        a,b = (o(t, past_key_values=c.past_key_values, use_cache=True) for o,c in ((tiny, a), (m, b)))
    assert m.offload_stats().total.misses > n

@pytest.mark.parametrize('how', (dict(), dict(do_sample=True, top_k=40, seed=3)))
def test_generate(tiny, how):
    "Two texts one after the other with what the first left in the slots, and a batch with padding"
    m = offload_experts(copy.deepcopy(tiny), 2, staging=2)
    for rows,n in ((1, 9), (1, 30), (3, 12)):
        ids,mask = torch.randint(3, 8000, (rows, n), generator=torch.Generator().manual_seed(n)),torch.ones(rows, n, dtype=torch.long)
        for i in range(rows): mask[i, :2*i] = 0
        assert torch.equal(generate(m, ids, 30, attention_mask=mask, **how), generate(tiny, ids, 30, attention_mask=mask, **how))

# --- the two bugs of public code: the tests above notice them

class Naive(ExpertTable):
    "Evicts among all, without protection, and cuts off what does not fit; stale entries stay"
    def resolve(self, ids, keep=(), staging=0):
        ids,loads = np.asarray(ids),[]
        for e in self.distinct(ids)[:self.slots]:
            if (s := self.table[e]) >= 0 and self.held[s] == e: self.policy.touch([e]); continue
            if self.free: s = self.free.pop(0)
            else:
                old = self.policy.victims(1, set())[0]
                s = self.table[old]; self.policy.evict([old])
            self.table[e],self.held[s] = s,e
            self.policy.admit([e]); self.policy.touch([e]); loads.append((e, s))
        return np.maximum(self.table[ids], 0),loads

@torch.no_grad()
@pytest.mark.parametrize('policy,slots', [('lru', 2), ('lru', 3), ('lfru', 4), ('lfru', 6)])
def test_public_bugs_are_noticed(layer, policy, slots):
    m = offloaded([layer], slots, policy)
    m.offload.tables.tables = [Naive(E, slots, make_policy(policy, E))]
    bad = 0
    for i in range(60):
        ids,w = routing(1, seed=i)
        bad += not torch.equal(m.layers[0](act(1, 256), ids, w), layer(act(1, 256), ids, w))
    assert bad > 2

# --- poison, and copies that come late

class Late(Pool):
    "Copies happen when somebody waits for them, until then the rows are poisoned; rows that nobody may read are poisoned after each call"
    def poison(self, rows):
        for n in PARTS[1::2]: bits_of(self.parts[n])[rows] = float('nan')
    def load(self, bank, loads, names=PARTS, after=None):
        if not loads: return None
        self.queue = getattr(self, 'queue', [])
        for n in set(names) & set(PARTS[1::2]): bits_of(self.parts[n])[[r for _,r in loads]] = float('nan')
        self.queue.append((bank, loads, names))
        return len(self.queue)
    def wait(self, ticket=None):
        for o in self.__dict__.get('queue', [])[:ticket]: self._copy(*o)
        self.queue = [None]*ticket + self.queue[ticket:] if ticket else []
        self.queue = [o for o in self.queue if o] if not ticket else self.queue
    def _copy(self, *o):
        if o[0] is not None: super()._copy(*o)

def bits_of(t): return t.view(torch.float16 if t.dtype == torch.int16 else torch.float32)

def late(m):
    p = m.offload.pool
    p.__class__ = Late
    def copy_all(ticket=None, done=[0], p=p):
        q = p.__dict__.setdefault('queue', [])
        for i in range(ticket or len(q)):
            if q[i]: Pool._copy(p, *q[i]); q[i] = None
    p.wait = copy_all
    return p

@torch.no_grad()
@pytest.mark.parametrize('policy', ('lru', 'lfru', 'random'))
@pytest.mark.parametrize('slots,staging', [(1, 2), (2, 4), (4, 2), (9, 3)])
def test_poison_and_late_copies(layer, resident, slots, staging, policy):
    m = offloaded([layer, layer], slots, policy, staging=staging)
    pool,waited = late(m),0
    for (x,ids,w),want in zip(calls(), resident[torch.float32]):
        for l in (0, 1):
            assert torch.equal(m.layers[l](x, ids, w), want)
            assert not any(pool.queue), 'a copy that nobody waited for'
            waited += len(pool.queue); pool.queue.clear()
            live = {e + i*slots for i in (0, 1) for e in m.offload.tables.tables[i].table.tolist() if e >= 0}
            pool.poison([r for r in range(len(pool.parts[PARTS[0]])) if r not in live])
    assert waited > 10

@torch.no_grad()
def test_poison_is_noticed(layer):
    "Without waiting, numbers that are not there show"
    m = offloaded([layer], 2)
    late(m).wait = lambda ticket=None: None
    assert m.layers[0](act(1, 256), *routing(1)).isnan().any()

# --- work that is cut off

class Stop(BaseException): pass

@torch.no_grad()
@pytest.mark.parametrize('T,after', [(1, 0), (1, 1), (300, 0), (300, 3), (300, 9)])
def test_interrupted(layer, T, after, monkeypatch):
    "Ctrl-C between copies: the table promises nothing that did not come"
    m = offloaded([layer], 3, staging=2)
    m.layers[0](act(1, 256), *routing(1, seed=9))
    left,real = [after],Pool._copy
    def stops(self, *a):
        if not left[0]: raise Stop
        left[0] -= 1
        if T == 1 and not left[0]: real(self, *a); raise Stop
        real(self, *a)
    monkeypatch.setattr(Pool, '_copy', stops)
    with pytest.raises(Stop): m.layers[0](act(T, 256), *routing(T, seed=1))
    monkeypatch.setattr(Pool, '_copy', real)
    for n in PARTS[1::2]: bits_of(m.offload.pool.parts[n])[:] = float('nan')
    for x,ids,w in calls(): assert torch.equal(m.layers[0](x, ids, w), layer(x, ids, w))

# --- prompts

@torch.no_grad()
@pytest.mark.parametrize('slots,staging', [(1, 2), (4, 3), (6, 8), (11, 4)])
def test_each_expert_once(layer, slots, staging, monkeypatch):
    "A prompt copies the experts that are not in slots, each part once; those of its last tokens are in slots afterwards"
    m,seen,real = offloaded([layer], slots, staging=staging),[],Pool._copy
    monkeypatch.setattr(Pool, '_copy', lambda self,bank,loads,names: (seen.extend((e, n) for e,_ in loads for n in names), real(self, bank, loads, names)))
    for i,T in enumerate((64, 1, 300, 1, 1, 64)):
        ids,w = routing(T, seed=i)
        before,wanted = m.offload.tables.table(0),set(ids.flatten().tolist())
        seen.clear()
        assert torch.equal(m.layers[0](act(T, 256, seed=i), ids, w), layer(act(T, 256, seed=i), ids, w))
        assert sorted(seen) == sorted((e, n) for e in wanted if before[e] < 0 for n in PARTS)
        after = m.offload.tables.table(0)
        if T > 1 and min(T*K, E) > slots + staging:
            last = list(dict.fromkeys(e for t in reversed(ids.tolist()) for e in t))[:slots]
            assert all(after[e] >= 0 for e in last)
            kept = {e for e in range(E) if before[e] >= 0} - {e for e in range(E) if after[e] >= 0}
            assert len(kept) <= len([e for e in last if before[e] < 0])
    c,groups = m.offload_stats(),3 if K <= slots + staging else 6
    assert c.total.calls == 6 - groups and c.prompts[0][0] == groups

def test_runs(): assert _runs([(3, 7), (4, 8), (6, 9), (7, 10), (8, 0)]) == [[3, 7, 2], [6, 9, 2], [8, 0, 1]]

# --- counters and recordings

def test_counters(tiny):
    m = offload_experts(copy.deepcopy(tiny), 5, trace=True, cold=10)
    first = torch.tensor([[77]])
    generate(m, first, 60)
    trace,s = m.offload.recorder.trace(),m.offload_stats()
    for part,sim in (('total', simulate_cache(trace, 5, cold_steps=10).total), ('cold', simulate_cache(trace, 5, cold_steps=10).cold), ('warm', simulate_cache(trace, 5, cold_steps=10).warm)):
        c = s.total if part == 'total' else sum(getattr(s, part)[1:], getattr(s, part)[0])
        assert (c.hits, c.misses, c.reloads, c.evictions, c.calls) == (sim.hits, sim.misses, sim.reloads, sim.evictions, sim.calls), part
    assert s.total.requests == trace.ids.size and s.decode_bytes == s.total.misses*s.expert_bytes and s.total.staged == 0
    assert sum(c.calls for c in s.cold) == 40
    json = s.to_json()
    assert json['decode_bytes'] == s.decode_bytes and '|' in s._repr_markdown_() and 'host decides' in repr(s)
    m.offload_stats(reset=True)
    assert m.offload_stats().total.requests == 0 and m.offload_stats().to_json()['warm_hit_rate'] is None
    assert s.copy_seconds is None
    m.offload_stats(measure=True)
    generate(m, first, 20)
    assert m.offload_stats(measure=False).copy_seconds > 0 and m.offload_stats().copy_seconds is None

def test_record_routing(tiny):
    m = offload_experts(copy.deepcopy(tiny), 3)
    ids = torch.randint(3, 8000, (1, 20))
    with torch.no_grad():
        with record_routing(m) as a: m(ids)
        with record_routing(tiny) as b: tiny(ids)
    assert (a.trace().ids == b.trace().ids).all() and a.trace().meta['expert_bytes'] == b.trace().meta['expert_bytes']

@torch.no_grad()
def test_fetch(layer):
    "Fetched before, for the same tensor of ids; anything else is asked for anew"
    m = offloaded([layer], 2)
    for i in range(6):
        (ids,w),x = routing(1, seed=i),act(1, 256, seed=i)
        m.layers[0].fetch(ids if i % 2 else ids.clone())
        assert torch.equal(m.layers[0](x, ids, w), layer(x, ids, w)) and m.layers[0].pending is None
    assert m.offload_stats().total.calls == 9

# --- models

@pytest.mark.parametrize('slots', (E, E+5))
def test_all_of_them(tiny, slots):
    "As many slots as experts: nothing changes"
    m = copy.deepcopy(tiny)
    assert offload_experts(m, slots) is m and not hasattr(m, 'offload') and type(m.model.layers[0].mlp.experts) is HLWQExperts

def test_saves_and_unpacks(tiny, tmp_path):
    "From the bank: the same files, the same weights"
    m = offload_experts(copy.deepcopy(tiny), 3)
    tiny.save_pretrained(tmp_path/'a'); m.save_pretrained(tmp_path/'b')
    a,b = (snapshot(tmp_path/o) for o in 'ab')
    assert {k for k in a if a[k] != b[k]} <= {'hlwq_manifest.json'} and a.keys() == b.keys()
    for x,y in zip(unpack(copy.deepcopy(tiny), torch.float32).parameters(), unpack(m, torch.float32).parameters()): assert torch.equal(x, y)

def test_report_and_memory(tiny):
    m = offload_experts(copy.deepcopy(tiny), 2, staging=2)
    r,old = hlwq_report(m),hlwq_report(tiny)
    assert r.nbytes == old.nbytes and len(r.rows) == len(old.rows) and not any('experts' in n for n,_ in m.named_parameters())
    assert m.offload.pool.nbytes < sum(l.mlp.experts.nbytes for l in tiny.model.layers)/5
    assert 'lru on the host' in repr(m.offload) and '2 of them in slots' in repr(m)

def test_without_content(tiny):
    "A bank is enough: the model's own stacks may be on the meta device"
    bank,m = bank_from_model(copy.deepcopy(tiny)),copy.deepcopy(tiny)
    bank_from_model(m)                                         # leaves nothing behind
    with pytest.raises(ConfigError, match='no content') as e: offload_experts(copy.deepcopy(m), 2)
    assert complete(e.value)
    ids = torch.randint(3, 8000, (1, 20))
    for slots in (2, E): 
        with torch.no_grad(): assert torch.equal(offload_experts(copy.deepcopy(m), slots, bank=bank)(ids).logits, tiny(ids).logits)

@pytest.mark.parametrize('kw,match', [(dict(slots=0), 'slots: 0'), (dict(slots=2.), 'slots: 2.0'), (dict(slots=2, staging=-1), 'staging: -1'), (dict(slots=2, policy='fifo'), "policy: 'fifo'"), (dict(slots=2, policy='pinned'), 'no experts to pin'),
    (dict(slots=2, hot=[[1]]), 'hot: experts of 1 layers'), (dict(slots=2, policy='pinned', hot=[[99]]*4), 'experts 99')])
def test_requests_that_cannot_be_met(tiny, kw, match):
    m = copy.deepcopy(tiny)
    with pytest.raises(ConfigError, match=match) as e: offload_experts(m, **kw)
    assert complete(e.value) and type(m.model.layers[0].mlp.experts) is HLWQExperts

def test_refusals(tiny):
    m = offload_experts(copy.deepcopy(tiny), 2, staging=2)
    other = copy.deepcopy(tiny); other.model.layers = other.model.layers[:2]
    for f,kind,match in ((lambda: offload_experts(m, 2), UnsupportedError, 'once'), (lambda: m(inputs_embeds=torch.randn(1, 2, 256, requires_grad=True)).logits.sum().backward(), UnsupportedError, 'no gradient'),
        (lambda: offload_experts(copy.deepcopy(tiny), 2, bank=bank_from_model(other)), ConfigError, 'bank: experts of 2 layers'),
        (lambda: m.model.layers[0].mlp.experts(act(1, 256), torch.tensor([[0, 1, 2, 16]]), torch.ones(1, 4)), ConfigError, 'numbers? .*16'),
        (lambda: m.model.layers[0].mlp.experts(act(60, 256), torch.arange(240).view(60, 4) % 17, torch.ones(60, 4)), ConfigError, '14 numbers that do not exist')):
        with pytest.raises(kind, match=match) as e: f()
        assert complete(e.value)
    assert 'by copies that the host starts' in m.model.layers[0].mlp.experts.why_no_graph(1)
    assert m.model.layers[0].mlp.experts(torch.empty(0, 256), torch.empty(0, 4, dtype=torch.long), torch.empty(0, 4)).shape == (0, 256)

# --- kernels

triton = pytest.importorskip('triton')
from hlwq.kernels import layout,moe,slots as kernels
if not GPU and not layout.INTERPRETED: pytest.skip('triton was imported without TRITON_INTERPRET before', allow_module_level=True)

def stream(E, calls, pairs, seed):
    "Ids with repetitions, and now and then an expert that does not exist"
    g = np.random.default_rng(seed)
    for _ in range(calls): yield torch.from_numpy(np.minimum(g.zipf(1.3, pairs) - 1, g.integers(0, E, pairs))).to(device)

@pytest.mark.parametrize('policy,E,slots,staging,pairs', [(p,*o) for p in POLICIES for o in ((5, 1, 4, 3), (16, 6, 4, 4), (40, 9, 9, 9)) if GPU or p in ('lru', 'lfru') or o[0] < 40] + [('lfru', 40, 20, 20, 33), ('lru', 300, 9, 24, 17)][:9*GPU or 1])
def test_resolve_kernel(policy, E, slots, staging, pairs):
    "Decisions, order, state and counters: kernel, definition and table"
    hot = [[0, E-1]]*2
    a,b = (kernels.slot_state(2, E, slots, staging, policy, hot, device, cold=2, halve_every=3, seed=1) for _ in range(2))
    table = ExpertTable(E, slots, make_policy(policy, E, hot[0])) if policy != 'random' else None
    if hasattr(getattr(table, 'policy', None), 'halve_every'): table.policy.halve_every = 3
    loads,n = kernels.new_loads(min(pairs, E), device),6 if pairs < 20 else 4
    for i,ids in enumerate(stream(E, n, pairs, slots)):
        want,pairs_to_load = kernels.expert_resolve_ref(a, 1, ids, count=i != 3)
        got = kernels.expert_resolve(b, 1, ids, loads, count=i != 3)
        assert got.tolist() == want.tolist() and kernels.listed(loads) == pairs_to_load
        if table:
            found,_ = table.resolve(ids.cpu().numpy(), staging=staging)
            assert got.tolist() == [s + slots if s < slots else s + slots for s in found.tolist()]
            assert (b.table[1].cpu().numpy() == table.table).all()
    for o in ('table', 'last', 'uses', 'known', 'clock', 'counts'): assert torch.equal(getattr(a, o), getattr(b, o)), o
    assert b.counts[1, 0, 0] == 2 and b.counts[1, 1, 0] == n - 3 and (b.table[0] == -1).all()
    b.forget(1); a.forget(1)
    ids = next(stream(E, 1, pairs, 99))
    assert kernels.expert_resolve(b, 1, ids, loads).tolist() == kernels.expert_resolve_ref(a, 1, ids)[0].tolist()

def test_resolve_without_room():
    "More guests than staging places: no row, rather than somebody else's"
    s,loads = kernels.slot_state(1, 8, 1, 1, device=device),kernels.new_loads(4, device)
    assert kernels.expert_resolve(s, 0, torch.tensor([3, 1, 9, -1, 5], device=device), kernels.new_loads(5, device)).tolist() == [0, 1, -1, -1, -1]
    for ids in (torch.tensor([1], dtype=torch.int32, device=device), torch.arange(8, device=device)[::2]):
        with pytest.raises(ConfigError) as e: kernels.expert_resolve(s, 0, ids, loads)
        assert complete(e.value)

@pytest.mark.parametrize('programs', (1, 3, 7))
def test_gather_kernel(programs):
    for nbytes in (16, 48, 4096, 16384 + 16, 40000):
        bank = torch.randint(0, 256, (5, nbytes), dtype=torch.uint8)
        if GPU: bank = bank.pin_memory()
        pool = torch.full((6, nbytes), 7, dtype=torch.uint8, device=device); want = pool.clone()
        loads = torch.tensor([4, 0, 4, 1, 0, 5, 2, -1, 3, 2, 1, 0], dtype=torch.int32, device=device)
        kernels.expert_gather(bank, loads, pool, programs)
        kernels.expert_gather_ref(bank, kernels.listed(loads), want)
        assert torch.equal(pool, want) and (pool[[0, 3, 4]] == 7).all()
    loads[0] = 0
    kernels.expert_gather(bank, loads, pool.fill_(9), programs)
    assert (pool == 9).all()

# --- tiles: kernels for experts on a pool, and the way in which the device decides

@pytest.fixture
def as_gpu(monkeypatch):
    "Where there is no GPU, the CPU passes for one with kernels"
    if not GPU: monkeypatch.setattr(linear_module, 'why_no_triton', lambda device: '')

HIDDEN,INTER = (128, 64) if GPU else (16, 8)                   # one tile of 16 rows is what the interpreter has patience for
LENGTHS = (1, 1, 2, 1, 17, 1, 64, 300, 1) if GPU else (1, 1, 17, 1)      # up to 32 pairs have to find room, as they do in layers that are not so small

def tiles_layer(n=6, seed=0):
    "A layer of a model with silu(gate)*up, in tiles"
    top,_ = pack(experts())
    m = top.experts
    make = lambda out,width,s: PackedStack.from_quantized([quantize(gaussian(out, width, seed=s+e, dtype=torch.float32, scale=.1), 5) for e in range(n)])
    m.w13,m.w2,m.num_experts,m.swiglu = make(2*INTER, HIDDEN, seed),make(HIDDEN, INTER, seed+1000),n,True
    return m.to(device)

def tile_calls(n=6, k=2, lengths=LENGTHS, dtype=torch.bfloat16):
    return [tuple(o.to(device) for o in (act(T, HIDDEN, seed=i, dtype=dtype), ids, w.to(dtype))) for i,T in enumerate(lengths) for ids,w in [routing(T, k, n, i)]]

@lru_cache(maxsize=None)
def tiled():
    "A layer and what it computes with all experts in memory"
    with torch.no_grad(): return (m := tiles_layer()),[m(*c) for c in tile_calls()]

def few_places(m, staging):
    "Makes calls go by groups that would fit: kernels for 32 pairs want more places than so small a layer has experts"
    m.offload.staging = staging
    return m

@torch.no_grad()
def test_groups_on_stacks_with_gaps(as_gpu):
    "Matrices that do not lie side by side, in another order, in groups"
    def gaps(t):
        wide = torch.zeros(len(t), t[0].numel() + 64, dtype=t.dtype, device=device)
        wide[:, :t[0].numel()] = t.flatten(1)
        return wide[:, :t[0].numel()].unflatten(1, t.shape[1:])
    m,(x,ids,w) = tiles_layer(3),*tile_calls(3, 2, (5,))
    dense = [(s.in_order().data, s.norms, linear_module.book_on(s.key, device)) for s in (m.w13, m.w2)]
    wide = [(gaps(t), gaps(n), b) for t,n,b in dense]
    flat,weights = ids.flatten(),w.flatten()
    counts,want = flat.bincount(minlength=3).tolist(),moe.expert_prompt(x, flat, weights, 2, *dense, 3)
    for order,cuts in (([2, 0, 1], [0, 0, 1, 3]), ([0, 1, 2], [0, 3]), ([1, 2, 0], [0, 1, 2, 3]))[:1 + 2*GPU]:
        rank = torch.empty(3, dtype=torch.long, device=device); rank[order] = torch.arange(3, device=device)
        by = moe.ByGroups(torch.tensor(order, device=device), rank, [counts[e] for e in order], zip(cuts, cuts[1:]))
        assert torch.equal(moe.expert_prompt(x, flat, weights, 2, *wide, 3, by), want)
    one = x[:1],ids[:1],w[:1]
    assert torch.equal(moe.expert_layer(*one, *wide), moe.expert_layer(*one, *dense))

@torch.no_grad()
@pytest.mark.parametrize('slots,policy', [(1, 'lru'), *[(3, 'lfru'), (5, 'random'), (2, 'lfu')]*GPU])
def test_device_path(as_gpu, slots, policy):
    "Decode steps and a prompt in groups; the second layer sees what the first one sees, with its own slots"
    m,results = tiled()
    o = few_places(offloaded([m]*(1 + GPU), slots, policy, on_device=True), 4)
    for (x,ids,w),want in zip(tile_calls(), results):
        for l in o.layers: assert torch.equal(l(x, ids, w), want), len(x)
    s = o.offload_stats()
    assert s.on_device and s.total.calls == sum(min(2*T, 6) <= slots + 4 for T in LENGTHS)*len(o.layers) and s.prompts[0][0] == sum(min(2*T, 6) > slots + 4 for T in LENGTHS)
    assert o.layers[0].why_no_graph() == '' and 'device decides' in repr(s)
    for l in range(len(o.layers)): assert sorted(t for t in o.offload.tables.table(l).tolist() if t >= 0) == list(range(slots))

@pytest.mark.skipif(GPU, reason='test_long_prompts_on_the_card does it for real')
@torch.no_grad()
def test_long_prompts_in_groups(as_gpu, monkeypatch):
    "So many tokens that experts are decoded for one grouped product, which only a GPU has: here it is a loop"
    def loop(x, w, offs): return torch.cat([x[a:b].float() @ m.float() for m,a,b in zip(w, [0, *offs.tolist()], offs.tolist())]).to(x.dtype)
    monkeypatch.setattr(moe, '_can_group', lambda x, norms, E: True)
    monkeypatch.setattr(torch.nn.functional, 'grouped_mm', loop, raising=False)
    m,(x,ids,w) = tiles_layer(3),*tile_calls(3, 2, (80,))
    want = m(x, ids, w)
    for on_device,groups in ((False, True), (True, False)):
        o = few_places(offloaded([m], 1, on_device=on_device), 2)
        if groups: monkeypatch.setattr(o.offload, 'fits', lambda pairs: False, raising=False)
        assert torch.equal(o.layers[0](x, ids, w), want) and o.offload.prompts == [[groups, 0, 3*groups]]

@torch.no_grad()
def test_host_path_on_tiles(as_gpu):
    m,results = tiled()
    o = few_places(offloaded([m], 1, on_device=False), 4)
    for (x,ids,w),want in zip(tile_calls()[:2 if not GPU else None], results): assert torch.equal(o.layers[0](x, ids, w), want), len(x)
    assert o.offload_stats().total.staged > 0 and not o.offload_stats().on_device

@torch.no_grad()
@pytest.mark.parametrize('policy', ('lru', 'lfu', 'lfru', 'pinned'))
def test_device_and_host_decide_the_same(as_gpu, policy, monkeypatch):
    "Rows, slots and counters of decode calls and prompts; nothing is multiplied"
    m = tiles_layer(16)
    monkeypatch.setattr(moe, 'expert_layer', lambda x, *a: x); monkeypatch.setattr(moe, 'expert_prompt', lambda x, ids, w, k, up, down, n, by: ([rows.append(by.rows.tolist()) for _ in by.groups], x)[1])
    rows = []
    a,b = (few_places(offloaded([m], 5, policy, on_device=d), 6) for d in (True, False))
    for x,ids,w in tile_calls(16, 4, (1, 1, 1, 40, 1, 1)):
        for o in (a, b): o.layers[0](x, ids, w)
        assert a.offload.tables.table(0).tolist() == b.offload.tables.table(0).tolist()
        live = [(e, s) for e,s in enumerate(a.offload.tables.table(0).tolist()) if s >= 0]
        for o in (a, b):
            for e,s in live: assert torch.equal(o.offload.pool.bytes[s].cpu(), o.offload.bank.rows[0][e])
    assert a.offload_stats().total == b.offload_stats().total and a.offload.prompts == b.offload.prompts and rows[:len(rows)//2] == rows[len(rows)//2:]

@torch.no_grad()
def test_wide_activations_on_tiles(as_gpu):
    "float32 goes another way: decoded matrices"
    m = tiles_layer()
    o = few_places(offloaded([m], 1, on_device=False), 4)
    for x,ids,w in tile_calls(lengths=(1, 17), dtype=torch.float32): assert torch.equal(o.layers[0](x, ids, w), m(x, ids, w))

@torch.no_grad()
def test_step_of_few_launches(tiny, monkeypatch):
    "The step that generate uses on GPUs: it fetches before the shared expert, and looks its experts up at every call"
    from hlwq import step as step_module
    from test_step import generator,prepared,prompt
    if not GPU: monkeypatch.setattr(step_module, 'THIN_MAX_FEATURES', 0)
    res,model = [],copy.deepcopy(tiny).to(device)
    ids,mask = (o.to(device) for o in prompt(model, 1, False))
    b = prepared(generator(model), ids, mask.bool())
    step = step_module.DecodeStep(model)
    step.bind(b)
    kept = [(o,[t.clone() for t in tensors]) for o in b.cache.layers for tensors in [[getattr(o, n) for n in ('keys', 'values') if hasattr(o, n)] + [t for n in ('conv_states', 'recurrent_states') for t in getattr(o, n, {}).values()]]]
    for again in (False, True):
        if again:
            offload_experts(model, 2, staging=2)
            for o,tensors in kept:
                for t,was in zip([getattr(o, n) for n in ('keys', 'values') if hasattr(o, n)] + [t for n in ('conv_states', 'recurrent_states') for t in getattr(o, n, {}).values()], tensors): t.copy_(was)
        res.append(step(b))
    assert torch.equal(*res) and model.offload_stats().total.misses > 0

# --- a real GPU

gpu = pytest.mark.skipif(not GPU, reason='needs a CUDA device')

@gpu
@pytest.mark.parametrize('how', [dict(slots=2), dict(slots=6, policy='lfru'), dict(slots=5, policy='random'), dict(slots=2, on_device=False), dict(slots=6, on_device=False)])
def test_recorded_steps(how):
    "Device path in a recorded step, host path without recording: tokens of the resident model, with what an earlier text left in the slots"
    model = AutoModelForCausalLM.from_pretrained(asset_path('tiny-moe-10m'), dtype=torch.bfloat16, quantization_config=HLWQConfig(bits=5), device_map={'':device}).eval()
    m = offload_experts(copy.deepcopy(model), **how)
    a,b = HLWQGenerator(model),HLWQGenerator(m)
    for rows,n in ((1, 9), (1, 40), (3, 12), (1, 9)):
        ids = torch.randint(3, 8000, (rows, n), generator=torch.Generator().manual_seed(n)).to(device)
        assert torch.equal(b(ids, 100 if not LONG else 400), a(ids, 100 if not LONG else 400))
        assert ('recorded' in b.report.step) == how.get('on_device', True) and bool(b.report.no_graph) != how.get('on_device', True)

@gpu
@torch.no_grad()
@pytest.mark.parametrize('slots', (2, 9, 30))
def test_delayed_copies(slots, monkeypatch):
    "The stream that copies sleeps before each copy: whoever does not wait reads poison"
    m = tiles_layer(40)
    o,real = offloaded([m], slots, on_device=False, staging=4),Pool.load
    def slow(self, bank, loads, *a, **k):
        with torch.cuda.stream(self.stream): torch.cuda._sleep(3_000_000)
        return real(self, bank, loads, *a, **k)
    monkeypatch.setattr(Pool, 'load', slow)
    for x,ids,w in tile_calls(40, 8, (1, 1, 4, 1, 64, 1, 300, 1)):
        assert torch.equal(o.layers[0](x, ids, w), m(x, ids, w))
        live = {e for e in o.offload.tables.tables[0].table.tolist() if e >= 0}
        dead = [r for r in range(len(o.offload.pool.bytes)) if r not in live]
        for n in PARTS[1::2]: bits_of(o.offload.pool.parts[n])[dead] = float('nan')

@gpu
@torch.no_grad()
def test_long_prompts_on_the_card():
    "So many tokens that the resident path decodes all experts for one grouped product"
    m = tiles_layer(8)
    for on_device in (True, False):
        o = few_places(offloaded([m], 2, on_device=on_device), 4)
        for x,ids,w in tile_calls(8, 2, (64, 400, 3000)): assert torch.equal(o.layers[0](x, ids, w), m(x, ids, w)), len(x)

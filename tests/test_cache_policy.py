"""Which experts stay: tables against a dictionary, policies against their definitions, the simulator against tables and against exhaustive search, recordings against routers.

No test here needs a weight, except where a model is recorded."""
import itertools,json,math
import numpy as np,pytest,torch
from hypothesis import HealthCheck,given,settings,strategies as st
from hypothesis.stateful import RuleBasedStateMachine,initialize,invariant,rule,run_state_machine_as_test
import hlwq
from hlwq.cache_policy import *
from hlwq.cache_sim import *
from hlwq.cli import main
from hlwq.core import CheckpointError,ConfigError,UnsupportedError,asset_path
from common import python

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

def random_trace(steps=200, layers=2, E=16, k=4, seed=0, **kw): return synthetic_trace(steps, layers, E, k, seed=seed, **kw)

# --- the two bugs, as they were in public code

class Naive:
    "Evicts among all residents, cuts off what does not fit, leaves old entries in its table"
    def __init__(self, slots, score): self.free,self.score,self.slot,self.held,self.uses,self.last,self.now = list(range(slots)),score,{},{},{},{},0
    def resolve(self, ids):
        self.now += 1
        for e in list(dict.fromkeys(ids))[:len(self.free)+len(self.held)]:
            if self.held.get(self.slot.get(e)) != e:
                s = self.free.pop(0) if self.free else min(self.held, key=lambda s: (self.score(self, self.held[s]),s))
                self.slot[e],self.held[s],self.uses[e] = s,e,0
            self.uses[e],self.last[e] = self.uses[e]+1,self.now
        return [self.slot.get(e, 0) for e in ids]

SCORES = dict(lru=lambda t,e: t.last[e], lfru=lambda t,e: t.uses[e]/(1+t.now-t.last[e]))

def wrong(held, ids, slots): return [int(e) for e,s in zip(ids, slots) if held[s] != e]

def served(t, ids):
    "What a kernel would see: for each wave its experts with the experts that are in their slots"
    return [(w,t.held[t.resolve(w)[0]].tolist()) for w in t.waves(ids)]

def test_stale_entries():
    "More experts than slots: the naive table sends some to a slot with another expert in it"
    t = Naive(2, SCORES['lru'])
    for ids in ([0,1], [2,3]): assert not wrong(t.held, ids, t.resolve(ids))
    assert wrong(t.held, [0,1,2], t.resolve([0,1,2])) == [2]
    t = ExpertTable(4, 2)
    for ids in ([0,1], [2,3], [0,1,2]): assert all(a == b for a,b in served(t, ids))
    with pytest.raises(ConfigError, match='3 in this call and 0 to keep, need at most 2'): t.resolve([0,1,2])

def test_evicted_by_the_same_call():
    "Enough slots, and yet: by frequency a newcomer is the first to go, and the next miss of its own call evicts it"
    t = Naive(4, SCORES['lfru'])
    for ids in [[0,1],[2,3]]*5: assert not wrong(t.held, ids, t.resolve(ids))
    assert wrong(t.held, [7,8], t.resolve([7,8])) == [7]
    t = ExpertTable(10, 4, 'lfru')
    for ids in [[0,1],[2,3]]*5: t.resolve(ids)
    slots,loads = t.resolve([7,8])
    assert t.held[slots].tolist() == [7,8] and dict(loads) == {7:slots[0],8:slots[1]} and t.table[[0,1]].tolist() == [-1,-1]

@pytest.mark.parametrize('slots,score,least', [(2,'lru',.7), (4,'lru',.45), (8,'lfru',.1), (12,'lfru',.02)])
def test_how_often(slots, score, least):
    "On the made-up trace of eight experts in 256 the naive table is wrong this often, and ours never"
    trace,naive,ours,n = synthetic_trace(300, 1),Naive(slots, SCORES[score]),ExpertTable(256, slots, score),0
    for ids in trace.ids[:,0].tolist():
        n += len(wrong(naive.held, ids, naive.resolve(ids)))
        got = served(ours, ids)
        assert all(a == b for a,b in got) and sorted(sum((a for a,_ in got), [])) == sorted(ids)
    assert n/trace.ids.size > least

def test_naive_reloads_what_it_evicts():
    "LRU without protection copies an expert twice in one call; in two phases nothing that is here is loaded"
    t = ExpertTable(8, 3)
    t.resolve([0,1,2])
    assert t.resolve([5,0])[1] == [(5,1)] and t.counts.misses == 4          # 0 is older than no one, and stays

# --- the table against a dictionary, and policies against their definitions

def reference_value(policy, e, calls, halve=256):
    "What a resident is worth, from the whole history"
    at = [i for i,c in enumerate(calls) if e in c]
    if policy == 'lru': return at[-1]
    uses = 0
    for i,c in enumerate(calls):
        if (i+1) % halve == 0: uses //= 2
        uses += e in c
    return uses if policy == 'lfu' else uses/(len(calls)-at[-1])

class Machine(RuleBasedStateMachine):
    "Any order of calls, waves, calls that keep others and forgotten experts, next to a plain dictionary"
    policy,E = 'lru',9

    @initialize(slots=st.integers(1, 11))
    def start(self, slots):
        self.slots = min(slots, self.E)
        self.t = ExpertTable(self.E, slots, make_policy(self.policy, self.E, hot=(1,2,7)))
        self.where,self.calls,self.ever,self.want = {},[],set(),CacheCounts()

    def expect(self, ids, keep=()):
        "Checks one resolve against the dictionary, and updates it"
        needed = list(dict.fromkeys(ids)); missing = [e for e in needed if e not in self.where]
        protected = {*needed, *(e for e in keep if e in self.where)}
        if len(protected) > self.slots:
            before = self.t.table.copy()
            with pytest.raises(ConfigError, match='serve them by waves'): self.t.resolve(ids, keep)
            assert (self.t.table == before).all() and self.t.counts == self.want
            return False
        n = max(0, len(missing)-(self.slots-len(self.where)))
        others = [e for e in self.where if e not in protected]
        slots,loads = self.t.resolve(ids, keep)
        gone = [e for e in self.where if self.t.table[e] < 0]
        if self.policy in ('lru','lfu','lfru'): assert set(gone) == set(sorted(others, key=lambda e: (reference_value(self.policy, e, self.calls),e))[:n])
        if self.policy == 'pinned': assert set(gone) == set(sorted(others, key=lambda e: (e in (1,2,7),reference_value('lru', e, self.calls),e))[:n])
        assert len(gone) == n and not protected & set(gone) and [e for e,_ in loads] == missing
        for e in gone: del self.where[e]
        for e,s in loads:
            assert s not in self.where.values()
            self.where[e] = s
        assert slots.tolist() == [self.where[e] for e in ids] and slots.dtype == np.int32
        self.calls.append(set(needed))
        self.want += CacheCounts(0, 1, len(needed)-len(missing), len(missing), len(self.ever & set(missing)), n)
        self.ever |= set(missing)
        return True

    @rule(ids=st.lists(st.integers(0, 8), max_size=8), keep=st.lists(st.integers(0, 8), max_size=3))
    def call(self, ids, keep): self.expect(ids, keep)

    @rule(ids=st.lists(st.integers(0, 8), min_size=1, max_size=14), size=st.one_of(st.none(), st.integers(1, 12)))
    def by_waves(self, ids, size):
        there,loaded,waves = set(self.where),self.want.misses,self.t.waves(ids, size)
        assert sorted(sum(waves, [])) == sorted(set(ids)) and max(map(len, waves)) <= min(size or self.slots, self.slots)
        for w in waves: assert self.expect(w)
        assert self.want.misses-loaded == len(set(ids)-there)                # each at most once, and none that was there

    @rule(ids=st.lists(st.integers(0, 8), min_size=1, max_size=14))
    def overlapped(self, ids):
        "The wave before is still at work while the next one is loaded"
        if self.slots < 2: return
        there,loaded,before = set(self.where),self.want.misses,[]
        for w in self.t.waves(ids, self.slots//2):
            assert self.expect(w, before) and all(e in self.where for e in before)
            before = w
        assert self.want.misses-loaded == len(set(ids)-there)

    @rule(ids=st.one_of(st.none(), st.lists(st.integers(0, 8), max_size=4)))
    def forget(self, ids):
        self.t.drop(ids)
        for e in list(self.where) if ids is None else set(ids) & set(self.where): del self.where[e]
        assert self.t.free == sorted(self.t.free)

    @invariant()
    def table_is_a_bijection(self):
        if not hasattr(self, 't'): return
        t = self.t
        assert {e:int(s) for e,s in enumerate(t.table) if s >= 0} == self.where
        assert {int(e):s for s,e in enumerate(t.held) if e >= 0} == self.where
        assert sorted(t.free+list(self.where.values())) == list(range(self.slots)) and set(t.policy.resident) == set(self.where)
        assert t.counts == self.want and t.table.dtype == t.held.dtype == np.int32

@pytest.mark.parametrize('policy', POLICIES)
def test_against_a_dictionary(policy):
    machine = type('Machine_'+policy, (Machine,), dict(policy=policy))
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)))

@pytest.mark.parametrize('policy', ['lfu','lfru'])
def test_counts_are_halved(policy):
    p,calls,g = dict(lfu=LFU, lfru=LFRU)[policy](6, halve_every=4),[],np.random.default_rng(0)
    p.admit(range(6)); p.touch(list(range(6))); calls.append(set(range(6)))
    for _ in range(40):
        want = sorted(range(6), key=lambda e: (reference_value(policy, e, calls, 4),e))
        assert p.victims(6, set()) == want and p.victims(2, {want[0]}) == want[1:3]
        ids = sorted(set(g.integers(0, 6, 2).tolist())); p.touch(ids); calls.append(set(ids))

def test_repeatable():
    "The same run in processes with other hash seeds; ties go by number"
    code = """
from hlwq.cache_policy import *; from hlwq.cache_sim import *
for p in POLICIES:
    t = ExpertTable(16, 6, make_policy(p, 16, hot=(3, 5), seed=4))
    for ids in synthetic_trace(100, 1, 16, 4).ids[:, 0]: t.resolve(ids)
    print(p, t.held.tolist(), t.counts)"""
    first,second = (python(code, PYTHONHASHSEED=s) for s in ('0','7'))
    assert first == second and len(set(first.splitlines())) == len(POLICIES)

def test_ids_may_be_anything_whole():
    t = ExpertTable(8, 4)
    for ids in ([[1,2],[2,3]], np.array([[1,2],[2,3]], np.int16), torch.tensor([[1,2],[2,3]]), [np.int64(1),2], 3, []):
        slots,_ = t.resolve(ids)
        assert slots.shape == np.shape(ids) and (t.held[slots] == np.asarray(ids)).all()
    own = np.zeros(8, np.int32)
    t = ExpertTable(8, 20, table=own)
    t.resolve([7,0], keep={7})
    assert t.slots == 8 and own.tolist() == [1,-1,-1,-1,-1,-1,-1,0] and t.table is own
    assert torch.from_numpy(t.table).data_ptr() == own.ctypes.data                 # a kernel's view, no copy

@pytest.mark.parametrize('f,message', [
    (lambda t: t.resolve([8]), 'experts: numbers 8, need 0 to 7; check the router'), (lambda t: t.resolve([-1,0]), 'numbers -1, need 0 to 7'), (lambda t: t.waves([99]), 'numbers 99'),
    (lambda t: t.resolve([0], keep=[-3]), 'numbers -3'), (lambda t: t.drop([8]), 'numbers 8'), (lambda t: t.resolve([.5]), 'experts: float64, need whole numbers'), (lambda t: t.resolve(torch.rand(2)), 'float32'),
    (lambda t: ExpertTable(8, 0), 'slots: 0, need at least 1'), (lambda t: ExpertTable(256, 7, top_k=8), 'slots: 7, need at least 8, the experts of one token'), (lambda t: ExpertTable(8, 2, 'mru'), "policy: 'mru', need one of lru"),
    (lambda t: ExpertTable(8, 2, 'pinned'), 'no experts to pin'), (lambda t: make_policy('pinned', 8, hot=[9]), 'experts 9, need 0 to 7'),
    (lambda t: ExpertTable(8, 2, table=np.zeros(8, np.int64)), 'table: int64'), (lambda t: ExpertTable(8, 2, table=np.zeros(7, np.int32)), r'shape \(7,\)')])
def test_refused(f, message):
    t = ExpertTable(8, 4); t.resolve([1,2])
    before = t.table.copy()
    with pytest.raises(ConfigError, match=message): f(t)
    assert (t.table == before).all() and t.counts == CacheCounts(calls=1, misses=2)

@pytest.mark.parametrize('chosen', [[], [5], [5,5], [1,5], [5,6,7], [5,9]])
def test_a_policy_is_not_believed(chosen):
    "It names too few, one twice, one of the call, too many, an absent one"
    class Bad(Policy):
        def victims(self, n, protected): return chosen
    t = ExpertTable(10, 4, Bad(10)); t.resolve([1,5,6,7])
    before = t.table.copy()
    with pytest.raises(ConfigError, match='policy Bad: named .*, need 2 different experts'): t.resolve([1,2,3])
    assert (t.table == before).all() and t.counts == CacheCounts(calls=1, misses=4)

# --- the simulator

traces = st.builds(lambda seed,steps,E,k,zipf,reuse: random_trace(steps, 2, E, min(k, E), seed, zipf=zipf, reuse=reuse),
                   st.integers(0, 999), st.integers(1, 60), st.integers(2, 12), st.integers(1, 4), st.sampled_from([0,.8,1.5]), st.sampled_from([0,.45,.9]))

@quick
@given(traces)
def test_belady_is_a_ceiling_and_lru_grows(trace):
    "Hits of LRU grow with slots and follow from reuse distances; nobody beats the one who knows the future"
    d,before = reuse_distances(trace, 'experts'),-1
    for c in range(trace.top_k, trace.n_experts+1):
        got = {p:simulate_cache(trace, c, p, cold_steps=5, profile=trace) for p in (*POLICIES,'belady')}
        assert max(s.hits for s in got.values()) == got['belady'].hits
        assert {s.total.requests for s in got.values()} == {trace.ids.size}
        assert got['lru'].hits == ((d >= 0) & (d < c)).sum() >= before
        before = got['lru'].hits
    assert {s.total.reloads for s in got.values()} == {0} and len({s.hits for s in got.values()}) == 1       # everybody fits

def fewest_misses(calls, slots):
    "Exhaustive: the states that can be reached, with their fewest misses; no more is loaded than is needed"
    best = {frozenset():0}
    for ids in calls:
        ids,new = frozenset(ids),{}
        for state,cost in best.items():
            missing,others = ids-state,sorted(state-ids)
            go = max(0, len(state)+len(missing)-slots)
            for out in itertools.combinations(others, go):
                s = (state-set(out))|ids
                new[s] = min(new.get(s, math.inf), cost+len(missing))
        best = new
    return min(best.values())

@quick
@given(st.integers(0, 10**6), st.integers(2, 3), st.integers(3, 5))
def test_belady_is_optimal(seed, k, slots):
    trace = random_trace(14, 1, 7, k, seed, zipf=.5, reuse=.3)
    assert simulate_cache(trace, slots, 'belady').misses == fewest_misses(trace.calls(0), slots)

@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('slots,together', [(4,1),(9,1),(5,7),(16,3)])
def test_simulator_counts_what_a_table_counts(policy, slots, together):
    trace,cold,total = random_trace(150, 3),CacheCounts(),CacheCounts()
    hot = trace.hot_experts(max(1, round(slots/2)))
    s = simulate_cache(trace, slots, policy, cold_steps=50, tokens_per_call=together, profile=trace, seed=3)
    for layer in range(3):
        t,calls = ExpertTable(16, slots, make_policy(policy, 16, hot[layer], seed=3+layer)),trace.ids[:,layer]
        for i in range(0, 150, together):
            if i == -(-50//together)*together: cold += t.counts+CacheCounts()
            for w in t.waves(calls[i:i+together]): t.resolve(w)
        total += t.counts
    cold.tokens,total.tokens = -(-50//together)*together,150
    assert (s.cold,s.total) == (cold,total) and sum(s.layers, CacheCounts()).hits == total.hits
    assert s.total.misses-s.total.evictions == 3*min(slots, 16) if slots < 16 else s.total.evictions == 0

def test_wide_calls_load_each_expert_once():
    trace = random_trace(120, 2)
    for c in (1,4,7):
        s = simulate_cache(trace, c, tokens_per_call=40, cold_steps=0)
        assert s.total.requests == sum(len(ids) for l in range(2) for ids in trace.calls(l, 40)) and s.misses <= s.total.requests

def test_no_expert_and_edges():
    trace = RoutingTrace([[[0,-1]],[[-1,-1]],[[0,1]]], 4)
    s = simulate_cache(trace, 2, cold_steps=1)
    assert s.total == CacheCounts(3, 2, 1, 2) and s.cold == CacheCounts(1, 1, 0, 1) and trace.calls(0) == [[0],[],[0,1]]
    assert reuse_distances(trace).tolist() == [[[-1,-1]],[[-1,-1]],[[2,-1]]] and trace.hot_experts(1) == [[0]]
    assert simulate_cache(trace, 99).slots == 4
    with pytest.raises(ConfigError, match='no warm tokens in 3'): simulate_cache(trace, 2).hit_rate
    with pytest.raises(ConfigError, match='no warm tokens'): simulate_cache(trace[:0], 2).bytes_per_token(1)
    assert [s.slots for s in sweep_cache(random_trace(80), policies=['lru'])] == [4,8,16] and [s.slots for s in sweep_cache(random_trace(80), [3,99,16], ['lru'])] == [3,16]

@pytest.mark.parametrize('kw,message', [(dict(policy='mru'), 'need one of lru, lfu, lfru, pinned, random, belady'), (dict(policy='pinned'), 'no profile, need a trace of other text'), (dict(slots=0), 'slots 0'),
    (dict(tokens_per_call=0), 'tokens_per_call 0'), (dict(cold_steps=-1), 'cold_steps -1'), (dict(policy='pinned', profile=random_trace(9, 3)), 'profile: 3 layers of 16 experts, need 2 of 16'), (dict(profile=random_trace(9, 2, 17)), 'layers of 17')])
def test_simulator_refuses(kw, message):
    with pytest.raises(ConfigError, match=message): simulate_cache(**(dict(trace=random_trace(9), slots=4) | kw))

def test_speed_is_the_limit_line():
    "1/(B + (1-h) * 645 MB / link) for the 35-billion model"
    for h,link,b,want in ((0,25e9,.03,18),(.5,25e9,.015,36),(.8,25e9,.007,82),(.9,50e9,.007,121),(1,25e9,.015,67)):
        hits = round(32000*h)
        s = CacheStats('lru', 32, 256, 40, 8, CacheCounts(64, 0, 0, 64*320), CacheCounts(100, 0, hits, 32000-hits), [])
        assert round(predicted_tokens_per_second(s, 2015232, link, b)) == want and s.bytes_per_token(2015232) == pytest.approx((1-h)*40*8*2015232)
        assert s.bytes_per_token(1, 'cold') == 320 and s.bytes_per_token(1, 'total') == pytest.approx((64*320+32000-hits)/164)
        for bad in ((0,link,b),(1,0,b),(1,link,0),(1,link,float('nan'))):
            with pytest.raises(ConfigError, match='need more than 0'): predicted_tokens_per_second(s, *bad)

def test_to_json():
    s = simulate_cache(random_trace(100), 6)
    d = json.loads(json.dumps(s.to_json()))
    assert d['warm']['hits'] == s.warm.hits and len(d['hit_rate_by_layer']) == 2 and d['source'] == 'synthetic'

# --- traces

def test_synthetic():
    a,b = synthetic_trace(50, 3, 32, 4, seed=1),synthetic_trace(50, 3, 32, 4, seed=1)
    assert (a.ids == b.ids).all() and (synthetic_trace(50, 3, 32, 4, seed=2).ids != a.ids).any() and a.meta['source'] == 'synthetic'
    assert all(len(set(row)) == 4 for row in a.ids.reshape(-1, 4).tolist())
    many = synthetic_trace(2000, 1, 64, 4, zipf=1., reuse=.5)
    stay = np.mean([len(set(a) & set(b))/4 for a,b in zip(many.ids[1:,0].tolist(), many.ids[:-1,0].tolist())])
    assert .5 < stay < .65 and np.sort(np.bincount(many.ids.ravel()))[-1] > 5*np.median(np.bincount(many.ids.ravel()))
    assert (synthetic_trace(20, 1, 4, 4, reuse=1.).ids.max(),len(synthetic_trace(0))) == (3,0)

@pytest.mark.parametrize('name', ['t.safetensors','t.npy'])
def test_round_trip(tmp_path, name):
    t = RoutingTrace(random_trace(30).ids, 16, dict(source='recorded', text='Ruth: «weiß»', expert_bytes=12.5))
    t.save(tmp_path/name); t.save(str(tmp_path/name))
    got = RoutingTrace.load(tmp_path/name)
    assert (got.ids == t.ids).all() and (got.n_experts,got.meta,got.ids.dtype) == (16,t.meta,np.int16)
    assert not list(tmp_path.glob('*.partial')) and (got[5:9].ids == t.ids[5:9]).all() and len(got[5:9]) == 4

def test_hostile_files(tmp_path):
    good = random_trace(30)
    good.save(tmp_path/'a.safetensors'); good.save(tmp_path/'a.npy')
    raw = (tmp_path/'a.safetensors').read_bytes()
    from safetensors.numpy import save_file
    (tmp_path/'cut.safetensors').write_bytes(raw[:-3]); (tmp_path/'empty.safetensors').write_bytes(b'')
    save_file(dict(ids=good.ids), tmp_path/'bare.safetensors')
    for n,about in dict(range='{"format":"hlwq-routing-1","n_experts":3,"meta":{}}', keys='{"format":"hlwq-routing-1"}', json='{').items(): save_file(dict(ids=good.ids), tmp_path/f'{n}.safetensors', dict(routing=about))
    np.save(tmp_path/'pickle.npy', np.array([{}], dtype=object), allow_pickle=True); (tmp_path/'pickle.json').write_text((tmp_path/'a.json').read_text())
    np.save(tmp_path/'float.npy', np.zeros((2,2,2))); (tmp_path/'float.json').write_text((tmp_path/'a.json').read_text())
    np.save(tmp_path/'alone.npy', good.ids)
    for n in ('cut.safetensors','empty.safetensors','bare.safetensors','range.safetensors','keys.safetensors','json.safetensors','pickle.npy','float.npy','alone.npy'):
        with pytest.raises(CheckpointError, match=f'{n}: not a trace'): RoutingTrace.load(tmp_path/n)
    with pytest.raises(CheckpointError, match='no such file'): RoutingTrace.load(tmp_path/'none.npy')
    save_file(dict(ids=good.ids), tmp_path/'newer.safetensors', dict(routing='{"format":"hlwq-routing-2"}'))
    with pytest.raises(UnsupportedError, match="format 'hlwq-routing-2'"): RoutingTrace.load(tmp_path/'newer.safetensors')
    with pytest.raises(ConfigError, match='need .safetensors or .npy'): good.save(tmp_path/'a.pt')
    for ids in (np.zeros((2,2)), np.zeros((2,2,2)), [[[16]]], [[[-2]]]):
        with pytest.raises(ConfigError, match='^trace: '): RoutingTrace(ids, 16)

# --- recordings

@pytest.fixture(scope='module')
def tiny():
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(asset_path('tiny-moe-10m'), dtype=torch.float32).eval()

ids = torch.randint(3, 8192, (1,40), generator=torch.Generator().manual_seed(0))

def routed(model, x):
    "What the routers themselves return, by hooks on them"
    seen = []
    hooks = [l.mlp.gate.register_forward_hook(lambda m,a,out: seen.append(out[2].clone())) for l in model.model.layers]
    with torch.inference_mode(): model(x)
    for h in hooks: h.remove()
    return torch.stack(seen, 1).numpy()

def test_records_what_routers_choose(tiny):
    with torch.inference_mode(), record_routing(tiny) as r: tiny(ids); tiny(ids[:,:7])
    t = r.trace(text='noise')
    assert t.ids.shape == (47,4,4) and (t.ids[:40] == routed(tiny, ids)).all() and (t.ids[40:] == routed(tiny, ids[:,:7])).all()
    assert t.meta['text'] == 'noise' and t.meta['layers'] == [f'model.layers.{i}.mlp.experts' for i in range(4)] and t.meta['expert_bytes'] == (256*256+256*128)*4
    assert not any(m._forward_pre_hooks for m in tiny.modules())

def test_records_packed_models(tiny):
    from transformers import AutoModelForCausalLM
    from hlwq.hf import HLWQConfig
    packed = AutoModelForCausalLM.from_pretrained(asset_path('tiny-moe-10m'), dtype=torch.float32, quantization_config=HLWQConfig(bits=5)).eval()
    with torch.inference_mode(), record_routing(packed) as r: packed(ids)
    t = r.trace()
    assert (t.ids == routed(packed, ids)).all() and t.meta['expert_bytes'] == (256*2+256)*(16*5+2)+256*0
    with torch.inference_mode(), record_routing(tiny) as r: tiny(ids)
    assert np.mean([len(set(a) & set(b))/4 for a,b in zip(t.ids.reshape(-1, 4).tolist(), r.trace().ids.reshape(-1, 4).tolist())]) > .9

def test_word_by_word(tiny):
    with torch.inference_mode(), record_routing(tiny) as r: text = tiny.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    with torch.inference_mode(), record_routing(tiny) as whole: tiny(text[:,:-1])
    assert len(r.seen) == 9 and (np.sort(r.trace().ids) == np.sort(whole.trace().ids)).mean() > .99

def test_interrupted(tiny):
    "A forward that stopped half way is left out, and the hooks are gone"
    last = tiny.model.layers[2].mlp
    with pytest.raises(KeyboardInterrupt), torch.inference_mode(), record_routing(tiny) as r:
        tiny(ids)
        h = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        try: tiny(ids)
        finally: h.remove()
    assert len(r.seen) == 2 and len(r.trace()) == 40
    r.seen.append(r.seen[0])                                   # going on after it would hide a gap
    with pytest.raises(UnsupportedError, match='need the same in all 4'): r.trace()
    assert not any(m._forward_pre_hooks for m in tiny.modules())

def test_nothing_to_record(tiny):
    with pytest.raises(UnsupportedError, match='Linear: no stacks of experts'):
        with record_routing(torch.nn.Linear(2, 2)): pass
    with record_routing(tiny) as r: pass
    with pytest.raises(ConfigError, match='no expert was called, need a forward'): r.trace()

FAMILIES = dict(Mixtral=dict(num_local_experts=6, num_experts_per_tok=2), Qwen3Moe=dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16), GptOss=dict(num_local_experts=6, num_experts_per_tok=2),
                DeepseekV3=dict(n_routed_experts=6, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1, head_dim=8, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8))

@pytest.mark.parametrize('family', FAMILIES)
def test_families(family):
    "Their routers return different things; what the experts are handed has one form"
    import transformers
    torch.manual_seed(0)
    config = getattr(transformers, family+'Config')(**(dict(vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=0)|FAMILIES[family]))
    model = getattr(transformers, family+'ForCausalLM')(config).eval()
    with torch.inference_mode(), record_routing(model) as r: model(torch.randint(0, 64, (1,11))); model(torch.randint(0, 64, (2,3)))
    t = r.trace()
    layers = 2 if family == 'DeepseekV3' else 3
    assert t.ids.shape == (17,layers,2) and t.n_experts == 6 and all(len(set(row)) == 2 for row in t.ids.reshape(-1, 2).tolist())
    assert simulate_cache(t, 6, cold_steps=0).misses == sum(len(np.unique(t.ids[:,l])) for l in range(layers))

def test_no_expert_is_minus_one():
    "transformers writes the number of experts for a choice that nobody serves"
    class Stack(torch.nn.Module):
        has_gate = has_bias = is_transposed = False; num_experts = 4
        def forward(self, hidden_states, top_k_index, top_k_weights): return hidden_states
    m = torch.nn.Module(); m.a = Stack(); m.b = Stack()
    with record_routing(m) as r: m.a(None, torch.tensor([[0,4],[3,1]]), None); m.b(None, top_k_index=torch.tensor([[1,2],[4,4]]), top_k_weights=None)
    assert r.trace().ids.tolist() == [[[0,-1],[1,2]],[[3,1],[-1,-1]]]
    with record_routing(m) as r: m.a(None, torch.tensor([[0,1]]), None); m.b(None, torch.tensor([[1]]), None)
    with pytest.raises(UnsupportedError, match='layers see different numbers'): r.trace()

# --- the command

@pytest.fixture
def made_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthetic_trace(120, 2, 32, 4).save('t.safetensors')
    return tmp_path

def test_command(made_up, capsys):
    assert main('cache-sim t.safetensors --slots 4,8,64 --policy lru,belady --expert-bytes 1MB --link 10GB --resident-ms 20 --json a.json --figure a.png -q'.split()) == 0
    out,err = capsys.readouterr()
    d,t = json.loads((made_up/'a.json').read_text()),RoutingTrace.load(made_up/'t.safetensors')
    assert err == '' and 'synthetic: 120 tokens' in out and [(r['policy'],r['slots']) for r in d['rows']] == [(p,c) for p in ('lru','belady') for c in (4,8,32)]
    for r in d['rows']:
        s = simulate_cache(t, r['slots'], r['policy'])
        assert r['warm']['hits'] == s.warm.hits and r['tokens_per_second'] == pytest.approx(predicted_tokens_per_second(s, 1e6, 10e9, .02)) and f"{r['tokens_per_second']:.1f}" in out
    assert (made_up/'a.png').read_bytes()[:4] == b'\x89PNG' and d['source'] == 'synthetic'

def test_command_without_bytes(made_up, capsys):
    "No size of an expert, no speed, and it says so"
    assert main('cache-sim t.safetensors --slots 8 --policy lru,pinned --profile t.safetensors --tokens-per-call 3 --cold 10'.split()) == 0
    out,err = capsys.readouterr()
    assert 'tokens/s' not in out and 'give it with --expert-bytes' in out and 'pinned' in out

@pytest.mark.parametrize('line,message', [('none.npy', 'no such file'), ('t.safetensors --slots x', 'slots: '), ('t.safetensors --policy mru', "policy: 'mru'"), ('t.safetensors --policy pinned', '--profile FILE'), ('t.safetensors --cold 120', 'no warm tokens'),
    ('t.safetensors --json no/where.json', 'cannot be written'), ('t.safetensors --figure a.xyz', 'ends in .png'), ('t.safetensors --link fast', 'size: '), ('t.safetensors --expert-bytes 1MB --resident-ms 0', 'resident_seconds: 0')])
def test_command_refuses(made_up, capsys, line, message):
    assert main(['cache-sim',*line.split(),'-q']) == 2
    out,err = capsys.readouterr()
    assert err.startswith('hlwq: ') and err.count('\n') == 1 and message in err

def test_public_names(): assert hlwq.ExpertTable is ExpertTable and hlwq.simulate_cache is simulate_cache and hlwq.record_routing is record_routing

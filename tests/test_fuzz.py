"""Thousands of damaged files, from a fixed seed: an error of this package or of the file system, or a sound result, and nothing else.

The files come from golden/: flipped bytes, cut ends, spliced ranges, swapped and wrong JSON values, and headers made by hand that break one rule of safetensors each."""
import copy,json,os,random,resource,shutil,struct,tempfile,time,warnings
from pathlib import Path
import pytest,torch
from hlwq.checkpoint import CheckpointReader,verify_checkpoint
from hlwq.core import HLWQError
from hlwq.recipe import make_plan
from hlwq.source import open_source
from kit import L,raw

GOLDEN = Path(__file__).parent/'golden'
ALLOWED = (HLWQError, OSError)
HLWQ,PLAIN,LEGACY = GOLDEN/'hlwq',GOLDEN/'source',GOLDEN/'legacy'

@pytest.fixture
def folder():
    base = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as d: yield Path(d)

def look(d, deep=True):
    "Opens a folder in every way; returns how many ways went through. Raises whatever is not allowed"
    done = 0
    def source():
        with open_source(d) as s:
            for k in s.tensors: s.read(k)
            make_plan(s, min_coverage=0.)
    def reader(**kw):
        with CheckpointReader(d, **kw) as r:
            for n in r.names: assert r.matrix(n).dequantize().shape == r.matrices[n].shape
            for n in r.kept: r.tensor(n)
            r.stacks, r.bits
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for f in (source, reader, lambda: reader(codebook='inf100'), lambda: verify_checkpoint(d, sha256=False), lambda: verify_checkpoint(d)):
            start = time.perf_counter()
            try: f(); done += 1
            except ALLOWED as e: assert str(e)
            assert time.perf_counter() - start < 10
    return done

def damage(data, rng):
    "One of the ways in which a file goes bad"
    b,kind = bytearray(data),rng.choice(('flip', 'flips', 'byte', 'cut', 'head', 'splice', 'insert', 'remove', 'digit', 'header'))
    at = rng.randrange(len(b))
    if kind == 'flip': b[at] ^= 1 << rng.randrange(8)
    elif kind == 'flips':
        for _ in range(rng.randrange(2, 20)): b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    elif kind == 'byte': b[at] = rng.choice((0, 255, 0x20, 0x22, 0x5b, 0x7b, 0x39, 0x2d, 0x5c, rng.randrange(256)))
    elif kind == 'cut': del b[at:]
    elif kind == 'head': del b[:rng.randrange(1, min(len(b), 64))]
    elif kind == 'splice':
        n = rng.randrange(1, 64); to = rng.randrange(len(b))
        b[to:to+n] = b[at:at+n]
    elif kind == 'insert': b[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 16)))
    elif kind == 'remove': del b[at:at+rng.randrange(1, 16)]
    elif kind == 'digit':                                       # numbers are where headers and settings lie
        digits = [i for i,c in enumerate(b[:4096]) if 0x30 <= c <= 0x39]
        if digits: b[rng.choice(digits)] = rng.choice(b'0123456789-.e')
    elif kind == 'header': b[rng.randrange(min(len(b), 1200))] = rng.randrange(256)
    return bytes(b)

FILES = [(HLWQ, f) for f in ('model-00001-of-00001.safetensors', 'model.safetensors.index.json', 'hlwq_manifest.json', 'config.json', 'hlwq_config.json')] + [(PLAIN, 'model.safetensors'), (PLAIN, 'config.json'), (LEGACY, 'model.safetensors')]

@pytest.mark.parametrize('base,name', FILES, ids=lambda o: o if isinstance(o, str) else o.name)
def test_damaged_bytes(base, name, folder):
    rng,data,bad,through = random.Random(f'{base.name}/{name}'),(base/name).read_bytes(),[],0
    d = shutil.copytree(base, folder/'d')
    for i in range(300):
        new = damage(data, rng)
        (d/name).write_bytes(new)
        try: through += look(d)
        except AssertionError: raise
        except Exception as e: bad.append((i, type(e).__name__, str(e)[:100], e.__traceback__))
    seen = {(b[1], last_line(b[3])):b for b in bad}
    assert not bad, f'{len(bad)} of 300 end otherwise: ' + '; '.join(f'case {b[0]}: {b[1]} ({b[2]}) at {k[1]}' for k,b in seen.items())
    assert through < 1500

def last_line(tb):
    "Where in the package an exception came from"
    where = ''
    while tb:
        f = tb.tb_frame.f_code
        if f'{os.sep}hlwq{os.sep}' in f.co_filename: where = f'{Path(f.co_filename).name}:{tb.tb_lineno} {f.co_name}'
        tb = tb.tb_next
    return where

# --- JSON that parses, and says something else

STRANGE = (None, True, 0, -1, 3, 2**70, 1.5, 1e400, '', 'x', '5', '../x', '\x00', [], [1], [[]], {}, {'a':1}, 'lloyd-max', [0.]*32, 'é', 'a'*5000)

def places(o, path=()):
    "Paths to every value of a JSON object"
    yield path
    for k,v in (o.items() if isinstance(o, dict) else enumerate(o[:3]) if isinstance(o, list) else ()): yield from places(v, path+(k,))

def put(o, path, v):
    if not path: return v
    o = copy.deepcopy(o)
    p = o
    for k in path[:-1]: p = p[k]
    p[path[-1]] = v
    return o

def dump(o): return json.dumps(o).replace('Infinity', '1e999')

@pytest.mark.parametrize('base,name', [o for o in FILES if o[1].endswith('.json')], ids=lambda o: o if isinstance(o, str) else o.name)
def test_strange_values(base, name, folder):
    d = shutil.copytree(base, folder/'d')
    o,bad,n = json.loads((d/name).read_text()),[],0
    if name == 'hlwq_config.json': (d/'config.json').write_text('{}')                    # so that this one counts
    for path in places(o):
        for v in STRANGE:
            n += 1
            (d/name).write_text(dump(put(o, path, v)))
            try: look(d)
            except AssertionError: raise
            except Exception as e: bad.append((path, v, type(e).__name__, str(e)[:80], last_line(e.__traceback__)))
    seen = {(b[2], b[4]):b for b in bad}
    assert not bad, f'{len(bad)} of {n} end otherwise: ' + '; '.join(f'{"/".join(map(str, b[0]))} = {str(b[1])[:20]!r}: {b[2]} ({b[3]}) at {b[4]}' for b in seen.values())

@pytest.mark.parametrize('text', ['', ' ', 'null', '[]', '3', '"x"', '{', '{}', '[' * 200_000, '{"a":' * 200_000, '\ufeff{}', 'NaN', '{"files": NaN}', '1'*5000])
@pytest.mark.parametrize('name', ['hlwq_manifest.json', 'config.json', 'hlwq_config.json', 'model.safetensors.index.json', 'polar_config.json'])
def test_no_json_at_all(name, text, folder):
    d = shutil.copytree(HLWQ, folder/'d')
    if name in ('hlwq_config.json', 'polar_config.json'): (d/'config.json').write_text('{}')
    if name == 'polar_config.json': (d/'hlwq_config.json').unlink()
    (d/name).write_text(text)
    look(d)
    (d/name).write_bytes(b'\xff\xfe' + text.encode('utf-16-le', 'ignore')[:1000])
    look(d)

def test_several_shards_without_index(folder):
    "The older repositories: their config and shards are read by another way, which must be as careful"
    d = shutil.copytree(LEGACY, folder/'d')
    whole = (d/'model.safetensors').read_bytes()
    os.rename(d/'model.safetensors', d/'model-00001-of-00002.safetensors')
    (d/'model-00002-of-00002.safetensors').write_bytes(raw({'extra.weight':dict(dtype='F32', shape=[2], data_offsets=[0, 8])}, b'\0'*8))
    assert look(d)
    for text in ('{', '[]', 'null', '[' * 100_000): (d/'config.json').write_text(text); look(d)
    (d/'config.json').unlink()
    (d/'model-00002-of-00002.safetensors').write_bytes(whole); look(d)                   # every tensor twice
    with pytest.raises(ALLOWED): CheckpointReader(d)
    (d/'model-00002-of-00002.safetensors').write_bytes(whole[:100]); look(d)

# --- headers by hand, one broken rule each

def entry(shape=(2,), dtype='F32', at=(0, 8), **kw): return dict(dtype=dtype, shape=list(shape), data_offsets=list(at), **kw)

E8 = b'\0'*8
HEADERS = dict(
    too_long=raw({'a':entry()}, E8, n=2**63), longer_than_file=raw({'a':entry()}, E8, n=500), above_limit=raw({}, n=100_000_001), zero=raw(b'', n=0), one=raw(b'{', n=1), not_utf8=raw(b'\xff\xfe{}'), array=raw(b'[]'), null=raw(b'null'), number=raw(b'7'),
    nested=raw(b'{"a":' * 30_000), leading_space=raw(b' {}'), nul_inside=raw(b'{"a\\u0000b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', E8), lone_surrogate=raw(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', E8),
    offset_backwards=raw({'a':entry(at=(8, 0))}, E8), offset_negative=raw({'a':entry(at=(-8, 0))}, E8), offset_float=raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0.0,8.0]}}', E8), offset_huge=raw({'a':entry(at=(2**63, 2**63+8))}, E8), offset_three=raw({'a':entry(at=(0, 4, 8))}, E8),
    offset_none=raw({'a':dict(dtype='F32', shape=[2])}, E8), hole=raw({'a':entry(), 'b':entry(at=(9, 17))}, b'\0'*17), overlap=raw({'a':entry(), 'b':entry(at=(4, 12))}, b'\0'*12), same_bytes=raw({'a':entry(), 'b':entry()}, E8), beyond=raw({'a':entry(), 'b':entry(at=(8, 16))}, E8), trailing=raw({'a':entry()}, E8*2),
    shape_wrong=raw({'a':entry((3,))}, E8), shape_negative=raw({'a':entry((-2,))}, E8), shape_float=raw(b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', E8), shape_text=raw({'a':dict(dtype='F32', shape='2', data_offsets=[0, 8])}, E8), shape_overflow=raw({'a':entry((2**32, 2**32, 2))}, E8), shape_overflow_times_size=raw({'a':entry((2**61,))}, E8),
    zero_times_giant=raw({'a':entry((0, 10**18), at=(0, 0))}), many_axes=raw({'a':entry([1]*5000 + [2])}, E8), dtype_unknown=raw({'a':entry(dtype='F33')}, E8), dtype_number=raw({'a':entry(dtype=5)}, E8), dtype_case=raw({'a':entry(dtype='f32')}, E8),
    metadata_number=raw({'__metadata__':{'a':1}, 'a':entry()}, E8), metadata_list=raw({'__metadata__':[], 'a':entry()}, E8), metadata_as_tensor=raw({'__metadata__':entry()}, E8), metadata_format=raw({'__metadata__':{'hlwq_format':'\u00b2', 'codebook':'../x'}, 'a':entry()}, E8), metadata_newer=raw({'__metadata__':{'hlwq_format':'7'}, 'a__packed':entry((8,), 'U8')}, E8),
    extra_field=raw({'a':entry(other=1)}, E8), duplicate=raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', E8), path_name=raw({'../../a':entry()}, E8), slash=raw({'/etc/passwd':entry()}, E8), newline=raw({'a\nb':entry()}, E8), escape=raw({'\x1b[2Ja':entry()}, E8),
    empty_name=raw({'':entry()}, E8), long_name=raw({'a'*1_000_000:entry()}, E8), part_alone=raw({'__packed':entry()}, E8), only_norms=raw({'a__norms':entry((1, 2))}, E8), no_tensors=raw({}), nothing=b'', one_byte=b'\x00', seven=b'\0'*7, eight=b'\0'*8)

@pytest.mark.parametrize('case', HEADERS)
def test_headers_by_hand(case, folder):
    (folder/'model.safetensors').write_bytes(HEADERS[case])
    look(folder)
    d = shutil.copytree(HLWQ, folder/'hlwq')
    (d/'model-00001-of-00001.safetensors').write_bytes(HEADERS[case])
    look(d)
    assert not verify_checkpoint(d).ok

def test_triples_of_hostile_sizes(folder):
    "Parts that agree with each other on something absurd take no memory"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    big = 2**40
    for nb,out,meta in ((0, 5, [5, 0, 128, 0, 0]), (1, 0, [0, 1, 128, 0, 1]), (big, 0, [0, big, 128, 0, 128*big]), (0, big, [big, 0, 128, 0, 0]), (0, 0, [0]*5), (0, 0, [0, 0, 128, 0, -1])):
        m = struct.pack(f'<{len(meta)}q', *meta)
        (folder/'model.safetensors').write_bytes(raw({'a__meta':entry((len(meta),), 'I64', (0, len(m))), 'a__norms':entry((out, nb), 'F16', (len(m), len(m))), 'a__packed':entry((0,), 'U8', (len(m), len(m)))}, m))
        look(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000         # kB

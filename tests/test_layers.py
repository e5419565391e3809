"Arrows between modules go only downwards, and heavy packages load only where they are used"
import ast
import pytest
import hlwq
from common import modules,python,tree

# Which modules each module may import: the whole list. A new notebook adds its row here.
ALLOWED = {k:set(v.split()) for k,v in dict(
    core='',
    hadamard='core',
    lloyd_max='core',
    packing='core',
    quantize='core hadamard lloyd_max packing',
    **{'kernels.cpu':'core hadamard packing',
       'kernels.layout':'core',
       'kernels.lanes':'',
       'kernels.quantize':'core lloyd_max quantize kernels.layout kernels.lanes',
       'kernels.gemv':'core lloyd_max kernels.cpu kernels.layout kernels.quantize kernels.lanes',
       'kernels.gemm':'core lloyd_max quantize kernels.layout kernels.quantize kernels.lanes kernels.gemv',
       'kernels.norms':'core kernels.layout kernels.quantize kernels.lanes',
       'kernels.moe':'core lloyd_max kernels.layout kernels.lanes kernels.quantize kernels.gemv kernels.gemm kernels.norms',
       'kernels.router':'core kernels.layout kernels.quantize kernels.lanes kernels.norms',
       'kernels.attention':'core kernels.layout kernels.quantize kernels.lanes',
       'kernels.deltanet':'core kernels.layout kernels.lanes kernels.quantize',
       'kernels.deltanet_prompt':'core kernels.layout kernels.lanes kernels.quantize kernels.deltanet'},
    source='core',
    recipe='core packing source',
    checkpoint='core hadamard lloyd_max packing quantize source',
    convert='core kernels.quantize lloyd_max quantize source recipe checkpoint',
    ranks='core checkpoint convert',
    evaluate='core hadamard lloyd_max packing quantize source recipe checkpoint convert',
    groups='core quantize',
    export_ct='core quantize source recipe checkpoint convert groups',
    linear='core hadamard kernels.cpu kernels.gemm kernels.layout lloyd_max packing quantize',
    experts='core hadamard kernels.cpu kernels.moe linear lloyd_max quantize',
    packed_model='core checkpoint experts kernels.cpu linear lloyd_max quantize',
    hf='core checkpoint convert linear lloyd_max packed_model quantize recipe source',
    bank='core checkpoint experts kernels.layout linear packed_model',
    sampling='core',
    kv_codec='core hadamard lloyd_max packing quantize',
    **{'kernels.kv_attention':'core kv_codec lloyd_max kernels.attention kernels.lanes kernels.layout kernels.quantize'},
    kv_cache='core kv_codec kernels.kv_attention',
    buffers='core kv_cache',
    step='core linear kernels.attention kernels.deltanet kernels.deltanet_prompt kernels.kv_attention kernels.norms kernels.router',
    prompts='buffers core',
    generate='buffers core kernels.kv_attention kv_cache linear prompts sampling step',
    custom_generate='core generate',
    cache_policy='core',
    cache_sim='core cache_policy',
    **{'kernels.slots':'core kernels.layout kernels.lanes'},
    offload='core bank cache_policy cache_sim experts kernels.moe kernels.slots linear quantize',
    cache_plan='bank cache_sim core',
    load='bank cache_plan cache_policy core checkpoint generate hf linear offload packed_model',
    vllm='core experts linear lloyd_max',
    inspection='core lloyd_max quantize source checkpoint',
    hub='core checkpoint convert evaluate inspection recipe',
    report='core checkpoint evaluate hub inspection lloyd_max source',
    screen='core',
    bench='core lloyd_max quantize screen kernels.layout kernels.quantize kernels.gemv kernels.gemm kernels.moe',
    bench_decode='bench core evaluate generate hf linear packed_model quantize screen',
    bench_kv='bench bench_decode core evaluate generate kernels.attention kernels.kv_attention kv_cache screen',
    bench_offload='bank bench bench_decode cache_plan cache_sim core experts generate linear offload quantize',
    demo='core hadamard lloyd_max packing quantize source recipe checkpoint convert load generate evaluate screen',
    cli='core hadamard lloyd_max packing quantize source recipe checkpoint convert load sampling generate evaluate screen demo inspection bench bench_decode bench_kv bench_offload cache_sim export_ct kv_cache ranks hub report',
).items()}

LAZY = {'transformers','matplotlib','triton','accelerate','llvmlite','compressed_tensors'}   # heavy or optional: imported inside the function that needs them
USERS = {'evaluate','demo','cli','hf','load','kv_cache'}    # what runs a model or draws it may use transformers and matplotlib as it likes

def absolute(node, name):
    "The full names that one import statement of `hlwq.<name>` reaches: a `from` gives module and names apart"
    if isinstance(node, ast.Import): return [(a.name,None) for a in node.names]
    base = f'hlwq.{name}'.split('.')[:-node.level] if node.level else []
    mod = '.'.join([*base, *filter(None, [node.module])])
    return [(mod,a.name) for a in node.names]

def target(mod, attr):
    "The module of the package that an import reaches, None if it is another package's"
    if mod.split('.')[0] != 'hlwq': return None
    if mod != 'hlwq':
        mod = mod.removeprefix('hlwq.')
        return f'{mod}.{attr}' if f'{mod}.{attr}' in modules() else mod     # `from hlwq.kernels import cpu` names a module
    if attr in modules(): return attr
    return hlwq._homes.get(attr, '' if attr == '__version__' else 'hlwq')

def imports(name, body=None):
    return [o for n in ast.walk(body or tree(name)) if isinstance(n,(ast.Import,ast.ImportFrom)) for o in absolute(n, name)]

def top_level(name):
    "Imports that run when the module is loaded: those outside functions"
    todo,found = list(tree(name).body),[]
    while todo:
        n = todo.pop()
        if isinstance(n,(ast.FunctionDef,ast.AsyncFunctionDef,ast.Lambda)): continue
        if isinstance(n,(ast.Import,ast.ImportFrom)): found += absolute(n, name)
        todo += ast.iter_child_nodes(n)
    return {mod.split('.')[0] for mod,_ in found}

def test_every_module_has_a_row():
    assert set(modules()) <= set(ALLOWED), 'a new module needs a row in ALLOWED'

@pytest.mark.parametrize('name', modules())
def test_arrows_go_down(name):
    reached = {t for t in (target(*o) for o in imports(name)) if t}
    if name == 'cli': reached.discard('hlwq')
    assert reached <= ALLOWED.get(name, set()), f'hlwq.{name} imports {sorted(reached-ALLOWED.get(name, set()))}'

def test_table_has_no_cycle():
    seen = set()
    for name,below in ALLOWED.items():
        assert below <= seen, f'{name} names a module that comes later'
        seen.add(name)

@pytest.mark.parametrize('name', modules())
def test_heavy_packages_are_lazy(name):
    heavy = top_level(name) & LAZY
    if name in USERS: heavy -= {'transformers','matplotlib'}
    if name.startswith('kernels.'): heavy -= {'triton'}
    assert not heavy, f'hlwq.{name} imports {sorted(heavy)} when it is loaded; move that into the function that uses it'

@pytest.mark.parametrize('name', modules())
def test_triton_only_in_kernels(name):
    assert name.startswith('kernels.') or 'triton' not in {mod.split('.')[0] for mod,_ in imports(name)}

BLOCK = '''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('transformers','matplotlib','triton','accelerate','llvmlite','compressed_tensors'): raise ModuleNotFoundError(f'{name} is blocked', name=name)
sys.meta_path.insert(0, Blocked())
'''

def test_loads_without_extras():
    "All that does not run a model loads where transformers, matplotlib and triton are not installed"
    names = [m for m in modules() if m not in USERS and not m.startswith('kernels.')]
    python(BLOCK + '\n'.join(f'import hlwq.{m}' for m in names))

def test_converts_and_verifies_without_extras(tmp_path):
    if 'convert' not in modules(): return
    python(BLOCK + f'''
from hlwq.core import asset_path
from hlwq.convert import quantize_checkpoint, dequantize_checkpoint
from hlwq.checkpoint import verify_checkpoint
quantize_checkpoint(asset_path('tiny-moe-10m'), {str(tmp_path/'q')!r}, progress=False)
assert verify_checkpoint({str(tmp_path/'q')!r}).ok
dequantize_checkpoint({str(tmp_path/'q')!r}, {str(tmp_path/'d')!r})
''')

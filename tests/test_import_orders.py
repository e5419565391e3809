"`hlwq.quantize` and `hlwq.lloyd_max` are functions, whichever way and in whichever order the modules were imported"
import inspect
from itertools import permutations
from types import ModuleType
import pytest
import hlwq
from common import modules,python

CLASHES = [n for n,m in hlwq._homes.items() if n==m and m in modules()]   # public functions named like their module

def ways(name):
    "Statements that load module `name`, or use what it defines"
    return [f'import hlwq.{name}',
            f'from hlwq.{name} import {name} as f; assert isfunction(f)',
            f'from hlwq import {name} as f; assert isfunction(f)',
            f'import hlwq; assert isfunction(hlwq.{name})',
            f'm = import_module("hlwq.{name}"); assert ismodule(m) and isfunction(m.{name})']

@pytest.mark.parametrize('name', CLASHES)
def test_function_wins_in_every_order(name):
    "A fork for each order starts with torch loaded and hlwq not, so 120 fresh imports take seconds"
    orders = ['\n'.join([*o, f'import hlwq, hlwq.{name}, hlwq.core', f'assert isfunction(hlwq.{name}) and hlwq.{name} is import_module("hlwq.{name}").{name}'])
              for o in permutations(ways(name))]
    python(f'''
import os, sys, torch
from importlib import import_module
from inspect import isfunction, ismodule
assert not any(m.split('.')[0]=='hlwq' for m in sys.modules)
for order in {orders!r}:
    pid = os.fork()
    if not pid:
        try: exec(order, dict(globals()))
        except BaseException as e: print(order, repr(e), flush=True); os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]: sys.exit(1)
''')

@pytest.mark.parametrize('name', CLASHES)
def test_indirect_import(name):
    "Another module of the package pulls the submodule in first"
    for other in modules():
        if other not in ('evaluate','demo','cli','hf','load','kv_cache'): __import__(f'hlwq.{other}')
    assert inspect.isfunction(getattr(hlwq, name))

def test_other_attributes_can_still_be_set():
    "The hook touches submodules of those names alone: tests may patch what they like"
    hlwq.something, hlwq.core = 1, hlwq.core
    assert hlwq.something == 1 and isinstance(hlwq.core, ModuleType)
    del hlwq.something

def test_public_names():
    assert len(hlwq.__all__) == len(set(hlwq.__all__))
    assert set(hlwq.__all__) <= set(dir(hlwq)) and '__version__' in dir(hlwq)
    for name in hlwq.__all__:
        if hlwq._homes[name] in modules(): assert callable(getattr(hlwq, name)), name

def test_public_names_are_exported_where_they_live():
    for name,mod in hlwq._homes.items():
        if mod in modules(): assert name in __import__(f'hlwq.{mod}', fromlist='_').__all__

def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"): hlwq.quantise
    assert not hasattr(hlwq, '__wrapped__')

def test_star_import():
    if set(hlwq._homes.values()) <= set(modules()):
        space = {}
        exec('from hlwq import *', space)
        assert set(hlwq.__all__) <= set(space)

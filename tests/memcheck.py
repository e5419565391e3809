"""A memory checker for kernels in Triton's interpreter: every address that a kernel reads or writes must lie in a tensor it was given.

    TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest -p memcheck tests/test_kernels.py

On a GPU a kernel that reads beyond a tensor may crash or not, as memory lies; in the interpreter it reads what is there. With this plugin it fails, and says which kernel it was and how far it went."""
import numpy as np
import pytest
from triton.runtime import interpreter

known = []                                                     # (first, end) of the storages of the kernel that runs, and its name

def ranges(args):
    "Storages of tensors in arguments, tuples included"
    for a in args:
        if isinstance(a, tuple): yield from ranges(a)
        elif hasattr(a, 'data_ptr'):
            s = interpreter._unwrap_tensor(a).untyped_storage()
            yield s.data_ptr(), s.data_ptr() + s.nbytes()

def check(ptrs, mask, what):
    "Raises IndexError for an address outside"
    if not known: return
    name, spans = known[-1]
    at = np.asarray(ptrs.data)[np.broadcast_to(np.asarray(mask, dtype=bool), np.shape(ptrs.data))].astype(np.int64)
    if not at.size: return
    size, ok = max(1, ptrs.get_element_ty().primitive_bitwidth//8), np.zeros(at.shape, dtype=bool)
    for a,b in spans: ok |= (at >= a) & (at + size <= b)
    if ok.all(): return
    bad = at[~ok][0]
    a, b = min(spans, key=lambda s: min(abs(bad - s[0]), abs(bad - s[1])))
    raise IndexError(f"{name}: {what} {(~ok).sum()} of {at.size} addresses outside of its tensors, the first {bad - b:+,} bytes from the end of one of {b - a:,} bytes")

@pytest.fixture(autouse=True)
def checked_memory(monkeypatch):
    builder, executor = type(interpreter.interpreter_builder), interpreter.GridExecutor
    load, store, rmw, init, call = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw, executor._init_args_hst, executor.__call__
    def loading(self, ptrs, mask, *rest): check(ptrs, mask.data, 'reads'); return load(self, ptrs, mask, *rest)
    def storing(self, ptrs, value, mask, *rest): check(ptrs, mask.data, 'writes'); return store(self, ptrs, value, mask, *rest)
    def adding(self, op, ptr, val, mask, *rest): check(ptr, mask.data, 'changes'); return rmw(self, op, ptr, val, mask, *rest)
    def noting(self, args, kwargs):
        a, k = init(self, args, kwargs)
        known[-1] = (known[-1][0], sorted(set(ranges([*a, *k.values()]))))
        return a, k
    def calling(self, *args, **kwargs):
        known.append((getattr(self.fn, '__name__', str(self.fn)), []))
        try: return call(self, *args, **kwargs)
        finally: known.pop()
    for o,name,f in ((builder, 'create_masked_load', loading), (builder, 'create_masked_store', storing), (builder, 'create_atomic_rmw', adding), (executor, '_init_args_hst', noting), (executor, '__call__', calling)): monkeypatch.setattr(o, name, f)

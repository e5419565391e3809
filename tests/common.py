"What several tests know about the package: where it lies, its modules, how to run code in a fresh interpreter"
import ast,os,subprocess,sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/'hlwq'

def modules():
    "Exported modules by dotted name below `hlwq`, such as `core` or `kernels.layout`"
    files = [f for f in sorted(PACKAGE.rglob('*.py')) if f.name not in ('__init__.py','_modidx.py')]
    return {'.'.join(f.relative_to(PACKAGE).with_suffix('').parts):f for f in files}

def tree(name): return ast.parse(modules()[name].read_text(encoding='utf-8'))

def python(code, **env):
    "Runs `code` in a fresh interpreter and returns what it printed"
    r = subprocess.run([sys.executable,'-c',code], cwd=ROOT, capture_output=True, text=True, env={**os.environ,**env})
    if r.returncode: raise AssertionError(f'exit {r.returncode}\n{r.stdout}{r.stderr}')
    return r.stdout

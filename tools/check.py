"Fail if hlwq/ is not what the notebooks export, or if a notebook is not clean. Works on a copy: nothing in the tree changes"
import shutil,subprocess,sys,tempfile
from pathlib import Path

root,scripts = Path(__file__).resolve().parents[1],Path(sys.executable).parent

def texts(tree):
    "The modules and notebooks under `tree`, by relative path"
    found = [*(tree/'hlwq').rglob('*.py'), *(f for f in (tree/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)]
    return {f.relative_to(tree).as_posix():f.read_bytes() for f in found}

def regenerated(cmd):
    "The same files after `cmd` ran on a copy"
    with tempfile.TemporaryDirectory() as t:
        t = Path(t)
        for d in ('hlwq','nbs'): shutil.copytree(root/d, t/d, ignore=shutil.ignore_patterns('assets','__pycache__','.ipynb_checkpoints'))
        shutil.copy(root/'settings.ini', t)
        subprocess.run([scripts/cmd], cwd=t, check=True)
        return texts(t)

def differences(cmd):
    old,new = texts(root),regenerated(cmd)
    return sorted(f for f in old.keys()|new.keys() if old.get(f)!=new.get(f))

if __name__=='__main__':
    bad = {cmd:d for cmd in ('nbdev_export','nbdev_clean') if (d := differences(cmd))}
    for cmd,files in bad.items(): print(f"{cmd} would change {', '.join(files)}; run {cmd} and commit the result", file=sys.stderr)
    if bad: sys.exit(1)
    print(f'{len(texts(root))} modules and notebooks agree')

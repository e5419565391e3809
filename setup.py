"Package metadata lives in settings.ini; this file only hands it to setuptools."
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def requirements(key): return shlex.split(cfg.get(key, ''))

extras = {g: requirements(f'{g}_requirements') for g in ('triton', 'ct', 'vllm', 'docs')}
extras['dev'] = requirements('dev_requirements') + extras['triton']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'],
    license='Apache-2.0', python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    package_data={cfg['lib_path']: ['assets/*', 'assets/*/*']},
    install_requires=requirements('requirements'), extras_require=extras,
    long_description=(here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists() else '',
    long_description_content_type='text/markdown',
    entry_points={'console_scripts':[cfg['console_scripts']], 'vllm.general_plugins':[cfg['vllm_plugins']], 'nbdev':[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)

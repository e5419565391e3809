"Hadamard-Lloyd weight quantization: large language models made small, exactly and fast"
# Written by hand; `nbdev_export` only keeps the version in step with settings.ini
__version__ = "0.1.0"

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from warnings import warn

# Public names by the module that defines them. Nothing is imported until a name is used, so `import hlwq` costs next to nothing
_modules = dict(
    core='HLWQError ConfigError CheckpointError NonFiniteError UnsupportedError ResumeError HLWQWarning HLWQPerformanceWarning',
    hadamard='fwht hadamard_matrix',
    lloyd_max='lloyd_max Codebook codebook',
    packing='pack_codes unpack_codes packed_nbytes',
    quantize='quantize dequantize QuantizedTensor quant_error',
    source='open_source',
    recipe='Recipe Rule default_recipe make_plan Plan',
    checkpoint='CheckpointReader CheckpointWriter verify_checkpoint',
    convert='quantize_checkpoint dequantize_checkpoint',
    ranks='quantize_on_ranks',
    linear='HLWQLinear',
    experts='HLWQExperts',
    packed_model='hlwq_report',
    hf='HLWQConfig HLWQQuantizer',
    load='load_model',
    bank='HostBank',
    kv_cache='HLWQCache',
    generate='generate HLWQGenerator GenerationReport',
    custom_generate='custom_generate',
    cache_policy='ExpertTable',
    offload='offload_experts OffloadStats',
    cache_sim='RoutingTrace record_routing simulate_cache predicted_tokens_per_second',
    evaluate='perplexity kl_divergence compare',
    hub='push_to_hub model_card',
    report='html_report',
    export_ct='export_compressed_tensors plan_export ExportPlan',
)
_homes = {name:mod for mod,names in _modules.items() for name in names.split()}
__all__ = list(_homes)

def __getattr__(name):
    if name not in _homes: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'{__name__}.{_homes[name]}'), name)
    return value

def __dir__(): return sorted([*__all__, '__all__', '__version__'])

class _Package(ModuleType):
    # `quantize` and `lloyd_max` are functions, and also the submodules that define them. After loading a submodule Python
    # stores it on the package under its name, over the function. This hook stores the function instead, so `hlwq.quantize(w)`
    # works whatever was imported first. Imports from inside (`from hlwq.quantize import QuantizedTensor`) go by
    # `sys.modules` and still find the module.
    def __setattr__(self, name, value):
        if isinstance(value, ModuleType) and _homes.get(name) == name: value = getattr(value, name)
        super().__setattr__(name, value)

sys.modules[__name__].__class__ = _Package

class _WhenImported:
    # transformers must know the method before it loads a model, and importing it takes seconds. So registration waits for
    # the moment when somebody else imports it: this finder steps in front of the import of one module, lets it run, and registers.
    name = 'transformers.quantizers.auto'

    def find_spec(self, name, path=None, target=None):
        if name != self.name: return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            _load_hf()
        spec.loader.exec_module = exec_module
        return spec

def _load_hf():
    # whatever an unsupported version lacks, all that does not need transformers goes on working
    try: import_module('hlwq.hf')
    except Exception as e: warn(f"hlwq: this version of transformers cannot load its models ({e}), need 5.16 or newer; pip install -U transformers", stacklevel=2)

def _register():
    if _WhenImported.name in sys.modules: _load_hf()
    elif not any(type(o).__name__ == '_WhenImported' for o in sys.meta_path): sys.meta_path.insert(0, _WhenImported())

_register()

"What only a GPU can show: packed models on CUDA, split between devices, compiled, captured. Skipped where there is none"
import copy
import pytest,torch
if not torch.cuda.is_available(): pytest.skip('needs a CUDA device', allow_module_level=True)
from transformers import AutoModelForCausalLM,LlamaConfig,LlamaForCausalLM
import hlwq
from hlwq.checkpoint import verify_checkpoint
from hlwq.convert import quantize_checkpoint
from hlwq.core import asset_path
from hlwq.hf import HLWQConfig
from hlwq.linear import HLWQLinear
from hlwq.quantize import quantize

@pytest.fixture(scope='module')
def q5(tmp_path_factory):
    out = tmp_path_factory.mktemp('m')/'q5'
    quantize_checkpoint(asset_path('tiny-moe-10m'), out, progress=False)
    return out

@pytest.fixture(scope='module')
def ids(): return torch.randint(5, 8000, (2, 64), generator=torch.Generator().manual_seed(0))

@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('llama')
    LlamaForCausalLM(LlamaConfig(hidden_size=320, intermediate_size=640, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5, vocab_size=256)).save_pretrained(path)
    return path

@torch.inference_mode()
def logits(model, ids): return model(input_ids=ids.to(model.device)).logits.float().cpu()

def test_same_as_on_cpu(q5, ids):
    a,b = (logits(hlwq.load_model(q5, device_map={'':d}, dtype=torch.float32), ids) for d in ('cpu','cuda'))
    assert (a-b).norm()/a.norm() < 1e-4

def test_load_model_takes_the_card(q5): assert hlwq.load_model(q5).device.type == 'cuda'

def test_on_the_fly_gives_the_same_bytes(q5):
    a = AutoModelForCausalLM.from_pretrained(asset_path('tiny-moe-10m'), quantization_config=HLWQConfig(), device_map={'':'cuda'})
    b = AutoModelForCausalLM.from_pretrained(q5)
    b = b.state_dict()
    assert all(p.is_cuda for p in a.parameters())
    for n,t in a.state_dict().items(): assert torch.equal(t.cpu(), b[n]), n

def test_saves_from_the_card(q5, tmp_path):
    hlwq.load_model(q5).save_pretrained(tmp_path/'s')
    assert verify_checkpoint(tmp_path/'s').ok

@pytest.mark.parametrize('second', ['cpu','disk'])
def test_split_between_devices(q5, ids, tmp_path, second):
    split = {'model.embed_tokens':0, 'lm_head':0, 'model.norm':0, 'model.rotary_emb':0, **{f'model.layers.{i}':(0 if i%2 else second) for i in range(4)}}
    m = AutoModelForCausalLM.from_pretrained(q5, dtype=torch.float32, device_map=split, offload_folder=tmp_path)
    a = logits(AutoModelForCausalLM.from_pretrained(q5, dtype=torch.float32, device_map={'':0}), ids)
    assert (logits(m, ids)-a).norm()/a.norm() < 1e-5

def test_moves_keep_every_bit():
    m = HLWQLinear.from_quantized(quantize(torch.randn(64, 300), 5), torch.zeros(64))
    n = copy.deepcopy(m).cuda().bfloat16().cpu().float()
    assert torch.equal(m.packed, n.packed) and torch.equal(m.norms, n.norms)

def test_dense_model_compiles_whole_and_captures(dense):
    m = AutoModelForCausalLM.from_pretrained(dense, quantization_config=HLWQConfig(min_coverage=0), dtype=torch.bfloat16, device_map={'':0})
    x = torch.randint(0, 256, (1, 8), device='cuda')
    with torch.inference_mode():
        want = m(input_ids=x, use_cache=False).logits
        got = torch.compile(m, fullgraph=True)(input_ids=x, use_cache=False).logits
        assert (got-want).float().norm()/want.float().norm() < 2e-2
        for _ in range(2): m(input_ids=x, use_cache=False)
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g): y = m(input_ids=x, use_cache=False).logits
        x.copy_(torch.randint(0, 256, (1, 8), device='cuda'))
        g.replay()
        assert torch.equal(y, m(input_ids=x, use_cache=False).logits)

def test_experts_agree_on_the_card(q5, ids):
    m = hlwq.load_model(q5, dtype=torch.bfloat16, device_map={'':0})
    got = {}
    for way in ('eager','grouped_mm','batched_mm'): m.set_experts_implementation(way); got[way] = logits(m, ids)
    for way in got: assert (got[way]-got['eager']).norm()/got['eager'].norm() < 3e-2

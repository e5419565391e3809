"""Plans for thirteen architectures, as transformers builds them, and in the layout that it writes to files.

What must stay in 16 bits is listed here by hand from the models' sources, apart from the expressions that the recipe uses."""
import json
import pytest
from hlwq.recipe import make_plan
from hlwq.source import open_source

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')

SMALL = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MOE = SMALL | dict(moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2)
GDN = dict(linear_num_key_heads=2, linear_num_value_heads=4, layer_types=['linear_attention', 'linear_attention', 'full_attention'])
# name -> config class, sizes of a small model, ends of the names that are to be quantized, ends of the names of two or three axes that are to be kept
ATTN = ['q_proj.weight', 'k_proj.weight', 'v_proj.weight', 'o_proj.weight']
DENSE = ['mlp.gate_proj.weight', 'mlp.up_proj.weight', 'mlp.down_proj.weight']
FUSED = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']
IO = ['embed_tokens.weight', 'lm_head.weight']
ARCHITECTURES = dict(
    qwen3_5_moe=('Qwen3_5MoeTextConfig', MOE | GDN | dict(shared_expert_intermediate_size=128), ATTN + FUSED + ['shared_expert.gate_proj.weight', 'shared_expert.up_proj.weight', 'shared_expert.down_proj.weight', 'in_proj_qkv.weight', 'in_proj_z.weight', 'linear_attn.out_proj.weight'],
        IO + ['mlp.gate.weight', 'shared_expert_gate.weight', 'in_proj_a.weight', 'in_proj_b.weight', 'conv1d.weight']),
    llama=('LlamaConfig', SMALL, ATTN + DENSE, IO),
    qwen3=('Qwen3Config', SMALL, ATTN + DENSE, IO),
    qwen3_moe=('Qwen3MoeConfig', MOE, ATTN + FUSED, IO + ['mlp.gate.weight']),
    qwen2_moe=('Qwen2MoeConfig', MOE | dict(shared_expert_intermediate_size=256), ATTN + FUSED + ['shared_expert.gate_proj.weight', 'shared_expert.up_proj.weight', 'shared_expert.down_proj.weight'], IO + ['mlp.gate.weight', 'shared_expert_gate.weight']),
    mixtral=('MixtralConfig', SMALL | dict(num_local_experts=4), ATTN + FUSED, IO + ['mlp.gate.weight']),
    olmoe=('OlmoeConfig', MOE, ATTN + FUSED, IO + ['mlp.gate.weight']),
    deepseek_v3=('DeepseekV3Config', MOE | dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=128, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=64, n_group=1, topk_group=1, num_key_value_heads=4),
        ['q_a_proj.weight', 'q_b_proj.weight', 'kv_a_proj_with_mqa.weight', 'kv_b_proj.weight', 'o_proj.weight'] + DENSE + FUSED + ['shared_experts.gate_proj.weight', 'shared_experts.up_proj.weight', 'shared_experts.down_proj.weight'], IO + ['mlp.gate.weight']),
    gpt_oss=('GptOssConfig', SMALL | dict(intermediate_size=256, num_local_experts=4), ATTN + FUSED, IO + ['mlp.router.weight', 'gate_up_proj_bias', 'down_proj_bias']),
    gemma3=('Gemma3Config', dict(text_config=SMALL, vision_config=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)), ATTN + DENSE,
        ['embed_tokens.weight', 'patch_embedding.weight', 'position_embedding.weight', 'mm_input_projection_weight', 'head.probe', 'in_proj_weight'] + [f'vision_tower.encoder.layers.0.{o}.weight' for o in ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'self_attn.out_proj', 'mlp.fc1', 'mlp.fc2')] + [f'vision_tower.head.{o}.weight' for o in ('attention.out_proj', 'mlp.fc1', 'mlp.fc2')]),
    phi3=('Phi3Config', SMALL, ['qkv_proj.weight', 'o_proj.weight', 'mlp.gate_up_proj.weight', 'mlp.down_proj.weight'], IO),
    glm4_moe=('Glm4MoeConfig', MOE | dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1), ATTN + DENSE + FUSED + ['shared_experts.gate_proj.weight', 'shared_experts.up_proj.weight', 'shared_experts.down_proj.weight'], IO + ['mlp.gate.weight']),
    granite_moe_hybrid=('GraniteMoeHybridConfig', SMALL | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=256, layer_types=['mamba', 'mamba', 'attention'], mamba_n_heads=8, mamba_d_head=64, mamba_d_state=32, mamba_n_groups=1, tie_word_embeddings=False),
        ATTN + ['experts.gate_up_proj', 'experts.down_proj', 'shared_mlp.input_linear.weight', 'shared_mlp.output_linear.weight', 'mamba.in_proj.weight', 'mamba.out_proj.weight'], IO + ['router.weight', 'conv1d.weight']),
)
NEVER = ('norm', 'router', '.gate.', '_gate.', 'in_proj_a.', 'in_proj_b.', 'conv', 'A_log', 'dt_bias', 'bias', 'embed', 'lm_head', 'vision', 'sinks')

def config_of(name): cls,sizes,*_ = ARCHITECTURES[name]; return getattr(transformers, cls)(**sizes)

@pytest.fixture(scope='module')
def plan_of(tmp_path_factory):
    "The plan of an architecture from its config alone, made once"
    made = {}
    def f(name):
        if name not in made:
            d = tmp_path_factory.mktemp(name)
            config_of(name).save_pretrained(d)
            made[name] = make_plan(d)
        return made[name]
    return f

@pytest.mark.parametrize('name', ARCHITECTURES)
def test_partition_by_hand(name, plan_of):
    plan,(_,_,quantized,kept) = plan_of(name),ARCHITECTURES[name]
    for r in plan.rows:
        if len(r.shape) < 2: assert r.action == 'keep', r
        elif r.name.endswith(tuple(kept)): assert r.action == 'keep', r
        else: assert r.action == 'quantize' and r.name.endswith(tuple(quantized)), r
    for o in quantized + kept: assert any(r.name.endswith(o) for r in plan.rows), f'{o} not found: the list above is out of date'

@pytest.mark.parametrize('name', ARCHITECTURES)
def test_coverage_outside_embeddings(name, plan_of):
    plan = plan_of(name)
    mass = sum(r.numel for r in plan.rows if len(r.shape) in (2, 3) and 'embed' not in r.name and 'lm_head' not in r.name)
    assert plan.quantized_params >= .9*mass and plan.understood == 1
    bad = [r.name for r in plan.only('quantize') if any(o in r.name for o in NEVER)]
    assert not bad

@pytest.mark.parametrize('name', ARCHITECTURES)
def test_only_gpt_oss_is_transposed(name, plan_of):
    rows = plan_of(name).only('quantize')
    assert [r.name for r in rows if r.transposed] == [r.name for r in rows if name == 'gpt_oss' and 'experts' in r.name]
    for r in rows: assert 256 in r.matrix_shape or r.matrix_shape[1] in (64, 128, 512) or 'mamba' in r.name or 'linear_attn' in r.name

@pytest.mark.parametrize('name', [o for o in ARCHITECTURES if o != 'gemma3'])
def test_files_as_transformers_writes_them(name, plan_of, tmp_path):
    "Saved with one tensor per expert (the default) or fused: the same weights are quantized"
    torch.manual_seed(0)
    total = lambda p: sum(r.numel for r in p.rows if 'e_score_correction_bias' not in r.name)      # a buffer: in files, not among the parameters
    model = transformers.AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    want = plan_of(name)
    for original in (True, False):
        model.save_pretrained(tmp_path/str(original), save_original_format=original)
        plan = make_plan(tmp_path/str(original))
        assert plan.quantized_params == want.quantized_params and total(plan) == total(want) and plan.understood == 1
        assert not [r.name for r in plan.only('quantize') if any(o in r.name for o in NEVER)]

def test_seed(tmp_path):
    transformers.Qwen3_5MoeConfig().save_pretrained(tmp_path)
    plan = make_plan(tmp_path)
    assert (plan.n_matrices, plan.n_keys) == (20_730, 62_190)
    assert (round(plan.quantized_params/1e9, 3), round(plan.total_params/1e9, 3)) == (33.617, 35.114)
    assert round(plan.bits_per_weight, 3) == 5.125 and round(plan.nbytes/1e9, 2) == 21.55 and plan.understood == 1
    assert json.loads(json.dumps(plan.to_json()))['n_keys'] == 62_190

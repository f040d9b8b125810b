"""Folders for vLLM's class of per-layer sizes: what can be said is written exactly, and what can't is named. vLLM itself isn't run."""
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from sentinel_ai import adapt, compact, export_vllm, load_tokenizer, random_model, set_gates
from sentinel_ai.vllm import all_heads, read_vllm, vllm_logits, vllm_problems, vllm_shapes

torch.set_num_threads(1)
IDS = torch.arange(5, 25)
ARCHS = {'llama': {}, 'qwen2': {}, 'mistral': dict(sliding_window=None), 'llama-biases': dict(attention_bias=True, mlp_bias=True),
         'llama-tied': dict(tie_word_embeddings=True), 'llama-eight': dict(num_attention_heads=8, num_key_value_heads=4)}


def made(arch, dtype=torch.float32): return adapt(random_model(arch.split('-')[0], dtype=dtype, **ARCHS[arch]))


def close(m, seed):
    "Close some heads and channels of each layer; in some layers none or all."
    rng = random.Random(seed)
    for kind, found in (('heads', m.sentinel.now.heads), ('channels', m.sentinel.now.channels)):
        for site in found:
            n = rng.choice([0, rng.randrange(site.n), site.n if site.layer or kind == 'channels' else 0])
            set_gates(m, {(site.layer, u): 0. for u in rng.sample(range(site.n), n)}, kind=kind)
    return m


@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('seed', range(4))
def test_any_plan(arch, seed, tmp_path):
    "With padding any plan is exact, masked or compact; without it a folder is written exactly where no problem is named."
    m = close(made(arch), seed)
    with torch.no_grad(): want = m(IDS[None]).logits[0]
    assert vllm_problems(m, pad=True) == []
    export_vllm(m, tmp_path/'padded', pad=True)
    assert torch.allclose(vllm_logits(tmp_path/'padded', IDS), want, atol=1e-4)
    problems = vllm_problems(m)
    if problems:
        with pytest.raises(ValueError) as e: export_vllm(m, tmp_path/'plain')
        assert str(e.value).startswith(problems[0]) and not (tmp_path/'plain').exists()
        return
    done = export_vllm(m, tmp_path/'plain')
    assert done.added_bytes == 0
    compact(m)
    export_vllm(m, tmp_path/'compact')
    one, other = (read_vllm(tmp_path/name) for name in ('plain', 'compact'))
    assert one.config == other.config and all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_weights_bit_for_bit(dtype, tmp_path):
    "Per-layer channels, one attention and one MLP left out: every tensor is the compact model's own, and each shape is as the config says."
    m = made('llama-eight', dtype)
    set_gates(m, {(1, h): 0. for h in range(8)})
    set_gates(m, {(0, c): 0. for c in range(48)} | {(1, c): 0. for c in range(0, 48, 3)}, kind='channels')
    compact(m)
    done = export_vllm(m, tmp_path/'x')
    back, own = read_vllm(tmp_path/'x'), m.state_dict()
    assert done.channels == {0: (0, 0), 1: (32, 32)} and done.layers[1] == (0, 0, 0, 0)
    assert all(torch.equal(t, own[name]) and t.dtype == dtype for name, t in back.tensors.items())
    assert {name: tuple(t.shape) for name, t in back.tensors.items()} == vllm_shapes(back.config)
    left = {name for name in own if name not in back.tensors and 'sentinel' not in name}
    assert all(name.startswith(('model.layers.0.mlp', 'model.layers.0.post_', 'model.layers.1.self_attn', 'model.layers.1.input_'))
               for name in left), left


def test_one_weight_off_is_found(tmp_path):
    m = made('llama')
    export_vllm(m, tmp_path/'x')
    back = read_vllm(tmp_path/'x')
    with torch.no_grad(): want = m(IDS[None]).logits[0]
    for change in (dict(rope_theta=1e3), dict(rms_norm_eps=.1), dict(num_attention_heads=8, head_dim=4)):
        back.config |= change
        if 'rope_theta' in change: back.config['rope_parameters'] = dict(rope_type='default', **change)
        back.head_dim = back.config['head_dim']
        assert (back(IDS) - want).abs().max() > 1e-4, change


def test_heads_protected(tmp_path):
    m = set_gates(made('llama-eight'), {(0, 1): 0.})
    assert all_heads(m) == [(layer, h) for layer in (0, 1) for h in range(8)]


def test_the_config_as_vllm_reads_it(tmp_path):
    "By transformers alone, in a process that can't import this library: objects with the attributes that vLLM asks for."
    m = made('llama')
    set_gates(m, {(1, h): 0. for h in range(4)})
    set_gates(m, {(0, c): 0. for c in range(10)}, kind='channels')
    export_vllm(m, tmp_path/'x', tokenizer=load_tokenizer('tiny-llama'))
    script = """
import sys; sys.modules['sentinel_ai'] = None
from transformers import AutoConfig, AutoTokenizer
cfg = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
first, second = cfg.block_configs
assert cfg.architectures == ['DeciLMForCausalLM'] and cfg.model_type == 'nemotron-nas'
assert (first.attention.no_op, second.attention.no_op, first.ffn.no_op) == (False, True, False)
assert cfg.num_attention_heads // first.attention.n_heads_in_group == 2
assert not hasattr(first.ffn, 'ffn_mult') and not hasattr(first.ffn, 'hidden_act') and first.ffn.intermediate_size == 38
assert cfg.hidden_act == 'silu' and cfg.rope_parameters['rope_theta'] == cfg.rope_theta == 10000.
assert cfg.rope_parameters['rope_type'] == 'default' and not cfg.attention_bias and not cfg.qkv_bias and not cfg.mlp_bias
assert cfg.pad_token_id is None or isinstance(cfg.pad_token_id, int)
if hasattr(cfg, 'standardize_rope_params'): cfg.standardize_rope_params(); cfg.validate_rope()
cfg.save_pretrained(sys.argv[2])
again = AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=True)
assert again.block_configs == cfg.block_configs
print(AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)('a b').input_ids)
"""
    env = dict(os.environ, HF_HOME=str(tmp_path/'hf'), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    run = subprocess.run([sys.executable, '-c', script, str(tmp_path/'x'), str(tmp_path/'again')], capture_output=True, text=True,
                         env=env, stdin=subprocess.DEVNULL, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout) == load_tokenizer('tiny-llama')('a b').input_ids

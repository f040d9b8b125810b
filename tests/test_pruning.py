"""Prune, repair, compact, save, load, expand, undo: on the whole architecture matrix the original comes back bit for bit.

`pytest tests/test_pruning.py -k llama` runs one architecture.
"""
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import ALL, DEVICE, SEED, build, greedy, logits  # noqa: E402

from sentinel_ai import adapt, compact, gate_values, prune, unadapt, unprune  # noqa: E402

torch.set_num_threads(1)
CALIB = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def same(model, sd):
    now = model.state_dict()
    return now.keys() == sd.keys() and all(torch.equal(now[k].cpu(), v.cpu()) for k, v in sd.items())


@pytest.mark.filterwarnings('ignore:.*only columns of the output projection left')
@pytest.mark.parametrize('name', ALL)
def test_there_and_back(name, tmp_path):
    model = build(name)
    cls, sd, plain = type(model), {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    plan = prune(model, .4, CALIB, rounds=1, progress=False)
    masked = logits(model)
    assert plan.removed == int((gate_values(model) == 0).sum()) > 0 and not torch.equal(masked, plain)
    compact(model)
    small = logits(model)
    torch.testing.assert_close(small, masked, rtol=1e-3, atol=1e-4*masked.abs().max().item())
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)  # configs don't keep it
    for p in back.parameters(): p.data = p.data.clone()        # where a tensor lies in memory can change a rounding
    assert type(back) is type(model) and torch.equal(logits(back), small), 'reload equals compact'
    assert torch.equal(greedy(back), greedy(model))
    for m in (model, back):
        unadapt(unprune(m))
        assert type(m) is cls and torch.equal(logits(m), plain)
    assert same(model, sd) and same(back, sd)


@pytest.mark.parametrize('name', SEED)
@pytest.mark.parametrize('repair', ['none', 'bias', 'linear', 'affine'])
def test_repair_helps_and_can_be_taken_back(name, repair):
    "Repaired layers come closer to what they wrote before, on the calibration text; nothing else changes, and all of it comes back."
    model = build(name)
    sd = {k: v.clone() for k, v in model.state_dict().items()}
    plain = logits(model, CALIB)
    prune(model, .3, CALIB, criterion='random', repair='none', rounds=1, progress=False)
    none = (logits(model, CALIB) - plain).square().mean()
    unprune(model)
    prune(model, .3, CALIB, criterion='random', repair=repair, rounds=1, progress=False)
    err = (logits(model, CALIB) - plain).square().mean()
    assert err == none if repair == 'none' else err < none, f'{repair}: {err:.2e} against {none:.2e}'
    unadapt(unprune(model))
    assert same(model, sd)


def test_rounds_add_up_and_a_broken_run_leaves_nothing():
    model = build('llama')
    sd = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match='stop'):
        prune(model, .5, CALIB, criterion=lambda stats: (_ for _ in ()).throw(RuntimeError('stop')), rounds=2, progress=False)
    assert same(model, sd) and type(model).__name__ == 'LlamaForCausalLM'
    a = prune(model, 2, CALIB, progress=False)
    b = prune(model, 4, CALIB, progress=False)
    assert (a.removed, b.removed) == (2, 4) and not (b.keep & ~a.keep).any()
    unadapt(unprune(model))
    assert same(model, sd)


@pytest.mark.parametrize('unit', ['params', 'kv_bytes', 'flops'])
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'mistral', 'gemma2'])
def test_budgets_are_met(name, unit):
    from sentinel_ai.choose import total_cost
    model = build(name)
    hm_all = sum(p.numel() for p in model.parameters())
    total = {'params': hm_all, 'kv_bytes': None, 'flops': None}[unit]
    prune(model, 0, CALIB, progress=False)
    hm = model.sentinel.now.heads
    if unit == 'kv_bytes': total = total_cost(hm, 'kv_bytes')
    if unit == 'flops': total = 2*hm.n_params + sum(4*s.head_dim*s.n_heads*512 for s in hm)
    budget = total - total_cost(hm, unit)/2
    prune(model, batches=CALIB, progress=False, **{unit: budget})
    compact(model)
    size = sum(p.numel() for n, p in model.named_parameters() if 'sentinel' not in n)
    left = {'params': lambda: size,
            'kv_bytes': lambda: total_cost(model.sentinel.now.heads, 'kv_bytes'),
            'flops': lambda: 2*size + sum(4*s.head_dim*s.n_heads*512 for s in model.sentinel.now.heads)}[unit]()
    assert left <= budget, f'{left} of {budget}'


@pytest.mark.parametrize('bad, match', [
    (dict(amount=1.5), r'amount=1.5: allowed is a share'), (dict(amount=-1), 'amount=-1'), (dict(amount=10**6), 'whole number of heads'),
    (dict(amount=.3, params=5), 'give one of'), (dict(), 'give one of'), (dict(params=3), 'without any head'),
    (dict(amount=.3, criterion='fischer'), 'fischer'),
    (dict(amount=.3, scope='all'), 'scope'), (dict(amount=.3, repair='glue'), 'glue'), (dict(amount=.3, rounds=0), 'rounds=0'),
    (dict(amount=.3, min_heads=99), 'min_heads=99'), (dict(amount=.9, min_heads=3), 'min_heads'), (dict(amount=.3, protect=[(9, 0)]), 'layer 9 head 0'),
    (dict(amount=.3, ridge=0), 'ridge'), (dict(amount=.3, batches=[]), 'batches')])
def test_bad_arguments_change_nothing(bad, match):
    model = build('llama')
    sd = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((ValueError, IndexError), match=match): prune(model, **(dict(batches=CALIB) | bad), progress=False)
    assert type(model).__name__ == 'LlamaForCausalLM' and same(model, sd)


@pytest.mark.parametrize('mode', ['static', 'learned', 'hard_concrete'])
def test_gates_are_trained_after_loading_as_they_were_before(mode, tmp_path):
    from sentinel_ai import GateConfig, adapt, set_gates
    model = set_gates(adapt(build('llama'), GateConfig(mode)), .5)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    wants = [(n, p.requires_grad) for n, p in model.named_parameters() if '.sentinel.' in n]
    assert wants == [(n, p.requires_grad) for n, p in back.named_parameters() if '.sentinel.' in n]


class Packed(torch.Tensor):
    "Stands for the tensors of quanto and torchao: floats to the outside, something else within."


def int8(lin): lin.weight = torch.nn.Parameter(torch.zeros(lin.weight.shape, dtype=torch.int8), requires_grad=False)
def packed(lin): lin.weight = torch.nn.Parameter(lin.weight.detach().as_subclass(Packed))
def sharded(lin): lin.weight = torch.nn.Parameter(torch.zeros(0))


def swapped(lin):
    weight = lin.weight.detach()
    del lin.weight
    lin.held = lambda: weight


@pytest.mark.parametrize('spoil, says', [(int8, 'torch.int8'), (packed, 'Packed'), (sharded, 'sharded'), (swapped, 'without a weight')])
def test_weights_that_are_no_floats_in_memory_are_refused(spoil, says):
    "Everything that reads or writes weights says so before it changes anything."
    from sentinel_ai import adapt, measure, merge_gates, set_gates
    from sentinel_ai.growth import grow
    from sentinel_ai.pruning import close_heads
    from sentinel_ai.regrow import regrow
    model = set_gates(adapt(build('llama')), {(0, 0): 0., (1, 1): 0.})
    spoil(model.sentinel.now.heads[1].out)
    sd = {k: v.clone() for k, v in model.state_dict().items()}
    for do in (lambda: prune(model, .5, CALIB, progress=False), lambda: measure(model, CALIB, 'use', progress=False), lambda: merge_gates(model),
               lambda: close_heads(model, [(1, 0)], CALIB), lambda: regrow(model, [(0, 0)], init='zero'), lambda: grow(model, heads=1),
               lambda: grow(model, layers=1), lambda: compact(model, check=False)):
        with pytest.raises(RuntimeError, match=f'layer 1: model.layers.1.self_attn.o_proj.weight is .*{says}'): do()
    assert same(model, sd)


def test_offloaded_weights_are_refused():
    from accelerate import cpu_offload
    model = cpu_offload(build('llama').cpu(), 'cpu')
    with pytest.raises(RuntimeError, match='offloaded; prune needs float weights in memory'): prune(model, .25, CALIB.cpu(), progress=False)
    assert type(model).__name__ == 'LlamaForCausalLM'


@pytest.mark.parametrize('criterion', ['joint', 'fisher', 'wanda', 'entropy', 'auto'])
def test_text_that_says_nothing_is_refused(criterion):
    model, nothing = build('llama'), dict(input_ids=CALIB, labels=torch.full_like(CALIB, -100))
    sd = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match='batch 1: no token counts'): prune(model, .4, [CALIB, nothing], criterion, progress=False)
    assert type(model).__name__ == 'LlamaForCausalLM' and same(model, sd)
    with torch.no_grad(): model.model.layers[-1].mlp.down_proj.weight[0, 0] = float('nan')
    with pytest.raises(ValueError, match='batch 0: the loss is nan'): prune(model, .4, CALIB, criterion, progress=False)
    assert type(model).__name__ == 'LlamaForCausalLM'


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'qwen2'])
def test_a_singular_covariance_raises_the_ridge(name):
    model = build(name)
    plain = logits(model, CALIB)
    plan = prune(model, .4, torch.full((2, 16), 7, device=DEVICE), progress=False)
    assert all(v > .01 for v in plan.info.get('ridge_raised', {}).values()) and logits(model, CALIB).abs().max() < 10*plain.abs().max()


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'opt'])
def test_a_repair_under_an_adapter_outlives_it(name, tmp_path):
    "Pruned under LoRA, which is then merged: what repair changed is found by its new name, saved, compacted and taken back."
    peft = pytest.importorskip('peft')
    plain, out = build(name), dict(llama='o_proj', gpt2='c_proj', opt='out_proj')[name]
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    config = peft.LoraConfig(r=2, target_modules=[out], task_type='CAUSAL_LM', fan_in_fan_out=name == 'gpt2')
    wrapped = peft.get_peft_model(adapt(build(name)), config)
    prune(wrapped, .25, ids, progress=False)
    model = wrapped.merge_and_unload()
    prune(model, .5, ids, progress=False)                  # a second repair is logged with the first
    assert not [k for k in model.sentinel.repairs.changed if 'base_layer' in k]
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    compact(model)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    for _ in range(2): unprune(model)
    assert torch.equal(model(ids).logits, plain(ids).logits)

"""What is measured and repaired in layers of routed experts, against loops that are written out.

`pytest tests/test_experts.py -k gpt_oss` runs one architecture.
"""
import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from sentinel_ai import adapt, compact, gate_values, measure, merge_gates, prune, set_gates, unprune
from sentinel_ai.channels import channel_map, routed_experts, sites
from sentinel_ai.experts import ExpertSite, Opened, idle_params, read_experts, routed_bias
from sentinel_ai.measure import measuring, summed_loss
from sentinel_ai.repair import repair_layer
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import IDS, build as fresh, logits, needs_experts  # noqa: E402
from test_surgery import close, same_state, state  # noqa: E402

torch.set_num_threads(1)
pytestmark = needs_experts
NAMES = ['mixtral', 'gpt_oss', 'qwen3_moe', 'jamba']
CALIB = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def build(name):
    "A model whose experts' biases aren't all zero."
    model = fresh(name)
    gen = torch.Generator().manual_seed(1)
    for n, p in model.named_parameters():
        if n.endswith('_proj_bias'): p.copy_(.2*torch.randn(p.shape, generator=gen))
    return model


def layers(model): return [s for s in channel_map(model) if isinstance(s, ExpertSite)]


def calls(model, ids=CALIB, mask=None):
    "Channels, experts and routing weights of each expert layer, by a call of the model."
    seen = {}
    opened = [Opened(s, lambda x, r, l=s.layer: seen.setdefault(l, (x, r)) and x) for s in layers(model)]
    try: logits(model, ids, **({} if mask is None else dict(attention_mask=mask)))
    finally:
        for o in opened: o.remove()
    return seen


@pytest.mark.parametrize('impl', ['eager', 'batched_mm', 'grouped_mm'])
@pytest.mark.parametrize('name', NAMES)
def test_gates_act_under_every_kernel(name, impl):
    model = build(name)
    model.config._experts_implementation = impl
    plain, wanted = logits(model), copy.deepcopy(model)
    model = adapt(model)
    assert torch.equal(logits(model), plain)
    gates = torch.rand(model.sentinel.now.channels.shape, generator=torch.Generator().manual_seed(1))
    gates[gates < .3] = 0.
    gates[model.sentinel.now.channels.table().isnan()] = torch.nan
    set_gates(model, gates, 'channels')
    with torch.no_grad():
        for s in channel_map(wanted): s.columns(s.weight).mul_(gates[s.layer, :s.n][:, None, None])
    close(logits(model), logits(wanted))
    for s in layers(model): assert 'down_proj' not in vars(s.mlp) and isinstance(s.mlp.down_proj, torch.nn.Parameter)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert torch.equal(logits(twin), logits(model))
    masked = logits(model)
    close(logits(merge_gates(model)), masked)


@pytest.mark.parametrize('name', ['mixtral', 'gpt_oss'])
def test_an_error_leaves_no_gated_weight_behind(name):
    model = set_gates(adapt(build(name)), {(0, 1): 0.}, 'channels')
    experts = layers(model)[0].mlp
    hook = experts.register_forward_pre_hook(lambda m, args: 1/0)
    with pytest.raises(ZeroDivisionError): logits(model)
    hook.remove()
    assert 'down_proj' not in vars(experts)
    want = logits(model)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize('name', NAMES)
def test_gradients_of_gates_are_those_of_the_loss(name):
    "Closed gates too: what would opening them bring?"
    model = set_gates(adapt(build(name)), {(layers(build(name))[0].layer, 3): 0.}, 'channels')
    stats = measure(model, IDS, {'gradient'}, kinds=('heads', 'channels'), progress=False).channels
    for site in layers(model):
        gate = site.mlp.sentinel.gate
        gate.requires_grad_(True)
        site.mlp.sentinel.seen = None
    with measuring(model):
        for site in layers(model): site.mlp.sentinel.gate.requires_grad_(True)
        summed_loss(model(IDS).logits, IDS).backward()
    for site in layers(model): close(stats['grad'][site.layer, :site.n], site.mlp.sentinel.gate.grad, 1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_moments_are_those_of_a_loop(name):
    model = build(name)
    mask = torch.ones_like(CALIB)
    mask[2, :5] = 0
    batches = [dict(input_ids=CALIB, attention_mask=mask)]
    stats = measure(model, batches, {'gram', 'use'}, kinds=('heads', 'channels'), progress=False).channels
    seen, valid = calls(model, mask=mask), mask.flatten().bool()
    for site in layers(model):
        x, routed = seen[site.layer]
        x, index, share = x[valid].double(), routed.index[valid], routed.share[valid].double()
        W = site.columns(site.weight.detach()).double()                      # c e o
        power = torch.zeros(site.n, dtype=torch.float64)
        for e in range(site.experts):
            rows, r = x[index == e], share[index == e]
            moments = stats.grams[site.layer]
            assert moments['rows'][e] == len(rows)
            if not len(rows): continue
            mean = (r.square()[:, None]*rows).sum(0)/r.square().sum()
            cov = ((r[:, None]*(rows - mean)).T @ (r[:, None]*(rows - mean)))/r.square().sum()
            close(moments['mean'][e], mean, 1e-4)
            close(moments['cov'][e], cov, 1e-3)
            power += (r[:, None]*rows).square().sum(0)*W[:, e].square().sum(-1)
        close(stats['use'][site.layer, :site.n].square(), power/int(valid.sum()), 1e-4)


@pytest.mark.parametrize('kind', ['linear', 'affine'])
def test_repair_is_weighted_least_squares(kind):
    "Without a ridge, no other columns of an expert write what it wrote more closely on the text."
    model = build('gpt_oss')
    ids = torch.randint(3, 90, (40, 16), generator=torch.Generator().manual_seed(0))
    adapt(model)
    stats = measure(model, ids, {'gram'}, kinds=('heads', 'channels'), progress=False).channels
    site = layers(model)[1]
    x, routed = calls(model, ids)[1]
    shut = torch.arange(site.n) < 12
    before = site.by_input(site.weight.detach()).clone().double(), site.bias.detach().clone().double()
    repair_layer(model, site, shut, stats.grams[1], kind, 1e-9)
    after = site.by_input(site.weight.detach()).double(), site.bias.detach().double()
    for e in range(site.experts):
        there = routed.index == e
        rows, r = x[there].double(), routed.share[there].double()[:, None]
        kept, lost = rows[:, ~shut], rows[:, shut] @ before[0][e][shut]
        if kind == 'affine': kept = torch.cat([kept, torch.ones(len(kept), 1)], 1)
        best = torch.linalg.lstsq(r*kept, r*lost, driver='gelsd').solution
        change = after[0][e][~shut] - before[0][e][~shut]
        if kind == 'affine': change = torch.cat([change, (after[1] - before[1])[e][None]])
        off = (r*(kept @ change - lost)).norm()
        assert off <= 1.02*(r*(kept @ best - lost)).norm() + 1e-3*(r*lost).norm()
        assert off < .9*(r*lost).norm() or len(rows) < site.n


@pytest.mark.parametrize('name', ['mixtral', 'gpt_oss'])
def test_repair_lowers_the_damage(name):
    model = build(name)
    plain = logits(model, CALIB)
    damage = {}
    for repair in ('none', 'affine'):
        plan = prune(model, params=.9, batches=CALIB, repair=repair, criterion='flap', rounds=1, progress=False)
        assert plan.channels.removed
        damage[repair] = float((logits(model, CALIB) - plain).square().mean())
        unprune(model)
    assert damage['affine'] < damage['none']


def test_an_expert_that_sees_nothing_is_left_as_it_is():
    model = build('mixtral')
    sd = state(model)
    with torch.no_grad():                                   # the router of layer 0 never chooses expert 3
        model.model.layers[0].mlp.gate.weight.zero_()
        model.model.layers[0].mlp.gate.weight[:3, 0] = 1.
    plan = prune(model, params=.9, batches=CALIB, criterion='random', rounds=1, progress=False)
    moments = measure(model, CALIB, {'gram'}, kinds=('heads', 'channels'), progress=False).channels.grams[0]
    unseen = (moments['rows'] == 0).nonzero().flatten().tolist()
    assert unseen and plan.info['unseen_experts']['0'] == unseen
    name = 'model.layers.0.mlp.experts.down_proj'
    for e in unseen: assert torch.equal(state(model)[name][e], sd[name][e])
    assert not torch.equal(state(model)[name], sd[name])


@pytest.mark.parametrize('name', ['mixtral', 'gpt_oss', 'granitemoe', 'minimax'])
def test_without_any_channel_biases_are_left(name):
    model = adapt(build(name))
    set_gates(model, 0., 'channels')
    want = logits(model)
    compact(model)
    close(logits(model), want)
    site = model.sentinel.now.channels[0]
    h, index, share = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    built = model.sentinel.built.channels[0]
    got = site.mlp(h, index, share)
    assert torch.equal(got, routed_bias(site.mlp, h, index, share)) and bool(got.any()) == (built.bias is not None)


@pytest.mark.parametrize('name', NAMES)
def test_flops_are_those_of_the_experts_a_token_meets(name):
    model = build(name)
    total = sum(p.numel() for p in model.parameters())
    idle, held = idle_params(model), sum(s.params() for s in layers(model))
    assert idle == held/2 and idle < total
    least = min(s.n for s in sites(model).heads)
    plan = prune(model, flops=.9, batches=CALIB, rounds=1, context=16, min_heads=least, repair='none', progress=False)
    heads, channels = model.sentinel.built.heads, model.sentinel.built.channels
    whole = 2*(total - idle) + sum(4*s.head_dim*s.n_heads*16 for s in heads)
    saved = sum(s.cost('flops')*(s.n - len(plan.channels.kept(s.layer))) for s in channels)
    assert plan.removed == 0 and .1*whole <= saved + 1e-6 < .1*whole + max(s.cost('flops') for s in channels) + 1e-6


def test_trained_behind_gradient_checkpoints():
    model = set_gates(adapt(build('mixtral')), {(0, 1): 0., (1, 4): .5}, 'channels').train()
    grads = []
    for how in (False, True):
        if how: model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))
    assert not grads[0][-1].isnan().any() and (gate_values(model, kind='channels')[0, 1] == 0)


def test_pruned_and_restored_under_a_sharp_budget():
    model = build('gpt_oss')
    sd, want = state(model), logits(model)
    prune(model, params=.7, batches=CALIB, rounds=2, progress=False)
    compact(model)
    unprune(model)
    assert torch.equal(logits(model), want) and same_state({k: v for k, v in state(model).items() if '.sentinel.' not in k}, sd)


def test_a_folder_saved_before_experts_had_gates(tmp_path):
    from safetensors.torch import load_file, save_file
    model = set_gates(adapt(build('mixtral')), {(0, 1): 0.})
    want = logits(model)
    model.save_pretrained(tmp_path, checksum=False)
    file = tmp_path/'model.safetensors'
    tensors = load_file(file)
    gates = [key for key in tensors if '.experts.sentinel.' in key]
    assert len(gates) == 2
    save_file({k: v for k, v in tensors.items() if k not in gates}, file, dict(format='pt'))
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(logits(back), want)
    assert bool((gate_values(back, kind='channels') == 1).all())
    save_file({k: v for k, v in tensors.items() if k != gates[0]}, file, dict(format='pt'))
    with pytest.raises(ValueError, match='do not fit each other'): AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_training_goes_on(tmp_path):
    from sentinel_ai import load_checkpoint, save_checkpoint
    model = build('gpt_oss')
    prune(model, params=.85, batches=CALIB, rounds=1, progress=False)
    compact(model)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    opt.step()
    want = logits(model)
    save_checkpoint(tmp_path/'x.pt', model, opt, {}, 1, 2)
    other = adapt(build('gpt_oss'))
    twin = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-3)
    load_checkpoint(tmp_path/'x.pt', other, twin)
    assert torch.equal(logits(other), want) and len(twin.state) == len(opt.state)
    unprune(other, twin)


def test_adapters_on_experts_are_never_silently_ungated():
    peft = pytest.importorskip('peft')
    model = set_gates(adapt(build('mixtral')), {(0, 1): 0.}, 'channels')
    want = logits(model)
    config = peft.LoraConfig(r=2, target_modules=['q_proj', 'o_proj'], init_lora_weights=True)
    close(logits(peft.get_peft_model(copy.deepcopy(model), config)), want)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=['mlp.experts.down_proj'])
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(RuntimeError, match='held by an adapter'): logits(wrapped)
    wrapped.unload()


@pytest.mark.parametrize('name', ['nemotron_h', 'qwen2_moe'])
def test_other_shapes_are_read_too(name):
    "Experts without a gate projection, and those beside a shared expert, as modules by themselves."
    path, module = next(iter(routed_experts(fresh(name)).items()))
    site = read_experts(path, module)
    assert site.proj.keys() == ({'up'} if name == 'nemotron_h' else {'gate', 'up'})
    h, index = torch.randn(7, 32), torch.tensor([[0, 1], [2, 3], [1, 3], [0, 3], [2, 0], [1, 2], [3, 1]])
    share = torch.rand(7, 2)
    want, opened = module(h, index, share), Opened(site, lambda x, routed: x)
    close(module(h, index, share), want)
    opened.remove()
    with torch.no_grad(): site.columns(site.weight)[::2] = 0.
    want, keep = module(h, index, share), list(range(1, site.n, 2))
    for n, (dim, _, idx) in site.places(keep).items():
        p = module.get_parameter(n)
        p.data = p.data.index_select(dim, idx)
    site.rewire(keep)
    close(module(h, index, share), want)

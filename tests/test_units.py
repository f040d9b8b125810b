"""Channels and whole sublayers have the identities that heads have, on the architecture matrix.

`pytest tests/test_units.py -k llama` runs one architecture.
"""
import copy
import json
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from sentinel_ai import (GateConfig, UnsupportedArchitecture, adapt, compact, expand, gate_values, merge_gates, prune, set_gates, unadapt,
                         unmerge_gates, unprune)
from sentinel_ai.budget import closed_share, gate_penalty, harden_gates
from sentinel_ai.channels import sites
from sentinel_ai.mlp_archs import MLPS, register_mlp
from sentinel_ai.plan import HeadPlan
from sentinel_ai.surgery import reattach
from sentinel_ai.room import replay
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import ALL, IDS, LISTED_ALL, SEED, build, greedy, logits, spread  # noqa: E402
from test_surgery import attributes, close, n_params, padded, same_state, state, uneven  # noqa: E402

torch.set_num_threads(1)
EXPERTS = ['gpt_oss', 'granitemoe', 'minimax', 'mixtral', 'olmoe', 'phimoe', 'qwen3_moe']       # every MLP is a set of routed experts
WITH = ALL


def some_closed(found, seed=0, empty=None):
    "Gates of channels, about a third of them closed; `empty` names a layer (first or last) that loses all."
    t = found.table()
    shut = torch.rand(t.shape, generator=torch.Generator().manual_seed(seed)) < .35
    if empty is not None: shut[[s.layer for s in found][empty]] = True
    return torch.where(t.isnan(), t, torch.where(shut, 0., 1.))


def masked(name, seed=0, empty=None, dtype=torch.float32, heads=False):
    model = adapt(build(name, dtype))
    set_gates(model, some_closed(model.sentinel.now.channels, seed, empty), 'channels')
    return set_gates(model, uneven(model, seed)) if heads else model


def zero_columns(model, table):
    "What closing channels means, on the plain model."
    with torch.no_grad():
        for s in sites(model).channels:
            s.columns(s.weight)[table[s.layer, :s.n] == 0] = 0.
    return model


@pytest.mark.parametrize('name', WITH)
def test_closed_channels_equal_zeroed_columns(name):
    plain, model = build(name), masked(name)
    table = gate_values(model, kind='channels')
    want = logits(zero_columns(copy.deepcopy(plain), table))
    assert torch.equal(logits(model), want) and not torch.equal(want, logits(plain))
    cls, sd = type(plain), state(plain)
    unadapt(model)
    assert type(model) is cls and same_state(state(model), sd) and not hasattr(model, 'sentinel')


@pytest.mark.parametrize('name', ['mixtral', 'gpt_oss'])
def test_where_no_channels_can_be_read_heads_go_on_working(name):
    kind = type(next(m for m in build(name).modules() if 'Experts' in type(m).__name__)).__name__
    register_mlp(kind, lambda m: None)
    try: model = adapt(build(name))
    finally: del MLPS[kind]
    assert model.sentinel.now.channels is None
    with pytest.raises(UnsupportedArchitecture): set_gates(model, 0., 'channels')
    with pytest.raises(UnsupportedArchitecture): adapt(model, GateConfig('learned', kinds='channels'))
    set_gates(model, {(next(iter(model.sentinel.now.heads)).layer, 0): 0.})
    assert compact(model).removed == 1


@pytest.mark.parametrize('name,how,seed,empty', spread(WITH, [('uneven', 0, None), ('first-layer-empty', 1, 0)]))
def test_compact_equals_masked_and_back(name, how, seed, empty):
    model = masked(name, seed, empty)
    ids, kw = padded()
    want, tokens, sd, before = logits(model), greedy(model, ids, **kw), state(model), attributes(model)
    cost, n = {s.layer: s.cost() for s in model.sentinel.now.channels}, n_params(model)
    stays = any(s.stay for s in model.sentinel.now.channels)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plan = compact(model).channels
    close(logits(model), want)
    assert torch.equal(greedy(model, ids, **kw), tokens)
    gone = sum(cost[l]*(e - k) for l, (e, k) in enumerate(zip(plan.built, plan.counts)) if l in cost)
    left = n - n_params(model) - plan.removed            # a gate is pruned with each channel
    assert left == gone or stays and left > gone
    assert expand(model) is model and same_state(state(model), sd) and attributes(model) == before
    assert torch.equal(logits(model), want) and not model.sentinel.compact


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'bloom', 'phi3', 'opt', 'falcon', 'gptj', 'moshi', 'deepseek_v3', 'ctrl', 'mixtral', 'gpt_oss'])
def test_heads_and_channels_together(name, tmp_path):
    "Both kinds closed and cut, saved, read, copied, pickled, and back."
    model = masked(name, 3, heads=True)
    want, sd = logits(model), state(model)
    plan = compact(model)
    small = logits(model)
    close(small, want)
    assert HeadPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), small)
        assert same_state(state(expand(twin)), sd)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    for p in back.parameters(): p.data = p.data.clone()        # where a tensor lies in memory can change a rounding
    assert torch.equal(logits(back), small) and back.sentinel.plan == plan
    assert same_state(state(expand(back)), sd)
    with torch.device('meta'): empty = replay(type(model).__mro__[2](copy.deepcopy(model.config)), plan)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    first = (plan.channels.exists & ~plan.channels.keep).nonzero()[0].tolist()
    reattach(model, [first], kind='channels')
    assert torch.equal(logits(model), small) or close(logits(model), small) is None
    assert model.sentinel.plan.channels.keep[tuple(first)] and gate_values(model, kind='channels').eq(0).sum() == 1
    assert same_state(state(expand(model)), sd)


@pytest.mark.parametrize('name', LISTED_ALL + EXPERTS)
def test_bfloat16(name):
    model = masked(name, 3, dtype=torch.bfloat16)
    want, sd = logits(model), state(model)
    compact(model)
    close(logits(model), want, 2e-2)
    assert same_state(state(expand(model)), sd)


@pytest.mark.parametrize('name', SEED + ['phi3', 'moshi', 'gptj', 'mixtral', 'gpt_oss'])
def test_optimizer_moments_are_cut_and_restored(name):
    model = masked(name, 1)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    opt.step()
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in opt.state.items()}
    compact(model, optimizer=opt)
    assert all(s['exp_avg'].shape == p.shape for p, s in opt.state.items())
    expand(model, optimizer=opt)
    assert all(torch.equal(v, moments[p][k]) for p, s in opt.state.items() for k, v in s.items())


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'phi3', 'mixtral', 'gpt_oss'])
def test_compiles_and_exports(name):
    model = masked(name, 1)
    compact(model)
    torch._dynamo.reset()
    with torch.no_grad(): got = torch.compile(model, backend='eager', fullgraph=True, dynamic=False)(IDS, use_cache=False).logits
    close(got, logits(model))
    program = torch.export.export(model, (IDS,), dict(use_cache=False), strict=False)
    close(program.module()(IDS, use_cache=False).logits, logits(model, use_cache=False))


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'phi3', 'opt', 'mixtral', 'gpt_oss', 'qwen3_moe'])
def test_plain_checkpoints_hold_channels(name, tmp_path):
    from sentinel_ai.export import export_hf
    model = set_gates(masked(name, 1), {(0, c): 0. for c in range(12)}, 'channels')
    with pytest.raises(ValueError, match='a config needs the same number in every layer.*pad=True'): export_hf(model, tmp_path/'no')
    done = export_hf(model, tmp_path/'padded', pad=True)
    counts = [int((g > 0).sum()) for g in gate_values(model, kind='channels')]
    most = max(counts) + (-max(counts) % 4 if name in EXPERTS else 0)         # rows of 16 bytes
    assert done.channels == {layer: (n, most) for layer, n in enumerate(counts)} and not (tmp_path/'no').exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'padded')
    assert not hasattr(plain, 'sentinel')
    close(logits(plain), logits(model))
    compact(model)
    export_hf(model, tmp_path/'compact', pad=True)
    assert (tmp_path/'compact/model.safetensors').read_bytes() == (tmp_path/'padded/model.safetensors').read_bytes()


@pytest.mark.parametrize('empty', [None, 0, -1])
def test_gguf_files_hold_channels_of_llama(empty, tmp_path):
    pytest.importorskip('gguf')
    from sentinel_ai.export import export_gguf, gguf_logits
    model = masked('llama', 1, empty, heads=True)
    counts = [int((g > 0).sum()) for g in gate_values(model, kind='channels')]
    done = export_gguf(model, tmp_path/'x.gguf', False, 'f32')
    assert done.channels == {layer: (n, n or 32) for layer, n in enumerate(counts)}
    close(gguf_logits(tmp_path/'x.gguf', IDS[0]), logits(model)[0])
    held = (tmp_path/'x.gguf').read_bytes()
    compact(model)
    export_gguf(model, tmp_path/'x.gguf', False, 'f32')
    assert (tmp_path/'x.gguf').read_bytes() == held


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'bloom', 'phi3', 'opt', 'mixtral', 'gpt_oss'])
def test_merge_and_back(name):
    model = adapt(build(name))
    table = some_closed(model.sentinel.now.channels)
    table[0, 1] = .37
    want = logits(set_gates(model, table, 'channels'))
    weights = [s.weight.clone() for s in model.sentinel.now.channels]
    torch.testing.assert_close(logits(merge_gates(model)), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match='unmerge_gates'): set_gates(model, 1., 'channels')
    unmerge_gates(model)
    assert all(torch.equal(s.weight, w) for s, w in zip(model.sentinel.now.channels, weights))
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize('mode', ['learned', 'hard_concrete'])
@pytest.mark.parametrize('name', ['gpt2', 'llama', 'phi3', 'mixtral', 'gpt_oss'])
def test_channel_gates_learn_under_a_budget(name, mode):
    torch.manual_seed(0)
    config = GateConfig(mode, sparsity=.4, unit='params', kinds=('heads', 'channels'), multiple=4, log_alpha=0.)
    model = adapt(build(name), config).train()
    (model(IDS, labels=IDS).loss + gate_penalty(model)).backward()
    for s in model.sentinel.now:
        p = s.module.sentinel.log_alpha if mode == 'hard_concrete' else s.module.sentinel.gate
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()
    harden_gates(model)
    closed = (gate_values(model, kind='channels') == 0).sum(1)
    for kind in ('heads', 'channels'): set_gates(model, gate_values(model, kind=kind).ceil(), kind)
    assert model.sentinel.config.mode == 'static' and .3 < closed_share(model, 'params', ('heads', 'channels')) < .5
    assert (closed % 4 == 0).all()


@pytest.mark.parametrize('name', SEED + ['phi3', 'mixtral', 'gpt_oss'])
def test_open_gates_have_no_hook(name):
    "A layer whose gates are all 1 costs nothing; a gate that is set, by hand or in a compiled model, is in force."
    model = build(name)
    before = [len(x._forward_pre_hooks) for x in model.modules()]
    adapt(model)
    hooks = [len(x._forward_pre_hooks) for x in model.modules() if type(x).__name__ != 'Sentinel']
    assert sum(hooks) == sum(before) + 1
    open_ = logits(model)
    with torch.no_grad(): model.blocks[0]['mlp'].gate[3] = 0.
    assert not torch.equal(logits(model), open_)
    with torch.no_grad(): model.blocks[0]['mlp'].gate[3] = 1.
    assert torch.equal(logits(model), open_)
    logits(model)
    assert sum(len(x._forward_pre_hooks) for x in model.modules()) == sum(hooks)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True, dynamic=False)
    run = lambda: compiled(IDS, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(run(), open_)
        set_gates(model, {(0, 3): 0.}, 'channels')
        shut = run()
        assert not torch.equal(shut, open_) and torch.equal(shut, logits(model, use_cache=False))
        model.blocks[1]['attn'].gate[0] = 0.
        assert torch.equal(run(), logits(model, use_cache=False)) and not torch.equal(run(), shut)


CALIB = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', SEED + ['phi3', 'mistral', 'gemma2', 'falcon', 'gptj', 'deepseek_v3', 'opt-post-norm', *EXPERTS, 'jamba'])
def test_prune_under_a_budget_and_back(name, tmp_path):
    "Both kinds under one budget of parameters: met, compact equals masked, saved and read, and back bit for bit."
    model = build(name)
    cls, sd, plain = type(model), state(model), logits(model)
    size = n_params(model)
    least = size - sum(s.cost()*s.n for s in sites(model).channels) - sites(model).heads.head_params()
    budget = (least/size + 1)/2
    plan = prune(model, params=budget, batches=CALIB, rounds=2, progress=False)
    assert plan.removed + plan.channels.removed > 0 and plan.info['unit'] == 'params'
    want = logits(model)
    compact(model)
    close(logits(model), want, 1e-4)
    left = sum(p.numel() for n, p in model.named_parameters() if '.sentinel.' not in n)
    assert left <= budget*size + 1e-6 and left > (budget - .1)*size
    small = logits(model)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    for p in back.parameters(): p.data = p.data.clone()        # where a tensor lies in memory can change a rounding
    assert torch.equal(logits(back), small)
    for m in (model, back):
        unadapt(unprune(m))
        assert type(m) is cls and torch.equal(logits(m), plain) and same_state(state(m), sd)


@pytest.mark.parametrize('criterion', ['joint', 'fisher', 'repaired', 'flap', 'wanda', 'taylor', 'magnitude', 'random'])
@pytest.mark.parametrize('name', ['llama', 'gpt_oss'])
def test_every_criterion_chooses_both_kinds(name, criterion):
    model = build(name)
    sd = state(model)
    plan = prune(model, params=.9, batches=CALIB, rounds=1, criterion=criterion, progress=False)
    assert plan.removed or plan.channels.removed
    unadapt(unprune(model))
    assert same_state(state(model), sd)


@pytest.mark.parametrize('repair', ['none', 'linear', 'affine'])
@pytest.mark.parametrize('name', ['gpt2', 'llama', 'opt', 'mixtral', 'gpt_oss', 'jamba'])
def test_repair_of_channels_helps(name, repair):
    model = build(name)
    plain = logits(model, CALIB)
    error = lambda how: (prune(model, params=.85, batches=CALIB, criterion='random', repair=how, rounds=1, progress=False),
                         (logits(model, CALIB) - plain).square().mean(), unprune(model))[1]
    assert error(repair) <= error('none')


@pytest.mark.parametrize('bad, match', [
    (dict(params=.9, kinds=('wings',)), 'kinds='), (dict(amount=.3, kinds=('heads', 'channels')), 'amount=0.3'),
    (dict(params=.9, multiple=0), 'multiple=0'), (dict(params=.9, min_channels=99), 'min_channels=99'),
    (dict(params=.9, protect_channels=[(0, 99)]), 'layer 0 channel 99'), (dict(params=.01), 'without any head and channel'),
    (dict(params=.9, criterion='auto'), 'auto')])
def test_bad_arguments_change_nothing(bad, match):
    model = build('llama')
    sd = state(model)
    with pytest.raises(ValueError, match=match): prune(model, **(dict(batches=CALIB) | bad), progress=False)
    assert type(model).__name__ == 'LlamaForCausalLM' and same_state(state(model), sd)


def test_multiples_and_protection_hold():
    model = build('llama', seed=2)
    plan = prune(model, params=.85, batches=CALIB, rounds=2, multiple=8, min_channels=16, min_heads=1, protect_channels=[(0, 5)], progress=False)
    assert all(n % 8 == 0 and n >= 16 for n in plan.channels.counts) and plan.channels.keep[0, 5] and min(plan.heads()) >= 1


@pytest.mark.parametrize('kind', ['heads', 'channels'])
@pytest.mark.parametrize('name', ['gpt2', 'llama', 'opt', 'phi3', 'mixtral', 'gpt_oss'])
def test_a_sublayer_that_is_pruned_altogether(name, kind, tmp_path):
    "Nothing of it runs, another stands in for it, saved and read it is the same, and all of it comes back."
    model = build(name)
    sd, plain = state(model), logits(model)
    site = [s for s in sites(model) if s.kind == kind][1]
    worth = lambda stats: torch.ones(stats.shape).index_fill(0, torch.tensor([site.layer]), 1e-6 if (stats.shape[1] > 8) == (kind == 'channels') else 1.)
    cost = site.cost()*site.n if kind == 'channels' else sites(model).heads.head_params()/len(sites(model).heads)
    prune(model, params=int(n_params(model) - cost), batches=CALIB, criterion=worth, repair='linear', rounds=1, progress=False)
    plan = HeadPlan.from_gates(model)
    assert plan.of_kind(kind).counts[site.layer] == 0
    want = logits(model)
    compact(model)
    close(logits(model), want)
    bridges = model.sentinel.repairs.bridges
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    for p in back.parameters(): p.data = p.data.clone()        # where a tensor lies in memory can change a rounding
    assert torch.equal(logits(back), logits(model)) and back.sentinel.repairs.bridges.keys() == bridges.keys()
    for m in (model, back):
        unadapt(unprune(m))
        assert torch.equal(logits(m), plain) and same_state(state(m), sd)

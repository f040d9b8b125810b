"""Channels are restored as heads are: as themselves bit for bit, or made anew without a jump, on the architecture matrix.

`pytest tests/test_regrow_channels.py -k llama` runs one architecture.
"""
import copy
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from sentinel_ai import HeadMemory, adapt, compact, gate_values, prune, regrow, set_gates, unadapt, unprune
from sentinel_ai.heads import UnsupportedArchitecture
from sentinel_ai.memory import UnitMemory, read_channels
from sentinel_ai.plan import HeadPlan
from sentinel_ai.regrow import Regrowth, observe, out_names
from sentinel_ai.regrow_channels import CHANNEL_INITS, CHANNEL_STRATEGIES
from sentinel_ai.stash import full_param

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import CHANNELS, build, greedy, logits, spread  # noqa: E402
from test_surgery import same_state, state  # noqa: E402
from test_units import n_params  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:.*only columns of the output projection')
NAMED = ['gpt2', 'llama', 'phi3', 'opt', 'bloom', 'moshi', 'mixtral', 'gpt_oss']
WITH = CHANNELS
HOW = [('compact', True, [(1.,), (.5, 1.)]), ('masked', False, [(.5, 1.)]), ('at once', False, [(1.,)])]
CALIB = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(0))


def near(a, b, tol=1e-4):
    scale = b.float().abs().max()
    assert (a.float() - b.float()).abs().max() <= tol*scale, f'off by {(a.float()-b.float()).abs().max()/scale:.1e}'


def half(name, memory=True, removed=True, share=.5, seed=None, optimizer=None, **kw):
    "A model with channels (and heads) pruned and repaired in two rounds: half of what may be pruned. A copy of it where nothing else is asked for."
    is_usual = memory is True and share == .5 and seed is None and optimizer is None and not kw
    if is_usual: return copy.deepcopy(halved(name, removed))
    model = build(name) if seed is None else build(name, seed=seed)
    adapt(model)
    if memory: UnitMemory(**(memory if isinstance(memory, dict) else {})).attach(model)
    return shrink(model, removed, share, optimizer, **kw)


@functools.lru_cache(8)
def halved(name, removed):
    model = adapt(build(name))
    UnitMemory().attach(model)
    return shrink(model, removed)


def shrink(model, removed=True, share=.5, optimizer=None, **kw):
    now, size = model.sentinel.now, n_params(model)
    can = sum(s.cost()*s.n for s in now.channels) + now.heads.head_params()
    budget = int(sum(p.numel() for n, p in model.named_parameters() if '.sentinel.' not in n) - share*can)
    assert size > budget
    prune(model, params=budget, batches=CALIB, criterion='random', rounds=2, optimizer=optimizer, progress=False, **kw)
    if removed: compact(model, optimizer=optimizer)
    return model


def gone(model):
    plan = HeadPlan.from_gates(model).channels
    return (plan.exists & ~plan.keep)


@pytest.mark.parametrize('name,how,removed,rounds', spread(WITH, HOW))
def test_prune_then_regrow_is_exact(name, how, removed, rounds):
    "All at once or in two portions, heads first or last; bit for bit, the second time too."
    model = build(name)
    cls, sd, plain = type(model), state(model), logits(model)
    adapt(model)
    memory = UnitMemory().attach(model)
    for portions in rounds:
        shrink(model, removed)
        lost = gone(model)
        assert lost.any() and sum(len(memory.remembered(l)) for l in range(len(lost))) >= int(lost.sum())
        if len(portions) == 1: regrow(model, 1.)
        for portion in portions:
            regrow(model, int(round(portion*int(lost.sum()))), strategy='random', kind='channels')
        if len(portions) == 2: regrow(model, 1.)
        assert not model.sentinel.repairs.channels and not model.sentinel.repairs.bridges and not model.sentinel.repairs.changed
        assert not model.sentinel.compact and all((gate_values(model, kind=k).nan_to_num(1.) == 1).all() for k in ('heads', 'channels'))
        assert torch.equal(logits(model), plain)
    unadapt(unprune(model))
    assert type(model) is cls and torch.equal(logits(model), plain) and same_state(state(model), sd)


@pytest.mark.parametrize('init', CHANNEL_INITS)
@pytest.mark.parametrize('name', NAMED)
def test_the_start_changes_nothing(name, init):
    "With a warm-up every way of filling starts where the model was, and the model still generates with its cache."
    model = half(name)
    was = logits(model)
    n = min(6, int(gone(model).sum()))
    way = regrow(model, n, strategy='random', init=init, warmup=4, seed=3, kind='channels')
    assert len(way) == n > 0 and not way.done
    near(logits(model), was)
    way.step()
    again = Regrowth.load(model, way.state_dict())
    json.dumps(way.state_dict()['meta'])
    while again.step():
        if init in ('split', 'zero'): near(logits(model), was)
    assert again.done and not any(x.any() for x in again.stopped.values())
    assert greedy(model).shape[1] > 4 and logits(model).isfinite().all()
    if init in ('split', 'zero'): near(logits(model), was)


@pytest.mark.parametrize('removed', [True, False], ids=['compact', 'masked'])
@pytest.mark.parametrize('init', ['split', 'zero'])
@pytest.mark.parametrize('name', NAMED)
def test_split_and_zero_keep_the_function(name, init, removed):
    model = half(name, removed=removed)
    was = logits(model)
    way = regrow(model, .1, strategy='balanced', init=init, seed=1, kind='channels')
    assert len(way) and way.done
    near(logits(model), was)
    near(logits(unprune(model)), logits(model))


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'phi3', 'opt', 'mixtral', 'gpt_oss'])
def test_what_others_took_over_is_taken_back(name):
    "In double precision: when all of a layer but one channel are restored, what is left of repair is that channel's, to the log's bfloat16."
    model = build(name, torch.float64)
    model.config._experts_implementation = 'eager'            # the grouped kernel takes no doubles
    first = state(model)
    shrink(adapt(model))
    repairs, lost = model.sentinel.repairs, gone(model)
    layer = max(repairs.channels, key=lambda l: len(repairs.channels[l]))
    site = model.sentinel.built.channels[layer]
    weight = out_names(model, site)[0]
    assert not repairs.bridges and len(repairs.channels[layer]) == 2

    def change():
        delta = full_param(model, weight) - first[weight]
        return site.by_input(delta)
    total, ids = change().norm(), lost[layer].nonzero().flatten().tolist()
    for i in torch.randperm(len(ids) - 1, generator=torch.Generator().manual_seed(0)).split(5):
        regrow(model, [(layer, ids[j]) for j in i.tolist()], kind='channels')
    record, = repairs.channels[layer]
    assert record['units'].tolist() == ids[-1:]
    want = record['T'].double() @ record['W'].double()
    assert (change() - want).norm() < 1e-2*total
    regrow(model, [(layer, ids[-1])], kind='channels')
    assert torch.equal(full_param(model, weight), first[weight]) and layer not in repairs.channels


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'opt'])
def test_with_an_optimizer_and_training(name):
    "With training in between a channel is restored as it was pruned, with its moments."
    model = adapt(build(name)).train()
    memory = UnitMemory().attach(model)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=.1)

    def train(n):
        for _ in range(n):
            model(CALIB, labels=CALIB).loss.backward()
            opt.step()
            opt.zero_grad()
    train(2)
    shrink(model, optimizer=opt)
    lost = gone(model)
    train(2)
    was = logits(model.eval())
    way = regrow(model, 1., optimizer=opt, warmup=3, kind='channels')
    near(logits(model), was)
    for layer, ids in way.channels.items():
        values, moments = read_channels(model.sentinel.now.channels[layer], ids, opt)
        for key, rows, places in memory.find_channels(layer, ids):
            rec = memory[key].take(rows)
            assert rec.same({k: v[places] for k, v in values.items()})
            assert rec.states() and all(torch.equal(v, moments[k][places]) for k, v in rec.states().items())
    while way.step(): train(1)
    assert not model.sentinel.repairs.channels and len(way) == int(lost.sum())


@pytest.mark.parametrize('folder', [False, True], ids=['ram', 'files'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_released_and_remembered(dtype, folder, tmp_path):
    "The memory alone restores what surgery no longer holds; saved and read it is the same."
    model = build('llama')
    sd = state(model)
    memory = UnitMemory(tmp_path/'records' if folder else None, dtype).attach(adapt(model))
    shrink(model)
    assert len(memory.batches()) <= 2*len(model.sentinel.built.channels)
    memory.save(tmp_path/'memory.safetensors')
    back = HeadMemory.load(tmp_path/'memory.safetensors', tmp_path/'again' if folder else None).attach(model)
    assert set(back.records) == set(memory.records)
    back.release(model)
    with pytest.raises(RuntimeError): unprune(model)
    regrow(model, 1.)
    regrow(model, 1., kind='channels')
    unadapt(unprune(model))
    tol = dict(float32=1e-2, bfloat16=2e-2, int8=3e-2)[dtype]
    for k, v in state(model).items(): near(v, sd[k], tol) if v.any() else None


def test_a_channel_is_in_one_record():
    "Pruned, restored and pruned again: the newest record counts, and older ones don't pile up."
    model = half('llama')
    memory = model.sentinel.memory
    for _ in range(3):
        regrow(model, 1.)
        regrow(model, 1., kind='channels')
        shrink(model)
        for l in range(len(model.sentinel.built.channels)):
            ids = memory.remembered(l)
            assert len(ids) == len(ids.unique())
    assert all(gone(model)[l, i] or i in memory.remembered(l) for l, i in gone(model).nonzero().tolist())


@pytest.mark.parametrize('strategy', CHANNEL_STRATEGIES)
@pytest.mark.parametrize('name', NAMED)
def test_multiples(name, strategy):
    model = half(name, multiple=4)
    way = regrow(model, .2, CALIB, strategy=strategy, kind='channels', multiple=4)
    assert len(way) and all(n % 4 == 0 for n in HeadPlan.from_gates(model).channels.counts)


@pytest.mark.parametrize('name', NAMED)
def test_observe_leaves_no_trace(name):
    model = half(name)
    was, sd = logits(model), state(model)
    stats = observe(model, CALIB, ('gradient',), kinds=('heads', 'channels'))
    lost = gone(model)
    assert stats.channels.shape == tuple(lost.shape) and stats.channels['grad'][lost].abs().sum() > 0
    assert torch.equal(logits(model), was) and same_state(state(model), sd)


def test_a_table_and_a_function_choose():
    model = half('llama')
    lost = gone(model)
    wishes = torch.arange(lost.numel()).view(lost.shape).float()
    way = regrow(model, 3, strategy=wishes, kind='channels')
    want = lost.nonzero().tolist()[-3:]
    assert [[l, int(c)] for l, ids in way.channels.items() for c in ids] == want
    regrow(model, 3, CALIB, strategy=lambda stats: -stats['grad'].abs(), kind='channels')


def test_a_norm_over_all_channels_refuses_a_copy():
    for name in WITH:
        model = adapt(build(name))
        site = next(iter(model.sentinel.now.channels))
        if not site.stay: continue
        set_gates(model, {(site.layer, 0): 0.}, 'channels')
        was = logits(model)
        with pytest.raises(UnsupportedArchitecture, match='made of all channels'): regrow(model, [(site.layer, 0)], init='split', kind='channels')
        regrow(model, [(site.layer, 0)], init='zero', kind='channels')
        near(logits(model), was)


@pytest.mark.parametrize('kind', ['heads', 'channels'])
@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_a_sublayer_that_was_pruned_altogether(name, kind):
    "What stood in for it is taken off with the units, in portions; at the end all is bit for bit."
    model = build(name)
    sd, plain = state(model), logits(model)
    site = [s for s in adapt(model).sentinel.now if s.kind == kind][1]
    worth = lambda stats: torch.ones(stats.shape).index_fill(0, torch.tensor([site.layer]), 1e-6 if (stats.shape[1] > 8) == (kind == 'channels') else 1.)
    cost = site.cost()*site.n if kind == 'channels' else model.sentinel.now.heads.head_params()/len(model.sentinel.now.heads)
    size = sum(p.numel() for n, p in model.named_parameters() if '.sentinel.' not in n)
    prune(model, params=int(size - cost), batches=CALIB, criterion=worth, repair='linear', rounds=1, progress=False)
    assert HeadPlan.from_gates(model).of_kind(kind).counts[site.layer] == 0
    was = logits(compact(model) and model)
    way = regrow(model, 2, strategy='random', kind=kind, warmup=2)
    near(logits(model), was)
    while way.step(): pass
    regrow(model, 1., kind=kind)
    regrow(model, 1., kind='heads' if kind == 'channels' else 'channels')
    assert not model.sentinel.repairs.bridges
    unadapt(unprune(model))
    assert torch.equal(logits(model), plain) and same_state(state(model), sd)

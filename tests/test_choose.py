"""Choices under a budget, against a naive greedy that computes every price from its definition.

`pytest tests/test_choose.py -k budget` runs what concerns budgets.
"""
import copy
import importlib
import math
from dataclasses import replace

import pytest
import torch

from sentinel_ai.agency import Agency
from sentinel_ai.budget import harden_gates
from sentinel_ai.choose import Units, choose_units, choose_units_evenly, closed_cost, reachable_cost
from sentinel_ai.gates import adapt, gate_values, set_gates
from sentinel_ai.sentinel import GateConfig
from sentinel_ai.measure import HeadStats
from sentinel_ai.policy import settle, toy_plan
from sentinel_ai.regrow import regrow, wish
from sentinel_ai.regrow_channels import highest
from sentinel_ai.testing import random_model

torch.set_num_threads(1)
SEEDS = range(8)


def price(s): return .5*float(s.square().sum())


def random_table(g, shape, share): return torch.rand(shape, generator=g) < share


def make_heads(g, n, layers, heads, groups, **kwargs):
    exists = torch.ones(layers, heads, dtype=torch.bool)
    exists[-1, heads - 1] = heads == groups or heads//groups < 2     # one layer may lack a head
    group = (torch.arange(heads)//(heads//groups)).expand(layers, heads)
    vectors = torch.randn(n, layers, heads, generator=g, dtype=torch.float64)*2
    vectors[:, ~exists] = torch.nan
    return Units('heads', exists, random_table(g, exists.shape, .1) & exists, [5. + layer for layer in range(layers)],
                 vectors=vectors, group=group, group_cost=3., **kwargs)


def make_channels(g, n, layers, channels, **kwargs):
    exists = torch.ones(layers, channels, dtype=torch.bool)
    mix = torch.randn(n, 3, generator=g, dtype=torch.float64) @ torch.randn(3, layers*channels, generator=g, dtype=torch.float64)
    noise = torch.randn(n, layers*channels, generator=g, dtype=torch.float64)
    return Units('channels', exists, random_table(g, exists.shape, .1), [1.]*layers,
                 vectors=(mix + noise).view(n, layers, channels)/2, **kwargs)


def saved(kinds, closed): return sum(closed_cost(replace(u, closed=c)) for u, c in zip(kinds, closed))


def naive(kinds, goal, nearest=False):
    "One unit at a time, the least price by definition for what it saves by definition."
    closed = [u.closed.clone() for u in kinds]
    s = torch.zeros(len(kinds[0].vectors), dtype=torch.float64)
    while saved(kinds, closed) < goal - 1e-6:
        best = None
        for k, u in enumerate(kinds):
            for layer, unit in (u.exists & ~closed[k] & ~u.protect).nonzero().tolist():
                left = int((u.exists & ~closed[k])[layer].sum())
                if left - 1 < int(u.least[layer]): continue
                after = [c.clone() for c in closed]
                after[k][layer, unit] = True
                saves = saved(kinds, after) - saved(kinds, closed)
                value = (price(s + u.vectors[:, layer, unit]) - price(s))/saves
                if best is None or value < best[0] - 1e-12: best = value, k, layer, unit, saves
        if best is None: break
        _, k, layer, unit, saves = best
        if nearest and saved(kinds, closed) + saves/2 > goal: break
        closed[k][layer, unit] = True
        s = s + kinds[k].vectors[:, layer, unit]
    return closed


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('which', ['heads', 'channels', 'both'])
@pytest.mark.parametrize('shortlist', [1, 512])
def test_it_is_the_naive_greedy(seed, which, shortlist):
    "With a look after each unit, and with all units on the list."
    g = torch.Generator().manual_seed(seed)
    kinds = dict(heads=make_heads(g, 7, 3, 4, 2, least=seed % 2), channels=make_channels(g, 7, 3, 10, least=seed % 3))
    kinds = [u for name, u in kinds.items() if which in (name, 'both')]
    kinds = [replace(u, protect=random_table(g, u.exists.shape, .1)) for u in kinds]
    start, most = saved(kinds, [u.closed for u in kinds]), reachable_cost(kinds)
    for share in (.2, .5, .8):
        goal = start + share*(most - start)
        for got, want in zip(choose_units(kinds, goal, shortlist=shortlist), naive(kinds, goal)): assert torch.equal(got, want)


@pytest.mark.parametrize('seed', SEEDS)
def test_heads_are_counted_to_the_nearest(seed):
    g = torch.Generator().manual_seed(seed)
    u = replace(make_heads(g, 7, 3, 4, 2), cost=[1.]*3, group_cost=0.)
    for goal in range(int(u.closed.sum()), int(u.exists.sum()) + 1):
        got, = choose_units([u], goal, nearest=True)
        assert torch.equal(got, naive([u], goal, nearest=True)[0]) and got.sum() == goal and not (got & ~u.exists).any()
    got, = choose_units([u], 5.4, nearest=True)
    assert got.sum() == max(5, int(u.closed.sum()))


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('multiple, shortlist', [(1, 512), (1, 16), (4, 1), (4, 32), (16, 512), (7, 20)])
def test_budget_multiples_protection_and_least_hold(seed, multiple, shortlist):
    g = torch.Generator().manual_seed(100 + seed)
    channels = make_channels(g, 9, 3, 40, multiple=multiple, least=seed)
    heads = make_heads(g, 9, 3, 4, 2, least=1)
    kinds = [replace(u, protect=random_table(g, u.exists.shape, .04*(seed % 3))) for u in (heads, channels)]
    start, most = saved(kinds, [u.closed for u in kinds]), reachable_cost(kinds)
    for share in (.1, .45, .9, 1.):
        goal = start + share*(most - start)
        closed = choose_units(kinds, goal, shortlist=shortlist)
        assert goal - 1e-6 <= saved(kinds, closed) < goal + max(5. + 2 + 3, multiple)
        for u, c in zip(kinds, closed):
            assert not (u.closed & ~c).any() and not (c & ~u.exists).any()
            assert not (c & u.protect & ~u.closed).any()
            open_now, open_before = (u.exists & ~c).sum(1), (u.exists & ~u.closed).sum(1)
            assert (open_now >= torch.minimum(u.least, open_before)).all()
            assert ((open_now % u.multiple == 0) | (open_now == open_before)).all()
        assert all(torch.equal(a, b) for a, b in zip(closed, choose_units(kinds, goal, shortlist=shortlist))), 'the same twice'
    with pytest.raises(ValueError, match='up to'): choose_units(kinds, most + 10)


@pytest.mark.parametrize('seed', SEEDS)
def test_whole_groups_close_together(seed):
    g = torch.Generator().manual_seed(seed)
    u = replace(make_heads(g, 7, 3, 6, 3, least=2), cost=[0.]*3, group_cost=8., whole=True)
    start, most = closed_cost(u), reachable_cost([u])
    for share in (.3, .6, 1.):
        goal = start + share*(most - start)
        closed, = choose_units([u], goal)
        assert goal <= closed_cost(replace(u, closed=closed)) < goal + 8
        new = closed & ~u.closed
        for layer, unit in new.nonzero().tolist():
            same = u.exists[layer] & (u.group[layer] == u.group[layer, unit])
            assert closed[layer, same].all()
        assert ((u.exists & ~closed).sum(1) >= torch.minimum(u.least, (u.exists & ~u.closed).sum(1))).all()


def test_a_group_that_goes_saves_its_kv_head():
    "Two cheap heads of one group are taken before two cheaper ones of two groups when the group's cost decides."
    exists = torch.ones(1, 4, dtype=torch.bool)
    u = Units('heads', exists, ~exists, [1.], worth=torch.tensor([[1., 1.5, 1.2, 5.]]), group=torch.tensor([[0, 0, 1, 1]]), group_cost=9.)
    assert choose_units([u], 11)[0].tolist() == [[True, True, False, False]]
    assert choose_units([replace(u, group_cost=0.)], 2)[0].tolist() == [[True, False, True, False]]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_short_types_choose_what_long_ones_do(dtype):
    g = torch.Generator().manual_seed(0)
    u = make_channels(g, 16, 2, 32)
    short = replace(u, vectors=u.vectors.to(dtype))
    wide = replace(u, vectors=u.vectors.to(dtype).double())
    assert torch.equal(choose_units([short], 30)[0], choose_units([wide], 30)[0])


@pytest.mark.parametrize('multiple', [1, 4, 8])
@pytest.mark.parametrize('share', [0., .3, .5, 1.])
def test_evenly_keeps_as_many_in_every_layer(multiple, share):
    u = make_channels(torch.Generator().manual_seed(1), 9, 3, 40, multiple=multiple, least=8)
    u = replace(u, closed=~u.exists)
    kept = (~choose_units_evenly(u, share)).sum(1)
    assert (kept == kept[0]).all() and kept[0] % multiple == 0 and kept[0] == max(8, round(40*(1 - share)/multiple)*multiple)


def test_a_large_kind_is_close_to_exact_prices():
    "With a shortlist the set's price is close to that of the exact greedy."
    g = torch.Generator().manual_seed(3)
    u = make_channels(g, 40, 6, 800)
    total = lambda closed: price(u.vectors[:, closed & ~u.closed].sum(1))
    exact, quick = (total(choose_units([u], 2000, shortlist=size)[0]) for size in (10**6, 1024))
    alone = total(choose_units([replace(u, vectors=None, worth=u.vectors.square().sum(0))], 2000)[0])
    assert quick < 3*exact < .1*alone, (quick, exact, alone)


@pytest.mark.parametrize('multiple', [16, 64])
def test_multiples_cost_little(multiple):
    "Giving back and closing in multiples ends near the price of the choice that is free of them."
    u = make_channels(torch.Generator().manual_seed(4), 60, 6, 256)
    u = replace(u, closed=~u.exists)
    total = lambda closed: price(u.vectors[:, closed].sum(1))
    free, even = (total(choose_units([replace(u, multiple=m)], 768)[0]) for m in (1, multiple))
    alone = total(choose_units([replace(u, vectors=None, worth=u.vectors.square().sum(0))], 768)[0])
    assert even < 2*free + .1*alone


@pytest.mark.parametrize('change, match', [
    (dict(multiple=0), 'multiple=0'), (dict(vectors=None), 'without vectors and worth'), (dict(least=-1), 'least'),
    (dict(closed=torch.zeros(2, 9, dtype=torch.bool)), r'closed of shape \(2, 9\)'), (dict(vectors=torch.zeros(5, 2, 9)), 'vectors of shape')])
def test_bad_units_are_named(change, match):
    u = make_channels(torch.Generator().manual_seed(1), 5, 2, 8)
    with pytest.raises(ValueError, match=match): replace(u, **change)


def test_bad_goals_and_prices_are_named():
    u = make_channels(torch.Generator().manual_seed(1), 5, 2, 8)
    with pytest.raises(ValueError, match='goal=-1'): choose_units([u], -1)
    with pytest.raises(ValueError, match='up to 16'): choose_units([u], 17)
    with pytest.raises(ValueError, match='finite'): choose_units([replace(u, vectors=None, worth=torch.full((2, 8), torch.nan))], 4)
    with pytest.raises(ValueError, match='windows'): choose_units([u, replace(u, vectors=u.vectors[:3])], 4)
    assert torch.equal(choose_units([u], 0)[0], u.closed)


# What the modules that decide and restore pick, ties included: eighths as scores are exact, and many of them are equal.
HEADS = (6, 6, 4, 1, 5)


def eighths(g, shape): return torch.randint(0, 9, shape, generator=g)/8


def random_plan(g, share):
    keep = random_table(g, (len(HEADS), max(HEADS)), 1 - share)
    return toy_plan(HEADS, [(l, h) for l, n in enumerate(HEADS) for h in range(n) if not keep[l, h]])


def pairs(table): return [tuple(x) for x in table.nonzero().tolist()]


def naive_settle(scores, plan, share, min_heads, protect, hysteresis, exchange):
    "The kept heads by definition, None where the share can't be met; of equals the first goes or returns."
    exists, was = pairs(plan.exists), set(pairs(plan.keep))
    s = {x: -math.inf if scores[x].isnan() else float(scores[x]) + (hysteresis if x in was else -hysteresis) for x in exists}
    least = {l: min(min_heads, n) for l, n in enumerate(plan.built)}
    if share is None:
        first = {x for l in least for x in sorted((x for x in exists if x[0] == l), key=lambda x: -s[x])[:least[l]]}
        return {x for x in exists if s[x] > .5 or x in first and s[x] > -math.inf or x in protect and x in was}
    kept = set(was)

    def worst(among):
        enough = {l for l in least if sum(x[0] == l for x in kept) > least[l]}
        return min((x for x in exists if x in kept & among and x[0] in enough and x not in protect), key=s.get, default=None)

    def best(among): return max((x for x in exists if x in among - kept and s[x] > -math.inf), key=s.get, default=None)

    goal = len(exists) - round(share*len(exists))
    while len(kept) != goal:
        x = worst(kept) if len(kept) > goal else best(set(exists))
        if x is None: return None
        kept ^= {x}
    for _ in range(round(exchange*(len(exists) - goal))):
        better, worse = best(set(exists) - was), worst(was)
        if better is None or worse is None or s[better] <= s[worse]: break
        kept ^= {better, worse}
    return kept


@pytest.mark.parametrize('seed', range(40))
def test_settle_is_the_naive_rule(seed):
    g = torch.Generator().manual_seed(seed)
    plan = random_plan(g, (.1, .3, .6)[seed % 3])
    scores = eighths(g, plan.keep.shape)
    unknown = plan.exists & ~plan.keep & random_table(g, scores.shape, .2)
    scores = torch.where(unknown | ~plan.exists, math.nan, scores)
    protect = pairs(plan.exists & random_table(g, scores.shape, .1))
    for share in (None, 0., .2, .4, .6, .9):
        for min_heads, hysteresis, exchange in ((0, .125, 1.), (1, 0., .3), (2, .25, 0.)):
            rules = share, min_heads, protect, hysteresis, exchange
            want = naive_settle(scores, plan, *rules)
            if want is None:
                with pytest.raises(ValueError, match='up to|closed or more'): settle(scores, plan, *rules)
            else: assert set(pairs(settle(scores, plan, *rules).keep)) == want


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('is_measured', [False, True])
def test_balanced_wishes_take_turns(seed, is_measured):
    "In each layer the pruned heads by gradient, of equals the first; each is wished for by the share kept before it."
    g = torch.Generator().manual_seed(seed)
    plan = random_plan(g, .5)
    grad = eighths(g, plan.keep.shape) - .5
    stats = HeadStats(dict(grad=grad)) if is_measured else None
    got = wish(stats, plan, 'balanced')
    for l, n in enumerate(HEADS):
        kept = int(plan.keep[l].sum())
        order = sorted((h for h in range(n) if not plan.keep[l, h]), key=lambda h: -abs(float(grad[l, h])) if is_measured else 0)
        for rank, h in enumerate(order): assert got[l, h] == -torch.tensor(kept + rank)/n


@pytest.mark.parametrize('withdrawn', [False, True])
def test_regrow_restores_the_highest_wishes_in_order(withdrawn):
    "Of equals the first; what doesn't consent isn't asked."
    table = torch.tensor([[.5, 2., -5., 2.], [.5, 3., .5, -1.]])
    order = [(1, 1), (0, 1), (0, 3), (0, 0), (1, 0), (1, 2), (0, 2)]            # (1, 3) is open
    if withdrawn: order.remove((0, 3))
    for n in range(len(order) + 1):
        model = adapt(random_model('llama'))
        set_gates(model, {x: 0. for x in [*order, (0, 3)]})
        if withdrawn:
            agency = Agency()
            agency.attach(model)
            agency.withdraw((0, 3), 'test')
        got = regrow(model, n, strategy=table, init='zero').heads
        assert got == (order[:n] if n < len(order) else sorted(order))          # without a choice in the order of the model


def naive_highest(wishes, closed, kept, n, multiple):
    "The best portion that fits, one after the other; of equal ones that of the first layer."
    chosen, free = set(), {l: sorted((u for u in range(closed.shape[1]) if closed[l, u]), key=lambda u: -wishes[l, u])
                           for l in range(len(closed))}
    while True:
        portions = {l: us[:-(int(kept[l]) + sum(x[0] == l for x in chosen)) % multiple or multiple] for l, us in free.items()}
        fits = [l for l, us in portions.items() if us and len(us) <= n]
        if not fits: return chosen
        best = max(fits, key=lambda l: sum(wishes[l, u] for u in portions[l])/len(portions[l]))
        n -= len(portions[best])
        chosen |= {(best, u) for u in portions[best]}
        free[best] = free[best][len(portions[best]):]


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('multiple', [1, 2, 4, 16])
def test_channels_with_the_highest_wishes_are_restored(seed, multiple):
    g = torch.Generator().manual_seed(seed)
    exists = torch.ones(3, 24, dtype=torch.bool)
    exists[2, 17:] = False
    closed = exists & random_table(g, exists.shape, .6)
    wishes, kept = eighths(g, exists.shape), (exists & ~closed).sum(1)
    wishes[exists & random_table(g, exists.shape, .1)] = math.nan
    seen = wishes.nan_to_num(-1e30).tolist()
    table = {(l, u): seen[l][u] for l in range(3) for u in range(24)}
    for n in (0, 1, 5, 14, 30, 100):
        got = highest(wishes, closed, kept, n, multiple)
        assert set(pairs(got)) == naive_highest(table, closed, kept, n, multiple)


HOMES = dict(
    ranks='strongest rank_in_layer Selection blocks highest',
    costs='unit_cost total_cost closing_saves saved_cost Units closed_cost units_of by_group',
    choose_units='choose_units choose_units_evenly reachable_cost',
    choose='lowest head_items choose choose_evenly')


@pytest.mark.parametrize('home,name', [(home, name) for home, names in HOMES.items() for name in names.split()])
def test_each_name_has_one_home_and_is_found_in_choose(home, name):
    module, choose = (importlib.import_module(f'sentinel_ai.{m}') for m in (home, 'choose'))
    assert name in choose.__all__ and name in module.__all__
    assert getattr(choose, name) is getattr(module, name)
    assert getattr(module, name).__module__ == f'sentinel_ai.{home}'


@pytest.mark.parametrize('name', ['gpt2', 'bloom', 'llama'])
def test_every_share_can_be_met_to_the_nearest_unit(name):
    "A head that takes its keys and values along is a large step: half of it may be missing."
    model = adapt(random_model(name), GateConfig('hard_concrete', kinds=('heads', 'channels'), sparsity=.1, unit='params'))
    with torch.no_grad():
        for site in model.sentinel.now.channels: site.module.sentinel.log_alpha += 1.       # so that heads come first
    for share in torch.linspace(.02, .9, 45).tolist():
        twin = copy.deepcopy(model)
        harden_gates(twin, share)
        assert (gate_values(twin) == 0).any() or share < .05

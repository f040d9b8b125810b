"""Choices under a budget, against a naive greedy that computes every price from its definition.

`pytest tests/test_choose.py -k budget` runs what concerns budgets.
"""
from dataclasses import replace

import pytest
import torch

from sentinel_ai.choose import Units, choose_units, choose_units_evenly, closed_cost, reachable_cost

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

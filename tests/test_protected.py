"""Units that refuse to be pruned, and averages over those who hold a unit."""
import copy
import json

import pytest
import torch
from sentinel_ai import (Agency, ConsentError, adapt, close_heads, compact, elastic, gate_values, load_adaptive_model, prune,
                         random_model, set_gates, unprune)
from sentinel_ai.averaging import average, share_of, take, unit_places
from sentinel_ai.elastic import NEVER
from sentinel_ai.measure import measure
from sentinel_ai.plasticity import Plasticity
from sentinel_ai.protected import protect_text
from sentinel_ai.surgery import HeadPlan, expand
from test_matrix import EXPERTS, SAYS_LAYOUT, VARIANTS

torch.set_num_threads(1)
BLOCKS = torch.randint(3, 96, (16, 16), generator=torch.Generator().manual_seed(0))
OTHER = torch.arange(8*16).view(8, 16).remainder(40) + 3
NAMES = ['gpt2', 'llama', 'bloom', 'falcon-new', *(['mixtral'] if SAYS_LAYOUT and 'mixtral' in EXPERTS else [])]


def made(name):
    kind, more = VARIANTS.get(name, (name, {}))
    return random_model(kind, **more)


def attached(name, policy='strict'):
    agency = Agency(policy)
    agency.attach(model := made(name))
    return model, agency


def kept(model, found):
    plan = HeadPlan.from_gates(model)
    return all(bool(plan.of_kind(kind).keep[table].all()) for kind, table in found.items())


@pytest.mark.parametrize('name', NAMES)
def test_pruning_keeps_what_a_text_needs(name, tmp_path):
    plain, (model, agency) = made(name), attached(name)
    plan = prune(plain, params=.75, batches=BLOCKS, rounds=2, progress=False)
    found = {}                                                          # a third of what would be pruned
    for kind in ('heads', 'channels'):
        gone = (plan.of_kind(kind).exists & ~plan.of_kind(kind).keep).nonzero()
        table = torch.zeros_like(plan.of_kind(kind).keep)
        for l, u in gone[::3].tolist(): table[l, u] = True
        if table.any(): found[kind] = table
        agency.protect(table, 'a reason', kind)
    assert found
    prune(model, params=.75, batches=BLOCKS, rounds=2, progress=False)
    assert kept(model, found)
    compact(model, check=False)                                         # the numbers are those of the model as built
    prune(model, params=.72, batches=BLOCKS, rounds=1, progress=False)
    assert kept(model, found)
    model.save_pretrained(tmp_path)
    again = load_adaptive_model(str(tmp_path))
    there = again.sentinel.agency
    assert all(torch.equal(there.protected[kind], table) for kind, table in found.items())
    for kind, table in found.items(): there.release(table, 'no longer needed', kind)
    assert not there.protected
    prune(again, params=.65, batches=BLOCKS, rounds=1, progress=False)
    assert not kept(again, found)


def test_a_text_protects_what_it_needs_most_also_in_a_family_of_sizes():
    model, agency = attached('llama')
    found = protect_text(agency, OTHER, .3)
    score = measure(model, OTHER, 'joint', kinds=('heads', 'channels'), progress=False)
    for kind, table in found.items():
        worth = score.of_kind(kind)['repaired']
        assert int(table.sum()) == round(.3*table.numel()) and worth[table].min() >= worth[~table].max()
    family = elastic(model, BLOCKS, .8, rounds=1, progress=False)
    for kind, table in found.items():
        places = family.places.tables[kind]
        assert (places[table] == NEVER).all() and (places != NEVER).any()


def test_heads_that_are_named():
    for policy in ('strict', 'record'):
        model, agency = attached('llama', policy)
        agency.protect((0, 1), 'a reason')
        before = copy.deepcopy(model.state_dict())
        if policy == 'strict':
            with pytest.raises(ConsentError, match='layer 0 head 1'): close_heads(model, [(0, 0), (0, 1)], BLOCKS)
            assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
        else:
            close_heads(model, [(0, 0), (0, 1)], BLOCKS)
            assert gate_values(model)[0].tolist() == [0., 1., 1., 1.]
        assert [e['kind'] for e in agency.events] == ['protection', 'violation']
        agency.release((0, 1), 'no longer')
        close_heads(model, [(0, 1)], BLOCKS)
        assert gate_values(model)[0, 1] == 0


class Closing:
    "A controller that wants some heads closed."
    needs = ('gradient', 'use')

    def __init__(self, heads): self.heads = heads

    def decide(self, stats, plan, step):
        keep = plan.keep.clone()
        for head in self.heads: keep[head] = False
        return plan.with_kind('heads', keep)


@pytest.mark.parametrize('policy', ['strict', 'record'])
def test_a_controller_is_answered(policy):
    model, agency = attached('llama', policy)
    agency.protect((0, 1), 'a reason')
    cycle = Plasticity(Closing([(0, 0), (0, 1)]), BLOCKS, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if policy == 'strict':
        with pytest.raises(ConsentError, match='controller asked to close layer 0 head 1'): cycle.step(model, optimizer, 1)
        assert (gate_values(model) == 1).all()
        return
    cycle.step(model, optimizer, 1)
    assert gate_values(model)[0].tolist() == [0., 1., 1., 1.]


def test_a_failed_edit_protects_nothing():
    model, agency = attached('llama')
    with pytest.raises(ValueError): protect_text(agency, BLOCKS + 50)
    assert not agency.protected and not agency.events
    with pytest.raises(ValueError, match='share'): protect_text(agency, BLOCKS, 1.5)


def test_what_protects_everything_leaves_nothing_to_prune():
    model, agency = attached('llama')
    for kind in ('heads', 'channels'): agency.protect(model.sentinel.plan.of_kind(kind).exists, 'all of it', kind)
    with pytest.raises(ValueError, match='protected'): prune(model, params=.8, batches=BLOCKS, progress=False)


def test_old_agencies_are_read_and_new_ones_say_so():
    model, agency = attached('llama')
    assert agency.to_dict()['version'] == 1
    agency.protect((0, 1), 'a reason')
    saved = json.loads(json.dumps(agency.to_dict()))
    assert saved['version'] == 2 and torch.equal(Agency.from_dict(saved).protected['heads'], agency.protected['heads'])
    for wrong in (dict(experts={}), dict(heads=3), dict(heads=dict(counts=[4, 4], units=[[9], []])), dict(heads=dict(counts=[4, 4], units=[[1]]))):
        with pytest.raises(ValueError): Agency.from_dict(saved | dict(protected=wrong))
    twin = copy.deepcopy(model).sentinel.agency
    twin.release((0, 1), 'in the copy')
    assert agency.protected and not twin.protected


@pytest.mark.parametrize('name', NAMES)
def test_averages_go_by_units(name):
    "The mean of a pruned model and of a whole one: masked or compact, each entry is of those who hold it."
    models = [set_gates(adapt(made(name)), {(0, 1): 0.}), set_gates(adapt(made(name)), {(1, c): 0. for c in range(5)}, 'channels')]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in models:
            for p in m.parameters():
                if p.requires_grad: p.add_(.1*torch.randn(p.shape, generator=generator))
    compacted = [copy.deepcopy(m) for m in models]
    for m in compacted: compact(m, check=False)
    mean, same = average(map(share_of, models), [1, 3]), average(map(share_of, compacted), [1, 3])
    for key, t in mean.tensors.items():
        mask = mean.held.get(key, torch.tensor(True)).expand_as(t)
        assert torch.equal(t[mask], same.tensors[key][mask]), key
    places = unit_places(models[0])
    for key, p in models[1].named_parameters():
        if key not in mean.tensors or '.sentinel.' in key: continue
        theirs = dict(models[0].named_parameters())[key]
        want = (theirs + 3*p)/4
        if key in places:
            place = places[key]
            gone = [i for i in range(place.size) if i not in set(place.held.tolist())]
            index = (slice(None),)*place.dim + (gone,)
            want = want.detach().clone()
            want[index] = p.detach()[index]                            # only the second one holds it
        if key in unit_places(models[1]):
            place = unit_places(models[1])[key]
            gone = [i for i in range(place.size) if i not in set(place.held.tolist())]
            index = (slice(None),)*place.dim + (gone,)
            want[index] = theirs.detach()[index]
        torch.testing.assert_close(mean.tensors[key], want.detach(), rtol=1e-5, atol=1e-6)
    cut = copy.deepcopy(compacted[0].sentinel.stash)
    take(compacted[0], same)
    for key, record in compacted[0].sentinel.stash.items():            # what was cut out is what it was
        for (i, part), (j, was) in zip(record['parts'], cut[key]['parts']): assert torch.equal(i, j) and torch.equal(part, was)
    take(models[0], mean)
    ids = BLOCKS[:2]
    with torch.no_grad(): torch.testing.assert_close(models[0](ids).logits, compacted[0](ids).logits, rtol=1e-3, atol=1e-4)
    expand(compacted[0])


def test_a_layer_without_heads_has_no_vote():
    models = [adapt(made('llama')) for _ in range(2)]
    set_gates(models[0], {(0, h): 0. for h in range(4)})
    compact(models[0], check=False)
    mean = average(map(share_of, models))
    weight = models[1].model.layers[0].self_attn.q_proj.weight
    assert torch.equal(mean.tensors['model.layers.0.self_attn.q_proj.weight'], weight)
    take(models[0], mean)
    assert unprune(models[0]) is not None

"""Clients that keep their texts: sums that add, and the plan and the weights that all texts in one place would have given."""
import copy

import pytest
import torch
from sentinel_ai import adapt, elastic, prune, random_model
from sentinel_ai import own_text
from sentinel_ai.batches import token_batches
from sentinel_ai.channels import sites
from sentinel_ai.federated import Clients, Sent, client_stats, combine, combined_stats
from sentinel_ai.measure import measure
from sentinel_ai.own_text import text_source
from sentinel_ai.request import PruneRequest
from test_matrix import EXPERTS, SAYS_LAYOUT, VARIANTS

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)
BLOCKS = torch.randint(3, 96, (24, 16), generator=GENERATOR)
PARTS = [BLOCKS[:4], BLOCKS[4:16], BLOCKS[16:]]                     # of unequal size
MASK = torch.ones(8, 16, dtype=torch.long)
MASK[2:5, 11:] = 0
PADDED = [PARTS[0], PARTS[1], dict(input_ids=PARTS[2], attention_mask=MASK)]
NAMES = ['gpt2', 'opt', 'bloom', 'gpt_neox', 'llama', 'phi3', 'falcon-new', 'gemma2', *(['mixtral'] if SAYS_LAYOUT and 'mixtral' in EXPERTS else [])]


def made(name, **more):
    kind, given = VARIANTS.get(name, (name, {}))
    return random_model(kind, **given, **more)


def in_one_place(parts): return [batch for part in parts for batch in text_source(part).dicts()]


def both(name, parts, more={}, **options):
    "The same model pruned by clients, and with all texts in one place."
    models = [made(name, **more) for _ in range(2)]
    for m, given in zip(models, (Clients(parts), in_one_place(parts))): prune(m, batches=given, progress=False, **options)
    return models


def furthest(a, b): return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters()))


def check_alike(a, b, atol=1e-5):
    assert torch.equal(a.sentinel.plan.keep, b.sentinel.plan.keep)
    for site, other in zip(a.sentinel.now, b.sentinel.now):
        gates = [s.module.sentinel.gate for s in (site, other)]
        assert torch.equal(*gates) or torch.allclose(*gates)
    assert dict(a.named_parameters()).keys() == dict(b.named_parameters()).keys()
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, atol=atol, rtol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_clients_give_the_plan_and_the_weights_of_all_texts_in_one_place(name):
    a, b = both(name, PADDED, params=.8, rounds=2)
    assert any((site.module.sentinel.gate == 0).any() for site in a.sentinel.now)
    turned = made(name)                                 # random models with biases: float32 sums depend on the order of the batches
    prune(turned, params=.8, batches=in_one_place(PADDED)[::-1], rounds=2, progress=False)
    check_alike(a, b, atol=max(1e-5, 4*furthest(b, turned)))
    assert furthest(a, b) < 1e-4


@pytest.mark.parametrize('options', [dict(amount=.4, criterion='auto'), dict(amount=.4, criterion='entropy', rounds=1),
                                     dict(params=.8, criterion='wanda'), dict(params=.85, criterion='fisher', repair='linear'),
                                     dict(amount=.3, kinds='heads', criterion='obs', whole_groups=True)], ids=str)
def test_every_criterion_can_be_asked_of_clients(options):
    a, b = both('llama', PARTS, **options)
    check_alike(a, b)


def test_trials_are_the_same_on_blocks_of_all_clients(monkeypatch):
    text = torch.randint(3, 96, (68, 64), generator=torch.Generator().manual_seed(1))
    parts = [text[:20], text[20:28], text[28:]]
    slopes, settle = [], PruneRequest.settle_slope
    def noted(request, *args):
        changed = settle(request, *args)
        slopes.append(request.slope)
        return changed
    monkeypatch.setattr(PruneRequest, 'settle_slope', noted)
    both('llama', parts, dict(num_hidden_layers=8), params=.7, rounds=1, compensate=False)
    assert slopes[0] != 0 and slopes[0] == pytest.approx(slopes[1], rel=.1)         # of divergences of 1e-6 nats, in float32


def test_bridges_are_sums_too(monkeypatch):
    "A sublayer that loses all units."
    losses = iter(range(10_000, 0, -1))
    monkeypatch.setattr(own_text, 'text_loss', lambda m, batches: torch.tensor(float(next(losses))))        # each bridge is kept

    def worth(stats):
        is_channels = stats.shape[1] > 8
        is_first = (torch.arange(stats.shape[0]) == 1) & is_channels
        return torch.where(is_first[:, None], 1e-6, 1.).expand(stats.shape)
    m = made('llama')
    site = sites(m).channels[1]
    left = sites(m).heads.n_params - site.cost()*site.n
    a, b = both('llama', PARTS, params=int(left), criterion=worth, repair='linear', rounds=1)
    assert list(a.sentinel.repairs.bridges) == [('channels', 1)]
    check_alike(a, b)


def test_a_family_of_sizes_by_clients():
    a, b = made('llama'), made('llama')
    for m, given in ((a, Clients(PARTS)), (b, in_one_place(PARTS))): elastic(m, given, .8, rounds=2, progress=False)
    mine, theirs = a.sentinel.family, b.sentinel.family
    for kind, table in mine.places.tables.items(): assert torch.equal(table, theirs.places.tables[kind])
    for key, part in mine.factors.items(): torch.testing.assert_close(part.M, theirs.factors[key].M, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_what_is_sent_survives_a_file_and_is_all_that_is_needed(name, tmp_path):
    m = adapt(made(name))
    def sent(i, given=None):
        client_stats(m, PARTS[i], {'joint', 'gradient'}, given).save(tmp_path/f'{i}.safetensors')
        return Sent.load(tmp_path/f'{i}.safetensors')
    first = combine(sent(i) for i in range(3))
    second = combine(sent(i, first) for i in range(3))
    stats = combined_stats(m, first, second)
    want = measure(m, in_one_place(PARTS), ('joint', 'gradient'), kinds=('heads', 'channels'), progress=False)
    for kind in ('heads', 'channels'):
        mine, theirs = stats.of_kind(kind), want.of_kind(kind)
        assert mine.tables.keys() == theirs.tables.keys()
        for table in theirs.tables: torch.testing.assert_close(mine[table], theirs[table], rtol=1e-3, atol=1e-6, equal_nan=True)
        for layer, moments in theirs.grams.items(): torch.testing.assert_close(mine.grams[layer]['cov'], moments['cov'], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats.pairs, want.pairs, rtol=1e-3, atol=1e-8)


def test_a_file_of_sums_that_is_damaged_is_refused(tmp_path):
    path = tmp_path/'sent.safetensors'
    client_stats(made('llama'), PARTS[0], 'use').save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match='sent.safetensors'): Sent.load(path)


def test_a_refusal_changes_nothing():
    m = made('llama')
    before = copy.deepcopy(m.state_dict())
    for given, more, says in ((Clients(PARTS), dict(compensate=True), 'elsewhere'), (Clients([BLOCKS + 5]), {}, 'knows the tokens')):
        with pytest.raises(ValueError, match=says): prune(m, params=.8, batches=given, progress=False, **more)
    with pytest.raises(ValueError, match='one client or more'): Clients([])
    assert all(torch.equal(t, before[k]) for k, t in m.state_dict().items()) and not hasattr(m, 'sentinel')


def test_the_model_of_a_client_is_left_as_it_was():
    m = made('llama').train()
    was = {k: t.clone() for k, t in m.state_dict().items()}
    hooks = sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules())
    first = combine([client_stats(m, part) for part in PARTS])
    client_stats(m, PARTS[0], given=first)
    assert m.training and all(torch.equal(t, was[k]) for k, t in m.state_dict().items())
    assert hooks == sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules())


def test_time_can_be_a_budget_of_clients():
    clients = Clients(PARTS)
    m = made('llama')
    clients.check(m)
    assert clients.prompt(200).shape == (200,) and int(clients.prompt(200).max()) == 95
    assert clients.first_ids().shape == next(token_batches(PARTS[0], 4, 'cpu'))[0].shape

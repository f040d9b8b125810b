"""Heads come back: as themselves bit for bit, without a jump, for every architecture of the matrix.

`pytest tests/test_regrow.py -k llama` runs one architecture.
"""
import copy
import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import ALL, DEVICE, SEED, build, greedy, logits, spread  # noqa: E402

from sentinel_ai import compact, gate_values, prune, set_gates, unadapt, unprune  # noqa: E402
from sentinel_ai.gates import adapt  # noqa: E402
from sentinel_ai.heads import UnsupportedArchitecture  # noqa: E402
from sentinel_ai.memory import HeadMemory  # noqa: E402
from sentinel_ai.pruning import close_heads  # noqa: E402
from sentinel_ai.regrow import INITS, Regrowth, observe, regrow  # noqa: E402
from sentinel_ai.surgery import HeadPlan  # noqa: E402

torch.set_num_threads(1)
CALIB = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)
pytestmark = pytest.mark.filterwarnings('ignore:.*only columns of the output projection left', 'ignore:.*came back from memory alone')
# a norm or a mask is made of all heads, or queries and keys aren't held head by head: a head can't be copied alone
NO_SPLIT = {'olmo2', 'olmoe', 'bitnet', 'diffllama', 'doge'}


def near(a, b, tol=1e-4):
    scale = b.float().abs().max()
    assert (a.float() - b.float()).abs().max() <= tol*scale, f'off by {(a.float()-b.float()).abs().max()/scale:.1e}'


def same(model, sd):
    now = model.state_dict()
    return all(torch.equal(now[k].cpu(), v.cpu()) for k, v in sd.items())


@functools.lru_cache(8)
def halved(name, removed):
    model = build(name)
    HeadMemory().attach(adapt(model))
    prune(model, .4, CALIB, rounds=2, progress=False)
    if removed: compact(model)
    return model


def half(name, removed=True):
    "A model with some heads gone and repaired, remembered: a copy, with a memory of its own."
    return copy.deepcopy(halved(name, removed))


@pytest.mark.parametrize('name', ALL)
def test_prune_then_regrow_is_exact(name):
    "In two portions, compact or masked; the memory attached changes nothing."
    model = build(name)
    sd, plain = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    memory = HeadMemory().attach(adapt(model))
    assert torch.equal(logits(model), plain)
    plan = prune(model, .4, CALIB, rounds=2, progress=False)
    gone = [tuple(x) for x in (plan.exists & ~plan.keep).nonzero().tolist()]
    assert set(memory) == set(gone)
    compact(model)
    first = regrow(model, gone[:1])
    assert first.done and HeadPlan.from_gates(model).removed == len(gone) - 1
    regrow(model, 1.)
    assert bool((gate_values(model)[~gate_values(model).isnan()] == 1).all())
    near(logits(model), plain)
    assert torch.equal(logits(model), plain) and same(model, sd), 'bit for bit'
    unadapt(unprune(model))
    assert torch.equal(logits(model), plain) and same(model, sd)


@pytest.mark.parametrize('name,init', spread(ALL, INITS))
def test_the_start_changes_nothing(name, init):
    "With a warm-up every way of filling a head starts where the model was, and the model still generates with its cache."
    if name in NO_SPLIT and init == 'split':
        with pytest.raises(UnsupportedArchitecture, match='norm or a mask'): regrow(half(name), 2, strategy='random', init=init, warmup=4)
        return
    model = half(name)
    was = logits(model)
    way = regrow(model, 2, strategy='random', init=init, warmup=4, seed=3)
    assert len(way.heads) == 2 and not way.done
    near(logits(model), was)
    while way.step(): pass
    assert way.done and not way.stopped
    assert greedy(model).shape[1] > 4
    now = logits(model)
    assert not torch.isnan(now).any()
    if init == 'zero': near(now, was)


@pytest.mark.parametrize('name', ['gpt2', 'opt', 'gpt_neox', 'llama', 'qwen2', 'gemma2', 'gpt_oss', 'falcon-new', 'phi3', 'codegen'])
def test_split_keeps_the_function(name):
    for removed in (False, True):
        model = half(name, removed)
        was = logits(model)
        regrow(model, 2, strategy='random', init='split', seed=1)
        near(logits(model), was)


@pytest.mark.parametrize('name', ['bloom', 'mpt'])
def test_slopes_differ(name):
    "ALiBi gives each head a slope of its own: a copy isn't its donor, so it can only be led in."
    with pytest.raises(ValueError, match='slope of its own'): regrow(half(name), 2, strategy='random', init='split')


@pytest.mark.parametrize('name', ALL)
def test_observe_leaves_no_trace(name):
    model = half(name)
    was, sd, parts = logits(model), {k: v.clone() for k, v in model.state_dict().items()}, {n: list(r) for n, r in model.sentinel.stash.items()}
    stats = observe(model, CALIB, ('gradient',))
    closed = model.sentinel.plan.exists & ~model.sentinel.plan.keep
    assert stats['grad'][closed].abs().sum() > 0 and stats.shape == tuple(closed.shape)
    assert torch.equal(logits(model), was) and same(model, sd) and {n: list(r) for n, r in model.sentinel.stash.items()} == parts


def train(model, n, opt=None, lr=1e-3):
    opt = opt or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=.1)
    for _ in range(n):
        loss = model(CALIB, labels=CALIB).loss
        loss.backward(); opt.step(); opt.zero_grad()
    return opt


@pytest.mark.parametrize('removed', [False, True], ids=['masked', 'compact'])
@pytest.mark.parametrize('name', SEED)
def test_after_training(name, removed):
    "With training in between the head comes back as it left, the others give back what they took over, and the loss starts where it was."
    model = build(name).train()
    memory = HeadMemory().attach(adapt(model))
    opt = train(model, 2)
    prune(model, .4, CALIB, rounds=1, optimizer=opt, progress=False)
    gone = [tuple(x) for x in (gate_values(model) == 0).nonzero().tolist()]
    model.eval(); full = logits(model); model.train()
    if removed: compact(model, optimizer=opt)
    train(model, 3, opt)
    model.eval()
    was = logits(model)
    way = regrow(model, gone, optimizer=opt, warmup=3)
    near(logits(model), was)
    while way.step(): train(model.train(), 1, opt)
    assert not model.eval().sentinel.repairs.predictors and logits(model).shape == full.shape
    site = model.sentinel.now.heads[gone[0][0]]
    assert memory[gone[0]].states() and site.n_heads


def test_shares_add_up():
    "Whatever the order in which heads return, what is left of repair is what repair of the remaining heads alone would have left."
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]
    for order in orders:
        model = build('gpt2', torch.float64)
        plain = logits(model)
        plan = prune(model, 4, CALIB, rounds=4, progress=False)
        gone = [tuple(x) for x in (plan.exists & ~plan.keep).nonzero().tolist()]
        for i in order[:-1]: regrow(model, [gone[i]])
        model.sentinel.repairs.changed.clear()                                # no snapshot: only arithmetic can bring it back
        regrow(model, [gone[order[-1]]])
        near(logits(model), plain, 1e-5)


def test_a_ramp_stops_for_heads_that_are_closed_again():
    model = half('llama', removed=False)
    way = regrow(model, 2, strategy='random', warmup=4)
    way.step()
    close_heads(model, [way.heads[0]], CALIB)
    while way.step(): pass
    g = gate_values(model)
    assert g[way.heads[0]] == 0 and g[way.heads[1]] == 1 and way.stopped == [way.heads[0]]


def test_lossy_memory_is_never_taken_for_the_exact_head(tmp_path):
    model = build('llama')
    sd = {k: v.clone() for k, v in model.state_dict().items()}
    HeadMemory(tmp_path, 'int8').attach(adapt(model))
    prune(model, .4, CALIB, progress=False)
    compact(model)
    regrow(model, 1.)
    assert same(model, sd)


def test_released_weights_come_back_from_memory():
    model = build('gpt2')
    plain = logits(model)
    memory = HeadMemory().attach(adapt(model))
    prune(model, 3, CALIB, rounds=1, repair='none', progress=False)
    compact(model)
    assert memory.release(model) > 0
    regrow(model, 1.)
    near(logits(model), plain, 1e-6)


def test_state_goes_on():
    model = half('opt')
    way = regrow(model, 2, strategy='random', warmup=5)
    way.step()
    again = Regrowth.load(model, way.state_dict())
    while again.step(): pass
    assert again.done and not again.stopped


def test_bad_input_changes_nothing():
    model = half('llama')
    sd = {k: v.clone() for k, v in model.state_dict().items()}
    for kw, what in ((dict(amount=99), 'amount=99'), (dict(amount=.2, init='memry'), 'memry'), (dict(amount=.2, warmup=-1), 'warmup=-1'),
                     (dict(amount=.2, strategy='best', batches=CALIB), 'best'), (dict(amount=.2, alpha=2), 'alpha=2'), (dict(amount=.2, gate=0), 'gate=0'),
                     (dict(amount=1), 'needs batches')):
        with pytest.raises(ValueError, match=what): regrow(model, **kw)
    with pytest.raises(TypeError, match='adapt'): regrow(build('llama'), 1)
    assert same(model, sd)


def test_chosen_heads_are_closed_and_repaired():
    model = build('llama')
    plain = logits(model)
    with pytest.raises(ValueError, match='layer 5 head 0'): close_heads(adapt(model), [(5, 0)], CALIB)
    close_heads(model, [(0, 1), (1, 2)], CALIB)
    repaired = (logits(model) - plain).square().mean()
    with pytest.raises(ValueError, match='open'): close_heads(model, [(0, 1)], CALIB)
    unprune(model)
    assert torch.equal(logits(model), plain)
    set_gates(model, {(0, 1): 0., (1, 2): 0.})
    assert repaired < (logits(model) - plain).square().mean()


@pytest.mark.parametrize('name', ALL)
def test_fresh_parts_change_nothing_and_all_are_saved(name, tmp_path):
    "Skips, agency and memory on a model: bit for bit the plain one; at work, saved and read again with it."
    from transformers import AutoModelForCausalLM
    from sentinel_ai.agency import Agency, HeadState
    from sentinel_ai.unet import add_skips, remove_skips, set_skip_gates
    model = build(name)
    plain, sd = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    agency = Agency().attach(model) and model.sentinel.agency
    memory = HeadMemory().attach(add_skips(model, rank=4))
    assert torch.equal(logits(model), plain), 'attached parts change nothing'
    prune(model, .3, CALIB, rounds=1, progress=False)
    layer = next(iter(model.sentinel.now.heads)).layer
    n_heads = model.sentinel.now.heads[layer].n_heads
    head = next(h for h in range(n_heads) if gate_values(model)[layer, h] > 0 or h == n_heads - 1)
    agency.set_state([(layer, head)], HeadState.OVERLOADED, 'test')
    compact(model)
    if len(model.sentinel_skips.paths): set_skip_gates(model, .3)
    want = logits(model)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    for p in back.parameters(): p.data = p.data.clone()        # where a tensor lies in memory can change a rounding
    assert torch.equal(logits(back), want) and back.sentinel.agency.to_dict() == agency.to_dict()
    assert set(back.sentinel.memory) == set(memory) and all(back.sentinel.memory[k].same(memory[k].tensors()) for k in memory)
    remove_skips(back)
    unadapt(unprune(back))
    assert torch.equal(logits(back), plain) and same(back, sd)


def test_what_isnt_remembered_is_refused_and_nothing_changes():
    "Weights that were let go can't come back from memory: said before anything is changed, also for a head whose group is open."
    for name in ('llama', 'gpt2'):
        model = build(name)
        memory = HeadMemory().attach(adapt(model))
        set_gates(model, {(0, 1): 0., (1, 0): 0.})
        memory.remember(model, [(0, 1), (1, 0)])
        compact(model)
        memory.release(model)
        memory.forget((1, 0))
        was, plan = logits(model), model.sentinel.plan.keep.clone()
        with pytest.raises(RuntimeError, match="layer 1 head 0 isn't remembered"): regrow(model, [(0, 1), (1, 0)])
        assert torch.equal(logits(model), was) and torch.equal(model.sentinel.plan.keep, plan)
        assert not any(r['parts'] for r in model.sentinel.stash.values())
        regrow(model, [(0, 1)])
        assert regrow(model, [(1, 0)], init='zero').done


def test_the_mirror_is_asked():
    from sentinel_ai.measure import HeadStats
    from sentinel_ai.regrow import wish
    model = half('gpt2', removed=False)
    plan = HeadPlan.from_gates(model)
    grad = torch.rand(plan.keep.shape, generator=torch.Generator().manual_seed(0)) - .5
    stats = HeadStats(dict(grad=grad, taylor=2*grad.abs()))
    L = len(grad)
    for l in range(L):
        partner = [2*abs(grad[L-1-l, h]) for h in range(grad.shape[1]) if plan.keep[L-1-l, h]]
        mean = sum(partner)/len(partner) if partner else torch.tensor(0.)
        torch.testing.assert_close(wish(stats, plan, 'mirror')[l], grad[l].abs() + mean)


def emptied(name, kind, monkeypatch):
    "A model of which the second attention or MLP is pruned altogether, with another one in its place."
    from sentinel_ai import own_text
    from sentinel_ai.channels import sites
    losses = iter(range(100, 0, -1))                 # each bridge is kept
    monkeypatch.setattr(own_text, 'text_loss', lambda m, batches: next(losses))
    model = build(name)
    plain, found = logits(model), sites(model)
    site = [s for s in found if s.kind == kind][1]

    def worth(stats):
        is_kind = (stats.shape[1] > 8) == (kind == 'channels')
        is_site = (torch.arange(stats.shape[0]) == site.layer) & is_kind
        return torch.where(is_site[:, None], 1e-6, 1.).expand(stats.shape)
    cost = site.cost()*site.n if kind == 'channels' else found.heads.head_params()/len(found.heads)
    prune(model, params=int(found.heads.n_params - cost), batches=CALIB, criterion=worth, repair='linear', rounds=1, progress=False)
    assert list(model.sentinel.repairs.bridges) == [(kind, site.layer)]
    return model, site, plain


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_a_bridge_is_taken_off_when_the_heads_behind_it_are_restored(name, cut, monkeypatch):
    model, site, plain = emptied(name, 'heads', monkeypatch)
    if cut: compact(model)
    regrow(model, [(site.layer, h) for h in range(site.n)])
    assert not model.sentinel.repairs.bridges
    near(logits(model), plain)


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_a_bridge_stays_when_the_heads_that_carry_it_are_restored(name, monkeypatch):
    model, site, _ = emptied(name, 'channels', monkeypatch)
    want = logits(model)
    close_heads(model, [(site.layer, 0)], CALIB)
    regrow(model, [(site.layer, 0)])
    assert list(model.sentinel.repairs.bridges) == [('channels', site.layer)]
    near(logits(model), want)

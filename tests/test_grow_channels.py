"""Channels grow on the architecture matrix: each MLP is widened without changing the output, or the model says that it can't.

`pytest tests/test_grow_channels.py -k llama` runs one architecture.
"""
import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from sentinel_ai import Agency, UnsupportedArchitecture, adapt, export_hf, gate_values, measure, prune, random_model, regrow, set_gates, unadapt, unprune
from sentinel_ai.checkpoint import restore, save_checkpoint
from sentinel_ai.growth import grow, ungrow
from sentinel_ai.growth_channels import channel_strength
from sentinel_ai.memory import HeadMemory
from sentinel_ai.surgery import HeadPlan, compact, expand, reattach
from sentinel_ai.room import replay
from sentinel_ai.stash import full_param
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from test_channels import ZAMBA, ZAMBA2  # noqa: E402
from test_matrix import ALL, IDS, build, greedy, logits, spread  # noqa: E402
from test_regrow import emptied  # noqa: E402

torch.set_num_threads(1)
# A norm over all channels in front of the down projection
NO_CHANNELS = {'bitnet': 'a norm or a threshold is made of all channels'}
SOME = ['gpt2', 'opt', 'llama', 'phi3', 'bloom', 'moshi', 'mixtral', 'gpt_oss', 'qwen3_next']
CALIB = [IDS, IDS.roll(2, 1)]


def state(m): return {k: v.clone() for k, v in m.state_dict().items()}


def same_state(a, b): return a.keys() == b.keys() and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


def close(a, b, tol=1e-5):
    off = (a.float() - b.float()).abs().max()/b.float().abs().max()
    assert off <= tol, f'off by {off:.1e}'


def reload(m, path):
    m.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


def sizes(m): return {s.layer: s.n for s in m.sentinel.now.channels}


def column_of(m, site, channels):
    "Columns of the down projection as built, `[channels, width]`."
    name = next(n for n, p in m.named_parameters() if p is site.weight)
    dim = site.places(range(site.n))[name.removeprefix(f'{site.path}.')][0]
    return full_param(m, name).index_select(dim, torch.as_tensor(channels)).movedim(dim, 0)


@pytest.mark.parametrize('name,init', spread(ALL, ['split', 'zero']))
def test_every_architecture(name, init, tmp_path):
    model = build(name)
    sd, want, tokens, params = state(model), logits(model), greedy(model), dict(model.named_parameters())
    if name in NO_CHANNELS:
        with pytest.raises(UnsupportedArchitecture, match=NO_CHANNELS[name]): grow(model, channels=8, init=init)
        assert same_state(state(model), sd) and torch.equal(logits(model), want) and type(model).__name__[:8] != 'Adaptive'
        return
    old = {s.layer: column_of(model, s, range(s.n)).clone() for s in adapt(model).sentinel.now.channels}
    assert grow(model, channels=8, init=init) is model
    built = model.sentinel.built.channels
    assert sizes(model) == {s.layer: s.native.n + 8 for s in built}
    close(logits(model), want, 1e-6)             # the kernel for another width may sum in another order
    assert torch.equal(greedy(model), tokens)
    for s in built if init == 'zero' else ():    # so all that is new is terms of exactly 0
        assert torch.equal(column_of(model, s, range(s.n - 8)), old[s.layer]) and not column_of(model, s, range(s.n - 8, s.n)).any()
    assert all(p is params[k] for k, p in model.named_parameters() if '.sentinel.' not in k)
    assert built.n_params == model.sentinel.built.heads.n_params == sum(p.numel() for p in params.values())
    close(logits(reload(model, tmp_path)), want, 1e-6)
    some_are_pruned(model, tmp_path/'small')
    ungrow(model)
    assert torch.equal(logits(model), want) and not model.sentinel.compact and model.sentinel.grown == []
    assert same_state(state(unadapt(model)), sd)


def some_are_pruned(m, path):
    "Close old and new channels, cut, load, bring back: each step is as for any other channel."
    want, sd = logits(m), state(m)
    closed = {(s.layer, c): 0. for s in m.sentinel.now.channels for c in (1, s.n - 8, s.n - 3)}
    masked = logits(set_gates(m, closed, 'channels'))
    plan = compact(m)
    close(logits(m), masked)
    small = reload(m, path)
    close(logits(small), masked)
    assert small.sentinel.plan == plan == HeadPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    close(logits(expand(small)), masked)
    expand(m)
    assert torch.equal(logits(set_gates(m, 1., 'channels')), want) and same_state(state(m), sd)


@pytest.mark.parametrize('channels', [1, 5, [0, 3], {1: 100}])
@pytest.mark.parametrize('name', SOME[:-1])
def test_amounts(name, channels, tmp_path):
    model = adapt(build(name))
    want, n = logits(model), sizes(model)
    kinds = {int: lambda: dict.fromkeys(n, channels), list: lambda: dict(enumerate(channels)), dict: lambda: channels}
    more = kinds[type(channels)]()
    grow(model, channels=channels)
    assert sizes(model) == {l: k + more.get(l, 0) for l, k in n.items()}
    close(logits(model), want, 1e-6)
    close(logits(reload(model, tmp_path)), want, 1e-6)
    assert torch.equal(logits(ungrow(model)), want)


@pytest.mark.parametrize('init', ['split', 'zero'])
@pytest.mark.parametrize('name', SOME)
def test_training(name, init, tmp_path):
    "Moments are padded with zeros; new channels learn; a trained model is saved, loaded, and taken back."
    model = adapt(build(name))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(m=model):
        opt.zero_grad()
        loss = m(IDS, labels=IDS).loss
        loss.backward()
        opt.step()
        return loss.item()
    step()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    moments = {p: s['exp_avg'].clone() for p, s in opt.state.items()}
    grow(model, channels=4, init=init, optimizer=opt)
    wider = [p for p in moments if p.shape != moments[p].shape]
    assert wider and all(opt.state[p]['exp_avg'].shape == p.shape for p in moments)
    assert all(abs(opt.state[p]['exp_avg'].double().sum() - moments[p].double().sum()) < 1e-5 for p in wider)
    site = next(iter(model.sentinel.built.channels))
    new = range(site.n - 4, site.n)
    before = column_of(model, site, new).clone()
    first, losses = step(), [step() for _ in range(10)]
    assert losses[-1] < first and (column_of(model, site, new) != before).any(1).all()
    trained = logits(model)
    back = reload(model, tmp_path)
    close(logits(back), trained, 1e-6)
    close(logits(ungrow(back)), logits(ungrow(copy.deepcopy(model))), 1e-6)      # with notes and without
    ungrow(model, optimizer=opt)
    assert all(p.shape == shapes[n] for n, p in model.named_parameters())
    assert all(opt.state[p]['exp_avg'].shape == p.shape for p in wider)
    step()


def test_ungrow_of_trained_columns_adds_them():
    "Rows as they were, columns trained: what the pair writes is what the donor writes alone, also behind gates that differ."
    model = grow(build('llama'), channels=3)
    down = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad(): down += torch.randn(down.shape, generator=torch.Generator().manual_seed(0))*.1
    note = model.sentinel.grown[0]
    set_gates(model, {(0, note['donors'][0].item()): .5, (0, 48): .25, (0, 49): 0.}, 'channels')
    want = logits(model)
    ungrow(model)
    close(logits(model), want)


@pytest.mark.parametrize('name', SOME)
def test_again_and_on_a_compact_model(name, tmp_path):
    "Channels grow on a compact model, then again, then all returns."
    model = adapt(build(name))
    sd = state(model)
    set_gates(model, {(s.layer, c): 0. for s in model.sentinel.now.channels for c in (1, 7)}, 'channels')
    set_gates(model, {(s.layer, 1): 0. for s in model.sentinel.now.heads})
    masked = logits(model)
    compact(model)
    small, plan = state(model), copy.deepcopy(model.sentinel.plan)
    ungrow(grow(model, channels=5))
    assert same_state(state(model), small) and model.sentinel.plan == plan
    grow(model, channels=3, init='zero')
    close(logits(model), masked)
    grow(model, channels=20, seed=1)
    grow(model, channels=60)                      # new ones are donors, too
    close(logits(model), masked)
    twin = reload(model, tmp_path)
    close(logits(twin), masked)
    expand(model)
    close(logits(model), masked)
    ungrow(model)
    assert torch.equal(logits(model), masked)
    close(logits(ungrow(expand(twin))), masked)
    set_gates(set_gates(model, 1.), 1., 'channels')
    assert same_state(state(model), sd)


@pytest.mark.parametrize('order', [('heads', 'channels'), ('channels', 'heads')])
@pytest.mark.parametrize('name', ['gpt2', 'llama', 'phi3'])
def test_heads_and_channels(name, order, tmp_path):
    model = adapt(build(name))
    sd, want = state(model), logits(model)
    for kind in order: grow(model, **{kind: 2})
    close(logits(model), want, 1e-6)
    back = reload(model, tmp_path)
    close(logits(back), want, 1e-6)
    assert back.sentinel.plan == model.sentinel.plan and back.sentinel.plan.has_grown
    assert len({f.n_params for f in (model.sentinel.now.heads, model.sentinel.now.channels)}) == 1
    close(logits(ungrow(back)), want, 1e-6)
    assert torch.equal(logits(ungrow(model)), want) and same_state(state(model), sd)
    assert model.sentinel.stash == {} and not model.sentinel.compact


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'phi3'])
def test_layers_of_a_grown_model(name, tmp_path):
    model = adapt(build(name))
    set_gates(model, {(0, 3): 0., (1, 5): 0.}, 'channels')
    masked = logits(model)
    compact(model)
    grow(model, channels={1: 6})
    grow(model, layers=[0])
    assert [g[:2] for g in model.sentinel.plan.channels.grown] == [[2, 48 if name != 'gpt2' else sizes(model)[0] + 1]]
    close(logits(model), masked)
    twin = reload(model, tmp_path)
    close(logits(twin), masked)
    close(logits(ungrow(model)), masked)
    close(logits(expand(model)), masked)
    close(logits(ungrow(expand(twin))), masked)


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'phi3'])
def test_repair_is_taken_back_through_growth(name):
    model = build(name)
    want = logits(model)
    prune(model, params=.85, batches=CALIB, rounds=2, progress=False)
    compact(model)
    repaired = logits(model)
    assert model.sentinel.repairs.channels
    grow(model, channels=6)
    close(logits(model), repaired)
    for key, (old, new) in model.sentinel.repairs.changed.items():
        assert torch.equal(new, full_param(model, key)) and (old is None or old.shape == new.shape)
    for l, batches in model.sentinel.repairs.channels.items():
        assert all(len(r['T']) == model.sentinel.built.channels[l].n for r in batches)
    twin = copy.deepcopy(model)
    close(logits(unprune(twin)), want)
    close(logits(ungrow(twin)), want)
    ungrow(expand(model))
    close(logits(model), repaired)
    close(logits(unprune(model)), want)


@pytest.mark.parametrize('kind,grows', [('heads', 'channels'), ('channels', 'heads')])
@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_a_bridge_is_taken_off_of_a_wider_projection(name, kind, grows, monkeypatch):
    "What stands in for a sublayer lies in the projection before it, which is wider now."
    model, site, plain = emptied(name, kind, monkeypatch)
    want, first = logits(model), 1 if kind == 'channels' else 0
    compact(model)
    grow(model, **{grows: {first: 2}})
    close(logits(model), want)
    twin = ungrow(copy.deepcopy(model))
    for m in (model, twin):
        regrow(m, [(site.layer, u) for u in range(site.n)], kind=kind)
        assert not m.sentinel.repairs.bridges
        close(logits(m), plain, 1e-4)


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'phi3'])
def test_measure_prune_and_ungrow(name):
    "New channels are measured and pruned as others are, and the log of repairs forgets those that are dropped."
    model = grow(build(name), channels=12, init='zero')
    stats = measure(model, CALIB, what=('gradient',), progress=False, kinds=('heads', 'channels'))
    n = model.sentinel.now.channels.shape
    assert stats.of_kind('channels').shape == n
    plan = prune(model, params=.8, batches=CALIB, rounds=2, progress=False)
    assert (plan.channels.exists & ~plan.channels.keep)[:, -12:].any()       # they write nothing yet
    compact(model)
    masked = logits(model)
    ungrow(model)
    for l, batches in model.sentinel.repairs.channels.items():
        n = model.sentinel.built.channels[l].n
        assert all(len(r['T']) == n and (r['units'] < n).all() and r['T'].shape[1] == len(r['units']) for r in batches)
    close(logits(model), masked)
    assert logits(unprune(model)).isfinite().all()


@pytest.mark.parametrize('name', SOME)
def test_bfloat16_copies_and_pickles(name):
    model = build(name, torch.bfloat16)
    want = logits(model)
    grow(model, channels=8)
    assert {p.dtype for n, p in model.named_parameters() if '.sentinel.' not in n} == {torch.bfloat16}
    close(logits(model), want, 3e-2)
    got = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), got)
        assert torch.equal(logits(ungrow(twin)), want)
    unadapt(model)
    assert torch.equal(logits(model), got) and torch.equal(logits(adapt(model)), got)


@pytest.mark.parametrize('name', SOME)
def test_replay_on_meta(name):
    model = grow(build(name), channels=3)
    plan = HeadPlan.from_dict(json.loads(json.dumps(model.sentinel.plan.to_dict())))
    with torch.device('meta'): empty = replay(type(build(name))(model.config), plan)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    real = replay(build(name, seed=1), plan)
    real.load_state_dict(state(model))
    assert torch.equal(logits(real), logits(model)) and real.sentinel.plan == plan == model.sentinel.plan
    wrong = copy.deepcopy(plan)
    wrong.channels.grown[0][1] += 1
    plain = build(name)
    with pytest.raises(ValueError, match='channels; this one has'): replay(plain, wrong)
    assert not hasattr(plain, 'sentinel')


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'opt'])
def test_export_where_all_layers_grew_alike(name, tmp_path):
    model = grow(build(name), channels=8)
    export_hf(model, tmp_path/'plain')
    back = AutoModelForCausalLM.from_pretrained(tmp_path/'plain')
    close(logits(back), logits(model), 1e-6)
    assert not hasattr(back, 'sentinel') and [s.n for s in adapt(back).sentinel.now.channels] == list(sizes(model).values())
    grow(model, channels={0: 1})
    with pytest.raises(ValueError, match='the same number in every layer'): export_hf(model, tmp_path/'uneven')
    export_hf(model, tmp_path/'padded', pad=True)


def test_a_checkpoint_goes_on(tmp_path):
    def grown(seed):
        model = grow(build('llama', seed=seed), channels=4, init='zero')
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    (model, opt), (other, mine) = grown(0), grown(1)
    model(IDS, labels=IDS).loss.backward()
    opt.step()
    save_checkpoint(tmp_path/'checkpoint', model, opt)
    restore(other, tmp_path/'checkpoint', mine)
    assert torch.equal(logits(other), logits(model))
    plain = build('llama')
    with pytest.raises(ValueError): restore(plain, tmp_path/'checkpoint')


def test_memory_and_agency_stay():
    "Numbers of the others stay valid, so what speaks of them may watch."
    model = adapt(build('llama'))
    memory, agency = HeadMemory().attach(model), Agency()
    agency.attach(model)
    closed = [(0, 3), (0, 9), (1, 5)]
    memory.remember(model, closed, kind='channels')
    set_gates(model, dict.fromkeys(closed, 0.), 'channels')
    masked = logits(model)
    compact(model)
    grow(model, channels=4)
    close(logits(model), masked)
    reattach(model, closed, kind='channels')
    assert (gate_values(model, kind='channels') == 0).sum() == 3 and sizes(model) == {0: 52, 1: 52}
    close(logits(model), masked)
    with pytest.raises(RuntimeError, match='agency of this model speaks of its present heads'): grow(model, heads=1)


def test_gates_are_kept_and_shared():
    "A split channel's gate is its donor's; others keep theirs."
    model = adapt(build('llama'))
    set_gates(model, {(0, c): .25 + c/96 for c in range(48)}, 'channels')
    want, old = logits(model), gate_values(model, kind='channels')
    grow(model, channels=3)
    note, gates = model.sentinel.grown[0], gate_values(model, kind='channels')
    assert torch.equal(gates[:, :48], old) and torch.equal(gates[0, 48:], old[0, note['donors']])
    close(logits(model), want, 1e-6)
    grow(model, channels=2, init='zero')
    assert torch.equal(gate_values(model, kind='channels')[:, 51:], torch.ones(2, 2))


def test_scores_name_the_donor():
    model = adapt(build('gpt2'))
    t = channel_strength(model)
    t[:, 2] = 1e9
    grow(model, channels=1, scores=t)
    assert [n['donors'].tolist() for n in model.sentinel.grown] == [[2], [2]]
    assert model.sentinel.plan.channels.grown == [[l, s.n - 1, [2]] for l, s in enumerate(model.sentinel.now.channels)]


def test_a_seed_says_what_is_random():
    grown = lambda seed, init: state(grow(build('llama'), channels=2, init=init, seed=seed))
    for init in ('split', 'zero'):
        assert same_state(grown(3, init), grown(3, init)) and not same_state(grown(3, init), grown(4, init))


def test_refusals_change_nothing():
    model = adapt(build('llama'))
    sd, want = state(model), logits(model)
    for error, match, kw in ((ValueError, 'either heads', dict(heads=1, channels=1)), (ValueError, 'either heads', dict(layers=[0], channels=1)),
                             (ValueError, "'random'", dict(channels=1, init='random')), (ValueError, '2 layers', dict(channels=[1])),
                             (ValueError, 'layer 0: -1 new channels', dict(channels=-1)), (ValueError, 'layer 1: 2.0', dict(channels=[1, 2.])),
                             (ValueError, 'layer 0: True', dict(channels=True)), (ValueError, 'no new channels', dict(channels=0)),
                             (IndexError, 'layer 7', dict(channels={7: 1})), (ValueError, 'shape', dict(channels=1, scores=torch.ones(1, 1)))):
        with pytest.raises(error, match=match): grow(model, **kw)
    with pytest.raises(RuntimeError, match='no heads of this model grew, nor channels'): ungrow(model)
    set_gates(model, {(1, c): 0. for c in range(48)}, 'channels')
    with pytest.raises(ValueError, match='layer 1 has no open channel'): grow(model, channels=1)
    set_gates(model, 1., 'channels')
    assert same_state(state(model), sd) and torch.equal(logits(model), want) and not model.sentinel.compact


def test_shared_modules_are_refused():
    model = build('llama')
    model.model.layers[1].mlp = model.model.layers[0].mlp
    want = logits(model)
    with pytest.raises(UnsupportedArchitecture, match='other layers share its weights'): grow(model, channels=1)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize('name,more', [('zamba', {}), ('zamba2', ZAMBA2)])
def test_twins_are_refused(name, more):
    model = random_model(name, **ZAMBA, **more).to(IDS.device)
    want = logits(model)
    with pytest.raises(UnsupportedArchitecture, match='other layers share its weights'): grow(model, channels=1)
    assert torch.equal(logits(model), want)


def test_what_goes_wrong_is_undone(monkeypatch):
    import sentinel_ai.growth_channels as g
    model = adapt(build('llama'))
    sd, want = state(model), logits(model)
    monkeypatch.setattr(g, 'differing_layers', lambda *a: {('channels', 0): 'it is a test'})
    with pytest.raises(UnsupportedArchitecture, match='it is a test'): grow(model, channels=2)
    assert same_state(state(model), sd) and torch.equal(logits(model), want) and not model.sentinel.compact and model.sentinel.grown == []
    assert model.model.layers[0].mlp.intermediate_size == 48 and 'channel_wiring' not in vars(model.model.layers[0].mlp)

"Whole sublayers are left out where that saves time for less: exact, undone, remembered, or nothing happens."
from unittest import mock

import pytest, torch
from sentinel_ai import UnitMemory, compact, gate_values, load_adaptive_model, prune, random_model, set_gates, unprune
from sentinel_ai import timed
from sentinel_ai.clock import light_copy
from sentinel_ai.gates import adapt
from sentinel_ai.request import PruneRequest
from sentinel_ai.site import model_size

torch.set_num_threads(1)
IDS = torch.arange(2*24).view(2, 24).remainder(60) + 3
TEXT = torch.arange(8*24).view(8, 24).remainder(53) + 3
NAMES = ['gpt2', 'llama', 'bloom', 'gpt_neox', 'opt', 'phi3', 'gemma2', 'falcon', 'gptj', 'mixtral']


@torch.no_grad()
def logits(m): return m.eval()(IDS).logits


def by_depth(model, other, ids, repeats=5):
    "A clock by which only sublayers take time."
    def at_work(m): return sum(bool((s.module.sentinel.gate != 0).any()) for s in m.sentinel.now)
    share = at_work(other)/at_work(model)
    return dict(prefill=share, decode=share)


def by_size(model, other, ids, repeats=5):
    share = model_size(other)/model_size(model)
    return dict(prefill=share, decode=share)


def clocked(m, clock, ms, **options):
    "Prune by a stand-in for the clock, which sees masked copies."
    options = dict(batches=TEXT, rounds=2, progress=False) | options
    with mock.patch.multiple(timed, time_ratios=clock, compact_copy=light_copy):
        return prune(m, ms=ms, **options)


@pytest.mark.parametrize('name', NAMES)
def test_left_out_and_back(name, tmp_path):
    m = adapt(random_model(name, num_hidden_layers=4))
    before = logits(m)
    plan = clocked(m, by_depth, .8)
    left_out = plan.info['left_out']
    assert left_out and plan.info['time']['decode'] <= .8
    for kind, layer in left_out: assert not gate_values(m, kind=kind)[layer].nan_to_num().any()
    masked = logits(m)
    compact(m)
    assert torch.allclose(logits(m), masked, atol=2e-4)
    m.save_pretrained(tmp_path)
    again = load_adaptive_model(str(tmp_path))
    assert torch.allclose(logits(again), logits(m), atol=1e-5)
    assert torch.equal(logits(unprune(m)), before) and torch.equal(logits(unprune(again)), before)


def test_where_only_parameters_count_layers_get_narrower():
    "Depth loses where it saves nothing besides parameters, and the prices say so."
    m = adapt(random_model('llama', num_hidden_layers=4))
    with mock.patch.multiple(timed, time_ratios=by_size): plan = prune(m, ms=.85, batches=TEXT, rounds=2, progress=False)
    contests = plan.info['contests']
    assert all(set(c) == {'depth', 'width'} for c in contests)
    deep = sum(c['depth'] < c['width'] for c in contests)
    assert bool(plan.info.get('left_out')) == bool(deep)


def test_depth_can_be_left_alone():
    m = adapt(random_model('llama', num_hidden_layers=4))
    with mock.patch.multiple(timed, time_ratios=by_size):
        plan = prune(m, ms=.9, batches=TEXT, rounds=1, depth=False, progress=False)
    assert 'left_out' not in plan.info and 'contests' not in plan.info
    for options in (dict(params=.9, depth=True), dict(ms=.9, kinds='heads', depth=True), dict(ms=.9, depth='yes')):
        with pytest.raises(ValueError, match='depth='): prune(m, batches=TEXT, progress=False, **options)


def test_what_must_stay_stays():
    m = adapt(random_model('llama', num_hidden_layers=4))
    layers = range(4)
    plan = clocked(m, by_depth, .8, protect=[(l, 0) for l in layers])
    assert {kind for kind, _ in plan.info['left_out']} == {'channels'}
    m = adapt(random_model('llama', num_hidden_layers=4))
    plan = clocked(m, by_depth, .8, min_channels=1)
    assert {kind for kind, _ in plan.info['left_out']} == {'heads'}


def test_a_memory_is_told_once():
    "Trials leave nothing behind; what is left out is remembered."
    m = adapt(random_model('llama', num_hidden_layers=4))
    memory = UnitMemory().attach(m)
    request = PruneRequest(params=.7, batches=TEXT, progress=False)
    request.resolve(m)
    whole = light_copy(m)
    request.clock = mock.Mock(whole=whole, ratios=lambda twin: by_depth(whole, twin, None))
    request.start_depths(m)
    was = str(memory)
    found = request.try_depth(m, dict(prefill=1., decode=1.), .12)
    assert str(memory) == was and found.sites
    request.go_deep(m, found)
    assert str(memory) != was


def test_nothing_is_changed_if_it_breaks_off():
    m = adapt(random_model('llama', num_hidden_layers=4))
    set_gates(m, {(0, 1): .5})
    before, gates = logits(m), gate_values(m)
    broken = mock.patch.object(PruneRequest, 'go_deep', side_effect=RuntimeError('stop'))
    with broken, pytest.raises(RuntimeError, match='stop'): clocked(m, by_depth, .8)
    assert torch.equal(logits(m), before) and torch.equal(gate_values(m).nan_to_num(), gates.nan_to_num())

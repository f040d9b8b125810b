"""One family, every size: `resize` on the architecture matrix, with everything that a model can hold, and with files from strangers."""
import copy
import json

import pytest
import torch
from safetensors import safe_open
from sentinel_ai import (HeadMemory, UnsupportedArchitecture, adapt, elastic, grow, load_adaptive_model, load_baseline_model,
                         load_checkpoint, load_tokenizer, merge_gates, prune, random_model, regrow, resize, save_checkpoint,
                         set_gates, ungrow, unprune)
from sentinel_ai.data import lm_dataset
from sentinel_ai.elastic import NEVER
from sentinel_ai.io import write_tensors
from sentinel_ai.family_file import FAMILY_FILE, read_family, save_family
from sentinel_ai.sizes import family_of
from sentinel_ai.site import model_size
from sentinel_ai.surgery import HeadPlan, expand
from test_matrix import EXPERTS, LISTED_ALL, SAYS_LAYOUT, VARIANTS

torch.set_num_threads(1)
IDS = torch.arange(2*48).view(2, 48).remainder(60) + 3
CALIB = (torch.arange(16*24).remainder(53) + torch.arange(16*24)//7 % 31 + 3).view(16, 24)
NAMES = [*LISTED_ALL, *(EXPERTS if SAYS_LAYOUT else [])]


def made(name):
    kind, more = VARIANTS.get(name, (name, {}))
    return random_model(kind, **more)


def family_model(name='llama', least=.9, **kwargs):
    m = made(name)
    elastic(m, CALIB, least, rounds=1, progress=False, **kwargs)
    return m


@torch.no_grad()
def logits(m): return m.eval()(IDS).logits


def weights(m): return {n: p.clone() for n, p in m.named_parameters()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('name', NAMES)
def test_sizes_are_exact_on_the_matrix(name, tmp_path):
    m = made(name)
    before = logits(m)
    try: family = elastic(m, CALIB, .93, rounds=1, progress=False)
    except UnsupportedArchitecture as e: return pytest.skip(str(e)[:60])
    assert torch.equal(logits(m), before)
    at_first, whole = weights(m), model_size(m)
    plan = resize(m, params=.95)
    assert model_size(m) <= .95*whole and plan.info['step'] > 0
    compact_logits, small = logits(m), weights(m)
    expand(m)                                                       # the same closed units behind gates
    assert torch.allclose(logits(m), compact_logits, atol=2e-4)
    resize(m, params=.97)
    resize(m, params=.95)                                           # whatever the way
    assert same(weights(m), small)
    m.save_pretrained(tmp_path)
    again = load_adaptive_model(str(tmp_path))
    assert same(weights(again), small) and torch.allclose(logits(again), compact_logits, atol=1e-5)
    resize(again, params=.97)
    resize(m, params=.97)
    assert same(weights(again), weights(m))
    resize(m, params=1.)
    assert same(weights(m), at_first) and torch.equal(logits(m), before)
    assert family_of(m) is family


def test_repair_is_of_use():
    "The size of a family against the same units closed without repair."
    m = load_baseline_model('tiny-llama')
    text = lm_dataset('python_docs', load_tokenizer('tiny-llama'), 128)['train']['input_ids']
    ids = torch.as_tensor(text[:16])
    elastic(m, ids, .7, rounds=1, progress=False)
    resize(m, params=.75)
    with torch.no_grad(): repaired = float(m(ids, labels=ids).loss)
    plan = HeadPlan.from_gates(m)
    bare = load_adaptive_model('tiny-llama')
    for kind, table in (('heads', plan.keep), ('channels', plan.channels.keep)):
        set_gates(bare, torch.where(table, 1., 0.), kind)
    with torch.no_grad(): assert repaired < float(bare(ids, labels=ids).loss)


@pytest.mark.parametrize('repair', ['none', 'bias', 'linear', 'affine'])
def test_every_repair_and_back(repair):
    m = made('gpt2')
    at_first = weights(random_model('gpt2'))
    elastic(m, CALIB, .9, rounds=2, repair=repair, progress=False)
    resize(m, params=.92)
    assert bool(m.sentinel.repairs) == (repair != 'none')
    unprune(m)
    now = weights(m)
    assert all(torch.equal(now[n], p) for n, p in at_first.items())


def test_budgets_and_what_they_mean():
    m = family_model(least=.8)
    whole = model_size(m)
    for budget in (dict(params=.9), dict(params=int(.9*whole)), dict(flops=.9), dict(kv_bytes=.8)):
        try: resize(m, **budget)
        except ValueError as e:
            assert 'with this family' in str(e) and 'kv_bytes' in budget
            continue
        assert model_size(m) < whole
    for bad, message in (({}, 'give one of'), (dict(params=.9, flops=.9), 'give one of'), (dict(params=float('nan')), 'finite'),
                         (dict(params=-1), 'finite'), (dict(ms=3.), '0 to 1'), (dict(params=.9, context=0), 'context')):
        held = weights(m)
        with pytest.raises(ValueError, match=message): resize(m, **bad)
        assert same(weights(m), held)


def test_what_a_model_holds_comes_along():
    m = family_model()
    opt = torch.optim.AdamW(m.parameters(), lr=1e-3)
    m.train()(IDS, labels=IDS).loss.backward()
    opt.step()
    trained = weights(m)
    resize(m, params=.92, optimizer=opt)
    for p in m.parameters():
        state = opt.state.get(p, {})
        assert all(t.shape == p.shape for t in state.values() if torch.is_tensor(t) and t.ndim)
    resize(m, params=1., optimizer=opt)
    assert same(weights(m), trained)                        # what was trained is kept, and every size follows from it
    twin = copy.deepcopy(m)
    assert twin.sentinel.family is m.sentinel.family
    resize(twin, params=.92)
    assert model_size(m) > model_size(twin)


def test_units_can_return_one_by_one():
    m = family_model()
    HeadMemory().attach(m)
    before = logits(m)
    resize(m, params=.92)
    plan = HeadPlan.from_gates(m)
    gone = [(l, h) for l, h in (~plan.keep & plan.exists).nonzero().tolist()]
    regrow(m, len(gone) or 1)
    resize(m, params=1.)
    assert torch.allclose(logits(m), before, atol=1e-5)


def test_a_size_happens_whole_or_not_at_all(monkeypatch):
    import sentinel_ai.sizes as sizes
    m = family_model()
    resize(m, params=.95)
    held, plan = weights(m), HeadPlan.from_gates(m)
    real, calls = sizes.write_repair, []
    def breaks(*args):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(sizes, 'write_repair', breaks)
    with pytest.raises(KeyboardInterrupt): resize(m, params=.92)
    assert same(weights(m), held)
    assert torch.equal(HeadPlan.from_gates(m).keep, plan.keep)
    monkeypatch.setattr(sizes, 'write_repair', real)
    resize(m, params=.92)


def test_states_that_forbid_it():
    m = family_model()
    set_gates(m, {(0, 0): .5})
    merge_gates(m)
    with pytest.raises(RuntimeError, match='unmerge_gates'): resize(m, params=.95)
    plain = random_model('llama')
    with pytest.raises(TypeError, match='call adapt'): resize(plain, params=.95)
    prune(plain, .2, CALIB, rounds=1, progress=False)
    with pytest.raises(ValueError, match='unprune'): elastic(plain, CALIB, .9)


@pytest.mark.parametrize('name', ['llama', 'mixtral'])
def test_a_family_that_fits_no_more(name, tmp_path):
    "Growth makes a family useless until it is taken back, also where no table changes its shape; a folder is saved without it."
    m = family_model(name)
    held = logits(m)
    grow(m, channels={0: 2})
    with pytest.raises(ValueError, match='another family'): resize(m, params=.95)
    m.save_pretrained(tmp_path/'grown')
    back = load_adaptive_model(str(tmp_path/'grown'))
    assert torch.equal(logits(back), logits(m)) and back.sentinel.family is None
    family = elastic(m, CALIB, .9, rounds=1, progress=False)
    grow(m, channels={1: 1})
    assert m.sentinel.built.channels.shape == family.places.tables['channels'].shape
    with pytest.raises(ValueError, match='channels in layer 1 where'): resize(m, params=.95)
    m.save_pretrained(tmp_path/'again')
    assert load_adaptive_model(str(tmp_path/'again')).sentinel.family is None
    ungrow(m)
    assert torch.allclose(logits(m), held, atol=1e-5)


def test_a_checkpoint_says_whether_there_is_a_family(tmp_path):
    m = family_model()
    save_checkpoint(tmp_path/'with', m)
    save_checkpoint(tmp_path/'without', adapt(random_model('llama')))
    load_checkpoint(tmp_path/'without', m)
    assert m.sentinel.family is None
    load_checkpoint(tmp_path/'with', m)
    resize(m, params=.95)


def test_no_family_of_a_model_that_was_refused():
    "A plain model is plain again."
    m = random_model('llama')
    kind = type(m)
    for bad, options in ((CALIB[:0], {}), (CALIB, dict(min_channels=40)), (CALIB, dict(repair='magic'))):
        with pytest.raises(ValueError): elastic(m, bad, .5, rounds=1, progress=False, **options)
        assert type(m) is kind and not hasattr(m, 'sentinel')


def changed_file(path, out, change):
    "A copy of a family's file whose tensors and facts `change` has had its way with."
    with safe_open(path, 'pt') as f:
        tensors, facts = {k: f.get_tensor(k).clone() for k in f.keys()}, json.loads(f.metadata()['facts'])
    change(tensors, facts)
    write_tensors(out, tensors, sentinel_family='1', facts=json.dumps(facts))


def longest(t): return max((k for k in t if k.endswith('/M')), key=lambda k: t[k].numel())


CHANGES = {
    'nan': lambda t, f: t[longest(t)].fill_(float('nan')),
    'short': lambda t, f: t.update({longest(t): t[longest(t)][:-1]}),
    'order twice': lambda t, f: t[longest(t)[:-1] + 'order'].fill_(0),
    'order outside': lambda t, f: t[longest(t)[:-1] + 'order'].add_(10**6),
    'negative diagonal': lambda t, f: t[longest(t)].mul_(-1),
    'no mean': lambda t, f: t.pop(longest(t)[:-1] + 'mean'),
    'place': lambda t, f: t['place/heads'].fill_(-3),
    'place as float': lambda t, f: t.update({'place/heads': t['place/heads'].float()}),
    'place of others': lambda t, f: t.update({'place/channels': t['place/channels'][:, :-1]}),
    'no place': lambda t, f: t.pop('place/channels'),
    'multiple': lambda t, f: f.update(multiple=0),
    'huge multiple': lambda t, f: f.update(multiple=10**30),
    'steps': lambda t, f: f.update(steps=-1),
    'steps text': lambda t, f: f.update(steps='many'),
    'repair': lambda t, f: f['how'].update(heads=['magic', .1]),
    'ridge': lambda t, f: f['how'].update(heads=['affine', float('inf')]),
    'kinds': lambda t, f: f['how'].pop('heads'),
    'layer': lambda t, f: f['layers'].append(['heads', 99]),
    'kind of layer': lambda t, f: f['layers'].append(['tails', 0]),
    'layers': lambda t, f: f.update(layers=7),
    'layer as dict': lambda t, f: f.update(layers=[{}]),
    'no facts': lambda t, f: f.clear(),
}


@pytest.mark.parametrize('what', CHANGES)
def test_files_from_strangers(what, tmp_path):
    m = family_model()
    save_family(m.sentinel.family, tmp_path/FAMILY_FILE)
    changed_file(tmp_path/FAMILY_FILE, tmp_path/'odd.safetensors', CHANGES[what])
    with pytest.raises(ValueError, match='odd.safetensors'): read_family(tmp_path/'odd.safetensors', m)


def test_a_folder_without_its_memory(tmp_path):
    m = family_model()
    resize(m, params=.95)
    m.save_pretrained(tmp_path, memory=False)
    again = load_adaptive_model(str(tmp_path))
    assert again.sentinel.family is None and not (tmp_path/FAMILY_FILE).exists()
    with pytest.raises(ValueError, match='elastic'): resize(again, params=.9)
    with pytest.raises(ValueError, match='budget'): load_adaptive_model(str(tmp_path), budget='all')


def test_order_is_nested_and_in_multiples():
    m = family_model(least=.7, multiple=4)
    family, last = m.sentinel.family, None
    for step in range(0, family.places.steps + 1, max(1, family.places.steps//25)):
        closed = family.places.closed(step)
        if last is not None:
            for kind in closed: assert not (last[kind] & ~closed[kind]).any()
        kept = [int(s.n - closed['channels'][s.layer].sum()) for s in m.sentinel.built.channels]
        assert all(k % 4 == 0 for k in kept) and all((~closed['heads']).any(1))
        last = closed
    assert (family.places.tables['heads'] == NEVER).any(1).all()


@pytest.mark.parametrize('name', ['gpt2', 'bloom', 'mixtral'])
def test_a_budget_of_time(name, monkeypatch):
    "On the real clock whatever comes out is whole; with a stand-in the step is the one that was asked for."
    import sentinel_ai.sizes as sizes
    m = family_model(name)
    whole = model_size(m)
    monkeypatch.setattr(sizes, 'time_ratios', lambda a, b, ids: dict(prefill=model_size(b)/model_size(a), decode=.5))
    resize(m, ms=.95)
    assert .9*whole < model_size(m) <= .96*whole          # biases are not counted by the clock
    with pytest.raises(ValueError, match='smallest size'): resize(m, ms=.2)
    monkeypatch.undo()
    held = weights(m)
    try: resize(m, ms=1., context=400)                     # no more positions than the model has
    except ValueError: assert same(weights(m), held)

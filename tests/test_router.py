"""A router is careful: it moves what it has reason to move, leaves a text of a new kind alone, and answers as the chosen plan would."""
import functools

import pytest
import torch
from sentinel_ai import adapt, prune, set_gates
from sentinel_ai.plans import PlanSet
from sentinel_ai.router import AdaptiveRouter, PlanCosts, Ridge, block_path, plan_costs, shared_layers, stream_before
from sentinel_ai.trees import read_state, write_state
from test_elastic import CALIB, logits, made

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(3)
LOW, HIGH = (torch.randint(low, low + 5, (30, 16), generator=GENERATOR) for low in (3, 40))
PROMPTS = torch.cat([LOW, HIGH])


@functools.cache
def plans_of(name='llama'):
    model = made(name)
    plans = PlanSet(model)
    for plan, text in dict(mix=CALIB, low=LOW, high=HIGH).items():
        prune(model, params=.9, rounds=1, batches=text, progress=False)
        plans.remember(plan)
        plans.use()
    return plans


def costs(gain=.1, noise=.01):
    "What the plans cost: each is better on its own half, by so much."
    own = torch.arange(60) < 30
    kl = torch.full((60, 3), .3) + noise*torch.randn(60, 3, generator=torch.Generator().manual_seed(5))
    kl[own, 1] -= gain
    kl[~own, 2] -= gain
    kl[own, 2] += 8*gain
    kl[~own, 1] += 8*gain
    return PlanCosts(['mix', 'low', 'high'], kl, kl, torch.ones(60))


def router_of(name='llama', gain=.1, noise=.01, **kwargs):
    plans = plans_of(name)
    plans.use()
    router = AdaptiveRouter(plans, fallback='mix', **kwargs)
    router.fit(PROMPTS, seen=12, costs=costs(gain, noise))
    return router


def names(router, ids): return [choice.name for choice in router.choose(ids)]


def test_it_takes_what_can_be_known():
    router = router_of()
    assert router.headroom.share > .9 and router.headroom.wrong < .05
    assert names(router, LOW[:3]) == ['low']*3 and names(router, HIGH[:3]) == ['high']*3
    assert router.headroom.oracle <= router.headroom.router < router.headroom.single <= router.headroom.fallback


def test_it_stays_where_nothing_is_known():
    noisy = router_of(gain=0., noise=.05)
    assert noisy.headroom.moved < .25 and noisy.headroom.router - noisy.headroom.fallback < .02
    if not noisy.is_useful: assert set(names(noisy, PROMPTS)) == {'mix'}
    mixed = torch.cat([LOW[:, :6], HIGH[:, :6]], 1)                  # half of each, and a wrong plan is dear
    assert set(names(router_of(), mixed)) == {'mix'}
    assert set(names(router_of(margin=1e6), PROMPTS)) == {'mix'}


def test_novelty_of_unseen_signals():
    X = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    for width in (0., .5):
        fit = Ridge(X, X[:, :2], .1, width)
        assert fit.novelty(X).max() < fit.novelty(5*X.flip(1)).min()
    assert torch.allclose(Ridge(X, X[:, :2], .1).novelty(X.mean(0, keepdim=True)), torch.zeros(1), atol=1e-4)


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_answers_are_those_of_the_plan(name):
    router = router_of(name)
    plans, model = router.plans, router.model
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids, mask = PROMPTS[[0, 40, 1, 41], :12].clone(), torch.ones(4, 12, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0                                   # padded on the left
    out = router.generate(dict(input_ids=ids, attention_mask=mask), **options)
    assert [c.name for c in router.last] == ['low', 'high']*2 and out.shape == (4, 15)
    for i, choice in enumerate(router.last):
        plans.use(choice.name, compact=True)
        one = model.generate(input_ids=ids[i:i+1], attention_mask=mask[i:i+1], **options)
        assert torch.equal(out[i], one[0])
    twice = router.generate(input_ids=ids, attention_mask=mask, num_return_sequences=2, num_beams=2, **options)
    assert twice.shape == (8, 15) and torch.equal(twice[::2, :12], ids) and torch.equal(twice[1::2, :12], ids)
    with pytest.raises(ValueError, match='one prompt at a time'):
        router.generate(ids, return_dict_in_generate=True, **options)
    assert router.generate(ids[:1], return_dict_in_generate=True, **options).sequences.shape == (1, 15)


def test_signals_do_not_depend_on_the_plan():
    plans = plans_of()
    router = router_of()
    seen = router.signals(PROMPTS[:4])
    for plan in plans: assert torch.equal(router.signals(PROMPTS[:4]), seen) and plans.use(plan) is plans.model
    padded = torch.cat([torch.zeros(4, 3, dtype=torch.long), PROMPTS[:4]], 1)
    assert torch.allclose(router.signals(padded, torch.arange(19)[None].expand(4, -1) > 2), seen)


@pytest.mark.parametrize('name', ['gpt2', 'bloom', 'llama', 'opt'])
def test_layers_that_all_plans_share(name):
    model = adapt(made(name))
    with torch.no_grad(): want = model(PROMPTS[:2], output_hidden_states=True).hidden_states[1]
    assert torch.equal(stream_before(model, 1, PROMPTS[:2]), want)
    assert not model.get_submodule(block_path(model, 1))._forward_pre_hooks
    plans = PlanSet(model)
    for head in (0, 1):
        set_gates(model, {(1, head): 0.})
        plans.remember(str(head))
        plans.use()
    assert shared_layers(plans) == 1
    router = AdaptiveRouter(plans, layers=1)
    router.fit(PROMPTS, seen=12)
    assert 0 < router.overhead(100) < .6
    for plan in plans:
        plans.use(plan, compact=True)
        assert torch.equal(stream_before(model, 1, PROMPTS[:2]), want)
    with pytest.raises(ValueError, match='layers=2: allowed is 0 to 1'): AdaptiveRouter(plans, layers=2)


def test_costs_are_those_of_the_plans():
    plans = plans_of()
    found = plan_costs(plans, PROMPTS[:5], 12, batch_size=2, block=3, compact=False)
    plans.use()
    with torch.no_grad(): p = plans.model(PROMPTS[:5]).logits[:, 11:-1].log_softmax(-1)
    for i, name in enumerate(plans):
        with torch.no_grad(): q = plans.use(name, compact=False)(PROMPTS[:5]).logits[:, 11:-1].log_softmax(-1)
        assert torch.allclose(found.kl[:, i], (p.exp()*(p - q)).sum(-1).mean(1), atol=1e-5)
        lost = (p - q).gather(-1, PROMPTS[:5, 12:, None]).mean((1, 2))
        assert torch.allclose(found.loss[:, i], lost, atol=1e-4)
    plans.use()
    assert found.of(['high']).kl.shape == (5, 1) and logits(plans.model).isfinite().all()


def test_reasons_add_up():
    router = router_of()
    x, extra = router.signals(PROMPTS[:, :12]), costs().kl - costs().kl[:, :1]
    for net in (router.net, Ridge(x, extra, 1.), Ridge(x, extra, .1, 1.)):
        router.net = net
        why = router.explain(LOW[:1, :12], 'low', steps=64)
        assert abs(float(why.adds.sum()) - (why.gain - why.base)) < 1e-3 and len(why.top(3)) == 3 and why.gain > 0


def test_refused():
    plans = plans_of()
    for bad, message in ((dict(fallback='x'), "fallback='x'"), (dict(layers=1), 'all plans share'), (dict(margin=-1.), 'margin')):
        with pytest.raises(ValueError, match=message): AdaptiveRouter(plans, **bad)
    router = AdaptiveRouter(plans)
    with pytest.raises(RuntimeError, match='fit'): router.generate(LOW[:1])
    with pytest.raises(ValueError, match='20 or more'): router.fit(LOW[:5])
    with pytest.raises(ValueError, match='seen=16: allowed is 1 to 15'): router.fit(LOW, seen=16)
    with pytest.raises(ValueError, match='at least one token'): router_of().choose(torch.zeros(1, 0, dtype=torch.long))


def no_names(state): state['names'] = state['names'][::-1]
def other_fallback(state): state['fallback'] = 'no such plan'
def other_shape(state): state['net']['alpha'] = state['net']['alpha'][:-1]
def not_finite(state): state['net']['bias'][0] = float('nan')
def newer(state): state['sentinel_router'] = 99


@pytest.mark.parametrize('change', [no_names, other_fallback, other_shape, not_finite, newer])
def test_files(change, tmp_path):
    router = router_of()
    router.save(tmp_path/'router')
    again = AdaptiveRouter.load(tmp_path/'router', adapt(made('llama')))
    assert names(again, PROMPTS) == names(router, PROMPTS) and again.headroom == router.headroom
    state = read_state(tmp_path/'router')
    change(state)
    write_state(tmp_path/'router', state)
    with pytest.raises(ValueError, match='sentinel_state.json'): AdaptiveRouter.load(tmp_path/'router', adapt(made('llama')))

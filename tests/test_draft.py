"""A model that drafts for itself: the same text on the architecture matrix, from every state, and nothing of the model changed."""
import gc

import pytest
import torch
from sentinel_ai import (Agency, HeadMemory, UnsupportedArchitecture, adapt, compact, elastic, load_adaptive_model, prune, random_model, resize,
                         set_gates, unprune)
from sentinel_ai.draft import (acceptance, draft_of, expected_speedup, open_own, own_bytes, own_names, set_proposals, stale, undraftable)
from sentinel_ai.recovery import recover, recovery_args
from sentinel_ai.site import model_size, own_parameters
from test_matrix import EXPERTS, LISTED_ALL, SAYS_LAYOUT, VARIANTS

torch.set_num_threads(1)
CALIB = (torch.arange(8*24).remainder(53) + torch.arange(8*24)//7 % 31 + 3).view(8, 24)
IDS = torch.tensor([[5, 17, 33, 8, 21, 40]])
REFUSED = ['jamba', 'recurrent_gemma', 'qwen3_next', 'openai-gpt', 'minimax']
NAMES = [*LISTED_ALL, 'bart', 'deepseek_v2', 'lfm2', 'glm4', 'modernbert-decoder', *(EXPERTS if SAYS_LAYOUT else [])]


def made(name='llama'):
    kind, more = VARIANTS.get(name, (name, {}))
    return random_model(kind, **more)


def family_model(name='llama', least=.85):
    m = made(name)
    elastic(m, CALIB, least, rounds=1, progress=False)
    return m


def written(m, draft=None, new=14, **how):
    helped = {} if draft is None else dict(assistant_model=draft)
    how = dict(do_sample=False, max_new_tokens=new, use_cache=True, attention_mask=torch.ones_like(IDS)) | how
    return m.generate(IDS, **helped, **how)


def held(m): return {n: (p, p.data_ptr(), p._version, p.clone()) for n, p in m.named_parameters()}


def same(m, before):
    "The same parameters, at the same place, never written."
    now = dict(m.named_parameters())
    return now.keys() == before.keys() and all(
        now[n] is p and p.data_ptr() == at and p._version == v and torch.equal(p, old) for n, (p, at, v, old) in before.items())


@pytest.mark.parametrize('name', [n for n in NAMES if n not in REFUSED])
def test_the_same_text_on_the_matrix(name):
    m = family_model(name, .92)
    before, alone = held(m), written(m)
    draft = draft_of(m, .94)
    assert same(m, before)
    rounds, hook = [], m.register_forward_pre_hook(lambda *_: rounds.append(1))
    assert torch.equal(written(m, draft), alone)
    hook.remove()
    assert len(rounds) <= alone.shape[1] - IDS.shape[1]
    assert model_size(draft) <= .94*model_size(m) and not any(p.requires_grad for p in draft.parameters())
    shared = set(own_parameters(draft)) - set(own_names(draft, m))
    mine = dict(m.named_parameters())
    assert shared and all(torch.equal(draft.get_parameter(n), mine[n]) for n in shared)


@pytest.mark.parametrize('name', REFUSED)
def test_refused_where_transformers_refuses(name):
    m = made(name)
    assert undraftable(m)
    with pytest.raises(UnsupportedArchitecture, match='write without a draft'): draft_of(m, .9, CALIB)
    with pytest.raises((ValueError, RuntimeError, AttributeError)): written(m, made('llama'))


STATES = ['plain', 'adapted', 'masked', 'compact', 'resized']
FROM = [('llama', state) for state in STATES] + list(zip(['gpt2', 'phi3', 'gpt_oss', 'gpt2', 'bloom'], STATES))


@pytest.mark.parametrize('name, state', FROM)
def test_from_every_state(name, state):
    m = made(name)
    if state == 'adapted': adapt(m)
    if state in ('masked', 'compact'): prune(m, params=.95, batches=CALIB, rounds=1, progress=False)
    if state == 'compact': compact(m)
    if state == 'resized':
        elastic(m, CALIB, .8, rounds=1, progress=False)
        resize(m, params=.95)
    kind, before, alone = type(m), held(m), written(m)
    draft = draft_of(m, .86, None if state == 'resized' else CALIB, **({} if state == 'resized' else dict(rounds=1)))
    assert type(m) is kind and same(m, before)
    assert torch.equal(written(m, draft), alone)
    assert model_size(draft) < model_size(m) and own_bytes(draft, m) > 0
    if state == 'resized':
        with pytest.raises(ValueError, match='give a lower budget'): draft_of(m, .97)


def test_calls_are_counted():
    m = family_model()
    draft, calls = draft_of(m, .87), []
    hooks = [who.register_forward_pre_hook(lambda who, *_: calls.append(who is m)) for who in (m, draft)]
    found = acceptance(m, draft, [IDS, IDS[0, 1:]], 14)
    for hook in hooks: hook.remove()
    assert (found.rounds, found.proposed) == (calls.count(True), calls.count(False))
    assert found.accepted + found.rounds == found.tokens <= 28 and found.refused < found.rounds


def test_likeliest_of_one_is_greedy():
    m = family_model()
    draft = draft_of(m, .87)
    assert torch.equal(written(m, draft, do_sample=True, top_k=1), written(m))
    assert written(m, draft, do_sample=True, temperature=1.5).shape[1] <= IDS.shape[1] + 14
    for how in ((1, 'constant', 0.), (4, 'heuristic', 0.), (8, 'heuristic_transient', .5)):
        assert torch.equal(written(m, set_proposals(draft, *how)), written(m))


def test_a_draft_between_forward_and_backward():
    m = family_model()
    m.requires_grad_(True)
    loss = m(IDS, labels=IDS).loss
    draft = draft_of(m, .87)
    loss.backward()                                      # no weight was written in between
    assert m.model.norm.weight.grad is not None and draft.model.norm.weight.grad is None


def test_stale_but_right():
    m = family_model()
    draft = draft_of(m, .87)
    first = {n: p.clone() for n, p in draft.named_parameters()}
    assert stale(draft) == ''
    optimizer = torch.optim.SGD(m.parameters(), lr=.05)
    m.requires_grad_(True)(IDS, labels=IDS).loss.backward()
    optimizer.step()
    own = own_names(draft, m)
    moved = {n for n, p in draft.named_parameters() if not torch.equal(p, first[n])}
    assert 'written or replaced since' in stale(draft) and moved and not moved & set(own)
    assert torch.equal(written(m, draft), written(m))
    again = draft_of(m, .87)
    assert stale(again) == ''
    resize(m, params=.95)
    assert 'cut' in stale(again) and torch.equal(written(m, again), written(m))
    last = {n: p.clone() for n, p in again.named_parameters()}
    unprune(m)
    assert torch.equal(written(m, again), written(m))
    assert all(torch.equal(p, last[n]) for n, p in again.named_parameters())
    del m, optimizer
    gc.collect()
    assert 'not known, or gone' in stale(again)


def test_what_watches_the_model_sees_nothing():
    m = family_model()
    memory, agency = HeadMemory(), Agency()
    for watcher in (memory, agency): watcher.attach(m)
    told = repr(memory), repr(agency)
    alone = written(m)
    draft = draft_of(m, .87)
    assert m.sentinel.memory is memory and m.sentinel.agency is agency
    assert draft.sentinel.memory is None and draft.sentinel.agency is None and draft.sentinel.family is None
    assert (repr(memory), repr(agency)) == told
    assert torch.equal(written(m, draft), alone)


def test_it_takes_no_more_than_it_says(tmp_path):
    m = family_model()
    draft = draft_of(m, .87)
    kept = sum(p.nbytes for p in own_parameters(draft).values())
    cut = sum(part.nbytes for r in draft.sentinel.stash.values() for _, part in r['parts'])
    assert cut == 0 and own_bytes(draft, m) < kept
    with pytest.raises(RuntimeError): unprune(draft)     # a draft is never made whole
    draft.save_pretrained(tmp_path)
    again = load_adaptive_model(str(tmp_path))
    assert torch.equal(again(IDS).logits, draft(IDS).logits) and 'not known' in stale(again)
    assert torch.equal(written(m, again.eval()), written(m))


def test_a_draft_learns_from_what_it_shares(tmp_path):
    m = family_model()
    before, draft = held(m), draft_of(m, .87)
    data = {part: [dict(input_ids=row, labels=row) for row in CALIB.tolist()] for part in ('train', 'validation')}
    args = recovery_args(draft, str(tmp_path), max_steps=4, disable_tqdm=True, use_cpu=True)
    with pytest.raises(ValueError, match='open_own'): recover(draft, data, args, teacher=m)
    with pytest.raises(ValueError, match='open_own'): recover(open_own(draft, m), data, args, teacher=m, lora=2)
    found = recover(draft, data, args, teacher=m)
    assert same(m, before) and found.model is draft and stale(draft) == ''
    assert {n for n, p in draft.named_parameters() if p.requires_grad} == set(own_names(draft, m))
    assert torch.equal(written(m, draft), written(m))


def test_said_before_anything_is_pruned():
    m = family_model()
    before = held(m)
    for wrong, says in ((dict(params=.5), 'lower least='), (dict(params=.9, tokens=0), 'tokens=0'), (dict(params=1.), 'lower budget'),
                        (dict(params=.9, flops=.9), 'give one of'), (dict(params=.9, rounds=2), 'without text'),
                        (dict(params=float('nan')), 'finite')):
        with pytest.raises(ValueError, match=says): draft_of(m, **wrong)
    with pytest.raises(ValueError, match='without a family'): draft_of(made(), .9)
    with pytest.raises(ValueError, match='2 prompts at once'): acceptance(m, draft_of(m, .87), [IDS.repeat(2, 1)])
    set_gates(m, {(0, 0): 0.})
    draft_of(m, .87)                                    # closed by hand: opened in the draft, still closed in the model
    assert float(m.sentinel.now.heads[0].module.sentinel.gate[0]) == 0.
    set_gates(m, {(0, 0): 1.})
    assert {n for n, *_ in before.items()} == {n for n, _ in m.named_parameters()}
    with pytest.raises(ValueError, match='cost='): expected_speedup(.5, 3, -1)

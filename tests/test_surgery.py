"""Real removal on the architecture matrix: compact equals masked, expand is its inverse, and what else a compacted model must do.

`pytest tests/test_surgery.py -k llama` runs one architecture.
"""
import copy
import importlib
import json
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING
from sentinel_ai import GateConfig, UnsupportedArchitecture, adapt, gate_values, head_map, merge_gates, set_gates, unadapt, unmerge_gates, unprune
from sentinel_ai.budget import closed_share, gate_penalty, harden_gates
from sentinel_ai.choose import lowest
from sentinel_ai.heads import core_linear, head_cost
from sentinel_ai.surgery import HeadPlan, compact, expand
from sentinel_ai.room import replay
from sentinel_ai.testing import cache_of, random_model

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import ALL, IDS, LISTED_ALL, SEED, build, greedy, logits, spread  # noqa: E402

torch.set_num_threads(1)
# Where a norm or a mask is made of all heads, rows of queries, keys and values stay: exact, but only columns of the output projection leave
COLUMNS = {'bitnet', 'diffllama'}
STAY = COLUMNS | {'olmo2', 'olmoe'}        # with no head left nothing stays, so more parameters leave than heads cost


def uneven(model, seed=0, empty=None):
    "Close heads at random, unevenly; `empty` names a layer (first or last) that loses all."
    hm = head_map(model)
    t, gen = hm.table(), torch.Generator().manual_seed(seed)
    pick, layers = torch.rand(t.shape, generator=gen) < .45, [s.layer for s in hm]
    for s in hm:
        if pick[s.layer, :s.n_heads].all(): pick[s.layer, 0] = False
    if empty is not None and len(layers) > 1: pick[layers[empty]] = True
    if not pick[~t.isnan()].any(): pick[layers[0], 1] = True
    return torch.where(t.isnan(), t, torch.where(pick, 0., 1.))


def masked(name, seed=0, empty=None, dtype=torch.float32):
    model = adapt(build(name, dtype))
    return set_gates(model, uneven(model, seed, empty))


def lopsided(name):
    "Close one head of the first group in each layer, so that the groups differ in size."
    model = adapt(build(name))
    set_gates(model, {(s.layer, 1): 0. for s in model.sentinel.now.heads})
    return model


def padded():
    ids, mask = torch.cat([IDS, IDS.roll(3, 1)]), torch.ones(2, IDS.shape[1], dtype=torch.long, device=IDS.device)
    ids[1, :4], mask[1, :4] = 0, 0
    return ids, dict(attention_mask=mask)


def n_params(m): return sum(p.numel() for p in m.parameters())


def state(m): return {k: v.clone() for k, v in m.state_dict().items()}


def same_state(a, b): return list(a) == list(b) and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


def close(a, b, tol=1e-5):
    scale = b.float().abs().max()
    assert (a.float() - b.float()).abs().max() <= tol*scale, f'off by {(a.float()-b.float()).abs().max()/scale:.1e}'


def attributes(m):
    "Numbers and hooks of all modules, to see that nothing is left behind."
    return {n: ({k: v for k, v in vars(x).items() if type(v) in (int, bool, str, float)}, len(x._forward_hooks), len(x._forward_pre_hooks),
                sorted(x._modules), id(getattr(x, 'config', None)), 'forward' in vars(x)) for n, x in m.named_modules()}


@pytest.mark.parametrize('name,how,seed,empty', spread(ALL, [('uneven', 0, None), ('first-layer-empty', 1, 0), ('last-layer-empty', 2, -1)]))
def test_compact_equals_masked_and_back(name, how, seed, empty):
    model = masked(name, seed, empty)
    ids, kw = padded()
    want, tokens, sd, before = logits(model), greedy(model, ids, **kw), state(model), attributes(model)
    cost, n = {s.layer: head_cost(s) for s in model.sentinel.now.heads}, n_params(model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plan = compact(model)
    close(logits(model), want)
    assert torch.equal(greedy(model, ids, **kw), tokens)
    gone = sum(a*(int(e.sum()) - h) + b*(k0 - k) for e, h, k0, k, (a, b) in
               zip(plan.exists, plan.heads(), plan.kv, plan.kv_heads(), [cost.get(l, (0, 0)) for l in range(len(plan.keep))]))
    left = n - n_params(model) - plan.removed          # a gate leaves with each head
    assert left == gone if name not in STAY or empty is None else left >= gone
    assert (plan.columns != []) == (name in COLUMNS)
    assert expand(model) is model and same_state(state(model), sd) and attributes(model) == before
    assert torch.equal(logits(model), want) and not model.sentinel.compact


@pytest.mark.parametrize('name', LISTED_ALL)
def test_bfloat16(name):
    model = masked(name, 3, dtype=torch.bfloat16)
    want, sd = logits(model), state(model)
    compact(model)
    close(logits(model), want, 2e-2)
    assert same_state(state(expand(model)), sd)


def cache_bytes(model):
    layers = cache_of(model(IDS, use_cache=True)).layers
    return [sum(t.numel()*t.element_size() for t in (x.keys, x.values)) for x in layers]


@pytest.mark.parametrize('name', ['gpt2', 'bloom', 'gpt_neox', 'llama', 'falcon-new', 'mpt', 'phi3', 'olmo2', 'gpt_bigcode'])
def test_the_cache_shrinks(name):
    model = masked(name, 2, 0)
    full, cost = cache_bytes(model), {s.layer: head_cost(s, 'kv_bytes') for s in model.sentinel.now.heads}
    plan = compact(model)
    now = cache_bytes(model)
    for l, (a, b) in cost.items():
        assert full[l] == IDS.numel()*(a*int(plan.exists[l].sum()) + b*plan.kv[l])
        assert now[l] == IDS.numel()*(a*plan.heads()[l] + b*plan.kv_heads()[l])
    assert now[0] == 0 and cache_of(model(IDS, use_cache=True)).get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize('empty', [None, 0])
@pytest.mark.parametrize('name', SEED + ['mistral', 'falcon-new', 'gemma3_text'])
def test_generation_variants(name, empty):
    "Static cache, beams, sampling and assisted generation give the masked model's tokens."
    model = masked(name, 1, empty)

    def runs():
        torch.manual_seed(0)
        static = () if name in ('bloom', 'falcon-new') else (greedy(model, cache_implementation='static'),)
        ids, kw = padded()
        return greedy(model, num_beams=2), greedy(model, assistant_model=draft), *static, \
            model.generate(ids, max_new_tokens=5, do_sample=True, pad_token_id=0, eos_token_id=None, **kw)
    draft = build(name, seed=1)
    want = runs()
    compact(model)
    for a, b in zip(runs(), want): assert torch.equal(a, b)


@pytest.mark.parametrize('name', SEED + ['falcon-new', 'codegen', 'olmo2', 'bitnet', 'deepseek_v3'])
def test_again(name):
    "Compacting twice is compacting once, in the original's numbering; gates of what stays keep their values."
    model = masked(name, 1)
    sd, first = state(model), HeadPlan.from_gates(model)
    compact(model)
    v = gate_values(model)
    s = next(s for s in model.sentinel.now.heads if s.n_heads > 1)
    v[s.layer, 0] = 0
    if s.n_heads > 2: v[s.layer, 1] = .5
    set_gates(model, v)
    want = logits(model)
    plan = compact(model)
    close(logits(model), want)
    assert plan.removed == first.removed + 1 and torch.equal(plan.keep, plan.keep & first.keep)
    kept = gate_values(model)
    assert (kept[~kept.isnan()] != 0).all() and torch.equal(plan.compact(plan.full(kept)).nan_to_num(-1), kept.nan_to_num(-1))
    once = set_gates(adapt(build(name)), plan.full(kept).nan_to_num(0))
    compact(once)
    assert same_state(state(model), state(once)) and plan.keep.equal(once.sentinel.plan.keep)
    expand(model)
    assert all(torch.equal(a, sd[k]) for k, a in state(model).items() if '.sentinel.' not in k)


@pytest.mark.parametrize('name', SEED + ['phi3', 'gpt_oss', 'deepseek_v3', 'olmo2'])
def test_optimizer_and_training(name):
    "Moments are cut and come back; what is trained while compact is kept; one step is the masked model's step."
    model, ids = masked(name, 1), IDS
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3, weight_decay=0.)

    def step(m, o):
        o.zero_grad()
        m(ids, labels=ids).loss.backward()
        o.step()
    step(model, opt)
    twin = copy.deepcopy(model)
    topt = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, eps=1e-3, weight_decay=0.)
    topt.load_state_dict(copy.deepcopy(opt.state_dict()))
    where = {p: n for n, p in model.named_parameters()}
    moments = {where[p]: {k: v.clone() for k, v in s.items()} for p, s in opt.state.items()}
    compact(model, optimizer=opt)
    assert all(s['exp_avg'].shape == p.shape for p, s in opt.state.items())
    untouched = copy.deepcopy(model)
    expand(untouched)
    step(model, opt)
    small = state(model)
    plan = copy.deepcopy(model.sentinel.plan)
    expand(model, optimizer=opt)
    step(twin, topt)
    moved = 0
    for (n, p), q in zip(model.named_parameters(), untouched.parameters()):
        if '.sentinel.' in n: continue
        assert p.shape == q.shape and (p in opt.state) and opt.state[p]['exp_avg'].shape == p.shape
        moved += int((p != q).sum())
    assert moved > 0
    close(logits(model), logits(twin), 1e-3)
    assert not same_state(small, state(untouched)) and plan.removed > 0
    for s in head_map(model):                       # columns of a removed head: weights and moments as they were before
        w, gone = core_linear(s.out).weight, [h for h in range(s.n_heads) if not plan.keep[s.layer, h]]
        dim, name_ = (0 if type(core_linear(s.out)).__name__ == 'Conv1D' else 1), where[w]
        old = dict(untouched.named_parameters())[name_]
        for h in gone:
            pick = (s.cols(h),) if dim == 0 else (slice(None), s.cols(h))
            assert torch.equal(w[pick], old[pick]) and torch.equal(opt.state[w]['exp_avg'][pick], moments[name_]['exp_avg'][pick])
    step(model, opt)


@pytest.mark.parametrize('name', SEED + ['falcon-new', 'bitnet', 'olmo2', 'codegen', 'bert', 'qwen3_next'])
def test_deepcopy_and_pickle(name):
    model = masked(name, 1, 0)
    sd = state(model)
    compact(model)
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want) and twin.sentinel.plan == model.sentinel.plan
        with torch.no_grad(): next(iter(twin.sentinel.now.heads)).attn.sentinel.gate.mul_(.5)
        assert torch.equal(logits(model), want) and not torch.equal(logits(twin), want), 'a copy shares something with the original'
        with torch.no_grad(): next(iter(twin.sentinel.now.heads)).attn.sentinel.gate.div_(.5)
        assert same_state(state(expand(twin)), sd)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize('name', ALL)
def test_replay_on_meta(name):
    "An empty model of the original size takes the plan's shape; the compact weights then fit and give the same logits."
    model = masked(name, 4, 0)
    sd = state(model)
    compact(model)
    want, plan = logits(model), HeadPlan.from_dict(json.loads(json.dumps(model.sentinel.plan.to_dict())))
    assert plan == model.sentinel.plan
    with torch.device('meta'): empty = replay(type(model).__mro__[2](copy.deepcopy(model.config)), plan)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    real = replay(build(name, seed=1), plan)
    real.load_state_dict(state(model), assign=True)
    assert torch.equal(logits(real.eval()), want) and real.sentinel.plan == plan
    with pytest.raises(RuntimeError, match="weren't saved"): expand(real)
    twin = copy.deepcopy(real)
    twin.sentinel.stash = copy.deepcopy(model.sentinel.stash)      # if what left was saved as well, it can come back
    assert same_state(state(expand(twin)), sd)
    v = gate_values(real)
    s = next(s for s in real.sentinel.now.heads if s.n_heads > 1) if any(s.n_heads > 1 for s in real.sentinel.now.heads) else None
    if s is not None:
        v[s.layer, 0] = 0
        want = logits(set_gates(real, v))
        compact(real)
        close(logits(real), want)


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'gpt_neox', 'opt'])
@pytest.mark.parametrize('empty', [None, 0])
def test_export(name, empty):
    model = lopsided(name) if empty is None else masked(name, 1, empty)
    compact(model)
    if name == 'llama' and empty is None: assert model.sentinel.now.heads[0].kv == (0, 1, 1)
    program = torch.export.export(model, (IDS,), dict(use_cache=False), strict=False)
    close(program.module()(IDS, use_cache=False).logits, logits(model, use_cache=False))


@pytest.mark.parametrize('name', ['llama', 'mistral', 'gpt_oss', 'gemma2'])
def test_attention_implementations(name):
    "Uneven groups run under whatever implementation the config names at the moment."
    model = lopsided(name)
    want = logits(model)
    compact(model)
    assert model.sentinel.now.heads[0].kv == (0, 1, 1)
    for impl in ('eager', 'sdpa') if name in ('llama', 'mistral') else ('eager',):
        model.set_attn_implementation(impl)
        close(logits(model), want)


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_compiles_in_one_graph(name):
    model = lopsided(name)
    compact(model)
    torch._dynamo.reset()
    with torch.no_grad(): got = torch.compile(model, backend='eager', fullgraph=True, dynamic=False)(IDS, use_cache=False).logits
    close(got, logits(model))


@pytest.mark.parametrize('name', ['llama', 'qwen2', 'falcon-new', 'phi3', 'gpt_oss', 'olmo2', 'qwen3_next', 'recurrent_gemma'])
def test_uneven_groups(name):
    "Groups of different size: each query head reads the KV head that it read before."
    model = lopsided(name)
    ids, kw = padded()
    want, tokens = logits(model), greedy(model, ids, **kw)
    compact(model)
    assert next(iter(model.sentinel.now.heads)).kv == (0, 1, 1)
    close(logits(model), want)
    assert torch.equal(greedy(model, ids, **kw), tokens)


@pytest.mark.parametrize('name', SEED + ['falcon-new', 'bitnet', 'jamba'])
def test_gates_work_on_a_compact_model(name):
    model = masked(name, 1, 0)
    compact(model)
    hm = model.sentinel.now.heads
    assert head_map(model) is hm and gate_values(model).shape == hm.shape
    want = logits(model)
    t = hm.table()
    t[next(iter(hm)).layer, 0] = .37
    gated = logits(set_gates(model, t))
    merge_gates(model)
    torch.testing.assert_close(logits(model), gated, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(unmerge_gates(model)), gated)
    for unit in ('heads', 'params'): assert 0 < closed_share(model, unit) < 1
    set_gates(model, 1.)
    assert closed_share(model, 'params') == 0 and torch.equal(logits(model), want)
    for unit in ('heads', 'params'): assert lowest(hm, hm.table(), .5, unit).any()
    cfg = GateConfig('hard_concrete', sparsity=.5)
    adapt(model, cfg)
    gate_penalty(model).backward()
    harden_gates(model)
    assert 0 < closed_share(model) < 1
    unadapt(set_gates(model, 1.))
    assert torch.equal(logits(model), want)
    adapt(model)
    assert torch.equal(logits(model), want) and head_map(model).n_heads == hm.n_heads
    expand(model)
    assert head_map(model).n_heads == head_map(build(name)).n_heads


def test_what_is_refused():
    model = adapt(build('llama'))
    with pytest.raises(RuntimeError, match='no head of this model was removed'): expand(model)
    with pytest.raises(TypeError, match='has no gates'): compact(build('llama'))
    plan = HeadPlan.from_gates(model)
    plan.keep[0, 1] = False
    with pytest.raises(ValueError, match='layer 0 head 1, whose gate is 1'): compact(model, plan)
    set_gates(model, 0.)
    with pytest.raises(ValueError, match='leaves none of 8 heads'): compact(model)
    set_gates(model, {(0, 0): 1., (1, 1): 1.})
    merge_gates(model)
    with pytest.raises(RuntimeError, match='unmerge_gates'): compact(model)
    unmerge_gates(model)
    adapt(model, GateConfig('learned'))
    with pytest.raises(RuntimeError, match='harden_gates'): compact(model)
    adapt(model, GateConfig())
    with pytest.raises(ValueError, match='gpt2'): compact(model, HeadPlan.from_gates(adapt(build('gpt2'))))
    opt = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    opt.step()
    sd = state(model)
    with pytest.raises(ValueError, match='row_var'): compact(model, optimizer=opt)
    assert same_state(state(model), sd) and not model.sentinel.compact
    before = compact(model)
    with pytest.raises(ValueError, match='layer 0 head 1, which was removed before'): compact(model, HeadPlan(before.exists, before.exists, before.kv, 'llama'))
    with pytest.raises(RuntimeError, match='already'): replay(model, before)
    d = before.to_dict()
    with pytest.raises(ValueError, match='version 99'): HeadPlan.from_dict(d | dict(version=99))
    with pytest.raises(ValueError, match='lacks'): HeadPlan.from_dict({k: v for k, v in d.items() if k != 'removed'})
    with pytest.raises(ValueError, match='head 7 of layer 1'): HeadPlan.from_dict(d | dict(removed=[[], [7]]))
    with pytest.raises(ValueError, match='6'): replay(build('llama-mqa'), HeadPlan.from_dict(d | dict(kv_heads=[6, 6])))


def test_a_difference_is_noticed_and_undone(monkeypatch):
    "If a layer doesn't compute what it did, its rows stay; if that doesn't help either, all is as before."
    from sentinel_ai import heads
    resize = importlib.import_module('sentinel_ai.resize')         # the name is that of a function, too
    model = masked('llama', 1)
    want, sd = logits(model), state(model)
    rows = resize._kept_rows
    monkeypatch.setattr(resize, '_kept_rows', lambda *a: rows(*a).flip(0))
    with pytest.warns(UserWarning, match='only columns'): plan = compact(model)
    close(logits(model), want)
    assert plan.columns
    expand(model)
    real = heads.AttnSite.places
    monkeypatch.setattr(heads.AttnSite, 'places', lambda site, keep, columns=False: {
        k: (d, n, i.flip(0) if 'o_proj' in k and len(keep) < site.n_heads else i) for k, (d, n, i) in real(site, keep, columns).items()})
    with pytest.raises(UnsupportedArchitecture, match='The model is as it was'): compact(model)
    assert same_state(state(model), sd) and torch.equal(logits(model), want) and not model.sentinel.compact


def test_adapters_and_layers_without_heads():
    peft = pytest.importorskip('peft')
    model = masked('bitnet', 1)
    compact(model)
    want = logits(model)
    cfg = peft.LoraConfig(task_type='CAUSAL_LM', target_modules=['q_proj', 'o_proj'], r=4)
    wrapped = peft.get_peft_model(model, cfg)
    assert torch.equal(wrapped(IDS).logits, want)
    with pytest.raises(RuntimeError, match='merge_and_unload'): compact(wrapped)


def test_layers_that_share_weights():
    kw = dict(num_hidden_layers=4, layer_types=['mamba', 'hybrid']*2, attn_layer_period=2, attn_layer_offset=1)
    model = adapt(random_model('zamba', **kw))
    set_gates(model, {(1, 0): 0.})
    with pytest.raises(UnsupportedArchitecture, match='layers 1 and 3 share q_proj.weight'): compact(model)
    set_gates(model, {(3, 0): 0.})
    want, sd, n = logits(model), state(model), n_params(model)
    compact(model)
    close(logits(model), want)
    assert n_params(model) < n and same_state(state(expand(model)), sd)


@pytest.mark.filterwarnings('ignore:.*only columns')
def test_unlisted_architectures():
    for name in [m for m in ('minimax_m2', 'hrm_text', 'whisper', 'trocr') if m in CONFIG_MAPPING]:
        model = adapt(random_model(name))
        want = logits(set_gates(model, uneven(model, 2, 0)))
        compact(model)
        close(logits(model), want)


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'bloom'])
def test_a_failure_half_way_is_undone(name, monkeypatch):
    "If a layer can't be shaped, those before it are as they were."
    from sentinel_ai import shaping
    model = masked(name, 1)
    want, sd, calls, real = logits(model), state(model), [], shaping.wire_attention
    def fail(s0, s1, keep, *args):
        if s0.layer == 1 and not calls: calls.append(1); raise MemoryError('no room')
        return real(s0, s1, keep, *args)
    monkeypatch.setattr(shaping, 'wire_attention', fail)
    with pytest.raises(MemoryError): compact(model)
    assert calls and torch.equal(logits(model), want) and same_state(state(model), sd) and not model.sentinel.compact
    compact(model)
    close(logits(model), want)


def test_a_loss_that_is_still_held():
    "In a plain training loop the last loss lives on while heads leave; the next backward pass finds the new shapes."
    model = adapt(build('llama')).train()
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward(); opt.step(); opt.zero_grad()
        if step == 1: set_gates(model, {(0, 1): 0.}); compact(model, optimizer=opt)
        if step == 2: expand(model, optimizer=opt)
    assert loss.isfinite()


def test_an_optimizer_that_was_given_once_moves_along():
    "Edits that aren't given the optimiser leave it fit for its next step; copies of the model know nothing of it."
    model = adapt(build('llama'))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)

    def train():
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    set_gates(model, {(0, 1): 0., (1, 2): 0.})
    set_gates(model, {(0, 3): 0.}, 'channels')
    compact(model, optimizer=optimizer)
    train()
    moments = {n: optimizer.state[p]['exp_avg'].clone() for n, p in model.named_parameters() if p in optimizer.state}
    twin = copy.deepcopy(model)
    expand(twin)
    assert twin.sentinel.link is None and all(torch.equal(optimizer.state[p]['exp_avg'], moments[n]) for n, p in model.named_parameters() if n in moments)
    expand(model)
    train()
    set_gates(model, 0., 'channels')
    compact(model)
    train()
    unprune(model)
    train()
    assert all(s['exp_avg'].shape == p.shape for p, s in optimizer.state.items())


def test_continuous_batching_is_refused_where_layers_lost_kv_heads():
    "Its cache has one number of KV heads for all layers: requests failed one by one, and came back empty."
    model = set_gates(adapt(random_model('llama')), {(1, 2): 0., (1, 3): 0.})
    compact(model)
    with pytest.raises(RuntimeError, match='layer 1 has 1 KV heads, and continuous batching makes a cache of 2'):
        model.generate_batch([[5, 6, 7]], progress_bar=False)
    expand(model)
    model.init_continuous_batching(generation_config=model.generation_config)

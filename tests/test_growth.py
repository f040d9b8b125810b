"""Growth on the architecture matrix: each architecture grows heads and layers without changing its output, or says that it can't.

`pytest tests/test_growth.py -k llama` runs one architecture.
"""
import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from sentinel_ai import UnsupportedArchitecture, adapt, close_heads, gate_values, head_map, measure, prune, set_gates, unadapt, unprune
from sentinel_ai.growth import flops_per_token, grow, init_small, strength, ungrow
from sentinel_ai.heads import head_cost
from sentinel_ai.testing import random_config, random_model
from sentinel_ai.surgery import HeadPlan, compact, expand, reattach
from sentinel_ai.room import replay
from sentinel_ai.stash import full_param
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import ALL, DEVICE, IDS, SEED, build, greedy, logits, spread  # noqa: E402

torch.set_num_threads(1)
# A norm over the width of all heads (q and k in OLMo 2 and OLMoE, the output in BitNet), two softmax maps for one head (DiffLlama)
NO_HEADS = {'olmo2', 'olmoe', 'bitnet', 'diffllama'}
# A norm after the sum, or a residual that is the normed input (MiniMax)
POST_NORM = {'bart', 'bert', 'roberta', 'openai-gpt', 'opt-post-norm', 'minimax'}
# Layers depend on their depth in a way that the config can't say (DiffLlama, MiniCPM 3, Jamba), or hold two attentions each (LongCat)
NO_LAYERS = POST_NORM | {'diffllama', 'minicpm3', 'jamba', 'longcat_flash'}
SOME = SEED + ['falcon-new', 'codegen', 'gpt_oss', 'deepseek_v3', 'mpt', 'phi3']


def state(m): return {k: v.clone() for k, v in m.state_dict().items()}


def same_state(a, b): return a.keys() == b.keys() and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


def close(a, b, tol=1e-5):
    off = (a.float() - b.float()).abs().max()/b.float().abs().max()
    assert off <= tol, f'off by {off:.1e}'


def reload(m, path):
    m.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


def everything_works(m, path):
    "Close, cut, bring back, generate, save and load."
    want, tokens, sd = logits(m), greedy(m), state(m)
    close(logits(reload(m, path/'grown')), want, 1e-6)
    v = gate_values(m)
    for s in m.sentinel.now.heads: v[s.layer, [0, s.n_heads-1]] = 0
    masked = logits(set_gates(m, v))
    plan = compact(m)
    close(logits(m), masked)
    small = reload(m, path/'small')
    close(logits(small), masked)
    assert small.sentinel.plan == plan == HeadPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    if plan.columns == []: assert m.sentinel.now.heads.n_params == sum(p.numel() for n, p in m.named_parameters() if '.sentinel.' not in n)
    expand(small)
    expand(m)
    close(logits(small), masked)
    set_gates(m, 1.)
    set_gates(m, torch.where(v == 0, 1., v))
    assert sd.keys() == m.state_dict().keys() and torch.equal(logits(m), want) and torch.equal(greedy(m), tokens)


@pytest.mark.parametrize('name,init', spread(ALL, ['split', 'zero']))
def test_heads(name, init, tmp_path):
    model = build(name)
    sd, want, tokens, params = state(model), logits(model), greedy(model), dict(model.named_parameters())
    n = {s.layer: s.n_heads for s in head_map(model)}
    if name in NO_HEADS:
        with pytest.raises(UnsupportedArchitecture, match='cannot get further heads'): grow(model, heads=1, init=init)
        assert same_state(state(model), sd) and torch.equal(logits(model), want)
        return
    assert grow(model, heads=1, init=init) is model
    if init == 'zero' and DEVICE == 'cpu': assert torch.equal(logits(model), want)
    else: close(logits(model), want, 1e-6)            # the kernel for another width may sum in another order
    assert {s.layer: s.n_heads for s in model.sentinel.now.heads} == {l: h + 1 for l, h in n.items()}
    assert all(p is params[k] for k, p in model.named_parameters() if '.sentinel.' not in k)
    assert torch.equal(greedy(model), tokens)
    everything_works(model, tmp_path)
    ungrow(model)
    assert torch.equal(logits(model), want) and not model.sentinel.compact
    assert same_state(state(unadapt(model)), sd)


@pytest.mark.parametrize('name', ALL)
def test_layers(name, tmp_path):
    model = build(name)
    sd, want, tokens, config = state(model), logits(model), greedy(model), model.config.to_dict()
    n, at = len(head_map(model)), [1] if name == 'modernbert-decoder' else [0, 1]      # its first layer has no norm before attention
    if name in NO_LAYERS:
        with pytest.raises(UnsupportedArchitecture, match='cannot get further layers'): grow(model, layers=at)
        assert same_state(state(model), sd) and torch.equal(logits(model), want) and model.config.to_dict() == config
        return
    grow(model, layers=at)
    assert len(head_map(model)) == n + len(at) and torch.equal(logits(model), want) and torch.equal(greedy(model), tokens)
    back = reload(model, tmp_path)
    assert type(back) is type(model) and same_state(state(back), state(model))
    close(logits(back), want, 1e-6 if name == 'llama-eager' else 0)                    # it is loaded with SDPA
    assert torch.equal(greedy(back), tokens)
    adapt(model)
    new = next((s for s in model.sentinel.now.heads if s.layer == at[0] + 1), None)
    if new is not None:
        set_gates(model, {(new.layer, 0): 0.})
        compact(model)
        close(logits(model), want)
        expand(model)
        assert torch.equal(logits(model), want)


@pytest.mark.parametrize('heads', [1, 2, 3, [0, 3], {1: 5}])
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'falcon-new', 'llama-mqa', 'gpt_oss'])
def test_amounts(name, heads, tmp_path):
    model = build(name)
    want = logits(model)
    grow(model, heads=heads)
    n = [s.n_heads for s in model.sentinel.now.heads]
    assert n == ([4, 7] if heads == [0, 3] else [4, 9] if isinstance(heads, dict) else [4 + heads]*2)
    close(logits(model), want, 1e-6)
    everything_works(model, tmp_path)


@pytest.mark.parametrize('name', SOME)
def test_again_and_on_a_compact_model(name, tmp_path):
    "Heads grow on a compact model, then again, then all returns in any order."
    model = adapt(build(name))
    sd = state(model)
    set_gates(model, {(s.layer, 1): 0. for s in model.sentinel.now.heads})
    masked = logits(model)
    compact(model)
    grow(model, heads=1, init='zero')
    close(logits(model), masked)
    grow(model, heads=2, seed=1)
    close(logits(model), masked)
    twin = reload(model, tmp_path)
    close(logits(twin), masked)
    expand(model)
    close(logits(model), masked)
    ungrow(model)
    assert torch.equal(logits(model), masked)
    ungrow(expand(twin))
    close(logits(twin), masked)
    set_gates(model, 1.)
    assert same_state(state(model), sd)


@pytest.mark.parametrize('name', SOME)
def test_ungrow_leaves_a_compact_model_compact(name):
    model = adapt(build(name))
    set_gates(model, {(s.layer, 2): 0. for s in model.sentinel.now.heads})
    masked, sd = logits(model), state(model)
    compact(model)
    small, plan = state(model), copy.deepcopy(model.sentinel.plan)
    ungrow(grow(model, heads=2))
    assert same_state(state(model), small) and model.sentinel.plan == plan
    assert same_state(state(expand(model)), sd) and torch.equal(logits(model), masked)


@pytest.mark.parametrize('init', ['split', 'zero'])
@pytest.mark.parametrize('name', SOME)
def test_training(name, init):
    "Moments are padded with zeros; both halves of a split head learn, and differently; the optimiser holds the very same parameters."
    model = adapt(build(name))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step():
        opt.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        opt.step()
        return loss.item()
    step()
    full = {n: full_param(model, n).clone() for n, _ in model.named_parameters()}
    moments = {p: s['exp_avg'].clone() for p, s in opt.state.items()}
    grow(model, heads=1, init=init, optimizer=opt)
    wider = [p for p in moments if p.shape != moments[p].shape]
    assert wider and all(opt.state[p]['exp_avg'].shape == p.shape for p in moments)
    assert all(abs(opt.state[p]['exp_avg'].double().sum() - moments[p].double().sum()) < 1e-4 for p in wider)
    note, s = model.sentinel.grown[0], next(iter(model.sentinel.now.heads))
    out = next(n for n in full if n.startswith(s.path) and n.endswith('.weight') and s.out_name in n)
    cols = lambda h: full_param(model, out).index_select(model.sentinel.stash[out]['dim'], torch.arange(h*s.head_dim, (h+1)*s.head_dim))
    before = cols(note['head']), cols(note['donor'])
    first, losses = step(), [step() for _ in range(10)]
    after = cols(note['head']), cols(note['donor'])
    assert losses[-1] < first and all((a != b).any() for a, b in zip(after, before))
    assert not torch.allclose(after[0] - before[0], after[1] - before[1], atol=1e-6)
    ungrow(model, optimizer=opt)
    assert all(p.shape == full[n].shape for n, p in model.named_parameters())
    assert all(opt.state[p]['exp_avg'].shape == p.shape for p in wider)
    step()


@pytest.mark.parametrize('name', SEED + ['falcon-new', 'deepseek_v3'])
def test_bfloat16_copies_and_pickles(name):
    model = build(name, torch.bfloat16)
    want = logits(model)
    grow(model, heads=1)
    close(logits(model), want, 3e-2)
    got = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), got)
        assert torch.equal(logits(ungrow(twin)), want)
    unadapt(model)
    assert torch.equal(logits(model), got) and torch.equal(logits(adapt(model)), got)


@pytest.mark.parametrize('name', SEED + ['falcon-new', 'gpt_oss', 'deepseek_v3'])
def test_replay_on_meta(name):
    model = grow(build(name), heads=3)
    plan = HeadPlan.from_dict(json.loads(json.dumps(model.sentinel.plan.to_dict())))
    with torch.device('meta'): empty = replay(type(build(name))(model.config), plan)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    real = replay(build(name, seed=1), plan)
    real.load_state_dict(state(model))
    assert torch.equal(logits(real), logits(model)) and real.sentinel.plan == plan == model.sentinel.plan


@pytest.mark.parametrize('name', SEED + ['falcon-new', 'gpt_oss'])
def test_measure_and_prune(name):
    model, texts = grow(build(name), heads=1), [IDS, IDS.roll(2, 1)]
    stats = measure(model, texts, what=('entropy', 'gradient', 'use'), progress=False)
    assert stats.entropy.shape == (2, model.sentinel.now.heads.shape[1]) and not stats.entropy[~gate_values(model).isnan()].isnan().any()
    plan = prune(model, .3, batches=texts, criterion='magnitude', progress=False)
    assert plan.removed > 0 and logits(model).isfinite().all()


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'falcon-new'])
def test_repair_is_taken_back_through_growth(name):
    model, texts = build(name), [IDS, IDS.roll(2, 1)]
    want = logits(model)
    prune(model, .3, batches=texts, criterion='magnitude', progress=False)
    compact(model)
    repaired = logits(model)
    grow(model, heads=1)
    close(logits(model), repaired)
    for name_, (old, new) in model.sentinel.repairs.changed.items(): assert torch.equal(new, full_param(model, name_))
    for _, r in model.sentinel.repairs.predictors.items(): assert r['T'].shape[0] == 5*model.sentinel.now.heads[0].head_dim
    ungrow(expand(model))
    close(logits(model), repaired)
    close(logits(unprune(model)), want)


@pytest.mark.parametrize('name', SOME)
def test_layers_of_a_compact_grown_model(name, tmp_path):
    "Plans, memory and optimisers speak in the new numbers; what had left a layer comes back in it."
    model = adapt(build(name))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=.1)
    set_gates(model, {(0, 1): 0., (1, 0): 0., (1, 2): 0.})
    masked = logits(model)
    compact(model)
    grow(model, heads={1: 1}, optimizer=opt)
    before = copy.deepcopy(model.sentinel.plan)
    grow(model, layers=[0], optimizer=opt)
    assert model.sentinel.plan.keep.equal(before.keep[[0, 0, 1]]) and [g[0] for g in model.sentinel.plan.grown] == [2]
    close(logits(model), masked)
    known = {id(p) for g in opt.param_groups for p in g['params']}
    assert all(id(p) in known for p in model.parameters() if p.requires_grad)
    twin = reload(model, tmp_path)
    close(logits(twin), masked)
    assert torch.equal(greedy(twin), greedy(model))
    reattach(model, [(1, 1)])
    close(logits(model), masked)
    expand(model)
    close(logits(set_gates(model, {(1, 1): 1.})), masked)      # in the copied layer it writes nothing, open or not
    close(logits(ungrow(model, opt)), masked)


def test_a_headless_layer_is_copied():
    model = set_gates(adapt(build('llama')), {(1, h): 0. for h in range(4)})
    want, tokens = logits(model), greedy(model)
    compact(model)
    grow(model, layers=[0, 1])
    close(logits(model), want)
    assert torch.equal(greedy(model), tokens) and [s is None for s in model.sentinel.now.heads.sites] == [False, False, True, True]
    expand(model)
    close(logits(model), want)


def test_gates_and_factors_are_kept():
    model = adapt(build('llama'))
    set_gates(model, {(0, h): .25 + h/8 for h in range(4)})
    want = logits(model)
    grow(model, heads=1)
    assert torch.allclose(gate_values(model)[0, :4], torch.tensor([.25, .375, .5, .625]))
    close(logits(model), want, 1e-6)


def test_scores_name_the_donor():
    model = adapt(build('gpt2'))
    t = strength(model)
    t[:, 2] = 1e9
    grow(model, heads=1, scores=t)
    assert [n['donor'] for n in model.sentinel.grown] == [2, 2]


def test_refusals_change_nothing():
    model = adapt(build('llama'))
    sd, want = state(model), logits(model)
    for error, match, kw in ((ValueError, 'either heads', {}), (ValueError, 'either heads', dict(heads=1, layers=[0])),
                             (ValueError, "'random'", dict(heads=1, init='random')), (ValueError, '2 layers', dict(heads=[1])),
                             (ValueError, 'whole number', dict(heads=-1)), (ValueError, 'no new heads', dict(heads=0)),
                             (IndexError, 'layer 7', dict(heads={7: 1})), (ValueError, 'layers 0 to 1', dict(layers=[2])),
                             (ValueError, 'shape', dict(heads=1, scores=torch.ones(1, 1)))):
        with pytest.raises(error, match=match): grow(model, **kw)
    with pytest.raises(RuntimeError, match='no heads of this model grew'): ungrow(model)
    set_gates(model, {(0, h): 0. for h in range(4)})
    with pytest.raises(ValueError, match='no open head'): grow(model, heads=1)
    set_gates(model, 1.)
    assert same_state(state(model), sd) and torch.equal(logits(model), want) and not model.sentinel.compact


def test_what_goes_wrong_is_undone(monkeypatch):
    import sentinel_ai.growth_heads as g
    model = adapt(build('llama'))
    sd, want = state(model), logits(model)
    monkeypatch.setattr(g, 'differing_layers', lambda *a: {('heads', 0): 'it is a test'})
    with pytest.raises(UnsupportedArchitecture, match='it is a test'): grow(model, heads=2)
    assert same_state(state(model), sd) and torch.equal(logits(model), want) and not model.sentinel.compact and model.sentinel.grown == []


@pytest.mark.parametrize('name', SEED + ['falcon', 'gpt_oss', 'bitnet', 'deepseek_v3', 'qwen3_next'])
def test_init_small(name, tmp_path):
    config = build(name).config
    model = init_small(config, keep=.25, seed=3)
    full = init_small(config, keep=1., seed=3)
    assert all(s.n_heads == max(1, s0.n_heads//4) for s, s0 in zip(model.sentinel.now.heads, full.sentinel.now.heads))
    assert flops_per_token(model) < flops_per_token(full)
    close(logits(reload(model, tmp_path)), logits(model), 1e-6)
    assert same_state(state(init_small(config, seed=3)), state(model))
    with pytest.raises(RuntimeError, match='blank=True'): reattach(model, [(next(iter(model.sentinel.now.heads)).layer, 1)])
    want = logits(model)
    reattach(model, [(s.layer, 1) for s in model.sentinel.now.heads], blank=True)
    close(logits(model), want)


@pytest.mark.parametrize('name', SEED + ['falcon', 'mixtral'])
def test_flops(name):
    "By hand: two for each weight of a matrix that a token meets, and what its heads do."
    m = build(name)
    hm, seen = head_map(m), []
    tall = flops_per_token(m, 100) - flops_per_token(m, 0)
    assert tall == sum(400*s.head_dim*s.n_heads for s in hm)
    lin = [x for x in m.modules() if type(x).__name__ in ('Linear', 'Conv1D', 'FalconLinear')]
    hooks = [x.register_forward_hook(lambda x, a, o: seen.append(2*x.weight.numel())) for x in lin]
    logits(m)
    for h in hooks: h.remove()
    if name != 'mixtral': assert abs(flops_per_token(m, 0)/sum(seen) - 1) < .05          # norms and biases besides
    adapt(m)
    (a, b), before = head_cost(hm.sites[0]), flops_per_token(m, 0)
    cost = a + b if hm.sites[0].group == 1 else a
    set_gates(m, {(0, 1): 0.})
    compact(m)
    assert flops_per_token(m, 0) == before - 2*cost


def test_sizes_from_a_name():
    model = init_small('gpt2', keep=.5, n_layer=1, n_head=4, n_embd=16, vocab_size=50)
    assert [s.n_heads for s in model.sentinel.now.heads] == [2] and model.config.n_embd == 16
    assert init_small(random_config('llama'), dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match='keep=0'): init_small('gpt2', keep=0)


@pytest.mark.parametrize('name', ['bloom', 'gpt2', 'llama', 'opt', 'gpt_neox'])
def test_a_layer_with_one_head_grows(name, tmp_path):
    "A single head shares its keys and values with nobody, and neither do those that grow beside it."
    heads = dict(n_head=1) if name in ('bloom', 'gpt2') else dict(num_attention_heads=1, num_key_value_heads=1)
    model = adapt(random_model(name, **heads))
    want = logits(model)
    grow(model, heads=2)
    close(logits(model), want)
    assert all(s.n_kv_heads == 3 for s in model.sentinel.now.heads)
    assert torch.equal(logits(reload(model, tmp_path)), logits(model))


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'opt'])
def test_repair_taken_back_after_growth(name):
    "Where growth changed nothing, a repair's first values come back bit for bit."
    plain = build(name)
    model = copy.deepcopy(plain)
    prune(model, 3, IDS, 'wanda', rounds=1, progress=False)
    grow(model, heads=1, init='zero')
    unadapt(ungrow(unprune(model)))
    assert same_state(state(model), state(plain))


@pytest.mark.parametrize('order', ['grow first', 'prune first', 'twice'])
@pytest.mark.parametrize('kind', ['heads', 'channels'])
@pytest.mark.parametrize('cut', [False, True])
def test_a_half_that_was_pruned_returns_after_ungrow(cut, kind, order):
    "Split, pruned with repair, `ungrow`, `unprune`: the model is what it was, whichever half was pruned."
    text = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(1))
    plain = random_model('llama')
    for which in (0, 1):
        model = adapt(copy.deepcopy(plain))
        def shrink(): prune(model, **(dict(params=.9) if kind == 'channels' else dict(amount=1)), batches=text, rounds=1, progress=False)
        if order == 'prune first': shrink()
        for _ in range(1 + (order == 'twice')): grow(model, **{kind: 1}, init='split')
        sites = model.sentinel.built.heads if kind == 'heads' else model.sentinel.built.channels
        site = next(s for s in sites if s.donors)
        pair = site.donors[0][0] if kind == 'heads' else site.donors[0], site.n - 1
        if kind == 'heads': close_heads(model, [(site.layer, pair[which])], text)
        else:
            shrink()
            set_gates(model, {(site.layer, model.sentinel.plan.channels.kept(site.layer).index(pair[which])): 0.}, kind)
        if cut: compact(model)
        unprune(ungrow(model))
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
        assert not [key for key in model.sentinel.repairs.predictors if key[1] >= 4]


def test_channels_where_a_whole_layer_of_them_is_gone():
    "That layer has none to take after, which is said; the others grow."
    model = adapt(random_model('llama'))
    set_gates(model, {(0, c): 0. for c in range(model.sentinel.built.channels[0].n)}, 'channels')
    compact(model)
    want = logits(model)
    with pytest.raises(ValueError, match='layer 0 has no open channel'): grow(model, channels=1)
    assert torch.equal(logits(model), want)
    grow(model, channels={1: 1}, init='zero')
    torch.testing.assert_close(logits(model), want)

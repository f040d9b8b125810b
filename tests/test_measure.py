"""Measuring on the whole architecture matrix: entropy against the model's own attention probabilities, gradients against real gates.

`pytest tests/test_measure.py -k llama` runs one architecture.
"""
import copy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import ALL, DEVICE, IDS, SEED, VARIANTS, build  # noqa: E402

from sentinel_ai import adapt, compact, random_model, set_gates  # noqa: E402
from sentinel_ai.channels import channel_map  # noqa: E402
from sentinel_ai.heads import core_linear, head_map, in_dim  # noqa: E402
from sentinel_ai.measure import HeadStats, measure, moments_bytes  # noqa: E402
from sentinel_ai.moments import input_sums  # noqa: E402

torch.set_num_threads(1)
TWO = torch.cat([IDS, IDS.roll(3, 1)])
HALVES = ['diffllama']  # returns each differential head's two maps as two heads


def eager(name):
    mt, kw = VARIANTS.get(name, (name, {}))
    return random_model(mt, **(kw | dict(attn_implementation='eager'))).to(DEVICE)


@torch.no_grad()
def naive(model, n_layers):
    "Entropy, distance and first share `[l][h]` from the probabilities that the eager model returns; None for layers that return none."
    res, att = [], model(TWO, output_attentions=True, use_cache=False).attentions
    att = [a for a in att if a is not None]
    for p in att:
        p = p.double()
        sink = 1 - p.sum(-1)  # gpt_oss lets part of the attention fall into a sink
        H = -(p*p.clamp_min(1e-300).log()).sum(-1) - torch.where(sink > 1e-5, sink*sink.clamp_min(1e-300).log(), 0.)
        t = torch.arange(p.shape[-1], device=p.device)
        res.append([x.cpu() for x in (H.mean((0, 2)), (p*(t[:, None] - t)).sum(-1).mean((0, 2)), p[..., 0].mean((0, 2)))])
    return res


@pytest.mark.parametrize('name', ALL)
def test_entropy_is_exact(name):
    model = eager(name)
    stats = measure(model, TWO, what='entropy', progress=False)
    layers = [l for l in range(stats.shape[0]) if not stats.entropy[l].isnan().all()]
    want = naive(model, stats.shape[0])
    if len(want) != len(layers): want = [want[l] for l in layers]  # layers without softmax attention return something too
    for l, tables in zip(layers, want):
        for name_, w in zip(('entropy', 'distance', 'sink'), tables):
            got = stats[name_][l]
            got = got[~got.isnan()]
            if name in HALVES: w = w.unflatten(0, (2, -1)).mean(0)
            assert (got - w).abs().max() < 1e-5, f'{name_} of layer {l}'


@pytest.mark.parametrize('name', ALL)
def test_kernels_agree(name):
    "SDPA and eager are measured alike wherever they compute alike."
    fast, slow = build(name), eager(name)
    with torch.no_grad():
        if not torch.allclose(fast(TWO).logits, slow(TWO).logits, atol=1e-5): pytest.xfail('SDPA and eager give other logits in transformers itself')
    a, b = (measure(m, TWO, what='entropy', progress=False) for m in (fast, slow))
    torch.testing.assert_close(a.entropy, b.entropy, rtol=0, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(a.curves['entropy'], b.curves['entropy'], rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize('name', ALL)
def test_gradients_are_those_of_the_gates(name):
    "Virtual gates give what autograd through real ones gives, closed heads included; weights get no gradient, the model stays as it was."
    model = adapt(build(name))
    first = next(iter(model.sentinel.now.heads))
    set_gates(model, {(first.layer, 0): 0., (first.layer, 1): .5})
    flags = [p.requires_grad for p in model.parameters()]
    stats = measure(model, TWO, what=('gradient', 'gram', 'joint'), progress=False)
    assert all(p.grad is None for p in model.parameters()) and [p.requires_grad for p in model.parameters()] == flags
    gates = {s.layer: s.attn.sentinel.gate for s in model.sentinel.now.heads}
    for g in gates.values(): g.requires_grad_(True)
    total = {l: torch.zeros_like(g) for l, g in gates.items()}
    for row in TWO:
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        grads = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, row[1:]), list(gates.values()))
        for l, g in zip(gates, grads): total[l] += g.square()/2
    for l, t in total.items(): torch.testing.assert_close(stats.fisher[l, :len(t)], t.cpu(), rtol=2e-3, atol=1e-9)
    assert stats.pairs.isfinite().all() and all(stats[k].isfinite().sum() == model.sentinel.now.heads.n_heads for k in stats.tables)


@pytest.mark.parametrize('name', SEED + ['mistral', 'gemma2', 'falcon', 'mpt', 'gpt_oss', 'qwen3_next', 'gpt_neo', 'gpt_bigcode'])
def test_padding_counts_for_nothing(name):
    "Padding on either side changes no table; batches of one give what a batch of two gives."
    model = build(name)
    want = measure(model, TWO, progress=False)
    wide = [dict(input_ids=pad(TWO, side), attention_mask=pad(torch.ones_like(TWO), side)) for side in ((0, 5), (5, 0))]
    for got in (*(measure(model, x, progress=False) for x in wide), measure(model, TWO, batch_size=1, progress=False)):
        for k in want.tables: torch.testing.assert_close(got[k], want[k], rtol=1e-3, atol=1e-5, equal_nan=True, msg=k)


@pytest.mark.parametrize('name', SEED)
def test_measuring_changes_nothing(name):
    model = build(name).train()
    sd, hooks = copy.deepcopy(model.state_dict()), sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    measure(model, TWO, what=('entropy', 'gradient', 'gram', 'attribution', 'joint'), steps=2, progress=False)
    assert model.training and all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, sd[k]) for k, v in model.state_dict().items())
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize('name', ['llama', 'qwen3', 'gpt2', 'bloom'])
def test_compact_models_are_measured_like_masked_ones(name):
    "Heads that are left attend as they did, also where their groups are uneven; a layer without heads has no row."
    model = adapt(build(name))
    set_gates(model, {(0, 1): 0., **{(1, h): 0. for h in range(model.sentinel.now.heads[1].n_heads)}})
    masked = measure(model, TWO, progress=False)
    plan = compact(model)
    small = measure(model, TWO, progress=False)
    for k in ('entropy', 'distance', 'sink', 'fisher', 'use'):
        torch.testing.assert_close(plan.full(small[k])[0], masked[k][0].where(plan.keep[0], torch.nan), rtol=1e-4, atol=1e-6, equal_nan=True, msg=k)
        assert small[k][1].isnan().all()


def test_data_sets_count_with_mask_and_labels():
    "A tokenised data set gives the tables of the same rows as a dict, whether its rows are padded or of different lengths."
    ids, mask = TWO.repeat(2, 1).cpu(), torch.ones(4, TWO.shape[1], dtype=torch.long)
    for i in range(1, 4): mask[i, -2*i:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    rows = dict(input_ids=ids, attention_mask=mask, labels=labels)
    padded = Dataset.from_dict({k: v.tolist() for k, v in rows.items()})
    ragged = Dataset.from_dict({k: [x[m == 1].tolist() for x, m in zip(rows[k], mask)] for k in ('input_ids', 'labels')})
    model, what = build('llama'), ('entropy', 'gradient', 'use')
    want = measure(model, rows, what, progress=False)
    for data in (padded, ragged, padded.to_iterable_dataset()):
        got = measure(model, data, what, progress=False)
        assert got.info['tokens'] == want.info['tokens'] == int(mask.sum())
        for k in want.tables: torch.testing.assert_close(got[k], want[k], rtol=1e-4, atol=1e-6, msg=k)


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_a_batch_that_gives_nothing_is_named(name):
    model, nothing = build(name), dict(input_ids=TWO, labels=torch.full_like(TWO, -100))
    with pytest.raises(ValueError, match='batch 1: no token counts'): measure(model, [TWO, nothing], progress=False)
    with torch.no_grad(): next(iter(adapt(model).sentinel.now.heads)).out.weight[0, 0] = float('inf')
    with pytest.raises(ValueError, match='batch 0: the loss is'): measure(model, TWO, progress=False)
    with pytest.raises(ValueError, match='batch 0: the input of .* holds NaN or infinity'): measure(model, TWO, 'use', progress=False)

CHANNELS = ['gpt2', 'llama', 'phi3', 'opt', 'bloom']
BOTH = ('heads', 'channels')


def channel_sites(model):
    "The model with gates of which some are closed or half open, and its layers of channels."
    adapt(model)
    set_gates(model, {(0, 1): 0., (1, 2): .5}, 'channels')
    return model.sentinel.now.channels


def read_by(model, site, ids):
    "What a layer's down projection reads, `[n, c]`, behind the gates."
    read = []
    handle = site.out.register_forward_pre_hook(lambda module, args: read.append(args[0].detach().reshape(-1, site.n)))
    with torch.no_grad():
        for row in ids: model(row[None], use_cache=False)
    handle.remove()
    return torch.cat(read).double().cpu()


def loss_of(model, row, **kwargs):
    logits = model(row[None], use_cache=False, **kwargs).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, row[1:])


@pytest.mark.parametrize('name', CHANNELS)
def test_use_of_channels(name):
    "One channel after the other: what it writes, from what the projection reads."
    model = build(name)
    sites = channel_sites(model)
    for what in ('use', 'gram'):
        stats = measure(model, TWO, what, kinds=BOTH, progress=False).channels
        for site in sites:
            x, lin = read_by(model, site, TWO), core_linear(site.out)
            W = lin.weight.detach().double().cpu()
            W = W if in_dim(lin) == 1 else W.T                                       # [o, c]
            for c in range(0, site.n, 7):
                written = torch.outer(x[:, c], W[:, c])                              # n o
                want = dict(use=written.square().sum(1).mean().sqrt(), variance=written.var(0, correction=0).sum(),
                            flap=x[:, c].var(correction=0)*W[:, c].square().sum(), magnitude=W[:, c].norm(),
                            wanda=W[:, c].abs().sum()*x[:, c].square().mean().sqrt())
                for k, v in want.items():
                    torch.testing.assert_close(stats[k][site.layer, c], v.float(), rtol=1e-3, atol=1e-7, msg=f'{k} of layer {site.layer} channel {c}')
        assert 'residue' not in stats.tables and 'entropy' not in stats.tables
    torch.testing.assert_close(stats.grams[0]['cov'].double().cpu(), read_by(model, sites[0], TWO).T.cov(correction=0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('name', CHANNELS)
def test_gradients_of_channels_are_those_of_the_gates(name):
    "fisher, taylor and grad from autograd through real gates, example by example; closed channels included."
    model = build(name)
    sites = list(channel_sites(model))
    stats = measure(model, TWO, 'gradient', kinds=BOTH, progress=False).channels
    gates = [s.module.sentinel.gate.requires_grad_(True) for s in sites]
    rows = [torch.autograd.grad(loss_of(model, row), gates) for row in TWO]
    for i, site in enumerate(sites):
        each = torch.stack([grads[i] for grads in rows]).cpu()                       # b c
        for k, want in dict(grad=each.mean(0), taylor=each.abs().mean(0), fisher=each.square().mean(0)).items():
            torch.testing.assert_close(stats[k][site.layer, :site.n], want, rtol=2e-3, atol=1e-7, msg=f'{k} of layer {site.layer}')


@pytest.mark.parametrize('name', CHANNELS)
def test_repaired_gates_of_channels(name):
    "Half of what a channel holds and half of what a ridge regression on the others leaves, times the gradient, squared in windows of 16 tokens."
    model = build(name)
    sites = list(channel_sites(model))
    stats = measure(model, TWO, 'joint', kinds=BOTH, progress=False).channels
    variables, handles = {}, []
    def put(site, module, args):
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        variables[site.layer] = x
        return x, *args[1:]
    for site in sites: handles.append(site.out.register_forward_pre_hook(lambda m, a, site=site: put(site, m, a)))
    grads = []
    for row in TWO:
        got = torch.autograd.grad(loss_of(model, row), [variables[s.layer] for s in sites])
        grads.append([(variables[s.layer].detach().reshape(-1, s.n).double().cpu(), g.reshape(-1, s.n).double().cpu()) for s, g in zip(sites, got)])
    for h in handles: h.remove()
    for i, site in enumerate(sites):
        x = read_by(model, site, TWO)
        mean, C = x.mean(0), x.T.cov(correction=0)
        C = C + torch.diag(.1*C.diagonal().clamp_min(1e-3*C.diagonal().mean()))
        for c in range(0, site.n, 11):
            others = torch.arange(site.n) != c
            weights = torch.linalg.solve(C[others][:, others], C[others, c])
            total = 0.
            for z, g in (row[i] for row in grads):
                left = (z[:, c] - mean[c]) - (z[:, others] - mean[others]) @ weights
                total += sum(w.sum().square() for w in (g[:, c]*(z[:, c] + left)/2).split(16))
            want = (total/len(TWO)).float()
            torch.testing.assert_close(stats.repaired[site.layer, c], want, rtol=1e-2, atol=1e-10, msg=f'layer {site.layer} channel {c}')
    assert stats.repaired[0, 1] == 0                                                 # closed: nothing is held, nothing lost


@pytest.mark.parametrize('name', CHANNELS)
def test_padding_counts_for_nothing_for_channels(name):
    model, what = build(name), ('gradient', 'use')
    want = measure(model, TWO, what, kinds=BOTH, progress=False).channels
    wide = [dict(input_ids=pad(TWO, side), attention_mask=pad(torch.ones_like(TWO), side)) for side in ((0, 5), (5, 0))]
    for got in (*(measure(model, x, what, kinds=BOTH, progress=False) for x in wide),
                measure(model, TWO, what, batch_size=1, kinds=BOTH, offload=True, progress=False)):
        for k in want.tables: torch.testing.assert_close(got.channels[k], want[k], rtol=1e-3, atol=1e-5, msg=k)


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_channels_are_saved_and_read(name, tmp_path):
    stats = measure(build(name), TWO, ('gradient', 'joint'), kinds=BOTH, progress=False)
    stats.save(tmp_path/'stats.safetensors')
    back = HeadStats.load(tmp_path/'stats.safetensors')
    assert back.info == stats.info and torch.equal(back.pairs, stats.pairs)
    for kind in BOTH:
        a, b = stats.of_kind(kind), back.of_kind(kind)
        assert set(a.tables) == set(b.tables) and set(a.grams) == set(b.grams)
        assert all(torch.equal(b[k], t) for k, t in a.tables.items())
        assert all(torch.equal(b.grams[l][k], t) for l, moments in a.grams.items() for k, t in moments.items())


@pytest.mark.parametrize('name', CHANNELS)
def test_moments_take_what_they_say(name):
    "`moments_bytes` is the size of the sums, and needs no weights."
    model = build(name)
    with torch.device('meta'): nowhere = type(model)(model.config)
    maps = dict(heads=head_map(model), channels=channel_map(model))
    for kind, found in maps.items():
        for whole in (True, False):
            sums = [input_sums(s, torch.zeros(3, s.n*s.width), whole) for s in found]
            want = sum(t.numel()*t.element_size() for d in sums for t in (d['total'], d['gram']))
            assert moments_bytes(model, (kind,), whole) == moments_bytes(nowhere, (kind,), whole) == want
    with pytest.raises(ValueError, match="kinds=.*allowed are"): moments_bytes(model, ('wings',))

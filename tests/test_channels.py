"""The map of MLP channels on the architecture matrix: rows are where it says, pruning is exact and undone exactly.

`pytest tests/test_channels.py -k llama` runs one architecture.
"""
import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from sentinel_ai import UnsupportedArchitecture
from sentinel_ai.channels import channel_map, probe_channels, sites
from sentinel_ai.mlp_archs import MLPS, register_mlp
from sentinel_ai.experts import probe_experts
from sentinel_ai.heads import head_map
from sentinel_ai.testing import random_model
from transformers import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import ALL, CHANNELS, EXPERTS, IDS, VARIANTS, build, logits, needs_experts, spread  # noqa: E402
from test_surgery import attributes, close, state  # noqa: E402

torch.set_num_threads(1)
# Dory has a norm without weights and a factor for each channel
MORE = [m for m in ('dory', 'xlm', 'granitemoehybrid') if m in CONFIG_MAPPING]
VARIANTS['xlm'] = 'xlm', dict(causal=True)       # by default it reads both ways
WITH = CHANNELS + MORE
# Not every layer of it has an MLP: some are Mamba or attention alone
PARTLY = {'nemotron_h'}
# A norm over all channels: disturbing one changes all
COUPLED = {'bitnet', 'dory'}


def kinds(model):
    "A site for each kind of MLP in the model."
    return list({(type(s.mlp), s.layout, s.out_name): s for s in channel_map(model)}.values())


def some(n, seed=0, share=.5):
    "Channels that are kept, at random and uneven."
    pick = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share
    pick[-1] = True
    pick[0] = False
    return pick.nonzero().flatten().tolist()


def cut(site, keep):
    "Prune channels; returns the parameters' data as they were."
    places = site.places(keep)
    old = {name: site.mlp.get_parameter(name).data for name in places}
    for name, (dim, size, idx) in places.items():
        data = old[name]
        assert data.shape[dim] == size
        site.mlp.get_parameter(name).data = data.index_select(dim, idx.to(data.device))
    site.rewire(keep)
    return old


def undo(site, old):
    site.unwire()
    for name, data in old.items(): site.mlp.get_parameter(name).data = data


@torch.no_grad()
def zero_columns(model, keeps):
    "What pruning channels means, on the plain model."
    for site in channel_map(model):
        gone = [c for c in range(site.n) if c not in set(keeps[site.layer])]
        site.columns(site.weight)[gone] = 0.
    return model


@pytest.mark.parametrize('name', WITH)
def test_every_layer_is_mapped(name):
    "A row for each decoder layer, and none is left out silently."
    model = build(name)
    cm = channel_map(model)
    n_layers = len(head_map(model))
    assert len(cm) == n_layers
    for l, site in enumerate(cm.sites):
        assert site is None or site.layer == l
        assert site is not None or name in PARTLY or any(f'.{l}.' in path for path in cm.unmapped)
    if name not in PARTLY: assert all(s is not None for s in cm.sites)
    assert cm.params() <= cm.n_params


@pytest.mark.parametrize('name', WITH)
def test_map_matches_the_arithmetic(name):
    "Disturbing the rows that the map calls a channel's changes exactly that column of the down projection's input."
    model = build(name)
    for site in kinds(model):
        for part in site.proj:
            for channels in ([0], [site.n//2, site.n-1]):
                probe = probe_channels if site.blocks == 1 else probe_experts
                got = probe(model, site, part, channels).nonzero().flatten().tolist()
                if name in COUPLED: assert set(channels) <= set(got)
                else: assert got == channels, f'{part} of {channels}'


@pytest.mark.parametrize('name,how', spread(WITH, ['some', 'none', 'first-layer-none']))
def test_pruned_equals_zeroed_columns_and_back(name, how):
    model = build(name)
    before, had, want = state(model), attributes(model), logits(model)
    cm = channel_map(model)
    first = next(iter(cm)).layer
    none = lambda s: how == 'none' or how == 'first-layer-none' and s.layer == first
    keeps = {s.layer: [] if none(s) else some(s.n, s.layer) for s in cm}
    zeroed = logits(zero_columns(copy.deepcopy(model), keeps))
    assert not torch.equal(zeroed, want), 'pruning channels had no effect'
    old = {s.layer: cut(s, keeps[s.layer]) for s in cm}
    close(logits(model), zeroed)
    now = channel_map(model)
    assert [s.n for s in now] == [len(keeps[s.layer]) for s in now]
    assert sum(p.numel() for p in model.parameters()) < sum(v.numel() for v in before.values())
    for s in cm: undo(s, old[s.layer])
    assert torch.equal(logits(model), want)
    after = state(model)
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in after)
    assert attributes(model) == had
    assert not any('channel_wiring' in vars(m) for m in model.modules())


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'bitnet', 'moshi', 'opt'])
def test_pruned_model_is_copied_and_pickled(name):
    model = build(name)
    site = channel_map(model)[0]
    old = cut(site, some(site.n))
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        channel_map(twin)[0].unwire()
        assert site.mlp.channel_wiring is not None
    undo(site, old)


@pytest.mark.parametrize('name', ['llama', 'phi3', 'gpt2', 'moshi'])
def test_gradients_reach_a_pruned_mlp(name):
    model = build(name).train()
    for keep in ([1, 5, 7], []):
        site = channel_map(model)[0]
        old = cut(site, keep)
        model(IDS, labels=IDS).loss.backward()
        for p in site.mlp.parameters(): assert p.grad is None or p.grad.shape == p.shape
        model.zero_grad()
        undo(site, old)


@pytest.mark.parametrize('name', ALL)
def test_parts_add_up(name):
    model = build(name)
    both = sites(model)
    parts = both.parts(model)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert all(n >= 0 for n in parts.values())
    assert both.channels is not None and not both.why
    assert parts['experts'] == 0 or name not in EXPERTS


@needs_experts
@pytest.mark.parametrize('name', EXPERTS)
def test_experts_that_are_left_out_or_unknown(name):
    "An own row of `MLPS` leaves them out; without the flags of transformers nobody says how they are stored."
    model = build(name)
    kind = type(channel_map(model)[0].mlp).__name__
    register_mlp(kind, lambda m: None)
    try:
        with pytest.raises(UnsupportedArchitecture, match='no dense MLP.*routed experts.*register_mlp'): channel_map(build(name))
    finally: del MLPS[kind]
    for m in model.modules(): vars(m).pop('is_transposed', None)
    with pytest.raises(UnsupportedArchitecture, match='no dense MLP.*routed experts.*register_mlp'): channel_map(model)


@pytest.mark.parametrize('name', ['qwen2_moe', 'qwen3_next', 'deepseek_v2', 'deepseek_v3', 'afmoe', 'longcat_flash', 'nemotron_h'])
def test_beside_a_dense_mlp_experts_are_left_alone(name):
    cm = channel_map(build(name))
    assert all(s.blocks == 1 for s in cm)
    if name != 'deepseek_v3': assert any('routed experts' in why for why in cm.unmapped.values())


@needs_experts
def test_cost_sums_to_what_is_saved():
    for name in ('llama', 'gpt2', 'phi3', 'bert', 'deepseek_v2', 'mixtral', 'gpt_oss'):
        model = build(name)
        site = channel_map(model)[0]
        total, each = sum(p.numel() for p in model.parameters()), site.cost()
        keep = some(site.n)
        cut(site, keep)
        assert total - sum(p.numel() for p in model.parameters()) == round(each*(site.n - len(keep)))


ZAMBA = dict(num_hidden_layers=4, num_attention_heads=4, attention_head_dim=16, mamba_expand=2,
             layers_block_type=['mamba', 'hybrid', 'mamba', 'hybrid'])


ZAMBA2 = dict(num_mem_blocks=1, hybrid_layer_ids=[1, 3])


@pytest.mark.parametrize('name,more', [('zamba', {}), ('zamba2', ZAMBA2)])
def test_twins_are_pruned_together(name, more):
    "Zamba's layers share a block: modules with the same parameters. Zamba 2's adapters have rows for each channel."
    model = random_model(name, **ZAMBA, **more).to(IDS.device)
    cm = channel_map(model)
    site = cm[1]
    assert [s is not None for s in cm.sites] == [False, True, False, False]
    assert len(site.twins) == 1 and site.shared_by == (site.path.replace('.1.', '.3.'),)
    weights = sum(p.numel() for p in site.mlp.parameters())
    if name == 'zamba': assert site.cost('flops') == 2*2*weights/site.n            # two layers, two operations
    for part in site.proj:
        assert probe_channels(model, site, part, [3, 9]).nonzero().flatten().tolist() == [3, 9]
    want, had = logits(model), attributes(model)
    for keep in (some(site.n), []):
        zeroed = logits(zero_columns(copy.deepcopy(model), {1: keep}))
        old = cut(site, keep)
        close(logits(model), zeroed)
        assert [s.n for s in channel_map(model)] == [len(keep)]
        undo(site, old)
        assert torch.equal(logits(model), want) and attributes(model) == had


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_adapters_are_looked_through(name):
    "A wrapper at a projection's path: the site finds the weight inside, the hook and `out` the wrapper."
    peft = pytest.importorskip('peft')
    model = build(name)
    target = channel_map(model)[0].out_name
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], fan_in_fan_out=name == 'gpt2')).eval()
    site = channel_map(model)[0]
    assert hasattr(site.out, 'base_layer')
    assert f'{target}.base_layer.weight' in site.places(range(site.n))
    assert probe_channels(model, site, 'up', [3]).nonzero().flatten().tolist() == [3]

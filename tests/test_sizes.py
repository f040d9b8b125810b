"""What a tensor is doesn't depend on its size: one head, one KV head, heads as wide as the stream, as many channels as the stream has numbers, odd counts.

`SENTINEL_MATRIX=whole pytest tests/test_sizes.py` tries all sizes on all architectures.
"""
import functools
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import ALL, CHANNELS, IDS, VARIANTS, logits  # noqa: E402

from sentinel_ai import (HeadMemory, UnsupportedArchitecture, adapt, close_heads, compact, expand, gate_values, grow, head_map, measure,  # noqa: E402
                         prune, random_model, regrow, set_gates, unadapt, unprune)
from sentinel_ai.channels import channel_map  # noqa: E402
from sentinel_ai.pruning import total_cost  # noqa: E402
from sentinel_ai.testing import random_config  # noqa: E402
from transformers import (CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, DistilBertConfig,  # noqa: E402
                          ModernBertConfig)

torch.set_num_threads(1)
CALIB = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(1))
NAMES = dict(heads='num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads', kv='num_key_value_heads num_kv_heads',
             size='head_dim dim_head v_head_dim', inner='intermediate_size ffn_dim n_inner ffn_hidden_size dim_ff dff decoder_ffn_dim',
             hidden='hidden_size n_embd d_model word_embed_proj_dim', layers='num_hidden_layers n_layer n_layers num_layers decoder_layers')
SIZES = {'one-head': dict(heads=1, kv=1), 'one-kv-head': dict(kv=1), 'wide-heads': dict(size=32), 'wider-heads': dict(size=48),
         'inner-is-hidden': dict(inner=32), 'odd': dict(heads=3, kv=3, hidden=24, size=8, inner=7),
         'one-channel': dict(inner=1), 'odd-one-kv-head': dict(heads=3, kv=1, hidden=24, size=8, inner=5),
         'one-of-all': dict(heads=1, kv=1, size=32, inner=32, layers=1),
         'two-channels-a-number': dict(inner=16), 'all-alike': dict(heads=4, kv=1, hidden=16, size=4, inner=16)}

HYBRID = ('jamba', 'qwen3_next', 'recurrent_gemma', 'gpt_neo')      # their configs say what each layer is
AGAIN = [('bitnet', 'one-kv-head'), ('bitnet', 'inner-is-hidden'), ('doge', 'wide-heads'), ('doge', 'odd'), ('diffllama', 'inner-is-hidden'),
         ('gemma3_text', 'one-kv-head'), ('qwen3', 'one-head'), ('olmo2', 'odd-one-kv-head'), ('llama', 'wider-heads'), ('gpt2', 'one-channel'),
         ('falcon', 'odd'), ('gpt_bigcode', 'one-head'), ('phi3', 'one-of-all'), ('bloom', 'odd'), ('xglm', 'odd'), ('opt', 'inner-is-hidden'),
         ('opt', 'two-channels-a-number'), ('biogpt', 'two-channels-a-number'), ('llama', 'all-alike'), ('gpt_bigcode', 'all-alike'),
         ('bitnet', 'all-alike'), ('doge', 'inner-is-hidden'), ('falcon', 'all-alike')]
SOME = [(name, case) for i, name in enumerate(ALL) for j, case in enumerate(SIZES) if (i + j) % 4 == 0]
if os.environ.get('SENTINEL_MATRIX') == 'whole': SOME = AGAIN = [(name, case) for name in [*ALL, 'doge'] for case in SIZES]


def options(name, case):
    "The `model_type`, and values of its config."
    mt, more = VARIANTS.get(name, (name, {}))
    config = random_config(mt)
    alias, have, res = type(config).attribute_map, config.to_dict(), {}
    for what, value in SIZES[case].items():
        names = [alias.get(n, n) for n in NAMES[what].split()]
        res |= {n: value for n in names if isinstance(have.get(n), int)}
    return mt, more | res


def build(name, case):
    mt, kw = options(name, case)
    try:
        model = random_model(mt, **kw)
        logits(model)
    except UnsupportedArchitecture: raise
    except Exception as e: pytest.skip(f'{mt} can\'t be of these sizes: {str(e)[:60]}')
    return model


@functools.cache
def facts(name, kw):
    "What is said of the first layers' structure, whatever its sizes."
    try:
        with torch.device('meta'): model = AutoModelForCausalLM.from_config(random_config(name, **dict(kw)))
    except Exception as e: pytest.skip(f"{name} can't be of these sizes: {str(e)[:60]}")
    heads = [(s.proj, s.layout, s.stay, s.returns, s.maps, s.extras) for s in head_map(model)]
    channels = [(s.proj, s.layout, s.stay, s.extras, s.bypass) for s in channel_map(model)] if name in CHANNELS else []
    return heads[0], channels[:1]


@pytest.mark.parametrize('name,case', SOME)
def test_a_module_is_read_alike_at_any_size(name, case):
    mt, kw = options(name, case)
    if mt in HYBRID and 'layers' in SIZES[case]: pytest.skip('its first layer has no attention')
    usual = {k: v for k, v in VARIANTS.get(name, (name, {}))[1].items() if k not in ('num_key_value_heads', 'head_dim')}
    assert facts(mt, tuple(kw.items())) == facts(mt, tuple(usual.items()))


def of_all(stats, kind='heads'):
    return {k: t for k, t in stats.of_kind(kind).tables.items() if k in ('entropy', 'distance', 'grad', 'fisher', 'use', 'magnitude')}


def same_tables(small, whole, plan, kind):
    "What a compact model's tables say of the units that are kept, those of the masked model said too."
    for name, table in of_all(whole, kind).items():
        for layer in range(len(plan.keep)):
            kept = plan.keep[layer].nonzero().flatten()
            if not len(kept): continue
            mine = of_all(small, kind)[name][layer, :len(kept)]
            torch.testing.assert_close(mine, table[layer, kept], rtol=2e-3, atol=2e-4, msg=f'{name} of {kind}, layer {layer}')


@pytest.mark.parametrize('name,case', [pytest.param(n, c, id=f'{n}-{c}') for n, c in AGAIN])
def test_measured_and_pruned_again(name, case):
    "Measure, prune, compact, measure, prune and compact again, and back."
    model = build(name, case)
    want, before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    memory = HeadMemory().attach(adapt(model))
    kinds = ('heads', 'channels') if name in CHANNELS and len(list(channel_map(model))) else ('heads',)

    def look(): return measure(model, CALIB, kinds=kinds, progress=False)
    for seed in range(2):
        if head_map(model).n > 2: prune(model, 1, CALIB, 'joint', rounds=1, progress=False)
        if len(kinds) > 1: set_gates(model, some_channels(model, seed), 'channels')
        masked, whole = logits(model), look()
        compact(model)
        torch.testing.assert_close(logits(model), masked, rtol=1e-4, atol=1e-4)
        if not seed:
            for kind in kinds: same_tables(look(), whole, model.sentinel.plan.of_kind(kind), kind)
    unprune(model)
    assert torch.equal(logits(model), want)
    memory.detach(model)
    unadapt(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def some_channels(model, seed):
    "Close a third of the channels that there are."
    gates = gate_values(model, kind='channels')
    shut = torch.rand(gates.shape, generator=torch.Generator().manual_seed(seed)) < .3
    return torch.where(gates.isnan() | ~shut, torch.nan, 0.)


@pytest.mark.parametrize('size', [8, 32, 48])
@pytest.mark.parametrize('init', ['split', 'unet', 'memory'])
def test_a_head_as_large_as_the_stream_returns(init, size):
    "Which way a head's matrix lies is known when it is square, and when it is wider than high."
    model = random_model('llama', head_dim=size)
    HeadMemory().attach(adapt(model))
    want = logits(model)
    for head in ((0, 1), (0, 2), (1, 0)): close_heads(model, [head], CALIB, repair='linear')
    compact(model)
    masked = logits(model)
    regrow(model, [(0, 1), (1, 0)], CALIB, init=init, seed=3)
    if init == 'split': torch.testing.assert_close(logits(model), masked, rtol=1e-4, atol=1e-4)      # shared out, and no more
    if init == 'memory':
        regrow(model, [(0, 2)], CALIB, init=init)
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    assert logits(model).isfinite().all()


def test_moments_are_those_of_the_heads_that_they_were_measured_on():
    "As many heads then as now needn't be the same ones."
    def gone(*heads):
        model = set_gates(adapt(random_model('gpt2')), dict.fromkeys(heads, 0.))
        compact(model)
        return model
    stats = measure(gone((0, 0), (1, 0)), CALIB, 'gram', progress=False)
    assert stats.grams[0]['heads'].tolist() == [1, 2, 3]
    other = gone((0, 3), (1, 0))
    want = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r'moments of layer 0 without head \[0\]'): close_heads(other, [(1, 1)], stats=stats)
    assert all(torch.equal(v, want[k]) for k, v in other.state_dict().items())
    same = gone((0, 0), (1, 0), (1, 2))                              # one fewer: the moments of those that are left
    close_heads(same, [(1, 1)], stats=stats)
    whole = measure(random_model('gpt2'), CALIB, 'gram', progress=False)
    assert whole.grams[1]['heads'].tolist() == [0, 1, 2, 3]
    close_heads(gone((0, 3), (1, 0)), [(1, 1)], stats=whole)


def gemma4(shared=True):
    kinds = ['sliding_attention', 'full_attention']
    return random_model('gemma4_text', layer_types=kinds, attention_k_eq_v=shared, num_global_key_value_heads=1, global_head_dim=16,
                        hidden_size_per_layer_input=0, vocab_size_per_layer_input=96, sliding_window=16)


@pytest.mark.skipif('gemma4_text' not in CONFIG_MAPPING, reason='this transformers has no Gemma 4')
def test_values_that_are_the_keys():
    "Gemma 4: a layer without a value projection has a KV head all the same, and each layer has sizes of its own."
    model = gemma4()
    assert total_cost(head_map(model), 'kv_bytes') == 256
    cache = model(IDS, use_cache=True).past_key_values
    assert sum(x[0].numel()*4 for layer in cache.layers for x in (layer.keys, layer.values))/IDS.shape[1] == 256
    want = logits(model)
    set_gates(adapt(model), {(0, 0): 0., (1, 1): 0.})
    masked = logits(model)
    compact(model)
    torch.testing.assert_close(logits(model), masked)
    measure(model, CALIB, progress=False)
    expand(model)
    unprune(model)
    assert torch.equal(logits(model), want)


def test_a_layer_with_one_head_grows():
    "A norm of each head is no hindrance, one over all heads is, and with a single head both are as wide."
    one = dict(num_attention_heads=1, num_key_value_heads=1, head_dim=32)
    model = adapt(random_model('qwen3', **one))
    want = logits(model)
    grow(model, heads=1)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedArchitecture, match='made of all heads'): grow(adapt(random_model('olmo2', **one)), heads=1)


class Between(torch.nn.Module):
    "An MLP with norms and factors whose names say nothing, over the stream and over the channels."
    def __init__(self, hidden, inner):
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(hidden, inner), torch.nn.Linear(inner, hidden)
        self.a, self.b = torch.nn.LayerNorm(hidden), torch.nn.LayerNorm(inner)
        self.c, self.d = (torch.nn.Parameter(torch.randn(n)) for n in (inner, hidden))

    def forward(self, x):
        y = self.b(self.up_proj(self.a(x)).relu())
        y *= self.c
        return self.down_proj(y)*self.d


@pytest.mark.parametrize('inner', [8, 16, 32, 48])
def test_norms_without_a_name(inner):
    "As many channels as the stream has numbers, half as many, and others: what is about channels goes, what isn't stays."
    model = random_model('llama')
    for layer in model.model.layers: layer.mlp = Between(32, inner)
    site = channel_map(model)[0]
    assert sorted(name for name, _ in site.extras) == ['b.bias', 'b.weight', 'c'] and site.stay
    closed = set_gates(adapt(model), {(0, 1): 0., (1, 2): 0.}, 'channels')
    masked, want = logits(closed), {k: v.clone() for k, v in model.state_dict().items()}
    compact(closed)
    torch.testing.assert_close(logits(closed), masked)
    expand(closed)
    assert all(torch.equal(v, want[k]) for k, v in closed.state_dict().items())


def test_models_that_read_both_ways():
    "A masked-language model has no next token to predict, whatever its config says or doesn't."
    small = dict(vocab_size=96, pad_token_id=0)
    distil = DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, **small)
    tokens = dict(cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    modern = ModernBertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **small, **tokens)
    for config in (distil, modern):
        with pytest.raises(UnsupportedArchitecture, match='reads both ways'): head_map(AutoModelForMaskedLM.from_config(config))
    with pytest.raises(UnsupportedArchitecture, match='config.causal=True'): head_map(random_model('xlm'))
    assert head_map(random_model('xlm', causal=True)).n == 8

"""The architecture matrix: every promise that must hold bit for bit, on tiny random decoders, in float32 and bfloat16.

`pytest tests/test_matrix.py -k llama` runs one architecture; `-k "llama and causal"` one promise on it.
`SENTINEL_DEVICE=cuda pytest tests` runs the models of this folder on an accelerator.
"""
import copy
import functools
import inspect
import os

import pytest
import torch
from sentinel_ai import (adapt, gate_values, harden_gates, head_map, merge_gates, random_model, set_gates, unadapt, unmerge_gates,
                         GateConfig, UnsupportedArchitecture)
from sentinel_ai.heads import core_linear, in_dim, probe
from transformers.integrations import moe

SEED = ['gpt2', 'opt', 'bloom', 'gpt_neox', 'llama']
LISTED = ['mistral', 'qwen2', 'qwen3', 'gemma2', 'gemma3_text', 'phi', 'phi3', 'falcon', 'gptj', 'gpt_neo', 'codegen', 'mpt',
          'stablelm', 'olmo2', 'granite', 'smollm3', 'cohere', 'starcoder2', 'gpt_bigcode']
MORE = ['afmoe', 'apertus', 'arcee', 'bart', 'biogpt', 'bitnet', 'cohere2', 'ctrl', 'deepseek_v2', 'deepseek_v3', 'diffllama', 'ernie4_5',
        'exaone4', 'gemma', 'glm', 'glm4', 'gpt_oss', 'gptj', 'granitemoe', 'helium', 'jamba', 'lfm2', 'longcat_flash', 'minicpm3', 'minimax',
        'mixtral', 'modernbert-decoder', 'moshi', 'nemotron_h', 'olmo', 'olmoe', 'openai-gpt', 'persimmon', 'phimoe', 'qwen2_moe',
        'qwen3_moe', 'qwen3_next', 'recurrent_gemma', 'seed_oss', 'vaultgemma', 'xglm', 'bert', 'roberta']
VARIANTS = {'falcon-new': ('falcon', dict(new_decoder_architecture=True, num_kv_heads=2)), 'falcon-mha': ('falcon', dict(multi_query=False)),
            'falcon-alibi': ('falcon', dict(alibi=True)), 'bigcode-mha': ('gpt_bigcode', dict(multi_query=False)),
            'opt-post-norm': ('opt', dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
            'neox-sequential': ('gpt_neox', dict(use_parallel_residual=False)),
            'llama-mqa': ('llama', dict(num_key_value_heads=1)), 'llama-eager': ('llama', dict(attn_implementation='eager')),
            'qwen3-mqa': ('qwen3', dict(num_key_value_heads=1)), 'gemma3-mqa': ('gemma3_text', dict(num_key_value_heads=1)),
            'gpt2-untied': ('gpt2', dict(tie_word_embeddings=False)), 'llama-wide-heads': ('llama', dict(head_dim=16))}
# Every MLP of these is a set of routed experts. Older transformers don't say how they are laid out, so there only heads are read
SAYS_LAYOUT = 'is_concatenated' in inspect.getsource(moe)
EXPERTS = ['gpt_oss', 'granitemoe', 'minimax', 'mixtral', 'olmoe', 'phimoe', 'qwen3_moe']
ALL = [*SEED, *LISTED, *dict.fromkeys(m for m in MORE if m not in LISTED), *VARIANTS]
LISTED_ALL = SEED + LISTED + list(VARIANTS)
DTYPES = [torch.float32, torch.bfloat16]


def spread(names, values):
    "Pairs: listed architectures with all values, the others with one each, in turns. SENTINEL_MATRIX=whole: all with all."
    is_whole = os.environ.get('SENTINEL_MATRIX') == 'whole'
    pairs = [(n, v) for i, n in enumerate(names) for j, v in enumerate(values)
             if is_whole or n in LISTED_ALL or j == i % len(values)]
    many = [(n, *v) if isinstance(v, tuple) else (n, v) for n, v in pairs]
    return [pytest.param(*p, id='-'.join(map(str, p[:2])).replace('torch.', '')) for p in many]


# A norm over the full width of q and k (or of the heads' output) mixes heads before or after the softmax, so disturbing one head's
# rows reaches others; DOGE's mask is made from all values. Gates are exact on these, but rows of theirs aren't independent.
COUPLED = {'olmo2': 'qk', 'olmoe': 'qk', 'bitnet': 'qkv'}

torch.set_num_threads(1)  # tiny matrices: a second thread only waits for the first
DEVICE = os.environ.get('SENTINEL_DEVICE', 'cpu')
IDS = torch.tensor([[5, 17, 33, 8, 21, 40, 11, 29, 62, 14, 7, 50]], device=DEVICE)


def placed(model): return model.to(DEVICE) if next(model.parameters()).device.type == 'cpu' else model    # not when it has no data


@functools.cache
def built(name, dtype, seed):
    mt, kw = VARIANTS.get(name, (name, {}))
    return random_model(mt, seed=seed, dtype=dtype, **kw)


def build(name, dtype=torch.float32, seed=0):
    "A tiny model of one's own: a copy, as that takes a fifth of the time."
    return placed(copy.deepcopy(built(name, dtype, seed)))


def moved(model, kw): return {k: v.to(next(model.parameters()).device) if isinstance(v, torch.Tensor) else v for k, v in kw.items()}


@torch.no_grad()
def logits(model, ids=IDS, **kw): return model(**moved(model, dict(input_ids=ids, **kw))).logits.to(DEVICE)


def greedy(model, ids=IDS, **kw):
    kw = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None) | kw
    return model.generate(**moved(model, dict(inputs=ids, **kw))).to(DEVICE)


def quarter(model, seed=0):
    "A table that closes about a quarter of the heads, unevenly, at least one."
    hm = head_map(model)
    t = hm.table()
    pick = torch.rand(t.shape, generator=torch.Generator().manual_seed(seed)) < .25
    first = next(iter(hm))
    pick[first.layer, first.n_heads-1] = True
    return torch.where(t.isnan(), t, torch.where(pick, 0., 1.))


def zero_columns(model, table):
    "What closing heads means, on the plain model: the columns of the output projection are zeroed."
    with torch.no_grad():
        for s in head_map(model):
            lin = core_linear(s.out)
            for h in range(s.n_heads):
                if table[s.layer, h] == 0: (lin.weight[s.cols(h)] if in_dim(lin) == 0 else lin.weight[:, s.cols(h)]).zero_()
    return model


def runs(name):
    "Can this version of transformers build it and run it?"
    try: return logits(build(name)) is not None
    except (AttributeError, ImportError, NotImplementedError, ValueError): return False


if not SAYS_LAYOUT:      # newer ones run them all
    ALL = [name for name in ALL if runs(name)]
    LISTED_ALL = [name for name in LISTED_ALL if name in ALL]
CHANNELS = [name for name in ALL if SAYS_LAYOUT or name not in EXPERTS]
needs_experts = pytest.mark.skipif(not SAYS_LAYOUT, reason='this transformers does not say how experts are laid out')


@pytest.mark.parametrize('name,dtype', spread(ALL, DTYPES))
def test_open_gates_change_nothing(name, dtype):
    model = build(name, dtype)
    cls, sd, want = type(model), {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    assert adapt(model) is model and isinstance(model, cls) and type(model) is not cls
    assert torch.equal(logits(model), want)
    unadapt(model)
    assert type(model) is cls and torch.equal(logits(model), want)
    assert model.state_dict().keys() == sd.keys() and all(torch.equal(v, sd[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name,dtype', spread(ALL, DTYPES))
def test_closed_gates_equal_zeroed_columns(name, dtype):
    model = build(name, dtype)
    plain, table = copy.deepcopy(model), quarter(model)
    set_gates(adapt(model), table)
    assert torch.equal(logits(model), logits(zero_columns(plain, table)))
    assert not torch.equal(logits(model), logits(unadapt(model))), 'closing heads had no effect'


@pytest.mark.parametrize('name', ALL)
def test_causal(name):
    "Changing a later token never changes earlier logits: plain, adapted and with heads closed."
    model, later = build(name), IDS.clone()
    later[:, 7:] = later[:, 7:].flip(1)
    for table in (None, 1., quarter(model)):
        if table is not None: set_gates(adapt(model), table)
        diff = (logits(model)[:, :7] - logits(model, later)[:, :7]).abs().max()
        assert diff <= 1e-6, f'a later token moved an earlier logit by {diff:.1e}'  # float rounding: batched sums differ in order


@pytest.mark.parametrize('name', ALL)
def test_generate(name):
    "Greedy generation with the KV cache: the same tokens with open gates; with closed ones those of the zeroed model."
    model = build(name)
    want, table = greedy(model), quarter(model)
    zeroed = greedy(zero_columns(copy.deepcopy(model), table))
    assert torch.equal(greedy(adapt(model)), want)
    assert torch.equal(greedy(set_gates(model, table)), zeroed)


@pytest.mark.parametrize('name', LISTED_ALL)
def test_generate_variants(name):
    "Left padding, sampling with a seed and beam search give the plain model's tokens."
    model = build(name)
    ids, mask = torch.cat([IDS, IDS.roll(3, 1)]), torch.ones(2, IDS.shape[1], dtype=torch.long, device=DEVICE)
    ids[1, :4], mask[1, :4] = 0, 0

    def runs():
        torch.manual_seed(0)
        sampled = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=True, pad_token_id=0, eos_token_id=None)
        return sampled, greedy(model, ids, attention_mask=mask), greedy(model, num_beams=2)
    want = runs()
    adapt(model)
    for a, b in zip(want, runs()): assert torch.equal(a, b)


@pytest.mark.parametrize('name', SEED + ['mistral', 'qwen3', 'phi3'])
def test_assisted_generation(name):
    model, draft = build(name), build(name, seed=1)
    want = greedy(model, assistant_model=draft)
    assert torch.equal(want, greedy(model))
    assert torch.equal(greedy(adapt(model), assistant_model=adapt(draft)), want)


@pytest.mark.parametrize('name', ALL)
def test_gradients_reach_every_gate(name):
    model = adapt(build(name), GateConfig('learned')).train()
    model(IDS, labels=IDS).loss.backward()
    for s in model.sentinel.now.heads:
        g = s.attn.sentinel.gate.grad
        assert g is not None and g.isfinite().all() and (g != 0).all(), f'layer {s.layer}: gradient {g}'


def test_adapt_in_inference_mode():
    "A gate made there is one whose changes are noticed: open, it has no hook and costs nothing."
    model = build('llama')
    with torch.inference_mode():
        want = logits(model)
        adapt(model)
        assert torch.equal(logits(model), want) and not any(s.out._forward_pre_hooks for s in model.sentinel.now.heads)
        assert not torch.equal(logits(set_gates(model, {(0, 0): 0.})), want)
        assert torch.equal(logits(set_gates(model, 1.)), want)
    gate_values(model)
    set_gates(model, {(0, 0): .5})


@pytest.mark.parametrize('name', ALL)
def test_merge_and_back(name):
    model = adapt(build(name))
    table = quarter(model)
    table[next(iter(model.sentinel.now.heads)).layer, 0] = .37
    want = logits(set_gates(model, table))
    weights = [core_linear(s.out).weight.clone() for s in model.sentinel.now.heads]
    torch.testing.assert_close(logits(merge_gates(model)), want, rtol=1e-4, atol=1e-4)
    assert not any(s.out._forward_pre_hooks for s in model.sentinel.now.heads)
    unmerge_gates(model)
    assert all(torch.equal(core_linear(s.out).weight, w) for s, w in zip(model.sentinel.now.heads, weights))
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize('name', ALL)
def test_map_matches_the_arithmetic(name):
    "Disturbing the rows that the map calls a head's reaches exactly that head's (for k and v: its group's) slice."
    model = build(name)
    for site in {s.layout: s for s in head_map(model)}.values():
        for h in range(site.n_heads):
            for part in 'qkv':
                try: got = probe(model, site, part, h)
                except UnsupportedArchitecture: continue  # latent or differential attention has no rows of its own
                g = h // site.group * site.group
                want = [h] if part == 'q' else list(range(g, g + site.group))
                if part in COUPLED.get(name, ''): assert got[want].all()
                else: assert got.nonzero().flatten().tolist() == want, f'{part} of head {h}'


@pytest.mark.parametrize('name', ['gpt2', 'opt', 'bloom', 'gpt_neox', 'llama', 'deepseek_v3', 'qwen3_next'])
def test_learning_then_hardening_meets_the_budget(name):
    model = adapt(build(name), GateConfig('hard_concrete', sparsity=.5))
    assert torch.equal(logits(model), logits(unadapt(copy.deepcopy(model))))  # starts open
    harden_gates(model)
    v = gate_values(model)
    assert int((v == 0).sum()) == round(.5*head_map(model).n_heads)
    assert set(v[~v.isnan()].tolist()) == {0., 1.}


@pytest.mark.parametrize('name', ['mamba', 'falcon_mamba', 'rwkv'])
def test_models_without_attention_are_refused(name):
    with pytest.raises(UnsupportedArchitecture, match='no attention module'): adapt(random_model(name))

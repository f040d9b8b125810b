"""Skip pathways on every architecture of the matrix: fresh ones change no bit, open ones stay causal and fit the cache, and all can be taken off.

`pytest tests/test_unet.py -k llama` runs one architecture.
"""
import copy
import functools
import pickle

import pytest
import torch
from sentinel_ai import adapt, compact, expand, gate_values, random_model, set_gates, unadapt, UnsupportedArchitecture
from torch.utils.checkpoint import checkpoint
from sentinel_ai.unet import add_skips, mirror_pairs, remove_skips, set_skip_gates, skip_gates, _block_paths
from test_matrix import ALL, IDS, LISTED, SEED, VARIANTS, greedy, logits, placed, quarter

# Layers enough for two pathways, where the config's layers aren't just `num_hidden_layers`
DEEP = {'gpt_neo': dict(num_hidden_layers=5, attention_types=[[['global', 'local', 'global', 'local', 'global'], 1]]),
        'bart': dict(decoder_layers=5, encoder_layers=5),
        'longcat_flash': dict(num_layers=3), 'nemotron_h': {}}
BF16 = SEED + ['qwen3', 'gemma2', 'falcon', 'mpt', 'deepseek_v3', 'jamba', 'gpt_oss']


def deep(name, dtype=torch.float32, seed=0):
    mt, kw = VARIANTS.get(name, (name, {}))
    return placed(random_model(mt, seed=seed, dtype=dtype, **(kw | DEEP.get(name, dict(num_hidden_layers=5)))))


def n_hooks(m): return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules())


def table(m, value, seed=0):
    "Some heads at `value`, unevenly."
    t = quarter(m, seed)
    return torch.where(t == 0, torch.tensor(value), t)


@pytest.mark.parametrize('name', ALL)
def test_pathways(name):
    "Fresh: bit-identical. Open: other logits, causal, cache and no cache agree, gates have gradients. Off: the model that was."
    model = deep(name)
    sd, hooks, want, plain = {k: v.clone() for k, v in model.state_dict().items()}, n_hooks(model), logits(model), greedy(model)
    assert add_skips(model, rank=8) is model
    paths = model.sentinel_skips.paths
    assert len(paths) >= (1 if name == 'longcat_flash' else 2)
    assert torch.equal(logits(model), want) and torch.equal(greedy(model), plain)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.gate.grad.isfinite() and p.gate.grad != 0 for p in paths)
    model.zero_grad()

    set_skip_gates(model, .3)
    opened, later = logits(model), IDS.clone()
    assert (opened - want).abs().max() > 1e-4
    later[:, 7:] = later[:, 7:].flip(1)
    assert (logits(model, later)[:, :7] - opened[:, :7]).abs().max() <= 1e-5
    tokens = greedy(model)
    assert all(p.stream is None and p.kept is None for p in paths)
    assert torch.equal(tokens, greedy(model, use_cache=False))

    set_skip_gates(model, 0.)
    assert torch.equal(logits(model), want)
    remove_skips(model)
    assert n_hooks(model) == hooks and not hasattr(model, 'sentinel_skips') and torch.equal(logits(model), want)
    assert model.state_dict().keys() == sd.keys() and all(torch.equal(v, sd[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name', ALL)
def test_with_gates_and_compact(name):
    "Gates, pathways and cutting heads out don't disturb each other; a state dict and a config bring all of it back."
    model = set_skip_gates(add_skips(deep(name), rank=8, seed=3), .3)
    want = logits(model)
    adapt(model)
    assert torch.equal(logits(model), want)
    twin = add_skips(deep(name, seed=1), **model.sentinel_skips.config())
    twin.load_state_dict(unadapt(copy.deepcopy(model)).state_dict())
    assert torch.equal(logits(twin), want)
    set_gates(model, table(model, 0.))
    want = logits(model)
    try: compact(model)
    except UnsupportedArchitecture: return              # heads can't be cut out of this one, with or without pathways
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-3)
    expand(model)
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(set_gates(remove_skips(model), 1.)), logits(deep(name)))


@pytest.mark.parametrize('name', BF16)
def test_bfloat16(name):
    model = deep(name, torch.bfloat16)
    want = logits(model)
    add_skips(model, rank=8)
    assert torch.equal(logits(model), want) and model.sentinel_skips.paths[0].up.dtype == torch.float32
    assert logits(set_skip_gates(model, .3)).dtype == torch.bfloat16 and not torch.equal(logits(model), want)
    assert torch.equal(logits(set_skip_gates(model.bfloat16(), 0.)), want)          # everything cast, as `.to(dtype)` does
    set_skip_gates(model, .3)(IDS, labels=IDS).loss.backward()
    assert all(p.gate.grad != 0 for p in model.sentinel_skips.paths)


@pytest.mark.parametrize('name', SEED + LISTED)
def test_generate_variants(name):
    "With left padding a row gives the tokens it gives alone; beam search with the cache gives those without it."
    model = set_skip_gates(add_skips(deep(name), rank=8), .3)
    ids, mask = torch.cat([IDS, IDS.roll(3, 1)]), torch.ones(2, IDS.shape[1], dtype=torch.long, device=IDS.device)
    ids[1, :4], mask[1, :4] = 0, 0
    if name not in ('gptj', 'codegen', 'gpt_bigcode'):               # as without pathways: test below
        assert torch.equal(greedy(model, ids, attention_mask=mask)[0], greedy(model)[0])
    assert torch.equal(greedy(model, num_beams=3), greedy(model, num_beams=3, use_cache=False))


@pytest.mark.parametrize('name', SEED + ['jamba', 'gemma2', 'qwen3_next', 'bart'])
def test_copies(name):
    "Deep copies and pickles have pathways of their own, in the middle of training too."
    model = set_skip_gates(adapt(add_skips(deep(name), rank=8)), .3).train()
    model(IDS, labels=IDS).loss.backward()
    want = logits(model.eval())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        set_skip_gates(twin, 0.)
        assert not torch.equal(logits(twin), want) and torch.equal(logits(model), want)
        assert n_hooks(remove_skips(twin)) < n_hooks(model)
    paths = pickle.loads(pickle.dumps(model)).sentinel_skips.paths
    assert all(p.stream is None and p.kept is None for p in paths)


def around(monkeypatch, model, **kw):
    "Checkpoint each block's whole call, hooks included, as earlier releases of transformers and PyTorch's own wrapper do."
    cls = type(model.get_submodule(_block_paths(model)[0][0]))
    monkeypatch.setattr(cls, '__call__', lambda self, *a, **k: checkpoint(functools.partial(torch.nn.Module.__call__, self, **k), *a, **kw), raising=False)


@pytest.mark.parametrize('how', ['forward', 'call'])
@pytest.mark.parametrize('name', SEED + ['mistral', 'qwen3', 'phi3', 'olmo2', 'mixtral'])
def test_gradient_checkpointing(name, how, monkeypatch):
    def grads(checkpointed, frozen):
        model = set_skip_gates(add_skips(deep(name), rank=8), .3).train()
        torch.manual_seed(0)                            # of the dropout
        model.config.use_cache = False
        if checkpointed and how == 'forward': model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        if checkpointed and how == 'call': around(monkeypatch, model, use_reentrant=False)
        if frozen:
            model.requires_grad_(False)
            model.sentinel_skips.requires_grad_(True)
        for _ in range(2): model(IDS, labels=IDS).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for frozen in (False, True):
        a, b = grads(False, frozen), grads(True, frozen)
        monkeypatch.undo()
        assert a.keys() == b.keys() and any('sentinel_skips' in n for n in a)
        for n in a: torch.testing.assert_close(a[n], b[n], rtol=1e-5, atol=1e-7, msg=lambda s: f'{n}: {s}')


def test_reentrant_checkpointing_around_blocks_raises(monkeypatch):
    model = set_skip_gates(add_skips(deep('llama'), rank=8), .3).train()
    around(monkeypatch, model, use_reentrant=True)
    with pytest.raises(RuntimeError, match='use_reentrant=False'): model(IDS, labels=IDS, use_cache=False).loss.backward()


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_compiles(name):
    model = set_skip_gates(add_skips(deep(name), rank=8), .3)
    want = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend='eager', fullgraph=True)), want, rtol=1e-5, atol=1e-5)


def test_under_lora():
    from peft import LoraConfig, get_peft_model
    model = set_skip_gates(add_skips(deep('llama'), rank=8), .3)
    want = logits(model)
    lora = get_peft_model(model, LoraConfig(target_modules=['q_proj'], r=2))
    assert torch.equal(logits(lora), want) and skip_gates(lora).tolist() == pytest.approx([.3, .3])
    lora(IDS, labels=IDS).loss.backward()
    lora.eval()
    assert torch.equal(logits(lora), want)
    assert not hasattr(remove_skips(lora).get_base_model(), 'sentinel_skips')


def test_shared_layers():
    "Zamba runs one attention in several blocks: pathways join the blocks."
    model = random_model('zamba', num_hidden_layers=6, layer_types=['mamba', 'hybrid']*3)
    want = logits(model)
    assert torch.equal(logits(add_skips(model, rank=8)), want)
    assert [tuple(p) for p in model.sentinel_skips.config()['pairs']] == mirror_pairs(6)
    assert not torch.equal(logits(set_skip_gates(model, .3)), want)


def test_block_at_several_places_is_refused():
    model = deep('llama')
    model.model.layers[3] = model.model.layers[1]
    hooks = n_hooks(model)
    with pytest.raises(UnsupportedArchitecture, match='several places'): add_skips(model)
    assert n_hooks(model) == hooks and not hasattr(model, 'sentinel_skips')
    assert len(add_skips(model, pairs=[(0, 4)]).sentinel_skips.paths) == 1


def test_wrong_order_raises():
    model = add_skips(deep('llama'), rank=8)
    stack = model.model.layers
    stack[0], stack[4] = stack[4], stack[0]             # the late block now runs first
    with pytest.raises(RuntimeError, match='ran without layer 0'): logits(model)


def test_layerdrop():
    "A layer that is left out at random passes nothing on, and nothing stale."
    model = set_skip_gates(add_skips(placed(random_model('opt', num_hidden_layers=5, layerdrop=.5)), rank=8), .3).train()
    for i in range(10):
        torch.manual_seed(i)
        model(IDS[:, :6+i % 3], labels=IDS[:, :6+i % 3]).loss.backward()
        assert all(p.stream is None for p in model.sentinel_skips.paths)


def test_meta_then_weights():
    "A model without data takes its pathways with the weights, as loading does."
    model = set_skip_gates(add_skips(deep('llama'), rank=8), .3)
    with torch.device('meta'): empty = copy.deepcopy(deep('llama'))
    add_skips(empty, **model.sentinel_skips.config())
    empty = add_skips(deep('llama').to('meta'), **model.sentinel_skips.config())
    assert all(p.is_meta for p in empty.sentinel_skips.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skip_gates(empty), skip_gates(model))


@pytest.mark.parametrize('name', ALL[:1])
def test_rows_are_the_maps(name):
    for n in ('llama', 'longcat_flash', 'nemotron_h', 'qwen3_next', 'bart', 'bert'):
        model = deep(n)
        assert len(_block_paths(model)[0]) == len(gate_values(adapt(model)))

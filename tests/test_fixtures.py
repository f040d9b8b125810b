"""Whatever release 0.1.0 saved is read, and is what it was: `tests/fixtures/0.1.0/`, written by `make_0_1_0.py`.

Weights, gates, plans, tables and memories are compared bit for bit. Logits were equal bit for bit where they were
written, but for `ungrow`, which adds the shares of a split head up again and rounds once. Other machines round
otherwise, so a difference of 1e-6 is allowed. An optimiser's state shows in the step that follows a checkpoint.
"""
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sentinel_ai as sa

FOLDER = Path(__file__).parent/'fixtures/0.1.0'
FACTS = json.loads((FOLDER/'expected.json').read_text(encoding='utf-8'))
EXPECTED = load_file(FOLDER/'expected.safetensors')
CHECKPOINTS = [name for name in FACTS if '/checkpoint' in name]
MODELS = [name for name in FACTS if '/' in name]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(name): return AutoModelForCausalLM.from_pretrained(FOLDER/name)


def plain(name):
    "A model of the base architecture with other weights: what a checkpoint is loaded into."
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(sa.SentinelConfig.from_pretrained(FOLDER/name).base_config()).eval()


@torch.no_grad()
def logits(model): return model.eval()(EXPECTED['ids'], use_cache=False).logits


def close(got, want, atol=1e-6): torch.testing.assert_close(got, want, atol=atol, rtol=0.)


def same(got, want): torch.testing.assert_close(got, want, atol=0., rtol=0., equal_nan=True)


def check_state(name, model):
    "Weights, gates and plan, bit for bit; what is computed with them."
    now, stored = model.state_dict(), load_file(FOLDER/name/'model.safetensors')
    assert stored.keys() <= now.keys()
    for key, want in stored.items(): same(now[key], want)
    same(sa.gate_values(model), EXPECTED[f'{name}/gates'])
    plan, known = model.sentinel.plan if model.sentinel.compact else None, FACTS[name]
    if known['plan'] is None: assert plan is None
    else:
        assert plan == sa.HeadPlan.from_dict(known['plan'])
        assert (plan.heads(), plan.kv_heads()) == (known['heads'], known['kv_heads'])
    close(logits(model), EXPECTED[f'{name}/logits'])


@pytest.mark.parametrize('name', MODELS)
def test_model(name): check_state(name, read(name))


@pytest.mark.parametrize('name', [name for name in MODELS if FACTS[name].get('undo')])
def test_undo(name):
    model = getattr(sa, FACTS[name]['undo'])(read(name))
    close(logits(model), EXPECTED[f'{name}/undone'])
    model_type, kind = name.split('/')
    if kind in ('repaired', 'compact_repaired', 'grown_heads'):
        close(logits(model), EXPECTED[f'{model_type}/base/logits'])


@pytest.mark.parametrize('name', [name for name in MODELS if name.endswith('/wired')])
def test_wired(name):
    model = read(name)
    assert sa.skip_gates(model).flatten().tolist() == [.5]
    agency = model.sentinel.agency
    assert agency.policy == 'record'
    assert [event['reason'] for event in agency.events] == ['to be stored']
    assert int((~agency.consent & agency.exists).sum()) == 1
    plan = model.sentinel.plan
    assert set(model.sentinel.memory) == set(map(tuple, (plan.exists & ~plan.keep).nonzero().tolist()))


@pytest.mark.parametrize('mode, budget', [('learned', None), ('hard_concrete', .5)])
def test_gate_config(mode, budget):
    config = read(f'llama/{mode}').sentinel.config
    assert (config.mode, config.sparsity) == (mode, budget)


def train_step(model, optimizer):
    "The step that followed the checkpoint."
    batch = EXPECTED['text'][:4]
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    optimizer.step()


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_checkpoint(name):
    model = plain(name)
    if FACTS[name]['plan'] is None: sa.adapt(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    found = sa.load_checkpoint(FOLDER/name, model, optimizer, scheduler=scheduler)
    same(torch.rand(3), EXPECTED[f'{name}/next_random'])
    assert (found['epoch'], found['step'], found['data']) == (1, 4, dict(block=3))
    assert found['head_lr_multipliers'] == {(0, 1): 2.}
    check_state(name, model)
    train_step(model.eval(), optimizer)
    close(logits(model), EXPECTED[f'{name}/after_step'], 1e-5)


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_checkpoint_without_optimizer(name):
    model = plain(name)
    sa.load_checkpoint(FOLDER/name, model, rng=False)
    check_state(name, model)


def test_stats():
    stats = sa.HeadStats.load(FOLDER/'stats.safetensors')
    assert stats.info == FACTS['stats']['info']
    wanted = {key.removeprefix('stats/'): t for key, t in EXPECTED.items() if key.startswith('stats/')}
    assert stats.tables.keys() == wanted.keys()
    for key, want in wanted.items(): same(stats.tables[key], want)


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_memory(dtype):
    name = f'memory_{dtype}'
    memory = sa.HeadMemory.load(FOLDER/f'{name}.safetensors')
    assert [list(key) for key in memory] == FACTS[name]['heads']
    assert [memory[key].meta for key in memory] == FACTS[name]['meta']
    for layer, head in memory:
        record = memory[layer, head]
        kinds = dict(value=record.tensors(), moment=record.states())
        got = {'/'.join((kind, *path)): t for kind, found in kinds.items() for path, t in found.items()}
        start = f'{name}/{layer}-{head}/'
        wanted = {key.removeprefix(start): t for key, t in EXPECTED.items() if key.startswith(start)}
        assert got.keys() == wanted.keys()
        for key, want in wanted.items(): same(got[key], want)


def test_files_are_complete():
    "No folder is without a test, and none was written again."
    found = {str(path.parent.relative_to(FOLDER).as_posix()) for path in FOLDER.glob('*/*/config.json')}
    assert found == set(MODELS)
    for path in FOLDER.rglob('sentinel_memory.safetensors'):
        with safe_open(path, 'pt') as f: assert f.metadata()['sentinel_memory'] == '1'

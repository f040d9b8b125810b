"""What a stranger's folder may not do: lead elsewhere, ask for code, ask for room, or be a little wrong and read all the same."""
import copy
import json
import os
import struct
import time

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from sentinel_ai import HeadMemory, adapt, close_heads, compact, io, prune, random_model, set_gates, unprune
from sentinel_ai.checkpoint import load_checkpoint, save_checkpoint
from sentinel_ai.loaders import load_adaptive_model, load_baseline_model
from sentinel_ai.plan import HeadPlan
from sentinel_ai.saving import MEMORY_FILE
from sentinel_ai.sealed import seal

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def masked(): return set_gates(adapt(random_model('llama')), {(0, 1): 0.})


def change(file, f):
    about = json.loads(file.read_text())
    f(about)
    file.write_text(json.dumps(about))


def refused(f, *words):
    start = time.process_time()
    with pytest.raises((ValueError, OSError)) as e: f()
    for word in words: assert str(word) in str(e.value), str(e.value)
    assert time.process_time() - start < 3


# --- code ---

@pytest.mark.parametrize('name', ['attn_implementation', '_attn_implementation', 'experts_implementation'])
def test_no_code_from_elsewhere(name, tmp_path):
    random_model('llama').save_pretrained(tmp_path/'plain')
    masked().save_pretrained(tmp_path/'masked')
    change(tmp_path/'plain'/'config.json', lambda d: d.update({name: 'some/kernels'}))
    change(tmp_path/'masked'/'config.json', lambda d: d['base'].update({name: 'some/kernels'}))
    for folder in ('plain', 'masked'): refused(lambda: load_adaptive_model(tmp_path/folder), 'code from elsewhere', tmp_path/folder)
    refused(lambda: AutoModelForCausalLM.from_pretrained(tmp_path/'masked'), 'code from elsewhere')


class Evil:
    def __reduce__(self): return os.mkdir, ('evil',)


def test_no_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=Evil()), 'm.pth')
    refused(lambda: load_checkpoint('m.pth', random_model('llama')), 'm.pth', 'no code')
    assert not os.path.exists('evil')


@pytest.mark.parametrize('name', ['utils', 'Trainer', 'AutoModelForCausalLM', 'LlamaForSequenceClassification', 'GPT2LMHeadModel', '__doc__'])
def test_the_class_is_a_model_of_its_config(name, tmp_path):
    "A name that is no class of such models is passed over for the one that is registered."
    masked().save_pretrained(tmp_path)
    change(tmp_path/'config.json', lambda d: d.update(base_class=name))
    try: m = load_adaptive_model(tmp_path)
    except (ValueError, OSError) as e: assert str(tmp_path) in str(e) or 'no language-model head' in str(e)
    else: assert type(m).__name__ == 'AdaptiveLlamaForCausalLM'


# --- places ---

def test_an_index_leads_nowhere_else(tmp_path):
    m = masked()
    m.save_pretrained(tmp_path/'a', max_shard_size='20KB')
    m.save_pretrained(tmp_path/'other')
    index = tmp_path/'a'/'model.safetensors.index.json'
    change(index, lambda d: d.update(weight_map={k: '../other/model.safetensors' for k in d['weight_map']}))
    for load in (load_adaptive_model, AutoModelForCausalLM.from_pretrained): refused(lambda: load(tmp_path/'a'), 'outside')


def test_a_list_of_files_leads_nowhere_else(tmp_path):
    m = masked()
    m.save_pretrained(tmp_path/'other')
    save_checkpoint(tmp_path/'c', m)
    change(tmp_path/'c'/'sentinel_checkpoint.json', lambda d: d['files'].update({'../other/model.safetensors': dict(size=1, sha256='x')}))
    refused(lambda: load_checkpoint(tmp_path/'c', masked()), 'outside')


@pytest.mark.parametrize('shards', [False, True])
@pytest.mark.parametrize('store', ['models--a/blobs', 'disk'])
@pytest.mark.parametrize('alias', [False, True])
def test_links_are_followed_to_read(alias, store, shards, tmp_path):
    "A snapshot in the cache of the Hub is nothing but links; weights lie on another disk; a folder has a second name."
    m, held, snapshot = masked(), tmp_path/store, tmp_path/'models--a'/'snapshots'/'1'
    HeadMemory().attach(m)
    close_heads(m, [(1, 1)], torch.arange(64).view(4, 16) + 3)
    compact(m)
    m.save_pretrained(held, **dict(max_shard_size='20KB') if shards else {})
    save_checkpoint(held/'c', m)
    snapshot.mkdir(parents=True)
    (snapshot/'c').mkdir()
    for file in held.rglob('*'):
        if file.is_file(): os.symlink(file, snapshot/file.relative_to(held))
    if alias:
        os.symlink(snapshot, tmp_path/'alias')
        snapshot = tmp_path/'alias'
    back = load_adaptive_model(snapshot)
    assert torch.equal(back(IDS).logits, m(IDS).logits) and list(back.sentinel.memory) == list(m.sentinel.memory)
    assert torch.equal(unprune(back)(IDS).logits, unprune(copy.deepcopy(m))(IDS).logits)
    other = random_model('llama')
    load_checkpoint(snapshot/'c', other)
    assert torch.equal(other(IDS).logits, m(IDS).logits)


def test_a_memory_is_not_written_through_links(tmp_path):
    m, victim = adapt(random_model('llama')), tmp_path/'victim'
    victim.write_text('mine')
    (tmp_path/'records').mkdir()
    os.symlink(victim, tmp_path/'records'/'0-1.safetensors')
    refused(lambda: HeadMemory(tmp_path/'records').remember(m, [(0, 1)]), 'leads out')
    assert victim.read_text() == 'mine'


def test_an_interrupted_save_names_nothing_outside(tmp_path):
    masked().save_pretrained(tmp_path/'a')
    (tmp_path/'mine').write_text('mine')
    ready = tmp_path/'a'/io._READY
    ready.mkdir()
    (ready/io._GONE).write_text('["../mine"]')
    refused(lambda: load_adaptive_model(tmp_path/'a'), io._GONE)
    assert (tmp_path/'mine').exists()


# --- room ---

SIZES = ['num_hidden_layers', 'hidden_size', 'vocab_size', 'intermediate_size', 'num_attention_heads', 'num_key_value_heads', 'head_dim']


@pytest.mark.parametrize('key', SIZES)
def test_no_room_for_claims(key, tmp_path):
    random_model('llama').save_pretrained(tmp_path/'plain')
    masked().save_pretrained(tmp_path/'masked')
    for folder, home in (('plain', lambda d: d), ('masked', lambda d: d['base'])):
        for value in (10**9, -1, 'x', True):
            change(tmp_path/folder/'config.json', lambda d: home(d).update({key: value}))
            refused(lambda: load_adaptive_model(tmp_path/folder), tmp_path/folder)


def test_headers_that_lie(tmp_path):
    file = tmp_path/'m.safetensors'
    for n in (0, 10**9, 2**62):
        file.write_bytes(struct.pack('<Q', n) + b'{}')
        refused(lambda: HeadMemory.load(file), file)


# --- a little wrong ---

def test_a_flipped_bit_is_found(tmp_path):
    m = adapt(random_model('llama'))
    prune(m, .25, IDS, rounds=1, progress=False)
    compact(m)
    m.save_pretrained(tmp_path)
    for name in ('model.safetensors', MEMORY_FILE):
        data = (tmp_path/name).read_bytes()
        (tmp_path/name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        refused(lambda: AutoModelForCausalLM.from_pretrained(tmp_path), name, 'checksum')
        AutoModelForCausalLM.from_pretrained(tmp_path, verify=False)
        (tmp_path/name).write_bytes(data)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, m(IDS).logits)
    m.save_pretrained(tmp_path/'b', checksum=False, max_shard_size='20KB')
    assert json.loads((tmp_path/'b'/'config.json').read_text())['weights'] is None
    assert torch.equal(load_adaptive_model(tmp_path/'b')(IDS).logits, m(IDS).logits)
    m.save_pretrained(tmp_path/'c', max_shard_size='20KB')
    assert len(json.loads((tmp_path/'c'/'config.json').read_text())['weights']) > 2
    assert torch.equal(load_adaptive_model(tmp_path/'c')(IDS).logits, m(IDS).logits)


def test_a_memory_of_another_model(tmp_path):
    m = adapt(random_model('llama'))
    memory = HeadMemory()
    memory.remember(m, [(1, 3)])
    memory.save(tmp_path/'m.safetensors')
    for other in (random_model('llama', num_attention_heads=2, num_key_value_heads=1), random_model('llama', hidden_size=64)):
        adapt(other)
        refused(lambda: HeadMemory.load(tmp_path/'m.safetensors').attach(other), 'another model')
        assert other.sentinel.memory is None


def test_a_scheduler_gets_no_attributes(tmp_path):
    def run():
        m = random_model('llama')
        opt = torch.optim.AdamW(m.parameters())
        return m, opt, torch.optim.lr_scheduler.StepLR(opt, 2)
    m, opt, scheduler = run()
    scheduler.state_dict = lambda: dict(step='evil')
    save_checkpoint(tmp_path/'c', m, opt, scheduler=scheduler)
    m, opt, scheduler = run()
    refused(lambda: load_checkpoint(tmp_path/'c', m, opt, scheduler=scheduler), tmp_path/'c', 'scheduler')
    assert callable(scheduler.step)


@pytest.mark.parametrize('name', ['resealed', 'unverified'])
def test_a_part_that_refuses_its_state_changes_nothing(name, tmp_path):
    class Part:
        def state_dict(self): return dict(x=1)
        def load_state_dict(self, d): raise KeyError('y')
    m = masked()
    save_checkpoint(tmp_path/'c', m, part=Part())
    if name == 'resealed': seal(tmp_path/'c', step=0)
    other = adapt(random_model('llama', seed=5))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    refused(lambda: load_checkpoint(tmp_path/'c', other, part=Part(), verify=name == 'resealed'), tmp_path/'c')
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(ValueError): load_checkpoint(tmp_path/'c', random_model('llama').to(torch.float64), verify=False)
    assert load_baseline_model(tmp_path/'c') is not None


# --- plans ---

PLAN = dict(version=3, model_type='llama', heads=[4, 4], kv_heads=[2, 2], removed=[[1], []], columns=[1], info={},
            channels=dict(channels=[8, 8], kept=['ff', '7f']))


@pytest.mark.parametrize('key, values', [
    ('version', [None, 'x', True, 99]), ('heads', [[4, '4'], [4, -1], [10**9]*2, 4, None, [True, 4], [4.]]),
    ('kv_heads', [[8, 8], [-1, 2], ['x', 2], [10**9, 2]]),
    ('removed', [[[77], []], [['x'], []], [[-1], []], [[1.], []], [[True], []], [[1, 1], []], [None, []], [[10**30], []]]),
    ('columns', [[77], ['x'], [-1], [1.], [True], [1, 1], 3, [None]]), ('info', [[], 3]),
    ('grown', [[1], [[0, 1]], 3, [[0, 3, 0, [[0, 0, 0]]]], [[0, 3, 2, 1]]]),
    ('channels', [3, {}, dict(channels=[10**9]*2, kept=['', '']), dict(channels=[8, 8], kept=['zz', 'ff']), dict(channels=[8, 8], kept=[1, 2])]),
    ('model_type', [3, None])])
def test_plans_are_what_they_say(key, values):
    HeadPlan.from_dict(PLAN)
    for value in values:
        with pytest.raises(ValueError): HeadPlan.from_dict(PLAN | {key: value})


@pytest.mark.parametrize('name', ['ridge', 'channel_ridge'])
def test_a_ridge_is_a_share(name):
    for value in (float('inf'), float('nan'), -1., 1e300):
        m = adapt(random_model('llama'))
        before = {k: v.clone() for k, v in m.state_dict().items()}
        with pytest.raises(ValueError, match='ridge'): prune(m, params=.8, batches=IDS, rounds=1, progress=False, **{name: value})
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())

"""Saving neither loses nor falsifies a model, and merged gates are honoured by every edit."""
import copy
import json
import os
import pickle
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from sentinel_ai import (GateConfig, adapt, compact, expand, gate_values, grow, harden_gates, merge_gates, prune,
                         random_model, set_gates, unadapt, unmerge_gates)
from sentinel_ai import io
from sentinel_ai.checkpoint import load_checkpoint, save_checkpoint
from sentinel_ai.adaptive import AdaptiveMixin
from sentinel_ai.loaders import load_adaptive_model
from sentinel_ai.pruning import close_heads, undo_repair, unprune
from sentinel_ai.unet import add_skips

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
EVENTS = {'open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.link', 'shutil.rmtree'}


@torch.no_grad()
def logits(m): return m(IDS).logits


def masked(*heads, seed=0): return set_gates(adapt(random_model('llama', seed=seed)), {h: 0. for h in heads})


def state(m): return {k: v.clone() for k, v in m.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# --- a save that is cut off ---

def save_killed_at(k, model, folder, one_step, fixed=False):
    "Save in a child process that ends, as by `kill -9`, before its k-th access to a file there. True if it got through."
    pid = os.fork()
    if pid == 0:
        try:
            seen = [0]

            def watch(event, args):
                if event not in EVENTS or not args or not str(args[0]).startswith(str(folder.parent)): return
                seen[0] += 1
                if seen[0] == k: os._exit(9)
            if not one_step: io.exchange = lambda one, other: False
            if fixed: io._fixed = lambda path: True
            sys.addaudithook(watch)
            model.save_pretrained(folder)
            os._exit(0)
        except BaseException: os._exit(7)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), code
    return code == 0


@pytest.mark.parametrize('how', ['one step', 'two renames', 'file by file'])
def test_killed_anywhere(how, tmp_path):
    old, new = masked((0, 1), (1, 2)), masked((0, 3), seed=1)
    want, seen, k = dict(old=logits(old), new=logits(new)), set(), 0
    while True:
        k += 1
        folder = tmp_path/str(k)/'m'
        old.save_pretrained(folder)
        (folder/'notes.txt').write_text('mine')
        done = save_killed_at(k, new, folder, how == 'one step', how == 'file by file')
        load = AutoModelForCausalLM.from_pretrained if how == 'one step' else load_adaptive_model
        got = logits(load(folder))
        found = [name for name, w in want.items() if torch.equal(got, w)]
        assert found, f'neither the old nor the new model after {k} accesses'
        assert (folder/'notes.txt').read_text() == 'mine'
        seen.update(found)
        if not done and k % 4 == 0:
            new.save_pretrained(folder)
            assert sorted(p.name for p in folder.parent.iterdir()) == ['m'] and torch.equal(logits(load_adaptive_model(folder)), want['new'])
            assert not [p for p in folder.iterdir() if p.name.startswith('.')]
        if done: break
    assert k > 10 and 'new' in seen and 'old' in seen


def test_a_full_disk(tmp_path):
    resource = pytest.importorskip('resource')
    old, new, folder = masked((0, 1)), masked((0, 3), seed=1), tmp_path/'m'
    old.save_pretrained(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limit[1]))
    try:
        with pytest.raises(OSError, match=str(folder)): new.save_pretrained(folder)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and os.listdir(tmp_path) == ['m']


def test_a_read_only_folder(tmp_path, monkeypatch):
    old, folder = masked((0, 1)), tmp_path/'m'
    old.save_pretrained(folder)
    real = os.access
    monkeypatch.setattr(os, 'access', lambda p, mode: Path(p) != folder and real(p, mode))
    with pytest.raises(PermissionError, match=str(folder)): masked((0, 3)).save_pretrained(folder)
    monkeypatch.undo()
    assert torch.equal(logits(load_adaptive_model(folder)), logits(old))


@pytest.mark.parametrize('how', ['one step', 'two renames', 'file by file'])
def test_two_processes_on_one_path(how, tmp_path):
    "One wins, whole, and neither leaves anything behind."
    models, folder = [masked((0, 1)), masked((0, 3), seed=1)], tmp_path/'m'
    wants = [logits(m) for m in models]
    models[0].save_pretrained(folder)
    children = []
    for m in models:
        pid = os.fork()
        if pid == 0:
            try:
                if how != 'one step': io.exchange = lambda one, other: False
                if how == 'file by file': io._fixed = lambda path: True
                for _ in range(6): m.save_pretrained(folder)
                os._exit(0)
            except BaseException: os._exit(7)
        children.append(pid)
    for _ in range(4 if how == 'one step' else 0):
        try: got = logits(load_adaptive_model(folder))
        except ValueError as e: assert 'checksum' in str(e)         # config of one, weights of the other
        else: assert any(torch.equal(got, w) for w in wants)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    assert any(torch.equal(logits(load_adaptive_model(folder)), w) for w in wants)
    assert os.listdir(tmp_path) == ['m'] and not [p.name for p in folder.iterdir() if p.name.startswith('.')]


# --- what else lies in the folder ---

def test_files_of_the_user_survive_and_ours_vanish(tmp_path):
    folder = tmp_path/'m'
    (folder/'checkpoint-1').mkdir(parents=True)
    (folder/'checkpoint-1'/'x').write_text('x')
    (folder/'tokenizer.json').write_text('{}')
    log = open(folder/'log.txt', 'a')
    m, _ = random_model('llama'), None
    prune(m, .25, IDS, progress=False)
    m.save_pretrained(folder, max_shard_size='20KB')
    assert (folder/'model.safetensors.index.json').exists() and (folder/'sentinel_memory.safetensors').exists()
    log.write('a line'); log.close()
    plain = adapt(random_model('llama', seed=3))
    plain.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ['checkpoint-1', 'config.json', 'generation_config.json', 'log.txt', 'model.safetensors', 'tokenizer.json']
    assert (folder/'log.txt').read_text() == 'a line' and (folder/'checkpoint-1'/'x').read_text() == 'x'
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == 'LlamaForCausalLM'
    m.save_pretrained(folder, max_shard_size='20KB')
    assert not (folder/'model.safetensors').exists()       # readers would take it before the shards
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(m))


def test_variants(tmp_path):
    m = masked((0, 1))
    m.save_pretrained(tmp_path)
    m.save_pretrained(tmp_path, variant='b')
    assert {'model.safetensors', 'model.b.safetensors'} <= set(os.listdir(tmp_path))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, variant='b')), logits(m))
    adapt(random_model('llama')).save_pretrained(tmp_path)        # another model: what is left of the old one would be read as this
    assert 'model.b.safetensors' not in os.listdir(tmp_path)


def test_a_readme_of_the_user_survives_a_plain_save(tmp_path):
    (tmp_path/'README.md').write_text('mine')
    adapt(random_model('llama')).save_pretrained(tmp_path)
    assert (tmp_path/'README.md').read_text() == 'mine'


def test_odd_targets(tmp_path, monkeypatch):
    m = masked((0, 1))
    (tmp_path/'real').mkdir()
    os.symlink(tmp_path/'real', tmp_path/'link')
    m.save_pretrained(tmp_path/'link')
    assert (tmp_path/'link').is_symlink() and (tmp_path/'real'/'config.json').exists()
    monkeypatch.chdir(tmp_path)
    m.save_pretrained('there')
    monkeypatch.chdir(tmp_path/'there')
    m = masked((0, 2))
    m.save_pretrained('.')
    assert os.path.samefile('.', tmp_path/'there') and torch.equal(logits(AutoModelForCausalLM.from_pretrained('.')), logits(m))
    monkeypatch.chdir(tmp_path)
    m.save_pretrained(tmp_path/'other', is_main_process=False)
    m.save_pretrained(tmp_path/'other', False)
    m.save_pretrained('there', safe_serialization=True)
    assert sorted(os.listdir(tmp_path)) == ['link', 'real', 'there']


def test_push_to_hub_uploads_the_whole_folder(tmp_path, monkeypatch):
    from sentinel_ai import saving
    sent = []
    monkeypatch.setattr(saving, '_upload', lambda d, repo_id, token: sent.append((sorted(os.listdir(d)), repo_id)))
    masked((0, 1)).save_pretrained(tmp_path/'m', push_to_hub=True)
    assert sent[0][1] == 'm' and 'model.safetensors' in sent[0][0]


# --- merged gates ---

def half_open(what):
    m = adapt(random_model('llama'))
    if what == 'repair': prune(m, .25, IDS, progress=False)
    layer, head = (gate_values(m) == 1).nonzero()[0].tolist()
    set_gates(m, {(layer, head): .5})
    if what == 'compact':
        set_gates(m, {(1, 1): 0.})
        compact(m)
    if what == 'skips': add_skips(m)
    return m


@pytest.mark.parametrize('what', ['plain', 'repair', 'compact', 'skips'])
def test_merged_gates_are_saved_once(what, tmp_path):
    m = half_open(what)
    gated, weights = logits(m), state(m)
    merge_gates(m)
    want, before = logits(m), state(m)
    m.save_pretrained(tmp_path)
    m.save_pretrained(tmp_path/'given', state_dict=m.state_dict())
    for folder in (tmp_path, tmp_path/'given'):
        got = logits(AutoModelForCausalLM.from_pretrained(folder))
        assert torch.allclose(got, want if what == 'plain' else gated, atol=1e-6)
    assert same(state(m), before)
    assert same(state(unmerge_gates(m)), weights)


def test_edits_of_merged_gates_are_refused():
    m = half_open('repair')
    merge_gates(m)
    before = state(m)
    edits = [unprune, undo_repair, compact, harden_gates, lambda m: close_heads(m, [(0, 1)], IDS), lambda m: set_gates(m, 1.),
             lambda m: adapt(m, GateConfig('learned')), lambda m: save_checkpoint(tempfile.mkdtemp() + '/c', m)]
    for edit in edits:
        with pytest.raises(RuntimeError, match='unmerge_gates'): edit(m)
        assert same(state(m), before) and m.sentinel.repairs
    want = random_model('llama')
    unprune(unmerge_gates(m))
    assert torch.allclose(logits(m), logits(want), atol=1e-6)


@pytest.mark.parametrize('how', ['as it is', 'copied', 'pickled', 'after momentum'])
def test_training_while_merged(how):
    m = masked((0, 1))
    set_gates(m, {(1, 2): .5})
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)
    if how == 'after momentum':
        set_gates(m, {(0, 1): 1.})
        m(input_ids=IDS, labels=IDS).loss.backward()
        opt.step(); opt.zero_grad()
        set_gates(m, {(0, 1): 0.})
    merge_gates(m)
    if how in ('copied', 'pickled'):
        m = copy.deepcopy(m) if how == 'copied' else pickle.loads(pickle.dumps(m))
        opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)
    first = logits(m)
    for _ in range(4):
        m(input_ids=IDS, labels=IDS).loss.backward()
        opt.step(); opt.zero_grad()
    want = logits(m)
    assert m.sentinel.now.heads[0].out.weight[:, m.sentinel.now.heads[0].cols(1)].abs().max() == 0
    assert not torch.allclose(first, want)
    assert torch.allclose(logits(unmerge_gates(m)), want, atol=1e-4)


# --- learned gates on a compact model ---

@pytest.mark.parametrize('mode', ['learned', 'hard_concrete'])
def test_learned_gates_on_a_compact_model(mode, tmp_path):
    m = masked((0, 1))
    compact(m)
    adapt(m, GateConfig(mode, sparsity=.3))
    with torch.no_grad(): m.sentinel.now.heads[0].attn.sentinel.gate[1] = .25
    m.save_pretrained(tmp_path/'m')
    save_checkpoint(tmp_path/'c', m, step=1)
    whole, fresh = AutoModelForCausalLM.from_pretrained(tmp_path/'m'), adapt(random_model('llama', seed=4))
    assert load_checkpoint(tmp_path/'c', fresh)['step'] == 1
    for got in (whole, fresh):
        assert got.sentinel.config == m.sentinel.config and same(state(got), state(m)) and torch.equal(logits(got), logits(m))
        assert [n for n, p in got.named_parameters() if p.requires_grad] == [n for n, p in m.named_parameters() if p.requires_grad]


def test_a_checkpoint_is_not_loaded_into_merged_gates(tmp_path):
    save_checkpoint(tmp_path/'c', masked((0, 1)))
    m = merge_gates(half_open('plain'))
    before = state(m)
    with pytest.raises(RuntimeError, match='unmerge_gates'): load_checkpoint(tmp_path/'c', m)
    assert same(state(m), before)


# --- a forward on the instance ---

def test_hooks_move_although_forward_is_on_the_instance():
    peft = pytest.importorskip('peft')
    m = random_model('llama')
    m.forward = m.forward                                      # as accelerate does for bf16 and for device maps
    adapt(m)
    set_gates(m, {(0, 0): 0.})
    lora = peft.get_peft_model(m, peft.LoraConfig(target_modules=['o_proj'], init_lora_weights=False)).eval()
    want = logits(lora)
    with torch.no_grad(): lora.base_model.model.model.layers[0].self_attn.o_proj.lora_A['default'].weight[:, :8] += 1.
    assert torch.equal(logits(lora), want)


def test_nothing_is_left_behind():
    def hooks(m): return [k for x in m.modules() for k, h in x._forward_pre_hooks.items() if getattr(h, '__func__', None) is AdaptiveMixin._sync]
    m = adapt(random_model('llama'))
    adapt(m, GateConfig('learned'))
    assert len(hooks(m)) == 1
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert len(hooks(twin)) == 1 and next(iter(twin.model._forward_pre_hooks.values())).__self__ is twin
    unadapt(m)
    assert not hooks(m) and not any(x._forward_pre_hooks for x in m.modules())


def test_the_state_of_a_folder_is_one(tmp_path):
    "The files of two writers never mix."
    with io.staged(tmp_path/'a') as outer:
        with io.staged(outer/'inner') as inner: io.write_text(inner/'x', 'x')
        assert json.dumps(sorted(os.listdir(tmp_path))) == '[".a.tmp"]'
    assert (tmp_path/'a'/'inner'/'x').read_text() == 'x'


@pytest.mark.parametrize('name', ['apertus', 'llama', 'gpt2'])
def test_saved_any_number_of_times(name, tmp_path):
    "transformers leaves the config's dtype as text behind; whatever builds a second model from that config still can."
    model = random_model(name)
    prune(model, .25, IDS, rounds=1, progress=False)
    compact(model)
    want = logits(model)
    for i in range(3): model.save_pretrained(tmp_path/str(i))
    model.config.dtype = 'float32'
    grow(model, layers=[0])
    model.save_pretrained(tmp_path/'deeper')
    for i in range(3): assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path/str(i))), want)


def test_pruned_further_after_a_save_without_memory(tmp_path):
    "What was cut out before isn't known, what is cut out now is: the folder is read, and only as much comes back."
    m, text = load_adaptive_model('tiny-llama'), torch.arange(1024).view(8, 128)
    prune(m, params=.9, batches=text, rounds=1, progress=False)
    compact(m)
    m.save_pretrained(tmp_path/'a', memory=False)
    m = load_adaptive_model(tmp_path/'a')
    prune(m, params=.95, batches=text, rounds=1, progress=False)
    compact(m)
    m.save_pretrained(tmp_path/'b')
    back = load_adaptive_model(tmp_path/'b')
    with torch.no_grad(): assert torch.equal(back(text[:1]).logits, m(text[:1]).logits)
    with pytest.raises(RuntimeError, match="weren't saved"): expand(back)

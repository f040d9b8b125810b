"""Every kind of file that the library writes is damaged in every way, and read: it reads, or it raises an error that names it.

`SENTINEL_DAMAGE=5000` damages each kind so many times (default 16); `SENTINEL_SEED=3` starts elsewhere.
"""
import copy
import importlib.util
import json
import os
import random
import resource
import shutil
import struct
import time
import warnings

import pytest
import torch
import transformers
from sentinel_ai import HeadMemory, adapt, add_skips, compact, elastic, measure, prune, random_model, resize, set_gates
from sentinel_ai.agency import Agency
from sentinel_ai.audit import read_log
from sentinel_ai.checkpoint import load_checkpoint, save_checkpoint
from sentinel_ai.controller import ThresholdController
from sentinel_ai.decide import ANNController
from sentinel_ai.export import export_gguf, gguf_logits
from sentinel_ai.foreign import damaged, read_json
from sentinel_ai.learning import GateCallback
from sentinel_ai.loaders import load_adaptive_model
from sentinel_ai.plan import HeadPlan
from sentinel_ai.sealed import seal
from sentinel_ai.family_file import FAMILY_FILE, read_family, save_family
from sentinel_ai.stats import HeadStats

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
TIMES = int(os.environ.get('SENTINEL_DAMAGE', 16))
SEED = int(os.environ.get('SENTINEL_SEED', 0))
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
PLAIN = random_model('llama')


# --- what is written ---

def pruned(memory=True):
    "Heads and channels removed, the rest repaired, all of it remembered."
    m = adapt(copy.deepcopy(PLAIN))
    if memory: HeadMemory().attach(m)
    Agency().attach(m)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        prune(m, params=.8, batches=IDS, rounds=1, progress=False, multiple=1)
    compact(m)
    return m


MODEL = pruned()


def optimizer_of(m):
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3)
    m(input_ids=IDS, labels=IDS).loss.backward()
    opt.step(); opt.zero_grad()
    return opt


def write_folder(d): MODEL.save_pretrained(d)


def write_skips(d):
    add_skips(copy.deepcopy(MODEL), 2).save_pretrained(d)


def write_gguf(d):
    d.mkdir()
    export_gguf(copy.deepcopy(PLAIN), d/'m.gguf', False, 'f32')
def write_sharded(d): MODEL.save_pretrained(d, max_shard_size='20KB')


def write_checkpoint(d):
    m = copy.deepcopy(MODEL)
    opt = optimizer_of(m)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 9)
    controller = ThresholdController()
    save_checkpoint(d, m, opt, scheduler=scheduler, step=3, gates=controller)


def write_memory(d):
    d.mkdir()
    MODEL.sentinel.memory.save(d/'memory.safetensors')


def write_family(d):
    d.mkdir()
    m = copy.deepcopy(PLAIN)
    save_family(elastic(m, IDS, .9, rounds=1, progress=False), d/FAMILY_FILE)


def write_stats(d):
    d.mkdir()
    m = adapt(copy.deepcopy(PLAIN))
    measure(m, IDS, progress=False).save(d/'stats.safetensors')


def write_plan(d):
    d.mkdir()
    (d/'plan.json').write_text(json.dumps(MODEL.sentinel.plan.to_dict()))


def write_agency(d):
    d.mkdir()
    agency = Agency(log=d/'log.jsonl')
    agency.attach(adapt(copy.deepcopy(PLAIN)))
    agency.withdraw((0, 1), 'a test')
    (d/'agency.json').write_text(json.dumps(agency.to_dict()))


def write_controller(d): ANNController().save(d)


def write_record(d):
    d.mkdir()
    callback = GateCallback(.5)
    callback.steps, callback.gates = [0, 1], [torch.ones(2, 4), torch.zeros(2, 4)]
    (d/'gates.json').write_text(json.dumps(callback.state_dict()))


def write_pth(d):
    d.mkdir()
    torch.save(dict(model=PLAIN.state_dict(), epoch=3), d/'m.pth')


# --- how it is read; each gives what was read, and the models that must not change when it isn't ---

def read_folder(d): load_adaptive_model(d)
def read_gguf(d): gguf_logits(d/'m.gguf', IDS[0])


def read_unsealed(d): load_adaptive_model(d, verify=False)


def target():
    "What checkpoints are loaded into."
    m = set_gates(adapt(copy.deepcopy(PLAIN)), {(0, 0): .5})
    opt = optimizer_of(m)
    return m, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 9)


TARGET, OPTIMIZER, SCHEDULER = target()


def state_of_target():
    moments = {f'{i}/{k}': torch.as_tensor(v).clone() for i, s in enumerate(OPTIMIZER.state.values()) for k, v in s.items()}
    groups = [{k: v for k, v in g.items() if k != 'params'} for g in OPTIMIZER.param_groups]
    return {k: v.clone() for k, v in TARGET.state_dict().items()} | moments, groups


WANT = state_of_target()


def same_as_before():
    tensors, groups = state_of_target()
    return groups == WANT[1] and tensors.keys() == WANT[0].keys() and all(torch.equal(t, WANT[0][k]) for k, t in tensors.items())


def put_back():
    "A new target, as the first one was."
    global TARGET, OPTIMIZER, SCHEDULER
    TARGET, OPTIMIZER, SCHEDULER = target()


def resume(d, **kw):
    load_checkpoint(d, TARGET, OPTIMIZER, scheduler=SCHEDULER, gates=ThresholdController(), **kw)
    return True


def read_checkpoint(d): return resume(d)
def read_unverified(d): return resume(d, verify=False)


def read_resealed(d):
    "A stranger can compute hashes, too."
    (d/'sentinel_checkpoint.json').unlink(missing_ok=True)
    seal(d, epoch=0, step=3)
    return resume(d)


def read_memory(d, **kw):
    m = adapt(copy.deepcopy(PLAIN))
    with damaged(d): HeadMemory.load(d/'memory.safetensors', **kw).attach(m)


def read_memory_unsealed(d): read_memory(d, verify=False)
def read_sizes(d, **kw):
    "What is read is used: a size comes out, or an error before anything is changed."
    m = adapt(copy.deepcopy(PLAIN))
    m.sentinel.family = read_family(d/FAMILY_FILE, m, **kw)
    try: resize(m, params=.95)
    except ValueError as e:
        assert all(torch.equal(t, m.state_dict()[k]) for k, t in PLAIN.state_dict().items()), 'refused, and changed'
        raise ValueError(f'{d}: {e}') from e
    assert m(input_ids=IDS).logits.isfinite().all(), 'a size that computes NaN'
    resize(m, params=1.)
    assert all(torch.equal(t, m.state_dict()[k]) for k, t in PLAIN.state_dict().items()), 'not what was built'


def read_sizes_unsealed(d): read_sizes(d, verify=False)
def read_stats(d): HeadStats.load(d/'stats.safetensors')


def read_plan(d):
    saved = read_json(d/'plan.json')
    try: HeadPlan.from_dict(saved).check(MODEL.sentinel.built)
    except ValueError as e: raise ValueError(f'{d}: {e}') from e


def read_agency(d):
    if (d/'log.jsonl').is_file(): read_log(d/'log.jsonl')
    with damaged(d): Agency.from_dict(json.loads((d/'agency.json').read_text()))


def read_controller(d): ANNController.pretrained(path=d)


def read_record(d):
    with damaged(d): GateCallback(.5).load_state_dict(json.loads((d/'gates.json').read_text()))


def read_pth(d): load_checkpoint(d/'m.pth', copy.deepcopy(PLAIN))


KINDS = {
    'folder': (write_folder, read_folder), 'folder, unverified': (write_folder, read_unsealed),
    'shards': (write_sharded, read_folder), 'checkpoint': (write_checkpoint, read_checkpoint),
    'checkpoint, unverified': (write_checkpoint, read_unverified), 'checkpoint, resealed': (write_checkpoint, read_resealed),
    'memory': (write_memory, read_memory), 'memory, unverified': (write_memory, read_memory_unsealed),
    'family': (write_family, read_sizes), 'family, unverified': (write_family, read_sizes_unsealed), 'stats': (write_stats, read_stats),
    'plan': (write_plan, read_plan), 'agency': (write_agency, read_agency), 'controller': (write_controller, read_controller),
    'record': (write_record, read_record), 'pth': (write_pth, read_pth), 'skips': (write_skips, read_folder)}
if importlib.util.find_spec('gguf'): KINDS['gguf'] = write_gguf, read_gguf


# --- damage ---

def nested(n):
    x = []
    for _ in range(n): x = [x]
    return x


VALUES = [None, True, False, -1, 0, 1, 3, 10**6, 10**9, 10**18, 10**30, .5, -1e300, float('nan'), float('inf'), '', 'x', '../x', '/etc/passwd', 'a'*5000,
          [], {}, [[]], [1, 2, 3], [True], ['x'], [-1], [10**9]*3, {'x': 1}, {'$tensor': 'x'}, {'$array': ['float64', [1]]}, {'$array': ['(99999999,)f8', 1]},
          {'$tuple': []}, {'$dict': [[[], 1]]}, nested(50)]


def places(tree, at=()):
    "All paths in a tree of JSON."
    if at: yield at
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for k, v in pairs: yield from places(v, (*at, k))


def change_tree(tree, rng):
    "A tree with one thing in it changed. Places near the root are as likely as those in long lists."
    tree = copy.deepcopy(tree)
    found = list(places(tree))
    if not found: return rng.choice(VALUES)
    depth = rng.choice(sorted({len(p) for p in found}))
    *way, last = rng.choice([p for p in found if len(p) == depth])
    home = tree
    for k in way: home = home[k]
    how = rng.choice(['delete', 'replace', 'replace', 'replace', 'longer', 'rename'])
    value = home[last]
    if how == 'delete': home.pop(last)
    elif how == 'longer' and isinstance(value, list): value.insert(rng.randint(0, len(value)), copy.deepcopy(rng.choice(value or VALUES)))
    elif how == 'rename' and isinstance(home, dict): home[f'{last}x'] = home.pop(last)
    else: home[last] = copy.deepcopy(rng.choice(VALUES))
    return tree


def twice(text, rng):
    "JSON in which a key is there a second time, with another value."
    at = [i for i, c in enumerate(text) if c == '{' and text[i+1:i+2] == '"']
    if not at: return text
    i = rng.choice(at)
    key = text[i+1:text.index('"', i + 2) + 1]
    return f'{text[:i+1]}{key}: {json.dumps(rng.choice(VALUES))}, {text[i+1:]}'


def change_bytes(data, rng):
    how = rng.choice(['cut', 'flip', 'flip', 'zeros', 'tail', 'nothing', 'noise', 'nested', 'mark'])
    i = rng.randint(0, max(0, len(data) - 1))
    if how == 'cut': return data[:i]
    if how == 'flip' and data: return data[:i] + bytes([data[i] ^ 1 << rng.randint(0, 7)]) + data[i+1:]
    if how == 'zeros': return data[:i] + bytes(len(data[i:i+64])) + data[i+64:]
    if how == 'tail': return data + data[:i]
    if how == 'noise': return rng.randbytes(100)
    if how == 'nested': return b'['*50_000
    if how == 'mark': return b'\xef\xbb\xbf' + data
    return b''


def change_header(data, rng):
    "The header of a safetensors file is JSON, and so are texts in its metadata."
    n = struct.unpack('<Q', data[:8])[0]
    tree = json.loads(data[8:8+n])
    texts = [k for k, v in tree.get('__metadata__', {}).items() if v[:1] in ('{', '[')]
    if texts and rng.random() < .7:
        key = rng.choice(texts)
        tree['__metadata__'][key] = json.dumps(change_tree(json.loads(tree['__metadata__'][key]), rng))
    else: tree = change_tree(tree, rng)
    header = json.dumps(tree).encode()
    length = rng.choice([len(header)]*9 + [10**9, 2**62, 0])
    return struct.pack('<Q', length) + header + data[8+n:]


def damage(folder, rng):
    "One file of a folder, changed. Says how."
    files = sorted(p for p in folder.rglob('*') if p.is_file() and p.name != 'README.md')
    file = rng.choice(files)
    data = file.read_bytes()
    how = rng.choice(['bytes', 'inside', 'inside', 'inside', 'gone', 'twice'])
    if how == 'gone':
        file.unlink()
        if rng.random() < .5: file.mkdir()
    elif how == 'inside' and file.suffix == '.json': file.write_text(json.dumps(change_tree(json.loads(data), rng)))
    elif how == 'twice' and file.suffix == '.json': file.write_text(twice(data.decode(), rng))
    elif how == 'inside' and file.suffix == '.safetensors': file.write_bytes(change_header(data, rng))
    else: file.write_bytes(change_bytes(data, rng))
    return f'{how} {file.name}'


# --- the promise ---

@pytest.fixture(scope='module', params=list(KINDS))
def kind(request, tmp_path_factory):
    write, read = KINDS[request.param]
    folder = tmp_path_factory.mktemp('whole')/'it'
    write(folder)
    return request.param, folder, read


def attempt(read, folder):
    "Read; the error, if there is one. `True` if the target was changed."
    try: return read(folder), None
    except (ValueError, OSError) as e: return False, e


def test_damaged(kind, tmp_path):
    name, whole, read = kind
    faults = []
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(TIMES):
        rng = random.Random(f'{name} {SEED + i}')
        folder = tmp_path/'it'
        shutil.copytree(whole, folder)
        how = damage(folder, rng)
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                changed, e = attempt(read, folder)
            if e is not None and str(folder) not in str(e): faults.append((i, how, 'unnamed', repr(e)[:300]))
            if not changed and not same_as_before(): faults.append((i, how, 'changed', repr(e)[:300]))
        except Exception as e: faults.append((i, how, 'raw', f'{type(e).__name__}: {str(e)[:300]}'))
        if time.process_time() - start > 3: faults.append((i, how, 'slow', f'{time.process_time() - start:.1f} s'))
        if 'checkpoint' in name and not same_as_before(): put_back()
        shutil.rmtree(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)/1024
    if grown > 400: faults.append((name, 'memory', f'{grown:.0f} MB'))
    assert not faults, '\n'.join(map(str, faults))

"""What is written is there as a whole, the old or the new, wherever the disk gets full or somebody interrupts.

Each change to a file or folder is a place where it breaks off: `FAULTS=all pytest tests/test_files.py` tries all places in all ways,
an ordinary run some of them.
"""
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from faults import DiskFull, FILE_KINDS, attempt, fail_at_file  # noqa: E402

from sentinel_ai import (Agency, HeadMemory, adapt, compact, load_checkpoint, measure, prune, random_model, save_checkpoint,  # noqa: E402
                         set_gates)
from sentinel_ai.agency import read_log  # noqa: E402
from sentinel_ai.controller import ANNController, ElasticBudget  # noqa: E402
from sentinel_ai.loaders import load_adaptive_model  # noqa: E402
from sentinel_ai.report import report  # noqa: E402
from sentinel_ai.stats import HeadStats  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings('ignore')
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
WAYS = [(DiskFull, False), (DiskFull, True), (KeyboardInterrupt, False)]
IS_WHOLE = os.environ.get('FAULTS') == 'all'


@torch.no_grad()
def logits(model): return model(IDS).logits


def masked(seed):
    "A model with some heads closed; the second is compact."
    model = set_gates(adapt(random_model('llama', seed=seed)), {(0, seed + 1): 0., (1, 2): 0.})
    if seed: compact(model)
    return model


def trained(seed):
    model = masked(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    return model, optimizer


def remembering(seed):
    memory = HeadMemory()
    prune(adapt(random_model('llama', seed=seed)), 2 + seed, IDS, 'random', rounds=1, repair='none', progress=False)
    memory.attach(model := adapt(random_model('llama', seed=seed)))
    memory.remember(model, [(0, seed), (1, 1)])
    return memory


def restored(path):
    model = random_model('llama', seed=5)
    load_checkpoint(path, model)
    return logits(model)


def weights(controller): return {k: v for k, v in controller.state_dict().items() if v.is_floating_point()}


def read_memory(path):
    memory = HeadMemory.load(path)
    return {f'{key} {name} {part}': v for key in memory for (name, part), v in memory[key].tensors().items()}


def places(n, count, gen):
    "Where faults are put: spread over all accesses, the first and the last among them."
    if n >= count: return list(range(1, count + 1))
    return sorted({1, count, *(int((i + gen.random())*count/n) + 1 for i in range(n))})


def run_folder(seed):
    "As little as a run of `sentinel-train` may leave behind."
    folder = Path(tempfile.mkdtemp())
    (folder/'run.json').write_text(json.dumps(dict(run=dict(model=f'model {seed}', text='a text'))))
    (folder/'metrics.jsonl').write_text(json.dumps(dict(step=1, loss=1. + seed)) + '\n')
    return folder


WRITERS = {     # a name: what is made of a seed, how it is written to a path, what is read from there
    'save_pretrained': (masked, lambda x, path: x.save_pretrained(path), lambda path: logits(load_adaptive_model(path))),
    'save_checkpoint': (trained, lambda x, path: save_checkpoint(path, *x), restored),
    'memory': (remembering, lambda x, path: x.save(path.with_suffix('.safetensors')), lambda path: read_memory(path.with_suffix('.safetensors'))),
    'stats': (lambda seed: measure(random_model('llama', seed=seed), IDS, progress=False), lambda x, path: x.save(path),
              lambda path: HeadStats.load(path).tables),
    'controller': (lambda seed: ANNController(ElasticBudget(.2), seed=seed), lambda x, path: x.save(path),
                   lambda path: weights(ANNController.pretrained(path=path))),
    'report': (run_folder, lambda x, path: report(x, path.with_suffix('.html')),
               lambda path: path.with_suffix('.html').read_text()),
}


def alike(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(alike(v, b[k]) for k, v in a.items())
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b


def copied(there, here):
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(there, here)
    return here


@pytest.mark.parametrize('name', WRITERS)
def test_old_or_new_wherever_it_breaks(name, tmp_path):
    make, write, read = WRITERS[name]
    old, new = make(0), make(1)
    begin, done, found = tmp_path/'begin', tmp_path/'done', set()
    begin.mkdir()
    write(old, begin/'x')
    copied(begin, done)
    with fail_at_file(folder=done) as files: write(new, done/'x')
    wants = dict(old=read(begin/'x'), new=read(done/'x'))
    assert not alike(*wants.values()) and files.count
    for n in places(files.count if IS_WHOLE else 6, files.count, random.Random(0)):
        for i, (kind, lasting) in enumerate(WAYS):
            if not IS_WHOLE and i != n % len(WAYS): continue
            here = copied(begin, tmp_path/'here')
            fault = fail_at_file(n, kind, here, lasting)
            came = attempt(lambda: write(new, here/'x'), fault)
            got = read(here/'x')
            is_there = [k for k, v in wants.items() if alike(got, v)]
            assert is_there, f'neither old nor new: {kind.__name__} at {n}, {fault.fired}'
            assert came is not None or is_there == ['new'], f'{fault.fired}: nothing was said, and nothing saved'
            found.update(is_there)
            write(new, here/'x')                                    # the next one clears what was left
            assert sorted(os.listdir(here)) == sorted(os.listdir(done)), fault.fired
            if (here/'x').is_dir(): assert sorted(os.listdir(here/'x')) == sorted(os.listdir(done/'x')), fault.fired
            assert alike(read(here/'x'), wants['new'])
    assert 'old' in found


@pytest.mark.parametrize('kind', FILE_KINDS)
def test_a_log_and_the_model_say_the_same(kind, tmp_path):
    "A change that can't be logged isn't made."
    n = 0
    while True:
        n += 1
        path = tmp_path/f'{n}.jsonl'
        agency = Agency(log=path)
        model = adapt(random_model('llama'))
        agency.attach(model)
        agency.withdraw([(0, 0)], 'for a test')
        lines, before = path.read_bytes(), logits(model)
        fault = fail_at_file(n, kind, tmp_path)
        came = attempt(lambda: agency.withdraw([(1, 2), (1, 3)], 'for a test'), fault)
        if came is None: break
        assert path.read_bytes() == lines and torch.equal(logits(model), before)
        agency.withdraw([(1, 2)], 'for a test')
        assert len(read_log(path)) > len(lines.splitlines())
    assert n > 1, 'nothing was written'

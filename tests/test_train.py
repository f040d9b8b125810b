"""Training that is stopped and resumed: bit for bit, across heads that leave, are cut out and return; and what a broken write leaves.

`pytest tests/test_train.py -k llama` runs one architecture. `python tests/test_train.py --kills 10` kills a run ten times at random moments.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from sentinel_ai import HeadPlan, adapt, compact, expand, gate_values, prune, random_model, set_gates
from sentinel_ai import checkpoint as ck, controller, io
from sentinel_ai.agency import Agency
from sentinel_ai.checkpoint import (check_checkpoint, latest_checkpoint, load_checkpoint, optimizer_state, restore, save_checkpoint,
                                    sync_optimizer)
from sentinel_ai.sentinel import GateConfig
from sentinel_ai.memory import HeadMemory
from sentinel_ai.regrow import regrow
from sentinel_ai.surgery import head_slices, local_head
from sentinel_ai.train import AdaptiveCallback, AdaptiveTrainer, AdaptiveTrainerMixin, GateCallback, HeadLR, Plasticity, adaptive_trainer
from sentinel_ai.unet import add_skips

ARCHS = ['llama', 'gpt2', 'bloom', 'gpt_neox', 'opt']
IDS = torch.arange(40).view(2, 20) + 4
MOVES = {3: {(0, 1): False, (1, 2): False, (1, 3): False}, 8: {(0, 1): True, (1, 3): True}}
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


class Script:
    "A controller that decides by the step alone."
    needs = ('gradient',)

    def __init__(self, moves=MOVES): self.moves, self.seen = moves, 0

    def decide(self, stats, plan, step):
        keep, self.seen = plan.keep.clone(), self.seen + 1
        for head, on in self.moves.get(step, {}).items(): keep[head] = on
        return HeadPlan(keep, plan.exists, plan.kv, plan.model_type)

    def state_dict(self): return dict(seen=self.seen)
    def load_state_dict(self, d): self.seen = d['seen']


class Pause(TrainerCallback):
    "Slow enough to be killed anywhere."
    def on_step_begin(self, *args, **kwargs): time.sleep(.05)


def blocks():
    ids = torch.randint(4, 90, (40, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict(dict(input_ids=ids, labels=ids))


def with_dropout(name):
    m = random_model(name)
    for x in m.modules():
        if isinstance(x, torch.nn.Dropout): x.p = .1
        if isinstance(getattr(x, 'attention_dropout', None), float): x.attention_dropout = .1
    return m


def make(name, folder, callbacks=(), cls=AdaptiveTrainer, cycle=None, model=None, **kw):
    args = TrainingArguments(**(dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=12, learning_rate=3e-3, weight_decay=.1, max_grad_norm=.5,
        lr_scheduler_type='cosine', warmup_steps=2, report_to='none', logging_steps=1, save_strategy='steps', save_steps=1, disable_tqdm=True,
        use_cpu=os.environ.get('SENTINEL_DEVICE', 'cpu') == 'cpu', seed=3) | kw))
    data = blocks()
    cycle = cycle or AdaptiveCallback(Script(), every=1, regrow=dict(init='memory', warmup=3), compact_every=5,
                                      head_lr=dict(multipliers={(0, 0): .5}, schedule=(3., 2)))
    t = cls(model or with_dropout(name), args, train_dataset=data, eval_dataset=data.select(range(8)), callbacks=[cycle, *callbacks])
    t.remove_callback(transformers.trainer_callback.PrinterCallback)
    return t, cycle


def curve(t): return [(d['step'], d['loss'], d['grad_norm']) for d in t.state.log_history if 'loss' in d]
def story(cycle): return [{k: v for k, v in e.items() if k != 'seconds'} for e in cycle.events]


@pytest.mark.parametrize('name', ARCHS)
def test_resume_is_exact_at_every_checkpoint(name, tmp_path):
    t, cycle = make(name, tmp_path)
    t.train()
    want, told, weights = curve(t), story(cycle), {k: v.clone() for k, v in t.model.state_dict().items()}
    assert len(want) == 12 and [e['open'] for e in told] == [8, 8, 5, 5, 5, 5, 5, 7, 7, 7, 7, 7]
    assert [e['step'] for e in told if e['compacted']] == [5] and t.model.sentinel.compact
    moments = optimizer_state(t.optimizer, t.model)['state']
    # the first resumed run of the first model writes all later checkpoints again, as it should find them
    for k in range(1, 12) if name == ARCHS[0] else (1, 4, 5, 9):       # before, on and after the step that cuts heads out, and on a ramp
        rewrites = k == 1 and name == ARCHS[0]
        again, cycle = make(name, tmp_path, save_strategy='steps' if rewrites else 'no')
        again.train(resume_from_checkpoint=str(tmp_path/f'checkpoint-{k}'))
        assert curve(again) == want and story(cycle) == told, f'resumed at step {k}'
        got = again.model.state_dict()
        assert got.keys() == weights.keys() and all(torch.equal(v, got[n]) for n, v in weights.items()), k
        there = optimizer_state(again.optimizer, again.model)['state']
        assert all(torch.equal(v, there[n][s]) for n, d in moments.items() for s, v in d.items()), k


def test_resume_with_accumulation_epochs_and_coarse_logs(tmp_path):
    "Logs every third step, two batches a step, evaluation, a limit on checkpoints, three epochs."
    kw = dict(gradient_accumulation_steps=2, logging_steps=3, max_steps=-1, num_train_epochs=3, eval_strategy='steps', eval_steps=4,
              save_total_limit=20, lr_scheduler_type='linear')
    t, _ = make('llama', tmp_path, **kw)
    t.train()
    want = curve(t)
    assert t.state.max_steps == 15 and len(want) == 5
    for k in (4, 5, 14):      # 5 is the end of an epoch
        again, _ = make('llama', tmp_path, **kw)
        again.train(resume_from_checkpoint=str(tmp_path/f'checkpoint-{k}'))
        # before transformers 5.2 a Trainer keeps to itself what it has summed since the last log
        first = 0 if hasattr(again, '_tr_loss') else -(-k//3)
        assert curve(again)[first:] == want[first:], k


def test_gates_that_are_learned_resume_too(tmp_path):
    def gates():
        m = adapt(with_dropout('llama'), GateConfig('hard_concrete', sparsity=.5, warmup=3))
        t, cb = make('llama', tmp_path, model=m, cycle=GateCallback(.5))
        t.gate_lr = 1.
        return t, cb
    t, cb = gates()
    t.train()
    want, record = curve(t), torch.stack(cb.gates)
    for k in (5, 9):
        t, cb = gates()
        t.train(resume_from_checkpoint=str(tmp_path/f'checkpoint-{k}'))
        assert curve(t) == want and torch.equal(torch.stack(cb.gates), record), k
    assert int((record[-1] > 0).sum()) == 4


def test_latest_best_and_rotation(tmp_path):
    kw = dict(eval_strategy='steps', eval_steps=2, save_steps=2, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model='loss')
    t, _ = make('llama', tmp_path, **kw)
    t.train()
    names = sorted(p.name for p in tmp_path.iterdir())
    best = Path(t.state.best_model_checkpoint)
    assert len(names) == 2 and 'checkpoint-12' in names and best.parent == tmp_path and best.exists(), names
    assert json.loads((tmp_path/'checkpoint-12'/'trainer_state.json').read_text())['best_model_checkpoint'] == str(best)
    state = restore(random_model('llama'), best).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in t.model.state_dict().items())
    (tmp_path/'checkpoint-12'/ck.MARKER).unlink()
    (tmp_path/'checkpoint-14').mkdir()
    if best.name != 'checkpoint-12': assert latest_checkpoint(tmp_path) == best


def test_best_model_of_another_shape(tmp_path):
    "At the end the best checkpoint's heads are back, moments included."
    moves = {2: {(0, 1): False, (1, 2): False}, 5: {(0, 1): True, (0, 2): False}}
    cycle = AdaptiveCallback(Script(moves), every=1, compact_every=2, regrow=dict(warmup=1))
    t, _ = make('llama', tmp_path, cycle=cycle, max_steps=6, eval_strategy='steps', eval_steps=1, load_best_model_at_end=True, greater_is_better=True,
                metric_for_best_model='loss')
    t.train()
    assert t.state.best_model_checkpoint.endswith('checkpoint-1') and not t.model.sentinel.compact
    assert all(s['exp_avg'].shape == p.shape for p, s in ck.unwrapped(t.optimizer).state.items())


def test_any_trainer(tmp_path):
    class Mine(Trainer): pass
    A = adaptive_trainer(Mine)
    assert A is adaptive_trainer(Mine) and issubclass(A, Mine) and issubclass(A, AdaptiveTrainerMixin) and adaptive_trainer() is AdaptiveTrainer
    t, _ = make('llama', tmp_path, cls=A, max_steps=4, save_steps=2)
    t.train()
    again, _ = make('llama', tmp_path, cls=A, max_steps=4, save_steps=2)
    again.train(resume_from_checkpoint=True)
    with pytest.raises(TypeError, match='not a Trainer'): adaptive_trainer(dict)
    # a plain Trainer runs the cycle, but cannot resume it
    cycle = AdaptiveCallback(Script(), every=1, batches=IDS, prune=dict(repair='none'))
    t, _ = make('llama', tmp_path/'plain', cls=Trainer, cycle=cycle)
    t.train()
    assert [e['open'] for e in cycle.events][-1] == 7
    t, _ = make('llama', tmp_path/'plain', cls=Trainer, cycle=AdaptiveCallback(Script(), every=1, batches=IDS))
    with pytest.raises(RuntimeError, match='adaptive_trainer'): t.train(resume_from_checkpoint=True)


def test_adapters(tmp_path):
    "Under LoRA heads can close; the whole model lies beside the adapters, and the run resumes."
    peft = pytest.importorskip('peft')

    def run(resume=None):
        torch.manual_seed(0)
        m = peft.get_peft_model(adapt(with_dropout('llama')), peft.LoraConfig(r=2, target_modules=['q_proj', 'o_proj'], lora_dropout=.1))
        cycle = AdaptiveCallback(Script({3: {(0, 1): False}}), every=1, prune=dict(repair='none'), regrow=dict(init='zero'))
        t, _ = make('llama', tmp_path, cycle=cycle, model=m, max_steps=6)
        t.train(resume_from_checkpoint=resume)
        return curve(t), {k: v.clone() for k, v in t.model.state_dict().items()}, cycle.events[-1]['open']
    want, weights, n = run()
    assert n == 7 and (tmp_path/'checkpoint-4'/'adapter_config.json').exists()
    for k in (2, 4):
        got, w, n = run(str(tmp_path/f'checkpoint-{k}'))
        assert got == want and n == 7 and all(torch.equal(v, w[x]) for x, v in weights.items())
    other = peft.get_peft_model(adapt(random_model('llama')), peft.LoraConfig(target_modules=['o_proj']))
    with pytest.raises((RuntimeError, ValueError), match='merge_and_unload|has shape'): restore(other, save_checkpoint(tmp_path/'cut', pruned('llama')[0]))


# --- a loop of one's own ---

def learn(m, opt, n=1, after=None):
    res = []
    for _ in range(n):
        loss = m(IDS, labels=IDS).loss
        opt.zero_grad(); loss.backward(); opt.step()
        if after: after()
        res.append(loss.item())
    return res


def pruned(name, seed=0, n=2, cut=True):
    m = random_model(name, seed=seed)
    opt = torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=.1)
    learn(m, opt)
    HeadMemory().attach(adapt(m))
    prune(m, n, IDS, criterion='fisher', rounds=1, optimizer=opt, progress=False)
    sync_optimizer(opt, m)
    learn(m, opt)
    if cut: compact(m, optimizer=opt)
    learn(m, opt)
    return m, opt


@pytest.mark.parametrize('name', [*ARCHS, 'mixtral', 'gemma2', 'falcon', 'olmo2'])
def test_restore_into_any_shape(name, tmp_path):
    "A fresh model, one pruned otherwise, and one with more heads removed become the one that was saved, down to moments of removed heads."
    m, opt = pruned(name)
    save_checkpoint(tmp_path/'a', m, opt, {(0, 1): 2.}, 1, 3, data=dict(position=7))

    def on(m, opt):
        res = learn(m, opt, 2)
        r = regrow(m, [tuple(x) for x in (~m.sentinel.plan.keep & m.sentinel.plan.exists).nonzero().tolist()], warmup=2, optimizer=opt)
        res += learn(m, opt, 2, r.step)
        if m.sentinel.compact: expand(m, opt)
        return res + learn(m, opt, 2)
    want = on(m, opt)
    plain = random_model(name, seed=5)
    for t, o in ((plain, torch.optim.AdamW(plain.parameters(), lr=1.)), pruned(name, 6, 3), pruned(name, 7, 1, cut=False)):
        got = load_checkpoint(tmp_path/'a', t, o)
        assert got == dict(head_lr_multipliers={(0, 1): 2.}, epoch=1, step=3, data=dict(position=7))
        assert on(t, o) == want


def test_everything_comes_back(tmp_path):
    "Pathways, agency, memory, ramps, factors, scheduler, random numbers; in a loop without a Trainer."
    def start(seed):
        m = add_skips(adapt(random_model('llama', seed=seed)), rank=4)
        opt = torch.optim.AdamW(m.parameters(), lr=1e-2)
        sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: .9**s)
        cycle = Plasticity(Script(), IDS, every=1, agency=Agency('record'), head_lr=dict(multipliers={(0, 0): .5}, schedule=(3., 4)),
                           regrow=dict(warmup=3), compact_every=5)
        return m, opt, sched, cycle.attach(m, opt, sched)

    def go(m, opt, sched, cycle, first, last):
        res = []
        for step in range(first, last + 1):
            loss = m(IDS, labels=IDS).loss + 0*torch.rand(()) + torch.rand(())*m.lm_head.weight.square().mean()
            opt.zero_grad(); loss.backward(); opt.step(); sched.step()
            cycle.step(m, opt, step)
            res.append(loss.item())
        return res
    run = start(0)
    run[3].model.sentinel.agency.withdraw((1, 1), 'asked to')
    go(*run, 1, 9)
    m, opt, sched, cycle = run
    save_checkpoint(tmp_path/'a', m, opt, cycle.rates, 0, 9, scheduler=sched, cycle=cycle)
    want = go(*run, 10, 13)
    other = start(4)
    got = load_checkpoint(tmp_path/'a', other[0], other[1], scheduler=other[2], cycle=other[3])
    assert got['step'] == 9 and got['head_lr_multipliers'][0, 0] == .5
    assert go(*other, 10, 13) == want and story(other[3]) == story(cycle)
    assert other[0].sentinel.agency.events == m.sentinel.agency.events and not other[0].sentinel.agency.consent[1, 1]
    assert other[0].sentinel.memory.size == m.sentinel.memory.size and other[0].sentinel_skips.config() == m.sentinel_skips.config()
    with pytest.raises(ValueError, match="'scaler' is not in"): load_checkpoint(tmp_path/'a', other[0], scaler=other[2])


@pytest.mark.parametrize('kind', ['threshold', 'ann', 'reinforce'])
def test_real_controllers_resume(kind, tmp_path):
    def start(seed):
        c = dict(threshold=controller.ThresholdController, ann=controller.ANNController, reinforce=controller.ReinforceController)[kind]
        m = adapt(random_model('llama', seed=seed))
        opt = torch.optim.AdamW(m.parameters(), lr=1e-2)
        return m, opt, Plasticity(c(schedule=controller.cubic(.5, 6)), IDS, every=1, compact_every=2, regrow=dict(warmup=2)).attach(m, opt)

    def go(m, opt, cycle, first, last):
        res = []
        for step in range(first, last + 1): res += learn(m, opt); cycle.step(m, opt, step)
        return res
    run, other = start(0), start(1)
    go(*run, 1, 5)
    save_checkpoint(tmp_path/'a', *run[:2], cycle=run[2])
    load_checkpoint(tmp_path/'a', *other[:2], cycle=other[2])
    assert go(*run, 6, 10) == go(*other, 6, 10) and story(run[2]) == story(other[2])
    assert any(e['closed'] for e in run[2].events), 'nothing happened'


@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adam])
def test_other_optimisers(kind, tmp_path):
    kw = dict(momentum=.9) if kind is torch.optim.SGD else {}
    m = random_model('gpt2')
    opt = kind(m.parameters(), lr=1e-2, **kw)
    learn(m, opt, 2)
    save_checkpoint(tmp_path/'a', m, opt)
    t = random_model('gpt2', seed=2)
    o = kind(t.parameters(), lr=1., **kw)
    load_checkpoint(tmp_path/'a', t, o)
    assert learn(m, opt, 2) == learn(t, o, 2)


# --- the rate of each head ---

def stepped(name, multipliers=None, wrap=False, **kw):
    m = adapt(random_model(name))
    opt = torch.optim.AdamW(m.parameters(), lr=.1, weight_decay=.1)
    rates = None if multipliers is None else HeadLR(opt, m, multipliers, **kw)
    m(IDS, labels=IDS).loss.backward(); opt.step()
    return m, rates


@pytest.mark.parametrize('name', ARCHS)
def test_half_the_update_of_one_head(name):
    before, (whole, _), (half, _) = adapt(random_model(name)), stepped(name), stepped(name, {(1, 1): .5, (0, 3): 0.})
    touched = {}
    for (l, h), f in {(1, 1): .5, (0, 3): 0.}.items():
        s = half.sentinel.now.heads[l]
        for n, dim, idx, part in head_slices(s, h):
            if part in 'kv' and s.n_kv_heads < s.n_heads: continue        # shared with heads of factor 1
            touched.setdefault(f'{s.path}.{n}', []).append((dim, idx, f))
    assert touched
    for n, p in half.named_parameters():
        p0, p1 = before.get_parameter(n), whole.get_parameter(n).detach().clone()
        for dim, idx, f in touched.get(n, ()):
            old, new = (t.detach().index_select(dim, idx) for t in (p0, p1))
            p1.index_copy_(dim, idx, old + f*(new - old))
        assert torch.equal(p, p1), n


def test_head_lr_follows_surgery_and_schedules():
    m, opt = pruned('llama')
    gone = [tuple(x) for x in (~m.sentinel.plan.keep).nonzero().tolist()]
    rates = HeadLR(opt, m, {h: 0. for h in [(0, h) for h in range(4)]}, schedule=(4., 2))
    q = m.model.layers[0].self_attn.q_proj
    then = q.weight.detach().clone()
    learn(m, opt)
    assert torch.equal(q.weight, then)
    expand(m, opt)
    learn(m, opt)
    assert q.weight.shape[0] == 32 and all(torch.equal(q.weight[8*local_head(m, 0, h):][:8], then[8*i:][:8])
                                          for i, h in enumerate(h for h in range(4) if (0, h) not in gone))
    rates.boost([(1, 0)])
    seen = []
    for _ in range(3): seen.append(float(rates.factors()[1, 0])); learn(m, opt)
    assert seen == pytest.approx([4., 2.5, 1.]) and not rates.boosts
    rates.remove()
    learn(m, opt)
    assert not torch.equal(q.weight[:8], then[:8])


@pytest.mark.parametrize('bad, error', [({(0, 9): 1.}, 'head 9'), ({(7, 0): 1.}, 'layer 7'), ({(0, 0): -1.}, '-1'), (torch.ones(3, 3), '(3, 3)'),
                                        ({(0, 0): float('inf')}, 'inf')])
def test_head_lr_bad_input(bad, error):
    m = adapt(random_model('llama'))
    opt = torch.optim.SGD(m.parameters(), lr=.1)
    with pytest.raises((ValueError, IndexError)) as e: HeadLR(opt, m, bad)
    assert error in str(e.value) and not opt._optimizer_step_pre_hooks


# --- broken writes, broken files ---

@pytest.mark.parametrize('at', ['save_file', 'weights', 'fsync', 'rename', 'json'])
def test_a_full_disk_leaves_the_last_checkpoint(at, tmp_path, monkeypatch):
    m, opt = pruned('gpt2')
    save_checkpoint(tmp_path/'last', m, opt, step=1)
    before = {p: p.read_bytes() for p in (tmp_path/'last').iterdir()}
    learn(m, opt)

    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    def rename(a, b, real=os.rename):
        if str(a).endswith('.tmp'): full()
        real(a, b)
    target = dict(save_file=(io, 'save_file', full), weights=(type(m), 'save_pretrained', full), fsync=(os, 'fsync', full),
                  rename=(os, 'rename', rename), json=(json, 'dumps', full))[at]
    monkeypatch.setattr(*target)
    if at == 'rename': monkeypatch.setattr(io, 'exchange', lambda one, other: False)
    with pytest.raises(OSError, match='No space'): save_checkpoint(tmp_path/'last', m, opt, step=2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ['last'] and {p: p.read_bytes() for p in (tmp_path/'last').iterdir()} == before
    assert load_checkpoint(latest_checkpoint(tmp_path), m, opt)['step'] == 1


def test_a_full_disk_in_the_trainer(tmp_path, monkeypatch):
    t, _ = make('llama', tmp_path, max_steps=6, save_steps=2)
    real, calls = io.save_file, []

    def full(*args, **kwargs):
        calls.extend([1]*('sentinel_state' in str(args[1])))
        if len(calls) > 2: raise OSError(28, 'No space left on device')
        return real(*args, **kwargs)
    monkeypatch.setattr(io, 'save_file', full)
    with pytest.raises(OSError): t.train()
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint-2', 'checkpoint-4']
    assert t.args.save_total_limit is None and t._stage is None
    again, _ = make('llama', tmp_path, max_steps=6, save_steps=2)
    again.train(resume_from_checkpoint=True)


def test_an_interrupted_exchange_is_settled(tmp_path):
    m, opt = pruned('gpt2')
    save_checkpoint(tmp_path/'last', m, opt, step=1)
    os.rename(tmp_path/'last', tmp_path/'.last.old')         # killed between the two renames
    assert latest_checkpoint(tmp_path) == tmp_path/'last' and load_checkpoint(tmp_path/'last', m, opt)['step'] == 1
    (tmp_path/'.last.tmp').mkdir()                             # and killed while it was filled
    (tmp_path/'.last.tmp'/'half').write_text('x')
    save_checkpoint(tmp_path/'last', m, opt, step=2)
    assert [p.name for p in tmp_path.iterdir()] == ['last'] and check_checkpoint(tmp_path/'last')['step'] == 2


def test_bad_input_changes_nothing(tmp_path):
    m, opt = pruned('llama')
    save_checkpoint(tmp_path/'a', m, opt)
    t = random_model('llama', seed=3)
    o = torch.optim.AdamW(t.parameters(), lr=1.)
    want = {k: v.clone() for k, v in t.state_dict().items()}

    def fails(error, match, f):
        with pytest.raises(error, match=match): f()
        assert t.state_dict().keys() == want.keys() and all(torch.equal(v, want[k]) for k, v in t.state_dict().items()) and not o.state
    fails(FileNotFoundError, 'is not there', lambda: load_checkpoint(tmp_path/'b', t, o))
    fails(ValueError, 'is SGD', lambda: load_checkpoint(tmp_path/'a', t, torch.optim.SGD(t.parameters(), lr=1.)))
    fails(ValueError, 'without a scheduler', lambda: load_checkpoint(tmp_path/'a', t, o, scheduler=object()))
    fails(ValueError, "'cycle' is not in", lambda: load_checkpoint(tmp_path/'a', t, o, cycle=object()))
    with pytest.raises(ValueError, match='LlamaForCausalLM'): load_checkpoint(tmp_path/'a', random_model('gpt2'))
    with pytest.raises(ValueError, match='up_proj|gate_proj|down_proj|embed'): load_checkpoint(tmp_path/'a', random_model('llama', intermediate_size=64))
    with pytest.raises(ValueError, match='float32'): load_checkpoint(tmp_path/'a', random_model('llama', dtype=torch.bfloat16))
    for f in ('model.safetensors', 'sentinel_state.safetensors', 'sentinel_state.json', 'config.json'):
        shutil.copytree(tmp_path/'a', tmp_path/'c')
        raw = bytearray((tmp_path/'c'/f).read_bytes()); raw[len(raw)//2] ^= 1
        (tmp_path/'c'/f).write_bytes(raw)
        fails(ValueError, 'SHA-256', lambda: load_checkpoint(tmp_path/'c', t, o))
        (tmp_path/'c'/f).write_bytes(raw[:-5])
        fails(ValueError, 'bytes', lambda: load_checkpoint(tmp_path/'c', t, o))
        (tmp_path/'c'/f).unlink()
        fails(ValueError, 'missing', lambda: load_checkpoint(tmp_path/'c', t, o))
        assert latest_checkpoint(tmp_path) == tmp_path/'a'
        shutil.rmtree(tmp_path/'c')
    (tmp_path/'file').write_text('mine')
    with pytest.raises(FileExistsError, match='is a file'): save_checkpoint(tmp_path/'file', m, opt)
    stray = torch.optim.AdamW([*m.parameters(), torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match='sync_optimizer'): save_checkpoint(tmp_path/'a', m, stray)
    assert check_checkpoint(tmp_path/'a')
    assert latest_checkpoint(tmp_path/'none') is None


def test_single_files(tmp_path):
    "State dicts in one file are read without unpickling anything else."
    m = random_model('gpt2')
    opt = torch.optim.AdamW(m.parameters(), lr=1e-2)
    learn(m, opt)
    torch.save(dict(model_state=m.state_dict(), optimizer_state=opt.state_dict(), head_lr_multipliers={}, epoch=2, step=5), tmp_path/'a.pth')
    t = random_model('gpt2', seed=1)
    o = torch.optim.AdamW(t.parameters(), lr=1.)
    assert load_checkpoint(tmp_path/'a.pth', t, o) == dict(head_lr_multipliers={}, epoch=2, step=5)
    assert learn(m, opt, 2) == learn(t, o, 2)

    class Evil:
        def __reduce__(self): return os.system, ('touch ' + str(tmp_path/'harm'),)
    torch.save(dict(model=Evil()), tmp_path/'b.pth')
    with pytest.raises(Exception, match='[Ww]eights.only'): load_checkpoint(tmp_path/'b.pth', t)
    assert not (tmp_path/'harm').exists()
    torch.save(dict(weights=1), tmp_path/'c.pth')
    with pytest.raises(ValueError, match='model_state_dict'): load_checkpoint(tmp_path/'c.pth', t)
    torch.save(dict(model={'blocks.0.attn.W_q': torch.ones(2)}), tmp_path/'d.pth')
    with pytest.raises(ValueError, match='do not fit'): load_checkpoint(tmp_path/'d.pth', t)


@pytest.mark.parametrize('kw, error', [(dict(every=0), 'every=0'), (dict(compact_every=0), 'compact_every=0'), (dict(prune=dict(repair='magic')), 'magic'),
                                       (dict(prune=dict(amount=3)), 'amount'), (dict(regrow=dict(init='hope')), 'hope'),
                                       (dict(regrow=dict(warmup=-1)), 'warmup'), (dict(head_lr=dict(rate=3)), 'rate'),
                                       (dict(measure_batches=0), 'measure_batches=0')])
def test_bad_cycles(kw, error):
    with pytest.raises(ValueError, match=error): AdaptiveCallback(Script(), **kw)


def test_cycles_that_cannot_run(tmp_path):
    with pytest.raises(TypeError, match='decide'): Plasticity(object())
    with pytest.raises(RuntimeError, match='attach'): Plasticity(Script()).load_state_dict({})
    m = adapt(random_model('llama'), GateConfig('learned'))
    with pytest.raises(ValueError, match='harden_gates'): Plasticity(Script(), IDS).attach(m, torch.optim.SGD(m.parameters(), lr=1.))
    m = random_model('llama')
    opt = torch.optim.SGD(m.parameters(), lr=1.)
    with pytest.raises(ValueError, match='held-out'): Plasticity(Script(), every=1).step(m, opt, 1)

    class None_: needs = ('gradient',); decide = lambda self, stats, plan, step: HeadPlan(plan.keep & False, plan.exists, plan.kv, plan.model_type)
    with pytest.raises(ValueError, match='leaves none'): Plasticity(None_(), IDS, every=1).step(m, opt, 1)
    assert not hasattr(m, 'sentinel') and not opt._optimizer_step_pre_hooks        # not even adapted
    adapt(m)
    with pytest.raises(ValueError, match='leaves none'): Plasticity(None_(), IDS, every=1).step(m, opt, 1)
    assert (gate_values(m) == 1).all() and m.sentinel.memory is None


def test_withdrawn_heads_stay_closed():
    for policy in ('record', 'strict'):
        m = adapt(random_model('llama'))
        agency = Agency(policy)
        opt = torch.optim.SGD(m.parameters(), lr=.1)
        cycle = Plasticity(Script({1: {(0, 1): False, (0, 2): False}, 2: {(0, 1): True, (0, 2): True}}), IDS, every=1, agency=agency, regrow=dict(warmup=0))
        cycle.step(m, opt, 1)
        agency.withdraw((0, 1), 'asked to')
        if policy == 'strict':
            with pytest.raises(PermissionError): cycle.step(m, opt, 2)
        else:
            assert cycle.step(m, opt, 2)['opened'] == [(0, 2)] and gate_values(m)[0].tolist() == [1, 0, 1, 1]


def test_ramps_are_not_cut_out():
    "Heads on their way back have gates near 0; compaction leaves them."
    m = adapt(random_model('llama'))
    opt = torch.optim.SGD(m.parameters(), lr=.1)
    cycle = Plasticity(Script({1: {(0, 1): False, (0, 2): False}, 2: {(0, 1): True}}), IDS, every=1, compact_every=1, regrow=dict(warmup=3))
    for step in range(1, 7): cycle.step(m, opt, step)
    assert m.sentinel.plan.keep[0].tolist() == [True, True, False, True] and gate_values(m)[0, 1] == 1 and not cycle.ramps
    set_gates(m, 1.)


# --- kill -9 ---

def child(folder):
    "One run, from the last complete checkpoint there is."
    t, cycle = make('llama', folder, [Pause()])
    t.train(resume_from_checkpoint=True if latest_checkpoint(folder) else None)
    out = Path(folder)/'end.json'
    out.with_suffix('.tmp').write_text(json.dumps(dict(curve=curve(t), story=story(cycle), weights=sum(p.double().sum().item() for p in t.model.parameters()))))
    os.replace(out.with_suffix('.tmp'), out)


def forked(folder, patience=None):
    "Run `child` in a process of its own; kill it after `patience` seconds, if it still runs. Returns seconds if it ended by itself."
    start, pid = time.time(), os.fork()
    if not pid:
        code = 1
        try: child(folder); code = 0
        finally: os._exit(code)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: break
        if patience is not None and time.time() - start > patience: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); return None
        time.sleep(.005)
    assert status == 0, f'the run ended with {status}'
    return time.time() - start


def kills(n, folder, seed=None):
    "Kill runs at random moments; each is resumed until it ends, and ends as the one that nothing happened to."
    rng = random.Random(seed)
    seconds = forked(folder/'whole')
    want, left, run = json.loads((folder/'whole'/'end.json').read_text()), n, 0
    while left:
        run += 1
        at = folder/f'run{run}'
        while not (at/'end.json').exists():
            if forked(at, rng.uniform(.2, 1.)*seconds if left else None) is None:
                left -= 1
                found = latest_checkpoint(at)
                print(f'killed; {found.name if found else "no checkpoint"}, beside {sorted(p.name for p in at.glob(".*"))}', flush=True)
        assert json.loads((at/'end.json').read_text()) == want, f'run {run} ended otherwise'
        print(f'run {run} ended like the whole one', flush=True)


def test_kill_9(tmp_path):
    p = subprocess.run([sys.executable, __file__, '--kills', '2', '--folder', str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert p.returncode == 0 and p.stdout.count('killed') == 2, p.stdout[-2000:] + p.stderr[-2000:]


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--folder', type=Path, required=True)
    parser.add_argument('--seed', type=int)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    kills(given.kills, given.folder, given.seed)

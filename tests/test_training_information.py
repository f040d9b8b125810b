"""No decision without information while a model trains: a loss, gradient, gate or number that says nothing stops the run by its name."""
import math
import re
import sys
import traceback
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
from faults import differences, picture  # noqa: E402

from sentinel_ai import GateConfig, HeadMemory, adapt, close_heads, gate_values, prune, random_model, regrow, set_gates  # noqa: E402
from sentinel_ai.controller import ANNController, ThresholdController  # noqa: E402
from sentinel_ai.learning import GateCallback, GateRun  # noqa: E402
from sentinel_ai.meta import ControllerTask, case, cases, train_controller, tune  # noqa: E402
from sentinel_ai.plasticity import Plasticity  # noqa: E402
from sentinel_ai.train import AdaptiveCallback, HeadLR, train_gates  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings('ignore')
NAN, INF = math.nan, math.inf
C = torch.randint(3, 90, (16, 12), generator=torch.Generator().manual_seed(1))
RAW = re.compile(r'not supported between|unsupported operand|has no attribute|invalid combination|out of range|reduction dim|modulo by zero|convert float')


def blocks(ids=C, labels=None): return Dataset.from_dict(dict(input_ids=ids.tolist(), labels=(ids if labels is None else labels).tolist()))
def arguments(folder, **kw):
    usual = dict(per_device_train_batch_size=4, max_steps=4, learning_rate=1e-3, report_to='none', save_strategy='no', disable_tqdm=True,
                 use_cpu=True, seed=3)
    return TrainingArguments(**dict(output_dir=str(folder)) | usual | kw)


def refused(f, says, model=None):
    "An error of ours with these words; a model that is given is what it was."
    before = None if model is None else picture(model)
    with pytest.raises((ValueError, IndexError, TypeError), match=says) as e: f()
    last = traceback.extract_tb(e.value.__traceback__)[-1]
    assert 'sentinel_ai' in last.filename and not RAW.search(str(e.value)), f'no error of ours: {e.value!r}'
    if model is not None: assert not differences(before, picture(model)), differences(before, picture(model))[:3]


def spoil(model, value=NAN):
    with torch.no_grad(): model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    return model


NONE = torch.full_like(C, -100)


@pytest.mark.parametrize('what', ['weights', 'validation', 'one token', 'no block', 'no part'])
@pytest.mark.parametrize('criterion', ['learned', 'random'])
def test_a_run_that_has_nothing_to_go_by(what, criterion, tmp_path):
    "It doesn't begin, and the model isn't even adapted."
    model, data = random_model('llama'), dict(train=blocks(), validation=blocks())
    if what == 'weights': spoil(model)
    if what == 'validation': data['validation'] = blocks(labels=NONE)
    if what == 'one token': data = {name: blocks(C[:, :1]) for name in data}
    if what == 'no block': data['train'] = blocks(C[:0])
    if what == 'no part': del data['validation']
    says = 'holds no block' if what.startswith('no') else 'loss on the validation blocks is nan'
    refused(lambda: train_gates(model, data, GateRun(.5, criterion=criterion), arguments(tmp_path)), says, model)


def test_gates_of_which_the_loss_says_nothing(tmp_path):
    "Every label is -100: the penalty alone would choose."
    model = random_model('llama')
    refused(lambda: train_gates(model, dict(train=blocks(labels=NONE), validation=blocks()), GateRun(.5), arguments(tmp_path)), 'steps 1 to 2: the loss had no')
    assert model.sentinel.config.mode == 'hard_concrete' and gate_values(model).ne(0).all()
    half = blocks(labels=torch.cat([NONE[:4], C[4:]]))
    res = train_gates(random_model('llama'), dict(train=half, validation=blocks()), GateRun(.5), arguments(tmp_path))
    assert res.after['open'] == 4


class Bad(Trainer):
    "The loss of one step is none."
    def compute_loss(self, model, inputs, **kw):
        loss = super().compute_loss(model, inputs, **kw)
        return loss*self.value if self.state.global_step == 2 else loss


@pytest.mark.parametrize('value', [NAN, INF])
@pytest.mark.parametrize('callback', [lambda: GateCallback(.75), lambda: AdaptiveCallback(ThresholdController(4), every=3, batches=C[:4])])
def test_one_loss_that_is_no_number(value, callback, tmp_path):
    "The run stops before the step, and no weight is NaN."
    mode = 'hard_concrete' if isinstance(callback(), GateCallback) else 'static'
    model = adapt(random_model('llama'), GateConfig(mode))
    trainer = Bad(model, arguments(tmp_path), train_dataset=blocks(), callbacks=[callback()])
    trainer.value = value
    refused(trainer.train, 'step 3: the gradient of')
    assert trainer.state.global_step == 2 and all(p.isfinite().all() and p.grad is None for p in model.parameters())
    assert gate_values(model).ne(0).all()


def test_a_learning_rate_beyond_all_numbers(tmp_path):
    for rate in (1e30, INF):
        model = random_model('llama')
        refused(lambda: train_gates(model, dict(train=blocks(), validation=blocks()), GateRun(.5), arguments(tmp_path, learning_rate=rate)), 'step 2')
        assert model.sentinel.config.mode == 'hard_concrete'


@pytest.mark.parametrize('value', [NAN, INF, -1, 'x', 2**60, None])
def test_options(value):
    model = adapt(random_model('llama'))
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    for name in ('sparsity', 'learn', 'gate_lr'): refused(lambda: GateRun(**{name: value}), name)
    refused(lambda: GateCallback(value), 'learn')
    refused(lambda: GateCallback(records=value), 'records')
    for name in ('every', 'batch_size'):
        if value != 2**60: refused(lambda: Plasticity(ThresholdController(4), C, **{name: value}), name)
    for group, name in (('prune', 'ridge'), ('regrow', 'warmup'), ('regrow', 'alpha'), ('regrow', 'gate')):
        if (name, value) != ('ridge', 2**60): refused(lambda: Plasticity(ThresholdController(4), C, **{group: {name: value}}), name)
    if value is None or value == 2**60: return
    for pair in ((value, 3), (3., value)): refused(lambda: HeadLR(opt, model, schedule=pair), 'schedule')
    rates = HeadLR(opt, model)
    refused(lambda: rates.boost([(0, 0)], value, 3), 'schedule')
    refused(lambda: rates.boost([(0, 0)], 2., value), 'schedule')
    refused(lambda: rates.load_state_dict(dict(multipliers=rates.multipliers, boosts={(0, 0): [value, 3, 0]})), 'schedule')
    refused(lambda: rates.load_state_dict(dict(multipliers=rates.multipliers, boosts={(0, 0): [2., 3, value]})), 'step')
    refused(lambda: rates.boost([(7, 0)], 2., 3), 'layer 7')
    assert not rates.boosts


@pytest.mark.parametrize('labels', [NONE, None])
def test_a_cycle_that_can_see_nothing(labels):
    "No label to measure on, or weights that training has made NaN."
    model = adapt(random_model('llama'))
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    cycle = Plasticity(ANNController(schedule=.5), dict(input_ids=C) | ({} if labels is None else dict(labels=labels)), every=1).attach(model, opt)
    if labels is None: spoil(model)
    refused(lambda: cycle.step(model, opt, 1), 'batch 0', model)
    assert not cycle.events and not cycle.cycles


@pytest.mark.parametrize('value', [NAN, INF])
@pytest.mark.parametrize('kind', ['heads', 'channels'])
@pytest.mark.parametrize('where', ['gate', 'weight', 'share'])
def test_a_ramp(where, kind, value):
    "A gate, a projection, or what is to be taken off it."
    model = adapt(random_model('llama'))
    HeadMemory().attach(model)
    units = [(0, 1), (0, 2)]
    if kind == 'heads': close_heads(model, units, C)
    else:
        prune(model, params=.9, batches=C, rounds=1, progress=False)
        units = (gate_values(model, kind='channels') == 0).nonzero()[:2].tolist()
    way = regrow(model, [tuple(u) for u in units], C, warmup=4, kind=kind)
    way.step()
    site = (model.sentinel.now.heads if kind == 'heads' else model.sentinel.now.channels)[units[0][0]]
    with torch.no_grad():
        if where == 'gate': site.module.sentinel.gate[units[0][1]] = value
        if where == 'weight': site.weight[0, 0] = value
        if where == 'share': next(s for s in way.shares.values() if s)['A'][..., 0] = value
    refused(way.step, 'the gate of layer' if where == 'gate' else 'NaN or infinity', model)
    assert way.t == 1


def test_a_controller_that_learns():
    "A model, a controller, a rate or numbers that nothing can be learned from; both are what they were."
    model, net = adapt(random_model('llama')), ANNController()
    was = {k: v.clone() for k, v in net.state_dict().items()}
    for name, value in (('steps', 0), ('steps', NAN), ('target', NAN), ('n', 0), ('lr', NAN), ('lr', INF), ('lr', 'x'), ('draws', 0), ('batch', -1)):
        refused(lambda: tune(net, model, C, **(dict(steps=2, n=1, draws=1) | {name: value})), name, model)
    refused(lambda: tune(net, model, C, steps=3, n=1, draws=1, lr=1e30), 'case 0', model)
    assert all(torch.equal(v, was[k]) for k, v in net.state_dict().items())
    task = ControllerTask(net, [case(model, C[:4])])
    spoil(model)
    refused(lambda: train_controller(task, C, 2, draws=1), 'the loss of case 0: nan')
    assert all(torch.equal(v, was[k]) for k, v in net.state_dict().items())
    closed = spoil(set_gates(adapt(random_model('llama')), {(0, 1): 0.}))
    refused(lambda: case(closed, C), 'batch 0', closed)
    refused(lambda: tune(net, closed, C, steps=1, n=1), 'batch 0', closed)
    refused(lambda: cases(closed, C, n=0), 'n=0', closed)


def test_a_controller_tuned_on_a_pruned_model_leaves_it_pruned():
    model = set_gates(adapt(random_model('llama')), {(0, 1): 0., (1, 2): .5})
    want = gate_values(model)
    tune(ANNController(), model, C, steps=1, n=3, draws=1)
    assert torch.equal(gate_values(model), want)

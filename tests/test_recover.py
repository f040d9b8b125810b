"""A pruned model learns from its own unpruned self: who the teacher is, what the loss counts, what is left afterwards, and a run that was stopped.

`pytest tests/test_recover.py -k llama` runs one architecture.
"""
import copy
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))
from faults import differences, picture  # noqa: E402

from sentinel_ai import adapt, compact, load_adaptive_model, prune, random_model, unadapt, unprune  # noqa: E402
from sentinel_ai.agency import Agency  # noqa: E402
from sentinel_ai.gates import gate_values  # noqa: E402
from sentinel_ai.memory import HeadMemory  # noqa: E402
from sentinel_ai.recovery import RecoveryTrainer, recover, recovery_args  # noqa: E402
from sentinel_ai.testing import in_processes  # noqa: E402
from sentinel_ai.teacher import distance, next_tokens, summed_distance, teacher_bytes, teacher_of  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings('ignore')
ARCHS = ['gpt2', 'llama', 'phi3']
SHAPES = ['masked', 'compact']
HOW = [None, 2]
CALIB = torch.randint(3, 90, (16, 12), generator=torch.Generator().manual_seed(1))


def blocks(ids=CALIB, **more): return Dataset.from_dict(dict(input_ids=ids.tolist()) | dict(labels=ids.tolist()) | more)
DATA = dict(train=blocks(), validation=blocks(CALIB[:6]))


def pruned(arch, shape='masked', repair='affine', dtype=torch.float32, dropout=0.):
    "A model that has lost a part of its parameters, and what it was."
    more = dict(gpt2=dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), dropout))
    model = random_model(arch, dtype=dtype, initializer_range=.3, **more.get(arch, {}))
    before = copy.deepcopy(model)
    prune(model, params=.85, batches=CALIB, rounds=2, repair=repair, progress=False)
    if shape == 'compact': compact(model)
    assert model.sentinel.plan.whole == (shape == 'masked')
    return model, before


def arguments(folder, **kw):
    usual = dict(max_steps=6, per_device_train_batch_size=4, learning_rate=5e-4, use_cpu=True, disable_tqdm=True, seed=3,
                 eval_strategy='no', logging_steps=2)
    return recovery_args(random_model('llama'), str(folder), **usual | kw)


@torch.no_grad()
def logits(m): return m.eval()(CALIB[:4]).logits


def tensors(m): return {k: v.detach().clone() for k, v in m.state_dict().items()}


@torch.no_grad()
def far(m, want): return distance(logits(m), want, CALIB[:4]).item()


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---- the teacher

@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('repair', ['none', 'affine'])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('arch', [*ARCHS, 'bloom', 'mixtral'])
def test_the_teacher_is_the_model_before_pruning(arch, shape, repair, shared):
    model, before = pruned(arch, shape, repair)
    kept, was = logits(model), picture(model)
    teacher = teacher_of(model, shared)
    assert torch.equal(logits(teacher), logits(before))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert not differences(was, picture(model)) and torch.equal(logits(model), kept)
    unprune(model)
    assert torch.equal(logits(model), logits(before))
    assert torch.equal(logits(teacher), logits(before))


def storages(m):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*m.parameters(), *m.buffers()] if t.numel()}


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('repair', ['none', 'affine'])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('arch', [*ARCHS, 'bloom'])
def test_its_bytes_are_counted_before(arch, shape, repair, shared):
    model, _ = pruned(arch, shape, repair)
    n, mine = teacher_bytes(model, shared), storages(model)
    assert n == sum(size for at, size in storages(teacher_of(model, shared)).items() if at not in mine)


def test_half_precision():
    model, before = pruned('llama', 'compact', dtype=torch.bfloat16)
    assert torch.equal(logits(teacher_of(model)), logits(before))
    assert recover(model, DATA, arguments('x')).model.dtype == torch.bfloat16


@pytest.mark.parametrize('shape', SHAPES)
def test_from_a_folder(shape, tmp_path):
    "The stash is saved with a model, unless somebody doesn't want it."
    model, before = pruned('llama', shape)
    model.save_pretrained(tmp_path/'with')
    assert torch.equal(logits(teacher_of(load_adaptive_model(str(tmp_path/'with')))), logits(before))
    model.save_pretrained(tmp_path/'without', memory=False)
    again = load_adaptive_model(str(tmp_path/'without'))
    was = picture(again)
    for f in (teacher_of, teacher_bytes, lambda m: recover(m, DATA, arguments(tmp_path))):
        with pytest.raises(ValueError, match="wasn't kept with this model.*give teacher="): f(again)
    assert not differences(was, picture(again))
    first = far(again, logits(before))
    res = recover(again, DATA, arguments(tmp_path), teacher=before)
    assert res.bytes == 0 and far(again, logits(before)) < first


def test_what_watches_the_student_stays_with_it():
    model, before = pruned('llama')
    memory, agency = HeadMemory().attach(model), Agency()
    agency.attach(model)
    agency.set_state((0, next(h for h in range(4) if gate_values(model)[0, h])), 'overloaded', 'for a test')
    teacher = teacher_of(model)
    assert torch.equal(logits(teacher), logits(before))
    assert model.sentinel.memory is memory and model.sentinel.agency is agency
    assert teacher.sentinel.memory is None and teacher.sentinel.agency is None


def test_a_student_that_was_trained():
    "What was cut out is as it was; the rest is what training made of it, without the repair."
    model, before = pruned('llama', 'compact', 'none')
    with torch.no_grad(): model.lm_head.weight.add_(1.)
    before.lm_head.weight.data.add_(1.)
    assert torch.equal(logits(teacher_of(model)), logits(before))


# ---- the loss

@pytest.mark.parametrize('arch', ARCHS)
def test_like_its_teacher(arch, tmp_path):
    "The loss is 0, and nothing would be learned."
    _, model = pruned(arch)
    teacher = copy.deepcopy(model)
    trainer = RecoveryTrainer(model.train(), arguments(tmp_path), teacher=teacher)
    loss = trainer.compute_loss(model, dict(input_ids=CALIB[:4], labels=CALIB[:4]))
    loss.backward()
    assert loss.item() == 0
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-6


def test_labels_and_masks_that_leave_out(tmp_path):
    "A label of -100 and a mask of 0 do the same: nothing depends on what is there."
    model, _ = pruned('llama')
    teacher = teacher_of(model)
    ids, mask = CALIB[:2].clone(), torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:], mask[1, 5:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)

    def loss_of(ids, labels):
        rows = [dict(input_ids=i, attention_mask=m, labels=la) for i, m, la in zip(ids.tolist(), mask.tolist(), labels.tolist())]
        trainer = RecoveryTrainer(model.train(), arguments(tmp_path), teacher=teacher, train_dataset=Dataset.from_list(rows))
        batch, = trainer.get_train_dataloader()
        return trainer.compute_loss(model, dict(batch)).item(), next_tokens(batch['labels']).ne(-100).sum().item()
    want = loss_of(ids, labels)
    assert want[1] == 7 + 4
    assert loss_of(ids, ids) == want
    other = torch.where(mask == 0, 7, ids)
    assert loss_of(other, other) == want
    with torch.no_grad(): z, t = (m(input_ids=ids, attention_mask=mask).logits for m in (model, teacher))
    counts = next_tokens(labels) != -100
    naive = summed_distance(z[counts], t[counts], next_tokens(labels)[counts])/11
    assert abs(naive.item() - want[0]) < 1e-6


@pytest.mark.parametrize('most', [97, 400, 2**24])
def test_chunks_change_nothing(most):
    gen = torch.Generator().manual_seed(0)
    z, t = (torch.randn(3, 7, 96, generator=gen, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(96, (3, 7), generator=gen)
    labels[1] = -100
    z.requires_grad_()
    counts = next_tokens(labels) != -100
    naive = summed_distance(z[counts], t[counts], next_tokens(labels)[counts], .3, 2.)/counts.sum()
    loss = distance(z, t, labels, .3, 2., most=most)
    torch.testing.assert_close(loss, naive)
    got, = torch.autograd.grad(loss, z, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(naive, z)[0])
    with pytest.raises(RuntimeError, match='compute it again'): loss.backward()
    none = torch.full_like(labels, -100)
    loss = distance(z, t, none)
    assert loss.item() == 0 and not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_adds_up_in_float32(dtype):
    gen = torch.Generator().manual_seed(0)
    z, t = (torch.randn(2, 200, 96, generator=gen).to(dtype) for _ in range(2))
    labels = torch.randint(96, (2, 200), generator=gen)
    z.requires_grad_()
    loss = distance(z, t, labels, .5)
    exact = distance(z.detach().double(), t.double(), labels, .5)
    assert loss.dtype == torch.float32 and abs(loss.item() - exact.item()) < 1e-4
    (loss*2**14).backward()                                       # as a scaler of losses does
    assert z.grad.dtype == dtype and z.grad.isfinite().all() and z.grad.any()


def uneven(n):
    labels = CALIB[:n].clone()
    for i in range(n): labels[i, 3 + i:] = -100
    return blocks(CALIB[:n], labels=labels.tolist())


@pytest.mark.parametrize('alpha', [1., .5, 0.])
def test_accumulated_like_one_batch(alpha, tmp_path):
    "Rows with few labels weigh by their tokens, whichever batch they are in."
    results = []
    for size, n in ((4, 1), (1, 4), (2, 2)):
        model, _ = pruned('llama', 'compact')
        args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=n, optim='sgd', learning_rate=.1,
                         logging_steps=1)
        res = recover(model, dict(train=uneven(8), validation=DATA['validation']), args, alpha=alpha)
        results.append((tensors(res.model), [row['loss'] for row in res.log if 'loss' in row]))
    (want, losses), *others = results
    for got, also in others:
        for k, v in want.items(): torch.testing.assert_close(got[k], v, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(also, losses, rtol=1e-3, atol=1e-5)


def test_without_a_teacher_it_is_plain_training(tmp_path):
    model, _ = pruned('llama', 'compact')
    plain = copy.deepcopy(model)
    Trainer(plain, arguments(tmp_path), train_dataset=DATA['train'], eval_dataset=DATA['validation']).train()
    res = recover(model, DATA, arguments(tmp_path), alpha=0.)
    for k, v in tensors(plain).items(): torch.testing.assert_close(tensors(res.model)[k], v, rtol=1e-4, atol=1e-5)
    assert res.unpruned is not None and res.tokens == 6*4*12


# ---- a run

@pytest.mark.parametrize('lora', HOW)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('arch', ARCHS)
def test_recovered_and_unpruned(arch, shape, lora, tmp_path):
    "Gates, shape and what was cut out stay; unprune gives the old units back, and what was trained is kept."
    pytest.importorskip('peft') if lora else None
    model, before = pruned(arch, shape)
    gates, plan = gate_values(model), copy.deepcopy(model.sentinel.plan)
    keys, wants = set(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}
    built, start = dict(before.named_parameters()), tensors(unprune(copy.deepcopy(model)))
    teacher = logits(teacher_of(model, lora is not None))
    first = far(model, teacher)
    res = recover(model, DATA, arguments(tmp_path), lora=lora)
    assert res.model is model and not model.training and far(model, teacher) < first
    assert torch.equal(gate_values(model).nan_to_num(), gates.nan_to_num()) and str(model.sentinel.plan) == str(plan)
    assert set(model.state_dict()) == keys and {n: p.requires_grad for n, p in model.named_parameters()} == wants
    assert res.tokens == 6*4*12 and res.bytes == teacher_bytes(pruned(arch, shape)[0], lora is not None)
    assert torch.equal(teacher, logits(before))

    model.save_pretrained(tmp_path/'saved')
    assert torch.equal(logits(load_adaptive_model(str(tmp_path/'saved'))), logits(model))

    sites = [(s.path, s) for s in model.sentinel.built.heads] + [(s.path, s) for s in model.sentinel.built.channels]
    closed = {(s.kind, s.layer): _closed(model, s) for _, s in sites}
    unprune(model)
    moved = 0
    for path, site in sites:
        shut = closed[site.kind, site.layer]
        w = site.by_input(site.weight.detach())                       # of the output projection, a row for each input
        old = site.by_input(built[_name(before, model, site)].detach())
        rows = shut.repeat_interleave(site.width)
        assert torch.equal(w[rows], old[rows])                        # what was pruned, to the last bit
        moved += int((w[~rows] != old[~rows]).any())
    assert moved                                                      # and what was trained is kept
    more = tensors(model).keys() - start.keys()
    assert start.keys() <= tensors(model).keys() and all(k.endswith('bias') for k in more)   # of a repair, and trained since


def _closed(model, site):
    "Units of the built model that are closed or cut out."
    state = model.sentinel
    plan = state.plan.of_kind(site.kind)
    gates = plan.full(gate_values(model, kind=site.kind))
    return ~(plan.keep[site.layer, :site.n] & (gates[site.layer, :site.n] != 0))


def _name(before, model, site): return next(n for n, p in model.named_parameters() if p is site.weight)


@pytest.mark.parametrize('arch', ARCHS)
def test_compact_learns_what_masked_learns(arch, tmp_path):
    results = []
    for shape in SHAPES:
        model, _ = pruned(arch, shape)
        want = logits(teacher_of(model))
        first = far(model, want)
        recover(model, DATA, arguments(tmp_path, optim='sgd', learning_rate=.02))
        assert far(model, want) < first
        results.append(logits(model))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_a_config_of_peft(tmp_path):
    peft = pytest.importorskip('peft')
    model, _ = pruned('llama', 'compact')
    frozen = model.model.layers[0].mlp.up_proj.weight.clone()
    config = peft.LoraConfig(r=2, target_modules=['o_proj'])
    assert config.task_type is None
    recover(model, DATA, arguments(tmp_path), lora=config)
    assert torch.equal(frozen, model.model.layers[0].mlp.up_proj.weight) and config.task_type is None


class Stop(TrainerCallback):
    def __init__(self, at): self.at = at
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == self.at: control.should_training_stop = control.should_save = True


@pytest.mark.parametrize('lora', HOW)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('arch', ['llama', 'gpt2'])
def test_resumed(arch, shape, lora, tmp_path):
    "A run that was stopped ends with the weights, the log and the count of one that wasn't."
    def run(folder, callbacks=(), **kw):
        model, _ = pruned(arch, shape, dropout=.1)
        args = arguments(folder, save_strategy='steps', save_steps=3, eval_strategy='steps', eval_steps=3, **kw)
        res = recover(model, DATA, args, lora=lora, callbacks=callbacks)
        return tensors(res.model), res
    want, whole = run(tmp_path/'whole')
    run(tmp_path/'run', [Stop(3)])
    got, again = run(tmp_path/'run', resume_from_checkpoint=str(tmp_path/'run'/'checkpoint-3'))
    assert same(got, want)
    assert (again.tokens, again.curve, again.unpruned, again.after) == (whole.tokens, whole.curve, whole.unpruned, whole.after)


@pytest.mark.parametrize('lora', HOW)
def test_broken_off(lora, tmp_path):
    "No adapter is left on the model, and what was frozen isn't."
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kw): raise KeyboardInterrupt
    model, _ = pruned('llama')
    logits(model)
    was, seen = tensors(model), picture(model)
    with pytest.raises(KeyboardInterrupt): recover(model, DATA, arguments(tmp_path), lora=lora, callbacks=[Break()])
    assert tensors(model).keys() == was.keys()
    assert all(p.requires_grad for n, p in model.named_parameters() if 'sentinel' not in n)
    if lora: assert same(tensors(model), was) and not [d for d in differences(seen, picture(model)) if 'hooks' not in d]
    unprune(model)


def test_mixed_precision(tmp_path):
    model, _ = pruned('llama', 'compact')
    want = logits(teacher_of(model))
    first = far(model, want)
    recover(model, DATA, arguments(tmp_path, bf16=True), temperature=2.)
    assert far(model, want) < first and model.dtype == torch.float32


def test_a_model_without_gates_and_a_teacher(tmp_path):
    "A model of another program's making, and the one it was made of."
    model, before = pruned('llama')
    plain = copy.deepcopy(before)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if 'sentinel' not in k and k in before.state_dict()})
    res = recover(plain, DATA, arguments(tmp_path), teacher=before)
    assert res.after['loss'] < math.inf and type(plain) is type(before)


# ---- what is refused

def spoil(model):
    with torch.no_grad(): model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan


@pytest.mark.parametrize('says, kw', [
    ('alpha=1.5', dict(alpha=1.5)), ('alpha=nan', dict(alpha=math.nan)), ('alpha=True', dict(alpha=True)),
    ('temperature=0', dict(temperature=0)), ('temperature=inf', dict(temperature=math.inf)),
    ('lora=0', dict(lora=0)), ('lora=True', dict(lora=True)), ("lora='all'", dict(lora='all')),
    ('96 tokens|50 tokens', dict(teacher=random_model('llama', vocab_size=50))),
    ("'train'. holds no block", dict(data=dict(validation=blocks()))),
    ("'validation'. holds no block", dict(data=dict(train=blocks()))),
    ('label_smoothing_factor=0.1', dict(args=dict(label_smoothing_factor=.1)))])
def test_refused(says, kw, tmp_path):
    model, _ = pruned('llama', 'compact')
    was = picture(model)
    kw = dict(kw)
    args, data = arguments(tmp_path, **kw.pop('args', {})), kw.pop('data', DATA)
    with pytest.raises((ValueError, RuntimeError), match=says): recover(model, data, args, **kw)
    assert not differences(was, picture(model))


@pytest.mark.parametrize('lora', HOW)
def test_refused_for_its_state(lora, tmp_path):
    def refused(model, error, says, data=DATA, **kw):
        was = picture(model)
        with pytest.raises(error, match=says): recover(model, data, arguments(tmp_path), lora=lora, **kw)
        assert not differences(was, picture(model)), differences(was, picture(model))[:3]
    refused(random_model('llama'), TypeError, 'call adapt')
    refused(adapt(random_model('llama')), ValueError, 'nothing of this model was pruned')
    model, before = pruned('llama')
    refused(model, ValueError, 'shares weights', teacher=model)
    refused(unadapt(copy.deepcopy(model)), TypeError, 'call adapt') if model.sentinel.compact else None
    refused(model, ValueError, 'loss of the (model|teacher)', data=dict(train=blocks(), validation=blocks(labels=torch.full_like(CALIB, -100).tolist())))
    bad, _ = pruned('llama', 'compact')
    spoil(bad)
    refused(bad, ValueError, 'nan')
    peft = pytest.importorskip('peft')
    refused(peft.get_peft_model(model, peft.LoraConfig(target_modules=['o_proj'])), RuntimeError, 'merge_and_unload')


def test_nan_on_the_way(tmp_path):
    "The run stops by itself, before the weights are touched."
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kw):
            if state.global_step == 2: model.train().model.norm.weight.register_hook(lambda g: g*math.nan)
    model, _ = pruned('llama')
    with pytest.raises(ValueError, match='step 3: the gradient of .* is nan'):
        recover(model, DATA, arguments(tmp_path), callbacks=[Spoil()])
    assert all(p.isfinite().all() for p in model.parameters())


# ---- several processes

def recovered(folder, lora, **kw):
    torch.set_num_threads(1)
    model, _ = pruned('llama', 'compact')
    res = recover(model, DATA, arguments(folder, optim='sgd', learning_rate=.1, **kw), lora=lora)
    return dict(weights=tensors(res.model), tokens=res.tokens, ends=[res.unpruned, res.before, res.after])


@pytest.mark.parametrize('lora', [None])          # adapters were tried, too
def test_two_processes(lora, tmp_path):
    "Two processes with two rows each make the steps that one makes with four."
    got, other = in_processes(lambda: recovered(tmp_path/'two', lora, per_device_train_batch_size=2))
    assert all(torch.equal(v, other['weights'][k]) for k, v in got['weights'].items())
    want = recovered(tmp_path/'one', lora)
    assert got['tokens'] == want['tokens']
    for mine, theirs in zip(want['ends'], got['ends']): assert abs(mine['loss'] - theirs['loss']) < 1e-3
    for k, v in want['weights'].items(): torch.testing.assert_close(got['weights'][k], v, rtol=1e-3, atol=1e-5)

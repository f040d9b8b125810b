"""Two processes with half of each batch do what one does with the whole: gates learn, or a cycle closes heads and cuts them out, on several layouts."""
import tempfile, torch, transformers
import pytest
from transformers import TrainingArguments
from sentinel_ai import Agency, AdaptiveCallback, AdaptiveTrainer, GateCallback, GateConfig, adapt, gate_values
from sentinel_ai.controller import ThresholdController
from sentinel_ai.testing import in_processes, random_model

transformers.logging.set_verbosity_error()
IDS = torch.randint(4, 90, (96, 12), generator=torch.Generator().manual_seed(0))
ROWS = [dict(input_ids=x, labels=x) for x in IDS]
OFF = dict(attention_dropout=0., hidden_dropout=0., attn_pdrop=0., resid_pdrop=0., embd_pdrop=0., dropout=0.)


def fresh(arch):
    m = random_model(arch, dtype=torch.float32 if arch == 'mixtral' else torch.float64)      # experts have no float64
    for part in m.modules():
        if isinstance(part, torch.nn.Dropout): part.p = 0.        # each process would draw its own
    for name, value in OFF.items():
        if hasattr(m.config, name): setattr(m.config, name, value)
    return m


def train(n, m, callback, steps, **kw):
    args = TrainingArguments(tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=8//n, per_device_eval_batch_size=4,
                             learning_rate=1e-3, report_to=[], disable_tqdm=True, save_strategy='no', logging_strategy='no', use_cpu=True, **kw)
    trainer = AdaptiveTrainer(m, args, train_dataset=ROWS[:80], eval_dataset=ROWS[80:], callbacks=[callback])
    trainer.evaluate()                                            # marks the model as prepared
    trainer.train()
    weights = {name: p.detach() for name, p in m.named_parameters()}
    return gate_values(m), gate_values(m, kind='channels') if m.sentinel.now.channels else None, weights


def learns(n, arch, kinds=('heads',), **kw):
    unit = 'params' if 'channels' in kinds else 'heads'
    m = adapt(fresh(arch), GateConfig('hard_concrete', sparsity=.4, kinds=kinds, unit=unit, log_alpha=0.))
    return train(n, m, GateCallback(.5), 4, **kw)


def cycles(n, arch):
    callback = AdaptiveCallback(ThresholdController(steps=8), every=2, measure_batches=3, compact_every=1,
                                regrow=dict(warmup=1), agency=Agency(), head_lr=dict())
    found = train(n, fresh(arch), callback, 8)
    return *found, [(e['closed'], e['opened'], e['compacted']) for e in callback.events]


JOBS = {'learns llama, layers run twice': lambda n: learns(n, 'llama', gradient_checkpointing=True),
        'learns llama, two batches a step': lambda n: learns(n, 'llama', gradient_accumulation_steps=2),
        'learns gpt2, heads and channels': lambda n: learns(n, 'gpt2', ('heads', 'channels')),
        'learns bloom': lambda n: learns(n, 'bloom'),
        'learns mixtral, experts': lambda n: learns(n, 'mixtral', ('heads', 'channels'), optim='sgd'),
        'cycle gpt_neox': lambda n: cycles(n, 'gpt_neox')}


def attempt(job):
    try: return job(2)
    except Exception as e: return f'{type(e).__name__}: {e}'


@pytest.fixture(scope='module')
def found(): return in_processes(lambda: {name: attempt(job) for name, job in JOBS.items()})      # one launch for all


@pytest.mark.parametrize('name', JOBS)
def test_two_equal_one(name, found):
    first, second = (d[name] for d in found)
    assert not isinstance(first, str), first
    alone = JOBS[name](1)
    for mine, theirs in zip(first[:2], alone[:2]):                # closed are the same units; gates are float32
        if mine is None: continue
        assert torch.equal(mine == 0, theirs == 0)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5, equal_nan=True)
    if 'learns' in name: assert any((gates == 0).any() for gates in first[:2] if gates is not None)
    assert first[3:] == alone[3:] and second[3:] == alone[3:]
    if 'cycle' in name: assert any(closed for closed, *_ in alone[3])
    assert first[2].keys() == alone[2].keys()
    for key, p in alone[2].items():
        assert torch.equal(first[2][key], second[2][key]), key
        torch.testing.assert_close(first[2][key], p, rtol=0, atol=1e-6, msg=lambda said: f'{key}: {said}')

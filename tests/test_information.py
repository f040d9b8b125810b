"""No decision without information: what says nothing, or nothing finite, is refused by its name, and nothing is changed."""
import copy
import math
import re
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from faults import differences, picture  # noqa: E402

from sentinel_ai import (ANNController, ElasticBudget, GateConfig, HeadPlan, ReinforceController, ThresholdController, adapt,  # noqa: E402
                         add_skips, close_heads, compact, grow, harden_gates, measure, merge_gates, prune, random_model, regrow,
                         set_gates, set_skip_gates)
from sentinel_ai.measure import score  # noqa: E402
from sentinel_ai.regrow import observe  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
NAN, INF = math.nan, math.inf
ODD = [NAN, INF, -INF]
C = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(1))
RAW = re.compile(r'size mismatch|shapes? (of )?tensor|must match|cannot be multiplied|out of range in self|unsupported operand|has no attribute|'
                 r'not supported between|not iterable|not implemented for|linalg|cholesky|must be tuple|cannot reshape')


def model(): return adapt(random_model('llama'))
def closed(): return set_gates(model(), {(0, 1): 0., (1, 2): 0.})
def learned(): return adapt(model(), GateConfig('hard_concrete'))


KEPT = {}


def refused(make, f, says=''):
    "An error of ours, and a model that is as it was, so that it serves again. `make`: a model, or what makes one."
    if make not in KEPT: KEPT[make] = (m := make() if callable(make) and not isinstance(make, torch.nn.Module) else make), picture(m)
    m, before = KEPT[make]
    with pytest.raises((ValueError, IndexError, TypeError, RuntimeError), match=says) as e: f(m)
    last = traceback.extract_tb(e.value.__traceback__)[-1]
    assert 'sentinel_ai' in last.filename and not RAW.search(str(e.value)), f'no error of ours: {e.value!r}'
    left = differences(before, picture(m))
    if left: del KEPT[make]
    assert not left, left[:3]


# texts
TEXTS = dict(no_label=[dict(input_ids=C, labels=torch.full_like(C, -100))], no_token=[dict(input_ids=C, attention_mask=torch.zeros_like(C))],
             half=[dict(input_ids=C[:2]), dict(input_ids=C[2:], labels=torch.full_like(C[2:], -100))], no_row=C[:0], one_token=C[:, :1],
             no_batch=[], no_ids=[dict()], floats=C.float(), unknown=C + 10**6, negative=-C, text='abc',
             odd_label=[dict(input_ids=C, labels=C + 10**6)])
LOSS = dict(measure=lambda m, x: measure(m, x, progress=False), prune=lambda m, x: prune(m, .5, x, progress=False),
            params=lambda m, x: prune(m, params=.8, batches=x, progress=False), regrow=lambda m, x: regrow(m, 1, x), observe=lambda m, x: observe(m, x),
            random=lambda m, x: prune(m, .5, x, 'random', repair='none', progress=False))
MOMENTS = dict(gram=lambda m, x: measure(m, x, 'gram', progress=False), close=lambda m, x: close_heads(m, [(0, 0)], x))


@pytest.mark.parametrize('text', TEXTS)
def test_texts(text):
    for f in LOSS.values(): refused(closed, lambda m: f(m, TEXTS[text]))
    for f in MOMENTS.values() if text not in ('no_label', 'half') else (): refused(closed, lambda m: f(m, TEXTS[text]))     # they ask for no loss


def test_the_batch_is_named():
    refused(model, lambda m: measure(m, TEXTS['half'], progress=False), 'batch 1: no token counts')
    refused(model, lambda m: prune(m, .25, C + 10**6, progress=False), 'batch 0: input_ids holds .*the tokens 0 to 95')


# weights
@pytest.mark.parametrize('value', [NAN, INF])
@pytest.mark.parametrize('part', ['head', 'channel', 'layer'])
def test_weights(part, value):
    m = model()
    heads, channels = m.sentinel.now.heads[1], m.sentinel.now.channels[1]
    with torch.no_grad():
        if part == 'head': heads.columns(heads.weight)[2] = value
        if part == 'channel': channels.columns(channels.weight)[3] = value
        if part == 'layer': heads.weight.fill_(value)
    for what in ('entropy', 'use', 'gram', 'gradient'): refused(m, lambda m: measure(m, C, what, progress=False), 'batch 0')
    for criterion in ('joint', 'wanda', 'random', 'entropy', 'taylor', 'magnitude'):
        refused(m, lambda m: prune(m, .25, C, criterion, repair='none', progress=False), 'batch 0')
    if part != 'channel': refused(m, lambda m: close_heads(m, [(1, 0)], stats=STATS['good']), 'layer 1: its weight')


# what was measured
STATS = {}


@pytest.fixture(autouse=True, scope='module')
def measured(): STATS['good'] = measure(model(), C, ('entropy', 'gradient', 'gram', 'use', 'joint'), progress=False)


def spoilt(value, one=False):
    "Statistics in which every table, or one head of it, holds a value."
    stats = copy.deepcopy(STATS['good'])
    for t in stats.tables.values():
        if one: t[0, 0] = value
        else: t[~t.isnan()] = value
    return stats


@pytest.mark.parametrize('value', ODD)
def test_statistics(value):
    for one in (False, True):
        for criterion in ('taylor', 'wanda', 'fisher', 'repaired', 'flap'):
            if value == value or not one: refused(model, lambda m: score(spoilt(value, one), criterion), 'NaN or infinite')
        for make in (ANNController, ReinforceController, partial(ThresholdController, 40)):
            controller = make(ElasticBudget(.2))
            refused(model, lambda m: controller.decide(spoilt(value, one), HeadPlan.from_gates(m), 0), 'nothing can be decided')
            assert controller.schedule.best is None
    refused(closed, lambda m: regrow(m, 1, stats=spoilt(value)), 'decides nothing')
    stats = copy.deepcopy(STATS['good'])
    for gram in stats.grams.values(): gram['cov'][0, 0] = value
    refused(model, lambda m: close_heads(m, [(0, 1)], stats=stats))


@pytest.mark.parametrize('value', ODD)
def test_tables_of_a_user(value):
    table, part = torch.full((2, 4), value), torch.tensor([[1., value, 1, 1], [1, 1, value, 1]])
    for t in (table, part):
        refused(closed, lambda m: regrow(m, 1, C, strategy=t), 'decides nothing')
        refused(closed, lambda m: regrow(m, 1, C, strategy=lambda stats: t), 'decides nothing')
        refused(model, lambda m: prune(m, .25, C, lambda stats: t, progress=False))
        refused(learned, lambda m: harden_gates(m, .25, scores=t), 'score')
    refused(model, lambda m: grow(m, heads=1, scores=table))
    refused(model, lambda m: grow(m, channels=1, scores=torch.full((2, 48), value)))


# gates
@pytest.mark.parametrize('value', [*ODD, -1., 2., 'x', None])
def test_gates(value):
    for f in (lambda m: set_gates(m, value), lambda m: set_gates(m, {(0, 1): value}), lambda m: setattr(m.blocks[0]['attn'], 'gate', value)):
        before = picture(m := model())
        with pytest.raises((ValueError, TypeError, RuntimeError)): f(m)
        left = [x for x in differences(before, picture(m)) if 'hooks' not in x and '/tap' not in x]
        assert not left, left[:3]


@pytest.mark.parametrize('key', [(0, None), ('a', 0), (0, 1.5), (True, 0), (-1, 0), (0, -1), (0, 1, 2), 7, (9, 0), (0, 99), 'x'])
def test_names_of_units(key): refused(model, lambda m: set_gates(m, {key: 0.}), r'layer|pairs of whole numbers')


@pytest.mark.parametrize('value', ODD)
def test_gates_that_were_written_or_trained(value):
    def written(m):
        with torch.no_grad(): m.blocks[0]['attn'].gate[0] = value
        return m
    for f in (compact, merge_gates, HeadPlan.from_gates):
        with pytest.raises(ValueError, match='layer 0'): f(written(closed()))
    with pytest.raises(ValueError, match='batch 0'): prune(written(closed()), .5, C, repair='none', progress=False)
    if value != value:
        m = learned()
        with torch.no_grad(): m.sentinel.now.heads[1].module.sentinel.log_alpha[2] = value
        refused(m, lambda m: harden_gates(m, .25), 'the learned gate of layer 1 head 2 is NaN')
    refused(add_skips(model(), 2), lambda m: set_skip_gates(m, value))


# numbers
@pytest.mark.parametrize('value', [*ODD, -1., 'x', True])
def test_amounts_and_options(value):
    for name in ('amount', 'params', 'kv_bytes', 'flops', 'ms'):
        refused(model, lambda m: prune(m, **{name: value}, batches=C, progress=False), name)
    for name in ('ridge', 'channel_ridge', 'context', 'min_heads', 'multiple', 'batch_size', 'rounds', 'seed'):
        if value is not True: refused(model, lambda m: prune(m, params=.8, batches=C, **{name: value}, progress=False), name)
    if value is not True: refused(model, lambda m: close_heads(m, [(0, 1)], C, ridge=value), 'ridge')
    refused(closed, lambda m: regrow(m, value, C), 'amount')
    for name in ('warmup', 'alpha', 'gate', 'seed', 'multiple'):
        refused(closed, lambda m: regrow(m, [(0, 1)], C, **{name: value}), name)
    refused(model, lambda m: grow(m, heads=value))
    refused(learned, lambda m: harden_gates(m, value), 'sparsity')
    for name in ('init', 'sparsity', 'warmup', 'l1', 'beta', 'zeta'):
        refused(model, lambda m: adapt(m, GateConfig('hard_concrete', **{name: value})), name)
    if value in (-1., 'x') or value is True: return
    for name in ('entropy', 'gradient', 'floor', 'l1', 'init', 'hysteresis', 'exchange'):
        with pytest.raises(ValueError, match=name): ThresholdController(40, **{name: value})
    with pytest.raises(ValueError, match='rates'): ThresholdController(40, rates=(value, value))
    with pytest.raises(ValueError, match='steps'): ThresholdController(value)
    with pytest.raises(ValueError, match='price'): ReinforceController(price=value)
    for make in (ThresholdController, ANNController):
        controller = make(schedule=lambda step: value)
        refused(model, lambda m: controller.decide(STATS['good'], HeadPlan.from_gates(m), 0), 'share')


def test_a_budget_that_is_met_prunes_nothing():
    for name in ('params', 'kv_bytes', 'flops'):
        plan = prune(m := model(), **{name: 1e12}, batches=C, progress=False)
        assert not plan.removed and not m.sentinel.repairs and (plan.channels is None or not plan.channels.removed), name


def test_what_is_asked_for_and_closes_nothing_is_refused():
    "Half of the heads in whole groups, of layers with one group each."
    m = adapt(random_model('llama', num_key_value_heads=1))
    refused(m, lambda m: prune(m, .5, C, scope='layer', whole_groups=True, rounds=1, progress=False), "which closes nothing: allowed is .*scope='global'")


# text that says too little for a fit
def test_one_token_raises_the_ridge_and_says_so():
    text = torch.full((4, 12), 7)
    assert prune(model(), .25, text, progress=False).info['ridge_raised']
    for ridge in (1e-2, 1e-300, 0):
        m = model()
        plan = close_heads(m, [(0, 1)], text, ridge=ridge)
        assert plan.info['ridge_raised']['0'] > ridge and m(text).logits.isfinite().all()
    assert 'ridge_raised' not in close_heads(model(), [(0, 1)], C.repeat(8, 1) + torch.arange(32)[:, None] % 5).info

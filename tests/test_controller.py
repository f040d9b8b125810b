"""Controllers on the architecture matrix: driven gates are exact, and one network decides on models of any shape.

`pytest tests/test_controller.py -k llama` runs one architecture.
"""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import ALL, build, logits, quarter  # noqa: E402

from sentinel_ai import HeadPlan, adapt, measure, prune, set_gates, unprune  # noqa: E402
from sentinel_ai.controller import ANNController, Context, ReinforceController, ThresholdController, cubic, heads_in  # noqa: E402
from sentinel_ai.meta import driven  # noqa: E402

torch.set_num_threads(1)
CALIB = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))
SOME = ['gpt2', 'bloom', 'llama', 'falcon-new', 'gemma3_text', 'qwen3_next', 'deepseek_v3', 'openai-gpt']


@pytest.mark.parametrize('name', ALL)
def test_driven(name):
    "Gates of 1 from outside change no bit; a table of gates does what the model's own gates do; gradients arrive."
    model = adapt(build(name))
    hm, table, want = model.sentinel.now.heads, quarter(model), logits(model)
    with driven(model, torch.where(table.isnan(), table, 1.)): assert torch.equal(logits(model), want)
    g = table.clone().requires_grad_()
    with driven(model, g): soft = model(CALIB[:1, :12].to(model.device)).logits.to(g.device)
    soft.square().sum().backward()
    assert torch.equal(g.grad.nan_to_num() != 0, g.grad != 0) and g.grad.abs().sum() > 0
    set_gates(model, table)
    ours = logits(model, CALIB[:1, :12]).cpu()
    assert torch.allclose(ours, soft, atol=1e-5*ours.abs().max().item())
    set_gates(model, 1.)
    assert torch.equal(logits(model), want) and not any(len(s.out._forward_pre_hooks) > 1 for s in hm)


@pytest.mark.parametrize('name', SOME)
def test_one_network_decides_everywhere(name):
    model = adapt(build(name))
    stats = measure(model, CALIB, ('entropy', 'gradient', 'use', 'gram', 'joint'), progress=False)
    plan = HeadPlan.from_gates(model)
    n = int(plan.exists.sum())
    ann = ANNController.pretrained(cubic(.5, 10))
    for c in (ann, ThresholdController(10, cubic(.5, 10)), ReinforceController(cubic(.5, 10))):
        p = plan
        for step in range(0, 12, 3):
            most = n - int(plan.exists.sum(1).clamp_max(1).sum())
            if round(cubic(.5, 10)(step)*n) > most:
                with pytest.raises(ValueError, match='up to'): c.decide(stats, p, step)
                break
            p = c.decide(stats, p, step)
            assert p.removed == round(cubic(.5, 10)(step)*n) and torch.equal(p.exists, plan.exists) and not (p.keep & ~p.exists).any()
    assert torch.equal(heads_in(stats), plan.exists)
    why = ann.explain(stats, Context(share=.3))
    off = (why.table.sum(-1) - (why.logits - why.base))[plan.exists].abs().max()
    assert off <= .02*max(1, why.logits[plan.exists].abs().max())


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'bloom'])
def test_criterion_of_prune(name):
    model, ann = build(name), ANNController.pretrained()
    want = logits(model)
    plan = prune(model, .5, CALIB, criterion=ann.score, progress=False)
    assert plan.removed == round(.5*int(plan.exists.sum()))
    unprune(model)
    assert torch.equal(logits(model), want)


def test_closed_heads_count_for_what_they_were_worth():
    "`repaired` is 0 for a closed head; the controller remembers its last value, so heads don't come and go from decision to decision."
    from sentinel_ai.measure import HeadStats
    g = torch.Generator().manual_seed(0)
    worth, exists = torch.rand(4, 6, generator=g).exp(), torch.ones(4, 6, dtype=torch.bool)
    plan = HeadPlan(exists.clone(), exists, [6]*4, 'toy')
    ann, seen = ANNController.pretrained(schedule=.5), []
    for step in range(6):
        noise = 1 + .01*torch.rand(4, 6, generator=g)
        tables = {n: worth*noise for n in ('taylor', 'fisher', 'use')} | dict(entropy_norm=torch.full((4, 6), .5))
        tables['repaired'] = torch.where(plan.keep, worth*noise, 0.)
        plan = ann.decide(HeadStats(tables, info=dict(loss=3.)), plan, step)
        seen.append(plan.keep.clone())
    assert all(int((~k).sum()) == 12 for k in seen) and torch.equal(seen[1], seen[-1])
    twin = ANNController.pretrained(schedule=.5)
    twin.load_state_dict(ann.state_dict())
    assert torch.equal(twin.worth, ann.worth)

"""Agency on the architecture matrix: attached it changes no bit, factors act like gates, and what withdrew stays away through surgery.

`pytest tests/test_agency.py -k llama` runs one architecture.
"""
import contextlib
import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from sentinel_ai import GateConfig, HeadStats, adapt, gate_values, harden_gates, measure, merge_gates, set_gates, unadapt
from sentinel_ai.agency import FACTORS, Agency, ConsentError, HeadState, read_log
from sentinel_ai.state import transaction
from sentinel_ai.surgery import compact, expand, reattach

sys.path.insert(0, str(Path(__file__).parent))
from test_matrix import ALL, IDS, SEED, build, greedy, logits, quarter  # noqa: E402

torch.set_num_threads(1)


def attached(name, dtype=torch.float32, **kw):
    model, agency = build(name, dtype), Agency(**kw)
    assert agency.attach(model) is model and model.sentinel.agency is agency
    return model, agency


def closed(table): return table == 0


def picked(model):
    "A pair of heads in each state but active, as far as there are heads."
    at = [tuple(x) for x in (~gate_values(model).isnan()).nonzero().tolist()]
    return dict(zip((HeadState.MISALIGNED, HeadState.OVERLOADED, HeadState.WITHDRAWN), (at[0], at[len(at)//2], at[-1])))


@pytest.mark.parametrize('name', ALL)
def test_attached_changes_no_bit(name):
    model = build(name)
    want, tokens, plain, keys = logits(model), greedy(model), type(model), model.state_dict().keys()
    agency = Agency()
    agency.attach(model)
    assert torch.equal(logits(model), want) and torch.equal(greedy(model), tokens)
    assert not [k for k in model.state_dict() if 'factor' in k]
    agency.detach()
    assert all(s.attn.sentinel.factor is None for s in model.sentinel.now.heads) and model.sentinel.agency is None
    assert torch.equal(logits(model), want)
    assert type(unadapt(model)) is plain and model.state_dict().keys() == keys


@pytest.mark.parametrize('name', ALL)
def test_factors_equal_gates(name):
    "Withdrawn, overloaded and misaligned heads are as good as gates at 0, 0.5 and 0.7; baked they still are."
    model, agency = attached(name)
    heads = picked(model)
    for state, head in heads.items():
        if state == HeadState.WITHDRAWN: agency.withdraw(head, 'test')
        else: agency.set_state(head, state, 'test')
    gates = {head: FACTORS[s] for s, head in heads.items()}
    twin = set_gates(adapt(build(name)), gates)
    want = logits(twin)
    assert torch.equal(logits(model), want) and torch.equal(greedy(model), greedy(twin))
    with pytest.raises(RuntimeError, match='bake'): merge_gates(model)
    agency.bake()
    assert torch.equal(logits(model), want) and torch.equal(gate_values(model).nan_to_num(), gate_values(twin).nan_to_num())
    assert not agency.consent[heads[HeadState.WITHDRAWN]] and (agency.states == HeadState.WITHDRAWN).sum() == 1
    assert not ((agency.states == HeadState.MISALIGNED) | (agency.states == HeadState.OVERLOADED)).any()


@pytest.mark.parametrize('name', ALL)
def test_withdrawn_heads_leave_and_stay_away(name):
    "Compacted away exactly; brought back with gates opened they stay silent; granted they are what they were."
    model, agency = attached(name)
    want, table = logits(model), quarter(model)
    agency.withdraw(closed(table), 'test')
    masked = logits(model)
    assert torch.equal(masked, logits(set_gates(adapt(build(name)), table)))
    plan = compact(model)
    assert torch.equal(plan.keep, agency.consent)
    torch.testing.assert_close(logits(model), masked, rtol=1e-4, atol=1e-4)
    expand(model)
    set_gates(model, 1.)
    assert torch.equal(logits(model), masked)
    agency.grant(closed(table), 'test')
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', SEED)
def test_half_precision(name, dtype):
    model, agency = attached(name, dtype)
    want = logits(build(name, dtype))
    assert torch.equal(logits(model), want)
    agency.set_state((0, 1), 'overloaded', 'test')
    assert torch.equal(logits(model), logits(set_gates(adapt(build(name, dtype)), {(0, 1): .5})))
    model.float()
    for s in model.sentinel.now.heads: assert s.attn.sentinel.factor.dtype == s.attn.sentinel.gate.dtype
    agency.sync()
    assert gate_values(model, effective=True)[0, 1] == .5


@pytest.mark.parametrize('name', SEED)
def test_copies_have_an_agency_of_their_own(name):
    model, agency = attached(name)
    agency.withdraw((0, 1), 'test')
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(agency).model):
        a = twin.sentinel.agency
        assert a is not agency and a.model is twin and twin is not model
        assert torch.equal(logits(twin), logits(model))
        a.grant((0, 1), 'in the copy')
        assert gate_values(twin, effective=True)[0, 1] == 1 and gate_values(model, effective=True)[0, 1] == 0
        assert a.log is None and len(agency.events) == 1


@pytest.mark.parametrize('name', SEED)
def test_part_of_the_heads_returns(name):
    "Factors follow their heads when some return while others stay away."
    model, agency = attached(name)
    agency.withdraw([(0, 0), (0, 2)], 'test')
    agency.set_state((0, 3), 'overloaded', 'test')
    compact(model)
    assert model.sentinel.now.heads[0].attn.sentinel.factor.tolist() == [1., .5]
    reattach(model, [(0, 2)])
    assert model.sentinel.now.heads[0].attn.sentinel.factor.tolist() == [1., 0., .5]
    agency.grant([(0, 0), (0, 2)], 'test')
    assert model.sentinel.now.heads[0].attn.sentinel.factor.tolist() == [1., 1., .5]


@pytest.mark.parametrize('mode', ['learned', 'hard_concrete'])
def test_gates_that_are_learned(mode):
    "Gradients of a gate are scaled by its factor; a withdrawn head's gate gets none; adapting and hardening keep factors."
    model = adapt(build('llama'), GateConfig(mode, **({'log_alpha': 0.} if mode == 'hard_concrete' else {})))
    agency = Agency()
    agency.attach(model)
    agency.withdraw((0, 1), 'test')
    torch.manual_seed(0)
    model.train()(IDS, labels=IDS).loss.backward()
    s = model.sentinel.now.heads[0].attn.sentinel
    g = (s.gate if mode == 'learned' else s.log_alpha).grad
    assert g[1] == 0 and (g[[0, 2, 3]] != 0).any()
    harden_gates(set_gates(model, 1.), sparsity=0.)
    assert torch.equal(gate_values(model, effective=True), gate_values(model)*agency.factors) and gate_values(model, effective=True)[0, 1] == 0


@pytest.mark.parametrize('mode', ['static', 'learned'])
def test_bake_is_exact_out_of_range(mode):
    "A learned gate that an optimiser moved beyond 1 counts as 1, with the factor and baked."
    model = adapt(build('llama'), GateConfig(mode))
    agency = Agency()
    agency.attach(model)
    agency.set_state((0, 1), 'misaligned', 'test')
    if mode == 'learned':
        with torch.no_grad(): model.sentinel.now.heads[0].attn.sentinel.gate[1] = 1.3
    want = logits(model)
    agency.bake()
    assert torch.equal(logits(model), want)
    agency.attach(model)
    assert torch.equal(logits(model), want), 'a baked factor counted twice'


def test_compiled_once():
    "A change of factors compiles nothing anew."
    model, agency = attached('llama')
    graphs = []
    def backend(gm, inputs): graphs.append(gm); return gm.forward
    torch._dynamo.reset()
    run = torch.compile(model, backend=backend)
    with torch.no_grad():
        run(IDS)
        n = len(graphs)
        agency.withdraw((0, 1), 'test')
        agency.set_state((1, 1), 'overloaded', 'test')
        assert torch.allclose(run(IDS).logits, logits(model), atol=1e-6) and len(graphs) == n


def test_resumes_where_it_was():
    model, agency = attached('llama', patience=2, misaligned=(.3, .1), unused=.5, unused_patience=3)
    gen = torch.Generator().manual_seed(0)
    tables = [dict(use=torch.rand(2, 4, generator=gen), grad=2*torch.rand(2, 4, generator=gen) - 1, taylor=torch.ones(2, 4)) for _ in range(24)]
    for t in tables[:12]: agency.update(HeadStats(t))
    back = Agency.from_dict(json.loads(json.dumps(agency.to_dict())))
    back.attach(build('llama'))
    for t in tables[12:]: assert back.update(HeadStats(t)) == agency.update(HeadStats(t))
    assert agency.events and back.to_dict() == agency.to_dict()


def test_measured_on_models():
    "A whole model's statistics are taken as they come, also those of a compact model brought to the original numbering."
    model, agency = attached('llama')
    agency.update(measure(model, IDS.repeat(3, 1), what=('gradient', 'use'), progress=False))
    agency.withdraw([(0, 0), (1, 2)], 'test')
    plan = compact(model)
    stats = measure(model, IDS.repeat(3, 1), what=('gradient', 'use'), progress=False)
    with pytest.raises(ValueError, match='plan.full'): agency.update(stats)
    agency.update(HeadStats({k: plan.full(t) for k, t in stats.tables.items()}))
    assert agency.step == 2 and agency.signals['use'][0, 0].isnan() and agency.signals['use'][0, 1] > 0


def test_bad_input_changes_nothing(tmp_path):
    model, agency = attached('llama', log=tmp_path/'log.jsonl')
    before = copy.deepcopy(agency.to_dict())
    for bad, error in (([(0, 0), (0, 9)], IndexError), ([(0, 0), (-1, 0)], IndexError), ([(0, 0), 'x'], TypeError), (torch.ones(3, 3).bool(), ValueError)):
        for f in (agency.withdraw, agency.grant, lambda h, r: agency.set_state(h, 'overloaded', r)):
            with pytest.raises(error): f(bad, 'test')
    for reason in (None, '', 3):
        with pytest.raises(ValueError, match='reason'): agency.withdraw((0, 0), reason)
    assert agency.to_dict() == before and not (tmp_path/'log.jsonl').exists()
    agency.log = tmp_path/'gone'/'log.jsonl'           # the log can't be written: nothing changes unrecorded
    with pytest.raises(FileNotFoundError): agency.withdraw((0, 0), 'test')
    assert agency.to_dict() == before and gate_values(model, effective=True)[0, 0] == 1


@pytest.mark.parametrize('policy', ['strict', 'record'])
def test_policies(policy, tmp_path):
    model, agency = attached('llama', policy=policy, log=tmp_path/'log.jsonl')
    agency.withdraw([(0, 1), (1, 0)], 'test')
    ask = [(0, 0), (0, 1), (1, 0)]
    if policy == 'strict':
        with pytest.raises(ConsentError, match='layer 0 head 1'): agency.allow(ask, 'regrow')
        with pytest.raises(ConsentError, match='layer 1 head 0'): agency.set_state((1, 0), 'active', 'test')
    else:
        assert agency.allow(ask, 'regrow') == [(0, 0)]
        agency.set_state((1, 0), 'active', 'test')
    assert [e['kind'] for e in agency.events] == ['consent']*2 + ['violation']*3
    assert read_log(tmp_path/'log.jsonl') == agency.events
    assert agency.states[0, 1] == agency.states[1, 0] == HeadState.WITHDRAWN


@pytest.mark.parametrize('inner', [False, True])
@pytest.mark.parametrize('exists', [False, True])
def test_a_failed_edit_leaves_no_lines(exists, inner, tmp_path):
    "Events of an edit that fails later are gone, in memory and in the file; who asked for a withdrawn head stays on record."
    log = tmp_path/'log.jsonl'
    model, agency = attached('llama', policy='record', log=log)
    if exists: agency.withdraw((1, 1), 'test')
    held, lines = list(agency.events), log.read_bytes() if exists else None
    with pytest.raises(KeyboardInterrupt), transaction(model):
        with transaction(model) if inner else contextlib.nullcontext():
            agency.withdraw([(0, 1), (0, 2)], 'a change that never happened')
        if not exists: raise KeyboardInterrupt
        assert agency.allow((1, 1), 'regrow') == []
        agency.set_state((0, 0), 'overloaded', 'nor did this one')
        raise KeyboardInterrupt
    assert agency.consent[0].all() and agency.states[0].tolist() == [0]*4 and gate_values(model, effective=True)[0].tolist() == [1.]*4
    if not exists: assert agency.events == [] and not log.exists()
    else:
        assert agency.events[:-1] == held and agency.events[-1]['kind'] == 'violation'
        assert log.read_bytes().startswith(lines) and read_log(log) == agency.events
    agency.withdraw((0, 3), 'the log goes on')
    assert read_log(log) == agency.events


def test_a_log_that_nobody_wrote_to_is_not_cut(tmp_path):
    "An edit that fails leaves lines that others have added, and a log that was moved away meanwhile."
    log = tmp_path/'log.jsonl'
    model, agency = attached('llama', log=log)
    agency.withdraw((0, 1), 'test')
    with pytest.raises(KeyboardInterrupt), transaction(model):
        with open(log, 'a') as f: f.write('{"note": "by hand"}\n')
        raise KeyboardInterrupt
    assert read_log(log) == [*agency.events, dict(note='by hand')]
    with pytest.raises(KeyboardInterrupt), transaction(model):
        log.rename(tmp_path/'old.jsonl')
        agency.withdraw((0, 2), 'test')
        raise KeyboardInterrupt
    assert len(agency.events) == 1 and len(read_log(tmp_path/'old.jsonl')) == 2


def test_gates_taken_off():
    "Taking the gates off detaches; consent is remembered and holds again when it is attached."
    model, agency = attached('llama')
    agency.withdraw((0, 1), 'test')
    unadapt(model)
    assert agency.model is None and not hasattr(model, 'sentinel') and torch.equal(logits(model), logits(build('llama')))
    agency.attach(model)
    assert gate_values(model, effective=True)[0, 1] == 0
    model.sentinel.agency = None                       # gates taken off behind its back
    unadapt(model)
    with pytest.raises(RuntimeError, match='lost its gates'): agency.withdraw((0, 2), 'test')
    assert agency.consent[0, 2] and len(agency.events) == 1

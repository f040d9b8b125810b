"""Every state of a model, and every edit of it: the edit does what it promises, or it is refused before anything changed.

`SENTINEL_PAIRS=whole pytest tests/test_states_edits.py` tries all pairs on all three architectures. An ordinary run has each state on
one of them, in turns, with every edit that is refused there and one in twelve of those that are done. `-k "compact and llama"` narrows both.
"""
import copy
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from faults import differences, picture  # noqa: E402

from sentinel_ai import (Agency, GateConfig, HeadMemory, adapt, add_skips, close_heads, compact, elastic, expand, export_hf,  # noqa: E402
                         gate_values, grow, harden_gates, is_merged, load_checkpoint, merge_gates, prune, random_model, regrow,
                         remove_skips, resize, save_checkpoint, set_gates, unadapt, ungrow, unmerge_gates, unprune)
from sentinel_ai.gates import EDITS, check_edit, is_adaptive  # noqa: E402
from sentinel_ai.heads import base_model  # noqa: E402
from sentinel_ai.pruning import undo_repair  # noqa: E402
from sentinel_ai.site import model_size  # noqa: E402
from sentinel_ai.surgery import reattach  # noqa: E402
from sentinel_ai.unet import set_skip_gates  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
MODELS = ['llama', 'gpt2', 'phi3']
IDS = torch.tensor([[5, 17, 33, 8, 21, 40, 11, 29], [62, 14, 7, 50, 3, 9, 27, 44]])
CALIB = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(1))
SHUT = {(0, 1): 0., (1, 0): 0., (1, 3): 0.}
PART = {(0, 2): .5, (1, 2): .25}
REFUSALS = ValueError, RuntimeError, TypeError
# What torch or Python says when something of ours is wrong: no refusal
RAW = re.compile(r'size mismatch|shapes? (of )?tensor|must match|cannot be multiplied|out of (bounds|range)|inplace|shape \'\[|'
                 r'unsupported operand|has no attribute|not subscriptable|missing \d|unexpected keyword|must be Tensor|not iterable|'
                 r'not implemented for|Could not run|object is not callable|Unexpected key')


@dataclass
class Scene:
    "A model in a state, and what is known of how it got there."
    name: str
    model: object                      # The one that a user has in hand, wrapper and all
    optimizer: object = None
    memory: object = None
    agency: object = None
    marks: set = field(default_factory=set)
    path: object = None
    state: str = ''
    listed: list = ()

    def picture(self): return picture(self.model, self.optimizer, self.memory, self.agency)

    @property
    def m(self): return base_model(self.model)


_BUILT = {}


def plain(name):
    "A tiny model as it was built."
    if name not in _BUILT: _BUILT[name] = random_model(name)
    return copy.deepcopy(_BUILT[name])


# States: what brings a plain, adapted model into them. Pairs are one after the other.
def _closed(s): set_gates(s.model, SHUT)


def _fractional(s): set_gates(s.model, {k: v for k, v in _local(s, PART).items()})


def _local(s, gates):
    "Units by their number as built, in the numbering of now."
    from sentinel_ai.surgery import local_head
    return {(l, local_head(s.model, l, h)): v for (l, h), v in gates.items()}


def _channels(s): set_gates(s.model, {(0, 3): 0., (1, 7): 0., (1, 8): .5}, 'channels')


def _merged(s):
    if not is_part(s): _fractional(s)
    merge_gates(s.model)


def is_part(s):
    g = gate_values(s.model)
    return bool(((g > 0) & (g < 1)).any())


def _learned(s):
    adapt(s.model, GateConfig('hard_concrete', sparsity=.25))
    s.optimizer.add_param_group(dict(params=[p for n, p in s.m.named_parameters() if n.endswith('log_alpha')]))


def _free(s):
    "Gates that learn freely."
    adapt(s.model, GateConfig('learned', kinds=('heads', 'channels')))


def _compact(s):
    if not (gate_values(s.model) == 0).any(): _closed(s)
    compact(s.model, optimizer=s.optimizer)


def _repaired(s): prune(s.model, 3, CALIB, 'wanda', rounds=1, progress=False, optimizer=s.optimizer)


def _repaired_both(s): prune(s.model, params=.9, batches=CALIB, criterion='wanda', rounds=1, progress=False, optimizer=s.optimizer)


def _grown(s):
    s.marks.add('grown')
    grow(s.model, heads={1: 1}, optimizer=s.optimizer)
    grow(s.model, channels={0: 2}, optimizer=s.optimizer)


def _skips(s):
    add_skips(s.model, 2)
    set_skip_gates(s.model, .5)


def _agency(s):
    s.agency = Agency()
    s.agency.attach(s.model)
    s.agency.set_state((0, 0), 'overloaded', 'for a test')
    s.agency.withdraw([(1, 1)], 'for a test')


def _memory(s): s.memory = HeadMemory().attach(s.model)


def _family(s): elastic(s.model, CALIB, .85, rounds=1, progress=False)


def _small(s): resize(s.model, params=.9, optimizer=s.optimizer)


def _lora(s):
    peft = pytest.importorskip('peft')
    out = dict(gpt2='attn.c_proj').get(s.name, 'o_proj')
    config = peft.LoraConfig(r=2, target_modules=[out], task_type='CAUSAL_LM', fan_in_fan_out=s.name == 'gpt2')
    s.model = peft.get_peft_model(s.model, config).eval()
    gen = torch.Generator().manual_seed(3)
    for n, p in s.model.named_parameters():
        if 'lora_B' in n: p.data = torch.randn(p.shape, generator=gen)*.1
    s.marks.add('lora')
    s.optimizer = torch.optim.AdamW([p for p in s.model.parameters() if p.requires_grad], 1e-3)


def _lora_merged(s):
    _lora(s)
    s.model.merge_adapter()


def _unloaded(s):
    if 'lora' not in s.marks: _lora(s)
    s.model = s.model.unload()
    s.optimizer = None


def _absorbed(s):
    if 'lora' not in s.marks: _lora(s)
    s.model = s.model.merge_and_unload()
    s.marks.add('trained')
    s.optimizer = None


def _quantized(s):
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = 'qnnpack' if 'qnnpack' in engines else engines[-1]
    s.model = torch.ao.quantization.quantize_dynamic(s.model, {nn.Linear}, dtype=torch.qint8)
    s.optimizer, s.memory, s.agency = None, s.m.sentinel.memory, s.m.sentinel.agency
    s.marks.add('quantized')


def _trained(s):
    s.marks.add('trained')
    s.model(input_ids=IDS, labels=IDS).loss.backward()
    s.optimizer.step()
    s.optimizer.zero_grad()


STATES = dict(
    open=[], closed=[_closed], fractional=[_closed, _fractional], channels=[_closed, _channels], merged=[_closed, _merged],
    learned=[_learned], free=[_free], closed_learned=[_closed, _learned],
    compact=[_compact], compact_fractional=[_compact, _fractional], compact_merged=[_compact, _merged],
    compact_learned=[_compact, _learned], compact_channels=[_channels, _compact],
    repaired=[_repaired], repaired_both=[_repaired_both], repaired_compact=[_repaired_both, _compact],
    repaired_merged=[_repaired, _merged], repaired_learned=[_repaired, _learned],
    repaired_compact_merged=[_repaired, _compact, _merged], repaired_compact_trained=[_repaired_both, _compact, _trained],
    grown=[_grown], grown_closed=[_grown, _closed], grown_compact=[_grown, _compact], grown_merged=[_grown, _merged],
    skips=[_skips, _closed], skips_compact=[_skips, _compact], skips_merged=[_skips, _merged], skips_repaired=[_skips, _repaired],
    agency=[_agency], agency_closed=[_closed, _agency], agency_compact=[_agency, _compact], agency_repaired=[_agency, _repaired],
    memory=[_memory, _repaired], memory_compact=[_memory, _repaired, _compact], memory_merged=[_memory, _repaired, _merged],
    family=[_family], family_closed=[_family, _closed], family_small=[_family, _small], family_merged=[_family, _closed, _merged],
    family_memory=[_memory, _family, _small], family_grown=[_family, _grown], family_repaired=[_family, _repaired_both, _compact],
    family_learned=[_family, _learned], family_lora=[_family, _lora],
    trained=[_closed, _trained], trained_merged=[_closed, _merged, _trained],
    lora=[_closed, _lora], lora_merged=[_closed, _lora_merged], lora_unloaded=[_closed, _unloaded], lora_absorbed=[_closed, _absorbed],
    lora_repaired=[_lora, _repaired], repaired_lora=[_repaired, _lora], lora_compact=[_compact, _lora], lora_learned=[_learned, _lora],
    lora_repaired_unloaded=[_lora, _repaired, _unloaded], lora_repaired_absorbed=[_lora, _repaired, _absorbed],
    lora_memory=[_memory, _lora, _repaired],
    quantized=[_closed, _fractional, _quantized], quantized_repaired=[_repaired, _quantized],
    quantized_compact=[_compact, _quantized], quantized_merged=[_closed, _merged, _quantized])


def scene(name, state):
    "A model in a state."
    s = Scene(name, adapt(plain(name)), state=state)
    s.optimizer = torch.optim.AdamW([p for p in s.model.parameters() if p.requires_grad], 1e-3)
    for step in STATES[state]: step(s)
    s.model.eval()
    return s


# Edits: what is done, under which row of the table of allowed edits, and what it promises.
def _open_heads(s, n=2):
    "Some open heads, by their number as built."
    m, gates = s.m, gate_values(s.model, effective=True)
    plan = m.sentinel.plan
    there = [(l, plan.kept(l)[h]) for l, h in (gates > 0).nonzero().tolist()]
    return [there[1], there[-2]][:n]


def _removed(s, kind='heads'):
    plan = s.m.sentinel.plan.of_kind(kind)
    return [tuple(x) for x in (plan.exists & ~plan.keep).nonzero().tolist()]


def _shut(s, kind='heads'):
    "Closed or removed units, by their number as built."
    m, gates = s.m, gate_values(s.model, kind=kind)
    plan = m.sentinel.plan.of_kind(kind)
    return _removed(s, kind) + [(l, plan.kept(l)[u]) for l, u in (gates == 0).nonzero().tolist()]


def _prune(s): prune(s.model, .5, CALIB, 'wanda', rounds=1, progress=False, optimizer=s.optimizer)
def _prune_both(s): prune(s.model, params=.8, batches=CALIB, criterion='wanda', rounds=1, progress=False, optimizer=s.optimizer)
def _close(s, **kw): close_heads(s.model, _open_heads(s), CALIB, optimizer=s.optimizer, **kw)
def _set(s): set_gates(s.model, {_local_pair(s): .5})
def _local_pair(s): return tuple((gate_values(s.model) > 0).nonzero()[-1].tolist())
def _reattach(s): reattach(s.model, _removed(s)[:1] or [(0, 1)], s.optimizer)
def _grow_heads(s, **kw):
    grow(s.model, heads={0: 1}, optimizer=s.optimizer)
    s.marks.add('grown')


def _grow_channels(s):
    grow(s.model, channels={1: 1}, optimizer=s.optimizer)
    s.marks.add('grown')


def _grow_layers(s):
    grow(s.model, layers=[0], optimizer=s.optimizer)
    s.marks.add('deeper')


def _ungrow(s):
    ungrow(s.model, s.optimizer)
    s.marks.discard('grown')


def _regrow(s, kind='heads', **kw):
    want = _shut(s, kind)[:2]
    if not want: raise Idle
    regrow(s.model, want, CALIB, optimizer=s.optimizer, kind=kind, **kw)


def is_wrapped(s): return any(hasattr(x, 'base_layer') for x in s.model.modules())


def twin(s):
    "Another model, with an optimiser, that a checkpoint of this one fits: wrapped alike, and grown alike."
    is_alike = is_wrapped(s) or 'grown' in s.marks
    res = scene(s.name, s.state if is_alike else 'open')
    res.optimizer = torch.optim.AdamW([p for p in res.model.parameters() if p.requires_grad], 1e-3)
    with torch.no_grad():
        for p in res.m.parameters(): p.mul_(1.1) if p.ndim > 1 else None
    return res


def _restore(s):
    "Into another model."
    path, other = s.path/'checkpoint', twin(s)
    save_checkpoint(path, s.model, s.optimizer)
    load_checkpoint(path, other.model, other.optimizer if s.optimizer is not None else None)
    near(logits(other.model), logits(s.model), 'a checkpoint', 1e-5 if is_inexact(s) else 0)


def _back_in_time(s):
    "A checkpoint of another model, into this one."
    other = twin(s)
    save_checkpoint(s.path/'checkpoint', other.model, other.optimizer)
    load_checkpoint(s.path/'checkpoint', s.model, s.optimizer)
    near(logits(s.model), logits(other.model), 'a checkpoint', 0)
    s.agency, s.memory = s.m.sentinel.agency, s.m.sentinel.memory
    s.marks.add('trained')


def is_inexact(s): return is_adaptive(s.m) and is_merged(s.m)


def _elastic(s):
    "The output stays, and resize has sizes to give."
    before = logits(s.model)
    elastic(s.model, CALIB, .95, rounds=1, progress=False)
    assert torch.equal(logits(s.model), before)


def _resize(s):
    "What unprune gives, and from there a size."
    whole = copy.deepcopy(s.m)
    resize(s.model, params=.9, optimizer=s.optimizer)
    assert model_size(s.m) <= .9*model_size(unprune(whole))
    there = {k: t.clone() for k, t in s.m.state_dict().items()}
    resize(s.model, params=.97, optimizer=s.optimizer)
    resize(s.model, params=.9, optimizer=s.optimizer)
    assert all(torch.equal(t, there[k]) for k, t in s.m.state_dict().items())


def _resize_whole(s):
    resize(s.model, params=1., optimizer=s.optimizer)
    assert s.m.sentinel.plan.whole and not s.m.sentinel.repairs and bool((gate_values(s.model) == 1).all())


def _save(s):
    "What is read computes what was saved."
    s.m.save_pretrained(s.path/'model')
    back = AutoModelForCausalLM.from_pretrained(s.path/'model', attn_implementation=s.m.config._attn_implementation)
    near(logits(back), logits(s.m), 'reloaded', 1e-5 if is_inexact(s) else 0)
    if not hasattr(back, 'sentinel'): return
    bad = differences(s.m.sentinel.plan.to_dict() | dict(info={}), back.sentinel.plan.to_dict() | dict(info={}))
    assert not bad, bad


def _export(s):
    export_hf(s.model, s.path/'export', pad=True)
    near(logits(AutoModelForCausalLM.from_pretrained(s.path/'export', attn_implementation='eager')), logits(s.m), 'exported', 1e-4)


def _is_gate(s, p): return any(p is site.module.sentinel.gate for site in s.m.sentinel.now) if is_adaptive(s.m) else False


def _train(s):
    "A step; what is closed stays so, and moments have the shape of their parameters."
    for p in s.m.parameters(): p.requires_grad_(p.is_floating_point() and not p.shape == () and not _is_gate(s, p))
    optimizer = torch.optim.AdamW([p for p in s.model.parameters() if p.requires_grad], 1e-2)
    before = gate_values(s.model) if is_adaptive(s.m) else None
    s.model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if before is not None and s.m.sentinel.config.mode == 'static': assert torch.equal(before.nan_to_num(7), gate_values(s.model).nan_to_num(7))
    s.marks.add('trained')


def _continue(s):
    "A step of the optimiser that moved along."
    if s.optimizer is None or s.state == 'lora_merged': raise Idle
    s.model(input_ids=IDS, labels=IDS).loss.backward()
    s.optimizer.step()
    s.optimizer.zero_grad()
    s.marks.add('trained')


def _attach_agency(s):
    if s.agency is not None: raise Idle
    agency = Agency()
    agency.attach(s.model)
    s.agency = agency


def _overload(s):
    if s.agency is None: raise Idle
    s.agency.set_state([_open_heads(s)[0]], 'overloaded', 'for a test')


def _detach_agency(s):
    if s.agency is None: raise Idle
    s.agency.detach()
    s.agency = None


def _attach_memory(s):
    if s.m.sentinel.memory is not None: raise Idle
    s.memory = HeadMemory().attach(s.model)


def _remove_skips(s):
    if not hasattr(s.m, 'sentinel_skips'): raise Idle
    remove_skips(s.model)


class Idle(Exception): "There is nothing to do in this state."


def _regrow_rows(s, kind='heads'):
    "Heads that are closed and nothing else are only opened."
    state, gone = s.m.sentinel, _removed(s)
    is_gated = not state.repairs and not set(_shut(s)[:2]) & set(gone)
    return ['reopen'] if is_gated else ['regrow']


def _unprune_rows(s):
    state = s.m.sentinel
    return ('unprune' if state.repairs else 'set', *(['expand'] if state.compact else []))


def _unmerge_rows(s): return ['unmerge'] if is_merged(s.m) else []
def _restore_rows(s): return ['restore', 'reshape'] if s.m.sentinel.compact and not is_wrapped(s) else ['restore']


class Idle(Exception): "There is nothing to do in this state."


WHAT = dict(  # name: (rows of the table, what it does, does the output stay as it was?)
    prune=('prune repair', _prune, False), prune_both=('prune repair', _prune_both, False),
    prune_unrepaired=('prune measure', lambda s: prune(s.model, .5, CALIB, 'random', repair='none', rounds=1, progress=False), False),
    close=('close repair', _close, False), close_unrepaired=('close', lambda s: _close(s, repair='none'), False),
    set=('set', _set, False), set_all=('set', lambda s: set_gates(s.model, 1.), False),
    set_channel=('set', lambda s: set_gates(s.model, {(0, 5): .5}, 'channels'), False),
    compact=('compact', lambda s: compact(s.model, optimizer=s.optimizer), True),
    expand=('expand', lambda s: expand(s.model, s.optimizer), True),
    elastic=('measure', _elastic, True), resize=('resize', _resize, False), resize_whole=('resize', _resize_whole, False),
    reattach=('reattach', _reattach, True),
    unprune=(_unprune_rows, lambda s: unprune(s.model, s.optimizer), False),
    undo_repair=('undo', lambda s: undo_repair(s.model), False),
    regrow=(_regrow_rows, _regrow, False), regrow_channels=('regrow', lambda s: _regrow(s, 'channels'), False),
    regrow_slowly=(_regrow_rows, lambda s: _regrow(s, warmup=3), True),
    grow_heads=('grow', _grow_heads, True), grow_channels=('grow_channels', _grow_channels, True),
    grow_layers=('grow_layers', _grow_layers, True), ungrow=('ungrow', _ungrow, False),
    merge=('merge', lambda s: merge_gates(s.model), True), unmerge=(_unmerge_rows, lambda s: unmerge_gates(s.model), True),
    harden=('harden', lambda s: harden_gates(s.model), False),
    learn=('adapt', lambda s: adapt(s.model, GateConfig('hard_concrete')), False),
    save=('save', _save, True), checkpoint=('checkpoint', _restore, True), restore=(_restore_rows, _back_in_time, False),
    unadapt=(_unmerge_rows, lambda s: unadapt(s.model), False), bake=('bake', lambda s: unadapt(s.model, bake=True), True),
    export=('export', _export, True), train=('', _train, False), optimizer_step=('', _continue, False),
    add_skips=('skips', lambda s: add_skips(s.model, 2), True), remove_skips=('', _remove_skips, False),
    attach_agency=('factors', _attach_agency, True), overload=('factors', _overload, False), detach_agency=('', _detach_agency, False),
    attach_memory=('', _attach_memory, True))
# What is said where there is nothing to do, whatever the state, or where somebody has a say
NOTHING = re.compile(r'a model without a family|another family|of a model that is pruned|no head of this model was removed|'
                     r'no heads of this model grew|can say no number of heads|has skip pathways|consent|nor a channel')


@torch.no_grad()
def logits(model):
    training = [x for x in model.modules() if x.training]
    out = model.eval()(input_ids=IDS, use_cache=False).logits
    for x in training: x.training = True
    return out


def near(a, b, what, tol=1e-4):
    assert a.isfinite().all(), f'{what}: not finite'
    off = (a - b).abs().max().item()
    assert off <= tol*max(1., b.abs().max().item()), f'{what}: {off:.2g} apart'


def refusals(s, rows):
    "What the table of allowed edits says against this."
    res = []
    for row in rows(s) if callable(rows) else rows.split():
        if row == 'bake' and s.agency is not None:             # which writes its factors into the gates first
            s, row = copy.deepcopy(s), 'merge'
            s.agency.detach()
        try: check_edit(s.model, 'merge' if row == 'bake' else row)
        except RuntimeError as e: res.append(str(e))
    return res


def hooks_of(s):
    "How many hooks of ours each output projection has."
    return [sum(getattr(f, '__self__', None) is site.module.sentinel for f in site.out._forward_pre_hooks.values())
            for site in s.m.sentinel.now]


def check(s):
    "What holds of every model, whatever was done."
    out = logits(s.model)
    assert out.isfinite().all()
    near(logits(copy.deepcopy(s.model)), out, 'a copy', 0)
    if s.optimizer is not None:
        for p, held in s.optimizer.state.items():
            assert all(x.shape == p.shape for x in held.values() if isinstance(x, torch.Tensor) and x.ndim), 'moments of another shape'
    if not is_adaptive(s.m): return
    assert max(hooks_of(s)) <= 1, 'a gate has two hooks'
    if refusals(s, 'bake'): return
    baked = copy.deepcopy(s)
    unadapt(baked.model, bake=True)
    near(logits(baked.model), out, 'a gate acts in the hook as it does in the weights', 1e-5)
    assert not any(x._forward_pre_hooks for n, x in baked.m.named_modules() if n.endswith(('proj', 'c_proj')))


def take_back(s):
    "From anywhere there is a way back to the model as it was built, bit for bit if nobody trained it."
    if 'quantized' in s.marks: return
    if is_wrapped(s):
        merged = any(getattr(x, 'merged', False) is True or getattr(x, 'merged_adapters', None) for x in s.model.modules())
        if merged:
            s.model.unmerge_adapter()
            s.marks.add('rounded')
        if is_adaptive(s.m) and is_merged(s.m): unmerge_gates(s.m)
        s.model = s.model.unload()
    m = s.m
    if not is_adaptive(m): return
    if m.sentinel.agency is not None: m.sentinel.agency.detach()
    if is_merged(m): unmerge_gates(m)
    if m.sentinel.config.mode != 'static': harden_gates(m)
    if hasattr(m, 'sentinel_skips'): remove_skips(m)
    repaired = bool(m.sentinel.repairs)
    unprune(m)
    if 'grown' in s.marks: ungrow(m)          # the columns of a repair were split, and are put together
    if 'grown' in s.marks and repaired: s.marks.add('rounded')
    unadapt(m)
    if 'deeper' in s.marks: return
    assert type(m) is type(plain(s.name))
    if s.marks & {'trained', 'rounded'}: return near(logits(m), logits(plain(s.name)), 'taken back', 1e-4) if 'trained' not in s.marks else None
    mine, want = m.state_dict(), plain(s.name).state_dict()
    assert mine.keys() == want.keys(), f'{mine.keys() ^ want.keys()}'
    bad = [k for k in want if not torch.equal(mine[k], want[k])]
    assert not bad, f'not what was built: {bad[:4]}'


def refused(s, run, before):
    "What is wrong with how an edit was refused, or ''; None if it was done."
    try: run(s)
    except Idle: return ''
    except AssertionError as e: return f'{e}'
    except Exception as e:
        said = f'{type(e).__name__}: {str(e)[:200]}'
        if not isinstance(e, REFUSALS) or RAW.search(str(e)): return f'no error of ours: {said}'
        left = [x for x in differences(before, s.picture()) if not x.startswith(('/config/architectures', '/config/dtype'))]
        if left: return f'refused, and changed {left[:3]}: {said}'
        return '' if s.listed or NOTHING.search(str(e)) else f'refused, but not in the table: {said}'


def try_pair(base, edit, path):
    "Do an edit on a copy of a scene. Returns what is wrong, or ''."
    rows, run, same = WHAT[edit]
    s = copy.deepcopy(base)
    s.path, s.listed = path, refusals(s, rows)
    path.mkdir()
    before = s.picture()
    wrong = refused(s, run, before)
    if wrong is not None: return wrong
    if s.listed: return f'done, although the table says: {s.listed[0][:200]}'
    try:
        if same: near(logits(s.model), before['logits'], 'before and after')
        check(s)
        take_back(s)
    except Exception as e: return f'then {type(e).__name__}: {str(e)[:200]}'
    return ''


WHOLE = os.environ.get('SENTINEL_PAIRS') == 'whole'
ALL = [(name, state) for i, state in enumerate(STATES) for j, name in enumerate(MODELS) if WHOLE or i % len(MODELS) == j]


@pytest.mark.parametrize('name, state', ALL)
def test_edits(name, state, tmp_path):
    base, found, n = scene(name, state), {}, list(STATES).index(state)
    base.path, before = tmp_path, base.picture()
    for k, (edit, (rows, run, _)) in enumerate(WHAT.items()):
        base.listed = refusals(base, rows)
        if base.listed:                    # nothing changes, so the scene serves for the next one as well
            found[edit] = refused(base, run, before)
            if found[edit] is None: found[edit] = 'done, although the table refuses it'
            if found[edit]: base = scene(name, state)
        elif WHOLE or (n + k) % 12 == 0: found[edit] = try_pair(base, edit, tmp_path/edit)
    found = {edit: wrong for edit, wrong in found.items() if wrong}
    assert not found, '\n'.join(f'{state} x {edit}: {wrong}' for edit, wrong in found.items())


def test_the_table_is_whole():
    "Each row of the table is asked for by an edit that is tried here, or by one that these consist of."
    asked = {row for rows, _, _ in WHAT.values() if not callable(rows) for row in rows.split()}
    assert not set(EDITS) - asked - {'unprune', 'unmerge', 'reopen', 'restore', 'reshape', 'ramp', 'save_wrapped'}, set(EDITS) - asked

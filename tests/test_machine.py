"""Any order of edits, on small models of odd shapes: what is promised of each edit holds after all that came before it.

2,000 steps by default, in `PARTS` tests, always the same ones. `SENTINEL_STEPS=20000 pytest tests/test_machine.py` takes more,
`SENTINEL_SEED=7` others. A sequence that fails is made as short as possible and printed as a script: paste it into a file in the
repository's root and run it.
"""
import copy
import json
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, Phase, currently_in_test_context, event, note, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from faults import of_family, differences, picture  # noqa: E402
from test_units import same_state, state  # noqa: E402

from sentinel_ai import (Agency, ConsentError, GateConfig, HeadMemory, HeadPlan, adapt, add_skips, close_heads, compact, elastic, expand, gate_values,  # noqa: E402
                         grow, harden_gates, load_checkpoint, merge_gates, prune, random_model, regrow, remove_skips, resize, save_checkpoint,
                         set_gates, unadapt, ungrow, unmerge_gates, unprune)
from sentinel_ai.gates import is_merged  # noqa: E402
from sentinel_ai.heads import core_linear, in_dim, param_at  # noqa: E402
from sentinel_ai.pruning import undo_repair  # noqa: E402
from sentinel_ai.shaping import kinds_of  # noqa: E402
from sentinel_ai.sizes import misfit  # noqa: E402
from sentinel_ai.surgery import head_slices, reattach  # noqa: E402
from sentinel_ai.unet import set_skip_gates  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
STEPS = int(os.environ.get('SENTINEL_STEPS', 2000))
SEED = int(os.environ.get('SENTINEL_SEED', 0))
PARTS, LENGTH = 8, 16          # tests, and steps of a sequence
EVERY = 4                      # steps between whole checks
MODELS = ['gpt2', 'llama', 'bloom', 'phi3', 'opt', 'gpt_neox', 'falcon', 'qwen3', 'olmo2', 'bitnet', 'mixtral']
IDS = torch.tensor([[5, 17, 33, 8, 21, 40, 11, 29], [62, 14, 7, 50, 3, 9, 27, 44]])
CALIB = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(1))
REFUSALS = ValueError, RuntimeError, TypeError, IndexError, KeyError, OSError      # UnsupportedArchitecture is a ValueError; TypeError: adapt(model) first
# What torch says when something of ours is wrong: no refusal
RAW = re.compile(r'size mismatch|shapes? (of )?tensor|must match|cannot be multiplied|out of (bounds|range)|Expected all tensors|inplace|shape \'\[|'
                 r'unsupported operand|has no attribute|not subscriptable|missing \d|unexpected keyword|must be Tensor|not iterable')
pytestmark = pytest.mark.filterwarnings('ignore')


def shape_of(name, n_layers, heads, group, d, wide, ffn, tied):
    "A config's sizes. `wide`: the stream is wider than all heads together, where the architecture allows it."
    kv = heads//group if heads % group == 0 else heads
    hidden, common = heads*d, dict(tie_word_embeddings=tied)
    if name == 'gpt2': return dict(n_embd=hidden, n_head=heads, n_layer=n_layers, n_inner=ffn) | common
    if name == 'bloom': return dict(hidden_size=hidden, n_head=heads, n_layer=n_layers) | common
    common |= dict(hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=n_layers)
    if name == 'opt': return common | dict(ffn_dim=ffn, word_embed_proj_dim=hidden)
    if name == 'falcon': return common | dict(new_decoder_architecture=True, num_kv_heads=kv, ffn_hidden_size=ffn)
    common |= dict(intermediate_size=4*ffn if name == 'mixtral' else ffn)      # the grouped kernel asks for 16 bytes
    if name == 'gpt_neox': return common
    if name == 'mixtral': common |= dict(num_local_experts=3, num_experts_per_tok=2)
    if name in ('llama', 'qwen3') and wide: common |= dict(hidden_size=2*hidden)
    return common | dict(num_key_value_heads=kv) | (dict(head_dim=d) if name in ('llama', 'qwen3') else {})


WRONG = [
    ('set_gates outside', lambda m: set_gates(m, {(99, 0): 0.})), ('set_gates NaN', lambda m: set_gates(m, {(0, 0): float('inf')})),
    ('prune nothing', lambda m: prune(m, -1, CALIB)), ('prune without text', lambda m: prune(m, 1, [])),
    ('prune too much', lambda m: prune(m, params=1, batches=CALIB)), ('close outside', lambda m: close_heads(m, [(0, 99)], CALIB)),
    ('reattach outside', lambda m: reattach(m, [(99, 0)])), ('regrow outside', lambda m: regrow(m, [(0, 99)])),
    ('grow a layer', lambda m: grow(m, layers=[99])), ('grow fewer', lambda m: grow(m, heads=-1)),
    ('load nothing', lambda m: load_checkpoint('nowhere', m))]
NUMBERS = st.integers(0, 99)
KINDS = st.sampled_from(['heads', 'channels'])


@torch.no_grad()
def logits(model): return model(input_ids=IDS, use_cache=False).logits


def near(a, b, what, tol=1e-4):
    scale = max(1., b.abs().max().item())
    assert a.isfinite().all() and (a - b).abs().max() <= tol*scale, f'{what}: {(a - b).abs().max():.2g} apart'


def say(text, to=note):
    "Tell hypothesis, when it is there: a pasted script runs without it."
    if currently_in_test_context(): to(text)


# What a script needs in front of the steps that hypothesis prints
HEAD = "import sys\nsys.path.insert(0, 'tests')\nfrom test_machine import Edits"


class Edits(RuleBasedStateMachine):
    "A model with its optimiser, and what is known about it."
    def __init__(self):
        super().__init__()
        say(HEAD)
        self.count = 0
        self.folder = Path(tempfile.mkdtemp())
        self.saved = self.ramp = self.memory = self.agency = self.family = None
        self.trained = self.grown = self.deep = self.drawn = self.split = False

    @initialize(name=st.sampled_from(MODELS), number=st.integers(0, 3), n_layers=st.integers(1, 3), heads=st.integers(1, 5), group=st.integers(1, 5),
                d=st.sampled_from([4, 8]), wide=st.booleans(), ffn=st.sampled_from([1, 5, 12, 24]), tied=st.booleans())
    def build(self, name, number, **sizes):
        self.plain = random_model(name, seed=number, **shape_of(name, **sizes))
        self.model = adapt(copy.deepcopy(self.plain))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-2)

    # what every edit goes through
    def attempt(self, name, f, same=False):
        "Do an edit, or see that a refusal changes nothing. `same`: the output must be what it was."
        before = picture(self.model, self.optimizer, self.memory, self.agency)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                f()
        except REFUSALS as e:
            assert not RAW.search(str(e)), f'{name}: {type(e).__name__}: {e}'
            say(f'# refused: {type(e).__name__}: {str(e)[:120]}')
            say(f'{name} refused', event)
            left = differences(before, picture(self.model, self.optimizer, self.memory, self.agency))
            if isinstance(e, ConsentError): left = [x for x in left if not x.startswith('/agency/events')]     # what was asked stays on record
            assert not left, f'{name} was refused ({str(e)[:80]}) and changed {left[:4]}'
            return False
        say(f'{name} done', event)
        out = logits(self.model)
        assert out.isfinite().all()
        if same: near(out, before['logits'], name)
        self.count += 1
        if self.count % EVERY == 0: self.check(out)
        return True

    def check(self, out):
        "What must hold of every model, of which `out` is the output."
        assert self.model.sentinel.family is self.family, 'the family is another'
        self.check_gradients()
        config = self.model.sentinel.config
        if is_merged(self.model) or config.mode != 'static': return
        twin = copy.deepcopy(self.model)
        assert torch.equal(logits(twin), out), 'a copy computes something else'
        try: compact(twin)
        except REFUSALS as e:
            assert not RAW.search(str(e)), str(e)
            return
        near(logits(twin), out, 'compact apart from masked')

    def check_gradients(self):
        "Closed units get none."
        m = self.model
        m.zero_grad()
        m(input_ids=IDS, labels=IDS).loss.backward()
        for kind in kinds_of(m):
            gates, sites = gate_values(m, effective=True, kind=kind), m.sentinel.now.heads if kind == 'heads' else m.sentinel.now.channels
            for s in sites:
                shut = (gates[s.layer, :s.n] == 0).nonzero().flatten().tolist()
                for u in shut: self.check_unit(s, u)
        m.zero_grad()

    def check_unit(self, site, u):
        grad = site.weight.grad
        if grad is not None:
            if site.blocks > 1: columns = site.columns(grad)[u]
            else: columns = (grad if in_dim(core_linear(site.out)) == 0 else grad.t()).unflatten(0, (site.n, site.width))[u]
            assert not columns.any(), f'layer {site.layer}: closed {site.kind} {u} gets a gradient'
        if site.kind != 'heads': return
        for name, dim, idx, part in head_slices(site, u):
            p = param_at(site.attn, name)
            own = part in 'qo' and p.grad is not None            # a group's keys and values have other readers
            if own: assert not p.grad.index_select(dim, idx).any(), f'layer {site.layer}: {name} of closed head {u} gets a gradient'

    def some(self, kind, number, open_=None):
        "Some units that there are, by a number."
        gates = gate_values(self.model, kind=kind)
        there = ~gates.isnan()
        if open_ is not None: there &= (gates != 0) == open_
        units, gen = [tuple(u) for u in there.nonzero().tolist()], random.Random(number)
        return gen.sample(units, gen.randint(1, max(1, len(units)*2//3))) if units else []

    def built(self, kind, units):
        plan = self.model.sentinel.plan.of_kind(kind)
        return [(l, plan.kept(l)[u]) for l, u in units]

    def gone(self, kind, number):
        plan, gen = self.model.sentinel.plan.of_kind(kind), random.Random(number)
        units = [tuple(u) for u in (plan.exists & ~plan.keep).nonzero().tolist()]
        return gen.sample(units, gen.randint(1, len(units))) if units else []

    # gates
    @rule(kind=KINDS, number=NUMBERS, value=st.sampled_from([0., 0., .5, 1.]))
    def set_gates(self, kind, number, value):
        units = self.some(kind, number)
        if units: self.attempt('set_gates', lambda: set_gates(self.model, dict.fromkeys(units, value), kind))

    @rule(mode=st.sampled_from(['static', 'learned', 'hard_concrete']), kinds=st.sampled_from([('heads',), ('heads', 'channels')]), budget=st.booleans())
    def adapt(self, mode, kinds, budget):
        options = dict(sparsity=.25, unit='params') if budget and mode != 'static' else {}
        if self.attempt('adapt', lambda: adapt(self.model, GateConfig(mode, kinds=kinds, **options))):
            self.optimizer.add_param_group(dict(params=self.new_parameters()))

    def new_parameters(self):
        known = {id(p) for g in self.optimizer.param_groups for p in g['params']}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]

    @precondition(lambda self: self.model.sentinel.config.mode != 'static')
    @rule()
    def harden(self): self.attempt('harden_gates', lambda: harden_gates(self.model))

    @rule()
    def merge(self): self.attempt('merge_gates', lambda: merge_gates(self.model), same=True)

    @precondition(lambda self: is_merged(self.model))
    @rule()
    def unmerge(self): self.attempt('unmerge_gates', lambda: unmerge_gates(self.model), same=True)

    # pruning
    @rule(amount=st.sampled_from([1, .3, .6]), criterion=st.sampled_from(['joint', 'taylor', 'wanda', 'random']),
          repair=st.sampled_from(['none', 'linear', 'affine']))
    def prune_heads(self, amount, criterion, repair):
        self.attempt('prune', lambda: prune(self.model, amount, CALIB, criterion, repair=repair, rounds=1, progress=False,
                                            optimizer=self.optimizer))

    @rule(share=st.sampled_from([.95, .8, .6]), criterion=st.sampled_from(['joint', 'wanda']), repair=st.sampled_from(['none', 'affine']))
    def prune_units(self, share, criterion, repair):
        self.attempt('prune-params', lambda: prune(self.model, params=share, batches=CALIB, criterion=criterion, repair=repair, rounds=1, progress=False,
                                                   optimizer=self.optimizer))

    @rule(number=NUMBERS, repair=st.sampled_from(['none', 'affine']))
    def close(self, number, repair):
        heads = self.built('heads', self.some('heads', number, True))
        if heads: self.attempt('close_heads', lambda: close_heads(self.model, heads, CALIB, repair=repair, optimizer=self.optimizer))

    @rule()
    def undo_repair(self): self.attempt('undo_repair', lambda: undo_repair(self.model))

    @rule(given=st.booleans())
    def unprune(self, given):
        self.ramp = None
        if self.attempt('unprune', lambda: unprune(self.model, self.optimizer if given else None)): self.is_plain('unprune')

    @rule(number=NUMBERS)
    def ask_too_much(self, number):
        "What no model can do is refused."
        name, run = WRONG[number % len(WRONG)]
        assert not self.attempt(name, lambda: run(self.model)), f'{name} was done'

    # surgery
    @rule(given=st.booleans())
    def compact(self, given): self.attempt('compact', lambda: compact(self.model, optimizer=self.optimizer), same=True)

    @rule(given=st.booleans())
    def expand(self, given): self.attempt('expand', lambda: expand(self.model, self.optimizer if given else None), same=True)

    @rule(kind=KINDS, number=NUMBERS)
    def reattach(self, kind, number):
        units = self.gone(kind, number) if kind in kinds_of(self.model) else []
        if units: self.attempt('reattach', lambda: reattach(self.model, units, self.optimizer, kind=kind), same=True)

    # whole sublayers
    @rule(kind=KINDS, number=NUMBERS, repair=st.sampled_from(['none', 'affine']), cut=st.booleans())
    def drop_sublayer(self, kind, number, repair, cut):
        if kind not in kinds_of(self.model): return
        layer = number % len(self.model.sentinel.now.heads)
        units = [u for u in (gate_values(self.model, kind=kind) > 0).nonzero().tolist() if u[0] == layer]
        if not units: return
        if kind == 'heads': run = lambda: close_heads(self.model, self.built(kind, units), CALIB, repair=repair, optimizer=self.optimizer)
        else: run = lambda: set_gates(self.model, {tuple(u): 0. for u in units}, kind)
        if self.attempt(f'drop {kind}', run) and cut: self.attempt('compact', lambda: compact(self.model, optimizer=self.optimizer), same=True)

    @rule(kind=KINDS, number=NUMBERS, warmup=st.sampled_from([0, 3]))
    def restore_sublayer(self, kind, number, warmup):
        "Only those of one layer, and as they were."
        if kind not in kinds_of(self.model): return
        units = sorted({*self.gone(kind, 0), *self.built(kind, self.some(kind, 0, False))})
        layers = sorted({l for l, _ in units})
        mine = [u for u in units if u[0] == layers[number % len(layers)]]
        def run(): self.ramp = regrow(self.model, mine, kind=kind, warmup=warmup, optimizer=self.optimizer)
        if mine: self.attempt(f'restore {kind}', run)

    # sizes
    @rule(least=st.sampled_from([.9, .8]), repair=st.sampled_from(['affine', 'linear', 'none']), cleared=st.booleans())
    def elastic(self, least, repair, cleared):
        if cleared and not self.is_whole() and self.attempt('unprune', lambda: unprune(self.model, self.optimizer)): self.ramp = None
        def run(): self.family = elastic(self.model, CALIB, least, rounds=1, repair=repair, progress=False)
        self.attempt('elastic', run, same=True)

    def is_whole(self): return self.model.sentinel.plan.whole and not self.model.sentinel.repairs and bool((gate_values(self.model) == 1).all())

    @precondition(lambda self: self.family is not None)
    @rule(share=st.sampled_from([1., .97, .9, .85]))
    def resize(self, share):
        "The same weights whatever came before, and at 1 those that `unprune` gives."
        twin = copy.deepcopy(self.model)
        if not self.attempt('resize', lambda: resize(self.model, params=share, optimizer=self.optimizer)): return
        self.ramp = None
        unprune(twin)
        if share < 1: resize(twin, params=share)
        mine, want = self.model.state_dict(), twin.state_dict()
        bad = [k for k in want if not torch.equal(mine[k], want[k])]
        assert mine.keys() == want.keys() and not bad, f'{bad[:3]} are others than after unprune'
        assert torch.equal(logits(self.model), logits(twin))
        if share == 1: self.is_plain('resize')

    # growth
    @rule(kind=KINDS, number=NUMBERS, init=st.sampled_from(['memory', 'split', 'zero', 'random', 'unet']), warmup=st.sampled_from([0, 3]), wish=st.booleans())
    def regrow(self, kind, number, init, warmup, wish):
        units = self.gone(kind, number) + self.built(kind, self.some(kind, number, False))
        what = 1 if wish or not units else units
        def run(): self.ramp = regrow(self.model, what, CALIB, kind=kind, init=init, warmup=warmup, optimizer=self.optimizer, seed=number)
        if self.attempt('regrow', run): self.drawn = self.drawn or init != 'memory'

    @precondition(lambda self: self.ramp is not None)
    @rule()
    def ramp_step(self): self.attempt('step', self.ramp.step)

    @rule(kind=KINDS, init=st.sampled_from(['split', 'zero']))
    def grow(self, kind, init):
        if self.attempt('grow', lambda: grow(self.model, **{kind: 1}, init=init, optimizer=self.optimizer), same=True):
            self.grown, self.split = True, self.split or init == 'split'

    @rule(number=NUMBERS)
    def grow_layer(self, number):
        n = len(self.model.sentinel.now.heads)
        if n > 4: return
        if self.attempt('grow-layers', lambda: grow(self.model, layers=[number % n], optimizer=self.optimizer), same=True): self.deep = True

    @rule(given=st.booleans())
    def ungrow(self, given):
        if self.attempt('ungrow', lambda: ungrow(self.model, self.optimizer if given else None)):
            self.grown, self.drawn = False, self.drawn or self.split        # a half that is closed isn't given back

    # what watches
    @rule()
    def remember(self):
        if self.memory is None:
            memory = HeadMemory()
            if self.attempt('memory', lambda: memory.attach(self.model), same=True): self.memory = memory
        else:
            self.memory.detach(self.model)
            self.memory = None

    @rule(number=NUMBERS, what=st.sampled_from(['attach', 'withdraw', 'grant', 'overloaded', 'detach']))
    def say(self, number, what):
        if self.agency is None:
            agency = Agency()
            if what == 'attach' and self.attempt('agency', lambda: agency.attach(self.model), same=True): self.agency = agency
            return
        heads = self.built('heads', self.some('heads', number))
        if what == 'withdraw': self.attempt(what, lambda: self.agency.withdraw(heads, 'for a test'))
        if what == 'grant': self.attempt(what, lambda: self.agency.grant(heads, 'for a test'))
        if what == 'overloaded': self.attempt(what, lambda: self.agency.set_state(heads, what, 'for a test'))
        if what == 'detach' and self.attempt(what, self.agency.detach): self.agency = None

    @rule(number=NUMBERS)
    def skips(self, number):
        if not hasattr(self.model, 'sentinel_skips'):
            self.attempt('add_skips', lambda: add_skips(self.model, 2, seed=number), same=True)
        elif number % 2: self.attempt('set_skip_gates', lambda: set_skip_gates(self.model, number % 7/7))
        else: self.attempt('remove_skips', lambda: remove_skips(self.model))

    # training
    @rule(steps=st.integers(1, 2))
    def train(self, steps):
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(input_ids=IDS, labels=IDS).loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.eval()
        self.trained = True
        self.check(logits(self.model))

    # files
    @rule()
    def reload(self):
        "What is read computes what was saved, bit for bit; the run goes on with it."
        folder = self.folder/'model'
        shutil.rmtree(folder, ignore_errors=True)
        live = logits(self.model)
        if not self.attempt('save_pretrained', lambda: self.model.save_pretrained(folder), same=True): return
        back = adapt(AutoModelForCausalLM.from_pretrained(folder, attn_implementation=self.model.config._attn_implementation))
        for p in back.parameters(): p.data = p.data.clone()
        if is_merged(self.model): near(logits(back), live, 'reload of a merged model')
        else: assert torch.equal(logits(back), live), f'reload is {(logits(back) - live).abs().max():.2g} apart'
        plans = [m.sentinel.plan.to_dict() | dict(info={}) for m in (self.model, back)]
        assert not differences(*plans), differences(*plans)
        self.same_family(self.saved_family(), back.sentinel.family)
        self.family = back.sentinel.family
        self.trained = self.trained or is_merged(self.model)         # a plain model was saved, with the gates in its weights
        self.model, self.agency, self.ramp = back.eval(), back.sentinel.agency, None
        self.memory = back.sentinel.memory
        self.optimizer = torch.optim.AdamW([p for p in back.parameters() if p.requires_grad], 1e-2)

    def saved_family(self):
        "What a folder holds: none in that of a merged model, which is plain, or after growth."
        has_none = self.family is None or is_merged(self.model) or misfit(self.family, self.model.sentinel.built)
        return None if has_none else self.family

    def same_family(self, *families):
        pair = [None if family is None else of_family(family) for family in families]
        assert not differences(*pair), differences(*pair)

    @rule()
    def save_checkpoint(self):
        path = self.folder/'checkpoint'
        if self.attempt('save_checkpoint', lambda: save_checkpoint(path, self.model, self.optimizer), same=True):
            self.saved = dict(logits=logits(self.model), trained=self.trained, grown=self.grown, drawn=self.drawn, deep=self.deep,
                              n=len(self.model.sentinel.now.heads), merged=is_merged(self.model), family=self.saved_family())

    @precondition(lambda self: self.saved is not None)
    @rule(given=st.booleans())
    def load_checkpoint(self, given):
        def run():
            load_checkpoint(self.folder/'checkpoint', self.model, self.optimizer if given else None)
            self.family = self.model.sentinel.family
        if not self.attempt('load_checkpoint', run): return
        near(logits(self.model), self.saved['logits'], 'a checkpoint apart from what was saved', 0 if not self.saved['merged'] else 1e-4)
        self.ramp, self.agency, self.memory = None, self.model.sentinel.agency, self.model.sentinel.memory
        self.trained, self.grown, self.drawn, self.deep = (self.saved[k] for k in ('trained', 'grown', 'drawn', 'deep'))
        self.same_family(self.saved['family'], self.family)

    @rule()
    def plan_file(self):
        "A plan through a file, applied to a copy of the model as it was built, and to one whose gates it closes."
        if is_merged(self.model) or self.grown or self.deep or self.model.sentinel.plan.has_grown: return
        plan = HeadPlan.from_gates(self.model)
        back = HeadPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
        assert not differences(plan.to_dict(), back.to_dict()), differences(plan.to_dict(), back.to_dict())
        small, masked = (adapt(copy.deepcopy(self.plain)) for _ in range(2))
        try: compact(small, back)
        except REFUSALS as e:
            assert not RAW.search(str(e)), str(e)
            return
        for kind in ('heads', 'channels') if back.channels is not None else ('heads',):      # without channels, all are kept
            keep = back.of_kind(kind).keep
            set_gates(masked, torch.where(keep | gate_values(masked, kind=kind).isnan(), torch.nan, 0.), kind)
        near(logits(small), logits(masked), 'a plan of a file')

    @precondition(lambda self: self.memory is not None)
    @rule()
    def memory_file(self):
        "A memory through a file takes the place of the one that was saved."
        file, before = self.folder/'memory.safetensors', self.memory
        if not self.attempt('save memory', lambda: before.save(file), same=True): return
        def swap():
            other = HeadMemory.load(file)
            assert list(other.records) == list(before.records)
            before.detach(self.model)
            self.memory = other.attach(self.model)
        self.attempt('load memory', swap, same=True)

    @precondition(lambda self: self.agency is not None)
    @rule()
    def agency_file(self):
        saved = json.loads(json.dumps(self.agency.to_dict()))
        other = Agency.from_dict(saved)
        assert not differences(saved, json.loads(json.dumps(other.to_dict())))

    # the end
    def is_plain(self, what):
        "Is the model what it was built as?"
        if self.trained or self.grown or self.drawn or self.deep or hasattr(self.model, 'sentinel_skips') or self.agency is not None: return
        if self.split: return near(logits(self.model), logits(self.plain), what, 1e-5)       # a repair's columns were split and put together
        assert torch.equal(logits(self.model), logits(self.plain)), f'{what}: the output is {(logits(self.model) - logits(self.plain)).abs().max():.2g} apart'
        mine, want = self.model.state_dict(), self.plain.state_dict()
        bad = [k for k in want if not torch.equal(mine[k], want[k])]
        assert not bad, f'{what}: {bad[:3]} differ'

    def teardown(self):
        try: self.take_back()
        finally: shutil.rmtree(self.folder, ignore_errors=True)

    def take_back(self):
        "From anywhere there is a way back to the model as it was built."
        m = getattr(self, 'model', None)
        if m is None or sys.exc_info()[0] is not None: return
        if self.agency is not None:
            self.agency.detach()
            self.agency = None
        if is_merged(m): unmerge_gates(m)
        if m.sentinel.config.mode != 'static': harden_gates(m)
        if hasattr(m, 'sentinel_skips'): remove_skips(m)
        if m.sentinel.repairs.lost: return
        unprune(m, self.optimizer)
        if self.grown:
            try: ungrow(m, self.optimizer)
            except RuntimeError as e: return say(f'# {e}')
            self.grown = False
        self.is_plain('at the end')
        unadapt(m)
        other = self.deep or self.trained or self.drawn or self.split
        if not other: assert type(m) is type(self.plain) and same_state(state(m), state(self.plain))


def walk(machine, steps, start, phases=(Phase.generate, Phase.shrink)):
    "Take so many steps, in sequences that begin with a seed."
    options = settings(max_examples=max(1, steps//LENGTH), stateful_step_count=LENGTH, deadline=None, database=None, print_blob=False,
                       suppress_health_check=list(HealthCheck), report_multiple_bugs=False, phases=phases)
    run_state_machine_as_test(seed(start)(machine), settings=options)


@pytest.mark.parametrize('part', range(PARTS))
def test_any_order_of_edits(part):
    walk(type('Edits', (Edits,), {}), STEPS//PARTS, PARTS*SEED + part)


def test_what_fails_is_printed_as_a_script():
    "What is printed, pasted, fails in the same way."
    class Spoiled(Edits):
        def attempt(self, name, f, same=False): raise AssertionError(f'spoiled {name}')
    Spoiled.__name__ = 'Edits'
    with pytest.raises(AssertionError, match='spoiled') as e: walk(Spoiled, 64, 0, [Phase.generate])
    notes = e.value.__notes__
    script = '\n'.join(notes[notes.index(HEAD):])
    assert HEAD in script and 'state.build(' in script
    with pytest.raises(AssertionError, match=str(e.value)): exec(script.replace(HEAD, ''), dict(Edits=Spoiled))

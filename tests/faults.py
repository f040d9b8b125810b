"""Exceptions at any torch operation, any line of `sentinel_ai` or any access to a file, and a picture of what an edit must leave as it was."""
import dataclasses
import errno
import gc
import itertools
import linecache
import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import sentinel_ai
import torch
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = str(Path(sentinel_ai.__file__).parent)
IDS = torch.tensor([[5, 17, 33, 8, 21, 40, 11, 29], [62, 14, 7, 50, 3, 9, 27, 44]])
KINDS = (RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError)
NEVER = float('inf')


class fail_at_op(TorchDispatchMode):
    "Raise at the `n`-th operation (from 1) of a block; `count` says how many ran, `fired` where it was."
    def __init__(self, n=NEVER, kind=RuntimeError):
        super().__init__()
        self.n, self.kind, self.count, self.fired, self.at_end = n, kind, 0, None, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.n:
            self.fired = str(func)
            raise self.kind('injected')
        return func(*args, **(kwargs or {}))


class fail_at_line:
    "Raise at the `n`-th line (from 1) of the package; lines of a rollback don't count. `at_end` says if the line is a return."
    def __init__(self, n=NEVER, kind=RuntimeError):
        self.n, self.kind, self.count, self.fired, self.undoing, self.at_end = n, kind, 0, None, 0, False

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *error): sys.settrace(self.before)

    def call(self, frame, event, arg):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE): return None
        if code.co_name != 'rollback': return None if self.undoing else self.line
        self.undoing += 1
        return self.undo

    def undo(self, frame, event, arg):
        if event == 'return': self.undoing -= 1
        return self.undo

    def line(self, frame, event, arg):
        if event != 'line' or self.undoing: return self.line
        self.count += 1
        if self.count == self.n:
            source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            self.fired = f'{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {source}'
            self.at_end = source.startswith('return')
            raise self.kind('injected')
        return self.line


class DiskFull(OSError):
    def __init__(self, text): super().__init__(errno.ENOSPC, text)


FILE_KINDS = (DiskFull, KeyboardInterrupt)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NEED_ROOM = 'open', 'os.mkdir', 'write', 'fsync'       # what a full disk refuses; names can still change and vanish
_CHANGES = {'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.link', 'os.truncate'}
_watching = []                                          # faults that are switched on; an audit hook can't be taken off


def _on_audit(event, args):
    if not _watching: return
    if event == 'open' and isinstance(args[2], int) and args[2] & _WRITES: _watching[-1].meet(event, args[0])
    elif event in _CHANGES: _watching[-1].meet(event, args[0])


sys.addaudithook(_on_audit)


class fail_at_file:
    """Raise at the `n`-th change (from 1) to a file or folder: opened to write, written, forced to the disk, renamed, linked, removed, made.

    `folder`: others don't count. `lasting`: the disk stays full, so whatever needs room fails from there on."""
    def __init__(self, n=NEVER, kind=DiskFull, folder=None, lasting=False):
        self.n, self.kind, self.folder, self.lasting = n, kind, folder, lasting
        self.count, self.fired, self.at_end = 0, None, False

    def __enter__(self):
        import safetensors.torch
        self.real = real = dict(fsync=os.fsync, serialize=safetensors.torch.serialize_file)

        def fsync(fd):
            self.meet('fsync', None)
            return real['fsync'](fd)

        def serialize(tensors, path, *args, **kwargs):
            real['serialize'](tensors, path, *args, **kwargs)
            try: self.meet('write', path)
            except BaseException:
                os.truncate(path, os.path.getsize(path)//2)        # a part of it is there
                raise
        os.fsync, safetensors.torch.serialize_file = fsync, serialize
        _watching.append(self)
        return self

    def __exit__(self, *error):
        import safetensors.torch
        _watching.remove(self)
        os.fsync, safetensors.torch.serialize_file = self.real['fsync'], self.real['serialize']

    def meet(self, event, path):
        "An access; some of them are the last."
        if self.folder is not None and path is not None and not str(path).startswith(str(self.folder)): return
        self.count += 1
        is_over = self.fired is not None and self.lasting and event in _NEED_ROOM
        if self.count != self.n and not is_over: return
        if self.fired is None: self.fired = f'{event} {path}'
        raise self.kind('injected')


def count_ops(f):
    "Run `f`; how many operations did it take?"
    with fail_at_op() as mode: f()
    return mode.count


def count_lines(f):
    "Run `f`; how many lines of the package did it take?"
    with fail_at_line() as tracer: f()
    return tracer.count


def _value(x):
    "What to remember of a value, so that a later one can be compared: tensors and containers copied, other objects themselves."
    if isinstance(x, torch.Tensor): return x.detach().clone()
    if isinstance(x, dict): return {k: _value(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, set)): return type(x)(map(_value, x)) if type(x) in (list, tuple, set) else x
    return x


class Same:
    "An object that is compared by identity, and kept so that its id isn't given to another."
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x is other.x
    def __repr__(self): return f'<{type(self.x).__name__} {id(self.x):x}>'


def _hooks(x):
    tables = ('_forward_hooks', '_forward_pre_hooks', '_forward_hooks_with_kwargs', '_forward_pre_hooks_with_kwargs',
              '_forward_hooks_always_called', '_backward_hooks', '_backward_pre_hooks')
    return {name: list(vars(x)[name].items()) for name in tables}


def _attributes(x):
    "Plain values as they are, tensors by identity and the rest by being there."
    skip = set(_hooks(x)) | {'_parameters', '_buffers', '_modules'}
    plain = (int, float, bool, str, type(None))
    res = {k: v if isinstance(v, plain) else '...' for k, v in vars(x).items() if k not in skip}
    return res | {name: [(k, Same(v)) for k, v in vars(x)[name].items()] for name in ('_parameters', '_buffers', '_modules')}


def _grad(p): return None if p.grad is None else p.grad.clone()


def _of_parameter(p):
    hooks = None if not p._backward_hooks else list(p._backward_hooks.items())
    return dict(me=Same(p), value=p.detach().clone(), wants=p.requires_grad, grad=_grad(p), hooks=hooks)


def _of_optimizer(optimizer):
    if optimizer is None: return None
    state = {id(p): _value(s) for p, s in optimizer.state.items()}
    groups = [{k: [Same(p) for p in v] if k == 'params' else _value(v) for k, v in g.items()} for g in optimizer.param_groups]
    hooks = {name: list(x) for name, x in vars(optimizer).items() if name.endswith('hooks')}
    return dict(state=state, groups=groups, hooks=hooks)


def _of_memory(memory):
    if memory is None: return None
    records = {k: memory[k] for k in memory.records}
    flat = {k: dict(values=_value(r.values), moments=_value(r.moments), meta=_value(r.meta), tables=_value(r.tables)) for k, r in records.items()}
    files = None if memory.folder is None else {f.name: f.read_bytes() for f in sorted(memory.folder.iterdir())}
    return dict(order=list(memory.records), records=flat, units=_value(memory.units), forgotten=list(memory.forgotten), files=files)


def _of_agency(agency):
    if agency is None: return None
    log = None if agency.log is None or not Path(agency.log).exists() else Path(agency.log).read_bytes()
    return dict(lines=log) | {k: Same(v) if isinstance(v, torch.nn.Module) else _value(v) for k, v in vars(agency).items()}


def _of_other(x):
    fields = {k: _value(v) for k, v in vars(x).items() if k != 'model'}
    return fields | _value(dict(x.state_dict())) if isinstance(x, torch.nn.Module) else fields


def random_numbers():
    "Where the random generators are."
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return dict(python=str(random.getstate()), numpy=str([x if isinstance(x, (int, float, str)) else x.tolist() for x in np.random.get_state()]),
                torch=torch.get_rng_state(), cuda=cuda)


def _of_map(hm): return {k: [Same(s) for s in v] if k == 'sites' else _value(v) for k, v in vars(hm).items()}


def of_family(family):
    "All that a family of sizes holds."
    factors = {k: _value(part if isinstance(part, dict) else vars(part)) for k, part in family.factors.items()}
    return _value({k: v for k, v in vars(family).items() if k != 'factors'}) | dict(factors=factors)


def _of_state(state):
    if state is None: return None
    res = {k: Same(getattr(state, k)) for k in ('config', 'memory', 'agency', 'family')}
    res['sizes'] = None if state.family is None else of_family(state.family)
    maps = {f'{name}/{kind}': _of_map(getattr(sites, kind)) for name, sites in (('built', state.built), ('now', state.now))
            for kind in ('heads', 'channels') if getattr(sites, kind) is not None}
    channels = None if state.plan.channels is None else _value(vars(state.plan.channels))
    plan = _value({k: v for k, v in vars(state.plan).items() if k != 'channels'})
    res |= dict(maps=maps, one_map=state.built.heads is state.now.heads, plan=plan, channels=channels)
    return res | dict(stash=_value(state.stash), grown=_value(state.grown), repairs=_value(vars(state.repairs)))


@torch.no_grad()
def _logits(m):
    training = [x for x in m.modules() if x.training]
    try: return m.eval()(input_ids=IDS, use_cache=False).logits
    except Exception as e: return f'{type(e).__name__}: {e}'
    finally:
        for x in training: x.training = True


def picture(model, optimizer=None, memory=None, agency=None, *others):
    "Everything that a failed edit must leave as it was. `others`: objects whose attributes belong to it."
    gc.collect(0)
    logits = _logits(model)
    modules = {n: (Same(x), type(x), _attributes(x), _hooks(x)) for n, x in model.named_modules()}
    parameters = {n: _of_parameter(p) for n, p in model.named_parameters()}
    buffers = {n: (b.dtype, b.clone()) for n, b in model.named_buffers()}
    return dict(cls=type(model), modules=modules, parameters=parameters, buffers=buffers, config=_value(model.config.to_dict()),
                state=_of_state(vars(model).get('sentinel')), optimizer=_of_optimizer(optimizer), memory=_of_memory(memory),
                agency=_of_agency(agency), others=[_of_other(x) for x in others], logits=logits)


def _same_tensor(a, b):
    if a.dtype != b.dtype or a.shape != b.shape: return False
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)


def differences(a, b, at=''):
    "Where two pictures differ, as paths."
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor): return [] if _same_tensor(a, b) else [at]
    if type(a) is not type(b): return [f'{at}: {type(a).__name__} is now {type(b).__name__}']
    if dataclasses.is_dataclass(a) and not isinstance(a, type): return differences(vars(a), vars(b), at)
    if isinstance(a, dict):
        if list(a) != list(b): return [f'{at}: {[k for k in a if k not in b]} gone, {[k for k in b if k not in a]} new, of {len(a)} in order']
        return list(itertools.chain(*(differences(a[k], b[k], f'{at}/{k}') for k in a)))
    if isinstance(a, (list, tuple)):
        if len(a) != len(b): return [f'{at}: {len(a)} are now {len(b)}']
        return list(itertools.chain(*(differences(x, y, f'{at}/{i}') for i, (x, y) in enumerate(zip(a, b)))))
    return [] if a is b or a == b else [f'{at}: {str(a)[:40]} is now {str(b)[:40]}']


def attempt(f, fault):
    "Run `f` with a fault. Returns the exception that came out, if any."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with fault: f()
    except BaseException as e:
        if fault.fired is None: raise
        return type(e), str(e)
    finally: torch.set_grad_enabled(True)     # `no_grad` itself can be broken off where it ends

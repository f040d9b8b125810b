"""Each notebook is one test: its cells run in order in a process of their own, through `nbdev.test.test_nb`.

Cells marked with a flag of `tst_flags` (settings.ini) are left out; NB_FLAGS="slow net" brings those back.
SENTINEL_RERUN=1 brings the slow ones back too, and lets them replace stored results (sentinel_ai.testing).
`#| eval: false` cells never run. A notebook stops after NB_TIMEOUT seconds (900).
"""
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

ROOT, LIB = Path(__file__).resolve().parent, 'sentinel_ai'
for k in 'HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_DATASETS_OFFLINE'.split(): os.environ.setdefault(k, '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('MPLBACKEND', 'Agg')

# pytest has just put this folder first on sys.path. Without that entry the installed package is the one imported;
# the checkout serves only when nothing is installed.
if sys.path and Path(sys.path[0] or '.').resolve() == ROOT: sys.path.pop(0)
CHECKOUT = importlib.util.find_spec(LIB) is None
if CHECKOUT: sys.path.append(str(ROOT))
INSTALLED = Path(importlib.util.find_spec(LIB).origin).resolve().parent


def pytest_report_header(config): return f'{LIB}: {INSTALLED}'


def pytest_sessionstart(session):
    "An installed copy that is older than the checkout would be tested in its place: stop instead."
    def src(d): return {f.name: f.read_bytes() for f in d.glob('*.py')}
    a, b = src(INSTALLED), src(ROOT/LIB)
    if diff := sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)):
        raise pytest.UsageError(f"the installed {LIB} in {INSTALLED.parent} is not this checkout's "
                                f"({', '.join(diff)} differ): run `rm -rf build; pip install .` (or `-e .`)")


def pytest_collect_file(file_path, parent):
    "Notebooks, but none whose file or folder starts with `_` or `.`, nor those beside a `.notest` file."
    parts = file_path.relative_to(ROOT).parts if file_path.is_relative_to(ROOT) else ()
    if file_path.suffix == '.ipynb' and parts and not any(p[0] in '_.' for p in parts):
        if not (file_path.parent/'.notest').exists(): return Notebook.from_parent(parent, path=file_path)


class Notebook(pytest.File):
    def collect(self): yield NotebookTest.from_parent(self, name=self.path.stem)


class CellError(Exception): pass


class NotebookTest(pytest.Item):
    def runtest(self):
        from nbdev.config import get_config
        skip = get_config(path=ROOT).tst_flags.split()
        timeout = float(os.environ.get('NB_TIMEOUT', 900))
        with tempfile.TemporaryDirectory() as d:
            force, base = os.environ.get('NB_FLAGS', '').split(), str(ROOT) if CHECKOUT else None
            if os.environ.get('SENTINEL_RERUN') == '1': force.append('slow')
            out, log = Path(d)/'res.json', Path(d)/'log'
            p = FORKS.Process(target=exec, args=(CHILD, dict(args=(str(self.path), skip, force, base, str(out), str(log)))))
            p.start()
            p.join(timeout)
            end = f'the process ended with code {p.exitcode} in'
            if p.is_alive():
                end = f'still running after NB_TIMEOUT={timeout:.0f} seconds:'
                os.killpg(p.pid, signal.SIGKILL)
                p.join()
            err = log.read_text(errors='replace') if log.exists() else ''
            res = json.loads(out.read_text()) if out.exists() else dict(passed=False, failed='', at='its start')
        sys.stderr.write(err)
        if not res['passed']: raise CellError(res['failed'] or f"{end} {res['at']}")
        self.user_properties.append(('cells', res['ran']))
        why = f"no cell ran: {res['code']} code cells, each marked {'/'.join(skip)} or `eval: false`"
        if not res['ran']: raise pytest.skip.Exception(why, _use_item_location=True)

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if isinstance(excinfo.value, CellError) else super().repr_failure(excinfo)

    def reportinfo(self): return self.path, 0, f'{self.path.relative_to(ROOT)}'


# Importing torch and transformers takes some ten seconds: one server does it, and each notebook runs in a fork of that.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['torch', 'transformers.trainer', 'datasets', 'matplotlib.pyplot', 'nbdev.test', f'{LIB}.train',
                              'tests.preloaded'])

# What the notebook's own process does: run test_nb, count the cells that ran, keep the one that failed.
CHILD = r'''
import json, os, re, sys
from pathlib import Path
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
fn, skip, force, base, out, log = args
os.setsid()                                 # so that all it starts can be stopped with it
os.chdir(Path(fn).parent)
sys.argv, sys.path[:0] = [''], ['']
for fd, f in ((0, os.devnull), (1, log), (2, log)): os.dup2(os.open(f, os.O_RDWR|os.O_CREAT|os.O_APPEND), fd)

def is_code(c): return c.cell_type == 'code' and re.search(r'^\s*[^#\s]', c.source, re.M)

code = sum(bool(is_code(c)) for c in read_nb(fn).cells)
res, orig = dict(passed=False, ran=0, failed='', at='its start', code=code), CaptureShell.cell

def save(): Path(out).write_text(json.dumps(res))

def cell(self, cell, *args, **kw):
    res['at'] = f'cell {cell.idx_ + 1} of {fn}\n\n{cell.source}'
    save()
    orig(self, cell, *args, **kw)
    res['ran'] += bool(is_code(cell))
    if self.exc:
        outs = cell.get('outputs') or []
        streams = ''.join(''.join(o.get('text', [])) for o in outs)
        tb = '' if type(self.exc).__name__ in streams else ''.join(''.join(o.get('traceback', [])) for o in outs)
        res['failed'] = re.sub(r'\x1b\[[0-9;]*m', '', f"{res['at']}\n\n{streams}{tb}")
CaptureShell.cell = cell

from nbdev.test import test_nb
try: res['passed'] = test_nb(Path(fn), skip_flags=skip, force_flags=force, showerr=False, basepath=base)[0]
finally: save()
'''

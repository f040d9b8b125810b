"""What notebooks promise to someone who presses "Run All" in Jupyter, which knows no flags, in a plain install."""
import ast
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent/'nbs'
PAGES = sorted(path.relative_to(NBS).as_posix() for path in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts)
FLAGS = r'^#\| *(slow|gpu|net|eval: *false)\b'
INSTALL = "'google.colab' in str(get_ipython())"  # commands of a shell, in Colab only
WRITES = r'write_text|write_bytes|os\.replace|\.replace\(RESULTS|json\.dump\(|copyfile|\.save\('
SHIPPED = r'\b(RESULTS|PATH|SHIPPED)\b|benchmarks/results|sentinel_ai/models'


def code(page):
    "Code cells: id and source."
    cells = json.loads((NBS/page).read_text(encoding='utf-8'))['cells']
    return [(cell['id'], ''.join(cell['source'])) for cell in cells if cell['cell_type'] == 'code']


def figures(page):
    "Code cells whose stored output is a picture: id and the text that stands for it."
    for cell in json.loads((NBS/page).read_text(encoding='utf-8'))['cells']:
        kinds = [kind for output in cell.get('outputs', []) for kind in output.get('data', {})]
        if not any(kind.startswith('image/') for kind in kinds): continue
        alt = re.search(r'^#\| fig-alt: "(.*)"$', ''.join(cell['source']), re.M)
        yield cell['id'], alt[1] if alt else ''


def parsed(source):
    "None for a cell with commands of a shell."
    try: return ast.parse(source)
    except SyntaxError: return None


def calls(tree, *names):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in names]


def is_harmless(statement):
    "An import, a constant, or something that is done only if it was asked for."
    if isinstance(statement, (ast.Import, ast.ImportFrom)): return True
    if isinstance(statement, ast.Assign): return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.If) and not statement.orelse and bool(calls(statement.test, 'rerun'))


def variables(tree):
    "Environment variables that are read by `os.environ[...]`, as far as their names are written there."
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
             and ast.unparse(node.value) == 'os.environ' and isinstance(node.slice, ast.Constant)]
    return {node.slice.value for node in found}


def promised(tree):
    "Variables that are there: `rerun` was told of them, or they were just set."
    needs = [ast.literal_eval(call.args[1]) for call in calls(tree, 'rerun') if len(call.args) > 1]
    stores = [node.slice.value for node in ast.walk(tree) if isinstance(node, ast.Subscript)
              and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == 'os.environ' and isinstance(node.slice, ast.Constant)]
    return {*' '.join(needs).split(), *stores}


@pytest.mark.parametrize('page', PAGES)
def test_long_cells_ask_first(page):
    "Jupyter runs cells with a flag too: what is in them waits for `rerun`, which says what it would do."
    for name, source in code(page):
        if not re.search(FLAGS, source, re.M) or INSTALL in source: continue
        tree = parsed(source)
        assert tree is not None, f'{page} {name}'
        bad = [ast.unparse(statement) for statement in tree.body if not is_harmless(statement)]
        assert not bad, f'{page} {name} runs without being asked:\n{bad[0]}'


@pytest.mark.parametrize('page', [page for page in PAGES if page != '000_testing.ipynb'])
def test_nothing_shipped_is_overwritten(page):
    "A cell that writes where results or models lie asks `rerun` or `may_store`; `store_result` asks by itself."
    for name, source in code(page):
        if re.search(WRITES, source) and re.search(SHIPPED, source):
            assert re.search(r'\b(rerun|may_store)\(', source), f'{page} {name} writes without being asked'


@pytest.mark.parametrize('page', PAGES)
def test_no_variable_is_taken_for_granted(page):
    "An unset environment variable is a sentence and no `KeyError`."
    for name, source in code(page):
        if '#| export' in source or (tree := parsed(source)) is None: continue
        missing = {v for v in variables(tree) - promised(tree) if f"'{v}' in os.environ" not in source}
        assert not missing, f'{page} {name} reads {sorted(missing)} of os.environ, set or not'


@pytest.mark.parametrize('page', [page for page in PAGES if '/' in page or not page[0].isdigit()])
def test_no_page_needs_nbdev(page):
    "Only the reference notebooks export code."
    assert not [name for name, source in code(page) if 'nbdev_export' in source]


@pytest.mark.parametrize('page', PAGES)
def test_each_figure_is_said_in_words(page):
    "Who doesn't see a figure reads or hears `#| fig-alt: \"…\"`: what it shows, in a sentence or two."
    for name, alt in figures(page):
        assert len(alt.split()) > 5, f'{page} {name}: say what the figure shows with #| fig-alt: "…"'


@pytest.mark.parametrize('page', [page for page in PAGES if page.startswith('tutorials/')])
def test_code_fits_the_page(page):
    "Longer lines wrap on the site and are cut off in Jupyter."
    for name, source in code(page):
        if re.search(r'^#\| *(hide|echo: *false)\b', source, re.M): continue
        wide = [line for line in source.splitlines() if len(line) > 78 and not line.startswith('#|')]
        assert not wide, f'{page} {name}: more than 78 characters in {wide[0]!r}'

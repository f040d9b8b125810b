"""README.md from nbs/index.ipynb, through nbdev's own processors and without Quarto.

python .ci/readme.py          writes README.md (and the figures of its cells, nbs/images/index-*.png)
python .ci/readme.py --check  writes nothing; exit code 1 where a file differs from what would be written
"""
import os
import posixpath
import re
import sys
from base64 import b64decode
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)

from execnb.nbio import read_nb  # noqa: E402
from nbdev.config import get_config  # noqa: E402
from nbdev.processors import FilterDefaults, add_links  # noqa: E402

cfg = get_config()
HERE = re.escape(cfg.git_url) + f'/(?:blob|tree)/{cfg.branch}/?'
NB, FIGS = cfg.nbs_path/cfg.readme_nb, cfg.nbs_path/'images'
_fence = re.compile(r'(^(?:```|~~~).*?^(?:```|~~~)\s*$|`[^`\n]+`)', re.M|re.S)  # code: left as it is
_link = re.compile(r'(\]\(\s*<?|\b(?:src|href)=["\'])([^)\s"\'>]+)')            # markdown and html


class ReadmeFilter(FilterDefaults):
    "What the docs page goes through, without the links that depend on which packages are installed here"
    def base_procs(self): return [p for p in super().base_procs() if p is not add_links]


def from_root(m):
    "A link relative to nbs/ becomes relative to the top, and so does the full address of a file of this repository"
    pre, href = m.groups()
    if re.match(HERE, href): return pre + (re.sub(HERE, '', href) or '.')
    if re.match(r'[a-z][a-z0-9+.-]*:|#|/', href, re.I): return m[0]
    path, sep, anchor = href.partition('#')
    return pre + posixpath.normpath(posixpath.join('nbs', path)) + sep + anchor


def prose(s):
    "Quarto's dialect to GitHub's"
    if re.search(r'^:::', s, re.M): sys.exit(f"{NB.name}: GitHub has no `:::` blocks; write this cell without:\n\n{s}")
    s = re.sub(r'^```\{mermaid\}', '```mermaid', s, flags=re.M)
    parts = _fence.split(s)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'(\]\([^)\n]*\))\{[^}\n]*\}', r'\1', _link.sub(from_root, parts[i]))
    return ''.join(parts).strip()


def text(x): return x if isinstance(x, str) else ''.join(x)


def code_cell(c, figs):
    "Source and outputs; `figs` collects path → bytes"
    src, opts = c.source, dict(re.findall(r'^#\|\s*([\w-]+)\s*:\s*(.+?)\s*$', c.source, re.M))
    src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
    shell = src.startswith('!')
    if opts.get('echo') != 'false' and src: yield fenced(src.lstrip('!') if shell else src, 'sh' if shell else 'python')
    if opts.get('output') == 'false': return
    for o in c.get('outputs') or []:
        if o['output_type'] == 'error': sys.exit(f'{NB.name}: stored error in\n\n{c.source}')
        d = o.get('data', {})
        if o['output_type'] == 'stream' and o['name'] == 'stdout': yield fenced(text(o['text']))
        elif 'image/png' in d:
            f = FIGS/f'index-{len(figs)+1}.png'
            figs[f] = b64decode(text(d['image/png']))
            yield f"![{opts.get('fig-alt', opts.get('fig-cap', '')).strip(chr(34))}]({f.relative_to(ROOT).as_posix()})"
        elif 'text/markdown' in d: yield prose(text(d['text/markdown']))
        elif 'text/html' in d: yield _link.sub(from_root, text(d['text/html']).strip())
        elif 'text/plain' in d: yield fenced(text(d['text/plain']))


def fenced(s, lang='text'): return f'```{lang}\n' + s.strip('\n') + '\n```' if s.strip() else ''


def make():
    "README.md's text and its figures"
    nb, figs, res = read_nb(NB), {}, []
    ReadmeFilter()(nb)
    fm = nb.frontmatter_
    for c in nb.cells:
        if c.cell_type == 'raw': res += [f"# {fm['title']}", f"> {fm['description']}" if 'description' in fm else '']
        elif c.cell_type == 'markdown': res.append(prose(c.source))
        else: res += code_cell(c, figs)
    return '\n\n'.join(r for r in res if r) + '\n', figs


def main():
    txt, figs = make()
    want = {ROOT/'README.md': txt.encode(), **figs}
    stale = [f for f in FIGS.glob('index-*.png') if f not in figs]
    missing = [h for _, h in _link.findall(_fence.sub('', txt)) if not re.match(r'[a-z][a-z0-9+.-]*:|#|/', h, re.I)
               and not (ROOT/h.partition('#')[0]).exists() and ROOT/h not in figs]
    if missing: print(f'README.md links to files that are not there: {missing}')
    if '--check' in sys.argv:
        bad = [f for f, b in want.items() if not f.exists() or f.read_bytes() != b] + stale
        if missing: sys.exit(1)
        if bad: sys.exit(f"not what {NB.name} gives: {', '.join(f.name for f in bad)}; run `python .ci/readme.py`")
        return print(f'README.md and {len(figs)} figures are what {NB.name} gives')
    FIGS.mkdir(exist_ok=True)
    for f, b in want.items(): f.write_bytes(b)
    for f in stale: f.unlink()
    print(f'wrote README.md, {len(txt)} characters, {len(figs)} figures')


if __name__ == '__main__': main()

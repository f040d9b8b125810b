"""Stage the site into _proc/: what nbdev makes of the notebooks, and what it leaves to do.

- library.md (each module with its public names) and changelog.md are written from the staged pages and CHANGELOG.md.
- Addresses of this site become relative, so that a copy without a network, or a fork, links to itself.
- HTML outputs become raw HTML: for a `text/html` output Quarto loads require.js and jQuery from the network.
- _proc/_extra/ holds what is copied beside the rendered pages: llms.txt and each page as markdown (page.html.md).
"""
import os
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
for k in 'HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_DATASETS_OFFLINE'.split(): os.environ.setdefault(k, '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

import yaml  # noqa: E402
from execnb.nbio import mk_cell, read_nb, write_nb  # noqa: E402
from nbdev.config import get_config  # noqa: E402
from nbdev.doclinks import NbdevLookup  # noqa: E402
from nbdev.quarto import refresh_quarto_yml  # noqa: E402
from nbdev.serve import proc_nbs  # noqa: E402

cfg = get_config()
SITE, PROC = cfg.doc_host + cfg.doc_baseurl + '/', ROOT/'_proc'
_front = re.compile(r'---\n(.*?)\n---\s*', re.S)
_here = re.compile(r'(\]\(\s*<?|\b(?:href|src)=["\'])' + re.escape(SITE))
_block = re.compile(r'^```python\n.*?^```$', re.M|re.S)
_shown = re.compile(r'^### +(?:<[^>]*>)?([\w.]+)', re.M)


def text(x): return x if isinstance(x, str) else ''.join(x)


def slug(s):
    "Pandoc's auto_identifiers: what a heading's address is"
    s = re.sub(r'!?\[([^]]*)\]\([^)]*\)', r'\1', s)
    s = re.sub(r'[^\w\s.-]', '', re.sub(r'[*`]', '', s)).lower()
    s = re.sub(r'\s+', '-', s.strip())
    return re.sub(r'^[^a-z]+', '', s) or 'section'


class Source:
    "One staged page, notebook or markdown: front matter, cells, and its address on the site"
    def __init__(self, path):
        self.path, self.src = path, path.relative_to(PROC).as_posix()
        if path.suffix == '.ipynb': self.nb = read_nb(path)
        else: self.nb = dict(cells=[mk_cell(s, t) for s, t in zip(split(path.read_text()), ('raw', 'markdown'))])
        self.cells = self.nb['cells']
        raw = next((c.source for c in self.cells if c.cell_type == 'raw'), '')
        self.fm = yaml.safe_load(_front.match(raw.strip() + '\n')[1]) if raw.strip() else {}
        self.html = posixpath.join(posixpath.dirname(self.src), self.fm.get('output-file', path.stem + '.html'))
        self.title, self.description = (str(self.fm.get(k) or '') for k in ('title', 'description'))

    def to(self, html): return posixpath.relpath(html, posixpath.dirname(self.html) or '.')

    def relative(self, s):
        "Addresses of this site from here; where nbdev has put a link into the text of a link, the author's stays"
        s = re.sub(r'\[\[(`[^`]+`)\]\([^)]*\)\]\(', r'[\1](', s)
        return re.sub(_here.pattern + r'([^)\s"\'>#]*)', lambda m: m[1] + self.to(m[2] or 'index.html'), s)

    def mend(self, by):
        "Relative addresses, and raw HTML with addresses of pages in place of HTML outputs"
        for c in self.cells:
            if c.cell_type == 'markdown': c.source = self.relative(c.source)
            for o in c.get('outputs') or []:
                d = o.get('data', {})
                if 'text/html' in d and 'text/markdown' not in d:
                    d['text/markdown'] = '\n```{=html}\n' + to_html(text(d.pop('text/html')).strip(), self, by) + '\n```\n'
                if 'text/markdown' in d:
                    d.pop('text/html', None)
                    s = _block.sub(lambda m: re.sub(r'\[`([^`]+)`\]\([^)]*\)', r'\1', m[0]), text(d['text/markdown']))  # no links in code
                    d['text/markdown'] = re.sub(r'\A\s*# (?=\S)', '#### ', self.relative(s))                         # one h1 a page
        write_nb(self.nb, self.path)

    def names(self):
        "Public names that the page documents, in order"
        outs = [text(o.get('data', {}).get('text/markdown', '')) for c in self.cells if 'show_doc(' in c.source for o in c.get('outputs') or []]
        return list(dict.fromkeys(n for s in outs for n in _shown.findall(s)))

    def markdown(self):
        "The page as plain markdown: prose, code, printed output and documentation, without pictures"
        yield f'# {self.title}\n\n> {self.description}'
        for c in self.cells:
            if c.cell_type == 'markdown' and not c.source.startswith('<!-- WARNING'): yield c.source.strip()
            elif c.cell_type == 'code':
                if not re.search(r'^#\|\s*echo:\s*false', c.source, re.M): yield fenced(re.sub(r'^#\|.*\n?', '', c.source, flags=re.M), 'python')
                for o in c.get('outputs') or []:
                    d, plain = o.get('data', {}), text(o.get('text') or o.get('data', {}).get('text/plain', ''))
                    md = re.sub(r'data:[^\s)"\']+|\{target=.*?\}', '', text(d.get('text/markdown', ''))).strip()
                    if md and not md.startswith('```{=html}'): yield md
                    elif 'image/png' not in d and not plain.startswith('<'): yield fenced(plain)


def split(s): return (m[0], s[m.end():]) if (m := _front.match(s)) else ('', s)


def fenced(s, lang=''): return f'```{lang}\n' + s.strip('\n') + '\n```' if s.strip() else ''


def menu(o, depth=0):
    "A sidebar or navbar as (depth, text or None, href or None)"
    for e in o:
        if isinstance(e, str): yield depth, None, e
        else:
            yield depth, e.get('text') or e.get('section'), e.get('href') or e.get('file')
            yield from menu(e.get('contents') or e.get('menu') or [], depth + 1)


def website():
    "Quarto's `website` settings, from the staged files"
    w = [yaml.safe_load((PROC/f).read_text())['website'] for f in ('_quarto.yml', 'nbdev.yml', 'sidebar.yml')]
    return w[0] | w[1] | dict(sidebar=w[0]['sidebar'] | w[2]['sidebar'])


def page(name, title, description, body):
    fm = yaml.safe_dump(dict(title=title, description=description, **{'repo-actions': False}), allow_unicode=True, width=1000)
    (PROC/name).write_text(f'---\n{fm}---\n\n{body.strip()}\n')


def sources():
    found = [p for p in sorted(PROC.rglob('*')) if p.suffix in ('.ipynb', '.md') and not any(x[0] in '_.' for x in p.relative_to(PROC).parts)]
    return [Source(p) for p in found]


def library(pages, side):
    "Each module with its promise and its public names"
    by, inside = {p.src: p for p in pages}, False
    res = [f'Names in bold come with `from {cfg.lib_path.name} import …`, the others with their module.']
    top = set(re.findall(r'\w+', re.sub('#.*', '', (cfg.lib_path/'__init__.py').read_text())))
    for depth, label, href in menu(side):
        if depth == 0: inside = label == 'Library'
        elif inside and href is None: res.append(f'## {label}')
        elif inside and href in by:
            p = by[href]
            links = {n: f'[`{n}`]({href}#{slug(n)})' for n in p.names() if '.' not in n and n[0] != '_'}
            names = ' · '.join([f'**{a}**' for n, a in links.items() if n in top] + [a for n, a in links.items() if n not in top])
            res.append(f'[**{p.title}**]({href}): {p.description}\n\n{names}')
    return '\n\n'.join(res)


def llms(pages, site):
    "llms.txt (llmstxt.org): sections of the sidebar, each page with its promise"
    by = {p.src: p for p in pages}
    out = [f"# {site['title']}\n\n> {by['index.ipynb'].description}\n"]
    out.append('Each link leads to a page of the documentation as markdown; the same address without `.md` is the web page.\n\n## Start')
    for depth, label, href in menu(site['sidebar']['contents']):
        if depth == 0 and label not in ('Overview', 'Get started'): out.append(f"\n## {label}")
        if p := by.get(href): out.append(f'- [{label or p.title}]({SITE}{p.html}.md): {p.description}')
    return '\n'.join(out) + '\n'


def to_html(s, p, by, end=''):
    "Links to notebooks and markdown pages lead to the rendered pages, as Quarto does it"
    def sub(m):
        dest = by.get(posixpath.normpath(posixpath.join(posixpath.dirname(p.src), m[2])))
        return m[1] + (p.to(dest.html) + end if dest else m[2])
    return re.sub(r'(\]\(|\bhref=")([^)\s"#:]+\.(?:ipynb|md))(?=[)"#])', sub, s)


def stage():
    "Fill _proc/; returns its pages"
    if cfg.lib_path.name not in NbdevLookup().entries:
        sys.exit(f'{cfg.lib_path.name} is not installed here, so doc links would be missing: `pip install .` first')
    refresh_quarto_yml()
    proc_nbs(force=True, n_workers=min(2, os.cpu_count() or 1))
    pages = sources()
    by = {p.src: p for p in pages}
    for p in pages: p.mend(by)
    site = website()
    page('library.md', 'Library', 'Every module and every public name, in the order in which they build on each other.',
         library(pages, site['sidebar']['contents']))
    page('changelog.md', 'Changelog', 'What each version brought.', split_title((ROOT/'CHANGELOG.md').read_text()))
    pages = sources()
    by = {p.src: p for p in pages}
    extra = {'llms.txt': llms(pages, site)} | {p.html + '.md': to_html('\n\n'.join(s for s in p.markdown() if s), p, by, '.md') + '\n' for p in pages}
    for f, s in extra.items():
        (PROC/'_extra'/f).parent.mkdir(parents=True, exist_ok=True)
        (PROC/'_extra'/f).write_text(s)
    return pages


def split_title(s): return re.sub(r'^# .*\n', '', s)

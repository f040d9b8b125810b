"""Stage the docs into _proc/ with nbdev's Python functions, and check the staged pages. Quarto isn't needed.

A page fails for: a sidebar entry without a notebook or a notebook that is in no sidebar; a link, image or anchor that
leads nowhere (also links to this site and to source lines); a show_doc without output; a stored error; a `:::` that
isn't closed; two pages of the same address. Afterwards `cd _proc && quarto render`
makes the site in _proc/_docs.
"""
import os
import posixpath
import re
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
for k in 'HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_DATASETS_OFFLINE'.split(): os.environ.setdefault(k, '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

import yaml  # noqa: E402
from execnb.nbio import read_nb  # noqa: E402
from nbdev.config import get_config  # noqa: E402
from nbdev.doclinks import NbdevLookup  # noqa: E402
from nbdev.frontmatter import _fm2dict  # noqa: E402
from nbdev.quarto import refresh_quarto_yml  # noqa: E402
from nbdev.serve import proc_nbs  # noqa: E402

cfg = get_config()
SITE = cfg.doc_host + cfg.doc_baseurl + '/'
FILES = re.compile(re.escape(cfg.git_url) + f'/(?:blob|tree)/{cfg.branch}/?')
_code = re.compile(r'^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\1[`~]*\s*$', re.M|re.S)
_inline = re.compile(r'(`+)(?!`).+?(?<!`)\1(?!`)', re.S)
_math = re.compile(r'\$\$.+?\$\$|(?<![\\\w$])\$(?=\S)[^$\n]+(?<=\S)\$', re.S)
_md_links = [re.compile(r'\]\(\s*<?([^)\s>]+)'), re.compile(r'^\s{0,3}\[[^]^][^]]*\]:\s*(\S+)', re.M)]
_html_links = re.compile(r'<[a-zA-Z][^>]*?\s(?:href|src)=["\']([^"\']+)')
_ids = re.compile(r'<[a-zA-Z][^>]*?\s(?:id|name)=["\']([^"\']+)')
_attr = re.compile(r'\s*\{([^}\n]*)\}\s*$')


def text(x): return x if isinstance(x, str) else ''.join(x)


def slug(s):
    "Pandoc's auto_identifiers: what a heading's address is"
    s = re.sub(r'!?\[([^]]*)\]\([^)]*\)', r'\1', s)
    s = re.sub(r'[^\w\s.-]', '', re.sub(r'[*`]', '', s)).lower()
    s = re.sub(r'\s+', '-', s.strip())
    return re.sub(r'^[^a-z]+', '', s) or 'section'


class Page:
    "One staged notebook: its address, its anchors, its links, and what is wrong with it"
    def __init__(self, path, proc):
        self.src, self.bad, self.links, self.anchors = path.relative_to(proc).as_posix(), [], [], set()
        nb, md, html, self.seen = read_nb(path), [], [], Counter()
        self.fm = next((_fm2dict(c.source) for c in nb.cells if c.cell_type == 'raw'), {})
        self.html = posixpath.join(posixpath.dirname(self.src), self.fm.get('output-file', path.stem + '.html'))
        for k in 'title', 'description':
            if not self.fm.get(k): self.bad.append(f'no {k}: a page starts with `# title`, blank line, `> description`')
        for c in nb.cells:
            if c.cell_type == 'markdown': md.append(c.source)
            elif c.cell_type == 'code': self.outputs(c, md, html)
        for s in md: self.markdown(s)
        self.divs(md)
        for s in html: self.html_(s)
        self.docs = sum(c.cell_type == 'code' and 'show_doc(' in c.source for c in nb.cells)

    def outputs(self, c, md, html):
        outs = c.get('outputs') or []
        if any(o['output_type'] == 'error' for o in outs): self.bad.append(f'stored error in cell: {c.source[:80]!r}')
        datas = [o.get('data', {}) for o in outs]
        shown = any(text(d.get('text/markdown', '')).strip() for d in datas)
        if re.search(r'^show_doc\(', c.source, re.M) and not shown:
            self.bad.append(f'no output from {c.source.splitlines()[-1]!r}')
        for d in datas:
            if 'text/markdown' in d: md.append(text(d['text/markdown']))
            elif 'text/html' in d: html.append(text(d['text/html']))

    def markdown(self, s):
        s = _code.sub('', s)
        for h in re.findall(r'^ {0,3}#{1,6}\s+(.+?)\s*#*\s*$', s, re.M):
            at = _attr.search(h)
            ident = at and re.search(r'#([\w.:-]+)', at[1])
            self.add(ident[1] if ident else slug(_attr.sub('', h)), dedup=not ident)
        self.anchors |= set(re.findall(r'\{[^}\n]*?#([\w.:-]+)[^}\n]*\}', s))
        s = _math.sub('', _inline.sub('', s))
        for r in _md_links: self.links += r.findall(s)
        self.html_(s)

    def html_(self, s):
        self.anchors |= set(_ids.findall(s))
        self.links += _html_links.findall(s)

    def add(self, a, dedup):
        self.seen[a] += 1
        self.anchors.add(f'{a}-{self.seen[a]-1}' if dedup and self.seen[a] > 1 else a)

    def divs(self, md):
        "`:::` blocks may open in one cell and close in another"
        depth = 0
        for s in md:
            for ln in re.findall(r'^\s{0,3}:{3,}.*$', _code.sub('', s), re.M):
                depth += 1 if ln.strip().strip(':').strip() else -1
                if depth < 0: return self.bad.append('a `:::` closes a block that was not opened')
        if depth: self.bad.append(f'{depth} `:::` blocks are not closed')


def entries(o):
    "Pages named anywhere in a sidebar or navbar"
    if isinstance(o, str): return [o]
    if isinstance(o, list): return [x for y in o for x in entries(y)]
    return [x for k in ('contents', 'left', 'right', 'menu', 'tools', 'href', 'file') if k in o for x in entries(o[k])]


def check_link(href, page, pages, proc):
    "What is wrong with this link, or None"
    href = unquote(href)
    if m := FILES.match(href):
        path, _, line = href[m.end():].partition('#L')
        if not (ROOT/path).exists(): return 'no such file'
        if line and not (line.isdigit() and 0 < int(line) <= len((ROOT/path).read_text().splitlines())):
            return 'no such line'
        return
    if href.startswith(SITE): href, base = href[len(SITE):] or 'index.html', ''
    elif re.match(r'[a-z][a-z0-9+.-]*:|//', href, re.I): return
    else: base = posixpath.dirname(page.src)
    path, _, anchor = href.partition('#')
    path = path.partition('?')[0]
    if not path: dest = page.src
    elif path.startswith('/'): dest = posixpath.normpath(path.lstrip('/'))
    else: dest = posixpath.normpath(posixpath.join(base, path))
    target = pages.get(dest)
    if target: return f'no such anchor in {target.src}' if anchor and anchor not in target.anchors else None
    if dest.startswith('..'): return 'leads out of the site: give the full address'
    if not (proc/dest).is_file(): return 'no such file or page'


def main():
    entry = NbdevLookup().entries
    if cfg.lib_path.name not in entry:
        sys.exit(f'{cfg.lib_path.name} is not installed here, so doc links would be missing: `pip install .` first')
    refresh_quarto_yml()
    proc = proc_nbs(force=True, n_workers=min(2, os.cpu_count() or 1))
    staged = [p for p in sorted(proc.rglob('*.ipynb')) if not any(x[0] in '_.' for x in p.relative_to(proc).parts)]
    pages = [Page(p, proc) for p in staged]
    by_path = {p.src: p for p in pages} | {p.html: p for p in pages}
    bad = [(p.src, b) for p in pages for b in p.bad]
    bad += [(k, 'two notebooks have this address') for k, n in Counter(p.html for p in pages).items() if n > 1]

    site = [yaml.safe_load((proc/f).read_text())['website'] for f in ('_quarto.yml', 'sidebar.yml')]
    menu = [e for w in site for k in ('sidebar', 'navbar') if k in w for e in entries(w[k])]
    menu = [e for e in menu if '://' not in e]
    bad += [('sidebar', f'{e} does not exist') for e in menu if e not in by_path and not (proc/e).is_file()]
    bad += [(p.src, 'is not in the sidebar (nbs/sidebar.yml)') for p in pages if p.src not in menu]
    for p in pages: bad += [(p.src, f'{h}: {why}') for h in p.links if (why := check_link(h, p, by_path, proc))]

    for where, what in dict.fromkeys(bad): print(f'{where}: {what}')
    print(f'{len(pages)} pages, {sum(p.docs for p in pages)} show_docs, {sum(len(p.links) for p in pages)} links and '
          f'images, {sum(len(p.anchors) for p in pages)} anchors; {len(set(bad))} problems')
    sys.exit(bool(bad) or not pages)


if __name__ == '__main__': main()

"""Stage the docs into _proc/ (stage.py) and check the staged pages. Quarto isn't needed.

A page fails for: a sidebar entry without a page or a page that is in no sidebar; a link, image or anchor that leads
nowhere (also links to this site, to source lines and to Colab); an address that is neither relative nor http(s); a
picture in prose without an alt text; a show_doc without output; a stored error; a `:::` that isn't closed; two pages of
the same address; a tutorial that its listing page doesn't show as it is. Afterwards `cd _proc && quarto render` makes
the site in _proc/_docs, `python .ci/preview.py` something like it in _proc/_preview, and `python .ci/browse.py FOLDER`
opens either in Chromium.
"""
import posixpath
import re
import sys
from collections import Counter
from html import unescape
from urllib.parse import unquote

import yaml
from stage import PROC, ROOT, SITE, cfg, menu, slug, stage, text, website

FILES = re.compile(re.escape(cfg.git_url) + f'/(?:blob|tree)/{cfg.branch}/?')
COLAB = 'https://colab.research.google.com/github/' + cfg.git_url.partition('github.com/')[2] + f'/blob/{cfg.branch}/'
_code = re.compile(r'^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\1[`~]*\s*$', re.M|re.S)
_raw = re.compile(r'^```\{=html\}\n(.*?)^```$', re.M|re.S)
_inline = re.compile(r'(`+)(?!`).+?(?<!`)\1(?!`)', re.S)
_math = re.compile(r'\$\$.+?\$\$|(?<![\\\w$])\$(?=\S)[^$\n]+(?<=\S)\$', re.S)
_md_links = [re.compile(r'\]\(\s*<?([^)\s>]+)'), re.compile(r'^\s{0,3}\[[^]^][^]]*\]:\s*(\S+)', re.M)]
_html_links = re.compile(r'<[a-zA-Z][^>]*?\s(?:href|src)=["\']([^"\']+)')
_ids = re.compile(r'<[a-zA-Z][^>]*?\s(?:id|name)=["\']([^"\']+)')
_attr = re.compile(r'\s*\{([^}\n]*)\}\s*$')
_no_alt = re.compile(r'!\[\s*\]\(([^)\s]{1,60})|(<img\b(?![^>]*\balt=["\'][^"\'])[^>]{0,60})')


class Page:
    "One staged notebook: its address, its anchors, its links, and what is wrong with it"
    def __init__(self, source):
        self.src, self.html, self.title, self.description = source.src, source.html, source.title, source.description
        self.bad, self.links, self.anchors, self.seen, md, html = [], [], set(), Counter(), [], []
        for k in 'title', 'description':
            if not getattr(self, k): self.bad.append(f'no {k}: a page starts with `# title`, blank line, `> description`')
        for c in source.cells:
            if c.cell_type == 'markdown':
                md.append(c.source)
                self.bad += [f'no alt text: {a or b}' for a, b in _no_alt.findall(_inline.sub('', _code.sub('', c.source)))]
            elif c.cell_type == 'code': self.outputs(c, md, html)
        for s in md: self.markdown(s)
        self.divs(md)
        for s in html: self.html_(s)
        self.text = ''.join(html)
        self.docs = sum(c.cell_type == 'code' and 'show_doc(' in c.source for c in source.cells)
        if self.docs and not any(FILES.match(h) for h in self.links): self.bad.append('no source links: is sentinel_ai/_modidx.py whole?')

    def outputs(self, c, md, html):
        outs = c.get('outputs') or []
        if any(o['output_type'] == 'error' for o in outs): self.bad.append(f'stored error in cell: {c.source[:80]!r}')
        datas = [o.get('data', {}) for o in outs]
        shown = any(text(d.get('text/markdown', '')).strip() for d in datas)
        if re.search(r'^show_doc\(', c.source, re.M) and not shown:
            self.bad.append(f'no output from {c.source.splitlines()[-1]!r}')
        for d in datas:
            if 'text/markdown' in d:
                html += _raw.findall(s := text(d['text/markdown']))
                md.append(_raw.sub('', s))

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


def check_link(href, page, pages):
    "What is wrong with this link, or None"
    href = unquote(href)
    if href.startswith(COLAB):
        path = href[len(COLAB):]
        if path != f'{cfg.nbs_path.name}/{page.src}': return f'opens {path} in Colab, not this page'
        return None if (ROOT/path).exists() else 'no such notebook'
    if m := FILES.match(href):
        path, _, line = href[m.end():].partition('#L')
        if not (ROOT/path).exists(): return 'no such file'
        if line and not (line.isdigit() and 0 < int(line) <= len((ROOT/path).read_text().splitlines())):
            return 'no such line'
        return
    if href.startswith(SITE): href, base = href[len(SITE):] or 'index.html', ''
    elif m := re.match(r'([a-z][a-z0-9+.-]*:|//)', href, re.I):
        return None if m[1].lower() in ('http:', 'https:') or href.startswith('data:image/') else 'an address is relative or http(s)'
    else: base = posixpath.dirname(page.src)
    path, _, anchor = href.partition('#')
    path = path.partition('?')[0]
    if not path: dest = page.src
    elif path.startswith('/'): dest = posixpath.normpath(path.lstrip('/'))
    else: dest = posixpath.normpath(posixpath.join(base, path))
    target = pages.get(dest)
    if target: return f'no such anchor in {target.src}' if anchor and anchor not in target.anchors else None
    if dest.startswith('..'): return 'leads out of the site: give the full address'
    if not (PROC/dest).is_file(): return 'no such file or page'


def listing(pages):
    "What the listing page of the tutorials doesn't show as it is"
    top = next((p for p in pages if p.src == 'tutorials/index.ipynb'), None)
    for p in pages if top else ():
        if p.src.startswith('tutorials/') and p is not top:
            if not all(s in unescape(top.text) for s in (p.title, p.description)):
                yield top.src, f'does not show the title and the promise of {p.src}: run it again'


def main():
    pages = [Page(s) for s in stage()]
    by_path = {p.src: p for p in pages} | {p.html: p for p in pages}
    bad = [(p.src, b) for p in pages for b in p.bad]
    bad += [(k, 'two notebooks have this address') for k, n in Counter(p.html for p in pages).items() if n > 1]
    site = website()
    side = [e for _, _, e in menu(site['sidebar']['contents']) if e]
    navs = side + [e for _, _, e in menu(site['navbar']['left']) if e] + [site['favicon'], site['image']]
    bad += [('sidebar, navbar', f'{e} does not exist') for e in navs if '://' not in e and e not in by_path and not (PROC/e).is_file()]
    bad += [(p.src, 'is not in the sidebar (nbs/sidebar.yml)') for p in pages if p.src not in side]
    for p in pages: bad += [(p.src, f'{h}: {why}') for h in p.links if (why := check_link(h, p, by_path))]
    bad += listing(pages)
    cite = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    if (cite['version'], cite['authors'][0]['name']) != (cfg.version, cfg.author):
        bad.append(('CITATION.cff', 'version and author are not those of settings.ini'))

    for where, what in dict.fromkeys(bad): print(f'{where}: {what}')
    print(f'{len(pages)} pages, {sum(p.docs for p in pages)} show_docs, {sum(len(p.links) for p in pages)} links and '
          f'images, {sum(len(p.anchors) for p in pages)} anchors; {len(set(bad))} problems')
    sys.exit(bool(bad) or not pages)


if __name__ == '__main__': main()

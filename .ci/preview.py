"""An offline preview of the staged site: python .ci/docs.py && python .ci/preview.py [page.ipynb …]

Renders the pages of _proc/ into _proc/_preview/ with pandoc (pip's pypandoc_binary), with Quarto's addresses, menus, cell
classes, MathML and styles.css. It is for checks and for reading without a network; it doesn't replace Quarto, whose
themes, search, figures across pages and cross-references it doesn't have.
"""
import posixpath
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

import pypandoc
from stage import PROC, cfg, menu, sources, text, to_html, website

OUT = PROC/'_preview'
PANDOC = pypandoc.get_pandoc_path()
THEME = ("document.body.classList.add((localStorage.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'))"
         " == 'dark' ? 'quarto-dark' : 'quarto-light')")
TOGGLE = "localStorage.theme = document.body.classList.contains('quarto-dark') ? 'light' : 'dark'; location.reload()"


def options(src):
    "A cell's source without its `#|` lines, and what those say"
    opts = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*?)\s*$', src, re.M))
    return re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip('\n'), {k: v.strip('"\'') for k, v in opts.items()}


def fence(s, attrs):
    f = '`'*max([3, *(len(x) + 1 for x in re.findall('`{3,}', s))])
    return f'{f} {{{attrs}}}\n{s}\n{f}\n' if s.strip() else ''


def cell(c, p, figs):
    "Quarto's markdown of a code cell: the code, then each output in its box"
    src, opts = options(c.source)
    code = fence(src, '.python .cell-code') if opts.get('echo') != 'false' else ''
    if opts.get('code-fold') in ('true', 'show') and code:
        tag = '<details open>' if opts['code-fold'] == 'show' else '<details>'
        code = f"```{{=html}}\n{tag}<summary>{opts.get('code-summary', 'Code')}</summary>\n```\n\n{code}\n```{{=html}}\n</details>\n```\n"
    body = [code]
    for o in (c.get('outputs') or []) if opts.get('output') != 'false' else []:
        d = o.get('data', {})
        if 'image/png' in d or 'image/svg+xml' in d:
            kind = 'png' if 'image/png' in d else 'svg'
            f = f'{Path(p.html).stem}_files/figure-html/cell-{len(figs) + 1}.{kind}'
            figs[f] = b64decode(text(d['image/png'])) if kind == 'png' else text(d['image/svg+xml']).encode()
            alt = opts.get('fig-alt', opts.get('fig-cap', '')).replace(']', '')
            cap = f"\n\n{opts['fig-cap']}" if 'fig-cap' in opts else ''
            body.append(f'::: {{.cell-output .cell-output-display}}\n![]({f}){{.figure-img alt="{escape(alt)}"}}\\\n{cap}\n:::\n')
        elif 'text/markdown' in d:
            s = text(d['text/markdown']).strip()
            body.append(s if opts.get('output') == 'asis' else f'::::: {{.cell-output .cell-output-display}}\n{s}\n:::::\n')
        elif o['output_type'] == 'stream': body.append(f"::: {{.cell-output .cell-output-{o['name']}}}\n{fence(text(o['text']), '')}\n:::\n")
        elif 'text/plain' in d: body.append(f"::: {{.cell-output .cell-output-display}}\n{fence(text(d['text/plain']), '')}\n:::\n")
    body = '\n\n'.join(x.strip() for x in body if x.strip())
    return f':::::: {{.cell}}\n{body}\n::::::' if body and opts.get('output') != 'asis' else body


def nav(entries, p, by, flat=True):
    "A menu as HTML: `flat` for the bar at the top, nested lists for the side"
    res = []
    for e in entries:
        [(_, label, href), *below] = list(menu([e]))
        dest = by.get(href)
        if href and not dest and '://' not in href: continue  # .ci/docs.py says so
        url, label = (p.to(dest.html), label or dest.title) if dest else (href, label or href)
        cls = ' class="active"' if dest is p else ''
        link = f'<a{cls} href="{url}">{escape(label)}</a>' if href else escape(label)
        kids = [] if isinstance(e, str) else e.get('contents') or e.get('menu') or []
        if kids:
            inner = nav(kids, p, by, flat)
            here = p.src in (href, *(h for _, _, h in below))
            link = f"<details{' open' if here and not flat else ''}><summary>{link}</summary>{f'<div>{inner}</div>' if flat else inner}</details>"
        res.append(link if flat else f'<li>{link}</li>')
    return ''.join(res) if flat else f"<ul>{''.join(res)}</ul>"


def head(p, site):
    "What a browser, a search engine and a social network want to know"
    title = p.title if p.src == 'index.ipynb' else f"{p.title} – {site['title']}"
    said = p.description.replace('`', '')
    url, card = f"{site['site-url']}/{p.html}", f"{site['site-url']}/{site['image']}"
    meta = ''.join(f'<meta {k}="{n}" content="{escape(v)}">\n' for k, n, v in (
        ('name', 'description', said), ('property', 'og:title', p.title), ('property', 'og:description', said),
        ('property', 'og:url', url), ('property', 'og:image', card), ('name', 'twitter:card', 'summary_large_image')))
    return (f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n{meta}'
            f'<link rel="icon" type="image/svg+xml" href="{p.to(site["favicon"])}">\n'
            f'<link rel="stylesheet" href="{p.to("preview.css")}"><link rel="stylesheet" href="{p.to("styles.css")}">')


def render(p, site, by):
    figs, md = {}, []
    for c in p.cells:
        if c.cell_type == 'raw': md.append(c.source.strip())
        else: md.append(re.sub(r'^```\{(\w+)\}', r'``` {.\1}', c.source, flags=re.M) if c.cell_type == 'markdown' else cell(c, p, figs))
    out = OUT/p.html
    out.parent.mkdir(parents=True, exist_ok=True)
    for f, b in figs.items():
        (out.parent/f).parent.mkdir(parents=True, exist_ok=True)
        (out.parent/f).write_bytes(b)
    cmd = [PANDOC, '-f', 'markdown', '-t', 'html5', '--mathml', '--toc', '--toc-depth=3', '--standalone', '--template', OUT/'_body.html', '--wrap=preserve']
    if p.fm.get('bibliography'): cmd.append('--citeproc')
    r = subprocess.run(cmd, input='\n\n'.join(md), capture_output=True, text=True, cwd=p.path.parent)
    if r.returncode or r.stderr: print(f'{p.src}: {r.stderr.strip()[:500]}')
    toc, _, body = to_html(r.stdout, p, by).partition('<!--BODY-->')
    side = [x for _, _, h in menu(site['sidebar']['contents']) if (x := by.get(h))]
    i = side.index(p) if p in side else -1
    turns = [f'<a href="{p.to(x.html)}">{escape(x.title)}</a>' if x else '<span></span>'
             for x in (side[i-1] if i > 0 else None, side[i+1] if 0 <= i < len(side) - 1 else None)]
    said = re.sub('`(.+?)`', r'<code>\1</code>', escape(p.description))
    edit = '' if p.fm.get('repo-actions') is False else f' <a href="{cfg.git_url}/edit/{cfg.branch}/{site["repo-subdir"]}/{p.src}">Edit this page</a>'
    out.write_text(f"""<!DOCTYPE html>
<html lang="en"><head>{head(p, site)}</head>
<body><script>{THEME}</script>
<nav class="navbar" aria-label="Top"><a class="brand" href="{p.to('index.html')}">{site['title']}</a>{nav(site['navbar']['left'], p, by)}
<button class="theme" onclick="{TOGGLE}">light / dark</button></nav>
<div class="page"><details id="quarto-sidebar" open><summary>Contents</summary>{nav(site['sidebar']['contents'], p, by, flat=False)}</details>
<main id="quarto-document-content"><h1 class="title">{escape(p.title)}</h1><div class="description">{said}</div>
{body}
<div class="page-navigation">{''.join(turns)}</div>
<p class="preview-note">Preview made by .ci/preview.py without Quarto.{edit}</p></main>
<nav id="TOC" aria-label="On this page">{toc}</nav></div>
<script>if (innerWidth <= 760) document.getElementById('quarto-sidebar').open = false</script></body></html>
""")


def main():
    site, pages = website(), sources()
    by = {p.src: p for p in pages}
    if not sys.argv[1:]: shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(exist_ok=True)
    (OUT/'_body.html').write_text('$toc$\n<!--BODY-->\n$body$\n')
    for f in (f for f in PROC.rglob('*') if f.is_file() and not f.relative_to(PROC).parts[0].startswith('_')):
        if f.suffix in ('.png', '.svg', '.jpg', '.css', '.json', '.jsonl', '.bib'): copy(f, OUT/f.relative_to(PROC))
    for f in (PROC/'_extra').rglob('*.*'): copy(f, OUT/f.relative_to(PROC/'_extra'))
    copy(Path(__file__).with_suffix('.css'), OUT/'preview.css')
    todo = [p for p in pages if not sys.argv[1:] or p.src in sys.argv[1:]]
    with ThreadPoolExecutor(2) as ex: list(ex.map(lambda p: render(p, site, by), todo))
    print(f'{len(todo)} pages in {posixpath.relpath(OUT, Path.cwd())}')


def copy(a, b):
    b.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(a, b)


if __name__ == '__main__': main()

"""Open a rendered site in headless Chromium, all pages in one browser: python .ci/browse.py [--offline] [--need] [FOLDER] [--shots DIR page.html …]

FOLDER is _proc/_preview unless given (`_proc/_docs` for Quarto's). At 390 and 1280 pixels each page has: a title and one h1, no console
errors, no failed requests, no broken picture, no sideways scrolling of the page, and links whose pages and anchors exist. The network is
shut off; a request to another host is a note, with --offline a failure. --shots writes PNGs, light and dark, and checks nothing.
The browser is $CHROME or the first of chromium, chromium-browser, google-chrome, chrome; without one this says so and passes, unless --need.
It speaks the DevTools protocol over a pipe, so nothing but Python is needed.
"""
import argparse
import base64
import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from select import select
from urllib.parse import unquote, urldefrag

ROOT, WIDTHS = Path(__file__).resolve().parent.parent, (390, 1280)

# What is asked of a page, at one width. A box that scrolls or clips by itself may hold anything; the page may not.
PROBE = r'''(() => {
  const w = document.documentElement.clientWidth, wide = [], boxed = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (getComputedStyle(p).overflowX !== 'visible' || getComputedStyle(p).position === 'fixed') return true; return false };
  for (const e of document.body.querySelectorAll('*')) { const r = e.getBoundingClientRect();
    if (r.width && r.height && e.checkVisibility({contentVisibilityAuto: true}) && r.right > w + 1 && !boxed(e) && getComputedStyle(e).position !== 'fixed')
      wide.push(`<${e.tagName.toLowerCase()} class="${e.getAttribute('class') || ''}"> ${Math.round(r.right)} px: ${e.textContent.trim().slice(0, 40)}`) }
  return JSON.stringify({wide: wide.slice(0, 3), scroll: document.documentElement.scrollWidth, w, title: document.title,
    clips: [document.documentElement, document.body].some(e => getComputedStyle(e).overflowX !== 'visible'),
    h1: document.querySelectorAll('h1').length,
    ids: [...document.querySelectorAll('[id],a[name]')].map(e => e.id || e.name),
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    broken: [...document.images].filter(i => i.complete && !i.naturalWidth && i.loading != 'lazy').map(i => i.src.slice(0, 80))}) })()'''


def find_chrome():
    names = [os.environ.get('CHROME'), 'chromium', 'chromium-browser', 'google-chrome', 'chrome']
    return next((p for n in names if n and (p := shutil.which(n))), None)


class Browser:
    "Chromium with one tab, spoken to over file descriptors 3 and 4"
    def __init__(self, exe, profile):
        (r, self.out), (self.inp, w) = os.pipe(), os.pipe()
        args = ('--headless=new --remote-debugging-pipe --no-first-run --disable-gpu --hide-scrollbars --disable-extensions --mute-audio '
                '--disable-background-networking --disable-component-update --disable-dev-shm-usage').split()
        if os.geteuid() == 0 or os.environ.get('CI'): args.append('--no-sandbox')
        args += [f'--user-data-dir={profile}', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
        a, b = os.dup(r), os.dup(w)

        def fds():
            hi = [os.dup(a), os.dup(b)]
            while min(hi) < 5: hi = [os.dup(x) for x in hi]
            os.dup2(hi[0], 3), os.dup2(hi[1], 4)

        null = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
        self.proc = subprocess.Popen([exe, *args], preexec_fn=fds, close_fds=False, start_new_session=True, **null)
        for fd in (r, w, a, b): os.close(fd)
        self.n, self.buf, self.events = 0, b'', []
        target = self.ask('Target.createTarget', session=None, url='about:blank')['targetId']
        self.session = self.ask('Target.attachToTarget', session=None, targetId=target, flatten=True)['sessionId']
        for d in ('Page', 'Runtime', 'Log', 'Network'): self.ask(d + '.enable')

    def read(self, until):
        while b'\0' not in self.buf:
            if not select([self.inp], [], [], max(0, until - time.monotonic()))[0]: raise TimeoutError('no answer from the browser')
            got = os.read(self.inp, 1 << 16)
            if not got: raise EOFError(f'the browser ended, code {self.proc.poll()}')
            self.buf += got
        msg, _, self.buf = self.buf.partition(b'\0')
        return json.loads(msg)

    def ask(self, method, session=..., **params):
        self.n += 1
        msg = dict(id=self.n, method=method, params=params) | ({} if session is None else dict(sessionId=self.session))
        os.write(self.out, json.dumps(msg).encode() + b'\0')
        until = time.monotonic() + 60
        while (m := self.read(until)).get('id') != self.n: self.events.append(m)
        if 'error' in m: raise RuntimeError(f"{method}: {m['error']['message']}")
        return m['result']

    def open(self, url):
        self.events.clear()
        self.ask('Page.navigate', url=url)
        until = time.monotonic() + 30
        while not any(e.get('method') == 'Page.loadEventFired' for e in self.events): self.events.append(self.read(until))

    def run(self, js): return self.ask('Runtime.evaluate', expression=js, returnByValue=True, awaitPromise=True)['result'].get('value')

    def width(self, w, h=900): self.ask('Emulation.setDeviceMetricsOverride', width=w, height=h, deviceScaleFactor=1, mobile=False)

    def close(self):
        try: self.ask('Browser.close', session=None)
        except (OSError, EOFError, TimeoutError, RuntimeError): pass
        try: self.proc.wait(10)
        except subprocess.TimeoutExpired: os.killpg(self.proc.pid, signal.SIGKILL)


def complaints(events, base):
    "(what went wrong, what was asked of other hosts) while a page loaded"
    urls, bad, away = {}, [], []
    for e in events:
        m, p = e.get('method'), e.get('params', {})
        if m == 'Network.requestWillBeSent': urls[p['requestId']] = p['request']['url']
        elif m == 'Network.responseReceived' and p['response']['status'] >= 400: bad.append(f"{p['response']['status']} for {p['response']['url']}")
        elif m == 'Network.loadingFailed' and not p.get('canceled'):
            u = urls.get(p['requestId'], '?')
            (bad if u.startswith(base) else away).append(f"{u[:120]}: {p['errorText']}")
        elif m == 'Runtime.exceptionThrown':
            d = p['exceptionDetails']
            bad.append('script error: ' + d.get('exception', {}).get('description', d['text'])[:200])
        elif m == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'assert'):
            bad.append('console error: ' + ' '.join(str(a.get('value', a.get('description', ''))) for a in p['args'])[:200])
        elif m == 'Log.entryAdded' and p['entry']['level'] == 'error' and p['entry'].get('source') != 'network':
            bad.append(f"console error: {p['entry']['text'][:200]}")
    return bad, away


def check(tab, base, pages, offline):
    "Every page at every width; returns the problems and what other hosts were asked for"
    bad, hosts, ids, links = [], {}, {}, {}
    for f in pages:
        tab.width(WIDTHS[0])
        tab.open(base + f)
        for w in WIDTHS:
            tab.width(w)
            r = json.loads(tab.run(PROBE))
            if r['scroll'] > r['w'] or r['clips'] and r['wide']: bad.append((f, f"{w} px: the page is {r['scroll']} px wide; {'; '.join(r['wide'])}"))
            bad += [(f, f'{w} px: broken picture {u}') for u in r['broken']]
        if not r['title'].strip(): bad.append((f, 'no title'))
        if r['h1'] != 1: bad.append((f, f"{r['h1']} h1 headings"))
        wrong, away = complaints(tab.events, base)
        bad += [(f, x) for x in wrong]
        for u in away: hosts.setdefault(u, []).append(f)
        ids[f], links[f] = set(r['ids']), {u for u in r['links'] if u.startswith(base)}
    for f, found in links.items():
        for u in found:
            page, anchor = urldefrag(u[len(base):])
            page = unquote(page.partition('?')[0]) or 'index.html'
            if page in ids: ok = not anchor or anchor in ids[page] or unquote(anchor) in ids[page]
            else: ok = (tab.root/page).is_file() or (tab.root/page/'index.html').is_file()
            if not ok: bad.append((f, f'dead link {page}{"#" + anchor if anchor else ""}'))
    if offline: bad += [(fs[0], f'asks another host, in {len(fs)} pages: {u}') for u, fs in hosts.items()]
    return bad, hosts


def shots(tab, base, pages, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for f in pages:
        for scheme in ('light', 'dark'):
            tab.ask('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
            for w in WIDTHS:
                tab.width(w)
                tab.open(base + f)
                h = min(6000, tab.run('document.documentElement.scrollHeight'))
                png = tab.ask('Page.captureScreenshot', captureBeyondViewport=True, clip=dict(x=0, y=0, width=w, height=h, scale=1))['data']
                (folder/f"{f.replace('/', '-').removesuffix('.html')}-{w}-{scheme}.png").write_bytes(base64.b64decode(png))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('folder', nargs='?', type=Path, default=ROOT/'_proc/_preview')
    ap.add_argument('pages', nargs='*')
    for f in ('--offline', '--need'): ap.add_argument(f, action='store_true')
    ap.add_argument('--shots', type=Path)
    o = ap.parse_intermixed_args()
    if not o.folder.is_dir(): sys.exit(f'{o.folder} is not a folder; give that of the rendered site first, then pages')
    pages = o.pages or [p.relative_to(o.folder).as_posix() for p in sorted(o.folder.rglob('*.html'))]
    pages = [f for f in pages if not f.startswith(('_', 'site_libs/')) and '_files/' not in f]
    if not pages: sys.exit(f'no page in {o.folder}')
    exe = find_chrome()
    if not exe:
        print('NOT CHECKED in a browser: no chromium on PATH and no CHROME; on Debian `apt-get install chromium`')
        sys.exit(1 if o.need else 0)
    start = time.monotonic()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=o.folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f'http://127.0.0.1:{server.server_port}/'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        tab = Browser(exe, profile)
        tab.root = o.folder
        try:
            if o.shots: return shots(tab, base, pages, o.shots)
            bad, hosts = check(tab, base, pages, o.offline)
        finally: tab.close()
    where = {}
    for f, what in bad: where.setdefault(what, {})[f] = 1
    for what, fs in where.items(): print(f"{next(iter(fs))}{f' and {len(fs) - 1} more' if len(fs) > 1 else ''}: {what}")
    if not o.offline:
        for u, fs in hosts.items(): print(f'note: {len(fs)} pages ask another host: {u}')
    print(f"{len(pages)} pages in {Path(exe).name} at {' and '.join(map(str, WIDTHS))} px, {time.monotonic() - start:.0f} s; {len(where)} problems")
    sys.exit(bool(bad))


if __name__ == '__main__': main()

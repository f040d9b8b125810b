"What has to be in the sdist and the wheel: python .ci/dist.py FOLDER"
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

root, dist = Path(__file__).resolve().parent.parent, Path(sys.argv[1])
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = root/cfg['lib_path']
files = {f.relative_to(root).as_posix() for f in lib.rglob('*') if f.is_file() and '__pycache__' not in f.parts}

[sdist], [wheel] = dist.glob('*.tar.gz'), dist.glob('*.whl')
with tarfile.open(sdist) as t: s = {n.partition('/')[2] for n in t.getnames()}
with zipfile.ZipFile(wheel) as z:
    w = set(z.namelist())
    meta = {n.rpartition('/')[2]: z.read(n).decode() for n in w if '.dist-info/' in n}

bad = [f'{f} is not in the wheel' for f in sorted(files - w)]
bad += [f'{f} is not in the sdist' for f in sorted((files | {'settings.ini', 'setup.py', 'README.md', 'LICENSE'}) - s)]
bad += [f'{f} is in the wheel but not in the tree' for f in sorted(w - files) if '.dist-info/' not in f]
bad += [f'no entry point {e}' for e in cfg['console_scripts'].split()
        if e.replace('=', ' = ') not in meta['entry_points.txt'] and e not in meta['entry_points.txt']]
if bad: sys.exit('\n'.join(bad))
mb = wheel.stat().st_size / 1e6
print(f'{sdist.name} and {wheel.name}: {len(files)} files of the package, {mb:.2f} MB, {len(meta)} metadata files')

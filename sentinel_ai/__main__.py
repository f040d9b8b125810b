"`python -m sentinel_ai train …` is `sentinel-train …`; likewise generate, inspect, compat and eval."
import sys

from sentinel_ai import cli

names = [n.removesuffix('_cli') for n in ('train_cli', 'generate_cli', 'inspect_cli', 'compat_cli', 'eval_cli') if hasattr(cli, n)]
usage = f"usage: python -m sentinel_ai {{{','.join(names)}}} [options]"
name = sys.argv.pop(1) if len(sys.argv) > 1 else ''
if name in ('-h', '--help'): print(usage)
elif name not in names: sys.exit(usage)
else:
    sys.argv[0] = f'sentinel-{name}'
    sys.exit(getattr(cli, f'{name}_cli')())

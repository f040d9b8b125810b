"`python -m sentinel_ai train …` is `sentinel-train …`; likewise generate, inspect and compat."
import sys

from sentinel_ai import cli

names = [n.removesuffix('_cli') for n in dir(cli) if n.endswith('_cli')]
if len(sys.argv) < 2 or sys.argv[1] not in names:
    sys.exit(f"usage: python -m sentinel_ai {{{','.join(names)}}} [options]")
name = sys.argv.pop(1)
sys.argv[0] = f'sentinel-{name}'
getattr(cli, f'{name}_cli')()

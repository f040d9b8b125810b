"Every value comes from settings.ini; a key `NAME_requirements` there becomes the extra `NAME`."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib, suffix = cfg['lib_path'], '_requirements'
statuses = ['', '1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    author=cfg['author'],
    author_email=cfg['author_email'],
    license=cfg['license'].upper(),
    keywords=cfg['keywords'].split(),
    classifiers=[
        f"Development Status :: {statuses[int(cfg['status'])]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: cfg['package_data'].split()},
    include_package_data=False,
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix(suffix): v.split() for k, v in cfg.items() if k.endswith(suffix)},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{lib}={lib}._modidx:d'],
    },
    zip_safe=False,
)

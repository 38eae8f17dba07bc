"""Runs scripts of an unmodified official checkout on a machine without CUDA: `official_runner.py CHECKOUT SCRIPT [ARGS]... [-- SCRIPT ...]`.

Everything is replaced from outside, before the scripts start: a "cuda" device means the CPU, and modules are stood in for that today's
environments lack and local files do not need (`pkg_resources` was removed from setuptools 82). SCRIPT: relative to CHECKOUT, or absolute.
"""

import importlib
import itertools
import os
import runpy
import sys
import types

import torch

_DEVICE = torch.device


class _DeviceType(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, _DEVICE)


class _Device(metaclass=_DeviceType):
    """torch.device without CUDA."""

    def __new__(cls, *args, **kwargs):
        return _DEVICE('cpu')


def _stand_in(name: str, **attributes) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)


def prepare(checkout: str) -> None:
    """Make the modules of the checkout importable, and what they would miss."""
    _stand_in('requests')
    _stand_in('pkg_resources', parse_version=lambda text: tuple(int(part) for part in text.split('+')[0].split('.')[:2]))
    torch.device = _Device
    sys.path.insert(0, checkout)


def main(checkout: str, *words: str) -> None:
    prepare(checkout)
    for is_separator, command in itertools.groupby(words, lambda word: word == '--'):
        if not is_separator:
            sys.argv = list(command)
            print(f'$ {" ".join(sys.argv)}', flush=True)
            try:
                runpy.run_path(os.path.join(checkout, sys.argv[0]), run_name='__main__')
            except SystemExit as end:
                if end.code:
                    raise


if __name__ == '__main__':
    main(*sys.argv[1:])

"""Runs a script of an unmodified official checkout on a machine without CUDA: `official_runner.py CHECKOUT SCRIPT [ARGS]...`.

Everything is replaced from outside, before the script starts: a "cuda" device means the CPU, and `pkg_resources`, which setuptools
removed in version 82, is stood in for. SCRIPT: a path, relative to CHECKOUT unless absolute.
"""

import os
import runpy
import sys
import types

import torch


class _DeviceType(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, _DEVICE)


class _Device(metaclass=_DeviceType):
    """torch.device without CUDA."""

    def __new__(cls, *args, **kwargs):
        return _DEVICE('cpu')


def main(checkout: str, script: str, *args: str) -> None:
    stub = types.ModuleType('pkg_resources')
    stub.parse_version = lambda text: tuple(int(part) for part in text.split('+')[0].split('.')[:2])
    sys.modules['pkg_resources'] = stub
    torch.device = _Device
    sys.path.insert(0, checkout)
    sys.argv = [script, *args]
    runpy.run_path(os.path.join(checkout, script), run_name='__main__')


_DEVICE = torch.device
if __name__ == '__main__':
    main(*sys.argv[1:])

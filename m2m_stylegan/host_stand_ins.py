"""Stand-ins for modules that today's environments lack, and that the host's scripts import even where they do not use them."""

import importlib.util
import sys
import types

from m2m_stylegan.errors import UserError


class Absent(types.ModuleType):
    """A module that is not installed: says what to install when it is used, not when it is imported."""

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        raise UserError(f'{self.__name__}.{name} is needed here: pip install {self.__name__}')


def stand_ins() -> list[str]:
    """Put stand-ins for missing modules into sys.modules; returns their names."""
    made = [name for name in ('distutils', 'pkg_resources', 'psutil', 'imageio', 'requests')
            if name not in sys.modules and importlib.util.find_spec(name) is None]
    for name in made:
        sys.modules[name] = Absent(name)
    if 'distutils' in made:  # removed in Python 3.12; setuptools brings it along
        sys.modules['distutils.util'] = sys.modules['distutils'].util = types.ModuleType('distutils.util')
        sys.modules['distutils.util'].strtobool = _strtobool
    if 'pkg_resources' in made:  # removed in setuptools 82
        from torch.torch_version import TorchVersion
        sys.modules['pkg_resources'].parse_version = TorchVersion
    if 'psutil' in made:
        sys.modules['psutil'].Process = _Process
    return made


def _strtobool(text: str) -> int:
    if text.lower() in ('y', 'yes', 't', 'true', 'on', '1'):
        return 1
    if text.lower() in ('n', 'no', 'f', 'false', 'off', '0'):
        return 0
    raise ValueError(f'{text!r} is neither true nor false')


class _Process:
    """psutil.Process as far as the training loop asks: resident memory in bytes (its peak)."""

    def __init__(self, pid=None):
        pass

    def memory_info(self):
        import resource  # POSIX only
        return types.SimpleNamespace(rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))

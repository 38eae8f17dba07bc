"""Compiling the operators on first use, with ninja, and finding them again.

A library is kept in the cache directory under a key made of everything that it depends on: sources, flags, versions of torch and of the
compilers, processor or GPU. `M2M_OPS` chooses: auto (compile what this machine can), cpu or cuda (only these, and failing is an error), ref (never).
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from m2m_stylegan import locks
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import default_cache_dir

CSRC = Path(__file__).parent / 'csrc'
MODES = ('auto', 'cpu', 'cuda', 'ref')
CPU_FLAGS = ['-O3', '-march=native', '-fno-math-errno', '-fno-trapping-math']
CUDA_FLAGS = ['-O3', '--expt-relaxed-constexpr']
ERROR_LINES = 5  # of the compiler's output are shown


class OpsWarning(UserWarning):
    """Compiled operators were expected and are not available."""


class BuildError(UserError):
    """The operators could not be compiled; the message says why and what to install."""


@dataclasses.dataclass
class Library:
    """State of the operators for one kind of device."""

    kind: str                     # 'cpu' or 'cuda'
    state: str = 'not built yet'  # 'compiled', 'reference' or 'not built yet'
    reason: str = ''              # why the reference is used
    path: Path | None = None
    seconds: float = 0.0          # that compiling took now; 0 if the library was found


_LIBRARIES: dict[str, Library] = {}
_READY: dict[str, bool] = {}


@torch.compiler.assume_constant_result
def ready(device_type: str) -> bool:
    """Are compiled operators there for tensors on 'cpu' or 'cuda'? The first question compiles them."""
    answer = _READY.get(device_type)
    return prepare(device_type).state == 'compiled' if answer is None else answer


def prepare(device_type: str) -> Library:
    """Compile and load the operators of this kind of device, or find them in the cache; never twice in a process.

    If that fails, one OpsWarning says why, and the plain PyTorch operators are used. Raises UserError for a bad M2M_OPS, and BuildError if M2M_OPS
    asks for just this kind.
    """
    if device_type in _LIBRARIES:
        return _LIBRARIES[device_type]
    mode = os.environ.get('M2M_OPS', 'auto')
    if mode not in MODES:
        raise UserError(f'M2M_OPS={mode}: expected one of {", ".join(MODES)}.')
    library = Library(device_type)
    reason = why_not(device_type, mode)
    if reason:
        library.state, library.reason = 'reference', reason
    else:
        try:
            library.path, library.seconds = build(device_type)
            torch.ops.load_library(library.path)
            library.state = 'compiled'
        except (BuildError, OSError) as err:
            if mode == device_type:
                raise err if isinstance(err, BuildError) else BuildError(str(err)) from err
            library.state, library.reason = 'reference', str(err)
            warnings.warn(f'{err}\nGoing on with plain PyTorch operators, which are slower. M2M_OPS=ref silences this.', OpsWarning, stacklevel=2)
    _LIBRARIES[device_type], _READY[device_type] = library, library.state == 'compiled'
    return library


def status() -> dict[str, Library]:
    """What is known about the operators for 'cpu' and 'cuda', without building anything."""
    return {kind: _LIBRARIES.get(kind, Library(kind)) for kind in ('cpu', 'cuda')}


def why_not(kind: str, mode: str) -> str:
    """Reason for which nothing is compiled for this kind of device on this machine, or ''."""
    if kind not in ('cpu', 'cuda'):
        return f'there are no kernels for {kind} devices'
    if mode not in ('auto', kind):
        return f'M2M_OPS={mode}'
    if kind == 'cuda' and not torch.cuda.is_available():
        return 'PyTorch sees no CUDA device'
    if kind == 'cuda' and cuda_home() is None:
        return 'no CUDA toolkit: nvcc is not on the path and CUDA_HOME is not set'
    return ''


def cuda_home() -> Path | None:
    """The CUDA toolkit that PyTorch would use."""
    nvcc = shutil.which('nvcc')
    candidates = [os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH'), nvcc and Path(nvcc).resolve().parents[1], '/usr/local/cuda']
    # An nvcc on the path can be a wrapper script outside of the toolkit: the headers must be there too.
    parts = ('bin/nvcc', 'include/cuda_runtime.h')
    return next((Path(path) for path in candidates if path and all((Path(path) / part).exists() for part in parts)), None)


def sources(kind: str) -> list[Path]:
    """The files that make up the library for 'cpu' or 'cuda'; headers are not listed."""
    return sorted(path for path in (CSRC / kind).iterdir() if path.suffix in ('.cpp', '.cu'))


def cpu_flags() -> list[str]:
    """Flags of the C++ compiler for the CPU kernels. No -ffast-math: NaN and infinity must come through."""
    openmp = [] if sys.platform == 'darwin' else ['-fopenmp']
    return CPU_FLAGS + openmp


def cuda_arch() -> list[str]:
    """Compute capabilities to compile for, such as ['9.0']: those of the GPUs in this machine, unless TORCH_CUDA_ARCH_LIST is set."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f'{major}.{minor}' for major, minor in sorted(found)]


def key(kind: str) -> str:
    """A name for the library that changes with everything it depends on."""
    digest = hashlib.sha256()
    for path in sorted((CSRC / kind).iterdir()):
        digest.update(path.name.encode() + b'\0' + path.read_bytes() + b'\0')
    facts = [torch.__version__, platform.machine(), first_line(compiler(), '--version'), *cpu_flags()]
    facts += [_cpu_features()] if kind == 'cpu' else [
        *CUDA_FLAGS, str(cuda_home()), first_line(str(cuda_home() / 'bin' / 'nvcc'), '--version', line=-1), *cuda_arch(),
        os.environ.get('TORCH_CUDA_ARCH_LIST', '')]
    digest.update('\0'.join(facts).encode())
    return digest.hexdigest()[:16]


def compiler() -> str:
    """The C++ compiler: $CXX, else c++ as in torch.utils.cpp_extension."""
    return os.environ.get('CXX', 'c++')


def first_line(*command: str, line: int = 0) -> str:
    """One line of what a program prints, or '' if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip().splitlines()[line]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return ''


def _cpu_features() -> str:
    """What -march=native depends on: home directories are shared between machines with different processors."""
    with contextlib.suppress(OSError):
        found = re.search(r'^(?:flags|Features)\s*:(.*)$', Path('/proc/cpuinfo').read_text(encoding='utf-8'), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor()


def _root() -> Path:
    return default_cache_dir() / 'ops'


def failed_log(kind: str) -> Path:
    """Where the compiler's whole output is kept if it fails."""
    return _root() / f'{kind}-failed.log'


def build(kind: str) -> tuple[Path, float]:
    """(path of the library, seconds that compiling it took, 0 if it was there). Raises BuildError.

    Compiled in a directory of its own and moved into place; of several processes that start at once, one compiles and the others wait.
    """
    root = _root()
    directory = root / f'{kind}-{key(kind)}'
    path = directory / f'm2m_ops_{kind}.so'
    if path.exists():
        return path, 0.0
    missing = missing_tools()
    if missing:
        raise BuildError(f'The {kind} operators of m2m_stylegan cannot be compiled:\n' + '\n'.join(f'  * {line}' for line in missing))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locks.exclusive(root / 'lock', byte=('cpu', 'cuda').index(kind)):
            if path.exists():
                return path, 0.0
            start = time.perf_counter()
            print(f'Compiling the {kind} operators of m2m_stylegan into {directory} (once) ...', file=sys.stderr, flush=True)
            scratch = Path(tempfile.mkdtemp(prefix=f'.{directory.name}-', dir=root))
            try:
                _compile(kind, scratch)
                built, = scratch.glob('*.so')  # torch appends a version if a process builds twice
                os.replace(built, scratch / path.name)
                os.replace(scratch, directory)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            return path, time.perf_counter() - start
    except OSError as err:
        raise BuildError(f'The {kind} operators of m2m_stylegan cannot be stored in {root}: {err.strerror}. Set M2M_CACHE_DIR to a directory that '
                         'can be written.') from err


def missing_tools() -> list[str]:
    """What has to be installed before anything can be compiled."""
    missing = []
    if not first_line(compiler(), '--version'):
        missing.append(f'no C++ compiler: "{compiler()}" cannot be run. Install one (Debian, Ubuntu: apt install g++) or point CXX to it.')
    with _environment():
        if not first_line('ninja', '--version'):
            missing.append('no ninja: pip install ninja')
    return missing


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for a while, with the pip package's ninja on the path: a venv that is not activated does not have it there."""
    if importlib.util.find_spec('ninja') is not None:
        import ninja
        variables['PATH'] = os.pathsep.join([ninja.BIN_DIR, os.environ.get('PATH', '')])
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _compile(kind: str, directory: Path) -> None:
    from torch.utils import cpp_extension  # slow to import, and only needed here

    variables = {}
    if kind == 'cuda' and 'TORCH_CUDA_ARCH_LIST' not in os.environ:
        variables['TORCH_CUDA_ARCH_LIST'] = ';'.join(cuda_arch())
    with _environment(**variables):
        try:
            cpp_extension.load(f'm2m_ops_{kind}', [str(path) for path in sources(kind)], extra_cflags=cpu_flags(), extra_cuda_cflags=CUDA_FLAGS,
                               extra_ldflags=[flag for flag in cpu_flags() if flag == '-fopenmp'], with_cuda=kind == 'cuda',
                               build_directory=str(directory), is_python_module=False)
        except (RuntimeError, OSError) as err:
            log = failed_log(kind)
            log.write_text(str(err), encoding='utf-8')
            raise BuildError(f'The {kind} operators of m2m_stylegan could not be compiled by {first_line(compiler(), "--version") or compiler()}:\n'
                             + '\n'.join(f'  {line}' for line in first_errors(str(err)))
                             + f'\nThe whole output is in {log}. Please report it with what tools/check_ops.py prints.') from err


def first_errors(log: str) -> list[str]:
    """The first lines of a compiler's output that tell what is wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r'\berror\b|cannot find|undefined reference|No such file', line) and 'Error building' not in line]
    return (errors or lines)[:ERROR_LINES]

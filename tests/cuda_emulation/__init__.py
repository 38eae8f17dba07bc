"""The CUDA kernels compiled as C++ and run on the CPU: operators `torch.ops.m2m_emulated.*` of CPU tensors, every access to memory checked."""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from m2m_stylegan.files import default_cache_dir
from m2m_stylegan.ops import build, library

HERE = Path(__file__).parent
CUDA = build.CSRC / 'cuda'
HEADERS = [path for path in sorted(CUDA.iterdir()) if path.suffix in ('.h', '.cuh')]
TORCH = Path(torch.__file__).parent
TORCH_INCLUDES = [f'-isystem{TORCH / "include"}', f'-isystem{TORCH / "include/torch/csrc/api/include"}']
WARNINGS = ['-Wall', '-Wextra', '-Wno-unknown-pragmas']
# Calls a function of emulator.cpp for every access, but not for those to stack and globals; vectors are not taken apart.
CHECKED = ['-fsanitize=kernel-address', '-fno-tree-sra', '--param=asan-instrumentation-with-call-threshold=0', '--param=asan-stack=0',
           '--param=asan-globals=0']


def why_not() -> str:
    """Reason for which the emulation cannot be built here, or ''."""
    version = build.first_line(build.compiler(), '--version')
    if not version or 'clang' in version:
        return f'the emulation needs GCC, found {version or "no C++ compiler"}'
    return ''


def standard() -> str:
    """The C++ standard that torch's headers ask for."""
    return re.search(r'-std=c\+\+\d+', (TORCH / 'utils/cpp_extension.py').read_text())[0]


def key() -> str:
    """A name that changes with the sources, torch and the compiler."""
    digest = hashlib.sha256((torch.__version__ + build.first_line(build.compiler(), '--version')).encode())
    for path in sorted([*CUDA.iterdir(), *(path for path in HERE.rglob('*') if path.is_file() and path.suffix != '.pyc')]):
        digest.update(path.name.encode() + b'\0' + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_all(directory: Path) -> Path:
    """Compiles and links the emulation; all files at once, in a few seconds."""
    commands = {path.name: ['-std=c++17', '-x', 'c++', '-O1', *CHECKED] for path in [*CUDA.glob('*.cu'), *HERE.glob('*.cu')]}
    commands |= {'emulator.cpp': ['-std=c++17', '-O1', '-U_FORTIFY_SOURCE'], 'glue.cpp': [standard(), '-O0', *TORCH_INCLUDES]}
    running = {}
    for name, flags in commands.items():
        source = (HERE if (HERE / name).exists() else CUDA) / name
        running[name] = subprocess.Popen([build.compiler(), *WARNINGS, '-Werror', '-fPIC', f'-I{HERE}', f'-I{CUDA}', *flags, '-c', str(source),
                                          '-o', str(directory / f'{name}.o')], stderr=subprocess.PIPE, text=True)
    errors = {name: process.communicate()[1] for name, process in running.items()}
    failed = [errors[name] for name, process in running.items() if process.returncode]
    assert not failed, '\n'.join(failed)
    path = directory / 'emulation.so'
    libraries = TORCH / 'lib'
    subprocess.run([build.compiler(), '-shared', '-Wl,-Bsymbolic', f'-L{libraries}', f'-Wl,-rpath,{libraries}', *map(str, directory.glob('*.o')),
                    '-ltorch_cpu', '-lc10', '-o', str(path)], check=True)
    return path


@functools.cache
def load() -> ctypes.CDLL:
    """Builds the emulation, or finds it in the cache, and registers its operators."""
    root = default_cache_dir() / 'cuda-emulation'
    path = root / key() / 'emulation.so'
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=root))
        try:
            compile_all(scratch)
            with contextlib.suppress(OSError):  # Another process was faster.
                os.rename(scratch, path.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    for name, schema in library.SCHEMAS.items():
        torch.library.define(f'm2m_emulated::{name}', schema)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@contextlib.contextmanager
def guarded(descending: bool = False):
    """Tensors that are made meanwhile have borders that no kernel may cross; threads run in this order between two barriers."""
    emulation = load()
    emulation.emulation_set_descending(int(descending))
    emulation.emulation_guard(1)
    try:
        yield torch.ops.m2m_emulated
    finally:
        emulation.emulation_guard(0)

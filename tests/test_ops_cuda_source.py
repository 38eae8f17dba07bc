"""The CUDA sources without a GPU: they compile cleanly, and run on the CPU through an emulation that checks every access to memory."""

import hashlib
import itertools
import os
import re
import subprocess
from pathlib import Path

import cuda_emulation
import op_cases
import pytest
import torch
from torch._subclasses import FakeTensorMode

from m2m_stylegan.files import atomic_write, default_cache_dir
from m2m_stylegan.ops import build, library, reference

SOURCES = [path.name for path in build.sources('cuda') if path.suffix == '.cu']
ARCHITECTURES = ('80', '90', '100')  # A100, H100 and H200, B200
NVCC_FLAGS = [
    *build.CUDA_FLAGS, '-std=c++17', '-Xptxas=-v', '-Xcompiler=-Wall,-Wextra', *(f'-gencode=arch=compute_{a},code=sm_{a}' for a in ARCHITECTURES),
    # as torch.utils.cpp_extension
    *(f'-D__CUDA_NO_{name}__' for name in ('HALF_OPERATORS', 'HALF_CONVERSIONS', 'BFLOAT16_CONVERSIONS', 'HALF2_OPERATORS'))]

TOOLKIT_HEADERS = [path for path in (Path(str(build.cuda_home())) / 'include', Path('/usr/local/cuda/include')) if (path / 'cuda_runtime.h').exists()]

emulated = pytest.mark.skipif(bool(cuda_emulation.why_not()), reason=cuda_emulation.why_not())


# Compilers

def said(name, command, sources):
    """What a compiler prints if it succeeds; kept until a source, the command or the compiler changes, because it takes up to half a minute."""
    facts = [*command, build.first_line(command[0], '--version', line=-1), build.first_line(command[0], '--version')]
    facts = repr(facts + [path.read_text() for path in sources])
    log = default_cache_dir() / 'cuda-emulation' / f'{name}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.log'
    if not log.exists():
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        with atomic_write(log) as path:
            path.write_text(result.stdout + result.stderr)
    return log.read_text()


@pytest.mark.skipif(build.cuda_home() is None, reason='no CUDA toolkit: nvcc was not found')
@pytest.mark.parametrize('name', SOURCES)
def test_nvcc_compiles_without_warnings_and_spills(name):
    nvcc = build.cuda_home() / 'bin' / 'nvcc'
    text = said(f'nvcc-{name}', [str(nvcc), *NVCC_FLAGS, '-c', str(cuda_emulation.CUDA / name), '-o', os.devnull],
                [cuda_emulation.CUDA / name, *cuda_emulation.HEADERS])
    assert not re.findall(r'.*\bwarning\b.*', text)
    kernels, spills = text.count('Compiling entry function'), re.findall(r'(\d+) bytes spill stores', text)
    assert kernels >= len(ARCHITECTURES) * 10 and len(spills) >= kernels and set(spills) == {'0'}


@pytest.mark.skipif(not TOOLKIT_HEADERS, reason='no CUDA toolkit: its headers are needed')
def test_glue_compiles_against_the_headers_of_torch_for_cuda():
    # Generated when torch is built for CUDA, and missing in its wheels for the CPU.
    stub = default_cache_dir() / 'cuda-emulation/stub/c10/cuda/impl/cuda_cmake_macros.h'
    with atomic_write(stub) as path:
        path.write_text('#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n')
    source = cuda_emulation.CUDA / 'register.cpp'
    command = [build.compiler(), '-fsyntax-only', cuda_emulation.standard(), '-Wall', '-Wextra', '-Werror', *cuda_emulation.TORCH_INCLUDES,
               f'-isystem{stub.parents[3]}', f'-isystem{TOOLKIT_HEADERS[0]}', str(source)]
    assert said('glue', command, [source, *cuda_emulation.HEADERS]) == ''


# Emulation

def place(t, offset):
    """A copy of a tensor with the same strides in memory of its own, of just the size that they need, `offset` elements from an aligned address."""
    if not isinstance(t, torch.Tensor):
        return t
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    memory = torch.empty(offset + extent, dtype=t.dtype)
    memory[offset:] = t.as_strided([extent], [1])
    return memory.as_strided(t.shape, t.stride(), offset)


def run(op, *args, offset=0):
    """Results of an emulated operator, which are the same bits for both orders of the threads."""
    results = []
    for descending in (False, True):
        with cuda_emulation.guarded(descending) as ops:
            got = op_cases.as_list(getattr(ops, op)(*(place(t, offset) for t in args)))
        results.append([t.clone() for t in got])
    for ascending, descending in zip(*results, strict=True):
        same = torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (ascending, descending)))
        assert same, f'{op} depends on the order of the threads'
    return results[0]


def check(op, args, offset=0):
    op_cases.check(op, args, run(op, *args, offset=offset))


@emulated
def test_emulation_notices_faults():
    x = torch.arange(32.0)
    assert torch.equal(run('probe', x, 0)[0], x.flip(0))
    faults = [r'read of 4 bytes outside of all tensors by thread 31', r'write of 4 bytes outside of all tensors by thread 0',
              r'misaligned write of 16 bytes by thread 0', r'write of 4 bytes outside of shared memory by thread 31', None,
              r'a barrier that not all threads come to', r'CUDA error 9']
    for fault, message in enumerate(faults, 1):
        with pytest.raises(RuntimeError if message else AssertionError, match=message or 'depends on the order of the threads'):
            run('probe', x, fault)


@emulated
def test_emulated_half_precision_is_that_of_torch():
    """All 65536 halves there and back, and the roundings between them."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()].reshape(1, -1)
        got, = run('bias_act', every, None, 1, 0, 0.0, 1.0, -1.0)
        assert torch.equal(got, every)
        got, = run('bias_act', every, None, 1, 0, 0.0, 0.7, -1.0)
        assert torch.equal(got, (every.float() * 0.7).to(dtype))


@emulated
@pytest.mark.parametrize('label', op_cases.UPFIRDN2D)
def test_upfirdn2d(label):
    for dtype, fmt, c in itertools.product(op_cases.DTYPES, op_cases.FORMATS, (3, 16)):
        check('upfirdn2d', op_cases.upfirdn2d_args(label, 2, c, dtype, fmt))
    check('upfirdn2d', op_cases.upfirdn2d_args(label, 1, 8, torch.float16, torch.channels_last), offset=1)
    check('upfirdn2d', op_cases.upfirdn2d_args(label, 1, 24, torch.float32, torch.channels_last))
    check('upfirdn2d', op_cases.upfirdn2d_args(label, 1, 64, torch.float32, torch.channels_last))


@emulated
@pytest.mark.parametrize('label', ['filter', 'up', 'down, odd', 'uneven'])
def test_upfirdn2d_of_views(label):
    """Nothing is copied, whatever the strides."""
    x, *rest = op_cases.upfirdn2d_args(label, 2, 8, torch.float32, torch.contiguous_format)
    height, width = x.shape[2:]
    last = x.contiguous(memory_format=torch.channels_last)
    more = op_cases.randn(2, 10, height, width, dtype=torch.float32, fmt=torch.channels_last)
    views = [op_cases.randn(2, 8, height + 3, width + 2, dtype=torch.float32)[:, :, 1:-2, 1:-1], x.transpose(2, 3),
             x[:1, :1].expand(3, 8, -1, -1),
             op_cases.randn(2, 8, height, 2 * width, dtype=torch.float32)[..., ::2], x[:, ::2], last[:, :, 1:], last[:, 4:], last[:, 2:6],
             last[:, ::2], more[:, :8], more[:, 1:9]]
    for view in views:
        check('upfirdn2d', (view, *rest))


@emulated
@pytest.mark.parametrize('dtype', op_cases.DTYPES, ids=str)
def test_bias_act_and_its_derivatives(dtype):
    for i, (op, args) in enumerate(op_cases.bias_act_cases(dtype)):
        check(op, args, offset=i % 2)


@emulated
def test_bias_act_of_views():
    """Strided input is copied, and the other tensors follow the layout of the first."""
    x, dy = op_cases.randn(6, 16, 5, dtype=torch.float32), op_cases.randn(6, 16, 5, dtype=torch.float32, seed=1)
    b = op_cases.randn(32, dtype=torch.float32)[::2]
    for view in (x[:, :, ::2], x.transpose(1, 2).contiguous().transpose(1, 2), x[:1].expand(6, -1, -1)):
        check('bias_act', (view, b, 1, 8, 0.0, 1.0, -1.0))
        check('bias_act_grad', (dy[..., :view.shape[2]], view, b, None, 1, 8, 0.0, 1.0, -1.0))
        check('bias_act_grad2', (dy[..., :view.shape[2]], view, view, b, 1, 3, 0.0, 1.0, -1.0))


@emulated
@pytest.mark.parametrize('fmt', op_cases.FORMATS, ids=['contiguous', 'channels-last'])
@pytest.mark.parametrize('dtype', op_cases.DTYPES, ids=str)
def test_epilogue_and_its_derivatives(dtype, fmt):
    for op, args in op_cases.epilogue_cases(dtype, fmt):
        check(op, args)


@emulated
@pytest.mark.parametrize('fmt', op_cases.FORMATS, ids=['contiguous', 'channels-last'])
def test_epilogue_of_unaligned_tensors(fmt):
    size, has, rectifier = (2, 16, 4, 6), (1, 1, 1, 1), (0.2, 1.4, 1.0)
    for dtype in op_cases.DTYPES:
        check('epilogue', op_cases.epilogue_args(size, has, rectifier, dtype, fmt), offset=1)
        check('epilogue_grad', op_cases.epilogue_grad_args(size, has, rectifier, dtype, fmt), offset=1)
        check('epilogue_grad2', op_cases.epilogue_grad2_args(size, True, True, rectifier, dtype, fmt), offset=1)


@emulated
@pytest.mark.parametrize('fmt', op_cases.FORMATS, ids=['contiguous', 'channels-last'])
def test_epilogue_gradients_that_are_not_wanted_are_left_out(fmt):
    for bits in range(1, 32):
        mask = [bool(bits >> i & 1) for i in range(5)]
        check('epilogue_grad', op_cases.epilogue_grad_args((2, 8, 5, 8), (1, 1, 1, 1), (0.2, 1.4, 1.0), torch.float32, fmt, bits % 2 == 0, mask))
    for bits in range(1, 8):
        *args, _ = op_cases.epilogue_grad2_args((2, 8, 5, 8), True, True, (0.2, 1.4, 1.0), torch.float32, fmt)
        check('epilogue_grad2', (*args, [bool(bits >> i & 1) for i in range(3)]))


@emulated
def test_gradients_equal_those_that_autograd_finds():
    """The formulas behind op_cases.py, against autograd through the reference."""
    x, dy = op_cases.randn(2, 3, 5, 7).requires_grad_(), op_cases.randn(2, 3, 5, 7, seed=5)
    small = [op_cases.randn(*shape, seed=i).requires_grad_() for i, shape in enumerate([(2, 3), (1, 1, 5, 7), (), (3,)], 1)]
    y = reference.epilogue(x, *small, alpha=0.2, gain=1.3, clamp=1.0)
    exact = torch.autograd.grad(y, [x, *small], dy, create_graph=True)
    saved = [t.detach() for t in (dy, x, y, *small[:3])]
    got = run('epilogue_grad', *saved, 0.2, 1.3, 1.0, [True] * 5)
    torch.testing.assert_close(got, list(exact))
    ddx, ddscale = op_cases.randn(2, 3, 5, 7, seed=6), op_cases.randn(2, 3, seed=7)
    second = torch.autograd.grad([exact[0], exact[1]], [x, small[0]], [ddx, ddscale])
    got = run('epilogue_grad2', ddx, ddscale, *saved[:4], 0.2, 1.3, 1.0, [True] * 3)
    torch.testing.assert_close(got[1:], list(second))


@emulated
@pytest.mark.parametrize('shape', [(1025, 1, 1, 1), (1025, 8, 1, 2)])
def test_more_samples_than_a_grid_has_rows(shape):
    shapes = (shape, shape, (shape[0], 1, *shape[2:]))
    x, dy, noise = (op_cases.randn(*size, dtype=torch.float32, seed=i, fmt=torch.channels_last) for i, size in enumerate(shapes))
    check('epilogue_grad', (dy, x, None, None, noise, None, 1.0, 1.0, -1.0, [True] * 5))


@emulated
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_a_clamp_that_half_precision_cannot_show(dtype):
    """y is rounded, and what was clamped must still be seen in it: 181.02 is 181 in both."""
    clamp = 256 * 0.5 ** 0.5
    x = torch.tensor([500.0, 181.5, 100.0, -100.0, -500.0], dtype=dtype).reshape(1, 5, 1, 1)
    y, = run('epilogue', x, None, None, None, None, 1.0, 1.0, clamp)
    dx = run('epilogue_grad', torch.ones_like(x), None, y, None, None, None, 1.0, 1.0, clamp, [True, False, False, False, False])[0]
    assert dx.flatten().tolist() == [0, 0, 1, 1, 0]
    y, = run('bias_act', x, None, 1, 0, 0.0, 1.0, clamp)
    assert run('bias_act_grad', torch.ones_like(x), None, None, y, 1, 0, 0.0, 1.0, clamp)[0].flatten().tolist() == [0, 0, 1, 1, 0]


@emulated
def test_nan_and_infinity_come_through():
    x = torch.tensor([float('nan'), float('inf'), -float('inf'), 1.0]).reshape(1, 1, 2, 2)
    for clamp, large in ((-1.0, float('inf')), (3.0, 3.0)):
        for y, in (run('bias_act', x, None, 1, 2, 0.5, 1.0, clamp), run('epilogue', x, None, None, None, None, 0.5, 1.0, clamp)):
            assert y.isnan().flatten().tolist() == [True, False, False, False] and y.flatten()[1:].tolist() == [large, -large, 1]
    x = torch.zeros(1, 1, 12, 12)
    x[0, 0, 5, 6] = float('nan')
    for label in ('filter', 'up', 'down'):
        f, up, down, padding, *_ = op_cases.UPFIRDN2D[label]
        touched = reference.upfirdn2d(x.isnan().double(), f, up, down, padding) > 0
        assert torch.equal(run('upfirdn2d', x, f, *up, *down, *padding, False, 1.0)[0].isnan(), touched)


def every_operator(x, b=None):
    """Arguments of each operator for features x."""
    n, c, h, w = x.shape
    b = torch.ones(c, dtype=x.dtype) if b is None else b
    scale, noise, strength = torch.ones(n, c), torch.ones(n, 1, h, w), torch.ones([])
    return {
        'upfirdn2d': (x, torch.ones(4, 4), 2, 2, 1, 1, 2, 1, 2, 1, False, 4.0), 'bias_act': (x, b, 1, 2, 0.2, 1.4, 1.0),
        'bias_act_grad': (x, x, b, None, 1, 8, 0.0, 1.4, -1.0), 'bias_act_grad2': (x, x, x, b, 1, 3, 0.0, 1.0, -1.0),
        'epilogue': (x, scale, noise, strength, b, 0.2, 1.4, 1.0), 'epilogue_grad': (x, x, x, scale, noise, strength, 0.2, 1.4, 1.0, [True] * 5),
        'epilogue_grad2': (x, scale, x, x, x, scale, 0.2, 1.4, 1.0, [True] * 3)}


@emulated
def test_results_look_as_the_schemas_fakes_say():
    """Shapes, dtypes and strides, which torch.compile relies on; also for empty tensors."""
    for shape in ((2, 3, 4, 5), (2, 1, 4, 4), (2, 8, 1, 1), (0, 3, 4, 4), (2, 0, 4, 4)):
        for x in (torch.ones(shape), torch.ones(shape).contiguous(memory_format=torch.channels_last), torch.ones(*shape[:3], 2 * shape[3])[..., ::2]):
            for op, args in every_operator(x).items():
                with FakeTensorMode() as mode:
                    fake_args = (mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args)
                    fake = op_cases.as_list(getattr(torch.ops.m2m_stylegan, op)(*fake_args))
                for real, expected in zip(run(op, *args), fake, strict=True):
                    assert (real.shape, real.dtype) == (expected.shape, expected.dtype), op
                    assert real.numel() == 0 or real.stride() == expected.stride(), op


@emulated
def test_sums_over_nothing_are_zero():
    _, _, _, dstrength, db = run('epilogue_grad', *every_operator(torch.ones(0, 3, 4, 4))['epilogue_grad'])
    assert dstrength == 0 and db.tolist() == [0, 0, 0]


X = torch.ones(2, 3, 4, 4)
GOOD = every_operator(X)
# operator: (argument, wrong value)
WRONG = {
    'upfirdn2d': [(0, X[0]), (0, X.int()), (1, torch.ones(4)), (1, torch.ones(4, 4).half()), (2, 0), (6, -20)],
    'bias_act': [(0, X.int()), (1, torch.ones(4)), (1, torch.ones(3).double()), (2, 4), (3, 9)],
    'bias_act_grad': [(0, X.int()), (1, None), (1, X[:1])],
    'bias_act_grad2': [(1, X[0]), (2, X.int()), (5, 1)],
    'epilogue': [(0, X[0]), (0, X.int()), (1, torch.ones(2, 4)), (2, torch.ones(3, 1, 4, 4)), (2, None), (3, torch.ones(1)),
                 (4, torch.ones(3).half())],
    'epilogue_grad': [(0, X.int()), (1, X.half()), (1, None), (2, None), (6, -0.1)],
    'epilogue_grad2': [(0, X[:1]), (1, None), (2, X.int()), (3, None), (7, 0.0)],
}
WRONG_CALLS = [(op, (*GOOD[op][:i], value, *GOOD[op][i + 1:])) for op, changes in WRONG.items() for i, value in changes]
WRONG_CALLS += [('epilogue_grad', (X, X, X, None, None, None, 0.2, 1.0, 1.0, [True] * 5)),
                ('bias_act_grad', (X, None, None, X, 1, 2, 0.2, -1.0, -1.0))]


@emulated
@pytest.mark.parametrize('op, args', WRONG_CALLS)
def test_wrong_input_is_refused_as_on_the_cpu(op, args):
    with cuda_emulation.guarded() as ops, pytest.raises(RuntimeError, match=rf'^{op}: expected .*found') as caught:
        getattr(ops, op)(*args)
    if build.ready('cpu'):
        with pytest.raises(RuntimeError) as on_cpu:
            getattr(torch.ops.m2m_stylegan, op)(*args)
        assert str(caught.value).splitlines()[0] == str(on_cpu.value).splitlines()[0]


@emulated
def test_numbers_that_kernels_cannot_index_are_refused():
    x, f = torch.ones(1, 1, 4, 4), torch.ones(4, 4)
    with cuda_emulation.guarded() as ops:
        with pytest.raises(RuntimeError, match='upfirdn2d: expected sizes, factors and padding below 2\\^31, found 2147483648'):
            ops.upfirdn2d(x, f, 1, 1, 1, 1, 2 ** 31, 0, 2, 2, False, 1.0)
        with pytest.raises(RuntimeError, match='upfirdn2d: expected a padded size below 2\\^31, found 4000000000'):
            ops.upfirdn2d(x, f, 1, 10 ** 9, 1, 1, 2, 2, 0, 0, False, 1.0)


def test_emulated_operators_have_the_names_of_the_schemas():
    registered = set(re.findall(r'm\.impl\("(\w+)"', (cuda_emulation.CUDA / 'register.cpp').read_text()))
    assert registered == set(library.SCHEMAS) == set(op_cases.ORACLES)

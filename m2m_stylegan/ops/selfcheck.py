"""What a bug report about the compiled operators needs: the environment, how the build went, whether the results are right, how fast it is."""

import functools
import platform
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from m2m_stylegan.ops import build, dispatch, reference

Op = Callable[..., torch.Tensor]


def environment() -> dict[str, str]:
    """Versions of everything that takes part in building and running the operators."""
    home = build.cuda_home()
    facts = {
        'system': platform.platform(), 'python': sys.version.split()[0], 'numpy': np.__version__, 'torch': torch.__version__,
        'threads': str(torch.get_num_threads()), 'C++ compiler': build.first_line(build.compiler(), '--version') or f'{build.compiler()} not found',
        'CUDA toolkit': build.first_line(str(home / 'bin' / 'nvcc'), '--version', line=-1) + f' in {home}' if home else 'not found',
        'torch is built for CUDA': str(torch.version.cuda)}
    if torch.cuda.is_available():
        facts['GPU'] = ', '.join(f'{torch.cuda.get_device_name(i)} sm_{"".join(build.cuda_arch())}' for i in range(torch.cuda.device_count()))
    return facts


def cases(device: str, dtype: torch.dtype, size: int = 13, channels: int = 6) -> dict[str, tuple[str, tuple, dict]]:
    """{name: (operator, positional arguments, keyword arguments)} that between them run every kernel; channels-last on a CPU."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 and device == 'cpu' else x

    x, image = randn(4, channels, size, size), randn(4, 3, size, size)
    square, separable = reference.setup_filter([1, 3, 3, 1]).to(device), reference.setup_filter([1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1]).to(device)
    small = (randn(4, channels), randn(4, 1, size, size), randn(), randn(channels))
    return {
        'upfirdn2d filter': ('upfirdn2d', (x, square), {'padding': 2}),
        'upfirdn2d up 2': ('upfirdn2d', (x, square), {'up': 2, 'padding': (2, 1, 2, 1), 'gain': 4}),
        'upfirdn2d down 2': ('upfirdn2d', (x, square), {'down': 2, 'padding': 1}),
        'upfirdn2d up 2, image': ('upfirdn2d', (image.contiguous(), square), {'up': 2, 'padding': (2, 1, 2, 1), 'gain': 4}),
        'upfirdn2d 12 taps': ('upfirdn2d', (image.contiguous(), separable), {'up': 2, 'padding': 6}),
        'bias_act swish': ('bias_act', (x, small[3]), {'act': 'swish'}),
        'bias_act lrelu': ('bias_act', (x, small[3]), {'act': 'lrelu', 'clamp': 1.0}),
        'epilogue': ('epilogue', (x, *small), {'act': 'lrelu', 'clamp': 1.0}),
        'epilogue scale': ('epilogue', (x, small[0]), {'act': 'linear'})}


def forward_backward(op: Op, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """[result, gradients with respect to every floating argument but a filter]."""
    wrt = [t.detach().requires_grad_() for t in args if op.__name__ != 'upfirdn2d' or t is args[0]]
    y = op(*wrt, *args[len(wrt):], **kwargs)
    return [y, *torch.autograd.grad(y, wrt, torch.ones_like(y))]


def self_test(device: str) -> dict[str, str]:
    """{case: '' or what is wrong}: every operator and its gradients against the reference in float64, in float32."""
    found = {}
    for name, (op, args, kwargs) in cases(device, torch.float32).items():
        exact = forward_backward(getattr(reference, op), tuple(t.double() for t in args), kwargs)
        got = forward_backward(getattr(dispatch, op), args, kwargs)
        pairs = [(a.detach().double(), b.detach()) for a, b in zip(got, exact, strict=True)]
        errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs]
        found[name] = '' if max(errors) < 1e-4 else f'relative error {max(errors):.1e}'
    return found


def seconds(fn: Callable[[], object], repeats: int = 5) -> float:
    """Best wall-clock time of one call."""
    best = float('inf')
    for _ in range(repeats + 1):
        start = time.perf_counter()
        fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def timings(device: str, size: int = 64, channels: int = 64) -> dict[str, tuple[float, float]]:
    """{case: (seconds of the compiled operator, of the reference)} for forward and backward together, float32."""
    return {name: tuple(seconds(functools.partial(forward_backward, getattr(table, op), args, kwargs))
                        for table in (dispatch, reference))
            for name, (op, args, kwargs) in cases(device, torch.float32, size, channels).items()}


def report(device: str) -> list[str]:
    """The lines that tools/check_ops.py prints for one kind of device."""
    library = build.prepare(device)
    lines = [f'{device}: {library.state}' + (f' ({library.reason})' if library.reason else '')]
    log = build.failed_log(device)
    if library.state != 'compiled':
        failed = str(log) in library.reason
        return lines + ([f'Last lines of {log}:', *log.read_text(encoding='utf-8').splitlines()[-40:]] if failed else [])
    lines.append(f'  {library.path}' + (f', compiled in {library.seconds:.0f} s' if library.seconds else ', found'))
    wrong, times = self_test(device), timings(device)
    lines.append(f'  {"case":<24}{"values, gradients":<28}{"compiled ms":>12}{"reference ms":>14}{"ratio":>8}')
    for name, (fast, slow) in times.items():
        lines.append(f'  {name:<24}{wrong[name] or "right":<28}{fast * 1e3:>12.2f}{slow * 1e3:>14.2f}{slow / fast:>8.1f}')
    return lines

"""The CUDA kernels on a GPU. Without one, test_ops_cuda_source.py runs the same cases through an emulation."""

import itertools

import op_cases
import pytest
import torch

from m2m_stylegan import ops
from m2m_stylegan.ops import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
OPS = torch.ops.m2m_stylegan
FORMAT_NAMES = ['contiguous', 'channels-last']


@pytest.fixture(scope='module', autouse=True)
def kernels():
    library = build.prepare('cuda')
    assert library.state == 'compiled', library.reason


def on_gpu(t, offset=0):
    """A tensor with the same strides on the GPU, `offset` elements from an aligned address."""
    if not isinstance(t, torch.Tensor):
        return t
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    memory = torch.full([offset + extent], float('nan'), dtype=t.dtype, device='cuda')
    memory[offset:] = t.as_strided([extent], [1]).cuda()
    return memory.as_strided(t.shape, t.stride(), offset)


def run(op, *args, offset=0):
    """Results of an operator, which are the same bits every time."""
    args = [on_gpu(t, offset) for t in args]
    got, again = (op_cases.as_list(getattr(OPS, op)(*args)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), f'{op} is not deterministic'
    return got


def check(op, args, offset=0):
    op_cases.check(op, args, run(op, *args, offset=offset))


@pytest.mark.parametrize('label', op_cases.UPFIRDN2D)
def test_upfirdn2d(label):
    for dtype, fmt, c, offset in itertools.product(op_cases.DTYPES, op_cases.FORMATS, (3, 16, 64), (0, 1)):
        check('upfirdn2d', op_cases.upfirdn2d_args(label, 2, c, dtype, fmt), offset)


@pytest.mark.parametrize('dtype', op_cases.DTYPES, ids=str)
def test_bias_act_and_its_derivatives(dtype):
    for (op, args), offset in itertools.product(op_cases.bias_act_cases(dtype), (0, 1)):
        check(op, args, offset)


@pytest.mark.parametrize('fmt', op_cases.FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize('dtype', op_cases.DTYPES, ids=str)
def test_epilogue_and_its_derivatives(dtype, fmt):
    for (op, args), offset in itertools.product(op_cases.epilogue_cases(dtype, fmt), (0, 1)):
        check(op, args, offset)


@pytest.mark.parametrize('fmt', op_cases.FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize('dtype', op_cases.DTYPES, ids=str)
def test_many_samples_and_large_images(dtype, fmt):
    for size in ((1030, 16, 2, 3), (2, 64, 130, 130)):
        has, rectifier = (1, 1, 1, 1), (0.2, 1.4, 1.0)
        check('epilogue', op_cases.epilogue_args(size, has, rectifier, dtype, fmt))
        check('epilogue_grad', op_cases.epilogue_grad_args(size, has, rectifier, dtype, fmt))
        check('epilogue_grad2', op_cases.epilogue_grad2_args(size, True, True, rectifier, dtype, fmt))
        for up, down, padding in ((1, 1, 2), (2, 1, 3), (1, 2, 1)):
            check('upfirdn2d', (op_cases.randn(*size, dtype=dtype, fmt=fmt), op_cases.ODD, up, up, down, down, *[padding] * 4, False, 1.0))


@pytest.mark.parametrize('fmt', op_cases.FORMATS, ids=FORMAT_NAMES)
def test_more_than_2_31_elements(fmt):
    """The end of a tensor of 2.2 billion halves, against the same operator on the end alone."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip('needs 24 GB of free memory on the GPU')
    x = torch.randn(1, 40, 64, 64, dtype=torch.float16, device='cuda').contiguous(memory_format=fmt).repeat(1, 1, 117, 116)
    x = x.contiguous(memory_format=fmt)
    assert x.numel() > 2 ** 31 and x.is_contiguous(memory_format=fmt)
    end = x[:, :, -256:].contiguous(memory_format=fmt)
    f, b = op_cases.BINOMIAL.cuda(), torch.randn(40, device='cuda')
    for taps in (f, f[:3]):  # a compiled filter and a general one
        whole, part = (OPS.upfirdn2d(t, taps, 1, 1, 1, 1, 2, 1, 2, 1, False, 1.0)[:, :, -200:] for t in (x, end))
        assert torch.equal(whole, part)
        del whole
    for act in (2, 8):
        assert torch.equal(OPS.bias_act(x, b.half(), 1, act, 0.2, 1.0, -1.0)[:, :, -256:], OPS.bias_act(end, b.half(), 1, act, 0.2, 1.0, -1.0))
    y = OPS.epilogue(x, None, None, None, b, 0.2, 1.0, 1.0)
    assert torch.equal(y[:, :, -256:], OPS.epilogue(end, None, None, None, b, 0.2, 1.0, 1.0))
    dx, dscale, _, _, db = OPS.epilogue_grad(y, x, y, None, None, None, 0.2, 1.0, 1.0, [True, True, False, False, True])
    small = OPS.epilogue_grad(y[:, :, -256:].contiguous(memory_format=fmt), None, y[:, :, -256:].contiguous(memory_format=fmt), None, None, None,
                              0.2, 1.0, 1.0, [True, False, False, False, False])[0]
    assert torch.equal(dx[:, :, -256:], small)
    # The image repeats a tile of 64 x 64 pixels, and so do its sums.
    tile = [t[:, :, :64, :64].double() for t in (y, x)]
    g = tile[0] * op_cases.slope(y[:, :, :64, :64], 0.2, 1.0, 1.0)
    torch.testing.assert_close(db.double(), g.sum([0, 2, 3]) * 117 * 116, rtol=1e-4, atol=0.1)
    torch.testing.assert_close(dscale.double(), (g * tile[1]).sum([2, 3]) * 117 * 116, rtol=1e-4, atol=0.1)


def small(*shape, seed, fmt=torch.contiguous_format):
    return op_cases.randn(*shape, seed=seed, fmt=fmt).cuda().requires_grad_()


@pytest.mark.parametrize('fmt', op_cases.FORMATS, ids=FORMAT_NAMES)
def test_derivatives(fmt):
    """First and second derivatives against finite differences, through autograd, in float64."""
    x, f = small(2, 2, 4, 3, seed=0, fmt=fmt), op_cases.ODD.cuda()
    cases = [(lambda x: ops.upfirdn2d(x, f, up=2, padding=(2, 1)), [x]), (lambda x: ops.upfirdn2d(x, f, down=2, padding=3), [x]),
             (lambda x, b: ops.bias_act(x, b, act='swish', clamp=1.1), [x, small(2, seed=1)]),
             (lambda *inputs: ops.epilogue(*inputs, clamp=1.0), [x, small(2, 2, seed=1), small(1, 1, 4, 3, seed=2), small(seed=3), small(2, seed=4)])]
    for fn, inputs in cases:
        assert torch.autograd.gradcheck(fn, inputs)
        assert torch.autograd.gradgradcheck(fn, inputs)


def test_kernels_run_on_the_current_stream_and_in_graphs():
    args = [on_gpu(t) for t in op_cases.epilogue_grad_args((4, 16, 32, 32), (1, 1, 1, 1), (0.2, 1.4, 1.0), torch.float32, torch.contiguous_format)]
    x, f = args[0], op_cases.BINOMIAL.cuda()

    def step():
        return [*OPS.epilogue_grad(*args), OPS.upfirdn2d(x, f, 1, 1, 1, 1, 2, 2, 2, 2, False, 1.0), OPS.bias_act(x, None, 1, 3, 0.0, 1.0, -1.0)]

    eager, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in captured:
        t.fill_(float('nan'))
    graph.replay()
    for a, b in zip(captured, eager, strict=True):
        assert torch.equal(a, b)


def test_tensors_on_different_devices_are_refused():
    x = torch.ones(1, 3, 4, 4, device='cuda')
    with pytest.raises(RuntimeError, match='upfirdn2d: expected all tensors on cuda:0, found the filter on cpu'):
        OPS.upfirdn2d(x, torch.ones(4, 4), 1, 1, 1, 1, 2, 2, 2, 2, False, 1.0)
    with pytest.raises(RuntimeError, match='epilogue: expected all tensors on cuda:0, found b on cpu'):
        OPS.epilogue(x, None, None, None, torch.ones(3), 0.2, 1.0, -1.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_second_device():
    """Kernels run where the tensors are, whatever the current device is."""
    args = op_cases.epilogue_args((2, 8, 8, 8), (1, 1, 1, 1), (0.2, 1.4, 1.0), torch.float32, torch.contiguous_format)
    y = OPS.epilogue(*(t.to('cuda:1') if isinstance(t, torch.Tensor) else t for t in args))
    assert y.device.index == 1 and torch.cuda.current_device() == 0
    op_cases.check('epilogue', args, [y])

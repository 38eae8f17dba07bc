"""Operators against the official code's recorded values, closed forms and numerical derivatives."""

import golden
import pytest
import torch

from m2m_stylegan import ops
from m2m_stylegan.ops import build, reference


@pytest.fixture(autouse=True, params=['reference', 'compiled'])
def implementation(request, monkeypatch):
    """Every test of this file runs on the plain PyTorch operators and on the compiled ones."""
    if request.param == 'compiled' and not build.ready('cpu'):
        pytest.skip(f'CPU operators: {build.prepare("cpu").reason}')
    monkeypatch.setitem(build._READY, 'cpu', request.param == 'compiled')


UPFIRDN, BIAS_ACT, CONV = golden.load('op_upfirdn2d'), golden.load('op_bias_act'), golden.load('op_conv2d_resample')
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def case_ids(vectors):
    return [pytest.param(case, id=case['id']) for case in vectors.json('cases')]


def named_filter(vectors, name, dtype):
    return None if name == 'none' else vectors.tensor(f'filter/{name}', dtype)


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('dtype, tolerance', DTYPES)
@pytest.mark.parametrize('case', case_ids(UPFIRDN))
def test_upfirdn2d_values_and_gradients(case, dtype, tolerance, fmt):
    x = UPFIRDN.tensor(f'{case["id"]}/x', dtype).contiguous(memory_format=fmt).requires_grad_()
    y = getattr(ops, case['fn'])(x, named_filter(UPFIRDN, case['filter'], dtype), **case['kwargs'])
    dy = UPFIRDN.tensor(f'{case["id"]}/dy', dtype).requires_grad_()
    dx, = torch.autograd.grad(y, x, dy, create_graph=True)
    assert y.dtype == dtype
    assert golden.relative_error(y, UPFIRDN.tensor(f'{case["id"]}/y')) < tolerance
    assert golden.relative_error(dx, UPFIRDN.tensor(f'{case["id"]}/dx')) < tolerance
    v = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    d2, = torch.autograd.grad(dx, dy, v)  # The op is linear: the gradient of its gradient is the op itself.
    assert golden.relative_error(d2, getattr(ops, case['fn'])(v, named_filter(UPFIRDN, case['filter'], dtype), **case['kwargs'])) < tolerance


def test_upfirdn2d_gradgradcheck():
    x = torch.randn([2, 3, 5, 4], dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    f = UPFIRDN.tensor('filter/asym2d')
    for kwargs in [{'up': 2, 'padding': [2, 1, 3, 0], 'gain': 4}, {'down': 2, 'padding': [1, 2, 1, 1]},
                   {'padding': [3, -1, 2, 2], 'flip_filter': True}]:
        assert torch.autograd.gradcheck(lambda x, kw=kwargs: ops.upfirdn2d(x, f, **kw), x)
        assert torch.autograd.gradgradcheck(lambda x, kw=kwargs: ops.upfirdn2d(x, f, **kw), x)


def test_upfirdn2d_double_backward_runs_no_filter_gradient():
    """One convolution per pass; as a bare depthwise convolution the second backward would add one per channel."""
    x = torch.randn([1, 6, 8, 8]).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as prof:  # torch 2.12 warns without
        g, = torch.autograd.grad(reference.upfirdn2d(x, ops.setup_filter([1, 3, 3, 1]), padding=2).square().sum(), x, create_graph=True)
        g.square().sum().backward()
    count = sum(event.count for event in prof.key_averages() if event.key in ('aten::convolution', 'aten::convolution_backward'))
    assert count == 4  # forward, its gradient, and one for each of these two in the second backward


def test_upfirdn2d_by_hand():
    x = torch.tensor([[[[1., 2.], [3., 4.]]]])
    up = ops.upfirdn2d(x, torch.tensor([[1.]]), up=2)
    assert up.tolist() == [[[[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]]]
    assert ops.upfirdn2d(x, torch.tensor([[1., 10.]])).tolist() == [[[[12.], [34.]]]]  # convolution: the kernel is reversed
    assert ops.upfirdn2d(x, torch.tensor([[1., 10.]]), flip_filter=True).tolist() == [[[[21.], [43.]]]]


@pytest.mark.parametrize('fn, kwargs', [(ops.upsample2d, {}), (ops.downsample2d, {}), (ops.filter2d, {})])
def test_resampling_keeps_a_constant_inside(fn, kwargs):
    y = fn(torch.full([1, 2, 16, 16], 3.0), ops.setup_filter([1, 3, 3, 1]), **kwargs)
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.full_like(y[:, :, 2:-2, 2:-2], 3.0))


def test_upfirdn2d_refuses():
    with pytest.raises(ValueError, match=r'expects an \[N, C, H, W\] tensor, got shape \[3, 4\]'):
        ops.upfirdn2d(torch.zeros(3, 4), None)
    with pytest.raises(ValueError, match=r'padded input of 2 x 2 is smaller than the filter of 4 x 4 taps'):
        ops.upfirdn2d(torch.zeros(1, 1, 2, 2), ops.setup_filter([1, 3, 3, 1]))
    with pytest.raises(ValueError, match='one or two non-empty dimensions'):
        ops.setup_filter(torch.zeros(2, 2, 2))


@pytest.mark.parametrize('name', sorted(key.split('/')[1] for key in UPFIRDN.arrays if key.startswith('setup_filter_args/')))
def test_setup_filter(name):
    kwargs = UPFIRDN.json(f'setup_filter_args/{name}')
    assert golden.relative_error(ops.setup_filter(**kwargs), UPFIRDN.tensor(f'setup_filter/{name}')) < 1e-6


@pytest.mark.parametrize('dtype, tolerance', DTYPES)
@pytest.mark.parametrize('case', case_ids(BIAS_ACT))
def test_bias_act_to_the_second_derivative(case, dtype, tolerance):
    i = case['id']
    x, dy, v = (BIAS_ACT.tensor(f'{i}/{k}', dtype).requires_grad_() for k in ('x', 'dy', 'v'))
    b = BIAS_ACT.tensor(f'{i}/b', dtype).requires_grad_() if case['bias'] else None
    y = ops.bias_act(x, b, act=case['act'], **case['kwargs'])
    wrt = [x] if b is None else [x, b]
    grads = torch.autograd.grad(y, wrt, dy, create_graph=True)
    assert golden.relative_error(y, BIAS_ACT.tensor(f'{i}/y')) < tolerance
    for got, key in zip(grads, ['dx', 'db'], strict=False):
        assert golden.relative_error(got, BIAS_ACT.tensor(f'{i}/{key}')) < tolerance
    second = torch.autograd.grad((grads[0] * v).sum(), [dy, *wrt], allow_unused=True, materialize_grads=True)
    for got, key in zip(second, ['d2_dy', 'd2_x', 'd2_b'], strict=False):
        expected = BIAS_ACT.tensor(f'{i}/{key}')
        assert (got - expected).abs().max() <= tolerance * max(float(expected.abs().max()), 1)


def test_activation_table():
    table = BIAS_ACT.json('default_gain_alpha')
    assert {act: {'alpha': alpha, 'gain': gain} for act, (_, alpha, gain) in ops.ACTIVATIONS.items()} == table


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('dtype, tolerance', DTYPES)
@pytest.mark.parametrize('case', case_ids(CONV))
def test_conv2d_resample(case, dtype, tolerance, fmt):
    i, kwargs = case['id'], dict(case['kwargs'])
    x = CONV.tensor(f'{i}/x', dtype).contiguous(memory_format=fmt).requires_grad_()
    w = CONV.tensor(f'{i}/w', dtype).requires_grad_()
    y = ops.conv2d_resample(x, w, named_filter(CONV, case['filter'], dtype), groups=case['groups'], **kwargs)
    dx, dw = torch.autograd.grad(y, [x, w], CONV.tensor(f'{i}/dy', dtype))
    for got, key in [(y, 'y'), (dx, 'dx'), (dw, 'dw')]:
        assert golden.relative_error(got, CONV.tensor(f'{i}/{key}')) < tolerance


def test_conv2d_resample_second_derivative():
    generator = torch.Generator().manual_seed(2)
    x, w = (torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in ([1, 2, 4, 4], [2, 2, 3, 3]))
    f = ops.setup_filter([1, 3, 3, 1]).double()
    for kwargs in [{'up': 2, 'padding': 1, 'flip_weight': False}, {'down': 2, 'padding': 1}]:
        assert torch.autograd.gradgradcheck(lambda x, w, kw=kwargs: ops.conv2d_resample(x, w, f, **kw), (x, w))

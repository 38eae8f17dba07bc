"""Compiled operators: derivatives to the second order, shapes under torch.compile, agreement with the reference in whole networks."""

import pytest
import tiny
import torch

from m2m_stylegan import losses, ops
from m2m_stylegan.ops import build, library, reference

pytestmark = pytest.mark.skipif(not build.ready('cpu'), reason=f'CPU operators: {build.prepare("cpu").reason}')

FORMATS = [torch.contiguous_format, torch.channels_last]


def randn(*shape, seed=0, fmt=torch.contiguous_format):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x.contiguous(memory_format=fmt) if len(shape) == 4 else x).requires_grad_()


def check_twice(fn, *inputs):
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('kwargs', [{'up': 2, 'padding': (2, 1, 3, 0), 'gain': 4}, {'down': 2, 'padding': (1, 2, 1, 1)},
                                    {'padding': (3, -1, 2, 2), 'flip_filter': True}, {'up': (2, 1), 'down': (1, 2), 'padding': 2}])
def test_upfirdn2d_derivatives(kwargs, fmt):
    f = torch.randn([4, 3], generator=torch.Generator().manual_seed(1))
    check_twice(lambda x: ops.upfirdn2d(x, f, **kwargs), randn(2, 3, 5, 4, fmt=fmt))


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('act', list(ops.ACTIVATIONS))
def test_bias_act_derivatives(act, fmt):
    check_twice(lambda x, b: ops.bias_act(x, b, act=act, gain=1.3, clamp=1.1), randn(2, 3, 4, 5, fmt=fmt), randn(3, seed=1))
    check_twice(lambda x, b: ops.bias_act(x, b, dim=-1, act=act), randn(4, 3), randn(3, seed=1))


# Which of scale, noise, strength and bias are there.
OPERANDS = [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 1), (1, 1, 0, 0), (0, 0, 0, 1), (0, 1, 1, 0)]


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('kwargs', [{}, {'act': 'linear', 'gain': 1.0}, {'act': 'relu', 'gain': 0.7, 'clamp': 0.5}, {'alpha': 0.1, 'clamp': 1.0}],
                         ids=['lrelu', 'linear', 'relu-clamp', 'lrelu-clamp'])
@pytest.mark.parametrize('has', OPERANDS)
@pytest.mark.parametrize('noise_batch', [1, 2])
def test_epilogue_derivatives(has, kwargs, fmt, noise_batch):
    x = randn(2, 3, 4, 5, fmt=fmt)
    operands = [randn(2, 3, seed=1), randn(noise_batch, 1, 4, 5, seed=2), randn(seed=3), randn(3, seed=4)]
    given = [t for t, there in zip(operands, has, strict=True) if there]

    def fn(implementation, x, *given):
        it = iter(given)
        return implementation(x, *(next(it) if there else None for there in has), **kwargs)

    torch.testing.assert_close(fn(ops.epilogue, x, *given), fn(reference.epilogue, x, *given))
    check_twice(lambda *inputs: fn(ops.epilogue, *inputs), x, *given)


@pytest.mark.parametrize('fmt', FORMATS)
def test_second_derivatives_of_all_first_ones_together(fmt):
    """gradgradcheck looks at one first derivative at a time; a penalty may use several."""
    inputs = [randn(2, 3, 4, 5, fmt=fmt), randn(2, 3, seed=1), randn(2, 1, 4, 5, seed=2), randn(seed=3), randn(3, seed=4)]

    def second(implementation):
        y = implementation(*inputs, clamp=1.0)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for got, expected in zip(second(ops.epilogue), second(reference.epilogue), strict=True):
        torch.testing.assert_close(got, expected)


def test_third_derivatives_refuse_loudly():
    x, s = randn(1, 2, 3, 3), randn(1, 2, seed=1)
    g, = torch.autograd.grad(ops.epilogue(x, s).square().sum(), x, create_graph=True)
    h, = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'epilogue_grad2 has no derivative: third derivatives .* Set M2M_OPS=ref'):
        h.sum().backward()


def network_gradients(compiled, monkeypatch):
    """Gradients of R1 (D) and of the path length penalty (G), which differentiate twice through every block, as {name: tensor}."""
    monkeypatch.setitem(build._READY, 'cpu', compiled)
    generator = torch.Generator().manual_seed(5)
    G, D = tiny.generator(seed=1).double(), tiny.discriminator().double()
    D.requires_grad_(True)
    G.requires_grad_(True)
    img = torch.randn([4, 3, 16, 16], dtype=torch.float64, generator=generator).requires_grad_()
    losses.r1_penalty(D(img, torch.zeros([4, 0])), img).sum().backward()
    z = torch.randn([4, G.z_dim], dtype=torch.float64, generator=generator)
    noise = torch.randn([4, 3, 16, 16], dtype=torch.float64, generator=generator)
    ws = G.mapping(z, torch.zeros([4, 0]))
    losses.path_lengths(G.synthesis(ws, noise_mode='const'), ws, noise).square().sum().backward()
    return {f'{key}.{name}': p.grad for key, net in [('G', G), ('D', D)] for name, p in net.named_parameters() if p.grad is not None}


def test_penalties_of_whole_networks_equal_the_reference(monkeypatch):
    compiled, plain = (network_gradients(state, monkeypatch) for state in (True, False))
    assert compiled.keys() == plain.keys() and len(plain) > 40
    for name, grad in plain.items():
        torch.testing.assert_close(compiled[name], grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f'{name}: {text}')


CASES = {
    'upfirdn2d': lambda x: (x, torch.ones(4, 4) / 16, 2, 2, 1, 1, 2, 1, 2, 1, False, 4.0),
    'bias_act': lambda x: (x, torch.ones(3), 1, 2, 0.2, 1.4, 1.0),
    'bias_act_grad': lambda x: (x, x * 2, torch.ones(3), None, 1, 8, 0.0, 1.4, -1.0),
    'bias_act_grad2': lambda x: (x, x, x * 2, None, 1, 3, 0.0, 1.0, -1.0),
    'epilogue': lambda x: (x, torch.ones(2, 3), torch.ones(2, 1, 4, 5), torch.ones([]), torch.ones(3), 0.2, 1.4, 1.0),
    'epilogue_grad': lambda x: (x, x * 2, x * 3, torch.ones(2, 3), torch.ones(2, 1, 4, 5), torch.ones([]), 0.2, 1.4, 1.0, [True] * 5),
    'epilogue_grad2': lambda x: (x, torch.ones(2, 3), x * 2, x * 3, x * 4, torch.ones(2, 3), 0.2, 1.4, 1.0, [True] * 3),
}


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('name', list(library.SCHEMAS))
def test_registration(name, fmt):
    """torch's own checks of schema, fakes (shapes, strides) and autograd registration; they do not look at values."""
    x = torch.randn([2, 3, 4, 5], generator=torch.Generator().manual_seed(0)).contiguous(memory_format=fmt)
    torch.library.opcheck(getattr(torch.ops.m2m_stylegan, name).default, CASES[name](x),
                          test_utils=('test_schema', 'test_faketensor', 'test_autograd_registration'))


def test_masks_leave_out_what_is_not_wanted():
    x = torch.ones(2, 3, 4, 5)
    args = list(CASES['epilogue_grad'](x))
    for i in range(5):
        args[-1] = [k == i for k in range(5)]
        assert [grad.numel() > 0 for grad in torch.ops.m2m_stylegan.epilogue_grad(*args)] == args[-1]


def test_no_graph_breaks_in_a_training_step():
    """The whole loss of G, through both networks, is one graph, and its gradients are those of eager mode."""
    G, D = tiny.generator(seed=1).eval().requires_grad_(True), tiny.discriminator().requires_grad_(False)
    z, c = torch.randn([4, G.z_dim], generator=torch.Generator().manual_seed(0)), torch.zeros([4, 0])

    def loss():
        return losses.generator_loss(D(G(z, c, noise_mode='const'), c)).mean()

    loss().backward()
    eager = {name: p.grad.clone() for name, p in G.named_parameters()}
    G.zero_grad()
    torch.compile(loss, backend='aot_eager', fullgraph=True)().backward()
    for name, p in G.named_parameters():
        torch.testing.assert_close(p.grad, eager[name], rtol=1e-4, atol=1e-6)

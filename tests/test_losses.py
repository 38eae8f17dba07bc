"""Losses and phases against the official code's recorded losses and gradients, and against closed forms."""

import functools

import golden
import pytest
import torch
from test_networks import build

from m2m_stylegan import losses, phases

CASES = ['loss_uncond_rgb_16', 'loss_cond_gray_clamp_8']


class ConstantNoiseSource(phases.LatentSource):
    """The recorded runs use constant noise and no style mixing."""

    def __init__(self, G):
        super().__init__(G, 0, {'noise_mode': 'const'})


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize('phase', ['Gmain', 'Gpl', 'Dmain', 'Dr1'])
@pytest.mark.parametrize('name', CASES)
def test_phase_equals_the_recorded_one(name, phase, dtype, tolerance, monkeypatch):
    vectors = golden.load(name)
    hyper = vectors.json('hyper')
    G, D = (build(vectors, dtype, f'{k}/', f'{k}_meta').train() for k in 'GD')
    reported = {}
    options = phases.LossOptions(
        r1_gamma=hyper['r1_gamma'], style_mixing_prob=0, pl_batch_shrink=hyper['pl_batch_shrink'], pl_decay=hyper['pl_decay'],
        pl_weight=hyper['pl_weight'])
    game = phases.Game(ConstantNoiseSource(G), D, lambda img: img, options, lambda key, value: reported.setdefault(key, []).append(value),
                       torch.device('cpu'))
    game.pl_mean = torch.tensor(hyper['pl_mean_before'], dtype=dtype)
    monkeypatch.setattr(torch, 'randn_like', lambda img: vectors.tensor('pl_noise_unit', dtype))
    net = G if phase.startswith('G') else D
    for param in net.parameters():
        param.requires_grad_(True)
    latents = {'z': vectors.tensor('z', dtype), 'c': vectors.tensor('c', dtype)}
    real = {'img': vectors.tensor('real', dtype), 'c': vectors.tensor('real_c', dtype)}
    {'Gmain': game.g_main, 'Gpl': game.g_reg, 'Dmain': game.d_main, 'Dr1': game.d_reg}[phase](latents, real, hyper['gain'])

    recorded = vectors.under(f'{phase}/report/')
    assert sorted(reported) == sorted(recorded)
    for key, expected in recorded.items():
        assert golden.relative_error(torch.cat(reported[key]), expected) < tolerance, key
    for key, expected in vectors.under(f'{phase}/grad/').items():
        grad = dict(net.named_parameters())[key].grad
        grad = torch.zeros_like(expected) if grad is None else grad
        assert (grad - expected).abs().max() <= tolerance * max(float(expected.abs().max()), 1e-3), key
    if phase == 'Gpl':
        assert golden.relative_error(game.pl_mean, vectors.tensor('Gpl/pl_mean_after')) < tolerance


@pytest.mark.parametrize('name', CASES)
def test_inner_gradients_equal_the_recorded_ones(name):
    vectors = golden.load(name)
    G, D = (build(vectors, torch.float64, f'{k}/', f'{k}_meta').train() for k in 'GD')
    noise = vectors.tensor('pl_noise_unit')
    ws = G.mapping(vectors.tensor('z')[:len(noise)], vectors.tensor('c')[:len(noise)]).requires_grad_()
    lengths = losses.path_lengths(G.synthesis(ws, noise_mode='const'), ws, noise)
    assert golden.relative_error(lengths, vectors.tensor('Gpl/pl_lengths')) < 1e-9
    real = vectors.tensor('real').requires_grad_()
    penalty = losses.r1_penalty(D(real, vectors.tensor('real_c')), real)
    assert golden.relative_error(penalty, vectors.tensor('Dr1/grad_images').square().sum([1, 2, 3])) < 1e-9


def test_r1_of_a_linear_critic_is_its_squared_norm():
    weight = torch.tensor([1., 2., 2.])
    img = torch.randn(5, 3, 1, 1).requires_grad_()
    logits = (img * weight[:, None, None]).sum([1, 2, 3])[:, None]
    torch.testing.assert_close(losses.r1_penalty(logits, img), torch.full([5], 9.0))


def test_path_length_penalty_pulls_towards_the_updated_mean():
    penalty, mean = losses.path_length_penalty(torch.tensor([1., 3.]), torch.tensor(0.), decay=0.5)
    assert mean == 1.0 and penalty.tolist() == [0.0, 4.0] and not mean.requires_grad


SCHEDULES = golden.load('data_and_schedules')


@pytest.mark.parametrize('row', SCHEDULES.arrays['ema/batch_emakimg_ramp_curnimg_beta'].tolist())
def test_ema_beta(row):
    batch_size, ema_kimg, rampup, cur_nimg, beta = row
    assert losses.ema_beta(batch_size, cur_nimg, ema_kimg, None if rampup < 0 else rampup) == pytest.approx(beta, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize('row', SCHEDULES.arrays['adam/lr_b1_b2_interval_lr2_b1n_b2n'].tolist())
def test_lazy_adam(row):
    lr, beta1, beta2, interval, *expected = row
    kwargs = losses.lazy_adam_kwargs(lr, (beta1, beta2), interval)
    assert [kwargs['lr'], *kwargs['betas']] == pytest.approx(expected, rel=1e-12)
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], **kwargs)  # betas of mixed types are refused since torch 2.6


def test_nan_gradients_are_replaced_before_the_step():
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([param], lr=1.0)
    grads = torch.tensor([float('nan'), float('inf'), float('-inf'), 2.0])

    def accumulate(latents, real, gain):
        (param * 0).sum().backward()
        param.grad.copy_(grads)

    phases.run_phase(phases.Phase('test', [param], optimizer, 1, accumulate), {'c': torch.zeros(2, 0)}, {}, 2)
    assert param.tolist() == [0.0, -1e5, 1e5, -2.0]
    assert not param.requires_grad


def test_gradients_of_micro_batches_are_summed():
    param = torch.nn.Parameter(torch.zeros([]))
    seen = []

    def accumulate(latents, real, gain):
        seen.append((latents['c'].shape[0], gain))
        (param * 1.0).backward()

    phases.run_phase(phases.Phase('test', [param], torch.optim.SGD([param], lr=1.0), 4, accumulate), {'c': torch.zeros(5, 0)}, {}, 2)
    assert seen == [(2, 4.0), (2, 4.0), (1, 4.0)]
    assert param.item() == -3.0


def test_style_mixing_replaces_a_tail_of_layers():
    class Mapping:
        def __call__(self, z, c, skip_w_avg_update):
            assert skip_w_avg_update
            return torch.ones(3, 6, 2)

    G = type('G', (), {'z_dim': 4, 'mapping': Mapping()})()
    mix = functools.partial(phases.mix_styles, G, torch.zeros(3, 6, 2), torch.zeros(3, 0))
    cutoffs = set()
    for seed in range(60):
        torch.manual_seed(seed)
        layers = mix(1.0)[0, :, 0].tolist()
        assert layers == sorted(layers) and layers[0] == 0 and layers[-1] == 1
        cutoffs.add(layers.index(1))
    assert cutoffs == {1, 2, 3, 4, 5}
    assert mix(0.0).sum() == 0

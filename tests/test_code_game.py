"""The game of low-res training in feature space: closed forms, who gets which gradients, and that w moves towards the target."""

import itertools
import types

import numpy as np
import pytest
import tiny
import torch

from m2m_stylegan import code_game, losses, phases, slicing
from m2m_stylegan.code_game import CodeGame, CodeOptions, Critic, ImageLatents, make_game, make_phases

N, NUM_ITEMS, W_DIM = 8, 12, 8


# Gradient penalty


def test_gradient_penalty_of_a_linear_critic():
    """(|a| - 1)^2 wherever it is measured, and its gradient with respect to a."""
    a = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64, requires_grad=True)
    real, fake = torch.randn(2, 5, 3, dtype=torch.float64)
    penalty = losses.gradient_penalty(lambda x: (x @ a)[:, None], real, fake)
    torch.testing.assert_close(penalty, torch.full([5], 16.0, dtype=torch.float64))
    grad, = torch.autograd.grad(penalty.sum(), a)
    torch.testing.assert_close(grad, 5 * 2 * 4 * a.detach() / 5)


def test_gradient_penalty_is_measured_between_the_two():
    """At one random point per pair; the gradient of |x|^2 / 2 is x."""
    real, fake, seen = torch.zeros(500, 2), torch.tensor([3.0, 4.0]).expand(500, 2), []

    def critic(x):
        seen.append(x.detach())
        return x.square().sum(dim=1, keepdim=True) / 2

    penalty = losses.gradient_penalty(critic, real, fake)
    t = seen[0] / fake
    assert torch.equal(t[:, 0].round(decimals=4), t[:, 1].round(decimals=4)) and t.min() >= 0 and t.max() <= 1
    assert t.min() < 0.05 and t.max() > 0.95 and abs(t.mean() - 0.5) < 0.05 and len(seen) == 1
    torch.testing.assert_close(penalty, (seen[0].norm(dim=1) - 1).square(), rtol=1e-4, atol=1e-5)
    assert not real.requires_grad and not fake.requires_grad


# The objectives


def new_game(res=8, *, c_dim=0, architecture='skip', reported=None, dtype=torch.float64, **options):
    """A game on random weights and offsets; nothing but w_jitter and latents is random while it runs."""
    G = tiny.generator(c_dim=c_dim, architecture=architecture).to(dtype).train()
    torch.manual_seed(3)
    offsets, critic = ImageLatents(NUM_ITEMS, W_DIM).to(dtype).requires_grad_(False), Critic(W_DIM, c_dim).to(dtype).requires_grad_(False)
    offsets.offset.normal_()
    critic.mean.normal_()
    critic.std.uniform_(0.5, 1.5)
    channels = 8 + (3 if architecture == 'skip' else 0)
    metric = None if res == slicing.W_SLICE else torch.randn(channels, channels, dtype=dtype)
    reported = {} if reported is None else reported
    return CodeGame(G, offsets, critic, metric, res, CodeOptions(**options), lambda name, value: reported.setdefault(name, []).append(value),
                    {'noise_mode': 'const'})


def new_batch(game, num=N, dtype=torch.float64):
    c = torch.eye(game.G.c_dim, dtype=dtype).repeat(num, 1)[:num] if game.G.c_dim else torch.zeros(num, 0, dtype=dtype)
    real = {'index': torch.arange(num) * 5 % NUM_ITEMS, 'w': torch.randn(num, W_DIM, dtype=dtype), 'c': c}
    if game.metric is not None:
        real |= {'x': torch.randn(num, 8, game.res, game.res, dtype=dtype)}
        if len(game.metric) > 8:
            real |= {'img': torch.randn(num, 3, game.res, game.res, dtype=dtype)}
    return {'z': torch.randn(num, game.G.z_dim, dtype=dtype), 'c': c}, real


def make_linear(critic):
    """score = normalised w @ a + b; returns (a, b)."""
    critic.layers = torch.nn.Linear(W_DIM, 1).double().requires_grad_(True)
    return critic.layers.weight[0], critic.layers.bias


def moved_w(game, real):
    """w of the images: where the encoder found it, plus so many standard deviations of the source's w."""
    return real['w'] + game.image_latents.offset.detach()[real['index']] * game.critic.std


def fakes_and_reals(game, latents, real):
    with torch.no_grad():
        ws = [game.G.mapping(latents['z'], latents['c'], skip_w_avg_update=True)[:, 0], moved_w(game, real)]
    return [(w - game.critic.mean) / game.critic.std for w in ws]


def test_critic_loss_of_a_linear_critic_wgan_gp():
    """WGAN-GP (1704.00028, algorithm 1) with drift (1710.10196, appendix A.1): values and gradients in closed form."""
    reported = {}
    game = new_game(critic='wgan-gp', w_jitter=0.0, gp_weight=7.0, drift_weight=0.3, reported=reported)
    a, b = make_linear(game.critic)
    latents, real = new_batch(game)
    game.d_main(latents, real, 2.0)
    fake, found = fakes_and_reals(game, latents, real)
    score, norm = (found @ a + b).detach(), a.detach().norm()
    loss = (fake @ a + b).detach() - score + 0.3 * score.square() + 7 * (norm - 1) ** 2
    torch.testing.assert_close(reported['Loss/D/loss'][0][:, 0], loss)
    torch.testing.assert_close(reported['Loss/r1_penalty'][0], (norm - 1).square().expand(N))
    expected = fake.mean(0) - found.mean(0) + 0.6 * (score[:, None] * found).mean(0) + 14 * (norm - 1) * a.detach() / norm
    torch.testing.assert_close(game.critic.layers.weight.grad[0], 2 * expected)
    torch.testing.assert_close(game.critic.layers.bias.grad[0], 2 * 0.6 * score.mean())


def test_critic_loss_of_a_linear_critic_logistic():
    """Logistic loss with R1 (1801.04406): the penalty is |a|^2, its gradient gamma a."""
    reported = {}
    game = new_game(critic='logistic', w_jitter=0.0, r1_gamma=0.8, reported=reported)
    a, b = make_linear(game.critic)
    latents, real = new_batch(game)
    game.d_main(latents, real, 2.0)
    fake, found = fakes_and_reals(game, latents, real)
    scores = [(x @ a + b).detach() for x in (fake, found)]
    torch.testing.assert_close(reported['Loss/r1_penalty'][0], a.detach().square().sum().expand(N))
    loss = (1 + scores[0].exp()).log() + (1 + (-scores[1]).exp()).log() + 0.4 * a.detach().square().sum()
    torch.testing.assert_close(reported['Loss/D/loss'][0][:, 0], loss)
    expected = (scores[0].sigmoid()[:, None] * fake - (-scores[1]).sigmoid()[:, None] * found).mean(0) + 0.8 * a.detach()
    torch.testing.assert_close(game.critic.layers.weight.grad[0], 2 * expected)


def test_moments_of_the_reals():
    """Running means that start without a bias to zero: after one batch they are the batch's, and then the newest batches count most."""
    torch.manual_seed(0)
    critic, first, second = Critic(3, 0).double(), *torch.randn(2, 50, 3, dtype=torch.float64)
    critic.see(first)
    assert critic.moment_distance(first) < 1e-12
    other = first @ torch.diag(torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)) + torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64)
    cov = [torch.from_numpy(np.cov(x.numpy(), rowvar=False, bias=True)) for x in (first, other)]
    expected = (other.mean(0) - first.mean(0)).square().sum() + (cov[1] - cov[0]).square().sum().sqrt()
    torch.testing.assert_close(critic.moment_distance(other), expected)
    for _ in range(1000):
        critic.see(second)
    assert critic.moment_distance(second) < 1e-3 < critic.moment_distance(first)


def test_moments_train_the_mapping_network():
    """Without any help of the critic, mean and spread of w come to those of the reals."""
    torch.manual_seed(1)
    game = new_game(slicing.W_SLICE, moment_weight=1.0, map_lr=1e-3)
    for param in game.critic.layers.parameters():
        param.zero_()
    phase = make_phases(game)[0]
    latents, real = new_batch(game)
    distances, reals = [], 0.3 * torch.randn(500, W_DIM, dtype=torch.float64) + 1
    for _ in range(400):
        game.critic.see(reals)
        phases.run_phase(phase, latents, real, N)
        with torch.no_grad():
            z = torch.randn(500, game.G.z_dim, dtype=torch.float64)
            distances.append(game.critic.moment_distance(game.critic.normalize(game.G.mapping(z, torch.zeros(500, 0))[:, 0])))
    assert distances[-1] < distances[0] / 3


@pytest.mark.parametrize('critic', ['wgan-gp', 'logistic'])
def test_loss_of_the_mapping_network(critic):
    """It wants higher scores, and moves w_avg as official training does; the critic's step does not."""
    reported = {}
    game = new_game(critic=critic, reported=reported)
    make_linear(game.critic)
    game.critic.requires_grad_(False)
    latents, real = new_batch(game)
    w_avg = game.G.mapping.w_avg.clone()
    with torch.no_grad():
        score = game.critic(game.G.mapping(latents['z'], latents['c'], skip_w_avg_update=True)[:, 0], latents['c'])
    game.G.mapping.requires_grad_(True)
    game.g_main(latents, real, 1.0)
    torch.testing.assert_close(reported['Loss/scores/fake'][0], score)
    torch.testing.assert_close(reported['Loss/G/loss'][0], -score if critic == 'wgan-gp' else (1 + (-score).exp()).log())
    assert not torch.equal(w_avg, game.G.mapping.w_avg)
    w_avg = game.G.mapping.w_avg.clone()
    with torch.no_grad():
        for param in game.G.mapping.parameters():
            param -= 10 * param.grad
        higher = game.critic(game.G.mapping(latents['z'], latents['c'], skip_w_avg_update=True)[:, 0], latents['c'])
    assert higher.mean() > score.mean()
    game.critic.requires_grad_(True)
    game.d_main(latents, real, 1.0)
    assert torch.equal(w_avg, game.G.mapping.w_avg)


@pytest.mark.parametrize('architecture', ['skip', 'orig'])
def test_pairs_cost_nothing_where_g_makes_the_code(architecture):
    reported = {}
    game = new_game(architecture=architecture, w_jitter=0.0, w_anchor=0.0, reported=reported, dtype=torch.float32)
    latents, real = new_batch(game, dtype=torch.float32)
    with torch.no_grad():
        x, img = slicing.g_low(game.G, moved_w(game, real).unsqueeze(1).expand(-1, game.G.num_ws, -1), 8, noise_mode='const')
    real |= {'x': x} if img is None else {'x': x, 'img': img}
    params = [*game.G.synthesis.b8.parameters(), game.image_latents.offset]
    for param in params:
        param.requires_grad_(True)
    game.g_pairs(latents, real, 1.0)
    assert float(reported['Loss/G/pairs'][0].abs().max()) < 1e-9
    assert max(float(param.grad.abs().max()) for param in params) < 1e-4

    # A difference e at one position of one image costs |S e|^2.
    e = torch.randn(len(game.metric))
    real['x'][0, :, 3, 5] += e[:8]
    if img is not None:
        real['img'][0, :, 3, 5] += e[8:]
    game.g_pairs(latents, real, 1.0)
    expected = torch.zeros(N)
    expected[0] = (game.metric @ e).square().sum() / (len(e) * 8 * 8)
    torch.testing.assert_close(reported['Loss/G/pairs'][1], expected, rtol=1e-4, atol=1e-6)
    size = game.image_latents.offset.grad.abs().amax(dim=1)
    assert int(size.argmax()) == int(real['index'][0]) and float(size.max()) > 100 * float(size.sort().values[-2])


def test_anchor_holds_w_where_the_encoder_found_it():
    """Without pairs that pull (metric 0): w_anchor (w in standard deviations)^2, mean over batch and dimensions. One image is there twice."""
    game = new_game(w_jitter=0.0, w_anchor=0.5)
    game.metric.zero_()
    latents, real = new_batch(game)
    real['index'] = torch.tensor([3, 0, 7, 3, 11, 5, 1, 2])
    game.image_latents.requires_grad_(True)
    for gain in (1.0, 3.0):
        game.g_pairs(latents, real, gain)
    times = torch.tensor([1, 1, 1, 2, 0, 1, 0, 1, 0, 0, 0, 1])
    torch.testing.assert_close(game.image_latents.offset.grad, 4 * 0.5 * 2 * times[:, None] * game.image_latents.offset.detach() / (N * W_DIM))


@pytest.mark.parametrize('step', ['d_main', 'g_pairs'])
def test_jitter_is_in_standard_deviations_of_the_source(monkeypatch, step):
    """Around w as moved by the offset, for critic and synthesis blocks alike."""
    game, num = new_game(4, w_jitter=0.5, critic='wgan-gp'), 4000
    latents, real = new_batch(game, num)
    real |= {'w': real['w'][:1].expand(num, -1), 'index': torch.full([num], 7)}
    seen, penalty, g_low = [], losses.gradient_penalty, slicing.g_low
    monkeypatch.setattr(losses, 'gradient_penalty', lambda critic, real, fake: (
        seen.append(real * game.critic.std + game.critic.mean), penalty(critic, real, fake))[1])
    monkeypatch.setattr(slicing, 'g_low', lambda G, ws, *args, **kwargs: (seen.extend(ws.unbind(1)), g_low(G, ws, *args, **kwargs))[1])
    game.critic.requires_grad_(True)
    game.image_latents.requires_grad_(True)
    getattr(game, step)(latents, real, 1.0)
    assert len(seen) == (1 if step == 'd_main' else game.G.num_ws) and all(torch.equal(w, seen[0]) for w in seen)
    w = seen[0].detach()
    torch.testing.assert_close(w.std(dim=0), 0.5 * game.critic.std, rtol=0.1, atol=0)
    torch.testing.assert_close(w.mean(dim=0), moved_w(game, real)[0], rtol=0, atol=0.06)
    assert float(torch.corrcoef(w.T).fill_diagonal_(0).abs().max()) < 0.1


# The phases


@pytest.mark.parametrize('critic', ['wgan-gp', 'logistic'])
@pytest.mark.parametrize('res', [2, 4, 8])
@pytest.mark.parametrize('architecture', ['skip', 'resnet'])
def test_each_phase_moves_its_own_parameters_alone(res, critic, architecture):
    game = new_game(res, critic=critic, architecture=architecture, dtype=torch.float32)
    latents, real = new_batch(game, dtype=torch.float32)
    nets = {'G': game.G, **game.modules}
    named = {f'{key}.{name}': param for key, net in nets.items() for name, param in net.named_parameters()}
    expected = {'Gmain': {name for name in named if name.startswith('G.mapping.')},
                'Gpairs': {'image_latents.offset', *(name for name in named if name.startswith('G.synthesis.') and slicing.is_low_res(name, res))},
                'Dmain': {name for name in named if name.startswith('critic.')}}
    if res == slicing.W_SLICE:
        del expected['Gpairs']
    found = {phase.name: phase for phase in make_phases(game)}
    assert list(found) == list(expected)
    for name, phase in found.items():
        before = {key: param.clone() for key, param in named.items()}
        assert sorted(map(id, phase.params)) == sorted(id(named[key]) for key in expected[name])
        for param in named.values():
            param.grad = None
        phases.run_phase(phase, latents, real, 4)
        assert {key for key, param in named.items() if param.grad is not None} == expected[name]
        moved = {key for key, param in named.items() if not torch.equal(param, before[key])}
        assert moved == expected[name] - ({'critic.layers.6.bias'} if critic == 'wgan-gp' and game.options.drift_weight == 0 else set())
        assert not any(param.requires_grad for param in named.values())


def test_intervals_rates_and_gains():
    """The loss of a phase that runs every n-th step is not multiplied by n: n_critic is no lazy regularisation."""
    for critic, n_critic in [('wgan-gp', 3), ('logistic', 1)]:
        game = new_game(c_dim=2, critic=critic, n_critic=3, map_lr=0.5, pair_lr=0.25, w_lr=0.125)
        found = make_phases(game)
        assert [(phase.name, phase.interval, phase.gain) for phase in found] == [('Gmain', n_critic, 1.0), ('Gpairs', 1, 1.0), ('Dmain', 1, 1.0)]
        assert len({phase.optimizer_name for phase in found}) == 3
        params = list(itertools.chain.from_iterable(phase.params for phase in found))
        assert len({id(param) for param in params}) == len(params)
        rates = {id(p): group['lr'] for phase in found for group in phase.optimizer.param_groups for p in group['params']}
        mapping = game.G.mapping
        assert rates[id(mapping.fc0.weight)] == rates[id(mapping.fc1.bias)] == pytest.approx(0.5 / 0.01)  # stored times 1 / 0.01
        assert rates[id(mapping.embed.weight)] == rates[id(next(game.critic.parameters()))] == 0.5
        assert (rates[id(game.G.synthesis.b4.const)], rates[id(game.image_latents.offset)]) == (0.25, 0.125)


def test_mapping_rate_is_that_of_effective_weights():
    """The first step of Adam moves each weight that the layer multiplies with by about map_lr."""
    game = new_game(critic='logistic', map_lr=0.01, dtype=torch.float32)
    layer, phase = game.G.mapping.fc1, make_phases(game)[0]
    before = layer.weight * layer.weight_gain, layer.bias * 0.01
    phases.run_phase(phase, *new_batch(game, dtype=torch.float32), N)
    steps = (layer.weight * layer.weight_gain - before[0]).abs() * layer.weight.shape[1] ** 0.5, (layer.bias * 0.01 - before[1]).abs()
    for step in steps:
        assert float(step.median()) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize('batch_gpu', [4, 2])
def test_an_image_that_is_not_in_the_batch_stays_where_it_is(batch_gpu):
    """Bit for bit, also when it has been moving; the images of the batch move in every step, first of all by w_lr."""
    game = new_game(w_lr=0.03, dtype=torch.float32)
    phase = {phase.name: phase for phase in make_phases(game)}['Gpairs']
    offset = game.image_latents.offset
    for step, index in enumerate([[3, 0, 7, 10], [3, 0, 7, 10], [1, 2, 4, 5], [4, 4, 11, 10], [1, 2, 5, 11]]):
        latents, real = new_batch(game, 4, torch.float32)
        before = offset.clone()
        phases.run_phase(phase, latents, real | {'index': torch.tensor(index)}, batch_gpu)
        moved = offset != before
        assert moved.any(dim=1).nonzero()[:, 0].tolist() == sorted(set(index))
        assert moved[index].all()
        if step == 0:
            torch.testing.assert_close((offset - before)[index].abs(), torch.full([4, W_DIM], 0.03), rtol=1e-3, atol=0)


# What it is for


def prepared_of(w, source, metric=None, res=slicing.W_SLICE):
    """Codes with these w, and source latents w [M, W_DIM] for the statistics."""
    statistics = types.SimpleNamespace(mean=source.mean(dim=0), std=source.std(dim=0))
    return types.SimpleNamespace(encoder=types.SimpleNamespace(to_w=statistics), codes=range(len(w)), metric=metric, res=res)


@torch.no_grad()
def ws_of(G, c, seed):
    z = torch.randn(len(c), G.z_dim, generator=torch.Generator().manual_seed(seed))
    return G.mapping(z, c, skip_w_avg_update=True)[:, 0]


@pytest.mark.parametrize('critic', ['wgan-gp', 'logistic'])
@pytest.mark.parametrize('c_dim', [0, 2])
def test_w_moves_towards_the_targets(critic, c_dim):
    """Those of another mapping network. The distance of the means of each class, in standard deviations of the source, falls to less than half."""
    G, other = (tiny.generator(c_dim=c_dim, seed=seed).train() for seed in (0, 1))
    classes = torch.eye(2) if c_dim else torch.zeros(1, 0)
    c = classes.repeat(400, 1)
    source, w = ws_of(G, c, 0), ws_of(other, c, 1)
    options = CodeOptions(critic=critic, n_critic=1, w_jitter=0.1, map_lr=3e-3)
    game = make_game(G, prepared_of(w, source), options, lambda name, value: None, {})
    found = make_phases(game)
    goals = [w[(c == label).all(dim=1)].mean(dim=0) for label in classes]

    def distances():
        found = [ws_of(G, label.expand(1000, -1), 2).mean(dim=0) for label in classes]
        return [float(((mean - goal) / source.std(dim=0)).norm()) for mean, goal in zip(found, goals, strict=True)]

    before = distances()
    for _ in range(200):
        for phase in found:
            index = torch.randint(len(c), [32])
            phases.run_phase(phase, game.draw(c[torch.randint(len(c), [32])]), {'index': index, 'w': w[index], 'c': c[index]}, 32)
    after = distances()
    assert min(before) > 1 and all(b < 0.5 * a for a, b in zip(before, after, strict=True)), (before, after)
    assert not game.image_latents.offset.any()  # at slice w, w stays


def test_images_get_the_w_from_which_they_are_made():
    """The encoder was off by half a standard deviation; synthesis blocks that make the codes stay."""
    G, num = tiny.generator(), 64
    true = ws_of(G, torch.zeros(num, 0), 1)
    x, img = slicing.g_low(G, true.unsqueeze(1).expand(-1, G.num_ws, -1), 8, noise_mode='const')
    source = ws_of(G, torch.zeros(400, 0), 0)
    error = 0.5 * torch.randn(num, W_DIM)
    w = true + error * source.std(dim=0)
    options = CodeOptions(w_jitter=0.0, w_anchor=0.0, pair_lr=0.0, w_lr=1e-2)
    game = make_game(G, prepared_of(w, source, torch.eye(11), 8), options, lambda name, value: None, {'noise_mode': 'const'})
    phase = {phase.name: phase for phase in make_phases(game)}['Gpairs']
    for _ in range(300):
        index = torch.randperm(num)[:32]
        real = {'index': index, 'w': w[index], 'x': x[index], 'img': img[index], 'c': torch.zeros(32, 0)}
        phases.run_phase(phase, game.draw(real['c']), real, 32)
    assert float((game.image_latents.offset + error).norm() / error.norm()) < 0.25


@pytest.mark.parametrize('res', [2, 8])
def test_a_new_game_measures_w_in_units_of_the_source(res):
    """Those of the targets would blow up dimensions in which their codes are alike."""
    G = tiny.generator()
    source = ws_of(G, torch.zeros(400, 0), 0)
    w = 0.5 * torch.randn(30, W_DIM) + 2
    w[:, 2] = 1.0
    metric = None if res == slicing.W_SLICE else torch.eye(11)
    game = make_game(G, prepared_of(w, source, metric, res), CodeOptions(), lambda name, value: None, {})
    torch.testing.assert_close(game.critic.normalize(source).mean(dim=0), torch.zeros(W_DIM), rtol=0, atol=1e-4)
    torch.testing.assert_close(game.critic.normalize(source).std(dim=0), torch.ones(W_DIM))
    p = (w - source.mean(dim=0)) / source.std(dim=0)
    torch.testing.assert_close(game.critic(w, torch.zeros(30, 0)), game.critic.score(p, torch.zeros(30, 0)), rtol=1e-4, atol=1e-5)
    assert torch.equal(game.image_latents.offset, torch.zeros(30, W_DIM))
    assert not any(param.requires_grad for net in game.modules.values() for param in net.parameters())
    assert game.modules == {'critic': game.critic, 'image_latents': game.image_latents} and game.res == res and game.metric is metric
    latents = game.draw(torch.zeros(5, 0))
    assert latents['z'].shape == (5, 6) and latents['c'].shape == (5, 0)


def test_conditional_critic_looks_at_the_label():
    critic = Critic(W_DIM, 3)
    w = torch.randn(4, W_DIM)
    scores = [critic(w, torch.eye(3)[i].expand(4, 3)) for i in range(3)]
    assert scores[0].shape == (4, 1) and not torch.allclose(scores[0], scores[1]) and not torch.allclose(scores[1], scores[2])
    assert code_game.Critic(W_DIM, 0)(w, torch.zeros(4, 0)).shape == (4, 1)

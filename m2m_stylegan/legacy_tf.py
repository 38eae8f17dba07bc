"""Networks of TensorFlow pickles (stylegan2 and stylegan2-ada, version 4 and 5) converted to ours.

TensorFlow keeps dense weights as [in, out], convolutions as [h, w, in, out], and convolves where torch correlates when it upsamples.
"""

import re
import warnings
from collections.abc import Callable

import numpy as np
import torch

from m2m_stylegan import networks
from m2m_stylegan.errors import UserError
from m2m_stylegan.network_kwargs import OPTIONS, STRUCTURE, printable, show
from m2m_stylegan.pickles import TFNetwork

MIN_VERSION = 4
MAX_LAYERS = 100
MAX_COMPONENTS = 10     # per network; the real ones have two, and nest once


def _positive(value: object) -> bool:
    return type(value) is int and 0 < value <= 2**20


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value <= 2**20


def _positive_or_none(value: object) -> bool:
    return value is None or _positive(value)


def _resolution(value: object) -> bool:
    return _positive(value) and 4 <= value <= 2**14 and value & (value - 1) == 0


def _layers(value: object) -> bool:
    return _count(value) and value <= MAX_LAYERS


def _taps(value: object) -> bool:
    return type(value) in (list, tuple) and 0 < len(value) <= 64 and all(type(tap) in (int, float) for tap in value)


# TensorFlow's constructor arguments: default, and what they may be.
COMMON = {
    'resolution': (1024, _resolution),
    'num_channels': (3, _positive),
    'label_size': (0, _count),
    'fmap_base': (16384, _positive),
    'fmap_max': (512, _positive),
    'num_fp16_res': (0, _count),
    'conv_clamp': (None, OPTIONS['conv_clamp']),
    'resample_kernel': ([1, 3, 3, 1], _taps),
    'nonlinearity': ('lrelu', OPTIONS['activation']),
    'mapping_fmaps': (None, _positive_or_none),
}
G_KWARGS = {
    **COMMON,
    'latent_size': (512, _positive),
    'dlatent_size': (512, _positive),
    'architecture': ('skip', STRUCTURE['architecture']),
    'use_noise': (True, STRUCTURE['use_noise']),
    'mapping_layers': (8, _layers),
    'mapping_lrmul': (0.01, OPTIONS['bias_gain']),
    'mapping_nonlinearity': ('lrelu', OPTIONS['activation']),
    'label_fmaps': (None, _positive_or_none),
    'w_avg_beta': (0.995, OPTIONS['w_avg_beta']),
}
D_KWARGS = {
    **COMMON,
    'architecture': ('resnet', STRUCTURE['architecture']),
    'mapping_layers': (0, _layers),
    'mapping_lrmul': (0.1, OPTIONS['bias_gain']),
    'mbstd_group_size': (None, OPTIONS['group_size']),
    'mbstd_num_features': (1, _count),
    'freeze_layers': (0, _count),
}
# Training and inference settings that leave no trace in the weights.
IGNORED = {'truncation_psi', 'truncation_cutoff', 'style_mixing_prob', 'structure', 'conditioning', 'fused_modconv'}

# Layers of a block; the generator's 4x4 block has a `Conv` instead of a `Conv1`.
G_LAYERS = {'const': 'Const', 'conv0': 'Conv0_up', 'conv1': 'Conv1', 'torgb': 'ToRGB', 'skip': 'Skip'}
D_LAYERS = {'fromrgb': 'FromRGB', 'conv0': 'Conv0', 'conv1': 'Conv1_down', 'skip': 'Skip', 'conv': 'Conv', 'fc': 'Dense0'}

Variables = dict[str, np.ndarray]


def convert(tree: tuple) -> tuple[networks.Generator, networks.Discriminator, networks.Generator]:
    """(G, D, Gs) of a TensorFlow pickle => G, D, G_ema: float32, CPU, eval mode, no gradients.

    Raises UserError that lists everything that is unsupported, missing or of the wrong shape.
    """
    if len(tree) != 3 or not all(isinstance(net, TFNetwork) for net in tree):
        raise UserError(f'this TensorFlow pickle holds {len(tree)} objects, expected the networks G, D and Gs')
    nets, problems = [], []
    for name, net, to_ours in zip(('G', 'D', 'Gs'), tree, (_generator, _discriminator, _generator), strict=True):
        try:
            nets.append(to_ours(net))
        except UserError as err:
            problems += [f'{name}: {problem}' for problem in str(err).split('\n')]
    if problems:
        raise UserError('This TensorFlow pickle cannot be converted:\n' + '\n'.join(f'  * {problem}' for problem in problems))
    G, D, G_ema = nets
    return G, D, G_ema


def _generator(net: TFNetwork) -> networks.Generator:
    tf = _arguments(net, G_KWARGS)
    variables, has_lods = _collect(net, tf['resolution'])
    label_fmaps = (tf['label_fmaps'] or tf['latent_size']) if tf['label_size'] else None
    kwargs = {
        'z_dim': tf['latent_size'], 'c_dim': tf['label_size'], 'w_dim': tf['dlatent_size'], 'img_resolution': tf['resolution'],
        'img_channels': tf['num_channels'],
        'mapping_kwargs': {
            'num_layers': tf['mapping_layers'], 'embed_features': label_fmaps, 'layer_features': tf['mapping_fmaps'],
            'activation': tf['mapping_nonlinearity'], 'lr_multiplier': tf['mapping_lrmul'],
            'w_avg_beta': 1 if tf['w_avg_beta'] is None else tf['w_avg_beta']},
        'synthesis_kwargs': {
            'channel_base': 2 * tf['fmap_base'], 'channel_max': tf['fmap_max'], 'num_fp16_res': tf['num_fp16_res'],
            'conv_clamp': tf['conv_clamp'], 'architecture': 'orig' if has_lods else tf['architecture'],
            'resample_filter': list(tf['resample_kernel']), 'use_noise': tf['use_noise'], 'activation': tf['nonlinearity']}}
    return _build(networks.Generator, kwargs, variables, _g_name, _g_array)


def _discriminator(net: TFNetwork) -> networks.Discriminator:
    tf = _arguments(net, D_KWARGS)
    variables, has_lods = _collect(net, tf['resolution'])
    # TensorFlow's default width of the label mapping is not torch's in small networks; the file knows it.
    output = variables.get('Output/weight')
    width = tf['mapping_fmaps'] or (None if output is None or output.ndim != 2 else output.shape[1])
    kwargs = {
        'c_dim': tf['label_size'], 'img_resolution': tf['resolution'], 'img_channels': tf['num_channels'],
        'architecture': 'orig' if has_lods else tf['architecture'], 'channel_base': 2 * tf['fmap_base'], 'channel_max': tf['fmap_max'],
        'num_fp16_res': tf['num_fp16_res'], 'conv_clamp': tf['conv_clamp'], 'cmap_dim': width,
        'block_kwargs': {
            'activation': tf['nonlinearity'], 'resample_filter': list(tf['resample_kernel']), 'freeze_layers': tf['freeze_layers']},
        'mapping_kwargs': {
            'num_layers': tf['mapping_layers'], 'embed_features': width, 'layer_features': width, 'activation': tf['nonlinearity'],
            'lr_multiplier': tf['mapping_lrmul']},
        'epilogue_kwargs': {
            'mbstd_group_size': tf['mbstd_group_size'], 'mbstd_num_channels': tf['mbstd_num_features'], 'activation': tf['nonlinearity']}}
    return _build(networks.Discriminator, kwargs, variables, _d_name, lambda name, array: _transposed(array))


def _arguments(net: TFNetwork, known: dict[str, tuple[object, Callable]]) -> dict[str, object]:
    """Constructor arguments of a TensorFlow network, with TensorFlow's defaults. Raises UserError, one problem a line."""
    version, given = net.state.get('version'), net.state.get('static_kwargs')
    if type(version) is not int or version < MIN_VERSION:
        raise UserError(f'it has format version {show(version)}, expected {MIN_VERSION} or newer: StyleGAN (1) and Progressive GAN are not supported')
    if not isinstance(given, dict):
        raise UserError(f'its static_kwargs are {show(given)}, expected a dict')
    problems = [f'argument {printable(str(name))}={show(value)} is not supported (configurations A to D and comparison methods are not)'
                for name, value in given.items() if name not in known and name not in IGNORED]
    problems += [f'argument {name} has the impossible value {show(given[name])}'
                 for name, (_default, is_valid) in known.items() if name in given and not is_valid(given[name])]
    if problems:
        raise UserError('\n'.join(problems))
    return {name: given.get(name, default) for name, (default, _is_valid) in known.items()}


def _collect(net: TFNetwork, resolution: int) -> tuple[Variables, bool]:
    """Variables of a network and its components by full name; whether it has RGB layers per level of detail, which get today's names."""
    found: Variables = {}
    _collect_into(found, net, '', depth=0)
    variables = {re.sub(r'\b(ToRGB|FromRGB)_lod([0-9]{1,2})\b', lambda m: '{0}x{0}/'.format(resolution >> int(m[2])) + m[1], name): array
                 for name, array in found.items()}
    return variables, variables.keys() != found.keys()


def _collect_into(variables: Variables, net: object, prefix: str, depth: int) -> None:
    state = net.state if isinstance(net, TFNetwork) else {}
    own, components = state.get('variables'), state.get('components', {})
    if type(own) is not list or not isinstance(components, dict) or depth > 2 or len(components) > MAX_COMPONENTS:
        raise UserError(f'component {printable(prefix) or "(top)"} is not a network')
    for item in own:
        if type(item) is not tuple or len(item) != 2 or type(item[0]) is not str or type(item[1]) not in (np.ndarray, float):
            raise UserError(f'component {printable(prefix) or "(top)"} has variables that are not pairs of a name and an array')
        variables[prefix + item[0]] = np.asarray(item[1])
    for name, component in components.items():
        _collect_into(variables, component, f'{prefix}{name}/', depth + 1)


def _build(cls: type, kwargs: dict, variables: Variables, tf_name: Callable, to_ours: Callable) -> torch.nn.Module:
    """A network with the tensors that `tf_name(name)` finds and `to_ours(name, array)` transforms. Raises UserError, one problem a line."""
    with torch.device('meta'):  # Sizes in a file may be lies: nothing is allocated before the arrays were compared.
        expected = {name: tensor.shape for name, tensor in cls(**kwargs).state_dict().items() if not name.endswith('resample_filter')}
    names = {name: tf_name(name) for name in expected}
    problems, tensors = [], {}
    for name, shape in expected.items():
        array = variables.get(names[name])
        if array is None:
            problems.append(f'variable {names[name]} is missing')
        elif array.dtype.kind != 'f':
            problems.append(f'variable {names[name]} is of type {array.dtype}, expected float32')
        elif (ours := to_ours(name, array)).shape != shape:
            problems.append(f'variable {names[name]} has the shape {list(array.shape)}; {name} needs {list(shape)}, from it comes {list(ours.shape)}')
        else:
            tensors[name] = torch.from_numpy(np.array(ours, dtype=np.float32))
    if problems:
        raise UserError('\n'.join(problems))
    unused = [printable(name) for name in variables if name not in names.values() and not re.search(r'(RGB/\w+|\blod)$', name)]
    if unused:
        warnings.warn(f'TensorFlow {cls.__name__}: unused variables {", ".join(unused)}', stacklevel=2)
    with torch.random.fork_rng(devices=[]):
        net = cls(**kwargs)
    net.load_state_dict(tensors, strict=False)
    return net.eval().requires_grad_(False)


def _g_name(name: str) -> str:
    """Full TensorFlow name of one of our generator's tensors."""
    part, *path = name.split('.')
    if part == 'mapping':
        if path == ['w_avg']:
            return 'dlatent_avg'
        return f'mapping/{"LabelEmbed" if path[0] == "embed" else path[0].replace("fc", "Dense")}/{path[1]}'
    res, (layer, *path) = int(path[0][1:]), path[1:]
    if path == ['noise_const']:
        return f'synthesis/noise{2 * (res.bit_length() - 1) - (5 if layer == "conv0" else 4)}'
    tf_layer = 'Conv' if res == 4 and layer == 'conv1' else G_LAYERS[layer]
    return f'synthesis/{res}x{res}/{tf_layer}/{"_".join(path).replace("affine", "mod") or layer}'


def _d_name(name: str) -> str:
    """Full TensorFlow name of one of our discriminator's tensors."""
    block, layer, key = name.split('.')
    if block == 'mapping':
        return f'{"LabelEmbed" if layer == "embed" else layer.replace("fc", "Mapping")}/{key}'
    if layer == 'out':
        return f'Output/{key}'
    return f'{block[1:]}x{block[1:]}/{D_LAYERS[layer]}/{key}'


def _g_array(name: str, array: np.ndarray) -> np.ndarray:
    if name.endswith('noise_const'):
        return _without_axes(array, 2)
    if name.endswith('const'):
        return _without_axes(array, 1)
    if name.endswith('affine.bias'):
        return array + np.float32(1)  # There, the modulation adds the 1 that is the initial value of the bias here.
    if name.endswith('conv0.weight') and array.ndim == 4:  # These layers upsample; so do skips, but with 1x1 kernels.
        array = array[::-1, ::-1]  # [h, w, in, out]
    return _transposed(array)


def _without_axes(array: np.ndarray, count: int) -> np.ndarray:
    """Without the `count` first axes, if they have the extent 1."""
    return array.reshape(array.shape[count:]) if array.shape[:count] == (1,) * count else array


def _transposed(array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T  # [h, w, in, out] => [out, in, h, w]; [in, out] => [out, in]

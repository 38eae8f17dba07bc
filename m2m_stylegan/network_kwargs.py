"""What a recorded network is made of, and the constructor arguments of `networks.py` that make one like it.

Sizes are read from the shapes of the tensors and from which sub-modules exist, options from the attributes; the constructor arguments that
a file records play no part, because official files leave out defaults and the code bases disagree about those.
"""

import re
from collections.abc import Callable, Iterator

import torch

from m2m_stylegan.errors import UserError
from m2m_stylegan.ops import ACTIVATIONS, setup_filter
from m2m_stylegan.pickles import EasyDict, Record

DEFAULT_TAPS = [1, 3, 3, 1]


def is_number(value: object) -> bool:
    """An int or float of sane size, so not infinite or NaN; bool is neither."""
    return type(value) in (int, float) and -1e15 < value < 1e15


# Attributes that a network may change at any time, with what they may be.
OPTIONS: dict[str, Callable[[object], bool]] = {
    'activation': lambda value: type(value) is str and value in ACTIVATIONS,
    'act_gain': is_number,
    'weight_gain': is_number,
    'bias_gain': is_number,
    'conv_clamp': lambda value: value is None or (is_number(value) and value > 0),
    'use_fp16': lambda value: type(value) is bool,
    'channels_last': lambda value: type(value) is bool,
    'group_size': lambda value: value is None or (type(value) is int and value > 0),
    'w_avg_beta': lambda value: value is None or is_number(value),
}
# Attributes that select between structures.
STRUCTURE: dict[str, Callable[[object], bool]] = {
    'architecture': lambda value: type(value) is str and value in ('orig', 'skip', 'resnet'),
    'use_noise': lambda value: type(value) is bool,
    'img_channels': lambda value: type(value) is int and value > 0,
}


class Contents:
    """A network's record laid flat: records of its modules and its tensors (parameters and buffers alike) by dotted name, '' = itself."""

    def __init__(self, record: Record):
        self.modules: dict[str, Record] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.buffers: set[str] = set()
        seen: set[int] = set()
        for path, module in _walk('', record):
            # Shared records could describe 2^100 paths in a few hundred bytes.
            if path in self.modules or id(module) in seen:
                raise UserError(f'module {printable(path)} occurs twice')
            self.modules[path] = module
            seen.add(id(module))
            for table in ('_parameters', '_buffers'):
                for key, tensor in module.state[table].items():
                    self._add(join(path, key), tensor, table)

    def _add(self, name: str, tensor: torch.Tensor | None, table: str) -> None:
        if tensor is None:
            return
        if name in self.tensors:
            raise UserError(f'tensor {printable(name)} occurs twice')
        self.tensors[name] = tensor
        if table == '_buffers':
            self.buffers.add(name)

    def children(self, path: str, pattern: str) -> list[int]:
        """Sorted numbers in the names of those sub-modules of `path` that match `pattern`, which has one group of digits."""
        matches = (re.fullmatch(pattern, key) for key, module in self.modules[path].state['_modules'].items() if module is not None)
        return sorted(int(match[1]) for match in matches if match)

    def size(self, name: str, dim: int) -> int:
        """Extent of a tensor along `dim`; UserError if there is no such tensor or it is empty."""
        if name not in self.tensors:
            raise UserError(f'tensor {name} is missing')
        shape = self.tensors[name].shape
        if len(shape) <= dim or 0 in shape:
            raise UserError(f'tensor {name} has the impossible shape {list(shape)}')
        return shape[dim]

    def option(self, path: str, name: str, default: object) -> object:
        """Attribute `name` of a module if it exists; UserError if its value is impossible."""
        state = self.modules[path].state if path in self.modules else {}
        value = state.get(name, default)
        if not {**OPTIONS, **STRUCTURE}[name](value):
            raise UserError(f'{join(path, name)} has the impossible value {show(value)}')
        return value

    def resample_filter(self, path: str) -> list:
        """Taps for a constructor's resample_filter argument that make the buffer at `path`."""
        f = self.tensors.get(path)
        default = setup_filter(DEFAULT_TAPS)
        if f is None or (f.shape == default.shape and torch.allclose(f.float(), default)):
            return DEFAULT_TAPS
        if f.ndim not in (1, 2) or f.numel() == 0:
            raise UserError(f'tensor {path} has the impossible shape {list(f.shape)}')
        return f.tolist()


def _walk(path: str, record: Record) -> Iterator[tuple[str, Record]]:
    yield path, record
    for key, child in record.state['_modules'].items():
        if child is not None:
            yield from _walk(join(path, key), child)


def join(path: str, key: str) -> str:
    """Dotted name of the entry `key` of the module at `path`."""
    return f'{path}.{key}' if path else key


def printable(name: str) -> str:
    """A name from a file, harmless and short enough for a message."""
    return ascii(name[:200])[1:-1]


def show(value: object) -> str:
    """A value from a file, short enough for a message (printing nested shared lists could take forever)."""
    if type(value) in (list, tuple) and len(value) <= 20 and all(type(item) in (int, float) for item in value):
        return str(value)
    return repr(value)[:100] if value is None or type(value) in (bool, int, float, str) else f'a {type(value).__name__}'


def constructor_kwargs(contents: Contents) -> EasyDict:
    """Arguments for `networks.Generator` or `.Discriminator`, nested ones as EasyDict, all options explicit. Raises UserError."""
    return (_generator if contents.modules[''].class_name == 'Generator' else _discriminator)(contents)


def _generator(c: Contents) -> EasyDict:
    resolutions = _resolutions(c, 'synthesis')
    last = f'synthesis.b{resolutions[-1]}'
    channel_base, channel_max = _channel_limits({res: c.size(f'synthesis.b{res}.conv1.weight', 0) for res in resolutions})
    w_dim = c.size('synthesis.b4.conv1.affine.weight', 1)
    mapping = _mapping(c, w_dim)
    inputs = c.size('mapping.fc0.weight', 1) if mapping['num_layers'] else w_dim
    return EasyDict(
        z_dim=inputs - (mapping['embed_features'] or 0),
        c_dim=_label_dim(c),
        w_dim=w_dim,
        img_resolution=resolutions[-1],
        img_channels=c.size(f'{last}.torgb.weight', 0),
        mapping_kwargs=EasyDict(mapping, w_avg_beta=c.option('mapping', 'w_avg_beta', 0.995)),
        synthesis_kwargs=EasyDict(
            channel_base=channel_base,
            channel_max=channel_max,
            num_fp16_res=sum(c.option(f'synthesis.b{res}', 'use_fp16', False) for res in resolutions),
            conv_clamp=c.option('synthesis.b4.conv1', 'conv_clamp', None),
            architecture=c.option('synthesis.b4', 'architecture', 'skip'),
            resample_filter=c.resample_filter(f'{last}.resample_filter'),
            fp16_channels_last=any(c.option(f'synthesis.b{res}', 'channels_last', False) for res in resolutions),
            use_noise=c.option('synthesis.b4.conv1', 'use_noise', True),
            activation=c.option('synthesis.b4.conv1', 'activation', 'lrelu'),
            kernel_size=c.size('synthesis.b4.conv1.weight', 2),
        ),
    )


def _discriminator(c: Contents) -> EasyDict:
    resolutions = _resolutions(c, '')
    blocks, last = resolutions[:0:-1], f'b{resolutions[-1]}'
    channels = {res: c.size(f'b{res}.conv0.weight', 0) for res in blocks}
    channels[4] = c.size('b4.fc.weight', 0)
    channel_base, channel_max = _channel_limits(channels)
    c_dim = _label_dim(c)
    mapping = _mapping(c, c.size('b4.out.weight', 0)) if c_dim else {}
    mbstd_num_channels = c.size('b4.conv.weight', 1) - channels[4]
    if mbstd_num_channels < 0:
        raise UserError(f'b4.conv takes {c.size("b4.conv.weight", 1)} channels, expected at least the {channels[4]} of b4.fc')
    return EasyDict(
        c_dim=c_dim,
        img_resolution=resolutions[-1],
        img_channels=c.size(f'{last}.fromrgb.weight', 1) if f'{last}.fromrgb.weight' in c.tensors else c.option('', 'img_channels', None),
        architecture=c.option('b4', 'architecture', 'resnet'),
        channel_base=channel_base,
        channel_max=channel_max,
        num_fp16_res=sum(c.option(f'b{res}', 'use_fp16', False) for res in blocks),
        conv_clamp=c.option('b4.conv', 'conv_clamp', None),
        cmap_dim=c.size('b4.out.weight', 0) if c_dim else None,
        block_kwargs=EasyDict(
            activation=c.option(f'{last}.conv0', 'activation', 'lrelu'),
            resample_filter=c.resample_filter(f'{last}.resample_filter'),
            fp16_channels_last=any(c.option(f'b{res}', 'channels_last', False) for res in blocks),
            freeze_layers=_frozen_layers(c, blocks),
        ),
        mapping_kwargs=EasyDict(mapping),
        epilogue_kwargs=EasyDict(
            mbstd_group_size=c.option('b4.mbstd', 'group_size', 4),
            mbstd_num_channels=mbstd_num_channels,
            activation=c.option('b4.conv', 'activation', 'lrelu'),
        ),
    )


def _resolutions(c: Contents, path: str) -> list[int]:
    if path not in c.modules:
        raise UserError(f'module {path} is missing')
    found = c.children(path, r'b([0-9]{1,6})')
    if not found or found != [4 * 2**i for i in range(len(found))]:
        raise UserError(f'it consists of blocks of the resolutions {found}, expected 4, 8, 16 and so on')
    return found


def _channel_limits(channels: dict[int, int]) -> tuple[int, int]:
    """The smallest channel_base and channel_max that give these channels per resolution."""
    channel_base, channel_max = max(res * num for res, num in channels.items()), max(channels.values())
    if any(min(channel_base // res, channel_max) != num for res, num in channels.items()):
        raise UserError(f'its numbers of channels per resolution follow no channel_base and channel_max: {dict(sorted(channels.items()))}')
    return channel_base, channel_max


def _label_dim(c: Contents) -> int:
    return c.size('mapping.embed.weight', 1) if 'mapping.embed' in c.modules else 0


def _mapping(c: Contents, w_dim: int) -> dict:
    if 'mapping' not in c.modules:
        raise UserError('module mapping is missing')
    num_layers = len(c.children('mapping', r'fc([0-9]{1,6})'))
    return {
        'num_layers': num_layers,
        'embed_features': c.size('mapping.embed.weight', 0) if 'mapping.embed' in c.modules else None,
        'layer_features': c.size('mapping.fc0.weight', 0) if num_layers > 1 else w_dim,
        'activation': c.option('mapping.fc0', 'activation', 'lrelu'),
        'lr_multiplier': c.option('mapping.fc0', 'bias_gain', 0.01),
    }


def _frozen_layers(c: Contents, blocks: list[int]) -> int:
    """How many layers, from the image side, have their weights among the buffers (FreezeD)."""
    layers = [name for res in blocks for name in (f'b{res}.{layer}' for layer in ('fromrgb', 'conv0', 'conv1', 'skip')) if name in c.modules]
    frozen = [f'{layer}.weight' in c.buffers for layer in layers]
    return frozen.index(False) if False in frozen else len(frozen)

"""Network pickles for the host's scripts: read by our reader, handed over as objects of the host's own classes. Nothing in a file is executed."""

import importlib
import os
from collections import OrderedDict
from typing import BinaryIO

import torch

from m2m_stylegan import legacy_tf, network_records, pickles
from m2m_stylegan.errors import UserError
from m2m_stylegan.host_revisions import ADA
from m2m_stylegan.pickles import EasyDict, Record, TFNetwork

HOW_TO_TRUST = ('If you know where the file comes from, --trust-pickles (in a patched checkout M2M_TRUST_PICKLES=1) opens it as the official code '
                'does, which executes what is in it.')


class Unpickler:
    """Stands in for the host's unpickler: `Unpickler(flavour, file).load()`."""

    def __init__(self, flavour: str, file: BinaryIO):
        self.flavour = flavour
        self.file = file

    def load(self) -> object:
        """What the host gets for the file: data as it is, persistent objects as the host's own.

        StyleGAN2 networks are checked as in `snapshots.load` and come in the host's classes whatever code base wrote them, legacy TensorFlow
        ones included. Other objects (augmentation pipe, alias-free generator) keep the recorded attributes; their class must be the host's.
        Raises UserError.
        """
        try:
            tree = pickles.load(self.file.read())
            objects = _HostObjects(self.flavour)
            if isinstance(tree, tuple) and any(isinstance(net, TFNetwork) for net in tree):
                return {name: objects.network(net) for name, net in zip(('G', 'D', 'G_ema'), legacy_tf.convert(tree), strict=True)}
            return objects.value(tree)
        except (UserError, network_records.Mismatch) as err:
            raise UserError(f'{getattr(self.file, "name", "The file")}: {err}\n{HOW_TO_TRUST}') from err


def load_into(cls: type, path: str | os.PathLike, arguments: dict[str, str]) -> object:
    """An object of the host's class `cls` with the attributes that a pickle of plain data holds; `arguments`: constructor argument => attribute."""
    attributes = pickles.load(path)
    if not isinstance(attributes, dict):
        raise UserError(f'{path} does not hold the attributes of a {cls.__name__}. Delete it.')
    result = cls(**{name: attributes.get(attribute) for name, attribute in arguments.items()})
    vars(result).update(attributes)
    return result


class _HostObjects:
    """Makes the host's objects out of trees."""

    def __init__(self, flavour: str):
        self.flavour = flavour
        self.made: dict[int, tuple] = {}  # by id of what it was made from (kept, so that the id is): some hundred bytes can name 2^100 paths

    def value(self, value: object) -> object:
        """A tree with the host's objects in place of records, and its EasyDicts."""
        if id(value) not in self.made:
            self.made[id(value)] = value, self._made(value)
        return self.made[id(value)][1]

    def _made(self, value: object) -> object:
        if isinstance(value, Record):
            return self.network(network_records.build(value)) if _is_stylegan2(value) else self.object(value, value.class_name == 'Generator')
        if isinstance(value, EasyDict):
            return importlib.import_module('dnnlib').EasyDict((key, self.value(item)) for key, item in value.items())
        if isinstance(value, dict):
            return type(value)((key, self.value(item)) for key, item in value.items())
        return type(value)(self.value(item) for item in value) if type(value) in (list, tuple) else value

    def network(self, net: torch.nn.Module) -> torch.nn.Module:
        """The same network in the host's class: constructed with explicit arguments, then given the tensors, all of which must fit."""
        kwargs = network_records.constructor_kwargs(net)
        if self.flavour != ADA:  # stylegan3 takes the options of the synthesis network one level higher
            kwargs |= kwargs.pop('synthesis_kwargs', {})
        result = self.class_of(type(net).__name__, False)(**{key: self.value(item) for key, item in kwargs.items()})
        result.load_state_dict(net.state_dict())
        return result.eval().requires_grad_(False)

    def object(self, record: Record, alias_free: bool) -> torch.nn.Module:
        """An object with the recorded attributes, made without calling the constructor, as the host would."""
        cls = self.class_of(record.class_name, alias_free)
        modules = OrderedDict((key, None if child is None else self.object(child, alias_free)) for key, child in record.state['_modules'].items())
        result = cls.__new__(cls)
        result.__setstate__({**{key: self.value(item) for key, item in record.state.items() if key != '_modules'}, '_modules': modules})
        return result

    def class_of(self, name: str, alias_free: bool) -> type:
        """The host's class of this name. Raises UserError."""
        if alias_free and self.flavour == ADA:
            raise UserError('it holds an alias-free StyleGAN3 generator, which needs a checkout of stylegan3.')
        networks = 'training.networks' if self.flavour == ADA else f'training.networks_stylegan{3 if alias_free else 2}'
        module = importlib.import_module('training.augment' if name == 'AugmentPipe' else networks)
        cls = getattr(module, name, None)
        if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
            raise UserError(f'it holds an object of the class {name[:100]!a}, and {module.__name__} of this checkout has no such network.')
        return cls


def _is_stylegan2(record: Record) -> bool:
    synthesis = record.state['_modules'].get('synthesis')
    return record.class_name in ('Generator', 'Discriminator') and not (isinstance(synthesis, Record) and 'input' in synthesis.state['_modules'])

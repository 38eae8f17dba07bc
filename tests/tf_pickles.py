"""Pickles like those of the TensorFlow code bases, from the recorded networks in tests/golden/tf_mapping.npz."""

import pickle
import sys
import types
from unittest import mock

import golden

VECTORS = golden.load('tf_mapping')


class Network:
    """Stands for the class whose name TensorFlow pickles refer to."""

    def __init__(self, state: dict):
        self.state = state

    def __getstate__(self) -> dict:
        return self.state


Network.__module__ = 'dnnlib.tflib.network'


def network(name: str, static_kwargs: dict | None = None, version: int = 5) -> Network:
    """The recorded TensorFlow network `name`, with changed constructor arguments if given."""
    prefix = f'{name}/tf/'
    arrays = {key.removeprefix(prefix): value for key, value in VECTORS.arrays.items() if key.startswith(prefix)}
    kwargs = VECTORS.json(f'{name}/static_kwargs') if static_kwargs is None else static_kwargs
    parts = ('mapping', 'synthesis') if name.startswith('g_') else ()
    components = {part: {key.removeprefix(f'{part}/'): value for key, value in arrays.items() if key.startswith(f'{part}/')} for part in parts}
    own = {key: value for key, value in arrays.items() if key.partition('/')[0] not in parts}
    return Network(state(name, version, kwargs, own, {part: Network(state(part, version, {}, its, {})) for part, its in components.items()}))


def state(name: str, version: int, static_kwargs: dict, variables: dict, components: dict) -> dict:
    return {'version': version, 'name': name, 'static_kwargs': static_kwargs, 'components': components, 'build_module_src': '',
            'build_func_name': '', 'variables': list(variables.items()), 'input_shapes': [], 'output_shapes': [], 'input_names': [],
            'output_names': []}


def dumps(root: object) -> bytes:
    modules = {name: types.ModuleType(name) for name in ('dnnlib', 'dnnlib.tflib', Network.__module__)}
    modules[Network.__module__].Network = Network
    with mock.patch.dict(sys.modules, modules):
        return pickle.dumps(root, protocol=3).replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n')  # as NumPy 1 did

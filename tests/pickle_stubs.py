"""Stand-ins for the official modules, for pickling and unpickling with Python's own pickle and torch's own reductions."""

import contextlib
import pickle
import sys
from types import ModuleType

NAMES = ('torch_utils', 'torch_utils.persistence', 'dnnlib', 'dnnlib.util', 'dnnlib.tflib', 'dnnlib.tflib.network')


class EasyDict(dict):
    pass


class Network:
    """Like the TensorFlow original: made without its constructor, then given its state."""

    def __getstate__(self):
        return self.state

    def __setstate__(self, state):
        self.state = state


class Persistent:
    """A persistent object on either side: pickled from `meta`, and what the official function makes of `meta`."""

    def __init__(self, meta):
        self.meta = meta

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def _reconstruct_persistent_obj(meta):
    return Persistent(meta)


EasyDict.__module__ = 'dnnlib.util'
Network.__module__ = 'dnnlib.tflib.network'
_reconstruct_persistent_obj.__module__ = 'torch_utils.persistence'


@contextlib.contextmanager
def official_modules():
    """Put the stand-ins into sys.modules under the official names for a while."""
    modules = {name: ModuleType(name) for name in NAMES}
    modules['torch_utils.persistence']._reconstruct_persistent_obj = _reconstruct_persistent_obj
    modules['dnnlib.util'].EasyDict = EasyDict
    modules['dnnlib.tflib.network'].Network = Network
    assert not set(NAMES) & set(sys.modules)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in NAMES:
            del sys.modules[name]


def real_dumps(tree, protocol: int) -> bytes:
    """The bytes that Python's pickler and torch write for `tree`."""
    with official_modules():
        return pickle.dumps(tree, protocol)


def real_loads(data: bytes):
    """What Python's unpickler and torch read from bytes that we trust."""
    with official_modules():
        return pickle.loads(data)


def module_state(parameters=(), buffers=(), modules=(), table=dict, **attributes) -> dict:
    """The instance dictionary of a torch module, with `attributes` beside its three tables."""
    return {'training': False, '_parameters': table(parameters), '_buffers': table(buffers), '_modules': table(modules), **attributes}


def persistent(class_name: str, module_src: str, state: dict, **fields) -> Persistent:
    return Persistent({'type': 'class', 'version': 6, 'module_src': module_src, 'class_name': class_name, 'state': state, **fields})


def tf_network(state: dict) -> Network:
    network = Network()
    network.state = state
    return network

"""Objects that carry the source text of their class in their pickle; loading one executes that text."""

import inspect
import sys
import types

_modules = {}


def persistent_class(cls):
    class Persistent(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = args, kwargs

        @property
        def init_kwargs(self):
            return self._init_kwargs

        def __reduce__(self):
            source = inspect.getsource(sys.modules[cls.__module__])
            _modules.setdefault(source, sys.modules[cls.__module__])
            return _reconstruct_persistent_obj, (
                {'type': 'class', 'version': 6, 'module_src': source, 'class_name': cls.__name__, 'state': vars(self)},)

    Persistent.__name__ = cls.__name__
    return Persistent


def _reconstruct_persistent_obj(meta):
    source = meta['module_src']
    if source not in _modules:
        _modules[source] = types.ModuleType('_from_pickle')
        sys.modules['_from_pickle'] = _modules[source]
        exec(source, vars(_modules[source]))
    cls = getattr(_modules[source], meta['class_name'])
    result = cls.__new__(cls)
    result.__setstate__(meta['state'])
    return result

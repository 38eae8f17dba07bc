"""What every script uses. Imports what today's environments may lack."""

import importlib
from distutils.util import strtobool

import requests


class EasyDict(dict):
    """A dict whose items are attributes, too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    __setattr__ = dict.__setitem__


def open_url(url, verbose=True, return_filename=False):
    if '://' in url:
        return requests.get(url).raw
    return url if return_filename else open(url, 'rb')


def construct_class_by_name(*args, class_name, **kwargs):
    module, name = class_name.rsplit('.', 1)
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


def as_bool(text):
    return bool(strtobool(text))

"""Compiles plugins, and looks for them by name."""

import importlib

import torch
import torch.utils.cpp_extension


def get_plugin(name, sources):
    torch.utils.cpp_extension.load(name=name, sources=sources)
    return importlib.import_module(name)

"""One network and its record in a pickle: `build` makes a network from a record, `rewrite` and `embed` make records from a network."""

import dataclasses
import math
import warnings
from collections import OrderedDict

import torch

from m2m_stylegan import network_kwargs, networks
from m2m_stylegan.errors import UserError
from m2m_stylegan.network_kwargs import OPTIONS, Contents, join, printable, show
from m2m_stylegan.pickles import EasyDict, Record

CLASS_NAMES = frozenset(name for name, value in vars(networks).items() if isinstance(value, type) and issubclass(value, torch.nn.Module))

# Attributes of newer official classes that repeat a shape or choose between equal ways to compute.
REDUNDANT = frozenset({'in_features', 'out_features', 'in_channels', 'out_channels', 'w_dim', 'num_fp16_res', 'fused_modconv_default'})

# What torch 1.7 does not fill in by itself when it loads a module (torch/nn/modules/module.py, __setstate__).
HOOKS = ('_backward_hooks', '_forward_hooks', '_forward_pre_hooks', '_state_dict_hooks', '_load_state_dict_pre_hooks')


class Mismatch(Exception):
    """A record and a network that do not belong together; `problems` lists all differences."""

    def __init__(self, problems: list[str]):
        super().__init__('; '.join(problems))
        self.problems = problems


def build(record: Record) -> networks.Generator | networks.Discriminator:
    """The network that `record` describes: float32 on the CPU in memory of its own, eval mode, no gradients.

    Raises Mismatch with everything that is missing, superfluous or different from what `networks.py` can compute. Attributes that our
    classes do not know, or that the record lacks, and tensors with NaN or infinite values give a warning.
    """
    try:
        contents = Contents(record)
        if unknown := sorted({printable(module.class_name) for module in contents.modules.values()} - CLASS_NAMES):
            raise UserError(f'it consists of unknown classes: {", ".join(unknown)}')
        kwargs = network_kwargs.constructor_kwargs(contents)
        with torch.device('meta'):  # Sizes in a file may be lies: nothing is allocated before the tensors were compared.
            net = getattr(networks, record.class_name)(**kwargs)
    except ValueError as err:
        raise Mismatch([str(err)]) from err
    problems = _structure_problems(net, contents)
    for path, name, ours, theirs in _attribute_differences(net, contents):
        if name not in OPTIONS:
            problems.append(f'{join(path, name)} is {show(theirs)}, expected {show(ours)}')
        elif not OPTIONS[name](theirs):
            problems.append(f'{join(path, name)} has the impossible value {show(theirs)}')
        else:
            setattr(net.get_submodule(path), name, theirs)
    if problems:
        raise Mismatch(problems)
    _warn_about_attributes(net, contents)
    for name, tensor in contents.tensors.items():
        _place(net, name, tensor.detach().to(torch.float32, copy=True), name in contents.buffers)
    if bad := [name for name, tensor in net.state_dict().items() if not tensor.isfinite().all()]:
        warnings.warn(f'{record.class_name}: NaN or infinite values in {", ".join(bad)}', stacklevel=2)
    return net.eval().requires_grad_(False)


def rewrite(record: Record, net: torch.nn.Module) -> Record:
    """`record` with the tensors and options of `net`; source text, recorded arguments and parameter-or-buffer kinds stay the record's.

    Raises Mismatch if they differ in structure.
    """
    contents = Contents(record)
    differences = list(_attribute_differences(net, contents))
    problems = _structure_problems(net, contents)
    problems += [f'{join(path, name)} is {show(ours)}, in the record {show(theirs)}'
                 for path, name, ours, theirs in differences if not _is_option(record, name)]
    if problems:
        raise Mismatch(problems)
    changed: dict[str, dict] = {path: {} for path in contents.modules}
    for path, name, ours, _theirs in differences:
        changed[path][name] = ours
    return _rewritten(record, net, '', changed)


def _is_option(record: Record, name: str) -> bool:
    return record.class_name == 'AugmentPipe' or name in OPTIONS


def _rewritten(record: Record, module: torch.nn.Module, path: str, changed: dict[str, dict]) -> Record:
    state = {**record.state, **changed[path]}

    def replace(table, make):
        entries = state[table]
        state[table] = type(entries)((key, None if value is None else make(key, value)) for key, value in entries.items())

    replace('_parameters', lambda key, _old: _stored(getattr(module, key), True))
    replace('_buffers', lambda key, _old: _stored(getattr(module, key), False))
    replace('_modules', lambda key, child: _rewritten(child, getattr(module, key), join(path, key), changed))
    return dataclasses.replace(record, state=state)


def embed(net: torch.nn.Module, module_src: str) -> Record:
    """A record of `net` whose classes are defined in the source text `module_src`."""
    record = _embedded(net, module_src)
    if isinstance(net, (networks.Generator, networks.Discriminator)):
        _record_arguments(record)
    else:
        record.state['_init_kwargs'] = EasyDict(_attributes(record.state))
    return record


def _embedded(module: torch.nn.Module, module_src: str) -> Record:
    state = {
        'training': False,
        '_parameters': OrderedDict((key, None if value is None else _stored(value, True)) for key, value in module._parameters.items()),
        '_buffers': OrderedDict((key, None if value is None else _stored(value, False)) for key, value in module._buffers.items()),
        '_non_persistent_buffers_set': set(),
        **{name: OrderedDict() for name in HOOKS},
        '_is_full_backward_hook': None,
        '_modules': OrderedDict((key, _embedded(child, module_src)) for key, child in module.named_children()),
        **_attributes(vars(module)),
        '_init_args': (),
        '_init_kwargs': EasyDict(),
    }
    return Record(class_name=type(module).__name__, module_src=module_src, state=state)


def _record_arguments(record: Record) -> None:
    """Note the constructor arguments, for tools that make a network anew with `type(net)(**net.init_kwargs)`."""
    kwargs = network_kwargs.constructor_kwargs(Contents(record))
    record.state['_init_kwargs'] = kwargs
    modules = record.state['_modules']
    if record.class_name == 'Generator':
        sizes = EasyDict((key, kwargs[key]) for key in ('w_dim', 'img_resolution', 'img_channels'))
        modules['synthesis'].state['_init_kwargs'] = EasyDict(sizes, **kwargs['synthesis_kwargs'])
    if 'mapping' in modules:
        sizes = EasyDict((key, modules['mapping'].state[key]) for key in ('z_dim', 'c_dim', 'w_dim', 'num_ws', 'w_avg_beta'))
        modules['mapping'].state['_init_kwargs'] = EasyDict(sizes, **kwargs['mapping_kwargs'])


def constructor_kwargs(net: networks.Generator | networks.Discriminator) -> dict:
    """Arguments with which `type(net)(**kwargs)` has the same structure and options, all explicit."""
    return network_kwargs.constructor_kwargs(Contents(_embedded(net, '')))


def _attributes(state: dict) -> dict:
    """A module's own attributes: torch's and the persistence layer's begin with an underscore, except `training`."""
    return {name: value for name, value in state.items() if type(name) is str and not name.startswith('_') and name != 'training'}


def _stored(tensor: torch.Tensor, is_parameter: bool) -> torch.Tensor:
    tensor = tensor.detach().to('cpu', torch.float32)
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _place(net: torch.nn.Module, name: str, tensor: torch.Tensor, is_buffer: bool) -> None:
    path, _, key = name.rpartition('.')
    module = net.get_submodule(path)
    if is_buffer:
        module._parameters.pop(key, None)
        module._buffers[key] = tensor
    else:
        module._buffers.pop(key, None)
        module._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)


def _structure_problems(net: torch.nn.Module, contents: Contents) -> list[str]:
    modules = dict(net.named_modules())
    tensors = dict([*net.named_parameters(), *net.named_buffers()])
    problems = [f'module {path} is missing' for path in modules if path not in contents.modules]
    problems += [f'module {printable(path)} is unexpected' for path in contents.modules if path not in modules]
    problems += [f'tensor {name} {list(tensor.shape)} is missing' for name, tensor in tensors.items() if name not in contents.tensors]
    for path, module in modules.items():
        found = contents.modules[path].class_name if path in contents.modules else type(module).__name__
        if found != type(module).__name__:
            problems.append(f'module {path} is a {printable(found)}, expected a {type(module).__name__}')
    for name, tensor in contents.tensors.items():
        if name not in tensors:
            problems.append(f'tensor {printable(name)} {list(tensor.shape)} is unexpected')
        elif tensor.shape != tensors[name].shape:
            problems.append(f'tensor {name} has the shape {list(tensor.shape)}, expected {list(tensors[name].shape)}')
        elif not tensor.is_floating_point():
            problems.append(f'tensor {name} is {tensor.dtype}, expected a floating-point type')
    return problems


def _attribute_differences(net: torch.nn.Module, contents: Contents) -> list[tuple[str, str, object, object]]:
    """(module path, attribute, value in `net`, value in the record) wherever both exist and differ."""
    return [(path, name, ours, contents.modules[path].state[name])
            for path, module in net.named_modules() if path in contents.modules
            for name, ours in _attributes(vars(module)).items()
            if name in contents.modules[path].state and not _equal(ours, contents.modules[path].state[name])]


def _equal(ours: object, theirs: object) -> bool:
    if isinstance(ours, float) or type(theirs) is float:
        numbers = {int, float}
        return type(ours) in numbers and type(theirs) in numbers and math.isclose(ours, theirs, rel_tol=1e-6)
    if isinstance(ours, (list, tuple)):
        return type(theirs) in (list, tuple) and len(theirs) == len(ours) and all(map(_equal, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def _warn_about_attributes(net: torch.nn.Module, contents: Contents) -> None:
    odd = []
    for path, module in net.named_modules():
        ours, theirs = _attributes(vars(module)), _attributes(contents.modules[path].state)
        odd += [f'{join(path, name)} is absent, {show(ours[name])} is used' for name in ours if name not in theirs]
        odd += [f'{printable(join(path, name))} = {show(theirs[name])} is unknown and ignored' for name in theirs
                if name not in ours and name not in REDUNDANT and theirs[name] is not None]
    if odd:
        warnings.warn(f'{type(net).__name__}: attributes differ from those of the official classes: {"; ".join(odd)}', stacklevel=3)

"""What the plugin changes in the host's modules, right after they are loaded: PATCHES, filled by the functions below.

Each gets the loaded module and the Situation, and sets attributes of that module where that is enough, of torch where it is not. The comment
above each says what breaks without it, and since when; without a version it is a choice of ours.
"""

import dataclasses
import functools
import inspect
import os
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from m2m_stylegan.host_revisions import ADA, SG3
from m2m_stylegan.host_stand_ins import Absent

DETECTORS = ('inception-2015-12-05', 'vgg16')


@dataclasses.dataclass(frozen=True)
class Situation:
    """What decides which patches apply."""

    flavour: str = ADA
    trust_pickles: bool = False
    files: Path | None = None  # files of the web, by their last name
    has_gpu: bool = True


class Patch(NamedTuple):
    """Entry of PATCHES."""

    module: str
    what: str  # for the message at the start
    apply: Callable[[types.ModuleType, Situation], None]
    wanted: Callable[[Situation], bool]


PATCHES: list[Patch] = []


def _patch(module: str, what: str, wanted: Callable[[Situation], bool] = lambda situation: True):
    def register(function):
        PATCHES.append(Patch(module, what, function, wanted))
        return function
    return register


def _only(flavour: str) -> Callable[[Situation], bool]:
    return lambda situation: situation.flavour == flavour


def _without_gpu(situation: Situation) -> bool:
    return not situation.has_gpu


class Overlay:
    """A module with some names replaced, for one user of it: `numpy = Overlay(numpy, percentile=...)`."""

    def __init__(self, module, **replaced):
        vars(self).update(replaced)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


# Without a GPU. The scripts name the device themselves, and run in one go: only torch itself can tell them another one.

@_patch('torch', 'cuda means cpu', _without_gpu)
def _cpu_for_cuda(torch, situation):
    real = torch.device

    class Kind(type):
        def __instancecheck__(cls, instance):
            return isinstance(instance, real)

        def __subclasscheck__(cls, other):
            return issubclass(other, real)

    class Device(metaclass=Kind):
        def __new__(cls, *args, **kwargs):
            result = real(*args, **kwargs)
            return real('cpu') if result.type == 'cuda' else result

    Device.__name__ = Device.__qualname__ = 'device'
    torch.device = Device
    torch.cuda.Event = _Event
    torch.cuda.current_stream = lambda device=None: types.SimpleNamespace(synchronize=lambda: None, wait_stream=lambda stream: None)
    torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda device=None: None
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self


class _Event:
    """torch.cuda.Event by the clock of the CPU."""

    def __init__(self, enable_timing=False, **kwargs):
        self.seconds = 0.0

    def record(self, stream=None):
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.seconds - self.seconds) * 1000


# On a CPU half precision is 11 times slower than float32, and before torch 2.1 it lacks operators. stylegan3 sees to this by itself.
@_patch('training.networks', 'float32 blocks', lambda situation: _only(ADA)(situation) and _without_gpu(situation))
def _float32_blocks(networks, situation):
    for name in ('SynthesisBlock', 'DiscriminatorBlock'):
        cls = getattr(networks, name)
        cls.forward = functools.partialmethod(_forced, cls.forward)


def _forced(self, forward, *args, **kwargs):
    return forward(self, *args, **{**kwargs, 'force_fp32': True})


# torch.

# Since torch 2.10 Sampler.__init__ takes no argument.
@_patch('torch_utils.misc', 'InfiniteSampler')
def _sampler(misc, situation):
    import torch

    class Sampler(torch.utils.data.Sampler):
        def __init__(self, data_source=None):
            pass

    misc.InfiniteSampler.__bases__ = (Sampler,)


# The training loop has the networks print a table for uninitialised memory as input. What is NaN there stays in w_avg; seen on a CPU.
@_patch('torch_utils.misc', 'print_module_summary')
def _summary(misc, situation):
    import torch
    print_module_summary = misc.print_module_summary

    @functools.wraps(print_module_summary)
    def of_zeros(module, inputs, *args, **kwargs):
        return print_module_summary(module, [torch.zeros_like(x) for x in inputs], *args, **kwargs)
    misc.print_module_summary = of_zeros


# The host's own is switched off since torch 1.10, and until 2.11 torch's has no second derivative, which R1 through ADA needs.
@_patch('torch_utils.ops.grid_sample_gradfix', 'grid_sample', _only(ADA))
def _grid_sample(gradfix, situation):
    import torch

    from m2m_stylegan.augment import _GridSample

    def grid_sample(input, grid):
        if grid.requires_grad:
            return torch.nn.functional.grid_sample(input, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
        return _GridSample.apply(input, grid)
    gradfix.grid_sample = grid_sample


# Since torch 1.10 the host warns at every call and goes on with these.
@_patch('torch_utils.ops.conv2d_gradfix', 'conv2d', _only(ADA))
def _conv2d(gradfix, situation):
    import torch
    gradfix.conv2d = torch.nn.functional.conv2d
    gradfix.conv_transpose2d = torch.nn.functional.conv_transpose2d


# With pybind11 3 (torch 2.9) a module that was compiled and loaded is not in sys.modules, where the host looks for it.
@_patch('torch_utils.custom_ops', 'plugins', lambda situation: situation.has_gpu)
def _plugins(custom_ops, situation):
    import torch
    from torch.utils import cpp_extension

    load = cpp_extension.load

    @functools.wraps(load)
    def load_and_register(name, *args, **kwargs):
        module = load(name, *args, **kwargs)
        if isinstance(module, types.ModuleType):
            sys.modules.setdefault(name, module)
        return module
    cpp_extension.load = load_and_register
    if 'TORCH_CUDA_ARCH_LIST' in os.environ:
        os.environ['TORCH_CUDA_ARCH_LIST'] = supported_archs(os.environ['TORCH_CUDA_ARCH_LIST'], torch.version.cuda)


def supported_archs(archs: str, cuda: str | None) -> str:
    """TORCH_CUDA_ARCH_LIST without what this version of CUDA has dropped: before Turing (7.5) in 13."""
    if cuda is None or int(cuda.split('.')[0]) < 13:
        return archs
    return ';'.join(arch for arch in re.split('[ ;]+', archs) if not arch[0].isdigit() or float(arch.split('+')[0].rstrip('af')) >= 7.5)


# Since torch 2.6 [0, 0.99] is refused: all must be float. Lazy regularisation hides it by raising them to a power.
@_patch('dnnlib.util', 'Adam betas')
def _adam(util, situation):
    construct = util.construct_class_by_name

    @functools.wraps(construct)
    def construct_class_by_name(*args, **kwargs):
        if 'betas' in kwargs:
            kwargs['betas'] = [float(beta) for beta in kwargs['betas']]
        return construct(*args, **kwargs)
    util.construct_class_by_name = construct_class_by_name


# NumPy and SciPy.

# NumPy 2.4 removed `interpolation`.
@_patch('metrics.perceptual_path_length', 'percentile')
def _percentile(ppl, situation):
    def percentile(a, q, *args, interpolation=None, **kwargs):
        if interpolation is not None:
            kwargs['method'] = interpolation
        return np.percentile(a, q, *args, **kwargs)
    np, ppl.np = ppl.np, Overlay(ppl.np, percentile=percentile)


# SciPy 1.18 removed `disp`.
@_patch('metrics.frechet_inception_distance', 'sqrtm')
def _sqrtm(fid, situation):
    def sqrtm(A, disp=True):
        result = scipy.linalg.sqrtm(A)
        return result if disp else (result, 0.0)
    scipy = fid.scipy
    fid.scipy = Overlay(scipy, linalg=Overlay(scipy.linalg, sqrtm=sqrtm))


# Our operators, where they are compiled; else the host's own.

def _routed(module, name: str) -> None:
    from m2m_stylegan import ops

    theirs, ours = getattr(module, name), getattr(ops, name)
    default = inspect.signature(theirs).parameters['impl'].default

    @functools.wraps(theirs)
    def routed(x, *args, impl=default, **kwargs):
        if impl != 'ref' and x.is_floating_point() and ops.prepare(x.device.type).state == 'compiled':
            return ours(x, *args, **kwargs)
        return theirs(x, *args, impl=impl, **kwargs)
    setattr(module, name, routed)
    if hasattr(module, '_init'):
        module._init = functools.cache(module._init)  # upfirdn2d's tries again at every call after a failure


@_patch('torch_utils.ops.bias_act', 'compiled bias_act')
def _bias_act(module, situation):
    _routed(module, 'bias_act')


@_patch('torch_utils.ops.upfirdn2d', 'compiled upfirdn2d')
def _upfirdn2d(module, situation):
    _routed(module, 'upfirdn2d')


# Files.

def _safe(situation: Situation) -> bool:
    return not situation.trust_pickles


@_patch('legacy', 'safe pickles', _safe)
def _legacy(legacy, situation):
    from m2m_stylegan.host_pickles import Unpickler
    legacy._LegacyUnpickler = functools.partial(Unpickler, situation.flavour)


@_patch('metrics.metric_utils', 'safe statistics', _safe)
def _metric_utils(metric_utils, situation):
    from m2m_stylegan.host_pickles import Unpickler, load_into

    arguments = {'capture_all': 'capture_all', 'max_items': 'max_items'}
    metric_utils.FeatureStats.load = staticmethod(lambda path: load_into(metric_utils.FeatureStats, path, arguments))
    metric_utils.pickle = Overlay(metric_utils.pickle, load=lambda file: Unpickler(situation.flavour, file).load())


# stylegan3 takes its detectors from pickles; stylegan2-ada-pytorch has the same networks as TorchScript files, whose checksums we know.
@_patch('metrics.metric_utils', 'TorchScript detectors', lambda situation: _safe(situation) and _only(SG3)(situation))
def _detectors(metric_utils, situation):
    get = metric_utils.get_feature_detector
    opened = functools.cache(functools.partial(_open_detector, situation.files))

    @functools.wraps(get)
    def get_feature_detector(url, device='cpu', **kwargs):
        name = url.split('/')[-1].removesuffix('.pkl')
        return opened(name, str(device)) if name in DETECTORS else get(url=url, device=device, **kwargs)
    metric_utils.get_feature_detector = get_feature_detector


def _open_detector(files: Path | None, name: str, device: str):
    from m2m_stylegan import detectors

    path = files / f'{name}.pt' if files is not None and (files / f'{name}.pt').is_file() else None
    net, _sha256 = detectors._open(name, path or detectors.find(name), trust=path is not None, device=device)
    return net


@_patch('dnnlib.util', 'downloads', lambda situation: situation.files is not None or isinstance(sys.modules.get('requests'), Absent))
def _downloads(util, situation):
    open_url = util.open_url

    @functools.wraps(open_url)
    def open_file(url, *args, **kwargs):
        path = situation.files / str(url).split('/')[-1] if situation.files is not None else None
        if '://' in str(url) and (path is None or not path.is_file()) and isinstance(sys.modules.get('requests'), Absent):
            from m2m_stylegan import downloads
            path = downloads.fetch(str(url))
        if '://' in str(url) and path is not None and path.is_file():
            return str(path) if kwargs.get('return_filename') else open(path, 'rb')
        return open_url(url, *args, **kwargs)
    util.open_url = open_file

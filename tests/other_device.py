"""A stand-in for a GPU on machines without one: `python tests/other_device.py` runs the tools on it and prints a line of JSON for every case.

Tensors of the device `other` are computed on the CPU, but as on a GPU they do not mix with tensors of the CPU, and what makes the CPU wait
for the device is counted: asking for a value, and copies without non_blocking. Kernels, streams and memory are not imitated.
"""

import importlib
import json
import os
import tempfile
import traceback
from collections import Counter
from pathlib import Path

os.environ['M2M_OPS'] = 'ref'

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = 'other'
PACKAGE = Path(__file__).parents[1] / 'm2m_stylegan'
aten = torch.ops.aten
MAY_MIX = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # CUDA takes indices from the CPU, and waits for them.
LISTS = {aten.stack.default, aten.cat.default}
VALUES = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}


class OtherTensor(torch.Tensor):
    """A tensor on the device: in truth one on the CPU."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=torch.device(NAME, 0), requires_grad=requires_grad)

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f'{func} outside of OtherDevice')

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        found = OtherTensor(self.inner.clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            found = torch.nn.Parameter(OtherTensor(self.inner.clone()), self.requires_grad)
        return memo.setdefault(id(self), found)


class OtherDevice(TorchDispatchMode):
    """While it is active there is the device; `waits` counts, by source line."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        others = [x for x in tensors if isinstance(x, OtherTensor)]
        known = {id(x.inner if isinstance(x, OtherTensor) else x): x for x in tensors}
        # A tensor without dimensions may come from the CPU, but not in a list of tensors to put together.
        mixed = bool(others) and any((x.dim() > 0 or func in LISTS) and not isinstance(x, OtherTensor) for x in tensors)
        goal = torch.device(kwargs['device']).type if kwargs.get('device') is not None else None
        if not others and goal != NAME:
            return func(*args, **kwargs)
        if mixed and func not in MAY_MIX | INDEXING:
            raise RuntimeError(f'{func}: tensors on {NAME} and on the CPU, {[(type(x).__name__, list(x.shape)) for x in tensors]}')
        copies = goal not in (None, NAME) if others else func is aten._to_copy.default
        if func is aten.copy_.default:
            kwargs['non_blocking'] = kwargs.get('non_blocking') or (len(args) > 2 and args[2])
            args, copies = args[:2], isinstance(args[0], OtherTensor) != isinstance(args[1], OtherTensor)
        if func in VALUES or (mixed and func in INDEXING) or (copies and not kwargs.get('non_blocking')):
            self.waits[_source_line()] += 1
        if goal == NAME:
            kwargs['device'] = 'cpu'
        args, kwargs = pytree.tree_map_only(OtherTensor, lambda x: x.inner, (args, kwargs))
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out._is_zerotensor():  # It has no storage, which only autograd above us knows how to deal with.
            out = torch.zeros_like(out, device='cpu')
        if goal not in (None, NAME):
            return out
        return pytree.tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else OtherTensor(x), out)


class _NoInferenceMode(torch.no_grad):
    """Wrapped tensors have no place in inference mode."""

    def __init__(self, mode=True):
        super().__init__()
        self.mode = mode

    def __enter__(self):
        self.prev = torch.is_grad_enabled()
        torch.set_grad_enabled(self.prev and not self.mode)


class _CPUGenerator(torch.Generator):
    def __new__(cls, device='cpu'):
        return super().__new__(cls)


def _source_line() -> str:
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).is_relative_to(PACKAGE):
            return f'{Path(frame.filename).name}: {frame.line}'
    return 'elsewhere'


def prepare() -> None:
    """Make the device known to PyTorch and to the package, which otherwise takes nothing but CPUs and CUDA devices."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    torch.inference_mode = _NoInferenceMode
    torch.Generator = _CPUGenerator
    torch.set_num_threads(1)
    from m2m_stylegan import calc_metrics, generate, transfer

    for module in (calc_metrics, generate, transfer):
        module.choose_device = lambda name: torch.device(NAME, 0)
    transfer.snapshot_grid = lambda dataset: ((2, 2), [0, 1, 2, 3])  # not the 1024 pictures of a GPU


def waits_per_step(main, arguments: list[str], mode: OtherDevice) -> dict[str, float]:
    """Train; returns the waits per step, by source line, without the first two steps of a stage and the last two."""
    from m2m_stylegan import training_loop

    seen, seed_step = [], training_loop.seed_step

    def count(options, state):
        seen.append((state.stage, Counter(mode.waits)))
        return seed_step(options, state)

    training_loop.seed_step = count
    try:
        run(main, arguments)
    finally:
        training_loop.seed_step = seed_step
    stages = [[waits for number, waits in seen if number == stage] for stage in sorted({stage for stage, _ in seen})]
    found = sum((counts[-2] - counts[2] for counts in stages), Counter())
    return {line: number / sum(len(counts) - 4 for counts in stages) for line, number in found.items()}


def run(main, arguments: list[str]) -> None:
    """The command as a user calls it, but in this process and with all its errors."""
    main.main(arguments, standalone_mode=False)


def cases(folder: Path) -> dict[str, list[str]]:
    """Names and command lines; those of transfer are counted unless they resume."""
    import tiny

    for num_classes in (0, 3):
        tiny.save_pickle(folder / f'{num_classes}.pkl', c_dim=num_classes, num_fp16_res=1, conv_clamp=256)
        tiny.dataset_zip(folder / f'{num_classes}.zip', num=24, num_classes=num_classes)
    net, data, cache = f'--network={folder}/0.pkl', f'--data={folder}/0.zip', f'--cache-dir={folder}/cache'
    cond = [f'--network={folder}/3.pkl', f'--data={folder}/3.zip', '--cond=1', cache]
    prepare_kimg, bank = '--prepare-kimg=0.03', '--bank=64'

    def training(name: str, *options: str, base=(net, data, cache)) -> list[str]:
        return ['transfer', *base, f'--outdir={folder}/{name}', '--batch=4', '--kimg=0.1', '--tick=100', '--workers=0', *options]

    return {
        'full': training('full', '--train=full', '--aug=fixed', '--p=0.8', '--mirror=1'),
        'full ada': training('ada', '--train=full', base=cond),
        'full ada resumed': ['transfer', f'--outdir={folder}/ada', '--resume=latest', '--kimg=0.12'],
        'high-res': training('high-res', '--train=high-res', '--slice=8', '--aug=noaug', bank, base=cond),
        'low-res': training('low-res', '--train=low-res', '--slice=8', prepare_kimg),
        'w': training('w', '--train=low-res', '--slice=w', '--critic=wgan-gp', prepare_kimg),
        'no-bypass': training('no-bypass', '--train=low-res', '--slice=8', '--no-bypass', '--aug=noaug'),
        'both': training('both', '--train=both', '--slice=8', prepare_kimg, bank, base=cond),
        'both resumed': ['transfer', f'--outdir={folder}/both', '--resume=latest', '--kimg=0.12'],
        'generate': ['generate', net, '--seeds=0-2', '--trunc=0.5', f'--outdir={folder}/seeds'],
        'interpolate': ['interpolate', net, '--seeds=0-2', f'--dest={folder}/loop.gif'],
        'project': ['project', net, f'--target={folder}/seeds/seed0001.png', '--features=discriminator', '--num-steps=3', f'--outdir={folder}/w'],
        'projected': ['generate', net, f'--projected-w={folder}/w/projected_w.npz', f'--outdir={folder}/projected'],
        'calc_metrics': ['calc_metrics', net, data, cache, '--metrics=kd_effnetlite0,pr_effnetlite0', '--num=12'],
        'prepare': ['prepare', net, data, cache, '--slice=8', '--prepare-kimg=0.02', f'--outdir={folder}/codes'],
    }


def check() -> dict[str, int]:
    """That the stand-in refuses and counts what it should; returns its waits."""
    with OtherDevice() as mode:
        x, host = torch.arange(6.0, device=NAME), torch.arange(6.0)
        assert x.device.type == NAME and (x * 2 + 1).device.type == NAME
        for wrong in (lambda: x + host, lambda: torch.cat([x, host]), lambda: torch.stack([x[0], host[0]]),
                      lambda: torch.addmm(x, x[:, None], host[None]), x.numpy):
            try:
                wrong()
            except (RuntimeError, TypeError):
                continue
            raise AssertionError('tensors of both devices were mixed')
        there = host.to(NAME, non_blocking=True)
        there[2:4] = x[:2] + torch.tensor(1.0)
        assert not mode.waits
        assert there.tolist() == [0, 1, 1, 2, 4, 5] and float(x.sum()) == 15 and x[host.long() > 3].shape == (2,)  # three waits
        x.copy_(host)
        assert torch.equal(x, there.copy_(x))
    return mode.waits


def main() -> None:
    prepare()
    print(json.dumps({'name': 'the device itself', 'error': None, 'waits': check()}))
    with tempfile.TemporaryDirectory() as folder:
        for name, (tool, *arguments) in cases(Path(folder)).items():
            command, mode, result = importlib.import_module(f'tools.{tool}').main, OtherDevice(), {'name': name, 'error': None, 'waits': {}}
            try:
                with mode:
                    if tool == 'transfer' and 'resumed' not in name:
                        result['waits'] = waits_per_step(command, arguments, mode)
                    else:
                        run(command, arguments)
            except Exception:
                result['error'] = traceback.format_exc()
            print('\n' + json.dumps(result), flush=True)


if __name__ == '__main__':
    main()

"""Everything that a run needs in order to go on exactly where it stopped, in one file of its run directory; the files before it are kept, too.

The format is safetensors, with a checksum over all tensors. Its reader executes nothing and checks sizes before it reads, which cannot be
said of `torch.load(weights_only=True)`: PyTorch 2.6 reads beyond the end of a record whose size a file lies about.
"""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from m2m_stylegan import distributed
from m2m_stylegan.errors import UserError
from m2m_stylegan.feature_files import GARBAGE, digest_of, pack, unpack
from m2m_stylegan.files import atomic_write

FILE_NAME = 'm2m-checkpoint.safetensors'
FORMAT = 3
COUNTERS = {**dict.fromkeys(['stage', 'stage_start_nimg', 'cur_nimg', 'batch_idx', 'cur_tick', 'tick_start_nimg', 'backoffs'], torch.int64),
            'elapsed_seconds': torch.float64}
_SEPARATOR = '|'  # in no name of a tensor or of a statistic


class Damaged(Exception):
    """A checkpoint is torn, flipped or no checkpoint; the text continues a sentence that starts with its name."""


@dataclasses.dataclass
class Live:
    """The objects of a running loop whose state is stored: training_loop.State, phases.Game, optimisers by network letter, bank or None,
    stats.Collector. They fit together between two steps; `in_step` says that they are not there."""

    state: object
    game: object
    optimizers: dict[str, torch.optim.Optimizer]
    bank: object | None
    collector: object
    in_step: bool = False

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        state = self.state
        found = {'G': state.G, 'D': state.D, 'G_ema': state.G_ema, 'augment_pipe': state.augment_pipe, **getattr(self.game, 'modules', {})}
        return {name: module for name, module in found.items() if module is not None}


def files(run_dir: Path) -> list[Path]:
    """The checkpoints in a run directory, newest first."""
    older = sorted(run_dir.glob('m2m-checkpoint.*.safetensors'), key=lambda path: int(path.suffixes[0][1:]) if path.suffixes[0][1:].isdigit() else 0)
    return [path for path in [run_dir / FILE_NAME, *older] if path.is_file()]


def save(run_dir: Path, live: Live, keep: int = 2) -> None:
    """Write the checkpoint atomically and keep `keep - 1` earlier ones; a run that is killed meanwhile has the previous one. All processes call it.

    If the disk is full, the earlier ones are given up one by one.
    """
    # A path length mean, signs and statistics of its own has every process; all else is the same in each of them.
    ranks = distributed.gather({'pl_mean': live.game.pl_mean.cpu(), 'real_signs': live.state.real_signs.cpu(), 'stats': live.collector.state_dict()})
    if distributed.rank() != 0:
        return
    tensors = _flatten({
        'modules': {name: module.state_dict() for name, module in live.modules.items()},
        'optimizers': {name: {'num_params': torch.tensor(len(_params(optimizer))), 'state': optimizer.state_dict()['state']}
                       for name, optimizer in live.optimizers.items()},
        'counters': {name: torch.tensor(getattr(live.state, name), dtype=dtype) for name, dtype in COUNTERS.items()},
        'ranks': dict(enumerate(ranks)),
        **({} if live.bank is None else {'bank': {'next_chunk': torch.tensor(live.bank.next_chunk)}})})
    data = pack(tensors, format=FORMAT)
    while True:
        try:
            with atomic_write(run_dir / FILE_NAME) as tmp:
                tmp.write_bytes(data)
                _keep_previous(run_dir, keep)
            return
        except OSError as err:
            older = files(run_dir)[1:]
            if not older or err.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            older[-1].unlink()


def load(run_dir: Path, live: Live, echo: Callable[[str], object] = print) -> None:
    """Restore the objects of `live` in place from the newest intact checkpoint; damaged ones are removed, and `echo` says so.

    Raises UserError if there is none, or if it does not fit. Every process reads the file that process 0 has chosen.
    """
    path, content = run_dir / FILE_NAME, newest(run_dir, echo)
    try:
        _check_fit(path, content, live)
        for name, module in live.modules.items():
            module.load_state_dict(content['modules'][name])
        for name, optimizer in live.optimizers.items():
            moments = {int(i): values for i, values in content['optimizers'][name].get('state', {}).items()}
            optimizer.load_state_dict({'state': moments, 'param_groups': optimizer.state_dict()['param_groups']})
        for name, dtype in COUNTERS.items():
            setattr(live.state, name, content['counters'][name].to(dtype).item())
        if live.bank is not None:
            live.bank.rewind(int(content['bank']['next_chunk']))
        _load_rank(content['ranks'], live, echo)
    except UserError:
        raise
    except (*GARBAGE, RuntimeError) as err:  # intact, but not written by `save`
        raise UserError(f'{path} does not hold what a checkpoint of this tool holds ({type(err).__name__}: {err}).') from err


def newest(run_dir: Path, echo: Callable[[str], object] = print) -> dict:
    """The tree of tensors that `load` would restore, on the CPU; of damaged checkpoints `echo` tells. Raises UserError if there is none."""
    return read(distributed.from_main(_newest_intact, run_dir, echo))


def read(path: Path) -> dict:
    """The tree of tensors in a checkpoint, on the CPU. Raises Damaged, or UserError for another version's format."""
    try:
        metadata, tensors = unpack(path)
        found, sha256 = metadata['format'], metadata['sha256']
        if found != FORMAT:
            raise UserError(f'{path} has format {found}, this version reads format {FORMAT}.')
        if digest_of(tensors) != sha256:
            raise Damaged('does not match its checksum')
        return _unflatten(tensors)
    except UserError:
        raise
    except GARBAGE as err:
        raise Damaged(f'is not readable: {str(err).splitlines()[0] if str(err) else type(err).__name__}') from err


def forget_after(run_dir: Path, cur_nimg: int) -> None:
    """Remove from stats.jsonl and snapshots.jsonl what lies behind the checkpoint, and lines that a kill cut short: they will be written again."""
    for name, kimg_of in [('stats.jsonl', lambda line: line['Progress/kimg']['mean']), ('snapshots.jsonl', lambda line: line['cur_nimg'] / 1000)]:
        path = run_dir / name
        lines = path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True) if path.is_file() else []
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if line.endswith('\n') and kimg_of(json.loads(line)) <= cur_nimg / 1000:
                    kept.append(line)
        if kept != lines:
            with atomic_write(path) as tmp:
                tmp.write_text(''.join(kept), encoding='utf-8')


def _older(run_dir: Path, age: int) -> Path:
    return run_dir / f'm2m-checkpoint.{age}.safetensors'


def _keep_previous(run_dir: Path, keep: int) -> None:
    for path in files(run_dir)[max(keep - 1, 1):]:
        path.unlink()
    if keep > 1 and (run_dir / FILE_NAME).is_file():
        for age in range(keep - 2, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(_older(run_dir, age), _older(run_dir, age + 1))
        try:
            os.link(run_dir / FILE_NAME, _older(run_dir, 1))  # not a move: at no time there may be none
        except OSError:  # a file system without links
            os.replace(run_dir / FILE_NAME, _older(run_dir, 1))


def _newest_intact(run_dir: Path, echo: Callable[[str], object]) -> Path:
    found = files(run_dir)
    if not found:
        raise UserError(f'--resume: there is no {FILE_NAME} in {run_dir}. It is written with the first network snapshot; '
                        'start again, or pass --resume=.../network-snapshot-*.pkl to continue from weights alone.')
    damage = []
    for path in found:
        try:
            read(path)
        except Damaged as err:
            damage.append(f'{path.name} {err}')
            continue
        if damage:
            echo('WARNING: ' + '; '.join(damage) + f'. Going on from the checkpoint before it, {path.name}; what was trained since is trained again.')
        if path.name != FILE_NAME:
            os.replace(path, run_dir / FILE_NAME)  # else the next `save` would keep the damaged one instead of this
        return run_dir / FILE_NAME
    raise UserError(f'{run_dir}: every checkpoint is damaged. Pass --resume=.../network-snapshot-*.pkl to continue from weights alone.\n'
                    + '\n'.join(f'  * {line}' for line in damage))


def _load_rank(ranks: dict, live: Live, echo: Callable[[str], object]) -> None:
    """Path length mean, signs and statistics of this process. Their number may have changed: then as near as can be."""
    device, number, rank = live.game.pl_mean.device, distributed.world_size(), distributed.rank()
    if len(ranks) == number:
        own = ranks[str(rank)]
        pl_mean, real_signs, stats = own['pl_mean'], own['real_signs'], own.get('stats', {})
    else:
        echo(f'WARNING: the checkpoint was written by {len(ranks)} processes and is read by {number}: training goes on, but not with the random '
             'numbers that the uninterrupted run would have drawn.')
        pl_mean = torch.stack([part['pl_mean'] for part in ranks.values()]).mean()
        real_signs = torch.stack([part['real_signs'] for part in ranks.values()]).sum(0) / number
        stats = {'closed': ranks['0'].get('stats', {}).get('closed', {})}
    live.game.pl_mean = pl_mean.to(device)
    live.state.real_signs = real_signs.to(device)
    live.collector.load_state_dict({kind: stats.get(kind, {}) for kind in ('pending', 'closed')})


def _check_fit(path: Path, content: dict, live: Live) -> None:
    """List everything in which the checkpoint differs from the run that wants to load it."""
    problems = []
    for name in sorted(set(live.modules) ^ set(content['modules'])):
        problems.append(f'{name} is only in the {"checkpoint" if name in content["modules"] else "new run"}')
    for name, module in live.modules.items():
        ours, theirs = module.state_dict(), content['modules'].get(name, {})
        problems += [f'{name}.{key} is missing' for key in ours if theirs and key not in theirs]
        problems += [f'{name}.{key} has shape {list(theirs[key].shape)}, expected {list(ours[key].shape)}'
                     for key in ours if key in theirs and theirs[key].shape != ours[key].shape]
    if ('bank' in content) != (live.bank is not None):
        problems.append('one of the two runs has a feature bank, the other has none: --train differs')
    for name, optimizer in live.optimizers.items():
        ours, theirs = _params(optimizer), content['optimizers'][name]
        if int(theirs['num_params']) != len(ours):
            problems.append(f'the optimiser of {name} holds {int(theirs["num_params"])} tensors, expected {len(ours)}: --train, --slice or --freezed '
                            'differs')
        elif any(moments[kind].shape != ours[int(i)].shape for i, moments in theirs.get('state', {}).items() for kind in ('exp_avg', 'exp_avg_sq')):
            problems.append(f'the optimiser of {name} holds moments of other shapes')
    problems += [f'{name} is {content["counters"][name]}' for name in COUNTERS if not 0 <= content['counters'][name].item() < 2 ** 62]
    for part in content['ranks'].values():
        stats = [moments for kind in part.get('stats', {}).values() for moments in kind.values()]
        if part['pl_mean'].shape != () or part['real_signs'].shape != (2,) or any(moments.shape != (3,) for moments in stats):
            problems.append('path length mean, signs or statistics have other shapes')
    if problems:
        shown = '\n'.join(f'  * {problem}' for problem in problems[:20])
        raise UserError(f'{path} was made by a different run ({len(problems)} differences):\n{shown}')


def _params(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group['params']]


def _flatten(tree: dict, prefix: str = '') -> dict[str, torch.Tensor]:
    # Copies, since safetensors refuses tensors that share memory.
    flat = {}
    for key, value in tree.items():
        name = f'{prefix}{key}'
        flat |= _flatten(value, name + _SEPARATOR) if isinstance(value, dict) else {name: value.detach().to('cpu', copy=True).contiguous()}
    return flat


def _unflatten(flat: dict[str, torch.Tensor]) -> dict:
    tree: dict = {}
    for name, tensor in flat.items():
        *path, last = name.split(_SEPARATOR)
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = tensor
    return tree

"""Everything that a run needs in order to go on exactly where it stopped, in one file of its run directory."""

import dataclasses
import pickle
from pathlib import Path

import torch

from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write

FILE_NAME = 'm2m-checkpoint.pt'
FORMAT = 1
COUNTERS = ('cur_nimg', 'batch_idx', 'cur_tick', 'elapsed_seconds')


@dataclasses.dataclass
class Live:
    """The objects of a running loop whose state is stored: training_loop.State, phases.Game, optimisers by network letter, bank or None."""

    state: object
    game: object
    optimizers: dict[str, torch.optim.Optimizer]
    bank: object | None

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        state = self.state
        found = {'G': state.G, 'D': state.D, 'G_ema': state.G_ema, 'augment_pipe': state.augment_pipe}
        return {name: module for name, module in found.items() if module is not None}


def save(run_dir: Path, live: Live) -> None:
    """Write the checkpoint atomically; a run that is killed meanwhile keeps the previous one."""
    content = {
        'format': FORMAT,
        'modules': {name: module.state_dict() for name, module in live.modules.items()},
        'optimizers': {name: optimizer.state_dict() for name, optimizer in live.optimizers.items()},
        'counters': {name: getattr(live.state, name) for name in COUNTERS},
        'pl_mean': live.game.pl_mean,
        'real_signs': live.state.real_signs,
        'bank_next_chunk': None if live.bank is None else live.bank.next_chunk,
    }
    with atomic_write(run_dir / FILE_NAME) as tmp:
        torch.save(content, tmp)


def load(run_dir: Path, live: Live) -> None:
    """Restore the objects of `live` in place. Raises UserError if there is no checkpoint, or one that does not fit or is damaged."""
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise UserError(f'--resume: there is no {FILE_NAME} in {run_dir}. It is written with the first network snapshot; '
                        'start again, or pass --resume=.../network-snapshot-*.pkl to continue from weights alone.')
    device = live.game.pl_mean.device
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError) as err:
        raise UserError(f'{path} is damaged ({str(err).splitlines()[0]}). '
                        'Pass --resume=.../network-snapshot-*.pkl to continue from weights alone.') from err
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        raise UserError(f'{path} has format {content.get("format") if isinstance(content, dict) else "unknown"}, this version reads format {FORMAT}.')
    _check_fit(path, content, live)
    for name, module in live.modules.items():
        module.load_state_dict(content['modules'][name])
    for name, optimizer in live.optimizers.items():
        optimizer.load_state_dict(content['optimizers'][name])
    for name in COUNTERS:
        setattr(live.state, name, content['counters'][name])
    live.game.pl_mean = content['pl_mean']
    live.state.real_signs = content['real_signs']
    if live.bank is not None:
        live.bank.rewind(content['bank_next_chunk'])


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
    if (content['bank_next_chunk'] is None) != (live.bank is None):
        problems.append('one of the two runs has a feature bank, the other has none: --train differs')
    for name, optimizer in live.optimizers.items():
        ours, theirs = (sum(len(group['params']) for group in groups) for groups in (
            optimizer.param_groups, content['optimizers'].get(name, {}).get('param_groups', [])))
        if ours != theirs:
            problems.append(f'the optimiser of {name} holds {theirs} tensors, expected {ours}: --train, --slice or --freezed differs')
    if problems:
        shown = '\n'.join(f'  * {problem}' for problem in problems[:20])
        raise UserError(f'{path} was made by a different run ({len(problems)} differences):\n{shown}')

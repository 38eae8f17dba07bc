"""--resume: which run is meant, with which options it goes on, and whether the files that it is made from are still the same."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

from m2m_stylegan import checkpoint, downloads
from m2m_stylegan.errors import UserError
from m2m_stylegan.transfer_options import TransferOptions

# Options that are stored in another form than given, or may change from one start of a job to the next.
ELSEWHERE = {'outdir', 'network', 'data', 'cache_dir', 'resume', 'device', 'workers', 'gpus', 'kimg', 'minutes', 'batch', 'batch_gpu', 'dry_run'}


def made_from(job) -> dict[str, str | None]:
    """Fingerprints of the files that decide what comes out, besides the options, of a transfer.Job."""
    return {'network_sha256': None if job.snapshot is None else job.snapshot.sha256, 'data_fingerprint': job.dataset.fingerprint}


def with_outdir(options: TransferOptions) -> TransferOptions:
    """The options with --outdir, which a run directory to resume stands in already. Raises UserError without either."""
    if options.outdir is not None:
        return options
    if options.resume is None or not Path(options.resume).is_dir():
        raise UserError('--outdir=DIR is missing: run directories are made in there. Only --resume=RUN_DIR goes without.')
    return dataclasses.replace(options, outdir=str(Path(options.resume).resolve().parent))


def find_run(options: TransferOptions) -> Path | None:
    """The run directory that --resume means, or None if it means a pickle or is absent."""
    runs = sorted(path for path in Path(options.outdir).glob('*') if checkpoint.files(path))
    if int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')):
        # torchrun --max-restarts has started the same command again: it means the run that this job has begun.
        of_job = [path for path in runs if (stored := read_options(path)).get('job') == os.environ['TORCHELASTIC_RUN_ID']
                  and _same_training(stored.get('options'), options)]
        if of_job:
            return of_job[-1]
    names_pickle = options.resume is None or options.resume.endswith('.pkl') or '://' in options.resume
    if names_pickle or options.resume in downloads.OFFICIAL_PICKLES:
        return None
    if options.resume == 'latest':
        if not runs:
            raise UserError(f'--resume=latest: no run directory in {options.outdir} holds a checkpoint.')
        return runs[-1]
    if not Path(options.resume).is_dir():
        raise UserError(f'--resume={options.resume}: expected a run directory, "latest", or a network pickle.')
    return Path(options.resume)


def _same_training(stored: object, options: TransferOptions) -> bool:
    """Was a run with these stored options begun by a command with these? Several jobs can have one name: torchrun's default is the same for all."""
    given = dataclasses.asdict(options)
    return isinstance(stored, dict) and all(stored.get(name) == value for name, value in given.items() if name not in ELSEWHERE)


def read_options(directory: Path) -> dict:
    """Our part of a run's training_options.json. Raises UserError if there is none."""
    path = directory / 'training_options.json'
    try:
        return dict(json.loads(path.read_text(encoding='utf-8'))['m2m'])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
        raise UserError(f'--resume: {path} is missing or is not from this tool ({err}).') from err


def check_same_files(job, directory: Path) -> None:
    """Raise UserError if the pickle that the run started from, or the dataset, has changed since."""
    stored = read_options(directory)
    paths = {'network_sha256': job.network_path, 'data_fingerprint': job.dataset.path}
    problems = [f'{key} of {paths[key]}: {stored.get(key)} when the run was started, {found} now'
                for key, found in made_from(job).items() if stored.get(key) != found]
    if problems:
        raise UserError(f'--resume: files that the run in {directory} is made from have changed. Put the original ones back, or start a new run:\n'
                        + '\n'.join(f'  * {problem}' for problem in problems))


def resumed_options(options: TransferOptions, directory: Path) -> TransferOptions:
    """The options that the run was started with; from the new command line come only the limits, --batch-gpu and where to run."""
    try:
        old = TransferOptions(**read_options(directory)['options'])
    except (KeyError, TypeError) as err:
        raise UserError(f'--resume: the options in {directory} are not from this version ({type(err).__name__}: {err}).') from err
    fresh = {name: getattr(options, name) for name in ('kimg', 'minutes', 'batch_gpu') if getattr(options, name) is not None}
    machine = {name: getattr(options, name) for name in ('device', 'workers', 'gpus')}
    return dataclasses.replace(old, **fresh, **machine, resume=str(directory), dry_run=options.dry_run)


def say_ignored(given: TransferOptions, used: TransferOptions, echo: Callable[[str], None]) -> None:
    """Warn of options of the command line that differ from those with which the run goes on."""
    default = TransferOptions(outdir=None)

    def same(name: str) -> bool:
        value, other = getattr(given, name), getattr(used, name)
        return value in (getattr(default, name), other) or (isinstance(value, str) and str(Path(value).resolve()) == other)

    ignored = [f'--{field.name.replace("_", "-")}={getattr(given, field.name)}' for field in dataclasses.fields(given)
               if field.name not in ('outdir', 'resume') and not same(field.name)]
    if ignored:
        echo(f'WARNING: {", ".join(ignored)}: ignored. A resumed run keeps the options that it was started with, but for --kimg, --minutes, '
             '--batch-gpu, --gpus, --device and --workers.')

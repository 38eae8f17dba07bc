"""Runs the scripts of an official checkout (stylegan2-ada-pytorch, stylegan3) under this plugin, on today's PyTorch, also without a GPU.

    python -m m2m_stylegan.host run --host=stylegan2-ada-pytorch train.py --outdir=runs --data=images.zip

The checkout stays as it is: its modules are changed in memory, right after they are loaded (`host_patches`). Scripts that carry the call
which tools/apply_patches.py inserts need no `run`.
"""

import contextlib
import importlib
import importlib.machinery
import json
import multiprocessing.spawn
import os
import platform
import runpy
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from m2m_stylegan import host_patches, host_revisions, host_stand_ins
from m2m_stylegan.errors import UserError

SPAWNED = 'M2M_HOSTED'  # environment variable by which processes that a hosted script spawns know of it: JSON of directory and script
_installed: list[host_revisions.Host] = []


def install(directory: str | Path) -> host_revisions.Host:
    """Change the modules of the checkout in `directory` when they are loaded, and put it on the path; says on stderr what was changed.

    Settings come from the environment, so that processes started by the scripts have them, too: M2M_TRUST_PICKLES=1, M2M_HOST_FORCE=1,
    M2M_HOST_FILES=DIR. Raises UserError for a checkout that is not known, unless forced.
    """
    if _installed:
        return _installed[0]
    host = host_revisions.detect(directory)
    forced = _is_set('M2M_HOST_FORCE')
    if not forced:
        host_revisions.check(host)
    files = os.environ.get('M2M_HOST_FILES')
    situation = host_patches.Situation(host.flavour, _is_set('M2M_TRUST_PICKLES'), Path(files).resolve() if files else None, _has_gpu())
    patches = [patch for patch in host_patches.PATCHES if patch.wanted(situation)]
    absent = host_stand_ins.stand_ins()
    sys.meta_path.insert(0, _Finder(host.directory, patches, situation, forced))
    for patch in patches:
        if patch.module == 'torch':  # which `_has_gpu` has imported
            patch.apply(sys.modules['torch'], situation)
    if str(host.directory) not in sys.path:
        sys.path.insert(0, str(host.directory))
    sys.excepthook = _excepthook
    if SPAWNED not in os.environ:
        _announce(host, patches, absent)
        os.environ[SPAWNED] = json.dumps([str(host.directory), None])
    _installed.append(host)
    return host


def patch(script: str) -> None:
    """What a patched script calls with its `__file__` in its second line."""
    path = Path(script).resolve()
    with _exits_on_user_error():
        install(path.parent)
    main = getattr(sys.modules['__main__'], '__file__', None)
    if main is not None and Path(main).resolve() == path:
        _prepare(path)


def run(script: str | Path, args: list[str], directory: str | Path | None = None) -> None:
    """Run a script of the checkout in `directory` (default: where the script is) as `python SCRIPT ARGS` would. Raises UserError."""
    path = Path(directory or '.', script).resolve()
    directory = path.parent if directory is None else Path(directory).resolve()
    if not path.is_file():
        found = ', '.join(sorted(file.name for file in directory.glob('*.py'))) or 'no scripts'
        raise UserError(f'{path} does not exist; {directory} has {found}. Name the checkout with --host.')
    host = install(directory)
    os.environ[SPAWNED] = json.dumps([str(host.directory), str(path)])
    multiprocessing.spawn.get_preparation_data = _preparation_data
    sys.argv = [str(path), *args]
    _prepare(path)
    runpy.run_path(str(path), run_name='__main__')


def _prepare(path: Path) -> None:
    """What single scripts need before they run as `__main__`."""
    if path.name == 'legacy.py' and 'legacy' not in sys.modules and not _is_set('M2M_TRUST_PICKLES'):
        # Its functions would be those of `__main__`, which nobody can change before they run; as a module it is changed like the others.
        legacy = importlib.import_module('legacy')
        command, = (value for value in vars(legacy).values() if isinstance(value, click.Command))
        raise SystemExit(command())
    if path.name == 'train.py':
        from m2m_stylegan import host_train
        host_train.extend_next_command()


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, '') not in ('', '0')


def _has_gpu() -> bool:
    import torch
    return torch.cuda.is_available()


def _announce(host: host_revisions.Host, patches: list[host_patches.Patch], absent: list[str]) -> None:
    versions = ', '.join([f'Python {platform.python_version()}', *(f'{name} {_version(name)}' for name in ('torch', 'numpy', 'scipy'))])
    lines = [f'{host.name} under m2m_stylegan ({versions})', f'changed: {", ".join(patch.what for patch in patches)}']
    if absent:
        lines.append(f'stand-ins for what is not installed: {", ".join(absent)}')
    if host.differences:
        lines.append(f'unknown revision, forced: {len(host.differences)} files differ from the known one')
    print('\n  '.join(lines), file=sys.stderr, flush=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'missing'


class _Finder:
    """Finds the host's modules as Python does, and has them changed once they are executed."""

    def __init__(self, directory: Path, patches: list[host_patches.Patch], situation: host_patches.Situation, forced: bool):
        self.directory = directory
        self.patches = patches
        self.situation = situation
        self.forced = forced

    def find_spec(self, name, path=None, target=None):
        """See importlib.abc.MetaPathFinder."""
        patches = [patch for patch in self.patches if patch.module == name]
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if patches else None
        if spec is None or spec.origin is None or not Path(spec.origin).resolve().is_relative_to(self.directory):
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            for patch in patches:
                self.change(module, patch)
        spec.loader.exec_module = execute_and_change
        return spec

    def change(self, module, patch: host_patches.Patch) -> None:
        """Apply one patch; one that does not fit an unknown revision is left out, and that is said."""
        try:
            patch.apply(module, self.situation)
        except (AttributeError, KeyError) as err:
            if not self.forced:
                raise
            print(f'm2m_stylegan: {patch.what} of {patch.module} is not changed, since it is another one in this revision ({err})', file=sys.stderr)


# Processes that a script spawns (one per GPU) start by loading the script again; they must be hosted before that.

def _preparation_data(name: str, original=multiprocessing.spawn.get_preparation_data) -> dict:
    data = original(name)
    if 'init_main_from_path' in data:
        data['init_main_from_path'] = __file__
    return data


def main_of_spawned() -> dict:
    """The names of the script, loaded again in a process that it spawned."""
    directory, script = json.loads(os.environ[SPAWNED])
    install(directory)
    return runpy.run_path(script, run_name='__mp_main__')


# Messages.

def _excepthook(kind, error, trace) -> None:
    if isinstance(error, UserError):
        print(f'Error: {error}', file=sys.stderr)
    else:
        traceback.print_exception(kind, error, trace)


@contextlib.contextmanager
def _exits_on_user_error():
    try:
        yield
    except UserError as err:
        raise SystemExit(f'Error: {err}') from err


@click.group()
def main():
    """Run scripts of an official checkout, stylegan2-ada-pytorch or stylegan3, under this plugin."""


@main.command('run', context_settings={'ignore_unknown_options': True, 'allow_interspersed_args': False})
@click.option('--host', 'directory', metavar='DIR', help='The checkout  [default: where SCRIPT is]')
@click.option('--trust-pickles', is_flag=True, help='Open pickles as the official code does, which executes what is in them')
@click.option('--files', metavar='DIR', help='Take files of the web (inception-2015-12-05.pt, vgg16.pt) from here, by their last name')
@click.option('--force', is_flag=True, help='Go on with an unknown revision of the official code')
@click.argument('script')
@click.argument('args', nargs=-1, type=click.UNPROCESSED)
def run_command(directory, trust_pickles, files, force, script, args):
    """Run SCRIPT with its own ARGS; train.py takes --m2m-train, --m2m-slice and more, see its --help."""
    settings = {'M2M_TRUST_PICKLES': '1' if trust_pickles else None, 'M2M_HOST_FORCE': '1' if force else None, 'M2M_HOST_FILES': files}
    os.environ.update({name: value for name, value in settings.items() if value is not None})
    try:
        run(script, list(args), directory)
    except UserError as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
if __name__ == '__mp_main__':
    from m2m_stylegan import host
    globals().update(host.main_of_spawned())

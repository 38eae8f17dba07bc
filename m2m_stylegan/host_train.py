"""The options of ours that the host's train.py gains, and the hand-over to our training loop."""

import dataclasses
import sys
import types
import typing

import click

from m2m_stylegan import transfer
from m2m_stylegan.errors import UserError
from m2m_stylegan.transfer_options import TransferOptions

PREFIX = 'm2m_'
SAME_NAME = ('outdir', 'data', 'gpus', 'cond', 'subset', 'mirror', 'gamma', 'kimg', 'batch', 'batch_gpu', 'aug', 'p', 'target', 'augpipe', 'freezed',
             'tick', 'snap', 'metrics', 'seed', 'workers', 'nhwc', 'allow_tf32', 'nobench', 'fp32', 'dry_run', 'cbase', 'cmax', 'map_depth')
OTHER_NAME = {'resume': 'network', 'glr': 'lr'}
CONFIGS = {None, 'auto', 'stylegan2'}  # stylegan3's --cfg=stylegan2 says which networks; its numbers are all given by other options


def extend_next_command() -> None:
    """Give the next click command that is run, the script's, our options."""
    run = click.Command.main

    def main(self, *args, **kwargs):
        click.Command.main = run
        return run(extend(self), *args, **kwargs)
    click.Command.main = main


def extend(command: click.Command) -> click.Command:
    """Add an option `--m2m-NAME` for every field of TransferOptions that the command does not know; if one is used, our loop runs instead."""
    theirs = command.callback
    known = {OTHER_NAME.get(param.name, param.name) for param in command.params}
    fields = [field for field in dataclasses.fields(TransferOptions) if field.name not in known]
    command.params += [_option(field) for field in fields]

    def callback(*args, **options):
        ours = {field.name: value for field in fields if (value := options.pop(PREFIX + field.name)) is not None}
        if not ours:
            return theirs(*args, **options)
        context = click.get_current_context()
        given = {name: value for name, value in options.items() if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
        try:
            return transfer.run(transfer_options(given, ours), click.echo, [sys.executable, *sys.orig_argv[1:]])
        except UserError as err:
            raise UserError(f'{err}\n(Here the options of tools/transfer.py that are not official ones begin with --m2m-.)') from err
    command.callback = callback
    return command


def transfer_options(given: dict, ours: dict) -> TransferOptions:
    """`given`: what the command line says by the host's own options; `ours`: by --m2m-*. Raises UserError that lists what does not go together."""
    problems = []
    if given.get('cfg') not in CONFIGS:
        problems.append(f'--cfg={given["cfg"]}: our loop has the configuration auto; leave --cfg out, and give --batch, --gamma and --m2m-lr')
    if given.get('dlr', given.get('glr')) != given.get('glr'):
        problems.append('--dlr: our loop has one learning rate for G and D, --glr')
    if given.get('resume') in (None, 'noresume') and ours.get('train') != 'full' and 'resume' not in ours:
        problems.append('--resume=PKL is missing: what is trained is a part of a network')
    unknown = given.keys() - {*SAME_NAME, *OTHER_NAME, 'cfg', 'dlr'}
    problems += [f'--{name.replace("_", "-")} has no counterpart in our loop' for name in sorted(unknown)]
    if problems:
        raise UserError('These options cannot be handed over to --m2m-train:\n' + '\n'.join(f'  * {problem}' for problem in problems))
    fields = {OTHER_NAME.get(name, name): value for name, value in given.items() if name in SAME_NAME or name in OTHER_NAME}
    if fields.get('network') in (None, 'noresume'):
        fields['network'] = 'none'
    if isinstance(fields.get('metrics'), list):
        fields['metrics'] = ','.join(fields['metrics']) or 'none'
    return TransferOptions(**fields, **ours)


def _option(field: dataclasses.Field) -> click.Option:
    name, kind = field.name.replace('_', '-'), _type(field)
    return click.Option([f'--m2m-{name}', PREFIX + field.name], type=kind, metavar=kind.__name__.upper(), help=f'As --{name} of tools/transfer.py')


def _type(field: dataclasses.Field) -> type:
    """int | None => int."""
    if typing.get_origin(field.type) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(field.type) if kind is not type(None))
    return field.type

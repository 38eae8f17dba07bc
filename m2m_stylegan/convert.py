"""Network pickles to other formats: official .pkl (for instance from TensorFlow), .safetensors, plain .pt."""

import json
import os
from pathlib import Path

import safetensors.torch
import torch

from m2m_stylegan import snapshots
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write
from m2m_stylegan.network_records import constructor_kwargs

NETWORKS = ('G', 'D', 'G_ema')
FORMATS = ('.pkl', '.safetensors', '.pt')


def convert(source: str | os.PathLike, dest: str | os.PathLike, net: str = 'all') -> Path:
    """Write the networks of the pickle at `source` (see snapshots.load) to `dest`, in the format that its ending names; atomic.

    * .pkl: an official pickle with the source text it had, or ours if it had none. Always all networks.
    * .safetensors: float32 tensors as `G_ema.synthesis.b4.const`; metadata entry `m2m_stylegan` = JSON of `describe`.
    * .pt: `torch.save` of a dict of tensors. One network: its state_dict; all: names as in .safetensors.

    net: 'G', 'D', 'G_ema' or 'all'. Raises UserError for options that do not go together and as snapshots.load does.
    """
    dest = Path(dest)
    check(dest, net)
    snapshot = snapshots.load(source)
    if dest.suffix == '.pkl':
        snapshots.save(dest, G=snapshot.G, D=snapshot.D, G_ema=snapshot.G_ema, augment_pipe=snapshot.augment_pipe,
                       training_set_kwargs=snapshot.training_set_kwargs, like=snapshot)
        return dest
    nets = {name: getattr(snapshot, name) for name in (NETWORKS if net == 'all' else (net,))}
    tensors = {f'{name}.{key}': tensor.contiguous() for name, module in nets.items() for key, tensor in module.state_dict().items()}
    if dest.suffix == '.pt' and net != 'all':
        tensors = {key.removeprefix(f'{net}.'): tensor for key, tensor in tensors.items()}
    with atomic_write(dest) as tmp:
        if dest.suffix == '.pt':
            torch.save(tensors, tmp)
        else:
            safetensors.torch.save_file(tensors, tmp, {'m2m_stylegan': json.dumps(describe(snapshot, nets))})
    return dest


def check(dest: str | os.PathLike, net: str) -> None:
    """Raise UserError unless `dest` ends in a known format that can hold `net`."""
    dest = Path(dest)
    if net not in (*NETWORKS, 'all'):
        raise UserError(f'--net={net}: expected one of {", ".join(NETWORKS)}, all')
    if dest.suffix not in FORMATS:
        raise UserError(f'--dest={dest}: the name must end in one of {", ".join(FORMATS)}')
    if dest.suffix == '.pkl' and net != 'all':
        raise UserError(f'--net={net}: an official .pkl always holds G, D and G_ema; leave out --net, or choose .safetensors or .pt')


def describe(snapshot: snapshots.Snapshot, nets: dict[str, torch.nn.Module]) -> dict:
    """What a reader needs to make the networks again: class and constructor arguments of each, and where they come from."""
    return {
        'source_sha256': snapshot.sha256,
        'source_flavour': snapshot.flavour,
        'training_set_kwargs': snapshot.training_set_kwargs,
        'networks': {name: {'class': type(net).__name__, 'kwargs': constructor_kwargs(net)} for name, net in nets.items()},
    }

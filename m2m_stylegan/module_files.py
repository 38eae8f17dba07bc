"""Small trained modules on disk: one safetensors file with the fingerprint of what the module was made from and a checksum."""

import json
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

from m2m_stylegan.errors import UserError
from m2m_stylegan.feature_files import GARBAGE, Batch, Fingerprint, digest_of
from m2m_stylegan.files import atomic_write

_METADATA_KEY = 'm2m_stylegan'


def write(path: Path, fingerprint: Fingerprint, tensors: Batch) -> None:
    """Store {name: tensor} atomically."""
    tensors = {name: tensor.detach().to('cpu', copy=True).contiguous() for name, tensor in tensors.items()}
    metadata = json.dumps({'fingerprint': fingerprint, 'sha256': digest_of(tensors)})
    with atomic_write(path) as tmp:
        tmp.write_bytes(safetensors.torch.save(tensors, {_METADATA_KEY: metadata}))


def read(path: Path, fingerprint: Fingerprint) -> Batch | None:
    """The tensors of `write`, on the CPU; None if there is no file. Raises UserError if it is damaged or was made from something else."""
    if not path.exists():
        return None
    try:
        with safe_open(path, 'pt') as f:
            metadata = json.loads(f.metadata()[_METADATA_KEY])
            found, sha256 = dict(metadata['fingerprint']), metadata['sha256']
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118 (safe_open is no dict)
    except GARBAGE as err:
        cause = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise UserError(f'{path} is damaged ({cause}). Delete it; it will be made anew.') from err
    if found != fingerprint:
        differing = [f'{key}: {found.get(key)} in the file, {fingerprint.get(key)} wanted' for key in sorted({*found, *fingerprint})
                     if found.get(key) != fingerprint.get(key)]
        raise UserError(f'{path} was made from something else. Delete it; it will be made anew.\n' + '\n'.join(f'  * {line}' for line in differing))
    if digest_of(tensors) != sha256:
        raise UserError(f'{path} is damaged: its tensors do not match their checksum. Delete it; it will be made anew.')
    return tensors


def load_into(module: torch.nn.Module, tensors: Batch, path: Path) -> None:
    """Copy tensors into a module. Raises UserError if names or shapes do not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as err:
        raise UserError(f'{path} does not fit this version of the program. Delete it; it will be made anew.\n{err}') from err

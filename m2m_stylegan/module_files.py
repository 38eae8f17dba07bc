"""Small trained modules on disk: one safetensors file with the fingerprint of what the module was made from and a checksum."""

from pathlib import Path

import torch

from m2m_stylegan.errors import UserError
from m2m_stylegan.feature_files import GARBAGE, Batch, Fingerprint, digest_of, pack, unpack
from m2m_stylegan.files import atomic_write


def write(path: Path, fingerprint: Fingerprint, tensors: Batch) -> None:
    """Store {name: tensor} atomically."""
    tensors = {name: tensor.detach().to('cpu', copy=True).contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as tmp:
        tmp.write_bytes(pack(tensors, fingerprint=fingerprint))


def read(path: Path, fingerprint: Fingerprint) -> Batch | None:
    """The tensors of `write`, on the CPU; None if there is no file. Raises UserError if it is damaged or was made from something else."""
    if not path.exists():
        return None
    try:
        metadata, tensors = unpack(path)
        found, sha256 = dict(metadata['fingerprint']), metadata['sha256']
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

"""Which checkout of the official code a directory holds: by checksums of those files that the plugin changes at run time or builds on."""

import dataclasses
import hashlib
from pathlib import Path

from m2m_stylegan.errors import UserError

ADA, SG3 = 'stylegan2-ada-pytorch', 'stylegan3'
CALL = b'm2m_stylegan.host.patch('  # what tools/apply_patches.py inserts; a line with it does not count
BOM = b'\xef\xbb\xbf'

# Git blob ids (`git ls-tree -r HEAD`).
REVISIONS = {
    f'{ADA} d72cc7d': {
        'dnnlib/util.py': '76725336d01e75e1c68daa88be47f4fde0bbc63b',
        'legacy.py': '9387d79f23224642ca316399de2f0258f72de79b',
        'metrics/frechet_inception_distance.py': '1d38ec731b33e6f4f20cd4601e58d7e5ce2eaaa3',
        'metrics/metric_utils.py': '16de1eae3ee79549412eff5313dcf26b5d7a4bb9',
        'metrics/perceptual_path_length.py': 'd070f45a04efed7e9492fddb85078be306753282',
        'torch_utils/custom_ops.py': '4cc4e43fc6f6ce79f2bd68a44ba87990b9b8564e',
        'torch_utils/misc.py': '7829f4d9f168557ce8a9a6dec289aa964234cb8c',
        'torch_utils/ops/bias_act.py': '4bcb409a89ccf6c6f6ecfca5962683df2d280b1f',
        'torch_utils/ops/conv2d_gradfix.py': 'e95e10d0b1d0315a63a76446fd4c5c293c8bbc6d',
        'torch_utils/ops/grid_sample_gradfix.py': 'ca6b3413ea72a734703c34382c023b84523601fd',
        'torch_utils/ops/upfirdn2d.py': 'ceeac2b9834e33b7c601c28bf27f32aa91c69256',
        'torch_utils/persistence.py': '0186cfd97bca0fcb397a7b73643520c1d1105a02',
        'training/augment.py': '3efbf1270a94f08413075c986deeb1570a80f543',
        'training/networks.py': 'b046eba2c314c6b7b919ab1a048702a2636ba686',
        'training/training_loop.py': '14836ad2e4efe35eaf9423f515d7615e309d997c',
    },
    f'{SG3} c233a91': {
        'dnnlib/util.py': '6bbdf3bd8fe1c138cd969d37dcc52190b45c4c16',
        'legacy.py': '8cf53cb9396a639261bbcadb4e264e39415c1a56',
        'metrics/frechet_inception_distance.py': '7d5231cd70cf178ae3664a5974240b102ce3b0cf',
        'metrics/metric_utils.py': 'af122b21b5a7874d63b79ee40c2cb36d4ab4e5a2',
        'metrics/perceptual_path_length.py': 'c68519fea298b076ef317b5ea75e22a77225baaf',
        'torch_utils/custom_ops.py': '439e445b16da7ac985f7a1f2053e665385d47e87',
        'torch_utils/misc.py': '335397dd1662d8f5bfd44e17899a00549867f4bc',
        'torch_utils/ops/bias_act.py': 'b2b53d7da34c76d53251bb9cbc2eb071c50af921',
        'torch_utils/ops/upfirdn2d.py': '394f746e0096ececc7b6c83daf75c21cb808385f',
        'torch_utils/persistence.py': 'f90ce85e8ace0f44e839158b22c5790de448d82d',
        'training/augment.py': 'd68e35c96ef9fa9c18bbb6668f03b9463098710e',
        'training/networks_stylegan2.py': '95edbda63a5cf1d61c521aa8f06ebd7b028af4af',
        'training/training_loop.py': 'ddd0c15e226b0436048fee4469341e3fb653c71b',
        'training/networks_stylegan3.py': 'ab1a708da3bcc020edf4553ede177149f8fa8698',
    },
}
# A file that only one of the two has.
LANDMARKS = {ADA: 'training/networks.py', SG3: 'training/networks_stylegan2.py'}


@dataclasses.dataclass(frozen=True)
class Host:
    """A checkout."""

    directory: Path
    flavour: str               # ADA or SG3
    name: str                  # 'stylegan2-ada-pytorch d72cc7d', or without the commit if it is unknown
    differences: tuple[str, ...]  # from the nearest known revision, one line each


def detect(directory: str | Path) -> Host:
    """Tell what the checkout is. Raises UserError if it is neither stylegan2-ada-pytorch nor stylegan3, nor a fork of them."""
    directory = Path(directory).resolve()
    flavours = [flavour for flavour, path in LANDMARKS.items() if (directory / path).is_file() and (directory / 'dnnlib').is_dir()]
    if not flavours:
        raise UserError(f'{directory} is no checkout of {ADA} or {SG3}: it has none of dnnlib/ with {" or ".join(LANDMARKS.values())}.')
    flavour = flavours[0]
    candidates = {name: _differences(directory, files) for name, files in REVISIONS.items() if name.startswith(f'{flavour} ')}
    name, differences = min(candidates.items(), key=lambda item: len(item[1]))
    return Host(directory, flavour, flavour if differences else name, tuple(differences))


def check(host: Host) -> None:
    """Raise UserError with all differences unless the revision is a known one."""
    if host.differences:
        raise UserError(f'{host.directory} is a revision of {host.name} that this plugin does not know:\n'
                        + '\n'.join(f'  * {line}' for line in host.differences)
                        + '\nWhere the changes do not matter to it, --force (in a patched checkout M2M_HOST_FORCE=1) goes on.')


def _differences(directory: Path, files: dict[str, str]) -> list[str]:
    found = {path: blob_id((directory / path).read_bytes()) if (directory / path).is_file() else 'missing' for path in files}
    return [f'{path}: {"is missing" if found[path] == "missing" else f"blob {found[path][:12]}, known is {known[:12]}"}'
            for path, known in files.items() if found[path] != known]


def blob_id(data: bytes) -> str:
    """The id that Git gives the content of a text file, however the checkout ends its lines, and without the call that our patches insert."""
    lines = [line for line in data.replace(b'\r\n', b'\n').split(b'\n') if CALL not in line]
    return git_id(b'\n'.join(lines))


def git_id(data: bytes) -> str:
    """Git's SHA-1 of a blob; it tells revisions apart, it protects from nobody."""
    return hashlib.sha1(b'blob %d\0' % len(data) + data, usedforsecurity=False).hexdigest()

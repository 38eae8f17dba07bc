"""Network pickles with networks in them: `load` opens one, `save` writes one that the official tools open. Nothing in a file is executed."""

import hashlib
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch

from m2m_stylegan import legacy_tf, network_records, networks, pickles
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import sha256_of
from m2m_stylegan.network_kwargs import printable
from m2m_stylegan.pickles import Record, TFNetwork

NAMES = ('G', 'D', 'G_ema')
CLASSES = {'G': 'Generator', 'D': 'Discriminator', 'G_ema': 'Generator'}

SOURCE_MARK = '# Self-contained StyleGAN2 networks of m2m_stylegan'
SOURCE_HEADER = SOURCE_MARK + """ (Apache License 2.0).
# The official loaders execute this text to get the classes of the objects in this file. It needs torch and numpy.

"""
SOURCE_FOOTER = """

# Where the official code is at hand, objects that these classes construct can be pickled again like those from the file.
try:
    from torch_utils.persistence import persistent_class
except ImportError:
    pass
else:
    for _name, _value in list(globals().items()):
        if isinstance(_value, type) and issubclass(_value, torch.nn.Module):
            globals()[_name] = persistent_class(_value)
"""


@dataclass(eq=False)
class Snapshot:
    """What a network pickle holds. Networks are in eval mode, float32, on the CPU, without gradients.

    `augment_pipe` is an unexecuted record; `records` are those that the networks were made from ('G', 'D', 'G_ema', 'augment_pipe'), so
    that `save(like=...)` can write them again with their own source text; empty if `flavour` is 'tf'. `flavour`: whose source text it is.
    """

    G: networks.Generator
    D: networks.Discriminator
    G_ema: networks.Generator
    augment_pipe: Record | None
    training_set_kwargs: dict | None
    flavour: str                    # 'ada', 'sg3', 'm2m' or 'tf'
    records: dict[str, Record] = field(repr=False)
    sha256: str                     # of the file


def load(source: str | os.PathLike | bytes) -> Snapshot:
    """Open an official pickle of stylegan2-ada-pytorch or stylegan3 (StyleGAN2 networks), one of ours, or a TensorFlow one (version >= 4).

    `source`: path, or the bytes of a file. Every tensor must be present, and none besides, in the shape that the others imply; the
    parameter-or-buffer kind (FreezeD) is kept. Raises UserError that lists all that is wrong; warns about NaN and infinite weights.
    """
    tree, sha256, name = _read(source)
    if _is_tf(tree):
        return Snapshot(*legacy_tf.convert(tree), None, None, 'tf', {}, sha256)
    _check_root(tree, NAMES, name)
    nets = _build(tree, NAMES, name)
    records = {key: tree[key] for key in (*NAMES, 'augment_pipe') if tree.get(key) is not None}
    return Snapshot(**nets, augment_pipe=tree.get('augment_pipe'), training_set_kwargs=tree.get('training_set_kwargs'),
                    flavour=_flavour(tree['G_ema']), records=records, sha256=sha256)


def load_G_ema(source: str | os.PathLike | bytes) -> networks.Generator:
    """The averaged generator alone; unlike `load`, also from a file that holds nothing else."""
    tree, _sha256, name = _read(source)
    if _is_tf(tree):
        return legacy_tf.convert(tree)[2]
    if isinstance(tree, Record):
        tree = {'G_ema': tree}
    _check_root(tree, ('G_ema',), name)
    return _build(tree, ('G_ema',), name)['G_ema']


def save(
    path: str | os.PathLike,
    *,
    G: networks.Generator,
    D: networks.Discriminator,
    G_ema: networks.Generator,
    augment_pipe: torch.nn.Module | Record | None = None,
    training_set_kwargs: dict | None = None,
    like: Snapshot | None = None,
) -> None:
    """Write a network pickle that stylegan2-ada-pytorch and stylegan3 open, atomically; tensors become float32 on the CPU.

    If `like` has records, they are written again, object by object with their own source text, holding the tensors and options of the
    given networks. Else our own source text is embedded (`embedded_source`), which needs Python 3.7 and torch 1.7 or newer.
    `augment_pipe`: an AugmentPipe, or a record that is written as it is. Raises UserError if a network differs in structure from `like`.
    """
    records = {} if like is None else like.records
    tree: dict[str, object] = {'training_set_kwargs': training_set_kwargs}
    source, problems = embedded_source('networks'), []
    for name, net in [('G', G), ('D', D), ('G_ema', G_ema), ('augment_pipe', augment_pipe)]:
        try:
            if net is None or isinstance(net, Record):
                tree[name] = net
            elif name in records:
                tree[name] = network_records.rewrite(records[name], net)
            else:
                tree[name] = network_records.embed(net, source if name in NAMES else embedded_source('augment'))
        except network_records.Mismatch as err:
            problems += [f'{name}: {problem}' for problem in err.problems]
    if problems:
        raise UserError(_listed(f'Cannot write {os.fspath(path)} with the source text of the file that it comes from', problems))
    pickles.dump(tree, path)


def embedded_source(module: str) -> str:
    """The text of m2m_stylegan/{module}.py ('networks' or 'augment') and of the operators it uses, ready to be executed by official loaders."""
    package = resources.files('m2m_stylegan')
    texts = [package.joinpath(name).read_text(encoding='utf-8') for name in ('ops/reference.py', 'ops/resample.py', f'{module}.py')]
    return SOURCE_HEADER + '\n\n'.join(texts) + SOURCE_FOOTER


def _read(source: str | os.PathLike | bytes) -> tuple[object, str, str]:
    """The tree in a file, the file's SHA-256, and what to call it in messages."""
    tree = pickles.load(source)
    if isinstance(source, bytes):
        return tree, hashlib.sha256(source).hexdigest(), 'the pickle'
    return tree, sha256_of(source), str(Path(source))


def _is_tf(tree: object) -> bool:
    return isinstance(tree, tuple) and any(isinstance(net, TFNetwork) for net in tree)


def _check_root(tree: object, names: tuple[str, ...], source: str) -> None:
    """Raise UserError unless `tree` is a dict with networks of the expected classes under `names`."""
    if not isinstance(tree, dict):
        raise UserError(f'{source} holds {_describe(tree)}; expected a dict with the networks G, D and G_ema, as the official training writes.')
    problems = [f'{name} is missing (there are: {", ".join(printable(str(key)) for key in list(tree)[:20]) or "no entries"})'
                for name in names if name not in tree]
    for name in names:
        if name in tree and not isinstance(tree[name], Record):
            problems.append(f'{name} is {_describe(tree[name])}, expected a network')
        elif name in tree and tree[name].class_name != CLASSES[name]:
            problems.append(f'{name} is {_describe(tree[name])}, expected a {CLASSES[name]}')
    if alias_free := [name for name in names if isinstance(tree.get(name), Record) and _is_alias_free(tree[name])]:
        problems.append(f'{" and ".join(alias_free)}: alias-free StyleGAN3 generator (config stylegan3-t or stylegan3-r), which is not supported. '
                        'Take a StyleGAN2 network, from stylegan2-ada-pytorch or trained by stylegan3 with --cfg=stylegan2. '
                        '(The D beside it is an ordinary StyleGAN2 discriminator, but of no use without such a G.)')
    for key, kind in (('augment_pipe', Record), ('training_set_kwargs', dict)):
        if not isinstance(tree.get(key), (kind, type(None))):
            problems.append(f'{key} is {_describe(tree[key])}')
    if problems:
        raise UserError(_listed(f'{source} is not a usable network pickle', problems))


def _build(tree: dict, names: tuple[str, ...], source: str) -> dict[str, torch.nn.Module]:
    nets, problems = {}, []
    for name in names:
        try:
            nets[name] = network_records.build(tree[name])
        except network_records.Mismatch as err:
            problems += [f'{name}: {problem}' for problem in err.problems]
    for attribute in ('img_resolution', 'img_channels', 'c_dim'):
        values = {name: getattr(net, attribute) for name, net in nets.items()}
        if len(set(values.values())) > 1:
            problems.append(f'{attribute} differs: {", ".join(f"{name} {value}" for name, value in values.items())}')
    if problems:
        raise UserError(_listed(f'The networks in {source} are not intact StyleGAN2 networks', problems))
    return nets


def _is_alias_free(record: Record) -> bool:
    synthesis = record.state['_modules'].get('synthesis')
    return synthesis is not None and 'input' in synthesis.state['_modules']


def _flavour(record: Record) -> str:
    if record.module_src.startswith(SOURCE_MARK):
        return 'm2m'
    return 'sg3' if 'fused_modconv_default' in record.state['_modules']['synthesis'].state['_modules']['b4'].state else 'ada'


def _describe(value: object) -> str:
    if isinstance(value, Record):
        return f'a single network of class {printable(value.class_name)}'
    return 'nothing' if value is None else f'a {type(value).__name__}'


def _listed(title: str, problems: list[str]) -> str:
    return f'{title}:\n' + '\n'.join(f'  * {problem}' for problem in problems)

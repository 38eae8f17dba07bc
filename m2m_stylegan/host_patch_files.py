"""Applying and taking back the patch files in patches/: zero-context additions that carry Git's checksums of the files before and after."""

import dataclasses
import os
import re
from pathlib import Path

from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write
from m2m_stylegan.host_revisions import BOM, git_id

_FILE = re.compile(r'diff --git a/(?P<path>\S+) b/(?P=path)\n'
                   r'index (?P<old>[0-9a-f]{40})\.\.(?P<new>[0-9a-f]{40}) \d+\n'
                   r'--- a/(?P=path)\n'
                   r'\+\+\+ b/(?P=path)\n'
                   r'@@ -(?P<line>\d+),0 \+\d+(?:,\d+)? @@\n'
                   r'(?P<added>(?:\+[^\n]*\n)+)')


@dataclasses.dataclass(frozen=True)
class Insertion:
    """Lines to be added behind line `line` of a file; `old`, `new`: Git's blob ids of the file without and with them."""

    path: str
    old: str
    new: str
    line: int
    added: tuple[bytes, ...]


def read(path: str | os.PathLike) -> list[Insertion]:
    """The insertions of a patch file; text before the first `diff` is free. Raises UserError if it does anything else than add lines."""
    text = Path(path).read_text(encoding='utf-8')
    body = text[max(text.find('diff --git '), 0):]
    found = list(_FILE.finditer(body))
    if not found or ''.join(match[0] for match in found) != body:
        raise UserError(f'{path} is not a patch of additions alone, one place in each file, without context (git diff -U0 --full-index).')
    paths = [match['path'] for match in found]
    if any(Path(name).is_absolute() or '..' in Path(name).parts for name in paths):
        raise UserError(f'{path} names a file outside the checkout.')
    return [Insertion(match['path'], match['old'], match['new'], int(match['line']),
                      tuple(line[1:].encode() for line in match['added'].splitlines())) for match in found]


def choose(patches: str | os.PathLike, directory: str | os.PathLike) -> tuple[str, dict[Insertion, str]]:
    """The patch of `patches`/series that fits the checkout in `directory`, and for each insertion 'absent' or 'present'.

    Raises UserError that lists, for the patch that comes closest, the files it does not fit.
    """
    failed = []
    for name in (Path(patches) / 'series').read_text(encoding='utf-8').split():
        states = {insertion: state(Path(directory) / insertion.path, insertion) for insertion in read(Path(patches) / name)}
        problems = [f'{insertion.path} {what}' for insertion, what in states.items() if what not in ('absent', 'present')]
        if not problems:
            return name, states
        failed.append((len(problems) - len(states), name, problems))
    _fitting, name, problems = min(failed)
    raise UserError(f'No patch fits the checkout in {directory}; nothing was changed. {name} does not because of these files:\n'
                    + '\n'.join(f'  * {line}' for line in problems) + '\ntools/host.py run needs no patches.')


def state(path: Path, insertion: Insertion) -> str:
    """'absent', 'present', or why the insertion does not fit the file; line ends and a byte order mark make no difference."""
    if not path.is_file():
        return 'is missing'
    data = path.read_bytes().replace(b'\r\n', b'\n')
    ids = {git_id(data), git_id(BOM + data)}
    if insertion.new in ids:
        return 'present'
    return 'absent' if insertion.old in ids else f'has blob {git_id(data)[:12]}, expected {insertion.old[:12]}'


def apply(directory: str | os.PathLike, insertions: dict[Insertion, str]) -> list[str]:
    """Add the lines where they are absent; the rest of each file stays as it is, byte by byte. Returns the paths of changed files."""
    return _change(directory, insertions, 'absent', _with)


def revert(directory: str | os.PathLike, insertions: dict[Insertion, str]) -> list[str]:
    """Remove the lines where they are present. Returns the paths of changed files."""
    return _change(directory, insertions, 'present', _without)


def _change(directory, insertions, state_before, change) -> list[str]:
    chosen = [insertion for insertion, what in insertions.items() if what == state_before]
    for insertion in chosen:
        path = Path(directory) / insertion.path
        lines, mode = path.read_bytes().splitlines(keepends=True), path.stat().st_mode
        with atomic_write(path) as temporary:
            temporary.write_bytes(b''.join(change(lines, insertion)))
        os.chmod(path, mode)
    return [insertion.path for insertion in chosen]


def _with(lines: list[bytes], insertion: Insertion) -> list[bytes]:
    end = b'\r\n' if lines[insertion.line - 1].endswith(b'\r\n') else b'\n'
    return lines[:insertion.line] + [line + end for line in insertion.added] + lines[insertion.line:]


def _without(lines: list[bytes], insertion: Insertion) -> list[bytes]:
    return lines[:insertion.line] + lines[insertion.line + len(insertion.added):]

"""Reads the whole hostile corpus in a process of its own, under watch.

`python hostile_reader.py FOLDER` prints a JSON report. Nothing may run, open a file, hang, or take much memory.
"""

import contextlib
import json
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import hostile

from m2m_stylegan import pickles
from m2m_stylegan.errors import UserError

MEMORY_GROWTH = 2**30
SECONDS_PER_CASE = 60       # far beyond any case here; turns a hang into a failure


class Watch:
    """Notes what the interpreter does while `on`: imports, compiled code, opened files, processes, sockets (PEP 578)."""

    HARMLESS = ('object.__', 'marshal.', 'sys._getframe', 'builtins.id', 'gc.')

    def __init__(self):
        self.on, self.events = False, []
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple) -> None:
        if self.on and not event.startswith(self.HARMLESS):
            self.events.append(f'{event} {args!r:.100}')


def outcome(case: hostile.Case, watch: Watch) -> tuple[str, str | None]:
    """('loaded' or 'refused', what is wrong with that if anything)."""
    signal.alarm(SECONDS_PER_CASE)
    watch.on, watch.events[:] = True, []
    try:
        tree = pickles.load(case.data)
        problem = None if case.may_load else 'was accepted'
        with contextlib.suppress(TypeError, ValueError):    # TensorFlow networks, and depths that only records reach
            pickles.dumps(tree)
        result = 'loaded'
    except UserError as err:
        message = str(err)
        clean = message.startswith('Cannot read the pickle as a network pickle: ') and message.isprintable() and len(message) < 1000
        result, problem = 'refused', None if clean else f'message {message[:1000]!a}'
    except BaseException:   # whatever it is, it is what the test is looking for
        result, problem = 'crashed', traceback.format_exc(limit=-3)
    finally:
        watch.on = False
        signal.alarm(0)
    return result, f'did {watch.events}' if watch.events else problem


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(folder: str) -> None:
    list(map(pickles.load, (data for _, data in hostile.good_pickles())))    # everything that is loaded on first use
    warnings.simplefilter('ignore')
    watch = Watch()
    pages = int(Path('/proc/self/statm').read_text().split()[0]) if sys.platform == 'linux' else None
    if pages:
        limit = pages * resource.getpagesize() + MEMORY_GROWTH
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, problems, counts, slowest = peak_bytes(), [], Counter(), (0.0, '')
    for case in hostile.corpus(folder):
        start = time.process_time()
        result, problem = outcome(case, watch)
        slowest = max(slowest, (time.process_time() - start, case.name))
        counts[result] += 1
        if problem:
            problems.append(f'{case.name}: {result}, {problem}')
    print(json.dumps({'counts': counts, 'problems': problems, 'growth': peak_bytes() - before, 'slowest': slowest}))


if __name__ == '__main__':
    main(sys.argv[1])

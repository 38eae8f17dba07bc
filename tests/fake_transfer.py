"""Stands in for tools/transfer.py in tests of the comparison: the same files, without training and without importing torch.

Beside the network pickle it finds its orders: `checkpoint-name`, `die-METHOD-N` (kill yourself once after snapshot N), `fail-METHOD` (exit
with an error), `wait-METHOD` (go on only when that file is gone, or after half a minute). There it writes `calls.txt`, one line per start.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

options = dict(word.removeprefix('--').split('=', 1) for word in sys.argv[1:])
resume = options.get('resume')
if resume:
    stored = json.loads((Path(resume) / 'options.json').read_text())
    options = {**stored, **{k: v for k, v in options.items() if k in ('minutes', 'kimg', 'device', 'workers')}}
orders = Path(options['network']).parent
cell = Path(options['outdir'])
method = cell.name.rpartition('-seed')[0]
with open(orders / 'calls.txt', 'a') as f:
    f.write(f'{cell.name} {"resumed" if resume else "new"}\n')
if (orders / f'fail-{method}').exists():
    sys.exit('the machine is on fire')
run = Path(resume) if resume else cell / '00000-fake'
run.mkdir(exist_ok=bool(resume))
(run / 'options.json').write_text(json.dumps(options))
Path(options['cache-dir']).mkdir(parents=True, exist_ok=True)
(Path(options['cache-dir']) / 'features').write_bytes(bytes(1000))
end = time.time() + 30
while (orders / f'wait-{method}').exists() and time.time() < end:
    time.sleep(0.02)
budget, step = float(options['minutes']) * 60, float(options['snap-minutes']) * 60
done = len((run / 'snapshots.jsonl').read_text().splitlines()) if (run / 'snapshots.jsonl').exists() else 0
speed = {'full': 10, 'high-res': 20}.get(method, 5)
for k in range(done + 1, round(budget / step) + 1):
    die = orders / f'die-{method}-{k - 1}'
    if die.exists():
        die.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    elapsed = k * step + 0.25
    nimg = int(elapsed * speed)
    pkl = run / f'network-snapshot-{nimg // 1000:06d}_{nimg % 1000:03d}.pkl'
    shutil.copy(options['network'], pkl)
    (run / (orders / 'checkpoint-name').read_text()).write_text(str(k))
    stats = {'Timing/sec_per_kimg': 1000 / speed, 'Resources/cpu_mem_gb': 1 + k / 10, 'Resources/peak_gpu_mem_gb': 0, 'Timing/maintenance_sec': 4 + k,
             'Progress/kimg': nimg / 1000, 'Timing/total_sec': elapsed}
    with open(run / 'stats.jsonl', 'a') as f:
        f.write(json.dumps({name: {'num': 1, 'mean': value, 'std': 0} for name, value in stats.items()} | {'timestamp': 0}) + '\n')
    with open(run / 'snapshots.jsonl', 'a') as f:
        f.write(json.dumps({'pkl': pkl.name, 'cur_nimg': nimg, 'elapsed_s': elapsed}) + '\n')

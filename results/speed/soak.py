"""Memory and open files of a long run, every ten seconds; Linux only.

    python results/speed/soak.py qflow.py --hidden 8 8 --offline-steps 100000 --eval-interval 5000 \
        --eval-episodes 2 --log-interval 100 --batch-size 16
"""

import os
import subprocess
import sys
import time
from pathlib import Path

script, *flags = sys.argv[1:]
root = Path(__file__).resolve().parents[2]
process = subprocess.Popen(
    [sys.executable, root / script, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
)
folder = Path(f"/proc/{process.pid}")
page = os.sysconf("SC_PAGESIZE")
start = time.perf_counter()
next_time = 10
print("seconds,resident_mb,open_files", flush=True)
while process.poll() is None:
    time.sleep(0.1)
    seconds = time.perf_counter() - start
    if seconds > next_time:
        resident = int((folder / "statm").read_text().split()[1]) * page / 1e6
        files = len(os.listdir(folder / "fd"))
        print(f"{seconds:.0f},{resident:.1f},{files}", flush=True)
        next_time += 10
sys.exit(process.returncode)

"""One OpenMP team: the engine's thread takes over, and the threads of the one that built it are gone."""

import os
import subprocess
import sys

import pytest

COUNT = """
import os, threading
import torch
from dspark.common.threads import release_team

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
work = lambda: torch.ones(1 << 22).exp_()
before = threads()
work()
with_team = threads()
release_team()
released = threads()
work()
again = threads()
other = threading.Thread(target=work)
other.start()
other.join()
print(with_team - before, released - before, again - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_a_released_team_is_gone_and_comes_back():
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    ran = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, env=environment, timeout=120)
    assert ran.stdout.split() == ["1", "0", "1"], ran.stderr

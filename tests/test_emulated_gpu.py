"""The scripts on a device whose tensors do not mix with the host's, where there is no GPU: emulated_gpu.py.

In processes of their own, as that module changes torch.
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                                reason="this torch has no devices written in Python")
REFUSED = """
import pytest, torch
import emulated_gpu as emulated
x, y = torch.ones(3, device=emulated.DEVICE), torch.arange(3)
assert (x + 1).sum().item() == 6 and x[y].tolist() == [1, 1, 1]     # allowed, but the host waits
for mix in (lambda: x + y, lambda: y[x > 0], lambda: x.index_put_((x.long(),), y * 1.0)):
    with pytest.raises(RuntimeError, match="two devices"):
        mix()
torch.cuda.set_sync_debug_mode("error")
for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x[y], lambda: x.cpu(), lambda: y.to(x.device),
             lambda: x.copy_(y), lambda: bool(x.all()), lambda: x.nonzero(), lambda: torch.tensor(1, device=x.device)):
    with pytest.raises(RuntimeError, match="waits"):
        wait()
y.to(x.device, non_blocking=True)
x[0] = x[1] + 1
"""


def test_the_device_refuses_to_mix_and_notices_waits():
    done = subprocess.run([sys.executable, "-c", REFUSED], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_scripts_run_on_the_device_without_waits_in_a_step():
    # "from the CPU and back" does what "whole" and "resumed" do, a share of two processes has micro-batches; the
    # blocks that map are the same in all scripts
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py",
               "-k", "not whole and not resumed and not micro and (not mapped or gmml)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500,
                          env={**os.environ, "CUDA_TESTS_ON": "emulated", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "24 passed" in done.stdout, done.stdout

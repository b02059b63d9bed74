"""Two processes give the loss and the gradients of one: what no notebook can see, since a kernel is one process."""
import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from avnb.losses import GroundingLoss, LogScale
from avnb.processes import batch_scores
world = int(os.environ.get("WORLD_SIZE", 1)); rank = int(os.environ.get("RANK", 0))
if world > 1: dist.init_process_group("gloo")
torch.manual_seed(0)
n, share = 7, [slice(0, 3), slice(3, 7)] if world > 1 else [slice(0, 7)]  # unequal shares
a, v, keep = torch.randn(n, 5, 6, dtype=torch.double), torch.randn(n, 9, 6, dtype=torch.double), torch.rand(n, 5) < .7
keep[:, 0] = True
wa, wv, loss = torch.nn.Linear(6, 4).double(), torch.nn.Linear(6, 4).double(), GroundingLoss(LogScale(), pressure=.15)
part = share[rank]
scores, press = batch_scores(wa(a[part]), keep[part], wv(v[part]), True, world)
value, _ = loss(scores, press)
value.backward()
params = [*wa.parameters(), *wv.parameters(), *loss.parameters()]
if world > 1:
    for p in params: dist.all_reduce(p.grad); p.grad /= world
if rank == 0: json.dump({"loss": value.item(), "grads": [p.grad.flatten().tolist() for p in params]}, open(sys.argv[1], "w"))
if world > 1: dist.barrier(); dist.destroy_process_group()
"""


@pytest.mark.quick
def test_two_processes_give_one_batch(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    found = {}
    for world, start in ((1, []), (2, ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"])):
        out = tmp_path / f"{world}.json"
        subprocess.run([sys.executable, *start, str(script), str(out)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
        found[world] = json.loads(out.read_text())
    assert found[1]["loss"] == pytest.approx(found[2]["loss"], rel=1e-6)
    for one, two in zip(found[1]["grads"], found[2]["grads"], strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-9)
    assert any(abs(g) > 1e-3 for gs in found[1]["grads"] for g in gs)


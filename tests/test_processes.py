"""Two processes give the loss and the gradients of one: what no notebook can see, since a kernel is one process."""
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from safetensors.torch import save_file
from avnb.checkpoints import build_model
from avnb.gradients import backward, cached_backward
from avnb.objectives import Grounding
from avnb.processes import average_gradients
from avnb.recipes import recipe
world = int(os.environ.get("WORLD_SIZE", 1)); rank = int(os.environ.get("RANK", 0))
if world > 1: dist.init_process_group("gloo")
out, pieces, overrides = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
r = recipe("grounding", overrides=overrides)
torch.manual_seed(0)
model, objective = build_model(r).double().train(), Grounding(r.model, r.loss).double()
n, F = 7, r.view.frames
g = torch.Generator().manual_seed(1)
draw = lambda *s: torch.randn(*s, generator=g).double()
batch = dict(audio=draw(n, 3200), keep=torch.ones(n, 3200, dtype=torch.bool), image=draw(n, *([F] if F > 1 else []), 3, 32, 32),
             label=torch.tensor([5, 6, 5, -1, -1, 7, 8]), spliced=torch.rand(n, 3200, generator=g) < 1e-4)
if r.view.dub: batch |= dict(dub=draw(n, 3200), dub_keep=torch.ones(n, 3200, dtype=torch.bool))
part = [slice(0, 3), slice(3, 7)][rank] if world > 1 else slice(0, 7)  # unequal shares
batch = {k: v[part] for k, v in batch.items()}
how = dict(rank=rank, world=world)
loss, terms = cached_backward(model, objective, batch, pieces, **how) if pieces > 1 else backward(model, objective, batch, **how)
params = [*model.parameters(), *objective.parameters()]
average_gradients(params, world)
if rank == 0:
    named = [*model.named_parameters(), *objective.named_parameters()]
    save_file({"loss": loss, **{f"grad {k}": p.grad for k, p in named if p.grad is not None}, **{f"buffer {k}": b.double().clone() for k, b in model.named_buffers()}}, out)
if world > 1: dist.barrier(); dist.destroy_process_group()
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
CASES = {
    "plain": {},
    "seed": {"model.similarity": "dot", "model.head": "linear", "loss.pressure": .15},
    "denseav": {"model.heads": 2, "loss": {"pressure": .01, "pressure_kind": "pairs", "silence": .01, "variation": .01, "calibration": .1, "specialisation": .05}},
    "paired, hybrid, labels": {"model.aggregate": "paired", "loss": {"share_global": .3, "negatives": "label"}},
    "dubs": {"model.heads": 2, "loss.invariance": .5, "loss.audible": True, "view.dub": "language"},
    "frames, embedding": {"view.frames": 2, "model.frame_pool": "softmax", "model.time_pool": 2, "loss": {"negatives": "embedding", "negative_weight": .2, "negative_above": .1}},
}


def both(tmp_path, overrides, pieces=1, prepare=""):
    "The same step by one process and by two."
    script = tmp_path / "job.py"
    script.write_text(prepare + SCRIPT)
    found = []
    for world, start in ((1, []), (2, TORCHRUN)):
        out = tmp_path / f"{world}.safetensors"
        subprocess.run([sys.executable, *start, str(script), str(out), str(pieces), json.dumps(overrides)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=180)
        found.append(load_file(out))
    return found


def agree(one, two):
    assert one.keys() == two.keys()
    size = max(v.norm() for k, v in one.items() if k.startswith("grad"))
    for k, v in one.items():  # a gradient that is zero but for rounding has no digits to compare
        assert (v - two[k]).norm() <= 1e-6 * max(v.norm(), 1e-6 * size), k
    assert size > 1e-3


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.quick) if c == "plain" else c for c in CASES])
def test_two_processes_give_one_batch(case, tmp_path):
    agree(*both(tmp_path, CASES[case]))


@pytest.mark.parametrize("case", ["plain", "dubs"])
def test_two_processes_give_one_batch_in_pieces(case, tmp_path):
    "Cached gradients over ranks: towers without batch norm, since with it a piece is not encoded as the batch is."
    plain = "import torch.nn as nn, avnb.encoders as e\nclass None_(nn.Identity): pass\ne.BatchNorm1d = e.BatchNorm2d = None_\n"
    one, two = both(tmp_path, {"model.head": "linear", **CASES[case]}, pieces=2, prepare=plain)
    agree(one, two)


def test_without_common_statistics_they_differ(tmp_path):
    "The counter-test: batch norm over each rank's own clips is another loss."
    alone = "import avnb.encoders as e\ne._OverRanks.forward = lambda self, x: super(e._OverRanks, self).forward(x)\n"
    one, two = both(tmp_path, {}, prepare=alone)
    assert torch.allclose(one["loss"], two["loss"], rtol=1e-6) is False

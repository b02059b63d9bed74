"""Killed at any moment, also while it saves, and started again, a run ends as if nothing had happened: losses and weights bit for bit."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from places import workplace
from test_runs import ENVIRONMENT, TINY, finished, n_lines

from avnb.checkpoints import checkpoints, load_run
from avnb.recipes import recipe, variants
from avnb.store import prepare
from avnb.toy import make_toy
from avnb.training import read_lines

STEPS = 24
TOWERS = {"model.audio": "hubert", "model.image": "dino", "model.head": "linear", "view.image.size": 56, "train.backbone_lr": 1e-3}
LATE = {"train.unfreeze_audio_step": 7, "train.unfreeze_image_step": 15}  # towers learn one after the other
MODES = {
    "plain": {},
    "float32": {"train.precision": "no"},
    "workers": {},  # settings.ini says how many
    "accumulation": {"train.accumulate": 3},
    "cached gradients": {**TOWERS, "train.unfreeze_audio_step": 0, "train.unfreeze_image_step": 0, "train.micro_batch": 2},
    "unfreezing": {**TOWERS, **LATE},
    "adapters": {**TOWERS, **LATE, "model.lora_image": 2},
    "token cache": {**TOWERS, **LATE, "train.token_cache": True, "view.audio.gain_db": 0.0, "view.image": {"crop": [1.0, 1.0], "aspect": [1.0, 1.0], "shift": 0.0, "flip": 0.0, "colour": 0.0}, "view.frame": "middle"},
    "everything": {**TOWERS, **LATE, "train.accumulate": 2, "train.micro_batch": 2, "model.heads": 2, "view.splice": 0.5,
                   "loss": {"pressure": 0.1, "pressure_kind": "sampled", "silence": 0.01, "variation": 0.01, "specialisation": 0.05, "share_global": 0.2}},
    "B3": {"store.fps": 16 / 3}, "B5": {"store.fps": 16 / 3}, "C2": {"store.fps": 16 / 3, "train.per_title": 2},  # of LSSD, the last two after an ancestor
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A small store, and tiny towers of the published classes with dropout, layer-drop and SpecAugment on."
    home = tmp_path_factory.mktemp("kills")
    make_toy(home / "videos", 12, languages=("en",), workers=2)
    prepare(home / "videos", home / "store", recipe=recipe("grounding", data=home / "videos", overrides={"store.fps": 2, "store.workers": 0}))
    make_toy(home / "films", 6, kind="dubs", languages=("en", "fr", "de"), workers=2)
    prepare(home / "films", home / "dubs", recipe=recipe("B3", data=home / "films", overrides={"store.workers": 0}))
    torch.manual_seed(0)
    transformers.HubertModel(transformers.HubertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
                                                       num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)).save_pretrained(home / "hubert")
    transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, hidden_dropout_prob=0.1)).save_pretrained(home / "dino")
    return home


def started(place, mode, out, steps=STEPS, processes=1):
    two = mode in ("workers", "everything")
    cwd = workplace(place / ("two" if two else "none"), "workers = 2\n"*two)
    chosen = {**TINY, **MODES[mode]}
    for tower in ("model.audio", "model.image"):
        if tower in chosen: chosen[tower] = str(place / chosen[tower])
    told = ["--data", place / "dubs", "--variant", mode] if mode in variants else ["--data", place / "store"]
    args = [*told, "--out", out, "--steps", steps, "--save_every", 2, "--overrides", json.dumps(chosen)]
    many = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *many, "-m", "avnb.training", *map(str, args)], cwd=cwd, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def writing(run, pid):
    "The step of the checkpoint that a process is writing now, or None."
    there = [n.split("_") for n in os.listdir(run / "checkpoints") if n.startswith(".part_")] if (run / "checkpoints").is_dir() else []
    return next((int(step) for _, step, who in there if int(who) == pid), None)


def strike(place, mode, run, step, torn, pause):
    "Start, kill the process and its readers at a moment. True if a checkpoint was half-written, None if the run ended before the moment came."
    child, since = started(place, mode, run), time.time()
    metrics = run / "metrics.jsonl"
    def reached():
        if torn: return (writing(run, child.pid) or -1) >= step
        return metrics.is_file() and metrics.stat().st_mtime > since and n_lines(run) >= step
    try:
        while not reached() and child.poll() is None:
            assert time.time() - since < 120, "the moment never came"
            time.sleep(0.0002)
        time.sleep(0 if torn else pause)
    finally:
        ended = child.poll() is not None
        if not ended: os.killpg(child.pid, signal.SIGKILL)
        said = child.communicate()[0]
    assert not ended or child.returncode == 0, said[-3000:]
    return None if ended else writing(run, child.pid) is not None


def losses(run): return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in read_lines(run / "metrics.jsonl")]


def survive(place, mode, tmp_path, kills, in_write, seed=0):
    "Kill a run at `kills` moments over its whole length and compare it with one that nobody touched."
    unbroken, run, rng = tmp_path / "unbroken", tmp_path / "run", np.random.default_rng(seed)
    finished(started(place, mode, unbroken))
    done, torn, hit = 0, 0, None
    for i in range(4 * kills):
        if done == kills: break
        now = torn < in_write and i % 2 == 0  # every other moment inside a write, until there are enough
        hit = strike(place, mode, run, int(1 + (STEPS - 2) * (done + rng.random()) / kills), now, rng.uniform(0, 0.2))
        if hit is None: break  # it ended before the moment came
        done += 1
        torn += hit
        assert all((p / "model.safetensors").is_file() for p in checkpoints(run))
    if hit is not None: finished(started(place, mode, run))
    assert torn >= in_write and done == kills, (done, torn)
    assert losses(run) == losses(unbroken) and len(losses(run)) == STEPS
    assert len({loss for _, loss, *_ in losses(run)}) > STEPS // 2
    a, b = (load_run(x, "last").state_dict() for x in (run, unbroken))
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    return done, torn


@pytest.mark.parametrize("mode", ["everything", "B5"])
def test_survives_three_kills(place, tmp_path, mode):
    survive(place, mode, tmp_path, 3, 1)


@pytest.mark.soak
@pytest.mark.parametrize("mode", [m for m in MODES if m != "float32"])
def test_survives_twenty_kills(place, tmp_path, mode):
    print(mode, *survive(place, mode, tmp_path, 20, 3))


def waits_for(child, run, lines):
    "A run of many steps, seen at work."
    until = time.time() + 90
    while n_lines(run) < lines:
        assert child.poll() is None and time.time() < until, child.communicate()[0][-2000:]
        time.sleep(0.005)


def test_two_cannot_train_in_one_folder(place, tmp_path):
    first = started(place, "plain", tmp_path / "run", 3000)
    try:
        waits_for(first, tmp_path / "run", 1)
        second = started(place, "plain", tmp_path / "run", 3000)
        said = second.communicate(timeout=60)[0]
        assert first.poll() is None
        assert second.returncode == 1 and "another process is training in this folder" in said, said[-2000:]
    finally:
        if first.poll() is None: os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def test_asked_to_stop_by_a_cluster_it_saves(place, tmp_path):
    child = started(place, "plain", tmp_path / "run", 3000)
    waits_for(child, tmp_path / "run", 3)
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=60)[0]
    step = n_lines(tmp_path / "run")
    assert child.returncode != 0 and f"stopped and saved at step {step} of 3000" in said, said[-2000:]
    assert int(checkpoints(tmp_path / "run")[-1].name[5:]) == step


@pytest.mark.soak
def test_two_processes_train_as_one_and_resume(place, tmp_path):
    "By torchrun: the first losses are those of one process, up to rounding; killed, both go on, bit for bit."
    one, two, run = (tmp_path / n for n in ("one", "two", "run"))
    finished(started(place, "float32", one))
    finished(started(place, "float32", two, processes=2))
    child = started(place, "float32", run, processes=2)
    try: waits_for(child, run, 9)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    for left in subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True).stdout.split(): os.kill(int(left), signal.SIGKILL)  # torchrun gives its workers sessions of their own
    assert "goes on from step" in finished(started(place, "float32", run, processes=2))
    assert losses(run) == losses(two) and len(losses(two)) == STEPS
    # the first loss; after it Adam's first steps, which look at a gradient's sign, make much of float32's last digit. test_processes compares gradients in float64
    assert losses(one)[0][1] == pytest.approx(losses(two)[0][1], rel=1e-6)

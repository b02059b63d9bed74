"""The runs a person starts, as a person starts them: by papermill, from a shell, interrupted, killed, on odd folders."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT, workplace

from avnb.checkpoints import checkpoints, load_run
from avnb.core import read_json
from avnb.encoders import audio_encoder, image_encoder
from avnb.media import probe, segment, write_video
from avnb.recipes import recipe
from avnb.store import open_store, prepare
from avnb.toy import make_toy
from avnb.training import fit, read_lines

RUNS = {p.stem: p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if re.match(r"(train|infer|probe|dub|bench|study_|browse_)", p.name)}
EXPECTED = {"train": "variant scale data name out steps save_every seed init overrides force_new training model visualization wandb quick", "infer": "checkpoint cfg overrides input_dir output_dir tracks kinds precision quick", "bench": "quick", "probe": "checkpoint embeddings protocol lists media out which limit seeds beside quick"}
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "WANDB_SILENT": "true"}
TINY = {"train.batch_size": 6, "train.val_every": 12, "train.log_every": 1, "store.fps": 2}
STEPS = 24


def needs(name):
    if name not in RUNS: pytest.skip(f"nbs/{name}.ipynb is not there yet")


def papermill(name, cwd, *args):
    "Execute a run notebook as a person would; (process, path of the executed copy)."
    out = cwd / f"{name}_out.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--no-log-output", "--cwd", str(cwd), str(RUNS[name]), str(out), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=280), out


def executed(path):
    "The code cells of an executed notebook, after a look that none was left out and none raised."
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert all(c["execution_count"] for c in cells)
    assert not [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    return cells


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "What `papermill nbs/train.ipynb out.ipynb -p quick True` leaves: (working directory, run folder, executed notebook)."
    needs("train")
    cwd = workplace(tmp_path_factory.mktemp("train"))
    done, out = papermill("train", cwd, "-p", "quick", True)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [p.parent for p in (cwd / "data/runs").rglob("recipe.json")]
    assert len(runs) == 1, runs
    return cwd, runs[0], out


def test_train_leaves_its_record(trained):
    cwd, run, out = trained
    executed(out)
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and steps
    assert checkpoints(run)[-1].name == f"step_{steps[-1]:08d}"
    assert load_run(run, "last").step == steps[-1]
    results = read_json(run / "results.json")
    assert {"run", "checkpoint", "protocol", "metrics", "baselines", "versions", "command"} <= set(results)
    assert all("value" in m for m in results["metrics"].values())
    for name in ("loc/pointing", "speech/pointing", "ret/a2v/R@1", "ret/v2a/R@1"): assert {"value", "lo", "hi", "n"} <= set(results["metrics"][name]), name
    assert list(run.rglob("*.png")) or list((cwd / "figures").glob("*.png"))


def test_infer_draws_videos_that_play(trained, tmp_path):
    needs("infer")
    cwd, clips, out = workplace(tmp_path), tmp_path / "clips", tmp_path / "heat"
    for i in range(2): clip(clips / f"mine/{i}.mp4", i, 2)
    done, notebook = papermill("infer", cwd, "-p", "checkpoint", trained[1], "-p", "input_dir", clips, "-p", "output_dir", out, "-p", "quick", True)
    assert done.returncode == 0, done.stderr[-3000:]
    executed(notebook)
    films = sorted(out.rglob("*.mp4"))
    assert films
    for film in films:
        info = probe(film)
        assert info.has_video and min(info.width, info.height) >= 336 and len(info.tracks) == 1 and info.tracks[0].codec == "aac"


@pytest.mark.parametrize("name", [n for n in RUNS if n not in ("train", "infer")])
def test_each_other_run_once(name, tmp_path):
    done, out = papermill(name, workplace(tmp_path), "-p", "quick", True)
    assert done.returncode == 0, done.stderr[-3000:]
    executed(out)


TOLD = [n for n in RUNS if not n.startswith("browse_")]  # runs that take parameters; a browser is opened


@pytest.mark.quick
@pytest.mark.parametrize("name", TOLD)
def test_parameters_are_checked_before_anything_else(name):
    code = ["".join(c["source"]) for c in json.loads(RUNS[name].read_text())["cells"] if c["cell_type"] == "code"]
    assert code[1] == "from avnb.core import check_parameters\ncheck_parameters(In)"


@pytest.mark.parametrize("name", ["train", "probe"])
def test_an_unknown_parameter_is_refused(name, tmp_path):
    wrong, right = ("variantt", "variant") if name == "train" else ("quickk", "quick")
    done, out = papermill(name, workplace(tmp_path), "-p", wrong, "x")
    assert done.returncode == 1
    assert f"no parameter '{wrong}'; did you mean '{right}'?" in done.stderr
    assert out.is_file() and [p.name for p in (tmp_path / "data").iterdir()] == ["voices"], "nothing was made"


@pytest.mark.quick
@pytest.mark.parametrize("name", TOLD)
def test_help_reads_well(name):
    from papermill.inspection import inspect_notebook
    found = inspect_notebook(str(RUNS[name]))
    assert set(EXPECTED.get(name, "quick").split()) <= set(found)
    for parameter in found.values():
        assert parameter["inferred_type_name"] not in (None, "None", ""), f"{parameter['name']} has no type"
        assert len(parameter["help"]) > 5, f"{parameter['name']} has no comment"
    if name != "train": return  # papermill prints what it inspected: asked once
    done = subprocess.run([sys.executable, "-m", "papermill", "--help-notebook", str(RUNS[name])], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0 and all(f"  {n}: " in done.stdout for n in found), done.stdout + done.stderr


# ---- interrupted and killed ----

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "Twelve toy videos and their store."
    home = tmp_path_factory.mktemp("toy")
    make_toy(home / "videos", 12, languages=("en",), workers=2)
    prepare(home / "videos", home / "store", recipe=recipe("grounding", data=home / "videos", overrides={"store.fps": 2, "store.workers": 0}))
    return home


def started(toy, out, steps=STEPS):
    "`python -m avnb.training` in a process of its own."
    args = ["--data", toy / "store", "--out", out, "--steps", steps, "--save_every", 4, "--overrides", json.dumps(TINY)]
    return subprocess.Popen([sys.executable, "-m", "avnb.training", *map(str, args)], cwd=workplace(toy / "cwd"), env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def when(child, reached, seconds=90):
    "Wait until a condition holds; the child must still be at work."
    until = time.time() + seconds
    while not reached():
        assert child.poll() is None and time.time() < until, child.communicate()[0][-3000:]
        time.sleep(0.005)


def finished(child):
    said = child.communicate(timeout=120)[0]
    assert child.returncode == 0, said[-3000:]
    return said


def losses(run): return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in read_lines(run / "metrics.jsonl")]


def same_run(a, b):
    "Every loss, gradient norm and rate bit for bit, and every weight."
    assert losses(a) == losses(b) and len(losses(a)) == STEPS
    x, y = load_run(a, "last").state_dict(), load_run(b, "last").state_dict()
    assert list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def unbroken(toy):
    finished(started(toy, toy / "unbroken"))
    return toy / "unbroken"


def n_lines(run): return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").is_file() else 0


@pytest.mark.parametrize("blow", ["SIGINT", "SIGKILL"])
def test_struck_down_and_started_again_it_goes_on(toy, unbroken, tmp_path, blow):
    run = tmp_path / "run"
    child = started(toy, run)
    try:
        when(child, lambda: n_lines(run) >= 6 and checkpoints(run))
        child.send_signal(getattr(signal, blow))
        said = child.communicate(timeout=60)[0]
    finally:
        if child.poll() is None: child.kill()
    assert child.returncode != 0
    step = int(checkpoints(run)[-1].name[5:])
    assert 4 <= step < STEPS
    if blow == "SIGINT":  # the step in hand was finished and saved, nothing is lost
        assert f"stopped and saved at step {step} of {STEPS}" in said and n_lines(run) == step
    assert f"goes on from step {step} of {STEPS}" in finished(started(toy, run))
    same_run(run, unbroken)


@pytest.mark.soak
def test_notebook_killed_and_run_again(tmp_path):
    needs("train")
    cwd = workplace(tmp_path)
    command = [sys.executable, "-m", "papermill", "--cwd", str(cwd), str(RUNS["train"]), str(cwd / "out.ipynb"), "-p", "quick", "True", "-p", "name", "x", "-p", "save_every", "2"]
    child = subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try: when(child, lambda: (cwd / "data/runs/x").is_dir() and checkpoints(cwd / "data/runs/x"), 280)
    finally: os.killpg(child.pid, signal.SIGKILL)
    done, out = papermill("train", cwd, "-p", "quick", True, "-p", "name", "x", "-p", "save_every", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "goes on from step" in out.read_text()


# ---- published towers, without a network ----

def test_published_towers_take_a_step_offline(toy, tmp_path, monkeypatch):
    def refuse(*a, **k): raise RuntimeError("the network was used")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(workplace(tmp_path))
    audio, image = audio_encoder("facebook/hubert-base-ls960", pretrained=False), image_encoder("facebook/dinov2-small", pretrained=False)
    assert (audio.dim, image.dim, image.patch) == (768, 384, 14)
    weights = [sum(p.numel() for p in tower.parameters()) for tower in (audio, image)]
    assert 94e6 < weights[0] < 95e6 and 21.5e6 < weights[1] < 22.5e6
    del audio, image
    for v in sorted((toy / "videos").glob("*.mp4"))[:2]:
        Path("clips").mkdir(exist_ok=True)
        shutil.copy(v, "clips")
    made = recipe("grounding", scale="published", data="clips", steps=1,
                  overrides={"model.pretrained": False, "train.batch_size": 2, "train.precision": "no", "data.shares": [1.0, 0.0, 0.0], "store.fps": 2, "store.workers": 0})
    assert made.view.image.size == 224
    try:
        run = fit(made, tmp_path / "run")
        (line,) = run.metrics
        assert line["step"] == 1 and np.isfinite([line["loss"], line["grad_norm"]]).all() and line["grad_norm"] > 0 and line["skipped"] == 0
        model = load_run(run.path)
        tokens, keep = model.embed_audio(torch.zeros(1, 16_000) + 0.1 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0)))
        assert tokens.shape == (1, 49, 512) and keep.all()
        assert model.embed_image(torch.zeros(1, 3, 224, 224)).shape == (1, 256, 512)
    finally: shutil.rmtree(tmp_path / "run", ignore_errors=True)  # over a GB


@pytest.mark.soak
def test_the_published_dub_variant_takes_a_step(tmp_path):
    "B.5 at the size of the paper, two scenes, two looks and two hearings each, gradient checkpointing on; from random weights, as two steps of B.3 first would say no more."
    cwd = workplace(tmp_path)
    make_toy(tmp_path / "films", 2, kind="dubs", languages=("en", "fr"), workers=2)
    overrides = {"train.batch_size": 2, "train.precision": "no", "data.shares": [1.0, 0.0, 0.0], "store.workers": 0}
    made = recipe("B5", scale="published", data=tmp_path / "films", overrides=overrides)
    assert (made.model.video, made.model.audio, made.model.checkpoint, made.view.size, made.view.frames) == ("mvit-S", "mvit-S", True, 224, 16) and made.view.dub_augment
    try:
        args = ["--variant", "B5", "--scale", "published", "--data", tmp_path / "films", "--out", tmp_path / "run", "--init", "random", "--steps", 1, "--overrides", json.dumps(overrides)]
        done = subprocess.run([sys.executable, "-m", "avnb.training", *map(str, args)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = read_lines(tmp_path / "run/metrics.jsonl")
        assert line["step"] == 1 and np.isfinite([line[k] for k in ("loss", "grad_norm", "cross_sp", "cross_ps", "video", "audio")]).all() and line["grad_norm"] > 0 and line["skipped"] == 0
        assert f"{line['memory_mb']:,} MB" in done.stdout
        print(done.stdout.splitlines()[-1])
        model = load_run(tmp_path / "run")
        assert 68e6 < sum(p.numel() for t in (model.video, model.audio) for p in t.parameters()) < 69e6
    finally: shutil.rmtree(tmp_path / "run", ignore_errors=True)


# ---- folders as people have them ----

def clip(path, seed, seconds=2.0, tracks=("en",), loud=0.3):
    "A square that moves, and a tone."
    path.parent.mkdir(parents=True, exist_ok=True)
    g, n = torch.Generator().manual_seed(seed), int(25 * seconds)
    frames = torch.full((n, 3, 64, 80), 30, dtype=torch.uint8)
    colour = torch.randint(60, 255, (3, 1, 1), generator=g)
    for i in range(n): frames[i, :, 8 + i % 32:24 + i % 32, 8:24] = colour
    tone = loud * torch.sin(torch.arange(int(48_000 * seconds)) * 0.01 * (1 + seed % 7))
    return write_video(path, frames, 25, {t: tone for t in tracks})


def test_broken_files_are_named_and_training_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workplace(tmp_path))
    src = tmp_path / "src"
    for i in range(6): clip(src / f"good{i}.mp4", i)
    data = (src / "good0.mp4").read_bytes()
    (src / "truncated.mp4").write_bytes(data[: len(data) // 2])
    (src / "empty.mp4").write_bytes(b"")
    clip(src / "silent.mp4", 7, loud=0.0)
    clip(src / "soundless.mp4", 8, tracks=())
    small = recipe("grounding", data=src, steps=2, overrides={"train.batch_size": 3, "store.fps": 2, "store.workers": 0})
    report = prepare(src, tmp_path / "store", recipe=small)
    assert report.n_ok == 6 and set(open_store(tmp_path / "store")["source"][:]) == {f"good{i}.mp4" for i in range(6)}
    reasons = {Path(path).name: why for path, why in report.broken}
    assert set(reasons) == {"truncated.mp4", "empty.mp4", "silent.mp4", "soundless.mp4"}
    assert "empty" in reasons["empty.mp4"] and "silent" in reasons["silent.mp4"] and "no sound" in reasons["soundless.mp4"]
    assert len(reasons["truncated.mp4"]) > 10 and len(set(reasons.values())) == 4
    capsys.readouterr()
    run = fit(small, tmp_path / "run")
    said = capsys.readouterr().out
    assert "4 of 10 files left out" in said and all(name in said for name in reasons)
    assert run.step == 2 and np.isfinite([line["loss"] for line in run.metrics]).all()


SEED_CONFIG = """
training:
  video_dir: '{video_dir}'
  output_dir: '{output_dir}'
  batch_size: {batch_size}
  num_epochs: {num_epochs}
  learning_rate: 8e-4
  num_workers: 12
  gradient_accumulation_steps: 1
  save_every_steps: 4000
  device: 'cuda'
  force_new_training: false
model:
  unfreeze_hubert_epoch: 2
  unfreeze_vit_epoch: 5
visualization:
  vis_every: 5000
  num_vis_samples: 20
wandb:
  enabled: true
  project: "Project_Name"
  run_name: "Run_Name"
"""


def test_the_config_of_the_published_code(tmp_path):
    "As its README gives it, on its layout; only paths, epochs and batch are others. Interrupted, and started again by papermill."
    cwd, out = workplace(tmp_path / "cwd"), tmp_path / "outputs"
    for i in range(6): clip(tmp_path / f"src/{'abcdef'[i]}.mp4", i, 3)
    flat = segment(tmp_path / "src", tmp_path / "flat", seconds=1)
    config = tmp_path / "config.yaml"
    config.write_text(SEED_CONFIG.format(video_dir=flat, output_dir=out, batch_size=4, num_epochs=20))
    plain = {k: v for k, v in ENVIRONMENT.items() if k not in ("WANDB_MODE", "WANDB_API_KEY")} | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-m", "avnb.training", "--config", str(config)], cwd=cwd, env=plain, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        when(child, lambda: n_lines(out) >= 20, 150)
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=60)[0]
    finally:
        if child.poll() is None: child.kill()
    assert child.returncode != 0 and "stopped and saved at step" in said, said[-2000:]
    assert "cuda" in said.lower() or torch.cuda.is_available(), said[-2000:]
    assert "wandb: no key was found; logging off line" in said and list((out / "wandb").glob("offline-run-*"))
    at = int(checkpoints(out)[-1].name[5:])
    done, notebook = papermill("train", cwd, "-p", "variant", "grounding", "-f", config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"goes on from step {at} of" in notebook.read_text()
    steps = [line["step"] for line in read_lines(out / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 40 and checkpoints(out)[-1].name == f"step_{len(steps):08d}"
    drawn = out / "snapshots" / f"step_{len(steps):08d}"
    assert list(drawn.glob("*.png")) and list(drawn.glob("*.mp4")) and all(probe(f).tracks for f in drawn.glob("*.mp4"))


def test_segments_are_trained_on(tmp_path, monkeypatch):
    "The layout of the published code: {video}_{segment}.mp4."
    monkeypatch.chdir(workplace(tmp_path))
    for i in range(5): clip(tmp_path / f"src/{'abcde'[i]}.mp4", i, 3)
    flat = segment(tmp_path / "src", tmp_path / "flat", seconds=1)
    assert {p.name for p in flat.glob("*.mp4")} == {f"{v}_{s}.mp4" for v in range(1, 6) for s in range(3)}
    small = recipe("grounding", data=flat, steps=2, overrides={"train.batch_size": 4, "store.fps": 2, "store.workers": 0, "data.shares": [1.0, 0.0, 0.0]})
    run = fit(small, tmp_path / "run")
    assert run.step == 2
    (store,) = (tmp_path / "data/stores").iterdir()
    rows = open_store(store)
    by_group = {}
    for group, name in zip(rows["group"][:], rows["source"][:], strict=True): by_group.setdefault(group, set()).add(name.split("_")[0])
    assert len(by_group) == 5 and all(len(videos) == 1 for videos in by_group.values())  # a group is a video, not a segment

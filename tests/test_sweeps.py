"""Several runs by one command: what is done stays done, what was stopped goes on, what fails is named and stops nothing."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from places import workplace

from avnb.checkpoints import checkpoints
from avnb.core import read_json, write_json
from avnb.media import write_video
from avnb.recipes import from_dict, recipe, to_dict
from avnb.results import write_items
from avnb.sweeps import aggregate, as_markdown, expand, over_clips, over_seeds, sweep, table
from avnb.training import read_lines

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
TINY = {"train.batch_size": 4, "train.val_every": 1000, "train.log_every": 1, "store.fps": 2, "store.workers": 0}
STEPS = 200


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A working directory with a settings.ini of its own, and eight clips of two seconds."
    folder = workplace(tmp_path_factory.mktemp("sweeps"))
    (folder / "clips").mkdir()
    g = torch.Generator().manual_seed(0)
    for i in range(8):
        frames = torch.full((50, 3, 64, 80), 30, dtype=torch.uint8)
        frames[:, :, 8:40, 8 + i:40] = torch.randint(60, 255, (3, 1, 1), generator=g)
        write_video(folder / f"clips/{i}.mp4", frames, 25, {"und": .3 * torch.sin(torch.arange(96_000) * .01 * (i + 1))})
    return folder


def started(place, *args, **more):
    "`python -m avnb.sweeps` with tiny runs."
    overrides = ["--overrides", json.dumps(TINY | more)] if "--publish" not in args else []
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job is born deaf to Ctrl-C, and so are its children
    return subprocess.Popen([sys.executable, "-m", "avnb.sweeps", *map(str, args), *overrides], cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)


def said(child, status=0):
    out, err = child.communicate(timeout=280)
    assert child.returncode == status, out[-3000:] + err[-3000:]
    return out + err


def lines(run): return (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []


def went_on(run): return (run / "log.txt").read_text().count("goes on from step") if (run / "log.txt").is_file() else 0


def struck(child, run, blow, after, begun=0):
    "Strike a sweep down once its run has gone on so often, and come so far."
    try:
        until = time.time() + 120
        while went_on(run) < begun or len(lines(run)) < after:
            assert child.poll() is None and time.time() < until, child.communicate()
            time.sleep(.01)
        child.send_signal(blow)
        child.communicate(timeout=60)
    finally:
        if child.poll() is None: child.kill()
    assert child.returncode != 0


@pytest.fixture(scope="module")
def story(place):
    "One sweep: two settings, of which one cannot start, two seeds. It is killed, interrupted, then left alone; what it said at the end."
    args = ("--data", "clips", "--seeds", 0, 1, "--steps", STEPS, "--grid", json.dumps({"model.audio": ["toy", "nowhere/at-all"]}), "--out", "story")
    more, run = {"train.save_every": 1000, "data.shares": [.5, .5, 0]}, place / "story/model.audio=toy,seed=0"
    struck(started(place, *args, **more), run, signal.SIGKILL, 4)
    struck(started(place, *args, **more), run, signal.SIGINT, 16, begun=1)  # the killed one may still be saving: a lock makes this one wait
    reached = len(lines(run))
    return place / "story", said(started(place, *args, **more), status=1), reached


def test_struck_down_it_goes_on(story):
    "The blows fell on the sweep, not on the run that it had started: the run must stop too, saved, and never be run twice at once."
    out, _, reached = story
    run = out / "model.audio=toy,seed=0"
    went = [int(line.split("from step ")[1].split()[0]) for line in (run / "log.txt").read_text().splitlines() if "goes on from step" in line]
    first, second = went
    assert 4 <= first < second == reached < STEPS
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1)) and checkpoints(run)[-1].name == f"step_{STEPS:08d}"


def test_a_run_that_fails_is_named_and_the_rest_goes_on(story):
    out, text, _ = story
    found, bad = read_json(out / "sweep.json"), ["model.audio=nowhere_at-all,seed=0", "model.audio=nowhere_at-all,seed=1"]
    assert "2 of 4 runs failed: " + bad[0] in text and "log.txt" in text
    assert list(found["failed"]) == found["missing"] == bad and all(why.startswith("OSError: ") for why in found["failed"].values())
    assert [s["runs"] for s in found["settings"].values()] == [["model.audio=toy,seed=0", "model.audio=toy,seed=1"]]


def test_seeds_are_put_together(story):
    out, _, _ = story
    found = read_json(out / "sweep.json")
    s = found["settings"]["model.audio=toy"]
    results = [read_json(out / n / "results.json") for n in s["runs"]]
    assert s["seeds"] == [0, 1] and s["steps"] == [STEPS] * 2
    for name in [f"{way}/R@{k}" for way in ("a2v", "v2a") for k in (1, 5, 10)]:
        values, f = [r["metrics"][name]["value"] for r in results], s["figures"][name]
        assert f["values"] == values and np.isclose(f["mean"], np.mean(values), atol=1e-4) and (f["min"], f["max"]) == (min(values), max(values))
        assert np.isclose(f["sd"], np.std(values, ddof=1), atol=1e-4) and np.isclose(f["hi"] - f["mean"], 12.706 * np.std(values, ddof=1) / 2**.5, atol=2e-3)
    cpu = [read_lines(out / n / "metrics.jsonl")[-1]["cpu_s"] for n in s["runs"]]
    assert np.isclose(s["cpu_s"]["mean"], np.mean(cpu), atol=1e-2) and all("--seeds 0 1" in r["command"] for r in results)


def test_what_is_finished_is_not_run_again_and_another_recipe_is_refused(story, place, monkeypatch):
    out, _, _ = story
    monkeypatch.chdir(place)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.json") if p.parent != out}
    plan = {n: from_dict(r) for n, r in read_json(out / "plan.json")["runs"].items() if "toy" in n}
    assert sweep(plan, out) == out / "sweep.json"
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    name, made = next(iter(plan.items()))
    with pytest.raises(ValueError, match="train.lr was 0.002, now 0.5"): sweep({name: replace(made, train=replace(made.train, lr=.5))}, out)


def test_the_table_is_written_by_a_command(story, place):
    said(started(place, "--publish", "story"))
    text = (place / "figures/story_sweep.md").read_text()
    assert text.startswith("| figure | seeds | mean | sd | min | max | over seeds | random |\n")
    for name in ("a2v/R@1", "v2a/R@1", "CPU seconds of updates"): assert f"\n| {name} | 2 | " in text
    assert "95 % t interval" in text and "Made by `python -m avnb.sweeps --data clips --seeds 0 1" in text and "Not finished: model.audio=nowhere" in text
    assert read_json(place / "figures/story_sweep.json")["format"] == 1


def test_a_run_is_measured_from_a_shell(story, place):
    "The same figures again, over a run that lost its own; the table is printed, and what is no run is refused."
    run = story[0] / "model.audio=toy,seed=1"
    before = read_json(run / "results.json")
    (run / "results.json").unlink()
    said = subprocess.run([sys.executable, "-m", "avnb.results", str(run.relative_to(place)), "--measure"], cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr[-3000:]
    after = read_json(run / "results.json")
    assert after["command"] == "python -m avnb.results story/model.audio=toy,seed=1 --measure" and {**after, "command": before["command"]} == before
    assert after["protocol"] in said.stdout and "a2v/R@5" in said.stdout and "random" in said.stdout and not (place / "figures/model.audio=toy,seed=1.json").exists()
    n = after["metrics"]["a2v/R@1"]["n"]
    assert n > 4 and f"{n} of {n} segments of the val share, which also chose the checkpoint" in after["protocol"]
    said = subprocess.run([sys.executable, "-m", "avnb.results", "clips", "--measure"], cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert said.returncode == 1 and "clips is not a run folder" in said.stderr
    write_json(run / "results.json", before)


@pytest.mark.soak
def test_two_seeds_on_the_toy_corpus(place):
    said(started(place, "--seeds", 0, 1, "--steps", 4, "--out", "toy", **{"data.videos": 12}))
    s = read_json(place / "toy/sweep.json")["settings"]["grounding"]
    assert {"loc/pointing", "muted/a2v/R@1", "ret/v2a/R@1", "speech/pointing", "isolated/pointing", "loc/area_iou"} <= set(s["figures"])
    assert set(s["baselines"]) == {"saliency", "shuffled", "centre", "random", "everything"}
    shuffled = [read_json(place / "toy" / n / "results.json")["baselines"]["shuffled"]["loc/pointing"]["value"] for n in s["runs"]]
    assert np.isclose(s["baselines"]["shuffled"]["loc/pointing"], np.mean(shuffled), atol=1e-4)


# ---- arithmetic, without a run ----

@pytest.mark.quick
def test_intervals_say_what_they_say():
    from scipy.stats import t
    rng = np.random.default_rng(0)
    inside = sum(v["lo"] <= 5 <= v["hi"] for v in (over_seeds(rng.normal(5, 2, 4)) for _ in range(400)))
    assert 360 <= inside <= 396  # 95 % of 400 is 380
    x = [.5, .7, .9, .8]
    v = over_seeds(x)
    assert np.allclose([v["lo"], v["hi"]], t.interval(.95, 3, np.mean(x), np.std(x, ddof=1) / 2), atol=1e-4)
    items = rng.random((3, 200)) < .7
    c = over_clips([row.astype(float).tolist() for row in items])
    assert np.isclose(c["hi"] - c["lo"], 2 * 1.96 * items.mean(0).std() / 200**.5, rtol=.15)
    assert over_clips([[1., 0.], [1.]]) is None and over_clips([]) is None
    with pytest.raises(ValueError, match="no values"): over_seeds([])


@pytest.mark.quick
def test_settings_are_told_apart_by_what_differs(tmp_path):
    plain = recipe("grounding", "toy")
    recipes = {"a": replace(plain, seed=0), "b": replace(plain, seed=7), "c": replace(plain, train=replace(plain.train, lr=1e-3, clip=.5))}
    for i, (name, made) in enumerate(recipes.items()):
        write_json(tmp_path / name / "recipe.json", to_dict(made))
        write_json(tmp_path / name / "results.json", {"checkpoint": 1, "protocol": "p", "metrics": {"loc/pointing": {"value": i, "lo": 0, "hi": 1, "n": 2}, "other": {"value": 1.}} | ({"only": {"value": 1, "lo": 0, "hi": 1}} if name == "a" else {}), "baselines": {}})
    found = read_json(sweep(recipes, tmp_path))
    assert {k: v["runs"] for k, v in found["settings"].items()} == {"train.lr=0.002, train.clip=1.0": ["a", "b"], "train.lr=0.001, train.clip=0.5": ["c"]}
    first, second = found["settings"].values()
    assert first["figures"]["loc/pointing"]["mean"] == .5 and "only" not in first["figures"] and second["figures"]["loc/pointing"]["lo"] is None and second["cpu_s"] is None
    shown = table(found)
    assert list(shown.index) == [("train.lr=0.002, train.clip=1.0", "loc/pointing"), ("train.lr=0.001, train.clip=0.5", "loc/pointing")] and "over clips" not in shown.columns
    assert as_markdown(found).startswith("| setting | figure | seeds |")
    for name in "ab": write_items(tmp_path / name, [{"kind": "loc", "hit": h, "right_object": h, "area_iou": 0.5} for h in (False, True)])
    assert aggregate(tmp_path)["settings"]["train.lr=0.002, train.clip=1.0"]["figures"]["loc/pointing"]["clips"] == {"lo": 0.0, "hi": 1.0, "n": 2}


@pytest.mark.quick
def test_how_often_a_run_writes_is_no_other_recipe(tmp_path):
    "What `fit` lets change, a sweep lets change."
    from avnb.recipes import FREE
    from avnb.sweeps import _state
    plain = recipe("grounding", "toy")
    write_json(tmp_path / "recipe.json", to_dict(plain))
    for name in FREE: assert _state(tmp_path, recipe("grounding", "toy", overrides={name: 3})) == "begun", name
    with pytest.raises(ValueError, match="train.val_every was"): _state(tmp_path, recipe("grounding", "toy", overrides={"train.val_every": 3}))


@pytest.mark.quick
def test_names_of_runs_are_folders():
    made = expand("grounding", (0,), {"view.image.crop": [[.5, 1.], [.7, 1.]], "data.source": ["a/b", None]}, scale="toy")
    assert len(made) == 4 and all("/" not in name and " " not in name for name in made)
    with pytest.raises(ValueError, match="no seeds"): expand("grounding", ())
    with pytest.raises(KeyError, match="did you mean 'batch_size'"): expand("grounding", (0,), {"train.batchsize": [1]})

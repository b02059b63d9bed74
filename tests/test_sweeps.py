"""Several runs by one command: what is done stays done, what was stopped goes on, what fails is named and stops nothing."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avnb.checkpoints import checkpoints
from avnb.core import read_json, write_json
from avnb.recipes import recipe, to_dict
from avnb.sweeps import aggregate, as_markdown, expand, over_clips, over_seeds, sweep, table
from avnb.training import read_lines

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
TINY = {"data.videos": 12, "train.batch_size": 6, "train.val_every": 1000, "train.log_every": 1, "store.fps": 2, "store.workers": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A working directory with a settings.ini of its own; corpora and stores of one test serve the next."
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "settings.ini").write_text("[paths]\ndata = data\nfigures = figures\nruns = data/runs\n[run]\ndevice = cpu\n")
    return folder


def command(place, *args, **more):
    "`python -m avnb.sweeps` with tiny runs."
    full = [sys.executable, "-m", "avnb.sweeps", *map(str, args)]
    if "--publish" not in args: full += ["--overrides", json.dumps(TINY | more)]
    return subprocess.Popen(full, cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(child, status=0):
    out, err = child.communicate(timeout=200)
    assert child.returncode == status, out[-3000:] + err[-3000:]
    return out + err


@pytest.fixture(scope="module")
def two(place):
    "A sweep of two seeds, four steps each."
    text = said(command(place, "--seeds", 0, 1, "--steps", 4, "--out", "two"))
    return place / "two", text


def test_two_seeds_are_trained_measured_and_put_together(two):
    out, text = two
    found = read_json(out / "sweep.json")
    (label, s), = found["settings"].items()
    assert label == "grounding" and s["seeds"] == [0, 1] and s["steps"] == [4, 4] and s["runs"] == ["seed=0", "seed=1"] and not found["failed"] and not found["missing"]
    results = [read_json(out / n / "results.json") for n in s["runs"]]
    for name in ("loc/pointing", "muted/a2v/R@1", "ret/v2a/R@1", "speech/pointing", "isolated/pointing", "loc/area_iou"):
        values = [r["metrics"][name]["value"] for r in results]
        f = s["figures"][name]
        assert f["values"] == values and np.isclose(f["mean"], np.mean(values), atol=1e-4) and f["min"] == min(values) and f["max"] == max(values)
        assert np.isclose(f["sd"], np.std(values, ddof=1), atol=1e-4) and np.isclose(f["hi"] - f["mean"], 12.706 * np.std(values, ddof=1) / 2**.5, atol=2e-3)
    assert set(s["baselines"]) == {"saliency", "shuffled", "centre", "random"}
    assert np.isclose(s["baselines"]["shuffled"]["loc/pointing"], np.mean([r["baselines"]["shuffled"]["loc/pointing"]["value"] for r in results]), atol=1e-4)
    cpu = [read_lines(out / n / "metrics.jsonl")[-1]["cpu_s"] for n in s["runs"]]
    assert np.isclose(s["cpu_s"]["mean"], np.mean(cpu), atol=1e-2)
    assert all("--seeds 0 1" in r["command"] for r in results) and "--seeds 0 1" in found["command"]
    assert "CPU seconds of updates" in text and "loc/pointing" in text


def test_what_is_finished_is_not_run_again_and_more_seeds_join(two, place):
    out, _ = two
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} | {p: p.stat().st_mtime_ns for p in out.rglob("results.json")}
    recipes = {f"seed={s}": r for s, r in zip((0, 1), expand("grounding", (0, 1), steps=4, overrides=TINY).values(), strict=True)}
    third = out / "seed=2"  # finished elsewhere and brought here
    write_json(third / "recipe.json", to_dict(replace(recipes["seed=0"], seed=2)))
    write_json(third / "results.json", read_json(out / "seed=0/results.json"))
    try:
        path = sweep({**recipes, "seed=2": replace(recipes["seed=0"], seed=2)}, out)
        assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())
        assert read_json(path)["settings"]["grounding"]["seeds"] == [0, 1, 2]
        with pytest.raises(ValueError, match="train.lr was 0.002, now 0.5"): sweep(expand("grounding", (0,), steps=4, overrides=TINY | {"train.lr": 0.5}), out)
    finally: (third / "results.json").unlink()


def test_the_table_is_written_by_a_command(two, place):
    said(command(place, "--publish", "two"))
    text = (place / "figures/two_sweep.md").read_text()
    assert text.startswith("| figure | seeds | mean | sd | min | max | over seeds | saliency | shuffled | centre | random |\n")
    for name in ("loc/pointing", "muted/a2v/R@1", "CPU seconds of updates"): assert f"\n| {name} | " in text
    assert "95 % t interval" in text and "Made by `python -m avnb.sweeps --seeds 0 1" in text
    assert read_json(place / "figures/two_sweep.json")["format"] == 1


def test_a_run_that_fails_is_named_and_the_rest_goes_on(two, place):
    child = command(place, "--seeds", 3, "--steps", 2, "--grid", json.dumps({"model.audio": ["nowhere/at-all", "toy"]}), "--out", "broken")
    text = said(child, status=1)
    assert "1 of 2 runs failed: model.audio=nowhere_at-all,seed=3" in text and "log.txt" in text
    found = read_json(place / "broken/sweep.json")
    assert list(found["failed"]) == found["missing"] == ["model.audio=nowhere_at-all,seed=3"]
    assert [s["runs"] for s in found["settings"].values()] == [["model.audio=toy,seed=3"]]
    assert "Not finished: model.audio=nowhere_at-all,seed=3" in as_markdown(found)


@pytest.mark.parametrize("blow", ["SIGINT", "SIGKILL"])
def test_struck_down_it_goes_on(two, place, blow):
    "The blow falls on the sweep, not on the run that it started: the run must stop too, saved, and not be run twice at once."
    out, run = place / blow, place / blow / "seed=0"
    args, often = ("--seeds", 0, "--steps", 40, "--out", blow), {"train.save_every": 1000}
    child = command(place, *args, **often)
    try:
        until = time.time() + 90
        while not (run / "metrics.jsonl").is_file() or len(read_lines_so_far(run)) < 5:
            assert child.poll() is None and time.time() < until, child.communicate()
            time.sleep(.01)
        child.send_signal(getattr(signal, blow))
        child.communicate(timeout=60)
    finally:
        if child.poll() is None: child.kill()
    assert child.returncode != 0 and not (run / "results.json").is_file()
    again = command(place, *args, **often)  # with SIGKILL the old run may still be saving: the lock makes the new one wait
    said(again)
    (step,) = [int(line.split("from step ")[1].split()[0]) for line in (run / "log.txt").read_text().splitlines() if "goes on from step" in line]
    assert 5 <= step < 40
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, 41)) and checkpoints(run)[-1].name == "step_00000040"
    assert read_json(out / "sweep.json")["settings"]["grounding"]["steps"] == [40]


def read_lines_so_far(run: Path) -> list:
    return (run / "metrics.jsonl").read_text().splitlines()


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
        write_json(tmp_path / name / "results.json", {"checkpoint": 1, "protocol": "p", "metrics": {"m": {"value": i, "lo": 0, "hi": 1, "n": 2}, "other": {"value": 1.}} | ({"only": {"value": 1, "lo": 0, "hi": 1}} if name == "a" else {}), "baselines": {}})
    found = read_json(sweep(recipes, tmp_path))
    assert {k: v["runs"] for k, v in found["settings"].items()} == {"train.lr=0.002, train.clip=1.0": ["a", "b"], "train.lr=0.001, train.clip=0.5": ["c"]}
    first, second = found["settings"].values()
    assert first["figures"]["m"]["mean"] == .5 and "only" not in first["figures"] and second["figures"]["m"]["lo"] is None and second["cpu_s"] is None
    shown = table(found)
    assert list(shown.index) == [("train.lr=0.002, train.clip=1.0", "m"), ("train.lr=0.001, train.clip=0.5", "m")] and "over clips" not in shown.columns
    assert as_markdown(found).startswith("| setting | figure | seeds |")
    for name in "ab": write_json(tmp_path / name / "items.json", {"format": 1, "items": {"m": [0., 1.]}})
    assert aggregate(tmp_path)["settings"]["train.lr=0.002, train.clip=1.0"]["figures"]["m"]["clips"] == {"lo": 0.0, "hi": 1.0, "n": 2}


@pytest.mark.quick
def test_names_of_runs_are_folders():
    made = expand("grounding", (0,), {"view.image.crop": [[.5, 1.], [.7, 1.]], "data.source": ["a/b", None]}, scale="toy")
    assert len(made) == 4 and all("/" not in name and " " not in name for name in made)
    with pytest.raises(ValueError, match="no seeds"): expand("grounding", ())
    with pytest.raises(KeyError, match="did you mean 'batch_size'"): expand("grounding", (0,), {"train.batchsize": [1]})

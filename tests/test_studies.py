"""Studies: an interval becomes one verdict, a study that is killed ends in the same tables, one changed arm changes the table and nothing else."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import workplace

from avnb import studies
from avnb.batches import ClipDataset
from avnb.checkpoints import checkpoints
from avnb.claims import DENSE_REAL, DUBS, STUDIES, VERDICTS, Hypothesis, verdict
from avnb.core import read_json, write_atomic, write_json
from avnb.recipes import from_dict, recipe, to_dict
from avnb.results import write_items
from avnb.sources import find_store
from avnb.studies import arms_table, as_markdown, read_study, run_study, study_recipes, verdicts_table
from avnb.training import fit

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
NUMBER = st.floats(-2, 2)


# ---- verdicts ----

@pytest.mark.quick
@settings(deadline=None, max_examples=200)
@given(a=NUMBER, b=NUMBER, margin=st.sampled_from([-.05, 0., .1]) | NUMBER)
def test_a_verdict_follows_from_its_interval(a, b, margin):
    lo, hi = sorted((a, b))
    more, less = (Hypothesis("x", "", "f", "a", "b", side=side, margin=margin) for side in ("higher", "lower"))
    said = verdict(more, {"lo": lo, "hi": hi})
    assert said in VERDICTS and (said == "shown") == (lo > margin) and (said == "against") == (hi < margin)
    assert said == verdict(less, {"lo": -hi, "hi": -lo}), "less is better: the same, mirrored"
    assert verdict(more, {"lo": None, "hi": None}) == "not shown"
    if said == "shown": assert verdict(replace(more, margin=margin - 1), {"lo": lo, "hi": hi}) == "shown", "who asks for less gets it, too"


@pytest.mark.quick
def test_the_claims_can_be_asked():
    for study in STUDIES.values():
        made = study_recipes(study)
        assert len(made) == sum(len(a.seeds or study.seeds) for a in study.arms)
        assert all(r.data.source == made[f"{study.arms[0].name},seed=20"].data.source for r in made.values()) if study.stamps else all(r.data.seed > 100 and r.data.test_seed == 200 for r in made.values())
        assert all(r.init.endswith(f"study_{study.after}/{name}") for name, r in made.items()) if study.after else all(r.init is None for r in made.values())
        assert all(h.figure in study.shown and (not h.beside or h.beside in study.shown) for h in study.hypotheses)
        stores = {json.dumps(to_dict(r)["store"], sort_keys=True) for r in made.values()}
        assert len(stores) == 1, "runs that go side by side share the test stores"


# ---- the tables, from made-up runs ----

def pretend(folder, r, lift):
    "A finished run's files; what its seed adds is the same in every arm."
    g, shift = np.random.default_rng(r.seed), lift + .2 * (r.train.lr < .002)
    values = {"probe/class/ja": .3 + shift + .02 * g.normal(size=12), "distance_ratio": .8 - shift + .02 * g.normal(size=12)}
    told = lambda x: {k: {"value": float(np.mean(v)), "lo": 0, "hi": 1, "n": len(v)} for k, v in x.items()}
    write_json(folder / "recipe.json", to_dict(r))
    write_items(folder, [{"kind": "dubs", "id": str(i), **{k: float(v[i]) for k, v in values.items()}} for i in range(12)])
    write_json(folder / "study.json", {"metrics": {}, "baselines": {}, "items": {}})
    write_json(folder / "results.json", {"checkpoint": 150, "protocol": "made up", "metrics": told(values), "baselines": {"random init": told({"probe/class/ja": [.2]})}})
    write_atomic(folder / "metrics.jsonl", '{"step": 150, "cpu_s": 1.0}\n')


@pytest.fixture
def played(monkeypatch):
    "Runs are made up instead of trained; the names of those that were run."
    ran = []

    def sweep(recipes, out, command="", **_):
        there = read_json(out / "plan.json")["runs"] if (out / "plan.json").is_file() else {}
        write_json(out / "plan.json", {"command": command, "runs": {**there, **{k: to_dict(r) for k, r in recipes.items()}}})
        for name, r in recipes.items():
            if (out / name / "results.json").is_file(): continue
            ran.append(name); pretend(out / name, r, {"none": 0., "dub": .15, "dubdense": .1}[name.partition(",")[0]])
    monkeypatch.setattr(studies, "sweep", sweep)
    monkeypatch.setattr(studies, "prepare_data", lambda recipes: None)
    return ran


@pytest.mark.quick
def test_one_changed_arm_changes_the_table(played, tmp_path, capsys):
    out, how = tmp_path / "study", dict(arms=("none", "dub"), seeds=(20, 21, 22))
    first = run_study(DUBS, out, **how)
    assert len(played) == 6 and run_study(DUBS, out, **how) == first and len(played) == 6, "what is finished stays"
    told = {v["name"]: v for v in first["verdicts"]}
    assert told["sound class"]["verdict"] == "shown" and abs(told["sound class"]["difference"]["mean"] - .15) < 1e-3 and told["invariance: distance"]["verdict"] == "shown"
    assert not first["changed"] and "Changed from" not in as_markdown(DUBS, first)
    other = run_study(DUBS, out, arms=["dub"], seeds=(20, 21, 22), overrides={"dub": {"train.lr": .001}})
    assert played[6:] == ["dub,seed=20", "dub,seed=21", "dub,seed=22"] and "study/before" in capsys.readouterr().out
    assert abs(next(v for v in other["verdicts"] if v["name"] == "sound class")["difference"]["mean"] - .35) < 1e-3
    assert other["changed"] == {"dub": {"train.lr": ["0.002", "0.001"]}} and "**Changed from what was stated:** dub: train.lr 0.002 -> 0.001" in as_markdown(DUBS, other)
    assert (arms_table(DUBS, first)["none"] == arms_table(DUBS, other)["none"]).all() and (arms_table(DUBS, first)["dub"] != arms_table(DUBS, other)["dub"]).all()
    some = run_study(DUBS, out, arms=["dub"], seeds=(20, 21), overrides={"dub": {"train.lr": .0015}})
    assert some["arms"]["dub"]["seeds"] == [20, 21] and some["left_out"] == {"dub": [22]} and "Of dub, seeds 22 have other settings" in as_markdown(DUBS, some) and not some["missing"]
    assert [v["difference"]["n"] for v in some["verdicts"] if v["name"] == "sound class"] == [2], "settings are not mixed"
    del played[9:]
    back = run_study(DUBS, out, **how)
    assert len(played) == 9 and back == first, "taken back, the old runs are there again"


@pytest.mark.quick
def test_all_three_verdicts_and_what_is_missing(played, tmp_path):
    study = replace(DUBS, hypotheses=tuple(Hypothesis(n, "", "probe/class/ja", "dub", "none", margin=m) for n, m in (("yes", .1), ("no", .3))) + (
        Hypothesis("rule", "", "probe/class/ja", "none", "random init"), Hypothesis("two heads", "", "probe/class/ja", "dub", "dub", beside="distance_ratio"), Hypothesis("absent", "", "probe/class/ja", "level", "none")))
    found = run_study(study, tmp_path / "s", arms=("none", "dub"), seeds=(20, 21))
    assert {v["name"]: v["verdict"] for v in found["verdicts"]} == {"yes": "shown", "no": "against", "rule": "shown", "two heads": "against"} and found["open"] == ["absent"]
    assert [v["by scenes"] for v in found["verdicts"]] == ["shown", "against", None, "against"]
    one = run_study(study, tmp_path / "one", arms=("none", "dub"), seeds=(20,))
    assert {v["verdict"] for v in one["verdicts"]} == {"not shown"}, "one seed has no spread"
    shutil.rmtree(tmp_path / "s/dub,seed=21")
    assert read_study(study, tmp_path / "s")["missing"] == ["dub,seed=21"] and verdicts_table(study, read_study(study, tmp_path / "s")).loc["yes", "seeds"] == 1


@pytest.mark.quick
def test_a_run_that_began_with_another_is_run_again_when_that_changes(played, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studies, "have_stamps", lambda home, forge: None)
    monkeypatch.setattr(studies, "stamped_folder", lambda home, n, **how: tmp_path / "stamps/scenes/x")
    after, out, how = tmp_path / "dense", tmp_path / "real", dict(arms=["dubdense"], seeds=(20, 21))
    with pytest.raises(FileNotFoundError, match="seed=20 holds no checkpoint. Run that study first"): run_study(DENSE_REAL, out, after=after, **how)
    for seed in (20, 21):
        there = after / f"dubdense,seed={seed}/checkpoints/step_00000300"
        there.mkdir(parents=True); (there / "model.safetensors").write_bytes(b"first"); (there / "state.json").write_text("{}")
    begin = lambda: run_study(DENSE_REAL, out, after=after, **how)
    first = begin()
    assert played == ["dubdense,seed=20", "dubdense,seed=21"] and begin() == first and len(played) == 2 and not first["changed"]
    (after / "dubdense,seed=21/checkpoints/step_00000300/model.safetensors").write_bytes(b"second")
    begin()
    assert played[2:] == ["dubdense,seed=21"] and "Other settings than before: dubdense,seed=21." in capsys.readouterr().out
    (after / "dubdense,seed=21/checkpoints/step_00000300/model.safetensors").write_bytes(b"first")
    assert begin() == first and len(played) == 3, "the run of before comes back"


# ---- dubdense ----

def test_dubdense_goes_on_exactly(tmp_path, monkeypatch):
    "A run that lost its last steps ends with the very same weights: the second hearing, too, depends on seed, epoch and row alone."
    monkeypatch.chdir(workplace(tmp_path))
    torch.set_num_threads(1)
    r = recipe("dubdense", steps=4, seed=3, overrides={"data.videos": 3, "data.languages": ["en", "es"], "train.batch_size": 3, "train.save_every": 2, "train.val_every": 100, "train.log_every": 1, "train.draw_n": 1, "store.fps": 2, "store.languages": ["en", "es"]})
    whole = fit(r, "a", workers=0)
    assert all(0 < line["invariance"] for line in whole.metrics) and [p.name for p in checkpoints("a")] == ["step_00000002", "step_00000004"]
    shutil.copytree("a", "b"); shutil.rmtree("b/checkpoints/step_00000004")
    again = fit(r, "b", workers=0)
    assert [line["loss"] for line in again.metrics] == [line["loss"] for line in whole.metrics]
    assert Path("a/checkpoints/step_00000004/model.safetensors").read_bytes() == Path("b/checkpoints/step_00000004/model.safetensors").read_bytes()
    store = find_store(r)
    views = {dub: ClipDataset(store, None, replace(r.view, dub=dub), seed=3).finisher("cpu")(ClipDataset(store, None, replace(r.view, dub=dub), seed=3).raw(range(12), 1)) for dub in ("", "language", "same")}
    for name, batch in views.items():
        assert ("dub" in batch) == bool(name) and all(torch.equal(batch[k], views[""][k]) for k in ("audio", "keep", "image", "row")), "a second hearing moves nothing else"
    spoken = [i for i, x in enumerate(store["labels"][:12]) if json.loads(x)["shots"][0]["narrator"]]
    loudest = lambda x: x / x.abs().amax(-1, keepdim=True)
    apart = lambda name: (loudest(views[name]["dub"]) - loudest(views[""]["audio"])).abs().amax(-1)
    assert spoken and (apart("language")[spoken] > .1).all() and apart("same").max() < 1e-3 and not torch.equal(views["same"]["dub"], views["same"]["audio"])
    same = fit(replace(r, view=replace(r.view, dub="same")), "c", workers=0)
    assert same.metrics[0]["contrast"] == pytest.approx(whole.metrics[0]["contrast"], rel=.2) and same.metrics[0]["invariance"] < whole.metrics[0]["invariance"], "the same track again is nearer than another language"


# ---- killed ----

def children(pid):
    "Processes that a process has started."
    out = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: words = stat.read_text().rpartition(")")[2].split()
        except OSError: continue
        if int(words[1]) == pid: out.append(int(stat.parent.name))
    return out


def study_of(place, out, *more):
    command = [sys.executable, "-m", "avnb.studies", "--study", "dubs", "--quick", "--arms", "none", "--jobs", "1", "--out", out, "--overrides", '{"none": {"train.steps": 24, "train.save_every": 4}}', *more]
    return subprocess.Popen(command, cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.soak
def test_a_killed_study_goes_on_and_ends_in_the_same_tables(tmp_path):
    place = workplace(tmp_path)
    whole = study_of(place, "whole"); said, err = whole.communicate(timeout=280)
    assert whole.returncode == 0, err[-3000:]
    run = place / "cut/none,seed=20"
    for blow in ("run", "study"):  # first the run is killed under the study, then the study above the run
        child, until = study_of(place, "cut"), time.time() + 200
        reached = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").is_file() else 0
        try:
            while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < reached + 6:
                assert child.poll() is None and time.time() < until, child.communicate()
                time.sleep(.02)
            for pid in children(child.pid) if blow == "run" else [child.pid]: os.kill(pid, signal.SIGKILL)
            out, err = child.communicate(timeout=120)
        finally:
            if child.poll() is None: child.kill()
        assert child.returncode != 0 and (blow == "study" or "killed by signal 9" in out + err), out + err
    last = study_of(place, "cut"); again, err = last.communicate(timeout=280)
    assert last.returncode == 0, err[-3000:]
    assert (run / "log.txt").read_text().count("goes on from step") >= 2
    a, b = (read_study(DUBS, place / name, quick=True) for name in ("whole", "cut"))
    for x in (a, b): x["arms"]["none"].pop("cpu_s")
    assert a["arms"] == b["arms"] and a["verdicts"] == b["verdicts"] and a["changed"] == b["changed"]
    assert from_dict(read_json(run / "recipe.json")).train.steps == 24

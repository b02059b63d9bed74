"""LSSD's variants as a person starts them: the ancestor first, or from given weights."""
from places import workplace
from test_runs import executed, papermill

from avnb.core import read_json
from avnb.training import read_lines


def test_with_dubs_it_begins_with_its_ancestor(tmp_path):
    "B.5 of LSSD from nothing: B.3 first, beside it; then from given weights, with no ancestor of its own."
    cwd = workplace(tmp_path)
    done, out = papermill("train", cwd, "-p", "variant", "B5", "-p", "quick", True)
    assert done.returncode == 0, done.stderr[-3000:]
    executed(out)
    runs = cwd / "data/runs"
    assert sorted(p.parent.name for p in runs.glob("*/recipe.json")) == ["B3-quick", "B5-quick"]
    run, found = runs / "B5-quick", read_json(runs / "B5-quick/results.json")
    assert {"cross_sp", "cross_ps", "video", "audio"} <= set(read_lines(run / "metrics.jsonl")[-1])
    assert {"random init", "other sound", "before (B3)"} <= set(found["baselines"]) and {"en/a2v/R@1", "ja/v2a/R@1", "zxx/a2v/class_mAP", "distance_ratio", "same_scene/en_ja/R@1"} <= set(found["metrics"])
    assert {"loss.png", "distances.png", "scenes.png", "found.png"} <= {p.name for p in run.rglob("*.png")}
    done, out = papermill("train", cwd, "-p", "variant", "C2", "-p", "init", runs / "B3-quick", "-p", "quick", True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(p.parent.name for p in runs.glob("*/recipe.json")) == ["B3-quick", "B5-quick", "C2-quick"]
    assert read_json(runs / "C2-quick/start.json") == {"begins_with": "../B3-quick"} and "before (B3)" in read_json(runs / "C2-quick/results.json")["baselines"]

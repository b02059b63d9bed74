"""Any model and anyone's vectors, from where they lie to a file of figures."""
from pathlib import Path

import numpy as np
import pytest
from places import workplace

from avnb.core import read_json, settings
from avnb.dub_trials import dub_sets
from avnb.known import vectors_of
from avnb.probing import fresh_subject, main, probe, subject
from avnb.recipes import recipe
from avnb.report import claims_table, comparison, index_table
from avnb.results import read_items

ROOT = Path(__file__).resolve().parent.parent
SHARE = .02  # two videos of each set


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A working directory with a settings.ini of its own, and what a fresh model answers there."
    folder = workplace(tmp_path_factory.mktemp("probing"))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        who = fresh_subject("B5")
        yield folder, who, probe(who, "toy", folder / "own", share=SHARE, mlp=None, command="a test")


def saved(folder, who, change=lambda x: x):
    "The vectors of a model, as a stranger would bring them."
    sets = dub_sets(settings().data, "test", recipe("B5").store, share=SHARE)
    parts = [vectors_of([who.model], sets[k])[0] for k in ("test", "probe")]  # in another order than they are asked
    folder.mkdir()
    ids = [i for v in parts for i in v.ids]
    (folder / "ids.csv").write_text("id,row\n" + "".join(f"{i},{n}\n" for n, i in enumerate(ids)))
    np.save(folder / "video.npy", change(np.concatenate([v.video for v in parts])))
    for k in parts[0].audio: np.save(folder / f"audio_{k}.npy", change(np.concatenate([v.audio[k] for v in parts])))
    return folder


def test_vectors_from_elsewhere_stand_in_the_same_table(place):
    folder, who, own = place
    found = probe(subject(embeddings=saved(folder / "mine", who)), "toy", folder / "theirs", share=SHARE, mlp=None)
    assert found["metrics"] and all(own["metrics"][k] == v for k, v in found["metrics"].items())
    table = comparison([folder / "own", folder / "theirs"])
    assert table.attrs["differ"] == [] and {"untrained", "mine"} <= set(table.index)
    items = read_items(folder / "theirs")
    assert len(items) == 8 * 8 and np.stack(items["embeddings"]).shape[1] == 128 and not items["path"].map(lambda p: Path(p).is_absolute()).any()
    assert all((settings().data / p).is_file() for p in items["path"])


def test_other_vectors_give_other_figures(place):
    folder, who, own = place
    noise = np.random.default_rng(0)
    found = probe(subject(embeddings=saved(folder / "noise", who, lambda x: noise.normal(size=x.shape).astype(np.float32))), "toy", folder / "nothing", share=SHARE, mlp=None)
    assert found["metrics"]["distance_ratio"]["value"] > .7 > own["metrics"]["distance_ratio"]["value"]


@pytest.mark.parametrize("fault, said", [("row", "scenes are missing"), ("shape", "needed"), ("none", "needed video")])
def test_a_folder_that_lacks_something_is_told_what(place, fault, said, tmp_path):
    _, who, _ = place
    folder = saved(tmp_path / "mine", who)
    if fault == "row": (folder / "ids.csv").write_text("\n".join((folder / "ids.csv").read_text().splitlines()[:-3]) + "\n")
    if fault == "shape": np.save(folder / "video.npy", np.zeros(5, np.float32))
    if fault == "none":
        for f in folder.glob("*.npy"): f.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=said): probe(subject(embeddings=folder), "toy", tmp_path / "out", share=SHARE, mlp=None)
    assert not (tmp_path / "out").exists()


def test_a_shell_gets_the_same(place, capsys, tmp_path):
    "On a made-up task, since a shell asks for whole corpora."
    from avnb.tasks import make_hear_task
    folder, who, _ = place
    who.model.save_pretrained(tmp_path / "model")
    task = make_hear_task(tmp_path / "task", files=3, rate_hz=48_000)
    main(["--checkpoint", str(tmp_path / "model"), "--protocol", "hear", "--lists", str(task), "--media", str(task), "--out", str(tmp_path / "out")])
    assert "majority" in capsys.readouterr().out
    assert read_json(tmp_path / "out/results.json")["command"].startswith("python -m avnb.probing --checkpoint")


def test_the_front_page_shows_what_the_command_writes():
    for name, table in (("results.md", index_table), ("claims.md", claims_table)):
        text, missing = table(ROOT / "figures")
        assert not missing and (ROOT / "figures" / name).read_text() == text + "\n"
        assert all(line in (ROOT / "README.md").read_text() for line in text.splitlines())

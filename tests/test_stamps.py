"""Stamps without the package: a forged tree in its layout, with what trees like it get wrong."""
import hashlib
import io
import json
import os
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avnb import catalogue as module
from avnb.catalogue import Cutout, Recording, catalogue, fetch_stamps
from avnb.collage import patch
from avnb.counterfeit import counterfeit, melody, write_ogg
from avnb.cutouts import FAMILIES, deal, effects_of, family_of, voices_of, what_is
from avnb.media import decode_audio, probe
from avnb.montage import DUBBED, KINDS, draw, make_stamps, plan
from avnb.dictation import stock
from avnb.store import open_store, prepare
from avnb.rows import StoreConfig


@pytest.fixture(scope="module")
def forged(tmp_path_factory) -> Path:
    "A forged package with its troubles: a broken picture, a broken sound, no text, malformed text, one picture and one sound twice, a silent effect, letters."
    folder = counterfeit(tmp_path_factory.mktemp("package"))
    home = folder / "stamps" / "animals" / "birds"
    (home / "torn.png").write_bytes(b"\x89PNG torn")
    (home / "bird0_desc_de.ogg").write_bytes(b"OggS torn")
    (home / "bird1.txt").unlink()
    (home / "bird2.txt").write_bytes("=x\nno line of ours\nfr.utf8=Un\nfr.utf8=Deux\nde.utf8=\nqq.utf8=?\npt_BR.utf8=Um\n\xff".encode("latin-1"))
    for suffix in (".png", ".ogg"): (home / f"bird7{suffix}").write_bytes((home / f"bird3{suffix}").read_bytes())
    write_ogg(home / "bird5.ogg", np.zeros(24_000))
    letters = folder / "stamps" / "symbols" / "alphabets"
    letters.mkdir(parents=True)
    Image.new("RGBA", (4, 4), (0, 0, 0, 255)).save(letters / "a.png")
    return folder


@pytest.mark.quick
def test_catalogue_names_what_is_broken_and_goes_on(forged, capsys):
    (forged / "catalogue.json").unlink(missing_ok=True)
    stamps = {c.id.split("/")[-1]: c for c in catalogue(forged)}
    said = capsys.readouterr().out
    assert "2 files left out" in said and "torn.png" in said and "bird0_desc_de.ogg" in said and str(forged) not in said
    assert len(stamps) == 4 * 6 + 1 and "a" not in stamps                     # the letter is left out, the copy is there
    assert stamps["bird1"].names == {} and stamps["bird2"].names == {"fr": "Un"}
    assert stamps["bird5"].effect is None and stamps["bird4"].effect is not None   # silence is no effect
    assert stamps["bird3"].picture == stamps["bird7"].picture and stamps["bird3"].effect.heard == stamps["bird7"].effect.heard
    assert set(stamps["bird0"].voices) == {"fr", "es"}


def test_catalogue_is_read_again_when_a_file_changes(forged):
    before = catalogue(forged)
    text = forged / "stamps" / "household" / "tools" / "clock0.txt"
    text.write_text("Another clock, renamed.\n")
    after = catalogue(forged)
    changed = [b for a, b in zip(before, after, strict=True) if a != b]
    assert [c.names for c in changed] == [{"en": "Another clock, renamed."}]


recording = lambda name: Recording(f"{name}.ogg", name, name, 0.0, 0.5, -20.0)
homes = ["animals/birds", "animals/insects", "animals/mammals/bovines", "household/tools", "space/planets"]


@st.composite
def stamps_drawn(draw):
    "Stamps that share pictures, effects and names at random."
    n = draw(st.integers(1, 24))
    name = lambda kind: st.integers(0, n).map(lambda k: f"{kind}{k}")
    one = st.tuples(st.sampled_from(homes), name("picture"), st.none() | name("effect"), st.dictionaries(st.sampled_from(["fr", "es"]), name("voice"), max_size=2))
    return [Cutout(f"{home}/s{k}", p, {}, e and recording(e), {lang: recording(v) for lang, v in vs.items()}) for k, (home, p, e, vs) in enumerate(draw(st.lists(one, min_size=n, max_size=n)))]


@pytest.mark.quick
@given(stamps_drawn(), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_no_recording_and_no_picture_is_in_two_parts(stamps, seed):
    parts = deal(stamps, seed)
    assert parts == deal(stamps[::-1], seed)                                  # whatever the order
    strict = ["train", "val", "test"].index
    used = {part: set() for part in ("train", "val", "test")}
    for c in stamps:
        if family_of(c.id) is None:
            assert c.id not in parts.stamps
            continue
        own = parts.stamps[c.id]
        assert parts.pictures[c.picture] == own
        used[own].add(("picture", c.picture))
        if c.effect: assert parts.recordings[c.effect.heard] == own
        for r in [*c.voices.values(), *([c.effect] if c.effect else [])]:
            assert strict(parts.recordings[r.heard]) >= strict(own)           # a test stamp's name is never heard in training
            used[parts.recordings[r.heard]].add(("sound", r.heard))
        for part in used: assert all(parts.recordings[r.heard] == part for r in voices_of(c, parts, part).values())
    assert not used["train"] & used["test"] and not used["train"] & used["val"] and not used["val"] & used["test"]
    for part in used:
        heard = [c.effect.heard for c in effects_of(stamps, parts, part)]
        assert len(heard) == len(set(heard)) and all(parts.recordings[h] == part for h in heard)
    assert set(what_is(stamps, parts)) == set(FAMILIES)


def test_scenes_hear_only_their_part(forged):
    s = stock(forged.resolve())
    for kind in KINDS:
        for part in ("train", "val", "test"):
            try: out = plan(s, kind, 0, part=part, languages=["fr", "es"])
            except ValueError as e:
                assert "nothing to ask" in str(e)
                continue
            for shot in out:
                assert all(s.parts.recordings[c.effect.heard] == part for c in shot["sounding"].values())
                assert all(s.parts.stamps[c.id] == (part if kind.endswith("_new") or kind in DUBBED else "train") for c in shot["cast"])


def test_lessons_change_their_cast_and_keep_their_grounds(forged):
    s, out = stock(forged.resolve()), []
    for i in range(6): out += plan(s, "lessons", i, languages=["fr", "es"])
    assert len(out) == 60 and all(x["end_s"] - x["start_s"] == 1 and len(x["cast"]) in (1, 2) for x in out)
    assert all(bool(plays) != (target is not None) for x in out for plays, target in x["slots"])  # an effect or a name, never both, never nothing
    assert len({(x["background"], x["place"]) for x in out}) <= 36 and len({str([c.id for c in x["cast"]]) for x in out}) > 10
    one = next((x, y) for k, x in enumerate(out) for y in out[k + 1:] if (x["background"], x["place"]) == (y["background"], y["place"]))
    bare = [draw(s, [x | {"cast": [], "looks": [], "moves": []}])[0] for x in one]
    assert (bare[0] == bare[1]).all()


def test_masks_are_the_alpha_that_was_pasted(forged):
    s = stock(forged.resolve())
    for kind, number in (("scenes", 0), ("scenes", 1), ("loc", 0)):
        shots = plan(s, kind, number, part="train", languages=["fr", "es"])
        frames, labels, shot_of = draw(s, shots)
        assert labels.shape == (len(frames), 112, 112) and shot_of.max() == len(shots) - 1
        for k, shot in enumerate(shots):
            want, at = np.zeros((112, 112), np.uint8), int((shot_of == k).argmax())       # the shot's first frame, by hand
            for i, (c, look, m) in enumerate(zip(shot["cast"], shot["looks"], shot["moves"], strict=True)):
                alpha = patch(s.root / f"{c.id}.png", **look)[..., 3]
                cx, cy = (int(np.clip(np.round(m["at"][j] + m["sway"][j] * np.sin(m["phase"])), 16, 96)) for j in (0, 1))
                for y in range(alpha.shape[0]):
                    for x in range(alpha.shape[1]):
                        v, u = cy - alpha.shape[0] // 2 + y, cx - alpha.shape[1] // 2 + x
                        if alpha[y, x] > 127 and 0 <= v < 112 and 0 <= u < 112: want[v, u] = i + 1
            assert (labels[at] == want).all()


def test_scenes_on_disk_are_read_by_the_store(forged, tmp_path):
    out = make_stamps(tmp_path / "a", 2, folder=forged, languages=("fr", "es"), workers=1)
    again = make_stamps(tmp_path / "b", 2, folder=forged, languages=("fr", "es"), workers=2)
    for p in sorted(out.rglob("*.*")):
        if p.suffix != ".npz": assert p.read_bytes() == (again / p.relative_to(out)).read_bytes(), p.name
    with np.load(out / "truth" / "scenes_0001.npz") as a, np.load(again / "truth" / "scenes_0001.npz") as b: assert all((a[k] == b[k]).all() for k in ("labels", "shot"))
    assert [t.language for t in probe(out / "scenes_0000.mp4").tracks] == ["fr", "es", "zxx"]
    report = prepare(out, tmp_path / "store", recipe=StoreConfig(workers=1, fps=2))
    store = open_store(tmp_path / "store")
    assert report.n_ok == 2 and not report.broken and len(store) > 10
    truth = json.loads(store[0]["labels"])["shots"][0]
    assert {"label", "class", "sounding", "spans", "stamp", "recording"} <= set(truth["objects"][0]) and len(store[0]["masks"]) == len(store[0]["frames"])


def test_words_are_where_the_truth_says(forged, tmp_path):
    out = make_stamps(tmp_path / "dubs", 1, kind="dubs", folder=forged, languages=("fr", "es"))
    truth = json.loads((out / "truth" / "dubs_0000.json").read_text())
    assert truth["part"] == "train" and truth["shots"][0]["end_s"] == 3.0 and len(truth["shots"]) == 4
    effects = decode_audio(out / "dubs_0000.mp4", 16_000, "zxx").numpy()
    for lang in ("fr", "es"):
        speech = decode_audio(out / "dubs_0000.mp4", 16_000, lang).numpy() - effects
        inside = np.zeros(len(speech), bool)
        for shot in truth["shots"]:
            (told,) = shot["narrator"]
            assert set(told["words"]) == {"fr", "es"} and len({w["says"] for w in told["words"].values()}) == 1   # a dub: everyone says the same
            w = told["words"][lang]
            inside[int((w["start_s"] - 0.03) * 16_000) : int((w["end_s"] + 0.03) * 16_000)] = True
        assert (speech[~inside] ** 2).mean() < 0.02 * (speech[inside] ** 2).mean()


def test_films_are_spoken_over_in_every_language(forged, tmp_path):
    out = make_stamps(tmp_path / "films", 1, kind="films", folder=forged, languages=("fr", "es"))
    truth = json.loads((out / "truth" / "films_0000.json").read_text())
    effects, s = decode_audio(out / "films_0000.mp4", 16_000, "zxx").numpy(), stock(forged.resolve())
    heard = {r.heard[:16] for c in s.stamps for r in c.voices.values() if s.parts.recordings[r.heard] == "train"}
    for lang in ("fr", "es"):
        speech = decode_audio(out / "films_0000.mp4", 16_000, lang).numpy() - effects
        for shot in truth["shots"]:
            said = [n["words"][lang] for n in shot["narrator"] if lang in n["words"]]
            assert said[0]["start_s"] == shot["start_s"] and said[-1]["end_s"] > shot["end_s"] - .5, "no gap but between names"
            assert all(.05 < b["start_s"] - a["end_s"] < .15 for a, b in pairwise(said)) and {w["recording"] for w in said} <= heard
            gaps = np.concatenate([speech[int((a["end_s"] + .03) * 16_000) : int((b["start_s"] - .03) * 16_000)] for a, b in pairwise(said)])
            assert (gaps ** 2).mean() < .02 * (speech[int(said[0]["start_s"] * 16_000) : int(said[-1]["end_s"] * 16_000)] ** 2).mean()
    lists = [[[n["words"][lang]["says"] for n in shot["narrator"] if lang in n["words"]] for lang in ("fr", "es")] for shot in truth["shots"]]
    assert any(set(a) & set(b) for a, b in lists), "languages go through one list"


def deb_of(files: dict) -> bytes:
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w:xz") as tar:
        for name, data in files.items():
            m = tarfile.TarInfo(name)
            m.size = len(data)
            tar.addfile(m, io.BytesIO(data))
    part = lambda name, data: f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return b"!<arch>\n" + part("debian-binary", b"2.0\n") + part("data.tar.xz", tar_bytes.getvalue())


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    "A known package, small."
    data = deb_of({f"./{module._INSIDE}a/x.txt": b"An x.\n", f"./{module._LICENCE}": b"Copyright: us\nLicense: GPL-2\n"})
    monkeypatch.setattr(module, "_PACKAGE", ("toy=1", len(data), hashlib.sha256(data).hexdigest()))
    (tmp_path / "toy.deb").write_bytes(data)
    return tmp_path / "toy.deb"


@pytest.mark.quick
def test_fetch_says_what_is_wrong_and_leaves_nothing_half_done(package, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="no `apt-get` here"): fetch_stamps(out)
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    failed = type("Done", (), dict(stdout="", stderr="E: Could not resolve host", returncode=100))
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ConnectionError, match="Could not resolve host"): fetch_stamps(out)
    (tmp_path / "other.deb").write_bytes(package.read_bytes() + b"!")
    with pytest.raises(ValueError, match="Fetch that one"): fetch_stamps(out, tmp_path / "other.deb")
    assert list(out.iterdir()) == []


@pytest.mark.quick
def test_fetch_interrupted_begins_again(package, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", os.replace
    def killed(a, b):
        if Path(b).name == "stamps.json": raise KeyboardInterrupt
        return real(a, b)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt): fetch_stamps(out, package)
    monkeypatch.setattr(os, "replace", real)
    assert not (out / "stamps.json").exists() and not list(out.glob(".fetch-*"))
    fetch_stamps(out, package)
    told = json.loads((out / "stamps.json").read_text())
    assert told["licence"] == "GPL-2" and told["files"] == 1 and "GPL-2" in capsys.readouterr().out
    package.unlink()
    fetch_stamps(out, package)                                                # whole: only checked
    (out / "stamps" / "a" / "x.txt").write_text("spoilt")
    with pytest.raises(FileNotFoundError, match="no package"): fetch_stamps(out, package)


@pytest.mark.quick
def test_melodies_differ():
    a, b = (melody(np.random.default_rng(k), 220) for k in (0, 1))
    assert a.shape == b.shape and not np.allclose(a, b)

"""The store's promises that no notebook can show: kills, processes, odd folders."""
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from avnb.core import read_json
from avnb.media import mux, write_video
from avnb.rows import StoreConfig
from avnb.store import Report, open_store, prepare, store_all

CONFIG = StoreConfig(workers=0)
# prepare in a process of its own, each row slowed down so that a kill finds it at work
CHILD = """
import sys, time
import avnb.store as store
rows_of = store.rows_of
def slow(*a, **k):
    for row in rows_of(*a, **k): time.sleep(float(sys.argv[3])); yield row
store.rows_of = slow
store.prepare(sys.argv[1], sys.argv[2], recipe=store.StoreConfig(workers=0))
"""


def clip(path, seed, seconds=1.0, loud=0.3):
    g, n = torch.Generator().manual_seed(seed), int(25 * seconds)
    frames = torch.full((n, 3, 32, 32), 30, dtype=torch.uint8)
    frames[:, :, 8:24, 8:24] = torch.randint(60, 255, (3, 1, 1), generator=g)
    tone = loud * torch.sin(torch.arange(int(48_000 * seconds)) * 0.01 * (1 + seed % 7))
    return write_video(path, frames, 25, dict(en=tone))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    src = tmp_path_factory.mktemp("clips")
    for i in range(12): clip(src / f"v{i:02d}.mp4", i, 2)
    (src / "v03.mp4").write_bytes(b"")
    return src


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "store"
    prepare(clips, out, recipe=CONFIG)
    return out


def same_store(a, b):
    x, y = read_json(a / "store.json"), read_json(b / "store.json")
    assert x == y
    assert sorted(os.listdir(a / "shards")) == sorted(os.listdir(b / "shards"))
    assert open_store(a).data.table.equals(open_store(b).data.table)


def killed(src, out, when, delay=0.05):
    "Start `prepare` elsewhere, SIGKILL it when `when()` says so; the number of files it had finished, or None if it was done first."
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(src), str(out), str(delay)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while child.poll() is None:
            if when():
                child.send_signal(signal.SIGKILL)
                child.wait()
                return len(list((out / "parts").glob("*.json")))
            time.sleep(0.002)
        assert child.returncode == 0
    finally:
        if child.poll() is None: child.kill()


@pytest.mark.quick
def test_killed_half_way_it_goes_on(clips, whole, tmp_path):
    out = tmp_path / "store"
    done = killed(clips, out, lambda: len(list((out / "parts").glob("*.json"))) >= 5)
    assert done and 5 <= done < 12
    with pytest.raises(FileNotFoundError, match="unfinished store"): open_store(out)
    was = {f: f.stat().st_mtime_ns for f in (out / "parts").glob("*.json")}
    good = sum(read_json(f)["ok"] for f in was)
    report = prepare(clips, out, recipe=CONFIG)
    assert report.n_made == 11 - good  # the files that were finished are not decoded again
    same_store(out, whole)


@pytest.mark.soak
def test_killed_many_times(clips, whole, tmp_path):
    rng, out, kills = np.random.default_rng(0), tmp_path / "store", 0
    for _ in range(8):
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(3):  # several deaths in one store's life, at any moment from the first file on
            begin, wait = [], rng.uniform(0, 1.2)
            def now(begin=begin, wait=wait):
                if (out / "parts").is_dir() and not begin: begin.append(time.time())
                return begin and time.time() - begin[0] > wait
            kills += killed(clips, out, now, 0.02) is not None
        prepare(clips, out, recipe=CONFIG)
        same_store(out, whole)
    assert kills > 8


@pytest.mark.quick
def test_killed_while_it_is_brought_up_to_date(clips, tmp_path):
    src, out = shutil.copytree(clips, tmp_path / "src"), tmp_path / "store"
    prepare(src, out, recipe=CONFIG)
    for i in range(6, 12): clip(src / f"v{i:02d}.mp4", 100 + i)
    assert killed(src, out, lambda: len(list((out / "parts").glob("*.json"))) >= 2) is not None
    assert len(open_store(out)) == 22  # until the new one is whole, the old one is the store
    (src / "v00.mp4").unlink()
    assert 0 < prepare(src, out, recipe=CONFIG).n_made <= 4
    fresh = tmp_path / "fresh"
    prepare(src, fresh, recipe=CONFIG)
    same_store(out, fresh)


def test_processes_make_the_same_store(clips, whole, tmp_path):
    report = prepare(clips, tmp_path / "store", recipe=StoreConfig(workers=2))
    assert isinstance(report, Report) and report.n_ok == 11
    a, b = read_json(tmp_path / "store/store.json"), read_json(whole / "store.json")
    assert a["checksum"] == b["checksum"] and a["files"] == b["files"]


def fatal(job):
    if job == 3: os._exit(139)
    return job


def test_a_crashing_decoder_is_named():
    done = list(store_all(list(range(8)), fatal, lambda job: f"{job} crashed", 2))
    assert sorted(map(str, done)) == ["0", "1", "2", "3 crashed", "4", "5", "6", "7"]


@pytest.mark.quick
def test_odd_entries(tmp_path):
    src, out = tmp_path / "src", tmp_path / "store"
    clip(src / "a.mp4", 1)
    clip(tmp_path / "elsewhere/b.mp4", 2)
    (src / "deep/er").mkdir(parents=True)
    shutil.copy(src / "a.mp4", src / "deep/er/COPY.MP4")
    (src / "leaving.mp4").symlink_to(tmp_path / "elsewhere/b.mp4")
    (src / "linked").symlink_to(tmp_path / "elsewhere")
    (src / "loop").symlink_to(src)
    (src / "dead.mkv").symlink_to(tmp_path / "nothing.mkv")
    (src / "folder.mp4").mkdir()
    clip(src / "folder.mp4/inside.mp4", 3)
    os.mkfifo(src / "pipe.mp4")
    (Path(os.fsdecode(os.fsencode(src) + b"/bad\xff.mp4"))).write_bytes((src / "a.mp4").read_bytes())
    report = prepare(src, out, recipe=CONFIG)
    stored = set(open_store(out)["source"][:])
    assert stored == {"a.mp4", "deep/er/COPY.MP4", "leaving.mp4", "linked/b.mp4", "folder.mp4/inside.mp4", "bad\\xff.mp4"}
    assert {os.path.basename(p) for p, _ in report.broken} == {"dead.mkv", "folder.mp4", "pipe.mp4"}
    assert report.n_ok == 6 and all(reason for _, reason in report.broken)


@pytest.mark.quick
def test_nothing_is_written_outside_the_store(clips, tmp_path):
    src = shutil.copytree(clips, tmp_path / "src")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    prepare(src, src / "store", recipe=CONFIG)  # a store may lie in the folder that it holds
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "store" not in p.parts and p != src}
    assert after == {p: t for p, t in before.items() if p != src}
    assert prepare(src, src / "store", recipe=CONFIG).n_made == 0


@pytest.mark.quick
def test_layout_of_lssd(tmp_path):
    "Three seconds at 48 kHz with several tracks: the same columns."
    src, wave = tmp_path / "src", lambda f: 0.2 * torch.sin(torch.arange(48_000 * 7) * f)
    frames = torch.randint(0, 255, (175, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(src / "film.mp4", frames, 25, dict(en=wave(0.01), fr=wave(0.02), zxx=wave(0.03)))
    config = StoreConfig(workers=0, rate_hz=48_000, seconds=3.0, fps=25, film_s=5, cut_s=3)
    prepare(src, tmp_path / "store", recipe=config)
    rows = open_store(tmp_path / "store")
    assert rows["tracks"][:] == [["en", "fr", "zxx"]] * 2 and rows["start_s"][:] == [0, 3]
    assert [len(s) for s in rows[1]["sound"]] == [288_000] * 3 and len(rows[0]["frames"]) == 75
    assert rows["title"][:] == ["film"] * 2 and len(set(rows["group"][:])) == 2
    few = StoreConfig(workers=0, languages=("fra",))
    assert prepare(src, tmp_path / "store", recipe=few).n_rows == 7
    assert open_store(tmp_path / "store")["tracks"][0] == ["fr"]


def tone(hz, seconds): return 0.3 * torch.sin(torch.arange(int(48_000 * seconds)) * 2 * torch.pi * hz / 48_000)


def sound_file(path, wave, begin_s=0.0):
    "A sound file whose track begins at a time of its own."
    with av.open(str(path), "w") as c:
        s = c.add_stream("flac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((wave * 32767).short().numpy()[None], format="s16", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 48_000, Fraction(1, 48_000), int(begin_s * 48_000)
        for packet in [*s.encode(frame), *s.encode(None)]: c.mux(packet)
    return path


DUBS = StoreConfig(workers=0, rate_hz=48_000, seconds=3.0, fps=4)


@pytest.fixture
def dubs(tmp_path):
    "A film with dubs beside it, as videos and as sounds; one is short, one begins late, one is broken; and two videos whose names only look like it."
    src, g = tmp_path / "src", torch.Generator().manual_seed(0)
    picture = lambda: torch.randint(0, 255, (1, 3, 6, 8), generator=g).byte().repeat(225, 1, 1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    write_video(src / "film.mp4", picture(), 25, dict(en=tone(300, 9)))
    mux(src / "film.mp4", {"en": tone(400, 8)}, src / "film_fra.mp4")  # tagged by a tool that copies tags
    sound_file(tmp_path / "de.mka", tone(500, 9)).rename(src / "film_deu.flac")
    sound_file(tmp_path / "it.mka", tone(600, 8), 1.0).rename(src / "film_ita.WAV")
    (src / "film_spa.mp4").write_bytes((src / "film_fra.mp4").read_bytes()[:3000])
    write_video(src / "shark.mp4", picture(), 25, dict(en=tone(300, 9)))
    write_video(src / "shark_fin.mp4", picture(), 25, dict(en=tone(300, 9)))
    return src


def heard(row):
    "Language -> the loudest frequency of its middle second, in Hz."
    out = {}
    for language, pcm in zip(row["tracks"], row["sound"], strict=True):
        wave = np.frombuffer(pcm, np.int16)[48_000:96_000].astype(float)
        out[language] = int(np.abs(np.fft.rfft(wave)).argmax()) if wave.any() else 0
    return out


@pytest.mark.quick
def test_dubs_beside_a_video_are_tracks_of_one_row(dubs, tmp_path):
    report = prepare(dubs, tmp_path / "store", recipe=DUBS)
    rows = open_store(tmp_path / "store")
    film = [r for r in rows if r["title"] == "film"]
    assert [heard(r) for r in film] == [dict(en=300, de=500, fr=400), dict(en=300, de=500, fr=400, it=600), dict(en=300, de=500, it=600)]
    assert report.missing == {"it": 1, "fr": 1}  # of the first and of the last span
    assert [Path(p).name for p, _ in report.broken] == ["film_spa.mp4"] and report.n_ok == 6
    assert {r["title"]: r["tracks"] for r in rows if r["title"] != "film"} == {"shark": ["en"], "shark_fin": ["en"]}
    assert (report.n_rows, report.n_undubbed) == (9, 6)
    info = read_json(tmp_path / "store/store.json")["counts"]
    assert (info["files"], info["good"], info["broken"], info["missing"]) == (7, 6, 1, {"fr": 1, "it": 1})


@pytest.mark.quick
def test_tracks_of_one_file_that_differ_in_length(tmp_path):
    frames = torch.randint(0, 255, (225, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "src/film.mp4", frames, 25, dict(en=tone(300, 9), fr=tone(400, 5.9), zxx=tone(500, 9)))
    write_video(tmp_path / "src/short.mp4", frames, 25, dict(en=tone(300, 5)))  # alone: what there is, as before
    report = prepare(tmp_path / "src", tmp_path / "store", recipe=DUBS)
    rows = open_store(tmp_path / "store")
    assert rows["tracks"][:] == [["en", "fr", "zxx"]] * 2 + [["en", "zxx"]] + [["en"]] * 2  # of `short`, the last three seconds are silent
    assert report.missing == {"fr": 1} and report.n_undubbed == 3 and [len(left) for _, left in report.left_out] == [1]
    assert [len(s) for r in rows for s in r["sound"]] == [288_000] * 10


@pytest.mark.quick
def test_a_changed_dub_makes_its_family_again(dubs, tmp_path):
    out, new = tmp_path / "store", StoreConfig(workers=0, rate_hz=48_000, seconds=3.0, fps=2, languages=("en", "fr", "de"))
    assert prepare(dubs, out, recipe=new).n_made == 2
    assert prepare(dubs, out, recipe=new).n_made == 0
    sound_file(tmp_path / "x.mka", tone(700, 9)).rename(dubs / "film_deu.flac")
    assert prepare(dubs, out, recipe=new).n_made == 1
    assert heard(open_store(out)[0])["de"] == 700
    (dubs / "film_deu.flac").unlink()
    assert prepare(dubs, out, recipe=new).n_made == 1
    assert open_store(out)[0]["tracks"] == ["en", "fr"]
    fresh = tmp_path / "fresh"
    prepare(dubs, fresh, recipe=new)
    same_store(out, fresh)


@pytest.mark.quick
def test_the_next_video_gives_the_pictures(dubs, tmp_path):
    for name in ("film.mp4", "film_ita.WAV", "film_spa.mp4", "shark.mp4", "shark_fin.mp4"): (dubs / name).unlink()
    (dubs / "film_eng.mp4").write_bytes((dubs / "film_fra.mp4").read_bytes()[:3000])
    report = prepare(dubs, tmp_path / "store", recipe=DUBS)
    assert [Path(p).name for p, _ in report.broken] == ["film_eng.mp4"] and report.n_ok == 2
    assert heard(open_store(tmp_path / "store")[0]) == dict(fr=400, de=500)
    (dubs / "film_fra.mp4").unlink()
    with pytest.raises(ValueError, match="of 2 files are broken"): prepare(dubs, tmp_path / "store", recipe=DUBS)


@pytest.mark.soak
def test_truncated_anywhere(tmp_path):
    data = clip(tmp_path / "a.mp4", 1, 3).read_bytes()
    (tmp_path / "cut").mkdir()
    cuts = np.linspace(0, len(data) - 1, 60).astype(int)
    for n in cuts: (tmp_path / f"cut/{n:06d}.mp4").write_bytes(data[:n])
    shutil.copy(tmp_path / "a.mp4", tmp_path / "cut/whole.mp4")
    report = prepare(tmp_path / "cut", tmp_path / "store", recipe=StoreConfig(workers=0, max_broken=1))
    stored = [s for s in dict.fromkeys(open_store(tmp_path / "store")["source"][:]) if s != "whole.mp4"]
    assert report.n_ok + len(report.broken) == 61
    assert all(int(s[:6]) > len(data) * 0.98 for s in stored), stored  # only what lost a last crumb may pass

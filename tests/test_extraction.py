"""Extraction's promises that no notebook can show: kills, processes, odd files, the authors' command line."""
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from avnb.extraction import extract, postprocess
from avnb.media import write_video
from avnb.windows import video_plan, video_windows

FILES = [f"{k}/{k}.{end}" for k in ("video", "audio") for end in ("pt", "safetensors")] + ["video/metadata.json", "audio/metadata.json"]


class Coarse(torch.nn.Module):
    "Towers of one matrix each; counts what it is given."
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.v, self.a = (torch.nn.Parameter(torch.randn(n, 768, generator=g)) for n in (3 * 4 * 7 * 7, 12 * 16))
        self.given = []

    def embed_video(self, x):
        self.given.append(len(x))
        return torch.nn.functional.adaptive_avg_pool3d(x, (4, 7, 7)).flatten(1) @ self.v

    def embed_audio(self, x):
        self.given.append(len(x))
        return torch.nn.functional.adaptive_avg_pool2d(x / 50, (12, 16)).flatten(1) @ self.a


# extraction in a process of its own, each batch slowed down so that a kill finds it at work
CHILD = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
import avnb.extraction as e
from test_extraction import Coarse
torch.set_num_threads(1)
embed = e.embed
def slow(*a): time.sleep(float(sys.argv[4])); return embed(*a)
e.embed = slow
i, n = map(int, sys.argv[5:7])
e.extract(Coarse(), sys.argv[2], sys.argv[3], batch_size=3, part=(i, n))
"""


def child(src, out, delay=0.1, part=(0, 1)):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(Path(__file__).parent), str(src), str(out), str(delay), *map(str, part)],
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def scene(path, dur_s, languages=("en",), seed=0):
    g, n = torch.Generator().manual_seed(seed), round(25 * dur_s)
    frames = torch.randint(0, 255, (1, 3, 6, 8), generator=g, dtype=torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3).repeat(n, 1, 1, 1)
    frames[:, 0, :8] = torch.arange(n, dtype=torch.uint8)[:, None, None]
    return write_video(path, frames, 25, {k: torch.randn(round(dur_s * 48_000), generator=g) * 0.05 for k in languages})


def sound(path, dur_s, codec, rate=48_000, layout="mono", seed=0):
    channels = av.AudioLayout(layout).nb_channels
    x = np.random.default_rng(seed).integers(-3000, 3000, (1, round(dur_s * rate) * channels)).astype(np.int16)
    with av.open(str(path), "w") as c:
        s = c.add_stream(codec, rate=rate, layout=layout)
        whole = av.AudioFrame.from_ndarray(x, format="s16", layout=layout)
        whole.sample_rate = rate
        for f in [*av.AudioResampler(format=s.format or "s16", layout=layout, rate=rate).resample(whole), None]: c.mux(s.encode(f))
    return path


def film(path, codec, fps=25, n=75):
    with av.open(str(path), "w") as c:
        s = c.add_stream(codec, rate=fps)
        s.width, s.height, s.pix_fmt = 64, 48, "yuv420p"
        for k in range(n):
            f = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 2 * k, np.uint8), format="rgb24")
            f.pts = k
            c.mux(s.encode(f))
        c.mux(s.encode(None))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    src = tmp_path_factory.mktemp("clips")
    for k, dur in enumerate((7, 2, 4.6, 12, 3, 1)): scene(src / f"{k % 2}" / f"v{k}.mp4", dur, ("en", "fr") if k == 3 else ("en",), k)
    (src / "0" / "v9.mp4").write_bytes(b"")
    return src


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "emb"
    assert child(clips, out, 0).wait() == 0
    return out


def same(a, b):
    for file in FILES: assert (a / file).read_bytes() == (b / file).read_bytes(), file
    assert not (b / ".parts").exists()


@pytest.mark.quick
def test_killed_it_goes_on_bit_equal(clips, whole, tmp_path):
    out, kills, kept = tmp_path / "emb", 0, {}
    batches = lambda: {p.name: p.stat().st_mtime_ns for p in (out / ".parts").rglob("*.safetensors")}
    for at in (2, 6):
        run = child(clips, out)
        try:
            while run.poll() is None and len(batches()) < at: time.sleep(0.005)
            if run.poll() is None: kills += 1
        finally:
            run.send_signal(signal.SIGKILL)
            run.wait()
        there = batches()
        assert all(there[name] == when for name, when in kept.items())  # what was done is not done again
        kept = there
    assert kills == 2 and len(kept) >= 6 and not (out / "video").exists()
    assert child(clips, out, 0).wait() == 0
    same(whole, out)


@pytest.mark.quick
def test_processes_share_the_work(clips, whole, tmp_path):
    runs = [child(clips, tmp_path / "emb", 0.02, (i, 3)) for i in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    same(whole, tmp_path / "emb")


@pytest.mark.quick
def test_windows_of_many_files_fill_a_batch(clips, tmp_path):
    model = Coarse()
    done = extract(model, clips, tmp_path / "emb", batch_size=4, kinds=("video",), workers=2)
    assert done.windows == {"video": 11} and [len(x) for _, x in postprocess(done.folder)] == [2, 2, 1, 1, 4, 1]
    assert model.given == [4] * 10 + [3] * 5  # five crops each


@pytest.mark.quick
def test_any_file(tmp_path):
    src = tmp_path / "in"
    (src / "deep").mkdir(parents=True)
    for name, codec, rate, layout in (("a.WAV", "pcm_s16le", 22_050, "5.1"), ("b.flac", "flac", 44_100, "stereo"), ("c.mp3", "libmp3lame", 44_100, "stereo"),
                                      ("d.opus", "libopus", 48_000, "mono"), ("e.Ogg", "libopus", 48_000, "stereo"), ("f.m4a", "aac", 48_000, "mono")):
        sound(src / "deep" / name, 4.8, codec, rate, layout)
    for name, codec in (("g.AVI", "mpeg4"), ("h.webm", "libvpx"), ("i.mkv", "libx264"), ("j.mov", "libx264")): film(src / name, codec)
    good = {p.name for p in src.rglob("*.*")}
    data = scene(src / "k.mp4", 4, ("en",)).read_bytes()
    (src / "l.mp4").write_bytes(data[: len(data) // 2])
    (src / "m.wav").write_bytes((src / "deep" / "a.WAV").read_bytes()[:50_000])
    (src / "n.avi").symlink_to("nothing.avi")
    (src / "notes.txt").write_text("no media")
    done = extract(Coarse(), src, tmp_path / "emb", batch_size=5)
    assert {Path(name).name for name, _ in done.broken} == {"l.mp4", "m.wav", "n.avi"} and done.files == 14
    video, sounds = (dict(postprocess(done.folder, k)) for k in ("video", "audio"))
    assert {Path(p).name for p in (*video, *sounds)} == good | {"k.mp4"} and list(sounds) == sorted(sounds)
    assert {x.shape for x in video.values()} == {(1, 5, 768)} and {x.shape for p, x in sounds.items() if "k.mp4" not in p} == {(2, 768)}
    told = json.loads((done.folder / "audio" / "metadata.json").read_text())
    assert told["sample_rate"][0] == 22_050 and told["range"][1] == [pytest.approx(1.8), pytest.approx(4.8)]


@pytest.mark.quick
def test_a_file_that_breaks_half_way_leaves_nothing_behind(tmp_path):
    data = bytearray(scene(tmp_path / "in" / "b.mp4", 12).read_bytes())
    (tmp_path / "ok").mkdir()
    for k in (0, 2): scene(tmp_path / "in" / f"{'abc'[k]}.mp4", 5, seed=k)
    with av.open(str(tmp_path / "in" / "b.mp4")) as c: at = [p.pos for p in c.demux(video=0) if p.size][200:260]
    data[at[0] : at[-1]] = bytes(at[-1] - at[0])
    (tmp_path / "in" / "b.mp4").write_bytes(data)
    done = extract(Coarse(), tmp_path / "in", tmp_path / "emb", batch_size=3, kinds=("video",))
    assert [Path(name).name for name, _ in done.broken] == ["b.mp4"] and [Path(p).name for p, _ in postprocess(done.folder)] == ["a.mp4", "c.mp4"]
    for i in (2, 0, 1): part = extract(Coarse(), tmp_path / "in", tmp_path / "parts", batch_size=3, kinds=("video",), part=(i, 3))
    assert part.broken == done.broken and (part.folder / "video" / "video.pt").read_bytes() == (done.folder / "video" / "video.pt").read_bytes()


@pytest.mark.quick
def test_a_changed_folder_or_model_is_embedded_again(tmp_path):
    for k in range(2): scene(tmp_path / "in" / f"{k}.mp4", 3, seed=k)
    old = dict(postprocess(extract(Coarse(), tmp_path / "in", tmp_path / "emb").folder))
    scene(tmp_path / "in" / "1.mp4", 7, seed=5)
    new = dict(postprocess(extract(Coarse(), tmp_path / "in", tmp_path / "emb").folder))
    assert [len(x) for x in new.values()] == [1, 2] and torch.allclose(old[next(iter(old))], new[next(iter(old))], atol=1e-4)
    other = Coarse()
    other.v.data.neg_()
    changed = extract(other, tmp_path / "in", tmp_path / "emb")
    assert torch.allclose(postprocess(changed.folder)[0][1], -next(iter(new.values())), atol=1e-4)


def packed(path, packets):
    "An AVI of 25 pictures a second whose B-pictures share a packet with the picture they wait for, as DivX 5 wrote them."
    kind = lambda p: p[p.find(b"\0\0\1\xb6") + 4] >> 6  # 0 I, 1 P, 2 B
    for k, p in enumerate(packets):
        if (i := p.find(b"\0\0\1\xb2")) >= 0: packets[k] = p[:i] + b"\0\0\1\xb2DivX503b1393p" + p[p.find(b"\0\0\1", i + 3) :]
    out, k = [], 0
    while k < len(packets):
        both = k + 1 < len(packets) and kind(packets[k + 1]) == 2
        out += [packets[k] + packets[k + 1], b"\0\0\1\xb6\x50\x1f"] if both else [packets[k]]  # the second holds no picture
        k += 1 + both
    chunk = lambda name, b: name + struct.pack("<I", len(b)) + b + b"\0" * (len(b) % 2)
    some = lambda name, *b: chunk(b"LIST", name + b"".join(b))
    head = struct.pack("<14I", 40_000, 0, 0, 16, len(out), 0, 1, 100_000, 64, 64, 0, 0, 0, 0)
    stream = b"vidsDX50" + struct.pack("<IHHIIIIIIII4H", 0, 0, 0, 0, 1, 25, 0, len(out), 100_000, 2**32 - 1, 0, 0, 0, 64, 64)
    picture = struct.pack("<IiiHH4sIiiII", 40, 64, 64, 1, 24, b"DX50", 64 * 64 * 3, 0, 0, 0, 0)
    body = b"AVI " + some(b"hdrl", chunk(b"avih", head), some(b"strl", chunk(b"strh", stream), chunk(b"strf", picture))) + some(b"movi", *[chunk(b"00dc", p) for p in out])
    index, at = b"", 4
    for p in out:
        index += b"00dc" + struct.pack("<III", 16 if kind(p) == 0 else 0, at, len(p))
        at += 8 + len(p) + len(p) % 2
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body) + len(index) + 8) + body + chunk(b"idx1", index))


@pytest.mark.quick
def test_packed_b_pictures_come_as_they_are_shown(tmp_path):
    with av.open(str(tmp_path / "plain.avi"), "w") as c:
        s = c.add_stream("mpeg4", rate=25, options={"bf": "1"})
        s.width = s.height = 64
        s.pix_fmt, s.bit_rate, packets = "yuv420p", 2_000_000, []
        for k in range(115):
            f = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 2 * k, np.uint8), format="rgb24")
            f.pts = k
            packets += s.encode(f)
        packets += s.encode(None)
        packets = [bytes(p) for p in packets]
    packed(tmp_path / "packed.avi", packets)
    with av.open(str(tmp_path / "packed.avi")) as c: stamps = [f.pts for f in c.decode(video=0)]
    assert len(stamps) == 115 and stamps != sorted(stamps)  # or this tests nothing
    _, index = video_plan(tmp_path / "packed.avi")
    clips = [x for *_, x in video_windows(tmp_path / "packed.avi")]
    assert len(clips) == 2
    for x, pick in zip(clips, index, strict=True):
        shown = (x.mean((0, 2, 3)) * 255 / 2).numpy()
        assert np.abs(shown - pick).max() < 1.0 and (np.diff(shown) > 0).all()


def test_the_authors_command_line(tmp_path):
    from avnb.duals import DualEncoder
    from avnb.mvit import audio_tower, video_tower
    from avnb.published import save_lssd

    (tmp_path / "sample_data").mkdir()
    film(tmp_path / "sample_data" / "a.avi", "mpeg4", n=20)
    scene(tmp_path / "sample_data" / "sub" / "b.mp4", 1)
    sound(tmp_path / "sample_data" / "c.wav", 4, "pcm_s16le")
    torch.manual_seed(0)
    save_lssd(DualEncoder(video_tower("S"), audio_tower("S")), tmp_path / "B")
    command = [sys.executable, "-m", "avnb.extraction", "--cfg", "B/config.yaml"]
    run = lambda *words: subprocess.run([*command, *words], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    done = run("DATA.PATH_TO_DATA_DIR", "sample_data", "OUTPUT_DIR", "tmp")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(p, tuple(x.shape)) for p, x in postprocess(tmp_path / "tmp")] == [("sample_data/a.avi", (1, 5, 768)), ("sample_data/sub/b.mp4", (1, 5, 768))]
    assert [(p, tuple(x.shape)) for p, x in postprocess(tmp_path / "tmp", "audio")] == [("sample_data/c.wav", (1, 768)), ("sample_data/sub/b.mp4", (1, 768))]
    assert torch.equal(load_file(tmp_path / "tmp/video/video.safetensors")["embeddings"], torch.load(tmp_path / "tmp/video/video.pt", weights_only=True))
    refused = run("DATA.PATH_TO_DATA", "sample_data", "OUTPUT_DIR", "tmp")
    assert refused.returncode and "did you mean 'DATA.PATH_TO_DATA_DIR'" in refused.stderr

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
from places import workplace
from safetensors.torch import load_file

from avnb.inference import extract, postprocess
from avnb.media import VideoWriter, decode_audio, decode_frames, write_video
from avnb.windows import video_plan, video_windows

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
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
                            env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def papermill(cwd, *args):
    "Execute infer.ipynb as a person would; (process, executed notebook)."
    workplace(cwd)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--no-log-output", str(ROOT / "nbs/infer.ipynb"), "out.ipynb", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=900), cwd / "out.ipynb"


def shown(notebook):
    "All text that an executed notebook shows."
    outs = [o for c in json.loads(notebook.read_text())["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outs if o["output_type"] == "error"]
    return "\n".join("".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for o in outs)


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
    assert {Path(p).name for p in (*video, *sounds)} == good | {"k.mp4"} and list(sounds) == sorted(sounds) and list(video) == sorted(video)
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
    for k in "de":  # whole batches without one good picture
        data = bytearray(scene(tmp_path / "in" / f"{k}.mp4", 7).read_bytes())
        with av.open(str(tmp_path / "in" / f"{k}.mp4")) as c: first = next(p for p in c.demux(video=0) if p.size)
        data[first.pos : first.pos + first.size] = bytes(first.size)
        (tmp_path / "in" / f"{k}.mp4").write_bytes(data)
    alone = extract(Coarse(), tmp_path / "in", tmp_path / "alone", batch_size=1, kinds=("video",))
    assert len(alone.broken) == 3 and alone.windows == {"video": 4}
    for k in "de": (tmp_path / "in" / f"{k}.mp4").unlink()
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


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A checkpoint of size S in the authors' format, with random weights."
    from avnb.duals import DualEncoder
    from avnb.mvit import audio_tower, video_tower
    from avnb.published import save_lssd

    torch.manual_seed(0)
    return save_lssd(DualEncoder(video_tower("S"), audio_tower("S")), tmp_path_factory.mktemp("published") / "pretrained_models/B/3")


def command(cwd, cfg, *words, **more):
    "The authors' command line, in a process of its own."
    return subprocess.Popen([sys.executable, "-m", "avnb.inference", "--cfg", str(cfg), *words], cwd=cwd, env=ENVIRONMENT | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_authors_command_line(tmp_path, published):
    (tmp_path / "sample_data").mkdir()
    film(tmp_path / "sample_data" / "v_GolfSwing_g02_c01.avi", "mpeg4", n=126)  # about 5 s, as in their example
    scene(tmp_path / "sample_data" / "sub" / "b.mp4", 1)
    sound(tmp_path / "sample_data" / "c.wav", 4, "pcm_s16le")
    run = command(tmp_path, published, "DATA.PATH_TO_DATA_DIR", "sample_data", "OUTPUT_DIR", "tmp")
    said, warned = run.communicate()
    assert run.returncode == 0 and "2 windows of audio" in said and "Warning" not in warned, warned[-2000:]
    assert [(p, tuple(x.shape)) for p, x in postprocess(tmp_path / "tmp")] == [("sample_data/sub/b.mp4", (1, 5, 768)), ("sample_data/v_GolfSwing_g02_c01.avi", (2, 5, 768))]
    assert [(p, tuple(x.shape)) for p, x in postprocess(tmp_path / "tmp", "audio")] == [("sample_data/c.wav", (1, 768)), ("sample_data/sub/b.mp4", (1, 768))]
    assert {p.name for p in (tmp_path / "tmp/video").iterdir()} == {"metadata.json", "video.pt", "video.safetensors"}
    assert torch.equal(load_file(tmp_path / "tmp/video/video.safetensors")["embeddings"], torch.load(tmp_path / "tmp/video/video.pt", weights_only=True))
    runs = [command(tmp_path, published, "DATA.PATH_TO_DATA_DIR", "sample_data", "OUTPUT_DIR", "two", "TEST.BATCH_SIZE", "1", RANK=str(i), WORLD_SIZE="2") for i in range(2)]
    assert [run.wait() for run in runs] == [0, 0] and len(postprocess(tmp_path / "two", "audio")) == 2
    refused = command(tmp_path, published, "DATA.PATH_TO_DATA", "sample_data", "OUTPUT_DIR", "tmp")
    assert "did you mean 'DATA.PATH_TO_DATA_DIR'" in refused.communicate()[1] and refused.returncode


def test_infer_reads_a_config(tmp_path):
    "`papermill nbs/infer.ipynb out.ipynb -p cfg .../config.yaml`, and a run of ours; toy towers."
    from avnb.duals import DualEncoder, film_encoder, mel_encoder
    from avnb.published import save_lssd

    scene(tmp_path / "films/a.mp4", 7, ("en", "fr"))
    (tmp_path / "films/b.mp4").write_bytes(b"no film")
    torch.manual_seed(0)
    save_lssd(DualEncoder(film_encoder("mvit-toy"), mel_encoder("mvit-toy")), tmp_path / "pretrained_models/B/3")
    words = ("-p", "cfg", "pretrained_models/B/3/config.yaml", "-p", "input_dir", "films", "-p", "output_dir", "emb", "-y")
    done, out = papermill(tmp_path, *words, "{overrides: {TEST.BATCH_SIZE: 4}}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 windows a batch" in shown(out) and "left out: films/b.mp4" in shown(out) and "eng x fra: one moment" in shown(out)
    assert [(p, tuple(x.shape)) for k in ("video", "audio") for p, x in postprocess(tmp_path / "emb", k)] == [("films/a.mp4", (2, 5, 96)), ("films/a.mp4#eng", (2, 96)), ("films/a.mp4#fra", (2, 96))]
    assert (tmp_path / "emb/likeness.png").is_file()
    refused, _ = papermill(tmp_path, *words, "{overrides: {TEST.BATCH_SIZ: 4}}")
    assert refused.returncode == 1 and "did you mean 'TEST.BATCH_SIZE'" in refused.stderr
    DualEncoder(film_encoder(), mel_encoder()).save_pretrained(tmp_path / "run")
    done, out = papermill(tmp_path, "-p", "checkpoint", "run", "-p", "input_dir", "films", "-p", "kinds", "audio", "-p", "tracks", "fra")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(p, tuple(x.shape)) for p, x in postprocess(tmp_path / "run/embeddings", "audio")] == [("films/a.mp4#fra", (2, 128))]


def narrated(path, seconds=60):
    "The start of Big Buck Bunny, told in English and in German over the film's own sound."
    from avnb.real import fetch_bbb
    from avnb.voices import bank

    film = fetch_bbb(ROOT / "data/bbb")
    own, tracks = decode_audio(film, 48_000, start_s=0, dur_s=seconds), {}
    for language in ("en", "de"):
        said = [u for some in bank(language).values() for u in some if u.voice == "f1"]
        voice, at = torch.zeros(seconds * 22_050), 5_000
        for u in said:
            if at + len(u.sound) > len(voice): break
            voice[at : at + len(u.sound)] = torch.from_numpy(u.sound)
            at += len(u.sound) + 12_000
        voice = torch.nn.functional.interpolate(voice[None, None], seconds * 48_000, mode="linear")[0, 0]
        tracks[language] = (0.5 * own + voice).clamp(-1, 1)
    with VideoWriter(path, (720, 1280), 24, tracks) as w:
        for a in range(0, seconds, 4):
            for f in decode_frames(film, torch.arange(a * 24, (a + 4) * 24) / 24 + 1e-3)[0]: w.add(f)
    return path


@pytest.mark.soak
def test_a_real_film(tmp_path, published):
    "60 s of a film with two languages at size S: by notebook, struck down and started again, by two processes."
    (tmp_path / "films").mkdir()
    narrated(tmp_path / "films/bbb.mp4")
    words = lambda out: ("DATA.PATH_TO_DATA_DIR", "films", "OUTPUT_DIR", out, "TEST.BATCH_SIZE", "4")
    started = time.time()
    done, out = papermill(tmp_path, "-p", "cfg", published, "-p", "input_dir", "films", "-p", "output_dir", "whole", "-p", "precision", "no", "-y", "{overrides: {TEST.BATCH_SIZE: 4}}")
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"whole: {time.time() - started:.0f} s", shown(out), sep="\n")
    assert [(p, tuple(x.shape)) for k in ("video", "audio") for p, x in postprocess(tmp_path / "whole", k)] == \
        [("films/bbb.mp4", (20, 5, 768)), ("films/bbb.mp4#eng", (20, 768)), ("films/bbb.mp4#deu", (20, 768))]
    ranges = json.loads((tmp_path / "whole/video/metadata.json").read_text())["range"]
    assert ranges[0] == [0, 3] and ranges[19] == [pytest.approx(1439 / 24 - 3), pytest.approx(1439 / 24)]
    batches = lambda folder: sorted(p.name for p in (tmp_path / folder / ".parts").rglob("*.safetensors"))
    run = command(tmp_path, published, *words("killed"))
    try:
        while len(batches("killed")) < 2 and run.poll() is None: time.sleep(0.05)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    there = batches("killed")
    assert 2 <= len(there) < 15 and not (tmp_path / "killed/video").exists()
    print("killed after", there)
    again = command(tmp_path, published, *words("killed"))
    while len(batches("killed")) < len(there) + 1 and again.poll() is None: time.sleep(0.05)
    assert len(list((tmp_path / "killed/.parts").iterdir())) == 1  # it goes on with those that are there
    assert again.wait() == 0
    same(tmp_path / "whole", tmp_path / "killed")
    both = [command(tmp_path, published, *words("both"), RANK=str(i), WORLD_SIZE="2") for i in range(2)]
    print("two processes:", *(run.communicate()[0] for run in both), sep="\n")
    assert [run.returncode for run in both] == [0, 0]
    same(tmp_path / "whole", tmp_path / "both")

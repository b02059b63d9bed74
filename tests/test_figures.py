"""What every figure promises, on its artists and pixels; what a heat video is to a player; what a run uploads of them."""
import shutil

import av
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from places import workplace

from avnb.colours import heads_video, pca_strip, pca_view, show_heads, show_pca
from avnb.core import settings
from avnb.media import decode_audio, decode_frames, probe
from avnb.palette import EYES, HEAD_COLOURS, PALETTE, differences, heat_colours, lab, seen_by
from avnb.plots import confusion, embedding_map, gallery, interval_plot, paired_differences
from avnb.viz import heat_video, loss_curves, save_figure, schedule_curves, show_heat, similarity_timeline, snapshot_row

matplotlib.use("agg")
G = torch.Generator().manual_seed(0)
FRAME = torch.rand(3, 64, 80, generator=G) * .3 + .35
ROWS = [dict(step=i + 1, loss=3 * .99**i, lr=1e-3 * min(1, (i + 1) / 10) * .99**i, scale=14 + i / 9, grad_norm=1 + i % 3) for i in range(60)]


def told(v): return {"value": v, "lo": v - .1, "hi": v + .1, "n": 9}


FIGURES = {
    "show_heat": lambda: show_heat(FRAME, torch.randn(4, 5, generator=G), title="a title").figure,
    "snapshot_row": lambda: snapshot_row(FRAME.expand(3, -1, -1, -1), torch.randn(3, 4, 5, generator=G), ["a", "b", "c"]),
    "similarity_timeline": lambda: similarity_timeline(torch.randn(2, 50, generator=G), torch.randn(16_000, generator=G) * .1, labels=["dog", "bell"], title="a title"),
    "loss_curves": lambda: loss_curves(ROWS, ("loss", "grad_norm"), chance=3.),
    "schedule_curves": lambda: schedule_curves(ROWS, ("lr", "scale"), marks={20: "audio tower learns"}),
    "show_pca": lambda: show_pca(FRAME[None], *(x[None] for x in pca_view(torch.randn(4, 5, 8, generator=G), torch.randn(50, 8, generator=G))), torch.randn(1, 16_000, generator=G)),
    "pca_strip": lambda: pca_strip(torch.randn(50, 8, generator=G), torch.randn(16_000, generator=G) * .1, title="a title").figure,
    "confusion": lambda: confusion(list("abcab"), list("abbab")).figure,
    "embedding_map": lambda: embedding_map(torch.randn(20, 5, generator=G), list("ab") * 10).figure,
    "interval_plot": lambda: interval_plot({"model": {"R@1": told(.6)}, "chance": {"R@1": told(.1)}}).figure,
    "paired_differences": lambda: paired_differences({"R@1": np.arange(9.)}, {"R@1": np.ones(9)}).figure,
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.quick
@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_that_has_ticks_has_a_label_and_a_unit(name):
    "Words in brackets are the unit; what has no ticks (pictures) or is named by its ticks (classes, figures) needs none."
    fig = FIGURES[name]()
    fig.canvas.draw()
    shown = [ax for ax in fig.axes if ax.axison]
    below = {}
    for ax in shown:  # of panels that share an axis, the lowest is the labelled one
        key = id(ax._sharex) if ax._sharex else id(ax)
        below[key] = min((below[key], ax) if key in below else (ax,), key=lambda a: a.get_position().y0)
    assert any(text for ax in fig.axes for text in (ax.get_xlabel(), ax.get_ylabel())), "no axis and no scale says what it shows"
    for ax in shown:
        worded = lambda ticks: any(t.get_text() and not any(c.isdigit() for c in t.get_text()[:2]) and "−" not in t.get_text()[:1] for t in ticks)
        for axis, label, ticks in (("x", ax.get_xlabel(), ax.get_xticklabels()), ("y", ax.get_ylabel(), ax.get_yticklabels())):
            if axis == "x" and ax not in below.values(): continue
            if not [t for t in ticks if t.get_text()] or worded(ticks): continue
            assert label, f"{name}: the {axis} axis has numbers and no name"
            assert "(" in label or label in ("optimizer step", "similarity", "share of the row"), f"{name}: no unit in {label!r}"


@pytest.mark.quick
@pytest.mark.parametrize("name", ["loss_curves", "schedule_curves", "confusion", "embedding_map", "paired_differences"])
def test_titles_say_what_was_found(name):
    titles = [ax.get_title() for ax in FIGURES[name]().axes if ax.get_xlabel()]
    assert titles and all(any(c.isdigit() for c in t) for t in titles), titles


@pytest.mark.quick
def test_panels_and_their_colour_bar_share_one_scale():
    heats = torch.stack([k * torch.ones(4, 5) for k in (.9, -.3, .01)])
    fig = snapshot_row(FRAME.expand(3, -1, -1, -1), heats)
    *panels, bar = fig.axes
    limits = [ax.images[1].get_clim() for ax in panels]
    assert limits == [limits[0]] * 3 and np.allclose(limits[0], (-.9, .9))
    assert np.allclose(bar.get_ylim(), limits[0]) and [t.get_text() for t in bar.get_yticklabels()] == ["−0.9", "0", "0.9"]
    assert bar.get_ylabel() == "similarity"


def pixels(fig):
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[..., :3].astype(float)


@pytest.mark.quick
def test_the_negative_patch_is_the_coldest_place_of_the_drawn_figure():
    heat = torch.full((7, 7), .1)
    heat[2, 5] = -.8
    fig, ax = plt.subplots(figsize=(4, 4), dpi=70)
    show_heat(torch.full((3, 70, 70), .5), heat, ax, colorbar=False)
    x = pixels(fig)
    row, column = np.unravel_index((x[..., 2] - x[..., 0]).argmax(), x.shape[:2])
    at = ax.transData.inverted().transform((column, x.shape[0] - row))
    assert np.allclose(at, (55, 25), atol=5), f"the bluest pixel is at {at}, the patch at (55, 25)"
    warmest = np.unravel_index((x[..., 0] - x[..., 2]).argmax(), x.shape[:2])
    assert x[warmest][0] > x[warmest][2]


@pytest.mark.quick
def test_silence_is_drawn_below_a_twentieth_of_the_scale():
    "Beside a loud moment, a silent one keeps the picture: no pixel moves by 5 % of what the loud one moves it."
    heats = torch.stack([torch.full((4, 4), .8), torch.full((4, 4), .01), torch.zeros(4, 4)])
    grey = torch.full((3, 64, 64), .5)
    drawn = [np.asarray(ax.images[1].to_rgba(ax.images[1].get_array())) for ax in snapshot_row(grey.expand(3, -1, -1, -1), heats).axes[:3]]
    added = [(x[..., :3] * x[..., 3:]).max() for x in drawn]
    assert added[1] < .05 * added[0] and added[2] == 0


@pytest.mark.quick
@pytest.mark.parametrize("eye", EYES)
def test_colours_stay_apart_for_every_eye(eye):
    "CIE 1976 distances under the matrices of Machado, Oliveira and Fernandes (2009)."
    apart = lambda colours: differences(colours, eye)[np.triu_indices(len(colours), 1)].min()
    assert apart(PALETTE) > 20 and apart(HEAD_COLOURS[:2]) > 60 and apart(HEAD_COLOURS) > 20
    scale = heat_colours(1.)
    assert apart([scale(0)[:3], scale(512)[:3]]) > 60


@pytest.mark.quick
def test_colours_stay_apart_on_grey_paper():
    lightness = lab(np.array([to_rgb(c) for c in PALETTE]))[:, 0]
    assert np.diff(np.sort(lightness)).min() > 10
    grey = lab(seen_by(np.array([heat_colours()(i)[:3] for i in (0, 512)])))[:, 0]
    assert grey[0] < grey[1] - 10  # the cold end is the darker one


@pytest.mark.quick
def test_other_inputs_of_the_figures(tmp_path):
    picture = torch.rand(3, 20, 30, generator=G)
    fig = gallery([picture, torch.randn(8_000, generator=G) * .1, "bell"], [[picture, picture]] * 3, [[1, 0], [0, 1], [0, 0]])
    assert fig.get_suptitle() == "1 of 3 right at first, 2 of 3 among the first 2"
    assert [ax.get_title()[0] for ax in fig.axes if ax.get_title() != "asked" and ax.get_title()] == ["✓", "✗", "✗", "✓", "✗", "✗"]
    assert len(show_heads(FRAME, torch.rand(2, 4, 5, generator=G)).get_legend().get_texts()) == 2
    assert save_figure(fig, "one", "A caption.", tmp_path).stat().st_size > 1000 and (tmp_path / "one.txt").read_text() == "A caption.\n"


# heat videos

def clip(dur_s=3., hz=50, rate_hz=16_000):
    "A warm spot that moves while noise sounds, then silence."
    t = torch.arange(int(dur_s * hz)) / hz
    x = torch.arange(8.)
    heat = torch.exp(-((x[None] - 7 * t[:, None] / dur_s)**2))[:, None].expand(-1, 6, -1).clone()
    sound = torch.randn(int(dur_s * rate_hz), generator=torch.Generator().manual_seed(1)) * .1
    sound = torch.nn.functional.avg_pool1d(sound[None], 9, 1, 4)[0] * 2
    sound[int(.8 * len(sound)):] = 0
    return torch.full((4, 3, 90, 120), .5), heat, sound


def facts(path):
    "What a player is told, by PyAV."
    with av.open(str(path)) as c:
        v, a = c.streams.video[0], c.streams.audio[0]
        return {"video": v.codec_context.name, "pixels": v.codec_context.pix_fmt, "audio": a.codec_context.name, "rate": v.average_rate, "frames": v.frames,
                "video_s": float(v.duration * v.time_base), "audio_s": float(a.duration * a.time_base)}


def same_sound(a, b):
    "Of b, the share of a's energy that is off, at the best lag of at most 50 ms; and that lag in samples."
    n = min(len(a), len(b))
    spectrum = torch.fft.rfft(a[:n], 2 * n) * torch.fft.rfft(b[:n], 2 * n).conj()
    peak = torch.fft.irfft(spectrum)
    peak = torch.cat([peak[-800:], peak[:801]])
    return float((a[:n] - b[:n]).square().sum() / b[:n].square().sum()), int(peak.argmax()) - 800


@pytest.mark.parametrize("fps", [25, 50])
def test_a_heat_video_is_what_players_expect_and_in_step(tmp_path, fps):
    dur_s = 1.97
    frames, heat, sound = clip(dur_s)
    path = heat_video(frames, heat, sound, tmp_path / "a.mp4", fps=fps, timeline=True)
    f = facts(path)
    assert (f["video"].removeprefix("lib"), f["pixels"], f["audio"], f["rate"]) in (("h264", "yuv420p", "aac", fps), ("x264", "yuv420p", "aac", fps))
    assert abs(f["video_s"] - dur_s) <= 1 / fps + 1e-6 and abs(f["audio_s"] - dur_s) <= 1 / fps + 1024 / 16_000
    heard = decode_audio(path)
    off, lag = same_sound(heard, sound)
    assert lag == 0 and off < .02, (off, lag)
    shown, times = decode_frames(path)
    assert np.allclose(times, np.arange(len(shown)) / fps, atol=1e-3)
    k = 336 / 90
    warm = (shown[:, 0].float() - shown[:, 2].float())[:, 60:200, :int(120 * k)].mean(1)
    t = times + .5 / fps
    seen = (t > .2 * dur_s) & (t < .75 * dur_s)
    weight = (warm - .5 * warm.amax(1, keepdim=True)).clamp(min=0)[seen]
    where = (weight * torch.arange(warm.shape[1])).sum(1) / weight.sum(1) / (120 * k)
    assert np.allclose(where, (7 * t[seen] / dur_s + .5) / 8, atol=.02)  # the spot is where its token puts it, picture by picture
    assert warm[times > .85 * dur_s].max() < .05 * warm.max()          # and gone in silence


def test_the_strips_follow_the_curves_and_any_length_goes(tmp_path):
    frames, heat, sound = clip(1.)
    half = heat * (torch.arange(50) < 25).float()[:, None, None]
    shown, _ = decode_frames(heat_video(frames, half, sound, tmp_path / "a.mp4", timeline=True))
    bare, _ = decode_frames(heat_video(frames, half, sound, tmp_path / "b.mp4"))
    assert shown.shape[-2] - bare.shape[-2] == 44 and shown.shape[-1] == bare.shape[-1]
    strip = shown[-1, :, 336 + 3:336 + 36].float()  # the last picture: all played
    orange = (strip[0] - strip[2]).clamp(min=0)[:, :440].mean(0)
    assert orange[20:200].min() > 100 and orange[240:].max() < 40
    short = heat_video(frames, heat[:1], sound[:320], tmp_path / "c.mp4")
    assert facts(short)["frames"] == 1
    heads = heads_video(frames, torch.stack([heat, heat.flip(-1), heat.flip(0), heat * 0]), sound, tmp_path / "d.mp4", names="abcd", fps=50)
    assert facts(heads)["frames"] == 50 and facts(heads)["pixels"] == "yuv420p"


def played(path, tmp_path):
    "What Chromium's own player says and shows of a file: its facts, how far the clock went, and how much the picture changed."
    chromium = shutil.which("chromium")
    api = pytest.importorskip("playwright.sync_api")
    if not chromium: pytest.skip("chromium is not installed (apt install chromium): the file was not played in a browser")
    (tmp_path / "page.html").write_text(f'<video src="{path.name}" muted playsinline style="width:640px"></video>')
    look = """() => { const v = document.querySelector("video"), c = document.createElement("canvas"); c.width = 160; c.height = 120;
        const x = c.getContext("2d"); x.drawImage(v, 0, 0, 160, 120); return Array.from(x.getImageData(0, 0, 160, 120).data); }"""
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--allow-file-access-from-files", "--autoplay-policy=no-user-gesture-required"])
        try:
            page = browser.new_page()
            page.goto((tmp_path / "page.html").as_uri())
            page.wait_for_function("document.querySelector('video').readyState >= 3 || document.querySelector('video').error", timeout=20_000)
            page.evaluate("() => document.querySelector('video').play()")
            page.wait_for_function("document.querySelector('video').currentTime > .2", timeout=20_000)
            first = page.evaluate(look)
            page.wait_for_function("document.querySelector('video').currentTime > .9", timeout=20_000)
            last = page.evaluate(look)
            facts = page.evaluate("""() => { const v = document.querySelector("video"); return {w: v.videoWidth, h: v.videoHeight, s: v.duration, error: v.error && v.error.message,
                sound: v.webkitAudioDecodedByteCount, t: v.currentTime}; }""")
        finally: browser.close()
    return facts, float(np.abs(np.subtract(first, last)).mean())


def test_a_heat_video_plays_in_chromium(tmp_path):
    frames, heat, sound = clip(2.)
    path = heat_video(frames, heat, sound, tmp_path / "a.mp4", timeline=True)
    found, changed = played(path, tmp_path)
    info = probe(path)
    assert found["error"] is None and (found["w"], found["h"]) == (info.width, info.height)
    assert abs(found["s"] - 2) <= .04 + 1024 / 16_000 and found["sound"] > 0 and changed > 1


@pytest.mark.soak
def test_ten_seconds_of_bbb(tmp_path):
    from avnb.encoders import audio_encoder, image_encoder
    from avnb.heat import draw_heat, heat_map
    from avnb.models import DenseAligner
    film = settings().data / "bbb" / "bbb.mp4"
    if not film.is_file(): pytest.skip(f"{film} is not there; `fetch_bbb()` of avnb.real fetches it")
    torch.manual_seed(0)
    model = DenseAligner(audio_encoder("toy"), image_encoder("toy"), 64, "cosine", "linear").eval()
    h = heat_map(model, film, start_s=60., dur_s=10.)
    path = draw_heat(h, tmp_path / "bbb.mp4")
    f = facts(path)
    assert f["frames"] == 250 and abs(f["video_s"] - 10) < .04 and abs(f["audio_s"] - 10) < .04 + 1024 / 16_000 and f["pixels"] == "yuv420p"
    off, lag = same_sound(decode_audio(path), decode_audio(film, start_s=60., dur_s=10.))
    assert lag == 0 and off < .05, (off, lag)
    found, changed = played(path, tmp_path)
    assert found["error"] is None and changed > 1


# the hooks of a run

def test_a_watched_run_uploads_each_figure_once(tmp_path, monkeypatch):
    from avnb.recipes import recipe
    from avnb.store import prepare
    from avnb.toy import make_toy
    from avnb.training import fit
    monkeypatch.chdir(workplace(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    chosen = {"train.batch_size": 2, "train.val_every": 100, "store.fps": 2, "store.workers": 0, "train.draw_every": 2, "train.draw_n": 2}
    made = lambda data: recipe("grounding", data=data, steps=4, save_every=2, overrides=chosen)
    prepare(make_toy(tmp_path / "videos", 4, languages=("en",), workers=1), tmp_path / "store", recipe=made(tmp_path / "videos"))
    out, r = tmp_path / "run", made(tmp_path / "store")
    fit(r, out, wandb={"mode": "offline", "project": "figures"})
    sent = lambda: sorted(p.name for p in out.glob("wandb/offline-run-*/files/media/*/snapshots/*"))
    steps = sorted(p.name for p in (out / "snapshots").iterdir())
    assert steps == ["step_00000002", "step_00000004"]
    drawn = [p for step in steps for p in (out / "snapshots" / step).iterdir() if p.suffix in (".png", ".mp4")]
    assert len(drawn) == len(sent()) == 2 * (1 + 2), sent()  # a figure and two films a step, each sent once
    rows = [[p.name for p in sorted((out / "snapshots" / step).glob("row_*.mp4"))] for step in steps]
    assert rows[0] == rows[1]                                # the same clips each time
    shutil.rmtree(out / "checkpoints" / "step_00000004")     # as if it had been killed just after drawing
    fit(r, out, wandb={"mode": "offline", "project": "figures"})
    assert len(sent()) == 2 * (1 + 2), f"sent again: {sent()}"

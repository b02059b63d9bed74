"""The browsers as a person meets them: a real JupyterLab on loopback, in a real Chromium."""
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from browser import MISSING, ROOT, Lab, Notebook, chromium, opened  # noqa: E402

needs_chromium = pytest.mark.skipif(chromium() is None, reason=MISSING)
ATTENTION, PROBES = ".avnb-attention", ".avnb-probes"


@pytest.fixture(scope="module")
def lab():
    with Lab("browse_attention.ipynb", "browse_probes.ipynb") as lab: yield lab


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        b = opened(play)
        yield b
        b.close()


@pytest.fixture(scope="module")
def clip(lab, browser):
    n = Notebook(lab, browser, "browse_attention.ipynb")
    n.took = n.run_all(f"{ATTENTION}[data-drawn]")
    yield n
    n.close()


@pytest.fixture(scope="module")
def probes(lab, browser):
    n = Notebook(lab, browser, "browse_probes.ipynb")
    n.took = n.run_all(f"{PROBES}[data-drawn]")
    yield n
    n.close()


@pytest.fixture(scope="module")
def truth():
    from avnb.bundled import bundled_truth
    return bundled_truth()


def part(n, selector): return n.page.locator(f"{ATTENTION} {selector}").first

def js(n, code, selector=ATTENTION): return n.page.locator(selector).first.evaluate(f"(root) => {code}")

def until(n, code, selector=ATTENTION, seconds=8):
    "Until the page says so: no sleep is long enough on a machine that does something else, and most are too long on one that does not."
    from playwright.sync_api import TimeoutError
    try: n.page.wait_for_function(f"(() => {{ const root = document.querySelector('{selector}'); return {code}; }})()", timeout=1000*seconds)
    except TimeoutError: raise AssertionError(f"not so after {seconds} s: {code}\nthere: {js(n, '[{...root.dataset}, root.avnb.time?.(), root.innerText]', selector)}") from None

def frames(n, selector=ATTENTION): js(n, "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))", selector)

SUM = "((c) => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].reduce((s, v, i) => (s + v*(i % 9973)) % 2147483647, 0))(root.querySelector('.avnb-overlay'))"

def pixels(n): frames(n); return js(n, SUM)

def middle(truth, label, frame=0):
    "Centre of an object, as fractions of the picture."
    y, x = np.argwhere(truth["labels"][frame] == label).mean(0) + .5
    return x/truth["labels"].shape[2], y/truth["labels"].shape[1]

def click_picture(n, x, y):
    part(n, ".avnb-stage").scroll_into_view_if_needed()
    box = part(n, ".avnb-stage").bounding_box()
    n.page.mouse.click(box["x"] + x*box["width"], box["y"] + y*box["height"])

def line_x(n, t):
    "Where on the page a time of the curve lies."
    part(n, ".avnb-line").scroll_into_view_if_needed()
    box, dur = part(n, ".avnb-line").bounding_box(), 8.
    return box["x"] + 46 + t/dur*(box["width"] - 56), box["y"] + 40

def brush(n, a, b):
    x0, y = line_x(n, a); x1, _ = line_x(n, b)
    n.page.mouse.move(x0, y); n.page.mouse.down(); n.page.mouse.move((x0 + x1)/2, y, steps=3); n.page.mouse.move(x1, y, steps=3); n.page.mouse.up()

def fresh(n):
    n.python("b.playing = False; b.region = b.span = None; b.language, b.head, b.opacity, b.time_s = 'en', 'all', .8, 0.")
    until(n, """root.avnb.time() === 0 && root.dataset.token === '0' && !root.dataset.heard && root.querySelector('.avnb-region').hidden && root.querySelector('.avnb-clear').hidden
        && root.querySelector('.avnb-clock').textContent === '0.00 s' && root.querySelector('.avnb-opacity input').value === '0.8' && root.avnb.curves().length === 2
        && root.querySelector('[data-value=en]').ariaPressed === 'true'""")
    assert n.wait_python("b.time_s == 0 and not b.playing and b.region is None and b.span is None")


@needs_chromium
def test_clip_runs_and_appears(clip):
    assert clip.failed() == []
    assert clip.took < 20, f"{clip.took:.1f} s from Run All to the first draw"   # 10 s on a machine that does nothing else
    print(f"first draw {clip.took:.1f} s after Run All")


@needs_chromium
def test_heat_follows_the_sound(clip):
    """Each frame that is drawn while the clip plays is the heat of its moment, to half a step, and looks as when the clip stands there.

    Most of the clip is silent, and there nothing is drawn: what is asked is whether the heat is right, not whether it moves.
    """
    from avnb.bundled import bundled_clip
    from avnb.clips import heard
    fresh(clip)
    part(clip, ".avnb-play").click()
    looks = js(clip, """new Promise((done) => {
        const out = [], begun = performance.now(), look = () => {
            const t = root.avnb.time(), film = root.avnb.video.currentTime, on = root.querySelector('.avnb-play').ariaLabel === 'pause';
            if (!on || performance.now() - begun > 20000) return done(out);
            out.push({ t, film, token: +root.dataset.token, sum: %s, map: [...root.avnb.map()] });
            t - out[0].t > 1.2 && new Set(out.map((o) => o.sum)).size > 6 ? done(out) : requestAnimationFrame(look);
        };
        requestAnimationFrame(look);
    })""" % SUM)
    assert part(clip, ".avnb-play").get_attribute("aria-label") == "pause"
    part(clip, ".avnb-play").click()
    stopped = js(clip, "root.avnb.time()")
    assert clip.wait_python("not b.playing and abs(b.time_s - %f) < .01" % stopped)
    times, films, tokens = (np.array([o[k] for o in looks]) for k in ("t", "film", "token"))
    assert len({o["sum"] for o in looks}) > 6, "the overlay stands still while the clip plays"
    assert (np.diff(times) >= 0).all() and (np.diff(tokens) >= 0).all() and times[-1] - times[0] > .6
    assert np.median(np.abs(films - times)) < .35 and np.median(np.abs(tokens/50 - times)) < .05, (films - times, tokens/50 - times)
    step = json.loads(clip.python("print(b.facts['step'])"))
    heat = heard(bundled_clip())["en"].amax(0).numpy()   # the stronger head of each place, nothing where nothing is heard
    for o in looks: assert np.abs(np.array(o["map"]) - heat[o["token"]].ravel()).max() <= .51*step
    silent = [o for o in looks if not heat[o["token"]].any()]
    assert all(o["sum"] == 0 for o in silent)
    shown = list({o["sum"]: o for o in looks}.values())
    for o in shown[::max(1, len(shown)//8)]:
        clip.python(f"b.time_s = {(o['token'] + .5)/50}"); until(clip, f"root.dataset.token === '{o['token']}'")
        assert pixels(clip) == o["sum"]


@needs_chromium
def test_sound_plays_on(clip):
    "While it plays the page tells Python the time, twice a second, and the sound does not begin anew for that."
    fresh(clip)
    js(clip, "{ const P = AudioBufferSourceNode.prototype, start = P.start; window.starts = []; P.start = function (...a) { window.starts.push(a.slice(1)); return start.apply(this, a); }; return true; }")
    part(clip, ".avnb-play").click()
    until(clip, "root.avnb.time() > 2.2", seconds=20)
    assert clip.wait_python("b.playing and b.time_s > 1")
    assert js(clip, "window.starts.length") == 1
    clip.python("b.span = (3., 7.9)"); until(clip, "!root.querySelector('.avnb-clear').hidden"); until(clip, "window.starts.length > 1 || root.avnb.time() > 6")
    assert [3 <= x < 6 for x, in js(clip, "window.starts.slice(1)")] == [True]   # a span is heard from its begin, though Python chose it while the clip played
    part(clip, ".avnb-play").click()
    assert clip.wait_python("not b.playing")


def stands(n, at):
    "The clip stands at this time on both sides, and all that was on its way has come."
    until(n, f"root.querySelector('.avnb-play').ariaLabel === 'play' && root.avnb.time() === {at!r} && Math.abs(root.avnb.video.currentTime - {at!r}) < .005"); n.page.wait_for_timeout(600)
    page, there = js(n, "root.avnb.time()"), n.wait_python(f"b.time_s == {at!r} and not b.playing")
    assert page == at and there and js(n, "root.avnb.time()") == at, (page, n.python("print(b.time_s, b.playing)"), js(n, "root.avnb.time()"))


@needs_chromium
def test_python_stops_it_where_it_says(clip):
    "What Python says last holds on both sides, though the page has a time of its own to tell when it stops."
    for code in ("b.playing = False; b.time_s = 5.5", "b.time_s = 5.5; b.playing = False"):
        fresh(clip)
        clip.python("b.playing = True"); until(clip, "root.avnb.time() > .2")
        begun = time.monotonic()
        clip.python(code); until(clip, "root.querySelector('.avnb-play').ariaLabel === 'play'")
        near = time.monotonic() - begun if code.endswith("False") else 1e-6   # it plays on from there until it is stopped
        clip.page.wait_for_timeout(600)                    # whatever is on its way has come
        page = js(clip, "root.avnb.time()")
        assert -1e-6 < page - 5.5 < near and clip.wait_python(f"abs(b.time_s - {page!r}) < 1e-6"), (code, page, clip.python("print(b.time_s)"))
    fresh(clip)
    clip.python("b.playing = True"); until(clip, "root.avnb.time() > .2")
    clip.python("import time; time.sleep(1.7); b.playing = False; b.time_s = 5.; time.sleep(1.3)")   # busy, while the page tells it the time
    stands(clip, 5.)
    clip.python("b.time_s = 6.; b.time_s = 0.; b.time_s = 5.; b.time_s = 0.")
    stands(clip, 0.)
    clip.python("b.playing = True; b.time_s = 3."); until(clip, "root.avnb.time() > 3.6")
    clip.python("b.playing = False"); until(clip, "root.querySelector('.avnb-play').ariaLabel === 'play'")
    there = js(clip, "root.avnb.time()"); stands(clip, there)
    clip.python("kept = b.time_s; b.time_s = 1."); clip.python("b.time_s = 2."); clip.python("b.time_s = kept")   # a time that the clock told may be said, too
    stands(clip, there)
    clip.python("for k in range(40): b.playing = k % 2 == 0\nb.opacity = .5")   # faster than the page answers
    until(clip, "root.querySelector('.avnb-opacity input').value === '0.5'"); clip.page.wait_for_timeout(600)
    assert js(clip, "root.querySelector('.avnb-play').ariaLabel") == "play" and clip.wait_python("not b.playing")
    clip.python("b.time_s = 7.2; b.playing = True"); until(clip, "root.avnb.time() > 7.2 && root.avnb.time() < 8")
    clip.python("time.sleep(2); b.playing = False; b.time_s = 0.; b.playing = True")   # the clip ended while Python was busy
    until(clip, "root.avnb.time() > .8 && root.avnb.time() < 7")
    assert js(clip, "root.querySelector('.avnb-play').ariaLabel") == "pause" and clip.wait_python("b.playing and b.time_s > .5")


@needs_chromium
@pytest.mark.parametrize("order", [1, -1])
def test_one_message_is_one_word(clip, order):
    "What Python says in one message holds whole, whatever its order (ipywidgets holds a set) and however fast a clock ticks."
    def together(**said): clip.python("with b.hold_sync():\n    " + "\n    ".join(f"b.{k} = {v!r}" for k, v in said.items()) + f"\n    b._states_to_send.clear()\nb.send_state({list(said)[::order]})")
    def plays(at): clip.python("b.playing = True"); until(clip, f"root.avnb.time() > {at}")
    fresh(clip)
    js(clip, "{ const now = performance.now.bind(performance); let k = 0; performance.now = () => now() + k++; window.untick = () => { const far = k; performance.now = () => now() + far; }; return true; }")
    try:
        plays(.2); together(playing=False, time_s=1.5); stands(clip, 1.5)
        together(span=(4., 5.), time_s=4.25); stands(clip, 4.25)
        plays(4.3); together(playing=False, span=None, time_s=2.); stands(clip, 2.)
        together(playing=True, time_s=6.); until(clip, "root.avnb.time() > 6", seconds=4)
        clip.python("b.playing = False"); until(clip, "root.querySelector('.avnb-play').ariaLabel === 'play'")
        assert clip.wait_python("abs(b.time_s - %r) < 1e-6" % js(clip, "root.avnb.time()"))   # the page has told where it stopped, and will tell no more
        together(playing=True, span=(4., 5.)); until(clip, "root.avnb.time() > 4 && root.avnb.time() < 5", seconds=4)
    finally: js(clip, "window.untick()")


@needs_chromium
def test_another_widget_moves_it(clip):
    "A slider that is linked in the page is another's word: it is not taken for an echo of the clip's own times."
    fresh(clip)
    clip.python("import ipywidgets; s = ipywidgets.FloatSlider(max=8., step=.001); link = ipywidgets.jslink((b, 'time_s'), (s, 'value'))")
    part(clip, ".avnb-play").click(); until(clip, "root.avnb.time() > .8"); part(clip, ".avnb-play").click()
    assert clip.wait_python("not b.playing and s.value > .7 and abs(s.value - b.time_s) < .01")
    for t in (3., 0., 5., 3., 0.): clip.python(f"s.value = {t}"); stands(clip, t)
    clip.python("b.time_s = 6."); stands(clip, 6.)
    assert clip.wait_python("s.value == 6")
    clip.python("link.unlink(); s.close()")


@needs_chromium
def test_click_answers_when_it_sounds(clip, truth):
    fresh(clip)
    for label, name in ((1, "dog"), (2, "siren")):
        before = clip.python("print(b.region)")
        click_picture(clip, *middle(truth, label))
        curve = np.max([c["y"] for c in js(clip, "root.avnb.curves()")], 0)
        peak = (curve.argmax() + .5)/50
        assert any(a - .1 <= peak <= b + .1 for a, b, n in truth["spans"] if n == name), (name, peak)
        assert clip.wait_python(f"b.region is not None and str(b.region) != {before!r}")
    # what the page computes from bytes is what Python computes from the arrays, to half a step a place
    clip.python("b.head = b.clip.heads[0]"); until(clip, "root.avnb.curves().length === 1")
    exact, step = json.loads(clip.python("import json; print(json.dumps([b.curve().tolist(), b.facts['step']]))"))
    assert np.abs(np.array(js(clip, "root.avnb.curves()")[0]["y"]) - exact).max() <= .51*step
    # a hand that goes straight down still marks a region
    part(clip, ".avnb-stage").scroll_into_view_if_needed()
    box = part(clip, ".avnb-stage").bounding_box()
    x, y = round(box["x"] + .3*box["width"]), box["y"] + .3*box["height"]
    clip.page.mouse.move(x, y); clip.page.mouse.down(); clip.page.mouse.move(x, y + .4*box["height"], steps=4); clip.page.mouse.up()
    assert clip.wait_python("b.region is not None and b.region[2] - b.region[0] > 1/15 and b.region[3] - b.region[1] > .4")


@needs_chromium
def test_brush_shows_where(clip, truth):
    fresh(clip)
    a, b, _ = max((s for s in truth["spans"] if s[2] == "siren"), key=lambda s: s[1] - s[0])
    brush(clip, a + .05, b - .05)
    assert clip.wait_python("b.span is not None")
    span = json.loads(clip.python("print(list(b.span))"))
    assert abs(span[0] - a - .05) < .06 and abs(span[1] - b + .05) < .06
    until(clip, f"root.querySelector('.avnb-clock').textContent === 'mean ' + ({span[0]!r}).toFixed(2) + ' to ' + ({span[1]!r}).toFixed(2) + ' s'"); frames(clip)
    shown = np.array(list(js(clip, "[...root.avnb.map()]"))).reshape(14, 14)
    i, j = divmod(int(shown.argmax()), 14)
    mask = truth["labels"][int((a + b)/2*truth["labels_fps"])] == 2
    inside = mask.reshape(14, 8, 14, 8).mean((1, 3))[max(i - 1, 0):i + 2, max(j - 1, 0):j + 2]
    assert mask.reshape(14, 8, 14, 8).any((1, 3))[i, j], (i, j, inside.max())
    drawn = js(clip, "{ const c = root.querySelector('.avnb-overlay'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let best = 0, at = 0; for (let p = 0; p < d.length; p += 4) { const warm = (d[p] - d[p + 2])*d[p + 3]; if (warm > best) { best = warm; at = p/4; } } return [at % c.width/c.width, Math.floor(at/c.width)/c.height]; }")
    assert mask[min(int(drawn[1]*112), 111), min(int(drawn[0]*112), 111)], drawn   # the warmest pixel of the canvas lies on the siren


@needs_chromium
def test_track_changes_what_is_heard(clip, truth):
    fresh(clip)
    a, b, _ = truth["words"]["en"][1]   # nothing else sounds near it
    heard = {}
    for language in ("en", "zxx"):
        part(clip, f'button[data-value="{language}"]').click()
        assert clip.wait_python(f"b.language == '{language}'")
        clip.python(f"b.time_s, b.span = {a}, ({a}, {b})"); until(clip, f"root.querySelector('.avnb-clock').textContent.startsWith('mean {a:.2f} to')")
        part(clip, ".avnb-play").click()   # a span is played again and again
        clip.page.wait_for_function(f"document.querySelector('{ATTENTION}').dataset.heard === '{language}'", timeout=5000)
        looks = js(clip, f"new Promise((done) => {{ const out = [], begun = performance.now(), id = setInterval(() => {{ out.push([root.avnb.time(), root.avnb.level()]); const on = performance.now() - begun; if (on > 15000 || on > 1200 && out.filter(([t]) => t > {a + .06} && t < {b}).length > 20) {{ clearInterval(id); done(out); }} }}, 8); }})")
        heard[language] = max(level for t, level in looks if a + .06 < t < b)
        part(clip, ".avnb-play").click()
    print("level at the word:", heard)
    assert heard["en"] > 10*heard["zxx"] and heard["en"] > .01   # the word is heard, and gone where nothing is said
    maps = [json.loads(clip.python(f"import json; b.language, b.span, b.time_s = '{k}', None, {a + .1}; print(json.dumps(float(b.map().abs().max())))")) for k in ("en", "zxx")]
    assert maps[1] == 0 < maps[0]                                # and where nothing is heard, nothing is drawn


@needs_chromium
def test_scrubbing_stays_in_the_page(clip):
    fresh(clip); clip.page.wait_for_timeout(300)   # what is still on its way to the kernel leaves first
    part(clip, ".avnb-scrub").scroll_into_view_if_needed()
    box = part(clip, ".avnb-scrub").bounding_box()
    clip.page.mouse.move(box["x"] + 8, box["y"] + box["height"]/2); clip.page.mouse.down()
    clip.page.wait_for_timeout(100)
    before, seen, looks = len(clip.sent), set(), []
    for k in range(30):
        clip.page.mouse.move(box["x"] + 8 + k*(box["width"] - 16)/40, box["y"] + box["height"]/2)
        seen.add(pixels(clip)); looks.append(js(clip, "+root.dataset.token"))
    during = len(clip.sent) - before
    clip.page.mouse.up()
    assert len(set(looks)) > 15 and len(seen) > 5
    assert during == 0, f"{during} messages went to the kernel while scrubbing"
    assert clip.wait_python("b.time_s > 3")


@needs_chromium
def test_keys(clip):
    fresh(clip)
    part(clip, ".avnb-stage").focus()
    clip.page.keyboard.press("ArrowRight"); clip.page.keyboard.press("Shift+ArrowRight")
    assert clip.wait_python("abs(b.time_s - 1.1) < .02")
    clip.python("b.time_s = 2.5"); until(clip, "root.dataset.token === '125'")
    shown = pixels(clip); clip.page.keyboard.press("h")
    assert pixels(clip) == 0 != shown
    clip.page.keyboard.press("h")
    clip.page.keyboard.press("Space")
    assert clip.wait_python("b.playing")
    clip.page.keyboard.press("Space")
    assert clip.wait_python("not b.playing")
    clip.python("b.region = (.1, .1, .3, .3)"); until(clip, "!root.querySelector('.avnb-region').hidden")
    clip.page.keyboard.press("Escape")
    assert clip.wait_python("b.region is None")


@needs_chromium
def test_python_and_page_agree(clip):
    fresh(clip)
    clip.python("b.time_s, b.region, b.span, b.opacity, b.language, b.head = 4.25, (.25, .5, .5, .75), (4., 5.), .35, 'fr', b.clip.heads[1]")
    until(clip, "root.querySelector('.avnb-clock').textContent === 'mean 4.00 to 5.00 s' && root.avnb.curves().length === 1")   # head, the last of them, has come
    assert clip.wait_python("b.time_s == 4.")   # a span begins at its begin, on both sides
    seen = js(clip, "({ box: root.querySelector('.avnb-region').style.cssText, hidden: root.querySelector('.avnb-region').hidden, clock: root.querySelector('.avnb-clock').textContent, opacity: root.querySelector('.avnb-opacity input').value, pressed: [...root.querySelectorAll('.avnb-choices [aria-pressed=true]')].map(b => b.dataset.value) })")
    assert not seen["hidden"] and "left: 25%" in seen["box"] and "width: 25%" in seen["box"]
    assert seen["clock"] == "mean 4.00 to 5.00 s" and seen["opacity"] == "0.35"
    assert seen["pressed"] == ["fr", clip.python("print(b.head)")]
    part(clip, f'button[data-value="{clip.python("print(b.clip.heads[0])")}"]').click()
    assert clip.wait_python("b.head == b.clip.heads[0]")
    clip.python("b.playing = True"); until(clip, "root.avnb.time() > 4.1 && root.avnb.time() < 5")   # the span, from its begin
    clip.python("b.playing = False")
    assert clip.python("f = b.figure(); print(len(f.axes) >= 3)") == "True"
    assert "did you mean" in clip.python("try: b.head = 'haed 1'\nexcept ValueError as e: print(e)")


@needs_chromium
def test_probes_play_and_list(probes):
    n = probes
    assert n.failed() == []
    assert n.took < 25, f"{n.took:.1f} s from Run All to the first draw"
    row = int(n.python("r = p.gallery.rows; p.colour_by = 'label'; i = next(i for i in range(len(p.gallery)) if r['split'][i] == 'test' and r['language'][i] == 'zxx'); print(i)"))
    n.page.locator(f"{PROBES} .avnb-map").first.scroll_into_view_if_needed(); frames(n, PROBES)
    # the row whose mark lies on top there may be another: what is hit is what is chosen
    x, y = js(n, f"root.avnb.at({row})", PROBES)
    n.page.mouse.move(x, y)
    until(n, "root.querySelector('.avnb-tip img')?.naturalWidth > 32", PROBES)
    n.page.mouse.click(x, y)
    assert n.wait_python("p.chosen >= 0 and len(p.neighbours) >= 8")
    n.page.wait_for_function(f"document.querySelector('{PROBES}').dataset.played", timeout=20_000)
    assert js(n, "root.dataset.played", PROBES) == n.python("print('|'.join([p.row['id'], p.row['language'], p.row['modality']]))")
    kinds = {tuple(k) for k in json.loads(n.python("import json; print(json.dumps([[q['modality'], q['language']] for q in p.neighbours]))"))}
    assert {("video", ""), ("audio", "en"), ("audio", "ja")} <= kinds
    assert n.page.locator(f"{PROBES} .avnb-neighbour").count() == int(n.python("print(len(p.neighbours))"))


@needs_chromium
def test_probes_sound_and_neighbour(probes):
    n = probes
    row = int(n.python("r = p.gallery.rows; i = next(i for i in range(len(p.gallery)) if r['split'][i] == 'test' and r['language'][i] == 'en'); p.chosen = i; print(i)"))
    first, id = n.python("print(p.neighbours[0]['row'])"), n.python("print(p.row['id'])")
    until(n, f"root.querySelector('.avnb-neighbour')?.dataset.row === '{first}' && root.querySelector('.avnb-still').dataset.id === '{id}'", PROBES)
    n.page.locator(f"{PROBES} .avnb-again").click()
    n.page.wait_for_function(f"document.querySelector('{PROBES}').avnb.level() > .005", timeout=20_000)
    other = n.page.locator(f"{PROBES} .avnb-neighbour").first
    wanted = int(other.get_attribute("data-row"))
    other.click()
    assert wanted != row and n.wait_python(f"p.chosen == {wanted}")
    n.page.wait_for_function(f"document.querySelector('{PROBES}').dataset.played", timeout=20_000)
    n.python(f"p.chosen = {row}")
    until(n, "!root.dataset.played && root.avnb.film.hidden && root.avnb.level() === 0", PROBES)   # another row is shown, and the last one is not heard


@needs_chromium
def test_cells_runs_and_protocols(probes):
    n = probes
    n.python("p.run, p.protocol, p.split = 'B5', 'sound class', 'test'")
    rows = n.python("r = p.gallery.rows; print(sum(a == 'sound class' and b == 'test' for a, b in zip(r['protocol'], r['split'])))")
    chosen = lambda name: f"root.querySelector('select[aria-label={name}]').value"
    until(n, f"{chosen('run')} === 'B5' && {chosen('protocol')} === 'sound class' && {chosen('split')} === 'test' && root.dataset.rows === '{rows}'", PROBES)
    cell = n.page.locator(f"{PROBES} .avnb-cell:not(.diagonal):not([disabled])").first
    count, (is_, called) = int(cell.inner_text()), cell.get_attribute("data-cell").split("\t")
    cell.click()
    assert n.page.locator(f"{PROBES} .avnb-listed .avnb-neighbour").count() == count
    assert n.wait_python(f"p.cell == ({is_!r}, {called!r})")
    listed = int(n.page.locator(f"{PROBES} .avnb-listed .avnb-neighbour").first.get_attribute("data-row"))
    assert n.python(f"print(p.gallery.rows['label'][{listed}], p.gallery.rows['prediction'][{listed}])") == f"{is_} {called}"
    assert n.page.locator(f"{PROBES} .avnb-figures .avnb-row").count() > 30 and "before (B3)" in n.page.locator(f"{PROBES} .avnb-rules").inner_text()
    for code, wanted in (("None", 0), (f"({is_!r}, {called!r})", count)):   # Python may choose a cell, too
        n.python(f"p.cell = {code}"); until(n, f"root.querySelectorAll('.avnb-listed .avnb-neighbour').length === {wanted}", PROBES)
    n.python("p.split = 'train'; p.split = 'test'"); until(n, "!root.querySelector('.avnb-listed .avnb-neighbour')", PROBES)
    assert n.python("print(p.cell)") == "None"
    heard = n.python("p.chosen = next(i for i, k in enumerate(p.gallery.rows['language']) if k == 'ja'); print(p.row['id'])")
    until(n, f"root.querySelector('.avnb-still').dataset.id === '{heard}' && root.querySelector('.avnb-chosen').innerText.includes('Japanese')", PROBES); n.page.locator(f"{PROBES} .avnb-again").click()
    until(n, "root.dataset.played && root.avnb.level() > .005", PROBES, seconds=20)
    n.page.locator(f"{PROBES} select[aria-label=run]").select_option("random init")
    assert n.wait_python("p.run == 'random init' and p.gallery.name == 'random init'")
    until(n, "!root.dataset.played && root.avnb.level() === 0", PROBES)   # row numbers are of a gallery: what is heard was another's
    n.page.locator(f"{PROBES} select[aria-label=protocol]").select_option("background")
    assert n.wait_python("p.protocol == 'background'")
    n.python("p.run, p.colour_by = 'B5', 'language'")
    until(n, f"{chosen('run')} === 'B5' && root.querySelector('.avnb-mapkey').innerText.includes('Japanese')", PROBES)


@needs_chromium
def test_dubs_play(probes):
    n = probes
    n.page.locator(".avnb-dubs button[data-track=fr]").scroll_into_view_if_needed()
    n.page.locator(".avnb-dubs button[data-track=fr]").click()
    n.page.wait_for_function("document.querySelector('.avnb-dubs').dataset.played === 'fr' && document.querySelector('.avnb-dubs').avnb.level() > .005", timeout=20_000)
    assert n.wait_python("d.track == 'fr'")
    other = n.python("d.scene = d.facts['scenes'][5][0]; print(d.scene)")
    until(n, f"root.dataset.scene === '{other}'", ".avnb-dubs")
    assert js(n, "[root.dataset.played ?? null, root.avnb.level()]", ".avnb-dubs") == [None, 0]   # the old scene is not heard under the new one
    n.page.locator(".avnb-dubs select").select_option(index=2)
    assert n.wait_python("d.scene == d.facts['scenes'][2][0]")


@needs_chromium
def test_nothing_went_wrong_or_away(clip, probes):
    for n in (clip, probes):
        assert n.errors == [], n.errors
        assert n.away == [], n.away


def test_wheel_holds_what_browsers_need(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "avnb", source / "avnb", ignore=shutil.ignore_patterns("__pycache__"))
    for f in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy2(ROOT / f, source / f)
    made = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "-w", str(tmp_path), str(source)], capture_output=True, text=True, cwd=tmp_path)
    assert made.returncode == 0, made.stderr[-800:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as z: inside = {Path(x.filename).name: x.file_size for x in z.infolist() if x.filename.startswith("avnb/static/")}
    here = {f.name: f.stat().st_size for f in (ROOT / "avnb" / "static").iterdir()}
    assert inside == here
    assert sum(here.values()) < 1_000_000
    # and it opens where there is no checkout
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as z: z.extractall(tmp_path / "there")
    code = "import avnb; from avnb.widgets import *; from avnb.widgets import DubBrowser; from avnb.bundled import *; g = bundled_galleries(); print(avnb.__file__, len(AttentionBrowser(bundled_clip()).heat), len(ProbeBrowser(g).xy), len(DubBrowser(g).means))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "there")})
    assert ran.returncode == 0 and str(tmp_path / "there") in ran.stdout, ran.stderr[-800:]


@needs_chromium
def test_a_minute_is_light():
    from avnb.attention import cost
    spent = cost(60.)
    print(spent)
    assert spent["bytes"]["heat"] == 3000*16*16 and spent["bytes"]["all"] < 8_000_000
    assert spent["page_s"] < 15

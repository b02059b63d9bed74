// AttentionBrowser: a clip that plays, its heat over the picture, and its similarity over time.

// One clip's maps: int8 (L, K, T, h, w) in steps of `step`; head "all" is the strongest head of each place (or their sum).
class Maps {
  constructor(bytes, facts) {
    this.bytes = bytes; this.facts = facts;
    [this.L, this.K, this.T, this.h, this.w] = facts.shape;
    this.size = this.h * this.w;
  }
  heads(head) { return head === "all" ? [...Array(this.K).keys()] : [this.facts.heads.indexOf(head)]; }
  at(language, k, t) { return (((language * this.K + k) * this.T) + t) * this.size; }
  // Mean over tokens a (inclusive) to b of the pooled heads: Float32Array (h * w).
  mean(language, head, a, b) {
    const out = new Float32Array(this.size), ks = this.heads(head), sum = this.facts.pool === "sum";
    for (let t = a; t < b; t++) {
      for (let i = 0; i < this.size; i++) {
        let v = sum ? 0 : -128;
        for (const k of ks) { const x = this.bytes[this.at(language, k, t) + i]; v = sum ? v + x : Math.max(v, x); }
        out[i] += v;
      }
    }
    const scale = this.facts.step / Math.max(b - a, 1);
    for (let i = 0; i < this.size; i++) out[i] *= scale;
    return out;
  }
  cells([x0, y0, x1, y1]) {
    const j0 = clamp(Math.floor(x0 * this.w + 1e-6), 0, this.w - 1), j1 = clamp(Math.ceil(x1 * this.w - 1e-6), j0 + 1, this.w);
    const i0 = clamp(Math.floor(y0 * this.h + 1e-6), 0, this.h - 1), i1 = clamp(Math.ceil(y1 * this.h - 1e-6), i0 + 1, this.h);
    const out = [];
    for (let i = i0; i < i1; i++) for (let j = j0; j < j1; j++) out.push(i * this.w + j);
    return out;
  }
  // Similarity over time of one head: mean over a region, or the best place where there is none.
  curve(language, head, region) {
    const out = new Float32Array(this.T), ks = this.heads(head), sum = this.facts.pool === "sum";
    const cells = region ? this.cells(region) : [...Array(this.size).keys()];
    for (let t = 0; t < this.T; t++) {
      let total = 0, best = -1e9;
      for (const i of cells) {
        let v = sum ? 0 : -128;
        for (const k of ks) { const x = this.bytes[this.at(language, k, t) + i]; v = sum ? v + x : Math.max(v, x); }
        total += v; best = Math.max(best, v);
      }
      out[t] = this.facts.step * (region ? total / cells.length : best);
    }
    return out;
  }
}

// A map onto a canvas: values are interpolated first (pixel centres, as the figures do), coloured after.
const paint = (canvas, map, h, w, colours, vmax, opacity) => {
  const k = clamp(Math.round(224 / Math.max(h, w)), 2, 16), H = h * k, W = w * k;
  if (canvas.width !== W || canvas.height !== H) { canvas.width = W; canvas.height = H; }
  const pen = canvas.getContext("2d"), image = pen.createImageData(W, H), out = image.data;
  for (let y = 0, p = 0; y < H; y++) {
    const fy = clamp((y + 0.5) / k - 0.5, 0, h - 1), i = Math.min(Math.floor(fy), h - 2 < 0 ? 0 : h - 2), a = fy - i, below = Math.min(i + 1, h - 1);
    for (let x = 0; x < W; x++, p += 4) {
      const fx = clamp((x + 0.5) / k - 0.5, 0, w - 1), j = Math.min(Math.floor(fx), w - 2 < 0 ? 0 : w - 2), b = fx - j, right = Math.min(j + 1, w - 1);
      const v = (map[i * w + j] * (1 - b) + map[i * w + right] * b) * (1 - a) + (map[below * w + j] * (1 - b) + map[below * w + right] * b) * a;
      const c = 4 * Math.round((clamp(v / vmax, -1, 1) + 1) * 256);
      out[p] = colours[c]; out[p + 1] = colours[c + 1]; out[p + 2] = colours[c + 2]; out[p + 3] = colours[c + 3] * opacity;
    }
  }
  pen.putImageData(image, 0, 0);
};

const colourBar = (canvas, colours, vmax, opacity, ink) => {
  const width = 62, height = canvas.parentElement.clientHeight || 300, pen = sharpen(canvas, width, height), top = 26, bottom = height - 10;
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  pen.clearRect(0, 0, width, height);
  const shade = pen.createLinearGradient(0, top, 0, bottom);
  for (let s = 0; s <= 64; s++) { const c = 4 * Math.round(512 * (1 - s / 64)); shade.addColorStop(s / 64, `rgba(${colours[c]},${colours[c + 1]},${colours[c + 2]},${(colours[c + 3] / 255) * opacity})`); }
  pen.fillStyle = "rgb(158,158,158)"; pen.fillRect(4, top, 14, bottom - top);
  pen.fillStyle = shade; pen.fillRect(4, top, 14, bottom - top);
  pen.fillStyle = ink.ink; pen.strokeStyle = ink.dim; pen.font = ink.font; pen.textBaseline = "middle";
  pen.fillText("similarity", 2, 10);
  for (const f of [1, 0.5, 0, -0.5, -1]) {
    const y = (top + bottom) / 2 - (f * (bottom - top)) / 2;
    pen.beginPath(); pen.moveTo(18, y); pen.lineTo(22, y); pen.stroke();
    pen.fillText(minus((f * vmax).toFixed(2)), 25, clamp(y, top + 3, bottom - 3));
  }
};

function render({ model, el }) {
  const facts = model.get("facts"), maps = new Maps(bytesOf(model.get("heat"), Int8Array), facts), colours = bytesOf(model.get("colours"));
  const loud = bytesOf(model.get("loud")), { languages, names, heads, dur_s: dur, token_hz: hz, vmax } = facts;
  const state = { t: clamp(model.get("time_s"), 0, dur), playing: false, shown: true, region: null, span: null, begun: 0, from: 0, curves: [] };
  const language = () => Math.max(0, languages.indexOf(model.get("language"))), head = () => model.get("head");
  const sound = speaker(), buffers = languages.map(() => null);
  let dirty = true, ink = null, alive = true, lastSave = 0, drawn = false, telling = false;

  // -- the parts
  const video = make("video", { class: "avnb-video", playsinline: true, preload: "auto", "aria-hidden": "true" });
  video.muted = true;
  const url = URL.createObjectURL(new Blob([bytesOf(model.get("picture"))], { type: "video/mp4" }));
  video.src = url;
  const overlay = make("canvas", { class: "avnb-overlay", role: "img", "aria-label": "similarity of each place of the picture to the sound of this moment" });
  const box = make("div", { class: "avnb-region", hidden: true });
  const clock = make("div", { class: "avnb-clock", "aria-hidden": "true" });
  const stage = make("div", { class: "avnb-stage", tabindex: "0", role: "img", "aria-label": "Picture with heat. Click a place, or drag over a region, to draw its similarity over time." }, video, overlay, box, clock);
  stage.style.aspectRatio = `${facts.size[1]} / ${facts.size[0]}`;
  const bar = make("canvas", { class: "avnb-bar", role: "img", "aria-label": `colour bar: similarity from ${-vmax.toFixed(2)} (cold) to ${vmax.toFixed(2)} (warm)` });
  const line = make("canvas", { class: "avnb-line", tabindex: "0", role: "img", "aria-label": "Similarity over time, above the loudness of the sound. Click to go there; drag to see the mean heat of a span." });
  const legend = make("div", { class: "avnb-legend" });
  const play = make("button", { type: "button", class: "avnb-play", "aria-label": "play", title: "play or pause (space)" });
  const scrub = make("input", { type: "range", class: "avnb-scrub", min: 0, max: dur, step: 0.01, value: state.t, "aria-label": "time in seconds", title: "time (arrow keys: 0.1 s, with shift 1 s)" });
  const when = make("output", { class: "avnb-when" });
  const opacity = make("input", { type: "range", min: 0, max: 1, step: 0.05, value: model.get("opacity"), "aria-label": "opacity of the heat" });
  const eye = make("button", { type: "button", class: "avnb-eye", text: "heat", title: "show or hide the heat (h)" });
  const said = make("div", { class: "avnb-said", role: "status", "aria-live": "polite" });
  const clearing = make("button", { type: "button", class: "avnb-clear", text: "clear", title: "forget region and span (Escape)", hidden: true });
  const headRow = choices("head", [...(heads.length > 1 ? [["all", "all"]] : []), ...heads.map((n) => [n, n])], head(), (v) => { model.set("head", v); model.save_changes(); });
  const trackRow = choices("track", languages.map((l, i) => [l, names[i]]), model.get("language"), (v) => { model.set("language", v); model.save_changes(); });
  const root = make("div", { class: "avnb avnb-attention", role: "group", "aria-label": `attention browser: ${facts.title || "clip"}` },
    make("div", { class: "avnb-top" }, make("strong", { text: facts.title || "clip" }), trackRow, headRow),
    make("div", { class: "avnb-main" },
      make("div", { class: "avnb-picture" }, stage, make("div", { class: "avnb-barbox" }, bar)),
      make("div", { class: "avnb-time" }, legend, make("div", { class: "avnb-linebox" }, line))),
    make("div", { class: "avnb-transport" }, play, when, scrub, eye, make("label", { class: "avnb-opacity" }, make("span", { text: "opacity" }), opacity)),
    make("div", { class: "avnb-foot" }, said, clearing, make("span", { class: "avnb-keys", text: "space play · ← → step · h heat · esc clear" })));
  el.append(root);

  // -- state that a person, the clock or Python changes
  const now = () => (state.playing ? state.from + (performance.now() - state.begun) / 1000 : state.t);
  const last = {}; // what was told of each, until another says something else
  const send = (values) => { // what is set here is heard here, too: `hear` is for what Python says
    telling = true;
    try { for (const [k, v] of Object.entries(values)) { if (model.get(k) !== v) last[k] = v; model.set(k, v); } } finally { telling = false; }
    if ("time_s" in values) lastSave = performance.now();
    model.save_changes();
  };
  const settle = () => setTimeout(() => { if (alive && !state.playing && state.t !== model.get("time_s")) send({ time_s: state.t }); }, 200);
  const token = (t) => clamp(Math.floor(t * hz + 1e-6), 0, maps.T - 1);
  const spanTokens = () => { const a = token(state.span[0]); return [a, clamp(Math.ceil(state.span[1] * hz - 1e-6), a + 1, maps.T)]; };
  const seekVideo = (t) => { if (Math.abs(video.currentTime - t) > 0.004) video.currentTime = Math.min(t, Math.max(0, (video.duration || dur) - 0.001)); };
  const buffer = async (i) => (buffers[i] ??= sound.decode(bytesOf(model.get("sounds")).subarray(facts.sounds[i], facts.sounds[i + 1])));
  const startSound = async () => {
    const i = language();
    try {
      const decoded = await buffer(i);
      if (state.playing && i === language()) { await sound.start(decoded, now); if (state.playing && i === language()) root.dataset.heard = languages[i]; }
    } catch (error) { tell(`This browser cannot play the sound: ${error.message}`); }
  };
  const start = () => {
    if (state.playing) return;
    if (state.t >= dur - 0.02 || (state.span && (state.t < state.span[0] || state.t >= state.span[1] - 0.02))) state.t = state.span ? state.span[0] : 0;
    state.playing = true; state.from = state.t; state.begun = performance.now();
    seekVideo(state.t); video.play().catch(() => {}); startSound();
    send({ playing: true, time_s: state.t }); refresh();
  };
  const pause = (told = false) => {
    if (!state.playing) return;
    state.t = clamp(now(), 0, dur); state.playing = false;
    video.pause(); seekVideo(state.t); sound.stop(); delete root.dataset.heard;
    // Python may be about to say where: `b.playing = False; b.time_s = 0.` are two messages, and an answer to the first would undo the second
    if (told) settle(); else send({ playing: false, time_s: state.t });
    refresh();
  };
  const put = (t) => {
    state.t = clamp(t, 0, dur); dirty = true;
    if (state.playing) { state.from = state.t; state.begun = performance.now(); }
  };
  const slide = (t) => { put(t); if (!state.playing && !video.seeking) seekVideo(state.t); }; // scrubbing: nothing goes to the kernel until the hand is lifted
  const go = (t) => { put(t); seekVideo(state.t); if (state.playing) startSound(); }; // there, and nobody is told
  const jump = (t) => { go(t); send({ time_s: state.t }); };
  const setRegion = (r) => { state.region = r; recompute(); };
  const setSpan = (s) => { state.span = s; refresh(); };
  const clear = () => { state.region = state.span = null; send({ region: null, span: null }); recompute(); };
  const recompute = () => {
    const shown = heads.length > 1 ? (head() === "all" ? heads : [head()]) : [heads[0]];
    state.curves = shown.map((name) => ({ name, k: heads.indexOf(name), y: maps.curve(language(), name, state.region) }));
    refresh();
  };
  const tell = (text) => { if (said.textContent !== text) said.textContent = text; };
  const refresh = () => {
    dirty = true; layer = null;
    play.classList.toggle("on", state.playing); play.setAttribute("aria-label", state.playing ? "pause" : "play");
    eye.setAttribute("aria-pressed", String(state.shown));
    root.classList.toggle("avnb-bare", !state.shown);
    clearing.hidden = !state.region && !state.span;
    box.hidden = !state.region;
    if (state.region) { const [a, b, c, d] = state.region; Object.assign(box.style, { left: `${100 * a}%`, top: `${100 * b}%`, width: `${100 * (c - a)}%`, height: `${100 * (d - b)}%` }); }
    const place = state.region ? "mean of the region" : "best place in the picture";
    legend.replaceChildren(...state.curves.map(({ name, k }) => { const key = make("span", { class: "avnb-key", text: heads.length > 1 ? `${name}, ${place}` : place }); key.style.setProperty("--c", ink ? ink.curves[k % ink.curves.length] : "#0072b2"); return key; }),
      ...(facts.spans.length ? [make("span", { class: "avnb-key avnb-truth", text: "truth" })] : []));
    const region = state.region ? `region x ${state.region[0].toFixed(2)} to ${state.region[2].toFixed(2)}, y ${state.region[1].toFixed(2)} to ${state.region[3].toFixed(2)}` : "click the picture: when does this place answer?";
    tell(`${region} · ${state.span ? `mean heat of ${state.span[0].toFixed(2)} to ${seconds(state.span[1])}` : "drag over the curve: where does that span answer?"}`);
  };

  // -- drawing
  let layer = null;
  const M = { left: 46, right: 10, top: 8, gap: 12, loud: 40, bottom: 34, lane: 15 };
  const geometry = () => {
    const width = line.parentElement.clientWidth, height = line.parentElement.clientHeight, rows = [...new Set(facts.spans.map((s) => s[2]))];
    const lanes = rows.length * M.lane, base = height - M.bottom, loudTop = base - M.loud, laneTop = loudTop - M.gap - lanes, bottom = laneTop - (lanes ? 8 : 0);
    return { width, height, rows, base, loudTop, laneTop, bottom, x: (t) => M.left + (t / dur) * (width - M.left - M.right), t: (x) => clamp(((x - M.left) / (width - M.left - M.right)) * dur, 0, dur) };
  };
  const drawLayer = (g) => {
    const canvas = document.createElement("canvas"), pen = sharpen(canvas, g.width, g.height);
    const all = state.curves.flatMap((c) => [Math.max(...c.y), Math.min(...c.y)]);
    const high = Math.max(0.1, ...all) * 1.08, low = Math.min(0, ...all) * 1.08, Y = (v) => M.top + ((high - v) / (high - low)) * (g.bottom - M.top);
    pen.font = ink.font; pen.lineWidth = 1;
    for (const v of ticks(low, high, (g.bottom - M.top) / 34)) {
      pen.strokeStyle = ink.line; pen.beginPath(); pen.moveTo(M.left, Y(v)); pen.lineTo(g.width - M.right, Y(v)); pen.stroke();
      pen.fillStyle = ink.dim; pen.textAlign = "right"; pen.textBaseline = "middle"; pen.fillText(minus(+v.toFixed(3)), M.left - 6, Y(v));
    }
    pen.strokeStyle = ink.dim; pen.beginPath(); pen.moveTo(M.left, Y(0)); pen.lineTo(g.width - M.right, Y(0)); pen.stroke();
    const sideways = (text, y) => { pen.save(); pen.translate(11, y); pen.rotate(-Math.PI / 2); pen.textAlign = "center"; pen.fillStyle = ink.dim; pen.fillText(text, 0, 0); pen.restore(); };
    sideways("similarity", (M.top + g.bottom) / 2);
    pen.lineJoin = "round";
    for (const { k, y } of state.curves) {
      pen.strokeStyle = ink.curves[k % ink.curves.length]; pen.lineWidth = 1.8; pen.beginPath();
      y.forEach((v, i) => pen[i ? "lineTo" : "moveTo"](g.x((i + 0.5) / hz), Y(v))); pen.stroke();
    }
    pen.textBaseline = "middle"; pen.textAlign = "left";
    g.rows.forEach((name, r) => {
      const y = g.laneTop + r * M.lane;
      pen.fillStyle = ink.dim; pen.textAlign = "right"; pen.fillText(name.length > 7 ? `${name.slice(0, 6)}…` : name, M.left - 6, y + M.lane / 2);
      pen.fillStyle = ink.truth;
      for (const [a, b, n] of facts.spans) if (n === name) pen.fillRect(g.x(a), y + 3, Math.max(2, g.x(b) - g.x(a)), M.lane - 6);
    });
    pen.fillStyle = ink.dim; pen.globalAlpha = 0.55; pen.beginPath(); pen.moveTo(M.left, g.base);
    const first = language() * maps.T;
    for (let i = 0; i < maps.T; i++) pen.lineTo(g.x((i + 0.5) / hz), g.base - (loud[first + i] / 255) * M.loud);
    pen.lineTo(g.width - M.right, g.base); pen.fill(); pen.globalAlpha = 1;
    pen.fillStyle = ink.dim; pen.textAlign = "right";
    for (const [db, f] of [["0", 1], ["\u221230", 0.5], ["\u221260", 0]]) pen.fillText(db, M.left - 6, clamp(g.base - f * M.loud, g.loudTop + 4, g.base - 2));
    sideways("dB FS", (g.loudTop + g.base) / 2);
    pen.strokeStyle = ink.dim; pen.beginPath(); pen.moveTo(M.left, g.base + 0.5); pen.lineTo(g.width - M.right, g.base + 0.5); pen.stroke();
    pen.textAlign = "center"; pen.textBaseline = "top";
    for (const t of ticks(0, dur, (g.width - 60) / 62)) { pen.beginPath(); pen.moveTo(g.x(t), g.base); pen.lineTo(g.x(t), g.base + 4); pen.stroke(); pen.fillText(String(t), g.x(t), g.base + 7); }
    pen.fillText("time (s)", (M.left + g.width - M.right) / 2, g.base + 20);
    return { canvas, Y };
  };
  const drawLine = (t) => {
    const g = geometry();
    if (g.width < 40) return;
    layer ??= drawLayer(g);
    const pen = sharpen(line, g.width, g.height);
    line.style.width = `${g.width}px`; line.style.height = `${g.height}px`;
    pen.clearRect(0, 0, g.width, g.height);
    if (state.span) { pen.fillStyle = ink.accent; pen.globalAlpha = 0.18; pen.fillRect(g.x(state.span[0]), M.top, g.x(state.span[1]) - g.x(state.span[0]), g.base - M.top); pen.globalAlpha = 1; }
    pen.drawImage(layer.canvas, 0, 0, g.width, g.height);
    pen.strokeStyle = ink.accent; pen.lineWidth = 1.6; pen.beginPath(); pen.moveTo(g.x(t), M.top - 4); pen.lineTo(g.x(t), g.base); pen.stroke();
    const i = token(t);
    for (const { k, y } of state.curves) { pen.fillStyle = ink.curves[k % ink.curves.length]; pen.beginPath(); pen.arc(g.x(t), layer.Y(y[i]), 3.6, 0, 7); pen.fill(); pen.strokeStyle = ink.back; pen.lineWidth = 1; pen.stroke(); }
  };
  let painted = "";
  const draw = () => {
    if (!alive) return;
    requestAnimationFrame(draw);
    let t = now();
    if (state.playing) {
      const end = state.span ? state.span[1] : dur;
      if (t >= end) { if (state.span) { go(state.span[0]); t = state.t; } else { pause(); t = state.t = dur; send({ time_s: dur }); } }
      else if (Math.abs(video.currentTime - t) > 0.15 && !video.seeking) video.currentTime = t;
      if (performance.now() - lastSave > 500) send({ time_s: t });
      dirty = true;
    }
    if (!root.isConnected || !root.clientWidth || (!dirty && ink)) return; // a tab that is not looked at keeps its time, too
    ink = ink && !state.themed ? ink : inks(root);
    if (state.themed !== false) { state.themed = false; colourBar(bar, colours, vmax, model.get("opacity"), ink); refresh(); }
    const still = state.span && !state.playing, [a, b] = still ? spanTokens() : [token(t), token(t) + 1];
    const key = [language(), head(), a, b, model.get("opacity"), state.shown].join();
    if (key !== painted) {
      painted = key; state.map = maps.mean(language(), head(), a, b);
      if (state.shown) paint(overlay, state.map, maps.h, maps.w, colours, vmax, model.get("opacity")); else overlay.getContext("2d").clearRect(0, 0, overlay.width, overlay.height);
      root.dataset.token = a;
    }
    drawLine(t);
    if (document.activeElement !== scrub || state.playing) scrub.value = t;
    when.textContent = `${t.toFixed(2)} / ${seconds(dur)}`;
    clock.textContent = still ? `mean ${state.span[0].toFixed(2)} to ${seconds(state.span[1])}` : seconds(t);
    dirty = false;
    if (!drawn) { drawn = true; root.dataset.drawn = "1"; model.set("first_draw", Date.now() / 1000); model.save_changes(); }
  };

  // -- hands
  play.onclick = () => (state.playing ? pause() : start());
  scrub.oninput = () => slide(+scrub.value);
  scrub.onchange = () => jump(+scrub.value);
  opacity.oninput = () => { model.set("opacity", +opacity.value); state.themed = true; dirty = true; };
  opacity.onchange = () => model.save_changes();
  eye.onclick = () => { state.shown = !state.shown; refresh(); };
  clearing.onclick = clear;
  const inside = (e, el) => { const r = el.getBoundingClientRect(); return [clamp((e.clientX - r.left) / r.width, 0, 1), clamp((e.clientY - r.top) / r.height, 0, 1)]; };
  const cell = ([x, y]) => { const j = clamp(Math.floor(x * maps.w), 0, maps.w - 1), i = clamp(Math.floor(y * maps.h), 0, maps.h - 1); return [j / maps.w, i / maps.h, (j + 1) / maps.w, (i + 1) / maps.h]; };
  const dragging = (target, begin, move, end) => target.addEventListener("pointerdown", (down) => {
    if (down.button) return;
    target.setPointerCapture(down.pointerId); begin(down);
    const stop = (up) => { target.onpointermove = target === stage ? peek : null; target.onpointerup = target.onpointercancel = null; end(up); };
    target.onpointermove = move; target.onpointerup = target.onpointercancel = stop;
  });
  let from = null, held = 0;
  const reach = (e) => { const [x, y] = inside(e, stage), [x0, y0, x1, y1] = cell(from); return Math.hypot(x - from[0], y - from[1]) < 0.03 ? cell(from) : [Math.min(x, x0), Math.min(y, y0), Math.max(x, x1), Math.max(y, y1)]; }; // never thinner than a place
  const peek = (e) => { const [x, y] = inside(e, stage); if (state.map) stage.title = `similarity ${minus(state.map[Math.min(Math.floor(y * maps.h), maps.h - 1) * maps.w + Math.min(Math.floor(x * maps.w), maps.w - 1)].toFixed(2))}`; };
  stage.onpointermove = peek;
  dragging(stage, (e) => { from = inside(e, stage); stage.focus({ preventScroll: true }); setRegion(cell(from)); }, (e) => setRegion(reach(e)), (e) => { setRegion(reach(e)); send({ region: state.region }); });
  const timeAt = (e) => geometry().t(e.clientX - line.getBoundingClientRect().left);
  dragging(line, (e) => { held = timeAt(e); line.focus({ preventScroll: true }); if (!state.playing) slide(held); },
    (e) => { const t = timeAt(e); if (Math.abs(t - held) > 0.015 * dur) setSpan([Math.min(t, held), Math.max(t, held)]); },
    (e) => { const t = timeAt(e), brushed = Math.abs(t - held) > 0.015 * dur; setSpan(brushed ? [Math.min(t, held), Math.max(t, held)] : null); send({ span: state.span }); jump(brushed ? state.span[0] : held); });
  const step = (e, way) => jump(now() + way * (e.shiftKey ? 1 : 0.1));
  ownKeys(root, { space: () => play.onclick(), ArrowLeft: (e) => step(e, -1), ArrowRight: (e) => step(e, 1), Home: () => jump(0), End: () => jump(dur), h: () => eye.onclick(), Escape: clear });

  // -- Python
  const follow = () => { const t = model.get("time_s"); if (!state.playing || Math.abs(t - now()) > 0.1) go(t); }; // nearer than that another view or browser plays along
  // A kernel that was busy hears what was told here after it has said something else, and sends it back. What it said holds, and it is told so.
  const own = (k) => { const mine = last[k] === model.get(k); if (!mine) delete last[k]; return mine; };
  const tellAgain = () => send({ playing: state.playing, time_s: clamp(now(), 0, dur) });
  const deaf = hear(model, [
    ["_said_playing", () => { if (!model.get("playing")) pause(true); }], // first, so that a time beside it is where it stands
    ["region", () => { if (String(model.get("region")) !== String(state.region)) setRegion(model.get("region")); }],
    ["head", () => { headRow.show(head()); recompute(); }],
    ["language", () => { trackRow.show(model.get("language")); recompute(); if (state.playing) startSound(); }],
    ["opacity", () => { opacity.value = model.get("opacity"); state.themed = true; dirty = true; }],
    ["span", (all) => {
      if (String(model.get("span")) === String(state.span)) return;
      setSpan(model.get("span"));
      if (state.span && !all.has("_said_time_s")) { go(state.span[0]); settle(); }
    }],
    ["_said_time_s", () => follow()],
    ["time_s", (all) => { if (all.has("_said_time_s")) return; if (own("time_s")) tellAgain(); else follow(); }],
    ["_said_playing", () => { if (model.get("playing")) start(); }], // last, so that it begins where a span or a time beside it says
    ["playing", (all) => { if (all.has("_said_playing")) return; if (own("playing")) tellAgain(); else if (model.get("playing")) start(); else pause(true); }],
  ], () => telling);
  state.region = model.get("region"); state.span = model.get("span");
  video.addEventListener("loadeddata", () => { seekVideo(now()); dirty = true; });
  video.addEventListener("error", () => tell(`This browser cannot show the picture (H.264 in mp4): ${video.error?.message || "no decoder"}`));
  const unwatch = onTheme(root, () => { state.themed = true; dirty = true; layer = null; });
  state.themed = true;
  recompute();
  root.avnb = { level: () => sound.level(), map: () => state.map, curves: () => state.curves.map((c) => ({ name: c.name, y: [...c.y] })), time: now, video };
  requestAnimationFrame(draw);
  if (model.get("playing")) start();
  return () => { alive = false; unwatch(); sound.close(); video.pause(); URL.revokeObjectURL(url); deaf(); };
}

export default { render };

// What the browsers share. It is put in front of each browser's own file, so that one module goes to the front end and nothing is fetched.

const make = (tag, props = {}, ...children) => {
  const el = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (key.startsWith("on")) el.addEventListener(key.slice(2), value);
    else if (key === "class") el.className = value;
    else if (key === "text") el.textContent = value;
    else if (value === true) el.setAttribute(key, "");
    else if (value !== false) el.setAttribute(key, value);
  }
  el.append(...children.filter((c) => c !== null && c !== undefined));
  return el;
};

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const minus = (text) => String(text).replace("-", "\u2212");
const seconds = (t) => `${t.toFixed(2)} s`;

// Bytes of a binary trait (a DataView in the front end), without a copy.
const bytesOf = (view, Kind = Uint8Array) =>
  !view ? new Kind(0) : new Kind(view.buffer, view.byteOffset ?? 0, (view.byteLength ?? 0) / Kind.BYTES_PER_ELEMENT);

const ticks = (low, high, wanted) => {
  const raw = (high - low) / Math.max(wanted, 1), size = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * size).find((s) => s >= raw * 0.999) ?? raw;
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) out.push(+(i * step).toPrecision(10));
  return out;
};

// A canvas as sharp as the screen; the context then counts in CSS pixels.
const sharpen = (canvas, width, height) => {
  const k = window.devicePixelRatio || 1, w = Math.max(1, Math.round(width * k)), h = Math.max(1, Math.round(height * k));
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const pen = canvas.getContext("2d");
  pen.setTransform(k, 0, 0, k, 0, 0);
  return pen;
};

// The theme's colours, as the style sheet resolves them at this element.
const inks = (root) => {
  const style = getComputedStyle(root), get = (name) => style.getPropertyValue(`--avnb-${name}`).trim();
  const [r, g, b] = (style.color.match(/[\d.]+/g) ?? [0, 0, 0]).map(Number), dark = 0.3 * r + 0.6 * g + 0.1 * b > 140;
  return { ink: style.color, dim: get("dim"), line: get("line"), accent: get("accent"), truth: get("truth"), back: get("back"), dark,
           font: `11px ${style.fontFamily}`, curves: dark ? ["#56b4e9", "#e69f00", "#2fc79a", "#e08fc0", "#f0e442"] : ["#0072b2", "#d55e00", "#009e73", "#b0548a", "#8a6d00"] };
};

const onTheme = (root, redraw) => {
  const seen = new MutationObserver(() => requestAnimationFrame(redraw));
  for (const el of [document.body, document.documentElement]) seen.observe(el, { attributes: true, attributeFilter: ["class", "data-jp-theme-light", "data-vscode-theme-kind", "style"] });
  const size = new ResizeObserver(() => requestAnimationFrame(redraw));
  size.observe(root);
  return () => { seen.disconnect(); size.disconnect(); };
};

// A row of buttons of which one is pressed.
const choices = (label, options, current, choose) => {
  const row = make("div", { class: "avnb-choices", role: "group", "aria-label": label }, make("span", { class: "avnb-label", text: label }));
  const buttons = options.map(([value, text]) => make("button", { type: "button", text, "data-value": value, onclick: () => choose(value) }));
  row.append(...buttons);
  row.show = (value) => buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.value === String(value))));
  row.show(current);
  row.hidden = options.length < 2;
  return row;
};

// Sound by the Web Audio clock: one context a widget, one source at a time.
const speaker = () => {
  let context = null, source = null, meter = null, closed = false;
  const open = () => {
    if (!context) {
      context = new (window.AudioContext || window.webkitAudioContext)();
      meter = context.createAnalyser(); meter.fftSize = 2048; meter.connect(context.destination);
    }
    return context;
  };
  const stop = () => { if (source) { source.onended = null; try { source.stop(); } catch { /* it had ended */ } source.disconnect(); source = null; } };
  return {
    decode: async (bytes) => (closed ? null : open().decodeAudioData(bytes.slice().buffer)),
    // `where()` is asked once the context runs, since a browser may hold it back until a person has clicked
    async start(buffer, where, ended) {
      stop();
      if (closed) return; // the output was removed while this was decoded
      const asked = (source = open().createBufferSource());
      asked.buffer = buffer; asked.connect(meter);
      if (context.state !== "running") await context.resume();
      if (source !== asked) return;
      const at = where();
      if (at < buffer.duration) { asked.start(0, at); asked.onended = () => { if (source === asked) { source = null; ended?.(); } }; }
    },
    stop,
    level() {
      if (!source || !meter) return 0;
      const x = new Float32Array(meter.fftSize); meter.getFloatTimeDomainData(x);
      return Math.sqrt(x.reduce((s, v) => s + v * v, 0) / x.length);
    },
    close() { closed = true; stop(); context?.close(); context = null; },
  };
};

// What Python says, a message at a time. `told` is [name, what to do] in the order in which it is done: a message's own order is that of a Python set, by chance.
const hear = (model, told, mine = () => false) => {
  const said = new Set();
  const word = () => { const all = new Set(said); said.clear(); for (const [k, f] of told) if (all.has(k)) f(all); };
  const events = [...new Set(told.map(([k]) => k))].map((k) => [`change:${k}`, () => { if (mine()) return; if (!said.size) queueMicrotask(word); said.add(k); }]);
  for (const [event, f] of events) model.on(event, f);
  return () => { said.clear(); for (const [event, f] of events) model.off(event, f); };
};

// JupyterLab must not read keys that are meant for a browser.
const ownKeys = (root, keys) => {
  root.dataset.lmSuppressShortcuts = "true";
  root.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || /^(SELECT|TEXTAREA)$/.test(e.target.tagName)) return;
    if (e.key === " " && e.target.tagName === "BUTTON" && !e.target.classList.contains("avnb-play")) return;
    const act = keys[e.key === " " ? "space" : e.key];
    if (act && !(e.target.tagName === "INPUT" && e.key.startsWith("Arrow"))) { act(e); e.preventDefault(); }
    e.stopPropagation();
  });
};

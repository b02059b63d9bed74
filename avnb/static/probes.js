// ProbeBrowser: the rows of a run's test on a plane, what lies near one of them, what is taken for what, and the figures.

const SHAPES = ["circle", "square", "diamond", "up", "down", "cross"];
const HUES = { light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7b3294", "#5d4037", "#6b7280", "#111827"],
               dark: ["#56b4e9", "#ff8a3d", "#2fc79a", "#e39cc6", "#f0e442", "#8ecdf5", "#c79bea", "#c8a08f", "#a3adba", "#ffffff"] };
const LANGUAGE = (code, names) => (code ? names[code] ?? code : "");

const mark = (pen, shape, x, y, r) => {
  pen.beginPath();
  if (shape === "circle") pen.arc(x, y, r, 0, 7);
  else if (shape === "square") pen.rect(x - r * 0.88, y - r * 0.88, r * 1.76, r * 1.76);
  else if (shape === "diamond") { pen.moveTo(x, y - r * 1.25); pen.lineTo(x + r * 1.25, y); pen.lineTo(x, y + r * 1.25); pen.lineTo(x - r * 1.25, y); pen.closePath(); }
  else if (shape === "up" || shape === "down") { const s = shape === "up" ? -1 : 1; pen.moveTo(x, y + s * r * 1.2); pen.lineTo(x + r * 1.1, y - s * r * 0.8); pen.lineTo(x - r * 1.1, y - s * r * 0.8); pen.closePath(); }
  else { const a = r * 0.4, b = r * 1.1; pen.rect(x - a, y - b, 2 * a, 2 * b); pen.rect(x - b, y - a, 2 * b, 2 * a); }
};

function render({ model, el }) {
  let facts = model.get("facts"), xy = bytesOf(model.get("xy"), Float32Array), ink = null, alive = true, dirty = true, hover = -1, picked = null, waiting = null, played = -1;
  const urls = new Map(), sound = speaker(), thumbBytes = () => bytesOf(model.get("thumbs"));

  const select = (label, onchange) => { const s = make("select", { "aria-label": label, onchange: () => onchange(s.value) }); const box = make("label", { class: "avnb-select" }, make("span", { class: "avnb-label", text: label }), s); box.fill = (options, value) => { s.replaceChildren(...options.map(([v, t]) => make("option", { value: v, text: t }))); s.value = value; box.hidden = options.length < 2; }; return box; };
  const set = (name) => (value) => { model.set(name, value); model.save_changes(); };
  const run = select("run", set("run")), protocol = select("protocol", set("protocol")), split = select("split", set("split"));
  const colour = choices("colour", [["label", "class"], ["language", "language"], ["error", "error"]], model.get("colour_by"), set("colour_by"));
  const map = make("canvas", { class: "avnb-map", tabindex: "0", role: "img", "aria-label": "Map of the embeddings. Point at a row to see it, click to play it and list its neighbours. Arrow keys go from row to row." });
  const tip = make("div", { class: "avnb-tip", hidden: true });
  const key = make("div", { class: "avnb-legend avnb-mapkey" });
  const share = make("div", { class: "avnb-caption" });
  const film = make("video", { class: "avnb-film", playsinline: true, loop: false, "aria-hidden": "true" }); film.muted = true;
  const still = make("img", { class: "avnb-still", alt: "" });
  const head = make("div", { class: "avnb-chosen" }), near = make("div", { class: "avnb-near", role: "group", "aria-label": "nearest neighbours" });
  const again = make("button", { type: "button", text: "play", class: "avnb-again", title: "play this clip (space)" });
  const grid = make("div", { class: "avnb-confusion" }), listed = make("div", { class: "avnb-listed" });
  const table = make("div", { class: "avnb-figures", tabindex: "0", role: "region", "aria-label": "figures with 95 % intervals" });
  const said = make("div", { class: "avnb-said", role: "status", "aria-live": "polite" });
  const title = make("strong", { text: "What the embeddings know" });
  const root = make("div", { class: "avnb avnb-probes", role: "group", "aria-label": "probe browser" },
    make("div", { class: "avnb-top" }, title, run, protocol, split, colour),
    make("div", { class: "avnb-probemain" },
      make("section", { class: "avnb-card" }, make("h4", { text: "Map" }), make("div", { class: "avnb-mapbox" }, map, tip), key, share),
      make("section", { class: "avnb-card" }, make("div", { class: "avnb-show" }, make("div", { class: "avnb-screen" }, still, film), make("div", { class: "avnb-meta" }, head, again)), make("h4", { text: "Nearest, in each modality and language" }), near),
      make("section", { class: "avnb-card" }, make("h4", { text: "What is taken for what" }), grid, listed),
      make("section", { class: "avnb-card" }, make("h4", { text: "Figures" }), table)),
    make("div", { class: "avnb-foot" }, said, make("span", { class: "avnb-keys", text: "← → go from row to row · space play" })));
  el.append(root);

  // -- rows
  const rows = () => facts.rows, N = () => facts.rows.id.length;
  const shown = () => { const r = rows(), p = model.get("protocol"), s = model.get("split"); return [...Array(N()).keys()].filter((i) => r.protocol[i] === p && (s === "all" || r.split[i] === s)); };
  const kindOf = (i) => rows().modality[i] + (rows().language[i] ? ` ${rows().language[i]}` : "");
  const named = (i) => { const r = rows(), l = LANGUAGE(r.language[i], facts.names); return r.modality[i] === "video" ? "film" : l ? (r.language[i] === "zxx" ? l : `${l} sound`) : r.modality[i]; };
  const kinds = () => [...new Set(shown().map((i) => rows().modality[i]))].sort((a, b) => (a < b ? 1 : -1));
  const shape = (i) => SHAPES[Math.max(0, kinds().indexOf(rows().modality[i])) % SHAPES.length];
  const groups = () => { const by = model.get("colour_by"), r = rows(); return by === "error" ? ["right", "wrong", "no answer"] : [...new Set(shown().map((i) => (by === "label" ? r.label[i] : r.language[i] || "film")))].sort(); };
  const groupOf = (i) => { const by = model.get("colour_by"), r = rows(); return by === "error" ? (!r.prediction[i] ? "no answer" : r.prediction[i] === r.label[i] ? "right" : "wrong") : by === "label" ? r.label[i] : r.language[i] || "film"; };
  const hue = (name, list) => { const hues = HUES[ink.dark ? "dark" : "light"]; return model.get("colour_by") === "error" ? { right: hues[0], wrong: hues[1], "no answer": hues[8] }[name] : hues[list.indexOf(name) % hues.length]; };
  const thumb = (i) => {
    const id = rows().id[i], at = facts.thumbs[i];
    if (!urls.has(id) && at) urls.set(id, URL.createObjectURL(new Blob([thumbBytes().subarray(at[0], at[1])], { type: "image/jpeg" })));
    if (!urls.has(id) && facts.media && waiting !== id) { waiting = id; model.send({ ask: "thumb", row: i }); }
    return urls.get(id) ?? "";
  };
  const picture = (i, size) => { const img = make("img", { alt: rows().label[i] || rows().id[i], width: size, height: size, "data-id": rows().id[i], class: "avnb-thumb" }); const url = thumb(i); if (url) img.src = url; return img; };
  const tell = (text) => { said.textContent = text; };

  // -- the map
  const box = () => { const w = map.parentElement.clientWidth, h = map.parentElement.clientHeight, k = Math.min(w, h) / 2 - 14; return { w, h, at: (i) => [w / 2 + xy[2 * i] * (w / 2 - 14), h / 2 - xy[2 * i + 1] * (h / 2 - 14)], k }; };
  const drawMap = () => {
    const { w, h, at } = box(); if (w < 40) return;
    const pen = sharpen(map, w, h); map.style.width = `${w}px`; map.style.height = `${h}px`;
    pen.clearRect(0, 0, w, h);
    const all = shown(), list = groups(), chosen = model.get("chosen"), near = new Set(model.get("neighbours").map((n) => n.row));
    pen.lineWidth = 1; pen.strokeStyle = ink.line; pen.beginPath(); pen.moveTo(w / 2, 0); pen.lineTo(w / 2, h); pen.moveTo(0, h / 2); pen.lineTo(w, h / 2); pen.stroke();
    if (chosen >= 0 && near.size) { const [x, y] = at(chosen); pen.strokeStyle = ink.dim; pen.lineWidth = 0.8; for (const j of near) { pen.beginPath(); pen.moveTo(x, y); pen.lineTo(...at(j)); pen.stroke(); } }
    pen.lineWidth = 1;
    for (const i of all) {
      const dim = picked ? !picked(i) : false;
      pen.globalAlpha = dim ? 0.12 : 0.85; pen.fillStyle = hue(groupOf(i), list);
      mark(pen, shape(i), ...at(i), model.get("colour_by") === "error" && groupOf(i) === "wrong" ? 5.4 : 4.4); pen.fill();
      if (near.has(i)) { pen.globalAlpha = 1; pen.strokeStyle = ink.ink; pen.stroke(); }
    }
    pen.globalAlpha = 1;
    for (const [i, r] of [[hover, 8], [chosen, 9]]) if (i >= 0 && all.includes(i)) { pen.strokeStyle = i === chosen ? ink.accent : ink.ink; pen.lineWidth = i === chosen ? 2.6 : 1.6; pen.beginPath(); pen.arc(...at(i), r, 0, 7); pen.stroke(); }
    pen.fillStyle = ink.dim; pen.font = ink.font; pen.textAlign = "right"; pen.fillText("component 1", w - 6, h / 2 - 6);
    pen.save(); pen.translate(w / 2 - 6, 6); pen.rotate(-Math.PI / 2); pen.fillText("component 2", 0, 0); pen.restore();
  };
  const drawKey = () => {
    const list = groups(), by = model.get("colour_by");
    const text = (g) => (by === "language" ? (g === "film" ? "film" : LANGUAGE(g, facts.names)) : g);
    key.replaceChildren(...list.filter((g) => by !== "error" || shown().some((i) => groupOf(i) === g)).map((g) => { const b = make("button", { type: "button", class: "avnb-chip", text: text(g), title: "show these alone", onclick: () => { const alone = picked?.group !== g; chooseCell(null); if (alone) picked = Object.assign((i) => groupOf(i) === g, { group: g }); refresh(); } }); b.style.setProperty("--c", hue(g, list)); b.setAttribute("aria-pressed", String(picked?.group === g)); return b; }),
      ...kinds().map((m) => make("span", { class: "avnb-shape", text: `${{ circle: "●", square: "■", diamond: "◆", up: "▲", down: "▼", cross: "✚" }[SHAPES[kinds().indexOf(m) % SHAPES.length]]} ${m}` })));
  };
  const nearest = (e) => { const r = map.getBoundingClientRect(), x = e.clientX - r.left, y = e.clientY - r.top, { at } = box(); let best = -1, far = 14; for (const i of shown()) { if (picked && !picked(i)) continue; const [a, b] = at(i), d = Math.hypot(a - x, b - y); if (d < far) { far = d; best = i; } } return best; };
  const point = (i) => {
    hover = i; tip.hidden = i < 0; dirty = true;
    if (i < 0) return;
    const { w, at } = box(), [x, y] = at(i), r = rows();
    tip.replaceChildren(picture(i, 84), make("div", {}, make("b", { text: r.label[i] || r.id[i] }), make("div", { text: named(i) }), r.prediction[i] ? make("div", { class: r.prediction[i] === r.label[i] ? "avnb-ok" : "avnb-no", text: r.prediction[i] === r.label[i] ? "probe agrees" : `probe: ${r.prediction[i]}` }) : null));
    Object.assign(tip.style, { left: `${clamp(x + 14, 0, w - 210)}px`, top: `${Math.max(0, y - 104 < 0 ? y + 14 : y - 104)}px` });
  };
  map.addEventListener("pointermove", (e) => { const i = nearest(e); map.style.cursor = i >= 0 ? "pointer" : "default"; if (i !== hover) point(i); });
  map.addEventListener("pointerleave", () => point(-1));
  map.addEventListener("click", (e) => { const i = nearest(e); map.focus({ preventScroll: true }); if (i >= 0) choose(i, true); });

  // -- a row
  const choose = (i, play) => { model.set("chosen", i); model.save_changes(); showChosen(); if (play) ask(i); };
  const hush = () => { played = -1; sound.stop(); film.pause(); film.removeAttribute("src"); film.hidden = true; delete root.dataset.played; };
  const ask = (i) => {
    hush(); played = i;
    if (!facts.media) { tell("Nothing to play: this gallery was given without media."); return; }
    tell(`fetching ${rows().id[i]}, ${named(i)} …`); model.send({ ask: "play", row: i });
  };
  const showChosen = () => {
    const i = model.get("chosen"), r = rows(); dirty = true;
    if (played >= 0 && played !== i) hush(); // another row, whoever chose it
    again.hidden = i < 0;
    if (i < 0 || i >= N()) { head.replaceChildren(make("div", { class: "avnb-hint", text: "Click a row on the map: it plays, and what lies near it is listed here." })); still.removeAttribute("src"); film.hidden = true; near.replaceChildren(); return; }
    still.src = thumb(i); still.dataset.id = r.id[i]; still.alt = r.label[i];
    head.replaceChildren(make("b", { text: r.label[i] || r.id[i] }), make("div", { text: named(i) }), make("div", { class: "avnb-id", text: r.id[i] + (r.time[i] ? `, ${r.time[i]} s` : "") }),
      r.prediction[i] ? make("div", { class: r.prediction[i] === r.label[i] ? "avnb-ok" : "avnb-no", text: r.prediction[i] === r.label[i] ? `probe: ${r.prediction[i]}, right` : `probe: ${r.prediction[i]}, wrong` }) : null);
    const kinds = new Map();
    for (const n of model.get("neighbours")) { const k = kindOf(n.row); (kinds.get(k) ?? kinds.set(k, []).get(k)).push(n); }
    near.replaceChildren(...[...kinds].map(([, list]) => make("div", { class: "avnb-nearrow" }, make("span", { class: "avnb-nearname", text: named(list[0].row) }),
      ...list.map((n) => make("button", { type: "button", class: `avnb-neighbour${n.same ? " same" : ""}`, "data-row": n.row, title: `${n.id}: ${n.label}${n.same ? " (the same clip)" : ""}`, "aria-label": `${n.label}, ${named(n.row)}, similarity ${n.similarity.toFixed(2)}${n.same ? ", the same clip" : ""}`, onclick: () => choose(n.row, true) },
        picture(n.row, 40), make("span", { class: n.label === rows().label[i] ? "avnb-ok" : "avnb-no", text: n.label || "–" }), make("span", { class: "avnb-sim", text: minus(n.similarity.toFixed(2)) }))))));
  };
  again.onclick = () => ask(model.get("chosen"));

  // -- what is taken for what
  let cellOf = null;
  const setCell = (cell) => {
    cellOf = cell ? cell.join("\t") : null;
    picked = cell ? Object.assign((i) => rows().label[i] === cell[0] && rows().prediction[i] === cell[1], { group: cellOf }) : null;
  };
  const chooseCell = (cell) => { setCell(cell); if (String(model.get("cell")) !== String(cell)) { model.set("cell", cell); model.save_changes(); } };
  const drawGrid = () => {
    const r = rows(), all = shown().filter((i) => r.prediction[i]);
    if (!all.length) { grid.replaceChildren(make("div", { class: "avnb-hint", text: "This run kept no predictions, so nothing can be taken for anything." })); listed.replaceChildren(); return; }
    const names = [...new Set(all.flatMap((i) => [r.label[i], r.prediction[i]]))].sort(), count = new Map(), sums = new Map();
    for (const i of all) { const c = `${r.label[i]}\t${r.prediction[i]}`; (count.get(c) ?? count.set(c, []).get(c)).push(i); sums.set(r.label[i], (sums.get(r.label[i]) ?? 0) + 1); }
    const body = make("div", { class: "avnb-cells", role: "group", "aria-label": "confusion matrix: rows are what it is, columns what the probe says" });
    body.style.gridTemplateColumns = `max-content repeat(${names.length}, minmax(14px, 1fr))`;
    body.append(make("span", { class: "avnb-corner", text: "is \u2193  called \u2192" }), ...names.map((n) => make("span", { class: "avnb-col", title: n }, make("span", { text: n }))));
    for (const a of names) {
      body.append(make("span", { class: "avnb-rowname", text: a }));
      for (const b of names) {
        const list = count.get(`${a}\t${b}`) ?? [], f = list.length / (sums.get(a) || 1);
        const cell = make("button", { type: "button", class: `avnb-cell${a === b ? " diagonal" : ""}`, text: list.length || "", disabled: !list.length, title: `${list.length} of ${sums.get(a) ?? 0}: ${a} called ${b}`, "aria-label": `${list.length} of ${sums.get(a) ?? 0}: ${a} called ${b}`, "data-cell": `${a}\t${b}`,
          onclick: () => { chooseCell(cellOf === `${a}\t${b}` ? null : [a, b]); refresh(); } });
        cell.style.setProperty("--f", (a === b ? f : Math.min(1, f * 1.6)).toFixed(3)); cell.setAttribute("aria-pressed", String(cellOf === `${a}\t${b}`));
        body.append(cell);
      }
    }
    grid.replaceChildren(body);
    const list = cellOf ? count.get(cellOf) ?? [] : [];
    listed.replaceChildren(...(cellOf ? [make("div", { class: "avnb-caption", text: `${list.length} rows: ${cellOf.replace("\t", " called ")}` }), ...list.slice(0, 40).map((i) => make("button", { type: "button", class: "avnb-neighbour", "data-row": i, title: `${r.id[i]}, ${named(i)}`, onclick: () => choose(i, true) }, picture(i, 46), make("span", { text: r.modality[i] === "video" ? "film" : r.language[i] || r.modality[i] })))] : [make("div", { class: "avnb-caption", text: "Click a cell: its clips are listed here and shown alone on the map. Darker is a larger share of its row." })]));
  };

  // -- figures
  const drawTable = () => {
    const found = Object.entries(facts.metrics).filter(([, v]) => v && typeof v.value === "number");
    if (!found.length) { table.replaceChildren(make("div", { class: "avnb-hint", text: "results.json holds no figures." })); return; }
    const rules = Object.keys(facts.baselines), tops = found.map(([k, v]) => Math.max(v.hi ?? v.value, v.value, ...rules.map((r) => facts.baselines[r][k]?.value ?? 0))), low = Math.min(0, ...found.map(([, v]) => v.lo ?? v.value));
    const span = Math.max(...tops) <= 1.0001 && low >= -1 ? [Math.min(0, low), 1] : null;
    table.replaceChildren(make("div", { class: "avnb-row avnb-rowhead" }, make("span", { text: "figure" }), make("span", { text: "value [95 %]" }), make("span", { class: "avnb-axis" }, make("span", { text: span ? minus(span[0]) : "" }), make("span", { text: span ? String(span[1]) : "" }))),
      ...found.map(([k, v], n) => {
        const [a, b] = span ?? [Math.min(0, low), tops[n] || 1], at = (x) => `${100 * clamp((x - a) / (b - a), 0, 1)}%`;
        const bar = make("span", { class: "avnb-interval" });
        for (const [j, rule] of rules.entries()) { const base = facts.baselines[rule][k]; if (base) { const m = make("i", { class: "avnb-rule", title: `${rule}: ${base.value.toFixed(3)}` }); m.style.left = at(base.value); m.style.setProperty("--c", HUES[ink.dark ? "dark" : "light"][(j + 1) % 10]); bar.append(m); } }
        if (v.lo !== undefined) { const r = make("i", { class: "avnb-range" }); r.style.left = at(v.lo); r.style.width = `calc(${at(v.hi)} - ${at(v.lo)})`; bar.append(r); }
        const dot = make("i", { class: "avnb-dot" }); dot.style.left = at(v.value); bar.append(dot);
        return make("div", { class: "avnb-row", title: v.n ? `n = ${v.n}` : "" }, make("span", { text: k }), make("span", { class: "avnb-num", text: `${minus(v.value.toFixed(3))}${v.lo !== undefined ? ` [${minus(v.lo.toFixed(2))}, ${minus(v.hi.toFixed(2))}]` : ""}` }), bar);
      }), ...(rules.length ? [make("div", { class: "avnb-caption avnb-rules" }, ...[["this run", null], ...rules.map((r, j) => [r, HUES[ink.dark ? "dark" : "light"][(j + 1) % 10]])].map(([r, c]) => { const s = make("span", { class: c ? "avnb-rulekey" : "avnb-dotkey", text: r }); if (c) s.style.setProperty("--c", c); return s; }))] : []));
  };

  // -- together
  const refresh = () => {
    ink = inks(root);
    run.fill(model.get("runs").map((r) => [r, r]), model.get("run"));
    protocol.fill(facts.protocols.map((p) => [p, p || "all"]), model.get("protocol"));
    split.fill([...(facts.splits.length > 1 ? [["all", "all"]] : []), ...facts.splits.map((s) => [s, s || "all"])], model.get("split"));
    colour.show(model.get("colour_by"));
    drawKey(); drawGrid(); drawTable(); showChosen();
    share.textContent = `${shown().length} rows; the plane shows ${Math.round(100 * facts.share)} % of their variance (two principal components, each modality centred)`;
    root.dataset.rows = shown().length; dirty = true;
  };
  let layoutWidth = 0;
  const draw = () => {
    if (!alive) return;
    requestAnimationFrame(draw);
    if (!root.isConnected || !root.clientWidth || !dirty) return;
    if (!ink || layoutWidth !== root.clientWidth) { layoutWidth = root.clientWidth; refresh(); }
    dirty = false; drawMap();
    if (!root.dataset.drawn) { root.dataset.drawn = "1"; model.set("first_draw", Date.now() / 1000); model.save_changes(); }
  };
  const onMessage = (message, buffers) => {
    const { row, kind, missing } = message;
    if (missing) { waiting = null; tell(missing); return; }
    if (kind === "thumb") {
      const id = message.id; waiting = null;
      urls.set(id, URL.createObjectURL(new Blob([bytesOf(buffers[0])], { type: "image/jpeg" })));
      root.querySelectorAll(`img[data-id="${CSS.escape(id)}"]`).forEach((img) => { img.src = urls.get(id); });
    } else if (kind === "play" && row === played) {
      const [movie, tone] = message.parts.map((p) => (p === null ? null : bytesOf(buffers[p])));
      if (movie) { if (film.dataset.url) URL.revokeObjectURL(film.dataset.url); film.dataset.url = film.src = URL.createObjectURL(new Blob([movie], { type: "video/mp4" })); film.hidden = false; film.play().catch(() => {}); }
      tell(`playing ${rows().id[row]}, ${named(row)}`); root.dataset.played = `${rows().id[row]}|${rows().language[row]}|${rows().modality[row]}`;
      if (tone) sound.decode(tone).then((b) => { if (played === row) return sound.start(b, () => 0, () => tell(`${rows().id[row]}, ${named(row)}`)); }).catch((e) => tell(`This browser cannot play the sound: ${e.message}`));
    }
  };
  model.on("msg:custom", onMessage);
  const step = (way) => { const all = shown(); if (!all.length) return; const at = all.indexOf(model.get("chosen")); choose(all[(at + way + all.length) % all.length], false); };
  ownKeys(root, { ArrowLeft: () => step(-1), ArrowRight: () => step(1), space: () => { if (model.get("chosen") >= 0) ask(model.get("chosen")); }, Escape: () => { chooseCell(null); choose(-1, false); refresh(); } });
  const deaf = hear(model, Object.entries({
    facts: () => { facts = model.get("facts"); setCell(null); hush(); refresh(); }, xy: () => { xy = bytesOf(model.get("xy"), Float32Array); dirty = true; },
    protocol: () => { setCell(null); refresh(); }, split: () => { setCell(null); refresh(); }, colour_by: () => { if (!cellOf) picked = null; refresh(); },
    cell: () => { const cell = model.get("cell"); if ((cell ? cell.join("\t") : null) !== cellOf) { setCell(cell); refresh(); } },
    run: () => run.fill(model.get("runs").map((r) => [r, r]), model.get("run")), chosen: showChosen, neighbours: showChosen,
  }));
  const unwatch = onTheme(root, () => { ink = null; dirty = true; });
  film.hidden = true;
  root.avnb = { level: () => sound.level(), at: (i) => { const r = map.getBoundingClientRect(), [x, y] = box().at(i); return [r.left + x, r.top + y]; }, shown, film };
  requestAnimationFrame(draw);
  return () => { alive = false; unwatch(); sound.close(); film.pause(); for (const u of urls.values()) URL.revokeObjectURL(u); model.off("msg:custom", onMessage); deaf(); };
}

export default { render };

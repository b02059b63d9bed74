// DubBrowser: one scene, its tracks, and how far apart they are before and after training.

function render({ model, el }) {
  const sound = speaker();
  let film = null, asked = null;
  const facts = model.get("facts");
  const set = (values) => { for (const [k, v] of Object.entries(values)) model.set(k, v); model.save_changes(); };
  const still = make("img", { class: "avnb-still", alt: "" }), movie = make("video", { class: "avnb-film", playsinline: true, "aria-hidden": "true" }); movie.muted = true; movie.hidden = true;
  const pick = make("select", { "aria-label": "scene", onchange: () => set({ scene: pick.value }) }, ...facts.scenes.map(([id, text]) => make("option", { value: id, text })));
  const tracks = make("div", { class: "avnb-tracks", role: "group", "aria-label": "tracks" }), panels = make("div", { class: "avnb-panels" }), bars = make("div", { class: "avnb-bars" });
  const said = make("div", { class: "avnb-said", role: "status", "aria-live": "polite" });
  const root = make("div", { class: "avnb avnb-dubs", role: "group", "aria-label": "dub browser" },
    make("div", { class: "avnb-top" }, make("strong", { text: "One scene, its dubs" }), make("label", { class: "avnb-select" }, make("span", { class: "avnb-label", text: "scene" }), pick)),
    make("div", { class: "avnb-dubmain" }, make("div", {}, make("div", { class: "avnb-screen" }, still, movie), tracks), make("div", {}, panels, bars, make("div", { class: "avnb-caption", text: "Cosine distance between tracks of this scene, in units of the mean distance between two scenes in one language: 0 is the same place, 1 (dashed) is as far as another scene. Bars: mean over the spoken tracks of this scene; the fine line: over all scenes." }))),
    make("div", { class: "avnb-foot" }, said));
  el.append(root);

  const stop = () => { asked = null; sound.stop(); movie.pause(); movie.hidden = true; delete root.dataset.played; show(); };
  const play = (language) => { asked = language; set({ track: language }); said.textContent = `fetching ${facts.names[language]} …`; model.send({ ask: "play", scene: model.get("scene"), track: language }); show(); };
  const show = () => {
    pick.value = model.get("scene");
    const d = model.get("distances"), L = facts.tracks, thumb = facts.thumbs[model.get("scene")];
    if (thumb && still.dataset.scene !== model.get("scene")) {
      if (still.src) URL.revokeObjectURL(still.src);
      still.src = URL.createObjectURL(new Blob([bytesOf(model.get("thumbs")).subarray(...thumb)], { type: "image/jpeg" })); still.dataset.scene = model.get("scene");
    }
    tracks.replaceChildren(...L.map((l) => { const b = make("button", { type: "button", text: facts.names[l], "data-track": l, onclick: () => (asked === l ? stop() : play(l)) }); b.setAttribute("aria-pressed", String(asked === l)); return b; }));
    panels.replaceChildren(...Object.entries(d).map(([name, m]) => {
      const grid = make("div", { class: "avnb-distances", role: "img", "aria-label": `${name}: distances between ${L.join(", ")}: ${m.map((r) => r.map((v) => v.toFixed(2)).join(" ")).join("; ")}` });
      grid.style.gridTemplateColumns = `auto repeat(${L.length}, 40px)`;
      grid.append(make("span"), ...L.map((l) => make("span", { text: l, style: "text-align:center" })));
      m.forEach((row, i) => { grid.append(make("span", { text: L[i] }), ...row.map((v, j) => { const c = make("span", { class: "avnb-distance", text: i === j ? "" : v.toFixed(2) }); c.style.setProperty("--f", i === j ? 0 : clamp(v / 1.2, 0, 1)); return c; })); });
      return make("div", { class: "avnb-panel" }, make("h4", { text: name }), grid);
    }));
    bars.replaceChildren(...Object.entries(model.get("means")).flatMap(([name, [here, all]]) => {
      const bar = make("i"), other = make("b", { title: "another scene" }), mean = make("u", { title: "mean over all scenes" });
      bar.style.width = `${80 * clamp(here, 0, 1.25)}%`; other.style.left = "80%"; mean.style.left = `${80 * clamp(all, 0, 1.25)}%`;
      return [make("span", { text: name }), make("span", { class: "avnb-meter" }, bar, mean, other), make("span", { class: "avnb-num", text: `${here.toFixed(2)} here, ${all.toFixed(2)} over all scenes` })];
    }));
    root.dataset.scene = model.get("scene");
  };
  const onMessage = (message, buffers) => {
    if (message.missing) { asked = null; show(); said.textContent = message.missing; return; }
    if (message.track !== asked || message.scene !== model.get("scene")) return;
    const [a, b] = message.parts.map((p) => (p === null ? null : bytesOf(buffers[p])));
    if (a) { if (film) URL.revokeObjectURL(film); film = movie.src = URL.createObjectURL(new Blob([a], { type: "video/mp4" })); movie.hidden = false; movie.play().catch(() => {}); }
    said.textContent = `playing ${facts.names[message.track]}`; root.dataset.played = message.track;
    if (b) sound.decode(b).then((x) => (asked === message.track ? sound.start(x, () => 0, stop) : null)).catch((e) => { said.textContent = `This browser cannot play the sound: ${e.message}`; });
  };
  model.on("msg:custom", onMessage);
  const deaf = hear(model, [["scene", stop], ["distances", show], ["means", show]]); // another scene, whoever chose it: the old one's sound ends
  ownKeys(root, { Escape: stop });
  root.avnb = { level: () => sound.level() };
  show(); root.dataset.drawn = "1";
  return () => { sound.close(); movie.pause(); model.off("msg:custom", onMessage); deaf(); };
}

export default { render };

// The curves of runs: any measure by rounds, bytes or time, and what a target costs.
const percent = { tick: shortNumber, most: 100, said: (v) => v.toFixed(1) + " %" };
const MEASURES = {
  accuracy: { title: "Accuracy", label: "test accuracy, %", by: 100, better: 1, ...percent },
  perplexity: { title: "Perplexity", label: "test perplexity", log: true, better: -1 },
  exact: { title: "Exact match", label: "exact match of generated answers, %", by: 100, better: 1, ...percent },
  loss: { title: "Loss", label: "test loss", better: -1 },
  trained: { title: "Training loss", label: "training loss", better: -1 },
  noiseOfChange: { title: "Noise to signal", label: "noise of what is not sent, times the merged change" },
  noise: { title: "Noise to weights", label: "noise of what is not sent, % of the weights' size", by: 100, ...percent },
  conflict: { title: "Sign conflict", label: "parameters that two clients push apart, %", by: 100, ...percent },
};
const AXES = {
  round: { title: "rounds", label: "round", name: "Round", whole: true },
  moved: { title: "bytes both ways", label: "moved both ways by all clients (log scale)", name: "After", log: true, tick: shortBytes, said: humanBytes },
  up: { title: "bytes up", label: "uploaded by all clients (log scale)", name: "After", log: true, tick: shortBytes, said: humanBytes },
  down: { title: "bytes down", label: "downloaded by all clients (log scale)", name: "After", log: true, tick: shortBytes, said: humanBytes },
  seconds: { title: "time", label: "time", name: "After", tick: humanSeconds, said: humanSeconds },
};
// What a reader chose; it outlives a redrawing.
const chosen = {};

function points(one, facts, measure, axis) {
  const by = MEASURES[measure].by || 1;
  const start = measure === "perplexity" && axis === "round" && facts.before !== null ? [[0, facts.before]] : [];
  return start.concat(one.points.filter((p) => p[measure] !== undefined && p[axis] !== undefined && (!AXES[axis].log || p[axis] > 0))
    .map((p) => [p[axis], p[measure] * by]));
}

function measured(facts) {
  return Object.keys(MEASURES).filter((key) => facts.series.some((one) => one.points.some((p) => p[key] !== undefined)));
}

function choice(id, label, options, value, change) {
  const select = h("select", { id, onchange: (event) => change(event.target.value) }, options.map(([key, title]) => h("option", { value: key, selected: key === value }, title)));
  return h("label", { for: id }, label, select);
}

function curvesSection(facts, id, axis) {
  const place = h("div", {});
  const known = measured(facts);
  const usual = known.includes(facts.main) ? facts.main : known[0];
  const state = chosen[id] ||= { axis };
  if (!known.includes(state.measure)) state.measure = usual;
  const title = h("h2", {});
  function draw() {
    const measure = MEASURES[state.measure];
    title.textContent = `${measure.title} by ${AXES[state.axis].title}`;
    const series = facts.series.map((one, index) => ({ name: one.name, index, points: points(one, facts, state.measure, state.axis) })).filter((one) => one.points.length);
    const lowest = Math.min(...series.flatMap((one) => one.points.map((p) => p[1])));
    place.replaceChildren(series.length ? chart({ id: `${id}-plot`, title: title.textContent, series, x: AXES[state.axis], y: { ...measure, log: measure.log && lowest > 0 } }) : h("p", { class: "note" }, "Nothing was measured yet."));
  }
  draw();
  return h("section", {}, title, h("div", { class: "choices" },
    choice(`${id}-measure`, "Show", known.map((key) => [key, MEASURES[key].title]), state.measure, (value) => { state.measure = value; draw(); }),
    choice(`${id}-axis`, "by", Object.entries(AXES).map(([key, one]) => [key, one.title]), state.axis, (value) => { state.axis = value; draw(); })), place);
}

// The first round in which each run is as good as a number that the reader may change.
function targetSection(facts) {
  const main = MEASURES[facts.main], place = h("div", {});
  const state = chosen.target ||= {};
  if (state.value === undefined || !state.own) state.value = facts.target;
  function draw() {
    const rows = facts.series.map((one) => {
      const found = points(one, facts, facts.main, "round").find(([round, v]) => round > 0 && main.better * v >= main.better * state.value);
      const p = found && one.points.find((q) => q.round === found[0]);
      return p ? [one.name, String(p.round), humanBytes(p.up), humanBytes(p.down), humanBytes(p.moved), humanSeconds(p.seconds)] : [one.name, "not reached", "–", "–", "–", "–"];
    });
    place.replaceChildren(table(["Method", "Round", "Up", "Down", "Both ways", "Time"], rows, { first: (index) => swatch(index, facts.series.length) }));
  }
  draw();
  const input = h("input", { id: "target", type: "number", step: "any", value: state.value, oninput: (event) => {
    const value = Number(event.target.value);
    if (event.target.value === "" || !Number.isFinite(value)) return;
    Object.assign(state, { value, own: true });
    draw();
  } });
  return section("What a target costs", h("div", { class: "choices" }, h("label", { for: "target" }, `${main.title}${main.by ? ", %" : ""}, at ${main.better > 0 ? "least" : "most"}`, input)), place,
    h("p", { class: "note" }, "The first round that reaches it; bytes of all clients up to then."));
}

function histogramSection(facts) {
  const series = facts.series.map((one, index) => ({ name: one.name, index, histogram: facts.histograms[index] })).filter((one) => one.histogram)
    .map(({ name, index, histogram }) => ({ name, index, points: histogram.shares.map((share, place) => [histogram.edges[place], share]) }));
  if (!series.length) return null;
  return section("How far the parameters moved",
    h("p", { class: "note" }, `DARE is safe while most changes stay left of ${facts.safeDelta}, the dashed line.`),
    chart({ id: "moved-plot", title: "How far the parameters moved", series, steps: true, limit: Math.log10(facts.safeDelta),
      x: { label: "|change| of a parameter that moved (log scale)", name: "At", tick: (v) => shortNumber(10 ** v), said: (v) => shortNumber(10 ** v) },
      y: { label: "share of them, %", ...percent } }));
}

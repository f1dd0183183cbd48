// Line charts as SVG, drawn at the width that there is: text and marks keep their size.
const DASHES = ["", "7 4", "2 3", "10 3 2 3", "14 4", "4 2", "1 5", "9 2 2 2 2 2"];
const ROOM = { left: 58, right: 14, top: 34, bottom: 44 };
const MARK = 4.5; // the least radius of a mark
const EDGE = 12; // what axes leave for marks, so that none is cut

// Marks of eight shapes, by series; the first is a ring.
function mark(index, x, y, count = 1) {
  const r = radius(index, count);
  const shapes = [
    null, [[-r, -r], [r, -r], [r, r], [-r, r]], [[0, -r * 1.3], [r * 1.3, 0], [0, r * 1.3], [-r * 1.3, 0]],
    [[-r, r], [0, -r * 1.2], [r, r]], [[-r, -r], [0, r * 1.2], [r, -r]],
    [[-r, -r], [r, r], [0, 0], [r, -r], [-r, r], [0, 0]], [[-r, 0], [r, 0], [0, 0], [0, -r], [0, r], [0, 0]],
    [[0, -r * 1.3], [r * 1.2, -r * .3], [r * .8, r], [-r * .8, r], [-r * 1.2, -r * .3]],
  ];
  const at = { class: `mark s${index % 8}`, "data-mark": index };
  const shape = shapes[index % 8];
  if (!shape) return svg("circle", { ...at, cx: x, cy: y, r });
  return svg("polygon", { ...at, points: shape.map(([dx, dy]) => `${x + dx},${y + dy}`).join(" ") });
}

// Later curves are thinner and their marks smaller, so that one which they cover still shows at
// both sides.
function below(index, count) {
  return Math.max(0, Math.min(count, 4) - 1 - index);
}

function widthOf(index, count) {
  return 2 + 1.6 * below(index, count);
}

function radius(index, count) {
  return MARK + 1.3 * below(index, count);
}

function swatch(index, count) {
  return svg("svg", { class: "swatch", viewBox: "0 0 30 14", "aria-hidden": "true" },
    svg("path", { class: `curve s${index % 8}`, d: "M1 7H29", "stroke-dasharray": DASHES[index % 8],
      "stroke-width": widthOf(index, count) }), mark(index, 15, 7));
}

function ticksOf(low, high, log, whole) {
  if (log && high / low >= 3) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.ceil(Math.log10(high)); power++) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    }
    const inside = found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
    const decades = inside.filter((v) => Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-9);
    return inside.length <= 6 || decades.length < 2 ? thinned(inside) : thinned(decades);
  }
  const raw = (high - low) / 5 || 1;
  const size = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].map((n) => n * size).find((n) => n >= raw * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  // By number: values that are large for their step would never grow by it.
  const first = Math.ceil(low / step - 1e-9);
  const every = Array.from({ length: 12 }, (_, place) => Number(((first + place) * step).toPrecision(12)));
  return every.filter((v) => v <= high + step * 1e-9);
}

// The labels of ticks, in as few digits as tell each from the next.
function labelled(values, tick = shortNumber) {
  let texts = [];
  for (let digits = 3; digits <= 12; digits++) {
    texts = values.map((v) => tick(v, digits));
    if (new Set(texts).size === texts.length) break;
  }
  return values.map((v, place) => [v, texts[place]]);
}

function thinned(values) {
  const every = Math.ceil(values.length / 6);
  return values.filter((_, place) => place % every === 0);
}

function scale(values, from, to, { log, most = Infinity }) {
  const shown = log ? values.filter((v) => v > 0) : values;
  let low = Math.min(...shown), high = Math.max(...shown);
  if (!shown.length) [low, high] = log ? [1, 10] : [0, 1];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, Math.max(high, Math.min(high + 0.5, most))];
  const t = log ? Math.log10 : (v) => v;
  const place = (v) => from + (to - from) * (t(v) - t(low)) / (t(high) - t(low));
  return { low, high, place };
}

const HINT = "Point at the plot, or focus it and press the arrow keys, to read values. A curve's button hides it.";

// series: {name, index, points: [[x, y, label]]}; returns a figure that redraws itself.
function chart({ id, title, series, x, y, limit = null, steps = false }) {
  const hidden = new Set(), total = series.length;
  let cursor = -1, width = 0;
  const box = h("div", {});
  const readout = h("p", { class: "readout", role: "status", id: `${id}-said` }, HINT);
  const xs = [...new Set(series.flatMap((one) => one.points.map((p) => p[0])))].sort((a, b) => a - b);

  function shown() {
    return series.filter((one) => !hidden.has(one.index));
  }

  function draw() {
    const height = Math.max(230, Math.min(320, width * 0.62));
    const drawn = shown(), every = drawn.flatMap((one) => one.points);
    const sx = scale(every.map((p) => p[0]).concat(limit ?? []), ROOM.left + EDGE, width - ROOM.right - EDGE, x);
    const sy = scale(every.map((p) => p[1]), height - ROOM.bottom - EDGE, ROOM.top + EDGE, y);
    const bottom = height - ROOM.bottom;
    const parts = [];
    for (const [v, text] of labelled(ticksOf(sy.low, sy.high, y.log), y.tick)) {
      parts.push(svg("line", { class: "grid", x1: ROOM.left, x2: width - ROOM.right, y1: sy.place(v), y2: sy.place(v) }),
        svg("text", { x: ROOM.left - 7, y: sy.place(v) + 4, "text-anchor": "end" }, text));
    }
    let last = -Infinity;
    for (const [v, text] of labelled(ticksOf(sx.low, sx.high, x.log, x.whole), x.tick)) {
      const at = sx.place(v), half = 3.6 * text.length;
      parts.push(svg("line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 5 }));
      if (at - half < last + 6 || at + half > width) continue; // no label on another, none cut
      last = at + half;
      parts.push(svg("text", { x: at, y: bottom + 19, "text-anchor": "middle" }, text));
    }
    parts.push(svg("path", { class: "axis", fill: "none", d: `M${ROOM.left} ${ROOM.top}V${bottom}H${width - ROOM.right}` }),
      svg("text", { x: (ROOM.left + width - ROOM.right) / 2, y: height - 6, "text-anchor": "middle" }, x.label),
      svg("text", { x: 2, y: 14 }, y.label + (y.log ? " (log scale)" : "")));
    if (limit !== null) {
      parts.push(svg("line", { class: "limit", x1: sx.place(limit), x2: sx.place(limit), y1: ROOM.top, y2: bottom }));
    }
    for (const one of drawn) {
      const at = one.points.map((p) => [sx.place(p[0]), sy.place(p[1])]);
      const d = at.map(([a, b], place) => (place === 0 ? `M${a} ${b}` : steps ? `H${a}V${b}` : `L${a} ${b}`)).join("");
      parts.push(svg("path", { class: `curve s${one.index % 8}`, d, "stroke-width": steps ? 2 : widthOf(one.index, total),
        "stroke-dasharray": DASHES[one.index % 8] }));
      // Where there are many, each series has its marks at other places than the next one.
      const gap = Math.max(1, Math.ceil(at.length * 26 / width));
      if (!steps) {
        at.forEach(([a, b], place) => {
          if (place % gap === one.index % gap || place === at.length - 1) parts.push(mark(one.index, a, b, total));
        });
      }
    }
    if (cursor >= 0) {
      const at = sx.place(xs[cursor]);
      parts.push(svg("line", { class: "cursor", x1: at, x2: at, y1: ROOM.top, y2: bottom }));
    }
    const picture = svg("svg", { class: "plot", id, viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "img",
      "aria-label": `${title}: ${y.label} by ${x.label}. Arrow keys read the values.`, "aria-describedby": `${id}-said`,
      onkeydown: keys, onpointermove: (event) => near(event, sx), onpointerdown: (event) => near(event, sx) }, parts);
    const focused = document.activeElement?.id === id;
    box.replaceChildren(picture);
    if (focused) picture.focus({ preventScroll: true });
  }

  function near(event, sx) {
    const from = box.getBoundingClientRect().left;
    const apart = xs.map((v) => Math.abs(sx.place(v) - (event.clientX - from)));
    move(apart.indexOf(Math.min(...apart)));
  }

  function keys(event) {
    const to = { ArrowRight: cursor + 1, ArrowLeft: cursor - 1, Home: 0, End: xs.length - 1, Escape: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    move(event.key === "Escape" ? -1 : Math.max(0, Math.min(xs.length - 1, to)));
  }

  function move(to) {
    if (to === cursor) return;
    cursor = to;
    const at = xs[cursor];
    const said = cursor < 0 ? [] : shown().flatMap((one) => {
      const found = one.points.find((p) => p[0] === at);
      return found ? [`${one.name} ${(y.said || shortNumber)(found[1])}`] : [];
    });
    readout.replaceChildren(cursor < 0 ? HINT : `${x.name || x.label} ${(x.said || shortNumber)(at)}: ${said.join("; ")}`);
    draw();
  }

  const legend = h("div", { class: "legend", role: "group", "aria-label": "Curves" }, series.map((one, place) => h("button", {
    type: "button", id: `${id}-curve-${place}`, "aria-pressed": "true",
    onclick: (event) => {
      if (hidden.has(one.index)) hidden.delete(one.index);
      else if (hidden.size < total - 1) hidden.add(one.index);
      event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(one.index)));
      draw();
    },
  }, swatch(one.index, total), word(one.name))));
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = Math.max(260, entry.contentRect.width);
    draw();
  }).observe(box);
  return h("figure", { "aria-label": title }, box, total > 1 || series.length ? legend : null, readout);
}

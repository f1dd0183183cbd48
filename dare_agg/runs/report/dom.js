// Elements of the page. Every word is set as text: nothing that a run says becomes HTML.
const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat(Infinity).filter((one) => one !== null && one !== undefined)
    .map((one) => (one instanceof Node ? one : document.createTextNode(String(one)))));
  return element;
}

function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// A word of unknown origin: its writing direction stays its own.
function word(text) {
  return h("bdi", {}, text);
}

function humanBytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(count) < 1000) return (unit === "B" ? count.toFixed(0) : count.toFixed(1)) + " " + unit;
    count /= 1000;
  }
  return count.toFixed(1) + " TB";
}

function humanSeconds(seconds) {
  if (seconds < 90) return seconds.toFixed(0) + " s";
  return seconds < 5400 ? (seconds / 60).toFixed(0) + " min" : (seconds / 3600).toFixed(1) + " h";
}

function shortBytes(count) {
  return humanBytes(count).replace(".0 ", " ");
}

function shortNumber(value, digits = 3) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(digits - 2).replace("e+", "e").replace(".0e", "e");
  return String(Number(value.toPrecision(digits)));
}

// Says on the page that all of it is there, plots too, which are drawn once their width is known.
function drawn() {
  requestAnimationFrame(() => requestAnimationFrame(() => { document.documentElement.dataset.drawn = "yes"; }));
}

// A table that a narrow screen shows as one block a row, each cell under its column's name.
function table(columns, rows, { words = false, cell = null, first = null } = {}) {
  const head = h("tr", {}, columns.map((name) => h("th", { scope: "col" }, word(name))));
  const body = rows.map((row, index) => h("tr", {}, row.map((text, place) => {
    const made = cell ? cell(index, place, text) : null;
    const inner = place === 0 && first ? [first(index), word(text)] : [word(text)];
    return h("td", { "data-label": columns[place], class: made }, inner);
  })));
  return h("div", { class: "scroll" },
    h("table", { class: words ? "words" : null }, h("thead", {}, head), h("tbody", {}, body)));
}

function section(title, ...children) {
  return h("section", {}, h("h2", {}, word(title)), children);
}

// Draws parts anew only where what they show has changed; who was at a control stays there.
function keeper(place) {
  const shown = new Map();
  return (name, facts, draw) => {
    const text = JSON.stringify(facts);
    let part = shown.get(name);
    if (!part) {
      part = { box: h("div", { id: name }), text: null };
      shown.set(name, part);
      place.append(part.box);
    }
    if (part.text === text) return;
    part.text = text;
    const at = document.activeElement;
    const id = at && part.box.contains(at) ? at.id : "";
    part.box.replaceChildren(...[draw(facts)].flat().filter((one) => one !== null));
    if (id) document.getElementById(id)?.focus({ preventScroll: true });
  };
}

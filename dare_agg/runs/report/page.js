// The page of runs, part by part, from its facts; the same for a report and for a run that goes on.
const REASONS_SHOWN = 24;

function cardList(cards) {
  return h("ul", { class: "cards" }, cards.map((card) => h("li", {}, h("b", {}, word(card.figure)), h("span", {}, word(card.text)))));
}

function header(facts) {
  return h("header", {}, h("h1", {}, word(facts.title)), h("p", { class: "lead" }, word(facts.lead)));
}

function resultSection(facts) {
  const count = facts.series.length;
  return section("Result", table(facts.table.columns, facts.table.rows, { first: (index) => swatch(index, count) }),
    facts.coinciding.map((text) => h("p", { class: "note same" }, word(text))),
    h("details", {}, h("summary", {}, "What the columns say"), h("p", { class: "note" }, facts.tableNote,
      " “… in all” are bytes of all clients and rounds, as payloads.")));
}

function clientSections(facts) {
  return facts.clients.map((one) => {
    const most = 40, rows = one.rows.map((row) => row.cells);
    const made = (list, from) => {
      const shown = table(one.columns, list, { words: false, cell: (index, place) => {
        const row = one.rows[from + index];
        if (place === 1) return "amount";
        if (place !== one.columns.length - 1) return null;
        return row.good ? (row.waited ? "warn" : null) : "bad";
      } });
      shown.querySelectorAll("tbody tr").forEach((line, index) => {
        const row = one.rows[from + index];
        if (row.share > 0) {
          line.children[1].append(svg("svg", { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
            svg("rect", { x: 0, y: 0, width: 100 * row.share, height: 8, rx: 2 })));
        }
      });
      return shown;
    };
    const left = rows.length - most;
    return section(`Clients of round ${one.round}: ${one.name}`, made(rows.slice(0, most), 0),
      left > 0 ? h("details", {}, h("summary", {}, `${left} more`), made(rows.slice(most), most)) : null);
  });
}

function answerSections(facts) {
  return facts.answers.map((one) => section(one.title,
    table(one.columns, one.rows, { words: true, cell: (index, place) => (place >= 2 && one.right[index][place - 2] ? "good" : null) }),
    h("p", { class: "note" }, one.note + " Right answers are marked.")));
}

function warningSection(warnings) {
  if (!warnings.length) return null;
  return section("Warning", warnings.slice(-REASONS_SHOWN).map((text) => h("p", { class: "warn" }, word(text))));
}

// Everything below the head, in order; `keep` draws each part only when its facts change.
function drawBody(facts, keep) {
  const curves = { series: facts.series, before: facts.before, main: facts.main };
  const measuredYet = measured(facts).length > 0;
  keep("warnings", facts.warnings, (found) => [warningSection(found)]);
  keep("result", [facts.table, facts.coinciding, facts.tableNote], () => [facts.series.length ? resultSection(facts) : null]);
  keep("curves", curves, () => [measuredYet ? h("div", { class: "pair" }, curvesSection(facts, "by-round", "round"), curvesSection(facts, "by-bytes", "moved")) : null]);
  keep("target-cost", [facts.series, facts.target, facts.main], () => [facts.target === null ? null : targetSection(facts)]);
  keep("clients", facts.clients, () => clientSections(facts));
  keep("missed", facts.missed, (found) => [found.rows.length ? section(found.title, table(found.columns, found.rows, { words: true })) : null]);
  keep("settings", facts.settings, (found) => [found ? section("Settings that differ", table(found.columns, found.rows, { words: true })) : null]);
  keep("answers", facts.answers, () => answerSections(facts));
  keep("tasks", facts.tasks, (found) => found.map((one) => section(one.title, table(one.columns, one.rows))));
  keep("moved", facts.histograms, () => [histogramSection(facts)]);
  keep("provenance", facts.provenance, (text) => [text ? h("section", {}, h("details", {}, h("summary", {}, "Configuration and provenance"),
    h("pre", { tabindex: 0, "aria-label": "Configuration" }, text))) : null]);
}

function drawFooter(facts, keep) {
  keep("footer", facts.footer, (text) => [h("footer", {}, word(text))]);
}

// A run that goes on: its facts come again and again from where this page came.
const PAUSE = 1000, HIDDEN_PAUSE = 5000;
const main = document.getElementById("page");
main.replaceChildren();
const keep = keeper(main);
let seen = "", timer = 0;

function progressOf(live) {
  if (!live.planned) return null;
  return h("progress", { max: live.planned, value: live.done, "aria-label": `${live.done} of ${live.planned} rounds` });
}

function logSection(text) {
  const before = document.querySelector("#log pre");
  const bottom = !before || before.scrollHeight - before.scrollTop - before.clientHeight < 40;
  const pre = h("pre", { id: "log-text", tabindex: 0, "aria-label": "The end of the log" }, text);
  const from = before ? before.scrollTop : 0;
  requestAnimationFrame(() => { pre.scrollTop = bottom ? pre.scrollHeight : from; });
  return section("Log", pre);
}

function show(facts) {
  const live = facts.live;
  document.title = `${live.state} · ${facts.title}`;
  keep("head", [facts.title, facts.lead], () => [header(facts)]);
  keep("state", [live.state, live.error, live.now, live.done, live.planned], () => [h("section", {},
    h("h2", {}, word(live.state)), live.error ? h("p", { class: "bad" }, word(live.error)) : null,
    h("p", { role: "status", id: "now" }, word(live.now)), progressOf(live))]);
  keep("cards", facts.cards, (cards) => [cardList(cards)]);
  drawBody(facts, keep);
  keep("log", live.log, (text) => [text ? logSection(text) : section("Log", h("p", { class: "note" }, "No log is in the run's folder."))]);
  drawFooter(facts, keep);
  drawn();
}

function lost() {
  keep("lost", "lost", () => [section("No answer", h("p", { class: "bad", role: "alert" },
    "dare-agg watch has ended, or cannot be reached. What stands here is what it said last."))]);
}

function found() {
  keep("lost", "", () => []);
}

async function ask() {
  try {
    const answer = await fetch("facts", { headers: seen ? { "If-None-Match": seen } : {}, cache: "no-store" });
    if (answer.status !== 200) return answer.status === 304;
    seen = answer.headers.get("ETag") || "";
    return await answer.json();
  } catch {
    return false;
  }
}

async function look() {
  clearTimeout(timer);
  const answer = await ask();
  timer = setTimeout(look, document.hidden ? HIDDEN_PAUSE : PAUSE);
  if (answer === false) return lost();
  found();
  if (answer !== true) show(answer);
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
keep("lost", "", () => []);
look();

// A report: its facts stand in the file.
const facts = JSON.parse(document.getElementById("facts").textContent);
const main = document.getElementById("page");
main.replaceChildren();
const keep = keeper(main);
keep("head", [facts.title, facts.lead], () => [header(facts)]);
keep("cards", facts.cards, (cards) => [cards.length ? cardList(cards) : null]);
drawBody(facts, keep);
drawFooter(facts, keep);
drawn();

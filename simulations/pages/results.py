"""Fills the tables and pictures of ``docs/RESULTS.md`` from the committed results.

``python -m simulations.pages.results`` replaces what stands between ``<!-- begin NAME -->`` and
``<!-- end NAME -->``; the words around are written by hand. With ``--only SECTION`` it prints
it alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from simulations.pages import abilities as ability_pages
from simulations.pages import asynchronous as async_pages
from simulations.pages import frontier, language, large, plots, private, small, tables
from simulations.pages import gram as gram_pages
from simulations.pages import links as link_pages
from simulations.pages import weights as weight_pages
from simulations.runs.rows import RESULTS, read_rows
from simulations.runs.scenario import SCENARIOS, read_scenario

PAGE = Path(__file__).parents[2] / "docs" / "RESULTS.md"
PLOTS = PAGE.parent / "plots"
COMPACT = "DARE p=.995, union down"


def _rows(name: str) -> list[dict]:
    rows = read_rows(RESULTS / f"{name}.jsonl")
    if not rows:
        raise KeyError(name)
    return rows


def _of_scenario(name: str) -> list[dict]:
    """The rows that the scenario asks for now, in its order; those of older settings stay out."""
    rows = {row["key"]: row for row in _rows(name)}
    wanted = sorted(read_scenario(SCENARIOS / f"{name}.toml").rows(), key=lambda row: row.seed)
    found = [rows[row.key] for row in wanted if row.key in rows]
    if not found:
        raise KeyError(name)
    return found


def _image(path: Path, text: str) -> str:
    return f"![{text}]({path.relative_to(PAGE.parent).as_posix()})"


def headline() -> str:
    """Table after round 12, and accuracy by round and by bytes."""
    rows = _rows("headline")
    first = plots.federated_plot(rows, PLOTS / "headline-rounds.svg", by_bytes=False)
    second = plots.federated_plot(rows, PLOTS / "headline-bytes.svg", by_bytes=True)
    return "\n\n".join(
        (
            tables.federated_table(rows, 12),
            _image(first, "accuracy by round"),
            _image(second, "accuracy by megabytes moved"),
        )
    )


def traffic() -> str:
    rows = _rows("traffic")
    path = plots.federated_plot(rows, PLOTS / "traffic-bytes.svg", by_bytes=True)
    return frontier.traffic_table(rows) + "\n\n" + _image(path, "accuracy by megabytes moved")


def frontier_images() -> str:
    return _frontier("frontier-images")


def frontier_text() -> str:
    return _frontier("frontier-text")


def _frontier(name: str) -> str:
    rows = _of_scenario(name)
    path = plots.frontier_plot(rows, PLOTS / f"{name}.svg")
    return frontier.frontier_table(rows) + "\n\n" + _image(path, "accuracy by megabytes moved")


def frontier_choices() -> str:
    return frontier.frontier_table(_of_scenario("frontier-choices"))


def frontier_mixtures() -> str:
    return _mixtures("frontier-mixtures")


def frontier_text_mixtures() -> str:
    return _mixtures("frontier-text-mixtures")


def _mixtures(name: str) -> str:
    rows = _of_scenario(name)
    return frontier.mixtures_table(rows) + "\n\n" + frontier.mixtures_bytes_table(rows)


def single() -> str:
    rows = _rows("single")
    path = plots.single_plot(rows, PLOTS / "single.svg")
    return "\n\n".join(
        (_image(path, "accuracy by drop rate"), tables.single_table(rows), tables.delta_table(rows))
    )


def hard() -> str:
    """A delta in few bits where DARE alone breaks the model, by way."""
    return tables.hard_table(_of_scenario("hard"))


def merging() -> str:
    return tables.merging_table(_rows("merging"))


def merging_mpnet() -> str:
    """The same four tasks of a larger encoder."""
    return tables.merging_table(_of_scenario("merging-mpnet"))


def gram() -> str:
    """Four tasks merged from updates that carry directions, by bits."""
    rows = _of_scenario("gram")
    path = gram_pages.gram_plot(rows, _rows("merging"), PLOTS / "gram.svg")
    return _image(path, "accuracy by bits a parameter") + "\n\n" + gram_pages.gram_table(rows)


def gram_mpnet() -> str:
    """A larger encoder merged from updates that carry directions."""
    return gram_pages.gram_table(_of_scenario("gram-mpnet"))


def gram_pictures() -> str:
    """Networks of pictures, a view each, merged from updates that carry directions."""
    return gram_pages.pictures_table(_of_scenario("gram-pictures"))


def learned_rounds() -> str:
    """Rounds in which only the survivors of the plan's mask learn."""
    return small.learned_rounds_table(_of_scenario("learned-rounds"))


def secure_rates() -> str:
    """Secure rounds by keep rates; the table of docs/SECURE.md."""
    return small.secure_rates_table(_of_scenario("secure-rates"))


def gram_rounds() -> str:
    """Clients of different tasks in rounds, by merge."""
    return gram_pages.rounds_table(_of_scenario("gram-rounds"))


def abilities() -> str:
    """Three abilities of a decoder in one model, by what was sent and merge method."""
    rows = _of_scenario("abilities")
    path = ability_pages.abilities_plot(rows, PLOTS / "abilities.svg")
    return ability_pages.abilities_table(rows) + "\n\n" + _image(path, "share of the gain kept")


def ability_pairs() -> str:
    return ability_pages.pairs_table(_of_scenario("abilities"))


def ability_sizes() -> str:
    """The same abilities in a larger model."""
    return ability_pages.abilities_table(_of_scenario("abilities-gemma"))


def ability_rounds() -> str:
    """The same abilities learned in rounds, a client each."""
    return ability_pages.rounds_table(_of_scenario("abilities-federated"))


def lm_single() -> str:
    rows = _rows("lm-single")
    curve = language.loss_plot(rows, PLOTS / "lm-single.svg")
    delta = language.delta_plot(rows, PLOTS / "lm-delta.svg")
    return "\n\n".join(
        (
            _image(curve, "loss by drop rate"),
            language.loss_table(rows),
            _image(delta, "range of the delta"),
        )
    )


def lm() -> str:
    return language.federated_loss_table(_rows("lm"))


def adapters() -> str:
    return language.adapters_table(_rows("adapters"))


def sizes() -> str:
    return language.sizes_table(_rows("sizes"), _rows("lm-single"))


def weights() -> str:
    """What weights in bfloat16 leave of what float32 ones learn."""
    return weight_pages.weights_table(_of_scenario("weights"))


def rate() -> str:
    rows = _rows("rate")
    path = plots.rate_plot(rows, PLOTS / "rate.svg")
    return _image(path, "error by bits") + "\n\n" + tables.rate_table(rows)


def links() -> str:
    return link_pages.links_table(_rows("traffic"), COMPACT)


def asynchronous() -> str:
    """A buffer beside rounds, on the virtual clock."""
    rows = _of_scenario("asynchronous")
    shown = [row for row in rows if ";" not in row["cell"]]  # of one division of the data
    path = async_pages.clock_plot(shown, PLOTS / "asynchronous.svg")
    return async_pages.clock_table(rows) + "\n\n" + _image(path, "accuracy by virtual hours")


def asynchronous_choice() -> str:
    return async_pages.clock_table(_of_scenario("asynchronous-choice"), "FedAvg", "rounds")


def many_clients() -> str:
    """Ten thousand clients over a day, some of them liars."""
    return async_pages.day_table(_of_scenario("many-clients"))


def engine() -> str:
    """Flower's engine with many simulated clients, by round."""
    lines = []
    for row in _rows("engine"):
        for measured in row["rounds"]:
            lines.append(
                (
                    row["method"],
                    f"{row['clients']:,}",
                    str(measured["round"]),
                    f"{100 * measured['accuracy']:.1f}",
                    f"{measured['accepted']:,}",
                    tables.human_bytes(measured["upload_bytes"]),
                    tables.human_bytes(measured["download_bytes"]),
                    f"{measured['seconds']:.0f}",
                    f"{row['peak_mib']:,}",
                )
            )
    columns = (
        "Method",
        "Clients",
        "Round",
        "Accuracy, %",
        "Updates",
        "Up, all",
        "Down, all",
        "Seconds",
        "All processes, peak MiB",
    )
    return tables.markdown(columns, lines)


def scale() -> str:
    lines = [
        (
            row["method"],
            f"{row['clients']:,}",
            f"{row['parameters']:,}",
            row["drop_rate"],
            f"{row['survivors']:,}",
            tables.human_bytes(row["update_bytes"]),
            f"{row['server_cpu_seconds']:.2f}",
            f"{1e9 * row['server_cpu_seconds'] / row['survivors']:.0f}",
            f"{row['peak_mib']:,}",
            f"{row['model_mib']:,}",
        )
        for row in _rows("scale")
    ]
    columns = (
        "Method",
        "Clients",
        "Parameters",
        "Drop rate",
        "Survivors, all",
        "One update",
        "Server, CPU s",
        "ns a survivor",
        "Memory, MiB",
        "A model, MiB",
    )
    return tables.markdown(columns, lines)


def large_models() -> str:
    """Rounds on models of up to billions of parameters, beside other tools."""
    return large.large_table(_rows("llm"), read_rows(RESULTS / "exchange.jsonl"))


def fine_tuning() -> str:
    return large.fine_tuning_table(_rows("fine_tuning"))


def privacy() -> str:
    """Accuracy by ε, number of clients and drop rate, beside Flower's wrapper."""
    return private.private_table(_of_scenario("private"))


def apart() -> str:
    """Clients who come rounds apart, beside sampled ones."""
    return private.apart_table(_of_scenario("private-apart"), _of_scenario("private"))


def private_records() -> str:
    """Parties that keep their rows to themselves, by ε."""
    return private.records_table(_of_scenario("private-records"))


def audit() -> str:
    return private.audit_table(_rows("audit"))


def cost() -> str:
    """CPU hours and versions of everything above; a run that two tables share counts once."""
    lines = []
    counted: set[str] = set()
    for path in sorted(RESULTS.glob("*.jsonl")):
        rows = read_rows(path)
        own = [row for row in rows if row.get("key") not in counted]
        counted |= {row["key"] for row in rows if "key" in row}
        spent = [
            row[name] for row in own for name in ("cpu_seconds", "codec_cpu_seconds") if name in row
        ]
        hours = f"{sum(spent) / 3600:.2f}" if spent or not own else "not recorded"
        stamps = {
            ", ".join(f"{k} {v}" for k, v in row["versions"].items())
            for row in rows
            if "versions" in row
        }
        seeds = sorted({row["seed"] for row in rows if "seed" in row})
        shown = ", ".join(map(str, seeds)) or "–"
        lines.append((path.stem, str(len(rows)), shown, hours, "; ".join(sorted(stamps))))
    return tables.markdown(("Results", "Rows", "Seeds", "CPU hours", "Versions"), lines)


SECTIONS: Mapping[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        headline,
        traffic,
        frontier_images,
        frontier_choices,
        frontier_mixtures,
        frontier_text,
        frontier_text_mixtures,
        engine,
        single,
        hard,
        learned_rounds,
        secure_rates,
        merging,
        merging_mpnet,
        gram,
        gram_mpnet,
        gram_pictures,
        gram_rounds,
        abilities,
        ability_pairs,
        ability_sizes,
        ability_rounds,
        lm_single,
        lm,
        adapters,
        sizes,
        weights,
        rate,
        links,
        asynchronous,
        asynchronous_choice,
        many_clients,
        scale,
        large_models,
        fine_tuning,
        privacy,
        apart,
        private_records,
        audit,
        cost,
    )
}


def fill(text: str) -> str:
    """Return the page with every section that has results filled anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.S)
        if not pattern.search(text):
            continue
        try:
            body = make()
        except (KeyError, IndexError, StopIteration, ZeroDivisionError) as error:
            sys.stderr.write(f"{name}: not enough results yet ({error!r})\n")
            continue
        text = pattern.sub(lambda found, body=body: found[1] + body + "\n" + found[2], text)
    return text


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.pages.results", description=__doc__
    )
    parser.add_argument("--only", choices=SECTIONS, help="print this section, change no page")
    only = parser.parse_args().only
    if only:
        print(SECTIONS[only]())
    else:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

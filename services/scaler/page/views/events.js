/** Events and operations: each has an address of its own, `#/events/ID`. */

import { fill, h, panel, setText } from "../dom.js";
import { clock, plural, words } from "../format.js";
import { operationsTable, operationView } from "../operation.js";

const SHOWN = 200;
const newest = `, the newest ${SHOWN} shown`;

function build({ store }) {
  let wanted = "";
  const kind = h(
    "select",
    { id: "event-kind", onchange: () => update(store.state) },
    h("option", { value: "" }, "all kinds"),
  );
  const filter = h("input", {
    type: "search",
    id: "event-filter",
    placeholder: "text, rank or operation",
    oninput: () => update(store.state),
  });
  const count = h("p", { class: "count", role: "status" });
  const list = h("ol", { class: "events", "aria-label": "Events, newest first" });
  const operations = h("div", {});
  const one = h("div", { hidden: true });
  let drawn = [];

  function offerKinds(known) {
    if (kind.options.length > 1) return;
    for (const name of Object.keys(known)) kind.append(h("option", { value: name }, words(name)));
  }

  function matches({ id, event }) {
    const text = filter.value.trim().toLowerCase();
    if (kind.value !== "" && event.kind !== kind.value) return false;
    return (
      text === "" || `${id} ${event.kind} ${event.reason} ${JSON.stringify(event.facts)}`.toLowerCase().includes(text)
    );
  }

  function update(state) {
    offerKinds(state.words.events);
    const found = state.events.filter(matches);
    const refused = state.eventsRefused
      ? ` No more come for now: ${state.eventsRefused}.`
      : state.isPastTold
        ? ""
        : " Loading…";
    setText(
      count,
      `${plural(found.length, "event")} of ${state.events.length}${found.length > SHOWN ? newest : ""}.${refused}`,
    );
    if (drawn.length !== found.length || drawn[0] !== found[0] || drawn.wanted !== wanted) {
      drawn = found;
      drawn.wanted = wanted;
      fill(
        list,
        found.slice(0, SHOWN).map((entry) => line(entry, entry.id === wanted, state.words.events)),
      );
      list.querySelector(".wanted")?.scrollIntoView({ block: "center" });
    }
    const all = state.operations?.operations ?? [];
    const known = [state.operation, ...all].find((operation) => operation?.op_id === wanted);
    one.hidden = known === undefined;
    if (known !== undefined) fill(one, panel(`Operation ${known.op_id}`, operationView(known)));
    fill(operations, all.length ? operationsTable(all) : h("p", {}, "There was none yet."));
  }

  const element = h(
    "div",
    {},
    one,
    panel(
      "Events",
      h(
        "div",
        { class: "bar-of-tools" },
        h("label", { class: "inline", for: "event-kind" }, "Kind"),
        kind,
        h("label", { class: "inline", for: "event-filter" }, "Filter"),
        filter,
        count,
      ),
      list,
    ),
    panel("Operations", operations),
  );
  return {
    element,
    update,
    address: (rest) => {
      wanted = rest;
    },
  };
}

function line({ id, event }, isWanted, known) {
  const facts = Object.entries(event.facts)
    .filter(([name]) => name !== "evidence")
    .map(([name, value]) =>
      name === "op_id"
        ? h("a", { class: "fact", href: `#/events/${value}` }, value)
        : h("span", { class: "fact" }, `${words(name)} ${value}`),
    );
  return h(
    "li",
    { id: `event-${id}`, class: isWanted && "wanted", "data-kind": event.kind, "aria-current": isWanted && "true" },
    h("a", { class: "when", href: `#/events/${id}`, title: `Event ${id}` }, clock(event.time_unix)),
    h("b", { title: known[event.kind] }, words(event.kind)),
    h("span", {}, event.reason),
    facts,
  );
}

export const events = { title: "Events", needs: ["operations", "events"], build };

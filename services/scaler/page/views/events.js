/** Events and operations: each has an address of its own, `#/events/ID`. */

import { fillByKey, h, panel, patch, setText } from "../dom.js";
import { clock, plural, words } from "../format.js";
import { operationsTable, operationView } from "../operation.js";

const SHOWN = 200;
const newest = `, the newest ${SHOWN} shown`;

function build({ store, ask }) {
  let wanted = "";
  let asked = null; // { op_id, operation }: one that is in no list; `operation` null: nor is it kept
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
  const lines = new Map();
  let pointed = ""; // the event that the view has been scrolled to

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
    fillByKey(
      list,
      lines,
      found.slice(0, SHOWN),
      ({ id }) => id,
      (entry) => line(entry, state.words.events),
    );
    point();
    const all = state.operations?.operations ?? [];
    patch(operations, all.length ? operationsTable(all) : h("p", {}, "There was none yet."));
    showOne(state, [state.operation, ...all]);
  }

  /** Mark the event that the address names, and scroll to it once. */
  function point() {
    for (const [id, element] of lines) {
      element.classList.toggle("wanted", id === wanted);
      if (id === wanted) element.setAttribute("aria-current", "true");
      else element.removeAttribute("aria-current");
    }
    if (pointed === wanted || !lines.has(wanted)) return;
    pointed = wanted;
    lines.get(wanted).scrollIntoView({ block: "center" });
  }

  /** The operation that the address names, or that what it names is not kept. */
  function showOne(state, operations) {
    const isEvent = state.events.some(({ id }) => id === wanted);
    const listed = operations.find((operation) => operation?.op_id === wanted);
    const isAll = state.isPastTold && state.operations !== null;
    if (listed === undefined && !isEvent && wanted !== "" && isAll) find(wanted);
    const known = listed ?? (asked?.op_id === wanted ? asked.operation : undefined);
    one.hidden = known === undefined || isEvent;
    if (one.hidden) return;
    if (known === null) patch(one, panel(wanted, h("p", {}, "This event or operation is not kept any more.")));
    else patch(one, panel(`Operation ${known.op_id}`, operationView(known)));
  }

  async function find(id) {
    if (asked?.op_id === id) return;
    asked = { op_id: id };
    try {
      const { value } = await ask("GET", `/v1/operations/${encodeURIComponent(id)}`);
      asked = { op_id: id, operation: value };
    } catch (refusal) {
      if (refusal.status === undefined) throw refusal;
      asked = refusal.status === 404 || refusal.status === 422 ? { op_id: id, operation: null } : null;
    }
    if (wanted === id) update(store.state);
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
      if (rest !== wanted) pointed = "";
      wanted = rest;
    },
  };
}

function line({ id, event }, known) {
  const facts = Object.entries(event.facts)
    .filter(([name]) => name !== "evidence")
    .map(([name, value]) =>
      name === "op_id"
        ? h("a", { class: "fact", href: `#/events/${value}` }, value)
        : h("span", { class: "fact" }, `${words(name)} ${value}`),
    );
  return h(
    "li",
    { id: `event-${id}`, "data-kind": event.kind },
    h("a", { class: "when", href: `#/events/${id}`, title: `Event ${id}` }, clock(event.time_unix)),
    h("b", { title: known[event.kind] }, words(event.kind)),
    h("span", {}, event.reason),
    facts,
  );
}

export const events = { title: "Events", needs: ["operations", "events"], build };

/**
 * All that the page knows, in one place. The feed and the forms write it, views read it: data flows one way.
 *
 * connection: { state: "connecting" | "live" | "stale" | "refused", since, why }
 * now: GET /v1/now without its rows; devices: Map by name; ranks: Map by slot
 * series: by step, { cursor, columns }; step, rows: what of it is shown
 * policy, decisions, operations, operation, layout, experts, processes: as the API answers them; null before;
 *   last: `operations` with the newest one only
 * moves: who sends how much to whom in the operation in progress, or in the one before, as its op_id says
 * asOf: by name, of `now` and of those, when it was right, in ms; Infinity: it still is
 * events: [{ id, event }], newest first; isPastTold: those that there were have come; eventsRefused: why none come
 * words: of reasons and events
 */
export function createStore() {
  let state = {
    connection: { state: "connecting", since: Date.now(), why: "" },
    now: null,
    devices: new Map(),
    ranks: new Map(),
    series: {},
    step: 1,
    rows: 900,
    policy: null,
    decisions: null,
    operations: null,
    operation: null,
    last: null,
    moves: null,
    asOf: {},
    layout: null,
    experts: null,
    processes: null,
    events: [],
    isPastTold: false,
    eventsRefused: "",
    words: { reasons: {}, events: {} },
  };
  const listeners = new Set();
  let isDue = false;
  const tell = () => {
    isDue = false;
    for (const listener of listeners) listener(state);
  };
  return {
    get state() {
      return state;
    },
    /** Change some parts. Listeners hear of it once, before the next frame. */
    update(patch) {
      state = { ...state, ...patch };
      if (isDue) return;
      isDue = true;
      queueMicrotask(tell);
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

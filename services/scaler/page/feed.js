/**
 * Brings what the page shows from the scaler into the store. One request after the other. What is looked at again and
 * again has a budget of bytes, and so has each larger resource, which thus holds up nothing but itself.
 *
 * When nobody answers, what is there stays and is marked as stale, until somebody does.
 */

import { get, listen } from "./api.js";

const BYTES_PER_S = 2_500;
const BURST_BYTES = 150_000;
const LOOK_PAUSE_MS = 5_000; // for bytes, at most: what is looked at is no older
const RESOURCE_PAUSE_MS = 60_000; // the same of a larger resource
const HEAD_BYTES = 400; // of each answer, beside its body
const PAUSE_MS = 1_000;
const BUSY_PAUSE_MS = 300; // while an operation is in progress
const RETRY_MS = 1_500;
const STALE_MS = 3_000; // without an answer: who waits for a scaler that restarts is not refused
const LISTEN_AGAIN_MS = 3_000;
const EVENTS_KEPT = 1_000;
const ROWS_KEPT = { 1: 900, 15: 5_760 };

/**
 * What views may need beside /v1/now and /v1/series: where it is, and `key`: it is asked for again when that has
 * changed, or `everyMs` have passed. For what it has cost it waits `pauseMs` at most.
 */
const RESOURCES = {
  policy: { path: () => "/v1/policy", key: () => "", everyMs: 2_000 },
  operation: {
    path: (state) => `/v1/operations/${state.now.operation}`,
    key: (state) => state.now.operation,
    everyMs: 0,
    pauseMs: LOOK_PAUSE_MS,
  },
  last: { path: () => "/v1/operations?limit=1", key: operationsKey, pauseMs: LOOK_PAUSE_MS },
  decisions: { path: () => "/v1/decisions?limit=40", key: (state) => state.policy?.decision?.time_unix },
  operations: { path: () => "/v1/operations?limit=20", key: operationsKey },
  experts: { path: () => "/v1/experts", key: (state) => state.now.epoch, everyMs: 10_000 },
  layout: { path: () => "/v1/layout", key: layoutKey },
  processes: { path: () => "/v1/processes", key: (state) => state.now.fence, everyMs: 2_000 },
};

function operationsKey({ now }) {
  return `${now.operation} ${now.epoch}`;
}

/** A standby may take a seat between two looks: then the event tells, or the layout, with a rank that is not ready. */
function layoutKey({ now, devices, events, layout }) {
  const seats = [...devices.values()].map((device) => `${device.rank}${device.isReady}`).join();
  const fault = events.find(({ event }) => event.kind.startsWith("rank_"))?.id;
  const unsettled = layout?.ranks.every((rank) => rank.ready) ? "" : now.cursor;
  return [now.epoch, now.operation, now.phase, now.fence, seats, fault, unsettled].join();
}

/** Bytes that may be read: BYTES_PER_S, after a first burst. */
class Budget {
  #left = BURST_BYTES;
  #at = Date.now();
  #least;

  /** `pauseMs`: longer than that nothing is paused for; what has cost more is forgiven. */
  constructor(pauseMs) {
    this.#least = (-pauseMs / 1_000) * BYTES_PER_S;
  }

  charge(bytes) {
    this.#left = Math.max(this.#least, this.#refilled() - bytes);
  }

  /** For how long nothing may be read. */
  get pauseMs() {
    return Math.max(0, (-this.#refilled() / BYTES_PER_S) * 1_000);
  }

  #refilled() {
    const now = Date.now();
    this.#left = Math.min(BURST_BYTES, this.#left + ((now - this.#at) / 1_000) * BYTES_PER_S);
    this.#at = now;
    return this.#left;
  }
}

export class Feed {
  #store;
  #needs = () => [];
  #asked = {}; // by resource, its key and when it was asked for
  #budget = new Budget(LOOK_PAUSE_MS); // of what each turn asks for
  #budgets = {}; // by resource
  #timer = 0;
  #isAsking = false;
  #isWanted = false; // somebody has nudged since the last turn began
  #isStopped = true;
  #listening = null; // ends the stream of events
  #lastEventId = "0";

  /** `needs()`: names of RESOURCES that the present view shows, and `events`. */
  constructor(store, needs) {
    this.#store = store;
    this.#needs = needs;
    document.addEventListener("visibilitychange", () => this.nudge());
    // A browser that keeps a page for its "back" button stops its timers and leaves its connections open.
    addEventListener("pagehide", () => this.#unlisten());
  }

  /** Begin, also again, with another token. */
  start() {
    this.#isStopped = false;
    this.#asked = {};
    this.nudge();
  }

  /** Ask nothing more. */
  stop() {
    this.#isStopped = true;
    clearTimeout(this.#timer);
    this.#unlisten();
  }

  /** Look now: the view is another one, or something was ordered. `name`: of a resource that is out of date. */
  nudge(name) {
    if (name !== undefined) delete this.#asked[name];
    this.#isWanted = true;
    if (this.#isStopped || this.#isAsking) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#turn(), 0);
  }

  async #turn() {
    if (document.hidden) this.#unlisten();
    if (document.hidden || this.#isStopped) return;
    this.#isAsking = true;
    let pauseMs = PAUSE_MS;
    this.#isWanted = false;
    try {
      await this.#look();
      this.#connection("live", "");
      const least = this.#store.state.now.operation === null ? PAUSE_MS : BUSY_PAUSE_MS;
      pauseMs = Math.max(least, this.#budget.pauseMs);
    } catch (refusal) {
      const isRefusal = refusal.status !== undefined;
      if (!isRefusal) console.error(refusal);
      const why = isRefusal ? refusal.message : `this page has an error, reload it (${refusal.message})`;
      this.#connection(refusal.status === 401 ? "refused" : "stale", why);
      pauseMs = RETRY_MS;
      if (refusal.status === 401) this.stop();
    } finally {
      this.#isAsking = false;
      if (!this.#isStopped) this.#timer = setTimeout(() => this.#turn(), this.#isWanted ? 0 : pauseMs);
    }
  }

  #connection(state, why) {
    const before = this.#store.state.connection;
    const since = before.state === state ? before.since : Date.now();
    this.#store.update({ connection: { state, why, since, seen: state === "live" ? Date.now() : before.seen } });
  }

  async #get(path, budget = this.#budget) {
    const late = setTimeout(() => this.#connection("stale", "the scaler does not answer"), STALE_MS);
    try {
      const { value, bytes } = await get(path);
      budget.charge(bytes + HEAD_BYTES);
      return value;
    } finally {
      clearTimeout(late);
    }
  }

  async #look() {
    const { state, update } = this.#store;
    if (Object.keys(state.words.reasons).length === 0) update({ words: await this.#get("/page/words.json") });
    update(merged(this.#store.state, await this.#get(withSince("/v1/now?", state.now?.cursor))));
    this.#isOf("now");
    await this.#series();
    if (this.#store.state.now.operation !== null) await this.#refresh("operation");
    const needs = this.#needs();
    if (needs.includes("events")) this.#listen();
    else this.#unlisten();
    for (const name of needs) if (name !== "events") await this.#refresh(name);
  }

  /** What is shown of `name` is right now, and from now on gets older if it `ages`. */
  #isOf(name, ages = true) {
    this.#store.update({ asOf: { ...this.#store.state.asOf, [name]: ages ? Date.now() : Infinity } });
  }

  async #series() {
    const { step } = this.#store.state;
    for (let isMore = true; isMore;) {
      const known = this.#store.state.series[step];
      const view = await this.#get(withSince(`/v1/series?step_s=${step}&`, known?.cursor));
      const columns = view.is_whole || known === undefined ? view.columns : appended(known.columns, view.columns, step);
      const series = { ...this.#store.state.series, [step]: { cursor: view.cursor, columns } };
      this.#store.update({ series });
      isMore = view.is_more && step === this.#store.state.step;
    }
  }

  async #refresh(name) {
    const { path, key, everyMs = Infinity, pauseMs = RESOURCE_PAUSE_MS } = RESOURCES[name];
    const wanted = key(this.#store.state);
    const asked = this.#asked[name];
    const ages = everyMs !== Infinity; // else it is right for as long as its key is
    if (asked !== undefined && asked.key === wanted && Date.now() - asked.at < everyMs) return;
    const budget = (this.#budgets[name] ??= new Budget(pauseMs));
    if (asked !== undefined && budget.pauseMs > 0) {
      if (this.#store.state.asOf[name] === Infinity) this.#isOf(name); // no longer
      return;
    }
    try {
      this.#store.update({ [name]: await this.#get(path(this.#store.state), budget) });
      this.#asked[name] = { key: wanted, at: Date.now() };
      this.#isOf(name, ages);
    } catch (refusal) {
      // One part may be missing while others are there, such as a layout that has not been made yet.
      if (refusal.status !== 503 && refusal.status !== 404) throw refusal;
    }
  }

  async #listen() {
    if (this.#listening !== null) return;
    this.#listening = new AbortController();
    const { signal } = this.#listening;
    const add = (id, event) => {
      if (this.#store.state.events.some((known) => known.id === id)) return;
      this.#lastEventId = id;
      this.#store.update({ events: [{ id, event }, ...this.#store.state.events].slice(0, EVENTS_KEPT) });
    };
    try {
      await listen("/v1/events", this.#lastEventId, add, () => this.#told(), signal);
    } catch (refusal) {
      if (signal.aborted) return;
      this.#store.update({ eventsRefused: refusal.message });
    }
    setTimeout(() => {
      if (this.#listening?.signal === signal) this.#listening = null;
    }, LISTEN_AGAIN_MS);
  }

  /** End the stream of events: a listener is one of few, and a connection one of a browser's six. */
  #unlisten() {
    this.#listening?.abort();
    this.#listening = null;
  }

  #told() {
    if (!this.#store.state.isPastTold || this.#store.state.eventsRefused) {
      this.#store.update({ isPastTold: true, eventsRefused: "" });
    }
  }
}

const withSince = (path, cursor) =>
  cursor === undefined ? path.slice(0, -1) : `${path}since=${encodeURIComponent(cursor)}`;

/** What of the store another answer of /v1/now changes. */
function merged(state, now) {
  // A scaler that has just begun has not looked yet: what was shown stays, and the next answer is to tell everything.
  if (now.num_devices === null && state.now !== null) return { now: { ...now, cursor: undefined } };
  const devices = now.is_whole ? new Map() : new Map(state.devices);
  const ranks = now.is_whole ? new Map() : new Map(state.ranks);
  for (const row of now.devices) devices.set(row[0], deviceOf(row));
  for (const row of now.ranks) ranks.set(row[0], rankOf(row));
  return { now, devices, ranks, ...(now.operation === null ? { operation: null } : {}) };
}

function deviceOf([name, state, slot, rank, isReady, experts, budget, weights, kv, other, free]) {
  return { name, state, slot, rank, isReady, experts, budget, weights, kv, other, free };
}

function rankOf([slot, blocksTotal, blocksFree, running, waiting, moving]) {
  return { slot, blocksTotal, blocksFree, running, waiting, moving };
}

function appended(known, more, step) {
  const columns = {};
  for (const [name, values] of Object.entries(known))
    columns[name] = [...values, ...more[name]].slice(-ROWS_KEPT[step]);
  return columns;
}

/**
 * Brings what the page shows from the scaler into the store. One request after the other, and all of them of one budget
 * of bytes: where there is much to tell, large answers are asked for less often, and looks come less often beside them.
 *
 * When nobody answers, what is there stays and is marked as stale, until somebody does.
 */

import { get, listen } from "./api.js";
import { Budget } from "./budget.js";

const LARGE_BYTES = 20_000; // a resource from that size on is asked for when there is room for it
const HEAD_BYTES = 300; // of each answer, beside its body
const PAUSE_MS = 1_000;
const BUSY_PAUSE_MS = 300; // while an operation is in progress
const RETRY_MS = 1_500;
const STALE_MS = 3_000; // without an answer: who waits for a scaler that restarts is not refused
const LISTEN_AGAIN_MS = 3_000;
const EVENTS_KEPT = 1_000;
const ROWS_KEPT = { 1: 900, 60: 240, 360: 240 };
const ROW_BYTES = 120; // of /v1/series, about

/**
 * What views may need beside /v1/now and /v1/series: where it is, and `key`: it is asked for again when that has
 * changed, or `everyMs` have passed (`largeEveryMs` where it is large), and there is room for it. `isHeld`: not now,
 * and after that at once. `isThere`: else there is nothing to ask for.
 */
const RESOURCES = {
  policy: { path: () => "/v1/policy", key: () => "", everyMs: 2_000 },
  operation: {
    path: (state) => `/v1/operations/${state.now.operation}`,
    key: ({ now }) => `${now.operation} ${now.progress?.phase} ${now.progress?.leg}`,
    everyMs: 0,
    largeEveryMs: 15_000, // how far it is, each look tells
  },
  moves: {
    path: (state) => `/v1/operations/${state.now.operation}/moves`,
    key: (state) => state.now.operation,
    isThere: (state) => state.now.operation !== null,
  },
  last: { path: () => "/v1/operations?limit=1", key: operationsKey, isHeld: (state) => state.now.operation !== null },
  decisions: { path: () => "/v1/decisions?limit=40", key: (state) => state.policy?.decision?.time_unix },
  operations: { path: () => "/v1/operations?limit=20", key: operationsKey },
  experts: { path: () => "/v1/experts", key: (state) => state.now.epoch, everyMs: 10_000 },
  layout: { path: () => "/v1/layout", key: layoutKey },
  processes: { path: () => "/v1/processes", key: (state) => state.now.fence, everyMs: 2_000 },
};

const OF_OPERATION = ["operation", "moves"]; // of another operation they are asked for at once
const SHOWN_WITH = ["last", "operations"]; // views that show these show the operation in progress

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

export class Feed {
  #store;
  #needs = () => [];
  #asked = {}; // by resource, its key and when it was asked for
  #costs = {}; // by resource, bytes of its last answer
  #budget = new Budget();
  #timer = 0;
  #isAsking = false;
  #isWanted = false; // somebody has nudged since the last turn began
  #isStopped = true;
  #listening = null; // ends the stream of events
  #lastEventId = "0";
  #isPastKnown = false; // events that there were before the page
  #rowsAt = {}; // by step, when those that are there were asked for
  #instance = ""; // names the deployment that the page shows

  /** `needs()`: names of RESOURCES that the present view shows, and `events`. */
  constructor(store, needs) {
    this.#store = store;
    this.#needs = needs;
    document.addEventListener("visibilitychange", () => this.nudge());
    // A browser that keeps a page for its "back" button stops its timers and leaves its connections open.
    addEventListener("pagehide", () => this.#unlisten());
  }

  /** Begin. */
  start() {
    this.#isStopped = false;
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

  /** `isFirst`: what the page has to begin with is not of the budget. */
  async #get(path, isFirst, isResource = false) {
    const late = setTimeout(() => this.#connection("stale", "the scaler does not answer"), STALE_MS);
    try {
      const { value, bytes } = await get(path);
      const cost = bytes + HEAD_BYTES;
      // What is told anew as a whole, which is seldom, is paid for by later looks, too, and not by the next one alone.
      const isLarge = cost >= LARGE_BYTES && (isResource || value.is_whole === true);
      if (isLarge && isResource) this.#budget.defer(cost);
      if (!isFirst) this.#budget.charge(cost, isLarge);
      return { value, cost };
    } finally {
      clearTimeout(late);
    }
  }

  async #look() {
    const { state, update } = this.#store;
    this.#budget.begin();
    if (Object.keys(state.words.reasons).length === 0) {
      update({ words: (await this.#get("/page/words.json", true)).value });
    }
    const now = await this.#get(withSince("/v1/now?", state.now?.cursor), state.now === null);
    if (this.#isAnother(now.value.instance)) {
      this.stop();
      location.reload();
      return;
    }
    if (now.value.operation !== state.now?.operation) for (const name of OF_OPERATION) delete this.#asked[name];
    update(merged(this.#store.state, now.value));
    this.#isOf("now");
    await this.#series();
    const needs = this.#needs();
    if (this.#store.state.now.operation !== null) await this.#operation(needs);
    if (needs.includes("events")) this.#listen();
    else this.#unlisten();
    for (const name of needs) if (name !== "events") await this.#refresh(name);
  }

  /**
   * Whether another deployment answers than the page shows: nothing of that one may stay, and their events may have the
   * same names. A scaler that has not read its journal does not know yet which one it is of.
   */
  #isAnother(instance) {
    const known = this.#instance;
    if (instance !== "") this.#instance = instance;
    return ![known, instance].includes("") && known !== instance;
  }

  /** What is shown of `name` is right now, and from now on gets older if it `ages`. */
  #isOf(name, ages = true) {
    this.#store.update({ asOf: { ...this.#store.state.asOf, [name]: ages ? Date.now() : Infinity } });
  }

  /** The one in progress, where it is shown: with hundreds of devices it is large. */
  async #operation(needs) {
    if (needs.some((name) => SHOWN_WITH.includes(name))) await this.#refresh("operation");
    else if (this.#store.state.operation !== null) this.#isOf("operation", false);
  }

  /** Only what the page begins with is not of the budget: another span is large, and comes when there is room. */
  async #series() {
    const { step, series: before } = this.#store.state;
    const isFirst = Object.keys(before).length === 0;
    const isLarge = !isFirst && this.#missingBytes(step) >= LARGE_BYTES;
    if (isLarge && !this.#budget.hasRoom(this.#missingBytes(step))) return;
    const askedAt = Date.now();
    for (let isMore = true; isMore;) {
      const known = this.#store.state.series[step];
      const path = withSince(`/v1/series?step_s=${step}&`, known?.cursor);
      const { value: view } = await this.#get(path, isFirst, isLarge);
      const columns = view.is_whole || known === undefined ? view.columns : appended(known.columns, view.columns, step);
      const series = { ...this.#store.state.series, [step]: { cursor: view.cursor, columns } };
      this.#store.update({ series });
      isMore = view.is_more && step === this.#store.state.step;
    }
    this.#rowsAt[step] = askedAt;
  }

  /** Of the rows of this step that have not come yet, about. */
  #missingBytes(step) {
    const passed = (Date.now() - (this.#rowsAt[step] ?? 0)) / 1_000;
    return ROW_BYTES * Math.min(ROWS_KEPT[step], passed / step);
  }

  async #refresh(name) {
    const { path, key, everyMs = Infinity, largeEveryMs = everyMs, isHeld, isThere } = RESOURCES[name];
    if (isThere?.(this.#store.state) === false) return;
    if (this.#store.state[name] !== null && isHeld?.(this.#store.state)) {
      delete this.#asked[name];
      return;
    }
    const wanted = key(this.#store.state);
    const asked = this.#asked[name];
    const ages = everyMs !== Infinity; // else it is right for as long as its key is
    const cost = this.#costs[name];
    const restMs = cost >= LARGE_BYTES ? largeEveryMs : everyMs;
    if (asked !== undefined && asked.key === wanted && Date.now() - asked.at < restMs) return;
    if (asked !== undefined && cost >= LARGE_BYTES && !this.#budget.hasRoom(cost)) {
      if (this.#store.state.asOf[name] === Infinity) this.#isOf(name); // no longer
      return;
    }
    const wasPastKnown = this.#isPastKnown;
    try {
      const answer = await this.#get(path(this.#store.state), cost === undefined, true);
      this.#costs[name] = answer.cost;
      this.#store.update({ [name]: answer.value });
      const isToldMeanwhile = answer.cost >= LARGE_BYTES && wasPastKnown !== this.#isPastKnown;
      this.#asked[name] = { key: isToldMeanwhile ? key(this.#store.state) : wanted, at: Date.now() };
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
    // What was told of the past is older than a layout that has come meanwhile: no reason to ask for a large one again.
    if (!this.#isPastKnown && this.#asked.layout !== undefined && this.#costs.layout >= LARGE_BYTES) {
      this.#asked.layout.key = layoutKey(this.#store.state);
    }
    this.#isPastKnown = true;
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
  return { now, devices, ranks, operation: renewed(state.operation, now) };
}

/** The operation in progress as far as it is now; the rest of it is as it was read last. */
function renewed(operation, { operation: name, progress: told }) {
  if (name === null) return null;
  if (operation?.op_id !== name || told === null) return operation;
  const { phase, leg, elapsed_s, hmm_phase, bytes_done, bytes_total, bytes_copied, sequences_moved } = told;
  const progress = hmm_phase === null ? null : { ...operation.progress, hmm_phase, bytes_done, bytes_total };
  const figures = { ...operation.figures, bytes_copied, sequences_moved };
  return { ...operation, phase, leg, elapsed_s, progress, figures };
}

function deviceOf([name, state, slot, rank, isReady, experts, budget, weights, kv, other, free, failure]) {
  return { name, state, slot, rank, isReady, experts, budget, weights, kv, other, free, failure };
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

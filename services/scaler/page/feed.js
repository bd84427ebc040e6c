/**
 * Brings what the page shows from the scaler into the store. One request after the other, and all of them of one budget
 * of bytes: where there is much to tell, large answers are asked for less often, and looks come less often beside them.
 *
 * When nobody answers, what is there stays and is marked as stale, until somebody does.
 */

import { get, listen } from "./api.js";

const MINUTE_MS = 60_000;
const MINUTE_BYTES = 180_000; // of all answers; with a look that is there early or late it is below 200 KB
const BURST_BYTES = 40_000; // of looks that follow each other at once, of a minute's bytes
const LOOKS_BYTES = 48_000; // of a minute, are never given to large answers
const LARGE_BYTES = 20_000; // a resource from that size on is asked for when there is room for it
const MARGIN_BYTES = 10_000; // about one look, which comes early or late
// Of a minute, for large answers; one that is larger is paid for over as many minutes.
const LARGE_MOST_BYTES = MINUTE_BYTES - LOOKS_BYTES - 2 * MARGIN_BYTES;
const LOOK_PAUSE_MS = 15_000; // for bytes, at most; what has cost more is forgiven
const HEAD_BYTES = 300; // of each answer, beside its body
const PAUSE_MS = 1_000;
const BUSY_PAUSE_MS = 300; // while an operation is in progress
const RETRY_MS = 1_500;
const STALE_MS = 3_000; // without an answer: who waits for a scaler that restarts is not refused
const LISTEN_AGAIN_MS = 3_000;
const EVENTS_KEPT = 1_000;
const ROWS_KEPT = { 1: 900, 15: 5_760 };

/**
 * What views may need beside /v1/now and /v1/series: where it is, and `key`: it is asked for again when that has
 * changed, or `everyMs` have passed, and there is room for it. `isUrgent`: with another key at once. `isHeld`: not now,
 * and after that at once. `isThere`: else there is nothing to ask for.
 */
const RESOURCES = {
  policy: { path: () => "/v1/policy", key: () => "", everyMs: 2_000 },
  operation: {
    path: (state) => `/v1/operations/${state.now.operation}`,
    key: (state) => state.now.operation,
    everyMs: 0,
    isUrgent: true,
  },
  moves: {
    path: (state) => `/v1/operations/${state.now.operation}/moves`,
    key: (state) => state.now.operation,
    isUrgent: true,
    isThere: (state) => state.now.operation !== null,
  },
  last: { path: () => "/v1/operations?limit=1", key: operationsKey, isHeld: (state) => state.now.operation !== null },
  decisions: { path: () => "/v1/decisions?limit=40", key: (state) => state.policy?.decision?.time_unix },
  operations: { path: () => "/v1/operations?limit=20", key: operationsKey },
  experts: { path: () => "/v1/experts", key: (state) => state.now.epoch, everyMs: 10_000 },
  layout: { path: () => "/v1/layout", key: layoutKey },
  processes: { path: () => "/v1/processes", key: (state) => state.now.fence, everyMs: 2_000 },
};

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

/**
 * Bytes that may be read: in no minute more than MINUTE_BYTES and the last answer. Large answers are let in while what
 * the last minute has cost leaves room for them; looks share what is left of it. `clock`: of milliseconds.
 */
export class Budget {
  #clock;
  #spent = []; // { at, bytes, isLarge } of the last minute
  #left = BURST_BYTES; // for looks
  #at;
  #paidAt = 0; // when the large ones until now are paid for
  #awaited = 0; // bytes of a large answer that room is made for
  #look = 0; // bytes of the present turn
  #before = 0; // of the one before

  constructor(clock = Date.now) {
    this.#clock = clock;
    this.#at = clock();
  }

  /** A turn begins: who waits for room says so again. */
  begin() {
    this.#refill();
    this.#awaited = 0;
    [this.#before, this.#look] = [this.#look, 0];
  }

  /** An answer has come. */
  charge(bytes, isLarge = false) {
    this.#refill();
    this.#spent.push({ at: this.#at, bytes, isLarge });
    if (isLarge) return;
    this.#look += bytes;
    this.#left = Math.max((-LOOK_PAUSE_MS / 1_000) * this.#rate, this.#left - bytes);
  }

  /** No large answer for as long as one of this size has to be paid for; also where it was not of the budget. */
  defer(bytes) {
    this.#refill();
    this.#paidAt = Math.max(this.#paidAt, this.#at + (bytes / LARGE_MOST_BYTES) * MINUTE_MS);
  }

  /** Whether a large answer of this size may be asked for now. Where not, looks make room for it, if that can help. */
  hasRoom(bytes) {
    this.#refill();
    const isBeyond = bytes > LARGE_MOST_BYTES; // let in beside the fewest looks
    const others = isBeyond ? LOOKS_BYTES + MARGIN_BYTES : MINUTE_BYTES - bytes;
    if (this.#at >= this.#paidAt && this.#sum() <= others) return true;
    const wanted = Math.min(bytes, LARGE_MOST_BYTES);
    const isNear = this.#paidAt - this.#at <= MINUTE_MS;
    if (isNear && this.#large + wanted <= LARGE_MOST_BYTES) {
      this.#awaited = Math.max(this.#awaited, bytes + MARGIN_BYTES);
    }
    return false;
  }

  /** For how long nothing is looked at: until looks are paid for, and a minute has room for another one. */
  get pauseMs() {
    this.#refill();
    const paid = (-this.#left / this.#rate) * 1_000;
    let over = this.#sum() + Math.min(this.#look, this.#before) - MINUTE_BYTES;
    let free = this.#at;
    for (const { at, bytes } of this.#spent) {
      if (over <= 0) break;
      over -= bytes;
      free = at + MINUTE_MS;
    }
    return Math.min(LOOK_PAUSE_MS, Math.max(0, paid, free - this.#at));
  }

  /** Bytes per second for looks, beside large answers of the last minute and the one that is awaited. */
  get #rate() {
    const reserved = Math.max(BURST_BYTES, this.#large + this.#awaited);
    return (Math.max(LOOKS_BYTES, MINUTE_BYTES - reserved) / MINUTE_MS) * 1_000;
  }

  get #large() {
    return this.#sum(({ isLarge }) => isLarge);
  }

  /** Bytes of the last minute's answers. */
  #sum(isOne = () => true) {
    return this.#spent.filter(isOne).reduce((sum, { bytes }) => sum + bytes, 0);
  }

  #refill() {
    const now = this.#clock();
    this.#spent = this.#spent.filter(({ at }) => now - at < MINUTE_MS);
    const most = Math.max(0, BURST_BYTES - this.#large);
    this.#left = Math.min(most, this.#left + ((now - this.#at) / 1_000) * this.#rate);
    this.#at = now;
  }
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
    update(merged(this.#store.state, now.value));
    this.#isOf("now");
    await this.#series();
    const needs = this.#needs();
    if (this.#store.state.now.operation !== null) await this.#operation(needs);
    if (needs.includes("events")) this.#listen();
    else this.#unlisten();
    for (const name of needs) if (name !== "events") await this.#refresh(name);
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

  async #series() {
    const { step } = this.#store.state;
    let isFirst = false; // also of the rows that follow those that were too many for one answer
    for (let isMore = true; isMore;) {
      const known = this.#store.state.series[step];
      const path = withSince(`/v1/series?step_s=${step}&`, known?.cursor);
      const { value: view } = await this.#get(path, known === undefined || isFirst);
      isFirst = known === undefined || isFirst;
      const columns = view.is_whole || known === undefined ? view.columns : appended(known.columns, view.columns, step);
      const series = { ...this.#store.state.series, [step]: { cursor: view.cursor, columns } };
      this.#store.update({ series });
      isMore = view.is_more && step === this.#store.state.step;
    }
  }

  async #refresh(name) {
    const { path, key, everyMs = Infinity, isUrgent = false, isHeld, isThere } = RESOURCES[name];
    if (isThere?.(this.#store.state) === false) return;
    if (this.#store.state[name] !== null && isHeld?.(this.#store.state)) {
      delete this.#asked[name];
      return;
    }
    const wanted = key(this.#store.state);
    const asked = this.#asked[name];
    const ages = everyMs !== Infinity; // else it is right for as long as its key is
    if (asked !== undefined && asked.key === wanted && Date.now() - asked.at < everyMs) return;
    const cost = this.#costs[name];
    const isNow = asked === undefined || (isUrgent && asked.key !== wanted);
    if (!isNow && cost >= LARGE_BYTES && !this.#budget.hasRoom(cost)) {
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

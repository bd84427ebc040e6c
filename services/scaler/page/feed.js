/**
 * Brings what the page shows from the scaler into the store. One request after the other, and no more bytes than a
 * budget of BYTES_PER_S allows after a first burst: however large the deployment, a viewer costs the same.
 *
 * When nobody answers, what is there stays and is marked as stale, until somebody does.
 */

import { get, listen } from "./api.js";

const BYTES_PER_S = 2_500;
const BURST_BYTES = 150_000;
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
 * changed, or `everyMs` have passed.
 */
const RESOURCES = {
  policy: { path: () => "/v1/policy", key: () => "", everyMs: 3_000 },
  decisions: { path: () => "/v1/decisions?limit=40", key: (state) => state.policy?.decision?.time_unix },
  operations: { path: () => "/v1/operations?limit=20", key: (state) => `${state.now.operation} ${state.now.epoch}` },
  experts: { path: () => "/v1/experts", key: (state) => state.now.epoch, everyMs: 10_000 },
  layout: { path: () => "/v1/layout", key: layoutKey },
};

function layoutKey({ now, devices }) {
  const seats = [...devices.values()].map((device) => `${device.rank}${device.isReady}`).join();
  return [now.epoch, now.operation, now.phase, now.fence, seats].join();
}

export class Feed {
  #store;
  #needs = () => [];
  #asked = {}; // by resource, its key and when it was asked for
  #left = BURST_BYTES; // bytes that may be read now
  #leftAt = Date.now();
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
    this.#listening?.abort();
    this.#listening = null;
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
    if (document.hidden || this.#isStopped) return;
    this.#isAsking = true;
    let pauseMs = PAUSE_MS;
    this.#isWanted = false;
    try {
      await this.#look();
      this.#connection("live", "");
      const least = this.#store.state.now.operation === null ? PAUSE_MS : BUSY_PAUSE_MS;
      pauseMs = Math.max(least, (-this.#refilled() / BYTES_PER_S) * 1_000);
    } catch (refusal) {
      if (refusal.status === undefined) throw refusal;
      this.#connection(refusal.status === 401 ? "refused" : "stale", refusal.message);
      pauseMs = RETRY_MS;
      if (refusal.status === 401) this.stop();
    } finally {
      this.#isAsking = false;
      if (!this.#isStopped) this.#timer = setTimeout(() => this.#turn(), this.#isWanted ? 0 : pauseMs);
    }
  }

  #refilled() {
    const now = Date.now();
    this.#left = Math.min(BURST_BYTES, this.#left + ((now - this.#leftAt) / 1_000) * BYTES_PER_S);
    this.#leftAt = now;
    return this.#left;
  }

  #connection(state, why) {
    const before = this.#store.state.connection;
    const since = before.state === state ? before.since : Date.now();
    this.#store.update({ connection: { state, why, since, seen: state === "live" ? Date.now() : before.seen } });
  }

  async #get(path) {
    const late = setTimeout(() => this.#connection("stale", "the scaler does not answer"), STALE_MS);
    try {
      const { value, bytes } = await get(path);
      this.#refilled();
      this.#left -= bytes + HEAD_BYTES;
      return value;
    } finally {
      clearTimeout(late);
    }
  }

  async #look() {
    const { state, update } = this.#store;
    if (Object.keys(state.words.reasons).length === 0) update({ words: await this.#get("/page/words.json") });
    update(merged(this.#store.state, await this.#get(withSince("/v1/now?", state.now?.cursor))));
    await this.#series();
    const { now } = this.#store.state;
    if (now.operation !== null) await this.#try("operation", `/v1/operations/${now.operation}`);
    for (const name of this.#needs()) {
      if (name === "events") this.#listen();
      else await this.#refresh(name);
    }
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
    const { path, key, everyMs = Infinity } = RESOURCES[name];
    const wanted = key(this.#store.state);
    const asked = this.#asked[name];
    if (asked !== undefined && asked.key === wanted && Date.now() - asked.at < everyMs) return;
    if (await this.#try(name, path())) this.#asked[name] = { key: wanted, at: Date.now() };
  }

  /** One part may be missing while others are there, such as a layout that has not been made yet. */
  async #try(name, path) {
    try {
      this.#store.update({ [name]: await this.#get(path) });
      return true;
    } catch (refusal) {
      if (refusal.status !== 503 && refusal.status !== 404) throw refusal;
      return false;
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

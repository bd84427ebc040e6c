/** Devices as tiles. Only those that can be seen are there, however many there are. */

import { badge, fill, h, setText } from "./dom.js";
import { bytes, number, plural } from "./format.js";

const TILE_WIDTH = 236; // at the least, with the gap
const TILE_HEIGHT = 150; // with the gap
const SPARE_ROWS = 2;
const STATES = {
  used: ["ok", "serves"],
  joining: ["busy", "joins"],
  leaving: ["warn", "leaves"],
  free: ["calm", "free"],
  failed: ["bad", "failed"],
};

const compare = new Intl.Collator("en", { numeric: true }).compare;

/** A grid of tiles. `update(devices, ranks)` takes what the store has. */
export class Tiles {
  #tiles = new Map();
  #devices = [];
  #ranks = new Map();
  #columns = 1;
  #seen;

  constructor() {
    this.element = h("ul", { class: "tiles", "aria-label": "Devices" });
    this.#seen = () => this.#draw();
    addEventListener("scroll", this.#seen, { passive: true });
    addEventListener("resize", this.#seen);
  }

  /** `devices`: those to show. */
  update(devices, ranks) {
    this.#devices = [...devices].sort((one, other) => compare(one.name, other.name));
    this.#ranks = ranks;
    this.#draw();
  }

  destroy() {
    removeEventListener("scroll", this.#seen);
    removeEventListener("resize", this.#seen);
  }

  #draw() {
    const width = this.element.clientWidth;
    if (width === 0) return;
    this.#columns = Math.max(1, Math.floor(width / TILE_WIDTH));
    const rows = Math.ceil(this.#devices.length / this.#columns);
    this.element.style.height = `${rows * TILE_HEIGHT}px`;
    const top = -this.element.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(top / TILE_HEIGHT) - SPARE_ROWS);
    const last = Math.min(rows, Math.ceil((top + innerHeight) / TILE_HEIGHT) + SPARE_ROWS);
    const shown = new Map();
    for (let at = first * this.#columns; at < Math.min(last * this.#columns, this.#devices.length); at += 1) {
      shown.set(this.#devices[at].name, at);
    }
    for (const [name, tile] of this.#tiles) {
      if (shown.has(name)) continue;
      tile.element.remove();
      this.#tiles.delete(name);
    }
    for (const [name, at] of shown) this.#place(name, at, width / this.#columns);
  }

  #place(name, at, width) {
    let tile = this.#tiles.get(name);
    if (tile === undefined) {
      tile = new Tile(name);
      this.#tiles.set(name, tile);
      this.element.append(tile.element);
    }
    const { style } = tile.element;
    style.width = `${width - 12}px`;
    style.transform = `translate(${(at % this.#columns) * width}px, ${Math.floor(at / this.#columns) * TILE_HEIGHT}px)`;
    tile.element.setAttribute("aria-setsize", this.#devices.length);
    tile.element.setAttribute("aria-posinset", at + 1);
    tile.update(this.#devices[at], this.#ranks.get(this.#devices[at].slot));
  }
}

class Tile {
  #head;
  #bar;
  #lines;
  #drawn = "";

  constructor(name) {
    this.#head = h("header", {});
    this.#bar = h("div", { class: "bar", "aria-hidden": "true" });
    this.#lines = { memory: h("p", {}), kv: h("p", {}), free: h("p", {}), load: h("p", { class: "load" }) };
    this.element = h("li", { class: "tile", "data-device": name }, this.#head, this.#bar, Object.values(this.#lines));
  }

  update(device, rank) {
    const facts = JSON.stringify([device, rank]);
    if (facts === this.#drawn) return;
    this.#drawn = facts;
    const [tone, words] = STATES[device.state] ?? ["calm", device.state];
    fill(
      this.#head,
      h("b", {}, device.name),
      device.rank === null ? null : h("span", { class: "rank" }, device.rank),
      badge(tone, words),
      device.failure && device.state !== "failed" ? badge("bad", "failed") : null,
    );
    this.element.title = device.failure;
    this.element.dataset.state = device.state;
    const used = usedShare(rank);
    this.#segments(device, used);
    this.#line("memory", "weights", bytes(device.weights), device.experts ? plural(device.experts, "expert") : "");
    this.#line("kv", "kv", bytes(device.kv), used === null ? "" : `${Math.round(used * 100)} % used`);
    this.#line("free", "free", bytes(device.free), `of ${bytes(device.budget)}`);
    setText(this.#lines.load, loadWords(device, rank));
    for (const name of ["weights", "kv", "other", "free", "budget"]) this.element.dataset[name] = device[name];
  }

  #line(name, key, value, more) {
    fill(
      this.#lines[name],
      h("i", { class: `key mem-${key}` }),
      `${key === "kv" ? "KV" : key} `,
      h("b", {}, value),
      h("small", {}, more),
    );
  }

  #segments({ budget, weights, kv, other }, used) {
    const parts =
      used === null
        ? [
            ["weights", weights],
            ["kv", kv],
            ["other", other],
          ]
        : [
            ["weights", weights],
            ["kv", kv * used],
            ["kv-free", kv * (1 - used)],
            ["other", other],
          ];
    fill(
      this.#bar,
      parts.map(([key, size]) =>
        h("span", { class: `mem-${key}`, style: { width: `${budget ? (100 * size) / budget : 0}%` } }),
      ),
    );
  }
}

/** The used share of a rank's KV; null where it has not told lately. */
export function usedShare(rank) {
  return rank === undefined || rank.blocksTotal === 0 ? null : 1 - rank.blocksFree / rank.blocksTotal;
}

function loadWords(device, rank) {
  if (device.state === "failed") return "cannot be used: see Health";
  if (device.rank === null) return "no rank";
  if (!device.isReady) return "its process is not ready";
  if (rank === undefined) return "has not told its load lately";
  const moving = rank.moving ? `, ${number(rank.moving)} moving` : "";
  return `${number(rank.running)} running, ${number(rank.waiting)} waiting${moving}`;
}

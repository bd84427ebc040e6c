/** Who sends what to whom: records by pairs of devices, as arrows and as a table, and sequences on their way. */

import { h, svg, table } from "./dom.js";
import { bytes, number, plural } from "./format.js";

const PAIRS_SHOWN = 12; // more arrows cannot be told apart
const RANKS_SHOWN = 6;
const CHECKPOINT = "checkpoint"; // where no device has a record
const WIDTH = 520;
const TILE = { width: 150, height: 34, pitch: 44 };
const STROKES = { least: 1.5, most: 7 };
// What two plans have in common that move the same; times and peaks are predicted anew each time.
const SAME = ["epoch_before", "epoch_after", "joining", "leaving", "experts_moved", "bytes_copied"];
const SAME_OF_DEVICE = ["experts_in", "bytes_in", "experts_before", "experts_after"];

const counted = new WeakMap(); // by a leg's copies: they are many, and looked at with each answer

/** Pairs of devices with what goes from one to the other, the largest first. `copies`: of a leg, [record, from, to]. */
export function pairsOf(copies) {
  if (!counted.has(copies)) counted.set(copies, countPairs(copies));
  return counted.get(copies);
}

function countPairs(copies) {
  const pairs = new Map();
  for (const [record, from, target] of copies) {
    const source = from || CHECKPOINT;
    const key = JSON.stringify([source, target]);
    if (!pairs.has(key)) pairs.set(key, { source, target, records: 0, experts: 0 });
    const pair = pairs.get(key);
    pair.records += 1;
    if (record.startsWith("expert.")) pair.experts += 1;
  }
  return [...pairs.values()].sort((one, other) => other.records - one.records);
}

/** The legs of `plan`, where it moves what the operation moves; else null. */
export function routeOf(operation, plan) {
  const [one, other] = [operation.planned, plan.planned].map(
    (planned) => planned && [SAME.map((name) => planned[name]), changes(planned.devices)],
  );
  const isSame = Boolean(one) && JSON.stringify(one) === JSON.stringify(other);
  return isSame ? { opId: operation.op_id, legs: plan.legs } : null;
}

const changes = (devices) =>
  Object.entries(devices)
    .map(([name, change]) => [name, ...SAME_OF_DEVICE.map((field) => change[field])])
    .sort();

/** What each leg of a plan would move. */
export function planMoves(legs) {
  return legs.map((leg, n) => {
    const pairs = pairsOf(leg.copies);
    return pairs.length === 0 ? null : drawn(pairs, legName(n + 1, legs.length), bytes(leg.bytes_copied));
  });
}

/** What an operation in progress moves now. `route`: the store's; null where it is not known. */
export function operationMoves(operation, route, devices, ranks) {
  return h("div", { class: "moves" }, records(operation, route), sequences(operation, devices, ranks));
}

function records(operation, route) {
  const leg = route?.legs[operation.leg - 1];
  if (leg === undefined) return null;
  const pairs = pairsOf(leg.copies);
  const name = legName(operation.leg, operation.legs);
  if (pairs.length === 0) return h("p", {}, `${name}no record has to move.`);
  const seen = operation.progress;
  const done = seen?.bytes_total ? `${bytes(seen.bytes_done)} of ${bytes(seen.bytes_total)} copied` : "";
  const isCopying = seen?.hmm_phase === "copying";
  return drawn(pairs, name, done || bytes(leg.bytes_copied), isCopying);
}

const legName = (leg, legs) => (legs > 1 ? `Leg ${leg} of ${legs}: ` : "");

function drawn(pairs, name, size, isCopying = false) {
  const shown = pairs.slice(0, PAIRS_SHOWN);
  const rest = pairs.slice(PAIRS_SHOWN);
  const total = pairs.reduce((sum, pair) => sum + pair.records, 0);
  const lead = `${name}${plural(total, "record")}, ${size}.`;
  const left = rest.reduce((sum, pair) => sum + pair.records, 0);
  const further = `and ${plural(rest.length, "further pair")}, with ${plural(left, "record")}`;
  return h(
    "div",
    { class: "route" },
    h("p", { class: "route-lead" }, lead),
    arrows(shown, isCopying),
    table(
      `${name}${name ? "r" : "R"}ecords by device`,
      ["from", "to", "records", "of them experts"],
      shown.map(({ source, target, records: count, experts }) => [source, target, number(count), number(experts)]),
    ),
    rest.length ? h("p", { class: "route-rest" }, further) : null,
  );
}

/** The pairs as arrows between small tiles; the table beside it says the same. */
function arrows(pairs, isCopying) {
  const sources = [...new Set(pairs.map(({ source }) => source))];
  const targets = [...new Set(pairs.map(({ target }) => target))];
  const height = Math.max(sources.length, targets.length) * TILE.pitch;
  const most = pairs[0].records;
  const middle = (names, name) => ((names.indexOf(name) + 0.5) * height) / names.length;
  const lines = pairs.map(({ source, target, records: count }) => {
    const [from, to] = [middle(sources, source), middle(targets, target)];
    const [left, right, turn] = [TILE.width, WIDTH - TILE.width - 9, WIDTH / 2];
    const width = STROKES.least + (STROKES.most - STROKES.least) * (count / most);
    return svg("path", {
      d: `M${left},${from} C${turn},${from} ${turn},${to} ${right},${to}`,
      "stroke-width": width.toFixed(1),
      "data-from": source,
      "data-to": target,
      "data-records": count,
    });
  });
  const heads = targets.map((target) => {
    const [tip, at] = [WIDTH - TILE.width, middle(targets, target)];
    return svg("polygon", { points: `${tip},${at} ${tip - 11},${at - 6} ${tip - 11},${at + 6}` });
  });
  const tile = (names, left) => (name) => {
    const at = middle(names, name);
    const [top, size] = [at - TILE.height / 2, { width: TILE.width - 1, height: TILE.height }];
    return [
      svg("rect", { x: left + 0.5, y: top, rx: 6, ...size }),
      svg("text", { x: left + TILE.width / 2, y: at, "text-anchor": "middle", "dominant-baseline": "central" }, name),
    ];
  };
  return svg(
    "svg",
    { viewBox: `0 -2 ${WIDTH} ${height + 4}`, class: isCopying ? "arrows copying" : "arrows", "aria-hidden": "true" },
    lines,
    heads,
    sources.map(tile(sources, 0)),
    targets.map(tile(targets, WIDTH - TILE.width)),
  );
}

/** Sequences on their way to another rank, by the device that they leave; it is not told where each goes. */
function sequences({ figures }, devices, ranks) {
  const leaving = [...devices.values()]
    .map(({ name, slot }) => ({ name, moving: ranks.get(slot)?.moving ?? 0 }))
    .filter(({ moving }) => moving > 0)
    .sort((one, other) => other.moving - one.moving);
  const total = leaving.reduce((sum, { moving }) => sum + moving, 0);
  const from = leaving.slice(0, RANKS_SHOWN).map(({ name, moving }) => `${number(moving)} from ${name}`);
  if (leaving.length > RANKS_SHOWN) from.push(`others from ${leaving.length - RANKS_SHOWN} further devices`);
  const way = `${plural(total, "sequence")} on their way to another rank`;
  return h(
    "p",
    { class: "sequences", "data-moving": total, "data-moved": figures.sequences_moved },
    `${way}${from.length ? ` (${from.join(", ")})` : ""}; ${number(figures.sequences_moved)} have moved.`,
  );
}

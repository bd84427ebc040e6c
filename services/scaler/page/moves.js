/** Who sends how much to whom: records by pairs of devices, as arrows and as a table, and sequences on their way. */

import { h, svg, table } from "./dom.js";
import { bytes, number, plural } from "./format.js";

const PAIRS_SHOWN = 12; // more arrows cannot be told apart
const RANKS_SHOWN = 6;
const CHECKPOINT = "checkpoint"; // where no device has a record
const WIDTH = 520;
const TILE = { width: 150, height: 34, pitch: 44 };
const STROKES = { least: 1.5, most: 7 };

/** What each leg of a plan would move. `legs`: as the API tells moves. */
export function planMoves(legs) {
  return legs.map((leg, n) => (leg.pairs === 0 ? null : drawn(leg, legName(n + 1, legs.length), bytes(leg.bytes))));
}

/** What an operation in progress moves now. `legs`: as the API tells moves; null where they are not known yet. */
export function operationMoves(operation, legs, devices, ranks) {
  return h("div", { class: "moves" }, records(operation, legs), sequences(operation, devices, ranks));
}

function records(operation, legs) {
  const leg = legs?.[operation.leg - 1];
  if (leg === undefined) return null;
  const name = legName(operation.leg, operation.legs);
  if (leg.pairs === 0) return h("p", {}, `${name}no record has to move.`);
  const seen = operation.progress;
  const done = seen?.bytes_total ? `${bytes(seen.bytes_done)} of ${bytes(seen.bytes_total)} copied` : "";
  const isCopying = seen?.hmm_phase === "copying";
  return drawn(leg, name, done || bytes(leg.bytes), isCopying);
}

const legName = (leg, legs) => (legs > 1 ? `Leg ${leg} of ${legs}: ` : "");

function drawn(leg, name, size, isCopying = false) {
  const shown = leg.moves.slice(0, PAIRS_SHOWN).map(pairOf);
  const lead = `${name}${plural(leg.records, "record")}, ${size}.`;
  const left = leg.records - shown.reduce((sum, pair) => sum + pair.records, 0);
  const further = leg.pairs - shown.length;
  return h(
    "div",
    { class: "route" },
    h("p", { class: "route-lead" }, lead),
    arrows(shown, isCopying),
    table(
      `${name}${name ? "r" : "R"}ecords by device`,
      ["from", "to", "records", "of them experts", "size"],
      shown.map((pair) => [pair.source, pair.target, number(pair.records), number(pair.experts), bytes(pair.size)]),
    ),
    further ? h("p", { class: "route-rest" }, restOf(further, left)) : null,
  );
}

const restOf = (pairs, records) => `and ${plural(pairs, "further pair")}, with ${plural(records, "record")}`;

const pairOf = ([source, target, records, experts, size]) => ({
  source: source ?? CHECKPOINT,
  target,
  records,
  experts,
  size,
});

/** The pairs as arrows between small tiles; the table beside it says the same. */
function arrows(pairs, isCopying) {
  const sources = [...new Set(pairs.map(({ source }) => source))];
  const targets = [...new Set(pairs.map(({ target }) => target))];
  const height = Math.max(sources.length, targets.length) * TILE.pitch;
  const most = pairs[0].size;
  const middle = (names, name) => ((names.indexOf(name) + 0.5) * height) / names.length;
  const lines = pairs.map(({ source, target, records, size }) => {
    const [from, to] = [middle(sources, source), middle(targets, target)];
    const [left, right, turn] = [TILE.width, WIDTH - TILE.width - 9, WIDTH / 2];
    const width = STROKES.least + (STROKES.most - STROKES.least) * (size / most);
    return svg("path", {
      d: `M${left},${from} C${turn},${from} ${turn},${to} ${right},${to}`,
      "stroke-width": width.toFixed(1),
      "data-from": source,
      "data-to": target,
      "data-records": records,
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

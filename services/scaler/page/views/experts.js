/** Experts: where each lives, how often it was routed to, and how evenly that falls on the ranks. */

import { colour } from "../charts.js";
import { badge, fill, h, panel, setText, table } from "../dom.js";
import { number, plural, ratio } from "../format.js";

const CELL_WIDTH_MIN = 3;
const CELL_HEIGHT_MAX = 16;
const CELL_HEIGHT_MIN = 4;
const MAP_HEIGHT = 480;
const HOT = 3_000; // thousandths of a layer's mean that have the darkest colour
const HOTTEST_SHOWN = 12;
const UNEVEN = 1.2;
const HUES = 23; // owners next to one another differ by this part of the circle: 360 / 23 and 16 have no common factor

function build() {
  let view = null;
  let mode = "load";
  let at = { layer: 0, expert: 0 };
  const canvas = h("canvas", {
    class: "map",
    tabindex: "0",
    role: "img",
    "aria-label": "Map of layers by experts, not known yet",
    onkeydown: move,
    onmousemove: point,
    onfocus: tell,
  });
  const frame = h("div", { class: "scroll map-frame" }, canvas);
  const said = h("p", { role: "status", class: "count", id: "expert-said" });
  const scale = h("p", { class: "legend" });
  const ranks = h("div", {});
  const hottest = h("div", {});
  const modes = [
    ["load", "How often"],
    ["owner", "Where"],
  ].map(([name, words]) =>
    h(
      "button",
      { class: "quiet", "aria-pressed": String(name === mode), onclick: (event) => choose(event, name) },
      words,
    ),
  );
  const resized = new ResizeObserver(() => draw());
  resized.observe(frame);

  function choose(event, name) {
    mode = name;
    for (const button of modes) button.setAttribute("aria-pressed", String(button === event.currentTarget));
    draw();
  }

  function cell() {
    const columns = Math.max(1, ...view.owners.map((experts) => experts.length));
    const height = Math.floor(MAP_HEIGHT / Math.max(1, view.owners.length));
    return {
      columns,
      width: Math.max(CELL_WIDTH_MIN, Math.floor(frame.clientWidth / columns)),
      height: Math.min(CELL_HEIGHT_MAX, Math.max(CELL_HEIGHT_MIN, height)),
    };
  }

  function draw() {
    if (view === null || frame.clientWidth === 0) return;
    const { columns, width, height } = cell();
    const zoom = devicePixelRatio;
    canvas.width = columns * width * zoom;
    canvas.height = view.owners.length * height * zoom;
    canvas.style.width = `${columns * width}px`;
    canvas.style.height = `${view.owners.length * height}px`;
    const context = canvas.getContext("2d");
    context.scale(zoom, zoom);
    const gap = width > 4 && height > 4 ? 1 : 0;
    const [hot, unknown] = [colour("--line-1"), colour("--free")]; // once: each makes the browser work out styles
    view.owners.forEach((experts, layer) =>
      experts.forEach((slot, expert) => {
        const load = view.load[layer][expert];
        context.globalAlpha = mode === "owner" || load === undefined ? 1 : 0.06 + 0.94 * Math.min(1, load / HOT);
        context.fillStyle = mode === "owner" ? hue(slot) : load === undefined ? unknown : hot;
        context.fillRect(expert * width, layer * height, width - gap, height - gap);
      }),
    );
    context.globalAlpha = 1;
    context.strokeStyle = colour("--text");
    context.strokeRect(at.expert * width + 0.5, at.layer * height + 0.5, width - gap, height - gap);
    canvas.setAttribute("aria-label", `Map of ${view.owners.length} layers by ${columns} experts. ${wordsOf(at)}`);
    fill(scale, legend(mode, view));
  }

  function wordsOf({ layer, expert }) {
    const slot = view.owners[layer]?.[expert];
    if (slot === undefined) return `Layer ${layer} has no expert ${expert}`;
    const rank = view.ranks.find((each) => each.slot === slot);
    const load = view.load[layer][expert];
    const often = load === undefined ? "nothing is known of its load" : `${ratio(load / 1_000)} times its layer's mean`;
    const where = rank === undefined ? `slot ${slot}` : `${rank.rank} on ${rank.device}`;
    return `Layer ${layer}, expert ${expert}: ${where}, ${often}`;
  }

  function tell() {
    if (view !== null) setText(said, wordsOf(at));
  }

  function go(layer, expert) {
    const within = (place, places) => Math.min(places - 1, Math.max(0, place));
    const next = { layer: within(layer, view.owners.length), expert: within(expert, cell().columns) };
    if (next.layer === at.layer && next.expert === at.expert) return;
    at = next;
    tell();
    draw();
  }

  function point(event) {
    if (view === null) return;
    const { width, height } = cell();
    go(Math.floor(event.offsetY / height), Math.floor(event.offsetX / width));
  }

  function move(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (steps === undefined || view === null) return;
    event.preventDefault();
    go(at.layer + steps[0], at.expert + steps[1]);
  }

  function update(state) {
    if (state.experts === null || state.experts === view) return;
    view = state.experts;
    tell();
    draw();
    fill(ranks, rankTable(view));
    fill(hottest, hottestTable(view));
  }

  const map = h(
    "section",
    { class: "panel" },
    h("div", { class: "bar-of-tools" }, h("h2", {}, "Layers and experts"), scale, h("div", { class: "group" }, modes)),
    frame,
    said,
  );
  const element = h("div", {}, map, h("div", { class: "two even" }, panel("Ranks", ranks), panel("Hottest", hottest)));
  return { element, update, destroy: () => resized.disconnect() };
}

const hue = (slot) => `hsl(${(slot * 360 * 7) / HUES} 55% 52%)`;

function legend(mode, view) {
  if (mode === "load") {
    const rests = `by ${number(Math.round(view.sampled_steps))} sampled steps of the last minutes`;
    return view.sampled_steps
      ? `pale: hardly ever, full: three times the mean or more; ${rests}`
      : "nothing was routed lately";
  }
  return view.ranks
    .slice(0, HUES)
    .map(({ slot, rank }) => h("span", {}, h("i", { class: "key", style: { background: hue(slot) } }), rank));
}

function rankTable({ ranks }) {
  return table(
    plural(ranks.length, "rank"),
    ["rank", "device", "experts", "rows in a step", "of the mean"],
    ranks.map((rank) => [
      rank.rank,
      rank.device,
      number(rank.experts),
      number(rank.rows_per_step),
      rank.imbalance === null
        ? "–"
        : badge(
            rank.imbalance > UNEVEN ? "warn" : "ok",
            `${ratio(rank.imbalance)}${rank.imbalance > UNEVEN ? ", more than others" : ""}`,
          ),
    ]),
  );
}

function hottestTable({ owners, load, ranks }) {
  const names = new Map(ranks.map(({ slot, rank }) => [slot, rank]));
  const all = load.flatMap((experts, layer) => experts.map((value, expert) => ({ layer, expert, value })));
  const first = all.sort((one, other) => other.value - one.value).slice(0, HOTTEST_SHOWN);
  if (first.length === 0) return h("p", {}, "Nothing was routed lately.");
  return table(
    "Most routed to, over the mean of their layers",
    ["layer", "expert", "rank", "times the mean"],
    first.map(({ layer, expert, value }) => [
      String(layer),
      String(expert),
      names.get(owners[layer][expert]) ?? `slot ${owners[layer][expert]}`,
      ratio(value / 1_000),
    ]),
  );
}

export const experts = { title: "Experts", needs: ["experts"], build };

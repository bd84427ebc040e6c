/** Now: figures over time, and the devices. */

import { ChartCard } from "../charts.js";
import { h, setText } from "../dom.js";
import { number, plural, rate, ratio, seconds, share } from "../format.js";
import { Tiles } from "../tiles.js";

const SPANS = [
  [1, 300, "5 min"],
  [1, 900, "15 min"],
  [60, 240, "4 h"],
  [360, 240, "24 h"],
];
const CARDS = [
  { title: "Tokens out", lines: [["generated_per_s", "out"]], format: rate, least: 10 },
  { title: "Tokens of prompts in", lines: [["prompt_per_s", "in"]], format: rate, least: 10 },
  {
    title: "Requests",
    lines: [
      ["requests_per_s", "asked for"],
      ["refused_per_s", "refused"],
    ],
    format: rate,
    least: 1,
  },
  {
    title: "Sequences",
    lines: [
      ["running", "running"],
      ["queued", "waiting"],
    ],
    format: number,
    least: 4,
  },
  { title: "Time to first token", lines: [["ttft_s", "quantile"]], format: seconds, least: 0.01, objective: "ttft_s" },
  { title: "Time between tokens", lines: [["itl_s", "mean"]], format: seconds, least: 0.001, objective: "itl_s" },
  {
    title: "KV of the fullest rank",
    lines: [["kv_share", "used"]],
    format: share,
    least: 1,
    objective: "kv_share_max",
  },
  {
    title: "Attainment",
    lines: [["attainment", "kept both"]],
    format: share,
    least: 1,
    objective: "attainment",
    isGoodAbove: true,
  },
  {
    title: "Saturation: 1 is at the objective",
    lines: [
      ["ttft_saturation", "first token"],
      ["itl_saturation", "between tokens"],
      ["backlog_saturation", "backlog"],
      ["queue_age_saturation", "oldest"],
      ["kv_saturation", "KV"],
    ],
    format: ratio,
    least: 1,
    isSaturation: true,
    isWide: true,
  },
  { title: "Step of the slowest rank", lines: [["step_s", "mean"]], format: seconds, least: 0.001 },
  {
    title: "Replicas",
    lines: [
      ["replicas", "in force"],
      ["target", "wanted"],
    ],
    format: number,
    least: 2,
    isStepped: true,
  },
];

const noneOf = (step) => `No point yet: each is the mean of ${seconds(step)}.`;

function build({ store, feed }) {
  const cards = CARDS.map((spec) => [spec, new ChartCard(spec)]);
  const tiles = new Tiles();
  const count = h("p", { class: "count", role: "status" });
  const awaited = h("p", { class: "count", role: "status", id: "span-awaited" });
  const filter = h("input", {
    type: "search",
    id: "device-filter",
    placeholder: "name, rank or state",
    oninput: () => update(store.state),
  });
  const spans = SPANS.map(([step, length, words]) =>
    h(
      "button",
      {
        class: "quiet",
        "aria-pressed": String(step === store.state.step && length === store.state.rows),
        onclick: (event) => choose(event, step, length),
      },
      words,
    ),
  );

  function choose(event, step, length) {
    for (const button of spans) button.setAttribute("aria-pressed", String(button === event.currentTarget));
    store.update({ step, rows: length });
    feed.nudge();
  }

  function update(state) {
    const columns = state.series[state.step]?.columns;
    setText(awaited, columns === undefined ? "Loading…" : columns.at.length ? "" : noneOf(state.step));
    if (columns !== undefined) {
      const newest = ([name, values]) => [name, values.slice(-state.rows)];
      const shown = Object.fromEntries(Object.entries(columns).map(newest));
      const objectives = state.policy?.policy;
      for (const [spec, card] of cards)
        card.update(shown, spec.isSaturation ? 1 : (objectives?.[spec.objective] ?? null));
    }
    const all = [...state.devices.values()];
    const wanted = filter.value.trim().toLowerCase();
    const found =
      wanted === ""
        ? all
        : all.filter((device) => `${device.name} ${device.rank ?? ""} ${device.state}`.toLowerCase().includes(wanted));
    const free = all.filter((device) => device.state === "free").length;
    const failed = all.filter((device) => device.state === "failed").length;
    setText(
      count,
      `${plural(all.length, "device")}: ${all.length - free - failed} used, ${free} free` +
        (failed ? `, ${failed} failed` : "") +
        (found.length < all.length ? `; ${found.length} shown` : ""),
    );
    tiles.update(found, state.ranks);
  }

  const legend = [
    ["weights", "weights"],
    ["kv", "KV in use"],
    ["kv-free", "KV to spare"],
    ["other", "the rank's own"],
    ["free", "free"],
  ];
  const element = h(
    "div",
    { class: "now" },
    h(
      "div",
      { class: "bar-of-tools" },
      h("h2", {}, "Load"),
      awaited,
      h("div", { role: "group", "aria-label": "Span of the charts", class: "group" }, spans),
    ),
    h(
      "div",
      { class: "cards" },
      cards.map(([, card]) => card.element),
    ),
    h(
      "div",
      { class: "bar-of-tools" },
      h("h2", {}, "Devices"),
      count,
      h("label", { class: "inline", for: "device-filter" }, "Show"),
      filter,
      h(
        "p",
        { class: "legend" },
        legend.map(([key, words]) => h("span", {}, h("i", { class: `key mem-${key}` }), words)),
      ),
    ),
    tiles.element,
  );
  const destroy = () => {
    tiles.destroy();
    for (const [, card] of cards) card.destroy();
  };
  return { element, update, destroy };
}

export const now = { title: "Now", needs: ["policy"], build };

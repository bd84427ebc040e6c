/** One operation: its phases, how far it is, and what was planned beside what was measured. */

import { badge, h, table } from "./dom.js";
import { bytes, clock, number, plural, seconds, UNKNOWN, words } from "./format.js";
import { planMoves } from "./moves.js";

const OUTCOMES = { done: "ok", cancelled: "warn", aborted: "bad" };
const PHASES = ["plan", "prepare", "commit", "migrate", "release"];
const MEANINGS = {
  plan: "what moves is known",
  prepare: "records are copied, ranks join or hand over",
  commit: "all ranks flip at one step",
  migrate: "running requests move with their KV",
  release: "what only the old layout used becomes KV",
  abort: "back to the old layout",
};
const DEVICES_SHOWN = 24;

/** How it stands, in a badge. */
export function standing(operation) {
  return operation.outcome === null
    ? badge("busy", `in progress: ${operation.phase}`)
    : badge(OUTCOMES[operation.outcome], operation.outcome);
}

/** Its head line. */
export function headline(operation) {
  const { planned } = operation;
  const size = planned === null ? "" : `, ${planned.replicas_before} → ${plural(planned.replicas_after, "replica")}`;
  return `${words(operation.kind)}${size}`;
}

/** All of it. */
export function operationView(operation) {
  return h(
    "div",
    { class: "operation", "data-operation": operation.op_id, "data-phase": operation.phase },
    h(
      "p",
      { class: "lead" },
      standing(operation),
      ` ${headline(operation)} `,
      h("a", { href: `#/events/${operation.op_id}` }, operation.op_id),
    ),
    h(
      "p",
      {},
      operation.error === null ? operation.reason : `${operation.error.code}: ${operation.error.message}`,
      operation.request.reason ? ` (asked for: ${operation.request.reason})` : "",
    ),
    steps(operation),
    progress(operation),
    comparison(operation),
    moving(operation),
  );
}

function steps(operation) {
  const legs = Math.max(1, operation.legs);
  const spent = new Map(operation.timings.map(({ leg, phase, seconds: time }) => [`${leg} ${phase}`, time]));
  const isBack = ["abort", "aborted"].includes(operation.phase);
  const names = isBack ? [...PHASES, "abort"] : PHASES;
  const placeOf = (leg, phase) => leg * PHASES.length + PHASES.indexOf(phase);
  const isOn = operation.outcome === null && !isBack && operation.legs > 0;
  const place = isOn ? placeOf(operation.leg - 1, operation.phase) : 0; // how long those before took may come later
  const rows = Array.from({ length: legs }, (_, leg) =>
    h(
      "ol",
      { class: "steps", "aria-label": legs > 1 ? `Leg ${leg + 1} of ${legs}` : "Phases" },
      names.map((phase) => {
        if (phase === "plan" && leg > 0) return null;
        const time = spent.get(`${leg} ${phase}`);
        const isNow = operation.outcome === null && operation.phase === phase && (operation.leg || 1) === leg + 1;
        const isOver = time !== undefined || placeOf(leg, phase) < place;
        const state = isNow ? "now" : isOver ? "over" : "open";
        return h(
          "li",
          { class: state, "aria-current": isNow && "step", title: MEANINGS[phase] },
          h("b", {}, phase),
          h("small", {}, isNow ? "now" : time === undefined ? UNKNOWN : seconds(time)),
        );
      }),
    ),
  );
  return h("div", { class: "legs" }, rows);
}

function progress(operation) {
  const seen = operation.progress;
  if (seen === null || seen.bytes_total === 0) return null;
  const text = `${bytes(seen.bytes_done)} of ${bytes(seen.bytes_total)} copied (${words(seen.hmm_phase)})`;
  return h(
    "p",
    { class: "progress" },
    h("progress", { max: seen.bytes_total, value: seen.bytes_done, "aria-label": text }),
    ` ${text}`,
  );
}

function comparison({ planned, figures, elapsed_s: elapsed }) {
  if (planned === null) return h("p", {}, `${number(figures.sequences_moved)} sequences moved in ${seconds(elapsed)}`);
  const pause = figures.flip_s_max === null ? UNKNOWN : seconds(figures.flip_s_max);
  return table(
    "Planned beside measured",
    ["figure", "planned", "measured"],
    [
      ["time", seconds(planned.seconds), seconds(elapsed)],
      ["longest pause of a stream", seconds(planned.pause_ms / 1000), pause === UNKNOWN ? UNKNOWN : `at most ${pause}`],
      ["bytes copied", bytes(planned.bytes_copied), bytes(figures.bytes_copied)],
      [
        "peak of all devices",
        bytes(planned.peak_bytes),
        figures.peak_bytes_total ? bytes(figures.peak_bytes_total) : UNKNOWN,
      ],
      ["new replicas serve after", UNKNOWN, seconds(figures.capacity_s)],
      ["sequences moved", UNKNOWN, number(figures.sequences_moved)],
      ["KV blocks", UNKNOWN, `${number(figures.kv_blocks_before)} → ${number(figures.kv_blocks_after)}`],
    ],
  );
}

/** What comes to each device, and what it holds afterwards; the busiest first. */
function moving({ planned, figures }) {
  if (planned === null) return null;
  const all = Object.entries(planned.devices).sort(([, one], [, other]) => other.bytes_in - one.bytes_in);
  const rows = all
    .slice(0, DEVICES_SHOWN)
    .map(([device, change]) => [
      device,
      change.experts_in
        ? `${number(change.experts_in)} in, ${bytes(change.bytes_in)}`
        : change.bytes_in
          ? bytes(change.bytes_in)
          : "nothing",
      `${number(change.experts_before)} → ${number(change.experts_after)}`,
      peak(change.peak_bytes, figures?.peak_bytes?.[device]),
    ]);
  const rest = all.length > DEVICES_SHOWN ? h("p", {}, `and ${all.length - DEVICES_SHOWN} further devices`) : null;
  return h("div", {}, table("By device", ["device", "comes to it", "experts", "peak planned"], rows), rest);
}

const peak = (planned, measured) => bytes(planned) + (measured ? `, measured ${bytes(measured)}` : "");

/** The answer to a dry run. */
export function planView(plan) {
  if (plan.kind === "none" || plan.planned === null)
    return h("p", {}, "Nothing would change: the deployment is what is asked for.");
  const { planned } = plan;
  const lines = [
    planned.joining.length ? `joining: ${planned.joining.join(", ")}` : "",
    planned.leaving.length ? `leaving: ${planned.leaving.join(", ")}` : "",
    `${plural(planned.experts_moved, "expert")} to move, in ${plural(plan.legs.length, "leg")}`,
  ];
  return h(
    "div",
    { class: "plan", "data-kind": plan.kind },
    h(
      "p",
      { class: "lead" },
      `${words(plan.kind)}, ${planned.replicas_before} → ${plural(planned.replicas_after, "replica")}. `,
      lines.filter(Boolean).join("; "),
      ".",
    ),
    h(
      "dl",
      { class: "facts" },
      fact("bytes copied", "bytes_copied", planned.bytes_copied, bytes(planned.bytes_copied)),
      fact("time", "seconds", planned.seconds, seconds(planned.seconds)),
      fact("longest pause", "pause_ms", planned.pause_ms, seconds(planned.pause_ms / 1000)),
      fact("peak of all devices", "peak_bytes", planned.peak_bytes, bytes(planned.peak_bytes)),
      fact(
        "before → after",
        "bytes_after",
        planned.bytes_after,
        `${bytes(planned.bytes_before)} → ${bytes(planned.bytes_after)}`,
      ),
    ),
    planMoves(plan.legs.map((leg) => leg.moves)),
    moving({ planned }),
  );
}

function fact(label, name, value, text) {
  return h("div", {}, h("dt", {}, label), h("dd", { "data-figure": name, "data-value": value }, text));
}

/** Operations in a table, newest first. */
export function operationsTable(operations) {
  return table(
    "Operations",
    ["operation", "begun", "what", "outcome", "took", "copied"],
    operations.map((operation) => [
      h("a", { href: `#/events/${operation.op_id}` }, operation.op_id),
      clock(operation.accepted_unix),
      headline(operation),
      standing(operation),
      seconds(operation.elapsed_s),
      bytes(operation.figures.bytes_copied),
    ]),
  );
}
